// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Virtio over PCI (VIRTIO 1.3, section 4.1): a PCI function in front of a [`VirtioDevice`].
//!
//! The function is a modern one. It has no I/O ports and no legacy registers. BAR0 has these parts:
//!
//! | offset | part |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x1000 | ISR status |
//! | 0x2000 | device configuration |
//! | 0x3000 | notify area, 4 bytes for each queue |
//! | 0x4000 | table of MSI-X |
//! | 0x5000 | pending bits of MSI-X |
//!
//! No part can be mapped: a region that can makes QEMU wait for each write to the function. A VMM
//! that asks for eventfds gets one for each queue's place in the notify area, and then the kernel
//! takes the doorbells.

mod kept;
mod registers;

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_core::{ConnectionState, DeviceState, Endpoint, ErrorCode, Host, lock, state};
use vbus_pci::vbus_pci_config::{
    Builder, CONVENTIONAL_BYTES, ConfigSpace, EXPRESS_BYTES, Header, MsixLayout,
};
use vbus_pci::{BarHandler, Interrupts, IoEventFd, Options, PciFunction};

use crate::device::{
    Call, Driver, Enabled, Kind, SavedSession, Session, Transport, Unsaved, VirtioDevice, status,
};
use crate::queue::{BadLayout, BadState, Chain, Layout, Position, Queue, RingFeatures};
use kept::Kept;
use registers::{NO_VECTOR, Registers, Request, at as field};

const VENDOR: u16 = 0x1af4;
/// The PCI device id of virtio device 0.
const FIRST_DEVICE: u16 = 0x1040;
/// Drivers of other systems look for the subsystem of QEMU.
const SUBSYSTEM: u16 = 0x1100;

/// Offsets in BAR0, and sizes.
mod bar {
    pub const SIZE: u32 = 0x8000;
    pub const COMMON: u64 = 0x0000;
    pub const ISR: u64 = 0x1000;
    pub const DEVICE: u64 = 0x2000;
    pub const NOTIFY: u64 = 0x3000;
    pub const MSIX_TABLE: u64 = 0x4000;
    pub const MSIX_PENDING: u64 = 0x5000;
    /// Bytes of the notify area for each queue.
    pub const NOTIFY_STRIDE: u64 = 4;
    /// The most vectors, and queues, that fit.
    pub const VECTORS_MAX: u16 = 256;
}

/// Offsets of the capabilities.
mod at {
    pub const COMMON: u8 = 0x40;
    pub const ISR: u8 = 0x50;
    pub const DEVICE: u8 = 0x60;
    pub const NOTIFY: u8 = 0x70;
    pub const WINDOW: u8 = 0x84;
    pub const MSIX: u8 = 0x98;
    pub const EXPRESS: u8 = 0xa4;
}

/// How far the configuration's generation may go on after a state that outlasts the process.
const GENERATIONS: u8 = 1 << 7;

/// Bits of the ISR status.
mod isr {
    pub const QUEUE: u8 = 1;
    pub const CONFIG: u8 = 2;
}

/// Makes the PCI function of a virtio device. The driver reaches the memory and the doorbells of
/// `endpoint`; nobody opens the endpoint itself. `options.msix` gives each queue a vector of its
/// own, and one to the configuration. Without it the driver has INTx alone, and reads the ISR
/// status for each interrupt.
///
/// The function ends the device's session when it is reset, disconnected or dropped. It does not
/// handle the peer's memory: the connector maps and unmaps that memory at the endpoint.
///
/// # Panics
/// If the device has more than 255 queues.
pub fn function(
    device: Arc<dyn VirtioDevice>,
    endpoint: Arc<Endpoint>,
    options: Options,
) -> PciFunction {
    let kind = device.kind();
    assert!(kind.queues < bar::VECTORS_MAX, "{} queues", kind.queues);
    let space = config_space(&kind, device.config_bytes(), options);
    let interrupts = Arc::new(Interrupts::of(&space));
    let (executor, worker) = (endpoint.executor().clone(), endpoint.worker());
    let vectors = space.msix_layout().map_or(0, |layout| layout.vectors);
    let shared = Arc::new(Shared {
        endpoint,
        interrupts: interrupts.clone(),
        isr: Mutex::new(0),
        config: Mutex::new((vec![0; device.config_bytes()], 0)),
        config_vector: AtomicU16::new(NO_VECTOR),
        queue_vectors: (0..kind.queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        started: AtomicBool::new(false),
        needs_reset: AtomicBool::new(false),
        running: Mutex::default(),
    });
    let transport: Arc<dyn Transport> = shared.clone();
    device.attach(Arc::downgrade(&transport));
    let registers = Registers::new(&kind);
    let handler =
        VirtioFunction { device, kind, vectors, registers, shared, kept: None, of_former: false };
    let endpoint = handler.shared.endpoint.clone();
    PciFunction::new(space, interrupts, executor, worker)
        .of_device(&endpoint)
        .with_bar(0, Box::new(handler))
        .with_window(usize::from(at::WINDOW))
}

fn config_space(kind: &Kind, config_bytes: usize, options: Options) -> ConfigSpace {
    let header = Header {
        vendor: VENDOR,
        device: FIRST_DEVICE + kind.id,
        revision: 1,
        class: kind.pci_class,
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
        interrupt_pin: 1,
    };
    let notify_bytes = u64::from(kind.queues) * bar::NOTIFY_STRIDE;
    let stride = u32::try_from(bar::NOTIFY_STRIDE).unwrap_or(0).to_le_bytes();
    let bytes = if options.express { EXPRESS_BYTES } else { CONVENTIONAL_BYTES };
    let mut builder = Builder::new(bytes, &header)
        .bar(0, bar::SIZE)
        .vendor(at::COMMON, &part(1, bar::COMMON, registers::BYTES as u64, &[]))
        .vendor(at::ISR, &part(3, bar::ISR, 1, &[]))
        .vendor(at::DEVICE, &part(4, bar::DEVICE, config_bytes as u64, &[]))
        .vendor(at::NOTIFY, &part(2, bar::NOTIFY, notify_bytes, &stride))
        .window(at::WINDOW, &part(5, 0, 0, &[0; 4]));
    if options.msix {
        let layout = MsixLayout {
            vectors: kind.queues + 1,
            table_bar: 0,
            table: u32::try_from(bar::MSIX_TABLE).unwrap_or(0),
            pending_bar: 0,
            pending: u32::try_from(bar::MSIX_PENDING).unwrap_or(0),
        };
        builder = builder.msix(at::MSIX, layout);
    }
    if options.express {
        builder = builder.express(at::EXPRESS);
    }
    builder.build()
}

/// The content of the capability for a part of BAR0, after its id and link.
fn part(kind: u8, offset: u64, bytes: u64, more: &[u8]) -> Vec<u8> {
    let mut content = vec![0, kind, 0, 0, 0, 0];
    for value in [offset, bytes] {
        content.extend_from_slice(&u32::try_from(value).unwrap_or(0).to_le_bytes());
    }
    content.extend_from_slice(more);
    content
}

/// What the device's tasks and the function share.
struct Shared {
    endpoint: Arc<Endpoint>,
    interrupts: Arc<Interrupts>,
    /// The ISR status. Locked while INTx changes, so that a read takes both together.
    isr: Mutex<u8>,
    /// The device configuration and its generation.
    config: Mutex<(Vec<u8>, u8)>,
    /// The vectors that the driver chose. They depend on no other memory, so all accesses are
    /// relaxed: an interrupt during a change may still go to the former vector.
    config_vector: AtomicU16,
    queue_vectors: Box<[AtomicU16]>,
    /// Whether the driver has set DRIVER_OK. Relaxed: see `config_changed`.
    started: AtomicBool,
    /// Whether the device has met an error. Relaxed: whoever sets it interrupts the driver
    /// afterwards, or is the one who reads it.
    needs_reset: AtomicBool,
    running: Mutex<Running>,
}

#[derive(Default)]
struct Running {
    /// Number of sessions so far. A task of an earlier one may still report an error.
    number: u64,
    session: Option<Box<dyn Session>>,
}

impl Shared {
    fn host(&self) -> &Host {
        self.endpoint.host()
    }

    /// Interrupts the driver: with `vector` if it uses messages, with INTx otherwise.
    fn interrupt(&self, bit: u8, vector: &AtomicU16) {
        if bit == isr::CONFIG {
            *lock(&self.isr) |= bit;
        }
        let vector = vector.load(Ordering::Relaxed);
        if !self.interrupts.send_message((vector != NO_VECTOR).then_some(vector)) {
            let mut isr = lock(&self.isr);
            *isr |= bit;
            self.interrupts.raise_intx();
        }
    }

    fn interrupt_config(&self) {
        if self.started.load(Ordering::Relaxed) {
            self.host().counters().interrupts.one();
            self.interrupt(isr::CONFIG, &self.config_vector);
        }
    }

    /// The driver reads the ISR status, which ends INTx.
    fn take_isr(&self) -> u8 {
        let mut isr = lock(&self.isr);
        self.interrupts.acknowledge();
        std::mem::take(&mut *isr)
    }

    /// Ends the session, if there is one. Returns whether there was one. Afterwards nothing touches
    /// the driver's memory.
    fn end(&self, running: &mut Running) -> bool {
        self.host().doorbells().detach_all();
        running.session.take().is_some()
    }

    /// Session `number` has met an error.
    fn fail(&self, number: u64, code: ErrorCode) {
        let mut running = lock(&self.running);
        if running.number != number || !self.end(&mut running) {
            return;
        }
        self.broken(&code.into());
        drop(running);
        self.interrupt_config();
    }

    /// The device needs a reset.
    fn broken(&self, fault: &Fault) {
        let code = fault.code();
        let device = self.host().name();
        self.needs_reset.store(true, Ordering::Relaxed);
        // A driver that leaves may give its memory back before the device is told.
        if self.host().has_left() {
            tracing::info!(device, "the driver has left");
            self.host().set_state(ConnectionState::Broken(ErrorCode::NOT_OPEN));
            return;
        }
        self.host().counters().broken.one();
        self.host().set_state(ConnectionState::Broken(code));
        if self.host().memory().is_lost() {
            tracing::debug!(device, "{}", vbus_core::MEMORY_LOST);
        } else {
            tracing::warn!(device, error = %fault, "a fault ends the session; the device needs a reset");
        }
    }
}

/// What ends a session.
#[derive(Debug, thiserror::Error)]
enum Fault {
    /// The device or the driver has failed.
    #[error("{0}")]
    Failed(#[from] ErrorCode),
    /// The driver has enabled a queue that cannot be one.
    #[error("queue {0} cannot be used: {1}")]
    Layout(u16, BadLayout),
    /// What is kept of a queue makes no sense.
    #[error("queue {0} cannot be taken up: {1}")]
    Kept(u16, BadState),
}

impl Fault {
    fn code(&self) -> ErrorCode {
        match self {
            Fault::Failed(code) => *code,
            Fault::Layout(..) => ErrorCode::BAD_LAYOUT,
            Fault::Kept(..) => ErrorCode::CORRUPT,
        }
    }
}

impl Transport for Shared {
    fn queue_used(&self, index: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(index)) {
            self.interrupt(isr::QUEUE, vector);
        }
    }

    fn queue_eventfd(&self, index: u16) -> Option<OwnedFd> {
        let vector = self.queue_vectors.get(usize::from(index))?.load(Ordering::Relaxed);
        self.interrupts.message_eventfd(vector)
    }

    fn config_changed(&self, config: Vec<u8>, tell: bool) {
        let mut current = lock(&self.config);
        if current.0 == config {
            return;
        }
        *current = (config, current.1.wrapping_add(1));
        drop(current);
        // A driver that sets DRIVER_OK just now reads the new configuration afterwards, so it needs
        // no interrupt.
        if tell {
            self.interrupt_config();
        }
    }
}

/// BAR0 of a virtio function.
struct VirtioFunction {
    device: Arc<dyn VirtioDevice>,
    kind: Kind,
    /// Vectors of MSI-X; 0: the function has none.
    vectors: u16,
    registers: Registers,
    shared: Arc<Shared>,
    /// What outlives this process, if the bus has or had a keeper.
    kept: Option<Arc<Kept>>,
    /// `kept` is that of a former process, which was killed: the next state that is restored is
    /// older.
    of_former: bool,
}

impl VirtioFunction {
    fn read_common(&self, offset: u64, data: &mut [u8]) {
        let generation = lock(&self.shared.config).1;
        let needs_reset = self.shared.needs_reset.load(Ordering::Relaxed);
        let extra = if needs_reset { status::NEEDS_RESET } else { 0 };
        self.registers.read(&self.kind, offset, data, generation, extra);
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let before = self.registers.status();
        let request = self.registers.write(&self.kind, self.vectors, offset, data);
        if request != Request::Nothing || before != self.registers.status() {
            tracing::debug!(
                device = self.shared.host().name(),
                status = self.registers.status(),
                ?request,
                "common configuration"
            );
        }
        match request {
            Request::Nothing => {}
            Request::Reset => drop(self.forget_driver()),
            Request::Start => self.start(),
            Request::Enable(index) => self.enable(index),
            Request::Disable(index) => {
                self.set_vector(index, NO_VECTOR);
                self.shared.host().doorbells().detach(usize::from(index));
                if let Some(session) = &mut lock(&self.shared.running).session {
                    let _ = session.disable(index); // The driver begins anew.
                }
                if let Some(kept) = &self.kept {
                    kept.settle(index);
                }
            }
            Request::ConfigVector(vector) => {
                self.shared.config_vector.store(vector, Ordering::Relaxed);
            }
            Request::QueueVector(index, vector) => {
                self.set_vector(index, vector);
                self.interrupts_changed();
            }
        }
    }

    fn set_vector(&self, index: u16, vector: u16) {
        if let Some(slot) = self.shared.queue_vectors.get(usize::from(index)) {
            slot.store(vector, Ordering::Relaxed);
        }
    }

    /// The driver has set DRIVER_OK: the device begins, with the queues that are enabled.
    fn start(&mut self) {
        let shared = &self.shared;
        let host = shared.host();
        let mut running = lock(&shared.running);
        let driver = self.driver(&mut running);
        let begun = self.device.clone().start(driver).map_err(Fault::from);
        let begun = begun.and_then(|mut session| {
            self.record(&mut *session);
            for (index, layout) in self.registers.enabled() {
                self.give(&mut *session, index, layout)?;
            }
            Ok(session)
        });
        shared.started.store(true, Ordering::Relaxed);
        match begun {
            Ok(session) => {
                running.session = Some(session);
                host.counters().opens.one();
                host.set_state(ConnectionState::Open);
                tracing::info!(
                    device = host.name(),
                    features = format_args!("{:#x}", self.registers.features()),
                    "a driver has started"
                );
            }
            Err(fault) => {
                shared.end(&mut running);
                shared.broken(&fault);
                drop(running);
                shared.interrupt_config();
            }
        }
    }

    /// What the next session gets.
    fn driver(&self, running: &mut Running) -> Driver {
        running.number += 1;
        let (number, weak) = (running.number, Arc::downgrade(&self.shared));
        Driver::new(self.shared.host(), self.registers.features(), move |code| {
            if let Some(shared) = weak.upgrade() {
                shared.fail(number, code);
            }
        })
    }

    /// Makes the session of `saved`, with the queues of the registers. `of_former`: what is newer
    /// is in the memory of a former process.
    fn resume_session(
        &self,
        running: &mut Running,
        saved: &SavedSession,
        of_former: bool,
    ) -> Result<(), String> {
        let driver = self.driver(running);
        let mut own = saved.own.clone();
        if let Some(kept) = self.kept.as_ref().filter(|_| of_former) {
            // The driver may have chosen more since the state was saved.
            let choices = kept.choices()?.unwrap_or_default();
            let own = own.as_object_mut().ok_or("the session's own state is no object")?;
            let choices = choices.as_object().into_iter().flatten();
            own.extend(choices.map(|(name, choice)| (name.clone(), choice.clone())));
        }
        let mut session = self.device.clone().restart(driver, &own)?;
        self.record(&mut *session);
        let features = RingFeatures::of(self.registers.features());
        let mut states = saved.queues.clone();
        for (index, layout) in self.registers.enabled() {
            let failed = |error: &dyn std::fmt::Display| format!("queue {index}: {error}");
            let (queue, taken) = match states.remove(&index) {
                _ if of_former => match self.take_up(index, layout) {
                    Some(Ok(taken_up)) => taken_up,
                    Some(Err(error)) => return Err(failed(&error)),
                    // The driver was stopping it, and does that now.
                    None => continue,
                },
                Some(state) => {
                    Queue::resume(layout, features, &state).map_err(|error| failed(&error))?
                }
                // The session had no use for it.
                None => {
                    let queue = Queue::new(layout, features).map_err(|error| failed(&error))?;
                    (queue, Vec::new())
                }
            };
            let again = session.enable_again(index, self.enabled(index, queue), taken);
            again.map_err(|error| failed(&error))?;
        }
        if let Some((index, _)) = states.first_key_value() {
            return Err(format!("queue {index} is not enabled"));
        }
        session.restored()?;
        running.session = Some(session);
        Ok(())
    }

    /// Queue `index` where the process that was killed left it. `None`: it had left it.
    fn take_up(&self, index: u16, layout: Layout) -> Option<Result<(Queue, Vec<Chain>), BadState>> {
        let kept = self.kept.as_ref().filter(|kept| kept.is_in_use(index))?;
        let features = RingFeatures::of(self.registers.features());
        let base = Position::start(layout.format);
        let view = self.shared.host().memory().view();
        Some(kept.take_up(index, layout, features, base, &view))
    }

    /// Lets a session write what outlives this process.
    fn record(&self, session: &mut dyn Session) {
        if let Some(kept) = self.kept.clone() {
            session.record_with(Arc::new(move |choices| kept.choose(choices)));
        }
    }

    /// Keeps what outlives this process, from now on.
    fn keep(&mut self, running: &mut Running) -> Result<(), String> {
        if self.kept.is_some() {
            return Ok(());
        }
        let memory = self.shared.host().memory().clone();
        let kept = Arc::new(Kept::new(&self.kind, memory.beside())?);
        self.kept = Some(kept.clone());
        let Some(session) = &mut running.session else { return Ok(()) };
        self.record(&mut **session);
        let features = RingFeatures::of(self.registers.features());
        let view = memory.view();
        session.retake(&mut |index, layout, base| {
            let taken_up = kept.take_up(index, layout, features, base, &view);
            taken_up.map(|(queue, _)| queue).map_err(|_| ErrorCode::CORRUPT)
        });
        Ok(())
    }

    /// The driver has enabled queue `index`. The device gets it now if it has started.
    fn enable(&mut self, index: u16) {
        let Some(layout) = self.registers.layout(index) else { return };
        let mut running = lock(&self.shared.running);
        let Some(session) = &mut running.session else { return };
        if let Err(fault) = self.give(&mut **session, index, layout) {
            self.shared.end(&mut running);
            self.shared.broken(&fault);
            drop(running);
            self.shared.interrupt_config();
        }
    }

    /// Gives queue `index` to the session.
    fn give(&self, session: &mut dyn Session, index: u16, layout: Layout) -> Result<(), Fault> {
        let features = RingFeatures::of(self.registers.features());
        let Some(kept) = &self.kept else {
            let queue =
                Queue::new(layout, features).map_err(|error| Fault::Layout(index, error))?;
            return Ok(session.enable(index, self.enabled(index, queue))?);
        };
        // A process that was killed may have begun already, for the same message.
        let base = Position::start(layout.format);
        let view = self.shared.host().memory().view();
        let (queue, taken) =
            kept.take_up(index, layout, features, base, &view).map_err(|error| match error {
                BadState::Layout(error) => Fault::Layout(index, error),
                error => Fault::Kept(index, error),
            })?;
        drop(view);
        Ok(session.enable_again(index, self.enabled(index, queue), taken)?)
    }

    fn enabled(&self, index: u16, queue: Queue) -> Enabled {
        let host = self.shared.host();
        let doorbell = host.doorbells().doorbell(u32::from(index));
        let call = Call::new(self.shared.clone(), index, host.counters().clone());
        Enabled { queue, doorbell, call }
    }

    /// Takes over the state. Returns an error that says what is wrong.
    fn take_over(&mut self, saved: &FunctionState) -> Result<(), String> {
        saved.registers.check(&self.kind, self.vectors)?;
        let is_started = saved.registers.is_started();
        if saved.session.is_some() && (!is_started || saved.needs_reset || saved.broken.is_some()) {
            return Err("a session is there without a driver that has started".into());
        }
        let of_former = std::mem::take(&mut self.of_former);
        if !of_former {
            // Of another driver's life, as of the machine that has just come. It is made anew.
            self.kept = None;
        }
        let shared = self.shared.clone();
        shared.endpoint.restore(&saved.device).map_err(|error| error.why)?;
        self.registers = saved.registers.clone();
        let (config_vector, queue_vectors) = self.registers.vectors();
        shared.config_vector.store(config_vector, Ordering::Relaxed);
        for (slot, vector) in shared.queue_vectors.iter().zip(queue_vectors) {
            slot.store(vector, Ordering::Relaxed);
        }
        *lock(&shared.isr) = saved.isr;
        shared.started.store(is_started, Ordering::Relaxed);
        shared.needs_reset.store(saved.needs_reset, Ordering::Relaxed);
        let state = match (&saved.session, saved.broken) {
            (Some(session), _) => {
                let mut running = lock(&shared.running);
                let resumed = self.resume_session(&mut running, session, of_former);
                if resumed.is_err() {
                    shared.end(&mut running);
                }
                match resumed {
                    Ok(()) => ConnectionState::Open,
                    // The driver may write what it likes while no bus is there, and it must not
                    // keep the others from going on.
                    Err(why) if of_former => {
                        tracing::warn!(device = shared.host().name(), "its driver ends: {why}");
                        shared.broken(&ErrorCode::CORRUPT.into());
                        ConnectionState::Broken(ErrorCode::CORRUPT)
                    }
                    Err(why) => return Err(why),
                }
            }
            (None, Some(code)) => ConnectionState::Broken(ErrorCode(code)),
            (None, None) => ConnectionState::Closed,
        };
        shared.host().set_state(state);
        // The device publishes its configuration as it is with the session.
        let transport: Arc<dyn Transport> = shared.clone();
        self.device.attach(Arc::downgrade(&transport));
        {
            let mut config = lock(&shared.config);
            config.1 = saved.config_generation;
            if config.0 != saved.config {
                config.1 = config.1.wrapping_add(1);
            }
        }
        // The last interrupts may have been lost.
        if state == ConnectionState::Open {
            for (index, _) in self.registers.enabled() {
                shared.queue_used(index);
            }
        }
        shared.interrupt_config();
        Ok(())
    }

    /// Ends the session, and forgets what the driver has set up. Returns whether it had started.
    fn forget_driver(&mut self) -> bool {
        let shared = &self.shared;
        let mut running = lock(&shared.running);
        // An error of a task that comes later is of a session that has ended.
        running.number += 1;
        let was_open = shared.end(&mut running);
        drop(running);
        if let Some(kept) = &self.kept {
            kept.settle_all(self.kind.queues);
        }
        self.registers = Registers::new(&self.kind);
        shared.started.store(false, Ordering::Relaxed);
        shared.needs_reset.store(false, Ordering::Relaxed);
        shared.config_vector.store(NO_VECTOR, Ordering::Relaxed);
        for vector in &shared.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Relaxed);
        }
        let mut isr = lock(&shared.isr);
        *isr = 0;
        shared.interrupts.clear();
        drop(isr);
        shared.host().set_state(ConnectionState::Closed);
        if was_open {
            tracing::info!(device = shared.host().name(), "the device was reset");
        }
        was_open
    }
}

/// Where an access to BAR0 begins, and the offset there.
enum Part {
    Common(u64),
    Isr(u64),
    Device(u64),
    Notify(u64),
    Nothing,
}

impl Part {
    fn of(offset: u64) -> Part {
        match offset {
            bar::COMMON..bar::ISR => Part::Common(offset - bar::COMMON),
            bar::ISR..bar::DEVICE => Part::Isr(offset - bar::ISR),
            bar::DEVICE..bar::NOTIFY => Part::Device(offset - bar::DEVICE),
            bar::NOTIFY..bar::MSIX_TABLE => Part::Notify(offset - bar::NOTIFY),
            _ => Part::Nothing,
        }
    }
}

impl BarHandler for VirtioFunction {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match Part::of(offset) {
            Part::Common(at) => self.read_common(at, data),
            Part::Isr(0) => {
                if let Some(first) = data.first_mut() {
                    *first = self.shared.take_isr();
                }
            }
            Part::Device(at) => {
                let config = lock(&self.shared.config);
                let from = usize::try_from(at).unwrap_or(usize::MAX).min(config.0.len());
                for (byte, have) in data.iter_mut().zip(&config.0[from..]) {
                    *byte = *have;
                }
            }
            Part::Isr(_) | Part::Notify(_) | Part::Nothing => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match Part::of(offset) {
            Part::Common(at) => self.write_common(at, data),
            // Until DRIVER_OK a doorbell is bound to no task.
            Part::Notify(at) if matches!(data.len(), 1..=8) => {
                self.shared.endpoint.ring(at / bar::NOTIFY_STRIDE);
            }
            _ => {}
        }
    }

    fn is_long_write(&self, offset: u64, data: &[u8]) -> bool {
        let Part::Common(at) = Part::of(offset) else { return false };
        match (at, data.len()) {
            (field::STATUS, 1) | (field::QUEUE_RESET, 2) => true,
            (field::QUEUE_ENABLE, 2) => self.registers.is_started(),
            _ => false,
        }
    }

    fn is_kept_write(&self, offset: u64, _: &[u8]) -> bool {
        matches!(Part::of(offset), Part::Common(_))
    }

    fn reset(&mut self) -> bool {
        self.forget_driver()
    }

    fn disconnected(&mut self) {
        self.forget_driver();
        self.shared.endpoint.forget_doorbell_eventfds();
    }

    /// A kernel clears Bus Master when a driver has died or is unbound. The session ends. The next
    /// driver resets the device in any case.
    fn bus_master_cleared(&mut self) -> bool {
        let mut running = lock(&self.shared.running);
        let was_open = self.shared.end(&mut running);
        if was_open {
            self.shared.needs_reset.store(true, Ordering::Relaxed);
            self.shared.host().set_state(ConnectionState::Closed);
        }
        was_open
    }

    fn interrupts_changed(&mut self) {
        if let Some(session) = &mut lock(&self.shared.running).session {
            session.calls_changed();
        }
    }

    fn io_eventfds(&mut self) -> rustix::io::Result<Vec<IoEventFd>> {
        let eventfd = |index: u16| {
            let offset = bar::NOTIFY + u64::from(index) * bar::NOTIFY_STRIDE;
            let fd = self.shared.endpoint.doorbell_eventfd(u32::from(index))?;
            Ok(IoEventFd { offset, fd })
        };
        (0..self.kind.queues).map(eventfd).collect()
    }

    fn save(&mut self) -> Result<Value, String> {
        let shared = self.shared.clone();
        let mut running = lock(&shared.running);
        let mut needs_reset = shared.needs_reset.load(Ordering::Relaxed);
        let mut broken = match shared.host().state() {
            ConnectionState::Broken(code) => Some(code.0),
            _ => None,
        };
        let outlasts = shared.endpoint.is_saved_to_outlast();
        let save = |session: &mut Box<dyn Session>| match outlasts {
            true => session.outlast().map(|own| SavedSession { own, queues: BTreeMap::new() }),
            false => session.save(),
        };
        let session = match running.session.as_mut().map(save) {
            Some(Err(Unsaved::Not(why))) => return Err(why),
            // The session was about to end, and ends with the move.
            Some(Err(Unsaved::Broken(code))) => {
                (needs_reset, broken) = (true, Some(code.0));
                None
            }
            Some(Ok(session)) => Some(session),
            None => None,
        };
        // What may be refused comes before what begins with the state.
        let device = shared.endpoint.save().map_err(|error| error.why)?;
        let (config, mut config_generation) = lock(&shared.config).clone();
        if outlasts {
            self.keep(&mut running)?;
            // The configuration may change without a message.
            config_generation = config_generation.wrapping_add(GENERATIONS);
        }
        drop(running);
        state::part(&FunctionState {
            registers: self.registers.clone(),
            isr: *lock(&shared.isr),
            config,
            config_generation,
            needs_reset,
            broken,
            session,
            device,
        })
    }

    fn kept_memory(&self) -> std::io::Result<Option<OwnedFd>> {
        self.kept.as_ref().map(|kept| kept.file().as_fd().try_clone_to_owned()).transpose()
    }

    fn adopt_memory(&mut self, memory: OwnedFd) -> Result<(), String> {
        let of = self.shared.host().memory().clone();
        self.kept = Some(Arc::new(Kept::of_former(&self.kind, memory, &of)?));
        self.of_former = true;
        Ok(())
    }

    fn restore(&mut self, saved: &Value) -> Result<(), String> {
        self.take_over(&state::read_part(saved)?)
    }
}

/// BAR0 as plain data (spec/state-format.md, "Virtio function").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FunctionState {
    registers: Registers,
    isr: u8,
    /// The device configuration.
    #[serde(with = "hex::serde")]
    config: Vec<u8>,
    config_generation: u8,
    needs_reset: bool,
    /// The error that ended the last session, if it ended by one.
    broken: Option<u32>,
    session: Option<SavedSession>,
    device: DeviceState,
}
