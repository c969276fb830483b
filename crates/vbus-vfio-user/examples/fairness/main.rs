// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How long can one client keep the device of another waiting?
//!
//! `cargo xtask bench fairness` runs this. For each expensive thing that a client can ask for by
//! messages of vfio-user, it prints the longest round trip of a device on the same worker.
//! Arguments: `--json`, `--seconds N` for each attack, and names of attacks.

mod attacks;
mod echo;
mod stage;

use std::time::Duration;

use attacks::ATTACKS;
use stage::{Until, measure};

fn main() -> Result<(), String> {
    let (mut json, mut seconds, mut names) = (false, 2.0, Vec::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--json" => json = true,
            "--seconds" => {
                let number = arguments.next().and_then(|text| text.parse().ok());
                seconds = number
                    .filter(|s| (0.1..=3600.0).contains(s))
                    .ok_or("--seconds takes the seconds of each attack, from 0.1 to 3600")?;
            }
            name if ATTACKS.iter().any(|attack| attack.name == name) => {
                names.push(name.to_owned());
            }
            other => {
                let known: Vec<_> = ATTACKS.iter().map(|attack| attack.name).collect();
                return Err(format!("no attack {other:?}; there are {}", known.join(", ")));
            }
        }
    }
    let until = Until { time: Duration::from_secs_f64(seconds), operations: 0, round_trips: 100 };
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let mut all = Vec::new();
    if !json {
        println!("Round trips of a device while another client of the same worker is hostile, ms");
        println!(
            "{:20} {:>10} {:>10} {:>10} {:>12}",
            "attack", "median", "99.9 %", "longest", "operations"
        );
    }
    for attack in ATTACKS.iter().filter(|a| names.is_empty() || names.iter().any(|n| n == a.name)) {
        let found = measure(attack, until);
        let (median, p999, longest) = (ms(found.median), ms(found.p999), ms(found.longest));
        if json {
            all.push(serde_json::json!({
                "attack": attack.name, "what": attack.what, "operations": found.operations,
                "round_trips": found.round_trips, "median_ms": median, "p999_ms": p999,
                "longest_ms": longest,
            }));
        } else {
            println!(
                "{:20} {median:10.3} {p999:10.3} {longest:10.3} {:>12}   {}",
                attack.name, found.operations, attack.what
            );
        }
    }
    if json {
        println!("{}", serde_json::json!({ "attacks": all }));
    }
    Ok(())
}
