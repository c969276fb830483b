//! What a vfio-user server serves: the [`Target`] trait.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::remote::RemoteMemory;

/// What the device has (`DEVICE_GET_INFO`). It is always a PCI device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `DEVICE_RESET` is supported.
    pub resettable: bool,
    /// Number of regions. A PCI function has 9 (six BARs, ROM, configuration space, VGA).
    pub regions: u32,
    /// Number of interrupt indexes. A PCI function has 5 (INTx, MSI, MSI-X, error, request).
    pub irqs: u32,
}

/// A region of the device. None can be mapped by the client: QEMU posts its writes only to a device
/// of which no region can be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// Bytes; 0 for a region that the device does not have.
    pub size: u64,
    /// The client may read it.
    pub readable: bool,
    /// The client may write it.
    pub writable: bool,
}

/// An interrupt index of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

/// What a client wants of the interrupts of one index (`DEVICE_SET_IRQS`).
///
/// Ranges have been checked against [`Target::irq_info`]. An interrupt number is relative to its
/// index.
#[derive(Debug)]
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
pub struct Mapping {
    /// Its address as the device knows it.
    pub address: u64,
    /// Bytes, at least one page.
    pub size: u64,
    /// The device may read it.
    pub readable: bool,
    /// The device may write it.
    pub writable: bool,
    /// The descriptor to map and the offset in it; without it the memory is reached by
    /// [`RemoteMemory`] alone.
    ///
    /// Nothing is known about the descriptor: it may be no memory at all, shorter than `offset +
    /// size`, or shrink later.
    pub memory: Option<(OwnedFd, u64)>,
}

/// An eventfd that stands for writes to a part of a region: a doorbell that needs no message.
#[derive(Debug)]
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

/// What a server serves: one device function, behind whatever connector.
///
/// The server calls all of this from the thread that runs it, one call at a time, and does the
/// checks that need no knowledge of the device: indexes are below the counts of [`DeviceInfo`],
/// accesses lie within their region and are allowed by its [`RegionInfo`], ranges of interrupts lie
/// within their index, mappings do not overlap, and an unmap names a mapping exactly. What is left
/// to the target are its own rules, with an errno for each refusal; the client gets that errno.
///
/// No call may wait for the client: QEMU holds its global lock while it waits for the answer to an
/// access.
pub trait Target {
    /// What the device has. Cheap, and the same as long as a client is there.
    fn device_info(&self) -> DeviceInfo;

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

    /// The client offers memory.
    ///
    /// # Errors
    /// An errno for the client when the memory cannot be used. It then counts as not mapped.
    fn dma_map(&mut self, mapping: Mapping) -> Result<(), Errno>;

    /// The client takes a mapping back: when this returns, nothing of the device touches it any
    /// more.
    fn dma_unmap(&mut self, address: u64, size: u64);

    /// The client takes all mappings back.
    fn dma_unmap_all(&mut self);

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

    /// A client has come and agreed on the protocol. `memory` reaches its memory by message until
    /// it goes.
    fn connected(&mut self, memory: RemoteMemory) {
        let _ = memory;
    }

    /// The client that [`Target::connected`] told of is gone, in whatever way: mappings and
    /// eventfds are to be dropped. The next call, if any, is [`Target::connected`].
    fn disconnected(&mut self);
}
