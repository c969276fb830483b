// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who a client is, by the kernel's word.
#![allow(unsafe_code)] // The credentials of a peer have no safe wrapper that suits.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// The credentials that a client had when it connected (`SO_PEERCRED` and `SO_PEERGROUPS` of
/// socket(7)). The client cannot choose them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its process, as this process sees it; 0 if it is in another pid namespace.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Its groups: the effective one first, then the supplementary ones.
    pub groups: Vec<u32>,
}

impl Peer {
    /// Reads the credentials of the other end of `socket`, a connected UNIX socket.
    ///
    /// # Errors
    /// The system refuses, because `socket` is no connected UNIX socket.
    pub fn of(socket: impl AsFd) -> io::Result<Peer> {
        let socket = socket.as_fd().as_raw_fd();
        // rustix reads these into a type that has no 0, but the kernel writes 0 for a process of
        // another pid namespace.
        let mut own = libc::ucred { pid: 0, uid: 0, gid: 0 };
        // SAFETY: the kernel writes at most `size_of::<ucred>()` bytes to `own`, and any bytes are
        // a valid `ucred`.
        unsafe { option(socket, libc::SO_PEERCRED, (&raw mut own).cast(), size_of_val(&own)) }
            .map_err(|(error, _)| error)?;
        let mut groups = vec![own.gid];
        groups.extend(supplementary(socket)?);
        Ok(Peer { pid: own.pid, uid: own.uid, groups })
    }

    /// A descriptor of the process at the other end of `socket` (pidfd), with its id as this
    /// process sees it. As long as the descriptor is not readable, the process has not ended, and
    /// the id is no other's. `None`: it is in another pid namespace.
    ///
    /// A kernel before 6.5 does not tell the process itself (`SO_PEERPIDFD`). There the descriptor
    /// is that of the process that has the id now: a process that had ended before, and whose id
    /// has passed on, is mistaken for its successor.
    ///
    /// # Errors
    /// The process has ended, or the system refuses.
    pub fn process(socket: impl AsFd) -> io::Result<Option<(OwnedFd, i32)>> {
        /// The number on all of Linux's machines but PA-RISC, SPARC and the like.
        const SO_PEERPIDFD: i32 = 77;
        let mut descriptor: i32 = -1;
        let raw = socket.as_fd().as_raw_fd();
        let room = size_of_val(&descriptor);
        // SAFETY: the kernel writes at most the bytes of an `i32`, and any bytes are one.
        let told = unsafe { option(raw, SO_PEERPIDFD, (&raw mut descriptor).cast(), room) };
        let process = match told {
            // SAFETY: the kernel has made the descriptor for this call, so nobody else owns it.
            Ok(_) => unsafe { OwnedFd::from_raw_fd(descriptor) },
            Err((error, _)) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
                let Some(pid) = Pid::from_raw(Peer::of(&socket)?.pid) else { return Ok(None) };
                pidfd_open(pid, PidfdFlags::empty())?
            }
            Err((error, _)) => return Err(error),
        };
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", process.as_raw_fd()))?;
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
        match pid {
            Some(pid @ 1..) => Ok(Some((process, pid))),
            Some(0) => Ok(None),
            _ => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    }

    /// Whether `group` is one of its groups.
    pub fn is_member(&self, group: u32) -> bool {
        self.groups.contains(&group)
    }
}

/// `SO_PASSRIGHTS`, on all of Linux's machines but PA-RISC, SPARC and the like.
pub const SO_PASSRIGHTS: i32 = 83;

/// Lets a UNIX socket take no descriptors from its peer, nor a listening socket those of its
/// clients. Otherwise whoever reads from it closes what comes, and a close can wait for the peer
/// (`SO_LINGER`). Returns whether the kernel can do that: Linux 6.16 can.
pub fn refuse_descriptors(socket: impl AsFd) -> bool {
    let (no, raw) = (0_i32, socket.as_fd().as_raw_fd());
    let size = libc::socklen_t::try_from(size_of_val(&no)).unwrap_or(0);
    // SAFETY: the kernel reads the bytes of an `i32`.
    let done = unsafe {
        libc::setsockopt(raw, libc::SOL_SOCKET, SO_PASSRIGHTS, (&raw const no).cast(), size)
    };
    done == 0
}

/// The supplementary groups of the peer of `socket`. Kernels before 4.13 do not tell them.
fn supplementary(socket: i32) -> io::Result<Vec<u32>> {
    /// More than most accounts have. If it is not enough, the kernel says how many bytes are.
    const ROOM: usize = 64;
    let mut groups = vec![0u32; ROOM];
    loop {
        let room = size_of_val(&*groups);
        // SAFETY: the kernel writes at most `room` bytes to `groups`, which has that many.
        match unsafe { option(socket, libc::SO_PEERGROUPS, groups.as_mut_ptr().cast(), room) } {
            Ok(length) => {
                groups.truncate(length / size_of::<u32>());
                return Ok(groups);
            }
            Err((error, length)) if error.raw_os_error() == Some(libc::ERANGE) && length > room => {
                groups.resize(length / size_of::<u32>(), 0);
            }
            Err((error, _)) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
                return Ok(Vec::new());
            }
            Err((error, _)) => return Err(error),
        }
    }
}

/// Reads a socket option into the `room` bytes at `value`. Returns the number of bytes. An error
/// comes with the number of bytes that the option has, if the kernel told it.
///
/// # Safety
/// The kernel may write any bytes to the `room` bytes at `value`.
unsafe fn option(
    socket: i32,
    name: i32,
    value: *mut libc::c_void,
    room: usize,
) -> Result<usize, (io::Error, usize)> {
    let mut length = libc::socklen_t::try_from(room).unwrap_or(0);
    // SAFETY: by this function's contract; `length` is a valid place for the new length.
    let result =
        unsafe { libc::getsockopt(socket, libc::SOL_SOCKET, name, value, &raw mut length) };
    let length = usize::try_from(length).unwrap_or(0);
    if result == 0 { Ok(length) } else { Err((io::Error::last_os_error(), length)) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_process_of_a_peer_is_told_as_long_as_it_lives() {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let (end, _other) = UnixStream::pair().unwrap();
        let (process, pid) = Peer::process(&end).unwrap().unwrap();
        assert_eq!(u32::try_from(pid), Ok(std::process::id()));
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&now)), Ok(0));
    }

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (end, _other) = UnixStream::pair().unwrap();
        let peer = Peer::of(&end).unwrap();
        assert_eq!(peer.pid, rustix::process::getpid().as_raw_nonzero().get());
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        assert!(peer.is_member(rustix::process::getegid().as_raw()));
        // SAFETY: with no room the call only counts the groups.
        let count = unsafe { libc::getgroups(0, std::ptr::null_mut()) };
        assert_eq!(peer.groups.len(), 1 + usize::try_from(count).unwrap());
    }
}
