// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A socket whose bytes go through the journal.
#![allow(unsafe_code)] // Descriptors come from the kernel as numbers.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use super::Journal;
use super::fault::{self, Fault};
use super::layout::{Line, MESSAGE};
use super::memory::Call;
use crate::message::{HEADER_LEN, Header, command};
use crate::socket::{MESSAGE_MAX, Sink, Source};
use crate::version::{KERNEL_MSG_FDS, MAX_MSG_FDS};

/// The most bytes of a body that are peeked at a time. All messages with descriptors are shorter.
const PEEK_MAX: usize = 4096;

/// Bytes of the head of a control message.
const CONTROL_HEAD: usize = 16;
/// Bytes of a control message with as many descriptors as there can be.
const CONTROL_LEN: usize = (CONTROL_HEAD + 4 * KERNEL_MSG_FDS).next_multiple_of(8);

/// Room for a control message.
#[repr(align(8))]
struct Control([u8; CONTROL_LEN]);

impl Control {
    fn empty() -> Control {
        Control([0; CONTROL_LEN])
    }

    /// The control message for these descriptors, and its length.
    fn rights(fds: &[OwnedFd]) -> Result<(Control, usize), Errno> {
        let mut control = Control::empty();
        if fds.is_empty() {
            return Ok((control, 0));
        }
        let len = CONTROL_HEAD + 4 * fds.len();
        let padded = len.next_multiple_of(8);
        if padded > CONTROL_LEN {
            return Err(Errno::TOOMANYREFS);
        }
        control.0[..8].copy_from_slice(&(len as u64).to_ne_bytes());
        control.0[8..12].copy_from_slice(&libc::SOL_SOCKET.to_ne_bytes());
        control.0[12..16].copy_from_slice(&libc::SCM_RIGHTS.to_ne_bytes());
        for (place, fd) in control.0[CONTROL_HEAD..].chunks_exact_mut(4).zip(fds) {
            place.copy_from_slice(&fd.as_raw_fd().to_ne_bytes());
        }
        Ok((control, padded))
    }

    /// Appends the descriptors that the kernel has put here. What it has not written is zero.
    fn take(self, fds: &mut Vec<OwnedFd>) {
        let mut rest = &self.0[..];
        while let Some((head, _)) = rest.split_at_checked(CONTROL_HEAD) {
            let word =
                |at: usize| i32::from_ne_bytes(head[at..at + 4].try_into().unwrap_or_default());
            let len = u64::from_ne_bytes(head[..8].try_into().unwrap_or_default());
            let Ok(len) = usize::try_from(len) else { return };
            let Some(data) = rest.get(CONTROL_HEAD..len) else { return };
            if (word(8), word(12)) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                for number in data.chunks_exact(4) {
                    let number = i32::from_ne_bytes(number.try_into().unwrap_or_default());
                    // SAFETY: the kernel has just made this descriptor for this process. The
                    // buffer is not shared, and was zero before the call.
                    fds.push(unsafe { OwnedFd::from_raw_fd(number) });
                }
            }
            rest = rest.get(len.next_multiple_of(8)..).unwrap_or_default();
        }
    }
}

/// Whether messages of this kind can have descriptors that are used.
fn may_have_fds(header: &Header) -> bool {
    matches!(header.command, command::DMA_MAP | command::DEVICE_SET_IRQS)
}

/// Somebody who keeps duplicates of all descriptors of a message, by its number.
pub(crate) type Hold<'a> = dyn FnMut(u64, &[BorrowedFd<'_>]) -> Result<(), Errno> + 'a;

/// A socket as a [`Source`], with a journal of what was received.
pub(crate) struct JournalSource<'a> {
    journal: &'a mut Journal,
    socket: BorrowedFd<'a>,
    max_size: usize,
    hold: &'a mut Hold<'a>,
    lost_fds: bool,
}

/// What a look at the socket has shown.
struct Peeked {
    bytes: usize,
    fds: Vec<OwnedFd>,
    lost: bool,
}

impl<'a> JournalSource<'a> {
    /// `max_size` is the longest message that is received, in bytes. `hold` gets the descriptors of
    /// a message before it is.
    pub(crate) fn new(
        journal: &'a mut Journal,
        socket: BorrowedFd<'a>,
        max_size: usize,
        hold: &'a mut Hold<'a>,
    ) -> JournalSource<'a> {
        JournalSource { journal, socket, max_size, hold, lost_fds: false }
    }

    /// Looks at the next bytes, and at the descriptors that come with them.
    fn peek(&self, bytes: &mut [u8]) -> Result<Peeked, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_MSG_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut parts = [IoSliceMut::new(bytes)];
        let seen = retry_on_intr(|| recvmsg(self.socket, &mut parts, &mut ancillary, flags))?;
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let lost = seen.flags.contains(ReturnFlags::CTRUNC);
        Ok(Peeked { bytes: seen.bytes, fds, lost })
    }

    /// Receives the bytes that were peeked. Their descriptors are held before. `fds` are those of
    /// the message so far.
    fn receive_peeked(&mut self, peeked: Peeked, fds: &mut Vec<OwnedFd>) -> Result<(), Errno> {
        let Peeked { bytes, fds: new, lost } = peeked;
        let mut with = new.len();
        self.lost_fds |= lost;
        fds.extend(new);
        if fds.len() > MAX_MSG_FDS {
            // The receiver ends the connection. Nobody has to keep them, nor to receive the bytes.
            return Err(Errno::TOOMANYREFS);
        }
        if with > 0 && !fault::is(Fault::LateHold) && self.hold(fds).is_err() {
            (self.lost_fds, with) = (true, 0);
        }
        self.journal.lost |= self.lost_fds;
        // The kernel drops its own duplicates. They are not the last ones, so it closes nothing.
        let took = self.receive(bytes, with, &mut [])?;
        if fault::is(Fault::LateHold) && with > 0 {
            let _ = self.hold(fds);
        }
        // The receipt is that of the same bytes. Out-of-band bytes of a client that breaks the
        // protocol can make it shorter.
        if took > bytes { Err(Errno::PROTO) } else { Ok(()) }
    }

    /// Gives away duplicates of all descriptors of the message.
    fn hold(&mut self, fds: &[OwnedFd]) -> Result<(), Errno> {
        let all: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        fault::step();
        let held = (self.hold)(self.journal.number.wrapping_add(1), &all);
        fault::step();
        held
    }

    /// Receives at most `len` bytes into the journal.
    fn receive(&mut self, len: usize, with: usize, control: &mut [u8]) -> Result<usize, Errno> {
        let journal = &mut *self.journal;
        journal.expect(len, with);
        let call = Call { line: Line::Received, number: journal.received, control };
        let took = journal.memory.call(self.socket, call)?.min(len);
        journal.have += took;
        journal.fds += with;
        Ok(took)
    }

    /// Receives the rest of a message whose kind has no descriptors. Those that come nevertheless
    /// are appended.
    fn receive_rest(&mut self, len: usize, fds: &mut Vec<OwnedFd>) -> Result<usize, Errno> {
        let mut control = Control::empty();
        let took = self.receive(len, 0, &mut control.0)?;
        let before = fds.len();
        control.take(fds);
        // The kernel had no room for them in this process, or nobody holds them.
        let said = self.journal.memory.said(self.journal.received);
        self.lost_fds |= said & libc::MSG_CTRUNC.unsigned_abs() != 0;
        self.journal.lost |= self.lost_fds || fds.len() > before;
        Ok(took)
    }

    /// Receives more of the message. Returns 0 at the end of the stream.
    fn more(&mut self, fds: &mut Vec<OwnedFd>) -> Result<usize, Errno> {
        let have = self.journal.have;
        if have < HEADER_LEN {
            let mut head = [0; HEADER_LEN];
            self.journal.memory.read(MESSAGE, &mut head[..have]);
            let peeked = self.peek(&mut head[have..])?;
            if peeked.bytes == 0 {
                return Ok(0);
            }
            let is_whole = have + peeked.bytes == HEADER_LEN;
            let header = if is_whole { Header::parse(&head).ok() } else { None };
            let whole = header
                .filter(|header| !may_have_fds(header) && header.size as usize <= self.max_size)
                .filter(|_| peeked.fds.is_empty() && !peeked.lost);
            return match whole {
                Some(header) => self.receive_rest(header.size as usize - have, fds),
                None => self.receive_peeked(peeked, fds).map(|()| self.journal.have - have),
            };
        }
        let Some(header) = self.journal.header() else { return Err(Errno::PROTO) };
        let rest = (header.size as usize).min(self.max_size).saturating_sub(have);
        if rest == 0 {
            return Err(Errno::PROTO);
        }
        if !may_have_fds(&header) {
            return self.receive_rest(rest, fds);
        }
        let peeked = self.peek(&mut vec![0; rest.min(PEEK_MAX)])?;
        match peeked.bytes {
            0 => Ok(0),
            _ => self.receive_peeked(peeked, fds).map(|()| self.journal.have - have),
        }
    }
}

impl Source for JournalSource<'_> {
    fn recv(&mut self, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, Errno> {
        debug_assert!(self.max_size <= MESSAGE_MAX);
        self.lost_fds = false;
        if self.journal.given == self.journal.have && self.more(fds)? == 0 {
            return Ok(0);
        }
        let journal = &mut *self.journal;
        let len = buf.len().min(journal.have - journal.given);
        journal.memory.read(MESSAGE + journal.given, &mut buf[..len]);
        journal.given += len;
        Ok(len)
    }

    fn lost_fds(&self) -> bool {
        self.lost_fds
    }
}

/// A socket as a [`Sink`] of the reply that is in the journal.
pub(crate) struct JournalSink<'a> {
    pub(crate) journal: &'a mut Journal,
    pub(crate) socket: BorrowedFd<'a>,
}

impl Sink for JournalSink<'_> {
    /// The bytes are those of the journal.
    fn send(&mut self, bytes: &[u8], fds: &[OwnedFd]) -> Result<usize, Errno> {
        let journal = &mut *self.journal;
        debug_assert_eq!(bytes.len(), journal.reply - journal.sent);
        if journal.is_spent() {
            let next = journal.answered.wrapping_add(1);
            journal.write_answer(next);
            journal.answered = next;
            journal.memory.count(Line::Answered, next);
        }
        let (mut control, len) = Control::rights(fds)?;
        let call =
            Call { line: Line::Answered, number: journal.answered, control: &mut control.0[..len] };
        let took = journal.memory.call(self.socket, call)?.min(bytes.len());
        journal.sent += took;
        Ok(took)
    }
}
