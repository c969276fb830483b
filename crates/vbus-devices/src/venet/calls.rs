// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Parses the buffers of calls.

use vbus_core::ErrorCode;
use vbus_core::shm::abi::venet::{
    ALL_PAIRS, F_RX, F_RX_SHIFT, FILTER_ALL_MULTICAST, FILTER_MAX, FILTER_PROMISCUOUS,
    RSS_KEY_BYTES, RSS_TABLE_MAX, VLAN_MAP_BYTES, complete, hash_kind,
};
use vbus_net::rss::{self, Rss};
use vbus_net::{Addresses, Mac, Modes, Offloads, Vlans, is_group};

const _: () = assert!(RSS_KEY_BYTES == rss::KEY_BYTES && VLAN_MAP_BYTES == size_of::<Vlans>());
// The kinds of the ABI pass to vbus-net as they are.
const _: () = assert!(
    hash_kind::IPV4 == rss::kinds::IPV4
        && hash_kind::TCPV4 == rss::kinds::TCPV4
        && hash_kind::UDPV4 == rss::kinds::UDPV4
        && hash_kind::IPV6 == rss::kinds::IPV6
        && hash_kind::TCPV6 == rss::kinds::TCPV6
        && hash_kind::UDPV6 == rss::kinds::UDPV6
);

/// Takes `N` bytes from the front of the buffer.
fn take<const N: usize>(buffer: &mut &[u8]) -> Result<[u8; N], ErrorCode> {
    let (front, rest) = buffer.split_first_chunk::<N>().ok_or(ErrorCode::BAD_LENGTH)?;
    *buffer = rest;
    Ok(*front)
}

fn u32_from(buffer: &mut &[u8]) -> Result<u32, ErrorCode> {
    take(buffer).map(u32::from_le_bytes)
}

fn u16_from(buffer: &mut &[u8]) -> Result<u16, ErrorCode> {
    take(buffer).map(u16::from_le_bytes)
}

/// Checks that the buffer ends here.
fn end(buffer: &[u8]) -> Result<(), ErrorCode> {
    if buffer.is_empty() { Ok(()) } else { Err(ErrorCode::BAD_LENGTH) }
}

/// Parses SET_OFFLOADS from a driver that accepted `features`.
pub fn offloads(mut buffer: &[u8], features: u64) -> Result<Offloads, ErrorCode> {
    let wanted = take(&mut buffer).map(u64::from_le_bytes)?;
    end(buffer)?;
    let offloads = Offloads::from_bits(wanted >> F_RX_SHIFT);
    let accepted = wanted & !(features & F_RX) == 0;
    if accepted && complete(wanted) == wanted { Ok(offloads) } else { Err(ErrorCode::BAD_ARGUMENT) }
}

/// Parses SET_QUEUES for a device with `pairs` queue pairs.
pub fn queues(mut buffer: &[u8], pairs: u16) -> Result<u16, ErrorCode> {
    let queues = u32_from(&mut buffer)?;
    end(buffer)?;
    let queues = u16::try_from(queues).ok().filter(|queues| (1..=pairs).contains(queues));
    queues.ok_or(ErrorCode::BAD_ARGUMENT)
}

/// Parses SET_MAC.
pub fn mac(mut buffer: &[u8]) -> Result<Mac, ErrorCode> {
    let mac: Mac = take(&mut buffer)?;
    end(buffer)?;
    if mac == Mac::default() || is_group(mac) { Err(ErrorCode::BAD_ARGUMENT) } else { Ok(mac) }
}

/// Parses SET_RSS. `None`: the driver wants no hashes.
pub fn rss(mut buffer: &[u8]) -> Result<Option<Rss>, ErrorCode> {
    let kinds = u32_from(&mut buffer)?;
    let entries = u16_from(&mut buffer)?;
    let zero = u16_from(&mut buffer)?;
    let key = take(&mut buffer)?;
    if entries > RSS_TABLE_MAX {
        return Err(ErrorCode::LIMIT);
    }
    if buffer.len() != usize::from(entries) * 2 {
        return Err(ErrorCode::BAD_LENGTH);
    }
    let table: Vec<u16> =
        buffer.chunks_exact(2).map(|entry| u16::from_le_bytes([entry[0], entry[1]])).collect();
    if kinds & !rss::kinds::ALL != 0 || zero != 0 || (kinds == 0 && !table.is_empty()) {
        return Err(ErrorCode::BAD_ARGUMENT);
    }
    if kinds == 0 {
        return Ok(None);
    }
    Rss::new(kinds, key, table).map(Some).ok_or(ErrorCode::BAD_ARGUMENT)
}

/// What SET_COALESCE sets: the pair (`None`: all), and microseconds and frames of the receive ring
/// and of the transmit ring.
#[derive(Debug, PartialEq, Eq)]
pub struct Coalesce {
    pub pair: Option<u16>,
    pub rx: (u32, u32),
    pub tx: (u32, u32),
}

/// Parses SET_COALESCE for a device with `pairs` queue pairs.
pub fn coalesce(mut buffer: &[u8], pairs: u16) -> Result<Coalesce, ErrorCode> {
    let pair = u32_from(&mut buffer)?;
    let zero = u32_from(&mut buffer)?;
    let rx = (u32_from(&mut buffer)?, u32_from(&mut buffer)?);
    let tx = (u32_from(&mut buffer)?, u32_from(&mut buffer)?);
    end(buffer)?;
    let pair = match pair {
        ALL_PAIRS => None,
        pair => {
            let pair = u16::try_from(pair).ok().filter(|pair| *pair < pairs);
            Some(pair.ok_or(ErrorCode::BAD_ARGUMENT)?)
        }
    };
    if zero != 0 { Err(ErrorCode::BAD_ARGUMENT) } else { Ok(Coalesce { pair, rx, tx }) }
}

/// Parses SET_VLANS. `None`: all frames pass.
pub fn vlans(mut buffer: &[u8]) -> Result<Option<Box<Vlans>>, ErrorCode> {
    let on = u32_from(&mut buffer)?;
    let zero = u32_from(&mut buffer)?;
    if on > 1 || zero != 0 {
        return Err(ErrorCode::BAD_ARGUMENT);
    }
    if on == 0 {
        return end(buffer).map(|()| None);
    }
    let map: [u8; VLAN_MAP_BYTES] = take(&mut buffer)?;
    end(buffer)?;
    let mut vlans = Box::new([0; 64]);
    for (word, bytes) in vlans.iter_mut().zip(map.chunks_exact(8)) {
        *word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    }
    Ok(Some(vlans))
}

/// Parses FILTER.
pub fn filter(mut buffer: &[u8]) -> Result<Addresses, ErrorCode> {
    let flags = u32_from(&mut buffer)?;
    let count = u32_from(&mut buffer)?;
    if flags & !(FILTER_PROMISCUOUS | FILTER_ALL_MULTICAST) != 0 {
        return Err(ErrorCode::BAD_ARGUMENT);
    }
    if count > FILTER_MAX {
        return Err(ErrorCode::LIMIT);
    }
    let bytes = buffer.get(..count as usize * 6).ok_or(ErrorCode::BAD_LENGTH)?;
    let mac = |chunk: &[u8]| {
        let mut mac = Mac::default();
        mac.copy_from_slice(chunk);
        mac
    };
    let modes = Modes {
        promiscuous: flags & FILTER_PROMISCUOUS != 0,
        all_multicast: flags & FILTER_ALL_MULTICAST != 0,
        ..Modes::default()
    };
    Ok(Addresses { modes, listed: bytes.chunks_exact(6).map(mac).collect() })
}

#[cfg(test)]
mod tests {
    use vbus_core::shm::abi::venet::{F_RX_CSUM, F_RX_TSO4, F_TX_CSUM};

    use super::*;

    const GROUP: Mac = [0x33, 0x33, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 9];

    fn filter_buffer(flags: u32, count: u32, addresses: &[Mac]) -> Vec<u8> {
        [&flags.to_le_bytes()[..], &count.to_le_bytes(), addresses.as_flattened()].concat()
    }

    #[test]
    fn filters_are_parsed() {
        let parse = |flags, addresses: &[Mac]| {
            let count = u32::try_from(addresses.len()).unwrap();
            filter(&filter_buffer(flags, count, addresses)).unwrap()
        };
        let listed = parse(0, &[OTHER, GROUP]);
        assert_eq!(listed, Addresses { listed: vec![OTHER, GROUP], ..Addresses::default() });
        assert!(parse(FILTER_ALL_MULTICAST, &[]).modes.all_multicast);
        assert!(parse(FILTER_PROMISCUOUS, &[]).modes.promiscuous);
        assert_eq!(parse(0, &[]), Addresses::default());
    }

    #[test]
    fn bad_filters_are_refused() {
        assert_eq!(filter(&[0; 7]), Err(ErrorCode::BAD_LENGTH));
        assert_eq!(filter(&filter_buffer(4, 0, &[])), Err(ErrorCode::BAD_ARGUMENT));
        assert_eq!(filter(&filter_buffer(0, 2, &[OTHER])), Err(ErrorCode::BAD_LENGTH));
        let many = filter_buffer(0, FILTER_MAX + 1, &[OTHER; 65]);
        assert_eq!(filter(&many), Err(ErrorCode::LIMIT));
        assert_eq!(filter(&filter_buffer(0, u32::MAX, &[])), Err(ErrorCode::LIMIT));
    }

    #[test]
    fn offloads_are_some_of_those_accepted() {
        let features = F_TX_CSUM | F_RX_CSUM | F_RX_TSO4;
        let set = |bits: u64| offloads(&bits.to_le_bytes(), features);
        assert_eq!(set(0), Ok(Offloads::NONE));
        assert_eq!(set(F_RX_CSUM | F_RX_TSO4), Ok(Offloads::CSUM | Offloads::TSO4));
        for wrong in [F_RX_TSO4, F_TX_CSUM, F_RX_CSUM << 2 | F_RX_CSUM, 1 << 63] {
            assert_eq!(set(wrong), Err(ErrorCode::BAD_ARGUMENT), "{wrong:#x}");
        }
        assert_eq!(offloads(&[0; 7], features), Err(ErrorCode::BAD_LENGTH));
        assert_eq!(offloads(&[0; 9], features), Err(ErrorCode::BAD_LENGTH));
    }

    #[test]
    fn queues_are_those_of_the_device() {
        let set = |count: u32| queues(&count.to_le_bytes(), 4);
        assert_eq!([1, 4].map(set), [Ok(1), Ok(4)]);
        assert_eq!([0, 5, u32::MAX].map(set), [Err(ErrorCode::BAD_ARGUMENT); 3]);
        assert_eq!(queues(&[1, 0, 0], 4), Err(ErrorCode::BAD_LENGTH));
    }

    #[test]
    fn an_address_is_that_of_one_device() {
        assert_eq!(mac(&OTHER), Ok(OTHER));
        assert_eq!(mac(&GROUP), Err(ErrorCode::BAD_ARGUMENT));
        assert_eq!(mac(&[0; 6]), Err(ErrorCode::BAD_ARGUMENT));
        assert_eq!(mac(&[2; 5]), Err(ErrorCode::BAD_LENGTH));
        assert_eq!(mac(&[2; 7]), Err(ErrorCode::BAD_LENGTH));
    }

    fn rss_buffer(kinds: u32, entries: u16, zero: u16, table: &[u16]) -> Vec<u8> {
        let table: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        let head = [&kinds.to_le_bytes()[..], &entries.to_le_bytes(), &zero.to_le_bytes()].concat();
        [&head[..], &[7; 40], &table].concat()
    }

    #[test]
    fn keys_and_tables_are_parsed() {
        let parsed = rss(&rss_buffer(3, 2, 0, &[1, 0])).unwrap();
        assert_eq!(parsed, Rss::new(3, [7; 40], vec![1, 0]));
        assert_eq!(rss(&rss_buffer(0, 0, 0, &[])), Ok(None));
        assert!(rss(&rss_buffer(1, 0, 0, &[])).unwrap().is_some());
        assert!(rss(&rss_buffer(1, 128, 0, &[0; 128])).is_ok());
        for (buffer, error) in [
            (vec![], ErrorCode::BAD_LENGTH),
            (vec![0; 47], ErrorCode::BAD_LENGTH),
            (rss_buffer(1, 2, 0, &[0]), ErrorCode::BAD_LENGTH),
            (rss_buffer(1, 1, 0, &[0, 0]), ErrorCode::BAD_LENGTH),
            (rss_buffer(1, 256, 0, &[0; 256]), ErrorCode::LIMIT),
            (rss_buffer(1, u16::MAX, 0, &[]), ErrorCode::LIMIT),
            (rss_buffer(64, 0, 0, &[]), ErrorCode::BAD_ARGUMENT),
            (rss_buffer(1, 3, 0, &[0; 3]), ErrorCode::BAD_ARGUMENT),
            (rss_buffer(1, 0, 1, &[]), ErrorCode::BAD_ARGUMENT),
            (rss_buffer(0, 1, 0, &[0]), ErrorCode::BAD_ARGUMENT),
        ] {
            assert_eq!(rss(&buffer), Err(error), "{buffer:?}");
        }
    }

    #[test]
    fn coalescing_is_of_one_pair_or_of_all() {
        let buffer = |words: [u32; 6]| words.map(u32::to_le_bytes).concat();
        let parse = |words: [u32; 6]| coalesce(&buffer(words), 2);
        let settings = |pair| Ok(Coalesce { pair, rx: (50, 8), tx: (u32::MAX, 0) });
        assert_eq!(parse([1, 0, 50, 8, u32::MAX, 0]), settings(Some(1)));
        assert_eq!(parse([ALL_PAIRS, 0, 50, 8, u32::MAX, 0]), settings(None));
        for wrong in [[2, 0, 0, 0, 0, 0], [65536, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]] {
            assert_eq!(parse(wrong), Err(ErrorCode::BAD_ARGUMENT), "{wrong:?}");
        }
        assert_eq!(coalesce(&[0; 23], 2), Err(ErrorCode::BAD_LENGTH));
        assert_eq!(coalesce(&[0; 25], 2), Err(ErrorCode::BAD_LENGTH));
    }

    #[test]
    fn vlans_are_a_map() {
        assert_eq!(vlans(&[0; 8]), Ok(None));
        let mut buffer = vec![0; 8 + VLAN_MAP_BYTES];
        buffer[0] = 1;
        buffer[8] = 0x21;
        buffer[8 + 511] = 0x80;
        let map = vlans(&buffer).unwrap().unwrap();
        assert_eq!((map[0], map[63]), (0x21, 1 << 63));
        for (buffer, error) in [
            (&buffer[..8], ErrorCode::BAD_LENGTH),
            (&buffer[..519], ErrorCode::BAD_LENGTH),
            (&[0; 520], ErrorCode::BAD_LENGTH),
            (&[2, 0, 0, 0, 0, 0, 0, 0], ErrorCode::BAD_ARGUMENT),
            (&[0, 0, 0, 0, 1, 0, 0, 0], ErrorCode::BAD_ARGUMENT),
            (&[], ErrorCode::BAD_LENGTH),
        ] {
            assert_eq!(vlans(buffer), Err(error));
        }
    }
}
