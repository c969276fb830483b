// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `VERSION`.

use super::fields::{Body, Fields, Malformed};

/// The protocol's major version that this crate speaks.
pub const MAJOR: u16 = 0;
/// The newest minor version of [`MAJOR`] that this crate speaks.
pub const MINOR: u16 = 1;

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
