//! Exits of the guests in L1, counted by what caused them: by the trace points of L1's KVM.

use anyhow::{Context, Result};

use super::rig::Rig;
use crate::report::Skip;

/// Trace point, keys to count by and which events to count.
const COUNTED: [(&str, &str, &str); 3] = [
    ("kvm_exit", "exit_reason,isa", ""),
    // The registers of COM2 and COM1, and what little else is between them.
    ("kvm_pio", "port", "if port >= 0x2f8 && port <= 0x3ff"),
    ("kvm_msr", "ecx", "if write == 1 && ecx == 0x6e0"),
];

/// Reasons, with the `isa` that they belong to (1: VMX, 2: SVM), of exits that are no doing of a device: the host took an interrupt of
/// its own, a program asked for CPUID as it started, VMX's timer ran out.
const APART: [(u64, u64); 5] = [(0x60, 2), (0x72, 2), (1, 1), (10, 1), (52, 1)];

/// Exits are counted from here on, until [`Trace::finish`].
pub struct Trace<'a>(&'a Rig<'a>);

impl<'a> Trace<'a> {
    /// Begins to count.
    pub fn start(rig: &'a Rig<'a>) -> Result<Self> {
        let mounted =
            "T=/sys/kernel/tracing; { [ -d $T/events ] || mount -t tracefs tracefs $T; } && [ -d $T/events/kvm ]";
        if rig.guest.run(mounted)?.code != 0 {
            return Err(Skip("the trace points of this KVM are not to be had: that takes root".into()).into());
        }
        let trace = Self(rig);
        for (event, keys, condition) in COUNTED {
            trace.trigger(event, &format!("hist:keys={keys} {condition}"))?;
        }
        Ok(trace)
    }

    /// Ends counting; returns how many exits there were, but for those to the guest's timer (the TSC's deadline), to its serial
    /// ports and of [`APART`].
    pub fn finish(self) -> Result<u64> {
        let mut exits = 0i64;
        for (event, keys, _) in COUNTED {
            let path = format!("/sys/kernel/tracing/events/kvm/{event}/hist");
            for line in self.0.guest.ok(&format!("cat {path}"))?.lines() {
                // { exit_reason:       1024, isa:          2 } hitcount:        117
                let Some((key, count)) = line.split_once("} hitcount:") else { continue };
                let count: i64 = count.trim().parse().with_context(|| format!("{event}: {line}"))?;
                let values = key.trim_start_matches('{').split(',').filter_map(|value| value.split(':').nth(1));
                let values: Vec<u64> = values.filter_map(|value| value.trim().parse().ok()).collect();
                match values[..] {
                    [reason, isa] if APART.contains(&(reason, isa)) => {}
                    [_, _] => exits += count,
                    _ => exits -= count,
                }
            }
            self.trigger(event, &format!("!hist:keys={keys}"))?;
        }
        u64::try_from(exits).context("more exits apart than there were at all")
    }

    fn trigger(&self, event: &str, trigger: &str) -> Result<()> {
        let path = format!("/sys/kernel/tracing/events/kvm/{event}/trigger");
        self.0.guest.ok(&format!("echo '{trigger}' > {path}")).map(drop)
    }
}
