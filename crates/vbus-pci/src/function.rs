//! The function: regions, resets, and what the connector needs besides.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vbus_core::shm::abi::bar0;
use vbus_core::{Endpoint, MapError};

use crate::Options;
use crate::config::ConfigSpace;
use crate::interrupts::{Interrupts, IrqError, IrqIndex, check};
use crate::mask_event::MaskEvent;
use crate::registers::{Context, Registers};

/// Number of regions of a PCI function in VFIO's numbering: six BARs, ROM, configuration space,
/// VGA.
pub const REGION_COUNT: u32 = 9;

/// The regions that a function has, in VFIO's numbering; the others have no bytes.
pub mod region {
    /// BAR 0.
    pub const BAR0: u32 = 0;
    /// The configuration space.
    pub const CONFIG: u32 = 7;
}

const PAGE: u64 = 0x1000;

/// An eventfd that rings a doorbell.
#[derive(Debug)]
pub struct DoorbellFd {
    /// Where the doorbell is in BAR0.
    pub offset: u64,
    /// Bytes of the write that rings it.
    pub size: u64,
    /// The eventfd; always the same one for the same doorbell.
    pub fd: Arc<OwnedFd>,
}

/// A device on the bus as a PCI function.
///
/// Any region, offset, size and value is fine: what makes no sense reads zeros and writes nothing.
/// The methods are called one at a time, by the connector. Commands of the mailbox run within the
/// write; none of them waits for the driver.
pub struct PciFunction {
    endpoint: Arc<Endpoint>,
    config: ConfigSpace,
    registers: Registers,
    interrupts: Arc<Interrupts>,
    /// What unmasks INTx, and what masks it.
    mask_events: [Option<MaskEvent>; 2],
    /// The MSI-X table as written. It is kept for the driver to read; the connector, which knows
    /// where messages go, has its own.
    msix_table: Vec<u8>,
}

impl PciFunction {
    /// Makes a function of the device, and has its interrupts come here.
    pub fn new(endpoint: Arc<Endpoint>, options: Options) -> PciFunction {
        let vectors =
            if options.msix { endpoint.identity().vectors.clamp(1, bar0::MSIX_MAX) } else { 0 };
        let interrupts = Arc::new(Interrupts::new(vectors));
        endpoint.set_interrupt_sink(interrupts.clone());
        PciFunction {
            config: ConfigSpace::new(endpoint.identity(), options, vectors),
            registers: Registers::default(),
            interrupts,
            mask_events: Default::default(),
            msix_table: msix_table(vectors),
            endpoint,
        }
    }

    /// The device.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// Bytes of a region; 0 for those that the function does not have.
    pub fn region_size(&self, region: u32) -> u64 {
        match region {
            region::BAR0 => bar0::SIZE,
            region::CONFIG => self.config.size(),
            _ => 0,
        }
    }

    /// Reads from a region.
    pub fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match region {
            region::CONFIG => self.config.read(offset, data, self.interrupts.status()),
            region::BAR0 => self.read_bar0(offset, data),
            _ => {}
        }
    }

    /// Writes to a region.
    pub fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        match region {
            region::CONFIG => {
                let was_master = self.config.bus_master();
                self.config.write(offset, data);
                if was_master && !self.config.bus_master() {
                    // So a kernel takes a device from a driver that died or was unbound: memory
                    // must be let go of before this returns.
                    self.endpoint.close();
                    self.interrupts.clear();
                }
                self.interrupts.set_disabled(self.config.intx_disabled());
            }
            region::BAR0 => self.write_bar0(offset, data),
            _ => {}
        }
    }

    fn read_bar0(&mut self, offset: u64, data: &mut [u8]) {
        if !aligned(offset, data.len()) {
            return;
        }
        for (at, word) in (offset..).step_by(4).zip(data.chunks_exact_mut(4)) {
            let value = match at {
                0..bar0::DOORBELLS => {
                    let context =
                        Context { endpoint: &self.endpoint, interrupts: &self.interrupts };
                    self.registers.read(at, &context)
                }
                bar0::MSIX_TABLE..bar0::MSIX_PBA => {
                    let bytes =
                        within(at, bar0::MSIX_TABLE).and_then(|at| self.msix_table.get(at..at + 4));
                    bytes.map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                }
                bar0::MSIX_PBA..bar0::SIZE => within(at, bar0::MSIX_PBA).map_or(0, |at| {
                    u32::from_le_bytes(
                        [0, 1, 2, 3].map(|i| self.interrupts.msix_pending_byte(at + i)),
                    )
                }),
                _ => 0,
            };
            word.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn write_bar0(&mut self, offset: u64, data: &[u8]) {
        if (bar0::DOORBELLS..bar0::DOORBELLS + PAGE).contains(&offset) {
            if matches!(data.len(), 1..=8) {
                self.endpoint.ring((offset - bar0::DOORBELLS) / bar0::DOORBELL_STRIDE);
            }
            return;
        }
        if !aligned(offset, data.len()) {
            return;
        }
        for (at, word) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            match at {
                0..bar0::DOORBELLS => {
                    let context =
                        Context { endpoint: &self.endpoint, interrupts: &self.interrupts };
                    self.registers.write(at, value, &context);
                }
                bar0::MSIX_TABLE..bar0::MSIX_PBA => {
                    let place = within(at, bar0::MSIX_TABLE)
                        .and_then(|at| self.msix_table.get_mut(at..at + 4));
                    if let Some(place) = place {
                        place.copy_from_slice(word);
                    }
                }
                _ => {}
            }
        }
    }

    /// How many interrupts an index has.
    pub fn irq_count(&self, index: IrqIndex) -> u32 {
        self.interrupts.count(index)
    }

    /// Connects the interrupts of an index from `start` on to eventfds, or disconnects them
    /// (`None`): all or, on an error, none.
    ///
    /// # Errors
    /// [`IrqError::NoSuch`], [`IrqError::NotEventfd`], [`IrqError::Os`].
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
    /// [`IrqError::NotMaskable`], [`IrqError::NotEventfd`], [`IrqError::Os`].
    pub fn connect_mask(
        &mut self,
        index: IrqIndex,
        masked: bool,
        eventfd: Option<OwnedFd>,
    ) -> Result<(), IrqError> {
        if index != IrqIndex::Intx {
            return Err(IrqError::NotMaskable);
        }
        let eventfd = eventfd.map(check).transpose()?;
        let place = &mut self.mask_events[usize::from(masked)];
        // The old one first: both could be the same eventfd, which can be watched once only.
        *place = None;
        if let Some(eventfd) = eventfd {
            *place =
                Some(MaskEvent::start(&self.endpoint, self.interrupts.clone(), eventfd, masked)?);
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

    /// The peer offers memory; see [`Endpoint::map`].
    ///
    /// # Errors
    /// See [`MapError`].
    pub fn map(
        &self,
        start: u64,
        len: u64,
        file: Option<(OwnedFd, u64)>,
        writable: bool,
    ) -> Result<(), MapError> {
        self.endpoint.map(start, len, file, writable)
    }

    /// The peer takes memory back; when this returns, the device does not touch it any more. See
    /// [`Endpoint::unmap`].
    pub fn unmap(&self, start: u64, len: u64) -> u64 {
        self.endpoint.unmap(start, len)
    }

    /// The peer takes all memory back.
    pub fn unmap_all(&self) {
        self.endpoint.unmap_all();
    }

    /// An eventfd for each doorbell that the device can have.
    ///
    /// # Errors
    /// When the process has no more descriptors.
    pub fn doorbells(&self) -> rustix::io::Result<Vec<DoorbellFd>> {
        let fd = |handle: u32| {
            let fd = self.endpoint.doorbell_eventfd(handle)?;
            let offset = bar0::DOORBELLS + u64::from(handle) * bar0::DOORBELL_STRIDE;
            Ok(DoorbellFd { offset, size: bar0::DOORBELL_STRIDE, fd })
        };
        (0..self.endpoint.identity().regions.min(bar0::DOORBELL_COUNT)).map(fd).collect()
    }

    /// Back to the state after power-on: the connection is closed, the configuration space reset,
    /// no interrupt pending. The peer's memory and the connected eventfds stay.
    pub fn reset(&mut self) {
        self.endpoint.close();
        self.config.reset();
        self.registers.reset();
        self.msix_table = msix_table(self.msix_vectors());
        self.interrupts.clear();
        self.interrupts.set_disabled(false);
    }

    /// The peer is gone: as [`reset`](Self::reset), and its memory and eventfds go too.
    pub fn disconnected(&mut self) {
        self.reset();
        self.mask_events = Default::default();
        self.interrupts.disconnect_all();
        self.endpoint.unmap_all();
    }

    fn msix_vectors(&self) -> u16 {
        u16::try_from(self.msix_table.len() / 16).unwrap_or(0)
    }
}

impl Drop for PciFunction {
    fn drop(&mut self) {
        self.disconnected();
    }
}

/// After power-on every vector is masked.
fn msix_table(vectors: u16) -> Vec<u8> {
    let mut table = vec![0; usize::from(vectors) * 16];
    table.chunks_exact_mut(16).for_each(|entry| entry[12] = 1);
    table
}

/// Whether an access is one of those that registers take: 4 or 8 aligned bytes.
fn aligned(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset % len as u64 == 0
}

fn within(offset: u64, start: u64) -> Option<usize> {
    usize::try_from(offset.checked_sub(start)?).ok()
}
