// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Counts the exits of the guest without an operating system in `vbus-vmm`, exactly.
//!
//! The guest sets a mark before and after a measurement. At each mark `vbus-vmm` records the
//! counters of KVM. Only the guest's loop runs between two marks, because the guest has no timer
//! and no other processor.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::flat::{Report, device_names, devices, with_receivers};
use crate::l1::L1;
use crate::l2::{self, L1Bus, Vmm};
use crate::report::Figures;

/// The name of the guest's socket and logs.
const NAME: &str = "flat";
/// The port of vbus-vmm at which the guest sets its marks.
const MARK_PORT: u16 = 0x610;
/// The longest time without output of the guest. The guest waits at most 60 s for anything, and
/// reports a wait that fails. A round of a test takes seconds.
const SILENCE: Duration = Duration::from_secs(240);
/// The most exits beside the expected ones in a round, however few interrupts it has. The emulated
/// processor sometimes takes another exit, because it has dropped a page of its tables.
const STRAY: u64 = 20;

/// A run of the guest.
pub(super) struct Run {
    pub(super) report: Report,
    marks: Vec<Value>,
}

/// Serves the bus of a run.
pub(super) fn start_bus<'a>(l1: &'a L1<'a>, config: &str) -> Result<L1Bus<'a>> {
    // The devices do not poll. So each doorbell and each interrupt takes place.
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
        let (l2, slots, pin) = (l1.l2_dir(), names.len(), l1.guest_processor());
        let run = l1.run_dir();
        let vmm = l1.guest.start(&format!(
            "exec {pin}vbus-vmm --kernel {l2}/flat --append '{words} cpus={cpus} \
             marks={MARK_PORT}' --cpus {cpus} --memory 64 --slots {slots} {args} --marks \
             --json --control {run}/{NAME}.control{devices}"
        ))?;
        let end = vmm.wait_talking(SILENCE, || {
            l2::look(l1, NAME, Vmm::Vbus);
            l1.note_hang();
        })?;
        let (events, said): (Vec<_>, Vec<_>) =
            end.stderr.lines().partition(|line| line.starts_with('{'));
        let said = said.join("\n");
        // An interrupt came while the guest had disabled interrupts. No processor delivers one
        // then. The emulated SVM sometimes delivers one a second time. `stop` and `cont` on QEMU's
        // control channel cause the same.
        let kept_out = end.stdout.lines().find(|line| line.contains("\"kept-out\":true"));
        if let Some(line) = kept_out.filter(|_| l1.is_emulated()) {
            l1.prove(format!("an interrupt came while interrupts were disabled: {line}"));
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

    /// The differences of the counters between the two marks of a round.
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
            // The guest does not cause the exits in which the host takes an interrupt of its own.
            // One exit belongs to a mark.
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
    /// Exits that the guest caused.
    exits: u64,
    /// Of these: exits because the guest could not take a waiting interrupt before.
    windows: u64,
    /// Of these: HLT.
    halts: u64,
    /// Interrupts that KVM injected.
    injected: u64,
    /// Exits that reached `vbus-vmm`.
    user: u64,
}

pub(super) fn number(round: &Value, key: &str) -> Result<u64> {
    round[key].as_u64().with_context(|| format!("no {key} in {round}"))
}

/// Rounds to thousandths, because further digits have no meaning.
pub(super) fn rounded(value: f64) -> Value {
    json!((value * 1000.0).round() / 1000.0)
}

/// A doorbell of any kind costs one exit, which ends in the kernel. A second exit for each ring
/// would double the count. The bound is in the middle, because stray exits do not come with rings.
pub fn doorbells(l1: &L1, figures: &mut Figures) -> Result<()> {
    let run = Run::new(l1, &devices(""), "test=list,doorbells count=2000", "full")?;
    let mut user = 0;
    for kind in ["mmio", "pio", "hypercall"] {
        let round = run.report.find("doorbells", "kind", kind)?;
        let counted = run.counted(round)?;
        let rings = number(round, "count")?;
        let exits = counted.exits as f64 / rings as f64;
        eprintln!("{kind}: {exits:.3} exits, {} to user space, {} ns", counted.user, round["ns"]);
        figures.insert(format!("exits_per_doorbell_{kind}"), rounded(exits));
        figures.insert(format!("ns_per_doorbell_{kind}"), round["ns"].clone());
        ensure!(
            (rings..rings + rings / 2).contains(&counted.exits),
            "a ring by {kind} takes {exits} exits: {counted:?}"
        );
        user += counted.user;
    }
    figures.insert("user_exits".into(), user.into());
    ensure!(user == 0, "{user} exits of doorbells went on to user space");
    Ok(())
}

/// Measures the exits of an interrupt, without those of its doorbell and of the guest's sleep. The
/// end of an interrupt is one exit. With KVM's bit in memory, with synthetic interrupts, and with
/// `pic` it is none. 1, 4 and 16 devices interrupt one at a time, all at once, and as fast as they
/// can. How many lines share a message depends on the speed of the machine then. So the devices
/// also raise their lines together while the guest keeps interrupts out: one message carries all.
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
            cost.check(receivers, !l1.is_emulated())?;
            if receivers == 1 && cost.rate == "trickle" {
                figures.insert(format!("exits_per_interrupt_{}", cost.way), rounded(cost.ends));
            }
            table.push(json!({
                "devices": receivers, "rate": cost.rate, "way": cost.way, "raised": cost.raised,
                "messages": cost.messages,
                "exits_per_interrupt": rounded(cost.ends),
                "injections_per_interrupt": rounded(cost.injected),
                "all_exits_per_interrupt": rounded(cost.all),
            }));
        }
        let gathered = run.report.of("gathered").map(|report| check_gathered(report, receivers));
        let gathered = gathered.sum::<Result<usize>>()?;
        ensure!(gathered == 3, "the lines were raised together in {gathered} ways, not in 3");
        for (way, pic) in [("msi", false), ("pv_eoi", false), ("sint", false), ("sint", true)] {
            let there =
                run.report.of("interrupts").any(|round| round["way"] == way && round["pic"] == pic);
            ensure!(there, "no round with {way}, pic {pic}:\n{}", run.report);
        }
    }
    // The best use of the bus's controller: its messages are synthetic interrupts.
    let best = figures.get("exits_per_interrupt_pic_sint").cloned().context("no figure of pic")?;
    figures.insert("exits_per_interrupt_pic".into(), best);
    figures.insert("interrupts".into(), table.into());
    Ok(())
}

/// Checks a report of lines that were raised together. Returns 1.
fn check_gathered(report: &Value, receivers: u32) -> Result<usize> {
    let (rounds, messages) = (number(report, "rounds")?, number(report, "messages")?);
    let by_register = number(report, "ended-by-register")?;
    eprintln!(
        "{receivers:2} devices together, {}: {messages} messages in {rounds} rounds, {by_register} \
         ended by the register",
        report["way"]
    );
    // A device that pauses in the middle of a raise, until the next round, may cost a needless
    // message (spec/pic.md). No load causes that in every round. Without a common message there
    // would be `receivers` in each round.
    ensure!(
        (rounds..=2 * rounds).contains(&messages),
        "{messages} messages in {rounds} rounds, in which {receivers} lines are pending: {report}"
    );
    // No other interrupt waits when KVM delivers the message, so KVM sets its bit. Its hint that
    // another one waits is late if the sender pauses between two instructions, which is rare.
    ensure!(
        report["way"] != "pv_eoi" || 2 * by_register < messages,
        "KVM's bit is not set for most of the messages: {report}"
    );
    Ok(1)
}

/// The cost of the interrupts in a round.
struct Cost<'a> {
    rate: &'a str,
    /// How messages end. It begins with `pic_` if the bus's controller sends the messages.
    way: String,
    /// Interrupts that devices raised, as messages or as lines.
    raised: u64,
    /// All messages.
    messages: u64,
    /// Exits at the end of interrupts.
    end_exits: u64,
    /// Ends that the guest made by the register of the APIC.
    by_register: u64,
    /// Exits at the end of an interrupt, per interrupt that the devices raised.
    ends: f64,
    /// Interrupts that KVM injected, likewise.
    injected: f64,
    /// All exits, including those of doorbells and of sleep, likewise.
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
        let end_exits = counted
            .exits
            .checked_sub(known)
            .with_context(|| format!("too few exits: {round} {counted:?}"))?;
        let per = |count: u64| count as f64 / raised as f64;
        Ok(Self {
            rate: round["rate"].as_str().context("a round without its rate")?,
            way: format!("{}{way}", if pic { "pic_" } else { "" }),
            raised,
            messages,
            end_exits,
            by_register: number(round, "ended-by-register")?,
            ends: per(end_exits),
            injected: per(counted.injected),
            all: per(counted.exits),
            counted,
        })
    }

    /// Checks what holds on any machine. `accelerated`: the processor may virtualize the APIC, and
    /// then an end by the register need not be an exit.
    fn check(&self, receivers: u32, accelerated: bool) -> Result<()> {
        let Self { way, messages, end_exits, by_register, counted, .. } = self;
        ensure!(counted.user == 0, "{self}: {counted:?}");
        // The guest counts the ends that it makes by the register. Each is an exit, and no other
        // end is. If another end were an exit too, there would be one for each message.
        ensure!(
            end_exits >= by_register || accelerated,
            "{self}: only {end_exits} exits for {by_register} ends by the register; {counted:?}"
        );
        ensure!(
            *end_exits <= by_register + messages / 2 + STRAY,
            "{self}: {end_exits} exits for {by_register} ends by the register; {counted:?}"
        );
        // KVM sets its bit unless another interrupt waits. With one device none does: the guest
        // asks for the next one after the end. KVM's hint is late now and then (see
        // `check_gathered`).
        let by_bit = way.ends_with("pv_eoi") && receivers == 1;
        ensure!(
            !by_bit || 2 * by_register < *messages,
            "{self}: KVM's bit is not set for most of the messages"
        );
        // Only a raise that makes a line pending sends a message, and the guest takes each pending
        // line once. At a mark each line may be pending, or its message be on its way.
        ensure!(
            !way.starts_with("pic_") || *messages <= self.raised + 2 * u64::from(receivers),
            "{self}: more messages than lines"
        );
        Ok(())
    }
}

impl fmt::Display for Cost<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rate, way, raised, messages, ends, injected, all, counted, .. } = self;
        write!(
            f,
            "{rate:8}{way:11}{raised:5} raised,{messages:5} messages; for each {ends:.3} exits at \
             its end, {injected:.3} injected, {all:.3} exits in all; {} to user space",
            counted.user
        )
    }
}

/// The guest drives NICs, state pages and `pic` by each kind of doorbell, with interrupt
/// controllers inside and outside of the kernel.
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
