// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tests of the VMM's parts against a KVM and against servers, honest and not.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod pci;
