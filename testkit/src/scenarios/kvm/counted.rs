// SPDX-License-Identifier: Apache-2.0 OR MIT
//! L1 on one processor with a clock that counts instructions: figures repeat.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::flat;
use crate::l1::{Clock, L1};
use crate::report::Figures;

/// The largest relative difference between the figures of two runs. Timer interrupts of L1's kernel
/// fall at other places in each run: a doorbell by PIO, the cheapest, has differed by 1.1 %.
const APART: f64 = 0.03;

/// Measures a doorbell in two separate virtual machines. The nanoseconds are nearly the same.
pub fn repeats(l1: &L1, figures: &mut Figures) -> Result<()> {
    let run = |number: u32| -> Result<Figures> {
        let scene = l1.lab().scene(&format!("kvm-counted-{number}"))?;
        let counted = L1::start(scene, Clock::Instructions, &[])?;
        let mut figures = Figures::new();
        let measured = flat::doorbells(&counted, &mut figures);
        if measured.is_err() {
            if counted.hung() {
                l1.note_hang();
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
        ensure!((one - other).abs() <= APART * one, "{name} was {one} first and {other} then");
        times.insert(name.clone(), json!(one));
    }
    ensure!(!times.is_empty(), "nothing was measured");
    figures.insert("by_instructions".into(), times.into());
    Ok(())
}
