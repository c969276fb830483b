// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A thread of another process. The device changes its scheduling class for a while, and then
//! restores it.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, getpriority_process};

use crate::attributes::{self, Attributes};
use crate::ledger::{Entry, Ledger, Note};
use crate::policy::Setting;
use vbus_core::lock;

/// The threads that devices of this process have taken. A thread can belong to only one device: two
/// devices would mistake each other's settings for the thread's own.
#[derive(Clone, Default)]
pub struct Claims {
    taken: Arc<Mutex<HashSet<i32>>>,
    /// The ledger in which the device records the threads' own attributes.
    ledger: Option<Arc<Ledger>>,
}

impl Claims {
    /// The device records each change in `ledger` before it makes the change.
    pub fn noted_in(ledger: Arc<Ledger>) -> Claims {
        Claims { ledger: Some(ledger), ..Claims::default() }
    }

    /// The ledger.
    pub fn ledger(&self) -> Option<&Arc<Ledger>> {
        self.ledger.as_ref()
    }
}

/// Why the device could not take a thread.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// There is no such thread.
    #[error("process {process} has no thread {tid}: {source}")]
    Missing {
        /// The process.
        process: i32,
        /// The thread.
        tid: i32,
        /// The error of the system.
        source: io::Error,
    },
    /// Another device has it.
    #[error("thread {0} belongs to another device of this bus, or to another virtual CPU")]
    Taken(i32),
}

/// A thread that a device has taken. Dropping it restores the thread's class.
pub struct Thread {
    tid: i32,
    /// A procfs file of exactly this thread. A read fails once the thread has ended, even if
    /// another thread has the same id by then.
    alive: File,
    /// The procfs file with its processor time. Kernels without CONFIG_SCHED_INFO have none.
    time: Option<File>,
    changed: Option<Changed>,
    claims: Claims,
}

/// The thread's own attributes, and those that the device has set.
struct Changed {
    own: Attributes,
    /// Its own nice value, even if that has no effect in its own class.
    own_nice: i32,
    by_us: Attributes,
    setting: Setting,
    note: Option<Note>,
}

impl Thread {
    /// Takes thread `tid`, which must belong to `process` now.
    pub fn take(process: i32, tid: i32, claims: &Claims) -> Result<Thread, TakeError> {
        let open = |name| File::open(format!("/proc/{process}/task/{tid}/{name}"));
        let alive = open("comm").map_err(|source| TakeError::Missing { process, tid, source })?;
        let time = open("schedstat").ok();
        if !lock(&claims.taken).insert(tid) {
            return Err(TakeError::Taken(tid));
        }
        Ok(Thread { tid, alive, time, changed: None, claims: claims.clone() })
    }

    /// Takes thread `tid` of any process.
    pub fn take_any(tid: i32, claims: &Claims) -> Result<Thread, TakeError> {
        let process =
            std::fs::read_to_string(format!("/proc/{tid}/status")).ok().and_then(|status| {
                status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok())
            });
        Thread::take(process.unwrap_or(tid), tid, claims)
    }

    /// Its id.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// The setting that this device has given the thread, if any.
    pub fn setting(&self) -> Option<Setting> {
        self.changed.as_ref().map(|changed| changed.setting)
    }

    /// Fails if the thread has ended.
    pub fn check(&self) -> Result<(), Errno> {
        match self.alive.read_at(&mut [0], 0) {
            Ok(1..) => Ok(()),
            Ok(0) => Err(Errno::SRCH),
            Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::SRCH)),
        }
    }

    /// The processor time that the thread has used; zero if the kernel does not report it.
    pub fn time(&self) -> Duration {
        let mut text = [0; 64];
        let length =
            self.time.as_ref().and_then(|file| file.read_at(&mut text, 0).ok()).unwrap_or(0);
        // The fields: nanoseconds on a processor, nanoseconds of waiting for one, time slices.
        let first =
            std::str::from_utf8(&text[..length]).ok().and_then(|text| text.split(' ').next());
        Duration::from_nanos(first.and_then(|number| number.parse().ok()).unwrap_or(0))
    }

    /// The thread's own nice value, without this device.
    pub fn own_nice(&self) -> Result<i32, Errno> {
        match &self.changed {
            Some(changed) => Ok(changed.own_nice),
            None => self.look().map(|(_, nice)| nice),
        }
    }

    /// Reads its present class, priority and nice value.
    fn look(&self) -> Result<(Attributes, i32), Errno> {
        let (attributes, nice) =
            (attributes::get(self.tid)?, getpriority_process(Pid::from_raw(self.tid))?);
        // Check after the reads: the values are then certainly this thread's.
        self.check()?;
        Ok((attributes, nice))
    }

    /// Gives the thread `setting`. Returns whether that needed a system call.
    pub fn apply(&mut self, setting: Setting) -> Result<bool, Errno> {
        let (own, own_nice, from) = match &self.changed {
            Some(changed) if changed.setting == setting => return Ok(false),
            Some(changed) => (changed.own, changed.own_nice, changed.by_us),
            None => self.look().map(|(own, own_nice)| (own, own_nice, own))?,
        };
        let by_us = own.with(setting);
        let note = match &mut self.changed {
            Some(changed) => changed.note.take(),
            None => self.claims.ledger.as_ref().and_then(|ledger| ledger.begin(self.tid)),
        };
        // If the change fails, the entry is still correct, because it names the present setting
        // too.
        let note = note.filter(|note| note.write(&Entry { own, own_nice, from, to: by_us }));
        // Another thread can get the id only between these two calls, and only after the kernel has
        // used all other ids.
        let done = self.check().and_then(|()| attributes::set(self.tid, by_us));
        match (&mut self.changed, done) {
            (_, Ok(())) => self.changed = Some(Changed { own, own_nice, by_us, setting, note }),
            (Some(changed), Err(_)) => changed.note = note,
            (None, Err(_)) => {}
        }
        done.map(|()| true)
    }

    /// Restores the thread's own class, unless another program has changed it meanwhile. Returns
    /// whether that needed a system call.
    pub fn restore(&mut self) -> Result<bool, Errno> {
        // The note ends with this call, even if the call fails: the guardian would fail too.
        let Some(Changed { own, own_nice, by_us, note, .. }) = self.changed.take() else {
            return Ok(false);
        };
        match self.look() {
            Ok((now, _)) if by_us.is_still(now) => {}
            Ok(_) | Err(Errno::SRCH) => return Ok(false),
            Err(error) => return Err(error),
        }
        if let Some(note) = &note {
            note.write(&Entry { own, own_nice, from: by_us, to: own });
        }
        attributes::restore(self.tid, own, own_nice)?;
        Ok(true)
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if let Err(error) = self.restore() {
            let thread = self.tid;
            tracing::error!(thread, %error, "cannot restore a thread's scheduling class");
        }
        lock(&self.claims.taken).remove(&self.tid);
    }
}

/// Whether the kernel reports how much processor time a thread has used. Without CONFIG_SCHED_INFO
/// the file does not exist. If the kernel has that option only for delay accounting, and this is
/// switched off, the file has zeros. The calling thread has had at least one time slice.
pub fn tells_time() -> bool {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split_ascii_whitespace().any(|number| number != "0")
}

/// Whether this process may give any thread any class (CAP_SYS_NICE).
pub fn is_privileged() -> bool {
    const SYS_NICE: u32 = 23;
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    effective.is_some_and(|effective| effective & 1 << SYS_NICE != 0)
}
