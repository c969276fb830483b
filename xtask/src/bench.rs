//! The measures of `bench/`, a workspace of its own with the peers that it measures against.

use anyhow::{Context, Result};

use testkit::workspace;

/// What to measure, and how to say it.
#[derive(clap::Args)]
pub struct Args {
    /// Close with one line of JSON: ratios above 1 mean that vbus is the faster
    #[arg(long)]
    json: bool,
    /// Fewer processes and rounds: for a first look
    #[arg(long)]
    quick: bool,
    /// Measure with real-time priority, for a machine that has other work: needs root, and chrt
    #[arg(long)]
    realtime: bool,
    /// Measure this group only: rings, pages, signals, lines, sizes, readers or devices
    #[arg(long, value_name = "GROUP")]
    only: Option<String>,
}

/// Builds and runs the benchmark. Charts go to `target/bench`.
pub fn run(args: &Args) -> Result<bool> {
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
