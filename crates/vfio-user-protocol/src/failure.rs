// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why a command failed.

use std::fmt;

use rustix::io::Errno;

use crate::message::{Malformed, MigrationState};
use crate::migration::{MAX_LOGGING_RANGES, MigrationArc};
use crate::version::MAX_TRANSFER;

/// The most writes in one `REGION_WRITE_MULTI`. QEMU sends up to 200.
pub(crate) const MAX_MULTI_WRITES: usize = 256;

/// The reason why a command failed. The client gets the errno, and the log the text.
#[derive(Debug)]
pub(crate) enum Failure {
    Malformed(Malformed),
    Descriptors { expected: &'static str, got: usize },
    NoSuch(&'static str, u32),
    Outside { region: u32, offset: u64, count: u64, size: u64 },
    TooMuch(u64),
    TooManyWrites(usize),
    NotAllowed(&'static str, u32),
    IrqRange { index: u32, start: u32, count: u32, have: u32 },
    BadRange(u64, u64),
    Overlap(u64, u64),
    TooManyMaps(usize),
    Offset(u64),
    NotEventfd,
    Cut(u64, u64),
    Unsupported(&'static str),
    Unknown,
    WrongDirection,
    Feature(u16),
    Migration(Refusal),
    Device(Errno),
}

impl Failure {
    pub(crate) fn errno(&self) -> Errno {
        match self {
            Self::Overlap(..) => Errno::EXIST,
            Self::TooManyMaps(_) => Errno::NOSPC,
            Self::NotAllowed(..) => Errno::PERM,
            Self::Unsupported(_) => Errno::OPNOTSUPP,
            Self::Unknown => Errno::NOSYS,
            // The kernel's VFIO answers the same. For QEMU it means "not supported", which is no
            // fault.
            Self::Feature(_) => Errno::NOTTY,
            Self::Migration(Refusal::TooManyRanges(_)) => Errno::TOOBIG,
            Self::Migration(Refusal::Arc(_, errno)) | Self::Device(errno) => *errno,
            _ => Errno::INVAL,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(e) => e.fmt(f),
            Self::Descriptors { expected, got } => {
                write!(f, "{got} descriptors where {expected} belong")
            }
            Self::NoSuch(what, index) => write!(f, "no {what} {index}"),
            Self::Outside { region, offset, count, size } => {
                write!(f, "{count} bytes at {offset:#x} of region {region}, which has {size:#x}")
            }
            Self::TooMuch(count) => write!(f, "{count} bytes, at most {MAX_TRANSFER} are allowed"),
            Self::TooManyWrites(count) => {
                write!(f, "{count} writes, at most {MAX_MULTI_WRITES} are allowed")
            }
            Self::NotAllowed(what, region) => write!(f, "region {region} cannot be {what}"),
            Self::IrqRange { index, start, count, have } => {
                write!(f, "interrupts {start} and {count} on of index {index}, which has {have}")
            }
            Self::BadRange(address, size) => {
                write!(f, "no range of whole pages: {size:#x} bytes at {address:#x}")
            }
            Self::Overlap(address, size) => {
                write!(f, "{size:#x} bytes at {address:#x} are mapped already")
            }
            Self::TooManyMaps(most) => write!(f, "{most} mappings are the most"),
            Self::Offset(offset) => write!(f, "file offset {offset:#x} without a file"),
            Self::NotEventfd => write!(f, "a descriptor that is no eventfd"),
            Self::Cut(address, size) => {
                write!(f, "{size:#x} bytes at {address:#x} are not whole mappings")
            }
            Self::Unsupported(what) => write!(f, "{what} is not supported"),
            Self::Unknown => write!(f, "no such command"),
            Self::WrongDirection => write!(f, "a command that only servers send"),
            Self::Feature(number) => write!(f, "no device feature {number}"),
            Self::Migration(refusal) => refusal.fmt(f),
            Self::Device(errno) => write!(f, "refused by the device: {errno}"),
        }
    }
}

impl From<Malformed> for Failure {
    fn from(e: Malformed) -> Self {
        Self::Malformed(e)
    }
}

impl From<Errno> for Failure {
    fn from(e: Errno) -> Self {
        Self::Device(e)
    }
}

/// Why a command of a migration failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("feature {0} does not have the asked method")]
    Method(u16),
    #[error("argsz {argsz} below the {need} bytes of the reply")]
    NoRoom { argsz: u32, need: usize },
    #[error("no way from the state {0:?} to the state {1:?}")]
    NoWay(MigrationState, MigrationState),
    #[error("the device's state cannot be {0} in the state {1:?}")]
    State(&'static str, MigrationState),
    #[error("the device refuses {0:?}: {1}")]
    Arc(MigrationArc, Errno),
    #[error("{0} ranges, at most {MAX_LOGGING_RANGES} are allowed")]
    TooManyRanges(usize),
    #[error("a page of {0:#x} bytes, which is no power of two")]
    PageSize(u64),
    #[error("{1:#x} bytes at {0:#x}: empty, too long, or within another range")]
    Range(u64, u64),
    #[error("{}", if *.0 { "the log is on, with other ranges or pages" } else { "the log is off" })]
    Logging(bool),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Migration(refusal)
    }
}
