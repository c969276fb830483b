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

mod connections;
mod pages;

mod hal {
    pub type KernelHal = crate::local::Local;
}

mod kernel {
    pub mod alloc {
        #[derive(Debug)]
        pub struct NoMemory;
    }

    pub mod lock {
        use std::sync::{Mutex, MutexGuard};

        use super::alloc::NoMemory;

        pub struct SpinLock<T>(Mutex<T>);

        impl<T> SpinLock<T> {
            #[allow(clippy::unnecessary_wraps, reason = "the kernel's may fail")]
            pub fn new(value: T) -> Result<Self, NoMemory> {
                Ok(Self(Mutex::new(value)))
            }

            pub fn lock(&self) -> MutexGuard<'_, T> {
                self.0.lock().unwrap()
            }
        }
    }
}
