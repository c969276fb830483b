// SPDX-License-Identifier: Apache-2.0 OR MIT
//! PCI functions, driven register by register.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test may panic")]

mod function;
mod generic;
mod saved;
