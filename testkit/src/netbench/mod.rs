// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compares NICs in one guest and one run, all on TAP: vbus's by the kernel module and by the guest
//! program, the class `virtio-net` over vfio-user and over vhost-user, and QEMU's virtio-net.
//!
//! The contenders take turns, and each round begins with another one. A ratio is that of two
//! figures of one round. So other work of the machine slows both.

mod chart;
mod contender;
pub mod exits;
mod figures;
mod instructions;
mod traffic;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use serde_json::{Map, Value, json};

use crate::l1::{Clock, L1};
use crate::lab::{Lab, Scene};
use crate::linux;
use crate::report::Skip;
use crate::tap::Server;
use crate::testpmd;
use crate::vm::{Iommu, Processor};
use chart::Bar;
use contender::{Contender, Rig};
use exits::Costs;
use figures::{Pick, Rounds};
pub use figures::{Spread, round};
use traffic::{Measured, Traffic, measure};

/// The streams that an IOMMU may slow down.
const TCP: [Traffic; 2] = [Traffic::TcpOut, Traffic::TcpIn];

/// The kinds of traffic of which interrupts are compared.
const COSTLY: [Traffic; 4] = [Traffic::TcpOut, Traffic::TcpIn, Traffic::Udp64Out, Traffic::Udp64In];

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
    /// Whether to measure also behind an IOMMU.
    pub iommu: bool,
    /// Whether to let DPDK's testpmd send frames over vhost-user.
    pub testpmd: bool,
}

/// What was measured.
pub struct Report {
    figures: Map<String, Value>,
    text: String,
    charts: Vec<(String, String)>,
}

impl Report {
    /// Everything as one JSON object. Keys that begin with `net_` and end in `_vs_virtio` are
    /// ratios to QEMU's virtio-net: of figures, above 1 means that vbus is ahead; of costs per
    /// packet, below 1 does. `abi_vs_abi` has such ratios of venet by the kernel module to the
    /// class `virtio-net` over vfio-user. Keys that end in `_vs_vhost_net` are ratios of
    /// `vhost = true` to QEMU's vhost-net, and those of testpmd ratios to DPDK's back end.
    pub fn json(self) -> Value {
        self.figures.into()
    }

    /// The charts: the name of each file, and its SVG.
    pub fn charts(&self) -> &[(String, String)] {
        &self.charts
    }

    /// Everything as tables.
    pub fn text(&self) -> &str {
        &self.text
    }
}

/// Measures everything.
///
/// # Errors
/// A guest or a bus does not start, or a measurement fails. It is a [`Skip`]
/// if this machine has no TAP.
pub fn run(lab: &Lab, spec: &Spec) -> Result<Report> {
    let mut report = Report { figures: Map::new(), text: String::new(), charts: Vec::new() };
    let (mut details, mut abi) = (Map::new(), Map::new());
    let home = lab.scene("net-system")?;
    let system = match linux::chosen_system(&home) {
        Ok(system) => Some(system),
        Err(error) if error.is::<Skip>() => {
            eprintln!("the driver does not take part: {error:#}");
            details.insert("driver_skipped".into(), format!("{error:#}").into());
            None
        }
        Err(error) => return Err(error.context("the driver")),
    };
    let rig = contender::Spec {
        queues: 1,
        processor: Processor::Lab,
        system: system.as_ref(),
        iommu: None,
    };
    let mut plain = None;
    for (at, &queues) in spec.queues.iter().enumerate() {
        let scene = lab.scene(&format!("net-{queues}"))?;
        let rig = contender::Spec { queues, ..rig.clone() };
        let rounds = logged(compare(&scene, spec, &rig, &Traffic::ALL), || scene.save_logs())?;
        if at == 0 {
            headlines(&rounds, &mut report.figures);
            abi_vs_abi(&rounds, &mut abi);
        }
        report.text += &format!("{queues} queue pairs, {queues} CPUs\n{}\n", rounds.table());
        details.insert(format!("queues_{queues}"), rounds.json());
        let title = format!("NICs of a guest with {queues} CPUs and queue pairs");
        report.charts.push((format!("net-queues-{queues}.svg"), rounds.chart(&title)));
        plain = plain.or_else(|| Some(rounds).filter(|_| queues == 1));
    }
    if spec.iommu {
        let scene = lab.scene("net-iommu")?;
        let rig = contender::Spec { iommu: Some(Iommu::Intel), ..rig.clone() };
        let behind = logged(compare(&scene, spec, &rig, &TCP), || scene.save_logs())?;
        report.text += &format!("behind intel-iommu, 1 queue pair, 1 CPU\n{}\n", behind.table());
        details.insert("iommu".into(), behind.json());
        let chart = behind.chart("NICs of a guest behind intel-iommu");
        report.charts.push(("net-iommu.svg".into(), chart));
        let losses = plain.map(|plain| losses(&plain, &behind)).unwrap_or_default();
        for (contender, loss) in losses {
            report.figures.insert(key(contender, "iommu_loss"), round(loss).into());
        }
    }
    if spec.instructions {
        let scene = lab.scene("net-instructions")?;
        let counts = logged(count_instructions(&scene, &rig, spec.rounds), || scene.save_logs())?;
        details.insert("instructions_per_packet".into(), counts.json());
        report.text += &counts.table();
        for ours in Contender::OURS {
            let ratio = counts.ratio(&instructions::KINDS, ours, Contender::VirtioNet);
            enter(&mut report.figures, ratio_key(ours, "insn_per_packet"), ratio);
        }
        let ratio = |kinds: &[Traffic]| counts.ratio(kinds, Contender::Driver, Contender::VfioUser);
        enter(&mut abi, "insn_per_packet".into(), ratio(&instructions::KINDS));
        for kind in instructions::KINDS {
            enter(&mut abi, format!("insn_per_packet_{}", kind.name()), ratio(&[kind]));
        }
    }
    if spec.exits {
        let l2 = system.as_ref().unwrap_or(lab.system());
        let l1 = L1::start_with(lab.scene("net-exits")?, Clock::Time, &[], l2)?;
        let costs = logged(Costs::measure(&l1, system.is_some()), || l1.save_logs())?;
        details.insert("exits".into(), costs.json());
        report.text += &costs.table();
        for (contender, ratio) in costs.against_virtio() {
            report.figures.insert(ratio_key(contender, "exits_per_packet"), round(ratio).into());
        }
        for (what, ratio) in costs.abi_vs_abi() {
            enter(&mut abi, what.into(), ratio);
        }
        for (what, ratio) in costs.vhost_vs_vhost() {
            enter(&mut report.figures, format!("net_vhost_{what}_vs_vhost_net"), ratio);
        }
    }
    if spec.testpmd {
        match testpmd::bench(lab, spec.seconds, spec.rounds) {
            Ok(Value::Object(figures)) => report.figures.extend(figures),
            Ok(_) => {}
            Err(error) if error.is::<Skip>() => {
                eprintln!("testpmd does not take part: {error:#}");
                details.insert("testpmd_skipped".into(), format!("{error:#}").into());
            }
            Err(error) => return Err(error.context("testpmd")),
        }
    }
    if !abi.is_empty() {
        report.text += "venet by the driver over virtio-net over vfio-user, both of the bus\n";
        for (what, ratio) in &abi {
            report.text += &format!("{what:30} {ratio:>10}\n");
        }
    }
    report.figures.insert("abi_vs_abi".into(), abi.into());
    let bars = costs(&report.figures);
    if !bars.is_empty() {
        let title = "What a packet costs, against virtio-net";
        let svg = chart::svg(title, "below 1: vbus needs less", &bars);
        report.charts.push(("net-costs.svg".into(), svg));
    }
    report.figures.insert("details".into(), details.into());
    Ok(report)
}

/// If something has failed, the error says where the logs are, which `save` saves.
fn logged<T>(result: Result<T>, save: impl FnOnce() -> Result<PathBuf>) -> Result<T> {
    result.map_err(|error| match save() {
        Ok(logs) => error.context(format!("logs: {}", logs.display())),
        Err(_) => error,
    })
}

/// The key of a figure. The driver is what vbus stands for.
fn key(contender: Contender, what: &str) -> String {
    match contender {
        Contender::Driver => format!("net_{what}"),
        other => format!("net_{}_{what}", other.name()),
    }
}

/// The key of a ratio to virtio-net.
fn ratio_key(contender: Contender, what: &str) -> String {
    key(contender, &format!("{what}_vs_virtio"))
}

/// Enters a ratio, if there is one.
fn enter(figures: &mut Map<String, Value>, key: String, ratio: Option<f64>) {
    if let Some(ratio) = ratio {
        figures.insert(key, round(ratio).into());
    }
}

/// The ratios that stand for all others.
fn headlines(rounds: &Rounds, figures: &mut Map<String, Value>) {
    for contender in Contender::OURS {
        let mut enter = |what: &str, ratio| enter(figures, ratio_key(contender, what), ratio);
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
        let interrupts = |measured: &Measured| Some(measured.interrupts_per_packet);
        let ratio = rounds.cost_ratio(&COSTLY, contender, Contender::VirtioNet, interrupts);
        enter("irqs_per_packet", ratio);
    }
}

/// The ratios of venet to virtio on the same bus, back end and guest.
fn abi_vs_abi(rounds: &Rounds, figures: &mut Map<String, Value>) {
    let (venet, virtio) = (Contender::Driver, Contender::VfioUser);
    for traffic in Traffic::ALL {
        let ratio = rounds.ratio(traffic, venet, virtio).map(|spread| spread.median);
        enter(figures, traffic.name().into(), ratio);
    }
    let costs: [(&str, Pick); 2] = [
        ("irqs", |measured| Some(measured.interrupts_per_packet)),
        ("doorbells", |measured| measured.doorbells_per_packet),
    ];
    for (what, cost) in costs {
        let ratio = |kinds: &[Traffic]| rounds.cost_ratio(kinds, venet, virtio, cost);
        enter(figures, format!("{what}_per_packet"), ratio(&COSTLY));
        for traffic in COSTLY {
            let key = format!("{what}_per_packet_{}", traffic.name());
            enter(figures, key, ratio(&[traffic]));
        }
    }
}

/// The bars of what a packet costs.
fn costs(figures: &Map<String, Value>) -> Vec<Bar> {
    let mut bars = Vec::new();
    for (what, name) in [("insn", "instructions"), ("irqs", "interrupts"), ("exits", "exits")] {
        for contender in Contender::OURS {
            let ratio = figures.get(&ratio_key(contender, &format!("{what}_per_packet")));
            if let Some(median) = ratio.and_then(Value::as_f64) {
                bars.push(Bar {
                    name: format!("{name}, {}", contender.about()),
                    ratio: Spread { median, low: median, high: median },
                    colour: contender.colour(),
                });
            }
        }
    }
    bars
}

/// How much of the bytes a second each contender loses behind an IOMMU: 0.2 is a fifth. It is the
/// greater loss of the ways out and in.
fn losses(plain: &Rounds, behind: &Rounds) -> Vec<(Contender, f64)> {
    let loss = |contender: Contender| -> Option<f64> {
        let one = |traffic: &Traffic| -> Option<f64> {
            let rate = |rounds: &Rounds| {
                Some(rounds.spread(*traffic, contender, |measured| Some(measured.figure))?.median)
            };
            Some(1.0 - rate(behind)? / rate(plain)?)
        };
        TCP.iter().map(one).collect::<Option<Vec<_>>>()?.into_iter().reduce(f64::max)
    };
    Contender::ALL.into_iter().filter_map(|contender| Some((contender, loss(contender)?))).collect()
}

/// Compares the contenders in one guest.
fn compare(scene: &Scene, spec: &Spec, rig: &contender::Spec, kinds: &[Traffic]) -> Result<Rounds> {
    let (queues, behind) = (rig.queues, if rig.iommu.is_some() { "behind an IOMMU, " } else { "" });
    let rig = Rig::start(scene, rig)?;
    let server = Server::start(scene)?;
    let mut rounds = Rounds::default();
    for number in 0..spec.rounds {
        rounds.begin();
        for &traffic in kinds {
            let mut said = Vec::new();
            for nic in in_turn(&rig.nics, number) {
                let measured = measure(&server, &rig, nic, traffic, spec.seconds, queues)?;
                rounds.enter(traffic, nic.contender, measured);
                said.push(format!("{} {}", nic.contender.about(), round(measured.figure)));
            }
            eprintln!(
                "{behind}{queues} queue pairs, round {} of {}: {} in {}: {}",
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

    /// The ratio of two contenders, of these kinds of traffic together.
    fn ratio(&self, kinds: &[Traffic], ours: Contender, theirs: Contender) -> Option<f64> {
        let sum = |contender| -> Option<f64> {
            kinds.iter().map(|traffic| self.median(*traffic, contender)).sum()
        };
        Some(sum(ours)? / sum(theirs)?)
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
fn count_instructions(scene: &Scene, rig: &contender::Spec, rounds: u32) -> Result<Counts> {
    let counted = contender::Spec { processor: Processor::Counted, ..rig.clone() };
    let mut rig = Rig::start(scene, &counted)?;
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
