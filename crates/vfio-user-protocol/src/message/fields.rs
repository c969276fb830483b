// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads and writes the integers of a body. They have the byte order of the machine.

/// The body does not have the form of its command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// The body has fewer bytes than the command's fixed part, or than its counts need.
    #[error("body of {have} bytes, fewer than {need}")]
    Short {
        /// Bytes needed.
        need: usize,
        /// Bytes found.
        have: usize,
    },
    /// The body has more bytes than the command and its counts need.
    #[error("body of {have} bytes, more than {need}")]
    Long {
        /// Bytes needed.
        need: usize,
        /// Bytes found.
        have: usize,
    },
    /// `argsz` is too small for the structure that it describes.
    #[error("argsz {argsz} below {need}")]
    ArgSize {
        /// Bytes needed.
        need: usize,
        /// The value found.
        argsz: u32,
    },
    /// A write of `REGION_WRITE_MULTI` has more than eight bytes.
    #[error("write of {0} bytes in an entry with room for 8")]
    MultiWrite(u32),
    /// The flags exclude each other, or the protocol does not have them.
    #[error("flags {0:#x}")]
    Flags(u32),
    /// A number that is no [state](super::MigrationState) of a migration.
    #[error("no state {0} of a migration")]
    State(u32),
    /// A field that is zero in each request is not zero.
    #[error("{field} is {value:#x} in a request, where it must be 0")]
    NotZero {
        /// The name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// Reads integers from the front of a byte slice.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    pub(super) rest: &'a [u8],
    total: usize,
}

impl<'a> Fields<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, total: bytes.len() }
    }

    pub(super) fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        match self.rest.split_first_chunk::<N>() {
            Some((head, rest)) => {
                self.rest = rest;
                Ok(*head)
            }
            None => {
                Err(Malformed::Short { need: self.total - self.rest.len() + N, have: self.total })
            }
        }
    }

    pub(super) fn u16(&mut self) -> Result<u16, Malformed> {
        self.take().map(u16::from_ne_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Malformed> {
        self.take().map(u32::from_ne_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Malformed> {
        self.take().map(u64::from_ne_bytes)
    }

    /// Returns the rest of the body, which must have `len` bytes.
    pub(super) fn exactly(self, len: u64) -> Result<&'a [u8], Malformed> {
        let fixed = self.total - self.rest.len();
        let need = usize::try_from(len).unwrap_or(usize::MAX).saturating_add(fixed);
        match self.total {
            have if have < need => Err(Malformed::Short { need, have }),
            have if have > need => Err(Malformed::Long { need, have }),
            _ => Ok(self.rest),
        }
    }
}

/// Makes a body. The counterpart of [`Fields`].
#[derive(Default)]
pub(super) struct Body(pub(super) Vec<u8>);

impl Body {
    pub(super) fn with_capacity(bytes: usize) -> Self {
        Self(Vec::with_capacity(bytes))
    }

    pub(super) fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    pub(super) fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    pub(super) fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    pub(super) fn bytes(mut self, data: &[u8]) -> Self {
        self.0.extend_from_slice(data);
        self
    }
}

/// Checks that the fields of a request that the protocol does not use are zero.
pub(super) fn check_zero(fields: &[(&'static str, u64)]) -> Result<(), Malformed> {
    match fields.iter().find(|(_, value)| *value != 0) {
        Some(&(field, value)) => Err(Malformed::NotZero { field, value }),
        None => Ok(()),
    }
}

/// Checks `argsz` of a request without a reply body. It is the size of the request's body: at least
/// `need` bytes, and no more than the body has.
pub(super) fn check_body_size(argsz: u32, need: usize, have: usize) -> Result<(), Malformed> {
    check_argsz(argsz, need)?;
    if argsz as usize > have {
        return Err(Malformed::Short { need: argsz as usize, have });
    }
    Ok(())
}

/// Checks that `argsz` of a request allows a reply of `need` bytes.
pub(super) fn check_argsz(argsz: u32, need: usize) -> Result<(), Malformed> {
    if (argsz as usize) < need { Err(Malformed::ArgSize { need, argsz }) } else { Ok(()) }
}
