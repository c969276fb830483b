// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The class `sched` with real threads of this process in the place of virtual CPUs.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vbus_core::shm::Memory as _;
use vbus_core::shm::abi::sched::{self as abi, report};
use vbus_core::shm::signal::{Armed, end};
use vbus_core::shm::state::{Layout, Reader, SIGNAL_OFFSET, Writer};
use vbus_core::state::Document;
use vbus_core::{Bus, DeviceState, Endpoint, ErrorCode, Window};

use rustix::io::Errno;
use vbus_sched::interview::Language;
use vbus_sched::{Direct, Held, Limits, SchedClass, Setting, TakeError, Threads};
use vbus_test_driver::{Interrupts, Memory, TIMEOUT, add, open};

/// Makes a bus with this class.
fn bus(workers: usize) -> Bus {
    vbus_test_driver::bus(workers, vec![Box::new(SchedClass::new())])
}

/// The log of this process.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// Begins to keep the log, if nobody has.
    fn keep() -> &'static Log {
        static LOG: OnceLock<Log> = OnceLock::new();
        LOG.get_or_init(|| {
            let log = Log::default();
            let to = log.clone();
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || to.clone()).init();
            log
        })
    }

    /// The lines that have the field `device` with this name.
    fn lines_of(&self, device: &str) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let field = format!("device=\"{device}\"");
        text.lines().filter(|line| line.contains(&field)).map(str::to_owned).collect()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A thread that does nothing until it is dropped.
struct Idler {
    tid: i32,
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Idler {
    fn start() -> Idler {
        let ((tell, told), (end, ended)) = (channel(), channel());
        let thread = std::thread::spawn(move || {
            tell.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
            let _ = ended.recv();
        });
        Idler { tid: told.recv().unwrap(), end: Some(end), thread: Some(thread) }
    }

    /// The policy by Linux's number, the real-time priority, and the nice value if it has an
    /// effect. The kernel reads them one after the other without a lock. If the device may change
    /// them meanwhile, use [`between_changes`].
    fn class(&self) -> (u32, i32, i32) {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{}/stat", self.tid)).unwrap();
        // Behind the name; the first field there is the third of all.
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split_whitespace().collect();
        let field = |number: usize| fields[number - 3].parse::<i32>().unwrap();
        let policy = field(41) as u32;
        (policy, field(40), if [0, 3].contains(&policy) { field(19) } else { 0 })
    }

    fn renice(&self, nice: i32) {
        rustix::process::setpriority_process(rustix::process::Pid::from_raw(self.tid), nice)
            .unwrap();
    }
}

impl Drop for Idler {
    fn drop(&mut self) {
        drop(self.end.take());
        self.thread.take().unwrap().join().unwrap();
    }
}

fn own() -> (u32, i32, i32) {
    (0, 0, own_nice())
}

/// The nice value of this process, which its threads inherit. Tests may run under `nice`.
fn own_nice() -> i32 {
    rustix::process::getpriority_process(None).unwrap()
}

/// The value of a report page.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    pub outcome: u32,
    pub class: u32,
    pub priority: i32,
    pub version: u64,
    pub updates: u64,
    pub changes: u64,
    pub clamped: u64,
    pub refused: u64,
    pub limited: u64,
    pub expired: u64,
}

/// A driver's pages of one virtual CPU.
pub struct Pages {
    pub requests: Writer<Window, end::Driver>,
    pub window: Window,
    pub reports: Reader<Window, end::Driver>,
    pub handles: [u32; 2],
}

/// A driver that has opened a `sched` device.
pub struct Driver {
    pub endpoint: Arc<Endpoint>,
    pub memory: Memory,
    pub interrupts: Arc<Interrupts>,
}

impl Driver {
    pub fn open(endpoint: &Arc<Endpoint>) -> Driver {
        endpoint.close();
        endpoint.unmap_all();
        let interrupts = Arc::new(Interrupts::default());
        endpoint.set_interrupt_sink(interrupts.clone());
        let memory = Memory::new(endpoint, 1 << 20);
        open(endpoint, &memory, 0).unwrap();
        Driver { endpoint: endpoint.clone(), memory, interrupts }
    }

    pub fn page(&mut self, id: u32, bytes: u32) -> (Window, Result<u32, ErrorCode>) {
        let layout = Layout::new(bytes, 4).unwrap();
        let addr = self.memory.alloc(layout.bytes());
        let window = self.memory.window(addr, layout.bytes());
        layout.format(&window, 0).unwrap();
        (window, add(&self.endpoint, id, addr, layout.bytes(), SIGNAL_OFFSET))
    }

    pub fn pages(&mut self, cpu: u32) -> Pages {
        let (window, request) = self.page(abi::request_page(cpu), abi::request::BYTES);
        let (memory, report) = self.page(abi::report_page(cpu), report::BYTES);
        let requests = Writer::attach(window.clone(), end::Driver).unwrap();
        let reports = Reader::attach(memory, end::Driver).unwrap();
        Pages { requests, window, reports, handles: [request.unwrap(), report.unwrap()] }
    }

    pub fn post(&self, pages: &mut Pages, class: u32, priority: i32) {
        let mut value = [0; abi::request::BYTES as usize];
        value[..4].copy_from_slice(&class.to_le_bytes());
        value[4..8].copy_from_slice(&priority.to_le_bytes());
        if pages.requests.write(&value).is_wanted() {
            self.endpoint.ring(u64::from(pages.handles[0]));
        }
    }

    /// Waits for a report that `wanted` accepts.
    pub fn wait(&self, pages: &mut Pages, what: &str, wanted: impl Fn(&Report) -> bool) -> Report {
        self.interrupts.wait(what, || {
            let (report, version) = read(&pages.reports);
            if wanted(&report) {
                return Some(report);
            }
            match pages.reports.arm_newer(version) {
                Armed::Missed => Some(read(&pages.reports).0).filter(|report| wanted(report)),
                Armed::Waiting => None,
            }
        })
    }

    /// Posts a request, and waits until the device has read it.
    pub fn ask(&self, pages: &mut Pages, class: u32, priority: i32) -> Report {
        self.post(pages, class, priority);
        let version = pages.requests.version();
        self.wait(pages, "the report of a request", |report| report.version == version)
    }
}

pub fn read(reports: &Reader<Window, end::Driver>) -> (Report, u64) {
    let mut value = [0; report::BYTES as usize];
    let version = reports.read(&mut value).unwrap();
    let word = |at: usize| u32::from_le_bytes(value[at..at + 4].try_into().unwrap());
    let count = |at: usize| u64::from_le_bytes(value[at..at + 8].try_into().unwrap());
    let report = Report {
        outcome: word(report::OUTCOME),
        class: word(report::CLASS),
        priority: word(report::PRIORITY) as i32,
        version: count(report::VERSION),
        updates: count(report::UPDATES),
        changes: count(report::CHANGES),
        clamped: count(report::CLAMPED),
        refused: count(report::REFUSED),
        limited: count(report::LIMITED),
        expired: count(report::EXPIRED),
    };
    (report, version)
}

/// Longer than any test: no class ends between a request and the check of its outcome.
const BOOST_MS: u32 = 60_000;

/// Makes a device for these threads with more settings.
fn device(bus: &Bus, threads: &[&Idler], more: Value) -> Arc<Endpoint> {
    let threads: Vec<_> = threads.iter().map(|thread| thread.tid).collect();
    let mut config = json!({ "threads": threads, "boost-ms": BOOST_MS });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    bus.create("sched", "sched", &config).unwrap()
}

/// The class of virtual CPU 0's thread. `None`: the device may have changed it during the reading.
///
/// `inspect` takes the lock under which the device changes threads and counts its changes. A change
/// during the reading begins after the first inspection and ends before the second one, whose count
/// then differs. So a test never sees a class that the kernel has set only in part, however slow
/// the machine is.
fn between_changes(endpoint: &Endpoint, idler: &Idler) -> Option<(u32, i32, i32)> {
    let changes = || endpoint.inspect()["device"]["cpus"][0]["changes"].as_u64().unwrap();
    let before = changes();
    let class = idler.class();
    (changes() == before).then_some(class)
}

/// Whether this process may give a thread a real-time class and restore it. Prints the reason if
/// not.
fn permitted() -> bool {
    let (bus, idler) = (bus(1), Idler::start());
    let mut driver = Driver::open(&device(&bus, &[&idler], json!({})));
    let mut pages = driver.pages(0);
    let permitted = driver.ask(&mut pages, abi::CLASS_FIFO, 1).outcome == report::OK;
    if !permitted {
        eprintln!("skipped: this process may not give threads a real-time class (CAP_SYS_NICE)");
    }
    permitted
}

#[test]
fn a_thread_follows_its_page() {
    if !permitted() {
        return;
    }
    let (bus, idlers) = (bus(2), [Idler::start(), Idler::start()]);
    let endpoint =
        device(&bus, &[&idlers[0], &idlers[1]], json!({ "priority-max": 30, "nice-min": -5 }));
    let mut driver = Driver::open(&endpoint);
    let mut pages = [driver.pages(0), driver.pages(1)];
    let cases = [
        ((abi::CLASS_FIFO, 7), (1, 7, 0)),
        ((abi::CLASS_RR, 30), (2, 30, 0)),
        ((abi::CLASS_NORMAL, 5), (0, 0, 5)),
        ((abi::CLASS_BATCH, -5), (3, 0, -5)),
        ((abi::CLASS_IDLE, 0), (5, 0, 0)),
        ((abi::CLASS_FIFO, 1), (1, 1, 0)),
        ((abi::CLASS_NONE, 0), own()),
    ];
    for round in 0..3 {
        for ((class, priority), becomes) in cases {
            let changes = read(&pages[round % 2].reports).0.changes;
            let report = driver.ask(&mut pages[round % 2], class, priority);
            assert_eq!(
                (report.outcome, report.class, report.priority),
                (report::OK, class, priority)
            );
            assert_eq!(idlers[round % 2].class(), becomes, "class {class}");
            assert_eq!(idlers[1 - round % 2].class(), own(), "the other thread does not change");
            assert_eq!(report.changes, changes + 1, "one call a change");
        }
    }
    // The same request again needs no system call.
    let before = driver.ask(&mut pages[0], abi::CLASS_FIFO, 3);
    let after = driver.ask(&mut pages[0], abi::CLASS_FIFO, 3);
    assert_eq!((after.changes, after.updates), (before.changes, before.updates + 1));
    // The thread's children do not inherit the class.
    let inspected = endpoint.inspect();
    let cpus = &inspected["device"]["cpus"];
    assert_eq!(cpus[0]["class"], "fifo");
    assert_eq!(cpus[0]["priority"], 3);
    assert_eq!(cpus[1]["class"], "none");
    assert_eq!(cpus[1]["thread"], idlers[1].tid);
}

/// While a device is quiesced its threads have their own class. The device that goes on gives them
/// that of the present request again. The driver's counts go on.
#[test]
fn a_thread_gets_its_class_again_when_a_device_goes_on() {
    let (bus_now, idler) = (bus(1), Idler::start());
    let mut driver = Driver::open(&device(&bus_now, &[&idler], json!({})));
    let mut pages = driver.pages(0);
    let nice = own_nice();
    assert_eq!(driver.ask(&mut pages, abi::CLASS_BATCH, nice).outcome, report::OK);
    let is_batch = |endpoint: &Endpoint| {
        between_changes(endpoint, &idler).filter(|class| *class == (3, 0, nice)).map(drop)
    };
    driver.endpoint.quiesce().unwrap();
    assert_eq!(idler.class(), own());
    driver.endpoint.resume();
    driver.interrupts.wait("the class, again", || is_batch(&driver.endpoint));
    driver.endpoint.quiesce().unwrap();
    let text = driver.endpoint.save().unwrap().to_text().unwrap();
    let next = bus(1);
    let other = device(&next, &[&Idler::start()], json!({}));
    // The former device has the thread until it is gone.
    bus_now.remove("sched").unwrap();
    drop(std::mem::replace(&mut driver.endpoint, other));
    next.remove("sched").unwrap();
    driver.endpoint = device(&next, &[&idler], json!({}));
    driver.endpoint.set_interrupt_sink(driver.interrupts.clone());
    driver.memory.share(&driver.endpoint);
    driver.endpoint.quiesce().unwrap();
    driver.endpoint.restore(&DeviceState::from_text(&text).unwrap()).unwrap();
    assert_eq!(idler.class(), own());
    driver.endpoint.resume();
    driver.interrupts.wait("the class, by another device", || is_batch(&driver.endpoint));
    let report = driver.ask(&mut pages, abi::CLASS_IDLE, 0);
    assert_eq!((report.outcome, report.updates), (report::OK, 2));
    assert_eq!(driver.ask(&mut pages, abi::CLASS_NONE, 0).outcome, report::OK);
    assert_eq!(idler.class(), own());
}

/// The threads of this process, with counts of what is asked of them.
#[derive(Default)]
struct Counting {
    threads: Direct,
    asked: Arc<[AtomicU64; 2]>,
}

struct Counted(Box<dyn Held>, Arc<[AtomicU64; 2]>);

impl Threads for Counting {
    fn check(&self, limits: &Limits) -> Result<(), String> {
        self.threads.check(limits)
    }

    fn ask_vmm(&self, path: &Path, language: Language) -> std::io::Result<(OwnedFd, i32)> {
        self.threads.ask_vmm(path, language)
    }

    fn take(&self, process: Option<i32>, tid: i32) -> Result<Box<dyn Held>, TakeError> {
        Ok(Box::new(Counted(self.threads.take(process, tid)?, self.asked.clone())))
    }

    fn is_privileged(&self) -> bool {
        self.threads.is_privileged()
    }

    fn tells_time(&self) -> bool {
        self.threads.tells_time()
    }
}

impl Held for Counted {
    fn time(&self) -> Duration {
        self.0.time()
    }

    fn own_nice(&mut self) -> Result<i32, Errno> {
        self.1[0].fetch_add(1, Ordering::Relaxed);
        self.0.own_nice()
    }

    fn apply(&mut self, setting: Setting) -> Result<(), Errno> {
        self.1[1].fetch_add(1, Ordering::Relaxed);
        self.0.apply(setting)
    }

    fn restore(&mut self) -> Result<bool, Errno> {
        self.0.restore()
    }
}

#[test]
fn a_change_to_a_real_time_class_asks_for_nothing_else() {
    if !permitted() {
        return;
    }
    let threads = Counting::default();
    let asked = threads.asked.clone();
    let bus = vbus_test_driver::bus(1, vec![Box::new(SchedClass::through(Arc::new(threads)))]);
    let idler = Idler::start();
    let endpoint = device(&bus, &[&idler], json!({}));
    let mut driver = Driver::open(&endpoint);
    let mut pages = driver.pages(0);
    for (class, priority, counts) in [
        (abi::CLASS_FIFO, 3, [0, 1]),
        (abi::CLASS_RR, 4, [0, 2]),
        // The least nice value that is allowed is the thread's own.
        (abi::CLASS_NORMAL, (own_nice() + 5).min(19), [1, 3]),
    ] {
        assert_eq!(driver.ask(&mut pages, class, priority).outcome, report::OK);
        assert_eq!([0, 1].map(|at: usize| asked[at].load(Ordering::Relaxed)), counts);
    }
}

/// Threads whose changes the system refuses with the present error.
struct Refused {
    threads: Direct,
    error: Arc<Mutex<Errno>>,
}

impl Threads for Refused {
    fn check(&self, limits: &Limits) -> Result<(), String> {
        self.threads.check(limits)
    }

    fn ask_vmm(&self, path: &Path, language: Language) -> std::io::Result<(OwnedFd, i32)> {
        self.threads.ask_vmm(path, language)
    }

    fn take(&self, _process: Option<i32>, _tid: i32) -> Result<Box<dyn Held>, TakeError> {
        Ok(Box::new(RefusedThread(self.error.clone())))
    }

    fn is_privileged(&self) -> bool {
        true
    }

    fn tells_time(&self) -> bool {
        true
    }
}

struct RefusedThread(Arc<Mutex<Errno>>);

impl Held for RefusedThread {
    fn time(&self) -> Duration {
        Duration::ZERO
    }

    fn own_nice(&mut self) -> Result<i32, Errno> {
        Ok(0)
    }

    fn apply(&mut self, _setting: Setting) -> Result<(), Errno> {
        Err(*self.0.lock().unwrap())
    }

    fn restore(&mut self) -> Result<bool, Errno> {
        Ok(false)
    }
}

#[test]
fn each_new_error_of_a_change_is_logged_once() {
    let log = Log::keep();
    let error = Arc::new(Mutex::new(Errno::PERM));
    let threads = Refused { threads: Direct::default(), error: error.clone() };
    let bus = vbus_test_driver::bus(1, vec![Box::new(SchedClass::through(Arc::new(threads)))]);
    let endpoint = bus.create("refused", "sched", &json!({ "threads": [1] })).unwrap();
    let mut driver = Driver::open(&endpoint);
    let mut pages = driver.pages(0);
    let told = || {
        let lines = log.lines_of("refused");
        lines.into_iter().filter(|line| line.contains("scheduling class")).collect::<Vec<_>>()
    };
    for (now, lines) in [(Errno::PERM, 1), (Errno::PERM, 1), (Errno::BUSY, 2), (Errno::BUSY, 2)] {
        *error.lock().unwrap() = now;
        let report = driver.ask(&mut pages, abi::CLASS_FIFO, 2);
        assert_eq!(report.outcome, report::FAILED);
        assert_eq!(told().len(), lines, "{:?}", told());
    }
    let needs: Vec<_> = told().iter().map(|line| line.contains("CAP_SYS_NICE")).collect();
    assert_eq!(needs, [true, false]);
    // With a new connection the log gets it again.
    let mut driver = Driver::open(&endpoint);
    let mut pages = driver.pages(0);
    driver.ask(&mut pages, abi::CLASS_FIFO, 2);
    assert_eq!(told().len(), 3, "{:?}", told());
}

#[test]
fn the_policy_limits_requests() {
    if !permitted() {
        return;
    }
    let (bus, idler) = (bus(1), Idler::start());
    let endpoint =
        device(&bus, &[&idler], json!({ "priority-max": 5, "allow": ["fifo", "normal"] }));
    let mut driver = Driver::open(&endpoint);
    let mut pages = driver.pages(0);
    let report = driver.ask(&mut pages, abi::CLASS_FIFO, 99);
    assert_eq!(
        (report.outcome, report.class, report.priority),
        (report::IS_CLAMPED, abi::CLASS_FIFO, 5)
    );
    assert_eq!((idler.class(), report.clamped), ((1, 5, 0), 1));
    // A refused request also ends the former grant.
    let report = driver.ask(&mut pages, abi::CLASS_RR, 1);
    assert_eq!(
        (report.outcome, report.class, report.refused),
        (report::NOT_ALLOWED, abi::CLASS_NONE, 1)
    );
    assert_eq!(idler.class(), own());
    driver.ask(&mut pages, abi::CLASS_FIFO, 2);
    // They include Linux's own number of the deadline class.
    for (class, priority) in
        [(6, 0), (7, 1), (abi::CLASS_FIFO, 0), (abi::CLASS_FIFO, 100), (abi::CLASS_NORMAL, -21)]
    {
        let report = driver.ask(&mut pages, class, priority);
        assert_eq!(
            (report.outcome, report.class),
            (report::BAD_REQUEST, abi::CLASS_NONE),
            "{class} {priority}"
        );
        assert_eq!(idler.class(), own());
    }
    // Below what the policy allows, and below the thread's own.
    let report = driver.ask(&mut pages, abi::CLASS_NORMAL, own_nice().min(0) - 3);
    assert_eq!(
        (report.outcome, report.priority, idler.class()),
        (report::IS_CLAMPED, own_nice(), own())
    );
}

#[test]
fn the_own_class_is_restored() {
    if !permitted() {
        return;
    }
    let (bus, idler) = (bus(1), Idler::start());
    const OWN: (u32, i32, i32) = (0, 0, 3);
    idler.renice(OWN.2);
    let endpoint = device(&bus, &[&idler], json!({}));
    let boosted = || {
        let mut driver = Driver::open(&endpoint);
        let mut pages = driver.pages(0);
        driver.ask(&mut pages, abi::CLASS_NORMAL, 5);
        assert_eq!(idler.class(), (0, 0, 5));
        driver.ask(&mut pages, abi::CLASS_FIFO, 4);
        assert_eq!(idler.class(), (1, 4, 0));
        (driver, pages)
    };
    let (_, pages) = boosted();
    endpoint.region_drop(u64::from(pages.handles[0])).unwrap();
    assert_eq!(idler.class(), OWN, "when the page is dropped");
    boosted();
    endpoint.close();
    assert_eq!(idler.class(), OWN, "when the driver closes");
    boosted();
    endpoint.unmap_all();
    assert_eq!(idler.class(), OWN, "when the memory goes");
    // Not if another program has changed the class.
    let (driver, mut pages) = boosted();
    driver.ask(&mut pages, abi::CLASS_NORMAL, 5);
    idler.renice(7);
    endpoint.close();
    assert_eq!(idler.class(), (0, 0, 7));
    idler.renice(OWN.2);
    boosted();
    bus.remove("sched").unwrap();
    assert_eq!(idler.class(), OWN, "when the device is removed");
}

#[test]
fn a_real_time_class_ends_unless_it_is_renewed() {
    if !permitted() {
        return;
    }
    let (bus, idler) = (bus(1), Idler::start());
    let endpoint = device(&bus, &[&idler], json!({ "boost-ms": 200 }));
    let mut driver = Driver::open(&endpoint);
    let mut pages = driver.pages(0);
    let began = Instant::now();
    driver.ask(&mut pages, abi::CLASS_RR, 4);
    let report = driver.wait(&mut pages, "the end", |report| report.outcome == report::HAS_EXPIRED);
    assert!(began.elapsed() >= Duration::from_millis(200));
    assert_eq!((report.class, report.expired, idler.class()), (abi::CLASS_NONE, 1, own()));
    assert_eq!(report.changes, 2);
    // The same value again is a new request. Its grant may have ended too before this thread sees
    // it.
    assert!(driver.ask(&mut pages, abi::CLASS_RR, 4).changes > 2);
    // A normal class has no end.
    let expired = driver.ask(&mut pages, abi::CLASS_NORMAL, (own_nice() + 4).min(19)).expired;
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(
        (idler.class(), read(&pages.reports).0.expired),
        ((0, 0, (own_nice() + 4).min(19)), expired)
    );
}

#[test]
fn a_thread_uses_no_more_than_its_share_at_a_real_time_class() {
    if !permitted() {
        return;
    }
    let (bus, idler, stop) = (bus(1), Idler::start(), Arc::new(AtomicBool::new(false)));
    let (tell, told) = channel();
    let spinning = stop.clone();
    let spinner = std::thread::spawn(move || {
        tell.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
        while !spinning.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        }
    });
    let threads = [told.recv().unwrap(), idler.tid];
    let config = json!({ "threads": threads, "boost-ms": BOOST_MS, "boost-share": 20 });
    let mut driver = Driver::open(&bus.create("sched", "sched", &config).unwrap());
    let mut pages = [driver.pages(0), driver.pages(1)];
    let began = Instant::now();
    let granted = driver.ask(&mut pages[0], abi::CLASS_FIFO, 2);
    assert_eq!(granted.outcome, report::OK);
    driver.ask(&mut pages[1], abi::CLASS_FIFO, 2);
    for round in 1..=2 {
        let spent = driver.wait(&mut pages[0], "the share to be spent", |report| {
            report.outcome == report::IS_SPENT
        });
        assert_eq!(spent.class, abi::CLASS_NONE);
        // The count is higher if this thread has slept for a second.
        assert!(spent.expired >= round, "{spent:?}");
        let again =
            driver.wait(&mut pages[0], "the next second", |report| report.outcome == report::OK);
        assert_eq!(again.class, abi::CLASS_FIFO);
        assert!(
            began.elapsed() >= Duration::from_secs(round),
            "it came back after {:?}",
            began.elapsed()
        );
    }
    // A thread that does not run has used nothing.
    let idle = read(&pages[1].reports).0;
    assert_eq!(
        (idle.outcome, idle.changes, idle.expired, idler.class()),
        (report::OK, 1, 0, (1, 2, 0))
    );
    stop.store(true, Ordering::Relaxed);
    spinner.join().unwrap();
}

#[test]
fn the_newest_value_is_not_lost_to_the_rate_limit() {
    if !permitted() {
        return;
    }
    let (bus, idler) = (bus(1), Idler::start());
    let endpoint = device(&bus, &[&idler], json!({ "changes": 4, "priority-max": 99 }));
    let mut driver = Driver::open(&endpoint);
    let mut pages = driver.pages(0);
    let began = Instant::now();
    driver.ask(&mut pages, abi::CLASS_FIFO, 1);
    // The budget is used up. Only the last request counts, and no doorbell follows it.
    for priority in 2..=50 {
        driver.post(&mut pages, abi::CLASS_FIFO, priority);
    }
    let report = driver.wait(&mut pages, "the newest value", |report| report.priority == 50);
    assert!(began.elapsed() >= Duration::from_millis(250), "it came after {:?}", began.elapsed());
    // There are two, unless this thread needed more than a quarter of a second for its requests.
    let most = 1 + began.elapsed().as_millis() as u64 / 250;
    assert!(
        (2..=most).contains(&report.updates) && report.changes == report.updates,
        "{report:?}, at most {most}"
    );
    assert!(report.limited >= 1, "{report:?}");
    assert_eq!(idler.class(), (1, 50, 0));
}

#[test]
fn a_hostile_driver_passes_neither_policy_nor_rate() {
    if !permitted() {
        return;
    }
    const RATE: u64 = 200;
    let (bus, idler) = (bus(2), Idler::start());
    let config = json!({
        "changes": RATE,
        "priority-max": 3,
        "nice-min": 2,
        "allow": ["fifo", "normal"],
        "boost-ms": 10,
    });
    let endpoint = device(&bus, &[&idler], config);
    let mut driver = Driver::open(&endpoint);
    let mut pages = driver.pages(0);
    let allowed = |class| match class {
        (1, 1..=3, _) => true,
        class if class == own() => true,
        (0, 0, nice) => nice >= 2,
        _ => false,
    };
    let began = Instant::now();
    let mut seen = HashSet::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (endpoint, stop, window, handle) =
            (&endpoint, &stop, pages.window.clone(), pages.handles[0]);
        let (requests, reports) = (&mut pages.requests, &pages.reports);
        scope.spawn(move || {
            let mut word = 1u64;
            let mut random = move || {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                word
            };
            while !stop.load(Ordering::Relaxed) {
                let mut value = [0; 16];
                value[..4].copy_from_slice(&((random() % 8) as u32).to_le_bytes());
                value[4..8].copy_from_slice(&((random() % 140) as i32 - 30).to_le_bytes());
                let _ = requests.write(&value);
                endpoint.ring(u64::from(handle));
                if random() % 64 == 0 {
                    // Write anywhere in the page, also to its header and signal, without the
                    // writer.
                    let words = window.words();
                    words[(random() % words.len() as u64) as usize]
                        .store(random(), Ordering::Relaxed);
                }
            }
        });
        // Repeat for a while, and until enough has happened: on a busy machine the device's task
        // seldom runs.
        let enough = |report: Report| {
            report.updates > RATE && report.clamped > 0 && report.refused > 0 && report.limited > 0
        };
        while began.elapsed() < Duration::from_secs(3)
            || !enough(read(reports).0) && began.elapsed() < TIMEOUT
        {
            let mut class = idler.class();
            if !allowed(class) {
                // The class may be half set. If it is real, it stays until the next change.
                class = std::iter::repeat_with(|| between_changes(endpoint, &idler))
                    .find_map(|class| class)
                    .unwrap();
            }
            assert!(
                allowed(class) || stop.swap(true, Ordering::Relaxed),
                "{class:?} passes the policy"
            );
            seen.insert(class);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let report = read(&pages.reports).0;
    let most = RATE * (began.elapsed().as_millis() as u64 + 1) / 1000 + RATE / 10;
    eprintln!("{report:?}; at most {most} updates; seen: {seen:?}");
    assert!(report.updates <= most && report.updates > RATE, "{report:?}, at most {most}");
    // Each change belongs to an update, or to the end of a real-time class.
    assert!(report.changes <= report.updates + report.expired, "{report:?}");
    assert!(report.clamped > 0 && report.refused > 0 && report.limited > 0, "{report:?}");
    assert!(seen.len() > 2, "the device changed the thread all the time");
    endpoint.close();
    assert_eq!(idler.class(), own());
}

#[test]
fn bad_pages_and_threads_are_refused() {
    let (bus, idlers) = (bus(1), [Idler::start(), Idler::start()]);
    let endpoint = device(&bus, &[&idlers[0]], json!({}));
    let refused = |name: &str, threads: &[i32]| {
        bus.create(name, "sched", &json!({ "threads": threads })).map(drop).unwrap_err().to_string()
    };
    assert!(refused("b", &[idlers[0].tid]).contains("belongs to another device"));
    assert!(refused("b", &[idlers[1].tid; 2]).contains("belongs to another"));
    let gone = Idler::start().tid;
    assert!(refused("b", &[gone]).contains(&format!("no thread {gone}")));
    // A device that could not be created, or that was removed, frees its threads.
    bus.create("b", "sched", &json!({ "threads": [idlers[1].tid] })).unwrap();
    bus.remove("b").unwrap();
    bus.create("b", "sched", &json!({ "threads": [idlers[1].tid] })).unwrap();

    let mut driver = Driver::open(&endpoint);
    assert_eq!(
        driver.page(abi::request_page(1), abi::request::BYTES).1,
        Err(ErrorCode::BAD_ARGUMENT)
    );
    assert_eq!(driver.page(u32::MAX, abi::request::BYTES).1, Err(ErrorCode::BAD_ARGUMENT));
    assert_eq!(driver.page(abi::request_page(0), 8).1, Err(ErrorCode::BAD_LENGTH));
    assert_eq!(driver.page(abi::report_page(0), 128).1, Err(ErrorCode::BAD_LENGTH));
    driver.page(abi::request_page(0), abi::request::BYTES).1.unwrap();
    assert_eq!(driver.page(abi::request_page(0), abi::request::BYTES).1, Err(ErrorCode::EXISTS));
}

/// Serves a VMM's socket: sends `greeting`, then answers each line with the result of `answer`.
fn vmm(
    path: &Path,
    greeting: &'static str,
    answer: impl Fn(&str) -> Option<String> + Send + 'static,
) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            stream.write_all(greeting.as_bytes()).unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            for line in lines.map_while(Result::ok) {
                let Some(text) = answer(&line) else { break };
                if stream.write_all(text.as_bytes()).is_err() {
                    break;
                }
            }
        }
    });
}

const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n";

fn qmp_answer(line: &str, tids: &[i32]) -> Option<String> {
    let cpus: Vec<_> = (0..)
        .zip(tids)
        .map(|(n, tid)| json!({ "cpu-index": n, "thread-id": tid, "target": "x86_64" }))
        .collect();
    Some(match line {
        line if line.contains("qmp_capabilities") => "{\"return\": {}}\n".into(),
        line if line.contains("query-cpus-fast") => {
            format!("{{\"event\": \"RESUME\", \"data\": {{}}}}\n{}\n", json!({ "return": cpus }))
        }
        _ => return None,
    })
}

#[test]
fn a_vmm_names_the_threads() {
    if !permitted() {
        return;
    }
    let (bus, idlers) = (bus(1), [Idler::start(), Idler::start()]);
    let dir = tempfile::tempdir().unwrap();
    let (qmp, control) = (dir.path().join("qmp"), dir.path().join("control"));
    let tids = [idlers[0].tid, idlers[1].tid];
    vmm(&qmp, GREETING, move |line| qmp_answer(line, &tids));
    vmm(&control, "", move |line| {
        let item = |cpu: usize| json!({ "item": { "cpu": cpu, "thread": tids[cpu] } });
        line.contains("\"cpus\"").then(|| format!("{}\n{}\n{{\"ok\": null}}\n", item(0), item(1)))
    });
    for config in [
        json!({ "qmp": qmp, "boost-ms": BOOST_MS }),
        json!({ "vmm": control, "cpus": 2, "boost-ms": BOOST_MS }),
    ] {
        let endpoint = bus.create("sched", "sched", &config).unwrap();
        let mut driver = Driver::open(&endpoint);
        let mut pages = [driver.pages(1), driver.pages(0)];
        driver.post(&mut pages[0], abi::CLASS_FIFO, 2);
        driver.wait(&mut pages[0], "the thread to be known", |report| {
            report.class == abi::CLASS_FIFO
        });
        assert_eq!((idlers[1].class(), idlers[0].class()), ((1, 2, 0), own()));
        driver.post(&mut pages[1], abi::CLASS_RR, 3);
        driver.wait(&mut pages[1], "the class", |report| report.class == abi::CLASS_RR);
        bus.remove("sched").unwrap();
        assert_eq!((idlers[1].class(), idlers[0].class()), (own(), own()));
    }
}

#[test]
fn a_vmm_that_lies_harms_nobody() {
    let bus = bus(1);
    let dir = tempfile::tempdir().unwrap();
    // Threads of other processes, invalid ids, no answer, nonsense, and a different answer each
    // time.
    let counter = std::sync::atomic::AtomicI32::new(0);
    let idlers = [Idler::start(), Idler::start()];
    let tids = [idlers[0].tid, idlers[1].tid];
    type Answer = Box<dyn Fn(&str) -> Option<String> + Send>;
    let log = Log::keep();
    let cases: [(&str, &'static str, Answer, &str); 6] = [
        ("foreign", GREETING, Box::new(|line| qmp_answer(line, &[1])), "has no thread 1"),
        ("negative", GREETING, Box::new(|line| qmp_answer(line, &[-5, 0])), "has no thread 0"),
        ("nonsense", "hello\n", Box::new(|_| None), "is not JSON"),
        ("closed", GREETING, Box::new(|_| None), "has closed the connection"),
        (
            "fickle",
            GREETING,
            Box::new(move |line| {
                let turn = counter.fetch_add(1, Ordering::Relaxed) as usize;
                qmp_answer(line, &[tids[turn % 2]])
            }),
            "another answer each time",
        ),
        (
            "refusing",
            GREETING,
            Box::new(|_| {
                let error = json!({ "class": "", "desc": format!("no\n{}", "x".repeat(100_000)) });
                Some(format!("{}\n", json!({ "error": error })))
            }),
            "refuses: no\\nxxx",
        ),
    ];
    for (name, greeting, answer, complaint) in cases {
        let path = dir.path().join(name);
        vmm(&path, greeting, answer);
        let endpoint = bus.create(name, "sched", &json!({ "qmp": path, "cpus": 2 })).unwrap();
        let mut driver = Driver::open(&endpoint);
        let mut pages = [driver.pages(0), driver.pages(1)];
        let report = driver.ask(&mut pages[0], abi::CLASS_FIFO, 2);
        assert_eq!((report.outcome, report.class), (report::NO_THREAD, abi::CLASS_NONE), "{name}");
        let end = Instant::now() + TIMEOUT;
        loop {
            let value = endpoint.inspect()["device"]["lookup"].clone();
            if value.as_str().is_some_and(|text| text.contains(complaint)) {
                break;
            }
            assert!(Instant::now() < end, "{name}: {value}");
            std::thread::yield_now();
        }
        let mut lines = log.lines_of(name);
        lines.retain(|line| line.contains(complaint));
        assert!(lines.iter().any(|line| line.contains("are not known")), "{name}: {lines:?}");
        assert!(lines.iter().all(|line| line.len() < 1000), "{name}: {lines:?}");
        bus.remove(name).unwrap();
    }
    assert_eq!((idlers[0].class(), idlers[1].class()), (own(), own()));
}

#[test]
fn a_thread_that_ended_is_not_mistaken_for_another() {
    if !permitted() {
        return;
    }
    let (bus, idler) = (bus(1), Idler::start());
    let endpoint = device(&bus, &[&idler], json!({}));
    let mut driver = Driver::open(&endpoint);
    let mut pages = driver.pages(0);
    driver.ask(&mut pages, abi::CLASS_FIFO, 2);
    drop(idler);
    let report = driver.ask(&mut pages, abi::CLASS_FIFO, 3);
    assert_eq!((report.outcome, report.class), (report::NO_THREAD, abi::CLASS_NONE));
    endpoint.close();
}
