// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The first virtual CPU's registers as a boot protocol demands them, with the tables to which they
//! point.

use anyhow::Result;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The address of the global descriptor table.
const GDT: u64 = 0x500;
/// The address of an empty interrupt descriptor table. Until the kernel has its own table, any
/// exception resets the machine.
const IDT: u64 = 0x540;
/// The address of the page tables of 64-bit mode: one page for each of the two upper levels, then
/// [`GIB`] pages of 2 MiB entries.
const PAGE_TABLES: u64 = 0x9000;
/// The memory that is mapped one to one, in GiB.
const GIB: u64 = 4;

/// Page table bits: present and writable, and a page of 2 MiB.
const PRESENT: u64 = 0b11;
const LARGE: u64 = 1 << 7;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of the flags register that is always set.
const FLAGS: u64 = 1 << 1;

/// Types of segment descriptors.
const DATA: u8 = 0b0011;
const CODE: u8 = 0b1011;
const BUSY_TASK: u8 = 0b1011;

/// The state in which the first virtual CPU starts.
pub struct Start {
    registers: kvm_regs,
    /// 64-bit mode with paging. Otherwise 32-bit mode without paging.
    long: bool,
}

impl Start {
    /// Starts in 64-bit mode at `entry`, with memory below 4 GiB mapped one to one and `info` in
    /// RSI, as Linux's protocol demands.
    pub fn long(map: &GuestMemoryMmap, entry: u64, info: u64) -> Result<Start> {
        let put = |table: u64, index: u64, value: u64| {
            map.write_obj(value, GuestAddress(PAGE_TABLES + table * 0x1000 + index * 8))
        };
        put(0, 0, (PAGE_TABLES + 0x1000) | PRESENT)?;
        for gib in 0..GIB {
            put(1, gib, (PAGE_TABLES + (2 + gib) * 0x1000) | PRESENT)?;
            for piece in 0..512 {
                put(2 + gib, piece, (gib << 30) | (piece << 21) | PRESENT | LARGE)?;
            }
        }
        Start {
            registers: kvm_regs { rip: entry, rsi: info, rflags: FLAGS, ..Default::default() },
            long: true,
        }
        .with_table(map)
    }

    /// Starts in 32-bit mode without paging at `entry`, with `info` in EBX, as PVH demands.
    pub fn protected(map: &GuestMemoryMmap, entry: u64, info: u64) -> Result<Start> {
        Start {
            registers: kvm_regs { rip: entry, rbx: info, rflags: FLAGS, ..Default::default() },
            long: false,
        }
        .with_table(map)
    }

    /// The ordinary registers.
    pub fn registers(&self) -> &kvm_regs {
        &self.registers
    }

    /// Changes `system`, the special registers after a reset, to the values of the protocol.
    pub fn set_up(&self, system: &mut kvm_sregs) {
        let [code, data, task] = self.segments();
        (system.cs, system.tr) = (code, task);
        for segment in
            [&mut system.ds, &mut system.es, &mut system.fs, &mut system.gs, &mut system.ss]
        {
            *segment = data;
        }
        (system.gdt.base, system.gdt.limit) = (GDT, 5 * 8 - 1);
        (system.idt.base, system.idt.limit) = (IDT, 7);
        system.cr0 = CR0_PE | CR0_ET;
        system.cr4 = 0;
        system.efer = 0;
        if self.long {
            system.cr0 |= CR0_PG;
            system.cr3 = PAGE_TABLES;
            system.cr4 = CR4_PAE;
            system.efer = EFER_LME | EFER_LMA;
        }
    }

    /// Code, data and task segment, with the selectors of Linux's protocol.
    fn segments(&self) -> [kvm_segment; 3] {
        let flat = |type_, selector| kvm_segment {
            limit: 0xffff_ffff,
            selector,
            type_,
            present: 1,
            s: 1,
            g: 1,
            db: 1,
            ..Default::default()
        };
        let code =
            kvm_segment { l: u8::from(self.long), db: u8::from(!self.long), ..flat(CODE, 0x10) };
        let task = kvm_segment { limit: 0x67, g: 0, s: 0, db: 0, ..flat(BUSY_TASK, 0x20) };
        [code, flat(DATA, 0x18), task]
    }

    fn with_table(self, map: &GuestMemoryMmap) -> Result<Start> {
        map.write_obj(0_u64, GuestAddress(IDT))?;
        for at in [0, 8] {
            map.write_obj(0_u64, GuestAddress(GDT + at))?;
        }
        for segment in self.segments() {
            map.write_obj(descriptor(&segment), GuestAddress(GDT + u64::from(segment.selector)))?;
        }
        Ok(self)
    }
}

/// Encodes a segment as an entry of the table. Its base is 0.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let bits = |value: u8, at: u32| u64::from(value) << at;
    limit & 0xffff
        | bits(segment.type_, 40)
        | bits(segment.s, 44)
        | bits(segment.present, 47)
        | (limit >> 16 & 0xf) << 48
        | bits(segment.l, 53)
        | bits(segment.db, 54)
        | bits(segment.g, 55)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::memory::Ram;

    #[test]
    fn descriptors_are_the_well_known_ones() {
        let ram = Ram::new(16 << 20).unwrap();
        let entry = |at| ram.map().read_obj::<u64>(GuestAddress(GDT + at)).unwrap();
        Start::long(ram.map(), 0, 0).unwrap();
        assert_eq!((entry(0x10), entry(0x18)), (0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff));
        Start::protected(ram.map(), 0, 0).unwrap();
        assert_eq!((entry(0x10), entry(0x20)), (0x00cf_9b00_0000_ffff, 0x0000_8b00_0000_0067));
    }

    #[test]
    fn four_gib_are_mapped_one_to_one() {
        let ram = Ram::new(16 << 20).unwrap();
        Start::long(ram.map(), 0, 0).unwrap();
        let entry = |table: u64, index: u64| {
            ram.map().read_obj::<u64>(GuestAddress((table & !0xfff) + index * 8)).unwrap()
        };
        for address in [0, 0x20_0000, 0xdead_beef, 0xffff_ffff_u64] {
            let directory = entry(entry(PAGE_TABLES, 0), address >> 30);
            let page = entry(directory, address >> 21 & 0x1ff);
            assert_eq!(page & LARGE, LARGE);
            assert_eq!((page & !0x1f_ffff) + (address & 0x1f_ffff), address);
        }
    }
}
