// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A capture file in the classic pcap format (microseconds, Ethernet).
//!
//! Tasks put records into a bounded buffer, and a thread writes them to the file. If the buffer is
//! full, the task counts the record and drops it. So a slow disk loses records, never frames.
//!
//! The file may be a FIFO. While nobody reads it, records are dropped and counted. A reader that
//! comes gets the head of the file first.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use vbus_core::{Counter, lock};

use crate::frame::Packet;
use crate::opener::Opener;

const MAGIC: u32 = 0xa1b2_c3d4;
const VERSION: [u16; 2] = [2, 4];
const LINKTYPE_ETHERNET: u32 = 1;
/// The most bytes that wait for the disk.
const BUFFER_MAX: usize = 4 << 20;
/// The time between two attempts to find a reader of a FIFO.
const RETRY: Duration = Duration::from_secs(1);
/// How long the end of a device waits for the disk, or for the reader of a FIFO.
const PATIENCE: Duration = Duration::from_secs(5);
const PATIENCE_FIFO: Duration = Duration::from_millis(200);

#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    /// No more records come, or none can be written.
    end: bool,
    /// The file is a FIFO that nobody reads. This is when to look for a reader again.
    unread_until: Option<Instant>,
    /// The thread shall look for a reader now.
    look: bool,
    /// Somebody has waited for the end. Nobody waits twice for a disk that stands still.
    closed: bool,
    /// The thread has ended.
    done: bool,
    /// The thread writes records that it has taken out.
    writing: bool,
    /// The file that the thread writes.
    file: Option<OwnedFd>,
}

/// The buffer between the tasks, which put records in, and the thread, which takes them out.
#[derive(Default)]
struct Records {
    buffer: Mutex<Buffer>,
    news: Condvar,
    /// Notified when the thread ends, and when it has written all records.
    done: Condvar,
}

/// A capture file that is being written.
pub struct PcapFile {
    waiting: Arc<Records>,
    path: PathBuf,
    snap: usize,
    /// Frames recorded.
    pub records: Counter,
    /// Frames not recorded.
    pub left_out: Counter,
}

/// The thread's side.
struct Writer {
    waiting: Arc<Records>,
    opener: Arc<dyn Opener>,
    path: PathBuf,
    head: Vec<u8>,
    /// `None`: a FIFO that nobody reads.
    out: Option<Out>,
}

/// An open file.
struct Out {
    file: File,
    is_fifo: bool,
}

impl PcapFile {
    /// Creates or overwrites the file at `path`, and writes its head. The file gets the first
    /// `snap` bytes of each frame. `begun`: another process has written a part of it, and this one
    /// goes on behind that.
    pub fn create(
        opener: Arc<dyn Opener>,
        path: PathBuf,
        snap: u32,
        begun: Option<OwnedFd>,
    ) -> io::Result<PcapFile> {
        let mut head = Vec::new();
        head.extend_from_slice(&MAGIC.to_le_bytes());
        head.extend(VERSION.into_iter().flat_map(u16::to_le_bytes));
        head.extend_from_slice(&[0; 8]); // Time zone and accuracy: never used.
        head.extend([snap, LINKTYPE_ETHERNET].into_iter().flat_map(u32::to_le_bytes));
        let waiting = Arc::new(Records::default());
        let mut writer = Writer { waiting: waiting.clone(), opener, path, head, out: None };
        let path = writer.path.clone();
        if let Some(fd) = begun {
            writer.take(File::from(fd))?;
        } else if !writer.open()? {
            tracing::info!(path = %path.display(), "nobody reads the capture's FIFO yet");
            lock(&waiting.buffer).unread_until = Some(Instant::now());
        }
        std::thread::Builder::new()
            .name("vbus-pcap".into())
            .stack_size(128 << 10)
            .spawn(move || writer.run())?;
        let snap = usize::try_from(snap).unwrap_or(usize::MAX);
        let (records, left_out) = (Counter::default(), Counter::default());
        Ok(PcapFile { waiting, path, snap, records, left_out })
    }

    /// Records a frame.
    pub fn record(&self, packet: &Packet<'_>) {
        let len = packet.bytes();
        let kept = len.min(self.snap);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // The format has 32 bits for seconds, which last until 2106.
        let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        let mut buffer = lock(&self.waiting.buffer);
        if buffer.unread_until.is_some_and(|at| at <= Instant::now()) {
            buffer.unread_until = Some(Instant::now() + RETRY);
            buffer.look = true;
            self.waiting.news.notify_one();
        }
        let is_full = buffer.bytes.len() + kept + 16 > BUFFER_MAX;
        if buffer.end || is_full || buffer.unread_until.is_some() {
            drop(buffer);
            self.left_out.one();
            return;
        }
        let first = buffer.bytes.is_empty();
        for word in [
            seconds,
            now.subsec_micros(),
            u32::try_from(kept).unwrap_or(0),
            u32::try_from(len).unwrap_or(0),
        ] {
            buffer.bytes.extend_from_slice(&word.to_le_bytes());
        }
        packet.append_to(&mut buffer.bytes, kept);
        drop(buffer);
        self.records.one();
        if first {
            self.waiting.news.notify_one();
        }
    }

    /// Waits until the waiting records are written, unless the disk or the reader stands still. The
    /// caller brings no more of them.
    pub fn settle(&self) {
        let waits =
            |buffer: &mut Buffer| !buffer.done && (buffer.writing || !buffer.bytes.is_empty());
        let waited =
            self.waiting.done.wait_timeout_while(lock(&self.waiting.buffer), PATIENCE_FIFO, waits);
        drop(waited);
    }

    /// A copy of the file's descriptor. `None`: it is a FIFO that nobody reads.
    pub fn descriptor(&self) -> io::Result<Option<OwnedFd>> {
        let buffer = lock(&self.waiting.buffer);
        buffer.file.as_ref().map(OwnedFd::try_clone).transpose()
    }

    /// Whether records go to the file. False: it is a FIFO that nobody reads, or writing failed.
    pub fn is_open(&self) -> bool {
        let buffer = lock(&self.waiting.buffer);
        !buffer.end && buffer.unread_until.is_none()
    }

    /// Writes out the waiting records. The file is complete when this returns, unless its disk or
    /// its reader stands still. Later records are ignored.
    pub fn close(&self) {
        self.close_within(PATIENCE);
    }

    fn close_within(&self, patience: Duration) {
        let until = Instant::now() + patience;
        let mut buffer = lock(&self.waiting.buffer);
        if std::mem::replace(&mut buffer.closed, true) {
            return;
        }
        buffer.end = true;
        self.waiting.news.notify_one();
        while !buffer.done {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let path = self.path.display();
                tracing::warn!(%path, "the disk stands still; the capture will be complete later");
                return;
            }
            let waited = self.waiting.done.wait_timeout(buffer, left);
            buffer = waited.unwrap_or_else(|e| e.into_inner()).0;
        }
    }
}

impl Drop for PcapFile {
    fn drop(&mut self) {
        self.close();
    }
}

impl Writer {
    fn run(mut self) {
        let ended = self.write_out();
        let mut buffer = lock(&self.waiting.buffer);
        let is_closed = std::mem::replace(&mut buffer.end, true);
        buffer.done = true;
        drop(buffer);
        self.waiting.done.notify_all();
        match ended {
            // The device has gone, and with it the interest in what the reader does.
            Err(error) if is_closed && error.kind() == ErrorKind::TimedOut => {}
            Err(error) => {
                tracing::error!(path = %self.path.display(), %error, "the capture ends");
            }
            Ok(()) => {}
        }
    }

    /// Opens the file and writes its head. Returns false if it is a FIFO that nobody reads.
    fn open(&mut self) -> io::Result<bool> {
        let file = match self.opener.create(&self.path) {
            Ok(file) => file,
            Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => {
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        let is_fifo = self.take(file)?;
        let Some(out) = &mut self.out else { return Ok(false) };
        if is_fifo {
            // It may be full of what another program has written. Then the head goes first later.
            lock(&self.waiting.buffer).bytes = self.head.clone();
        } else {
            out.file.write_all(&self.head)?;
        }
        Ok(true)
    }

    /// Writes to `file` from now on. Returns whether it is a FIFO.
    fn take(&mut self, file: File) -> io::Result<bool> {
        let is_fifo = FileType::from_raw_mode(fstat(&file)?.st_mode) == FileType::Fifo;
        lock(&self.waiting.buffer).file = Some(file.try_clone()?.into());
        self.out = Some(Out { file, is_fifo });
        Ok(is_fifo)
    }

    fn write_out(&mut self) -> io::Result<()> {
        let mut bytes = Vec::new();
        loop {
            let mut buffer = lock(&self.waiting.buffer);
            while buffer.bytes.is_empty() && !buffer.look {
                if buffer.end {
                    return Ok(());
                }
                buffer = self.waiting.news.wait(buffer).unwrap_or_else(|e| e.into_inner());
            }
            let look = std::mem::take(&mut buffer.look);
            std::mem::swap(&mut buffer.bytes, &mut bytes);
            buffer.writing = true;
            drop(buffer);
            if look && self.out.is_none() && self.open()? {
                lock(&self.waiting.buffer).unread_until = None;
            }
            let Some(out) = &mut self.out else {
                self.wrote();
                continue;
            };
            match out.write(&bytes, &self.waiting) {
                Err(error) if out.is_fifo && error.kind() == ErrorKind::BrokenPipe => {
                    self.out = None;
                    let mut buffer = lock(&self.waiting.buffer);
                    buffer.bytes.clear();
                    buffer.file = None;
                    buffer.unread_until = Some(Instant::now());
                    tracing::info!(path = %self.path.display(), "the capture's reader has gone");
                }
                written => written?,
            }
            bytes.clear();
            self.wrote();
        }
    }

    /// Tells those who wait that the records which were taken out are written.
    fn wrote(&self) {
        lock(&self.waiting.buffer).writing = false;
        self.waiting.done.notify_all();
    }
}

impl Out {
    /// Writes all bytes. The reader of a FIFO has little time once the capture ends.
    fn write(&mut self, mut bytes: &[u8], waiting: &Records) -> io::Result<()> {
        let mut ends_at = None;
        while !bytes.is_empty() {
            match self.file.write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => bytes = &bytes[n..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let now = Instant::now();
                    if lock(&waiting.buffer).end
                        && *ends_at.get_or_insert(now + PATIENCE_FIFO) <= now
                    {
                        return Err(ErrorKind::TimedOut.into());
                    }
                    let nap = Timespec::try_from(PATIENCE_FIFO / 4).unwrap_or_default();
                    let _ = poll(&mut [PollFd::new(&self.file, PollFlags::OUT)], Some(&nap));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::path::Path;
    use std::sync::mpsc::channel;

    use super::*;

    const BOUND: Duration = Duration::from_secs(60);

    /// Opens this file, which blocks as a disk does.
    struct Disk(OwnedFd);

    impl Opener for Disk {
        fn create(&self, _: &Path) -> io::Result<File> {
            Ok(self.0.try_clone()?.into())
        }

        fn listen(&self, _: &Path) -> io::Result<OwnedFd> {
            Err(ErrorKind::Unsupported.into())
        }

        fn remove(&self, _: &Path) {}

        fn connect(&self, _: &Path) -> io::Result<OwnedFd> {
            Err(ErrorKind::Unsupported.into())
        }

        fn tap(&self, _: &str, _: u16, _: u16) -> io::Result<(String, Vec<vbus_tap::Queue>)> {
            Err(ErrorKind::Unsupported.into())
        }

        fn vhost(&self, _: u16) -> io::Result<Vec<vbus_tap::Vhost>> {
            Err(ErrorKind::Unsupported.into())
        }
    }

    #[test]
    fn a_disk_that_stands_still_is_waited_for_once() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&ours, 4096).unwrap();
        let disk = Arc::new(Disk(ours.into()));
        let capture = PcapFile::create(disk, "capture".into(), u32::MAX, None).unwrap();
        let frame = [7; 1514];
        // More than the socket takes before somebody reads.
        for _ in 0..1000 {
            capture.record(&Packet::plain(&frame).unwrap());
        }
        let records = capture.records.get();
        assert_eq!((records, capture.left_out.get()), (1000, 0));
        capture.close_within(Duration::from_millis(1));
        assert!(!lock(&capture.waiting.buffer).done, "the disk stands still");
        // Nobody waits for it again, however patient. Dropping it does not either.
        let (told, hears) = channel();
        std::thread::spawn(move || {
            capture.close_within(BOUND * 60);
            drop(capture);
            told.send(()).unwrap();
        });
        hears.recv_timeout(BOUND).expect("the second one waits for the disk");
        // The capture becomes complete once the disk goes on.
        theirs.set_read_timeout(Some(BOUND)).unwrap();
        let mut written = Vec::new();
        (&theirs).take(24 + 1000 * (16 + 1514)).read_to_end(&mut written).unwrap();
        assert_eq!(written.len(), 24 + 1000 * (16 + 1514));
        assert_eq!(written[..4], MAGIC.to_le_bytes());
        assert_eq!(written[written.len() - 1514..], frame);
    }
}
