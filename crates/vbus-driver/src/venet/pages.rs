// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The contents of the device's pages.

use vbus_shm::abi::venet::{counters_page, status_page};

/// The status page: link and statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NicStatus {
    /// Whether there is a link.
    pub link: bool,
    /// The device's current MAC address.
    pub mac: [u8; 6],
    /// Speed of the link in Mb/s, if the device knows it.
    pub speed: Option<u32>,
    /// Duplex mode of the link.
    pub duplex: Duplex,
    /// How often the driver was asked to announce its addresses to the network. After a change it
    /// sends gratuitous ARP replies and neighbour advertisements.
    pub announces: u64,
    /// The device's incarnation.
    pub incarnation: u64,
    /// Frames, bytes and dropped frames from the driver.
    pub tx: Traffic,
    /// Frames, bytes and dropped frames to the driver.
    pub rx: Traffic,
}

/// The duplex mode of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Duplex {
    /// One end sends at a time.
    Half,
    /// Both ends send at any time.
    Full,
    /// The device does not say.
    #[default]
    Unknown,
}

/// Counters of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Frames that passed.
    pub frames: u64,
    /// Bytes of these frames, without the headers.
    pub bytes: u64,
    /// Frames that were dropped.
    pub drops: u64,
}

/// The counters of a queue pair, by the words of [`counters_page`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PairCounters(pub [u64; counters_page::WORDS]);

/// Word number `at` of a page's value, little-endian. 0 behind its end.
fn word(value: &[u8], at: usize) -> u64 {
    let bytes = value.chunks_exact(8).nth(at).unwrap_or_default();
    bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
}

pub(super) fn status(value: &[u8]) -> NicStatus {
    let word = |at| word(value, at);
    let mut mac = [0; 6];
    mac.copy_from_slice(&word(status_page::MAC).to_le_bytes()[..6]);
    NicStatus {
        link: word(status_page::LINK) & 1 != 0,
        mac,
        speed: u32::try_from(word(status_page::SPEED)).ok().filter(|speed| *speed != 0),
        duplex: match word(status_page::DUPLEX) {
            0 => Duplex::Half,
            1 => Duplex::Full,
            _ => Duplex::Unknown,
        },
        announces: word(status_page::ANNOUNCE),
        incarnation: word(status_page::INCARNATION),
        tx: Traffic {
            frames: word(status_page::TX_FRAMES),
            bytes: word(status_page::TX_BYTES),
            drops: word(status_page::TX_DROPS),
        },
        rx: Traffic {
            frames: word(status_page::RX_FRAMES),
            bytes: word(status_page::RX_BYTES),
            drops: word(status_page::RX_DROPS),
        },
    }
}

pub(super) fn counters(value: &[u8]) -> PairCounters {
    PairCounters(core::array::from_fn(|at| word(value, at)))
}
