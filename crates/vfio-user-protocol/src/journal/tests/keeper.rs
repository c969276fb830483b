// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who outlives the servers: it has the descriptors and the last state, and starts the next server
//! when one is killed.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};

use super::device::State;
use crate::journal::fault::Fault;
use crate::version::KERNEL_MSG_FDS;

/// The variable that has the step at which the process kills itself, and the fault that it has.
pub(super) const ORDERS: &str = "VFIO_USER_JOURNAL_TEST";

/// The most bytes of a frame.
const FRAME_MAX: usize = 64 << 10;

/// What goes over the channel between a server and its keeper.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Frame {
    /// To the first server. Descriptors: the listening socket, the journal.
    Begin,
    /// To each further one. Descriptors: those of the server, those of the device, and those that
    /// are held for the message `number`.
    GoOn { data: serde_json::Value, state: State, of_server: usize, of_device: usize, number: u64 },
    /// From a server.
    Commit { data: serde_json::Value, state: State, of_server: usize },
    /// From a server.
    Hold { number: u64 },
}

pub(super) fn send(channel: impl AsFd, frame: &Frame, fds: &[BorrowedFd<'_>]) {
    let bytes = serde_json::to_vec(frame).unwrap();
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(fds.len()))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    // Whoever has gone needs no frame.
    let _ = sendmsg(channel, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL);
}

/// The next frame. `None`: the other end has gone.
pub(super) fn receive(channel: impl AsFd) -> Option<(Frame, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_MSG_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; FRAME_MAX];
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let received = recvmsg(channel, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC);
    // A server that was killed before it read its orders leaves an error.
    let len = received.map_or(0, |received| received.bytes);
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    (len > 0).then(|| (serde_json::from_slice(&bytes[..len]).unwrap(), fds))
}

/// When the servers are killed.
pub(super) enum Deaths {
    /// Each server at the next of these steps of its own.
    Steps(RangeInclusive<u64>),
    /// So many servers, each at a random moment within this time from its start.
    Moments { count: u32, within: Duration },
}

/// The state that the next server gets.
#[derive(Default)]
struct Kept {
    commit: Option<(Frame, Vec<OwnedFd>)>,
    number: u64,
    held: Vec<OwnedFd>,
}

impl Kept {
    fn take(&mut self, frame: Frame, fds: Vec<OwnedFd>) {
        match frame {
            Frame::Commit { ref data, .. } => {
                if data["journal"].as_u64().unwrap() >= self.number {
                    self.held.clear();
                }
                self.commit = Some((frame, fds));
            }
            Frame::Hold { number } => (self.number, self.held) = (number, fds),
            other => panic!("{other:?}"),
        }
    }

    /// Whether the last commit has a connection.
    fn has_connection(&self) -> bool {
        match &self.commit {
            Some((Frame::Commit { data, .. }, _)) => {
                !data["client"].is_null() || data["candidates"] != 0
            }
            _ => false,
        }
    }
}

pub(super) struct Keeper {
    _folder: tempfile::TempDir,
    pub(super) path: PathBuf,
    kept: Arc<Mutex<Kept>>,
    /// No server is killed any more.
    done: Arc<AtomicBool>,
    failed: Arc<AtomicBool>,
    stop: OwnedFd,
    thread: JoinHandle<Result<u32, String>>,
}

impl Keeper {
    pub(super) fn start(deaths: Deaths, fault: Option<Fault>) -> Keeper {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let journal = crate::journal::create().unwrap();
        let (stop, stopped) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let kept = Arc::<Mutex<Kept>>::default();
        let (done, failed) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let first = vec![listener.into(), journal];
        let life = Life {
            deaths,
            fault: fault.map_or(0, |fault| fault as u32),
            first,
            kept: kept.clone(),
            done: done.clone(),
            stopped: stop,
            killed: 0,
        };
        let says = failed.clone();
        let thread = std::thread::spawn(move || {
            let result = life.run();
            says.store(result.is_err(), Ordering::Release);
            result
        });
        Keeper { _folder: folder, path, kept, done, failed, stop: stopped, thread }
    }

    /// Whether all deaths have happened, or a server has failed.
    pub(super) fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire) || self.has_failed()
    }

    /// Whether a server has ended otherwise than by a kill.
    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    pub(super) fn has_connection(&self) -> bool {
        self.kept.lock().unwrap().has_connection()
    }

    /// Ends the last server. Returns how many were killed before.
    pub(super) fn end(self) -> Result<u32, String> {
        drop(self.stop);
        self.thread.join().unwrap()
    }
}

/// The thread of a keeper.
struct Life {
    deaths: Deaths,
    fault: u32,
    first: Vec<OwnedFd>,
    kept: Arc<Mutex<Kept>>,
    done: Arc<AtomicBool>,
    stopped: OwnedFd,
    killed: u32,
}

impl Life {
    fn run(mut self) -> Result<u32, String> {
        loop {
            let (step, moment) = match &mut self.deaths {
                Deaths::Steps(steps) => (steps.next().unwrap_or(0), None),
                Deaths::Moments { count: 0, .. } => (0, None),
                Deaths::Moments { count, within } => {
                    *count -= 1;
                    (0, Some(within.mul_f64(random())))
                }
            };
            let dies = step > 0 || moment.is_some();
            if !dies {
                self.done.store(true, Ordering::Release);
            }
            let (ours, theirs) =
                socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                    .unwrap();
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["journal::tests::child", "--exact", "--nocapture"])
                .env(ORDERS, format!("{step} {}", self.fault))
                .stdin(theirs)
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            self.begin(&ours);
            let kill_at = moment.map(|after| Instant::now() + after);
            let mut is_killed = false;
            // Until the server has gone.
            loop {
                let rest = kill_at
                    .filter(|_| !is_killed)
                    .map(|at| at.saturating_duration_since(Instant::now()))
                    .map(|rest| Timespec::try_from(rest).unwrap());
                let mut fds =
                    [PollFd::new(&ours, PollFlags::IN), PollFd::new(&self.stopped, PollFlags::IN)];
                poll(&mut fds[..if is_killed { 1 } else { 2 }], rest.as_ref()).unwrap();
                let (frame, stopped) = (fds[0].revents(), fds[1].revents());
                if !is_killed && !stopped.is_empty() && frame.is_empty() {
                    child.kill().unwrap();
                    child.wait().unwrap();
                    return Ok(self.killed);
                }
                if !is_killed && kill_at.is_some_and(|at| at <= Instant::now()) {
                    child.kill().unwrap();
                    is_killed = true;
                }
                if !frame.is_empty() {
                    match receive(&ours) {
                        Some((frame, fds)) => self.kept.lock().unwrap().take(frame, fds),
                        None => break,
                    }
                }
            }
            let output = child.wait_with_output().unwrap();
            if output.status.signal() != Some(9) {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                return Err(format!("a server has failed: {} {said}", output.status));
            }
            self.killed += 1;
        }
    }

    /// Gives a server what it begins with.
    fn begin(&self, channel: &OwnedFd) {
        let kept = self.kept.lock().unwrap();
        let Some((Frame::Commit { data, state, of_server }, fds)) = &kept.commit else {
            let fds: Vec<_> = self.first.iter().map(AsFd::as_fd).collect();
            // The former server has perhaps begun to write.
            rewind(&self.first[1]);
            return send(channel, &Frame::Begin, &fds);
        };
        let (data, state, of_server) = (data.clone(), state.clone(), *of_server);
        let of_device = fds.len() - of_server;
        let number = kept.number;
        let all: Vec<_> = fds.iter().chain(&kept.held).map(AsFd::as_fd).collect();
        send(channel, &Frame::GoOn { data, state, of_server, of_device, number }, &all);
    }
}

/// Makes the journal new: a server that was killed before its first commit has answered nobody.
fn rewind(journal: &OwnedFd) {
    let new = crate::journal::create().unwrap();
    let mut head = [0; 4096];
    rustix::io::pread(&new, &mut head, 0).unwrap();
    rustix::io::pwrite(journal, &head, 0).unwrap();
}

/// A number between 0 and 1.
fn random() -> f64 {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).unwrap();
    f64::from(u32::from_ne_bytes(bytes)) / f64::from(u32::MAX)
}
