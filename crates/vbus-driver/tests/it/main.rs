// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver against real devices of a bus, through the registers of their PCI functions, and
//! against devices that are hostile.
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
