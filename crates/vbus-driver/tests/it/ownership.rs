// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver may drop anything in any order. Memory that is registered with the device is not freed
//! before the device has released it. Otherwise the [`Fake`] panics.

use vbus_driver::pic::{Nesting, Pic};
use vbus_driver::sched::Cpus;
use vbus_driver::state::Pages;
use vbus_driver::venet::{BUFFER_MIN, Nic};
use vbus_driver::{Error, ErrorCode, Function, Hal};
use vbus_shm::abi::{command, error_code, pic, reg, sched, state};

use crate::fake::Fake;

fn of_class(class: u32, config: &[u32]) -> (Fake, Function<Fake>) {
    let fake = Fake::default();
    fake.set_register(reg::CLASS, class);
    fake.set_register(reg::CONFIG_BYTES, 4 * config.len() as u32);
    for (at, word) in (reg::CONFIG..).step_by(4).zip(config) {
        fake.set_register(at, *word);
    }
    let function = Function::probe(fake.clone()).unwrap();
    (fake, function)
}

/// A state device. All pages have 64 bytes, and the device writes them.
fn pages() -> (Fake, Pages<Fake>) {
    let (fake, function) = of_class(2, &[4, 0]);
    let pages = Pages::open(function).unwrap();
    (fake, pages)
}

/// Describes a page in place of the device, because the fake does not change the buffer of a call.
fn description(number: u32) -> vbus_driver::state::Description {
    let owner = vbus_driver::state::Owner::Device;
    let name = vbus_driver::Name([b'a'; state::NAME_MAX]);
    vbus_driver::state::Description { number, name, value_bytes: 64, owner }
}

#[test]
fn a_reader_that_is_dropped_leaves_its_page_with_the_device() {
    let (fake, mut pages) = pages();
    drop(pages.reader(&description(0), 0).unwrap());
    assert_eq!((fake.regions(), fake.in_use()), (1, 2), "scratch memory and the page");
    let reader = pages.reader(&description(1), 0).unwrap();
    assert_eq!(fake.regions(), 2);
    pages.release(reader).unwrap();
    assert_eq!((fake.regions(), fake.in_use()), (1, 2), "given back when the device has let go");
    drop(pages);
    assert_eq!((fake.regions(), fake.in_use()), (0, 0), "and the rest with the connection");
}

/// The device may write the header of a page as soon as it has the page. The driver does not look
/// at the header then.
#[test]
fn the_header_of_a_page_is_the_driver_s_own() {
    let (fake, mut pages) = pages();
    // All words of the header but the signal.
    for at in 0..4 {
        fake.scribble(at, u64::MAX);
        let reader = pages.reader(&description(at as u32), 0).unwrap();
        assert_eq!(reader.value_bytes(), 64);
    }
    let (fake, function) = of_class(3, &[2, u32::MAX, 99, 0, 100, 100, 100]);
    fake.scribble(0, 0);
    Cpus::open(function).unwrap().cpu(0).unwrap();
}

#[test]
fn a_nic_and_its_queues_are_dropped_in_any_order() {
    for queues_first in [true, false] {
        let fake = Fake::default();
        let mut nic = Nic::open(Function::probe(fake.clone()).unwrap(), 0, 0).unwrap();
        let queues = nic.queue_pair(0, 32, BUFFER_MIN, 0).unwrap();
        assert_eq!(fake.regions(), 3);
        if queues_first {
            drop(queues);
            assert_eq!((fake.regions(), fake.in_use()), (3, 5), "and the receive buffers");
            drop(nic);
        } else {
            drop(nic);
            drop(queues);
        }
        assert_eq!((fake.regions(), fake.in_use()), (0, 0));
    }
}

#[test]
#[allow(unsafe_code, reason = "to give a buffer by its address")]
fn receive_buffers_stay_as_long_as_the_device_has_them() {
    let fake = Fake::default();
    let mut nic = Nic::open(Function::probe(fake.clone()).unwrap(), 0, 0).unwrap();
    let (tx, mut rx) = nic.queue_pair(0, 32, BUFFER_MIN, 0).unwrap();
    rx.give(0).unwrap();
    assert!(rx.give(0).is_err() && rx.give(32).is_err());
    assert_eq!((fake.regions(), fake.in_use()), (3, 5));
    let mut rx = nic.reset_rx(rx, 64, BUFFER_MIN, 0).unwrap();
    assert_eq!((fake.regions(), fake.in_use()), (3, 5), "the former ring and buffers are free");
    rx.give(63).unwrap();
    drop(rx);
    assert_eq!((fake.regions(), fake.in_use()), (3, 5), "the device may still write them");
    drop(tx);
    nic.close();
    assert_eq!((fake.regions(), fake.in_use()), (0, 0));

    // A queue for buffers of the driver's own.
    let mut nic = Nic::open(Function::probe(fake.clone()).unwrap(), 0, 0).unwrap();
    let _tx = nic.tx(0, 64, 0).unwrap();
    let mut rx = nic.rx_ring(0, 32, BUFFER_MIN, 0).unwrap();
    assert_eq!((fake.regions(), fake.in_use()), (3, 4));
    for _ in 0..32 {
        // SAFETY: the fake device writes nothing.
        unsafe { rx.give(0x1000) }.unwrap();
    }
    // SAFETY: as above.
    assert!(unsafe { rx.give(0x1000) }.is_err(), "there is no room");
    assert_eq!((rx.space(), rx.in_flight()), (0, 32));
    assert!(nic.close().has_let_go());
}

#[test]
fn an_error_on_the_way_frees_nothing_that_is_registered() {
    // The status page is registered, and the second ring of the queue pair is refused. The first
    // ring stays.
    let fake = Fake::default();
    let mut nic = Nic::open(Function::probe(fake.clone()).unwrap(), 0, 0).unwrap();
    let tx = nic.queue_pair(0, 32, BUFFER_MIN, 0).unwrap();
    fake.refuse(command::REGION_ADD, error_code::LIMIT);
    let refused = Error::Refused { command: "REGION_ADD", code: ErrorCode::LIMIT };
    assert_eq!(nic.queue_pair(0, 32, BUFFER_MIN, 0).unwrap_err(), refused);
    assert_eq!((fake.regions(), fake.in_use()), (3, 5), "what was refused is free again");
    drop((tx, nic));
    // The device's answer is not valid. It may have the region nevertheless.
    let fake = Fake::default();
    let mut function = Function::probe(fake.clone()).unwrap();
    function.open(0).unwrap();
    fake.set_register(reg::VALUE, 99);
    let memory = fake.alloc(4096).unwrap();
    let answer = function.region_add(0, 0, &memory, (0, 4096), None);
    assert!(matches!(answer, Err(Error::Corrupt(_))), "{answer:?}");
    drop(memory);
    assert_eq!((fake.regions(), fake.in_use()), (1, 2));
    drop(function);
    assert_eq!((fake.regions(), fake.in_use()), (0, 0));
}

#[test]
fn pages_of_processors_stay_as_long_as_the_device_has_them() {
    let (fake, function) = of_class(3, &[2, u32::MAX, 99, 0, 100, 100, 100]);
    assert_eq!(sched::CONFIG_BYTES, 28);
    let mut cpus = Cpus::open(function).unwrap();
    drop(cpus.cpu(0).unwrap());
    assert_eq!((fake.regions(), fake.in_use()), (2, 3));
    let kept = cpus.cpu(1).unwrap();
    drop(cpus);
    assert_eq!((fake.regions(), fake.in_use()), (0, 2), "the driver's own use of it goes on");
    drop(kept);

    let (fake, function) = of_class(4, &[2, 256]);
    assert_eq!(pic::CONFIG_BYTES, 8);
    let mut pic = Pic::open(function).unwrap();
    drop(pic.cpu(0, 8, Nesting::Flat, 0).unwrap());
    let removed = pic.cpu(1, 8, Nesting::Flat, 0).unwrap();
    assert_eq!((fake.regions(), fake.in_use()), (2, 3));
    pic.remove(removed).unwrap();
    assert_eq!((fake.regions(), fake.in_use()), (1, 2));
    drop(pic);
    assert_eq!((fake.regions(), fake.in_use()), (0, 0));
}

#[test]
fn memory_of_a_device_that_does_not_close_is_never_given_back() {
    let fake = Fake::default();
    let mut function = Function::probe(fake.clone()).unwrap();
    function.open(0).unwrap();
    let memory = fake.alloc(4096).unwrap();
    function.region_add(0, 0, &memory, (0, 4096), None).unwrap();
    drop(memory);
    fake.refuse(command::CLOSE, error_code::FAILED);
    function.close();
    assert!(!function.is_open() && !function.has_let_go());
    drop(function);
    assert_eq!((fake.regions(), fake.in_use(), fake.lost()), (1, 2, 1));
}

#[test]
fn memory_of_an_open_that_fails_is_lost_only_if_the_device_does_not_close() {
    let fake = Fake::default();
    let mut function = Function::probe(fake.clone()).unwrap();
    fake.refuse(command::OPEN, error_code::FAILED);
    assert!(function.open(0).is_err());
    assert_eq!((fake.in_use(), fake.lost()), (0, 0));
    fake.refuse(command::CLOSE, error_code::FAILED);
    for lost in 1..=2 {
        assert!(function.open(0).is_err());
        assert_eq!((fake.in_use(), fake.lost()), (lost, lost as u32));
    }
    // There is no connection, and so there is nothing to lose.
    function.close();
    drop(function);
    assert_eq!((fake.in_use(), fake.lost()), (2, 2));
}

#[test]
fn a_table_that_is_full_says_so_and_changes_nothing() {
    let fake = Fake::default();
    let mut function = Function::probe(fake.clone()).unwrap();
    function.open(0).unwrap();
    let memory = fake.alloc(4096).unwrap();
    let mut regions = Vec::new();
    for id in 0..8 {
        regions.push(function.region_add(id, 0, &memory, (0, 4096), None).unwrap());
    }
    let full = function.region_add(8, 0, &memory, (0, 4096), None);
    assert!(matches!(full, Err(Error::Unsupported(_))), "{full:?}");
    assert_eq!(fake.regions(), 8);
    function.region_drop(regions.remove(3)).unwrap();
    function.region_add(8, 0, &memory, (0, 4096), None).unwrap();
}
