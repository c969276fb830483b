//! What of the guest needs no bare machine: its command line, its memory, its walk over PCI, its
//! report. Tested on the host.
#![cfg_attr(not(test), no_std)]

pub mod blocks;
pub mod dice;
pub mod json;
pub mod pci;
pub mod rate;
pub mod words;
