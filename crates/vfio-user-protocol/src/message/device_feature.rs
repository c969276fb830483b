// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `DEVICE_FEATURE`, and the data of the features that the document has: all of them serve
//! migration.

use super::fields::{Body, Fields, Malformed, check_argsz};

/// The numbers of the features, for [`Feature::feature`].
pub mod feature {
    #![allow(missing_docs)] // The names are the specification's own.
    pub const MIGRATION: u16 = 1;
    pub const MIG_DEVICE_STATE: u16 = 2;
    pub const DMA_LOGGING_START: u16 = 6;
    pub const DMA_LOGGING_STOP: u16 = 7;
    pub const DMA_LOGGING_REPORT: u16 = 8;
}

/// Bytes in the body of a `DEVICE_FEATURE` before the feature's data.
pub const FEATURE_LEN: usize = 8;

const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;

/// The fixed part of `DEVICE_FEATURE`, of request and reply: a feature, and what the client asks of
/// it. The feature's data follow. The reply to a set or a probe repeats the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Bytes. In a request: the space for the reply's body. In a reply: the size of the whole body.
    pub argsz: u32,
    /// The feature's number, one of [`feature`] or another.
    pub feature: u16,
    /// Return its data.
    pub get: bool,
    /// Set it from the data.
    pub set: bool,
    /// Only say whether `get` or `set` would work.
    pub probe: bool,
}

impl Feature {
    /// Parses a body. Returns the feature's data too, which nobody has looked at.
    ///
    /// # Errors
    /// The body is too short, `argsz` does not allow a reply of this fixed part, or the flags
    /// exclude each other.
    pub fn parse(body: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let mut f = Fields::new(body);
        let (argsz, flags) = (f.u32()?, f.u32()?);
        check_argsz(argsz, FEATURE_LEN)?;
        let (get, set, probe) = (flags & GET != 0, flags & SET != 0, flags & PROBE != 0);
        if !(probe || get != set) || flags >> 19 != 0 {
            return Err(Malformed::Flags(flags));
        }
        Ok((Self { argsz, feature: (flags & 0xffff) as u16, get, set, probe }, f.rest))
    }

    /// Returns the body, with the feature's `data` after the fixed part.
    #[must_use]
    pub fn body(&self, data: &[u8]) -> Vec<u8> {
        let flags = u32::from(self.feature)
            | if self.get { GET } else { 0 }
            | if self.set { SET } else { 0 }
            | if self.probe { PROBE } else { 0 };
        Body::with_capacity(FEATURE_LEN + data.len()).u32(self.argsz).u32(flags).bytes(data).0
    }
}

/// The data of [`feature::MIGRATION`]: the states that the device has beside `RUNNING` and `ERROR`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MigrationFlags {
    /// `STOP`, `STOP_COPY` and `RESUMING`. A device that can be migrated has them.
    pub stop_copy: bool,
    /// The two states `*_P2P`. vfio-user does not use them.
    pub p2p: bool,
    /// `PRE_COPY`.
    pub pre_copy: bool,
}

impl MigrationFlags {
    /// Bytes of the data.
    pub const LEN: usize = 8;

    /// Parses the data. Flags that the document does not have are ignored.
    ///
    /// # Errors
    /// They are too short.
    pub fn parse(data: &[u8]) -> Result<Self, Malformed> {
        let flags = Fields::new(data).u64()?;
        Ok(Self { stop_copy: flags & 1 != 0, p2p: flags & 2 != 0, pre_copy: flags & 4 != 0 })
    }

    /// Returns the data.
    #[must_use]
    pub fn data(&self) -> Vec<u8> {
        let flags =
            u64::from(self.stop_copy) | u64::from(self.p2p) << 1 | u64::from(self.pre_copy) << 2;
        Body::default().u64(flags).0
    }
}

/// The state of a device's migration. The numbers are those of `enum vfio_device_mig_state`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum MigrationState {
    /// The device has failed. Only a reset leads out of this state.
    Error = 0,
    /// The device changes neither itself nor memory, and signals nothing.
    Stop = 1,
    /// The device runs.
    #[default]
    Running = 2,
    /// As [`Stop`](Self::Stop), and the client reads the device's state.
    StopCopy = 3,
    /// As [`Stop`](Self::Stop), and the client writes a new state.
    Resuming = 4,
    /// Not used in vfio-user.
    RunningP2p = 5,
    /// The device runs, and the client already reads from its state.
    PreCopy = 6,
    /// Not used in vfio-user.
    PreCopyP2p = 7,
}

impl MigrationState {
    /// Bytes of the data of [`feature::MIG_DEVICE_STATE`]: the state, and a word that vfio-user
    /// does not use.
    pub const LEN: usize = 8;

    /// All states.
    pub const ALL: [MigrationState; 8] = [
        Self::Error,
        Self::Stop,
        Self::Running,
        Self::StopCopy,
        Self::Resuming,
        Self::RunningP2p,
        Self::PreCopy,
        Self::PreCopyP2p,
    ];

    /// The state with this number.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.get(number as usize).copied()
    }

    /// Parses the data of [`feature::MIG_DEVICE_STATE`].
    ///
    /// # Errors
    /// They are too short, or have a number that is no state.
    pub fn parse(data: &[u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(data);
        let (number, _data_fd) = (f.u32()?, f.u32()?);
        Self::from_number(number).ok_or(Malformed::State(number))
    }

    /// Returns the data of [`feature::MIG_DEVICE_STATE`].
    #[must_use]
    pub fn data(self) -> Vec<u8> {
        Body::default().u32(self as u32).u32(0).0
    }
}

/// A range of the addresses that the device uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaRange {
    /// The first address.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
}

/// The data of [`feature::DMA_LOGGING_START`]: where the client wants to know the pages that the
/// device writes. [`feature::DMA_LOGGING_STOP`] may have the same data, which mean nothing there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggingControl {
    /// The size of a page, in bytes. In a request: a wish. In a reply: what the device does.
    pub page_size: u64,
    /// The addresses. None: all.
    pub ranges: Vec<DmaRange>,
}

impl LoggingControl {
    /// Bytes of the data before the ranges.
    pub const LEN: usize = 16;
    /// Bytes of a range.
    pub const RANGE_LEN: usize = 16;

    /// Parses the data.
    ///
    /// # Errors
    /// They do not have the length of the fixed part and of as many ranges as it says.
    pub fn parse(data: &[u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(data);
        let (page_size, count, _reserved) = (f.u64()?, f.u32()?, f.u32()?);
        let ranges = f.exactly(u64::from(count) * Self::RANGE_LEN as u64)?;
        let ranges = ranges.chunks_exact(Self::RANGE_LEN).map(|range| {
            let mut f = Fields::new(range);
            Ok(DmaRange { iova: f.u64()?, length: f.u64()? })
        });
        Ok(Self { page_size, ranges: ranges.collect::<Result<_, _>>()? })
    }

    /// Returns the data. It cuts off ranges beyond the number that a field can have.
    #[must_use]
    pub fn data(&self) -> Vec<u8> {
        let count = u32::try_from(self.ranges.len()).unwrap_or(u32::MAX);
        let capacity = Self::LEN + self.ranges.len() * Self::RANGE_LEN;
        let body = Body::with_capacity(capacity).u64(self.page_size).u32(count).u32(0);
        let ranges = self.ranges.iter().take(count as usize);
        ranges.fold(body, |body, range| body.u64(range.iova).u64(range.length)).0
    }
}

/// The fixed part of the data of [`feature::DMA_LOGGING_REPORT`]. In the reply a bitmap follows: an
/// array of words of 64 bits, with a bit for each page of the range. Bit `n % 64` of word `n / 64`
/// stands for the page at `iova + n * page_size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoggingReport {
    /// The first address.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// Bytes for which a bit stands: a power of two.
    pub page_size: u64,
}

impl LoggingReport {
    /// Bytes of the data before the bitmap.
    pub const LEN: usize = 24;

    /// Parses the data of a request or a reply. Returns what follows the fixed part too.
    ///
    /// # Errors
    /// They are too short.
    pub fn parse(data: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let mut f = Fields::new(data);
        Ok((Self { iova: f.u64()?, length: f.u64()?, page_size: f.u64()? }, f.rest))
    }

    /// The number of words of the bitmap. `None`: the range wraps around or is empty, or the page
    /// size is no power of two.
    #[must_use]
    pub fn words(&self) -> Option<u64> {
        self.iova.checked_add(self.length).filter(|_| self.length > 0)?;
        let pages = self.length.div_ceil(Some(self.page_size).filter(|s| s.is_power_of_two())?);
        Some(pages.div_ceil(64))
    }

    /// Returns the data, with the words of a bitmap.
    #[must_use]
    pub fn data(&self, bitmap: &[u64]) -> Vec<u8> {
        let body = Body::with_capacity(Self::LEN + bitmap.len() * 8);
        let body = body.u64(self.iova).u64(self.length).u64(self.page_size);
        bitmap.iter().fold(body, |body, word| body.u64(*word)).0
    }
}
