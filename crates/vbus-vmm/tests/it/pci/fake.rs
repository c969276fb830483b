// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A server of a vbus function. Its device does nothing, and records the messages that it gets.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};
use vbus_pci_config::{Builder, CONVENTIONAL_BYTES, Header, MsixLayout};
use vbus_shm::abi::{PCI_DEVICE, PCI_VENDOR, bar0, reg};
use vfio_user_protocol::{
    DeviceInfo, Errno, IoEventFd, IrqAction, IrqInfo, Mapping, RegionInfo, Server, Target,
};

/// The number of doorbells, unless a test changes it.
pub(super) const DOORBELLS: u32 = 4;

pub(super) struct Device {
    pub(super) info: DeviceInfo,
    /// Sizes of the regions.
    pub(super) regions: [u64; 9],
    pub(super) irq_counts: [u32; 5],
    pub(super) config: Vec<u8>,
    pub(super) memory: Vec<u8>,
    pub(super) io: Vec<IoEventFd>,
    pub(super) clients: u32,
    pub(super) resets: u32,
    pub(super) command: u16,
    pub(super) interrupt_status: bool,
    /// Address and bytes.
    pub(super) maps: Vec<(u64, u64)>,
    pub(super) irqs: BTreeMap<(u32, u32), OwnedFd>,
    pub(super) unmask: Option<OwnedFd>,
    /// Region, offset, bytes.
    pub(super) writes: Vec<(u32, u64, Vec<u8>)>,
    /// Doorbells that came as messages.
    pub(super) rung: Vec<u64>,
}

pub(super) fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

pub(super) fn doorbell(fd: OwnedFd, number: u64) -> IoEventFd {
    IoEventFd::new(fd, bar0::DOORBELLS + 4 * number)
}

impl Device {
    fn new() -> Device {
        let mut memory = vec![0; 0x4000];
        memory[..4].copy_from_slice(&reg::MAGIC_VALUE.to_le_bytes());
        memory[0x50..0x54].copy_from_slice(&DOORBELLS.to_le_bytes());
        Device {
            info: DeviceInfo::PCI,
            regions: [0x4000, 0, 0, 0, 0, 0, 0, 256, 0],
            irq_counts: [1, 1, 8, 0, 0],
            config: config_space(),
            memory,
            io: (0..u64::from(DOORBELLS)).map(|number| doorbell(event(), number)).collect(),
            clients: 0,
            resets: 0,
            command: 0,
            interrupt_status: false,
            maps: Vec::new(),
            irqs: BTreeMap::new(),
            unmask: None,
            writes: Vec::new(),
            rung: Vec::new(),
        }
    }
}

/// The configuration space of a function with MSI-X, as a server of the bus gives it.
fn config_space() -> Vec<u8> {
    let header = Header {
        vendor: PCI_VENDOR,
        device: PCI_DEVICE,
        revision: 1,
        class: 0x02_0000,
        subsystem_vendor: PCI_VENDOR,
        subsystem: 1,
        interrupt_pin: 1,
    };
    let layout =
        MsixLayout { vectors: 8, table_bar: 0, table: 0x2000, pending_bar: 0, pending: 0x3000 };
    let vendor = [0, 1, b'v', b'b', b'u', b's', 0, 0, 0, 0, 1, 0, 4, 0, 0, 0x10, 0, 0];
    Builder::new(CONVENTIONAL_BYTES, &header)
        .bar(0, 0x4000)
        .vendor(0x40, &vendor)
        .msi(0x70, false)
        .msix(0x80, layout)
        .express(0x90)
        .build()
        .bytes()
        .to_vec()
}

/// Locks the device, also after a test has panicked with the lock held.
fn lock(device: &Mutex<Device>) -> MutexGuard<'_, Device> {
    device.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The device as its server has it.
struct Served(Arc<Mutex<Device>>);

impl Target for Served {
    fn device_info(&self) -> DeviceInfo {
        lock(&self.0).info
    }

    fn region_info(&self, region: u32) -> RegionInfo {
        let size = lock(&self.0).regions[region as usize];
        RegionInfo::new(size, size > 0, size > 0)
    }

    fn irq_info(&self, index: u32) -> IrqInfo {
        IrqInfo::messages(lock(&self.0).irq_counts[index as usize])
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let device = lock(&self.0);
        let at = usize::try_from(offset).unwrap();
        let from = if region == 7 { &device.config } else { &device.memory };
        data.copy_from_slice(from.get(at..at + data.len()).ok_or(Errno::IO)?);
        if region == 7 && at == 6 && device.interrupt_status {
            data[0] |= 8;
        }
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let device = &mut *lock(&self.0);
        device.writes.push((region, offset, data.to_vec()));
        let at = usize::try_from(offset).unwrap();
        match (region, at) {
            (7, 4) => device.command = u16::from_le_bytes([data[0], data[1]]),
            (0, 0x1000..0x2000) => device.rung.push((offset - 0x1000) / 4),
            (0, _) => {
                device.memory.get_mut(at..at + data.len()).ok_or(Errno::IO)?.copy_from_slice(data)
            }
            _ => {}
        }
        Ok(())
    }

    fn set_irqs(&mut self, index: u32, action: IrqAction) -> Result<(), Errno> {
        let device = &mut *lock(&self.0);
        match action {
            IrqAction::DisableAll => device.irqs.retain(|(i, _), _| *i != index),
            IrqAction::Connect { start, eventfds } => {
                let eventfds =
                    (start..).zip(eventfds).filter_map(|(number, fd)| Some(((index, number), fd?)));
                device.irqs.extend(eventfds);
            }
            IrqAction::ConnectUnmask { mut eventfds, .. } => {
                device.unmask = eventfds.pop().flatten()
            }
            other => panic!("{other:?} is not what this client does"),
        }
        Ok(())
    }

    fn dma_map(&mut self, mapping: Mapping<'_>) -> Result<(), Errno> {
        lock(&self.0).maps.push((mapping.address, mapping.size));
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Errno> {
        let device = &mut *lock(&self.0);
        device.resets += 1;
        device.command = 0;
        Ok(())
    }

    fn io_eventfd_count(&mut self, region: u32) -> usize {
        if region == 0 { lock(&self.0).io.len() } else { 0 }
    }

    fn io_eventfds(&mut self, region: u32, most: usize) -> Vec<IoEventFd> {
        let device = lock(&self.0);
        let copy = |io: &IoEventFd| {
            let mut copy = IoEventFd::new(io.fd.try_clone().unwrap(), io.offset);
            (copy.size, copy.datamatch) = (io.size, io.datamatch);
            copy
        };
        if region == 0 { device.io.iter().take(most).map(copy).collect() } else { Vec::new() }
    }

    fn connected(&mut self, _: BorrowedFd<'_>) {
        lock(&self.0).clients += 1;
    }

    fn disconnected(&mut self) {
        let device = &mut *lock(&self.0);
        device.clients -= 1;
        device.command = 0;
        device.maps.clear();
        device.irqs.clear();
        device.unmask = None;
    }
}

/// A server in its own thread. Dropping this value ends the server as a crash would.
pub(super) struct Fake {
    pub(super) path: PathBuf,
    _folder: tempfile::TempDir,
    device: Arc<Mutex<Device>>,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    pub(super) fn start() -> Fake {
        Fake::with_device(|_| ())
    }

    pub(super) fn with_device(change: impl FnOnce(&mut Device)) -> Fake {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fake.sock");
        let mut device = Device::new();
        change(&mut device);
        let device = Arc::new(Mutex::new(device));
        let stop = event();
        let mut server = Server::bind(&path, "fake", Served(device.clone())).unwrap();
        let stopped = stop.try_clone().unwrap();
        let thread = std::thread::spawn(move || server.run_until(stopped.as_fd()).unwrap());
        Fake { path, _folder: folder, device, stop, thread: Some(thread) }
    }

    pub(super) fn with<R>(&self, act: impl FnOnce(&mut Device) -> R) -> R {
        act(&mut lock(&self.device))
    }

    /// Interrupts as the device would. Returns false if the interrupt is not connected.
    pub(super) fn interrupt(&self, index: u32, number: u32) -> bool {
        self.with(|device| {
            let fd = device.irqs.get(&(index, number));
            fd.is_some_and(|fd| rustix::io::write(fd, &1u64.to_ne_bytes()).is_ok())
        })
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        rustix::io::write(&self.stop, &1u64.to_ne_bytes()).unwrap();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}
