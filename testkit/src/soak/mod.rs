// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The soak: for a long time guests and devices come and go on one bus, beside hostile clients.
//!
//! The run consists of rounds. A round ([`round`]) makes devices and guests, streams data whose
//! hash is compared, does harm to one guest of each pair in the middle of its traffic, and takes
//! all away again. Two NICs of their own exchange numbered frames all the time, of which none may
//! be lost ([`meter`]). Hostile clients do what they like ([`hostile`]). After each round they
//! rest, and the run counts what the bus and its supervisor hold ([`census`]): that must stay flat.
//! The log must have one line for each violation, and nothing unexpected ([`log`]).

pub mod census;
pub mod hostile;
pub mod log;
pub mod meter;
pub mod round;

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fastrand::Rng;
use serde::Serialize;

use crate::bus::Bus;
use crate::lab::Scene;
use crate::process_guest::ProcessGuest;
use crate::progress::Progress;
use census::Census;
use hostile::Hostile;
use meter::Meters;
use round::{Happened, Round, Stopped};

/// How long the bus may take to end.
const END: Duration = Duration::from_secs(30);
/// How long the bus may take to let go of the last clients of a round, and to write what it logs.
const SETTLE: Duration = Duration::from_secs(30);
/// A virtual machine is in one of so many rounds.
const MACHINE_EACH: u64 = 3;

/// How long the run goes on.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// No round begins after this time.
    Time(Duration),
    /// So many rounds.
    Rounds(u64),
}

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// When it ends.
    pub until: Until,
    /// All choices follow from this number. Times do not, so two runs differ in what meets what.
    pub seed: u64,
    /// Whether there are virtual machines beside the guests of processes.
    pub machines: bool,
}

/// What a run found.
#[derive(Debug, Default, Serialize)]
pub struct Findings {
    /// The seed.
    pub seed: u64,
    /// How long it ran, in seconds.
    pub seconds: u64,
    /// Complete rounds.
    pub rounds: u64,
    /// Whether the run was told to stop before its time.
    pub interrupted: bool,
    /// What is not as it must be. Empty: all holds.
    pub faults: Vec<String>,
    /// Whether the quantities stayed flat. None: the run was too short to say.
    pub flat: Option<bool>,
    /// What happened.
    pub happened: Happened,
    /// Frames between the two meters, none of them lost.
    pub frames: u64,
    /// What hostile clients did.
    pub hostile_deeds: u64,
    /// Connections of hostile clients that were cut off for a violation.
    pub violations: u64,
    /// Replies that a hostile client waited for longer than 5 s.
    pub slow_replies: u64,
    /// Expected warnings in the log.
    pub warnings: u64,
    /// Bytes of the log.
    pub log_bytes: u64,
    /// How long the bus took to end, in milliseconds.
    pub end_ms: u64,
    /// What the bus held at the end of each round, at rest.
    pub censuses: Vec<Census>,
    /// The most that it held at a moment in the middle of traffic.
    pub busiest: Census,
}

impl Findings {
    /// A table for people.
    pub fn table(&self) -> String {
        let Happened { process_guests, machines, streams, bytes, devices, values, .. } =
            self.happened;
        let mut text = format!(
            "{} rounds in {}:{:02} min, seed {}\n\
             guests     {process_guests} of processes, {machines} virtual machines\n\
             devices    {devices} came and went\n\
             streams    {streams} with {:.1} GiB, every hash right; {values} values by state pages\n\
             frames     {} numbered ones between two NICs, none lost\n\
             deaths     {} guests and {} drivers killed, {} machines reset\n\
             under way  {} guests frozen, {} devices removed by force, {} unplugged, \
             {} reincarnated, {} drivers' memory overwritten\n\
             hostile    {} deeds, {} violations, each with one line in the log; {} slow replies\n\
             log        {} expected warnings, {} KiB\n\
             end        {} ms\n",
            self.rounds,
            self.seconds / 60,
            self.seconds % 60,
            self.seed,
            bytes as f64 / (1u64 << 30) as f64,
            self.frames,
            self.happened.guests_killed,
            self.happened.drivers_killed,
            self.happened.reset,
            self.happened.frozen,
            self.happened.forced,
            self.happened.unplugged,
            self.happened.reincarnated,
            self.happened.scribbled,
            self.hostile_deeds,
            self.violations,
            self.slow_replies,
            self.warnings,
            self.log_bytes >> 10,
            self.end_ms,
        );
        text += &format!(
            "{:18} {:>10} {:>10} {:>10} {:>10}\n",
            "at rest", "first", "middle", "last", "busiest"
        );
        if let (Some(first), Some(last)) = (self.censuses.first(), self.censuses.last()) {
            let middle = &self.censuses[self.censuses.len() / 2];
            for quantity in &census::QUANTITIES {
                let values = [first, middle, last, &self.busiest].map(quantity.of);
                text += &format!("{:18}", quantity.name);
                values.iter().for_each(|value| text += &format!(" {value:>10}"));
                text += "\n";
            }
        }
        text += match self.flat {
            Some(true) => "flat: the last quarter needs no more than the second\n",
            Some(false) => "not flat\n",
            None => "too few rounds to say whether it is flat\n",
        };
        self.faults.iter().for_each(|fault| text += &format!("fault: {fault}\n"));
        text
    }
}

/// Runs the soak in `scene`. `stop` says whether to stop before the time. The run also ends at the
/// first fault.
///
/// Call it on a thread that lives as long as the run: guests die with the thread that started them.
///
/// # Errors
/// The bus cannot be started, or this machine lacks something
/// ([`Skip`](crate::report::Skip)). What the run finds is no error, but in the [`Findings`].
pub fn run(scene: &Scene, spec: &Spec, stop: &dyn Fn() -> bool) -> Result<Findings> {
    // What this machine lacks shows now. Later a guest that does not start is a fault.
    ProcessGuest::probe(scene)?;
    let config =
        format!("[allow]\npaths = [{:?}]\n{}{}", scene.dir(), meter::config(), hostile::config());
    let bus = Bus::start(scene, &config)?;
    let mut soak = Soak {
        scene,
        spec,
        stop,
        bus,
        rng: Rng::with_seed(spec.seed),
        rough: BTreeSet::from([hostile::EXACT, hostile::WILD[0], hostile::WILD[1]].map(Into::into)),
        found: Findings { seed: spec.seed, ..Findings::default() },
        began: Instant::now(),
    };
    if let Err(error) = soak.all() {
        soak.found.faults.push(format!("{error:#}"));
    }
    soak.found.seconds = soak.began.elapsed().as_secs();
    Ok(soak.found)
}

struct Soak<'a> {
    scene: &'a Scene<'a>,
    spec: &'a Spec,
    stop: &'a dyn Fn() -> bool,
    bus: Bus,
    rng: Rng,
    rough: BTreeSet<String>,
    found: Findings,
    began: Instant,
}

impl Soak<'_> {
    /// All of the run. An error is a fault.
    fn all(&mut self) -> Result<()> {
        let meters = Meters::start(self.bus.dir())?;
        let hostile = Hostile::start(self.bus.dir(), self.spec.seed)?;
        let mut progress = Progress::begin("soak", &self.plan());
        let rounds = self.rounds(&meters, &hostile, &mut progress);
        self.found.hostile_deeds = hostile.deeds();
        self.found.slow_replies = hostile.slow();
        self.found.frames = meters.frames();
        drop(progress);
        rounds?;
        let violations = hostile.violations();
        drop(hostile);
        self.found.frames = meters.finish()?;
        self.judge(violations)?;
        self.finish()?;
        let grown = census::growth(&self.found.censuses);
        self.found.flat = grown.as_ref().map(Vec::is_empty);
        self.found.faults.extend(grown.unwrap_or_default());
        Ok(())
    }

    fn plan(&self) -> String {
        let how_long = match self.spec.until {
            Until::Time(time) => format!("{} min", time.as_secs() / 60),
            Until::Rounds(rounds) => format!("{rounds} rounds"),
        };
        let machines = if self.spec.machines { "" } else { ", without virtual machines" };
        format!("{how_long}, seed {}{machines}", self.spec.seed)
    }

    fn is_over(&self) -> bool {
        match self.spec.until {
            Until::Time(time) => self.began.elapsed() >= time,
            Until::Rounds(rounds) => self.found.rounds >= rounds,
        }
    }

    fn rounds(
        &mut self,
        meters: &Meters,
        hostile: &Hostile,
        progress: &mut Progress,
    ) -> Result<()> {
        while !self.is_over() {
            let number = self.found.rounds + 1;
            let (bus, busiest) = (&self.bus, &mut self.found.busiest);
            let mut busy = || {
                let now = Census::take(bus.process.id(), &bus.stats()?)?;
                if now.pss_kib > busiest.pss_kib {
                    *busiest = now;
                }
                Ok(())
            };
            let round = Round {
                scene: self.scene,
                bus: &self.bus,
                rng: &mut self.rng,
                happened: &mut self.found.happened,
                rough: &mut self.rough,
                number,
                machine: self.spec.machines && number % MACHINE_EACH == 1,
                stop: self.stop,
                busy: &mut busy,
            };
            match round.run() {
                Err(error) if error.is::<Stopped>() => {
                    self.found.interrupted = true;
                    return Ok(());
                }
                done => done.with_context(|| format!("round {number}"))?,
            }
            meters.check()?;
            hostile.rest()?;
            hostile.check()?;
            let census = self.settle()?;
            self.judge(hostile.violations())?;
            progress.at(&format!(
                "{} min, {number} rounds, {:.1} GiB, {} frames, {} hostile deeds, Pss {} KiB, {} \
                 descriptors",
                self.began.elapsed().as_secs() / 60,
                self.found.happened.bytes as f64 / (1u64 << 30) as f64,
                meters.frames(),
                hostile.deeds(),
                census.pss_kib,
                census.descriptors
            ));
            self.found.censuses.push(census);
            self.found.rounds = number;
            hostile.go_on();
            std::thread::sleep(Duration::from_millis(self.rng.u64(100..1000)));
            if (self.stop)() {
                self.found.interrupted = true;
                return Ok(());
            }
        }
        Ok(())
    }

    /// Waits until the bus holds nothing more of the clients that have gone, and counts.
    fn settle(&self) -> Result<Census> {
        let take = || Census::take(self.bus.process.id(), &self.bus.stats()?);
        let began = Instant::now();
        let (mut last, mut still) = (take()?, 0);
        // Long operations end beside the workers, one after the other. It is at rest when nothing
        // has changed for some time.
        while still < 5 && began.elapsed() < SETTLE {
            std::thread::sleep(Duration::from_millis(100));
            let now = take()?;
            still = if now.holds_as_much(&last) { still + 1 } else { 0 };
            last = now;
        }
        Ok(last)
    }

    /// Compares the log with what hostile clients did, and with the counters. No client is there.
    /// A thread of the bus writes the log, so its last lines may come a moment later.
    fn judge(&mut self, certain: u64) -> Result<()> {
        let began = Instant::now();
        loop {
            match self.compare(certain)? {
                Some(difference) if began.elapsed() > SETTLE => bail!("{difference}"),
                Some(_) => std::thread::sleep(Duration::from_millis(50)),
                None => return Ok(()),
            }
        }
    }

    /// Looks at the log and the counters once. Returns how they differ, if they do.
    ///
    /// # Errors
    /// The log has lines that nothing explains.
    fn compare(&mut self, certain: u64) -> Result<Option<String>> {
        let text = fs::read(self.scene.dir().join("bus.log"))?;
        let text = String::from_utf8_lossy(&text);
        let judged = log::judge(&text, &self.rough);
        self.found.warnings = judged.warnings;
        self.found.log_bytes = text.len() as u64;
        self.found.violations = judged.violations.values().sum();
        ensure!(
            judged.unexpected.is_empty(),
            "{} lines of the log are unexpected:\n{}",
            judged.unexpected.len(),
            judged.unexpected[..judged.unexpected.len().min(20)].join("\n")
        );
        let stats = self.bus.stats()?;
        for name in [hostile::EXACT, hostile::WILD[0], hostile::WILD[1]] {
            let device = stats.as_array().into_iter().flatten().find(|d| d["name"] == name);
            let counted = device.and_then(|device| device["connector"]["violations"].as_u64());
            let counted = counted.with_context(|| format!("no violations of {name} in stats"))?;
            let lines = judged.violations.get(name).copied().unwrap_or_default();
            if lines != counted || name == hostile::EXACT && lines != certain {
                return Ok(Some(format!(
                    "{name}: {counted} violations were counted, the log has {lines} lines, and \
                     clients certainly committed {certain} on {}",
                    hostile::EXACT
                )));
            }
        }
        Ok(None)
    }

    /// Takes all devices off the bus, and ends it.
    fn finish(&mut self) -> Result<()> {
        for device in self.bus.client().devices()? {
            // After an interruption there may be devices whose guests were just killed.
            let force: &[&str] = if self.found.interrupted { &["--force"] } else { &[] };
            self.bus.run(&[&["device", "remove", &device.name], force].concat())?;
        }
        ensure!(self.bus.client().devices()?.is_empty(), "there are devices left");
        let began = Instant::now();
        let status = self.bus.process.terminate(END)?;
        self.found.end_ms = u64::try_from(began.elapsed().as_millis())?;
        ensure!(status.success(), "the bus ended with {status}");
        let left: Vec<_> = fs::read_dir(self.bus.dir()).into_iter().flatten().flatten().collect();
        let sockets = left.iter().filter(|file| file.path().extension() == Some("sock".as_ref()));
        ensure!(sockets.count() == 0, "the bus has left sockets behind: {left:?}");
        Ok(())
    }
}
