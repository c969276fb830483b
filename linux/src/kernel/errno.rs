// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel's error numbers.

use core::ffi::c_int;
use core::fmt;

use vbus_driver::{Error, ErrorCode, NoMemory};

/// An error number of the kernel, positive.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(c_int);

impl Errno {
    /// Input or output error.
    pub const IO: Self = Self(5);
    /// Try again.
    pub const AGAIN: Self = Self(11);
    /// There is no memory.
    pub const NO_MEMORY: Self = Self(12);
    /// Permission denied.
    pub const ACCESS: Self = Self(13);
    /// In use.
    pub const BUSY: Self = Self(16);
    /// It is there already.
    pub const EXISTS: Self = Self(17);
    /// There is no such device.
    pub const NO_DEVICE: Self = Self(19);
    /// An invalid argument.
    pub const INVALID: Self = Self(22);
    /// There is no room.
    pub const NO_SPACE: Self = Self(28);
    /// Out of range.
    pub const RANGE: Self = Self(34);
    /// There are no data.
    pub const NO_DATA: Self = Self(61);
    /// The device broke the protocol.
    pub const PROTOCOL: Self = Self(71);
    /// Not supported.
    pub const NOT_SUPPORTED: Self = Self(95);
    /// It took too long.
    pub const TIMED_OUT: Self = Self(110);

    /// The result of a function of the kernel: an error if negative, else itself.
    pub fn check(result: c_int) -> Result<c_int, Self> {
        if result < 0 { Err(Self(result.saturating_neg())) } else { Ok(result) }
    }

    /// As a result for the kernel: negative.
    pub fn negative(self) -> c_int {
        -self.0
    }

    /// 0 or the negative number.
    pub fn result(result: Result<(), Self>) -> c_int {
        result.map_or_else(Self::negative, |()| 0)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "errno {}", self.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "errno {}", self.0)
    }
}

impl From<NoMemory> for Errno {
    fn from(NoMemory: NoMemory) -> Self {
        Self::NO_MEMORY
    }
}

/// A text has no room for more.
impl From<fmt::Error> for Errno {
    fn from(fmt::Error: fmt::Error) -> Self {
        Self::NO_SPACE
    }
}

impl From<Error> for Errno {
    fn from(error: Error) -> Self {
        match error {
            Error::NotVbus | Error::WrongClass(_) | Error::Gone => Self::NO_DEVICE,
            Error::Broken(ErrorCode::REMOVED) => Self::NO_DEVICE,
            Error::Refused { code: ErrorCode::REMOVED, .. } => Self::NO_DEVICE,
            Error::Refused { code: ErrorCode::LIMIT, .. } => Self::NO_SPACE,
            Error::Refused { code: ErrorCode::EXISTS, .. } => Self::BUSY,
            Error::Layout(_) | Error::Version { .. } => Self::NOT_SUPPORTED,
            Error::NoDoorbell | Error::Unsupported(_) => Self::NOT_SUPPORTED,
            Error::NoMemory => Self::NO_MEMORY,
            Error::TimedOut(_) => Self::TIMED_OUT,
            Error::Corrupt(_) => Self::PROTOCOL,
            _ => Self::IO,
        }
    }
}
