// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tests the driver against real devices of a bus, through the registers of their PCI functions,
//! and against hostile devices.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod anything;
mod calls;
mod doorbells;
mod fake;
mod function;
mod handshake;
mod hostile;
mod local;
mod nic;
mod ownership;
mod pages;
mod pic;
mod requests;
mod sched;
