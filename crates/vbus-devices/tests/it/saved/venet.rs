// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ethernet devices go on in other ones.

use serde_json::{Value, json};
use vbus_core::shm::abi::venet::{self as abi, status_page as word};
use vbus_core::state::Document;
use vbus_core::{Bus, DeviceState};
use vbus_test_driver::Random;
use vbus_test_driver::saved::{World, forged_devices, same_when_saved, save};

use super::{control, without_times};
use crate::driver::{Net, Shape, bus, frame};
use crate::offloads::large;

pub const A: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const B: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Two drivers on a switch. Their devices may move to another bus at any time.
struct Pair {
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

impl Pair {
    fn new(seed: u64) -> Pair {
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
        Pair { bus, a, b, configs, coming: 0, random: Random(seed), seen: Vec::new() }
    }

    fn take(&mut self, frames: u64) {
        for _ in 0..frames.min(self.coming) {
            let got = self.b.recv_with(0);
            self.seen.push([&got.0[..], &got.1].concat());
            self.coming -= 1;
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
}

impl World for Pair {
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

    fn save_in_vain(&mut self, n: u64) {
        let net = if n % 2 == 0 { &self.a } else { &self.b };
        net.endpoint.quiesce().unwrap();
        net.endpoint.save().unwrap();
        net.endpoint.resume();
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

/// What the drivers of two devices see does not depend on whether the devices are saved, and go on
/// in fresh ones, at any step.
#[test]
fn drivers_do_not_see_that_their_venet_devices_are_saved() {
    same_when_saved(0..24, 60, Pair::new);
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
    let state = save(&net.endpoint);
    forged_devices(&self::bus(1), ("venet", &config), &state, Some(&net.memory), 0..1500);
}
