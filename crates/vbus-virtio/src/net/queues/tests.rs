// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Queues that the kernel serves, beside a double of it.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use serde_json::{Value, json};
use vbus_core::memory::PAGE;
use vbus_core::settings::Settings;
use vbus_core::{Access, Executor, Host, MemoryContext, Tuning};
use vbus_net::front::{Config, Nic};
use vbus_net::{Backend, Mac, Offloads, Packet, Plug, Port, Queue as BackendQueue, Sent};

use super::super::card::Offer;
use super::super::kernel_double::Kernel;
use super::super::session::NicSession;
use super::super::session::tests::{NoTransport, wait};
use super::super::vhost::Vhost;
use super::*;
use crate::device::{Driver, Session, VirtioDevice};
use crate::net::card::VirtioNic;

/// A back end with an interface that is set up when the test says so.
#[derive(Clone)]
struct Interface(Arc<Wire>);

struct Wire {
    fd: OwnedFd,
    /// Settings that wait for their end.
    set_up: Mutex<Vec<Done>>,
    /// The frames that this process has sent.
    sent: AtomicU32,
}

impl Backend for Interface {
    fn tx_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn rx_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn steers(&self) -> bool {
        true
    }

    fn kernel_queue(&self, _: u16) -> Option<BorrowedFd<'_>> {
        Some(self.0.fd.as_fd())
    }

    fn plug(&self, _: Arc<Port>) -> Result<Arc<dyn Plug>, ErrorCode> {
        Ok(Arc::new(self.clone()))
    }

    fn inspect(&self) -> Value {
        Value::Null
    }
}

impl Plug for Interface {
    fn queue(&self, _: u16, _: &TaskHandle) -> Result<Box<dyn BackendQueue>, ErrorCode> {
        Ok(Box::new(self.clone()))
    }

    fn configure(&self, _: u16, _: Offloads, done: Done) -> Result<(), ErrorCode> {
        lock(&self.0.set_up).push(done);
        Ok(())
    }

    fn set_mac(&self, _: Mac) -> bool {
        true
    }
}

impl BackendQueue for Interface {
    fn send(&mut self, _: &Packet<'_>) -> Sent {
        self.0.sent.fetch_add(1, Ordering::Relaxed);
        Sent::Done { units: 1 }
    }
}

/// Where the ring of queue `index` is: a page for each, with its buffers.
fn layout(index: u16) -> Layout {
    let base = u64::from(index) * PAGE;
    Layout {
        format: Format::Split,
        size: 8,
        descriptors: base,
        driver_area: base + 0x400,
        device_area: base + 0x800,
    }
}

/// Bytes of a frame with its header.
const FRAME: u32 = 12 + 60;

const FEATURES: u64 = common::VERSION_1 | feature::MQ | feature::CTRL_VQ;

fn driver(host: &Host) -> Driver {
    Driver::new(host, FEATURES, |code| panic!("the session failed: {code}"))
}

/// A card, whose frames the kernel carries.
struct Rig {
    wire: Interface,
    kernel: Kernel,
    card: Arc<VirtioNic>,
}

impl Rig {
    fn new() -> Rig {
        let fd = rustix::pipe::pipe().unwrap().0;
        let wire = Wire { fd, set_up: Mutex::default(), sent: AtomicU32::new(0) };
        let wire = Interface(Arc::new(wire));
        let mut settings = Settings::new(
            &json!({ "backend": "null", "queue-pairs": 2, "mac": "02:00:00:00:00:01" }),
        )
        .unwrap();
        let config = Config::take(&mut settings).unwrap();
        let nic = Nic::new("n", config, Arc::default(), Box::new(wire.clone()));
        let kernel = Kernel::new(2);
        let vhost = Vhost::with("n", 2, kernel.ends());
        let offer = Offer { packed: false, rss: false, whole: true };
        let card = Arc::new(VirtioNic::new(nic, offer, vhost));
        Rig { wire, kernel, card }
    }
}

/// A driver with two queue pairs, whose frames the kernel carries.
struct Lab {
    memory: Arc<MemoryContext>,
    host: Host,
    rig: Rig,
    session: NicSession,
    /// That of a card that goes on for the first one.
    later: Option<Box<dyn Session>>,
    /// The frames that each transmit ring has got.
    placed: [u16; 2],
}

impl Lab {
    /// The interface is not set up yet.
    fn new() -> Lab {
        let rig = Rig::new();
        let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).unwrap();
        let host = Host::new("n", executor, 1, 5);
        let memory = host.memory().clone();
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 4 * PAGE).unwrap();
        memory.map(0, 4 * PAGE, Some((file, 0)), Access::BOTH).unwrap();
        let session = NicSession::start(rig.card.clone(), driver(&host)).unwrap();
        let mut lab = Lab { memory, host, rig, session, later: None, placed: [0; 2] };
        for index in 0..4 {
            let queue = Queue::new(layout(index), RingFeatures::of(FEATURES)).unwrap();
            let enabled = lab.enabled(index, queue);
            lab.session.enable(index, enabled).unwrap();
        }
        lab.use_pairs(2);
        lab
    }

    fn enabled(&self, index: u16, queue: Queue) -> Enabled {
        let doorbell = self.host.doorbells().doorbell(index.into());
        let call = Call::new(Arc::new(NoTransport), index, self.host.counters().clone());
        Enabled { queue, doorbell, call }
    }

    /// The card is quiesced, and saved, and another one goes on, which is still quiesced.
    fn move_on(&mut self) {
        self.rig.card.quiesce();
        let saved = self.session.save().unwrap();
        assert_eq!(saved.queues.len(), 4);
        self.rig = Rig::new();
        self.rig.card.quiesce();
        let card: Arc<dyn VirtioDevice> = self.rig.card.clone();
        let mut session = card.restart(driver(&self.host), &saved.own).unwrap();
        for (index, state) in &saved.queues {
            let features = RingFeatures::of(FEATURES);
            let (queue, taken) = Queue::resume(layout(*index), features, state).unwrap();
            session.enable_again(*index, self.enabled(*index, queue), taken).unwrap();
        }
        session.restored().unwrap();
        self.later = Some(session);
    }

    /// The interface is as the queues wanted it last.
    fn set_up(&self) {
        let done = wait("a wish", || {
            let done: Vec<Done> = std::mem::take(&mut lock(&self.rig.wire.0.set_up));
            (!done.is_empty()).then_some(done)
        });
        done.into_iter().for_each(|done| done(Ok(())));
    }

    /// Uses so many pairs.
    fn use_pairs(&self, pairs: u16) {
        let queues = self.session.queues();
        let before = queues.work().receiver.choices();
        assert!(queues.work().set_queues(pairs));
        queues.configure_since(before).unwrap();
    }

    /// Places a frame in the transmit ring of `pair`, and kicks.
    fn send(&mut self, pair: u16) {
        let index = pair * 2 + 1;
        let Layout { descriptors, driver_area, size, .. } = layout(index);
        let placed = &mut self.placed[usize::from(pair)];
        let slot = u64::from(*placed % size);
        *placed += 1;
        let view = self.memory.view();
        let buffer = [u64::from(index) * PAGE + 0xc00, u64::from(FRAME)];
        view.write(descriptors + 16 * slot, &buffer.map(u64::to_le_bytes).concat()).unwrap();
        let id = u16::try_from(slot).unwrap();
        view.write(driver_area + 4 + 2 * slot, &id.to_le_bytes()).unwrap();
        view.write(driver_area + 2, &placed.to_le_bytes()).unwrap();
        drop(view);
        self.host.doorbells().ring(index.into());
    }

    /// The frames of the transmit ring of `pair` that the driver has back.
    fn back(&self, pair: u16) -> u16 {
        let mut index = [0; 2];
        self.memory.view().read(layout(pair * 2 + 1).device_area + 2, &mut index).unwrap();
        u16::from_le_bytes(index)
    }

    /// Waits until the driver has all its frames back. The kernel is at work meanwhile.
    fn all_back(&self) {
        wait("the frames", || {
            self.rig.kernel.run(&self.memory);
            ([0, 1].map(|pair| self.back(pair)) == self.placed).then_some(())
        });
    }

    fn sent_here(&self) -> u32 {
        self.rig.wire.0.sent.load(Ordering::Relaxed)
    }
}

/// The kernel sees a ring's kick before it has the interface. Whoever waits for the frame sends no
/// other one.
#[test]
fn a_frame_that_comes_before_the_kernel_begins_needs_no_second_kick() {
    let mut lab = Lab::new();
    lab.send(0);
    assert_eq!(lab.rig.kernel.served(), 0);
    lab.set_up();
    assert_eq!(lab.rig.kernel.served(), 4);
    assert_eq!(lab.rig.kernel.run(&lab.memory), [1, 0]);
    assert_eq!(lab.back(0), 1);
    lab.send(1);
    assert_eq!(lab.rig.kernel.run(&lab.memory), [1, 1]);
    assert_eq!(lab.back(1), 1);
}

/// A driver that uses fewer pairs gets back what it had placed before.
#[test]
fn frames_of_a_pair_that_is_not_used_any_more_come_back() {
    let mut lab = Lab::new();
    lab.set_up();
    for pair in [0, 1] {
        lab.send(pair);
    }
    lab.all_back();
    lab.send(1);
    lab.use_pairs(1);
    lab.send(1);
    lab.all_back();
    lab.set_up();
    assert_eq!(lab.rig.kernel.served(), 2, "those of the pair in use");
    for pair in [0, 1, 1] {
        lab.send(pair);
    }
    lab.all_back();
    assert_eq!(lab.rig.kernel.run(&lab.memory), [2, 1], "the rest was this process's");
    // The kernel goes on where this process was.
    lab.use_pairs(2);
    lab.send(1);
    lab.set_up();
    assert_eq!(lab.rig.kernel.served(), 4);
    let others = lab.sent_here();
    for pair in [0, 1] {
        lab.send(pair);
    }
    lab.all_back();
    assert_eq!(lab.sent_here(), others);
}

/// While the card is quiesced, the kernel touches nothing of the driver's, and it misses nothing.
#[test]
fn a_card_that_is_quiesced_has_no_queue_in_the_kernel() {
    let mut lab = Lab::new();
    lab.set_up();
    lab.send(0);
    lab.rig.card.quiesce();
    assert_eq!(lab.rig.kernel.served(), 0);
    for pair in [0, 1] {
        lab.send(pair);
    }
    lab.rig.kernel.run(&lab.memory);
    assert_eq!([0, 1].map(|pair| lab.back(pair)), [0, 0]);
    let saved = lab.session.save().unwrap();
    assert!(saved.queues.values().all(|queue| queue.in_flight.is_empty()));
    lab.rig.card.resume();
    assert_eq!(lab.rig.kernel.served(), 4);
    assert_eq!(lab.rig.kernel.run(&lab.memory), [2, 1]);
    lab.all_back();
    assert_eq!(lab.sent_here(), 0);
}

/// A card goes on for another one, and its kernel where the other one's was.
#[test]
fn another_kernel_goes_on_where_the_first_one_was() {
    let mut lab = Lab::new();
    lab.set_up();
    for pair in [0, 1, 0] {
        lab.send(pair);
    }
    lab.all_back();
    lab.send(1);
    lab.move_on();
    // The kernel has nothing yet, whatever the back end says. No endpoint halts the tasks here, so
    // that one may have taken the frame of before.
    lab.set_up();
    let here = lab.sent_here();
    lab.send(0);
    assert_eq!(lab.rig.kernel.served(), 0);
    lab.rig.card.resume();
    assert_eq!(lab.rig.kernel.served(), 4);
    let before = 1 - here;
    assert_eq!(lab.rig.kernel.run(&lab.memory), [1, before]);
    lab.all_back();
    assert_eq!(lab.sent_here(), here);
}

/// The kernel logs nothing of what it writes. So it has no queue meanwhile, and gets them again.
#[test]
fn the_kernel_has_no_queue_while_what_is_written_is_logged() {
    let mut lab = Lab::new();
    lab.set_up();
    lab.send(1);
    lab.memory.start_log(&[]).unwrap();
    assert_eq!(lab.rig.kernel.served(), 0);
    lab.set_up();
    for pair in [0, 1] {
        lab.send(pair);
    }
    lab.all_back();
    assert!(lab.sent_here() >= 2);
    lab.memory.stop_log();
    lab.set_up();
    assert_eq!(lab.rig.kernel.served(), 4);
    let before = lab.sent_here();
    for pair in [0, 1] {
        lab.send(pair);
    }
    lab.all_back();
    assert_eq!(lab.sent_here(), before);
}
