// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames without an end to a NIC, whatever its guest does: the test holds the other end of the
//! NIC's stream.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::bus::Bus;
use crate::guest::Guest;

/// The bytes of a frame.
const FRAME: usize = 1514;

/// How long the NIC may take to receive what a test waits for.
const LIMIT: Duration = Duration::from_secs(120);

/// How long the flood waits before it connects again.
const PAUSE: Duration = Duration::from_millis(10);

/// A flood of broadcasts. A NIC that closes also closes its stream; the flood connects again as
/// soon as it can. Dropping it ends it.
pub struct Flood {
    ended: Arc<AtomicBool>,
    /// The connection that the thread writes to.
    peer: Arc<Mutex<Option<UnixStream>>>,
    thread: Option<JoinHandle<()>>,
}

impl Flood {
    /// Floods the stream at `path`.
    ///
    /// # Errors
    /// Nothing listens there.
    pub fn start(path: &Path) -> Result<Self> {
        let first = UnixStream::connect(path)
            .with_context(|| format!("cannot connect to the stream {}", path.display()))?;
        // Each frame has its length before it. No byte of a frame is zero, and no protocol takes
        // it.
        let mut frame = vec![0xa5; 4 + FRAME];
        frame[..4].copy_from_slice(&u32::try_from(FRAME)?.to_be_bytes());
        frame[4..10].fill(0xff);
        frame[10..16].copy_from_slice(&[2, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5]);
        frame[16..18].copy_from_slice(&[0x88, 0xb5]);
        let frames = frame.repeat(16);
        let (ended, peer) =
            (Arc::<AtomicBool>::default(), Arc::<Mutex<Option<UnixStream>>>::default());
        let (told, shared, path) = (Arc::clone(&ended), Arc::clone(&peer), path.to_owned());
        let thread = std::thread::spawn(move || {
            let mut next = Some(first);
            while !told.load(Ordering::Acquire) {
                let connected = next.take().or_else(|| UnixStream::connect(&path).ok());
                if let Some(peer) = &connected {
                    *lock(&shared) = peer.try_clone().ok();
                }
                // Whoever ends the flood sees this connection, or has said so before.
                match connected {
                    _ if told.load(Ordering::Acquire) => {}
                    Some(mut writer) => while writer.write_all(&frames).is_ok() {},
                    None => std::thread::sleep(PAUSE),
                }
            }
        });
        Ok(Self { ended, peer, thread: Some(thread) })
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        // This ends a write that waits. It fails only if the other end has closed the connection.
        if let Some(peer) = &*lock(&self.peer) {
            let _ = peer.shutdown(Shutdown::Both);
        }
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Checks, in a guest without a driver of the NIC, that no frame comes into memory: it watches so
/// many MiB of it for so many seconds.
///
/// # Errors
/// Memory has changed, or the NIC has received a frame.
pub fn silence(guest: &Guest, bus: &Bus, nic: &str, (mib, seconds): (u32, u32)) -> Result<()> {
    let before = bus.received_frames(nic)?;
    let watch = format!("guest-agent watch {mib} {seconds}");
    guest.ok(&watch).context("memory of the new kernel")?;
    let now = bus.received_frames(nic)?;
    ensure!(now == before, "{} frames came while no driver had {nic}", now - before);
    Ok(())
}

/// Waits until the NIC of a guest has received `frames` more frames.
///
/// # Errors
/// It does not.
pub fn wait(guest: &Guest, bus: &Bus, nic: &str, frames: u64) -> Result<()> {
    let limit = guest.at_most(LIMIT);
    let (before, began) = (bus.received_frames(nic)?, Instant::now());
    loop {
        let now = bus.received_frames(nic)?;
        if now >= before + frames {
            return Ok(());
        }
        ensure!(
            began.elapsed() < limit,
            "{nic} has received {} frames of {frames} within {} s",
            now - before,
            limit.as_secs()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}
