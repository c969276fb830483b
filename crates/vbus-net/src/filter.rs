// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which frames a driver wants to receive.

use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use vbus_tap::{BROADCAST, Mac, is_group};

use crate::frame::Packet;

/// A bit for each VLAN id: id `n` is bit `n % 64` of word `n / 64`.
pub type Vlans = [u64; 64];

const VLAN_TAG: u16 = 0x8100;
/// A flag in the word of the address: a frame to it passes only if the rules say so.
const BY_RULES: u64 = 1 << 48;

/// The receive filter of a driver. Back ends read it while the driver changes it.
#[derive(Debug)]
pub struct Filter {
    /// The driver's address in the low 48 bits, first byte lowest, and the flag [`BY_RULES`]. Most
    /// frames go to this address, and need no lock. The word depends on no other memory, so all
    /// accesses are relaxed.
    own: AtomicU64,
    rules: RwLock<Rules>,
}

#[derive(Debug, Default)]
struct Rules {
    addresses: Addresses,
    vlans: Option<Box<Vlans>>,
}

/// The addresses that pass. Unless a rule says otherwise, the driver's own and the broadcast
/// address do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// The rules that list no address.
    pub modes: Modes,
    /// These addresses.
    pub listed: Vec<Mac>,
}

/// The rules of a filter that list no address, also as plain data (spec/state-format.md,
/// "Modes").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Modes {
    /// All addresses, whatever the other rules are.
    pub promiscuous: bool,
    /// All unicast addresses.
    pub all_unicast: bool,
    /// All multicast addresses.
    pub all_multicast: bool,
    /// No unicast address, not even the driver's own. It counts before the addresses that pass.
    pub no_unicast: bool,
    /// No multicast address. It counts before the addresses that pass, and does not concern the
    /// broadcast address.
    pub no_multicast: bool,
    /// Not the broadcast address.
    pub no_broadcast: bool,
}

impl From<Modes> for Addresses {
    /// These rules, and no address.
    fn from(modes: Modes) -> Addresses {
        Addresses { modes, listed: Vec::new() }
    }
}

impl Filter {
    /// Makes a filter that passes frames of all VLANs to `mac` and to the broadcast address.
    pub fn new(mac: Mac) -> Filter {
        Filter { own: AtomicU64::new(word(mac)), rules: RwLock::default() }
    }

    /// The driver's own address.
    pub fn mac(&self) -> Mac {
        let mut mac = Mac::default();
        mac.copy_from_slice(&self.own.load(Ordering::Relaxed).to_le_bytes()[..6]);
        mac
    }

    /// Changes the driver's own address.
    pub fn set_mac(&self, mac: Mac) {
        let mut rules = self.write();
        self.set_own(mac, &mut rules);
    }

    /// The addresses that pass, besides the driver's own and the broadcast address.
    pub fn addresses(&self) -> Addresses {
        self.read().addresses.clone()
    }

    /// Replaces the addresses that pass.
    pub fn set_addresses(&self, addresses: Addresses) {
        let mut rules = self.write();
        rules.addresses = addresses;
        self.set_own(self.mac(), &mut rules);
    }

    /// Replaces the VLAN ids that pass; `None`: all. Frames without a tag, or with a tag of id 0,
    /// always pass.
    pub fn set_vlans(&self, vlans: Option<Box<Vlans>>) {
        let mut rules = self.write();
        rules.vlans = vlans;
        self.set_own(self.mac(), &mut rules);
    }

    /// The VLAN ids that pass; `None`: all.
    pub fn vlans(&self) -> Option<Box<Vlans>> {
        self.read().vlans.clone()
    }

    /// Whether frames to `mac` pass.
    pub fn accepts(&self, mac: Mac) -> bool {
        self.own.load(Ordering::Relaxed) == word(mac) || self.read().addresses.pass(mac, self.mac())
    }

    /// Whether the frame passes: its address and its VLAN must both pass.
    pub fn wants(&self, packet: &Packet<'_>) -> bool {
        let to = packet.destination();
        if self.own.load(Ordering::Relaxed) == word(to) {
            return true;
        }
        let rules = self.read();
        rules.addresses.pass(to, self.mac())
            && rules.vlans.as_deref().is_none_or(|vlans| in_vlans(packet, vlans))
    }

    /// The caller holds the lock of the rules, so that address and flag stay consistent.
    fn set_own(&self, mac: Mac, rules: &mut Rules) {
        let by_rules = rules.vlans.is_some() || !rules.addresses.pass(mac, mac);
        let flag = if by_rules { BY_RULES } else { 0 };
        self.own.store(word(mac) | flag, Ordering::Relaxed);
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Rules> {
        self.rules.read().unwrap_or_else(|e| e.into_inner())
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Rules> {
        self.rules.write().unwrap_or_else(|e| e.into_inner())
    }
}

impl Addresses {
    /// Whether frames to `mac` pass, if the driver's own address is `own`.
    fn pass(&self, mac: Mac, own: Mac) -> bool {
        let modes = &self.modes;
        if modes.promiscuous {
            return true;
        }
        let (none, all) = match is_group(mac) {
            _ if mac == BROADCAST => return !modes.no_broadcast,
            true => (modes.no_multicast, modes.all_multicast),
            false => (modes.no_unicast, modes.all_unicast || mac == own),
        };
        !none && (all || self.listed.contains(&mac))
    }
}

fn word(mac: Mac) -> u64 {
    let mut bytes = [0; 8];
    bytes[..6].copy_from_slice(&mac);
    u64::from_le_bytes(bytes)
}

fn in_vlans(packet: &Packet<'_>, vlans: &Vlans) -> bool {
    if packet.ethertype() != VLAN_TAG {
        return true;
    }
    let mut head = [0; 16];
    if packet.head(&mut head) < head.len() {
        return true;
    }
    let id = usize::from(u16::from_be_bytes([head[14], head[15]]) & 0xfff);
    id == 0 || vlans[id / 64] >> (id % 64) & 1 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 1];
    const GROUP: Mac = [0x33, 0x33, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 9];

    /// Whether a frame to each of the four addresses passes.
    fn passes(filter: &Filter) -> [bool; 4] {
        [OWN, BROADCAST, GROUP, OTHER].map(|mac| {
            let frame = [&mac[..], &[0; 20]].concat();
            let wants = filter.wants(&Packet::plain(&frame).unwrap());
            assert_eq!(wants, filter.accepts(mac));
            wants
        })
    }

    #[test]
    fn listed_addresses_pass() {
        let filter = Filter::new(OWN);
        assert_eq!(passes(&filter), [true, true, false, false]);
        let listed = |mac| Addresses { listed: vec![mac], ..Addresses::default() };
        filter.set_addresses(listed(OTHER));
        assert_eq!(passes(&filter), [true, true, false, true]);
        filter.set_addresses(listed(GROUP));
        assert_eq!(passes(&filter), [true, true, true, false]);
        filter.set_addresses(Modes { all_multicast: true, ..Modes::default() }.into());
        assert_eq!(passes(&filter), [true, true, true, false]);
        filter.set_addresses(Modes { promiscuous: true, ..Modes::default() }.into());
        assert_eq!(passes(&filter), [true; 4]);
        let all_unicast = Modes { all_unicast: true, ..Modes::default() };
        filter.set_addresses(all_unicast.into());
        assert_eq!(passes(&filter), [true, true, false, true]);
        let no_unicast = Modes { no_unicast: true, ..all_unicast };
        filter.set_addresses(no_unicast.into());
        assert_eq!(passes(&filter), [false, true, false, false]);
        filter.set_addresses(Modes { promiscuous: true, ..no_unicast }.into());
        assert_eq!(passes(&filter), [true; 4]);
        let modes = Modes { no_multicast: true, no_broadcast: true, ..Modes::default() };
        filter.set_addresses(Addresses { modes, ..listed(GROUP) });
        assert_eq!(passes(&filter), [true, false, false, false]);
        filter.set_addresses(Addresses::default());
        filter.set_mac(OTHER);
        assert_eq!((filter.mac(), passes(&filter)), (OTHER, [false, true, false, true]));
    }

    #[test]
    fn listed_vlans_pass() {
        let filter = Filter::new(OWN);
        let passes = |tag: &[u8]| {
            let frame = [&OWN[..], &[2; 6], tag, &[0x88, 0xb5], &[0; 20]].concat();
            filter.wants(&Packet::plain(&frame).unwrap())
        };
        let all = |expected: [bool; 4]| {
            let tags: [&[u8]; 4] =
                [&[], &[0x81, 0, 0xe0, 0], &[0x81, 0, 0xe0, 5], &[0x81, 0, 0x0f, 0xff]];
            assert_eq!(tags.map(passes), expected);
        };
        all([true; 4]);
        let mut vlans = Box::new([0; 64]);
        filter.set_vlans(Some(vlans.clone()));
        all([true, true, false, false]);
        vlans[0] = 1 << 5;
        filter.set_vlans(Some(vlans.clone()));
        all([true, true, true, false]);
        vlans[63] = 1 << 63;
        filter.set_vlans(Some(vlans));
        filter.set_mac(OWN);
        all([true; 4]);
        assert_eq!(filter.mac(), OWN);
        filter.set_vlans(None);
        all([true; 4]);
    }
}
