// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Random accesses of the guest. Nothing panics, and only the guest's own function changes.

use proptest::prelude::*;

use super::fake::Fake;
use super::guest::Guest;
use vbus_vmm::layout;

/// An access: its address, and the bytes to write, or none for a read.
#[derive(Clone, Debug)]
struct Access {
    port: bool,
    address: u64,
    data: Vec<u8>,
}

fn access() -> impl Strategy<Value = Access> {
    // Most accesses go to something that exists: the port, the function's registers, BAR, window.
    let config = (0u64..3, 0u64..3, prop_oneof![0u64..0x100, 0u64..0x1000]);
    let config =
        config.prop_map(|(bus, device, at)| layout::ECAM + (bus << 20 | device << 15 | at));
    let window = prop_oneof![
        0u64..0x1000_0000,
        (0u64..32, 0u64..0x4010).prop_map(|(slot, at)| slot << 23 | at)
    ];
    let window = window.prop_map(|at| layout::PCI_WINDOW + at);
    let place = prop_oneof![
        8 => config.prop_map(|at| (false, at)),
        2 => window.prop_map(|at| (false, at)),
        1 => (0xcf8u64..0xd00).prop_map(|at| (true, at)),
        1 => (0xc000u64..0xe000).prop_map(|at| (true, at)),
    ];
    let byte = prop_oneof![Just(0u8), Just(0xff), Just(0x02), Just(0x06), any::<u8>()];
    let length = prop_oneof![Just(0usize), Just(1), Just(2), Just(4), Just(8)];
    (place, length.prop_flat_map(move |len| prop::collection::vec(byte.clone(), len)))
        .prop_map(|((port, address), data)| Access { port, address, data })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_accesses(accesses in prop::collection::vec(access(), 1..200)) {
        let Some(guest) = Guest::new(2) else { return Ok(()) };
        let (fake, other) = (Fake::start(), Fake::start());
        guest.root.plug("fake0", &fake.path).unwrap();
        guest.root.plug("fake1", &other.path).unwrap();
        for Access { port, address, data } in accesses {
            let bus = if port { &guest.pio } else { &guest.mmio };
            if data.is_empty() {
                bus.read(address, &mut [0; 4]);
            } else {
                bus.write(address, &data);
            }
        }
        for fake in [&fake, &other] {
            let writes = fake.with(|device| device.writes.clone());
            for (region, offset, data) in writes {
                let fine = match region {
                    7 => offset == 4 && data.len() == 2 && data[0] & !6 == 0 && data[1] & !4 == 0,
                    0 => offset + data.len() as u64 <= 0x4000 && !(0x2000..0x2080).contains(&offset),
                    _ => false,
                };
                prop_assert!(fine, "{data:?} at {offset:#x} of region {region}");
            }
            // The server was not disconnected.
            prop_assert_eq!(fake.with(|device| device.clients), 1);
        }
        guest.root.reset();
        prop_assert_eq!((guest.config32(1, 0), guest.config32(2, 0)), (0x10f5_1af4, 0x10f5_1af4));
    }
}
