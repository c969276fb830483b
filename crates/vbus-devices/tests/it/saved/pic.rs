// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An interrupt controller goes on in another one, with the devices whose interrupts it carries.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use vbus_core::shm::abi::pic::{CALL_MOVE, CALL_ROUTE, CALL_UNROUTE, NAME_OFFSET, ROUTE_BYTES};
use vbus_core::shm::pic;
use vbus_core::shm::signal::{Armed, end};
use vbus_core::shm::state::{Layout, Reader, SIGNAL_OFFSET};
use vbus_core::{Bus, DeviceState, Endpoint, InterruptSink, RegionRequest, Window};
use vbus_test_driver::Random;
use vbus_test_driver::saved::{
    World, content, forged_devices, same_when_saved, save, save_to_outlast, still,
};

use super::control;
use crate::driver::{Memory, add, bus, call, open};

/// Takes the most urgent line, and ends it.
fn take<M: vbus_core::shm::Memory>(lines: &mut pic::DriverEnd<M>) -> Option<u16> {
    lines.take().inspect(|line| lines.end(*line))
}

/// An interrupt controller goes on with its routes, whether the devices that it serves are restored
/// before it or after it. The interrupts of a controller that is quiesced wait.
#[test]
fn a_pic_goes_on_with_its_routes() {
    let pages = json!({ "pages": [{ "name": "a", "bytes": 8, "owner": "device" }] });
    let make = |bus: &Bus| {
        let source = bus.create_quiesced("source", "state", &pages).unwrap();
        source.set_router("pic");
        [source, bus.create_quiesced("pic", "pic", &json!({})).unwrap()]
    };
    let mut bus_now = bus(1);
    let [mut source, mut pic] = make(&bus_now);
    [&source, &pic].iter().for_each(|endpoint| endpoint.resume());
    let mut memory = Memory::new(&source, 1 << 20);
    memory.share(&pic);
    [&source, &pic].iter().for_each(|endpoint| open(endpoint, &memory, 0).unwrap());
    let layout = Layout::new(8, 4).unwrap();
    let addr = memory.alloc(layout.bytes());
    let window = memory.window(addr, layout.bytes());
    layout.format(&window, 0).unwrap();
    add(&source, 0, addr, layout.bytes(), SIGNAL_OFFSET).unwrap();
    let mut reader = Reader::attach(window, end::Driver).unwrap();
    let addr = memory.alloc(pic::PAGE_BYTES);
    let window = memory.window(addr, pic::PAGE_BYTES);
    let mut lines = pic::DriverEnd::create(window, 32, pic::Nesting::Flat).unwrap();
    pic.region_add(RegionRequest::new(0, addr, pic::PAGE_BYTES as u64)).unwrap();
    let mut route = [0; ROUTE_BYTES];
    route[2] = 5;
    route[NAME_OFFSET..][..6].copy_from_slice(b"source");
    call(&pic, &memory, CALL_ROUTE, &route).unwrap();
    assert_eq!(
        (take(&mut lines), take(&mut lines)),
        (Some(5), None),
        "a route begins with an interrupt"
    );
    let set = |source: &Endpoint, reader: &mut Reader<_, _>| {
        let _ = reader.arm_newer(reader.version());
        control(source, json!({ "op": "set", "page": "a", "text": "x" }));
    };
    for pic_first in [false, true] {
        set(&source, &mut reader);
        assert_eq!((take(&mut lines), take(&mut lines)), (Some(5), None));
        pic.quiesce().unwrap();
        set(&source, &mut reader);
        assert_eq!(take(&mut lines), None, "the page is left alone");
        let (of_source, of_pic) = (save(&source), save(&pic));
        let next = bus(1);
        let [other_source, other_pic] = make(&next);
        [&other_source, &other_pic].iter().for_each(|endpoint| memory.share(endpoint));
        if pic_first {
            other_pic.restore(&of_pic).unwrap();
        }
        other_source.restore(&of_source).unwrap();
        if !pic_first {
            other_pic.restore(&of_pic).unwrap();
        }
        assert_eq!(take(&mut lines), None, "nothing moves before it goes on");
        [&other_source, &other_pic].iter().for_each(|endpoint| endpoint.resume());
        assert_eq!(
            (take(&mut lines), take(&mut lines)),
            (Some(5), None),
            "the interrupt that waited"
        );
        (source, pic, bus_now) = (other_source, other_pic, next);
    }
    assert_eq!(bus_now.devices().len(), 2);
    call(&pic, &memory, CALL_UNROUTE, &route).unwrap();
    set(&source, &mut reader);
    assert_eq!(take(&mut lines), None);
}

/// Lines of each processor's page.
const LINES: u16 = 8;

fn own_pages() -> Value {
    json!({ "pages": [{ "name": "a", "bytes": 8, "owner": "device" }] })
}

/// Notes that an interrupt of the device's own kind has come.
#[derive(Default)]
struct Told(AtomicBool);

impl InterruptSink for Told {
    fn trigger(&self, _: u16) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A device of one page, whose interrupts a controller may carry. The driver reads the page when an
/// interrupt comes, and not otherwise.
struct Source {
    endpoint: Arc<Endpoint>,
    told: Arc<Told>,
    addr: u64,
    reader: Reader<Window, end::Driver>,
    /// The version that the driver has read.
    version: u64,
    /// Processor and line of its route.
    route: Option<(usize, u16)>,
}

/// A controller of two processors, and two sources.
struct Board {
    bus: Bus,
    pic: Arc<Endpoint>,
    sources: Vec<Source>,
    memory: Memory,
    pages: [u64; 2],
    cpus: [Option<(u32, pic::DriverEnd<Window>)>; 2],
    random: Random,
    /// How often the devices were renewed.
    renewed: usize,
    seen: Vec<String>,
    /// What a keeper has of each device. `None`: there is none, and all are saved when they go.
    kept: Option<Vec<DeviceState>>,
}

impl Board {
    fn new(seed: u64) -> Board {
        let bus = bus(1);
        let pic = bus.create("pic", "pic", &json!({ "cpus": 2 })).unwrap();
        let mut memory = Memory::new(&pic, 1 << 20);
        open(&pic, &memory, 0).unwrap();
        let pages = [0, 1].map(|_| memory.alloc(pic::PAGE_BYTES));
        let layout = Layout::new(8, 4).unwrap();
        let sources = ["s0", "s1"].map(|name| {
            let endpoint = bus.create(name, "state", &own_pages()).unwrap();
            endpoint.set_router("pic");
            memory.share(&endpoint);
            let told = Arc::new(Told::default());
            endpoint.set_interrupt_sink(told.clone());
            let addr = memory.alloc(layout.bytes());
            let window = memory.window(addr, layout.bytes());
            layout.format(&window, 0).unwrap();
            let reader = Reader::attach(window, end::Driver).unwrap();
            Source { endpoint, told, addr, reader, version: 0, route: None }
        });
        let (sources, cpus) = (sources.into(), [None, None]);
        let (random, seen) = (Random(seed), Vec::new());
        let (renewed, kept) = (0, None);
        let mut board =
            Board { bus, pic, sources, memory, pages, cpus, random, renewed, seen, kept };
        (0..2).for_each(|source| board.open(source));
        (0..2).for_each(|cpu| board.add_page(cpu));
        board
    }

    /// As [`new`](Self::new), of devices that have a keeper.
    fn kept(seed: u64) -> Board {
        let mut board = Board::new(seed);
        board.kept = Some(Vec::new());
        board.commit();
        board
    }

    /// Gives the keeper the states, as after a message, if there is one.
    fn commit(&mut self) {
        if self.kept.is_some() {
            let all = self.endpoints();
            self.kept = Some(all.iter().map(|endpoint| save_to_outlast(endpoint)).collect());
        }
    }

    fn open(&mut self, number: usize) {
        let source = &mut self.sources[number];
        open(&source.endpoint, &self.memory, 0).unwrap();
        let layout = Layout::new(8, 4).unwrap();
        let window = self.memory.window(source.addr, layout.bytes());
        layout.format(&window, 0).unwrap();
        add(&source.endpoint, 0, source.addr, layout.bytes(), SIGNAL_OFFSET).unwrap();
        source.version = 0;
        source.reader = Reader::attach(window, end::Driver).unwrap();
        self.look(number);
    }

    /// The driver reads the page of a source.
    fn look(&mut self, number: usize) {
        let source = &mut self.sources[number];
        loop {
            let mut value = [0; 8];
            let version = source.reader.read(&mut value).unwrap();
            if version != source.version {
                source.version = version;
                self.seen.push(format!("source {number}: {version} {value:?}"));
            }
            if source.reader.arm_newer(version) == Armed::Waiting {
                return;
            }
        }
    }

    fn add_page(&mut self, cpu: usize) {
        let addr = self.pages[cpu];
        let window = self.memory.window(addr, pic::PAGE_BYTES);
        let end = pic::DriverEnd::create(window, LINES, pic::Nesting::Flat).unwrap();
        let request = RegionRequest::new(cpu as u32, addr, pic::PAGE_BYTES as u64);
        self.cpus[cpu] = Some((self.pic.region_add(request).unwrap(), end));
    }

    /// Takes all interrupts that have come.
    fn take_all(&mut self) {
        let mut lines = Vec::new();
        for (cpu, page) in self.cpus.iter_mut().enumerate() {
            let Some((_, end)) = page else { continue };
            lines.extend(std::iter::from_fn(|| take(end)).map(|line| (cpu, line)));
        }
        for number in 0..2 {
            let source = &self.sources[number];
            let by_line = source.route.is_some_and(|route| lines.contains(&route));
            if source.told.0.swap(false, Ordering::Relaxed) || by_line {
                self.look(number);
            }
        }
    }

    /// ROUTE, UNROUTE or MOVE.
    fn call(&mut self, function: u32, number: usize, (cpu, line): (usize, u16)) {
        // What is pending may be pending because the controller has begun anew.
        self.take_all();
        let mut buffer = [0; ROUTE_BYTES];
        buffer[2..4].copy_from_slice(&line.to_le_bytes());
        buffer[4] = cpu as u8;
        buffer[NAME_OFFSET..][..2].copy_from_slice(["s0", "s1"][number].as_bytes());
        let result = call(&self.pic, &self.memory, function, &buffer);
        self.seen.push(format!("{function} of {number} to {cpu} {line}: {result:?}"));
        let route = &mut self.sources[number].route;
        match (result, function) {
            (Ok(_), CALL_UNROUTE) => *route = None,
            (Ok(_), _) => *route = Some((cpu, line)),
            (Err(_), _) => {}
        }
    }

    fn endpoints(&self) -> [Arc<Endpoint>; 3] {
        [&self.pic, &self.sources[0].endpoint, &self.sources[1].endpoint].map(Arc::clone)
    }
}

/// A state without what passes by itself, and with the routes of a controller in one order.
fn unmoving(endpoint: &Endpoint) -> Value {
    let mut value = content(&endpoint.save().unwrap());
    still(&mut value["counters"]);
    if let Some(Value::Array(routes)) = value.pointer_mut("/connection/open/state/routes") {
        routes.sort_by_key(Value::to_string);
    }
    value
}

impl World for Board {
    fn step(&mut self) {
        let n = self.random.next();
        let number = n as usize % 2;
        // There is a third processor, and a line too many.
        let to = (self.random.index(5) / 2, self.random.below(u64::from(LINES) + 1) as u16);
        match self.random.below(14) {
            0..=4 => {
                let text = format!("{:x}", n % 0xffff);
                let request = json!({ "op": "set", "page": "a", "text": text });
                control(&self.sources[number].endpoint, request);
            }
            5..=7 => self.take_all(),
            8..=9 => self.call(CALL_ROUTE, number, to),
            10 => self.call(CALL_UNROUTE, number, to),
            11 => self.call(CALL_MOVE, number, to),
            12 => {
                self.take_all();
                match self.cpus[number].take() {
                    Some((handle, _)) => {
                        self.pic.region_drop(handle.into()).unwrap();
                        for source in &mut self.sources {
                            source.route.take_if(|(cpu, _)| *cpu == number);
                        }
                    }
                    None => self.add_page(number),
                }
            }
            _ => {
                self.take_all();
                self.sources[number].endpoint.close();
                self.sources[number].route = None;
                self.open(number);
            }
        }
        self.commit();
    }

    fn renew(&mut self) {
        let all = self.endpoints();
        all.iter().for_each(|endpoint| endpoint.quiesce().unwrap());
        let next = bus(1);
        let mut fresh: Vec<_> = all
            .iter()
            .map(|old| {
                let (class, settings) = match old.name() {
                    "pic" => ("pic", json!({ "cpus": 2 })),
                    _ => ("state", own_pages()),
                };
                let endpoint = next.create_quiesced(old.name(), class, &settings).unwrap();
                if class == "state" {
                    endpoint.set_router("pic");
                }
                self.memory.share(&endpoint);
                endpoint
            })
            .collect();
        for (source, endpoint) in self.sources.iter().zip(&fresh[1..]) {
            endpoint.set_interrupt_sink(source.told.clone());
        }
        // The controller may come first, last or between the two.
        let mut order = [0, 1, 2];
        order.rotate_left(self.renewed % 3);
        self.renewed += 1;
        for number in order {
            if let Some(kept) = &self.kept {
                fresh[number].restore(&kept[number]).unwrap();
                continue;
            }
            let state = save(&all[number]);
            fresh[number].restore(&state).unwrap();
            assert_eq!(unmoving(&fresh[number]), unmoving(&all[number]), "as it was restored");
        }
        fresh.iter().for_each(|endpoint| endpoint.resume());
        for source in self.sources.iter_mut().rev() {
            source.endpoint = fresh.pop().unwrap();
        }
        (self.pic, self.bus) = (fresh.pop().unwrap(), next);
        self.commit();
    }

    fn save_in_vain(&mut self, n: u64) {
        let endpoint = &self.endpoints()[n as usize % 3];
        save(endpoint);
        endpoint.resume();
    }

    fn end(mut self) -> Vec<Vec<u8>> {
        self.take_all();
        for (number, source) in self.sources.iter().enumerate() {
            let newest = source.reader.version();
            assert_eq!(source.version, newest, "source {number}: an interrupt was lost");
        }
        let shown = self.pic.inspect()["device"]["routes"].to_string();
        assert_eq!(self.bus.devices().len(), 3);
        self.seen.push(shown);
        self.seen.into_iter().map(String::into_bytes).collect()
    }
}

#[test]
fn drivers_do_not_see_that_their_interrupt_controller_is_saved() {
    same_when_saved(0..60, 80, Board::new);
}

/// The same if the process is killed, and another one goes on from what a keeper has.
#[test]
fn drivers_do_not_see_that_the_process_of_their_interrupt_controller_was_killed() {
    same_when_saved(0..60, 80, Board::kept);
}

#[test]
fn forged_states_of_a_pic_do_no_harm() {
    let mut board = Board::new(1);
    board.call(CALL_ROUTE, 0, (1, 3));
    board.call(CALL_ROUTE, 1, (0, 5));
    let state = save(&board.pic);
    board.bus.remove("pic").unwrap();
    // Its sources are there: some of the routes can be made again.
    let class = ("pic", &json!({ "cpus": 2 }));
    forged_devices(&board.bus, class, &state, Some(&board.memory), 0..1500);
}
