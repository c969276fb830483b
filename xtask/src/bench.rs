// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask bench` runs `bench/`, a workspace of its own with vbus's peers among its
//! dependencies.

use anyhow::{Context, Result};

use testkit::workspace;

/// What to measure, and how to print it.
#[derive(clap::Args)]
pub struct Args {
    /// Measure something else than the shared memory
    #[arg(value_enum, conflicts_with_all = ["quick", "realtime", "only"])]
    what: Option<What>,
    /// Print one JSON object as the last line; a ratio above 1 means that vbus is faster
    #[arg(long)]
    json: bool,
    /// Use fewer processes and rounds, for a first look
    #[arg(long)]
    quick: bool,
    /// Measure with real-time priority, for a machine that has other work: needs root, and chrt
    #[arg(long)]
    realtime: bool,
    /// Measure this group only: rings, pages, signals, lines, sizes, readers or devices
    #[arg(long, value_name = "GROUP")]
    only: Option<String>,
}

/// What else can be measured.
#[derive(Clone, Copy, clap::ValueEnum)]
enum What {
    /// How long one hostile client can keep the device of another waiting, for each expensive thing
    /// that it can ask for
    Fairness,
    /// How much of its rate a pair of NICs keeps on a switch beside a storm: a flood of broadcasts,
    /// a bridge loop, a receiver that posts its buffers one by one
    Bystanders,
}

/// Builds and runs the benchmark. Charts go to `target/bench`.
pub fn run(args: &Args) -> Result<bool> {
    if let Some(what) = args.what {
        let (package, example) = match what {
            What::Fairness => ("vbus-vfio-user", "fairness"),
            What::Bystanders => ("vbus-devices", "bystanders"),
        };
        let mut command = workspace::cargo();
        command.current_dir(workspace::root());
        command.args(["run", "--quiet", "--release", "--locked", "--package", package]);
        command.args(["--example", example, "--"]);
        command.args(args.json.then_some("--json"));
        return Ok(command.status().context("cannot run cargo")?.success());
    }
    let mut command = workspace::cargo();
    command.current_dir(workspace::root().join("bench"));
    command
        .args(["run", "--quiet", "--release", "--locked", "--"])
        .arg("--out")
        .arg(workspace::target().join("bench"));
    let options = [(args.json, "--json"), (args.quick, "--quick"), (args.realtime, "--realtime")];
    command.args(options.into_iter().filter(|(wanted, _)| *wanted).map(|(_, option)| option));
    if let Some(group) = &args.only {
        command.args(["--only", group]);
    }
    Ok(command.status().context("cannot run cargo")?.success())
}
