// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device end of virtqueues, split and packed (VIRTIO 1.3, sections 2.7 and 2.8).
//!
//! A [`Queue`] belongs to a driver's queue while that is enabled. For each poll the device takes a
//! [view](vbus_core::View) of the driver's memory and gets a [`Turn`] of the queue: it takes
//! chains, returns them, publishes what it returned, and asks whether the driver wants an
//! interrupt. Before it sleeps, it [arms](Turn::arm) the queue: the driver's next buffer then comes
//! with a kick.
//!
//! ```
//! use vbus_core::MemoryContext;
//! use vbus_core::shm::signal::Armed;
//! use vbus_virtio::queue::{Chain, Format, Layout, Queue, RingFeatures, Violation};
//!
//! let layout = Layout {
//!     format: Format::Split,
//!     size: 256,
//!     descriptors: 0x1000,
//!     driver_area: 0x2000,
//!     device_area: 0x3000,
//! };
//! let mut queue = Queue::new(layout, RingFeatures::default()).unwrap();
//!
//! let memory = MemoryContext::new();
//! let view = memory.view();
//! // This driver has no memory at all. The error comes once, and the queue is retired.
//! assert!(matches!(queue.turn(&view), Err(Violation::Unmapped(_))));
//! let mut turn = queue.turn(&view).unwrap();
//! assert_eq!(turn.next(&mut Chain::new()), Ok(false));
//! assert_eq!(turn.arm(), Armed::Waiting);
//! ```
//!
//! # What a queue promises
//! - A chain that was given out is a private copy. The queue reads each descriptor once. It checks
//!   the copy, and the device uses the copy.
//! - A chain has at most [`PARTS_MAX`] parts, none of them empty, none of them wraps around. Those
//!   for reading come first. All together have less than 4 GiB. No part was checked against the
//!   memory: the device does this when it looks it up, and [retires](Queue::retire) the queue if
//!   the part is not there.
//! - Used buffers become visible to the driver all at once, by [`Turn::publish`] or
//!   [`Turn::flush`]: a frame that spans several buffers never shows in part.
//! - No kick is lost: after [`Turn::arm`] said `Waiting`, the driver's next buffer comes with one.
//!   No interrupt is lost: a driver that asked for one before a buffer was published gets it.
//! - A queue has at most as many chains in flight as it has descriptors.
//! - No call allocates, but for the first chain that is longer than all before.
//!
//! # What a hostile driver can do, and what it costs
//! The driver may write anything anywhere at any time, on another processor, also during a turn.
//!
//! - *It breaks a rule*: an index goes back or runs ahead; a number is beyond its table; a chain
//!   has a loop, too many parts, an empty one, one that wraps around, or a readable one behind a
//!   writable one; a table is in a table; more is in flight than the queue has; an area is not
//!   mapped. The device gets one [`Violation`]. The queue is retired: it takes, returns and
//!   publishes nothing from then on, and never wakes the device. A reset of the queue or of the
//!   device makes a new one.
//! - *It writes to descriptors that were taken*: nothing happens, because the copy counts.
//! - *It writes to the used ring, or to the device's event suppression*: the device reads neither.
//!   The driver confuses itself alone.
//! - *Its event index makes no sense*: it gets an interrupt too many or too few.
//! - *It makes buffers available faster than the device works*: [`Turn::next`] takes one chain at a
//!   time, and the device stops at its budget of work for a poll.
//! - *It sends the longest chains*: one call reads at most 1025 descriptors, 16 KiB.
//! - *Its areas or tables lie in scattered pages, or at odd addresses*: each access looks up its
//!   page, which costs some tens of nanoseconds.
//! - *It uses a buffer id of a packed queue twice*: both buffers come back with that id.
//! - *It takes memory away from a running queue*: the device reads zeros for the rest of the turn.
//!   The next turn fails with [`Violation::Unmapped`].
//!
//! A queue takes 4 KiB of memory at most, and 12 bytes more for each descriptor with IN_ORDER. A
//! [`Chain`] takes 16 KiB if the driver has sent the longest.
//!
//! # State
//! [`Queue::state`] gives all of a queue as plain values ([`State`]), and [`Queue::resume`] takes
//! them up, in this process or in another. [`Queue::recover`] goes on for a process that died, if
//! that kept a region of memory with the buffers in flight ([`InFlightRegion`]).
//! [`Position::vring_base`] is what vhost-user calls the base of a queue.

mod chain;
#[cfg(test)]
mod death;
#[cfg(test)]
mod driver;
mod engine;
mod event;
mod indirect;
mod inflight;
mod layout;
mod memory;
#[cfg(test)]
mod model;
mod order;
mod packed;
#[cfg(test)]
mod property;
mod split;
mod state;
mod violation;

pub use self::chain::{Chain, Part};
pub use self::engine::{Notification, Queue, Turn};
pub use self::inflight::InFlightRegion;
pub use self::layout::{BadLayout, Format, Layout, PARTS_MAX, RingFeatures, SIZE_MAX, feature};
pub use self::state::{BadState, InFlight, Position, State, Unsettled};
pub use self::violation::Violation;
