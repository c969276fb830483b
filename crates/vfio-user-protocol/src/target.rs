// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a vfio-user server serves: the [`Target`] trait.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

/// Numbers that VFIO gives to the regions and interrupt indexes of a PCI function.
pub mod pci {
    /// BAR 0; BARs 1 to 5 follow.
    pub const REGION_BAR0: u32 = 0;
    /// The expansion ROM.
    pub const REGION_ROM: u32 = 6;
    /// The configuration space.
    pub const REGION_CONFIG: u32 = 7;
    /// Number of regions; the last one is for VGA.
    pub const REGIONS: u32 = 9;

    /// The interrupt pin: one interrupt, a level.
    pub const IRQ_INTX: u32 = 0;
    /// Message-signalled interrupts.
    pub const IRQ_MSI: u32 = 1;
    /// Message-signalled interrupts with a table.
    pub const IRQ_MSIX: u32 = 2;
    /// Tells the client of an error.
    pub const IRQ_ERROR: u32 = 3;
    /// Asks the client to give the device back.
    pub const IRQ_REQUEST: u32 = 4;
    /// Number of interrupt indexes.
    pub const IRQS: u32 = 5;
}

/// What the device has (`DEVICE_GET_INFO`). It is always a PCI device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// `DEVICE_RESET` is supported.
    pub resettable: bool,
    /// Number of regions. A PCI function has 9 (six BARs, ROM, configuration space, VGA).
    pub regions: u32,
    /// Number of interrupt indexes. A PCI function has 5 (INTx, MSI, MSI-X, error, request).
    pub irqs: u32,
}

impl DeviceInfo {
    /// A PCI function that can be reset: 9 regions, 5 interrupt indexes.
    pub const PCI: DeviceInfo =
        DeviceInfo { resettable: true, regions: pci::REGIONS, irqs: pci::IRQS };
}

/// A region of the device. None can be mapped by the client: QEMU posts its writes only to a device
/// of which no region can be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RegionInfo {
    /// Bytes; 0 for a region that the device does not have.
    pub size: u64,
    /// The client may read it.
    pub readable: bool,
    /// The client may write it.
    pub writable: bool,
}

impl RegionInfo {
    /// A region of `size` bytes.
    #[must_use]
    pub const fn new(size: u64, readable: bool, writable: bool) -> RegionInfo {
        RegionInfo { size, readable, writable }
    }

    /// A region of `size` bytes that the client may read and write.
    #[must_use]
    pub const fn read_write(size: u64) -> RegionInfo {
        RegionInfo::new(size, true, true)
    }
}

/// An interrupt index of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct IrqInfo {
    /// Number of interrupts; 0 when the device has none of this kind.
    pub count: u32,
    /// They can be masked and unmasked by the client.
    pub maskable: bool,
    /// They mask themselves when triggered, and the client unmasks them (INTx).
    pub automasked: bool,
    /// They are set up together: more can be connected only after all were disconnected (MSI,
    /// MSI-X).
    pub fixed_size: bool,
}

impl IrqInfo {
    /// The interrupt pin of a PCI function: one interrupt, which masks itself when it is triggered.
    #[must_use]
    pub const fn intx() -> IrqInfo {
        IrqInfo { count: 1, maskable: true, automasked: true, fixed_size: false }
    }

    /// `count` message-signalled interrupts, set up together.
    #[must_use]
    pub const fn messages(count: u32) -> IrqInfo {
        IrqInfo { count, maskable: false, automasked: false, fixed_size: true }
    }
}

/// What a client wants of the interrupts of one index (`DEVICE_SET_IRQS`).
///
/// Ranges have been checked against [`Target::irq_info`]. An interrupt number is relative to its
/// index. The descriptors are eventfds; they may block, until the target makes them non-blocking.
#[derive(Debug)]
#[non_exhaustive]
pub enum IrqAction {
    /// Disconnect all eventfds of this index.
    DisableAll,
    /// The eventfds by which the device triggers the interrupts from `start` on; `None` disconnects
    /// one.
    Connect {
        /// First interrupt.
        start: u32,
        /// One per interrupt.
        eventfds: Vec<Option<OwnedFd>>,
    },
    /// The eventfds whose signal masks the interrupts from `start` on.
    ConnectMask {
        /// First interrupt.
        start: u32,
        /// One per interrupt.
        eventfds: Vec<Option<OwnedFd>>,
    },
    /// The eventfds whose signal unmasks the interrupts from `start` on.
    ConnectUnmask {
        /// First interrupt.
        start: u32,
        /// One per interrupt.
        eventfds: Vec<Option<OwnedFd>>,
    },
    /// Trigger these interrupts as if the device had.
    Trigger(Vec<u32>),
    /// Mask these interrupts.
    Mask(Vec<u32>),
    /// Unmask these interrupts. For INTx this is the end of interrupt.
    Unmask(Vec<u32>),
}

/// Memory of the client that the device may use from now on (`DMA_MAP`).
///
/// Address and size are multiples of 4 KiB, do not overflow and overlap no other mapping.
#[derive(Debug)]
#[non_exhaustive]
pub struct Mapping {
    /// Its address as the device knows it.
    pub address: u64,
    /// Bytes, at least one page.
    pub size: u64,
    /// The device may read it.
    pub readable: bool,
    /// The device may write it.
    pub writable: bool,
    /// The descriptor to map and the offset in it. `None`: the client does not share this memory,
    /// and the device cannot reach it.
    ///
    /// Nothing is known about the descriptor: it may be no memory at all, shorter than `offset +
    /// size`, or shrink later.
    pub memory: Option<(OwnedFd, u64)>,
}

/// An eventfd that stands for writes to a part of a region: a doorbell that needs no message.
#[derive(Debug)]
#[non_exhaustive]
pub struct IoEventFd {
    /// The eventfd. A duplicate: it is closed once sent.
    pub fd: OwnedFd,
    /// Offset in the region, bytes.
    pub offset: u64,
    /// Size of the write that it stands for, bytes; 0: any.
    pub size: u64,
    /// The value that must be written; `None`: any.
    pub datamatch: Option<u64>,
}

impl IoEventFd {
    /// An eventfd for writes of any size and value at `offset`.
    #[must_use]
    pub fn new(fd: OwnedFd, offset: u64) -> IoEventFd {
        IoEventFd { fd, offset, size: 0, datamatch: None }
    }
}

/// What a server serves: one device function.
///
/// The server calls these methods from the thread that runs it, one call at a time. It does the
/// checks that need no knowledge of the device:
/// - indexes are below the counts of [`DeviceInfo`],
/// - an access lies within its region, and the region's [`RegionInfo`] allows it,
/// - a range of interrupts lies within its index,
/// - mappings do not overlap, and an unmap names a mapping exactly.
///
/// The target adds its own rules. It returns an errno for each refusal, which the client gets.
///
/// No call may wait for the client: QEMU holds its global lock while it waits for the reply to an
/// access.
pub trait Target {
    /// What the device has. Cheap, and the same as long as a client is there.
    fn device_info(&self) -> DeviceInfo {
        DeviceInfo::PCI
    }

    /// A region, by an index below [`DeviceInfo::regions`]. Cheap.
    fn region_info(&self, region: u32) -> RegionInfo;

    /// An interrupt index, below [`DeviceInfo::irqs`]. Cheap.
    fn irq_info(&self, index: u32) -> IrqInfo;

    /// Reads `data.len()` bytes, 1 to 1 MiB.
    ///
    /// # Errors
    /// An errno for the client when this place cannot be read so.
    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// Writes `data.len()` bytes, 1 to 1 MiB.
    ///
    /// # Errors
    /// An errno for the client (unless it posted the write) when this place cannot be written so.
    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;

    /// Changes the interrupts of an index.
    ///
    /// # Errors
    /// An errno for the client; nothing has changed then.
    fn set_irqs(&mut self, index: u32, action: IrqAction) -> Result<(), Errno>;

    /// The most mappings that this device takes, up to 65535. A client that asks learns of the
    /// lower of this number and its own; [`dma_map`](Self::dma_map) still sees every mapping of a
    /// client that does not ask.
    fn max_dma_maps(&self) -> u32 {
        crate::version::MAX_DMA_MAPS
    }

    /// The client offers memory. A device that reads and writes no memory need not look at it.
    ///
    /// # Errors
    /// An errno for the client when the memory cannot be used. It then counts as not mapped.
    fn dma_map(&mut self, mapping: Mapping) -> Result<(), Errno> {
        drop(mapping);
        Ok(())
    }

    /// The client takes a mapping back: when this returns, nothing of the device touches it any
    /// more.
    fn dma_unmap(&mut self, address: u64, size: u64) {
        let _ = (address, size);
    }

    /// The client takes all mappings back, as [`dma_unmap`](Self::dma_unmap) takes one.
    fn dma_unmap_all(&mut self) {}

    /// Back to the state after power-on, but for the mappings and the connected eventfds.
    ///
    /// # Errors
    /// An errno for the client.
    fn reset(&mut self) -> Result<(), Errno>;

    /// The eventfds that stand for writes to a region. Empty when there are none.
    fn io_eventfds(&mut self, region: u32) -> Vec<IoEventFd> {
        let _ = region;
        Vec::new()
    }

    /// A client has connected and negotiated.
    fn connected(&mut self) {}

    /// The client that [`Target::connected`] told of is gone, in whatever way. The target drops
    /// its mappings and eventfds, whether or not the client took them back. The next call, if any,
    /// is [`Target::connected`].
    fn disconnected(&mut self);
}
