// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Safe wrappers of the shim: what the driver asks the kernel for, one file a question.

pub mod alloc;
pub mod cpu;
pub mod dma;
pub mod errno;
mod ffi;
pub mod irq;
pub mod lock;
pub mod log;
pub mod pci;
pub mod port;
pub mod power;
pub mod sysfs;
pub mod time;
pub mod timer;
pub mod work;
pub mod x86;

pub use alloc::{KBox, KVec, Ref};
pub use errno::Errno;
