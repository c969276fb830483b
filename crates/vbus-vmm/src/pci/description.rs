// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A server's description of its function. The VMM reads and checks it once, when the device is
//! plugged. The guest sees a configuration space that is made from it, and nothing that the server
//! may say later.

use std::ops::Range;

use vbus_pci_config::{MsixLayout, capabilities, capability as id, register};
use vbus_shm::abi::{bar0, capability, reg};
use vfio_user_protocol::pci::{IRQ_INTX, IRQ_MSI, IRQ_MSIX, REGION_BAR0, REGION_CONFIG, REGIONS};
use vfio_user_protocol::{Client, ClientError};

/// The part of a configuration space that the VMM reads.
const CONFIG_BYTES: usize = 256;

/// Why a server's function cannot be plugged.
#[derive(Debug, thiserror::Error)]
pub enum BadFunction {
    /// The connection failed, or the server refused.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The function is neither of vbus nor of virtio.
    #[error(
        "neither a vbus nor a virtio device: {0:04x}:{1:04x} has no capability that says where the \
         registers are"
    )]
    Foreign(u16, u16),
    /// The vbus capability has a layout that this program does not know.
    #[error(
        "its vbus capability has layout version {0}; this program knows version {known}",
        known = capability::LAYOUT
    )]
    Layout(u8),
    /// The description contradicts itself.
    #[error("the server contradicts itself: {0}")]
    Lie(String),
}

fn lie(what: impl Into<String>) -> BadFunction {
    BadFunction::Lie(what.into())
}

/// How a driver finds the registers of a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Front {
    /// A device of vbus: the offset of the registers in BAR0.
    Vbus { registers: u32 },
    /// A virtio device (VIRTIO 1.3, section 4.1.4): its parts in BAR0. The doorbells are its notify
    /// area.
    Virtio(VirtioParts),
}

/// The parts of a virtio device in BAR0: offset and bytes of each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct VirtioParts {
    pub(super) common: (u32, u32),
    pub(super) isr: (u32, u32),
    pub(super) device: (u32, u32),
    pub(super) notify: (u32, u32),
}

impl VirtioParts {
    /// The numbers of the parts in their capabilities.
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;

    fn all(&self) -> [(u32, u32); 4] {
        [self.common, self.isr, self.device, self.notify]
    }

    /// Whether the function has told all parts.
    fn is_whole(&self) -> bool {
        self.all().iter().all(|(_, len)| *len > 0)
    }

    /// Whether this is the PCI device id of a virtio device that is not a transitional one.
    fn is_device((vendor, device): (u16, u16)) -> bool {
        vendor == 0x1af4 && (0x1040..0x1080).contains(&device)
    }
}

/// A function, as its server describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Description {
    /// Vendor and device id.
    pub(super) ids: (u16, u16),
    /// Revision and class code, as one register of the configuration space has them.
    pub(super) class: u32,
    pub(super) subsystem: u32,
    /// The size of BAR0 in bytes, a power of two.
    pub(super) bar: u32,
    /// Where its registers are.
    pub(super) front: Front,
    /// The offset of the first doorbell in BAR0, and the distance from one doorbell to the next.
    pub(super) doorbells: u32,
    pub(super) stride: u16,
    /// The INTx pin: 1 to 4 for INTA to INTD, or 0 for none.
    pub(super) pin: u8,
    pub(super) msi: bool,
    /// Where MSI-X table and pending bits are in BAR0, if the function has MSI-X.
    pub(super) msix: Option<MsixLayout>,
    pub(super) express: bool,
    /// The most doorbells that the device can have.
    pub(super) doorbell_count: u32,
}

/// The number of interrupts of each kind.
pub(super) struct Interrupts {
    pub(super) intx: u32,
    pub(super) msi: u32,
    pub(super) msix: u32,
}

impl Description {
    /// Reads the description from the server.
    pub(super) fn read(client: &mut Client) -> Result<Description, BadFunction> {
        let info = client.device_info()?;
        if info.regions < REGIONS || info.irqs <= IRQ_MSIX {
            return Err(lie(format!(
                "{} regions and {} kinds of interrupt",
                info.regions, info.irqs
            )));
        }
        if !info.resettable {
            return Err(lie("it cannot be reset"));
        }
        for region in 0..REGION_CONFIG {
            let size = client.region_info(region)?.size;
            if region != REGION_BAR0 && size != 0 {
                return Err(lie(format!(
                    "region {region} of {size:#x} bytes, where BAR0 is the only one"
                )));
            }
        }
        let bar = client.region_info(REGION_BAR0)?;
        let config = client.region_info(REGION_CONFIG)?;
        if !(config.readable && config.writable && bar.readable && bar.writable) {
            return Err(lie("BAR0 or configuration space cannot be read and written"));
        }
        if config.size < CONFIG_BYTES as u64 {
            return Err(lie(format!("configuration space of {:#x} bytes", config.size)));
        }
        let interrupts = Interrupts {
            intx: client.irq_info(IRQ_INTX)?.count,
            msi: client.irq_info(IRQ_MSI)?.count,
            msix: client.irq_info(IRQ_MSIX)?.count,
        };
        let mut bytes = [0; CONFIG_BYTES];
        client.region_read(REGION_CONFIG, 0, &mut bytes)?;
        let mut description = Description::parse(&bytes, bar.size, &interrupts)?;
        if let Front::Vbus { registers } = description.front {
            let mut register = |offset: u64| {
                let mut value = [0; 4];
                client.region_read(REGION_BAR0, u64::from(registers) + offset, &mut value)?;
                Ok::<u32, ClientError>(u32::from_le_bytes(value))
            };
            let magic = register(reg::MAGIC)?;
            if magic != reg::MAGIC_VALUE {
                return Err(lie(format!("registers that begin with {magic:#x}")));
            }
            description.doorbell_count = register(reg::MAX_REGIONS)?;
        }
        description.check_doorbells()?;
        Ok(description)
    }

    /// Checks that the doorbells lie in BAR0, and not in a structure of MSI-X.
    fn check_doorbells(&self) -> Result<(), BadFunction> {
        let (first, count) = (u64::from(self.doorbells), self.doorbell_count);
        if count > bar0::DOORBELL_COUNT {
            return Err(lie(format!("{count} doorbells")));
        }
        let range = first..first + u64::from(self.stride) * u64::from(count);
        if range.end > u64::from(self.bar) || self.msix.is_some_and(|msix| overlaps(&msix, &range))
        {
            return Err(lie(format!("{count} doorbells from {first:#x} of BAR0 on")));
        }
        Ok(())
    }

    /// Parses a configuration space. `bar` is the size of BAR0 in bytes.
    pub(super) fn parse(
        bytes: &[u8; CONFIG_BYTES],
        bar: u64,
        interrupts: &Interrupts,
    ) -> Result<Description, BadFunction> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let (vendor, device) = (u16_at(register::VENDOR), u16_at(register::DEVICE));
        if bytes[register::HEADER_TYPE] != 0 {
            return Err(lie(format!("header type {:#x}", bytes[register::HEADER_TYPE])));
        }
        if u32_at(register::BAR0) & 0xf != 0 {
            return Err(lie("BAR0 is not 32-bit memory"));
        }
        let Some(bar) = u32::try_from(bar)
            .ok()
            .filter(|b| b.is_power_of_two() && (0x1000..=0x40_0000).contains(b))
        else {
            return Err(lie(format!("BAR0 of {bar:#x} bytes")));
        };
        let mut description = Description {
            ids: (vendor, device),
            class: u32_at(register::REVISION),
            subsystem: u32_at(register::SUBSYSTEM),
            bar,
            front: Front::Virtio(VirtioParts::default()),
            doorbells: 0,
            stride: 0,
            pin: if interrupts.intx > 0 { bytes[register::INTERRUPT_PIN] } else { 0 },
            msi: false,
            msix: None,
            express: false,
            doorbell_count: 0,
        };
        if description.pin > 4 {
            return Err(lie(format!("interrupt pin {}", description.pin)));
        }
        // The distance from one doorbell of a virtio device to the next.
        let mut notify = 0;
        for found in capabilities(bytes) {
            let (id, at) = found.map_err(|e| lie(e.to_string()))?;
            let rest = &bytes[at..];
            let long_enough = |len: usize| {
                let short = || lie(format!("capability {id:#x} at {at:#x} does not fit"));
                rest.len().checked_sub(len).ok_or_else(short).map(drop)
            };
            match id {
                id::VENDOR if description.stride == 0 => {
                    // Capabilities of other vendors have this id, too.
                    let signature = usize::from(capability::SIGNATURE);
                    if rest.get(signature..signature + 4)
                        == Some(&capability::SIGNATURE_VALUE.to_le_bytes())
                    {
                        long_enough(usize::from(
                            capability::HEADER_BYTES + capability::RECORD_BYTES,
                        ))?;
                        description.vendor(rest)?;
                    } else if VirtioParts::is_device(description.ids) {
                        long_enough(20)?;
                        if let Some(multiplier) = description.virtio(rest)? {
                            notify = multiplier;
                        }
                    }
                }
                id::MSI => {
                    long_enough(14)?;
                    description.msi = interrupts.msi > 0;
                }
                id::MSIX if description.msix.is_none() => {
                    long_enough(12)?;
                    description.msix = Some(msix(rest, description.bar, interrupts.msix)?);
                }
                id::EXPRESS => {
                    long_enough(60)?;
                    if u16_at(at + 2) >> 4 & 0xf != 0 {
                        return Err(lie("it is no endpoint"));
                    }
                    description.express = true;
                }
                other => tracing::debug!("capability {other:#x} at {at:#x} is not passed on"),
            }
        }
        match description.front {
            Front::Vbus { .. } => {}
            Front::Virtio(parts) if parts.is_whole() => description.doorbells_of(&parts, notify)?,
            Front::Virtio(_) => return Err(BadFunction::Foreign(vendor, device)),
        }
        Ok(description)
    }

    /// Parses a capability of a virtio device, which is long enough. The first one of a part
    /// counts. Returns the multiplier of the notify area if this one has it.
    fn virtio(&mut self, bytes: &[u8]) -> Result<Option<u32>, BadFunction> {
        let Front::Virtio(parts) = &mut self.front else { return Ok(None) };
        let u32_at = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let (kind, bar, offset, len) = (bytes[3], bytes[4], u32_at(8), u32_at(12));
        let part = match kind {
            VirtioParts::COMMON => &mut parts.common,
            VirtioParts::NOTIFY => &mut parts.notify,
            VirtioParts::ISR => &mut parts.isr,
            VirtioParts::DEVICE => &mut parts.device,
            // The guest's configuration space is the VMM's, so it has no window to BAR0.
            _ => return Ok(None),
        };
        if part.1 > 0 {
            return Ok(None);
        }
        let end = u64::from(offset) + u64::from(len);
        if bar != 0 || offset % 4 != 0 || len == 0 || end > u64::from(self.bar) {
            return Err(lie(format!("virtio part {kind} of {len:#x} bytes at {offset:#x}")));
        }
        *part = (offset, len);
        Ok((kind == VirtioParts::NOTIFY).then(|| u32_at(16)))
    }

    /// Takes the notify area of a virtio device as its doorbells, with the distance `stride`.
    fn doorbells_of(&mut self, parts: &VirtioParts, stride: u32) -> Result<(), BadFunction> {
        let (first, len) = parts.notify;
        let fits = u16::try_from(stride).ok().filter(|stride| *stride > 0 && stride % 4 == 0);
        let Some(stride) = fits else {
            return Err(lie(format!("doorbells at {first:#x} in steps of {stride}")));
        };
        (self.doorbells, self.stride) = (first, stride);
        self.doorbell_count = len / u32::from(stride);
        let range = |(at, len): (u32, u32)| u64::from(at)..u64::from(at) + u64::from(len);
        let doorbells = range(parts.notify);
        for part in [parts.common, parts.isr, parts.device].map(range) {
            let meets = part.start < doorbells.end && doorbells.start < part.end;
            if meets || self.msix.is_some_and(|msix| overlaps(&msix, &part)) {
                return Err(lie(format!("virtio parts that overlap at {:#x}", part.start)));
            }
        }
        Ok(())
    }

    /// Parses the vendor-specific capability, which is long enough for one record.
    fn vendor(&mut self, bytes: &[u8]) -> Result<(), BadFunction> {
        let u32_at = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        if bytes[2] < capability::HEADER_BYTES + capability::RECORD_BYTES {
            return Err(lie(format!("vendor-specific capability of {} bytes", bytes[2])));
        }
        let layout = bytes[usize::from(capability::VERSION)];
        if layout != capability::LAYOUT {
            return Err(BadFunction::Layout(layout));
        }
        let record = usize::from(capability::HEADER_BYTES);
        if bytes[record] != capability::KIND_MMIO {
            return Err(lie(format!("its first doorbells are of kind {}", bytes[record])));
        }
        let registers = u32_at(usize::from(capability::REGISTERS));
        self.stride = u16::from_le_bytes([bytes[record + 2], bytes[record + 3]]);
        self.doorbells = u32_at(record + 4);
        let registers_end = u64::from(registers) + 0x1000;
        if registers % 0x1000 != 0 || registers_end > u64::from(self.bar) {
            return Err(lie(format!("registers at {registers:#x} of BAR0")));
        }
        self.front = Front::Vbus { registers };
        if self.stride == 0 || self.stride % 4 != 0 || self.doorbells % 4 != 0 {
            return Err(lie(format!(
                "doorbells at {:#x} in steps of {}",
                self.doorbells, self.stride
            )));
        }
        Ok(())
    }
}

/// Parses the MSI-X capability, which is long enough.
fn msix(bytes: &[u8], bar: u32, interrupts: u32) -> Result<MsixLayout, BadFunction> {
    let layout = bytes.first_chunk().map(MsixLayout::parse);
    let layout = layout.ok_or_else(|| lie("an MSI-X capability that is cut off"))?;
    let MsixLayout { vectors, table_bar, table, pending_bar, pending } = layout;
    if vectors > bar0::MSIX_MAX || u32::from(vectors) > interrupts {
        return Err(lie(format!("{vectors} MSI-X vectors, {interrupts} interrupts")));
    }
    let (table_range, pending_range) = (layout.table_range(), layout.pending_range());
    let misplaced = table_bar != 0
        || pending_bar != 0
        || table_range.end > u64::from(bar)
        || pending_range.end > u64::from(bar)
        || table_range.end > pending_range.start && pending_range.end > table_range.start;
    if misplaced {
        return Err(lie(format!(
            "MSI-X table at {table:#x} of BAR{table_bar}, pending bits at {pending:#x} of \
             BAR{pending_bar}"
        )));
    }
    Ok(layout)
}

/// Whether the MSI-X structures have a byte in `range` of BAR0.
fn overlaps(msix: &MsixLayout, range: &Range<u64>) -> bool {
    let meet = |other: Range<u64>| range.start < other.end && other.start < range.end;
    meet(msix.table_range()) || meet(msix.pending_range())
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    const LAYOUT: MsixLayout =
        MsixLayout { vectors: 8, table_bar: 0, table: 0x2000, pending_bar: 0, pending: 0x3000 };
    pub(in super::super) const ALL: Interrupts = Interrupts { intx: 1, msi: 1, msix: 8 };

    /// The configuration space of a function with MSI-X, as a server gives it.
    pub(in super::super) fn space() -> [u8; CONFIG_BYTES] {
        let mut bytes = [0; CONFIG_BYTES];
        let mut set = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        set(0, &[0xf4, 0x1a, 0xf5, 0x10, 0, 0, 0x10, 0, 1, 0, 0, 2]);
        set(0x2c, &[0xf4, 0x1a, 1, 0]);
        set(0x34, &[0x40]);
        set(0x3d, &[1]);
        set(0x40, &[0x09, 0x70, 20, 1, b'v', b'b', b'u', b's', 0, 0, 0, 0]);
        set(0x4c, &[1, 0, 4, 0, 0, 0x10, 0, 0]);
        set(0x70, &[0x05, 0x80, 0x80, 0]);
        set(0x80, &[0x11, 0x90, 7, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0]);
        set(0x90, &[0x10, 0, 2, 0]);
        bytes
    }

    fn parse(change: impl FnOnce(&mut [u8])) -> Result<Description, String> {
        let mut bytes = space();
        change(&mut bytes);
        Description::parse(&bytes, bar0::SIZE, &ALL).map_err(|e| e.to_string())
    }

    #[test]
    fn an_honest_server() {
        let description = parse(|_| ()).unwrap();
        assert_eq!(
            (description.class, description.subsystem, description.bar),
            (0x0200_0001, 0x0001_1af4, 0x4000)
        );
        assert_eq!(
            (&description.front, description.doorbells, description.stride, description.pin),
            (&Front::Vbus { registers: 0 }, 0x1000, 4, 1)
        );
        assert_eq!(description.msix, Some(LAYOUT));
        assert!(description.msi && description.express);
        assert_eq!(parse(|b| b[0x71] = 0).unwrap().msix, None);
        // Its ids and its revision are its own.
        let description = parse(|b| (b[1], b[8]) = (0x86, 9)).unwrap();
        assert_eq!((description.ids, description.class & 0xff), ((0x86f4, 0x10f5), 9));
    }

    /// The configuration space of a virtio network card, as a server gives it.
    pub(in super::super) fn virtio_space() -> [u8; CONFIG_BYTES] {
        let mut bytes = [0; CONFIG_BYTES];
        let mut set = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        set(0, &[0xf4, 0x1a, 0x41, 0x10, 0, 0, 0x10, 0, 1, 0, 0, 2]);
        set(0x2c, &[0xf4, 0x1a, 0, 0x11]);
        set(0x34, &[0x40]);
        set(0x3d, &[1]);
        set(0x40, &[9, 0x50, 16, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0]);
        set(0x50, &[9, 0x60, 16, 3, 0, 0, 0, 0, 0, 0x10, 0, 0, 1, 0, 0, 0]);
        set(0x60, &[9, 0x70, 16, 4, 0, 0, 0, 0, 0, 0x20, 0, 0, 24, 0, 0, 0]);
        set(0x70, &[9, 0x84, 20, 2, 0, 0, 0, 0, 0, 0x30, 0, 0, 20, 0, 0, 0, 4, 0, 0, 0]);
        set(0x84, &[9, 0x98, 20, 5]);
        set(0x98, &[0x11, 0, 5, 0, 0, 0x40, 0, 0, 0, 0x50, 0, 0]);
        bytes
    }

    fn parse_virtio(change: impl FnOnce(&mut [u8])) -> Result<Description, String> {
        let mut bytes = virtio_space();
        change(&mut bytes);
        let parsed = Description::parse(&bytes, 0x8000, &ALL);
        parsed.and_then(|d| d.check_doorbells().map(|()| d)).map_err(|e| e.to_string())
    }

    #[test]
    fn a_virtio_device() {
        let description = parse_virtio(|_| ()).unwrap();
        let (common, isr) = ((0, 0x40), (0x1000, 1));
        let (device, notify) = ((0x2000, 24), (0x3000, 20));
        let parts = VirtioParts { common, isr, device, notify };
        assert_eq!(description.front, Front::Virtio(parts));
        let Description { doorbells, stride, doorbell_count, .. } = description;
        assert_eq!((doorbells, stride, doorbell_count), (0x3000, 4, 5));
        for (message, at, value) in [
            ("neither a vbus nor a virtio device: 1af4:10f5", 2, 0xf5),
            ("neither a vbus nor a virtio device", 0x53, 9),
            ("virtio part 1 of 0x40 bytes at 0x0", 0x44, 1),
            ("virtio part 3 of 0x1 bytes at 0x1001", 0x58, 1),
            ("virtio part 4 of 0x0 bytes at 0x2000", 0x6c, 0),
            ("virtio part 2 of 0xff000014 bytes", 0x7f, 0xff),
            ("in steps of 0", 0x80, 0),
            ("in steps of 6", 0x80, 6),
            ("in steps of 65540", 0x82, 1),
            ("virtio parts that overlap at 0x2000", 0x79, 0x20),
            ("virtio parts that overlap at 0x2000", 0x9d, 0x20),
            ("5 doorbells from 0x3000", 0x9d, 0x30),
            ("1029 doorbells", 0x7d, 0x10),
        ] {
            let error = parse_virtio(|bytes| bytes[at] = value).unwrap_err();
            assert!(error.contains(message), "{error:?} for {message:?}");
        }
    }

    #[test]
    fn each_lie_has_its_name() {
        // A capability at the end of the space, with the signature.
        const SHORT: [(usize, u8); 6] =
            [(0x34, 0xf4), (0xf4, 9), (0xf8, b'v'), (0xf9, b'b'), (0xfa, b'u'), (0xfb, b's')];
        let cases: &[(&str, &[(usize, u8)])] = &[
            ("1af4:10f5 has no capability that says", &[(0x44, b'V')]),
            ("header type 0x81", &[(0x0e, 0x81)]),
            ("not 32-bit memory", &[(0x10, 4)]),
            ("interrupt pin 5", &[(0x3d, 5)]),
            ("no capability that says", &[(6, 0)]),
            ("no capability that says", &[(0x34, 0x70)]),
            ("capability at 0x3c", &[(0x34, 0x3c)]),
            ("capability at 0x42", &[(0x34, 0x42)]),
            ("without an end", &[(0x91, 0x40)]),
            ("without an end", &[(0x41, 0x40)]),
            ("0x9 at 0xf4 does not fit", &SHORT),
            ("0x10 at 0xfc does not fit", &[(0x91, 0xfc), (0xfc, 0x10)]),
            ("capability of 8 bytes", &[(0x42, 8)]),
            ("layout version 2", &[(0x43, 2)]),
            ("registers at 0x4000", &[(0x49, 0x40)]),
            ("registers at 0x4", &[(0x48, 4)]),
            ("are of kind 2", &[(0x4c, 2)]),
            ("in steps of 0", &[(0x4e, 0)]),
            ("in steps of 6", &[(0x4e, 6)]),
            ("9 MSI-X vectors", &[(0x82, 8)]),
            ("2048 MSI-X vectors", &[(0x82, 0xff), (0x83, 7)]),
            ("MSI-X table at 0x2000 of BAR1", &[(0x84, 1)]),
            ("MSI-X table at 0x3f90", &[(0x84, 0x90), (0x85, 0x3f)]),
            ("pending bits at 0xff003000", &[(0x8b, 0xff)]),
            ("pending bits at 0x2040", &[(0x88, 0x40), (0x89, 0x20)]),
            ("no endpoint", &[(0x92, 0x42)]),
        ];
        for (message, changes) in cases {
            let error = parse(|bytes| changes.iter().for_each(|(at, value)| bytes[*at] = *value))
                .unwrap_err();
            assert!(error.contains(message), "{error:?} for {message:?}");
        }
        for size in [0, 0x800, 0x3000, 1 << 23, 1 << 40] {
            assert!(
                Description::parse(&space(), size, &ALL)
                    .unwrap_err()
                    .to_string()
                    .contains("BAR0 of")
            );
        }
    }

    #[test]
    fn what_has_no_interrupts_is_not_offered() {
        let none = Interrupts { intx: 0, msi: 0, msix: 0 };
        let mut bytes = space();
        bytes[0x71] = 0;
        let description = Description::parse(&bytes, bar0::SIZE, &none).unwrap();
        assert_eq!((description.pin, description.msi, description.msix), (0, false, None));
    }

    #[test]
    fn no_bytes_panic() {
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..20_000 {
            let _ = parse(|bytes| {
                for _ in 0..6 {
                    seed = seed
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    let [at, value, ..] = (seed >> 40).to_le_bytes();
                    bytes[usize::from(at)] = value;
                }
            });
            let _ = parse_virtio(|bytes| {
                for _ in 0..6 {
                    seed = seed
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    let [at, value, ..] = (seed >> 40).to_le_bytes();
                    bytes[usize::from(at)] = value;
                }
            });
        }
    }
}
