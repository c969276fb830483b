// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask bench` runs `bench/`, a workspace of its own with vbus's peers among its
//! dependencies.

use std::fs;

use anyhow::{Context, Result, ensure};

use testkit::lab::Options;
use testkit::report::Skip;
use testkit::{netbench, pauses, trial, workspace};

/// The text at the end of `--help`.
const HELP: &str = "\
`bench net` compares NICs in one guest, each on a TAP interface of this host: vbus's by the Linux
driver and by the program vbus-guest; the bus's virtio-net over vfio-user and over vhost-user, by
the kernel's own driver; QEMU's virtio-net. TCP out, in and both ways; datagrams of 64 and 1,472
bytes; pings; interrupts, guest instructions and exits per packet. The guests whose exits are
counted also have virtio-net with `vhost = true`, and QEMU's with vhost-net. Then DPDK's testpmd
sends frames, as in `bench testpmd`. It needs root. Charts go to target/bench. The last line is one
JSON object:
  net_TRAFFIC_vs_virtio            vbus by the driver over QEMU's virtio-net: above 1, vbus is ahead
  net_program_..., net_vfio_user_..., net_vhost_user_...
                                   the same of vbus-guest, and of virtio-net over the two transports
  net_..._{irqs,insn,exits}_per_packet_vs_virtio
                                   what a packet costs: below 1, vbus needs less
  net_..._iommu_loss               the part of TCP's rate that is lost behind intel-iommu
  abi_vs_abi                       venet by the driver over virtio-net over vfio-user, both of the
                                   bus: the same traffic and costs, and the doorbells
  net_vhost_{tcp,exits_per_packet}_vs_vhost_net
                                   `vhost = true` over QEMU's vhost-net
  testpmd_{split,packed}_...       those of `bench testpmd`
  details                          all figures, with their spread

`bench take-over` upgrades the bus (`vbus serve --take-over`) again and again under a guest with 16
NICs by the Linux driver, without traffic and with TCP both ways, and prints a histogram of how long
the devices paused. The last line is one JSON object.

`bench testpmd` lets DPDK's testpmd send frames from one vhost-user device to another and back, by
the bus and by DPDK's own back end. It takes --rounds and --seconds. Its keys that end in `_vs_dpdk`
are above 1 if vbus is ahead.

Examples:
  cargo xtask bench take-over --upgrades 50
  cargo xtask bench net                       some 20 minutes
  cargo xtask bench net --quick               a first look
  cargo xtask bench net --queues 1 --rounds 9 --seconds 5
  cargo xtask bench testpmd --rounds 9";

/// The heading of the options that go with `bench net`.
const NET: &str = "Options of `bench net`";

/// What to measure, and how to print it.
#[derive(clap::Args)]
#[command(after_help = HELP)]
pub struct Args {
    /// Measure something else than the shared memory
    #[arg(value_enum, conflicts_with = "only")]
    what: Option<What>,
    /// Print one JSON object as the last line; a ratio above 1 means that vbus is faster
    #[arg(long)]
    json: bool,
    /// Use fewer processes and rounds, or shorter measurements, for a first look
    #[arg(long)]
    quick: bool,
    /// Measure with real-time priority, for a machine that has other work (the shared memory and
    /// `tap`): needs root, and chrt
    #[arg(long)]
    realtime: bool,
    /// Measure this group only: rings, pages, signals, lines, sizes, readers, devices or
    /// engine
    #[arg(long, value_name = "GROUP")]
    only: Option<String>,
    /// The rounds, in each of which everything is measured once [default: 5, with --quick 1]
    #[arg(long, help_heading = NET, value_name = "NUMBER",
        value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// The seconds of a measurement [default: 3, with --quick 1]
    #[arg(long, help_heading = NET, value_name = "NUMBER",
        value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: Option<u32>,
    /// The numbers of queue pairs, each in a guest with as many CPUs, with commas between them
    /// [default: 1, 2, 4 and 8, up to this machine's CPUs; with --quick 1]
    #[arg(long, help_heading = NET, value_name = "NUMBERS", value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(1..=8))]
    queues: Vec<u32>,
    /// Do not count the guest's instructions
    #[arg(long, help_heading = NET)]
    no_instructions: bool,
    /// Do not count exits, for which a Linux with a real KVM is started
    #[arg(long, help_heading = NET)]
    no_exits: bool,
    /// Do not measure behind an IOMMU
    #[arg(long, help_heading = NET)]
    no_iommu: bool,
    /// Do not run DPDK's testpmd
    #[arg(long, help_heading = NET)]
    no_testpmd: bool,
    /// The upgrades for each load [default: 50, with --quick 5]
    #[arg(long, help_heading = "Options of `bench take-over`", value_name = "NUMBER",
        value_parser = clap::value_parser!(u32).range(1..=10_000))]
    upgrades: Option<u32>,
    #[command(flatten, next_help_heading = "Options of `bench net` and `bench take-over`")]
    guests: Options,
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
    /// NICs of a guest: vbus's, and QEMU's virtio-net
    Net,
    /// How long the devices of a guest pause when the bus is upgraded
    TakeOver,
    /// Frames a second between two vhost-user devices with DPDK's testpmd as their front end, and
    /// the same with DPDK's own back end
    Testpmd,
    /// What a small frame costs on a TAP interface each way: in the back end, and in bare loops of
    /// system calls and of io_uring
    Tap,
}

/// Builds and runs the benchmark. Charts go to `target/bench`.
pub fn run(args: &Args) -> Result<bool> {
    let options_of_net = args.rounds.is_some()
        || args.seconds.is_some()
        || !args.queues.is_empty()
        || args.no_instructions
        || args.no_exits
        || args.no_iommu
        || args.no_testpmd;
    ensure!(
        !options_of_net || matches!(args.what, Some(What::Net | What::Testpmd)),
        "--rounds, --seconds, --queues and --no-... go with `bench net`"
    );
    ensure!(
        !args.quick || matches!(args.what, None | Some(What::Net | What::TakeOver | What::Testpmd)),
        "--quick goes with `bench`, `bench net`, `bench take-over` and `bench testpmd`"
    );
    ensure!(
        args.upgrades.is_none() || matches!(args.what, Some(What::TakeOver)),
        "--upgrades goes with `bench take-over`"
    );
    ensure!(
        !args.realtime || matches!(args.what, None | Some(What::Tap)),
        "--realtime goes with `bench` and with `bench tap`"
    );
    if let Some(what) = args.what {
        let (package, example) = match what {
            What::Net => return net(args),
            What::TakeOver => return take_over(args),
            What::Testpmd => return testpmd(args),
            What::Fairness => ("vbus-vfio-user", "fairness"),
            What::Bystanders => ("vbus-devices", "bystanders"),
            What::Tap => ("vbus-devices", "tap"),
        };
        let mut command = workspace::cargo();
        command.current_dir(workspace::root());
        command.args(["run", "--quiet", "--release", "--locked", "--package", package]);
        command.args(["--example", example, "--"]);
        command.args(args.json.then_some("--json"));
        command.args(args.realtime.then_some("--realtime"));
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

/// Measures the pauses of upgrades.
fn take_over(args: &Args) -> Result<bool> {
    let lab = trial::open(&args.guests)?;
    let upgrades = args.upgrades.unwrap_or(if args.quick { 5 } else { 50 });
    let all = match pauses::measure(&lab, upgrades) {
        Ok(all) => all,
        Err(error) if error.is::<Skip>() => {
            eprintln!("skipped: {error:#}");
            return Ok(true);
        }
        Err(error) => return Err(error),
    };
    if !args.json {
        all.iter().for_each(|pauses| print!("{}", pauses.text()));
    }
    let all: Vec<_> = all.iter().map(pauses::Pauses::json).collect();
    println!("{}", serde_json::json!({ "take_over": all }));
    Ok(true)
}

/// Compares the back ends of testpmd.
fn testpmd(args: &Args) -> Result<bool> {
    let lab = trial::open(&args.guests)?;
    let seconds = args.seconds.unwrap_or(if args.quick { 1 } else { 5 });
    let rounds = args.rounds.unwrap_or(if args.quick { 1 } else { 5 });
    match testkit::testpmd::bench(&lab, seconds, rounds) {
        Ok(figures) => println!("{figures}"),
        Err(error) if error.is::<Skip>() => eprintln!("skipped: {error:#}"),
        Err(error) => return Err(error),
    }
    Ok(true)
}

/// Compares NICs.
fn net(args: &Args) -> Result<bool> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let queues = match &args.queues[..] {
        [] if args.quick => vec![1],
        [] => {
            let fits = |queues: &u32| usize::try_from(*queues).is_ok_and(|n| n <= processors);
            [1, 2, 4, 8].into_iter().filter(fits).collect()
        }
        queues => queues.to_vec(),
    };
    let spec = netbench::Spec {
        seconds: args.seconds.unwrap_or(if args.quick { 1 } else { 3 }),
        rounds: args.rounds.unwrap_or(if args.quick { 1 } else { 5 }),
        queues,
        instructions: !args.no_instructions,
        exits: !args.no_exits,
        iommu: !args.no_iommu,
        testpmd: !args.no_testpmd,
    };
    let lab = trial::open(&args.guests)?;
    match netbench::run(&lab, &spec) {
        Ok(report) => {
            let folder = workspace::target().join("bench");
            fs::create_dir_all(&folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
            for (name, svg) in report.charts() {
                let path = folder.join(name);
                fs::write(&path, svg)
                    .with_context(|| format!("cannot write {}", path.display()))?;
            }
            if !args.json {
                println!("{}", report.text());
            }
            println!("{}", report.json());
            Ok(true)
        }
        Err(error) if error.is::<Skip>() => {
            eprintln!("skipped: {error:#}");
            Ok(true)
        }
        Err(error) => Err(error),
    }
}
