// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tests of virtqueues by their public interface.
#![allow(clippy::unwrap_used)] // A failed unwrap fails its test.

mod hostile;
mod state;
