// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus snapshot`: a snapshot of a QEMU, with its devices of vbus unplugged meanwhile.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use vbus_cli::output::{emit, emit_json};
use vbus_cli::progress::Progress;
use vbus_cli::signals;
use vbus_qmp::Qmp;

use crate::plug::{self, Plugged};

const HELP: &str = "\
QEMU's savevm and loadvm save nothing of a device that QEMU has over vfio-user, and report success.
This command saves or restores in an order that loses nothing:
  1. It unplugs the machine's devices of vbus, and waits until the guest has released them. The
     guest loses its network cards of vbus, and finds them again in step 3.
  2. QEMU saves the machine with its disks (savevm), or restores it (loadvm).
  3. It plugs the same devices into the same places.
The machine must run, or its guest releases nothing. A disk that the machine can write must be able
to hold snapshots (qcow2). If a step fails, or on Ctrl-C, the devices are plugged in again.
The snapshot has the name vbus-NAME in QEMU. --load restores only such ones: a machine that was
saved with its devices left in believes that they are there, and needs QEMU's loadvm with the same
devices.

Without this command, a driver of vbus (the Linux driver, vbus-guest) opens its device again by
itself after loadvm, and the bus warns. Other drivers, such as those of virtio, do not.

Examples:
  vbus snapshot --qmp /run/vm/qmp before-update
  vbus snapshot --qmp /run/vm/qmp before-update --load
  vbus snapshot --qmp /run/vm/qmp before-update --replace";

/// How long QEMU may show no progress while it writes the machine to its disk, or reads it. It may
/// take any time, as long as it goes on.
const STANDSTILL: Duration = Duration::from_secs(600);
/// How often the command looks for progress.
const LOOK_FOR_PROGRESS: Duration = Duration::from_secs(2);
/// How often the command looks whether it shall end.
const LOOK: Duration = Duration::from_millis(100);
/// The longest name of a snapshot, in bytes: QEMU has room for 255.
const NAME_MAX: usize = 200;
/// What QEMU's name of a snapshot begins with, before the name that the command was given. QEMU
/// keeps nothing else that could tell how a snapshot was saved.
const MARK: &str = "vbus-";

/// Arguments.
#[derive(clap::Args, Debug)]
#[command(after_help = HELP)]
pub struct Args {
    /// The name of the snapshot: letters, digits, `.`, `_` and `-`, with a letter first
    #[arg(value_parser = name)]
    name: String,
    /// QMP socket of the running QEMU
    #[arg(long, value_name = "SOCKET")]
    qmp: PathBuf,
    /// Restore the snapshot, in place of saving one
    #[arg(long)]
    load: bool,
    /// Save in place of a snapshot that has this name
    #[arg(long, conflicts_with = "load")]
    replace: bool,
    /// Give up if the guest has not released the devices after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30,
        value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// QEMU takes the name as a word of its monitor, and a number could be the number of a snapshot.
fn name(argument: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let is_good = argument.starts_with(|c: char| c.is_ascii_alphabetic())
        && argument.chars().all(plain)
        && argument.len() <= NAME_MAX;
    if is_good {
        // Whoever has the name from QEMU means the same snapshot.
        Ok(argument.strip_prefix(MARK).unwrap_or(argument).to_owned())
    } else {
        Err("use letters, digits, `.`, `_` and `-`, with a letter first".into())
    }
}

/// Runs it.
pub fn run(args: &Args) -> Result<()> {
    let stop = signals::termination()?;
    let timeout = Duration::from_secs(args.timeout);
    let mut qmp = Qmp::connect(&args.qmp, timeout)?;
    let disks = check(&mut qmp, args)?;
    let devices = plug::plugged(&mut qmp)?;
    if let Some(device) = devices.iter().find(|device| device.has_msix) {
        bail!(
            "QEMU aborts when it unplugs a device with MSI-X, and {:?} has it; serve the device \
             without `msix = true`, or stop the machine and save its disks",
            device.id
        );
    }
    let until = Instant::now() + timeout;
    let mut machine = Machine { qmp, stop, until, pending: Vec::new(), absent: Vec::new() };
    let (began, mut progress) = (Instant::now(), Progress::new());
    progress.show(&format!(
        "waiting until the guest releases {} devices, at most {} s",
        devices.len(),
        args.timeout
    ));
    let done = machine.release(&devices).and_then(|()| {
        progress.show(if args.load { "restoring" } else { "saving" });
        let name = format!("{MARK}{}", args.name);
        machine.monitor(if args.load { "loadvm" } else { "savevm" }, &name, &disks)
    });
    if done.is_err() {
        progress.show("plugging the devices in again");
    }
    let back = machine.put_back(timeout);
    let absent = began.elapsed();
    drop(progress);
    let what = if args.load { "restored" } else { "saved" };
    match (done, back) {
        (Err(error), Ok(())) => {
            Err(error.context(format!("not {what}; the devices are plugged in as before")))
        }
        (Err(error), Err(lost)) => Err(anyhow!("not {what}: {error:#}; {lost:#}")),
        (Ok(()), Err(lost)) => Err(lost.context(format!("{what} {}, but", args.name))),
        (Ok(()), Ok(())) => {
            let ids: Vec<&str> = devices.iter().map(|device| device.id.as_str()).collect();
            if args.json {
                emit_json(&json!({
                    "name": args.name,
                    "action": what,
                    "devices": ids,
                    "absent_ms": u64::try_from(absent.as_millis()).unwrap_or(u64::MAX),
                }));
                return Ok(());
            }
            let devices = match &ids[..] {
                [] => "QEMU has no devices of vbus".to_owned(),
                ids => format!("without {} for {:.1} s", ids.join(", "), absent.as_secs_f64()),
            };
            emit(&format!("{what} {}, {devices}\n", args.name));
            Ok(())
        }
    }
}

/// Checks what can be checked before a device is unplugged. Returns the files of the disks that can
/// hold a snapshot, as far as QEMU names any.
fn check(qmp: &mut Qmp, args: &Args) -> Result<Vec<PathBuf>> {
    let status = qmp.run("query-status", json!({}))?;
    ensure!(
        status["running"] == true,
        "the machine does not run ({}), so its guest cannot release devices; let it run (cont)",
        status["status"].as_str().unwrap_or("?")
    );
    let nodes = qmp.run("query-named-block-nodes", json!({ "flat": true }))?;
    let nodes: Vec<&Value> = nodes.as_array().into_iter().flatten().collect();
    ensure!(
        nodes.iter().any(|node| node["drv"] == "qcow2" && node["ro"] == false),
        "this QEMU has no disk that can hold a snapshot: give it one in the format qcow2"
    );
    let snapshots: Vec<&str> = nodes
        .iter()
        .flat_map(|node| node["image"]["snapshots"].as_array().into_iter().flatten())
        .filter_map(|snapshot| snapshot["name"].as_str())
        .collect();
    let mut own: Vec<&str> = snapshots.iter().filter_map(|name| name.strip_prefix(MARK)).collect();
    match (args.load, own.contains(&args.name.as_str())) {
        (true, false) if snapshots.contains(&args.name.as_str()) => bail!(
            "the snapshot {:?} was not saved by `vbus snapshot`: a guest that was saved with its \
             devices left in believes that they are there; restore it by QEMU's loadvm, with the \
             devices that it had",
            args.name
        ),
        (true, false) if own.is_empty() => {
            bail!("there are no snapshots of `vbus snapshot` on its disks")
        }
        (true, false) => {
            own.sort_unstable();
            own.dedup();
            bail!("there is no snapshot {:?}; there are {}", args.name, own.join(", "))
        }
        (false, true) if !args.replace => {
            bail!("there is a snapshot {:?} already; --replace saves in its place", args.name)
        }
        _ => {}
    }
    let holds = nodes.iter().filter(|node| node["drv"] == "qcow2");
    let files = holds.filter_map(|node| node["image"]["filename"].as_str());
    Ok(files.map(PathBuf::from).collect())
}

/// Whether QEMU works: its process uses the processor, or the files of its disks change.
struct Works<'a> {
    process: Option<u32>,
    disks: &'a [PathBuf],
    last: Vec<u64>,
    since: Instant,
    /// How long it may show no progress.
    standstill: Duration,
}

impl Works<'_> {
    /// What changes while QEMU works.
    fn look(&self) -> Vec<u64> {
        let stat =
            self.process.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok());
        // The name may have anything in it. Behind it, utime and stime are fields 14 and 15.
        let fields = stat.as_deref().and_then(|stat| Some(stat.rsplit_once(") ")?.1));
        let fields = fields.into_iter().flat_map(str::split_whitespace);
        let times = fields.skip(11).take(2).filter_map(|field| field.parse().ok());
        let file = |path: &PathBuf| {
            let known = fs::metadata(path).ok()?;
            let time = [known.mtime(), known.mtime_nsec()].map(|part| part.try_into().unwrap_or(0));
            Some([known.blocks(), time[0], time[1]])
        };
        times.chain(self.disks.iter().filter_map(file).flatten()).collect()
    }

    /// Whether it has done something since the last call, or not long before.
    fn goes_on(&mut self) -> bool {
        let now = self.look();
        let changed = now != self.last;
        if changed {
            self.last = now;
            self.since = Instant::now();
        }
        changed || self.since.elapsed() < self.standstill
    }
}

/// A QEMU, and what was unplugged from it.
struct Machine {
    qmp: Qmp,
    /// Readable once somebody wants the command to end.
    stop: OwnedFd,
    /// When the guest must have released all devices.
    until: Instant,
    /// The devices that QEMU has asked the guest for. That cannot be taken back.
    pending: Vec<Plugged>,
    /// Those that the guest has released.
    absent: Vec<Plugged>,
}

impl Machine {
    /// Unplugs all devices.
    fn release(&mut self, devices: &[Plugged]) -> Result<()> {
        for device in devices {
            self.qmp.set_timeout(self.until.saturating_duration_since(Instant::now()));
            let outcome = self.qmp.run("device_del", json!({ "id": device.id }));
            let refused = outcome.as_ref().err().is_some_and(plug::is_refused);
            if !refused {
                // Without an answer, QEMU may carry it out nevertheless.
                self.pending.push(device.clone());
            }
            match outcome {
                Err(error) if !plug::under_way(&error) => {
                    return Err(error.context(format!("cannot unplug {:?}", device.id)));
                }
                _ => {}
            }
        }
        self.await_release(true)
    }

    /// Waits until the guest has released all that QEMU has asked it for.
    fn await_release(&mut self, may_stop: bool) -> Result<()> {
        while let Some(first) = self.pending.first() {
            let left = self.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "the guest has not released {:?} in time; a guest that has not booted yet, or \
                     has no PCI hotplug, cannot; --timeout gives it more time",
                    first.id
                );
            }
            if may_stop && is_readable(&self.stop) {
                bail!("interrupted");
            }
            self.qmp.set_timeout(left.min(LOOK));
            let Some(event) = self.qmp.event()? else { continue };
            let outcome = |device: &Plugged| plug::released(&event, &device.id);
            let Some(at) = self.pending.iter().position(|device| outcome(device).is_some()) else {
                continue;
            };
            let device = self.pending.remove(at);
            if let Some(Err(error)) = outcome(&device) {
                return Err(error.context(format!("cannot unplug {:?}", device.id)));
            }
            self.absent.push(device);
        }
        Ok(())
    }

    /// Runs a command of QEMU's monitor on the snapshot `name`. It says nothing if it succeeds.
    /// Once somebody wants the end, it does not wait longer, though QEMU may carry the command out.
    fn monitor(&mut self, command: &str, name: &str, disks: &[PathBuf]) -> Result<()> {
        if is_readable(&self.stop) {
            bail!("interrupted");
        }
        self.qmp.set_timeout(LOOK_FOR_PROGRESS);
        let line = json!({ "command-line": format!("{command} {name}") });
        let process = self.qmp.process();
        let since = Instant::now();
        let stop = &self.stop;
        let mut works = Works { process, disks, last: Vec::new(), since, standstill: STANDSTILL };
        let said =
            self.qmp.run_while("human-monitor-command", line, LOOK_FOR_PROGRESS, &mut || {
                !is_readable(stop) && works.goes_on()
            })?;
        let said = said.as_str().unwrap_or_default().trim();
        ensure!(said.is_empty(), "QEMU's {command}: {said}");
        Ok(())
    }

    /// Plugs in all that the guest has released, or will have released in time.
    fn put_back(&mut self, timeout: Duration) -> Result<()> {
        // An error is about one device, and the others may still come.
        for _ in 0..=self.pending.len() {
            if self.await_release(false).is_ok() {
                break;
            }
        }
        let mut lost = Vec::new();
        for Plugged { id, arguments, .. } in &self.absent {
            self.qmp.set_timeout(timeout);
            if let Err(error) = self.qmp.run("device_add", arguments.clone()) {
                let command = json!({ "execute": "device_add", "arguments": arguments });
                lost.push(format!(
                    "{id:?} could not be plugged in again: {error:#}; do it with QMP: {command}"
                ));
            }
        }
        for Plugged { id, arguments, .. } in &self.pending {
            let command = json!({ "execute": "device_add", "arguments": arguments });
            lost.push(format!(
                "{id:?} is still there, but goes when the guest releases it; then plug it in with \
                 QMP: {command}"
            ));
        }
        ensure!(lost.is_empty(), "{}", lost.join("; "));
        Ok(())
    }
}

fn is_readable(fd: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_works_while_its_process_or_its_disks_change() {
        let disk = tempfile::NamedTempFile::new().unwrap();
        let disks = [disk.path().to_owned()];
        let by = |process| Works {
            process,
            disks: &disks,
            last: Vec::new(),
            since: Instant::now(),
            standstill: Duration::ZERO,
        };
        let us = by(Some(std::process::id()));
        assert_eq!(us.look().len(), 2 + 3);
        let before = us.look()[..2].to_vec();
        while us.look()[..2] == before {}
        let mut without = by(None);
        assert!(without.goes_on());
        assert!(!without.goes_on(), "the same again, for too long");
        disk.as_file().set_modified(std::time::UNIX_EPOCH).unwrap();
        assert!(without.goes_on());
        without.standstill = Duration::from_secs(3600);
        assert!(without.goes_on(), "the same again, but not for long");
    }

    #[test]
    fn a_name_is_one_word_of_the_monitor_and_no_number() {
        for good in ["a", "before-update", "v1.2_x"] {
            assert_eq!(name(good).as_deref(), Ok(good));
        }
        assert_eq!(name("vbus-a").as_deref(), Ok("a"));
        for bad in ["", "1", "-a", "a b", "a\"", "a\n", "ä", &"a".repeat(NAME_MAX + 1)] {
            assert!(name(bad).is_err(), "{bad:?}");
        }
    }
}
