// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The interrupt controllers other than the local APICs. They are the kernel's, or (split irqchip)
//! an I/O APIC in this process.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde_json::Value;
use vbus_kvm::Routes;
use zerocopy::{FromBytes, IntoBytes};

use crate::acpi::IO_APIC;
use crate::bus::Bus;
use crate::dump;
use crate::ioapic::{IO_APIC_BYTES, IoApic};
use crate::layout;

/// The number of the PIT's state beside those of the interrupt controllers
/// ([`IrqChip::save`]).
const PIT: u32 = 3;

/// The interrupt controllers of a virtual machine.
pub struct IrqChip(Kind);

enum Kind {
    /// `KVM_CREATE_IRQCHIP`: PICs, I/O APIC and PIT, with their states after a reset.
    Kernel { routes: Arc<Routes>, chips: Vec<kvm_irqchip>, timer: kvm_pit_state2 },
    /// `KVM_CAP_SPLIT_IRQCHIP`: only the local APICs are the kernel's. There is no PIC and no PIT.
    Split { routes: Arc<Routes>, io_apic: Arc<IoApic> },
    #[cfg(test)]
    Test(std::sync::Mutex<std::collections::BTreeSet<u32>>),
}

impl IrqChip {
    /// Makes the interrupt controllers of `vm`, which must have no virtual CPU yet.
    ///
    /// # Errors
    /// KVM lacks them.
    pub fn new(vm: &Arc<VmFd>, split: bool) -> Result<IrqChip> {
        let kind = if split {
            let mut cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
            cap.args[0] = layout::PINS.into();
            vm.enable_cap(&cap).context("this KVM has no split irqchip")?;
            let routes = Routes::new(vm.clone(), vbus_kvm::IrqChip::Split { pins: layout::PINS })?;
            Kind::Split { io_apic: Arc::new(IoApic::new(routes.clone())), routes }
        } else {
            vm.create_irq_chip().context("this KVM has no irqchip")?;
            let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            vm.create_pit2(config).context("this KVM has no timer")?;
            let routes = Routes::new(vm.clone(), vbus_kvm::IrqChip::Kernel)?;
            let get = |chip_id| {
                let mut chip = kvm_irqchip { chip_id, ..Default::default() };
                vm.get_irqchip(&mut chip).map(|()| chip)
            };
            let ids = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
            let chips = ids
                .into_iter()
                .map(get)
                .collect::<Result<_, _>>()
                .context("cannot read the irqchip")?;
            Kind::Kernel { routes, chips, timer: vm.get_pit2().context("cannot read the timer")? }
        };
        Ok(IrqChip(kind))
    }

    /// The virtual machine's interrupt routes.
    pub fn routes(&self) -> &Arc<Routes> {
        match &self.0 {
            Kind::Kernel { routes, .. } | Kind::Split { routes, .. } => routes,
            #[cfg(test)]
            Kind::Test(_) => unreachable!("a test has no routes"),
        }
    }

    /// Puts the I/O APIC onto `mmio`, if it is in this process.
    pub fn attach(&self, mmio: &mut Bus) {
        if let Kind::Split { io_apic, .. } = &self.0 {
            mmio.add(IO_APIC.into(), IO_APIC_BYTES, io_apic.clone());
        }
    }

    /// The I/O APIC, if it is in this process.
    pub fn io_apic(&self) -> Option<&Arc<IoApic>> {
        match &self.0 {
            Kind::Split { io_apic, .. } => Some(io_apic),
            _ => None,
        }
    }

    /// Sets the level of a pin. A pin has only one source.
    pub fn set(&self, pin: u32, level: bool) {
        match &self.0 {
            // This fails only for a pin that does not exist.
            Kind::Kernel { routes, .. } => drop(routes.vm().set_irq_line(pin, level)),
            Kind::Split { io_apic, .. } => io_apic.set(pin, level),
            #[cfg(test)]
            Kind::Test(high) => {
                let mut high = crate::lock::lock(high);
                let _ = if level { high.insert(pin) } else { high.remove(&pin) };
            }
        }
    }

    /// Raises an edge on a pin.
    pub fn pulse(&self, pin: u32) {
        self.set(pin, true);
        self.set(pin, false);
    }

    /// The state of each interrupt controller. What KVM does not tell is left out.
    pub fn dump(&self) -> Vec<Value> {
        match &self.0 {
            Kind::Kernel { routes, chips, .. } => {
                let now = |chip: &kvm_irqchip| {
                    let mut chip = kvm_irqchip { chip_id: chip.chip_id, ..Default::default() };
                    routes.vm().get_irqchip(&mut chip).ok()?;
                    Some(dump::irqchip(&chip))
                };
                chips.iter().filter_map(now).collect()
            }
            Kind::Split { io_apic, .. } => vec![io_apic.dump()],
            #[cfg(test)]
            Kind::Test(_) => Vec::new(),
        }
    }

    /// The states of those in the kernel: a number, and KVM's structure as bytes. The numbers are
    /// KVM's of the interrupt controllers, and 3 for the PIT.
    ///
    /// # Errors
    /// KVM refuses.
    pub(crate) fn save(&self) -> Result<Vec<(u32, Vec<u8>)>> {
        let Kind::Kernel { routes, chips, .. } = &self.0 else { return Ok(Vec::new()) };
        let vm = routes.vm();
        let mut saved = Vec::new();
        for chip in chips {
            let mut now = kvm_irqchip { chip_id: chip.chip_id, ..Default::default() };
            vm.get_irqchip(&mut now).context("cannot read the irqchip")?;
            saved.push((now.chip_id, now.as_bytes().to_vec()));
        }
        let timer = vm.get_pit2().context("cannot read the timer")?;
        saved.push((PIT, timer.as_bytes().to_vec()));
        Ok(saved)
    }

    /// Gives those in the kernel the states of [`save`](Self::save).
    ///
    /// # Errors
    /// A state is missing, is too much, or is none, or KVM refuses it.
    pub(crate) fn restore(&self, saved: &BTreeMap<u32, Vec<u8>>) -> Result<()> {
        let Kind::Kernel { routes, chips, .. } = &self.0 else {
            ensure!(saved.is_empty(), "there are states of interrupt controllers of the kernel");
            return Ok(());
        };
        let (vm, have) = (routes.vm(), saved.len());
        ensure!(have == chips.len() + 1, "there are {have} states of interrupt controllers");
        for (number, bytes) in saved {
            if *number == PIT {
                let Ok(timer) = kvm_pit_state2::read_from_bytes(bytes) else {
                    bail!("the timer's state has {} bytes", bytes.len())
                };
                vm.set_pit2(&timer).context("KVM does not take the timer's state")?;
                continue;
            }
            let chip = kvm_irqchip::read_from_bytes(bytes).ok();
            let chip = chip.filter(|chip| chip.chip_id == *number && *number < PIT);
            let Some(chip) = chip else {
                bail!("interrupt controller {number} has a state of {} bytes", bytes.len())
            };
            vm.set_irqchip(&chip)
                .with_context(|| format!("KVM does not take interrupt controller {number}"))?;
        }
        Ok(())
    }

    /// Puts the interrupt controllers into the state after a reset.
    ///
    /// # Errors
    /// KVM refuses the state.
    pub fn reset(&self) -> Result<()> {
        match &self.0 {
            Kind::Kernel { routes, chips, timer } => {
                let vm = routes.vm();
                chips
                    .iter()
                    .try_for_each(|chip| vm.set_irqchip(chip))
                    .context("cannot reset the irqchip")?;
                vm.set_pit2(timer).context("cannot reset the timer")
            }
            Kind::Split { io_apic, .. } => {
                io_apic.reset();
                Ok(())
            }
            #[cfg(test)]
            Kind::Test(_) => Ok(()),
        }
    }
}

#[cfg(test)]
impl IrqChip {
    /// Interrupt controllers for tests, which remember the levels of their pins.
    pub fn for_tests() -> IrqChip {
        IrqChip(Kind::Test(std::sync::Mutex::default()))
    }

    /// The level of a pin.
    pub fn level(&self, pin: u32) -> bool {
        let Kind::Test(high) = &self.0 else { unreachable!("only a test asks") };
        crate::lock::lock(high).contains(&pin)
    }
}
