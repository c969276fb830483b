// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A hostile driver does arbitrary things to devices of every class at the same time.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use serde_json::json;
use vbus_core::service::{self, Service, Sizes};
use vbus_core::{
    Access, Bus, Call, Connection, ConnectionState, Device, Endpoint, ErrorCode, Identity,
    MemoryContext, Open, Region,
};
use vbus_driver::requests::Requests;
use vbus_pci::{IrqIndex, Options, PciFunction, device_function, region};
use vbus_shm::Memory;
use vbus_shm::abi::{command, error_code, reg};
use vbus_shm::ring::{DriverEnd, Entry, Layout, Returns};
use vbus_shm::state;
use vbus_test_driver::Random;

use crate::local::{Local, bus};

/// Answers each request with its bytes in reverse order. It has this number of threads of its own.
struct Any(usize);

impl Service for Any {
    fn identity(&self) -> Identity {
        Identity::user("any")
    }
    fn sizes(&self) -> Sizes {
        Sizes { request: 1000, response: 3000 }
    }
    fn threads(&self) -> usize {
        self.0
    }
    fn answer(&self, request: &[u8], response: &mut Vec<u8>) -> Result<(), ErrorCode> {
        response.extend(request.iter().rev());
        if request.first() == Some(&3) {
            return Err(ErrorCode(error_code::CLASS));
        }
        Ok(())
    }
}

/// Passes its calls to a thread, which ends some of them and drops others.
struct Later(Sender<Call>);

impl Device for Later {
    fn identity(&self) -> Identity {
        Identity::user("later")
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(Later(self.0.clone())))
    }
}

impl Connection for Later {
    fn region_added(&mut self, _: Region) -> Result<(), ErrorCode> {
        Ok(())
    }

    fn region_dropped(&mut self, _: u32) -> Result<(), ErrorCode> {
        Ok(())
    }

    fn start_call(&mut self, call: Call) {
        let _ = self.0.send(call);
    }
}

fn later() -> Later {
    let (sender, calls) = channel::<Call>();
    std::thread::spawn(move || {
        for mut call in calls {
            std::thread::yield_now();
            match call.function() {
                0 => call.finish(Err(ErrorCode::BAD_ARGUMENT)),
                1 => drop(call),
                2 => {
                    while !call.is_cancelled() {
                        std::thread::yield_now();
                    }
                }
                _ => {
                    call.buffer().reverse();
                    call.finish(Ok(7));
                }
            }
        }
    });
    Later(sender)
}

const BASE: u64 = 0x1000_0000;
const BYTES: u64 = 4 << 20;
/// Bytes from one ring or page to the next.
const PLACE: u64 = 256 << 10;

/// A driver, and its VMM.
struct Hostile {
    function: PciFunction,
    endpoint: Arc<Endpoint>,
    memory: MemoryContext,
    file: OwnedFd,
    random: Random,
    /// How wild this connection is, 0 to 3.
    wild: u64,
}

impl Hostile {
    fn new(bus: &Bus, name: &str, seed: u64) -> Hostile {
        let endpoint = bus.get(name).unwrap();
        let options = Options { msix: seed % 2 == 0, express: false };
        let function = device_function(endpoint.clone(), options);
        let file = memfd_create("driver", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, BYTES).unwrap();
        let memory = MemoryContext::new();
        memory.map(BASE, BYTES, Some((file.try_clone().unwrap(), 0)), Access::BOTH).unwrap();
        let mut hostile =
            Hostile { function, endpoint, memory, file, random: Random(seed), wild: 0 };
        hostile.fill();
        hostile.map();
        hostile
    }

    /// Fills the memory with frames, each at a multiple of 64 bytes.
    fn fill(&mut self) {
        let window = self.memory.window(BASE, BYTES).unwrap();
        for block in window.words().chunks(8) {
            let mut bytes = [0u8; 64];
            let random = &mut self.random;
            if random.below(4) == 0 {
                // Checksum at 34 + 16, TCP segments of 100 bytes.
                bytes[0] = 1;
                bytes[1] = [0, 1, 4, 5][random.below(4) as usize];
                bytes[4] = random.next() as u8;
                bytes[6] = 34;
                bytes[8] = [16, 6][random.below(2) as usize];
            }
            let to: [u8; 6] = match random.below(4) {
                0 => [0xff; 6],
                1 => [2, 0, 0, 0, 0, 0],
                2 => [2, 0, 0, 0, 0, 1],
                _ => [2, 0, 0, 0, 0, random.next() as u8],
            };
            bytes[12..18].copy_from_slice(&to);
            bytes[18..24].copy_from_slice(&[2, 0, 0, 0, 1, random.next() as u8]);
            let kind: &[u8] = match random.below(4) {
                0 => &[0x81, 0, 0, 5, 8, 0, 0x45],
                1 => &[0x86, 0xdd, 0x60, 0, 0, 0, 0, 60, 6, 64],
                _ => &[8, 0, 0x45, 0, 0, 100, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2],
            };
            bytes[24..24 + kind.len()].copy_from_slice(kind);
            if bytes[24] == 8 {
                bytes[58] = 0x50;
            }
            for (word, bytes) in block.iter().zip(bytes.chunks_exact(8)) {
                word.store(u64::from_le_bytes(bytes.try_into().unwrap()), Ordering::Relaxed);
            }
        }
    }

    fn set_up(&mut self) {
        self.command(command::CLOSE, [0; 4]);
        self.wild = self.random.below(4);
        self.open();
        for id in 0..2 + 2 * self.random.below(3) {
            self.add_id(id as i32);
        }
        let at = self.place();
        self.command(command::CALL, [1, at, 0, 0]);
        self.command(command::CALL, [0, at, 0, 0]);
        self.kick();
    }

    fn kick(&mut self) {
        (0..8).for_each(|n| self.write(0x1000 + 4 * n, &[1, 0, 0, 0]));
    }

    /// Maps the memory as one map, or as several adjoining maps.
    fn map(&mut self) {
        let mut at = 0;
        while at < BYTES {
            let len = match self.random.below(3) {
                0 => BYTES - at,
                1 => ((1 + self.random.below(200)) * 4096).min(BYTES - at),
                _ => (4096 * (1 + self.random.below(3) + 64)).min(BYTES - at),
            };
            let access = if self.random.below(30) == 0 { Access::READ } else { Access::BOTH };
            let _ = self.endpoint.map(
                BASE + at,
                len,
                Some((self.file.try_clone().unwrap(), at)),
                access,
            );
            at += len;
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.function.write(region::BAR0, offset, bytes);
    }

    fn command(&mut self, number: u32, arguments: [u64; 4]) -> u32 {
        for (offset, argument) in (0..).step_by(8).zip(arguments) {
            self.write(reg::ARGUMENT + offset, &argument.to_le_bytes());
        }
        self.write(reg::COMMAND, &number.to_le_bytes());
        let mut result = [0; 4];
        self.function.read(region::BAR0, reg::RESULT, &mut result);
        u32::from_le_bytes(result)
    }

    fn place(&mut self) -> u64 {
        BASE + PLACE * self.random.below(BYTES / PLACE)
    }

    fn open(&mut self) {
        let word = self.memory.window(BASE + BYTES - 8, 8).unwrap();
        word.words()[0].store(77, Ordering::Relaxed);
        let mut features = [0; 8];
        self.function.read(region::BAR0, reg::FEATURES, &mut features);
        let features = u64::from_le_bytes(features);
        let features = match self.random.below(4) {
            0 => features,
            1 => 0,
            _ => features & self.random.next(),
        };
        self.command(command::OPEN, [1, features, BASE + BYTES - 8, 77]);
    }

    fn add(&mut self) {
        let id = [0, 1, 2, 3, 0, 1, 4, 5, 0x100, 0x101, 7][self.random.below(11) as usize];
        self.add_id(id);
    }

    fn add_id(&mut self, id: i32) {
        let is_service = self.endpoint.name().starts_with("any");
        let at = self.place();
        let window = self.memory.window(at, PLACE).unwrap();
        let mut len = PLACE;
        let mut signal = 128;
        if id >= 0x100 || self.wild == 3 && self.random.below(5) == 0 {
            let bytes = [8, 64, 128, 2048, 4096][self.random.below(5) as usize];
            if let Ok(layout) = state::Layout::new(bytes, 2 + self.random.below(4) as u32) {
                let _ = layout.format(&window, 0);
                signal = state::SIGNAL_OFFSET as u64;
            }
        } else {
            // Use the wrong form of returns from time to time.
            let is_wrong = self.random.below(6) == 0 && self.wild == 3;
            let right = match id {
                0 if is_service => Returns::Entries,
                id if id % 2 == 0 => Returns::Counted,
                _ => Returns::Runs,
            };
            let others = [Returns::Counted, Returns::Entries, Returns::Runs];
            let returns = if is_wrong { others[self.random.below(3) as usize] } else { right };
            let layout = Layout::new(2 << self.random.below(8), returns).unwrap();
            let start = self.random.edge();
            let mut end = DriverEnd::create(window, layout, start).unwrap();
            for _ in 0..self.random.below(u64::from(layout.entries()) + 1) {
                let entry = self.entry(id);
                let _ = end.submit(entry);
            }
            let _ = end.post();
        }
        if self.wild == 3 && self.random.below(10) == 0 {
            (len, signal) = (self.random.edge(), self.random.edge());
        }
        let shift = if self.random.below(4) == 0 { 12 } else { 0 };
        let mut addr = at;
        if shift != 0 && len < BYTES {
            // The list of its pages is elsewhere.
            addr = self.place();
            let list = self.memory.window(addr, PLACE).unwrap();
            for (i, word) in (0..len.div_ceil(4096)).zip(list.words()) {
                word.store(at + i * 4096, Ordering::Relaxed);
            }
        }
        self.command(command::REGION_ADD, [u64::from(id as u32) | shift << 48, addr, len, signal]);
    }

    fn entry(&mut self, id: i32) -> Entry {
        let is_service = self.endpoint.name().starts_with("any");
        let random = &mut self.random;
        if self.wild < 3 && (self.wild == 0 || random.below(50) > 0) {
            if is_service {
                let addr = PLACE / 2 + 64 * random.below(1000);
                return Entry {
                    addr,
                    len: random.below(1001) as u32,
                    id: random.next() as u16,
                    flags: 0,
                };
            }
            let addr = BASE + 64 * random.below((BYTES - 70_000) / 64);
            let is_rx = id % 2 == 1;
            let len = if is_rx { 64 + random.below(2000) } else { 26 + random.below(1500) };
            let flags = u16::from(!is_rx && random.below(4) == 0);
            return Entry { addr, len: len as u32, id: 0, flags };
        }
        let addr = match random.below(6) {
            0 => random.edge(),
            1 => PLACE / 2 + 8 * random.below(1000),
            _ => BASE + random.below(BYTES),
        };
        let len = match random.below(5) {
            0 => random.edge() as u32,
            1 => 64 + random.below(64) as u32,
            _ => random.below(3000) as u32,
        };
        let flags = if random.below(4) == 0 { random.next() as u16 } else { 0 };
        Entry { addr, len, id: random.below(40) as u16, flags }
    }

    fn call(&mut self) {
        let at = self.place();
        let window = self.memory.window(at, PLACE).unwrap();
        for word in &window.words()[..80] {
            let value = if self.random.below(2) == 0 { 0 } else { self.random.edge() };
            word.store(value, Ordering::Relaxed);
        }
        let function = self.random.below(9);
        if self.random.below(2) == 0 {
            let sizes = [8, 4, 6, 48, 8, 8];
            window.words()[..2]
                .iter()
                .for_each(|w| w.store(self.random.below(4), Ordering::Relaxed));
            let len = sizes[self.random.below(6) as usize];
            self.command(command::CALL, [function, at, len, 0]);
            return;
        }
        let len = [0, 0, 4, 6, 8, 48, 8 + 6, 520, 56, 24, 300][self.random.below(11) as usize];
        self.command(command::CALL, [function, at, len, 0]);
    }

    /// Writes arbitrary values at arbitrary places.
    fn scribble(&mut self) {
        let at = self.place();
        let window = self.memory.window(at, PLACE).unwrap();
        for _ in 0..self.random.below(20) {
            let near = self.random.below(3) > 0;
            let index = self.random.below(if self.wild < 3 {
                PLACE / 8
            } else if near {
                200
            } else {
                PLACE / 8
            }) as usize;
            let value = self.random.edge();
            window.words()[index].store(value, Ordering::Relaxed);
        }
    }

    fn step(&mut self) {
        match self.random.below(40) {
            0..2 => self.open(),
            2..4 => self.kick(),
            4..8 => self.set_up(),
            8..12 => self.add(),
            12..24 => self.call(),
            24..27 => {
                if self.wild > 1 {
                    self.scribble()
                }
            }
            27 => _ = self.command(command::REGION_DROP, [self.random.0 >> 60, 0, 0, 0]),
            28..34 => self.kick(),
            34 => {
                let (region, offset) = (self.random.below(10) as u32, self.random.below(0x5000));
                let mut bytes = vec![0; self.random.below(9) as usize];
                self.function.read(region, offset, &mut bytes);
                if region != 7 {
                    self.function.write(region, offset, &bytes);
                }
            }
            35 if self.wild > 1 => {
                let argument = |random: &mut Random| random.edge();
                let arguments = [(); 4].map(|()| argument(&mut self.random));
                let number = self.random.below(8) as u32;
                self.command(number, arguments);
            }
            36 if self.random.below(5) == 0 => _ = self.command(command::CLOSE, [0; 4]),
            37 if self.random.below(5) == 0 => match self.random.below(6) {
                0 => self.function.reset(),
                1 => {
                    self.endpoint.unmap_all();
                    self.map();
                }
                2 => self.function.disconnected(),
                3 => self.endpoint.reincarnate(),
                4 => {
                    self.endpoint
                        .unmap(BASE + 4096 * self.random.below(64), 4096 * self.random.below(1024));
                    self.map();
                }
                _ => {
                    self.function.write(region::CONFIG, 4, &[7, 0]);
                    self.function.write(region::CONFIG, 4, &[3, 0]);
                }
            },
            38 => std::thread::yield_now(),
            _ => {
                let _ = self.function.trigger_irq(IrqIndex::Msix, self.random.below(4) as u32);
                self.endpoint.inspect();
            }
        }
    }
}

#[test]
fn no_device_minds_what_a_driver_does() {
    let bus = bus();
    for n in 0..2 {
        let net = json!({
            "mac": format!("02:00:00:00:00:{n:02x}"), "switch": "s", "queue-pairs": 3,
            "mac-changes": true, "backpressure-ms": 1
        });
        bus.create(&format!("net{n}"), "venet", &net).unwrap();
        bus.add(&format!("any{n}"), service::device(Any(2 * n)).unwrap()).unwrap();
    }
    bus.create("pic", "pic", &json!({})).unwrap();
    let pages = ["device", "driver"].map(|end| json!({ "name": end, "bytes": 64, "owner": end }));
    bus.create("state", "state", &json!({ "pages": pages })).unwrap();
    bus.add("later", Arc::new(later())).unwrap();
    let number = |name: &str, other: u64| -> u64 {
        std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(other)
    };
    let (steps, seed) = (number("VBUS_TEST_STEPS", 1500), number("VBUS_TEST_SEED", 1));
    std::thread::scope(|scope| {
        for (i, endpoint) in (0..).zip(bus.devices()) {
            let bus = &bus;
            scope.spawn(move || {
                let mut hostile = Hostile::new(bus, endpoint.name(), seed * 100 + i);
                for step in 0..steps {
                    hostile.step();
                    // A panic leaves a connection in this state.
                    let panicked = ConnectionState::Broken(ErrorCode::FAILED);
                    assert_ne!(endpoint.state(), panicked, "{}, {step}", endpoint.name());
                }
            });
        }
    });
    // An honest driver can use the devices as before.
    for name in ["any0", "any1"] {
        let local = Local::attach(&bus, name, 0);
        let mut requests = Requests::open(local.probe(), "any", 4, 0).unwrap();
        let mut response = [0; 3];
        let wait = || {
            local.wait_interrupt();
            true
        };
        assert_eq!(requests.call(&[1, 2, 9], &mut response, wait), Ok(3));
        assert_eq!(response, [9, 2, 1]);
    }
    for device in bus.devices() {
        let mut function = Local::attach(&bus, device.name(), 0).probe();
        function.open(0).unwrap();
    }
}
