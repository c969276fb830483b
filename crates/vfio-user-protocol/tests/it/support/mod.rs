// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A small device, and a client that sends any bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vfio_user_protocol::message::{DmaRange, LoggingReport, MigrationFlags};
use vfio_user_protocol::migration::{ArcFailure, MigrationArc};
use vfio_user_protocol::{
    DeviceInfo, Errno, IoEventFd, IrqAction, IrqInfo, Mapping, RegionInfo, Server, Target,
};

/// How long a test waits for something that must happen.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Region 0: 4 KiB of memory, of which the last 256 bytes refuse every access. Region 1: write
/// only. Region 6: read only. Region 7: 256 bytes of configuration space. The others do not exist.
pub struct Device {
    pub memory: Vec<u8>,
    pub config: Vec<u8>,
    /// By address: the size, and the offset in the file.
    pub maps: BTreeMap<u64, (u64, Option<u64>)>,
    pub irqs: BTreeMap<(u32, u32), OwnedFd>,
    /// Triggers, masks and unmasks by message, in order: the kind, the index, the interrupts.
    pub actions: Vec<(char, u32, Vec<u32>)>,
    pub doorbells: Vec<OwnedFd>,
    /// Doorbells that were duplicated so far.
    pub duplicated: usize,
    pub connected: bool,
    pub max_dma_maps: u32,
    pub resets: u32,
    pub clients: u32,
    pub writes: u32,
    /// Writes to the first byte of region 1, which are long.
    pub long_writes: u32,
    /// `None`: the device has no state, and does not log what it writes.
    pub movable: Option<Movable>,
}

/// What a device has that can be migrated.
#[derive(Default)]
pub struct Movable {
    /// The arcs that it has gone along.
    pub arcs: Vec<MigrationArc>,
    /// The arc that it refuses.
    pub refused: Option<(MigrationArc, ArcFailure)>,
    /// The rest of the stream that the client reads.
    pub stream: Vec<u8>,
    /// What the client has written. The device takes 4 MiB.
    pub written: Vec<u8>,
    /// While the log is on.
    pub log: Option<(u64, Vec<DmaRange>)>,
    /// The numbers of written pages of 4 KiB.
    pub dirty: BTreeSet<u64>,
}

impl Device {
    pub fn new() -> Self {
        Self {
            memory: vec![0; 4096],
            config: vec![0x5a; 256],
            maps: BTreeMap::new(),
            irqs: BTreeMap::new(),
            actions: Vec::new(),
            duplicated: 0,
            doorbells: (0..3)
                .map(|_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
                .collect(),
            connected: false,
            max_dma_maps: 512,
            resets: 0,
            clients: 0,
            writes: 0,
            long_writes: 0,
            movable: None,
        }
    }
}

impl Target for Device {
    fn device_info(&self) -> DeviceInfo {
        DeviceInfo::PCI
    }

    fn region_info(&self, region: u32) -> RegionInfo {
        match region {
            0 => RegionInfo::read_write(4096),
            1 => RegionInfo::new(64, false, true),
            6 => RegionInfo::new(512, true, false),
            7 => RegionInfo::read_write(256),
            _ => RegionInfo::default(),
        }
    }

    fn irq_info(&self, index: u32) -> IrqInfo {
        match index {
            0 => IrqInfo::intx(),
            1 => IrqInfo::messages(4),
            2 => IrqInfo::messages(32),
            _ => IrqInfo::default(),
        }
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let at = usize::try_from(offset).unwrap();
        match region {
            0 if at + data.len() > 3840 => return Err(Errno::IO),
            0 => data.copy_from_slice(&self.memory[at..at + data.len()]),
            6 => data.fill(0xab),
            7 => data.copy_from_slice(&self.config[at..at + data.len()]),
            _ => panic!("read of region {region}, which cannot be read"),
        }
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let at = usize::try_from(offset).unwrap();
        self.writes += 1;
        self.long_writes += u32::from(self.is_long_write(region, offset, data));
        match region {
            0 if at + data.len() > 3840 => return Err(Errno::IO),
            0 => self.memory[at..at + data.len()].copy_from_slice(data),
            1 => {}
            7 => self.config[at..at + data.len()].copy_from_slice(data),
            _ => panic!("write to region {region}, which cannot be written"),
        }
        Ok(())
    }

    fn is_long_write(&self, region: u32, offset: u64, _: &[u8]) -> bool {
        (region, offset) == (1, 0)
    }

    fn set_irqs(&mut self, index: u32, action: IrqAction) -> Result<(), Errno> {
        assert!(self.irq_info(index).count > 0, "index {index} has no interrupts");
        match action {
            IrqAction::DisableAll => self.irqs.retain(|&(i, _), _| i != index),
            IrqAction::Connect { start, eventfds } => {
                for (number, fd) in (start..).zip(eventfds) {
                    match fd {
                        Some(fd) => drop(self.irqs.insert((index, number), fd)),
                        None => drop(self.irqs.remove(&(index, number))),
                    }
                }
            }
            IrqAction::ConnectMask { .. } | IrqAction::ConnectUnmask { .. } => {
                return Err(Errno::OPNOTSUPP);
            }
            IrqAction::Trigger(which) => {
                for number in &which {
                    if let Some(fd) = self.irqs.get(&(index, *number)) {
                        rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
                    }
                }
                self.actions.push(('t', index, which));
            }
            IrqAction::Mask(which) => self.actions.push(('m', index, which)),
            IrqAction::Unmask(which) => self.actions.push(('u', index, which)),
            other => panic!("{other:?}"),
        }
        Ok(())
    }

    fn max_dma_maps(&self) -> u32 {
        self.max_dma_maps
    }

    fn dma_map(&mut self, mapping: Mapping<'_>) -> Result<(), Errno> {
        let reachable = mapping.readable || mapping.writable;
        if let Some((fd, _)) = mapping.memory.as_ref().filter(|_| reachable) {
            // A real device, which has to map the file, fails too.
            if rustix::fs::fstat(fd)?.st_size == 0 {
                return Err(Errno::NODEV);
            }
        }
        let offset = mapping.memory.map(|(_, offset)| offset);
        let before = self.maps.insert(mapping.address, (mapping.size, offset));
        assert!(before.is_none(), "mapped twice");
        Ok(())
    }

    fn dma_unmap(&mut self, address: u64, size: u64) {
        let before = self.maps.len();
        self.maps.retain(|&at, _| !(address..address + size).contains(&at));
        assert!(self.maps.len() < before, "unmapped what was not mapped");
    }

    fn dma_unmap_all(&mut self) {
        self.maps.clear();
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.resets += 1;
        self.memory.fill(0);
        Ok(())
    }

    fn io_eventfd_count(&mut self, region: u32) -> usize {
        if region == 0 { self.doorbells.len() } else { 0 }
    }

    fn io_eventfds(&mut self, region: u32, most: usize) -> Vec<IoEventFd> {
        let doorbells = if region == 0 { &self.doorbells[..] } else { &[] };
        let entry = |(fd, number): (&OwnedFd, u64)| {
            let mut eventfd = IoEventFd::new(fd.try_clone().unwrap(), 2048 + 4 * number);
            eventfd.size = 4;
            eventfd.datamatch = (number > 0).then_some(number);
            eventfd
        };
        assert!(most <= doorbells.len());
        self.duplicated += most;
        doorbells.iter().zip(0..).take(most).map(entry).collect()
    }

    fn migration(&mut self) -> Option<MigrationFlags> {
        // The server leaves out what vfio-user does not use.
        let flags = MigrationFlags { stop_copy: true, p2p: true, pre_copy: true };
        self.movable.as_ref().map(|_| flags)
    }

    fn migrate(&mut self, arc: MigrationArc) -> Result<(), ArcFailure> {
        let movable = self.movable.as_mut().expect("asked although there is no state");
        match movable.refused {
            Some((refused, failure)) if refused == arc => Err(failure),
            _ => {
                movable.arcs.push(arc);
                Ok(())
            }
        }
    }

    fn migration_read(&mut self, data: &mut [u8]) -> Result<usize, Errno> {
        let stream = &mut self.movable.as_mut().unwrap().stream;
        let count = stream.len().min(data.len());
        data[..count].copy_from_slice(&stream[..count]);
        stream.drain(..count);
        Ok(count)
    }

    fn migration_write(&mut self, data: &[u8]) -> Result<(), Errno> {
        let written = &mut self.movable.as_mut().unwrap().written;
        if written.len() + data.len() > 4 << 20 {
            return Err(Errno::FBIG);
        }
        written.extend_from_slice(data);
        Ok(())
    }

    fn logs_dma(&self) -> bool {
        self.movable.is_some()
    }

    fn dma_logging_start(&mut self, page_size: u64, ranges: &[DmaRange]) -> Result<u64, Errno> {
        let log = &mut self.movable.as_mut().unwrap().log;
        assert!(log.is_none(), "the log begins twice");
        assert!(page_size.is_power_of_two());
        assert!(ranges.iter().all(|r| r.length > 0 && r.iova.checked_add(r.length).is_some()));
        let page_size = page_size.max(4096);
        *log = Some((page_size, ranges.to_vec()));
        Ok(page_size)
    }

    fn dma_logging_stop(&mut self) {
        assert!(self.movable.as_mut().unwrap().log.take().is_some(), "no log to end");
    }

    fn dma_logging_report(
        &mut self,
        report: LoggingReport,
        bitmap: &mut [u64],
    ) -> Result<(), Errno> {
        let movable = self.movable.as_mut().unwrap();
        assert!(movable.log.is_some());
        assert_eq!(report.words(), Some(bitmap.len() as u64));
        assert!(bitmap.iter().all(|word| *word == 0));
        let LoggingReport { iova, length, page_size } = report;
        movable.dirty.retain(|page| {
            let at = page * 4096;
            let inside = (iova..iova + length).contains(&at);
            if inside {
                let bit = usize::try_from((at - iova) / page_size).unwrap();
                bitmap[bit / 64] |= 1 << (bit % 64);
            }
            !inside
        });
        Ok(())
    }

    fn connected(&mut self, _: BorrowedFd<'_>) {
        assert!(!self.connected, "connected twice");
        self.connected = true;
        self.clients += 1;
    }

    fn disconnected(&mut self) {
        assert!(std::mem::take(&mut self.connected), "disconnected without a connection");
        self.maps.clear();
        self.irqs.clear();
    }
}

/// A folder with the socket of a [`Device`].
pub struct Bench {
    _folder: tempfile::TempDir,
    pub server: Server<Device>,
}

impl Bench {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::bind(folder.path().join("s"), "test", Device::new()).unwrap();
        Self { _folder: folder, server }
    }

    pub fn path(&self) -> PathBuf {
        self.server.path().clone()
    }

    /// Runs the server while `client` runs in a thread of its own.
    pub fn with<R: Send>(&mut self, client: impl FnOnce(&Path) -> R + Send) -> R {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let path = self.path();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let result =
                    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| client(&path)));
                rustix::io::write(&stop, &1u64.to_ne_bytes()).unwrap();
                result
            });
            self.server.run_until(&stop).unwrap();
            thread.join().unwrap().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs the server until `done` returns true. Its own descriptor and `also` wake it.
    pub fn until(
        &mut self,
        also: Option<BorrowedFd<'_>>,
        mut done: impl FnMut(&mut Server<Device>) -> bool,
    ) {
        let start = Instant::now();
        while !done(&mut self.server) {
            assert!(start.elapsed() < TIMEOUT, "what was waited for does not happen");
            let mut fds = vec![PollFd::new(&self.server, PollFlags::IN)];
            fds.extend(also.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            let longest = Duration::from_secs(20);
            let due = self.server.deadline().map(|at| at.saturating_duration_since(Instant::now()));
            let wait = due.map_or(longest, |due| due.min(longest) + Duration::from_millis(1));
            poll(&mut fds, Some(&Timespec::try_from(wait).unwrap())).unwrap();
            drop(fds);
            self.server.ready(Instant::now());
        }
    }

    /// Runs the server until the last client has gone.
    pub fn until_gone(&mut self) {
        self.until(None, |server| {
            server.ready(Instant::now());
            !server.has_client()
        });
    }
}

/// Runs the test `name` of this program again in a process of its own, and checks that it passed.
/// `test` runs there. This is for tests of things that belong to a process, because other tests run
/// in other threads of this process.
pub fn alone(name: &str, test: impl FnOnce()) {
    const ALONE: &str = "VFIO_USER_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return test();
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{errors}");
}

/// Descriptors that this process has open.
pub fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Waits until this process has `count` descriptors open. What a peer has sent is closed by a
/// thread of its own.
pub fn until_open_fds(count: usize, what: &str) {
    let start = Instant::now();
    while open_fds() != count {
        let open = open_fds();
        assert!(start.elapsed() < TIMEOUT, "{what}: {open} descriptors, {count} before: they leak");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What a raw client receives.
#[derive(Debug, PartialEq, Eq)]
pub enum Seen {
    /// A reply: id, command, errno of an error, body.
    Reply(u16, u16, Option<u32>, Vec<u8>),
    /// The end of the connection.
    Closed,
}

/// A client that sends any bytes.
pub struct Raw {
    pub stream: UnixStream,
    input: Vec<u8>,
}

pub const NO_REPLY: u32 = 0x10;
pub const REPLY: u32 = 1;

/// A message with any header.
pub fn raw(id: u16, command: u16, size: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&id.to_ne_bytes());
    bytes.extend_from_slice(&command.to_ne_bytes());
    bytes.extend_from_slice(&size.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&0u32.to_ne_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// A message with a valid header.
pub fn framed(id: u16, command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
    raw(id, command, u32::try_from(16 + body.len()).unwrap(), flags, body)
}

/// The bytes of integers of different sizes.
#[macro_export]
macro_rules! bytes {
    ($($value:expr),* $(,)?) => {{
        #[allow(unused_mut)]
        let mut bytes: Vec<u8> = Vec::new();
        $(bytes.extend_from_slice(&$value.to_ne_bytes());)*
        bytes
    }};
}

pub fn version() -> Vec<u8> {
    let mut body = bytes![0u16, 0u16];
    body.extend_from_slice(
        b"{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\
          \"max_dma_maps\":65535,\"write_multiple\":true}}\0",
    );
    body
}

/// Sends bytes and descriptors by one call.
pub fn send_with(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(fds.len()))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    let sent =
        sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    assert_eq!(sent, bytes.len());
}

impl Raw {
    pub fn connect(bench: &Bench) -> Self {
        Self { stream: UnixStream::connect(bench.path()).unwrap(), input: Vec::new() }
    }

    /// Connects and negotiates.
    pub fn negotiated(bench: &mut Bench) -> Self {
        let mut raw = Self::connect(bench);
        raw.send(&framed(900, 1, 0, &version()));
        match raw.see(bench) {
            Seen::Reply(900, 1, None, _) => raw,
            other => panic!("no agreement: {other:?}"),
        }
    }

    /// Sends bytes. It ignores an error, because the server may have closed the connection.
    pub fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    pub fn send_with(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        send_with(&self.stream, bytes, fds);
    }

    /// Runs the server until it has answered this client or closed its connection.
    pub fn see(&mut self, bench: &mut Bench) -> Seen {
        self.stream.set_nonblocking(true).unwrap();
        let mut seen = None;
        let fd = self.stream.try_clone().unwrap();
        bench.until(Some(fd.as_fd()), |_| {
            seen = self.parse();
            seen.is_some()
        });
        seen.unwrap()
    }

    fn parse(&mut self) -> Option<Seen> {
        loop {
            if let Some(header) = self.input.first_chunk::<16>() {
                let header = vfio_user_protocol::message::Header::parse(header).unwrap();
                if self.input.len() >= header.size as usize {
                    let message: Vec<u8> = self.input.drain(..header.size as usize).collect();
                    let vfio_user_protocol::message::Kind::Reply { error } = header.kind else {
                        panic!("a command of the server: {header}");
                    };
                    return Some(Seen::Reply(
                        header.id,
                        header.command,
                        error,
                        message[16..].to_vec(),
                    ));
                }
            }
            let mut chunk = [0; 65536];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Some(Seen::Closed),
                Ok(n) => self.input.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return None,
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return Some(Seen::Closed),
                Err(e) => panic!("{e}"),
            }
        }
    }
}
