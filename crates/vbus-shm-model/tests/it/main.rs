// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checks each model whole, and sees it fail without each of its places.
#![allow(clippy::unwrap_used)] // A failed unwrap fails its test.

mod harness;
mod kill;
mod pic;
mod ring;
mod signal;
mod state;
