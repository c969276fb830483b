// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest without an operating system in `vbus-vmm`: exits, counted exactly.
//!
//! The guest sets a mark before and after what it measures, and `vbus-vmm` keeps at each what KVM
//! has counted. What happens between two marks is the guest's loop and nothing else: it has no
//! timer, and no other processor.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::flat::{Report, device_names, devices, with_receivers};
use crate::l1::L1;
use crate::l2::L1Bus;
use crate::report::Figures;

/// Where the guest sets its marks: vbus-vmm's.
const MARK_PORT: u16 = 0x610;
/// How long the guest may say nothing. It waits 60 s at most for anything, and says so if that does
/// not come; a round of a test takes seconds.
const SILENCE: Duration = Duration::from_secs(120);
/// How far a count may be from what it should be, of 1: the emulated processor takes an exit more
/// now and then (a page of its own that it has let go of).
const NEARLY: f64 = 0.01;

/// A run of the guest.
pub(super) struct Run {
    pub(super) report: Report,
    marks: Vec<Value>,
}

/// Serves the bus of a run.
pub(super) fn start_bus<'a>(l1: &'a L1<'a>, config: &str) -> Result<L1Bus<'a>> {
    // Devices that sleep at once: each doorbell and each interrupt counts.
    L1Bus::start(l1, &format!("[bus]\npoll-us = 0\n{config}"))
}

impl Run {
    /// Boots the guest with all devices of the bus that `config` describes, and waits until it has
    /// powered off.
    fn new(l1: &L1, config: &str, words: &str, irqchip: &str) -> Result<Self> {
        let bus = start_bus(l1, config)?;
        Self::on(l1, &bus, &device_names(config), words, &format!("--irqchip {irqchip}"), 1)
    }

    /// Boots the guest with `cpus` CPUs and these devices of a bus, and waits until it has powered
    /// off. `args` are for `vbus-vmm`.
    pub(super) fn on(
        l1: &L1,
        bus: &L1Bus<'_>,
        names: &[&str],
        words: &str,
        args: &str,
        cpus: u32,
    ) -> Result<Self> {
        let devices: Vec<_> =
            names.iter().map(|name| format!(" --device {}", bus.socket(name))).collect();
        let devices = devices.concat();
        let (l2, slots, place) = (l1.l2_dir(), names.len(), l1.guest_processor());
        let vmm = l1.guest.start(&format!(
            "exec {place}vbus-vmm --kernel {l2}/flat --append '{words} cpus={cpus} marks={MARK_PORT}' --cpus {cpus} \
             --memory 64 --slots {slots} {args} --marks --json{devices}"
        ))?;
        let end = vmm.wait_talking(SILENCE).inspect_err(|_| {
            // What says nothing that long does not even wait: its processors stand still.
            if l1.is_emulated() {
                l1.note_hang();
            }
        })?;
        let (events, said): (Vec<_>, Vec<_>) =
            end.stderr.lines().partition(|line| line.starts_with('{'));
        let said = said.join("\n");
        // The bus runs and answers at once, unless L1's processors stand still. An interrupt that
        // came while they were kept out is one that the emulated SVM has delivered a second time,
        // as `stop` and `cont` on QEMU's control channel have it do.
        if said.contains("no reply to")
            || (l1.is_emulated() && end.stdout.contains("\"kept-out\":true"))
        {
            l1.note_hang();
        }
        let mut report = Report::default();
        let mut done = false;
        for line in end.stdout.lines() {
            let taken = report.take(line, |_| bail!("nobody is there to answer it"));
            done |= taken.with_context(|| format!("vbus-vmm says {said:?}"))?;
        }
        ensure!(end.code == 0 && done, "vbus-vmm ended with {}: {said}\n{report}", end.code);
        let events = events.into_iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut last = events.filter(|event| event["event"] == "power-off");
        let marks = last.next().and_then(|event| event["data"]["marks"].as_array().cloned());
        let marks = marks.with_context(|| format!("vbus-vmm tells no marks: {said}"))?;
        Ok(Self { report, marks })
    }

    /// What was counted between the marks of a round.
    fn counted(&self, round: &Value) -> Result<Counted> {
        let at = |key: &str| {
            let mark = self.marks.iter().find(|mark| mark["mark"] == round[key]);
            mark.map(|mark| &mark["cpus"][0])
                .with_context(|| format!("the mark {key} of {round} is missing"))
        };
        let (from, to) = (at("from")?, at("to")?);
        let count = |group: &str, name: &str| -> Result<u64> {
            let value = |at: &Value| {
                at[group][name].as_u64().with_context(|| format!("no counter {name}: {at}"))
            };
            Ok(value(to)? - value(from)?)
        };
        let kvm = |name: &str| count("kvm", name);
        Ok(Counted {
            // Those by which the host took an interrupt of its own are no doing of the guest; one
            // is that of a mark.
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

pub(super) fn number(round: &Value, key: &str) -> Result<u64> {
    round[key].as_u64().with_context(|| format!("no {key} in {round}"))
}

/// To thousandths: more digits mean nothing.
pub(super) fn rounded(value: f64) -> Value {
    json!((value * 1000.0).round() / 1000.0)
}

/// Every kind of doorbell costs one exit, which ends in the kernel.
pub fn doorbells(l1: &L1, figures: &mut Figures) -> Result<()> {
    let run = Run::new(l1, &devices(""), "test=list,doorbells count=2000", "full")?;
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

/// What an interrupt costs besides the doorbell that led to it and the guest's sleep: an exit at
/// its end, and none with KVM's bit in memory, with synthetic interrupts, or with `pic`. With 1, 4
/// and 16 devices, one at a time, all at a time, and as fast as they can.
pub fn interrupts(l1: &L1, figures: &mut Figures) -> Result<()> {
    let mut table = Vec::new();
    for receivers in [1, 4, 16] {
        let words = format!(
            "test=interrupts count={} receivers={receivers} rate=trickle,burst,full",
            800 / receivers.min(4)
        );
        let run = Run::new(l1, &with_receivers(receivers), &words, "full")?;
        for round in run.report.of("interrupts") {
            let cost = Cost::new(&run, round)?;
            eprintln!("{receivers:2} devices: {cost}");
            cost.check(receivers)?;
            if receivers == 1 && cost.rate == "trickle" {
                figures.insert(format!("exits_per_interrupt_{}", cost.way), rounded(cost.ends));
            }
            table.push(json!({
                "devices": receivers, "rate": cost.rate, "way": cost.way, "raised": cost.raised, "messages": cost.messages,
                "exits_per_interrupt": rounded(cost.ends), "injections_per_interrupt": rounded(cost.injected),
                "all_exits_per_interrupt": rounded(cost.all),
            }));
        }
        for (way, pic) in [("msi", false), ("pv_eoi", false), ("sint", false), ("sint", true)] {
            let there =
                run.report.of("interrupts").any(|round| round["way"] == way && round["pic"] == pic);
            ensure!(there, "no round with {way}, pic {pic}:\n{}", run.report);
        }
    }
    // The controller of the bus as it is best used: its messages are synthetic interrupts.
    let best = figures.get("exits_per_interrupt_pic_sint").cloned().context("no figure of pic")?;
    figures.insert("exits_per_interrupt_pic".into(), best);
    figures.insert("interrupts".into(), table.into());
    Ok(())
}

/// What interrupts have cost in a round; for each that the devices raised, where nothing else is
/// said.
struct Cost<'a> {
    rate: &'a str,
    /// How messages end, behind `pic_` if they are those of the controller of the bus.
    way: String,
    /// All that devices raised: each a message of its own, or a line.
    raised: u64,
    /// All messages.
    messages: u64,
    /// Exits at the end of interrupts.
    ends: f64,
    /// Ends that the guest did by the register of the APIC.
    by_register: f64,
    /// Interrupts injected.
    injected: f64,
    /// Exits, those of doorbells and of sleep included.
    all: f64,
    counted: Counted,
}

impl<'a> Cost<'a> {
    fn new(run: &Run, round: &'a Value) -> Result<Self> {
        let counted = run.counted(round)?;
        let (pic, way) =
            (round["pic"] == true, round["way"].as_str().context("a round without its way")?);
        let messages = number(round, "interrupts")?;
        let raised = if pic { number(round, "lines")? } else { messages };
        ensure!(raised > 0, "nothing was raised in {round}");
        let known = counted.windows + counted.halts + number(round, "doorbells")?;
        let ends = counted
            .exits
            .checked_sub(known)
            .with_context(|| format!("too few exits: {round} {counted:?}"))?;
        let per = |count: u64| count as f64 / raised as f64;
        Ok(Self {
            rate: round["rate"].as_str().context("a round without its rate")?,
            way: format!("{}{way}", if pic { "pic_" } else { "" }),
            raised,
            messages,
            ends: per(ends),
            by_register: per(number(round, "ended-by-register")?),
            injected: per(counted.injected),
            all: per(counted.exits),
            counted,
        })
    }

    fn check(&self, receivers: u32) -> Result<()> {
        let Self { way, ends, by_register, counted, .. } = self;
        ensure!(counted.user == 0, "{self}: {counted:?}");
        // KVM takes its bit back where another interrupt waits; the guest has counted what it ended
        // by the register.
        let few = 5.0 / self.raised as f64;
        ensure!(
            (ends - by_register).abs() < NEARLY + few,
            "{self}: {by_register} ends by the register; {counted:?}"
        );
        ensure!(!way.ends_with("sint") || *ends < NEARLY + few, "{self}: {counted:?}");
        // With one device only a timer's interrupt can wait beside the device's own. How many do
        // depends on how fast L1 runs: 13 of 795 were seen. Without the bit each end is an exit.
        let by_bit = way == "pv_eoi" && receivers == 1;
        ensure!(!by_bit || *ends < 0.1, "{self}: {counted:?}");
        // Lines of many devices that come at a time share a message.
        let shared = receivers == 16 && self.rate != "trickle" && way.starts_with("pic_");
        ensure!(
            !shared || 2 * self.messages < self.raised,
            "{self}: the messages are no fewer than half of the lines"
        );
        Ok(())
    }
}

impl fmt::Display for Cost<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rate, way, raised, messages, ends, injected, all, counted, .. } = self;
        write!(
            f,
            "{rate:8}{way:11}{raised:5} raised,{messages:5} messages; for each {ends:.3} exits at its end, {injected:.3} injected, \
             {all:.3} exits in all; {} to user space",
            counted.user
        )
    }
}

/// The guest drives NICs, state pages and `pic` by every kind of doorbell, with interrupt
/// controllers in the kernel and out of it.
pub fn drives_devices(l1: &L1, _: &mut Figures) -> Result<()> {
    const FRAMES: u64 = 500;
    for (kind, irqchip, msix) in
        [("mmio", "full", false), ("pio", "split", true), ("hypercall", "full", true)]
    {
        let settings = if msix { "msix = true" } else { "" };
        let words = format!("test=list,state,venet,pic,interrupts count={FRAMES} doorbell={kind}");
        let run = Run::new(l1, &devices(settings), &words, irqchip)?;
        for back_end in ["switch", "null"] {
            let frames = &run.report.find("venet", "back-end", back_end)?["frames"];
            ensure!(*frames == FRAMES, "{kind}: {frames} frames");
        }
        run.report.find("state", "wrote", "flat was here")?;
        run.report.find("state", "value", "value-0")?;
        ensure!(
            run.report.of("interrupts").any(|round| round["pic"] == true),
            "{kind}: no round with pic"
        );
    }
    Ok(())
}
