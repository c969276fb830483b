// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Shared memory of vbus: the ABI's layouts, and both ends of signal, ring, state page and
//! interrupt page.
//!
//! There are three separate constructs, because "who must be woken?" and "which values are kept?"
//! are separate questions:
//!
//! - a [`signal`] wakes the other end; it can be put beside any layout;
//! - a [`ring`] keeps every value in flight, in order;
//! - a [`state`] page keeps the newest value only.
//!
//! A [`ledger`] belongs to a ring whose device returns entries out of order. An interrupt page
//! ([`pic`]) tells a processor which of many interrupts are pending, without an exit for each.
//!
//! [`abi`] holds every number that both ends must agree on. The crate has no dependency and does
//! not allocate. It never panics because of a value that the peer wrote. It also compiles as a
//! module of another crate (a Linux driver, a model checker): its paths are relative, and all
//! atomics come from [`sync`].
//!
//! ```
//! use vbus_shm::{ring::{DeviceEnd, DriverEnd, Entry, Layout, Return, Returns}, sync::Word};
//!
//! let layout = Layout::new(8, Returns::Entries).unwrap();
//! let memory: Vec<Word> = (0..layout.words()).map(|_| Word::new(0)).collect();
//! let mut driver = DriverEnd::create(&memory[..], layout, 0).unwrap();
//! let mut device = DeviceEnd::attach(&memory[..]).unwrap();
//!
//! driver.submit(Entry { addr: 0x1000, len: 64, id: 7, flags: 0 }).unwrap();
//! let kick = driver.post();
//! assert!(!kick.is_wanted(), "nobody has armed yet, so nobody need be woken");
//!
//! let entry = device.take().unwrap().expect("one entry is there");
//! assert_eq!((entry.addr, entry.id), (0x1000, 7));
//! device.give_back(Return { len: 60, ..entry.into() });
//! let _kick = device.post();
//! assert_eq!(driver.reap().unwrap().expect("it came back").len, 60);
//! ```
#![cfg_attr(not(test), no_std)]

pub mod abi;
pub mod copy;
mod error_code;
pub mod ledger;
pub mod memory;
pub mod pace;
pub mod pic;
pub mod raw;
pub mod ring;
pub mod signal;
pub mod state;
pub mod sync;
mod versions;
mod wide;

pub use error_code::ErrorCode;
pub use memory::Memory;
pub use pace::{Pace, Rest};
pub use versions::Versions;

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
