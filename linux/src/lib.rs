// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Linux driver of vbus: PCI functions of the bus in a stock kernel.
//!
//! `vbus-shm` and `vbus-driver` are the same crates that every other driver of vbus uses. This
//! crate adds what a kernel is asked for: an environment ([`hal`]), one PCI function ([`device`]),
//! its interrupts ([`interrupt`]), the watch over its connection ([`watch`]), and the classes. The
//! C shim (`linux/shim`) has no decisions. It is the kernel's interface, and [`kernel`] wraps it
//! safely.
//!
//! One object serves all kernels. So no struct of the kernel appears here, only handles.
//!
//! There is no `alloc` crate. All allocations may fail, and say so ([`kernel::alloc`]).
#![no_std]

mod connection;
pub mod device;
pub mod hal;
pub mod hypercall;
pub mod interrupt;
pub mod kernel;
pub mod net;
mod panic;
pub mod pic;
pub mod sched;
pub mod state;
pub mod watch;
