// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Parts of the Linux driver (`linux/`) that need no kernel, as they are, before real devices of a
//! bus: what happens when two processors, or a look and a shutdown, meet. The kernel is stood in
//! for by what they use of it.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
#![allow(dead_code, reason = "not all of the driver's functions are called here")]

#[path = "../../../../linux/src/connection.rs"]
mod connection;
#[path = "../it/local.rs"]
mod local;
#[path = "../../../../linux/src/pic/page.rs"]
mod page;
#[path = "../../../../linux/src/pic/processor.rs"]
mod processor;

mod connections;
mod pages;
mod processors;

mod hal {
    pub type KernelHal = crate::local::Local;
}

mod kernel {
    pub mod alloc {
        #[derive(Debug)]
        pub struct NoMemory;
    }

    pub mod lock {
        use std::sync::atomic::{AtomicBool, Ordering};
        use std::sync::{Mutex, MutexGuard};

        use super::alloc::NoMemory;

        /// Whoever locks it after it was dropped is found.
        pub struct SpinLock<T> {
            value: Mutex<T>,
            is_gone: AtomicBool,
        }

        impl<T> SpinLock<T> {
            #[allow(clippy::unnecessary_wraps, reason = "the kernel's may fail")]
            pub fn new(value: T) -> Result<Self, NoMemory> {
                Ok(Self { value: Mutex::new(value), is_gone: AtomicBool::new(false) })
            }

            pub fn lock(&self) -> MutexGuard<'_, T> {
                assert!(!self.is_gone.load(Ordering::Relaxed), "a lock is used after its end");
                self.value.lock().unwrap()
            }
        }

        impl<T> Drop for SpinLock<T> {
            fn drop(&mut self) {
                self.is_gone.store(true, Ordering::Relaxed);
            }
        }
    }

    pub mod timer {
        use std::ptr::NonNull;
        use std::sync::atomic::{AtomicBool, Ordering};

        use super::alloc::NoMemory;

        /// A timer that runs at the worst of all times: while it is stopped.
        pub struct Timer<T> {
            target: NonNull<T>,
            run: fn(&T),
            is_set: AtomicBool,
        }

        impl<T> Timer<T> {
            /// # Safety
            /// As the kernel's.
            #[allow(clippy::unnecessary_wraps, reason = "the kernel's may fail")]
            #[allow(unsafe_code, reason = "the driver's promise is that of the kernel's")]
            pub unsafe fn new(target: NonNull<T>, run: fn(&T)) -> Result<Self, NoMemory> {
                Ok(Self { target, run, is_set: AtomicBool::new(false) })
            }

            pub fn run_after(&self, _nanoseconds: u64) {
                self.is_set.store(true, Ordering::Relaxed);
            }
        }

        impl<T> Drop for Timer<T> {
            #[allow(unsafe_code, reason = "the target is valid until this returns")]
            fn drop(&mut self) {
                if self.is_set.swap(false, Ordering::Relaxed) {
                    // SAFETY: by the promise to `new`.
                    (self.run)(unsafe { self.target.as_ref() });
                }
            }
        }
    }
}
