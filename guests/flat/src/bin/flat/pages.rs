//! The pages of a `pic` for several processors, their handlers, and what must hold each time that a
//! line is taken:
//!
//! - its processor is one that it leads to, or led to until a move that is still under way;
//! - it is not masked, and more urgent than all that are in service there;
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
/// Frames under way to each NIC: a quarter of what the rings hold.
const AHEAD: u64 = 16;
/// How long a line is masked, at most, in nanoseconds.
const MASKED: u64 = 1_000_000;
/// How long a handler waits to be interrupted by a more urgent one, at most, in nanoseconds.
const LINGER: u64 = 2_000_000;

/// The pages that handlers are for; null: none.
static SHARED: AtomicPtr<Pages> = AtomicPtr::new(ptr::null_mut());

/// The handler of the messages of all processors.
pub extern "C" fn interrupt() {
    // SAFETY: those of `Pages::share`, which takes them back before they go.
    if let Some(pages) = unsafe { SHARED.load(Ordering::Acquire).as_ref() } {
        pages.drain(traps::number() as usize);
    }
}

/// What a processor has counted.
#[derive(Clone, Copy, Default)]
pub struct Tally {
    /// Lines taken.
    pub taken: u64,
    /// Of these: while a less urgent one was in service.
    pub nested: u64,
    /// Of these: while another one was pending too.
    pub chosen: u64,
    /// Lines masked for a while.
    pub masked: u64,
    /// Of these: that had become pending meanwhile.
    pub held: u64,
}

/// What has come of a NIC's interrupts.
#[derive(Clone, Copy, Default)]
pub struct Came {
    /// Interrupts that it was armed for, and that were handled.
    pub raised: u64,
    /// How often a handler looked for nothing.
    pub empty: u64,
    /// How often it was armed too late: a frame had just come, perhaps with an interrupt more.
    pub late: u64,
}

/// What a processor has for itself.
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
    /// Odd while it takes a line.
    taking: AtomicU64,
}

/// A NIC, and what has come of its interrupts.
struct Place {
    station: UnsafeCell<Option<Station>>,
    mac: [u8; 6],
    /// Handlers that want it to be looked at: the first one does, for all.
    claims: AtomicU32,
    /// Frames that were sent to it, and that have come.
    sent: AtomicU64,
    got: AtomicU64,
    /// How often it was found to have interrupted.
    found: AtomicU64,
    /// How often it was looked at for nothing.
    empty: AtomicU64,
    /// How often it was armed too late: a frame had just come, perhaps with an interrupt.
    late: AtomicU64,
}

/// Who sends frames to all of them.
struct Sender {
    station: UnsafeCell<Station>,
    /// Somebody is at it.
    busy: AtomicBool,
    /// Nothing is sent now.
    pauses: AtomicBool,
    /// Frames to be sent to each NIC.
    count: u64,
}

/// The pages, and the NICs whose lines they have.
pub struct Pages {
    nesting: Nesting,
    processors: [Processor; CPUS_MAX],
    sender: Sender,
    places: [Place; STATIONS_MAX],
    /// How many of them there are.
    stations: usize,
    /// By processor and line, the NIC that leads there, from 1; 0: none.
    leads: [[AtomicU8; LINES as usize]; CPUS_MAX],
    /// Goes up when a move begins and when it has ended; with what moves while it is under way.
    moving: AtomicU64,
    /// Processors that have begun to [`serve`](Pages::serve).
    serving: AtomicU32,
    stop: AtomicBool,
}

// SAFETY: `own` is used on its processor alone, with interrupts kept out; a place's `station` by
// who has made the first claim, the sender's by who has made it busy.
unsafe impl Sync for Pages {}

impl Pages {
    /// No pages and no NICs yet, but `sender`, which is to send `count` frames to each.
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
        let place = |_| Place {
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
                count,
            },
            places: array::from_fn(place),
            stations: 0,
            leads: [const { [const { AtomicU8::new(0) }; LINES as usize] }; CPUS_MAX],
            moving: AtomicU64::new(0),
            serving: AtomicU32::new(0),
            stop: AtomicBool::new(false),
        }
    }

    /// The page of a processor.
    pub fn set_page(&mut self, number: u32, page: Controller<FlatHal>) {
        self.processors[number as usize].own.get_mut().page = Some(page);
    }

    /// Takes the page of a processor out again; with what it has counted.
    pub fn take_page(&mut self, number: u32) -> (Option<Controller<FlatHal>>, Tally) {
        let own = self.processors[number as usize].own.get_mut();
        (own.page.take(), own.tally)
    }

    /// One more NIC.
    pub fn add_station(&mut self, station: Station) {
        let place = &mut self.places[self.stations];
        place.mac = station.nic.config().mac;
        *place.station.get_mut() = Some(station);
        self.stations += 1;
    }

    /// How many NICs there are.
    pub fn stations(&self) -> usize {
        self.stations
    }

    /// The NICs, when all is done, with what has come of each; the sender last.
    pub fn into_stations(self) -> (impl Iterator<Item = (Station, Came)>, Station) {
        let came = |place: Place| {
            let [raised, empty, late] =
                [place.found, place.empty, place.late].map(AtomicU64::into_inner);
            Some((place.station.into_inner()?, Came { raised, empty, late }))
        };
        (self.places.into_iter().filter_map(came), self.sender.station.into_inner())
    }

    /// The NIC, before anything is shared.
    pub fn station(&mut self, number: usize) -> Option<&mut Station> {
        self.places[number].station.get_mut().as_mut()
    }

    /// Sends a frame to NIC `number`, if not too many are under way to it, and nobody else is just
    /// sending one.
    pub fn send(&self, number: usize) {
        let Sender { station, busy, pauses, count } = &self.sender;
        if busy.swap(true, Ordering::SeqCst) {
            return;
        }
        let Place { mac, sent, got, .. } = &self.places[number];
        let frame = sent.load(Ordering::Relaxed);
        if !pauses.load(Ordering::SeqCst)
            && frame < *count
            && frame - got.load(Ordering::Acquire) < AHEAD
        {
            // SAFETY: nobody else is at it.
            let station = unsafe { &mut *station.get() };
            if let Err(error) = station.send(*mac, frame, 60) {
                panic!("{error}");
            }
            sent.store(frame + 1, Ordering::Release);
        }
        busy.store(false, Ordering::SeqCst);
    }

    /// From now on nothing is sent and no line is masked, or both again. On processor 0.
    pub fn pause(&self, pauses: bool) {
        self.sender.pauses.store(pauses, Ordering::SeqCst);
        while pauses && self.sender.busy.load(Ordering::SeqCst) {
            spin_loop();
        }
    }

    /// Frames that were sent to NIC `number`.
    pub fn sent(&self, number: usize) -> u64 {
        self.places[number].sent.load(Ordering::Acquire)
    }

    /// Frames that have come to NIC `number`.
    pub fn got(&self, number: usize) -> u64 {
        self.places[number].got.load(Ordering::Acquire)
    }

    /// Has handlers use these pages while `run` runs. `settle` is to return when every handler that
    /// had begun on another processor has ended.
    pub fn share<T>(&self, run: impl FnOnce() -> T, settle: impl FnOnce()) -> T {
        SHARED.store(ptr::from_ref(self).cast_mut(), Ordering::Release);
        let outcome = run();
        SHARED.store(ptr::null_mut(), Ordering::SeqCst);
        settle();
        outcome
    }

    /// Has a NIC lead to a line from now on. False: another one does.
    pub fn lead(&self, station: usize, to: Line) -> bool {
        let lead = &self.leads[to.cpu as usize][usize::from(to.number)];
        lead.compare_exchange(0, station as u8 + 1, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Moves what leads to line `from` by means of `carry`, on processor 0; behind it, nothing is
    /// taken there any more.
    pub fn relocate<T>(&self, from: Line, carry: impl FnOnce() -> T) -> T {
        self.moving.fetch_add(NEXT_MOVE | mark(from.cpu as usize, from.number), Ordering::SeqCst);
        let outcome = carry();
        self.moving.fetch_sub(mark(from.cpu as usize, from.number), Ordering::SeqCst);
        if from.cpu != 0 {
            // What was taken before has been looked at, when the processor is not just taking one.
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

    /// Asks for messages, on the processor of this number.
    pub fn arm(&self, me: usize) {
        cpu::interrupts(false);
        if self.with_page(me, |page| page.arm()) == Wanted::Pending {
            self.drain(me);
        }
        cpu::interrupts(true);
    }

    /// Asks for none any more.
    pub fn disarm(&self, me: usize) {
        cpu::interrupts(false);
        self.with_page(me, Controller::disarm);
        cpu::interrupts(true);
    }

    /// What another processor does: it masks a line for a while, sleeps until a message comes, and
    /// so on until it is told to stop.
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

    /// How many processors have begun to [`serve`](Self::serve).
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
            self.drain(me);
        }
        cpu::interrupts(true);
    }

    /// Takes lines, handles and ends them until there are none. With interrupts kept out, as they
    /// are again afterwards.
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

    /// Takes a line, and looks whether all is as it must be.
    fn take(&self, me: usize) -> Option<(u16, usize)> {
        let taking = &self.processors[me].taking;
        taking.fetch_add(1, Ordering::SeqCst);
        let before = self.moving.load(Ordering::SeqCst);
        let masked = self.with(me, |own| own.masked);
        // To unmask a line that is not masked changes nothing, and says whether it is pending.
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
            assert!(masked != Some(line), "processor {me}: line {line} was taken and is masked");
            let Some(station) = self.led_by(me, line) else {
                panic!("processor {me}: line {line} was taken, and nothing leads to it");
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
                own.in_service[own.depth] = line;
                own.depth += 1;
            });
            (line, station)
        });
        if let Some(most) = most.filter(|most| line < Some(*most)) {
            // A move takes a pending line away.
            let moved = before != after || before % NEXT_MOVE == mark(me, most);
            assert!(moved, "processor {me}: {line:?} was taken while line {most} was pending");
        }
        taking.fetch_add(1, Ordering::SeqCst);
        station
    }

    /// The NIC that leads to a line.
    fn led_by(&self, me: usize, line: u16) -> Option<usize> {
        usize::from(self.leads[me][usize::from(line)].load(Ordering::SeqCst)).checked_sub(1)
    }

    /// Looks at a NIC, or has the one do it that is at it already: perhaps a handler that this one
    /// has interrupted.
    fn attend(&self, station: usize) {
        let place = &self.places[station];
        if place.claims.fetch_add(1, Ordering::AcqRel) > 0 {
            return;
        }
        loop {
            let claims = place.claims.load(Ordering::Acquire);
            // SAFETY: the first claim is ours.
            let station = unsafe { &mut *place.station.get() };
            place.look(station.as_mut().expect("a line of a NIC that is not there"));
            if place.claims.compare_exchange(claims, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            {
                return;
            }
        }
    }

    /// Now and then gives more urgent lines of this processor a reason to interrupt, and time.
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

    /// What this processor has for itself. With interrupts kept out; `f` calls nothing that comes
    /// here.
    fn with<T>(&self, me: usize, f: impl FnOnce(&mut Own) -> T) -> T {
        // SAFETY: nobody else uses it.
        f(unsafe { &mut *self.processors[me].own.get() })
    }

    fn with_page<T>(&self, me: usize, f: impl FnOnce(&mut Controller<FlatHal>) -> T) -> T {
        self.with(me, |own| f(own.page.as_mut().expect("a processor without its page")))
    }
}

/// What a move adds to [`Pages::moving`].
const NEXT_MOVE: u64 = 1 << 32;

/// What it adds while it is under way.
fn mark(processor: usize, line: u16) -> u64 {
    1 << 31 | (processor as u64) << 16 | u64::from(line)
}

impl Place {
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
