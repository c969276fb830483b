// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The PVH boot protocol: an ELF note names a 32-bit entry, and the kernel gets a start info (Xen's
//! public/arch-x86/hvm/start_info.h).

use anyhow::Result;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::registers::Start;
use super::{COMMAND_LINE, COMMAND_LINE_MAX, INFO, Info};

/// The addresses of the list of modules and of the memory map.
const MODULES: u64 = INFO + 0x100;
const MEMORY: u64 = INFO + 0x200;
/// "xEn3" with bit 7 of its first byte set: the mark of a start info.
const MAGIC: u32 = 0x336e_c578;
/// The version of a start info with a memory map.
const VERSION: u32 = 1;
/// Kinds of memory in the map.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// One of the protocol's structures, which is written as bytes.
#[repr(transparent)]
#[derive(Clone, Copy, Default)]
struct Raw<T>(T);

macro_rules! raw {
    ($($name:ident)*) => {$(
        #[allow(unsafe_code, reason = "the structures are the protocol's own bytes")]
        // SAFETY: It has integers only, whose sizes leave no padding, and any bytes are valid.
        unsafe impl ByteValued for Raw<$name> {}
    )*};
}
raw!(hvm_start_info hvm_modlist_entry hvm_memmap_table_entry);

/// Writes start info, command line and initramfs for a kernel that was loaded up to `end` and
/// starts at `entry`.
pub fn prepare(mut info: Info<'_>, entry: u64, end: u64) -> Result<Start> {
    info.put_command_line(COMMAND_LINE_MAX - 1)?;
    let mut start = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: info.rsdp,
        memmap_paddr: MEMORY,
        memmap_entries: u32::try_from(info.memory_map.len())?,
        ..Default::default()
    };
    if let Some((paddr, size)) = info.put_initramfs(end, 1 << 32)? {
        start.nr_modules = 1;
        start.modlist_paddr = MODULES;
        info.map.write_obj(
            Raw(hvm_modlist_entry { paddr, size, ..Default::default() }),
            GuestAddress(MODULES),
        )?;
    }
    for (at, range) in (MEMORY..).step_by(size_of::<hvm_memmap_table_entry>()).zip(info.memory_map)
    {
        let type_ = if range.ram { RAM } else { RESERVED };
        let entry =
            hvm_memmap_table_entry { addr: range.base, size: range.bytes, type_, reserved: 0 };
        info.map.write_obj(Raw(entry), GuestAddress(at))?;
    }
    info.map.write_obj(Raw(start), GuestAddress(INFO))?;
    Start::protected(info.map, entry, INFO)
}
