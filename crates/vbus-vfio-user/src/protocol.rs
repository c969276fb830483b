//! The wire format of vfio-user 0.1: the header, every command's body, and the reply to it.
//!
//! Bodies are taken apart from byte slices with checks and put together into byte vectors; nothing here does
//! input or output, and nothing here can panic, whatever the bytes are. A body that is too short, or whose
//! counts do not fit into it, is a [`Malformed`]; whether indexes, offsets and addresses make sense for the
//! device at hand is decided in [`crate::session`].
//!
//! All integers have the byte order of the machine: both ends of a UNIX socket are on the same one.

use std::fmt;

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
            None => Err(Malformed::Short { need: self.total - self.rest.len() + N, have: self.total }),
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

/// The header of a message. Message ids belong to the sender of the command and are echoed in the reply.
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
        Ok(Self { id: u16::from_ne_bytes([i0, i1]), command: u16::from_ne_bytes([c0, c1]), size, kind })
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
        write!(f, "{} ({}), id {}, {} bytes", command_name(self.command), self.command, self.id, self.size)
    }
}

/// Header and body as one buffer, ready to be sent.
///
/// The size field is set from the body, which is cut off beyond 4 GiB - a length that no caller reaches, since
/// every body here is bounded by the negotiated transfer size.
#[must_use]
pub fn message(id: u16, command: u16, kind: Kind, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(HEADER_LEN + body.len()).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(size as usize);
    out.extend_from_slice(&Header { id, command, size, kind }.bytes());
    out.extend_from_slice(&body[..size as usize - HEADER_LEN]);
    out
}

/// `VERSION`, both ways: numbers, and the capabilities as a JSON text with a NUL at its end (or nothing at all).
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

/// `DMA_MAP`: memory that the device may use from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// The device may read it.
    pub readable: bool,
    /// The device may write it.
    pub writable: bool,
    /// Where it starts in the descriptor that came along, in bytes.
    pub offset: u64,
    /// Its address as the device knows it.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

impl DmaMap {
    const LEN: usize = 32;

    /// Takes a body apart.
    ///
    /// # Errors
    /// When it is short, or has flags beyond readable and writable.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(body);
        let (argsz, flags) = (f.u32()?, f.u32()?);
        let map = Self {
            readable: flags & 1 != 0,
            writable: flags & 2 != 0,
            offset: f.u64()?,
            address: f.u64()?,
            size: f.u64()?,
        };
        check_argsz(argsz, Self::LEN)?;
        if flags & !3 != 0 {
            return Err(Malformed::Flags(flags));
        }
        Ok(map)
    }

    /// The body of the request. The reply has none.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        let flags = u32::from(self.readable) | u32::from(self.writable) << 1;
        Body::default().u32(32).u32(flags).u64(self.offset).u64(self.address).u64(self.size).0
    }
}

/// `DMA_UNMAP`: memory that the device must not touch any more. The reply repeats the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaUnmap {
    /// Unmap everything; address and size are then zero.
    pub all: bool,
    /// Asks for the bitmap of dirty pages, which needs migration.
    pub dirty_bitmap: bool,
    /// Address of a mapping.
    pub address: u64,
    /// Its size in bytes.
    pub size: u64,
}

impl DmaUnmap {
    const LEN: usize = 24;

    /// Takes a body apart (request or reply).
    ///
    /// # Errors
    /// When it is short, or has flags that the protocol does not know.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(body);
        let (argsz, flags) = (f.u32()?, f.u32()?);
        let unmap = Self { dirty_bitmap: flags & 1 != 0, all: flags & 2 != 0, address: f.u64()?, size: f.u64()? };
        check_argsz(argsz, Self::LEN)?;
        if flags & !3 != 0 {
            return Err(Malformed::Flags(flags));
        }
        Ok(unmap)
    }

    /// The body of request and reply.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        let flags = u32::from(self.dirty_bitmap) | u32::from(self.all) << 1;
        Body::default().u32(24).u32(flags).u64(self.address).u64(self.size).0
    }
}

fn check_argsz(argsz: u32, need: usize) -> Result<(), Malformed> {
    if (argsz as usize) < need { Err(Malformed::ArgSize { need, argsz }) } else { Ok(()) }
}

/// `VFIO_DEVICE_FLAGS_RESET`.
pub const DEVICE_RESETS: u32 = 1 << 0;
/// `VFIO_DEVICE_FLAGS_PCI`.
pub const DEVICE_IS_PCI: u32 = 1 << 1;

/// The four words that `DEVICE_GET_INFO`, `DEVICE_GET_IRQ_INFO` and `DEVICE_GET_REGION_IO_FDS` start with.
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

/// `DEVICE_GET_REGION_INFO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// In a request the room for the reply's body, in a reply the size of the whole body. Bytes.
    pub argsz: u32,
    /// `VFIO_REGION_INFO_FLAG_*`; zero in a request.
    pub flags: u32,
    /// The region.
    pub index: u32,
    /// Its size in bytes; zero in a request.
    pub size: u64,
}

impl RegionInfo {
    const LEN: usize = 32;

    /// Takes a body apart (request or reply).
    ///
    /// # Errors
    /// When it is short, or leaves no room for the reply.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(body);
        let (argsz, flags, index) = (f.u32()?, f.u32()?, f.u32()?);
        let (_cap_offset, size, _offset) = (f.u32()?, f.u64()?, f.u64()?);
        check_argsz(argsz, Self::LEN)?;
        Ok(Self { argsz, flags, index, size })
    }

    /// The body. No region here can be mapped, so capabilities and file offset are always zero.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        Body::default().u32(self.argsz).u32(self.flags).u32(self.index).u32(0).u64(self.size).u64(0).0
    }
}

/// One eventfd that stands for writes to a part of a region (`DEVICE_GET_REGION_IO_FDS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubRegion {
    /// Offset in the region, bytes.
    pub offset: u64,
    /// Size of the accesses that it stands for, bytes; 0: any.
    pub size: u64,
    /// Which of the descriptors that came along.
    pub fd_index: u32,
    /// 0 for an ioeventfd, the only type used here.
    pub kind: u32,
    /// `KVM_IOEVENTFD_FLAG_*`.
    pub flags: u32,
    /// The value that must be written, when the flags say so.
    pub datamatch: u64,
}

impl SubRegion {
    /// Appends the sub-region to a body that [`Info::body`] began.
    pub fn append_to(&self, body: &mut Vec<u8>) {
        let entry = Body::default().u64(self.offset).u64(self.size).u32(self.fd_index).u32(self.kind);
        body.extend_from_slice(&entry.u32(self.flags).u32(0).u64(self.datamatch).0);
    }

    /// The sub-regions of a reply's body.
    ///
    /// # Errors
    /// When the count does not fit into the body.
    pub fn parse_all(body: &[u8]) -> Result<Vec<Self>, Malformed> {
        let info = Info::parse(body)?;
        let have = (body.len() - Info::LEN) / SUB_REGION_LEN;
        if (info.count as usize) > have {
            let need = (info.count as usize).saturating_mul(SUB_REGION_LEN).saturating_add(Info::LEN);
            return Err(Malformed::Short { need, have: body.len() });
        }
        let mut f = Fields::new(&body[Info::LEN..]);
        (0..info.count)
            .map(|_| {
                let (offset, size, fd_index, kind) = (f.u64()?, f.u64()?, f.u32()?, f.u32()?);
                let (flags, _padding, datamatch) = (f.u32()?, f.u32()?, f.u64()?);
                Ok(Self { offset, size, fd_index, kind, flags, datamatch })
            })
            .collect()
    }
}

/// What a `DEVICE_SET_IRQS` does with the interrupts of its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqVerb {
    /// Mask them, or name the eventfds that tell of masking.
    Mask,
    /// Unmask them, or name the eventfds that tell of unmasking.
    Unmask,
    /// Trigger them, or name the eventfds that the device triggers.
    Trigger,
}

/// How a `DEVICE_SET_IRQS` names the interrupts of its range that it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqData<'a> {
    /// All of them.
    None,
    /// Those with a byte other than zero.
    Bool(&'a [u8]),
    /// All of them; the descriptors came along with the message.
    Eventfd,
}

/// `DEVICE_SET_IRQS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetIrqs<'a> {
    /// The interrupt index (INTx, MSI, MSI-X, ...).
    pub index: u32,
    /// First interrupt of the range.
    pub start: u32,
    /// Number of interrupts in the range.
    pub count: u32,
    /// What to do.
    pub verb: IrqVerb,
    /// To which ones.
    pub data: IrqData<'a>,
}

impl<'a> SetIrqs<'a> {
    const LEN: usize = 20;

    /// Takes a body apart.
    ///
    /// # Errors
    /// When it is short, or names no or several verbs or kinds of data.
    pub fn parse(body: &'a [u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(body);
        let (argsz, flags, index, start, count) = (f.u32()?, f.u32()?, f.u32()?, f.u32()?, f.u32()?);
        check_argsz(argsz, Self::LEN)?;
        let verb = match flags & 0x38 {
            0x08 => IrqVerb::Mask,
            0x10 => IrqVerb::Unmask,
            0x20 => IrqVerb::Trigger,
            _ => return Err(Malformed::Flags(flags)),
        };
        let data = match flags & !0x38 {
            0x1 => IrqData::None,
            0x2 => {
                let need = Self::LEN.saturating_add(count as usize);
                check_argsz(argsz, need)?;
                let bools = f.rest.get(..count as usize);
                IrqData::Bool(bools.ok_or(Malformed::Short { need, have: body.len() })?)
            }
            0x4 => IrqData::Eventfd,
            _ => return Err(Malformed::Flags(flags)),
        };
        Ok(Self { index, start, count, verb, data })
    }

    /// The body of the request. The reply has none.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        let (kind, bools): (u32, &[u8]) = match self.data {
            IrqData::None => (1, &[]),
            IrqData::Bool(bools) => (2, bools),
            IrqData::Eventfd => (4, &[]),
        };
        let verb = match self.verb {
            IrqVerb::Mask => 0x08,
            IrqVerb::Unmask => 0x10,
            IrqVerb::Trigger => 0x20,
        };
        let argsz = u32::try_from(Self::LEN + bools.len()).unwrap_or(u32::MAX);
        let body = Body::default().u32(argsz).u32(kind | verb);
        body.u32(self.index).u32(self.start).u32(self.count).bytes(bools).0
    }
}

/// `REGION_READ` and `REGION_WRITE`, request and reply: the fixed part, with `count` bytes of data after it in
/// the request of a write and the reply to a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionAccess {
    /// Offset in the region, bytes.
    pub offset: u64,
    /// The region.
    pub region: u32,
    /// Bytes.
    pub count: u32,
}

impl RegionAccess {
    /// Takes a body without data apart.
    ///
    /// # Errors
    /// When its length is not that of the fixed part.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(body);
        let access = Self { offset: f.u64()?, region: f.u32()?, count: f.u32()? };
        f.exactly(0)?;
        Ok(access)
    }

    /// Takes a body with data apart.
    ///
    /// # Errors
    /// When its length is not that of the fixed part and `count` bytes.
    pub fn parse_with_data(body: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let mut f = Fields::new(body);
        let access = Self { offset: f.u64()?, region: f.u32()?, count: f.u32()? };
        Ok((access, f.exactly(access.count.into())?))
    }

    /// The body, with room for data behind it when there is to be some.
    #[must_use]
    pub fn body(&self, data: &[u8]) -> Vec<u8> {
        let body = Body::with_capacity(REGION_ACCESS_LEN + data.len());
        body.u64(self.offset).u32(self.region).u32(self.count).bytes(data).0
    }
}

/// One write of a `REGION_WRITE_MULTI`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MultiWrite<'a> {
    /// Offset in the region, bytes.
    pub offset: u64,
    /// The region.
    pub region: u32,
    /// One to eight bytes.
    pub data: &'a [u8],
}

impl<'a> MultiWrite<'a> {
    /// The writes of a request's body, in the order in which they are to be done.
    ///
    /// # Errors
    /// When the count does not fit the body, or a write claims more than eight bytes.
    pub fn parse_all(body: &'a [u8]) -> Result<Vec<Self>, Malformed> {
        let mut f = Fields::new(body);
        let count = f.u64()?;
        let entries = f.exactly(count.saturating_mul(MULTI_WRITE_LEN as u64))?;
        entries
            .chunks_exact(MULTI_WRITE_LEN)
            .map(|entry| {
                let mut f = Fields::new(entry);
                let (offset, region, count) = (f.u64()?, f.u32()?, f.u32()?);
                let data = f.rest.get(..count as usize).ok_or(Malformed::MultiWrite(count))?;
                Ok(Self { offset, region, data })
            })
            .collect()
    }

    /// The body of a request. Writes of more than eight bytes are cut off; their senders use `REGION_WRITE`.
    #[must_use]
    pub fn body(writes: &[Self]) -> Vec<u8> {
        let mut body = Body::with_capacity(8 + writes.len() * MULTI_WRITE_LEN).u64(writes.len() as u64);
        for write in writes {
            let mut data = [0; 8];
            let count = write.data.len().min(8);
            data[..count].copy_from_slice(&write.data[..count]);
            body = body.u64(write.offset).u32(write.region).u32(u32::try_from(count).unwrap_or(8)).bytes(&data);
        }
        body.0
    }

    /// The body of the reply: how many writes were done.
    #[must_use]
    pub fn reply(done: u64) -> Vec<u8> {
        Body::default().u64(done).0
    }
}

/// `DMA_READ` and `DMA_WRITE`, request and reply: the fixed part, with `count` bytes of data after it in the
/// request of a write and the reply to a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaAccess {
    /// The address as the device knows it.
    pub address: u64,
    /// Bytes.
    pub count: u64,
}

impl DmaAccess {
    /// Takes a body without data apart.
    ///
    /// # Errors
    /// When its length is not that of the fixed part.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(body);
        let access = Self { address: f.u64()?, count: f.u64()? };
        f.exactly(0)?;
        Ok(access)
    }

    /// Takes a body with data apart.
    ///
    /// # Errors
    /// When its length is not that of the fixed part and `count` bytes.
    pub fn parse_with_data(body: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let mut f = Fields::new(body);
        let access = Self { address: f.u64()?, count: f.u64()? };
        Ok((access, f.exactly(access.count)?))
    }

    /// The body, with `data` behind the fixed part.
    #[must_use]
    pub fn body(&self, data: &[u8]) -> Vec<u8> {
        Body::with_capacity(DMA_ACCESS_LEN + data.len()).u64(self.address).u64(self.count).bytes(data).0
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
