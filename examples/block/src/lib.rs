// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A block device: a file of the host is a disk, whose sectors a driver reads and writes.
//!
//! This file is the protocol, which both ends share. The class's part of the config area is the
//! number of sectors, as a `u64`. A request is a [`Header`], and the data if it writes. The
//! response is the data if it reads. All numbers are little-endian.

pub mod device;
pub mod driver;

use vbus_driver::ErrorCode;

/// The name of the class.
pub const CLASS: &str = "block";
/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// The most bytes of data in a request or a response.
pub const DATA_MAX: u32 = 64 << 10;

/// The request names a sector that the disk does not have.
pub const NO_SUCH_SECTOR: ErrorCode = ErrorCode(0x100);
/// The error codes of the class, for people.
pub const ERRORS: &[(ErrorCode, &str)] = &[(NO_SUCH_SECTOR, "the disk has no such sector")];

/// The kind of a request that reads.
pub const READ: u32 = 0;
/// The kind of a request that writes. Its response comes when the data is on the host's disk.
pub const WRITE: u32 = 1;

/// The beginning of a request: its kind, the number of sectors, and the first sector.
pub struct Header(pub u32, pub u32, pub u64);

impl Header {
    /// Bytes of a header.
    pub const BYTES: u32 = 16;

    /// A request with this header and this data.
    pub fn with(&self, data: &[u8]) -> Vec<u8> {
        [&self.0.to_le_bytes(), &self.1.to_le_bytes(), &self.2.to_le_bytes()[..], data].concat()
    }

    /// Splits a request into its header and its data. None if it is too short.
    pub fn parse(request: &[u8]) -> Option<(Header, &[u8])> {
        let (kind, rest) = request.split_first_chunk()?;
        let (count, rest) = rest.split_first_chunk()?;
        let (sector, data) = rest.split_first_chunk()?;
        let (kind, count) = (u32::from_le_bytes(*kind), u32::from_le_bytes(*count));
        Some((Header(kind, count, u64::from_le_bytes(*sector)), data))
    }
}
