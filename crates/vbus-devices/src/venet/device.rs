//! A venet device: what the bus and people see of it.

use std::sync::Arc;

use serde_json::{Value, json};
use vbus_core::shm::abi::{class, venet as abi};
use vbus_core::{ErrorCode, Identity};
use vbus_net::{Backend, Link, Offloads, show_mac};

use super::config::Config;
use super::counters::PairCounters;

/// The most entries of a ring.
pub const RING_MAX: u16 = 4096;

// The back ends and the ABI mean the same frames.
const _: () = assert!(
    abi::HEADER_BYTES == vbus_net::HEADER_BYTES
        && abi::FRAME_MAX == vbus_net::FRAME_MAX
        && abi::CHAIN_MAX == vbus_net::CHAIN_MAX
);

/// A device, for its connection too.
pub struct VenetDevice {
    pub name: String,
    pub config: Config,
    pub link: Arc<Link>,
    pub backend: Box<dyn Backend>,
    pub pairs: Arc<[Arc<PairCounters>]>,
}

/// The offloads of both directions, from the driver and to it, that stand for `features`.
pub fn offloads(features: u64) -> (Offloads, Offloads) {
    let mut offloads = Offloads::NONE;
    for (feature, of) in
        [(abi::F_CSUM, Offloads::CSUM), (abi::F_TSO, Offloads::TSO), (abi::F_USO, Offloads::USO)]
    {
        offloads = offloads | if features & feature != 0 { of } else { Offloads::NONE };
    }
    (offloads, offloads)
}

impl VenetDevice {
    fn features(&self) -> u64 {
        let able = self.backend.tx_offloads() & self.backend.rx_offloads();
        let mut features = 0;
        for (feature, of) in [
            (abi::F_CSUM, Offloads::CSUM),
            (abi::F_TSO, Offloads::TSO),
            (abi::F_USO, Offloads::USO),
        ] {
            features |= if able.contains(of) { feature } else { 0 };
        }
        self.config.features & features
    }

    /// See [`vbus_core::Device::identity`].
    pub fn identity(&self) -> Identity {
        let pairs = self.config.queue_pairs;
        Identity::new(class::VENET, "venet", 0x02_00_00)
            .with_features(self.features())
            .with_regions(u32::from(pairs) * 2 + 1)
            .with_vectors(pairs * 2 + 1)
    }

    /// See [`vbus_core::Device::config`].
    pub fn config_area(&self) -> Vec<u8> {
        let config = &self.config;
        let mut area = vec![0; abi::CONFIG_BYTES];
        area[abi::CONFIG_MAC..][..6].copy_from_slice(&config.mac);
        area[abi::CONFIG_MTU..][..2].copy_from_slice(&config.mtu.to_le_bytes());
        area[abi::CONFIG_QUEUE_PAIRS..][..2].copy_from_slice(&config.queue_pairs.to_le_bytes());
        area[abi::CONFIG_RING_MAX..][..2].copy_from_slice(&RING_MAX.to_le_bytes());
        area
    }

    /// Checks the features that a driver wants to use.
    pub fn accepts(&self, features: u64) -> Result<(), ErrorCode> {
        let (tx, rx) = offloads(features);
        if tx.is_complete() && rx.is_complete() { Ok(()) } else { Err(ErrorCode::BAD_FEATURES) }
    }

    /// See [`vbus_core::Device::inspect`].
    pub fn inspect(&self) -> Value {
        let mut backend = self.backend.inspect();
        let pcap = backend.as_object_mut().and_then(|backend| backend.remove("pcap"));
        json!({
            "mac": show_mac(self.config.mac),
            "mtu": self.config.mtu,
            "queue-pairs": self.config.queue_pairs,
            "link": self.link.is_up(),
            "backend": backend,
            "pcap": pcap,
            "pairs": self.pairs.iter().map(|pair| json!(&**pair)).collect::<Vec<_>>(),
        })
    }
}
