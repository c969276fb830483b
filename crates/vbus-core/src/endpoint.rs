// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device as a connector sees it: open and close, regions, calls, doorbells, memory, interrupts.

mod saved;

use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use serde_json::{Value, json};
use vbus_shm::abi::{command, event};
use vbus_shm::signal::{Armed, BLOCK_ALIGN, BLOCK_BYTES};
use vbus_shm::{ErrorCode, Versions};

use crate::call::{CALLS_MAX, Call, Called, PendingCall};
use crate::counter::ConnectionCounters;
use crate::device::{Connection, Device, Fail, Identity, Open, Region};
use crate::events::{Events, Notifier};
use crate::executor::{Executor, Progress, Task, TaskHandle};
use crate::host::{ConnectionState, Host};
use crate::interrupt::InterruptSink;
use crate::lock::lock;
use crate::memory::{Access, MapError, MemoryContext, Window};
use crate::router::{Outlets, Router};
use crate::state::{Place, RegionPart};

/// The most bytes of a region.
pub const REGION_BYTES_MAX: u64 = 16 << 20;

/// The sizes of a region's pages that a driver may choose: from 4 KiB to 1 GiB.
const PAGE_SHIFT_MIN: u8 = 12;
const PAGE_SHIFT_MAX: u8 = 30;

/// What happened, for the log, if [`MemoryContext::is_lost`].
pub const MEMORY_LOST: &str = "the device accessed memory of its peer that is not there: the file \
    was truncated, or a hole in it got no page (no huge page is free, the file system is full, or \
    there is no memory)";

/// Arguments of OPEN.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct OpenRequest {
    /// Version of the ABI.
    pub version: u16,
    /// Vector of the function's events.
    pub vector: u16,
    /// Features: a subset of those offered.
    pub features: u64,
    /// Address of the handshake word, and the value that the driver has written there.
    pub handshake: (u64, u64),
}

impl OpenRequest {
    /// Without features, in the highest version that this code speaks, with events on vector 0.
    pub fn new(handshake: (u64, u64)) -> OpenRequest {
        OpenRequest { version: Versions::SUPPORTED.highest, vector: 0, features: 0, handshake }
    }

    /// The same in this version of the ABI.
    #[must_use]
    pub fn with_version(mut self, version: u16) -> OpenRequest {
        self.version = version;
        self
    }

    /// The same with the function's events on this vector.
    #[must_use]
    pub fn with_vector(mut self, vector: u16) -> OpenRequest {
        self.vector = vector;
        self
    }

    /// The same with these features.
    #[must_use]
    pub fn with_features(mut self, features: u64) -> OpenRequest {
        self.features = features;
        self
    }
}

/// Arguments of REGION_ADD. Their form has been checked, their content has not.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct RegionRequest {
    /// The class's id for it.
    pub id: u32,
    /// Interrupt vector.
    pub vector: u16,
    /// 0: the region is contiguous at `addr`. Otherwise `addr` is the address of an array of page
    /// addresses, and each page has `1 << page_shift` bytes.
    pub page_shift: u8,
    /// Address.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// Offset of the signal block, if there is one.
    pub signal: Option<u64>,
}

impl RegionRequest {
    /// Region `id`: `len` contiguous bytes at `addr`, without a signal block, with interrupts on
    /// vector 0.
    pub fn new(id: u32, addr: u64, len: u64) -> RegionRequest {
        RegionRequest { id, vector: 0, page_shift: 0, addr, len, signal: None }
    }

    /// The same with interrupts on this vector.
    #[must_use]
    pub fn with_vector(mut self, vector: u16) -> RegionRequest {
        self.vector = vector;
        self
    }

    /// The same in pages of `1 << page_shift` bytes: `addr` is the address of the list of their
    /// addresses. 0: contiguous.
    #[must_use]
    pub fn with_page_shift(mut self, page_shift: u8) -> RegionRequest {
        self.page_shift = page_shift;
        self
    }

    /// The same with the signal block at byte `offset` of the region, or without one.
    #[must_use]
    pub fn with_signal(mut self, offset: Option<u64>) -> RegionRequest {
        self.signal = offset;
        self
    }
}

type SharedConnection = Arc<Mutex<Box<dyn Connection>>>;

struct OpenConnection {
    connection: SharedConnection,
    task: TaskHandle,
    /// Tells this connection from earlier ones. A task of an earlier one may still report a fault.
    generation: u64,
    /// What the driver accepted.
    version: u16,
    features: u64,
    /// By handle.
    regions: Vec<Option<OpenRegion>>,
    /// The last call that took time.
    call: Option<PendingCall>,
}

/// A region of an open connection.
struct OpenRegion {
    part: RegionPart,
    /// The driver's addresses that it has.
    ranges: Vec<(u64, u64)>,
}

enum Inner {
    Closed,
    Open(OpenConnection),
    Broken(ErrorCode),
    Removed,
}

/// A device on the bus with the front of vbus: commands, a connection, events. At most one
/// connection is open at a time. The [`Host`] has what every front needs.
pub struct Endpoint {
    host: Host,
    device: Arc<dyn Device>,
    identity: Identity,
    versions: Versions,
    events: Arc<Events>,
    outlets: Weak<Outlets>,
    inner: Mutex<Inner>,
    /// Each call that the class holds has a clone.
    calls: Arc<()>,
    /// The features of the open connection, 0 if none is open.
    features: AtomicU64,
    generations: AtomicU64,
    /// Whether the device is quiesced. Changed under the lock of `inner`.
    quiesced: AtomicBool,
    /// What is saved now outlasts this process. Changed while the device is quiesced.
    outlasts: AtomicBool,
    this: Weak<Endpoint>,
}

impl Endpoint {
    pub(crate) fn new(
        host: Host,
        device: Arc<dyn Device>,
        (identity, config): (Identity, Vec<u8>),
        versions: Versions,
        outlets: Weak<Outlets>,
    ) -> Arc<Endpoint> {
        let events = Arc::new(Events::new(config, host.outlet().clone()));
        Arc::new_cyclic(|this| Endpoint {
            host,
            device,
            identity,
            versions,
            events,
            outlets,
            inner: Mutex::new(Inner::Closed),
            calls: Arc::default(),
            features: AtomicU64::new(0),
            generations: AtomicU64::new(0),
            quiesced: AtomicBool::new(false),
            outlasts: AtomicBool::new(false),
            this: this.clone(),
        })
    }

    /// The part of the device that every front needs.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// As [`Host::name`].
    pub fn name(&self) -> &str {
        self.host.name()
    }

    /// What the device is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// The versions of the ABI that the device can be opened with.
    pub fn versions(&self) -> Versions {
        self.versions
    }

    /// The device's config area as it is now, and its generation. Each change adds one to the
    /// generation, modulo 2^32. The first generation may be any number.
    pub fn config(&self) -> (Arc<[u8]>, u32) {
        self.events.config()
    }

    /// The device's incarnation, not 0.
    pub fn incarnation(&self) -> u64 {
        self.events.incarnation()
    }

    /// Ends the connection and changes the incarnation. A connector or a control client calls this
    /// when the device has lost what its driver told it, for example after the virtual machine was
    /// restored from a snapshot. The driver gets [`event::INCARNATION`], and one interrupt on each
    /// vector that another device carries: it may wait for one of these alone.
    pub fn reincarnate(&self) {
        let mut inner = lock(&self.inner);
        self.events.change_incarnation();
        let next = if matches!(*inner, Inner::Removed) { Inner::Removed } else { Inner::Closed };
        let vector = self.end(&mut inner, next, event::INCARNATION);
        drop(inner);
        self.events.trigger(vector);
    }

    /// Closes the connection without a word to the driver, and changes the incarnation. A connector
    /// calls this when the function was reset, or its peer has gone, while a connection was open.
    /// The driver may go on: a virtual machine that is restored from a snapshot looks like that.
    pub fn close_and_reincarnate(&self) {
        self.close();
        self.events.change_incarnation();
    }

    /// The pending events of the function: bits of [`event`].
    pub fn events_pending(&self) -> u32 {
        self.events.pending()
    }

    /// Takes these events back, because the driver has seen them.
    pub fn acknowledge_events(&self, events: u32) {
        self.events.acknowledge(events);
    }

    pub(crate) fn notifier(&self) -> Notifier {
        Notifier(self.events.clone())
    }

    /// As [`Host::executor`].
    pub fn executor(&self) -> &Arc<Executor> {
        self.host.executor()
    }

    /// As [`Host::worker`].
    pub fn worker(&self) -> usize {
        self.host.worker()
    }

    /// As [`Host::counters`].
    pub fn counters(&self) -> &Arc<ConnectionCounters> {
        self.host.counters()
    }

    /// Name, class, state, counters, what the peer's memory uses of the budgets, and what
    /// [`Device::inspect`] tells.
    pub fn inspect(&self) -> Value {
        self.host.doorbells().count_eventfds();
        let (state, fault) = match self.state() {
            ConnectionState::Closed => ("closed", None),
            ConnectionState::Open => ("open", None),
            ConnectionState::Broken(code) => ("broken", Some(code.to_string())),
        };
        json!({
            "name": self.name(),
            "class": self.identity.class_name,
            "state": state,
            "fault": fault,
            "incarnation": format!("{:#018x}", self.incarnation()),
            "counters": &**self.counters(),
            "memory": self.memory().inspect(),
            "device": self.device.inspect(),
        })
    }

    /// As [`Host::set_interrupt_sink`].
    pub fn set_interrupt_sink(&self, sink: Arc<dyn InterruptSink>) {
        self.host.set_interrupt_sink(sink);
    }

    /// As [`Host::set_has_left`].
    pub fn set_has_left(&self, has_left: impl Fn() -> bool + Send + Sync + 'static) {
        self.host.set_has_left(has_left);
    }

    /// As [`Host::set_router`].
    pub fn set_router(&self, router: &str) {
        self.host.set_router(router);
    }

    /// As [`Host::router`].
    pub fn router(&self) -> Option<String> {
        self.host.router()
    }

    /// Whether a connection is open.
    pub fn state(&self) -> ConnectionState {
        self.host.state()
    }

    /// Features of the open connection. 0 if none is open.
    pub fn features_accepted(&self) -> u64 {
        self.features.load(Ordering::Relaxed)
    }

    /// As [`Host::memory`].
    pub fn memory(&self) -> &Arc<MemoryContext> {
        self.host.memory()
    }

    /// Maps memory of the peer; see [`MemoryContext::map`].
    pub fn map<F: AsFd>(
        &self,
        start: u64,
        len: u64,
        file: Option<(F, u64)>,
        access: Access,
    ) -> Result<(), MapError> {
        self.memory().map(start, len, file, access)
    }

    /// Unmaps memory of the peer, whole maps only. Returns the number of bytes. If a region of the
    /// open connection lies in the range, that connection ends first ([`ErrorCode::REVOKED`]). No
    /// command of the driver runs in between. When this returns, no task touches the memory any
    /// more.
    pub fn unmap(&self, start: u64, len: u64) -> u64 {
        let hit = |from, to| from < start.saturating_add(len) && start < to;
        self.revoke(hit, || self.memory().unmap(start, len))
    }

    /// Unmaps all memory of the peer, as [`unmap`](Self::unmap).
    pub fn unmap_all(&self) {
        self.revoke(|_, _| true, || self.memory().unmap_all());
    }

    /// Ends the connection if one of its regions is `hit`, and then calls `unmap`. The lock of the
    /// connection is held for both, so that no region is added in between. `unmap` waits for views
    /// of the memory. No holder of a view takes that lock.
    fn revoke<T>(&self, hit: impl Fn(u64, u64) -> bool, unmap: impl FnOnce() -> T) -> T {
        let mut inner = lock(&self.inner);
        let Inner::Open(open) = &*inner else { return unmap() };
        let hit =
            open.regions.iter().flatten().flat_map(|r| &r.ranges).any(|&(from, to)| hit(from, to));
        let mut vector = None;
        if hit {
            tracing::warn!(
                device = self.name(),
                "memory of a region was unmapped; the connection ends"
            );
            vector = self.end(&mut inner, Inner::Broken(ErrorCode::REVOKED), event::BROKEN);
        }
        let unmapped = unmap();
        drop(inner);
        self.events.trigger(vector);
        unmapped
    }

    /// OPEN.
    pub fn open(&self, request: OpenRequest) -> Result<(), ErrorCode> {
        let OpenRequest { version, vector, features, handshake } = request;
        self.counters().commands.one();
        let mut inner = lock(&self.inner);
        self.check_not_quiesced()?;
        match &*inner {
            Inner::Closed => {}
            Inner::Open(_) | Inner::Broken(_) => return Err(ErrorCode::ALREADY_OPEN),
            Inner::Removed => return Err(ErrorCode::REMOVED),
        }
        if !self.versions.contains(version) {
            return Err(ErrorCode::BAD_VERSION);
        }
        if vector >= self.identity.vectors {
            return Err(ErrorCode::BAD_VECTOR);
        }
        if features & !self.identity.features != 0 {
            return Err(ErrorCode::BAD_FEATURES);
        }
        if handshake.0 % 8 != 0 {
            return Err(ErrorCode::BAD_ALIGNMENT);
        }
        let mut word = [0; 8];
        self.memory().view().peek(handshake.0, &mut word)?;
        if u64::from_le_bytes(word) != handshake.1 {
            tracing::warn!(device = self.name(), "{}", ErrorCode::NOT_SHARED);
            return Err(ErrorCode::NOT_SHARED);
        }
        let (open, generation) = self.begin(version, features);
        let fail = open.fail.clone();
        let connection = self.contain(|| self.device.open(open)).ok_or(ErrorCode::FAILED)??;
        let regions = (0..self.identity.regions).map(|_| None).collect();
        let open = self.run(connection, fail, (version, features), generation, regions);
        self.host.outlet().open();
        self.events.open(vector);
        *inner = Inner::Open(open);
        self.publish(&inner, features);
        self.counters().opens.one();
        tracing::info!(device = self.name(), features = format_args!("{features:#x}"), "opened");
        Ok(())
    }

    /// What a new connection gets, and its generation.
    fn begin(&self, version: u16, features: u64) -> (Open, u64) {
        let generation = self.generations.fetch_add(1, Ordering::Relaxed);
        let fail = {
            let (this, failed) = (self.this.clone(), AtomicBool::new(false));
            Fail(Arc::new(move |code| {
                // The first failure ends the connection. If all tasks fail, the others do not wait
                // for that on the threads that all devices share. The order is of no concern: the
                // endpoint has a lock.
                if failed.swap(true, Ordering::Relaxed) {
                    return;
                }
                if let Some(endpoint) = this.upgrade() {
                    endpoint.fail(generation, code);
                }
            }))
        };
        let open = Open {
            version,
            features,
            incarnation: self.events.incarnation(),
            notifier: self.notifier(),
            memory: self.memory().clone(),
            executor: self.executor().clone(),
            worker: self.worker(),
            counters: self.counters().clone(),
            fail,
            router: Router::new(self.name(), self.router().is_some(), self.outlets.clone()),
        };
        (open, generation)
    }

    /// Runs the task of a connection that the device has made.
    fn run(
        &self,
        connection: Box<dyn Connection>,
        fail: Fail,
        (version, features): (u16, u64),
        generation: u64,
        regions: Vec<Option<OpenRegion>>,
    ) -> OpenConnection {
        let connection: SharedConnection = Arc::new(Mutex::new(connection));
        let task = self.executor().spawn(
            self.worker(),
            Box::new(ConnectionTask(connection.clone())),
            self.counters().clone(),
            move |code| fail.fail(code),
        );
        OpenConnection { connection, task, generation, version, features, regions, call: None }
    }

    /// Closes the connection, for CLOSE, a reset, or the driver's end. Afterwards the device holds
    /// nothing of the driver's memory, and a driver may open it again.
    pub fn close(&self) {
        let mut inner = lock(&self.inner);
        if !matches!(*inner, Inner::Removed) {
            self.end(&mut inner, Inner::Closed, 0);
        }
        self.events.close();
    }

    /// The device leaves the bus. The connection ends, and there will be no other.
    pub(crate) fn remove(&self) {
        let mut inner = lock(&self.inner);
        let vector = self.end(&mut inner, Inner::Removed, event::REMOVED);
        drop(inner);
        self.events.trigger(vector);
        self.device.removed();
    }

    /// Ends the connection if the peer has taken away memory that the device then accessed. If a
    /// connector wants to end the peer's session instead, it is told.
    pub(crate) fn check_memory(&self) {
        if !self.memory().is_lost() || self.memory().tell_loss() {
            return;
        }
        let mut inner = lock(&self.inner);
        if matches!(*inner, Inner::Open(_)) {
            tracing::warn!(device = self.name(), "{MEMORY_LOST}");
            let broken = Inner::Broken(ErrorCode::REVOKED);
            let vector = self.end(&mut inner, broken, event::BROKEN);
            drop(inner);
            self.events.trigger(vector);
        }
    }

    fn fail(&self, generation: u64, code: ErrorCode) {
        // A device that reads zeros may find the driver at fault. But the memory has gone.
        let lost = self.memory().is_lost();
        // A driver that leaves may give its memory back before the device is told, for instance
        // because this process stood still.
        let left = self.host.has_left();
        let code = match (lost, left) {
            (true, _) => ErrorCode::REVOKED,
            (_, true) => ErrorCode::NOT_OPEN,
            _ => code,
        };
        let mut inner = lock(&self.inner);
        if matches!(&*inner, Inner::Open(open) if open.generation == generation) {
            if left {
                tracing::info!(device = self.name(), "the driver has left");
            } else if lost {
                // A connector that is told of the loss says so in the log.
                tracing::debug!(device = self.name(), "{MEMORY_LOST}");
            } else {
                tracing::warn!(device = self.name(), error = %code, "a fault ends the connection");
            }
            let vector = self.end(&mut inner, Inner::Broken(code), event::BROKEN);
            drop(inner);
            self.events.trigger(vector);
        }
    }

    /// Runs `work`, a method of the class. Returns `None` if it panicked. A panic of the class must
    /// not end the connector: the device would then have no later drivers.
    fn contain<T>(&self, work: impl FnOnce() -> T) -> Option<T> {
        let done = catch_unwind(AssertUnwindSafe(work)).ok();
        if done.is_none() {
            tracing::error!(device = self.name(), "the class panicked");
        }
        done
    }

    /// The class panicked during a command. Ends the open connection.
    fn panicked(&self, mut inner: MutexGuard<'_, Inner>) -> ErrorCode {
        let vector = self.end(&mut inner, Inner::Broken(ErrorCode::FAILED), event::BROKEN);
        drop(inner);
        self.events.trigger(vector);
        ErrorCode::FAILED
    }

    /// Ends the open connection, if there is one, and everything that belongs to it. Then it makes
    /// `events` pending; 0: the driver itself ended the connection. Returns the vector of the
    /// events: the caller triggers it once it has released the lock of `inner`.
    fn end(&self, inner: &mut Inner, next: Inner, events: u32) -> Option<u16> {
        let before = std::mem::replace(inner, next);
        if let Inner::Open(open) = before {
            if let Some(call) = &open.call {
                call.cancel(match *inner {
                    Inner::Broken(error) => error,
                    Inner::Removed => ErrorCode::REMOVED,
                    Inner::Closed | Inner::Open(_) => ErrorCode::NOT_OPEN,
                });
            }
            self.host.doorbells().detach_all();
            open.task.stop();
            self.contain(|| drop(open.connection));
            // Counted before it shows. NOT_OPEN: the driver has left.
            if matches!(inner, Inner::Broken(code) if *code != ErrorCode::NOT_OPEN) {
                self.counters().broken.one();
            }
            self.publish(inner, 0);
            // The events first: a driver that is woken by its routes looks at them.
            let vector = self.events.add(events);
            self.host.outlet().close(events != 0);
            tracing::info!(device = self.name(), "closed");
            return vector;
        }
        self.publish(inner, 0);
        self.events.add(events)
    }

    /// Shows the state to those who do not wait for the lock: a command may hold it for long.
    fn publish(&self, inner: &Inner, features: u64) {
        self.features.store(features, Ordering::Relaxed);
        self.host.set_state(match inner {
            Inner::Closed => ConnectionState::Closed,
            Inner::Open(_) => ConnectionState::Open,
            Inner::Broken(code) => ConnectionState::Broken(*code),
            Inner::Removed => ConnectionState::Broken(ErrorCode::REMOVED),
        });
    }

    /// REGION_ADD. Returns the handle.
    pub fn region_add(&self, request: RegionRequest) -> Result<u32, ErrorCode> {
        self.counters().commands.one();
        let mut inner = lock(&self.inner);
        self.check_not_quiesced()?;
        let Inner::Open(open) = &mut *inner else { return Err(ErrorCode::NOT_OPEN) };
        let (vector, len) = (request.vector, request.len);
        let signal_offset = self.check_shape(vector, request.addr, len, request.signal)?;
        let free = open.regions.iter().position(Option::is_none).ok_or(ErrorCode::LIMIT)?;
        let handle = u32::try_from(free).map_err(|_| ErrorCode::LIMIT)?;
        let check = || lock(&open.connection).check_region(request.id, request.len);
        let Some(wanted) = self.contain(check) else {
            return Err(self.panicked(inner));
        };
        wanted?;
        let place = match request.page_shift {
            0 => Place::At(request.addr),
            shift @ PAGE_SHIFT_MIN..=PAGE_SHIFT_MAX => {
                let count = request.len.div_ceil(1 << shift);
                if count > command::PAGES_MAX {
                    return Err(ErrorCode::LIMIT);
                }
                let mut list =
                    vec![0u8; usize::try_from(count * 8).map_err(|_| ErrorCode::BAD_LENGTH)?];
                self.memory().view().read(request.addr, &mut list)?;
                Place::Pages { shift, pages: list.chunks_exact(8).map(le64).collect() }
            }
            _ => return Err(ErrorCode::BAD_ARGUMENT),
        };
        let window = self.window(&place, request.len)?;
        let region = Region {
            id: request.id,
            handle,
            window,
            signal_offset,
            interrupt: self.host.interrupt(request.vector),
            doorbell: self.host.doorbells().doorbell(handle),
        };
        region.doorbell.bind(&open.task)?;
        let Some(added) = self.contain(|| lock(&open.connection).region_added(region)) else {
            return Err(self.panicked(inner));
        };
        if let Err(code) = added {
            self.host.doorbells().detach(free);
            return Err(code);
        }
        open.regions[free] = Some(OpenRegion {
            ranges: place.ranges(request.len),
            part: RegionPart {
                handle,
                id: request.id,
                vector: request.vector,
                len: request.len,
                signal: request.signal,
                place,
            },
        });
        open.task.wake();
        Ok(handle)
    }

    /// Checks what a driver or a state says of a region's vector, length and signal block, and of
    /// the address of the region or of its list of pages. Returns the offset of the signal block.
    fn check_shape(
        &self,
        vector: u16,
        addr: u64,
        len: u64,
        signal: Option<u64>,
    ) -> Result<Option<usize>, ErrorCode> {
        if vector >= self.identity.vectors {
            return Err(ErrorCode::BAD_VECTOR);
        }
        if len == 0 || len > REGION_BYTES_MAX {
            return Err(ErrorCode::BAD_LENGTH);
        }
        if addr % 64 != 0 || len % 8 != 0 {
            return Err(ErrorCode::BAD_ALIGNMENT);
        }
        match signal {
            None => Ok(None),
            Some(offset) if offset % BLOCK_ALIGN as u64 != 0 => Err(ErrorCode::BAD_ALIGNMENT),
            Some(offset) if offset.checked_add(BLOCK_BYTES as u64).is_none_or(|end| end > len) => {
                Err(ErrorCode::BAD_SIGNAL)
            }
            Some(offset) => usize::try_from(offset).map(Some).map_err(|_| ErrorCode::BAD_SIGNAL),
        }
    }

    /// A window on a region of `len` bytes.
    fn window(&self, place: &Place, len: u64) -> Result<Window, ErrorCode> {
        match place {
            Place::At(addr) => self.memory().window(*addr, len),
            Place::Pages { shift, pages } => {
                self.memory().window_of_pages(pages, u32::from(*shift), len)
            }
        }
    }

    /// REGION_DROP.
    pub fn region_drop(&self, handle: u64) -> Result<(), ErrorCode> {
        self.counters().commands.one();
        let mut inner = lock(&self.inner);
        self.check_not_quiesced()?;
        let Inner::Open(open) = &mut *inner else { return Err(ErrorCode::NOT_OPEN) };
        let at = usize::try_from(handle).map_err(|_| ErrorCode::NO_REGION)?;
        let handle = u32::try_from(handle).map_err(|_| ErrorCode::NO_REGION)?;
        let region =
            open.regions.get_mut(at).filter(|r| r.is_some()).ok_or(ErrorCode::NO_REGION)?;
        let Some(dropped) = self.contain(|| lock(&open.connection).region_dropped(handle)) else {
            return Err(self.panicked(inner));
        };
        dropped?;
        *region = None;
        self.host.doorbells().detach(at);
        Ok(())
    }

    /// CALL. Copies the buffer in, calls the class, and copies the buffer out when the class has
    /// finished. While a call goes on, another call fails with [`ErrorCode::IN_PROGRESS`].
    pub fn call(
        &self,
        function: u32,
        flags: u32,
        addr: u64,
        len: u64,
    ) -> Result<Called, ErrorCode> {
        self.counters().commands.one();
        let mut inner = lock(&self.inner);
        self.check_not_quiesced()?;
        let Inner::Open(open) = &mut *inner else { return Err(ErrorCode::NOT_OPEN) };
        if open.call.as_ref().is_some_and(|call| call.result().is_none()) {
            return Err(ErrorCode::IN_PROGRESS);
        }
        if len > command::CALL_MAX {
            return Err(ErrorCode::BAD_LENGTH);
        }
        if Arc::strong_count(&self.calls) > CALLS_MAX {
            tracing::warn!(device = self.name(), "the class still works on {CALLS_MAX} calls");
            return Err(ErrorCode::LIMIT);
        }
        let mut buffer = vec![0; usize::try_from(len).map_err(|_| ErrorCode::BAD_LENGTH)?];
        if len > 0 {
            let view = self.memory().view();
            // Checked before the class acts: the answer must be writable afterwards.
            view.slice(addr, len, true)?;
            view.read(addr, &mut buffer)?;
        }
        let (call, pending) = Call::new(
            self.calls.clone(),
            (function, flags),
            (addr, buffer),
            self.memory().clone(),
            self.events.clone(),
        );
        if self.contain(|| lock(&open.connection).start_call(call)).is_none() {
            return Err(self.panicked(inner));
        }
        if let Some(result) = pending.result_or_tell() {
            let value = result?;
            open.task.wake();
            return Ok(Called::Now(value));
        }
        open.call = Some(pending.clone());
        Ok(Called::Later(pending))
    }

    /// Rings doorbell `handle`, for the driver. A doorbell that belongs to no region does nothing.
    pub fn ring(&self, handle: u64) {
        self.host.doorbells().ring(handle);
    }

    /// As [`Doorbells::eventfd`](crate::Doorbells::eventfd).
    pub fn doorbell_eventfd(&self, handle: u32) -> rustix::io::Result<Arc<OwnedFd>> {
        self.host.doorbells().eventfd(handle)
    }

    /// As [`Doorbells::forget_eventfds`](crate::Doorbells::forget_eventfds).
    pub fn forget_doorbell_eventfds(&self) {
        self.host.doorbells().forget_eventfds();
    }
}

fn le64(bytes: &[u8]) -> u64 {
    let mut b = [0; 8];
    b.copy_from_slice(bytes);
    u64::from_le_bytes(b)
}

/// The connection as a task. It shares its lock with the calls.
struct ConnectionTask(SharedConnection);

impl Task for ConnectionTask {
    fn work(&self) -> String {
        "the connection".into()
    }

    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        lock(&self.0).poll(budget)
    }

    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        lock(&self.0).arm()
    }

    fn disarm(&mut self) {
        lock(&self.0).disarm();
    }
}
