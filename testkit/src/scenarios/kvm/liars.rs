// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hostile servers that lie to `vbus-vmm` about a device. Its guest also has honest devices.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::config::{check_driver, open_files, wait_files};
use super::devices::{endless, stop};
use crate::bus::device;
use crate::guest::Running;
use crate::l1::L1;
use crate::l1_wire::{self as net, EXCHANGE};
use crate::l2::{L1Bus, L2, L2Spec};
use crate::report::Figures;

/// The expected result of a lie.
#[derive(Clone, Copy)]
enum Fate {
    /// Plugging fails with an error that contains this text.
    Refused(&'static str),
    /// The device works: the lie has no effect.
    Works,
    /// The VMM unplugs the device when the guest accesses it.
    Dropped,
}
use Fate::{Dropped, Refused, Works};

/// The lies that `guest-agent lie` knows.
const LIES: &[(&str, Fate)] = &[
    ("bar-none", Refused("BAR0 of 0x0 bytes")),
    ("bar-odd", Refused("BAR0 of 0x4001 bytes")),
    ("bar-huge", Refused("BAR0 of 0x8000000000000000 bytes")),
    ("region-more", Refused("region 3 of 0xffffffffffffffff bytes")),
    ("io-size", Refused("eventfd for 18446744073709551612 bytes")),
    ("io-offset", Refused("eventfd for 0x4000000000000000 of BAR0")),
    ("io-count", Refused("reply to DEVICE_GET_REGION_IO_FDS: argsz")),
    ("io-index", Refused("no answer to DEVICE_GET_REGION_IO_FDS")),
    ("io-none", Refused("no answer to DEVICE_GET_REGION_IO_FDS")),
    ("io-file", Refused("is no eventfd")),
    ("kinds-none", Refused("0 regions and 0 kinds of interrupt")),
    ("short", Refused("reply to DEVICE_GET_INFO: body of 5 bytes")),
    ("empty", Refused("reply to DEVICE_GET_REGION_INFO: body of 0 bytes")),
    ("read-short", Refused("reply to REGION_READ: body of 17 bytes")),
    ("read-long", Refused("reply to REGION_READ: body of 4096 bytes")),
    ("read-other", Refused("no answer to REGION_READ")),
    ("size-less", Refused("message size 7 is below")),
    ("size-huge", Refused("longer than the limit")),
    ("type", Refused("message type 15 is neither")),
    ("id", Refused("no answer to DEVICE_GET_INFO")),
    ("command", Refused("no answer to DEVICE_GET_INFO")),
    ("refused", Refused("DMA_MAP refused")),
    ("refused-by-0", Refused("DMA_MAP refused")),
    ("refused-by-all", Refused("DMA_MAP refused")),
    ("files", Refused("more than 253 descriptors")),
    ("silence", Refused("no reply to DEVICE_GET_REGION_IO_FDS")),
    ("questions", Refused("no reply to DEVICE_GET_REGION_IO_FDS")),
    ("cut-header", Refused("closed within a message, after 9 bytes")),
    ("cut-body", Refused("closed within a message, after 19 bytes")),
    ("cut", Refused("closed the connection")),
    ("none", Works),
    ("bar-mapped", Works),
    ("irq-many", Works),
    ("memory", Works),
    ("late-long", Dropped),
    ("late-id", Dropped),
    ("late-silence", Dropped),
    ("late-questions", Dropped),
    ("late-cut", Dropped),
];

/// Root ports: one for the NIC, and one for each device that is plugged.
const SLOTS: u32 = 12;
/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(240);
/// The most bytes that the VMM may have printed at the end.
const LOG_MAX: usize = 32 << 10;

/// A lying server in L1. Dropping it ends the process.
struct Liar {
    name: &'static str,
    socket: String,
    running: Running,
}

impl Liar {
    /// Serves the device of the bus that has the name of the lie.
    fn start(l1: &L1, bus: &L1Bus, name: &'static str) -> Result<Self> {
        let socket = format!("{}/lie-{name}.sock", l1.run_dir());
        let running = l1
            .guest
            .start(&format!("exec guest-agent lie {socket} {} {name}", bus.socket(name)))?;
        running.wait_for("listens", LIMIT)?;
        Ok(Self { name, socket, running })
    }

    fn plug(&self, l2: &L2) -> Result<()> {
        l2.control(&json!({ "op": "plug", "name": self.name, "socket": self.socket }).to_string())
            .map(drop)
    }

    fn end(&self) -> Result<()> {
        self.running.kill()?;
        self.running.wait(LIMIT).map(drop)
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        // Fails only if L1 has ended.
        let _ = self.running.kill();
    }
}

/// A server lies when its device is plugged into a running guest, or later. Each lie has its
/// expected result. Meanwhile a NIC carries a stream without a pause.
pub fn lie(l1: &L1, _: &mut Figures) -> Result<()> {
    let pages =
        "pages = [{ name = \"setpoint\", bytes = 64, owner = \"device\", initial = \"true\" }]";
    let devices: String = LIES.iter().map(|(name, _)| device(name, "state", pages)).collect();
    let bus = net::bus(l1, &devices)?;
    let spec = L2Spec::new("lies").args(&format!("--slots {SLOTS}"));
    let l2 = spec.device("net", &bus.socket("net")).boot(l1)?;
    all(l1, &bus, &l2)?;
    l2.power_off()
}

fn all(l1: &L1, bus: &L1Bus, l2: &L2) -> Result<()> {
    let nic = net::nic(&l2.guest)?;
    net::exchange(l1, &l2.guest, EXCHANGE)?;
    let stream = endless(l1, l2)?;
    let files = open_files(l1, l2)?;
    for (name, fate) in LIES {
        let Refused(why) = fate else { continue };
        let liar = Liar::start(l1, bus, name)?;
        match liar.plug(l2) {
            Ok(()) => bail!("{name} is believed"),
            Err(error) => {
                ensure!(format!("{error:#}").contains(why), "{name}: {error:#}, and not {why}")
            }
        }
        liar.running.wait_for("lies", LIMIT).with_context(|| format!("{name} was never told"))?;
        liar.end()?;
        ensure!(plugged(l2)? == ["net"], "{name} has changed what is plugged");
    }
    wait_files(l1, l2, files + 2)?;

    // The others are plugged at once: Linux takes 5 s to bring a device in.
    let mut liars = Vec::new();
    for (name, fate) in LIES.iter().filter(|(_, fate)| !matches!(fate, Refused(_))) {
        let liar = Liar::start(l1, bus, name)?;
        liar.plug(l2).with_context(|| format!("{name} is to be plugged"))?;
        liars.push((liar, matches!(fate, Works)));
    }
    let mut left = vec!["net"];
    for (liar, works) in &liars {
        if *works {
            let found = l2.guest.start(&format!(
                "until vbus-guest list | grep -q '{}'; do sleep 0.1; done",
                liar.name
            ))?;
            found.ok(LIMIT).with_context(|| format!("the guest does not find {}", liar.name))?;
            check_driver(bus, l2, liar.name, "honest")
                .with_context(|| format!("with {}", liar.name))?;
            left.push(liar.name);
        } else {
            wait_plugged(l2, |names| !names.iter().any(|name| name == liar.name))
                .with_context(|| format!("{} is not dropped", liar.name))?;
        }
        liar.running
            .wait_for("lies", LIMIT)
            .with_context(|| format!("{} was never told", liar.name))?;
        if liar.name == "memory" {
            liar.running.wait_for("touched", LIMIT)?;
            let said = liar.running.said();
            let refusals = said.0.matches("touches: error").count();
            ensure!(refusals == TOUCHES, "memory was refused {refusals} times: {said:?}");
        }
    }
    ensure!(plugged(l2)? == left, "left are {:?}", plugged(l2)?);
    liars.iter().try_for_each(|(liar, _)| liar.end())?;
    wait_plugged(l2, |names| names == ["net"]).context("after all servers have gone")?;

    // An honest device works in a slot in which a lying one was.
    let name = LIES[0].0;
    l2.control(&json!({ "op": "plug", "name": name, "socket": bus.socket(name) }).to_string())?;
    l2.guest
        .start(&format!("until vbus-guest list | grep -q '{name}'; do sleep 0.1; done"))?
        .ok(LIMIT)?;
    check_driver(bus, l2, name, "honest")?;

    ensure!(stream.0.runs() && stream.1.runs(), "the stream has ended: {:?}", stream.0.said());
    stop(&stream.0, &stream.1)?;
    net::exchange(l1, &l2.guest, EXCHANGE)?;
    ensure!(nic.driver.runs(), "the driver of the NIC has ended: {:?}", nic.driver.said());
    let (out, err) = l2.vmm.said();
    ensure!(!err.contains("panicked") && out.len() + err.len() < LOG_MAX, "it has said too much");
    Ok(())
}

/// How often the lie `memory` asks for memory: it reads and writes at five addresses.
const TOUCHES: usize = 10;

/// The names of the devices.
fn plugged(l2: &L2) -> Result<Vec<String>> {
    let (devices, _) = l2.control(r#"{"op":"devices"}"#)?;
    let mut names: Vec<_> = devices
        .iter()
        .filter_map(|device: &Value| device["name"].as_str().map(str::to_owned))
        .collect();
    // The order in which they were plugged, not the order of their slots.
    names.sort_by_key(|name| LIES.iter().position(|(lie, _)| lie == name).map_or(0, |at| at + 1));
    Ok(names)
}

fn wait_plugged(l2: &L2, right: impl Fn(&[String]) -> bool) -> Result<()> {
    let until = Instant::now() + LIMIT;
    loop {
        let names = plugged(l2)?;
        if right(&names) {
            return Ok(());
        }
        ensure!(Instant::now() < until, "still plugged: {names:?}");
    }
}
