// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The sender's end: a running machine is copied into a file, or moved to another process.

use std::fmt;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;

use super::answer::{Answer, LOOK, expect, expect_running, explain};
use super::description::{Description, SavedDevice};
use super::dirty::Pages;
use super::frame::{DEVICE_BYTES_MAX, Kind, PAGE, PAGE_BYTES, PAGES_MAX, Writer};
use super::state::DevicesState;
use crate::components::Components;
use crate::events::{Parking, VmEvent};

/// How long the receiver may take nothing.
const TAKE: Duration = Duration::from_secs(30);
/// How long the receiver may take to make a machine, and to give it its state.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the machine may stand still while the last memory is sent, if nothing else is said.
pub const DOWN_TIME_MS: u64 = 100;
/// How many rounds there may be before the machine stops, if nothing else is said.
pub const ROUNDS: u32 = 10;

/// What to do with the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Plan {
    /// It is copied, and goes on. Without rounds it stands still for all of it.
    Copy(Option<Rounds>),
    /// It runs while its memory is sent, and then at the receiver.
    Move(Rounds),
}

/// A machine runs while its memory is sent, and again and again what it has changed meanwhile. Then
/// it stops, and the rest is sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rounds {
    /// The most rounds before it stops. There is at least one.
    pub(crate) most: u32,
    /// It stops as soon as the rest takes no longer than this.
    pub(crate) down_time: Duration,
}

impl Rounds {
    /// What is not given is as [`ROUNDS`] and [`DOWN_TIME_MS`] say.
    pub(crate) fn new(most: Option<u32>, down_time_ms: Option<u64>) -> Rounds {
        let down_time = Duration::from_millis(down_time_ms.unwrap_or(DOWN_TIME_MS));
        Rounds { most: most.unwrap_or(ROUNDS), down_time }
    }
}

/// What has been done.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Report {
    /// All bytes that were sent.
    pub(crate) bytes: u64,
    /// The pages that were sent, each as often as it was. Pages of zeros do not count.
    pub(crate) pages: u64,
    /// The rounds in which the machine ran.
    pub(crate) rounds: u32,
    /// How long the machine stood still, in milliseconds.
    pub(crate) down_time_ms: u64,
    /// The pages that were sent while the machine stood still, those of zeros too.
    pub(crate) last_pages: u64,
    /// How long that took, in milliseconds.
    pub(crate) last_ms: u64,
}

/// Tells somebody what happens, if there is something new, and fails if the work must end.
pub(crate) type Progress<'a> = &'a dyn Fn(Option<&str>) -> Result<()>;

/// Saves the machine to `to` as `plan` says. After an error it runs on as before.
///
/// If the machine runs at the receiver now, this process ends once the second value of the result
/// is dropped.
///
/// # Errors
/// The receiver refuses or has gone, the machine ends or resets meanwhile, or `progress` fails.
pub(crate) fn save(
    components: &Components,
    to: UnixStream,
    plan: Plan,
    progress: Progress<'_>,
) -> Result<(Report, Option<Sender<bool>>)> {
    let _frozen = components.pci.freeze().map_err(|text| anyhow!(text))?;
    let description = description(components);
    components.pci.check_savable().map_err(|text| anyhow!(text))?;
    to.set_write_timeout(Some(LOOK))?;
    let answers = to.try_clone()?;
    let writer = Writer::new(BufWriter::with_capacity(64 << 10, Outlet { to, progress }))?;
    let mut sender = Save { components, writer, progress, report: Report::default() };
    sender.writer.json(Kind::Machine, &description)?;
    let sent = match plan {
        Plan::Copy(None) => sender.copy(),
        Plan::Copy(Some(rounds)) => sender.copy_alive(rounds),
        Plan::Move(rounds) => {
            sender.send_over(&answers, rounds).map_err(|error| explain(&answers, error))
        }
    };
    sent.map(|moved| (Report { bytes: sender.writer.bytes(), ..sender.report }, moved))
}

/// The description of the machine.
fn description(components: &Components) -> Description {
    let device = |(name, slot)| SavedDevice { name, slot };
    let devices = components.pci.names().into_iter().map(device).collect();
    Description { devices, ..components.description.clone() }
}

/// The socket to the receiver, whose time-out is how often `progress` is asked while the receiver
/// takes nothing.
struct Outlet<'a> {
    to: UnixStream,
    progress: Progress<'a>,
}

impl Write for Outlet<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let until = Instant::now() + TAKE;
        loop {
            match self.to.write(bytes) {
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    (self.progress)(None).map_err(io::Error::other)?;
                    if Instant::now() > until {
                        let text = format!("the receiver takes nothing for {TAKE:?}");
                        return Err(io::Error::new(ErrorKind::TimedOut, text));
                    }
                }
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Save<'a, W: Write> {
    components: &'a Components,
    writer: Writer<W>,
    progress: Progress<'a>,
    report: Report,
}

impl<'a, W: Write> Save<'a, W> {
    fn copy(&mut self) -> Result<Option<Sender<bool>>> {
        let parked = Parked::new(self.components)?;
        let began = Instant::now();
        // The devices stop first: they write memory, too.
        self.pause()?;
        let mut pages = Pages::new(&self.components.ram.parts());
        for (address, bytes) in self.components.ram.data()? {
            pages.add(address, bytes);
        }
        self.last(&pages, true)?;
        self.state()?;
        self.writer.section(Kind::End, 0, &[])?;
        self.writer.flush()?;
        drop(parked);
        self.report.down_time_ms = millis(began.elapsed());
        Ok(None)
    }

    fn copy_alive(&mut self, rounds: Rounds) -> Result<Option<Sender<bool>>> {
        let mut log = Log::new(self.components)?;
        let pages = self.rounds(rounds, &mut log)?;
        let (parked, laps) = self.stop(pages, &mut log)?;
        drop(parked);
        self.stood_still(&laps);
        Ok(None)
    }

    fn send_over(&mut self, answers: &UnixStream, rounds: Rounds) -> Result<Option<Sender<bool>>> {
        self.writer.flush()?;
        let progress = self.progress;
        expect(answers, &Answer::Ready, PATIENCE, &|| progress(None))?;
        let mut log = Log::new(self.components)?;
        let pages = self.rounds(rounds, &mut log)?;
        let (parked, mut laps) = self.stop(pages, &mut log)?;
        // The last moment at which whoever has asked for this can call it off.
        expect(answers, &Answer::Loaded, PATIENCE, &|| progress(None))?;
        laps.end("the receiver loads it");
        progress(None)?;
        let go = self.writer.section(Kind::Go, 0, &[]).and_then(|()| self.writer.flush());
        if let Err(error) = go {
            // The buffer still has it, and must not send it once the machine goes on here.
            let _ = answers.shutdown(Shutdown::Both);
            return Err(error.into());
        }
        expect_running(answers, PATIENCE).context("the machine was not moved")?;
        laps.end("it goes on");
        self.stood_still(&laps);
        Ok(parked.give_up())
    }

    /// Sends the memory while the machine runs. Returns the pages that it has changed meanwhile.
    fn rounds(&mut self, rounds: Rounds, log: &mut Log<'_>) -> Result<Pages> {
        let ram = &self.components.ram;
        let mut pages = Pages::new(&ram.parts());
        for (address, bytes) in ram.data()? {
            pages.add(address, bytes);
        }
        loop {
            let (began, count) = (Instant::now(), pages.count());
            self.report.rounds += 1;
            let (round, mib) = (self.report.rounds, count * PAGE >> 20);
            (self.progress)(Some(&format!("round {round}: {mib} MiB")))?;
            self.pages(&pages, log.zeros)?;
            self.writer.flush()?;
            let took = began.elapsed();
            pages = self.changed(log)?;
            // As long as the last round took for each page.
            let rest = took.mul_f64(pages.count() as f64 / count.max(1) as f64);
            if rest <= rounds.down_time || round >= rounds.most {
                return Ok(pages);
            }
        }
    }

    /// Stops the machine, and sends `pages` and all that is left. Returns how long that took.
    fn stop(&mut self, mut pages: Pages, log: &mut Log<'_>) -> Result<(Parked<'a>, Laps)> {
        let rest = pages.count() * PAGE >> 10;
        (self.progress)(Some(&format!("stopping the machine: {rest} KiB are left")))?;
        let components = self.components;
        let parked = Parked::new(components)?;
        let mut laps = Laps::new();
        self.pause()?;
        laps.end("the devices stop");
        // What it and its devices have changed until they stopped.
        pages.add_all(&self.changed(log)?);
        laps.end("the log");
        self.last(&pages, log.zeros)?;
        laps.end("the last pages");
        self.state()?;
        self.writer.section(Kind::End, 0, &[])?;
        self.writer.flush()?;
        laps.end("the state");
        Ok((parked, laps))
    }

    /// Reports for how long the machine stood still.
    fn stood_still(&mut self, laps: &Laps) {
        self.report.down_time_ms = millis(laps.all());
        tracing::info!("the machine stood still for {} ms: {laps}", self.report.down_time_ms);
    }

    /// The pages that have changed since the last call. After a reset of the machine, these are all
    /// that it has, and the receiver's are made zero first.
    fn changed(&mut self, log: &mut Log<'_>) -> Result<Pages> {
        let ram = &self.components.ram;
        let loads = ram.loads();
        let mut pages = Pages::new(&ram.parts());
        pages.add_log(&log.take()?);
        let parts = ram.ranges();
        let devices = self.components.pci.take_log(&parts, &mut |at, len| pages.add(at, len));
        devices.map_err(|text| anyhow!(text))?;
        log.zeros = false;
        if loads != log.loads {
            log.loads = loads;
            for (address, bytes) in ram.parts() {
                self.zeros(address, bytes)?;
            }
            for (address, bytes) in ram.data()? {
                pages.add(address, bytes);
            }
        }
        Ok(pages)
    }

    /// Sends pages. `zeros`: the receiver has nothing but zeros there.
    fn pages(&mut self, pages: &Pages, zeros: bool) -> Result<()> {
        let mut buffer = vec![0; PAGES_MAX * PAGE_BYTES];
        for (address, count) in pages.runs() {
            (self.progress)(None)?;
            let bytes = &mut buffer[..count * PAGE_BYTES];
            self.components.ram.read(address, bytes)?;
            let mut at = address;
            for run in split(bytes) {
                let len = run.len() as u64;
                if is_zero(run) {
                    if !zeros {
                        self.zeros(at, len)?;
                    }
                } else {
                    self.writer.section(Kind::Pages, 0, &[&at.to_le_bytes(), run])?;
                    self.report.pages += len / PAGE;
                }
                at += len;
            }
        }
        Ok(())
    }

    /// Sends the pages of a machine that stands still, and counts them.
    fn last(&mut self, pages: &Pages, zeros: bool) -> Result<()> {
        let began = Instant::now();
        self.pages(pages, zeros)?;
        self.writer.flush()?;
        self.report.last_pages = pages.count();
        self.report.last_ms = millis(began.elapsed());
        Ok(())
    }

    fn zeros(&mut self, address: u64, bytes: u64) -> Result<()> {
        let pages = (bytes / PAGE).to_le_bytes();
        Ok(self.writer.section(Kind::Zeros, 0, &[&address.to_le_bytes(), &pages])?)
    }

    /// Stops the devices. The machine must be parked.
    fn pause(&self) -> Result<()> {
        self.components.pci.pause().map_err(|text| anyhow!(text))
    }

    /// Sends everything except memory. The machine must be parked, and its devices stopped.
    fn state(&mut self) -> Result<()> {
        let components = self.components;
        let clock = components.vm().get_clock().context("KVM does not tell its clock")?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let cpus = components.cpus.save()?;
        let chips = components.irqchip.save()?;
        let devices = DevicesState {
            clock_ns: clock.clock,
            stopped_at_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            power: components.power.save(),
            serial: components.serial.iter().map(|port| port.save()).collect(),
            io_apic: components.irqchip.io_apic().map(|io_apic| io_apic.save()),
            pci: components.pci.save(),
        };
        self.writer.json(Kind::Devices, &devices)?;
        let (writer, progress) = (&mut self.writer, self.progress);
        let sent = components.pci.read_devices(&mut |slot, bytes| {
            // A server says itself when there is no more, and may never do so.
            progress(None).map_err(|error| format!("{error:#}"))?;
            bytes.chunks(DEVICE_BYTES_MAX).try_for_each(|piece| {
                let sent = writer.section(Kind::Device, slot.into(), &[piece]);
                sent.map_err(|error| error.to_string())
            })
        });
        sent.map_err(|text| anyhow!(text))?;
        for (number, bytes) in chips {
            self.writer.section(Kind::Chip, number, &[&bytes])?;
        }
        for (number, state) in (0..).zip(cpus) {
            self.writer.section(Kind::Cpu, number, &[&state.encode()])?;
        }
        Ok(())
    }
}

/// How long the parts of some work took.
struct Laps {
    began: Instant,
    parts: Vec<(&'static str, Duration)>,
}

impl Laps {
    fn new() -> Laps {
        Laps { began: Instant::now(), parts: Vec::new() }
    }

    /// All the time so far.
    fn all(&self) -> Duration {
        self.began.elapsed()
    }

    /// Notes the part that ends now.
    fn end(&mut self, name: &'static str) {
        let before = self.parts.iter().map(|(_, took)| *took).sum();
        self.parts.push((name, self.all().saturating_sub(before)));
    }
}

impl fmt::Display for Laps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (name, took)) in self.parts.iter().enumerate() {
            let comma = if number == 0 { "" } else { ", " };
            write!(f, "{comma}{name} {} ms", millis(*took))?;
        }
        Ok(())
    }
}

/// The log of the pages that are written, while this value lives, and what the receiver knows.
struct Log<'a> {
    components: &'a Components,
    /// The receiver knows of so many loads of the memory.
    loads: u64,
    /// Nothing was sent yet, so that the receiver's memory is zero.
    zeros: bool,
}

impl Log<'_> {
    fn new(components: &Components) -> Result<Log<'_>> {
        let log = Log { components, loads: components.ram.loads(), zeros: true };
        components.ram.set_log(components.vm(), true)?;
        components.pci.begin_log().map_err(|text| anyhow!(text))?;
        Ok(log)
    }

    fn take(&self) -> Result<Vec<Vec<u64>>> {
        self.components.ram.take_log(self.components.vm())
    }
}

impl Drop for Log<'_> {
    fn drop(&mut self) {
        self.components.pci.end_log();
        if let Err(error) = self.components.ram.set_log(self.components.vm(), false) {
            tracing::warn!("{error:#}");
        }
    }
}

/// The machine stands still. Dropping this value lets it run on.
struct Parked<'a> {
    components: &'a Components,
    then: Option<Sender<bool>>,
}

impl Parked<'_> {
    fn new(components: &Components) -> Result<Parked<'_>> {
        let ((told, tell), (then, wait)) = (channel(), channel());
        let event = VmEvent::Park(Parking { told, then: wait });
        let sent = components.events.send(event);
        sent.ok().context("the machine is about to end")?;
        match tell.recv() {
            Ok(Ok(())) => Ok(Parked { components, then: Some(then) }),
            Ok(Err(text)) => bail!("{text}"),
            Err(_) => bail!("the machine is about to end"),
        }
    }

    /// The machine runs elsewhere. This process ends once the result is dropped.
    fn give_up(mut self) -> Option<Sender<bool>> {
        let then = self.then.take();
        let _ = then.as_ref().map(|then| then.send(true));
        then
    }
}

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        if let Some(then) = self.then.take() {
            self.components.pci.go_on();
            let _ = then.send(false);
        }
    }
}

/// Splits pages into runs of pages that are all zero, or all not.
fn split(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let first = is_zero(rest.get(..PAGE_BYTES)?);
        let count = rest.chunks(PAGE_BYTES).take_while(|page| is_zero(page) == first).count();
        let (run, more) = rest.split_at((count * PAGE_BYTES).min(rest.len()));
        rest = more;
        Some(run)
    })
}

fn is_zero(bytes: &[u8]) -> bool {
    // Comparing with zeros of the same length is a comparison of memory, the fastest there is.
    const ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
    bytes.chunks(ZEROS.len()).all(|piece| piece == &ZEROS[..piece.len()])
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A receiver that takes nothing does not keep the sender once it is called off.
    #[test]
    #[allow(clippy::unwrap_used, reason = "a test may panic")]
    fn a_sender_that_is_called_off_ends() {
        let (to, _receiver) = UnixStream::pair().unwrap();
        to.set_write_timeout(Some(Duration::from_millis(1))).unwrap();
        let asked = std::cell::Cell::new(0);
        let progress = |_: Option<&str>| {
            asked.set(asked.get() + 1);
            if asked.get() < 3 { Ok(()) } else { bail!("Ctrl-C") }
        };
        let mut outlet = Outlet { to, progress: &progress };
        let error = outlet.write_all(&vec![0; 64 << 20]).unwrap_err();
        assert_eq!((error.to_string(), asked.get()), ("Ctrl-C".into(), 3));
    }

    #[test]
    fn pages_are_split_by_what_they_hold() {
        let mut bytes = vec![0; 5 * PAGE_BYTES];
        let runs = |bytes: &[u8]| {
            let runs = split(bytes).map(|run| (run.len() / PAGE_BYTES, is_zero(run)));
            runs.collect::<Vec<_>>()
        };
        assert_eq!(runs(&bytes), [(5, true)]);
        bytes[PAGE_BYTES] = 1;
        bytes[3 * PAGE_BYTES - 1] = 1;
        assert_eq!(runs(&bytes), [(1, true), (2, false), (2, true)]);
        bytes[0] = 1;
        bytes[5 * PAGE_BYTES - 1] = 1;
        assert_eq!(runs(&bytes), [(3, false), (1, true), (1, false)]);
        assert_eq!(runs(&[]), []);
    }
}
