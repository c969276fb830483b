//! The driver end of vbus, for any environment: a kernel, a process in a guest, a plain process beside the bus.
//!
//! The environment implements [`Hal`]; over it [`Function`] probes, opens and calls a device, and [`venet`] and [`state`] drive the classes
//! that come with vbus. Waiting is the environment's own: it knows its interrupts, threads and descriptors. What a waiting driver does is
//! always the same: arm each signal it waits for; sleep unless one of them was missed; on waking, acknowledge the interrupt
//! ([`Function::acknowledge`]) *before* it looks at the signals.
//!
//! The device is not trusted: every number it returns is checked before it is used, and a device that breaks the protocol gets an
//! [`Error`], never an access outside of the memory that the driver gave it.
#![cfg_attr(not(test), no_std)]

mod error;
mod function;
mod hal;
pub mod state;
pub mod venet;

pub use error::Error;
pub use function::{Acknowledger, Bell, Function, Info, Name, State};
pub use hal::{Dma, Doorbell, Hal, NoMemory};
pub use vbus_shm::{Pace, Rest, Status};
