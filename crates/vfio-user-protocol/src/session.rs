// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The session of one client. It handles each command and makes the reply.
//!
//! A session does no input and no output: it takes a message and returns an [`Answer`]. A program
//! with a transport of its own can use it without the [`Server`](crate::Server).
//!
//! If a command fails, the client gets an errno and the session goes on. If a message breaks the
//! order of the protocol, the session ends: a command before `VERSION`, a second `VERSION`, or a
//! reply without a request.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;

use crate::closer::PeerFds;
use crate::eventfd::is_eventfd;
use crate::failure::{Failure, MAX_MULTI_WRITES};
use crate::features::Migration;
use crate::message::{
    self, DATAMATCH, DEVICE_IS_PCI, DEVICE_RESETS, DmaMap, DmaUnmap, Header, Info, IrqData,
    IrqVerb, Kind, Malformed, MultiWrite, REGION_ACCESS_LEN, RegionAccess, SUB_REGION_LEN, SetIrqs,
    SubRegion, Version, command,
};
use crate::socket::Message;
use crate::state::{BadState, SessionData};
use crate::target::{IrqAction, Mapping, Target};
use crate::version::{self, Disagreement, MAX_TRANSFER, MAX_VERSION_DATA, Negotiated};

/// How much one call may do. An operation is *long* if it may take more than some ten microseconds:
/// `DMA_MAP`, `DMA_UNMAP`, `DEVICE_RESET`, `DEVICE_FEATURE`, `MIG_DATA_READ`, `MIG_DATA_WRITE`, a
/// write of which the target says so ([`Target::is_long_write`]), and the end of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// No long operation.
    Quick,
    /// One long operation at most.
    One,
    /// Everything.
    All,
}

impl Effort {
    /// Takes the right to one long operation. False: there is none left.
    pub(crate) fn take(&mut self) -> bool {
        match self {
            Effort::Quick => false,
            Effort::One => {
                *self = Effort::Quick;
                true
            }
            Effort::All => true,
        }
    }
}

/// A message that is being handled, in one step or in several.
#[derive(Debug)]
pub struct Handling {
    /// `None` once it has been handled.
    message: Option<Message>,
    /// How many writes of a `REGION_WRITE_MULTI` are done.
    written: usize,
    /// The first failure among them.
    failure: Option<Failure>,
}

impl Handling {
    /// The number of the command. 0: it has been handled.
    pub(crate) fn command(&self) -> u16 {
        self.message.as_ref().map_or(0, |message| message.header.command)
    }
}

impl From<Message> for Handling {
    fn from(message: Message) -> Self {
        Handling { message: Some(message), written: 0, failure: None }
    }
}

/// The cost of an operation beside that of its message, in units of [`Session::take_work`].
mod cost {
    /// Writes of a `REGION_WRITE_MULTI` that cost one unit.
    pub const WRITES: u32 = 4;
    /// Bytes of a message or of a reply that cost one unit.
    pub const BYTES: usize = 1024;
    /// Interrupts of a `DEVICE_SET_IRQS` that cost one unit.
    pub const INTERRUPTS: u32 = 4;
    /// Units of a descriptor.
    pub const DESCRIPTOR: u32 = 2;
}

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes / cost::BYTES).unwrap_or(u32::MAX)
}

/// The result of a message.
#[derive(Debug)]
#[non_exhaustive]
pub enum Answer {
    /// Send nothing, because the command was posted.
    Silence,
    /// Send these bytes with these descriptors.
    Reply(Vec<u8>, Vec<OwnedFd>),
    /// The negotiation succeeded. Send this reply.
    Negotiated(Vec<u8>),
    /// Send this reply, if there is one. Then end the session, for this reason.
    End(Option<Vec<u8>>, Violation),
}

/// The reason why a session ends: a fault of the client.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The client sent a command before `VERSION`.
    #[error("{0} before VERSION")]
    TooEarly(Header),
    /// The client sent `VERSION` again.
    #[error("a second VERSION")]
    Again,
    /// The two ends do not agree on a version.
    #[error("no agreement: {0}")]
    Disagreement(#[from] Disagreement),
    /// The body of `VERSION` is not valid.
    #[error("VERSION: {0}")]
    Version(#[from] Malformed),
    /// The client sent a reply. The server sends no commands, so it expects no replies.
    #[error("reply {0} without a request")]
    Reply(Header),
}

#[derive(Default)]
struct Reply {
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl From<Vec<u8>> for Reply {
    fn from(body: Vec<u8>) -> Self {
        Self { body, fds: Vec::new() }
    }
}

type Outcome = Result<Reply, Failure>;

/// The session of one client.
#[derive(Debug, Default)]
pub struct Session {
    negotiated: Option<Negotiated>,
    /// Mappings by address, with their size.
    maps: BTreeMap<u64, u64>,
    migration: Migration,
    failures: u64,
    work: u32,
}

impl Session {
    /// The negotiated parameters. `None` before the negotiation.
    #[must_use]
    pub fn negotiated(&self) -> Option<&Negotiated> {
        self.negotiated.as_ref()
    }

    /// Whether the client is moving the device: the device is not in the state `RUNNING`, or the
    /// log of written pages is on.
    pub(crate) fn is_migrating(&self) -> bool {
        self.migration.is_under_way()
    }

    /// The session as data, between two messages. It has no migration under way.
    pub(crate) fn save(&self) -> SessionData {
        SessionData {
            negotiated: self.negotiated,
            maps: self.maps.iter().map(|(&address, &size)| (address, size)).collect(),
            failures: self.failures,
        }
    }

    /// The session of this data.
    ///
    /// # Errors
    /// No session of this crate can have it.
    pub(crate) fn restore(data: SessionData) -> Result<Session, BadState> {
        let SessionData { negotiated, maps, failures } = data;
        if negotiated.is_some_and(|with| !with.is_possible()) {
            return Err(BadState::Wrong("what was negotiated"));
        }
        let (most, page) = negotiated.map_or((0, 1), |with| (with.max_dma_maps, with.page_size));
        if maps.len() > most {
            return Err(BadState::Wrong("the number of mappings"));
        }
        let mut next = 0;
        for &(address, size) in &maps {
            let end = address.checked_add(size).filter(|_| size > 0);
            match end {
                Some(end) if address >= next && (address | size) % page == 0 => next = end,
                _ => return Err(BadState::Wrong("a mapping")),
            }
        }
        let migration = Migration::default();
        let maps = maps.into_iter().collect();
        Ok(Session { negotiated, maps, migration, failures, work: 0 })
    }

    /// The number of commands that failed so far, including posted ones.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// The longest message that the client may send now, header included, in bytes.
    #[must_use]
    pub fn max_message(&self) -> usize {
        let body = if self.negotiated.is_some() {
            REGION_ACCESS_LEN + MAX_TRANSFER
        } else {
            4 + MAX_VERSION_DATA
        };
        message::HEADER_LEN + body
    }

    /// Returns how much has been done since the last call: 1 for each message, and more for what
    /// else costs time: 1 for each KiB of a message and of its reply, for 4 writes of a
    /// `REGION_WRITE_MULTI`, and for 4 interrupts of a `DEVICE_SET_IRQS`, and 2 for each
    /// descriptor.
    pub fn take_work(&mut self) -> u32 {
        std::mem::take(&mut self.work)
    }

    /// Handles a message. `name` is the device's name in the log.
    pub fn handle<T: Target + ?Sized>(
        &mut self,
        target: &mut T,
        name: &str,
        message: Message,
    ) -> Answer {
        let mut handling = Handling::from(message);
        // With this effort nothing remains to be done.
        self.go_on(target, name, &mut handling, &mut Effort::All).unwrap_or(Answer::Silence)
    }

    /// Does what a message asks for, as far as `effort` allows. Returns `None` if an operation
    /// remains that needs more effort: the caller then calls again with the same message, before
    /// any other of this session.
    pub fn go_on<T: Target + ?Sized>(
        &mut self,
        target: &mut T,
        name: &str,
        handling: &mut Handling,
        effort: &mut Effort,
    ) -> Option<Answer> {
        let message = handling.message.as_ref()?;
        let negotiated = self.negotiated.is_some_and(|with| with.write_multiple);
        if negotiated && message.header.command == command::REGION_WRITE_MULTI {
            if let Ok(writes) = multi_writes(&message.body, message.fds.as_slice()) {
                let rest = &writes[handling.written.min(writes.len())..];
                for write in rest {
                    if is_long(target, write.region, write.offset, write.data) && !effort.take() {
                        return None;
                    }
                    let done = write_one(target, write);
                    handling.failure = handling.failure.take().or(done.err());
                    handling.written += 1;
                    if handling.written % cost::WRITES as usize == 0 {
                        self.work += 1;
                    }
                }
            }
        } else if self.negotiated.is_some() && self.is_long(target, message) && !effort.take() {
            return None;
        }
        let message = handling.message.take()?;
        self.work += 1 + units(message.body.len());
        let answer = self.answer(target, name, message, handling.failure.take());
        if let Answer::Reply(bytes, fds) = &answer {
            self.work += units(bytes.len()) + u32::try_from(fds.len()).unwrap_or(u32::MAX);
        }
        Some(answer)
    }

    /// Whether a message, which is no `REGION_WRITE_MULTI`, asks for a long operation.
    fn is_long<T: Target + ?Sized>(&self, target: &T, message: &Message) -> bool {
        match message.header.command {
            command::DMA_MAP | command::DMA_UNMAP | command::DEVICE_RESET => true,
            command::DEVICE_FEATURE | command::MIG_DATA_READ | command::MIG_DATA_WRITE => true,
            command::REGION_WRITE => RegionAccess::parse_with_data(&message.body)
                .is_ok_and(|(access, data)| is_long(target, access.region, access.offset, data)),
            _ => false,
        }
    }

    /// The answer to a message. The writes of a `REGION_WRITE_MULTI` are done; `failure` is the
    /// first that failed.
    fn answer<T: Target + ?Sized>(
        &mut self,
        target: &mut T,
        name: &str,
        message: Message,
        failure: Option<Failure>,
    ) -> Answer {
        let Message { header, body, fds, lost_fds } = message;
        let Kind::Command { no_reply } = header.kind else {
            return Answer::End(None, Violation::Reply(header));
        };
        let answer = |kind, body: &[u8]| message::message(header.id, header.command, kind, body);
        let refusal = |errno: Errno| {
            answer(Kind::Reply { error: Some(errno.raw_os_error().unsigned_abs()) }, &[])
        };
        let done = Kind::Reply { error: None };
        let Some(negotiated) = self.negotiated else {
            return match self.version(target.max_dma_maps(), header, &body) {
                Ok(reply) => Answer::Negotiated(answer(done, &reply)),
                Err((errno, violation)) => {
                    Answer::End((!no_reply).then(|| refusal(errno)), violation)
                }
            };
        };
        if header.command == command::VERSION {
            return Answer::End((!no_reply).then(|| refusal(Errno::INVAL)), Violation::Again);
        }
        let outcome = match failure {
            Some(failure) => Err(failure),
            None if lost_fds => {
                tracing::warn!(
                    device = name,
                    "{header} fails: this process cannot take its descriptors, because it has as \
                     many as RLIMIT_NOFILE allows"
                );
                Err(Failure::Device(Errno::MFILE))
            }
            None => self.command(target, &negotiated, header.command, &body, fds),
        };
        match outcome {
            Ok(_) if no_reply => Answer::Silence,
            Ok(reply) => Answer::Reply(answer(done, &reply.body), reply.fds),
            Err(failure) => {
                self.failures += 1;
                tracing::debug!(device = name, "{header} failed: {failure}");
                if no_reply {
                    Answer::Silence
                } else {
                    Answer::Reply(refusal(failure.errno()), Vec::new())
                }
            }
        }
    }

    fn version(
        &mut self,
        max_dma_maps: u32,
        header: Header,
        body: &[u8],
    ) -> Result<Vec<u8>, (Errno, Violation)> {
        if header.command != command::VERSION || header.kind != (Kind::Command { no_reply: false })
        {
            return Err((Errno::INVAL, Violation::TooEarly(header)));
        }
        let request = Version::parse(body).map_err(|e| (Errno::INVAL, Violation::Version(e)))?;
        let (negotiated, reply) = version::answer(&request, max_dma_maps)
            .map_err(|e| (e.errno(), Violation::Disagreement(e)))?;
        self.negotiated = Some(negotiated);
        Ok(reply)
    }

    fn command<T: Target + ?Sized>(
        &mut self,
        target: &mut T,
        negotiated: &Negotiated,
        number: u16,
        body: &[u8],
        fds: PeerFds,
    ) -> Outcome {
        let count = fds.as_slice().len();
        // Each may start a thread that closes it.
        let closes = u32::try_from(count).unwrap_or(u32::MAX).saturating_mul(cost::DESCRIPTOR);
        self.work = self.work.saturating_add(closes);
        if count > 0 && !matches!(number, command::DMA_MAP | command::DEVICE_SET_IRQS) {
            return Err(Failure::Descriptors { expected: "none", got: count });
        }
        match number {
            command::REGION_READ => region_read(target, body),
            command::REGION_WRITE => region_write(target, body),
            // The writes are done.
            command::REGION_WRITE_MULTI if negotiated.write_multiple => {
                let writes = multi_writes(body, fds.as_slice())?;
                Ok(MultiWrite::reply(writes.len() as u64).into())
            }
            command::REGION_WRITE_MULTI => {
                Err(Failure::Unsupported("REGION_WRITE_MULTI, unless negotiated,"))
            }
            command::DMA_MAP => self.dma_map(target, negotiated, body, fds),
            command::DMA_UNMAP => self.dma_unmap(target, body),
            command::DEVICE_GET_INFO => device_info(target, body),
            command::DEVICE_GET_REGION_INFO => region_info(target, body),
            command::DEVICE_GET_REGION_IO_FDS => {
                let most = negotiated.peer_fds;
                region_io_fds(target, most, body, &mut self.work)
            }
            command::DEVICE_GET_IRQ_INFO => irq_info(target, body),
            command::DEVICE_SET_IRQS => {
                let count = SetIrqs::parse(body).map_or(0, |set| set.count);
                self.work = self.work.saturating_add(count / cost::INTERRUPTS);
                set_irqs(target, body, fds)
            }
            command::DEVICE_RESET => {
                if !target.device_info().resettable {
                    return Err(Failure::Unsupported("DEVICE_RESET"));
                }
                target.reset()?;
                self.migration.reset();
                Ok(Reply::default())
            }
            command::DEVICE_FEATURE => {
                Ok(self.migration.feature(target, negotiated.peer_transfer, body)?.into())
            }
            command::DIRTY_PAGES => Err(Failure::Unsupported("DIRTY_PAGES")),
            command::MIG_DATA_READ => {
                Ok(self.migration.read(target, negotiated.peer_transfer, body)?.into())
            }
            command::MIG_DATA_WRITE => {
                self.migration.write(target, body)?;
                Ok(Reply::default())
            }
            command::DMA_READ | command::DMA_WRITE => Err(Failure::WrongDirection),
            _ => Err(Failure::Unknown),
        }
    }

    fn dma_map<T: Target + ?Sized>(
        &mut self,
        target: &mut T,
        negotiated: &Negotiated,
        body: &[u8],
        fds: PeerFds,
    ) -> Outcome {
        let DmaMap { readable, writable, offset, address, size } = DmaMap::parse(body)?;
        let file = match fds.as_slice() {
            [] => None,
            [one] => Some(one),
            more => {
                let got = more.len();
                return Err(Failure::Descriptors { expected: "none or one", got });
            }
        };
        if file.is_none() && offset != 0 {
            return Err(Failure::Offset(offset));
        }
        let pages = size > 0 && (address | size | offset) % negotiated.page_size == 0;
        // The kernel's file offsets are signed.
        let end_in_file = offset.checked_add(size).filter(|&end| i64::try_from(end).is_ok());
        let (Some(end), true, Some(_)) = (address.checked_add(size), pages, end_in_file) else {
            return Err(Failure::BadRange(address, size));
        };
        // The existing mappings do not overlap. So only the last one that starts before `end` can
        // overlap the new one.
        if self.maps.range(..end).next_back().is_some_and(|(start, len)| start + len > address) {
            return Err(Failure::Overlap(address, size));
        }
        if self.maps.len() >= negotiated.max_dma_maps {
            return Err(Failure::TooManyMaps(negotiated.max_dma_maps));
        }
        let memory = file.map(|file| (file.as_fd(), offset));
        target.dma_map(Mapping { address, size, readable, writable, memory })?;
        // A file that the target has mapped is no descriptor whose close could wait. Nobody has
        // looked at a file that may be neither read nor written.
        if readable || writable {
            drop(fds.into_harmless());
        }
        self.maps.insert(address, size);
        Ok(Reply::default())
    }

    fn dma_unmap<T: Target + ?Sized>(&mut self, target: &mut T, body: &[u8]) -> Outcome {
        let unmap = DmaUnmap::parse(body)?;
        let DmaUnmap { all, dirty_bitmap, address, size } = unmap;
        if dirty_bitmap {
            return Err(Failure::Unsupported("the bitmap of dirty pages"));
        }
        if all {
            if address != 0 || size != 0 {
                return Err(Failure::BadRange(address, size));
            }
            target.dma_unmap_all();
            self.maps.clear();
        } else {
            let end = address.checked_add(size).filter(|_| size > 0);
            let end = end.ok_or(Failure::BadRange(address, size))?;
            // The mapping that begins before the range may reach into it.
            let before = self.maps.range(..address).next_back();
            let last = self.maps.range(address..end).next_back();
            let cut = before.is_some_and(|(start, len)| start + len > address)
                || last.is_some_and(|(start, len)| start + len > end);
            if cut {
                return Err(Failure::Cut(address, size));
            }
            if last.is_some() {
                target.dma_unmap(address, size);
            }
            // As the kernel's VFIO does, a range without mappings succeeds. QEMU counts on that.
            let inside: Vec<u64> = self.maps.range(address..end).map(|(start, _)| *start).collect();
            let size = inside.iter().filter_map(|start| self.maps.remove(start)).sum();
            return Ok(DmaUnmap { size, ..unmap }.body().into());
        }
        Ok(unmap.body().into())
    }
}

fn device_info<T: Target + ?Sized>(target: &mut T, body: &[u8]) -> Outcome {
    Info::parse_device_request(body)?;
    let info = target.device_info();
    let flags = DEVICE_IS_PCI | if info.resettable { DEVICE_RESETS } else { 0 };
    // In the reply to this command, the last two words are the numbers of regions and of interrupt
    // indexes.
    Ok(Info { argsz: 16, flags, index: info.regions, count: info.irqs }.body().into())
}

fn region_info<T: Target + ?Sized>(target: &mut T, body: &[u8]) -> Outcome {
    let index = message::RegionInfo::parse_request(body)?;
    if index >= target.device_info().regions {
        return Err(Failure::NoSuch("region", index));
    }
    let info = target.region_info(index);
    let flags = u32::from(info.readable) | u32::from(info.writable) << 1;
    Ok(message::RegionInfo { argsz: 32, flags, index, size: info.size }.body().into())
}

fn irq_info<T: Target + ?Sized>(target: &mut T, body: &[u8]) -> Outcome {
    let index = Info::parse_index_request(body)?.index;
    if index >= target.device_info().irqs {
        return Err(Failure::NoSuch("interrupt index", index));
    }
    let info = target.irq_info(index);
    let flags = u32::from(info.count > 0)
        | u32::from(info.maskable) << 1
        | u32::from(info.automasked) << 2
        | u32::from(info.fixed_size) << 3;
    Ok(Info { argsz: 16, flags, index, count: info.count }.body().into())
}

/// `peer_fds`: the most descriptors that the client can receive. `work`: what the client is
/// charged.
fn region_io_fds<T: Target + ?Sized>(
    target: &mut T,
    peer_fds: usize,
    body: &[u8],
    work: &mut u32,
) -> Outcome {
    let head = |count: usize, index: u32| {
        let len = Info::LEN + count * SUB_REGION_LEN;
        match (u32::try_from(len), u32::try_from(count)) {
            (Ok(argsz), Ok(count)) => Ok(Info { argsz, flags: 0, index, count }),
            _ => Err(Failure::TooMuch(len as u64)),
        }
    };
    let request = Info::parse_index_request(body)?;
    if request.index >= target.device_info().regions {
        return Err(Failure::NoSuch("region", request.index));
    }
    // Omit eventfds beyond the number that the client can receive. The client writes to those
    // offsets by message.
    let count = target.io_eventfd_count(request.index);
    *work = work.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
    let count = count.min(peer_fds);
    let needed = head(count, request.index)?;
    if request.argsz < needed.argsz {
        // The client's buffer is too small. It learns the necessary size and asks again.
        return Ok(needed.body().into());
    }
    let mut eventfds = target.io_eventfds(request.index, count);
    eventfds.truncate(count);
    // There may be fewer than were counted.
    let mut body = head(eventfds.len(), request.index)?.body();
    let mut fds = Vec::with_capacity(eventfds.len());
    for (fd_index, eventfd) in (0..).zip(eventfds) {
        let flags = if eventfd.datamatch.is_some() { DATAMATCH } else { 0 };
        let datamatch = eventfd.datamatch.unwrap_or(0);
        let (offset, size) = (eventfd.offset, eventfd.size);
        SubRegion { offset, size, fd_index, kind: 0, flags, datamatch }.append_to(&mut body);
        fds.push(eventfd.fd);
    }
    Ok(Reply { body, fds })
}

fn set_irqs<T: Target + ?Sized>(target: &mut T, body: &[u8], fds: PeerFds) -> Outcome {
    let SetIrqs { index, start, count, verb, data } = SetIrqs::parse(body)?;
    if index >= target.device_info().irqs {
        return Err(Failure::NoSuch("interrupt index", index));
    }
    let got = fds.as_slice().len();
    if got > 0 && (data != IrqData::Eventfd || got != count as usize) {
        return Err(Failure::Descriptors { expected: "none, or as many as interrupts,", got });
    }
    if (verb, data, start, count) == (IrqVerb::Trigger, IrqData::None, 0, 0) {
        // An index without interrupts has nothing to disconnect, so the target does not learn of
        // this.
        if target.irq_info(index).count > 0 {
            target.set_irqs(index, IrqAction::DisableAll)?;
        }
        return Ok(Reply::default());
    }
    let have = target.irq_info(index).count;
    // This also bounds the vectors below.
    if count == 0 || start.checked_add(count).is_none_or(|end| end > have) {
        return Err(Failure::IrqRange { index, start, count, have });
    }
    for fd in fds.as_slice() {
        if !is_eventfd(fd)? {
            return Err(Failure::NotEventfd);
        }
    }
    let which = || match data {
        IrqData::Bool(bools) => {
            (start..).zip(bools).filter(|&(_, &b)| b != 0).map(|(i, _)| i).collect()
        }
        _ => (start..start + count).collect(),
    };
    let fds = fds.into_harmless();
    let eventfds = if fds.is_empty() {
        std::iter::repeat_with(|| None).take(count as usize).collect()
    } else {
        fds.into_iter().map(Some).collect()
    };
    let action = match (verb, data) {
        (IrqVerb::Trigger, IrqData::Eventfd) => IrqAction::Connect { start, eventfds },
        (IrqVerb::Mask, IrqData::Eventfd) => IrqAction::ConnectMask { start, eventfds },
        (IrqVerb::Unmask, IrqData::Eventfd) => IrqAction::ConnectUnmask { start, eventfds },
        (IrqVerb::Trigger, _) => IrqAction::Trigger(which()),
        (IrqVerb::Mask, _) => IrqAction::Mask(which()),
        (IrqVerb::Unmask, _) => IrqAction::Unmask(which()),
    };
    target.set_irqs(index, action)?;
    Ok(Reply::default())
}

/// Checks that a region exists, allows the access, and has these bytes.
fn check_access<T: Target + ?Sized>(
    target: &T,
    region: u32,
    offset: u64,
    count: usize,
    write: bool,
) -> Result<(), Failure> {
    if region >= target.device_info().regions {
        return Err(Failure::NoSuch("region", region));
    }
    let info = target.region_info(region);
    let (size, count) = (info.size, count as u64);
    if count > MAX_TRANSFER as u64 {
        return Err(Failure::TooMuch(count));
    }
    if offset.checked_add(count).is_none_or(|end| end > size) {
        return Err(Failure::Outside { region, offset, count, size });
    }
    match write {
        false if !info.readable => Err(Failure::NotAllowed("read", region)),
        true if !info.writable => Err(Failure::NotAllowed("written", region)),
        _ => Ok(()),
    }
}

fn region_read<T: Target + ?Sized>(target: &mut T, body: &[u8]) -> Outcome {
    let access = RegionAccess::parse(body)?;
    let count = access.count as usize;
    check_access(target, access.region, access.offset, count, false)?;
    let mut reply = access.body(&[]);
    reply.resize(REGION_ACCESS_LEN + count, 0);
    if count > 0 {
        target.read(access.region, access.offset, &mut reply[REGION_ACCESS_LEN..])?;
    }
    Ok(reply.into())
}

fn region_write<T: Target + ?Sized>(target: &mut T, body: &[u8]) -> Outcome {
    let (access, data) = RegionAccess::parse_with_data(body)?;
    check_access(target, access.region, access.offset, data.len(), true)?;
    if !data.is_empty() {
        target.write(access.region, access.offset, data)?;
    }
    Ok(access.body(&[]).into())
}

/// The writes of a `REGION_WRITE_MULTI`.
fn multi_writes<'a>(body: &'a [u8], fds: &[OwnedFd]) -> Result<Vec<MultiWrite<'a>>, Failure> {
    if !fds.is_empty() {
        return Err(Failure::Descriptors { expected: "none", got: fds.len() });
    }
    let writes = MultiWrite::parse_all(body)?;
    if writes.len() > MAX_MULTI_WRITES {
        return Err(Failure::TooManyWrites(writes.len()));
    }
    Ok(writes)
}

/// Does one of several writes. Each is done also after another has failed: they were independent of
/// each other before the client put them into one message. The reply has the errno of the first
/// that failed.
fn write_one<T: Target + ?Sized>(target: &mut T, write: &MultiWrite<'_>) -> Result<(), Failure> {
    check_access(target, write.region, write.offset, write.data.len(), true)?;
    if !write.data.is_empty() {
        target.write(write.region, write.offset, write.data)?;
    }
    Ok(())
}

/// Whether a write will be done and is long.
fn is_long<T: Target + ?Sized>(target: &T, region: u32, offset: u64, data: &[u8]) -> bool {
    check_access(target, region, offset, data.len(), true).is_ok()
        && !data.is_empty()
        && target.is_long_write(region, offset, data)
}
