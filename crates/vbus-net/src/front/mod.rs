// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What every front of an Ethernet device needs between its rings and its back end: a queue pair
//! and its task, settings, counters, backpressure, interrupt coalescing.
//!
//! A [`Nic`] is a device as its settings make it. The rings of a front implement [`TxRing`] and
//! [`RxRing`]. [`Pairs`] are the queue pairs of a driver that has started. Each has a task, which
//! moves frames from a transmit ring to the back end, and from the back end into the buffers of a
//! receive ring.

mod backpressure;
mod coalesce;
mod config;
mod counters;
mod nic;
mod pair;
mod pairs;
mod ring;
mod rx;
mod saved;
mod tx;

pub use coalesce::Setting;
pub use config::{Config, Duplex, MTU_RANGE};
pub use counters::{Gauge, METRICS, PairCounters, RxCounters, RxDrops, TxCounters, TxDrops};
pub use nic::Nic;
pub use pairs::{Pairs, Setup};
pub use ring::{Ring, RxRing, TxRing};
pub use rx::{Choices, HEAD_MAX, Receiver};
pub use saved::{NicState, PairsState, ReceiverState};
pub(crate) use saved::{check_outlasts, forget_frames};
