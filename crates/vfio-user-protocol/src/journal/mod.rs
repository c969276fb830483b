// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a server has received and sent, in memory that outlives its process: after a kill at any
//! instruction, the next server loses no message and no reply, and sends no reply twice.
//!
//! # Why this is exact
//! A process that gets `SIGKILL` runs no more instructions of its own, but the system call in which
//! it is runs to its end: the kernel acts on the signal at the return to user mode. So a store that
//! the kernel makes *within* the call is made if, and only if, the call has taken effect. The calls
//! `recvmmsg` and `sendmmsg` make such a store: each message header has a field `msg_len`, and the
//! kernel stores the number of bytes there after the message was received or sent (Linux,
//! `net/socket.c`, `do_recvmmsg` and `__sys_sendmmsg`: `put_user(err, &entry->msg_len)`). The
//! header lies in the journal. Before the call, `msg_len` has a value that no call returns.
//!
//! - Both calls have `MSG_DONTWAIT`, so they never sleep for a peer, and no signal cuts them short.
//!   If a call fails (`EAGAIN`, `EINTR`, `EFAULT`), it has taken no byte and made no store. A call
//!   that failed after a part was done returns the bytes of that part, as `msg_len`.
//! - The store itself must not fail. Its page is locked (mlock(2)), so it needs no memory and no
//!   disk. A page fault in a process that is being killed can fail. The *data* may meet that: then
//!   the kernel gives back fewer bytes or `EFAULT`, and has taken no more than it says.
//! - Only one thread at a time has the server. So its stores have one order, and a kill leaves a
//!   beginning of it. The compiler keeps this order because each record counts by one `Release`
//!   store (`Memory::count`). The processor keeps it because an interrupt is precise: all
//!   instructions before it are done, none after it has begun. The end of the process, which the
//!   successor waits for, orders all that before the successor's loads.
//!
//! # Descriptors
//! Descriptors that are received belong to the process, and die with it. So the server looks before
//! it takes: `MSG_PEEK` gives duplicates, and leaves bytes and descriptors in the socket. The
//! target gives the duplicates to somebody who outlives the process ([`Target::hold`]). Only then
//! the bytes are received, exactly as many as were peeked. The kernel gives the descriptors of one
//! `sendmsg` with its first byte, and a receipt ends behind the first bytes that have some. So a
//! receipt of as many bytes as were peeked has the same descriptors.
//!
//! The head of each message is peeked: this tells its kind and its length. A message whose kind has
//! no descriptors is then received in one call with its body. So a message costs as many system
//! calls as without a journal. Its descriptors, if a client sends some nevertheless, are received
//! and closed; that some came is in the journal.
//!
//! # Life of a message
//! Messages have numbers, counted over all clients. The beginning and the end of a client have
//! numbers, too.
//! 1. *Received*: its bytes are in the journal, in one or several receipts.
//! 2. *Carried out*: the target has done it, in this process.
//! 3. *Prepared*: the reply is in the journal. It does not count yet.
//! 4. *Committed*: the target has given its state away ([`Target::commit`]), with the number of the
//!    message. Omitted, if there is nothing new in the state.
//! 5. *Answered*: one store makes the prepared reply count.
//! 6. *Sent*, in one or several calls.
//!
//! | the process ends | the next server |
//! |---|---|
//! | before 4, or before 5 if nothing was committed | carries the message out, on the state before it |
//! | between 4 and 5 | finds the state of the message: takes the prepared reply for the last one |
//! | after 5 | sends what is not sent |
//!
//! So what a target does in step 2 must be something that can be done again from the former state.
//! An interrupt, or a doorbell, twice is harmless. A register that changes when it is read is, too,
//! if its value is part of the state that is committed.
//!
//! Descriptors of a reply (`DEVICE_GET_REGION_IO_FDS`) are in no memory: if no byte of the reply
//! was sent, the message is carried out again for them alone.
//!
//! The layout is in `spec/journal.md`.

mod fault;
mod layout;
mod memory;
#[cfg(test)]
mod tests;
mod transfer;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use layout::{BadJournal, Line, MESSAGE, NOTHING, REPLY, Slot, flag, slot};
use memory::{Former, Memory};

pub(crate) use transfer::{JournalSink, JournalSource};

use crate::message::{HEADER_LEN, Header};
use crate::socket::MESSAGE_MAX;
use crate::state::{BadState, COUNT_MAX};
#[cfg(doc)]
use crate::target::Target;

/// Makes an empty journal: memory of about 2 MiB, of which the system uses what messages have
/// touched. The descriptor belongs to somebody who outlives the server.
///
/// # Errors
/// The system refuses.
pub fn create() -> io::Result<OwnedFd> {
    Ok(memory::create()?)
}

/// What is left of a message or of a reply that the last process had to do with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// The number of the last message that was answered.
    pub(crate) answered: u64,
    /// The number of the client's connection. 0: there is none.
    pub(crate) client: u64,
    /// The part of the next message that was received.
    pub(crate) received: Vec<u8>,
    /// The number of its descriptors.
    pub(crate) received_fds: usize,
    /// Other descriptors of it are lost.
    pub(crate) lost: bool,
    /// What remains to be sent of the reply to the last message.
    pub(crate) unsent: Vec<u8>,
    /// The descriptors that go with it are to be made again, from this message.
    pub(crate) again: Option<(Vec<u8>, usize)>,
    /// The connection ends with the reply.
    pub(crate) ends: bool,
    /// What the client was told is not in the state: it was moving the device to another server, or
    /// a commit failed.
    pub(crate) stale: bool,
}

/// The journal of a server. It mirrors what it has last stored.
#[derive(Debug)]
pub(crate) struct Journal {
    memory: Memory,
    /// Counts of records.
    received: u64,
    answered: u64,
    /// The number of the last message that was answered.
    number: u64,
    client: u64,
    /// Bytes of the message under way that are in the journal.
    have: usize,
    /// How many of them the receiver has been given.
    given: usize,
    fds: usize,
    lost: bool,
    /// Bytes of the reply, and how many are sent.
    reply: usize,
    sent: usize,
    reply_fds: usize,
    flags: u32,
}

/// What the former process left in its journal, of which `committed` is the number of the last
/// message whose effects are in the state of the target, and `client` the number of the connection
/// of that state, or 0.
///
/// Whoever had that process may still write to the file. So this takes copies, and changes nothing:
/// another process may still go on from the same journal.
///
/// # Errors
/// The file is no journal, or its contents are not possible.
pub(crate) fn read(file: &OwnedFd, committed: u64, client: u64) -> Result<Found, BadState> {
    let former = Former::new(file)?;
    let head = former.head()?;
    head.check()?;
    let answered = head.count(Line::Answered);
    let mut last = head.slot(Line::Answered, answered)?;
    if committed.checked_sub(last.message) == Some(1) {
        // The prepared reply is that of this commit.
        last = head.slot(Line::Answered, answered.wrapping_add(1))?;
        if last.message != committed {
            return Err(BadJournal("a reply that was prepared is missing").into());
        }
    }
    if committed > last.message {
        return Err(BadJournal("it is older than the state").into());
    }
    if last.message > COUNT_MAX {
        return Err(BadJournal("more messages than there can be").into());
    }
    if last.client != client {
        return Err(BadJournal("another client than that of the state").into());
    }
    let arrived = head.slot(Line::Received, head.count(Line::Received))?;
    find(&former, last, arrived)
}

/// Marks the journal of a former process, so that whoever goes on from it knows that its client has
/// been told more.
///
/// # Errors
/// The file is no journal.
pub(crate) fn forsake(file: &OwnedFd) -> Result<(), Errno> {
    let former = Former::new(file)?;
    // The slot that counts, and the other one, which counts if it was prepared.
    [0, 1].into_iter().try_for_each(|number| {
        let at = Line::Answered.slot(number) + slot::FLAGS;
        former.set_u32(at, flag::STALE)
    })
}

fn find(former: &Former<'_>, last: Slot, arrived: Slot) -> Result<Found, BadState> {
    let is_next = last.message.checked_add(1) == Some(arrived.message);
    let is_here = last.client > 0 && arrived.client == last.client;
    let begun = is_here && is_next;
    let sent = last.done >= last.bytes;
    if begun && !sent {
        return Err(BadJournal("a message after one whose reply is not sent").into());
    }
    let is_left = last.client > 0 && !sent;
    // Its descriptors would have gone with the first byte.
    let again = (is_left && last.fds > 0 && last.done == 0).then_some(last.fds);
    let again = match again {
        None => None,
        Some(_) if !is_here || arrived.message != last.message => {
            return Err(BadJournal("a reply with descriptors without its message").into());
        }
        Some(fds) => Some((former.bytes(MESSAGE, arrived.done)?, fds)),
    };
    let (from, rest) = if is_left { (last.done, last.bytes - last.done) } else { (0, 0) };
    Ok(Found {
        answered: last.message,
        client: last.client,
        received: former.bytes(MESSAGE, if begun { arrived.done } else { 0 })?,
        received_fds: if begun { arrived.fds } else { 0 },
        lost: begun && arrived.flags & flag::LOST != 0,
        unsent: former.bytes(REPLY + from, rest)?,
        again,
        ends: last.client > 0 && last.flags & flag::ENDS != 0,
        stale: last.client > 0 && last.flags & flag::STALE != 0,
    })
}

impl Journal {
    /// Takes a journal that [`create`] has made and nobody has used.
    ///
    /// # Errors
    /// The file is no such journal, or the system refuses.
    pub(crate) fn open(file: OwnedFd) -> Result<Journal, BadState> {
        if read(&file, 0, 0)?.answered > 0 {
            return Err(BadJournal("somebody has used it").into());
        }
        Ok(Journal::new(Memory::map(file)?))
    }

    fn new(memory: Memory) -> Journal {
        Journal {
            memory,
            received: 0,
            answered: 0,
            number: 0,
            client: 0,
            have: 0,
            given: 0,
            fds: 0,
            lost: false,
            reply: 0,
            sent: 0,
            reply_fds: 0,
            flags: 0,
        }
    }

    /// A journal in memory of this process, which says the same as that of the former one, with the
    /// same numbers. Nobody else has that memory.
    ///
    /// # Errors
    /// The system refuses.
    pub(crate) fn follow(found: &Found) -> Result<Journal, BadState> {
        let mut journal = Journal::new(Memory::map(memory::create()?)?);
        journal.client = found.client;
        if let Some((message, _)) = &found.again {
            // It is received, and answered, but for the descriptors.
            journal.number = found.answered.wrapping_sub(1);
            journal.adopt(message, 0, false);
            (journal.have, journal.given) = (0, 0);
        }
        journal.number = found.answered;
        journal.flags = if found.ends { flag::ENDS } else { 0 };
        journal.flags |= if found.stale { flag::STALE } else { 0 };
        journal.reply = found.unsent.len();
        journal.reply_fds = found.again.as_ref().map_or(0, |(_, fds)| *fds);
        journal.memory.write(REPLY, &found.unsent);
        journal.answered = 1;
        journal.write_answer(journal.answered);
        journal.memory.count(Line::Answered, journal.answered);
        if !found.received.is_empty() {
            journal.adopt(&found.received, found.received_fds, found.lost);
        }
        Ok(journal)
    }

    /// The number of the last message that was answered.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// A duplicate of the journal's descriptor.
    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.memory.as_fd().try_clone_to_owned()
    }

    /// The reply to the next message is complete, and nothing else of it remains to be done:
    /// prepares the answer. `client` is the connection, `fds` the number of descriptors that go
    /// with the reply.
    pub(crate) fn prepare(&mut self, client: u64, answer: Prepared<'_>) {
        let Prepared { reply, fds, ends } = answer;
        if fault::is(fault::Fault::EarlyReply) {
            self.memory.count(Line::Answered, self.answered);
        }
        let next = self.answered.wrapping_add(1);
        if fault::is(fault::Fault::EarlyCount) {
            self.memory.count(Line::Answered, next);
        }
        self.memory.write(REPLY, reply);
        self.number = self.number.wrapping_add(1);
        self.client = client;
        self.flags = if ends { flag::ENDS } else { 0 };
        (self.reply, self.sent, self.reply_fds) = (reply.len(), 0, fds);
        self.write_answer(next);
        if fault::is(fault::Fault::EarlyAnswer) {
            self.memory.count(Line::Answered, next);
        }
    }

    /// Makes the prepared answer count. `stale`: nobody could be given the state that belongs to
    /// it.
    pub(crate) fn answer(&mut self, stale: bool) {
        self.answered = self.answered.wrapping_add(1);
        if stale {
            self.flags |= flag::STALE;
            let at = Line::Answered.slot(self.answered);
            self.memory.set_u32(at + slot::FLAGS, self.flags);
        }
        if !fault::is(fault::Fault::EarlyReply) {
            self.memory.count(Line::Answered, self.answered);
        }
        (self.have, self.given, self.fds, self.lost) = (0, 0, 0, false);
    }

    /// Nobody could be given the state that belongs to the last answer, and now somebody was.
    pub(crate) fn catch_up(&mut self) {
        if self.flags & flag::STALE == 0 {
            return;
        }
        self.flags &= !flag::STALE;
        let next = self.answered.wrapping_add(1);
        self.write_answer(next);
        self.answered = next;
        self.memory.count(Line::Answered, next);
    }

    /// Writes a slot for the rest of the reply.
    fn write_answer(&self, number: u64) {
        let memory = &self.memory;
        let at = Line::Answered.slot(number);
        memory.prepare(Line::Answered, number, REPLY + self.sent, self.reply - self.sent);
        memory.set_u32(at + slot::DONE, word(self.sent));
        memory.set_u32(at + slot::BYTES, word(self.reply));
        memory.set_u32(at + slot::FDS, word(self.reply_fds));
        memory.set_u32(at + slot::FLAGS, self.flags);
        memory.set_u64(at + slot::CLIENT, self.client);
        memory.set_u64(at + slot::MESSAGE, self.number);
    }

    /// Writes a slot for the next receipt, of at most `len` bytes, with `with` descriptors that
    /// somebody holds, and makes it count.
    fn expect(&mut self, len: usize, with: usize) {
        let next = self.received.wrapping_add(1);
        let at = Line::Received.slot(next);
        let memory = &self.memory;
        if fault::is(fault::Fault::EarlyCount) {
            memory.count(Line::Received, next);
        }
        memory.prepare(Line::Received, next, MESSAGE + self.have, len);
        memory.set_u32(at + slot::DONE, word(self.have));
        memory.set_u32(at + slot::FDS, word(self.fds));
        memory.set_u32(at + slot::WITH, word(with));
        memory.set_u32(at + slot::FLAGS, if self.lost { flag::LOST } else { 0 });
        memory.set_u64(at + slot::CLIENT, self.client);
        memory.set_u64(at + slot::MESSAGE, self.number.wrapping_add(1));
        memory.count(Line::Received, next);
        self.received = next;
    }

    /// The header of the message under way, if it is there.
    fn header(&self) -> Option<Header> {
        let mut head = [0; HEADER_LEN];
        self.memory.read(MESSAGE, &mut head);
        if self.have < HEADER_LEN { None } else { Header::parse(&head).ok() }
    }

    /// Notes a message, or a part of one, that came before the journal was there, and `fds`
    /// descriptors of it, which somebody holds.
    pub(crate) fn adopt(&mut self, received: &[u8], fds: usize, lost: bool) {
        self.memory.write(MESSAGE, received);
        (self.have, self.given) = (received.len(), received.len());
        (self.fds, self.lost) = (fds, lost);
        self.expect(0, 0);
    }

    /// Whether the slot of the answer cannot be used for another call: the kernel has taken a part
    /// of the reply since it was written.
    fn is_spent(&self) -> bool {
        self.memory.took(Line::Answered, self.answered) != NOTHING
    }
}

/// The answer to a message.
#[derive(Clone, Copy, Default)]
pub(crate) struct Prepared<'a> {
    /// The reply. Empty: there is none.
    pub(crate) reply: &'a [u8],
    /// The number of its descriptors.
    pub(crate) fds: usize,
    /// The connection ends with it.
    pub(crate) ends: bool,
}

/// A length within a message.
fn word(len: usize) -> u32 {
    debug_assert!(len <= MESSAGE_MAX);
    u32::try_from(len).unwrap_or(u32::MAX)
}

impl From<BadJournal> for BadState {
    fn from(BadJournal(what): BadJournal) -> BadState {
        BadState::Journal(what)
    }
}

impl AsFd for Journal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}
