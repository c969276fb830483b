//! The configuration space of a function, as the guest sees it. It is the VMM's own, made of what
//! the server said at first; of what the guest does with it, only the command register is the
//! server's concern.

use vbus_shm::abi::{ABI_VERSION, PCI_DEVICE, PCI_VENDOR, capability};

use super::facts::Facts;
use super::space::Space;

pub(super) const COMMAND: usize = 0x04;
pub(super) const STATUS: usize = 0x06;
/// Interrupt Status, in the register's first byte.
pub(super) const STATUS_INTERRUPT: u8 = 1 << 3;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;

/// Where each capability lies, if the function has it.
const VENDOR: u8 = 0x40;
/// 24 bytes: 64-bit address and mask bits, whatever the server's own has.
const MSI: u8 = 0x70;
const MSIX: u8 = 0x88;
const EXPRESS: u8 = 0x98;
/// Bytes at [`VENDOR`].
const VENDOR_ROOM: usize = (MSI - VENDOR) as usize;

/// A doorbell record of the capability.
pub(super) type Record = [u8; capability::RECORD_BYTES as usize];

/// One message interrupt, as the guest has set it up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Vector {
    pub(super) address: u64,
    pub(super) data: u32,
    pub(super) masked: bool,
}

/// The configuration space.
pub(super) struct Config {
    space: Space,
    /// As it is after power-on.
    first: Space,
    msi: bool,
    msix: bool,
    bar_bytes: u32,
}

/// Links capabilities.
struct Layout {
    space: Space,
    link: usize,
}

impl Layout {
    fn capability(&mut self, at: u8, id: u8) -> usize {
        self.space.set8(self.link, at);
        let at = usize::from(at);
        self.space.set8(at, id);
        self.link = at + 1;
        at
    }
}

impl Config {
    /// The space of a function with these facts and, beside the server's own doorbells, those of
    /// `records` (as many as there is room for).
    pub(super) fn new(facts: &Facts, records: &[Record]) -> Config {
        let mut s = Space::new(256);
        s.set16(0x00, PCI_VENDOR);
        s.set16(0x02, PCI_DEVICE);
        s.allow(COMMAND, &(COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE).to_le_bytes());
        s.set16(STATUS, 1 << 4);
        s.set32(0x08, facts.class);
        s.allow(0x0c, &[0xff, 0xff]);
        s.allow(BAR0, &(!(facts.bar - 1)).to_le_bytes());
        s.set32(SUBSYSTEM, facts.subsystem);
        s.allow(INTERRUPT_LINE, &[0xff]);
        s.set8(INTERRUPT_LINE + 1, facts.pin);

        let mut layout = Layout { space: s, link: CAPABILITIES };
        vendor(&mut layout, facts, records);
        if facts.msi {
            let at = layout.capability(MSI, 0x05);
            layout.space.set16(at + 2, 1 << 7 | 1 << 8);
            layout
                .space
                .allow(at + 2, &[1, 0, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
            layout.space.allow(at + 16, &[1]);
        }
        if let Some(msix) = facts.msix {
            let at = layout.capability(MSIX, 0x11);
            layout.space.set16(at + 2, msix.vectors - 1);
            // Function Mask, and Enable.
            layout.space.allow(at + 3, &[3 << 6]);
            layout.space.set32(at + 4, msix.table);
            layout.space.set32(at + 8, msix.pending);
        }
        if facts.express {
            let at = layout.capability(EXPRESS, 0x10);
            // Version 2, endpoint; role-based error reporting; 2.5 GT/s, one lane.
            layout.space.set16(at + 0x02, 2);
            layout.space.set32(at + 0x04, 1 << 15);
            layout.space.allow(at + 0x08, &0x7fffu16.to_le_bytes());
            layout.space.set32(at + 0x0c, 0x11);
            layout.space.allow(at + 0x10, &[0xcb]);
            layout.space.set16(at + 0x12, 0x11);
        }
        let space = layout.space;
        let (msi, msix) = (facts.msi, facts.msix.is_some());
        Config { first: space.clone(), space, msi, msix, bar_bytes: facts.bar }
    }

    /// Back to the state after power-on, with BAR0 at `bar`.
    pub(super) fn reset(&mut self, bar: u32) {
        self.space.clone_from(&self.first);
        self.space.set32(BAR0, bar);
    }

    /// Reads for the guest. Interrupt Status is the caller's to add.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        self.space.read(offset, data);
        // The pending bit is the interrupt's own.
    }

    pub(super) fn write(&mut self, offset: usize, data: &[u8]) {
        self.space.write(offset, data);
    }

    /// The command register.
    pub(super) fn command(&self) -> u16 {
        self.space.get16(COMMAND)
    }

    /// The guest uses the function.
    pub(super) fn in_use(&self) -> bool {
        self.command() & (COMMAND_MEMORY | COMMAND_MASTER) != 0
    }

    /// Where BAR0 begins; `None` while the function answers to no address.
    pub(super) fn bar(&self) -> Option<u64> {
        (self.command() & COMMAND_MEMORY != 0)
            .then(|| u64::from(self.space.get32(BAR0) & !(self.bar_bytes - 1)))
    }

    /// MSI, if it is enabled.
    pub(super) fn msi(&self) -> Option<Vector> {
        let at = usize::from(MSI);
        (self.msi && self.space.get16(at + 2) & 1 != 0).then(|| Vector {
            address: u64::from(self.space.get32(at + 8)) << 32
                | u64::from(self.space.get32(at + 4)),
            data: u32::from(self.space.get16(at + 12)),
            masked: self.space.get8(at + 16) & 1 != 0,
        })
    }

    /// Shows whether the MSI vector is pending.
    pub(super) fn set_msi_pending(&mut self, pending: bool) {
        if self.msi {
            self.space.set8(usize::from(MSI) + 20, u8::from(pending));
        }
    }

    /// Whether MSI-X is enabled, and then whether all of it is masked.
    pub(super) fn msix(&self) -> Option<bool> {
        let control = self.space.get16(usize::from(MSIX) + 2);
        (self.msix && control & 1 << 15 != 0).then_some(control & 1 << 14 != 0)
    }
}

fn vendor(layout: &mut Layout, facts: &Facts, records: &[Record]) {
    let at = layout.capability(VENDOR, 0x09);
    let s = &mut layout.space;
    s.set8(at + usize::from(capability::VERSION), (ABI_VERSION & 0xff) as u8);
    s.set32(at + usize::from(capability::REGISTERS), facts.registers);
    let mut first = [0; capability::RECORD_BYTES as usize];
    first[0] = capability::KIND_MMIO;
    first[2..4].copy_from_slice(&facts.stride.to_le_bytes());
    first[4..].copy_from_slice(&facts.doorbells.to_le_bytes());
    let mut len = usize::from(capability::HEADER_BYTES);
    for record in std::iter::once(&first).chain(records) {
        if len + record.len() <= VENDOR_ROOM {
            s.set(at + len, record);
            len += record.len();
        }
    }
    s.set8(at + 2, u8::try_from(len).unwrap_or(0));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::super::facts::tests::{ALL, space};
    use super::*;

    fn config(records: &[Record]) -> Config {
        Config::new(&Facts::parse(&space(), 0x4000, &ALL).unwrap(), records)
    }

    fn read32(config: &Config, at: usize) -> u32 {
        let mut data = [0; 4];
        config.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    fn write32(config: &mut Config, at: usize, value: u32) {
        config.write(at, &value.to_le_bytes());
    }

    fn capabilities(config: &Config) -> Vec<u8> {
        let mut at = usize::from(config.space.get8(CAPABILITIES));
        let mut ids = Vec::new();
        while at != 0 {
            ids.push(config.space.get8(at));
            at = usize::from(config.space.get8(at + 1));
        }
        ids
    }

    #[test]
    fn the_records_follow_the_servers_own() {
        let pio = [2, 0, 1, 0, 0, 0xc0, 0, 0];
        let config = config(&[pio, [3; 8]]);
        assert_eq!(capabilities(&config), [0x09, 0x05, 0x11, 0x10]);
        assert_eq!(
            config.space.bytes()[0x40..0x58],
            [9, 0x70, 32, 1, 0, 0, 0, 0, 1, 0, 4, 0, 0, 0x10, 0, 0, 2, 0, 1, 0, 0, 0xc0, 0, 0]
        );
        let full = Config::new(&Facts::parse(&space(), 0x4000, &ALL).unwrap(), &[[7; 8]; 9]);
        assert_eq!(
            (full.space.get8(0x42), full.space.get8(0x70)),
            (48, 5),
            "five records, and no more"
        );
    }

    #[test]
    fn the_bar_is_sized_placed_and_enabled() {
        let mut config = config(&[]);
        write32(&mut config, 0x10, u32::MAX);
        assert_eq!(read32(&config, 0x10), 0xffff_c000);
        write32(&mut config, 0x10, 0xe123_4567);
        assert_eq!(config.bar(), None);
        config.write(COMMAND, &[2]);
        assert_eq!(config.bar(), Some(0xe123_4000));
        config.reset(0xe800_0000);
        assert_eq!((config.bar(), read32(&config, 0x10), config.command()), (None, 0xe800_0000, 0));
    }

    #[test]
    fn messages() {
        let mut config = config(&[]);
        write32(&mut config, 0x74, 0xfee0_1003);
        write32(&mut config, 0x78, 5);
        config.write(0x7c, &[0x31, 0x40, 0xff, 0xff]);
        config.write(0x80, &[0xff; 4]);
        assert_eq!((config.msi(), config.msix()), (None, None));
        config.write(0x72, &[0xff, 0xff]);
        assert_eq!(
            config.msi(),
            Some(Vector { address: 0x5_fee0_1000, data: 0x4031, masked: true })
        );
        assert_eq!(read32(&config, 0x70) >> 16, 0x181, "64-bit address, mask bit, enabled");
        config.set_msi_pending(true);
        assert_eq!(read32(&config, 0x84), 1);
        config.write(0x8a, &[0xff, 0xff]);
        assert_eq!(config.msix(), Some(true));
        assert_eq!(read32(&config, 0x88) >> 16, 0xc007, "eight vectors, enabled, masked");
        config.write(0x8b, &[0x80]);
        assert_eq!(config.msix(), Some(false));
    }

    #[test]
    fn nothing_else_can_be_written() {
        let mut config = config(&[]);
        let before = config.space.bytes().to_vec();
        for at in 0..260 {
            config.write(at, &[0xff; 8]);
        }
        let writable = [
            0x04..0x06,
            0x0c..0x0e,
            0x10..0x14,
            0x3c..0x3d,
            0x72..0x7e,
            0x80..0x81,
            0x8b..0x8c,
            0xa0..0xa2,
            0xa8..0xa9,
        ];
        for (at, (was, is)) in before.iter().zip(config.space.bytes()).enumerate() {
            assert!(was == is || writable.iter().any(|r| r.contains(&at)), "offset {at:#x}");
        }
        assert_eq!(config.command(), 0x406);
    }
}
