// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask demo` runs two Linux guests on one bus and shows what the bus does for them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use testkit::bus::{Bus, Traffic};
use testkit::lab::{Options, Scene};
use testkit::nic::{self, Nic, Ping};
use testkit::trial;
use testkit::vm::{Vm, VmSpec};

use crate::picture::{self, Transcript};
use crate::screen::{self, Running};

/// The demo's bus at the start. The demo plugs a second NIC into each guest while they run.
const CONFIG: &str = r#"
[[device]]
name = "net-a"
class = "venet"
backend = "switch"

[[device]]
name = "net-b"
class = "venet"
backend = "switch"

[[device]]
name = "values-a"
class = "state"
pages = [{ name = "setpoint", bytes = 64, owner = "device" }, { name = "heartbeat", bytes = 64, owner = "driver" }]

[[device]]
name = "values-b"
class = "state"
pages = [{ name = "setpoint", bytes = 64, owner = "device" }, { name = "heartbeat", bytes = 64, owner = "driver" }]
"#;

const ADDRESS: [&str; 2] = ["10.0.0.1", "10.0.0.2"];

#[derive(clap::Args)]
pub struct Args {
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
    /// Keep the bus and the guests running, with consoles, until a key is pressed
    #[arg(long)]
    keep: bool,
    /// Seconds of iperf3 in each direction
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Draw the demo's output as a picture of a terminal
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Draw `vbus top` during the transfer as a picture of a terminal
    #[arg(long, value_name = "FILE")]
    top_svg: Option<PathBuf>,
    #[command(flatten)]
    guests: Options,
}

/// The measured figures. A field stays empty if the demo fails before it.
#[derive(Default)]
struct Figures {
    ping: Option<Ping>,
    a_to_b: Option<f64>,
    b_to_a: Option<f64>,
    state_ok: bool,
    plug: Option<Duration>,
    unplug: Option<Duration>,
    traffic: Traffic,
}

/// Runs the demo. Returns false if a part of it failed.
pub fn run(args: &Args) -> Result<bool> {
    let began = Instant::now();
    let lab = trial::open(&args.guests).inspect_err(|error| {
        if args.json {
            let seconds = round(began.elapsed().as_secs_f64());
            println!("{}", json!({"ok": false, "error": format!("{error:#}"), "seconds": seconds}));
        }
    })?;
    let scene = lab.scene("demo")?;
    let mut figures = Figures::default();
    let said = Transcript::default();
    // `open` has already printed this, with the reason for the accelerator.
    said.keep(&format!(
        "guests: QEMU {} with {}, Linux {}",
        lab.qemu_version(),
        lab.accel(),
        lab.system().kernel_version()
    ));
    let result = perform(args, &scene, &said, &mut figures);
    let ok = result.is_ok();
    if let Err(error) = &result {
        eprintln!("demo: FAILED: {error:#}");
        eprintln!("demo: logs are in {}", scene.save_logs()?.display());
    } else {
        said.say(&format!("demo: all of it worked, in {:.0} s", began.elapsed().as_secs_f32()));
        if let Some(file) = &args.svg {
            said.save("cargo xtask demo", file)?;
        }
    }
    if args.json {
        let ping = figures.ping.as_ref().map(|p| json!({"min": p.min, "avg": p.avg, "max": p.max}));
        let ms = |time: Option<Duration>| time.map(|time| round(time.as_secs_f64() * 1e3));
        let object: Value = json!({
            "ok": ok,
            "accel": lab.accel().to_string(),
            "qemu": lab.qemu_version(),
            "kernel": lab.system().kernel_version(),
            "ping_ms": ping,
            "tcp_mbps": {"a_to_b": figures.a_to_b.map(round), "b_to_a": figures.b_to_a.map(round)},
            "packets": figures.traffic.packets,
            "doorbells": figures.traffic.doorbells,
            "interrupts": figures.traffic.interrupts,
            "state_ok": figures.state_ok,
            "plug_ms": ms(figures.plug),
            "unplug_ms": ms(figures.unplug),
            "seconds": round(began.elapsed().as_secs_f64()),
        });
        println!("{object}");
    }
    Ok(ok)
}

/// Rounds to tenths.
fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn perform(args: &Args, scene: &Scene, said: &Transcript, figures: &mut Figures) -> Result<()> {
    let bus = Bus::start(scene, CONFIG)?;
    said.say(&format!("bus:\n{}", bus.run(&["device", "list"])?.trim_end()));
    let mut vms = Vec::new();
    for name in ["a", "b"] {
        let machine = VmSpec::new(name);
        vms.push(
            machine
                .device(bus.socket(&format!("net-{name}")))
                .device(bus.socket(&format!("values-{name}")))
                .start(scene)?,
        );
    }
    for (vm, name) in vms.iter().zip(["a", "b"]) {
        vm.wait_boot(1)?;
        nic::prepare(&vm.guest)?;
        said.say(&format!(
            "guest {name}: up after {:.1} s, and finds\n{}",
            vm.age().as_secs_f32(),
            vm.guest.ok("vbus-guest list")?.trim_end()
        ));
    }

    let mut nics = Vec::new();
    for ((vm, address), name) in vms.iter().zip(ADDRESS).zip(["net-a", "net-b"]) {
        nics.push(Nic::up(&vm.guest, name, "vbus0", &format!("{address}/24"), "")?);
    }
    let (a, b) = (&vms[0].guest, &vms[1].guest);
    let ping = nic::ping(a, ADDRESS[1], 10)?;
    said.say(&format!(
        "ping a to b: min {:.2}, avg {:.2}, max {:.2} ms",
        ping.min, ping.avg, ping.max
    ));
    figures.ping = Some(ping);
    for (way, from, to, address, figure) in [
        ("a to b", a, b, ADDRESS[1], &mut figures.a_to_b),
        ("b to a", b, a, ADDRESS[0], &mut figures.b_to_a),
    ] {
        let top = args
            .top_svg
            .as_deref()
            .map(|file| Top::start(scene.lab.vbus(), &bus, args.seconds, file));
        let mbps = nic::iperf(from, to, address, args.seconds)?;
        top.transpose()?.map_or(Ok(()), Top::end)?;
        said.say(&format!("TCP {way}: {mbps:.0} Mb/s"));
        ensure!(mbps > 0.0, "no data went {way}");
        *figure = Some(mbps);
    }

    share_state(&bus, &vms, said)?;
    figures.state_ok = true;
    plug(&bus, &mut vms, said, figures)?;

    figures.traffic = bus.traffic(&["net-a", "net-b"])?;
    let (Traffic { packets, doorbells, interrupts, drops }, per) =
        (figures.traffic, figures.traffic.kicks_per_1000());
    said.say(&format!(
        "counters: {packets} packets, {drops} of them dropped; for 1,000 packets {:.1} doorbells \
         and \
         {:.1} interrupts ({doorbells} and {interrupts})",
        per.0, per.1
    ));
    if args.keep {
        keep(scene, &bus, &vms)?;
    }
    Ok(())
}

/// Draws `vbus top` while something else goes on.
struct Top {
    end: Sender<()>,
    thread: JoinHandle<Result<()>>,
}

impl Top {
    /// Starts `vbus top`. Its screen in the middle of a transfer of `seconds` goes into `file`.
    fn start(program: &Path, bus: &Bus, seconds: u32, file: &Path) -> Result<Top> {
        let mut command = Command::new(program);
        command.args(["top", "--interval", "1", "--dir"]).arg(bus.dir());
        let mut running = Running::start(command)?;
        let (end, told) = channel();
        let (file, half) = (file.to_owned(), Duration::from_secs(u64::from(seconds)) / 2);
        let draw = move || {
            let screen = running.at(half.min(screen::KEPT), &told)?;
            picture::save_screen("vbus top", &screen, &file)
        };
        Ok(Top { end, thread: std::thread::spawn(draw) })
    }

    /// The transfer has ended.
    fn end(self) -> Result<()> {
        drop(self.end);
        self.thread.join().map_err(|_| anyhow::anyhow!("the drawing has panicked"))?
    }
}

/// Both guests read a page that the host writes. The host watches a page that a guest writes.
fn share_state(bus: &Bus, vms: &[Vm], said: &Transcript) -> Result<()> {
    for (vm, name) in vms.iter().zip(["a", "b"]) {
        let device = format!("values-{name}");
        let value = format!("point-{name}");
        bus.run(&["state", "set", &device, "setpoint", &value])?;
        let read = vm.guest.ok("vbus-guest state get setpoint")?;
        ensure!(
            read.trim_end_matches(['\0', '\n']) == value,
            "guest {name} reads {read:?}, not {value:?}"
        );
    }
    let watch = bus.watch("values-b", "heartbeat")?;
    vms[1].guest.ok("vbus-guest state set heartbeat alive-b")?;
    watch.wait_for("alive-b", Duration::from_secs(20))?;
    said.say(
        "state: written on the host, read in both guests; written in guest b, watched on the host",
    );
    Ok(())
}

/// Plugs a second NIC into each guest, sends a stream over it, and unplugs it.
fn plug(bus: &Bus, vms: &mut [Vm], said: &Transcript, figures: &mut Figures) -> Result<()> {
    const ADDRESSES: [&str; 2] = ["10.0.1.1", "10.0.1.2"];
    let mut nics = Vec::new();
    for (vm, (name, address)) in vms.iter().zip(["extra-a", "extra-b"].into_iter().zip(ADDRESSES)) {
        let qmp = vm.qmp_socket().display().to_string();
        let began = Instant::now();
        bus.run(&[
            "device",
            "add",
            name,
            "--class",
            "venet",
            "--set",
            "backend=switch",
            "--qmp",
            &qmp,
        ])?;
        vm.guest.ok(&format!("until vbus-guest list | grep -q {name}; do sleep 0.02; done"))?;
        figures.plug = Some(began.elapsed());
        nics.push(Nic::up(&vm.guest, name, "vbus1", &format!("{address}/24"), "")?);
    }
    nic::transfer(
        &vms[0].guest,
        &vms[1].guest,
        ADDRESSES[1],
        6000,
        16 << 20,
        1,
        Duration::from_secs(120),
    )?;
    for (vm, name) in vms.iter().zip(["extra-a", "extra-b"]) {
        let qmp = vm.qmp_socket().display().to_string();
        let began = Instant::now();
        bus.run(&["device", "remove", name, "--qmp", &qmp])?;
        figures.unplug = Some(began.elapsed());
        vm.guest.ok("until [ ! -e /sys/class/net/vbus1 ]; do sleep 0.02; done")?;
    }
    let ms = |time: Option<Duration>| time.unwrap_or_default().as_secs_f64() * 1e3;
    said.say(&format!(
        "a second NIC: plugged in {:.0} ms, used, unplugged in {:.0} ms",
        ms(figures.plug),
        ms(figures.unplug)
    ));
    Ok(())
}

/// Waits until the user has seen enough.
fn keep(scene: &Scene, bus: &Bus, vms: &[Vm]) -> Result<()> {
    eprintln!("\nThe bus and both guests go on running:");
    eprintln!("  cargo xtask console a      (and b; control and ] leaves)");
    eprintln!("  {} stats --watch --dir {}", scene.lab.vbus().display(), bus.dir().display());
    for vm in vms {
        eprintln!(
            "  QMP of a guest: {}; its console: {}",
            vm.qmp_socket().display(),
            vm.console_socket().display()
        );
    }
    eprintln!("Enter ends them.");
    while std::io::stdin().read_line(&mut String::new())? == 0 {
        // There is no keyboard: wait until a signal ends this process and the guests.
        std::thread::park();
    }
    Ok(())
}
