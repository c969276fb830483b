// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Receive-side scaling: the Toeplitz hash of a frame, and the queue that the hash chooses.

use crate::frame::{Hash, Packet, VLAN};

/// Bytes of a key.
pub const KEY_BYTES: usize = 40;

/// Kinds of frames that are hashed, as bits (virtio 1.3, 5.1.6.5.6.4).
pub mod kinds {
    /// IPv4: by the addresses.
    pub const IPV4: u32 = 1 << 0;
    /// TCP over IPv4: by addresses and ports.
    pub const TCPV4: u32 = 1 << 1;
    /// UDP over IPv4: by addresses and ports.
    pub const UDPV4: u32 = 1 << 2;
    /// IPv6: by the addresses.
    pub const IPV6: u32 = 1 << 3;
    /// TCP over IPv6: by addresses and ports.
    pub const TCPV6: u32 = 1 << 4;
    /// UDP over IPv6: by addresses and ports.
    pub const UDPV6: u32 = 1 << 5;
    /// All of them.
    pub const ALL: u32 = 0x3f;
}

/// Key, kinds and indirection table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rss {
    kinds: u32,
    key: [u8; KEY_BYTES],
    table: Vec<u16>,
    /// The queue of frames that are not hashed; `None`: the first entry of the table.
    unclassified: Option<u16>,
}

const TCP: u8 = 6;
const UDP: u8 = 17;

/// The most bytes of a frame that affect the hash: an Ethernet header with two tags, the longest
/// IPv4 header, and the ports.
const HEAD_BYTES: usize = 14 + 8 + 60 + 4;

/// The fields of an IP frame that name its flow.
struct Flow<'a> {
    /// Source and destination address.
    addresses: &'a [u8],
    /// The protocol of the transport; 0 for a fragment of IPv4.
    protocol: u8,
    /// Source and destination port, if the protocol has them and they are in the head.
    ports: Option<&'a [u8]>,
    /// The number of the bit of [`kinds`] for the version of IP.
    bit: u16,
}

impl<'a> Flow<'a> {
    /// The flow of the frame that begins with `head`. `None`: it is no IP frame, or it is too
    /// short.
    fn of(head: &'a [u8]) -> Option<Flow<'a>> {
        let word = |at: usize| Some(u16::from_be_bytes([*head.get(at)?, *head.get(at + 1)?]));
        let mut at = 12;
        for _ in 0..2 {
            at += if VLAN.contains(&word(at)?) { 4 } else { 0 };
        }
        let ip = at + 2;
        let (addresses, transport, protocol, bit) = match word(at)? {
            0x0800 => {
                let header = usize::from(head.get(ip)? & 15) * 4;
                // Even the first of several fragments is hashed without ports, because the others
                // have none.
                let whole = word(ip + 6)? & 0x3fff == 0;
                let protocol = if whole { *head.get(ip + 9)? } else { 0 };
                (head.get(ip + 12..ip + 20)?, ip + header.max(20), protocol, 0)
            }
            0x86dd => (head.get(ip + 8..ip + 40)?, ip + 40, *head.get(ip + 6)?, 3),
            _ => return None,
        };
        let has_ports = protocol == TCP || protocol == UDP;
        let ports = head.get(transport..transport + 4).filter(|_| has_ports);
        Some(Flow { addresses, protocol, ports, bit })
    }
}

/// A number that is the same for all frames of a flow. It spreads flows over queues where no key
/// was set. Frames without IP are one flow for each pair of addresses.
pub fn flow(packet: &Packet<'_>) -> u32 {
    let mut head = [0; HEAD_BYTES];
    let len = packet.head(&mut head);
    let head = &head[..len];
    // A multiplication mixes each byte into all higher bits (the hash FNV-1a).
    let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    let hash = match Flow::of(head) {
        Some(Flow { addresses, ports, protocol, .. }) => {
            let ports = ports.unwrap_or_default();
            addresses.iter().chain(ports).chain(&[protocol]).fold(0xcbf2_9ce4_8422_2325, mix)
        }
        None => head.iter().take(12).fold(0xcbf2_9ce4_8422_2325, mix),
    };
    // The high bits are mixed best.
    u32::try_from(hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32).unwrap_or(0)
}

impl Rss {
    /// Hashes frames of these kinds with `key`. `table` gives the queue for each value of the
    /// hash's low bits. Its length must be a power of two, or else the result is `None`. It may
    /// also be empty: then frames are hashed, but the hash chooses no queue.
    pub fn new(kinds: u32, key: [u8; KEY_BYTES], table: Vec<u16>) -> Option<Rss> {
        let fits = table.is_empty() || table.len().is_power_of_two();
        fits.then_some(Rss { kinds, key, table, unclassified: None })
    }

    /// The same, with frames that are not hashed in `queue`. Without a table it has no effect.
    #[must_use]
    pub fn with_unclassified(mut self, queue: u16) -> Rss {
        self.unclassified = Some(queue);
        self
    }

    /// The same without its table: frames are hashed, but the hash chooses no queue.
    #[must_use]
    pub fn without_table(self) -> Rss {
        Rss { table: Vec::new(), ..self }
    }

    /// The kinds of frames that are hashed, the key, and the table.
    pub fn parts(&self) -> (u32, &[u8; KEY_BYTES], &[u16]) {
        (self.kinds, &self.key, &self.table)
    }

    /// The queue of frames that are not hashed, if one was given.
    pub fn unclassified(&self) -> Option<u16> {
        self.unclassified
    }

    /// The queue that `hash` chooses, if there is a table. Frames that are not hashed have hash 0.
    pub fn queue(&self, hash: Hash) -> Option<u16> {
        let mask = self.table.len().checked_sub(1)?;
        let unclassified = self.unclassified.filter(|_| hash.kind == 0);
        unclassified.or_else(|| self.table.get(hash.value as usize & mask).copied())
    }

    /// The highest queue that a frame can have, if there is a table.
    pub fn highest_queue(&self) -> Option<u16> {
        self.table.iter().copied().max().map(|highest| highest.max(self.unclassified.unwrap_or(0)))
    }

    /// The hash of a frame.
    pub fn hash(&self, packet: &Packet<'_>) -> Hash {
        let mut head = [0; HEAD_BYTES];
        let len = packet.head(&mut head);
        self.hash_head(&head[..len]).unwrap_or_default()
    }

    /// The hash of the frame that begins with `head`; `None` for one that is not hashed.
    fn hash_head(&self, head: &[u8]) -> Option<Hash> {
        let flow = Flow::of(head)?;
        let mut input = [0; 36];
        input[..flow.addresses.len()].copy_from_slice(flow.addresses);
        let mut len = flow.addresses.len();
        let mut kind = flow.bit;
        let with_ports = match flow.protocol {
            TCP => Some(flow.bit + 1),
            UDP => Some(flow.bit + 2),
            _ => None,
        };
        let with_ports = with_ports.filter(|kind| self.kinds >> kind & 1 != 0);
        if let (Some(transport_kind), Some(ports)) = (with_ports, flow.ports) {
            input[len..len + 4].copy_from_slice(ports);
            len += 4;
            kind = transport_kind;
        } else if self.kinds >> flow.bit & 1 == 0 {
            return None;
        }
        Some(Hash { value: self.toeplitz(&input[..len]), kind: kind + 1 })
    }

    /// The Toeplitz hash: for each set bit of the input, an exclusive-or with the 32 bits of the
    /// key that begin at the same bit.
    fn toeplitz(&self, input: &[u8]) -> u32 {
        let key = |at: usize| self.key.get(at).copied().unwrap_or(0);
        let mut window = u32::from_be_bytes([key(0), key(1), key(2), key(3)]);
        let mut hash = 0;
        for (i, byte) in input.iter().enumerate() {
            let next = key(i + 4);
            for bit in (0..8).rev() {
                if byte >> bit & 1 != 0 {
                    hash ^= window;
                }
                window = window << 1 | u32::from(next >> bit & 1);
            }
        }
        hash
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key, addresses and hashes of Microsoft's RSS verification suite.
    const KEY: [u8; KEY_BYTES] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f,
        0xb0, 0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30,
        0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    fn ipv4(tags: usize, protocol: u8, ports: [u16; 2]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([0x81, 0, 0, 5].repeat(tags));
        frame.extend([8, 0, 0x45, 0, 0, 100, 0, 0, 0, 0, 64, protocol, 0, 0]);
        frame.extend([66, 9, 149, 187, 161, 142, 100, 80]);
        frame.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
        frame.extend([0; 40]);
        frame
    }

    fn ipv6(protocol: u8, ports: [u16; 2]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 60, protocol, 64]);
        let words = [0x3ffe_u16, 0x2501, 0x200, 0x1fff, 0, 0, 0, 7, 0x3ffe, 0x2501, 0x200, 3, 0, 0];
        frame.extend(words.iter().chain(&[0, 1]).flat_map(|word| word.to_be_bytes()));
        frame.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
        frame.extend([0; 40]);
        frame
    }

    fn hash(kinds: u32, frame: &[u8]) -> (u32, u16) {
        let rss = Rss::new(kinds, KEY, Vec::new()).unwrap();
        let hash = rss.hash(&Packet::plain(frame).unwrap());
        (hash.value, hash.kind)
    }

    #[test]
    fn hashes_are_those_of_the_verification_suite() {
        let ports = [2794, 1766];
        for tags in 0..=2 {
            assert_eq!(hash(kinds::ALL, &ipv4(tags, 6, ports)), (0x51cc_c178, 2));
            assert_eq!(hash(kinds::ALL, &ipv4(tags, 17, ports)), (0x51cc_c178, 3));
        }
        assert_eq!(hash(kinds::ALL, &ipv4(0, 1, ports)), (0x323e_8fc2, 1));
        assert_eq!(hash(kinds::IPV4, &ipv4(0, 6, ports)), (0x323e_8fc2, 1));
        assert_eq!(hash(kinds::ALL, &ipv6(6, ports)), (0x4020_7d3d, 5));
        assert_eq!(hash(kinds::ALL, &ipv6(17, ports)), (0x4020_7d3d, 6));
        assert_eq!(hash(kinds::IPV6, &ipv6(6, ports)), (0x2cc1_8cd5, 4));
        assert_eq!(hash(kinds::TCPV4, &ipv6(6, ports)), (0, 0), "no kind that is hashed");
    }

    #[test]
    fn a_fragment_is_hashed_by_its_addresses() {
        let mut frame = ipv4(0, 6, [2794, 1766]);
        frame[20] = 0x20; // The flag "more fragments".
        assert_eq!(hash(kinds::ALL, &frame), (0x323e_8fc2, 1));
    }

    #[test]
    fn frames_that_are_cut_short_are_hashed_without_a_panic() {
        for frame in [ipv4(2, 6, [1, 2]), ipv6(17, [1, 2])] {
            (14..frame.len()).for_each(|len| _ = hash(kinds::ALL, &frame[..len]));
        }
    }

    #[test]
    fn flows_spread_and_stay_together() {
        let spread = |frames: &mut dyn Iterator<Item = Vec<u8>>| {
            let mut queues = [0; 4];
            for frame in frames {
                let packet = Packet::plain(&frame).unwrap();
                assert_eq!(flow(&packet), flow(&packet));
                queues[flow(&packet) as usize % 4] += 1;
            }
            queues
        };
        // Of 400 flows each of four queues gets about 100.
        for protocol in [TCP, UDP] {
            let by_port = spread(&mut (0..400).map(|n| ipv4(0, protocol, [30_000 + n, 80])));
            assert!(by_port.iter().all(|n| (60..140).contains(n)), "{by_port:?}");
        }
        let by_port = spread(&mut (0..400).map(|n| ipv6(TCP, [80, 30_000 + n])));
        assert!(by_port.iter().all(|n| (60..140).contains(n)), "{by_port:?}");
        // A tag, and the rest of the frame, do not matter.
        let number = |frame: &[u8]| flow(&Packet::plain(frame).unwrap());
        assert_eq!(number(&ipv4(0, TCP, [1, 2])), number(&ipv4(2, TCP, [1, 2])));
        let mut arp = vec![2; 60];
        let first = number(&arp);
        arp[40] = 9;
        assert_eq!(number(&arp), first);
    }

    #[test]
    fn the_table_gives_the_queue() {
        let rss = Rss::new(kinds::ALL, KEY, vec![3, 1, 2, 0]).unwrap();
        let queue = |value| rss.queue(Hash { value, kind: 1 });
        assert_eq!([0, 1, 2, 3, 7].map(queue), [3, 1, 2, 0, 0].map(Some));
        assert_eq!(rss.highest_queue(), Some(3));
        assert!(Rss::new(0, KEY, vec![0; 3]).is_none());
        assert_eq!(Rss::new(0, KEY, Vec::new()).unwrap().queue(Hash::default()), None);
    }
}
