// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A frame between a front and a back end: the virtio-net header, the Ethernet header, and the
//! body.

use vbus_core::memory::DriverSlice;
pub use vbus_core::shm::abi::venet::{CHAIN_MAX, FRAME_MAX, flag};
use vbus_tap::{HEADER_BYTES, Mac, Offloads};

/// Bytes of an Ethernet header without tags.
pub const ETH_BYTES: usize = 14;
/// Bytes of a VLAN tag.
pub const TAG_BYTES: usize = 4;
/// Bytes that a frame may have in addition to its MTU: the Ethernet header and two VLAN tags.
pub const ETH_OVERHEAD: usize = ETH_BYTES + 2 * TAG_BYTES;
/// The most pieces of a frame in this process's memory. A buffer is one piece, or two if a boundary
/// between two mappings of the driver's memory lies in it.
pub const PIECES_MAX: usize = FRAME_MAX.div_ceil(4096) + 2 * CHAIN_MAX;

/// The EtherTypes of VLAN tags: IEEE 802.1Q, and 802.1ad for the outer one of two tags.
pub const VLAN: [u16; 2] = [0x8100, 0x88a8];

/// Bytes of a TCP header without options.
const TCP_BYTES: usize = 20;
/// Where a TCP header has its own length, in its upper four bits, in units of 4 bytes.
const TCP_OFFSET_AT: usize = 12;
/// Bytes of a UDP header.
const UDP_BYTES: usize = 8;

/// The most segments of one TCP frame: 64 KiB in segments of 48 bytes, the smallest that Linux
/// sends.
const TCP_SEGMENTS_MAX: usize = 65536 / 48;
/// The most datagrams of one UDP frame: the limit of Linux.
const UDP_SEGMENTS_MAX: usize = 128;

/// The virtio-net header before a frame, without its number of buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// [`flag::NEEDS_CSUM`], and other flags from a back end.
    pub flags: u8,
    /// One of the `GSO_` values.
    pub gso_type: u8,
    /// Bytes of all headers. Only a hint.
    pub hdr_len: u16,
    /// Payload bytes of one segment.
    pub gso_size: u16,
    /// The offset at which the checksummed bytes begin.
    pub csum_start: u16,
    /// The offset of the checksum field, from `csum_start`.
    pub csum_offset: u16,
}

impl Header {
    /// Parses a header.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Header {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Header {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }

    /// The bytes of the header, for a frame in `buffers` buffers.
    pub fn bytes(&self, buffers: u16) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        for (at, word) in [
            (2, self.hdr_len),
            (4, self.gso_size),
            (6, self.csum_start),
            (8, self.csum_offset),
            (10, buffers),
        ] {
            bytes[at..at + 2].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The kind of segmentation, without the congestion bit.
    pub fn gso(&self) -> u8 {
        self.gso_type & !flag::GSO_ECN
    }

    /// The offloads that a receiver must accept to get a frame with this header as it is.
    pub fn needs(&self) -> Offloads {
        let segments = match self.gso() {
            flag::GSO_NONE if self.flags & flag::NEEDS_CSUM == 0 => return Offloads::NONE,
            flag::GSO_NONE => return Offloads::CSUM,
            flag::GSO_UDP => Offloads::USO,
            flag::GSO_TCPV4 => Offloads::TSO4,
            _ => Offloads::TSO6,
        };
        let ecn = self.gso_type & flag::GSO_ECN != 0;
        Offloads::CSUM | segments | if ecn { Offloads::ECN } else { Offloads::NONE }
    }

    /// Whether the sender leaves the checksum to the receiver.
    pub fn leaves_checksum(&self) -> bool {
        self.flags & flag::NEEDS_CSUM != 0
    }

    /// Whether the sender leaves segmentation to the receiver.
    pub fn leaves_segmentation(&self) -> bool {
        self.gso() != flag::GSO_NONE
    }

    /// Whether a receiver with these offloads can get a frame with this header as it is.
    pub fn fits(&self, offloads: Offloads) -> bool {
        offloads.contains(self.needs())
    }

    /// Checks the header that a driver with these offloads wrote before a frame of `len` bytes, and
    /// clears the fields that have no meaning. Returns false if the frame must be dropped. After a
    /// successful check every offset in the header lies within the frame.
    pub fn check(&mut self, len: usize, offloads: Offloads) -> bool {
        // A driver's claim that its own checksum is good proves nothing.
        self.flags &= flag::NEEDS_CSUM;
        if !self.fits(offloads) {
            return false;
        }
        if self.flags == 0 {
            let plain = self.gso() == flag::GSO_NONE;
            *self = Header::default();
            return plain;
        }
        let (start, offset) = (usize::from(self.csum_start), usize::from(self.csum_offset));
        if start < ETH_BYTES || start + offset + 2 > len {
            return false;
        }
        let size = usize::from(self.gso_size);
        // The transport header is not part of the payload. The longest is not known here, so a
        // little more than the limit may pass.
        let (segments_max, transport) = match self.gso() {
            flag::GSO_NONE => {
                (self.gso_type, self.gso_size, self.hdr_len) = (0, 0, 0);
                return true;
            }
            flag::GSO_TCPV4 | flag::GSO_TCPV6 if offset == 16 => (TCP_SEGMENTS_MAX, TCP_BYTES),
            flag::GSO_UDP if offset == 6 => (UDP_SEGMENTS_MAX, UDP_BYTES),
            _ => return false,
        };
        size != 0
            && usize::from(self.hdr_len) <= len
            && (len - start).saturating_sub(transport).div_ceil(size) <= segments_max
    }
}

/// The bytes after the Ethernet header.
#[derive(Clone, Copy)]
pub enum Body<'a> {
    /// In the sending driver's memory. The driver may write it at any time. So the receiver copies
    /// it once, and every decision uses a copy.
    Driver(&'a [DriverSlice<'a>]),
    /// In this process's memory.
    Bytes(&'a [u8]),
}

impl Body<'_> {
    /// Its length in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Body::Driver(parts) => parts.iter().map(DriverSlice::len).sum(),
            Body::Bytes(bytes) => bytes.len(),
        }
    }
}

/// The receive-side scaling hash of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hash {
    /// The hash.
    pub value: u32,
    /// The kind of the hashed frame: the number of its bit in [`rss::kinds`](crate::rss::kinds),
    /// plus one. 0: the frame is not hashed, and `value` is 0.
    pub kind: u16,
}

/// A frame between a front and a back end.
#[derive(Clone, Copy)]
pub struct Packet<'a> {
    /// The receive-side scaling hash, if it has been computed with the receiver's key.
    pub hash: Option<Hash>,
    /// The checked virtio-net header.
    pub header: Header,
    /// A copy of the Ethernet header.
    pub eth: [u8; ETH_BYTES],
    /// The bytes between `eth` and `body`: the rest of a VLAN tag that the switch has put into the
    /// frame, and the EtherType after it. `eth` then ends with the EtherType of the tag.
    pub tag: Option<[u8; TAG_BYTES]>,
    /// The rest.
    pub body: Body<'a>,
}

impl<'a> Packet<'a> {
    /// A frame without a hash, as its sender wrote it. The header was checked.
    pub fn new(header: Header, eth: [u8; ETH_BYTES], body: Body<'a>) -> Packet<'a> {
        Packet { hash: None, header, eth, tag: None, body }
    }

    /// A plain frame in this process's memory. `None`: it is shorter than an Ethernet header.
    pub fn plain(frame: &'a [u8]) -> Option<Packet<'a>> {
        let (eth, body) = frame.split_first_chunk::<ETH_BYTES>()?;
        Some(Packet::new(Header::default(), *eth, Body::Bytes(body)))
    }

    /// Bytes of the frame.
    pub fn bytes(&self) -> usize {
        self.front_bytes() + self.body.bytes()
    }

    /// Bytes of the Ethernet header with the tag that the switch has put in.
    pub fn front_bytes(&self) -> usize {
        ETH_BYTES + self.tag.map_or(0, |tag| tag.len())
    }

    /// The Ethernet header with the tag that the switch has put in, in the first
    /// [`front_bytes`](Self::front_bytes) bytes.
    pub fn front(&self) -> [u8; ETH_BYTES + TAG_BYTES] {
        let mut front = [0; ETH_BYTES + TAG_BYTES];
        front[..ETH_BYTES].copy_from_slice(&self.eth);
        front[ETH_BYTES..].copy_from_slice(&self.tag.unwrap_or_default());
        front
    }

    /// The destination address.
    pub fn destination(&self) -> Mac {
        mac_at(&self.eth, 0)
    }

    /// The source address.
    pub fn source(&self) -> Mac {
        mac_at(&self.eth, 6)
    }

    /// The EtherType after the addresses. It may be that of a VLAN tag.
    pub fn ethertype(&self) -> u16 {
        u16::from_be_bytes([self.eth[12], self.eth[13]])
    }

    /// Copies the frame's first bytes to `out`. Returns how many it copied, `out.len()` at most.
    pub fn head(&self, out: &mut [u8]) -> usize {
        let mut at = out.len().min(self.front_bytes());
        out[..at].copy_from_slice(&self.front()[..at]);
        match self.body {
            Body::Bytes(bytes) => {
                let n = bytes.len().min(out.len() - at);
                out[at..at + n].copy_from_slice(&bytes[..n]);
                at += n;
            }
            Body::Driver(parts) => {
                for part in parts {
                    at += part.copy_to(&mut out[at..]);
                }
            }
        }
        at
    }

    /// Byte `at` of the body, if it has that many.
    fn body_byte(&self, at: usize) -> Option<u8> {
        match self.body {
            Body::Bytes(bytes) => bytes.get(at).copied(),
            Body::Driver(parts) => {
                let mut skip = at;
                for part in parts {
                    if skip < part.len() {
                        let mut byte = [0];
                        part.split_at(skip).1.copy_to(&mut byte);
                        return Some(byte[0]);
                    }
                    skip -= part.len();
                }
                None
            }
        }
    }

    /// Bytes of the longest frame on the wire: of the frame, or of the longest segment that it will
    /// be cut into, with all headers.
    pub fn wire_bytes(&self) -> usize {
        let start = usize::from(self.header.csum_start);
        let transport = match self.header.gso() {
            flag::GSO_NONE => return self.bytes(),
            flag::GSO_UDP => UDP_BYTES,
            _ => {
                let offset = (start + TCP_OFFSET_AT).checked_sub(self.front_bytes());
                let offset = offset.and_then(|at| self.body_byte(at)).unwrap_or(0);
                (usize::from(offset >> 4) * 4).max(TCP_BYTES)
            }
        };
        self.bytes().min(start + transport + usize::from(self.header.gso_size))
    }

    /// Whether the frame, or each segment that it will be cut into, fits an MTU of `mtu` bytes. Up
    /// to two VLAN tags do not count.
    pub fn fits_mtu(&self, mtu: usize) -> bool {
        let bytes = self.wire_bytes();
        if bytes <= mtu + ETH_BYTES {
            return true;
        }
        if bytes > mtu + ETH_OVERHEAD {
            return false;
        }
        let mut head = [0; ETH_BYTES + TAG_BYTES];
        self.head(&mut head);
        let is_tag = |at: usize| VLAN.contains(&u16::from_be_bytes([head[at], head[at + 1]]));
        let tags = if !is_tag(12) { 0 } else { 1 + usize::from(is_tag(16)) };
        bytes <= mtu + ETH_BYTES + tags * TAG_BYTES
    }

    /// Appends the frame's first `max` bytes to `out`.
    pub fn append_to(&self, out: &mut Vec<u8>, max: usize) {
        let mut left = max.min(self.bytes());
        let front = left.min(self.front_bytes());
        out.extend_from_slice(&self.front()[..front]);
        left -= front;
        match self.body {
            Body::Bytes(bytes) => out.extend_from_slice(&bytes[..left]),
            Body::Driver(parts) => {
                for part in parts {
                    let n = part.len().min(left);
                    let at = out.len();
                    out.resize(at + n, 0);
                    part.copy_to(&mut out[at..]);
                    left -= n;
                }
            }
        }
    }
}

fn mac_at(eth: &[u8; ETH_BYTES], at: usize) -> Mac {
    let mut mac = Mac::default();
    mac.copy_from_slice(&eth[at..at + 6]);
    mac
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Offloads = Offloads::ALL;

    #[test]
    fn a_header_survives_its_bytes() {
        let header = Header {
            flags: 1,
            gso_type: 4,
            hdr_len: 0x1234,
            gso_size: 1448,
            csum_start: 54,
            csum_offset: 16,
        };
        let bytes = header.bytes(3);
        assert_eq!(Header::parse(&bytes), header);
        assert_eq!(bytes[10..], [3, 0]);
    }

    #[test]
    fn headers_that_point_outside_their_frame_are_refused() {
        let good = Header {
            flags: 1,
            gso_type: 1,
            hdr_len: 54,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
        };
        let check = |header: Header, len, offloads| {
            let mut header = header;
            header.check(len, offloads)
        };
        let csum = Offloads::CSUM;
        assert!(check(good, 60000, ALL));
        assert!(!check(good, 60000, csum), "not negotiated");
        assert!(!check(good, 60000, csum | Offloads::TSO6), "the wrong kind of IP");
        let ecn = Header { gso_type: flag::GSO_TCPV4 | flag::GSO_ECN, ..good };
        assert!(check(ecn, 60000, ALL));
        assert!(!check(ecn, 60000, csum | Offloads::TSO4), "CWR was not negotiated");
        assert!(!check(good, 51, ALL), "the checksum lies behind the frame");
        assert!(!check(Header { hdr_len: 60001, ..good }, 60000, ALL));
        assert!(!check(Header { gso_size: 0, ..good }, 60000, ALL));
        assert!(
            !check(Header { gso_size: 1, ..good }, 60000, ALL),
            "a million segments for one frame"
        );
        let udp = Header { gso_type: flag::GSO_UDP, gso_size: 100, csum_offset: 6, ..good };
        assert!(check(udp, 34 + UDP_BYTES + 128 * 100, ALL), "as many full datagrams as Linux has");
        assert!(!check(udp, 34 + UDP_BYTES + 128 * 100 + 1, ALL), "one datagram more");
        assert!(!check(Header { csum_offset: 6, ..good }, 60000, ALL));
        assert!(!check(Header { csum_start: 13, ..good }, 60000, ALL));
        assert!(!check(Header { csum_start: u16::MAX, csum_offset: u16::MAX, ..good }, 60000, ALL));
        assert!(!check(Header { gso_type: 3, ..good }, 60000, ALL), "an unknown kind");
        assert!(!check(Header { flags: 0, ..good }, 60000, ALL), "segmentation without a checksum");
        assert!(check(Header::default(), 1518, Offloads::NONE));
        let only_csum = Header { flags: 1, csum_start: 34, csum_offset: 6, ..Header::default() };
        assert!(!check(only_csum, 100, Offloads::NONE));
        assert!(check(only_csum, 100, csum));
    }

    /// A frame of `len` bytes with these tags.
    fn tagged(tags: usize, len: usize) -> Vec<u8> {
        let mut frame = vec![2; 12];
        for tag in VLAN.iter().rev().skip(2 - tags) {
            frame.extend(tag.to_be_bytes());
            frame.extend([0, 5]);
        }
        frame.extend([0x88, 0xb5]);
        frame.resize(len, 7);
        frame
    }

    #[test]
    fn tags_do_not_count_for_the_mtu() {
        for tags in 0..=2 {
            let longest = 1514 + tags * TAG_BYTES;
            let fits = |len| Packet::plain(&tagged(tags, len)).unwrap().fits_mtu(1500);
            assert!(fits(longest), "{tags} tags");
            assert!(!fits(longest + 1), "{tags} tags");
        }
        assert!(Packet::plain(&tagged(0, 14)).unwrap().fits_mtu(68));
    }

    #[test]
    fn a_segment_is_as_long_as_the_mtu_allows() {
        let mut frame = tagged(0, 30_000);
        let fits = |frame: &[u8], gso_type, gso_size| {
            let header =
                Header { flags: 1, gso_type, gso_size, csum_start: 34, ..Header::default() };
            Packet { header, ..Packet::plain(frame).unwrap() }.fits_mtu(1500)
        };
        assert!(fits(&frame, flag::GSO_UDP, 1472) && !fits(&frame, flag::GSO_UDP, 1473));
        // The length of the TCP header, in words of 4 bytes, and the payload that fits. A header
        // that is too short counts as one without options.
        for (words, payload) in [(5_u8, 1460), (8, 1448), (15, 1420), (0, 1460)] {
            frame[34 + 12] = words << 4;
            assert!(fits(&frame, flag::GSO_TCPV4, payload), "{words}");
            assert!(!fits(&frame, flag::GSO_TCPV4, payload + 1), "{words}");
        }
        // A frame that is one segment is as long as it is.
        assert!(fits(&frame[..1000], flag::GSO_TCPV4, 60_000));
    }

    #[test]
    fn a_tag_that_was_put_in_is_part_of_the_frame() {
        let (plain, whole) = (tagged(0, 1514), tagged(1, 1518));
        let mut packet = Packet::plain(&plain).unwrap();
        packet.tag = Some([0, 5, packet.eth[12], packet.eth[13]]);
        packet.eth[12..].copy_from_slice(&VLAN[0].to_be_bytes());
        let (mut head, mut bytes) = (vec![0; 1518], Vec::new());
        packet.append_to(&mut bytes, usize::MAX);
        assert_eq!((packet.bytes(), packet.head(&mut head), &head), (1518, 1518, &bytes));
        assert_eq!((&bytes[..12], &bytes[14..]), (&whole[..12], &whole[14..]));
        assert!(packet.fits_mtu(1500) && !packet.fits_mtu(1499));
    }

    #[test]
    fn the_head_is_the_frame_s_first_bytes() {
        let frame = tagged(1, 100);
        let packet = Packet::plain(&frame).unwrap();
        for len in [0, 13, 14, 50, 100] {
            let mut head = vec![0; len];
            assert_eq!(packet.head(&mut head), len);
            assert_eq!(head, frame[..len]);
        }
        assert_eq!(packet.head(&mut [0; 200]), 100);
    }
}
