// SPDX-License-Identifier: Apache-2.0 OR MIT
//! State pages of both owners, before, with and after a driver.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use serde_json::{Value, json};
use vbus_core::shm::abi::state::{CALL_DESCRIBE, CONFIG_BYTES, DESCRIPTION_BYTES, OWNER_DRIVER};
use vbus_core::shm::signal::{Armed, end};
use vbus_core::shm::state::{Layout, Reader, SIGNAL_OFFSET, Writer};
use vbus_core::{Bus, Endpoint, ErrorCode, Window};

use crate::driver::{Interrupts, Memory, TIMEOUT, add, bus, call, open};

fn device(bus: &Bus) -> Arc<Endpoint> {
    let config = json!({ "pages": [
        { "name": "setpoint", "bytes": 16, "owner": "device" },
        { "name": "load", "bytes": 8, "owner": "driver", "initial": "idle" },
        { "name": "blob", "bytes": 1 << 20, "owner": "device" },
    ] });
    bus.create("s", "state", &config).unwrap()
}

/// Sends a request. Returns all its answers.
fn ask(endpoint: &Endpoint, request: Value) -> Result<Vec<Value>, String> {
    let mut answers = Vec::new();
    endpoint.device().control(&request, &mut |answer| {
        answers.push(answer);
        true
    })?;
    Ok(answers)
}

fn get(endpoint: &Endpoint, page: &str) -> Value {
    ask(endpoint, json!({ "op": "get", "page": page })).unwrap().remove(0)
}

/// A page in the driver's memory.
fn page(
    endpoint: &Endpoint,
    memory: &mut Memory,
    id: u32,
    bytes: u32,
) -> (Window, Result<u32, ErrorCode>) {
    let layout = Layout::new(bytes, 4).unwrap();
    let addr = memory.alloc(layout.bytes());
    let window = memory.window(addr, layout.bytes());
    layout.format(&window, 0).unwrap();
    (window, add(endpoint, id, addr, layout.bytes(), SIGNAL_OFFSET))
}

/// A watch on a thread of its own.
fn watch(endpoint: &Arc<Endpoint>, page: &str) -> Receiver<Value> {
    let (tx, rx) = channel();
    let (endpoint, request) = (endpoint.clone(), json!({ "op": "watch", "page": page }));
    std::thread::spawn(move || {
        endpoint.device().control(&request, &mut |answer| tx.send(answer).is_ok())
    });
    rx
}

/// The next answer that is not a probe.
fn next(answers: &Receiver<Value>) -> Value {
    loop {
        match answers.recv_timeout(TIMEOUT).expect("the watch goes on") {
            Value::Null => {}
            value => return value,
        }
    }
}

#[test]
fn a_value_set_before_the_driver_comes_is_there_when_it_does() {
    let bus = bus(1);
    let endpoint = device(&bus);
    let interrupts = Arc::new(Interrupts::default());
    endpoint.set_interrupt_sink(interrupts.clone());
    ask(&endpoint, json!({ "op": "set", "page": "setpoint", "text": "warm" })).unwrap();
    let big: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect();
    let hex = big.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().concat();
    ask(&endpoint, json!({ "op": "set", "page": "blob", "hex": hex })).unwrap();
    let mut memory = Memory::new(&endpoint, 16 << 20);
    open(&endpoint, &memory, 0).unwrap();
    assert_eq!(endpoint.config().0[..], [3, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(endpoint.config().0.len(), CONFIG_BYTES);

    let (window, added) = page(&endpoint, &mut memory, 0, 16);
    added.unwrap();
    let mut reader = Reader::attach(window, end::Driver).unwrap();
    let mut value = [0; 16];
    assert_eq!((reader.read(&mut value), &value[..5]), (Ok(1), &b"warm\0"[..]));
    assert_eq!(reader.arm_newer(1), Armed::Waiting);
    ask(&endpoint, json!({ "op": "set", "page": "setpoint", "hex": "00ff" })).unwrap();
    interrupts.wait("the new value", || reader.read_if_newer(1, &mut value).unwrap());
    assert_eq!(value[..3], [0, 0xff, 0]);

    let (window, added) = page(&endpoint, &mut memory, 2, 1 << 20);
    added.unwrap();
    let mut value = vec![0; 1 << 20];
    Reader::attach(window, end::Driver).unwrap().read(&mut value).unwrap();
    assert!(value == big, "1 MiB, byte by byte");
    let shown = get(&endpoint, "blob");
    assert_eq!(shown["hex"].as_str(), Some(&*hex));
    assert_eq!(shown.get("text"), None);
}

#[test]
fn a_value_of_a_driver_is_watched_and_stays_when_the_driver_goes() {
    let bus = bus(1);
    let endpoint = device(&bus);
    assert_eq!(get(&endpoint, "load")["text"], "idle");
    let answers = watch(&endpoint, "load");
    assert_eq!(next(&answers)["text"], "idle");
    for round in 0..3 {
        let mut memory = Memory::new(&endpoint, 1 << 20);
        open(&endpoint, &memory, 0).unwrap();
        let (window, added) = page(&endpoint, &mut memory, 1, 8);
        let handle = added.unwrap();
        let mut writer = Writer::attach(window, end::Driver).unwrap();
        for n in 0..20 {
            let text = format!("{round}/{n}");
            if writer.write(text.as_bytes()).is_wanted() {
                endpoint.ring(u64::from(handle));
            }
            while next(&answers)["text"] != text {}
        }
        let _ = writer.write(b"last");
        endpoint.close();
        assert_eq!(get(&endpoint, "load")["text"], "last");
        while next(&answers)["text"] != "last" {}
        endpoint.unmap_all();
    }
    bus.remove("s").unwrap();
    while answers.recv_timeout(TIMEOUT).is_ok() {}
}

#[test]
fn a_watch_without_news_ends_with_its_client() {
    let bus = bus(1);
    let endpoint = device(&bus);
    let answers = watch(&endpoint, "load");
    next(&answers);
    assert_eq!(endpoint.inspect()["device"]["pages"][1]["watchers"], 1);
    drop(answers);
    let interrupts = Interrupts::default();
    interrupts.wait("the watch to end", || {
        (endpoint.inspect()["device"]["pages"][1]["watchers"] == 0).then_some(())
    });
}

#[test]
fn a_page_must_be_as_described() {
    let bus = bus(1);
    let endpoint = device(&bus);
    let mut memory = Memory::new(&endpoint, 16 << 20);
    open(&endpoint, &memory, 0).unwrap();
    let mut buffer = [0; DESCRIPTION_BYTES];
    buffer[0] = 1;
    call(&endpoint, &memory, CALL_DESCRIBE, &buffer).unwrap();
    let described = memory.read(2048, DESCRIPTION_BYTES);
    assert_eq!(described[..8], [8, 0, 0, 0, OWNER_DRIVER as u8, 0, 0, 0]);
    assert_eq!(described[8..13], *b"load\0");
    buffer[0] = 3;
    assert_eq!(call(&endpoint, &memory, CALL_DESCRIBE, &buffer), Err(ErrorCode::BAD_ARGUMENT));
    assert_eq!(call(&endpoint, &memory, CALL_DESCRIBE, &buffer[..63]), Err(ErrorCode::BAD_LENGTH));
    assert_eq!(call(&endpoint, &memory, 9, &[]), Err(ErrorCode::BAD_FUNCTION));

    let (_, added) = page(&endpoint, &mut memory, 3, 8);
    assert_eq!(added, Err(ErrorCode::BAD_ARGUMENT));
    let (_, added) = page(&endpoint, &mut memory, 1, 9);
    assert_eq!(added, Err(ErrorCode::BAD_LENGTH));
    let addr = memory.alloc(4096);
    assert_eq!(add(&endpoint, 1, addr, 4096, SIGNAL_OFFSET), Err(ErrorCode::BAD_LAYOUT));
    let (window, added) = page(&endpoint, &mut memory, 1, 8);
    let (_, again) = page(&endpoint, &mut memory, 1, 8);
    assert_eq!(again, Err(ErrorCode::EXISTS));
    let _ = Writer::attach(window, end::Driver).unwrap().write(b"kept");
    endpoint.region_drop(u64::from(added.unwrap())).unwrap();
    assert_eq!(get(&endpoint, "load")["text"], "kept");
    let (_, added) = page(&endpoint, &mut memory, 1, 8);
    added.unwrap();
    assert_eq!(get(&endpoint, "load")["text"], "kept", "a new page has no value yet");
}

#[test]
fn errors_of_requests_say_what_is_wrong() {
    let bus = bus(1);
    let endpoint = device(&bus);
    for (request, text) in [
        (
            json!({ "op": "get", "page": "x" }),
            "there is no page \"x\"; there are: setpoint, load, blob",
        ),
        (json!({ "op": "set", "page": "load", "text": "" }), "belongs to the driver"),
        (
            json!({ "op": "set", "page": "setpoint", "text": "seventeen letters" }),
            "holds 16 bytes; the value has 17",
        ),
        (json!({ "op": "set", "page": "setpoint", "hex": "0" }), "two digits for each byte"),
        (json!({ "op": "set", "page": "setpoint", "hex": "0g" }), "'g' is not a hexadecimal digit"),
        (json!({ "op": "set", "page": "setpoint" }), "either as \"text\" or as \"hex\""),
        (json!({ "op": "put", "page": "setpoint" }), "unknown variant `put`"),
        (json!({ "page": "setpoint" }), "missing field `op`"),
        (json!(7), "invalid type"),
    ] {
        let error = ask(&endpoint, request.clone()).unwrap_err();
        assert!(error.contains(text), "{request}: {error}");
    }
    let list = ask(&endpoint, json!({ "op": "list" })).unwrap().remove(0);
    assert_eq!(list["pages"][1]["name"], "load");
    assert_eq!(list["pages"][1]["owner"], "driver");
}

#[test]
fn a_driver_that_writes_without_pause_blocks_nobody() {
    let bus = bus(1);
    let endpoint = device(&bus);
    let mut memory = Memory::new(&endpoint, 1 << 20);
    open(&endpoint, &memory, 0).unwrap();
    let (window, added) = page(&endpoint, &mut memory, 1, 8);
    let handle = u64::from(added.unwrap());
    let answers = watch(&endpoint, "load");
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (stopped, ringing) = (stop.clone(), endpoint.clone());
    let hostile = std::thread::spawn(move || {
        use std::sync::atomic::Ordering;
        use vbus_core::shm::Memory;
        let mut x = 1_u64;
        while !stopped.load(Ordering::Relaxed) {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let words = window.words();
            words[(x >> 40) as usize % words.len()].store(x, Ordering::Relaxed);
            ringing.ring(handle);
        }
    });
    for n in 0..200 {
        let text = format!("{n}");
        ask(&endpoint, json!({ "op": "set", "page": "setpoint", "text": text })).unwrap();
        assert_eq!(get(&endpoint, "setpoint")["text"], text);
        get(&endpoint, "load");
    }
    next(&answers);
    endpoint.close();
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    hostile.join().unwrap();
}
