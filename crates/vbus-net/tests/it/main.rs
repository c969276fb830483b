// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The back ends behind a minimal front that is not `venet`. It shows what a second front has to
//! do.
#![allow(clippy::unwrap_used)] // A test may panic.
#![allow(clippy::cast_possible_truncation)] // Small numbers.

mod front;
mod media;
mod property;
