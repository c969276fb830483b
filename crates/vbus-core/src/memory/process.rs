// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which process a peer is.
#![allow(unsafe_code)] // rustix reads the credentials into a type that cannot hold the process 0.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The process at the other end of a UNIX socket, as the kernel noted it when that end connected.
/// The peer cannot choose it.
///
/// From Linux 6.5 on, an id that has passed on to another process is noticed. Before that, whoever
/// gets the id of a process that has ended, and whose connections somebody else still has, is
/// taken for that process.
#[derive(Debug)]
pub struct PeerProcess {
    pid: i32,
    /// Readable when the process has ended. `None`: the kernel does not tell.
    process: Option<OwnedFd>,
}

impl PeerProcess {
    /// `None`: it is in another pid namespace, or `socket` is no connected UNIX socket.
    pub fn of(socket: impl AsFd) -> Option<PeerProcess> {
        /// The number on all of Linux's machines but PA-RISC, SPARC and the like.
        const SO_PEERPIDFD: i32 = 77;
        let socket = socket.as_fd();
        let mut own = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut size = libc::socklen_t::try_from(size_of_val(&own)).unwrap_or(0);
        let (level, raw) = (libc::SOL_SOCKET, socket.as_raw_fd());
        // SAFETY: the kernel writes at most `size` bytes to `own`, and any bytes are a `ucred`.
        let told = unsafe {
            libc::getsockopt(raw, level, libc::SO_PEERCRED, (&raw mut own).cast(), &raw mut size)
        };
        if told != 0 || own.pid <= 0 {
            return None;
        }
        let mut descriptor: i32 = -1;
        let mut size = libc::socklen_t::try_from(size_of_val(&descriptor)).unwrap_or(0);
        // SAFETY: the kernel writes at most `size` bytes, and any bytes are an `i32`.
        let told = unsafe {
            let value = (&raw mut descriptor).cast();
            libc::getsockopt(raw, level, SO_PEERPIDFD, value, &raw mut size)
        };
        // SAFETY: the kernel has made the descriptor for this call, so nobody else owns it.
        let process = (told == 0).then(|| unsafe { OwnedFd::from_raw_fd(descriptor) });
        Some(PeerProcess { pid: own.pid, process })
    }

    /// Its id, as this process sees it.
    pub fn id(&self) -> i32 {
        self.pid
    }

    /// Whether it has ended, as far as the kernel tells.
    pub fn has_ended(&self) -> bool {
        let Some(process) = &self.process else { return false };
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&now)), Ok(1..))
    }
}

#[cfg(test)]
impl PeerProcess {
    /// One of which the kernel tells no more than the id.
    pub(super) fn unknown(pid: i32) -> PeerProcess {
        PeerProcess { pid, process: None }
    }

    /// One that has ended: what stands for it is readable.
    pub(super) fn ended(pid: i32) -> PeerProcess {
        let event = rustix::event::eventfd(1, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        PeerProcess { pid, process: Some(event) }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::{Command, Stdio};

    use super::*;

    /// Where the process of the test below connects to.
    const SOCKET: &str = "VBUS_CORE_TEST_SOCKET";

    #[test]
    fn the_process_that_connected_is_told_and_whether_it_has_ended() {
        if let Some(path) = std::env::var_os(SOCKET) {
            let _socket = UnixStream::connect(path).unwrap();
            std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        // This test itself, in another process.
        let this = "memory::process::tests::\
                    the_process_that_connected_is_told_and_whether_it_has_ended";
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([this, "--exact"])
            .env(SOCKET, &path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (socket, _) = listener.accept().unwrap();
        let process = PeerProcess::of(&socket).unwrap();
        assert_eq!(u32::try_from(process.id()), Ok(child.id()));
        assert!(!process.has_ended());
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
        assert_eq!(process.has_ended(), process.process.is_some());
        assert!(PeerProcess::of(std::fs::File::open("/dev/null").unwrap()).is_none());
    }
}
