// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask soak` runs guests, devices and hostile clients on one bus for a long time.

use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use testkit::lab::{Lab, Options};
use testkit::process::stop_on_signals;
use testkit::soak::{self, Spec, Until};
use testkit::trial;

/// The text at the end of `--help`.
const HELP: &str = "\
Guests of processes need root, or a /dev/net/tun and user namespaces that this user may use. The
programs run from copies, so they can be built anew meanwhile.

Control-C ends the run after what it is doing, and it reports what it has. A second one ends it at
once.

Exit codes: 0, all holds, or the run was too short to say whether memory grows and all else holds;
1, a fault was found, or the run could not begin; 130, it was interrupted and has found no fault. A
failed run leaves its logs in target/xtask/logs/soak.";

/// A run that was interrupted by control-C, as shells report it.
const INTERRUPTED: u8 = 130;

#[derive(clap::Args)]
#[command(after_help = HELP)]
pub struct Args {
    /// The minutes to run
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    minutes: u64,
    /// The rounds to run, in place of the minutes
    #[arg(long, conflicts_with = "minutes", value_parser = clap::value_parser!(u64).range(1..))]
    rounds: Option<u64>,
    /// Make the choices of the run with this seed [default: a random one, which is printed]
    #[arg(long)]
    seed: Option<u64>,
    /// Start no virtual machines, only guests of processes
    #[arg(long)]
    without_machines: bool,
    /// Print one JSON object: what happened, what was found, and each census
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    guests: Options,
}

/// Runs the soak and reports it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let stop = stop_on_signals()?;
    let mut lab = if args.without_machines {
        Lab::prepare(&args.guests)?
    } else {
        trial::open(&args.guests)?
    };
    lab.copy_programs()?;
    let spec = Spec {
        until: match args.rounds {
            Some(rounds) => Until::Rounds(rounds),
            None => Until::Time(Duration::from_secs(60 * args.minutes)),
        },
        seed: match args.seed {
            Some(seed) => seed,
            None => random_seed()?,
        },
        machines: !args.without_machines,
    };
    let scene = lab.scene("soak")?;
    let found = soak::run(&scene, &spec, &|| stop.load(Ordering::SeqCst))?;
    if args.json {
        println!("{}", serde_json::to_string(&found)?);
    } else {
        print!("{}", found.table());
    }
    if !found.faults.is_empty() {
        let logs = scene.save_logs()?;
        eprintln!(
            "soak: {} faults; seed {}; logs: {}",
            found.faults.len(),
            spec.seed,
            logs.display()
        );
        return Ok(ExitCode::FAILURE);
    }
    Ok(if found.interrupted { ExitCode::from(INTERRUPTED) } else { ExitCode::SUCCESS })
}

/// A seed that a person can type.
fn random_seed() -> Result<u64> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .context("no random seed")?;
    Ok(u32::from_ne_bytes(bytes).into())
}
