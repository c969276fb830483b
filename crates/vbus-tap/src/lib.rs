// SPDX-License-Identifier: Apache-2.0 OR MIT
//! TAP interfaces of Linux (Documentation/networking/tuntap.rst). Both ends of vbus use them: the
//! device end plugs a device into one, and the guest's program makes one for each NIC.
//!
//! A [`Queue`] is a file descriptor. Each read gives one frame, and each write takes one. A
//! virtio-net header of [`HEADER_BYTES`] bytes, in little-endian byte order, precedes the frame.
//! A [`Vhost`] lets the kernel itself carry the frames between a queue and virtqueues.
//!
//! ```no_run
//! use vbus_tap::{Offloads, Queue, Setup};
//!
//! let (queue, name) = Queue::attach("tap%d", Setup::default())?;
//! queue.set_offloads(Offloads::CSUM)?; // frames that are read may lack their checksum
//! vbus_tap::set_mtu(&name, 9000)?;
//! vbus_tap::set_up(&name)?;
//! # Ok::<(), rustix::io::Errno>(())
//! ```

mod interface;
mod mac;
mod offloads;
mod queue;
mod request;
mod vhost;

pub use interface::{set_mac, set_mtu, set_up};
pub use mac::{BROADCAST, Mac, is_group, parse_mac, show_mac};
pub use offloads::Offloads;
pub use queue::{FILTERED_MAX, QUEUE_IOCTLS, Queue, Setup, advice};
pub use vhost::{RingPlace, VHOST_IOCTLS, Vhost, VhostRegion, VhostRing, vhost_advice};

/// Bytes of the header before each frame (virtio 1.3, 5.1.6, with `num_buffers`).
pub const HEADER_BYTES: usize = 12;

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
