// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `VERSION`.

use super::fields::{Body, Fields, Malformed};

/// The major version of the protocol that this crate implements.
pub const MAJOR: u16 = 0;
/// The newest minor version of [`MAJOR`] that this crate implements.
pub const MINOR: u16 = 1;

/// `VERSION`, request and reply: two numbers, and the capabilities as a JSON text with a NUL at its
/// end. The text may be missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version<'a> {
    /// [`MAJOR`], in request and reply.
    pub major: u16,
    /// The minor version of the reply is at most that of the request.
    pub minor: u16,
    /// The version data with its NUL. It may be empty.
    pub data: &'a [u8],
}

impl<'a> Version<'a> {
    /// Parses a body.
    ///
    /// # Errors
    /// The body is too short for the numbers.
    pub fn parse(body: &'a [u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(body);
        Ok(Self { major: f.u16()?, minor: f.u16()?, data: f.rest })
    }

    /// Returns the body of a request or a reply.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        Body::with_capacity(4 + self.data.len()).u16(self.major).u16(self.minor).bytes(self.data).0
    }
}
