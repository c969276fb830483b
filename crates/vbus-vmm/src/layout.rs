//! Where everything lies in the guest's physical address space, its I/O ports and its interrupt
//! pins.

/// RAM below 4 GiB ends here at the latest; the rest of it is from [`HIGH_RAM`] on.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// RAM above the hole.
pub const HIGH_RAM: u64 = 1 << 32;

/// PCI Express configuration space (ECAM) of buses 0 to [`BUS_MAX`], 1 MiB each.
pub const ECAM: u64 = 0xc000_0000;
/// The highest bus number.
pub const BUS_MAX: u8 = 31;
/// Bytes of the ECAM.
pub const ECAM_BYTES: u64 = (BUS_MAX as u64 + 1) << 20;
/// What the BARs of functions are put in, by the guest's kernel.
pub const PCI_WINDOW: u64 = 0xe000_0000;
/// Bytes of it.
pub const PCI_WINDOW_BYTES: u64 = 0x1000_0000;

/// The page that has the first instruction of a processor's.
pub const FIRMWARE: u64 = 0xffff_f000;
/// Bytes of it.
pub const FIRMWARE_BYTES: usize = 0x1000;

/// Configuration ports of conventional PCI: address, and data 4 bytes above.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// The first port of the PIO doorbells, outside of all that PCI hands out.
pub const DOORBELL_PORTS: u16 = 0xc000;
/// Bytes of them.
pub const DOORBELL_PORT_BYTES: u16 = 0x2000;

/// Serial ports: base and interrupt pin.
pub const SERIAL: [(u16, u32); 2] = [(0x3f8, 4), (0x2f8, 3)];
/// The ACPI power management ports, with those of a PC that QEMU calls q35.
pub const ACPI_PORTS: u16 = 0x600;
/// How many they are.
pub const ACPI_PORT_BYTES: u8 = 0x10;
/// Event status (16 bits), then event enable (16 bits).
pub const PM1_EVENT: u16 = ACPI_PORTS;
/// Control (16 bits): a write of `1 << 13` powers the machine off.
pub const PM1_CONTROL: u16 = ACPI_PORTS + 4;
/// A write of [`RESET_VALUE`] (8 bits) resets the machine.
pub const RESET_PORT: u16 = ACPI_PORTS + 8;
/// What must be written to it.
pub const RESET_VALUE: u8 = 1;
/// The keyboard controller's command port: there is none, but a write of 0xfe here resets the
/// machine too, as kernels expect of a PC.
pub const KEYBOARD_PORT: u16 = 0x64;
/// Where a guest that measures sets marks (`--marks`): a write of 4 bytes.
pub const MARK_PORT: u16 = ACPI_PORTS + ACPI_PORT_BYTES as u16;
/// The ACPI interrupt (SCI).
pub const SCI: u32 = 9;

/// Where messages for synthetic interrupts of virtual processor 0 go, if there is a SynIC; no
/// memory is there.
pub const SINTS: u64 = 0xfed8_0000;
/// From one virtual processor to the next.
pub const SINT_STRIDE: u16 = 16;

/// The most virtual CPUs: what the I/O APIC and messages can address by 8 bits, all of which
/// together mean every CPU.
pub const CPUS_MAX: u32 = 255;

/// Pins of the I/O APIC.
pub const PINS: u32 = 24;
/// The first of the pins that PCI's INTx use: that of device `d` on bus 0, pin `p` (0: INTA) is
/// [`intx_pin`].
pub const INTX_PINS: u32 = 16;
/// How many of them there are.
pub const INTX_PIN_COUNT: u32 = 8;

/// The I/O APIC's pin of INTx `pin` (0: INTA) of device `device` on bus 0. A function behind a
/// bridge goes by the bridge's device, its own pin turned by its device number: all functions here
/// are device 0.
pub const fn intx_pin(device: u8, pin: u8) -> u32 {
    INTX_PINS + (device as u32 + pin as u32) % INTX_PIN_COUNT
}
