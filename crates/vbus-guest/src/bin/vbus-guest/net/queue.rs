//! One queue pair: frames between the NIC's rings and a queue of the TAP interface.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vbus_core::io_vec::{IoVec, readv, writev};
use vbus_driver::venet::{CHAIN_MAX, HEADER_BYTES, Rx, Tx};
use vbus_driver::{Acknowledger, Dma, Error, Hal, Memory, Pace, Rest};
use vbus_shm::signal::Armed;

use super::frames::FrameMemory;
use vbus_guest::Interrupt;

/// Frames of one direction before it is the other's turn.
const BUDGET: u32 = 64;
/// Frames submitted before the device is told of them; it can begin while the next are being read.
const POST_EACH: u32 = 16;

/// What a frame weighs besides its bytes, for the pace.
const FRAME_WEIGHT: usize = 512;

/// What a queue counts; for people.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames sent to the device.
    pub sent: AtomicU64,
    /// Frames received from it.
    pub received: AtomicU64,
    /// Received frames that the kernel did not take.
    pub refused: AtomicU64,
    /// Doorbells rung.
    pub doorbells: AtomicU64,
    /// Times it looked again after a nap.
    pub naps: AtomicU64,
    /// Times it went to sleep.
    pub sleeps: AtomicU64,
    /// Times an interrupt (or the one who takes them) woke it.
    pub interrupts: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}

/// What wakes a queue besides its interface.
pub enum Wake<H: Hal> {
    /// The function's interrupt: there is but this queue.
    Interrupt(Box<dyn Interrupt>, Acknowledger<H>),
    /// An eventfd, written by whoever takes the interrupt for all queues.
    Relay(OwnedFd),
}

/// A queue pair with all that it needs.
pub struct Queue<H: Hal> {
    /// Sends.
    pub tx: Tx<H>,
    /// Frames that are being sent.
    pub frames: FrameMemory<H::Dma>,
    /// Receives.
    pub rx: Rx<H>,
    /// Receive buffers, one behind another by number.
    pub buffers: H::Dma,
    /// The interface.
    pub tap: vbus_tap::Queue,
    /// What wakes it.
    pub wake: Wake<H>,
    /// How it rests.
    pub pace: Pace,
    /// What it has carried, as [`Pace`] wants it told.
    pub carried: u64,
    /// The environment, for its clock.
    pub hal: H,
}

/// What a queue shares with the thread that watches over the NIC.
pub struct Shared {
    /// Says that the queues are to end.
    pub stop: AtomicBool,
    /// Becomes readable, and stays so, when they are to end.
    pub stopped: OwnedFd,
    /// Written when an interrupt came that was for none of the queues.
    pub look: OwnedFd,
    /// Counters of all queues.
    pub counters: Counters,
}

impl<H: Hal> Queue<H> {
    /// Hands all receive buffers to the device. To be called once, before [`run`](Self::run).
    pub fn fill(&mut self) -> Result<()> {
        for id in 0..u16::try_from(self.rx.space())? {
            let address = self.buffers.address(usize::from(id) * self.rx.buffer_bytes() as usize);
            self.rx.give(id, address)?;
        }
        self.rx.post();
        Ok(())
    }

    /// Moves frames until it is told to stop, or something is broken.
    pub fn run(&mut self, shared: &Shared) -> Result<()> {
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

    /// Moves what there is, both ways; whether there was anything.
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
                // A header or a frame that it does not take, an interface that is down, no memory:
                // this frame is lost.
                Err(
                    Errno::INVAL
                    | Errno::IO
                    | Errno::AGAIN
                    | Errno::NOMEM
                    | Errno::NOBUFS
                    | Errno::MSGSIZE,
                ) => {
                    Counters::add(&counters.refused, 1);
                }
                Err(error) => return Err(error).context("the TAP interface takes no more frames"),
            }
            for &id in &given[..used] {
                self.rx.give(id, self.buffers.address(usize::from(id) * size as usize))?;
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
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
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

    /// Where the next frame to be sent can be read to. Takes back what was sent once half of the
    /// ring is in flight, or room gets scarce.
    fn room(&mut self) -> Result<Option<usize>> {
        if self.tx.in_flight() >= self.tx.space() || self.frames.room().is_none() {
            let count = self.tx.reclaim()?;
            self.frames.give_back(count);
        }
        Ok(if self.tx.space() > 0 { self.frames.room() } else { None })
    }

    /// Sleeps for a while without asking for an interrupt; frames of the interface end it.
    fn nap(&mut self, shared: &Shared, nanoseconds: u64) -> Result<()> {
        Counters::add(&shared.counters.naps, 1);
        let for_tap = self.room()?.is_some();
        let time = Timespec { tv_sec: 0, tv_nsec: i64::try_from(nanoseconds)?.min(999_999_999) };
        self.wait(shared, for_tap, Some(&time)).map(drop)
    }

    /// Sleeps until there is something to do.
    fn sleep(&mut self, shared: &Shared) -> Result<()> {
        // Without room for another frame, the next thing to happen is that frames have been sent: a
        // quarter of them makes it worth while.
        let full = self.room()?.is_none();
        let missed_tx = full && self.tx.arm(self.tx.in_flight() / 4) == Armed::Missed;
        let missed_rx = self.rx.arm(0) == Armed::Missed;
        // A device may say "missed" and bring nothing, for ever: it gets one more look, not the
        // processor. Room for frames is something: now it is the interface that has to be waited
        // for.
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
            // For the status page, then, or because the device ended the connection.
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

    /// Waits, for an interrupt only without `nap`. Whether one came, and whether the function has
    /// gone.
    fn wait(&self, shared: &Shared, for_tap: bool, nap: Option<&Timespec>) -> Result<(bool, bool)> {
        let (wake, lifeline) = match &self.wake {
            Wake::Interrupt(interrupt, _) => (interrupt.fd(), Some(interrupt.lifeline())),
            Wake::Relay(eventfd) => (eventfd.as_fd(), None),
        };
        let tap = if for_tap { PollFlags::IN } else { PollFlags::empty() };
        let mut fds =
            vec![PollFd::new(&shared.stopped, PollFlags::IN), PollFd::new(&self.tap, tap)];
        if nap.is_none() {
            fds.push(PollFd::from_borrowed_fd(wake, PollFlags::IN));
            fds.extend(lifeline.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::RDHUP)));
        }
        match poll(&mut fds, nap) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        if fds[1].revents().intersects(PollFlags::ERR | PollFlags::HUP) {
            bail!("the TAP interface was deleted");
        }
        let came = fds.get(2).is_some_and(|fd| fd.revents().contains(PollFlags::IN));
        let gone = fds.get(3).is_some_and(|fd| !fd.revents().is_empty());
        Ok((came, gone))
    }
}
