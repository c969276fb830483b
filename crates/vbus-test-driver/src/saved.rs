// SPDX-License-Identifier: Apache-2.0 OR MIT
//! For tests of devices that are saved and go on in fresh ones (spec/state-format.md).
//!
//! [`same_when_saved`] shows that the drivers of a [`World`] do not see it. [`forge`] changes a
//! state at random, and [`forged_devices`] shows that nothing of it harms a device.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};
use vbus_core::state::Document;
use vbus_core::{Bus, ConnectionState, DeviceState, Endpoint, ErrorCode};

use crate::{Memory, Random, TIMEOUT, mutate};

/// Saves the device behind `endpoint`, which stands still from then on. The state has passed
/// through its text.
pub fn save(endpoint: &Endpoint) -> DeviceState {
    endpoint.quiesce().unwrap();
    let state = endpoint.save().unwrap();
    let read = DeviceState::from_text(&state.to_text().unwrap()).unwrap();
    assert_eq!(read, state);
    read
}

/// Saves the device behind `endpoint` as for a keeper: the device goes on, and its process may be
/// killed at any time.
pub fn save_to_outlast(endpoint: &Endpoint) -> DeviceState {
    endpoint.quiesce_to_outlast(Instant::now() + TIMEOUT).unwrap();
    let state = endpoint.save().unwrap();
    endpoint.resume();
    state
}

/// Sets what passes by itself to 0 in the counters of a device's state.
pub fn still(counters: &mut Value) {
    for name in ["wakeups", "polls", "polls_empty", "moves", "stalls", "interrupts"] {
        counters[name] = json!(0);
    }
}

/// Devices and their drivers, which do the same in each world that was made alike.
pub trait World {
    /// The drivers do something.
    fn step(&mut self);

    /// All devices are saved, and fresh ones go on in their place.
    fn renew(&mut self);

    /// A device is saved and goes on itself; `n` is a random number that may choose it.
    fn save_in_vain(&mut self, n: u64);

    /// Waits for what is on its way. Returns all that the drivers have seen, in an order that does
    /// not depend on time.
    fn end(self) -> Vec<Vec<u8>>;
}

/// What the drivers see does not depend on whether their devices are saved, and go on in fresh
/// ones, after any step: for each seed, runs a world that `make` makes with that seed as it is, and
/// another one whose devices are saved at random. Panics if the two differ.
pub fn same_when_saved<W: World>(seeds: Range<u64>, steps: u32, make: impl Fn(u64) -> W) {
    for seed in seeds {
        let (mut plain, mut saved) = (make(seed), make(seed));
        let mut when = Random(!seed);
        for _ in 0..steps {
            plain.step();
            saved.step();
            let n = when.next();
            match when.below(4) {
                0 => saved.renew(),
                1 => saved.save_in_vain(n),
                _ => {}
            }
        }
        saved.renew();
        let (plain, saved) = (plain.end(), saved.end());
        let show = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        for (n, (plain, saved)) in plain.iter().zip(&saved).enumerate() {
            assert!(plain == saved, "seed {seed}, {n}: {} and {}", show(plain), show(saved));
        }
        assert_eq!(plain.len(), saved.len(), "seed {seed}: how much the drivers have seen");
    }
}

/// What became of a forged state.
#[derive(Debug)]
pub enum Verdict {
    /// It is no state that can be read.
    Unread,
    /// It was refused, for this reason.
    Refused(String),
    /// Something goes on from it.
    Taken,
}

/// Passes states to `trial` that were changed at random, as somebody who forges them does. Panics
/// if one is refused without a reason, or by a panic; or if few are refused, or few are taken,
/// because then the test would show little.
pub fn forge(original: &Value, seeds: Range<u64>, mut trial: impl FnMut(u64, Value) -> Verdict) {
    let enough = (seeds.end - seeds.start) / 15;
    let (mut refused, mut taken) = (0, 0);
    for seed in seeds {
        let mut random = Random(seed);
        let mut forged = original.clone();
        for _ in 0..=random.below(3) {
            mutate(&mut forged, &mut random);
        }
        match trial(seed, forged) {
            Verdict::Unread => {}
            Verdict::Refused(why) => {
                assert!(!why.is_empty() && !why.contains("panicked"), "seed {seed}: {why}");
                refused += 1;
            }
            Verdict::Taken => taken += 1,
        }
    }
    assert!(refused > enough && taken > enough, "{refused} refused, {taken} taken");
}

/// The state itself of a document, for [`forge`].
pub fn content<D: Document>(document: &D) -> Value {
    let mut value: Value = serde_json::from_str(&document.to_text().unwrap()).unwrap();
    value["state"].take()
}

/// The document with this content, if it can be read.
pub fn document<D: Document>(content: &Value) -> Option<D> {
    let format = vbus_core::state::FORMAT;
    let text = json!({ "format": format, "kind": D::KIND, "state": content }).to_string();
    D::from_text(&text).ok()
}

/// The tasks of a device that goes on from a forged state get their turn, and find out what they
/// can. `save` saves the device once more. Panics if a task panics.
pub fn try_out(endpoint: &Endpoint, doorbells: u32, seed: u64, save: impl FnOnce()) {
    let code = ConnectionState::Broken(ErrorCode::FAILED);
    let was = endpoint.state() == code;
    endpoint.resume();
    (0..doorbells).for_each(|number| endpoint.ring(number.into()));
    endpoint.inspect();
    endpoint.quiesce().unwrap();
    assert!(was || endpoint.state() != code, "seed {seed}: a task panicked");
    save();
    endpoint.resume();
}

/// Whatever a forged state says, it is refused, or the device that goes on from it is safe: it
/// serves its driver, ends the connection with an error code of its own, and can be closed. The
/// devices are made on `bus` with this class and these settings. `memory` is the driver's.
pub fn forged_devices(
    bus: &Bus,
    (class, settings): (&str, &Value),
    state: &DeviceState,
    memory: Option<&Memory>,
    seeds: Range<u64>,
) {
    forge(&content(state), seeds, |seed, forged| {
        let Some(state) = document::<DeviceState>(&forged) else { return Verdict::Unread };
        let endpoint: Arc<Endpoint> = bus.create_quiesced("forged", class, settings).unwrap();
        if let Some(memory) = memory {
            memory.share(&endpoint);
        }
        let verdict = match endpoint.restore(&state) {
            Err(error) => {
                assert_ne!(endpoint.state(), ConnectionState::Open, "seed {seed}");
                Verdict::Refused(error.why)
            }
            Ok(()) => Verdict::Taken,
        };
        try_out(&endpoint, 8, seed, || drop(endpoint.save()));
        endpoint.close();
        bus.remove("forged").unwrap();
        verdict
    });
}
