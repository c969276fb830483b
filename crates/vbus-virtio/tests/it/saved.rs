// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Cards that are saved, and go on in fresh ones on another bus, with the same memory.
#![allow(clippy::cast_possible_truncation)] // The numbers are small.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};
use vbus_core::state::Document;
use vbus_core::{ConnectionState, Endpoint, ErrorCode};
use vbus_pci::{FunctionState, IrqIndex, Options, PciFunction, Peer, device_function};
use vbus_test_driver::saved::{
    Verdict, World, content, document, forge, same_when_saved, still, try_out,
};
use vbus_test_driver::{Random, TIMEOUT};

use crate::driver::{Driver, NEEDS_RESET, eventually, field};
use crate::nic::{
    ANNOUNCE, COALESCE, CSUM, CTRL_MAC, CTRL_RX, CTRL_VLAN, CTRL_VQ, Card, GUEST_CSUM,
    GUEST_OFFLOADS, HEADER, HOST_TSO4, Lab, MACS, frame, segment,
};

/// The chains of a queue of these tests.
const CHAINS: usize = 16;
/// Room for a frame to be sent.
const SLOT: usize = 16 << 10;

/// Two cards on a switch, the first of which sends to the second.
struct Cards {
    lab: Lab,
    cards: [Card; 2],
    settings: Value,
    /// Memory for frames to send, and of buffers to receive.
    tx_slots: u64,
    rx_slots: u64,
    sent: usize,
    unreaped: usize,
    posted: usize,
    /// The buffers that the device has, in order.
    buffers: VecDeque<u64>,
    /// Frames that the second card will get, and that its driver has not taken.
    coming: usize,
    random: Random,
    seen: Vec<Vec<u8>>,
    /// What a keeper has of each card. Empty: there is none.
    kept: Vec<(FunctionState, OwnedFd)>,
}

/// A fresh function with its endpoint on the bus of `lab`, for the driver of `card`.
fn successor(
    card: &Card,
    lab: &Lab,
    number: usize,
    settings: &Value,
) -> (PciFunction, Arc<Endpoint>) {
    let endpoint = lab.endpoint(number, settings.clone());
    card.driver.memory.share(&endpoint);
    let mut function = device_function(endpoint.clone(), Options::default());
    let eventfds = card.driver.function.irq_eventfds(IrqIndex::Intx).unwrap();
    function.connect_irqs(IrqIndex::Intx, 0, eventfds).unwrap();
    (function, endpoint)
}

impl Cards {
    fn new(seed: u64, settings: Value) -> Cards {
        let lab = Lab::new();
        let control = CTRL_VQ | CTRL_RX | CTRL_VLAN | CTRL_MAC | ANNOUNCE | COALESCE;
        let features = control | CSUM | HOST_TSO4 | GUEST_CSUM | GUEST_OFFLOADS;
        let mut cards = [0, 1].map(|number| lab.card(number, settings.clone(), features));
        let tx_slots = cards[0].driver.memory.alloc(CHAINS * SLOT);
        let rx_slots = cards[1].driver.memory.alloc(CHAINS * 2048);
        let (buffers, seen, kept) = Default::default();
        Cards {
            lab,
            cards,
            settings,
            tx_slots,
            rx_slots,
            sent: 0,
            unreaped: 0,
            posted: 0,
            buffers,
            coming: 0,
            random: Random(seed),
            seen,
            kept,
        }
    }

    /// As [`new`](Self::new), of cards whose bus has a keeper.
    fn kept(seed: u64, settings: Value) -> Cards {
        let mut cards = Cards::new(seed, settings);
        cards.commit();
        cards
    }

    /// Gives the keeper the state of both cards, as after a message.
    fn commit(&mut self) {
        let commit = |card: &mut Card| {
            let endpoint = &card.driver.endpoint;
            endpoint.quiesce_to_outlast(Instant::now() + TIMEOUT).unwrap();
            let mut state = card.driver.function.save().unwrap();
            state.unmask();
            let memory = card.driver.function.kept_memory().unwrap().unwrap();
            endpoint.resume();
            (state, memory)
        };
        self.kept = self.cards.iter_mut().map(commit).collect();
    }

    /// The process of both cards is killed: nobody saves anything, and the next one has the
    /// keeper's state and memory, and the drivers' memory.
    fn die(&mut self) {
        let lab = Lab::new();
        for card in &self.cards {
            card.driver.endpoint.quiesce().unwrap();
        }
        let kept = std::mem::take(&mut self.kept);
        for (number, (card, (state, memory))) in self.cards.iter_mut().zip(kept).enumerate() {
            let (mut function, endpoint) = successor(card, &lab, number, &self.settings);
            endpoint.quiesce().unwrap();
            function.adopt_memory(memory).unwrap();
            function.restore(&state, Peer::Same).unwrap();
            (card.driver.function, card.driver.endpoint) = (function, endpoint);
        }
        self.commit();
        self.lab = lab;
    }

    /// Both cards move to another bus, which has a keeper.
    fn move_to_a_kept_bus(&mut self) {
        let lab = Lab::new();
        for card in &self.cards {
            card.driver.endpoint.quiesce().unwrap();
        }
        for (number, card) in self.cards.iter_mut().enumerate() {
            let state = card.driver.function.save().unwrap();
            let (mut function, endpoint) = successor(card, &lab, number, &self.settings);
            // What its keeper has of the device before.
            endpoint.quiesce_to_outlast(Instant::now() + TIMEOUT).unwrap();
            function.save().unwrap();
            assert!(function.kept_memory().unwrap().is_some());
            function.restore(&state, Peer::Other).unwrap();
            (card.driver.function, card.driver.endpoint) = (function, endpoint);
        }
        self.commit();
        self.lab = lab;
    }

    fn send(&mut self, header: &[u8; HEADER], bytes: &[u8]) {
        let driver = &mut self.cards[0];
        while self.unreaped > 12 {
            driver.tx.wait(&driver.driver.memory);
            self.unreaped -= 1;
        }
        let addr = self.tx_slots + (self.sent % CHAINS * SLOT) as u64;
        self.sent += 1;
        self.unreaped += 1;
        driver.driver.memory.write(addr, &[&header[..], bytes].concat());
        let rest = bytes.len() as u32 - 20;
        let parts = [(addr, 12, false), (addr + 12, 20, false), (addr + 32, rest, false)];
        driver.tx.add(&driver.driver.memory, &parts);
        driver.driver.notify(&driver.tx);
    }

    fn post(&mut self) {
        let addr = self.rx_slots + (self.posted % CHAINS * 2048) as u64;
        self.posted += 1;
        self.buffers.push_back(addr);
        let card = &mut self.cards[1];
        card.rx.add(&card.driver.memory, &[(addr, 100, true), (addr + 100, 1948, true)]);
        card.driver.notify(&card.rx);
    }

    fn take(&mut self, frames: usize) {
        for _ in 0..frames.min(self.coming) {
            if self.buffers.is_empty() {
                self.post();
            }
            let card = &mut self.cards[1];
            let (_, len) = card.rx.wait(&card.driver.memory);
            let addr = self.buffers.pop_front().unwrap();
            self.seen.push(card.driver.memory.read(addr, len as usize));
            self.coming -= 1;
        }
    }

    fn command(&mut self, n: u64) {
        let byte = n as u8;
        let command = match self.random.below(8) {
            0 => vec![0, 0, byte & 1],
            1 => [&[1, 1][..], [&MACS[0], &MACS[1], &[2, 0, 0, 0, 0, 9]][n as usize % 3]].concat(),
            2 => vec![2, byte & 1, byte, 1],
            3 => vec![3, 0],
            4 => vec![5, 0, byte & 2, 0, 0, 0, 0, 0, 0, 0],
            5 => vec![6, byte & 1, 3, 0, 0, 0, byte, 0, 0, 0],
            6 => vec![6, 3, byte & 3, 0],
            _ => vec![4, 0, 2, 0],
        };
        let room = if command[..2] == [6, 3] { 9 } else { 1 };
        // The address is that of the second card again, so that frames find it.
        let answers = [self.cards[1].ask(&command, room), self.ask_for_own_address()];
        self.seen.push(format!("{command:?}: {answers:?}").into_bytes());
        let endpoint = &self.cards[1].driver.endpoint;
        let request = json!({ "op": "announce" });
        endpoint.device().control(&request, &mut |_| true).unwrap();
        if !self.kept.is_empty() {
            self.commit();
        }
        let card = &mut self.cards[1];
        eventually("the announcement", || (card.driver.config(6, 2) & 2 != 0).then_some(()));
    }

    fn ask_for_own_address(&mut self) -> Vec<u8> {
        self.cards[1].ask(&[&[1, 1][..], &MACS[1]].concat(), 1)
    }
}

impl World for Cards {
    fn step(&mut self) {
        let n = self.random.next();
        match self.random.below(12) {
            0..=3 if self.coming < 8 => {
                let to = if n % 5 == 0 { [0xff; 6] } else { MACS[1] };
                let bytes = frame(to, MACS[0], 46 + (n % 1400) as usize);
                self.send(&[0; HEADER], &bytes);
                self.coming += 1;
            }
            // A segment of which some pieces were delivered is delivered again as a whole.
            4 if self.coming < 8 && self.kept.is_empty() => {
                let payload = 100 + (n % 6000) as usize;
                let (header, bytes) = segment(payload);
                self.send(&header, &bytes);
                self.coming += payload.div_ceil(1000);
            }
            5..=6 => self.take(1 + (n % 6) as usize),
            7 if self.buffers.len() < 10 => self.post(),
            8..=9 => {
                // What changes the way of a frame comes when no frame is on its way.
                self.take(usize::MAX);
                self.command(n);
            }
            _ => {}
        }
    }

    fn renew(&mut self) {
        if !self.kept.is_empty() {
            return self.die();
        }
        let lab = Lab::new();
        for card in &self.cards {
            card.driver.endpoint.quiesce().unwrap();
        }
        let states = self.cards.each_mut().map(|card| card.driver.function.save().unwrap());
        for (number, card) in self.cards.iter_mut().enumerate() {
            let read = FunctionState::from_text(&states[number].to_text().unwrap()).unwrap();
            let (mut function, endpoint) = successor(card, &lab, number, &self.settings);
            endpoint.quiesce().unwrap();
            function.restore(&read, Peer::Same).unwrap();
            (card.driver.function, card.driver.endpoint) = (function, endpoint);
        }
        for (card, state) in self.cards.iter_mut().zip(&states) {
            let again = card.driver.function.save().unwrap();
            assert_eq!(unmoving(&again), unmoving(state), "the state as it was restored");
            card.driver.endpoint.resume();
        }
        self.lab = lab;
    }

    fn save_in_vain(&mut self, n: u64) {
        let card = &mut self.cards[n as usize % 2];
        card.driver.endpoint.quiesce().unwrap();
        card.driver.function.save().unwrap();
        card.driver.endpoint.resume();
    }

    fn end(mut self) -> Vec<Vec<u8>> {
        self.take(usize::MAX);
        let card = &mut self.cards[1];
        assert!(card.rx.used(&card.driver.memory).is_none());
        assert_eq!(card.driver.status() & NEEDS_RESET, 0);
        let config: Vec<_> = (0..24).map(|at| card.driver.config(at, 1)).collect();
        let registers = [field::STATUS, field::SELECT].map(|field| card.driver.get(field));
        self.seen.push(format!("{config:?} {registers:?}").into_bytes());
        self.seen
    }
}

/// A state without what passes by itself.
fn unmoving(state: &FunctionState) -> Value {
    let mut state = content(state);
    // A restored function has interrupted its driver.
    state["interrupts"] = json!(null);
    let bar = &mut state["bars"][0]["state"];
    bar["isr"] = json!(0);
    // A task publishes the state of the link soon after a driver has started.
    (bar["config"], bar["config_generation"]) = (json!(null), json!(0));
    still(&mut bar["device"]["counters"]);
    state
}

/// What the drivers of two cards see does not depend on whether the cards are saved, and go on in
/// fresh ones, at any step.
#[test]
fn drivers_do_not_see_that_their_cards_are_saved() {
    let settings = json!({ "backpressure-ms": 3_600_000 });
    same_when_saved(0..16, 50, |seed| Cards::new(seed, settings.clone()));
}

/// What the drivers of two cards see does not depend on whether the process of the cards is killed
/// at any step, and another one goes on from what a keeper has, and from memory.
#[test]
fn drivers_do_not_see_that_the_process_of_their_cards_was_killed() {
    let settings = json!({ "backpressure-ms": 3_600_000 });
    same_when_saved(0..16, 50, |seed| Cards::kept(seed, settings.clone()));
}

#[test]
fn cards_that_move_to_a_bus_with_a_keeper_keep_their_queues() {
    let mut world = Cards::new(1, json!({}));
    for move_or_die in [Cards::move_to_a_kept_bus, Cards::die] {
        move_or_die(&mut world);
        world.send(&[0; HEADER], &frame(MACS[1], MACS[0], 100));
        let card = &mut world.cards[1];
        let addr = card.driver.memory.alloc(2048);
        card.rx.add(&card.driver.memory, &[(addr, 2048, true)]);
        card.driver.notify(&card.rx);
        let (_, len) = card.rx.wait(&card.driver.memory);
        assert_eq!(len as usize, HEADER + frame(MACS[1], MACS[0], 100).len());
    }
}

/// The kernel would serve queues of which the keeper has an older state.
#[test]
fn a_card_with_a_keeper_does_not_change_to_vhost() {
    let world = Cards::kept(1, json!({}));
    let change = |old: bool, new: bool| {
        let [old, new] = [old, new].map(|vhost| json!({ "backend": "tap", "vhost": vhost }));
        world.cards[0].driver.endpoint.device().reconfigure(&old, &new)
    };
    let error = change(false, true).unwrap_err();
    assert!(error.starts_with("the bus has a keeper, and with vhost = true"), "{error}");
    assert_eq!(change(true, false), Ok(()));
    // The keeper has gone. What is left to refuse is that there is no such interface.
    world.cards[0].driver.endpoint.device().outlast_no_more();
    assert!(!change(false, true).is_err_and(|error| error.contains("keeper")));
}

/// What a refused state would have named is not there, so that nothing takes it for the card's.
#[test]
fn a_card_whose_state_is_refused_keeps_no_memory() {
    let lab = Lab::new();
    let file = rustix::fs::memfd_create("pcap", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let mut card = lab.card(0, json!({ "pcap": path }), CTRL_VQ);
    let Driver { endpoint, function, .. } = &mut card.driver;
    endpoint.quiesce_to_outlast(Instant::now() + TIMEOUT).unwrap();
    let error = function.save().unwrap_err();
    assert!(error.why.contains("pcap"), "{error:?}");
    assert!(function.kept_memory().unwrap().is_none());
    endpoint.resume();
}

/// The driver writes nonsense while no process is there. Its session ends, and no other one.
#[test]
fn a_queue_that_makes_no_sense_after_a_kill_ends_its_session_alone() {
    let mut world = Cards::kept(1, json!({}));
    let card = &mut world.cards[1];
    card.driver.endpoint.quiesce().unwrap();
    // The device has returned no such buffers.
    card.driver.memory.write(card.rx.device + 2, &0x4000_u16.to_le_bytes());
    world.die();
    let [first, second] = &mut world.cards;
    assert_ne!(second.driver.status() & NEEDS_RESET, 0);
    assert_eq!(first.driver.status() & NEEDS_RESET, 0);
    // A reset makes it a fresh one.
    let mut again = world.lab.start(&mut second.driver);
    world.send(&[0; HEADER], &frame(MACS[1], MACS[0], 100));
    let second = &mut world.cards[1].driver;
    let addr = second.memory.alloc(2048);
    again.add(&second.memory, &[(addr, 2048, true)]);
    second.notify(&again);
    let (_, len) = again.wait(&second.memory);
    assert_eq!(len as usize, HEADER + frame(MACS[1], MACS[0], 100).len());
}

/// Whatever a forged state says, it is refused, or the card that goes on from it is safe.
#[test]
fn forged_states_do_no_harm() {
    forge_states(|_| {});
}

/// The same of a state beside the memory of a process that was killed.
#[test]
fn forged_states_of_a_process_that_was_killed_do_no_harm() {
    let mut world = Cards::kept(1, json!({ "rss": true, "queue-pairs": 2 }));
    (0..20).for_each(|n| world.command(n));
    let (state, memory) = world.kept.remove(1);
    forge_states(|function| function.adopt_memory(memory.try_clone().unwrap()).unwrap());
    // There is nothing to put the driver's choices into.
    for own in [json!(7), json!("own"), json!([1]), json!(true)] {
        let mut forged = content(&state);
        *forged.pointer_mut("/bars/0/state/session/own").unwrap() = own;
        let lab = Lab::new();
        let endpoint = lab.endpoint(1, world.settings.clone());
        endpoint.quiesce().unwrap();
        world.cards[1].driver.memory.share(&endpoint);
        let mut function = device_function(endpoint.clone(), Options::default());
        function.adopt_memory(memory.try_clone().unwrap()).unwrap();
        function.restore(&document(&forged).unwrap(), Peer::Same).unwrap();
        assert_eq!(endpoint.state(), ConnectionState::Broken(ErrorCode::CORRUPT));
    }
}

fn forge_states(before: impl Fn(&mut PciFunction)) {
    let mut world = Cards::new(1, json!({ "rss": true, "queue-pairs": 2 }));
    world.post();
    for _ in 0..3 {
        world.send(&[0; HEADER], &frame(MACS[1], MACS[0], 1000));
        world.coming += 1;
    }
    let card = &mut world.cards[1];
    card.driver.endpoint.quiesce().unwrap();
    let state = card.driver.function.save().unwrap();
    let lab = Lab::new();
    forge(&content(&state), 0..600, |seed, forged| {
        let Some(state) = document::<FunctionState>(&forged) else { return Verdict::Unread };
        let endpoint = lab.endpoint(1, world.settings.clone());
        endpoint.quiesce().unwrap();
        world.cards[1].driver.memory.share(&endpoint);
        let mut function = device_function(endpoint.clone(), Options::default());
        before(&mut function);
        let verdict = match function.restore(&state, Peer::Other) {
            Err(error) => Verdict::Refused(error.why),
            Ok(()) => Verdict::Taken,
        };
        try_out(&endpoint, 5, seed, || drop(function.save()));
        drop(function);
        lab.bus.remove("net1").unwrap();
        verdict
    });
}
