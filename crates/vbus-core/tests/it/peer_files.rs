// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The files of a peer's memory: which are taken, how often each is mapped, what they may cost, and
//! what happens when the peer takes one away.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{
    FallocateFlags, MemfdFlags, OFlags, SealFlags, fallocate, fcntl_add_seals, fstat, ftruncate,
    memfd_create,
};
use vbus_core::memory::Resource;
use vbus_core::shm::Memory;
use vbus_core::shm::sync::Ordering;
use vbus_core::{
    Access, Bus, Connection, ConnectionState, Device, Endpoint, ErrorCode, Executor, Identity,
    MAPS_MAX, MapError, MemoryContext, Open, OpenRequest, Region, RegionRequest, Tuning, Window,
};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const HUGE: u64 = 2 * MIB;
const BOUND: Duration = Duration::from_secs(60);

fn named(name: &str, bytes: u64) -> OwnedFd {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fd
}

fn file(bytes: u64) -> OwnedFd {
    named("driver", bytes)
}

fn copy(fd: impl AsFd) -> OwnedFd {
    fd.as_fd().try_clone_to_owned().unwrap()
}

/// How many mappings of files with this name the process has.
fn mappings(name: &str) -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().matches(name).count()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < BOUND, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Keeps its regions.
struct Keeper;

#[derive(Default)]
struct Kept(Vec<Window>);

impl Device for Keeper {
    fn identity(&self) -> Identity {
        Identity::user("keeper")
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(Kept::default()))
    }
}

impl Connection for Kept {
    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
        self.0.push(region.window);
        Ok(())
    }

    /// Reads the last word of each region.
    fn call(&mut self, _: u32, _: u32, _: &mut [u8]) -> Result<u64, ErrorCode> {
        let last = |window: &Window| window.words().last().unwrap().load(Ordering::Relaxed);
        Ok(self.0.iter().map(last).sum())
    }
}

/// A device that is open, with a region of 64 KiB at the end of `bytes` bytes of memory.
fn open(bus: &Bus, name: &str, file: &OwnedFd, bytes: u64) -> Arc<Endpoint> {
    let endpoint = bus.add(name, Arc::new(Keeper)).unwrap();
    endpoint.map(0, bytes, Some((copy(file), 0)), Access::BOTH).unwrap();
    endpoint.memory().view().write(0, &77u64.to_le_bytes()).unwrap();
    endpoint.open(OpenRequest::new((0, 77))).unwrap();
    endpoint.region_add(RegionRequest::new(0, bytes - 65536, 65536)).unwrap();
    endpoint
}

fn call(endpoint: &Endpoint) -> Result<u64, ErrorCode> {
    endpoint.call(0, 0, 0, 0).and_then(vbus_core::Called::now)
}

#[test]
fn memory_that_is_taken_away_ends_its_connection_alone() {
    let bus = Bus::new(Executor::start(Tuning::default()).unwrap(), Vec::new());
    let (hostile, good) = (file(MIB), file(MIB));
    let victim = open(&bus, "good", &good, MIB);
    for round in 0..3 {
        let name = format!("hostile{round}");
        ftruncate(&hostile, MIB).unwrap();
        let endpoint = open(&bus, &name, &hostile, MIB);
        ftruncate(&hostile, PAGE).unwrap();
        assert_eq!(call(&endpoint), Ok(0), "what has gone reads as zeros");
        wait_until("the connection ends", || {
            endpoint.state() == ConnectionState::Broken(ErrorCode::REVOKED)
        });
        assert!(endpoint.memory().is_lost());
        // The next peer has other memory.
        endpoint.unmap_all();
        endpoint.close();
        assert!(!endpoint.memory().is_lost());
        let next = file(MIB);
        endpoint.map(0, MIB, Some((copy(&next), 0)), Access::BOTH).unwrap();
        endpoint.memory().view().write(0, &78u64.to_le_bytes()).unwrap();
        endpoint.open(OpenRequest::new((0, 78))).unwrap();
    }
    assert_eq!((victim.state(), call(&victim)), (ConnectionState::Open, Ok(0)));
}

#[test]
fn a_buffer_that_a_system_call_cannot_reach_is_found_by_touching_it() {
    let (context, file) = (MemoryContext::new(), file(MIB));
    context.map(0, MIB, Some((copy(&file), 0)), Access::BOTH).unwrap();
    ftruncate(&file, PAGE).unwrap();
    let (_reader, writer) = rustix::pipe::pipe().unwrap();
    let view = context.view();
    let slice = view.slice(2 * PAGE, 8, false).unwrap();
    let vector: Vec<_> = slice.io_vecs().collect();
    let fault = Err(rustix::io::Errno::FAULT);
    assert_eq!(vbus_core::io_vec::writev(&writer, &vector), fault);
    assert!(!context.is_lost());
    slice.touch();
    assert!(context.is_lost());
}

#[test]
fn files_of_the_file_system_are_taken_and_may_shrink() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("ram");
    let ram = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    ram.set_len(MIB).unwrap();
    let context = MemoryContext::new();
    context.map(0, MIB, Some((ram, 0)), Access::BOTH).unwrap();
    context.view().write(5000, b"hello").unwrap();
    assert_eq!(&std::fs::read(&path).unwrap()[5000..5005], b"hello");
    File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    context.view().read(5000, &mut [0; 5]).unwrap();
    assert!(context.is_lost());
}

#[test]
fn a_file_system_that_a_peer_may_have_made_is_refused() {
    let context = MemoryContext::new();
    let status = OwnedFd::from(File::open("/proc/self/status").unwrap());
    let refused = context.map(0, PAGE, Some((status, 0)), Access::READ).unwrap_err();
    assert!(matches!(refused, MapError::FileSystem(None)), "{refused}");
    assert!(refused.to_string().contains("tmpfs and memfd, hugetlbfs"), "{refused}");
}

#[test]
fn a_file_that_cannot_be_written_is_mapped_for_reading() {
    let writable = file(MIB);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&writable));
    let read_only = rustix::fs::open(path, OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
    let context = MemoryContext::new();
    let map =
        |start, file: &OwnedFd, access| context.map(start, PAGE, Some((copy(file), 0)), access);
    assert!(matches!(map(0, &read_only, Access::BOTH), Err(MapError::ReadOnly)));
    map(0, &read_only, Access::READ).unwrap();
    // The same file with a better descriptor.
    map(PAGE, &writable, Access::BOTH).unwrap();
    context.view().write(PAGE, b"x").unwrap();
    let mut byte = [0];
    context.view().read(0, &mut byte).unwrap();
    assert_eq!(&byte, b"x");
    let sealed = file(MIB);
    fcntl_add_seals(&sealed, SealFlags::WRITE).unwrap();
    assert!(matches!(map(2 * PAGE, &sealed, Access::WRITE), Err(MapError::ReadOnly)));
    map(2 * PAGE, &sealed, Access::READ).unwrap();
    // A slice for reading is never written, whatever the class does with it.
    let view = context.view();
    let slice = view.slice(2 * PAGE, 8, false).unwrap();
    assert_eq!((slice.copy_from(b"12345678"), slice.copy_from_driver(slice)), (0, 0));
}

#[test]
fn a_file_is_mapped_once_whatever_the_peer_maps_of_it() {
    let name = "mapped-once";
    let (context, file) = (MemoryContext::new(), named(name, 4 * GIB));
    // As QEMU does: a section below the hole for the VGA, one above, then the rest, and above 4
    // GiB.
    for (start, len, offset) in [
        (0, 0xa0000, 0),
        (0xc0000, 0x20000, 0xc0000),
        (MIB, 3 * GIB - MIB, MIB),
        (4 * GIB, GIB, 3 * GIB),
    ] {
        context.map(start, len, Some((copy(&file), offset)), Access::BOTH).unwrap();
    }
    // And as an IOMMU: single pages, in any order.
    for page in 0..5000 {
        let (start, offset) = ((1 << 40) + page * PAGE, page * 7919 % 1_000_000 * PAGE);
        context.map(start, PAGE, Some((copy(&file), offset)), Access::BOTH).unwrap();
    }
    assert_eq!(mappings(name), 1);
    let inspected = context.inspect();
    assert_eq!(inspected["maps"]["used"], 5004);
    assert_eq!(inspected["descriptors"]["used"], 1);
    assert_eq!(inspected["mappings"]["used"], 1);
    assert_eq!(inspected["address_space"]["used"], 4 * GIB);
    context.view().write((1 << 40) + PAGE, b"page").unwrap();
    let mut out = [0; 4];
    context.view().read(7919 * PAGE, &mut out).unwrap();
    assert_eq!(&out, b"page");
    drop(context);
    wait_until("it is unmapped", || mappings(name) == 0);
}

#[test]
fn single_pages_that_follow_each_other_are_one_piece() {
    let (context, file) = (MemoryContext::new(), file(MIB));
    for page in 0..MIB / PAGE {
        context.map(page * PAGE, PAGE, Some((copy(&file), page * PAGE)), Access::BOTH).unwrap();
    }
    let view = context.view();
    let slice = view.slice(100, MIB - 100, true).unwrap();
    assert_eq!(slice.pieces().map(|piece| piece.len() as u64).collect::<Vec<_>>(), [MIB - 100]);
    // A region on them needs no mapping of its own, also if it comes as a list of pages.
    let before = context.inspect();
    let window = context.window(0, MIB).unwrap();
    let pages: Vec<u64> = (0..MIB / PAGE).map(|page| page * PAGE).collect();
    let listed = context.window_of_pages(&pages, 12, MIB).unwrap();
    assert_eq!(context.inspect()["mappings"], before["mappings"]);
    window.words()[5].store(7, Ordering::Relaxed);
    assert_eq!(listed.words()[5].load(Ordering::Relaxed), 7);
    // Two pages changed about: three runs.
    let mut pages = pages;
    pages.swap(10, 11);
    let listed = context.window_of_pages(&pages, 12, MIB).unwrap();
    assert_eq!(context.inspect()["mappings"]["used"], 1 + 4);
    listed.words()[10 * 512].store(8, Ordering::Relaxed);
    assert_eq!(window.words()[11 * 512].load(Ordering::Relaxed), 8);
}

/// The longest list of pages, of which no two follow each other, and each has a map of its own, in
/// one of several files.
#[test]
fn the_pages_of_a_region_may_lie_in_maps_and_files_of_their_own() {
    const PAGES: u64 = 4096;
    const FILES: u64 = 16;
    let name = "scattered";
    let context = MemoryContext::new();
    let each = PAGES / FILES;
    let files: Vec<_> = (0..FILES).map(|_| named(name, 2 * each * PAGE)).collect();
    let address = |page: u64| (1 << 40) + 2 * page * PAGE;
    // In an order of its own: the files in turn, and the places in each as they come.
    for page in 0..PAGES {
        let offset = (page / FILES * 89 % each) * 2 * PAGE;
        let file = copy(&files[(page % FILES) as usize]);
        context.map(address(page), PAGE, Some((file, offset)), Access::BOTH).unwrap();
        context.view().write(address(page), &page.to_le_bytes()).unwrap();
    }
    let before = context.inspect();
    assert_eq!(before["descriptors"]["used"], FILES);
    let pages: Vec<u64> = (0..PAGES).rev().map(address).collect();
    let begun = Instant::now();
    let window = context.window_of_pages(&pages, 12, PAGES * PAGE).unwrap();
    eprintln!("{PAGES} pages, each in its own map: {:?}", begun.elapsed());
    let used = |what: &str| {
        let (now, before) = (context.inspect(), &before);
        now[what]["used"].as_u64().unwrap() - before[what]["used"].as_u64().unwrap()
    };
    assert_eq!((used("mappings"), used("address_space")), (PAGES, PAGES * PAGE));
    for (page, word) in (0..PAGES).rev().zip(window.words().iter().step_by(512)) {
        assert_eq!(word.load(Ordering::Relaxed), page);
    }
    // A region of pages that are gone keeps what it has, until it goes.
    context.window_of_pages(&pages[1..], 12, PAGES * PAGE).unwrap_err();
    assert_eq!(used("mappings"), PAGES, "what is refused takes nothing");
    drop(window);
    wait_until("all is given back", || used("mappings") == 0);
}

#[test]
fn a_page_that_lies_in_too_many_maps_is_no_part_of_a_region() {
    const SHIFT: u32 = 25;
    let name = "crumbled";
    let (context, file) = (MemoryContext::new(), named(name, 1 << SHIFT));
    let pages = (1 << SHIFT) / PAGE;
    // No two follow each other in the file.
    for page in 0..pages {
        let map = (copy(&file), (page ^ 1) * PAGE);
        context.map(page * PAGE, PAGE, Some(map), Access::BOTH).unwrap();
    }
    let refused = context.window_of_pages(&[0], SHIFT, 16 * MIB).unwrap_err();
    assert_eq!(refused, ErrorCode::LIMIT);
    assert_eq!(context.window(8, 16 * MIB + PAGE).unwrap_err(), ErrorCode::LIMIT);
    assert_eq!(mappings(name), 1);
    // From within a page on, the largest region has one piece more than it has pages.
    context.window(64, 16 * MIB).unwrap();
}

#[test]
fn a_peer_may_have_as_many_maps_as_the_protocol_allows() {
    let (context, file) = (MemoryContext::new(), file(GIB));
    let map = |page: u64| {
        let offset = page * 40_503 % (GIB / PAGE) * PAGE;
        context.map(page * PAGE, PAGE, Some((copy(&file), offset)), Access::BOTH)
    };
    for page in 0..MAPS_MAX as u64 {
        map(page).unwrap();
    }
    assert!(matches!(map(MAPS_MAX as u64), Err(MapError::Limit)));
    let last = (MAPS_MAX as u64 - 1) * PAGE;
    context.view().write(last, b"last").unwrap();
    let mut out = [0; 4];
    context.view().read(last, &mut out).unwrap();
    assert_eq!(&out, b"last");
}

#[test]
fn sparse_files_do_not_use_up_the_address_space() {
    const TIB: u64 = 1 << 40;
    let name = "sparse-and-huge";
    let (hostile, good) = (MemoryContext::new(), MemoryContext::new());
    let mut maps = 0;
    let refused = loop {
        let file = named(name, TIB);
        match hostile.map(maps * TIB, TIB, Some((file, 0)), Access::BOTH) {
            Ok(()) => maps += 1,
            Err(error) => break error,
        }
        assert!(maps < 128);
    };
    let MapError::Budget(exceeded) = refused else { panic!("{refused}") };
    assert_eq!(exceeded.resource, Resource::AddressSpace);
    assert!(mappings(name) as u64 <= maps, "nothing stays of what was refused");
    let plain = file(GIB);
    good.map(0, GIB, Some((plain, 0)), Access::BOTH).unwrap();
    good.view().write(0, b"x").unwrap();
}

#[test]
fn opening_touches_no_page_that_is_not_there() {
    let bus = Bus::new(Executor::start(Tuning::default()).unwrap(), Vec::new());
    let endpoint = bus.add("keeper", Arc::new(Keeper)).unwrap();
    let file = file(64 * MIB);
    endpoint.map(0, 64 * MIB, Some((copy(&file), 0)), Access::BOTH).unwrap();
    for page in 0..64 * MIB / PAGE {
        let refused = endpoint.open(OpenRequest::new((page * PAGE, 77)));
        assert_eq!(refused, Err(ErrorCode::NOT_SHARED));
    }
    assert_eq!(fstat(&file).unwrap().st_blocks, 0);
}

#[test]
fn a_failed_map_changes_nothing() {
    let name = "fails-to-map";
    let context = MemoryContext::new();
    let file = named(name, MIB);
    for (offset, len) in [(MIB - PAGE, 2 * PAGE), (u64::MAX - PAGE + 1, PAGE), (PAGE, MIB)] {
        let refused = context.map(0, len, Some((copy(&file), offset)), Access::BOTH);
        assert!(matches!(refused, Err(MapError::FileTooSmall)), "{offset:#x}");
    }
    assert_eq!((mappings(name), context.inspect()["descriptors"]["used"].as_u64()), (0, Some(0)));
}

/// A file of `pages` huge pages, if the system has that many.
fn huge_pages(pages: u64) -> Option<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = memfd_create("huge", flags | MemfdFlags::ALLOW_SEALING).ok()?;
    ftruncate(&file, pages * HUGE).ok()?;
    let taken = fallocate(&file, FallocateFlags::empty(), 0, pages * HUGE);
    if taken.is_err() {
        eprintln!("skipped: there are no {pages} free huge pages (vm.nr_hugepages)");
    }
    taken.is_ok().then_some(file)
}

#[test]
fn memory_on_huge_pages_is_mapped_in_any_sections() {
    let Some(file) = huge_pages(2) else { return };
    let context = MemoryContext::new();
    for (start, len, offset) in
        [(0, 0xa0000, 0), (0xc0000, 0x20000, 0xc0000), (MIB, 2 * HUGE - MIB, MIB)]
    {
        context.map(start, len, Some((copy(&file), offset)), Access::BOTH).unwrap();
    }
    context.view().write(0xc0000, b"section").unwrap();
    let mut out = [0; 7];
    context.view().read(0xc0000, &mut out).unwrap();
    assert_eq!(&out, b"section");
    // Pages of 4 KiB that follow each other, and whole huge pages in any order.
    let pages: Vec<u64> = (300..600).map(|page| page * PAGE).collect();
    let window = context.window_of_pages(&pages, 12, 300 * PAGE).unwrap();
    window.words()[0].store(5, Ordering::Relaxed);
    let mut word = [0; 8];
    context.view().read(300 * PAGE, &mut word).unwrap();
    assert_eq!(u64::from_le_bytes(word), 5);
    drop(window);
    let scattered = context.window_of_pages(&[300 * PAGE, 302 * PAGE], 12, 2 * PAGE);
    assert_eq!(scattered.unwrap_err(), ErrorCode::BAD_ADDRESS, "the kernel maps no part of one");
    context.map(GIB, 2 * HUGE, Some((copy(&file), 0)), Access::BOTH).unwrap();
    let window = context.window_of_pages(&[GIB + HUGE, GIB], 21, 2 * HUGE).unwrap();
    assert_eq!(window.words()[(HUGE + 300 * PAGE) as usize / 8].load(Ordering::Relaxed), 5);
    drop((window, context));
    wait_until("it is unmapped", || mappings("memfd:huge") == 0);
}

/// Refuses every region before it is mapped.
struct Picky;

impl Device for Picky {
    fn identity(&self) -> Identity {
        Identity::user("picky")
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(Picky))
    }
}

impl Connection for Picky {
    fn check_region(&mut self, id: u32, len: u64) -> Result<(), ErrorCode> {
        assert_eq!((id, len), (9, 2 * PAGE));
        Err(ErrorCode::EXISTS)
    }

    fn region_added(&mut self, _: Region) -> Result<(), ErrorCode> {
        panic!("the region is mapped");
    }
}

#[test]
fn a_region_that_the_class_does_not_want_is_not_mapped() {
    let bus = Bus::new(Executor::start(Tuning::default()).unwrap(), Vec::new());
    let endpoint = bus.add("picky", Arc::new(Picky)).unwrap();
    let file = file(MIB);
    endpoint.map(0, MIB, Some((copy(&file), 0)), Access::BOTH).unwrap();
    let memory = endpoint.memory().view();
    memory.write(0, &77u64.to_le_bytes()).unwrap();
    drop(memory);
    endpoint.open(OpenRequest::new((0, 77))).unwrap();
    // A list of pages that are nowhere: it is not even looked at.
    let request = RegionRequest::new(9, 1 << 40, 2 * PAGE).with_page_shift(12);
    assert_eq!(endpoint.region_add(request), Err(ErrorCode::EXISTS));
    assert_eq!(endpoint.state(), ConnectionState::Open);
}
