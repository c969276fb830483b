// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The features of KVM that vbus uses, as this machine's KVM has them.

use kvm_bindings::{
    KVM_CAP_BINARY_STATS_FD, KVM_CAP_HYPERV, KVM_CAP_HYPERV_EVENTFD, KVM_CAP_HYPERV_SYNIC2,
    KVM_CAP_IOEVENTFD, KVM_CAP_IOEVENTFD_ANY_LENGTH, KVM_CAP_IRQ_ROUTING, KVM_CAP_IRQFD,
    KVM_CAP_IRQFD_RESAMPLE, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::Kvm;

use crate::doorbells::DoorbellKind;

/// The CPUID leaf in which KVM lists its paravirtual features, and the bit of PV EOI.
const KVM_FEATURES: u32 = 0x4000_0001;
const KVM_FEATURE_PV_EOI: u32 = 1 << 6;

/// The features of KVM that vbus uses, as this machine's KVM has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// A write of any length to memory or to a port can ring a doorbell.
    pub ioeventfd: bool,
    /// The hypercall HvCallSignalEvent can ring a doorbell (`KVM_HYPERV_EVENTFD`).
    pub hypercall: bool,
    /// An eventfd can raise an interrupt.
    pub irqfd: bool,
    /// An eventfd can assert a level-triggered interrupt, and another one reports its end.
    pub resample: bool,
    /// The most interrupt routes, those of the pins included. 0: KVM has no routing.
    pub routes: u32,
    /// Virtual CPUs can have a SynIC. Its interrupts end by themselves if the guest asks for
    /// AutoEOI.
    pub synic: bool,
    /// The guest can end an interrupt by a store to memory (KVM's paravirtual end of interrupt).
    pub pv_eoi: bool,
    /// KVM can emulate the local APICs alone, without the other interrupt controllers.
    pub split_irqchip: bool,
    /// KVM has binary statistics: [`Stats`](crate::Stats).
    pub stats: bool,
}

impl Capabilities {
    /// Asks `kvm` for its features.
    pub fn probe(kvm: &Kvm) -> Capabilities {
        let has = |capability: u32| kvm.check_extension_raw(capability.into()) > 0;
        let features = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_or(0, |leaves| {
            leaves
                .as_slice()
                .iter()
                .find(|leaf| leaf.function == KVM_FEATURES)
                .map_or(0, |leaf| leaf.eax)
        });
        let routes = kvm.check_extension_raw(KVM_CAP_IRQ_ROUTING.into());
        Capabilities {
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

    /// Whether KVM supports doorbells of this kind.
    pub fn has(&self, kind: DoorbellKind) -> bool {
        match kind {
            DoorbellKind::Mmio | DoorbellKind::Pio => self.ioeventfd,
            DoorbellKind::Hypercall => self.hypercall,
        }
    }
}
