// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An Ethernet device as plain data (spec/state-format.md, "Ethernet").

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_core::state::Counts;
use vbus_tap::Mac;

use crate::filter::Modes;
use crate::rss::KEY_BYTES;

/// What a device has beside its settings and its driver.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicState {
    /// The address by the settings. The new device has it too.
    #[serde(with = "hex::serde")]
    pub(super) mac: Mac,
    /// A control client has switched the link off.
    pub(super) link_off: bool,
    /// How often the driver has been asked to announce its addresses.
    pub(super) announces: u64,
    /// The counts of each queue pair.
    pub(super) pairs: Vec<PairState>,
    /// The back end's own part.
    pub(super) backend: Value,
}

/// The counts of a queue pair.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PairState {
    pub tx: Counts,
    pub rx: Counts,
}

/// What a driver wants to receive, and where.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiverState {
    /// The driver's address.
    #[serde(with = "hex::serde")]
    pub(super) mac: Mac,
    pub(super) modes: Modes,
    /// The other addresses that pass.
    pub(super) listed: Vec<Address>,
    /// The VLANs that pass; null: all.
    pub(super) vlans: Option<VlanMap>,
    /// The offloads that it accepts.
    pub(super) offloads: u64,
    /// The queue pairs in use.
    pub(super) queues: u16,
    pub(super) rss: Option<RssState>,
}

impl ReceiverState {
    /// The driver's address.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// The offloads that the driver accepts, as bits.
    pub fn offloads(&self) -> u64 {
        self.offloads
    }

    /// The queue pairs in use.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Whether not all VLANs pass.
    pub fn has_vlans(&self) -> bool {
        self.vlans.is_some()
    }

    /// Whether frames are hashed, and if so, whether the hash chooses their queue.
    pub fn has_rss(&self) -> Option<bool> {
        self.rss.as_ref().map(|rss| !rss.table.is_empty())
    }
}

/// An address in a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Address(#[serde(with = "hex::serde")] pub Mac);

/// 512 bytes with a bit for each VLAN, that of VLAN 0 lowest in the first byte.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct VlanMap(#[serde(with = "hex::serde")] pub Vec<u8>);

/// Key and table of the hash.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RssState {
    pub kinds: u32,
    #[serde(with = "hex::serde")]
    pub key: [u8; KEY_BYTES],
    pub table: Vec<u16>,
    pub unclassified: Option<u16>,
}

impl NicState {
    /// Makes it a state that outlasts the process ([`vbus_core::Device::outlast`]).
    ///
    /// # Errors
    /// Its back end has something that a kill may break.
    pub fn outlast(&self) -> Result<(), String> {
        check_outlasts(&self.backend)
    }
}

/// Checks that a kill breaks nothing of a back end with this part.
pub(crate) fn check_outlasts(backend: &Value) -> Result<(), String> {
    match backend.get("records") {
        Some(_) => Err("a capture (pcap) may break off within a record".into()),
        None => Ok(()),
    }
}

impl PairsState {
    /// Makes it a state that outlasts the process: nothing is on its way.
    pub fn outlast(&mut self) {
        self.queues.iter_mut().for_each(forget_frames);
    }
}

/// Takes what is on its way out of the part of a back end's queue: the frame that waits, how far a
/// frame has come that is sent in parts, and the bytes in a stream, whose peer is another one then.
pub(crate) fn forget_frames(queue: &mut Value) {
    let Some(fields) = queue.as_object_mut() else { return };
    for (name, field) in fields {
        match &**name {
            "inner" => forget_frames(field),
            "frame" | "begun" | "peer" => *field = Value::Null,
            _ => {}
        }
    }
}

/// What the back end keeps of a driver that has started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairsState {
    /// The plug's own part.
    pub(super) plug: Value,
    /// The own part of each queue.
    pub(super) queues: Vec<Value>,
}
