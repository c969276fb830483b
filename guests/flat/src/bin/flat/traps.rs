// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Exceptions and interrupts.
//!
//! Compiled code keeps data below the stack pointer (the *red zone*). So every handler has a stack
//! of its own, from the task state segment. Interrupt handlers are assembly that counts and ends
//! the interrupt. They use no vector register, so they need not save the vector registers. A
//! handler of a test ([`set_handler`]) runs on the interrupted code's stack, beyond its red zone,
//! with all registers saved.
#![allow(unsafe_code, reason = "tables that the processor reads")]

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};

use crate::cpu::{self, CPUS_MAX, write_msr};
use crate::power;
use crate::report::line;

/// The first vector of interrupts.
pub const FIRST: u8 = 32;
/// Vectors of interrupts.
pub const COUNT: usize = 32;
/// The local APIC's vector for spurious interrupts. They need no end of interrupt.
pub const SPURIOUS: u8 = FIRST + COUNT as u8 - 1;

/// How the interrupts of a vector are ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum End {
    /// Automatically, by the interrupt controller.
    Automatic = 0,
    /// By the x2APIC's register.
    X2apic = 1,
    /// By the xAPIC's register.
    Xapic = 2,
    /// By a bit in memory if KVM has set it, otherwise by the x2APIC's register.
    Paravirtual = 3,
}

/// The data of one processor. GS points to it.
#[repr(C)]
struct Local {
    /// KVM sets bit 0 of this word when the processor may end an interrupt by clearing the bit.
    pv_eoi: AtomicU64,
    number: AtomicU32,
    /// Interrupts taken.
    taken: AtomicU64,
    /// Interrupts taken, by vector less [`FIRST`].
    by_vector: [AtomicU64; COUNT],
    /// Interrupts that the processor ended by a write to a register, by vector less [`FIRST`].
    by_register: [AtomicU64; COUNT],
}

static LOCALS: [Local; CPUS_MAX] = [const {
    Local {
        pv_eoi: AtomicU64::new(0),
        number: AtomicU32::new(0),
        taken: AtomicU64::new(0),
        by_vector: [const { AtomicU64::new(0) }; COUNT],
        by_register: [const { AtomicU64::new(0) }; COUNT],
    }
}; CPUS_MAX];

/// [`End`] by vector less [`FIRST`].
static ENDS: [AtomicU8; COUNT] = [const { AtomicU8::new(End::Automatic as u8) }; COUNT];
/// The handler that runs after the end of an interrupt, by vector less [`FIRST`]; null: none.
static HANDLERS: [AtomicPtr<()>; COUNT] = [const { AtomicPtr::new(ptr::null_mut()) }; COUNT];

fn local() -> &'static Local {
    &LOCALS[number() as usize]
}

/// The number of this processor.
pub fn number() -> u32 {
    let number;
    // SAFETY: reads the word to which `init` has set GS.
    unsafe {
        asm!("mov {:e}, gs:[{}]", out(reg) number, const offset_of!(Local, number),
            options(nostack, readonly, preserves_flags));
    }
    number
}

/// The number of interrupts that this processor has taken.
pub fn taken() -> u64 {
    local().taken.load(Ordering::Acquire)
}

/// The number of interrupts that this processor ended by a register.
pub fn ended_by_register() -> u64 {
    local().by_register.iter().map(|count| count.load(Ordering::Relaxed)).sum()
}

/// The number of interrupts of a vector that a processor has taken, and the number of those that it
/// ended by a register.
pub fn counts(processor: u32, vector: u8) -> (u64, u64) {
    let (local, at) = (&LOCALS[processor as usize], usize::from(vector - FIRST));
    (local.by_vector[at].load(Ordering::Relaxed), local.by_register[at].load(Ordering::Relaxed))
}

/// The word of PV EOI: KVM sets bit 0 when this processor may end an interrupt by clearing the bit.
pub fn pv_eoi() -> &'static AtomicU64 {
    &local().pv_eoi
}

/// Sets how interrupts of a vector are ended.
pub fn set_end(vector: u8, end: End) {
    ENDS[usize::from(vector - FIRST)].store(end as u8, Ordering::Relaxed);
}

/// Sets the handler of a vector. It runs after the end of the interrupt, with interrupts disabled,
/// on the stack of the interrupted code. It may enable interrupts.
pub fn set_handler(vector: u8, handler: Option<extern "C" fn()>) {
    let handler = handler.map_or(ptr::null_mut(), |handler| handler as *mut ());
    HANDLERS[usize::from(vector - FIRST)].store(handler, Ordering::Release);
}

global_asm!(
    // Exceptions: push the number and the error code (0 if there is none), then call the handler.
    ".balign 16",
    "exception_stubs:",
    ".set n, 0",
    ".rept 32",
    ".balign 16",
    ".if ((0x60227d00 >> n) & 1) == 0",
    "push 0",
    ".endif",
    "push n",
    "jmp exception_common",
    ".set n, n + 1",
    ".endr",
    "exception_common:",
    "mov rdi, rsp",
    "and rsp, -16",
    "cld",
    "call {exception}",
    "ud2",
    // Interrupts.
    ".balign 16",
    "interrupt_stubs:",
    ".set n, 0",
    ".rept {count}",
    ".balign 16",
    "push rsi",
    "mov esi, n",
    "jmp interrupt_common",
    ".set n, n + 1",
    ".endr",
    "interrupt_common:",
    "push rax",
    "push rcx",
    "push rdx",
    // The processor's frame follows the pushed registers on the stack. Its third word has the
    // flags.
    "test dword ptr [rsp + 48], {interrupts_on}",
    "jz 5f",
    "inc qword ptr gs:[{taken}]",
    "inc qword ptr gs:[{by_vector} + rsi * 8]",
    "movzx ecx, byte ptr [{ends} + rsi]",
    "test ecx, ecx",
    "jz 3f",
    "cmp ecx, 2",
    "je 2f",
    "jb 1f",
    "lock btr dword ptr gs:[{pv_eoi}], 0",
    "jc 3f",
    "1: inc qword ptr gs:[{by_register} + rsi * 8]",
    "mov ecx, 0x80b",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "jmp 3f",
    "2: inc qword ptr gs:[{by_register} + rsi * 8]",
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "3: cmp qword ptr [{handlers} + rsi * 8], 0",
    "jne 4f",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "pop rsi",
    "iretq",
    // There is a handler, and it may be interrupted, so it must leave this stack. Copy the contents
    // (4 registers, and the processor's frame of 5 words with the stack pointer in the fourth)
    // beyond the red zone of the interrupted code. Save all registers that the handler may change
    // there too.
    "4: mov rdx, rsp",
    "mov rsp, [rdx + 56]",
    "sub rsp, 128",
    "and rsp, -16",
    "push [rdx + 64]",
    "push [rdx + 56]",
    "push [rdx + 48]",
    "push [rdx + 40]",
    "push [rdx + 32]",
    "push [rdx + 24]",
    "push [rdx + 16]",
    "push [rdx + 8]",
    "push [rdx]",
    "push rdi",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "sub rsp, 512",
    "fxsave64 [rsp]",
    "cld",
    "call qword ptr [{handlers} + rsi * 8]",
    "fxrstor64 [rsp]",
    "add rsp, 512",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rdi",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "pop rsi",
    "iretq",
    "5: mov rdi, [rsp + 32]",
    "and rsp, -16",
    "cld",
    "call {kept_out}",
    "ud2",
    exception = sym exception,
    kept_out = sym kept_out,
    interrupts_on = const cpu::INTERRUPTS_ON,
    taken = const offset_of!(Local, taken),
    by_vector = const offset_of!(Local, by_vector),
    by_register = const offset_of!(Local, by_register),
    pv_eoi = const offset_of!(Local, pv_eoi),
    ends = sym ENDS,
    handlers = sym HANDLERS,
    count = const COUNT,
);

unsafe extern "C" {
    static exception_stubs: [[u8; 16]; 32];
    static interrupt_stubs: [[u8; 16]; COUNT];
}

/// The stack frame of an exception's stub.
#[repr(C)]
struct Frame {
    number: u64,
    error: u64,
    rip: u64,
    cs: u64,
    flags: u64,
    rsp: u64,
    ss: u64,
}

/// Handles an exception. This program expects none.
extern "C" fn exception(frame: &Frame) -> ! {
    let address: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) address, options(nostack, nomem)) };
    line("exception")
        .value("ok", false)
        .value("cpu", number())
        .value("number", frame.number)
        .text("error", format_args!("{:#x}", frame.error))
        .text("rip", format_args!("{:#x}", frame.rip))
        .text("rsp", format_args!("{:#x}", frame.rsp))
        .text("cr2", format_args!("{address:#x}"))
        .end();
    power::off()
}

/// Handles an interrupt that came while interrupts were disabled. No real processor delivers one,
/// but an emulated one may. It has overwritten the frame of the interrupted handler, so the guest
/// cannot continue.
extern "C" fn kept_out(rip: u64, index: u64) -> ! {
    line("interrupt")
        .value("ok", false)
        .value("kept-out", true)
        .value("cpu", number())
        .value("vector", u64::from(FIRST) + index)
        .text("rip", format_args!("{rip:#x}"))
        .text("error", "an interrupt came while interrupts were disabled")
        .end();
    power::off()
}

/// Bytes of a handler's stack.
const STACK: usize = 16 << 10;
/// The handlers' stacks: one for interrupts, and one for exceptions, which can occur in an
/// interrupt handler.
const STACKS: usize = 2;

/// Offset of the first stack's top in the task state segment.
const TSS_IST: usize = 36;
const TSS_BYTES: usize = 104;
/// The selector of the task state segment, after null, code and data.
const TSS: u16 = 24;
const CODE: u64 = 8;

/// The tables that the processor reads. [`init`] fills them, and nothing changes them later.
#[repr(C, align(4096))]
struct Tables {
    stacks: [[u8; STACK]; STACKS],
    idt: [[u64; 2]; 256],
    gdt: [u64; 5],
    tss: [u8; TSS_BYTES],
}

struct Cell(UnsafeCell<Tables>);

// SAFETY: only `init` writes each one, on its own processor, before anything reads it.
unsafe impl Sync for Cell {}

/// By processor.
static TABLES: [Cell; CPUS_MAX] = [const {
    Cell(UnsafeCell::new(Tables {
        stacks: [[0; STACK]; STACKS],
        idt: [[0; 2]; 256],
        gdt: [0; 5],
        tss: [0; TSS_BYTES],
    }))
}; CPUS_MAX];

/// The model-specific register for the base of GS.
const GS_BASE: u32 = 0xc000_0101;

/// A pointer to a table, in the format of LGDT and LIDT.
#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

/// An interrupt gate (interrupts are disabled in the handler) with stack `stack`, counted from 1.
fn gate(handler: u64, stack: u64) -> [u64; 2] {
    const PRESENT_INTERRUPT: u64 = 0x8e;
    let low = handler & 0xffff
        | CODE << 16
        | stack << 32
        | PRESENT_INTERRUPT << 40
        | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

/// Sets up the tables of this processor, which has number `number`. Interrupts stay off.
pub fn init(number: u32) {
    let local = &LOCALS[number as usize];
    local.number.store(number, Ordering::Relaxed);
    // SAFETY: nothing else uses GS.
    unsafe { write_msr(GS_BASE, &raw const *local as u64) };
    let tables = TABLES[number as usize].0.get();
    // SAFETY: called once on each processor, before anything else uses the tables. They never move,
    // and the entry of the present code segment does not change.
    unsafe {
        let tables = &mut *tables;
        for (i, stack) in tables.stacks.iter().enumerate() {
            let top = stack.as_ptr_range().end as u64;
            tables.tss[TSS_IST + 8 * i..][..8].copy_from_slice(&top.to_le_bytes());
        }
        // Lower rings may use no ports.
        tables.tss[102..104].copy_from_slice(&(TSS_BYTES as u16).to_le_bytes());
        let (tss, limit) = (tables.tss.as_ptr() as u64, TSS_BYTES as u64 - 1);
        let low = limit | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56;
        tables.gdt = [0, 0x00af_9a00_0000_ffff, 0x00cf_9200_0000_ffff, low, tss >> 32];
        for (i, stub) in exception_stubs.iter().enumerate() {
            tables.idt[i] = gate(stub.as_ptr() as u64, 2);
        }
        for (i, stub) in interrupt_stubs.iter().enumerate() {
            tables.idt[usize::from(FIRST) + i] = gate(stub.as_ptr() as u64, 1);
        }
        let gdt = Pointer {
            limit: (size_of_val(&tables.gdt) - 1) as u16,
            base: tables.gdt.as_ptr() as u64,
        };
        let idt = Pointer {
            limit: (size_of_val(&tables.idt) - 1) as u16,
            base: tables.idt.as_ptr() as u64,
        };
        asm!("lgdt [{}]", "ltr {:x}", "lidt [{}]", in(reg) &raw const gdt, in(reg) TSS, in(reg) &raw const idt);
    }
}
