// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The error codes of the ABI as an error type.

use core::fmt;

use super::abi::error_code;
use super::{pic, ring, state};

/// Why a command failed or a connection ended: one of the numbers of [`error_code`]. The device
/// writes it and the driver reads it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ErrorCode(pub u32);

macro_rules! error_codes {
    ($($name:ident: $text:literal,)*) => {
        impl ErrorCode {
            $(#[doc = $text] pub const $name: ErrorCode = ErrorCode(error_code::$name);)*

            /// What the error code means, in words. `None`: it is not one of this module.
            pub fn text(self) -> Option<&'static str> {
                match self {
                    $(ErrorCode::$name => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

error_codes! {
    BAD_COMMAND: "no such command",
    BAD_ARGUMENT: "argument out of range",
    NOT_OPEN: "no connection is open",
    ALREADY_OPEN: "the connection is open already",
    BAD_VERSION: "ABI version not offered",
    BAD_FEATURES: "features not offered, or not together",
    BAD_ADDRESS: "address outside the memory that the device can reach",
    NOT_SHARED: "the driver's memory is not shared with the device \
        (QEMU: memory-backend-memfd needs share=on)",
    BAD_LENGTH: "bad length",
    BAD_ALIGNMENT: "bad alignment",
    BAD_SIGNAL: "the signal block does not fit the region",
    BAD_VECTOR: "no such interrupt vector",
    LIMIT: "limit reached",
    NO_REGION: "no such region",
    BAD_LAYOUT: "bad header in the region",
    BAD_FUNCTION: "no such function",
    EXISTS: "already there",
    FAILED: "the device failed; the log of the bus says why",
    CORRUPT: "protocol violation in shared memory",
    REVOKED: "memory of a region was unmapped",
    DENIED: "not allowed",
    REMOVED: "the device was removed",
    IN_PROGRESS: "a command is in progress",
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.text() {
            Some(text) => f.write_str(text),
            None => write!(f, "error {:#x}", self.0),
        }
    }
}

impl fmt::Debug for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ErrorCode({}: {self})", self.0)
    }
}

impl core::error::Error for ErrorCode {}

impl From<ring::Corrupt> for ErrorCode {
    fn from(_: ring::Corrupt) -> Self {
        ErrorCode::CORRUPT
    }
}

impl From<ring::BadRing> for ErrorCode {
    fn from(_: ring::BadRing) -> Self {
        ErrorCode::BAD_LAYOUT
    }
}

impl From<state::BadStatePage> for ErrorCode {
    fn from(_: state::BadStatePage) -> Self {
        ErrorCode::BAD_LAYOUT
    }
}

impl From<pic::BadInterruptPage> for ErrorCode {
    fn from(_: pic::BadInterruptPage) -> Self {
        ErrorCode::BAD_LAYOUT
    }
}
