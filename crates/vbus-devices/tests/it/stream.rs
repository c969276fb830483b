// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The back end `stream`, against peers that speak its protocol.

use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};
use vbus_core::shm::abi::venet::status_page as word;
use vbus_core::shm::abi::venet::{F_RX, F_TX};

use crate::driver::{Net, Shape, TIMEOUT, bus, frame};
use crate::offloads::{large, payload};

const A: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 7];

fn config(end: &str, path: &Path) -> Value {
    json!({ "mac": "02:00:00:00:00:01", "backend": "stream", end: path })
}

fn write_frame(peer: &mut UnixStream, frame: &[u8]) {
    peer.write_all(&(frame.len() as u32).to_be_bytes()).unwrap();
    peer.write_all(frame).unwrap();
}

fn read_frame(peer: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    peer.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    peer.read_exact(&mut frame).unwrap();
    frame
}

fn accept(listener: &UnixListener) -> UnixStream {
    let peer = listener.accept().unwrap().0;
    peer.set_read_timeout(Some(TIMEOUT)).unwrap();
    peer.set_write_timeout(Some(TIMEOUT)).unwrap();
    peer
}

#[test]
fn frames_pass_both_ways_in_any_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peer");
    let listener = UnixListener::bind(&path).unwrap();
    let bus = bus(1);
    let mut a = Net::new(&bus, "a", config("connect", &path), Shape::default());
    a.add_status_page();
    let mut peer = accept(&listener);
    a.status("the link", |w| w[word::LINK] == 1);
    for (n, len) in [60, 1514, 14, 999].into_iter().enumerate() {
        a.send_with(0, &[0; 12], &frame(PEER, A, n as u64, len), 1 + n);
        assert_eq!(read_frame(&mut peer), frame(PEER, A, n as u64, len));
    }
    let mut bytes = Vec::new();
    for n in 0..20 {
        let frame = frame(A, PEER, n, 60 + n as usize * 70);
        bytes.extend((frame.len() as u32).to_be_bytes());
        bytes.extend(frame);
    }
    for piece in bytes.chunks(7) {
        peer.write_all(piece).unwrap();
    }
    for n in 0..20 {
        assert_eq!(a.recv(0), frame(A, PEER, n, 60 + n as usize * 70));
    }
}

#[test]
fn neither_side_loses_frames_to_a_slow_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peer");
    let listener = UnixListener::bind(&path).unwrap();
    let bus = bus(1);
    let shape = Shape { entries: 16, ..Shape::default() };
    let mut a = Net::new(&bus, "a", config("connect", &path), shape);
    let mut peer = accept(&listener);
    a.interrupts
        .wait("the link", || (a.endpoint.inspect()["device"]["link"] == true).then_some(()));
    // These are more bytes than all buffers on the way hold, so each side must wait for the other.
    let count = 3000;
    let mut writer = peer.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        for n in 0..count {
            write_frame(&mut writer, &frame(A, PEER, n, 1000));
        }
    });
    for n in 0..count {
        let sent = a.submit(0, &[0; 12], &frame(PEER, A, n, 1400), 1);
        a.kick_tx(0);
        if !sent {
            // The sender waits, because the peer reads nothing. Frames from the peer arrive
            // nevertheless.
            break;
        }
    }
    for n in 0..count {
        assert_eq!(a.recv(0), frame(A, PEER, n, 1000));
    }
    writing.join().unwrap();
    let reading = std::thread::spawn(move || {
        for n in 0..count {
            assert_eq!(read_frame(&mut peer), frame(PEER, A, n, 1400));
        }
    });
    let sent_before = a.sent(0);
    for n in sent_before..count {
        a.send(0, &frame(PEER, A, n, 1400));
    }
    reading.join().unwrap();
    assert_eq!(a.counter("/pairs/0/tx/drops/no_link"), 0);
}

/// Before Linux 6.16 a peer's descriptors cannot be refused, and their close can wait for the peer.
#[test]
fn descriptors_of_a_peer_keep_no_worker_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bus");
    let bus = bus(1);
    let mut a = Net::new(&bus, "a", config("listen", &path), Shape::default());
    a.add_status_page();
    let lingering: Vec<_> = (0..3)
        .map(|round| {
            let mut peer = UnixStream::connect(&path).unwrap();
            peer.set_read_timeout(Some(TIMEOUT)).unwrap();
            a.status("the link", |w| w[word::LINK] == 1);
            write_frame(&mut peer, &frame(A, PEER, round, 100));
            assert_eq!(a.recv(0), frame(A, PEER, round, 100));
            let waits = vbus_test_driver::send_lingering(&peer, &[0]);
            assert_eq!(peer.read(&mut [0; 8]).unwrap(), 0, "the device hangs up");
            a.status("no link", |w| w[word::LINK] == 0);
            waits
        })
        .collect();
    // One that nobody reads before the driver and the device go.
    let mut peer = UnixStream::connect(&path).unwrap();
    a.status("the link", |w| w[word::LINK] == 1);
    let more = [&mut peer, &mut UnixStream::connect(&path).unwrap()]
        .map(|socket| vbus_test_driver::send_lingering(socket, &[0]));
    drop(a);
    drop(bus);
    drop((lingering, more));
}

#[test]
fn a_peer_that_goes_is_replaced_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bus");
    let bus = bus(1);
    let mut a = Net::new(&bus, "a", config("listen", &path), Shape::default());
    a.add_status_page();
    for round in 0..3 {
        a.status("no link", |w| w[word::LINK] == 0);
        let mut peer = UnixStream::connect(&path).unwrap();
        peer.set_read_timeout(Some(TIMEOUT)).unwrap();
        a.status("the link", |w| w[word::LINK] == 1);
        write_frame(&mut peer, &frame(A, PEER, round, 100));
        assert_eq!(a.recv(0), frame(A, PEER, round, 100));
        a.send(0, &frame(PEER, A, round, 100));
        assert_eq!(read_frame(&mut peer), frame(PEER, A, round, 100));
        if round == 1 {
            // No frame has this length: the peer is out of step.
            peer.write_all(&u32::MAX.to_be_bytes()).unwrap();
            assert_eq!(peer.read(&mut [0; 8]).unwrap(), 0, "the device hangs up");
        } else {
            // The driver armed before the counts of these frames came, so the next urgent update
            // must interrupt it.
            a.status("the counts", |w| w[word::TX_FRAMES] == round + 1);
            let interrupts = || a.endpoint.counters().interrupts.get();
            let before = interrupts();
            drop(peer);
            a.interrupts.wait("the link's interrupt", || (interrupts() > before).then_some(()));
        }
    }
    a.status("no link", |w| w[word::LINK] == 0);
    a.send(0, &frame(PEER, A, 9, 100));
    a.status("the drop", |w| w[word::TX_DROPS] == 1);
    drop(a);
    bus.remove("a").unwrap();
    assert!(!path.exists());
}

#[test]
fn frames_that_are_too_long_or_for_others_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bus");
    let bus = bus(1);
    let mut a = Net::new(&bus, "a", config("listen", &path), Shape::default());
    let mut peer = UnixStream::connect(&path).unwrap();
    write_frame(&mut peer, &frame(PEER, PEER, 1, 100));
    write_frame(&mut peer, &frame(A, PEER, 2, 69_000));
    write_frame(&mut peer, &[0; 5]);
    write_frame(&mut peer, &frame(A, PEER, 3, 100));
    assert_eq!(a.recv(0), frame(A, PEER, 3, 100));
    assert_eq!(a.counter("/pairs/0/rx/drops/too_long"), 1);
    assert_eq!(a.counter("/pairs/0/rx/drops/bad_frame"), 1);
}

#[test]
fn offloads_are_done_before_the_stream() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peer");
    let listener = UnixListener::bind(&path).unwrap();
    let bus = bus(1);
    let mut settings = config("connect", &path);
    settings["csum"] = json!(true);
    settings["tso"] = json!(true);
    settings["uso"] = json!(true);
    let features = F_TX | F_RX;
    let mut a = Net::new(&bus, "a", settings, Shape { features, ..Shape::default() });
    let mut peer = accept(&listener);
    a.interrupts
        .wait("the link", || (a.endpoint.inspect()["device"]["link"] == true).then_some(()));
    for (protocol, bytes) in [(6, 20), (17, 8)] {
        let (header, frame) = large(protocol, 1448, 60_000);
        a.send_with(0, &header, &frame, 2);
        let mut got = Vec::new();
        while got.len() < 60_000 {
            got.extend_from_slice(payload(&read_frame(&mut peer), protocol));
        }
        assert!(got == frame[34 + bytes..]);
    }
}

/// Starts a `passt` that serves at `path`. The error says why there is none.
fn passt(path: &Path) -> Result<Child, String> {
    let mut child = Command::new("passt")
        .args(["--foreground", "--socket"])
        .arg(path)
        .args([
            "-a",
            "10.77.0.2",
            "-n",
            "24",
            "-g",
            "10.77.0.1",
            "--no-dhcpv6",
            "--no-ndp",
            "--ipv4-only",
            "--runas",
            "0:0",
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("passt cannot be started: {error}"))?;
    let begin = Instant::now();
    while !path.exists() {
        if let Some(status) = child.try_wait().map_err(|e| e.to_string())? {
            return Err(format!("passt ended with {status}"));
        }
        if begin.elapsed() > TIMEOUT {
            let _ = child.kill();
            return Err("passt made no socket".into());
        }
        std::thread::yield_now();
    }
    Ok(child)
}

#[test]
fn a_datagram_passes_through_passt_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("passt");
    let mut child = match passt(&path) {
        Ok(child) => child,
        Err(why) => {
            eprintln!("skipped: {why}");
            return;
        }
    };
    let bus = bus(1);
    let mut a = Net::new(&bus, "a", config("connect", &path), Shape::default());
    a.interrupts
        .wait("the link", || (a.endpoint.inspect()["device"]["link"] == true).then_some(()));
    let mut request = [
        &[0xff; 6][..],
        &A,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &A,
        &[10, 77, 0, 2],
        &[0; 6],
        &[10, 77, 0, 1],
    ]
    .concat();
    request.resize(60, 0);
    a.send(0, &request);
    let answer = loop {
        let got = a.recv(0);
        if got[12..14] == [8, 6] {
            break got;
        }
    };
    assert_eq!(answer[20..22], [0, 2], "a reply");
    assert_eq!(answer[28..32], [10, 77, 0, 1], "from the gateway");
    // For passt's guests, the gateway is this machine.
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    let gateway: [u8; 6] = answer[22..28].try_into().unwrap();
    let data = frame(A, PEER, 1, 700);
    a.send(0, &datagram(gateway, socket.local_addr().unwrap().port(), &data));
    let mut buffer = [0; 2000];
    let (len, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!(buffer[..len], data);
    socket.send_to(&data, from).unwrap();
    let back = loop {
        let got = a.recv(0);
        if got[12..14] == [8, 0] && got[23] == 17 {
            break got;
        }
    };
    // Over IPv4 a datagram needs no checksum, and passt makes none.
    assert_eq!(back[42..][..data.len()], data);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A UDP datagram from 10.77.0.2 to the gateway, without a checksum of its own.
fn datagram(gateway: [u8; 6], port: u16, data: &[u8]) -> Vec<u8> {
    let udp = 8 + data.len() as u16;
    let mut ip = [
        &[0x45, 0][..],
        &(20 + udp).to_be_bytes(),
        &[0, 1, 0, 0, 64, 17, 0, 0, 10, 77, 0, 2, 10, 77, 0, 1],
    ]
    .concat();
    let sum =
        ip.chunks(2).fold(0, |sum, pair| sum + (u32::from(pair[0]) << 8 | u32::from(pair[1])));
    ip[10..12].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
    let ports = [5555_u16.to_be_bytes(), port.to_be_bytes(), udp.to_be_bytes(), [0, 0]].concat();
    [&gateway[..], &A, &[8, 0], &ip, &ports, data].concat()
}
