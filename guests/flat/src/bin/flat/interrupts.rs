//! Test `interrupts`: what an interrupt costs, by how it is ended.

use crate::hal::FlatHal;
use crate::net::{FRAME, Station};
use crate::report::{Failure, Outcome, ensure, line};
use crate::traps::End;
use crate::{Setting, apic, clock, cpu, hyperv, kvm, mark, traps};

/// How the interrupts of a round end.
#[derive(Clone, Copy)]
enum Way {
    /// A message, ended by the APIC's register.
    Msi,
    /// A message, ended by KVM's bit in memory.
    PvEoi,
    /// A message to a synthetic interrupt source of Hyper-V's interface, which ends by itself.
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
}

/// Sends `count=` frames from one NIC to the other, one at a time, and sleeps until the interrupt of each.
pub fn run<'a>(setting: &Setting<'a>) -> Outcome<'a> {
    let count = setting.number("count", 2000);
    let mut nics = setting.on_switch();
    let (Some(a), Some(b)) = (nics.next(), nics.next()) else { return Err(Failure::Said("no two NICs on a switch")) };
    let pv_eoi = apic::is_x2apic() && kvm::features().is_some_and(|features| features.pv_eoi);
    let sint = b.function()?.synthetic_interrupts();
    rounds(&a, &b, Way::Msi, count)?;
    if pv_eoi {
        kvm::pv_eoi(true);
        let outcome = rounds(&a, &b, Way::PvEoi, count);
        kvm::pv_eoi(false);
        outcome?;
    }
    if let Some(record) = sint {
        let b = b.with_messages_at(record.offset(hyperv::processor()));
        rounds(&a, &b, Way::Sint, count)?;
    }
    Ok(())
}

fn rounds<'a>(a: &FlatHal, b: &FlatHal, way: Way, count: u64) -> Outcome<'a> {
    let first = apic::next_vector();
    let (mut a, mut b) = (Station::open(a)?, Station::open(b)?);
    match way {
        Way::Msi => traps::set_end(b.vector, apic::by_register()),
        Way::PvEoi => traps::set_end(b.vector, End::Paravirtual),
        Way::Sint => {
            traps::set_end(b.vector, End::Automatic);
            hyperv::enable_sint(b.vector);
        }
    }
    let to = b.nic.config().mac;
    let mut got = [0; FRAME];
    // Until the switch knows where to send them.
    for number in 0..10 {
        a.send(to, number, 60)?;
        b.receive(&mut got)?;
    }
    let counts = |a: &Station, b: &Station| {
        [traps::taken(a.vector), traps::taken(b.vector), traps::ended_by_register(), cpu::sleeps(), a.rung + b.rung]
    };
    let before = counts(&a, &b);
    let began = clock::now();
    let from = mark::set();
    for number in 0..count {
        a.send(to, number, 60)?;
        b.receive(&mut got)?;
    }
    let mark = mark::set();
    let ns = (clock::now() - began) / count.max(1);
    let after = counts(&a, &b);
    let [of_a, of_b, by_register, sleeps, rung] = core::array::from_fn(|i| after[i] - before[i]);
    for station in [a, b] {
        station.nic.close();
    }
    for vector in first..apic::next_vector() {
        traps::set_end(vector, apic::by_register());
    }
    apic::reuse(first);
    ensure(of_a == 0, "the sender was interrupted")?;
    line("interrupts")
        .value("ok", true)
        .text("way", way.name())
        .value("count", count)
        .value("interrupts", of_b)
        .value("ended-by-register", by_register)
        .value("sleeps", sleeps)
        .value("doorbells", rung)
        .value("from", from)
        .value("to", mark)
        .value("ns", ns)
        .end();
    Ok(())
}
