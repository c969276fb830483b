// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A small device. The tests drive it only through the registers of its function.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use serde_json::Value;
use vbus_core::shm::abi::{bar0, command, error_code, event, reg};
use vbus_core::shm::ring::{DeviceEnd, DriverEnd, Entry, Layout, Return, Returns, SIGNAL_OFFSET};
use vbus_core::shm::signal::Armed;
use vbus_core::{
    Access, Bus, Connection, Device, Endpoint, ErrorCode, Executor, Identity, Interrupt,
    MemoryContext, Open, Progress, Region, Tuning, Window, state,
};
use vbus_pci::{IrqIndex, Options, PciFunction, device_function, region};

/// Gives back each entry with its `addr` inverted. An entry with a length is a violation. A call
/// reverses its buffer.
struct Mirror;

struct Mirroring(Option<(DeviceEnd<Window>, Interrupt)>);

impl Device for Mirror {
    fn identity(&self) -> Identity {
        Identity::user("mirror").with_features(0b101).with_vectors(3)
    }

    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, 4, 5, 6]
    }

    fn open(&self, _open: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(Mirroring(None)))
    }

    fn save(&self) -> Result<Value, String> {
        Ok(state::nothing())
    }

    fn restore(&self, saved: &Value) -> Result<(), String> {
        state::is_nothing(saved)
    }

    fn reopen(
        &self,
        _open: Open,
        regions: Vec<Region>,
        saved: &Value,
    ) -> Result<Box<dyn Connection>, String> {
        state::is_nothing(saved)?;
        let resume =
            |region: Region| Some((DeviceEnd::resume(region.window).ok()?.0, region.interrupt));
        Ok(Box::new(Mirroring(regions.into_iter().next().and_then(resume))))
    }
}

impl Connection for Mirroring {
    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
        self.0 = Some((DeviceEnd::attach(region.window)?, region.interrupt));
        Ok(())
    }

    fn region_dropped(&mut self, _handle: u32) -> Result<(), ErrorCode> {
        self.0 = None;
        Ok(())
    }

    fn call(&mut self, function: u32, flags: u32, buffer: &mut [u8]) -> Result<u64, ErrorCode> {
        buffer.reverse();
        Ok(u64::from(function) << 32 | u64::from(flags))
    }

    fn save(&mut self) -> Result<Value, String> {
        Ok(state::nothing())
    }

    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        let Some((ring, interrupt)) = &mut self.0 else { return Ok(Progress::Idle) };
        let mut progress = Progress::Idle;
        for _ in 0..budget {
            let Some(entry) = ring.take()? else { break };
            if entry.len != 0 {
                return Err(ErrorCode::CORRUPT);
            }
            // The driver gets back any 32 bits.
            ring.give_back(Return { len: !u32::try_from(entry.addr).unwrap(), ..entry.into() });
            progress = Progress::Busy;
        }
        if progress == Progress::Busy {
            interrupt.kick(ring.post());
        }
        Ok(progress)
    }

    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        Ok(self.0.as_mut().map_or(Armed::Waiting, |(ring, _)| ring.arm(0)))
    }

    fn disarm(&mut self) {
        if let Some((ring, _)) = &mut self.0 {
            ring.disarm();
        }
    }
}

const BASE: u64 = 0x10_0000;
const BYTES: u64 = 0x10_0000;

/// The function, and the memory of its driver.
pub struct Rig {
    pub function: PciFunction,
    pub endpoint: Arc<Endpoint>,
    file: OwnedFd,
    memory: MemoryContext,
    bus: Bus,
}

fn memory_file() -> OwnedFd {
    let fd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, BYTES).unwrap();
    fd
}

impl Rig {
    pub fn new(options: Options) -> Rig {
        Rig::on(memory_file(), options)
    }

    /// Another function of such a device, on a bus of its own, with the same memory.
    pub fn beside(other: &Rig, options: Options) -> Rig {
        Rig::on(other.file.try_clone().unwrap(), options)
    }

    fn on(file: OwnedFd, options: Options) -> Rig {
        let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).unwrap();
        let bus = Bus::new(executor, Vec::new());
        let endpoint = bus.add("m0", Arc::new(Mirror)).unwrap();
        let function = device_function(endpoint.clone(), options);
        let memory = MemoryContext::new();
        for map in [&memory, &**endpoint.memory()] {
            map.map(BASE, BYTES, Some((file.try_clone().unwrap(), 0)), Access::BOTH).unwrap();
        }
        Rig { function, endpoint, file, memory, bus }
    }

    pub fn read32(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.function.read(region::BAR0, offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn read64(&mut self, offset: u64) -> u64 {
        let mut data = [0; 8];
        self.function.read(region::BAR0, offset, &mut data);
        u64::from_le_bytes(data)
    }

    pub fn write32(&mut self, offset: u64, value: u32) {
        self.function.write(region::BAR0, offset, &value.to_le_bytes());
    }

    pub fn command(&mut self, number: u32, arguments: &[u64]) -> Result<u64, u32> {
        for (i, argument) in (0..).zip(arguments) {
            self.function.write(region::BAR0, reg::ARGUMENT + 8 * i, &argument.to_le_bytes());
        }
        self.write32(reg::COMMAND, number);
        match self.read32(reg::RESULT) {
            0 => Ok(self.read64(reg::VALUE)),
            error => Err(error),
        }
    }

    pub fn open(&mut self) -> Result<u64, u32> {
        self.memory.view().write(BASE, &77u64.to_le_bytes()).unwrap();
        self.command(command::OPEN, &[1, 0b100, BASE, 77])
    }

    /// Adds a ring as region 0 with interrupt vector `vector`.
    pub fn ring(&mut self, vector: u64) -> (DriverEnd<Window>, u64) {
        let layout = Layout::new(8, Returns::Entries).unwrap();
        let window = self.memory.window(BASE + 0x1000, layout.bytes() as u64).unwrap();
        let ring = DriverEnd::create(window, layout, 0).unwrap();
        let arguments = [vector << 32, BASE + 0x1000, layout.bytes() as u64, SIGNAL_OFFSET as u64];
        let handle = self.command(command::REGION_ADD, &arguments).unwrap();
        (ring, handle)
    }

    pub fn eventfd(&mut self, index: IrqIndex, number: u32) -> OwnedFd {
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        self.function.connect_irqs(index, number, vec![Some(fd.try_clone().unwrap())]).unwrap();
        fd
    }
}

/// Waits for an eventfd, and reads and clears its counter.
pub fn wait(fd: &OwnedFd) -> u64 {
    let timeout = Timespec::try_from(Duration::from_secs(20)).unwrap();
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout)).unwrap();
    let mut count = [0; 8];
    rustix::io::read(fd, &mut count).expect("no interrupt came");
    u64::from_ne_bytes(count)
}

/// Sends one entry and returns what came back. `acknowledge` runs between the interrupt and the
/// reaping.
pub fn exchange(
    rig: &mut Rig,
    ring: &mut DriverEnd<Window>,
    handle: u64,
    fd: &OwnedFd,
    value: u32,
) -> u32 {
    ring.submit(Entry { addr: value.into(), len: 0, id: 5, flags: 0 }).unwrap();
    let armed = ring.arm(0);
    if ring.post().is_wanted() {
        rig.write32(bar0::DOORBELLS + handle * bar0::DOORBELL_STRIDE, 0);
    }
    if armed == Armed::Waiting {
        wait(fd);
    }
    rig.write32(reg::INTERRUPT_ACK, 1);
    ring.reap().unwrap().expect("woken for nothing").len
}

#[test]
fn registers_tell_what_the_device_is() {
    let mut rig = Rig::new(Options::default());
    assert_eq!(rig.read32(reg::MAGIC), reg::MAGIC_VALUE);
    assert_eq!(rig.read32(reg::ABI), 0x0001_0001);
    assert_eq!(rig.read32(reg::CLASS), 0x8000);
    assert_eq!(rig.read64(reg::CLASS_NAME).to_le_bytes(), *b"mirror\0\0");
    assert_eq!(rig.read64(reg::NAME).to_le_bytes(), *b"m0\0\0\0\0\0\0");
    assert_eq!(rig.read64(reg::FEATURES), 0b101);
    assert_eq!((rig.read32(reg::FEATURES), rig.read32(reg::FEATURES + 4)), (0b101, 0));
    assert_eq!(rig.read32(reg::MAX_REGIONS), 8);
    assert_eq!(rig.read32(reg::VECTORS), 1);
    assert_eq!(rig.read64(reg::MAX_REGION_BYTES), 16 << 20);
    assert_eq!(rig.read32(reg::CONFIG_BYTES), 6);
    assert_eq!(rig.read64(reg::CONFIG), 0x0605_0403_0201);
    assert_eq!(rig.read32(reg::CONFIG_GENERATION), rig.read32(reg::CONFIG_GENERATION));
    // Accesses that are not of 4 or 8 aligned bytes read zeros.
    for (offset, len) in [(0u64, 1usize), (0, 2), (2, 4), (4, 8), (0, 16), (0, 4096)] {
        let mut data = vec![0xaa; len];
        rig.function.read(region::BAR0, offset, &mut data);
        assert!(data.iter().all(|b| *b == 0), "{len} at {offset}");
    }
}

#[test]
fn commands_answer_with_a_status_that_names_the_fault() {
    let mut rig = Rig::new(Options::default());
    assert_eq!(rig.command(99, &[]), Err(error_code::BAD_COMMAND));
    assert_eq!(
        rig.command(command::REGION_ADD, &[0, BASE, 64, u64::MAX]),
        Err(error_code::NOT_OPEN)
    );
    assert_eq!(rig.command(command::CALL, &[0, 0, 0]), Err(error_code::NOT_OPEN));
    assert_eq!(rig.command(command::CLOSE, &[]), Ok(0));
    assert_eq!(rig.command(command::OPEN, &[2, 0, BASE, 0]), Err(error_code::BAD_VERSION));
    assert_eq!(rig.command(command::OPEN, &[1, 0b10, BASE, 0]), Err(error_code::BAD_FEATURES));
    assert_eq!(rig.command(command::OPEN, &[1, 0, BASE + 4, 0]), Err(error_code::BAD_ALIGNMENT));
    assert_eq!(rig.command(command::OPEN, &[1, 0, BASE + BYTES, 0]), Err(error_code::BAD_ADDRESS));
    assert_eq!(rig.command(command::OPEN, &[1, 0, BASE, 12345]), Err(error_code::NOT_SHARED));
    assert_eq!(rig.read32(reg::CONNECTION), reg::CONNECTION_CLOSED);
    assert_eq!(rig.open(), Ok(0));
    assert_eq!(
        (rig.read32(reg::CONNECTION), rig.read64(reg::FEATURES_ACCEPTED)),
        (reg::CONNECTION_OPEN, 0b100)
    );
    assert_eq!(rig.open(), Err(error_code::ALREADY_OPEN));
    let add = |a0, a1, a2, a3| [a0, a1, a2, a3];
    for (arguments, fault) in [
        (add(1 << 56, BASE, 64, u64::MAX), error_code::BAD_ARGUMENT),
        (add(5 << 48, BASE, 64, u64::MAX), error_code::BAD_ARGUMENT),
        (add(3 << 32, BASE, 64, u64::MAX), error_code::BAD_VECTOR),
        (add(0, BASE, 0, u64::MAX), error_code::BAD_LENGTH),
        (add(0, BASE + 8, 64, u64::MAX), error_code::BAD_ALIGNMENT),
        (add(0, BASE, 256, 64), error_code::BAD_SIGNAL),
        (add(0, u64::MAX - 63, 64, u64::MAX), error_code::BAD_ADDRESS),
        (add(0, BASE, 64, u64::MAX), error_code::BAD_LAYOUT),
    ] {
        assert_eq!(rig.command(command::REGION_ADD, &arguments), Err(fault), "{arguments:x?}");
    }
    assert_eq!(rig.command(command::REGION_DROP, &[0]), Err(error_code::NO_REGION));
    rig.memory.view().write(BASE + 64, b"abc").unwrap();
    assert_eq!(rig.command(command::CALL, &[7 | 9 << 32, BASE + 64, 3]), Ok(7 << 32 | 9));
    let mut buffer = [0; 3];
    rig.memory.view().read(BASE + 64, &mut buffer).unwrap();
    assert_eq!(&buffer, b"cba");
    assert_eq!(rig.command(command::CALL, &[0, BASE, 65537]), Err(error_code::BAD_LENGTH));
    // The driver may write an argument as two halves, in any order.
    rig.write32(reg::ARGUMENT + 4, 0x89ab_cdef);
    rig.write32(reg::ARGUMENT, 0x0123_4567);
    assert_eq!(rig.read64(reg::ARGUMENT), 0x89ab_cdef_0123_4567);
}

#[test]
fn a_ring_goes_round_with_each_kind_of_interrupt() {
    let mut rig = Rig::new(Options { msix: true, express: false });
    rig.open().unwrap();
    let (mut ring, handle) = rig.ring(2);
    let intx = rig.eventfd(IrqIndex::Intx, 0);
    assert_eq!(exchange(&mut rig, &mut ring, handle, &intx, 1), !1);
    rig.function.mask_irq(IrqIndex::Intx, false).unwrap();
    assert_eq!(exchange(&mut rig, &mut ring, handle, &intx, 2), !2);
    let msi = rig.eventfd(IrqIndex::Msi, 0);
    assert_eq!(exchange(&mut rig, &mut ring, handle, &msi, 3), !3);
    let msix = rig.eventfd(IrqIndex::Msix, 2);
    assert_eq!(rig.read32(reg::VECTORS), 3);
    assert_eq!(exchange(&mut rig, &mut ring, handle, &msix, 4), !4);
    rig.function.disconnect_irqs(IrqIndex::Msix);
    // The doorbell's eventfd does the same without the connector.
    let doorbells = rig.function.io_eventfds(region::BAR0).unwrap();
    let bell = &doorbells[usize::try_from(handle).unwrap()];
    assert_eq!((bell.offset, doorbells.len()), (bar0::DOORBELLS + handle * 4, 8));
    ring.submit(Entry { addr: 6, len: 0, id: 5, flags: 0 }).unwrap();
    assert_eq!(ring.arm(0), Armed::Waiting);
    if ring.post().is_wanted() {
        rustix::io::write(&bell.fd, &1u64.to_ne_bytes()).unwrap();
    }
    wait(&msi);
    assert_eq!(ring.reap().unwrap().unwrap().len, !6);
    assert_eq!(rig.command(command::REGION_DROP, &[handle]), Ok(0));
}

#[test]
fn intx_pends_in_status_and_register_until_acknowledged() {
    let mut rig = Rig::new(Options::default());
    rig.open().unwrap();
    let (mut ring, handle) = rig.ring(0);
    let intx = rig.eventfd(IrqIndex::Intx, 0);
    ring.submit(Entry { addr: 1, len: 0, id: 0, flags: 0 }).unwrap();
    assert_eq!(ring.arm(0), Armed::Waiting);
    if ring.post().is_wanted() {
        rig.write32(bar0::DOORBELLS + handle * 4, 0);
    }
    wait(&intx);
    let status = |rig: &mut Rig| {
        let mut data = [0; 2];
        rig.function.read(region::CONFIG, 6, &mut data);
        u16::from_le_bytes(data)
    };
    assert_eq!((status(&mut rig), rig.read32(reg::INTERRUPT_PENDING)), (0x18, 1));
    // uio_pci_generic sets Interrupt Disable. The status stays.
    rig.function.write(region::CONFIG, 4, &0x0406u16.to_le_bytes());
    assert_eq!(status(&mut rig), 0x18);
    rig.write32(reg::INTERRUPT_ACK, 0);
    assert_eq!(
        (status(&mut rig), rig.read32(reg::INTERRUPT_PENDING)),
        (0x18, 0),
        "the pin is still up"
    );
    rig.function.mask_irq(IrqIndex::Intx, false).unwrap();
    assert_eq!((status(&mut rig), rig.read32(reg::INTERRUPT_PENDING)), (0x10, 0));
}

#[test]
fn eventfds_can_be_the_end_of_interrupt_and_mask_it() {
    let mut rig = Rig::new(Options::default());
    rig.open().unwrap();
    let (mut ring, handle) = rig.ring(0);
    let intx = rig.eventfd(IrqIndex::Intx, 0);
    let end = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
    for _ in 0..2 {
        rig.function.connect_mask(IrqIndex::Intx, false, Some(end.try_clone().unwrap())).unwrap();
    }
    ring.submit(Entry { addr: 1, len: 0, id: 0, flags: 0 }).unwrap();
    assert_eq!(ring.arm(0), Armed::Waiting);
    if ring.post().is_wanted() {
        rig.write32(bar0::DOORBELLS + handle * 4, 0);
    }
    // Without an acknowledgement, INTx fires again after each end: once, or twice if the write came
    // before the watch.
    for _ in 0..3 {
        assert!(wait(&intx) >= 1);
        rustix::io::write(&end, &1u64.to_ne_bytes()).unwrap();
    }
    assert!(wait(&intx) >= 1);
    assert!(rig.function.connect_mask(IrqIndex::Msi, false, None).is_err());
    rig.function.connect_mask(IrqIndex::Intx, false, None).unwrap();

    // Another eventfd masks INTx. Soon the function holds back the connector's own trigger.
    rig.write32(reg::INTERRUPT_ACK, 0);
    rig.function.mask_irq(IrqIndex::Intx, false).unwrap();
    rig.function.trigger_irq(IrqIndex::Intx, 0).unwrap();
    assert!(wait(&intx) >= 1);
    let mask = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
    rig.function.connect_mask(IrqIndex::Intx, true, Some(mask.try_clone().unwrap())).unwrap();
    rustix::io::write(&mask, &1u64.to_ne_bytes()).unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        rig.function.trigger_irq(IrqIndex::Intx, 0).unwrap();
        if rustix::io::read(&intx, &mut [0; 8]).is_err() {
            break;
        }
        assert!(Instant::now() < end, "the eventfd does not mask");
        std::thread::yield_now();
    }
}

#[test]
fn a_violation_breaks_the_connection_and_wakes_the_driver() {
    let mut rig = Rig::new(Options::default());
    rig.open().unwrap();
    let (mut ring, handle) = rig.ring(0);
    let msi = rig.eventfd(IrqIndex::Msi, 0);
    ring.submit(Entry { addr: 0, len: 1, id: 0, flags: 0 }).unwrap();
    if ring.post().is_wanted() {
        rig.write32(bar0::DOORBELLS + handle * 4, 0);
    }
    wait(&msi);
    assert_eq!(rig.read32(reg::CONNECTION), reg::CONNECTION_BROKEN | error_code::CORRUPT << 16);
    assert_eq!(rig.open(), Err(error_code::ALREADY_OPEN));
    assert_eq!(rig.command(command::CLOSE, &[]), Ok(0));
    assert_eq!(rig.open(), Ok(0));
}

#[test]
fn reset_and_the_peers_end_close_the_connection() {
    let mut rig = Rig::new(Options::default());
    rig.open().unwrap();
    rig.ring(0);
    rig.function.write(region::CONFIG, 0x10, &0xfeb0_0000u32.to_le_bytes());
    rig.function.reset();
    assert_eq!(
        (rig.read32(reg::CONNECTION), rig.read64(reg::ARGUMENT)),
        (reg::CONNECTION_CLOSED, 0)
    );
    let mut bar = [0; 4];
    rig.function.read(region::CONFIG, 0x10, &mut bar);
    assert_eq!(bar, [0; 4]);
    assert_eq!(rig.open(), Ok(0), "memory stays over a reset");
    rig.ring(0);
    rig.endpoint.unmap(BASE, BYTES);
    assert_eq!(rig.read32(reg::CONNECTION), reg::CONNECTION_BROKEN | error_code::REVOKED << 16);
    rig.function.disconnected();
    rig.endpoint.unmap_all();
    assert_eq!(rig.read32(reg::CONNECTION), reg::CONNECTION_CLOSED);
    assert_eq!(rig.open(), Err(error_code::BAD_ADDRESS), "memory goes with the peer");
}

#[test]
fn the_function_has_a_vector_of_its_own() {
    let mut rig = Rig::new(Options { msix: true, express: false });
    rig.memory.view().write(BASE, &77u64.to_le_bytes()).unwrap();
    // The vector is an argument of OPEN, and must be one that the device has.
    let open = |vector: u64| [1 | vector << 32, 0, BASE, 77];
    assert_eq!(rig.command(command::OPEN, &open(3)), Err(error_code::BAD_VECTOR));
    for a0 in [1 | 1 << 16, 1 | 1 << 31, 1 | 1 << 48] {
        let arguments = [a0, 0, BASE, 77];
        assert_eq!(rig.command(command::OPEN, &arguments), Err(error_code::BAD_ARGUMENT));
    }
    assert_eq!(rig.command(command::OPEN, &open(2)), Ok(0));
    let (mut ring, handle) = rig.ring(1);
    let queue = rig.eventfd(IrqIndex::Msix, 1);
    let own = rig.eventfd(IrqIndex::Msix, 2);
    // The function's vector reports the violation. Two registers tell the reason.
    ring.submit(Entry { addr: 0, len: 1, id: 0, flags: 0 }).unwrap();
    if ring.post().is_wanted() {
        rig.write32(bar0::DOORBELLS + handle * 4, 0);
    }
    assert_eq!(wait(&own), 1);
    assert!(rustix::io::read(&queue, &mut [0; 8]).is_err(), "not on the queue's");
    assert_eq!(rig.read32(reg::EVENTS), event::BROKEN);
    rig.write32(reg::EVENTS_ACK, !event::BROKEN);
    assert_eq!(rig.read32(reg::EVENTS), event::BROKEN, "only what is named is taken");
    rig.write32(reg::EVENTS_ACK, event::BROKEN);
    assert_eq!(rig.read32(reg::EVENTS), 0);
    assert_ne!(rig.read64(reg::INCARNATION), 0);
    rig.function.reset();
    rig.endpoint.reincarnate();
    assert_eq!(rig.read32(reg::EVENTS), 0, "nobody listens");
}

/// When a VMM restores a machine from a snapshot, the device sees only a reset.
#[test]
fn a_reset_under_an_open_connection_is_another_incarnation() {
    const COMMAND: u64 = 4;
    let mut rig = Rig::new(Options::default());
    let master = |rig: &mut Rig, on: bool| {
        rig.function.write(region::CONFIG, COMMAND, &[if on { 6 } else { 2 }, 0]);
    };
    let mut last = rig.read64(reg::INCARNATION);
    let mut changed = |rig: &mut Rig| {
        let before = std::mem::replace(&mut last, rig.read64(reg::INCARNATION));
        assert_ne!(last, 0);
        before != last
    };
    rig.function.reset();
    assert!(!changed(&mut rig), "nothing was open");
    rig.open().unwrap();
    rig.function.reset();
    assert!(changed(&mut rig), "the driver may go on");
    assert_eq!(rig.read32(reg::CONNECTION), reg::CONNECTION_CLOSED);
    rig.open().unwrap();
    rig.function.disconnected();
    assert!(changed(&mut rig), "the next client may bring the same driver");

    // QEMU clears Bus Master before it resets.
    master(&mut rig, true);
    rig.open().unwrap();
    master(&mut rig, false);
    rig.function.reset();
    assert!(changed(&mut rig));
    // A driver that reads the state after Bus Master was cleared knows that its connection has
    // ended.
    master(&mut rig, true);
    rig.open().unwrap();
    master(&mut rig, false);
    assert_eq!(rig.read32(reg::CONNECTION), reg::CONNECTION_CLOSED);
    rig.function.reset();
    assert!(!changed(&mut rig));
    rig.open().unwrap();
    assert_eq!(rig.command(command::CLOSE, &[]), Ok(0));
    rig.function.reset();
    assert!(!changed(&mut rig), "the driver has closed");
}

/// What a system does that starts, and what one does that goes on: see the BAR.
#[test]
fn a_guest_that_goes_on_after_a_reset_is_told_from_one_that_starts() {
    const COMMAND: u64 = 4;
    const BAR0: u64 = 0x10;
    const ADDRESS: u32 = 0xfeb0_0000;
    let mut rig = Rig::new(Options::default());
    let config = |rig: &mut Rig, at: u64, value: u32| {
        rig.function.write(region::CONFIG, at, &value.to_le_bytes());
    };
    // As QEMU does it: Bus Master, the reset, and zeros in the BARs.
    let reset = |rig: &mut Rig| {
        config(rig, COMMAND, 6);
        rig.open().unwrap();
        config(rig, COMMAND, 0);
        rig.function.reset();
        config(rig, BAR0, 0);
    };
    let count = |rig: &Rig| rig.endpoint.counters().set_back.get();
    reset(&mut rig);
    config(&mut rig, BAR0, u32::MAX);
    config(&mut rig, BAR0, ADDRESS);
    assert_eq!(count(&rig), 0, "a system that starts sizes the BAR");
    reset(&mut rig);
    assert_eq!(count(&rig), 0, "nobody knows yet");
    config(&mut rig, BAR0, ADDRESS);
    config(&mut rig, BAR0, ADDRESS);
    assert_eq!(count(&rig), 1, "a guest that goes on writes the address that it knows");
    // A driver in a process has no BAR.
    reset(&mut rig);
    rig.read32(reg::CONNECTION);
    config(&mut rig, BAR0, ADDRESS);
    assert_eq!(count(&rig), 1);
    // The driver has closed, or it has lost its connection before.
    for closes in [true, false] {
        rig.open().unwrap();
        if closes {
            assert_eq!(rig.command(command::CLOSE, &[]), Ok(0));
        }
        config(&mut rig, COMMAND, 6);
        config(&mut rig, COMMAND, 0);
        rig.read32(reg::CONNECTION);
        rig.function.reset();
        config(&mut rig, BAR0, ADDRESS);
        assert_eq!(count(&rig), 1, "closes: {closes}");
    }
    // The machine goes.
    reset(&mut rig);
    rig.function.disconnected();
    config(&mut rig, BAR0, ADDRESS);
    assert_eq!(count(&rig), 1);
}

#[test]
fn a_removed_device_says_so() {
    let mut rig = Rig::new(Options::default());
    rig.open().unwrap();
    rig.bus.remove("m0").unwrap();
    assert_eq!(rig.read32(reg::CONNECTION), reg::CONNECTION_BROKEN | error_code::REMOVED << 16);
    assert_eq!(rig.command(command::CLOSE, &[]), Ok(0));
    assert_eq!(rig.open(), Err(error_code::REMOVED));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// With an open connection, arbitrary reads and writes cause no panic, and the function still
    /// answers.
    #[test]
    fn any_access_is_harmless(
        msix: bool,
        express: bool,
        accesses in prop::collection::vec(
            (
                any::<bool>(),
                prop_oneof![Just(region::BAR0), Just(region::CONFIG), any::<u32>()],
                prop_oneof![0..0x4100u64, (0..64u64).prop_map(|i| 0x80 + i), any::<u64>()],
                prop_oneof![Just(4usize), Just(8), 0..40usize],
                prop_oneof![any::<u64>(), 0..8u64, (0..BYTES).prop_map(|i| BASE + i)],
            ),
            0..200,
        ),
    ) {
        let mut rig = Rig::new(Options { msix, express });
        rig.open().unwrap();
        for (write, region, offset, len, value) in accesses {
            let mut data: Vec<u8> = value.to_le_bytes().into_iter().cycle().take(len).collect();
            if write {
                rig.function.write(region, offset, &data);
            } else {
                rig.function.read(region, offset, &mut data);
            }
        }
        prop_assert_eq!(rig.read32(reg::MAGIC), reg::MAGIC_VALUE);
        prop_assert_eq!(rig.command(command::CLOSE, &[]), Ok(0));
        prop_assert_eq!(rig.open(), Ok(0));
    }
}
