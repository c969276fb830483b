// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bytes of a journal (`spec/journal.md`): where each field is, and what a successor believes
//! of what it finds there.

use crate::socket::MESSAGE_MAX;
use crate::version::{KERNEL_MSG_FDS, MAX_MSG_FDS};

/// `vbusjrnl` in ASCII, as it lies in memory.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"vbusjrnl");
/// The version of the layout.
pub(super) const VERSION: u32 = 1;

/// Bytes of the head: one page, which is locked in memory.
pub(super) const HEAD_LEN: usize = 4096;
/// Bytes of each of the two buffers.
pub(super) const BUFFER_LEN: usize = MESSAGE_MAX.next_multiple_of(4096);
/// Where the buffer of the message that is received begins.
pub(super) const MESSAGE: usize = HEAD_LEN;
/// Where the buffer of the reply begins.
pub(super) const REPLY: usize = MESSAGE + BUFFER_LEN;
/// Bytes of the whole journal.
pub(super) const LEN: usize = REPLY + BUFFER_LEN;

/// Offsets in the head.
pub(super) mod head {
    pub(crate) const MAGIC: usize = 0;
    pub(crate) const VERSION: usize = 8;
    pub(crate) const BUFFER_LEN: usize = 12;
}

/// One of the two lines of records: what was received, and what was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    Received,
    Answered,
}

impl Line {
    /// Offset of the count of records. Its lowest bit is the number of the slot that counts.
    pub(super) const fn count(self) -> usize {
        match self {
            Line::Received => 64,
            Line::Answered => 128,
        }
    }

    /// Offset of a slot.
    pub(super) const fn slot(self, number: u64) -> usize {
        let first = match self {
            Line::Received => 256,
            Line::Answered => 512,
        };
        first + if number & 1 == 1 { slot::LEN } else { 0 }
    }
}

/// Offsets in a slot.
pub(super) mod slot {
    use std::mem::offset_of;

    pub(crate) const LEN: usize = 128;
    /// The number of the message.
    pub(crate) const MESSAGE: usize = 0;
    /// The number of the connection. 0: nobody is the client.
    pub(crate) const CLIENT: usize = 8;
    /// Bytes of the reply. Of a received message: 0.
    pub(crate) const BYTES: usize = 16;
    /// Bytes that were received, or sent, before this call.
    pub(crate) const DONE: usize = 20;
    /// Descriptors that came before this call, or that go with the reply.
    pub(crate) const FDS: usize = 24;
    /// Descriptors that come with this call. Of a reply: 0.
    pub(crate) const WITH: usize = 28;
    /// See [`flag`](super::flag).
    pub(crate) const FLAGS: usize = 32;
    /// A `struct mmsghdr`, which the system call gets.
    pub(crate) const CALL: usize = 48;
    /// What the kernel stores when the call has taken effect.
    pub(crate) const TOOK: usize = CALL + offset_of!(libc::mmsghdr, msg_len);
    /// Bytes of control data of a receipt, which the kernel stores before [`TOOK`].
    pub(crate) const CONTROL_LEN: usize = CALL + offset_of!(libc::msghdr, msg_controllen);
    /// What the kernel says of a receipt, likewise.
    pub(crate) const SAID: usize = CALL + offset_of!(libc::msghdr, msg_flags);
    /// The `struct iovec` of the call.
    pub(crate) const PART: usize = 112;
}

/// The document has these numbers for systems of 64 bits.
#[cfg(target_pointer_width = "64")]
const _: () = assert!(
    slot::TOOK == 104
        && slot::CONTROL_LEN == 88
        && slot::SAID == 96
        && slot::CALL + size_of::<libc::mmsghdr>() == slot::PART
        && slot::PART + size_of::<libc::iovec>() == slot::LEN
);

/// The flags of a slot.
pub(super) mod flag {
    /// Received: descriptors of the message are lost.
    pub(crate) const LOST: u32 = 1;
    /// Answered: the connection ends with this reply.
    pub(crate) const ENDS: u32 = 2;
    /// Answered: what the client was told is not in the state that outlasts the process.
    pub(crate) const STALE: u32 = 4;
}

/// In [`slot::TOOK`]: the call has not taken effect. No call returns it.
pub(super) const NOTHING: u32 = u32::MAX;

/// Why a journal is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the journal is wrong: {0}")]
pub(crate) struct BadJournal(pub(crate) &'static str);

/// What a slot says, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) message: u64,
    pub(super) client: u64,
    pub(super) bytes: usize,
    /// Bytes that were received, or sent, with those of the call.
    pub(super) done: usize,
    /// Descriptors, with those of the call.
    pub(super) fds: usize,
    pub(super) flags: u32,
}

/// A copy of the head of a journal, so that nobody changes it any more.
pub(super) struct Head(Box<[u8; HEAD_LEN]>);

impl Head {
    pub(super) fn new(bytes: Box<[u8; HEAD_LEN]>) -> Head {
        Head(bytes)
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.0[at..at + 4].try_into().unwrap_or_default())
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.0[at..at + 8].try_into().unwrap_or_default())
    }

    pub(super) fn count(&self, line: Line) -> u64 {
        self.u64(line.count())
    }

    /// Whether this is a journal of this layout.
    pub(super) fn check(&self) -> Result<(), BadJournal> {
        if self.u64(head::MAGIC) != MAGIC {
            return Err(BadJournal("no journal"));
        }
        if self.u32(head::VERSION) != VERSION || self.u32(head::BUFFER_LEN) as usize != BUFFER_LEN {
            return Err(BadJournal("another version"));
        }
        Ok(())
    }

    /// A slot. `number` is a count of records: the slot is that of its lowest bit.
    pub(super) fn slot(&self, line: Line, number: u64) -> Result<Slot, BadJournal> {
        let at = line.slot(number);
        let (before, took) = (self.u32(at + slot::DONE) as usize, self.u32(at + slot::TOOK));
        let took = if super::fault::is(super::fault::Fault::Sentinel) { NOTHING } else { took };
        let mut flags = self.u32(at + slot::FLAGS);
        let mut fds = self.u32(at + slot::FDS) as usize;
        let mut done = before;
        if took != NOTHING {
            done = before.saturating_add(took as usize);
            if line == Line::Received {
                let with = self.u32(at + slot::WITH) as usize;
                fds = fds.saturating_add(with);
                // Descriptors came of which nobody has a duplicate.
                let came = self.u64(at + slot::CONTROL_LEN) > 0
                    || self.u32(at + slot::SAID) & libc::MSG_CTRUNC.unsigned_abs() != 0;
                if came && with == 0 {
                    flags |= flag::LOST;
                }
            }
        }
        let bytes = self.u32(at + slot::BYTES) as usize;
        let (most, most_fds) = match line {
            Line::Received => (MESSAGE_MAX, MAX_MSG_FDS),
            Line::Answered => (bytes, KERNEL_MSG_FDS),
        };
        if bytes > MESSAGE_MAX || done > most {
            return Err(BadJournal("more bytes than a message has"));
        }
        if fds > most_fds {
            return Err(BadJournal("more descriptors than a message has"));
        }
        let (message, client) = (self.u64(at + slot::MESSAGE), self.u64(at + slot::CLIENT));
        Ok(Slot { message, client, bytes, done, fds, flags })
    }
}
