// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The interrupt controller of the bus, and test `pic`: its masks and priorities.

use vbus_driver::pic::{Controller, Line, Nesting, Pic, Source, Wanted};
use vbus_shm::abi::class;
use vbus_shm::signal::Armed;

use crate::hal::FlatHal;
use crate::net::{FRAME, Station};
use crate::report::{Failure, Outcome, ensure, line};
use crate::{Setting, apic, clock, cpu, traps};

/// How long a line may take to become pending, in nanoseconds.
const TIMEOUT: u64 = 60_000_000_000;
const BROADCAST: [u8; 6] = [0xff; 6];

/// The interrupt controller of the bus, with a line for each station.
pub struct Lines {
    pic: Pic<FlatHal>,
    page: Controller<FlatHal>,
}

impl Lines {
    /// Opens the controller with its messages on `vector`, and routes the queues of station n to
    /// line n.
    pub fn open<'a>(
        hal: &FlatHal,
        vector: u8,
        stations: &[Option<Station>],
    ) -> Result<Lines, Failure<'a>> {
        const LINES: u16 = 32;
        hal.enable_messages(&[vector])
            .ok_or(Failure::Said("the interrupt controller has no messages"))?;
        let mut pic = Pic::open(hal.function()?)?;
        let page = pic.cpu(0, LINES, Nesting::Flat, 0)?;
        for (number, station) in (0..).zip(stations.iter().flatten()) {
            let info = station.nic.function().info();
            let from = Source { device: info.name.as_str(), vector: station.queues };
            pic.route(from, Line { cpu: 0, number })?;
        }
        let mut lines = Lines { pic, page };
        lines.drain();
        Ok(lines)
    }

    /// Takes and ends all lines. Returns how many. The caller then checks every station that waits
    /// for something.
    pub fn drain(&mut self) -> u64 {
        let mut count = 0;
        while let Some(line) = self.page.take() {
            self.page.end(line);
            count += 1;
        }
        count
    }

    /// Makes every station raise its line while this processor keeps interrupts out, `rounds`
    /// times. Takes the lines when all of them are pending. Returns the number of messages that
    /// came.
    ///
    /// The device may send one message for each level that the page has published. The page
    /// publishes no level before the driver takes lines, so each round has one message, whatever
    /// the speed of the devices is.
    pub fn gather<'a>(
        &mut self,
        sender: &mut Station,
        stations: &mut [Option<Station>],
        rounds: u64,
    ) -> Result<u64, Failure<'a>> {
        let count = stations.iter().flatten().count() as u64;
        let first = traps::taken();
        for number in 0..rounds {
            // A line of earlier traffic may still come. Its message is the one of this round if it
            // comes after the level that this call publishes.
            let before = traps::taken();
            self.drain();
            cpu::interrupts(false);
            let raised = raise(sender, stations, number)
                .and_then(|()| (0..count as u16).try_for_each(|line| self.await_pending(line)));
            cpu::interrupts(true);
            raised?;
            apic::wait(before);
            ensure(self.drain() >= count, "not all pending lines were taken")?;
            stations.iter_mut().flatten().try_for_each(await_frame)?;
        }
        Ok(traps::taken() - first)
    }

    /// Waits until a line that is not masked is pending.
    fn await_pending<'a>(&mut self, line: u16) -> Outcome<'a> {
        let began = clock::now();
        // Unmasking an unmasked line changes nothing, and returns whether the line is pending.
        while self.page.unmask(line) != Wanted::Pending {
            ensure(clock::now() - began < TIMEOUT, "a line does not become pending")?;
        }
        Ok(())
    }

    /// Ends the routes: the stations use their own interrupts again.
    pub fn close<'a>(mut self) -> Outcome<'a> {
        self.pic.remove(self.page)?;
        self.pic.close();
        Ok(())
    }
}

/// Makes two NICs raise a line each, `count=` times in turn. Checks that the driver takes no masked
/// line, that an unmasked line wakes the processor, and that the driver takes the more urgent of
/// two pending lines first. Then the stations use their own interrupts again.
pub fn run<'a>(setting: &Setting<'a>) -> Outcome<'a> {
    let rounds = setting.number("count", 2000).min(200);
    let pic = setting.of_class(class::PIC).next().ok_or(Failure::Said("no device of class pic"))?;
    let mut nics = setting.on_switch();
    let (Some(a), Some(b), Some(c)) = (nics.next(), nics.next(), nics.next()) else {
        return Err(Failure::Said("no three NICs on a switch"));
    };
    let first = apic::next_vector();
    let mut sender = Station::open(&a, apic::vector())?;
    let mut stations =
        [Some(Station::open(&b, apic::vector())?), Some(Station::open(&c, apic::vector())?)];
    let mut lines = Lines::open(&pic, apic::vector(), &stations)?;
    for number in 0..rounds {
        // While both lines are masked, both become pending, and the driver takes neither.
        let both = |page: &mut Controller<FlatHal>| {
            wait_pending(page, 0).and_then(|()| wait_pending(page, 1))
        };
        lines.page.mask(0);
        lines.page.mask(1);
        raise(&mut sender, &mut stations, number)?;
        both(&mut lines.page)?;
        ensure(lines.page.take().is_none(), "a masked line was taken")?;
        // Unmask the less urgent line alone, then the other one.
        for line in [0, 1] {
            ensure(lines.page.unmask(line) == Wanted::Pending, "a line is not pending any more")?;
            ensure(lines.page.take() == Some(line), "an unmasked line was not taken")?;
            lines.page.end(line);
        }
        collect(&mut stations)?;
        // Unmask both: the driver takes the more urgent one first.
        lines.page.mask(0);
        lines.page.mask(1);
        raise(&mut sender, &mut stations, number)?;
        both(&mut lines.page)?;
        let _ = (lines.page.unmask(0), lines.page.unmask(1));
        let taken = [(); 2].map(|()| {
            let taken = lines.page.take();
            taken.into_iter().for_each(|line| lines.page.end(line));
            taken
        });
        ensure(
            taken == [Some(1), Some(0)],
            "two lines were not taken in the order of their urgency",
        )?;
        ensure(lines.page.take().is_none(), "a line was taken twice")?;
        // Both are unmasked and drained: the next line wakes the processor.
        collect(&mut stations)?;
        let before = traps::taken();
        raise(&mut sender, &mut stations, number)?;
        apic::wait(before);
        let mut missing = 2;
        while missing > 0 {
            let before = traps::taken();
            missing -= lines.drain().min(missing);
            if missing > 0 {
                apic::wait(before);
            }
        }
        collect(&mut stations)?;
    }
    lines.close()?;
    sender.nic.close();
    stations.into_iter().flatten().for_each(|station| drop(station.nic.close()));
    apic::reuse(first);
    line("pic").value("ok", true).value("rounds", rounds).end();
    Ok(())
}

/// Makes every station interrupt for a frame.
fn raise<'a>(sender: &mut Station, stations: &mut [Option<Station>], number: u64) -> Outcome<'a> {
    for station in stations.iter_mut().flatten() {
        ensure(station.rx.arm(0) == Armed::Waiting, "a frame that nobody has sent")?;
    }
    sender.send(BROADCAST, number, 60)
}

/// Takes the frame of every station. The frame has arrived before its line was raised.
fn collect<'a>(stations: &mut [Option<Station>]) -> Outcome<'a> {
    let mut frame = [0; FRAME];
    for station in stations.iter_mut().flatten() {
        ensure(station.try_receive(&mut frame)?.is_some(), "a line without its frame")?;
    }
    Ok(())
}

/// Waits for the frame of a station, and takes it.
fn await_frame<'a>(station: &mut Station) -> Outcome<'a> {
    let (began, mut frame) = (clock::now(), [0; FRAME]);
    while station.try_receive(&mut frame)?.is_none() {
        ensure(clock::now() - began < TIMEOUT, "a frame does not arrive")?;
    }
    Ok(())
}

/// Waits until a masked line is pending, and leaves it masked.
fn wait_pending<'a>(page: &mut Controller<FlatHal>, line: u16) -> Outcome<'a> {
    let began = clock::now();
    loop {
        let wanted = page.unmask(line);
        page.mask(line);
        if wanted == Wanted::Pending {
            return Ok(());
        }
        ensure(clock::now() - began < TIMEOUT, "a line does not become pending")?;
    }
}
