// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A processor's message and its timer, and what is left of both at its end.
#![allow(unsafe_code, reason = "owner and processors stay at their places in these tests")]

use std::cell::{Cell, RefCell};
use std::ptr::NonNull;

use crate::pages::{Setup, unmasked};
use crate::processor::{Owner, Processor};

const LINE: u16 = 9;

/// Notes what its processor asks for. Its line comes again and again, as often as is said.
struct Noted {
    setup: Setup,
    again: Cell<u32>,
    handled: RefCell<Vec<u16>>,
    looks: Cell<u32>,
    faults: Cell<u32>,
}

// SAFETY: these tests use it in one thread.
unsafe impl Sync for Noted {}

impl Owner for Noted {
    fn handle(&self, line: u16) {
        self.handled.borrow_mut().push(line);
        if let Some(left) = self.again.get().checked_sub(1) {
            self.again.set(left);
            self.setup.raise(0, LINE);
        }
    }

    fn look_soon(&self) {
        self.looks.set(self.looks.get() + 1);
    }

    fn fault(&self) {
        self.faults.set(self.faults.get() + 1);
    }
}

fn noted() -> Box<Noted> {
    let (again, looks, faults) = (Cell::new(0), Cell::new(0), Cell::new(0));
    Box::new(Noted { setup: Setup::new(), again, handled: RefCell::default(), looks, faults })
}

/// A processor at its place, with a timer, which takes this line.
fn processor(owner: &Noted) -> Box<Processor<Noted>> {
    // SAFETY: the owner is dropped after it.
    let mut processor = Box::new(unsafe { Processor::new(NonNull::from(owner)) }.unwrap());
    // SAFETY: it stays in its box.
    unsafe { processor.start_timer() }.unwrap();
    processor.install(owner.setup.controller(), || unmasked(&[LINE]));
    processor
}

#[test]
fn a_message_brings_its_line_or_is_for_an_event() {
    let owner = noted();
    let processor = processor(&owner);
    processor.message();
    assert_eq!((owner.looks.get(), owner.faults.get()), (1, 0));
    owner.setup.raise(0, LINE);
    processor.message();
    assert_eq!(*owner.handled.borrow(), [LINE]);
    assert_eq!(owner.looks.get(), 1, "the message was for a line");
}

#[test]
fn a_timer_that_runs_while_the_processor_goes_finds_its_page() {
    let owner = noted();
    let processor = processor(&owner);
    // Lines come without end, so the processor pauses. In the pause the controller is unplugged.
    owner.again.set(1000);
    owner.setup.raise(0, LINE);
    processor.message();
    let handled = owner.handled.borrow().len();
    assert!(owner.again.get() > 0, "all {handled} lines were handled at once");
    owner.again.set(0);
    drop(processor);
    // The timer has run: it has taken the line that was left.
    assert_eq!(owner.handled.borrow().len(), handled + 1);
}

#[test]
fn a_line_that_the_kernel_unmasks_is_taken_by_the_timer() {
    let owner = noted();
    let processor = processor(&owner);
    processor.set_masked(LINE, true);
    owner.setup.raise(0, LINE);
    processor.message();
    assert!(owner.handled.borrow().is_empty());
    processor.set_masked(LINE, false);
    drop(processor);
    assert_eq!(*owner.handled.borrow(), [LINE]);
}
