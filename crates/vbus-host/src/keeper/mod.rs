// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A bus that is killed leaves nothing behind that anybody misses (spec/keeper.md): the *keeper*, a
//! process of its own, has duplicates of all descriptors of the bus, and the last state of each
//! device. When the bus dies, the keeper starts the next one, and hands all over as a bus does that
//! leaves (`take_over`). VMMs, guests and drivers keep their connections.
//!
//! `journal` is what the keeper has, and the messages that it comes with. `link` is the bus's side.
//! `process` is the keeper: it starts buses, follows them, and decides what their end means.
//!
//! Why messages over a socket, and no shared memory: the kernel has a message from the moment on
//! when the bus has sent it, also if the bus is killed in the next one. A message that the bus was
//! sending then is cut, and does not count. So each state is whole at every instruction without a
//! protocol of its own, descriptors arrive together with the state that names them, and a bus that
//! somebody took over cannot change what it has given away. The keeper reads the lengths, the names
//! of devices and the offer; what a driver has written is a text for it that it hands on.
//!
//! What a state costs is a system call or two and some microseconds for each message that changes a
//! device. Doorbells, rings and pages cost nothing: their state is in the driver's memory.

mod journal;
mod link;
mod process;

pub use link::{Keeping, Link};
pub use process::{Order, run};
