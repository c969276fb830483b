// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Virtio over vhost-user: a [`VirtioDevice`](crate::device::VirtioDevice) for a front end that
//! emulates the rest of the device itself, as QEMU does with `-netdev vhost-user`.
//! `spec/vhost-user.md` says what it finds.
//!
//! The front end connects to the device's socket ([`VhostUserServer`]) and says where the driver's
//! memory and rings are. The rings' signals are eventfds, so the front end and this socket have no
//! part in a frame.
//!
//! - `message` reads messages and writes replies.
//! - `connection` finds messages in the bytes of a socket; `server` has the listener and chooses
//!   the front end; `task` runs it.
//! - `backend` carries out requests. `regions` is the table of memory, `shared` what the device's
//!   tasks use, `in_flight` the memory that outlives this process, and `failure` why a request
//!   fails.
//! - `front` is how the bus finds out that a device is one for vhost-user.
//!
//! The messages are our own code. The crate `vhost` of rust-vmm reads them by blocking calls until
//! a message is whole: a front end that stops in the middle would hold a thread, and a socket that
//! does not block would lose what was read. So it needs a thread for each device, where a device of
//! this bus is a task. Nor does it bound the descriptors that wait for their close.

mod backend;
mod card;
mod connection;
mod failure;
mod front;
mod in_flight;
mod message;
mod regions;
mod server;
mod shared;
mod task;

pub use card::NetworkCard;
pub use front::{Front, has_front};
pub use task::VhostUserServer;
pub use vfio_user_protocol::Stats;

/// Why a device behind vhost-user is not saved, and why no other process can take its server over.
pub const NOT_SAVED: &str = "it is served over vhost-user, whose session has no saved state yet";
