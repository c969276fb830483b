//! Exceptions and interrupts.
//!
//! Compiled code keeps data below the stack pointer (the *red zone*), so every handler has a stack of its own, by way of the task state
//! segment. Interrupt handlers are assembly that counts and ends the interrupt: they touch no vector register, and nothing need be saved.
#![allow(unsafe_code, reason = "tables that the processor reads")]

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

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

/// Interrupts taken.
static TAKEN: AtomicU64 = AtomicU64::new(0);
/// Interrupts whose end was a write of a register.
static ENDED_BY_REGISTER: AtomicU64 = AtomicU64::new(0);
/// [`End`] by vector less [`FIRST`].
static ENDS: [AtomicU8; COUNT] = [const { AtomicU8::new(End::Automatic as u8) }; COUNT];
/// The word whose bit 0 KVM sets when an interrupt may be ended by clearing it.
pub static PV_EOI: AtomicU64 = AtomicU64::new(0);

/// How many interrupts have come.
pub fn taken() -> u64 {
    TAKEN.load(Ordering::Acquire)
}

/// How many interrupts had to be ended by a register.
pub fn ended_by_register() -> u64 {
    ENDED_BY_REGISTER.load(Ordering::Relaxed)
}

/// Says how the interrupts of a vector are to be ended.
pub fn set_end(vector: u8, end: End) {
    ENDS[usize::from(vector - FIRST)].store(end as u8, Ordering::Relaxed);
}

global_asm!(
    // Exceptions: number and error code (0 for those that have none) on the stack, then the handler.
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
    "push rax",
    "mov eax, n",
    "jmp interrupt_common",
    ".set n, n + 1",
    ".endr",
    "interrupt_common:",
    "push rcx",
    "push rdx",
    "lock inc qword ptr [{taken}]",
    "movzx ecx, byte ptr [{ends} + rax]",
    "test ecx, ecx",
    "jz 3f",
    "cmp ecx, 2",
    "je 2f",
    "jb 1f",
    "lock btr dword ptr [{pv_eoi}], 0",
    "jc 3f",
    "1: lock inc qword ptr [{by_register}]",
    "mov ecx, 0x80b",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "jmp 3f",
    "2: lock inc qword ptr [{by_register}]",
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "3: pop rdx",
    "pop rcx",
    "pop rax",
    "iretq",
    exception = sym exception,
    taken = sym TAKEN,
    ends = sym ENDS,
    pv_eoi = sym PV_EOI,
    by_register = sym ENDED_BY_REGISTER,
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
        .value("number", frame.number)
        .text("error", format_args!("{:#x}", frame.error))
        .text("rip", format_args!("{:#x}", frame.rip))
        .text("rsp", format_args!("{:#x}", frame.rsp))
        .text("cr2", format_args!("{address:#x}"))
        .end();
    power::off()
}

/// Bytes of a handler's stack.
const STACK: usize = 16 << 10;
/// The handlers' stacks: of interrupts, and of exceptions, which can come in the middle of an interrupt.
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

// SAFETY: written by `init` alone, on the only processor, before anything reads it.
unsafe impl Sync for Cell {}

static TABLES: Cell = Cell(UnsafeCell::new(Tables {
    stacks: [[0; STACK]; STACKS],
    idt: [[0; 2]; 256],
    gdt: [0; 5],
    tss: [0; TSS_BYTES],
}));

/// A pointer to a table, as LGDT and LIDT want it.
#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

/// A gate for interrupts (which are kept out in the handler) with stack `stack`, counted from 1.
fn gate(handler: u64, stack: u64) -> [u64; 2] {
    const PRESENT_INTERRUPT: u64 = 0x8e;
    let low = handler & 0xffff | CODE << 16 | stack << 32 | PRESENT_INTERRUPT << 40 | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

/// Sets the tables up. Interrupts stay off.
pub fn init() {
    let tables = TABLES.0.get();
    // SAFETY: called once, before anything else uses the tables. They never move; the entry of the segment that code runs in stays as it was.
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
        let gdt = Pointer { limit: (size_of_val(&tables.gdt) - 1) as u16, base: tables.gdt.as_ptr() as u64 };
        let idt = Pointer { limit: (size_of_val(&tables.idt) - 1) as u16, base: tables.idt.as_ptr() as u64 };
        asm!("lgdt [{}]", "ltr {:x}", "lidt [{}]", in(reg) &raw const gdt, in(reg) TSS, in(reg) &raw const idt);
    }
}
