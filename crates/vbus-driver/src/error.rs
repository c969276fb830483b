//! What can go wrong on the driver's side.

use core::fmt;

use vbus_shm::{ErrorCode, Versions};

/// Why something failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The registers do not begin with the magic number, or there is no capability that says where
    /// they are.
    NotVbus,
    /// The capability that says where the registers are has a layout of this version, which this
    /// driver does not know.
    Layout(u8),
    /// No version of the ABI is spoken by both ends.
    Version {
        /// What the device speaks.
        device: Versions,
        /// What the driver speaks.
        driver: Versions,
    },
    /// The device is of another class.
    WrongClass(u32),
    /// None of the offered kinds of doorbell can be used here.
    NoDoorbell,
    /// The function has gone: its registers read as all ones.
    Gone,
    /// The device refused a command.
    Refused {
        /// The command, as in the specification.
        command: &'static str,
        /// Its answer.
        status: ErrorCode,
    },
    /// The device refused a command for a reason of its class's.
    Class {
        /// The command, as in the specification.
        command: &'static str,
        /// The class's code.
        code: ErrorCode,
        /// What it means.
        text: &'static str,
    },
    /// A command was in progress for so long that the driver has given up. The connection is
    /// closed; open it again.
    TimedOut(&'static str),
    /// The device has ended the connection; close, then open again.
    Broken(ErrorCode),
    /// The device has begun anew and has lost the connection; close, then open again.
    Reincarnated,
    /// The device returned something that it cannot have meant (said in words); do not go on with
    /// this connection.
    Corrupt(&'static str),
    /// No memory that the device can reach.
    NoMemory,
    /// The caller asked for something that the device or the ABI does not have.
    Unsupported(&'static str),
}

/// There is no (more) memory that the device could reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMemory;

impl From<NoMemory> for Error {
    fn from(NoMemory: NoMemory) -> Self {
        Error::NoMemory
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NotVbus => write!(f, "not a vbus function"),
            Error::Layout(layout) => {
                write!(
                    f,
                    "the layout of the vbus capability has version {layout}, which is unknown"
                )
            }
            Error::Version { device, driver } => {
                write!(f, "the device speaks {device} of the ABI, the driver {driver}")
            }
            Error::Reincarnated => {
                write!(f, "the device began anew, and has lost this connection; open it again")
            }
            Error::WrongClass(class) => {
                write!(f, "the device is of class {class}, which this driver is not for")
            }
            Error::NoDoorbell => write!(f, "the device offers no doorbell that can be rung here"),
            Error::Gone => write!(f, "the device has gone"),
            Error::Refused { command, status } => write!(f, "{command} was refused: {status}"),
            Error::Class { command, text, .. } => write!(f, "{command} was refused: {text}"),
            Error::TimedOut(command) => write!(f, "{command} took too long, and was given up"),
            Error::Broken(status) => write!(f, "the device ended the connection: {status}"),
            Error::Corrupt(what) => write!(f, "the device broke the protocol: {what}"),
            Error::NoMemory => write!(f, "no memory that the device can reach"),
            Error::Unsupported(what) => write!(f, "not supported: {what}"),
        }
    }
}

impl core::error::Error for Error {}
