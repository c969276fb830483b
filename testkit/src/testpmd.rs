// SPDX-License-Identifier: Apache-2.0 OR MIT
//! DPDK's testpmd, as the front end of two vhost-user devices, and as a back end for itself. It
//! needs no huge pages, no root and no VM.

use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};
use serde_json::{Map, Value, json};

use crate::bus::{Bus, device};
use crate::kit::dpdk::Dpdk;
use crate::lab::{Lab, Scene};
use crate::netbench::{Spread, round};
use crate::process::Process;
use crate::report::Skip;

/// How long testpmd may take to start, to pass the frames of a test, and to end.
const LIMIT: Duration = Duration::from_secs(120);

/// The frames that each port sends at first. They go round and round.
const BURST: u32 = 128;

/// The addresses of the two ports.
const MACS: [&str; 2] = ["02:00:00:00:00:01", "02:00:00:00:00:02"];

/// The devices.
pub const DEVICES: [&str; 2] = ["pmd0", "pmd1"];

/// The configuration of a bus with the devices on one switch.
pub fn config() -> String {
    let one = |at: usize| {
        let settings =
            format!("transport = \"vhost-user\"\nbackend = \"switch\"\nmac = \"{}\"\n", MACS[at]);
        device(DEVICES[at], "virtio-net", &settings)
    };
    [0, 1].map(one).concat()
}

/// DPDK of the lab's kit.
///
/// # Errors
/// apt cannot fetch it. It is a [`Skip`] if the mirror lacks it, or if the options replace the kit.
pub fn dpdk(lab: &Lab) -> Result<Dpdk> {
    let kit =
        lab.kit().ok_or_else(|| Skip("the options replace the kit, which has DPDK".into()))?;
    kit.dpdk()
}

/// What the two ports have sent and received so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// By port: frames received, frames sent.
    pub ports: [[u64; 2]; 2],
}

impl Counts {
    /// The frames that both ports have received.
    pub fn received(&self) -> u64 {
        self.ports.iter().map(|[received, _]| received).sum()
    }
}

/// A running testpmd.
pub struct Testpmd {
    process: Process,
    lines: Receiver<String>,
    counts: Counts,
    /// The port of which the next lines are.
    port: usize,
}

impl Testpmd {
    /// Starts one whose ports are `devices`, on processor `cpu`. `name` is that of its log.
    fn start(
        dpdk: &Dpdk,
        scene: &Scene,
        name: &str,
        (devices, cpu): ([String; 2], usize),
        more: &[String],
    ) -> Result<Self> {
        let mut command: Command = dpdk.testpmd()?;
        command.args(["--no-huge", "--no-pci", "--no-telemetry", "--no-shconf", "-m", "128"]);
        command.args(["--lcores", &format!("0@{cpu},1@{cpu}"), "--file-prefix", name]);
        // DPDK keeps some files there, even without shared configuration.
        command.env("RUNTIME_DIRECTORY", scene.dir()).env("XDG_RUNTIME_DIR", scene.dir());
        for device in devices {
            command.arg("--vdev").arg(device);
        }
        command.args(["--", "--total-num-mbufs=8192", "--stats-period=1"]).args(more);
        let log = scene.dir().join(format!("{name}.log"));
        let (process, lines) = Process::start_with_lines(command, name, &log)?;
        Ok(Self { process, lines, counts: Counts::default(), port: 0 })
    }

    /// One that sends frames from each of two vhost-user sockets to the other, again and again.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn front_end(
        dpdk: &Dpdk,
        scene: &Scene,
        sockets: &[PathBuf; 2],
        packed: bool,
        cpu: usize,
    ) -> Result<Self> {
        let queue = if packed { ",packed_vq=1" } else { "" };
        let device = |at: usize| {
            let (path, mac) = (sockets[at].display(), MACS[at]);
            format!("net_virtio_user{at},path={path},mac={mac}{queue}")
        };
        let mut more = vec!["--forward-mode=mac".into(), "--tx-first".into()];
        more.push(format!("--burst={BURST}"));
        more.extend([0, 1].map(|at: usize| format!("--eth-peer={at},{}", MACS[1 - at])));
        Self::start(dpdk, scene, "testpmd", ([0, 1].map(device), cpu), &more)
    }

    /// DPDK's own back end: it moves frames between the front ends of two sockets.
    ///
    /// # Errors
    /// It cannot be started, or does not listen.
    pub fn back_end(
        dpdk: &Dpdk,
        scene: &Scene,
        sockets: &[PathBuf; 2],
        cpu: usize,
    ) -> Result<Self> {
        let device = |at: usize| format!("net_vhost{at},iface={}", sockets[at].display());
        let more = ["--forward-mode=io".to_owned(), format!("--burst={BURST}")];
        let mut own = Self::start(dpdk, scene, "vhost", ([0, 1].map(device), cpu), &more)?;
        let until = Instant::now() + LIMIT;
        while !sockets.iter().all(|socket| socket.exists()) {
            own.next(until)?;
        }
        Ok(own)
    }

    /// Reads a line. Returns whether it completes the counts of both ports.
    fn next(&mut self, until: Instant) -> Result<bool> {
        let left = until.saturating_duration_since(Instant::now());
        let line = match self.lines.recv_timeout(left) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => {
                let what = format!("has not passed the frames: {:?}", self.counts);
                return Err(self.process.complaint(&what));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(self.process.complaint("has ended"));
            }
        };
        self.hear(&line)
    }

    fn hear(&mut self, line: &str) -> Result<bool> {
        if let Some((_, port)) = line.split_once("NIC statistics for port ") {
            let port = port.split_whitespace().next().unwrap_or_default();
            self.port = port.parse::<usize>()?.min(1);
        }
        for (at, name) in ["RX-packets:", "TX-packets:"].into_iter().enumerate() {
            let number = line.trim_start().strip_prefix(name);
            if let Some(number) = number.and_then(|rest| rest.split_whitespace().next()) {
                self.counts.ports[self.port][at] = number.parse()?;
                return Ok(self.port == 1 && at == 1);
            }
        }
        Ok(false)
    }

    /// Waits for the next counts.
    ///
    /// # Errors
    /// It has ended, or says nothing for too long.
    pub fn counts(&mut self) -> Result<Counts> {
        let until = Instant::now() + LIMIT;
        while !self.next(until)? {}
        Ok(self.counts)
    }

    /// Waits until each port has received and sent `frames` frames.
    ///
    /// # Errors
    /// It has ended, or the frames do not pass.
    pub fn pass(&mut self, frames: u64) -> Result<Counts> {
        let until = Instant::now() + LIMIT;
        while self.counts.ports.iter().flatten().any(|count| *count < frames) {
            self.next(until)?;
        }
        self.counts()
    }

    /// What passes over `seconds` seconds. `back_end` is the process that carries the frames.
    fn rate(&mut self, seconds: u32, back_end: u32) -> Result<Rate> {
        let until = Instant::now() + LIMIT;
        while self.counts.ports.iter().flatten().any(|count| *count < u64::from(BURST) * 4) {
            self.next(until)?;
        }
        let before = self.counts()?.received();
        let (began, cpu) = (Instant::now(), processor_ns(back_end)?);
        loop {
            let now = self.counts()?.received();
            let took = began.elapsed();
            if took >= Duration::from_secs(seconds.into()) {
                let (frames, cpu) =
                    ((now - before) as f64, processor_ns(back_end)?.saturating_sub(cpu));
                ensure!(frames > 0.0, "no frame has passed in {took:?}");
                return Ok(Rate {
                    per_s: frames / took.as_secs_f64(),
                    cpu_ns_per_frame: cpu as f64 / frames,
                });
            }
        }
    }

    /// Asks it to end, and waits for that.
    ///
    /// # Errors
    /// It does not end, or complains.
    pub fn stop(mut self) -> Result<()> {
        let status = self.process.terminate(LIMIT)?;
        ensure!(status.success(), self.process.complaint(&format!("ended badly ({status})")));
        Ok(())
    }
}

/// What passed in a measurement.
#[derive(Clone, Copy)]
struct Rate {
    /// Frames that both ports have received in a second.
    per_s: f64,
    /// The processor time that the back end has had, for each of these frames, in nanoseconds. If
    /// the back end polls all the time, it includes the polls that found nothing.
    cpu_ns_per_frame: f64,
}

/// The processor time that the threads of a process have had, in nanoseconds.
fn processor_ns(process: u32) -> Result<u64> {
    let mut sum = 0;
    for thread in std::fs::read_dir(format!("/proc/{process}/task"))? {
        // A thread may end meanwhile. Those that work do not.
        let Ok(text) = std::fs::read_to_string(thread?.path().join("schedstat")) else { continue };
        let time = text.split_whitespace().next().context("an empty schedstat")?;
        sum += time.parse::<u64>()?;
    }
    Ok(sum)
}

/// Lets all threads of a process run on one processor only.
fn pin(process: u32, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    for thread in std::fs::read_dir(format!("/proc/{process}/task"))? {
        let name = thread?.file_name();
        let thread: i32 = name.to_str().context("no number")?.parse()?;
        sched_setaffinity(Pid::from_raw(thread), &set)?;
    }
    Ok(())
}

/// Frames a second between two devices of the bus, and through DPDK's own back end, which passes
/// them on without a look; and the processor time of the back end for each frame. The front end is
/// on one processor, and the back end on another. Both back ends take turns.
///
/// # Errors
/// A program does not start, or no frames pass. It is a [`Skip`] if this machine has one processor
/// only, or the mirror no DPDK.
pub fn bench(lab: &Lab, seconds: u32, rounds: u32) -> Result<Value> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    if cpus < 2 {
        return Err(Skip("testpmd and the back end need a processor each".into()).into());
    }
    let dpdk = dpdk(lab)?;
    let mut figures = Map::new();
    figures.insert("dpdk".into(), dpdk.version().into());
    for (name, packed) in [("split", false), ("packed", true)] {
        let mut all: [Vec<Rate>; 2] = Default::default();
        for number in 0..rounds {
            for turn in 0..2 {
                // Each round begins with the other one.
                let which = (turn + number as usize) % 2;
                let scene = lab.scene(&format!("testpmd-{name}-{number}-{which}"))?;
                all[which].push(one(&scene, &dpdk, packed, which == 0, seconds)?);
            }
        }
        let ratios = all[0].iter().zip(&all[1]).map(|(vbus, dpdk)| vbus.per_s / dpdk.per_s);
        let ratio = median(ratios.collect());
        let medians = |of: fn(&Rate) -> f64| {
            let [vbus, dpdk] = [0, 1].map(|which| median(all[which].iter().map(of).collect()));
            json!({ "vbus": vbus, "dpdk": dpdk })
        };
        let (rates, costs) = (medians(|rate| rate.per_s), medians(|rate| rate.cpu_ns_per_frame));
        eprintln!("{name}: {rates} frames/s, ratio {ratio}; {costs} ns of the back end a frame");
        figures.insert(format!("testpmd_{name}_frames_per_s"), rates);
        figures.insert(format!("testpmd_{name}_cpu_ns_per_frame"), costs);
        figures.insert(format!("testpmd_{name}_vs_dpdk"), ratio.into());
    }
    Ok(figures.into())
}

/// The middle one of some figures.
fn median(figures: Vec<f64>) -> f64 {
    Spread::of(figures).map_or(0.0, |spread| round(spread.median))
}

/// One measurement, with the bus or with DPDK as the back end.
fn one(scene: &Scene, dpdk: &Dpdk, packed: bool, by_bus: bool, seconds: u32) -> Result<Rate> {
    let socket = |at: usize| -> PathBuf { scene.dir().join(format!("vhost{at}.sock")) };
    let mut bus = None;
    let mut theirs = None;
    let (sockets, back_end) = if by_bus {
        let bus = bus.insert(Bus::start(scene, &config())?);
        pin(bus.process.id(), 0)?;
        (DEVICES.map(|name| bus.socket(name)), bus.process.id())
    } else {
        let sockets = [0, 1].map(socket);
        let theirs = theirs.insert(Testpmd::back_end(dpdk, scene, &sockets, 0)?);
        (sockets, theirs.process.id())
    };
    let mut front_end = Testpmd::front_end(dpdk, scene, &sockets, packed, 1)?;
    let rate = front_end.rate(seconds, back_end)?;
    front_end.stop()?;
    if let Some(theirs) = theirs {
        theirs.stop()?;
    }
    Ok(rate)
}

/// The frames that may be under way: those of two rings, both ways.
pub const UNDER_WAY: u64 = 4 * 256;
