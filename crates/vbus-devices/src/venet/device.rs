// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A venet device as the bus and control clients see it.

use vbus_core::shm::abi::{class, venet as abi};
use vbus_core::{ErrorCode, Identity};
use vbus_net::Offloads;
use vbus_net::front::Nic;
use vbus_net::rss::kinds;

/// The most entries of a ring.
pub const RING_MAX: u16 = 4096;

// The back ends and the ABI agree on the frames.
const _: () = assert!(
    abi::HEADER_BYTES == vbus_net::HEADER_BYTES
        && abi::FRAME_MAX == vbus_net::FRAME_MAX
        && abi::CHAIN_MAX == vbus_net::CHAIN_MAX
);

/// A device. Its connection shares it.
pub struct VenetDevice {
    pub nic: Nic,
}

/// The offloads in `features`: first those from the driver, then those to the driver.
pub fn offloads(features: u64) -> (Offloads, Offloads) {
    (Offloads::from_bits(features), Offloads::from_bits(features >> abi::F_RX_SHIFT))
}

impl VenetDevice {
    fn features(&self) -> u64 {
        let config = &self.nic.config;
        let offloads = config.backend.offloads;
        let tx = (offloads & self.nic.backend.tx_offloads()).bits();
        let rx = (offloads & self.nic.backend.rx_offloads()).bits() << abi::F_RX_SHIFT;
        let mut features = abi::complete(tx | rx);
        features |= abi::F_HASH | abi::F_VLAN | abi::F_COALESCE;
        features |= if self.nic.backend.steers() { abi::F_RSS } else { 0 };
        features |= if config.mac_changes { abi::F_MAC } else { 0 };
        features
    }

    /// See [`vbus_core::Device::identity`].
    pub fn identity(&self) -> Identity {
        let pairs = self.nic.config.queue_pairs;
        Identity::new(class::VENET, "venet", 0x02_00_00)
            .with_features(self.features())
            .with_regions(u32::from(pairs) * 2 + 2)
            .with_vectors(pairs * 2 + 2)
    }

    /// See [`vbus_core::Device::config`].
    pub fn config_area(&self) -> Vec<u8> {
        let config = &self.nic.config;
        let mut area = vec![0; abi::CONFIG_BYTES];
        area[abi::CONFIG_MAC..][..6].copy_from_slice(&config.mac);
        area[abi::CONFIG_MTU..][..2].copy_from_slice(&config.mtu.to_le_bytes());
        area[abi::CONFIG_QUEUE_PAIRS..][..2].copy_from_slice(&config.queue_pairs.to_le_bytes());
        area[abi::CONFIG_RING_MAX..][..2].copy_from_slice(&RING_MAX.to_le_bytes());
        area[abi::CONFIG_RSS_TABLE_MAX..][..2].copy_from_slice(&abi::RSS_TABLE_MAX.to_le_bytes());
        area[abi::CONFIG_HASH_KINDS..][..4].copy_from_slice(&kinds::ALL.to_le_bytes());
        area
    }

    /// Checks the features that a driver wants to use.
    pub fn accepts(&self, features: u64) -> Result<(), ErrorCode> {
        if abi::complete(features) == features { Ok(()) } else { Err(ErrorCode::BAD_FEATURES) }
    }
}
