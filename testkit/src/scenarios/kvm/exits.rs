// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Exits of the guests in L1, counted by what caused them: by the trace points of L1's KVM.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use crate::l1::L1;
use crate::report::Skip;

/// Trace point, keys to count by and which events to count.
const COUNTED: [(&str, &str, &str); 3] = [
    ("kvm_exit", "exit_reason,isa", ""),
    // The registers of COM2 and COM1, and what little else is between them.
    ("kvm_pio", "port", "if port >= 0x2f8 && port <= 0x3ff"),
    ("kvm_msr", "ecx", "if write == 1 && ecx == 0x6e0"),
];

/// Reasons, with the `isa` that they belong to (1: VMX, 2: SVM), of exits that are no doing of a
/// device: the host took an interrupt of its own, a program asked for CPUID as it started, VMX's
/// timer ran out.
const APART: [(u64, u64); 5] = [(0x60, 2), (0x72, 2), (1, 1), (10, 1), (52, 1)];

/// Exits are counted from here on, until [`Trace::finish`].
pub struct Trace<'a>(&'a L1<'a>);

impl<'a> Trace<'a> {
    /// Begins to count.
    pub fn start(l1: &'a L1<'a>) -> Result<Self> {
        mount(l1)?;
        let set = COUNTED.map(|(event, keys, condition)| {
            trigger(event, &format!("hist:keys={keys} {condition}"))
        });
        l1.guest.ok(&set.join(" && "))?;
        Ok(Self(l1))
    }

    /// Ends counting; returns how many exits there were, but for those to the guest's timer (the
    /// TSC's deadline), to its serial ports and of [`APART`].
    pub fn finish(self) -> Result<u64> {
        // Those that count apart are read first and set last: what comes in between is too much
        // rather than too little.
        let read = COUNTED.map(|(event, ..)| format!("echo {event}; cat {EVENTS}/{event}/hist"));
        let text = self.0.guest.ok(&read.into_iter().rev().collect::<Vec<_>>().join("; "))?;
        let remove = COUNTED.map(|(event, keys, _)| trigger(event, &format!("!hist:keys={keys}")));
        self.0.guest.ok(&remove.join(" && "))?;
        let mut exits = 0i64;
        for line in text.lines() {
            // { exit_reason:       1024, isa:          2 } hitcount:        117
            let Some((key, count)) = line.split_once("} hitcount:") else { continue };
            let count: i64 = count.trim().parse().with_context(|| format!("no count: {line}"))?;
            let values =
                key.trim_start_matches('{').split(',').filter_map(|value| value.split(':').nth(1));
            let values: Vec<u64> = values.filter_map(|value| value.trim().parse().ok()).collect();
            match values[..] {
                [reason, isa] if APART.contains(&(reason, isa)) => {}
                [_, _] => exits += count,
                _ => exits -= count,
            }
        }
        u64::try_from(exits)
            .with_context(|| format!("more exits apart than there were at all:\n{text}"))
    }
}

/// Ends of interrupts, counted from here on until [`Ends::finish`].
pub struct Ends<'a>(&'a L1<'a>);

/// How often each vector was ended, by the CPU's local APIC and the vector.
pub type ByVector = BTreeMap<(u64, u64), u64>;

/// Every end that KVM's local APIC carries out, and those of them that the guest has made by KVM's
/// bit in memory. The rest are exits. (What ends by itself is not among them.)
const ENDED: [&str; 2] = ["kvm_eoi", "kvm_pv_eoi"];

impl<'a> Ends<'a> {
    /// Begins to count.
    pub fn start(l1: &'a L1<'a>) -> Result<Self> {
        mount(l1)?;
        l1.guest.ok(&ENDED.map(|event| trigger(event, BY_VECTOR)).join(" && "))?;
        Ok(Self(l1))
    }

    /// Ends counting; returns the exits by which interrupts were ended, and the ends by KVM's bit
    /// in memory.
    pub fn finish(self) -> Result<(ByVector, ByVector)> {
        let [all, by_bit] = ENDED.map(|event| -> Result<ByVector> {
            let text = self.0.guest.ok(&format!("cat {EVENTS}/{event}/hist"))?;
            let counts = text.lines().filter_map(|line| {
                // { apicid:          1, vector:         34 } hitcount:        117
                let (key, count) = line.split_once("} hitcount:")?;
                let mut values =
                    key.split(',').map(|value| value.rsplit(':').next()?.trim().parse().ok());
                Some(((values.next()??, values.next()??), count.trim().parse().ok()?))
            });
            Ok(counts.collect())
        });
        self.0
            .guest
            .ok(&ENDED.map(|event| trigger(event, &format!("!{BY_VECTOR}"))).join(" && "))?;
        let (mut exits, by_bit) = (all?, by_bit?);
        for (key, count) in &by_bit {
            let all = exits.get_mut(key).filter(|all| **all >= *count);
            *all.with_context(|| format!("more ends by a bit than ends: {key:?}"))? -= count;
        }
        Ok((exits, by_bit))
    }
}

const BY_VECTOR: &str = "hist:keys=apicid,vector";

/// Makes the trace points readable, if they are not yet.
fn mount(l1: &L1) -> Result<()> {
    let mounted = "T=/sys/kernel/tracing; { [ -d $T/events ] || mount -t tracefs tracefs $T; } && [ -d $T/events/kvm ]";
    if l1.guest.run(mounted)?.code != 0 {
        return Err(
            Skip("the trace points of this KVM are not to be had: that takes root".into()).into()
        );
    }
    Ok(())
}

/// The trace points of KVM.
const EVENTS: &str = "/sys/kernel/tracing/events/kvm";

/// A shell command that sets a trigger of a trace point, or with `!` removes it.
fn trigger(event: &str, trigger: &str) -> String {
    format!("echo '{trigger}' > {EVENTS}/{event}/trigger")
}
