//! The DSDT: devices and methods, in AML.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    IO, If, Interrupt, Local, Memory32Fixed, Method, Name, NotEqual, ONE, Or, Package,
    PackageBuilder, Path, ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use crate::layout;

/// The name of PCI's host bridge interface for [`osc`].
const PCI_HOST_BRIDGE: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// What the guest's kernel may control by itself: native hotplug, power management events, error
/// reports, and the capability as such. Not the old hotplug controller of conventional PCI (bit 1):
/// there is none.
const GRANTED: u32 = 0b1_1101;

/// The table, for `cpus` virtual CPUs.
pub fn table(cpus: u32) -> Sdt {
    let mut aml = Vec::new();
    // S5, "soft off", is entered with type 0. There are no other sleep states.
    let types = Package::new(vec![&ZERO, &ZERO, &ZERO, &ZERO]);
    Name::new("_S5_".into(), &types).to_aml_bytes(&mut aml);
    host_bridge(&mut aml);
    motherboard(&mut aml);
    for (number, (port, pin)) in (0..).zip(layout::SERIAL) {
        serial(&mut aml, number, port, pin);
    }
    for cpu in 0..cpus {
        processor(&mut aml, cpu);
    }
    super::table(b"DSDT", 2, &aml)
}

/// A device below the root of the system bus.
fn device(aml: &mut Vec<u8>, name: &str, children: Vec<&dyn Aml>) {
    let device = Device::new(name.into(), children);
    Scope::new("\\_SB_".into(), vec![&device]).to_aml_bytes(aml);
}

/// PCI Express: buses, the window for BARs, interrupt pins, native hotplug.
fn host_bridge(aml: &mut Vec<u8>) {
    let window_end = layout::PCI_WINDOW + (layout::PCI_WINDOW_BYTES - 1);
    #[allow(clippy::cast_possible_truncation, reason = "below 4 GiB")]
    let (window, window_end) = (layout::PCI_WINDOW as u32, window_end as u32);
    let buses = AddressSpace::new_bus_number(0_u16, layout::BUS_MAX.into());
    let config = IO::new(layout::PCI_CONFIG_PORT, layout::PCI_CONFIG_PORT, 1, 8);
    let memory = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        window,
        window_end,
        None,
    );
    let resources = ResourceTemplate::new(vec![&buses, &config, &memory]);
    let ids = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"));
    let pins = interrupt_pins();
    let osc = Encoded(osc());
    device(
        aml,
        "PCI0",
        vec![
            &Name::new("_HID".into(), &ids.0),
            &Name::new("_CID".into(), &ids.1),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_CRS".into(), &resources),
            &Name::new("_PRT".into(), &pins),
            &osc,
        ],
    );
}

/// Which pin of the I/O APIC each INTx of each device of bus 0 is.
fn interrupt_pins() -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for device in 0..32_u8 {
        for pin in 0..4_u8 {
            let (address, pin_number) =
                ((u32::from(device) << 16) | 0xffff, layout::intx_pin(device, pin));
            table.add_element(&Package::new(vec![&address, &pin, &ZERO, &pin_number]));
        }
    }
    table
}

/// `_OSC`: the kernel asks for control of PCI Express features, and gets what is in [`GRANTED`].
///
/// Its last argument is a buffer of three words: flags of the call, what the kernel can, what it
/// wants; and it is the answer too.
fn osc() -> Vec<u8> {
    /// In the first word of the answer: no such interface, no such revision, something was refused.
    const UNKNOWN_INTERFACE: u32 = 1 << 2;
    const UNKNOWN_REVISION: u32 = 1 << 3;
    const REFUSED: u32 = 1 << 4;
    let (interface, revision, buffer) = (Arg(0), Arg(1), Arg(3));
    let (flags, wanted, granted) = (Path::new("CDW1"), Path::new("CDW3"), Local(0));
    let bridge = Uuid::new(PCI_HOST_BRIDGE);
    let refuse = |bits: u32| Encoded::new(&Or::new(&flags, &flags, &bits));
    let body = Encoded::new(&If::new(
        &Equal::new(&interface, &bridge),
        vec![
            &CreateDWordField::new(&wanted, &buffer, &8_u8),
            &And::new(&granted, &wanted, &GRANTED),
            &If::new(&NotEqual::new(&granted, &wanted), vec![&refuse(REFUSED)]),
            &If::new(&NotEqual::new(&revision, &ONE), vec![&refuse(UNKNOWN_REVISION)]),
            &Store::new(&wanted, &granted),
        ],
    ));
    let children: [&dyn Aml; 4] = [
        &CreateDWordField::new(&flags, &buffer, &ZERO),
        &body,
        &Encoded::new(&Else::new(vec![&refuse(UNKNOWN_INTERFACE)])),
        &Return::new(&buffer),
    ];
    Encoded::new(&Method::new("_OSC".into(), 4, false, children.to_vec())).0
}

/// What is no device but must not be given to one: configuration space in memory, the ports of
/// power management.
fn motherboard(aml: &mut Vec<u8>) {
    #[allow(clippy::cast_possible_truncation, reason = "below 4 GiB")]
    let config = Memory32Fixed::new(true, layout::ECAM as u32, layout::ECAM_BYTES as u32);
    let ports = IO::new(layout::ACPI_PORTS, layout::ACPI_PORTS, 1, layout::ACPI_PORT_BYTES);
    let resources = ResourceTemplate::new(vec![&config, &ports]);
    let id = EISAName::new("PNP0C02");
    device(
        aml,
        "MBRD",
        vec![&Name::new("_HID".into(), &id), &Name::new("_CRS".into(), &resources)],
    );
}

fn serial(aml: &mut Vec<u8>, number: u8, port: u16, pin: u32) {
    let (ports, pin) = (IO::new(port, port, 1, 8), Interrupt::new(true, true, false, false, pin));
    let resources = ResourceTemplate::new(vec![&ports, &pin]);
    let id = EISAName::new("PNP0501");
    let children: [&dyn Aml; 3] = [
        &Name::new("_HID".into(), &id),
        &Name::new("_UID".into(), &number),
        &Name::new("_CRS".into(), &resources),
    ];
    device(aml, &format!("COM{}", number + 1), children.to_vec());
}

fn processor(aml: &mut Vec<u8>, cpu: u32) {
    let id = "ACPI0007";
    let children: [&dyn Aml; 2] = [&Name::new("_HID".into(), &id), &Name::new("_UID".into(), &cpu)];
    device(aml, &format!("C{cpu:03X}"), children.to_vec());
}

/// AML that is encoded already.
struct Encoded(Vec<u8>);

impl Encoded {
    fn new(aml: &dyn Aml) -> Encoded {
        let mut bytes = Vec::new();
        aml.to_aml_bytes(&mut bytes);
        Encoded(bytes)
    }
}

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}
