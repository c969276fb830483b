// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst in Linux's sources).

use anyhow::{Result, ensure};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::registers::Start;
use super::{COMMAND_LINE, INFO, Info};

/// The offset of the 64-bit entry in the kernel.
const ENTRY: u64 = 0x200;
/// `xloadflags`: the kernel has a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// "Undefined": a boot loader without a number of its own.
const LOADER: u8 = 0xff;
/// Kinds of memory in the map.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// [`boot_params`], which is written as bytes.
#[repr(transparent)]
#[derive(Clone, Copy, Default)]
struct ZeroPage(boot_params);

#[allow(unsafe_code, reason = "the structure is the protocol's own bytes")]
// SAFETY: It is a packed structure of integers. It has no padding, and any bytes are valid.
unsafe impl ByteValued for ZeroPage {}

/// Writes zero page, command line and initramfs for a kernel that was loaded from `base` to `end`.
pub fn prepare(mut info: Info<'_>, base: u64, end: u64, mut header: setup_header) -> Result<Start> {
    let (version, flags) = (header.version, header.xloadflags);
    ensure!(
        version >= 0x20c && flags & XLF_KERNEL_64 != 0,
        "the kernel is too old, or not for 64 bits"
    );
    info.put_command_line(usize::try_from(header.cmdline_size)?.min(super::COMMAND_LINE_MAX - 1))?;
    // The kernel unpacks itself to its preferred address, which may be above its load address.
    let room = (base.max(header.pref_address) + u64::from(header.init_size)).max(end);
    let needed = room.div_ceil(1 << 20);
    ensure!(
        room <= info.ram_end(),
        "the kernel needs at least {needed} MiB of memory: give more --memory"
    );
    let limit = u64::from(header.initrd_addr_max) + 1;
    if let Some((at, bytes)) = info.put_initramfs(room, limit)? {
        header.ramdisk_image = u32::try_from(at)?;
        header.ramdisk_size = u32::try_from(bytes)?;
    }
    header.type_of_loader = LOADER;
    header.cmd_line_ptr = u32::try_from(COMMAND_LINE)?;
    let mut page = boot_params { hdr: header, acpi_rsdp_addr: info.rsdp, ..Default::default() };
    for (entry, range) in page.e820_table.iter_mut().zip(info.memory_map) {
        let kind = if range.ram { E820_RAM } else { E820_RESERVED };
        *entry = boot_e820_entry { addr: range.base, size: range.bytes, type_: kind };
    }
    page.e820_entries = u8::try_from(info.memory_map.len())?;
    info.map.write_obj(ZeroPage(page), GuestAddress(INFO))?;
    Start::long(info.map, base + ENTRY, INFO)
}
