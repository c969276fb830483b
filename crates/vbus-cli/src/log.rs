// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The log, on standard error.
//!
//! A thread writes it. Whoever logs puts a line into a bounded queue and goes on, so a standard
//! error that is full, or that nobody reads, stops nothing. Lines for which the queue has no room
//! are counted, and the log says how many were lost.
//!
//! The number of lines is bounded too, because a hostile peer can cause some of them as often as it
//! likes. Each device (the field `device` of an event) has a budget of its own, and all other lines
//! share one. So one client cannot hide what another one does. When a period has ended, the log
//! says how many lines were suppressed in it.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::Registry;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, reload};

/// The environment variable with the level.
const VARIABLE: &str = "VBUS_LOG";
/// The names of levels.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// In each period of this length ...
const PERIOD: Duration = Duration::from_secs(10);
/// ... a device has at most this many lines ...
const LINES_OF_DEVICE: u32 = 200;
/// ... and all other lines are at most this many. Lines of the levels `debug` and `trace`, which
/// somebody asked for, have ten times as many, beside the others.
const LINES_OF_OTHERS: u32 = 1000;
const MORE_DETAILS: u32 = 10;
/// The most budgets. Lines of further devices share that of the other lines.
const BUDGETS_MAX: usize = 16 << 10;

/// The most bytes that wait to be written.
const QUEUE_MAX: usize = 1 << 20;
/// How long the end of the program waits until the log is written.
const FLUSH: Duration = Duration::from_secs(1);

/// The log of this process.
static LOG: OnceLock<Log> = OnceLock::new();

struct Log {
    queue: Arc<Queue>,
    filter: reload::Handle<EnvFilter, Registry>,
    /// `VBUS_LOG` has set the level.
    by_environment: bool,
}

/// Starts the log. The environment variable `VBUS_LOG` sets its level (`debug`,
/// `vfio_user_protocol=trace`, ...). The default is `info`.
pub fn start() {
    start_with("info");
}

/// Starts the log. `level` is its level without `VBUS_LOG`.
pub fn start_with(level: &str) {
    prepare(level);
    write();
}

/// Starts the log as [`start_with`] does, but without its thread: lines wait in the queue until
/// [`write()`] is called. For a process that changes rights, which each thread has for itself.
pub fn prepare(level: &str) {
    let variable = std::env::var(VARIABLE).ok();
    let wrong = variable.as_deref().and_then(|text| check_level(text).err());
    let by_environment = variable.is_some() && wrong.is_none();
    let level = variable.as_deref().filter(|_| by_environment).unwrap_or(level);
    let (filter, handle) = reload::Layer::new(EnvFilter::new(level));
    let queue = Arc::new(Queue::default());
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .with_writer(Lines(queue.clone()));
    let log = Log { queue: queue.clone(), filter: handle, by_environment };
    if LOG.set(log).is_err() {
        return;
    }
    let started = tracing_subscriber::registry().with(filter).with(Bounds(queue)).with(lines);
    if started.try_init().is_ok() {
        panics_to_log();
    }
    if let Some(wrong) = wrong {
        tracing::warn!("{VARIABLE}: {wrong}");
    }
}

/// Starts the thread that writes the log. This is for after [`prepare`].
pub fn write() {
    write_with(|| true);
}

/// As [`write()`], for a process whose threads each give up rights. The thread calls `ready` first,
/// and ends at once if that returns false.
pub fn write_with(ready: impl FnOnce() -> bool + Send + 'static) {
    let Some(log) = LOG.get() else { return };
    if std::mem::replace(&mut log.queue.lock().has_thread, true) {
        return;
    }
    let queue = log.queue.clone();
    let thread = std::thread::Builder::new().name("vbus-log".into()).stack_size(256 << 10);
    let run = move || {
        if ready() {
            queue.write_out(io::stderr().as_fd());
        }
    };
    if thread.spawn(run).is_err() {
        // Without a thread the log is written at the end, as far as the queue has it.
        log.queue.lock().has_thread = false;
    }
}

/// Sets the level of the log, in the form of `VBUS_LOG`. Returns whether it is the level now: if
/// `VBUS_LOG` was set when the program started, that level stays.
///
/// # Errors
/// `level` is no level.
pub fn set_level(level: &str) -> Result<bool, WrongLevel> {
    check_level(level)?;
    let Some(log) = LOG.get() else { return Ok(false) };
    Ok(!log.by_environment && log.filter.reload(EnvFilter::new(level)).is_ok())
}

/// A text that is no level of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrongLevel(String);

impl fmt::Display for WrongLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is no level of the log; use one of {}, or levels of crates, such as \
             \"info,vbus_core=debug\"",
            self.0,
            LEVELS.join(", ")
        )
    }
}

impl std::error::Error for WrongLevel {}

/// Checks that `text` is a level of the log: `info`, or with levels of crates
/// `info,vbus_core=debug`.
///
/// # Errors
/// It is none.
pub fn check_level(text: &str) -> Result<(), WrongLevel> {
    let is_level = |text: &str| LEVELS.contains(&text.to_ascii_lowercase().as_str());
    let is_crate = |text: &str| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_:".contains(&b))
    };
    let is_part = |part: &str| match part.split_once('=') {
        Some((target, level)) => is_crate(target) && is_level(level),
        None => is_level(part),
    };
    match text.split(',').all(|part| is_part(part.trim())) {
        true => Ok(()),
        false => Err(WrongLevel(text.into())),
    }
}

/// Waits until all lines so far are written, but not long. For the end of a program.
pub fn flush() {
    write();
    let Some(log) = LOG.get() else { return };
    if log.queue.lock().has_thread {
        log.queue.wait_until_written(Instant::now() + FLUSH);
    } else {
        log.queue.write_without_thread(io::stderr().as_fd());
    }
}

/// Writes a line to standard error, as it is: behind the lines of the log, if the log was started.
pub fn line(text: &str) {
    let bytes = format!("{text}\n");
    match LOG.get() {
        Some(log) => log.queue.push(bytes.as_bytes()),
        None => {
            // Standard error may be full, or closed.
            let _ = io::Write::write_all(&mut io::stderr(), bytes.as_bytes());
        }
    }
}

/// Sends the messages of panics through the log. The standard library writes them to standard
/// error itself, and would wait for somebody to read them.
fn panics_to_log() {
    std::panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let text = text.unwrap_or("a panic without a text");
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let current = std::thread::current();
        let thread = current.name().unwrap_or("without a name");
        tracing::error!(thread, place, "panic: {text}");
        // A panic of the first thread ends the program.
        if thread == "main" {
            flush();
        }
    }));
}

/// The lines between those who log and the thread that writes.
#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    /// The thread has something to do.
    news: Condvar,
    /// The thread has written everything.
    written: Condvar,
    budgets: Mutex<HashMap<Subject, Budget>>,
}

#[derive(Default)]
struct Waiting {
    lines: VecDeque<Box<[u8]>>,
    bytes: usize,
    /// How many lines have not been written, and nobody knows yet.
    lost: u64,
    has_thread: bool,
    /// The thread is writing lines that it has taken out.
    writes: bool,
    /// The end of the first period in which lines were suppressed.
    report_at: Option<Instant>,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Adds a line, with its end, or counts it as lost.
    fn push(&self, line: &[u8]) {
        let mut waiting = self.lock();
        if waiting.bytes + line.len() > QUEUE_MAX {
            waiting.lost += 1;
            return;
        }
        waiting.bytes += line.len();
        waiting.lines.push_back(line.into());
        drop(waiting);
        self.news.notify_one();
    }

    fn wait_until_written(&self, until: Instant) {
        let mut waiting = self.lock();
        while waiting.writes || !waiting.lines.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            self.news.notify_one();
            waiting = self.written.wait_timeout(waiting, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    /// Writes lines to `out`, for ever.
    fn write_out(&self, out: impl AsFd) {
        loop {
            let (lines, due) = self.take();
            let mut failed = 0;
            for line in lines {
                failed += u64::from(write_line(&out, &line).is_err());
            }
            let mut waiting = self.lock();
            waiting.lost += failed;
            waiting.writes = false;
            drop(waiting);
            if due {
                self.report_suppressed();
            }
            self.written.notify_all();
        }
    }

    /// Writes the lines that wait, as long as `out` takes them.
    fn write_without_thread(&self, out: impl AsFd) {
        let lines = std::mem::take(&mut self.lock().lines);
        for line in lines {
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            let takes = poll(&mut [PollFd::new(&out, PollFlags::OUT)], Some(&now));
            if takes != Ok(1) || write_line(&out, &line).is_err() {
                return;
            }
        }
    }

    /// Waits for lines, or for the end of a period. Returns the lines, and whether a period has
    /// ended.
    fn take(&self) -> (Vec<Box<[u8]>>, bool) {
        let mut waiting = self.lock();
        loop {
            let now = Instant::now();
            let due = waiting.report_at.is_some_and(|at| at <= now);
            if due {
                waiting.report_at = None;
            }
            if due || !waiting.lines.is_empty() {
                let mut lines: Vec<_> = std::mem::take(&mut waiting.lines).into();
                waiting.bytes = 0;
                waiting.writes = true;
                let lost = std::mem::take(&mut waiting.lost);
                if lost > 0 {
                    lines.push(format!("{lost} lines of the log were lost\n").into_bytes().into());
                }
                return (lines, due);
            }
            // What could not be written is told with the next line that can.
            self.written.notify_all();
            waiting = match waiting.report_at {
                Some(at) => {
                    let left = at.saturating_duration_since(now);
                    self.news.wait_timeout(waiting, left).unwrap_or_else(|e| e.into_inner()).0
                }
                None => self.news.wait(waiting).unwrap_or_else(|e| e.into_inner()),
            };
        }
    }

    fn budgets(&self) -> MutexGuard<'_, HashMap<Subject, Budget>> {
        self.budgets.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes a line from the budget of `subject`. False: the budget is used up.
    fn charge(&self, subject: Subject, now: Instant) -> bool {
        let mut budgets = self.budgets();
        let subject = match subject {
            Subject { device: Some(_), is_detail }
                if budgets.len() >= BUDGETS_MAX && !budgets.contains_key(&subject) =>
            {
                Subject { device: None, is_detail }
            }
            subject => subject,
        };
        let most = subject.most();
        // Devices come and go. Before the map grows, budgets that are whole again leave it.
        if budgets.len() == budgets.capacity() && !budgets.contains_key(&subject) {
            budgets.retain(|_, budget| {
                budget.suppressed > 0 || now.duration_since(budget.since) < PERIOD
            });
        }
        let budget =
            budgets.entry(subject).or_insert(Budget { since: now, lines: 0, suppressed: 0 });
        if budget.suppressed == 0 && now.duration_since(budget.since) >= PERIOD {
            *budget = Budget { since: now, lines: 0, suppressed: 0 };
        }
        if budget.lines < most {
            budget.lines += 1;
            return true;
        }
        budget.suppressed += 1;
        if budget.suppressed == 1 {
            let end = budget.since + PERIOD;
            drop(budgets);
            let mut waiting = self.lock();
            waiting.report_at = Some(waiting.report_at.map_or(end, |at| at.min(end)));
            drop(waiting);
            self.news.notify_one();
        }
        false
    }

    /// Logs what was suppressed in periods that have ended, and begins new ones.
    fn report_suppressed(&self) {
        let now = Instant::now();
        let mut ended = Vec::new();
        let mut next = None;
        self.budgets().retain(|subject, budget| {
            let end = budget.since + PERIOD;
            if end > now {
                if budget.suppressed > 0 {
                    next = Some(next.map_or(end, |at: Instant| at.min(end)));
                }
                return true;
            }
            if budget.suppressed > 0 {
                ended.push((subject.clone(), budget.suppressed));
            }
            false
        });
        if let Some(next) = next {
            let mut waiting = self.lock();
            waiting.report_at = Some(waiting.report_at.map_or(next, |at| at.min(next)));
        }
        for (Subject { device, .. }, count) in ended {
            match device {
                Some(device) => tracing::warn!(device = &*device, "{count} lines suppressed"),
                None => tracing::warn!("{count} lines suppressed"),
            }
        }
    }
}

/// Writes a line completely. It may wait for a reader.
fn write_line(out: &impl AsFd, mut line: &[u8]) -> Result<(), Errno> {
    while !line.is_empty() {
        match rustix::io::write(out, line) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) => line = &line[n..],
            Err(Errno::INTR) => {}
            // Another program has made the file non-blocking.
            Err(Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::new(out, PollFlags::OUT)], None);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What lines are about: a budget's key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Subject {
    device: Option<Box<str>>,
    /// The lines are of the level `debug` or `trace`.
    is_detail: bool,
}

impl Subject {
    fn of(event: &Event<'_>) -> Subject {
        let mut device = DeviceField(None);
        event.record(&mut device);
        Subject { device: device.0, is_detail: *event.metadata().level() > Level::INFO }
    }

    /// The most lines in a period.
    fn most(&self) -> u32 {
        let most = if self.device.is_some() { LINES_OF_DEVICE } else { LINES_OF_OTHERS };
        if self.is_detail { most * MORE_DETAILS } else { most }
    }
}

/// Finds the field `device` of an event.
struct DeviceField(Option<Box<str>>);

impl Visit for DeviceField {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "device" {
            self.0 = Some(value.into());
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "device" {
            self.0 = Some(format!("{value:?}").into());
        }
    }
}

struct Budget {
    since: Instant,
    lines: u32,
    suppressed: u64,
}

/// Lets events pass while their budget lasts.
struct Bounds(Arc<Queue>);

impl<S: Subscriber> Layer<S> for Bounds {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        self.0.charge(Subject::of(event), Instant::now())
    }
}

/// Puts each line into the queue.
struct Lines(Arc<Queue>);

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(&self.0)
    }
}

/// The writer of one event, which comes in one piece.
struct Line<'a>(&'a Queue);

impl io::Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn subject(device: Option<&str>) -> Subject {
        Subject { device: device.map(Into::into), is_detail: false }
    }

    /// A queue whose thread writes to a socket.
    fn queue() -> (Arc<Queue>, UnixStream) {
        let (reader, writer) = UnixStream::pair().unwrap();
        let queue = Arc::new(Queue::default());
        let theirs = queue.clone();
        std::thread::spawn(move || theirs.write_out(writer));
        (queue, reader)
    }

    #[test]
    fn levels_are_checked() {
        for good in ["info", "DEBUG", "off", "info,vbus_core=debug", "vfio_user_protocol=trace"] {
            assert_eq!(check_level(good), Ok(()), "{good}");
        }
        for wrong in ["", "inof", "info,", "vbus_core", "vbus_core=loud", "=info", "info debug"] {
            let error = check_level(wrong).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{wrong:?} is no level")), "{error}");
        }
    }

    #[test]
    fn a_log_that_nobody_reads_stops_nobody() {
        let (queue, reader) = queue();
        // The socket and the queue take some of the lines. This loop ends only if nobody waits.
        (0..5000).for_each(|_| queue.push(format!("{:999}\n", "x").as_bytes()));
        queue.wait_until_written(Instant::now() + Duration::from_millis(10));
        // Once somebody reads, the log goes on, and says what is missing.
        let (mut written, mut lost) = (0, 0);
        for line in BufReader::new(reader).lines() {
            match line.unwrap().strip_suffix(" lines of the log were lost") {
                Some(count) => lost += count.parse::<u32>().unwrap(),
                None => written += 1,
            }
            if written + lost == 5000 {
                break;
            }
        }
        assert!(lost > 1000, "{lost}");
    }

    #[test]
    fn a_reader_that_has_gone_stops_nobody() {
        let (queue, reader) = queue();
        drop(reader);
        queue.push(b"a\n");
        queue.wait_until_written(Instant::now() + Duration::from_secs(60));
        assert!(queue.lock().lines.is_empty());
        queue.push(b"b\n");
        queue.wait_until_written(Instant::now() + Duration::from_secs(60));
        assert!(queue.lock().lines.is_empty());
    }

    #[test]
    fn each_device_has_its_own_budget() {
        let queue = Queue::default();
        let now = Instant::now();
        let passed = |device, now| (0..2000).filter(|_| queue.charge(subject(device), now)).count();
        assert_eq!(passed(Some("a"), now), 200);
        assert_eq!(passed(Some("b"), now), 200);
        assert_eq!(passed(None, now), 1000);
        assert_eq!(passed(Some("a"), now), 0);
        let detail = Subject { is_detail: true, ..subject(Some("a")) };
        assert!(queue.charge(detail, now), "details have a budget of their own");
        assert_eq!(queue.lock().report_at, Some(now + PERIOD));
        // A budget from which nothing was suppressed begins anew by itself.
        assert!(queue.charge(subject(Some("c")), now));
        assert_eq!(passed(Some("c"), now + PERIOD), 200);
    }

    #[test]
    fn budgets_begin_anew_when_the_suppressed_lines_are_reported() {
        let queue = Queue::default();
        let long_ago = Instant::now().checked_sub(PERIOD).unwrap();
        let charge = |now| queue.charge(subject(Some("a")), now);
        assert_eq!((0..300).filter(|_| charge(long_ago)).count(), 200);
        assert!(!charge(Instant::now()), "the report comes first");
        queue.report_suppressed();
        assert!(charge(Instant::now()));
        assert_eq!(queue.budgets().len(), 1);
    }

    #[test]
    fn devices_that_have_gone_leave_no_budgets_behind() {
        let queue = Queue::default();
        let began = Instant::now();
        for number in 0..2_000_u32 {
            queue.charge(subject(Some(&number.to_string())), began + PERIOD * number);
        }
        assert!(queue.budgets().capacity() < 16, "{}", queue.budgets().capacity());
    }

    #[test]
    fn the_number_of_budgets_is_bounded() {
        let queue = Queue::default();
        let now = Instant::now();
        for number in 0..2 * BUDGETS_MAX {
            queue.charge(subject(Some(&number.to_string())), now);
        }
        assert!(queue.budgets().len() <= BUDGETS_MAX + 2);
    }
}
