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
    /// Measure this group only: rings, pages, signals, sizes, readers or devices
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
    command.args(args.json.then_some("--json")).args(args.quick.then_some("--quick"));
    if let Some(group) = &args.only {
        command.args(["--only", group]);
    }
    Ok(command.status().context("cannot run cargo")?.success())
}
