//! The ACPI tables: what the guest's kernel is told about CPUs, interrupts, PCI and power.

mod dsdt;

use acpi_tables::Aml;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use anyhow::{Result, ensure};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::layout;

/// Where the tables lie: in the last 128 KiB below 1 MiB, where a kernel looks for them if nobody
/// tells it.
pub const TABLES: u64 = 0xe_0000;
/// Bytes for them.
const BYTES: u64 = 0x2_0000;

const OEM: [u8; 6] = *b"VBUS  ";
const OEM_TABLE: [u8; 8] = *b"VBUSVMM ";
const OEM_REVISION: u32 = 1;

/// An I/O APIC's or local APIC's place, where every PC has it.
const LOCAL_APIC: u32 = 0xfee0_0000;
/// The I/O APIC's.
pub const IO_APIC: u32 = 0xfec0_0000;

/// Writes the tables for `cpus` virtual CPUs into memory; where the first, the RSDP, lies.
pub fn write(map: &GuestMemoryMmap, cpus: u32) -> Result<u64> {
    // The RSDP comes first, and each table after those that it names.
    let mut put = Writer { map, next: TABLES + 64 };
    let facs = put.bytes(&facs(), 64)?;
    let dsdt = put.bytes(dsdt::table(cpus).as_slice(), 8)?;
    let fadt = put.bytes(fadt(facs, dsdt)?.as_slice(), 8)?;
    let madt = put.bytes(madt(cpus)?.as_slice(), 8)?;
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, layout::BUS_MAX);
    let mcfg = put.aml(&mcfg)?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = put.aml(&xsdt)?;
    put.next = TABLES;
    put.aml(&Rsdp::new(OEM, xsdt))
}

/// Puts tables into memory one behind another.
struct Writer<'a> {
    map: &'a GuestMemoryMmap,
    next: u64,
}

impl Writer<'_> {
    fn bytes(&mut self, bytes: &[u8], alignment: u64) -> Result<u64> {
        let at = self.next.next_multiple_of(alignment);
        self.next = at + bytes.len() as u64;
        ensure!(self.next <= TABLES + BYTES, "too many virtual CPUs for the ACPI tables");
        self.map.write_slice(bytes, GuestAddress(at))?;
        Ok(at)
    }

    fn aml(&mut self, table: &dyn Aml) -> Result<u64> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        self.bytes(&bytes, 8)
    }
}

fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(*signature, 36, revision, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(body);
    table
}

/// The firmware's control structure: there is no firmware that would use it, but some kernels want
/// it to be there.
fn facs() -> [u8; 64] {
    let mut facs = [0; 64];
    facs[..4].copy_from_slice(b"FACS");
    facs[4] = 64;
    facs[32] = 2;
    facs
}

/// The fixed hardware: power management ports, reset register, and what a PC has that this machine
/// lacks.
fn fadt(facs: u64, dsdt: u64) -> Result<Sdt> {
    /// WBINVD works; C1 works; no sleep button; the reset register is there. No power button
    /// *device*: it is the fixed one.
    const FLAGS: u32 = 1 | 1 << 2 | 1 << 5 | 1 << 10;
    /// There are ISA devices (the serial ports); no VGA; no real-time clock. The bit of a keyboard
    /// controller is not set.
    const BOOT_ARCHITECTURE: u16 = 1 | 1 << 2 | 1 << 5;
    /// An address of a port: kind, bits, offset, access size (0: any).
    fn port(port: u16, bits: u8) -> [u8; 12] {
        let mut address = [1, bits, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        address[4..6].copy_from_slice(&port.to_le_bytes());
        address
    }
    let mut fadt = Sdt::new(*b"FACP", 276, 6, OEM, OEM_TABLE, OEM_REVISION);
    fadt.write_u32(36, u32::try_from(facs)?);
    fadt.write_u32(40, u32::try_from(dsdt)?);
    // An "enterprise server".
    fadt.write_u8(45, 4);
    fadt.write_u16(46, u16::try_from(layout::SCI)?);
    fadt.write_u32(56, layout::PM1_EVENT.into());
    fadt.write_u32(64, layout::PM1_CONTROL.into());
    fadt.write_u8(88, 4);
    fadt.write_u8(89, 2);
    // No C2 and C3: their latencies are above the highest that is allowed.
    fadt.write_u16(96, 0xfff);
    fadt.write_u16(98, 0xfff);
    fadt.write_u16(109, BOOT_ARCHITECTURE);
    fadt.write_u32(112, FLAGS);
    fadt.write_bytes(116, &port(layout::RESET_PORT, 8));
    fadt.write_u8(128, layout::RESET_VALUE);
    // The minor revision: 6.0.
    fadt.write_u8(131, 0);
    fadt.write_u64(140, dsdt);
    fadt.write_bytes(148, &port(layout::PM1_EVENT, 32));
    fadt.write_bytes(172, &port(layout::PM1_CONTROL, 16));
    Ok(fadt)
}

/// The APICs.
fn madt(cpus: u32) -> Result<Sdt> {
    /// There are 8259s as well: they are in the kernel's irqchip, and harmless without.
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
    // The SCI is no ISA interrupt, which would be edge-triggered.
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

    /// The table at `at`; its checksum is right.
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
