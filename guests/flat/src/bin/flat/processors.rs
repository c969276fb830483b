// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Test `processors`: devices raise lines of a `pic` while the guest masks the lines and moves them
//! between processors all the time.
//!
//! The first processor sends frames to some NICs, and moves their lines from one processor and
//! priority to another. Only the handler of its line checks and arms a NIC, and a NIC interrupts
//! once each time that it is armed. So if an interrupt is lost, the NIC stops for ever.
//! [`crate::pages`] makes all other checks, each time that a handler takes a line.

use core::array;
use core::fmt::{self, Display};
use core::hint::spin_loop;
use core::mem;
use core::sync::atomic::{AtomicU32, Ordering};

use flat::dice::Dice;
use flat::pci::{Message, Messages};
use vbus_driver::Name;
use vbus_driver::pic::{Line, Nesting, Pic, Source};
use vbus_shm::abi::class;
use vbus_shm::signal::Armed;

use crate::cpu::CPUS_MAX;
use crate::hal::FlatHal;
use crate::net::Station;
use crate::pages::{Came, LINES, Pages, STATIONS_MAX, Tally};
use crate::report::{Failure, Outcome, ensure, line};
use crate::ways::Way;
use crate::{Setting, apic, clock, hyperv, kvm, pages, smp, traps};

/// How long a frame may take to arrive, in nanoseconds.
const TIMEOUT: u64 = 30_000_000_000;
/// How long a round may try to bring about what depends on the speed of the machine, in
/// nanoseconds. A round of the usual length takes a second.
const PATIENCE: u64 = 60_000_000_000;
/// The most frames at a time.
const BURST: u64 = 16;
/// The synthetic interrupt source of each processor.
const SINT: u32 = 0;

/// Sends `count=` frames to each of `receivers=` NICs, for each way to end messages, with handlers
/// that more urgent lines interrupt and with handlers that run with interrupts disabled. On a slow
/// machine some things occur rarely, such as a move of a pending line. So a round goes on until all
/// have occurred, or until [`PATIENCE`] has passed.
pub fn run<'a>(setting: &Setting<'a>) -> Outcome<'a> {
    let pic = setting.of_class(class::PIC).next().ok_or(Failure::Said("no device of class pic"))?;
    let unused = apic::next_vector();
    // Each way has vectors of its own, so that a program outside can count the ends of each.
    let vectors = [(); Way::COUNT].map(|()| [(); CPUS_MAX].map(|()| apic::vector()));
    for (way, vectors) in Way::there(&pic).zip(&vectors) {
        for vector in vectors {
            traps::set_end(*vector, way.end());
            traps::set_handler(*vector, Some(pages::interrupt));
        }
        for nesting in [Nesting::Flat, Nesting::Nested] {
            let first = apic::next_vector();
            round(setting, &pic, way, vectors, nesting)?;
            apic::reuse(first);
        }
        for vector in vectors {
            traps::set_handler(*vector, None);
            traps::set_end(*vector, apic::by_register());
        }
    }
    apic::reuse(unused);
    Ok(())
}

fn round<'a>(
    setting: &Setting<'a>,
    pic: &FlatHal,
    way: Way,
    vectors: &[u8; CPUS_MAX],
    nesting: Nesting,
) -> Outcome<'a> {
    let count = setting.number("count", 2000);
    let wanted = usize::try_from(setting.number("receivers", 1))
        .map_or(STATIONS_MAX, |n| n.min(STATIONS_MAX));
    let cpus = smp::count();
    let mut nics = setting.on_switch();
    let sender = nics.next().ok_or(Failure::Said("no NIC on a switch"))?;
    let mut pages = Pages::new(nesting, Station::open(&sender, apic::vector())?, count);
    for hal in nics.take(wanted) {
        pages.add_station(Station::open(&hal, apic::vector())?);
    }
    let stations = pages.stations();
    ensure(stations == wanted && stations > 0, "not as many NICs on the switch as receivers=")?;

    // Every processor prepares for its messages. Messages of synthetic interrupts need the
    // hypervisor's number of the processor.
    let numbers = [const { AtomicU32::new(0) }; CPUS_MAX];
    everywhere(&|number| match way {
        Way::Msi => {}
        Way::PvEoi => kvm::pv_eoi(true),
        Way::Sint => {
            numbers[number as usize].store(hyperv::processor(), Ordering::Relaxed);
            hyperv::enable_sint(SINT, vectors[number as usize]);
        }
    });
    let sints = pic.function()?.synthetic_interrupts();
    let message = |number: u32| match (way, sints) {
        (Way::Sint, Some(record)) => {
            let address = record.offset(numbers[number as usize].load(Ordering::Relaxed));
            Message { address: address as u32, data: SINT }
        }
        _ => apic::message(number, vectors[number as usize]),
    };
    let messages = pic.send_messages((0..cpus).map(message));
    let each =
        matches!(messages, Some(Messages::Msix { entries, .. }) if u32::from(entries) >= cpus);
    ensure(
        each || (messages.is_some() && cpus == 1),
        "the interrupt controller has no message for each processor",
    )?;

    let mut pic = Pic::open(pic.function()?)?;
    for number in 0..cpus {
        pages.set_page(number, pic.cpu(number, LINES, nesting, number as u16)?);
    }
    let mut traffic =
        Traffic { cpus, routes: [None; STATIONS_MAX], moves: 0, carried: 0, dice: Dice::new(99) };
    for station in 0..stations {
        let to = Line { cpu: station as u32 % cpus, number: station as u16 };
        ensure(pages.lead(station, to), "a line that is not free")?;
        let nic = pages.station(station).ok_or(Failure::Said("no such NIC"))?;
        let route = Route { device: nic.nic.function().info().name, vector: nic.queues, to };
        pic.route(route.source(), to)?;
        ensure(nic.rx.arm(0) == Armed::Waiting, "a frame that nobody has sent")?;
        traffic.routes[station] = Some(route);
    }
    let before: [_; CPUS_MAX] =
        array::from_fn(|number| traps::counts(number as u32, vectors[number]));
    let serve = |number| pages.serve(number as usize);
    let drive = || {
        pages.arm(0);
        let outcome = traffic.carry(&pages, &mut pic);
        pages.disarm(0);
        pages.stop();
        smp::wake();
        outcome
    };
    // A processor that runs a new job has left its handlers.
    pages.share(|| smp::together(&serve, drive), || smp::together(&|_| (), || ()))?;

    let (mut tallies, mut came) = ([Tally::default(); CPUS_MAX], [Came::default(); STATIONS_MAX]);
    for number in 0..cpus {
        let (page, tally) = pages.take_page(number);
        tallies[number as usize] = tally;
        page.map_or(Ok(()), |page| pic.remove(page))?;
    }
    pic.close();
    let sent = pages.count();
    let (places, sender) = pages.into_stations();
    for ((station, seen), came) in places.zip(&mut came) {
        *came = seen;
        station.nic.close();
    }
    sender.nic.close();
    everywhere(&|_| match way {
        Way::Msi => {}
        Way::PvEoi => kvm::pv_eoi(false),
        Way::Sint => hyperv::disable_sints(),
    });

    // All messages in flight have arrived.
    let counts: [_; CPUS_MAX] = array::from_fn(|number| {
        let (messages, by_register) = traps::counts(number as u32, vectors[number]);
        (messages - before[number].0, by_register - before[number].1)
    });
    let here = cpus as usize;
    let of = |field: fn(&Tally) -> u64| List(tallies[..here].iter().map(field));
    line("processors")
        .value("ok", true)
        .text("way", way.name())
        .value("nested", nesting == Nesting::Nested)
        .value("count", sent)
        .value("raised", List(came[..stations].iter().map(|came| came.raised)))
        .value("late", came.iter().map(|came| came.late).sum::<u64>())
        .value("empty", came.iter().map(|came| came.empty).sum::<u64>())
        .value("moves", traffic.moves)
        .value("moved-pending", traffic.carried)
        .value("apics", List((0..cpus).map(|number| apic::id(number).into())))
        .value("vectors", List(vectors[..here].iter().map(|vector| u64::from(*vector))))
        .value("messages", List(counts[..here].iter().map(|counts| counts.0)))
        .value("ended-by-register", List(counts[..here].iter().map(|counts| counts.1)))
        .value("taken", of(|tally| tally.taken))
        .value("interrupting", of(|tally| tally.nested))
        .value("chosen", of(|tally| tally.chosen))
        .value("masked", of(|tally| tally.masked))
        .value("held", of(|tally| tally.held))
        .end();
    Ok(())
}

/// Runs `job` on every processor, including this one.
fn everywhere(job: &(dyn Fn(u32) + Sync)) {
    smp::together(job, || job(0));
}

/// The route of a NIC's interrupts.
#[derive(Clone, Copy)]
struct Route {
    device: Name<32>,
    vector: u16,
    to: Line,
}

impl Route {
    fn source(&self) -> Source<'_> {
        Source { device: self.device.as_str(), vector: self.vector }
    }
}

/// The work of the first processor.
struct Traffic {
    cpus: u32,
    routes: [Option<Route>; STATIONS_MAX],
    moves: u64,
    /// Moves of a pending line.
    carried: u64,
    dice: Dice,
}

impl Traffic {
    /// Sends some frames at a time, while lines are moved and masked, and then waits until all have
    /// arrived. In the wait nothing is moved or masked, because that would make a processor check
    /// its page: only interrupts bring the frames.
    fn carry<'a>(&mut self, pages: &Pages, pic: &mut Pic<FlatHal>) -> Outcome<'a> {
        let began = clock::now();
        while pages.serving() < self.cpus - 1 {
            ensure(clock::now() - began < TIMEOUT, "another processor does not begin")?;
            spin_loop();
        }
        let began = clock::now();
        let more = pages.count();
        while !self.is_over(pages) {
            self.send_all(pages, pic)?;
            if !self.has_tried_all(pages) && clock::now() - began < PATIENCE {
                pages.add_frames(more);
            }
        }
        Ok(())
    }

    /// Whether all frames have been sent.
    fn is_over(&self, pages: &Pages) -> bool {
        (0..pages.stations()).all(|station| pages.sent(station) >= pages.count())
    }

    fn has_tried_all(&self, pages: &Pages) -> bool {
        self.carried > 0 && pages.has_tried_all(self.cpus)
    }

    /// Sends all frames and waits until they have arrived.
    fn send_all<'a>(&mut self, pages: &Pages, pic: &mut Pic<FlatHal>) -> Outcome<'a> {
        let stations = 0..pages.stations();
        while !self.is_over(pages) {
            // Sometimes send a single frame, so that no other frame causes its handling.
            let most = if self.dice.roll(3) == 0 { 1 } else { BURST };
            for _ in 0..=self.dice.roll(most) {
                let station = self.dice.roll(stations.len() as u64) as usize;
                // Perhaps this NIC has got all its frames, and others have not.
                let wants = |station: &usize| pages.sent(*station) < pages.count();
                let Some(station) = (station..stations.end).chain(0..station).find(wants) else {
                    break;
                };
                pages.send(station);
                if self.dice.roll(4) > 0 {
                    self.relocate(pages, pic)?;
                }
                if self.dice.roll(4) == 0 {
                    pages.mask_one(0);
                }
            }
            pages.pause(true);
            self.settle(pages, pic)?;
            pages.pause(false);
        }
        Ok(())
    }

    /// Waits until all sent frames have arrived.
    fn settle<'a>(&self, pages: &Pages, pic: &Pic<FlatHal>) -> Outcome<'a> {
        let began = clock::now();
        while let Some(station) =
            (0..pages.stations()).find(|station| pages.got(*station) < pages.sent(*station))
        {
            if clock::now() - began > TIMEOUT {
                let to = self.routes[station].map_or(Line { cpu: 0, number: 0 }, |route| route.to);
                line("processors")
                    .value("station", station)
                    .value("sent", pages.sent(station))
                    .value("got", pages.got(station))
                    .value("cpu", to.cpu)
                    .value("line", to.number)
                    .end();
                return Err(Failure::Said("an interrupt is lost: a NIC stands still"));
            }
            // This call takes a moment. If two virtual processors share a host processor, the other
            // one can run then.
            pic.function().check()?;
        }
        Ok(())
    }

    /// Moves a line to a random other line of a random processor.
    fn relocate<'a>(&mut self, pages: &Pages, pic: &mut Pic<FlatHal>) -> Outcome<'a> {
        let station = self.dice.roll(pages.stations() as u64) as usize;
        let Some(route) = &mut self.routes[station] else { return Ok(()) };
        let to = loop {
            let cpu = self.dice.roll(self.cpus.into()) as u32;
            let to = Line { cpu, number: self.dice.roll(LINES.into()) as u16 };
            if pages.lead(station, to) {
                break to;
            }
        };
        let from = mem::replace(&mut route.to, to);
        self.carried += u64::from(pages.relocate(from, || pic.relocate(route.source(), to))?);
        self.moves += 1;
        Ok(())
    }
}

/// Numbers, as a JSON array.
struct List<I>(I);

impl<I: Iterator<Item = u64> + Clone> Display for List<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut before = "[";
        self.0
            .clone()
            .try_for_each(|number| write!(f, "{}{number}", mem::replace(&mut before, ",")))?;
        f.write_str(if before == "[" { "[]" } else { "]" })
    }
}
