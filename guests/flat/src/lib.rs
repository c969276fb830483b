// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The parts of the guest that need no bare machine: its command line, its memory, its walk over
//! PCI, and its report. Their tests run on the host.
#![cfg_attr(not(test), no_std)]

pub mod blocks;
pub mod dice;
pub mod json;
pub mod pci;
pub mod rate;
pub mod words;
