// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One queue pair: frames between the NIC's rings and a queue of the TAP interface.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vbus_driver::venet::{CHAIN_MAX, HEADER_BYTES, Rx, Tx};
use vbus_driver::{Acknowledger, Error, Hal, Memory, Pace, Rest};
use vbus_iovec::{IoVec, readv, writev};
use vbus_shm::signal::Armed;

use super::frames::FrameMemory;
use vbus_guest::Interrupt;

/// The most frames of one direction before the other direction has its turn.
const BUDGET: u32 = 64;
/// The number of frames after which the device is notified. It can begin while the queue reads the
/// next frames.
const POST_EACH: u32 = 16;

/// The bytes that the pace counts for each frame besides its own.
const FRAME_WEIGHT: usize = 512;

/// The counters of all queues, for people.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames sent to the device.
    pub sent: AtomicU64,
    /// Frames received from the device.
    pub received: AtomicU64,
    /// Received frames that the kernel did not take.
    pub refused: AtomicU64,
    /// Doorbells rung.
    pub doorbells: AtomicU64,
    /// Naps.
    pub naps: AtomicU64,
    /// Sleeps.
    pub sleeps: AtomicU64,
    /// Interrupts that woke a queue, directly or by a relay.
    pub interrupts: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}

/// What wakes a queue, besides frames of its interface.
pub enum Wake<H: Hal> {
    /// The function's interrupt. There is only this queue.
    Interrupt(Box<dyn Interrupt>, Acknowledger<H>),
    /// An eventfd. The thread that takes the interrupt for all queues writes it.
    Relay(OwnedFd),
}

/// A queue pair with its memory and its queue of the interface.
pub struct Queue<H: Hal> {
    /// The number of the queue pair.
    pub number: usize,
    /// The transmit ring.
    pub tx: Tx<H>,
    /// The memory of the frames that are being sent.
    pub frames: FrameMemory<H::Dma>,
    /// The receive ring.
    pub rx: Rx<H>,
    /// The memory of its buffers.
    pub buffers: H::Dma,
    /// The queue of the interface.
    pub tap: vbus_tap::Queue,
    /// What wakes the queue.
    pub wake: Wake<H>,
    /// Decides whether the queue polls, naps or sleeps.
    pub pace: Pace,
    /// The bytes carried, as [`Pace`] counts them.
    pub carried: u64,
    /// The Hal, for its clock.
    pub hal: H,
}

/// What the queues share with the thread that watches the NIC.
pub struct NicShared {
    /// True when the queues must end.
    pub stop: AtomicBool,
    /// How many queue pairs are in use, the first ones. The others touch their queue of the
    /// interface no more. Relaxed: a queue that uses an old value finds that its queue of the
    /// interface is disabled.
    pub used: AtomicUsize,
    /// Becomes readable, and stays readable, when the queues must end.
    pub stopped: OwnedFd,
    /// A queue writes this eventfd when an interrupt came that was not for its frames.
    pub look: OwnedFd,
    /// The counters of all queues.
    pub counters: Counters,
}

impl<H: Hal> Queue<H> {
    /// Gives all receive buffers to the device. Call it once, before [`run`](Self::run).
    pub fn fill(&mut self) -> Result<()> {
        for id in 0..u16::try_from(self.rx.space())? {
            self.rx.give(id)?;
        }
        self.rx.post();
        Ok(())
    }

    /// Moves frames until [`NicShared::stop`] is true or an error occurs.
    pub fn run(&mut self, shared: &NicShared) -> Result<()> {
        while !shared.stop.load(Ordering::Relaxed) {
            if self.turn(&shared.counters)? {
                self.pace.busy();
                continue;
            }
            match self.pace.rest(self.hal.now(), self.carried) {
                Rest::Poll => std::thread::yield_now(),
                Rest::Nap(nanoseconds) => self.nap(shared, nanoseconds)?,
                Rest::Sleep => self.sleep(shared)?,
            }
        }
        Ok(())
    }

    /// Moves the frames that wait, in both directions. Returns whether there were any.
    fn turn(&mut self, counters: &Counters) -> Result<bool> {
        let received = self.receive(counters)?;
        let sent = self.send(counters)?;
        Ok(received + sent > 0)
    }

    fn receive(&mut self, counters: &Counters) -> Result<u32> {
        let size = self.rx.buffer_bytes();
        let mut count = 0;
        while count < BUDGET {
            let Some(pieces) = self.rx.receive()? else { break };
            let mut given = [0; CHAIN_MAX];
            let mut vectors = [IoVec::EMPTY; CHAIN_MAX];
            let used = pieces.len();
            for (i, piece) in pieces.iter().enumerate() {
                given[i] = piece.id;
                vectors[i] = IoVec::words(
                    self.buffers.words(),
                    usize::from(piece.id) * size as usize,
                    piece.len as usize,
                );
            }
            match writev(&self.tap, &vectors[..used]) {
                Ok(len) => {
                    Counters::add(&counters.received, 1);
                    self.carried += (len + FRAME_WEIGHT) as u64;
                }
                // The kernel refuses the header or the frame, the interface is down, or there is no
                // memory. This frame is lost.
                Err(
                    Errno::INVAL
                    | Errno::IO
                    | Errno::AGAIN
                    | Errno::NOMEM
                    | Errno::NOBUFS
                    | Errno::MSGSIZE
                    // The queue is not in use.
                    | Errno::BADFD,
                ) => {
                    Counters::add(&counters.refused, 1);
                }
                Err(error) => return Err(error).context("the TAP interface takes no more frames"),
            }
            for &id in &given[..used] {
                self.rx.give(id)?;
            }
            count += 1;
            if count % POST_EACH == 0 {
                self.post_buffers(counters);
            }
        }
        if count > 0 {
            self.post_buffers(counters);
        }
        Ok(count)
    }

    fn post_buffers(&mut self, counters: &Counters) {
        let rung = self.rx.post();
        Counters::add(&counters.doorbells, u64::from(rung));
    }

    fn send(&mut self, counters: &Counters) -> Result<u32> {
        let mut count = 0;
        while count < BUDGET {
            let Some(offset) = self.room()? else { break };
            match readv(&self.tap, &mut [self.frames.vector(offset)]) {
                Ok(len) if len > HEADER_BYTES => {
                    let piece = self.frames.take(offset, len);
                    if !self.tx.submit(&[piece])? {
                        bail!("the transmit ring is full although it had room");
                    }
                    self.carried += (len + FRAME_WEIGHT) as u64;
                    count += 1;
                    if count % POST_EACH == 0 {
                        self.post_frames(counters);
                    }
                }
                Ok(_) => {}
                // BADFD: the queue is not in use.
                Err(Errno::AGAIN | Errno::BADFD) => break,
                Err(error) => return Err(error).context("the TAP interface gives no more frames"),
            }
        }
        if count > 0 {
            self.post_frames(counters);
            Counters::add(&counters.sent, u64::from(count));
        }
        Ok(count)
    }

    fn post_frames(&mut self, counters: &Counters) {
        let rung = self.tx.post();
        Counters::add(&counters.doorbells, u64::from(rung));
    }

    /// The offset to which the next frame to send can be read. Reclaims the frames that were sent
    /// when half of the ring is in flight or there is no room.
    fn room(&mut self) -> Result<Option<usize>> {
        if self.tx.in_flight() >= self.tx.space() || self.frames.room().is_none() {
            let count = self.tx.reclaim()?;
            self.frames.give_back(count);
        }
        Ok(if self.tx.space() > 0 { self.frames.room() } else { None })
    }

    /// Sleeps for this time without an interrupt. Frames of the interface end the sleep.
    fn nap(&mut self, shared: &NicShared, nanoseconds: u64) -> Result<()> {
        Counters::add(&shared.counters.naps, 1);
        let for_tap = self.room()?.is_some();
        let time = Timespec { tv_sec: 0, tv_nsec: i64::try_from(nanoseconds)?.min(999_999_999) };
        self.wait(shared, for_tap, Some(&time)).map(drop)
    }

    /// Sleeps until there is something to do.
    fn sleep(&mut self, shared: &NicShared) -> Result<()> {
        // Without room for another frame, the queue waits until a quarter of the frames in flight
        // have been sent.
        let full = self.room()?.is_none();
        let missed_tx = full && self.tx.arm(self.tx.in_flight() / 4) == Armed::Missed;
        let missed_rx = self.rx.arm(0) == Armed::Missed;
        // A faulty device may report "missed" forever and bring nothing. It gets one more turn, so
        // that it cannot take the whole processor. New room for frames also counts as a result: the
        // queue must wait for the interface then.
        if (missed_tx || missed_rx)
            && (self.turn(&shared.counters)? || full && self.room()?.is_some())
        {
            self.disarm(full);
            return Ok(());
        }
        if let Wake::Interrupt(interrupt, _) = &mut self.wake {
            interrupt.enable()?;
        }
        self.pace.sleep(self.hal.now());
        Counters::add(&shared.counters.sleeps, 1);
        let (interrupted, gone) = self.wait(shared, !full, None)?;
        self.pace.woken(self.hal.now());
        if interrupted {
            Counters::add(&shared.counters.interrupts, 1);
            match &mut self.wake {
                Wake::Interrupt(interrupt, acknowledger) => {
                    interrupt.take()?;
                    acknowledger.acknowledge();
                }
                Wake::Relay(eventfd) => {
                    let _ = rustix::io::read(&*eventfd, &mut [0; 8]);
                }
            }
        }
        if gone {
            return Err(Error::Gone.into());
        }
        self.disarm(full);
        if interrupted && !self.turn(&shared.counters)? {
            // The interrupt was for the status page, or the device has ended the connection.
            let _ = rustix::io::write(&shared.look, &1u64.to_ne_bytes());
        }
        Ok(())
    }

    fn disarm(&mut self, full: bool) {
        self.rx.disarm();
        if full {
            self.tx.disarm();
        }
    }

    /// Waits for `stopped`, for the interface, and, without `nap`, for an interrupt. Returns
    /// whether an interrupt came, and whether the function has gone.
    fn wait(
        &self,
        shared: &NicShared,
        for_tap: bool,
        nap: Option<&Timespec>,
    ) -> Result<(bool, bool)> {
        let (wake, lifeline) = match &self.wake {
            Wake::Interrupt(interrupt, _) => (interrupt.fd(), Some(interrupt.lifeline())),
            Wake::Relay(eventfd) => (eventfd.as_fd(), None),
        };
        let mut fds = vec![PollFd::new(&shared.stopped, PollFlags::IN)];
        // A queue that is not in use reports an error all the time.
        let is_used = self.number < shared.used.load(Ordering::Relaxed);
        let tap = if for_tap { PollFlags::IN } else { PollFlags::empty() };
        if is_used {
            fds.push(PollFd::new(&self.tap, tap));
        } else {
            fds.push(PollFd::new(&shared.stopped, PollFlags::IN)); // In its place.
        }
        if nap.is_none() {
            fds.push(PollFd::from_borrowed_fd(wake, PollFlags::IN));
            fds.extend(lifeline.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::RDHUP)));
        }
        match poll(&mut fds, nap) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        let is_used = is_used && self.number < shared.used.load(Ordering::Relaxed);
        if is_used && fds[1].revents().intersects(PollFlags::ERR | PollFlags::HUP) {
            bail!("the TAP interface was deleted");
        }
        let came = fds.get(2).is_some_and(|fd| fd.revents().contains(PollFlags::IN));
        let gone = fds.get(3).is_some_and(|fd| !fd.revents().is_empty());
        Ok((came, gone))
    }
}
