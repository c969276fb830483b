// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client's end, for VMMs and for programs that drive a device without a VM.
//!
//! A call waits for the server's reply. A posted call ([`Client::region_post`]) does not wait. The
//! device reaches memory by the descriptors that [`Client::dma_map`] gives it. The client refuses
//! all requests of the server.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::event::PollFlags;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{self, set_socket_timeout};
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, shutdown,
    socket_with,
};

use crate::closer::Closer;
use crate::eventfd::is_eventfd;
use crate::message::{
    self, DATAMATCH, DEVICE_RESETS, DmaMap, DmaRange, DmaUnmap, FEATURE_LEN, Feature, HEADER_LEN,
    Header, Info, IrqData, IrqVerb, Kind, LoggingControl, LoggingReport, Malformed, MigData,
    MigrationFlags, MigrationState, MultiWrite, REGION_ACCESS_LEN, RegionAccess, SetIrqs,
    SubRegion, Version, command, command_name, feature,
};
use crate::patience::{Patience, TIMEOUT, Wait, Waited};
use crate::socket::{Broken, Message, Received, Receiver, Sender, SocketSource, Source};
use crate::target::{DeviceInfo, IoEventFd, IrqInfo, RegionInfo};
use crate::version::{self, Disagreement, KERNEL_MSG_FDS, MAX_TRANSFER, Negotiated};

/// The most eventfds of one region. No function has more doorbells.
const MAX_IO_EVENTFDS: usize = 1024;

/// The most descriptors of the server that may wait for their close. An honest server sends only
/// what the client asks for, and that closes at once.
const MAX_CLOSING: usize = MAX_IO_EVENTFDS;

/// The reason why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The client cannot connect.
    #[error("connecting to {path}: {errno}")]
    Connect {
        /// The path of the socket.
        path: String,
        /// The error of the system.
        errno: Errno,
    },
    /// The server refused the command. The connection goes on.
    #[error("{command} refused: {errno}")]
    Refused {
        /// The command's name.
        command: &'static str,
        /// The server's reason.
        errno: Errno,
    },
    /// No reply in the time that the client's [`Patience`] gives. The connection cannot be used any
    /// more.
    #[error("no reply to {0} in time")]
    Timeout(&'static str),
    /// The server has gone.
    #[error("the server closed the connection")]
    Closed,
    /// The stream is broken. The connection cannot be used any more.
    #[error(transparent)]
    Broken(#[from] Broken),
    /// The reply has the wrong id or command, or its body does not fit the command.
    #[error("{0} is no answer to {1}")]
    Mismatch(Header, &'static str),
    /// The reply does not have the form of its command.
    #[error("reply to {0}: {1}")]
    Malformed(&'static str, Malformed),
    /// The two ends do not agree on a version.
    #[error("no agreement with the server: {0}")]
    Disagreement(#[from] Disagreement),
    /// The message has more data or descriptors than the server accepts.
    #[error("{0}: more than the server accepts in one message")]
    TooMuch(&'static str),
    /// The ends have not negotiated this command.
    #[error("{0}: the server does not support it")]
    NotNegotiated(&'static str),
    /// What the server gave for writes to this offset of a region is no eventfd.
    #[error("what the server gave for writes to {0:#x} is no eventfd")]
    NotEventfd(u64),
    /// The server sends descriptors without end, and the client cannot close them as fast. The
    /// connection cannot be used any more.
    #[error("the server sends descriptors that cannot be closed")]
    Descriptors,
    /// The client cannot start the thread that closes the server's descriptors.
    #[error("starting a thread: {0}")]
    Thread(Errno),
    /// The socket failed.
    #[error("socket: {0}")]
    Socket(#[from] Errno),
}

impl ClientError {
    /// Whether the connection cannot be used any more.
    #[must_use]
    pub fn is_final(&self) -> bool {
        !matches!(self, Self::Refused { .. } | Self::TooMuch(_) | Self::NotNegotiated(_))
    }
}

/// A connection to a vfio-user server.
pub struct Client {
    socket: OwnedFd,
    receiver: Receiver,
    closer: Closer,
    sender: Sender,
    next_id: u16,
    /// A final error has occurred, and the client sends nothing any more. A later reply could
    /// belong to an earlier command.
    failed: bool,
    negotiated: Negotiated,
    patience: Patience,
    waited: Waited,
}

impl Client {
    /// Connects to the server at `path` and negotiates the version.
    ///
    /// The client has a thread that closes the descriptors that the server sends and nobody takes.
    /// It starts here. No other method of the client starts a thread.
    ///
    /// # Errors
    /// Nobody listens there; the server refuses ([`Errno::BUSY`]: it has another client); the
    /// server does not answer within 5 s; or the thread cannot be started.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, ClientError> {
        let path = path.as_ref();
        let failed = |errno| ClientError::Connect { path: path.display().to_string(), errno };
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(failed)?;
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        // A server whose backlog is full lets the call wait.
        set_socket_timeout(&socket, sockopt::Timeout::Send, Some(TIMEOUT)).map_err(failed)?;
        retry_on_intr(|| connect(&socket, &address)).map_err(failed)?;
        Self::negotiate(socket)
    }

    /// Negotiates the version on a connected stream socket.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn negotiate(socket: OwnedFd) -> Result<Self, ClientError> {
        let negotiated = Negotiated {
            minor: 0,
            peer_fds: 0,
            peer_transfer: MAX_TRANSFER,
            max_dma_maps: 0,
            page_size: version::PAGE_SIZE,
            write_multiple: false,
        };
        let closer = Closer::started().map_err(|error| {
            ClientError::Thread(Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))
        })?;
        let mut client = Self {
            socket,
            receiver: Receiver::new(closer.clone()),
            closer,
            sender: Sender::default(),
            next_id: 0,
            failed: false,
            negotiated,
            patience: Patience::default(),
            waited: Waited::default(),
        };
        let reply = client.call(command::VERSION, &version::proposal(), &[])?;
        let version =
            Version::parse(&reply.body).map_err(|e| ClientError::Malformed("VERSION", e))?;
        client.negotiated = version::accept(&version)?;
        Ok(client)
    }

    /// The parameters that this client and the server have negotiated.
    #[must_use]
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// Sets how long the calls from now on wait for the server. The default is
    /// [`Patience::default`]. What earlier calls have waited counts.
    pub fn set_patience(&mut self, patience: Patience) {
        self.patience = patience;
    }

    /// Sends a command and waits for its reply. This is for commands without a method of their own.
    ///
    /// # Errors
    /// The server refuses, or the connection fails. After a [final](ClientError::is_final) error
    /// every further call fails at once with [`ClientError::Closed`].
    pub fn call(
        &mut self,
        number: u16,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Message, ClientError> {
        self.ask(number, body, fds, Ok)
    }

    /// As [`call`](Self::call), and reads the reply by `read`. A final error of `read` ends the
    /// connection too.
    fn ask<R>(
        &mut self,
        number: u16,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        read: impl FnOnce(Message) -> Result<R, ClientError>,
    ) -> Result<R, ClientError> {
        self.guarded(number, |client, wait| {
            let id = client.send(number, false, body, fds, wait)?;
            read(client.reply(id, number, wait)?)
        })
    }

    /// Sends a command that has no reply.
    ///
    /// # Errors
    /// The connection fails. The client does not learn whether the command succeeds.
    pub fn post(&mut self, number: u16, body: &[u8]) -> Result<(), ClientError> {
        self.guarded(number, |client, wait| client.send(number, true, body, &[], wait).map(drop))
    }

    fn guarded<R>(
        &mut self,
        number: u16,
        act: impl FnOnce(&mut Self, &mut Wait) -> Result<R, ClientError>,
    ) -> Result<R, ClientError> {
        if self.failed {
            return Err(ClientError::Closed);
        }
        let mut wait = Wait::begin(number, self.patience.clone(), &mut self.waited);
        let result = act(self, &mut wait);
        wait.end(&mut self.waited);
        result.map_err(|error| if error.is_final() { self.broken(error) } else { error })
    }

    /// A final error has occurred. The client sends nothing any more, and its peer learns that it
    /// has gone before anything else that the caller does.
    fn broken(&mut self, error: ClientError) -> ClientError {
        self.failed = true;
        let _ = shutdown(&self.socket, Shutdown::Both);
        error
    }

    /// Waits for the reply to a command. Meanwhile it refuses the server's own requests.
    fn reply(&mut self, id: u16, number: u16, wait: &mut Wait) -> Result<Message, ClientError> {
        let name = command_name(number);
        loop {
            let message = self.receive(wait)?;
            // A server that sends requests without end must not extend the time limit, and not keep
            // the program from its end.
            if wait.is_over()? {
                return Err(ClientError::Timeout(name));
            }
            let header = message.header;
            match header.kind {
                Kind::Command { no_reply: true } => {}
                Kind::Command { no_reply: false } => self.refuse(header, wait)?,
                Kind::Reply { .. } if (header.id, header.command) != (id, number) => {
                    return Err(ClientError::Mismatch(header, name));
                }
                Kind::Reply { error: None } => return Ok(message),
                Kind::Reply { error: Some(errno) } => {
                    let errno = i32::try_from(errno).ok().filter(|e| (1..4096).contains(e));
                    let errno = errno.map_or(Errno::IO, Errno::from_raw_os_error);
                    return Err(ClientError::Refused { command: name, errno });
                }
            }
        }
    }

    fn send(
        &mut self,
        number: u16,
        no_reply: bool,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        wait: &mut Wait,
    ) -> Result<u16, ClientError> {
        if fds.len() > self.negotiated.peer_fds {
            return Err(ClientError::TooMuch(command_name(number)));
        }
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        let fds = fds
            .iter()
            .map(|fd| fd.try_clone_to_owned().map_err(|_| Errno::MFILE))
            .collect::<Result<_, _>>()?;
        self.sender.push(message::message(id, number, Kind::Command { no_reply }, body), fds);
        self.flush(wait)?;
        Ok(id)
    }

    /// Sends what is queued. While the socket is full it waits.
    fn flush(&mut self, wait: &mut Wait) -> Result<(), ClientError> {
        loop {
            match self.sender.flush(self.socket.as_fd()) {
                Ok(_) if self.sender.is_empty() => return Ok(()),
                Ok(_) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ClientError::Closed),
                Err(error) => return Err(error.into()),
            }
            if !wait.until(self.socket.as_fd(), PollFlags::OUT)? {
                return Err(ClientError::Timeout(wait.name()));
            }
        }
    }

    /// Receives the next message.
    fn receive(&mut self, wait: &mut Wait) -> Result<Message, ClientError> {
        if self.closer.waiting() > MAX_CLOSING {
            return Err(ClientError::Descriptors);
        }
        let name = wait.name();
        let mut source = Patiently { socket: self.socket.as_fd(), wait };
        let max = HEADER_LEN + REGION_ACCESS_LEN + MAX_TRANSFER;
        match self.receiver.next(&mut source, max, KERNEL_MSG_FDS)? {
            Received::Message(message) => Ok(message),
            Received::Nothing => Err(ClientError::Timeout(name)),
            Received::End => Err(ClientError::Closed),
        }
    }

    /// Refuses a request of the server.
    fn refuse(
        &mut self,
        Header { id, command, .. }: Header,
        wait: &mut Wait,
    ) -> Result<(), ClientError> {
        let error = Some(Errno::NOSYS.raw_os_error().unsigned_abs());
        let reply = message::message(id, command, Kind::Reply { error }, &[]);
        self.sender.push(reply, Vec::new());
        self.flush(wait)
    }

    /// Asks for the properties of the device (`DEVICE_GET_INFO`).
    ///
    /// # Errors
    /// The server refuses, or the connection fails. All methods below have the same errors.
    pub fn device_info(&mut self) -> Result<DeviceInfo, ClientError> {
        let info = self.info(command::DEVICE_GET_INFO, 16, 0)?;
        Ok(DeviceInfo {
            resettable: info.flags & DEVICE_RESETS != 0,
            regions: info.index,
            irqs: info.count,
        })
    }

    fn info(&mut self, number: u16, argsz: u32, index: u32) -> Result<Info, ClientError> {
        let request = Info { argsz, flags: 0, index, count: 0 };
        self.ask(number, &request.body(), &[], |reply| match Info::parse(&reply.body) {
            // The last two words of `DEVICE_GET_INFO` are numbers.
            Ok(info) if number == command::DEVICE_GET_INFO || info.index == index => Ok(info),
            Ok(_) => Err(ClientError::Mismatch(reply.header, command_name(number))),
            Err(e) => Err(ClientError::Malformed(command_name(number), e)),
        })
    }

    /// Asks for the properties of a region (`DEVICE_GET_REGION_INFO`).
    ///
    /// # Errors
    /// See [`Client::device_info`].
    pub fn region_info(&mut self, region: u32) -> Result<RegionInfo, ClientError> {
        const NAME: &str = "DEVICE_GET_REGION_INFO";
        let request = message::RegionInfo { argsz: 32, flags: 0, index: region, size: 0 };
        self.ask(command::DEVICE_GET_REGION_INFO, &request.body(), &[], |reply| {
            match message::RegionInfo::parse(&reply.body) {
                Ok(info) if info.index == region => Ok(RegionInfo {
                    size: info.size,
                    readable: info.flags & 1 != 0,
                    writable: info.flags & 2 != 0,
                }),
                Ok(_) => Err(ClientError::Mismatch(reply.header, NAME)),
                Err(e) => Err(ClientError::Malformed(NAME, e)),
            }
        })
    }

    /// Asks for the properties of an interrupt index (`DEVICE_GET_IRQ_INFO`).
    ///
    /// # Errors
    /// See [`Client::device_info`].
    pub fn irq_info(&mut self, index: u32) -> Result<IrqInfo, ClientError> {
        let info = self.info(command::DEVICE_GET_IRQ_INFO, 16, index)?;
        let flag = |bit: u32| info.flags & 1 << bit != 0;
        Ok(IrqInfo {
            count: info.count,
            maskable: flag(1),
            automasked: flag(2),
            fixed_size: flag(3),
        })
    }

    /// Shares memory with the device: `size` bytes of the file `memory`, from `offset` on, at
    /// `address`. The device may read and write it.
    ///
    /// # Errors
    /// See [`Client::device_info`].
    pub fn dma_map(
        &mut self,
        memory: BorrowedFd<'_>,
        offset: u64,
        address: u64,
        size: u64,
    ) -> Result<(), ClientError> {
        let map = DmaMap { readable: true, writable: true, offset, address, size };
        self.call(command::DMA_MAP, &map.body(), &[memory]).map(drop)
    }

    /// Ends the sharing of memory. When this returns, the device no longer touches it.
    ///
    /// # Errors
    /// See [`Client::device_info`].
    pub fn dma_unmap(&mut self, address: u64, size: u64) -> Result<(), ClientError> {
        let unmap = DmaUnmap { all: false, dirty_bitmap: false, address, size };
        self.call(command::DMA_UNMAP, &unmap.body(), &[]).map(drop)
    }

    /// Ends the sharing of all memory, as [`dma_unmap`](Self::dma_unmap) does for one mapping.
    ///
    /// # Errors
    /// See [`Client::device_info`].
    pub fn dma_unmap_all(&mut self) -> Result<(), ClientError> {
        let unmap = DmaUnmap { all: true, dirty_bitmap: false, address: 0, size: 0 };
        self.call(command::DMA_UNMAP, &unmap.body(), &[]).map(drop)
    }

    fn access(&self, region: u32, offset: u64, count: usize) -> Result<RegionAccess, ClientError> {
        match u32::try_from(count) {
            Ok(bytes) if count <= self.negotiated.peer_transfer => {
                Ok(RegionAccess { offset, region, count: bytes })
            }
            _ => Err(ClientError::TooMuch("region access")),
        }
    }

    /// Reads from a region.
    ///
    /// # Errors
    /// See [`Client::device_info`].
    pub fn region_read(
        &mut self,
        region: u32,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), ClientError> {
        let access = self.access(region, offset, data.len())?;
        self.ask(command::REGION_READ, &access.body(&[]), &[], |reply| {
            match RegionAccess::parse_with_data(&reply.body) {
                Ok((echo, read)) if echo == access => {
                    data.copy_from_slice(read);
                    Ok(())
                }
                Ok(_) => Err(ClientError::Mismatch(reply.header, "REGION_READ")),
                Err(e) => Err(ClientError::Malformed("REGION_READ", e)),
            }
        })
    }

    /// Writes to a region, and waits until the server has done it.
    ///
    /// # Errors
    /// See [`Client::device_info`].
    pub fn region_write(
        &mut self,
        region: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<(), ClientError> {
        let access = self.access(region, offset, data.len())?;
        self.ask(command::REGION_WRITE, &access.body(data), &[], |reply| {
            let echo = RegionAccess::parse(&reply.body);
            match echo {
                Ok(echo) if echo == access => Ok(()),
                Ok(_) => Err(ClientError::Mismatch(reply.header, "REGION_WRITE")),
                Err(e) => Err(ClientError::Malformed("REGION_WRITE", e)),
            }
        })
    }

    /// Writes to a region without waiting. Later calls take effect after it.
    ///
    /// # Errors
    /// The connection fails. The client does not learn whether the write succeeds.
    pub fn region_post(
        &mut self,
        region: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<(), ClientError> {
        let access = self.access(region, offset, data.len())?;
        self.post(command::REGION_WRITE, &access.body(data))
    }

    /// Does several writes of at most 8 bytes each with one message. The server must support it
    /// ([`Negotiated::write_multiple`](Negotiated::write_multiple)).
    ///
    /// # Errors
    /// See [`Client::device_info`]. The errno is that of the first write that failed. The server
    /// has done the other writes.
    pub fn region_write_multi(&mut self, writes: &[MultiWrite<'_>]) -> Result<(), ClientError> {
        const NAME: &str = "REGION_WRITE_MULTI";
        if !self.negotiated.write_multiple {
            return Err(ClientError::NotNegotiated(NAME));
        }
        self.ask(command::REGION_WRITE_MULTI, &MultiWrite::body(writes), &[], |reply| {
            match reply.body == MultiWrite::reply(writes.len() as u64) {
                true => Ok(()),
                false => Err(ClientError::Mismatch(reply.header, NAME)),
            }
        })
    }

    /// Gives the device the eventfds for its interrupts from `start` on.
    ///
    /// # Errors
    /// See [`Client::device_info`].
    pub fn connect_irqs(
        &mut self,
        index: u32,
        start: u32,
        eventfds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        let mut at = start;
        for fds in eventfds.chunks(self.negotiated.peer_fds.max(1)) {
            let count =
                u32::try_from(fds.len()).map_err(|_| ClientError::TooMuch("DEVICE_SET_IRQS"))?;
            self.set_irqs(
                SetIrqs { index, start: at, count, verb: IrqVerb::Trigger, data: IrqData::Eventfd },
                fds,
            )?;
            at = at.saturating_add(count);
        }
        Ok(())
    }

    /// Gives the device an eventfd with which the client unmasks one interrupt. For INTx this is
    /// the end of the interrupt, without a message.
    ///
    /// # Errors
    /// See [`Client::device_info`].
    pub fn connect_unmask(
        &mut self,
        index: u32,
        interrupt: u32,
        eventfd: BorrowedFd<'_>,
    ) -> Result<(), ClientError> {
        let verb = IrqVerb::Unmask;
        self.set_irqs(
            SetIrqs { index, start: interrupt, count: 1, verb, data: IrqData::Eventfd },
            &[eventfd],
        )
    }

    /// Disconnects all interrupts of an index.
    ///
    /// # Errors
    /// See [`Client::device_info`].
    pub fn disable_irqs(&mut self, index: u32) -> Result<(), ClientError> {
        self.set_irqs(
            SetIrqs { index, start: 0, count: 0, verb: IrqVerb::Trigger, data: IrqData::None },
            &[],
        )
    }

    /// Masks, unmasks or triggers one interrupt.
    ///
    /// # Errors
    /// See [`Client::device_info`].
    pub fn irq(&mut self, index: u32, interrupt: u32, verb: IrqVerb) -> Result<(), ClientError> {
        self.set_irqs(SetIrqs { index, start: interrupt, count: 1, verb, data: IrqData::None }, &[])
    }

    fn set_irqs(&mut self, set: SetIrqs<'_>, fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        self.call(command::DEVICE_SET_IRQS, &set.body(), fds).map(drop)
    }

    /// Asks for the eventfds whose writes have the effect of writes to a region. The result omits
    /// sub-regions of other types, and those with flags other than a value to match.
    ///
    /// The client has checked the form of the reply, and that each descriptor is an eventfd.
    /// Whether an offset is within the region is for the caller to check.
    ///
    /// # Errors
    /// [`ClientError::NotEventfd`]; otherwise see [`Client::device_info`].
    pub fn io_eventfds(&mut self, region: u32) -> Result<Vec<IoEventFd>, ClientError> {
        let argsz = self.info(command::DEVICE_GET_REGION_IO_FDS, 16, region)?.argsz;
        if argsz as usize <= Info::LEN {
            return Ok(Vec::new());
        }
        let request = Info { argsz, flags: 0, index: region, count: 0 };
        let reply = self.call(command::DEVICE_GET_REGION_IO_FDS, &request.body(), &[])?;
        io_eventfds(&reply, region).map_err(|error| match error {
            // The server has done nothing wrong.
            ClientError::Socket(_) => error,
            error => self.broken(error),
        })
    }

    /// Asks for or sets a feature of the device (`DEVICE_FEATURE`). `room`: the most bytes of data
    /// that the reply may have. Returns the data of the reply.
    fn feature(
        &mut self,
        asked: Feature,
        data: &[u8],
        room: usize,
    ) -> Result<Vec<u8>, ClientError> {
        const NAME: &str = "DEVICE_FEATURE";
        let argsz = u32::try_from(FEATURE_LEN + room.max(data.len()));
        let argsz = argsz.map_err(|_| ClientError::TooMuch(NAME))?;
        let asked = Feature { argsz, ..asked };
        self.ask(command::DEVICE_FEATURE, &asked.body(data), &[], |reply| {
            match Feature::parse(&reply.body) {
                Ok((echo, data)) if echo == (Feature { argsz: echo.argsz, ..asked }) => {
                    Ok(data.to_vec())
                }
                Ok(_) => Err(ClientError::Mismatch(reply.header, NAME)),
                Err(e) => Err(ClientError::Malformed(NAME, e)),
            }
        })
    }

    fn get(&mut self, number: u16, data: &[u8], room: usize) -> Result<Vec<u8>, ClientError> {
        let asked = Feature { argsz: 0, feature: number, get: true, set: false, probe: false };
        self.feature(asked, data, room)
    }

    fn set(&mut self, number: u16, data: &[u8]) -> Result<Vec<u8>, ClientError> {
        let asked = Feature { argsz: 0, feature: number, get: false, set: true, probe: false };
        self.feature(asked, data, 0)
    }

    /// Whether the server can log the pages that the device writes, for
    /// [`dma_logging_start`](Self::dma_logging_start).
    ///
    /// # Errors
    /// The connection fails.
    pub fn logs_dma(&mut self) -> Result<bool, ClientError> {
        let number = feature::DMA_LOGGING_START;
        let asked = Feature { argsz: 0, feature: number, get: false, set: true, probe: true };
        absent(self.feature(asked, &[], 0)).map(|found| found.is_some())
    }

    /// Asks which states of a migration the device has (`VFIO_DEVICE_FEATURE_MIGRATION`). `None`:
    /// the device cannot be migrated.
    ///
    /// # Errors
    /// The connection fails.
    pub fn migration_flags(&mut self) -> Result<Option<MigrationFlags>, ClientError> {
        let found = self.get(feature::MIGRATION, &[], MigrationFlags::LEN);
        let Some(data) = absent(found)? else { return Ok(None) };
        MigrationFlags::parse(&data).map(Some).map_err(|e| self.malformed(e))
    }

    /// Asks for the state of the migration.
    ///
    /// # Errors
    /// See [`Client::device_info`].
    pub fn migration_state(&mut self) -> Result<MigrationState, ClientError> {
        let data = self.get(feature::MIG_DEVICE_STATE, &[], MigrationState::LEN)?;
        MigrationState::parse(&data).map_err(|e| self.malformed(e))
    }

    /// Takes the device to another state of the migration, by the way that
    /// [`migration::next`](crate::migration::next) describes.
    ///
    /// # Errors
    /// See [`Client::device_info`]. If the server refuses, the device may have gone a part of the
    /// way: ask for its [state](Self::migration_state).
    pub fn set_migration_state(&mut self, state: MigrationState) -> Result<(), ClientError> {
        self.set(feature::MIG_DEVICE_STATE, &state.data()).map(drop)
    }

    /// Reads the next bytes of the device's state, as many as one message has, in the state
    /// `PRE_COPY` or `STOP_COPY`. The second value says whether there may be more in this state: a
    /// reply with fewer bytes than one message has is the last one.
    ///
    /// # Errors
    /// See [`Client::device_info`].
    pub fn migration_read(&mut self) -> Result<(Vec<u8>, bool), ClientError> {
        const NAME: &str = "MIG_DATA_READ";
        let size = u32::try_from(self.negotiated.peer_transfer.min(MAX_TRANSFER));
        let size = size.map_err(|_| ClientError::TooMuch(NAME))?;
        self.ask(command::MIG_DATA_READ, &MigData::of(size).body(&[]), &[], |reply| {
            match MigData::parse_reply(&reply.body) {
                Ok((_, data)) if data.len() <= size as usize => {
                    // A server without data always ends the stream, however small a message is.
                    let more = !data.is_empty() && data.len() == size as usize;
                    Ok((data.to_vec(), more))
                }
                Ok(_) => Err(ClientError::Mismatch(reply.header, NAME)),
                Err(e) => Err(ClientError::Malformed(NAME, e)),
            }
        })
    }

    /// Writes the next bytes of a device's state, in the state `RESUMING`. It sends as many
    /// messages as are needed.
    ///
    /// # Errors
    /// See [`Client::device_info`].
    pub fn migration_write(&mut self, data: &[u8]) -> Result<(), ClientError> {
        const NAME: &str = "MIG_DATA_WRITE";
        for piece in data.chunks(self.negotiated.peer_transfer.clamp(1, MAX_TRANSFER)) {
            let size = u32::try_from(piece.len()).map_err(|_| ClientError::TooMuch(NAME))?;
            self.call(command::MIG_DATA_WRITE, &MigData::of(size).body(piece), &[])?;
        }
        Ok(())
    }

    /// Lets the server log the pages that the device writes within these ranges, or all pages if
    /// there are none. Returns the size of a page that the server has chosen.
    ///
    /// # Errors
    /// See [`Client::device_info`].
    pub fn dma_logging_start(
        &mut self,
        page_size: u64,
        ranges: &[DmaRange],
    ) -> Result<u64, ClientError> {
        let control = LoggingControl { page_size, ranges: ranges.to_vec() };
        let data = self.set(feature::DMA_LOGGING_START, &control.data())?;
        LoggingControl::parse(&data).map(|chosen| chosen.page_size).map_err(|e| self.malformed(e))
    }

    /// Ends the log of the pages that the device writes.
    ///
    /// # Errors
    /// See [`Client::device_info`].
    pub fn dma_logging_stop(&mut self) -> Result<(), ClientError> {
        self.set(feature::DMA_LOGGING_STOP, &[]).map(drop)
    }

    /// Asks which pages of `length` bytes from `iova` on the device has written since the log began
    /// or since their last report. Bit `n % 64` of word `n / 64` of the result stands for the page
    /// at `iova + n * page_size`. It sends as many messages as are needed.
    ///
    /// # Errors
    /// See [`Client::device_info`]. The caller then has to take all pages for written.
    pub fn dma_logging_report(
        &mut self,
        iova: u64,
        length: u64,
        page_size: u64,
    ) -> Result<Vec<u64>, ClientError> {
        const NAME: &str = "DEVICE_FEATURE";
        let whole = LoggingReport { iova, length, page_size };
        whole.words().ok_or(ClientError::TooMuch(NAME))?;
        // A piece has whole words. So has its reply, with the two fixed parts.
        let fixed = FEATURE_LEN + LoggingReport::LEN;
        let words =
            (self.negotiated.peer_transfer.min(MAX_TRANSFER) / 8).saturating_sub(fixed / 8).max(1);
        let piece = (words as u64).saturating_mul(64).saturating_mul(page_size);
        let mut bitmap = Vec::new();
        let mut at = 0;
        while at < length {
            let report =
                LoggingReport { iova: iova + at, length: piece.min(length - at), page_size };
            let words = report.words().unwrap_or(0);
            let bytes = usize::try_from(words * 8).map_err(|_| ClientError::TooMuch(NAME))?;
            let data = report.data(&[]);
            let reply = self.get(feature::DMA_LOGGING_REPORT, &data, data.len() + bytes)?;
            match LoggingReport::parse(&reply) {
                Ok((echo, found)) if echo == report && found.len() == bytes => {
                    let words = found.chunks_exact(8).filter_map(|word| word.first_chunk());
                    bitmap.extend(words.map(|word| u64::from_ne_bytes(*word)));
                }
                Ok((_, found)) => {
                    let short = Malformed::Short { need: bytes, have: found.len() };
                    return Err(self.malformed(short));
                }
                Err(e) => return Err(self.malformed(e)),
            }
            at = at.saturating_add(piece);
        }
        Ok(bitmap)
    }

    /// The data of a feature do not have their form.
    fn malformed(&mut self, error: Malformed) -> ClientError {
        self.broken(ClientError::Malformed("DEVICE_FEATURE", error))
    }

    /// Resets the device.
    ///
    /// # Errors
    /// See [`Client::device_info`].
    pub fn reset(&mut self) -> Result<(), ClientError> {
        self.call(command::DEVICE_RESET, &[], &[]).map(drop)
    }
}

/// A feature that the server does not have. The kernel's VFIO and this crate say ENOTTY,
/// libvfio-user says EINVAL, and servers without features ENOSYS or EOPNOTSUPP.
fn absent<R>(found: Result<R, ClientError>) -> Result<Option<R>, ClientError> {
    const ABSENT: [Errno; 4] = [Errno::NOTTY, Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP];
    match found {
        Ok(found) => Ok(Some(found)),
        Err(ClientError::Refused { errno, .. }) if ABSENT.contains(&errno) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The eventfds in a reply to `DEVICE_GET_REGION_IO_FDS`.
fn io_eventfds(reply: &Message, region: u32) -> Result<Vec<IoEventFd>, ClientError> {
    const NAME: &str = "DEVICE_GET_REGION_IO_FDS";
    let malformed = |e| ClientError::Malformed(NAME, e);
    let mismatch = || ClientError::Mismatch(reply.header, NAME);
    let head = Info::parse(&reply.body).map_err(malformed)?;
    let sub_regions = SubRegion::parse_all(&reply.body).map_err(malformed)?;
    if (head.index, head.flags) != (region, 0) || sub_regions.len() > MAX_IO_EVENTFDS {
        return Err(mismatch());
    }
    let mut found = Vec::new();
    for SubRegion { offset, size, fd_index, kind, flags, datamatch } in sub_regions {
        let fd = reply.fds.as_slice().get(fd_index as usize).ok_or_else(mismatch)?;
        if kind != 0 || flags & !DATAMATCH != 0 {
            continue;
        }
        // The close of anything else may wait for the server, and the caller closes what it gets.
        if !is_eventfd(fd).unwrap_or(false) {
            return Err(ClientError::NotEventfd(offset));
        }
        let fd = fd.try_clone().map_err(|_| Errno::MFILE)?;
        let datamatch = (flags & DATAMATCH != 0).then_some(datamatch);
        found.push(IoEventFd { fd, offset, size, datamatch });
    }
    Ok(found)
}

/// The socket, with reads that wait.
struct Patiently<'a> {
    socket: BorrowedFd<'a>,
    wait: &'a mut Wait,
}

impl Source for Patiently<'_> {
    fn recv(&mut self, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, Errno> {
        loop {
            let mut source = SocketSource::new(self.socket);
            match source.recv(buf, fds) {
                Err(Errno::AGAIN) => {}
                Ok(_) if source.lost_fds() => return Err(Errno::MFILE),
                other => return other,
            }
            if !self.wait.until(self.socket, PollFlags::IN)? {
                return Err(Errno::AGAIN);
            }
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
