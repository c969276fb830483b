// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A sender, and a receiver that sleeps. The receiver must not sleep while a post is there.

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use std::sync::Arc;
use vbus_shm_model::signal::{Armed, BLOCK_BYTES, Receiver, Sender, end, format};
use vbus_shm_model::sync::{Edge, Fence, Place};

use crate::harness::{Kick, Shared, check, needs};

/// Just below the wrap-around of the positions in `arm`, and of those in `seq`.
const NEAR_WRAP: [u64; 2] = [(1 << 63) - 2, u64::MAX - 1];

/// What a receiver does between two loads of `seq`.
#[derive(Clone, Copy)]
enum Style {
    /// Stays armed while it works. When it has no more work it arms and sleeps.
    RunToCompletion,
    /// Disarms when it wakes up, polls, then arms and sleeps.
    DisarmAndPoll,
    /// Disarms and arms again while posts come. Its second position is the last post.
    Moderate,
}

/// The sender makes posts of `batches`. Before each post it writes the total to a word. The
/// receiver must see that word with the post.
fn model(style: Style, start: u64, batches: &'static [u32]) {
    let memory = Shared::new(BLOCK_BYTES / 8);
    format(&memory, 0, start).unwrap();
    let data = Arc::new(AtomicU64::new(0));
    let kick = Kick::new();
    let mut tx = Sender::new(memory.clone(), 0, end::Driver, start).unwrap();
    let mut rx = Receiver::new(memory, 0, end::Device).unwrap();
    let total = batches.iter().copied().map(u64::from).sum();

    let sender = thread::spawn({
        let (data, kick) = (data.clone(), kick.clone());
        move || {
            let (mut posted, mut kicks) = (0, 0);
            for n in batches {
                posted += u64::from(*n);
                data.store(posted, Ordering::Relaxed);
                if tx.post(*n).is_wanted() {
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
        assert!(data.load(Ordering::Relaxed) >= count, "the post was seen before its data");
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
    for start in NEAR_WRAP {
        check(3, move || model(Style::RunToCompletion, start, &[1, 2, 1]));
    }
}

#[test]
fn disarm_and_poll() {
    check(4, || model(Style::DisarmAndPoll, 0, &[1, 1]));
    for start in NEAR_WRAP {
        check(3, move || model(Style::DisarmAndPoll, start, &[1, 2, 1]));
    }
}

#[test]
fn moderation() {
    check(4, || model(Style::Moderate, 0, &[1, 1]));
    for start in NEAR_WRAP {
        check(3, move || model(Style::Moderate, start, &[1, 2, 1]));
    }
}

const PLACES: [Place; 4] = [
    Place::Fence(Fence::Post),
    Place::Fence(Fence::Arm),
    Place::Publish(Edge::Seq),
    Place::Observe(Edge::Seq),
];

#[test]
fn run_to_completion_needs_each_place() {
    needs(&PLACES, 3, || model(Style::RunToCompletion, NEAR_WRAP[0], &[1, 2]));
}

#[test]
fn disarm_and_poll_needs_each_place() {
    needs(&PLACES, 3, || model(Style::DisarmAndPoll, NEAR_WRAP[0], &[1, 2]));
}

#[test]
fn moderation_needs_each_place() {
    needs(&PLACES, 3, || model(Style::Moderate, NEAR_WRAP[0], &[1, 2]));
}
