// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Back end `tap`: a TAP interface of this machine, with a queue for each queue pair. The kernel
//! reads and writes the driver's buffers directly.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vbus_core::io_vec::{IoVec, readv, writev};
use vbus_core::memory::DriverSlice;
use vbus_core::settings::Settings;
use vbus_core::shm::signal::Armed;
use vbus_core::{BlockingQueue, CreateError, ErrorCode, Interest, TaskHandle, lock, state};
use vbus_tap::{BROADCAST, HEADER_BYTES, Mac, Offloads, advice};

use crate::backend::{Backend, Done, Plug, Port, Queue, Sent, TxDrop};
use crate::frame::{Body, ETH_BYTES, Hash, PIECES_MAX, Packet, TAG_BYTES};
use crate::inbound::{Inbound, InboundState, Step};
use crate::link::Link;
use crate::opener::{HandedOver, Opener};
use crate::sink::{OnFull, Reserved, RxSink, Waiter};

/// How long the end of a device waits for the kernel.
const GONE: Duration = Duration::from_secs(10);

/// The Ethernet header with a tag.
const FRONT_MAX: usize = ETH_BYTES + TAG_BYTES;

/// A frame of at most so many bytes, with its header, is copied into one piece. The kernel takes
/// one piece without looking at a vector, which saves more than the copy costs.
const COPIED_MAX: usize = 256;

/// Reads the setting `tap`, the name of an interface.
pub fn name(settings: &mut Settings) -> Result<String, CreateError> {
    let name = settings.text("tap")?.unwrap_or_else(|| "vbus%d".into());
    // IFNAMSIZ is 16 bytes with the final zero.
    let plain = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b':';
    if name.is_empty() || name.len() > 15 || name == "." || name == ".." || !name.bytes().all(plain)
    {
        let text = format!(
            "is {name:?}, not the name of an interface; use 1 to 15 letters, digits and signs"
        );
        return Err(settings.error("tap", text));
    }
    Ok(name)
}

/// The back end: an interface with its queues.
pub struct Tap {
    name: String,
    control: Arc<TapControl>,
    offloads: Offloads,
    link: Arc<Link>,
}

impl Tap {
    /// Attaches `queues` queues to the interface called `name`, and creates it if it does not
    /// exist. Sets its MTU and brings it up.
    pub fn new(
        opener: &dyn Opener,
        name: &str,
        queues: u16,
        mtu: u16,
        link: Arc<Link>,
    ) -> Result<Tap, CreateError> {
        let (name, queues) = opener.tap(name, queues, mtu).map_err(|error| {
            let advice = Errno::from_io_error(&error).map(|error| format!("; {}", advice(error)));
            CreateError(format!("\"tap\" is {name:?}: {error}{}", advice.unwrap_or_default()))
        })?;
        let queues: Vec<_> = queues.into_iter().map(Arc::new).collect();
        let offloads = queues[0].known_offloads();
        let control = Arc::new(TapControl::new(queues));
        // There is no driver yet.
        control.apply(&Wanted::default()).map_err(|error| {
            CreateError(format!("\"tap\" is {name:?}: {error}; {}", advice(error)))
        })?;
        Ok(Tap { name, control, offloads, link })
    }

    /// Goes on with the queues of the interface `name` that another process has handed over.
    /// `None`: it has handed over none. The interface stays as it is.
    ///
    /// # Errors
    /// There are not `queues` of them.
    pub(crate) fn adopt(
        name: &str,
        queues: u16,
        link: &Arc<Link>,
        handed: &mut HandedOver,
    ) -> Result<Option<Tap>, CreateError> {
        let mut all = Vec::new();
        let mut offloads = Offloads::NONE;
        while let Some((number, fd)) = handed.take_if(|name| name.starts_with(DESCRIPTOR)) {
            let bits = number.trim_start_matches(DESCRIPTOR).rsplit('.').next();
            let bits = bits.and_then(|bits| bits.parse().ok());
            offloads = Offloads::from_bits(bits.unwrap_or(0));
            all.push(Arc::new(vbus_tap::Queue::from_descriptor(fd, queues > 1)));
        }
        if all.is_empty() {
            return Ok(None);
        }
        if all.len() != usize::from(queues) {
            let text = format!("\"tap\" is {name:?}: {} queues were handed over", all.len());
            return Err(CreateError(format!("{text}; the settings have {queues}")));
        }
        let control = Arc::new(TapControl::new(all));
        lock(&control.state).is_adopted = true;
        Ok(Some(Tap { name: name.into(), control, offloads, link: link.clone() }))
    }
}

/// What the names of the queues' descriptors begin with. The number of the queue follows, and the
/// offloads that the kernel knows, which nobody can ask for without changing them.
const DESCRIPTOR: &str = "tap.";

impl Drop for Tap {
    /// The kernel removes an interface with its last descriptor. A device that is made under the
    /// same name must not find the old interface.
    fn drop(&mut self) {
        self.control.wait_idle();
    }
}

impl Backend for Tap {
    fn tx_offloads(&self) -> Offloads {
        self.offloads
    }

    fn rx_offloads(&self) -> Offloads {
        self.offloads
    }

    fn shares_sinks(&self, by_hash: bool) -> bool {
        // The kernel chooses the queue of the interface by the frame's flow. Which receive queue
        // the driver wants is known only when the frame has been read.
        by_hash && self.control.queues.len() > 1
    }

    fn steers(&self) -> bool {
        true
    }

    fn kernel_queue(&self, index: u16) -> Option<BorrowedFd<'_>> {
        self.control.queues.get(usize::from(index)).map(|queue| queue.as_fd())
    }

    fn plug(&self, port: Arc<Port>) -> Result<Arc<dyn Plug>, ErrorCode> {
        let (control, link) = (self.control.clone(), self.link.clone());
        let number = {
            let mut state = lock(&control.state);
            state.plugs += 1;
            link.set_carrier(true);
            state.plugs
        };
        Ok(Arc::new(TapPlug { number, port, control, link, in_kernel: AtomicBool::new(false) }))
    }

    fn inspect(&self) -> Value {
        json!({ "tap": self.name, "queues": self.control.queues.len() })
    }

    fn quiesce(&self) {
        lock(&self.control.state).quiesced = true;
        self.control.wait_idle();
    }

    fn resume(&self) {
        self.control.resume();
    }

    fn save(&self) -> Result<Value, String> {
        let state = lock(&self.control.state);
        if state.busy || state.waits {
            return Err("the TAP interface is still being set up".into());
        }
        let Wanted { up, queues, offloads, .. } = &state.wanted;
        let (up, queues, offloads) = (*up, *queues, offloads.bits());
        state::part(&TapState { up, queues, offloads })
    }

    fn restore(&self, saved: &Value) -> Result<(), String> {
        let TapState { up, queues, offloads } = state::read_part(saved)?;
        let known = Offloads::from_bits(offloads);
        if usize::from(queues) > self.control.queues.len()
            || known.bits() != offloads
            || !self.offloads.contains(known)
        {
            let bits = self.offloads.bits();
            return Err(format!(
                "the TAP interface had {queues} queues and the offloads {offloads:#x}; this one \
                 has {} and {bits:#x}",
                self.control.queues.len()
            ));
        }
        lock(&self.control.state).wanted =
            Wanted { up, queues, offloads: known, ..Wanted::default() };
        Ok(())
    }

    fn descriptors(&self) -> std::io::Result<Vec<(String, OwnedFd)>> {
        let bits = self.offloads.bits();
        let queue = |(number, queue): (usize, &Arc<vbus_tap::Queue>)| {
            let name = format!("{DESCRIPTOR}{number}.{bits}");
            Ok((name, queue.as_fd().try_clone_to_owned()?))
        };
        self.control.queues.iter().enumerate().map(queue).collect()
    }
}

/// An interface as plain data (spec/state-format.md, "Back ends").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TapState {
    /// Whether a driver has started.
    up: bool,
    /// The queues in use.
    queues: u16,
    /// The offloads that the kernel may leave to the reader.
    offloads: u64,
}

/// A driver's use of the interface. A thread that sets the interface up for a driver may hold it
/// until the next driver is there. Then it does nothing any more.
struct TapPlug {
    /// The newest one has the number of [`ControlState::plugs`].
    number: u64,
    port: Arc<Port>,
    control: Arc<TapControl>,
    link: Arc<Link>,
    /// Whether the kernel carries the frames. Relaxed: whoever changes it configures afterwards.
    in_kernel: AtomicBool,
}

impl TapPlug {
    /// The addresses that pass, if the kernel has to choose the frames. `None`: all frames pass.
    fn addresses(&self) -> Option<KernelFilter> {
        let filter = &self.port.filter;
        let rules = filter.addresses();
        let modes = &rules.modes;
        let all = modes.promiscuous || modes.all_unicast && !modes.no_unicast;
        if all || !self.in_kernel.load(Ordering::Relaxed) {
            return None;
        }
        // The kernel takes an empty list for none. No frame goes to the address of zeros.
        let own = [Mac::default(), filter.mac(), BROADCAST].into_iter();
        let passes = |mac: &Mac| *mac == Mac::default() || filter.accepts(*mac);
        let addresses = own.chain(rules.listed).filter(passes).collect();
        let all_multicast = modes.all_multicast && !modes.no_multicast;
        Some(KernelFilter { addresses, all_multicast })
    }
}

impl Plug for TapPlug {
    fn queue(&self, index: u16, task: &TaskHandle) -> Result<Box<dyn Queue>, ErrorCode> {
        let queues = &self.control.queues;
        let queue = queues.get(usize::from(index)).ok_or(ErrorCode::BAD_ARGUMENT)?.clone();
        let waiter = Waiter { key: self.port.key(index), task: task.clone() };
        let port = self.port.clone();
        let inbound = Box::default();
        Ok(Box::new(TapQueue { queue, port, index, waiter, watched: false, inbound }))
    }

    fn configure(&self, queues: u16, offloads: Offloads, done: Done) -> Result<(), ErrorCode> {
        let device = self.port.name.clone();
        let done = move |result: Result<(), Errno>| {
            done(result.map_err(|error| {
                tracing::error!(device, %error, "the TAP interface cannot be set up");
                ErrorCode::FAILED
            }));
        };
        let filter = self.addresses();
        let wanted = Wanted { up: true, queues, offloads, filter };
        self.control.want_of(self.number, wanted, Some(Box::new(done)))
    }

    fn leave_to_kernel(&self, leave: bool) {
        self.in_kernel.store(leave, Ordering::Relaxed);
    }

    fn set_mac(&self, mac: Mac) -> bool {
        self.port.filter.set_mac(mac);
        true
    }
}

impl Drop for TapPlug {
    fn drop(&mut self) {
        // Reset the offloads, because the next driver may not accept those of this one. Take the
        // carrier down, because there is no driver. Not of an interface that another process has.
        let mut state = lock(&self.control.state);
        if state.plugs != self.number {
            return;
        }
        self.link.set_carrier(false);
        if state.quiesced {
            state.unplugged = true;
            return;
        }
        drop(state);
        match self.control.want_of(self.number, Wanted::default(), None) {
            // There is another driver meanwhile.
            Ok(()) | Err(ErrorCode::NOT_OPEN) => {}
            // It may block, but must be done.
            Err(_) => drop(self.control.apply(&Wanted::default())),
        }
    }
}

/// How the kernel is to treat the interface. By default there is no driver.
#[derive(Clone, Default, PartialEq, Eq)]
struct Wanted {
    up: bool,
    /// Queues 0 to `queues - 1` are in use.
    queues: u16,
    offloads: Offloads,
    /// The frames that the kernel lets into the queues. `None`: all.
    filter: Option<KernelFilter>,
}

/// See [`vbus_tap::Queue::set_filter`].
#[derive(Clone, PartialEq, Eq)]
struct KernelFilter {
    addresses: Vec<Mac>,
    all_multicast: bool,
}

type SetUp = Box<dyn FnOnce(Result<(), Errno>) + Send>;

/// Sets the interface up. The kernel does this under a lock that all network interfaces of the
/// machine share, and that somebody else may hold for long. So a helper thread does it. It applies
/// the newest wish; however fast drivers come and go, one wish and one job wait.
struct TapControl {
    queues: Vec<Arc<vbus_tap::Queue>>,
    jobs: BlockingQueue,
    state: Mutex<ControlState>,
    idle: Condvar,
}

#[derive(Default)]
struct ControlState {
    wanted: Wanted,
    /// Whom to tell when the interface is as wanted. The front has one entry at a time, and the bus
    /// bounds those of drivers that have closed.
    done: Vec<SetUp>,
    /// Whether a job waits or runs.
    busy: bool,
    /// The device is quiesced: a driver that goes leaves the interface as it is.
    quiesced: bool,
    /// A driver has gone meanwhile.
    unplugged: bool,
    /// The interface is as wanted, and so it was when another process handed it over.
    is_adopted: bool,
    /// It is not, but that process may still go on with it: it is set up when this one does.
    waits: bool,
    /// How many drivers there have been. The interface is for the last one.
    plugs: u64,
}

impl TapControl {
    fn new(queues: Vec<Arc<vbus_tap::Queue>>) -> TapControl {
        TapControl {
            queues,
            jobs: BlockingQueue::default(),
            state: Mutex::default(),
            idle: Condvar::new(),
        }
    }

    /// Lets the helper thread set the interface up, and then call `done`.
    fn want(self: &Arc<Self>, wanted: Wanted, done: Option<SetUp>) -> Result<(), ErrorCode> {
        self.want_now(lock(&self.state), wanted, done)
    }

    /// As [`want`](Self::want), for driver `number`. NOT_OPEN: there is another driver by now.
    fn want_of(
        self: &Arc<Self>,
        number: u64,
        wanted: Wanted,
        done: Option<SetUp>,
    ) -> Result<(), ErrorCode> {
        let state = lock(&self.state);
        if state.plugs != number {
            return Err(ErrorCode::NOT_OPEN);
        }
        self.want_now(state, wanted, done)
    }

    fn want_now(
        self: &Arc<Self>,
        mut state: MutexGuard<'_, ControlState>,
        wanted: Wanted,
        done: Option<SetUp>,
    ) -> Result<(), ErrorCode> {
        if std::mem::take(&mut state.is_adopted) {
            if state.wanted == wanted {
                drop(state);
                done.into_iter().for_each(|done| done(Ok(())));
                return Ok(());
            }
            state.waits = state.quiesced;
        }
        state.wanted = wanted;
        state.done.extend(done);
        if state.busy || state.waits {
            return Ok(());
        }
        if self.queue_job(&mut state) {
            return Ok(());
        }
        let dropped = std::mem::take(&mut state.done);
        drop(state);
        drop(dropped);
        Err(ErrorCode::FAILED)
    }

    /// Queues the job. False: no thread can be made for it.
    fn queue_job(self: &Arc<Self>, state: &mut ControlState) -> bool {
        let control = self.clone();
        state.busy = self.jobs.run(move || control.serve());
        state.busy
    }

    /// The job: sets the interface up once. If more is wanted by then, another job does that,
    /// behind those of the other devices.
    fn serve(self: &Arc<Self>) {
        let (wanted, done) = {
            let state = &mut *lock(&self.state);
            (state.wanted.clone(), std::mem::take(&mut state.done))
        };
        let result = self.apply(&wanted);
        done.into_iter().for_each(|done| done(result));
        let mut state = lock(&self.state);
        let as_wanted = state.wanted == wanted && state.done.is_empty();
        // From within a job, another one can always be queued.
        if as_wanted || !self.queue_job(&mut state) {
            state.busy = false;
            self.idle.notify_all();
        }
    }

    /// Sets the interface up. It may block.
    fn apply(&self, wanted: &Wanted) -> Result<(), Errno> {
        let set_carrier = |up| {
            if let Err(error) = self.queues[0].set_carrier(up) {
                tracing::debug!(%error, "the carrier of the TAP interface cannot be set");
            }
        };
        if !wanted.up {
            set_carrier(false);
        } else {
            for (index, queue) in self.queues.iter().enumerate().filter(|(_, q)| q.is_multi_queue())
            {
                queue.set_enabled(index < usize::from(wanted.queues))?;
            }
        }
        self.queues[0].set_offloads(wanted.offloads)?;
        let filter = wanted.filter.as_ref().map(|f| (&*f.addresses, f.all_multicast));
        self.queues[0].set_filter(filter)?;
        if wanted.up {
            set_carrier(true);
        }
        Ok(())
    }

    /// The device is no longer quiesced.
    fn resume(self: &Arc<Self>) {
        let (unplugged, dropped) = {
            let state = &mut *lock(&self.state);
            state.quiesced = false;
            let fails = std::mem::take(&mut state.waits) && !self.queue_job(state);
            let dropped = if fails { std::mem::take(&mut state.done) } else { Vec::new() };
            (std::mem::take(&mut state.unplugged), dropped)
        };
        dropped.into_iter().for_each(|done| done(Err(Errno::NOMEM)));
        if unplugged && self.want(Wanted::default(), None).is_err() {
            let _ = self.apply(&Wanted::default()); // As at the drop of a plug.
        }
    }

    /// Waits until no job waits or runs, at most for [`GONE`].
    fn wait_idle(&self) {
        let waited = self.idle.wait_timeout_while(lock(&self.state), GONE, |state| state.busy);
        drop(waited);
    }
}

/// A queue as plain data (spec/state-format.md, "Back ends").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueState {
    /// A frame that was read and waits for the receive queue.
    frame: Option<InboundState>,
}

struct TapQueue {
    queue: Arc<vbus_tap::Queue>,
    port: Arc<Port>,
    index: u16,
    waiter: Waiter,
    watched: bool,
    /// A frame that could not be read into the driver's buffers.
    inbound: Box<Inbound>,
}

impl TapQueue {
    /// Watches the interface while the queue is in use. A queue that the kernel does not use
    /// reports an error all the time.
    fn watch(&mut self, wanted: bool) -> Result<(), ErrorCode> {
        if wanted == self.watched {
            return Ok(());
        }
        if wanted {
            self.waiter.task.watch(&*self.queue, Interest::ReadWrite).map_err(|error| {
                tracing::error!(device = self.port.name, %error, "cannot watch the TAP interface");
                ErrorCode::FAILED
            })?;
        } else {
            self.waiter.task.unwatch(&*self.queue);
        }
        self.watched = wanted;
        Ok(())
    }
}

impl Queue for TapQueue {
    fn send(&mut self, packet: &Packet<'_>) -> Sent {
        let mut head = [0; COPIED_MAX];
        head[..HEADER_BYTES].copy_from_slice(&packet.header.bytes(0));
        head[HEADER_BYTES..][..FRONT_MAX].copy_from_slice(&packet.front());
        let mut end = HEADER_BYTES + packet.front_bytes();
        let is_small = packet.body.bytes() <= COPIED_MAX - end;
        match packet.body {
            Body::Bytes(bytes) if is_small => {
                head[end..][..bytes.len()].copy_from_slice(bytes);
                end += bytes.len();
            }
            Body::Driver(parts) if is_small => {
                for part in parts {
                    end += part.copy_to(&mut head[end..]);
                }
            }
            _ => {}
        }
        let mut vector = [IoVec::EMPTY; PIECES_MAX + 1];
        vector[0] = IoVec::new(&head[..end]);
        let mut count = 1;
        match packet.body {
            _ if is_small => {}
            Body::Bytes(bytes) => {
                vector[1] = IoVec::new(bytes);
                count += 1;
            }
            Body::Driver(parts) => {
                let slices = parts.iter().flat_map(DriverSlice::io_vecs);
                for (to, slice) in vector[1..].iter_mut().zip(slices) {
                    *to = slice;
                    count += 1;
                }
            }
        }
        match writev(&*self.queue, &vector[..count]) {
            Ok(_) => Sent::Done { units: 1 },
            Err(Errno::AGAIN) => Sent::Wait { until: None, moved: false },
            // The driver has taken the memory away. Touching it lets the bus see that.
            Err(Errno::FAULT) => {
                if let Body::Driver(parts) = packet.body {
                    parts.iter().for_each(DriverSlice::touch);
                }
                Sent::Dropped(TxDrop::Refused)
            }
            // The interface is down or gone, or the kernel does not use this queue.
            Err(Errno::IO | Errno::BADFD) => Sent::Dropped(TxDrop::NoLink),
            Err(_) => Sent::Dropped(TxDrop::Refused),
        }
    }

    fn receive(&mut self, sink: &mut dyn RxSink, budget: u32) -> Result<u32, ErrorCode> {
        let used = self.index < self.port.steering.queues();
        self.watch(used)?;
        if !used && !self.inbound.is_held() {
            return Ok(0);
        }
        let mut left = budget;
        while left != 0 {
            if self.inbound.is_held() {
                let way = (None, OnFull::Wait);
                match self
                    .inbound
                    .deliver(sink, way, &mut left, |to, frame, on_full| to.deliver(frame, on_full))
                {
                    Step::Done => continue,
                    Step::Part => break,
                    Step::Full => {
                        sink.wait(&self.waiter);
                        break;
                    }
                }
            }
            match sink.reserve(&mut |vector| readv(&*self.queue, vector)) {
                Reserved::Frame => left -= 1,
                Reserved::Full => {
                    sink.wait(&self.waiter);
                    break;
                }
                Reserved::Unfit => match self.read() {
                    Ok(true) => {}
                    result => return result.map(|_| budget - left),
                },
                Reserved::Nothing => break,
                Reserved::Failed(error) => return self.ended(error).map(|()| budget - left),
            }
        }
        Ok(budget - left)
    }

    fn rest(&mut self) {
        _ = self.watch(false); // The end of a watch cannot fail.
        *self.inbound = Inbound::default();
    }

    fn save(&mut self) -> Result<Value, String> {
        state::part(&QueueState { frame: self.inbound.save() })
    }

    fn restore(&mut self, saved: &Value) -> Result<(), String> {
        self.inbound.restore(state::read_part::<QueueState>(saved)?.frame.as_ref())
    }

    fn receive_shared(&mut self, budget: u32) -> Result<u32, ErrorCode> {
        let used = self.index < self.port.steering.queues();
        self.watch(used)?;
        if !used && !self.inbound.is_held() {
            return Ok(0);
        }
        let mut touched = Vec::new();
        let result = self.steer(budget, &mut touched);
        for lane in touched.into_iter().filter_map(|lane| self.port.lanes.get(lane)) {
            lock(lane).post();
        }
        result
    }
}

impl TapQueue {
    /// Reads the next frame into memory of this process. Returns whether there was one.
    fn read(&mut self) -> Result<bool, ErrorCode> {
        match self.inbound.read(&mut |vector| readv(&*self.queue, vector)) {
            Ok(there) => Ok(there),
            Err(error) => self.ended(error).map(|()| false),
        }
    }

    /// A read has failed with this error. Returns whether the device can go on.
    fn ended(&self, error: Errno) -> Result<(), ErrorCode> {
        match error {
            // EIO: the interface is down. It becomes readable when it is up again.
            Errno::AGAIN | Errno::IO | Errno::BADFD => Ok(()),
            // The driver has taken its buffers away. The bus has seen that, or the next frame goes
            // into other ones.
            Errno::FAULT => Ok(()),
            error => {
                let device = &self.port.name;
                tracing::error!(device, %error, "cannot read from the TAP interface");
                Err(ErrorCode::FAILED)
            }
        }
    }

    /// Reads frames, and puts each into the receive queue that the driver has chosen for it.
    /// Returns the work done, in frames.
    fn steer(&mut self, budget: u32, touched: &mut Vec<usize>) -> Result<u32, ErrorCode> {
        let mut left = budget;
        while left != 0 {
            if !self.inbound.is_held() && !self.read()? {
                break;
            }
            let (lane, hash) = self.port.steering.choose(&self.inbound.packet());
            if !touched.contains(&lane) {
                touched.push(lane);
            }
            if self.put(lane, hash, &mut left) != Step::Done {
                break;
            }
        }
        Ok(budget - left)
    }

    /// Puts the frame into this receive queue.
    fn put(&mut self, lane: usize, hash: Option<Hash>, left: &mut u32) -> Step {
        let port = self.port.clone();
        let Some(sink) = port.lanes.get(lane) else { return self.inbound.done() };
        let mut sink = lock(sink);
        let way = (hash, OnFull::Wait);
        loop {
            let step = self
                .inbound
                .deliver(&mut *sink, way, left, |to, frame, on_full| to.deliver(frame, on_full));
            if step == Step::Full {
                sink.wait(&self.waiter);
                // The driver may have posted its buffers between the delivery and the wait.
                if sink.arm() == Armed::Missed && *left != 0 {
                    continue;
                }
            }
            return step;
        }
    }
}

impl Drop for TapQueue {
    fn drop(&mut self) {
        let _ = self.watch(false); // The end of a watch cannot fail.
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::Filter;
    use crate::steering::Steering;

    #[test]
    fn a_driver_that_has_gone_leaves_the_interface_to_the_next_one() {
        // No interface: nothing can be set up, but what is wanted can be seen.
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let queue = Arc::new(vbus_tap::Queue::from_descriptor(reader, false));
        let control = Arc::new(TapControl::new(vec![queue]));
        let (offloads, link) = (Offloads::ALL, Arc::new(Link::default()));
        let tap = Tap { name: "tap".into(), control, offloads, link };
        let plug = || {
            let shared = (Arc::new(Filter::new([2; 6])), Arc::new(Steering::new(1)));
            tap.plug(Arc::new(Port::new("n", 1500, 1, shared, Vec::new()))).unwrap()
        };
        let configure = |plug: &Arc<dyn Plug>| plug.configure(1, Offloads::CSUM, Box::new(drop));
        let is_up = || (lock(&tap.control.state).wanted.up, tap.link.is_up());
        let first = plug();
        configure(&first).unwrap();
        let second = plug();
        configure(&second).unwrap();
        assert_eq!(configure(&first), Err(ErrorCode::NOT_OPEN));
        drop(first);
        assert_eq!(is_up(), (true, true));
        drop(second);
        assert_eq!(is_up(), (false, false));
    }
}
