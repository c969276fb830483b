// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Interrupt routing: the interrupt for which each number (GSI) stands (`KVM_SET_GSI_ROUTING`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use kvm_bindings::{
    KVM_CAP_IRQ_ROUTING, KVM_IRQ_ROUTING_HV_SINT, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI,
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting,
    kvm_irq_routing_entry, kvm_irq_routing_hv_sint, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
    kvm_msi,
};
use kvm_ioctls::VmFd;

use crate::{Error, Signaller};

/// The number of synthetic interrupts of one virtual processor.
pub const SINTS: u32 = 16;
/// Delivery modes of a message, as its data encodes them.
const FIXED: u32 = 0;
const LOWEST: u32 = 1;
const NMI: u32 = 4;
/// Pins of KVM's I/O APIC, and of its two PICs together.
pub(crate) const IOAPIC_PINS: u32 = 24;
const PIC_PINS: u32 = 16;

/// Where the interrupt controllers other than the local APICs are emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqChip {
    /// In the kernel (`KVM_CREATE_IRQCHIP`). Numbers 0 to 23 are the pins of KVM's I/O APIC.
    /// Numbers 0 to 15 are the pins of its PICs as well.
    Kernel,
    /// In the VMM (`KVM_CAP_SPLIT_IRQCHIP`). The first numbers are reserved for the pins of the
    /// VMM's I/O APIC. It sets their routes by [`Routes::set`], so that KVM reports when the guest
    /// ends their interrupts.
    Split {
        /// The number of pins, as given to KVM.
        pins: u32,
    },
}

impl IrqChip {
    /// The count of numbers that are not for messages.
    fn pins(self) -> u32 {
        match self {
            IrqChip::Kernel => IOAPIC_PINS,
            IrqChip::Split { pins } => pins,
        }
    }
}

/// The destination of a message-signalled interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// A message to the local APICs.
    Msi {
        /// The address, as in the MSI capability or the MSI-X table.
        address: u64,
        /// The data, as in the MSI capability or the MSI-X table.
        data: u32,
    },
    /// A synthetic interrupt of one virtual processor's SynIC.
    Sint {
        /// The Hyper-V index of the processor. It is the virtual CPU's number unless the VMM has
        /// set another one.
        vp: u32,
        /// The number of the synthetic interrupt, below [`SINTS`].
        sint: u32,
    },
}

impl Route {
    /// Finds the destination of a function's message: an MSI if `address` is a local APIC's, a
    /// synthetic interrupt if `address` is one of `sints`.
    ///
    /// A function's MSI may have the delivery modes fixed, lowest priority and NMI. An SMI or an
    /// INIT could end the virtual machine or the system that runs in it: with some kernels KVM
    /// could no longer run it.
    ///
    /// # Errors
    /// [`Error::NoInterrupt`] if the message is neither. A guest can cause this, since it may write
    /// any address and data.
    pub fn of_message(address: u64, data: u32, sints: Option<&Sints>) -> Result<Route, Error> {
        if let Some(vp) = sints.and_then(|sints| sints.processor(address)) {
            return if data < SINTS {
                Ok(Route::Sint { vp, sint: data })
            } else {
                Err(Error::NoInterrupt(format!("synthetic interrupt {data}")))
            };
        }
        // The low half is 0xfee00000 plus bits of the destination. The high half is further bits of
        // the destination.
        if address & 0xfff0_0000 != 0xfee0_0000 {
            return Err(Error::NoInterrupt(format!("a message to {address:#x}")));
        }
        match data >> 8 & 7 {
            FIXED | LOWEST | NMI => Ok(Route::Msi { address, data }),
            other => Err(Error::NoInterrupt(format!("a message with delivery mode {other}"))),
        }
    }

    fn entry(self, gsi: u32) -> kvm_irq_routing_entry {
        let mut entry = kvm_irq_routing_entry { gsi, ..Default::default() };
        match self {
            Route::Msi { address, data } => {
                entry.type_ = KVM_IRQ_ROUTING_MSI;
                let (address_lo, address_hi) = halves(address);
                entry.u.msi =
                    kvm_irq_routing_msi { address_lo, address_hi, data, ..Default::default() };
            }
            Route::Sint { vp, sint } => {
                entry.type_ = KVM_IRQ_ROUTING_HV_SINT;
                entry.u.hv_sint = kvm_irq_routing_hv_sint { vcpu: vp, sint };
            }
        }
        entry
    }
}

/// Splits an address into its lower and its upper half, as KVM takes it.
fn halves(address: u64) -> (u32, u32) {
    ((address & 0xffff_ffff) as u32, (address >> 32) as u32)
}

/// The message addresses that stand for synthetic interrupts: a message to `base + vp * stride`
/// with data n raises synthetic interrupt n of virtual processor vp. A function's vendor-specific
/// capability has a record of them beside its doorbell records (`spec/pci.md`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sints {
    /// The address for virtual processor 0.
    pub base: u64,
    /// The distance from one processor's address to the next. It is not 0.
    pub stride: u16,
    /// The number of virtual processors.
    pub processors: u32,
}

impl Sints {
    fn processor(&self, address: u64) -> Option<u32> {
        let (offset, stride) = (address.checked_sub(self.base)?, u64::from(self.stride));
        let processor = u32::try_from(offset.checked_div(stride)?).ok()?;
        (offset % stride == 0 && processor < self.processors).then_some(processor)
    }
}

/// The interrupt routes of one virtual machine. KVM takes only the whole table, so this value is
/// its only owner: nothing else may set routes.
#[derive(Debug)]
pub struct Routes {
    vm: Arc<VmFd>,
    irqchip: IrqChip,
    /// The most entries that KVM accepts.
    limit: u32,
    table: Mutex<Table>,
    signaller: Signaller,
}

/// The numbers in use. Each may have a route.
type Table = BTreeMap<u32, Option<Route>>;

impl Routes {
    /// Takes over the routes of `vm`, whose interrupt controllers must exist. At first the table
    /// has the routes of the pins only.
    ///
    /// # Errors
    /// [`Error::Missing`] if the kernel has no interrupt controllers or no routing. Those of
    /// [`Signaller::new`].
    pub fn new(vm: Arc<VmFd>, irqchip: IrqChip) -> Result<Arc<Routes>, Error> {
        let limit = u32::try_from(vm.check_extension_raw(KVM_CAP_IRQ_ROUTING.into())).unwrap_or(0);
        if limit <= irqchip.pins() + PIC_PINS {
            return Err(Error::Missing("interrupt routes"));
        }
        let routes = Routes {
            vm,
            irqchip,
            limit,
            table: Mutex::new(Table::new()),
            signaller: Signaller::new()
                .map_err(|source| Error::System { what: "signals", source })?,
        };
        routes.give(&routes.lock())?;
        Ok(Arc::new(routes))
    }

    /// The virtual machine.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// Signals the eventfds of this virtual machine's interrupts, which devices hold too.
    pub fn signaller(&self) -> &Signaller {
        &self.signaller
    }

    /// Sends one message to the local APICs at once, without a route.
    ///
    /// # Errors
    /// [`Error::System`] if KVM refuses, for example because no APIC has that address. A guest can
    /// cause this.
    pub fn send(&self, address: u64, data: u32) -> Result<(), Error> {
        let (address_lo, address_hi) = halves(address);
        let message = kvm_msi { address_lo, address_hi, data, ..Default::default() };
        self.vm.signal_msi(message).map(drop).map_err(Error::kvm("KVM_SIGNAL_MSI"))
    }

    /// Where the interrupt controllers are.
    pub fn irqchip(&self) -> IrqChip {
        self.irqchip
    }

    /// Allocates a number for a message. It has no route yet.
    ///
    /// # Errors
    /// [`Error::Routes`] if no number is left.
    pub fn alloc(&self) -> Result<u32, Error> {
        let mut table = self.lock();
        let first = self.irqchip.pins();
        // The kernel's PICs take entries of the table as well, so fewer numbers can have one.
        let end = self.limit - if self.irqchip == IrqChip::Kernel { PIC_PINS } else { 0 };
        let free =
            (first..end).find(|gsi| !table.contains_key(gsi)).ok_or(Error::Routes(end - first))?;
        table.insert(free, None);
        Ok(free)
    }

    /// Frees a number from [`alloc`](Self::alloc). Nothing may use it any more.
    pub fn free(&self, gsi: u32) {
        let mut table = self.lock();
        if gsi >= self.irqchip.pins() && table.remove(&gsi).flatten().is_some() {
            // KVM accepts a table with one entry less. If it did not, the number would just keep
            // its route in KVM.
            let _ = self.give(&table);
        }
    }

    /// Sets or removes the route of a number. An interrupt without a route is lost. The number is
    /// from [`alloc`](Self::alloc) or, with a split irqchip, that of a pin.
    ///
    /// # Errors
    /// [`Error::NoInterrupt`] if the number or the route is invalid. [`Error::System`] if KVM
    /// refuses. The number then keeps its former route.
    pub fn set(&self, gsi: u32, route: Option<Route>) -> Result<(), Error> {
        match route {
            Some(Route::Sint { sint, .. }) if sint >= SINTS => {
                return Err(Error::NoInterrupt(format!("synthetic interrupt {sint}")));
            }
            _ => {}
        }
        let mut table = self.lock();
        let is_pin = gsi < self.irqchip.pins() && self.irqchip != IrqChip::Kernel;
        let before = match table.get(&gsi) {
            Some(before) => *before,
            None if is_pin => None,
            None => return Err(Error::NoInterrupt(format!("number {gsi}"))),
        };
        if before == route {
            return Ok(());
        }
        table.insert(gsi, route);
        self.give(&table).inspect_err(|_| {
            table.insert(gsi, before);
        })
    }

    /// The route of a number.
    pub fn get(&self, gsi: u32) -> Option<Route> {
        self.lock().get(&gsi).copied().flatten()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Passes the table to KVM.
    fn give(&self, table: &Table) -> Result<(), Error> {
        let mut entries = match self.irqchip {
            IrqChip::Kernel => pins(),
            IrqChip::Split { .. } => Vec::new(),
        };
        entries
            .extend(table.iter().filter_map(|(gsi, route)| route.map(|route| route.entry(*gsi))));
        let routing =
            KvmIrqRouting::from_entries(&entries).map_err(|_| Error::Routes(self.limit))?;
        self.vm.set_gsi_routing(&routing).map_err(Error::kvm("KVM_SET_GSI_ROUTING"))
    }
}

/// The table entries of the kernel's interrupt controllers.
fn pins() -> Vec<kvm_irq_routing_entry> {
    let entry = |gsi, irqchip, pin| {
        let mut entry =
            kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        entry
    };
    let pic = |gsi: u32| {
        if gsi < 8 {
            entry(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)
        } else {
            entry(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)
        }
    };
    (0..PIC_PINS)
        .map(pic)
        .chain((0..IOAPIC_PINS).map(|gsi| entry(gsi, KVM_IRQCHIP_IOAPIC, gsi)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_told_apart_by_address() {
        let sints = Sints { base: 0xfed8_0000, stride: 16, processors: 3 };
        let of = |address, data| Route::of_message(address, data, Some(&sints)).ok();
        assert_eq!(
            of(0xfee0_100c, 0x4031),
            Some(Route::Msi { address: 0xfee0_100c, data: 0x4031 })
        );
        assert_eq!(of(0xfed8_0020, 5), Some(Route::Sint { vp: 2, sint: 5 }));
        for (address, data) in
            [(0xfed8_0030, 5), (0xfed8_0021, 5), (0xfed8_0000, SINTS), (0, 0), (u64::MAX, 1)]
        {
            assert_eq!(of(address, data), None, "{address:#x} {data}");
        }
        assert!(Route::of_message(0xfed8_0000, 5, None).is_err());
        // Fixed, lowest priority, SMI, nothing, NMI, INIT, start-up, external.
        let ways = (0..8).map(|way| of(0xfee0_0000, way << 8 | 0x31).is_some()).collect::<Vec<_>>();
        assert_eq!(ways, [true, true, false, false, true, false, false, false]);
        assert_eq!(Sints { stride: 0, ..sints }.processor(0xfed8_0000), None);
    }
}
