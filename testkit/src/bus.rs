// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A bus under test: `vbus serve` as a process, and the commands that control it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::lab::Scene;
use crate::process::Process;

/// How long `vbus serve` may take to answer its first command.
const START: Duration = Duration::from_secs(120);

/// The lines for a device in a bus's configuration.
pub fn device(name: &str, class: &str, settings: &str) -> String {
    format!("[[device]]\nname = \"{name}\"\nclass = \"{class}\"\n{settings}\n")
}

/// The summed counters of some NICs.
#[derive(Clone, Copy, Default)]
pub struct Traffic {
    /// Frames from the drivers. A frame of 64 KiB that is segmented later counts as one.
    pub packets: u64,
    /// Doorbells that the drivers rang.
    pub doorbells: u64,
    /// Interrupts that the devices sent.
    pub interrupts: u64,
    /// Frames dropped, in either direction.
    pub drops: u64,
}

impl Traffic {
    /// The difference to the earlier counters `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            packets: self.packets - before.packets,
            doorbells: self.doorbells - before.doorbells,
            interrupts: self.interrupts - before.interrupts,
            drops: self.drops - before.drops,
        }
    }

    /// Doorbells and interrupts per 1,000 packets.
    pub fn kicks_per_1000(self) -> (f64, f64) {
        let per = |kicks: u64| kicks as f64 * 1000.0 / self.packets.max(1) as f64;
        (per(self.doorbells), per(self.interrupts))
    }
}

/// A device of a bus, as `vbus device list` prints it.
#[derive(Debug, Deserialize)]
pub struct BusDevice {
    /// Its name.
    pub name: String,
    /// Its vfio-user socket.
    pub socket: PathBuf,
    /// Whether a VMM or a process uses it.
    pub connected: bool,
}

/// A client of a running bus. Anybody may have started the bus.
pub struct BusClient {
    program: PathBuf,
    dir: PathBuf,
}

impl BusClient {
    /// A client that uses the program `vbus` on the bus in the folder `dir`.
    pub fn new(program: &Path, dir: &Path) -> Self {
        Self { program: program.to_owned(), dir: dir.to_owned() }
    }

    /// `vbus ARGS --dir DIR`, not run yet.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args).arg("--dir").arg(&self.dir).stdin(Stdio::null());
        command
    }

    /// Runs `vbus ARGS --dir DIR`, which has to succeed; returns what it printed.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        let output = self
            .command(args)
            .output()
            .with_context(|| format!("cannot run {}", self.program.display()))?;
        let words = args.join(" ");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.success(),
            "vbus {words} failed ({}): {}",
            output.status,
            said.trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The devices on the bus.
    pub fn devices(&self) -> Result<Vec<BusDevice>> {
        serde_json::from_str(&self.run(&["device", "list", "--json"])?)
            .context("vbus device list --json printed no list of devices")
    }
}

/// A running bus. Dropping it ends the process.
pub struct Bus {
    /// `vbus serve`.
    pub process: Process,
    client: BusClient,
    config: PathBuf,
    log: PathBuf,
}

impl Bus {
    /// Serves the bus that `config` describes, in a folder of the scene.
    pub fn start(scene: &Scene, config: &str) -> Result<Self> {
        Self::start_with(scene.lab.vbus(), scene, config)
    }

    /// The same with a keeper: the bus is a child of [`process`](Self::process).
    pub fn start_kept(scene: &Scene, config: &str) -> Result<Self> {
        Self::start_by(scene.lab.vbus(), scene, config, &["--keep"])
    }

    /// The same with another program, which has all commands of `vbus` and classes of its own.
    pub fn start_with(program: &Path, scene: &Scene, config: &str) -> Result<Self> {
        Self::start_by(program, scene, config, &[])
    }

    fn start_by(program: &Path, scene: &Scene, config: &str, more: &[&str]) -> Result<Self> {
        let dir = scene.dir();
        let file = dir.join("bus.toml");
        fs::write(&file, config)?;
        let folder = dir.join("bus");
        let mut command = Command::new(program);
        command.arg("serve").args(more).arg("--config").arg(&file).arg("--dir").arg(&folder);
        let log = dir.join("bus.log");
        let process = Process::start(command, "vbus serve", &log)?;
        let client = BusClient::new(program, &folder);
        let mut bus = Self { process, client, config: file, log };
        let until = Instant::now() + START;
        loop {
            match bus.run(&["device", "list"]) {
                Ok(_) => return Ok(bus),
                Err(error) if Instant::now() > until => {
                    return Err(bus.process.complaint(&format!("gives no answer: {error:#}")));
                }
                Err(_) => {}
            }
            if let Some(status) = bus.process.ended()? {
                return Err(bus.process.complaint(&format!("ended at once ({status})")));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// A new process takes the place of this one (`vbus serve --take-over`), which then ends.
    /// Returns how long the devices paused.
    ///
    /// # Errors
    /// It does not take over, and the bus goes on.
    pub fn take_over(&mut self) -> Result<Duration> {
        let command = self.taker();
        let (mut next, lines) = Process::start_with_lines(command, "the new bus", &self.log)?;
        match lines.recv_timeout(START) {
            Ok(line) if line == "READY=1" => {}
            told => {
                let _ = next.kill();
                return Err(next.complaint(&format!("did not take over, and said {told:?}")));
            }
        }
        let ended = self.process.wait(START).context("the old bus")?;
        ensure!(ended.success(), next.complaint(&format!("took over, but the old one: {ended}")));
        self.process = next;
        let log = self.log()?;
        let pause = log.lines().rev().find_map(|line| line.split_once("they paused for "));
        let (_, pause) = pause.context("the log does not say how long the devices paused")?;
        parse_duration(pause).with_context(|| format!("the log says {pause:?}"))
    }

    /// The command of a process that takes the place of this one. It says on its standard output
    /// that it has.
    pub fn taker(&self) -> Command {
        let mut command = self.command(&["serve", "--take-over", "--ready-fd", "1"]);
        command.arg("--config").arg(&self.config);
        command
    }

    /// What the bus, and those that it has taken over from, have said.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn log(&self) -> Result<String> {
        let log = &self.log;
        fs::read_to_string(log).with_context(|| format!("cannot read {}", log.display()))
    }

    /// The client of this bus.
    pub fn client(&self) -> &BusClient {
        &self.client
    }

    /// The folder of its sockets.
    pub fn dir(&self) -> &Path {
        &self.client.dir
    }

    /// The vfio-user socket of a device.
    pub fn socket(&self, device: &str) -> PathBuf {
        self.client.dir.join(format!("{device}.sock"))
    }

    /// QEMU's options for the device `name` of vhost-user, as the bus prints them, behind root port
    /// `slot`. `more` goes with those of the function.
    pub fn vhost_user(&self, name: &str, slot: usize, more: &str) -> Result<Vec<String>> {
        let printed = self.run(&["qemu-args", name, "--spare-ports", "0", "--json"])?;
        let words: Vec<String> = serde_json::from_str(&printed)?;
        let from = words.iter().position(|word| word == "-chardev").context("no -chardev")?;
        let mut words = words[from..].to_vec();
        let function = words.last_mut().context("no option")?;
        *function = function.replace("bus=vbus-port0", &format!("bus=slot{slot}"));
        *function += more;
        Ok(words)
    }

    /// `vbus ARGS --dir DIR`, not run yet.
    pub fn command(&self, args: &[&str]) -> Command {
        self.client.command(args)
    }

    /// `vbus ARGS` of a command that knows no bus, not run yet.
    pub fn program(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.client.program);
        command.args(args).stdin(Stdio::null());
        command
    }

    /// Runs `vbus ARGS --dir DIR`, which has to succeed; returns what it printed.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        self.client.run(args)
    }

    /// Runs `vbus state watch`.
    pub fn watch(&self, device: &str, page: &str) -> Result<Watch> {
        let mut child =
            self.command(&["state", "watch", device, page]).stdout(Stdio::piped()).spawn()?;
        let output = child.stdout.take().context("no output")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(std::result::Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Watch { child, lines })
    }

    /// `vbus stats --json`.
    pub fn stats(&self) -> Result<Value> {
        serde_json::from_str(&self.run(&["stats", "--json"])?)
            .context("vbus stats --json printed no JSON")
    }

    /// The bytes that this NIC has sent since it was made, over all connections.
    pub fn sent_bytes(&self, nic: &str) -> Result<u64> {
        self.sum_of_pairs(nic, |pair| pair["tx"]["bytes"].as_u64())
    }

    /// The frames that this NIC has received since it was made, over all connections.
    pub fn received_frames(&self, nic: &str) -> Result<u64> {
        self.sum_of_pairs(nic, |pair| pair["rx"]["frames"].as_u64())
    }

    /// The frames that filters have kept from this NIC's driver, and those that nobody on its
    /// switch wanted, since the NIC was made.
    pub fn unwanted_frames(&self, nic: &str) -> Result<u64> {
        let filtered = self.sum_of_pairs(nic, |pair| pair["rx"]["filtered"].as_u64())?;
        let shown: Value = serde_json::from_str(&self.run(&["device", "show", nic, "--json"])?)?;
        let unwanted = shown["device"]["backend"]["unwanted"].as_u64();
        Ok(filtered + unwanted.with_context(|| format!("{nic} is on no switch: {shown}"))?)
    }

    /// The sum of a counter of a NIC's queue pairs.
    pub fn sum_of_pairs(&self, nic: &str, counter: fn(&Value) -> Option<u64>) -> Result<u64> {
        let stats = self.stats()?;
        let device = stats.as_array().into_iter().flatten().find(|device| device["name"] == nic);
        let pairs = device.and_then(|device| device["device"]["pairs"].as_array());
        let pairs = pairs.with_context(|| format!("vbus stats --json tells nothing of {nic}"))?;
        Ok(pairs.iter().filter_map(counter).sum())
    }

    /// The counters of these NICs, together.
    pub fn traffic(&self, nics: &[&str]) -> Result<Traffic> {
        let stats = self.stats()?;
        let devices = stats.as_array().context("vbus stats --json printed no array of devices")?;
        let mut sum = Traffic::default();
        for name in nics {
            let device = devices.iter().find(|device| device["name"] == *name);
            let device =
                device.with_context(|| format!("vbus stats --json does not know {name}"))?;
            let number = |value: &Value| {
                value.as_u64().with_context(|| format!("a counter of {name} is missing: {device}"))
            };
            sum.doorbells += number(&device["counters"]["doorbells"])?;
            sum.interrupts += number(&device["counters"]["interrupts"])?;
            for pair in device["device"]["pairs"]
                .as_array()
                .with_context(|| format!("{name} has no queue pairs"))?
            {
                sum.packets += number(&pair["tx"]["frames"])?;
                for drops in [&pair["tx"]["drops"], &pair["rx"]["drops"]] {
                    sum.drops += drops
                        .as_object()
                        .into_iter()
                        .flatten()
                        .filter_map(|(_, n)| n.as_u64())
                        .sum::<u64>();
                }
            }
        }
        Ok(sum)
    }

    /// How many files the bus has open.
    pub fn open_files(&self) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.process.id()))?.count())
    }

    /// Its resident memory in KiB.
    pub fn resident_kib(&self) -> Result<u64> {
        self.status_field("VmRSS:")
    }

    /// How many threads it has.
    pub fn threads(&self) -> Result<u64> {
        self.status_field("Threads:")
    }

    /// The processor time that it has used so far.
    pub fn cpu_time(&self) -> Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id()))?;
        // The name may contain spaces, so the fields are counted after it. The state is field 3.
        // User and system time, in ticks, are fields 14 and 15.
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
        let ticks: u64 =
            fields.iter().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
        Ok(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
    }

    fn status_field(&self, key: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let value = status
            .lines()
            .find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok());
        value.with_context(|| format!("no {key} in the status of the bus"))
    }
}

/// Reads what `{:?}` of a [`Duration`] writes.
fn parse_duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit() && c != '.')?);
    let unit = match unit {
        "ns" => 1e-9,
        "µs" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        _ => return None,
    };
    Some(Duration::from_secs_f64(number.parse::<f64>().ok()? * unit))
}

/// A `vbus state watch` that runs until this is dropped.
pub struct Watch {
    child: Child,
    lines: Receiver<String>,
}

impl Watch {
    /// Waits for a value that contains `text`.
    pub fn wait_for(&self, text: &str, limit: Duration) -> Result<()> {
        let until = Instant::now() + limit;
        let mut seen = Vec::new();
        while let Ok(line) =
            self.lines.recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            if line.contains(text) {
                return Ok(());
            }
            seen.push(line);
        }
        bail!("the host does not see {text:?}, only {seen:?}")
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_of_the_log_is_read() {
        for micros in [0, 7, 1500, 46_000, 2_500_000] {
            let duration = Duration::from_micros(micros);
            assert_eq!(parse_duration(&format!("{duration:?}\n")), Some(duration));
        }
        assert_eq!((parse_duration("46"), parse_duration("4 years")), (None, None));
    }
}
