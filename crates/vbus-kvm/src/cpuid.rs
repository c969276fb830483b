// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The CPUID leaves that a guest needs for hypercalls and synthetic interrupts.

use kvm_bindings::kvm_cpuid_entry2;

/// The first leaf of a hypervisor, and the distance to the first leaf of the next one.
const FIRST: u32 = 0x4000_0000;
const STEP: u32 = 0x100;
/// "Hv#1": KVM looks for this value in leaf 0x40000001 and nowhere else.
const INTERFACE: u32 = 0x3123_7648;
/// The name that Linux gives KVM's Hyper-V interface. Systems recognize Hyper-V by the name
/// "Microsoft Hv", so they still take this machine for one of KVM.
const VENDOR: &[u8; 12] = b"Linux KVM Hv";
const KVM: &[u8; 12] = b"KVMKVMKVM\0\0\0";

/// Rights of leaf 0x40000003, eax: SynIC's registers, those for hypercalls, the processor's number;
/// ebx: HvCallSignalEvent.
const SYNIC: u32 = 1 << 2;
const HYPERCALLS: u32 = 1 << 5;
const VP_INDEX: u32 = 1 << 6;
const SIGNAL_EVENTS: u32 = 1 << 5;
/// How often a guest spins for a lock before it tells the hypervisor. With this value it never
/// tells.
const SPIN_FOREVER: u32 = u32::MAX;

/// The bits of KVM's own features that a guest uses by KVM hypercalls: kicks for spinning locks
/// (7), interrupts to several processors (11), yielding to a processor (13), the report of shared
/// memory (16), and the migration control that belongs to it (17).
const BY_HYPERCALL: u32 = 1 << 7 | 1 << 11 | 1 << 13 | 1 << 16 | 1 << 17;

/// Changes the CPUID leaves of a virtual CPU so that its guest can ring doorbells by hypercalls
/// and, if `synic`, use synthetic interrupts. `leaves` are those of `KVM_GET_SUPPORTED_CPUID`, or a
/// choice of them. For synthetic interrupts the VMM must also enable `KVM_CAP_HYPERV_SYNIC2` on the
/// virtual CPU.
///
/// KVM accepts Hyper-V registers and hypercalls only from a virtual CPU whose leaf 0x40000001 is
/// that of Hyper-V. This function therefore puts Hyper-V's leaves at 0x40000000, with a name by
/// which no system takes the machine for Hyper-V. It moves KVM's leaves to 0x40000100, where
/// systems that know KVM look as well: Linux remains a guest of KVM.
///
/// If the SynIC is on, a hypercall for an event connection that does not exist ends as
/// `KVM_EXIT_HYPERV`. The VMM must then set its `result` to 0x12, "no such connection". KVM reports
/// by the same exit that the guest switched the SynIC on.
///
/// A guest must set Hyper-V's identity register before it makes hypercalls. After that KVM takes
/// *all* hypercalls of the virtual machine for Hyper-V's. The features of KVM that need KVM
/// hypercalls would silently fail, so this function removes them.
pub fn offer_hypercalls(leaves: &mut Vec<kvm_cpuid_entry2>, synic: bool) {
    let find = |function| leaves.iter().find(|leaf| leaf.function == function);
    let is_kvm = |leaf: &&kvm_cpuid_entry2| {
        [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat() == KVM
            && leaf.function % STEP == 0
    };
    let kvm = leaves.iter().find(is_kvm).and_then(|leaf| find(leaf.function + 1));
    let (features, hints) = kvm.map_or((0, 0), |leaf| (leaf.eax, leaf.edx));
    leaves.retain(|leaf| !(FIRST..FIRST + 0x1_0000).contains(&leaf.function));
    let leaf = |function, [eax, ebx, ecx, edx]: [u32; 4]| kvm_cpuid_entry2 {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    let named = |function, max, name: &[u8; 12]| {
        let word =
            |at: usize| u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]]);
        leaf(function, [max, word(0), word(4), word(8)])
    };
    let rights = HYPERCALLS | VP_INDEX | if synic { SYNIC } else { 0 };
    leaves.extend([
        named(FIRST, FIRST + 5, VENDOR),
        leaf(FIRST + 1, [INTERFACE, 0, 0, 0]),
        leaf(FIRST + 2, [0; 4]),
        leaf(FIRST + 3, [rights, SIGNAL_EVENTS, 0, 0]),
        leaf(FIRST + 4, [0, SPIN_FOREVER, 0, 0]),
        leaf(FIRST + 5, [0; 4]),
        named(FIRST + STEP, FIRST + STEP + 1, KVM),
        leaf(FIRST + STEP + 1, [features & !BY_HYPERCALL, 0, 0, hints]),
    ]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_interfaces_are_there_and_nothing_is_done_by_kvms_hypercalls() {
        let leaf =
            |function, eax, edx| kvm_cpuid_entry2 { function, eax, edx, ..Default::default() };
        let [ebx, ecx] = [b"KVMK", b"VMKV"].map(|name| u32::from_le_bytes(*name));
        let mut leaves = vec![
            leaf(1, 0x1234, 5),
            kvm_cpuid_entry2 { ebx, ecx, ..leaf(0x4000_0000, 0x4000_0001, 0x4d) },
            leaf(0x4000_0001, 0x0103_29fb, 1),
            leaf(0x8000_0000, 0x8000_0008, 0),
        ];
        offer_hypercalls(&mut leaves, false);
        check(&leaves, 0x60);
        // A second time, for whoever begins with leaves that were made so.
        offer_hypercalls(&mut leaves, true);
        check(&leaves, 0x64);
    }

    fn check(leaves: &[kvm_cpuid_entry2], rights: u32) {
        let get = |function| {
            let mut found = leaves.iter().filter(|leaf| leaf.function == function);
            let leaf = *found.next().expect("a leaf");
            assert!(found.next().is_none());
            leaf
        };
        assert_eq!((get(1).eax, get(0x8000_0000).eax), (0x1234, 0x8000_0008));
        assert_eq!(get(0x4000_0001).eax, u32::from_le_bytes(*b"Hv#1"));
        assert_eq!(get(0x4000_0003).eax, rights);
        let kvm = get(0x4000_0100);
        assert_eq!([kvm.ebx, kvm.ecx, kvm.edx].map(u32::to_le_bytes).concat(), b"KVMKVMKVM\0\0\0");
        assert_eq!((get(kvm.eax).eax, get(kvm.eax).edx), (0x0100_017b, 1));
    }
}
