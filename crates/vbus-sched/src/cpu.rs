// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One virtual CPU: its pages and its thread. The request page decides the scheduling class of the
//! thread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vbus_core::shm::abi::sched as abi;
use vbus_core::shm::abi::sched::report as word;
use vbus_core::shm::signal::{Armed, end};
use vbus_core::shm::state::{Overrun, Reader, SIGNAL_OFFSET, Writer};
use vbus_core::{ErrorCode, Interrupt, Metric, Region, Window, state};

use crate::config::CLASS_NAMES;
use crate::policy::{BadRequest, Budget, Grant, Policy, Setting, Share, parse};
use crate::thread::Thread;

/// What the numbers of a virtual CPU mean.
pub const METRICS: &[Metric] = &[
    Metric::gauge(
        "cpus.{cpu=cpu}.priority",
        "sched_priority",
        "The real-time priority or the nice value that the thread has",
    )
    .unit("levels"),
    Metric::counter(
        "cpus.{cpu=cpu}.updates",
        "sched_updates",
        "Requests of the driver that the device read",
    )
    .unit("requests"),
    Metric::counter(
        "cpus.{cpu=cpu}.changes",
        "sched_changes",
        "Times that the device set or restored the thread's class",
    ),
    Metric::counter(
        "cpus.{cpu=cpu}.clamped",
        "sched_clamped",
        "Requests that the device granted in part",
    )
    .unit("requests"),
    Metric::counter(
        "cpus.{cpu=cpu}.refused",
        "sched_refused",
        "Requests that the policy or the host's kernel refused",
    )
    .unit("requests"),
    Metric::counter(
        "cpus.{cpu=cpu}.limited",
        "sched_limited",
        "Times that the rate limit delayed a reading",
    ),
    Metric::counter(
        "cpus.{cpu=cpu}.expired",
        "sched_expired",
        "Times that a real-time class ended, because no further request came or the share was \
         used up",
    ),
    Metric::counter(
        "cpus.{cpu=cpu}.overruns",
        "sched_overruns",
        "Readings that the driver spoiled, because it wrote faster than the device could read",
    )
    .unit("readings"),
];

/// The counts for one virtual CPU, over the life of the device.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Counts {
    updates: u64,
    changes: u64,
    clamped: u64,
    refused: u64,
    limited: u64,
    expired: u64,
    overruns: u64,
}

/// A virtual CPU as plain data (spec/state-format.md, "sched").
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuState {
    outcome: u32,
    counts: Counts,
    /// The present request, if there is a request page.
    request: Option<RequestState>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestState {
    /// The version that the device looked at last.
    seen: u64,
    /// Milliseconds since then.
    age_ms: u64,
}

/// The driver's present request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    /// The thread's own class.
    Own,
    This(Setting),
    Bad,
}

/// A driver's request page.
struct Requests {
    handle: u32,
    reader: Reader<Window, end::Device>,
    /// The version that the device looked at last.
    seen: u64,
    wish: Wish,
    /// When the device looked last.
    looked: Instant,
    /// Whether a newer request waits for the budget.
    put_off: bool,
}

/// A driver's report page.
struct Reports {
    handle: u32,
    writer: Writer<Window, end::Device>,
    interrupt: Interrupt,
}

/// See the module.
pub struct Cpu {
    /// The device's name, for the log.
    device: Arc<str>,
    thread: Option<Thread>,
    requests: Option<Requests>,
    reports: Option<Reports>,
    budget: Budget,
    share: Share,
    /// When to read the thread's processor time again.
    look_at_share: Option<Instant>,
    /// [`word::OUTCOME`].
    outcome: u32,
    /// The error of this connection's refused change that the log had last. The log gets another
    /// error, but not the same one again: the driver could cause that line at will.
    told: Option<Errno>,
    counts: Counts,
    /// The thread has its own class, and shall have that of the present request again.
    again: bool,
}

/// The result of a [`step`](Cpu::step).
#[derive(Clone, Copy, Debug, Default)]
pub struct Step {
    /// Whether the step did any work.
    pub busy: bool,
    /// When the next step is due if no event comes.
    pub deadline: Option<Instant>,
}

impl Step {
    /// Makes the next step due at `at` at the latest.
    fn until(&mut self, at: Instant) {
        self.deadline = Some(self.deadline.map_or(at, |deadline| deadline.min(at)));
    }
}

impl Cpu {
    /// Makes a virtual CPU of the device with this name.
    pub fn new(device: Arc<str>, policy: &Policy) -> Cpu {
        Cpu {
            device,
            thread: None,
            requests: None,
            reports: None,
            budget: Budget::new(policy.changes),
            share: Share::new(policy.share),
            look_at_share: None,
            outcome: word::OK,
            told: None,
            counts: Counts::default(),
            again: false,
        }
    }

    /// The device is quiesced: the thread gets its own class until the next step.
    pub fn park(&mut self) {
        let outcome = self.outcome;
        self.settle(Instant::now(), None);
        (self.outcome, self.again) = (outcome, true);
    }

    /// The virtual CPU as plain data.
    pub fn save(&self, now: Instant) -> CpuState {
        let request = self.requests.as_ref().map(|requests| {
            let age = now.saturating_duration_since(requests.looked).as_millis();
            RequestState { seen: requests.seen, age_ms: u64::try_from(age).unwrap_or(u64::MAX) }
        });
        CpuState { outcome: self.outcome, counts: self.counts, request }
    }

    /// Goes on from what [`save`](Self::save) returned, with the pages registered.
    ///
    /// # Errors
    /// The state is wrong.
    pub fn restore(&mut self, saved: &CpuState, now: Instant) -> Result<(), String> {
        let Counts { updates, changes, clamped, refused, limited, expired, overruns } =
            saved.counts;
        for count in [updates, changes, clamped, refused, limited, expired, overruns] {
            state::check_count("a count", count)?;
        }
        if saved.outcome > word::IS_SPENT {
            return Err(format!("outcome is {}", saved.outcome));
        }
        match (&mut self.requests, &saved.request) {
            (Some(requests), Some(RequestState { seen, age_ms })) => {
                // The present request, if the driver has not made a newer one. It is counted.
                if requests.reader.version() == *seen {
                    requests.look(now, &mut Counts::default());
                }
                requests.seen = *seen;
                let age = Duration::from_millis(*age_ms);
                requests.looked = now.checked_sub(age).unwrap_or(now);
            }
            (None, None) => {}
            _ => return Err("a request is there without its page, or not there with it".into()),
        }
        (self.outcome, self.counts, self.again) = (saved.outcome, saved.counts, true);
        Ok(())
    }

    /// The driver had registered the report page with a device that this one goes on for.
    pub fn show_reports_again(&mut self, region: &Region) -> Result<(), ErrorCode> {
        if self.reports.is_some() {
            return Err(ErrorCode::EXISTS);
        }
        // The driver is interrupted anyway.
        let (writer, _) = Writer::resume(checked(region)?, end::Device)?;
        if writer.layout().value_bytes() != abi::report::BYTES as usize {
            return Err(ErrorCode::BAD_LENGTH);
        }
        self.reports =
            Some(Reports { handle: region.handle, writer, interrupt: region.interrupt.clone() });
        Ok(())
    }

    /// The driver registers the request page.
    pub fn show_requests(&mut self, region: &Region) -> Result<(), ErrorCode> {
        if self.requests.is_some() {
            return Err(ErrorCode::EXISTS);
        }
        let reader = Reader::attach(checked(region)?, end::Device)?;
        if reader.layout().value_bytes() != abi::request::BYTES as usize {
            return Err(ErrorCode::BAD_LENGTH);
        }
        // A new page is at version 0, and its zeros are not a request.
        let (looked, wish) = (Instant::now(), Wish::Own);
        let handle = region.handle;
        self.requests = Some(Requests { handle, reader, seen: 0, wish, looked, put_off: false });
        Ok(())
    }

    /// The driver registers the report page.
    pub fn show_reports(&mut self, region: &Region) -> Result<(), ErrorCode> {
        if self.reports.is_some() {
            return Err(ErrorCode::EXISTS);
        }
        let writer = Writer::attach(checked(region)?, end::Device)?;
        if writer.layout().value_bytes() != abi::report::BYTES as usize {
            return Err(ErrorCode::BAD_LENGTH);
        }
        self.reports =
            Some(Reports { handle: region.handle, writer, interrupt: region.interrupt.clone() });
        self.report();
        Ok(())
    }

    /// The driver drops region `handle`. If that was the request page, the device restores the
    /// thread's own class.
    pub fn hide(&mut self, handle: u32) {
        self.reports.take_if(|reports| reports.handle == handle);
        if self.requests.take_if(|requests| requests.handle == handle).is_some() {
            self.settle(Instant::now(), None);
            self.report();
        }
    }

    /// The driver has gone: drops its pages and restores the thread's own class. Returns the
    /// thread.
    pub fn close(&mut self) -> Option<Thread> {
        (self.requests, self.reports) = (None, None);
        self.settle(Instant::now(), None);
        self.told = None;
        self.thread.take()
    }

    /// Whether there is a request page whose thread is not known.
    pub fn wants_thread(&self) -> bool {
        self.requests.is_some() && self.thread.is_none()
    }

    /// Sets the thread of this virtual CPU.
    pub fn give_thread(&mut self, thread: Thread) {
        self.share.forget();
        self.thread = Some(thread);
    }

    /// Reads the newest request, if there is one and the budget allows it. Then changes the thread
    /// if its class is not the granted one.
    pub fn step(&mut self, now: Instant, policy: &Policy) -> Step {
        let mut step = Step::default();
        let Some(requests) = &mut self.requests else { return step };
        if requests.reader.version() != requests.seen {
            match self.budget.take(now) {
                Ok(()) => {
                    step.busy = true;
                    requests.look(now, &mut self.counts);
                    self.settle_first(now, policy);
                }
                Err(at) => {
                    if !std::mem::replace(&mut requests.put_off, true) {
                        self.counts.limited += 1;
                    }
                    step.deadline = Some(at);
                }
            }
        } else if self.again && self.thread.is_some() {
            step.busy = true;
            self.settle(now, Some(policy));
        } else if self.outcome == word::NO_THREAD && self.thread.is_some() {
            step.busy = true;
            self.settle_first(now, policy);
        }
        if self.look_at_share.is_some_and(|at| at <= now) {
            let before = self.outcome;
            self.settle(now, Some(policy));
            step.busy |= self.outcome != before;
            self.counts.expired +=
                u64::from(self.outcome == word::IS_SPENT && before != word::IS_SPENT);
        }
        if let Some(end) = self.end(policy) {
            if end <= now {
                self.counts.expired += 1;
                step.busy = true;
                self.settle(now, Some(policy));
            } else {
                step.until(end);
            }
        }
        self.look_at_share = self
            .share
            .deadline(now)
            .filter(|_| self.is_real_time() || self.outcome == word::IS_SPENT);
        self.look_at_share.into_iter().for_each(|at| step.until(at));
        if step.busy {
            self.report();
        }
        step
    }

    /// Whether this device has given the thread a real-time class.
    fn is_real_time(&self) -> bool {
        self.thread.as_ref().and_then(Thread::setting).is_some_and(Setting::is_real_time)
    }

    /// When the thread's real-time class ends, if it has one.
    fn end(&self, policy: &Policy) -> Option<Instant> {
        let requests = self.requests.as_ref().filter(|_| self.is_real_time())?;
        Some(requests.looked + policy.boost)
    }

    /// Applies a new request, and counts the outcome.
    fn settle_first(&mut self, now: Instant, policy: &Policy) {
        self.settle(now, Some(policy));
        match self.outcome {
            word::IS_CLAMPED => self.counts.clamped += 1,
            word::BAD_REQUEST | word::NOT_ALLOWED | word::FAILED => self.counts.refused += 1,
            _ => {}
        }
    }

    /// Gives the thread the part of the present request that `policy` grants; without a policy, its
    /// own class. Accounts for the time at a real-time class.
    fn settle(&mut self, now: Instant, policy: Option<&Policy>) {
        self.again &= self.thread.is_none();
        self.account(now);
        let request = self
            .requests
            .as_ref()
            .zip(policy)
            .map(|(requests, policy)| (requests.wish, requests.looked, policy));
        let Some(thread) = &mut self.thread else {
            let is_for_thread = request.is_some_and(|(wish, ..)| wish != Wish::Own);
            self.outcome = if is_for_thread { word::NO_THREAD } else { word::OK };
            return;
        };
        let (outcome, setting) = match request {
            Some((Wish::This(wish), looked, policy)) => match policy
                .judge(wish, || thread.own_nice())
            {
                Ok(Grant::Refused) => (word::NOT_ALLOWED, None),
                Ok(_) if wish.is_real_time() && looked + policy.boost <= now => {
                    (word::HAS_EXPIRED, None)
                }
                Ok(_) if wish.is_real_time() && self.share.is_spent(now) => (word::IS_SPENT, None),
                Ok(Grant::Whole(setting)) => (word::OK, Some(setting)),
                Ok(Grant::Clamped(setting)) => (word::IS_CLAMPED, Some(setting)),
                Err(error) => return self.fail(error),
            },
            Some((Wish::Bad, ..)) => (word::BAD_REQUEST, None),
            Some((Wish::Own, ..)) | None => (word::OK, None),
        };
        let done = match setting {
            Some(setting) => thread.apply(setting),
            None => thread.restore(),
        };
        match done {
            Ok(changed) => self.counts.changes += u64::from(changed),
            Err(error) => return self.fail(error),
        }
        self.outcome = outcome;
        self.account(now);
    }

    /// Reads the processor time that the thread has used, if there is a limit on it.
    fn account(&mut self, now: Instant) {
        let is_real_time = self.is_real_time();
        if let Some(thread) = self.thread.as_ref().filter(|_| self.share.is_bounded()) {
            self.share.look(now, thread.time(), is_real_time);
        }
    }

    /// Handles a refused change: the thread has ended, or this process may not change it.
    fn fail(&mut self, error: Errno) {
        if error == Errno::SRCH {
            self.thread = None;
            self.outcome = word::NO_THREAD;
            return;
        }
        if self.told.replace(error) != Some(error) {
            let tid = self.thread.as_ref().map(Thread::tid);
            let advice = match error {
                Errno::PERM | Errno::ACCESS => "; vbus needs CAP_SYS_NICE",
                _ => "",
            };
            let text = "cannot set a thread's scheduling class";
            tracing::warn!(device = &*self.device, thread = tid, %error, "{text}{advice}");
        }
        self.outcome = word::FAILED;
    }

    /// Writes the report page.
    fn report(&mut self) {
        let Some(reports) = &mut self.reports else { return };
        let setting = self.thread.as_ref().and_then(Thread::setting);
        let setting = setting.unwrap_or(Setting { class: abi::CLASS_NONE, priority: 0 });
        let version = self.requests.as_ref().map_or(0, |requests| requests.seen);
        let mut value = [0; word::BYTES as usize];
        let words = [
            (word::OUTCOME, self.outcome),
            (word::CLASS, setting.class),
            (word::PRIORITY, setting.priority as u32),
        ];
        for (at, word) in words {
            value[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        let Counts { updates, changes, clamped, refused, limited, expired, .. } = self.counts;
        let counts = [
            (word::VERSION, version),
            (word::UPDATES, updates),
            (word::CHANGES, changes),
            (word::CLAMPED, clamped),
            (word::REFUSED, refused),
            (word::LIMITED, limited),
            (word::EXPIRED, expired),
        ];
        for (at, count) in counts {
            value[at..at + 8].copy_from_slice(&count.to_le_bytes());
        }
        reports.interrupt.kick(reports.writer.write(&value));
    }

    /// Asks the driver to ring with its next request. Does not ask while a request waits for the
    /// budget, because the task reads that one by a timer.
    pub fn arm(&mut self) -> Armed {
        match &mut self.requests {
            Some(requests) if !requests.put_off => requests.reader.arm_newer(requests.seen),
            _ => Armed::Waiting,
        }
    }

    /// Asks for no doorbell.
    pub fn disarm(&mut self) {
        if let Some(requests) = &mut self.requests {
            requests.reader.disarm();
        }
    }

    /// Its state and counters, if it is or was in use.
    pub fn inspect(&self, cpu: usize) -> Option<Value> {
        if self.thread.is_none() && self.requests.is_none() && self.counts.updates == 0 {
            return None;
        }
        let setting = self.thread.as_ref().and_then(Thread::setting);
        let class = setting.map_or(CLASS_NAMES[0], |setting| CLASS_NAMES[setting.class as usize]);
        let Counts { updates, changes, clamped, refused, limited, expired, overruns } = self.counts;
        Some(json!({
            "cpu": cpu,
            "thread": self.thread.as_ref().map(Thread::tid),
            "class": class,
            "priority": setting.map_or(0, |setting| setting.priority),
            "outcome": OUTCOME_NAMES[self.outcome as usize],
            "updates": updates,
            "changes": changes,
            "clamped": clamped,
            "refused": refused,
            "limited": limited,
            "expired": expired,
            "overruns": overruns,
        }))
    }
}

/// The names of the outcomes, by number.
const OUTCOME_NAMES: [&str; 8] =
    ["ok", "clamped", "bad request", "not allowed", "expired", "no thread", "failed", "spent"];

impl Requests {
    /// Reads the newest request.
    fn look(&mut self, now: Instant, counts: &mut Counts) {
        self.put_off = false;
        let mut value = [0; abi::request::BYTES as usize];
        match self.reader.read(&mut value) {
            Ok(version) => {
                self.seen = version;
                self.looked = now;
                self.wish = match parse(&value) {
                    Ok(None) => Wish::Own,
                    Ok(Some(setting)) => Wish::This(setting),
                    Err(BadRequest) => Wish::Bad,
                };
                counts.updates += 1;
            }
            // The writer never pauses. The former request stays, and the device reads again later.
            Err(Overrun) => counts.overruns += 1,
        }
    }
}

/// The memory of a page. Fails unless the region's signal block is at its place.
fn checked(region: &Region) -> Result<Window, ErrorCode> {
    if region.signal_offset == Some(SIGNAL_OFFSET) {
        Ok(region.window.clone())
    } else {
        Err(ErrorCode::BAD_SIGNAL)
    }
}
