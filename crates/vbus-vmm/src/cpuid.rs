// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The CPUID of the guest's CPUs: the features that KVM supports, without those that this machine
//! lacks, and the machine's topology.

use anyhow::{Context, Result, ensure};
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

/// Leaf 1, ECX.
const TSC_DEADLINE: u32 = 1 << 24;
const X2APIC: u32 = 1 << 21;
const IN_A_VM: u32 = 1 << 31;
/// Leaf 1, EDX: a package may have several CPUs.
const MANY: u32 = 1 << 28;
/// Leaf 0x80000001, ECX: AMD's extension for virtual machines.
const SVM: u32 = 1 << 2;
/// Leaf 1, ECX: Intel's extension for virtual machines.
const VMX: u32 = 1 << 5;
/// Leaf 0xd, subleaf 1, EAX: supervisor state.
const XSAVES: u32 = 1 << 3;

/// The registers of a leaf, in this order.
const REGISTERS: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];
/// The registers that list features: function and index of the leaf, and the register.
const FEATURES: [((u32, u32), usize); 14] = [
    ((0x1, 0), 2),
    ((0x1, 0), 3),
    ((0x7, 0), 1),
    ((0x7, 0), 2),
    ((0x7, 0), 3),
    ((0x7, 1), 0),
    ((0xd, 0), 0),
    ((0xd, 1), 0),
    ((0x4000_0001, 0), 0),
    ((0x4000_0101, 0), 0),
    ((0x8000_0001, 0), 2),
    ((0x8000_0001, 0), 3),
    ((0x8000_0007, 0), 3),
    ((0x8000_0008, 0), 1),
];
/// The names of some features: leaf, register, bit.
const NAMES: [(u32, usize, u32, &str); 25] = [
    (0x1, 2, 1, "pclmulqdq"),
    (0x1, 2, 9, "ssse3"),
    (0x1, 2, 12, "fma"),
    (0x1, 2, 13, "cx16"),
    (0x1, 2, 19, "sse4.1"),
    (0x1, 2, 20, "sse4.2"),
    (0x1, 2, 22, "movbe"),
    (0x1, 2, 23, "popcnt"),
    (0x1, 2, 24, "tsc-deadline"),
    (0x1, 2, 25, "aes"),
    (0x1, 2, 26, "xsave"),
    (0x1, 2, 28, "avx"),
    (0x1, 2, 29, "f16c"),
    (0x1, 2, 30, "rdrand"),
    (0x7, 1, 0, "fsgsbase"),
    (0x7, 1, 3, "bmi1"),
    (0x7, 1, 5, "avx2"),
    (0x7, 1, 7, "smep"),
    (0x7, 1, 8, "bmi2"),
    (0x7, 1, 16, "avx512f"),
    (0x7, 1, 18, "rdseed"),
    (0x7, 1, 19, "adx"),
    (0x7, 1, 20, "smap"),
    (0x7, 1, 29, "sha"),
    (0x8000_0007, 3, 8, "invariant-tsc"),
];

/// The CPUID leaves of a machine's CPUs.
pub struct Model {
    entries: Vec<kvm_cpuid_entry2>,
    hyperv: bool,
    cpus: u32,
}

impl Model {
    /// Makes the leaves for `cpus` CPUs from the features of `kvm`. With `hyperv`, the guest can
    /// use KVM's Hyper-V interface.
    ///
    /// # Errors
    /// KVM does not list its features.
    pub fn new(kvm: &Kvm, cpus: u32, hyperv: bool) -> Result<Model> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .context("KVM does not say what CPUs it has")?;
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Model::from(supported.as_slice(), cpus, hyperv, deadline))
    }

    /// Makes the leaves of a saved machine: those of [`leaves`](Self::leaves).
    ///
    /// # Errors
    /// The CPUs of `kvm` lack a feature that the saved ones have, or are of another vendor. The
    /// text names all that is missing.
    pub fn saved(kvm: &Kvm, leaves: &[[u32; 7]], cpus: u32, hyperv: bool) -> Result<Model> {
        let own = Model::new(kvm, cpus, hyperv)?;
        own.check(leaves)?;
        let entry = |[function, index, flags, eax, ebx, ecx, edx]: &[u32; 7]| {
            let (function, index, flags) = (*function, *index, *flags);
            let (eax, ebx, ecx, edx) = (*eax, *ebx, *ecx, *edx);
            kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
        };
        Ok(Model { entries: leaves.iter().map(entry).collect(), ..own })
    }

    /// The leaves without the topology: function, index, flags, EAX, EBX, ECX, EDX.
    pub fn leaves(&self) -> Vec<[u32; 7]> {
        let leaf =
            |e: &kvm_cpuid_entry2| [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx];
        self.entries.iter().map(leaf).collect()
    }

    /// Checks that these CPUs have all features of saved leaves.
    fn check(&self, saved: &[[u32; 7]]) -> Result<()> {
        let most = KVM_MAX_CPUID_ENTRIES - 3;
        ensure!(saved.len() <= most, "the saved CPUs have {} CPUID leaves", saved.len());
        let registers = |function: u32, index: u32| {
            let own = self.entries.iter().find(|e| (e.function, e.index) == (function, index));
            own.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
        };
        let mut missing = Vec::new();
        for [function, index, _, saved @ ..] in saved {
            let own = registers(*function, *index);
            if *function == 0 {
                let vendor = |[_, b, c, d]: [u32; 4]| [b, d, c].map(u32::to_le_bytes).concat();
                let (was, is) = (vendor(*saved), vendor(own));
                ensure!(
                    was == is,
                    "the saved CPUs are of {}, and those of this machine of {}",
                    was.escape_ascii(),
                    is.escape_ascii()
                );
            }
            // Only the registers that list features, one bit for each.
            for (register, name) in FEATURES.iter().filter_map(|(leaf, register)| {
                (*leaf == (*function, *index)).then_some((*register, REGISTERS[*register]))
            }) {
                let lacks = saved[register] & !own[register];
                missing.extend((0..32).filter(|bit| lacks & 1 << bit != 0).map(|bit| {
                    let known = NAMES.iter().find(|(leaf, r, number, _)| {
                        (*leaf, *r, *number) == (*function, register, bit)
                    });
                    known.map_or_else(
                        || format!("leaf {function:#x}.{index} {name} bit {bit}"),
                        |(.., name)| (*name).to_owned(),
                    )
                }));
            }
        }
        ensure!(
            missing.is_empty(),
            "this machine's CPUs lack features of the saved ones: {}",
            missing.join(", ")
        );
        Ok(())
    }

    fn from(supported: &[kvm_cpuid_entry2], cpus: u32, hyperv: bool, deadline: bool) -> Model {
        let mut entries: Vec<_> = supported.iter().copied().filter(keep).collect();
        for entry in &mut entries {
            match (entry.function, entry.index) {
                (1, _) => {
                    entry.ecx = (entry.ecx | X2APIC | IN_A_VM) & !(TSC_DEADLINE | VMX);
                    entry.ecx |= if deadline { TSC_DEADLINE } else { 0 };
                }
                (0xd, 1) => {
                    entry.eax &= !XSAVES;
                    (entry.ecx, entry.edx) = (0, 0);
                }
                (0x8000_0001, _) => entry.ecx &= !SVM,
                _ => {}
            }
        }
        if hyperv {
            vbus_kvm::offer_hypercalls(&mut entries, true);
        }
        Model { entries, hyperv, cpus }
    }

    /// Whether the guest can use KVM's Hyper-V interface.
    pub fn hyperv(&self) -> bool {
        self.hyperv
    }

    /// The leaves of CPU `cpu`, which is also the number of its APIC.
    ///
    /// # Errors
    /// KVM's interface does not take so many leaves.
    pub fn of(&self, cpu: u32) -> Result<CpuId> {
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            self.set_topology(entry, cpu);
        }
        entries.extend([0, 1, 2].map(|level| self.topology(level, cpu)));
        CpuId::from_entries(&entries)
            .ok()
            .context("KVM has more CPUID leaves than its interface takes")
    }

    /// Writes the number of the CPU and the topology into a leaf: one package of single-threaded
    /// cores.
    fn set_topology(&self, entry: &mut kvm_cpuid_entry2, cpu: u32) {
        let last = self.cpus - 1;
        match entry.function {
            1 => {
                entry.ebx = (entry.ebx & 0xffff) | self.cpus.min(255) << 16 | (cpu & 0xff) << 24;
                entry.edx = if last > 0 { entry.edx | MANY } else { entry.edx & !MANY };
            }
            // Intel: how many CPUs share a cache, and the cores of the package.
            4 if entry.eax & 0x1f != 0 => {
                let sharers = if entry.eax >> 5 & 7 >= 3 { last } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | (sharers & 0xfff) << 14 | last.min(63) << 26;
            }
            // AMD: the cores of the package, and the number of their bits in the APIC's number.
            0x8000_0008 => entry.ecx = last.min(255) | self.core_bits() << 12,
            // AMD: how many CPUs share a cache.
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let sharers = if entry.eax >> 5 & 7 >= 3 { last } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | (sharers & 0xfff) << 14;
            }
            // AMD: APIC number, core (of one thread each), node 0 of one.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (cpu, cpu & 0xff, 0),
            _ => {}
        }
    }

    /// Leaf 0xb: the threads of a core (one), the cores of the package, and no further level.
    fn topology(&self, level: u32, cpu: u32) -> kvm_cpuid_entry2 {
        let (shift, count, kind) = match level {
            0 => (0, 1, 1),
            1 => (self.core_bits(), self.cpus, 2),
            _ => (0, 0, 0),
        };
        kvm_cpuid_entry2 {
            function: 0xb,
            index: level,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: level | kind << 8,
            edx: cpu,
            ..Default::default()
        }
    }

    /// The number of bits that CPU numbers take.
    fn core_bits(&self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }
}

/// Whether a leaf of KVM is passed on to the guest.
fn keep(entry: &kvm_cpuid_entry2) -> bool {
    match (entry.function, entry.index) {
        // Topology, which this machine has its own of; performance counters; features whose state
        // this program does not keep.
        (0xa | 0xb | 0x12 | 0x14 | 0x1d | 0x1e | 0x1f | 0x8000_0022 | 0x8000_0026, _) => false,
        // The supervisor state of XSAVE, and the tiles of AMX, for which a process must ask its
        // kernel.
        (0xd, 8 | 10..=18) => false,
        _ => true,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn supported() -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(0, 0, [0x1f, 0, 0, 0]),
            entry(1, 0, [0, 0x7700_0800, VMX, 0]),
            entry(0xb, 0, [9, 9, 9, 9]),
            entry(0xd, 0, [7, 832, 832, 0]),
            entry(0xd, 1, [0xf, 832, 0x1800, 0]),
            entry(0xd, 11, [16, 0, 1, 0]),
            entry(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
            entry(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
            entry(0x8000_0001, 0, [0, 0, SVM, 0]),
            entry(0x8000_0008, 0, [0x3028, 0, 0, 0]),
        ]
    }

    fn leaf(model: &Model, cpu: u32, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        let entries = model.of(cpu).unwrap();
        let mut found = entries
            .as_slice()
            .iter()
            .filter(|entry| (entry.function, entry.index) == (function, index));
        let first = found.next().copied();
        assert!(found.next().is_none(), "leaf {function:#x} twice");
        first
    }

    #[test]
    fn every_cpu_knows_its_number_and_that_it_is_in_a_vm() {
        let model = Model::from(&supported(), 3, false, true);
        for cpu in 0..3 {
            let one = leaf(&model, cpu, 1, 0).unwrap();
            assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff, one.ebx & 0xffff), (cpu, 3, 0x800));
            assert_eq!(one.ecx, X2APIC | IN_A_VM | TSC_DEADLINE);
            assert_eq!(one.edx, MANY);
            let cores = leaf(&model, cpu, 0xb, 1).unwrap();
            assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (2, 3, 0x201, cpu));
        }
        let alone = Model::from(&supported(), 1, false, false);
        assert_eq!(leaf(&alone, 0, 1, 0).unwrap().edx, 0);
        assert_eq!(leaf(&alone, 0, 1, 0).unwrap().ecx & TSC_DEADLINE, 0);
        assert_eq!(leaf(&alone, 0, 0xb, 1).unwrap().eax, 0);
    }

    #[test]
    fn features_that_are_missing_are_named() {
        let own = Model::from(&supported(), 2, false, true);
        let leaves = own.leaves();
        own.check(&leaves).unwrap();
        let with = |function: u32, register: usize, bits: u32| {
            let mut leaves = leaves.clone();
            let leaf = leaves.iter_mut().find(|leaf| leaf[0] == function).unwrap();
            leaf[3 + register] |= bits;
            own.check(&leaves).unwrap_err().to_string()
        };
        assert!(with(1, 2, 1 << 28 | 1 << 25).ends_with("aes, avx"));
        assert!(with(0x8000_0001, 3, 1 << 31).ends_with("leaf 0x80000001.0 EDX bit 31"));
        assert!(with(0, 1, u32::from_le_bytes(*b"Genu")).contains("saved CPUs are of Genu"));
        // A leaf that this machine does not have at all.
        let mut more = leaves.clone();
        more.push([7, 0, 0, 0, 1 << 5, 0, 0]);
        assert!(own.check(&more).unwrap_err().to_string().ends_with("avx2"));
        assert!(own.check(&vec![[0; 7]; KVM_MAX_CPUID_ENTRIES]).is_err());
        // Fewer features are no reason to refuse, nor is anything in other registers.
        let mut fewer = leaves;
        fewer.retain(|leaf| leaf[0] != 0x4000_0001);
        fewer[1][3] = 0xffff_ffff;
        own.check(&fewer).unwrap();
    }

    #[test]
    fn state_of_the_kernel_alone_is_not_offered() {
        let model = Model::from(&supported(), 1, false, true);
        assert_eq!(leaf(&model, 0, 0xd, 0).unwrap().eax, 7);
        let one = leaf(&model, 0, 0xd, 1).unwrap();
        assert_eq!((one.eax, one.ecx), (0b111, 0));
        assert!(leaf(&model, 0, 0xd, 11).is_none());
        assert_eq!(leaf(&model, 0, 0x8000_0001, 0).unwrap().ecx, 0);
    }

    #[test]
    fn kvm_is_found_with_and_without_hyperv() {
        let plain = Model::from(&supported(), 1, false, true);
        assert_eq!(leaf(&plain, 0, 0x4000_0000, 0).unwrap().ebx.to_le_bytes(), *b"KVMK");
        let both = Model::from(&supported(), 1, true, true);
        assert_eq!(leaf(&both, 0, 0x4000_0001, 0).unwrap().eax.to_le_bytes(), *b"Hv#1");
        let kvm = leaf(&both, 0, 0x4000_0100, 0).unwrap();
        assert_eq!((kvm.eax, kvm.ebx.to_le_bytes()), (0x4000_0101, *b"KVMK"));
    }
}
