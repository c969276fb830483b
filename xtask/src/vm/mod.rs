//! Tests in whole virtual machines: stock Linux guests under stock QEMU.

mod deaths;
mod harness;
mod hostile;
mod pair;
mod plug;
mod traffic;

use anyhow::Result;

use crate::lab::{Lab, Options, Scene};
use crate::report::{Outcome, Report};

/// One test: a name, a line about it, and what it does.
pub struct Scenario {
    pub name: &'static str,
    pub about: &'static str,
    run: fn(&Scene) -> Result<()>,
}

/// All of them, the quick and basic ones first.
pub const SCENARIOS: &[Scenario] = &[
    Scenario { name: "boot", about: "a guest boots, runs commands, and powers off", run: harness::boot },
    Scenario { name: "reboot", about: "a guest is reset and reboots by itself", run: harness::reboot },
    Scenario {
        name: "two_guests",
        about: "two guests under QEMU's own virtio-net; the test of the tests",
        run: harness::two_guests,
    },
];

/// Runs `scenarios` one after the other.
pub fn run(report: &mut Report, scenarios: &[&Scenario], options: &Options) {
    let lab = Lab::new(options);
    for scenario in scenarios {
        report.run(&format!("vm::{}", scenario.name), || {
            let lab = lab.as_ref().map_err(|error| anyhow::anyhow!("no guest can be started: {error:#}"))?;
            let scene = lab.scene(scenario.name)?;
            match (scenario.run)(&scene) {
                Ok(()) => Ok(Outcome::Passed),
                Err(error) => {
                    let logs = scene.save_logs()?;
                    Ok(Outcome::Failed(format!("{error:#}\n    logs: {}", logs.display())))
                }
            }
        });
    }
}
