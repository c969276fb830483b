// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The back end `tap` with this machine's own network stack. It needs CAP_NET_ADMIN. Without it,
//! the tests print that they were skipped.

use std::net::{Ipv4Addr, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vbus_core::shm::abi::venet::{
    ALL_PAIRS, CALL_FILTER, CALL_SET_COALESCE, CALL_SET_OFFLOADS, CALL_SET_RSS, F_COALESCE, F_HASH,
    F_RSS, F_RX, F_TX, F_TX_USO, hash_kind,
};
use vbus_core::shm::signal::Armed;
use vbus_core::{Bus, Called, ErrorCode};

use crate::driver::{Net, Shape, TIMEOUT, bus, frame};
use crate::offloads::{large, payload};

pub const A: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const UDP: u8 = 17;

/// Makes a driver on a TAP interface. Returns it with the interface's name; `None` if this process
/// may not do that.
pub fn tap(bus: &Bus, shape: Shape, extra: &Value) -> Option<(Net, String)> {
    let mut config =
        json!({ "mac": "02:00:00:00:00:01", "backend": "tap", "queue-pairs": shape.pairs });
    for (key, value) in extra.as_object().unwrap() {
        config[key] = value.clone();
    }
    let endpoint = match bus.create("a", "venet", &config) {
        Ok(endpoint) => endpoint,
        Err(error) => {
            eprintln!("skipped: {error}");
            return None;
        }
    };
    let offered = endpoint.identity().features;
    let mut net = Net::open(&endpoint, Shape { features: shape.features & offered, ..shape });
    net.post_all();
    let name = endpoint.inspect()["device"]["backend"]["tap"].as_str().unwrap().to_owned();
    Some((net, name))
}

fn ip(args: &str) {
    let output = Command::new("ip")
        .args(args.split(' '))
        .output()
        .expect("iproute2 is there where TAP is tested");
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Gives the interface an address, and adds the driver as a neighbour, once the interface takes
/// frames: the kernel drops them until it has seen the carrier. Each test has a network of its own.
pub fn address(name: &str, net: u8) -> UdpSocket {
    let state = || std::fs::read_to_string(format!("/sys/class/net/{name}/operstate")).unwrap();
    let end = Instant::now() + TIMEOUT;
    while state().trim() != "up" {
        assert!(Instant::now() < end, "the interface is {}", state());
        std::thread::sleep(Duration::from_millis(5));
    }
    ip(&format!("addr add 10.78.{net}.1/24 dev {name}"));
    ip(&format!("neigh replace 10.78.{net}.2 lladdr 02:00:00:00:00:01 dev {name}"));
    let socket = UdpSocket::bind((Ipv4Addr::new(10, 78, net, 1), 7777)).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket
}

fn mac_of(name: &str) -> [u8; 6] {
    let text = std::fs::read_to_string(format!("/sys/class/net/{name}/address")).unwrap();
    let bytes: Vec<u8> =
        text.trim().split(':').map(|part| u8::from_str_radix(part, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

/// A frame with a UDP datagram, without a checksum, from the driver to port 7777 of the interface.
pub fn datagram(name: &str, net: u8, data: &[u8]) -> Vec<u8> {
    let udp = 8 + data.len() as u16;
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp).to_be_bytes());
    ip.extend([0, 1, 0, 0, 64, UDP, 0, 0, 10, 78, net, 2, 10, 78, net, 1]);
    let sum =
        ip.chunks(2).fold(0, |sum, pair| sum + (u32::from(pair[0]) << 8 | u32::from(pair[1])));
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let ports =
        [5555_u16.to_be_bytes(), 7777_u16.to_be_bytes(), udp.to_be_bytes(), [0, 0]].concat();
    [&mac_of(name)[..], &A, &[8, 0], &ip, &ports, data].concat()
}

#[test]
fn datagrams_pass_both_ways() {
    let bus = bus(1);
    let shape = Shape { entries: 16, ..Shape::default() };
    let Some((mut a, name)) = tap(&bus, shape, &json!({ "mtu": 9000 })) else { return };
    let socket = address(&name, 1);
    let mut buffer = [0; 10_000];
    // With 54 bytes of headers, 202 bytes are the most that the back end copies into one piece.
    for (n, len) in [1, 1000, 8000, 18, 201, 202, 203].into_iter().enumerate() {
        let data = frame(A, A, n as u64, len);
        a.send_with(0, &[0; 12], &datagram(&name, 1, &data), 1 + n);
        let got = socket.recv(&mut buffer).unwrap();
        assert_eq!(buffer[..got], data);
        socket.send_to(&data, (Ipv4Addr::new(10, 78, 1, 2), 5555)).unwrap();
        loop {
            let got = a.recv(0);
            // The machine may send multicast frames of its own on a new interface.
            if got[..6] == A && got[23] == UDP {
                assert_eq!(payload(&got, UDP)[..len], data);
                break;
            }
        }
    }
    // Send more datagrams than the ring holds: the interface keeps them until there are buffers.
    for n in 0..200_u64 {
        socket.send_to(&n.to_le_bytes(), (Ipv4Addr::new(10, 78, 1, 2), 5555)).unwrap();
    }
    let mut next = 0_u64;
    while next < 200 {
        let got = a.recv(0);
        if got[..6] == A && got[23] == UDP {
            assert_eq!(payload(&got, UDP)[..8], next.to_le_bytes(), "in order, none lost");
            next += 1;
        }
    }
    assert_eq!(
        std::fs::read_to_string(format!("/sys/class/net/{name}/mtu")).unwrap().trim(),
        "9000"
    );
    a.endpoint.close();
    carrier(&a, &name, "0");
    // Drivers come and go faster than the kernel sets the interface up. The last one counts.
    let endpoint = a.endpoint.clone();
    for last in ["1", "0"] {
        for _ in 0..50 {
            a = Net::open(&endpoint, shape);
            if last == "0" {
                a.endpoint.close();
            }
        }
        carrier(&a, &name, last);
    }
}

/// The kernel spreads flows over the interface's queues. The driver's table has the last word.
#[test]
fn the_driver_s_table_chooses_the_receive_queue() {
    let bus = bus(2);
    let shape = Shape { pairs: 2, entries: 16, features: F_RSS | F_HASH, ..Shape::default() };
    let Some((mut a, name)) = tap(&bus, shape, &json!({})) else { return };
    let socket = address(&name, 4);
    let rss = |a: &mut Net, table: &[u16]| {
        let kinds = hash_kind::UDPV4.to_le_bytes();
        let entries = (table.len() as u16).to_le_bytes();
        let table: Vec<u8> = table.iter().flat_map(|queue| queue.to_le_bytes()).collect();
        let buffer = [&kinds[..], &entries, &[0; 2], &[0x5a; 40], &table].concat();
        a.call(CALL_SET_RSS, &buffer).unwrap();
    };
    for queue in [1, 0, 1] {
        rss(&mut a, &[queue; 128]);
        // More frames than the ring has buffers, of as many flows.
        for n in 0..40_u16 {
            let to = (Ipv4Addr::new(10, 78, 4, 2), 6000 + n);
            socket.send_to(&n.to_le_bytes(), to).unwrap();
        }
        let mut seen = std::collections::BTreeSet::new();
        while seen.len() < 40 {
            let (header, got) = a.recv_header(usize::from(queue));
            if got[..6] == A && got[23] == UDP {
                assert_eq!(header[16..18], [3, 0], "hashed as UDP over IPv4");
                let payload = payload(&got, UDP);
                seen.insert(u16::from_le_bytes([payload[0], payload[1]]));
            }
        }
        assert_eq!(seen.len(), 40);
    }
    // Frames of both queues of the interface arrive while the table uses both.
    rss(&mut a, &[0, 1]);
    for n in 0..40_u16 {
        socket.send_to(&n.to_le_bytes(), (Ipv4Addr::new(10, 78, 4, 2), 6000 + n)).unwrap();
    }
    let mut counts = [0; 2];
    while counts.iter().sum::<u32>() < 40 {
        let (queue, got) = a.recv_any(2);
        if got[..6] == A && got[23] == UDP {
            counts[queue] += 1;
        }
    }
    assert!(counts[0] > 0 && counts[1] > 0, "{counts:?}");
}

/// Waits until the interface has this carrier.
fn carrier(net: &Net, name: &str, expected: &str) {
    net.interrupts.wait("the carrier", || {
        let carrier = std::fs::read_to_string(format!("/sys/class/net/{name}/carrier")).unwrap();
        (carrier.trim() == expected).then_some(())
    });
}

/// The kernel sets an interface up under a lock that others may hold for long. No register access
/// waits for that.
#[test]
fn a_start_that_takes_time_is_in_progress() {
    let bus = bus(1);
    let Some((a, name)) = tap(&bus, Shape::default(), &json!({})) else { return };
    let endpoint = a.endpoint.clone();
    let offloads = 0_u64.to_le_bytes();
    a.memory.write(2048, &offloads);
    let mut later = 0;
    for _ in 0..10_000 {
        if later == 5 {
            break;
        }
        let pending = match endpoint.call(CALL_SET_OFFLOADS, 0, 2048, 8).unwrap() {
            Called::Later(pending) => pending,
            // The kernel was so fast that the call had ended before anybody looked.
            called => {
                assert_eq!(called.now(), Ok(0));
                continue;
            }
        };
        later += 1;
        let other = endpoint.call(CALL_SET_OFFLOADS, 0, 2048, 8);
        assert!(matches!(other, Ok(_) | Err(ErrorCode::IN_PROGRESS)));
        a.interrupts.wait("the end of the call", || pending.result()).unwrap();
        a.interrupts.wait("the end of both", || endpoint.call(CALL_FILTER, 0, 2048, 8).ok());
    }
    assert!(later > 0, "some calls were in progress");
    carrier(&a, &name, "1");
}

#[test]
fn large_datagrams_pass_whole() {
    let bus = bus(1);
    let features = F_TX | F_RX;
    let shape = Shape { features, buffer_bytes: 4096, ..Shape::default() };
    let Some((mut a, name)) = tap(&bus, shape, &json!({})) else { return };
    if a.endpoint.features_accepted() & F_TX_USO == 0 {
        eprintln!("skipped: this kernel has no UDP segmentation on TAP (it came with 6.2)");
        return;
    }
    let socket = address(&name, 2);
    // Outbound: one frame becomes 20 datagrams.
    let (header, mut large) = large(UDP, 1000, 20_000);
    let plain = datagram(&name, 2, &[]);
    large[..12].copy_from_slice(&plain[..12]);
    large[26..34].copy_from_slice(&plain[26..34]);
    large[34..38].copy_from_slice(&plain[34..38]);
    large[16..18].copy_from_slice(&20_028_u16.to_be_bytes());
    large[24..26].copy_from_slice(&[0, 0]);
    let sum = large[14..34]
        .chunks(2)
        .fold(0, |sum, pair| sum + (u32::from(pair[0]) << 8 | u32::from(pair[1])));
    large[24..26].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
    // The sum of the pseudo header, as the sender's network stack leaves it.
    let pseudo = [&large[26..34], &[0, UDP], &20_008_u16.to_be_bytes()].concat();
    let sum =
        pseudo.chunks(2).fold(0, |sum, pair| sum + (u32::from(pair[0]) << 8 | u32::from(pair[1])));
    large[40..42].copy_from_slice(&((sum & 0xffff) + (sum >> 16)).to_be_bytes()[2..]);
    a.send_with(0, &header, &large, 3);
    let mut got = Vec::new();
    let mut buffer = [0; 2000];
    while got.len() < 20_000 {
        let len = socket.recv(&mut buffer).unwrap();
        assert_eq!(len, 1000);
        got.extend_from_slice(&buffer[..len]);
    }
    assert!(got == large[42..]);
}

#[test]
fn the_interface_has_as_many_queues() {
    let bus = bus(2);
    let Some((mut a, name)) =
        tap(&bus, Shape { pairs: 2, ..Shape::default() }, &json!({ "tap": "vbustest%d" }))
    else {
        return;
    };
    assert!(name.starts_with("vbustest"), "{name}");
    let socket = address(&name, 3);
    let queues = std::fs::read_dir(format!("/sys/class/net/{name}/queues")).unwrap();
    let rx = queues
        .filter(|q| q.as_ref().unwrap().file_name().to_string_lossy().starts_with("rx-"))
        .count();
    assert_eq!(rx, 2);
    let mut buffer = [0; 2000];
    for q in 0..2 {
        a.send(q, &datagram(&name, 3, &[q as u8; 100]));
        assert_eq!(socket.recv(&mut buffer).unwrap(), 100);
        assert_eq!(buffer[0], q as u8);
    }
    // One of two pairs is in use, so all frames come to it.
    let endpoint = a.endpoint.clone();
    drop(a);
    let mut a = Net::open(&endpoint, Shape::default());
    a.post_all();
    for n in 0..20_u64 {
        // Use different ports, so that the kernel would spread the frames.
        socket.send_to(&n.to_le_bytes(), (Ipv4Addr::new(10, 78, 3, 2), 6000 + n as u16)).unwrap();
    }
    let mut next = 0_u64;
    while next < 20 {
        let got = a.recv(0);
        if got[..6] == A && got[23] == UDP {
            assert_eq!(payload(&got, UDP)[..8], next.to_le_bytes());
            next += 1;
        }
    }
}

/// The frames to the driver that are datagrams to it, without those that the machine sends of its
/// own.
fn next_datagram(net: &mut Net) -> (Vec<u8>, Vec<u8>) {
    loop {
        let (_, header, got) = net.recv_any_header(net.pairs.len());
        if got[..6] == A && got[12..14] == [8, 0] && got[23] == UDP {
            return (header, got);
        }
    }
}

#[test]
fn an_interface_with_a_larger_mtu_passes_no_longer_frames() {
    let bus = bus(1);
    let all = Shape { features: F_TX | F_RX, buffer_bytes: 4096, ..Shape::default() };
    let Some((mut a, name)) = tap(&bus, all, &json!({})) else { return };
    let socket = address(&name, 7);
    ip(&format!("link set {name} mtu 9000"));
    let to = (Ipv4Addr::new(10, 78, 7, 2), 5555);
    for len in [1473, 3000, 8000, 1472] {
        socket.send_to(&vec![7; len], to).unwrap();
    }
    assert_eq!(next_datagram(&mut a).1.len(), 1514, "the longest that fits comes first");
    assert_eq!(a.counter("/pairs/0/rx/drops/too_long"), 3);
    a.send(0, &datagram(&name, 7, &[7; 1473]));
    a.send(0, &datagram(&name, 7, &[7; 1472]));
    assert_eq!(socket.recv(&mut [0; 9000]).unwrap(), 1472);
    assert_eq!(a.counter("/pairs/0/tx/drops/too_long"), 1);
}

#[test]
fn dhcp_from_an_interface_has_its_checksum() {
    let dir = tempfile::tempdir().unwrap();
    let all = Shape { features: F_TX | F_RX, buffer_bytes: 4096, ..Shape::default() };
    let steered = Shape { features: all.features | F_RSS, pairs: 2, ..all };
    for (net, shape, extra) in [
        (50, all, json!({})),
        (51, all, json!({ "pcap": dir.path().join("a.pcap") })),
        (52, steered, json!({})),
        (53, steered, json!({ "pcap": dir.path().join("b.pcap") })),
    ] {
        let bus = bus(2);
        let Some((mut a, name)) = tap(&bus, shape, &extra) else { return };
        let socket = address(&name, net);
        // Different lengths, so that the frame ends in one buffer or in another.
        for len in [5, 300, 1200] {
            let data = frame(A, A, len, len as usize);
            socket.send_to(&data, (Ipv4Addr::new(10, 78, net, 2), 68)).unwrap();
            let (header, got) = next_datagram(&mut a);
            let expected = (0, &data[..]);
            assert_eq!((header[0], &payload(&got, UDP)[..len as usize]), expected, "{extra}");
            socket.send_to(&data, (Ipv4Addr::new(10, 78, net, 2), 5555)).unwrap();
            assert_eq!(next_datagram(&mut a).0[0], 1, "to another port: left to the driver");
        }
    }
}

/// A segment of 64 KiB needs more buffers of 2 KiB than one frame may use, and more of 512 bytes
/// than the ring has. It comes as the frames that the network would see.
#[test]
fn a_segment_for_small_buffers_is_cut() {
    const BYTES: usize = 60_000;
    let dir = tempfile::tempdir().unwrap();
    let shape = Shape { features: F_TX | F_RX, ..Shape::default() };
    let steered = Shape { features: F_TX | F_RX | F_RSS, pairs: 2, ..shape };
    for (net, shape, extra) in [
        (60, shape, json!({})),
        (61, Shape { entries: 16, buffer_bytes: 512, ..shape }, json!({})),
        (62, shape, json!({ "pcap": dir.path().join("a.pcap") })),
        (63, steered, json!({})),
    ] {
        let bus = bus(2);
        let Some((mut a, name)) = tap(&bus, shape, &extra) else { return };
        if a.endpoint.features_accepted() & F_TX_USO == 0 {
            return eprintln!("skipped: this kernel has no UDP segmentation on TAP");
        }
        let socket = address(&name, net);
        // The kernel makes one segment of the datagrams of one call.
        segment_size(&socket, 1000);
        let data = frame(A, A, 1, BYTES);
        assert_eq!(socket.send_to(&data, (Ipv4Addr::new(10, 78, net, 2), 5555)).unwrap(), BYTES);
        let mut got = Vec::new();
        while got.len() < BYTES {
            let (header, frame) = next_datagram(&mut a);
            assert_eq!((header[1], frame.len()), (0, 42 + 1000), "a plain frame");
            got.extend_from_slice(&frame[42..]);
        }
        assert!(got == data, "in order");
        let dropped = |reason: &str| a.counter(&format!("/pairs/0/rx/drops/{reason}"));
        assert_eq!(["too_long", "bad_frame", "no_buffers"].map(dropped), [0; 3]);
    }
}

/// Lets the kernel cut what the socket sends in one call into datagrams of this size.
#[allow(unsafe_code, reason = "rustix has no UDP_SEGMENT")]
fn segment_size(socket: &UdpSocket, bytes: i32) {
    use std::os::fd::AsRawFd;
    const UDP_SEGMENT: i32 = 103;
    // SAFETY: the kernel reads one int.
    let result = unsafe {
        let len = size_of::<i32>() as libc::socklen_t;
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            UDP_SEGMENT,
            (&raw const bytes).cast(),
            len,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// A driver that lacks buffers must hear of the frames that it has, however long it asked for
/// interrupts to be held back.
#[test]
fn a_starved_ring_holds_no_interrupt_back() {
    let bus = bus(1);
    let shape = Shape { entries: 16, features: F_COALESCE, ..Shape::default() };
    let Some((mut a, name)) = tap(&bus, shape, &json!({})) else { return };
    let socket = address(&name, 10);
    let words = [ALL_PAIRS, 0, 3_600_000_000, 0, 0, 0];
    a.call(CALL_SET_COALESCE, &words.map(u32::to_le_bytes).concat()).unwrap();
    assert_eq!(a.pairs[0].rx.arm(0), Armed::Waiting);
    let before = a.endpoint.counters().interrupts.get();
    for n in 0..100_u64 {
        socket.send_to(&n.to_le_bytes(), (Ipv4Addr::new(10, 78, 10, 2), 5555)).unwrap();
    }
    let interrupted = || a.endpoint.counters().interrupts.get() > before;
    a.interrupts.wait("the interrupt", || interrupted().then_some(()));
    for n in 0..100_u64 {
        let got = next_datagram(&mut a).1;
        assert_eq!(payload(&got, UDP)[..8], n.to_le_bytes(), "in order, none lost");
    }
}

/// Frames from outside wait for a port that lacks buffers, behind a capture too.
#[test]
fn an_uplink_with_a_capture_loses_and_mixes_no_frames() {
    let (bus, dir) = (bus(2), tempfile::tempdir().unwrap());
    let pcap = dir.path().join("up.pcap");
    let settings = json!({ "backend": "tap", "switch": "s", "pcap": pcap });
    let uplink = match bus.create("up", "uplink", &settings) {
        Ok(uplink) => uplink,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let backend = uplink.inspect()["device"]["backend"].clone();
    let name = backend["tap"].as_str().unwrap().to_owned();
    let config = json!({ "mac": "02:00:00:00:00:01", "switch": "s", "backpressure-ms": 60_000 });
    let shape = Shape { entries: 8, ..Shape::default() };
    let mut a = Net::new(&bus, "a", config, shape);
    let socket = address(&name, 11);
    // More frames than the driver has buffers, and not more than the interface keeps.
    for n in 0..100_u64 {
        socket.send_to(&n.to_le_bytes(), (Ipv4Addr::new(10, 78, 11, 2), 5555)).unwrap();
    }
    for n in 0..100_u64 {
        let got = next_datagram(&mut a).1;
        assert_eq!(payload(&got, UDP)[..8], n.to_le_bytes(), "in order, none lost");
    }
}

#[test]
fn an_uplink_leads_from_a_switch_to_this_machine() {
    let bus = bus(2);
    let settings = json!({ "backend": "tap", "switch": "s" });
    let uplink = match bus.create("up", "uplink", &settings) {
        Ok(uplink) => uplink,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let inspect = || uplink.inspect()["device"].clone();
    let name = inspect()["backend"]["tap"].as_str().unwrap().to_owned();
    let port = |n: u8| {
        let mac = format!("02:00:00:00:00:{n:02x}");
        json!({ "mac": mac, "switch": "s", "isolated": true, "backpressure-ms": 60_000 })
    };
    let all = Shape { features: F_TX | F_RX, buffer_bytes: 4096, ..Shape::default() };
    let mut a = Net::new(&bus, "a", port(1), all);
    let mut b = Net::new(&bus, "b", port(2), Shape::default());
    let socket = address(&name, 6);
    let (mut buffer, to) = ([0; 2000], (Ipv4Addr::new(10, 78, 6, 2), 5555));
    for n in 0..100 {
        let data = frame(A, A, n, 1 + n as usize * 14);
        a.send(0, &datagram(&name, 6, &data));
        let got = socket.recv(&mut buffer).unwrap();
        assert_eq!(buffer[..got], data);
        socket.send_to(&data, to).unwrap();
        // The checksum is left to the driver, which accepts that: it covers the same bytes.
        assert_eq!(next_datagram(&mut a).1[42..][..data.len()], data);
    }
    // Isolated ports reach the outside, and not each other.
    a.send(0, &frame([2, 0, 0, 0, 0, 2], A, 1, 60));
    a.send(0, &datagram(&name, 6, &[9; 9]));
    assert_eq!(socket.recv(&mut buffer).unwrap(), 9);
    assert_eq!(a.counter("/pairs/0/tx/drops/denied"), 1);
    while let Some(got) = b.try_recv(0) {
        assert_ne!(got[12 + 6..][..6], A);
    }
    assert_eq!(inspect()["uplinks"], json!(["up"]));
    a.interrupts.wait("the counters", || {
        (inspect()["to-outside"]["frames"].as_u64().unwrap() >= 101).then_some(())
    });
    // No driver opens it, and it takes its interface with it.
    bus.remove("up").unwrap();
    drop(uplink);
    // A helper thread may still hold the interface for a moment.
    let path = format!("/sys/class/net/{name}");
    a.interrupts
        .wait("the end of the interface", || (!std::path::Path::new(&path).exists()).then_some(()));
}

/// Both directions have work all the time. The test counts frames, and no time.
#[test]
fn neither_direction_starves_the_other() {
    let bus = bus(1);
    let Some((mut a, name)) = tap(&bus, Shape::default(), &json!({})) else { return };
    let socket = address(&name, 8);
    let done = Arc::new(AtomicBool::new(false));
    let (stop, sender) = (done.clone(), socket.try_clone().unwrap());
    let host = std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            // The interface's queue may be full.
            let _ = sender.send_to(&[7; 1000], (Ipv4Addr::new(10, 78, 8, 2), 5555));
        }
    });
    let (frame, interrupts) = (datagram(&name, 8, &[7; 1000]), a.interrupts.clone());
    let frames = 5_000;
    let counts = interrupts.wait("frames in both directions", || {
        for _ in 0..64 {
            a.submit(0, &[0; 12], &frame, 1);
            a.kick_tx(0);
            while a.try_recv(0).is_some() {}
        }
        let counts = ["tx", "rx"].map(|way| a.counter(&format!("/pairs/0/{way}/frames")));
        counts.into_iter().max().filter(|most| *most >= frames).map(|_| counts)
    });
    done.store(true, Ordering::Relaxed);
    host.join().unwrap();
    assert!(counts.into_iter().min() >= Some(frames / 20), "out and in: {counts:?}");
}
