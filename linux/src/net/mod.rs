// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The network interface: the driver of class `venet` (spec/venet.md) in the kernel's network
//! stack.
//!
//! [`interface`] is the interface, from its registration to its removal. While the administrator
//! has set it up, it has a connection. `pair` has the data path: `tx` and `rx`. `settings` is what
//! a connection begins with, so that the interface comes back as it was when the device has lost
//! its connection. `ethtool` answers the tool of that name. `ffi` is the side of the shim.

pub mod ethtool;
mod ffi;
pub mod interface;
mod pair;
mod rx;
mod settings;
mod stats;
mod tx;

pub use interface::{Interface, probe};
