// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Serves a device of the bus. A task on the device's worker runs the [`Server`], and passes its
//! calls on to the device's function and memory.

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use crate::migration::{Migration, log_errno};
use crate::saved::{self, SavedServer};
use rustix::io::Errno;
use vbus_core::memory::{PAGE, PeerProcess, Resource};
use vbus_core::{
    Access, ConnectionCounters, Endpoint, ErrorCode, Executor, Interest, MEMORY_LOST, MapError,
    Progress, Task, TaskHandle, lock,
};
use vbus_eventfd::Signaller;
use vbus_pci::{IrqError, IrqIndex, Options, PciFunction, device_function};
use vfio_user_protocol::message::{DmaRange, LoggingReport, MigrationFlags};
use vfio_user_protocol::migration::{ArcFailure, MigrationArc};
use vfio_user_protocol::state::ServerState;
use vfio_user_protocol::{
    DeviceInfo, IoEventFd, IrqAction, IrqInfo, Mapping, Peer, RegionInfo, Server, Stats, Target,
    journal,
};

/// The server of a device's socket. Dropping it disconnects the client and removes the socket.
#[derive(Debug)]
pub struct DeviceServer {
    path: PathBuf,
    task: TaskHandle,
    /// The descriptor of the server, which the event loop watches.
    ready: OwnedFd,
    place: Arc<Place>,
}

/// Where the server is: with its task on a worker, which does what is quick, or at a thread that
/// does one long operation of it. So no client keeps the other devices of its worker waiting by
/// what it asks for.
#[derive(Default)]
struct Place {
    state: Mutex<PlaceState>,
    /// Notified when the server comes back.
    back: Condvar,
    /// The client, published with `seen`. Nobody waits for another lock with this one.
    peer: Mutex<Peer>,
}

impl Place {
    /// Publishes the state of the server.
    fn look_at(&self, seen: &mut Seen, server: &Server<Served>) {
        seen.look_at(server);
        *lock(&self.peer) = server.peer();
    }
}

#[derive(Default)]
struct PlaceState {
    /// `None`: it is at another thread.
    server: Option<Box<Server<Served>>>,
    /// Nobody uses it any more.
    ended: bool,
    /// It stands still, because another process may go on with it ([`DeviceServer::hold`]).
    held: bool,
    seen: Seen,
}

/// The state of the server, as its task last published it.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    connected: bool,
    stats: Stats,
}

impl DeviceServer {
    /// Makes the socket `path` with mode 0600, and serves the device there as a PCI function.
    /// `options` chooses the optional parts of the function. The server runs on the device's own
    /// event loop.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] if somebody listens at `path`. Otherwise an error of the
    /// system.
    pub fn start(
        endpoint: Arc<Endpoint>,
        path: &Path,
        options: Options,
    ) -> io::Result<DeviceServer> {
        let name = endpoint.name().to_owned();
        let served = Served::new(endpoint.clone(), options);
        Self::spawn(Server::bind(path, name, served)?, &endpoint, false)
    }

    /// Offers the device as [`start`](Self::start) does, to clients that connect to `listener`: a
    /// non-blocking UNIX stream socket that listens at `path`. Dropping the server leaves the file
    /// at `path` alone.
    ///
    /// # Errors
    /// The system refuses, for instance because this process has too many descriptors.
    pub fn with_listener(
        endpoint: Arc<Endpoint>,
        listener: OwnedFd,
        path: &Path,
        options: Options,
    ) -> io::Result<DeviceServer> {
        let name = endpoint.name().to_owned();
        let served = Served::new(endpoint.clone(), options);
        Self::spawn(Server::with_listener(listener, path, name, served)?, &endpoint, false)
    }

    fn spawn(server: Server<Served>, endpoint: &Endpoint, held: bool) -> io::Result<DeviceServer> {
        // The task itself never fails: every error ends a client and no more.
        let place = Arc::<Place>::default();
        let path = server.path().to_owned();
        let ready = server.as_fd().try_clone_to_owned();
        {
            let mut state = lock(&place.state);
            place.look_at(&mut state.seen, &server);
            (state.held, state.server) = (held, Some(Box::new(server)));
        }
        let ready = ready?;
        // If the kernel lacks what interrupts need, the operator learns it now.
        Signaller::of_process()?;
        let executor = endpoint.executor().clone();
        let worker = endpoint.worker();
        let memory = endpoint.memory().clone();
        let counters = Arc::new(endpoint.counters().beside());
        let turn = Turn {
            place: place.clone(),
            executor: Arc::downgrade(&executor),
            counters: counters.clone(),
        };
        let make = |task: &TaskHandle| {
            let task: Box<dyn Task> = Box::new(ServerTask { turn, task: task.clone() });
            Ok::<_, Infallible>(task)
        };
        let Ok(task) = executor.spawn_with(worker, counters, |_| {}, make);
        if let Err(error) = task.watch(&ready, Interest::Read) {
            task.stop();
            return Err(error.into());
        }
        let served = Arc::downgrade(&place);
        endpoint.set_has_left(move || {
            served.upgrade().is_some_and(|place| lock(&place.peer).has_gone())
        });
        let waker = task.clone();
        memory.on_loss(move || waker.wake());
        // A client may have come between the first poll and the watch.
        task.wake();
        Ok(DeviceServer { path, task, ready, place })
    }

    /// Stops the server between two messages, for a process that takes this one's place. Until
    /// [`release`](Self::release) the client waits. What it has asked for and is under way is
    /// finished first. A client that is moving its device to another server has to be finished with
    /// that. While a server is held, dropping it, or the end of this process, does not end the
    /// connection: it belongs to the other process.
    ///
    /// # Errors
    /// As [`HoldError`] says. The server goes on.
    pub fn hold(&self, by: Instant) -> Result<(), HoldError> {
        let mut state = lock(&self.place.state);
        state.held = true;
        while state.server.is_none() {
            let rest = by.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                drop(state);
                self.release();
                return Err(HoldError::Busy);
            }
            let waited = self.place.back.wait_timeout(state, rest);
            state = waited.unwrap_or_else(|e| e.into_inner()).0;
        }
        if let Some(server) = &mut state.server {
            end_if_lost(server);
            server.settle(Instant::now());
            if server.is_migrating() {
                drop(state);
                self.release();
                return Err(HoldError::Migrating);
            }
            server.target_mut().held = true;
        }
        Ok(())
    }

    /// Lets a server go on that is held, also one that was restored.
    pub fn release(&self) {
        let mut state = lock(&self.place.state);
        state.held = false;
        if let Some(server) = &mut state.server {
            server.target_mut().held = false;
        }
        drop(state);
        self.task.wake();
    }

    /// The server and its device as data. The server is held, and the device is quiesced
    /// ([`Endpoint::quiesce`]). This changes nothing.
    ///
    /// # Errors
    /// The device cannot be saved, or this process has as many descriptors as it may have.
    pub fn save(&self) -> Result<SavedServer, String> {
        let mut state = lock(&self.place.state);
        let held = state.held;
        let server = state.server.as_mut().filter(|_| held).ok_or("the server is not held")?;
        let saved = server.save(Instant::now()).map_err(|error| error.to_string())?;
        let Served { function, endpoint, .. } = server.target_mut();
        saved::save(saved, function, endpoint)
    }

    /// Goes on from the state of another process's server. `endpoint` is a fresh device with the
    /// same settings, which is quiesced, and `options` are those of the other server. `path` is
    /// where the socket listens; its file stays when the server is dropped. The server is held,
    /// until [`release`](Self::release). Its device goes on with [`Endpoint::resume`].
    ///
    /// # Errors
    /// The state is wrong, or does not fit. The text is for people. The other process's client has
    /// seen nothing. The device is of no use.
    pub fn restore(
        endpoint: &Arc<Endpoint>,
        saved: SavedServer,
        path: &Path,
        options: Options,
    ) -> Result<DeviceServer, String> {
        let target = saved::restore(saved, endpoint, options)?;
        let server = saved::server(target, path, endpoint.name())?;
        Self::spawn(server, endpoint, true)
            .map_err(|error| format!("device {:?}: {error}", endpoint.name()))
    }

    /// From now on `keep` gets the server and its device, as [`save`](Self::save) has them, after
    /// each message that has changed them, before the client gets its reply. It gets them once
    /// before this returns. The device stands still meanwhile. So another process goes on if this
    /// one is killed: from the last state that `keep` got, from the driver's memory, and with the
    /// descriptors. What is under way when this is called is waited for, until `by`. A server that
    /// is held stays so.
    ///
    /// # Errors
    /// The device is busy, or no device can go on like this; see
    /// [`Device::outlast`](vbus_core::Device::outlast).
    pub fn keep_with(&self, keep: Arc<dyn Keep>, by: Instant) -> Result<(), String> {
        let mut journal = Ok(());
        self.with_held(by, |server| {
            server.target_mut().keep = Some(keep);
            if server.has_journal() {
                return server.commit();
            }
            // This commits, too.
            let set = |file| server.set_journal(file, Instant::now());
            journal = journal::create().and_then(set);
        })?;
        journal.map_err(|error| format!("the journal of its messages: {error}"))?;
        self.check_kept()
    }

    /// Gives the present state to what [`keep_with`](Self::keep_with) has set, if anything, as
    /// after a message.
    ///
    /// # Errors
    /// The device is busy, or cannot be saved now.
    pub fn commit(&self, by: Instant) -> Result<(), String> {
        self.with_held(by, Server::commit)?;
        self.check_kept()
    }

    /// This server goes on for a process that has ended, and nobody was given it: whoever has what
    /// that process left must not go on from it. Before [`release`](Self::release).
    pub fn forsake_former(&self) {
        if let Some(server) = &mut lock(&self.place.state).server {
            server.forsake_former();
        }
    }

    /// Nobody keeps the server and its device any more.
    pub fn keep_no_more(&self, by: Instant) -> Result<(), String> {
        self.with_held(by, |server| {
            let served = server.target_mut();
            (served.keep, served.lag) = (None, None);
        })
    }

    /// Does something with the server between two messages.
    fn with_held(&self, by: Instant, run: impl FnOnce(&mut Server<Served>)) -> Result<(), String> {
        let was_held = lock(&self.place.state).held;
        self.hold(by).map_err(|error| error.to_string())?;
        if let Some(server) = &mut lock(&self.place.state).server {
            run(server);
        }
        if !was_held {
            self.release();
        }
        Ok(())
    }

    /// Whether the last commit was complete.
    fn check_kept(&self) -> Result<(), String> {
        let state = lock(&self.place.state);
        let lag = state.server.as_ref().and_then(|server| server.target().lag.clone());
        lag.map_or(Ok(()), Err)
    }

    /// The path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a client is connected and has negotiated.
    pub fn is_connected(&self) -> bool {
        lock(&self.place.state).seen.connected
    }

    /// The server's statistics so far.
    pub fn stats(&self) -> Stats {
        lock(&self.place.state).seen.stats
    }
}

impl Drop for DeviceServer {
    fn drop(&mut self) {
        self.task.unwatch(&self.ready);
        self.task.stop();
        let mut state = lock(&self.place.state);
        state.ended = true;
        // If another thread has the server, that thread drops it when its operation has ended.
        while state.server.is_none() {
            state = self.place.back.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        state.let_go();
        let server = state.server.take();
        drop(state);
        drop(server);
    }
}

impl PlaceState {
    /// A server that is held belongs to another process: dropping it must not end the connection.
    fn let_go(&mut self) {
        if let Some(server) = self.server.as_mut().filter(|_| self.held) {
            server.give_up();
        }
    }
}

impl Drop for PlaceState {
    fn drop(&mut self) {
        self.let_go();
    }
}

/// Why a server cannot stand still now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HoldError {
    /// The operation that is under way has not ended in time.
    #[error("an operation of the client does not end")]
    Busy,
    /// The client is moving its device to another server.
    #[error("the client is moving the device to another server; try again when it has ended that")]
    Migrating,
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Place").field("seen", &lock(&self.state).seen).finish_non_exhaustive()
    }
}

/// What it takes to give the server to another thread.
#[derive(Clone)]
struct Turn {
    place: Arc<Place>,
    executor: Weak<Executor>,
    counters: Arc<ConnectionCounters>,
}

impl Turn {
    /// Lets another thread do one long operation of the server, and wakes `task` afterwards.
    fn aside(self, mut server: Box<Server<Served>>, task: TaskHandle) {
        let Some(executor) = self.executor.upgrade() else {
            lock(&self.place.state).server = Some(server);
            return;
        };
        let counters = self.counters.clone();
        executor.aside(counters, "a command or a message that takes long", move || {
            // While one long operation follows another, the task does not have the server.
            end_if_lost(&mut server);
            let outcome = server.ready_long(Instant::now());
            let mut state = lock(&self.place.state);
            self.place.look_at(&mut state.seen, &server);
            if outcome.long && !state.ended && !state.held {
                // Behind the long operations of the other devices.
                drop(state);
                return self.aside(server, task);
            }
            state.server = Some(server);
            drop(state);
            self.place.back.notify_all();
            task.wake();
        });
    }
}

/// Ends the client if it has taken away memory that the device then accessed.
fn end_if_lost(server: &mut Server<Served>) {
    if server.target().endpoint.memory().is_lost() {
        server.fail(MEMORY_LOST);
    }
}

struct ServerTask {
    turn: Turn,
    task: TaskHandle,
}

impl Seen {
    fn look_at(&mut self, server: &Server<Served>) {
        *self = Seen { connected: server.is_connected(), stats: server.stats() };
    }
}

impl Task for ServerTask {
    fn work(&self) -> String {
        "messages of its socket".into()
    }

    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        let mut state = lock(&self.turn.place.state);
        let state = &mut *state;
        let Some(server) = state.server.as_mut().filter(|_| !state.held) else {
            return Ok(Progress::Idle);
        };
        let (mut work, mut more, mut long) = (0, true, false);
        while more && !long && work < budget {
            end_if_lost(server);
            let outcome = server.ready_quick(Instant::now());
            work += outcome.work;
            (more, long) = (outcome.more, outcome.long);
        }
        self.turn.place.look_at(&mut state.seen, server);
        if long {
            if let Some(server) = state.server.take() {
                self.turn.clone().aside(server, self.task.clone());
            }
            return Ok(Progress::Idle);
        }
        Ok(if work > 0 { Progress::Busy } else { Progress::Idle })
    }

    fn deadline(&self) -> Option<Instant> {
        let state = lock(&self.turn.place.state);
        state.server.as_ref().filter(|_| !state.held).and_then(|server| server.deadline())
    }

    fn adaptive(&self) -> bool {
        false
    }
}

/// Takes a device and its server, so that they outlast this process; see
/// [`DeviceServer::keep_with`].
pub trait Keep: Send + Sync {
    /// Takes the state. When this returns, a process that is killed loses nothing of it. The device
    /// is quiesced. The client waits for its reply meanwhile.
    ///
    /// # Errors
    /// The former state still holds. The text is for the log.
    fn keep(&self, endpoint: &Endpoint, saved: SavedServer) -> Result<(), String>;

    /// Nobody takes states any more. The provided method says no.
    fn has_gone(&self) -> bool {
        false
    }

    /// Takes the descriptors of the client's message `number`, which the server receives next. They
    /// replace those that this got before. None: those are of no use any more, because
    /// [`keep`](Self::keep) got the state after their message. They may be of anything, and a close
    /// can wait for the client. The provided method takes none: if the process is killed before
    /// that state, the message fails.
    ///
    /// # Errors
    /// They are not taken. The client's message fails.
    fn hold(&self, endpoint: &Endpoint, number: u64, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let _ = (endpoint, number, fds);
        Ok(())
    }
}

/// Why nothing is kept of a device whose keeper has gone.
const KEEPER_GONE: &str = "its keeper has gone";

/// How long a commit waits for a call of the driver. QEMU waits 5 s for the reply.
const COMMIT_WAIT: Duration = Duration::from_secs(2);

/// The target of the server: the device's function, and the memory that the client shares with the
/// device.
pub(crate) struct Served {
    function: PciFunction,
    endpoint: Arc<Endpoint>,
    migration: Migration,
    /// Another process may go on with the client: see [`DeviceServer::hold`].
    held: bool,
    /// See [`DeviceServer::keep_with`].
    keep: Option<Arc<dyn Keep>>,
    /// Something has changed since the last commit.
    changed: bool,
    /// Why the last commit failed.
    lag: Option<String>,
}

impl Served {
    fn new(endpoint: Arc<Endpoint>, options: Options) -> Served {
        let function = device_function(endpoint.clone(), options);
        let mut served = Served::held(function, endpoint);
        served.held = false;
        served
    }

    /// A target that is held, with the function of a device that was restored.
    pub(crate) fn held(function: PciFunction, endpoint: Arc<Endpoint>) -> Served {
        let migration = Migration::default();
        let (keep, changed, lag) = (None, false, None);
        Served { function, endpoint, migration, held: true, keep, changed, lag }
    }

    /// Gives the device and its server away, to outlast this process.
    fn give(&mut self, server: io::Result<ServerState>) -> Result<(), String> {
        let Some(keep) = self.keep.clone() else { return Ok(()) };
        if keep.has_gone() {
            return Err(KEEPER_GONE.into());
        }
        let server = server.map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => HoldError::Migrating.to_string(),
            _ => error.to_string(),
        })?;
        let stood_still = self.endpoint.is_quiesced();
        // A call that has been waited for is not waited for again with each message.
        let wait = if self.lag.is_some() { Duration::ZERO } else { COMMIT_WAIT };
        let stopped = self.endpoint.quiesce_to_outlast(Instant::now() + wait);
        stopped.map_err(|error| error.to_string())?;
        let saved = saved::save_to_outlast(server, &mut self.function, &self.endpoint);
        let kept = saved.and_then(|saved| keep.keep(&self.endpoint, saved));
        if !stood_still {
            self.endpoint.resume();
        }
        kept
    }

    fn doorbells(&mut self, region: u32) -> Vec<vbus_pci::IoEventFd> {
        self.function.io_eventfds(region).unwrap_or_else(|error| {
            tracing::warn!(device = self.endpoint.name(), %error, "no eventfds for the doorbells");
            Vec::new()
        })
    }
}

impl Target for Served {
    fn device_info(&self) -> DeviceInfo {
        DeviceInfo::PCI
    }

    fn region_info(&self, region: u32) -> RegionInfo {
        let size = self.function.region_size(region);
        RegionInfo::new(size, size > 0, size > 0)
    }

    fn irq_info(&self, index: u32) -> IrqInfo {
        match IrqIndex::from_number(index) {
            Some(index @ IrqIndex::Intx) if self.function.irq_count(index) > 0 => IrqInfo::intx(),
            Some(IrqIndex::Intx) | None => IrqInfo::default(),
            Some(index) => IrqInfo::messages(self.function.irq_count(index)),
        }
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.function.read(region, offset, data);
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.changed |= self.function.is_kept_write(region, offset, data);
        self.function.write(region, offset, data);
        Ok(())
    }

    fn is_long_write(&self, region: u32, offset: u64, data: &[u8]) -> bool {
        self.function.is_long_write(region, offset, data)
    }

    fn set_irqs(&mut self, index: u32, action: IrqAction) -> Result<(), Errno> {
        let index = IrqIndex::from_number(index).ok_or(Errno::INVAL)?;
        // The next process begins with INTx unmasked.
        self.changed |=
            !matches!(action, IrqAction::Trigger(_) | IrqAction::Mask(_) | IrqAction::Unmask(_));
        let done = match action {
            IrqAction::DisableAll => {
                self.function.disconnect_irqs(index);
                Ok(())
            }
            IrqAction::Connect { start, eventfds } => {
                self.function.connect_irqs(index, start, eventfds)
            }
            // Only INTx can be masked, which has one interrupt.
            IrqAction::ConnectMask { eventfds, .. } => {
                self.function.connect_mask(index, true, eventfds.into_iter().next().flatten())
            }
            IrqAction::ConnectUnmask { eventfds, .. } => {
                self.function.connect_mask(index, false, eventfds.into_iter().next().flatten())
            }
            IrqAction::Trigger(numbers) => {
                numbers.iter().try_for_each(|&n| self.function.trigger_irq(index, n))
            }
            IrqAction::Mask(numbers) => {
                numbers.iter().try_for_each(|_| self.function.mask_irq(index, true))
            }
            IrqAction::Unmask(numbers) => {
                numbers.iter().try_for_each(|_| self.function.mask_irq(index, false))
            }
            // A later version of the protocol may have more kinds.
            _ => return Err(Errno::OPNOTSUPP),
        };
        done.map_err(|error| match error {
            IrqError::Os(errno) => errno,
            _ => Errno::INVAL,
        })
    }

    fn max_dma_maps(&self) -> u32 {
        u32::try_from(vbus_core::MAPS_MAX).unwrap_or(u32::MAX)
    }

    fn dma_map(&mut self, mapping: Mapping<'_>) -> Result<(), Errno> {
        self.changed = true;
        let Mapping { address, size, readable, writable, memory, .. } = mapping;
        let access = Access::new(readable, writable);
        self.endpoint.map(address, size, memory, access).map_err(|error| {
            tracing::warn!(
                device = self.endpoint.name(), %error,
                "memory at {address:#x} cannot be used"
            );
            match error {
                MapError::Overlap(..) => Errno::EXIST,
                MapError::Limit => Errno::NOSPC,
                MapError::Budget(exceeded) => match exceeded.resource {
                    Resource::Descriptors => Errno::MFILE,
                    Resource::AddressSpace | Resource::Mappings | Resource::Pages => Errno::NOMEM,
                    _ => Errno::NOSPC,
                },
                MapError::ReadOnly => Errno::ACCESS,
                MapError::Os(errno) => errno,
                _ => Errno::INVAL,
            }
        })
    }

    fn dma_unmap(&mut self, address: u64, size: u64) {
        self.changed = true;
        self.endpoint.unmap(address, size);
    }

    fn dma_unmap_all(&mut self) {
        self.changed = true;
        self.endpoint.unmap_all();
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.changed = true;
        self.function.reset();
        self.migration.end(&self.endpoint);
        Ok(())
    }

    fn migration(&mut self) -> Option<MigrationFlags> {
        self.migration.flags(&mut self.function, &self.endpoint)
    }

    fn migrate(&mut self, arc: MigrationArc) -> Result<(), ArcFailure> {
        self.changed = true;
        self.migration.go(arc, &mut self.function, &self.endpoint)
    }

    fn migration_read(&mut self, data: &mut [u8]) -> Result<usize, Errno> {
        Ok(self.migration.read(data))
    }

    fn migration_write(&mut self, data: &[u8]) -> Result<(), Errno> {
        self.migration.write(data, &self.endpoint)
    }

    fn logs_dma(&self) -> bool {
        true
    }

    fn dma_logging_start(&mut self, page_size: u64, ranges: &[DmaRange]) -> Result<u64, Errno> {
        let ranges: Vec<_> =
            ranges.iter().map(|range| range.iova..range.iova + range.length).collect();
        let started = self.endpoint.memory().start_log(&ranges);
        started.map_err(|error| log_errno(&error, self.endpoint.name()))?;
        // A report has any page size. The log itself has pages of 4 KiB.
        Ok(page_size.max(PAGE))
    }

    fn dma_logging_stop(&mut self) {
        self.changed = true;
        self.endpoint.memory().stop_log();
    }

    fn dma_logging_report(
        &mut self,
        report: LoggingReport,
        bitmap: &mut [u64],
    ) -> Result<(), Errno> {
        let LoggingReport { iova, length, page_size } = report;
        let reported = self.endpoint.memory().report_log(iova, length, page_size, bitmap);
        reported.map_err(|error| log_errno(&error, self.endpoint.name()))
    }

    fn io_eventfd_count(&mut self, region: u32) -> usize {
        self.changed = true;
        self.doorbells(region).len()
    }

    fn io_eventfds(&mut self, region: u32, most: usize) -> Vec<IoEventFd> {
        let eventfds = self.doorbells(region);
        let duplicate = |eventfd: &vbus_pci::IoEventFd| {
            Some(IoEventFd::new(eventfd.fd.try_clone().ok()?, eventfd.offset))
        };
        eventfds.iter().take(most).filter_map(duplicate).collect()
    }

    /// All devices of the client's process have one budget.
    fn connected(&mut self, socket: BorrowedFd<'_>) {
        self.changed = true;
        self.endpoint.memory().set_client(PeerProcess::of(socket));
    }

    fn disconnected(&mut self) {
        self.changed = true;
        self.function.disconnected();
        self.endpoint.unmap_all();
        self.migration.end(&self.endpoint);
        self.endpoint.memory().set_client(None);
    }

    fn wants_commit(&self) -> bool {
        self.changed && self.keep.is_some()
    }

    fn is_committed(&self) -> bool {
        self.keep.is_none() || (!self.changed && self.lag.is_none())
    }

    fn commit(&mut self, server: io::Result<ServerState>) {
        let Some(keep) = self.keep.clone() else { return };
        let given = self.give(server);
        let device = self.endpoint.name();
        match (&given, &self.lag) {
            (Ok(()), Some(_)) => tracing::info!(device, "its state outlasts this process again"),
            (Err(why), lag) if lag.as_ref() != Some(why) => {
                tracing::warn!(
                    device,
                    "the state of the device does not outlast this process: {why}"
                );
            }
            _ => {}
        }
        // The next message tries again, if somebody is there.
        self.changed = given.is_err() && !keep.has_gone();
        self.lag = given.err();
    }

    fn hold(&mut self, number: u64, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let Some(keep) = &self.keep else { return Ok(()) };
        keep.hold(&self.endpoint, number, fds)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if !self.held {
            return self.disconnected();
        }
        // The driver's memory, its eventfds and the back end are the other process's now. So the
        // device never ends.
        self.function.abandon();
        std::mem::forget(self.endpoint.clone());
    }
}
