//! Runs scenarios one after the other, and enters how they end in a report.

use anyhow::{Result, anyhow};

use crate::lab::{Lab, Options, Scene};
use crate::report::{Figures, Outcome, Report, Skip};
use crate::rig::{Clock, Rig};
use crate::scenario::{Scenario, Test};
use crate::trial;

/// How often a scenario is tried whose machines the emulation loses. It has lost many before guests
/// were kept off L1's first processor (see [`Rig::guest_processor`]), and has other ways to do so:
/// beside two busy loops, the guest of `doorbell_storm` fell silent in one of five runs since.
const TRIES: u32 = 5;

/// Runs scenarios one after the other; returns the figures that they measured.
///
/// The scenarios beside KVM share one L1 as long as they succeed. A scenario during which L1 or a
/// guest in it was lost (see [`Rig::hung`]) runs again, in another L1; the figure `retries` counts
/// these runs.
pub fn run(
    report: &mut Report,
    scenarios: &[&Scenario],
    options: &Options,
    clock: Clock,
) -> Figures {
    let mut figures = Figures::new();
    let lab = trial::open(options);
    let mut rig = None;
    let mut retries = 0;
    for scenario in scenarios {
        report.run(scenario.name, || {
            let lab =
                lab.as_ref().map_err(|error| anyhow!("no guest can be started: {error:#}"))?;
            match scenario.test {
                Test::InGuests(test) => in_guests(lab, scenario, test),
                Test::BesideKvm(test) => {
                    let mut tries = 0;
                    loop {
                        tries += 1;
                        let name = format!("{}-{tries}", folder(scenario));
                        match attempt(lab, clock, &mut rig, &name, test, &mut figures) {
                            Ok(outcome) => return Ok(outcome),
                            Err(Failed { error, hung: true }) if tries < TRIES => {
                                eprintln!(
                                    "{}: a machine was lost, not by the test; it is tried again: \
                                     {error:#}",
                                    scenario.name
                                );
                                retries += 1;
                            }
                            Err(Failed { error, .. }) => return Err(error),
                        }
                    }
                }
            }
        });
    }
    if scenarios.iter().any(|scenario| matches!(scenario.test, Test::BesideKvm(_))) {
        figures.insert("retries".into(), retries.into());
    }
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
fn in_guests(lab: &Lab, scenario: &Scenario, test: fn(&Scene) -> Result<()>) -> Result<Outcome> {
    let scene = lab.scene(&folder(scenario))?;
    match test(&scene) {
        Ok(()) => Ok(Outcome::Passed),
        Err(error) if error.is::<Skip>() => Ok(Outcome::Skipped(error.to_string())),
        Err(error) => {
            let logs = scene.save_logs()?;
            Ok(Outcome::Failed(format!("{error:#}\n    logs: {}", logs.display())))
        }
    }
}

/// How one attempt at a scenario failed.
struct Failed {
    error: anyhow::Error,
    /// Since L1 or a guest in it hung.
    hung: bool,
}

/// Runs a scenario in the L1 that there is, or in a fresh one, which gets `name`. No L1 outlives a
/// failure.
fn attempt<'a>(
    lab: &'a Lab,
    clock: Clock,
    rig: &mut Option<Rig<'a>>,
    name: &str,
    test: fn(&Rig, &mut Figures) -> Result<()>,
    figures: &mut Figures,
) -> Result<Outcome, Failed> {
    let running = match rig.take() {
        Some(running) => running,
        None => {
            let started = lab.scene(name).and_then(|scene| Rig::start(scene, clock, &[]));
            // A Linux that does not come up is one that hangs.
            started.map_err(|error| Failed { error, hung: true })?
        }
    };
    match test(&running, figures) {
        Ok(()) => {
            *rig = Some(running);
            Ok(Outcome::Passed)
        }
        Err(error) if error.is::<Skip>() => {
            *rig = Some(running);
            Ok(Outcome::Skipped(error.to_string()))
        }
        Err(error) => {
            let logs = running.save_logs().map_err(|error| Failed { error, hung: false })?;
            let error = anyhow!("{error:#}\n    logs: {}", logs.display());
            Err(Failed { error, hung: running.hung() })
        }
    }
}
