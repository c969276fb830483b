// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mappings of memory that another process, or a device, may take away.
//!
//! The owner of a file can truncate it, or punch holes into it, while this process has it mapped.
//! No seal prevents the holes. The kernel may also find no page for a hole: the pool of huge pages
//! is empty, the file system is full, the system has no memory to promise. In each case the next
//! access to the mapping raises SIGBUS, which ends the process by default.
//!
//! This crate handles SIGBUS. The handler knows the mappings ([`Mapping`], [`Guard`]). It lays
//! other memory over the part that has no pages, marks the mapping's [`Backing`] as lost, and
//! returns, and the access goes on. The owner of the mapping sees the mark and ends what it does
//! with this peer. A SIGBUS from anywhere else ends the process as if there were no handler.
//!
//! A system call on such memory raises no signal. It fails with EFAULT. A caller that gets EFAULT
//! touches the memory itself ([`touch`]), so that the mark is set in this case too.
//!
//! ```
//! use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
//! use rustix::mm::ProtFlags;
//! use vbus_mapping::{Backing, Mapping};
//!
//! let file = memfd_create("peer", MemfdFlags::CLOEXEC)?;
//! ftruncate(&file, 8192)?;
//! let backing = Backing::zeros(4096)?;
//! let mapping = Mapping::file(&file, 0, 8192, ProtFlags::READ | ProtFlags::WRITE, &backing)?;
//! ftruncate(&file, 0)?;
//! // SAFETY: the byte is mapped.
//! let byte = unsafe { mapping.base().as_ptr().add(5000).read_volatile() };
//! assert_eq!((byte, backing.is_lost()), (0, true));
//! # Ok::<(), rustix::io::Errno>(())
//! ```
#![allow(unsafe_code)] // Maps memory, and handles the signal of its disappearance.

mod backing;
mod mapping;
mod ranges;
mod reaper;
mod signal;

pub use backing::Backing;
pub use mapping::{Mapping, Piece, touch};
pub use ranges::Guard;
pub use signal::losses;

/// The example of the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
