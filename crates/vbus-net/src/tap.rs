// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Back end `tap`: a TAP interface of this machine, with a queue for each queue pair. The kernel
//! reads and writes the driver's buffers directly.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use rustix::io::Errno;
use serde_json::{Value, json};
use vbus_core::io_vec::{IoVec, IoVecMut, readv, writev};
use vbus_core::memory::DriverSlice;
use vbus_core::settings::Settings;
use vbus_core::shm::signal::Armed;
use vbus_core::{BlockingQueue, CreateError, ErrorCode, Interest, TaskHandle, lock};
use vbus_tap::{HEADER_BYTES, Mac, Offloads, advice};

use crate::backend::{Backend, Done, Plug, Port, Queue, Sent, TxDrop};
use crate::frame::{Body, ETH_BYTES, FRAME_MAX, Header, PIECES_MAX, Packet, TAG_BYTES};
use crate::link::Link;
use crate::opener::Opener;
use crate::sink::{Delivery, OnFull, Reserved, RxDrop, RxSink, Waiter};

/// How long the end of a device waits for the kernel.
const GONE: Duration = Duration::from_secs(10);

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
}

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

    fn plug(&self, port: Arc<Port>) -> Result<Arc<dyn Plug>, ErrorCode> {
        self.link.set_carrier(true);
        let (control, link) = (self.control.clone(), self.link.clone());
        Ok(Arc::new(TapPlug { port, control, link }))
    }

    fn inspect(&self) -> Value {
        json!({ "tap": self.name, "queues": self.control.queues.len() })
    }
}

/// A driver's use of the interface.
struct TapPlug {
    port: Arc<Port>,
    control: Arc<TapControl>,
    link: Arc<Link>,
}

impl Plug for TapPlug {
    fn queue(&self, index: u16, task: &TaskHandle) -> Result<Box<dyn Queue>, ErrorCode> {
        let queues = &self.control.queues;
        let queue = queues.get(usize::from(index)).ok_or(ErrorCode::BAD_ARGUMENT)?.clone();
        let waiter = Waiter { key: self.port.key(index), task: task.clone() };
        let port = self.port.clone();
        let read = Box::new(ReadFrame::default());
        Ok(Box::new(TapQueue { queue, port, index, waiter, watched: false, read }))
    }

    fn configure(&self, queues: u16, offloads: Offloads, done: Done) -> Result<(), ErrorCode> {
        let device = self.port.name.clone();
        let done = move |result: Result<(), Errno>| {
            done(result.map_err(|error| {
                tracing::error!(device, %error, "the TAP interface cannot be set up");
                ErrorCode::FAILED
            }));
        };
        self.control.want(Wanted { up: true, queues, offloads }, Some(Box::new(done)))
    }

    fn set_mac(&self, mac: Mac) -> bool {
        self.port.filter.set_mac(mac);
        true
    }
}

impl Drop for TapPlug {
    fn drop(&mut self) {
        // Reset the offloads, because the next driver may not accept those of this one. Take the
        // carrier down, because there is no driver.
        if self.control.want(Wanted::default(), None).is_err() {
            let _ = self.control.apply(&Wanted::default()); // It may block, but must be done.
        }
        self.link.set_carrier(false);
    }
}

/// How the kernel is to treat the interface. By default there is no driver.
#[derive(Clone, Default, PartialEq, Eq)]
struct Wanted {
    up: bool,
    /// Queues 0 to `queues - 1` are in use.
    queues: u16,
    offloads: Offloads,
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
        let mut state = lock(&self.state);
        state.wanted = wanted;
        state.done.extend(done);
        if state.busy {
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
        if wanted.up {
            set_carrier(true);
        }
        Ok(())
    }

    /// Waits until no job waits or runs, at most for [`GONE`].
    fn wait_idle(&self) {
        let waited = self.idle.wait_timeout_while(lock(&self.state), GONE, |state| state.busy);
        drop(waited);
    }
}

struct TapQueue {
    queue: Arc<vbus_tap::Queue>,
    port: Arc<Port>,
    index: u16,
    waiter: Waiter,
    watched: bool,
    read: Box<ReadFrame>,
}

/// A frame that was read from the interface before its receive queue was known.
#[derive(Default)]
struct ReadFrame {
    header: Header,
    eth: [u8; ETH_BYTES],
    /// The memory for the rest of a frame. Empty until the first frame.
    body: Vec<u8>,
    /// Bytes of the rest.
    len: usize,
    /// Whether the frame waits for buffers.
    waits: bool,
}

impl ReadFrame {
    /// Reads the next frame. Returns whether there was one.
    fn read(&mut self, queue: &vbus_tap::Queue) -> Result<bool, Errno> {
        const HEAD: usize = HEADER_BYTES + ETH_BYTES;
        let mut head = [0; HEAD];
        self.body.resize(FRAME_MAX, 0);
        let mut vector = [IoVecMut::new(&mut head), IoVecMut::new(&mut self.body)];
        let len = readv(queue, &mut vector)?;
        let Some(rest) = len.checked_sub(HEAD) else { return Ok(false) };
        let (header, eth) = head.split_at(HEADER_BYTES);
        let mut front = [0; HEADER_BYTES];
        front.copy_from_slice(header);
        self.header = Header::parse(&front);
        self.eth.copy_from_slice(eth);
        self.len = rest.min(FRAME_MAX);
        Ok(true)
    }

    fn packet(&self) -> Packet<'_> {
        Packet::new(self.header, self.eth, Body::Bytes(&self.body[..self.len]))
    }

    /// Puts the frame into the receive queue that the driver has chosen for it. Returns the queue
    /// that it is in, or `None` if it has to wait for buffers there.
    fn deliver(&mut self, port: &Port, waiter: &Waiter) -> Option<usize> {
        let packet = self.packet();
        let (lane, hash) = port.steering.choose(&packet);
        let packet = Packet { hash, ..packet };
        let Some(sink) = port.lanes.get(lane) else { return Some(lane) };
        let mut sink = lock(sink);
        // The driver may post its buffers between the delivery and the wait.
        for _ in 0..2 {
            match sink.deliver(&packet, OnFull::Wait) {
                Delivery::Delivered | Delivery::Dropped => {
                    self.waits = false;
                    return Some(lane);
                }
                Delivery::NeedsCut => {
                    // The driver changed its offloads after the kernel had made the frame.
                    sink.count_drop(RxDrop::BadFrame);
                    self.waits = false;
                    return Some(lane);
                }
                Delivery::Full { .. } => {
                    sink.wait(waiter);
                    if sink.arm() == Armed::Waiting {
                        break;
                    }
                }
            }
        }
        self.waits = true;
        None
    }
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
        let mut head = [0; HEADER_BYTES + ETH_BYTES + TAG_BYTES];
        head[..HEADER_BYTES].copy_from_slice(&packet.header.bytes(0));
        head[HEADER_BYTES..].copy_from_slice(&packet.front());
        let mut vector = [IoVec::EMPTY; PIECES_MAX + 1];
        vector[0] = IoVec::new(&head[..HEADER_BYTES + packet.front_bytes()]);
        let mut count = 1;
        match packet.body {
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
        if !used {
            return Ok(0);
        }
        let mut read = |vector: &mut [IoVecMut<'_>]| readv(&*self.queue, vector);
        for n in 0..budget {
            match sink.reserve(&mut read) {
                Reserved::Frame => {}
                Reserved::Full => {
                    sink.wait(&self.waiter);
                    return Ok(n);
                }
                // EIO: the interface is down. It becomes readable when it is up again.
                Reserved::Nothing
                | Reserved::Failed(Errno::AGAIN | Errno::INTR | Errno::IO | Errno::BADFD) => {
                    return Ok(n);
                }
                // The driver has taken its buffers away. The bus has seen that, or the next frame
                // goes into other ones.
                Reserved::Failed(Errno::FAULT) => return Ok(n),
                Reserved::Failed(error) => {
                    let device = &self.port.name;
                    tracing::error!(device, %error, "cannot read from the TAP interface");
                    return Err(ErrorCode::FAILED);
                }
            }
        }
        Ok(budget)
    }

    fn receive_shared(&mut self, budget: u32) -> Result<u32, ErrorCode> {
        let used = self.index < self.port.steering.queues();
        self.watch(used)?;
        if !used && !self.read.waits {
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
    /// Reads frames, and puts each into the receive queue that the driver has chosen for it.
    /// Returns how many.
    fn steer(&mut self, budget: u32, touched: &mut Vec<usize>) -> Result<u32, ErrorCode> {
        for n in 0..budget {
            let ready = match self.read.waits {
                true => Ok(true),
                false => self.read.read(&self.queue),
            };
            match ready {
                Ok(true) => {}
                Ok(false) | Err(Errno::AGAIN | Errno::INTR | Errno::IO | Errno::BADFD) => {
                    return Ok(n);
                }
                Err(error) => {
                    let device = &self.port.name;
                    tracing::error!(device, %error, "cannot read from the TAP interface");
                    return Err(ErrorCode::FAILED);
                }
            }
            let Some(lane) = self.read.deliver(&self.port, &self.waiter) else { return Ok(n) };
            if !touched.contains(&lane) {
                touched.push(lane);
            }
        }
        Ok(budget)
    }
}

impl Drop for TapQueue {
    fn drop(&mut self) {
        let _ = self.watch(false); // The end of a watch cannot fail.
    }
}
