// SPDX-License-Identifier: Apache-2.0 OR MIT
//! State pages, of either owner.

use serde_json::{Value, json};
use vbus_core::Bus;
use vbus_driver::state::{Owner, Pages};
use vbus_driver::{Error, ErrorCode, Hal, venet};
use vbus_shm::signal::{Armed, end::Driver};
use vbus_shm::state::{Reader, Writer};

use crate::local::{Local, bus};

const BIG: usize = 1 << 20;

fn device(bus: &Bus, page_shift: u8) -> Local {
    let config = json!({ "pages": [
        { "name": "setpoint", "bytes": 16, "owner": "device", "initial": "20" },
        { "name": "load", "bytes": 64, "owner": "driver" },
        { "name": "big", "bytes": BIG, "owner": "device" },
        { "name": "mine", "bytes": BIG, "owner": "driver" },
    ] });
    bus.create("s", "state", &config).unwrap();
    Local::attach(bus, "s", page_shift)
}

fn ask(bus: &Bus, request: &Value) -> Value {
    let mut answer = Value::Null;
    let mut reply = |value| {
        answer = value;
        true
    };
    bus.get("s").unwrap().device().control(request, &mut reply).unwrap();
    answer
}

fn text(value: &[u8]) -> &str {
    std::str::from_utf8(value).unwrap().trim_end_matches('\0')
}

#[test]
fn pages_are_described_and_found() {
    let bus = bus();
    let mut pages = Pages::open(device(&bus, 0).probe()).unwrap();
    assert_eq!(pages.count(), 4);
    let page = pages.find("load").unwrap().unwrap();
    assert_eq!((page.number, page.value_bytes, page.owner), (1, 64, Owner::Driver));
    assert!(pages.find("nothing").unwrap().is_none());
    assert!(matches!(pages.describe(4), Err(Error::Refused { code: ErrorCode::BAD_ARGUMENT, .. })));
    assert!(matches!(pages.reader(&page, 0), Err(Error::Unsupported(_))));
    drop(pages);
    let function = Local::attach(&bus, "s", 0).probe();
    assert!(matches!(venet::Nic::open(function, 0, 0), Err(Error::WrongClass(2))));
}

#[test]
fn a_page_of_the_device_is_read_and_waited_for() {
    let bus = bus();
    let local = device(&bus, 0);
    let mut pages = Pages::open(local.probe()).unwrap();
    let page = pages.find("setpoint").unwrap().unwrap();
    let mut reader = pages.reader(&page, 0).unwrap();
    let mut value = [0; 16];
    let mut version = reader.read(&mut value).unwrap();
    assert_eq!(text(&value), "20");
    for n in 0..20 {
        assert_eq!(reader.arm_newer(version), Armed::Waiting);
        ask(&bus, &json!({ "op": "set", "page": "setpoint", "text": format!("value {n}") }));
        local.wait_interrupt();
        assert_ne!(reader.version(), version);
        version = reader.read(&mut value).unwrap();
        assert_eq!(text(&value), format!("value {n}"));
    }
    reader.disarm();
    ask(&bus, &json!({ "op": "set", "page": "setpoint", "text": "quiet" }));
    assert!(!local.interrupted());
}

#[test]
fn a_page_of_the_driver_is_seen_at_once_and_stays() {
    let bus = bus();
    let mut pages = Pages::open(device(&bus, 0).probe()).unwrap();
    let page = pages.find("load").unwrap().unwrap();
    let mut writer = pages.writer(&page, 0).unwrap();
    for n in 0..10 {
        writer.write(format!("{n}").as_bytes());
        assert_eq!(ask(&bus, &json!({ "op": "get", "page": "load" }))["text"], format!("{n}"));
    }
    writer.write(b"last");
    pages.finish(writer).unwrap();
    drop(pages);
    assert_eq!(ask(&bus, &json!({ "op": "get", "page": "load" }))["text"], "last");
}

#[test]
fn the_largest_pages_lie_in_scattered_memory() {
    let bus = bus();
    let mut pages = Pages::open(device(&bus, 12).probe()).unwrap();
    let value: String = (0..BIG).map(|i| char::from(b'a' + (i * 7 % 26) as u8)).collect();
    ask(&bus, &json!({ "op": "set", "page": "big", "text": value }));
    let page = pages.find("big").unwrap().unwrap();
    let reader = pages.reader(&page, 0).unwrap();
    let mut out = vec![0; BIG];
    reader.read(&mut out).unwrap();
    assert!(out == value.as_bytes());
    let page = pages.find("mine").unwrap().unwrap();
    let mut writer = pages.writer(&page, 0).unwrap();
    writer.write(value.as_bytes());
    assert!(ask(&bus, &json!({ "op": "get", "page": "mine" }))["text"] == value);
}

#[test]
fn a_driver_keeps_the_memory_of_pages_from_one_connection_to_the_next() {
    let bus = bus();
    let local = device(&bus, 12);
    let mut pages = Pages::open(local.probe()).unwrap();
    let [setpoint, load] = ["setpoint", "load"].map(|name| pages.find(name).unwrap().unwrap());
    let [memory, own] = [&setpoint, &load].map(|page| {
        let layout = page.layout().unwrap();
        let memory = pages.function().hal().alloc(layout.bytes()).unwrap();
        layout.format(&memory, 0).unwrap();
        memory
    });
    let reader = Reader::attach(memory.clone(), Driver).unwrap();
    let mut writer = Writer::attach(own.clone(), Driver).unwrap();
    pages.register(&setpoint, 0, &memory).unwrap();
    let (_, bell) = pages.register(&load, 1, &own).unwrap();
    bell.kick(writer.write(b"one"));
    let mut value = [0; 16];
    let before = reader.read(&mut value).unwrap();
    assert_eq!(text(&value), "20");

    drop(pages);
    ask(&bus, &json!({ "op": "set", "page": "setpoint", "text": "21" }));
    assert_eq!(reader.read(&mut value), Ok(before), "the device has let go of the page");
    let _ = writer.write(b"two");
    let mut pages = Pages::open(local.probe()).unwrap();
    pages.register(&setpoint, 0, &memory).unwrap();
    let (_, bell) = pages.register(&load, 1, &own).unwrap();
    assert!(reader.read(&mut value).unwrap() > before);
    assert_eq!(text(&value), "21");
    let get = json!({ "op": "get", "page": "load" });
    assert_eq!(ask(&bus, &get)["text"], "two");
    bell.kick(writer.write(b"three"));
    assert_eq!(ask(&bus, &get)["text"], "three");
    assert_eq!((writer.version(), writer.layout()), (3, load.layout().unwrap()));
}
