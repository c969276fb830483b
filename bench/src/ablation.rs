// SPDX-License-Identifier: Apache-2.0 OR MIT
//! vbus-shm's own sources, compiled again with one thing changed: what does it cost, and what does
//! it bring?

#[allow(dead_code)]
pub mod nofence;
