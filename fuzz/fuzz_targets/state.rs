// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Saved states of devices that somebody has forged (spec/state-format.md).
//!
//! Half of the inputs are a text, which is read as a state of each kind. The others change the
//! state of a device of one class, whose driver has it open, and a fresh device goes on from what
//! comes of it, or refuses it. Then its tasks run, and it is saved, closed and removed.
#![no_main]

use std::cell::OnceCell;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use rustix::io::Errno;
use serde_json::{Map, Value, json};
use vbus_core::shm::abi::{sched, venet};
use vbus_core::shm::{pic, ring, state};
use vbus_core::state::{DOCUMENT_MAX, Document, check_weight};
use vbus_core::{Bus, DeviceClass, DeviceState, Endpoint, RegionRequest};
use vbus_fuzz::OpenFiles;
use vbus_net::{Direct, Switches};
use vbus_pci::{FunctionState, IrqIndex, Options, Peer, device_function};
use vbus_sched::interview::Language;
use vbus_sched::{Held, Limits, SchedClass, Setting, TakeError, Threads};
use vbus_test_driver::saved::{content, document, save, try_out};
use vbus_test_driver::virtio::Driver;
use vbus_test_driver::{Memory, add, bus, open};
use vbus_virtio::net::VirtioNetClass;
use vfio_user_protocol::state::ServerData;

/// Bytes of each driver's memory.
const MEMORY: u64 = 4 << 20;

/// A text, or an array, that is as long as this gets no longer.
const LONG: usize = 4096;

/// Threads that are only here.
struct Invented;

impl Threads for Invented {
    fn check(&self, _: &Limits) -> Result<(), String> {
        Ok(())
    }

    fn ask_vmm(&self, _: &Path, _: Language) -> io::Result<(OwnedFd, i32)> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn take(&self, _: Option<i32>, _: i32) -> Result<Box<dyn Held>, TakeError> {
        Ok(Box::new(Thread))
    }

    fn is_privileged(&self) -> bool {
        true
    }

    fn tells_time(&self) -> bool {
        true
    }
}

struct Thread;

impl Held for Thread {
    fn time(&self) -> Duration {
        Duration::ZERO
    }

    fn own_nice(&mut self) -> Result<i32, Errno> {
        Ok(0)
    }

    fn apply(&mut self, setting: Setting) -> Result<(), Errno> {
        if setting.priority == 1 { Err(Errno::PERM) } else { Ok(()) }
    }

    fn restore(&mut self) -> Result<bool, Errno> {
        Ok(true)
    }
}

/// A class, and the state of a device of it whose driver has it open.
struct Subject {
    bus: Bus,
    class: &'static str,
    settings: Value,
    memory: Memory,
    /// It is the state of the whole function.
    function: bool,
    state: Value,
}

/// A device with a driver that has opened it.
struct Opened {
    bus: Bus,
    endpoint: Arc<Endpoint>,
    memory: Memory,
}

impl Opened {
    fn new(
        classes: Vec<Box<dyn DeviceClass>>,
        class: &str,
        settings: &Value,
        features: u64,
    ) -> Self {
        let bus = bus(1, classes);
        let endpoint = bus.create("first", class, settings).expect("good settings");
        let memory = Memory::new(&endpoint, MEMORY);
        open(&endpoint, &memory, features).expect("a good handshake");
        Opened { bus, endpoint, memory }
    }

    /// Registers a state page.
    fn page(&mut self, id: u32, bytes: u32) {
        let layout = state::Layout::new(bytes, 4).expect("a layout");
        let at = self.memory.alloc(layout.bytes());
        layout.format(&self.memory.window(at, layout.bytes()), 0).expect("formatted");
        add(&self.endpoint, id, at, layout.bytes(), state::SIGNAL_OFFSET).expect("a page");
    }

    /// Registers a ring.
    fn ring(&mut self, id: u32, returns: ring::Returns) {
        let layout = ring::Layout::new(16, returns).expect("a layout");
        let at = self.memory.alloc(layout.bytes());
        let window = self.memory.window(at, layout.bytes());
        drop(ring::DriverEnd::create(window, layout, 0).expect("a ring"));
        add(&self.endpoint, id, at, layout.bytes(), ring::SIGNAL_OFFSET).expect("a ring");
    }

    fn saved(self, class: &'static str, settings: Value) -> Subject {
        let state = content(&save(&self.endpoint));
        self.endpoint.close();
        self.bus.remove("first").expect("it is there");
        Subject { bus: self.bus, class, settings, memory: self.memory, function: false, state }
    }
}

fn pages() -> Subject {
    let settings = json!({ "pages": [
        { "name": "setpoint", "bytes": 16, "owner": "device", "initial": "x" },
        { "name": "load", "bytes": 8, "owner": "driver" },
    ] });
    let mut opened = Opened::new(vbus_devices::classes(), "state", &settings, 0);
    opened.page(0, 16);
    opened.page(1, 8);
    opened.saved("state", settings)
}

fn nic() -> Subject {
    let settings = json!({ "mac": "02:00:00:00:00:01", "queue-pairs": 2, "learn": true });
    let features = venet::F_TX | venet::F_RX | venet::F_MAC | venet::F_VLAN | venet::F_RSS;
    let mut opened = Opened::new(vbus_devices::classes(), "venet", &settings, features);
    for pair in 0..2 {
        opened.ring(venet::tx(pair), ring::Returns::Counted);
        opened.ring(venet::rx(pair), ring::Returns::Runs);
    }
    opened.page(venet::REGION_STATUS, venet::status_page::BYTES);
    let (endpoint, memory) = (&opened.endpoint, &opened.memory);
    vbus_test_driver::call(endpoint, memory, venet::CALL_START, &[]).expect("started");
    opened.saved("venet", settings)
}

fn card() -> Subject {
    let class = VirtioNetClass::on(Switches::default(), Arc::new(Direct));
    let bus = bus(1, vec![Box::new(class)]);
    let settings = json!({ "mac": "02:00:00:00:00:02", "rss": true, "queue-pairs": 2 });
    let endpoint = bus.create("first", "virtio-net", &settings).expect("good settings");
    let function = device_function(endpoint.clone(), Options::default());
    let mut driver = Driver::new(endpoint.clone(), function);
    let _signal = driver.connect(IrqIndex::Intx, 0);
    // VIRTIO_F_VERSION_1.
    assert!(driver.agree(1 << 32));
    let _queues = [driver.queue(0, 16), driver.queue(1, 16)];
    driver.start();
    endpoint.quiesce().expect("no call");
    let state = content(&driver.function.save().expect("it can be saved"));
    let Driver { function, memory, .. } = driver;
    drop((function, endpoint));
    bus.remove("first").expect("it is there");
    Subject { bus, class: "virtio-net", settings, memory, function: true, state }
}

fn uplink() -> Subject {
    let bus = bus(1, vbus_devices::classes());
    let path = std::env::temp_dir().join(format!("vbus-fuzz-{}.sock", std::process::id()));
    let settings = json!({ "switch": "t", "backend": "stream", "listen": path });
    let endpoint = bus.create("first", "uplink", &settings).expect("good settings");
    let mut state = content(&save(&endpoint));
    let frame = "00".repeat(12) + &"02".repeat(60);
    (state["device"]["frames"], state["device"]["held"]) = (json!([frame]), json!(frame));
    drop(endpoint);
    bus.remove("first").expect("it is there");
    let memory = Memory::alone(MEMORY);
    Subject { bus, class: "uplink", settings, memory, function: false, state }
}

fn controller() -> Subject {
    let settings = json!({ "cpus": 2 });
    let mut opened = Opened::new(vbus_devices::classes(), "pic", &settings, 0);
    for cpu in 0..2 {
        let at = opened.memory.alloc(pic::PAGE_BYTES);
        let window = opened.memory.window(at, pic::PAGE_BYTES);
        drop(pic::DriverEnd::create(window, 32, pic::Nesting::Flat).expect("a page"));
        let request = RegionRequest::new(cpu, at, pic::PAGE_BYTES as u64);
        opened.endpoint.region_add(request).expect("a page");
    }
    opened.saved("pic", settings)
}

fn priorities() -> Subject {
    let settings = json!({
        "threads": [1, 2], "boost-ms": 60_000, "changes": 100_000, "boost-share": 100,
        "allow": ["normal", "fifo", "rr"], "priority-max": 30, "nice-min": -5,
    });
    let class = SchedClass::through(Arc::new(Invented));
    let mut opened = Opened::new(vec![Box::new(class)], "sched", &settings, 0);
    for cpu in 0..2 {
        opened.page(sched::request_page(cpu), sched::request::BYTES);
        opened.page(sched::report_page(cpu), sched::report::BYTES);
    }
    opened.saved("sched", settings)
}

const SUBJECTS: [fn() -> Subject; 6] = [pages, nic, card, uplink, controller, priorities];

thread_local! {
    static MADE: [OnceCell<Subject>; SUBJECTS.len()] = const { [const { OnceCell::new() }; 6] };
}

/// The value at the end of a path: each byte chooses a child, 255 none.
fn find<'a>(value: &'a mut Value, path: &[u8]) -> &'a mut Value {
    let Some((&choice, rest)) = path.split_first() else { return value };
    let count = match &*value {
        Value::Object(fields) => fields.len(),
        Value::Array(items) => items.len(),
        _ => 0,
    };
    if choice == 255 || count == 0 {
        return value;
    }
    let at = usize::from(choice) % count;
    match value {
        Value::Object(fields) => find(fields.values_mut().nth(at).expect("counted"), rest),
        Value::Array(items) => find(&mut items[at], rest),
        other => other,
    }
}

/// Changes a value: seven bytes of path, one that says what to do, and a number.
fn change(state: &mut Value, step: &[u8; 16]) {
    let number = u64::from_le_bytes(step[8..].try_into().expect("8 bytes"));
    let small = usize::from(step[8]) % 20;
    let value = find(state, &step[..7]);
    match (step[7] % 10, &mut *value) {
        (0, _) => *value = json!(number),
        (1, Value::Number(old)) => {
            *value = json!(old.as_u64().unwrap_or(0).wrapping_add_signed((number as i8).into()));
        }
        (2, _) => *value = Value::Null,
        (3, Value::Bool(old)) => *old = !*old,
        (4, Value::Array(items)) if !items.is_empty() => drop(items.remove(small % items.len())),
        (4, Value::Object(fields)) => {
            let name = fields.keys().nth(small).cloned();
            name.map(|name| fields.remove(&name));
        }
        // Not without end: the text of a state is bounded, and checked for its weight.
        (5, Value::Array(items)) if items.len() < LONG => {
            let one = items.first().cloned().unwrap_or(json!(number));
            items.extend(std::iter::repeat_n(one, small));
        }
        (6, Value::String(text)) => {
            let cut = (0..=text.len().min(small * 8)).rev().find(|at| text.is_char_boundary(*at));
            text.truncate(cut.unwrap_or(0));
        }
        (6, Value::Array(items)) => items.reverse(),
        (7, Value::String(text)) if text.len() < LONG => *text = text.repeat(small),
        (7, Value::Array(items)) if !items.is_empty() => {
            let len = items.len();
            items.swap(small % len, usize::from(step[9]) % len);
        }
        (8, _) => *value = json!(number.to_string()),
        (9, Value::Object(_)) => *value = Value::Object(Map::new()),
        _ => *value = json!([number, number]),
    }
}

/// A text is read as a state of each kind, or refused. What is read can be written, and read again.
fn read(text: &str) {
    fn one<D: Document + PartialEq + std::fmt::Debug>(text: &str) {
        let Ok(state) = D::from_text(text) else { return };
        assert!(text.len() <= DOCUMENT_MAX && check_weight(text.as_bytes()).is_ok());
        let Ok(again) = state.to_text() else { return };
        let again = D::from_text(&again).expect("what was written is read");
        assert_eq!(again, state);
    }
    one::<DeviceState>(text);
    one::<FunctionState>(text);
    if check_weight(text.as_bytes()).is_ok() {
        let _ = serde_json::from_str::<ServerData>(text);
    }
}

/// A fresh device goes on from the state, or refuses it: false.
fn restore(subject: &Subject, forged: &Value) -> bool {
    let Subject { bus, class, settings, memory, .. } = subject;
    let endpoint = bus.create_quiesced("forged", class, settings).expect("good settings");
    memory.share(&endpoint);
    let mut is_taken = false;
    if subject.function {
        if let Some(state) = document::<FunctionState>(forged) {
            let mut function = device_function(endpoint.clone(), Options::default());
            is_taken = function.restore(&state, Peer::Other).is_ok();
            try_out(&endpoint, 5, 0, || drop(function.save()));
        }
    } else if let Some(state) = document::<DeviceState>(forged) {
        is_taken = endpoint.restore(&state).is_ok();
        try_out(&endpoint, 8, 0, || drop(endpoint.save()));
    }
    endpoint.close();
    bus.remove("forged").expect("added above");
    is_taken
}

fuzz_target!(|input: &[u8]| {
    let Some((&kind, rest)) = input.split_first() else { return };
    if kind & 0x80 != 0 {
        return read(&String::from_utf8_lossy(rest));
    }
    let number = usize::from(kind) % SUBJECTS.len();
    MADE.with(|made| {
        let subject = made[number].get_or_init(SUBJECTS[number]);
        let files = OpenFiles::count();
        let mut forged = subject.state.clone();
        for step in rest.chunks_exact(16).take(32) {
            change(&mut forged, step.try_into().expect("16 bytes"));
        }
        let is_taken = restore(subject, &forged);
        assert!(is_taken || forged != subject.state, "what nobody has changed is refused");
        files.check();
    });
});
