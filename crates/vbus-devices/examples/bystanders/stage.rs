// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A switch with bystanders, and storms beside them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::driver::{Net, Shape, bus, frame};

const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 1];
const RECEIVER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const SLOW: [u8; 6] = [2, 0, 0, 0, 0, 3];
const STORMER: [u8; 6] = [2, 0, 0, 0, 0, 4];
const BROADCAST: [u8; 6] = [0xff; 6];

/// Of so many frames of the sender, one goes to the slow receiver.
const EACH: u64 = 10;
/// How long a driver of a storm sleeps between its turns, so that it leaves the processors to the
/// bus.
const PAUSE: Duration = Duration::from_micros(200);
/// How often the slow receiver posts one buffer: just as often as keeps its backpressure budget up.
const DRIBBLE: Duration = Duration::from_micros(950);

/// What happens beside the bystanders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storm {
    /// One port sends as many broadcasts as it can.
    Flood,
    /// A guest bridges two ports of the switch, so that a broadcast goes round without end.
    Loop,
    /// A port that gets each tenth frame of the sender posts its buffers one by one.
    Dribble,
}

impl Storm {
    pub const ALL: [Storm; 3] = [Storm::Flood, Storm::Loop, Storm::Dribble];

    /// What it is, for people.
    pub fn what(self) -> &'static str {
        match self {
            Storm::Flood => "a port that floods broadcasts",
            Storm::Loop => "a bridge loop of two ports",
            Storm::Dribble => "a receiver that dribbles",
        }
    }
}

/// What the bystanders had of their rate.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Frames in each pair of rounds: without the storm, and beside it.
    pub pairs: Vec<(u64, u64)>,
    /// Frames of the storm, or frames to the slow receiver.
    pub storm: u64,
}

impl Measured {
    /// The part of its rate that the bystander keeps: the median of the pairs, and between what
    /// half of them lie.
    pub fn ratio(&self) -> (f64, [f64; 2]) {
        let mut ratios: Vec<f64> =
            self.pairs.iter().map(|&(calm, stormy)| stormy as f64 / calm.max(1) as f64).collect();
        ratios.sort_by(f64::total_cmp);
        let at = |part: usize| ratios.get(ratios.len() * part / 4).copied().unwrap_or_default();
        (at(2), [at(1), at(3)])
    }
}

/// Measures the bystanders in `rounds` pairs of rounds, each `round` long: one without the storm
/// and one beside it, each first by turns. In both, a thread beside the bystanders wakes as often,
/// since a machine with two processors has to divide them among three threads.
pub fn measure(storm: Storm, rounds: u32, round: Duration) -> Measured {
    let bus = bus(1);
    let net = |name: &str, last: u8, more: Value| {
        let mut config = json!({ "mac": format!("02:00:00:00:00:{last:02x}"), "switch": "s" });
        for (key, value) in more.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        Net::new(&bus, name, config, Shape { entries: 128, ..Shape::default() })
    };
    let (mut sender, mut receiver) = (net("sender", 1, json!({})), net("receiver", 2, json!({})));
    let mut slow = net("slow", 3, json!({}));
    let learn = json!({ "learn": true });
    let mut stormers = [net("storm-0", 4, learn.clone()), net("storm-1", 5, learn)];
    let mut measured = Measured::default();
    for number in 0..rounds {
        let mut half = |stormy: bool| {
            let done = AtomicBool::new(false);
            let frames = std::thread::scope(|scope| {
                let beside = scope.spawn(|| match storm {
                    Storm::Flood if stormy => flood(&mut stormers[0], &done),
                    Storm::Loop if stormy => turn(&mut stormers, &done),
                    Storm::Dribble if stormy => dribble(&mut slow, &done),
                    Storm::Flood | Storm::Loop => rest(&mut stormers, PAUSE, &done),
                    Storm::Dribble => rest(std::slice::from_mut(&mut slow), DRIBBLE, &done),
                });
                let frames = carry([&mut sender, &mut receiver], storm, round);
                done.store(true, Ordering::Relaxed);
                let beside = beside.join().unwrap_or(0);
                measured.storm += if stormy { beside } else { 0 };
                frames
            });
            // The next round begins with empty rings.
            for net in stormers.iter_mut().chain([&mut slow]) {
                while net.try_recv(0).is_some() {}
            }
            frames
        };
        measured.pairs.push(if number % 2 == 0 {
            let calm = half(false);
            (calm, half(true))
        } else {
            let stormy = half(true);
            (half(false), stormy)
        });
    }
    measured
}

/// The sender sends without a pause. Returns how many frames the receiver got.
fn carry([sender, receiver]: [&mut Net; 2], storm: Storm, time: Duration) -> u64 {
    let (to_receiver, to_slow) = (frame(RECEIVER, SENDER, 1, 200), frame(SLOW, SENDER, 1, 200));
    let (end, mut sent, mut count) = (Instant::now() + time, 0_u64, 0);
    while Instant::now() < end {
        for _ in 0..32 {
            let is_slow = storm == Storm::Dribble && sent % EACH == 0;
            let frame = if is_slow { &to_slow } else { &to_receiver };
            if !sender.submit(0, &[0; 12], frame, 1) {
                break;
            }
            sent += 1;
        }
        sender.kick_tx(0);
        let before = count;
        while let Some(got) = receiver.try_recv(0) {
            count += u64::from(got[18..24] == SENDER);
        }
        while sender.try_recv(0).is_some() {}
        if count == before {
            std::thread::yield_now();
        }
    }
    count
}

/// Takes what comes, every `pause`, until `done`: no storm. Returns how many frames.
fn rest(nets: &mut [Net], pause: Duration, done: &AtomicBool) -> u64 {
    let mut count = 0;
    while !done.load(Ordering::Relaxed) {
        for net in &mut *nets {
            while net.try_recv(0).is_some() {
                count += 1;
            }
        }
        std::thread::sleep(pause);
    }
    count
}

/// Sends broadcasts until `done`. Returns how many.
fn flood(net: &mut Net, done: &AtomicBool) -> u64 {
    let broadcast = frame(BROADCAST, STORMER, 1, 200);
    let mut count = 0;
    while !done.load(Ordering::Relaxed) {
        while net.submit(0, &[0; 12], &broadcast, 1) {
            count += 1;
        }
        net.kick_tx(0);
        while net.try_recv(0).is_some() {}
        std::thread::sleep(PAUSE);
    }
    count
}

/// Sends what comes from one port to the other until `done`, beginning with one broadcast. Returns
/// how many frames.
fn turn(nets: &mut [Net; 2], done: &AtomicBool) -> u64 {
    nets[0].submit(0, &[0; 12], &frame(BROADCAST, STORMER, 1, 200), 1);
    nets[0].kick_tx(0);
    let mut count = 0;
    while !done.load(Ordering::Relaxed) {
        for from in 0..2 {
            while let Some(got) = nets[from].try_recv(0) {
                count += u64::from(nets[1 - from].submit(0, &[0; 12], &got[12..], 1));
            }
            nets[1 - from].kick_tx(0);
        }
        std::thread::sleep(PAUSE);
    }
    count
}

/// Posts one buffer at a time until `done`. Returns how many frames came.
fn dribble(net: &mut Net, done: &AtomicBool) -> u64 {
    let mut count = 0;
    // All buffers are full soon. From then on each frame needs the one that is posted here.
    while !done.load(Ordering::Relaxed) {
        count += u64::from(net.try_recv(0).is_some());
        std::thread::sleep(DRIBBLE);
    }
    count
}
