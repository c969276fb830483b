// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Request and response, the most common shape of a device: the driver sends bytes, the device
//! answers with bytes (spec/service.md). A class is one function. This module handles the ring, the
//! buffers, the budget of a poll and the signals. The driver's half is `vbus_driver::requests`.
//!
//! ```
//! use vbus_core::service::{self, Service, Sizes};
//! use vbus_core::{ErrorCode, Identity};
//!
//! /// Gives each text back in capital letters.
//! struct Shout;
//!
//! impl Service for Shout {
//!     fn identity(&self) -> Identity {
//!         Identity::user("shout")
//!     }
//!     fn sizes(&self) -> Sizes {
//!         Sizes { request: 4096, response: 4096 }
//!     }
//!     fn answer(&self, request: &[u8], response: &mut Vec<u8>) -> Result<(), ErrorCode> {
//!         response.extend(request.iter().map(u8::to_ascii_uppercase));
//!         Ok(())
//!     }
//! }
//!
//! let device = service::device(Shout)?; // for `Bus::add`, or from `DeviceClass::create`
//! # let _ = device;
//! # Ok::<(), vbus_core::CreateError>(())
//! ```
//!
//! # A class that must block
//! A poll must not block: it runs on a thread that serves other devices too. A class whose answers
//! take time (it reads a file, asks a server, waits for a lock) says how many threads of its own it
//! needs ([`Service::threads`]). Its requests then go to these threads, the poll goes on, and a
//! thread that has an answer wakes the connection, which hands the answer to the driver. A device
//! that is not a service can do the same by hand: give the work to a thread with a clone of the
//! region's [`Doorbell`], and let the thread call [`Doorbell::wake`].

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex};

use serde_json::Value;
use vbus_shm::abi::service as abi;
use vbus_shm::memory::stored;
use vbus_shm::ring::{DeviceEnd, Entry, Return, Returns};
use vbus_shm::signal::Armed;
use vbus_shm::{ErrorCode, Memory, copy};

use crate::device::{Connection, CreateError, Device, Identity, Open, Region};
use crate::doorbell::Doorbell;
use crate::executor::Progress;
use crate::interrupt::Interrupt;
use crate::lock::lock;
use crate::memory::Window;

/// The most requests of a connection that the threads of a class have at a time. Further requests
/// wait in the ring.
const JOBS_MAX: usize = 64;
/// So many bytes count as one unit of a poll's budget.
const UNIT_BYTES: usize = 16 << 10;
const WORD: usize = 8;

/// A class of the form request and response.
pub trait Service: Send + Sync + 'static {
    /// What the device is.
    fn identity(&self) -> Identity;

    /// The largest request and the largest response.
    fn sizes(&self) -> Sizes;

    /// The class's own part of the config area, at most [`CONFIG_OWN_MAX`] bytes. The driver may
    /// read it at any time.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Answers a request, which has at most [`Sizes::request`] bytes: appends the response, at most
    /// [`Sizes::response`] bytes, to `response`, which is empty. `request` is a private copy: the
    /// driver cannot change it any more.
    ///
    /// An error goes to the driver as the result of this one request. The connection goes on.
    /// [`ErrorCode`]s from [`vbus_shm::abi::error_code::CLASS`] on are the class's own.
    ///
    /// Without [`threads`](Self::threads) of its own it must not block.
    fn answer(&self, request: &[u8], response: &mut Vec<u8>) -> Result<(), ErrorCode>;

    /// The number of threads that run [`answer`](Self::answer), for all connections together. It
    /// may then block, and requests are answered in any order. 0: it runs within the poll, in the
    /// order of the requests.
    fn threads(&self) -> usize {
        0
    }

    /// As [`Device::inspect`].
    fn inspect(&self) -> Value {
        Value::Object(serde_json::Map::new())
    }

    /// As [`Device::control`].
    fn control(&self, request: &Value, reply: &mut dyn FnMut(Value) -> bool) -> Result<(), String> {
        let _ = (request, reply);
        Err("this device takes no requests".into())
    }
}

/// The most bytes of a service's own part of the config area.
pub const CONFIG_OWN_MAX: usize = vbus_shm::abi::reg::CONFIG_MAX - abi::CONFIG_OWN;

/// The most bytes of a request and of a response, each 1..=[`abi::BYTES_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Of a request.
    pub request: u32,
    /// Of a response.
    pub response: u32,
}

impl Sizes {
    /// The bytes of a buffer. The response overwrites its request.
    fn buffer(self) -> usize {
        (self.request.max(self.response) as usize).next_multiple_of(abi::BUFFER_ALIGN)
    }
}

/// Makes a device of a service.
///
/// # Errors
/// A size of [`Service::sizes`] is out of its range, or [`Service::config`] is too long.
pub fn device<S: Service>(service: S) -> Result<Arc<dyn Device>, CreateError> {
    let sizes = service.sizes();
    for (what, bytes) in [("request", sizes.request), ("response", sizes.response)] {
        if !(1..=abi::BYTES_MAX).contains(&bytes) {
            return Err(CreateError(format!(
                "a {what} of this class has at most {bytes} bytes, which must be from 1 to {}",
                abi::BYTES_MAX
            )));
        }
    }
    let own = service.config().len();
    if own > CONFIG_OWN_MAX {
        return Err(CreateError(format!(
            "this class's own part of the config area has {own} bytes, but at most \
             {CONFIG_OWN_MAX} fit"
        )));
    }
    let service = Arc::new(service);
    let pool = (service.threads() > 0).then(|| Arc::new(Pool::default()));
    Ok(Arc::new(ServiceDevice { service, sizes, pool }))
}

struct ServiceDevice<S> {
    service: Arc<S>,
    sizes: Sizes,
    /// The threads of a class that blocks.
    pool: Option<Arc<Pool>>,
}

impl<S: Service> Device for ServiceDevice<S> {
    fn identity(&self) -> Identity {
        self.service.identity()
    }

    fn config(&self) -> Vec<u8> {
        let mut area =
            [self.sizes.request.to_le_bytes(), self.sizes.response.to_le_bytes()].concat();
        area.extend(self.service.config().into_iter().take(CONFIG_OWN_MAX));
        area
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        if let Some(pool) = &self.pool {
            pool.start(&self.service)?;
        }
        Ok(Box::new(Answering {
            service: self.service.clone(),
            sizes: self.sizes,
            jobs: self.pool.clone().map(Jobs::new),
            ring: None,
            request: Vec::new(),
            response: Vec::new(),
        }))
    }

    fn inspect(&self) -> Value {
        self.service.inspect()
    }

    fn control(&self, request: &Value, reply: &mut dyn FnMut(Value) -> bool) -> Result<(), String> {
        self.service.control(request, reply)
    }

    fn removed(&self) {
        if let Some(pool) = &self.pool {
            pool.end();
        }
    }
}

impl<S> Drop for ServiceDevice<S> {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            pool.end();
        }
    }
}

/// The buffers behind a ring, in the ring's region.
struct Buffers {
    /// The whole region.
    window: Window,
    /// Where the buffers begin.
    from: usize,
    sizes: Sizes,
}

/// An open connection.
struct Answering<S> {
    service: Arc<S>,
    sizes: Sizes,
    jobs: Option<Jobs>,
    ring: Option<Ring>,
    /// The buffers of requests and responses, kept from poll to poll.
    request: Vec<u8>,
    response: Vec<u8>,
}

struct Ring {
    end: DeviceEnd<Window>,
    buffers: Buffers,
    interrupt: Interrupt,
    doorbell: Doorbell,
}

impl<S: Service> Connection for Answering<S> {
    fn check_region(&mut self, id: u32, _: u64) -> Result<(), ErrorCode> {
        match self.ring {
            _ if id != abi::REGION => Err(ErrorCode::BAD_ARGUMENT),
            Some(_) => Err(ErrorCode::EXISTS),
            None => Ok(()),
        }
    }

    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
        self.check_region(region.id, 0)?;
        let end = DeviceEnd::attach(region.window.clone())?;
        // The response's length comes back in the entry.
        if end.layout().returns() != Returns::Entries {
            return Err(ErrorCode::BAD_LAYOUT);
        }
        let Region { window, interrupt, doorbell, .. } = region;
        let buffers = Buffers { window, from: end.layout().bytes(), sizes: self.sizes };
        self.ring = Some(Ring { end, buffers, interrupt, doorbell });
        Ok(())
    }

    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        let Some(ring) = &mut self.ring else { return Ok(Progress::Idle) };
        let mut left = budget as usize;
        let mut progress = Progress::Idle;
        if let Some(jobs) = &mut self.jobs {
            while let Some(Answer { entry, result }) = (left > 0).then(|| jobs.collect()).flatten()
            {
                let result = result.as_deref().map_err(|code| *code);
                let (back, units) = ring.buffers.finish(entry, result);
                ring.end.give_back(back);
                left = left.saturating_sub(units);
                progress = Progress::Busy;
            }
            while left > 0 && jobs.have_room() {
                let Some(entry) = ring.end.take()? else { break };
                progress = Progress::Busy;
                left = left.saturating_sub(ring.buffers.copy_in(entry, &mut self.request)?);
                jobs.give(entry, std::mem::take(&mut self.request), &ring.doorbell);
            }
        } else {
            let mut fault = None;
            ring.end.serve_all(budget, |entry| {
                if left == 0 {
                    return None;
                }
                progress = Progress::Busy;
                let copied = ring.buffers.copy_in(entry, &mut self.request);
                let units = copied.map_err(|code| fault = Some(code)).ok()?;
                self.response.clear();
                let result = self.service.answer(&self.request, &mut self.response);
                let result = result.map(|()| self.response.as_slice());
                let (back, more) = ring.buffers.finish(entry, result);
                left = left.saturating_sub(units + more);
                Some(back)
            })?;
            if let Some(code) = fault {
                return Err(code);
            }
        }
        ring.interrupt.kick(ring.end.post());
        Ok(progress)
    }

    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        let Some(ring) = &mut self.ring else { return Ok(Armed::Waiting) };
        // The threads have as many requests as they may have. New requests must wait. The next
        // answer of a thread wakes this connection.
        if self.jobs.as_ref().is_some_and(|jobs| !jobs.have_room()) {
            return Ok(Armed::Waiting);
        }
        Ok(ring.end.arm(0))
    }

    fn disarm(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.end.disarm();
        }
    }
}

impl Buffers {
    /// Copies the request of an entry out of the shared memory. The driver wrote the entry, so all
    /// of it is checked. Returns the units of a poll's budget that this took.
    fn copy_in(&self, entry: Entry, request: &mut Vec<u8>) -> Result<usize, ErrorCode> {
        if entry.len > self.sizes.request {
            return Err(ErrorCode::BAD_LENGTH);
        }
        if entry.flags != 0 {
            return Err(ErrorCode::BAD_ARGUMENT);
        }
        let at = usize::try_from(entry.addr).map_err(|_| ErrorCode::BAD_ADDRESS)?;
        if at % abi::BUFFER_ALIGN != 0 {
            return Err(ErrorCode::BAD_ALIGNMENT);
        }
        // The whole buffer has to lie behind the ring, because the response goes there too.
        let end = at.checked_add(self.sizes.buffer()).ok_or(ErrorCode::BAD_ADDRESS)?;
        if at < self.from || end > self.window.bytes() {
            return Err(ErrorCode::BAD_ADDRESS);
        }
        request.clear();
        request.resize(entry.len as usize, 0);
        copy::load(&self.window.words()[at / WORD..end / WORD], request);
        Ok(1 + request.len() / UNIT_BYTES)
    }

    /// Puts the response into the buffer of its request. Returns the return for the entry, and the
    /// units of a poll's budget that this took.
    fn finish(&self, entry: Entry, result: Result<&[u8], ErrorCode>) -> (Return, usize) {
        let result = match result {
            Ok(response) if response.len() > self.sizes.response as usize => {
                tracing::error!(
                    "a response of {} bytes; this class promised at most {}",
                    response.len(),
                    self.sizes.response
                );
                Err(ErrorCode::FAILED)
            }
            result => result,
        };
        let (response, len, flags) = match result {
            Ok(response) => (response, u32::try_from(response.len()).unwrap_or(0), 0),
            Err(code) => (&[][..], code.0, abi::REFUSED),
        };
        // `copy_in` has checked the address, and the region cannot change meanwhile.
        let at = usize::try_from(entry.addr).unwrap_or(usize::MAX) / WORD;
        let words = response.len().div_ceil(WORD);
        if let Some(buffer) = self.window.words().get(at..).and_then(|rest| rest.get(..words)) {
            copy::store(buffer, response);
            stored(&self.window, at, words);
        }
        (Return { len, id: entry.id, flags }, 1 + response.len() / UNIT_BYTES)
    }
}

/// The response to a request, or the error code of its refusal.
struct Answer {
    entry: Entry,
    result: Result<Vec<u8>, ErrorCode>,
}

/// The requests of one connection that the class's threads have.
struct Jobs {
    pool: Arc<Pool>,
    done: Arc<Mutex<VecDeque<Answer>>>,
    /// Number of requests that were given to the threads and not collected.
    count: usize,
}

impl Jobs {
    fn new(pool: Arc<Pool>) -> Jobs {
        Jobs { pool, done: Arc::default(), count: 0 }
    }

    fn have_room(&self) -> bool {
        self.count < JOBS_MAX
    }

    fn give(&mut self, entry: Entry, request: Vec<u8>, doorbell: &Doorbell) {
        self.count += 1;
        let job = Job { entry, request, done: self.done.clone(), doorbell: doorbell.clone() };
        lock(&self.pool.queue).jobs.push_back(job);
        self.pool.news.notify_one();
    }

    /// Takes the next answer that is ready.
    fn collect(&mut self) -> Option<Answer> {
        let answer = lock(&self.done).pop_front();
        self.count -= usize::from(answer.is_some());
        answer
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        // Nobody waits for these answers any more. A thread that is answering one of the requests
        // finishes it, and its answer is dropped.
        lock(&self.pool.queue).jobs.retain(|job| !Arc::ptr_eq(&job.done, &self.done));
    }
}

/// A request on its way to a thread.
struct Job {
    entry: Entry,
    request: Vec<u8>,
    done: Arc<Mutex<VecDeque<Answer>>>,
    doorbell: Doorbell,
}

/// The threads of a device, and their queue of requests. The threads belong to the device: their
/// number does not grow when drivers open and close the device.
#[derive(Default)]
struct Pool {
    queue: Mutex<Queue>,
    news: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    started: bool,
    ended: bool,
}

impl Pool {
    /// Starts the threads, unless they have been started.
    fn start<S: Service>(self: &Arc<Pool>, service: &Arc<S>) -> Result<(), ErrorCode> {
        let mut queue = lock(&self.queue);
        if queue.started {
            return Ok(());
        }
        for number in 0..service.threads() {
            let (pool, service) = (self.clone(), service.clone());
            let thread = std::thread::Builder::new().name("vbus-service".into());
            if let Err(error) = thread.spawn(move || pool.work(&*service)) {
                if number == 0 {
                    tracing::error!(%error, "cannot start a thread for requests");
                    return Err(ErrorCode::FAILED);
                }
                tracing::warn!(%error, "only {number} threads for requests");
                break;
            }
        }
        queue.started = true;
        Ok(())
    }

    /// Ends the threads. A thread that is answering a request finishes it first.
    fn end(&self) {
        let mut queue = lock(&self.queue);
        queue.ended = true;
        queue.jobs.clear();
        drop(queue);
        self.news.notify_all();
    }

    fn next(&self) -> Option<Job> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.ended {
                return None;
            }
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            queue = self.news.wait(queue).unwrap_or_else(|e| e.into_inner());
        }
    }

    fn work<S: Service>(&self, service: &S) {
        while let Some(Job { entry, request, done, doorbell }) = self.next() {
            let answer = || {
                let mut response = Vec::new();
                service.answer(&request, &mut response).map(|()| response)
            };
            let result = catch_unwind(AssertUnwindSafe(answer)).unwrap_or_else(|_| {
                tracing::error!("the class panicked while it answered a request");
                Err(ErrorCode::FAILED)
            });
            lock(&done).push_back(Answer { entry, result });
            doorbell.wake();
        }
    }
}
