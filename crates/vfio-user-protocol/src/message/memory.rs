// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `DMA_MAP` and `DMA_UNMAP`: memory that the client shares with the device.

use super::fields::{Body, Fields, Malformed, check_argsz, check_body_size};

/// `DMA_MAP`: memory that the device may use from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// The device may read it.
    pub readable: bool,
    /// The device may write it.
    pub writable: bool,
    /// The offset in the file whose descriptor the message carries, in bytes. 0 without a
    /// descriptor.
    pub offset: u64,
    /// The address that the device uses.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

impl DmaMap {
    const LEN: usize = 32;

    /// Parses a body.
    ///
    /// # Errors
    /// The body is too short, `argsz` is not its size, or it has other flags than readable and
    /// writable.
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
        check_body_size(argsz, Self::LEN, body.len())?;
        if flags & !3 != 0 {
            return Err(Malformed::Flags(flags));
        }
        Ok(map)
    }

    /// Returns the body of the request. The reply has no body.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        let flags = u32::from(self.readable) | u32::from(self.writable) << 1;
        Body::default().u32(32).u32(flags).u64(self.offset).u64(self.address).u64(self.size).0
    }
}

/// `DMA_UNMAP`: memory that the device must not touch any more. The reply repeats the
/// request, with the number of bytes that were unmapped as its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaUnmap {
    /// Unmap everything. Address and size are then zero.
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

    /// Parses a body of a request or a reply.
    ///
    /// # Errors
    /// The body is too short, or has flags that the protocol does not have.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(body);
        let (argsz, flags) = (f.u32()?, f.u32()?);
        let unmap = Self {
            dirty_bitmap: flags & 1 != 0,
            all: flags & 2 != 0,
            address: f.u64()?,
            size: f.u64()?,
        };
        check_argsz(argsz, Self::LEN)?;
        if flags & !3 != 0 {
            return Err(Malformed::Flags(flags));
        }
        Ok(unmap)
    }

    /// Returns the body of the request and of the reply.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        let flags = u32::from(self.dirty_bitmap) | u32::from(self.all) << 1;
        Body::default().u32(24).u32(flags).u64(self.address).u64(self.size).0
    }
}
