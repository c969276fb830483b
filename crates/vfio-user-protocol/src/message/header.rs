// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The header of every message, and the numbers of the commands.

use std::fmt;

/// Bytes of the header, with which every message begins.
pub const HEADER_LEN: usize = 16;

/// The numbers of the commands, for [`Header::command`].
pub mod command {
    #![allow(missing_docs)] // The names are the specification's own.
    pub const VERSION: u16 = 1;
    pub const DMA_MAP: u16 = 2;
    pub const DMA_UNMAP: u16 = 3;
    pub const DEVICE_GET_INFO: u16 = 4;
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    pub const DEVICE_GET_REGION_IO_FDS: u16 = 6;
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    pub const DEVICE_SET_IRQS: u16 = 8;
    pub const REGION_READ: u16 = 9;
    pub const REGION_WRITE: u16 = 10;
    pub const DMA_READ: u16 = 11;
    pub const DMA_WRITE: u16 = 12;
    pub const DEVICE_RESET: u16 = 13;
    pub const DIRTY_PAGES: u16 = 14;
    pub const REGION_WRITE_MULTI: u16 = 15;
    pub const DEVICE_FEATURE: u16 = 16;
    pub const MIG_DATA_READ: u16 = 17;
    pub const MIG_DATA_WRITE: u16 = 18;
}

/// The name of a command in log lines.
#[must_use]
pub fn command_name(number: u16) -> &'static str {
    match number {
        command::VERSION => "VERSION",
        command::DMA_MAP => "DMA_MAP",
        command::DMA_UNMAP => "DMA_UNMAP",
        command::DEVICE_GET_INFO => "DEVICE_GET_INFO",
        command::DEVICE_GET_REGION_INFO => "DEVICE_GET_REGION_INFO",
        command::DEVICE_GET_REGION_IO_FDS => "DEVICE_GET_REGION_IO_FDS",
        command::DEVICE_GET_IRQ_INFO => "DEVICE_GET_IRQ_INFO",
        command::DEVICE_SET_IRQS => "DEVICE_SET_IRQS",
        command::REGION_READ => "REGION_READ",
        command::REGION_WRITE => "REGION_WRITE",
        command::DMA_READ => "DMA_READ",
        command::DMA_WRITE => "DMA_WRITE",
        command::DEVICE_RESET => "DEVICE_RESET",
        command::DIRTY_PAGES => "DIRTY_PAGES",
        command::REGION_WRITE_MULTI => "REGION_WRITE_MULTI",
        command::DEVICE_FEATURE => "DEVICE_FEATURE",
        command::MIG_DATA_READ => "MIG_DATA_READ",
        command::MIG_DATA_WRITE => "MIG_DATA_WRITE",
        _ => "unknown command",
    }
}

/// The type of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A command.
    Command {
        /// The sender does not wait for a reply. The receiver must not send one, not even for an
        /// error.
        no_reply: bool,
    },
    /// The reply to an earlier command.
    Reply {
        /// `None`: the command succeeded. Otherwise the errno of its failure; 0 gives no reason.
        error: Option<u32>,
    },
}

/// The header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The sender of a command chooses it, and the reply repeats it.
    pub id: u16,
    /// One of [`command`], or a number that this crate does not know.
    pub command: u16,
    /// Bytes of the whole message, the header included.
    pub size: u32,
    /// Command or reply.
    pub kind: Kind,
}

const TYPE_MASK: u32 = 0xf;
const TYPE_COMMAND: u32 = 0;
const TYPE_REPLY: u32 = 1;
const FLAG_NO_REPLY: u32 = 0x10;
const FLAG_ERROR: u32 = 0x20;

/// The header is not valid. The next message cannot be found, so the connection has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadHeader {
    /// The size field is below the header's own size.
    #[error("message size {0} is below the size of its header")]
    Size(u32),
    /// The type is neither command nor reply.
    #[error("message type {0} is neither command nor reply")]
    Type(u32),
}

impl Header {
    /// Parses the sixteen bytes. The receiver must check the size against its own limit.
    ///
    /// # Errors
    /// The size or the type is not valid.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, BadHeader> {
        let [i0, i1, c0, c1, s0, s1, s2, s3, f0, f1, f2, f3, e0, e1, e2, e3] = *bytes;
        let size = u32::from_ne_bytes([s0, s1, s2, s3]);
        let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
        let errno = u32::from_ne_bytes([e0, e1, e2, e3]);
        if (size as usize) < HEADER_LEN {
            return Err(BadHeader::Size(size));
        }
        let kind = match flags & TYPE_MASK {
            TYPE_COMMAND => Kind::Command { no_reply: flags & FLAG_NO_REPLY != 0 },
            TYPE_REPLY => Kind::Reply { error: (flags & FLAG_ERROR != 0).then_some(errno) },
            other => return Err(BadHeader::Type(other)),
        };
        Ok(Self {
            id: u16::from_ne_bytes([i0, i1]),
            command: u16::from_ne_bytes([c0, c1]),
            size,
            kind,
        })
    }

    /// Returns the bytes of the header.
    #[must_use]
    pub fn bytes(&self) -> [u8; HEADER_LEN] {
        let (flags, errno) = match self.kind {
            Kind::Command { no_reply: false } => (TYPE_COMMAND, 0),
            Kind::Command { no_reply: true } => (TYPE_COMMAND | FLAG_NO_REPLY, 0),
            Kind::Reply { error: None } => (TYPE_REPLY, 0),
            Kind::Reply { error: Some(errno) } => (TYPE_REPLY | FLAG_ERROR, errno),
        };
        let mut out = [0; HEADER_LEN];
        out[0..2].copy_from_slice(&self.id.to_ne_bytes());
        out[2..4].copy_from_slice(&self.command.to_ne_bytes());
        out[4..8].copy_from_slice(&self.size.to_ne_bytes());
        out[8..12].copy_from_slice(&flags.to_ne_bytes());
        out[12..16].copy_from_slice(&errno.to_ne_bytes());
        out
    }

    /// Bytes of the body.
    #[must_use]
    pub fn body_len(&self) -> usize {
        (self.size as usize).saturating_sub(HEADER_LEN)
    }
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} ({}), id {}, {} bytes",
            command_name(self.command),
            self.command,
            self.id,
            self.size
        )
    }
}

/// Returns header and body in one buffer.
///
/// Sets the size field from the body. It cuts off a body beyond 4 GiB. No caller has such a body,
/// because the negotiated transfer size limits it.
#[must_use]
pub fn message(id: u16, command: u16, kind: Kind, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(HEADER_LEN + body.len()).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(size as usize);
    out.extend_from_slice(&Header { id, command, size, kind }.bytes());
    out.extend_from_slice(&body[..size as usize - HEADER_LEN]);
    out
}
