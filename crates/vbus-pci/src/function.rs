// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A PCI function of any kind: configuration space, interrupts, and a handler for each BAR.
//!
//! This module knows no register of vbus. The [`BarHandler`] of a BAR gives the BAR its meaning.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vbus_core::Executor;
use vbus_pci_config::register::{COMMAND_INTX_DISABLE, COMMAND_MASTER, STATUS, STATUS_INTERRUPT};
use vbus_pci_config::{ConfigSpace, MsixLayout, MsixTable, read_pending_bits};

use crate::interrupts::{Interrupts, IrqError, IrqIndex, of_peer};
use crate::mask_event::MaskEvent;

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

/// An eventfd whose write stands for a write to a BAR.
#[derive(Debug)]
pub struct IoEventFd {
    /// The offset in the BAR.
    pub offset: u64,
    /// The eventfd: the same one for the same offset, for as long as the peer stays.
    pub fd: Arc<OwnedFd>,
}

/// What a BAR does.
///
/// The calls come one at a time. Offsets lie within the BAR, and accesses of the structures of
/// MSI-X do not come here; size, alignment and end of an access are whatever the peer chose, so
/// `offset + data.len()` may be beyond the BAR. A handler never waits for the driver.
pub trait BarHandler: Send {
    /// Reads from `offset` on. `data` is all zeros at first: bytes that the handler does not set
    /// read zero.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Writes from `offset` on.
    fn write(&mut self, offset: u64, data: &[u8]);

    /// Goes back to the state after power-on. The device touches none of the driver's memory when
    /// this returns.
    fn reset(&mut self);

    /// The peer has gone. The device touches none of its memory when this returns. The eventfds that
    /// the peer was given mean nothing any more: the handler gives new ones to the next peer. The
    /// provided method calls [`reset`](Self::reset).
    fn disconnected(&mut self) {
        self.reset();
    }

    /// The driver has taken Bus Master from the function. The device touches none of the driver's
    /// memory when this returns.
    fn bus_master_cleared(&mut self) {}

    /// Eventfds that stand for writes to this BAR, for a peer that can have them written without a
    /// call of [`write`](Self::write).
    ///
    /// # Errors
    /// When the process has no more descriptors.
    fn io_eventfds(&mut self) -> rustix::io::Result<Vec<IoEventFd>> {
        Ok(Vec::new())
    }
}

struct Msix {
    layout: MsixLayout,
    /// As the driver wrote it. It is kept for the driver to read; the connector, which knows where
    /// messages go, has its own.
    table: MsixTable,
}

/// A PCI function.
///
/// Any region, offset, size and value is fine: what makes no sense reads zeros and writes nothing.
/// The methods are called one at a time, by the connector.
pub struct PciFunction {
    config: ConfigSpace,
    bars: [Option<Box<dyn BarHandler>>; BAR_COUNT],
    interrupts: Arc<Interrupts>,
    msix: Option<Msix>,
    executor: Arc<Executor>,
    worker: usize,
    /// The watches that unmask and mask INTx.
    mask_events: [Option<MaskEvent>; 2],
}

impl PciFunction {
    /// A function with this configuration space, as it is after power-on, and with the interrupts
    /// made for it ([`Interrupts::of`]). Its BARs do nothing until they have handlers. It watches
    /// eventfds on the event loop `executor`, by the worker with index
    /// `worker`.
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
        }
    }

    /// Lets `handler` be what BAR `number` does.
    ///
    /// # Panics
    /// If the configuration space has no such BAR.
    #[must_use]
    pub fn with_bar(mut self, number: usize, handler: Box<dyn BarHandler>) -> PciFunction {
        assert!(self.config.bar_size(number) > 0, "there is no BAR {number}");
        self.bars[number] = Some(handler);
        self
    }

    /// Bytes of a region; 0 for those that the function does not have.
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
        match (region, bar_number(region)) {
            (region::CONFIG, _) => {
                let Ok(offset) = usize::try_from(offset) else { return };
                self.config.read(offset, data);
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
        match (region, bar_number(region)) {
            (region::CONFIG, _) => {
                let Ok(offset) = usize::try_from(offset) else { return };
                let before = self.config.command();
                self.config.write(offset, data);
                let command = self.config.command();
                if before & !command & COMMAND_MASTER != 0 {
                    // A kernel clears Bus Master when a driver died or was unbound. The device must
                    // let go of all memory before this returns.
                    self.handlers().for_each(|handler| handler.bus_master_cleared());
                }
                self.interrupts.set_disabled(command & COMMAND_INTX_DISABLE != 0);
            }
            (_, Some(number)) => self.write_bar(number, offset, data),
            _ => {}
        }
    }

    fn handlers(&mut self) -> impl Iterator<Item = &mut Box<dyn BarHandler>> {
        self.bars.iter_mut().flatten()
    }

    fn read_bar(&mut self, number: usize, offset: u64, data: &mut [u8]) {
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

    /// How many interrupts an index has.
    pub fn irq_count(&self, index: IrqIndex) -> u32 {
        self.interrupts.count(index)
    }

    /// Connects the interrupts of an index from `start` on to eventfds, or disconnects them
    /// (`None`): all or, on an error, none. The connector must check that the descriptors are
    /// eventfds.
    ///
    /// # Errors
    /// [`IrqError::NoSuch`], [`IrqError::Os`].
    pub fn connect_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        eventfds: Vec<Option<OwnedFd>>,
    ) -> Result<(), IrqError> {
        self.interrupts.connect(index, start, eventfds)
    }

    /// Lets each write of `eventfd` mask INTx (`masked`) or unmask it; `None` ends that. For the
    /// other indexes there is nothing to mask.
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
        let eventfd = eventfd.map(of_peer).transpose()?;
        let slot = &mut self.mask_events[usize::from(masked)];
        // End the old watch first: both could be the same eventfd, and epoll watches it only once.
        *slot = None;
        if let Some(eventfd) = eventfd {
            let interrupts = self.interrupts.clone();
            *slot =
                Some(MaskEvent::start(&self.executor, self.worker, interrupts, eventfd, masked)?);
        }
        Ok(())
    }

    /// Disconnects all interrupts of an index.
    pub fn disconnect_irqs(&mut self, index: IrqIndex) {
        if index == IrqIndex::Intx {
            self.mask_events = Default::default();
        }
        self.interrupts.disconnect(index);
    }

    /// Masks or unmasks INTx. Unmasking is the end of interrupt: it fires again if it is still
    /// pending.
    ///
    /// # Errors
    /// [`IrqError::NotMaskable`] for the other indexes.
    pub fn mask_irq(&self, index: IrqIndex, masked: bool) -> Result<(), IrqError> {
        self.interrupts.mask(index, masked)
    }

    /// Signals an interrupt's eventfd, as the connector's own test. The driver sees nothing
    /// pending.
    ///
    /// # Errors
    /// [`IrqError::NoSuch`].
    pub fn trigger_irq(&self, index: IrqIndex, number: u32) -> Result<(), IrqError> {
        self.interrupts.loopback(index, number)
    }

    /// Eventfds that stand for writes to the BAR that is region `region`.
    ///
    /// # Errors
    /// When the process has no more descriptors.
    pub fn io_eventfds(&mut self, region: u32) -> rustix::io::Result<Vec<IoEventFd>> {
        let handler = bar_number(region).and_then(|number| self.bars[number].as_mut());
        handler.map_or(Ok(Vec::new()), |handler| handler.io_eventfds())
    }

    /// Back to the state after power-on: the handlers are reset, the configuration space too, no
    /// interrupt is pending. The connected eventfds stay.
    pub fn reset(&mut self) {
        self.handlers().for_each(|handler| handler.reset());
        self.reset_config();
    }

    fn reset_config(&mut self) {
        self.config.reset();
        self.msix.iter_mut().for_each(|msix| msix.table.reset());
        self.interrupts.clear();
        self.interrupts.set_disabled(false);
    }

    /// The peer is gone: as [`reset`](Self::reset), and its eventfds go too.
    pub fn disconnected(&mut self) {
        self.handlers().for_each(|handler| handler.disconnected());
        self.reset_config();
        self.mask_events = Default::default();
        self.interrupts.disconnect_all();
    }
}

impl Drop for PciFunction {
    fn drop(&mut self) {
        self.disconnected();
    }
}

/// The MSI-X structure that an access begins in, and the offset there.
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
