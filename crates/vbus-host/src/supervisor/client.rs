// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus's side: starts the supervisor, and asks it.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::Value;
use vbus_core::lock;
use vbus_net::HandedOver;
use vbus_sched::interview::Language;
use vbus_sched::{Held, Limits, Setting, TakeError, time_in};

use super::permits::Permits;
use super::verb::{self, Answer, Configuration, Threads, Verb};
use crate::access::Access;

/// How long the bus waits for the supervisor to end.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The time between two looks whether it has ended.
const PAUSE: Duration = Duration::from_millis(1);

/// The supervisor of this bus. Dropping it ends the supervisor, and waits for its end.
pub struct Supervisor {
    /// The sockets of the quick verbs and of the others. On each, one request is under way at a
    /// time.
    quick: Mutex<Link>,
    slow: Mutex<Link>,
    /// The same two sockets, for [`stop`](Self::stop), which waits for no request.
    ends: [OwnedFd; 2],
    child: Mutex<Child>,
    /// Readable when it has ended.
    process: OwnedFd,
    /// When the bus began to end.
    ending: OnceLock<Instant>,
    threads: Threads,
    /// What a former bus has handed over for its devices' back ends.
    handed_over: Mutex<HashMap<String, HandedOver>>,
}

/// A socket to the supervisor.
enum Link {
    Open(OwnedFd),
    /// A request had no answer. A later answer would be taken for that of another request.
    Broken,
}

impl Supervisor {
    /// Starts the supervisor: this program once more, with the arguments `args`. The supervisor
    /// keeps `lock` open until it has ended.
    ///
    /// # Errors
    /// The process cannot be started, or does not answer.
    pub fn start(
        args: &[OsString],
        permits: &Permits,
        lock: BorrowedFd<'_>,
    ) -> io::Result<Arc<Supervisor>> {
        let kind = SocketType::SEQPACKET;
        let pair = || socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
        let ((slow, theirs), (quick, theirs_quick)) = (pair()?, pair()?);
        // This program itself, even if its file has been replaced.
        let child = Command::new("/proc/self/exe")
            .arg0("vbus")
            .args(args)
            // What the manager told the bus is not for the supervisor.
            .env_remove("NOTIFY_SOCKET")
            .env_remove("LISTEN_FDS")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()?;
        // The sandbox of the bus has no such call.
        let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        verb::send_long(&slow, permits, &[lock, theirs_quick.as_fd()])?;
        drop(theirs_quick);
        let ends = [quick.try_clone()?, slow.try_clone()?];
        let (quick, slow) = (Mutex::new(Link::Open(quick)), Mutex::new(Link::Open(slow)));
        let unknown = Threads { is_privileged: false, tells_time: false };
        let child = Mutex::new(child);
        let handed_over = Mutex::default();
        let threads = unknown;
        let ending = OnceLock::new();
        let mut supervisor =
            Supervisor { quick, slow, ends, child, process, ending, threads, handed_over };
        supervisor.threads = serde_json::from_value(supervisor.ask(&Verb::Threads)?.0)?;
        Ok(Arc::new(supervisor))
    }

    /// Asks for something. Returns the answer and its descriptors.
    fn ask(&self, verb: &Verb) -> io::Result<(Value, Vec<OwnedFd>)> {
        let mut link = lock(if verb.is_quick() { &self.quick } else { &self.slow });
        let socket = match &*link {
            Link::Open(socket) => socket,
            Link::Broken => {
                return Err(io::Error::other(
                    "the supervisor of the bus did not answer an earlier request; start the bus \
                     anew",
                ));
            }
        };
        let answer = match verb::send(socket, verb, &[]) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => None,
            Err(error) => return Err(error),
            Ok(()) => match verb::receive(socket) {
                Ok(answer) => answer,
                Err(error) => {
                    // An answer that was not understood has been taken from the socket.
                    if error.raw_os_error().is_some() {
                        *link = Link::Broken;
                    }
                    return Err(error);
                }
            },
        };
        match answer {
            Some((Answer::Ok(value), descriptors)) => Ok((value, descriptors)),
            Some((Answer::Errno(number), _)) => Err(io::Error::from_raw_os_error(number)),
            Some((Answer::Refused(text), _)) => Err(io::Error::other(text)),
            None => Err(io::Error::new(
                io::ErrorKind::BrokenPipe,
                "the supervisor of the bus has ended; start the bus anew",
            )),
        }
    }

    /// Asks for something whose answer has one descriptor.
    fn descriptor(&self, verb: &Verb) -> io::Result<OwnedFd> {
        let descriptor = self.ask(verb)?.1.pop();
        descriptor.ok_or_else(|| io::Error::other("the supervisor sent no descriptor"))
    }

    /// Makes a non-blocking socket that listens at `path`, for the clients that `access` allows.
    /// `backlog` clients can wait. Replaces a socket there that has no listener.
    ///
    /// # Errors
    /// Somebody listens there, something else than a socket is there, the path is not allowed, or
    /// the system refuses.
    pub fn listen(
        self: &Arc<Self>,
        path: &Path,
        backlog: i32,
        access: &Access,
    ) -> io::Result<(OwnedFd, SocketFile)> {
        let verb = Verb::Listen { path: text(path)?, backlog, access: access.clone() };
        let listener = self.descriptor(&verb)?;
        Ok((listener, SocketFile { path: path.to_owned(), supervisor: self.clone() }))
    }
}

impl Supervisor {
    /// Says that another bus takes over, or that it has not: while it does, the sockets stay if
    /// this process ends.
    ///
    /// # Errors
    /// The supervisor has ended.
    pub fn set_leaving(&self, leaving: bool) -> io::Result<()> {
        self.ask(&Verb::Leave { leaving }).map(drop)
    }

    /// Its process: a descriptor that is readable when the process has ended.
    ///
    /// # Errors
    /// This process has as many descriptors as it may have.
    pub fn process(&self) -> io::Result<OwnedFd> {
        self.process.try_clone()
    }

    /// Takes charge of the socket file at `path`, which a former bus has left.
    ///
    /// # Errors
    /// There is none, or the path is not allowed.
    pub fn inherit(self: &Arc<Self>, path: &Path) -> io::Result<SocketFile> {
        self.ask(&Verb::Inherit { path: text(path)? })?;
        Ok(SocketFile { path: path.to_owned(), supervisor: self.clone() })
    }

    /// Keeps what a former bus has handed over for the back end of a device, until the device is
    /// made.
    pub fn keep(&self, device: &str, descriptors: Vec<(String, OwnedFd)>) {
        lock(&self.handed_over).insert(device.to_owned(), HandedOver::new(descriptors));
    }

    /// Reads the configuration file again. Returns its text and what the bus cannot find out
    /// itself. Nothing changes until [`adopt`](Self::adopt).
    ///
    /// # Errors
    /// The bus has no such file, it cannot be read, or it is wrong. The text says where.
    pub fn configuration(&self) -> io::Result<(Configuration, String)> {
        let (answer, mut descriptors) = self.ask(&Verb::Configuration)?;
        let missing = || io::Error::other("the supervisor sent no file");
        let mut file = File::from(descriptors.pop().ok_or_else(missing)?);
        let mut text = String::new();
        file.seek(SeekFrom::Start(0))?;
        file.read_to_string(&mut text)?;
        Ok((serde_json::from_value(answer)?, text))
    }

    /// From now on the supervisor also allows what the configuration allows that it read last.
    ///
    /// # Errors
    /// The supervisor has ended.
    pub fn adopt(&self) -> io::Result<()> {
        self.ask(&Verb::Adopt).map(drop)
    }

    /// From now on the supervisor allows no more than the configuration that it adopted last.
    ///
    /// # Errors
    /// The supervisor has ended.
    pub fn settle(&self) -> io::Result<()> {
        self.ask(&Verb::Settle).map(drop)
    }
}

/// The file of a socket that the supervisor has made. Dropping this removes the file, unless
/// another one has taken its place.
pub struct SocketFile {
    path: PathBuf,
    supervisor: Arc<Supervisor>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        vbus_net::Opener::remove(&*self.supervisor, &self.path);
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Supervisor {
    /// The bus begins to end. It has requests until then: each device and socket goes with one. The
    /// supervisor may stand still, or wait for a disk, so after a while all requests fail, those
    /// that are under way too.
    pub fn end_soon(&self) {
        self.end_within(TIMEOUT);
    }

    fn end_within(&self, limit: Duration) {
        let _ = self.ending.set(Instant::now());
        let cut = || -> io::Result<()> {
            let process = self.process.try_clone()?;
            let ends = [self.ends[0].try_clone()?, self.ends[1].try_clone()?];
            std::thread::Builder::new().name("supervisor".into()).spawn(move || {
                let limit = Timespec::try_from(limit).ok();
                let mut ended = [PollFd::new(&process, PollFlags::IN)];
                let _ = retry_on_intr(|| poll(&mut ended, limit.as_ref()));
                for end in &ends {
                    let _ = shutdown(end, Shutdown::Both);
                }
            })?;
            Ok(())
        };
        if let Err(error) = cut() {
            tracing::warn!(%error, "the end of the bus may have to wait for its supervisor");
        }
    }

    /// Ends the supervisor, and waits for its end, but not for ever. Later requests fail, and so do
    /// those that are under way.
    pub fn stop(&self) {
        let passed = self.ending.get().map_or(Duration::ZERO, Instant::elapsed);
        self.stop_within(TIMEOUT.saturating_sub(passed));
    }

    fn stop_within(&self, limit: Duration) {
        let mut child = lock(&self.child);
        // It may have been stopped before.
        if matches!(child.try_wait(), Ok(Some(_))) {
            return;
        }
        // A request that is under way has the lock of its socket. It may wait for the supervisor,
        // which may wait for a disk.
        let [quick, slow] = &self.ends;
        let _ = (shutdown(quick, Shutdown::Both), shutdown(slow, Shutdown::Write));
        let begun = Instant::now();
        let ended = loop {
            match child.try_wait() {
                Ok(None) if begun.elapsed() < limit => std::thread::sleep(PAUSE),
                other => break other,
            }
        };
        // Whoever still waits for an answer, gets none.
        let _ = shutdown(slow, Shutdown::Both);
        match ended {
            Ok(Some(_)) => {}
            Ok(None) => tracing::warn!(process = child.id(), "the supervisor does not end"),
            Err(error) => {
                tracing::warn!(%error, process = child.id(), "cannot wait for the supervisor");
            }
        }
    }
}

/// The socket of a stream's peer. A worker reads from it, and must not close what the peer sends.
fn plain(socket: OwnedFd) -> OwnedFd {
    vbus_control::refuse_descriptors(&socket);
    socket
}

fn text(path: &Path) -> io::Result<String> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| io::Error::other("the path is not UTF-8"))
}

impl vbus_net::Opener for Supervisor {
    fn create(&self, path: &Path) -> io::Result<File> {
        self.descriptor(&Verb::Create { path: text(path)? }).map(File::from)
    }

    fn listen(&self, path: &Path) -> io::Result<OwnedFd> {
        let verb = Verb::Listen { path: text(path)?, backlog: 1, access: Access::default() };
        Ok(plain(self.descriptor(&verb)?))
    }

    fn handed_over(&self, device: &str) -> HandedOver {
        lock(&self.handed_over).remove(device).unwrap_or_default()
    }

    fn remove(&self, path: &Path) {
        let removed = text(path).and_then(|path| self.ask(&Verb::Remove { path }));
        if let Err(error) = removed {
            tracing::debug!(path = %path.display(), %error, "a socket was not removed");
        }
    }

    fn connect(&self, path: &Path) -> io::Result<OwnedFd> {
        Ok(plain(self.descriptor(&Verb::Connect { path: text(path)? })?))
    }

    fn tap(&self, name: &str, queues: u16, mtu: u16) -> io::Result<(String, Vec<vbus_tap::Queue>)> {
        let (value, descriptors) = self.ask(&Verb::Tap { name: name.into(), queues, mtu })?;
        let multi_queue = value["multi-queue"] == true;
        let name = value["name"].as_str().unwrap_or(name).to_owned();
        if descriptors.len() != usize::from(queues) {
            return Err(io::Error::other("the supervisor sent too few queues"));
        }
        let queue = |fd| vbus_tap::Queue::from_descriptor(fd, multi_queue);
        Ok((name, descriptors.into_iter().map(queue).collect()))
    }

    fn vhost(&self, pairs: u16) -> io::Result<Vec<vbus_tap::Vhost>> {
        let (_, descriptors) = self.ask(&Verb::Vhost { pairs })?;
        if descriptors.len() != usize::from(pairs) {
            return Err(io::Error::other("the supervisor sent too few descriptors"));
        }
        Ok(descriptors.into_iter().map(vbus_tap::Vhost::from_descriptor).collect())
    }
}

/// The threads of VMMs, through the supervisor.
pub struct RemoteThreads(pub Arc<Supervisor>);

impl vbus_sched::Threads for RemoteThreads {
    fn check(&self, limits: &Limits) -> Result<(), String> {
        let checked = self.0.ask(&Verb::Limits { limits: *limits });
        checked.map(drop).map_err(|error| error.to_string())
    }

    fn ask_vmm(&self, path: &Path, language: Language) -> io::Result<(OwnedFd, i32)> {
        let (process, mut descriptors) = self.0.ask(&Verb::Vmm { path: text(path)?, language })?;
        let process = process.as_i64().and_then(|process| i32::try_from(process).ok());
        let nothing = || io::Error::other("the supervisor sent no socket");
        Ok((descriptors.pop().ok_or_else(nothing)?, process.ok_or_else(nothing)?))
    }

    fn take(&self, process: Option<i32>, tid: i32) -> Result<Box<dyn Held>, TakeError> {
        let missing = |source| TakeError::Missing { process: process.unwrap_or(tid), tid, source };
        let taken = self.0.ask(&Verb::Take { process, tid });
        let (number, mut descriptors) = taken.map_err(|error| match error.raw_os_error() {
            Some(_) => missing(error),
            None => TakeError::Refused(error.to_string()),
        })?;
        Ok(Box::new(RemoteThread {
            supervisor: self.0.clone(),
            number: number.as_u64().unwrap_or(0),
            time: descriptors.pop().map(File::from),
        }))
    }

    fn is_privileged(&self) -> bool {
        self.0.threads.is_privileged
    }

    fn tells_time(&self) -> bool {
        self.0.threads.tells_time
    }
}

/// A thread that the supervisor holds.
struct RemoteThread {
    supervisor: Arc<Supervisor>,
    number: u64,
    /// The file with its processor time.
    time: Option<File>,
}

impl RemoteThread {
    fn ask(&self, verb: &Verb) -> Result<Value, Errno> {
        let answer = self.supervisor.ask(verb);
        answer.map(|(value, _)| value).map_err(|error| {
            // Only a supervisor that has ended answers without an error number.
            Errno::from_io_error(&error).unwrap_or(Errno::PIPE)
        })
    }
}

impl Held for RemoteThread {
    fn time(&self) -> Duration {
        self.time.as_ref().map(time_in).unwrap_or_default()
    }

    fn own_nice(&mut self) -> Result<i32, Errno> {
        let value = self.ask(&Verb::Nice { thread: self.number })?;
        value.as_i64().and_then(|nice| i32::try_from(nice).ok()).ok_or(Errno::PROTO)
    }

    fn apply(&mut self, setting: Setting) -> Result<(), Errno> {
        self.ask(&Verb::Set { thread: self.number, setting }).map(drop)
    }

    fn restore(&mut self) -> Result<bool, Errno> {
        Ok(self.ask(&Verb::Restore { thread: self.number })? == true)
    }
}

impl Drop for RemoteThread {
    fn drop(&mut self) {
        // A supervisor that has ended has restored its threads.
        let _ = self.ask(&Verb::Release { thread: self.number });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    const BOUND: Duration = Duration::from_secs(60);

    /// A supervisor that takes no verb, and ends when it is killed. Returns its ends of the sockets
    /// of the quick verbs and of the others, too.
    fn deaf() -> (Arc<Supervisor>, [OwnedFd; 2]) {
        let kind = SocketType::SEQPACKET;
        let pair = || socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        let ((quick, theirs_quick), (slow, theirs)) = (pair(), pair());
        let child = Command::new("sleep").arg("3600").spawn().unwrap();
        let ends = [quick.try_clone().unwrap(), slow.try_clone().unwrap()];
        let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let supervisor = Supervisor {
            quick: Mutex::new(Link::Open(quick)),
            slow: Mutex::new(Link::Open(slow)),
            ends,
            child: Mutex::new(child),
            process,
            ending: OnceLock::new(),
            threads: Threads { is_privileged: false, tells_time: false },
            handed_over: Mutex::default(),
        };
        (Arc::new(supervisor), [theirs_quick, theirs])
    }

    #[test]
    fn a_supervisor_that_does_not_answer_is_not_waited_for_without_end() {
        let (supervisor, theirs) = deaf();
        let (told, hears) = channel();
        for verb in [Verb::Threads, Verb::Settle] {
            let (supervisor, told) = (supervisor.clone(), told.clone());
            std::thread::spawn(move || told.send(supervisor.ask(&verb)).unwrap());
        }
        // Both requests are under way now. Each holds the lock of its socket.
        for end in &theirs {
            assert!(verb::receive_plain::<Verb>(end).unwrap().is_some());
        }
        let (stopped, ends) = channel();
        let stopping = supervisor.clone();
        std::thread::spawn(move || {
            stopping.stop_within(Duration::from_millis(20));
            stopped.send(()).unwrap();
        });
        ends.recv_timeout(BOUND).expect("the end waits for the supervisor");
        for _ in 0..2 {
            let answer = hears.recv_timeout(BOUND).expect("a request waits for the supervisor");
            assert_eq!(answer.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        }
        // There is no other request, and a supervisor that ends at last is the end of it.
        let after = supervisor.ask(&Verb::Settle).unwrap_err();
        assert_eq!(after.kind(), io::ErrorKind::BrokenPipe);
        lock(&supervisor.child).kill().unwrap();
        supervisor.stop_within(BOUND * 60);
        assert!(lock(&supervisor.child).try_wait().unwrap().is_some());
    }

    #[test]
    fn requests_at_the_end_of_the_bus_do_not_wait_without_end() {
        let (supervisor, theirs) = deaf();
        let (told, hears) = channel();
        let ask = |verb: Verb| {
            let (supervisor, told) = (supervisor.clone(), told.clone());
            std::thread::spawn(move || told.send(supervisor.ask(&verb)).unwrap());
        };
        ask(Verb::Settle);
        assert!(verb::receive_plain::<Verb>(&theirs[1]).unwrap().is_some());
        // One that waits for the first, one on the other socket.
        ask(Verb::Remove { path: "/socket".into() });
        ask(Verb::Threads);
        supervisor.end_within(Duration::from_millis(20));
        for _ in 0..3 {
            let answer = hears.recv_timeout(BOUND).expect("a request waits for the supervisor");
            assert_eq!(answer.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        }
        lock(&supervisor.child).kill().unwrap();
    }

    #[test]
    fn a_class_change_does_not_wait_for_what_takes_long() {
        let (supervisor, [quick, slow]) = deaf();
        let asking = supervisor.clone();
        let long = std::thread::spawn(move || asking.ask(&Verb::Settle));
        assert_eq!(verb::receive_plain::<Verb>(&slow).unwrap(), Some(Verb::Settle));
        // It has no answer. A thread changes its class meanwhile.
        let answering = std::thread::spawn(move || {
            let asked = verb::receive_plain::<Verb>(&quick).unwrap();
            verb::send(&quick, &Answer::Ok(Value::Null), &[]).unwrap();
            asked
        });
        let (told, hears) = channel();
        let asking = supervisor.clone();
        std::thread::spawn(move || told.send(asking.ask(&Verb::Nice { thread: 7 })).unwrap());
        hears.recv_timeout(BOUND).expect("it waits for the long request").unwrap();
        assert_eq!(answering.join().unwrap(), Some(Verb::Nice { thread: 7 }));
        verb::send(&slow, &Answer::Ok(Value::Null), &[]).unwrap();
        long.join().unwrap().unwrap();
        lock(&supervisor.child).kill().unwrap();
    }
}
