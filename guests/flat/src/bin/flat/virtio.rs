// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Test `virtio`: frames between two virtio network cards of one switch. The driver is the crate
//! `virtio-drivers`, which knows nothing of a vbus.
#![allow(unsafe_code, reason = "the driver's environment")]

use core::cell::RefCell;
use core::ptr::NonNull;

use flat::pci::{Address, Config};
use vbus_driver::Dma;
use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::bus::{Command, ConfigurationAccess, DeviceFunction, PciRoot};
use virtio_drivers::transport::pci::{PciTransport, virtio_device_type};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

use crate::dma::Block;
use crate::hal::ConfigPorts;
use crate::net::frame;
use crate::report::{Failure, Outcome, ensure, line};
use crate::{Setting, clock};

/// Descriptors of a queue.
const SIZE: usize = 16;
/// Bytes of a buffer.
const BUFFER: usize = 2048;
const SIZES: [usize; 4] = [60, 128, 777, 1514];
/// The buses that firmware gives to the root ports of the test's machine.
const BUSES: u8 = 16;
/// How long a frame may take, in nanoseconds.
const LIMIT: u64 = 60_000_000_000;

/// The most blocks that the driver has at a time: two for each queue of two cards.
const BLOCKS: usize = 8;

/// The blocks that the driver has.
struct Held(RefCell<[Option<Block>; BLOCKS]>);

// SAFETY: only one processor uses it, and no interrupt handler does.
unsafe impl Sync for Held {}

static HELD: Held = Held(RefCell::new([const { None }; BLOCKS]));

/// The driver's environment. Virtual and physical addresses are equal.
struct Environment;

// SAFETY: a block is zeroed memory of whole pages that nothing else uses until it is given back,
// and the addresses are those of the guest's memory and of BARs.
unsafe impl Hal for Environment {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let none = (0, NonNull::dangling());
        let Ok(block) = Block::new(pages * PAGE_SIZE) else { return none };
        let address = block.address(0);
        let mut held = HELD.0.borrow_mut();
        let Some(place) = held.iter_mut().find(|place| place.is_none()) else { return none };
        *place = Some(block);
        NonNull::new(address as *mut u8).map_or(none, |at| (address, at))
    }

    unsafe fn dma_dealloc(address: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        let is_it = |place: &&mut Option<Block>| {
            place.as_ref().is_some_and(|block| block.address(0) == address)
        };
        let mut held = HELD.0.borrow_mut();
        let place = held.iter_mut().find(is_it);
        if place.and_then(Option::take).is_some() { 0 } else { -1 }
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _: usize) -> NonNull<u8> {
        NonNull::new(address as *mut u8).expect("firmware has placed the BAR")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr() as u64
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

/// Configuration space, for the driver.
struct Space;

fn address(DeviceFunction { bus, device, function }: DeviceFunction) -> Address {
    Address { bus, device, function }
}

impl ConfigurationAccess for Space {
    fn read_word(&self, function: DeviceFunction, offset: u8) -> u32 {
        ConfigPorts.read(address(function), offset.into())
    }

    fn write_word(&mut self, function: DeviceFunction, offset: u8, data: u32) {
        ConfigPorts.write(address(function), offset.into(), data);
    }

    unsafe fn unsafe_clone(&self) -> Space {
        Space
    }
}

type Card = VirtIONetRaw<Environment, PciTransport, SIZE>;

/// The next of all network cards.
fn open<'a>(
    root: &mut PciRoot<Space>,
    found: &mut impl Iterator<Item = DeviceFunction>,
) -> Result<Card, Failure<'a>> {
    let function = found.next().ok_or(Failure::Said("there are no two virtio network cards"))?;
    root.set_command(function, Command::MEMORY_SPACE | Command::BUS_MASTER);
    let transport = PciTransport::new::<Environment, _>(root, function)
        .map_err(|_| Failure::Said("the driver does not take the function"))?;
    Card::new(transport).map_err(|_| Failure::Said("the driver does not start"))
}

/// Sends a frame from one card to another, and checks it there.
fn pass<'a>(from: &mut Card, to: &mut Card, number: u64, len: usize) -> Outcome<'a> {
    let failed = |_| Failure::Said("the queue takes no buffer");
    let (mut sent, mut got) = ([0; BUFFER], [0; BUFFER]);
    let header = from.fill_buffer_header(&mut sent).map_err(failed)?;
    frame(&mut sent[header..][..len], to.mac_address(), from.mac_address(), number);
    let sent = &sent[..header + len];
    // SAFETY: nothing else touches the buffer until the device has given it back. If it does not,
    // the guest ends.
    let taken = unsafe { to.receive_begin(&mut got) }.map_err(failed)?;
    // SAFETY: as above.
    let posted = unsafe { from.transmit_begin(sent) }.map_err(failed)?;
    let asked = clock::now();
    while from.poll_transmit() != Some(posted) || to.poll_receive() != Some(taken) {
        assert!(clock::now() - asked < LIMIT, "a frame does not arrive");
        core::hint::spin_loop();
    }
    // SAFETY: these are the buffers of above.
    unsafe { from.transmit_complete(posted, sent) }.map_err(failed)?;
    // SAFETY: as above.
    let (skip, bytes) = unsafe { to.receive_complete(taken, &mut got) }.map_err(failed)?;
    let same = bytes == len && got[skip..][..bytes] == sent[header..];
    ensure(same, "a frame came with other bytes")
}

/// Runs the test.
pub fn run<'a>(setting: &Setting<'a>) -> Outcome<'a> {
    let count = setting.number("count", 2000);
    let mut root = PciRoot::new(Space);
    let walk = PciRoot::new(Space);
    let mut found = (0..BUSES)
        .flat_map(|bus| walk.enumerate_bus(bus))
        .filter(|(_, info)| virtio_device_type(info) == Some(DeviceType::Network))
        .map(|(function, _)| function);
    let mut cards = [open(&mut root, &mut found)?, open(&mut root, &mut found)?];
    for number in 0..count {
        let [a, b] = &mut cards;
        let len = SIZES[number as usize % SIZES.len()];
        match number % 2 {
            0 => pass(a, b, number, len)?,
            _ => pass(b, a, number, len)?,
        }
    }
    line("virtio").value("ok", true).value("frames", count).end();
    Ok(())
}
