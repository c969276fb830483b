// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The supervisor process: reads verbs from its standard input, a socket, until the bus has ended.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, open};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use vbus_core::lock;
use vbus_net::Opener as _;
use vbus_sched::interview::{self, Language};
use vbus_sched::{Direct, Held, OwnThread, Setting, TakeError, ThreadPin, Threads as _};

use super::config_file;
use super::permits::{Permits, Purpose};
use super::place::{Allowed, Places};
use super::socket::{self, SocketFile};
use super::verb::{self, Answer, Configuration, Threads, Verb};
use crate::access::{Access, Accounts};
use crate::config;
use crate::sandbox::{drop_capabilities, supervisor_capabilities};

/// The name of the hidden command.
pub const COMMAND: &str = "supervisor";
/// The most VMMs whose processes the supervisor remembers.
const VMMS_MAX: usize = 256;
/// The most VMMs that are asked at a time. Each has a thread.
const INTERVIEWS_MAX: usize = 64;
/// The most threads that the bus can hold.
const THREADS_MAX: usize = 64 << 10;

/// The longest text of an error, in characters.
const TEXT_MAX: usize = 4096;

/// Runs the supervisor.
pub fn run() -> ExitCode {
    vbus_cli::log::prepare("info");
    // A terminal or a service manager may send these signals to all processes of the bus. The
    // supervisor ignores them, because it must outlive the bus.
    for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] {
        let _ = signal_hook::flag::register(signal, Arc::default());
    }
    // This fails if a person started the command by hand, which does no harm.
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(c"vbus-supervisor");
    // It needs no others, and starts no program that could get more.
    drop_capabilities(supervisor_capabilities());
    let _ = rustix::thread::set_no_new_privs(true);
    vbus_cli::log::write();
    let served = io::stdin().as_fd().try_clone_to_owned().and_then(serve);
    let code = match served {
        Ok(0) => ExitCode::SUCCESS,
        Ok(restored) => {
            tracing::warn!(
                "the bus was killed: {restored} threads got their scheduling class back"
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            tracing::error!(%error, "the supervisor ends");
            ExitCode::FAILURE
        }
    };
    vbus_cli::log::flush();
    code
}

/// A supervisor that is a thread of this process; see [`crate::fuzzing::supervisor`].
#[cfg(feature = "fuzzing")]
pub fn in_this_process(
    permits: &Permits,
) -> io::Result<(OwnedFd, OwnedFd, std::thread::JoinHandle<()>)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let kind = SocketType::SEQPACKET;
    let pair = || socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
    let ((slow, theirs), (quick, theirs_quick)) = (pair()?, pair()?);
    verb::send(&slow, permits, &[theirs_quick.as_fd()])?;
    let thread = std::thread::spawn(move || {
        serve(theirs).expect("nothing that the bus sends ends the supervisor");
    });
    Ok((quick, slow, thread))
}

/// Serves the bus at the other end of `socket` until it has ended. Returns how many threads the bus
/// left changed.
fn serve(socket: OwnedFd) -> io::Result<usize> {
    // The first message has the socket of the quick verbs, and the lock of the bus's directory. The
    // lock stays open until everything is cleaned up, so that the next bus does not meet what is
    // left of this one.
    let Some((permits, mut descriptors)) = verb::receive::<Permits>(&socket)? else {
        return Ok(0);
    };
    let quick = descriptors.pop().ok_or_else(|| io::Error::other("there is one socket only"))?;
    let _lock = descriptors;
    let former = permits.former.clone();
    let places = Arc::new(Places::new(permits));
    let pins = Pins::default();
    pins.follow(&places.permits());
    warn_of_config(&places);
    let mut files = Files {
        places: places.clone(),
        pins: pins.clone(),
        sockets: HashMap::new(),
        read: None,
        adopted: None,
        leaving: false,
        former,
    };
    let mut attended = Attended {
        named: pins,
        places,
        threads: Direct::default(),
        held: HashMap::new(),
        next: 0,
        vmms: HashMap::new(),
        interviews: Arc::default(),
    };
    // If one thread cannot go on, the bus must not wait for the other.
    let both = Arc::new([socket.try_clone()?, quick.try_clone()?]);
    let give_up = move |ended: io::Result<()>| {
        if ended.is_err() {
            for socket in &*both {
                let _ = shutdown(socket, Shutdown::Both);
            }
        }
        ended
    };
    let give_up_too = give_up.clone();
    let attending = std::thread::Builder::new().name("vbus-threads".into()).spawn(move || {
        let ended = give_up_too(answer_all(&quick, true, |verb| attended.answer(verb)));
        let left = attended.held.into_values().map(|mut thread| thread.restore());
        ended.map(|()| left.filter(|restored| *restored == Ok(true)).count())
    })?;
    let ended = give_up(answer_all(&socket, false, |verb| files.answer(verb)));
    drop(files);
    let restored = attending.join().map_err(|_| io::Error::other("a thread has panicked"))?;
    ended.and(restored)
}

/// Warns if the bus can write its configuration. Such a configuration is not read again.
fn warn_of_config(places: &Places) {
    let permits = places.permits();
    let Some(path) = permits.config.as_ref() else { return };
    let Ok(file) = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) else { return };
    if let Err(error) = places.check_config(file, None) {
        tracing::warn!("the configuration cannot be read again: {error}");
    }
}

/// Answers the verbs that come through `socket`, which has the quick ones or the others, until the
/// bus has ended.
fn answer_all(
    socket: &OwnedFd,
    quick: bool,
    mut answer: impl FnMut(Verb) -> Done,
) -> io::Result<()> {
    loop {
        let (answer, descriptors) = match verb::receive_plain::<Verb>(socket) {
            Ok(Some(verb)) if verb.is_quick() != quick => refused("it came to the wrong socket"),
            Ok(Some(verb)) => match answer(verb) {
                Ok((value, descriptors)) => (Answer::Ok(value), descriptors),
                Err(error) => failed(&error),
            },
            Ok(None) => return Ok(()),
            // The bus sends no such thing. Whoever did may go on, but gets nothing.
            Err(error) if error.raw_os_error().is_none() => refused(error),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error),
        };
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let sent = match verb::send_long(socket, &answer, &borrowed) {
            // It is too long, also for a file.
            Err(error) if error.raw_os_error().is_none() => {
                verb::send(socket, &refused(error).0, &[])
            }
            sent => sent,
        };
        match sent {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            other => other?,
        }
    }
}

/// An answer with its descriptors.
type Reply = (Answer, Vec<OwnedFd>);

fn refused(error: impl ToString) -> Reply {
    // An error of the configuration shows a line of it, which may be longer than a message.
    let text = error.to_string().chars().take(TEXT_MAX).collect();
    (Answer::Refused(text), Vec::new())
}

fn failed(error: &io::Error) -> Reply {
    match error.raw_os_error() {
        Some(number) => (Answer::Errno(number), Vec::new()),
        None => refused(error),
    }
}

/// What every verb does.
type Done = io::Result<(Value, Vec<OwnedFd>)>;

/// A verb that is finished, without descriptors.
fn done(value: impl Into<Value>) -> Done {
    Ok((value.into(), Vec::new()))
}

/// The threads that the configuration names, as they were when it was read.
#[derive(Clone, Default)]
struct Pins(Arc<Mutex<HashMap<i32, ThreadPin>>>);

impl Pins {
    /// Takes the threads that `permits` name. Those that are known already stay the same.
    fn follow(&self, permits: &Permits) {
        let mut pins = lock(&self.0);
        pins.retain(|tid, _| permits.threads.contains(tid));
        for &tid in &permits.threads {
            if let (false, Ok(pin)) = (pins.contains_key(&tid), ThreadPin::of(tid)) {
                pins.insert(tid, pin);
            }
        }
    }
}

/// Serves the verbs that may take long.
struct Files {
    places: Arc<Places>,
    pins: Pins,
    /// The sockets that listen, by path.
    sockets: HashMap<PathBuf, SocketFile>,
    /// What the configuration file allows that was read last, if the bus has not adopted it yet.
    read: Option<Allowed>,
    /// What the configuration allows that the bus has adopted, if more is still allowed.
    adopted: Option<Allowed>,
    /// Another bus takes over: the sockets stay.
    leaving: bool,
    /// The sockets of a former bus that this one may have charge of.
    former: BTreeSet<PathBuf>,
}

impl Drop for Files {
    fn drop(&mut self) {
        if self.leaving {
            self.sockets.drain().for_each(|(_, file)| file.leave());
        }
    }
}

/// Serves the quick verbs.
struct Attended {
    places: Arc<Places>,
    threads: Direct,
    held: HashMap<u64, OwnThread>,
    /// The threads that the configuration names, by id, as they were when it was read.
    named: Pins,
    next: u64,
    /// The processes of VMMs, by process id.
    vmms: HashMap<i32, OwnedFd>,
    /// Each interview that goes on has a clone.
    interviews: Arc<()>,
}

/// A verb that the other thread serves.
fn misplaced() -> Done {
    Err(io::Error::other("it came to the wrong socket"))
}

impl Files {
    fn answer(&mut self, verb: Verb) -> Done {
        match verb {
            Verb::Create { path } => Ok((Value::Null, vec![self.places.create(&path)?.into()])),
            Verb::Listen { path, backlog, access } => self.listen(&path, backlog, &access),
            Verb::Remove { path } => {
                self.sockets.remove(&PathBuf::from(path));
                done(Value::Null)
            }
            Verb::Leave { leaving } => {
                self.leaving = leaving;
                done(Value::Null)
            }
            Verb::Inherit { path } => {
                // It was known at the start, when the bus had met nobody yet.
                if !self.former.remove(Path::new(&path)) {
                    return Err(io::Error::other("it is no socket of a former bus"));
                }
                let place = self.places.find(&path, Purpose::Listen)?;
                self.sockets.insert(path.into(), socket::inherit(place)?);
                done(Value::Null)
            }
            Verb::Configuration => self.configuration(),
            Verb::Adopt => {
                if let Some(allowed) = self.read.take() {
                    self.places.widen(&allowed);
                    self.pins.follow(&self.places.permits());
                    self.adopted = Some(allowed);
                }
                done(Value::Null)
            }
            Verb::Settle => {
                if let Some(allowed) = self.adopted.take() {
                    self.pins.follow(allowed.permits());
                    self.places.replace(allowed);
                }
                done(Value::Null)
            }
            Verb::Tap { name, queues, mtu } => self.tap(&name, queues, mtu),
            Verb::Vhost { pairs } => self.vhost(pairs),
            _ => misplaced(),
        }
    }

    fn listen(&mut self, path: &str, backlog: i32, access: &Access) -> Done {
        let place = self.places.find(path, Purpose::Listen)?;
        let (listener, file) = socket::listen(place, backlog, access)?;
        self.sockets.insert(path.into(), file);
        Ok((Value::Null, vec![listener]))
    }

    /// Reads the configuration file. The bus gets its text; what it allows is decided here.
    fn configuration(&mut self) -> Done {
        let permits = self.places.permits();
        let Some(path) = permits.config.clone().map(PathBuf::from) else {
            return Err(io::Error::other("this bus was started without a configuration file"));
        };
        self.read = None;
        let opened = config_file::open_again(&path)?;
        let text = config_file::read(&path, &opened)?;
        let (config, _) =
            config::parse(&path, text.clone(), Accounts::Check).map_err(io::Error::other)?;
        let rights = config.control.rights().map_err(io::Error::other)?;
        let allowed = Allowed::new(permits.with(&config));
        // The bus may have written the file otherwise.
        self.places.check_config(&opened, Some(&allowed))?;
        let file = memfd_create(c"vbus-config", MemfdFlags::CLOEXEC)?;
        let mut file = File::from(file);
        file.write_all(text.as_bytes())?;
        self.read = Some(allowed);
        let path = path.into_os_string();
        let answer = serde_json::to_value(Configuration { path, rights })?;
        Ok((answer, vec![file.into()]))
    }

    fn tap(&self, name: &str, queues: u16, mtu: u16) -> Done {
        self.places.permits().tap(name).map_err(io::Error::other)?;
        if !(1..=verb::DESCRIPTORS_MAX).contains(&usize::from(queues)) {
            return Err(io::Error::other("an interface has 1 to 16 queues"));
        }
        let (name, queues) = vbus_net::Direct.tap(name, queues, mtu)?;
        let multi_queue = queues.iter().any(vbus_tap::Queue::is_multi_queue);
        let value = json!({ "name": name, "multi-queue": multi_queue });
        Ok((value, queues.into_iter().map(OwnedFd::from).collect()))
    }

    fn vhost(&self, pairs: u16) -> Done {
        self.places.permits().vhost().map_err(io::Error::other)?;
        if !(1..=verb::DESCRIPTORS_MAX).contains(&usize::from(pairs)) {
            return Err(io::Error::other("a device has 1 to 16 queue pairs"));
        }
        let ends = vbus_net::Direct.vhost(pairs)?;
        Ok((Value::Null, ends.into_iter().map(OwnedFd::from).collect()))
    }
}

impl Attended {
    fn answer(&mut self, verb: Verb) -> Done {
        match verb {
            Verb::Connect { path } => {
                let socket = self.places.find(&path, Purpose::Connect)?.connect()?;
                Ok((Value::Null, vec![socket]))
            }
            Verb::Threads => done(json!(Threads {
                is_privileged: self.threads.is_privileged(),
                tells_time: self.threads.tells_time(),
            })),
            Verb::Limits { limits } => {
                self.places.permits().check_limits(&limits).map_err(io::Error::other)?;
                done(Value::Null)
            }
            Verb::Vmm { path, language } => self.vmm(&path, language),
            Verb::Take { process, tid } => self.take(process, tid).map_err(|error| match error {
                TakeError::Missing { source, .. } => source,
                other => io::Error::other(other.to_string()),
            }),
            Verb::Nice { thread } => {
                self.on_thread(thread, |held| held.own_nice().map(Value::from))
            }
            Verb::Set { thread, setting } => self.set(thread, setting),
            Verb::Restore { thread } => {
                self.on_thread(thread, |held| held.restore().map(Value::from))
            }
            Verb::Release { thread } => {
                self.held.remove(&thread);
                done(Value::Null)
            }
            _ => misplaced(),
        }
    }

    fn vmm(&mut self, path: &str, language: Language) -> Done {
        let socket = self.places.find(path, Purpose::Vmm)?.connect()?;
        let told = vbus_control::Peer::process(&socket)?;
        let elsewhere = || io::Error::other("the process of the VMM is in another pid namespace");
        let (descriptor, process) = told.ok_or_else(elsewhere)?;
        // A socket that a service manager or this process has made leads to no VMM.
        if process == 1 || u32::try_from(process) == Ok(std::process::id()) {
            return Err(io::Error::other("no VMM has made this socket"));
        }
        if self.vmms.len() >= VMMS_MAX {
            self.vmms.retain(|_, process| lives(process));
        }
        if self.vmms.len() >= VMMS_MAX {
            self.vmms.clear();
        }
        self.vmms.insert(process, descriptor);
        let place = Arc::clone(&self.interviews);
        if Arc::strong_count(&place) > INTERVIEWS_MAX + 1 {
            return Err(io::Error::other("too many VMMs are being asked"));
        }
        let end = interview::begin(socket, language, move || drop(place))?;
        Ok((json!(process), vec![end]))
    }

    fn take(&mut self, process: Option<i32>, tid: i32) -> Result<(Value, Vec<OwnedFd>), TakeError> {
        if self.held.len() >= THREADS_MAX {
            return Err(TakeError::Refused("the bus holds too many threads".into()));
        }
        let by_id = process.is_none();
        let process = match process {
            None => {
                self.places.permits().thread(tid).map_err(TakeError::Refused)?;
                vbus_sched::process_of(tid)
            }
            // The id of a process that has ended may pass to another process.
            Some(process) if self.is_vmm(process) => process,
            Some(process) => {
                let text = format!("process {process} is no VMM that the bus is connected to");
                return Err(TakeError::Refused(text));
            }
        };
        let thread = self.threads.take_own(process, tid)?;
        // The thread was opened by ids. Only if the VMM lives still, they were the VMM's.
        if !by_id && !self.is_vmm(process) {
            return Err(TakeError::Refused(format!("the VMM, process {process}, has ended")));
        }
        // Another thread may have the id by now. The pin is asked after the thread was opened: if
        // the thread of the configuration is there still, it is the one that was opened.
        if by_id && self.places.permits().threads.contains(&tid) {
            let is_it = lock(&self.named.0).get(&tid).is_some_and(ThreadPin::lives);
            if !is_it && !self.places.permits().any_thread {
                return Err(TakeError::Refused(format!(
                    "thread {tid} of the configuration has ended; start the bus anew for another \
                     thread of this id"
                )));
            }
        }
        let time = thread.time_file().and_then(|file| file.try_clone().ok());
        self.next += 1;
        self.held.insert(self.next, thread);
        Ok((json!(self.next), time.map(OwnedFd::from).into_iter().collect()))
    }

    fn is_vmm(&self, process: i32) -> bool {
        self.vmms.get(&process).is_some_and(lives)
    }

    fn set(&mut self, thread: u64, setting: Setting) -> Done {
        let limits = self.places.permits().limits;
        self.on_thread(thread, |held| {
            let own_nice = held.own_nice()?;
            if !limits.allow(setting, own_nice) {
                return Err(Errno::PERM);
            }
            held.apply(setting).map(|()| Value::Null)
        })
    }

    fn on_thread(
        &mut self,
        thread: u64,
        act: impl FnOnce(&mut OwnThread) -> Result<Value, Errno>,
    ) -> Done {
        let held = self.held.get_mut(&thread).ok_or(Errno::SRCH)?;
        Ok((act(held)?, Vec::new()))
    }
}

/// Whether the process of the descriptor has not ended.
fn lives(process: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&now)) == Ok(0)
}
