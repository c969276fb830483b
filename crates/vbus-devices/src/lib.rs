//! The device classes of vbus: [`venet`], an Ethernet controller, [`state`], named values,
//! [`sched`], the priority of virtual CPUs, and [`pic`], an interrupt controller for the others. A
//! bus makes devices of them from their settings:
//!
//! ```
//! use serde_json::json;
//! use vbus_core::{Bus, Executor, Trust, Tuning};
//!
//! let bus = Bus::new(Executor::start(Tuning::default())?, vbus_devices::classes(), Trust::Sealed);
//! let nic = bus.create("net0", "venet", &json!({ "backend": "switch", "mtu": 9000 })).unwrap();
//! assert_eq!(nic.inspect()["device"]["mtu"], 9000);
//!
//! let pages = json!({ "pages": [{ "name": "setpoint", "bytes": 8, "owner": "device" }] });
//! let values = bus.create("values", "state", &pages).unwrap();
//! let set = json!({ "op": "set", "page": "setpoint", "text": "42" });
//! values.device().control(&set, &mut |_| true).unwrap();
//! let mut text = None;
//! let get = json!({ "op": "get", "page": "setpoint" });
//! values.device().control(&get, &mut |value| { text = Some(value["text"].clone()); true }).unwrap();
//! assert_eq!(text, Some(json!("42")));
//! # Ok::<(), std::io::Error>(())
//! ```

pub mod pic;
pub mod sched;
pub mod state;
pub mod venet;

use vbus_core::DeviceClass;

/// All classes of this crate.
pub fn classes() -> Vec<Box<dyn DeviceClass>> {
    classes_with(sched::SchedClass::new())
}

/// All classes of this crate, with a `sched` that is made otherwise than by
/// [`SchedClass::new`](sched::SchedClass::new).
pub fn classes_with(sched: sched::SchedClass) -> Vec<Box<dyn DeviceClass>> {
    vec![
        Box::new(venet::VenetClass::new()),
        Box::new(state::StateClass),
        Box::new(sched),
        Box::new(pic::PicClass),
    ]
}

/// Takes a lock that a panic may have poisoned: one task's panic must not take the others with it.
fn lock<T: ?Sized>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
