//! A thread of another process: what the kernel says of its scheduling, changed for a while and put back.
#![allow(unsafe_code)] // The two system calls have no safe wrapper.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, getpriority_process, setpriority_process};
use vbus_core::shm::abi::sched as abi;

use super::policy::Setting;
use crate::lock;

/// What `sched_getattr` and `sched_setattr` take, in its first form, which every kernel knows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

const BYTES: u32 = 48;
const _: () = assert!(size_of::<Attributes>() == BYTES as usize);

/// Threads and processes that the thread makes get none of its class.
const RESET_ON_FORK: u64 = 1;

const OTHER: u32 = 0;
const FIFO: u32 = 1;
const RR: u32 = 2;
const BATCH: u32 = 3;
const IDLE: u32 = 5;

fn get(tid: i32) -> Result<Attributes, Errno> {
    let mut attributes = Attributes::default();
    // SAFETY: the kernel writes at most BYTES bytes to the structure, which has as many.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut attributes, BYTES, 0) };
    if result < 0 { Err(last_errno()) } else { Ok(attributes) }
}

fn set(tid: i32, attributes: Attributes) -> Result<(), Errno> {
    let attributes = Attributes { size: BYTES, ..attributes };
    // SAFETY: the kernel only reads the structure, of the size that stands in it.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, tid, &raw const attributes, 0) };
    if result < 0 { Err(last_errno()) } else { Ok(()) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

impl Attributes {
    /// What `setting` makes of a thread that has been `self`.
    fn with(self, setting: Setting) -> Attributes {
        let policy = match setting.class {
            abi::CLASS_BATCH => BATCH,
            abi::CLASS_IDLE => IDLE,
            abi::CLASS_FIFO => FIFO,
            abi::CLASS_RR => RR,
            _ => OTHER,
        };
        let mut attributes = Attributes { policy, flags: RESET_ON_FORK, ..Attributes::default() };
        if setting.is_real_time() {
            attributes.priority = setting.priority.unsigned_abs();
        } else {
            attributes.nice = setting.priority;
            // From Linux 6.12 on, the length of its time slice.
            attributes.runtime = if self.is_fair() { self.runtime } else { 0 };
        }
        attributes
    }

    fn is_fair(self) -> bool {
        matches!(self.policy, OTHER | BATCH | IDLE)
    }

    /// Whether setting it sets the nice value too. The other classes keep one that has no effect.
    fn has_nice(self) -> bool {
        matches!(self.policy, OTHER | BATCH)
    }

    /// Whether a thread that was made `self` is so still; the kernel does not return all fields as they were set.
    fn is_still(self, now: Attributes) -> bool {
        (self.policy, self.priority) == (now.policy, now.priority) && (!self.has_nice() || self.nice == now.nice)
    }
}

/// The threads that devices of this process have to do with, so that no two of them take each other's settings for the thread's own.
pub type Claims = Arc<Mutex<HashSet<i32>>>;

/// Why a thread could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// There is none.
    #[error("process {process} has no thread {tid}: {source}")]
    Missing {
        /// The process.
        process: i32,
        /// The thread.
        tid: i32,
        /// What the system says.
        source: io::Error,
    },
    /// Another device has it.
    #[error("thread {0} belongs to another device of this bus, or to another virtual CPU")]
    Taken(i32),
}

/// A thread, from when it was found until it is let go, which puts its class back.
pub struct Thread {
    tid: i32,
    /// A file of procfs that was opened for this very thread: reading it fails once the thread has ended, also if its id has a new bearer.
    alive: File,
    /// Likewise: its processor time. Kernels without CONFIG_SCHED_INFO have none.
    time: Option<File>,
    changed: Option<Changed>,
    claims: Claims,
}

/// What it was before this device, and what the device made of it.
struct Changed {
    own: Attributes,
    /// Its nice value, also if it has no effect in its own class.
    own_nice: i32,
    by_us: Attributes,
    setting: Setting,
}

impl Thread {
    /// Takes thread `tid` of `process`, which must be of that process now.
    pub fn take(process: i32, tid: i32, claims: &Claims) -> Result<Thread, TakeError> {
        let open = |name| File::open(format!("/proc/{process}/task/{tid}/{name}"));
        let alive = open("comm").map_err(|source| TakeError::Missing { process, tid, source })?;
        let time = open("schedstat").ok();
        if !lock(claims).insert(tid) {
            return Err(TakeError::Taken(tid));
        }
        Ok(Thread { tid, alive, time, changed: None, claims: claims.clone() })
    }

    /// Takes thread `tid`, of whatever process it is.
    pub fn take_any(tid: i32, claims: &Claims) -> Result<Thread, TakeError> {
        let process = std::fs::read_to_string(format!("/proc/{tid}/status"))
            .ok()
            .and_then(|status| status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok()));
        Thread::take(process.unwrap_or(tid), tid, claims)
    }

    /// Its id.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// What this device has made of it.
    pub fn setting(&self) -> Option<Setting> {
        self.changed.as_ref().map(|changed| changed.setting)
    }

    /// An error if it has ended.
    pub fn check(&self) -> Result<(), Errno> {
        match self.alive.read_at(&mut [0], 0) {
            Ok(1..) => Ok(()),
            Ok(0) => Err(Errno::SRCH),
            Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::SRCH)),
        }
    }

    /// The processor time that it has used; zero where the kernel does not tell.
    pub fn time(&self) -> Duration {
        let mut text = [0; 64];
        let length = self.time.as_ref().and_then(|file| file.read_at(&mut text, 0).ok()).unwrap_or(0);
        // Nanoseconds on a processor, nanoseconds waiting for one, time slices.
        let first = std::str::from_utf8(&text[..length]).ok().and_then(|text| text.split(' ').next());
        Duration::from_nanos(first.and_then(|number| number.parse().ok()).unwrap_or(0))
    }

    /// Its nice value without this device.
    pub fn own_nice(&self) -> Result<i32, Errno> {
        match &self.changed {
            Some(changed) => Ok(changed.own_nice),
            None => self.look().map(|(_, nice)| nice),
        }
    }

    /// What it is now, and its nice value.
    fn look(&self) -> Result<(Attributes, i32), Errno> {
        let (attributes, nice) = (get(self.tid)?, getpriority_process(Pid::from_raw(self.tid))?);
        // After it, so that what was read is this thread's.
        self.check()?;
        Ok((attributes, nice))
    }

    /// Makes it `setting`. Returns whether that took a system call.
    pub fn apply(&mut self, setting: Setting) -> Result<bool, Errno> {
        let (own, own_nice) = match &self.changed {
            Some(changed) if changed.setting == setting => return Ok(false),
            Some(changed) => (changed.own, changed.own_nice),
            None => self.look()?,
        };
        let by_us = own.with(setting);
        // The id could only get a new bearer in the moment between the two, and only once all others have been given out.
        self.check()?;
        set(self.tid, by_us)?;
        self.changed = Some(Changed { own, own_nice, by_us, setting });
        Ok(true)
    }

    /// Puts back what it was, unless somebody else has made it something else meanwhile. Returns whether that took a system call.
    pub fn restore(&mut self) -> Result<bool, Errno> {
        let Some(Changed { own, own_nice, by_us, .. }) = self.changed.take() else { return Ok(false) };
        match self.look() {
            Ok((now, _)) if by_us.is_still(now) => {}
            Ok(_) | Err(Errno::SRCH) => return Ok(false),
            Err(error) => return Err(error),
        }
        match set(self.tid, own) {
            // Only who has CAP_SYS_NICE may take that flag back.
            Err(Errno::PERM) => set(self.tid, Attributes { flags: own.flags | RESET_ON_FORK, ..own })?,
            result => result?,
        }
        if !own.has_nice() {
            setpriority_process(Pid::from_raw(self.tid), own_nice)?;
        }
        Ok(true)
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if let Err(error) = self.restore() {
            tracing::error!(thread = self.tid, %error, "cannot put a thread's scheduling class back");
        }
        lock(&self.claims).remove(&self.tid);
    }
}

/// Whether this process may set the class of any thread to any (CAP_SYS_NICE).
pub fn is_privileged() -> bool {
    const SYS_NICE: u32 = 23;
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    effective.is_some_and(|effective| effective & 1 << SYS_NICE != 0)
}
