// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The transport, in front of a device that only notes what it is told.

use std::io;
use std::sync::{Arc, Mutex, Weak};

use proptest::prelude::*;
use vbus_core::{
    Bus, Connection, ConnectionState, Device, ErrorCode, Identity, Open, Progress, Task, TaskHandle,
};
use vbus_pci::{IrqIndex, Options, region};
use vbus_virtio::device::{
    Driver as OfDriver, Enabled, Kind, Session, Transport, VirtioDevice, feature,
};
use vbus_virtio::queue::Position;

use crate::driver::{
    Driver, FEATURES_OK, FOUND, NEEDS_RESET, RING_RESET, VERSION_1, eventually, field,
};

/// What has happened to the device.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    Start(u64),
    Enable(u16, u16),
    Disable(u16),
    End,
}

type Events = Arc<Mutex<Vec<Event>>>;
type Fail = Arc<dyn Fn(ErrorCode) + Send + Sync>;

/// A device with two queues. Each notification of a queue gives its chains back.
#[derive(Default)]
struct Noted {
    events: Events,
    transport: Mutex<Option<Weak<dyn Transport>>>,
    fail: Mutex<Option<Fail>>,
}

struct Noting {
    events: Events,
    driver: OfDriver,
    tasks: [Option<TaskHandle>; 2],
}

/// Gives back what comes.
struct Echo {
    enabled: Enabled,
    memory: Arc<vbus_core::MemoryContext>,
}

impl Task for Echo {
    fn poll(&mut self, _: u32) -> Result<Progress, ErrorCode> {
        let view = self.memory.view();
        let mut chain = vbus_virtio::queue::Chain::new();
        let bad = |_| ErrorCode::CORRUPT;
        let mut turn = self.enabled.queue.turn(&view).map_err(bad)?;
        let mut any = false;
        while turn.next(&mut chain).map_err(bad)? {
            turn.complete(&mut chain, 0);
            any = true;
        }
        if any {
            self.enabled.call.notify(turn.flush().is_wanted());
        }
        Ok(Progress::Idle)
    }
}

impl VirtioDevice for Noted {
    fn kind(&self) -> Kind {
        Kind {
            id: 1,
            pci_class: 0x02_00_00,
            queues: 2,
            queue_size: 64,
            features: VERSION_1 | RING_RESET | 1,
        }
    }

    fn config_bytes(&self) -> usize {
        6
    }

    fn attach(&self, transport: Weak<dyn Transport>) {
        let now = transport.upgrade().unwrap();
        *self.transport.lock().unwrap() = Some(transport);
        now.config_changed(vec![1, 2, 3, 4, 5, 6], true);
    }

    fn start(self: Arc<Self>, driver: OfDriver) -> Result<Box<dyn Session>, ErrorCode> {
        self.events.lock().unwrap().push(Event::Start(driver.features));
        *self.fail.lock().unwrap() = Some(driver.fail.clone());
        Ok(Box::new(Noting { events: self.events.clone(), driver, tasks: Default::default() }))
    }
}

impl Session for Noting {
    fn enable(&mut self, index: u16, enabled: Enabled) -> Result<(), ErrorCode> {
        self.events.lock().unwrap().push(Event::Enable(index, enabled.queue.layout().size));
        let (memory, doorbell) = (self.driver.memory.clone(), enabled.doorbell.clone());
        let fail = self.driver.fail.clone();
        let task = self.driver.executor.spawn(
            self.driver.worker,
            Box::new(Echo { enabled, memory }),
            self.driver.counters.clone(),
            move |code| fail(code),
        );
        doorbell.bind(&task)?;
        self.tasks[usize::from(index)] = Some(task);
        Ok(())
    }

    fn disable(&mut self, index: u16) -> Option<Position> {
        self.events.lock().unwrap().push(Event::Disable(index));
        self.tasks[usize::from(index)].take().unwrap().stop();
        None
    }
}

impl Drop for Noting {
    fn drop(&mut self) {
        self.tasks.iter().flatten().for_each(TaskHandle::stop);
        self.events.lock().unwrap().push(Event::End);
    }
}

/// The device of the bus, which lends its memory.
struct OnBus;

impl Device for OnBus {
    fn identity(&self) -> Identity {
        Identity::user("noted").with_regions(2).with_vectors(3)
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Err(ErrorCode::DENIED)
    }
}

struct Rig {
    driver: Driver,
    device: Arc<Noted>,
    _bus: Bus,
}

impl Rig {
    fn new(msix: bool) -> Rig {
        let bus = vbus_test_driver::bus(1, Vec::new());
        let endpoint = bus.add("noted", Arc::new(OnBus)).unwrap();
        let device = Arc::new(Noted::default());
        let options = Options { msix, express: false };
        let function = vbus_virtio::pci::function(device.clone(), endpoint.clone(), options);
        Rig { driver: Driver::new(endpoint, function), device, _bus: bus }
    }

    fn events(&self) -> Vec<Event> {
        std::mem::take(&mut *self.device.events.lock().unwrap())
    }

    fn transport(&self) -> Arc<dyn Transport> {
        self.device.transport.lock().unwrap().as_ref().unwrap().upgrade().unwrap()
    }

    fn state(&self) -> ConnectionState {
        self.driver.endpoint.state()
    }
}

/// A chain of one byte that the device may read.
fn one(driver: &mut Driver) -> [(u64, u32, bool); 1] {
    [(driver.memory.alloc(1), 1, false)]
}

#[test]
fn a_driver_starts_the_device_and_resets_it() {
    let mut rig = Rig::new(false);
    let driver = &mut rig.driver;
    assert_eq!(driver.offered(), VERSION_1 | RING_RESET | 1);
    assert_eq!(driver.get(field::NUM_QUEUES), 2);
    assert!(!driver.agree(VERSION_1 | 2) && !driver.agree(1) && driver.agree(VERSION_1 | 1));
    let mut queue = driver.queue(1, 16);
    let chain = one(driver);
    queue.add(&driver.memory, &chain);
    driver.notify(&queue);
    assert_eq!(queue.used(&driver.memory), None);
    assert_eq!(rig.events(), [], "nothing begins before DRIVER_OK");
    assert_eq!(rig.state(), ConnectionState::Closed);
    let driver = &mut rig.driver;
    driver.start();
    assert_eq!(driver.endpoint.state(), ConnectionState::Open);
    // What was made available before DRIVER_OK is found without a notification.
    assert_eq!(queue.wait(&driver.memory), (0, 0));
    let chain = one(driver);
    queue.add(&driver.memory, &chain);
    driver.notify(&queue);
    assert_eq!(queue.wait(&driver.memory), (4, 0));
    driver.set(field::STATUS, 0);
    assert_eq!((driver.status(), driver.get(field::NUM_QUEUES)), (0, 2));
    let chain = one(driver);
    queue.add(&driver.memory, &chain);
    driver.notify(&queue);
    let all = [Event::Start(VERSION_1 | 1), Event::Enable(1, 16), Event::End];
    assert_eq!(rig.events(), all);
    assert_eq!(rig.state(), ConnectionState::Closed);
    assert_eq!(queue.used(&rig.driver.memory), None, "after the reset nothing comes");
}

#[test]
fn intx_and_the_isr_status_go_together() {
    let mut rig = Rig::new(false);
    let transport = rig.transport();
    let driver = &mut rig.driver;
    let signal = driver.connect(IrqIndex::Intx, 0);
    transport.config_changed(vec![6, 5, 4, 3, 2, 1], true);
    assert!(!signal.take(), "no interrupt before DRIVER_OK");
    assert_eq!((driver.config(0, 6), driver.isr()), (0x0102_0304_0506, 0));
    assert!(driver.agree(VERSION_1));
    let mut queue = driver.queue(0, 16);
    driver.start();
    let before = driver.get(field::GENERATION);
    transport.config_changed(vec![6, 5, 4, 3, 2, 1], true);
    transport.config_changed(vec![1; 6], false);
    assert!(!signal.take(), "no change, or one that the driver made itself");
    assert_ne!(driver.get(field::GENERATION), before);
    transport.config_changed(vec![2; 6], true);
    assert!(signal.take());
    assert_eq!((driver.isr(), driver.isr()), (2, 0));
    driver.function.mask_irq(IrqIndex::Intx, false).unwrap();
    let chain = one(driver);
    queue.add(&driver.memory, &chain);
    driver.notify(&queue);
    signal.wait();
    assert_eq!(queue.wait(&driver.memory), (0, 0));
    let mut none = [];
    driver.function.read(region::BAR0, driver.parts.isr, &mut none);
    let mut status = [0; 2];
    driver.function.read(region::CONFIG, 6, &mut status);
    assert_eq!(status[0] & 8, 8, "Interrupt Status");
    assert_eq!(driver.isr(), 1, "a read of no bytes takes nothing");
    driver.function.mask_irq(IrqIndex::Intx, false).unwrap();
    driver.function.read(region::CONFIG, 6, &mut status);
    assert!(status[0] & 8 == 0 && !signal.take());
}

#[test]
fn each_queue_has_its_vector() {
    let mut rig = Rig::new(true);
    let transport = rig.transport();
    let driver = &mut rig.driver;
    let signals: Vec<_> = (0..3).map(|n| driver.connect(IrqIndex::Msix, n)).collect();
    assert!(driver.agree(VERSION_1));
    driver.set(field::CONFIG_VECTOR, 0);
    for (index, vector) in [(0, 2), (1, 3)] {
        driver.set(field::SELECT, index);
        driver.set(field::VECTOR, vector);
    }
    assert_eq!(driver.get(field::VECTOR), 0xffff, "there is no vector 3");
    let mut queue = driver.queue(0, 16);
    let _other = driver.queue(1, 16);
    driver.start();
    let chain = one(driver);
    queue.add(&driver.memory, &chain);
    driver.notify(&queue);
    signals[2].wait();
    transport.queue_used(1);
    transport.queue_used(7);
    transport.config_changed(vec![9; 6], true);
    let taken: Vec<_> = signals.iter().map(|signal| signal.take()).collect();
    assert_eq!(taken, [true, false, false]);
    driver.set(field::STATUS, 0);
    driver.set(field::SELECT, 0);
    assert_eq!((driver.get(field::VECTOR), driver.get(field::CONFIG_VECTOR)), (0xffff, 0xffff));
}

#[test]
fn a_queue_is_reset_alone() {
    let mut rig = Rig::new(false);
    let driver = &mut rig.driver;
    assert!(driver.agree(VERSION_1 | RING_RESET));
    let _first = driver.queue(0, 16);
    let mut second = driver.queue(1, 16);
    driver.start();
    driver.set(field::RESET, 1);
    assert_eq!((driver.get(field::RESET), driver.get(field::ENABLE)), (0, 0));
    let chain = one(driver);
    second.add(&driver.memory, &chain);
    driver.notify(&second);
    let mut again = driver.queue(1, 32);
    let chain = one(driver);
    again.add(&driver.memory, &chain);
    driver.notify(&again);
    assert_eq!(again.wait(&driver.memory), (0, 0));
    assert_eq!(second.used(&driver.memory), None);
    let driver_features = VERSION_1 | RING_RESET;
    let all = [
        Event::Start(driver_features),
        Event::Enable(0, 16),
        Event::Enable(1, 16),
        Event::Disable(1),
        Event::Enable(1, 32),
    ];
    assert_eq!(rig.events(), all);
}

/// The lines of warnings and errors that this thread writes to the log while `work` runs.
fn warnings(work: impl FnOnce()) -> Vec<String> {
    let log = LogFile::default();
    let to = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_max_level(tracing::Level::WARN)
        .with_writer(move || to.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, work);
    let bytes = log.0.lock().unwrap().clone();
    String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect()
}

/// A log in memory.
#[derive(Clone, Default)]
struct LogFile(Arc<Mutex<Vec<u8>>>);

impl io::Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn an_error_needs_a_reset() {
    let mut rig = Rig::new(false);
    let signal = rig.driver.connect(IrqIndex::Intx, 0);
    let driver = &mut rig.driver;
    // A queue that is not aligned.
    assert!(driver.agree(VERSION_1));
    driver.set(field::SELECT, 0);
    driver.set(field::DESC, 8);
    driver.set(field::ENABLE, 1);
    let log = warnings(|| driver.start());
    assert!(log.len() == 1 && log[0].contains("queue 0 cannot be used"), "{log:?}");
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(driver.endpoint.state(), ConnectionState::Broken(ErrorCode::BAD_LAYOUT));
    assert!(signal.take());
    assert_eq!(driver.isr(), 2);
    driver.function.mask_irq(IrqIndex::Intx, false).unwrap();
    // A queue whose driver breaks the rules.
    assert!(driver.agree(VERSION_1));
    let mut queue = driver.queue(0, 16);
    driver.start();
    queue.add(&driver.memory, &[(1, 0, false)]);
    driver.notify(&queue);
    signal.wait();
    assert_eq!(driver.isr(), 2);
    assert_eq!(driver.status(), NEEDS_RESET | FOUND | FEATURES_OK | 4);
    let events = rig.events();
    assert_eq!(events.last(), Some(&Event::End));
    // An error of a session that has ended says nothing of the next.
    let late = rig.device.fail.lock().unwrap().take().unwrap();
    assert!(rig.driver.agree(VERSION_1));
    let _queue = rig.driver.queue(0, 16);
    rig.driver.start();
    late(ErrorCode::CORRUPT);
    assert_eq!((rig.state(), rig.driver.status()), (ConnectionState::Open, 0xf));
    assert_eq!(rig.driver.endpoint.counters().broken.get(), 2);
}

#[test]
fn the_end_of_bus_master_ends_the_session() {
    let mut rig = Rig::new(false);
    let driver = &mut rig.driver;
    driver.function.write(region::CONFIG, 4, &[6, 0]);
    assert!(driver.agree(VERSION_1));
    let _queue = driver.queue(0, 16);
    driver.start();
    assert!(driver.function.is_long_write(region::CONFIG, 4, &[2, 0]));
    driver.function.write(region::CONFIG, 4, &[2, 0]);
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(rig.events().last(), Some(&Event::End));
    assert_eq!(rig.state(), ConnectionState::Closed);
}

#[test]
fn the_window_leads_to_bar0() {
    let mut rig = Rig::new(false);
    let driver = &mut rig.driver;
    let (window, common) = (driver.parts.window, driver.parts.common);
    let aim = |driver: &mut Driver, bar: u8, offset: u64, len: u32| {
        driver.function.write(region::CONFIG, window + 4, &[bar]);
        driver.function.write(region::CONFIG, window + 8, &offset.to_le_bytes()[..4]);
        driver.function.write(region::CONFIG, window + 12, &len.to_le_bytes());
    };
    let read = |driver: &mut Driver| {
        let mut data = [0; 4];
        driver.function.read(region::CONFIG, window + 16, &mut data);
        u32::from_le_bytes(data)
    };
    aim(driver, 0, common + field::NUM_QUEUES.0, 2);
    assert_eq!(read(driver), 2);
    aim(driver, 0, common + field::STATUS.0, 1);
    assert!(driver.function.is_long_write(region::CONFIG, window + 16, &[3, 0, 0, 0]));
    driver.function.write(region::CONFIG, window + 16, &[3, 0, 0, 0]);
    assert_eq!((driver.status(), read(driver)), (3, 3));
    aim(driver, 0, driver.parts.device, 4);
    assert_eq!(read(driver), 0x0403_0201);
    for (bar, offset, len) in
        [(1, 0, 4), (6, 0, 4), (0, 0x8000, 4), (0, 2, 4), (0, 0, 3), (0, 0, 0)]
    {
        aim(driver, bar, offset, len);
        driver.function.write(region::CONFIG, window + 16, &[0xff; 4]);
        assert!(matches!(read(driver), 0 | 0xffff_ffff), "{bar} {offset:#x} {len}");
    }
    assert_eq!(driver.status(), 3);
}

#[test]
fn an_eventfd_is_a_notification() {
    let mut rig = Rig::new(false);
    let driver = &mut rig.driver;
    let eventfds = driver.function.io_eventfds(region::BAR0).unwrap();
    let offsets: Vec<_> = eventfds.iter().map(|eventfd| eventfd.offset).collect();
    assert_eq!(offsets, [driver.parts.notify, driver.parts.notify + 4]);
    assert!(driver.agree(VERSION_1));
    let mut queue = driver.queue(1, 16);
    driver.start();
    let chain = one(driver);
    queue.add(&driver.memory, &chain);
    rustix::io::write(&eventfds[1].fd, &1u64.to_ne_bytes()).unwrap();
    assert_eq!(queue.wait(&driver.memory), (0, 0));
    // The next peer gets eventfds that the former one cannot reach.
    driver.function.disconnected();
    let fresh = driver.function.io_eventfds(region::BAR0).unwrap();
    assert!(!Arc::ptr_eq(&fresh[1].fd, &eventfds[1].fd));
}

#[test]
fn the_device_has_left_the_memory_when_it_is_unmapped() {
    let mut rig = Rig::new(false);
    let driver = &mut rig.driver;
    assert!(driver.agree(VERSION_1));
    let mut queue = driver.queue(0, 16);
    driver.start();
    let chain = one(driver);
    queue.add(&driver.memory, &chain);
    driver.notify(&queue);
    queue.wait(&driver.memory);
    driver.endpoint.unmap_all();
    driver.notify(&queue);
    eventually("the device to find that its queue is gone", || {
        (driver.status() & NEEDS_RESET != 0).then_some(())
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a guest writes and reads, nothing panics, and a reset brings the device back.
    #[test]
    fn any_accesses(accesses in prop::collection::vec(
        (prop_oneof![0u64..0x60, 0x1000u64..0x1004, 0x2000u64..0x2040, 0x3000u64..0x3010,
            0u64..0x9000], prop::collection::vec(any::<u8>(), 0..10), any::<bool>(), any::<bool>()),
        0..200,
    )) {
        let mut rig = Rig::new(true);
        let driver = &mut rig.driver;
        for (offset, mut data, write, config) in accesses {
            let (region, offset) = if config {
                (region::CONFIG, 0x40 + offset % 0xc0)
            } else {
                (region::BAR0, offset)
            };
            driver.function.is_long_write(region, offset, &data);
            match write {
                true => driver.function.write(region, offset, &data),
                false => driver.function.read(region, offset, &mut data),
            }
        }
        prop_assert!(driver.agree(VERSION_1));
        let mut queue = driver.queue(0, 16);
        driver.start();
        let chain = one(driver);
        queue.add(&driver.memory, &chain);
        driver.notify(&queue);
        prop_assert_eq!(queue.wait(&driver.memory), (0, 0));
        prop_assert_eq!(feature::VERSION_1, VERSION_1);
    }
}
