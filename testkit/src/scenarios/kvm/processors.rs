// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `pic` on several processors, in a guest without an operating system. Devices raise lines all the
//! time, and the guest masks them and moves them between processors and priorities.
//!
//! The guest checks each line when it takes it (guests/flat, test `processors`). The line must lead
//! to that processor. No more urgent line may wait or be interrupted. The frames of its NIC must
//! have no gap. The guest reports a failure at once. This scenario checks what the guest cannot
//! know: the number of interrupts that the devices raised, and how messages ended in KVM.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::flat::{Run, number, rounded, start_bus};
use crate::exits::{ByVector, Ends};
use crate::flat::{device_names, with_processors};
use crate::l1::L1;
use crate::l2::L1Bus;
use crate::report::Figures;

const CPUS: u32 = 2;
const NICS: u32 = 4;
/// Frames to each NIC in each round.
const FRAMES: u64 = 150;

/// There are two CPUs with a page each. The lines of the NICs move between the CPUs while frames
/// come. Messages end by the register, by KVM's bit in memory, and by themselves. More urgent lines
/// can interrupt some handlers, and not others.
pub fn pic(l1: &L1, figures: &mut Figures) -> Result<()> {
    let config = with_processors(CPUS, NICS);
    let bus = start_bus(l1, &config)?;
    let ends = Ends::start(l1)?;
    let words = format!("test=processors count={FRAMES} receivers={NICS}");
    let run = Run::on(l1, &bus, &device_names(&config), &words, "", CPUS);
    let (exits, by_bit) = ends.finish()?;
    let run = run?;

    let mut rounds = Vec::new();
    for round in run.report.of("processors") {
        let round = Round::new(round)?;
        eprintln!("{}", round.text());
        round.check()?;
        rounds.push(round);
    }
    let interrupts = interrupts(&bus)?;
    check_interrupts(&rounds, &interrupts)?;

    let mut ways = BTreeMap::<&str, Way>::new();
    for round in &rounds {
        ways.entry(round.way).or_default().add(round, &exits, &by_bit);
    }
    for way in ["msi", "pv_eoi", "sint"] {
        let counted =
            ways.get(way).with_context(|| format!("no round with {way}:\n{}", run.report))?;
        eprintln!("{way}: {counted:?}");
        counted.check(way, !l1.is_emulated())?;
        let per = counted.exits as f64 / counted.messages as f64;
        figures.insert(format!("pic_cpus_eoi_exits_per_message_{way}"), rounded(per));
    }
    let sum = |of: fn(&Round) -> u64| rounds.iter().map(of).sum::<u64>();
    figures.insert("pic_cpus_raised".into(), interrupts.iter().sum::<u64>().into());
    figures.insert("pic_cpus_handled".into(), sum(|round| round.raised.iter().sum()).into());
    figures.insert("pic_cpus_moves".into(), sum(|round| round.moves).into());
    figures.insert("pic_cpus_moved_while_pending".into(), sum(|round| round.moved_pending).into());
    figures.insert(
        "pic_cpus_unmasked_while_pending".into(),
        sum(|round| round.held.iter().sum()).into(),
    );
    figures.insert(
        "pic_cpus_interrupted_handlers".into(),
        sum(|round| round.interrupting.iter().sum()).into(),
    );
    figures.insert(
        "pic_cpus_rounds".into(),
        rounds.iter().map(|round| round.report.clone()).collect(),
    );
    Ok(())
}

/// The guest's report of a round. A list has an entry for each CPU; `raised` has one for each NIC.
struct Round<'a> {
    way: &'a str,
    nested: bool,
    /// Interrupts that the guest waited for and handled.
    raised: Vec<u64>,
    /// The number of times that it began to wait when a frame had just come. Each may have caused
    /// one more interrupt.
    late: u64,
    /// Lines that the guest handled without a frame. A new route raises such a line, and so does a
    /// move while a handler runs.
    empty: u64,
    moves: u64,
    moved_pending: u64,
    apics: Vec<u64>,
    vectors: Vec<u64>,
    messages: Vec<u64>,
    by_register: Vec<u64>,
    taken: Vec<u64>,
    /// Of these: taken while the handler of a less urgent line ran.
    interrupting: Vec<u64>,
    /// Of these: taken while another line was pending.
    chosen: Vec<u64>,
    /// Lines that were pending when the guest unmasked them.
    held: Vec<u64>,
    report: &'a Value,
}

impl<'a> Round<'a> {
    fn new(report: &'a Value) -> Result<Self> {
        let list = |key: &str, count: u32| -> Result<Vec<u64>> {
            let list = report[key].as_array().with_context(|| format!("no {key} in {report}"))?;
            let numbers: Option<Vec<u64>> = list.iter().map(Value::as_u64).collect();
            let numbers = numbers.filter(|numbers| numbers.len() == count as usize);
            numbers.with_context(|| format!("{key} is no list of {count} numbers: {report}"))
        };
        Ok(Self {
            way: report["way"].as_str().context("a round without its way")?,
            nested: report["nested"] == true,
            raised: list("raised", NICS)?,
            late: number(report, "late")?,
            empty: number(report, "empty")?,
            moves: number(report, "moves")?,
            moved_pending: number(report, "moved-pending")?,
            apics: list("apics", CPUS)?,
            vectors: list("vectors", CPUS)?,
            messages: list("messages", CPUS)?,
            by_register: list("ended-by-register", CPUS)?,
            taken: list("taken", CPUS)?,
            interrupting: list("interrupting", CPUS)?,
            chosen: list("chosen", CPUS)?,
            held: list("held", CPUS)?,
            report,
        })
    }

    fn text(&self) -> String {
        let Self {
            way,
            nested,
            raised,
            empty,
            moves,
            moved_pending,
            messages,
            taken,
            interrupting,
            chosen,
            held,
            ..
        } = self;
        let handlers = if *nested { "nested" } else { "flat" };
        format!(
            "{way:7}{handlers:7} raised {raised:?}, {empty} without a frame, {moves} moves, \
             {moved_pending} of pending lines; by CPU: {messages:?} messages, {taken:?} lines, \
             {interrupting:?} interrupting, {chosen:?} chosen, {held:?} unmasked when pending"
        )
    }

    /// Checks that the round has tried everything. The guest goes on for a minute until it has.
    fn check(&self) -> Result<()> {
        let everywhere = |counts: &[u64]| counts.iter().all(|count| *count > 0);
        let tried = everywhere(&self.raised)
            && everywhere(&self.taken)
            && everywhere(&self.chosen)
            && self.moved_pending > 0
            && self.held.iter().sum::<u64>() > 0;
        ensure!(tried, "the round left something out: {}", self.report);
        // In a nested round, more urgent lines interrupt handlers. In a flat round, none does.
        ensure!(
            (self.interrupting.iter().sum::<u64>() > 0) == self.nested,
            "the nesting is wrong: {}",
            self.report
        );
        Ok(())
    }
}

/// The number of interrupts of each NIC, as the bus counts them.
fn interrupts(bus: &L1Bus<'_>) -> Result<Vec<u64>> {
    let stats: Value = serde_json::from_str(&bus.run("stats --json")?)
        .context("vbus stats --json printed no JSON")?;
    let of = |nic| {
        let device =
            stats.as_array()?.iter().find(|device| device["name"] == format!("net{nic}"))?;
        device["counters"]["interrupts"].as_u64()
    };
    (0..NICS)
        .map(|nic| of(nic).with_context(|| format!("no interrupts of net{nic}: {stats}")))
        .collect()
}

/// Checks that the guest has handled each interrupt that the devices raised.
fn check_interrupts(rounds: &[Round<'_>], interrupts: &[u64]) -> Result<()> {
    let sum = |of: fn(&Round<'_>) -> u64| rounds.iter().map(of).sum::<u64>();
    let (late, empty) = (sum(|round| round.late), sum(|round| round.empty));
    for (nic, interrupts) in interrupts.iter().enumerate() {
        let raised: u64 = rounds.iter().map(|round| round.raised[nic]).sum();
        eprintln!("net{nic} has interrupted {interrupts} times, and {raised} were handled");
        // If the guest begins to wait while a device decides about an interrupt, the device may
        // interrupt once more. If an empty line's handler finds a frame, the device may interrupt
        // once less.
        let right = (raised.saturating_sub(empty)..=raised + late).contains(interrupts);
        ensure!(
            right,
            "net{nic} has interrupted {interrupts} times, and {raised} were handled ({late} late, \
             {empty} empty)"
        );
    }
    // The guest takes a line because a device raised it, because its route began, or once more
    // after a move.
    let taken = sum(|round| round.taken.iter().sum());
    let most = interrupts.iter().sum::<u64>()
        + u64::from(NICS) * rounds.len() as u64
        + sum(|round| round.moved_pending);
    ensure!(taken <= most, "{taken} lines were taken, and {most} can have been raised");
    Ok(())
}

/// Messages that end in one way, and the counts of KVM.
#[derive(Debug, Default)]
struct Way {
    messages: u64,
    /// Ends by the register, as the guest counts them.
    by_register: u64,
    /// Ends by the register, as KVM counts them. Each is an exit.
    exits: u64,
    /// Ends by KVM's bit in memory.
    by_bit: u64,
}

impl Way {
    /// Adds a round. The two rounds of a way have the same vectors, so `exits` and `by_bit` are
    /// counts of both.
    fn add(&mut self, round: &Round<'_>, exits: &ByVector, by_bit: &ByVector) {
        let at = |counts: &ByVector| -> u64 {
            let keys = round.apics.iter().copied().zip(round.vectors.iter().copied());
            keys.filter_map(|key| counts.get(&key)).sum()
        };
        self.messages += round.messages.iter().sum::<u64>();
        self.by_register += round.by_register.iter().sum::<u64>();
        (self.exits, self.by_bit) = (at(exits), at(by_bit));
    }

    /// `accelerated`: the processor may virtualize the APIC. KVM then does not see the ends by the
    /// register.
    fn check(&self, way: &str, accelerated: bool) -> Result<()> {
        let Self { messages, by_register, exits, by_bit } = *self;
        let same = exits == by_register || (accelerated && exits < by_register);
        ensure!(
            same,
            "{way}: {exits} exits at the end of messages, and the guest made {by_register}"
        );
        let right = match way {
            "msi" => by_register == messages && by_bit == 0,
            // KVM sets its bit unless another interrupt waits. The `pic` sends no second message
            // before the handler, which runs after the end, has published a level.
            "pv_eoi" => by_register + by_bit == messages && 2 * by_register < messages,
            _ => exits == 0 && by_register == 0 && by_bit == 0,
        };
        ensure!(right && messages > 0, "{way}: messages do not end as they should: {self:?}");
        Ok(())
    }
}
