//! The configuration space: what it holds, and which bits of it a driver may write.

use vbus_core::Identity;
use vbus_core::shm::abi::{self, bar0, capability};

use crate::Options;

/// Bytes of a conventional function's configuration space.
const CONVENTIONAL_BYTES: usize = 256;
/// Bytes of a PCI Express function's configuration space.
const EXPRESS_BYTES: usize = 4096;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Where each capability lies, if the function has it.
mod at {
    /// Vendor-specific, 16 bytes, and room for four more records, which a VMM may add.
    pub const VENDOR: u8 = 0x40;
    /// MSI, 14 bytes.
    pub const MSI: u8 = 0x70;
    /// MSI-X, 12 bytes.
    pub const MSIX: u8 = 0x80;
    /// PCI Express, 60 bytes.
    pub const EXPRESS: u8 = 0x90;
}

/// The space, with its write masks. Everything that is not written here is zero and stays so.
pub(crate) struct ConfigSpace {
    bytes: Vec<u8>,
    /// The bits that a driver may write.
    mask: Vec<u8>,
    reset: Vec<u8>,
}

/// Lays out a space.
struct Layout {
    bytes: Vec<u8>,
    mask: Vec<u8>,
    /// Where the offset of the next capability goes.
    link: usize,
}

impl Layout {
    fn set(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    fn writable(&mut self, at: usize, mask: &[u8]) {
        self.mask[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Begins the capability `id` at `at` and links it.
    fn capability(&mut self, at: u8, id: u8) -> usize {
        self.bytes[self.link] = at;
        self.bytes[usize::from(at)] = id;
        self.link = usize::from(at) + 1;
        usize::from(at)
    }

    fn header(&mut self, identity: &Identity) {
        self.set(0x00, &abi::PCI_VENDOR.to_le_bytes());
        self.set(0x02, &abi::PCI_DEVICE.to_le_bytes());
        self.writable(
            COMMAND,
            &(COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE).to_le_bytes(),
        );
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        // Revision, then the class code's three bytes.
        let revision_and_class = identity.pci_class << 8 | u32::from(abi::ABI_VERSION & 0xff);
        self.set(0x08, &revision_and_class.to_le_bytes());
        // Cache line size and latency timer: kept for whoever writes them, without a meaning.
        self.writable(0x0c, &[0xff, 0xff]);
        let size = u32::try_from(bar0::SIZE).unwrap_or(u32::MAX);
        self.writable(BAR0, &(!(size - 1)).to_le_bytes());
        self.set(SUBSYSTEM, &abi::PCI_VENDOR.to_le_bytes());
        self.set(SUBSYSTEM + 2, &identity.class.to_le_bytes());
        self.writable(INTERRUPT_LINE, &[0xff]);
        self.set(INTERRUPT_PIN, &[1]);
    }

    fn vendor(&mut self) {
        let at = self.capability(at::VENDOR, 0x09);
        self.set(at + 2, &[capability::HEADER_BYTES + capability::RECORD_BYTES]);
        self.set(at + usize::from(capability::VERSION), &abi::ABI_VERSION.to_le_bytes()[..1]);
        self.set(at + usize::from(capability::REGISTERS), &bar0::REGISTERS.to_le_bytes()[..4]);
        let record = at + usize::from(capability::HEADER_BYTES);
        self.set(record, &[capability::KIND_MMIO]);
        self.set(record + 2, &bar0::DOORBELL_STRIDE.to_le_bytes()[..2]);
        self.set(record + 4, &bar0::DOORBELLS.to_le_bytes()[..4]);
    }

    fn msi(&mut self) {
        let at = self.capability(at::MSI, 0x05);
        // Control: one vector, 64-bit address, no mask bits. The enable bit may be written.
        self.set(at + 2, &(1u16 << 7).to_le_bytes());
        self.writable(at + 2, &1u16.to_le_bytes());
        self.writable(at + 4, &0xffff_fffcu32.to_le_bytes());
        self.writable(at + 8, &u32::MAX.to_le_bytes());
        self.writable(at + 12, &u16::MAX.to_le_bytes());
    }

    fn msix(&mut self, vectors: u16) {
        let at = self.capability(at::MSIX, 0x11);
        self.set(at + 2, &(vectors - 1).to_le_bytes());
        // Function Mask and MSI-X Enable.
        self.writable(at + 2, &(3u16 << 14).to_le_bytes());
        // The low three bits name the BAR: 0.
        self.set(at + 4, &bar0::MSIX_TABLE.to_le_bytes()[..4]);
        self.set(at + 8, &bar0::MSIX_PBA.to_le_bytes()[..4]);
    }

    fn express(&mut self) {
        let at = self.capability(at::EXPRESS, 0x10);
        // Version 2, endpoint.
        self.set(at + 0x02, &2u16.to_le_bytes());
        // Device: payloads of 128 bytes, role-based error reporting. All of the control register
        // but the reset bit may be written.
        self.set(at + 0x04, &(1u32 << 15).to_le_bytes());
        self.writable(at + 0x08, &0x7fffu16.to_le_bytes());
        // Link: 2.5 GT/s, one lane, as capability and as status. Control: ASPM, read completion
        // boundary, common clock, extended synch.
        self.set(at + 0x0c, &0x0000_0011u32.to_le_bytes());
        self.writable(at + 0x10, &0x00cbu16.to_le_bytes());
        self.set(at + 0x12, &0x0011u16.to_le_bytes());
    }
}

impl ConfigSpace {
    pub(crate) fn new(identity: &Identity, options: Options, msix_vectors: u16) -> ConfigSpace {
        let size = if options.express { EXPRESS_BYTES } else { CONVENTIONAL_BYTES };
        let mut layout = Layout { bytes: vec![0; size], mask: vec![0; size], link: CAPABILITIES };
        layout.header(identity);
        layout.vendor();
        layout.msi();
        if msix_vectors > 0 {
            layout.msix(msix_vectors);
        }
        if options.express {
            layout.express();
        }
        let Layout { bytes, mask, .. } = layout;
        ConfigSpace { reset: bytes.clone(), bytes, mask }
    }

    pub(crate) fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Back to the values of power-on.
    pub(crate) fn reset(&mut self) {
        self.bytes.copy_from_slice(&self.reset);
    }

    /// Reads; places beyond the end read zeros. `pending`: Interrupt Status as it is now.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8], pending: bool) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (i, byte) in data.iter_mut().enumerate() {
            let at = start.saturating_add(i);
            *byte = self.bytes.get(at).copied().unwrap_or(0);
            if at == STATUS && pending {
                *byte |= STATUS_INTERRUPT;
            }
        }
    }

    /// Writes what may be written of it.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (i, byte) in data.iter().enumerate() {
            let at = start.saturating_add(i);
            let (Some(have), Some(mask)) = (self.bytes.get_mut(at), self.mask.get(at)) else {
                return;
            };
            *have = *have & !mask | byte & mask;
        }
    }

    /// The driver forbids INTx.
    pub(crate) fn intx_disabled(&self) -> bool {
        let command = u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]]);
        command & COMMAND_INTX_DISABLE != 0
    }

    /// The driver lets the device access memory.
    pub(crate) fn bus_master(&self) -> bool {
        let command = u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]]);
        command & COMMAND_MASTER != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(options: Options) -> ConfigSpace {
        let identity =
            Identity { class: 7, pci_class: 0x02_00_00, vectors: 5, ..Identity::user("test") };
        ConfigSpace::new(&identity, options, if options.msix { 5 } else { 0 })
    }

    fn read32(space: &ConfigSpace, offset: u64) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data, false);
        u32::from_le_bytes(data)
    }

    fn capabilities(space: &ConfigSpace) -> Vec<(u8, u8)> {
        let mut list = Vec::new();
        let mut at = space.bytes[CAPABILITIES];
        while at != 0 {
            assert!(at >= 0x40 && at % 4 == 0 && list.len() < 48);
            list.push((space.bytes[usize::from(at)], at));
            at = space.bytes[usize::from(at) + 1];
        }
        list
    }

    #[test]
    fn header_says_what_it_is() {
        let space = space(Options::default());
        assert_eq!(read32(&space, 0), 0x10f5_1af4);
        assert_eq!(read32(&space, 8), 0x0200_0001);
        assert_eq!(read32(&space, 0x2c), 0x0007_1af4);
        assert_eq!(read32(&space, 4), 0x0010_0000);
        assert_eq!(space.bytes[INTERRUPT_PIN], 1);
        assert_eq!(space.size(), 256);
    }

    #[test]
    fn capability_lists_are_well_formed() {
        let ids = |o| capabilities(&space(o)).into_iter().map(|(id, _)| id).collect::<Vec<_>>();
        assert_eq!(ids(Options::default()), [0x09, 0x05]);
        assert_eq!(ids(Options { msix: true, express: false }), [0x09, 0x05, 0x11]);
        assert_eq!(ids(Options { msix: true, express: true }), [0x09, 0x05, 0x11, 0x10]);
        assert_eq!(ids(Options { msix: false, express: true }), [0x09, 0x05, 0x10]);
        assert_eq!(space(Options { msix: false, express: true }).size(), 4096);
        assert_eq!(
            read32(&space(Options { msix: true, express: false }), u64::from(at::MSIX)) >> 16,
            4,
            "one less than the vectors"
        );
    }

    #[test]
    fn sizing_the_bar_gives_16_kib() {
        let mut space = space(Options::default());
        space.write(0x10, &[0xff; 24]);
        assert_eq!(read32(&space, 0x10), 0xffff_c000);
        for bar in 1..6 {
            assert_eq!(read32(&space, 0x10 + bar * 4), 0);
        }
        space.write(0x10, &0xfeb1_2345u32.to_le_bytes());
        assert_eq!(read32(&space, 0x10), 0xfeb1_0000);
        space.reset();
        assert_eq!(read32(&space, 0x10), 0);
    }

    #[test]
    fn only_what_may_be_written_is() {
        let mut space = space(Options { msix: true, express: true });
        let before: Vec<u8> = space.bytes.clone();
        space.write(0, &[0xff; 4096]);
        for (at, (was, is)) in before.iter().zip(&space.bytes).enumerate() {
            assert_eq!(was ^ is, space.mask[at] & !was, "offset {at:#x}");
        }
        assert_eq!(read32(&space, 4), 0x0010_0406);
        space.write(u64::MAX - 1, &[0xff; 8]);
        space.write(254, &[0xff; 8]);
    }

    #[test]
    fn status_shows_a_pending_interrupt_in_any_access() {
        let space = space(Options::default());
        let mut byte = [0];
        space.read(6, &mut byte, true);
        assert_eq!(byte, [0x18]);
        let mut all = [0; 256];
        space.read(0, &mut all, true);
        assert_eq!(all[6], 0x18);
        let mut word = [0; 2];
        space.read(5, &mut word, true);
        assert_eq!(word, [0, 0x18]);
    }
}
