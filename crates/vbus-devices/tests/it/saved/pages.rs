// SPDX-License-Identifier: Apache-2.0 OR MIT
//! State pages go on in another device.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use serde_json::{Value, json};
use vbus_core::shm::abi::state::CALL_DESCRIBE;
use vbus_core::shm::signal::end;
use vbus_core::shm::state::{Layout, Reader, SIGNAL_OFFSET, Writer};
use vbus_core::state::Document;
use vbus_core::{Bus, ConnectionState, DeviceState, Endpoint, ErrorCode, Window};
use vbus_test_driver::saved::{World, content, forged_devices, same_when_saved, save, still};
use vbus_test_driver::{FreshProcess, Random};

use super::{control, fresh};
use crate::driver::{Memory, add, bus, call, open};

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

#[test]
fn forged_states_of_state_pages_do_no_harm() {
    let config = json!({ "pages": [
        { "name": "setpoint", "bytes": 16, "owner": "device", "initial": "x" },
        { "name": "load", "bytes": 8, "owner": "driver" },
    ] });
    let (_bus, endpoint, _) = fresh("state", &config);
    let mut memory = Memory::new(&endpoint, 1 << 20);
    open(&endpoint, &memory, 0).unwrap();
    for (id, bytes) in [(0, 16), (1, 8)] {
        let layout = Layout::new(bytes, 4).unwrap();
        let addr = memory.alloc(layout.bytes());
        layout.format(&memory.window(addr, layout.bytes()), 0).unwrap();
        add(&endpoint, id, addr, layout.bytes(), SIGNAL_OFFSET).unwrap();
    }
    let state = save(&endpoint);
    forged_devices(&bus(1), ("state", &config), &state, Some(&memory), 0..1500);
}

/// Bytes of the driver's memory.
const MEMORY: u64 = 1 << 20;

/// The pages: names, bytes and whether the driver is the owner.
const PAGES: [(&str, u32, bool); 4] =
    [("warm", 16, false), ("wide", 700, false), ("load", 8, true), ("long", 300, true)];

fn settings() -> Value {
    let owner = |is_driver| if is_driver { "driver" } else { "device" };
    let page = |(name, bytes, is_driver)| json!({ "name": name, "bytes": bytes, "owner": owner(is_driver) });
    json!({ "pages": PAGES.map(page) })
}

/// A device of state pages, and what may be asked of it.
struct Seat {
    _bus: Bus,
    endpoint: Arc<Endpoint>,
    memory: Memory,
}

impl Seat {
    /// A fresh device for the driver with this memory. It goes on from the state `text`.
    fn new(memory: Memory, text: Option<&str>) -> Seat {
        let bus = bus(1);
        let endpoint = bus.create_quiesced("d", "state", &settings()).unwrap();
        memory.share(&endpoint);
        if let Some(text) = text {
            let state = DeviceState::from_text(text).unwrap();
            endpoint.restore(&state).unwrap();
            let mut again = endpoint.save().unwrap();
            assert_eq!(still_of(&mut again), still_of(&mut state.clone()), "as it was restored");
        }
        endpoint.resume();
        Seat { _bus: bus, endpoint, memory }
    }

    fn ask(&self, request: &Value) -> Value {
        let number = |name: &str| request[name].as_u64().unwrap();
        let result = |result: Result<Value, ErrorCode>| match result {
            Ok(value) => value,
            Err(error) => json!({ "error": error.0 }),
        };
        match request["op"].as_str().unwrap() {
            "open" => result(open(&self.endpoint, &self.memory, 0).map(|()| Value::Null)),
            "close" => {
                self.endpoint.close();
                Value::Null
            }
            "add" => {
                let (id, addr) = (number("id"), number("addr"));
                let layout = Layout::new(PAGES[id as usize].1, 4).unwrap();
                let added = add(&self.endpoint, id as u32, addr, layout.bytes(), SIGNAL_OFFSET);
                result(added.map(|handle| json!(handle)))
            }
            "drop" => result(self.endpoint.region_drop(number("handle")).map(|()| Value::Null)),
            "describe" => {
                let buffer = [&(number("page") as u32).to_le_bytes()[..], &[0; 60]].concat();
                let called = call(&self.endpoint, &self.memory, CALL_DESCRIBE, &buffer);
                result(called.map(|value| json!([value, self.memory.read(2048, 64)])))
            }
            "ask" => {
                let mut answer = Value::Null;
                let mut reply = |value| {
                    answer = value;
                    true
                };
                match self.endpoint.device().control(&request["request"], &mut reply) {
                    Ok(()) => answer,
                    Err(error) => json!({ "error": error }),
                }
            }
            "save" => json!(save(&self.endpoint).to_text().unwrap()),
            "go-on" => {
                self.endpoint.resume();
                Value::Null
            }
            op => panic!("{op}"),
        }
    }
}

fn still_of(state: &mut DeviceState) -> Value {
    let mut value = content(state);
    still(&mut value["counters"]);
    value
}

/// The other process: it has the driver's memory by a path, and the state to go on from.
#[test]
#[ignore = "a process of another_process_goes_on_with_state_pages"]
fn serves_another_process() {
    let go_on = |first: Value| {
        let path = first["memory"].as_str().unwrap();
        let file = File::options().read(true).write(true).open(path).unwrap();
        let seat = Seat::new(Memory::of(file.into(), MEMORY), first["state"].as_str());
        (seat, Value::Null)
    };
    vbus_test_driver::serve(go_on, |seat, request| seat.ask(&request));
}

/// A device in a process of its own, which goes on from the state `text`.
fn start(memory: &Memory, text: &str) -> FreshProcess {
    let file = memory.file();
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let first = json!({ "memory": path, "state": text });
    FreshProcess::start("saved::pages::serves_another_process", &first).0
}

/// Where the device is.
enum Place {
    Here(Box<Seat>),
    There(FreshProcess),
}

/// The driver's end of a page.
enum End {
    Reader(Reader<Window, end::Driver>),
    Writer(Writer<Window, end::Driver>),
}

/// A driver with its pages, and a client of the device.
struct Pages {
    place: Place,
    /// Each fresh device is in a process of its own.
    apart: bool,
    memory: Memory,
    addrs: [u64; 4],
    shown: [Option<(u64, End)>; 4],
    random: Random,
    seen: Vec<Vec<u8>>,
}

impl Pages {
    fn new(seed: u64, apart: bool) -> Pages {
        let mut memory = Memory::alone(MEMORY);
        let place = Place::Here(Box::new(Seat::new(Memory::of(memory.file(), MEMORY), None)));
        let addrs = PAGES.map(|(_, bytes, _)| memory.alloc(Layout::new(bytes, 4).unwrap().bytes()));
        let (shown, random) = (Default::default(), Random(seed));
        let mut pages = Pages { place, apart, memory, addrs, shown, random, seen: Vec::new() };
        pages.note(json!({ "op": "open" }));
        (0..4).for_each(|page| pages.show(page));
        pages
    }

    fn ask(&mut self, request: &Value) -> Value {
        match &mut self.place {
            Place::Here(seat) => seat.ask(request),
            Place::There(process) => process.ask(request),
        }
    }

    /// Asks, and notes the answer.
    fn note(&mut self, request: Value) -> Value {
        let answer = self.ask(&request);
        self.seen.push(format!("{request}: {answer}").into_bytes());
        answer
    }

    fn show(&mut self, page: usize) {
        let (_, bytes, is_driver) = PAGES[page];
        let layout = Layout::new(bytes, 4).unwrap();
        let addr = self.addrs[page];
        if self.shown[page].is_none() {
            layout.format(&self.memory.window(addr, layout.bytes()), 0).unwrap();
        }
        let answer = self.note(json!({ "op": "add", "id": page, "addr": addr }));
        let Some(handle) = answer.as_u64() else { return };
        let window = self.memory.window(addr, layout.bytes());
        let end = match is_driver {
            true => End::Writer(Writer::attach(window, end::Driver).unwrap()),
            false => End::Reader(Reader::attach(window, end::Driver).unwrap()),
        };
        self.shown[page] = Some((handle, end));
    }

    fn value(&mut self, bytes: u32) -> Vec<u8> {
        (0..bytes).map(|_| self.random.next() as u8).collect()
    }
}

impl World for Pages {
    fn step(&mut self) {
        let n = self.random.next();
        let page = n as usize % 4;
        let (name, bytes, _) = PAGES[page];
        match self.random.below(14) {
            0..=3 => {
                // Of a page of the driver, and a value that is too long: these are refused.
                let len = self.random.below(u64::from(bytes) + 2) as u32;
                let value = hex::encode(self.value(len));
                let request = json!({ "op": "set", "page": name, "hex": value });
                self.note(json!({ "op": "ask", "request": request }));
            }
            4..=8 => {
                let value = self.value(bytes);
                match &mut self.shown[page] {
                    Some((_, End::Writer(writer))) => drop(writer.write(&value)),
                    Some((_, End::Reader(reader))) => {
                        let mut value = value;
                        let version = reader.read(&mut value);
                        self.seen.push(format!("{name} {version:?} {value:?}").into_bytes());
                    }
                    None => {}
                }
            }
            9..=10 => {
                let request = json!({ "op": "get", "page": name });
                self.note(json!({ "op": "ask", "request": request }));
            }
            11 => match self.shown[page].take() {
                Some((handle, _)) => drop(self.note(json!({ "op": "drop", "handle": handle }))),
                None => self.show(page),
            },
            12 if n % 16 < 4 => {
                self.note(json!({ "op": "close" }));
                self.shown = Default::default();
                self.note(json!({ "op": "open" }));
            }
            12 => self.show(page),
            _ => drop(self.note(json!({ "op": "describe", "page": n % 6 }))),
        }
    }

    fn renew(&mut self) {
        let text = self.ask(&json!({ "op": "save" }));
        let text = text.as_str().unwrap();
        self.place = match self.apart {
            true => Place::There(start(&self.memory, text)),
            false => {
                let memory = Memory::of(self.memory.file(), MEMORY);
                Place::Here(Box::new(Seat::new(memory, Some(text))))
            }
        };
    }

    fn save_in_vain(&mut self, _: u64) {
        self.ask(&json!({ "op": "save" }));
        self.ask(&json!({ "op": "go-on" }));
    }

    fn end(mut self) -> Vec<Vec<u8>> {
        self.note(json!({ "op": "ask", "request": { "op": "list" } }));
        for (name, ..) in PAGES {
            self.note(json!({ "op": "ask", "request": { "op": "get", "page": name } }));
        }
        self.seen
    }
}

#[test]
fn drivers_do_not_see_that_their_state_pages_are_saved() {
    same_when_saved(0..40, 80, |seed| Pages::new(seed, false));
}

/// The fresh devices are in other processes, as in life.
#[test]
fn another_process_goes_on_with_state_pages() {
    same_when_saved(100..104, 40, |seed| Pages::new(seed, true));
}
