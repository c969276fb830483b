// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kind of doorbell that a driver takes, and where it rings.

use proptest::prelude::*;
use vbus_driver::{Doorbell, Error, Function};
use vbus_shm::abi::capability::{KIND_HYPERCALL, KIND_MMIO, KIND_PIO, KIND_SINT};
use vbus_shm::abi::reg;

use crate::fake::Fake;

const MMIO: Doorbell = Doorbell { kind: KIND_MMIO, stride: 4, base: 0x1000 };
const PIO: Doorbell = Doorbell { kind: KIND_PIO, stride: 1, base: 0xc100 };
const HYPERCALL: Doorbell = Doorbell { kind: KIND_HYPERCALL, stride: 1, base: 0x400 };
const SINT: Doorbell = Doorbell { kind: KIND_SINT, stride: 16, base: 0xfed8_0000 };

fn offering(records: &[Doorbell]) -> Fake {
    let fake = Fake::default();
    fake.set_records(records);
    fake
}

#[test]
fn the_first_that_can_be_rung_is_taken() {
    let fake = offering(&[MMIO, SINT, PIO, HYPERCALL]);
    let function = Function::probe(fake.clone()).unwrap();
    assert_eq!(function.doorbells_offered().collect::<Vec<_>>(), [MMIO, PIO, HYPERCALL]);
    assert_eq!(
        function.doorbells().collect::<Vec<_>>(),
        [MMIO],
        "all that this environment can ring"
    );
    assert_eq!(function.synthetic_interrupts(), Some(SINT));
    assert_eq!(function.doorbell(), MMIO);
    drop(function);

    fake.set_cost(KIND_HYPERCALL, &[1]);
    fake.set_records(&[HYPERCALL, MMIO]);
    let function = Function::probe(fake.clone()).unwrap();
    assert_eq!(function.doorbell(), HYPERCALL);
    function.ring(3);
    assert_eq!(fake.rings(), [(KIND_HYPERCALL, 0x403)]);
    assert_eq!(function.synthetic_interrupts(), None);
}

#[test]
fn the_cheapest_is_taken_when_asked_for() {
    let fake = offering(&[MMIO, PIO, HYPERCALL]);
    fake.set_cost(KIND_MMIO, &[44]);
    fake.set_cost(KIND_PIO, &[28]);
    fake.set_cost(KIND_HYPERCALL, &[36]);
    let mut function = Function::probe(fake.clone()).unwrap();
    let costs = function.choose_doorbell(100);
    assert_eq!(costs.iter().map(|cost| cost.nanoseconds).collect::<Vec<_>>(), [44, 28, 36]);
    assert_eq!((costs.cheapest().unwrap().doorbell, function.doorbell()), (PIO, PIO));
    // It rings a doorbell that no region has, each kind as often as the test asks for.
    let rings = fake.rings();
    assert_eq!(rings.iter().filter(|ring| **ring == (KIND_PIO, 0xc100 + 63)).count(), 100);
    assert_eq!(rings.iter().filter(|ring| **ring == (KIND_MMIO, 0x1000 + 63 * 4)).count(), 100);
    assert_eq!(rings.len(), 300);

    let before = function.bell(1);
    function.use_doorbell(KIND_HYPERCALL).unwrap();
    function.ring(1);
    before.ring();
    assert_eq!(fake.rings(), [(KIND_HYPERCALL, 0x401), (KIND_PIO, 0xc101)]);
    assert_eq!(function.use_doorbell(9), Err(Error::NoDoorbell));
    assert_eq!(function.doorbell(), HYPERCALL);
}

#[test]
fn a_disturbance_does_not_choose() {
    let fake = offering(&[MMIO, PIO]);
    fake.set_cost(KIND_MMIO, &[44]);
    // An interruption of a millisecond came while the driver measured the cheaper one.
    fake.set_cost(KIND_PIO, &[1_000_000, 28]);
    let mut function = Function::probe(fake.clone()).unwrap();
    assert_eq!(function.choose_doorbell(16).cheapest().unwrap().nanoseconds, 28);
    assert_eq!(function.doorbell(), PIO);

    // If the clock does not advance, the order in the function's capability decides.
    fake.set_cost(KIND_MMIO, &[0]);
    fake.set_cost(KIND_PIO, &[0]);
    function.choose_doorbell(1);
    assert_eq!(function.doorbell(), MMIO);
}

#[test]
fn records_without_a_place_for_each_handle_are_ignored() {
    for bad in [
        Doorbell { base: 0xffc1, ..PIO },
        Doorbell { base: 0x1_0000, ..PIO },
        Doorbell { stride: 0, ..PIO },
        Doorbell { base: 0xff_ffc1, ..HYPERCALL },
        Doorbell { base: u32::MAX, stride: u16::MAX, ..HYPERCALL },
        Doorbell { base: 0x1002, ..MMIO },
        Doorbell { base: 0x3004, ..MMIO },
        Doorbell { kind: 4, ..MMIO },
    ] {
        let fake = offering(&[bad]);
        for kind in 1..5 {
            fake.set_cost(kind, &[0]);
        }
        assert_eq!(Function::probe(fake.clone()).err(), Some(Error::NoDoorbell), "{bad:?}");
        fake.set_records(&[bad, MMIO]);
        assert_eq!(Function::probe(fake).unwrap().doorbell(), MMIO);
    }
    let fake = offering(&[Doorbell { base: 0xffc0, ..PIO }]);
    fake.set_cost(KIND_PIO, &[0]);
    assert!(Function::probe(fake).is_ok(), "the last port is one too");
}

proptest! {
    #[test]
    fn whatever_the_records_say_only_places_in_range_are_rung(
        records in prop::collection::vec((0u8..5, any::<u16>(), prop_oneof![any::<u32>(), 0u32..0x2_0000]), 0..6),
        length in any::<u8>(),
        regions in any::<u32>(),
        handle in 0u32..1024,
    ) {
        let records: Vec<_> = records.into_iter().map(|(kind, stride, base)| Doorbell { kind, stride, base }).collect();
        let fake = offering(&records);
        (0..5).for_each(|kind| fake.set_cost(kind, &[1]));
        fake.set_register(reg::MAX_REGIONS, regions);
        fake.set_config(0x40, 0x0100_0009 | u32::from(length) << 16);
        let Ok(mut function) = Function::probe(fake.clone()) else { return Ok(()) };
        function.ring(handle.min(function.info().max_regions.saturating_sub(1)));
        prop_assert!(function.choose_doorbell(8).iter().count() <= 5);
        for (kind, place) in fake.rings() {
            let end = match kind {
                KIND_MMIO => 0x4000 - 4,
                KIND_PIO => 0xffff,
                KIND_HYPERCALL => 0xff_ffff,
                _ => panic!("kind {kind}"),
            };
            prop_assert!(place <= end, "kind {} at {:#x}", kind, place);
        }
    }
}
