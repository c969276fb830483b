// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A virtual machine with one CPU and no firmware. It runs small loops in 64-bit mode and counts
//! their exits.
#![allow(
    unsafe_code,
    reason = "maps the memory of a virtual machine, and names code that is its, not ours"
)]

use std::arch::x86_64::__cpuid;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{
    CpuId, KVM_CAP_HYPERV_SYNIC2, KVM_IRQCHIP_IOAPIC, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap,
    kvm_irqchip, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use vbus_kvm::{Capabilities, Stats, Values, offer_hypercalls};

/// The address of doorbells. It is outside of the memory, but the guest has mapped it.
pub const MMIO: u64 = 0x1000_0000;
pub const PORT: u16 = 0xc000;
pub const CONNECTION: u32 = 0xab_cdef;
/// Two interrupts that the guest counts. It ends the first by its APIC; the second ends by itself.
pub const VECTOR: u8 = 0x31;
pub const AUTO_VECTOR: u8 = 0x32;
/// The status of a hypercall for an event connection that does not exist.
pub const NO_CONNECTION: u64 = 0x12;
/// The synthetic interrupt that has [`AUTO_VECTOR`].
pub const SINT: u32 = 5;

const BYTES: usize = 0x20_0000;
/// Page tables, descriptor tables, the counter, the stack's end, and the code.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const COUNTER: u64 = 0x6000;
const STACK: u64 = 0x8000;
const CODE: u64 = 0x9000;
/// A write to it ends a program.
const END_PORT: u16 = 0x80;

std::arch::global_asm!(
    ".pushsection .rodata.tiny, \"a\"",
    ".global tiny_start, tiny_end, tiny_setup, tiny_synic, tiny_mmio, tiny_pio, tiny_vmmcall, tiny_vmcall, tiny_wait",
    ".global tiny_interrupt, tiny_auto_interrupt",
    "tiny_start:",
    // Switch the local APIC on by its x2APIC registers.
    "tiny_setup:",
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0xc00",
    "wrmsr",
    "mov ecx, 0x80f",
    "mov eax, 0x1ff",
    "xor edx, edx",
    "wrmsr",
    "jmp 9f",
    // Set the guest's identity for hypercalls, switch the SynIC on, and give one of its interrupts
    // a vector that ends by itself.
    "tiny_synic:",
    "mov ecx, 0x40000000",
    "mov eax, 1",
    "mov edx, 0x80000000",
    "wrmsr",
    "test rbx, rbx",
    "jz 9f",
    "mov ecx, 0x40000080",
    "mov eax, 1",
    "xor edx, edx",
    "wrmsr",
    "mov ecx, 0x40000090 + {sint}",
    "mov eax, {auto} + (1 << 17)",
    "wrmsr",
    "jmp 9f",
    // Ring rbx times: at address rsi, at port dx, or connection r12. Then take pending interrupts.
    "tiny_mmio:",
    "sti",
    "2: mov dword ptr [rsi], eax",
    "dec rbx",
    "jnz 2b",
    "jmp 9f",
    "tiny_pio:",
    "sti",
    "2: out dx, al",
    "dec rbx",
    "jnz 2b",
    "jmp 9f",
    "tiny_vmmcall:",
    "sti",
    "2: mov ecx, {input}",
    "mov rdx, r12",
    "xor r8d, r8d",
    "vmmcall",
    "or r13, rax",
    "dec rbx",
    "jnz 2b",
    "jmp 9f",
    "tiny_vmcall:",
    "sti",
    "2: mov ecx, {input}",
    "mov rdx, r12",
    "xor r8d, r8d",
    "vmcall",
    "or r13, rax",
    "dec rbx",
    "jnz 2b",
    "jmp 9f",
    // Wait until the counter has reached rbx.
    "tiny_wait:",
    "sti",
    "2: pause",
    "cmp qword ptr [{counter}], rbx",
    "jb 2b",
    "9: sti",
    "nop",
    "cli",
    "out {end}, al",
    "jmp 9b",
    "tiny_interrupt:",
    "push rax",
    "push rcx",
    "push rdx",
    "inc qword ptr [{counter}]",
    "mov ecx, 0x80b",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "iretq",
    "tiny_auto_interrupt:",
    "inc qword ptr [{counter}]",
    "iretq",
    "tiny_end:",
    ".popsection",
    sint = const SINT,
    auto = const AUTO_VECTOR,
    input = const vbus_shm::abi::capability::SIGNAL_EVENT,
    counter = const COUNTER,
    end = const END_PORT,
);

unsafe extern "C" {
    static tiny_start: u8;
    static tiny_end: u8;
    static tiny_setup: u8;
    static tiny_synic: u8;
    static tiny_mmio: u8;
    static tiny_pio: u8;
    static tiny_vmmcall: u8;
    static tiny_vmcall: u8;
    static tiny_wait: u8;
    static tiny_interrupt: u8;
    static tiny_auto_interrupt: u8;
}

/// The program of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Rings as often as this.
    Ring(vbus_kvm::DoorbellKind, u64),
    /// Waits until as many interrupts as this have come since the machine was made.
    Wait(u64),
}

/// The cost of a program.
#[derive(Debug)]
pub struct Cost {
    /// Exits, without those for the host's own interrupts, and without the one that ended the
    /// program.
    pub exits: u64,
    /// Exits to user space, without the one that ended the program.
    pub user_exits: u64,
    /// Interrupts that were counted.
    pub interrupts: u64,
    /// The bitwise OR of the statuses of all hypercalls.
    pub statuses: u64,
}

/// The virtual machine.
pub struct Tiny {
    pub capabilities: Capabilities,
    pub vm: Arc<VmFd>,
    vcpu: VcpuFd,
    stats: Stats,
    memory: *mut u8,
}

/// Makes a machine. Without KVM, prints the reason and returns `None`.
pub fn machine() -> Option<Tiny> {
    match Kvm::new() {
        Ok(kvm) => Some(Tiny::new(&kvm)),
        Err(error) => {
            println!("skipped: no KVM here ({error})");
            None
        }
    }
}

impl Tiny {
    fn new(kvm: &Kvm) -> Tiny {
        let capabilities = Capabilities::probe(kvm);
        let vm = kvm.create_vm().unwrap();
        vm.set_tss_address(0xfffb_d000).unwrap();
        vm.create_irq_chip().unwrap();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let (anywhere, flags) = (std::ptr::null_mut(), MapFlags::PRIVATE);
        // SAFETY: A new mapping, which lasts until the process ends.
        let memory = unsafe { mmap_anonymous(anywhere, BYTES, protection, flags) };
        let memory = memory.unwrap().cast::<u8>();
        let region = kvm_userspace_memory_region {
            memory_size: BYTES as u64,
            userspace_addr: memory as u64,
            ..Default::default()
        };
        // SAFETY: the mapping is that large and lasts.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();

        let mut leaves =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap().as_slice().to_vec();
        if capabilities.hypercall {
            offer_hypercalls(&mut leaves, capabilities.synic);
        }
        vcpu.set_cpuid2(&CpuId::from_entries(&leaves).unwrap()).unwrap();
        if capabilities.synic {
            vcpu.enable_cap(&kvm_enable_cap { cap: KVM_CAP_HYPERV_SYNIC2, ..Default::default() })
                .unwrap();
        }
        let stats = Stats::of_vcpu(&vcpu).unwrap();
        let mut tiny = Tiny { capabilities, vm: Arc::new(vm), vcpu, stats, memory };
        tiny.lay_out();
        tiny.enter_long_mode();
        tiny.run_at(&raw const tiny_setup, |_| {});
        if capabilities.hypercall {
            tiny.run_at(&raw const tiny_synic, |registers| {
                registers.rbx = capabilities.synic.into()
            });
        }
        tiny
    }

    fn lay_out(&mut self) {
        // SAFETY: code between two labels of one section.
        let code = unsafe {
            let (start, end) = (&raw const tiny_start, &raw const tiny_end);
            std::slice::from_raw_parts(start, end.offset_from(start) as usize)
        };
        self.put(CODE, code);
        let mut word = |at: u64, value: u64| self.put(at, &value.to_le_bytes());
        // The first GiB, in pages of 2 MiB; present and writable.
        word(PML4, PDPT | 3);
        word(PDPT, DIRECTORY | 3);
        for page in 0..512 {
            word(DIRECTORY + page * 8, page << 21 | 0x83);
        }
        word(GDT + 8, 0x00af_9b00_0000_ffff);
        word(GDT + 16, 0x00cf_9300_0000_ffff);
        for (vector, handler) in
            [(VECTOR, &raw const tiny_interrupt), (AUTO_VECTOR, &raw const tiny_auto_interrupt)]
        {
            let at = place(handler);
            // An interrupt gate of ring 0, code segment 8.
            word(
                IDT + u64::from(vector) * 16,
                at & 0xffff | 8 << 16 | 0x8e00 << 32 | (at >> 16) << 48,
            );
        }
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        assert!(at as usize + bytes.len() <= BYTES);
        // SAFETY: within the mapping, as just checked; the guest is not running.
        unsafe {
            self.memory.add(at as usize).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
        };
    }

    fn enter_long_mode(&mut self) {
        let mut system = self.vcpu.get_sregs().unwrap();
        let segment = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
        system.cs = kvm_segment { selector: 8, type_: 11, l: 1, ..segment };
        let data = kvm_segment { selector: 16, type_: 3, db: 1, ..segment };
        (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
        (system.gdt.base, system.gdt.limit) = (GDT, 23);
        (system.idt.base, system.idt.limit) = (IDT, 0xfff);
        system.cr3 = PML4;
        // Physical address extension; paging, protection; long mode, enabled and active.
        (system.cr4, system.cr0, system.efer) = (1 << 5, 0x8000_0011, 0x500);
        self.vcpu.set_sregs(&system).unwrap();
    }

    /// Interrupts that the guest has counted.
    pub fn interrupts(&self) -> u64 {
        self.counter().load(Ordering::Relaxed)
    }

    /// The guest's counter, for other threads.
    pub fn counter(&self) -> &'static AtomicU64 {
        // SAFETY: within the mapping, which lasts, and aligned; the guest writes it as one word.
        unsafe { AtomicU64::from_ptr(self.memory.add(COUNTER as usize).cast()) }
    }

    /// Whether a pin of the I/O APIC is asserted.
    pub fn is_asserted(&self, pin: u32) -> bool {
        // SAFETY: the I/O APIC's part is the one that was asked for.
        unsafe { self.io_apic().chip.ioapic.irr & 1 << pin != 0 }
    }

    /// Routes a pin, level-triggered, to interrupt [`VECTOR`].
    pub fn enable_pin(&mut self, pin: u32) {
        let mut chip = self.io_apic();
        // Level-triggered, to APIC 0.
        // SAFETY: the I/O APIC's part is the one that was asked for.
        unsafe { chip.chip.ioapic.redirtbl[pin as usize].bits = u64::from(VECTOR) | 1 << 15 };
        self.vm.set_irqchip(&chip).unwrap();
    }

    fn io_apic(&self) -> kvm_irqchip {
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        self.vm.get_irqchip(&mut chip).unwrap();
        chip
    }

    /// KVM's statistics of the CPU.
    pub fn stats(&self) -> Values {
        self.stats.read().unwrap()
    }

    /// Runs a program to its end.
    pub fn run(&mut self, program: Program) -> Cost {
        let before = (self.stats(), self.interrupts());
        let (user_exits, statuses) = match program {
            Program::Ring(kind, count) => {
                let code = match kind {
                    vbus_kvm::DoorbellKind::Mmio => &raw const tiny_mmio,
                    vbus_kvm::DoorbellKind::Pio => &raw const tiny_pio,
                    vbus_kvm::DoorbellKind::Hypercall if is_intel() => &raw const tiny_vmcall,
                    vbus_kvm::DoorbellKind::Hypercall => &raw const tiny_vmmcall,
                };
                self.run_at(code, |registers| {
                    (registers.rbx, registers.rsi, registers.rdx) = (count, MMIO, PORT.into());
                    registers.r12 = CONNECTION.into();
                })
            }
            Program::Wait(count) => {
                self.run_at(&raw const tiny_wait, |registers| registers.rbx = count)
            }
        };
        let after = self.stats();
        let exits = |stats: &Values| stats["exits"] - stats["irq_exits"];
        Cost {
            exits: exits(&after) - exits(&before.0) - 1,
            user_exits,
            interrupts: self.interrupts() - before.1,
            statuses,
        }
    }

    /// Runs `code` to its end. Returns the number of exits to user space, and the statuses.
    fn run_at(
        &mut self,
        code: *const u8,
        set: impl FnOnce(&mut kvm_bindings::kvm_regs),
    ) -> (u64, u64) {
        let mut registers = kvm_bindings::kvm_regs {
            rip: place(code),
            rsp: STACK,
            rflags: 2,
            ..Default::default()
        };
        set(&mut registers);
        self.vcpu.set_regs(&registers).unwrap();
        let mut user_exits = 0;
        loop {
            match self.vcpu.run().unwrap() {
                VcpuExit::IoOut(END_PORT, _) => break,
                VcpuExit::IoOut(PORT, _) | VcpuExit::MmioWrite(MMIO, _) => user_exits += 1,
                // KVM reports that the SynIC was switched on, or that a connection does not exist.
                VcpuExit::Hyperv => {
                    user_exits += 1;
                    self.vcpu.get_kvm_run().__bindgen_anon_1.hyperv.u.hcall.result = NO_CONNECTION;
                }
                other => panic!("{other:?}"),
            }
        }
        (user_exits, self.vcpu.get_regs().unwrap().r13)
    }
}

/// The address of a label in the guest.
fn place(label: *const u8) -> u64 {
    // SAFETY: two labels of one section.
    CODE + unsafe { label.offset_from(&raw const tiny_start) } as u64
}

fn is_intel() -> bool {
    // SAFETY: every x86-64 has leaf 0. (Safe in newer versions of the standard library.)
    #[allow(unused_unsafe)]
    let leaf = unsafe { __cpuid(0) };
    leaf.ebx == u32::from_le_bytes(*b"Genu")
}
