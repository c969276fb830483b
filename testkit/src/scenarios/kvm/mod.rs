//! `cargo xtask kvm`: what needs a real KVM, on any machine.
//!
//! The KVM is the host's own if a guest boots with it, else that of a stock Linux with `kvm_amd` in
//! a machine whose SVM QEMU emulates. Either way the scenarios see the same: a shell as root with
//! our programs on its PATH, `/dev/kvm`, and in `$L2` the kernel and root file system for guests.
//! That Linux is called L1, and the guests in it L2.

mod config;
mod counted;
mod devices;
mod doorbells;
mod exits;
mod flat;
mod inner;
mod liars;
mod linux;
mod net;
mod pins;
mod processors;
mod rig;
mod sched;

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use serde_json::Value;

use crate::lab::{Lab, Options};
use crate::report::{Outcome, Report, Skip};
use crate::workspace;
pub use rig::Clock;
use rig::{File, Rig};

/// How often a scenario is tried whose machines the emulation loses. It has lost many before guests
/// were kept off L1's first processor (see [`Rig::guest_processor`]), and has other ways to do so:
/// beside two busy loops, the guest of `doorbell_storm` fell silent in one of five runs since.
const TRIES: u32 = 5;

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
    put: Vec<File>,
    /// One CPU and a clock that counts instructions: slower, and nearly the same figures from run
    /// to run
    #[arg(long)]
    counted: bool,
    /// Seconds that a command may take
    #[arg(long, default_value_t = 600)]
    limit: u64,
    #[command(flatten)]
    guests: Options,
    /// Run this as a shell command beside the KVM, in place of the scenarios; `sh` reads commands
    /// from standard input
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Figures that a scenario has measured, by name.
pub type Figures = serde_json::Map<String, Value>;

/// One test: a name, a line about it, and what it does.
pub struct Scenario {
    pub name: &'static str,
    pub about: &'static str,
    run: fn(&Rig, &mut Figures) -> Result<()>,
}

/// All of them, the quick and basic ones first.
pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "harness",
        "QEMU boots a guest on the rig's KVM: the test of the tests",
        linux::harness,
    ),
    scenario(
        "flat",
        "a guest without an operating system drives devices by each kind of doorbell",
        flat::drives_devices,
    ),
    scenario(
        "doorbells",
        "one exit for a ring of each kind, and none to user space",
        flat::doorbells,
    ),
    scenario("interrupts", "exits of an interrupt, by how it ends and with pic", flat::interrupts),
    scenario(
        "pic_cpus",
        "pic on two CPUs: lines raised, masked and moved all the time, none lost, urgent ones first",
        processors::pic,
    ),
    scenario(
        "connector",
        "vbus-kvm by itself: doorbells, messages, levels, their routes and exits",
        doorbells::connector,
    ),
    scenario(
        "counted",
        "by a clock that counts instructions, figures repeat within 1 %",
        counted::repeats,
    ),
    scenario(
        "boot",
        "Linux boots in vbus-vmm, with 1 and 2 CPUs, full and split irqchip",
        linux::boot,
    ),
    scenario(
        "traffic",
        "TCP both ways with 2 CPUs, interrupts that move, reboot",
        devices::traffic,
    ),
    scenario(
        "plug_cycles",
        "20 times plug, use and unplug beside traffic on another NIC",
        devices::plug_cycles,
    ),
    scenario(
        "shared_pins",
        "ten devices with INTx on eight pins: each interrupt arrives",
        pins::shared,
    ),
    scenario(
        "config_writes",
        "random writes of configuration spaces, beside traffic on another NIC",
        config::writes,
    ),
    scenario(
        "liars",
        "servers that lie about a device that is plugged, beside traffic on a NIC",
        liars::lie,
    ),
    scenario("deaths", "the bus dies under a guest and comes back; the VMM dies", devices::deaths),
    scenario(
        "doorbell_kinds",
        "Linux is offered doorbells by memory and by port, and takes the cheaper",
        doorbells::kinds,
    ),
    scenario(
        "doorbell_storm",
        "Linux rings without end: its other devices and the bus go on",
        doorbells::storm,
    ),
    scenario(
        "sched",
        "how late a real-time task of the guest wakes under load, with and without sched",
        sched::latency,
    ),
    scenario(
        "against_virtio",
        "exits and interrupts of the same traffic, beside QEMU's virtio-net",
        net::against_virtio,
    ),
];

const fn scenario(
    name: &'static str,
    about: &'static str,
    run: fn(&Rig, &mut Figures) -> Result<()>,
) -> Scenario {
    Scenario { name, about, run }
}

/// Runs the chosen scenarios or the command; false if one failed.
pub fn run(args: &Args) -> Result<bool> {
    let clock = if args.counted { Clock::Instructions } else { Clock::Time };
    if !args.command.is_empty() {
        let lab = Lab::new(&args.guests)?;
        let rig = Rig::start(lab.scene("kvm")?, clock, &args.put)?;
        eprintln!("kvm: {}", rig.describe()?);
        return command(&rig, &args.command.join(" "), Duration::from_secs(args.limit));
    }
    let wanted = |name: &str| {
        args.names.is_empty() || args.names.iter().any(|wanted| name.starts_with(wanted.as_str()))
    };
    let scenarios: Vec<_> = SCENARIOS.iter().filter(|scenario| wanted(scenario.name)).collect();
    if args.list {
        for scenario in &scenarios {
            println!("{:28} {}", scenario.name, scenario.about);
        }
        return Ok(true);
    }
    ensure!(
        !scenarios.is_empty(),
        "no scenario is called {}; `cargo xtask kvm --list` names them",
        args.names.join(" or ")
    );
    let mut report = Report::new();
    let figures = run_scenarios(&mut report, &scenarios, &args.guests, clock);
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

/// Runs scenarios one after the other, in one L1 as long as they succeed; returns their figures.
///
/// One during which L1 or a guest in it was lost (see [`Rig::hung`]) is run again, in another L1;
/// the figure `retries` counts that.
pub fn run_scenarios(
    report: &mut Report,
    scenarios: &[&Scenario],
    options: &Options,
    clock: Clock,
) -> Figures {
    let mut figures = Figures::new();
    if let Some(why) = workspace::too_old_for_vmm() {
        for scenario in scenarios {
            report.run(&format!("kvm::{}", scenario.name), || Ok(Outcome::Skipped(why.clone())));
        }
        return figures;
    }
    let lab = Lab::new(options);
    let mut rig = None;
    let mut retries = 0;
    for scenario in scenarios {
        report.run(&format!("kvm::{}", scenario.name), || {
            let lab = lab.as_ref().map_err(|error| anyhow!("the rig cannot be started: {error:#}"))?;
            let mut tries = 0;
            loop {
                tries += 1;
                match attempt(lab, clock, &mut rig, scenario, &mut figures, tries) {
                    Ok(outcome) => return Ok(outcome),
                    Err(Failed { error, hung: true }) if tries < TRIES => {
                        eprintln!(
                            "kvm::{}: a machine was lost, not by the test; it is tried again: {error:#}",
                            scenario.name
                        );
                        retries += 1;
                    }
                    Err(Failed { error, .. }) => return Err(error),
                }
            }
        });
    }
    figures.insert("retries".into(), retries.into());
    figures
}

/// How one attempt at a scenario failed.
struct Failed {
    error: anyhow::Error,
    /// Since L1 or a guest in it hung.
    hung: bool,
}

/// Runs a scenario in the L1 that there is or in a fresh one, which does not outlive a failure.
fn attempt<'a>(
    lab: &'a Lab,
    clock: Clock,
    rig: &mut Option<Rig<'a>>,
    scenario: &Scenario,
    figures: &mut Figures,
    tries: u32,
) -> Result<Outcome, Failed> {
    let running = match rig.take() {
        Some(running) => running,
        None => {
            let name = format!("kvm-{}-{tries}", scenario.name);
            let started = lab.scene(&name).and_then(|scene| Rig::start(scene, clock, &[]));
            // A Linux that does not come up is one that hangs.
            started.map_err(|error| Failed { error, hung: true })?
        }
    };
    match (scenario.run)(&running, figures) {
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

/// Runs one shell command with our standard input, output and error.
fn command(rig: &Rig, command: &str, limit: Duration) -> Result<bool> {
    let running = std::sync::Arc::new(rig.guest.start(command)?);
    let input = std::sync::Arc::clone(&running);
    std::thread::spawn(move || {
        let mut piece = [0; 1024];
        while let Ok(length @ 1..) = std::io::Read::read(&mut std::io::stdin(), &mut piece) {
            if input.input(&piece[..length]).is_err() {
                return;
            }
        }
        let _ = input.input(&[]);
    });
    let code = running.stream(limit, |out, err| {
        let (mut stdout, mut stderr) = (std::io::stdout(), std::io::stderr());
        let written = stdout
            .write_all(out)
            .and_then(|()| stdout.flush())
            .and_then(|()| stderr.write_all(err));
        written.is_ok()
    });
    match code {
        Ok(0) => Ok(true),
        Ok(code) => {
            eprintln!("kvm: the command ended with {code}");
            Ok(false)
        }
        Err(error) => {
            let _ = running.kill();
            let logs = rig.save_logs()?;
            Err(error.context(format!("logs: {}", logs.display())))
        }
    }
}

impl std::str::FromStr for File {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (source, target) = match text.split_once('=') {
            Some((source, target)) => {
                (PathBuf::from(source), target.trim_start_matches('/').to_owned())
            }
            None => {
                let source = PathBuf::from(text);
                let name = source.file_name().unwrap_or_default().to_string_lossy().into_owned();
                (source, format!("root/{name}"))
            }
        };
        Ok(Self { source, target })
    }
}
