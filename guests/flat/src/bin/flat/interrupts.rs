// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Test `interrupts`: the cost of an interrupt, by how it arrives and how it is ended.

use vbus_shm::abi::class;

use crate::hal::FlatHal;
use crate::lines::Lines;
use crate::net::Station;
use crate::report::{Failure, Outcome, ensure, line};
use crate::stream::{RECEIVERS_MAX, Rate, Stream};
use crate::ways::Way;
use crate::{Setting, apic, clock, cpu, hyperv, kvm, mark, traps};

/// Frames for each receiver before the first mark, so that the switch learns addresses, and
/// emulated processors translate the code.
const WARM: u64 = 10;

/// How often all receivers raise their lines together.
const GATHERINGS: u64 = 40;

impl Way {
    /// Makes the messages of `hal` arrive this way, on a vector of their own. Returns the vector.
    fn set_up<'a>(self, hal: &FlatHal, number: u32) -> Result<(FlatHal, u8), Failure<'a>> {
        let vector = apic::vector();
        traps::set_end(vector, self.end());
        if let Way::Sint = self {
            let record = hal
                .function()?
                .synthetic_interrupts()
                .ok_or(Failure::Said("no synthetic interrupts"))?;
            hyperv::enable_sint(number, vector);
            return Ok((hal.with_messages_at(record.offset(hyperv::processor()), number), vector));
        }
        Ok((hal.clone(), vector))
    }
}

/// Sends `count=` frames from the first NIC on a switch to the next `receivers=` ones at each rate
/// in `rate=`, and sleeps whenever there is nothing to do. Does this once for each way, and again
/// by the interrupt controller of the bus, if there is one. With the controller, the receivers then
/// raise their lines together (report `gathered`, see [`Lines::gather`]).
pub fn run<'a>(setting: &Setting<'a>) -> Outcome<'a> {
    let pic = setting.of_class(class::PIC).next();
    let first = setting.on_switch().next().ok_or(Failure::Said("no NIC on a switch"))?;
    for way in Way::there(&first) {
        one_way(setting, way, None)?;
        if let Some(pic) = &pic {
            one_way(setting, way, Some(pic))?;
        }
    }
    Ok(())
}

fn one_way<'a>(setting: &Setting<'a>, way: Way, pic: Option<&FlatHal>) -> Outcome<'a> {
    if let Way::PvEoi = way {
        kvm::pv_eoi(true);
    }
    let first = apic::next_vector();
    let outcome = rounds(setting, way, pic);
    for vector in first..apic::next_vector() {
        traps::set_end(vector, apic::by_register());
    }
    apic::reuse(first);
    match way {
        Way::Msi => {}
        Way::PvEoi => kvm::pv_eoi(false),
        Way::Sint => hyperv::disable_sints(),
    }
    outcome
}

/// The present counts.
fn counts() -> [u64; 3] {
    [traps::taken(), traps::ended_by_register(), cpu::sleeps()]
}

fn rounds<'a>(setting: &Setting<'a>, way: Way, pic: Option<&FlatHal>) -> Outcome<'a> {
    let count = setting.number("count", 2000);
    let wanted = usize::try_from(setting.number("receivers", 1))
        .map_or(RECEIVERS_MAX, |n| n.min(RECEIVERS_MAX));
    let mut nics = setting.on_switch();
    let sender = nics.next().ok_or(Failure::Said("no NIC on a switch"))?;
    let mut sender = Station::open(&sender, apic::vector())?;
    let mut stations = [const { None }; RECEIVERS_MAX];
    let mut receivers = 0;
    for (place, hal) in stations.iter_mut().zip(nics.take(wanted)) {
        // A routed NIC sends no messages, but it needs a valid vector nevertheless.
        let (hal, vector) =
            if pic.is_some() { (hal, apic::vector()) } else { way.set_up(&hal, receivers)? };
        *place = Some(Station::open(&hal, vector)?);
        receivers += 1;
    }
    ensure(
        receivers as usize == wanted && wanted > 0,
        "not as many NICs on the switch as receivers=",
    )?;
    let mut lines = match pic {
        Some(hal) => {
            let (hal, vector) = way.set_up(hal, 0)?;
            Some(Lines::open(&hal, vector, &stations)?)
        }
        None => None,
    };
    for name in setting.words.list("rate", "burst") {
        let mut stream = Stream::new(Rate::new(name)?, u64::from(receivers));
        let mut drain = || lines.as_mut().map_or(0, Lines::drain);
        stream.carry(WARM * u64::from(receivers), &mut sender, &mut stations, &mut drain)?;
        let (rung_before, taken_before) = (rung(&sender, &stations), stream.drained);
        let began = clock::now();
        let (from, counted) = mark::set_with(counts);
        stream.carry(count, &mut sender, &mut stations, &mut drain)?;
        let (to, after) = mark::set_with(counts);
        let ns = (clock::now() - began) / count.max(1);
        let [taken, by_register, sleeps] = core::array::from_fn(|i| after[i] - counted[i]);
        line("interrupts")
            .value("ok", true)
            .text("way", way.name())
            .value("pic", pic.is_some())
            .text("rate", name)
            .value("receivers", receivers)
            .value("count", count)
            .value("interrupts", taken)
            .value("lines", stream.drained - taken_before)
            .value("ended-by-register", by_register)
            .value("sleeps", sleeps)
            .value("doorbells", rung(&sender, &stations) - rung_before)
            .value("from", from)
            .value("to", to)
            .value("ns", ns)
            .end();
    }
    if let Some(mut lines) = lines {
        let before = traps::ended_by_register();
        let messages = lines.gather(&mut sender, &mut stations, GATHERINGS)?;
        line("gathered")
            .value("ok", true)
            .text("way", way.name())
            .value("receivers", receivers)
            .value("rounds", GATHERINGS)
            .value("messages", messages)
            .value("ended-by-register", traps::ended_by_register() - before)
            .end();
        lines.close()?;
    }
    sender.nic.close();
    for station in stations.into_iter().flatten() {
        station.nic.close();
    }
    Ok(())
}

fn rung(sender: &Station, stations: &[Option<Station>]) -> u64 {
    sender.rung + stations.iter().flatten().map(|station| station.rung).sum::<u64>()
}
