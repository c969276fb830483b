// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A PCI function of any kind: configuration space, interrupts, and a handler for each BAR.
//!
//! This module knows no register of vbus. The [`BarHandler`] of a BAR gives the BAR its meaning.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use serde_json::Value;
use vbus_core::{ConnectionCounters, Endpoint, Executor, NotRestored, NotSaved};
use vbus_pci_config::register::{
    BAR0, COMMAND, COMMAND_INTX_DISABLE, COMMAND_MASTER, STATUS, STATUS_INTERRUPT,
};
use vbus_pci_config::{ConfigSpace, MsixLayout, MsixTable, read_pending_bits, touches};

use crate::after_reset::AfterReset;
use crate::interrupts::{Interrupts, IrqError, IrqIndex, of_peer};
use crate::mask_event::MaskEvent;
use crate::saved::{BarState, FunctionState, Peer};

/// Number of regions of a PCI function in VFIO's numbering: six BARs, ROM, configuration space,
/// VGA.
pub const REGION_COUNT: u32 = 9;
/// Number of BARs; they are the regions from 0 on.
const BAR_COUNT: usize = 6;

/// The regions that a function has, in VFIO's numbering; the others have no bytes.
pub mod region {
    /// BAR 0. The other BARs follow.
    pub const BAR0: u32 = 0;
    /// The configuration space.
    pub const CONFIG: u32 = 7;
}

/// An eventfd. A write to it has the effect of a write to a BAR.
#[derive(Debug)]
pub struct IoEventFd {
    /// The offset in the BAR.
    pub offset: u64,
    /// The eventfd. As long as the peer stays, an offset has the same eventfd.
    pub fd: Arc<OwnedFd>,
}

/// The behaviour of a BAR.
///
/// The function calls one method at a time. It handles accesses to the structures of MSI-X itself.
/// `offset` lies within the BAR. The peer chooses size and alignment of an access, so `offset +
/// data.len()` may be beyond the BAR. A handler must not wait for the driver.
pub trait BarHandler: Send {
    /// Reads from `offset` on. `data` is all zeros when the call begins, so bytes that the handler
    /// does not set read zero.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Writes from `offset` on.
    fn write(&mut self, offset: u64, data: &[u8]);

    /// Whether [`write`](Self::write) with these arguments may take longer than some ten
    /// microseconds. The method itself is quick.
    fn is_long_write(&self, offset: u64, data: &[u8]) -> bool {
        let _ = (offset, data);
        false
    }

    /// Whether [`write`](Self::write) with these arguments may change what [`save`](Self::save)
    /// returns: it does, unless it only says that there is work in memory. The method is quick.
    fn is_kept_write(&self, offset: u64, data: &[u8]) -> bool {
        let _ = (offset, data);
        true
    }

    /// Sets the BAR to its state after power-on. When this returns, the device no longer touches
    /// the driver's memory. Returns whether a driver had the device open.
    fn reset(&mut self) -> bool;

    /// The peer has gone. When this returns, the device no longer touches the peer's memory. The
    /// handler ignores the eventfds that it gave to the peer, and gives new ones to the next peer.
    /// The provided method calls [`reset`](Self::reset).
    fn disconnected(&mut self) {
        self.reset();
    }

    /// The driver has cleared Bus Master. When this returns, the device no longer touches the
    /// driver's memory. Returns whether a driver had the device open.
    fn bus_master_cleared(&mut self) -> bool {
        false
    }

    /// The peer has connected or disconnected interrupts. The peer learns that this is done when
    /// the method returns. It must not wait for the driver.
    fn interrupts_changed(&mut self) {}

    /// Returns eventfds whose writes have the effect of writes to this BAR. A peer can let the
    /// kernel write them, and then [`write`](Self::write) is not called.
    ///
    /// # Errors
    /// The process has no more descriptors.
    fn io_eventfds(&mut self) -> rustix::io::Result<Vec<IoEventFd>> {
        Ok(Vec::new())
    }

    /// What the BAR and the device behind it have, as plain data (spec/state-format.md). The
    /// device is quiesced. This changes nothing.
    ///
    /// # Errors
    /// It cannot be saved. The text says why. The provided method refuses.
    fn save(&mut self) -> Result<Value, String> {
        Err("the handler of its BAR has no saved state".into())
    }

    /// Goes on from what [`save`](Self::save) returned. The BAR is in its state after power-on, and
    /// its device is a fresh one that is quiesced. The state may be forged.
    ///
    /// # Errors
    /// The state is wrong or does not fit. The text says what. The BAR is then of no use.
    fn restore(&mut self, state: &Value) -> Result<(), String> {
        let _ = state;
        Err("the handler of its BAR has no saved state".into())
    }

    /// Memory that belongs to what [`save`](Self::save) returned last, if that outlasts this
    /// process. The handler goes on writing there, and nobody else does while this process lives.
    /// `None`: its state has no such memory.
    ///
    /// # Errors
    /// The process has no more descriptors.
    fn kept_memory(&self) -> std::io::Result<Option<OwnedFd>> {
        Ok(None)
    }

    /// Takes what [`kept_memory`](Self::kept_memory) returned in a process that has ended, before
    /// [`restore`](Self::restore). The memory may be forged.
    ///
    /// # Errors
    /// It is none of this handler's. The text says why. The provided method refuses.
    fn adopt_memory(&mut self, memory: OwnedFd) -> Result<(), String> {
        drop(memory);
        Err("the handler of its BAR keeps no memory".into())
    }
}

struct Msix {
    layout: MsixLayout,
    /// The table as the driver wrote it. Only the driver reads it. The connector has a table of its
    /// own, because it knows where messages go.
    table: MsixTable,
}

/// A PCI function.
///
/// It accepts any region, offset, size and value. A read that makes no sense returns zeros, and
/// such a write does nothing. The connector calls one method at a time.
pub struct PciFunction {
    config: ConfigSpace,
    bars: [Option<Box<dyn BarHandler>>; BAR_COUNT],
    interrupts: Arc<Interrupts>,
    msix: Option<Msix>,
    executor: Arc<Executor>,
    worker: usize,
    /// The eventfds that unmask and mask INTx.
    mask_events: [Option<MaskEvent>; 2],
    /// The offset of the capability by which a driver reaches BARs through the configuration space.
    window: Option<usize>,
    /// The names of the device and of its class, for errors.
    names: (String, String),
    counters: Arc<ConnectionCounters>,
    /// Bus Master was cleared under a driver, and the peer has accessed nothing since then. A VMM
    /// that resets the function clears Bus Master first.
    cut: bool,
    /// The last reset came under a driver, and nobody knows yet what it was.
    after_reset: Option<AfterReset>,
    /// See [`PciFunction::abandon`].
    abandoned: bool,
}

/// An access that a driver makes through the window in the configuration space.
struct WindowAccess {
    bar: usize,
    offset: u64,
    len: usize,
}

/// Where the data of a window are, from its capability on, and their bytes.
const WINDOW_DATA: usize = 16;
const WINDOW_BYTES: usize = 4;

impl PciFunction {
    /// Makes a function in its state after power-on, with this configuration space and the
    /// interrupts that [`Interrupts::of`] made from it. Its BARs do nothing until they have
    /// handlers. The worker with index `worker` of the event loop `executor` watches the function's
    /// eventfds.
    pub fn new(
        config: ConfigSpace,
        interrupts: Arc<Interrupts>,
        executor: Arc<Executor>,
        worker: usize,
    ) -> PciFunction {
        let msix = config
            .msix_layout()
            .map(|layout| Msix { layout, table: MsixTable::new(layout.vectors) });
        PciFunction {
            config,
            bars: Default::default(),
            interrupts,
            msix,
            executor,
            worker,
            mask_events: Default::default(),
            window: None,
            names: Default::default(),
            counters: Arc::default(),
            cut: false,
            after_reset: None,
            abandoned: false,
        }
    }

    /// Says whose function it is: errors have the device's name and class, and its counters count.
    #[must_use]
    pub fn of_device(mut self, endpoint: &Endpoint) -> PciFunction {
        self.names = (endpoint.name().to_owned(), endpoint.identity().class_name.to_owned());
        self.counters = endpoint.counters().clone();
        self
    }

    /// Lets a driver reach the BARs through the capability at `at`, which
    /// [`Builder::window`](vbus_pci_config::Builder::window) has made.
    #[must_use]
    pub fn with_window(mut self, at: usize) -> PciFunction {
        self.window = Some(at);
        self
    }

    /// Gives BAR `number` its handler.
    ///
    /// # Panics
    /// If the configuration space has no such BAR.
    #[must_use]
    pub fn with_bar(mut self, number: usize, handler: Box<dyn BarHandler>) -> PciFunction {
        assert!(self.config.bar_size(number) > 0, "there is no BAR {number}");
        self.bars[number] = Some(handler);
        self
    }

    /// Bytes of a region. 0: the function does not have it.
    pub fn region_size(&self, region: u32) -> u64 {
        match (region, bar_number(region)) {
            (region::CONFIG, _) => self.config.size() as u64,
            (_, Some(number)) => u64::from(self.config.bar_size(number)),
            _ => 0,
        }
    }

    /// Reads from a region.
    pub fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.cut = false;
        match (region, bar_number(region)) {
            (region::CONFIG, _) => {
                let Ok(offset) = usize::try_from(offset) else { return };
                self.config.read(offset, data);
                self.read_window(offset, data);
                let status = STATUS.checked_sub(offset).and_then(|at| data.get_mut(at));
                if let Some(status) = status.filter(|_| self.interrupts.intx_status()) {
                    *status |= STATUS_INTERRUPT.to_le_bytes()[0];
                }
            }
            (_, Some(number)) => self.read_bar(number, offset, data),
            _ => {}
        }
    }

    /// Writes to a region.
    pub fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        self.cut = false;
        match (region, bar_number(region)) {
            (region::CONFIG, _) => {
                let Ok(offset) = usize::try_from(offset) else { return };
                let before = self.config.command();
                self.config.write(offset, data);
                self.look_at_bars(offset, data);
                let command = self.config.command();
                if before & !command & COMMAND_MASTER != 0 {
                    // A kernel clears Bus Master when a driver has died or is unbound. The device
                    // must release all of the driver's memory before this returns.
                    self.cut = self
                        .handlers()
                        .fold(false, |open, handler| handler.bus_master_cleared() | open);
                }
                self.interrupts.set_disabled(command & COMMAND_INTX_DISABLE != 0);
                if let Some(WindowAccess { bar, offset, len }) = self.window_hit(offset, data.len())
                {
                    let data = self.window_data();
                    self.write_bar(bar, offset, &data[..len]);
                }
            }
            (_, Some(number)) => self.write_bar(number, offset, data),
            _ => {}
        }
    }

    /// Whether [`write`](Self::write) with these arguments may take longer than some ten
    /// microseconds: a write that its [`BarHandler`] says this of, or that clears Bus Master. The
    /// method itself is quick.
    pub fn is_long_write(&self, region: u32, offset: u64, data: &[u8]) -> bool {
        match (region, bar_number(region)) {
            (region::CONFIG, _) => {
                let command = COMMAND as u64..COMMAND as u64 + 2;
                let end = offset.saturating_add(data.len() as u64);
                let hit = offset < command.end && command.start < end;
                hit && self.config.command() & COMMAND_MASTER != 0
                    || self.is_long_through_window(offset, data)
            }
            (_, Some(number)) => {
                let inside = offset < u64::from(self.config.bar_size(number));
                let handler = self.bars[number].as_ref().filter(|_| inside);
                handler.is_some_and(|handler| handler.is_long_write(offset, data))
            }
            _ => false,
        }
    }

    /// Whether [`write`](Self::write) with these arguments may change what [`save`](Self::save)
    /// returns ([`BarHandler::is_kept_write`]). The method itself is quick.
    pub fn is_kept_write(&self, region: u32, offset: u64, data: &[u8]) -> bool {
        let bar = bar_number(region).filter(|_| region != region::CONFIG);
        let Some(number) = bar else { return region == region::CONFIG };
        let is_of_msix = self.msix.as_ref().is_some_and(|msix| msix.part(number, offset).is_some());
        let handler = self.bars.get(number).and_then(Option::as_ref);
        is_of_msix || handler.is_some_and(|handler| handler.is_kept_write(offset, data))
    }

    /// What an access of `len` bytes at `offset` of the configuration space does through the
    /// window, by the fields that the driver has written. `None`: it does not touch the data, or
    /// the fields are none that the standard has.
    fn window_hit(&self, offset: usize, len: usize) -> Option<WindowAccess> {
        let window = self.window?;
        if !touches(offset, len, window + WINDOW_DATA, WINDOW_BYTES) {
            return None;
        }
        WindowAccess::of(self.config.bytes().get(window..)?)
    }

    /// The data that the driver has written to the window.
    fn window_data(&self) -> [u8; WINDOW_BYTES] {
        let at = self.window.unwrap_or_default() + WINDOW_DATA;
        let mut data = [0; WINDOW_BYTES];
        self.config.read(at, &mut data);
        data
    }

    /// Puts the bytes that the window leads to into `data`, where `data` has the window's.
    fn read_window(&mut self, offset: usize, data: &mut [u8]) {
        let Some(access) = self.window_hit(offset, data.len()) else { return };
        let mut bytes = [0; WINDOW_BYTES];
        self.read_bar(access.bar, access.offset, &mut bytes[..access.len]);
        let start = self.window.unwrap_or_default() + WINDOW_DATA;
        for (at, byte) in (start..).zip(bytes) {
            if let Some(place) = at.checked_sub(offset).and_then(|at| data.get_mut(at)) {
                *place = byte;
            }
        }
    }

    /// Whether a write to the configuration space makes a long write through the window.
    fn is_long_through_window(&self, offset: u64, data: &[u8]) -> bool {
        let Ok(offset) = usize::try_from(offset) else { return false };
        let Some(window) = self.window else { return false };
        if !touches(offset, data.len(), window + WINDOW_DATA, WINDOW_BYTES) {
            return false;
        }
        // The write may change the fields and the data together.
        let mut config = self.config.clone();
        config.write(offset, data);
        let bytes = config.bytes().get(window..).unwrap_or_default();
        let Some(WindowAccess { bar, offset, len }) = WindowAccess::of(bytes) else { return false };
        let data = bytes.get(WINDOW_DATA..WINDOW_DATA + len).unwrap_or_default();
        let handler = self.bars.get(bar).and_then(Option::as_ref);
        handler.is_some_and(|handler| handler.is_long_write(offset, data))
    }

    /// A write to the registers of BARs tells what a reset was.
    fn look_at_bars(&self, offset: usize, data: &[u8]) {
        let Some(after_reset) = &self.after_reset else { return };
        for bar in (BAR0..).step_by(4).take(BAR_COUNT) {
            let word = bar.checked_sub(offset).and_then(|at| data.get(at..)?.first_chunk());
            if let Some(word) = word {
                after_reset.bar_written(u32::from_le_bytes(*word));
            }
        }
    }

    fn handlers(&mut self) -> impl Iterator<Item = &mut Box<dyn BarHandler>> {
        self.bars.iter_mut().flatten()
    }

    fn read_bar(&mut self, number: usize, offset: u64, data: &mut [u8]) {
        self.after_reset.iter().for_each(AfterReset::used);
        if offset >= u64::from(self.config.bar_size(number)) {
            return;
        }
        match self.msix.as_ref().and_then(|msix| msix.part(number, offset)) {
            Some(MsixPart::Table(at)) => self.msix.iter().for_each(|m| m.table.read(at, data)),
            Some(MsixPart::Pending(at)) => {
                read_pending_bits(at, data, |vector| self.interrupts.msix_pending(vector));
            }
            None => {
                if let Some(handler) = &mut self.bars[number] {
                    handler.read(offset, data);
                }
            }
        }
    }

    fn write_bar(&mut self, number: usize, offset: u64, data: &[u8]) {
        self.after_reset.iter().for_each(AfterReset::used);
        if offset >= u64::from(self.config.bar_size(number)) {
            return;
        }
        match self.msix.as_ref().and_then(|msix| msix.part(number, offset)) {
            Some(MsixPart::Table(at)) => {
                if let Some(msix) = &mut self.msix {
                    let _ = msix.table.write(at, data);
                }
            }
            Some(MsixPart::Pending(_)) => {}
            None => {
                if let Some(handler) = &mut self.bars[number] {
                    handler.write(offset, data);
                }
            }
        }
    }

    /// Number of interrupts of an index.
    pub fn irq_count(&self, index: IrqIndex) -> u32 {
        self.interrupts.count(index)
    }

    /// Connects the interrupts of an index, from `start` on, to eventfds, or disconnects them
    /// (`None`). On an error, none of them changes. The connector must check that the descriptors
    /// are eventfds.
    ///
    /// # Errors
    /// [`IrqError::NoSuch`], [`IrqError::Os`].
    pub fn connect_irqs(
        &mut self,
        index: IrqIndex,
        start: u32,
        eventfds: Vec<Option<OwnedFd>>,
    ) -> Result<(), IrqError> {
        self.interrupts.connect(index, start, eventfds)?;
        self.handlers().for_each(|handler| handler.interrupts_changed());
        Ok(())
    }

    /// Makes each write of `eventfd` mask INTx (`masked` is true) or unmask it. `None` ends this.
    /// Only INTx can be masked.
    ///
    /// # Errors
    /// [`IrqError::NotMaskable`], [`IrqError::Os`].
    pub fn connect_mask(
        &mut self,
        index: IrqIndex,
        masked: bool,
        eventfd: Option<OwnedFd>,
    ) -> Result<(), IrqError> {
        if index != IrqIndex::Intx {
            return Err(IrqError::NotMaskable);
        }
        self.watch_mask(masked, eventfd, false)
    }

    /// As [`connect_mask`](Self::connect_mask), for an eventfd that another process has watched
    /// before, which this process takes the place of.
    ///
    /// # Errors
    /// [`IrqError::Os`].
    pub fn adopt_mask(&mut self, masked: bool, eventfd: OwnedFd) -> Result<(), IrqError> {
        self.watch_mask(masked, Some(eventfd), true)
    }

    fn watch_mask(
        &mut self,
        masked: bool,
        eventfd: Option<OwnedFd>,
        adopted: bool,
    ) -> Result<(), IrqError> {
        let eventfd = eventfd.map(of_peer).transpose()?;
        let slot = &mut self.mask_events[usize::from(masked)];
        // End the old watch first. Both watches could have the same eventfd, and epoll watches an
        // eventfd only once.
        *slot = None;
        if let Some(eventfd) = eventfd {
            let interrupts = self.interrupts.clone();
            let on = (&self.executor, self.worker);
            *slot = Some(MaskEvent::start(on, interrupts, eventfd, masked, adopted)?);
        }
        Ok(())
    }

    /// Copies of the eventfds that unmask INTx (the first) and mask it.
    ///
    /// # Errors
    /// The process has no more descriptors.
    pub fn mask_eventfds(&self) -> std::io::Result<[Option<OwnedFd>; 2]> {
        let copy = |event: &Option<MaskEvent>| {
            event.as_ref().map(|event| event.as_fd().try_clone_to_owned()).transpose()
        };
        let [unmask, mask] = &self.mask_events;
        Ok([copy(unmask)?, copy(mask)?])
    }

    /// Disconnects all interrupts of an index.
    pub fn disconnect_irqs(&mut self, index: IrqIndex) {
        if index == IrqIndex::Intx {
            self.mask_events = Default::default();
        }
        self.interrupts.disconnect(index);
        self.handlers().for_each(|handler| handler.interrupts_changed());
    }

    /// Masks or unmasks INTx. An unmask is the end of the interrupt: INTx fires again if it is
    /// still pending.
    ///
    /// # Errors
    /// [`IrqError::NotMaskable`] for the other indexes.
    pub fn mask_irq(&self, index: IrqIndex, masked: bool) -> Result<(), IrqError> {
        self.interrupts.mask(index, masked)
    }

    /// Signals the eventfd of an interrupt because the connector asks for it, as a test. Nothing
    /// becomes pending for the driver.
    ///
    /// # Errors
    /// [`IrqError::NoSuch`].
    pub fn trigger_irq(&self, index: IrqIndex, number: u32) -> Result<(), IrqError> {
        self.interrupts.loopback(index, number)
    }

    /// Returns the eventfds whose writes have the effect of writes to the BAR with region number
    /// `region`.
    ///
    /// # Errors
    /// The process has no more descriptors.
    pub fn io_eventfds(&mut self, region: u32) -> rustix::io::Result<Vec<IoEventFd>> {
        let handler = bar_number(region).and_then(|number| self.bars[number].as_mut());
        handler.map_or(Ok(Vec::new()), |handler| handler.io_eventfds())
    }

    /// Sets the function to its state after power-on. This resets the handlers, the configuration
    /// space and the pending interrupts. The connected eventfds stay.
    pub fn reset(&mut self) {
        let cut = std::mem::take(&mut self.cut);
        let was_open = self.handlers().fold(cut, |open, handler| handler.reset() | open);
        self.reset_config();
        if was_open {
            let on = (&self.executor, self.worker);
            self.after_reset = Some(AfterReset::begin(on, self.counters.clone()));
        }
    }

    /// The state of the function, with that of its device. The device is quiesced
    /// ([`vbus_core::Endpoint::quiesce`]). This changes nothing.
    ///
    /// # Errors
    /// The device, or the handler of a BAR, cannot be saved.
    pub fn save(&mut self) -> Result<FunctionState, NotSaved> {
        let mut bars = Vec::new();
        for (number, handler) in (0..).zip(&mut self.bars) {
            let Some(handler) = handler else { continue };
            let state = handler.save().map_err(|why| {
                let (device, class) = self.names.clone();
                NotSaved { device, class, why }
            })?;
            bars.push(BarState { number, state });
        }
        Ok(FunctionState {
            config: self.config.bytes().to_vec(),
            msix_table: self.msix.as_ref().map(|msix| msix.table.bytes().to_vec()),
            interrupts: self.interrupts.save(),
            bars,
        })
    }

    /// Memory that belongs to the state that [`save`](Self::save) returned last, if that outlasts
    /// this process ([`BarHandler::kept_memory`]).
    ///
    /// # Errors
    /// The process has no more descriptors.
    pub fn kept_memory(&self) -> std::io::Result<Option<OwnedFd>> {
        let kept = self.bars.iter().flatten().map(|handler| handler.kept_memory());
        kept.filter_map(std::io::Result::transpose).next().transpose()
    }

    /// Takes what [`kept_memory`](Self::kept_memory) returned in a process that has ended, before
    /// [`restore`](Self::restore). The memory may be forged.
    ///
    /// # Errors
    /// It is none of this function's. The text says why.
    pub fn adopt_memory(&mut self, memory: OwnedFd) -> Result<(), String> {
        let handler = self.handlers().next().ok_or("the function keeps no memory")?;
        handler.adopt_memory(memory)
    }

    /// Goes on from the state of a function of the same device: of the same class, with the same
    /// settings and options. This function is in its state after power-on, and its device is a
    /// fresh one that is quiesced. The peer's memory is mapped at the endpoint. If the peer is the
    /// [same](Peer::Same), its eventfds are connected. The driver gets an interrupt on every vector
    /// that it uses. The device goes on with [`vbus_core::Endpoint::resume`].
    ///
    /// The state may be forged. What it says is checked as what a driver says.
    ///
    /// # Errors
    /// The state is wrong or does not fit. The function is then as after power-on; its device is
    /// of no use, so that a new one has to be made.
    pub fn restore(&mut self, state: &FunctionState, peer: Peer) -> Result<(), NotRestored> {
        self.take_over(state, peer).map_err(|why| {
            self.reset();
            let (device, class) = self.names.clone();
            NotRestored { device, class, why }
        })
    }

    fn take_over(&mut self, state: &FunctionState, peer: Peer) -> Result<(), String> {
        if !self.config.restore(&state.config) {
            return Err("config is not the configuration space of this function".into());
        }
        let fits = match (&mut self.msix, &state.msix_table) {
            (Some(msix), Some(table)) => msix.table.restore(table),
            (None, None) => true,
            _ => false,
        };
        if !fits {
            return Err("msix_table is none of this function".into());
        }
        let disabled = self.config.command() & COMMAND_INTX_DISABLE != 0;
        self.interrupts.set_disabled(disabled);
        self.interrupts.restore(&state.interrupts, peer == Peer::Same)?;
        let numbers = (0..).zip(&self.bars).filter(|(_, bar)| bar.is_some());
        if !numbers.map(|(number, _)| number).eq(state.bars.iter().map(|bar| bar.number)) {
            return Err("bars are not those of this function".into());
        }
        for (handler, bar) in self.handlers().zip(&state.bars) {
            handler.restore(&bar.state)?;
        }
        // A reset before this was for the sake of the state: its driver has lost nothing.
        self.after_reset = None;
        Ok(())
    }

    /// Copies of the eventfds that the connector has connected to the interrupts of an index. A
    /// process that takes this one's place before the same peer connects them again.
    ///
    /// # Errors
    /// The process has no more descriptors.
    pub fn irq_eventfds(&self, index: IrqIndex) -> std::io::Result<Vec<Option<OwnedFd>>> {
        self.interrupts.eventfds(index)
    }

    /// Another process has the peer: when this is dropped, nobody is told that the peer has gone.
    /// The device keeps its connection, and must not go on.
    pub fn abandon(&mut self) {
        self.abandoned = true;
    }

    fn reset_config(&mut self) {
        self.config.reset();
        self.msix.iter_mut().for_each(|msix| msix.table.reset());
        self.interrupts.clear();
        self.interrupts.set_disabled(false);
    }

    /// The peer has gone. This resets the function as [`reset`](Self::reset) does, and also
    /// disconnects the peer's eventfds.
    pub fn disconnected(&mut self) {
        self.handlers().for_each(|handler| handler.disconnected());
        (self.cut, self.after_reset) = (false, None);
        self.reset_config();
        self.mask_events = Default::default();
        self.interrupts.disconnect_all();
    }
}

impl Drop for PciFunction {
    fn drop(&mut self) {
        if !self.abandoned {
            self.disconnected();
        }
    }
}

impl WindowAccess {
    /// The access that a capability, with its first bytes, asks for.
    fn of(capability: &[u8]) -> Option<WindowAccess> {
        let word = |at: usize| {
            let bytes = capability.get(at..at + 4)?.try_into().ok()?;
            Some(u32::from_le_bytes(bytes))
        };
        let (bar, offset, len) = (usize::from(*capability.get(4)?), word(8)?, word(12)?);
        let fits = matches!(len, 1 | 2 | 4) && offset % len == 0 && bar < BAR_COUNT;
        let len = usize::try_from(len).ok()?;
        fits.then_some(WindowAccess { bar, offset: offset.into(), len })
    }
}

/// The structure of MSI-X in which an access begins, and the offset in that structure.
enum MsixPart {
    Table(usize),
    Pending(usize),
}

impl Msix {
    fn part(&self, bar: usize, offset: u64) -> Option<MsixPart> {
        let within = |in_bar: u8, range: std::ops::Range<u64>| {
            let inside = usize::from(in_bar) == bar && range.contains(&offset);
            inside.then(|| usize::try_from(offset - range.start).ok()).flatten()
        };
        let MsixLayout { table_bar, pending_bar, .. } = self.layout;
        let table = within(table_bar, self.layout.table_range()).map(MsixPart::Table);
        table.or_else(|| within(pending_bar, self.layout.pending_range()).map(MsixPart::Pending))
    }
}

fn bar_number(region: u32) -> Option<usize> {
    usize::try_from(region).ok().filter(|number| *number < BAR_COUNT)
}
