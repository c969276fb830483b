// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a test kills the process, and what it breaks: outside of tests, nothing.

/// A part of the journal that a test takes out, to see that it is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code, reason = "only tests break things"))]
pub(super) enum Fault {
    /// The successor does not look at what the kernel has stored.
    Sentinel = 1,
    /// A message counts as answered before its effects are committed.
    EarlyAnswer = 2,
    /// A reply is sent before its message counts as answered.
    EarlyReply = 3,
    /// Descriptors are given away for keeping only after their bytes were received.
    LateHold = 4,
    /// A slot counts before it is complete.
    EarlyCount = 5,
}

pub(super) use inner::*;

#[cfg(not(test))]
mod inner {
    /// A moment at which the process can be killed.
    pub(in crate::journal) fn step() {}

    /// Whether a test has taken this out.
    pub(in crate::journal) const fn is(_: super::Fault) -> bool {
        false
    }
}

#[cfg(test)]
mod inner {
    use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

    /// The step at which the process kills itself. 0: never.
    pub(crate) static KILL_AT: AtomicU64 = AtomicU64::new(0);
    /// The [`Fault`](super::Fault) that is there. 0: none.
    pub(crate) static FAULT: AtomicU32 = AtomicU32::new(0);
    static STEPS: AtomicU64 = AtomicU64::new(0);

    /// A moment at which the process can be killed.
    pub(in crate::journal) fn step() {
        let kill_at = KILL_AT.load(Ordering::Relaxed);
        if kill_at > 0 && STEPS.fetch_add(1, Ordering::Relaxed) + 1 == kill_at {
            let _ = rustix::process::kill_process(
                rustix::process::getpid(),
                rustix::process::Signal::KILL,
            );
            // The signal is acted on when the call returns.
            unreachable!("killed");
        }
    }

    /// Whether the test has taken this out.
    pub(in crate::journal) fn is(fault: super::Fault) -> bool {
        FAULT.load(Ordering::Relaxed) == fault as u32
    }
}
