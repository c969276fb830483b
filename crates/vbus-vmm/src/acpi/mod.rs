// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The ACPI tables: they tell the guest's kernel about CPUs, interrupts, PCI and power.

mod aml;
mod dsdt;

use anyhow::{Result, ensure};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::layout;

/// The address of the tables: the last 128 KiB below 1 MiB, where a kernel looks for them if it
/// does not get their address.
pub const TABLES: u64 = 0xe_0000;
/// The bytes that are free for the tables.
const BYTES: u64 = 0x2_0000;

const OEM: [u8; 6] = *b"VBUS  ";
const OEM_TABLE: [u8; 8] = *b"VBUSVMM ";
const OEM_REVISION: u32 = 1;
/// The program that made the tables.
const CREATOR: [u8; 4] = *b"VBUS";
const CREATOR_REVISION: u32 = 1;
/// Bytes of the header of every table but the RSDP and the FACS.
const HEADER_BYTES: usize = 36;

/// The address of the local APICs, as every PC has it.
const LOCAL_APIC: u32 = 0xfee0_0000;
/// The address of the I/O APIC, as every PC has it.
pub const IO_APIC: u32 = 0xfec0_0000;

/// Writes the tables for `cpus` virtual CPUs into memory. Returns the address of the first one, the
/// RSDP.
pub fn write(map: &GuestMemoryMmap, cpus: u32) -> Result<u64> {
    // The RSDP comes first. Each other table comes after those that it names.
    let mut writer = Writer { map, next: TABLES + 64 };
    let facs = writer.write(&facs(), 64)?;
    let dsdt = writer.write(&table(b"DSDT", 2, &dsdt::body(cpus)), 8)?;
    let fadt = writer.write(&fadt(facs, dsdt)?, 8)?;
    let madt = writer.write(&madt(cpus)?, 8)?;
    let mcfg = writer.write(&mcfg(), 8)?;
    let entries = [fadt, madt, mcfg].map(u64::to_le_bytes).concat();
    let xsdt = writer.write(&table(b"XSDT", 1, &entries), 8)?;
    writer.next = TABLES;
    writer.write(&rsdp(xsdt), 8)
}

/// Puts tables into memory one behind another.
struct Writer<'a> {
    map: &'a GuestMemoryMmap,
    next: u64,
}

impl Writer<'_> {
    /// Writes a table to the next address of this alignment, and returns the address.
    fn write(&mut self, table: &[u8], alignment: u64) -> Result<u64> {
        let at = self.next.next_multiple_of(alignment);
        self.next = at + table.len() as u64;
        ensure!(self.next <= TABLES + BYTES, "too many virtual CPUs for the ACPI tables");
        self.map.write_slice(table, GuestAddress(at))?;
        Ok(at)
    }
}

/// The byte that makes the sum of `bytes` and itself 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

/// Makes a table: the header of 36 bytes that every table has, and `body`.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = signature.to_vec();
    let bytes = u32::try_from(HEADER_BYTES + body.len()).unwrap_or(u32::MAX);
    table.extend(bytes.to_le_bytes());
    table.extend([revision, 0]);
    table.extend(OEM);
    table.extend(OEM_TABLE);
    table.extend(OEM_REVISION.to_le_bytes());
    table.extend(CREATOR);
    table.extend(CREATOR_REVISION.to_le_bytes());
    table.extend_from_slice(body);
    table[9] = checksum(&table);
    table
}

/// The root pointer, from which a kernel finds the XSDT and so all other tables.
fn rsdp(xsdt: u64) -> Vec<u8> {
    const BYTES: u32 = 36;
    let mut rsdp = b"RSD PTR \0".to_vec();
    rsdp.extend(OEM);
    // Revision 2, and no RSDT.
    rsdp.extend([2, 0, 0, 0, 0]);
    rsdp[8] = checksum(&rsdp);
    rsdp.extend(BYTES.to_le_bytes());
    rsdp.extend(xsdt.to_le_bytes());
    rsdp.extend([0; 4]);
    rsdp[32] = checksum(&rsdp);
    rsdp
}

/// Says where PCI Express configuration space is in memory.
fn mcfg() -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend(layout::ECAM.to_le_bytes());
    // Segment 0, the buses from 0 to the last one.
    body.extend([0, 0, 0, layout::BUS_MAX, 0, 0, 0, 0]);
    table(b"MCFG", 1, &body)
}

/// The firmware's control structure. No firmware uses it here, but some kernels demand it.
fn facs() -> [u8; 64] {
    let mut facs = [0; 64];
    facs[..4].copy_from_slice(b"FACS");
    facs[4] = 64;
    facs[32] = 2;
    facs
}

/// The fixed hardware: power management ports, the reset register, and the parts of a PC that this
/// machine lacks.
fn fadt(facs: u64, dsdt: u64) -> Result<Vec<u8>> {
    /// WBINVD works, C1 works, there is no sleep button, and there is a reset register. The power
    /// button is a fixed one, not a device.
    const FLAGS: u32 = 1 | 1 << 2 | 1 << 5 | 1 << 10;
    /// There are ISA devices (the serial ports), but no VGA and no real-time clock. The bit of a
    /// keyboard controller is not set.
    const BOOT_ARCHITECTURE: u16 = 1 | 1 << 2 | 1 << 5;
    /// The address of a port: kind, bits, offset, access size (0: any).
    fn port(port: u16, bits: u8) -> [u8; 12] {
        let mut address = [1, bits, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        address[4..6].copy_from_slice(&port.to_le_bytes());
        address
    }
    let mut fadt = [0; 276];
    let mut put = |at: usize, value: &[u8]| fadt[at..at + value.len()].copy_from_slice(value);
    put(36, &u32::try_from(facs)?.to_le_bytes());
    put(40, &u32::try_from(dsdt)?.to_le_bytes());
    // The preferred profile: "enterprise server".
    put(45, &[4]);
    put(46, &u16::try_from(layout::SCI)?.to_le_bytes());
    put(56, &u32::from(layout::PM1_EVENT).to_le_bytes());
    put(64, &u32::from(layout::PM1_CONTROL).to_le_bytes());
    put(88, &[4, 2]);
    // Latencies above the highest that is allowed: the machine has neither C2 nor C3.
    put(96, &0xfff_u16.to_le_bytes());
    put(98, &0xfff_u16.to_le_bytes());
    put(109, &BOOT_ARCHITECTURE.to_le_bytes());
    put(112, &FLAGS.to_le_bytes());
    put(116, &port(layout::RESET_PORT, 8));
    put(128, &[layout::RESET_VALUE]);
    // The minor revision: 6.0.
    put(131, &[0]);
    put(140, &dsdt.to_le_bytes());
    put(148, &port(layout::PM1_EVENT, 32));
    put(172, &port(layout::PM1_CONTROL, 16));
    Ok(table(b"FACP", 6, &fadt[HEADER_BYTES..]))
}

/// The local APICs and the I/O APIC.
fn madt(cpus: u32) -> Result<Vec<u8>> {
    /// There are 8259 PICs as well. The kernel's irqchip has them. Without it the bit does no harm.
    const PC_AT: u32 = 1;
    /// Active high, level.
    const SCI_FLAGS: u16 = 0b1101;
    let mut body = Vec::new();
    body.extend(LOCAL_APIC.to_le_bytes());
    body.extend(PC_AT.to_le_bytes());
    for cpu in 0..cpus {
        let id = u8::try_from(cpu)?;
        body.extend([0, 8, id, id, 1, 0, 0, 0]);
    }
    body.extend([1, 12, 0, 0]);
    body.extend(IO_APIC.to_le_bytes());
    body.extend(0_u32.to_le_bytes());
    // The SCI is level-triggered, unlike an ISA interrupt.
    let sci = u8::try_from(layout::SCI)?;
    body.extend([2, 10, 0, sci]);
    body.extend(layout::SCI.to_le_bytes());
    body.extend(SCI_FLAGS.to_le_bytes());
    Ok(table(b"APIC", 5, &body))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::memory::Ram;

    fn read(ram: &Ram, at: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        ram.map().read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// Reads the table at `at` and checks its checksum.
    fn table_at(ram: &Ram, at: u64) -> Vec<u8> {
        let header = read(ram, at, 8);
        let table = read(ram, at, u32::from_le_bytes(header[4..].try_into().unwrap()) as usize);
        assert_eq!(sum(&table), 0, "{:?}", &table[..4]);
        table
    }

    #[test]
    fn every_table_is_found_from_the_first_and_adds_up() {
        for cpus in [1, 2, layout::CPUS_MAX] {
            let ram = Ram::new(16 << 20).unwrap();
            let rsdp = read(&ram, write(ram.map(), cpus).unwrap(), 36);
            assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
            let xsdt = table_at(&ram, u64_at(&rsdp, 24));
            assert_eq!(&xsdt[..4], b"XSDT");
            let tables: Vec<_> =
                (36..xsdt.len()).step_by(8).map(|at| table_at(&ram, u64_at(&xsdt, at))).collect();
            let signatures: Vec<_> = tables.iter().map(|table| table[..4].to_vec()).collect();
            assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG"]);
            assert_eq!(&table_at(&ram, u64_at(&tables[0], 140))[..4], b"DSDT");
            let facs = u32::from_le_bytes(tables[0][36..40].try_into().unwrap());
            assert_eq!((facs % 64, &read(&ram, facs.into(), 4)[..]), (0, &b"FACS"[..]));
            assert_eq!(u64_at(&tables[2], 44), layout::ECAM);
            // Every CPU has an entry.
            let (mut at, mut seen) = (44, 0);
            while at < tables[1].len() {
                seen += u32::from(tables[1][at] == 0);
                at += usize::from(tables[1][at + 1]);
            }
            assert_eq!((seen, at), (cpus, tables[1].len()));
        }
    }
}
