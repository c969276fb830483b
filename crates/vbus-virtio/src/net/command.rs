// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The commands of the control queue (VIRTIO 1.3, section 5.1.6.5), out of a driver's bytes.

use serde::{Deserialize, Serialize};
use vbus_net::rss::{KEY_BYTES, kinds};
use vbus_net::{Addresses, Mac, Modes, Rss, Vlans};

use super::abi::{command as number, feature};

/// The most addresses of one kind that a driver can list. More, and all of that kind pass.
pub const LISTED_MAX: usize = 64;

/// The most entries of a table of queues.
pub const RSS_TABLE_MAX: u16 = 128;

/// The longest command, in bytes. The tables of addresses may be long.
pub const BYTES_MAX: usize = 64 << 10;

/// A command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Whether a mode of the receive filter is on.
    Mode(Mode, bool),
    /// The unicast and the multicast addresses that pass.
    Table(Listed, Listed),
    /// The driver's own address.
    Address(Mac),
    /// Whether frames of this VLAN pass.
    Vlan(u16, bool),
    /// The driver has announced its addresses.
    Announced,
    /// How many queue pairs are in use.
    Pairs(u16),
    /// Receive-side scaling, and how many queue pairs transmit. `None`: no hashes.
    Scale(Option<Rss>, u16),
    /// The hash that is reported. `None`: none is.
    Hash(Option<Rss>),
    /// The offloads that the driver accepts, as feature bits.
    Offloads(u64),
    /// How interrupts are held back.
    Coalesce(Which, Coalesce),
    /// Asks how the interrupts of this queue are held back.
    CoalesceOf(u16),
}

/// A mode of the receive filter: which addresses pass, whatever else does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// All of them.
    Promiscuous,
    /// All multicast addresses.
    AllMulticast,
    /// All unicast addresses.
    AllUnicast,
    /// No multicast address.
    NoMulticast,
    /// No unicast address.
    NoUnicast,
    /// Not the broadcast address.
    NoBroadcast,
}

impl Mode {
    /// The feature that the driver needs for it.
    pub fn feature(self) -> u64 {
        match self {
            Mode::Promiscuous | Mode::AllMulticast => feature::CTRL_RX,
            _ => feature::CTRL_RX_EXTRA,
        }
    }
}

/// A list of addresses. `None`: it is too long.
pub type Listed = Option<Vec<Mac>>;

/// The queues that a command is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// All transmit queues.
    Tx,
    /// All receive queues.
    Rx,
    /// The queue with this number.
    Queue(u16),
}

/// How long an interrupt is held back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coalesce {
    /// The number of frames that ends the wait. 0: any number.
    pub frames: u32,
    /// Microseconds.
    pub usecs: u32,
}

/// Reads a command. `None`: it is none, or its data do not fit it.
pub fn parse(bytes: &[u8]) -> Option<Command> {
    let (&[class, command], data) = bytes.split_first_chunk::<2>()?;
    Some(match (class, command) {
        number::RX_PROMISCUOUS => Command::Mode(Mode::Promiscuous, flag(data)?),
        number::RX_ALL_MULTICAST => Command::Mode(Mode::AllMulticast, flag(data)?),
        number::RX_ALL_UNICAST => Command::Mode(Mode::AllUnicast, flag(data)?),
        number::RX_NO_MULTICAST => Command::Mode(Mode::NoMulticast, flag(data)?),
        number::RX_NO_UNICAST => Command::Mode(Mode::NoUnicast, flag(data)?),
        number::RX_NO_BROADCAST => Command::Mode(Mode::NoBroadcast, flag(data)?),
        number::MAC_TABLE_SET => {
            let (unicast, rest) = table(data)?;
            let (multicast, _) = table(rest)?;
            Command::Table(unicast, multicast)
        }
        number::MAC_ADDRESS_SET => Command::Address(*data.first_chunk()?),
        number::VLAN_ADD => Command::Vlan(word(data)?, true),
        number::VLAN_DELETE => Command::Vlan(word(data)?, false),
        number::ANNOUNCE_ACK => Command::Announced,
        number::MQ_PAIRS_SET => Command::Pairs(word(data)?),
        number::MQ_RSS_CONFIG => {
            let (mask, unclassified) = (word(data.get(4..)?)?, word(data.get(6..)?)?);
            let entries = usize::from(mask) + 1;
            let table = data.get(8..8 + entries * 2)?.chunks_exact(2);
            let table: Vec<u16> = table.filter_map(word).collect();
            let rest = data.get(8 + entries * 2..)?;
            let key = key(rest.get(2..)?)?;
            if mask >= RSS_TABLE_MAX {
                return None;
            }
            let rss = hash(long(data)?, key, table)?;
            Command::Scale(rss.map(|rss| rss.with_unclassified(unclassified)), word(rest)?)
        }
        number::MQ_HASH_CONFIG => {
            Command::Hash(hash(long(data)?, key(data.get(12..)?)?, Vec::new())?)
        }
        number::GUEST_OFFLOADS_SET => Command::Offloads(u64::from_le_bytes(*data.first_chunk()?)),
        number::COALESCE_TX_SET => Command::Coalesce(Which::Tx, coalesce(data)?),
        number::COALESCE_RX_SET => Command::Coalesce(Which::Rx, coalesce(data)?),
        number::COALESCE_QUEUE_SET => {
            Command::Coalesce(Which::Queue(word(data)?), coalesce(data.get(4..)?)?)
        }
        number::COALESCE_QUEUE_GET => Command::CoalesceOf(word(data)?),
        _ => return None,
    })
}

fn flag(data: &[u8]) -> Option<bool> {
    data.first().map(|byte| *byte != 0)
}

fn word(data: &[u8]) -> Option<u16> {
    data.first_chunk().map(|bytes| u16::from_le_bytes(*bytes))
}

fn long(data: &[u8]) -> Option<u32> {
    data.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

fn coalesce(data: &[u8]) -> Option<Coalesce> {
    Some(Coalesce { frames: long(data)?, usecs: long(data.get(4..)?)? })
}

/// A key with its length before it. A shorter one ends with zeros.
fn key(data: &[u8]) -> Option<[u8; KEY_BYTES]> {
    let (&len, bytes) = data.split_first()?;
    let len = usize::from(len);
    let mut key = [0; KEY_BYTES];
    key.get_mut(..len)?.copy_from_slice(bytes.get(..len)?);
    Some(key)
}

/// How frames of these kinds are hashed. `Some(None)`: there are no kinds. `None`: a kind that the
/// device cannot hash, or a table whose length is no power of two.
fn hash(of: u32, key: [u8; KEY_BYTES], table: Vec<u16>) -> Option<Option<Rss>> {
    if of & !kinds::ALL != 0 {
        return None;
    }
    // A table without kinds puts all frames into the queue for those that are not hashed.
    if of == 0 && table.is_empty() {
        return Some(None);
    }
    Rss::new(of, key, table).map(Some)
}

/// A table of addresses, and the bytes after it.
fn table(data: &[u8]) -> Option<(Listed, &[u8])> {
    let entries = usize::try_from(long(data)?).ok()?;
    let bytes = data.get(4..)?;
    let end = entries.checked_mul(6).filter(|end| *end <= bytes.len())?;
    let (macs, rest) = bytes.split_at(end);
    let listed = (entries <= LISTED_MAX).then(|| {
        let mac = |bytes: &[u8]| {
            let mut mac = Mac::default();
            mac.copy_from_slice(bytes);
            mac
        };
        macs.chunks_exact(6).map(mac).collect()
    });
    Some((listed, rest))
}

/// Which frames the driver wants, as plain data (spec/state-format.md, "virtio-net").
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WantedState {
    modes: Modes,
    /// `None`: the list was too long, and all of the kind pass.
    unicast: Option<Vec<String>>,
    multicast: Option<Vec<String>>,
}

/// Which frames the driver wants. A driver that says nothing wants all.
#[derive(Clone, Debug)]
pub struct Wanted {
    modes: Modes,
    unicast: Listed,
    multicast: Listed,
    /// The VLANs that pass; `None`: all.
    vlans: Option<Box<Vlans>>,
}

impl Wanted {
    /// All frames; those with a tag only if the driver does not choose VLANs (`by_vlan`).
    pub fn new(by_vlan: bool) -> Wanted {
        Wanted {
            modes: Modes { promiscuous: true, ..Modes::default() },
            unicast: Some(Vec::new()),
            multicast: Some(Vec::new()),
            vlans: by_vlan.then(|| Box::new([0; 64])),
        }
    }

    /// Takes a command. Returns false if it is about something else, or names no VLAN.
    pub fn change(&mut self, command: &Command) -> bool {
        match command {
            Command::Mode(mode, on) => {
                let modes = &mut self.modes;
                let flag = match mode {
                    Mode::Promiscuous => &mut modes.promiscuous,
                    Mode::AllMulticast => &mut modes.all_multicast,
                    Mode::AllUnicast => &mut modes.all_unicast,
                    Mode::NoMulticast => &mut modes.no_multicast,
                    Mode::NoUnicast => &mut modes.no_unicast,
                    Mode::NoBroadcast => &mut modes.no_broadcast,
                };
                *flag = *on;
            }
            Command::Table(unicast, multicast) => {
                (self.unicast, self.multicast) = (unicast.clone(), multicast.clone());
            }
            Command::Vlan(id @ 0..4096, on) => {
                let Some(vlans) = &mut self.vlans else { return false };
                let (word, bit) = (&mut vlans[usize::from(id / 64)], 1 << (id % 64));
                *word = if *on { *word | bit } else { *word & !bit };
            }
            _ => return false,
        }
        true
    }

    /// The addresses that pass.
    pub fn addresses(&self) -> Addresses {
        let listed = [&self.unicast, &self.multicast].into_iter().flatten().flatten();
        let modes = Modes {
            all_unicast: self.modes.all_unicast || self.unicast.is_none(),
            all_multicast: self.modes.all_multicast || self.multicast.is_none(),
            ..self.modes
        };
        Addresses { modes, listed: listed.copied().collect() }
    }

    /// What the driver wants, as plain data.
    pub fn save(&self) -> WantedState {
        let list =
            |listed: &Listed| listed.as_ref().map(|macs| macs.iter().map(hex::encode).collect());
        WantedState {
            modes: self.modes,
            unicast: list(&self.unicast),
            multicast: list(&self.multicast),
        }
    }

    /// What [`save`](Self::save) returned, with these VLANs.
    ///
    /// # Errors
    /// An address is none, or there are too many.
    pub fn restored(saved: &WantedState, vlans: Option<Box<Vlans>>) -> Result<Wanted, String> {
        let list = |listed: &Option<Vec<String>>| {
            let Some(texts) = listed else { return Ok(None) };
            if texts.len() > LISTED_MAX {
                return Err(format!("{} addresses are listed", texts.len()));
            }
            let mac = |text: &String| {
                let mut mac = Mac::default();
                let decoded = hex::decode_to_slice(text, &mut mac);
                decoded.map(|()| mac).map_err(|_| format!("{text:?} is no address"))
            };
            texts.iter().map(mac).collect::<Result<_, _>>().map(Some)
        };
        Ok(Wanted {
            modes: saved.modes,
            unicast: list(&saved.unicast)?,
            multicast: list(&saved.multicast)?,
            vlans,
        })
    }

    /// The VLANs that pass.
    pub fn vlans(&self) -> Option<Box<Vlans>> {
        self.vlans.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read() {
        let mac = [2, 0, 0, 0, 0, 7];
        let mut short = [0; KEY_BYTES];
        short[..2].copy_from_slice(&[5, 6]);
        let table = [&[1, 0, 1, 0, 0, 0][..], &mac, &[0, 0, 0, 0]].concat();
        for (bytes, command) in [
            (&[0, 0, 1][..], Command::Mode(Mode::Promiscuous, true)),
            (&[0, 1, 0], Command::Mode(Mode::AllMulticast, false)),
            (&[0, 2, 1], Command::Mode(Mode::AllUnicast, true)),
            (&[0, 3, 1], Command::Mode(Mode::NoMulticast, true)),
            (&[0, 4, 1], Command::Mode(Mode::NoUnicast, true)),
            (&[0, 5, 1], Command::Mode(Mode::NoBroadcast, true)),
            (&table, Command::Table(Some(vec![mac]), Some(vec![]))),
            (&[1, 1, 2, 0, 0, 0, 0, 7], Command::Address(mac)),
            (&[2, 0, 5, 1], Command::Vlan(0x105, true)),
            (&[2, 1, 5, 0], Command::Vlan(5, false)),
            (&[3, 0], Command::Announced),
            (&[4, 0, 2, 0], Command::Pairs(2)),
            (&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0], Command::Offloads(2)),
            (
                &[6, 1, 8, 0, 0, 0, 50, 0, 0, 0],
                Command::Coalesce(Which::Rx, Coalesce { frames: 8, usecs: 50 }),
            ),
            (
                &[6, 2, 3, 0, 0, 0, 8, 0, 0, 0, 50, 0, 0, 0],
                Command::Coalesce(Which::Queue(3), Coalesce { frames: 8, usecs: 50 }),
            ),
            (&[6, 3, 3, 0], Command::CoalesceOf(3)),
            (
                &[&[4, 1, 3, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 2, 0, 2, 5, 6][..]].concat(),
                Command::Scale(
                    Rss::new(3, short, vec![0, 1]).map(|rss| rss.with_unclassified(1)),
                    2,
                ),
            ),
            (
                &[4, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 5, 6],
                Command::Hash(Rss::new(1, short, vec![])),
            ),
        ] {
            assert_eq!(parse(bytes), Some(command), "{bytes:?}");
            for len in 0..bytes.len() {
                assert_eq!(parse(&bytes[..len]), None, "{bytes:?} cut to {len}");
            }
        }
    }

    #[test]
    fn a_hash_is_one_that_the_device_has() {
        let scale = |kinds: u32, mask: u16, entries: usize, key: u8| {
            let head = [&[4, 1][..], &kinds.to_le_bytes(), &mask.to_le_bytes(), &[0, 0]].concat();
            parse(&[head, vec![0; entries * 2], vec![1, 0, key], vec![7; 255]].concat())
        };
        assert!(matches!(scale(0x3f, 127, 128, 40), Some(Command::Scale(Some(_), 1))));
        assert!(matches!(scale(0, 0, 1, 0), Some(Command::Scale(Some(_), 1))));
        for (kinds, mask, entries, key) in
            [(0x40, 0, 1, 40), (1, 2, 3, 40), (1, 255, 256, 40), (1, 0, 1, 41)]
        {
            assert_eq!(scale(kinds, mask, entries, key), None, "{kinds} {mask} {key}");
        }
        let none = [4, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(parse(&none), Some(Command::Hash(None)));
    }

    #[test]
    fn a_table_is_not_longer_than_its_command() {
        for entries in [2_u32, 0x2aaa_aaab, u32::MAX] {
            let bytes = [&[1, 0][..], &entries.to_le_bytes(), &[0; 10]].concat();
            assert_eq!(parse(&bytes), None, "{entries}");
        }
        let many = [&[1, 0, 65, 0, 0, 0][..], &[2; 65 * 6], &[0; 4]].concat();
        assert_eq!(parse(&many), Some(Command::Table(None, Some(vec![]))));
    }

    #[test]
    fn a_driver_gets_what_it_wants() {
        let mut wanted = Wanted::new(true);
        assert!(wanted.addresses().modes.promiscuous);
        assert!(wanted.change(&Command::Mode(Mode::Promiscuous, false)));
        assert_eq!(wanted.addresses(), Addresses::default());
        assert!(wanted.change(&Command::Table(Some(vec![[2; 6]]), None)));
        let modes = Modes { all_multicast: true, ..Modes::default() };
        let listed = Addresses { modes, listed: vec![[2; 6]] };
        assert_eq!(wanted.addresses(), listed);
        assert!(wanted.change(&Command::Mode(Mode::NoUnicast, true)));
        let modes = Modes { no_unicast: true, ..modes };
        assert_eq!(wanted.addresses(), Addresses { modes, ..listed });
        assert!(wanted.change(&Command::Mode(Mode::NoUnicast, false)));
        assert!(wanted.change(&Command::Table(None, Some(vec![]))));
        let modes = Modes { all_unicast: true, ..Modes::default() };
        assert_eq!(wanted.addresses(), modes.into());
        assert!(wanted.change(&Command::Vlan(70, true)));
        assert_eq!(wanted.vlans().map(|vlans| vlans[1]), Some(1 << 6));
        assert!(wanted.change(&Command::Vlan(70, false)));
        assert_eq!(wanted.vlans().map(|vlans| vlans[1]), Some(0));
        assert!(!wanted.change(&Command::Vlan(4096, true)));
        assert!(!wanted.change(&Command::Announced));
        assert!(!Wanted::new(false).change(&Command::Vlan(1, true)));
    }
}
