// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Network cards on a switch.

use std::sync::Arc;

use serde_json::{Value, json};
use vbus_core::{Bus, Endpoint};
use vbus_net::{Direct, Opener, Switches};
use vbus_pci::{IrqIndex, Options, device_function};
use vbus_virtio::net::VirtioNetClass;

use crate::driver::{Driver, NEEDS_RESET, Queue, RING_RESET, Signal, VERSION_1, eventually, field};

/// Feature bits.
pub const CSUM: u64 = 1 << 0;
pub const GUEST_CSUM: u64 = 1 << 1;
pub const GUEST_OFFLOADS: u64 = 1 << 2;
const GUEST_TSO4: u64 = 1 << 7;
pub const HOST_TSO4: u64 = 1 << 11;
const MRG_RXBUF: u64 = 1 << 15;
pub const CTRL_VQ: u64 = 1 << 17;
pub const CTRL_RX: u64 = 1 << 18;
pub const CTRL_VLAN: u64 = 1 << 19;
pub const ANNOUNCE: u64 = 1 << 21;
const CTRL_RX_EXTRA: u64 = 1 << 20;
const MQ: u64 = 1 << 22;
pub const CTRL_MAC: u64 = 1 << 23;
pub const INDIRECT_DESC: u64 = 1 << 28;
const RING_PACKED: u64 = 1 << 34;
/// VQ_NOTF_COAL and NOTF_COAL.
pub const COALESCE: u64 = 3 << 52;
const HASH_REPORT: u64 = 1 << 57;
const RSS: u64 = 1 << 60;

pub const HEADER: usize = 12;
pub const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];

/// A bus with the class.
pub struct Lab {
    pub bus: Bus,
}

/// A card whose driver has started.
pub struct Card {
    pub driver: Driver,
    pub rx: Queue,
    pub tx: Queue,
    pub control: Option<Queue>,
    signal: Signal,
}

impl Lab {
    pub fn new() -> Lab {
        let opener: Arc<dyn Opener> = Arc::new(Direct);
        let class = VirtioNetClass::on(Switches::default(), opener);
        Lab { bus: vbus_test_driver::bus(2, vec![Box::new(class)]) }
    }

    pub fn endpoint(&self, number: usize, more: Value) -> Arc<Endpoint> {
        let mut settings = json!({ "mac": vbus_net::show_mac(MACS[number]) });
        settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.bus.create(&format!("net{number}"), "virtio-net", &settings).unwrap()
    }

    /// Card `number` with these settings, and a driver that accepts `features`.
    pub fn card(&self, number: usize, more: Value, features: u64) -> Card {
        let endpoint = self.endpoint(number, more);
        let function = device_function(endpoint.clone(), Options::default());
        let mut driver = Driver::new(endpoint, function);
        let signal = driver.connect(IrqIndex::Intx, 0);
        assert!(driver.agree(features | VERSION_1));
        let control = (features & CTRL_VQ != 0).then(|| {
            let pairs = if features & MQ != 0 { driver.config(8, 2) } else { 1 };
            driver.queue(u16::try_from(pairs * 2).unwrap(), 16)
        });
        let (rx, tx) = (driver.queue(0, 64), driver.queue(1, 64));
        driver.start();
        Card { driver, rx, tx, control, signal }
    }
}

impl Lab {
    /// Starts a driver anew, without a control queue. Returns its receive queue.
    pub fn start(&self, driver: &mut Driver) -> Queue {
        assert!(driver.agree(VERSION_1));
        let (rx, _tx) = (driver.queue(0, 64), driver.queue(1, 64));
        driver.start();
        rx
    }
}

impl Card {
    /// Gives the device a buffer of `len` bytes, in two parts if `split`. Returns where it is.
    pub fn post(&mut self, len: u32, split: bool) -> u64 {
        let memory = &mut self.driver.memory;
        let addr = memory.alloc(len as usize);
        let parts = match split {
            true => vec![(addr, 12, true), (addr + 12, len - 12, true)],
            false => vec![(addr, len, true)],
        };
        self.rx.add(memory, &parts);
        self.driver.notify(&self.rx);
        addr
    }

    /// Sends a frame with a header.
    fn send(&mut self, header: &[u8; HEADER], frame: &[u8]) {
        self.offer(header, frame);
        self.tx.wait(&self.driver.memory);
    }

    /// Gives the device a frame to send, with a header.
    pub fn offer(&mut self, header: &[u8; HEADER], frame: &[u8]) {
        let addr = self.driver.memory.alloc(HEADER + frame.len());
        self.driver.memory.write(addr, &[&header[..], frame].concat());
        let rest = u32::try_from(frame.len()).unwrap();
        let parts = [(addr, 12, false), (addr + 12, rest, false)];
        self.tx.add(&self.driver.memory, &parts);
        self.driver.notify(&self.tx);
    }

    /// Sends a command. Returns whether the device carried it out.
    fn command(&mut self, command: &[u8]) -> bool {
        match self.ask(command, 1)[..] {
            [0] => true,
            [1] => false,
            ref answer => panic!("acknowledgement {answer:?}"),
        }
    }

    /// Sends a command with room for an answer of `room` bytes. Returns what the device has
    /// written.
    pub fn ask(&mut self, command: &[u8], room: u32) -> Vec<u8> {
        let addr = self.driver.memory.alloc(command.len() + room as usize);
        let answer = addr + command.len() as u64;
        self.driver.memory.write(addr, &[command, &vec![0xff; room as usize]].concat());
        let queue = self.control.as_mut().unwrap();
        let len = u32::try_from(command.len()).unwrap();
        queue.add(&self.driver.memory, &[(addr, len, false), (answer, room, true)]);
        self.driver.notify(queue);
        let (_, written) = queue.wait(&self.driver.memory);
        self.driver.memory.read(answer, written as usize)
    }

    /// Waits for a frame in the buffer at `addr`, and returns its header and its bytes.
    fn receive(&mut self, addr: u64) -> (Vec<u8>, Vec<u8>) {
        let (_, len) = self.rx.wait(&self.driver.memory);
        let mut header = self.driver.memory.read(addr, len as usize);
        let frame = header.split_off(HEADER);
        (header, frame)
    }

    fn counter(&self, direction: &str, path: &str) -> u64 {
        let inspect = self.driver.endpoint.device().inspect();
        let mut value = &inspect["pairs"][0][direction];
        for key in path.split('.') {
            value = &value[key];
        }
        value.as_u64().unwrap()
    }
}

pub fn frame(to: [u8; 6], from: [u8; 6], len: usize) -> Vec<u8> {
    let body = (0..len).map(|i| u8::try_from(i % 251).unwrap());
    to.into_iter().chain(from).chain([0x88, 0xb5]).chain(body).collect()
}

/// A segment of TCP over IPv4 with `payload` bytes, and the header that leaves it to be cut into
/// pieces of 1000.
pub fn segment(payload: usize) -> ([u8; HEADER], Vec<u8>) {
    let mut bytes = frame(MACS[1], MACS[0], 0);
    (bytes[12], bytes[13]) = (8, 0);
    let total = u16::try_from(40 + payload).unwrap().to_be_bytes();
    bytes.extend([0x45, 0, total[0], total[1], 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes.extend([0, 80, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    bytes.extend((0..payload).map(|i| u8::try_from(i % 251).unwrap()));
    let mut header = [0; HEADER];
    (header[0], header[1], header[2]) = (1, 1, 54);
    header[4..6].copy_from_slice(&1000u16.to_le_bytes());
    (header[6], header[8]) = (34, 16);
    (header, bytes)
}

#[test]
fn frames_go_from_card_to_card() {
    let lab = Lab::new();
    let mut a = lab.card(0, json!({}), 0);
    let mut b = lab.card(1, json!({}), MRG_RXBUF);
    assert_eq!(b.driver.config(0, 6).to_le_bytes()[..6], MACS[1]);
    assert_eq!(b.driver.config(10, 2), 1500);
    for (len, split) in [(46, false), (1500, true)] {
        let addr = b.post(2048, split);
        let sent = frame(MACS[1], MACS[0], len);
        a.send(&[0; HEADER], &sent);
        let (header, bytes) = b.receive(addr);
        assert_eq!(bytes, sent);
        assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        b.signal.wait();
        assert_eq!(b.driver.isr() & 1, 1);
        b.driver.function.mask_irq(IrqIndex::Intx, false).unwrap();
    }
    // In three buffers.
    let buffers: Vec<_> = (0..3).map(|_| b.post(600, false)).collect();
    let sent = frame(MACS[1], MACS[0], 1400);
    a.send(&[0; HEADER], &sent);
    let mut bytes = Vec::new();
    for addr in buffers {
        let (_, len) = b.rx.wait(&b.driver.memory);
        bytes.extend(b.driver.memory.read(addr, len as usize));
    }
    assert_eq!((bytes[10], &bytes[HEADER..]), (3, &sent[..]));
    // The other card does not take several.
    let addr = a.post(2048, false);
    let sent = frame(MACS[0], MACS[1], 100);
    b.send(&[0; HEADER], &sent);
    assert_eq!(a.receive(addr).1, sent);
    assert_eq!((a.counter("tx", "frames"), a.counter("rx", "frames")), (3, 1));
}

#[test]
fn bad_frames_are_dropped_and_counted() {
    let lab = Lab::new();
    let mut a = lab.card(0, json!({}), 0);
    let (header, bytes) = segment(2000);
    a.send(&header, &bytes);
    assert_eq!(a.counter("tx", "drops.bad_header"), 1);
    a.send(&[0; HEADER], &frame(MACS[1], MACS[0], 1600));
    assert_eq!(a.counter("tx", "drops.too_long"), 1);
    a.send(&[0; HEADER], &[1, 2, 3]);
    assert_eq!(a.counter("tx", "drops.short"), 1);
    assert_eq!(a.driver.status() & NEEDS_RESET, 0);
}

#[test]
fn a_frame_in_many_parts_is_gathered() {
    let lab = Lab::new();
    let mut a = lab.card(0, json!({}), 1 << 28);
    let mut b = lab.card(1, json!({}), 0);
    let addr = b.post(2048, false);
    let sent = frame(MACS[1], MACS[0], 86);
    // A descriptor for each byte of the frame.
    let at = a.driver.memory.alloc(HEADER + sent.len());
    a.driver.memory.write(at + 12, &sent);
    let parts: Vec<_> = (0..=sent.len() as u64).map(|i| byte_by_byte(at, 12, i)).collect();
    a.tx.add_table(&mut a.driver.memory, &parts, false);
    a.driver.notify(&a.tx);
    a.tx.wait(&a.driver.memory);
    assert_eq!(b.receive(addr).1, sent);
}

/// Part `i` of the buffer at `addr`: `first` bytes, or a single byte after them.
fn byte_by_byte(addr: u64, first: u32, i: u64) -> (u64, u32) {
    if i == 0 { (addr, first) } else { (addr + u64::from(first) - 1 + i, 1) }
}

/// A poll does less if the receiver's buffers lie in many parts.
#[test]
fn a_frame_costs_what_its_buffers_parts_cost() {
    const FRAMES: u64 = 16;
    let lab = Lab::new();
    let mut a = lab.card(0, json!({}), 0);
    let mut b = lab.card(1, json!({}), 1 << 28);
    let sent = frame(MACS[1], MACS[0], 986);
    let mut buffers = Vec::new();
    for _ in 0..FRAMES {
        let addr = b.driver.memory.alloc(1100);
        let parts: Vec<_> = (0..1000).map(|i| byte_by_byte(addr, 100, i)).collect();
        b.rx.add_table(&mut b.driver.memory, &parts, true);
        buffers.push(addr);
        let addr = a.driver.memory.alloc(HEADER + sent.len());
        a.driver.memory.write(addr + 12, &sent);
        let len = u32::try_from(HEADER + sent.len()).unwrap();
        a.tx.add(&a.driver.memory, &[(addr, len, false)]);
    }
    b.driver.notify(&b.rx);
    a.driver.notify(&a.tx);
    for addr in buffers {
        assert_eq!(b.receive(addr).1, sent);
    }
    // A poll has 64 units. A frame costs one, and one more for 20 parts.
    assert!(a.counter("tx", "batches") >= FRAMES / 2);
}

#[test]
fn a_segment_arrives_whole_or_in_pieces() {
    let lab = Lab::new();
    let mut a = lab.card(0, json!({}), CSUM | HOST_TSO4);
    let mut b = lab.card(1, json!({}), GUEST_CSUM | GUEST_TSO4 | GUEST_OFFLOADS | CTRL_VQ);
    let (header, bytes) = segment(3000);
    let addr = b.post(65562, false);
    a.send(&header, &bytes);
    let (received, whole) = b.receive(addr);
    assert_eq!((received[1], whole.len()), (1, bytes.len()));
    assert_eq!(whole[54..], bytes[54..]);
    assert!(!b.command(&[5, 0, 4, 0, 0, 0, 0, 0, 0, 0]), "an offload that is none");
    assert!(b.command(&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), "no offloads from now on");
    let buffers: Vec<_> = (0..3).map(|_| b.post(65562, false)).collect();
    a.send(&header, &bytes);
    let mut payload = Vec::new();
    for addr in buffers {
        let (received, piece) = b.receive(addr);
        assert_eq!(received[..10], [0; 10]);
        payload.extend_from_slice(&piece[54..]);
    }
    assert_eq!(payload, bytes[54..]);
}

#[test]
fn a_segment_does_not_wait_for_buffers_that_a_driver_may_keep() {
    let lab = Lab::new();
    let mut a = lab.card(0, json!({}), CSUM | HOST_TSO4);
    let mut b = lab.card(1, json!({}), MRG_RXBUF | GUEST_CSUM | GUEST_TSO4);
    // Half of the 64 descriptors, in 8 buffers of 300 bytes.
    let mut buffers = Vec::new();
    for _ in 0..8 {
        let addr = b.driver.memory.alloc(300);
        let parts = [0, 1, 2, 3].map(|n| (addr + n * 75, 75, true));
        b.rx.add(&b.driver.memory, &parts);
        buffers.push(addr);
    }
    b.driver.notify(&b.rx);
    let (header, bytes) = segment(3000);
    a.send(&header, &bytes);
    // Two of three pieces, each in four buffers.
    let mut payload = Vec::new();
    for (n, addr) in buffers.into_iter().enumerate() {
        let (_, len) = b.rx.wait(&b.driver.memory);
        let bytes = b.driver.memory.read(addr, len as usize);
        let skip = if n % 4 == 0 { HEADER + 54 } else { 0 };
        payload.extend_from_slice(&bytes[skip..]);
    }
    assert_eq!(payload, bytes[54..2054]);
}

#[test]
fn the_driver_chooses_its_frames() {
    let lab = Lab::new();
    let mut a = lab.card(0, json!({ "learn": true }), 0);
    let features = CTRL_VQ | CTRL_RX | CTRL_RX_EXTRA | CTRL_VLAN | CTRL_MAC;
    let mut b = lab.card(1, json!({}), features);
    let other = [2, 0, 0, 0, 0, 9];
    let mut filtered = 0;
    let mut arrives = |a: &mut Card, b: &mut Card, to: [u8; 6], expected: bool| {
        a.send(&[0; HEADER], &frame(to, MACS[0], 60));
        let is_here = eventually("the frame, or its drop", || {
            if b.rx.used(&b.driver.memory).is_some() {
                return Some(true);
            }
            (b.counter("rx", "filtered") > filtered).then_some(false)
        });
        filtered = b.counter("rx", "filtered");
        assert_eq!(is_here, expected, "{to:?}");
    };
    for _ in 0..12 {
        b.post(2048, false);
    }
    arrives(&mut a, &mut b, other, true);
    assert!(b.command(&[0, 0, 0]), "no longer promiscuous");
    arrives(&mut a, &mut b, MACS[1], true);
    let table = [&[1, 0, 1, 0, 0, 0][..], &other, &[0; 4]].concat();
    assert!(b.command(&table));
    arrives(&mut a, &mut b, other, true);
    // Modes.
    assert!(b.command(&[0, 4, 1]), "no unicast");
    // What passes is there before the sender gets its buffer back.
    a.send(&[0; HEADER], &frame(MACS[1], MACS[0], 60));
    assert_eq!(b.rx.used(&b.driver.memory), None);
    arrives(&mut a, &mut b, [0xff; 6], true);
    assert!(b.command(&[0, 5, 1]), "no broadcast");
    assert!(b.command(&[0, 4, 0]));
    arrives(&mut a, &mut b, MACS[1], true);
    // VLANs.
    let mut tagged = frame(MACS[1], MACS[0], 60);
    tagged.splice(12..12, [0x81, 0, 0, 5]);
    let before = b.counter("rx", "filtered");
    a.send(&[0; HEADER], &tagged);
    eventually("the filter of VLANs", || (b.counter("rx", "filtered") > before).then_some(()));
    assert!(b.command(&[2, 0, 5, 0]));
    a.send(&[0; HEADER], &tagged);
    eventually("the tagged frame", || b.rx.used(&b.driver.memory));
    // Addresses.
    assert!(!b.command(&[&[1, 1][..], &MACS[0]].concat()), "the other card has it");
    assert!(!b.command(&[1, 1, 1, 0, 0, 0, 0, 1]), "a group");
    assert!(b.command(&[1, 1, 2, 0, 0, 0, 0, 7]));
    for bad in [&[9, 0][..], &[1, 0, 0xff, 0xff, 0xff, 0xff], &[0], &[5, 0, 0], &[4, 0, 1, 0]] {
        assert!(!b.command(bad), "{bad:?}");
    }
}

#[test]
fn a_reset_of_the_control_queue_leaves_the_choices() {
    let lab = Lab::new();
    let mut a = lab.card(0, json!({}), 0);
    let mut b = lab.card(1, json!({}), CTRL_VQ | CTRL_RX | CTRL_VLAN | RING_RESET);
    assert!(b.command(&[0, 0, 0]), "no longer promiscuous");
    assert!(b.command(&[2, 0, 5, 0]));
    b.driver.set(field::SELECT, 2);
    b.driver.set(field::RESET, 1);
    b.control = Some(b.driver.queue(2, 16));
    assert!(b.command(&[2, 0, 6, 0]), "one more VLAN");
    let buffers = [(); 2].map(|()| b.post(2048, false));
    a.send(&[0; HEADER], &frame([2, 0, 0, 0, 0, 9], MACS[0], 60)); // For somebody else.
    for (addr, vlan) in buffers.into_iter().zip([5, 6]) {
        let mut tagged = frame(MACS[1], MACS[0], 60);
        tagged.splice(12..12, [0x81, 0, 0, vlan]);
        a.send(&[0; HEADER], &tagged);
        assert_eq!(b.receive(addr).1, tagged);
    }
}

#[test]
fn a_queue_that_is_enabled_again_holds_interrupts_back_as_its_direction_does() {
    let lab = Lab::new();
    let mut a = lab.card(0, json!({ "queue-pairs": 2 }), CTRL_VQ | MQ | COALESCE | RING_RESET);
    let get = |a: &mut Card, queue: u8| a.ask(&[6, 3, queue, 0, 0, 0], 9);
    let answer = |frames: u8, usecs: u8| [frames, 0, 0, 0, usecs, 0, 0, 0, 0];
    assert!(a.command(&[6, 0, 8, 0, 0, 0, 50, 0, 0, 0]));
    assert!(a.command(&[6, 2, 1, 0, 0, 0, 9, 0, 0, 0, 60, 0, 0, 0]));
    assert!(a.command(&[6, 2, 0, 0, 0, 0, 7, 0, 0, 0, 70, 0, 0, 0]));
    assert_eq!([get(&mut a, 1), get(&mut a, 0)], [answer(9, 60), answer(7, 70)]);
    for queue in [0, 1] {
        a.driver.set(field::SELECT, queue.into());
        a.driver.set(field::RESET, 1);
        assert_eq!(get(&mut a, queue), [1], "it is not enabled");
        assert!(!a.command(&[6, 2, queue, 0, 0, 0, 9, 0, 0, 0, 60, 0, 0, 0]));
        a.driver.queue(queue.into(), 64);
    }
    assert_eq!([get(&mut a, 1), get(&mut a, 0)], [answer(8, 50), answer(0, 0)]);
    assert_eq!(get(&mut a, 2), [1], "it was never enabled");
    a.driver.queue(3, 64);
    assert_eq!(get(&mut a, 3), answer(8, 50));
}

#[test]
fn queue_pairs_are_taken_into_use() {
    let lab = Lab::new();
    let settings = json!({ "queue-pairs": 2 });
    let mut a = lab.card(0, settings, MQ | CTRL_VQ);
    assert_eq!((a.driver.get(field::NUM_QUEUES), a.driver.config(8, 2)), (5, 2));
    let (_rx, mut tx) = (a.driver.queue(2, 64), a.driver.queue(3, 64));
    for (pairs, carried_out) in [(0, false), (3, false), (2, true), (1, true), (2, true)] {
        assert_eq!(a.command(&[4, 0, pairs, 0]), carried_out, "{pairs}");
    }
    let mut b = lab.card(1, json!({}), 0);
    let addr = b.post(2048, false);
    // The second pair sends.
    std::mem::swap(&mut a.tx, &mut tx);
    let sent = frame(MACS[1], MACS[0], 60);
    a.send(&[0; HEADER], &sent);
    assert_eq!(b.receive(addr).1, sent);
}

#[test]
fn a_hash_chooses_the_queue_and_is_reported() {
    let lab = Lab::new();
    let mut a = lab.card(0, json!({}), 0);
    let settings = json!({ "queue-pairs": 2, "rss": true });
    let mut b = lab.card(1, settings, MQ | RSS | HASH_REPORT | CTRL_VQ);
    assert_eq!((b.driver.config(17, 1), b.driver.config(18, 2)), (40, 128));
    let (mut second, _tx) = (b.driver.queue(2, 64), b.driver.queue(3, 64));
    // TCP over IPv4 by the addresses and ports; everything else to queue 0.
    let command = |table: [u8; 2], pairs: u8| {
        let head = [4, 1, 2, 0, 0, 0, 1, 0, 0, 0, table[0], 0, table[1], 0, pairs, 0, 40];
        [&head[..], &[7; 40]].concat()
    };
    for bad in [command([0, 2], 2), command([0, 1], 3)] {
        assert!(!b.command(&bad));
    }
    assert!(b.command(&command([1, 1], 2)));
    // The highest number of a queue. The table before it stays.
    let mut highest = command([0, 0], 2);
    (highest[12], highest[13]) = (0xff, 0xff);
    assert!(!b.command(&highest));
    let addr = b.driver.memory.alloc(2048);
    second.add(&b.driver.memory, &[(addr, 2048, true)]);
    b.driver.notify(&second);
    let (_, bytes) = segment(100);
    a.send(&[0; HEADER], &bytes);
    let (_, len) = second.wait(&b.driver.memory);
    let received = b.driver.memory.read(addr, len as usize);
    assert_eq!((received[16], &received[20..]), (2, &bytes[..]), "TCP over IPv4");
    assert_ne!(received[12..16], [0; 4]);
    let addr = b.post(2048, false);
    let sent = frame(MACS[1], MACS[0], 60);
    a.send(&[0; HEADER], &sent);
    let (_, len) = b.rx.wait(&b.driver.memory);
    let received = b.driver.memory.read(addr, len as usize);
    assert_eq!((&received[12..20], &received[20..]), (&[0; 8][..], &sent[..]));
    // One pair by flow, although the table names the second one. The hash is still reported.
    assert!(b.command(&[4, 0, 1, 0]));
    let addr = b.post(2048, false);
    a.send(&[0; HEADER], &bytes);
    let (_, len) = b.rx.wait(&b.driver.memory);
    let received = b.driver.memory.read(addr, len as usize);
    assert_eq!((received[16], &received[20..]), (2, &bytes[..]));
    assert!(b.command(&[&[4, 2, 0, 0, 0, 0][..], &[0; 9]].concat()), "no hashes any more");
}

#[test]
fn the_driver_hears_of_the_link_and_announces_itself() {
    let lab = Lab::new();
    let mut a = lab.card(0, json!({ "speed": 10_000 }), ANNOUNCE | CTRL_VQ);
    let control = |a: &Card, request: Value| {
        a.driver.endpoint.device().control(&request, &mut |_| true).unwrap();
    };
    eventually("the link", || (a.driver.config(6, 2) == 1).then_some(()));
    assert_eq!((a.driver.config(12, 4), a.driver.config(16, 1)), (10_000, 1));
    let _ = (a.signal.take(), a.driver.isr());
    a.driver.function.mask_irq(IrqIndex::Intx, false).unwrap();
    control(&a, json!({ "op": "link", "up": false }));
    a.signal.wait();
    assert_eq!((a.driver.isr(), a.driver.config(6, 2)), (2, 0));
    a.driver.function.mask_irq(IrqIndex::Intx, false).unwrap();
    control(&a, json!({ "op": "link", "up": true }));
    a.signal.wait();
    assert_eq!((a.driver.isr(), a.driver.config(6, 2)), (2, 1));
    a.driver.function.mask_irq(IrqIndex::Intx, false).unwrap();
    control(&a, json!({ "op": "announce" }));
    a.signal.wait();
    assert_eq!((a.driver.isr(), a.driver.config(6, 2)), (2, 3));
    assert!(a.command(&[3, 0]));
    assert_eq!(a.driver.config(6, 2), 1);
}

#[test]
fn what_a_card_offers_is_what_its_settings_say() {
    let lab = Lab::new();
    let offered = |settings: Value| {
        let endpoint = lab.endpoint(0, settings);
        let function = device_function(endpoint.clone(), Options::default());
        let features = Driver::new(endpoint, function).offered();
        lab.bus.remove("net0").unwrap();
        features
    };
    let all = offered(json!({}));
    assert_eq!(all & (CSUM | HOST_TSO4 | CTRL_MAC | RING_PACKED | MQ), {
        CSUM | HOST_TSO4 | CTRL_MAC | RING_PACKED
    });
    let few = json!({ "csum": false, "mac-changes": false, "packed": false, "queue-pairs": 2 });
    assert_eq!(offered(few) & (CSUM | HOST_TSO4 | CTRL_MAC | RING_PACKED | MQ), MQ);
    let wrong = json!({ "transport": "mmio" });
    let error = lab.bus.create("net9", "virtio-net", &wrong).err().unwrap().to_string();
    assert!(error.contains("\"transport\""), "{error}");
}

#[test]
fn a_reset_in_mid_traffic_leaves_the_memory() {
    let lab = Lab::new();
    let mut b = lab.card(1, json!({}), MRG_RXBUF);
    for _ in 0..3 {
        let mut a = lab.card(0, json!({ "backpressure-ms": 3_600_000 }), 0);
        // More frames than the other has buffers for: the last ones wait.
        b.post(2048, false);
        let bytes = frame(MACS[1], MACS[0], 200);
        let addr = a.driver.memory.alloc(HEADER + bytes.len());
        a.driver.memory.write(addr + 12, &bytes);
        let len = u32::try_from(HEADER + bytes.len()).unwrap();
        for _ in 0..8 {
            a.tx.add(&a.driver.memory, &[(addr, len, false)]);
        }
        a.driver.notify(&a.tx);
        b.rx.wait(&b.driver.memory);
        a.driver.set(field::STATUS, 0);
        assert_eq!(a.driver.status(), 0);
        a.driver.endpoint.unmap_all();
        lab.bus.remove("net0").unwrap();
    }
}

#[test]
fn settings_that_vhost_net_cannot_have_are_refused() {
    use vbus_core::DeviceClass as _;
    let class = VirtioNetClass::on(Switches::default(), Arc::new(Direct));
    let check = |more: Value| {
        let mut settings = json!({ "backend": "tap", "vhost": true });
        settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        class.check("net0", &settings).map_err(|error| error.to_string())
    };
    assert_eq!(check(json!({})), Ok(()));
    assert_eq!(check(json!({ "packed": false, "queue-pairs": 4, "uso": false })), Ok(()));
    assert_eq!(check(json!({ "vhost": false, "pcap": "/x", "rate": 8000, "rss": true })), Ok(()));
    for (more, text) in [
        (json!({ "backend": "switch" }), "\"vhost\" is true, which needs backend = \"tap\""),
        (json!({ "packed": true }), "\"packed\" is true, but vhost = true needs split queues"),
        (json!({ "rss": true }), "\"rss\" is true, but the kernel has no hashes"),
        (json!({ "rate": "1G" }), "\"rate\" limits frames that the kernel carries"),
        (json!({ "rx-rate": "1G", "burst": 9000 }), "\"rx-rate\" limits frames that"),
        (json!({ "pcap": "/x" }), "\"pcap\" captures frames that the kernel carries"),
    ] {
        let error = check(more).unwrap_err();
        assert!(error.starts_with(text), "{error}");
    }
}

#[test]
fn vhost_changes_alone() {
    let lab = Lab::new();
    let endpoint = lab.endpoint(0, json!({ "backend": "switch", "switch": "lab" }));
    let with = |more: Value| {
        let mut settings = json!({ "backend": "tap", "rx-rate": "1G" });
        settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        settings
    };
    let change = |old: &Value, new: &Value| endpoint.device().reconfigure(old, new);
    let (none, off) = (with(json!({})), with(json!({ "vhost": false })));
    let on = json!({ "backend": "tap", "vhost": true });
    // The device has no kernel's end to open: only the way back is tested.
    assert_eq!(change(&off, &none), Ok(()), "the key is gone from the file");
    assert_eq!(change(&none, &off), Ok(()));
    assert_eq!(change(&on, &json!({ "backend": "tap" })), Ok(()));
    assert_eq!(change(&on, &none), Err("vhost changes alone".into()));
    let error = change(&none, &with(json!({ "mtu": 9000 }))).unwrap_err();
    assert!(error.starts_with("only rates and bursts change"), "{error}");
}
