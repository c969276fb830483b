//! A function in a slot: a device of the bus, reached over vfio-user.
//!
//! Locks, in the order in which they may be taken: that of the slot, `state`, `client`; `doorbells`
//! last of all. A thread that has the slot's lock takes none but that of the doorbells, so that a
//! server that is slow holds up only those who access its own function.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::net::Shutdown;
use vbus_kvm::{DoorbellKind, DoorbellRange, Doorbells, IntxIrqfd};
use vbus_pci_config::register::{COMMAND, STATUS, STATUS_INTERRUPT};
use vbus_pci_config::{ConfigSpace, MsixTable, read_pending_bits, touches};
use vfio_user_protocol::pci::{IRQ_INTX, IRQ_MSI, IRQ_MSIX, REGION_BAR0, REGION_CONFIG};
use vfio_user_protocol::{Client, ClientError};

use super::config::{config_space, in_use};
use super::description::Description;
use super::msi::MsiVectors;
use super::{PlugError, Shared, doorbells, lock};
use crate::ioapic::Source;

/// What [`Function::bar`] holds while there is none.
const NOWHERE: u64 = u64::MAX;

/// What passed through the VMM's process although it need not, and what has to.
#[derive(Default)]
pub(super) struct Counters {
    /// Reads and writes of BAR0.
    pub(super) reads: AtomicU64,
    pub(super) writes: AtomicU64,
    /// Doorbells rung by a message: those of BAR0 (among the writes, too), and by port.
    pub(super) doorbells: AtomicU64,
    /// Accesses to the configuration space.
    pub(super) config: AtomicU64,
}

/// A function, plugged.
pub(super) struct Function {
    pub(super) name: String,
    pub(super) socket: PathBuf,
    description: Description,
    /// A duplicate of the connection's socket, to watch it, and to end the connection.
    connection: OwnedFd,
    client: Mutex<Client>,
    /// The connection has failed, or was ended.
    gone: AtomicBool,
    state: Mutex<State>,
    /// Where BAR0 is by its register and the command register, or [`NOWHERE`].
    bar: AtomicU64,
    in_use: AtomicBool,
    doorbells: Mutex<Doorbells>,
    /// Doorbells at an address end in the kernel.
    mmio: bool,
    intx: Option<Intx>,
    pub(super) counters: Counters,
}

/// INTx: a level on a pin of the I/O APIC, wherever that is.
enum Intx {
    Kernel(IntxIrqfd),
    Here(Source),
}

impl Intx {
    fn new(shared: &Shared, pin: u32) -> Result<Intx, PlugError> {
        Ok(match &shared.io_apic {
            None => Intx::Kernel(IntxIrqfd::new(shared.routes.clone(), pin)?),
            Some(chip) => Intx::Here(chip.source(pin)?),
        })
    }

    fn assert(&self) -> BorrowedFd<'_> {
        match self {
            Intx::Kernel(level) => level.assert(),
            Intx::Here(source) => source.assert(),
        }
    }

    fn ended(&self) -> BorrowedFd<'_> {
        match self {
            Intx::Kernel(level) => level.ended(),
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
    /// Connects to the server at `socket`, shows it the guest's memory and takes its doorbells and
    /// INTx. `slot` is the number of the slot, from 1 on, `pin` gives the pin of an INTx.
    pub(super) fn connect(
        name: &str,
        socket: &Path,
        slot: u8,
        shared: &Shared,
        pin: impl FnOnce(u8) -> u32,
    ) -> Result<Function, PlugError> {
        let mut client = Client::connect(socket)?;
        let description = Description::read(&mut client)?;
        for ram in &shared.ram {
            client.dma_map(ram.file.as_fd(), ram.file_offset, ram.base, ram.bytes)?;
        }
        let mut intx = None;
        if description.pin > 0 {
            let intx = intx.insert(Intx::new(shared, pin(description.pin - 1))?);
            client.connect_irqs(IRQ_INTX, 0, &[intx.assert()])?;
            client.connect_unmask(IRQ_INTX, 0, intx.ended())?;
        }
        let bells = doorbells::of_function(client.io_eventfds(REGION_BAR0)?, &description)?;
        let mut bells = Doorbells::new(shared.routes.vm().clone(), bells)?;
        let records = doorbells::back(&mut bells, &description, slot, shared);
        let connection = client
            .as_fd()
            .try_clone_to_owned()
            .map_err(|_| ClientError::from(rustix::io::Errno::MFILE))?;
        let state = State {
            config: config_space(&description, &records),
            table: MsixTable::new(description.msix.map_or(0, |msix| msix.vectors)),
            msi: MsiVectors::new(IRQ_MSI, shared),
            msix: MsiVectors::new(IRQ_MSIX, shared),
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
            mmio: shared.backing.mmio,
            intx,
            counters: Counters::default(),
        })
    }

    /// The connection's socket, to be watched for its end and for nothing else.
    pub(super) fn connection(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    /// INTx, if this process has to pass it on.
    pub(super) fn intx(&self) -> Option<&Source> {
        match &self.intx {
            Some(Intx::Here(source)) => Some(source),
            _ => None,
        }
    }

    /// Whether the connection has failed.
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Ends the connection. The server lets go of the guest's memory, the guest reads all ones.
    pub(super) fn close(&self) {
        self.gone.store(true, Ordering::Release);
        let _ = rustix::net::shutdown(&self.connection, Shutdown::Both);
        self.put(None);
        let mut doorbells = lock(&self.doorbells);
        for kind in DoorbellKind::ALL {
            let _ = doorbells.set_range(kind, None);
        }
        drop(doorbells);
        let mut state = lock(&self.state);
        state.msi.clear();
        state.msix.clear();
    }

    /// Calls the server. `None`: it refused, or is gone.
    fn call<R>(&self, act: impl FnOnce(&mut Client) -> Result<R, ClientError>) -> Option<R> {
        if self.is_gone() {
            return None;
        }
        match act(&mut lock(&self.client)) {
            Ok(value) => Some(value),
            Err(e) if !e.is_final() => {
                tracing::debug!("{}: {e}", self.name);
                None
            }
            Err(e) => {
                // Whoever watches the socket does the rest.
                if !self.gone.swap(true, Ordering::AcqRel) {
                    tracing::warn!(
                        "{}: connection to {} lost: {e}",
                        self.name,
                        self.socket.display()
                    );
                }
                let _ = rustix::net::shutdown(&self.connection, Shutdown::Both);
                None
            }
        }
    }

    /// Back to the state after power-on, with BAR0 at `bar`; the server's function likewise.
    pub(super) fn reset(&self, bar: u32) {
        let mut state = lock(&self.state);
        state.config.reset();
        state.config.place_bar(0, bar);
        state.table.reset();
        self.follow(&mut state);
        self.call(Client::reset);
    }

    /// After a [`reset`](Self::reset), and before one of the interrupt controllers: an INTx that
    /// the guest has not ended is forgotten there, and so the server must not wait for its end.
    pub(super) fn end_intx(&self) {
        if let Some(Intx::Kernel(level)) = &self.intx {
            level.end();
        }
    }

    /// The guest has enabled something of the function.
    pub(super) fn in_use(&self) -> bool {
        self.in_use.load(Ordering::Acquire)
    }

    /// Where BAR0 would be, if the port passes it on: first address and length.
    pub(super) fn bar(&self) -> Option<(u64, u64)> {
        let at = self.bar.load(Ordering::Acquire);
        (at != NOWHERE).then_some((at, u64::from(self.description.bar)))
    }

    /// BAR0 answers from `at` on now: the doorbells follow.
    pub(super) fn put(&self, at: Option<u64>) {
        if !self.mmio {
            return;
        }
        let place = at.map(|at| DoorbellRange {
            base: at + u64::from(self.description.doorbells),
            stride: self.description.stride,
        });
        let mut doorbells = lock(&self.doorbells);
        if let Err(e) = doorbells.set_range(DoorbellKind::Mmio, place) {
            // The guest has put two things at one address, or KVM has no more room: what is rung
            // comes to user space.
            tracing::debug!("{}: doorbells by message: {e}", self.name);
        }
    }

    /// Whether the doorbells at an address end in the kernel now.
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
            // Waited for: a function that was taken Bus Master from touches no memory any more when
            // the guest goes on.
            let command = state.config.command().to_le_bytes();
            self.call(|client| client.region_write(REGION_CONFIG, COMMAND as u64, &command));
        }
        self.follow(&mut state);
    }

    /// Makes interrupts and BAR what the configuration space says.
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

    /// Which part of the MSI-X structures an access of BAR0 touches, if any.
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

    /// Reads BAR0; `data` lies within it, and holds all ones before.
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

    /// Writes BAR0; `data` lies within it. It does not wait until the server has done it.
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

/// What of MSI-X an access of BAR0 begins in, and the offset there.
enum MsixPart {
    Table(usize),
    Pending(usize),
    /// It begins before: it reads zeros, and writes nothing.
    Edge,
}

impl Drop for Function {
    fn drop(&mut self) {
        self.close();
    }
}
