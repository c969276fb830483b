// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Driver of `sched`: the scheduling class of virtual CPUs' threads (spec/sched.md).

use vbus_shm::abi::{class, sched as abi};
use vbus_shm::signal::Armed;
use vbus_shm::signal::end::Driver;
use vbus_shm::state::{self, Overrun};

use crate::{Bell, Error, Function, Hal, state_page};

/// A scheduling class, and the priority within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The class that the thread has without this device.
    Own,
    /// Time-sharing, with a nice value of -20..=19.
    Normal(i32),
    /// Time-sharing for batch work, with a nice value of -20..=19.
    Batch(i32),
    /// The thread runs only when no other thread wants to.
    Idle,
    /// Real time, first in, first out, with a priority of 1..=99.
    Fifo(i32),
    /// Real time, round robin, with a priority of 1..=99.
    RoundRobin(i32),
}

impl Class {
    /// Number of the class and priority, as in the pages.
    fn numbers(self) -> (u32, i32) {
        match self {
            Class::Own => (abi::CLASS_NONE, 0),
            Class::Normal(nice) => (abi::CLASS_NORMAL, nice),
            Class::Batch(nice) => (abi::CLASS_BATCH, nice),
            Class::Idle => (abi::CLASS_IDLE, 0),
            Class::Fifo(priority) => (abi::CLASS_FIFO, priority),
            Class::RoundRobin(priority) => (abi::CLASS_RR, priority),
        }
    }

    fn from_numbers(class: u32, priority: i32) -> Option<Class> {
        Some(match class {
            abi::CLASS_NONE => Class::Own,
            abi::CLASS_NORMAL => Class::Normal(priority),
            abi::CLASS_BATCH => Class::Batch(priority),
            abi::CLASS_IDLE => Class::Idle,
            abi::CLASS_FIFO => Class::Fifo(priority),
            abi::CLASS_RR => Class::RoundRobin(priority),
            _ => return None,
        })
    }

    /// Whether it is one of the real-time classes, which end unless they are posted again in time
    /// ([`Limits::boost_ms`]).
    pub fn is_real_time(self) -> bool {
        matches!(self, Class::Fifo(_) | Class::RoundRobin(_))
    }
}

/// The most that the device grants.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Virtual CPUs that have pages.
    pub cpus: u32,
    /// Bit n: class number n ([`abi`]) is allowed.
    pub classes: u32,
    /// The highest real-time priority. The device lowers higher priorities to it.
    pub priority_max: u32,
    /// The lowest nice value. `None`: the thread's own nice value is the lowest.
    pub nice_min: Option<i32>,
    /// How many posts a second the device looks at, for each virtual CPU. Of posts that come
    /// faster, it looks at the newest.
    pub changes: u32,
    /// Milliseconds after the last post until a real-time class ends.
    pub boost_ms: u32,
    /// Percent of each second's processor time that a thread may use in a real-time class.
    pub share: u32,
}

impl Limits {
    /// Whether the class is allowed at some priority.
    pub fn allows(&self, class: Class) -> bool {
        self.classes & 1 << class.numbers().0 != 0 || class == Class::Own
    }
}

/// The outcome of the newest request that the device has looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The device granted the request.
    Granted,
    /// The device granted the class, at the nearest allowed priority.
    Clamped,
    /// The request is malformed.
    BadRequest,
    /// The class is not allowed.
    NotAllowed,
    /// The device granted the class, but no other request came in time.
    Expired,
    /// The device does not know the virtual CPU's thread (yet).
    NoThread,
    /// The host's kernel refused.
    Failed,
    /// The device granted the class, but the thread has used its share of this second. It gets the
    /// class again in the next second.
    Spent,
}

/// The device's report on a virtual CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// The outcome of the newest request.
    pub outcome: Outcome,
    /// The thread's class now.
    pub class: Class,
    /// Number of the newest request that the device has looked at: see [`Cpu::version`].
    pub version: u64,
    /// Requests that the device has looked at.
    pub updates: u64,
    /// How often the device has set the thread's class.
    pub changes: u64,
    /// Requests that the device granted at another priority.
    pub clamped: u64,
    /// Requests that the device refused.
    pub refused: u64,
    /// How often the rate limit put off a look.
    pub limited: u64,
    /// How often a real-time class ended, because no other request came in time or because the
    /// thread had used its share.
    pub expired: u64,
}

/// A `sched` device with an open connection.
#[derive(Debug)]
pub struct Cpus<H: Hal> {
    function: Function<H>,
    limits: Limits,
}

impl<H: Hal> Cpus<H> {
    /// Opens it.
    pub fn open(mut function: Function<H>) -> Result<Self, Error> {
        if function.info().class != u32::from(class::SCHED) {
            return Err(Error::WrongClass(function.info().class));
        }
        let mut area = [0; abi::CONFIG_BYTES];
        function.config(&mut area)?;
        let word = |at: usize| [area[at], area[at + 1], area[at + 2], area[at + 3]];
        let number = |at| u32::from_le_bytes(word(at));
        let nice_min = i32::from_le_bytes(word(abi::CONFIG_NICE_MIN));
        let limits = Limits {
            cpus: number(abi::CONFIG_CPUS).min(abi::CPUS_MAX),
            classes: number(abi::CONFIG_CLASSES),
            priority_max: number(abi::CONFIG_PRIORITY_MAX),
            nice_min: Some(nice_min).filter(|nice| *nice != abi::NICE_OWN),
            changes: number(abi::CONFIG_CHANGES),
            boost_ms: number(abi::CONFIG_BOOST_MS),
            share: number(abi::CONFIG_SHARE),
        };
        function.open(0)?;
        Ok(Cpus { function, limits })
    }

    /// The most that the device grants.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The function.
    pub fn function(&self) -> &Function<H> {
        &self.function
    }

    /// Registers the pages of virtual CPU `cpu`, once; [`Limits::cpus`] says how many there are.
    /// Reports interrupt on vector 0.
    pub fn cpu(&mut self, cpu: u32) -> Result<Cpu<H>, Error> {
        if cpu >= self.limits.cpus {
            return Err(Error::Unsupported("a virtual CPU that has no pages"));
        }
        let function = &mut self.function;
        let (requests, region) =
            state_page::writer(function, abi::request_page(cpu), 0, abi::request::BYTES)?;
        let (reports, _) =
            state_page::reader(function, abi::report_page(cpu), 0, abi::report::BYTES)?;
        Ok(Cpu { requests, bell: self.function.bell(region.handle()), reports })
    }

    /// Closes the connection. Every thread has its own class again when this returns.
    pub fn close(&mut self) {
        self.function.close();
    }
}

/// The pages of a virtual CPU.
#[derive(Debug)]
pub struct Cpu<H: Hal> {
    requests: state::Writer<H::Dma, Driver>,
    bell: Bell<H>,
    reports: state::Reader<H::Dma, Driver>,
}

impl<H: Hal> Cpu<H> {
    /// Posts the class of what runs on the virtual CPU now. It costs a store, and a doorbell if the
    /// device sleeps. Of posts in quick succession, the device may look at the newest only.
    pub fn post(&mut self, class: Class) {
        let (class, priority) = class.numbers();
        let mut value = [0; abi::request::BYTES as usize];
        value[abi::request::CLASS..][..4].copy_from_slice(&class.to_le_bytes());
        value[abi::request::PRIORITY..][..4].copy_from_slice(&priority.to_le_bytes());
        self.bell.kick(self.requests.write(&value));
    }

    /// Number of the newest post.
    pub fn version(&self) -> u64 {
        self.requests.version()
    }

    /// The newest report, and its number.
    pub fn report(&self) -> Result<(Report, u64), Error> {
        let mut value = [0; abi::report::BYTES as usize];
        let number = self
            .reports
            .read(&mut value)
            .map_err(|Overrun| Error::Corrupt("the report page changes during every read"))?;
        let word = |at: usize| [value[at], value[at + 1], value[at + 2], value[at + 3]];
        let count = |at: usize| {
            u64::from(u32::from_le_bytes(word(at)))
                | u64::from(u32::from_le_bytes(word(at + 4))) << 32
        };
        let outcome = match u32::from_le_bytes(word(abi::report::OUTCOME)) {
            abi::report::OK => Outcome::Granted,
            abi::report::IS_CLAMPED => Outcome::Clamped,
            abi::report::BAD_REQUEST => Outcome::BadRequest,
            abi::report::NOT_ALLOWED => Outcome::NotAllowed,
            abi::report::HAS_EXPIRED => Outcome::Expired,
            abi::report::NO_THREAD => Outcome::NoThread,
            abi::report::FAILED => Outcome::Failed,
            abi::report::IS_SPENT => Outcome::Spent,
            _ => return Err(Error::Corrupt("a report with an unknown outcome")),
        };
        let priority = i32::from_le_bytes(word(abi::report::PRIORITY));
        let class = Class::from_numbers(u32::from_le_bytes(word(abi::report::CLASS)), priority)
            .ok_or(Error::Corrupt("a report with an unknown class"))?;
        let report = Report {
            outcome,
            class,
            version: count(abi::report::VERSION),
            updates: count(abi::report::UPDATES),
            changes: count(abi::report::CHANGES),
            clamped: count(abi::report::CLAMPED),
            refused: count(abi::report::REFUSED),
            limited: count(abi::report::LIMITED),
            expired: count(abi::report::EXPIRED),
        };
        Ok((report, number))
    }

    /// Asks for an interrupt by the first report after number `than`.
    pub fn arm_report(&mut self, than: u64) -> Armed {
        self.reports.arm_newer(than)
    }

    /// Asks for no interrupt.
    pub fn disarm_report(&mut self) {
        self.reports.disarm();
    }
}
