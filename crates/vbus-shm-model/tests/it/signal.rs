//! A sender and a receiver that sleeps: no post may be slept through.

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use std::sync::Arc;
use vbus_shm_model::signal::{Armed, BLOCK_BYTES, End, Receiver, Sender, format};
use vbus_shm_model::sync::{Edge, Fence, Place};

use crate::harness::{Kick, Shared, check, needs};

const NEAR_WRAP: u32 = u32::MAX - 1;

/// What a receiver does between two looks at `seq`.
#[derive(Clone, Copy)]
enum Style {
    /// Stays armed while it works: run to completion, then arm and sleep.
    RunToCompletion,
    /// Disarms on waking, looks again without a kick, then arms and sleeps.
    DisarmAndPoll,
    /// Arms for the last post only, disarms and arms again while posts come in.
    Moderate,
}

/// Posts of `batches`, each kept in a word of its own that has to be visible with it.
fn model(style: Style, start: u32, batches: &'static [u32]) {
    let memory = Shared::new(BLOCK_BYTES / 8);
    format(&memory, 0, start).unwrap();
    let data = Arc::new(AtomicU64::new(0));
    let kick = Kick::new();
    let mut tx = Sender::new(memory.clone(), 0, End::Driver, start).unwrap();
    let mut rx = Receiver::new(memory, 0, End::Device).unwrap();
    let total: u32 = batches.iter().sum();

    let sender = thread::spawn({
        let (data, kick) = (data.clone(), kick.clone());
        move || {
            let (mut posted, mut kicks) = (0, 0);
            for n in batches {
                posted += n;
                data.store(u64::from(posted), Ordering::Relaxed);
                if tx.post(*n) {
                    kicks += 1;
                    kick.kick();
                }
            }
            kicks
        }
    });

    let mut arms = 0;
    loop {
        let seen = rx.seen();
        let count = seen.wrapping_sub(start);
        assert!(
            data.load(Ordering::Relaxed) >= u64::from(count),
            "the post was seen before its data"
        );
        if count == total {
            break;
        }
        arms += 1;
        let armed = match style {
            Style::RunToCompletion | Style::DisarmAndPoll => rx.arm(seen),
            Style::Moderate => {
                let _ = rx.arm(seen);
                rx.disarm();
                arms += 1;
                rx.arm(start.wrapping_add(total - 1))
            }
        };
        if armed == Armed::Waiting {
            kick.wait();
        }
        if matches!(style, Style::DisarmAndPoll) {
            rx.disarm();
        }
    }
    let kicks = sender.join().unwrap();
    assert!(kicks <= arms, "{kicks} kicks for {arms} arms");
}

#[test]
fn run_to_completion() {
    check(4, || model(Style::RunToCompletion, 0, &[1, 1]));
    check(3, || model(Style::RunToCompletion, NEAR_WRAP, &[1, 2, 1]));
}

#[test]
fn disarm_and_poll() {
    check(4, || model(Style::DisarmAndPoll, 0, &[1, 1]));
    check(3, || model(Style::DisarmAndPoll, NEAR_WRAP, &[1, 2, 1]));
}

#[test]
fn moderation() {
    check(4, || model(Style::Moderate, 0, &[1, 1]));
    check(3, || model(Style::Moderate, NEAR_WRAP, &[1, 2, 1]));
}

const PLACES: [Place; 4] = [
    Place::Fence(Fence::Post),
    Place::Fence(Fence::Arm),
    Place::Publish(Edge::Seq),
    Place::Observe(Edge::Seq),
];

#[test]
fn run_to_completion_needs_each_place() {
    needs(&PLACES, 3, || model(Style::RunToCompletion, NEAR_WRAP, &[1, 2]));
}

#[test]
fn disarm_and_poll_needs_each_place() {
    needs(&PLACES, 3, || model(Style::DisarmAndPoll, NEAR_WRAP, &[1, 2]));
}

#[test]
fn moderation_needs_each_place() {
    needs(&PLACES, 3, || model(Style::Moderate, NEAR_WRAP, &[1, 2]));
}
