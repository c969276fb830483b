// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The log of written pages: it has each page that the device writes, whichever way it writes, and
//! no other one.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vbus_core::io_vec::{IoVecMut, readv};
use vbus_core::memory::LogError;
use vbus_core::shm::memory::stored;
use vbus_core::shm::ring::{DeviceEnd, DriverEnd, Entry, Layout, Return, Returns};
use vbus_core::shm::signal::end;
use vbus_core::shm::{Memory, pic, state};
use vbus_core::{Access, MemoryContext, Window};

const PAGE: u64 = 4096;
const PAGES: u64 = 64;
/// No pages.
const NONE: [u64; 0] = [];

/// The driver's memory: 64 pages from address 0 on, and the same number, page by page in reverse
/// order, from 1 MiB on. So no two pages there adjoin in the file.
struct Driver {
    file: OwnedFd,
    context: MemoryContext,
}

const REVERSED: u64 = 1 << 20;

impl Driver {
    fn new() -> Driver {
        let file = memfd_create("driver", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 2 * PAGES * PAGE).unwrap();
        let context = MemoryContext::new();
        let fd = || Some(file.try_clone().unwrap());
        context.map(0, PAGES * PAGE, fd().map(|fd| (fd, 0)), Access::BOTH).unwrap();
        for page in 0..PAGES {
            let offset = (2 * PAGES - 1 - page) * PAGE;
            let file = fd().map(|fd| (fd, offset));
            context.map(REVERSED + page * PAGE, PAGE, file, Access::BOTH).unwrap();
        }
        Driver { file, context }
    }

    /// What the file has.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(2 * PAGES * PAGE).unwrap()];
        assert_eq!(rustix::io::pread(&self.file, &mut bytes, 0).unwrap(), bytes.len());
        bytes
    }

    /// The addresses of the pages in the file that differ.
    fn changed(before: &[u8], after: &[u8]) -> Vec<u64> {
        let pages = before.chunks(PAGE as usize).zip(after.chunks(PAGE as usize));
        let changed = (0..).zip(pages).filter(|(_, (a, b))| a != b).map(|(page, _)| page);
        let address = |page: u64| match page {
            page if page < PAGES => page * PAGE,
            page => REVERSED + (2 * PAGES - 1 - page) * PAGE,
        };
        let mut addresses: Vec<u64> = changed.map(address).collect();
        addresses.sort_unstable();
        addresses
    }

    /// The addresses of the pages in the log, which is cleared.
    fn report(&self) -> Vec<u64> {
        let mut found = Vec::new();
        for start in [0, REVERSED] {
            let mut bitmap = [0; 1];
            self.context.report_log(start, PAGES * PAGE, PAGE, &mut bitmap).unwrap();
            let set = (0..64).filter(|bit| bitmap[0] & 1 << bit != 0);
            found.extend(set.map(|bit| start + bit * PAGE));
        }
        found
    }

    /// A window, formatted by the driver as a ring of `entries` entries.
    fn ring(&self, window: &Window, entries: u32, returns: Returns) -> DriverEnd<Window> {
        let layout = Layout::new(entries, returns).unwrap();
        DriverEnd::create(window.clone(), layout, 0).unwrap()
    }
}

/// A way of writing. `write` is called twice: each time it writes other bytes.
struct Way<'a> {
    name: &'static str,
    write: Box<dyn FnMut(u8) + 'a>,
}

/// The page that holds byte `at` of a window at `start`.
fn window(driver: &Driver, start: u64, len: u64) -> Window {
    driver.context.window(start, len).unwrap()
}

fn ways(driver: &Driver) -> Vec<Way<'_>> {
    let context = &driver.context;
    let mut ways: Vec<Way<'_>> = Vec::new();
    let mut way = |name, write: Box<dyn FnMut(u8)>| ways.push(Way { name, write });
    way("a view's write", Box::new(|n| context.view().write(PAGE + 7, &[n; 9]).unwrap()));
    way(
        "a write over the end of a page",
        Box::new(|n| context.view().write(3 * PAGE - 1, &[n; 2]).unwrap()),
    );
    way(
        "a write over the ends of maps",
        Box::new(|n| context.view().write(REVERSED + PAGE - 5, &vec![n; 2 * 4096]).unwrap()),
    );
    way(
        "the back of a slice",
        Box::new(|n| {
            let view = context.view();
            let (_, back) = view.slice(REVERSED + 100, 3 * PAGE, true).unwrap().split_at(5000);
            assert_eq!(back.copy_from(&[n + 100; 50]), 50);
        }),
    );
    way(
        "a copy from another driver",
        Box::new(|n| {
            let view = context.view();
            let other = Driver::new();
            other.context.view().write(50, &[n; 100]).unwrap();
            let from = other.context.view();
            let to = view.slice(REVERSED + 5 * PAGE - 10, 100, true).unwrap();
            assert_eq!(to.copy_from_driver(from.slice(50, 100, false).unwrap()), 100);
        }),
    );
    way(
        "atomic stores",
        Box::new(|n| {
            let view = context.view();
            let slice = view.slice(REVERSED + 6 * PAGE, 2 * PAGE, true).unwrap();
            assert!(slice.store(16, u16::from(n), Ordering::Release));
            assert!(slice.store(4096, u32::from(n), Ordering::Relaxed));
            assert!(slice.store(4096 + 64, u64::from(n), Ordering::Relaxed));
        }),
    );
    way(
        "a system call",
        Box::new(|n| {
            let view = context.view();
            let slice = view.slice(REVERSED + 9 * PAGE - 30, 3 * PAGE, true).unwrap();
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            rustix::io::write(&writer, &[n; 100]).unwrap();
            let mut vectors: Vec<IoVecMut<'_>> = slice.io_vecs_mut().collect();
            let len = readv(&reader, &mut vectors).unwrap();
            slice.wrote(len);
        }),
    );
    let plain = window(driver, 10 * PAGE, 2 * PAGE);
    way(
        "a store in the words of a window",
        Box::new(move |n| {
            plain.words()[600].store(n.into(), Ordering::Relaxed);
            stored(&plain, 600, 1);
        }),
    );
    let page = state::Layout::new(3000, 4).unwrap();
    let shared = window(driver, 16 * PAGE, 4 * PAGE);
    page.format(&shared, 0).unwrap();
    let mut writer = state::Writer::attach(shared, end::Device).unwrap();
    way("a state page", Box::new(move |n| drop(writer.write(&[n; 3000]))));
    // Over two pages of the driver that are far from each other here.
    let shared = window(driver, REVERSED + 16 * PAGE, 4 * PAGE);
    page.format(&shared, 0).unwrap();
    let mut writer = state::Writer::attach(shared, end::Device).unwrap();
    way("a state page over maps", Box::new(move |n| drop(writer.write(&[n; 3000]))));
    let list = [24, 22, 29, 20].map(|page| page * PAGE);
    let shared = context.window_of_pages(&list, 12, 4 * PAGE).unwrap();
    page.format(&shared, 0).unwrap();
    let mut writer = state::Writer::attach(shared, end::Device).unwrap();
    way("a state page in listed pages", Box::new(move |n| drop(writer.write(&[n; 3000]))));
    let shared = window(driver, 31 * PAGE - 128, 256);
    drop(pic::DriverEnd::create(shared.clone(), 200, pic::Nesting::Flat).unwrap());
    let device = pic::DeviceEnd::attach(shared).unwrap();
    way("an interrupt page", Box::new(move |n| drop(device.raise(n.into()))));
    for (at, returns) in [(32, Returns::Counted), (40, Returns::Entries), (48, Returns::Runs)] {
        // 1024 entries have four pages, and their lengths one more. Four calls take 800.
        let shared = window(driver, at * PAGE, 6 * PAGE);
        let mut end = driver.ring(&shared, 1024, returns);
        let mut device = DeviceEnd::attach(shared).unwrap();
        let entry = |n: u32| Entry { addr: u64::from(n), len: n, id: n as u16, flags: 0 };
        (0..800).for_each(|n| end.submit(entry(n)).unwrap());
        drop(end.post());
        way(
            "a ring",
            Box::new(move |n| {
                for _ in 0..100 {
                    let entry = device.take().unwrap().unwrap();
                    device.give_back(Return { len: u32::from(n) + 7, ..entry.into() });
                }
                drop(device.post());
                let _ = device.arm(u32::from(n));
                let served = device.serve_all(100, |e| Some(Return { len: 99, ..e.into() }));
                assert_eq!(served.unwrap(), 100);
                drop(device.post());
            }),
        );
    }
    ways
}

#[test]
fn each_way_of_writing_is_in_the_log_and_nothing_else() {
    let driver = Driver::new();
    let mut ways = ways(&driver);
    driver.context.start_log(&[]).unwrap();
    assert_eq!(driver.report(), NONE, "nothing is written yet");
    let mut all = 0;
    for n in [1, 2] {
        for way in &mut ways {
            let before = driver.bytes();
            (way.write)(n);
            let changed = Driver::changed(&before, &driver.bytes());
            assert!(!changed.is_empty(), "{} writes nothing", way.name);
            assert_eq!(driver.report(), changed, "{}, time {n}", way.name);
            assert_eq!(driver.report(), NONE, "{}: each page once", way.name);
            all += changed.len();
        }
    }
    assert!(all > 50, "{all} pages");
    // What only reads is not in the log.
    let view = driver.context.view();
    view.read(0, &mut [0; 9000]).unwrap();
    let slice = view.slice(0, 100, false).unwrap();
    assert_eq!((slice.copy_from(&[1; 9]), slice.store(0, 1_u16, Ordering::Relaxed)), (0, false));
    assert_eq!(slice.load::<u16>(0, Ordering::Relaxed), Some(0));
    slice.touch();
    drop(view);
    assert_eq!(driver.report(), NONE);
    // Without a log nothing is logged, and a new log is empty.
    assert!(driver.context.stop_log() && !driver.context.stop_log());
    ways.iter_mut().for_each(|way| (way.write)(3));
    let mut bitmap = [0];
    let off = driver.context.report_log(0, PAGE, PAGE, &mut bitmap);
    assert_eq!(off, Err(LogError::Off));
    driver.context.start_log(&[]).unwrap();
    assert_eq!(driver.report(), NONE);
    ways.iter_mut().for_each(|way| (way.write)(4));
    assert!(driver.report().len() > 20);
}

/// A peer that reads the marks by itself finds the same ones, and takes them as it likes.
#[test]
fn each_way_of_writing_is_in_the_bitmap_of_a_peer() {
    let driver = Driver::new();
    let mut ways = ways(&driver);
    let (offset, bytes) = (8, (REVERSED / PAGE + PAGES) / 8);
    let file = memfd_create("bitmap", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, offset + bytes).unwrap();
    let bitmap = Arc::new(driver.context.bitmap(file.as_fd(), offset, bytes).unwrap());
    assert_eq!(bitmap.covers(), REVERSED + PAGES * PAGE);
    let take = || -> Vec<u64> {
        let mut marks = vec![0; usize::try_from(bytes).unwrap()];
        assert_eq!(rustix::io::pread(&file, &mut marks, offset).unwrap(), marks.len());
        assert_eq!(rustix::io::pwrite(&file, &vec![0; marks.len()], offset).unwrap(), marks.len());
        let set = |page: &usize| marks[page / 8] & 1 << (page % 8) != 0;
        (0..marks.len() * 8).filter(set).map(|page| page as u64 * PAGE).collect()
    };
    driver.context.start_log_in(&bitmap).unwrap();
    for n in [1, 2] {
        for way in &mut ways {
            let before = driver.bytes();
            (way.write)(n);
            let changed = Driver::changed(&before, &driver.bytes());
            assert!(!changed.is_empty(), "{} writes nothing", way.name);
            assert_eq!(take(), changed, "{}, time {n}", way.name);
        }
    }
    let report = driver.context.report_log(0, PAGE, PAGE, &mut [0]);
    assert_eq!(report, Err(LogError::Off), "the peer has the marks");
    assert!(driver.context.stop_log());
    ways.iter_mut().for_each(|way| (way.write)(3));
    assert_eq!(take(), NONE);
}

#[test]
fn ranges_and_page_sizes_are_those_that_were_asked_for() {
    let driver = Driver::new();
    let context = &driver.context;
    let write = |page: u64| context.view().write(page * PAGE + 9, &[7]).unwrap();
    // A page at the end of a range belongs to it as a whole. Ranges may adjoin.
    let ranges = [5 * PAGE..6 * PAGE + 1, 7 * PAGE..8 * PAGE, PAGE..2 * PAGE, 40 * PAGE..u64::MAX];
    context.start_log(&ranges).unwrap();
    (0..PAGES).for_each(write);
    let expected: Vec<u64> = [1, 5, 6, 7].into_iter().chain(40..64).map(|n| n * PAGE).collect();
    assert_eq!(driver.report(), expected);
    // Over several ranges at once.
    context.view().write(0, &vec![1; 9 * 4096]).unwrap();
    assert_eq!(driver.report(), [1, 5, 6, 7].map(|n| n * PAGE));
    assert_eq!(context.start_log(&[]), Err(LogError::On));
    context.stop_log();

    context.start_log(&[]).unwrap();
    let report = |start: u64, len: u64, page_size: u64, words: usize| {
        let mut bitmap = vec![0; words];
        context.report_log(start, len, page_size, &mut bitmap).map(|()| bitmap)
    };
    [0, 3, 9].into_iter().for_each(write);
    assert_eq!(report(0, 16 * PAGE, 4 * PAGE, 1), Ok(vec![0b101]));
    [0, 3, 9].into_iter().for_each(write);
    assert_eq!(report(0, 4 * PAGE, PAGE / 2, 1), Ok(vec![0b1100_0011]));
    assert_eq!(report(8 * PAGE, PAGE, PAGE, 1), Ok(vec![0]), "only what was asked for");
    assert_eq!(report(9 * PAGE, PAGE, 32, 2), Ok(vec![!0, !0]));
    assert_eq!(report(0, PAGES * PAGE, PAGE, 1), Ok(vec![0]));
    let range = |start, len| LogError::Range(len, start);
    assert_eq!(report(1, PAGE, PAGE, 1), Err(range(1, PAGE)));
    assert_eq!(report(0, PAGE + 1, PAGE, 1), Err(range(0, PAGE + 1)));
    assert_eq!(report(1 << 63, 1 << 63, PAGE, 1), Err(range(1 << 63, 1 << 63)));
    let bitmap = |page_size, words| LogError::Bitmap { page_size, words };
    assert_eq!(report(0, PAGE, 0, 1), Err(bitmap(0, 1)));
    assert_eq!(report(0, PAGE, 3, 1), Err(bitmap(3, 1)));
    assert_eq!(report(0, 65 * PAGE, PAGE, 1), Err(bitmap(PAGE, 1)));
    assert_eq!(report(0, 1 << 50, 1 << 50, 1), Ok(vec![0]), "the work is that of what was written");
}

#[test]
fn a_view_that_does_not_log_has_ended_when_the_log_begins() {
    let driver = Driver::new();
    let (began, has_begun) = channel();
    let view = driver.context.view();
    assert!(!view.is_logged());
    std::thread::scope(|scope| {
        let starter = scope.spawn(|| {
            driver.context.start_log(&[]).unwrap();
            began.send(()).unwrap();
        });
        while !driver.context.view().is_logged() {
            std::thread::yield_now();
        }
        // A new view logs, and the old one does not.
        driver.context.view().write(PAGE, &[1]).unwrap();
        view.write(0, &[1]).unwrap();
        assert!(has_begun.try_recv().is_err(), "it waits for the view");
        drop(view);
        starter.join().unwrap();
    });
    assert_eq!(driver.report(), [PAGE]);
}

#[test]
fn the_log_keeps_what_was_written_where_nothing_is_mapped_any_more() {
    let driver = Driver::new();
    let file = || Some((driver.file.try_clone().unwrap(), 0));
    driver.context.start_log(&[]).unwrap();
    // A map that comes while the log is on.
    driver.context.map(1 << 40, PAGE, file(), Access::BOTH).unwrap();
    driver.context.view().write(1 << 40, &[1]).unwrap();
    let endpoint = bus_endpoint();
    endpoint.memory().start_log(&[]).unwrap();
    endpoint.map(1 << 30, PAGE, file(), Access::BOTH).unwrap();
    endpoint.memory().view().write(1 << 30, &[2]).unwrap();
    assert_eq!(endpoint.unmap(1 << 30, PAGE), PAGE);
    let mut bitmap = [0];
    endpoint.memory().report_log(1 << 30, PAGE, PAGE, &mut bitmap).unwrap();
    driver.context.report_log(1 << 40, PAGE, PAGE, &mut bitmap).unwrap();
    assert_eq!(bitmap, [1]);
    // The end of the peer is the end of the log.
    endpoint.unmap_all();
    let off = endpoint.memory().report_log(0, PAGE, PAGE, &mut bitmap);
    assert_eq!(off, Err(LogError::Off));
}

/// The endpoint of a device that nobody uses.
fn bus_endpoint() -> Arc<vbus_core::Endpoint> {
    use vbus_core::{Bus, Connection, Device, ErrorCode, Executor, Identity, Open, Tuning};
    struct Unused;
    impl Device for Unused {
        fn identity(&self) -> Identity {
            Identity::user("unused")
        }
        fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
            Err(ErrorCode::LIMIT)
        }
    }
    let bus = Bus::new(Executor::start(Tuning::default()).unwrap(), Vec::new());
    bus.add("unused", Arc::new(Unused)).unwrap()
}

/// Several threads write by views and by windows, while the peer copies by the log, from its
/// beginning to its end.
#[test]
fn what_was_copied_by_the_log_is_what_was_written() {
    const WRITERS: u64 = 3;
    let driver = Driver::new();
    let stop = AtomicBool::new(false);
    let (running, run) = channel();
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (driver, stop, running) = (&driver, &stop, running.clone());
            scope.spawn(move || {
                let window = window(driver, REVERSED, PAGES * PAGE);
                let mut n = writer;
                while !stop.load(Ordering::Relaxed) {
                    n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(2 * writer + 1);
                    // Each has words of its own.
                    let word = (n >> 40) % (PAGES * 512 / WRITERS) * WRITERS + writer;
                    if n >> 63 == 0 {
                        driver.context.view().write(word * 8, &n.to_le_bytes()).unwrap();
                    } else {
                        let at = usize::try_from(word).unwrap();
                        window.words()[at].store(n, Ordering::Relaxed);
                        stored(&window, at, 1);
                    }
                    if n % 1024 == 1 {
                        std::thread::yield_now();
                        let _ = running.send(());
                    }
                }
            });
        }
        (0..WRITERS).for_each(|_| run.recv().unwrap());
        driver.context.start_log(&[]).unwrap();
        let mut copy = driver.bytes();
        let copy_page = |copy: &mut [u8], at: u64| {
            let offset = match at.checked_sub(REVERSED) {
                Some(at) => (2 * PAGES - 1) * PAGE - at,
                None => at,
            };
            let page = &mut copy[usize::try_from(offset).unwrap()..][..PAGE as usize];
            let read = rustix::io::pread(&driver.file, page, offset).unwrap();
            assert_eq!(read, PAGE as usize);
        };
        for _ in 0..200 {
            driver.report().into_iter().for_each(|at| copy_page(&mut copy, at));
            let _ = run.recv();
        }
        stop.store(true, Ordering::Relaxed);
        // The sender ends with the last thread.
        drop(running);
        while run.recv().is_ok() {}
        driver.report().into_iter().for_each(|at| copy_page(&mut copy, at));
        assert!(copy == driver.bytes(), "a write is lost");
    });
}
