// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver's environment in this guest: registers in memory, doorbells of every kind, and
//! messages as interrupts.
#![allow(unsafe_code, reason = "registers of devices")]

use core::sync::atomic::{Ordering, fence};

use flat::pci::{self, Address, Config, Found, Message, Messages};
use vbus_driver::{Doorbell, Error, FixedTable, Function, Hal, NoMemory};
use vbus_shm::abi::capability::{KIND_HYPERCALL, KIND_MMIO, KIND_PIO};

use crate::dma::Block;
use crate::{apic, clock, cpu, hyperv};

/// Configuration space by two I/O ports.
pub struct ConfigPorts;

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;

fn select(address: Address, offset: u16) {
    let Address { bus, device, function } = address;
    let place = u32::from(bus) << 16
        | u32::from(device) << 11
        | u32::from(function) << 8
        | u32::from(offset & 0xfc);
    cpu::out32(CONFIG_ADDRESS, 1 << 31 | place);
}

impl Config for ConfigPorts {
    fn read(&self, address: Address, offset: u16) -> u32 {
        select(address, offset);
        cpu::in32(CONFIG_DATA)
    }

    fn write(&self, address: Address, offset: u16, value: u32) {
        select(address, offset);
        cpu::out32(CONFIG_DATA, value);
    }
}

/// All kinds of doorbell.
pub const KINDS: [u8; 3] = [KIND_MMIO, KIND_PIO, KIND_HYPERCALL];

/// A kind's name.
pub fn kind_name(kind: u8) -> &'static str {
    match kind {
        KIND_MMIO => "mmio",
        KIND_PIO => "pio",
        KIND_HYPERCALL => "hypercall",
        _ => "other",
    }
}

/// A function, the kind of doorbell to use with it, and the target of its messages.
#[derive(Clone, Debug)]
pub struct FlatHal {
    found: Found,
    kind: u8,
    /// The message to a synthetic interrupt source; `None`: messages go to the local APIC.
    sint: Option<Message>,
}

impl FlatHal {
    /// Uses MMIO doorbells.
    pub fn new(found: Found) -> FlatHal {
        FlatHal { found, kind: KIND_MMIO, sint: None }
    }

    /// Uses doorbells of this kind.
    pub fn with_kind(&self, kind: u8) -> FlatHal {
        FlatHal { kind, ..self.clone() }
    }

    /// The function, probed.
    pub fn function(&self) -> Result<Function<FlatHal>, Error> {
        let mut function = Function::probe(self.clone())?;
        function.use_doorbell(self.kind)?;
        Ok(function)
    }

    /// Sends messages to synthetic interrupt source `number`, at this address.
    pub fn with_messages_at(&self, address: u64, number: u32) -> FlatHal {
        let sint = u32::try_from(address).ok().map(|address| Message { address, data: number });
        FlatHal { sint, ..self.clone() }
    }

    fn message(&self, vector: u8) -> Message {
        self.sint.unwrap_or_else(|| apic::message(0, vector))
    }

    /// Makes the function interrupt the first processor by messages on these vectors. Uses MSI-X if
    /// the function has it; otherwise MSI, with all messages on the first vector.
    pub fn enable_messages(&self, vectors: &[u8]) -> Option<Messages> {
        self.send_messages(vectors.iter().map(|vector| self.message(*vector)))
    }

    /// Makes the function interrupt by these messages. With MSI-X each vector has a message of its
    /// own; otherwise the first message serves all.
    pub fn send_messages(&self, messages: impl IntoIterator<Item = Message>) -> Option<Messages> {
        let address = self.found.address;
        let mut messages = messages.into_iter();
        let Some(found @ Messages::Msix { entries, table, capability }) =
            pci::find_msix(&ConfigPorts, address)
        else {
            return pci::enable_msi(&ConfigPorts, address, messages.next()?);
        };
        for (i, message) in (0..u64::from(entries)).zip(messages) {
            let at = table + 16 * i;
            for (offset, word) in [(0, message.address), (4, 0), (8, message.data), (12, 0)] {
                self.write32(at + offset, word);
            }
        }
        pci::enable_msix(&ConfigPorts, address, capability);
        Some(found)
    }

    fn place<T>(&self, offset: u64) -> *mut T {
        (self.found.bar + offset) as *mut T
    }
}

impl Hal for FlatHal {
    type Dma = Block;
    type Regions = FixedTable<Block, 64>;

    fn config_read32(&self, offset: u16) -> u32 {
        ConfigPorts.read(self.found.address, offset)
    }

    fn read32(&self, offset: u64) -> u32 {
        // SAFETY: a mapped register of the function. The driver stays within the BAR.
        let value = unsafe { self.place::<u32>(offset).read_volatile() };
        fence(Ordering::Acquire);
        value
    }

    fn read64(&self, offset: u64) -> u64 {
        // SAFETY: as in `read32`.
        let value = unsafe { self.place::<u64>(offset).read_volatile() };
        fence(Ordering::Acquire);
        value
    }

    fn write32(&self, offset: u64, value: u32) {
        fence(Ordering::SeqCst);
        // SAFETY: as in `read32`. The device writes only to memory that the allocator has given the
        // driver.
        unsafe { self.place::<u32>(offset).write_volatile(value) };
    }

    fn write64(&self, offset: u64, value: u64) {
        fence(Ordering::SeqCst);
        // SAFETY: as in `write32`.
        unsafe { self.place::<u64>(offset).write_volatile(value) };
    }

    fn alloc(&self, bytes: usize) -> Result<Block, NoMemory> {
        Block::new(bytes)
    }

    fn can_ring(&self, kind: u8) -> bool {
        match kind {
            KIND_MMIO | KIND_PIO => true,
            KIND_HYPERCALL => hyperv::hypercalls(),
            _ => false,
        }
    }

    fn ring(&self, doorbell: Doorbell, handle: u32) {
        let place = doorbell.offset(handle);
        match doorbell.kind {
            KIND_PIO => {
                fence(Ordering::SeqCst);
                cpu::out8(place as u16, 1);
            }
            KIND_HYPERCALL => {
                fence(Ordering::SeqCst);
                hyperv::signal_event(place);
            }
            _ => self.write32(place, 1),
        }
    }

    fn now(&self) -> u64 {
        clock::now()
    }
}
