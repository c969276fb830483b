// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client's messages to the vfio-user server: any bytes, and bytes in the form of messages, with
//! descriptors.
//!
//! The device behind the server only checks: it panics if it gets a request that the server must
//! refuse. Half of the inputs go to receiver and session alone, the others through a socket to a
//! complete server.
#![no_main]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vbus_fuzz::OpenFiles;
use vfio_user_protocol::message::{
    DmaRange, HEADER_LEN, Header, Kind, LoggingReport, MigrationFlags, MigrationState,
};
use vfio_user_protocol::migration::{ArcFailure, MAX_LOGGING_RANGES, MigrationArc};
use vfio_user_protocol::session::{Answer, Session};
use vfio_user_protocol::socket::{Received, Receiver, Source};
use vfio_user_protocol::{
    DeviceInfo, Errno, IoEventFd, IrqAction, IrqInfo, Mapping, RegionInfo, Server, Target,
};

const REGION: u64 = 4096;
const IRQS: u32 = 20;

#[derive(Default)]
struct Device {
    maps: BTreeMap<u64, u64>,
    irqs: Vec<Option<OwnedFd>>,
    connected: bool,
    state: MigrationState,
    written: usize,
    logs: bool,
}

impl Device {
    /// Goes from one of these states to another, or panics.
    fn go(&mut self, from: MigrationState, to: MigrationState) {
        assert_eq!(self.state, from);
        self.state = to;
    }

    fn check(&self, region: u32, offset: u64, len: usize) {
        assert!(
            self.connected
                && (region == 0 || region == 7)
                && len > 0
                && offset + len as u64 <= REGION
        );
    }
}

impl Target for Device {
    fn device_info(&self) -> DeviceInfo {
        DeviceInfo::PCI
    }

    fn region_info(&self, region: u32) -> RegionInfo {
        assert!(region < 9);
        match region {
            0 | 7 => RegionInfo::read_write(REGION),
            _ => RegionInfo::default(),
        }
    }

    fn irq_info(&self, index: u32) -> IrqInfo {
        assert!(index < 5);
        let mut info = IrqInfo::intx();
        info.count = if index == 2 { IRQS } else { 1 };
        info
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.check(region, offset, data.len());
        data.fill(0x11);
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.check(region, offset, data.len());
        if offset == 16 { Err(Errno::IO) } else { Ok(()) }
    }

    fn set_irqs(&mut self, index: u32, action: IrqAction) -> Result<(), Errno> {
        let count = self.irq_info(index).count;
        match action {
            IrqAction::DisableAll => self.irqs.clear(),
            IrqAction::Connect { start, eventfds }
            | IrqAction::ConnectMask { start, eventfds }
            | IrqAction::ConnectUnmask { start, eventfds } => {
                assert!(!eventfds.is_empty() && start as usize + eventfds.len() <= count as usize);
                self.irqs = eventfds;
            }
            IrqAction::Trigger(which) | IrqAction::Mask(which) | IrqAction::Unmask(which) => {
                assert!(which.iter().all(|&n| n < count));
            }
            other => panic!("{other:?}"),
        }
        Ok(())
    }

    fn dma_map(&mut self, mapping: Mapping<'_>) -> Result<(), Errno> {
        let Mapping { address, size, memory, .. } = mapping;
        assert!(size > 0 && address % 4096 == 0 && size % 4096 == 0);
        let end = address.checked_add(size).expect("an end");
        assert!(memory.is_none_or(|(_, offset)| offset.checked_add(size).is_some()));
        assert!(
            self.maps.range(..end).next_back().is_none_or(|(start, len)| start + len <= address)
        );
        self.maps.insert(address, size);
        assert!(self.maps.len() <= 65535);
        Ok(())
    }

    fn dma_unmap(&mut self, address: u64, size: u64) {
        let end = address + size;
        let inside: Vec<_> = self.maps.range(address..end).map(|(at, len)| (*at, *len)).collect();
        assert!(!inside.is_empty());
        for (at, len) in inside {
            assert!(at + len <= end);
            self.maps.remove(&at);
        }
    }

    fn dma_unmap_all(&mut self) {
        self.maps.clear();
    }

    fn reset(&mut self) -> Result<(), Errno> {
        (self.state, self.written) = (MigrationState::Running, 0);
        Ok(())
    }

    fn migration(&mut self) -> Option<MigrationFlags> {
        Some(MigrationFlags { stop_copy: true, p2p: false, pre_copy: true })
    }

    fn migrate(&mut self, arc: MigrationArc) -> Result<(), ArcFailure> {
        use MigrationState::{PreCopy, Resuming, Running, Stop, StopCopy};
        match arc {
            MigrationArc::Stop => self.go(Running, Stop),
            MigrationArc::Start => self.go(Stop, Running),
            MigrationArc::BeginPreCopy => self.go(Running, PreCopy),
            MigrationArc::EndPreCopy => self.go(PreCopy, Running),
            MigrationArc::StopInPreCopy => self.go(PreCopy, StopCopy),
            MigrationArc::BeginSaving => self.go(Stop, StopCopy),
            MigrationArc::EndSaving => self.go(StopCopy, Stop),
            MigrationArc::BeginRestoring => self.go(Stop, Resuming),
            MigrationArc::EndRestoring => {
                if std::mem::take(&mut self.written) % 3 == 1 {
                    self.go(Resuming, MigrationState::Error);
                    return Err(ArcFailure::Failed(Errno::IO));
                }
                self.go(Resuming, Stop)
            }
        }
        Ok(())
    }

    fn migration_read(&mut self, data: &mut [u8]) -> Result<usize, Errno> {
        assert!(matches!(self.state, MigrationState::PreCopy | MigrationState::StopCopy));
        Ok(data.len() / 2)
    }

    fn migration_write(&mut self, data: &[u8]) -> Result<(), Errno> {
        assert_eq!(self.state, MigrationState::Resuming);
        self.written += data.len();
        Ok(())
    }

    fn logs_dma(&self) -> bool {
        true
    }

    fn dma_logging_start(&mut self, page_size: u64, ranges: &[DmaRange]) -> Result<u64, Errno> {
        assert!(!self.logs && page_size.is_power_of_two() && ranges.len() <= MAX_LOGGING_RANGES);
        for (i, a) in ranges.iter().enumerate() {
            let end = a.iova.checked_add(a.length).expect("an end");
            assert!(a.length > 0);
            assert!(ranges[..i].iter().all(|b| b.iova >= end || b.iova + b.length <= a.iova));
        }
        self.logs = true;
        Ok(page_size)
    }

    fn dma_logging_stop(&mut self) {
        assert!(self.logs);
        self.logs = false;
    }

    fn dma_logging_report(
        &mut self,
        report: LoggingReport,
        bitmap: &mut [u64],
    ) -> Result<(), Errno> {
        assert!(self.logs && report.words() == Some(bitmap.len() as u64));
        assert!(bitmap.len() <= 1 << 17);
        bitmap.fill(1);
        Ok(())
    }

    fn io_eventfd_count(&mut self, region: u32) -> usize {
        if region == 0 { 3 } else { 0 }
    }

    fn io_eventfds(&mut self, region: u32, most: usize) -> Vec<IoEventFd> {
        let fds = if region == 0 { descriptors(most) } else { Vec::new() };
        fds.into_iter().map(|fd| IoEventFd::new(fd, 0)).collect()
    }

    fn connected(&mut self, _: BorrowedFd<'_>) {
        assert!(!self.connected);
        self.connected = true;
    }

    fn disconnected(&mut self) {
        assert!(self.connected);
        *self = Self::default();
    }
}

fn descriptors(count: usize) -> Vec<OwnedFd> {
    (0..count)
        .map(|_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd"))
        .collect()
}

/// A piece of the stream, and the number of descriptors with its first byte.
type Piece = (Vec<u8>, usize);

/// `form` 0: the input is the stream. Otherwise it is a list of messages (command, flags and number
/// of descriptors, length, body), so that the fuzzer need not guess the sixteen bytes of each
/// header.
fn pieces(form: u8, mut input: &[u8]) -> Vec<Piece> {
    if form == 0 {
        return input.chunks(50).map(|bytes| (bytes.to_vec(), 0)).collect();
    }
    const VERSION: &[u8] =
        b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":9,\"write_multiple\":true}}\0";
    let mut pieces = vec![(message(1, 0, VERSION), 0)];
    while let Some((&[command, flags, len], rest)) = input.split_first_chunk::<3>() {
        let (body, rest) = rest.split_at(rest.len().min(usize::from(len)));
        input = rest;
        let kind = u32::from(flags & 1) | if flags & 2 != 0 { 0x10 } else { 0 };
        let fds = if flags & 4 != 0 { usize::from(flags >> 3) % 20 } else { 0 };
        pieces.push((message(u16::from(command), kind, body), fds));
    }
    pieces
}

fn message(command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(HEADER_LEN + body.len()).expect("short");
    let fields = [
        &[0; 2],
        &command.to_ne_bytes(),
        &size.to_ne_bytes()[..],
        &flags.to_ne_bytes(),
        &[0; 4],
        body,
    ];
    fields.concat()
}

/// A source that returns at most one piece at a time.
struct Stream<'a> {
    pieces: std::slice::Iter<'a, Piece>,
    now: &'a [u8],
    fds: usize,
}

impl Source for Stream<'_> {
    fn recv(&mut self, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, Errno> {
        if self.now.is_empty() {
            let Some((bytes, fds)) = self.pieces.next() else { return Ok(0) };
            (self.now, self.fds) = (bytes, *fds);
            return Err(Errno::AGAIN);
        }
        let (taken, later) = self.now.split_at(buf.len().min(self.now.len()));
        buf[..taken.len()].copy_from_slice(taken);
        self.now = later;
        fds.extend(descriptors(std::mem::take(&mut self.fds)));
        Ok(taken.len())
    }
}

fn session_alone(pieces: &[Piece]) {
    let mut stream = Stream { pieces: pieces.iter(), now: &[], fds: 0 };
    let (mut receiver, mut session, mut device) =
        (Receiver::default(), Session::default(), Device::default());
    loop {
        let message = match receiver.next(&mut stream, session.max_message(), 16) {
            Ok(Received::Message(message)) => message,
            Ok(Received::Nothing) => continue,
            Ok(Received::End) | Err(_) => return,
        };
        let asked = message.header;
        let posted = asked.kind == Kind::Command { no_reply: true };
        match session.handle(&mut device, "fuzz", message) {
            Answer::Silence => assert!(posted),
            Answer::Reply(bytes, fds) => {
                let header =
                    Header::parse(bytes.first_chunk().expect("a header")).expect("a header");
                assert!(!posted && header.size as usize == bytes.len() && fds.len() <= 9);
                assert!((header.id, header.command) == (asked.id, asked.command));
            }
            Answer::Negotiated(_) => device.connected = true,
            Answer::End(reply, _) => {
                assert!(!(posted && reply.is_some()));
                return;
            }
            other => panic!("{other:?}"),
        }
    }
}

fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(20))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let _ = sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, flags);
}

fn whole_server(server: &mut Server<Device>, pieces: &[Piece]) {
    let mut stream = UnixStream::connect(server.path()).expect("a connection");
    stream.set_nonblocking(true).expect("non-blocking");
    for (bytes, fds) in pieces {
        let fds = descriptors(*fds);
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        send(&stream, bytes, &fds);
        while server.ready(Instant::now()).work > 0 {}
        // Ignore the server's answers, but read them to make room for more.
        while matches!(stream.read(&mut [0; 4096]), Ok(n) if n > 0) {}
    }
    drop(stream);
    for _ in 0..3 {
        server.ready(Instant::now());
    }
    assert!(!server.has_client());
    let device = server.target();
    assert!(!device.connected && device.maps.is_empty() && device.irqs.is_empty());
}

thread_local! {
    static SERVER: RefCell<Server<Device>> = {
        let path = std::env::temp_dir().join(format!("vfio-user-fuzz-{}.sock", std::process::id()));
        RefCell::new(Server::bind(path, "fuzz", Device::default()).expect("a server"))
    };
}

fuzz_target!(|input: &[u8]| {
    let Some((&shape, input)) = input.split_first() else { return };
    SERVER.with_borrow_mut(|server| {
        let pieces = pieces(shape & 1, input);
        let open = OpenFiles::count();
        if shape & 2 == 0 {
            session_alone(&pieces)
        } else {
            whole_server(server, &pieces)
        }
        open.check();
    });
});
