// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `DEVICE_GET_INFO`, and the four words that three commands share.

use super::fields::{Body, Fields, Malformed, check_argsz, check_zero};

/// `VFIO_DEVICE_FLAGS_RESET`.
pub const DEVICE_RESETS: u32 = 1 << 0;
/// `VFIO_DEVICE_FLAGS_PCI`.
pub const DEVICE_IS_PCI: u32 = 1 << 1;

/// The four words that `DEVICE_GET_INFO`, `DEVICE_GET_IRQ_INFO` and `DEVICE_GET_REGION_IO_FDS`
/// start with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Bytes. In a request: the space for the reply's body. In a reply: the size of the whole body.
    pub argsz: u32,
    /// Zero in a request.
    pub flags: u32,
    /// `DEVICE_GET_INFO`: number of regions. The other commands: the index that the client asks
    /// for.
    pub index: u32,
    /// `DEVICE_GET_INFO`: number of interrupt indexes. The other commands: the number of interrupts
    /// or of eventfds.
    pub count: u32,
}

impl Info {
    /// Bytes of the four words.
    pub const LEN: usize = 16;

    /// Parses the request of `DEVICE_GET_INFO`, where all fields but `argsz` are zero.
    ///
    /// # Errors
    /// As [`parse`](Self::parse), or another field is not zero.
    pub fn parse_device_request(body: &[u8]) -> Result<Self, Malformed> {
        let info = Self::parse(body)?;
        check_zero(&[
            ("flags", info.flags.into()),
            ("num_regions", info.index.into()),
            ("num_irqs", info.count.into()),
        ])?;
        Ok(info)
    }

    /// Parses the request of `DEVICE_GET_IRQ_INFO` or `DEVICE_GET_REGION_IO_FDS`, where all fields
    /// but `argsz` and `index` are zero.
    ///
    /// # Errors
    /// As [`parse`](Self::parse), or another field is not zero.
    pub fn parse_index_request(body: &[u8]) -> Result<Self, Malformed> {
        let info = Self::parse(body)?;
        check_zero(&[("flags", info.flags.into()), ("count", info.count.into())])?;
        Ok(info)
    }

    /// Parses a body, and ignores the bytes after the four words.
    ///
    /// # Errors
    /// The body is too short, or its `argsz` does not allow a reply of four words.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(body);
        let info = Self { argsz: f.u32()?, flags: f.u32()?, index: f.u32()?, count: f.u32()? };
        check_argsz(info.argsz, Self::LEN)?;
        Ok(info)
    }

    /// Returns the body.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        Body::default().u32(self.argsz).u32(self.flags).u32(self.index).u32(self.count).0
    }
}
