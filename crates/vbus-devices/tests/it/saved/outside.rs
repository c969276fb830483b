// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices go on with what is outside of the bus: their sockets, interfaces and files.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tempfile::TempDir;
use vbus_core::state::Document;
use vbus_core::{Bus, DeviceState};
use vbus_net::{Direct, HandedOver, Opener};
use vbus_test_driver::Random;
use vbus_test_driver::saved::{World, content, document, forged_devices, same_when_saved, save};

use super::venet::{A, B};
use super::without_times;
use crate::driver::{Net, Shape, TIMEOUT, bus, frame};
use crate::offloads::payload;
use crate::tap;

/// Hands the descriptors of former devices over, by the device's name.
#[derive(Default)]
struct Handing(Mutex<HashMap<String, Vec<(String, OwnedFd)>>>);

impl Opener for Handing {
    fn create(&self, path: &Path) -> std::io::Result<File> {
        Direct.create(path)
    }

    fn listen(&self, path: &Path) -> std::io::Result<OwnedFd> {
        Direct.listen(path)
    }

    fn remove(&self, path: &Path) {
        Direct.remove(path);
    }

    fn connect(&self, path: &Path) -> std::io::Result<OwnedFd> {
        Direct.connect(path)
    }

    fn tap(
        &self,
        name: &str,
        queues: u16,
        mtu: u16,
    ) -> std::io::Result<(String, Vec<vbus_tap::Queue>)> {
        Direct.tap(name, queues, mtu)
    }

    fn vhost(&self, pairs: u16) -> std::io::Result<Vec<vbus_tap::Vhost>> {
        Direct.vhost(pairs)
    }

    fn handed_over(&self, device: &str) -> HandedOver {
        HandedOver::new(self.0.lock().unwrap().remove(device).unwrap_or_default())
    }
}

/// Lets fresh devices on a fresh bus go on for those of `bus`: `devices` are names, classes and
/// settings, and `net` is the driver of one of them.
fn hand_over(bus: &Bus, devices: &[(&str, &str, Value)], net: &mut Net) -> Bus {
    let opener = Arc::new(Handing::default());
    let endpoints = devices.iter().map(|(name, ..)| bus.get(name).unwrap());
    let endpoints: Vec<_> = endpoints.collect();
    for endpoint in &endpoints {
        endpoint.quiesce().unwrap();
        let fds = endpoint.device().descriptors().unwrap();
        opener.0.lock().unwrap().insert(endpoint.name().into(), fds);
    }
    let next = vbus_test_driver::bus(2, vbus_devices::classes_opening(opener));
    let mut all = Vec::new();
    for (endpoint, (name, class, config)) in endpoints.iter().zip(devices) {
        let settled = endpoint.device().settled(config);
        let fresh = next.create_quiesced(name, class, &settled).unwrap();
        assert!(fresh.is_quiesced());
        if *name == net.endpoint.name() {
            fresh.set_interrupt_sink(net.interrupts.clone());
            net.memory.share(&fresh);
            net.endpoint = fresh.clone();
        }
        let text = endpoint.save().unwrap().to_text().unwrap();
        fresh.restore(&DeviceState::from_text(&text).unwrap()).unwrap();
        assert_eq!(without_times(&fresh.save().unwrap()), without_times(&endpoint.save().unwrap()));
        all.push(fresh);
    }
    all.iter().for_each(|endpoint| endpoint.resume());
    next
}

fn framed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

/// Sends frames from the driver `net` to a peer that does not read, and half a frame back. Then
/// other devices go on, and the peer reads all.
fn goes_on_with_its_peer(
    mut bus: Bus,
    devices: &[(&str, &str, Value)],
    mut net: Net,
    mut peer: UnixStream,
) {
    peer.set_read_timeout(Some(TIMEOUT)).unwrap();
    let first = bus.get(devices[0].0).unwrap();
    net.interrupts
        .clone()
        .wait("the link", || (first.inspect()["device"]["link"] == true).then_some(()));
    let to_driver = framed(&frame(A, B, 77, 1000));
    peer.write_all(&to_driver[..300]).unwrap();
    let mut sent = Vec::new();
    for n in 0..400 {
        let bytes = frame(B, A, n, 1400);
        // The last ones wait in the ring, or on their way.
        if !net.submit(0, &[0; 12], &bytes, 1) {
            break;
        }
        net.kick_tx(0);
        sent.extend(framed(&bytes));
    }
    for _ in 0..2 {
        bus = hand_over(&bus, devices, &mut net);
    }
    peer.write_all(&to_driver[300..]).unwrap();
    let mut got = vec![0; sent.len()];
    peer.read_exact(&mut got).unwrap();
    assert!(got == sent, "frames were lost, doubled or changed");
    assert_eq!(net.recv(0), frame(A, B, 77, 1000));
    net.send(0, &frame(B, A, 1, 60));
    let mut got = vec![0; 64];
    peer.read_exact(&mut got).unwrap();
    assert_eq!(got, framed(&frame(B, A, 1, 60)));
}

/// The back end's socket, what waits for it and what came in part stay with the driver.
#[test]
fn a_stream_goes_on_with_its_peer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peer");
    let listener = UnixListener::bind(&path).unwrap();
    let config = json!({ "mac": "02:00:00:00:00:01", "backend": "stream", "connect": path });
    let bus = bus(2);
    let net = Net::new(&bus, "n", config.clone(), Shape::default());
    let (peer, _) = listener.accept().unwrap();
    goes_on_with_its_peer(bus, &[("n", "venet", config)], net, peer);
}

/// So does the uplink of a switch, with the frames that it has taken from devices.
#[test]
fn an_uplink_goes_on_with_its_peer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peer");
    let bus = bus(2);
    let up = json!({ "switch": "s", "backend": "stream", "listen": path });
    bus.create("up", "uplink", &up).unwrap();
    let config = json!({ "mac": "02:00:00:00:00:01", "switch": "s", "backpressure-ms": 3_600_000 });
    let net = Net::new(&bus, "n", config.clone(), Shape::default());
    let peer = UnixStream::connect(&path).unwrap();
    let up = ("up", "uplink", up);
    goes_on_with_its_peer(bus, &[up, ("n", "venet", config)], net, peer);
}

/// The queues of a TAP interface stay open, and the interface as it is: what it keeps for the
/// driver arrives, in order, and its carrier does not go.
#[test]
fn a_tap_interface_goes_on() {
    let mut bus = bus(2);
    let shape = Shape { entries: 16, ..Shape::default() };
    let Some((mut net, name)) = tap::tap(&bus, shape, &json!({})) else { return };
    let config = json!({ "mac": "02:00:00:00:00:01", "backend": "tap", "queue-pairs": 1 });
    let devices = [("a", "venet", config)];
    let socket = tap::address(&name, 90);
    let read = |file: &str| std::fs::read_to_string(format!("/sys/class/net/{name}/{file}"));
    let changes = read("carrier_changes").unwrap();
    let (mut to_driver, mut expected) = (0_u64, 0_u64);
    for round in 0..3_u64 {
        // More than the driver has buffers for.
        for _ in 0..60 {
            let to = (Ipv4Addr::new(10, 78, 90, 2), 5555);
            socket.send_to(&to_driver.to_le_bytes(), to).unwrap();
            to_driver += 1;
        }
        for n in 0..20 {
            let data = (100 * round + n).to_le_bytes();
            net.send(0, &tap::datagram(&name, 90, &data));
        }
        bus = hand_over(&bus, &devices, &mut net);
        for n in 0..20 {
            let mut data = [0; 64];
            assert_eq!(socket.recv(&mut data).unwrap(), 8);
            assert_eq!(data[..8], (100 * round + n).to_le_bytes());
        }
        while expected < to_driver {
            let got = net.recv(0);
            // The machine may send multicast frames of its own.
            if got[..6] == tap::A && got[23] == tap::UDP {
                assert_eq!(payload(&got, tap::UDP)[..8], expected.to_le_bytes(), "in order");
                expected += 1;
            }
        }
    }
    assert_eq!(read("carrier_changes").unwrap(), changes, "its carrier went");
    assert_eq!(bus.devices().len(), 1);
}

/// A capture goes on in the same file, whatever has its path by now.
#[test]
fn a_capture_goes_on_in_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("all.pcap");
    let mut bus = bus(2);
    let config = json!({ "mac": "02:00:00:00:00:01", "switch": "s", "pcap": path });
    let other = json!({ "mac": "02:00:00:00:00:02", "switch": "s" });
    let mut net = Net::new(&bus, "n", config.clone(), Shape::default());
    bus.create("o", "venet", &other).unwrap();
    let devices = [("n", "venet", config), ("o", "venet", other)];
    let elsewhere = folder.path().join("moved.pcap");
    std::fs::rename(&path, &elsewhere).unwrap();
    let frames: Vec<_> = (0..12).map(|n| frame(B, A, n, 100 + n as usize)).collect();
    for frames in frames.chunks(4) {
        for frame in frames {
            net.send(0, frame);
        }
        let sent = net.sent(0);
        let counted = || net.counter("/pcap/records") == sent;
        net.interrupts.clone().wait("the records", || counted().then_some(()));
        bus = hand_over(&bus, &devices, &mut net);
    }
    drop(bus.remove("n"));
    drop((net, bus));
    assert!(!path.exists(), "a file was opened anew");
    let bytes = std::fs::read(&elsewhere).unwrap();
    let mut at = 0;
    for frame in &frames {
        let place = bytes[at..].windows(frame.len()).position(|bytes| bytes == &frame[..]);
        at += place.expect("a frame is missing, or out of order") + frame.len();
    }
    assert_eq!(bytes.windows(14).filter(|bytes| *bytes == &frames[0][..14]).count(), 12);
}

/// A switch with an uplink and a driver. The peer of the uplink is this test.
struct Outside {
    bus: Bus,
    devices: Vec<(&'static str, &'static str, Value)>,
    net: Net,
    peer: UnixStream,
    /// What the peer has not sent of its frames.
    rest: Vec<u8>,
    /// Frames, each with its length, that come to the driver and to the peer.
    to_driver: VecDeque<usize>,
    to_peer: VecDeque<usize>,
    random: Random,
    seen: Vec<Vec<u8>>,
    _folder: TempDir,
}

/// Frames on their way in one direction. So many always find room in the peer's socket.
const COMING_MAX: usize = 24;

impl Outside {
    fn new(seed: u64) -> Outside {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("peer");
        let bus = bus(2);
        let up = json!({ "switch": "s", "backend": "stream", "listen": path });
        bus.create("up", "uplink", &up).unwrap();
        let mac = "02:00:00:00:00:01";
        let config = json!({ "mac": mac, "switch": "s", "backpressure-ms": 3_600_000 });
        // Few buffers: frames wait in the uplink.
        let shape = Shape { entries: 8, buffer_bytes: 512, ..Shape::default() };
        let net = Net::new(&bus, "n", config.clone(), shape);
        let peer = UnixStream::connect(&path).unwrap();
        peer.set_read_timeout(Some(TIMEOUT)).unwrap();
        let link = bus.get("up").unwrap();
        let is_up = || (link.inspect()["device"]["link"] == true).then_some(());
        net.interrupts.clone().wait("the link", is_up);
        Outside {
            bus,
            devices: vec![("up", "uplink", up), ("n", "venet", config)],
            net,
            peer,
            rest: Vec::new(),
            to_driver: VecDeque::new(),
            to_peer: VecDeque::new(),
            random: Random(seed),
            seen: Vec::new(),
            _folder: folder,
        }
    }

    /// The peer sends the rest of its frames, or a part of it.
    fn peer_sends(&mut self, bytes: usize) {
        let rest = self.rest.split_off(bytes.min(self.rest.len()));
        let part = std::mem::replace(&mut self.rest, rest);
        self.peer.write_all(&part).unwrap();
    }

    fn peer_reads(&mut self, frames: usize) {
        for _ in 0..frames.min(self.to_peer.len()) {
            let mut got = vec![0; 4 + self.to_peer.pop_front().unwrap()];
            self.peer.read_exact(&mut got).unwrap();
            self.seen.push(got);
        }
    }

    fn driver_reads(&mut self, frames: usize) {
        let frames = frames.min(self.to_driver.len());
        if frames != 0 {
            self.peer_sends(usize::MAX);
        }
        for _ in 0..frames {
            let len = self.to_driver.pop_front().unwrap();
            let got = self.net.recv(0);
            assert_eq!(got.len(), len, "another frame");
            self.seen.push(got);
        }
    }
}

impl World for Outside {
    fn step(&mut self) {
        let n = self.random.next();
        let len = 60 + (n % 1400) as usize;
        match self.random.below(10) {
            0..=2 if self.to_peer.len() < COMING_MAX => {
                let to = [B, [0xff; 6]][n as usize % 2];
                self.net.send_with(0, &[0; 12], &frame(to, A, n, len), 1 + n as usize % 3);
                self.to_peer.push_back(len);
            }
            3..=5 if self.to_driver.len() < COMING_MAX => {
                let to = [A, [0xff; 6]][n as usize % 2];
                self.rest.extend(framed(&frame(to, B, n, len)));
                self.to_driver.push_back(len);
            }
            6 => {
                let bytes = self.random.index(self.rest.len() + 1);
                self.peer_sends(bytes);
            }
            7 => self.peer_sends(usize::MAX),
            8 => self.peer_reads(1 + n as usize % 5),
            9 => self.driver_reads(1 + n as usize % 5),
            _ => {}
        }
    }

    fn renew(&mut self) {
        self.bus = hand_over(&self.bus, &self.devices, &mut self.net);
    }

    fn save_in_vain(&mut self, n: u64) {
        let endpoint = self.bus.get(self.devices[n as usize % 2].0).unwrap();
        save(&endpoint);
        endpoint.resume();
    }

    fn end(mut self) -> Vec<Vec<u8>> {
        self.driver_reads(usize::MAX);
        self.peer_reads(usize::MAX);
        assert_eq!(self.net.try_recv(0), None);
        let inspect = self.bus.get("up").unwrap().inspect();
        let drops = |way: &str| inspect["device"][way]["drops"].to_string();
        self.seen.push(["from-outside", "to-outside"].map(drops).concat().into());
        self.seen
    }
}

/// Neither the driver nor the peer sees it, wherever a frame is: in the ring, in the uplink, held
/// for a buffer, or half read from the socket.
#[test]
fn nobody_sees_that_an_uplink_is_saved() {
    same_when_saved(0..16, 80, Outside::new);
}

#[test]
fn forged_states_of_an_uplink_do_no_harm() {
    let mut outside = Outside::new(1);
    // More than the buffers of the driver take, and a part of one more.
    for n in 0..4 {
        outside.rest.extend(framed(&frame(A, B, n, 1400)));
    }
    let len = outside.rest.len() - 100;
    outside.peer_sends(len);
    let up = outside.bus.get("up").unwrap();
    let frames = || up.inspect()["device"]["from-outside"]["frames"].as_u64().unwrap();
    let interrupts = outside.net.interrupts.clone();
    interrupts.wait("full buffers", || (frames() == 2).then_some(()));
    // A frame to the outside waits too, and one that an interface has given.
    let mut state = content(&save(&up));
    let waits = hex::encode([&[0; 12][..], &frame(B, A, 9, 100)].concat());
    (state["device"]["frames"], state["device"]["held"]) = (json!([&waits, &waits]), json!(waits));
    let state = document(&state).unwrap();
    // The socket stays with the first one: the others listen at a path of their own.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("peer");
    let settings = json!({ "switch": "t", "backend": "stream", "listen": path });
    forged_devices(&bus(1), ("uplink", &settings), &state, None, 0..1500);
}
