//! The device classes of vbus: [`venet`], an Ethernet controller, and [`state`], named values.

pub mod state;
pub mod venet;

use vbus_core::DeviceClass;

/// All classes of this crate.
pub fn classes() -> Vec<Box<dyn DeviceClass>> {
    vec![Box::new(venet::VenetClass::new()), Box::new(state::StateClass)]
}

/// Takes a lock that a panic may have poisoned: one task's panic must not take the others with it.
fn lock<T: ?Sized>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
