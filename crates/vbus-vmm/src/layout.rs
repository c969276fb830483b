// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The layout of the guest's physical address space, I/O ports and interrupt pins (`spec/vmm.md`,
//! "The machine").

/// The highest end of RAM below 4 GiB. The rest of RAM is at [`HIGH_RAM`].
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// The first address of RAM above the hole.
pub const HIGH_RAM: u64 = 1 << 32;

/// PCI Express configuration space (ECAM) of the buses 0 to [`BUS_MAX`], 1 MiB for each bus.
pub const ECAM: u64 = 0xc000_0000;
/// The highest bus number.
pub const BUS_MAX: u8 = 31;
/// Bytes of the ECAM.
pub const ECAM_BYTES: u64 = (BUS_MAX as u64 + 1) << 20;
/// The memory into which the guest's kernel puts the BARs of functions.
pub const PCI_WINDOW: u64 = 0xe000_0000;
/// Bytes of that memory.
pub const PCI_WINDOW_BYTES: u64 = 0x1000_0000;

/// The page with the first instruction of a processor.
pub const FIRMWARE: u64 = 0xffff_f000;
/// Bytes of that page.
pub const FIRMWARE_BYTES: usize = 0x1000;

/// Configuration ports of conventional PCI: the address register, and the data register 4 bytes
/// above.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// The first port of the PIO doorbells. The guest's kernel gives these ports to no PCI function.
pub const DOORBELL_PORTS: u16 = 0xc000;
/// The number of these ports.
pub const DOORBELL_PORT_BYTES: u16 = 0x2000;

/// First port and interrupt pin of each serial port.
pub const SERIAL: [(u16, u32); 2] = [(0x3f8, 4), (0x2f8, 3)];
/// The ACPI power management ports, at the address that QEMU's machine q35 uses.
pub const ACPI_PORTS: u16 = 0x600;
/// The number of these ports.
pub const ACPI_PORT_BYTES: u8 = 0x10;
/// Event status (16 bits), then event enable (16 bits).
pub const PM1_EVENT: u16 = ACPI_PORTS;
/// Control (16 bits): a write of `1 << 13` powers the machine off.
pub const PM1_CONTROL: u16 = ACPI_PORTS + 4;
/// A write of [`RESET_VALUE`] (8 bits) resets the machine.
pub const RESET_PORT: u16 = ACPI_PORTS + 8;
/// The value of a write to [`RESET_PORT`] that resets the machine.
pub const RESET_VALUE: u8 = 1;
/// The command port of a PC's keyboard controller. The machine has no such controller, but a write
/// of 0xfe resets the machine, as kernels expect of a PC.
pub const KEYBOARD_PORT: u16 = 0x64;
/// The port at which a guest sets marks (`--marks`) by a write of 4 bytes.
pub const MARK_PORT: u16 = ACPI_PORTS + ACPI_PORT_BYTES as u16;
/// The ACPI interrupt (SCI).
pub const SCI: u32 = 9;

/// The address of messages for synthetic interrupts of virtual processor 0, if there is a SynIC.
/// There is no memory at this address.
pub const SINTS: u64 = 0xfed8_0000;
/// The distance from one virtual processor's address to the next.
pub const SINT_STRIDE: u16 = 16;

/// The most virtual CPUs. I/O APIC and messages address a CPU by 8 bits, and the value with all
/// bits set means every CPU.
pub const CPUS_MAX: u32 = 255;

/// The number of pins of the I/O APIC.
pub const PINS: u32 = 24;
/// The first pin for PCI's INTx. [`intx_pin`] gives the pin of each INTx.
pub const INTX_PINS: u32 = 16;
/// The number of pins for PCI's INTx.
pub const INTX_PIN_COUNT: u32 = 8;

/// The I/O APIC's pin for INTx `pin` (0: INTA) of device `device` on bus 0. A function behind a
/// bridge counts as the bridge's device, with its own pin rotated by its own device number. All
/// functions of this machine have device number 0.
pub const fn intx_pin(device: u8, pin: u8) -> u32 {
    INTX_PINS + (device as u32 + pin as u32) % INTX_PIN_COUNT
}
