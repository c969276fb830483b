// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that are saved and go on in a fresh device, on another bus, with the same memory.

mod outside;
mod pages;
mod pic;
mod venet;

use std::sync::Arc;

use serde_json::{Value, json};
use vbus_core::{Bus, DeviceState, Endpoint, ErrorCode};
use vbus_test_driver::saved::{content, still};

use crate::driver::{Interrupts, Memory, bus, open};

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

/// A state without what passes by itself.
fn without_times(state: &DeviceState) -> String {
    let mut value = content(state);
    still(&mut value["counters"]);
    for plug in ["/connection/open/state/pairs/plug", "/device/inside/plug"] {
        let learned = value.pointer_mut(plug).map(|plug| &mut plug["learned"]);
        for learned in learned.and_then(Value::as_array_mut).into_iter().flatten() {
            learned["age_ms"] = json!(0);
        }
    }
    value.to_string()
}
