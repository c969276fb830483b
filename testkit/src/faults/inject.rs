// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lets system calls of a child process fail, one by one.
//!
//! The child gets a seccomp filter that reports some calls to this process and waits for its
//! decision (seccomp_unotify(2)). Processes that the child starts inherit the filter.
#![allow(unsafe_code)] // The filter is raw, and so are the kernel's messages.
#![allow(clippy::cast_possible_truncation, reason = "the kernel's own widths")]

use std::collections::{BTreeMap, HashMap};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::{MaybeUninit, offset_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use libc::{seccomp_data, seccomp_notif, seccomp_notif_resp, sock_filter, sock_fprog};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// A system call, and the errors with which it may fail.
#[derive(Debug)]
pub struct Call {
    /// Its name.
    pub name: &'static str,
    number: i64,
    /// The errors that it can have without a fault of the program.
    pub errors: &'static [Errno],
}

const fn call(name: &'static str, number: i64, errors: &'static [Errno]) -> Call {
    Call { name, number, errors }
}

const INTR: Errno = Errno::INTR;
const MFILE: Errno = Errno::MFILE;
const NOMEM: Errno = Errno::NOMEM;
const NOSPC: Errno = Errno::NOSPC;

/// The calls that can be made to fail.
///
/// Not `brk`, `mprotect` and most of `mmap`: the program's allocator uses them, and a Rust program
/// that has no memory for itself ends. Not `close`: it always closes.
pub const CALLS: &[Call] = &[
    call("accept4", libc::SYS_accept4, &[INTR, MFILE, NOMEM]),
    call("bind", libc::SYS_bind, &[NOMEM, NOSPC]),
    call("clone3", libc::SYS_clone3, &[NOMEM]),
    call("dup", libc::SYS_dup, &[MFILE]),
    call("epoll_create1", libc::SYS_epoll_create1, &[MFILE, NOMEM]),
    call("epoll_ctl", libc::SYS_epoll_ctl, &[NOMEM, NOSPC]),
    call("epoll_pwait2", libc::SYS_epoll_pwait2, &[INTR]),
    #[cfg(target_arch = "x86_64")]
    call("epoll_wait", libc::SYS_epoll_wait, &[INTR]),
    call("epoll_pwait", libc::SYS_epoll_pwait, &[INTR]),
    call("eventfd2", libc::SYS_eventfd2, &[MFILE, NOMEM]),
    call("fcntl", libc::SYS_fcntl, &[MFILE]),
    call("flock", libc::SYS_flock, &[INTR]),
    call("fstat", libc::SYS_fstat, &[NOMEM]),
    call("ftruncate", libc::SYS_ftruncate, &[NOSPC]),
    call("io_setup", libc::SYS_io_setup, &[NOMEM]),
    call("io_submit", libc::SYS_io_submit, &[NOMEM]),
    call("listen", libc::SYS_listen, &[NOMEM]),
    call("madvise", libc::SYS_madvise, &[NOMEM]),
    call("memfd_create", libc::SYS_memfd_create, &[MFILE, NOMEM]),
    call("mmap", libc::SYS_mmap, &[NOMEM]),
    call("munmap", libc::SYS_munmap, &[NOMEM]),
    call("openat", libc::SYS_openat, &[MFILE, NOMEM, NOSPC]),
    call("openat2", libc::SYS_openat2, &[MFILE, NOMEM]),
    #[cfg(target_arch = "x86_64")]
    call("poll", libc::SYS_poll, &[INTR, NOMEM]),
    call("ppoll", libc::SYS_ppoll, &[INTR, NOMEM]),
    call("read", libc::SYS_read, &[INTR]),
    call("recvfrom", libc::SYS_recvfrom, &[INTR, NOMEM]),
    call("recvmsg", libc::SYS_recvmsg, &[INTR, NOMEM]),
    call("sendmsg", libc::SYS_sendmsg, &[INTR, NOMEM]),
    call("sendto", libc::SYS_sendto, &[INTR, NOMEM]),
    call("socket", libc::SYS_socket, &[MFILE, NOMEM]),
    call("socketpair", libc::SYS_socketpair, &[MFILE, NOMEM]),
    call("write", libc::SYS_write, &[INTR, NOSPC]),
    call("writev", libc::SYS_writev, &[INTR, NOSPC]),
];

/// What can fail: a call of the child or of a process that it has started, with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind {
    /// The call, an index of [`CALLS`].
    pub call: usize,
    /// The error, an index of `Call::errors`.
    pub error: usize,
    /// Whether another process than the child makes the call.
    pub other: bool,
}

impl Kind {
    /// The error.
    pub fn errno(&self) -> Errno {
        CALLS[self.call].errors[self.error]
    }
}

/// A fault: call number `nth` of its kind, counted from 1, fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What fails.
    pub kind: Kind,
    /// The number of the call.
    pub nth: u32,
    /// Whether all later calls of the kind fail too.
    pub lasting: bool,
}

/// Fails the calls of one child.
pub struct Injector {
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
    end: OwnedFd,
}

#[derive(Default)]
struct State {
    fault: Option<Fault>,
    /// How many calls of each kind were made.
    counts: BTreeMap<Kind, u32>,
    hits: u32,
    paused: bool,
}

impl Injector {
    /// Prepares `command`, whose child will have the filter. `fault` happens in the child. Without
    /// one, the calls are only counted. The result must live until the child has ended.
    ///
    /// # Errors
    /// This process is out of descriptors or threads. An error of the kernel, which may lack the
    /// filters, comes when the command is started.
    pub fn prepare(command: &mut Command, fault: Option<Fault>) -> io::Result<Injector> {
        let kind = SocketType::SEQPACKET;
        let pair = || socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
        let ((ours, theirs), (end, ended)) = (pair()?, pair()?);
        let filter = filter(theirs.as_raw_fd());
        // SAFETY: the closure makes a few system calls, and neither allocates nor takes a lock.
        unsafe {
            command.pre_exec(move || {
                let listener = install(&filter)?;
                let descriptors = [listener.as_fd()];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                control.push(SendAncillaryMessage::ScmRights(&descriptors));
                sendmsg(&theirs, &[IoSlice::new(&[1])], &mut control, SendFlags::empty())?;
                Ok(())
            });
        }
        let state = Arc::new(Mutex::new(State { fault, ..State::default() }));
        let shared = state.clone();
        let thread = std::thread::Builder::new().name("faults".into()).spawn(move || {
            if let Some(listener) = receive(&ours, &ended) {
                decide_all(&listener, &shared, &ended);
            }
        })?;
        Ok(Injector { state, thread: Some(thread), end })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many calls have failed.
    pub fn hits(&self) -> u32 {
        self.state().hits
    }

    /// From now on no call fails, and none is counted.
    pub fn pause(&self) {
        self.state().paused = true;
    }

    /// Ends [`pause`](Self::pause).
    pub fn resume(&self) {
        self.state().paused = false;
    }

    /// How many calls of each kind were made.
    pub fn counts(&self) -> BTreeMap<Kind, u32> {
        self.state().counts.clone()
    }

    /// Whether all processes with the filter have ended.
    pub fn all_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Injector {
    fn drop(&mut self) {
        // The thread ends also if a process is left. Its calls then fail.
        let _ = rustix::net::shutdown(&self.end, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Receives the descriptor of the filter. `None`: the child was not started, or the injector ends.
fn receive(from: &OwnedFd, ended: &OwnedFd) -> Option<OwnedFd> {
    if !wait(from.as_fd(), ended) {
        return None;
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut into = [IoSliceMut::new(&mut byte)];
    recvmsg(from, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
    let mut descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    descriptors.next()
}

/// Waits until `fd` is readable. False: it has no other end any more, or the injector ends.
fn wait(fd: BorrowedFd<'_>, ended: &OwnedFd) -> bool {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(fd, PollFlags::IN),
            PollFd::new(ended, PollFlags::IN | PollFlags::RDHUP),
        ];
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        match poll(&mut fds, Some(&second)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return fds[1].revents().is_empty() && fds[0].revents() == PollFlags::IN,
            Err(_) => return false,
        }
    }
}

fn decide_all(listener: &OwnedFd, state: &Mutex<State>, ended: &OwnedFd) {
    let mut processes = Processes::default();
    while wait(listener.as_fd(), ended) {
        // SAFETY: zeros are valid values of this plain structure.
        let mut asked: seccomp_notif = unsafe { zeroed() };
        // SAFETY: the kernel fills in the structure of its own ABI.
        if unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &mut asked) }
            < 0
        {
            // A signal has ended the call, or the process.
            continue;
        }
        let failed = {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            state.decide(&asked, &mut processes)
        };
        let mut answer = seccomp_notif_resp { id: asked.id, val: 0, error: 0, flags: 0 };
        match failed {
            Some(error) => answer.error = -error.raw_os_error(),
            None => answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        }
        // SAFETY: as above. An error means that the caller has gone.
        unsafe {
            libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &answer);
        }
    }
}

impl State {
    /// Decides about a call. Returns the error with which it fails.
    fn decide(&mut self, asked: &seccomp_notif, processes: &mut Processes) -> Option<Errno> {
        let process = processes.of(asked);
        if self.paused || !process.has_begun {
            return None;
        }
        let number = i64::from(asked.data.nr);
        let call = CALLS.iter().position(|call| call.number == number)?;
        if let Some(fault) = self.fault {
            if (fault.kind.call, fault.kind.other) != (call, process.other) {
                return None;
            }
        }
        let mut failed = None;
        for (error, errno) in CALLS[call].errors.iter().enumerate() {
            let kind = Kind { call, error, other: process.other };
            let wanted = self.fault.is_none_or(|fault| fault.kind == kind);
            if !wanted || !applies(asked, *errno) {
                continue;
            }
            let count = self.counts.entry(kind).or_default();
            *count += 1;
            let due = |fault: Fault| fault.nth == *count || fault.lasting && fault.nth < *count;
            if self.fault.is_some_and(due) {
                self.hits += 1;
                failed = Some(*errno);
            }
        }
        failed
    }
}

/// Whether the call can fail with this error without a fault of the program.
fn applies(asked: &seccomp_notif, errno: Errno) -> bool {
    let arguments = &asked.data.args;
    match i64::from(asked.data.nr) {
        // Memory of the allocator has neither a file nor this flag.
        libc::SYS_mmap => {
            let is_file = arguments[4] as i32 >= 0;
            is_file || arguments[3] as i32 & libc::MAP_NORESERVE != 0
        }
        libc::SYS_fcntl => {
            matches!(arguments[1] as i32, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC)
        }
        // To end a watch takes no memory.
        libc::SYS_epoll_ctl => arguments[1] as i32 == libc::EPOLL_CTL_ADD,
        // A signal's handler sends one byte, and has nobody to tell if it cannot.
        libc::SYS_sendto => arguments[2] > 1,
        libc::SYS_openat if errno == NOSPC => arguments[2] as i32 & libc::O_CREAT != 0,
        libc::SYS_write | libc::SYS_writev if errno == NOSPC => {
            let link = format!("/proc/{}/fd/{}", asked.pid, arguments[0]);
            std::fs::read_link(link).is_ok_and(|file| file.is_absolute())
        }
        _ => true,
    }
}

/// The processes that make calls.
#[derive(Default)]
struct Processes {
    /// The process of each thread.
    threads: HashMap<u32, u32>,
    /// For each process, how often it has set an alternate stack.
    stacks: HashMap<u32, u32>,
    /// The child: the process that made the first call.
    child: Option<u32>,
}

struct Process {
    /// It is not the child.
    other: bool,
    /// Its `main` runs. The loader and the runtime before it are not tested.
    has_begun: bool,
}

impl Processes {
    fn of(&mut self, asked: &seccomp_notif) -> Process {
        let id = *self.threads.entry(asked.pid).or_insert_with(|| process_of(asked.pid));
        let child = *self.child.get_or_insert(id);
        let stacks = self.stacks.entry(id).or_default();
        // Rust's runtime asks for the main thread's stack, and then sets one.
        *stacks += u32::from(i64::from(asked.data.nr) == libc::SYS_sigaltstack);
        Process { other: id != child, has_begun: *stacks >= 2 }
    }
}

/// The process of a thread.
fn process_of(thread: u32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
    line.and_then(|id| id.trim().parse().ok()).unwrap_or(thread)
}

/// The filter: reports [`CALLS`], and lets everything else pass. The descriptor of the filter is
/// sent with `socket`, so a message on it passes too.
fn filter(socket: RawFd) -> Vec<sock_filter> {
    let statement = |code: u32, k: u32| sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let load = |at: usize| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at as u32);
    let answer = |action: u32| statement(libc::BPF_RET | libc::BPF_K, action);
    // Skips this many statements if the loaded word is not `k`.
    let unless = |k: u32, skip: u8| sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt: 0,
        jf: skip,
        k,
    };
    let (nr, arguments) = (offset_of!(seccomp_data, nr), offset_of!(seccomp_data, args));
    let mut filter = vec![
        load(nr),
        unless(libc::SYS_sendmsg as u32, 3),
        load(arguments),
        unless(socket as u32, 1),
        answer(libc::SECCOMP_RET_ALLOW),
        load(nr),
    ];
    let numbers = CALLS.iter().map(|call| call.number).chain([libc::SYS_sigaltstack]);
    for number in numbers {
        filter.extend([unless(number as u32, 1), answer(libc::SECCOMP_RET_USER_NOTIF)]);
    }
    filter.push(answer(libc::SECCOMP_RET_ALLOW));
    filter
}

/// Gives this process the filter. Returns the filter's descriptor.
fn install(filter: &[sock_filter]) -> io::Result<OwnedFd> {
    rustix::thread::set_no_new_privs(true)?;
    let program = sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program is valid until the call returns.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &program,
        )
    };
    if listener < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(listener as RawFd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_runs_under_the_filter_and_is_seen_to_end() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo said"]);
        let injector = Injector::prepare(&mut command, None).expect("descriptors");
        let output = match command.output() {
            Ok(output) => output,
            Err(error) => return println!("skipped: no such seccomp filter: {error}"),
        };
        assert_eq!(output.stdout, b"said\n");
        while !injector.all_ended() {
            std::thread::yield_now();
        }
        // A shell is no Rust program: nothing is counted.
        assert!(injector.counts().is_empty() && injector.hits() == 0);
    }
}
