// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device classes of vbus: [`venet`], an Ethernet controller, [`uplink`], the way out of a
//! switch, [`state`], named values, and [`pic`], an interrupt controller for the other devices.
//! (The class `sched` has a crate of its own.) A bus creates devices from their settings:
//!
//! ```
//! use serde_json::json;
//! use vbus_core::{Bus, Executor, Tuning};
//!
//! let bus = Bus::new(Executor::start(Tuning::default())?, vbus_devices::classes());
//! let nic = bus.create("net0", "venet", &json!({ "backend": "switch", "mtu": 9000 })).unwrap();
//! assert_eq!(nic.inspect()["device"]["mtu"], 9000);
//!
//! let pages = json!({ "pages": [{ "name": "setpoint", "bytes": 8, "owner": "device" }] });
//! let values = bus.create("values", "state", &pages).unwrap();
//! let set = json!({ "op": "set", "page": "setpoint", "text": "42" });
//! values.device().control(&set, &mut |_| true).unwrap();
//! let mut text = None;
//! let get = json!({ "op": "get", "page": "setpoint" });
//! let mut reply = |value: serde_json::Value| {
//!     text = Some(value["text"].clone());
//!     true
//! };
//! values.device().control(&get, &mut reply).unwrap();
//! assert_eq!(text, Some(json!("42")));
//! # Ok::<(), std::io::Error>(())
//! ```

pub mod pic;
pub mod state;
pub mod uplink;
pub mod venet;

use std::sync::Arc;

use vbus_core::DeviceClass;
use vbus_net::{Direct, Opener, Switches};

/// The device classes of this crate. This process opens what their devices need.
pub fn classes() -> Vec<Box<dyn DeviceClass>> {
    classes_opening(Arc::new(Direct))
}

/// The device classes of this crate. `opener` opens the files, sockets and interfaces of their
/// devices.
pub fn classes_opening(opener: Arc<dyn Opener>) -> Vec<Box<dyn DeviceClass>> {
    classes_on(Switches::default(), opener)
}

/// The same on these switches, which they share with other classes.
pub fn classes_on(switches: Switches, opener: Arc<dyn Opener>) -> Vec<Box<dyn DeviceClass>> {
    vec![
        Box::new(venet::VenetClass::on(switches.clone(), opener.clone())),
        Box::new(uplink::UplinkClass::new(switches, opener)),
        Box::new(state::StateClass),
        Box::new(pic::PicClass),
    ]
}

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
