// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A network card at work for one driver.

use std::convert::Infallible;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_core::{ErrorCode, Task, TaskHandle, lock, state};
use vbus_net::front::{Pairs, PairsState, Receiver, ReceiverState, Setup};
use vbus_net::{Filter, Mac, Steering, is_group};

use super::abi::{config, feature};
use super::card::VirtioNic;
use super::command::{LISTED_MAX, Wanted, WantedState};
use super::control::{Control, ControlTask};
use super::offloads;
use super::queues::Queues;
use super::work::{CoalescingState, Work};
use crate::device::{
    Again, Driver, Enabled, Kind, Record, SavedSession, Session, Transport, Unsaved, VirtioDevice,
};
use crate::queue::{Chain, Position};
use crate::vhost_user::NetworkCard;

impl VirtioDevice for VirtioNic {
    fn kind(&self) -> Kind {
        VirtioNic::kind(self)
    }

    fn config_bytes(&self) -> usize {
        config::BYTES
    }

    fn attach(&self, transport: Weak<dyn Transport>) {
        VirtioNic::attach(self, transport);
    }

    fn start(self: Arc<Self>, driver: Driver) -> Result<Box<dyn Session>, ErrorCode> {
        Ok(Box::new(NicSession::start(self, driver)?))
    }

    fn restart(self: Arc<Self>, driver: Driver, saved: &Value) -> Result<Box<dyn Session>, String> {
        Ok(Box::new(NicSession::restart(self, driver, saved)?))
    }
}

/// A session as plain data (spec/state-format.md, "virtio-net").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    receiver: ReceiverState,
    wanted: WantedState,
    coalescing: CoalescingState,
    pairs: PairsState,
}

impl NetworkCard for VirtioNic {
    fn mtu(&self) -> u16 {
        self.nic().config.mtu
    }

    fn send_rarp(&self, mac: Mac) {
        self.send_own(rarp(mac));
    }
}

/// A request of RARP (RFC 903) for the address `mac`, from there to all.
fn rarp(mac: Mac) -> Vec<u8> {
    const TYPE: [u8; 2] = 0x8035_u16.to_be_bytes();
    // Ethernet, IPv4, the lengths of their addresses, and "request reverse".
    const HEAD: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 3];
    let mut frame = [&[0xff; 6], &mac[..], &TYPE, &HEAD, &mac, &[0; 4], &mac, &[0; 4]].concat();
    frame.resize(60, 0); // The shortest frame.
    frame
}

/// A session. It has the rings of the queues that the driver has enabled.
pub struct NicSession {
    work: Arc<Work>,
    queues: Arc<Queues>,
    control: Option<(TaskHandle, Arc<Mutex<Control>>)>,
    /// What another session had, until this one has its queues.
    saved: Option<Saved>,
    /// Who gets the driver's choices when the session has its queues again.
    record: Option<Record>,
}

impl NicSession {
    /// Plugs the driver in.
    pub fn start(card: Arc<VirtioNic>, driver: Driver) -> Result<NicSession, ErrorCode> {
        let session = NicSession::plug_in(card, driver)?;
        // The rings come next. The back end may take longer to set itself up.
        session.queues.start()?;
        Ok(session)
    }

    /// Plugs a driver in that another session had.
    fn restart(card: Arc<VirtioNic>, driver: Driver, saved: &Value) -> Result<NicSession, String> {
        let saved: Saved = state::read_part(saved)?;
        let mac = card.nic().config.mac;
        let features = driver.features;
        let mut session = NicSession::plug_in(card, driver).map_err(|error| error.to_string())?;
        let work = &session.work;
        let has = |wanted: u64, what: &str| match features & wanted != 0 {
            true => Ok(()),
            false => Err(format!("{what} is there without its feature")),
        };
        let Saved { receiver, wanted, .. } = &saved;
        let accepted = offloads::to_driver(features).bits();
        if receiver.offloads() & !accepted != 0 {
            return Err("offloads are none that were accepted".into());
        }
        if receiver.has_vlans() != (features & feature::CTRL_VLAN != 0) {
            return Err("vlans are there without their feature, or not there with it".into());
        }
        if let Some(by_hash) = receiver.has_rss() {
            let either = feature::RSS | feature::HASH_REPORT;
            has(if by_hash { feature::RSS } else { either }, "rss")?;
        }
        if receiver.queues() > 1 {
            has(feature::MQ | feature::RSS, "more than one queue pair")?;
        }
        work.receiver.restore(receiver, 2 * LISTED_MAX, work.queue_pairs())?;
        let wanted = Wanted::restored(wanted, work.receiver.filter.vlans())?;
        work.receiver.filter.set_addresses(wanted.addresses());
        *lock(&work.wanted) = wanted;
        if receiver.mac() != mac {
            has(feature::CTRL_MAC_ADDR, "another address")?;
            let mac = receiver.mac();
            if mac == Mac::default() || is_group(mac) || !work.pairs.plug().set_mac(mac) {
                return Err("the driver's address belongs to another device".into());
            }
        }
        session.saved = Some(saved);
        Ok(session)
    }

    /// Plugs the driver in. The back end is not set up for it.
    fn plug_in(card: Arc<VirtioNic>, driver: Driver) -> Result<NicSession, ErrorCode> {
        let (features, nic) = (driver.features, card.nic());
        let wanted = Wanted::new(features & feature::CTRL_VLAN != 0);
        let filter = Arc::new(Filter::new(nic.config.mac));
        filter.set_addresses(wanted.addresses());
        filter.set_vlans(wanted.vlans());
        let receiver = Arc::new(Receiver {
            mtu: usize::from(nic.config.mtu),
            filter,
            offloads: AtomicU64::new(offloads::to_driver(features).bits()),
            steering: Arc::new(Steering::new(1)),
            hash: features & feature::HASH_REPORT != 0,
            backpressure: nic.config.backpressure,
            moved: Box::new(|| {}),
        });
        let pairs = Pairs::start(&Setup {
            nic,
            receiver: &receiver,
            by_hash: features & feature::RSS != 0,
            tx_offloads: offloads::from_driver(features),
            memory: &driver.memory,
            place: (&driver.executor, driver.worker, &driver.counters),
            fail: driver.fail.clone(),
        })?;
        let work = Arc::new(Work::new((card, driver), receiver, pairs, wanted));
        let queues = Queues::new(work.clone());
        Ok(NicSession { work, queues, control: None, saved: None, record: None })
    }

    /// The session's own part.
    ///
    /// # Errors
    /// It cannot be saved.
    fn own(&self) -> Result<Saved, Unsaved> {
        let work = &self.work;
        Ok(Saved {
            receiver: work.receiver.save(),
            wanted: lock(&work.wanted).save(),
            coalescing: lock(&work.coalescing).save(),
            pairs: work.pairs.save().map_err(Unsaved::Not)?,
        })
    }

    #[cfg(test)]
    pub fn queues(&self) -> &Arc<Queues> {
        &self.queues
    }

    fn stop_control(&mut self) {
        if let Some((task, _)) = self.control.take() {
            task.stop();
        }
    }

    /// The number of the control queue, if the driver uses it.
    fn control_queue(&self) -> Option<u16> {
        let features = self.work.driver.features;
        let several = features & (feature::MQ | feature::RSS) != 0;
        let pairs = if several { self.work.queue_pairs() } else { 1 };
        (features & feature::CTRL_VQ != 0).then_some(pairs * 2)
    }
}

impl Session for NicSession {
    fn enable(&mut self, index: u16, enabled: Enabled) -> Result<(), ErrorCode> {
        self.enable_again(index, enabled, Vec::new())
    }

    fn enable_again(
        &mut self,
        index: u16,
        enabled: Enabled,
        taken: Vec<Chain>,
    ) -> Result<(), ErrorCode> {
        let work = &self.work;
        if self.control_queue() == Some(index) {
            let doorbell = enabled.doorbell.clone();
            let fail = work.driver.fail.clone();
            let mut control = None;
            let made = work.driver.executor.spawn_with(
                work.driver.worker,
                work.driver.counters.clone(),
                move |code| fail(code),
                |task| {
                    let made = Control::new(self.queues.clone(), enabled, taken, task.clone());
                    let made = control.insert(Arc::new(Mutex::new(made))).clone();
                    Ok::<_, Infallible>(Box::new(ControlTask(made)) as Box<dyn Task>)
                },
            );
            let Ok(task) = made;
            let bound = doorbell.bind(&task);
            self.control = control.map(|control| (task, control));
            return bound;
        }
        let enabled = self.queues.enable_again(index, enabled, taken);
        self.work.chosen();
        enabled
    }

    fn disable(&mut self, index: u16) -> Option<Position> {
        if self.control_queue() == Some(index) {
            self.stop_control();
            return None;
        }
        let position = self.queues.disable(index);
        self.work.chosen();
        position
    }

    /// As many pairs are in use as have their receive queue enabled, from the first on. There is
    /// always one.
    fn set_in_use(&mut self, enabled: &[bool]) -> Result<(), ErrorCode> {
        for (number, pair) in enabled.chunks_exact(2).enumerate() {
            self.work.pairs.set_drops(number, !pair[1]);
        }
        let pairs = enabled.chunks(2).take_while(|pair| pair[0]).count().max(1);
        let pairs = u16::try_from(pairs).unwrap_or(u16::MAX);
        let work = &self.work;
        let before = work.receiver.choices();
        if pairs == work.receiver.steering.queues() || !work.set_queues(pairs) {
            return Ok(());
        }
        self.queues.configure_since(before)
    }

    fn calls_changed(&mut self) {
        self.queues.calls_changed();
    }

    fn restored(&mut self) -> Result<(), String> {
        let Some(Saved { coalescing, pairs, .. }) = self.saved.take() else { return Ok(()) };
        let record = self.record.take();
        lock(&self.work.coalescing).restore(&coalescing, record.is_some())?;
        self.work.pairs.restore(&pairs)?;
        if let Some(record) = record {
            self.work.record_with(record);
        }
        self.queues.start().map_err(|error| error.to_string())
    }

    fn save(&mut self) -> Result<SavedSession, Unsaved> {
        let saved = self.own()?;
        let mut queues = self.queues.save()?;
        if let (Some((_, control)), Some(index)) = (&self.control, self.control_queue()) {
            queues.insert(index, lock(control).state().map_err(Unsaved::Broken)?);
        }
        let own = state::part(&saved).map_err(Unsaved::Not)?;
        Ok(SavedSession { own, queues })
    }

    fn record_with(&mut self, record: Record) {
        match self.saved {
            Some(_) => self.record = Some(record),
            None => self.work.record_with(record),
        }
    }

    fn retake(&mut self, again: &mut Again<'_>) {
        self.queues.retake(again);
        if let (Some((_, control)), Some(index)) = (&self.control, self.control_queue()) {
            let retaken = lock(control).retake(index, again);
            if let Err(code) = retaken {
                self.queues.fail_later(code);
            }
        }
    }

    fn outlast(&mut self) -> Result<Value, Unsaved> {
        let mut saved = self.own()?;
        saved.pairs.outlast();
        state::part(&saved).map_err(Unsaved::Not)
    }
}

impl Drop for NicSession {
    fn drop(&mut self) {
        // The control task first: it may change the pairs.
        self.stop_control();
        self.queues.end();
        self.work.pairs.stop();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Mutex;
    use std::time::{Duration, Instant};

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use serde_json::{Value, json};
    use vbus_core::memory::PAGE;
    use vbus_core::settings::Settings;
    use vbus_core::{Access, Executor, Host, MemoryContext, Tuning, lock};
    use vbus_net::front::{Config, Nic};
    use vbus_net::{
        Backend, Direct, Done, Mac, Offloads, Packet, Plug, Port, Queue as BackendQueue, Sent,
    };

    use super::*;
    use crate::device::Call;
    use crate::net::card::Offer;
    use crate::net::vhost::Vhost;
    use crate::queue::{Format, Layout, Queue, RingFeatures};

    /// A back end that tells of its end when the test says so.
    #[derive(Clone, Default)]
    struct Slow(Arc<Mutex<Vec<Done>>>);

    impl Backend for Slow {
        fn tx_offloads(&self) -> Offloads {
            Offloads::ALL
        }

        fn rx_offloads(&self) -> Offloads {
            Offloads::ALL
        }

        fn steers(&self) -> bool {
            true
        }

        fn plug(&self, _port: Arc<Port>) -> Result<Arc<dyn Plug>, ErrorCode> {
            Ok(Arc::new(self.clone()))
        }

        fn inspect(&self) -> Value {
            Value::Null
        }
    }

    impl Plug for Slow {
        fn queue(
            &self,
            _index: u16,
            _task: &TaskHandle,
        ) -> Result<Box<dyn BackendQueue>, ErrorCode> {
            Ok(Box::new(NoQueue))
        }

        fn configure(&self, _: u16, _: Offloads, done: Done) -> Result<(), ErrorCode> {
            lock(&self.0).push(done);
            Ok(())
        }

        fn set_mac(&self, _mac: Mac) -> bool {
            true
        }
    }

    struct NoQueue;

    impl BackendQueue for NoQueue {
        fn send(&mut self, _packet: &Packet<'_>) -> Sent {
            Sent::Done { units: 1 }
        }
    }

    /// Nobody hears of anything.
    pub struct NoTransport;

    impl Transport for NoTransport {
        fn queue_used(&self, _index: u16) {}

        fn config_changed(&self, _config: Vec<u8>, _tell: bool) {}
    }

    const OFFLOADS: u64 = feature::GUEST_CSUM | feature::CTRL_GUEST_OFFLOADS | feature::CTRL_VQ;

    /// The control queue: its areas, and a command that gives the offloads up, with its answer.
    const LAYOUT: Layout = Layout {
        format: Format::Split,
        size: 8,
        descriptors: 0,
        driver_area: 0x400,
        device_area: 0x800,
    };
    const COMMAND: u64 = 0xc00;
    const ANSWER: u64 = 0xd00;

    /// A session whose driver has a control queue.
    struct Lab {
        memory: Arc<MemoryContext>,
        host: Host,
        slow: Slow,
        session: NicSession,
    }

    impl Lab {
        fn new() -> Lab {
            let slow = Slow::default();
            let mut settings = Settings::new(&json!({ "backend": "null" })).unwrap();
            let config = Config::take(&mut settings).unwrap();
            let nic = Nic::new("n", config, Arc::default(), Box::new(slow.clone()));
            let vhost = Vhost::new("n", 1, Arc::new(Direct), false);
            let offer = Offer { packed: true, rss: false, whole: true };
            let card = Arc::new(VirtioNic::new(nic, offer, vhost));
            let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).unwrap();
            let host = Host::new("n", executor, 1, 3);
            let memory = host.memory().clone();
            let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&file, PAGE).unwrap();
            memory.map(0, PAGE, Some((file, 0)), Access::BOTH).unwrap();
            let view = memory.view();
            for (at, addr, second) in
                [(0, COMMAND, 10 | 1 << 32 | 1 << 48), (16, ANSWER, 1 | 2 << 32)]
            {
                view.write(at, &addr.to_le_bytes()).unwrap();
                view.write(at + 8, &u64::to_le_bytes(second)).unwrap();
            }
            view.write(COMMAND, &[5, 0]).unwrap();
            drop(view);
            let driver = Driver {
                features: OFFLOADS,
                memory: memory.clone(),
                executor: host.executor().clone(),
                worker: 0,
                counters: host.counters().clone(),
                fail: Arc::new(|code| panic!("the session failed: {code}")),
            };
            let session = NicSession::start(card, driver).unwrap();
            let begun = lock(&slow.0).pop().unwrap();
            begun(Ok(()));
            Lab { memory, host, slow, session }
        }

        /// Enables the control queue anew, with the command in it.
        fn enable(&mut self) {
            self.memory.view().write(LAYOUT.driver_area, &[0, 0, 1, 0, 0, 0]).unwrap();
            self.memory.view().write(LAYOUT.device_area, &[0; 4]).unwrap();
            self.memory.view().write(ANSWER, &[0xff]).unwrap();
            let queue = Queue::new(LAYOUT, RingFeatures::default()).unwrap();
            let doorbell = self.host.doorbells().doorbell(2);
            let call = Call::new(Arc::new(NoTransport), 2, self.host.counters().clone());
            self.session.enable(2, Enabled { queue, doorbell, call }).unwrap();
        }

        /// Waits until the back end is told to set itself up.
        fn set_up(&self) -> Done {
            wait("a wish", || lock(&self.slow.0).pop())
        }

        fn offloads(&self) -> Offloads {
            self.session.work.receiver.offloads()
        }

        fn answer(&self) -> u8 {
            let mut answer = [0];
            self.memory.view().read(ANSWER, &mut answer).unwrap();
            answer[0]
        }
    }

    /// Looks again and again, until there is something. Panics if there is nothing in a minute.
    pub fn wait<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(Instant::now() < end, "{what} did not come");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_reset_of_the_control_queue_does_not_lose_the_end_of_a_command() {
        let mut lab = Lab::new();
        lab.enable();
        let first = lab.set_up();
        assert_eq!(lab.offloads(), Offloads::NONE);
        lab.session.disable(2);
        assert_eq!(lab.answer(), 0xff, "nothing touches the queue that was reset");
        // The next command waits for the back end, which cannot do what the first one wanted.
        lab.enable();
        first(Err(ErrorCode::FAILED));
        let second = lab.set_up();
        assert_eq!((lab.answer(), lock(&lab.slow.0).len()), (0xff, 0));
        second(Err(ErrorCode::FAILED));
        wait("the answer", || (lab.answer() == 1).then_some(()));
        assert_eq!(lab.offloads(), Offloads::CSUM, "as before both");
        // Nobody waits any more, and all is as before nevertheless.
        lab.enable();
        let third = lab.set_up();
        assert_eq!(lab.offloads(), Offloads::NONE);
        lab.session.disable(2);
        third(Err(ErrorCode::FAILED));
        assert_eq!(lab.offloads(), Offloads::CSUM);
    }
}
