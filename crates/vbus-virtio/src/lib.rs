// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Virtio for drivers that exist, on the device's side.
//!
//! - [`device`] says what a virtio device is, and what a transport is. Neither knows the other.
//! - [`pci`] is the transport that makes a device a PCI function.
//! - [`vhost_user`] is the transport for a front end that emulates the PCI function itself.
//! - [`net`] is a device: the class `virtio-net`, a network card in front of the back ends of
//!   [`vbus_net`].
//! - [`queue`] is the device end of virtqueues, split and packed. It knows nothing of a device or
//!   of a transport.
//!
//! ```
//! use std::sync::Arc;
//! use serde_json::json;
//! use vbus_core::{Bus, Executor, Tuning};
//! use vbus_net::{Direct, Switches};
//! use vbus_pci::{Options, device_function, region};
//! use vbus_virtio::net::VirtioNetClass;
//!
//! let class = VirtioNetClass::on(Switches::default(), Arc::new(Direct));
//! let bus = Bus::new(Executor::start(Tuning::default())?, vec![Box::new(class)]);
//! let endpoint = bus.create("net0", "virtio-net", &json!({ "backend": "switch" })).unwrap();
//!
//! // What a driver finds first: vendor and device in the configuration space.
//! let mut function = device_function(endpoint, Options::default());
//! let mut ids = [0; 4];
//! function.read(region::CONFIG, 0, &mut ids);
//! assert_eq!(u32::from_le_bytes(ids), 0x1041_1af4);
//! # Ok::<(), std::io::Error>(())
//! ```

pub mod device;
pub mod net;
pub mod pci;
pub mod queue;
pub mod vhost_user;

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
