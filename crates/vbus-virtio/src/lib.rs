// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Virtio for drivers that exist, on the device's side.
//!
//! [`queue`] is the device end of virtqueues, split and packed. It knows nothing of a device or of
//! a transport.

pub mod queue;

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
