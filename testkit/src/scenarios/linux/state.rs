// SPDX-License-Identifier: Apache-2.0 OR MIT
//! State pages as files of the Linux driver, by the tools that a user has.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::bus::{Bus, device};
use crate::guest::{Guest, Running};
use crate::lab::Scene;
use crate::linux;
use crate::nic;
use crate::vm::VmSpec;

const LIMIT: Duration = Duration::from_secs(120);
/// The size of the largest page.
const LARGE: usize = 1 << 20;
/// How many values the latency of a watch is measured with.
const TIMES: usize = 30;

/// A user of the guest who is not root.
const USER: &str = "user";

/// A command that the guest's ordinary user runs.
fn as_user(command: &str) -> String {
    format!("exec su {USER} -c 'exec {command}'")
}

/// The file of a page.
fn file(page: &str) -> String {
    format!("/dev/vbus/values/{page}")
}

/// An ordinary user of the guest gets, sets, watches and maps pages, also while the device loses
/// its connection; and has them open and mapped when the device goes.
pub fn pages(scene: &Scene) -> Result<()> {
    let page = |name: &str, bytes: usize, owner: &str| {
        format!("{{ name = \"{name}\", bytes = {bytes}, owner = \"{owner}\" }}")
    };
    let pages = [
        page("setpoint", 64, "device"),
        page("heartbeat", 64, "driver"),
        page("large", LARGE, "device"),
        page("a/b", 8, "device"),
    ];
    let config = device("values", "state", &format!("pages = [{}]", pages.join(", ")));
    let mut bus = Bus::start(scene, &config)?;
    let mut machine = VmSpec::new("a").device(bus.socket("values"));
    machine.system = Some(linux::chosen_system(scene)?);
    let mut vm = machine.boot(scene)?;
    let guest = vm.guest.clone();
    guest.ok(&format!("echo {USER}::1000:1000::/tmp:/bin/sh >> /etc/passwd"))?;

    let without = watch_latency(&bus, &guest, "vbus-guest state watch setpoint")?;
    // The guest program has bound the function to uio_pci_generic.
    let function = linux::function(0);
    guest.ok(&format!("echo > {function}/driver_override"))?;
    guest.ok(&format!("echo {} > {function}/driver/unbind", linux::address(0)))?;
    linux::insert(&guest, "")?;
    guest.ok(&format!("until [ -e {} ]; do sleep 0.05; done", file("a%2fb")))?;
    permissions(&guest)?;
    with_tools(scene, &bus, &guest)?;
    let with = watch_latency(&bus, &guest, &as_user("vbus-guest state watch setpoint"))?;
    eprintln!(
        "a value set on the host is printed in the guest after, at the median, {:.1} ms by the \
         guest program as driver, {:.1} ms by the Linux driver",
        without.as_secs_f64() * 1e3,
        with.as_secs_f64() * 1e3
    );

    // The device loses its connection. Files, waits and mappings go on.
    let watchers = watchers(&guest)?;
    bus.run(&["state", "set", "values", "setpoint", "before"])?;
    all_say(&watchers, "before")?;
    let host = bus.watch("values", "heartbeat")?;
    guest.ok(&as_user("vbus-guest state set heartbeat first"))?;
    host.wait_for("first", LIMIT)?;
    for n in 0..3 {
        bus.run(&["device", "reincarnate", "values"])?;
        bus.run(&["state", "set", "values", "setpoint", &format!("anew-{n}-")])?;
        all_say(&watchers, &format!("anew-{n}-"))?;
        guest.ok(&as_user(&format!("vbus-guest state set heartbeat beat-{n}-")))?;
        host.wait_for(&format!("beat-{n}-"), LIMIT)?;
    }

    // The device goes while its pages are open and mapped, and comes back.
    vm.control.forget_events()?;
    vm.unplug("dev0")?;
    all_go(&watchers, "anew-2-")?;
    ensure!(!guest.ok("ls /dev")?.lines().any(|name| name == "vbus"), "/dev/vbus is left behind");
    let socket = bus.socket("values");
    vm.plug("again", 1, &socket)?;
    guest.ok(&format!("until [ -e {} ]; do sleep 0.05; done", file("setpoint")))?;
    let watchers = self::watchers(&guest)?;
    bus.run(&["state", "set", "values", "setpoint", "again"])?;
    all_say(&watchers, "again")?;

    // The module cannot go while somebody has a page open; a device can leave its driver.
    ensure!(linux::remove(&guest).is_err(), "the module was unloaded while it was in use");
    guest.ok(&format!("echo {} > /sys/bus/pci/drivers/vbus/unbind", linux::address(1)))?;
    all_go(&watchers, "again")?;
    linux::remove(&guest)?;
    linux::insert(&guest, "")?;
    guest.ok(&format!("until [ -e {} ]; do sleep 0.05; done", file("setpoint")))?;

    // The bus is killed. What was read before stays readable, and the rest of the guest goes on.
    let watchers = self::watchers(&guest)?;
    all_say(&watchers, "again")?;
    // QEMU 11.1 aborts if one of its requests is in work when the server dies.
    vm.control.execute("stop", json!({}))?;
    bus.process.kill()?;
    vm.control.execute("cont", json!({}))?;
    guest.run_for("true", LIMIT)?;
    let said = guest.ok(&as_user("vbus-guest state get setpoint"))?;
    ensure!(said == "again\n", "without a bus the page has {said:?}");
    vm.control.forget_events()?;
    vm.unplug("again")?;
    all_go(&watchers, "again")?;
    linux::check_kernel(&guest)?;
    vm.power_off()
}

/// Everybody may read the pages. The driver's page is root's to write, until somebody gives it
/// away, as a rule of udev would.
fn permissions(guest: &Guest) -> Result<()> {
    let modes = guest.ok(&format!("stat -c '%A %U' {} {}", file("setpoint"), file("heartbeat")))?;
    ensure!(modes == "cr--r--r-- root\ncrw-r--r-- root\n", "the files have the modes {modes:?}");
    let refused = guest.run(&as_user("vbus-guest state set heartbeat no"))?;
    ensure!(refused.code == 1 && refused.stderr.contains("udev"), "it is told {refused:?}");
    let none = guest.run(&as_user("vbus-guest state get heartbeat"))?;
    ensure!(none.code == 1 && none.stderr.contains("no value"), "it is told {none:?}");
    guest.ok(&format!("chown {USER} {}", file("heartbeat")))?;
    // Not even root writes a page of the device.
    let refused = guest.run(&format!("echo no > {}", file("setpoint")))?;
    ensure!(refused.code != 0, "a page of the device could be written");
    Ok(())
}

/// By our program, dd, cat and a mapping, as the ordinary user.
fn with_tools(scene: &Scene, bus: &Bus, guest: &Guest) -> Result<()> {
    let listed = guest.ok(&as_user("vbus-guest state list --json"))?;
    let listed: serde_json::Value = serde_json::from_str(&listed)?;
    let expected = json!([
        { "name": "setpoint", "owner": "device", "bytes": 64 },
        { "name": "heartbeat", "owner": "driver", "bytes": 64 },
        { "name": "large", "owner": "device", "bytes": LARGE },
        { "name": "a/b", "owner": "device", "bytes": 8 },
    ]);
    ensure!(listed == expected, "the pages are listed as {listed}");
    bus.run(&["state", "set", "values", "setpoint", "by-hand"])?;
    bus.run(&["state", "set", "values", "a/b", "slash"])?;
    let (setpoint, heartbeat) = (file("setpoint"), file("heartbeat"));
    for (command, answer) in [
        ("vbus-guest state get setpoint", "by-hand\n"),
        ("vbus-guest state --device values get a/b", "slash\n"),
        (&format!("cat {setpoint}"), &format!("{:\0<64}", "by-hand")),
        (&format!("dd if={setpoint} bs=64 count=9"), &format!("{:\0<64}", "by-hand")),
        (&format!("wc -c {setpoint}"), &format!("64 {setpoint}\n")),
    ] {
        let said = guest.ok(&as_user(&format!("{command} 2> /dev/null")))?;
        ensure!(said == answer, "{command} says {said:?}");
    }
    // A part of a value is an error, and so is another offset.
    for command in [
        format!("dd if={setpoint} bs=63 count=1"),
        format!("dd if={setpoint} bs=1 skip=5 count=1"),
        format!("dd if=/dev/zero of={heartbeat} bs=63 count=1"),
        format!("dd if=/dev/zero of={heartbeat} bs=64 seek=1 count=1"),
    ] {
        let refused = guest.run(&as_user(&command))?;
        ensure!(refused.stderr.contains("Invalid argument"), "{command}: {refused:?}");
    }
    let host = bus.watch("values", "heartbeat")?;
    guest.ok(&as_user("vbus-guest state set heartbeat by-our-program"))?;
    host.wait_for("by-our-program", LIMIT)?;
    guest.ok(&format!(
        "su {USER} -c 'echo by-dd | dd of={heartbeat} bs=64 conv=sync 2> /dev/null'"
    ))?;
    host.wait_for("by-dd", LIMIT)?;
    guest.ok(&as_user(&format!("guest-agent map-write {heartbeat} one two by-a-mapping")))?;
    host.wait_for("by-a-mapping", LIMIT)?;
    let said = guest.ok(&as_user("vbus-guest state get heartbeat"))?;
    ensure!(said == "by-a-mapping\n", "a mapping wrote {said:?}");
    // After the mapping has gone, the driver's own writes go on.
    guest.ok(&as_user("vbus-guest state set heartbeat afterwards"))?;
    host.wait_for("afterwards", LIMIT)?;

    // A value that needs memory in parts.
    let mut word = 1u64;
    let letters = std::iter::repeat_with(|| {
        word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        b"0123456789abcdef"[usize::from((word >> 60) as u8)]
    });
    let value: Vec<u8> = letters.take(LARGE).collect();
    let path = scene.dir().join("large");
    fs::write(&path, &value)?;
    let mut set = bus.command(&["state", "set", "values", "large", "-"]);
    let output = set.stdin(File::open(&path)?).output().context("cannot run vbus")?;
    ensure!(output.status.success(), "vbus state set: {}", String::from_utf8_lossy(&output.stderr));
    let large = file("large");
    for command in [
        format!("dd if={large} bs={LARGE} count=1"),
        format!("guest-agent map-read {large} 1 | head -c {LARGE}"),
    ] {
        let said = guest.ok(&format!("su {USER} -c '{command} 2> /dev/null' > /tmp/large"));
        said.with_context(|| command.clone())?;
        let sum = guest.ok("sha256sum < /tmp/large")?;
        let expected = scene.lab.busybox().arg("sha256sum").stdin(File::open(&path)?).output()?;
        let expected = String::from_utf8_lossy(&expected.stdout).into_owned();
        ensure!(sum == expected, "{command} reads {sum}, not {expected}");
    }
    Ok(())
}

/// Two who wait for values of the page "setpoint": by reads, and by a mapping.
fn watchers(guest: &Guest) -> Result<[Running; 2]> {
    let map = format!("guest-agent map-read {} 1000", file("setpoint"));
    Ok([guest.start(&as_user("vbus-guest state watch setpoint"))?, guest.start(&as_user(&map))?])
}

fn all_say(watchers: &[Running; 2], text: &str) -> Result<()> {
    watchers.iter().try_for_each(|watcher| watcher.wait_for(text, LIMIT))
}

/// The device goes: the one who reads gets an error, and the mapping keeps the last value.
fn all_go([reader, mapping]: &[Running; 2], last: &str) -> Result<()> {
    let ended = reader.wait(LIMIT)?;
    ensure!(ended.code == 1 && ended.stderr.contains("has gone"), "the reader: {ended:?}");
    let said = mapping.ok(LIMIT)?;
    ensure!(said.ends_with(&format!("gone {last}\n")), "the mapping: {said:?}");
    Ok(())
}

/// How long it takes until a watch prints a value that is set on the host: the median.
fn watch_latency(bus: &Bus, guest: &Guest, watch: &str) -> Result<Duration> {
    nic::prepare(guest)?;
    let watch = guest.start(watch)?;
    bus.run(&["state", "set", "values", "setpoint", "ready"])?;
    watch.wait_for("ready", LIMIT)?;
    let mut times = Vec::new();
    for n in 0..TIMES {
        let value = format!("value-{n}-");
        let began = Instant::now();
        bus.run(&["state", "set", "values", "setpoint", &value])?;
        watch.wait_for(&value, LIMIT)?;
        times.push(began.elapsed());
    }
    watch.kill()?;
    watch.wait(LIMIT)?;
    times.sort();
    Ok(times[TIMES / 2])
}
