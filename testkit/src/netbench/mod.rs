// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compares NICs in one guest and one run: those of vbus, and QEMU's virtio-net on TAP.
//!
//! The contenders take turns, and each round begins with another one. A ratio is that of two
//! figures of one round. So other work of the machine slows both.

mod contender;
mod exits;
mod figures;
mod instructions;
mod traffic;

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Map, Value, json};

use crate::l1::{Clock, L1};
use crate::lab::{Lab, Scene};
use crate::tap::Server;
use crate::vm::Processor;
use contender::{Contender, Rig};
use exits::Costs;
use figures::{Rounds, Spread, round};
use traffic::{Traffic, measure};

/// What to measure.
#[derive(Clone)]
pub struct Spec {
    /// Seconds of each measurement.
    pub seconds: u32,
    /// Rounds, in each of which everything is measured once.
    pub rounds: u32,
    /// The numbers of queue pairs, each in a guest with as many CPUs.
    pub queues: Vec<u32>,
    /// Whether to count the guest's instructions.
    pub instructions: bool,
    /// Whether to count exits, on a real KVM.
    pub exits: bool,
}

/// What was measured.
pub struct Report {
    figures: Map<String, Value>,
    text: String,
}

impl Report {
    /// Everything as one JSON object. Keys that begin with `net_` and end in `_vs_virtio` are
    /// ratios to virtio-net: of figures, above 1 means that vbus is ahead; of costs per packet,
    /// below 1 does.
    pub fn json(self) -> Value {
        self.figures.into()
    }

    /// Everything as tables.
    pub fn text(&self) -> &str {
        &self.text
    }
}

/// Measures everything.
///
/// # Errors
/// A guest or a bus does not start, or a measurement fails. It is a [`Skip`](crate::report::Skip)
/// if this machine has no TAP.
pub fn run(lab: &Lab, spec: &Spec) -> Result<Report> {
    let mut report = Report { figures: Map::new(), text: String::new() };
    let mut details = Map::new();
    for (at, &queues) in spec.queues.iter().enumerate() {
        let scene = lab.scene(&format!("net-{queues}"))?;
        let rounds = keep_logs(&scene, |scene| compare(scene, spec, queues))?;
        if at == 0 {
            headlines(&rounds, &mut report.figures);
        }
        report.text += &format!("{queues} queue pairs, {queues} CPUs\n{}\n", rounds.table());
        details.insert(format!("queues_{queues}"), rounds.json());
    }
    if spec.instructions {
        let scene = lab.scene("net-instructions")?;
        let counts = keep_logs(&scene, |scene| count_instructions(scene, spec.rounds))?;
        details.insert("instructions_per_packet".into(), counts.json());
        report.text += &counts.table();
        let ours = Contender::Program;
        if let Some(ratio) = counts.against_virtio(ours) {
            report.figures.insert(key(ours, "insn_per_packet"), round(ratio).into());
        }
    }
    if spec.exits {
        let l1 = L1::start(lab.scene("net-exits")?, Clock::Time, &[])?;
        let costs = Costs::measure(&l1).map_err(|error| match l1.save_logs() {
            Ok(logs) => error.context(format!("logs: {}", logs.display())),
            Err(_) => error,
        })?;
        details.insert("exits".into(), costs.json());
        report.text += &costs.table();
        if let Some(ratio) = costs.program_against_virtio() {
            report.figures.insert(key(Contender::Program, "exits_per_packet"), round(ratio).into());
        }
    }
    report.figures.insert("details".into(), details.into());
    Ok(report)
}

/// Runs something in a scene. If it fails, the error says where the logs are.
fn keep_logs<T>(scene: &Scene, run: impl FnOnce(&Scene) -> Result<T>) -> Result<T> {
    run(scene).map_err(|error| match scene.save_logs() {
        Ok(logs) => error.context(format!("logs: {}", logs.display())),
        Err(_) => error,
    })
}

/// The key of a ratio to virtio-net.
fn key(contender: Contender, what: &str) -> String {
    match contender {
        Contender::Program => format!("net_program_{what}_vs_virtio"),
        Contender::VirtioNet => format!("net_virtio_{what}_vs_virtio"),
    }
}

/// The ratios that stand for all others.
fn headlines(rounds: &Rounds, figures: &mut Map<String, Value>) {
    for contender in Contender::ALL {
        if contender == Contender::VirtioNet {
            continue;
        }
        let mut enter = |what: &str, ratio: Option<f64>| {
            if let Some(ratio) = ratio {
                figures.insert(key(contender, what), round(ratio).into());
            }
        };
        let ratio = |traffic| Some(rounds.against_virtio(traffic, contender)?.median);
        for traffic in Traffic::ALL {
            enter(traffic.name(), ratio(traffic));
        }
        // The worse one of both ways.
        for (name, out, back) in [
            ("udp64", Traffic::Udp64Out, Traffic::Udp64In),
            ("udp1472", Traffic::Udp1472Out, Traffic::Udp1472In),
        ] {
            enter(name, ratio(out).zip(ratio(back)).map(|(out, back)| out.min(back)));
        }
        let all = [Traffic::TcpOut, Traffic::TcpIn, Traffic::Udp64Out, Traffic::Udp64In];
        enter("irqs_per_packet", rounds.interrupts_against_virtio(&all, contender));
    }
}

/// Compares the contenders in one guest.
fn compare(scene: &Scene, spec: &Spec, queues: u32) -> Result<Rounds> {
    let rig = Rig::start(scene, contender::Spec { queues, processor: Processor::Lab })?;
    let server = Server::start(scene)?;
    let mut rounds = Rounds::default();
    for number in 0..spec.rounds {
        rounds.begin();
        for traffic in Traffic::ALL {
            let mut said = Vec::new();
            for nic in in_turn(&rig.nics, number) {
                let measured = measure(&server, &rig.vm.guest, nic, traffic, spec.seconds, queues)?;
                rounds.enter(traffic, nic.contender, measured);
                said.push(format!("{} {}", nic.contender.about(), round(measured.figure)));
            }
            eprintln!(
                "{queues} queue pairs, round {} of {}: {} in {}: {}",
                number + 1,
                spec.rounds,
                traffic.name(),
                traffic.unit(),
                said.join(", ")
            );
        }
    }
    rig.vm.power_off()?;
    Ok(rounds)
}

/// All of them, beginning with another one in each round.
fn in_turn<T>(all: &[T], round: u32) -> impl Iterator<Item = &T> {
    let skip = round as usize % all.len().max(1);
    all.iter().cycle().skip(skip).take(all.len())
}

/// Instructions per packet, by traffic and contender.
#[derive(Default)]
struct Counts(BTreeMap<(Traffic, Contender), Vec<f64>>);

impl Counts {
    fn median(&self, traffic: Traffic, contender: Contender) -> Option<f64> {
        Some(Spread::of(self.0.get(&(traffic, contender))?.clone())?.median)
    }

    /// The ratio to virtio-net of all kinds of traffic together.
    fn against_virtio(&self, contender: Contender) -> Option<f64> {
        let sum = |contender| -> Option<f64> {
            instructions::KINDS.iter().map(|traffic| self.median(*traffic, contender)).sum()
        };
        Some(sum(contender)? / sum(Contender::VirtioNet)?)
    }

    fn json(&self) -> Value {
        let mut all = Map::new();
        for (traffic, contender) in self.0.keys() {
            let median = self.median(*traffic, *contender).map(round);
            let row = all.entry(traffic.name()).or_insert_with(|| json!({}));
            row[contender.name()] = median.into();
        }
        all.into()
    }

    fn table(&self) -> String {
        let mut text = "guest instructions per packet\n".to_owned();
        for (traffic, contender) in self.0.keys() {
            let median = self.median(*traffic, *contender).map_or(0.0, round);
            text += &format!("{:12} {:20} {median:>12}\n", traffic.name(), contender.about());
        }
        text
    }
}

/// Counts the guest's instructions for a packet of each contender.
fn count_instructions(scene: &Scene, rounds: u32) -> Result<Counts> {
    let mut rig = Rig::start(scene, contender::Spec { queues: 1, processor: Processor::Counted })?;
    let _server = Server::start(scene)?;
    let mut counts = Counts::default();
    for number in 0..rounds {
        for traffic in instructions::KINDS {
            let mut said = Vec::new();
            for at in 0..rig.nics.len() {
                let contender = rig.nics[at].contender;
                let count = instructions::measure(&mut rig, at, traffic)?;
                counts.0.entry((traffic, contender)).or_default().push(count);
                said.push(format!("{} {}", contender.about(), round(count)));
            }
            eprintln!(
                "instructions per packet, round {} of {rounds}: {}: {}",
                number + 1,
                traffic.name(),
                said.join(", ")
            );
        }
    }
    rig.vm.power_off()?;
    Ok(counts)
}
