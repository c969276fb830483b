// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A thread of another process. The device changes its scheduling class for a while, and then
//! restores it.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Pid, getpriority_process};
use vbus_core::lock;

use crate::attributes::{self, Attributes};
use crate::interview::{self, Language};
use crate::limits::Limits;
use crate::policy::Setting;

/// Finds threads and changes their scheduling class. A process that may not do that itself passes
/// an implementation that asks another process.
///
/// The calls run on threads that serve devices, so they must not wait for a VMM.
pub trait Threads: Send + Sync {
    /// Checks that the devices may change threads within these limits.
    ///
    /// # Errors
    /// They may not. The text says which limit is too wide, and what to do.
    fn check(&self, limits: &Limits) -> Result<(), String>;

    /// Begins to ask the VMM that listens at `path` for the threads of its virtual CPUs
    /// ([`interview`](crate::interview)). Returns the end on which to ask, and the VMM's process.
    ///
    /// # Errors
    /// The system refuses, or the path is not allowed.
    fn ask_vmm(&self, path: &Path, language: Language) -> io::Result<(OwnedFd, i32)>;

    /// Takes thread `tid` of `process`, which [`ask_vmm`](Self::ask_vmm) has returned; or, without
    /// a process, thread `tid` of any process.
    ///
    /// # Errors
    /// There is no such thread, another device has it, or it is not allowed.
    fn take(&self, process: Option<i32>, tid: i32) -> Result<Box<dyn Held>, TakeError>;

    /// Whether any thread can get any class (CAP_SYS_NICE).
    fn is_privileged(&self) -> bool;

    /// Whether the kernel reports how much processor time a thread has used.
    fn tells_time(&self) -> bool;
}

/// A thread that has been taken. Dropping it restores the thread's own class, and lets another
/// device take it.
pub trait Held: Send {
    /// The processor time that the thread has used; zero if the kernel does not report it.
    fn time(&self) -> Duration;

    /// The thread's own nice value, without this device.
    ///
    /// # Errors
    /// SRCH: the thread has ended.
    fn own_nice(&mut self) -> Result<i32, Errno>;

    /// Gives the thread `setting`.
    ///
    /// # Errors
    /// SRCH: the thread has ended. PERM: the kernel or the limits do not allow it.
    fn apply(&mut self, setting: Setting) -> Result<(), Errno>;

    /// Restores the thread's own class, unless another program has changed it meanwhile. Returns
    /// whether that needed a change.
    ///
    /// # Errors
    /// The kernel refuses.
    fn restore(&mut self) -> Result<bool, Errno>;
}

/// The threads as this process sees and changes them. A thread can belong to only one device of the
/// process: two devices would mistake each other's settings for the thread's own.
#[derive(Clone, Debug, Default)]
pub struct Direct {
    taken: Arc<Mutex<HashSet<i32>>>,
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
    /// The process that changes threads does not allow it. The text says why.
    #[error("{0}")]
    Refused(String),
}

impl Threads for Direct {
    fn check(&self, _limits: &Limits) -> Result<(), String> {
        Ok(())
    }

    fn ask_vmm(&self, path: &Path, language: Language) -> io::Result<(OwnedFd, i32)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        let process = vbus_control::Peer::of(&socket)?.pid;
        if process <= 0 {
            return Err(io::Error::other("the VMM is in another pid namespace"));
        }
        Ok((interview::begin(socket, language, || ())?, process))
    }

    fn take(&self, process: Option<i32>, tid: i32) -> Result<Box<dyn Held>, TakeError> {
        Ok(Box::new(self.take_own(process.unwrap_or_else(|| process_of(tid)), tid)?))
    }

    fn is_privileged(&self) -> bool {
        is_privileged()
    }

    fn tells_time(&self) -> bool {
        tells_time()
    }
}

impl Direct {
    /// Takes thread `tid`, which must belong to `process` now.
    ///
    /// # Errors
    /// There is no such thread, or it is taken.
    pub fn take_own(&self, process: i32, tid: i32) -> Result<OwnThread, TakeError> {
        let open = |name| File::open(format!("/proc/{process}/task/{tid}/{name}"));
        let alive = open("comm").map_err(|source| TakeError::Missing { process, tid, source })?;
        let alive = ThreadPin(alive);
        let time = open("schedstat").ok();
        if !lock(&self.taken).insert(tid) {
            return Err(TakeError::Taken(tid));
        }
        Ok(OwnThread { tid, alive, time, changed: None, direct: self.clone() })
    }
}

/// The process of thread `tid`; `tid` itself if there is no such thread.
pub fn process_of(tid: i32) -> i32 {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
    process.unwrap_or(tid)
}

/// Tells whether a thread is still there. The id of a thread that has ended can pass to another
/// one; a procfs file stays that of its own thread, and cannot be read once that has ended.
#[derive(Debug)]
pub struct ThreadPin(File);

impl ThreadPin {
    /// Pins the thread that has the id `tid` now.
    ///
    /// # Errors
    /// There is no such thread.
    pub fn of(tid: i32) -> io::Result<ThreadPin> {
        File::open(format!("/proc/{}/task/{tid}/comm", process_of(tid))).map(ThreadPin)
    }

    /// Whether that thread has not ended.
    pub fn lives(&self) -> bool {
        matches!(self.0.read_at(&mut [0], 0), Ok(1..))
    }
}

/// A thread that this process has taken and changes itself.
pub struct OwnThread {
    tid: i32,
    alive: ThreadPin,
    /// The procfs file with its processor time. Kernels without CONFIG_SCHED_INFO have none.
    time: Option<File>,
    changed: Option<Changed>,
    direct: Direct,
}

/// The thread's own attributes, and those that the device has set.
struct Changed {
    own: Attributes,
    /// Its own nice value, even if that has no effect in its own class.
    own_nice: i32,
    by_us: Attributes,
}

impl OwnThread {
    /// The procfs file with its processor time, if there is one ([`time_in`] reads it).
    pub fn time_file(&self) -> Option<&File> {
        self.time.as_ref()
    }

    /// Fails if the thread has ended.
    fn check(&self) -> Result<(), Errno> {
        if self.alive.lives() { Ok(()) } else { Err(Errno::SRCH) }
    }

    /// Reads its present class, priority and nice value.
    fn look(&self) -> Result<(Attributes, i32), Errno> {
        let (attributes, nice) =
            (attributes::get(self.tid)?, getpriority_process(Pid::from_raw(self.tid))?);
        // Check after the reads: the values are then certainly this thread's.
        self.check()?;
        Ok((attributes, nice))
    }
}

/// The processor time in `file`, a thread's schedstat.
pub fn time_in(file: &File) -> Duration {
    let mut text = [0; 64];
    let length = file.read_at(&mut text, 0).unwrap_or(0);
    // The fields: nanoseconds on a processor, nanoseconds of waiting for one, time slices.
    let first = std::str::from_utf8(&text[..length]).ok().and_then(|text| text.split(' ').next());
    Duration::from_nanos(first.and_then(|number| number.parse().ok()).unwrap_or(0))
}

impl Held for OwnThread {
    fn time(&self) -> Duration {
        self.time.as_ref().map(time_in).unwrap_or_default()
    }

    fn own_nice(&mut self) -> Result<i32, Errno> {
        match &self.changed {
            Some(changed) => Ok(changed.own_nice),
            None => self.look().map(|(_, nice)| nice),
        }
    }

    fn apply(&mut self, setting: Setting) -> Result<(), Errno> {
        let (own, own_nice) = match &self.changed {
            Some(changed) => (changed.own, changed.own_nice),
            None => self.look()?,
        };
        let by_us = own.with(setting);
        // Another thread can get the id only between these two calls, and only after the kernel has
        // used all other ids.
        self.check().and_then(|()| attributes::set(self.tid, by_us))?;
        self.changed = Some(Changed { own, own_nice, by_us });
        Ok(())
    }

    fn restore(&mut self) -> Result<bool, Errno> {
        let Some(Changed { own, own_nice, by_us }) = self.changed.take() else {
            return Ok(false);
        };
        match self.look() {
            Ok((now, _)) if by_us.is_still(now) => {}
            Ok(_) | Err(Errno::SRCH) => return Ok(false),
            Err(error) => return Err(error),
        }
        attributes::restore(self.tid, own, own_nice)?;
        Ok(true)
    }
}

impl Drop for OwnThread {
    fn drop(&mut self) {
        if let Err(error) = self.restore() {
            let thread = self.tid;
            tracing::error!(thread, %error, "cannot restore a thread's scheduling class");
        }
        lock(&self.direct.taken).remove(&self.tid);
    }
}

/// The thread of a virtual CPU, with the setting that the device has given it.
pub struct Thread {
    tid: i32,
    setting: Option<Setting>,
    held: Box<dyn Held>,
}

impl Thread {
    /// Takes thread `tid`; see [`Threads::take`].
    pub fn take(
        threads: &dyn Threads,
        process: Option<i32>,
        tid: i32,
    ) -> Result<Thread, TakeError> {
        Ok(Thread { tid, setting: None, held: threads.take(process, tid)? })
    }

    /// Its id.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// The setting that this device has given the thread, if any.
    pub fn setting(&self) -> Option<Setting> {
        self.setting
    }

    /// See [`Held::time`].
    pub fn time(&self) -> Duration {
        self.held.time()
    }

    /// See [`Held::own_nice`].
    pub fn own_nice(&mut self) -> Result<i32, Errno> {
        self.held.own_nice()
    }

    /// Gives the thread `setting`. Returns whether that needed a change.
    pub fn apply(&mut self, setting: Setting) -> Result<bool, Errno> {
        if self.setting == Some(setting) {
            return Ok(false);
        }
        self.held.apply(setting)?;
        self.setting = Some(setting);
        Ok(true)
    }

    /// Restores the thread's own class. Returns whether that needed a change.
    pub fn restore(&mut self) -> Result<bool, Errno> {
        // After a failure there is nothing to try again: the kernel would refuse again.
        if self.setting.take().is_none() { Ok(false) } else { self.held.restore() }
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
