//! The wire format of vfio-user 0.1: the header, every command's body, and the reply to it.
//!
//! Bodies are taken apart from byte slices with checks and put together into byte vectors; nothing
//! here does input or output, and nothing here can panic, whatever the bytes are. A body that is
//! too short, or whose counts do not fit into it, is a [`Malformed`]; whether indexes, offsets and
//! addresses make sense for the device at hand is decided in [`crate::session`].
//!
//! All integers have the byte order of the machine: both ends of a UNIX socket are on the same one.

use std::fmt;

mod irq;
mod memory;
mod region;

pub use irq::{IrqData, IrqVerb, SetIrqs};
pub use memory::{DmaAccess, DmaMap, DmaUnmap};
pub use region::{MultiWrite, RegionAccess, RegionInfo, SubRegion};

/// Bytes of the header that every message starts with.
pub const HEADER_LEN: usize = 16;

/// The protocol's major version that this crate speaks.
pub const MAJOR: u16 = 0;
/// The newest minor version of [`MAJOR`] that this crate speaks.
pub const MINOR: u16 = 1;

/// Bytes of a region access's body before its data.
pub const REGION_ACCESS_LEN: usize = 16;
/// Bytes of a DMA access's body before its data.
pub const DMA_ACCESS_LEN: usize = 16;
/// Bytes of one write in a `REGION_WRITE_MULTI` body.
pub const MULTI_WRITE_LEN: usize = 24;
/// Bytes of one sub-region in a `DEVICE_GET_REGION_IO_FDS` reply.
pub const SUB_REGION_LEN: usize = 40;

/// The command numbers, as they stand in [`Header::command`].
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

/// What a command is called in log lines.
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

/// A body that does not have the form of its command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Fewer bytes than the command's fixed part, or than its counts announce.
    #[error("body of {have} bytes where {need} are needed")]
    Short {
        /// Bytes needed.
        need: usize,
        /// Bytes there.
        have: usize,
    },
    /// More bytes than the command and its counts account for.
    #[error("body of {have} bytes where {need} are accounted for")]
    Long {
        /// Bytes accounted for.
        need: usize,
        /// Bytes there.
        have: usize,
    },
    /// An `argsz` that cannot hold the structure that it describes.
    #[error("argsz {argsz} below {need}")]
    ArgSize {
        /// Bytes needed.
        need: usize,
        /// The value found.
        argsz: u32,
    },
    /// A single write of `REGION_WRITE_MULTI` longer than its eight bytes of room.
    #[error("write of {0} bytes in an entry with room for 8")]
    MultiWrite(u32),
    /// Flags that exclude each other, or that the protocol does not know.
    #[error("flags {0:#x}")]
    Flags(u32),
}

/// Reads integers off the front of a byte slice.
#[derive(Clone, Copy)]
struct Fields<'a> {
    rest: &'a [u8],
    total: usize,
}

impl<'a> Fields<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, total: bytes.len() }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        match self.rest.split_first_chunk::<N>() {
            Some((head, rest)) => {
                self.rest = rest;
                Ok(*head)
            }
            None => {
                Err(Malformed::Short { need: self.total - self.rest.len() + N, have: self.total })
            }
        }
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.take().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.take().map(u64::from_ne_bytes)
    }

    /// All that is left, which must be `len` bytes.
    fn exactly(self, len: u64) -> Result<&'a [u8], Malformed> {
        let fixed = self.total - self.rest.len();
        let need = usize::try_from(len).unwrap_or(usize::MAX).saturating_add(fixed);
        match self.total {
            have if have < need => Err(Malformed::Short { need, have }),
            have if have > need => Err(Malformed::Long { need, have }),
            _ => Ok(self.rest),
        }
    }
}

/// Puts a body together; the counterpart of [`Fields`].
#[derive(Default)]
struct Body(Vec<u8>);

impl Body {
    fn with_capacity(bytes: usize) -> Self {
        Self(Vec::with_capacity(bytes))
    }

    fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn bytes(mut self, data: &[u8]) -> Self {
        self.0.extend_from_slice(data);
        self
    }
}

/// Whether a message asks or answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A command; `no_reply` when its sender waits for no answer.
    Command {
        /// No reply may be sent, not even one that reports an error.
        no_reply: bool,
    },
    /// The reply to an earlier command; the errno when it failed.
    Reply {
        /// `None`: done. `Some(0)`: failed without a reason given.
        error: Option<u32>,
    },
}

/// The header of a message. Message ids belong to the sender of the command and are echoed in the
/// reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Chosen by the sender of the command, echoed in the reply.
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

/// A header after which the stream cannot be followed any more: the connection has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// The size field is below the header's own size.
    #[error("message size {0} is below the size of its header")]
    Size(u32),
    /// The type bits say neither command nor reply.
    #[error("message type {0} is neither command nor reply")]
    Type(u32),
}

impl Header {
    /// Decodes the sixteen bytes. An upper bound for the size is the receiver's business.
    ///
    /// # Errors
    /// When the size or the type make it impossible to find the next message.
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

    /// Encodes the header.
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

    /// Bytes of the body that follows.
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

/// Header and body as one buffer, ready to be sent.
///
/// The size field is set from the body, which is cut off beyond 4 GiB - a length that no caller
/// reaches, since every body here is bounded by the negotiated transfer size.
#[must_use]
pub fn message(id: u16, command: u16, kind: Kind, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(HEADER_LEN + body.len()).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(size as usize);
    out.extend_from_slice(&Header { id, command, size, kind }.bytes());
    out.extend_from_slice(&body[..size as usize - HEADER_LEN]);
    out
}

/// `VERSION`, both ways: numbers, and the capabilities as a JSON text with a NUL at its end (or
/// nothing at all).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version<'a> {
    /// Must be [`MAJOR`] on both sides.
    pub major: u16,
    /// The reply's is at most the request's.
    pub minor: u16,
    /// The version data, still with its NUL, and perhaps empty.
    pub data: &'a [u8],
}

impl<'a> Version<'a> {
    /// Takes a body apart.
    ///
    /// # Errors
    /// When it is too short for the numbers.
    pub fn parse(body: &'a [u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(body);
        Ok(Self { major: f.u16()?, minor: f.u16()?, data: f.rest })
    }

    /// The body of request or reply.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        Body::with_capacity(4 + self.data.len()).u16(self.major).u16(self.minor).bytes(self.data).0
    }
}

fn check_argsz(argsz: u32, need: usize) -> Result<(), Malformed> {
    if (argsz as usize) < need { Err(Malformed::ArgSize { need, argsz }) } else { Ok(()) }
}

/// `VFIO_DEVICE_FLAGS_RESET`.
pub const DEVICE_RESETS: u32 = 1 << 0;
/// `VFIO_DEVICE_FLAGS_PCI`.
pub const DEVICE_IS_PCI: u32 = 1 << 1;

/// The four words that `DEVICE_GET_INFO`, `DEVICE_GET_IRQ_INFO` and `DEVICE_GET_REGION_IO_FDS`
/// start with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// In a request the room for the reply's body, in a reply the size of the whole body. Bytes.
    pub argsz: u32,
    /// Zero in a request.
    pub flags: u32,
    /// `DEVICE_GET_INFO`: number of regions. The others: the index asked for.
    pub index: u32,
    /// `DEVICE_GET_INFO`: number of interrupt indexes. The others: the count of what was asked for.
    pub count: u32,
}

impl Info {
    /// Bytes of the four words.
    pub const LEN: usize = 16;

    /// Takes a body apart; what follows the four words is ignored.
    ///
    /// # Errors
    /// When it is short, or says that the reply may not even have these four words.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(body);
        let info = Self { argsz: f.u32()?, flags: f.u32()?, index: f.u32()?, count: f.u32()? };
        check_argsz(info.argsz, Self::LEN)?;
        Ok(info)
    }

    /// The body.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        Body::default().u32(self.argsz).u32(self.flags).u32(self.index).u32(self.count).0
    }
}

/// `DEVICE_FEATURE`: what is asked of which feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// The feature's number.
    pub feature: u16,
    /// Give its data.
    pub get: bool,
    /// Set it from the data.
    pub set: bool,
    /// Only say whether the above would work.
    pub probe: bool,
}

impl Feature {
    /// Takes a body apart, without the feature's data.
    ///
    /// # Errors
    /// When it is short, or the flags exclude each other.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(body);
        let (argsz, flags) = (f.u32()?, f.u32()?);
        check_argsz(argsz, 8)?;
        let (get, set, probe) = (flags & 1 << 16 != 0, flags & 1 << 17 != 0, flags & 1 << 18 != 0);
        if !(probe || get != set) || flags >> 19 != 0 {
            return Err(Malformed::Flags(flags));
        }
        Ok(Self { feature: (flags & 0xffff) as u16, get, set, probe })
    }
}
