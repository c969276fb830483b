// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The trait of the device that a server serves.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::fcntl_get_seals;
use rustix::io::Errno;

use crate::message::{DmaRange, LoggingReport, MigrationFlags};
use crate::migration::{ArcFailure, MigrationArc};
use crate::state::ServerState;

/// Numbers that VFIO gives to the regions and interrupt indexes of a PCI function.
pub mod pci {
    /// BAR 0. BARs 1 to 5 follow.
    pub const REGION_BAR0: u32 = 0;
    /// The expansion ROM.
    pub const REGION_ROM: u32 = 6;
    /// The configuration space.
    pub const REGION_CONFIG: u32 = 7;
    /// Number of regions. The last one is for VGA.
    pub const REGIONS: u32 = 9;

    /// The interrupt pin: one level-triggered interrupt.
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

/// The properties of the device (`DEVICE_GET_INFO`). It is always a PCI device.
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
    /// A PCI function that can be reset, with 9 regions and 5 interrupt indexes.
    pub const PCI: DeviceInfo =
        DeviceInfo { resettable: true, regions: pci::REGIONS, irqs: pci::IRQS };
}

/// The properties of a region of the device. The client can map no region. QEMU posts its writes
/// only to a device that has no such region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RegionInfo {
    /// Bytes. 0: the device does not have this region.
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

/// The properties of an interrupt index of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct IrqInfo {
    /// Number of interrupts. 0: the device has none of this kind.
    pub count: u32,
    /// The client can mask and unmask them.
    pub maskable: bool,
    /// An interrupt masks itself when it is triggered, and the client unmasks it (INTx).
    pub automasked: bool,
    /// The client connects all of them together. To connect more, it first disconnects all (MSI,
    /// MSI-X).
    pub fixed_size: bool,
}

impl IrqInfo {
    /// The interrupt pin of a PCI function: one interrupt, which masks itself when it is triggered.
    #[must_use]
    pub const fn intx() -> IrqInfo {
        IrqInfo { count: 1, maskable: true, automasked: true, fixed_size: false }
    }

    /// `count` message-signalled interrupts, which the client connects together.
    #[must_use]
    pub const fn messages(count: u32) -> IrqInfo {
        IrqInfo { count, maskable: false, automasked: false, fixed_size: true }
    }
}

/// A client's change of the interrupts of one index (`DEVICE_SET_IRQS`).
///
/// The server has checked the ranges against [`Target::irq_info`]. The number of an interrupt is
/// relative to its index. The descriptors are eventfds. The client also holds them, and can make
/// them blocking and fill them at any time.
#[derive(Debug)]
#[non_exhaustive]
pub enum IrqAction {
    /// Disconnect all eventfds of this index.
    DisableAll,
    /// Connect the interrupts from `start` on to these eventfds, or disconnect them (`None`). The
    /// device writes an eventfd to trigger its interrupt.
    Connect {
        /// First interrupt.
        start: u32,
        /// One per interrupt.
        eventfds: Vec<Option<OwnedFd>>,
    },
    /// Each write of one of these eventfds masks its interrupt, from `start` on.
    ConnectMask {
        /// First interrupt.
        start: u32,
        /// One per interrupt.
        eventfds: Vec<Option<OwnedFd>>,
    },
    /// Each write of one of these eventfds unmasks its interrupt, from `start` on.
    ConnectUnmask {
        /// First interrupt.
        start: u32,
        /// One per interrupt.
        eventfds: Vec<Option<OwnedFd>>,
    },
    /// Trigger these interrupts, as the device would.
    Trigger(Vec<u32>),
    /// Mask these interrupts.
    Mask(Vec<u32>),
    /// Unmask these interrupts. For INTx this is the end of the interrupt.
    Unmask(Vec<u32>),
}

/// Memory of the client that the device may use from now on (`DMA_MAP`).
///
/// Address and size are multiples of 4 KiB. Their sum does not overflow. The mapping does not
/// overlap another one.
#[derive(Debug)]
#[non_exhaustive]
pub struct Mapping<'a> {
    /// The address that the device uses.
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
    /// The server has not checked the descriptor. It may be no memory at all, be shorter than
    /// `offset + size`, or shrink later. A call on it, and its last close, may wait for ever,
    /// unless it is a file of a file system that the client cannot have made itself. A target that
    /// keeps it duplicates it.
    pub memory: Option<(BorrowedFd<'a>, u64)>,
}

/// An eventfd for a part of a region. A write of the eventfd has the effect of a write to the
/// region, without a message. It can be a doorbell.
#[derive(Debug)]
#[non_exhaustive]
pub struct IoEventFd {
    /// The eventfd. The server closes this descriptor after it has sent it.
    pub fd: OwnedFd,
    /// Offset in the region, in bytes.
    pub offset: u64,
    /// Bytes of the write. 0: any number.
    pub size: u64,
    /// The value of the write. `None`: any value.
    pub datamatch: Option<u64>,
}

impl IoEventFd {
    /// An eventfd for writes of any size and value at `offset`.
    #[must_use]
    pub fn new(fd: OwnedFd, offset: u64) -> IoEventFd {
        IoEventFd { fd, offset, size: 0, datamatch: None }
    }
}

/// One device function, which a server serves.
///
/// The server calls one method at a time, from the thread that runs the server. It has checked that
/// - indexes are below the counts of [`DeviceInfo`];
/// - an access lies within its region, and the region's [`RegionInfo`] allows it;
/// - a range of interrupts lies within its index;
/// - mappings do not overlap, and an unmap cuts none.
///
/// The target may refuse more. The client gets the errno that the target returns.
///
/// A method must not wait for the client. QEMU holds its global lock while it waits for the reply
/// to an access.
pub trait Target {
    /// The properties of the device. The result must not change while a client is connected. The
    /// call must be cheap.
    fn device_info(&self) -> DeviceInfo {
        DeviceInfo::PCI
    }

    /// The properties of a region, whose index is below [`DeviceInfo::regions`]. The call must be
    /// cheap.
    fn region_info(&self, region: u32) -> RegionInfo;

    /// The properties of an interrupt index, which is below [`DeviceInfo::irqs`]. The call must be
    /// cheap.
    fn irq_info(&self, index: u32) -> IrqInfo;

    /// Reads `data.len()` bytes, 1 to 1 MiB.
    ///
    /// # Errors
    /// An errno for the client: the target does not allow this read.
    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// Writes `data.len()` bytes, 1 to 1 MiB.
    ///
    /// # Errors
    /// An errno for the client: the target does not allow this write. A client that posted the
    /// write does not get the errno.
    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;

    /// Whether [`write`](Self::write) with these arguments may take longer than some ten
    /// microseconds. [`Server::ready_quick`](crate::Server::ready_quick) leaves such a write to
    /// [`Server::ready_long`](crate::Server::ready_long). The method itself is quick.
    fn is_long_write(&self, region: u32, offset: u64, data: &[u8]) -> bool {
        let _ = (region, offset, data);
        false
    }

    /// Changes the interrupts of an index.
    ///
    /// # Errors
    /// An errno for the client. A failed call has changed nothing.
    fn set_irqs(&mut self, index: u32, action: IrqAction) -> Result<(), Errno>;

    /// The most mappings that this device accepts, up to 65535. A client that names its own number
    /// gets the lower of the two as its limit. A client that names none has the limit 65535, so
    /// [`dma_map`](Self::dma_map) may see more mappings than this number.
    fn max_dma_maps(&self) -> u32 {
        crate::version::MAX_DMA_MAPS
    }

    /// The client shares memory. A device that reads and writes no memory can ignore it.
    ///
    /// # Errors
    /// An errno for the client: the device cannot use the memory. The memory is then not mapped.
    fn dma_map(&mut self, mapping: Mapping<'_>) -> Result<(), Errno> {
        // Without a look at the file it may be one whose close waits.
        match mapping.memory {
            Some((memory, _)) if !is_memory(memory) => Err(Errno::INVAL),
            _ => Ok(()),
        }
    }

    /// The client ends the mappings within this range, one or more. When this returns, the device
    /// no longer touches that memory.
    fn dma_unmap(&mut self, address: u64, size: u64) {
        let _ = (address, size);
    }

    /// The client ends all mappings, as [`dma_unmap`](Self::dma_unmap) does for one.
    fn dma_unmap_all(&mut self) {}

    /// Sets the device to its state after power-on. The mappings and the connected eventfds stay.
    ///
    /// # Errors
    /// An errno for the client.
    fn reset(&mut self) -> Result<(), Errno>;

    /// How many eventfds a region has whose writes have the effect of writes to it. The client pays
    /// for each with its share of the server's time.
    fn io_eventfd_count(&mut self, region: u32) -> usize {
        let _ = region;
        0
    }

    /// The first of these eventfds: `most` at most, which is no more than
    /// [`io_eventfd_count`](Self::io_eventfd_count).
    fn io_eventfds(&mut self, region: u32, most: usize) -> Vec<IoEventFd> {
        let _ = (region, most);
        Vec::new()
    }

    /// Which states of a migration the device has beside `RUNNING` and `ERROR`. `None`: the device
    /// has no state that could be moved, and the client learns that there is no migration. The call
    /// may take as long as that of an arc.
    fn migration(&mut self) -> Option<MigrationFlags> {
        None
    }

    /// Takes the device along an arc. The server has checked that the arc begins at the state in
    /// which the device is, and that [`migration`](Self::migration) has the states. A
    /// [`reset`](Self::reset) takes the device from any state to `RUNNING`, and
    /// [`disconnected`](Self::disconnected) does so too.
    ///
    /// # Errors
    /// The device refuses. Where it is then, the error says.
    fn migrate(&mut self, arc: MigrationArc) -> Result<(), ArcFailure> {
        let _ = arc;
        Err(ArcFailure::Unchanged(Errno::OPNOTSUPP))
    }

    /// Reads the next bytes of the stream of the device's state, 0 to 1 MiB, in the state
    /// `PRE_COPY` or `STOP_COPY`. Returns their number. Fewer than `data` has room for: there are
    /// no more, or in `PRE_COPY` no more before `STOP_COPY`.
    ///
    /// # Errors
    /// An errno for the client.
    fn migration_read(&mut self, data: &mut [u8]) -> Result<usize, Errno> {
        let _ = data;
        Err(Errno::OPNOTSUPP)
    }

    /// Takes the next bytes of the stream of a device's state, 0 to 1 MiB, in the state `RESUMING`.
    /// The client can write as often as it likes: the target must have a limit for all together.
    ///
    /// # Errors
    /// An errno for the client. The target has not taken the bytes.
    fn migration_write(&mut self, data: &[u8]) -> Result<(), Errno> {
        let _ = data;
        Err(Errno::OPNOTSUPP)
    }

    /// Whether the target can log which pages of the client's memory the device writes.
    fn logs_dma(&self) -> bool {
        false
    }

    /// Begins to log the pages that the device writes, within these ranges, or all if there are
    /// none. A write that is not logged is visible to the client when this returns. `page_size` is
    /// a power of two. The ranges do not wrap around and do not overlap, and there are at most
    /// [`MAX_LOGGING_RANGES`](crate::migration::MAX_LOGGING_RANGES). Returns the size of a page
    /// that the target logs. The log is off before, and [`disconnected`](Self::disconnected) turns
    /// it off.
    ///
    /// # Errors
    /// An errno for the client. The log stays off.
    fn dma_logging_start(&mut self, page_size: u64, ranges: &[DmaRange]) -> Result<u64, Errno> {
        let _ = (page_size, ranges);
        Err(Errno::OPNOTSUPP)
    }

    /// Ends the log. It is on before.
    fn dma_logging_stop(&mut self) {}

    /// Sets the bit in `bitmap` of each page that the device has written since the log began or
    /// since the page's last report. Bit `n % 64` of word `n / 64` stands for `report.page_size`
    /// bytes from `report.iova + n * report.page_size` on. All words are zero before, and there are
    /// [`report.words`](LoggingReport::words), at most 1 MiB. The log is on.
    ///
    /// A write of which the client reads the old bytes after this call is in a later report.
    ///
    /// # Errors
    /// An errno for the client: the log is not complete, and the client has to take all pages for
    /// written.
    fn dma_logging_report(
        &mut self,
        report: LoggingReport,
        bitmap: &mut [u64],
    ) -> Result<(), Errno> {
        let _ = (report, bitmap);
        Err(Errno::OPNOTSUPP)
    }

    /// A client has connected over `socket` and negotiated. The socket tells who it is
    /// (`SO_PEERCRED` and `SO_PEERPIDFD` of socket(7)).
    fn connected(&mut self, socket: BorrowedFd<'_>) {
        let _ = socket;
    }

    /// Gives duplicates of `fds` to somebody who outlives this process. They are all descriptors so
    /// far of the message `number`, which is not received yet. A later call replaces them. It may
    /// have none: then the former ones are of no use any more. Called only if the server
    /// has a [journal](crate::journal). The descriptors may be of anything, as in [`Mapping`].
    ///
    /// # Errors
    /// They cannot be kept. The client's command fails.
    fn hold(&mut self, number: u64, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let _ = (number, fds);
        Ok(())
    }

    /// The client that [`Target::connected`] announced has gone, for any reason. The target drops
    /// the client's mappings and eventfds, also those that the client did not take back. The next
    /// call, if any, is [`Target::connected`].
    fn disconnected(&mut self);

    /// Whether something has changed since the last [`commit`](Self::commit) that must outlast this
    /// process, however it ends. The call must be cheap. The provided method says no.
    fn wants_commit(&self) -> bool {
        false
    }

    /// Whether whoever goes on from the last [`commit`](Self::commit) has all that the client was
    /// told. Otherwise the client's connection ends there. The call must be cheap. The provided
    /// method says so unless the target [wants to commit](Self::wants_commit).
    fn is_committed(&self) -> bool {
        !self.wants_commit()
    }

    /// Puts the target and its server where they outlast this process: whoever goes on from there
    /// has all that the client was told. The server calls it if
    /// [`wants_commit`](Self::wants_commit), or if its own connections have changed, between two
    /// messages: when a message is handled, and before its reply is sent. `server` is the server as
    /// [`Server::save`](crate::Server::save) has it, without replies. It is an error while the
    /// client is moving the device to another server, or if this process has as many descriptors as
    /// it may have.
    fn commit(&mut self, server: io::Result<ServerState>) {
        let _ = server;
    }
}

/// Whether a descriptor is of a file in memory (memfd, tmpfs, hugetlbfs). Only these have seals.
fn is_memory(file: BorrowedFd<'_>) -> bool {
    fcntl_get_seals(file).is_ok()
}
