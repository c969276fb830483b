// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `DEVICE_GET_INFO`, `DEVICE_FEATURE`, and the four words that three commands have in common.

use super::fields::{Body, Fields, Malformed, check_argsz};

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
