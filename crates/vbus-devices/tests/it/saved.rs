// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that are saved and go on in a fresh device, on another bus, with the same memory.

use std::sync::Arc;

use serde_json::{Value, json};
use vbus_core::shm::signal::end;
use vbus_core::shm::state::{Layout, Reader, SIGNAL_OFFSET, Writer};
use vbus_core::state::Document;
use vbus_core::{Bus, ConnectionState, DeviceState, Endpoint, ErrorCode};

use crate::driver::{Interrupts, Memory, add, bus, open};

/// Saves the device behind `endpoint`, which stands still from then on.
fn save(endpoint: &Endpoint) -> DeviceState {
    endpoint.quiesce().unwrap();
    let state = endpoint.save().unwrap();
    let text = state.to_text().unwrap();
    let read = DeviceState::from_text(&text).unwrap();
    assert_eq!(read, state);
    read
}

/// A fresh device on a bus of its own.
fn fresh(class: &str, config: &Value) -> (Bus, Arc<Endpoint>, Arc<Interrupts>) {
    let bus = bus(1);
    let endpoint = bus.create("d", class, config).unwrap();
    let interrupts = Arc::new(Interrupts::default());
    endpoint.set_interrupt_sink(interrupts.clone());
    (bus, endpoint, interrupts)
}

fn control(endpoint: &Endpoint, request: Value) -> Value {
    let mut answer = Value::Null;
    let mut reply = |value: Value| {
        answer = value;
        true
    };
    endpoint.device().control(&request, &mut reply).unwrap();
    answer
}

#[test]
fn state_pages_go_on_in_another_device() {
    let config = json!({ "pages": [
        { "name": "setpoint", "bytes": 16, "owner": "device" },
        { "name": "load", "bytes": 8, "owner": "driver" },
    ] });
    let (_bus, first, _) = fresh("state", &config);
    let mut memory = Memory::new(&first, 1 << 20);
    open(&first, &memory, 0).unwrap();
    let mut page = |id, bytes| {
        let layout = Layout::new(bytes, 4).unwrap();
        let addr = memory.alloc(layout.bytes());
        let window = memory.window(addr, layout.bytes());
        layout.format(&window, 0).unwrap();
        add(&first, id, addr, layout.bytes(), SIGNAL_OFFSET).unwrap();
        window
    };
    let mut reader = Reader::attach(page(0, 16), end::Driver).unwrap();
    let mut writer = Writer::attach(page(1, 8), end::Driver).unwrap();
    let set = |to: &Endpoint, text| {
        control(to, json!({ "op": "set", "page": "setpoint", "text": text }))["version"].clone()
    };
    let get = |of: &Endpoint| control(of, json!({ "op": "get", "page": "load" }));
    set(&first, "warm");
    let _ = writer.write(b"busy");
    assert_eq!(get(&first)["text"], "busy");

    let state = save(&first);
    let (_other, second, interrupts) = fresh("state", &config);
    memory.share(&second);
    second.quiesce().unwrap();
    second.restore(&state).unwrap();
    second.resume();
    drop(first);
    assert_eq!(second.state(), ConnectionState::Open);
    assert_eq!(
        (get(&second)["version"].clone(), get(&second)["text"].clone()),
        (json!(1), json!("busy"))
    );
    let _ = writer.write(b"idle");
    assert_eq!(get(&second)["version"], 2);
    // The reader's end knows of nothing.
    let _ = reader.arm_newer(reader.version());
    assert_eq!(set(&second, "hot"), 2);
    let mut value = [0; 16];
    interrupts.wait("the value", || (reader.read(&mut value) == Ok(2)).then_some(()));
    assert_eq!(&value[..4], b"hot\0");
    second.close();
    assert_eq!(get(&second)["text"], "idle");
}

/// A device whose state nobody can save says so by name, and goes on.
#[test]
fn a_device_that_is_not_saved_goes_on() {
    let (_bus, endpoint, _) = fresh(
        "state",
        &json!({ "pages": [
        { "name": "a", "bytes": 8, "owner": "device" },
    ] }),
    );
    let memory = Memory::new(&endpoint, 1 << 20);
    let refused = endpoint.save().unwrap_err();
    let text = "device \"d\" of class \"state\" cannot be saved: it is not quiesced";
    assert_eq!(refused.to_string(), text);
    endpoint.quiesce().unwrap();
    assert_eq!(open(&endpoint, &memory, 0), Err(ErrorCode::FAILED));
    endpoint.resume();
    open(&endpoint, &memory, 0).unwrap();
    assert_eq!(control(&endpoint, json!({ "op": "set", "page": "a", "text": "x" }))["version"], 1);
}
