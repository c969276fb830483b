// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask faults`: what a bus makes of system calls that fail.

use anyhow::{Result, ensure};
use testkit::faults::{CALLS, Plan, Summary, sweep};
use testkit::progress::Progress;
use testkit::report::{Outcome, Skip};
use testkit::workspace;

/// Trials of a short run, as a test.
const SHORT: usize = 60;

#[derive(clap::Args)]
pub struct Args {
    /// The system calls that fail, by name; all if none is named
    calls: Vec<String>,
    /// Try at most this many faults, spread over all [default: all]
    #[arg(long, value_name = "N")]
    most: Option<usize>,
    /// Let at most this many calls of one kind fail
    #[arg(long, value_name = "N", default_value_t = 60)]
    most_of_kind: u32,
    /// How many buses run at once [default: the number of processors]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    jobs: usize,
    /// Also print what each fault did that was borne
    #[arg(long)]
    effects: bool,
    /// Only print the names of the calls that can fail, with their errors
    #[arg(long)]
    list: bool,
}

/// Runs the command. Returns false if the bus did not bear a fault.
pub fn run(args: &Args) -> Result<bool> {
    if args.list {
        for call in CALLS {
            let errors: Vec<_> = call.errors.iter().map(ToString::to_string).collect();
            println!("{:16} {}", call.name, errors.join(", "));
        }
        return Ok(true);
    }
    for name in &args.calls {
        ensure!(
            CALLS.iter().any(|call| call.name == name),
            "{name:?} is no call that can fail; `cargo xtask faults --list` names them"
        );
    }
    let plan = Plan {
        most: args.most,
        most_of_kind: args.most_of_kind,
        only: args.calls.clone(),
        jobs: args.jobs,
    };
    let vbus = workspace::build_debug("vbus")?;
    let summary = sweep(&vbus, &plan, Progress::begin("faults", "a bus for each call that fails"))?;
    if args.effects {
        summary.effects.iter().for_each(|effect| println!("{effect}"));
    }
    println!("{}", line(&summary));
    Ok(summary.failures.is_empty())
}

/// A short run, as a test.
pub fn test() -> Result<Outcome> {
    let plan = Plan { most: Some(SHORT), most_of_kind: 60, ..Plan::default() };
    let vbus = workspace::build_debug("vbus")?;
    let progress = Progress::begin("faults", "a bus for each call that fails");
    let summary = match sweep(&vbus, &plan, progress) {
        Ok(summary) => summary,
        Err(error) => {
            return error.downcast::<Skip>().map(|Skip(reason)| Outcome::Skipped(reason));
        }
    };
    eprintln!("faults: {}", line(&summary));
    // A call that a client's timing decides on may not be made again, but most are.
    ensure!(
        summary.tried > 0 && summary.hit * 2 > summary.tried,
        "of {} faults only {} came, so this run shows nothing of the bus",
        summary.tried,
        summary.hit
    );
    if summary.failures.is_empty() {
        return Ok(Outcome::Passed);
    }
    Ok(Outcome::Failed(summary.failures.join("\n")))
}

fn line(summary: &Summary) -> String {
    let Summary { tried, hit, failures, effects } = summary;
    format!(
        "{tried} faults, {hit} of them came, {} were seen by a client or in the log, {} not borne",
        effects.len(),
        failures.len()
    )
}
