// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tests both ends of the protocol against each other, against arbitrary bytes, and against another
//! crate.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test may panic")]

#[macro_use]
mod support;

mod document;
mod effort;
mod exhaustion;
mod foreign_server;
mod malformed;
mod migration;
mod parser;
mod saved;
mod second_opinion;
mod session;
