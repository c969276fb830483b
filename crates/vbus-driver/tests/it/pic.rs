// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The interrupt controller, with a device of one of vbus's classes behind it.

use serde_json::json;
use vbus_driver::pic::{Line, Nesting, Pic, Source, Wanted};
use vbus_driver::{Error, ErrorCode, state};
use vbus_shm::signal::Armed;

use crate::fake::Fake;
use crate::local::{Local, bus};

#[test]
fn a_value_that_comes_raises_a_line() {
    let bus = bus();
    let pages = json!({ "pages": [{ "name": "setpoint", "bytes": 8, "owner": "device" }] });
    let values = bus.create("values", "state", &pages).unwrap();
    values.set_router("pic0");
    let set = |text: &str| {
        let request = json!({ "op": "set", "page": "setpoint", "text": text });
        values.device().control(&request, &mut |_| true).unwrap();
    };
    let (own, messages) =
        (Local::attach(&bus, "values", 0), Local::new(&bus, "pic0", "pic", &json!({ "cpus": 1 })));

    let mut pages = state::Pages::open(own.probe()).unwrap();
    let setpoint = pages.find("setpoint").unwrap().unwrap();
    let mut reader = pages.reader(&setpoint, 0).unwrap();
    let mut pic = Pic::open(messages.probe()).unwrap();
    assert_eq!(pic.cpus(), 1);
    let mut cpu = pic.cpu(0, 8, Nesting::Nested, 0).unwrap();
    let from = Source { device: pages.function().info().name.as_str(), vector: 0 };
    pic.route(from, Line { cpu: 0, number: 5 }).unwrap();
    assert_eq!(cpu.arm(), Wanted::Pending);

    let mut version = reader.version();
    for text in ["one", "two", "three"] {
        while let Some(line) = cpu.take() {
            assert_eq!(line, 5);
            cpu.end(line);
        }
        assert_eq!(reader.arm_newer(version), Armed::Waiting);
        set(text);
        messages.wait_interrupt();
        assert_eq!(cpu.take(), Some(5));
        let mut value = [0; 8];
        version = reader.read(&mut value).unwrap();
        assert!(value.starts_with(text.as_bytes()));
        cpu.end(5);
    }
    assert_eq!(cpu.take(), None);
    assert!(!own.interrupted());

    assert_eq!(reader.arm_newer(version), Armed::Waiting);
    pic.remove(cpu).unwrap();
    own.wait_interrupt();
    set("four");
    own.wait_interrupt();
    assert!(!messages.interrupted());
}

#[test]
fn what_is_no_interrupt_controller_is_refused() {
    let bus = bus();
    let config = json!({ "pages": [{ "name": "p", "bytes": 8, "owner": "device" }] });
    let other = Local::new(&bus, "values", "state", &config);
    assert_eq!(Pic::open(other.probe()).err(), Some(Error::WrongClass(2)));

    // A controller with half of the lines.
    let fake = Fake::default();
    fake.set_register(vbus_shm::abi::reg::CLASS, 4);
    fake.set_register(vbus_shm::abi::reg::CONFIG, 1);
    fake.set_register(vbus_shm::abi::reg::CONFIG + 4, 128);
    let function = vbus_driver::Function::probe(fake).unwrap();
    assert!(matches!(Pic::open(function), Err(Error::Corrupt(_))));

    let local = Local::new(&bus, "pic0", "pic", &json!({ "cpus": 1 }));
    let mut pic = Pic::open(local.probe()).unwrap();
    assert!(matches!(pic.cpu(0, 257, Nesting::Flat, 0), Err(Error::Unsupported(_))));
    assert!(matches!(pic.cpu(0, 0, Nesting::Flat, 0), Err(Error::Unsupported(_))));
    let long = Source { device: "a name that is longer than any name can be", vector: 0 };
    let refused = pic.route(long, Line { cpu: 0, number: 0 });
    assert!(matches!(refused, Err(Error::Refused { code: ErrorCode::DENIED, .. })));
}
