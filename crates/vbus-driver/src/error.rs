// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What can go wrong on the driver's side.

use core::fmt;

use vbus_shm::{ErrorCode, Versions};

/// Why something failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The registers do not begin with the magic number, or the function has no vbus capability.
    NotVbus,
    /// The vbus capability has a layout of this version, which this driver does not know.
    Layout(u8),
    /// The device and the driver have no version of the ABI in common.
    Version {
        /// The device's versions.
        device: Versions,
        /// The driver's versions.
        driver: Versions,
    },
    /// The device is of another class.
    WrongClass(u32),
    /// This environment can ring none of the offered kinds of doorbell.
    NoDoorbell,
    /// The function has gone: its registers read as all ones.
    Gone,
    /// The device refused a command.
    Refused {
        /// The command's name in the specification.
        command: &'static str,
        /// The device's error code.
        code: ErrorCode,
    },
    /// The device refused a command with an error code of its class.
    Class {
        /// The command's name in the specification.
        command: &'static str,
        /// The class's code.
        code: ErrorCode,
        /// What it means.
        text: &'static str,
    },
    /// A command took too long, and the driver has given up. The connection is closed. Open it
    /// again.
    TimedOut(&'static str),
    /// The device has ended the connection with this error code. Close it, then open it again.
    Broken(ErrorCode),
    /// The device has another incarnation and has lost the connection. Close it, then open it
    /// again.
    Reincarnated,
    /// The device returned an invalid value, which the text describes. Do not go on with this
    /// connection.
    Corrupt(&'static str),
    /// There is no free memory that the device can reach.
    NoMemory,
    /// The caller asked for something that the device or the ABI does not have.
    Unsupported(&'static str),
}

/// There is no free memory that the device can reach.
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
                write!(f, "the vbus capability has the unknown layout version {layout}")
            }
            Error::Version { device, driver } => {
                write!(f, "the device speaks {device} of the ABI, the driver speaks {driver}")
            }
            Error::Reincarnated => {
                write!(
                    f,
                    "the device restarted or was restored and lost the connection; open again"
                )
            }
            Error::WrongClass(class) => {
                write!(f, "the device has class {class}, and this driver is for another class")
            }
            Error::NoDoorbell => {
                write!(f, "the device offers no doorbell that this driver can ring")
            }
            Error::Gone => write!(f, "the device has gone"),
            Error::Refused { command, code } => write!(f, "{command} was refused: {code}"),
            Error::Class { command, text, .. } => write!(f, "{command} was refused: {text}"),
            Error::TimedOut(command) => {
                write!(f, "{command} took too long; the driver gave up and closed the connection")
            }
            Error::Broken(code) => write!(f, "the device ended the connection: {code}"),
            Error::Corrupt(what) => write!(f, "the device broke the protocol: {what}"),
            Error::NoMemory => write!(f, "there is no free memory that the device can reach"),
            Error::Unsupported(what) => write!(f, "not supported: {what}"),
        }
    }
}

impl core::error::Error for Error {}
