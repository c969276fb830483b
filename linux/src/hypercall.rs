// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hypercalls as doorbells (spec/pci.md, "Doorbell kinds"), where they do no harm to Linux.
//!
//! They need the identity of a guest of Hyper-V's kind, which the virtual machine then has until it
//! is reset. KVM takes all later hypercalls for Hyper-V's. So KVM's own fail, also those of other
//! modules that nobody can foresee here (`ptp_kvm`, which may be loaded later). That is why the
//! administrator has to allow them, by the module's parameter `hypercalls`.
#![allow(unsafe_code, reason = "calls the hypervisor")]

use core::sync::atomic::{AtomicU8, Ordering};

use vbus_shm::abi::capability;

use crate::kernel::x86;

/// The leaf of the hypervisor's interface, and its value for Hyper-V's: "Hv#1".
const INTERFACE: (u32, u32) = (0x4000_0001, 0x3123_7648);
/// KVM's own leaves where Hyper-V's are in their place, and their name: "KVMKVMKVM".
const KVM_LEAF: u32 = 0x4000_0100;
const KVM_NAME: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x0000_004d];
/// Features of KVM that a Linux uses by KVM's hypercalls (leaf `KVM_LEAF + 1`, `eax`): they fail
/// once the guest has Hyper-V's identity.
const KVM_BY_HYPERCALL: u32 = 1 << 7 | 1 << 11 | 1 << 13 | 1 << 16 | 1 << 17;

/// The register of the guest's identity.
const IDENTITY_MSR: u32 = 0x4000_0000;
/// The identity that this driver sets: an open-source system of no known kind.
const IDENTITY: u64 = 1 << 63 | 0x7f << 56;

/// What is known about hypercalls here.
static KNOWN: AtomicU8 = AtomicU8::new(UNKNOWN);
const UNKNOWN: u8 = 0;
const NO: u8 = 1;
const VMCALL: u8 = 2;
const VMMCALL: u8 = 3;

/// Whether doorbells can be rung by hypercalls. If the administrator allows them, the first call
/// prepares the virtual machine for it, unless Linux has given the machine another identity: then
/// hypercalls are Linux's alone.
pub fn can_ring() -> bool {
    let mut known = KNOWN.load(Ordering::Relaxed);
    if known == UNKNOWN {
        known = match prepare() {
            true if x86::has_vmmcall() => VMMCALL,
            true => VMCALL,
            false => NO,
        };
        // Two threads find the same.
        KNOWN.store(known, Ordering::Relaxed);
    }
    known != NO
}

fn prepare() -> bool {
    if !x86::may_call() || !x86::has_hypervisor() {
        return false;
    }
    let [interface, ..] = x86::cpuid(INTERFACE.0);
    let [_, name @ ..] = x86::cpuid(KVM_LEAF);
    let [features, ..] = x86::cpuid(KVM_LEAF + 1);
    if interface != INTERFACE.1 || name == KVM_NAME && features & KVM_BY_HYPERCALL != 0 {
        return false;
    }
    match x86::read_msr(IDENTITY_MSR) {
        Ok(IDENTITY) => true,
        // SAFETY: the register belongs to the interface. It tells the hypervisor who calls, and
        // touches no memory.
        Ok(0) => unsafe { x86::write_msr(IDENTITY_MSR, IDENTITY) }.is_ok(),
        _ => false,
    }
}

/// Signals the event of a connection. The device sees it after all earlier writes to memory: a
/// hypercall leaves the guest. Nothing happens where [`can_ring`] is false.
pub fn ring(connection: u64) {
    let known = KNOWN.load(Ordering::Relaxed);
    if known == VMCALL || known == VMMCALL {
        // The status does not matter: a ring without a region is no error.
        // SAFETY: the interface is there, and the call has its parameter in a register.
        unsafe { x86::hypercall(known == VMMCALL, capability::SIGNAL_EVENT, connection) };
    }
}
