// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A capture file in the classic pcap format (microseconds, Ethernet).
//!
//! Tasks put records into a bounded buffer, and a thread writes them to the file. If the buffer is
//! full, the task counts the record and drops it. So a slow disk loses records, never frames.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use vbus_core::{Counter, lock};

use crate::frame::Packet;

const MAGIC: u32 = 0xa1b2_c3d4;
const VERSION: [u16; 2] = [2, 4];
const LINKTYPE_ETHERNET: u32 = 1;
/// The most bytes that wait for the disk.
const BUFFER_MAX: usize = 4 << 20;

#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    end: bool,
}

/// The buffer between the tasks, which put records in, and the thread, which takes them out.
#[derive(Default)]
struct Records {
    buffer: Mutex<Buffer>,
    news: Condvar,
}

/// A capture file that is being written.
pub struct PcapFile {
    waiting: Arc<Records>,
    snap: usize,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Frames recorded.
    pub records: Counter,
    /// Frames not recorded.
    pub left_out: Counter,
}

impl PcapFile {
    /// Writes the header to `file`, which is empty. The file gets the first `snap` bytes of each
    /// frame. `path` names the file in the log.
    pub fn new(mut file: File, path: PathBuf, snap: u32) -> io::Result<PcapFile> {
        let mut head = Vec::new();
        head.extend_from_slice(&MAGIC.to_le_bytes());
        head.extend(VERSION.into_iter().flat_map(u16::to_le_bytes));
        head.extend_from_slice(&[0; 8]); // Time zone and accuracy: never used.
        head.extend([snap, LINKTYPE_ETHERNET].into_iter().flat_map(u32::to_le_bytes));
        file.write_all(&head)?;
        let waiting = Arc::new(Records::default());
        let theirs = waiting.clone();
        let thread = std::thread::Builder::new()
            .name("vbus-pcap".into())
            .stack_size(128 << 10)
            .spawn(move || {
                if let Err(error) = theirs.write_out(&mut file) {
                    tracing::error!(path = %path.display(), %error, "the capture ends");
                }
            })?;
        let snap = usize::try_from(snap).unwrap_or(usize::MAX);
        Ok(PcapFile {
            waiting,
            snap,
            thread: Mutex::new(Some(thread)),
            records: Counter::default(),
            left_out: Counter::default(),
        })
    }

    /// Records a frame.
    pub fn record(&self, packet: &Packet<'_>) {
        let len = packet.bytes();
        let kept = len.min(self.snap);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // The format has 32 bits for seconds, which last until 2106.
        let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        let mut buffer = lock(&self.waiting.buffer);
        if buffer.end || buffer.bytes.len() + kept + 16 > BUFFER_MAX {
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
}

impl Records {
    fn write_out(&self, file: &mut File) -> io::Result<()> {
        let mut out = Vec::new();
        loop {
            let mut buffer = lock(&self.buffer);
            while buffer.bytes.is_empty() {
                if buffer.end {
                    return Ok(());
                }
                buffer = self.news.wait(buffer).unwrap_or_else(|e| e.into_inner());
            }
            std::mem::swap(&mut buffer.bytes, &mut out);
            drop(buffer);
            if let Err(error) = file.write_all(&out) {
                lock(&self.buffer).end = true;
                return Err(error);
            }
            out.clear();
        }
    }
}

impl PcapFile {
    /// Writes out the waiting records. The file is complete when this returns. Later records are
    /// ignored.
    pub fn close(&self) {
        lock(&self.waiting.buffer).end = true;
        self.waiting.news.notify_one();
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join(); // If the thread panicked, the file cannot be completed.
        }
    }
}

impl Drop for PcapFile {
    fn drop(&mut self) {
        self.close();
    }
}
