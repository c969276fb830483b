//! `cargo xtask kvm`: what needs a real KVM, on any machine.
//!
//! The KVM is the host's own if a guest boots with it, else that of a stock Linux with `kvm_amd` in
//! a machine whose SVM QEMU emulates. Either way the scenarios see the same: a shell as root with
//! our programs on its PATH, `/dev/kvm`, and in `$L2` the kernel and root file system for guests.
//! That Linux is called L1, and the guests in it L2.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;
use testkit::lab::Options;
use testkit::put::Put;
use testkit::report::Report;
use testkit::rig::{Clock, Rig};
use testkit::scenario::Scenario;
use testkit::scenarios::SCENARIOS;
use testkit::{runner, trial};

use crate::shell;

/// What the names of the scenarios beside KVM begin with; on the command line it may be left out.
const PREFIX: &str = "kvm::";

/// How to use it by hand.
const HELP: &str = "\
A command of your own sees a Linux with /dev/kvm, vbus, vbus-vmm and guest-agent on its PATH, busybox, and a kernel and
root file system for guests in $L2/kernel and $L2/initramfs:
  cargo xtask kvm -- 'ls -l /dev/kvm; vbus-vmm --help'
  cargo xtask kvm --as-built --put target/guest/x86_64-unknown-linux-gnu/release/try -- try
  cargo xtask kvm -- sh        reads commands from standard input
A program brought along with --put has to be linked statically:
  RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --target x86_64-unknown-linux-gnu -p PACKAGE
Where QEMU emulates SVM, what runs virtual CPUs has to stand behind `taskset 2`: on the first processor it loses guests now and then.
Console and logs of a run that failed are in target/xtask/logs/kvm*.";

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
    /// Bring a file along, as an executable in /root, which is first on the PATH; or to PATH
    #[arg(long, value_name = "FILE[=PATH]")]
    put: Vec<Put>,
    /// One CPU and a clock that counts instructions: slower, and nearly the same figures from run
    /// to run
    #[arg(long)]
    counted: bool,
    /// Seconds that a command may take
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    limit: u64,
    #[command(flatten)]
    guests: Options,
    /// Run this as a shell command beside the KVM, in place of the scenarios; `sh` reads commands
    /// from standard input
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs the chosen scenarios or the command; false if one failed.
pub fn run(args: &Args) -> Result<bool> {
    let clock = if args.counted { Clock::Instructions } else { Clock::Time };
    if !args.command.is_empty() {
        // What cannot be brought along is known before anything is built.
        args.put.iter().try_for_each(|put| put.read().map(drop))?;
        let lab = trial::open(&args.guests)?;
        let rig = Rig::start(lab.scene("kvm")?, clock, &args.put)?;
        eprintln!("kvm: {}", rig.describe()?);
        return command(&rig, &args.command.join(" "), Duration::from_secs(args.limit));
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
    let mut report = Report::default();
    let figures = runner::run(&mut report, &scenarios, &args.guests, clock);
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
fn command(rig: &Rig, command: &str, limit: Duration) -> Result<bool> {
    match shell::run(&rig.guest, command, limit) {
        Ok(0) => Ok(true),
        Ok(code) => {
            eprintln!("kvm: the command ended with {code}");
            Ok(false)
        }
        Err(error) => {
            let logs = rig.save_logs()?;
            Err(error.context(format!("logs: {}", logs.display())))
        }
    }
}
