// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What does a storm on a switch cost the ports beside it?
//!
//! `cargo xtask bench bystanders` runs this. Two drivers on a switch exchange frames without a
//! pause, alone and beside each storm by turns. It prints the part of their rate that they keep:
//! the median of the pairs of rounds, and between what half of the pairs lie.
//! Arguments: `--json`, and `--rounds N` for each storm.
#![allow(dead_code, unused_imports)] // The driver is that of the tests.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "as in a test")]

#[path = "../../tests/it/driver.rs"]
mod driver;
mod stage;

use std::time::Duration;

use stage::{Storm, measure};

const ROUND: Duration = Duration::from_millis(200);

fn main() -> Result<(), String> {
    let (mut json, mut rounds) = (false, 20);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--json" => json = true,
            "--rounds" => {
                let number = arguments.next().and_then(|text| text.parse().ok());
                rounds = number
                    .filter(|n| (1..=10_000).contains(n))
                    .ok_or("--rounds takes a number from 1 to 10000")?;
            }
            other => return Err(format!("no argument {other:?}; there are --json and --rounds N")),
        }
    }
    let mut all = Vec::new();
    if !json {
        println!("Frames of two bystanders beside a storm, over those without it");
    }
    for storm in Storm::ALL {
        let measured = measure(storm, rounds, ROUND);
        let (ratio, [low, high]) = measured.ratio();
        if json {
            let (calm, stormy): (Vec<_>, Vec<_>) = measured.pairs.into_iter().unzip();
            all.push(serde_json::json!({
                "storm": storm.what(), "ratio": ratio, "half_within": [low, high],
                "calm": calm, "stormy": stormy, "frames_of_the_storm": measured.storm,
            }));
        } else {
            println!(
                "{:32} {ratio:.3}   {low:.3}..{high:.3}   {} frames of the storm",
                storm.what(),
                measured.storm
            );
        }
    }
    if json {
        println!("{}", serde_json::json!({ "storms": all }));
    }
    Ok(())
}
