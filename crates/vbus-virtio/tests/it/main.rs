// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tests of virtqueues by their public interface, and of devices behind a transport, driven as a
//! guest's driver drives them.
#![allow(clippy::unwrap_used)] // A failed unwrap fails its test.

mod dirty;
mod hostile;
mod in_order;
mod nic;
mod saved;
mod state;
mod transport;
mod vhost_user;

/// A driver in the process.
use vbus_test_driver::virtio as driver;
