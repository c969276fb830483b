// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Signals: how many kicks posts cost, and what a ping-pong between sleeping processes costs over
//! that of bare eventfds.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, Command};
use std::sync::Barrier;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{read, write};
use vbus_shm::signal::{
    ARM_ENABLED, Armed, BLOCK_BYTES, DEVICE_ARM, Receiver, Sender, Signal, end, format,
};
use vbus_shm::sync::Word;

use crate::duel::{nanoseconds, pin};
use crate::region::Region;
use crate::samples::Samples;

pub fn sample(samples: &mut Samples) {
    samples.rounds(|round| {
        for (name, load) in [("busy", Load::Busy), ("slow", Load::Slow), ("idle", Load::Idle)] {
            round.add(format!("signal/kicks_per_1000/{name}"), kicks(load));
        }
        round.add("signal/blocked/eventfd".into(), blocked(Mode::Eventfd));
        round.add("signal/blocked/vbus".into(), blocked(Mode::Vbus));
    });
}

fn event() -> OwnedFd {
    // Without CLOEXEC: the other process inherits it.
    eventfd(0, EventfdFlags::empty()).expect("eventfd")
}

fn kick(event: &OwnedFd) {
    write(event, &1_u64.to_ne_bytes()).expect("a kick");
}

fn wait(event: &OwnedFd) {
    read(event, &mut [0; 8]).expect("a wait");
}

fn spin(time: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < time {
        std::hint::spin_loop();
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Load {
    /// A post each microsecond to a receiver that keeps up, and looks again for 50 us before it
    /// sleeps.
    Busy,
    /// A post each microsecond to a receiver that needs two for each, and sleeps at once when it
    /// has nothing to do.
    Slow,
    /// Each post finds the receiver asleep.
    Idle,
}

/// Kicks per 1,000 posts.
fn kicks(load: Load) -> f64 {
    let posts: u64 = if load == Load::Idle { 1000 } else { 10_000 };
    let memory = Region::new(BLOCK_BYTES).words();
    format(&memory, 0, 0).expect("it fits");
    let mut tx = Sender::new(memory, 0, end::Driver, 0).expect("it fits");
    let mut rx = Receiver::new(memory, 0, end::Device).expect("it fits");
    let (event, start) = (&event(), &Barrier::new(2));
    std::thread::scope(|scope| {
        scope.spawn(move || {
            pin(1);
            start.wait();
            let (mut taken, mut quiet) = (0_u64, Instant::now());
            while taken != posts {
                let seen = rx.seen();
                if seen != taken {
                    if load == Load::Slow {
                        spin(Duration::from_micros(2));
                        taken = taken.wrapping_add(1);
                    } else {
                        taken = seen;
                    }
                    quiet = Instant::now();
                } else if load == Load::Busy && quiet.elapsed() < Duration::from_micros(50) {
                    std::hint::spin_loop();
                } else if rx.arm(taken) == Armed::Waiting {
                    wait(event);
                    rx.disarm();
                }
            }
        });
        let sender = scope.spawn(move || {
            pin(0);
            start.wait();
            let mut kicks = 0_u32;
            for post in 0..posts {
                if load == Load::Idle {
                    let asleep = ARM_ENABLED | post;
                    while memory[DEVICE_ARM / 8].load(Ordering::Relaxed) != asleep {
                        std::hint::spin_loop();
                    }
                } else {
                    spin(Duration::from_micros(1));
                }
                if tx.post(1).is_wanted() {
                    kicks += 1;
                    kick(event);
                }
            }
            kicks
        });
        f64::from(sender.join().expect("the sender does not panic")) * 1000.0 / posts as f64
    })
}

#[derive(Clone, Copy)]
enum Mode {
    Eventfd,
    Vbus,
}

const BLOCKED_ROUNDS: u64 = 300;

/// What both processes have.
struct Shared {
    memory: Region,
    to_far: OwnedFd,
    to_near: OwnedFd,
}

/// Nanoseconds per round trip between two processes on a core each that sleep whenever they wait.
fn blocked(mode: Mode) -> f64 {
    let (memory, file) = Region::with_file(BLOCK_BYTES);
    format(&memory.words(), 0, 0).expect("it fits");
    let shared = Shared { memory, to_far: event(), to_near: event() };
    let mut peer = spawn_peer(mode, &file, &shared);
    pin(0);
    // The peer's first kick says that it is there.
    wait(&shared.to_near);
    let begun = Instant::now();
    match mode {
        Mode::Eventfd => {
            for _ in 0..BLOCKED_ROUNDS {
                kick(&shared.to_far);
                wait(&shared.to_near);
            }
        }
        Mode::Vbus => {
            let mut signal = Signal::new(memory.words(), 0, end::Driver, 0).expect("it fits");
            for round in 0..BLOCKED_ROUNDS {
                if signal.tx.post(1).is_wanted() {
                    kick(&shared.to_far);
                }
                await_post(&mut signal, round, &shared.to_near);
            }
        }
    }
    let time = nanoseconds(begun);
    assert!(peer.wait().expect("the peer can be waited for").success());
    time / BLOCKED_ROUNDS as f64
}

/// Sleeps until post number `at` is there.
fn await_post<E: end::End>(signal: &mut Signal<&[Word], E>, at: u64, event: &OwnedFd) {
    while signal.rx.seen() == at {
        if signal.rx.arm(at) == Armed::Waiting {
            wait(event);
        }
    }
}

fn spawn_peer(mode: Mode, file: &OwnedFd, shared: &Shared) -> Child {
    let mode = match mode {
        Mode::Eventfd => "eventfd",
        Mode::Vbus => "vbus",
    };
    let descriptors = [file, &shared.to_far, &shared.to_near].map(|fd| fd.as_raw_fd().to_string());
    let program = std::env::current_exe().expect("the path of this program");
    Command::new(program).args(["--peer", mode]).args(descriptors).spawn().expect("another process")
}

/// The other process of [`blocked`].
pub fn peer(arguments: &[String]) {
    pin(1);
    let descriptor = |n: usize| -> OwnedFd {
        let raw = arguments[n].parse().expect("a descriptor");
        // SAFETY: inherited for this process alone to own.
        unsafe { OwnedFd::from_raw_fd(raw) }
    };
    let memory = Region::map(&descriptor(1), BLOCK_BYTES);
    let shared = Shared { memory, to_far: descriptor(2), to_near: descriptor(3) };
    if arguments[0] == "eventfd" {
        kick(&shared.to_near);
        for _ in 0..BLOCKED_ROUNDS {
            wait(&shared.to_far);
            kick(&shared.to_near);
        }
        return;
    }
    let mut signal = Signal::new(shared.memory.words(), 0, end::Device, 0).expect("it fits");
    let _ = signal.rx.arm(0);
    kick(&shared.to_near);
    for round in 0..BLOCKED_ROUNDS {
        await_post(&mut signal, round, &shared.to_far);
        if signal.tx.post(1).is_wanted() {
            kick(&shared.to_near);
        }
    }
}
