// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An uplink: a port of a switch that leads outside, to a TAP interface or a stream socket.
//!
//! A task moves frames both ways. Frames from outside go to the devices as those of any port do.
//! Frames to the outside are copied into a bounded queue, because the tasks of the senders must not
//! share the interface's queue with this task.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vbus_core::settings::Settings;
use vbus_core::shm::signal::Armed;
use vbus_core::state::Counts;
use vbus_core::{
    ConnectionCounters, Counter, CreateError, ErrorCode, Executor, Progress, Task, TaskHandle,
    lock, state,
};
use vbus_tap::{HEADER_BYTES, Mac, Offloads};

use crate::backend::{Backend, Plug, Port, Queue, Sent, TxDrop};
use crate::config::BackendConfig;
use crate::filter::{Filter, Modes};
use crate::frame::{ETH_BYTES, ETH_OVERHEAD, FRAME_MAX, Header, Packet};
use crate::front::{check_outlasts, forget_frames};
use crate::inbound::ReadFrame;
use crate::link::Link;
use crate::medium::Medium;
use crate::opener::Opener;
use crate::sink::{Delivery, OnFull, Read, Reserved, RxDrop, RxSink, Waiter};
use crate::steering::Steering;
use crate::switch::{SwitchBackend, SwitchPort, Switches};

/// The most frames, and the most bytes, that wait for the outside.
const QUEUED_FRAMES: usize = 512;
const QUEUED_BYTES: usize = 4 << 20;
/// How long senders wait for an outside that takes no frames, at most.
const FULL_MAX: Duration = Duration::from_millis(50);
/// The weight of a frame for the pace of the task, besides its bytes.
const FRAME_WEIGHT: u64 = 512;

/// The checked settings of an uplink.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct UplinkConfig {
    /// The switch, and what the port may do.
    pub port: SwitchPort,
    /// Where the uplink leads.
    pub backend: BackendConfig,
    /// The MTU: bytes of the longest frame without Ethernet header and tags.
    pub mtu: u16,
}

impl UplinkConfig {
    /// Reads `switch` and the settings of its port; `mtu`, in this range; and the settings of the
    /// back end, which must be a TAP interface or a stream.
    ///
    /// # Errors
    /// A value is wrong, or does not go with another one.
    pub fn parse(
        settings: &mut Settings,
        mtu: std::ops::RangeInclusive<u16>,
    ) -> Result<UplinkConfig, CreateError> {
        let port = SwitchPort::parse_uplink(settings)?;
        let mtu = settings.integer("mtu", mtu)?.unwrap_or(1500);
        if !settings.has("backend") {
            return Err(settings.error("backend", "is missing; write \"tap\" or \"stream\""));
        }
        let backend = BackendConfig::parse(settings, 1, mtu)?;
        match backend.medium {
            Medium::Tap(_) | Medium::Connect(_) | Medium::Listen(_) => {}
            Medium::Switch(_) | Medium::Null(_) => {
                let text = "leads nowhere; an uplink needs \"tap\" or \"stream\"";
                return Err(settings.error("backend", text));
            }
        }
        Ok(UplinkConfig { port, backend, mtu })
    }
}

/// An uplink. It carries frames from [`start`](Self::start) on, until it is dropped.
pub struct Uplink {
    name: String,
    config: UplinkConfig,
    outside: Box<dyn Backend>,
    inside: SwitchBackend,
    link: Arc<Link>,
    counters: Arc<Counters>,
    running: Mutex<Option<Running>>,
}

/// The task of an uplink that carries frames, and what it works on.
struct Running {
    task: TaskHandle,
    pump: Arc<Mutex<Pump>>,
    line: Arc<Mutex<Line>>,
}

/// Frames in one direction.
#[derive(Debug, Default, Serialize)]
struct Direction {
    frames: Counter,
    bytes: Counter,
    drops: Drops,
}

impl Direction {
    /// All counters by their paths in JSON.
    fn all(&self) -> [(&'static str, &Counter); 12] {
        let drops = &self.drops;
        [
            ("frames", &self.frames),
            ("bytes", &self.bytes),
            ("drops.no_buffers", &drops.no_buffers),
            ("drops.too_slow", &drops.too_slow),
            ("drops.too_long", &drops.too_long),
            ("drops.bad_frame", &drops.bad_frame),
            ("drops.no_link", &drops.no_link),
            ("drops.refused", &drops.refused),
            ("drops.rate", &drops.rate),
            ("drops.spoofed", &drops.spoofed),
            ("drops.denied", &drops.denied),
            ("drops.storm", &drops.storm),
        ]
    }

    fn count(&self, bytes: usize) {
        self.frames.one();
        self.bytes.add(bytes as u64);
    }
}

/// Frames that were dropped, by reason. The names are those of a device's counters.
#[derive(Debug, Default, Serialize)]
struct Drops {
    no_buffers: Counter,
    too_slow: Counter,
    too_long: Counter,
    bad_frame: Counter,
    no_link: Counter,
    refused: Counter,
    rate: Counter,
    spoofed: Counter,
    denied: Counter,
    storm: Counter,
}

impl Drops {
    fn sent(&self, reason: TxDrop) {
        match reason {
            TxDrop::BadFrame => self.bad_frame.one(),
            TxDrop::NoLink => self.no_link.one(),
            TxDrop::Refused => self.refused.one(),
            TxDrop::Spoofed => self.spoofed.one(),
            TxDrop::Denied => self.denied.one(),
            TxDrop::Storm => self.storm.one(),
        }
    }

    fn received(&self, reason: RxDrop) {
        match reason {
            RxDrop::NoBuffers => self.no_buffers.one(),
            RxDrop::TooLong => self.too_long.one(),
            RxDrop::BadFrame => self.bad_frame.one(),
            RxDrop::TooSlow => self.too_slow.one(),
            RxDrop::Rate => self.rate.one(),
            RxDrop::NoLink => self.no_link.one(),
        }
    }
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Counters {
    from_outside: Direction,
    to_outside: Direction,
}

impl Uplink {
    /// Makes the back end, and takes the switch from `switches`. The error's text begins with the
    /// setting at fault.
    pub fn open(
        name: &str,
        config: UplinkConfig,
        switches: &Switches,
        opener: &Arc<dyn Opener>,
    ) -> Result<Uplink, CreateError> {
        let link = Arc::new(Link::default());
        let handed = opener.handed_over(name);
        let outside =
            config.backend.open_outside(switches, opener, config.mtu, link.clone(), handed)?;
        let switch = switches.get(&config.port.switch);
        let rules = config.port.rules.clone();
        // The port is plugged in for as long as the uplink exists. The link that counts is the
        // outside's.
        let inside = SwitchBackend::new(switch, rules, Arc::default());
        let (name, counters, running) = (name.into(), Arc::default(), Mutex::default());
        Ok(Uplink { name, config, outside, inside, link, counters, running })
    }

    /// Carries frames from now on, in a task on worker `worker` of `executor`, with these counters.
    ///
    /// # Errors
    /// FAILED: the interface cannot be set up.
    pub fn start(
        &self,
        executor: &Executor,
        worker: usize,
        counters: Arc<ConnectionCounters>,
    ) -> Result<(), ErrorCode> {
        let mtu = self.config.mtu;
        let offloads = self.config.backend.offloads & self.outside.tx_offloads();
        let line = Arc::new(Mutex::new(Line {
            mtu: usize::from(mtu),
            offloads,
            counters: self.counters.clone(),
            frames: VecDeque::new(),
            bytes: 0,
            spare: Vec::new(),
            full_since: None,
            is_news: false,
            waiters: Vec::new(),
            task: None,
            paused: false,
        }));
        let port = |lanes| {
            // Everything that is on its way to the outside passes.
            let filter = Filter::new(Mac::default());
            filter.set_addresses(Modes { promiscuous: true, ..Modes::default() }.into());
            let shared = (Arc::new(filter), Arc::new(Steering::new(1)));
            Arc::new(Port::new(&self.name, mtu, 1, shared, lanes))
        };
        let outside = self.outside.plug(port(Vec::new()))?;
        let accepted = self.config.backend.offloads & self.outside.rx_offloads();
        let name = self.name.clone();
        let told = Box::new(move |result: Result<(), ErrorCode>| {
            if let Err(error) = result {
                tracing::error!(device = name, %error, "the uplink cannot be set up");
            }
        });
        outside.configure(1, accepted, told)?;
        let inside = self.inside.plug(port(vec![line.clone()]))?;
        let name = self.name.clone();
        let failed = move |error: ErrorCode| {
            tracing::error!(device = name, %error, "the uplink carries no more frames");
        };
        let mut made = None;
        let make = |task: &TaskHandle| {
            lock(&line).task = Some(task.clone());
            let plugs = [outside.clone(), inside.clone()];
            let queues = (outside.queue(0, task)?, inside.queue(0, task)?);
            let pump = Arc::new(Mutex::new(Pump {
                outside: queues.0,
                inside: queues.1,
                plugs,
                line: line.clone(),
                sending: VecDeque::new(),
                is_blocked: false,
                until: None,
                inlet: Inlet::new(self.counters.clone(), usize::from(mtu)),
            }));
            made = Some(pump.clone());
            Ok::<_, ErrorCode>(Box::new(PumpTask(pump)) as Box<dyn Task>)
        };
        let task = executor.spawn_with(worker, counters, failed, make)?;
        *lock(&self.running) = made.map(|pump| Running { task, pump, line });
        Ok(())
    }

    /// Stops everything that is no task of the uplink: what devices send to the outside, and the
    /// back end.
    pub fn quiesce(&self) {
        self.pause(true);
        self.outside.quiesce();
    }

    /// Undoes [`quiesce`](Self::quiesce).
    pub fn resume(&self) {
        self.outside.resume();
        self.pause(false);
    }

    fn pause(&self, paused: bool) {
        if let Some(running) = &*lock(&self.running) {
            lock(&running.line).pause(paused);
        }
    }

    /// As [`Backend::descriptors`].
    ///
    /// # Errors
    /// The process has no more descriptors.
    pub fn descriptors(&self) -> std::io::Result<Vec<(String, OwnedFd)>> {
        self.outside.descriptors()
    }

    /// The uplink as plain data, with the frames that are on their way.
    ///
    /// # Errors
    /// It cannot be saved. The text says why.
    pub fn save(&self) -> Result<Value, String> {
        let running = lock(&self.running);
        let Some(Running { pump, line, .. }) = &*running else {
            return Err("it carries no frames".into());
        };
        let pump = &mut *lock(pump);
        let line = lock(line);
        let frames = pump.sending.iter().chain(&line.frames).map(|frame| {
            let bytes = frame.bytes.get(..frame.len).unwrap_or_default();
            FrameState([&frame.header.bytes(0)[..], bytes].concat())
        });
        let inlet = &pump.inlet;
        state::part(&UplinkState {
            from_outside: state::counts(&self.counters.from_outside.all()),
            to_outside: state::counts(&self.counters.to_outside.all()),
            frames: frames.collect(),
            held: inlet.is_held.then(|| FrameState(inlet.frame.save())),
            backend: self.outside.save()?,
            outside: EndState { plug: pump.plugs[0].save()?, queue: pump.outside.save()? },
            inside: EndState { plug: pump.plugs[1].save()?, queue: pump.inside.save()? },
        })
    }

    /// Makes a state one that outlasts the process ([`vbus_core::Device::outlast`]): nothing is on
    /// its way.
    ///
    /// # Errors
    /// Its back end has something that a kill may break.
    pub fn outlast(saved: &mut Value) -> Result<(), String> {
        let mut state: UplinkState = state::read_part(saved)?;
        check_outlasts(&state.backend)?;
        (state.frames, state.held) = (Vec::new(), None);
        forget_frames(&mut state.outside.queue);
        forget_frames(&mut state.inside.queue);
        *saved = state::part(&state)?;
        Ok(())
    }

    /// Goes on from what [`save`](Self::save) returned. The uplink has carried no frames, and is
    /// quiesced.
    ///
    /// # Errors
    /// The state is wrong. The text says what.
    pub fn restore(&self, saved: &Value) -> Result<(), String> {
        let saved: UplinkState = state::read_part(saved)?;
        let running = lock(&self.running);
        let Some(Running { pump, line, .. }) = &*running else {
            return Err("it carries no frames".into());
        };
        let pump = &mut *lock(pump);
        let mut line = lock(line);
        let frames = saved.frames.iter().map(|frame| Frame::restored(frame, line.offloads));
        let frames: VecDeque<_> = frames.collect::<Result<_, _>>()?;
        let bytes = frames.iter().map(|frame| frame.len).sum::<usize>();
        // A whole queue can be on its way, and another one behind it.
        if frames.len() > 2 * QUEUED_FRAMES || bytes > 2 * (QUEUED_BYTES + FRAME_MAX) {
            return Err(format!("{} frames of {bytes} bytes wait", frames.len()));
        }
        state::add_counts(&self.counters.from_outside.all(), &saved.from_outside)?;
        state::add_counts(&self.counters.to_outside.all(), &saved.to_outside)?;
        self.outside.restore(&saved.backend)?;
        pump.plugs[0].restore(&saved.outside.plug)?;
        pump.plugs[1].restore(&saved.inside.plug)?;
        pump.outside.restore(&saved.outside.queue)?;
        pump.inside.restore(&saved.inside.queue)?;
        if let Some(FrameState(bytes)) = &saved.held {
            pump.inlet.frame.restore(bytes)?;
            pump.inlet.is_held = true;
        }
        (line.frames, line.bytes) = (frames, bytes);
        Ok(())
    }

    /// Carries no more frames. The port leaves the switch.
    pub fn stop(&self) {
        if let Some(running) = lock(&self.running).take() {
            running.task.stop();
        }
    }

    /// Settings and counters, for people.
    pub fn inspect(&self) -> Value {
        let mut value = self.inside.inspect();
        value["mtu"] = self.config.mtu.into();
        value["link"] = self.link.is_up().into();
        value["backend"] = self.outside.inspect();
        value["from-outside"] = json!(self.counters.from_outside);
        value["to-outside"] = json!(self.counters.to_outside);
        value
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A frame in this process's memory.
#[derive(Default)]
struct Frame {
    header: Header,
    /// The frame is in the first `len` bytes.
    bytes: Vec<u8>,
    len: usize,
}

/// An uplink as plain data (spec/state-format.md, "uplink").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct UplinkState {
    from_outside: Counts,
    to_outside: Counts,
    /// Frames on their way to the outside, oldest first.
    frames: Vec<FrameState>,
    /// The frame of the outside that waits for a port's buffers.
    held: Option<FrameState>,
    /// What the back end has for the device.
    backend: Value,
    outside: EndState,
    inside: EndState,
}

/// What a back end has for one end of an uplink.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EndState {
    plug: Value,
    queue: Value,
}

/// The header of 12 bytes, and a frame.
#[derive(Serialize, Deserialize)]
struct FrameState(#[serde(with = "hex::serde")] Vec<u8>);

impl Frame {
    /// The frame of a state, for an outside that accepts these offloads.
    fn restored(FrameState(saved): &FrameState, offloads: Offloads) -> Result<Frame, String> {
        let no_frame = "a frame that waits is none";
        let (head, bytes) = saved.split_first_chunk::<HEADER_BYTES>().ok_or(no_frame)?;
        let mut header = Header::parse(head);
        let fits = (ETH_BYTES..=FRAME_MAX).contains(&bytes.len());
        if !fits || !header.check(bytes.len(), offloads) {
            return Err(no_frame.into());
        }
        Ok(Frame { header, bytes: bytes.to_vec(), len: bytes.len() })
    }

    fn packet(&self) -> Option<Packet<'_>> {
        let packet = Packet::plain(self.bytes.get(..self.len)?)?;
        Some(Packet { header: self.header, ..packet })
    }
}

/// The queue of frames to the outside, as a receive queue of the switch. The tasks of the senders
/// fill it.
struct Line {
    mtu: usize,
    /// The offloads that the outside accepts.
    offloads: Offloads,
    counters: Arc<Counters>,
    frames: VecDeque<Frame>,
    /// Bytes of these frames.
    bytes: usize,
    /// Memory of frames that were sent, for the next ones.
    spare: Vec<Vec<u8>>,
    /// Since when the queue has been full, without a frame that went out.
    full_since: Option<Instant>,
    /// Whether frames came that the task has not been woken for.
    is_news: bool,
    waiters: Vec<Waiter>,
    task: Option<TaskHandle>,
    /// The uplink is quiesced: it takes no frames.
    paused: bool,
}

impl Line {
    fn is_full(&self) -> bool {
        self.paused || self.frames.len() >= QUEUED_FRAMES || self.bytes >= QUEUED_BYTES
    }

    fn drops(&self) -> &Drops {
        &self.counters.to_outside.drops
    }

    /// Moves all frames to `sending`, and makes room for others.
    fn take(&mut self, sending: &mut VecDeque<Frame>, sent: &mut Vec<Vec<u8>>) {
        std::mem::swap(&mut self.frames, sending);
        self.bytes = 0;
        self.is_news = false;
        self.full_since = None;
        self.spare.append(sent);
        self.spare.truncate(QUEUED_FRAMES);
        for waiter in self.waiters.drain(..) {
            waiter.task.wake();
        }
    }
}

impl RxSink for Line {
    fn deliver(&mut self, packet: &Packet<'_>, on_full: OnFull) -> Delivery {
        if !packet.fits_mtu(self.mtu) {
            self.drops().too_long.one();
            return Delivery::Dropped;
        }
        if !packet.header.fits(self.offloads) {
            return Delivery::NeedsCut;
        }
        if self.is_full() {
            let now = Instant::now();
            let until = *self.full_since.get_or_insert(now) + FULL_MAX;
            if on_full == OnFull::Drop || now >= until {
                self.drops().no_buffers.one();
                return Delivery::Dropped;
            }
            return Delivery::Full { until: Some(until) };
        }
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.clear();
        packet.append_to(&mut bytes, FRAME_MAX);
        let len = bytes.len();
        self.bytes += len;
        self.frames.push_back(Frame { header: packet.header, bytes, len });
        self.is_news = true;
        Delivery::Delivered { units: 1 }
    }

    fn has_room(&mut self, _bytes: usize) -> bool {
        !self.is_full()
    }

    fn reserve(&mut self, _read: &mut Read<'_>) -> Reserved {
        Reserved::Nothing // Frames come through `deliver` only.
    }

    fn longest(&self) -> usize {
        self.mtu + ETH_OVERHEAD
    }

    fn post(&mut self) {
        if std::mem::take(&mut self.is_news) {
            if let Some(task) = &self.task {
                task.wake();
            }
        }
    }

    fn wait(&mut self, waiter: &Waiter) {
        if self.waiters.iter().all(|other| other.key != waiter.key) {
            self.waiters.push(waiter.clone());
        }
    }

    fn arm(&mut self) -> Armed {
        // The task wakes the waiters when it takes frames. It is awake while there are any.
        if self.is_full() { Armed::Waiting } else { Armed::Missed }
    }

    fn count_drop(&mut self, reason: RxDrop) {
        self.drops().received(reason);
    }

    fn pause(&mut self, paused: bool) {
        (self.paused, self.full_since) = (paused, None);
        for waiter in self.waiters.drain(..) {
            waiter.task.wake();
        }
    }
}

/// Frames from the outside, on their way into the switch.
struct Inlet {
    counters: Arc<Counters>,
    mtu: usize,
    /// A frame that the interface has given.
    frame: ReadFrame,
    /// Whether this frame waits for a port's buffers.
    is_held: bool,
    /// What this poll may still do, in frames that go to one port.
    left: u32,
    /// The end of the wait for a port's buffers.
    until: Option<Instant>,
    /// Whether the frame waits for its next turn only.
    is_part: bool,
    /// Whether a frame waits for a port's buffers.
    is_waiting: bool,
    /// Whether the outside keeps a frame that has not been sent completely.
    is_pending: bool,
    /// Whether the outside has offered a frame in this poll.
    is_offered: bool,
}

impl Inlet {
    fn new(counters: Arc<Counters>, mtu: usize) -> Inlet {
        Inlet {
            counters,
            mtu,
            frame: ReadFrame::default(),
            is_held: false,
            left: 0,
            until: None,
            is_part: false,
            is_waiting: false,
            is_pending: false,
            is_offered: false,
        }
    }

    /// Sends a frame into the switch. Returns false if it has to wait, or has more turns to come.
    fn send(&mut self, inside: &mut dyn Queue, packet: &Packet<'_>) -> bool {
        let direction = &self.counters.from_outside;
        (self.until, self.is_waiting, self.is_part) = (None, false, false);
        if !packet.fits_mtu(self.mtu) {
            direction.drops.too_long.one();
            return true;
        }
        match inside.send(packet) {
            Sent::Done { units } => {
                self.left = self.left.saturating_sub(units);
                direction.count(packet.bytes());
            }
            Sent::Dropped(reason) => {
                self.left = self.left.saturating_sub(1);
                direction.drops.sent(reason);
            }
            Sent::Part => {
                (self.left, self.is_part) = (0, true);
                return false;
            }
            Sent::Wait { until, moved } => {
                (self.until, self.is_waiting, self.is_part) = (until, true, moved);
                return false;
            }
        }
        true
    }

    /// Sends the held frame. Returns false if it still waits.
    fn retry(&mut self, inside: &mut dyn Queue) -> bool {
        if self.is_held {
            let frame = std::mem::take(&mut self.frame);
            self.is_held = !self.send(inside, &frame.packet());
            self.frame = frame;
        }
        !self.is_held
    }
}

/// The receive queue that the outside sees for one poll.
struct Entrance<'a> {
    inlet: &'a mut Inlet,
    inside: &'a mut dyn Queue,
}

impl RxSink for Entrance<'_> {
    fn deliver(&mut self, packet: &Packet<'_>, _on_full: OnFull) -> Delivery {
        self.inlet.is_offered = true;
        if self.inlet.left == 0 {
            return Delivery::Full { until: None }; // The next poll comes at once.
        }
        self.inlet.is_pending = !self.inlet.send(self.inside, packet);
        match self.inlet.is_pending {
            true => Delivery::Full { until: self.inlet.until },
            // The inlet counts the work by itself.
            false => Delivery::Delivered { units: 1 },
        }
    }

    fn has_room(&mut self, _bytes: usize) -> bool {
        !self.inlet.is_held
    }

    fn reserve(&mut self, read: &mut Read<'_>) -> Reserved {
        if self.inlet.left == 0 || !self.inlet.retry(self.inside) {
            return Reserved::Full;
        }
        match self.inlet.frame.read(read) {
            Ok(true) => {
                // If the frame has to wait, the next call is told.
                self.inlet.is_held = true;
                self.inlet.retry(self.inside);
                Reserved::Frame
            }
            Ok(false) => Reserved::Nothing,
            Err(error) => Reserved::Failed(error),
        }
    }

    fn longest(&self) -> usize {
        FRAME_MAX
    }

    fn post(&mut self) {}

    /// The task of the uplink is woken by the port whose buffers the frame lacks.
    fn wait(&mut self, _waiter: &Waiter) {}

    fn arm(&mut self) -> Armed {
        Armed::Waiting
    }

    fn count_drop(&mut self, reason: RxDrop) {
        self.inlet.counters.from_outside.drops.received(reason);
    }
}

/// The task of an uplink.
struct Pump {
    outside: Box<dyn Queue>,
    inside: Box<dyn Queue>,
    /// The plugs, that of the outside first. They live as long as their queues.
    plugs: [Arc<dyn Plug>; 2],
    line: Arc<Mutex<Line>>,
    /// Frames that are being sent to the outside.
    sending: VecDeque<Frame>,
    /// Whether the outside takes no frames now.
    is_blocked: bool,
    /// When the outside takes frames again, if it waits for a time.
    until: Option<Instant>,
    inlet: Inlet,
}

impl Pump {
    /// Sends frames to the outside with at most `budget` units of work. Returns how many.
    fn send(&mut self, budget: u32) -> u32 {
        let (mut count, mut spent, mut spare) = (0, 0_u32, Vec::new());
        (self.is_blocked, self.until) = (false, None);
        while spent < budget {
            if self.sending.is_empty() {
                lock(&self.line).take(&mut self.sending, &mut spare);
            }
            let Some(frame) = self.sending.front() else { break };
            let direction = &self.inlet.counters.to_outside;
            match frame.packet().map(|packet| self.outside.send(&packet)) {
                Some(Sent::Done { units }) => {
                    spent = spent.saturating_add(units.saturating_sub(1));
                    direction.count(frame.len);
                }
                Some(Sent::Dropped(reason)) => direction.drops.sent(reason),
                Some(Sent::Wait { until, .. }) => {
                    (self.is_blocked, self.until) = (true, until);
                    break;
                }
                Some(Sent::Part) => {
                    self.is_blocked = true;
                    break;
                }
                None => direction.drops.bad_frame.one(),
            }
            spare.extend(self.sending.pop_front().map(|frame| frame.bytes));
            (count, spent) = (count + 1, spent.saturating_add(1));
        }
        self.outside.flush();
        if count != 0 {
            lock(&self.line).full_since = None;
        }
        count
    }
}

/// The task of an uplink. It shares its lock with whoever saves the uplink.
struct PumpTask(Arc<Mutex<Pump>>);

impl Task for PumpTask {
    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        lock(&self.0).poll(budget)
    }

    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        lock(&self.0).arm()
    }

    fn deadline(&self) -> Option<Instant> {
        lock(&self.0).deadline()
    }

    fn carried(&self) -> u64 {
        lock(&self.0).carried()
    }
}

impl Pump {
    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        let sent = self.send(budget);
        (self.inlet.is_part, self.inlet.is_offered) = (false, false);
        self.inlet.left = budget;
        let received = {
            let Pump { outside, inside, inlet, .. } = self;
            match inlet.retry(&mut **inside) {
                true => outside.receive(&mut Entrance { inlet, inside: &mut **inside }, budget),
                false => Ok(0),
            }
        };
        if self.inlet.is_pending && !self.inlet.is_offered {
            // The peer that had sent the frame is gone, and the frame with it.
            self.inside.forget();
            (self.inlet.is_pending, self.inlet.is_waiting, self.inlet.until) = (false, false, None);
        }
        // Flush even if the outside has failed: its earlier frames are in drivers' buffers.
        self.inside.flush();
        let received = received?;
        // A frame that went its way was work, even if the outside gave no other.
        let worked = self.inlet.left != budget;
        let busy = sent + received != 0 || worked || self.inlet.is_part;
        Ok(if busy { Progress::Busy } else { Progress::Idle })
    }

    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        let outside = if self.is_blocked { self.outside.arm() } else { Armed::Waiting };
        let inside = if self.inlet.is_waiting { self.inside.arm() } else { Armed::Waiting };
        Ok(if outside == Armed::Missed { outside } else { inside })
    }

    fn deadline(&self) -> Option<Instant> {
        [self.until, self.inlet.until, self.outside.deadline()].into_iter().flatten().min()
    }

    fn carried(&self) -> u64 {
        let Counters { from_outside, to_outside } = &*self.inlet.counters;
        let of = |way: &Direction| way.bytes.get() + FRAME_WEIGHT * way.frames.get();
        of(from_outside) + of(to_outside)
    }
}

#[cfg(test)]
mod tests {
    use vbus_tap::HEADER_BYTES;

    use super::*;

    /// The units of work of each frame.
    const UNITS: u32 = 10;

    /// Both ends of a pump: takes all frames, and gives frames without end.
    struct End;

    impl Plug for End {
        fn queue(&self, _: u16, _: &TaskHandle) -> Result<Box<dyn Queue>, ErrorCode> {
            Ok(Box::new(End))
        }

        fn set_mac(&self, _: Mac) -> bool {
            true
        }
    }

    impl Queue for End {
        fn send(&mut self, _: &Packet<'_>) -> Sent {
            Sent::Done { units: UNITS }
        }

        fn receive(&mut self, sink: &mut dyn RxSink, budget: u32) -> Result<u32, ErrorCode> {
            let taken = |n: &u32| {
                // By turns as a stream does, and as an interface does.
                if n % 2 == 0 {
                    let packet = Packet::plain(&[2; 60]).unwrap();
                    let delivery = sink.deliver(&packet, OnFull::Wait);
                    return matches!(delivery, Delivery::Delivered { .. });
                }
                sink.reserve(&mut |_| Ok(HEADER_BYTES + 60)) == Reserved::Frame
            };
            let count = (0..budget).take_while(taken).count();
            Ok(u32::try_from(count).unwrap())
        }
    }

    #[test]
    fn a_poll_does_as_much_work_as_its_budget() {
        let counters = Arc::new(Counters::default());
        let bytes = vec![2; 60];
        let frame = || Frame { header: Header::default(), bytes: bytes.clone(), len: 60 };
        let line = Line {
            mtu: 1500,
            offloads: Offloads::NONE,
            counters: counters.clone(),
            frames: (0..QUEUED_FRAMES).map(|_| frame()).collect(),
            bytes: 60 * QUEUED_FRAMES,
            spare: Vec::new(),
            full_since: None,
            is_news: false,
            waiters: Vec::new(),
            task: None,
            paused: false,
        };
        let mut pump = Pump {
            outside: Box::new(End),
            inside: Box::new(End),
            plugs: [Arc::new(End), Arc::new(End)],
            line: Arc::new(Mutex::new(line)),
            sending: VecDeque::new(),
            is_blocked: false,
            until: None,
            inlet: Inlet::new(counters.clone(), 1500),
        };
        for turn in 1..=3 {
            assert_eq!(pump.poll(64), Ok(Progress::Busy));
            // The last frame may cost more than what is left.
            let each = u64::from(64_u32.div_ceil(UNITS));
            let counted = [&counters.to_outside, &counters.from_outside].map(|d| d.frames.get());
            assert_eq!(counted, [turn * each; 2]);
        }
    }
}
