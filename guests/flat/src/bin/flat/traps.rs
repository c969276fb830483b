//! Exceptions and interrupts.
//!
//! Compiled code keeps data below the stack pointer (the *red zone*), so every handler has a stack
//! of its own, by way of the task state segment. Interrupt handlers are assembly that counts and
//! ends the interrupt: they touch no vector register, and nothing need be saved. What a test wants
//! done besides ([`set_handler`]) is done with everything saved, on the stack of what was
//! interrupted, behind its red zone.
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
/// The vector that the local APIC uses when an interrupt has vanished. It is not ended.
pub const SPURIOUS: u8 = FIRST + COUNT as u8 - 1;

/// How the interrupts of a vector are ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum End {
    /// By nobody: the interrupt controller has done it.
    Automatic = 0,
    /// By the x2APIC's register.
    X2apic = 1,
    /// By the xAPIC's register.
    Xapic = 2,
    /// By a bit in memory, if KVM has set it, else by the x2APIC's register.
    Paravirtual = 3,
}

/// What a processor counts and keeps for itself. GS points to it.
#[repr(C)]
struct Local {
    /// The word whose bit 0 KVM sets when an interrupt may be ended by clearing it.
    pv_eoi: AtomicU64,
    number: AtomicU32,
    /// Interrupts taken.
    taken: AtomicU64,
    /// Of these, by vector less [`FIRST`].
    by_vector: [AtomicU64; COUNT],
    /// Interrupts whose end was a write of a register, by vector less [`FIRST`].
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
/// What else is done about an interrupt when it has been ended, by vector less [`FIRST`]; null:
/// nothing.
static HANDLERS: [AtomicPtr<()>; COUNT] = [const { AtomicPtr::new(ptr::null_mut()) }; COUNT];

fn local() -> &'static Local {
    &LOCALS[number() as usize]
}

/// The number of the processor that asks.
pub fn number() -> u32 {
    let number;
    // SAFETY: reads the word that `init` has had GS point to.
    unsafe {
        asm!("mov {:e}, gs:[{}]", out(reg) number, const offset_of!(Local, number),
            options(nostack, readonly, preserves_flags));
    }
    number
}

/// How many interrupts have come to this processor.
pub fn taken() -> u64 {
    local().taken.load(Ordering::Acquire)
}

/// How many interrupts of this processor had to be ended by a register.
pub fn ended_by_register() -> u64 {
    local().by_register.iter().map(|count| count.load(Ordering::Relaxed)).sum()
}

/// How many interrupts of a vector have come to a processor, and how many of these had to be ended
/// by a register.
pub fn counts(processor: u32, vector: u8) -> (u64, u64) {
    let (local, at) = (&LOCALS[processor as usize], usize::from(vector - FIRST));
    (local.by_vector[at].load(Ordering::Relaxed), local.by_register[at].load(Ordering::Relaxed))
}

/// The word in which KVM tells this processor that an interrupt may be ended by clearing bit 0.
pub fn pv_eoi() -> &'static AtomicU64 {
    &local().pv_eoi
}

/// Says how the interrupts of a vector are to be ended.
pub fn set_end(vector: u8, end: End) {
    ENDS[usize::from(vector - FIRST)].store(end as u8, Ordering::Relaxed);
}

/// Has `handler` called when an interrupt of the vector has come and been ended, with interrupts
/// kept out, on the stack of what was interrupted; it may let them in meanwhile.
pub fn set_handler(vector: u8, handler: Option<extern "C" fn()>) {
    let handler = handler.map_or(ptr::null_mut(), |handler| handler as *mut ());
    HANDLERS[usize::from(vector - FIRST)].store(handler, Ordering::Release);
}

global_asm!(
    // Exceptions: number and error code (0 for those that have none) on the stack, then the
    // handler.
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
    // Below what was pushed is the processor's frame, with the flags in its third word.
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
    // There is a handler, which may be interrupted: it must leave this stack. What is on it (4
    // registers, and the processor's frame of 5 words, with the stack pointer in the fourth) goes
    // behind the red zone of what was interrupted, and everything that the handler may change.
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

/// What an exception's stub leaves on the stack.
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

/// There is no exception that this program expects.
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

/// No processor delivers an interrupt while they are kept out; an emulated one may. The frame of
/// the handler that it came into is overwritten then, so there is nowhere to go back to.
extern "C" fn kept_out(rip: u64, index: u64) -> ! {
    line("interrupt")
        .value("ok", false)
        .value("kept-out", true)
        .value("cpu", number())
        .value("vector", u64::from(FIRST) + index)
        .text("rip", format_args!("{rip:#x}"))
        .text("error", "an interrupt came while interrupts were kept out")
        .end();
    power::off()
}

/// Bytes of a handler's stack.
const STACK: usize = 16 << 10;
/// The handlers' stacks: of interrupts, and of exceptions, which can come in the middle of an
/// interrupt.
const STACKS: usize = 2;

/// Offset of the first stack's top in the task state segment.
const TSS_IST: usize = 36;
const TSS_BYTES: usize = 104;
/// Its selector, behind null, code and data.
const TSS: u16 = 24;
const CODE: u64 = 8;

/// Everything that the processor reads, filled by [`init`] and then left alone.
#[repr(C, align(4096))]
struct Tables {
    stacks: [[u8; STACK]; STACKS],
    idt: [[u64; 2]; 256],
    gdt: [u64; 5],
    tss: [u8; TSS_BYTES],
}

struct Cell(UnsafeCell<Tables>);

// SAFETY: each written by `init` alone, on the processor that it is for, before anything reads it.
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

/// A pointer to a table, as LGDT and LIDT want it.
#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

/// A gate for interrupts (which are kept out in the handler) with stack `stack`, counted from 1.
fn gate(handler: u64, stack: u64) -> [u64; 2] {
    const PRESENT_INTERRUPT: u64 = 0x8e;
    let low = handler & 0xffff
        | CODE << 16
        | stack << 32
        | PRESENT_INTERRUPT << 40
        | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

/// Sets the tables of this processor up, whose number is said. Interrupts stay off.
pub fn init(number: u32) {
    let local = &LOCALS[number as usize];
    local.number.store(number, Ordering::Relaxed);
    // SAFETY: nothing else uses GS.
    unsafe { write_msr(GS_BASE, &raw const *local as u64) };
    let tables = TABLES[number as usize].0.get();
    // SAFETY: called once on each processor, before anything else uses the tables. They never move;
    // the entry of the segment that code runs in stays as it was.
    unsafe {
        let tables = &mut *tables;
        for (i, stack) in tables.stacks.iter().enumerate() {
            let top = stack.as_ptr_range().end as u64;
            tables.tss[TSS_IST + 8 * i..][..8].copy_from_slice(&top.to_le_bytes());
        }
        // No ports for lower rings.
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
