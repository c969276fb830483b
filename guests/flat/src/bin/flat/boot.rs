// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The first instructions: from PVH's 32-bit entry to Rust in long mode, with an identity map of 4
//! GiB. The other processors take the same way from real mode (`smp.rs` starts them).
#![allow(unsafe_code, reason = "there is no Rust yet")]

use core::arch::global_asm;

use crate::cpu::CPUS_MAX;
use crate::smp;

/// Bytes of a processor's stack.
const STACK: usize = 256 << 10;

global_asm!(
    // Tell the loader the entry: a note of type 18 (PHYS32_ENTRY) and owner "Xen".
    ".pushsection .note.pvh, \"a\", @note",
    ".balign 4",
    ".long 4, 4, 18",
    ".asciz \"Xen\"",
    ".long pvh_entry",
    ".popsection",
    //
    ".pushsection .boot, \"ax\"",
    ".code32",
    ".global pvh_entry",
    // The processor is in protected mode with flat segments, with paging and interrupts off. EBX
    // has the start info.
    "pvh_entry:",
    "cld",
    // After a reset, memory still has its former content.
    "movl $bss_start, %edi",
    "movl $bss_end, %ecx",
    "subl %edi, %ecx",
    "shrl $2, %ecx",
    "xorl %eax, %eax",
    "rep stosl",
    // The page tables: one of the fourth level, one of the third, and four of the second with pages
    // of 2 MiB.
    "movl $boot_tables + 0x1003, boot_tables",
    "movl $boot_tables + 0x1000, %edi",
    "movl $boot_tables + 0x2003, %eax",
    "movl $4, %ecx",
    "1: movl %eax, (%edi)",
    "addl $0x1000, %eax",
    "addl $8, %edi",
    "loop 1b",
    "movl $boot_tables + 0x2000, %edi",
    "movl $0x83, %eax",
    "movl $2048, %ecx",
    // The last GiB has the registers of devices, and is not cached.
    "2: cmpl $0xc0000000, %eax",
    "jb 3f",
    "orl $0x18, %eax",
    "3: movl %eax, (%edi)",
    "addl $0x200000, %eax",
    "addl $8, %edi",
    "loop 2b",
    // All processors run this: enable PAE, and SSE as compiled code needs it (FXSR, exceptions).
    "enter_long_mode:",
    "movl %cr4, %eax",
    "orl $0x620, %eax",
    "movl %eax, %cr4",
    "movl $boot_tables, %eax",
    "movl %eax, %cr3",
    "movl $0xc0000080, %ecx",
    "rdmsr",
    "orl $0x100, %eax",
    "wrmsr",
    "movl %cr0, %eax",
    // Switch the caches on, which INIT leaves off.
    "andl $~0x60000004, %eax",
    "orl $0x80000003, %eax",
    "movl %eax, %cr0",
    "lgdt boot_gdt_pointer",
    "ljmp $8, $4f",
    ".code64",
    "4: movl $16, %eax",
    "movl %eax, %ds",
    "movl %eax, %es",
    "movl %eax, %ss",
    "xorl %eax, %eax",
    "movl %eax, %fs",
    "movl %eax, %gs",
    // The processor's number, in order of arrival. A processor without a stack stays here.
    "movl $1, %edi",
    "lock xaddl %edi, boot_processors",
    "cmpl ${cpus}, %edi",
    "jae 5f",
    "leal 1(%rdi), %eax",
    "imull ${stack}, %eax, %eax",
    "leaq boot_stacks(%rax), %rsp",
    "xorl %ebp, %ebp",
    "movl %ebx, %esi",
    "call {main}",
    "ud2",
    "5: cli",
    "hlt",
    "jmp 5b",
    //
    // Another processor arrives here from real mode, without flat segments.
    ".code32",
    "other_protected:",
    "cld",
    "movl $16, %eax",
    "movl %eax, %ds",
    "movl %eax, %es",
    "movl %eax, %ss",
    "jmp enter_long_mode",
    ".code64",
    ".popsection",
    //
    // Another processor begins with this code, copied to a page below 1 MiB. CS has the number of
    // the page.
    ".pushsection .rodata, \"a\", @progbits",
    ".code16",
    ".global trampoline, trampoline_end",
    "trampoline:",
    "cli",
    "movw %cs, %ax",
    "movw %ax, %ds",
    "lgdtl boot_gdt_pointer - trampoline",
    "movl %cr0, %eax",
    "orb $1, %al",
    "movl %eax, %cr0",
    "ljmpl $24, $other_protected",
    ".balign 4",
    "boot_gdt_pointer: .word 31",
    ".long boot_gdt",
    "trampoline_end:",
    ".code64",
    ".popsection",
    //
    ".pushsection .rodata, \"a\", @progbits",
    ".balign 8",
    // 64-bit code, data, 32-bit code.
    "boot_gdt: .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff, 0x00cf9a000000ffff",
    ".popsection",
    //
    ".pushsection .bss, \"aw\", @nobits",
    ".balign 4096",
    "boot_tables: .skip 0x6000",
    "boot_stacks: .skip {stack} * {cpus}",
    "boot_processors: .skip 4",
    ".popsection",
    stack = const STACK,
    cpus = const CPUS_MAX,
    main = sym entry,
    options(att_syntax),
);

/// The assembly calls this on each processor. Only the first processor has a `start_info`.
extern "C" fn entry(number: u32, start_info: u64) -> ! {
    match number {
        0 => crate::main(start_info),
        number => smp::arrive(number),
    }
}
