// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The DSDT: the devices of the machine and their methods, in AML.

use super::aml::{
    Term, and, argument, bus_numbers, device, dword_field, edge_interrupt, eisa_id, equal,
    give_back, integer, local, memory, memory_window, method, name, not_equal, or, otherwise,
    package, ports, resources, store, string, uuid, when,
};
use crate::layout;

/// The UUID of the PCI host bridge interface of [`osc`].
const PCI_HOST_BRIDGE: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// The features of PCI Express that the guest's kernel may control: native hotplug, power
/// management events, error reports, and the PCI Express capability. The machine has no controller
/// for the hotplug of conventional PCI (bit 1).
const GRANTED: u32 = 0b1_1101;

/// Returns the body of the table, for `cpus` virtual CPUs.
pub fn body(cpus: u32) -> Vec<u8> {
    let zero = integer(0);
    // A write of sleep type 0 enters S5, "soft off". The machine has no other sleep state.
    let sleep_types = package(&[zero.clone(), zero.clone(), zero.clone(), zero]);
    let mut aml = name("_S5_", &sleep_types);
    aml.extend(host_bridge());
    aml.extend(motherboard());
    for (number, (port, pin)) in (0..).zip(layout::SERIAL) {
        aml.extend(serial(number, port, pin));
    }
    for cpu in 0..cpus {
        aml.extend(processor(cpu));
    }
    aml
}

/// Describes PCI Express: bus numbers, the window for BARs, interrupt pins, native hotplug.
fn host_bridge() -> Term {
    let window_end = layout::PCI_WINDOW + (layout::PCI_WINDOW_BYTES - 1);
    #[allow(clippy::cast_possible_truncation, reason = "the window is below 4 GiB")]
    let window = memory_window(layout::PCI_WINDOW as u32, window_end as u32);
    let config = ports(layout::PCI_CONFIG_PORT, 8);
    device(
        "PCI0",
        &[
            name("_HID", &eisa_id(b"PNP0A08")),
            name("_CID", &eisa_id(b"PNP0A03")),
            name("_UID", &integer(0)),
            name("_SEG", &integer(0)),
            name("_BBN", &integer(0)),
            name("_CRS", &resources(&[bus_numbers(layout::BUS_MAX), config, window])),
            name("_PRT", &interrupt_pins()),
            osc(),
        ],
    )
}

/// Maps each INTx pin of each device of bus 0 to a pin of the I/O APIC.
fn interrupt_pins() -> Term {
    let route = |device: u8, pin: u8| {
        let address = u32::from(device) << 16 | 0xffff;
        let io_apic_pin = layout::intx_pin(device, pin);
        package(&[address, pin.into(), 0, io_apic_pin].map(integer))
    };
    let routes = (0..32).flat_map(|device| (0..4).map(move |pin| route(device, pin)));
    package(&routes.collect::<Vec<_>>())
}

/// `_OSC`: the kernel asks for control of PCI Express features, and gets those in [`GRANTED`].
///
/// The last argument is a buffer of three words: the flags of the call, the features that the
/// kernel supports, the features that it wants to control. The method returns the same buffer.
fn osc() -> Term {
    /// Bits of the answer's first word: the interface is unknown, the revision is unknown, a
    /// feature was refused.
    const UNKNOWN_INTERFACE: u32 = 1 << 2;
    const UNKNOWN_REVISION: u32 = 1 << 3;
    const REFUSED: u32 = 1 << 4;
    const FLAGS: &str = "CDW1";
    const WANTED: &str = "CDW3";
    let (interface, revision, buffer) = (argument(0), argument(1), argument(3));
    let (flags, wanted, granted) = (FLAGS.as_bytes(), WANTED.as_bytes(), local(0));
    let set_flag = |bits: u32| or(flags, &integer(bits), flags);
    let handle = [
        dword_field(&buffer, 8, WANTED),
        and(wanted, &integer(GRANTED), &granted),
        when(&not_equal(&granted, wanted), &[set_flag(REFUSED)]),
        when(&not_equal(&revision, &integer(1)), &[set_flag(UNKNOWN_REVISION)]),
        store(&granted, wanted),
    ];
    method(
        "_OSC",
        4,
        &[
            dword_field(&buffer, 0, FLAGS),
            when(&equal(&interface, &uuid(PCI_HOST_BRIDGE)), &handle),
            otherwise(&[set_flag(UNKNOWN_INTERFACE)]),
            give_back(&buffer),
        ],
    )
}

/// Reserves the addresses that belong to no device but must not be given to one: the PCI
/// configuration space in memory, and the ports of power management.
fn motherboard() -> Term {
    #[allow(clippy::cast_possible_truncation, reason = "the ECAM is below 4 GiB")]
    let config = memory(layout::ECAM as u32, layout::ECAM_BYTES as u32);
    let ports = ports(layout::ACPI_PORTS, layout::ACPI_PORT_BYTES);
    device(
        "MBRD",
        &[name("_HID", &eisa_id(b"PNP0C02")), name("_CRS", &resources(&[config, ports]))],
    )
}

fn serial(number: u8, port: u16, pin: u32) -> Term {
    device(
        &format!("COM{}", number + 1),
        &[
            name("_HID", &eisa_id(b"PNP0501")),
            name("_UID", &integer(number.into())),
            name("_CRS", &resources(&[ports(port, 8), edge_interrupt(pin)])),
        ],
    )
}

fn processor(cpu: u32) -> Term {
    let id = string("ACPI0007");
    device(&format!("C{cpu:03X}"), &[name("_HID", &id), name("_UID", &integer(cpu))])
}
