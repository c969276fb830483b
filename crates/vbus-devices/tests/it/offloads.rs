// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames with offloads between drivers that accept them and drivers that do not.

use serde_json::json;
use vbus_core::shm::abi::venet::{F_RX, F_RX_CSUM, F_RX_TSO4, F_TX};

use crate::driver::{Net, Shape, bus};

const ALL: u64 = F_TX | F_RX;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// Where the transport header begins: Ethernet, IPv4 without options.
const TRANSPORT: usize = 34;

/// A large segment (or datagram) from device 1 to device 2, with the header before it.
pub fn large(protocol: u8, gso_size: u16, payload: usize) -> ([u8; 12], Vec<u8>) {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    frame.extend([0x45, 0, 0, 0, 0, 7, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let transport_bytes = if protocol == TCP { 20 } else { 8 };
    let mut transport = vec![0; transport_bytes];
    if protocol == TCP {
        transport[12] = 0x50;
        transport[13] = 0x18;
    }
    frame.extend(transport);
    frame.extend((0..payload).map(|n| (n * 13 % 241) as u8));
    // The field holds the sum over the addresses, the protocol and the length, as Linux leaves it.
    let length = (frame.len() - TRANSPORT) as u32;
    let pseudo = pseudo(&frame, protocol, length);
    let offset = if protocol == TCP { 16 } else { 6 };
    frame[TRANSPORT + offset..][..2].copy_from_slice(&(sum(&pseudo) as u16).to_be_bytes());
    if protocol == UDP {
        frame[TRANSPORT + 4..][..2].copy_from_slice(&(length as u16).to_be_bytes());
    }
    let mut header = [0; 12];
    header[0] = 1;
    header[1] = if gso_size == 0 {
        0
    } else if protocol == TCP {
        1
    } else {
        5
    };
    header[4..6].copy_from_slice(&gso_size.to_le_bytes());
    header[6..8].copy_from_slice(&(TRANSPORT as u16).to_le_bytes());
    header[8..10].copy_from_slice(&(offset as u16).to_le_bytes());
    (header, frame)
}

fn pseudo(frame: &[u8], protocol: u8, length: u32) -> Vec<u8> {
    [&frame[26..34], &length.to_be_bytes(), &[0, 0, 0, protocol]].concat()
}

/// The plain algorithm of RFC 1071.
fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).fold(0, |sum, pair| {
        let sum = sum + (u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
        (sum & 0xffff) + (sum >> 16)
    })
}

/// The payload of a plain frame whose checksum is good.
pub fn payload(frame: &[u8], protocol: u8) -> &[u8] {
    let transport = &frame[TRANSPORT..];
    let all = [&pseudo(frame, protocol, transport.len() as u32), transport].concat();
    assert_eq!(sum(&all), 0xffff, "checksum");
    &transport[if protocol == TCP { 20 } else { 8 }..]
}

fn pair(features: [u64; 2], shapes: [Shape; 2]) -> [Net; 2] {
    let bus = bus(2);
    let config = |n| json!({ "mac": format!("02:00:00:00:00:{n:02x}"), "backpressure-ms": 60_000 });
    let [a, b] = [0, 1].map(|n| {
        let shape = Shape { features: features[n], ..shapes[n] };
        Net::new(&bus, &format!("n{n}"), config(n + 1), shape)
    });
    [a, b]
}

#[test]
fn a_driver_that_accepts_segments_gets_them_whole() {
    let big = Shape { buffer_bytes: 4096, ..Shape::default() };
    let [mut a, mut b] = pair([ALL, ALL], [big, big]);
    for (protocol, len) in [(TCP, 65_000), (UDP, 64_000), (TCP, 1449)] {
        let (header, frame) = large(protocol, 1448, len);
        a.send_with(0, &header, &frame, 5);
        let (got_header, got) = b.recv_with(0);
        assert_eq!(got_header[..10], header[..10]);
        assert!(got == frame);
    }
}

#[test]
fn a_driver_without_segmentation_gets_frames() {
    for (features, protocol) in [(0, TCP), (F_RX_CSUM, TCP), (F_RX_CSUM | F_RX_TSO4, UDP), (0, UDP)]
    {
        let [mut a, mut b] =
            pair([ALL, features], [Shape::default(), Shape { entries: 8, ..Shape::default() }]);
        let (header, frame) = large(protocol, 1448, 60_000);
        let whole = &frame[TRANSPORT + if protocol == TCP { 20 } else { 8 }..];
        for _ in 0..3 {
            a.send_with(0, &header, &frame, 1);
            let mut got = Vec::new();
            while got.len() < whole.len() {
                let (header, frame) = b.recv_with(0);
                assert_eq!((header[0], header[1]), (0, 0), "nothing is left to the receiver");
                assert!(frame.len() <= 1514);
                got.extend_from_slice(payload(&frame, protocol));
            }
            assert!(got == whole);
        }
        assert_eq!(b.try_recv(0), None);
        assert_eq!(b.counter("/pairs/0/rx/drops/no_buffers"), 0);
    }
}

#[test]
fn a_receiver_with_small_buffers_gets_frames_instead_of_segments() {
    let [mut a, mut b] =
        pair([ALL, ALL], [Shape::default(), Shape { buffer_bytes: 512, ..Shape::default() }]);
    let (header, frame) = large(TCP, 1448, 60_000);
    a.send_with(0, &header, &frame, 1);
    let mut got = Vec::new();
    while got.len() < 60_000 {
        got.extend_from_slice(payload(&b.recv(0), TCP));
    }
    assert!(got == frame[54..]);
}

#[test]
fn a_driver_without_checksum_offload_gets_checksums() {
    let [mut a, mut b] = pair([ALL, 0], [Shape::default(); 2]);
    for protocol in [TCP, UDP] {
        let (header, frame) = large(protocol, 0, 1001);
        a.send_with(0, &header, &frame, 2);
        let (got_header, got) = b.recv_with(0);
        assert_eq!(got_header[..2], [0, 0]);
        assert_eq!(payload(&got, protocol), payload_of(&frame, protocol));
    }
}

fn payload_of(frame: &[u8], protocol: u8) -> &[u8] {
    &frame[TRANSPORT + if protocol == TCP { 20 } else { 8 }..]
}

#[test]
fn frames_with_unaccepted_offloads_are_dropped_and_counted() {
    let [mut a, mut b] = pair([0, ALL], [Shape::default(); 2]);
    let (header, frame) = large(TCP, 1448, 5000);
    a.send_with(0, &header, &frame, 1);
    a.send(0, &[2; 13]);
    a.send(0, &vec![2; 1519]);
    a.send(0, &large(UDP, 0, 10).1);
    assert_eq!(b.recv(0).len(), 52);
    a.interrupts.wait("the counters", || (a.counter("/pairs/0/tx/frames") == 1).then_some(()));
    for reason in ["bad_header", "too_long", "short"] {
        assert_eq!(a.counter(&format!("/pairs/0/tx/drops/{reason}")), 1, "{reason}");
    }
}
