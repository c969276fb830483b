// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The pages of a `pic` for several processors, and their handlers. Each time that a handler takes
//! a line, it checks that
//!
//! - the line's route leads to this processor, or led to it until a move that has not ended;
//! - the line is not masked, and is more urgent than all lines in service there;
//! - no line that was pending before is more urgent.
#![allow(
    unsafe_code,
    reason = "each processor has its own part, in which its handlers interrupt it"
)]

use core::array;
use core::cell::UnsafeCell;
use core::hint::spin_loop;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};

use flat::dice::Dice;
use vbus_driver::pic::{Controller, Line, Nesting, Wanted};
use vbus_shm::signal::Armed;

use crate::cpu::CPUS_MAX;
use crate::hal::FlatHal;
use crate::net::{FRAME, Station};
use crate::{clock, cpu, traps};

/// Lines of each page.
pub const LINES: u16 = 32;
/// The most NICs.
pub const STATIONS_MAX: usize = 8;
/// Frames in flight to each NIC: a quarter of the rings' entries.
const AHEAD: u64 = 16;
/// The longest time for which a line is masked, in nanoseconds.
const MASKED: u64 = 1_000_000;
/// The longest time that a handler waits for a more urgent interrupt, in nanoseconds.
const LINGER: u64 = 2_000_000;

/// The pages that the handlers use; null: none.
static SHARED: AtomicPtr<Pages> = AtomicPtr::new(ptr::null_mut());

/// The handler of the messages of all processors.
pub extern "C" fn interrupt() {
    // SAFETY: `Pages::share` has set the pointer, and clears it before the pages are dropped.
    if let Some(pages) = unsafe { SHARED.load(Ordering::Acquire).as_ref() } {
        pages.drain(traps::number() as usize);
    }
}

/// The counts of a processor.
#[derive(Clone, Copy, Default)]
pub struct Tally {
    /// Lines taken.
    pub taken: u64,
    /// Lines taken while a less urgent one was in service.
    pub nested: u64,
    /// Lines taken while another one was pending too.
    pub chosen: u64,
    /// Lines masked for a while.
    pub masked: u64,
    /// Masked lines that became pending meanwhile.
    pub held: u64,
}

/// The counts of a NIC's interrupts.
#[derive(Clone, Copy, Default)]
pub struct Came {
    /// Interrupts that the NIC was armed for and that a handler has handled.
    pub raised: u64,
    /// How often a handler found nothing.
    pub empty: u64,
    /// How often the NIC was armed too late: a frame had just arrived, perhaps with a further
    /// interrupt.
    pub late: u64,
}

/// The private data of a processor.
struct Own {
    page: Option<Controller<FlatHal>>,
    /// The lines in service, as many as `depth`.
    in_service: [u16; LINES as usize],
    depth: usize,
    masked: Option<u16>,
    dice: Dice,
    tally: Tally,
}

struct Processor {
    own: UnsafeCell<Own>,
    /// Odd while the processor takes a line.
    taking: AtomicU64,
}

/// A NIC with the counts of its interrupts.
struct Receiver {
    station: UnsafeCell<Option<Station>>,
    mac: [u8; 6],
    /// Handlers that want the NIC checked. The first one does it for all.
    claims: AtomicU32,
    /// Frames sent to the NIC, and frames that have arrived.
    sent: AtomicU64,
    got: AtomicU64,
    /// How often a handler found that the NIC had interrupted.
    found: AtomicU64,
    /// How often a handler found nothing.
    empty: AtomicU64,
    /// How often the NIC was armed too late: a frame had just arrived, perhaps with an interrupt.
    late: AtomicU64,
}

/// What a round tries.
mod tried {
    /// A line was taken while another one was pending.
    pub const CHOSEN: u32 = 1;
    /// A line was taken while a less urgent one was in service.
    pub const NESTED: u32 = 2;
    /// A masked line became pending.
    pub const HELD: u32 = 4;
}

/// The NIC that sends frames to all others.
struct Sender {
    station: UnsafeCell<Station>,
    /// A processor is using it.
    busy: AtomicBool,
    /// Sending is paused.
    pauses: AtomicBool,
    /// The number of frames to send to each NIC.
    count: AtomicU64,
}

/// The pages, and the NICs that raise their lines.
pub struct Pages {
    nesting: Nesting,
    processors: [Processor; CPUS_MAX],
    sender: Sender,
    receivers: [Receiver; STATIONS_MAX],
    /// The number of NICs.
    stations: usize,
    /// By processor and line: the number, from 1, of the NIC whose route leads there; 0: none.
    leads: [[AtomicU8; LINES as usize]; CPUS_MAX],
    /// Goes up when a move begins and when it ends. During a move it also has the processor and the
    /// line.
    moving: AtomicU64,
    /// Processors that have begun to [`serve`](Pages::serve).
    serving: AtomicU32,
    /// What the handlers have done so far, by processor: bits of [`tried`].
    tried: [AtomicU32; CPUS_MAX],
    stop: AtomicBool,
}

// SAFETY: only its own processor uses `own`, with interrupts disabled. Only the handler with the
// first claim uses a NIC's `station`. Only the processor that has set `busy` uses the sender's.
unsafe impl Sync for Pages {}

impl Pages {
    /// Makes the state without pages and receivers. `sender` will send `count` frames to each NIC.
    pub fn new(nesting: Nesting, sender: Station, count: u64) -> Pages {
        let processor = |number: usize| Processor {
            own: UnsafeCell::new(Own {
                page: None,
                in_service: [0; LINES as usize],
                depth: 0,
                masked: None,
                dice: Dice::new(number as u64),
                tally: Tally::default(),
            }),
            taking: AtomicU64::new(0),
        };
        let receiver = |_| Receiver {
            station: UnsafeCell::new(None),
            mac: [0; 6],
            claims: AtomicU32::new(0),
            sent: AtomicU64::new(0),
            got: AtomicU64::new(0),
            found: AtomicU64::new(0),
            empty: AtomicU64::new(0),
            late: AtomicU64::new(0),
        };
        Pages {
            nesting,
            processors: array::from_fn(processor),
            sender: Sender {
                station: UnsafeCell::new(sender),
                busy: AtomicBool::new(false),
                pauses: AtomicBool::new(false),
                count: AtomicU64::new(count),
            },
            receivers: array::from_fn(receiver),
            stations: 0,
            leads: [const { [const { AtomicU8::new(0) }; LINES as usize] }; CPUS_MAX],
            moving: AtomicU64::new(0),
            serving: AtomicU32::new(0),
            tried: [const { AtomicU32::new(0) }; CPUS_MAX],
            stop: AtomicBool::new(false),
        }
    }

    /// Whether handlers have tried all that [`tried`] has, on these processors: each one has
    /// chosen among several lines, and the other things have occurred somewhere.
    pub fn has_tried_all(&self, cpus: u32) -> bool {
        let each = self.tried[..cpus as usize].iter().map(|tried| tried.load(Ordering::Relaxed));
        let wanted = match self.nesting {
            Nesting::Nested => tried::NESTED | tried::HELD,
            Nesting::Flat => tried::HELD,
        };
        each.clone().all(|tried| tried & tried::CHOSEN != 0)
            && each.fold(0, |all, tried| all | tried) & wanted == wanted
    }

    fn has_tried(&self, me: usize, what: u32) {
        self.tried[me].fetch_or(what, Ordering::Relaxed);
    }

    /// The number of frames that each NIC gets.
    pub fn count(&self) -> u64 {
        self.sender.count.load(Ordering::Relaxed)
    }

    /// Lets each NIC get `more` frames. Processor 0 calls this.
    pub fn add_frames(&self, more: u64) {
        self.sender.count.fetch_add(more, Ordering::Relaxed);
    }

    /// The page of a processor.
    pub fn set_page(&mut self, number: u32, page: Controller<FlatHal>) {
        self.processors[number as usize].own.get_mut().page = Some(page);
    }

    /// Takes the page of a processor out. Returns it with the processor's counts.
    pub fn take_page(&mut self, number: u32) -> (Option<Controller<FlatHal>>, Tally) {
        let own = self.processors[number as usize].own.get_mut();
        (own.page.take(), own.tally)
    }

    /// Adds a NIC.
    pub fn add_station(&mut self, station: Station) {
        let receiver = &mut self.receivers[self.stations];
        receiver.mac = station.nic.config().mac;
        *receiver.station.get_mut() = Some(station);
        self.stations += 1;
    }

    /// The number of NICs.
    pub fn stations(&self) -> usize {
        self.stations
    }

    /// At the end, returns the NICs with the counts of each, and the sender.
    pub fn into_stations(self) -> (impl Iterator<Item = (Station, Came)>, Station) {
        let came = |receiver: Receiver| {
            let [raised, empty, late] =
                [receiver.found, receiver.empty, receiver.late].map(AtomicU64::into_inner);
            Some((receiver.station.into_inner()?, Came { raised, empty, late }))
        };
        (self.receivers.into_iter().filter_map(came), self.sender.station.into_inner())
    }

    /// A NIC, before the pages are shared.
    pub fn station(&mut self, number: usize) -> Option<&mut Station> {
        self.receivers[number].station.get_mut().as_mut()
    }

    /// Sends a frame to NIC `number`, unless too many frames are in flight to it, or another
    /// processor is sending.
    pub fn send(&self, number: usize) {
        let Sender { station, busy, pauses, count } = &self.sender;
        if busy.swap(true, Ordering::SeqCst) {
            return;
        }
        let Receiver { mac, sent, got, .. } = &self.receivers[number];
        let frame = sent.load(Ordering::Relaxed);
        if !pauses.load(Ordering::SeqCst)
            && frame < count.load(Ordering::Relaxed)
            && frame - got.load(Ordering::Acquire) < AHEAD
        {
            // SAFETY: no other processor uses it.
            let station = unsafe { &mut *station.get() };
            if let Err(error) = station.send(*mac, frame, 60) {
                panic!("{error}");
            }
            sent.store(frame + 1, Ordering::Release);
        }
        busy.store(false, Ordering::SeqCst);
    }

    /// Pauses or resumes the sending of frames and the masking of lines. Processor 0 calls this.
    pub fn pause(&self, pauses: bool) {
        self.sender.pauses.store(pauses, Ordering::SeqCst);
        while pauses && self.sender.busy.load(Ordering::SeqCst) {
            spin_loop();
        }
    }

    /// The number of frames sent to NIC `number`.
    pub fn sent(&self, number: usize) -> u64 {
        self.receivers[number].sent.load(Ordering::Acquire)
    }

    /// The number of frames that have arrived at NIC `number`.
    pub fn got(&self, number: usize) -> u64 {
        self.receivers[number].got.load(Ordering::Acquire)
    }

    /// Lets handlers use these pages while `run` runs. `settle` must return only when every handler
    /// that had begun on another processor has ended.
    pub fn share<T>(&self, run: impl FnOnce() -> T, settle: impl FnOnce()) -> T {
        SHARED.store(ptr::from_ref(self).cast_mut(), Ordering::Release);
        let outcome = run();
        SHARED.store(ptr::null_mut(), Ordering::SeqCst);
        settle();
        outcome
    }

    /// Makes a NIC lead to a line from now on. Returns false if another NIC leads there.
    pub fn lead(&self, station: usize, to: Line) -> bool {
        let lead = &self.leads[to.cpu as usize][usize::from(to.number)];
        lead.compare_exchange(0, station as u8 + 1, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Moves the route to line `from` by calling `carry`. After this, no handler takes line `from`.
    /// Processor 0 calls this.
    pub fn relocate<T>(&self, from: Line, carry: impl FnOnce() -> T) -> T {
        self.moving.fetch_add(NEXT_MOVE | mark(from.cpu as usize, from.number), Ordering::SeqCst);
        let outcome = carry();
        self.moving.fetch_sub(mark(from.cpu as usize, from.number), Ordering::SeqCst);
        if from.cpu != 0 {
            // When the processor is not taking a line, it has checked all lines that it took
            // before.
            let taking = &self.processors[from.cpu as usize].taking;
            let now = taking.load(Ordering::SeqCst);
            while now % 2 == 1 && taking.load(Ordering::SeqCst) == now {
                spin_loop();
            }
        }
        self.leads[from.cpu as usize][usize::from(from.number)].store(0, Ordering::SeqCst);
        outcome
    }

    /// Ends [`serve`](Self::serve) on all processors, once they wake.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    /// Arms the page of processor `me`, on that processor.
    pub fn arm(&self, me: usize) {
        cpu::interrupts(false);
        if self.with_page(me, |page| page.arm()) == Wanted::Pending {
            self.drain(me);
        }
        cpu::interrupts(true);
    }

    /// Disarms the page of processor `me`.
    pub fn disarm(&self, me: usize) {
        cpu::interrupts(false);
        self.with_page(me, Controller::disarm);
        cpu::interrupts(true);
    }

    /// The loop of another processor: it masks a line for a while, and sleeps until a message
    /// comes, until [`stop`](Self::stop).
    pub fn serve(&self, me: usize) {
        self.arm(me);
        self.serving.fetch_add(1, Ordering::Release);
        while !self.stop.load(Ordering::SeqCst) {
            self.mask_one(me);
            cpu::interrupts(false);
            if !self.stop.load(Ordering::SeqCst) && self.with(me, |own| own.dice.roll(4)) > 0 {
                cpu::sleep();
            }
            cpu::interrupts(true);
        }
        self.disarm(me);
    }

    /// The number of processors that have begun to [`serve`](Self::serve).
    pub fn serving(&self) -> u32 {
        self.serving.load(Ordering::Acquire)
    }

    /// Masks one of this processor's lines for a while.
    pub fn mask_one(&self, me: usize) {
        cpu::interrupts(false);
        let first = self.with(me, |own| own.dice.roll(LINES.into())) as u16;
        let mut lines =
            (first..LINES).chain(0..first).filter_map(|line| Some((line, self.led_by(me, line)?)));
        let pauses = self.sender.pauses.load(Ordering::SeqCst);
        let Some((line, station)) = lines.next().filter(|_| !pauses) else {
            return cpu::interrupts(true);
        };
        let long = self.with(me, |own| {
            own.masked = Some(line);
            own.tally.masked += 1;
            own.dice.roll(MASKED)
        });
        self.with_page(me, |page| page.mask(line));
        cpu::interrupts(true);
        let began = clock::now();
        self.send(station);
        while clock::now() - began < long {
            spin_loop();
        }
        cpu::interrupts(false);
        self.with(me, |own| own.masked = None);
        if self.with_page(me, |page| page.unmask(line)) == Wanted::Pending {
            self.with(me, |own| own.tally.held += 1);
            self.has_tried(me, tried::HELD);
            self.drain(me);
        }
        cpu::interrupts(true);
    }

    /// Takes, handles and ends lines until there are none. Interrupts must be disabled, and are
    /// disabled again on return.
    fn drain(&self, me: usize) {
        while let Some((line, station)) = self.take(me) {
            let nests = self.nesting == Nesting::Nested;
            if nests {
                cpu::interrupts(true);
                self.attend(station);
                self.linger(me, line);
                cpu::interrupts(false);
            } else {
                self.attend(station);
            }
            self.with(me, |own| own.depth -= 1);
            self.with_page(me, |page| page.end(line));
        }
    }

    /// Takes a line, and makes the checks of this module.
    fn take(&self, me: usize) -> Option<(u16, usize)> {
        let taking = &self.processors[me].taking;
        taking.fetch_add(1, Ordering::SeqCst);
        let before = self.moving.load(Ordering::SeqCst);
        let masked = self.with(me, |own| own.masked);
        // Unmasking an unmasked line changes nothing, and returns whether the line is pending.
        let pending = |line: &u16| self.with_page(me, |page| page.unmask(*line)) == Wanted::Pending;
        let looked_at = (0..LINES)
            .rev()
            .filter(|line| self.led_by(me, *line).is_some() && masked != Some(*line));
        let (count, most) = looked_at
            .filter(pending)
            .fold((0, None), |(count, most), line| (count + 1, most.or(Some(line))));
        let line = self.with_page(me, Controller::take);
        let after = self.moving.load(Ordering::SeqCst);
        let station = line.map(|line| {
            assert!(
                masked != Some(line),
                "processor {me}: line {line} was taken although it is masked"
            );
            let Some(station) = self.led_by(me, line) else {
                panic!("processor {me}: line {line} was taken, but no route leads to it");
            };
            self.with(me, |own| {
                let in_service = &own.in_service[..own.depth];
                let higher = in_service.last().is_none_or(|last| *last < line);
                assert!(
                    higher,
                    "processor {me}: line {line} was taken while {in_service:?} are in service"
                );
                own.tally.taken += 1;
                own.tally.nested += u64::from(own.depth > 0);
                own.tally.chosen += u64::from(count > 1);
                let nested = if own.depth > 0 { tried::NESTED } else { 0 };
                let chosen = if count > 1 { tried::CHOSEN } else { 0 };
                self.has_tried(me, nested | chosen);
                own.in_service[own.depth] = line;
                own.depth += 1;
            });
            (line, station)
        });
        if let Some(most) = most.filter(|most| line < Some(*most)) {
            // A move clears a pending line.
            let moved = before != after || before % NEXT_MOVE == mark(me, most);
            assert!(moved, "processor {me}: {line:?} was taken while line {most} was pending");
        }
        taking.fetch_add(1, Ordering::SeqCst);
        station
    }

    /// The NIC whose route leads to a line.
    fn led_by(&self, me: usize, line: u16) -> Option<usize> {
        usize::from(self.leads[me][usize::from(line)].load(Ordering::SeqCst)).checked_sub(1)
    }

    /// Checks a NIC. If another handler is checking it already, perhaps one that this handler has
    /// interrupted, that handler checks it again.
    fn attend(&self, station: usize) {
        let receiver = &self.receivers[station];
        if receiver.claims.fetch_add(1, Ordering::AcqRel) > 0 {
            return;
        }
        loop {
            let claims = receiver.claims.load(Ordering::Acquire);
            // SAFETY: this handler has the first claim.
            let station = unsafe { &mut *receiver.station.get() };
            receiver.look(station.as_mut().expect("the line of a NIC that does not exist"));
            if receiver
                .claims
                .compare_exchange(claims, 0, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
            {
                return;
            }
        }
    }

    /// Sometimes gives more urgent lines of this processor a reason and time to interrupt.
    fn linger(&self, me: usize, line: u16) {
        let look = || {
            cpu::interrupts(false);
            let seen = self.with(me, |own| (own.tally.nested, own.dice.roll(4)));
            cpu::interrupts(true);
            seen
        };
        let (before, roll) = look();
        let Some(station) =
            (line + 1..LINES).find_map(|line| self.led_by(me, line)).filter(|_| roll == 0)
        else {
            return;
        };
        self.send(station);
        let began = clock::now();
        while look().0 == before && clock::now() - began < LINGER {
            spin_loop();
        }
    }

    /// Calls `f` with this processor's private data. Interrupts must be disabled, and `f` must not
    /// call this again.
    fn with<T>(&self, me: usize, f: impl FnOnce(&mut Own) -> T) -> T {
        // SAFETY: only this processor uses it.
        f(unsafe { &mut *self.processors[me].own.get() })
    }

    fn with_page<T>(&self, me: usize, f: impl FnOnce(&mut Controller<FlatHal>) -> T) -> T {
        self.with(me, |own| f(own.page.as_mut().expect("a processor without its page")))
    }
}

/// The value that a move adds to [`Pages::moving`].
const NEXT_MOVE: u64 = 1 << 32;

/// The value that a move adds until it ends.
fn mark(processor: usize, line: u16) -> u64 {
    1 << 31 | (processor as u64) << 16 | u64::from(line)
}

impl Receiver {
    /// Takes all frames, and arms again if there were any.
    fn look(&self, station: &mut Station) {
        let mut frame = [0; FRAME];
        let mut any = false;
        loop {
            let got = self.got.load(Ordering::Relaxed);
            match station.try_receive(&mut frame) {
                Ok(Some(_)) => {
                    assert!(
                        Station::number(&frame) == got as u8,
                        "a frame is missing before frame {got}"
                    );
                    self.got.store(got + 1, Ordering::Release);
                    any = true;
                }
                Ok(None) if !any => {
                    self.empty.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                Ok(None) => {
                    if station.rx.arm(0) == Armed::Waiting {
                        self.found.fetch_add(1, Ordering::Relaxed);
                        return;
                    }
                    self.late.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}
