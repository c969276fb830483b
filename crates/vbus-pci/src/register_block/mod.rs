// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Makes a PCI function a device of vbus. BAR0 has registers and doorbells, and a vendor-specific
//! capability says where they are. See `spec/pci.md`.

mod registers;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_core::shm::abi::{self, bar0, capability, reg};
use vbus_core::{ConnectionState, DeviceState, Endpoint, Identity, state};
use vbus_pci_config::{
    Builder, CONVENTIONAL_BYTES, ConfigSpace, EXPRESS_BYTES, Header, MsixLayout,
};

use crate::Options;
use crate::function::{BarHandler, IoEventFd, PciFunction};
use crate::interrupts::Interrupts;
use crate::own_function::OwnFunction;
use registers::{Context, Registers, SavedRegisters};

const PAGE: u64 = 0x1000;

/// The offset of each capability, if the function has it.
mod at {
    /// Vendor-specific, 20 bytes. Three more records fit after it, which a VMM may add.
    pub const VENDOR: u8 = 0x40;
    /// MSI, 14 bytes.
    pub const MSI: u8 = 0x70;
    /// MSI-X, 12 bytes.
    pub const MSIX: u8 = 0x80;
    /// PCI Express, 60 bytes.
    pub const EXPRESS: u8 = 0x90;
}

/// Makes the PCI function of a device. The device's interrupts go to the function from now on. A
/// device that is no device of vbus for its driver makes its function itself ([`OwnFunction`]).
///
/// The function ends the device's connection when it is reset, disconnected or dropped. It does not
/// handle the peer's memory: the connector maps and unmaps that memory at the endpoint.
pub fn device_function(endpoint: Arc<Endpoint>, options: Options) -> PciFunction {
    let device = endpoint.device().clone();
    if let Some(own) = device.front().and_then(|front| front.downcast_ref::<OwnFunction>()) {
        return own.make(endpoint, options);
    }
    let config = config_space(endpoint.identity(), options);
    let interrupts = Arc::new(Interrupts::of(&config));
    endpoint.set_interrupt_sink(interrupts.clone());
    let (executor, worker) = (endpoint.executor().clone(), endpoint.worker());
    let block = RegisterBlock::new(endpoint.clone(), interrupts.clone());
    PciFunction::new(config, interrupts, executor, worker)
        .of_device(&endpoint)
        .with_bar(0, Box::new(block))
}

fn config_space(identity: &Identity, options: Options) -> ConfigSpace {
    let header = Header {
        vendor: abi::PCI_VENDOR,
        device: abi::PCI_DEVICE,
        revision: abi::PCI_REVISION,
        class: identity.pci_class,
        subsystem_vendor: abi::PCI_VENDOR,
        subsystem: identity.class,
        interrupt_pin: 1,
    };
    let bytes = if options.express { EXPRESS_BYTES } else { CONVENTIONAL_BYTES };
    let mut builder = Builder::new(bytes, &header)
        .bar(0, u32::try_from(bar0::SIZE).unwrap_or(0))
        .vendor(at::VENDOR, &vendor_capability())
        .msi(at::MSI, false);
    if options.msix {
        let layout = MsixLayout {
            vectors: identity.vectors.clamp(1, bar0::MSIX_MAX),
            table_bar: 0,
            table: u32::try_from(bar0::MSIX_TABLE).unwrap_or(0),
            pending_bar: 0,
            pending: u32::try_from(bar0::MSIX_PBA).unwrap_or(0),
        };
        builder = builder.msix(at::MSIX, layout);
    }
    if options.express {
        builder = builder.express(at::EXPRESS);
    }
    builder.build()
}

/// The content of the vendor-specific capability, after its id and link.
fn vendor_capability() -> Vec<u8> {
    let mut bytes = vec![0; usize::from(capability::HEADER_BYTES + capability::RECORD_BYTES)];
    let mut set = |at: u8, value: &[u8]| {
        let at = usize::from(at);
        bytes[at..at + value.len()].copy_from_slice(value);
    };
    set(capability::VERSION, &[capability::LAYOUT]);
    set(capability::SIGNATURE, &capability::SIGNATURE_VALUE.to_le_bytes());
    set(capability::REGISTERS, &bar0::REGISTERS.to_le_bytes()[..4]);
    let record = capability::HEADER_BYTES;
    set(record, &[capability::KIND_MMIO]);
    set(record + 2, &bar0::DOORBELL_STRIDE.to_le_bytes()[..2]);
    set(record + 4, &bar0::DOORBELLS.to_le_bytes()[..4]);
    bytes.split_off(2)
}

/// BAR0 of a function of vbus: the registers and doorbells of one device.
///
/// A command of the mailbox runs within the write that starts it.
pub struct RegisterBlock {
    endpoint: Arc<Endpoint>,
    interrupts: Arc<Interrupts>,
    registers: Registers,
    /// Bus Master was cleared while a connection was open, and the driver has not read the
    /// connection's state since then. A VMM that resets the function clears Bus Master first. A VMM
    /// that restores a machine does this.
    cut: bool,
}

impl RegisterBlock {
    /// Makes the handler of a device. `interrupts` are those of its function.
    pub fn new(endpoint: Arc<Endpoint>, interrupts: Arc<Interrupts>) -> RegisterBlock {
        RegisterBlock { endpoint, interrupts, registers: Registers::default(), cut: false }
    }

    fn close(&mut self) {
        self.endpoint.close();
        self.interrupts.clear();
    }

    /// Sets the registers to their values after power-on. If a driver had the device open, the
    /// device gets another incarnation. Returns whether a driver had it open.
    fn forget_driver(&mut self) -> bool {
        let was_open = self.is_open() || std::mem::take(&mut self.cut);
        if was_open {
            self.endpoint.close_and_reincarnate();
        }
        self.close();
        self.registers.reset();
        was_open
    }

    fn is_open(&self) -> bool {
        self.endpoint.state() == ConnectionState::Open
    }
}

impl BarHandler for RegisterBlock {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if !aligned(offset, data.len()) || offset >= bar0::DOORBELLS {
            return;
        }
        self.cut = false;
        let context = Context { endpoint: &self.endpoint, interrupts: &self.interrupts };
        for (at, word) in (offset..).step_by(4).zip(data.chunks_exact_mut(4)) {
            word.copy_from_slice(&self.registers.read(at, &context).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if (bar0::DOORBELLS..bar0::DOORBELLS + PAGE).contains(&offset) {
            if matches!(data.len(), 1..=8) {
                self.endpoint.ring((offset - bar0::DOORBELLS) / bar0::DOORBELL_STRIDE);
            }
            return;
        }
        if !aligned(offset, data.len()) || offset >= bar0::DOORBELLS {
            return;
        }
        self.cut = false;
        let context = Context { endpoint: &self.endpoint, interrupts: &self.interrupts };
        for (at, word) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            self.registers.write(at, value, &context);
        }
    }

    fn is_long_write(&self, offset: u64, data: &[u8]) -> bool {
        let words = aligned(offset, data.len()) && offset < bar0::DOORBELLS;
        words && (offset..offset + data.len() as u64).contains(&reg::COMMAND)
    }

    fn is_kept_write(&self, offset: u64, _: &[u8]) -> bool {
        offset < bar0::DOORBELLS
    }

    fn reset(&mut self) -> bool {
        self.forget_driver()
    }

    fn disconnected(&mut self) {
        self.forget_driver();
        self.endpoint.forget_doorbell_eventfds();
    }

    fn bus_master_cleared(&mut self) -> bool {
        self.cut = self.is_open();
        self.close();
        self.cut
    }

    fn io_eventfds(&mut self) -> rustix::io::Result<Vec<IoEventFd>> {
        let doorbell = |handle: u32| {
            let offset = bar0::DOORBELLS + u64::from(handle) * bar0::DOORBELL_STRIDE;
            Ok(IoEventFd { offset, fd: self.endpoint.doorbell_eventfd(handle)? })
        };
        (0..self.endpoint.identity().regions.min(bar0::DOORBELL_COUNT)).map(doorbell).collect()
    }

    fn save(&mut self) -> Result<Value, String> {
        let device = self.endpoint.save().map_err(|error| error.why)?;
        state::part(&Block { registers: self.registers.save()?, cut: self.cut, device })
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        let Block { registers, cut, device } = state::read_part(state)?;
        let registers = Registers::restored(&registers)?;
        self.endpoint.restore(&device).map_err(|error| error.why)?;
        self.registers = registers;
        self.cut = cut;
        Ok(())
    }
}

/// The register block as plain data (spec/state-format.md, "Register block").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Block {
    registers: SavedRegisters,
    cut: bool,
    device: DeviceState,
}

/// Whether an access has 4 or 8 aligned bytes. Registers accept no other access.
fn aligned(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset % len as u64 == 0
}

#[cfg(test)]
mod tests {
    use vbus_pci_config::capabilities;

    use super::*;

    fn space(options: Options) -> ConfigSpace {
        let identity = Identity::new(7, "test", 0x02_00_00).with_vectors(5);
        config_space(&identity, options)
    }

    #[test]
    fn the_header_says_that_it_is_vbus() {
        let space = space(Options::default());
        assert_eq!(space.bytes()[..12], [0xf4, 0x1a, 0xf5, 0x10, 0, 0, 0x10, 0, 0, 0, 0, 2]);
        assert_eq!(space.bytes()[0x2c..0x30], [0xf4, 0x1a, 7, 0]);
        assert_eq!((space.interrupt_pin(), space.size(), space.bar_size(0)), (1, 256, 0x4000));
    }

    #[test]
    fn each_option_has_its_capability_at_its_place() {
        let list = |msix, express| -> Vec<_> {
            let space = space(Options { msix, express });
            let list: Result<_, _> = capabilities(space.bytes()).collect();
            list.unwrap_or_default()
        };
        assert_eq!(list(false, false), [(9, 0x40), (5, 0x70)]);
        assert_eq!(list(true, false), [(9, 0x40), (5, 0x70), (0x11, 0x80)]);
        assert_eq!(list(false, true), [(9, 0x40), (5, 0x70), (0x10, 0x90)]);
        assert_eq!(list(true, true), [(9, 0x40), (5, 0x70), (0x11, 0x80), (0x10, 0x90)]);
        assert_eq!(space(Options { msix: false, express: true }).size(), 4096);
        assert_eq!(space(Options { msix: true, express: false }).bytes()[0x82], 4);
    }

    #[test]
    fn the_vendor_capability_is_that_of_the_specification() {
        let space = space(Options::default());
        let expected =
            [9, 0x70, 20, 1, b'v', b'b', b'u', b's', 0, 0, 0, 0, 1, 0, 4, 0, 0, 0x10, 0, 0];
        assert_eq!(space.bytes()[0x40..0x54], expected);
    }
}
