//! The guest without an operating system in `vbus-vmm`: exits, counted exactly.
//!
//! The guest sets a mark before and after what it measures, and `vbus-vmm` keeps at each what KVM has counted. What happens between two
//! marks is the guest's loop and nothing else: it has no timer, and no other processor.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::Figures;
use super::inner::InnerBus;
use super::rig::Rig;
use crate::flat::{Report, device_names, devices, with_receivers};

/// Where the guest sets its marks: vbus-vmm's.
const MARK_PORT: u16 = 0x610;
/// How long a run may take.
const LIMIT: Duration = Duration::from_secs(200);
/// How far a count may be from what it should be, of 1: the emulated processor takes an exit more now and then (a page of its own that it has
/// let go of).
const NEARLY: f64 = 0.01;

/// A run of the guest.
struct Run {
    report: Report,
    marks: Vec<Value>,
}

impl Run {
    /// Boots the guest with all devices of the bus that `config` describes, and waits until it has powered off.
    fn new(rig: &Rig, config: &str, words: &str) -> Result<Self> {
        // Devices that sleep at once: each doorbell and each interrupt counts.
        let bus = InnerBus::start(rig, &format!("[bus]\npoll-us = 0\n{config}"))?;
        let names = device_names(config);
        let devices: String = names.iter().map(|name| format!(" --device {}", bus.socket(name))).collect();
        let (l2, slots) = (rig.l2_dir(), names.len());
        let vmm = rig.guest.start(&format!(
            "exec vbus-vmm --kernel {l2}/flat --append '{words} marks={MARK_PORT}' --memory 64 --slots {slots} --marks \
             --json{devices}"
        ))?;
        let end = vmm.wait(LIMIT)?;
        let mut report = Report::default();
        let mut done = false;
        for line in end.stdout.lines() {
            done |= report.take(line, |_| bail!("nobody is there to answer it"))?;
        }
        ensure!(end.code == 0 && done, "vbus-vmm ended with {}:\n{}{}", end.code, end.stdout, end.stderr);
        let events = end.stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut last = events.filter(|event| event["event"] == "power-off");
        let marks = last.next().and_then(|event| event["data"]["marks"].as_array().cloned());
        let marks = marks.with_context(|| format!("vbus-vmm tells no marks:\n{}", end.stderr))?;
        Ok(Self { report, marks })
    }

    /// What was counted between the marks of a round.
    fn counted(&self, round: &Value) -> Result<Counted> {
        let at = |key: &str| {
            let mark = self.marks.iter().find(|mark| mark["mark"] == round[key]);
            mark.map(|mark| &mark["cpus"][0]).with_context(|| format!("the mark {key} of {round} is missing"))
        };
        let (from, to) = (at("from")?, at("to")?);
        let count = |group: &str, name: &str| -> Result<u64> {
            let value = |at: &Value| at[group][name].as_u64().with_context(|| format!("no counter {name}: {at}"));
            Ok(value(to)? - value(from)?)
        };
        let kvm = |name: &str| count("kvm", name);
        Ok(Counted {
            // Those by which the host took an interrupt of its own are no doing of the guest; one is that of a mark.
            exits: kvm("exits")? - kvm("irq_exits")? - 1,
            windows: kvm("irq_window_exits")?,
            halts: kvm("halt_exits")?,
            injected: kvm("irq_injections")?,
            user: count("user_exits", "total")? - 1,
        })
    }
}

/// Counters of KVM and of `vbus-vmm` over a round.
#[derive(Debug)]
struct Counted {
    /// Exits of the guest's own making.
    exits: u64,
    /// Of these: the guest was just not ready for an interrupt that was there.
    windows: u64,
    /// Of these: HLT.
    halts: u64,
    /// Interrupts injected.
    injected: u64,
    /// Exits that went on to `vbus-vmm`.
    user: u64,
}

fn number(round: &Value, key: &str) -> Result<u64> {
    round[key].as_u64().with_context(|| format!("no {key} in {round}"))
}

/// To thousandths: more digits mean nothing.
fn rounded(value: f64) -> Value {
    json!((value * 1000.0).round() / 1000.0)
}

/// Every kind of doorbell costs one exit, which ends in the kernel.
pub fn doorbells(rig: &Rig, figures: &mut Figures) -> Result<()> {
    let run = Run::new(rig, &devices(""), "test=list,doorbells count=2000")?;
    let mut user = 0;
    for kind in ["mmio", "pio", "hypercall"] {
        let round = run.report.find("doorbells", "kind", kind)?;
        let counted = run.counted(round)?;
        let rings = number(round, "count")? as f64;
        let exits = counted.exits as f64 / rings;
        eprintln!("{kind}: {exits:.3} exits, {} to user space, {} ns", counted.user, round["ns"]);
        figures.insert(format!("exits_per_doorbell_{kind}"), rounded(exits));
        figures.insert(format!("ns_per_doorbell_{kind}"), round["ns"].clone());
        ensure!((exits - 1.0).abs() < NEARLY, "a ring by {kind} takes {exits} exits: {counted:?}");
        user += counted.user;
    }
    figures.insert("user_exits".into(), user.into());
    ensure!(user == 0, "{user} exits of doorbells went on to user space");
    Ok(())
}

/// What an interrupt costs besides the doorbell that led to it and the guest's sleep: an exit at its end, and none with KVM's bit in memory, with
/// synthetic interrupts, or with `pic`.
pub fn interrupts(rig: &Rig, figures: &mut Figures) -> Result<()> {
    for receivers in [1, 4, 16] {
        let config = with_receivers(receivers);
        let words = format!("test=interrupts count={} receivers={receivers}", 1000 / receivers);
        let run = Run::new(rig, &config, &words)?;
        for round in run.report.of("interrupts") {
            let counted = run.counted(round)?;
            let pic = round["pic"] == true;
            let way = round["way"].as_str().context("a round without its way")?;
            // What the devices raised: each is a message, or a line.
            let raised = number(round, if pic { "lines" } else { "interrupts" })? as f64;
            let messages = number(round, "interrupts")? as f64;
            let rest = counted.exits as i64 - (counted.windows + counted.halts + number(round, "doorbells")?) as i64;
            let (ends, windows) = (rest as f64 / raised, counted.windows as f64 / raised);
            let name = if pic { format!("pic_{way}") } else { way.to_owned() };
            eprintln!(
                "{receivers:2} receivers, {name}: {raised} raised by {messages} messages; per interrupt: {ends:.3} exits at its end, \
                 {:.3} injections, {windows:.3} exits to wait for the guest, {:.3} sleeps; {} to user space",
                counted.injected as f64 / raised,
                counted.halts as f64 / raised,
                counted.user
            );
            let of = format!("{name}_{receivers}");
            figures.insert(format!("exits_per_interrupt_{of}"), rounded(ends));
            figures.insert(format!("injections_per_interrupt_{of}"), rounded(counted.injected as f64 / raised));
            if receivers == 1 {
                figures.insert(format!("exits_per_interrupt_{name}"), rounded(ends));
            }
            ensure!(counted.user == 0, "{} exits went on to user space: {round} {counted:?}", counted.user);
            // KVM takes its bit back where another interrupt waits; the guest has counted what it ended by the register.
            let by_register = number(round, "ended-by-register")? as f64 / raised;
            ensure!((ends - by_register).abs() < NEARLY, "{ends} exits for {by_register} ends: {round} {counted:?}");
            let none = way == "sint" || (way == "pv_eoi" && receivers == 1);
            ensure!(!none || ends < NEARLY, "{way}: {ends} exits at the end of an interrupt: {round} {counted:?}");
        }
        for (way, pic) in [("msi", false), ("pv_eoi", false), ("sint", false), ("sint", true)] {
            let there = run.report.of("interrupts").any(|round| round["way"] == way && round["pic"] == pic);
            ensure!(there, "no round with {way}, pic {pic}:\n{}", run.report);
        }
    }
    // The controller of the bus as it is best used: its messages are synthetic interrupts.
    let best = figures.get("exits_per_interrupt_pic_sint").cloned().unwrap_or_default();
    figures.insert("exits_per_interrupt_pic".into(), best);
    Ok(())
}
