// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A function in a slot: a device of the bus, which is reached over vfio-user.
//!
//! Locks are taken in this order: the slot's lock, `state`, `client`, `doorbells`. A thread that
//! has the slot's lock takes no other lock than that of the doorbells. A slow server therefore
//! delays only those who access its own function.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::Shutdown;
use serde_json::{Value, json};
use vbus_kvm::{DoorbellKind, DoorbellRange, Doorbells, IntxIrqfd};
use vbus_pci_config::register::{COMMAND, STATUS, STATUS_INTERRUPT};
use vbus_pci_config::{ConfigSpace, MsixTable, read_pending_bits, touches};
use vfio_user_protocol::pci::{IRQ_INTX, IRQ_MSI, IRQ_MSIX, REGION_BAR0, REGION_CONFIG};
use vfio_user_protocol::{Client, ClientError};

use super::config::{config_space, in_use};
use super::description::Description;
use super::doorbells;
use super::error::PlugError;
use super::migration::{Ask, Migration};
use super::msi::MsiVectors;
use super::resources::Resources;
use super::saved::{SavedFunction, SavedPending};
use crate::ioapic::IntxSource;
use crate::lock::lock;

/// The value of [`Function::bar`] while BAR0 has no address.
const NOWHERE: u64 = u64::MAX;

/// Counters of the accesses that passed through the VMM's process.
#[derive(Default)]
pub(super) struct Counters {
    /// Reads and writes of BAR0.
    pub(super) reads: AtomicU64,
    pub(super) writes: AtomicU64,
    /// Doorbells that were rung by a message: by BAR0 (they count as writes, too) and by port.
    pub(super) doorbells: AtomicU64,
    /// Accesses to the configuration space.
    pub(super) config: AtomicU64,
}

/// A function that is plugged.
pub(super) struct Function {
    pub(super) name: String,
    pub(super) socket: PathBuf,
    description: Description,
    /// A duplicate of the connection's socket, for watching and for ending the connection.
    connection: OwnedFd,
    client: Mutex<Client>,
    /// The connection has failed or was ended.
    gone: AtomicBool,
    state: Mutex<State>,
    /// The address of BAR0 by its register and the command register, or [`NOWHERE`].
    bar: AtomicU64,
    in_use: AtomicBool,
    doorbells: Mutex<Doorbells>,
    /// Doorbells in BAR0 may end in the kernel.
    mmio: bool,
    intx: Option<Intx>,
    migration: Migration,
    pub(super) counters: Counters,
}

/// INTx: a level-triggered interrupt on a pin of the I/O APIC.
enum Intx {
    /// The I/O APIC is the kernel's.
    Kernel(IntxIrqfd),
    /// The I/O APIC is in this process.
    Here(IntxSource),
}

impl Intx {
    fn new(resources: &Resources, pin: u32) -> Result<Intx, PlugError> {
        Ok(match &resources.io_apic {
            None => Intx::Kernel(IntxIrqfd::new(resources.routes.clone(), pin)?),
            Some(io_apic) => Intx::Here(io_apic.source(pin)?),
        })
    }

    fn assert(&self) -> BorrowedFd<'_> {
        match self {
            Intx::Kernel(irqfd) => irqfd.assert(),
            Intx::Here(source) => source.assert(),
        }
    }

    fn ended(&self) -> BorrowedFd<'_> {
        match self {
            Intx::Kernel(irqfd) => irqfd.ended(),
            Intx::Here(source) => source.ended(),
        }
    }
}

struct State {
    config: ConfigSpace,
    table: MsixTable,
    msi: MsiVectors,
    msix: MsiVectors,
}

impl Function {
    /// Connects to the server at `socket`, checks its description, shares the guest's memory with
    /// it, and takes its doorbells and INTx. `slot` is the number of the slot, from 1 on. `pin`
    /// gives the I/O APIC's pin of an INTx.
    ///
    /// # Errors
    /// See [`PlugError`].
    pub(super) fn connect(
        name: &str,
        socket: &Path,
        slot: u8,
        resources: &Resources,
        pin: impl FnOnce(u8) -> u32,
    ) -> Result<Function, PlugError> {
        let mut client = Client::connect(socket)?;
        let description = Description::read(&mut client)?;
        for ram in &resources.ram {
            client.dma_map(ram.file.as_fd(), ram.file_offset, ram.base, ram.bytes)?;
        }
        let mut intx = None;
        if description.pin > 0 {
            let intx = intx.insert(Intx::new(resources, pin(description.pin - 1))?);
            client.connect_irqs(IRQ_INTX, 0, &[intx.assert()])?;
            client.connect_unmask(IRQ_INTX, 0, intx.ended())?;
        }
        let bells = doorbells::of_function(client.io_eventfds(REGION_BAR0)?, &description)?;
        let mut bells = Doorbells::new(resources.routes.vm().clone(), bells)?;
        let records = doorbells::connect(&mut bells, &description, slot, resources);
        let connection = client
            .as_fd()
            .try_clone_to_owned()
            .map_err(|_| ClientError::from(rustix::io::Errno::MFILE))?;
        let state = State {
            config: config_space(&description, &records),
            table: MsixTable::new(description.msix.map_or(0, |msix| msix.vectors)),
            msi: MsiVectors::new(IRQ_MSI, resources),
            msix: MsiVectors::new(IRQ_MSIX, resources),
        };
        Ok(Function {
            name: name.to_owned(),
            socket: socket.to_owned(),
            description,
            connection,
            client: Mutex::new(client),
            gone: AtomicBool::new(false),
            state: Mutex::new(state),
            bar: AtomicU64::new(NOWHERE),
            in_use: AtomicBool::new(false),
            doorbells: Mutex::new(bells),
            mmio: resources.backing.mmio,
            intx,
            migration: Migration::default(),
            counters: Counters::default(),
        })
    }

    /// The connection's socket. The caller may only watch it for its end.
    pub(super) fn connection(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    /// The source of INTx, if this process has to pass it on.
    pub(super) fn intx(&self) -> Option<&IntxSource> {
        match &self.intx {
            Some(Intx::Here(source)) => Some(source),
            _ => None,
        }
    }

    /// Whether the connection has failed.
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Ends the connection. The server releases the guest's memory, and the guest reads all ones.
    pub(super) fn close(&self) {
        self.gone.store(true, Ordering::Release);
        let _ = rustix::net::shutdown(&self.connection, Shutdown::Both);
        self.place_doorbells(None);
        let mut doorbells = lock(&self.doorbells);
        for kind in DoorbellKind::ALL {
            let _ = doorbells.set_range(kind, None);
        }
        drop(doorbells);
        let mut state = lock(&self.state);
        state.msi.clear();
        state.msix.clear();
    }

    /// Calls the server. Returns `None` if it refused or is gone.
    fn call<R>(&self, act: impl FnOnce(&mut Client) -> Result<R, ClientError>) -> Option<R> {
        self.ask(act).inspect_err(|text| tracing::debug!("{}: {text}", self.name)).ok()
    }

    /// Calls the server.
    ///
    /// # Errors
    /// It refused or is gone.
    fn ask<R>(&self, act: impl FnOnce(&mut Client) -> Result<R, ClientError>) -> Result<R, String> {
        if self.is_gone() {
            return Err("its server has gone".into());
        }
        // The lock must not be held when the connection is ended below.
        let done = act(&mut lock(&self.client));
        match done {
            Ok(value) => Ok(value),
            Err(e) if !e.is_final() => Err(e.to_string()),
            Err(e) => {
                // The thread that watches the socket does the rest.
                if !self.gone.swap(true, Ordering::AcqRel) {
                    tracing::warn!(
                        "{}: connection to {} lost: {e}",
                        self.name,
                        self.socket.display()
                    );
                }
                let _ = rustix::net::shutdown(&self.connection, Shutdown::Both);
                Err(e.to_string())
            }
        }
    }

    /// Puts the function and the server's part of it into the state after power-on, with BAR0 at
    /// `bar`.
    pub(super) fn reset(&self, bar: u32) {
        let mut state = lock(&self.state);
        state.config.reset();
        state.config.place_bar(0, bar);
        state.table.reset();
        self.follow(&mut state);
        self.call(Client::reset);
    }

    /// Tells the server that its INTx has ended. It belongs between a [`reset`](Self::reset) and
    /// the reset of the interrupt controllers: they forget an INTx that the guest has not ended, so
    /// the server must not wait for its end.
    pub(super) fn end_intx(&self) {
        if let Some(Intx::Kernel(irqfd)) = &self.intx {
            irqfd.end();
        }
    }

    /// Does a part of the migration of what the server keeps.
    ///
    /// # Errors
    /// The server refuses. The text names the device.
    pub(super) fn migrate<R>(
        &self,
        act: impl FnOnce(&Migration, Ask<'_>) -> Result<R, String>,
    ) -> Result<R, String> {
        act(&self.migration, &|act| self.ask(act)).map_err(|text| format!("{}: {text}", self.name))
    }

    /// Holds its interrupts back. When this returns, every interrupt that the server has signalled
    /// has arrived at the interrupt controllers, or is kept. No virtual CPU may run until
    /// [`go_on`](Self::go_on).
    ///
    /// # Errors
    /// KVM refuses.
    pub(super) fn pause(&self) -> Result<(), vbus_kvm::Error> {
        let mut state = lock(&self.state);
        state.msi.pause()?;
        state.msix.pause()
    }

    /// Ends a [`pause`](Self::pause).
    pub(super) fn go_on(&self) {
        let mut state = lock(&self.state);
        state.msi.go_on(&self.name);
        state.msix.go_on(&self.name);
    }

    /// The state of the function without what its server keeps. It must be paused.
    pub(super) fn save(&self) -> SavedFunction {
        let mut state = lock(&self.state);
        state.config.set_msi_pending(false);
        SavedFunction {
            name: self.name.clone(),
            bar: self.description.bar,
            doorbells: self.description.doorbell_count,
            config: state.config.bytes().to_vec(),
            table: state.table.bytes().to_vec(),
            pending: SavedPending { msi: state.msi.is_pending(0), msix: state.msix.pending() },
        }
    }

    /// Gives the function a saved state, and tells its server what it has to know of it: the
    /// command register and the interrupts.
    ///
    /// # Errors
    /// The state is that of another function. The text says what differs.
    pub(super) fn restore(&self, saved: &SavedFunction) -> Result<(), String> {
        let own = (&self.name, self.description.bar, self.description.doorbell_count);
        let (name, bar, doorbells) = (&saved.name, saved.bar, saved.doorbells);
        if (name, bar, doorbells) != own {
            return Err(format!(
                "the saved device {name} has {bar:#x} bytes of BAR0 and {doorbells} doorbells; {} \
                 has {:#x} and {}",
                own.0, own.1, own.2
            ));
        }
        let mut state = lock(&self.state);
        state.config.reset();
        state.config.set_msi_pending(false);
        if !state.config.restore(&saved.config) {
            let id = |bytes: &[u8]| match bytes {
                [a, b, c, d, ..] => format!("{b:02x}{a:02x}:{d:02x}{c:02x}"),
                _ => "no".into(),
            };
            let (was, is) = (id(&saved.config), id(state.config.bytes()));
            return Err(format!(
                "the saved device {name} is another one: its configuration space ({was}) is not \
                 that of the device here ({is})"
            ));
        }
        if !state.table.restore(&saved.table) {
            let (was, is) = (saved.table.len() / 16, state.table.vectors());
            return Err(format!("the saved device {name} has {was} vectors, and {is} here"));
        }
        let command = state.config.command().to_le_bytes();
        self.call(|client| client.region_write(REGION_CONFIG, COMMAND as u64, &command))
            .ok_or_else(|| format!("{name}: its server does not take the command register"))?;
        self.follow(&mut state);
        Ok(())
    }

    /// Sends the interrupts that were pending when the function was saved, and lets the server look
    /// whether it has a reason for INTx. The interrupt controllers must have their states.
    ///
    /// # Errors
    /// There are no such interrupts.
    pub(super) fn wake(&self, pending: &SavedPending) -> Result<(), String> {
        let state = lock(&self.state);
        let msi = !pending.msi || state.msi.signal(0);
        let mut vectors = pending.msix.iter();
        if !msi || !vectors.all(|vector| state.msix.signal(usize::from(*vector))) {
            return Err(format!("{}: an interrupt is pending that it has not enabled", self.name));
        }
        drop(state);
        match &self.intx {
            Some(Intx::Kernel(irqfd)) => irqfd.end(),
            Some(Intx::Here(source)) => source.end(),
            None => {}
        }
        Ok(())
    }

    /// Whether the guest has enabled memory accesses or DMA of the function.
    pub(super) fn in_use(&self) -> bool {
        self.in_use.load(Ordering::Acquire)
    }

    /// First address and length of BAR0, whether the root port passes its addresses on or not.
    pub(super) fn bar(&self) -> Option<(u64, u64)> {
        let at = self.bar.load(Ordering::Acquire);
        (at != NOWHERE).then_some((at, u64::from(self.description.bar)))
    }

    /// Moves the doorbells to BAR0 at address `at`, or disconnects them.
    pub(super) fn place_doorbells(&self, at: Option<u64>) {
        if !self.mmio {
            return;
        }
        let range = at.map(|at| DoorbellRange {
            base: at + u64::from(self.description.doorbells),
            stride: self.description.stride,
        });
        let mut doorbells = lock(&self.doorbells);
        if let Err(e) = doorbells.set_range(DoorbellKind::Mmio, range) {
            // The guest has put two functions at one address, or KVM has no more room. The
            // doorbells then come to user space.
            tracing::debug!("{}: doorbells by message: {e}", self.name);
        }
    }

    /// Whether the doorbells in BAR0 end in the kernel now.
    pub(super) fn doorbells_in_kernel(&self) -> bool {
        lock(&self.doorbells).range(DoorbellKind::Mmio).is_some()
    }

    /// Reads the configuration space.
    pub(super) fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.counters.config.fetch_add(1, Ordering::Relaxed);
        if self.is_gone() {
            return data.fill(0xff);
        }
        let mut state = lock(&self.state);
        let pending = state.msi.is_pending(0);
        state.config.set_msi_pending(pending);
        state.config.read(offset, data);
        if touches(offset, data.len(), STATUS, 1) {
            let mut status = [0; 2];
            match self.call(|client| client.region_read(REGION_CONFIG, STATUS as u64, &mut status))
            {
                Some(()) => data[STATUS - offset] |= status[0] & STATUS_INTERRUPT.to_le_bytes()[0],
                None if self.is_gone() => data.fill(0xff),
                None => {}
            }
        }
    }

    /// Writes the configuration space.
    pub(super) fn write_config(&self, offset: usize, data: &[u8]) {
        self.counters.config.fetch_add(1, Ordering::Relaxed);
        if self.is_gone() {
            return;
        }
        let mut state = lock(&self.state);
        let command = state.config.command();
        state.config.write(offset, data);
        if state.config.command() != command {
            // This waits for the server. When the guest goes on after it cleared Bus Master, the
            // function accesses no memory any more.
            let command = state.config.command().to_le_bytes();
            self.call(|client| client.region_write(REGION_CONFIG, COMMAND as u64, &command));
        }
        self.follow(&mut state);
    }

    /// Updates interrupts and BAR from the configuration space.
    fn follow(&self, state: &mut State) {
        self.bar.store(state.config.bar(0).unwrap_or(NOWHERE), Ordering::Release);
        self.in_use.store(in_use(&state.config), Ordering::Release);
        let State { config, table, msi, msix } = state;
        let call =
            |act: &mut dyn FnMut(&mut Client) -> Result<(), ClientError>| self.call(act).is_some();
        msi.follow(config.msi().as_slice(), &self.name, &call);
        let vectors: Vec<_> = match config.msix() {
            None => Vec::new(),
            Some(all_masked) => (0..table.vectors())
                .map(|index| {
                    let mut vector = table.message(index);
                    vector.masked |= all_masked;
                    vector
                })
                .collect(),
        };
        msix.follow(&vectors, &self.name, &call);
    }

    /// The part of the MSI-X structures that an access of BAR0 touches, if any.
    fn msix_part(&self, offset: u64, len: usize) -> Option<MsixPart> {
        let msix = self.description.msix?;
        let offset = usize::try_from(offset).ok()?;
        let within = |range: Range<u64>, part: fn(usize) -> MsixPart| {
            let first = usize::try_from(range.start).ok()?;
            let bytes = usize::try_from(range.end - range.start).ok()?;
            touches(offset, len, first, bytes)
                .then(|| offset.checked_sub(first).map_or(MsixPart::Edge, part))
        };
        within(msix.table_range(), MsixPart::Table)
            .or_else(|| within(msix.pending_range(), MsixPart::Pending))
    }

    /// Reads BAR0. The access is within BAR0, and `data` holds all ones before.
    pub(super) fn read_bar(&self, offset: u64, data: &mut [u8]) {
        self.counters.reads.fetch_add(1, Ordering::Relaxed);
        if self.is_gone() {
            return;
        }
        match self.msix_part(offset, data.len()) {
            Some(MsixPart::Edge) => data.fill(0),
            Some(MsixPart::Table(at)) => lock(&self.state).table.read(at, data),
            Some(MsixPart::Pending(at)) => {
                let state = lock(&self.state);
                read_pending_bits(at, data, |vector| state.msix.is_pending(vector));
            }
            None => {
                let mut bytes = [0; 8];
                let bytes = &mut bytes[..data.len()];
                if self.call(|client| client.region_read(REGION_BAR0, offset, bytes)).is_some() {
                    data.copy_from_slice(bytes);
                }
            }
        }
    }

    /// Writes BAR0. The access is within BAR0. This function does not wait for the server.
    pub(super) fn write_bar(&self, offset: u64, data: &[u8]) {
        self.counters.writes.fetch_add(1, Ordering::Relaxed);
        if self.is_gone() {
            return;
        }
        match self.msix_part(offset, data.len()) {
            Some(MsixPart::Table(at)) => {
                let mut state = lock(&self.state);
                if state.table.write(at, data).is_some() {
                    self.follow(&mut state);
                }
            }
            Some(MsixPart::Pending(_) | MsixPart::Edge) => {}
            None => {
                let first = u64::from(self.description.doorbells);
                let bytes =
                    u64::from(self.description.doorbell_count) * u64::from(self.description.stride);
                if offset.checked_sub(first).is_some_and(|at| at < bytes) {
                    self.counters.doorbells.fetch_add(1, Ordering::Relaxed);
                }
                self.call(|client| client.region_post(REGION_BAR0, offset, data));
            }
        }
    }

    /// Its interrupts, as this program has them. It does not ask the server, which may stand still:
    /// who looks for the reason must not cost the guest its device.
    pub(super) fn dump(&self) -> Value {
        // Readable, so not yet taken: by KVM or this process, and by the server.
        let waits = |fd: BorrowedFd<'_>| {
            let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
            let now = Timespec::default();
            poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::IN)
        };
        let intx = self.intx.as_ref().map(|intx| {
            json!({ "assert_waits": waits(intx.assert()), "end_waits": waits(intx.ended()) })
        });
        let state = lock(&self.state);
        json!({
            "device": self.name,
            "gone": self.is_gone(),
            "command": format!("{:#x}", state.config.command()),
            "intx": intx,
            "msi": state.config.msi().map(|vector| format!("{vector:?}")),
            "config_accesses": self.counters.config.load(Ordering::Relaxed),
        })
    }

    /// Rings a doorbell that came to user space.
    pub(super) fn ring(&self, number: u32) {
        if number >= self.description.doorbell_count {
            return;
        }
        self.counters.doorbells.fetch_add(1, Ordering::Relaxed);
        let offset = u64::from(self.description.doorbells)
            + u64::from(number) * u64::from(self.description.stride);
        self.call(|client| client.region_post(REGION_BAR0, offset, &1u32.to_le_bytes()));
    }
}

/// The MSI-X structure in which an access of BAR0 begins, and the offset in it.
enum MsixPart {
    Table(usize),
    Pending(usize),
    /// The access begins before a structure. It reads zeros and writes nothing.
    Edge,
}

impl Drop for Function {
    fn drop(&mut self) {
        self.close();
    }
}
