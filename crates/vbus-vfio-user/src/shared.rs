//! The client's end of memory that is reached by message: `DMA_READ` and `DMA_WRITE`, answered from
//! files.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::protocol::{DMA_ACCESS_LEN, DmaAccess};
use crate::version::MAX_TRANSFER;

/// A mapping: part of a file.
struct Mapping {
    size: u64,
    memory: OwnedFd,
    offset: u64,
}

/// The mappings that a client has made, by the address that the device knows them by.
#[derive(Default)]
pub(crate) struct SharedMemory(BTreeMap<u64, Mapping>);

impl SharedMemory {
    pub(crate) fn add(&mut self, address: u64, size: u64, memory: OwnedFd, offset: u64) {
        self.0.insert(address, Mapping { size, memory, offset });
    }

    pub(crate) fn remove(&mut self, address: u64) {
        self.0.remove(&address);
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// The mapping that holds all of an access, and the access's offset in its file.
    fn find(&self, access: DmaAccess) -> Result<(&OwnedFd, u64), Errno> {
        let (start, mapping) = self.0.range(..=access.address).next_back().ok_or(Errno::FAULT)?;
        let within = access.address - start;
        if within.checked_add(access.count).is_none_or(|end| end > mapping.size) {
            return Err(Errno::FAULT);
        }
        Ok((&mapping.memory, mapping.offset + within))
    }

    /// Answers a `DMA_READ` with this body.
    pub(crate) fn read(&self, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let access = DmaAccess::parse(body).map_err(|_| Errno::INVAL)?;
        let count = usize::try_from(access.count).unwrap_or(usize::MAX);
        if count > MAX_TRANSFER {
            return Err(Errno::TOOBIG);
        }
        let (memory, at) = self.find(access)?;
        let mut reply = access.body(&[]);
        reply.resize(DMA_ACCESS_LEN + count, 0);
        let mut done = 0;
        while done < count {
            match rustix::io::pread(memory, &mut reply[DMA_ACCESS_LEN + done..], at + done as u64)?
            {
                0 => return Err(Errno::FAULT),
                n => done += n,
            }
        }
        Ok(reply)
    }

    /// Answers a `DMA_WRITE` with this body.
    pub(crate) fn write(&self, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let (access, data) = DmaAccess::parse_with_data(body).map_err(|_| Errno::INVAL)?;
        let (memory, at) = self.find(access)?;
        let mut done = 0;
        while done < data.len() {
            match rustix::io::pwrite(memory, &data[done..], at + done as u64)? {
                0 => return Err(Errno::FAULT),
                n => done += n,
            }
        }
        Ok(access.body(&[]))
    }
}
