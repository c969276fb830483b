// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The crates: `virtio-drivers` on the driver's end; on the device's, `virtio-queue` or the split
//! queue of `vbus-virtio`. The driver's end is the transmit queue of the crate's network driver,
//! since its queues are private.

use std::cell::Cell;
use std::hint::black_box;
use std::ptr::NonNull;

use vbus_core::{Access, MemoryContext, View};
use vbus_virtio::queue;
use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use zerocopy::FromBytes;

use super::{Device, Driver, ENTRIES};
use crate::duel::time;
use crate::region::Region;

const MEMORY: usize = 64 * PAGE_SIZE;

thread_local! {
    // Where the next ring's memory is, and the next free page in it. Page 0 stays free: an address
    // of 0 means failure.
    static ARENA: Cell<(usize, usize)> = const { Cell::new((0, 1)) };
    // Where the transmit queue's three parts are.
    static QUEUE: Cell<[PhysAddr; 3]> = const { Cell::new([0; 3]) };
}

pub struct Pages;

// SAFETY: pages of the arena, each given out once.
unsafe impl Hal for Pages {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let (base, page) = ARENA.get();
        assert!((page + pages) * PAGE_SIZE <= MEMORY / 2, "the arena's first half is for queues");
        ARENA.set((base, page + pages));
        let offset = page * PAGE_SIZE;
        (offset as u64, NonNull::new((base + offset) as *mut u8).expect("not null"))
    }

    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("there is no register")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        // Buffers are numbers in the guise of addresses: the ring is measured, not the translation.
        buffer.as_ptr().cast::<u8>() as u64
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

/// The number of a network device's transmit queue.
const TRANSMIT: u16 = 1;

/// A transport that does nothing but remember where the transmit queue is. Its configuration space
/// is all zeros.
pub struct Nowhere;

impl Transport for Nowhere {
    fn device_type(&self) -> DeviceType {
        DeviceType::Network
    }
    fn read_device_features(&mut self) -> u64 {
        0
    }
    fn write_driver_features(&mut self, _: u64) {}
    fn max_queue_size(&mut self, _: u16) -> u32 {
        ENTRIES as u32
    }
    fn notify(&mut self, _: u16) {}
    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::empty()
    }
    fn set_status(&mut self, _: DeviceStatus) {}
    fn set_guest_page_size(&mut self, _: u32) {}
    fn requires_legacy_layout(&self) -> bool {
        false
    }
    fn queue_set(
        &mut self,
        queue: u16,
        _: u32,
        descriptors: PhysAddr,
        driver: PhysAddr,
        device: PhysAddr,
    ) {
        if queue == TRANSMIT {
            QUEUE.set([descriptors, driver, device]);
        }
    }
    fn queue_unset(&mut self, _: u16) {}
    fn queue_used(&mut self, _: u16) -> bool {
        false
    }
    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::empty()
    }
    fn read_config_generation(&self) -> u32 {
        0
    }
    fn read_config_space<T: FromBytes>(&self, _: usize) -> virtio_drivers::Result<T> {
        Ok(T::new_zeroed())
    }
    fn write_config_space<T>(&mut self, _: usize, _: T) -> virtio_drivers::Result<()> {
        Err(virtio_drivers::Error::Unsupported)
    }
}

pub struct Near {
    driver: VirtIONetRaw<Pages, Nowhere, ENTRIES>,
    buffers: &'static [[u8; 16]],
    of_token: Vec<usize>,
    number: usize,
}

/// The device's end by `virtio-queue`.
pub struct Far {
    queue: Queue,
    memory: &'static GuestMemoryMmap,
}

/// The device's end by `vbus-virtio`.
pub struct Engine {
    queue: queue::Queue,
    memory: MemoryContext,
    chain: queue::Chain,
}

/// The driver's end, and where its queue's three parts are in the memory at `base`.
///
/// # Safety
/// `base` is the beginning of [`MEMORY`] bytes that are mapped for ever, aligned to a page. Nobody
/// writes their second half.
unsafe fn near(base: *mut u8) -> (Near, [PhysAddr; 3]) {
    ARENA.set((base as usize, 1));
    let driver = VirtIONetRaw::new(Nowhere).expect("a driver");
    // SAFETY: the arena's second half, by this function's contract.
    let buffers = unsafe { std::slice::from_raw_parts(base.add(MEMORY / 2).cast(), ENTRIES) };
    (Near { driver, buffers, of_token: vec![0; ENTRIES], number: 0 }, QUEUE.get())
}

pub fn pair() -> (Near, Far) {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
    // Mapped for ever, as all the others' memory: the driver's end may outlive the device's.
    let memory = Box::leak(Box::new(memory));
    memory.write_slice(&vec![0; MEMORY], GuestAddress(0)).expect("touching every page");
    let base = memory.get_host_address(GuestAddress(0)).expect("it begins there");
    // SAFETY: the memory was leaked, and the queue's parts are in its first half.
    let (near, [descriptors, available, used]) = unsafe { near(base) };
    let mut queue = Queue::new(ENTRIES as u16).expect("a queue");
    queue.try_set_desc_table_address(GuestAddress(descriptors)).expect("aligned");
    queue.try_set_avail_ring_address(GuestAddress(available)).expect("aligned");
    queue.try_set_used_ring_address(GuestAddress(used)).expect("aligned");
    queue.set_ready(true);
    assert!(queue.is_valid(memory));
    (near, Far { queue, memory })
}

pub fn pair_with_engine() -> (Near, Engine) {
    let (region, file) = Region::with_file(MEMORY);
    // SAFETY: a region is mapped for ever, and the queue's parts are in its first half.
    let (near, [descriptors, driver_area, device_area]) = unsafe { near(region.pointer()) };
    let memory = MemoryContext::new();
    memory.map(0, MEMORY as u64, Some((&file, 0)), Access::BOTH).expect("mapped");
    let (format, size) = (queue::Format::Split, ENTRIES as u16);
    let layout = queue::Layout { format, size, descriptors, driver_area, device_area };
    let queue = queue::Queue::new(layout, queue::RingFeatures::default()).expect("a queue");
    (near, Engine { queue, memory, chain: queue::Chain::new() })
}

/// The same, whose device keeps its view of the driver's memory for all its polls. No device may do
/// so, because nothing could be unmapped meanwhile.
pub struct EngineWithView {
    queue: queue::Queue,
    view: View<'static>,
    chain: queue::Chain,
}

/// The same, whose device keeps the view and where the queue's three areas are.
pub struct EngineInTurn {
    turn: queue::Turn<'static>,
    chain: queue::Chain,
}

/// An engine whose memory is mapped for ever.
fn leaked() -> (Near, queue::Queue, View<'static>) {
    let (near, Engine { queue, memory, .. }) = pair_with_engine();
    (near, queue, Box::leak(Box::new(memory)).view())
}

pub fn pair_with_view() -> (Near, EngineWithView) {
    let (near, queue, view) = leaked();
    (near, EngineWithView { queue, view, chain: queue::Chain::new() })
}

pub fn pair_in_turn() -> (Near, EngineInTurn) {
    let (near, queue, view) = leaked();
    let (queue, view) = (Box::leak(Box::new(queue)), Box::leak(Box::new(view)));
    let turn = queue.turn(view).expect("the memory is there");
    (near, EngineInTurn { turn, chain: queue::Chain::new() })
}

/// What a poll of the device begins with, in nanoseconds: a view, and a view with a turn of a queue
/// that has nothing. One thread is on its own.
pub fn poll_costs() -> [(&'static str, f64); 2] {
    let (_near, Engine { mut queue, memory, .. }) = pair_with_engine();
    let view = time(1 << 16, || drop(black_box(memory.view())));
    let turn = time(1 << 16, || {
        let view = memory.view();
        black_box(queue.turn(&view).is_ok());
    });
    [("view", view), ("view_and_turn", turn)]
}

impl Driver for Near {
    #[inline]
    fn submit(&mut self, n: usize) -> u64 {
        let mut sum = 0;
        for _ in 0..n {
            let buffer = &self.buffers[self.number % ENTRIES];
            sum += buffer.as_ptr() as u64 & 0xffff_ffff;
            // SAFETY: nobody writes the buffers.
            let token = unsafe { self.driver.transmit_begin(buffer) }.expect("there is room");
            self.of_token[token as usize] = self.number % ENTRIES;
            self.number += 1;
        }
        sum
    }

    #[inline]
    fn reap(&mut self, max: usize) -> (usize, u64) {
        let mut sum = 0;
        for n in 0..max {
            let Some(token) = self.driver.poll_transmit() else { return (n, sum) };
            let buffer = &self.buffers[self.of_token[token as usize]];
            // SAFETY: the buffer that was added under this token.
            let length = unsafe { self.driver.transmit_complete(token, buffer) };
            sum += length.expect("it is there") as u64;
        }
        (max, sum)
    }
}

impl Device for Far {
    #[inline]
    fn serve(&mut self, max: usize) -> usize {
        let mut n = 0;
        while n < max {
            let Some(mut chain) = self.queue.pop_descriptor_chain(self.memory) else { break };
            let head = chain.head_index();
            let descriptor = chain.next().expect("a descriptor");
            self.queue
                .add_used(self.memory, head, descriptor.addr().raw_value() as u32)
                .expect("a used entry");
            n += 1;
        }
        if n != 0 {
            black_box(self.queue.needs_notification(self.memory).expect("readable"));
        }
        n
    }
}

impl Device for Engine {
    #[inline]
    fn serve(&mut self, max: usize) -> usize {
        let Engine { queue, memory, chain } = self;
        // As a device does it for each of its polls.
        let view = memory.view();
        poll(&mut queue.turn(&view).expect("the memory is there"), chain, max)
    }
}

impl Device for EngineWithView {
    #[inline]
    fn serve(&mut self, max: usize) -> usize {
        let Self { queue, view, chain } = self;
        poll(&mut queue.turn(view).expect("the memory is there"), chain, max)
    }
}

impl Device for EngineInTurn {
    #[inline]
    fn serve(&mut self, max: usize) -> usize {
        poll(&mut self.turn, &mut self.chain, max)
    }
}

/// Returns up to `max` chains.
#[inline(always)]
fn poll(turn: &mut queue::Turn<'_>, chain: &mut queue::Chain, max: usize) -> usize {
    let mut n = 0;
    while n < max && turn.next(chain).expect("the driver keeps the rules") {
        let addr = chain.readable()[0].addr;
        turn.complete(chain, addr as u32);
        n += 1;
    }
    if n != 0 {
        black_box(turn.flush().is_wanted());
    }
    n
}
