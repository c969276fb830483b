// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How long the devices of a guest pause when the bus is upgraded (spec/take-over.md).

use std::fmt::Write;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::lab::Lab;
use crate::linux;
use crate::wire::Wire;

/// The devices of the guest.
pub const DEVICES: usize = 16;

/// What the pause may be.
pub const GOAL: Duration = Duration::from_millis(50);

/// Bytes each way that pass between two upgrades under load.
const FLOW: u64 = 1 << 20;

/// The bounds of the histogram's bars, in milliseconds.
const BOUNDS: [u64; 9] = [1, 2, 5, 10, 20, 50, 100, 200, 500];

/// The pauses of some upgrades, in order of length.
pub struct Pauses {
    /// What they were measured under.
    pub what: &'static str,
    times: Vec<Duration>,
}

/// Upgrades the bus so many times under a guest with [`DEVICES`] NICs by the Linux driver, all open
/// and up: while none has traffic, and while two of them carry TCP both ways.
///
/// # Errors
/// A guest or a bus does not start, an upgrade fails, or data are lost.
pub fn measure(lab: &Lab, upgrades: u32) -> Result<Vec<Pauses>> {
    let scene = lab.scene("pauses")?;
    let system = linux::chosen_system(&scene)?;
    let names: Vec<String> = (2..DEVICES).map(|number| format!("more-{number}")).collect();
    let more: Vec<_> =
        names.iter().map(|name| (name.as_str(), "venet", "backend = \"switch\"")).collect();
    let patient = ["backpressure-ms = 60000"; 2];
    let mut wire = Wire::start_with(&scene, &system, patient, &more, |mut machine| {
        machine.slots = DEVICES;
        machine.memory_mib = 768;
        machine
    })?;
    linux::insert(wire.guest(), "")?;
    wire.up()?;
    for slot in 2..DEVICES {
        let name = linux::interface(wire.guest(), slot)?;
        wire.guest().ok(&format!("ip link set {name} up"))?;
    }
    let mut all = Vec::new();
    for (what, loaded) in [("no traffic", false), ("TCP both ways", true)] {
        let load = loaded.then(|| wire.load()).transpose()?;
        let mut times = Vec::new();
        for upgrade in 1..=upgrades {
            if loaded {
                wire.flow(FLOW)?;
            }
            let pause = wire.bus.take_over();
            times.push(pause.with_context(|| format!("{what}, upgrade {upgrade}"))?);
        }
        times.sort();
        all.push(Pauses { what, times });
        load.map(|load| load.end()).transpose()?;
    }
    wire.exchange(FLOW).context("after the upgrades")?;
    linux::check_kernel(wire.guest())?;
    ensure!(!all.is_empty(), "no upgrades");
    Ok(all)
}

impl Pauses {
    fn at(&self, part: f64) -> Duration {
        let last = self.times.len().saturating_sub(1);
        // The number of a time is small.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let at = (last as f64 * part).round() as usize;
        self.times.get(at).copied().unwrap_or_default()
    }

    /// The histogram, and the main figures beside the [goal](GOAL).
    pub fn text(&self) -> String {
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        let mut text = format!(
            "{DEVICES} devices, {}, {} upgrades: median {:.1} ms, 95 of 100 below {:.1} ms, \
             longest {:.1} ms ({:.2} of the goal of {} ms)\n",
            self.what,
            self.times.len(),
            millis(self.at(0.5)),
            millis(self.at(0.95)),
            millis(self.at(1.0)),
            self.at(1.0).as_secs_f64() / GOAL.as_secs_f64(),
            GOAL.as_millis(),
        );
        let mut from = 0;
        for to in BOUNDS.into_iter().chain([u64::MAX]) {
            let range = Duration::from_millis(from)..Duration::from_millis(to);
            let count = self.times.iter().filter(|time| range.contains(time)).count();
            if count > 0 {
                let bounds = match to {
                    u64::MAX => format!("from {from} ms"),
                    to => format!("{from} to {to} ms"),
                };
                let _ = writeln!(text, "  {bounds:>14}  {count:>4}  {}", "#".repeat(count));
            }
            from = to;
        }
        text
    }

    /// The same for programs. Times are in milliseconds.
    pub fn json(&self) -> Value {
        let millis = |time: Duration| (time.as_secs_f64() * 1e5).round() / 1e2;
        json!({
            "load": self.what,
            "upgrades": self.times.len(),
            "median_ms": millis(self.at(0.5)),
            "p95_ms": millis(self.at(0.95)),
            "max_ms": millis(self.at(1.0)),
            "max_vs_goal": (self.at(1.0).as_secs_f64() / GOAL.as_secs_f64() * 1e3).round() / 1e3,
            "pauses_ms": self.times.iter().map(|time| millis(*time)).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_histogram_has_each_pause_once_and_the_figures_are_those_of_the_pauses() {
        let times = [1, 3, 4, 60, 900].map(Duration::from_millis).to_vec();
        let pauses = Pauses { what: "nothing", times };
        let text = pauses.text();
        assert!(text.contains("median 4.0 ms") && text.contains("longest 900.0 ms (18.00 of"));
        let bars: Vec<&str> = text.lines().skip(1).map(str::trim).collect();
        assert_eq!(
            bars,
            [
                "1 to 2 ms     1  #",
                "2 to 5 ms     2  ##",
                "50 to 100 ms     1  #",
                "from 500 ms     1  #",
            ]
        );
        assert_eq!(pauses.json()["max_vs_goal"], 18.0);
    }
}
