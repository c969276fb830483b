// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What does a small frame cost in the back end `tap`, beside a bare loop of system calls on a TAP
//! interface?
//!
//! `cargo xtask bench tap` runs this. It makes a network of its own, with two TAP interfaces: one
//! for a NIC of vbus whose driver is in this process, and one for the bare loops. A round carries
//! the same number of frames in each way. It prints the median of each way, and the medians of the
//! ratios of one round. Arguments: `--json`, `--rounds N`, and `--realtime` for a machine that has
//! other work.
#![allow(dead_code, unused_imports)] // The driver is that of the tests.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "as in a test")]

#[path = "../../tests/it/driver.rs"]
mod driver;
mod loops;
mod network;
mod priority;
mod ring;
mod stage;

use serde_json::{Map, json};

use stage::{Direction, FRAMES, Stage, Way};

fn main() -> Result<(), String> {
    let (mut json, mut rounds) = (false, 300);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--json" => json = true,
            "--realtime" => priority::realtime()?,
            "--rounds" => {
                let number = arguments.next().and_then(|text| text.parse().ok());
                rounds = number
                    .filter(|n| (1..=100_000).contains(n))
                    .ok_or("--rounds takes a number from 1 to 100000")?;
            }
            other => {
                let known = "--json, --realtime and --rounds N";
                return Err(format!("no argument {other:?}; there are {known}"));
            }
        }
    }
    let mut stage = match network::enter().and_then(|()| Stage::new()) {
        Ok(stage) => stage,
        Err(why) => {
            eprintln!("skipped: {why}");
            if json {
                println!("{}", json!({ "skipped": why }));
            }
            return Ok(());
        }
    };
    let ways = stage.ways();
    let mut figures = Map::new();
    let entry = loops::entry_ns(&stage.bare);
    figures.insert("tap_call_without_a_frame_ns".into(), json!(entry.round()));
    if !json {
        println!("{rounds} rounds of {FRAMES} frames of 64 bytes, in ns a frame (medians)");
        println!("a read that finds no frame: {entry:.0} ns");
    }
    for direction in [Direction::Out, Direction::In] {
        let samples = stage.measure(direction, &ways, rounds)?;
        let calls: &[f64] = samples.first().map_or(&[], Vec::as_slice);
        for (way, samples) in ways.iter().zip(&samples) {
            let ns = median(samples.clone());
            let ratio = median(calls.iter().zip(samples).map(|(calls, ns)| calls / ns).collect());
            let key = format!("tap_{}_{}", direction.key(), way.key());
            figures.insert(format!("{key}_ns"), json!(ns.round()));
            figures.insert(format!("{key}_vs_calls"), json!((ratio * 100.0).round() / 100.0));
            if !json {
                println!(
                    "{:28} {:34} {ns:6.0}   {:.2} million a second, {ratio:.2} of the bare loop's",
                    direction.what(),
                    way.what(),
                    1e3 / ns,
                );
            }
        }
    }
    if !ways.contains(&Way::Ring { batch: 32 }) {
        let why = stage.no_ring.as_deref().unwrap_or("it is not there");
        eprintln!("io_uring is not measured: {why}");
        figures.insert("tap_ring_skipped".into(), json!(why));
    }
    if json {
        println!("{}", serde_json::Value::Object(figures));
    }
    Ok(())
}

/// The median; 0 for no samples.
fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(0.0)
}
