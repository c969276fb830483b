// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames with offloads and VLAN tags, against slow references.
//!
//! Half of the inputs are a virtio-net header and a frame of any bytes. The other half describes a
//! frame with good headers, and then changes some of its bytes.
#![no_main]

use std::cell::RefCell;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vbus_core::memory::DriverSlice;
use vbus_core::{Access, MemoryContext};
use vbus_net::{Body, ETH_BYTES, Filter, HEADER_BYTES, Header, Offloads, Packet, Vlan, flag};
use vbus_net::{FRAME_MAX, Plain, dhcp_checksum, rss};

const TCP: u8 = 6;
const UDP: u8 = 17;
const TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];
/// The longest frame, without its virtio-net header.
const LONGEST: usize = FRAME_MAX - HEADER_BYTES;

/// Driver memory in two mappings, so that a buffer can lie in both.
static MEMORY: LazyLock<MemoryContext> = LazyLock::new(|| {
    let memory = MemoryContext::new();
    for at in [0, HALF] {
        let file = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a file");
        ftruncate(&file, HALF).expect("room");
        memory.map(at, HALF, Some((file, 0)), Access::BOTH).expect("mapped");
    }
    memory
});
const HALF: u64 = 1 << 17;

thread_local! {
    static PLAIN: RefCell<Plain> = RefCell::default();
}

fuzz_target!(|input: &[u8]| {
    let Some((&[shape, cut], rest)) = input.split_first_chunk::<2>() else { return };
    let Some((mut header, frame)) = (if shape & 1 == 0 { any(rest) } else { good(rest) }) else {
        return;
    };
    if frame.len() < ETH_BYTES || frame.len() > LONGEST || !header.check(frame.len(), Offloads::ALL)
    {
        return;
    }
    let (eth, body) = frame.split_first_chunk().expect("long enough");
    let packet = Packet::new(header, *eth, Body::Bytes(body));
    let offloads = PLAIN.with_borrow_mut(|plain| check_offloads(plain, &packet, &frame));
    check_vlan(&packet, &frame, shape >> 1);

    // The same frame in the memory of a driver, in two buffers.
    let at = HALF - frame.len() as u64 / 2;
    let view = MEMORY.view();
    view.write(at, body).expect("mapped");
    let whole = view.slice(at, body.len() as u64, false).expect("mapped");
    let (first, second) = whole.split_at(usize::from(cut) * 2);
    let parts = [first, second];
    let parts: Vec<DriverSlice<'_>> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    let packet = Packet::new(header, *eth, Body::Driver(&parts));
    let same = PLAIN.with_borrow_mut(|plain| check_offloads(plain, &packet, &frame));
    assert_eq!(offloads, same, "the number of plain frames depends on where the frame is");
    check_vlan(&packet, &frame, shape >> 1);
});

/// A virtio-net header and a frame.
fn any(input: &[u8]) -> Option<(Header, Vec<u8>)> {
    let (header, frame) = input.split_first_chunk()?;
    Some((Header::parse(header), frame.to_vec()))
}

/// A frame with good headers: its form, the size of segments, the length of its payload. The rest
/// of the input is changes: a place from the beginning, and a byte.
fn good(input: &[u8]) -> Option<(Header, Vec<u8>)> {
    let (&[form, size, size_high, len, len_high], changes) = input.split_first_chunk::<5>()?;
    let protocol = if form & 1 == 0 { TCP } else { UDP };
    let v4 = form & 2 == 0;
    let tags = usize::from(form >> 2 & 3).min(2);
    let segment = form & 0x10 != 0;
    let option_bytes = usize::from(form >> 5) * 4;

    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    for tag in 0..tags {
        frame.extend(TAGS[(tags - tag - 1) % 2]);
        frame.extend([0x20, 5 + tag as u8]);
    }
    let transport_bytes = if protocol == TCP { 20 + option_bytes } else { 8 };
    if v4 {
        let ip_options = if protocol == UDP { option_bytes } else { 0 };
        frame.extend([8, 0, 0x45 + (ip_options / 4) as u8, 0, 0, 0, 0xff, 0xfe, 0x40, 0, 64]);
        frame.extend([protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.resize(frame.len() + ip_options, 1);
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, protocol, 64]);
        frame.extend((0..32).map(|n| n * 7));
    }
    let start = frame.len();
    frame.extend([0x12, 0x34, 0, 67, 0xff, 0xff, 0xff, 0xf0]);
    frame.resize(start + transport_bytes, 0);
    if protocol == TCP {
        frame[start + 12] = (transport_bytes / 4 << 4) as u8;
        frame[start + 13] = 0xff;
    }
    let payload = usize::from(u16::from_le_bytes([len, len_high]));
    frame.extend((0..payload).map(|n| (n * 31 % 251) as u8));
    for change in changes.chunks_exact(2) {
        let at = usize::from(change[0]);
        frame.get_mut(at).into_iter().for_each(|byte| *byte = change[1]);
    }
    let gso_type = match (segment, protocol, v4) {
        (false, ..) => flag::GSO_NONE,
        (_, UDP, _) => flag::GSO_UDP,
        (_, _, true) => flag::GSO_TCPV4,
        (_, _, false) => flag::GSO_TCPV6,
    };
    let header = Header {
        flags: flag::NEEDS_CSUM,
        gso_type,
        hdr_len: 0,
        gso_size: u16::from_le_bytes([size, size_high]),
        csum_start: start as u16,
        csum_offset: if protocol == TCP { 16 } else { 6 },
    };
    Some((header, frame))
}

/// The plain algorithm of RFC 1071.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn word(bytes: &[u8], at: usize) -> usize {
    usize::from(bytes[at]) << 8 | usize::from(bytes[at + 1])
}

/// The number of VLAN tags, two at most.
fn tags(frame: &[u8]) -> usize {
    let is_tag =
        |at: usize| frame.get(at..at + 2).is_some_and(|kind| TAGS.iter().any(|t| t == kind));
    if !is_tag(12) { 0 } else { 1 + usize::from(is_tag(16)) }
}

/// Undoes the offloads of `packet`, whose bytes are `frame`. Returns the number of plain frames.
fn check_offloads(plain: &mut Plain, packet: &Packet<'_>, frame: &[u8]) -> Option<usize> {
    let header = packet.header;
    let start = usize::from(header.csum_start);
    let mut copy = Vec::new();
    packet.append_to(&mut copy, usize::MAX);
    assert!(copy == frame && packet.bytes() == frame.len());
    let hash =
        rss::Rss::new(u32::MAX, [0x5a; rss::KEY_BYTES], Vec::new()).expect("no table").hash(packet);
    assert!(hash.kind != 0 || hash.value == 0);
    assert!(Filter::new(packet.destination()).wants(packet));

    let count = plain.load(packet)?;
    let pieces: Vec<Vec<u8>> = (0..count).map(|n| plain.piece(n).to_vec()).collect();
    let longest = pieces.iter().map(Vec::len).max().expect("one at least");
    assert_eq!(packet.wire_bytes(), longest, "the longest frame on the wire");
    for mtu in [0, 68, 576, 1280, 1500, 9000, 65535, longest.saturating_sub(ETH_BYTES + 4)] {
        let fits = |frame: &Vec<u8>| frame.len() <= mtu + ETH_BYTES + 4 * tags(frame);
        assert_eq!(packet.fits_mtu(mtu), pieces.iter().all(fits), "an MTU of {mtu}");
    }
    if !header.leaves_segmentation() {
        assert_eq!(count, 1);
        let mut expected = frame.to_vec();
        if header.leaves_checksum() {
            let at = start + usize::from(header.csum_offset);
            let sum = match !sum(&frame[start..]) {
                0 => 0xffff,
                sum => sum,
            };
            expected[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        assert_eq!(pieces[0], expected);
        if let Some(sum) = dhcp_checksum(packet) {
            assert_eq!(usize::from(sum), word(&expected, start + 6));
        }
        return Some(1);
    }
    check_segments(&header, frame, &pieces);
    Some(count)
}

fn check_segments(header: &Header, frame: &[u8], pieces: &[Vec<u8>]) {
    let (start, size) = (usize::from(header.csum_start), usize::from(header.gso_size));
    let protocol = if header.gso() == flag::GSO_UDP { UDP } else { TCP };
    let ip = ETH_BYTES + 4 * tags(frame);
    let v4 = word(frame, ip - 2) == 0x0800;
    let payload_at =
        start + if protocol == TCP { usize::from(frame[start + 12] >> 4) * 4 } else { 8 };
    let mut payload = Vec::new();
    for (n, piece) in pieces.iter().enumerate() {
        let last = n + 1 == pieces.len();
        let carried = piece.len() - payload_at;
        assert!(carried == size || last && carried < size, "segment {n} carries {carried} bytes");
        assert!(carried > 0 || pieces.len() == 1);
        payload.extend_from_slice(&piece[payload_at..]);

        let length = piece.len() - start;
        if v4 {
            assert_eq!(sum(&piece[ip..start]), 0xffff, "the checksum of the IP header");
            assert_eq!(word(piece, ip + 2), piece.len() - ip);
            assert_eq!(word(piece, ip + 4), (word(frame, ip + 4) + n) & 0xffff);
        } else {
            assert_eq!(word(piece, ip + 4), piece.len() - ip - 40);
        }
        let addresses = if v4 { &piece[ip + 12..ip + 20] } else { &piece[ip + 8..ip + 40] };
        let tail = [&(length as u32).to_be_bytes()[..], &[0, 0, 0, protocol]].concat();
        let all = [addresses, &tail, &piece[start..]].concat();
        assert_eq!(sum(&all), 0xffff, "the checksum over everything");

        // Everything else in the headers is as it was.
        let mut same = piece[..payload_at].to_vec();
        let mut restore = |at: usize, len: usize| {
            same[at..at + len].copy_from_slice(&frame[at..at + len]);
        };
        if v4 {
            restore(ip + 2, 4);
            restore(ip + 10, 2);
        } else {
            restore(ip + 4, 2);
        }
        if protocol == TCP {
            let number = |bytes: &[u8]| word(bytes, start + 4) << 16 | word(bytes, start + 6);
            assert_eq!(number(piece), (number(frame) + n * size) & 0xffff_ffff);
            // FIN and PSH in the last segment, CWR in the first.
            let kept = 0x76 | if last { 0x09 } else { 0 } | if n == 0 { 0x80 } else { 0 };
            assert_eq!(piece[start + 13], frame[start + 13] & kept);
            restore(start + 4, 4);
            restore(start + 13, 1);
            restore(start + 16, 2);
        } else {
            assert_eq!(word(piece, start + 4), length);
            restore(start + 4, 4);
        }
        assert_eq!(same, frame[..payload_at]);
    }
    assert_eq!(payload, frame[payload_at..]);
}

/// The VLANs of a port, by a number.
fn vlan(form: u8) -> Vlan {
    match form & 7 {
        0 => Vlan::Unaware,
        1 => Vlan::Access(5),
        2 => Vlan::Access(6),
        3 => Vlan::Trunk { ids: vec![5, 6], native: None },
        4 => Vlan::Trunk { ids: vec![5, 6], native: Some(5) },
        5 => Vlan::Trunk { ids: vec![6], native: Some(5) },
        6 => Vlan::Trunk { ids: (1..4095).collect(), native: Some(1) },
        _ => Vlan::Trunk { ids: Vec::new(), native: Some(6) },
    }
}

/// The bytes of a frame that came through a port of `from`, as a port of `to` sends it.
fn switched(frame: &[u8], from: &Vlan, to: &Vlan) -> Option<Vec<u8>> {
    let mut bytes = frame.to_vec();
    let (mut id, mut priority) = (0, 0);
    if *from != Vlan::Unaware {
        let is_tagged = frame.len() >= 16 && frame[12..14] == TAGS[0];
        if is_tagged {
            let tag = word(frame, 14) as u16;
            (id, priority) = (tag & 0xfff, tag & 0xf000);
            bytes.drain(12..16);
        }
        id = match from {
            Vlan::Access(own) if id == 0 => *own,
            Vlan::Trunk { native, .. } if id == 0 => (*native)?,
            Vlan::Trunk { ids, .. } if ids.contains(&id) => id,
            _ => return None,
        };
    }
    if !to.carries(id) {
        return None;
    }
    match to {
        Vlan::Trunk { native, .. } if *native != Some(id) => {
            let [high, low] = (id | priority).to_be_bytes();
            bytes.splice(12..12, [0x81, 0, high, low]);
        }
        Vlan::Unaware => {}
        _ if TAGS.iter().any(|tag| bytes[12..14] == *tag) => return None,
        _ => {}
    }
    Some(bytes)
}

fn check_vlan(packet: &Packet<'_>, frame: &[u8], form: u8) {
    let (from, to) = (vlan(form), vlan(form >> 3));
    let mut parts = Vec::new();
    let out = from.classify(packet).filter(|class| to.carries(class.id)).and_then(|class| {
        let inside = class.enter(packet, &mut parts)?;
        // What the switch's own code returns borrows `parts`, so the bytes are copied.
        let out = to.leave(&inside, class)?;
        let mut bytes = Vec::new();
        out.append_to(&mut bytes, usize::MAX);
        assert_eq!(bytes.len(), out.bytes());
        Some((out.header, bytes))
    });
    let Some((header, bytes)) = out else { return };
    assert_eq!(Some(&bytes), switched(frame, &from, &to).as_ref());
    if header.leaves_checksum() {
        let start = |header: &Header| usize::from(header.csum_start);
        assert_eq!(bytes[start(&header)..], frame[start(&packet.header)..]);
    }
}
