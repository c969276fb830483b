// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The receiver's end: a saved machine, from a file or from another process, is given to a machine
//! of the same description.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail, ensure};
use kvm_bindings::kvm_clock_data;
use rustix::event::{PollFd, PollFlags, poll};

use super::answer::{Answer, send};
use super::description::Description;
use super::frame::{FrameError, Kind, PAGE, PAGE_BYTES, Reader, Section};
use super::state::DevicesState;
use crate::components::Components;
use crate::memory::Ram;
use crate::pci::SavedPci;
use crate::vcpu_state::VcpuState;

/// How the guest's clocks go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// From the values that they had when the machine was saved, as if no time had passed.
    Saved,
    /// As if the machine had run on.
    Now,
}

/// A saved machine of which only the description was read.
pub struct SavedMachine {
    reader: Reader<BufReader<Source>>,
    description: Description,
}

/// Where a saved machine is read from.
enum Source {
    File(File),
    /// The socket of the sender. Reading ends when the second descriptor is readable.
    Sender(UnixStream, OwnedFd),
}

impl Read for Source {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Source::File(file) => file.read(bytes),
            Source::Sender(socket, end) => {
                wait(socket, end)?;
                socket.read(bytes)
            }
        }
    }
}

/// Waits until `socket` is readable.
///
/// # Errors
/// `end` is.
fn wait(socket: &impl AsFd, end: &OwnedFd) -> io::Result<()> {
    loop {
        let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::new(end, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            result => result?,
        };
        if !fds[1].revents().is_empty() {
            return Err(io::Error::other("ended by a signal"));
        }
        if !fds[0].revents().is_empty() {
            return Ok(());
        }
    }
}

impl SavedMachine {
    /// Opens a file of `vbus-vmm snapshot`.
    ///
    /// # Errors
    /// It cannot be read, or is no saved machine.
    pub fn open(path: &Path) -> Result<SavedMachine> {
        let name = || format!("cannot restore {}", path.display());
        let file = File::open(path).with_context(name)?;
        SavedMachine::read(Source::File(file)).with_context(name)
    }

    /// Waits at the socket `path`, which this makes and removes, for a machine that
    /// `vbus-vmm migrate` sends. The waiting ends when `end` is readable.
    ///
    /// # Errors
    /// The socket cannot be made, `end` is readable, or the sender sends no machine.
    pub fn receive(path: &Path, end: OwnedFd) -> Result<SavedMachine> {
        struct Remove<'a>(&'a Path);
        impl Drop for Remove<'_> {
            fn drop(&mut self) {
                let _ = std::fs::remove_file(self.0);
            }
        }
        let listener: UnixListener = crate::socket::listen(path)?;
        let remove = Remove(path);
        wait(&listener, &end)?;
        let (socket, _) = listener.accept().context("no sender can connect")?;
        drop((listener, remove));
        SavedMachine::read(Source::Sender(socket, end)).context("cannot receive a machine")
    }

    fn read(source: Source) -> Result<SavedMachine> {
        let mut reader = Reader::new(BufReader::with_capacity(64 << 10, source))?;
        let first = reader.next()?;
        if first.kind != Kind::Machine {
            return Err(FrameError::Damaged("it has no description".into()).into());
        }
        let description = first.json()?;
        Ok(SavedMachine { reader, description })
    }

    pub(crate) fn description(&self) -> &Description {
        &self.description
    }

    /// Checks the size of the machine against what the caller insists on.
    ///
    /// # Errors
    /// It has another number of virtual CPUs, or another size of memory (MiB). A sender learns of
    /// it.
    pub fn check_size(&self, cpus: Option<u32>, memory_mib: Option<u64>) -> Result<()> {
        self.description.check_size(cpus, memory_mib).inspect_err(|error| self.refuse(error))
    }

    /// Whether the machine comes from a running one.
    pub fn is_moved(&self) -> bool {
        matches!(self.source(), Source::Sender(..))
    }

    fn source(&self) -> &Source {
        self.reader.get_ref().get_ref()
    }

    /// Tells the sender why the machine cannot be received.
    pub(crate) fn refuse(&self, error: &anyhow::Error) {
        if let Source::Sender(socket, _) = self.source() {
            let _ = send(socket, &Answer::Error(format!("{error:#}")));
        }
    }

    fn answer(&self, answer: &Answer) -> Result<()> {
        match self.source() {
            Source::Sender(socket, _) => send(socket, answer).context("the sender has gone"),
            Source::File(_) => Ok(()),
        }
    }

    /// Gives the state to a machine of the same description, whose virtual CPUs are held. After
    /// that they may run, and must, since a sender has given the machine up.
    ///
    /// # Errors
    /// The state is damaged, is that of another machine, or KVM does not take it. The sender goes
    /// on then.
    pub(crate) fn load(&mut self, components: &Components, clock: Clock) -> Result<()> {
        components.pci.begin_restore().map_err(|text| anyhow!(text))?;
        self.answer(&Answer::Ready)?;
        let mut state = Collected::default();
        let cpus = self.description.cpus;
        loop {
            let section = self.reader.next()?;
            if section.kind == Kind::Device {
                let written = components.pci.write_device(section.number, section.content);
                written.map_err(|text| anyhow!(text))?;
            } else if state.take(&section, &components.ram, cpus)? {
                break;
            }
        }
        let pci = state.apply(components, self.description.tsc_khz, clock)?;
        self.answer(&Answer::Loaded)?;
        if self.is_moved() {
            let next = self.reader.next().context("the sender has kept the machine")?;
            let go = next.kind == Kind::Go;
            ensure!(go, FrameError::Damaged(format!("{:?} after its end", next.kind)));
        } else {
            self.reader.end()?;
        }
        // Until here the sender can go on, so the devices have stood still, too.
        components.pci.wake(&pci).map_err(|text| anyhow!(text))?;
        self.answer(&Answer::Running)
    }
}

/// What was read beside memory.
#[derive(Default)]
struct Collected {
    devices: Option<DevicesState>,
    chips: BTreeMap<u32, Vec<u8>>,
    cpus: BTreeMap<u32, VcpuState>,
}

impl Collected {
    /// Takes a section. Returns whether it is the end.
    fn take(&mut self, section: &Section<'_>, ram: &Ram, cpus: u32) -> Result<bool> {
        let damaged = |what: String| anyhow!(FrameError::Damaged(what));
        let number = section.number;
        match section.kind {
            Kind::Pages => {
                let (address, bytes) = section.word()?;
                let whole = bytes.len() % PAGE_BYTES == 0 && address % PAGE == 0;
                ensure!(whole && !bytes.is_empty(), damaged(format!("no pages at {address:#x}")));
                ram.write(address, bytes)?;
            }
            Kind::Zeros => {
                let (address, rest) = section.word()?;
                let pages = <[u8; 8]>::try_from(rest).ok().map(u64::from_le_bytes);
                let bytes = pages.and_then(|pages| pages.checked_mul(PAGE));
                let bytes = bytes.ok_or_else(|| damaged(format!("no zeros at {address:#x}")))?;
                ram.write_zeros(address, bytes)?;
            }
            Kind::Cpu => {
                let state = VcpuState::decode(section.content)
                    .with_context(|| format!("the state of virtual CPU {number}"))?;
                let fresh = number < cpus && self.cpus.insert(number, state).is_none();
                ensure!(fresh, damaged(format!("virtual CPU {number}")));
            }
            Kind::Chip => {
                let fresh = self.chips.insert(number, section.content.to_vec()).is_none();
                ensure!(fresh && number < 16, damaged(format!("interrupt controller {number}")));
            }
            Kind::Devices => {
                let fresh = self.devices.replace(section.json()?).is_none();
                ensure!(fresh, damaged("the devices are there twice".into()));
            }
            Kind::End => return Ok(true),
            Kind::Machine | Kind::Device | Kind::Go => {
                bail!(damaged(format!("{:?} where it cannot be", section.kind)))
            }
        }
        Ok(false)
    }

    /// Gives all of it to the machine, but lets no device run yet. Returns the state of PCI.
    fn apply(self, components: &Components, tsc_khz: u32, clock: Clock) -> Result<SavedPci> {
        let text = |text: String| anyhow!(text);
        let devices = self.devices.context("the state of the devices is missing")?;
        let ports = components.serial.len();
        ensure!(devices.serial.len() == ports, "there are the states of other serial ports");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let elapsed = match clock {
            Clock::Saved => Duration::ZERO,
            Clock::Now => now.saturating_sub(Duration::from_nanos(devices.stopped_at_ns)),
        };
        // A device may raise an interrupt when it gets its state. So the interrupt controllers come
        // after the devices, and the local APICs after those. Then whatever drives a pin does it
        // again, and what was pending is sent.
        for (port, saved) in components.serial.iter().zip(&devices.serial) {
            port.restore(saved)?;
        }
        components.pci.restore(&devices.pci).map_err(text)?;
        match (components.irqchip.io_apic(), &devices.io_apic) {
            (Some(io_apic), Some(saved)) => io_apic.restore(saved),
            (None, None) => {}
            _ => bail!("the state of the I/O APIC is missing, or too much"),
        }
        components.irqchip.restore(&self.chips)?;
        let mut cpus: Vec<_> = self.cpus.into_values().collect();
        components.cpus.restore(&mut cpus, tsc_khz, elapsed)?;
        let nanos = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        let clock = devices.clock_ns.saturating_add(nanos);
        let data = kvm_clock_data { clock, ..Default::default() };
        components.vm().set_clock(&data).context("KVM does not take the clock")?;
        components.power.restore(&devices.power);
        Ok(devices.pci)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::super::description::tests::description;
    use super::super::frame::Writer;
    use super::*;
    use crate::memory::RAM_MIN;

    /// Takes one section as a machine with 16 MiB and two virtual CPUs does.
    fn take(kind: Kind, number: u32, content: &[u8]) -> Result<bool> {
        let ram = Ram::new(RAM_MIN).unwrap();
        Collected::default().take(&Section { kind, number, content }, &ram, 2)
    }

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn memory_is_written_where_there_is_some() {
        let page = |address: u64, bytes: usize| [words(&[address]), vec![7; bytes]].concat();
        for good in [page(0, 4096), page(RAM_MIN - 4096, 4096), page(0xffff_f000, 4096)] {
            assert!(!take(Kind::Pages, 0, &good).unwrap());
        }
        for bad in [
            page(0, 0),
            page(0, 4095),
            page(1, 4096),
            page(RAM_MIN, 4096),
            page(RAM_MIN - 4096, 8192),
            page(0xffff_f000, 8192),
            page(u64::MAX - 4095, 4096),
            vec![0; 7],
        ] {
            take(Kind::Pages, 0, &bad).unwrap_err();
        }
        take(Kind::Zeros, 0, &words(&[0, RAM_MIN / PAGE])).unwrap();
        for bad in [
            words(&[0, RAM_MIN / PAGE + 1]),
            words(&[0, u64::MAX]),
            words(&[0, 0]),
            words(&[1, 1]),
            words(&[u64::MAX - 4095, 1]),
            words(&[0]),
            words(&[0, 1, 2]),
        ] {
            take(Kind::Zeros, 0, &bad).unwrap_err();
        }
    }

    #[test]
    fn what_has_no_place_is_refused() {
        let fault = |kind, number| take(kind, number, &[]).unwrap_err().to_string();
        for kind in [Kind::Machine, Kind::Go] {
            assert!(fault(kind, 0).contains("where it cannot be"), "{kind:?}");
        }
        assert!(fault(Kind::Chip, 16).contains("interrupt controller 16"));
        assert!(fault(Kind::Cpu, 1).contains("virtual CPU 1"));
        assert!(fault(Kind::Devices, 0).contains("Devices"));
        assert!(take(Kind::End, 0, &[]).unwrap());
        let ram = Ram::new(RAM_MIN).unwrap();
        let mut collected = Collected::default();
        let chip = Section { kind: Kind::Chip, number: 0, content: &[] };
        collected.take(&chip, &ram, 1).unwrap();
        collected.take(&chip, &ram, 1).unwrap_err();
    }

    #[test]
    fn a_file_begins_with_its_description() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("saved");
        let fault = |write: &dyn Fn(&mut Writer<File>)| {
            let file = File::create(&path).unwrap();
            write(&mut Writer::new(file).unwrap());
            let opened = SavedMachine::open(&path).map(|saved| saved.description().clone());
            opened.map_err(|error| format!("{error:#}"))
        };
        assert!(fault(&|_| {}).unwrap_err().contains("cut off"));
        let end = |writer: &mut Writer<File>| writer.section(Kind::End, 0, &[]).unwrap();
        assert!(fault(&end).unwrap_err().contains("no description"));
        let text = |writer: &mut Writer<File>| {
            writer.section(Kind::Machine, 0, &[b"{\"cpus\":"]).unwrap();
        };
        assert!(fault(&text).unwrap_err().contains("damaged"));
        let good = |writer: &mut Writer<File>| writer.json(Kind::Machine, &description()).unwrap();
        assert_eq!(fault(&good), Ok(description()));
    }

    #[test]
    fn waiting_for_a_machine_ends_with_a_signal() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let (end, signal) = UnixStream::pair().unwrap();
        drop(signal);
        let error = SavedMachine::receive(&path, end.into()).err().unwrap();
        assert!(format!("{error:#}").contains("ended by a signal"));
        assert!(!path.exists());
    }
}
