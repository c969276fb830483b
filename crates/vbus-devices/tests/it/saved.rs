// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that are saved and go on in a fresh device, on another bus, with the same memory.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use vbus_core::shm::abi::pic::{CALL_ROUTE, CALL_UNROUTE, NAME_OFFSET, ROUTE_BYTES};
use vbus_core::shm::abi::venet::{self as abi, status_page as word};
use vbus_core::shm::pic;
use vbus_core::shm::signal::end;
use vbus_core::shm::state::{Layout, Reader, SIGNAL_OFFSET, Writer};
use vbus_core::state::Document;
use vbus_core::{Bus, ConnectionState, DeviceState, Endpoint, ErrorCode, RegionRequest};

use vbus_net::{Direct, HandedOver, Opener};
use vbus_test_driver::Random;

use crate::driver::{Interrupts, Memory, Net, Shape, TIMEOUT, add, bus, call, frame, open};
use crate::offloads::large;

/// Saves the device behind `endpoint`, which stands still from then on.
fn save(endpoint: &Endpoint) -> DeviceState {
    endpoint.quiesce().unwrap();
    let state = endpoint.save().unwrap();
    let text = state.to_text().unwrap();
    let read = DeviceState::from_text(&text).unwrap();
    assert_eq!(read, state);
    read
}

/// A fresh device on a bus of its own.
fn fresh(class: &str, config: &Value) -> (Bus, Arc<Endpoint>, Arc<Interrupts>) {
    let bus = bus(1);
    let endpoint = bus.create("d", class, config).unwrap();
    let interrupts = Arc::new(Interrupts::default());
    endpoint.set_interrupt_sink(interrupts.clone());
    (bus, endpoint, interrupts)
}

fn control(endpoint: &Endpoint, request: Value) -> Value {
    let mut answer = Value::Null;
    let mut reply = |value: Value| {
        answer = value;
        true
    };
    endpoint.device().control(&request, &mut reply).unwrap();
    answer
}

#[test]
fn state_pages_go_on_in_another_device() {
    let config = json!({ "pages": [
        { "name": "setpoint", "bytes": 16, "owner": "device" },
        { "name": "load", "bytes": 8, "owner": "driver" },
    ] });
    let (_bus, first, _) = fresh("state", &config);
    let mut memory = Memory::new(&first, 1 << 20);
    open(&first, &memory, 0).unwrap();
    let mut page = |id, bytes| {
        let layout = Layout::new(bytes, 4).unwrap();
        let addr = memory.alloc(layout.bytes());
        let window = memory.window(addr, layout.bytes());
        layout.format(&window, 0).unwrap();
        add(&first, id, addr, layout.bytes(), SIGNAL_OFFSET).unwrap();
        window
    };
    let mut reader = Reader::attach(page(0, 16), end::Driver).unwrap();
    let mut writer = Writer::attach(page(1, 8), end::Driver).unwrap();
    let set = |to: &Endpoint, text| {
        control(to, json!({ "op": "set", "page": "setpoint", "text": text }))["version"].clone()
    };
    let get = |of: &Endpoint| control(of, json!({ "op": "get", "page": "load" }));
    set(&first, "warm");
    let _ = writer.write(b"busy");
    assert_eq!(get(&first)["text"], "busy");

    let state = save(&first);
    let (_other, second, interrupts) = fresh("state", &config);
    memory.share(&second);
    second.quiesce().unwrap();
    second.restore(&state).unwrap();
    second.resume();
    drop(first);
    assert_eq!(second.state(), ConnectionState::Open);
    assert_eq!(
        (get(&second)["version"].clone(), get(&second)["text"].clone()),
        (json!(1), json!("busy"))
    );
    let _ = writer.write(b"idle");
    assert_eq!(get(&second)["version"], 2);
    // The reader's end knows of nothing.
    let _ = reader.arm_newer(reader.version());
    assert_eq!(set(&second, "hot"), 2);
    let mut value = [0; 16];
    interrupts.wait("the value", || (reader.read(&mut value) == Ok(2)).then_some(()));
    assert_eq!(&value[..4], b"hot\0");
    second.close();
    assert_eq!(get(&second)["text"], "idle");
}

/// A device whose state nobody can save says so by name, and goes on.
#[test]
fn a_device_that_is_not_saved_goes_on() {
    let (_bus, endpoint, _) = fresh(
        "state",
        &json!({ "pages": [
        { "name": "a", "bytes": 8, "owner": "device" },
    ] }),
    );
    let memory = Memory::new(&endpoint, 1 << 20);
    let refused = endpoint.save().unwrap_err();
    let text = "device \"d\" of class \"state\" cannot be saved: it is not quiesced";
    assert_eq!(refused.to_string(), text);
    endpoint.quiesce().unwrap();
    assert_eq!(open(&endpoint, &memory, 0), Err(ErrorCode::FAILED));
    endpoint.resume();
    open(&endpoint, &memory, 0).unwrap();
    assert_eq!(control(&endpoint, json!({ "op": "set", "page": "a", "text": "x" }))["version"], 1);
}

const A: [u8; 6] = [2, 0, 0, 0, 0, 1];
const B: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Two drivers on a switch. Their devices may move to another bus at any time.
struct World {
    bus: Bus,
    a: Net,
    b: Net,
    configs: [Value; 2],
    /// Frames that `b` will get, and that it has not taken.
    coming: u64,
    random: Random,
    /// All that the drivers have seen.
    seen: Vec<Vec<u8>>,
}

impl World {
    fn new(seed: u64) -> World {
        let configs = [1, 2].map(|n| {
            let mac = format!("02:00:00:00:00:{n:02x}");
            json!({ "mac": mac, "switch": "s", "backpressure-ms": 3_600_000, "learn": n == 1 })
        });
        let bus = bus(2);
        let features = abi::F_TX | abi::F_RX | abi::F_MAC | abi::F_VLAN | abi::F_COALESCE;
        let shape = Shape { features, ..Shape::default() };
        let small = Shape { entries: 8, buffer_bytes: 512, ..shape };
        let mut a = Net::new(&bus, "a", configs[0].clone(), shape);
        let mut b = Net::new(&bus, "b", configs[1].clone(), small);
        a.add_status_page();
        b.add_status_page();
        b.call(abi::CALL_SET_OFFLOADS, &0u64.to_le_bytes()).unwrap();
        World { bus, a, b, configs, coming: 0, random: Random(seed), seen: Vec::new() }
    }

    /// Saves both devices, and lets fresh ones on a fresh bus go on.
    fn renew(&mut self) {
        let bus = bus(2);
        for net in [&self.a, &self.b] {
            net.endpoint.quiesce().unwrap();
        }
        let (a, b) = (&self.a.endpoint, &self.b.endpoint);
        let states = [a, b].map(|endpoint| endpoint.save().unwrap());
        let nets = [&mut self.a, &mut self.b];
        for (net, (state, config)) in nets.into_iter().zip(states.iter().zip(&self.configs)) {
            let text = state.to_text().unwrap();
            let read = DeviceState::from_text(&text).unwrap();
            let endpoint = bus.create(net.endpoint.name(), "venet", config).unwrap();
            endpoint.set_interrupt_sink(net.interrupts.clone());
            net.memory.share(&endpoint);
            endpoint.quiesce().unwrap();
            endpoint.restore(&read).unwrap();
            net.endpoint = endpoint;
        }
        for (net, state) in [&self.a, &self.b].into_iter().zip(&states) {
            let again = net.endpoint.save().unwrap();
            assert_eq!(without_times(&again), without_times(state), "the state as it was restored");
        }
        for net in [&self.a, &self.b] {
            net.endpoint.resume();
        }
        self.bus = bus;
    }

    /// Saves one device, which then goes on itself.
    fn save_in_vain(&mut self) {
        let net = if self.random.below(2) == 0 { &self.a } else { &self.b };
        net.endpoint.quiesce().unwrap();
        net.endpoint.save().unwrap();
        net.endpoint.resume();
    }

    fn take(&mut self, frames: u64) {
        for _ in 0..frames.min(self.coming) {
            let got = self.b.recv_with(0);
            self.seen.push([&got.0[..], &got.1].concat());
            self.coming -= 1;
        }
    }

    fn step(&mut self) {
        let n = self.random.next();
        match self.random.below(12) {
            0..=3 if self.coming < 12 => {
                let to = if n % 5 == 0 { [0xff; 6] } else { B };
                let from = if n % 3 == 0 { [2, 0, 0, 0, 1, (n % 7) as u8] } else { A };
                let len = 60 + n % 1400;
                let parts = 1 + n as usize % 4;
                self.a.send_with(0, &[0; 12], &frame(to, from, n, len as usize), parts);
                self.coming += 1;
            }
            4 if self.coming < 12 => {
                let (size, payload) = (500 + n % 900, 100 + n % 6000);
                let (header, frame) = large(6, size as u16, payload as usize);
                self.a.send_with(0, &header, &frame, 1 + n as usize % 4);
                self.coming += payload.div_ceil(size);
            }
            5..=7 => self.take(1 + n % 8),
            8 => {
                // What changes the way of a frame comes when no frame is on its way.
                self.take(u64::MAX);
                self.call(n);
            }
            9 => {
                self.b.send(0, &frame(A, B, n, 60 + (n % 1000) as usize));
                let got = self.a.recv(0);
                self.seen.push(got);
            }
            _ => {}
        }
    }

    fn call(&mut self, n: u64) {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let (function, buffer): (u32, Vec<u8>) = match self.random.below(7) {
            0 => (abi::CALL_SET_OFFLOADS, [0, abi::F_RX_CSUM][n as usize % 2].to_le_bytes().into()),
            1 => (abi::CALL_SET_COALESCE, words(&[0, 0, n as u32 % 300, 3, 100, n as u32 % 4])),
            2 => (abi::CALL_FILTER, words(&[n as u32 % 8, 0])),
            3 => (abi::CALL_SET_VLANS, [words(&[1, 0]), vec![n as u8; 512]].concat()),
            4 => (abi::CALL_SET_VLANS, words(&[0, 0])),
            // An address of its own, that of the other one, and none at all.
            5 => (abi::CALL_SET_MAC, [B, B, A, [0; 6]][n as usize % 4].to_vec()),
            _ => (abi::CALL_START, Vec::new()),
        };
        let result = self.b.call(function, &buffer);
        self.seen.push(format!("{function} {buffer:?}: {result:?}").into_bytes());
        let up = n % 2 == 0;
        control(&self.b.endpoint, json!({ "op": "link", "up": up }));
        control(&self.b.endpoint, json!({ "op": "announce" }));
    }

    /// Takes all that is on its way. Returns all that the drivers have seen.
    fn end(mut self) -> Vec<Vec<u8>> {
        self.take(u64::MAX);
        assert_eq!((self.a.try_recv(0), self.b.try_recv(0)), (None, None));
        let announces = control(&self.b.endpoint, json!({ "op": "announce" }))["announces"].clone();
        let announces = announces.as_u64().unwrap();
        let sent = self.a.sent(0);
        self.a.status("all frames", |page| page[word::TX_FRAMES] == sent);
        let mut words = [0; abi::status_page::WORDS];
        let cell = std::cell::RefCell::new(&mut words);
        self.b.status("the last announcement", |page| {
            **cell.borrow_mut() = *page;
            page[word::ANNOUNCE] == announces
        });
        words[word::INCARNATION] = 0;
        self.seen.push(format!("{words:?}").into_bytes());
        self.seen
    }
}

/// A state without what passes by itself.
fn without_times(state: &DeviceState) -> String {
    let text = state.to_text().unwrap();
    let mut value: Value = serde_json::from_str(&text).unwrap();
    let state = &mut value["state"];
    for name in ["wakeups", "polls", "polls_empty", "moves", "stalls", "interrupts"] {
        state["counters"][name] = json!(0);
    }
    for plug in ["/connection/open/state/pairs/plug", "/device/inside/plug"] {
        let learned = state.pointer_mut(plug).map(|plug| &mut plug["learned"]);
        for learned in learned.and_then(Value::as_array_mut).into_iter().flatten() {
            learned["age_ms"] = json!(0);
        }
    }
    value.to_string()
}

/// What the drivers of two devices see does not depend on whether the devices are saved, and go on
/// in fresh ones, at any step.
#[test]
fn drivers_do_not_see_that_their_venet_devices_are_saved() {
    for seed in 0..24 {
        let (mut plain, mut saved) = (World::new(seed), World::new(seed));
        let mut when = Random(!seed);
        for _ in 0..60 {
            plain.step();
            saved.step();
            match when.below(4) {
                0 => saved.renew(),
                1 => {
                    // Both worlds use as many random numbers.
                    plain.random.next();
                    saved.save_in_vain();
                }
                _ => {}
            }
        }
        saved.renew();
        let (plain, saved) = (plain.end(), saved.end());
        assert_eq!(plain.len(), saved.len(), "seed {seed}");
        for (n, (plain, saved)) in plain.iter().zip(&saved).enumerate() {
            let show = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            assert!(plain == saved, "seed {seed}, {n}: {} and {}", show(plain), show(saved));
        }
    }
}

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

/// Whatever a forged state says, it is refused, or the device that goes on from it is safe: it
/// serves its driver, ends the connection with an error code of its own, and can be closed.
fn forged_states_do_no_harm(class: &str, config: &Value, state: &DeviceState, memory: &Memory) {
    let bus = bus(1);
    let original: Value = serde_json::from_str(&state.to_text().unwrap()).unwrap();
    let (mut refused, mut taken) = (0, 0);
    for seed in 0..1500 {
        let mut random = Random(seed);
        let mut forged = original.clone();
        for _ in 0..=random.below(3) {
            vbus_test_driver::mutate(&mut forged["state"], &mut random);
        }
        let Ok(state) = DeviceState::from_text(&forged.to_string()) else { continue };
        let endpoint = bus.create_quiesced("d", class, config).unwrap();
        memory.share(&endpoint);
        match endpoint.restore(&state) {
            Err(error) => {
                assert!(!error.why.contains("panicked"), "seed {seed}: {error}");
                assert_ne!(endpoint.state(), ConnectionState::Open, "seed {seed}");
                refused += 1;
            }
            Ok(()) => taken += 1,
        }
        endpoint.resume();
        // The tasks get their turn, and find out what they can.
        for handle in 0..8 {
            endpoint.ring(handle);
        }
        endpoint.inspect();
        endpoint.quiesce().unwrap();
        let broken = ConnectionState::Broken(ErrorCode::FAILED);
        let was = matches!(state.to_text(), Ok(text) if text.contains("\"broken\":{\"code\""));
        assert!(was || endpoint.state() != broken, "seed {seed}: a task panicked");
        let _ = endpoint.save();
        endpoint.resume();
        endpoint.close();
        bus.remove("d").unwrap();
    }
    assert!(refused > 100 && taken > 100, "{class}: {refused} refused, {taken} taken");
}

#[test]
fn forged_states_of_venet_do_no_harm() {
    let config = json!({ "mac": "02:00:00:00:00:01", "queue-pairs": 2, "learn": true });
    let bus = bus(1);
    let features = abi::F_TX | abi::F_RX | abi::F_MAC | abi::F_VLAN | abi::F_COALESCE | abi::F_RSS;
    let shape = Shape { pairs: 2, entries: 16, features, ..Shape::default() };
    let mut net = Net::new(&bus, "d", config.clone(), shape);
    net.add_status_page();
    net.add_counters_page(2);
    let words =
        |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    net.call(abi::CALL_SET_VLANS, &[words(&[1, 0]), vec![0x5a; 512]].concat()).unwrap();
    let rss = [&words(&[3])[..], &[2, 0, 0, 0], &[7; 40], &[1, 0, 0, 0]].concat();
    net.call(abi::CALL_SET_RSS, &rss).unwrap();
    net.call(abi::CALL_FILTER, &[&words(&[2, 1])[..], &[2, 0, 0, 0, 0, 9]].concat()).unwrap();
    net.submit(0, &[0; 12], &frame(B, A, 1, 60), 3);
    net.kick_tx(0);
    forged_states_do_no_harm("venet", &config, &save(&net.endpoint), &net.memory);
}

#[test]
fn forged_states_of_state_pages_do_no_harm() {
    let config = json!({ "pages": [
        { "name": "setpoint", "bytes": 16, "owner": "device", "initial": "x" },
        { "name": "load", "bytes": 8, "owner": "driver" },
    ] });
    let (_bus, endpoint, _) = fresh("state", &config);
    let mut memory = Memory::new(&endpoint, 1 << 20);
    open(&endpoint, &memory, 0).unwrap();
    for (id, bytes) in [(0, 16), (1, 8)] {
        let layout = Layout::new(bytes, 4).unwrap();
        let addr = memory.alloc(layout.bytes());
        layout.format(&memory.window(addr, layout.bytes()), 0).unwrap();
        add(&endpoint, id, addr, layout.bytes(), SIGNAL_OFFSET).unwrap();
    }
    forged_states_do_no_harm("state", &config, &save(&endpoint), &memory);
}

/// Takes the most urgent line, and ends it.
fn take<M: vbus_core::shm::Memory>(lines: &mut pic::DriverEnd<M>) -> Option<u16> {
    lines.take().inspect(|line| lines.end(*line))
}

/// An interrupt controller goes on with its routes, whether the devices that it serves are restored
/// before it or after it. The interrupts of a controller that is quiesced wait.
#[test]
fn a_pic_goes_on_with_its_routes() {
    let pages = json!({ "pages": [{ "name": "a", "bytes": 8, "owner": "device" }] });
    let make = |bus: &Bus| {
        let source = bus.create_quiesced("source", "state", &pages).unwrap();
        source.set_router("pic");
        [source, bus.create_quiesced("pic", "pic", &json!({})).unwrap()]
    };
    let mut bus_now = bus(1);
    let [mut source, mut pic] = make(&bus_now);
    [&source, &pic].iter().for_each(|endpoint| endpoint.resume());
    let mut memory = Memory::new(&source, 1 << 20);
    memory.share(&pic);
    [&source, &pic].iter().for_each(|endpoint| open(endpoint, &memory, 0).unwrap());
    let layout = Layout::new(8, 4).unwrap();
    let addr = memory.alloc(layout.bytes());
    let window = memory.window(addr, layout.bytes());
    layout.format(&window, 0).unwrap();
    add(&source, 0, addr, layout.bytes(), SIGNAL_OFFSET).unwrap();
    let mut reader = Reader::attach(window, end::Driver).unwrap();
    let addr = memory.alloc(pic::PAGE_BYTES);
    let window = memory.window(addr, pic::PAGE_BYTES);
    let mut lines = pic::DriverEnd::create(window, 32, pic::Nesting::Flat).unwrap();
    pic.region_add(RegionRequest::new(0, addr, pic::PAGE_BYTES as u64)).unwrap();
    let mut route = [0; ROUTE_BYTES];
    route[2] = 5;
    route[NAME_OFFSET..][..6].copy_from_slice(b"source");
    call(&pic, &memory, CALL_ROUTE, &route).unwrap();
    assert_eq!(
        (take(&mut lines), take(&mut lines)),
        (Some(5), None),
        "a route begins with an interrupt"
    );
    let set = |source: &Endpoint, reader: &mut Reader<_, _>| {
        let _ = reader.arm_newer(reader.version());
        control(source, json!({ "op": "set", "page": "a", "text": "x" }));
    };
    for pic_first in [false, true] {
        set(&source, &mut reader);
        assert_eq!((take(&mut lines), take(&mut lines)), (Some(5), None));
        pic.quiesce().unwrap();
        set(&source, &mut reader);
        assert_eq!(take(&mut lines), None, "the page is left alone");
        let (of_source, of_pic) = (save(&source), save(&pic));
        let next = bus(1);
        let [other_source, other_pic] = make(&next);
        [&other_source, &other_pic].iter().for_each(|endpoint| memory.share(endpoint));
        if pic_first {
            other_pic.restore(&of_pic).unwrap();
        }
        other_source.restore(&of_source).unwrap();
        if !pic_first {
            other_pic.restore(&of_pic).unwrap();
        }
        assert_eq!(take(&mut lines), None, "nothing moves before it goes on");
        [&other_source, &other_pic].iter().for_each(|endpoint| endpoint.resume());
        assert_eq!(
            (take(&mut lines), take(&mut lines)),
            (Some(5), None),
            "the interrupt that waited"
        );
        (source, pic, bus_now) = (other_source, other_pic, next);
    }
    assert_eq!(bus_now.devices().len(), 2);
    call(&pic, &memory, CALL_UNROUTE, &route).unwrap();
    set(&source, &mut reader);
    assert_eq!(take(&mut lines), None);
}
