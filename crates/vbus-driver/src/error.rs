//! What can go wrong on the driver's side.

use core::fmt;

use vbus_shm::abi::status;

use crate::hal::NoMemory;

/// Why something failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The registers do not begin with the magic number, or there is no capability that says where they are.
    NotVbus,
    /// The device speaks only these versions of the ABI.
    Version {
        /// The lowest.
        lowest: u16,
        /// The highest.
        highest: u16,
    },
    /// The device is of another class.
    Class(u32),
    /// None of the offered kinds of doorbell can be used here.
    NoDoorbell,
    /// The function has gone: its registers read as all ones.
    Gone,
    /// The device refused a command.
    Refused {
        /// The command, as in the specification.
        command: &'static str,
        /// Its answer.
        status: Status,
    },
    /// The device has ended the connection; close, then open again.
    Broken(Status),
    /// The device returned something that it cannot have meant (said in words); do not go on with this connection.
    Corrupt(&'static str),
    /// No memory that the device can reach.
    NoMemory,
    /// The caller asked for something that the device or the ABI does not have.
    Unsupported(&'static str),
}

impl From<NoMemory> for Error {
    fn from(NoMemory: NoMemory) -> Self {
        Error::NoMemory
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NotVbus => write!(f, "not a vbus function"),
            Error::Version { lowest, highest } => {
                write!(f, "the device speaks versions {lowest} to {highest} of the ABI, this driver does not")
            }
            Error::Class(class) => write!(f, "the device is of class {class}, which this driver is not for"),
            Error::NoDoorbell => write!(f, "the device offers no doorbell that can be rung here"),
            Error::Gone => write!(f, "the device has gone"),
            Error::Refused { command, status } => write!(f, "{command} was refused: {status}"),
            Error::Broken(status) => write!(f, "the device ended the connection: {status}"),
            Error::Corrupt(what) => write!(f, "the device broke the protocol: {what}"),
            Error::NoMemory => write!(f, "no memory that the device can reach"),
            Error::Unsupported(what) => write!(f, "not supported: {what}"),
        }
    }
}

impl core::error::Error for Error {}

macro_rules! statuses {
    ($($name:ident $code:ident $text:literal,)*) => {
        /// A device's answer other than "done": a number of [`vbus_shm::abi::status`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Status {
            $(#[doc = $text] $name,)*
            /// One of the class's own, or one that this driver does not know.
            Other(u32),
        }

        impl Status {
            /// From the number.
            pub fn from_code(code: u32) -> Status {
                match code {
                    $(status::$code => Status::$name,)*
                    other => Status::Other(other),
                }
            }

            /// The number.
            pub fn code(self) -> u32 {
                match self {
                    $(Status::$name => status::$code,)*
                    Status::Other(other) => other,
                }
            }
        }

        impl fmt::Display for Status {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Status::$name => f.write_str($text),)*
                    Status::Other(other) => write!(f, "status {other:#x}"),
                }
            }
        }
    };
}

statuses! {
    BadCommand BAD_COMMAND "no such command",
    BadArgument BAD_ARGUMENT "argument out of range",
    NotOpen NOT_OPEN "no connection is open",
    AlreadyOpen ALREADY_OPEN "a connection is open already",
    BadVersion BAD_VERSION "ABI version not offered",
    BadFeatures BAD_FEATURES "features not offered, or not together",
    BadAddress BAD_ADDRESS "address outside the memory that the device can reach",
    NotShared NOT_SHARED "this memory is not shared with the device (QEMU: memory-backend-memfd needs share=on)",
    BadLength BAD_LENGTH "bad length",
    BadAlignment BAD_ALIGNMENT "bad alignment",
    BadSignal BAD_SIGNAL "the signal block does not fit the region",
    BadVector BAD_VECTOR "no such interrupt vector",
    Limit LIMIT "limit reached",
    NoRegion NO_REGION "no such region",
    BadLayout BAD_LAYOUT "bad header in the region",
    BadFunction BAD_FUNCTION "no such function",
    Exists EXISTS "there already",
    Failed FAILED "the device failed; the bus's log says why",
    Corrupt CORRUPT "protocol violation in shared memory",
    Revoked REVOKED "memory of a region was unmapped",
    Denied DENIED "not allowed",
    Removed REMOVED "the device was removed",
}
