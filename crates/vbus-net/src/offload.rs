// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Undoes offloads for a receiver that does not accept them: fills in checksums, and cuts large
//! segments into frames.

use crate::frame::{Body, ETH_BYTES, ETH_OVERHEAD, Header, Packet, VLAN, flag};

const ETHERTYPE_AT: usize = 12;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
const UDP: u8 = 17;
const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;
/// The longest packet that an IP header can tell: its length has 16 bits.
const LENGTH_MAX: usize = 0xffff;

/// The longest frame of DHCP whose checksum the switch fills in.
const DHCP_BYTES_MAX: usize = 1522;
/// The ports of DHCP servers and clients, for IPv4 and IPv6.
const DHCP_PORTS: [u16; 4] = [67, 68, 546, 547];

/// The checksum that is missing in a datagram to a port of DHCP. `None`: the frame is no such
/// datagram, or its sender has filled in the checksum.
///
/// Programs for DHCP read such frames from raw sockets, and older ones drop a frame whose checksum
/// is not complete, although their kernel accepted the offload. So a device fills it in.
pub fn dhcp_checksum(packet: &Packet<'_>) -> Option<u16> {
    let header = &packet.header;
    if !header.leaves_checksum()
        || header.leaves_segmentation()
        || header.csum_offset != 6
        || packet.bytes() > DHCP_BYTES_MAX
        || usize::from(header.csum_start) < ETH_BYTES
    {
        return None;
    }
    let start = usize::from(header.csum_start);
    // Ethernet with two tags, the longest IPv4 header, and the ports.
    let mut head = [0; ETH_OVERHEAD + 60 + 4];
    let len = packet.head(&mut head);
    let port = get(&head[..len], start + 2)?;
    if !DHCP_PORTS.contains(&port) {
        return None;
    }
    let mut frame = [0; DHCP_BYTES_MAX];
    let len = packet.head(&mut frame);
    Some(checksum(0, frame[..len].get(start..)?))
}

/// Fills in the checksum that is missing in a datagram to a port of DHCP, if the frame is one.
pub(crate) fn complete_dhcp(header: &mut Header, eth: &[u8; ETH_BYTES], body: &mut [u8]) {
    let packet = Packet::new(*header, *eth, Body::Bytes(body));
    if let Some(checksum) = dhcp_checksum(&packet) {
        let at = usize::from(header.csum_start) + usize::from(header.csum_offset) - ETH_BYTES;
        if put(body, at, checksum).is_some() {
            *header = Header::default();
        }
    }
}

/// Turns a frame with offloads into plain frames. Keeps its buffers for the next frame.
#[derive(Default)]
pub struct Plain {
    frame: Vec<u8>,
    piece: Vec<u8>,
    cut: Option<Cut>,
    pieces: usize,
}

/// How to cut a large segment, as offsets into the frame.
#[derive(Clone, Copy)]
struct Cut {
    /// IP header.
    ip: usize,
    v4: bool,
    /// TCP or UDP header.
    transport: usize,
    protocol: u8,
    /// The first payload byte.
    payload: usize,
    /// Payload bytes of each plain frame.
    size: usize,
}

impl Plain {
    /// Copies the frame. Its header was checked against its length. Returns the number of plain
    /// frames; `None` if the frame's content does not match its header.
    pub fn load(&mut self, packet: &Packet<'_>) -> Option<usize> {
        self.frame.clear();
        packet.append_to(&mut self.frame, usize::MAX);
        self.cut = None;
        self.pieces = 1;
        let header = &packet.header;
        if header.leaves_segmentation() {
            let cut = Cut::plan(&self.frame, header)?;
            self.pieces = (self.frame.len() - cut.payload).div_ceil(cut.size).max(1);
            self.cut = Some(cut);
        } else if header.leaves_checksum() {
            let start = usize::from(header.csum_start);
            let sum = checksum(0, self.frame.get(start..)?);
            put(&mut self.frame, start + usize::from(header.csum_offset), sum)?;
        }
        Some(self.pieces)
    }

    /// Plain frame number `i`.
    pub fn piece(&mut self, i: usize) -> &[u8] {
        let Some(cut) = self.cut else { return &self.frame };
        let from = (cut.payload + i * cut.size).min(self.frame.len());
        let to = (from + cut.size).min(self.frame.len());
        self.piece.clear();
        self.piece.extend_from_slice(&self.frame[..cut.payload]);
        self.piece.extend_from_slice(&self.frame[from..to]);
        // Every offset was checked against the frame's headers. Each piece has all of them.
        let _ = cut.finish(&mut self.piece, i, i + 1 == self.pieces);
        &self.piece
    }
}

impl Cut {
    fn plan(frame: &[u8], header: &Header) -> Option<Cut> {
        let mut at = ETHERTYPE_AT;
        let mut kind = get(frame, at)?;
        while VLAN.contains(&kind) && at < ETHERTYPE_AT + 8 {
            at += 4;
            kind = get(frame, at)?;
        }
        let ip = at + 2;
        let transport = usize::from(header.csum_start);
        let protocol = if header.gso() == flag::GSO_UDP { UDP } else { TCP };
        let v4 = match (kind, header.gso()) {
            (IPV4, flag::GSO_TCPV4 | flag::GSO_UDP) => true,
            (IPV6, flag::GSO_TCPV6 | flag::GSO_UDP) => false,
            _ => return None,
        };
        let first = *frame.get(ip)?;
        let fits = if v4 {
            let ihl = usize::from(first & 15) * 4;
            first >> 4 == 4 && ihl >= 20 && ip + ihl == transport && *frame.get(ip + 9)? == protocol
        } else {
            first >> 4 == 6 && transport >= ip + 40
        };
        let transport_bytes = match protocol {
            TCP => usize::from(*frame.get(transport + 12)? >> 4) * 4,
            _ => 8,
        };
        let payload = transport + transport_bytes;
        let whole = payload <= frame.len() && (protocol == UDP || transport_bytes >= 20);
        let size = usize::from(header.gso_size);
        // The headers of the longest piece can tell its length.
        let counted_from = if v4 { ip } else { ip + 40 };
        let told = frame.len().min(payload + size).saturating_sub(counted_from) <= LENGTH_MAX;
        (fits && whole && told && size != 0).then_some(Cut {
            ip,
            v4,
            transport,
            protocol,
            payload,
            size,
        })
    }

    /// Updates the headers of piece `i`.
    fn finish(&self, piece: &mut [u8], i: usize, last: bool) -> Option<()> {
        let Cut { ip, transport, .. } = *self;
        let length = u16::try_from(piece.len() - transport).ok()?;
        let index = u16::try_from(i).ok()?;
        if self.v4 {
            put(piece, ip + 2, u16::try_from(piece.len() - ip).ok()?)?;
            let id = get(piece, ip + 4)?.wrapping_add(index);
            put(piece, ip + 4, id)?;
            put(piece, ip + 10, 0)?;
            let sum = checksum(0, piece.get(ip..transport)?);
            put(piece, ip + 10, sum)?;
        } else {
            put(piece, ip + 4, u16::try_from(piece.len() - ip - 40).ok()?)?;
        }
        let addresses = if self.v4 { ip + 12..ip + 20 } else { ip + 8..ip + 40 };
        let pseudo = sum(piece.get(addresses)?) + u64::from(self.protocol) + u64::from(length);
        let at = if self.protocol == TCP {
            let number: [u8; 4] = piece.get(transport + 4..transport + 8)?.try_into().ok()?;
            let done = u32::try_from(i * self.size).ok()?;
            let number = u32::from_be_bytes(number).wrapping_add(done);
            piece.get_mut(transport + 4..transport + 8)?.copy_from_slice(&number.to_be_bytes());
            let flags = piece.get_mut(transport + 13)?;
            *flags &=
                !(if last { 0 } else { TCP_FIN | TCP_PSH } | if i == 0 { 0 } else { TCP_CWR });
            transport + 16
        } else {
            put(piece, transport + 4, length)?;
            transport + 6
        };
        put(piece, at, 0)?;
        let sum = checksum(pseudo, piece.get(transport..)?);
        put(piece, at, sum)
    }
}

fn get(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

fn put(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    bytes.get_mut(at..at + 2)?.copy_from_slice(&value.to_be_bytes());
    Some(())
}

/// The unfolded sum of the 16-bit words.
fn sum(bytes: &[u8]) -> u64 {
    let mut words = bytes.chunks_exact(4);
    let mut sum: u64 =
        words.by_ref().map(|w| u64::from(u32::from_be_bytes([w[0], w[1], w[2], w[3]]))).sum();
    let mut rest = [0; 4];
    rest[..words.remainder().len()].copy_from_slice(words.remainder());
    sum += u64::from(u32::from_be_bytes(rest));
    sum
}

/// The Internet checksum (RFC 1071) of `bytes`, added to `initial`. It is never 0, because 0 means
/// "none" in UDP.
fn checksum(initial: u64, bytes: &[u8]) -> u16 {
    let mut sum = initial + sum(bytes);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    match !u16::try_from(sum).unwrap_or(u16::MAX) {
        0 => 0xffff,
        sum => sum,
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)] // Small numbers.
mod tests {
    use super::*;
    use vbus_tap::Offloads;

    use crate::frame::Body;

    /// A frame with headers of the given kind, payload of `len` bytes, and the checksum field as
    /// Linux leaves it.
    fn large(v4: bool, protocol: u8, tagged: bool, len: usize) -> (Header, Vec<u8>) {
        let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        if tagged {
            frame.extend([0x81, 0, 0, 5]);
        }
        let transport_bytes = if protocol == TCP { 32 } else { 8 };
        frame.extend(if v4 { IPV4 } else { IPV6 }.to_be_bytes());
        if v4 {
            frame.extend([
                0x45, 0, 0, 0, 0xff, 0xff, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
            ]);
        } else {
            frame.extend([0x60, 0, 0, 0, 0, 0, protocol, 64]);
            frame.extend((0..32).map(|n| n * 7));
        }
        let transport = frame.len();
        let mut head = vec![0; transport_bytes];
        head[..4].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
        if protocol == TCP {
            head[4..8].copy_from_slice(&0xffff_fff0_u32.to_be_bytes());
            head[12] = 0x80;
            head[13] = TCP_FIN | TCP_PSH | TCP_CWR | 0x10;
        }
        frame.extend(head);
        frame.extend((0..len).map(|n| (n * 31 % 251) as u8));
        let gso_type = match (protocol, v4) {
            (UDP, _) => flag::GSO_UDP,
            (_, true) => flag::GSO_TCPV4,
            (_, false) => flag::GSO_TCPV6,
        };
        let header = Header {
            flags: flag::NEEDS_CSUM,
            gso_type,
            hdr_len: 0,
            gso_size: 1000,
            csum_start: transport as u16,
            csum_offset: if protocol == TCP { 16 } else { 6 },
        };
        (header, frame)
    }

    fn packet(header: Header, frame: &[u8]) -> Packet<'_> {
        let (eth, body) = frame.split_first_chunk().unwrap();
        Packet::new(header, *eth, Body::Bytes(body))
    }

    /// The plain algorithm of RFC 1071.
    fn slow_sum(bytes: &[u8]) -> u32 {
        let mut sum = 0;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum
    }

    #[test]
    fn segments_are_whole_frames_that_carry_the_same_bytes() {
        for v4 in [true, false] {
            for protocol in [TCP, UDP] {
                for tagged in [false, true] {
                    for len in [1, 999, 1000, 1001, 30_001] {
                        let (header, frame) = large(v4, protocol, tagged, len);
                        let mut plain = Plain::default();
                        let count = plain.load(&packet(header, &frame)).unwrap();
                        assert_eq!(count, len.div_ceil(1000));
                        let transport = usize::from(header.csum_start);
                        let ip = if tagged { 18 } else { 14 };
                        let payload_at = transport + if protocol == TCP { 32 } else { 8 };
                        let mut payload = Vec::new();
                        for i in 0..count {
                            let piece = plain.piece(i).to_vec();
                            let number = |at: usize| u32::from(get(&piece, at).unwrap());
                            let length = (piece.len() - transport) as u32;
                            if v4 {
                                assert_eq!(
                                    slow_sum(&piece[ip..transport]),
                                    0xffff,
                                    "the IP header's checksum"
                                );
                                assert_eq!(number(ip + 2), (piece.len() - ip) as u32);
                                assert_eq!(number(ip + 4), (0xffff + i as u32) & 0xffff);
                            } else {
                                assert_eq!(number(ip + 4), (piece.len() - ip - 40) as u32);
                            }
                            let addresses =
                                if v4 { &piece[ip + 12..ip + 20] } else { &piece[ip + 8..ip + 40] };
                            let tail = [&length.to_be_bytes()[..], &[0, 0, 0, protocol]].concat();
                            let all = [addresses, &tail, &piece[transport..]].concat();
                            assert_eq!(slow_sum(&all), 0xffff, "the checksum over everything");
                            if protocol == TCP {
                                let sequence = 0xffff_fff0_u32.wrapping_add(1000 * i as u32);
                                assert_eq!(
                                    number(transport + 4) << 16 | number(transport + 6),
                                    sequence
                                );
                                let last = i + 1 == count;
                                assert_eq!(piece[transport + 13] & (TCP_FIN | TCP_PSH) != 0, last);
                                assert_eq!(piece[transport + 13] & TCP_CWR != 0, i == 0);
                            } else {
                                assert_eq!(number(transport + 4), length);
                            }
                            payload.extend_from_slice(&piece[payload_at..]);
                        }
                        assert_eq!(payload, frame[payload_at..]);
                    }
                }
            }
        }
    }

    #[test]
    fn a_checksum_is_filled_in() {
        for len in [0, 1, 2, 3, 100, 101] {
            let (header, mut frame) = large(true, UDP, false, len);
            let header = Header { gso_type: 0, gso_size: 0, ..header };
            let length = (frame.len() - 34) as u32;
            put(&mut frame, 38, length as u16).unwrap();
            let pseudo = [&frame[26..34], &[0, UDP], &(length as u16).to_be_bytes()].concat();
            put(&mut frame, 40, slow_sum(&pseudo) as u16).unwrap();
            let mut plain = Plain::default();
            assert_eq!(plain.load(&packet(header, &frame)), Some(1));
            let got = plain.piece(0);
            assert_eq!(slow_sum(&[&pseudo, &got[34..]].concat()), 0xffff);
            assert_eq!((&got[..40], &got[42..]), (&frame[..40], &frame[42..]));
        }
    }

    #[test]
    fn datagrams_to_dhcp_get_their_checksum() {
        let (header, mut frame) = large(true, UDP, false, 300);
        let header = Header { gso_type: 0, gso_size: 0, ..header };
        let missing = |frame: &[u8], header| dhcp_checksum(&packet(header, frame));
        assert_eq!(missing(&frame, header), None, "another port");
        for port in DHCP_PORTS {
            put(&mut frame, 36, port).unwrap();
            let mut plain = Plain::default();
            plain.load(&packet(header, &frame)).unwrap();
            assert_eq!(missing(&frame, header), get(plain.piece(0), 40), "as a whole frame has it");
        }
        assert_eq!(missing(&frame, Header::default()), None, "the sender has filled it in");
        assert_eq!(missing(&frame, Header { csum_offset: 16, ..header }), None, "TCP");
        assert_eq!(missing(&frame[..36], header), None, "cut short");
        frame.resize(DHCP_BYTES_MAX + 1, 0);
        assert_eq!(missing(&frame, header), None, "too large");
    }

    #[test]
    fn headers_that_do_not_match_their_frame_are_refused() {
        let (header, frame) = large(true, TCP, false, 5000);
        let refused =
            |header: Header, frame: &[u8]| Plain::default().load(&packet(header, frame)).is_none();
        assert!(!refused(header, &frame));
        assert!(refused(Header { gso_type: flag::GSO_TCPV6, ..header }, &frame));
        assert!(refused(Header { gso_type: flag::GSO_UDP, ..header }, &frame));
        assert!(refused(Header { csum_start: 35, ..header }, &frame));
        assert!(refused(header, &frame[..60]));
        // No IP header can tell the length of such a segment.
        let (udp, long) = large(true, UDP, false, 65_508);
        assert!(refused(Header { gso_size: u16::MAX, ..udp }, &long));
        assert!(!refused(Header { gso_size: u16::MAX, ..udp }, &long[..long.len() - 1]));
        for (at, value) in [(14, 0x65), (14, 0x44), (14, 0x4f), (23, UDP), (12, 0), (46, 0x40)] {
            let mut frame = frame.clone();
            frame[at] = value;
            assert!(refused(header, &frame), "byte {at} = {value:#x}");
        }
        // No bytes and no header cause a panic.
        let mut x = 1_u64;
        for _ in 0..20_000 {
            let mut next = || {
                x = x
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                (x >> 33) as usize
            };
            let mut bytes = frame[..14 + next() % 200].to_vec();
            for _ in 0..next() % 4 {
                let at = next() % bytes.len();
                bytes[at] = next() as u8;
            }
            let mut header = Header {
                gso_type: [0, 1, 4, 5][next() % 4],
                gso_size: (next() % 2000) as u16,
                csum_start: (next() % 256) as u16,
                csum_offset: [6, 16, 300][next() % 3],
                ..header
            };
            if header.check(bytes.len(), Offloads::ALL) {
                let mut plain = Plain::default();
                let pieces = plain.load(&packet(header, &bytes)).unwrap_or(0);
                (0..pieces).for_each(|i| assert!(plain.piece(i).len() <= bytes.len()));
            }
        }
    }
}
