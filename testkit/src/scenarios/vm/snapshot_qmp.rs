// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Snapshots under QEMU, which saves nothing of a device over vfio-user: with the devices left in,
//! and by `vbus snapshot`.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::virtio::interface;
use crate::bus::{Bus, device};
use crate::guest::Guest;
use crate::lab::Scene;
use crate::linux;
use crate::nic::{self, Nic};
use crate::pair::{ADDRESS, TRANSFER};
use crate::process::Process;
use crate::snapshot;
use crate::vm::{Vm, VmSpec};

/// Bytes each way of an exchange whose hashes are compared.
const BYTES: u64 = 8 << 20;

/// The address of guest b's virtio card, and that of guest a in the same network.
const CARD: [&str; 2] = ["10.0.1.2", "10.0.1.1"];

/// What the bus says if a guest goes on after a reset, and if nobody has set the device up.
const GOES_ON: &str = "its guest goes on after a reset";
const SILENT: &str = "nobody has set it up since it was reset";

/// After how long `vbus snapshot` is interrupted: before it has begun, and in the midst.
const INTERRUPTED_AFTER: [u64; 5] = [5, 40, 100, 200, 400];

/// Guest a has a NIC by the Linux driver, guest b one by `vbus-guest` and a virtio card by the
/// kernel's driver. With the devices left in, both drivers of vbus open their devices again after
/// loadvm, and the bus warns once for each device; it does not after a reset of the machine.
/// `vbus snapshot` unplugs the devices meanwhile, also if it is interrupted.
pub fn snapshots(scene: &Scene) -> Result<()> {
    let switch = |name: &str, class: &str| device(name, class, "backend = \"switch\"");
    let config =
        [switch("net-a", "venet"), switch("net-b", "venet"), switch("virt-b", "virtio-net")];
    let bus = Bus::start(scene, &config.concat())?;
    let mut a = VmSpec::new("a").device(bus.socket("net-a"));
    a.system = Some(linux::chosen_system(scene)?);
    let b = VmSpec::new("b").device(bus.socket("net-b")).device(bus.socket("virt-b"));
    let (mut a, mut b) = (a.start(scene)?, b.start(scene)?);
    a.wait_boot(1)?;
    b.wait_boot(1)?;
    linux::insert(&a.guest, "")?;
    up(&a.guest)?;
    let driver = up_b(&b.guest)?;
    exchange(&a, &b, ADDRESS)?;
    exchange(&a, &b, [CARD[1], CARD[0]])?;
    for vm in [&mut a, &mut b] {
        snapshot::add_disk(scene, vm)?;
    }

    left_in(&bus, &mut a, &["net-a"])?;
    exchange(&a, &b, ADDRESS).context("the Linux driver after loadvm")?;
    linux::check_kernel(&a.guest)?;
    left_in(&bus, &mut b, &["net-b"])?;
    exchange(&a, &b, ADDRESS).context("vbus-guest after loadvm")?;
    ensure!(driver.driver.runs(), "vbus-guest has ended: {:?}", driver.driver.said());
    // The kernel's driver of the virtio card notices nothing, so the bus says it.
    counted(&bus, "virt-b", 1)?;
    said(&bus, SILENT, "virt-b")?;

    // A machine that is reset is no machine that is set back.
    b.reset()?;
    b.wait_boot(2)?;
    let driver = up_b(&b.guest)?;
    exchange(&a, &b, ADDRESS).context("after a reset")?;
    exchange(&a, &b, [CARD[1], CARD[0]]).context("the virtio card after a reset")?;
    counted(&bus, "net-b", 1)?;

    by_the_command(&bus, &mut a, &b)?;
    for name in ["net-a", "net-b", "virt-b"] {
        counted(&bus, name, 1)?;
    }
    refusals(&bus, &mut a)?;
    interrupted(scene, &bus, &mut a)?;
    up(&a.guest)?;
    exchange(&a, &b, ADDRESS).context("after interrupted commands")?;
    linux::check_kernel(&a.guest)?;
    drop(driver);
    a.power_off()?;
    b.power_off()
}

/// Gives guest a's interface its addresses, once the driver has made it.
fn up(guest: &Guest) -> Result<()> {
    let name = linux::only_interface(guest)?;
    for address in [ADDRESS[0], CARD[1]] {
        guest.ok(&format!("ip addr replace {address}/24 dev {name}"))?;
    }
    guest.ok(&format!("ip link set {name} up")).map(drop)
}

/// Sets up guest b.
fn up_b(guest: &Guest) -> Result<Nic> {
    let card = interface(guest, 0)?;
    nic::set_up(guest, &card, &format!("{}/24", CARD[0]))?;
    nic::prepare(guest)?;
    Nic::up(guest, "net-b", "vbus0", &format!("{}/24", ADDRESS[1]), "")
}

/// Sends data both ways and compares the hashes.
fn exchange(a: &Vm, b: &Vm, [of_a, of_b]: [&str; 2]) -> Result<()> {
    let ping = format!("for i in $(seq 60); do ping -c 1 -W 2 {of_b} && exit 0; done; exit 1");
    a.guest.start(&ping)?.ok(TRANSFER).context("no ping is answered")?;
    nic::transfer(&a.guest, &b.guest, of_b, 5000, BYTES, 1, TRANSFER)?;
    nic::transfer(&b.guest, &a.guest, of_a, 5001, BYTES, 2, TRANSFER)
}

/// Saves and restores a machine with its devices left in. The bus has warned once of each of
/// `devices`.
fn left_in(bus: &Bus, vm: &mut Vm, devices: &[&str]) -> Result<()> {
    for name in devices {
        counted(bus, name, 0)?;
    }
    vm.guest.ok("touch /tmp/before")?;
    snapshot::save(vm, "left-in")?;
    for name in devices {
        counted(bus, name, 0).context("savevm alone")?;
    }
    vm.guest.ok("rm /tmp/before")?;
    snapshot::load(vm, "left-in")?;
    vm.guest.ok("[ -e /tmp/before ]").context("the machine is not set back")?;
    for name in devices {
        counted(bus, name, 1)?;
        said(bus, GOES_ON, name)?;
    }
    Ok(())
}

/// Waits until the bus has counted that often that the machine of a device was set back, and checks
/// that it counts no more.
fn counted(bus: &Bus, name: &str, times: u64) -> Result<()> {
    let began = Instant::now();
    loop {
        let stats = bus.stats()?;
        let device = stats.as_array().into_iter().flatten().find(|device| device["name"] == name);
        let count = device.and_then(|device| device["counters"]["set_back"].as_u64());
        let count = count.with_context(|| format!("vbus stats does not know {name}"))?;
        ensure!(count <= times, "{name} was set back {times} times, and the bus counts {count}");
        if count == times {
            return Ok(());
        }
        ensure!(began.elapsed() < TRANSFER, "{name} was set back {times} times, not {count}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// The log has exactly one warning of this text about the device.
fn said(bus: &Bus, text: &str, name: &str) -> Result<()> {
    let log = bus.log()?;
    let of = format!("device=\"{name}\"");
    let is_it = |line: &&str| line.contains("WARN") && line.contains(text) && line.contains(&of);
    let count = log.lines().filter(is_it).count();
    ensure!(count == 1, "the bus warns {count} times of {name}: {text}");
    Ok(())
}

/// `vbus snapshot` saves guest a, and restores it.
fn by_the_command(bus: &Bus, a: &mut Vm, b: &Vm) -> Result<()> {
    let qmp = a.qmp_socket().display().to_string();
    let command = |more: &[&str]| -> Result<Value> {
        let words = [&["snapshot", "--qmp", &qmp, "safe", "--json", "--timeout", "120"], more];
        let output = snapshot(bus, &words.concat())?;
        serde_json::from_str(&output).with_context(|| format!("it says {output:?}"))
    };
    a.guest.ok("touch /tmp/before")?;
    let done = command(&[])?;
    ensure!(
        done["action"] == "saved" && done["devices"] == json!(["dev0"]),
        "vbus snapshot says {done}"
    );
    let absent = done["absent_ms"].as_u64().context("no absent_ms")?;
    eprintln!("vbus snapshot: the devices were away for {absent} ms");
    up(&a.guest)?;
    exchange(a, b, ADDRESS).context("after vbus snapshot")?;
    a.guest.ok("rm /tmp/before")?;
    let done = command(&["--load"])?;
    ensure!(done["action"] == "restored", "vbus snapshot --load says {done}");
    a.guest.ok("[ -e /tmp/before ]").context("the machine is not set back")?;
    up(&a.guest)?;
    exchange(a, b, ADDRESS).context("after vbus snapshot --load")?;
    command(&["--replace"]).map(drop)?;
    up(&a.guest)
}

/// Runs a command that does not take `--dir`, and returns its output.
fn snapshot(bus: &Bus, words: &[&str]) -> Result<String> {
    let output = bus.program(words).output().context("cannot run vbus")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "vbus {} failed: {}", words.join(" "), said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What `vbus snapshot` refuses, before a device is unplugged.
fn refusals(bus: &Bus, a: &mut Vm) -> Result<()> {
    let qmp = a.qmp_socket().display().to_string();
    a.control.forget_events()?;
    let refused = |words: &[&str], why: &str| -> Result<()> {
        let words = [&["snapshot", "--qmp", &qmp][..], words].concat();
        let error = snapshot(bus, &words).err().context("it was not refused")?;
        ensure!(format!("{error:#}").contains(why), "{words:?} says {error:#}");
        Ok(())
    };
    refused(&["other", "--load"], "no snapshot \"other\"; there are safe")?;
    refused(&["left-in", "--load"], "was not saved by `vbus snapshot`")?;
    refused(&["safe"], "--replace")?;
    refused(&["1"], "with a letter first")?;
    a.control.execute("stop", json!({}))?;
    let stands = refused(&["later"], "the machine does not run");
    a.control.execute("cont", json!({}))?;
    stands?;
    ensure!(a.plugged("dev0")?, "a refused command has unplugged the device");
    Ok(())
}

/// `vbus snapshot` gets SIGINT, and the device is plugged in when it has ended.
fn interrupted(scene: &Scene, bus: &Bus, a: &mut Vm) -> Result<()> {
    let qmp = a.qmp_socket().display().to_string();
    let log = scene.dir().join("snapshot.log");
    for millis in INTERRUPTED_AFTER {
        let words = ["snapshot", "--qmp", &qmp, "safe", "--replace", "--timeout", "120"];
        let mut process = Process::start(bus.program(&words), "vbus snapshot", Path::new(&log))?;
        thread::sleep(Duration::from_millis(millis));
        process.signal(Signal::INT)?;
        let ended = process.wait(TRANSFER)?;
        ensure!(
            a.plugged("dev0")?,
            process.complaint(&format!("after {millis} ms ended with {ended}, the device is away"))
        );
        // The next one begins when the guest has its device.
        linux::only_interface(&a.guest)?;
    }
    let said = std::fs::read_to_string(&log)?;
    eprintln!("vbus snapshot, interrupted: {}", said.trim().replace('\n', "; "));
    Ok(())
}
