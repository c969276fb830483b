// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the front end has set up, and the device at work for it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};
use vbus_core::memory::{PeerBitmap, PeerProcess};
use vbus_core::{Access, ConnectionState, Endpoint, Host, lock};
use vfio_user_protocol::{PeerFds, is_eventfd};

use super::card::NetworkCard;
use super::failure::Failure;
use super::in_flight::{self, Kept};
use super::message::{Addresses, InFlight, Name, Region, Request, feature, protocol};
use super::regions::{Regions, SLOTS};
use super::shared::{Running, Shared};
use crate::device::{Call, Driver, Enabled, Kind, VirtioDevice, feature as common, status};
use crate::queue::{
    Format, InFlightRegion, Layout, Position, Queue, RingFeatures, SIZE_MAX, State,
};

/// The protocol features that this end offers.
const PROTOCOL: u64 = protocol::MQ
    | protocol::LOG_SHMFD
    | protocol::RARP
    | protocol::BACKEND_REQ
    | protocol::REPLY_ACK
    | protocol::NET_MTU
    | protocol::CONFIG
    | protocol::INFLIGHT_SHMFD
    | protocol::RESET_DEVICE
    | protocol::CONFIGURE_MEM_SLOTS
    | protocol::STATUS;

/// What a request answers.
pub enum Answer {
    /// Nothing, unless the front end wants to know whether it succeeded.
    Done,
    /// A body.
    Body(Vec<u8>),
    /// A body and a descriptor.
    File(Vec<u8>, OwnedFd),
}

/// How the driver wakes the device for a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kick {
    /// The front end has not said, or the ring was stopped.
    #[default]
    Stopped,
    /// Not at all.
    Polled,
    /// By an eventfd, which the doorbell has.
    Eventfd,
}

/// A ring as the front end has set it up.
#[derive(Clone, Debug, Default)]
struct Ring {
    /// Descriptors. 0: the front end has not said.
    size: u16,
    addresses: Option<Addresses>,
    /// Where writes to the used ring are to be logged.
    log: Option<u64>,
    /// Where the device goes on: the number of SET_VRING_BASE. `None`: at the beginning.
    base: Option<u32>,
    kick: Kick,
    /// `None`: the front end has not said.
    enabled: Option<bool>,
    /// The device has it.
    runs: bool,
    /// The device has had it, or was to have it, since its last GET_VRING_BASE.
    began: bool,
}

impl Ring {
    fn is_enabled(&self) -> bool {
        self.enabled == Some(true)
    }

    /// Whether the device is to have ring `at`. One that transmits is served also when it was
    /// disabled: its frames are dropped then. Before the front end has said either, they wait, so
    /// that none is lost between the messages by which a ring begins.
    fn is_due(&self, at: usize) -> bool {
        let set_up = self.kick != Kick::Stopped && self.size > 0 && self.addresses.is_some();
        !self.runs && set_up && (self.is_enabled() || self.enabled.is_some() && transmits(at))
    }
}

/// Whether ring `at` of a network card transmits.
fn transmits(at: usize) -> bool {
    at % 2 == 1
}

/// The log of the pages that the device writes.
#[derive(Default)]
struct Log {
    /// The front end's bitmap.
    bitmap: Option<Arc<PeerBitmap>>,
    /// The front end has accepted LOG_ALL.
    wanted: bool,
}

/// The back end of one device, for one front end after another.
pub struct Backend {
    device: Arc<dyn VirtioDevice>,
    card: Arc<dyn NetworkCard>,
    kind: Kind,
    endpoint: Arc<Endpoint>,
    shared: Arc<Shared>,
    /// The features that the driver has accepted, with those of vhost-user.
    features: u64,
    protocol: u64,
    regions: Regions,
    log: Log,
    /// Where the buffers in flight are kept for a process that comes after this one.
    kept: Option<Kept>,
    rings: Vec<Ring>,
    status: u8,
    /// The log has it that the driver is too old.
    told_legacy: bool,
}

impl Backend {
    /// The back end of `device`, without a front end. The device gets the memory and the doorbells
    /// of `endpoint`. `card` is the same device.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        card: Arc<dyn NetworkCard>,
        endpoint: Arc<Endpoint>,
    ) -> Backend {
        let kind = device.kind();
        let shared = Shared::new(&device, &endpoint);
        Backend {
            device,
            card,
            kind,
            endpoint,
            shared,
            features: 0,
            protocol: 0,
            regions: Regions::default(),
            log: Log::default(),
            kept: None,
            rings: vec![Ring::default(); usize::from(kind.queues)],
            status: 0,
            told_legacy: false,
        }
    }

    fn host(&self) -> &Host {
        self.endpoint.host()
    }

    /// The device's bus device.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// Whether the front end may ask for a reply to any message.
    pub fn acknowledges(&self) -> bool {
        self.protocol & protocol::REPLY_ACK != 0
    }

    /// The rings that are running and that the device must look at by itself.
    pub fn polled(&self) -> impl Iterator<Item = usize> + '_ {
        let polled = |ring: &Ring| ring.runs && ring.kick == Kick::Polled;
        self.rings.iter().enumerate().filter(move |(_, ring)| polled(ring)).map(|(at, _)| at)
    }

    /// Carries out a request. `fds` came with it, as many as it needs.
    ///
    /// # Errors
    /// It failed. What it was to change is as before, or is not set up.
    pub fn handle(&mut self, request: Request, fds: PeerFds) -> Result<Answer, Failure> {
        let number = |number: u64| Ok(Answer::Body(number.to_le_bytes().to_vec()));
        match request {
            Request::GetFeatures => {
                return number(self.kind.features | feature::ALL);
            }
            Request::SetFeatures(bits) => self.set_features(bits)?,
            Request::SetOwner => {}
            Request::ResetOwner | Request::ResetDevice => self.reset(),
            Request::SetMemTable(regions) => self.set_memory(&regions, fds)?,
            Request::AddMemReg(region) => self.add_region(region, fds)?,
            Request::RemMemReg(region) => self.remove_region(&region)?,
            Request::SetLogBase { size, offset } => {
                self.set_log(size, offset, &fds)?;
                drop(fds.into_harmless());
                // This request always has a reply.
                return number(0);
            }
            Request::SetLogFd => drop(eventfd(0, fds)?),
            Request::SetVringNum { ring, size } => self.set_size(ring, size)?,
            Request::SetVringAddr { ring, addresses, log } => {
                self.set_addresses(ring, addresses, log)?;
            }
            Request::SetVringBase { ring, base } => {
                let at = self.ring(ring)?;
                self.must_not_run("SET_VRING_BASE", at)?;
                self.rings[at].base = Some(base);
            }
            Request::GetVringBase(ring) => {
                let base = self.get_base(ring)?;
                let words = [ring, base].map(u32::to_le_bytes);
                return Ok(Answer::Body(words.as_flattened().to_vec()));
            }
            Request::SetVringKick(ring) => self.set_kick(ring, fds)?,
            Request::SetVringCall(ring) => {
                let at = self.ring(ring.into())?;
                let fd = eventfd(at, fds)?;
                self.shared.set_call(at, fd).map_err(|error| Failure::Eventfd(at, error))?;
            }
            Request::SetVringErr(ring) => {
                let at = self.ring(ring.into())?;
                let fd = eventfd(at, fds)?;
                self.shared.set_err(at, fd).map_err(|error| Failure::Eventfd(at, error))?;
            }
            Request::GetProtocolFeatures => return number(PROTOCOL),
            Request::SetProtocolFeatures(bits) => match bits & !PROTOCOL {
                0 => self.protocol = bits,
                more => return Err(Failure::Features(more)),
            },
            // For a network card the number is that of the pairs.
            Request::GetQueueNum => return number(u64::from(self.kind.queues / 2)),
            Request::SetVringEnable { ring, enabled } => self.enable(ring, enabled)?,
            Request::SendRarp(mac) => self.card.send_rarp(mac),
            Request::SetBackendReqFd => {
                let is_socket = |fd: &OwnedFd| {
                    let (domain, kind) = (socket_domain(fd), socket_type(fd));
                    (domain, kind) == (Ok(AddressFamily::UNIX), Ok(SocketType::STREAM))
                };
                if !fds.as_slice().iter().all(is_socket) {
                    return Err(Failure::NoSocket);
                }
                self.shared.set_channel(Some(fds));
            }
            Request::SetMtu(wants) => self.set_mtu(wants)?,
            Request::GetConfig { offset, size, flags } => {
                return Ok(Answer::Body(self.config(offset, size, flags)));
            }
            Request::SetConfig => return Err(Failure::Config),
            Request::GetInFlight(asked) => {
                let format = Format::of(self.features);
                let (told, file) = in_flight::make(&asked, format, self.rings.len())?;
                return Ok(Answer::File(told.bytes(), file));
            }
            Request::SetInFlight(told) => self.keep(&told, fds)?,
            Request::GetMaxMemSlots => return number(SLOTS as u64),
            Request::SetStatus(status) => self.set_status(status)?,
            Request::GetStatus => {
                let broken = lock(&self.shared.running).broken.is_some();
                let extra = if broken { status::NEEDS_RESET } else { 0 };
                return number(u64::from(self.status | extra));
            }
            Request::Unsupported(number) => return Err(Failure::Unsupported(Name(number))),
        }
        Ok(Answer::Done)
    }

    /// A front end has connected over `socket`. All devices of its process have one budget of
    /// memory.
    pub fn connected(&mut self, socket: BorrowedFd<'_>) {
        self.endpoint.memory().set_client(PeerProcess::of(socket));
    }

    /// The front end has gone. Nothing touches its memory any more, and nothing of it is left. What
    /// is in flight stays so in its memory: it may come back.
    pub fn disconnected(&mut self) {
        self.pause();
        self.kept = None;
        self.reset();
        self.shared.forget_signals();
        self.shared.set_channel(None);
        self.endpoint.unmap_all();
        self.log = Log::default();
        self.endpoint.memory().set_client(None);
        self.regions = Regions::default();
        self.protocol = 0;
    }

    fn ring(&self, number: u32) -> Result<usize, Failure> {
        let at = usize::try_from(number).ok().filter(|at| *at < self.rings.len());
        at.ok_or(Failure::Ring(number))
    }

    fn must_not_run(&self, what: &'static str, at: usize) -> Result<(), Failure> {
        if self.rings[at].runs { Err(Failure::Runs(what, at)) } else { Ok(()) }
    }

    fn set_features(&mut self, bits: u64) -> Result<(), Failure> {
        let more = bits & !(self.kind.features | feature::ALL);
        if more != 0 {
            return Err(Failure::Features(more));
        }
        // The log begins and ends while rings run.
        let logs = bits & feature::LOG_ALL != 0;
        let bits = bits & !feature::LOG_ALL;
        if bits != self.features {
            if let Some(at) = self.rings.iter().position(|ring| ring.runs) {
                return Err(Failure::Runs("SET_FEATURES", at));
            }
            self.end_session();
            self.features = bits;
        }
        if bits & feature::PROTOCOL_FEATURES == 0 {
            self.rings.iter_mut().for_each(|ring| ring.enabled = Some(true));
        }
        if self.log.wanted != logs {
            self.log.wanted = logs;
            self.log_anew().inspect_err(|_| self.log.wanted = false)?;
        }
        self.start_rings()
    }

    /// Takes the bitmap that came with SET_LOG_BASE. When this returns, nothing marks pages in the
    /// former one.
    fn set_log(&mut self, size: u64, offset: u64, fds: &PeerFds) -> Result<(), Failure> {
        let [file] = fds.as_slice() else { return Err(Failure::Log("no descriptor".into())) };
        let memory = self.endpoint.memory();
        let bitmap = memory.bitmap(file.as_fd(), offset, size);
        let bitmap = bitmap.map_err(|error| Failure::Log(error.to_string()))?;
        self.must_cover(bitmap.covers(), self.regions.end())?;
        // No ring writes between the one bitmap and the other.
        self.pause();
        self.log.bitmap = Some(Arc::new(bitmap));
        let logs = self.log_anew();
        self.start_rings()?;
        logs
    }

    /// Keeps the buffers in flight in this memory, from the next start of each ring on.
    fn keep(&mut self, told: &InFlight, fds: PeerFds) -> Result<(), Failure> {
        if let Some(at) = self.rings.iter().position(|ring| ring.runs) {
            return Err(Failure::Runs("SET_INFLIGHT_FD", at));
        }
        let [file] = fds.as_slice() else { return Ok(()) };
        let context = self.endpoint.memory().beside();
        let (format, rings) = (Format::of(self.features), self.rings.len());
        self.kept = Some(Kept::new(told, file, format, rings, context)?);
        drop(fds.into_harmless());
        Ok(())
    }

    /// Where the buffers of ring `at` are kept.
    fn region(&self, at: usize) -> Option<InFlightRegion> {
        let format = Format::of(self.features);
        self.kept.as_ref()?.region(at, format, self.rings[at].size)
    }

    fn must_cover(&self, covers: u64, end: u64) -> Result<(), Failure> {
        if covers < end { Err(Failure::LogShort { covers, end }) } else { Ok(()) }
    }

    /// Memory that reaches up to `end` must have its bits in the log, if there is one.
    fn must_be_logged(&self, end: u64) -> Result<(), Failure> {
        let bitmap = self.log.bitmap.as_ref().filter(|_| self.log.wanted);
        bitmap.map_or(Ok(()), |bitmap| self.must_cover(bitmap.covers(), end))
    }

    /// Begins the log in the front end's bitmap, or ends it. When this returns, what was written
    /// without a mark is visible to the front end.
    fn log_anew(&self) -> Result<(), Failure> {
        let memory = self.endpoint.memory();
        memory.stop_log();
        let Some(bitmap) = self.log.bitmap.as_ref().filter(|_| self.log.wanted) else {
            return Ok(());
        };
        self.must_cover(bitmap.covers(), self.regions.end())?;
        memory.start_log_in(bitmap).map_err(|error| Failure::Log(error.to_string()))
    }

    fn set_memory(&mut self, regions: &[Region], fds: PeerFds) -> Result<(), Failure> {
        let mut table = Regions::default();
        for region in regions {
            table.check(region)?;
            table.add(*region);
        }
        self.must_be_logged(table.end())?;
        self.pause();
        self.endpoint.unmap_all();
        self.regions = Regions::default();
        for (region, fd) in regions.iter().zip(fds.as_slice()) {
            if let Err(failure) = self.map(region, fd) {
                self.endpoint.unmap_all();
                return Err(failure);
            }
        }
        // Files that are mapped are no descriptors whose close could wait.
        drop(fds.into_harmless());
        self.regions = table;
        // The log has ended with the former memory.
        self.log_anew()?;
        self.start_rings()
    }

    fn map(&self, region: &Region, fd: &OwnedFd) -> Result<(), Failure> {
        let file = Some((fd, region.offset));
        let mapped = self.endpoint.map(region.guest, region.size, file, Access::BOTH);
        mapped.map_err(|error| Failure::Map(region.guest, error))
    }

    fn add_region(&mut self, region: Region, fds: PeerFds) -> Result<(), Failure> {
        self.regions.check(&region)?;
        self.must_be_logged(region.guest + region.size)?;
        for fd in fds.as_slice() {
            self.map(&region, fd)?;
        }
        drop(fds.into_harmless());
        self.regions.add(region);
        self.start_rings()
    }

    fn remove_region(&mut self, region: &Region) -> Result<(), Failure> {
        if !self.regions.remove(region) {
            return Err(Failure::NoRegion(region.guest, region.size));
        }
        self.pause();
        self.endpoint.unmap(region.guest, region.size);
        self.start_rings()
    }

    fn set_size(&mut self, ring: u32, size: u32) -> Result<(), Failure> {
        let at = self.ring(ring)?;
        self.must_not_run("SET_VRING_NUM", at)?;
        let fits = u16::try_from(size).ok().filter(|size| (1..=SIZE_MAX).contains(size));
        self.rings[at].size = fits.ok_or(Failure::Size(ring, size))?;
        Ok(())
    }

    fn set_addresses(
        &mut self,
        ring: u32,
        addresses: Addresses,
        log: Option<u64>,
    ) -> Result<(), Failure> {
        let at = self.ring(ring)?;
        let before = std::mem::replace(&mut self.rings[at].log, log);
        if self.rings[at].addresses == Some(addresses) {
            if let Some(layout) = self.layout(at).ok().flatten().filter(|_| self.rings[at].runs) {
                self.check_log(at, &layout).inspect_err(|_| self.rings[at].log = before)?;
            }
            return Ok(());
        }
        self.stop(at);
        self.rings[at].addresses = Some(addresses);
        self.start_rings()
    }

    fn set_kick(&mut self, ring: u8, fds: PeerFds) -> Result<(), Failure> {
        let at = self.ring(ring.into())?;
        let fd = eventfd(at, fds)?;
        self.rings[at].kick = if fd.is_some() { Kick::Eventfd } else { Kick::Polled };
        let doorbells = self.host().doorbells();
        let set = doorbells.set_eventfd(ring.into(), fd.map(Arc::new));
        set.map_err(|error| Failure::Eventfd(at, error))?;
        self.start_rings()
    }

    fn get_base(&mut self, ring: u32) -> Result<u32, Failure> {
        let at = self.ring(ring)?;
        self.stop(at);
        self.rings[at].kick = Kick::Stopped;
        let _ = self.host().doorbells().set_eventfd(ring, None);
        // From now on the front end has to know where the ring is. What a back end that has died
        // left in flight in a ring that has not begun since, it does not know.
        if std::mem::take(&mut self.rings[at].began) {
            if let Some(region) = self.region(at) {
                region.settle();
            }
        }
        let base = self.rings[at].base;
        let format = Format::of(self.features);
        let base = base.unwrap_or_else(|| Position::start(format).vring_base(format));
        self.rings[at].base = Some(base);
        if self.rings.iter().all(|ring| ring.kick == Kick::Stopped) {
            self.end_session();
        }
        Ok(base)
    }

    fn enable(&mut self, ring: u32, enabled: bool) -> Result<(), Failure> {
        let at = self.ring(ring)?;
        self.rings[at].enabled = Some(enabled);
        if !enabled && !transmits(at) {
            self.stop(at);
        }
        self.tell_in_use()?;
        self.start_rings()
    }

    /// Tells the device which rings are enabled. It drops the frames of the other ones.
    fn tell_in_use(&self) -> Result<(), Failure> {
        let enabled: Vec<_> = self.rings.iter().map(Ring::is_enabled).collect();
        let mut running = lock(&self.shared.running);
        let Some(session) = &mut running.session else { return Ok(()) };
        session.set_in_use(&enabled).map_err(|code| self.shared.broken(running, code))
    }

    fn set_mtu(&self, wants: u64) -> Result<(), Failure> {
        let has = u64::from(self.card.mtu());
        if wants > has { Err(Failure::Mtu { wants, has }) } else { Ok(()) }
    }

    /// The body of the reply to GET_CONFIG. It is empty if the configuration has no such bytes.
    fn config(&self, offset: u32, size: u32, flags: u32) -> Vec<u8> {
        let config = lock(&self.shared.config);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = usize::try_from(size).ok().and_then(|size| from.checked_add(size));
        let Some(bytes) = end.and_then(|end| config.get(from..end)) else { return Vec::new() };
        let head = [offset, size, flags].map(u32::to_le_bytes);
        [head.as_flattened(), bytes].concat()
    }

    fn set_status(&mut self, wanted: u64) -> Result<(), Failure> {
        let mut wanted = u8::try_from(wanted).map_err(|_| Failure::Status(wanted))?;
        if wanted == 0 {
            self.reset();
            return Ok(());
        }
        if self.features & common::VERSION_1 == 0 {
            wanted &= !status::FEATURES_OK;
        }
        self.status = wanted & !status::NEEDS_RESET;
        Ok(())
    }

    /// Forgets all that the driver has set up, but not its memory, nor how it is interrupted.
    fn reset(&mut self) {
        for at in 0..self.rings.len() {
            self.stop(at);
        }
        // Those of a back end that has died too, whose rings have not begun again.
        self.kept.iter().for_each(Kept::settle);
        self.end_session();
        self.host().doorbells().forget_eventfds();
        self.endpoint.memory().stop_log();
        self.log.wanted = false;
        self.rings.fill(Ring::default());
        self.features = 0;
        self.status = 0;
    }

    /// Takes all rings away from the device for a moment: [`start_rings`](Self::start_rings) gives
    /// them back.
    fn pause(&mut self) {
        for at in 0..self.rings.len() {
            self.stop(at);
        }
    }

    /// Takes a ring away from the device, if it has it. Its work in flight has ended then.
    fn stop(&mut self, at: usize) {
        let ring = &mut self.rings[at];
        if !std::mem::take(&mut ring.runs) {
            return;
        }
        let format = Format::of(self.features);
        self.shared.host().doorbells().detach(at);
        let mut running = lock(&self.shared.running);
        if let Some(position) = running.stop(at) {
            ring.base = Some(position.vring_base(format));
        }
    }

    /// Ends the session, if there is one. No ring is running. An error is forgotten.
    fn end_session(&mut self) {
        let mut running = lock(&self.shared.running);
        // An error of a task that comes later is of a session that has ended.
        running.number += 1;
        let had = running.session.take().is_some();
        let was_broken = running.broken.take().is_some();
        drop(running);
        self.told_legacy = false;
        if had || was_broken {
            self.host().set_state(ConnectionState::Closed);
            tracing::info!(device = self.host().name(), "the driver has stopped");
        }
    }

    /// Gives the device the rings for which everything is set up and that it does not have.
    fn start_rings(&mut self) -> Result<(), Failure> {
        let any = self.rings.iter().enumerate().any(|(at, ring)| ring.is_due(at));
        if !any || lock(&self.shared.running).broken.is_some() {
            return Ok(());
        }
        if self.features & common::VERSION_1 == 0 {
            if !std::mem::replace(&mut self.told_legacy, true) {
                tracing::warn!(
                    device = self.host().name(),
                    "the driver has not accepted VERSION_1: it is too old for this device, which \
                     does not work for it"
                );
            }
            return Ok(());
        }
        self.start_session()?;
        for at in 0..self.rings.len() {
            if self.rings[at].is_due(at) {
                self.start_ring(at)?;
            }
        }
        Ok(())
    }

    fn start_session(&mut self) -> Result<(), Failure> {
        let shared = &self.shared;
        let host = shared.host();
        let mut running = lock(&shared.running);
        if running.session.is_some() {
            return Ok(());
        }
        running.number += 1;
        let (number, weak) = (running.number, Arc::downgrade(shared));
        let features = self.features & !feature::PROTOCOL_FEATURES;
        let driver = Driver::new(host, features, move |code| {
            if let Some(shared) = weak.upgrade() {
                shared.fail(number, code);
            }
        });
        match self.device.clone().start(driver) {
            Ok(session) => running.session = Some(session),
            Err(code) => return Err(shared.broken(running, code)),
        }
        drop(running);
        host.counters().opens.one();
        host.set_state(ConnectionState::Open);
        let features = format!("{features:#x}");
        tracing::info!(device = host.name(), features, "a driver has started");
        self.tell_in_use()
    }

    /// Gives the device ring `at`.
    fn start_ring(&mut self, at: usize) -> Result<(), Failure> {
        let Some(layout) = self.layout(at)? else { return Ok(()) };
        self.check_log(at, &layout)?;
        let index = u16::try_from(at).unwrap_or(u16::MAX);
        let position = self.position(at, &layout)?;
        let features = RingFeatures::of(self.features);
        if !std::mem::replace(&mut self.rings[at].began, true) {
            self.tell_unkept(at);
        }
        let host = self.shared.host();
        let (queue, taken) = match self.region(at) {
            Some(region) => {
                let view = host.memory().view();
                Queue::recover(layout, features, region, position, &view)
            }
            None => Queue::resume(layout, features, &State::at(position)),
        }
        .map_err(|error| Failure::Queue(at, error.to_string()))?;
        let doorbell = host.doorbells().doorbell(index.into());
        let call = Call::new(self.shared.clone(), index, host.counters().clone());
        let mut running = lock(&self.shared.running);
        let Running { session: Some(session), .. } = &mut *running else { return Ok(()) };
        match session.enable_again(index, Enabled { queue, doorbell, call }, taken) {
            Ok(()) => self.rings[at].runs = true,
            Err(code) => return Err(self.shared.broken(running, code)),
        }
        Ok(())
    }

    /// Tells the log if the buffers of ring `at` are kept nowhere, though there is memory for that.
    fn tell_unkept(&self, at: usize) {
        let (Some(kept), None) = (&self.kept, self.region(at)) else { return };
        tracing::warn!(
            device = self.host().name(),
            ring = at,
            size = self.rings[at].size,
            "the memory for buffers in flight is for {kept}: what this ring has in flight is lost \
             if the bus dies"
        );
    }

    /// Where ring `at` is in the driver's memory.
    fn layout(&self, at: usize) -> Result<Option<Layout>, Failure> {
        let ring = &self.rings[at];
        let Some(Addresses { descriptors, used, available }) = ring.addresses else {
            return Ok(None);
        };
        let format = Format::of(self.features);
        let mut layout = Layout {
            format,
            size: ring.size,
            descriptors,
            driver_area: available,
            device_area: used,
        };
        let [descriptors, available, used] = layout
            .ranges()
            .map(|(user, len)| self.regions.guest(user, len).ok_or(Failure::Outside(at, user)));
        layout.descriptors = descriptors?;
        layout.driver_area = available?;
        layout.device_area = used?;
        Ok(Some(layout))
    }

    /// The log has the pages of a ring at the driver's addresses. The front end must want the same.
    fn check_log(&self, at: usize, layout: &Layout) -> Result<(), Failure> {
        match self.rings[at].log {
            Some(place) if place != layout.device_area => Err(Failure::LogPlace(at, place)),
            _ => Ok(()),
        }
    }

    /// Where the device goes on in ring `at`.
    ///
    /// The base of a split ring says what was taken, and the used index in memory says what was
    /// finished. They differ if a back end has died. This device finishes chains in order: those
    /// between are not done, and it takes them again. A packed ring has no index in memory. Its
    /// used place is its available place, because a ring stops only when nothing is in flight. Some
    /// front ends (DPDK) leave the used half of the base 0.
    fn position(&self, at: usize, layout: &Layout) -> Result<Position, Failure> {
        let Some(base) = self.rings[at].base else { return Ok(Position::start(layout.format)) };
        let mut position = Position::of_vring_base(layout.format, base);
        if layout.format == Format::Split {
            let mut index = [0; 2];
            let read = self.host().memory().view().read(layout.device_area + 2, &mut index);
            read.map_err(|_| Failure::Outside(at, layout.device_area))?;
            position.available = u16::from_le_bytes(index);
        }
        let Position { available, available_wrap, .. } = position;
        Ok(Position { used: available, used_wrap: available_wrap, ..position })
    }
}

/// The eventfd that came with a message for ring `at`, if one came.
fn eventfd(at: usize, fds: PeerFds) -> Result<Option<OwnedFd>, Failure> {
    for fd in fds.as_slice() {
        if !is_eventfd(fd).map_err(|error| Failure::Eventfd(at, error))? {
            return Err(Failure::NoEventfd(at));
        }
    }
    Ok(fds.into_harmless().pop())
}
