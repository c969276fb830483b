// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Shared memory: pages of a memfd, mapped once for the life of the process.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use vbus_shm::sync::Word;

/// A mapping that is never taken back.
#[derive(Clone, Copy)]
pub struct Region {
    at: NonNull<u8>,
    bytes: usize,
}

// SAFETY: an address; all accesses are atomic, or ordered by the protocol that is measured.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Fresh zeroed pages.
    pub fn new(bytes: usize) -> Region {
        Self::with_file(bytes).0
    }

    /// The same, with the file by which another process can map them.
    pub fn with_file(bytes: usize) -> (Region, OwnedFd) {
        // Without CLOEXEC: the other process inherits it.
        let file = memfd_create("vbus-bench", MemfdFlags::empty()).expect("memfd_create");
        ftruncate(&file, bytes.next_multiple_of(4096) as u64).expect("ftruncate");
        (Self::map(&file, bytes), file)
    }

    /// Maps `file`.
    pub fn map(file: &OwnedFd, bytes: usize) -> Region {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: at an address of the kernel's choice.
        let at =
            unsafe { mmap(std::ptr::null_mut(), bytes, protection, flags, file, 0) }.expect("mmap");
        Region { at: NonNull::new(at.cast()).expect("mmap never maps page 0"), bytes }
    }

    pub fn words(self) -> &'static [Word] {
        // SAFETY: mapped for ever, accessed as atomics.
        unsafe { vbus_shm::raw::words(self.at, self.bytes) }.expect("pages are aligned")
    }

    pub fn pointer(self) -> *mut u8 {
        self.at.as_ptr()
    }
}
