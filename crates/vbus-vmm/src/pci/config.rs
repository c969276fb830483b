// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The configuration space of a function as the guest sees it. It belongs to the VMM, which makes
//! it from the server's description. Only the guest's writes of the command register go to the
//! server.

use vbus_pci_config::register::{COMMAND_MASTER, COMMAND_MEMORY};
use vbus_pci_config::{Builder, CONVENTIONAL_BYTES, ConfigSpace, Header};
use vbus_shm::abi::capability;

use super::description::{Description, Front, VirtioParts};

/// The offset of each capability, if the function has it.
const VENDOR: u8 = 0x40;
/// MSI has a mask bit and a pending bit here, whether the server's own has them or not.
const MSI: u8 = 0x70;
const MSIX: u8 = 0x88;
const EXPRESS: u8 = 0x98;
/// The bytes that are free at [`VENDOR`].
const VENDOR_ROOM: usize = (MSI - VENDOR) as usize;

/// A doorbell record of the vendor-specific capability.
pub(super) type Record = [u8; capability::RECORD_BYTES as usize];

/// Makes the configuration space of a function with this description. The vendor-specific
/// capability has the server's own doorbells and as many of `records` as there is room for.
pub(super) fn config_space(description: &Description, records: &[Record]) -> ConfigSpace {
    let [revision, class @ ..] = description.class.to_le_bytes();
    let [vendor_low, vendor_high, id_low, id_high] = description.subsystem.to_le_bytes();
    let header = Header {
        vendor: description.ids.0,
        device: description.ids.1,
        revision,
        class: u32::from_le_bytes([class[0], class[1], class[2], 0]),
        subsystem_vendor: u16::from_le_bytes([vendor_low, vendor_high]),
        subsystem: u16::from_le_bytes([id_low, id_high]),
        interrupt_pin: description.pin,
    };
    let mut builder = Builder::new(CONVENTIONAL_BYTES, &header).bar(0, description.bar);
    match &description.front {
        Front::Vbus { registers } => {
            builder = builder.vendor(VENDOR, &vendor_capability(description, *registers, records));
        }
        Front::Virtio(parts) => {
            for (at, content) in virtio_capabilities(description, parts) {
                builder = builder.vendor(at, &content);
            }
        }
    }
    // The capabilities of a virtio device leave no room for MSI, which none of them has.
    if description.msi && matches!(description.front, Front::Vbus { .. }) {
        builder = builder.msi(MSI, true);
    }
    if let Some(layout) = description.msix {
        builder = builder.msix(MSIX, layout);
    }
    if description.express {
        builder = builder.express(EXPRESS);
    }
    builder.build()
}

/// The capabilities of a virtio device: where each is, and its content without its id and link.
fn virtio_capabilities(description: &Description, parts: &VirtioParts) -> [(u8, Vec<u8>); 4] {
    let content = |kind: u8, (offset, len): (u32, u32), more: &[u8]| {
        let mut bytes = vec![0, kind, 0, 0, 0, 0];
        bytes.extend_from_slice(&offset.to_le_bytes());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(more);
        bytes
    };
    let stride = u32::from(description.stride).to_le_bytes();
    [
        (VENDOR, content(VirtioParts::COMMON, parts.common, &[])),
        (VENDOR + 0x10, content(VirtioParts::ISR, parts.isr, &[])),
        (VENDOR + 0x20, content(VirtioParts::DEVICE, parts.device, &[])),
        (VENDOR + 0x30, content(VirtioParts::NOTIFY, parts.notify, &stride)),
    ]
}

/// The content of the vendor-specific capability, without its id and link.
fn vendor_capability(description: &Description, registers: u32, records: &[Record]) -> Vec<u8> {
    let mut bytes = vec![0; usize::from(capability::HEADER_BYTES)];
    bytes[usize::from(capability::VERSION)] = capability::LAYOUT;
    let signature = usize::from(capability::SIGNATURE);
    bytes[signature..signature + 4].copy_from_slice(&capability::SIGNATURE_VALUE.to_le_bytes());
    let at = usize::from(capability::REGISTERS);
    bytes[at..at + 4].copy_from_slice(&registers.to_le_bytes());
    let mut first = [0; capability::RECORD_BYTES as usize];
    first[0] = capability::KIND_MMIO;
    first[2..4].copy_from_slice(&description.stride.to_le_bytes());
    first[4..].copy_from_slice(&description.doorbells.to_le_bytes());
    for record in std::iter::once(&first).chain(records) {
        if bytes.len() + record.len() <= VENDOR_ROOM {
            bytes.extend_from_slice(record);
        }
    }
    bytes.split_off(2)
}

/// Whether the guest has enabled memory accesses or DMA of the function.
pub(super) fn in_use(space: &ConfigSpace) -> bool {
    space.command() & (COMMAND_MEMORY | COMMAND_MASTER) != 0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use vbus_pci_config::capabilities;

    use super::super::description::tests::{ALL, space, virtio_space};
    use super::*;

    fn config(records: &[Record]) -> ConfigSpace {
        config_space(&Description::parse(&space(), 0x4000, &ALL).unwrap(), records)
    }

    #[test]
    fn the_records_follow_the_servers_own() {
        let pio = [2, 0, 1, 0, 0, 0xc0, 0, 0];
        let space = config(&[pio, [3; 8]]);
        let list: Result<Vec<_>, _> = capabilities(space.bytes()).collect();
        assert_eq!(list.unwrap(), [(0x09, 0x40), (0x05, 0x70), (0x11, 0x88), (0x10, 0x98)]);
        assert_eq!(
            space.bytes()[0x40..0x54],
            [9, 0x70, 36, 1, b'v', b'b', b'u', b's', 0, 0, 0, 0, 1, 0, 4, 0, 0, 0x10, 0, 0]
        );
        assert_eq!(space.bytes()[0x54..0x64], [2, 0, 1, 0, 0, 0xc0, 0, 0, 3, 3, 3, 3, 3, 3, 3, 3]);
        let full = config(&[[7; 8]; 9]);
        assert_eq!((full.bytes()[0x42], full.bytes()[0x70]), (44, 5), "four records, and no more");
    }

    #[test]
    fn a_virtio_device_has_its_parts() {
        let server = virtio_space();
        let description = Description::parse(&server, 0x8000, &ALL).unwrap();
        let space = config_space(&description, &[[7; 8]]);
        let list: Result<Vec<_>, _> = capabilities(space.bytes()).collect();
        assert_eq!(list.unwrap(), [(9, 0x40), (9, 0x50), (9, 0x60), (9, 0x70), (0x11, 0x88)]);
        for (at, bytes) in [(0x40, 16), (0x50, 16), (0x60, 16), (0x70, 20)] {
            // All but the link is the server's.
            assert_eq!(space.bytes()[at..at + bytes][2..], server[at..at + bytes][2..]);
        }
        assert_eq!(space.bytes()[..8], server[..8]);
    }

    #[test]
    fn the_header_is_the_servers() {
        let mut space = config(&[]);
        assert_eq!(space.bytes()[..12], [0xf4, 0x1a, 0xf5, 0x10, 0, 0, 0x10, 0, 1, 0, 0, 2]);
        assert_eq!(space.bytes()[0x2c..0x30], [0xf4, 0x1a, 1, 0]);
        assert_eq!(space.bytes()[0x88..0x94], [0x11, 0x98, 7, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0]);
        assert!(!in_use(&space));
        space.write(4, &[4]);
        assert!(in_use(&space));
    }
}
