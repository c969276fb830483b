// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus is killed under guests at work, and its keeper starts the next one (spec/keeper.md).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::take_over::{A, B, NICS, Numbers, PATIENT, boot, up};
use crate::bus::{Bus, device};
use crate::guest::Guest;
use crate::lab::Scene;
use crate::linux;
use crate::pair::TRANSFER;

/// Kills, if nobody says how many.
const TIMES: u32 = 3;

/// Frames that each NIC receives before the next kill.
const FRAMES: u64 = 200;

/// The datagrams of a stream that are on their way at once, with those that its sender adds while
/// it waits for an answer: what a kill may lose, and what may come again.
const ON_THEIR_WAY: u64 = 64;

/// The keeper gives up a bus that dies again and again without so long a service.
const SERVICE: Duration = Duration::from_millis(1100);

/// Guest a has a NIC by the Linux driver, a virtio card by the kernel's driver, and state pages.
/// Guest b has a NIC by `vbus-guest`. Numbered datagrams flow in both directions while the bus is
/// killed again and again. No driver opens its device again, and what is lost or comes twice is
/// what a wire may lose.
pub fn kills(scene: &Scene) -> Result<()> {
    let page = |name: &str, owner: &str| {
        format!("{{ name = \"{name}\", bytes = 64, owner = \"{owner}\" }}")
    };
    let pages = format!("pages = [{}, {}]", page("in", "device"), page("out", "driver"));
    let config = [
        device("net-a", "venet", PATIENT),
        device("virt-a", "virtio-net", PATIENT),
        device("net-b", "venet", PATIENT),
        device("values", "state", &pages),
    ]
    .concat();
    let mut bus = Kept(Bus::start_kept(scene, &config)?);
    let (a, b) = boot(scene, &bus.0, false)?;
    let (guest_a, guest_b) = (&a.guest, &b.guest);
    let drivers = up(guest_a, guest_b, &bus.0)?;
    let mut streams = Vec::new();
    for (port, (from, to, address)) in (6000..).zip([
        (guest_a, guest_b, B[0]),
        (guest_b, guest_a, A[0]),
        (guest_a, guest_b, B[1]),
        (guest_b, guest_a, A[1]),
    ]) {
        streams.push(Counted::start(from, to, address, port)?);
    }
    let times = scene.lab.times().unwrap_or(TIMES);
    let mut pauses = Vec::new();
    for time in 1..=times {
        bus.one_more(&streams, guest_a, time)?;
        thread::sleep(SERVICE);
        pauses.push(bus.kill().with_context(|| format!("kill {time}"))?);
    }
    bus.one_more(&streams, guest_a, times + 1)?;
    let mut told = Vec::new();
    for stream in streams {
        let [came, missing, again] = stream.end()?;
        let most = u64::from(times) * ON_THEIR_WAY;
        told.push(format!("{came} came, {missing} lost, {again} again"));
        ensure!(missing <= most && again <= most, "after {times} kills: {told:?}");
    }
    pauses.sort();
    eprintln!("{times} kills: {}; the next bus after {pauses:.0?}", told.join("; "));
    let stats = bus.0.stats()?;
    for device in stats.as_array().into_iter().flatten() {
        let name = device["name"].as_str().unwrap_or_default();
        ensure!(device["counters"]["broken"] == 0, "{name}: a connection has ended: {device}");
        ensure!(device["connected"] == true, "{name}: nobody is connected: {device}");
        ensure!(name == "virt-a" || device["counters"]["opens"] == 1, "opened again: {device}");
    }
    linux::check_kernel(guest_a)?;
    for driver in &drivers {
        ensure!(driver.runs(), "vbus-guest has ended: {:?}", driver.said());
        let (_, said) = driver.said();
        ensure!(!said.contains("again"), "vbus-guest has noticed: {said}");
    }
    a.power_off()?;
    b.power_off()?;
    let status = bus.0.process.terminate(TRANSFER)?;
    ensure!(status.success(), bus.0.process.complaint(&format!("ended with {status}")));
    Ok(())
}

/// A bus with a keeper, which ends with this.
struct Kept(Bus);

impl Kept {
    /// The process of the bus.
    fn process(&self) -> Result<Pid> {
        let mut socket = UnixStream::connect(self.0.dir().join("control.sock"))?;
        socket.set_read_timeout(Some(TRANSFER))?;
        socket.write_all(b"{\"op\":\"info\"}\n")?;
        let mut line = String::new();
        BufReader::new(socket).read_line(&mut line)?;
        let answer: Value = serde_json::from_str(&line)?;
        let pid = answer["ok"]["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        pid.and_then(Pid::from_raw).with_context(|| format!("no process: {line}"))
    }

    /// How often another bus has taken the place of one that was killed.
    fn restarts(&self) -> Result<usize> {
        Ok(self.0.log()?.matches(" has taken up ").count())
    }

    /// Kills the bus. Returns when the next one answers, and how long after.
    fn kill(&mut self) -> Result<Duration> {
        let (process, before, began) = (self.process()?, self.restarts()?, Instant::now());
        kill_process(process, Signal::KILL).context("cannot kill the bus")?;
        while self.restarts()? == before {
            if let Some(status) = self.0.process.ended()? {
                return Err(self.0.process.complaint(&format!("has given up ({status})")));
            }
            ensure!(began.elapsed() < TRANSFER, self.0.process.complaint("starts no other bus"));
            thread::sleep(Duration::from_millis(2));
        }
        Ok(began.elapsed())
    }

    /// Waits until everything has carried something more.
    fn one_more(&self, streams: &[Counted], guest: &Guest, time: u32) -> Result<()> {
        let bus = &self.0;
        // Frames of before the last kill may be in no count.
        let frames =
            || -> Result<Vec<u64>> { NICS.iter().map(|name| bus.received_frames(name)).collect() };
        let (before, began) = (frames()?, Instant::now());
        loop {
            let now = frames()?;
            if now.iter().zip(&before).all(|(now, before)| *now >= before + FRAMES) {
                break;
            }
            streams.iter().try_for_each(|stream| stream.0.check())?;
            let log = || bus.log().unwrap_or_default();
            ensure!(
                began.elapsed() < TRANSFER,
                "before kill {time} frames do not flow: {before:?}, {now:?}\n{}",
                log()
            );
            thread::sleep(Duration::from_millis(20));
        }
        bus.run(&["state", "set", "values", "in", &format!("in-{time}-")])?;
        let said = guest.ok("vbus-guest state get in")?;
        ensure!(said == format!("in-{time}-\n"), "the guest sees {said:?}, not value {time}");
        guest.ok(&format!("vbus-guest state set out out-{time}-"))?;
        let said = bus.run(&["state", "get", "values", "out"])?;
        ensure!(said.contains(&format!("out-{time}-")), "the host sees {said:?}, not {time}");
        Ok(())
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // A bus outlives its keeper, and that is killed.
        let bus = self.process();
        let _ = self.0.process.kill();
        let _ = bus.map(|bus| kill_process(bus, Signal::KILL));
    }
}

/// A stream of numbered datagrams from one guest to another, some of which may be lost.
struct Counted(Numbers);

impl Counted {
    fn start(from: &Guest, to: &Guest, address: &str, port: u16) -> Result<Self> {
        Numbers::start_by(["throw", "count"], from, to, address, port).map(Self)
    }

    /// Ends the stream. Returns how many datagrams came, how many are missing, and how many came
    /// again.
    fn end(self) -> Result<[u64; 3]> {
        let Numbers { sender, receiver } = self.0;
        sender.input(&[])?;
        let sent: u64 = sender.ok(TRANSFER)?.trim().parse()?;
        let said = receiver.ok(TRANSFER)?;
        let numbers: Vec<u64> = said
            .trim_start_matches("ready\n")
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let [came, missing, again] =
            numbers.try_into().map_err(|_| anyhow::anyhow!("the receiver says {said:?}"))?;
        ensure!(came + missing - again >= sent, "{sent} were sent, and the receiver says {said:?}");
        Ok([came, missing, again])
    }
}
