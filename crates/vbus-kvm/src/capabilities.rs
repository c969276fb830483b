//! What a KVM can do.

use kvm_bindings::{
    KVM_CAP_BINARY_STATS_FD, KVM_CAP_HYPERV, KVM_CAP_HYPERV_EVENTFD, KVM_CAP_HYPERV_SYNIC2,
    KVM_CAP_IOEVENTFD, KVM_CAP_IOEVENTFD_ANY_LENGTH, KVM_CAP_IRQ_ROUTING, KVM_CAP_IRQFD,
    KVM_CAP_IRQFD_RESAMPLE, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::Kvm;

use crate::doorbells::Kind;

/// The leaf in which KVM names its own features, and the one that is PV EOI.
const KVM_FEATURES: u32 = 0x4000_0001;
const KVM_FEATURE_PV_EOI: u32 = 1 << 6;

/// What this machine's KVM can do of what vbus has a use for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kinds {
    /// Doorbells as writes of any length to memory, and to ports.
    pub ioeventfd: bool,
    /// Doorbells as hypercalls: HvCallSignalEvent (`KVM_HYPERV_EVENTFD`).
    pub hypercall: bool,
    /// Interrupts by eventfds.
    pub irqfd: bool,
    /// Levels by eventfds, with word of their end.
    pub resample: bool,
    /// How many interrupt routes there can be, those of the pins included; 0: none.
    pub routes: u32,
    /// Interrupts that the virtual CPU's SynIC takes, which end by themselves where the guest wants
    /// it so (AutoEOI).
    pub synic: bool,
    /// The guest can end an interrupt by a store (KVM's paravirtual end of interrupt).
    pub pv_eoi: bool,
    /// The local APICs can be in the kernel without the other interrupt controllers.
    pub split_irqchip: bool,
    /// [`Stats`](crate::Stats).
    pub stats: bool,
}

impl Kinds {
    /// Asks.
    pub fn probe(kvm: &Kvm) -> Kinds {
        let has = |capability: u32| kvm.check_extension_raw(capability.into()) > 0;
        let features = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_or(0, |leaves| {
            leaves
                .as_slice()
                .iter()
                .find(|leaf| leaf.function == KVM_FEATURES)
                .map_or(0, |leaf| leaf.eax)
        });
        let routes = kvm.check_extension_raw(KVM_CAP_IRQ_ROUTING.into());
        Kinds {
            ioeventfd: has(KVM_CAP_IOEVENTFD) && has(KVM_CAP_IOEVENTFD_ANY_LENGTH),
            hypercall: has(KVM_CAP_HYPERV) && has(KVM_CAP_HYPERV_EVENTFD),
            irqfd: has(KVM_CAP_IRQFD),
            resample: has(KVM_CAP_IRQFD_RESAMPLE),
            routes: u32::try_from(routes).unwrap_or(0),
            synic: has(KVM_CAP_HYPERV_SYNIC2),
            pv_eoi: features & KVM_FEATURE_PV_EOI != 0,
            split_irqchip: has(KVM_CAP_SPLIT_IRQCHIP),
            stats: has(KVM_CAP_BINARY_STATS_FD),
        }
    }

    /// Whether doorbells of this kind can be had.
    pub fn has(&self, kind: Kind) -> bool {
        match kind {
            Kind::Mmio | Kind::Pio => self.ioeventfd,
            Kind::Hypercall => self.hypercall,
        }
    }
}
