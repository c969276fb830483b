// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The properties of regions, and access to regions.

use super::device::Info;
use super::fields::{Body, Fields, Malformed, check_argsz, check_zero};

/// Bytes in the body of a region access before the data.
pub const REGION_ACCESS_LEN: usize = 16;
/// Bytes of one write in a `REGION_WRITE_MULTI` body.
const MULTI_WRITE_LEN: usize = 24;
/// Bytes of one sub-region in a reply to `DEVICE_GET_REGION_IO_FDS`, as this crate writes it. The
/// parser also accepts longer entries.
pub const SUB_REGION_LEN: usize = 40;

/// `KVM_IOEVENTFD_FLAG_DATAMATCH`, a flag of a [`SubRegion`].
pub const DATAMATCH: u32 = 1;

/// `DEVICE_GET_REGION_INFO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Bytes. In a request: the space for the reply's body. In a reply: the size of the whole body.
    pub argsz: u32,
    /// `VFIO_REGION_INFO_FLAG_*`. Zero in a request.
    pub flags: u32,
    /// The region.
    pub index: u32,
    /// Its size in bytes. Zero in a request.
    pub size: u64,
}

impl RegionInfo {
    const LEN: usize = 32;

    /// Parses a body of a request or a reply.
    ///
    /// # Errors
    /// The body is too short, or its `argsz` is too small for the reply.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(body);
        let (argsz, flags, index) = (f.u32()?, f.u32()?, f.u32()?);
        let (_cap_offset, size, _offset) = (f.u32()?, f.u64()?, f.u64()?);
        check_argsz(argsz, Self::LEN)?;
        Ok(Self { argsz, flags, index, size })
    }

    /// Parses a request, where all fields but `argsz` and `index` are zero. Returns the index.
    ///
    /// # Errors
    /// As [`parse`](Self::parse), or another field is not zero.
    pub fn parse_request(body: &[u8]) -> Result<u32, Malformed> {
        let mut f = Fields::new(body);
        let (argsz, flags, index) = (f.u32()?, f.u32()?, f.u32()?);
        let (cap_offset, size, offset) = (f.u32()?, f.u64()?, f.u64()?);
        check_argsz(argsz, Self::LEN)?;
        check_zero(&[
            ("flags", flags.into()),
            ("cap_offset", cap_offset.into()),
            ("size", size),
            ("offset", offset),
        ])?;
        Ok(index)
    }

    /// Returns the body. No region of this crate can be mapped, so capabilities and file offset are
    /// zero.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        Body::default()
            .u32(self.argsz)
            .u32(self.flags)
            .u32(self.index)
            .u32(0)
            .u64(self.size)
            .u64(0)
            .0
    }
}

/// An eventfd for a part of a region (`DEVICE_GET_REGION_IO_FDS`). A write of the eventfd has the
/// effect of a write to the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubRegion {
    /// Offset in the region, in bytes.
    pub offset: u64,
    /// Bytes of the write. 0: any number.
    pub size: u64,
    /// The index of its descriptor among those of the message.
    pub fd_index: u32,
    /// 0 for an ioeventfd. This crate uses no other type.
    pub kind: u32,
    /// `KVM_IOEVENTFD_FLAG_*`.
    pub flags: u32,
    /// The value of the write, if the flags say so.
    pub datamatch: u64,
}

impl SubRegion {
    /// Appends the sub-region to a body that [`Info::body`] began.
    pub fn append_to(&self, body: &mut Vec<u8>) {
        let entry =
            Body::default().u64(self.offset).u64(self.size).u32(self.fd_index).u32(self.kind);
        body.extend_from_slice(&entry.u32(self.flags).u32(0).u64(self.datamatch).0);
    }

    /// The sub-regions of a reply's body.
    ///
    /// The length of an entry is the length of the array, `argsz - 16`, divided by the count. A
    /// later minor version may append fields, which this method ignores. (The document has 32
    /// instead of 16 in this formula, and says that an entry has 40 bytes. Only 16 gives 40.)
    ///
    /// # Errors
    /// By `argsz`, an entry is too short for the fields above; or the body ends within the array.
    pub fn parse_all(body: &[u8]) -> Result<Vec<Self>, Malformed> {
        let info = Info::parse(body)?;
        let count = info.count as usize;
        if count == 0 {
            return Ok(Vec::new());
        }
        let array = info.argsz as usize - Info::LEN;
        if array / count < SUB_REGION_LEN {
            let need = count.saturating_mul(SUB_REGION_LEN).saturating_add(Info::LEN);
            return Err(Malformed::ArgSize { need, argsz: info.argsz });
        }
        let (need, have) = (info.argsz as usize, body.len());
        let entries = body.get(Info::LEN..need).ok_or(Malformed::Short { need, have })?;
        entries
            .chunks_exact(array / count)
            .take(count)
            .map(|entry| {
                let mut f = Fields::new(entry);
                let (offset, size, fd_index, kind) = (f.u64()?, f.u64()?, f.u32()?, f.u32()?);
                let (flags, _padding, datamatch) = (f.u32()?, f.u32()?, f.u64()?);
                Ok(Self { offset, size, fd_index, kind, flags, datamatch })
            })
            .collect()
    }
}

/// The fixed part of `REGION_READ` and `REGION_WRITE`, of request and reply. In the request of a
/// write and in the reply to a read, `count` bytes of data follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionAccess {
    /// Offset in the region, in bytes.
    pub offset: u64,
    /// The region.
    pub region: u32,
    /// Bytes.
    pub count: u32,
}

impl RegionAccess {
    /// Parses a body without data.
    ///
    /// # Errors
    /// The body does not have the length of the fixed part.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(body);
        let access = Self { offset: f.u64()?, region: f.u32()?, count: f.u32()? };
        f.exactly(0)?;
        Ok(access)
    }

    /// Parses a body with data.
    ///
    /// # Errors
    /// The body does not have the length of the fixed part and `count` bytes.
    pub fn parse_with_data(body: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let mut f = Fields::new(body);
        let access = Self { offset: f.u64()?, region: f.u32()?, count: f.u32()? };
        Ok((access, f.exactly(access.count.into())?))
    }

    /// Returns the body with `data` after the fixed part.
    #[must_use]
    pub fn body(&self, data: &[u8]) -> Vec<u8> {
        let body = Body::with_capacity(REGION_ACCESS_LEN + data.len());
        body.u64(self.offset).u32(self.region).u32(self.count).bytes(data).0
    }
}

/// One write of a `REGION_WRITE_MULTI`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MultiWrite<'a> {
    /// Offset in the region, in bytes.
    pub offset: u64,
    /// The region.
    pub region: u32,
    /// One to eight bytes.
    pub data: &'a [u8],
}

impl<'a> MultiWrite<'a> {
    /// Parses the body of a request. Returns the writes in their order.
    ///
    /// # Errors
    /// The count does not fit the body, or a write has more than eight bytes.
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

    /// Returns the body of a request. It cuts off a write of more than eight bytes: use
    /// `REGION_WRITE` for it.
    #[must_use]
    pub fn body(writes: &[Self]) -> Vec<u8> {
        let mut body =
            Body::with_capacity(8 + writes.len() * MULTI_WRITE_LEN).u64(writes.len() as u64);
        for write in writes {
            let mut data = [0; 8];
            let count = write.data.len().min(8);
            data[..count].copy_from_slice(&write.data[..count]);
            body = body
                .u64(write.offset)
                .u32(write.region)
                .u32(u32::try_from(count).unwrap_or(8))
                .bytes(&data);
        }
        body.0
    }

    /// Returns the body of the reply: the number of writes.
    #[must_use]
    pub fn reply(done: u64) -> Vec<u8> {
        Body::default().u64(done).0
    }
}
