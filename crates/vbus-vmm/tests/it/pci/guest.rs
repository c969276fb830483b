// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest's part of a test: accesses to configuration space, memory and ports, and a slot
//! driver.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vbus_kvm::Sints;

use vbus_vmm::bus::Bus;
use vbus_vmm::ioapic::IoApic;
use vbus_vmm::layout;
use vbus_vmm::memory::{Ram, RamRegion};
use vbus_vmm::pci::{Backing, PciRoot};

use super::fake::Fake;

pub(super) const SLOT_CONTROL: u16 = 0x58;
const SLOT_STATUS: u16 = 0x5a;

pub(super) struct Guest {
    pub(super) root: Arc<PciRoot>,
    pub(super) ram: Vec<RamRegion>,
    pub(super) mmio: Arc<Bus>,
    pub(super) pio: Arc<Bus>,
    /// The I/O APIC, if it is in this process.
    pub(super) io_apic: Option<Arc<IoApic>>,
    vm: Arc<VmFd>,
}

impl Guest {
    /// Makes a guest. Returns `None` without /dev/kvm.
    pub(super) fn new(ports: u8) -> Option<Guest> {
        Guest::with_chip(ports, false)
    }

    /// Makes a guest with one device. Returns `None` without /dev/kvm.
    pub(super) fn with_device() -> Option<(Guest, Fake)> {
        let guest = Guest::new(1)?;
        let fake = Fake::start();
        guest.root.plug("fake0", &fake.path).unwrap();
        Some((guest, fake))
    }

    /// Makes a guest. With `split`, the I/O APIC is in this process.
    pub(super) fn with_chip(ports: u8, split: bool) -> Option<Guest> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(e) => {
                println!("skipped: no /dev/kvm: {e}");
                return None;
            }
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let chip = vbus_vmm::irqchip::IrqChip::new(&vm, split).unwrap();
        let (routes, io_apic) = (chip.routes().clone(), chip.io_apic().cloned());
        let ram = Ram::new(16 << 20).unwrap().regions();
        let sints = Some(Sints { base: 0xfed8_0000, stride: 16, processors: 1 });
        let backing = Backing { mmio: true, pio: true, hypercall: false, sints };
        let root =
            PciRoot::new(routes, io_apic.clone(), ram.clone(), ports, backing, false).unwrap();
        let (mut mmio, mut pio) = (Bus::default(), Bus::default());
        chip.attach(&mut mmio);
        root.attach(&mut mmio, &mut pio);
        Some(Guest { root, ram, mmio: Arc::new(mmio), pio: Arc::new(pio), io_apic, vm })
    }

    fn address(bus: u8, device: u8, at: u16) -> u64 {
        layout::ECAM + (u64::from(bus) << 20 | u64::from(device) << 15 | u64::from(at))
    }

    pub(super) fn write(&self, bus: u8, device: u8, at: u16, data: &[u8]) {
        self.mmio.write(Guest::address(bus, device, at), data);
    }

    pub(super) fn config16(&self, bus: u8, device: u8, at: u16) -> u16 {
        let mut data = [0; 2];
        self.mmio.read(Guest::address(bus, device, at), &mut data);
        u16::from_le_bytes(data)
    }

    /// Reads a register of device 0 on a bus.
    pub(super) fn config32(&self, bus: u8, at: u16) -> u32 {
        self.memory32(Guest::address(bus, 0, at))
    }

    pub(super) fn command(&self, bus: u8) -> u16 {
        self.config16(bus, 0, 4)
    }

    pub(super) fn set_command(&self, bus: u8, command: u16) {
        self.write(bus, 0, 4, &command.to_le_bytes());
    }

    pub(super) fn memory32(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    /// All functions: bus, device, vendor and device id.
    pub(super) fn buses(&self) -> Vec<(u8, u8, u32)> {
        let all = (0..=layout::BUS_MAX).flat_map(|bus| (0..32).map(move |device| (bus, device)));
        let id = |(bus, device)| (bus, device, self.memory32(Guest::address(bus, device, 0)));
        all.map(id).filter(|(.., id)| *id != u32::MAX).collect()
    }

    /// Kind, stride, base of each record of the vendor-specific capability.
    pub(super) fn doorbell_records(&self, bus: u8) -> Vec<(u8, u16, u32)> {
        let header = self.config32(bus, 0x40);
        assert_eq!(header & 0xff, 9);
        let len = u16::try_from(header >> 16 & 0xff).unwrap();
        let record = |at: u16| {
            let first = self.config32(bus, at);
            ((first & 0xff) as u8, (first >> 16) as u16, self.config32(bus, at + 4))
        };
        (0x4c..0x40 + len).step_by(8).map(record).collect()
    }

    /// The local APIC of a new virtual CPU, switched on.
    pub(super) fn local_apic(&self) -> LocalApic {
        let apic = LocalApic(self.vm.create_vcpu(0).unwrap());
        apic.set(0xf0, 0x1ff);
        apic
    }

    /// Starts a thread that manages the slots from 1 to `slots`, as an operating system does.
    pub(super) fn slot_driver(&self, slots: u8) -> SlotDriver {
        let (mmio, stop) = (self.mmio.clone(), Arc::new(AtomicBool::new(false)));
        let stopped = stop.clone();
        for slot in 1..=slots {
            self.write(0, slot, SLOT_CONTROL, &0x1731u16.to_le_bytes());
        }
        let thread = std::thread::spawn(move || {
            let mut acted = 0;
            while !stopped.load(Ordering::Relaxed) {
                for slot in 1..=slots {
                    acted += look_after(&mmio, slot);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            acted
        });
        SlotDriver { stop, thread }
    }
}

/// Handles the events of a slot. Returns how often it has switched the slot on or off.
fn look_after(mmio: &Bus, slot: u8) -> u32 {
    let read = |at: u16| {
        let mut data = [0; 2];
        mmio.read(Guest::address(0, slot, at), &mut data);
        u16::from_le_bytes(data)
    };
    let write = |at: u16, value: u16| mmio.write(Guest::address(0, slot, at), &value.to_le_bytes());
    let control = |mask: u16, value: u16| write(SLOT_CONTROL, read(SLOT_CONTROL) & !mask | value);
    let status = read(SLOT_STATUS);
    write(SLOT_STATUS, status & 0x11f);
    if status & 0x109 == 0 {
        return 0;
    }
    let (is_on, is_present) = (read(SLOT_CONTROL) & 0x400 == 0, status & 0x40 != 0);
    if is_on && (status & 1 != 0 || !is_present) {
        control(0x300, 0x200);
        control(0x400, 0x400);
        control(0x300, 0x300);
        1
    } else if !is_on && is_present {
        control(0x300, 0x200);
        control(0x400, 0);
        control(0x300, 0x100);
        // The guest caused this link change itself.
        write(SLOT_STATUS, 0x100);
        1
    } else {
        0
    }
}

pub(super) struct SlotDriver {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u32>,
}

impl SlotDriver {
    /// How often it has switched a slot on or off.
    pub(super) fn stop(self) -> u32 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

pub(super) struct LocalApic(VcpuFd);

impl LocalApic {
    fn set(&self, at: usize, value: u32) {
        let mut state = self.0.get_lapic().unwrap();
        for (to, from) in state.regs[at..at + 4].iter_mut().zip(value.to_le_bytes()) {
            *to = i8::from_ne_bytes([from]);
        }
        self.0.set_lapic(&state).unwrap();
    }

    /// The pending vectors.
    pub(super) fn pending(&self) -> Vec<u8> {
        let state = self.0.get_lapic().unwrap();
        let bit = |vector: &u8| {
            let at = 0x200 + usize::from(*vector / 32) * 16 + usize::from(*vector % 32 / 8);
            state.regs[at].to_ne_bytes()[0] >> (vector % 8) & 1 != 0
        };
        (0..=255).filter(bit).collect()
    }

    /// Takes the vector. Returns false if it is not pending.
    pub(super) fn takes(&self, vector: u8) -> bool {
        if !self.pending().contains(&vector) {
            return false;
        }
        let at = 0x200 + usize::from(vector / 32) * 16;
        self.set(at, 0);
        true
    }
}
