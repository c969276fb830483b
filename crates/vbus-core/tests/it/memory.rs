// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver's memory: ranges that cross from one map into the next, the access that a map allows,
//! and views while maps come and go.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use vbus_core::io_vec::{IoVec, IoVecMut, readv, writev};
use vbus_core::shm::Memory;
use vbus_core::{
    Access, Bus, Called, Connection, Device, Endpoint, ErrorCode, Executor, Identity,
    MemoryContext, Open, OpenRequest, Region, RegionRequest, Tuning,
};

const PAGE: u64 = 4096;
const BOUND: Duration = Duration::from_secs(60);

fn file(pages: u64) -> OwnedFd {
    let fd = memfd_create("driver", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, pages * PAGE).unwrap();
    fd
}

/// Maps `pages` pages from address 0 on. Each is a map of its own, as with an IOMMU. In the file
/// they have the reverse order.
fn map_page_by_page(file: &OwnedFd, pages: u64, map: impl Fn(u64, u64, OwnedFd, u64)) {
    for page in 0..pages {
        let offset = (pages - 1 - page) * PAGE;
        map(page * PAGE, PAGE, file.try_clone().unwrap(), offset);
    }
}

fn scattered(pages: u64) -> MemoryContext {
    let (file, context) = (file(pages), MemoryContext::new());
    map_page_by_page(&file, pages, |start, len, fd, offset| {
        context.map(start, len, Some((fd, offset)), Access::BOTH).unwrap();
    });
    context
}

#[test]
fn integers_are_loaded_and_stored_by_one_access_each() {
    let context = scattered(2);
    let view = context.view();
    let slice = view.slice(PAGE - 16, 32, true).unwrap();
    assert!(slice.store(0, 0x1122_3344_5566_7788_u64, Ordering::Relaxed));
    assert!(slice.store(16, 0xaabb_ccdd_u32, Ordering::Release), "in the second page");
    assert_eq!(slice.load::<u16>(2, Ordering::Relaxed), Some(0x5566));
    assert_eq!(slice.load::<u32>(16, Ordering::Acquire), Some(0xaabb_ccdd));
    let mut bytes = [0; 20];
    view.read(PAGE - 16, &mut bytes).unwrap();
    assert_eq!(bytes[..8], 0x1122_3344_5566_7788_u64.to_le_bytes());
    assert_eq!(bytes[16..], 0xaabb_ccdd_u32.to_le_bytes());

    assert_eq!(slice.load::<u32>(30, Ordering::Relaxed), None, "beyond the end");
    assert_eq!(slice.load::<u64>(usize::MAX, Ordering::Relaxed), None, "beyond the end");
    assert_eq!(slice.load::<u32>(2, Ordering::Relaxed), None, "not aligned");
    let odd = view.slice(PAGE - 13, 16, true).unwrap();
    assert_eq!(odd.load::<u16>(0, Ordering::Relaxed), None, "not aligned");
    assert_eq!(odd.load::<u64>(12, Ordering::Relaxed), None, "in two pages, and not aligned");
    let read_only = view.slice(PAGE - 16, 32, false).unwrap();
    assert!(!read_only.store(0, 0_u16, Ordering::Relaxed));
    assert_eq!(read_only.load::<u16>(0, Ordering::Relaxed), Some(0x7788), "nothing was stored");
    (0..40).for_each(|at| slice.prefetch(at));
}

#[test]
fn a_buffer_may_span_maps_that_adjoin() {
    let context = scattered(4);
    let bytes: Vec<u8> = (0..3 * PAGE as u32 + 7).map(|i| (i % 251) as u8).collect();
    let view = context.view();
    view.write(100, &bytes).unwrap();
    let mut out = vec![0; bytes.len()];
    view.read(100, &mut out).unwrap();
    assert!(out == bytes);
    // Each page has the address of its own map.
    let mut byte = [0];
    view.read(2 * PAGE, &mut byte).unwrap();
    assert_eq!(byte[0], bytes[2 * PAGE as usize - 100]);

    let slice = view.slice(100, bytes.len() as u64, false).unwrap();
    assert_eq!(slice.pieces().map(|p| p.len()).collect::<Vec<_>>(), [3996, 4096, 4096, 107]);
    assert_eq!(slice.io_vecs().count(), 4);
    // At any place, a split gives two parts that together are the whole.
    for mid in [0, 1, 3995, 3996, 3997, 8092, bytes.len() - 1, bytes.len(), usize::MAX] {
        let (front, back) = slice.split_at(mid);
        let (mut first, mut second) = (vec![0; front.len()], vec![0; back.len()]);
        assert_eq!(front.copy_to(&mut first) + back.copy_to(&mut second), bytes.len());
        assert!([first, second].concat() == bytes, "{mid}");
    }
    // Copy from the pieces of one driver to those of another, which have other borders.
    let other = scattered(5);
    let there = other.view();
    let to = there.slice(4000, 9000, true).unwrap();
    assert_eq!(to.copy_from_driver(slice), 9000);
    let mut out = vec![0; 9000];
    to.copy_to(&mut out);
    assert!(out == bytes[..9000]);

    for (addr, len) in [(4 * PAGE - 1, 2), (4 * PAGE, 1), (0, 4 * PAGE + 1), (u64::MAX, 2)] {
        let outside = view.slice(addr, len, false).err();
        assert_eq!(outside, Some(ErrorCode::BAD_ADDRESS), "{addr:#x} {len}");
    }
}

#[test]
fn the_kernel_reads_and_writes_a_buffer_in_pieces() {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let context = scattered(2);
    let view = context.view();
    let bytes: Vec<u8> = (0..2000u32).map(|i| (i % 251) as u8).collect();
    view.write(3000, &bytes).unwrap();
    let from = view.slice(3000, 2000, false).unwrap();
    let vector: Vec<_> = [IoVec::new(b"head")].into_iter().chain(from.io_vecs()).collect();
    assert_eq!(writev(&writer, &vector), Ok(2004));

    let mut head = [0; 4];
    let to = view.slice(3500, 2000, true).unwrap();
    let mut vector = vec![IoVecMut::new(&mut head)];
    vector.extend(to.io_vecs_mut());
    assert_eq!((vector.len(), readv(&reader, &mut vector)), (3, Ok(2004)));
    assert_eq!(&head, b"head");
    let mut out = vec![0; 2000];
    to.copy_to(&mut out);
    assert!(out == bytes);

    // The device does not write memory that the driver gave for reading.
    let (file, context) = (file(1), MemoryContext::new());
    context.map(0, PAGE, Some((file, 0)), Access::READ).unwrap();
    let view = context.view();
    let to = view.slice(0, 8, false).unwrap();
    let mut vector: Vec<_> = to.io_vecs_mut().collect();
    assert_eq!(writev(&writer, &[IoVec::new(b"8 bytes.")]), Ok(8));
    assert_eq!(readv(&reader, &mut vector), Err(Errno::FAULT));
    assert_eq!(readv(&writer, &mut vector), Err(Errno::BADF), "the end for writing");
}

#[test]
fn a_window_may_span_maps_that_adjoin() {
    let context = scattered(4);
    let window = context.window(PAGE - 64, 2 * PAGE).unwrap();
    context.view().write(PAGE - 64, &7u64.to_le_bytes()).unwrap();
    context.view().write(3 * PAGE - 72, &8u64.to_le_bytes()).unwrap();
    let words = window.words();
    let word = |at: usize| words[at].load(Ordering::Relaxed);
    assert_eq!((words.len() as u64 * 8, word(0), word(words.len() - 1)), (2 * PAGE, 7, 8));
    assert_eq!(context.window(3 * PAGE, 2 * PAGE).unwrap_err(), ErrorCode::BAD_ADDRESS);
    // The same holds for the pages of a list.
    let window = context.window_of_pages(&[2 * PAGE, 0], 13, 4 * PAGE).unwrap();
    window.words()[512].store(9, Ordering::Relaxed);
    let mut word = [0; 8];
    context.view().read(3 * PAGE, &mut word).unwrap();
    assert_eq!(u64::from_le_bytes(word), 9);
}

#[test]
fn a_map_allows_what_the_peer_said() {
    let context = MemoryContext::new();
    let none = Access::new(false, false);
    for (start, access) in (0..).step_by(PAGE as usize).zip([Access::READ, Access::WRITE, none]) {
        context.map(start, PAGE, Some((file(1), 0)), access).unwrap();
    }
    let view = context.view();
    for (start, read, write) in [(0, true, false), (PAGE, false, true), (2 * PAGE, false, false)] {
        assert_eq!(view.read(start, &mut [0; 8]).is_ok(), read, "reading at {start:#x}");
        assert_eq!(view.write(start, &[0; 8]).is_ok(), write, "writing at {start:#x}");
        assert_eq!(context.window(start, 64).err(), Some(ErrorCode::BAD_ADDRESS));
    }
    // For a range across two maps, both maps must allow the access.
    assert_eq!(view.read(PAGE - 4, &mut [0; 8]), Err(ErrorCode::BAD_ADDRESS));
    assert_eq!(view.write(PAGE - 4, &[0; 8]), Err(ErrorCode::BAD_ADDRESS));
}

/// Reverses the buffer of each call, and counts calls.
#[derive(Default)]
struct Reverse(Arc<AtomicU32>);
struct Reversing(Arc<AtomicU32>);

impl Device for Reverse {
    fn identity(&self) -> Identity {
        Identity::user("reverse")
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(Reversing(self.0.clone())))
    }
}

impl Connection for Reversing {
    fn region_added(&mut self, _: Region) -> Result<(), ErrorCode> {
        Ok(())
    }

    fn call(&mut self, _: u32, _: u32, buffer: &mut [u8]) -> Result<u64, ErrorCode> {
        buffer.reverse();
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(0)
    }
}

fn endpoint() -> (Bus, Arc<Endpoint>) {
    let bus = Bus::new(Executor::start(Tuning::default()).unwrap(), Vec::new());
    let endpoint = bus.add("reverse", Arc::new(Reverse::default())).unwrap();
    (bus, endpoint)
}

#[test]
fn all_that_a_driver_hands_over_may_span_maps() {
    let (_bus, endpoint) = endpoint();
    let (file, mine) = (file(8), MemoryContext::new());
    map_page_by_page(&file, 8, |start, len, fd, offset| {
        let copy = fd.try_clone().unwrap();
        mine.map(start, len, Some((copy, offset)), Access::BOTH).unwrap();
        endpoint.map(start, len, Some((fd, offset)), Access::BOTH).unwrap();
    });
    mine.view().write(0, &77u64.to_le_bytes()).unwrap();
    endpoint.open(OpenRequest::new((0, 77))).unwrap();
    let request = RegionRequest::new(0, PAGE - 64, 256);
    endpoint.region_add(request).unwrap();
    // A list of large pages, each of which crosses a map's border.
    let list = [0, PAGE * 2].map(u64::to_le_bytes).concat();
    let request = RegionRequest::new(0, 5 * PAGE, 16384).with_page_shift(13);
    mine.view().write(5 * PAGE, &list).unwrap();
    endpoint.region_add(request).unwrap();
    mine.view().write(7 * PAGE - 2, b"abcd").unwrap();
    endpoint.call(0, 0, 7 * PAGE - 2, 4).and_then(Called::now).unwrap();
    let mut out = [0; 4];
    mine.view().read(7 * PAGE - 2, &mut out).unwrap();
    assert_eq!(&out, b"dcba");
    // A region ends when any of its maps ends.
    endpoint.unmap(3 * PAGE, PAGE);
    assert_eq!(
        endpoint.state(),
        vbus_core::ConnectionState::Broken(ErrorCode::REVOKED),
        "a page of the second region has gone"
    );
}

#[test]
fn a_call_whose_answer_would_find_no_place_does_nothing() {
    let bus = Bus::new(Executor::start(Tuning::default()).unwrap(), Vec::new());
    let device = Reverse::default();
    let calls = device.0.clone();
    let endpoint = bus.add("reverse", Arc::new(device)).unwrap();
    let memory = endpoint_memory(&endpoint);
    memory.view().write(0, &77u64.to_le_bytes()).unwrap();
    endpoint.map(PAGE, PAGE, Some((file(1), 0)), Access::READ).unwrap();
    endpoint.open(OpenRequest::new((0, 77))).unwrap();
    for (addr, len) in [(PAGE, 8), (PAGE - 4, 8), (2 * PAGE, 8)] {
        assert_eq!(
            endpoint.call(0, 0, addr, len).and_then(Called::now),
            Err(ErrorCode::BAD_ADDRESS)
        );
    }
    assert_eq!(calls.load(Ordering::Relaxed), 0, "the class was not called");
    endpoint.call(0, 0, PAGE - 8, 8).and_then(Called::now).unwrap();
    assert_eq!(calls.load(Ordering::Relaxed), 1);
}

#[test]
fn unmapping_waits_for_the_views_that_have_the_map_and_new_views_do_not_wait() {
    let (_bus, endpoint) = endpoint();
    let memory = endpoint_memory(&endpoint);
    let early = memory.view();
    // New maps make new tables. The earlier view keeps its own table.
    endpoint.map(8 * PAGE, PAGE, Some((file(1), 0)), Access::BOTH).unwrap();
    assert_eq!(early.read(8 * PAGE, &mut [0]), Err(ErrorCode::BAD_ADDRESS));
    let second = memory.view();
    let (sender, unmapped) = channel();
    let unmapping = {
        let endpoint = endpoint.clone();
        std::thread::spawn(move || {
            let bytes = endpoint.unmap(0, PAGE);
            sender.send(()).unwrap();
            bytes
        })
    };
    // New views do not see the map, and do not wait for the thread that unmaps it.
    while memory.view().read(0, &mut [0]).is_ok() {
        std::thread::yield_now();
    }
    let inner = memory.view();
    assert_eq!(format!("{memory:?}"), "MemoryContext { maps: 1, .. }");
    early.write(0, b"x").unwrap();
    drop(second);
    drop(inner);
    assert!(unmapped.try_recv().is_err(), "the early view still has the map");
    drop(early);
    unmapped.recv_timeout(BOUND).expect("the last view has gone");
    assert_eq!(unmapping.join().unwrap(), PAGE);
}

/// The memory of the endpoint's peer, as a device gets it. It has one page at address 0.
fn endpoint_memory(endpoint: &Arc<Endpoint>) -> Arc<MemoryContext> {
    endpoint.map(0, PAGE, Some((file(1), 0)), Access::BOTH).unwrap();
    endpoint.memory().clone()
}
