// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Network back ends of vbus. An Ethernet device is plugged into one of them.
//!
//! A *front* is a device that a driver sees (`venet`, in another crate). The front makes a
//! [`Backend`] when it is created. When its driver has started, the front plugs the driver in
//! ([`Backend::plug`]). Then each queue pair of the driver has a [`Queue`], which belongs to the
//! task of that pair:
//!
//! - The front gives each frame of the driver to [`Queue::send`].
//! - The front lends its receive queue, an [`RxSink`], to [`Queue::receive`], which puts frames
//!   into the driver's buffers. If frames come from elsewhere too ([`Backend::shares_sinks`]: the
//!   switch), the front shares its receive queues instead, each under a lock ([`Port::lanes`]).
//!
//! [`front`] has what is the same in all fronts: a queue pair and its task, over rings of any
//! layout.
//!
//! A back end knows neither the front's rings nor its registers. The back ends are the [`Medium`]s
//! (switch, TAP interface, stream socket and null), [`Captured`], which records the frames that
//! pass another back end, and [`Limited`], which limits their rate. [`BackendConfig`] reads the
//! settings that choose a back end. An [`Opener`] opens the files, sockets and interfaces of the
//! back ends.
//!
//! ```
//! use std::sync::Arc;
//! use vbus_net::{Backend, Direct, Link, Medium, Offloads, Opener, Switches};
//!
//! let (switches, link) = (Switches::default(), Arc::new(Link::default()));
//! let opener: Arc<dyn Opener> = Arc::new(Direct);
//! let medium = Medium::Switch("lab".into());
//! let backend = medium.open(&switches, &opener, 1, 1500, link.clone()).unwrap();
//! assert!(backend.shares_sinks(false) && backend.tx_offloads() == Offloads::ALL);
//! assert!(!link.is_up()); // until a driver is plugged in
//! ```

mod backend;
mod bucket;
mod capture;
mod config;
mod filter;
mod frame;
pub mod front;
mod inbound;
mod limited;
mod limits;
mod link;
mod medium;
mod metrics;
mod null;
mod offload;
mod opener;
mod pcap;
pub mod rss;
mod sink;
mod steering;
mod stream;
mod switch;
mod tap;
mod uplink;

pub use backend::{Backend, Done, Plug, Port, Queue, Sent, TxDrop};
pub use capture::Captured;
pub use config::BackendConfig;
pub use filter::{Addresses, Filter, Modes, Vlans};
pub use frame::{
    Body, CHAIN_MAX, ETH_BYTES, ETH_OVERHEAD, FRAME_MAX, Hash, Header, PIECES_MAX, Packet,
    TAG_BYTES, flag,
};
pub use limited::Limited;
pub use limits::Limits;
pub use link::Link;
pub use medium::Medium;
pub use metrics::{BACKEND_METRICS, UPLINK_METRICS};
#[cfg(feature = "fuzzing")]
pub use offload::Plain;
pub use offload::dhcp_checksum;
pub use opener::{Direct, HandedOver, Opener, Way, open_capture};
pub use rss::Rss;
pub use sink::{Delivery, OnFull, Read, Reserved, RxDrop, RxSink, SharedSink, Waiter};
pub use steering::Steering;
pub use switch::{PortRules, SwitchPort, Switches, Vlan};
pub use uplink::{Uplink, UplinkConfig};
pub use vbus_tap::{BROADCAST, HEADER_BYTES, Mac, Offloads, is_group, parse_mac, show_mac};

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
