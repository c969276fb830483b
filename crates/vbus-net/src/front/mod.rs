// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What every front of an Ethernet device needs between its rings and its back end: a queue pair
//! and its task, settings, counters, backpressure, interrupt coalescing.
//!
//! The rings of a front implement [`TxRing`] and [`RxRing`]. A [`Pair`] moves frames from a
//! transmit ring to the back end, and from the back end into the buffers of a receive ring.

mod backpressure;
mod coalesce;
mod config;
mod counters;
mod pair;
mod ring;
mod rx;
mod tx;

pub use coalesce::Setting;
pub use config::{Config, Duplex, MTU_RANGE};
pub use counters::{Gauge, METRICS, PairCounters, RxCounters, RxDrops, TxCounters, TxDrops};
pub use pair::{Pair, PairTask, Rx};
pub use ring::{Ring, RxRing, TxRing};
pub use rx::{HEAD_MAX, Receiver, RxQueue, RxSlot};
pub use tx::TxQueue;
