// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why a request of the front end fails.

use rustix::io::Errno;
use vbus_core::{ErrorCode, MapError};

use super::message::Name;
use super::regions::BadRegion;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// This end does not serve it.
    #[error("{0} is not served")]
    Unsupported(Name),
    /// It is of a ring that is not there.
    #[error("there is no ring {0}")]
    Ring(u32),
    /// A ring cannot have this size.
    #[error("ring {0} cannot have {1} descriptors")]
    Size(u32, u32),
    /// A ring is running, and this cannot change meanwhile.
    #[error("{0} while ring {1} is running")]
    Runs(&'static str, usize),
    /// Features that were not offered.
    #[error("features {0:#x} were not offered")]
    Features(u64),
    /// A descriptor is no eventfd.
    #[error("the descriptor for ring {0} is no eventfd")]
    NoEventfd(usize),
    /// The eventfd cannot be used.
    #[error("the eventfd of ring {0} cannot be used: {1}")]
    Eventfd(usize, Errno),
    /// A region cannot be one.
    #[error(transparent)]
    Region(#[from] BadRegion),
    /// A region cannot be mapped.
    #[error("memory at {0:#x} cannot be used: {1}")]
    Map(u64, MapError),
    /// The bitmap of written pages cannot be used.
    #[error("the log cannot be used: {0}")]
    Log(String),
    /// The bitmap of written pages has no bits for some memory.
    #[error("the log covers {covers:#x} bytes, and memory reaches up to {end:#x}")]
    LogShort { covers: u64, end: u64 },
    /// Writes to a used ring are to be logged at another address than they are at.
    #[error("ring {0}: its used ring is to be logged at {1:#x}, where it is not")]
    LogPlace(usize, u64),
    /// The descriptor for the device's own messages is no UNIX stream socket.
    #[error("the descriptor for the device's own messages is no UNIX socket")]
    NoSocket,
    /// Regions of the buffers in flight that cannot be.
    #[error("regions of buffers in flight for {rings} rings of {size} descriptors cannot be")]
    InFlight { rings: u16, size: u16 },
    /// They cannot be made or mapped.
    #[error("the regions of buffers in flight cannot be used: {0}")]
    InFlightMemory(String),
    /// There is no such region.
    #[error("there is no region {0:#x}+{1:#x}")]
    NoRegion(u64, u64),
    /// A part of a ring is in no region.
    #[error("ring {0}: {1:#x} is in no region of memory")]
    Outside(usize, u64),
    /// A ring cannot be used.
    #[error("ring {0} cannot be used: {1}")]
    Queue(usize, String),
    /// The device cannot work.
    #[error("the device cannot work: {0}")]
    Device(ErrorCode),
    /// An MTU that the device does not have.
    #[error("the device has an MTU of {has}, less than {wants}")]
    Mtu { wants: u64, has: u64 },
    /// The device configuration cannot be written.
    #[error("the device configuration cannot be written")]
    Config,
    /// A number that is no device status.
    #[error("{0:#x} is no device status")]
    Status(u64),
}
