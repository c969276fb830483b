// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The messages between the bus that leaves and the bus that takes over (spec/take-over.md,
//! "Messages"): a frame of bytes with any number of descriptors, over a UNIX stream socket.
//!
//! The kernel carries at most 253 descriptors in one packet. A frame has them in batches: the first
//! with the head, each further one with a byte of its own, before the body.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
};
use vbus_vfio_user::Closer;

/// The most descriptors in one packet (the kernel's `SCM_MAX_FD`).
const BATCH: usize = 253;
/// The most descriptors in a frame: more than a process usually may have.
pub const DESCRIPTORS_MAX: usize = 1 << 20;
/// The longest body, in bytes.
const BODY_MAX: usize = 256 << 20;
/// Bytes of a head.
const HEAD: usize = 16;
/// The receiver takes memory for bytes that have come, and not for bytes that a head announces.
const STEP: usize = 1 << 20;
/// The first bytes of every frame.
const MAGIC: [u8; 4] = *b"vbto";
/// How long to wait before descriptors are sent again that the kernel did not take: too many are on
/// their way.
const CROWDED: Duration = Duration::from_millis(1);

/// A message.
#[derive(Debug)]
pub struct Frame {
    /// Its kind.
    pub kind: u8,
    /// Its content.
    pub body: Vec<u8>,
    /// What came beside it.
    pub descriptors: Vec<OwnedFd>,
}

/// One end of the connection.
pub struct Wire<'a>(BorrowedFd<'a>);

impl<'a> Wire<'a> {
    /// The end `socket`, a UNIX stream socket.
    pub fn new(socket: BorrowedFd<'a>) -> Wire<'a> {
        Wire(socket)
    }

    /// Sends a frame. `by`: the time at which all of it must be on its way.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`]; the other end has gone; or the frame is too large
    /// ([`io::ErrorKind::InvalidInput`]): then nothing of it was sent.
    pub fn send(
        &self,
        kind: u8,
        body: &[u8],
        descriptors: &[BorrowedFd<'_>],
        by: Instant,
    ) -> io::Result<()> {
        if body.len() > BODY_MAX || descriptors.len() > DESCRIPTORS_MAX {
            let text = "the state of the bus is too large to be handed over";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let head = head(kind, body.len(), descriptors.len());
        let first = descriptors.len().min(BATCH);
        self.send_all(&head, &descriptors[..first], by)?;
        for batch in descriptors[first..].chunks(BATCH) {
            self.send_all(&[0], batch, by)?;
        }
        self.send_all(body, &[], by)
    }

    /// Sends bytes. The descriptors go with the first of them.
    fn send_all(
        &self,
        mut bytes: &[u8],
        mut descriptors: &[BorrowedFd<'_>],
        by: Instant,
    ) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !descriptors.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(descriptors));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(self.0, &[IoSlice::new(bytes)], &mut control, flags) {
                Ok(count) => {
                    bytes = &bytes[count..];
                    descriptors = &[];
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, by)?,
                Err(Errno::TOOMANYREFS | Errno::NOBUFS | Errno::NOMEM) => {
                    remaining(by)?;
                    std::thread::sleep(CROWDED);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Receives a frame. `None`: the other end has gone, between two frames. `by`: the time at
    /// which all of it must be there.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`]; what came is no frame, or exceeds a limit; the other end has
    /// gone within a frame; or this process has too many descriptors.
    pub fn receive(&self, by: Instant) -> io::Result<Option<Frame>> {
        let mut descriptors = Vec::new();
        let received = self.receive_head_and_body(&mut descriptors, by);
        let Ok(Some((kind, body))) = received else {
            // They may be of anything.
            Closer::let_go(descriptors);
            return received.map(|_| None);
        };
        Ok(Some(Frame { kind, body, descriptors }))
    }

    fn receive_head_and_body(
        &self,
        descriptors: &mut Vec<OwnedFd>,
        by: Instant,
    ) -> io::Result<Option<(u8, Vec<u8>)>> {
        let mut bytes = [0; HEAD];
        match self.receive_some(&mut bytes, descriptors, by)? {
            0 => return Ok(None),
            count => self.receive_all(&mut bytes[count..], descriptors, by)?,
        }
        let (kind, len, count) = parse(&bytes)?;
        while descriptors.len() < count {
            let before = descriptors.len();
            self.receive_all(&mut [0], descriptors, by)?;
            if descriptors.len() == before {
                return Err(wrong("descriptors are missing"));
            }
        }
        if descriptors.len() > count {
            return Err(wrong("it has too many descriptors"));
        }
        let mut body = Vec::new();
        while body.len() < len {
            let have = body.len();
            body.resize(len.min(have + STEP), 0);
            self.receive_all(&mut body[have..], descriptors, by)?;
        }
        if descriptors.len() > count {
            return Err(wrong("it has descriptors in the wrong place"));
        }
        Ok(Some((kind, body)))
    }

    fn receive_all(
        &self,
        bytes: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
        by: Instant,
    ) -> io::Result<()> {
        let mut have = 0;
        while have < bytes.len() {
            match self.receive_some(&mut bytes[have..], descriptors, by)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => have += count,
            }
        }
        Ok(())
    }

    /// Waits for bytes, and takes them. 0: the other end has gone.
    fn receive_some(
        &self,
        bytes: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
        by: Instant,
    ) -> io::Result<usize> {
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let received = match recvmsg(self.0, &mut [IoSliceMut::new(bytes)], &mut control, flags)
            {
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {
                    self.wait(PollFlags::IN, by)?;
                    continue;
                }
                Err(Errno::CONNRESET) => return Ok(0),
                other => other?,
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    descriptors.extend(rights);
                }
            }
            if received.flags.contains(ReturnFlags::CTRUNC) {
                return Err(io::Error::other(
                    "this process cannot have so many descriptors; raise its limit (ulimit -n, \
                     LimitNOFILE=)",
                ));
            }
            return Ok(received.bytes);
        }
    }

    fn wait(&self, what: PollFlags, by: Instant) -> io::Result<()> {
        let rest = Timespec::try_from(remaining(by)?).map_err(io::Error::other)?;
        let mut fds = [PollFd::from_borrowed_fd(self.0, what)];
        retry_on_intr(|| poll(&mut fds, Some(&rest)))?;
        Ok(())
    }

    /// From now on the other end can send nothing. What it has sent before is still received.
    pub fn close(&self) {
        let _ = shutdown(self.0.as_fd(), Shutdown::Both);
    }
}

/// The time until `by`.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`]: it has passed.
fn remaining(by: Instant) -> io::Result<Duration> {
    let rest = by.saturating_duration_since(Instant::now());
    if rest.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(rest) }
}

fn wrong(what: &str) -> io::Error {
    io::Error::other(format!("a message of the other bus is wrong: {what}"))
}

fn head(kind: u8, len: usize, descriptors: usize) -> [u8; HEAD] {
    let mut bytes = [0; HEAD];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4] = kind;
    // Both have been checked against limits that fit.
    bytes[8..12].copy_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
    bytes[12..].copy_from_slice(&u32::try_from(descriptors).unwrap_or(u32::MAX).to_le_bytes());
    bytes
}

/// Kind, bytes and number of descriptors.
fn parse(head: &[u8; HEAD]) -> io::Result<(u8, usize, usize)> {
    let word = |at: usize| {
        let word = head[at..].first_chunk().copied().map_or(u32::MAX, u32::from_le_bytes);
        usize::try_from(word).unwrap_or(usize::MAX)
    };
    if head[..4] != MAGIC || head[5..8] != [0; 3] {
        return Err(wrong("it does not begin like one"));
    }
    let (len, descriptors) = (word(8), word(12));
    if len > BODY_MAX || descriptors > DESCRIPTORS_MAX {
        return Err(wrong("it is too large"));
    }
    Ok((head[4], len, descriptors))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn files(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| memfd_create(c"test", MemfdFlags::CLOEXEC).unwrap()).collect()
    }

    #[test]
    fn a_frame_carries_any_number_of_descriptors_in_order() {
        let (one, other) = UnixStream::pair().unwrap();
        for count in [0, 1, 252, 253, 254, 506, 507, 600] {
            let body = vec![7; count * 1000];
            let sent = files(count);
            std::thread::scope(|scope| {
                let (one, sent, body) = (&one, &sent, &body);
                scope.spawn(move || {
                    let fds: Vec<_> = sent.iter().map(AsFd::as_fd).collect();
                    Wire::new(one.as_fd()).send(3, body, &fds, soon()).unwrap();
                });
                let frame = Wire::new(other.as_fd()).receive(soon()).unwrap().unwrap();
                assert_eq!((frame.kind, &frame.body), (3, body));
                let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
                let all = |fds: &[OwnedFd]| fds.iter().map(inode).collect::<Vec<_>>();
                assert_eq!(all(&frame.descriptors), all(sent));
            });
        }
        drop(one);
        assert!(Wire::new(other.as_fd()).receive(soon()).unwrap().is_none());
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        let good = head(1, 4, 0);
        let with = |at: usize, byte: u8| {
            let mut bytes = good;
            bytes[at] = byte;
            bytes.to_vec()
        };
        for (what, bytes) in [
            ("another beginning", with(0, b'V')),
            ("a bit without meaning", with(6, 1)),
            ("much too long", with(11, 0xff)),
            ("much too many descriptors", with(15, 0xff)),
            ("descriptors that are not there", [&with(12, 1)[..], b"body"].concat()),
            ("a head that is cut", good[..9].to_vec()),
            ("a body that is cut", [&good[..], b"bod"].concat()),
        ] {
            let (mut one, other) = UnixStream::pair().unwrap();
            one.write_all(&bytes).unwrap();
            drop(one);
            assert!(Wire::new(other.as_fd()).receive(soon()).is_err(), "{what}");
        }
    }

    /// Whoever may ask for the bus may send a descriptor whose close waits for it.
    #[test]
    fn descriptors_of_what_is_no_frame_make_nobody_wait() {
        let (one, other) = UnixStream::pair().unwrap();
        // A head that announces none, and one that announces two.
        let lingering = [0, 2].map(|count| {
            let waits = vbus_test_driver::send_lingering(&one, &head(1, 4, count));
            (&one).write_all(b"body").unwrap();
            assert!(Wire::new(other.as_fd()).receive(soon()).is_err(), "{count}");
            let rest = &mut [0; 64];
            let _ = rustix::net::recv(&other, rest, RecvFlags::DONTWAIT);
            waits
        });
        drop(lingering);
    }

    #[test]
    fn nobody_waits_for_ever() {
        let (one, other) = UnixStream::pair().unwrap();
        let at_once = Instant::now() + Duration::from_millis(20);
        let error = Wire::new(one.as_fd()).receive(at_once).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let at_once = Instant::now() + Duration::from_millis(20);
        let error = Wire::new(one.as_fd()).send(1, &vec![0; 8 << 20], &[], at_once).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(other);
    }

    /// The last word belongs to one side: what was sent before the close arrives, and afterwards
    /// nothing can be sent.
    #[test]
    fn a_close_lets_nothing_more_pass() {
        let (one, other) = UnixStream::pair().unwrap();
        let (old, new) = (Wire::new(one.as_fd()), Wire::new(other.as_fd()));
        new.send(4, b"", &[], soon()).unwrap();
        old.close();
        assert!(new.send(4, b"", &[], soon()).is_err());
        assert_eq!(old.receive(soon()).unwrap().unwrap().kind, 4);
        assert!(old.receive(soon()).unwrap().is_none());
    }
}
