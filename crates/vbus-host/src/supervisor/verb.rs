// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The messages between the bus and its supervisor. A message is one packet: an object of JSON, and
//! descriptors beside it. The bus sends a [`Verb`] and waits for its [`Answer`]. There are two
//! sockets: one for the verbs that may take long, and one for the others.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Seek as _, SeekFrom, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_sched::interview::Language;
use vbus_sched::{Limits, Setting};

use crate::access::Access;
use crate::rights::Rights;

/// The longest message, in bytes. A longer one comes in a file.
const BYTES_MAX: usize = 64 << 10;
/// The longest message in a file, in bytes.
const FILE_MAX: usize = 16 << 20;
/// The bytes of a message that is in the file that comes with it. No message is this text.
const IN_FILE: &[u8] = b"\"in the file\"";
/// The most descriptors in a message: the queues of a TAP interface.
pub const DESCRIPTORS_MAX: usize = 16;

/// How often a message is sent or received again while the system has no memory for it.
const TRIES: u32 = 100;
/// The same for a verb, for which the supervisor waits. If it gave up, all sockets of the bus would
/// go. The bus waits for its answer meanwhile.
const VERB_TRIES: u32 = 250;
/// The time between two tries.
const PAUSE: Duration = Duration::from_millis(20);

/// What the bus can ask for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Verb {
    /// Create or overwrite a file for a capture. Answer: the file.
    Create { path: String },
    /// Make a socket that listens. Answer: the socket.
    Listen { path: String, backlog: i32, access: Access },
    /// Remove a socket that `Listen` made.
    Remove { path: String },
    /// Another bus is taking over (true): leave the sockets as they are, if the bus ends now. Or it
    /// has not taken over (false). Answer: nothing.
    Leave { leaving: bool },
    /// Treat the socket there, which a former bus has left, as one that `Listen` made. Answer:
    /// nothing.
    Inherit { path: String },
    /// Connect to the peer of a stream. Answer: the socket.
    Connect { path: String },
    /// Read the configuration file again. Answer: a [`Configuration`], and a file with the text.
    Configuration,
    /// Allow what the configuration allows that was read last, beside what is allowed. Answer:
    /// nothing.
    Adopt,
    /// Allow what the configuration allows that was adopted last, and no more. Answer: nothing.
    Settle,
    /// Attach queues to a TAP interface. Answer: the name of the interface, whether it has several
    /// queues, and the queues.
    Tap { name: String, queues: u16, mtu: u16 },
    /// Open the kernel's end of queue pairs, /dev/vhost-net. Answer: a descriptor for each pair.
    Vhost { pairs: u16 },
    /// What the supervisor can do with threads. Answer: a [`Threads`].
    Threads,
    /// Check that a device may change threads within these limits.
    Limits { limits: Limits },
    /// Ask a VMM for the threads of its virtual CPUs. Answer: its process, and the end of an
    /// interview (`vbus_sched::interview`). The bus does not get the VMM's socket.
    Vmm { path: String, language: Language },
    /// Take a thread of a VMM's process, or a thread that the configuration names. Answer: the
    /// number of the thread in later verbs, and the file with its processor time if there is one.
    Take { process: Option<i32>, tid: i32 },
    /// Read the own nice value of a thread. Answer: the value.
    Nice { thread: u64 },
    /// Change a thread.
    Set { thread: u64, setting: Setting },
    /// Restore a thread. Answer: whether that needed a change.
    Restore { thread: u64 },
    /// Restore a thread and forget it.
    Release { thread: u64 },
}

impl Verb {
    /// Whether a thread that serves devices may wait for the answer. Such verbs have a socket and a
    /// thread of their own, so that they never wait for a slow disk.
    pub fn is_quick(&self) -> bool {
        match self {
            Verb::Create { .. }
            | Verb::Listen { .. }
            | Verb::Remove { .. }
            | Verb::Leave { .. }
            | Verb::Inherit { .. }
            | Verb::Configuration
            | Verb::Adopt
            | Verb::Settle
            | Verb::Tap { .. }
            | Verb::Vhost { .. } => false,
            Verb::Connect { .. }
            | Verb::Threads
            | Verb::Limits { .. }
            | Verb::Vmm { .. }
            | Verb::Take { .. }
            | Verb::Nice { .. }
            | Verb::Set { .. }
            | Verb::Restore { .. }
            | Verb::Release { .. } => true,
        }
    }
}

/// The answer to [`Verb::Threads`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Threads {
    pub is_privileged: bool,
    pub tells_time: bool,
}

/// The answer to [`Verb::Configuration`]: what only the supervisor can find out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Configuration {
    /// The path of the file.
    pub path: OsString,
    /// The rights of control clients.
    pub rights: Rights,
}

/// What the supervisor answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    Ok(Value),
    /// The system refused, with this error number.
    Errno(i32),
    /// The supervisor refused. The text is for people.
    Refused(String),
}

/// Sends a message with descriptors.
///
/// # Errors
/// The other end has gone; or the message is too long, or has too many descriptors.
pub fn send(
    socket: impl AsFd,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    send_bytes(socket, &serde_json::to_vec(message)?, descriptors)
}

/// As [`send`], for a message of any length up to 16 MiB and at most 15 descriptors. Only
/// [`receive`] takes it: the receiver trusts the sender with its memory.
///
/// # Errors
/// As of [`send`].
pub fn send_long(
    socket: impl AsFd,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() <= BYTES_MAX {
        return send_bytes(socket, &bytes, descriptors);
    }
    if bytes.len() > FILE_MAX {
        return Err(io::Error::other("the message of bus or supervisor is too long"));
    }
    let mut file = File::from(memfd_create(c"vbus-message", MemfdFlags::CLOEXEC)?);
    file.write_all(&bytes)?;
    send_bytes(socket, IN_FILE, &[descriptors, &[file.as_fd()]].concat())
}

fn send_bytes(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    if bytes.len() > BYTES_MAX || descriptors.len() > DESCRIPTORS_MAX {
        return Err(io::Error::other("the message of bus or supervisor is too long"));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    retry(TRIES, || sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// Receives a message with its descriptors. `None`: the other end has gone.
///
/// # Errors
/// The message is not understood, or this process has too many descriptors.
pub fn receive<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let received = receive_bytes(socket, RecvAncillaryBuffer::new(&mut space), TRIES)?;
    let Some((mut bytes, mut descriptors)) = received else { return Ok(None) };
    if bytes == IN_FILE {
        let missing = || io::Error::other("a message between bus and supervisor was cut");
        let mut file = File::from(descriptors.pop().ok_or_else(missing)?);
        bytes.clear();
        file.seek(SeekFrom::Start(0))?;
        file.take(FILE_MAX as u64).read_to_end(&mut bytes)?;
    }
    Ok(Some((serde_json::from_slice(&bytes)?, descriptors)))
}

/// Receives a message without descriptors. `None`: the other end has gone.
///
/// # Errors
/// The message is not understood, or has descriptors. The kernel has closed them already: they
/// take no place in this process.
pub fn receive_plain<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<T>> {
    let received = receive_bytes(socket, RecvAncillaryBuffer::new(&mut []), VERB_TRIES)?;
    Ok(received.map(|(bytes, _)| serde_json::from_slice(&bytes)).transpose()?)
}

fn receive_bytes(
    socket: impl AsFd,
    mut control: RecvAncillaryBuffer<'_>,
    tries: u32,
) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; BYTES_MAX];
    let received = retry(tries, || {
        recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::other("a message between bus and supervisor was cut"));
    }
    bytes.truncate(received.bytes);
    Ok(Some((bytes, descriptors)))
}

/// Repeats a call that was interrupted, or, `tries` times, one for which the system has no memory
/// at the moment. A message that is not received now would be taken for the answer to the next
/// verb.
fn retry<T>(tries: u32, mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    let mut left = tries;
    loop {
        match call() {
            Err(Errno::INTR) => {}
            Err(Errno::NOMEM | Errno::NOBUFS) if left > 0 => {
                left -= 1;
                std::thread::sleep(PAUSE);
            }
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    #[test]
    fn a_message_carries_descriptors() {
        let kind = SocketType::SEQPACKET;
        let (a, b) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        let verb = Verb::Tap { name: "vbus%d".into(), queues: 2, mtu: 1500 };
        send(&a, &verb, &[a.as_fd(), b.as_fd()]).unwrap();
        let (received, descriptors) = receive::<Verb>(&b).unwrap().unwrap();
        assert_eq!((&received, descriptors.len()), (&verb, 2));
        send(&a, &verb, &[a.as_fd()]).unwrap();
        assert!(receive_plain::<Verb>(&b).is_err(), "no verb comes with descriptors");
        send(&a, &verb, &[]).unwrap();
        assert_eq!(receive_plain::<Verb>(&b).unwrap(), Some(verb));
        rustix::net::send(&a, b"{\"verb\":\"exec\"}", SendFlags::empty()).unwrap();
        assert!(receive::<Verb>(&b).is_err());
        let long = Verb::Connect { path: "x".repeat(BYTES_MAX) };
        assert!(send(&a, &long, &[]).is_err());
        // Only whoever trusts the sender takes it.
        send_long(&a, &long, &[a.as_fd()]).unwrap();
        let (received, one) = receive::<Verb>(&b).unwrap().unwrap();
        assert_eq!((&received, one.len()), (&long, 1));
        drop(one);
        send_long(&a, &long, &[]).unwrap();
        assert!(receive_plain::<Verb>(&b).is_err());
        let longest = Verb::Connect { path: "x".repeat(FILE_MAX) };
        assert!(send_long(&a, &longest, &[]).is_err());
        drop(a);
        drop(descriptors);
        assert!(receive::<Verb>(&b).unwrap().is_none());
    }
}
