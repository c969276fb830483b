// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory in which the device keeps which buffers are in flight. The front end has it, so it
//! outlives this process.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vbus_core::memory::PAGE;
use vbus_core::{Access, MemoryContext};

use super::failure::Failure;
use super::message::InFlight;
use crate::queue::{Format, InFlightRegion, SIZE_MAX};

/// Bytes of the regions of `asked` for rings of `format`, in whole pages. A device has `rings`
/// rings.
fn bytes(asked: &InFlight, format: Format, rings: usize) -> Result<u64, Failure> {
    let InFlight { rings: count, ring_size: size, .. } = *asked;
    if !(1..=rings).contains(&count.into()) || !(1..=SIZE_MAX).contains(&size) {
        return Err(Failure::InFlight { rings: count, size });
    }
    let all = InFlightRegion::bytes(format, size) * u64::from(count);
    Ok(all.next_multiple_of(PAGE))
}

/// Fresh memory for the front end, and what it has to know of it.
pub fn make(
    asked: &InFlight,
    format: Format,
    rings: usize,
) -> Result<(InFlight, OwnedFd), Failure> {
    let size = bytes(asked, format, rings)?;
    let failed = |error: rustix::io::Errno| Failure::InFlightMemory(error.to_string());
    let file = memfd_create("vbus-in-flight", MemfdFlags::CLOEXEC).map_err(failed)?;
    ftruncate(&file, size).map_err(failed)?;
    Ok((InFlight { size, offset: 0, ..*asked }, file))
}

/// The memory that the front end has sent back.
#[derive(Debug)]
pub struct Kept {
    memory: Arc<MemoryContext>,
    format: Format,
    rings: u16,
    size: u16,
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Kept { format, rings, size, .. } = self;
        let format = match format {
            Format::Split => "split",
            Format::Packed => "packed",
        };
        write!(f, "{rings} {format} rings of {size}")
    }
}

impl Kept {
    /// Maps it. `context` has no memory yet.
    pub fn new(
        told: &InFlight,
        file: impl AsFd,
        format: Format,
        rings: usize,
        context: MemoryContext,
    ) -> Result<Kept, Failure> {
        let needed = bytes(told, format, rings)?;
        let InFlight { rings, ring_size: size, .. } = *told;
        if told.size < needed {
            return Err(Failure::InFlight { rings, size });
        }
        let mapped = context.map(0, needed, Some((file, told.offset)), Access::BOTH);
        mapped.map_err(|error| Failure::InFlightMemory(error.to_string()))?;
        Ok(Kept { memory: Arc::new(context), format, rings, size })
    }

    /// Nothing is in flight in any ring.
    pub fn settle(&self) {
        let regions =
            (0..self.rings.into()).filter_map(|at| self.region(at, self.format, self.size));
        regions.for_each(|region| region.settle());
    }

    /// The region of ring `at`, if there is one for a ring of this format and size.
    pub fn region(&self, at: usize, format: Format, size: u16) -> Option<InFlightRegion> {
        let is_there = at < usize::from(self.rings) && (format, size) == (self.format, self.size);
        let base = InFlightRegion::bytes(format, size) * at as u64;
        is_there.then(|| InFlightRegion::new(self.memory.clone(), base, format, size))
    }
}
