//! Status codes of the mailbox, as an error type.

use core::fmt;

use super::abi::status;
use super::{pic, ring, state};

/// Why a command failed or a connection ended: a number of [`status`], as the device says it and
/// the driver reads it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u32);

macro_rules! statuses {
    ($($name:ident: $text:literal,)*) => {
        impl Status {
            $(#[doc = $text] pub const $name: Status = Status(status::$name);)*

            /// The code in words.
            pub fn text(self) -> Option<&'static str> {
                match self {
                    $(Status::$name => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

statuses! {
    BAD_COMMAND: "no such command",
    BAD_ARGUMENT: "argument out of range",
    NOT_OPEN: "no connection is open",
    ALREADY_OPEN: "the connection is open already",
    BAD_VERSION: "ABI version not offered",
    BAD_FEATURES: "features not offered, or not together",
    BAD_ADDRESS: "address outside the memory that the device can reach",
    NOT_SHARED: "the driver's memory is not shared with the device (QEMU: memory-backend-memfd needs share=on)",
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
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.text() {
            Some(text) => f.write_str(text),
            None => write!(f, "status {:#x}", self.0),
        }
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Status({}: {self})", self.0)
    }
}

impl core::error::Error for Status {}

impl From<ring::Corrupt> for Status {
    fn from(_: ring::Corrupt) -> Self {
        Status::CORRUPT
    }
}

impl From<ring::BadRing> for Status {
    fn from(_: ring::BadRing) -> Self {
        Status::BAD_LAYOUT
    }
}

impl From<state::BadState> for Status {
    fn from(_: state::BadState) -> Self {
        Status::BAD_LAYOUT
    }
}

impl From<pic::BadPage> for Status {
    fn from(_: pic::BadPage) -> Self {
        Status::BAD_LAYOUT
    }
}
