// SPDX-License-Identifier: Apache-2.0 OR MIT
//! PCI against a KVM and servers, honest and not. The test plays the guest. Without /dev/kvm these
//! tests say so and pass.
mod fake;
mod guest;
mod hostile;
mod races;
mod random;

use std::time::{Duration, Instant};

use vbus_kvm::DoorbellKind;
use vbus_shm::abi::reg;
use vfio_user_protocol::pci::{IRQ_INTX, IRQ_MSI, IRQ_MSIX};

use fake::Fake;
use guest::{Guest, SLOT_CONTROL};

/// How long a test waits for something that must happen.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Waits until `so` returns true.
fn until(what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + TIMEOUT;
    while !so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

const MEMORY_AND_MASTER: u16 = 6;

#[test]
fn a_cold_device_is_found_where_firmware_would_put_it() {
    let Some(guest) = Guest::new(4) else { return };
    let fake = Fake::start();
    guest.root.plug("fake0", &fake.path).unwrap();
    assert_eq!(
        guest.buses(),
        [
            (0, 0, 0x0008_1b36),
            (0, 1, 0x000c_1b36),
            (0, 2, 0x000c_1b36),
            (0, 3, 0x000c_1b36),
            (0, 4, 0x000c_1b36),
            (1, 0, 0x10f5_1af4)
        ]
    );
    // Configuration ports find the same function.
    guest.pio.write(0xcf8, &(1u32 << 31 | 1 << 16).to_le_bytes());
    let mut word = [0; 2];
    guest.pio.read(0xcfe, &mut word);
    assert_eq!(u16::from_le_bytes(word), 0x10f5);
    guest.pio.write(0xcfc, &[0xaa]);
    guest.pio.write(0xcf8, &[0x80]);
    guest.pio.read(0xcfa, &mut word);
    assert_eq!(word, [1, 0x80]);

    // The server has all of the guest's memory.
    let maps: Vec<_> = fake.with(|device| device.maps.clone());
    assert_eq!(maps, guest.ram.iter().map(|r| (r.base, r.bytes)).collect::<Vec<_>>());

    let bar = u64::from(guest.config32(1, 0x10));
    assert_eq!(guest.memory32(bar), u32::MAX, "not enabled");
    guest.set_command(1, MEMORY_AND_MASTER);
    assert_eq!(guest.memory32(bar + reg::MAGIC), reg::MAGIC_VALUE);
    assert_eq!(fake.with(|device| device.command), MEMORY_AND_MASTER);
    guest.mmio.write(bar + 0x80, &[1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(guest.memory32(bar + 0x84), 0x0807_0605, "posted, and done before the next read");
    assert_eq!(guest.memory32(bar + 0x4000), u32::MAX);

    guest.root.plug("fake1", &fake.path).unwrap_err();
    guest.root.plug("fake0", &fake.path).unwrap_err();
    guest.set_command(1, 0);
    guest.root.unplug("fake0").unwrap();
    assert_eq!(guest.config32(1, 0), u32::MAX);
    guest.root.unplug("fake0").unwrap_err();
    until("the server's client has gone", || fake.with(|device| device.clients) == 0);
}

#[test]
fn the_window_of_each_bridge_is_part_of_the_way() {
    let Some(guest) = Guest::new(2) else { return };
    let fake = Fake::start();
    guest.root.plug("fake0", &fake.path).unwrap();
    let bar = u64::from(guest.config32(1, 0x10));
    guest.set_command(1, MEMORY_AND_MASTER);
    let there = |at: u64| guest.memory32(at) == reg::MAGIC_VALUE;
    let in_kernel = || guest.root.list()[0].doorbells_in_kernel;
    assert!(there(bar) && in_kernel());
    // The port passes nothing on.
    guest.write(0, 1, 0x04, &[0, 0]);
    assert!(!there(bar) && !in_kernel());
    guest.write(0, 1, 0x04, &[6, 0]);
    assert!(there(bar) && in_kernel());
    // BAR and window move. In between the BAR is outside the window.
    let elsewhere = bar + 0x1000_0000 / 2;
    guest.write(1, 0, 0x10, &u32::try_from(elsewhere).unwrap().to_le_bytes());
    assert!(!there(bar) && !there(elsewhere) && !in_kernel());
    let register = u16::try_from(elsewhere >> 16 & 0xfff0).unwrap().to_le_bytes();
    guest.write(0, 1, 0x20, &[register, register].concat());
    assert!(!there(bar) && there(elsewhere) && in_kernel());
    // The host bridge passes no other addresses on, whatever the port does.
    guest.write(0, 1, 0x20, &[0, 0, 0xf0, 0xff]);
    guest.write(1, 0, 0x10, &0x10_0000u32.to_le_bytes());
    assert!(!there(0x10_0000) && !in_kernel());
    // The buses get other numbers. The bus behind the function's bus has no function.
    guest.write(0, 1, 0x19, &[9, 12]);
    assert_eq!(
        (guest.config32(9, 0), guest.config32(1, 0), guest.config32(10, 0)),
        (0x10f5_1af4, u32::MAX, u32::MAX)
    );
    assert_eq!(guest.root.list()[0].address, "0000:09:00.0");
    guest.root.reset();
    assert_eq!((guest.config32(1, 0), u64::from(guest.config32(1, 0x10))), (0x10f5_1af4, bar));
    assert_eq!(
        fake.with(|device| (device.command, device.resets)),
        (0, 2),
        "one reset when plugged, one now"
    );
}

#[test]
fn hot_plug_and_unplug_again_and_again() {
    let Some(guest) = Guest::new(2) else { return };
    let fake = Fake::start();
    let driver = guest.slot_driver(1);
    for round in 0..20 {
        guest.root.plug("fake0", &fake.path).unwrap();
        until("the guest has brought it in", || guest.config32(1, 0) == 0x10f5_1af4);
        guest.set_command(1, MEMORY_AND_MASTER);
        guest.root.unplug("fake0").unwrap();
        assert_eq!((guest.config32(1, 0), guest.root.list().len()), (u32::MAX, 0), "round {round}");
        until("the server's client has gone", || fake.with(|device| device.clients) == 0);
    }
    assert!(driver.stop() >= 40);
}

#[test]
fn a_guest_that_switches_a_slot_off_by_itself_keeps_the_device() {
    let Some((guest, fake)) = Guest::with_device() else { return };
    guest.set_command(1, MEMORY_AND_MASTER);
    let resets = fake.with(|device| device.resets);
    guest.write(0, 1, SLOT_CONTROL, &0x0700u16.to_le_bytes());
    assert_eq!((guest.config32(1, 0), guest.root.list()[0].on), (u32::MAX, false));
    assert_eq!(fake.with(|device| (device.resets, device.clients)), (resets + 1, 1));
    guest.write(0, 1, SLOT_CONTROL, &0x0100u16.to_le_bytes());
    assert_eq!((guest.config32(1, 0), guest.command(1)), (0x10f5_1af4, 0), "as after power-on");
    // The bridge's own reset does the same.
    guest.set_command(1, MEMORY_AND_MASTER);
    guest.write(0, 1, 0x3e, &[0x40, 0]);
    assert_eq!(guest.config32(1, 0), u32::MAX);
    guest.write(0, 1, 0x3e, &[0, 0]);
    assert_eq!((guest.config32(1, 0), guest.command(1)), (0x10f5_1af4, 0));
    guest.write(0, 1, SLOT_CONTROL, &0x0700u16.to_le_bytes());
    guest.root.unplug("fake0").unwrap();
}

#[test]
fn doorbells_of_each_kind_and_what_comes_to_user_space() {
    let Some(guest) = Guest::new(8) else { return };
    let fake = Fake::start();
    guest.root.plug("fake0", &fake.path).unwrap();
    let records = guest.doorbell_records(1);
    assert_eq!(records[0], (1, 4, 0x1000));
    assert_eq!(records[1], (2, 1, 0xc000));
    assert_eq!(records[2], (0x81, 16, 0xfed8_0000));
    // No virtual CPU runs here, so all rings come to user space, as they do when KVM has no more
    // room. None is lost.
    let bar = u64::from(guest.config32(1, 0x10));
    guest.set_command(1, MEMORY_AND_MASTER);
    guest.mmio.write(bar + 0x1004, &[0]);
    guest.pio.write(0xc002, &[0]);
    guest.pio.write(0xc004, &[0]);
    guest.pio.write(0xc400, &[0]);
    guest.memory32(bar);
    assert_eq!(fake.with(|device| device.rung.clone()), [1, 2]);
    assert_eq!(guest.root.list()[0].user_doorbells, 2);
    assert_eq!(DoorbellKind::ALL.len(), 3);
}

#[test]
fn messages_reach_the_local_apic() {
    let Some((guest, fake)) = Guest::with_device() else { return };
    let apic = guest.local_apic();
    guest.write(1, 0, 0x74, &0xfee0_0000u64.to_le_bytes());
    guest.write(1, 0, 0x7c, &0x0041u16.to_le_bytes());
    assert!(!fake.interrupt(IRQ_MSI, 0), "not connected before it is enabled");
    guest.write(1, 0, 0x72, &[1, 0]);
    assert!(fake.interrupt(IRQ_MSI, 0));
    until("MSI", || apic.takes(0x41));
    // The interrupt moves while it is enabled.
    guest.write(1, 0, 0x7c, &0x0042u16.to_le_bytes());
    assert!(fake.interrupt(IRQ_MSI, 0));
    until("MSI, moved", || apic.takes(0x42));
    // A masked interrupt is kept, shown as pending, and sent later.
    guest.write(1, 0, 0x80, &[1, 0, 0, 0]);
    assert!(fake.interrupt(IRQ_MSI, 0));
    assert_eq!((apic.pending(), guest.config32(1, 0x84)), (vec![], 1));
    guest.write(1, 0, 0x80, &[0, 0, 0, 0]);
    until("MSI, unmasked", || apic.takes(0x42));
    // An invalid address holds the interrupt back until the address is valid again.
    guest.write(1, 0, 0x74, &0x1000u64.to_le_bytes());
    assert!(fake.interrupt(IRQ_MSI, 0));
    assert!(apic.pending().is_empty());
    guest.write(1, 0, 0x74, &0xfee0_0000u64.to_le_bytes());
    until("MSI, back", || apic.takes(0x42));
    guest.write(1, 0, 0x72, &[0, 0]);
    assert!(!fake.interrupt(IRQ_MSI, 0));
}

#[test]
fn msix_is_the_vmms_own() {
    let Some((guest, fake)) = Guest::with_device() else { return };
    let apic = guest.local_apic();
    let bar = u64::from(guest.config32(1, 0x10));
    guest.set_command(1, MEMORY_AND_MASTER);
    let table = bar + 0x2000;
    let set = |vector: u64, data: u32, masked: u32| {
        guest.mmio.write(table + vector * 16, &0xfee0_0000u64.to_le_bytes());
        guest.mmio.write(table + vector * 16 + 8, &data.to_le_bytes());
        guest.mmio.write(table + vector * 16 + 12, &masked.to_le_bytes());
    };
    set(3, 0x53, 0);
    // MSI-X is enabled, and all vectors are masked.
    guest.write(1, 0, 0x8a, &[0, 0xc0]);
    assert_eq!(guest.memory32(table + 3 * 16 + 8), 0x53);
    for vector in [3, 5] {
        assert!(fake.interrupt(IRQ_MSIX, vector));
    }
    assert_eq!((guest.memory32(bar + 0x3000), apic.pending()), (1 << 3 | 1 << 5, vec![]));
    guest.write(1, 0, 0x8a, &[0, 0x80]);
    until("vector 3", || apic.takes(0x53));
    assert_eq!(guest.memory32(bar + 0x3000), 1 << 5);
    set(5, 0x55, 0);
    until("vector 5", || apic.takes(0x55));
    assert_eq!(guest.memory32(bar + 0x3000), 0);
    // The server has seen nothing of the table.
    assert!(
        fake.with(|device| device
            .writes
            .iter()
            .all(|(region, at, _)| *region != 0 || *at < 0x2000))
    );
    guest.write(1, 0, 0x8a, &[0, 0]);
    assert!(!fake.interrupt(IRQ_MSIX, 3));
}

#[test]
fn the_pin_is_a_level_whose_end_is_an_eventfd() {
    let Some((guest, fake)) = Guest::with_device() else { return };
    assert_eq!(guest.config32(1, 0x3c) >> 8, 1, "INTA");
    assert!(
        fake.with(|device| device.irqs.contains_key(&(IRQ_INTX, 0)) && device.unmask.is_some())
    );
    assert_eq!(guest.command(1), 0);
    fake.with(|device| device.interrupt_status = true);
    assert_eq!(guest.config32(1, 4) >> 16, 0x18);
    // A reset forgets an interrupt that the guest has not ended. The device must not wait for its
    // end.
    let ended = || {
        fake.with(|device| rustix::io::read(device.unmask.as_ref().unwrap(), &mut [0; 8]).is_ok())
    };
    assert!(fake.interrupt(IRQ_INTX, 0));
    assert!(!ended(), "nobody has ended it");
    guest.root.reset();
    assert!(ended());
}

#[test]
fn the_pin_goes_through_an_io_apic_in_this_process() {
    const ENTRY: u8 = 0x10 + 2 * 17;
    let Some(guest) = Guest::with_chip(1, true) else { return };
    let chip = guest.io_apic.clone().unwrap();
    let fake = Fake::start();
    guest.root.plug("fake0", &fake.path).unwrap();
    let apic = guest.local_apic();
    let set = |register: u8, value: u32| {
        guest.mmio.write(vbus_vmm::acpi::IO_APIC.into(), &[register]);
        guest.mmio.write(u64::from(vbus_vmm::acpi::IO_APIC) + 0x10, &value.to_le_bytes());
    };
    // Level-triggered, to local APIC 0.
    set(ENTRY + 1, 0);
    set(ENTRY, 0x61 | 1 << 15);
    let ended = || {
        fake.with(|device| rustix::io::read(device.unmask.as_ref().unwrap(), &mut [0; 8]).is_ok())
    };
    for _ in 0..2 {
        assert!(fake.interrupt(IRQ_INTX, 0));
        until("INTx", || apic.takes(0x61));
        assert!(!ended(), "it is still serviced");
        chip.end(0x61);
        until("the device hears of the end", ended);
    }
    assert!(apic.pending().is_empty());
    // A device that leaves lowers its pin.
    assert!(fake.interrupt(IRQ_INTX, 0));
    until("INTx", || apic.takes(0x61));
    guest.root.unplug("fake0").unwrap();
    chip.end(0x61);
    assert!(apic.pending().is_empty());
}

/// `dump` is for somebody who looks for the reason why a guest hangs.
#[test]
fn a_dump_asks_nothing_of_a_server_that_stands_still() {
    let Some((guest, fake)) = Guest::with_device() else { return };
    // The server needs the device for each reply.
    let dump = fake.with(|_| guest.root.dump());
    assert_eq!((dump.len(), &dump[0]["gone"]), (1, &serde_json::Value::Bool(false)), "{dump:?}");
    assert_eq!(guest.config32(1, 0), 0x10f5_1af4, "the guest keeps its device");
}

#[test]
fn a_server_that_dies_leaves_an_empty_slot() {
    let Some(guest) = Guest::new(1) else { return };
    let driver = guest.slot_driver(1);
    let fake = Fake::start();
    guest.root.plug("fake0", &fake.path).unwrap();
    until("the guest has brought it in", || guest.config32(1, 0) == 0x10f5_1af4);
    drop(fake);
    until("the slot is empty", || guest.root.list().is_empty());
    assert_eq!(guest.config32(1, 0), u32::MAX);
    // The bus comes back.
    let fake = Fake::start();
    until("the guest has switched the slot off", || {
        guest.config16(0, 1, SLOT_CONTROL) & 0x0700 == 0x0700
    });
    guest.root.plug("fake0", &fake.path).unwrap();
    until("the guest has brought it in", || guest.config32(1, 0) == 0x10f5_1af4);
    driver.stop();
}
