// SPDX-License-Identifier: Apache-2.0 OR MIT
//! No line is lost when two processors look at one page, or when the kernel unmasks a line while a
//! connection is opened.

use std::cell::{Cell, RefCell};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde_json::json;
use vbus_core::Bus;
use vbus_driver::pic::{Controller, Line, Nesting, Pic, Source};
use vbus_driver::state::{Pages, Reader};
use vbus_shm::pic::LINES_MAX;

use crate::local::{Local, bus};
use crate::page::{Drained, Page, Unmasked};

/// How long a thread is given to do what it must not be able to do yet.
const PAUSE: Duration = Duration::from_millis(100);

const NAME: &str = "values";

/// A controller, and a device with two interrupts.
pub struct Setup {
    pic: RefCell<Pic<Local>>,
    _pages: Pages<Local>,
    _readers: Vec<Reader<Local>>,
    _bus: Bus,
}

impl Setup {
    pub fn new() -> Self {
        let bus = bus();
        let page = |name: &str| json!({ "name": name, "bytes": 8, "owner": "device" });
        let values = json!({ "pages": [page("one"), page("two")] });
        bus.create(NAME, "state", &values).unwrap().set_router("pic0");
        let mut pages = Pages::open(Local::attach(&bus, NAME, 0).probe()).unwrap();
        let readers = ["one", "two"].into_iter().zip(0..).map(|(name, vector)| {
            let page = pages.find(name).unwrap().unwrap();
            pages.reader(&page, vector).unwrap()
        });
        let readers = readers.collect();
        let messages = Local::new(&bus, "pic0", "pic", &json!({ "cpus": 1 }));
        let pic = RefCell::new(Pic::open(messages.probe()).unwrap());
        Self { pic, _pages: pages, _readers: readers, _bus: bus }
    }

    /// Raises the line of this vector: a route that begins does that.
    pub fn raise(&self, vector: u16, number: u16) {
        let from = Source { device: NAME, vector };
        let mut pic = self.pic.borrow_mut();
        let _ = pic.unroute(from);
        pic.route(from, Line { cpu: 0, number }).unwrap();
    }

    /// The controller of the first processor.
    pub fn controller(&self) -> Controller<Local> {
        self.pic.borrow_mut().cpu(0, LINES_MAX, Nesting::Flat, 0).unwrap()
    }

    fn page(&self, page: &Page, unmasked: impl FnOnce() -> Unmasked) {
        let _pending = page.install(self.controller(), unmasked);
    }
}

/// All lines that there are now.
fn taken(page: &Page) -> Vec<u16> {
    let lines = RefCell::new(Vec::new());
    page.drain(true, |line| lines.borrow_mut().push(line));
    lines.into_inner()
}

pub fn unmasked(lines: &[u16]) -> Unmasked {
    let mut set = Unmasked::default();
    for line in lines {
        set[usize::from(line / 64)] |= 1 << (line % 64);
    }
    set
}

#[test]
fn a_line_ends_though_another_processor_has_begun_a_pause_meanwhile() {
    const ONE: u16 = 5;
    const OTHER: u16 = 6;
    let setup = Setup::new();
    let page = Page::new().unwrap();
    setup.page(&page, || unmasked(&[ONE, OTHER]));
    setup.raise(0, ONE);
    let is_nested = Cell::new(false);
    let drained = page.drain(true, |line| {
        assert_eq!(line, ONE);
        assert!(!is_nested.replace(true));
        // While this processor handles the line, another one looks, and lines come without end.
        setup.raise(1, OTHER);
        let theirs = page.drain(true, |line| {
            assert_eq!(line, OTHER);
            setup.raise(1, OTHER);
        });
        assert_eq!(theirs, Drained::TooMany);
    });
    assert_eq!(drained, Drained::All);
    // In the pause nobody takes any.
    setup.raise(0, ONE);
    assert!(taken(&page).is_empty());
    page.resume();
    let mut lines = taken(&page);
    lines.sort_unstable();
    assert_eq!(lines, [ONE, OTHER]);
}

#[test]
fn what_the_kernel_unmasks_while_a_connection_opens_stays_unmasked() {
    const LINE: u16 = 70;
    let setup = Setup::new();
    let page = Page::new().unwrap();
    thread::scope(|scope| {
        let page = &page;
        let ((begin, has_begun), (done, is_done)) = (mpsc::channel(), mpsc::channel());
        // The kernel unmasks the line just after the driver has looked which lines it wants.
        setup.page(page, || {
            scope.spawn(move || {
                begin.send(()).unwrap();
                page.set_masked(LINE, false);
                done.send(()).unwrap();
            });
            has_begun.recv().unwrap();
            // It has to wait for the page.
            assert!(is_done.recv_timeout(PAUSE).is_err());
            unmasked(&[])
        });
        is_done.recv().unwrap();
    });
    setup.raise(0, LINE);
    assert_eq!(taken(&page), [LINE]);
    // And masked again.
    page.set_masked(LINE, true);
    setup.raise(0, LINE);
    assert!(taken(&page).is_empty());
    assert!(page.set_masked(LINE, false), "somebody has to look");
    assert_eq!(taken(&page), [LINE]);
}

#[test]
fn lines_of_a_page_without_a_connection_are_nobodys() {
    let setup = Setup::new();
    let page = Page::new().unwrap();
    assert_eq!(page.drain(true, |_| unreachable!()), Drained::Nothing);
    setup.page(&page, || unmasked(&[3]));
    setup.raise(0, 3);
    // The connection ends while a line is handled. The line is not ended in the next one.
    let drained = page.drain(true, |line| {
        assert_eq!(line, 3);
        let controller = page.uninstall().unwrap();
        setup.pic.borrow_mut().remove(controller).unwrap();
        setup.page(&page, || unmasked(&[3]));
    });
    assert_eq!(drained, Drained::All);
    setup.raise(0, 3);
    assert_eq!(taken(&page), [3]);
}
