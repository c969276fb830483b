//! The first instructions: from PVH's 32-bit entry to Rust in long mode, with 4 GiB mapped to themselves.
#![allow(unsafe_code, reason = "there is no Rust yet")]

use core::arch::global_asm;

/// Bytes of the stack.
const STACK: usize = 256 << 10;

global_asm!(
    // Tells the loader the entry: note of type 18 (PHYS32_ENTRY), owner "Xen".
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
    // Protected mode with flat segments, paging and interrupts off. EBX: the start info.
    "pvh_entry:",
    "cld",
    // After a reset what was there before is still in memory.
    "movl $bss_start, %edi",
    "movl $bss_end, %ecx",
    "subl %edi, %ecx",
    "shrl $2, %ecx",
    "xorl %eax, %eax",
    "rep stosl",
    // The tables: one of the fourth level, one of the third, four of the second with pages of 2 MiB.
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
    // The last GiB has the registers of devices: not cached.
    "2: cmpl $0xc0000000, %eax",
    "jb 3f",
    "orl $0x18, %eax",
    "3: movl %eax, (%edi)",
    "addl $0x200000, %eax",
    "addl $8, %edi",
    "loop 2b",
    // PAE, and SSE as compiled code wants it: FXSR, exceptions.
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
    "andl $~0x4, %eax",
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
    "movl $boot_stack + {stack}, %esp",
    "xorl %ebp, %ebp",
    "movl %ebx, %edi",
    "call {main}",
    "ud2",
    ".popsection",
    //
    ".pushsection .rodata, \"a\", @progbits",
    ".balign 8",
    "boot_gdt: .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff",
    "boot_gdt_pointer: .word 23",
    ".long boot_gdt",
    ".popsection",
    //
    ".pushsection .bss, \"aw\", @nobits",
    ".balign 4096",
    "boot_tables: .skip 0x6000",
    "boot_stack: .skip {stack}",
    ".popsection",
    stack = const STACK,
    main = sym entry,
    options(att_syntax),
);

/// What the assembly calls.
extern "C" fn entry(start_info: u64) -> ! {
    crate::main(start_info)
}
