// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lets each system call of a bus fail in turn, and checks what the bus makes of it.
//!
//! A trial is a bus with its clients, from its start to its end (`trial`). First a trial without a
//! fault counts the calls. Then each call fails in a trial of its own, with each error that it can
//! have (`inject`). The bus may say an error and not start, and a client may get an error. But the
//! bus must not panic, hang, or end after its start; other and later clients must be served; and
//! nothing may be left behind.

mod inject;
mod trial;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};

pub use inject::{CALLS, Call, Fault, Kind};
pub use trial::{Outcome, Part};

use crate::process::RunDir;
use crate::progress::Progress;
use crate::report::Skip;

/// Which faults are tried.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The most trials; they are spread over all faults. `None`: all.
    pub most: Option<usize>,
    /// The most calls of one kind that fail. The further ones are much like the earlier ones.
    pub most_of_kind: u32,
    /// The calls that fail, by name; all if there is none.
    pub only: Vec<String>,
    /// How many trials run at once. 0: as many as there are processors.
    pub jobs: usize,
}

/// What has been tried.
#[derive(Debug, Default)]
pub struct Summary {
    /// Trials.
    pub tried: usize,
    /// Trials whose fault came.
    pub hit: usize,
    /// For each fault that the bus did not bear: the fault, and what happened.
    pub failures: Vec<String>,
    /// For each fault that was seen outside: the fault, and what was seen.
    pub effects: Vec<String>,
}

/// Tries faults on the program `vbus`.
///
/// # Errors
/// A trial without a fault fails. [`Skip`] if this machine has no such filters.
pub fn sweep(vbus: &Path, plan: &Plan, mut progress: Progress) -> Result<Summary> {
    check_filters()?;
    let dir = RunDir::new()?;
    let points = points(vbus, dir.path(), plan)?;
    let total = points.len();
    let next = AtomicUsize::new(0);
    let shared = Mutex::new((Summary::default(), &mut progress));
    let one = || {
        while let Some((part, fault)) = points.get(next.fetch_add(1, Ordering::Relaxed)) {
            let about = about(*part, fault);
            let outcome = run(vbus, dir.path(), *part, Some(*fault));
            let (summary, progress) = &mut *shared.lock().unwrap_or_else(PoisonError::into_inner);
            summary.tried += 1;
            progress.at(&format!("{} of {total}: {about}", summary.tried));
            match outcome {
                Err(error) => {
                    let failure = format!("{about}: {error:#}");
                    eprintln!("FAILED  {failure}");
                    summary.failures.push(failure);
                }
                Ok(outcome) => {
                    summary.hit += usize::from(outcome.hits > 0);
                    let seen = outcome.effects.join("; ");
                    if !seen.is_empty() {
                        summary.effects.push(format!("{about}: {seen}"));
                    }
                }
            }
        }
    };
    let processors = thread::available_parallelism().map_or(1, |count| count.get());
    let jobs = if plan.jobs == 0 { processors } else { plan.jobs };
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(one);
        }
    });
    let (summary, _) = shared.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(summary)
}

/// Checks that a child of this process can have the filter.
fn check_filters() -> Result<()> {
    let mut command = Command::new("true");
    let _injector = inject::Injector::prepare(&mut command, None)?;
    command.status().map(drop).map_err(|error| {
        Skip(format!("no seccomp filter that reports system calls to this process: {error}")).into()
    })
}

/// A trial in a folder of its own.
fn run(vbus: &Path, dir: &Path, part: Part, fault: Option<Fault>) -> Result<Outcome> {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let folder = dir.join(NUMBER.fetch_add(1, Ordering::Relaxed).to_string());
    fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let outcome = trial::run(vbus, &folder, part, fault);
    if outcome.is_ok() {
        fs::remove_dir_all(&folder)?;
    }
    outcome
}

/// The faults of a plan.
fn points(vbus: &Path, dir: &Path, plan: &Plan) -> Result<Vec<(Part, Fault)>> {
    let mut points = Vec::new();
    for part in [Part::Work, Part::End] {
        let outcome = run(vbus, dir, part, None).context("without a fault")?;
        for (kind, count) in outcome.counts {
            let name = CALLS[kind.call].name;
            if !plan.only.is_empty() && !plan.only.iter().any(|only| only == name) {
                continue;
            }
            for nth in 1..=count.min(plan.most_of_kind) {
                points.push((part, Fault { kind, nth, lasting: false }));
                // An interruption that lasts is no fault of this world.
                if kind.errno() != rustix::io::Errno::INTR {
                    points.push((part, Fault { kind, nth, lasting: true }));
                }
            }
        }
    }
    if let Some(most) = plan.most.filter(|most| *most < points.len()) {
        let all = points.len();
        points = (0..most).map(|n| points[n * all / most]).collect();
    }
    Ok(points)
}

/// A fault in words, such as `mmap of the bus, call 3 and all later ones: ENOMEM`.
fn about(part: Part, fault: &Fault) -> String {
    let Fault { kind, nth, lasting } = fault;
    let process = if kind.other { "supervisor" } else { "bus" };
    let later = if *lasting { " and all later ones" } else { "" };
    let part = if part == Part::End { " of the end" } else { "" };
    let name = CALLS[kind.call].name;
    format!("{name} of the {process}, call {nth}{part}{later}: {}", errno_name(kind.errno()))
}

fn errno_name(errno: rustix::io::Errno) -> &'static str {
    use rustix::io::Errno;
    match errno {
        Errno::INTR => "EINTR",
        Errno::MFILE => "EMFILE",
        Errno::NOMEM => "ENOMEM",
        Errno::NOSPC => "ENOSPC",
        _ => "an error",
    }
}
