// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The configuration space of a function with a header of type 0. [`Builder`] lays it out.
//! [`ConfigSpace`] tells what a driver has set up in it.

use crate::list::capability;
use crate::msix::{MsiMessage, MsixLayout};
use crate::register::{
    BAR0, CACHE_LINE, CAPABILITIES, COMMAND, COMMAND_INTX_DISABLE, COMMAND_MASTER, COMMAND_MEMORY,
    DEVICE, INTERRUPT_LINE, INTERRUPT_PIN, REVISION, STATUS, STATUS_CAPABILITIES, SUBSYSTEM,
    VENDOR,
};
use crate::space::Space;

/// Number of BARs in a header of type 0.
const BARS: usize = 6;

/// MSI control: the function is enabled to send messages.
const MSI_ENABLE: u16 = 1;
/// MSI control: addresses have 64 bits.
const MSI_64_BIT: u16 = 1 << 7;
/// MSI control: vectors can be masked one by one.
const MSI_MASKABLE: u16 = 1 << 8;
const MSIX_MASK: u16 = 1 << 14;
const MSIX_ENABLE: u16 = 1 << 15;

/// The identity of a function, as its header has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class code: three bytes, the base class in bits 16 to 23.
    pub class: u32,
    /// Vendor id of the subsystem.
    pub subsystem_vendor: u16,
    /// Id of the subsystem.
    pub subsystem: u16,
    /// 1 to 4 for INTA to INTD, 0 for no INTx.
    pub interrupt_pin: u8,
}

#[derive(Clone, Copy, Debug)]
struct Msi {
    at: usize,
    maskable: bool,
}

#[derive(Clone, Copy, Debug)]
struct Msix {
    at: usize,
    layout: MsixLayout,
}

/// Lays out a configuration space.
///
/// The methods panic if a structure does not fit into the space or overlaps another one. Only the
/// caller chooses the offsets, never a peer.
#[derive(Debug)]
pub struct Builder {
    space: Space,
    /// The offset of the byte that links the next capability.
    link: usize,
    /// The offset of the first byte after all capabilities.
    free: usize,
    bars: [u32; BARS],
    msi: Option<Msi>,
    msix: Option<Msix>,
}

impl Builder {
    /// Begins a space of `bytes` bytes ([`CONVENTIONAL_BYTES`](crate::CONVENTIONAL_BYTES) or
    /// [`EXPRESS_BYTES`](crate::EXPRESS_BYTES)) with this header.
    ///
    /// In the command register, a driver may write Memory Space, Bus Master and Interrupt Disable.
    /// It may write any value to cache line size, latency timer and interrupt line; these have no
    /// effect.
    #[must_use]
    pub fn new(bytes: usize, header: &Header) -> Builder {
        assert!(bytes >= crate::CONVENTIONAL_BYTES && header.interrupt_pin <= 4);
        let mut s = Space::new(bytes);
        s.set16(VENDOR, header.vendor);
        s.set16(DEVICE, header.device);
        s.allow(COMMAND, &(COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE).to_le_bytes());
        s.set32(REVISION, header.class << 8 | u32::from(header.revision));
        s.allow(CACHE_LINE, &[0xff, 0xff]);
        s.set16(SUBSYSTEM, header.subsystem_vendor);
        s.set16(SUBSYSTEM + 2, header.subsystem);
        s.allow(INTERRUPT_LINE, &[0xff]);
        s.set8(INTERRUPT_PIN, header.interrupt_pin);
        let bars = [0; BARS];
        Builder { space: s, link: CAPABILITIES, free: 0x40, bars, msi: None, msix: None }
    }

    /// Adds BAR `number`: 32-bit memory, not prefetchable, of `size` bytes. `size` is a power of
    /// two and at least 16.
    #[must_use]
    pub fn bar(mut self, number: usize, size: u32) -> Builder {
        assert!(size.is_power_of_two() && size >= 16, "a BAR of {size:#x} bytes");
        self.space.allow(BAR0 + 4 * number, &(!(size - 1)).to_le_bytes());
        self.bars[number] = size;
        self
    }

    /// Links a new capability `id` of `bytes` bytes at `at`. Returns its offset.
    fn capability(&mut self, at: u8, id: u8, bytes: usize) -> usize {
        let start = usize::from(at);
        assert!(
            start % 4 == 0 && start >= self.free && start + bytes <= crate::CONVENTIONAL_BYTES,
            "a capability of {bytes} bytes at {at:#x}"
        );
        self.free = start + bytes;
        self.space.set8(self.link, at);
        self.space.set8(start, id);
        self.link = start + 1;
        self.space.set16(STATUS, STATUS_CAPABILITIES);
        start
    }

    /// Adds a vendor-specific capability. `content` follows the id and the link. By the standard,
    /// its first byte is the length of the capability in bytes; this method writes that byte.
    #[must_use]
    pub fn vendor(mut self, at: u8, content: &[u8]) -> Builder {
        let len = content.len() + 2;
        let at = self.capability(at, capability::VENDOR, len);
        self.space.set(at + 2, content);
        self.space.set8(at + 2, u8::try_from(len).unwrap_or(u8::MAX));
        self
    }

    /// Adds the capability of virtio by which a driver reaches BARs through the configuration space
    /// (VIRTIO 1.3, section 4.1.4.9). `content` follows the id and the link, 18 bytes. A driver may
    /// write the fields for the BAR, the offset and the length, and the four bytes of data.
    #[must_use]
    pub fn window(mut self, at: u8, content: &[u8]) -> Builder {
        assert_eq!(content.len(), 18, "a window has 20 bytes");
        self = self.vendor(at, content);
        let at = usize::from(at);
        self.space.allow(at + 4, &[0xff]);
        self.space.allow(at + 8, &[0xff; 12]);
        self
    }

    /// Adds MSI with one vector and a 64-bit address. It has 14 bytes, or 24 with a mask bit and a
    /// pending bit (`maskable`).
    #[must_use]
    pub fn msi(mut self, at: u8, maskable: bool) -> Builder {
        let at = self.capability(at, capability::MSI, if maskable { 24 } else { 14 });
        self.space.set16(at + 2, MSI_64_BIT | if maskable { MSI_MASKABLE } else { 0 });
        self.space.allow(at + 2, &MSI_ENABLE.to_le_bytes());
        self.space.allow(at + 4, &[0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        if maskable {
            // The 16 bits above the data belong to an extension that this function does not offer.
            // Drivers write them together with the data.
            self.space.allow(at + 14, &[0xff, 0xff, 1]);
        }
        self.msi = Some(Msi { at, maskable });
        self
    }

    /// Adds MSI-X, 12 bytes. `layout` says where its table and its pending bits are.
    #[must_use]
    pub fn msix(mut self, at: u8, layout: MsixLayout) -> Builder {
        let at = self.capability(at, capability::MSIX, 12);
        assert!((1..=2048).contains(&layout.vectors) && (layout.table | layout.pending) & 7 == 0);
        self.space.set16(at + 2, layout.vectors - 1);
        self.space.allow(at + 2, &(MSIX_MASK | MSIX_ENABLE).to_le_bytes());
        self.space.set32(at + 4, layout.table | u32::from(layout.table_bar));
        self.space.set32(at + 8, layout.pending | u32::from(layout.pending_bar));
        self.msix = Some(Msix { at, layout });
        self
    }

    /// Adds PCI Express, 60 bytes: version 2, an endpoint without function-level reset.
    #[must_use]
    pub fn express(mut self, at: u8) -> Builder {
        let at = self.capability(at, capability::EXPRESS, 60);
        self.space.set16(at + 0x02, 2);
        // Device: payloads of 128 bytes, role-based error reporting. A driver may write all bits of
        // the control register except the reset bit.
        self.space.set32(at + 0x04, 1 << 15);
        self.space.allow(at + 0x08, &0x7fffu16.to_le_bytes());
        // Link: capability and status say 2.5 GT/s and one lane. A driver may write these bits of
        // the control register: ASPM, read completion boundary, common clock, extended synch.
        self.space.set32(at + 0x0c, 0x11);
        self.space.allow(at + 0x10, &0x00cbu16.to_le_bytes());
        self.space.set16(at + 0x12, 0x11);
        self
    }

    /// Returns the space in its state after power-on.
    #[must_use]
    pub fn build(self) -> ConfigSpace {
        let Builder { space, bars, msi, msix, .. } = self;
        ConfigSpace { power_on: space.clone(), space, bars, msi, msix }
    }
}

/// The configuration space of a function.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    space: Space,
    power_on: Space,
    /// Bytes of each BAR. 0: the function does not have it.
    bars: [u32; BARS],
    msi: Option<Msi>,
    msix: Option<Msix>,
}

impl ConfigSpace {
    /// Bytes of the space.
    pub fn size(&self) -> usize {
        self.space.bytes().len()
    }

    /// All bytes, as the driver reads them.
    pub fn bytes(&self) -> &[u8] {
        self.space.bytes()
    }

    /// Sets all registers to their values after power-on.
    pub fn reset(&mut self) {
        self.space.clone_from(&self.power_on);
    }

    /// Takes over the bytes of the same function's space ([`Space::restore`]). Returns false, and
    /// changes nothing, if a driver cannot have made them.
    pub fn restore(&mut self, bytes: &[u8]) -> bool {
        self.space.restore(bytes)
    }

    /// Reads for the driver. Bytes beyond the end are zero. The caller adds Interrupt Status.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        self.space.read(offset, data);
    }

    /// Writes for the driver. Only bits that the driver may write change. Bytes beyond the end are
    /// ignored.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        self.space.write(offset, data);
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.space.get16(COMMAND)
    }

    /// The interrupt pin: 1 to 4 for INTA to INTD, 0 for no INTx.
    pub fn interrupt_pin(&self) -> u8 {
        self.space.get8(INTERRUPT_PIN)
    }

    /// Bytes of a BAR; 0 for one that the function does not have.
    pub fn bar_size(&self, number: usize) -> u32 {
        self.bars.get(number).copied().unwrap_or(0)
    }

    /// The address of a BAR. `None` unless the driver has enabled Memory Space.
    pub fn bar(&self, number: usize) -> Option<u64> {
        let size = self.bar_size(number);
        (size > 0 && self.command() & COMMAND_MEMORY != 0)
            .then(|| u64::from(self.space.get32(BAR0 + 4 * number) & !(size - 1)))
    }

    /// Sets the address of a BAR, as firmware does. The low bits of `address` are ignored.
    ///
    /// # Panics
    /// If `number` is above 5.
    pub fn place_bar(&mut self, number: usize, address: u32) {
        let size = self.bars[number];
        let address = if size > 0 { address & !(size - 1) } else { 0 };
        self.space.set32(BAR0 + 4 * number, address);
    }

    /// Whether the function has MSI.
    pub fn has_msi(&self) -> bool {
        self.msi.is_some()
    }

    /// The message of MSI, if MSI is enabled.
    pub fn msi(&self) -> Option<MsiMessage> {
        let Msi { at, maskable } = self.msi?;
        (self.space.get16(at + 2) & MSI_ENABLE != 0).then(|| MsiMessage {
            address: u64::from(self.space.get32(at + 8)) << 32
                | u64::from(self.space.get32(at + 4)),
            data: u32::from(self.space.get16(at + 12)),
            masked: maskable && self.space.get8(at + 16) & 1 != 0,
        })
    }

    /// Sets or clears the pending bit of a maskable MSI. It is set while the function holds the
    /// message back.
    pub fn set_msi_pending(&mut self, pending: bool) {
        if let Some(Msi { at, maskable: true }) = self.msi {
            self.space.set8(at + 20, u8::from(pending));
        }
    }

    /// The location of table and pending bits, if the function has MSI-X.
    pub fn msix_layout(&self) -> Option<MsixLayout> {
        self.msix.map(|msix| msix.layout)
    }

    /// `None`: MSI-X is not enabled. Otherwise: whether the function mask is set.
    pub fn msix(&self) -> Option<bool> {
        let control = self.space.get16(self.msix?.at + 2);
        (control & MSIX_ENABLE != 0).then_some(control & MSIX_MASK != 0)
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;
    use crate::list::capabilities;

    const LAYOUT: MsixLayout =
        MsixLayout { vectors: 5, table_bar: 0, table: 0x2000, pending_bar: 2, pending: 0x3000 };

    fn header() -> Header {
        Header {
            vendor: 0x1af4,
            device: 0x10f5,
            revision: 1,
            class: 0x02_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 7,
            interrupt_pin: 1,
        }
    }

    fn space() -> ConfigSpace {
        Builder::new(256, &header())
            .bar(0, 0x4000)
            .vendor(0x40, &[0, 1, 2, 3])
            .msi(0x48, true)
            .msix(0x60, LAYOUT)
            .express(0x70)
            .build()
    }

    fn read32(space: &ConfigSpace, at: usize) -> u32 {
        let mut data = [0; 4];
        space.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    fn write32(space: &mut ConfigSpace, at: usize, value: u32) {
        space.write(at, &value.to_le_bytes());
    }

    #[test]
    fn a_header_says_what_the_function_is() {
        let space = space();
        assert_eq!(read32(&space, 0), 0x10f5_1af4);
        assert_eq!(read32(&space, 4), 0x0010_0000);
        assert_eq!(read32(&space, 8), 0x0200_0001);
        assert_eq!(read32(&space, 0x2c), 0x0007_1af4);
        assert_eq!((space.interrupt_pin(), space.size()), (1, 256));
        let bare = Builder::new(4096, &Header::default()).build();
        assert_eq!((read32(&bare, 4), read32(&bare, 0x34), bare.size()), (0, 0, 4096));
    }

    #[test]
    fn capabilities_are_linked_in_order() {
        let space = space();
        let list: Result<Vec<_>, _> = capabilities(space.bytes()).collect();
        let expected = [
            (capability::VENDOR, 0x40),
            (capability::MSI, 0x48),
            (capability::MSIX, 0x60),
            (capability::EXPRESS, 0x70),
        ];
        assert_eq!(list.unwrap_or_default(), expected);
        assert_eq!(space.bytes()[0x40..0x46], [9, 0x48, 6, 1, 2, 3]);
        let layout = space.bytes()[0x60..0x6c].try_into().ok().map(MsixLayout::parse);
        assert_eq!(layout, Some(LAYOUT));
        assert_eq!(space.msix_layout(), Some(LAYOUT));
    }

    #[test]
    fn a_bar_is_sized_placed_and_enabled() {
        let mut space = space();
        space.write(0x10, &[0xff; 24]);
        assert_eq!(read32(&space, 0x10), 0xffff_c000);
        for number in 1..6 {
            assert_eq!((read32(&space, 0x10 + number * 4), space.bar(number)), (0, None));
        }
        write32(&mut space, 0x10, 0xe123_7567);
        assert_eq!(space.bar(0), None);
        space.write(COMMAND, &[2]);
        assert_eq!(space.bar(0), Some(0xe123_4000));
        space.reset();
        assert_eq!((space.bar(0), read32(&space, 0x10), space.command()), (None, 0, 0));
        space.place_bar(0, 0xe800_0010);
        assert_eq!(read32(&space, 0x10), 0xe800_0000);
    }

    #[test]
    fn messages() {
        let mut space = space();
        write32(&mut space, 0x4c, 0xfee0_1003);
        write32(&mut space, 0x50, 5);
        space.write(0x54, &[0x31, 0x40, 0xff, 0xff]);
        space.write(0x58, &[0xff; 4]);
        assert_eq!((space.msi(), space.msix()), (None, None));
        space.write(0x4a, &[0xff, 0xff]);
        let message = MsiMessage { address: 0x5_fee0_1000, data: 0x4031, masked: true };
        assert_eq!(space.msi(), Some(message));
        assert_eq!(read32(&space, 0x48) >> 16, 0x181, "64-bit address, mask bit, enabled");
        space.set_msi_pending(true);
        assert_eq!(read32(&space, 0x5c), 1);
        space.write(0x62, &[0xff, 0xff]);
        assert_eq!(space.msix(), Some(true));
        assert_eq!(read32(&space, 0x60) >> 16, 0xc004, "five vectors, enabled, masked");
        space.write(0x63, &[0x80]);
        assert_eq!(space.msix(), Some(false));
        let mut simple = Builder::new(256, &header()).msi(0x40, false).build();
        simple.write(0x40, &[0xff; 24]);
        assert_eq!(simple.msi().map(|message| message.masked), Some(false));
        simple.set_msi_pending(true);
        assert_eq!(read32(&simple, 0x54), 0);
    }

    #[test]
    fn only_what_may_be_written_is() {
        let mut space = space();
        let before = space.bytes().to_vec();
        for at in 0..260 {
            space.write(at, &[0xff; 8]);
        }
        let writable = [
            0x04..0x06,
            0x0c..0x0e,
            0x10..0x14,
            0x3c..0x3d,
            0x4a..0x59,
            0x63..0x64,
            0x78..0x7a,
            0x80..0x81,
        ];
        for (at, (was, is)) in before.iter().zip(space.bytes()).enumerate() {
            assert!(was == is || writable.iter().any(|r| r.contains(&at)), "offset {at:#x}");
        }
        assert_eq!(space.command(), 0x406);
        space.write(usize::MAX - 1, &[0xff; 8]);
    }
}
