// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The header before each frame (spec/venet.md, "Frames"): what one end leaves to the other.

use vbus_shm::abi::venet::{F_RX_CSUM, F_RX_ECN, F_RX_TSO4, F_RX_TSO6, F_RX_USO};
use vbus_shm::abi::venet::{HASH_HEADER_BYTES, HEADER_BYTES, flag};

const ETHERNET: usize = 14;
const TAG: usize = 4;
const TCP_CSUM: u16 = 16;
const UDP_CSUM: u16 = 6;
const TCP_LEAST: usize = 20;
const UDP: usize = 8;
/// IPv6's protocol numbers of extension headers with a length of their own.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION: u8 = 60;
/// The most extension headers that a frame to be cut may have: each of these once, and the last
/// one twice (RFC 8200, 4.1).
const EXTENSIONS_MAX: u32 = 4;

/// The kind of segments into which a frame is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gso {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP.
    Udp,
}

impl Gso {
    fn number(self) -> u8 {
        match self {
            Gso::Tcp4 => flag::GSO_TCPV4,
            Gso::Tcp6 => flag::GSO_TCPV6,
            Gso::Udp => flag::GSO_UDP,
        }
    }

    /// The feature by which a driver accepts such frames.
    fn feature(self) -> u64 {
        match self {
            Gso::Tcp4 => F_RX_TSO4,
            Gso::Tcp6 => F_RX_TSO6,
            Gso::Udp => F_RX_USO,
        }
    }
}

/// How a frame is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// The kind.
    pub kind: Gso,
    /// Payload bytes of one segment.
    pub size: u16,
    /// Whether the frame has the CWR flag.
    pub cwr: bool,
}

/// The hash of a received frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeaderHash {
    /// The hash.
    pub value: u32,
    /// The bit of [`hash_kind`](super::hash_kind) by which it was hashed.
    pub kind: u32,
}

/// What one end leaves to the other, and what the device knows of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The checksum from this byte of the frame to its end is left to the receiver, who stores it
    /// so many bytes behind.
    pub csum: Option<(u16, u16)>,
    /// The device has verified the checksum.
    pub verified: bool,
    /// The frame is to be cut. It then leaves its checksum to the receiver too.
    pub segments: Option<Segments>,
    /// Bytes of all headers, or 0. A hint.
    pub length: u16,
    /// The frame's hash, if it has one.
    pub hash: Option<HeaderHash>,
}

/// A received frame has an invalid header: the driver drops it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadHeader;

impl Header {
    /// The header as it precedes a frame from the driver.
    #[inline]
    pub fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut flags = 0;
        let (mut start, mut offset) = (0, 0);
        if let Some(csum) = self.csum {
            flags = flag::NEEDS_CSUM;
            (start, offset) = csum;
        }
        let (mut kind, mut size) = (0, 0);
        if let Some(segments) = self.segments {
            kind = segments.kind.number() | if segments.cwr { flag::GSO_ECN } else { 0 };
            size = segments.size;
        }
        let [a, b] = [self.length, size].map(u16::to_le_bytes);
        let [c, d] = [start, offset].map(u16::to_le_bytes);
        [flags, kind, a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1], 0, 0]
    }

    /// Reads the header of a received frame that has `frame` bytes without it. `with_hash` says
    /// whether HASH was accepted, and `offloads` which offloads (`F_RX_`).
    ///
    /// # Errors
    /// The header names an offload that was not accepted, or does not fit the frame. Whether the
    /// frame's own headers are of the kind to be cut, [`header_length`] says. A frame whose payload
    /// fits one segment is taken for one that is not to be cut.
    #[inline]
    pub fn parse(
        bytes: &[u8; HASH_HEADER_BYTES],
        with_hash: bool,
        frame: usize,
        offloads: u64,
    ) -> Result<Header, BadHeader> {
        let at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut header = Header { length: at(2), ..Header::default() };
        if bytes[0] & flag::NEEDS_CSUM != 0 {
            let (start, offset) = (at(6), at(8));
            let end = usize::from(start) + usize::from(offset) + 2;
            if offloads & F_RX_CSUM == 0 || usize::from(start) < ETHERNET || end > frame {
                return Err(BadHeader);
            }
            header.csum = Some((start, offset));
        }
        header.verified = bytes[0] & flag::VERIFIED != 0;
        if bytes[1] != flag::GSO_NONE {
            let (kind, place, least) = match bytes[1] & !flag::GSO_ECN {
                flag::GSO_TCPV4 => (Gso::Tcp4, TCP_CSUM, TCP_LEAST),
                flag::GSO_TCPV6 => (Gso::Tcp6, TCP_CSUM, TCP_LEAST),
                flag::GSO_UDP => (Gso::Udp, UDP_CSUM, UDP),
                _ => return Err(BadHeader),
            };
            let (size, cwr) = (at(4), bytes[1] & flag::GSO_ECN != 0);
            let refused = offloads & kind.feature() == 0 || cwr && offloads & F_RX_ECN == 0;
            let (start, offset) = header.csum.ok_or(BadHeader)?;
            if refused || offset != place || size == 0 {
                return Err(BadHeader);
            }
            // What fits one segment needs no cut. And a size above all payloads may have a meaning
            // of its own to a kernel, as 65535 has to Linux.
            if usize::from(start) + least + usize::from(size) < frame {
                header.segments = Some(Segments { kind, size, cwr });
            }
        }
        let kind = u32::from(at(16));
        if with_hash && (1..=32).contains(&kind) {
            let value = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
            header.hash = Some(HeaderHash { value, kind: 1 << (kind - 1) });
        }
        Ok(header)
    }
}

/// The bytes of all headers of `frame`, of which the first bytes suffice: Ethernet with up to two
/// tags, IPv4 or IPv6, up to four extension headers of IPv6 (hop-by-hop, routing, destination), TCP
/// or UDP. If it knows less, it counts less. The result is at most the length of `frame`.
///
/// With `header`, whose frame is to be cut, `None` says that the frame is of another kind, that its
/// transport header is not where `header` says, or that it is not complete within `frame`.
#[inline]
pub fn header_length(frame: &[u8], header: &Header) -> Option<usize> {
    let mut length = ETHERNET;
    let known = walk(frame, &mut length);
    let length = frame.len().min(length);
    let Some(segments) = header.segments else { return Some(length) };
    let (start, _) = header.csum?;
    (known? == (usize::from(start), segments.kind)).then_some(length)
}

/// Where the transport header is, and the kind of the frame, if all headers are complete within
/// `frame`. `length` grows from that of the Ethernet header by each further header that is known.
#[inline]
fn walk(frame: &[u8], length: &mut usize) -> Option<(usize, Gso)> {
    let u16_at = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    let mut kind = u16_at(*length - 2)?;
    for _ in 0..2 {
        if !matches!(kind, 0x8100 | 0x88a8) {
            break;
        }
        *length += TAG;
        kind = u16_at(*length - 2)?;
    }
    let network = *length;
    let first = *frame.get(network)?;
    let (bytes, place, tcp) = match (kind, first >> 4) {
        (0x0800, 4) => (usize::from(first & 0xf) * 4, 9, Gso::Tcp4),
        (0x86dd, 6) => (40, 6, Gso::Tcp6),
        _ => return None,
    };
    let mut protocol = *frame.get(network + place)?;
    // Fragments have no whole transport header.
    if tcp == Gso::Tcp4 && (bytes < 20 || u16_at(network + 6)? & 0x3fff != 0) {
        return None;
    }
    *length += bytes;
    if tcp == Gso::Tcp6 {
        for _ in 0..EXTENSIONS_MAX {
            // A fragment's header is none of these: it has no whole transport header either.
            if !matches!(protocol, HOP_BY_HOP | ROUTING | DESTINATION) {
                break;
            }
            let [next, more] = [*frame.get(*length)?, *frame.get(*length + 1)?];
            *length += (usize::from(more) + 1) * 8;
            protocol = next;
        }
    }
    let transport = *length;
    let kind = match protocol {
        6 => {
            let bytes = usize::from(*frame.get(transport + 12)? >> 4) * 4;
            if bytes < TCP_LEAST {
                return None;
            }
            *length += bytes;
            tcp
        }
        17 => {
            *length += UDP;
            Gso::Udp
        }
        _ => return None,
    };
    (*length <= frame.len()).then_some((transport, kind))
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec;
    use std::vec::Vec;

    use super::*;
    use vbus_shm::abi::venet::{F_RX, FRAME_MAX, hash_kind};

    fn tcp4(tags: usize, options: u8) -> Vec<u8> {
        let mut frame = vec![0; 12];
        for _ in 0..tags {
            frame.extend([0x81, 0, 0, 7]);
        }
        frame.extend([0x08, 0x00, 0x45]);
        frame.extend([0; 8]);
        frame.push(6);
        frame.extend([0; 10 + 12]);
        frame.push((20 + options) / 4 << 4);
        frame.extend(vec![0; 1007 + usize::from(options)]);
        frame
    }

    fn padded(header: &Header) -> [u8; HASH_HEADER_BYTES] {
        let mut bytes = [0; HASH_HEADER_BYTES];
        bytes[..HEADER_BYTES].copy_from_slice(&header.bytes());
        bytes
    }

    fn cut(kind: Gso, start: u16) -> Header {
        let place = if kind == Gso::Udp { UDP_CSUM } else { TCP_CSUM };
        let segments = Some(Segments { kind, size: 1448, cwr: false });
        Header { csum: Some((start, place)), segments, length: 66, ..Header::default() }
    }

    #[test]
    fn what_is_written_is_read() {
        for kind in [Gso::Tcp4, Gso::Tcp6, Gso::Udp] {
            let header = cut(kind, 34);
            assert_eq!(Header::parse(&padded(&header), false, 9000, F_RX), Ok(header));
        }
        let none = Header::default();
        assert_eq!(Header::parse(&[0; HASH_HEADER_BYTES], true, 60, 0), Ok(none));
        let mut hashed = [0; HASH_HEADER_BYTES];
        hashed[12..18].copy_from_slice(&[1, 2, 3, 4, 2, 0]);
        let hash = Some(HeaderHash { value: 0x0403_0201, kind: hash_kind::TCPV4 });
        assert_eq!(Header::parse(&hashed, true, 60, 0), Ok(Header { hash, ..none }));
        assert_eq!(Header::parse(&hashed, false, 60, 0), Ok(none));
    }

    #[test]
    fn offloads_that_were_not_accepted_or_do_not_fit_are_refused() {
        let header = cut(Gso::Tcp4, 34);
        let bytes = padded(&header);
        assert!(Header::parse(&bytes, false, 9000, F_RX_CSUM | F_RX_TSO4).is_ok());
        for offloads in [0, F_RX_CSUM, F_RX_TSO4, F_RX_CSUM | F_RX_TSO6] {
            assert_eq!(Header::parse(&bytes, false, 9000, offloads), Err(BadHeader));
        }
        // The checksum's place is beyond the frame, or in the Ethernet header.
        assert_eq!(Header::parse(&bytes, false, 34 + 17, F_RX), Err(BadHeader));
        assert_eq!(Header::parse(&padded(&cut(Gso::Tcp4, 13)), false, 9000, F_RX), Err(BadHeader));
        for (at, byte) in [(1, 2), (1, 0x80), (0, 0), (8, 6), (4, 0)] {
            let mut wrong = bytes;
            wrong[at] = byte;
            if at == 4 {
                wrong[5] = 0; // A segment of 0 bytes.
            }
            assert_eq!(Header::parse(&wrong, false, 9000, F_RX), Err(BadHeader), "byte {at}");
        }
        let mut cwr = bytes;
        cwr[1] |= flag::GSO_ECN;
        assert!(Header::parse(&cwr, false, 9000, F_RX).is_ok());
        assert_eq!(Header::parse(&cwr, false, 9000, F_RX & !F_RX_ECN), Err(BadHeader));
    }

    #[test]
    fn what_fits_one_segment_is_not_cut() {
        let segments = |kind, size: u16, frame| {
            let mut bytes = padded(&cut(kind, 34));
            bytes[4..6].copy_from_slice(&size.to_le_bytes());
            Header::parse(&bytes, false, frame, F_RX).map(|header| header.segments.is_some())
        };
        assert_eq!(segments(Gso::Tcp4, 1448, 34 + 20 + 1449), Ok(true));
        assert_eq!(segments(Gso::Tcp4, 1448, 34 + 20 + 1448), Ok(false));
        assert_eq!(segments(Gso::Udp, 1448, 34 + 8 + 1449), Ok(true));
        assert_eq!(segments(Gso::Udp, 1448, 34 + 8 + 1448), Ok(false));
        // No frame behind an IP header has so much payload.
        for kind in [Gso::Tcp4, Gso::Tcp6, Gso::Udp] {
            assert_eq!(segments(kind, u16::MAX, FRAME_MAX - HEADER_BYTES), Ok(false));
        }
    }

    #[test]
    fn headers_are_measured() {
        let plain = Header::default();
        assert_eq!(header_length(&tcp4(0, 12), &plain), Some(66));
        assert_eq!(header_length(&tcp4(2, 0), &plain), Some(62));
        assert_eq!(header_length(&tcp4(0, 12)[..50], &plain), Some(50));
        assert_eq!(header_length(&[0; 60], &plain), Some(14));
        assert_eq!(header_length(&[], &plain), Some(0));

        let to_cut = cut(Gso::Tcp4, 34);
        assert_eq!(header_length(&tcp4(0, 12), &to_cut), Some(66));
        // Of another kind, elsewhere, or not complete.
        assert_eq!(header_length(&tcp4(0, 12), &cut(Gso::Tcp6, 34)), None);
        assert_eq!(header_length(&tcp4(0, 12), &cut(Gso::Udp, 34)), None);
        assert_eq!(header_length(&tcp4(1, 12), &to_cut), None);
        assert_eq!(header_length(&tcp4(0, 12)[..65], &to_cut), None);
        let mut fragment = tcp4(0, 12);
        fragment[20] = 0x20;
        assert_eq!(header_length(&fragment, &to_cut), None);
        assert_eq!(header_length(&fragment, &plain), Some(14));
    }

    /// TCP over IPv6 behind extension headers: the protocol number and the bytes of each.
    fn tcp6(extensions: &[(u8, usize)]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0]);
        let mut protocols = extensions.iter().map(|(protocol, _)| *protocol).chain([6]);
        frame.extend([protocols.next().unwrap(), 64]);
        frame.extend([0; 32]);
        for ((_, bytes), next) in extensions.iter().zip(protocols) {
            let mut extension = vec![0; *bytes];
            extension[..2].copy_from_slice(&[next, u8::try_from(bytes / 8 - 1).unwrap()]);
            frame.extend(extension);
        }
        frame.extend([0; 12]);
        frame.push(5 << 4);
        frame.extend([0; 2000]);
        frame
    }

    #[test]
    fn a_transport_header_may_be_behind_extension_headers() {
        let to_cut = |extensions: &[(u8, usize)]| {
            let start = 54 + extensions.iter().map(|(_, bytes)| bytes).sum::<usize>();
            let frame = tcp6(extensions);
            let header = cut(Gso::Tcp6, u16::try_from(start).unwrap());
            let length = header_length(&frame, &header);
            // All of them have to be there.
            let all = length.unwrap_or(start + TCP_LEAST);
            for short in 0..all {
                assert_eq!(header_length(&frame[..short], &header), None, "{short} bytes");
            }
            // Another place is refused.
            assert_eq!(header_length(&frame, &cut(Gso::Tcp6, 54 + 4)), None);
            length.map(|length| length - start)
        };
        assert_eq!(to_cut(&[]), Some(20));
        assert_eq!(to_cut(&[(0, 8)]), Some(20));
        assert_eq!(to_cut(&[(0, 136), (60, 16), (43, 24), (60, 8)]), Some(20));
        assert_eq!(to_cut(&[(0, 8); 5]), None);
        // A fragment, an authentication header, and what nobody knows.
        for unknown in [44, 51, 59, 135, 254] {
            assert_eq!(to_cut(&[(unknown, 8)]), None, "protocol {unknown}");
            assert_eq!(to_cut(&[(60, 8), (unknown, 8)]), None, "protocol {unknown}");
        }
        assert_eq!(header_length(&tcp6(&[(60, 16)]), &Header::default()), Some(90));
        assert_eq!(header_length(&tcp6(&[(60, 16)])[..60], &Header::default()), Some(60));
    }

    #[test]
    fn no_bytes_are_too_strange() {
        let mut random = 1u64;
        let mut frame = [0; 80];
        for round in 0..20_000 {
            for byte in &mut frame {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (random >> 56) as u8;
            }
            let kinds: [[u8; 3]; 4] =
                [[8, 0, 0x45], [0x86, 0xdd, 0x60], [0x81, 0, 0], [8, 0, 0x4f]];
            frame[12..15].copy_from_slice(&kinds[round % 4]);
            let used = &frame[..(random >> 32) as usize % 81];
            for header in [Header::default(), cut(Gso::Tcp4, 34), cut(Gso::Udp, 54)] {
                if let Some(length) = header_length(used, &header) {
                    assert!(length <= used.len());
                }
            }
        }
    }
}
