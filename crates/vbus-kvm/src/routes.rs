//! Which interrupt a number stands for (the table behind `KVM_SET_GSI_ROUTING`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use kvm_bindings::{
    KVM_CAP_IRQ_ROUTING, KVM_IRQ_ROUTING_HV_SINT, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI,
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting,
    kvm_irq_routing_entry, kvm_irq_routing_hv_sint, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
    kvm_msi,
};
use kvm_ioctls::VmFd;

use crate::Error;

/// Synthetic interrupts of one virtual processor.
pub const SINTS: u32 = 16;
/// Ways to deliver a message, as its data has them.
const FIXED: u32 = 0;
const LOWEST: u32 = 1;
const NMI: u32 = 4;
/// Pins of KVM's I/O APIC, and of its two PICs together.
pub(crate) const IOAPIC_PINS: u32 = 24;
const PIC_PINS: u32 = 16;

/// Where the interrupt controllers other than the local APICs are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chip {
    /// In the kernel (`KVM_CREATE_IRQCHIP`): numbers 0 to 23 are the pins of KVM's I/O APIC, 0 to
    /// 15 those of its PICs too.
    Kernel,
    /// In the VMM (`KVM_CAP_SPLIT_IRQCHIP`): numbers from 0 on are kept for as many pins of its I/O
    /// APIC, which gives them routes by [`Routes::set`], so that KVM tells it of their ends.
    Split {
        /// How many, as KVM was told.
        pins: u32,
    },
}

impl Chip {
    /// Numbers that are not for messages.
    fn pins(self) -> u32 {
        match self {
            Chip::Kernel => IOAPIC_PINS,
            Chip::Split { pins } => pins,
        }
    }
}

/// An interrupt that is a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// To the local APICs.
    Msi {
        /// As in the MSI capability or the MSI-X table, or as an I/O APIC would send it.
        address: u64,
        /// Likewise.
        data: u32,
    },
    /// To one virtual processor's SynIC.
    Sint {
        /// Its Hyper-V index, which is that of the virtual CPU unless the VMM has set it.
        vp: u32,
        /// The synthetic interrupt, below [`SINTS`].
        sint: u32,
    },
}

impl Route {
    /// What a message of a function means: an MSI if `address` is a local APIC's, a synthetic
    /// interrupt if it is one of `sints`.
    ///
    /// Of the ways to deliver an MSI a function has those of an interrupt: fixed, lowest priority,
    /// and NMI. An SMI or an INIT would be the end of the virtual machine, or of what runs in it:
    /// with some kernels KVM can run it no more.
    ///
    /// # Errors
    /// [`Error::NoInterrupt`] if it is neither. That is the guest's doing, who may write there what
    /// it likes.
    pub fn of_message(address: u64, data: u32, sints: Option<&Sints>) -> Result<Route, Error> {
        if let Some(vp) = sints.and_then(|sints| sints.processor(address)) {
            return if data < SINTS {
                Ok(Route::Sint { vp, sint: data })
            } else {
                Err(Error::NoInterrupt(format!("synthetic interrupt {data}")))
            };
        }
        // The low half is 0xfee00000 and what the local APIC takes the destination from; the high
        // half is of the destination, too.
        if address & 0xfff0_0000 != 0xfee0_0000 {
            return Err(Error::NoInterrupt(format!("a message to {address:#x}")));
        }
        match data >> 8 & 7 {
            FIXED | LOWEST | NMI => Ok(Route::Msi { address, data }),
            other => Err(Error::NoInterrupt(format!("a message to be delivered in way {other}"))),
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

/// The lower and the upper half of an address, as KVM takes it.
fn halves(address: u64) -> (u32, u32) {
    ((address & 0xffff_ffff) as u32, (address >> 32) as u32)
}

/// The addresses that stand for synthetic interrupts: a message to `base + vp * stride` with data n
/// raises synthetic interrupt n of virtual processor vp. They are a doorbell record's neighbour in
/// the capability of a function (`spec/pci.md`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sints {
    /// Address for virtual processor 0.
    pub base: u64,
    /// From one to the next; not 0.
    pub stride: u16,
    /// How many virtual processors there are.
    pub processors: u32,
}

impl Sints {
    fn processor(&self, address: u64) -> Option<u32> {
        let (offset, stride) = (address.checked_sub(self.base)?, u64::from(self.stride));
        let processor = u32::try_from(offset.checked_div(stride)?).ok()?;
        (offset % stride == 0 && processor < self.processors).then_some(processor)
    }
}

/// The routes of one virtual machine. KVM takes them only all at once, so nobody else may set them.
#[derive(Debug)]
pub struct Routes {
    vm: Arc<VmFd>,
    chip: Chip,
    /// The most entries that KVM takes.
    limit: u32,
    table: Mutex<Table>,
}

/// Numbers in use, with their route if they have one.
type Table = BTreeMap<u32, Option<Route>>;

impl Routes {
    /// The routes of `vm`, which has got its interrupt controllers already: those of the pins.
    ///
    /// # Errors
    /// [`Error::Missing`] without interrupt controllers in the kernel, or routes.
    pub fn new(vm: Arc<VmFd>, chip: Chip) -> Result<Arc<Routes>, Error> {
        let limit = u32::try_from(vm.check_extension_raw(KVM_CAP_IRQ_ROUTING.into())).unwrap_or(0);
        if limit <= chip.pins() + PIC_PINS {
            return Err(Error::Missing("interrupt routes"));
        }
        let routes = Routes { vm, chip, limit, table: Mutex::new(Table::new()) };
        routes.give(&routes.lock())?;
        Ok(Arc::new(routes))
    }

    /// The virtual machine.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// Sends one message, without a route: to the local APICs at once.
    ///
    /// # Errors
    /// What KVM says, for example that nobody has that address. A guest can cause it.
    pub fn send(&self, address: u64, data: u32) -> Result<(), Error> {
        let (address_lo, address_hi) = halves(address);
        let message = kvm_msi { address_lo, address_hi, data, ..Default::default() };
        self.vm.signal_msi(message).map(drop).map_err(Error::kvm("KVM_SIGNAL_MSI"))
    }

    /// Where the pins are.
    pub fn chip(&self) -> Chip {
        self.chip
    }

    /// A number for a message; it has no route yet.
    ///
    /// # Errors
    /// [`Error::Routes`] if there is none left.
    pub fn alloc(&self) -> Result<u32, Error> {
        let mut table = self.lock();
        let first = self.chip.pins();
        // The kernel's own PICs have entries too, so that as many numbers are without.
        let end = self.limit - if self.chip == Chip::Kernel { PIC_PINS } else { 0 };
        let free =
            (first..end).find(|gsi| !table.contains_key(gsi)).ok_or(Error::Routes(end - first))?;
        table.insert(free, None);
        Ok(free)
    }

    /// Takes back a number of [`alloc`](Self::alloc), which nothing may use any more.
    pub fn free(&self, gsi: u32) {
        let mut table = self.lock();
        if gsi >= self.chip.pins() && table.remove(&gsi).flatten().is_some() {
            // A table with an entry less is one that KVM takes; were it not so, the number would
            // just stay what it was.
            let _ = self.give(&table);
        }
    }

    /// Gives a number its route, or none: what comes then is lost. Both for numbers of
    /// [`alloc`](Self::alloc) and, if the chip is split, for the pins.
    ///
    /// # Errors
    /// [`Error::NoInterrupt`] for a number or a route that cannot be one, and what KVM says; the
    /// number has then the route that it had.
    pub fn set(&self, gsi: u32, route: Option<Route>) -> Result<(), Error> {
        match route {
            Some(Route::Sint { sint, .. }) if sint >= SINTS => {
                return Err(Error::NoInterrupt(format!("synthetic interrupt {sint}")));
            }
            _ => {}
        }
        let mut table = self.lock();
        let is_pin = gsi < self.chip.pins() && self.chip != Chip::Kernel;
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

    /// Gives KVM the table.
    fn give(&self, table: &Table) -> Result<(), Error> {
        let mut entries = match self.chip {
            Chip::Kernel => pins(),
            Chip::Split { .. } => Vec::new(),
        };
        entries
            .extend(table.iter().filter_map(|(gsi, route)| route.map(|route| route.entry(*gsi))));
        let routing =
            KvmIrqRouting::from_entries(&entries).map_err(|_| Error::Routes(self.limit))?;
        self.vm.set_gsi_routing(&routing).map_err(Error::kvm("KVM_SET_GSI_ROUTING"))
    }
}

/// The entries of the kernel's interrupt controllers.
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
