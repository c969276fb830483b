// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A hostile guest writes random values into the configuration spaces of one device, of the root
//! port above it, and of functions that do not exist.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::bus::device;
use crate::l1::L1;
use crate::l1_wire::{self as net, exchange};
use crate::l2::{L1Bus, L2, L2Spec};
use crate::report::Figures;

/// The environment variable with the seed of a run's accesses. Without it every run is the same.
const SEED: &str = "VBUS_SEED";
/// The seed without the variable: a failure repeats.
const USUAL: u64 = 77;
/// The least accesses of each kind of stream.
const ACCESSES: u32 = 4000;
/// How long a stream may take, and everything else that the guest does meanwhile.
const LIMIT: Duration = Duration::from_secs(240);
/// How long the stream that can kill the kernel may take. It is shorter than the silence after
/// which the guest counts as hung.
const WILD: Duration = Duration::from_secs(60);
/// Bytes each way of an exchange beside a stream, and the number of exchanges.
const BYTES: u64 = 1 << 20;
const EXCHANGES: u32 = 2;
/// The most bytes that the VMM or the bus may have printed at the end.
const LOG_MAX: usize = 32 << 10;

/// How many more files the VMM may have open at the end than at the beginning. Clients of its
/// control socket use some.
const FILES_MORE: u64 = 4;

/// The exit code of a Rust program that has panicked.
const PANIC: i32 = 101;
/// A request for the list of devices.
const DEVICES: &str = r#"{"op":"devices"}"#;

/// The device that no access touches. It is in the first slot.
const NET: &str = "net";
/// The device whose configuration space gets the accesses.
const VICTIM: &str = "victim";
/// The addresses of its function and its root port as the firmware numbers them. It is in the
/// second slot.
const FUNCTION: &str = "02:00.0";
const PORT: &str = "00:02.0";

/// Three streams of random accesses, each worse than the one before. The first goes to the victim
/// alone; then the victim is unplugged and plugged again. The second also goes to its root port;
/// then the guest is reset. The third uses all ways of access at once and sends message interrupts
/// of any kind, which kill a kernel; then the guest is reset. During the first two streams the
/// other NIC carries traffic, and both ends compare the hash.
pub fn writes(l1: &L1, _: &mut Figures) -> Result<()> {
    let seed = match std::env::var(SEED) {
        Ok(text) => {
            text.parse().with_context(|| format!("{SEED} is {text:?}, which is no number"))?
        }
        Err(_) => USUAL,
    };
    let run = |seed| {
        let pages =
            "pages = [{ name = \"setpoint\", bytes = 64, owner = \"device\", initial = \"calm\" }]";
        let bus = net::bus(l1, &device(VICTIM, "state", pages))?;
        // Without this the kernel does not let root map configuration space.
        let spec = L2Spec { append: "iomem=relaxed", ..L2Spec::new("nonsense") };
        let l2 = spec.device(NET, &bus.socket(NET)).device(VICTIM, &bus.socket(VICTIM)).boot(l1)?;
        streams(l1, &bus, &l2, seed)?;
        l2.power_off()
    };
    eprintln!("seed {seed}");
    run(seed).with_context(|| format!("seed {seed}; again with {SEED}={seed}"))
}

fn streams(l1: &L1, bus: &L1Bus, l2: &L2, seed: u64) -> Result<()> {
    let (devices, _) = l2.control(DEVICES)?;
    let victim = devices.iter().find(|device| device["name"] == VICTIM);
    let address = victim.map(|device| &device["address"]);
    ensure!(
        address == Some(&json!(format!("0000:{FUNCTION}"))),
        "the devices are elsewhere: {devices:?}"
    );

    let nic = net::nic(&l2.guest)?;
    exchange(l1, &l2.guest, BYTES)?;
    check_driver(bus, l2, VICTIM, "whole")?;
    let files = open_files(l1, l2)?;

    let watch =
        l2.guest.start(&format!("exec vbus-guest state watch setpoint --device {VICTIM}"))?;
    watch.wait_for("whole", LIMIT)?;
    stream(l1, l2, seed, FUNCTION).context("nonsense for a function")?;
    l2.control(&format!(r#"{{"op":"unplug","name":"{VICTIM}"}}"#))?;
    let ended = watch.wait(LIMIT)?;
    ensure!(ended.code != PANIC, "the driver panicked: {}", ended.stderr);
    plug_victim(bus, l2)?;
    check_driver(bus, l2, VICTIM, "mended")?;

    stream(l1, l2, seed + 1, &format!("{FUNCTION} {PORT}"))
        .context("nonsense for a function and its port")?;
    ensure!(nic.driver.runs(), "the driver of the other NIC has ended: {:?}", nic.driver.said());
    begin_anew(l1, bus, l2, "renewed").context("after the second stream")?;

    // These pings cause interrupts, even when no kernel is left to end one.
    let pings = l1.guest.start(&format!("exec ping -q -i 0.05 {}", net::INNER))?;
    let command =
        format!("exec guest-agent nonsense {} {ACCESSES} wild {FUNCTION} {PORT}", seed + 2);
    // The stream ends. Or the kernel dies, and then no end is ever reported.
    match l2.guest.start(&command)?.wait(WILD) {
        Ok(end) => eprintln!(
            "the third stream ended with {}: {}{}",
            end.code,
            end.stdout.trim(),
            end.stderr.trim()
        ),
        Err(_) => eprintln!("the third stream has left no kernel to tell of it"),
    }
    begin_anew(l1, bus, l2, "reborn").context("after the third stream")?;
    pings.kill()?;

    wait_files(l1, l2, files + FILES_MORE)?;
    for (who, (out, err)) in [("vbus-vmm", l2.vmm.said()), ("vbus serve", bus.said())] {
        ensure!(
            !err.contains("panicked") && out.len() + err.len() < LOG_MAX,
            "{who} says {out}{err}"
        );
    }
    Ok(())
}

/// Makes random accesses to `functions`, until the other NIC has carried traffic meanwhile.
fn stream(l1: &L1, l2: &L2, seed: u64, functions: &str) -> Result<()> {
    let command = format!("exec guest-agent nonsense {seed} {ACCESSES} tame {functions}");
    let stream = l2.guest.start(&command)?;
    stream.wait_for("begun", LIMIT)?;
    for _ in 0..EXCHANGES {
        exchange(l1, &l2.guest, BYTES).with_context(|| format!("beside {:?}", stream.said()))?;
    }
    ensure!(stream.runs(), "the stream ended before it was told to: {:?}", stream.said());
    stream.input(b"\n")?;
    let said = stream.ok(LIMIT)?;
    eprintln!("{functions}: {}", said.trim_start_matches("begun").trim());
    exchange(l1, &l2.guest, BYTES).context("afterwards")?;
    l2.control(DEVICES).map(drop)
}

/// Resets the guest and checks that its two devices work.
fn begin_anew(l1: &L1, bus: &L1Bus, l2: &L2, value: &str) -> Result<()> {
    let boots = l2.guest.boots();
    l2.control(r#"{"op":"reset"}"#)?;
    l2.wait_boot(boots + 1)?;
    let (devices, _) = l2.control(DEVICES)?;
    ensure!(
        devices.iter().any(|device| device["name"] == NET),
        "the other NIC is gone: {devices:?}"
    );
    if !devices.iter().any(|device| device["name"] == VICTIM) {
        plug_victim(bus, l2)?;
    }
    let _nic = net::nic(&l2.guest)?;
    exchange(l1, &l2.guest, BYTES)?;
    check_driver(bus, l2, VICTIM, value)
}

/// Plugs the victim in and waits until the guest has it.
fn plug_victim(bus: &L1Bus, l2: &L2) -> Result<()> {
    l2.control(&json!({ "op": "plug", "name": VICTIM, "socket": bus.socket(VICTIM) }).to_string())?;
    let found = l2
        .guest
        .start(&format!("until vbus-guest list | grep -q {VICTIM}; do sleep 0.05; done"))?;
    found.ok(LIMIT).map(drop).context("the guest does not find what is plugged in")
}

/// A driver of the state device `name` sees its page `setpoint` change to `value`.
pub(super) fn check_driver(bus: &L1Bus, l2: &L2, name: &str, value: &str) -> Result<()> {
    let watch = l2.guest.start(&format!("exec vbus-guest state watch setpoint --device {name}"))?;
    // The first value shows that the driver runs, whatever the value is.
    watch.wait_for("\n", LIMIT)?;
    bus.run(&format!("state set {name} setpoint {value}"))?;
    watch.wait_for(value, LIMIT).with_context(|| format!("{name} does not become {value}"))?;
    watch.kill()?;
    watch.wait(LIMIT).map(drop)
}

/// Waits until the VMM has at most `most` files open. It closes the connection of a client some
/// time after the client has gone.
pub(super) fn wait_files(l1: &L1, l2: &L2, most: u64) -> Result<()> {
    let until = Instant::now() + LIMIT;
    loop {
        let now = open_files(l1, l2)?;
        if now <= most {
            return Ok(());
        }
        ensure!(Instant::now() < until, "vbus-vmm has {now} files open, and {most} are expected");
    }
}

/// How many files the VMM has open.
pub(super) fn open_files(l1: &L1, l2: &L2) -> Result<u64> {
    let (_, facts) = l2.control(r#"{"op":"info"}"#)?;
    let count = l1.guest.ok(&format!("ls /proc/{}/fd | wc -l", facts["pid"]))?;
    count.trim().parse().with_context(|| format!("{count} files"))
}
