// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs scenarios and reports how each ended.

use std::thread;

use anyhow::{Result, anyhow};

use crate::l1::{Clock, L1};
use crate::lab::{Lab, Options, Scene};
use crate::linux;
use crate::report::{Figures, Outcome, Report, Skip};
use crate::scenario::{Scenario, Test};
use crate::trial;

/// Runs scenarios; returns the figures that they measured.
///
/// The scenarios beside KVM run one after the other, and so do the others. If `jobs` is more than
/// one, the two groups run at the same time: most scenarios keep about one processor busy.
///
/// `times` says how often a scenario repeats what it repeats. Without it each has a number of its
/// own, so small that all scenarios together take minutes.
pub fn run(
    report: &Report,
    scenarios: &[&Scenario],
    options: &Options,
    clock: Clock,
    times: Option<u32>,
    jobs: usize,
) -> Figures {
    let mut lab = match trial::open(options) {
        Ok(lab) => lab,
        Err(error) => {
            for scenario in scenarios {
                report.run(scenario.name, || Err(anyhow!("no guest can be started: {error:#}")));
            }
            return Figures::new();
        }
    };
    lab.set_times(times);
    let in_guests = || {
        for scenario in scenarios {
            if let Test::InGuests(test) = scenario.test {
                report.run(scenario.name, || run_in_guests(&lab, scenario, test));
            }
        }
    };
    let beside_kvm = || run_beside_kvm(report, scenarios, &lab, clock);
    if jobs == 1 {
        in_guests();
        return beside_kvm();
    }
    thread::scope(|scope| {
        let others = scope.spawn(in_guests);
        let figures = beside_kvm();
        // A scenario that panics ends the whole run, as it does in this thread.
        others.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        figures
    })
}

/// Runs the scenarios beside KVM, one after the other.
///
/// They share one L1 as long as they succeed. If there is proof that L1's emulated processor failed
/// during a scenario (see [`L1::proof`]), the scenario runs once more, in another L1. Any other
/// failure is one of the test, also if a machine hangs: its logs tell what it did
/// ([`lost`](crate::lost)). The figure `retries` counts the runs after a proof.
fn run_beside_kvm(report: &Report, scenarios: &[&Scenario], lab: &Lab, clock: Clock) -> Figures {
    let mut figures = Figures::new();
    let mut l1 = None;
    let mut retries = None;
    for scenario in scenarios {
        let Test::BesideKvm(test) = scenario.test else { continue };
        let retries = retries.get_or_insert(0);
        report.run(scenario.name, || {
            let folder = folder(scenario);
            let name = format!("{folder}-1");
            match attempt(lab, clock, &mut l1, &name, test, &mut figures) {
                Err(Failed { error, proof: Some(proof) }) => {
                    eprintln!(
                        "{}: the emulated processor failed, so the scenario runs once more. The \
                         proof: {proof}\nThe failure: {error:#}",
                        scenario.name
                    );
                    *retries += 1;
                    let name = format!("{folder}-2");
                    attempt(lab, clock, &mut l1, &name, test, &mut figures)
                }
                outcome => outcome,
            }
            .map_err(|failed| failed.error)
        });
    }
    figures.extend(retries.map(|retries| ("retries".into(), retries.into())));
    figures
}

/// The name of the folder for a scenario's sockets and logs.
fn folder(scenario: &Scenario) -> String {
    match scenario.name.split_once("::") {
        Some(("vm", name)) => name.to_owned(),
        _ => scenario.name.replace("::", "-"),
    }
}

/// Runs a scenario in guests of its own.
fn run_in_guests(
    lab: &Lab,
    scenario: &Scenario,
    test: fn(&Scene) -> Result<()>,
) -> Result<Outcome> {
    let scene = lab.scene(&folder(scenario))?;
    match test(&scene) {
        Ok(()) => Ok(Outcome::Passed),
        Err(error) if error.is::<Skip>() => Ok(skipped(&error)),
        Err(error) => {
            let logs = scene.save_logs()?;
            Ok(Outcome::Failed(format!("{error:#}\n    logs: {}", logs.display())))
        }
    }
}

/// The outcome of a scenario with a [`Skip`]. The reason may come after what the scenario was at.
fn skipped(error: &anyhow::Error) -> Outcome {
    Outcome::Skipped(format!("{error:#}"))
}

/// How one attempt at a scenario failed.
struct Failed {
    error: anyhow::Error,
    /// What shows that the emulated processor failed; see [`L1::proof`].
    proof: Option<String>,
}

/// Starts an L1, whose guests have the Linux driver if it can be built for them.
fn start(scene: Scene, clock: Clock) -> Result<L1> {
    let system = match linux::lab_system(&scene) {
        Err(error) if error.is::<Skip>() => {
            eprintln!("the guests of the scenarios with KVM have no Linux driver: {error:#}");
            scene.lab.system().clone()
        }
        system => system?,
    };
    L1::start_with(scene, clock, &[], &system)
}

/// Runs a scenario in the running L1. If there is none, starts one called `name`. A failure ends
/// the L1.
fn attempt<'a>(
    lab: &'a Lab,
    clock: Clock,
    l1: &mut Option<L1<'a>>,
    name: &str,
    test: fn(&L1, &mut Figures) -> Result<()>,
    figures: &mut Figures,
) -> Result<Outcome, Failed> {
    let running = match l1.take() {
        Some(running) => {
            running.begin();
            running
        }
        None => {
            let started = lab.scene(name).and_then(|scene| start(scene, clock));
            started.map_err(|error| Failed { error, proof: None })?
        }
    };
    match test(&running, figures) {
        Ok(()) => {
            *l1 = Some(running);
            Ok(Outcome::Passed)
        }
        Err(error) if error.is::<Skip>() => {
            *l1 = Some(running);
            Ok(skipped(&error))
        }
        Err(error) => {
            if running.hung() {
                running.look();
            }
            let logs = running.save_logs().map_err(|error| Failed { error, proof: None })?;
            let error = anyhow!("{error:#}\n    logs: {}", logs.display());
            Err(Failed { error, proof: running.proof() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skip_has_its_reason_whatever_the_scenario_was_at() {
        let error = anyhow::Error::from(Skip("no such kernel".into())).context("Linux 6.1");
        assert!(error.is::<Skip>());
        assert!(
            matches!(skipped(&error), Outcome::Skipped(why) if why == "Linux 6.1: no such kernel")
        );
    }
}
