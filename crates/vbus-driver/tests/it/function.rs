// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Probe, open, regions, calls.

use serde_json::json;
use vbus_driver::{ConnectionState, Dma, Error, ErrorCode, Function, Hal, Versions, venet};
use vbus_shm::abi::{capability, class, reg, venet as abi};
use vbus_shm::ring::{DriverEnd, Layout, Returns, SIGNAL_OFFSET};

use crate::local::{Local, bus, until};

fn nic(name: &str) -> (vbus_core::Bus, Local) {
    let bus = bus();
    let local = Local::new(
        &bus,
        name,
        "venet",
        &json!({ "backend": "null", "mac": "02:00:00:00:00:07", "mtu": 9000 }),
    );
    (bus, local)
}

fn refused<T>(result: Result<T, Error>) -> ErrorCode {
    match result {
        Err(Error::Refused { code, .. }) => code,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("not refused"),
    }
}

#[test]
fn a_function_tells_what_it_is() {
    let (_bus, local) = nic("nic-with-a-name");
    let function = local.probe();
    let info = function.info();
    assert_eq!(info.class, u32::from(class::VENET));
    assert_eq!((info.class_name.as_str(), info.name.as_str()), ("venet", "nic-with-a-name"));
    assert_eq!((info.vectors, function.doorbell().kind), (1, capability::KIND_MMIO));
    assert_eq!(function.doorbells_offered().count(), 1);
    assert_eq!(function.state(), Ok(ConnectionState::Closed));
    let config = venet::config(&function).unwrap();
    assert_eq!((config.mac, config.mtu), ([2, 0, 0, 0, 0, 7], 9000));
    assert!(config.ring_entries.is_power_of_two());
}

#[test]
fn it_opens_with_what_it_offers_and_as_often_as_wanted() {
    let (_bus, local) = nic("n");
    let mut function = local.probe();
    for _ in 0..100 {
        assert_eq!(refused(function.open(1 << 47)), ErrorCode::BAD_FEATURES);
        function.open(venet::F_TX_CSUM).unwrap();
        assert_eq!(
            (function.state(), function.features()),
            (Ok(ConnectionState::Open), venet::F_TX_CSUM)
        );
        function.check().unwrap();
        function.close();
        assert_eq!(function.check(), Err(Error::Broken(ErrorCode::NOT_OPEN)));
    }
}

#[test]
fn a_driver_that_died_is_no_hindrance_and_dropping_closes() {
    let (_bus, local) = nic("n");
    let mut dead = local.probe();
    dead.open(0).unwrap();
    std::mem::forget(dead);
    let mut function = local.probe();
    assert_eq!(function.state(), Ok(ConnectionState::Open));
    function.open(0).unwrap();
    drop(function);
    assert_eq!(local.probe().state(), Ok(ConnectionState::Closed));
}

#[test]
fn regions_are_checked_on_both_ends() {
    let (_bus, local) = nic("n");
    let mut function = local.probe();
    let memory = local.alloc(8192).unwrap();
    assert_eq!(refused(function.region_add(0, 0, &memory, (0, 8192), None)), ErrorCode::NOT_OPEN);
    function.open(0).unwrap();
    let layout = Layout::new(64, Returns::Counted).unwrap();
    DriverEnd::create(memory.clone(), layout, 0).unwrap();
    let mut add =
        |id, vector, place, signal| function.region_add(id, vector, &memory, place, signal);
    let good = (0, layout.bytes());
    for (result, code) in [
        (add(77, 0, good, Some(SIGNAL_OFFSET)), ErrorCode::BAD_ARGUMENT),
        (add(abi::tx(0), 99, good, Some(SIGNAL_OFFSET)), ErrorCode::BAD_VECTOR),
        (add(abi::tx(0), 0, (8, 64), Some(SIGNAL_OFFSET)), ErrorCode::BAD_ALIGNMENT),
        (add(abi::tx(0), 0, (0, 128), Some(SIGNAL_OFFSET)), ErrorCode::BAD_SIGNAL),
    ] {
        assert_eq!(refused(result), code);
    }
    for place in [(0, 8200), (8192, 8), (usize::MAX, 8), (0, 0)] {
        assert!(matches!(add(abi::tx(0), 0, place, None), Err(Error::Unsupported(_))), "{place:?}");
    }
    let region = add(abi::tx(0), 0, good, Some(SIGNAL_OFFSET)).unwrap();
    assert!(region.handle() < function.info().max_regions);
    function.region_drop(region).unwrap();
    // A region of an earlier connection has no meaning in this one.
    let stale = function.region_add(abi::tx(0), 0, &memory, good, Some(SIGNAL_OFFSET)).unwrap();
    function.close();
    function.open(0).unwrap();
    function.region_add(abi::tx(0), 0, &memory, good, Some(SIGNAL_OFFSET)).unwrap();
    assert_eq!(refused(function.region_drop(stale)), ErrorCode::NOT_OPEN);
}

#[test]
fn what_the_device_refuses_says_why() {
    let (_bus, local) = nic("n");
    let mut function = local.probe();
    assert_eq!(refused(function.call(abi::CALL_START, 0, &mut [])), ErrorCode::NOT_OPEN);
    function.open(0).unwrap();
    assert_eq!(refused(function.call(999, 0, &mut [1; 16])), ErrorCode::BAD_FUNCTION);
    assert!(matches!(
        function.call(1, 0, &mut vec![0; (64 << 10) + 1]),
        Err(Error::Unsupported(_))
    ));
}

#[test]
fn a_revoked_connection_is_seen_and_can_be_opened_again() {
    let (bus, local) = nic("n");
    let mut nic = venet::Nic::open(local.probe(), 0, 0).unwrap();
    nic.function().check().unwrap();
    local.unmap();
    let error = nic.function().check().unwrap_err();
    assert_eq!(error, Error::Broken(ErrorCode::REVOKED));
    // The device's interrupt has reported it.
    until("the interrupt", || local.interrupted().then_some(()));
    let _ = nic.arm_status();
    drop(nic);
    let again = Local::attach(&bus, "n", 0);
    let mut function = again.probe();
    function.open(0).unwrap();
    function.check().unwrap();
}

#[test]
fn memory_that_is_not_shared_is_found_out() {
    let (_bus, local) = nic("n");
    // The device has the same addresses, but other memory.
    local.unmap();
    let other = memfd();
    local.map_other(other);
    assert_eq!(refused(local.probe().open(0)), ErrorCode::NOT_SHARED);
}

fn memfd() -> std::os::fd::OwnedFd {
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("other", flags).unwrap();
    rustix::fs::ftruncate(&file, 64 << 20).unwrap();
    file
}

#[test]
fn a_function_that_is_none_is_refused() {
    use crate::fake::Fake;
    let fake = Fake::default();
    assert!(Function::probe(fake.clone()).is_ok());
    let with = |change: &dyn Fn(&Fake)| {
        let fake = Fake::default();
        change(&fake);
        Function::probe(fake).err()
    };
    // Only the signature counts, not the ids and the revision.
    assert_eq!(with(&|f| f.set_config(0, 0x1234_5678)), None);
    assert_eq!(with(&|f| f.set_config(8, 0x0200_0063)), None);
    assert_eq!(with(&|f| f.set_config(0x44, 0x7375_6275)), Some(Error::NotVbus));
    assert_eq!(with(&|f| f.set_config(0, u32::MAX)), Some(Error::Gone));
    assert_eq!(with(&|f| f.set_config(4, 0)), Some(Error::NotVbus));
    // A list of capabilities with a loop.
    assert_eq!(with(&|f| f.set_config(0x40, 0x0010_4005)), Some(Error::NotVbus));
    assert_eq!(with(&|f| f.set_config(0x40, 0x0214_0009)), Some(Error::Layout(2)));
    assert_eq!(with(&|f| f.set_config(0x48, 0x1004)), Some(Error::NotVbus));
    // The driver skips another vendor-specific capability before it.
    let foreign = |f: &Fake| {
        f.set_config(0x34, 0x60);
        f.set_config(0x60, 0x0210_4009);
        f.set_config(0x64, 0x1234_5678);
    };
    assert_eq!(with(&foreign), None);
    assert_eq!(
        with(&|f| f.set_config(0x4c, 0x0004_0002)),
        Some(Error::NoDoorbell),
        "a port, which this cannot ring"
    );
    assert_eq!(
        with(&|f| f.set_config(0x50, 0x3ffc)),
        Some(Error::NoDoorbell),
        "beyond the end of the BAR"
    );
    assert_eq!(with(&|f| f.set_register(0, 0)), Some(Error::NotVbus));
    assert_eq!(with(&|f| f.set_register(0, u32::MAX)), Some(Error::Gone));
    assert_eq!(
        with(&|f| f.set_register(4, 0x0003_0002)),
        Some(Error::Version {
            device: Versions { lowest: 2, highest: 3 },
            driver: Versions::SUPPORTED
        })
    );
}

#[test]
fn an_acknowledgement_has_arrived_when_it_returns() {
    // If the acknowledgement were still posted, the next interrupt could come before it, and be
    // acknowledged without being seen.
    let fake = crate::fake::Fake::default();
    let function = Function::probe(fake.clone()).unwrap();
    assert!(fake.written().is_empty());
    function.acknowledge();
    assert_eq!(fake.written(), [reg::INTERRUPT_ACK]);
}

#[test]
fn an_interrupt_of_another_function_on_the_line_is_not_acknowledged() {
    let fake = crate::fake::Fake::default();
    let line = Function::probe(fake.clone()).unwrap().acknowledger();
    for (pending, is_own) in [(0, false), (1, true), (u32::MAX, false)] {
        fake.set_register(reg::INTERRUPT_PENDING, pending);
        let before = fake.written().len();
        assert_eq!(line.take(), is_own);
        assert_eq!(fake.written().len() - before, usize::from(is_own));
    }
}

#[test]
fn a_region_in_pages_is_registered_by_a_list() {
    let bus = bus();
    bus.create("n", "venet", &json!({ "backend": "null" })).unwrap();
    let local = Local::attach(&bus, "n", 12);
    let mut function = local.probe();
    function.open(0).unwrap();
    let layout = Layout::new(256, Returns::Runs).unwrap();
    let memory = local.alloc(128 << 10).unwrap();
    assert_eq!(memory.page_shift(), 12);
    assert!(
        !memory.is_run(0, 8192)
            && memory.is_run(4096, 4096)
            && memory.address(0) > memory.address(4096)
    );
    DriverEnd::create(memory.clone(), layout, 0).unwrap();
    function.region_add(abi::rx(0), 0, &memory, (0, 128 << 10), Some(SIGNAL_OFFSET)).unwrap();
    let misplaced = function.region_add(abi::tx(0), 0, &memory, (64, 64 << 10), None);
    assert!(matches!(misplaced, Err(Error::Unsupported(_))));
}
