// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask kvm` runs on any machine what needs a real KVM.
//!
//! If a guest boots with the host's own KVM, that KVM is used. Otherwise it is the KVM of a stock
//! Linux (`kvm_amd`) in a virtual machine whose SVM QEMU emulates. That Linux is called L1, and its
//! guests L2. In both cases a scenario sees the same: a root shell with our programs on its PATH,
//! `/dev/kvm`, and the guests' kernel and root file system in the folder `$L2`.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;
use testkit::l1::{Clock, L1};
use testkit::lab::Options;
use testkit::put::Put;
use testkit::report::Report;
use testkit::scenario::Scenario;
use testkit::scenarios::SCENARIOS;
use testkit::{runner, trial};

use crate::shell;

/// The beginning of these scenarios' names. On the command line it may be left out.
const PREFIX: &str = "kvm::";

/// The text at the end of `--help`.
const HELP: &str = "\
A command of your own runs in a Linux with /dev/kvm. It finds vbus, vbus-vmm, guest-agent and
busybox on its PATH, and a kernel and root file system for guests in $L2/kernel and $L2/initramfs:
  cargo xtask kvm -- 'ls -l /dev/kvm; vbus-vmm --help'
  cargo xtask kvm --as-built --put target/guest/x86_64-unknown-linux-gnu/release/try -- try
  cargo xtask kvm -- sh        reads commands from standard input
A program that you bring with --put must be linked statically:
  RUSTFLAGS='-C target-feature=+crt-static' cargo build --release \\
    --target x86_64-unknown-linux-gnu -p PACKAGE
Where QEMU emulates SVM, start a VMM with `taskset 2`: on the first processor QEMU sometimes loses
a guest. A failed run leaves its console and logs in target/xtask/logs/kvm*.";

#[derive(clap::Args)]
#[command(after_help = HELP)]
pub struct Args {
    /// Names of scenarios, or beginnings of them
    names: Vec<String>,
    /// Only print the names
    #[arg(long)]
    list: bool,
    /// Print one JSON object as the last line: the figures
    #[arg(long)]
    json: bool,
    /// Copy a file into /root, which is first on the command's PATH, or to the path PATH; the copy
    /// is executable
    #[arg(long, value_name = "FILE[=PATH]")]
    put: Vec<Put>,
    /// Use one CPU and a clock that counts instructions: it is slower, but the figures hardly
    /// change from run to run
    #[arg(long)]
    counted: bool,
    /// How often a scenario that repeats something does so. Scenarios that take long run only with
    /// this
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    times: Option<u32>,
    /// Seconds that a command may take
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    limit: u64,
    #[command(flatten)]
    guests: Options,
    /// Run this shell command there, in place of the scenarios; `sh` reads commands from standard
    /// input
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs the chosen scenarios or the command. Returns false if one failed.
pub fn run(args: &Args) -> Result<bool> {
    let clock = if args.counted { Clock::Instructions } else { Clock::Time };
    if !args.command.is_empty() {
        // A wrong --put is reported before anything is built.
        args.put.iter().try_for_each(|put| put.read().map(drop))?;
        let lab = trial::open(&args.guests)?;
        let l1 = L1::start(lab.scene("kvm")?, clock, &args.put)?;
        eprintln!("kvm: {}", l1.describe()?);
        return command(&l1, &args.command.join(" "), Duration::from_secs(args.limit));
    }
    let wanted = |scenario: &&Scenario| {
        let name = scenario.name.strip_prefix(PREFIX);
        name.is_some_and(|name| {
            args.names.is_empty()
                || args
                    .names
                    .iter()
                    .any(|wanted| name.starts_with(wanted.strip_prefix(PREFIX).unwrap_or(wanted)))
        })
    };
    let scenarios: Vec<_> = SCENARIOS.iter().filter(wanted).collect();
    if args.list {
        for scenario in &scenarios {
            let name = scenario.name.strip_prefix(PREFIX).unwrap_or(scenario.name);
            println!("{name:28} {}", scenario.about);
        }
        return Ok(true);
    }
    ensure!(
        !scenarios.is_empty(),
        "no scenario is called {}; `cargo xtask kvm --list` names them",
        args.names.join(" or ")
    );
    let report = Report::default();
    let figures = runner::run(&report, &scenarios, &args.guests, clock, args.times, 1);
    if args.json {
        let ok = report.show_failures();
        eprintln!("{}", report.summary());
        println!("{}", Value::Object(figures));
        return Ok(ok);
    }
    for (name, value) in &figures {
        println!("{name:40} {value}");
    }
    Ok(report.finish(false))
}

/// Runs one shell command with our standard input, output and error.
fn command(l1: &L1, command: &str, limit: Duration) -> Result<bool> {
    match shell::run(&l1.guest, command, limit) {
        Ok(0) => Ok(true),
        Ok(code) => {
            eprintln!("kvm: the command ended with {code}");
            Ok(false)
        }
        Err(error) => {
            let logs = l1.save_logs()?;
            Err(error.context(format!("logs: {}", logs.display())))
        }
    }
}
