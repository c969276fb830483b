// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the administrator has set. It outlives connections.

use vbus_driver::venet::{
    Coalesce, Config, F_COALESCE, F_HASH, F_MAC, F_RSS, F_RX, F_RX_CSUM, F_TX, F_VLAN,
    RSS_KEY_BYTES, VLAN_MAP_BYTES,
};

use super::ffi;

/// Entries of a ring, if nobody has set another number.
const ENTRIES: u32 = 512;
/// The fewest entries that can be set: a transmit ring has room for two of the largest frames.
pub const ENTRIES_MIN: u32 = 64;
/// Entries of the indirection table, if the device takes so many.
pub const TABLE_MAX: u16 = 128;
/// An indirection table: the queue pair of each entry.
type Table = [u16; TABLE_MAX as usize];

/// The indirection table and the key.
#[derive(Clone)]
pub struct Rss {
    /// The key.
    pub key: [u8; RSS_KEY_BYTES],
    /// The queue pair of each entry.
    pub table: Table,
    /// Entries in use, a power of two.
    pub entries: u16,
}

/// What the administrator has set.
pub struct Settings {
    /// Queue pairs in use.
    pub pairs: u16,
    /// Entries of each receive ring.
    pub rx_entries: u32,
    /// Entries of each transmit ring.
    pub tx_entries: u32,
    /// Whether frames may leave their checksum to the driver.
    pub rx_csum: bool,
    /// Whether frames may leave their segmentation to the driver.
    pub rx_gso: bool,
    /// Programs of XDP run.
    pub xdp: bool,
    /// How long the device holds interrupts back.
    pub coalesce: ffi::Coalesce,
    /// Frames of at most so many bytes are copied to be sent.
    pub tx_copybreak: u32,
    /// The VLAN ids to let through.
    pub vlans: [u8; VLAN_MAP_BYTES],
    /// How frames are spread, if it was set.
    pub rss: Option<Rss>,
}

impl Settings {
    /// Those of a new interface with this many queue pairs. In place: they are large.
    pub fn init(&mut self, config: &Config, pairs: u16, tx_copybreak: u32) {
        self.pairs = pairs;
        self.tx_copybreak = tx_copybreak;
        let entries = ENTRIES.min(config.ring_entries);
        (self.rx_entries, self.tx_entries) = (entries, entries.max(ENTRIES_MIN));
        (self.rx_csum, self.rx_gso) = (true, true);
    }

    /// The features that the driver accepts, if the device offers them. The driver asks for hashes
    /// only if somebody uses them, because they may cost the device a copy of each frame.
    pub fn features(&self) -> u64 {
        let rss = if self.rss.is_some() { F_HASH | F_RSS } else { 0 };
        let rx = if self.xdp { 0 } else { F_RX };
        F_TX | rx | F_VLAN | F_MAC | F_COALESCE | rss
    }

    /// The offloads that frames to the driver may leave to it, of those that were accepted.
    pub fn offloads(&self, accepted: u64) -> u64 {
        let wanted = match (self.rx_csum, self.rx_gso) {
            _ if self.xdp => 0,
            (true, true) => F_RX,
            (true, false) => F_RX_CSUM,
            (false, _) => 0,
        };
        accepted & wanted
    }

    /// The coalescing of the two directions.
    pub fn coalescing(&self) -> (Coalesce, Coalesce) {
        let ffi::Coalesce { rx_usecs, rx_frames, tx_usecs, tx_frames } = self.coalesce;
        (
            Coalesce { usecs: rx_usecs, frames: rx_frames },
            Coalesce { usecs: tx_usecs, frames: tx_frames },
        )
    }

    /// Sets whether a VLAN id passes.
    pub fn set_vlan(&mut self, id: u16, on: bool) {
        if let Some(byte) = self.vlans.get_mut(usize::from(id / 8)) {
            let bit = 1 << (id % 8);
            *byte = if on { *byte | bit } else { *byte & !bit };
        }
    }
}

impl Rss {
    /// Spreads over the first `pairs` queue pairs, with `entries` entries, a power of two.
    pub fn spread(key: [u8; RSS_KEY_BYTES], entries: u16, pairs: u16) -> Rss {
        let mut table = [0; TABLE_MAX as usize];
        for (entry, at) in table.iter_mut().zip(0u16..) {
            *entry = at % pairs.max(1);
        }
        Rss { key, table, entries }
    }

    /// The table for a device that has `pairs` queue pairs.
    pub fn within(&self, pairs: u16) -> Table {
        self.table.map(|pair| pair % pairs.max(1))
    }

    /// The entries in use.
    pub fn entries(&self) -> &[u16] {
        self.table.get(..usize::from(self.entries)).unwrap_or_default()
    }
}
