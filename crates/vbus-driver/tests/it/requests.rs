// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tests request and response: the driver's half against the device's half.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::time::Duration;

use vbus_core::service::{self, Service, Sizes};
use vbus_core::{Bus, Executor, Identity, Progress, Task, Tuning};
use vbus_driver::requests::Requests;
use vbus_driver::{Error, ErrorCode, Function, Hal};
use vbus_shm::abi::{error_code, service as abi};
use vbus_shm::ring::{DriverEnd, Entry, Layout, Returns, SIGNAL_OFFSET};

use crate::local::{Local, bus, until};

const REQUEST_MAX: usize = 5000;
const RESPONSE_MAX: usize = 20_000;

/// Answers each request with its bytes in reverse order, four times. It refuses an empty request,
/// and gives too long an answer to `[0xff]`.
struct Four {
    /// The number of its own threads, and the gate that they wait for.
    threads: usize,
    gate: Arc<Gate>,
}

/// A gate. A thread that passes waits while the gate is closed.
#[derive(Default)]
struct Gate {
    is_closed: Mutex<bool>,
    news: Condvar,
}

impl Gate {
    fn pass(&self) {
        drop(self.news.wait_while(self.is_closed.lock().unwrap(), |closed| *closed).unwrap());
    }

    fn set(&self, closed: bool) {
        *self.is_closed.lock().unwrap() = closed;
        self.news.notify_all();
    }
}

impl Service for Four {
    fn identity(&self) -> Identity {
        Identity::user("four")
    }

    fn sizes(&self) -> Sizes {
        Sizes { request: REQUEST_MAX as u32, response: RESPONSE_MAX as u32 }
    }

    fn config(&self) -> Vec<u8> {
        vec![7, 8, 9]
    }

    fn threads(&self) -> usize {
        self.threads
    }

    fn answer(&self, request: &[u8], response: &mut Vec<u8>) -> Result<(), ErrorCode> {
        self.gate.pass();
        match request {
            [] => Err(ErrorCode(error_code::CLASS + 5)),
            [0xff] => {
                response.resize(RESPONSE_MAX + 1, 1);
                Ok(())
            }
            [0xfe] => panic!("as asked"),
            request => {
                let once: Vec<u8> = request.iter().rev().copied().collect();
                response.extend(once.repeat(4));
                Ok(())
            }
        }
    }
}

fn device(bus: &Bus, threads: usize, page_shift: u8) -> (Local, Arc<Gate>) {
    let gate = Arc::new(Gate::default());
    bus.add("four0", service::device(Four { threads, gate: gate.clone() }).unwrap()).unwrap();
    (Local::attach(bus, "four0", page_shift), gate)
}

fn waits(local: &Local) -> impl FnMut() -> bool {
    let local = local.clone();
    move || {
        local.wait_interrupt();
        true
    }
}

#[test]
fn a_call_gets_its_response_whatever_its_length() {
    for (threads, page_shift) in [(0, 0), (0, 12), (2, 0)] {
        let bus = bus();
        let (local, _) = device(&bus, threads, page_shift);
        let mut requests = Requests::open(local.probe(), "four", 3, 0).unwrap();
        assert_eq!((requests.request_max(), requests.response_max()), (REQUEST_MAX, RESPONSE_MAX));
        let mut own = [1; 5];
        requests.config(&mut own).unwrap();
        assert_eq!(own, [7, 8, 9, 0, 0]);
        let mut response = vec![0; RESPONSE_MAX];
        for len in [1, 2, 7, 8, 9, 63, 64, 4095, 4096, REQUEST_MAX] {
            let request: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            let got = requests.call(&request, &mut response, waits(&local)).unwrap();
            let expected: Vec<u8> = request.iter().rev().copied().collect();
            assert_eq!(got, 4 * len);
            assert!(response[..got] == expected.repeat(4), "{len} bytes");
        }
        // A short buffer gets the beginning of the response.
        let mut short = [0; 3];
        assert_eq!(requests.call(b"abc", &mut short, waits(&local)), Ok(12));
        assert_eq!(&short, b"cba");
        // The device refuses with the class's own error code, then fails, and goes on.
        let refused = |result| match result {
            Err(Error::Refused { code, .. }) => code,
            other => panic!("{other:?}"),
        };
        let class = refused(requests.call(&[], &mut short, waits(&local)));
        assert_eq!(class, ErrorCode(error_code::CLASS + 5));
        let failed = refused(requests.call(&[0xff], &mut short, waits(&local)));
        assert_eq!(failed, ErrorCode::FAILED);
        if threads > 0 {
            let failed = refused(requests.call(&[0xfe], &mut short, waits(&local)));
            assert_eq!(failed, ErrorCode::FAILED);
        }
        let long = vec![0; REQUEST_MAX + 1];
        let result = requests.call(&long, &mut short, waits(&local));
        assert!(matches!(result, Err(Error::Unsupported(_))));
        assert_eq!(requests.call(b"abc", &mut short, waits(&local)), Ok(12));
    }
}

#[test]
fn many_requests_are_under_way_at_a_time() {
    for threads in [0, 3] {
        let bus = bus();
        let (local, _) = device(&bus, threads, 0);
        let mut requests = Requests::open(local.probe(), "four", 5, 0).unwrap();
        let (mut sent, mut done) = (0u32, 0u32);
        let mut expected = std::collections::HashMap::new();
        let mut response = [0; 16];
        while done < 1000 {
            while sent < 1000 {
                let Some(id) = requests.submit(&sent.to_be_bytes()).unwrap() else { break };
                assert!(expected.insert(id, sent).is_none(), "an id is used twice");
                sent += 1;
            }
            requests.post();
            let completion = until("a response", || requests.complete(&mut response).unwrap());
            assert_eq!(completion.result, Ok(16));
            let value = u32::from_le_bytes(response[12..].try_into().unwrap());
            assert_eq!(expected.remove(&completion.id), Some(value));
            done += 1;
        }
        assert_eq!(requests.space(), 5);
    }
}

#[test]
fn a_class_that_blocks_holds_up_nobody() {
    let bus = bus();
    let (local, gate) = device(&bus, 1, 0);
    bus.add("other", service::device(Four { threads: 0, gate: Arc::default() }).unwrap()).unwrap();
    let other = Local::attach(&bus, "other", 0);
    let mut others = Requests::open(other.probe(), "four", 1, 0).unwrap();

    gate.set(true);
    for _ in 0..35 {
        // The device has one thread, however often a driver opens, asks and closes.
        let mut requests = Requests::open(local.probe(), "four", 64, 0).unwrap();
        while requests.submit(b"abc").unwrap().is_some() {}
        requests.post();
    }
    let mut response = [0; 12];
    assert_eq!(others.call(b"xyz", &mut response, waits(&other)), Ok(12));
    let mut requests = Requests::open(local.probe(), "four", 64, 0).unwrap();
    let id = requests.submit(b"abc").unwrap().unwrap();
    requests.post();
    assert!(requests.complete(&mut response).unwrap().is_none());
    gate.set(false);
    let completion = until("the response", || requests.complete(&mut response).unwrap());
    assert_eq!((completion.id, completion.result), (id, Ok(12)));
    assert_eq!(&response, b"cbacbacbacba");
    let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let named = threads.filter(|task| {
        std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name == "vbus-service\n")
    });
    // Other tests of this process have some of their own.
    assert!(named.count() < 20);
    // The device is removed while a request is in progress. No thread waits for the request.
    gate.set(true);
    requests.submit(b"abc").unwrap();
    requests.post();
    bus.remove("four0").unwrap();
    gate.set(false);
}

#[test]
fn a_hostile_driver_ends_its_own_connection() {
    const BUFFER: u64 = RESPONSE_MAX as u64;
    let bus = bus();
    let (local, _) = device(&bus, 0, 0);
    let layout = Layout::new(4, Returns::Entries).unwrap();
    let bytes = layout.bytes() + RESPONSE_MAX;
    let first = layout.bytes() as u64;
    let end = bytes as u64;
    for (addr, len, flags, expected) in [
        (first, REQUEST_MAX as u32 + 1, 0, ErrorCode::BAD_LENGTH),
        (first, u32::MAX, 0, ErrorCode::BAD_LENGTH),
        (first + 8, 1, 0, ErrorCode::BAD_ADDRESS),
        (first - 8, 1, 0, ErrorCode::BAD_ADDRESS),
        (0, 1, 0, ErrorCode::BAD_ADDRESS),
        (end - 8, 1, 0, ErrorCode::BAD_ADDRESS),
        (u64::MAX - BUFFER, 1, 0, ErrorCode::BAD_ALIGNMENT),
        (u64::MAX - 7, 1, 0, ErrorCode::BAD_ADDRESS),
        (first + 1, 1, 0, ErrorCode::BAD_ALIGNMENT),
        (first, 1, 1, ErrorCode::BAD_ARGUMENT),
    ] {
        let mut function = local.probe();
        function.open(0).unwrap();
        let memory = local.alloc(bytes).unwrap();
        let mut ring = DriverEnd::create(memory.clone(), layout, 0).unwrap();
        let region =
            function.region_add(abi::REGION, 0, &memory, (0, bytes), Some(SIGNAL_OFFSET)).unwrap();
        ring.submit(Entry { addr, len, id: 0, flags }).unwrap();
        if ring.post().is_wanted() {
            function.ring(region.handle());
        }
        let ended = until("the end of the connection", || match function.check() {
            Err(Error::Broken(code)) => Some(code),
            _ => None,
        });
        assert_eq!(ended, expected, "{addr:#x} {len} {flags}");
    }
    // Regions that the class does not have.
    let mut function = local.probe();
    function.open(0).unwrap();
    let memory = local.alloc(bytes).unwrap();
    let mut add = |id, layout| {
        DriverEnd::create(memory.clone(), layout, 0).unwrap();
        match function.region_add(id, 0, &memory, (0, bytes), Some(SIGNAL_OFFSET)) {
            Err(Error::Refused { code, .. }) => Some(code),
            _ => None,
        }
    };
    assert_eq!(add(1, layout), Some(ErrorCode::BAD_ARGUMENT));
    let counted = Layout::new(4, Returns::Counted).unwrap();
    assert_eq!(add(abi::REGION, counted), Some(ErrorCode::BAD_LAYOUT));
    assert_eq!(add(abi::REGION, layout), None);
    assert_eq!(add(abi::REGION, layout), Some(ErrorCode::EXISTS));
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let bus = bus();
    let (local, _) = device(&bus, 0, 0);
    assert!(matches!(Requests::open(local.probe(), "five", 1, 0), Err(Error::WrongClass(_))));
    for depth in [0, 65] {
        let opened = Requests::open(local.probe(), "four", depth, 0);
        assert!(matches!(opened, Err(Error::Unsupported(_))));
    }
    struct Large(Sizes);
    impl Service for Large {
        fn identity(&self) -> Identity {
            Identity::user("large")
        }
        fn sizes(&self) -> Sizes {
            self.0
        }
        fn answer(&self, _: &[u8], _: &mut Vec<u8>) -> Result<(), ErrorCode> {
            Ok(())
        }
    }
    for (request, response) in [(0, 1), (1, 0), (abi::BYTES_MAX + 1, 1)] {
        assert!(service::device(Large(Sizes { request, response })).is_err());
    }
    let largest = Sizes { request: abi::BYTES_MAX, response: abi::BYTES_MAX };
    bus.add("large", service::device(Large(largest)).unwrap()).unwrap();
    let function = |name| Function::probe(Local::attach(&bus, name, 0)).unwrap();
    // 64 requests of this size need more than the largest region.
    let opened = Requests::open(function("large"), "large", 64, 0);
    assert!(matches!(opened, Err(Error::Unsupported(_))));
    assert!(Requests::open(function("large"), "large", 8, 0).is_ok());
}

/// Waits until the most requests have arrived. Then it answers each with the longest response.
struct Big {
    there: Arc<AtomicUsize>,
    answers: Arc<Barrier>,
}

const BIG: usize = 14;

impl Service for Big {
    fn identity(&self) -> Identity {
        Identity::user("big")
    }

    fn sizes(&self) -> Sizes {
        Sizes { request: 8, response: abi::BYTES_MAX }
    }

    fn threads(&self) -> usize {
        BIG
    }

    fn answer(&self, _: &[u8], response: &mut Vec<u8>) -> Result<(), ErrorCode> {
        response.resize(abi::BYTES_MAX as usize, 1);
        self.there.fetch_add(1, Ordering::Relaxed);
        self.answers.wait();
        Ok(())
    }
}

/// Blocks its worker between two meetings at the barrier.
struct Blocker(Arc<Barrier>);

impl Task for Blocker {
    fn poll(&mut self, _: u32) -> Result<Progress, ErrorCode> {
        self.0.wait();
        self.0.wait();
        Err(ErrorCode::FAILED)
    }
}

#[test]
fn large_answers_are_as_much_work_as_large_requests() {
    let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).unwrap();
    let bus = Bus::new(executor.clone(), Vec::new());
    let (there, answers) = (Arc::<AtomicUsize>::default(), Arc::new(Barrier::new(BIG + 1)));
    let big = Big { there: there.clone(), answers: answers.clone() };
    bus.add("big", service::device(big).unwrap()).unwrap();
    let local = Local::attach(&bus, "big", 0);
    let mut requests = Requests::open(local.probe(), "big", BIG as u32, 0).unwrap();
    for _ in 0..BIG {
        requests.submit(b"request").unwrap().unwrap();
    }
    requests.post();
    until("all requests", || (there.load(Ordering::Relaxed) == BIG).then_some(()));
    // The answers come while the worker is blocked.
    let blocker = Arc::new(Barrier::new(2));
    executor.spawn(0, Box::new(Blocker(blocker.clone())), Arc::default(), |_| {});
    blocker.wait();
    let endpoint = bus.get("big").unwrap();
    let polls = || endpoint.counters().polls.get();
    let before = polls();
    answers.wait();
    // Later answers only cause more polls.
    std::thread::sleep(Duration::from_millis(50));
    blocker.wait();
    let mut done = 0;
    until("the answers", || {
        done += usize::from(requests.complete(&mut []).unwrap().is_some());
        (done == BIG).then_some(())
    });
    // Each answer exceeds the budget of a poll. The counter may not yet include the last poll.
    assert!(polls() - before >= BIG as u64 - 1, "{} polls", polls() - before);
}
