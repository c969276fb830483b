// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a driver sees of a network card: its features and its configuration.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_core::{ErrorCode, Progress, Task, lock, state};
use vbus_net::front::{Duplex, Nic, NicState};
use vbus_net::rss;

use super::abi::{self, config as at, feature};
use super::command::RSS_TABLE_MAX;
use super::offloads;
use super::queues::Queues;
use super::vhost::Vhost;
use crate::device::{Kind, Transport, feature as common};

/// The most descriptors of a queue.
const QUEUE_SIZE: u16 = 1024;

/// What a card does not offer that is not [`whole`](Offer::whole).
const OF_WHOLE: u64 = feature::CTRL_VQ
    | feature::CTRL_RX
    | feature::CTRL_RX_EXTRA
    | feature::CTRL_VLAN
    | feature::CTRL_MAC_ADDR
    | feature::CTRL_GUEST_OFFLOADS
    | feature::NOTF_COAL
    | feature::VQ_NOTF_COAL
    | feature::HASH_REPORT
    | feature::RSS
    | common::ACCESS_PLATFORM;

/// What a card offers of the things that not every driver is the faster with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Packed queues.
    pub packed: bool,
    /// Receive-side scaling, and the report of hashes.
    pub rss: bool,
    /// The control queue, and memory behind an IOMMU. A front end of vhost-user has a control queue
    /// of its own, and gives no access to its IOMMU.
    pub whole: bool,
}

/// A network card, in front of its back end.
pub struct VirtioNic {
    nic: Nic,
    options: Offer,
    vhost: Vhost,
    current: Mutex<Current>,
    /// Locked while the configuration is published, so that the transport gets the newest last.
    transport: Mutex<Option<Weak<dyn Transport>>>,
    /// How many of the requests to announce its addresses the driver has answered. Locked with
    /// `transport` where the order matters.
    announced: AtomicU64,
}

#[derive(Default)]
struct Current {
    /// The queues of the driver that has started last.
    queues: Weak<Queues>,
    /// The device is quiesced.
    quiesced: bool,
}

impl VirtioNic {
    pub fn new(nic: Nic, options: Offer, vhost: Vhost) -> VirtioNic {
        let (current, transport, announced) = Default::default();
        VirtioNic { nic, options, vhost, current, transport, announced }
    }

    /// What the device has of vhost-net.
    pub fn vhost(&self) -> &Vhost {
        &self.vhost
    }

    /// A driver has started, with these queues.
    pub fn has_started(&self, queues: &Arc<Queues>) {
        let mut current = lock(&self.current);
        current.queues = Arc::downgrade(queues);
        queues.pause(current.quiesced);
    }

    /// Stops everything of the card that is no task ([`vbus_core::Device::quiesce`]).
    pub fn quiesce(&self) {
        self.pause(true);
        self.nic.quiesce();
    }

    /// Undoes [`quiesce`](Self::quiesce).
    pub fn resume(&self) {
        self.nic.resume();
        self.pause(false);
    }

    fn pause(&self, quiesced: bool) {
        let mut current = lock(&self.current);
        current.quiesced = quiesced;
        if let Some(queues) = current.queues.upgrade() {
            queues.pause(quiesced);
        }
    }

    /// Sends a whole Ethernet frame of the device itself, while a driver has started.
    pub fn send_own(&self, frame: Vec<u8>) {
        let queues = lock(&self.current).queues.upgrade();
        if let Some(queues) = queues {
            queues.work().pairs.send_own(frame);
        }
    }

    /// Takes the setting `vhost`. The queues of a driver that is there move at once.
    ///
    /// # Errors
    /// The kernel's ends cannot be opened. The text is for the operator.
    pub fn set_vhost(&self, wanted: bool) -> Result<(), String> {
        self.vhost.want(wanted)?;
        let queues = lock(&self.current).queues.upgrade();
        if let Some(queues) = queues {
            queues.move_as_wanted();
        }
        Ok(())
    }

    /// Settings and counters, as a JSON object.
    pub fn inspect(&self) -> Value {
        let mut value = self.nic.inspect();
        if self.nic.backend.kernel_queue(0).is_some() {
            let (carries, why_not) = self.vhost.inspect();
            value["backend"]["vhost"] = carries.into();
            value["backend"]["vhost-why-not"] = why_not.into();
        }
        value
    }

    /// The device behind the front.
    pub fn nic(&self) -> &Nic {
        &self.nic
    }

    /// Gives the configuration as it is now to the transport. `tell`: the driver shall hear of a
    /// change.
    pub fn publish(&self, tell: bool) {
        let transport = lock(&self.transport);
        if let Some(transport) = transport.as_ref().and_then(Weak::upgrade) {
            transport.config_changed(self.config(), tell);
        }
    }

    /// The driver has announced its addresses.
    pub fn announced(&self) {
        self.announced.store(self.nic.link.announces(), Ordering::Relaxed);
        self.publish(false);
    }

    /// The card as plain data.
    ///
    /// # Errors
    /// Its back end cannot be saved.
    pub fn save(&self) -> Result<CardState, String> {
        let announced = self.announced.load(Ordering::Relaxed);
        Ok(CardState { nic: self.nic.save()?, announced })
    }

    /// Goes on from what [`save`](Self::save) returned.
    ///
    /// # Errors
    /// The state is wrong, or of a card with other settings.
    pub fn restore(&self, saved: &CardState) -> Result<(), String> {
        state::check_count("announced", saved.announced)?;
        self.nic.restore(&saved.nic)?;
        self.announced.store(saved.announced, Ordering::Relaxed);
        self.publish(false);
        Ok(())
    }

    fn features(&self) -> u64 {
        let config = &self.nic.config;
        let backend = &self.nic.backend;
        let wanted = config.backend.offloads;
        let mut features = common::ALL | common::ACCESS_PLATFORM;
        features &= if self.options.packed { !0 } else { !common::RING_PACKED };
        features |= offloads::bits(wanted & backend.tx_offloads(), wanted & backend.rx_offloads());
        features |= feature::MAC | feature::MTU | feature::STATUS | feature::MRG_RXBUF;
        features |= feature::CTRL_VQ | feature::CTRL_RX | feature::CTRL_VLAN;
        features |= feature::CTRL_RX_EXTRA;
        features |= feature::GUEST_ANNOUNCE | feature::CTRL_GUEST_OFFLOADS;
        features |= feature::NOTF_COAL | feature::VQ_NOTF_COAL;
        features |= if config.mac_changes { feature::CTRL_MAC_ADDR } else { 0 };
        let several = config.queue_pairs > 1;
        features |= if several { feature::MQ } else { 0 };
        if self.options.rss && backend.steers() {
            features |= feature::HASH_REPORT | if several { feature::RSS } else { 0 };
        }
        features |= if config.speed > 0 { feature::SPEED_DUPLEX } else { 0 };
        features &= if self.options.whole { !0 } else { !OF_WHOLE };
        self.vhost.offer(features)
    }
}

impl VirtioNic {
    /// What it is.
    pub fn kind(&self) -> Kind {
        Kind {
            id: abi::DEVICE,
            pci_class: 0x02_00_00,
            queues: self.nic.config.queue_pairs * 2 + u16::from(self.options.whole),
            queue_size: QUEUE_SIZE,
            features: self.features(),
        }
    }

    /// Gives the configuration to `transport` from now on.
    pub fn attach(&self, transport: Weak<dyn Transport>) {
        *lock(&self.transport) = Some(transport);
        self.publish(false);
    }

    /// The device configuration as it is now.
    fn config(&self) -> Vec<u8> {
        let (config, link) = (&self.nic.config, &self.nic.link);
        let mut area = vec![0; at::BYTES];
        let mut set = |offset: usize, value: &[u8]| {
            area[offset..offset + value.len()].copy_from_slice(value);
        };
        let mut status = if link.is_up() { at::STATUS_LINK_UP } else { 0 };
        if link.announces() != self.announced.load(Ordering::Relaxed) {
            status |= at::STATUS_ANNOUNCE;
        }
        let speed = if config.speed == 0 { at::SPEED_UNKNOWN } else { config.speed };
        let duplex = match config.duplex {
            Some(Duplex::Half) => 0,
            Some(Duplex::Full) => 1,
            None => at::DUPLEX_UNKNOWN,
        };
        set(at::MAC, &config.mac);
        set(at::STATUS, &status.to_le_bytes());
        set(at::QUEUE_PAIRS, &config.queue_pairs.to_le_bytes());
        set(at::MTU, &config.mtu.to_le_bytes());
        set(at::SPEED, &speed.to_le_bytes());
        set(at::DUPLEX, &[duplex]);
        if self.options.rss {
            set(at::RSS_KEY_MAX, &[u8::try_from(rss::KEY_BYTES).unwrap_or(0)]);
            set(at::RSS_TABLE_MAX, &RSS_TABLE_MAX.to_le_bytes());
            set(at::HASH_KINDS, &rss::kinds::ALL.to_le_bytes());
        }
        area
    }
}

/// A card as plain data (spec/state-format.md, "virtio-net").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CardState {
    nic: NicState,
    /// How many of the requests to announce its addresses the driver has answered.
    announced: u64,
}

impl CardState {
    /// Checks that it is one that outlasts the process ([`vbus_core::Device::outlast`]).
    ///
    /// # Errors
    /// Its back end has something that a kill may break.
    pub fn outlast(&self) -> Result<(), String> {
        self.nic.outlast()
    }
}

/// The task that tells the driver of changes of the link.
pub struct News(pub Arc<VirtioNic>);

impl Task for News {
    fn work(&self) -> String {
        "the status of the link".into()
    }

    fn poll(&mut self, _budget: u32) -> Result<Progress, ErrorCode> {
        self.0.publish(true);
        Ok(Progress::Idle)
    }

    fn adaptive(&self) -> bool {
        false
    }
}
