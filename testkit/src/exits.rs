// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Counts the exits of L1's guests by their reason. The trace points of L1's KVM tell it.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use crate::l1::L1;
use crate::report::Skip;

/// A trace point, the keys that it counts by, and the events that it counts.
const COUNTED: [(&str, &str, &str); 3] = [
    ("kvm_exit", "exit_reason,isa", ""),
    // The registers of COM2 and COM1, and the few ports between them.
    ("kvm_pio", "port", "if port >= 0x2f8 && port <= 0x3ff"),
    ("kvm_msr", "ecx", "if write == 1 && ecx == 0x6e0"),
];

/// The reasons of exits that no device causes, with their `isa` (1: VMX, 2: SVM): the host took an
/// interrupt of its own, a program executed CPUID at its start, the timer of VMX expired.
const APART: [(u64, u64); 5] = [(0x60, 2), (0x72, 2), (1, 1), (10, 1), (52, 1)];

/// Counts exits from its creation until [`Trace::finish`].
pub struct Trace<'a>(&'a L1<'a>);

impl<'a> Trace<'a> {
    /// Starts to count.
    pub fn start(l1: &'a L1<'a>) -> Result<Self> {
        mount(l1)?;
        let set = COUNTED.map(|(event, keys, condition)| {
            trigger(event, &format!("hist:keys={keys} {condition}"))
        });
        l1.guest.ok(&set.join(" && "))?;
        Ok(Self(l1))
    }

    /// Stops. Returns the number of exits, without those of the guest's timer (the TSC's deadline),
    /// of its serial ports, and those that no device causes.
    pub fn finish(self) -> Result<u64> {
        // The exits to subtract are counted for a shorter time: this reads their counts first and
        // started them last. So an error makes the result too large, and never too small.
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
        u64::try_from(exits).with_context(|| format!("more exits to subtract than exits:\n{text}"))
    }
}

/// Counts ends of interrupts from its creation until [`Ends::finish`].
pub struct Ends<'a>(&'a L1<'a>);

/// The number of ends, by the id of the local APIC and the vector.
pub type ByVector = BTreeMap<(u64, u64), u64>;

/// The first counts every end that KVM's local APIC carries out. The second counts those that the
/// guest made by KVM's bit in memory. The other ends are exits. (Interrupts that end by themselves
/// are in neither.)
const ENDED: [&str; 2] = ["kvm_eoi", "kvm_pv_eoi"];

impl<'a> Ends<'a> {
    /// Starts to count.
    pub fn start(l1: &'a L1<'a>) -> Result<Self> {
        mount(l1)?;
        l1.guest.ok(&ENDED.map(|event| trigger(event, BY_VECTOR)).join(" && "))?;
        Ok(Self(l1))
    }

    /// Stops. Returns the ends that were exits, and the ends by KVM's bit in memory.
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

/// Mounts the file system of the trace points, if it is not mounted yet.
fn mount(l1: &L1) -> Result<()> {
    let mounted = "T=/sys/kernel/tracing; { [ -d $T/events ] || mount -t tracefs tracefs $T; } \
                   && [ -d $T/events/kvm ]";
    if l1.guest.run(mounted)?.code != 0 {
        return Err(Skip("only root can read the trace points of this KVM".into()).into());
    }
    Ok(())
}

/// The trace points of KVM.
const EVENTS: &str = "/sys/kernel/tracing/events/kvm";

/// A shell command that sets a trigger of a trace point, or with `!` removes it.
fn trigger(event: &str, trigger: &str) -> String {
    format!("echo '{trigger}' > {EVENTS}/{event}/trigger")
}
