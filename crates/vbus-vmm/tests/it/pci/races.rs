// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Accesses of several CPUs while devices come, go and die: all of it ends, and the last device
//! works.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vbus_shm::abi::reg;

use super::fake::Fake;
use super::guest::{Guest, SLOT_CONTROL};
use super::{MEMORY_AND_MASTER, until};
use vbus_vmm::layout;

const ROUNDS: u32 = 30;

/// Reads and writes here and there, as fast as it can.
fn hammer(guest: &Guest, mut seed: u64, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (what, bits) = (seed >> 33 & 7, seed >> 40);
        let bus = (bits & 1) as u8 + 1;
        match what {
            0 => guest.set_command(bus, [0, 2, 6][(bits >> 1) as usize % 3]),
            1 => guest.write(bus, 0, 0x72, &[(bits >> 1 & 1) as u8, 0]),
            2 => guest.write(bus, 0, 0x8b, &[((bits >> 1 & 3) as u8) << 6]),
            3 => guest.write(0, bus, 0x04, &[(bits >> 1 & 1) as u8 * 6, 0]),
            4 => drop(guest.config32(bus, 4)),
            5 => drop(guest.memory32(layout::PCI_WINDOW + (u64::from(bus) << 23 | bits & 0x30ff))),
            6 => guest.mmio.write(
                layout::PCI_WINDOW + (u64::from(bus) << 23 | 0x1000 | bits & 0x1ffc),
                &[1, 0, 0, 0],
            ),
            _ => guest.write(0, bus, SLOT_CONTROL, &[(bits >> 1 & 0xff) as u8, 0x17]),
        }
    }
}

#[test]
fn nothing_waits_for_ever() {
    let Some(guest) = Guest::new(2) else { return };
    let driver = guest.slot_driver(2);
    let stop = AtomicBool::new(false);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for seed in 1..=3 {
            let (guest, stop) = (&guest, &stop);
            scope.spawn(move || hammer(guest, seed, stop));
        }
        for round in 0..ROUNDS {
            let (first, second) = (Fake::start(), Fake::start());
            guest.root.plug("first", &first.path).unwrap();
            guest.root.plug("second", &second.path).unwrap();
            if round % 3 == 0 {
                // They switch it off themselves, sooner or later.
                guest.root.unplug("second").unwrap();
            }
            drop((first, second));
            until("both have left", || guest.root.list().is_empty());
        }
        stop.store(true, Ordering::Relaxed);
    });
    eprintln!("{ROUNDS} rounds in {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(120));
    driver.stop();
    guest.root.reset();
    let fake = Fake::start();
    guest.root.plug("last", &fake.path).unwrap();
    guest.set_command(1, MEMORY_AND_MASTER);
    assert_eq!(guest.memory32(u64::from(guest.config32(1, 0x10)) + reg::MAGIC), reg::MAGIC_VALUE);
}
