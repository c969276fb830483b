// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Loads a kernel, and everything that its boot protocol puts into memory.
//!
//! A bzImage (Linux) starts in 64-bit mode with a "zero page". An ELF file with a PVH note starts
//! in 32-bit mode with a start info.

mod linux;
mod pvh;
mod registers;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, ReadVolatile};

pub use registers::Start;

use crate::acpi;
use crate::layout;
use crate::memory::{self, Ram};

/// The first address of the memory into which kernels are loaded.
const HIGH: u64 = 0x10_0000;
/// The address of the "zero page" (Linux) or of the start info and its tables (PVH).
const INFO: u64 = 0x7000;
/// The address of the command line.
const COMMAND_LINE: u64 = 0x2_0000;
/// The most bytes of the command line with its final zero, for a kernel without its own limit.
const COMMAND_LINE_MAX: usize = 0x1_0000;
/// The end of conventional memory. From here to [`HIGH`] the guest has no RAM.
const LOW_END: u64 = 0xa_0000;

/// A kernel with its initramfs and command line.
pub struct Image {
    kernel: (PathBuf, File),
    initramfs: Option<(PathBuf, File)>,
    append: String,
}

/// An entry of the memory map that the kernel gets.
struct MemoryRange {
    base: u64,
    bytes: u64,
    ram: bool,
}

impl Image {
    /// Opens the files. They stay open, so that the machine can boot again.
    ///
    /// # Errors
    /// A file cannot be opened, or is no regular file.
    pub fn open(kernel: &Path, initramfs: Option<&Path>, append: &str) -> Result<Image> {
        let open = |path: &Path, what: &str| {
            let file = File::open(path)
                .with_context(|| format!("cannot open the {what} {}", path.display()))?;
            ensure!(file.metadata()?.is_file(), "the {what} {} is not a file", path.display());
            Ok::<_, anyhow::Error>((path.to_owned(), file))
        };
        let initramfs = initramfs.map(|path| open(path, "initramfs")).transpose()?;
        Ok(Image { kernel: open(kernel, "kernel")?, initramfs, append: append.to_owned() })
    }

    /// Loads kernel, initramfs, command line and ACPI tables into the memory of a machine with
    /// `cpus` virtual CPUs.
    ///
    /// # Errors
    /// The kernel has no known format, or something does not fit into memory.
    pub fn load(&mut self, ram: &Ram, cpus: u32) -> Result<Start> {
        let map = ram.map();
        let (path, file) = &mut self.kernel;
        let mut magic = [0; 4];
        file.rewind()?;
        file.read(&mut magic).with_context(|| format!("cannot read {}", path.display()))?;
        let elf = magic == *b"\x7fELF";
        let loaded = if elf {
            Elf::load(map, None, file, None)
        } else {
            BzImage::load(map, None, file, Some(GuestAddress(HIGH)))
        };
        let loaded = loaded.with_context(|| {
            let size = ram.bytes() >> 20;
            format!(
                "{} is no kernel that fits {size} MiB of memory (an ELF file with a PVH note, or a \
                 bzImage)",
                path.display()
            )
        })?;
        let rsdp = acpi::write(map, cpus)?;
        let memory_map = memory_map(ram.bytes());
        let info = Info {
            map,
            rsdp,
            memory_map: &memory_map,
            append: &self.append,
            initramfs: &mut self.initramfs,
        };
        match (elf, loaded.pvh_boot_cap, loaded.setup_header) {
            (true, PvhBootCapability::PvhEntryPresent(entry), _) => {
                pvh::prepare(info, entry.0, loaded.kernel_end)
            }
            (false, _, Some(header)) => {
                linux::prepare(info, loaded.kernel_load.0, loaded.kernel_end, header)
            }
            _ => bail!(
                "{} has no PVH note (Linux: CONFIG_PVH), so there is no way to start it",
                path.display()
            ),
        }
    }
}

/// The information for a kernel that both protocols pass on.
struct Info<'a> {
    map: &'a GuestMemoryMmap,
    /// The address of the first ACPI table, the RSDP.
    rsdp: u64,
    memory_map: &'a [MemoryRange],
    append: &'a str,
    initramfs: &'a mut Option<(PathBuf, File)>,
}

impl Info<'_> {
    /// The end of RAM below 4 GiB.
    fn ram_end(&self) -> u64 {
        let main = self.memory_map.iter().find(|range| range.ram && range.base == HIGH);
        main.map_or(0, |range| range.base + range.bytes)
    }

    /// Puts the command line into memory. It may have `max` bytes without its final zero.
    fn put_command_line(&self, max: usize) -> Result<()> {
        let length = self.append.len();
        ensure!(
            length <= max,
            "the kernel's command line has {length} bytes; it takes at most {max}"
        );
        ensure!(!self.append.contains('\0'), "the kernel's command line has a zero byte in it");
        self.map.write_slice(self.append.as_bytes(), GuestAddress(COMMAND_LINE))?;
        Ok(self.map.write_obj(0_u8, GuestAddress(COMMAND_LINE + length as u64))?)
    }

    /// Puts the initramfs into RAM below 4 GiB, as high as possible between `above` and `limit`.
    /// Returns its address and size.
    fn put_initramfs(&mut self, above: u64, limit: u64) -> Result<Option<(u64, u64)>> {
        let ram_end = self.ram_end();
        let Some((path, file)) = self.initramfs else { return Ok(None) };
        let bytes = file.seek(SeekFrom::End(0))?;
        file.rewind()?;
        let at =
            limit.min(ram_end).checked_sub(bytes).map(|at| at & !0xfff).filter(|at| *at >= above);
        let at = at.with_context(|| {
            let mib = bytes.div_ceil(1 << 20);
            format!(
                "no room for the kernel and the initramfs {} ({mib} MiB): give more --memory",
                path.display()
            )
        })?;
        // Read no more than was counted, even if the file has grown meanwhile.
        let count = usize::try_from(bytes)?;
        read_exact(self.map, at, file, count)
            .with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Some((at, bytes)))
    }
}

fn read_exact(
    map: &GuestMemoryMmap,
    at: u64,
    file: &mut impl ReadVolatile,
    count: usize,
) -> Result<()> {
    Ok(map.read_exact_volatile_from(GuestAddress(at), file, count)?)
}

/// The memory map: RAM, and what is in its holes.
fn memory_map(ram: u64) -> Vec<MemoryRange> {
    let mut memory_map = vec![MemoryRange { base: 0, bytes: LOW_END, ram: true }];
    memory_map.push(MemoryRange { base: acpi::TABLES, bytes: HIGH - acpi::TABLES, ram: false });
    for (base, bytes, _) in memory::ranges(ram) {
        let cut = HIGH.saturating_sub(base);
        memory_map.push(MemoryRange { base: base + cut, bytes: bytes - cut, ram: true });
    }
    // Linux uses configuration space in memory only if the map says that it is reserved.
    memory_map.push(MemoryRange { base: layout::ECAM, bytes: layout::ECAM_BYTES, ram: false });
    memory_map.push(MemoryRange {
        base: layout::FIRMWARE,
        bytes: layout::FIRMWARE_BYTES as u64,
        ram: false,
    });
    memory_map.sort_by_key(|range| range.base);
    memory_map
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// A small bzImage: its header, and four bytes of kernel.
    fn bzimage() -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x211] = 1;
        image[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
        image[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
        image[0x236] = 1;
        image[0x238..0x23c].copy_from_slice(&255_u32.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&0x20_0000_u32.to_le_bytes());
        image.extend_from_slice(b"code");
        image
    }

    fn image(kernel: &[u8], initramfs: Option<&[u8]>, append: &str) -> Image {
        let initramfs = initramfs.map(file);
        Image::open(file(kernel).path(), initramfs.as_ref().map(|file| file.path()), append)
            .unwrap()
    }

    #[test]
    fn places_do_not_overlap() {
        for ram in [16 << 20, 3 << 30, 5 << 30] {
            let memory_map = memory_map(ram);
            assert!(memory_map.windows(2).all(|pair| pair[0].base + pair[0].bytes <= pair[1].base));
            let total: u64 =
                memory_map.iter().filter(|range| range.ram).map(|range| range.bytes).sum();
            assert_eq!(total, ram - (HIGH - LOW_END));
        }
    }

    #[test]
    fn linux_finds_its_command_line_and_initramfs() {
        let ram = Ram::new(16 << 20).unwrap();
        let start = image(&bzimage(), Some(&[7; 5000]), "console=ttyS0").load(&ram, 1).unwrap();
        let read = |at: u64, bytes: usize| {
            let mut data = vec![0; bytes];
            ram.map().read_slice(&mut data, GuestAddress(at)).unwrap();
            data
        };
        assert_eq!(start.registers().rip, HIGH + 0x200);
        assert_eq!(start.registers().rsi, INFO);
        assert_eq!(read(HIGH, 4), b"code");
        let word = |at| u64::from(u32::from_le_bytes(read(INFO + at, 4).try_into().unwrap()));
        assert_eq!(read(word(0x228), 14), b"console=ttyS0\0");
        let (at, bytes) = (word(0x218), word(0x21c));
        assert_eq!((at % 4096, bytes), (0, 5000));
        assert!(at + bytes <= 16 << 20);
        assert_eq!(read(at, 5001), [&[7; 5000][..], &[0]].concat());
        // The zero page has the address of the ACPI tables, and the number of memory ranges.
        assert_eq!(word(0x70), acpi::TABLES);
        assert_eq!(read(INFO + 0x1e8, 1), [5]);
        assert_eq!(&read(acpi::TABLES, 8), b"RSD PTR ");
    }

    #[test]
    fn what_cannot_be_booted_is_named() {
        let ram = Ram::new(16 << 20).unwrap();
        let fault = |mut image: Image| format!("{:#}", image.load(&ram, 1).err().unwrap());
        assert!(fault(image(b"#!/bin/sh", None, "")).contains("is no kernel"));
        assert!(fault(image(&bzimage(), None, &"x".repeat(300))).contains("at most 255"));
        assert!(fault(image(&bzimage(), Some(&vec![0; 15 << 20]), "")).contains("more --memory"));
        let mut large = bzimage();
        large[0x260..0x264].copy_from_slice(&(20_u32 << 20).to_le_bytes());
        assert!(fault(image(&large, None, "")).contains("needs at least 21 MiB"));
        let missing = Image::open(Path::new("/nowhere/vmlinuz"), None, "").err().unwrap();
        assert!(format!("{missing:#}").starts_with("cannot open the kernel /nowhere/vmlinuz"));
        assert!(Image::open(Path::new("/"), None, "").is_err());
    }
}
