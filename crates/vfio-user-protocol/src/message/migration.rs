// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `MIG_DATA_READ` and `MIG_DATA_WRITE`: the stream of a device's state.

use super::fields::{Body, Fields, Malformed};

/// The fixed part of both commands. Data follow in the reply to a read and in the request of a
/// write. The reply to a write has no body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigData {
    /// Bytes. In a request: the space for the reply's body. In a reply: the size of the whole body.
    pub argsz: u32,
    /// Bytes of data. A reply to a read with fewer than were asked for ends the stream.
    pub size: u32,
}

impl MigData {
    /// Bytes of the fixed part.
    pub const LEN: usize = 8;

    /// The fixed part with `size` bytes of data in the request or in the reply.
    #[must_use]
    pub const fn of(size: u32) -> Self {
        Self { argsz: size.saturating_add(8), size }
    }

    /// Parses the request of a read.
    ///
    /// # Errors
    /// The body is too short, or `argsz` does not allow a reply of `size` bytes of data.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(body);
        let data = Self { argsz: f.u32()?, size: f.u32()? };
        let need = Self::LEN.saturating_add(data.size as usize);
        match data.argsz {
            argsz if (argsz as usize) < need => Err(Malformed::ArgSize { need, argsz }),
            _ => Ok(data),
        }
    }

    /// Parses a reply to a read. Returns the data too. What follows the `size` bytes is no data:
    /// libvfio-user always sends as many bytes as were asked for.
    ///
    /// # Errors
    /// The body is shorter than the fixed part and `size` bytes.
    pub fn parse_reply(body: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let size = Fields::new(body.get(4..).unwrap_or_default()).u32().unwrap_or_default();
        let need = Self::LEN.saturating_add(size as usize);
        Self::parse_with_data(&body[..need.min(body.len())])
    }

    /// Parses the request of a write. Returns the data too.
    ///
    /// # Errors
    /// The body does not have the length of the fixed part and `size` bytes.
    pub fn parse_with_data(body: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let mut f = Fields::new(body);
        let data = Self { argsz: f.u32()?, size: f.u32()? };
        Ok((data, f.exactly(data.size.into())?))
    }

    /// Returns the body, with `data` after the fixed part.
    #[must_use]
    pub fn body(&self, data: &[u8]) -> Vec<u8> {
        Body::with_capacity(Self::LEN + data.len()).u32(self.argsz).u32(self.size).bytes(data).0
    }
}
