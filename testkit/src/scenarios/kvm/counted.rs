// SPDX-License-Identifier: Apache-2.0 OR MIT
//! L1 on one processor with a clock that counts instructions: figures nearly repeat.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::flat;
use crate::l1::{Clock, L1};
use crate::report::Figures;

/// The largest factor between the figures of two runs. Usually they differ by 1 % at most. But the
/// test kit's own requests to L1 come by the host's clock, and more of them fall into a measurement
/// if the host is slow: each takes a millisecond at most, and a measurement 10 to 20.
const APART: f64 = 2.0;

/// Measures a doorbell in two separate virtual machines. The nanoseconds are nearly the same.
pub fn repeats(l1: &L1, figures: &mut Figures) -> Result<()> {
    let run = |number: u32| -> Result<Figures> {
        let scene = l1.lab().scene(&format!("kvm-counted-{number}"))?;
        let counted = L1::start(scene, Clock::Instructions, &[])?;
        let mut figures = Figures::new();
        let measured = flat::doorbells(&counted, &mut figures);
        if measured.is_err() {
            if let Some(proof) = counted.proof() {
                l1.prove(proof);
            }
            eprintln!("logs: {}", counted.save_logs()?.display());
        }
        measured.map(|()| figures)
    };
    let (first, second) = (run(1)?, run(2)?);
    let mut times = Figures::new();
    for (name, value) in first.iter().filter(|(name, _)| name.starts_with("ns_")) {
        let number = |value: &serde_json::Value| {
            value.as_f64().with_context(|| format!("{name} is {value}"))
        };
        let (one, other) = (number(value)?, number(&second[name])?);
        eprintln!("{name}: {one} and {other}");
        ensure!(
            one <= APART * other && other <= APART * one,
            "{name} was {one} first and {other} then"
        );
        times.insert(name.clone(), json!(one));
    }
    ensure!(!times.is_empty(), "nothing was measured");
    figures.insert("by_instructions".into(), times.into());
    Ok(())
}
