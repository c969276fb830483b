//! Test `interrupts`: what an interrupt costs, by how it arrives and how it is ended.

use vbus_driver::pic::{Controller, Line, Nesting, Pic, Source};
use vbus_shm::abi::class;
use vbus_shm::signal::Armed;

use crate::hal::FlatHal;
use crate::net::{FRAME, Station};
use crate::report::{Failure, Outcome, ensure, line};
use crate::traps::End;
use crate::{Setting, apic, clock, cpu, hyperv, kvm, mark, traps};

/// The most receivers.
const RECEIVERS_MAX: usize = 16;
const BROADCAST: [u8; 6] = [0xff; 6];
/// Frames before the first mark: the switch learns, and the processors of emulated machines translate.
const WARM: u64 = 10;

/// How messages end.
#[derive(Clone, Copy)]
enum Way {
    /// By the APIC's register.
    Msi,
    /// By KVM's bit in memory.
    PvEoi,
    /// By themselves: they go to a synthetic interrupt source of Hyper-V's interface.
    Sint,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Msi => "msi",
            Way::PvEoi => "pv_eoi",
            Way::Sint => "sint",
        }
    }

    /// Whether there is such a thing here.
    fn is_there(self, hal: &FlatHal) -> bool {
        match self {
            Way::Msi => true,
            Way::PvEoi => apic::is_x2apic() && kvm::features().is_some_and(|features| features.pv_eoi),
            Way::Sint => matches!(hal.function(), Ok(function) if function.synthetic_interrupts().is_some()),
        }
    }

    /// Has the messages of `hal` arrive this way, on a vector of their own, which is returned.
    fn set_up<'a>(self, hal: &FlatHal, number: u32) -> Result<(FlatHal, u8), Failure<'a>> {
        let vector = apic::vector();
        let mut hal = hal.clone();
        match self {
            Way::Msi => traps::set_end(vector, apic::by_register()),
            Way::PvEoi => traps::set_end(vector, End::Paravirtual),
            Way::Sint => {
                let record = hal.function()?.synthetic_interrupts().ok_or(Failure::Said("no synthetic interrupts"))?;
                traps::set_end(vector, End::Automatic);
                hyperv::enable_sint(number, vector);
                hal = hal.with_messages_at(record.offset(hyperv::processor()), number);
            }
        }
        Ok((hal, vector))
    }
}

/// Sends `count=` frames from the first NIC on a switch to the next `receivers=` ones, one at a time, and sleeps until each of these has been
/// interrupted for it. Once for each way, then by the interrupt controller of the bus, if there is one.
pub fn run<'a>(setting: &Setting<'a>) -> Outcome<'a> {
    let pic = setting.of_class(class::PIC).next();
    for way in [Way::Msi, Way::PvEoi, Way::Sint] {
        let Some(first) = setting.on_switch().next() else { break };
        if way.is_there(&first) {
            rounds(setting, way, None)?;
            if let Some(pic) = &pic {
                rounds(setting, way, Some(pic))?;
            }
        }
    }
    Ok(())
}

fn rounds<'a>(setting: &Setting<'a>, way: Way, pic: Option<&FlatHal>) -> Outcome<'a> {
    if let Way::PvEoi = way {
        kvm::pv_eoi(true);
    }
    let first = apic::next_vector();
    let outcome = between(setting, way, pic);
    for vector in first..apic::next_vector() {
        traps::set_end(vector, apic::by_register());
    }
    apic::reuse(first);
    if let Way::PvEoi = way {
        kvm::pv_eoi(false);
    }
    outcome
}

/// What is counted.
fn counts() -> [u64; 3] {
    [traps::taken(), traps::ended_by_register(), cpu::sleeps()]
}

fn between<'a>(setting: &Setting<'a>, way: Way, pic: Option<&FlatHal>) -> Outcome<'a> {
    let count = setting.number("count", 2000);
    let wanted = usize::try_from(setting.number("receivers", 1)).map_or(RECEIVERS_MAX, |n| n.min(RECEIVERS_MAX));
    let mut nics = setting.on_switch();
    let sender = nics.next().ok_or(Failure::Said("no NIC on a switch"))?;
    let mut sender = Station::open(&sender, apic::vector())?;
    let mut stations = [const { None }; RECEIVERS_MAX];
    let mut receivers = 0;
    for (place, hal) in stations.iter_mut().zip(nics.take(wanted)) {
        // Messages of a NIC that is routed go nowhere; its vector has to be one all the same.
        let number = receivers as u32 + hyperv::SINT;
        let (hal, vector) = if pic.is_some() { (hal, apic::vector()) } else { way.set_up(&hal, number)? };
        *place = Some(Station::open(&hal, vector)?);
        receivers += 1;
    }
    ensure(receivers == wanted, "not as many NICs on the switch as receivers=")?;
    let mut lines = match pic {
        Some(hal) => Some(Lines::open(way, hal, &stations)?),
        None => None,
    };
    let to = match stations.iter().flatten().next() {
        Some(only) if receivers == 1 => only.nic.config().mac,
        _ => BROADCAST,
    };

    for number in 0..WARM {
        sender.send(to, number, 60)?;
        everywhere(&mut stations, lines.as_mut(), number)?;
    }
    let counted = counts();
    let rung_before = rung(&sender, &stations);
    let lines_before = lines.as_ref().map_or(0, |lines| lines.taken);
    let began = clock::now();
    let from = mark::set();
    for number in WARM..WARM + count {
        sender.send(to, number, 60)?;
        everywhere(&mut stations, lines.as_mut(), number)?;
    }
    let to = mark::set();
    let ns = (clock::now() - began) / count.max(1);
    let after = counts();
    let [taken, by_register, sleeps] = core::array::from_fn(|i| after[i] - counted[i]);
    let rung = rung(&sender, &stations) - rung_before;
    let raised = lines.as_ref().map(|lines| lines.taken - lines_before);

    if let Some(lines) = lines {
        lines.close()?;
    }
    sender.nic.close();
    for station in stations.into_iter().flatten() {
        station.nic.close();
    }
    let report = line("interrupts").value("ok", true).text("way", way.name()).value("pic", pic.is_some());
    report
        .value("receivers", receivers)
        .value("count", count)
        .value("interrupts", taken)
        .value("lines", raised.unwrap_or(0))
        .value("ended-by-register", by_register)
        .value("sleeps", sleeps)
        .value("doorbells", rung)
        .value("from", from)
        .value("to", to)
        .value("ns", ns)
        .end();
    Ok(())
}

fn rung(sender: &Station, stations: &[Option<Station>]) -> u64 {
    sender.rung + stations.iter().flatten().map(|station| station.rung).sum::<u64>()
}

/// Waits until frame `number` has come to all of `stations`.
fn everywhere<'a>(stations: &mut [Option<Station>], mut lines: Option<&mut Lines>, number: u64) -> Outcome<'a> {
    let mut got = [0; FRAME];
    let mut has = [false; RECEIVERS_MAX];
    loop {
        let before = traps::taken();
        if let Some(lines) = &mut lines {
            lines.drain();
        }
        let (mut missing, mut missed) = (false, false);
        for (station, has) in stations.iter_mut().flatten().zip(&mut has).filter(|(_, has)| !**has) {
            while !*has && station.try_receive(&mut got)?.is_some() {
                // Others are not for it, or come from a switch that has not learnt yet.
                *has = Station::number(&got) == number as u8;
            }
            if !*has {
                missing = true;
                missed |= station.rx.arm(0) != Armed::Waiting;
            }
        }
        if !missing {
            return Ok(());
        }
        if !missed {
            apic::wait(before);
        }
    }
}

/// The interrupt controller of the bus, with a line for each station.
struct Lines {
    pic: Pic<FlatHal>,
    page: Controller<FlatHal>,
    /// Lines taken.
    taken: u64,
}

impl Lines {
    fn open<'a>(way: Way, hal: &FlatHal, stations: &[Option<Station>]) -> Result<Lines, Failure<'a>> {
        const LINES: u16 = 32;
        let (hal, vector) = way.set_up(hal, hyperv::SINT)?;
        hal.enable_messages(&[vector]).ok_or(Failure::Said("the interrupt controller has no messages"))?;
        let mut pic = Pic::open(hal.function()?)?;
        let page = pic.cpu(0, LINES, Nesting::Flat, 0)?;
        for (number, station) in (0..).zip(stations.iter().flatten()) {
            let info = station.nic.function().info();
            let from = Source { device: info.name.as_str(), vector: station.queues };
            pic.route(from, Line { cpu: 0, number })?;
        }
        let mut lines = Lines { pic, page, taken: 0 };
        lines.drain();
        Ok(lines)
    }

    /// Takes and ends all lines. What they stand for is looked at afterwards: every station that waits for something.
    fn drain(&mut self) {
        while let Some(line) = self.page.take() {
            self.page.end(line);
            self.taken += 1;
        }
    }

    fn close<'a>(mut self) -> Outcome<'a> {
        self.pic.remove(self.page)?;
        self.pic.close();
        Ok(())
    }
}
