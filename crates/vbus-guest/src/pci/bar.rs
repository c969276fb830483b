// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A mapped BAR. When its device is unplugged, the kernel removes the mapping, and the next access
//! raises SIGBUS. `vbus_mapping` handles it: memory of all ones takes the BAR's place, because a
//! device that has gone reads as all ones on any PCI bus.
#![allow(unsafe_code)] // Accesses device registers.

use std::fs::File;
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};

use anyhow::{Context, Result};
use rustix::mm::ProtFlags;
use vbus_mapping::{Backing, Mapping};

/// A mapped BAR.
#[derive(Debug)]
pub struct Bar(Mapping);

impl Bar {
    /// Maps the first `len` bytes of a sysfs resource file, which is that of whole pages.
    pub fn map(resource: &File, len: usize) -> Result<Bar> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let map = || Mapping::file(resource, 0, len, prot, &Backing::ones(len)?);
        map().map(Bar).context("cannot map the device's registers")
    }

    fn at<T>(&self, offset: u64) -> Option<NonNull<T>> {
        let offset = usize::try_from(offset).ok()?;
        let end = offset.checked_add(size_of::<T>())?;
        if offset % align_of::<T>() != 0 || end > self.0.len() {
            return None;
        }
        // SAFETY: the check above has shown that it is within the mapping.
        Some(unsafe { self.0.base().add(offset) }.cast())
    }

    /// Reads 4 or 8 bytes at `offset`. Returns `None` if they are unaligned or outside of the BAR.
    pub fn read<T: Copy>(&self, offset: u64) -> Option<T> {
        let at = self.at::<T>(offset)?;
        // SAFETY: mapped and aligned; `T` is u32 or u64, for which any bytes will do.
        let value = unsafe { at.read_volatile() };
        // All that the device wrote before it answered is visible after the read.
        fence(Ordering::Acquire);
        Some(value)
    }

    /// Writes 4 or 8 bytes at `offset`, after all earlier writes to memory. Does nothing if they
    /// are unaligned or outside of the BAR.
    pub fn write<T: Copy>(&self, offset: u64, value: T) {
        if let Some(at) = self.at::<T>(offset) {
            fence(Ordering::SeqCst);
            // SAFETY: mapped and aligned.
            unsafe { at.write_volatile(value) };
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    #[test]
    fn accesses_stay_within_and_aligned() {
        let file = File::from(memfd_create("bar", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, 0x4000).unwrap();
        let bar = Bar::map(&file, 0x4000).unwrap();
        bar.write(0x3ff8, 0x1122_3344_5566_7788u64);
        assert_eq!(bar.read::<u32>(0x3ffc), Some(0x1122_3344));
        assert_eq!(bar.read::<u64>(0x3ffc), None);
        assert_eq!(bar.read::<u32>(2), None);
        assert_eq!(bar.read::<u32>(0x4000), None);
        assert_eq!(bar.read::<u32>(u64::MAX - 1), None);
        bar.write(0x4000, 1u32);
    }

    #[test]
    fn a_bar_without_its_device_reads_as_all_ones() {
        let file = || File::from(memfd_create("bar", MemfdFlags::CLOEXEC).unwrap());
        // Several times, because a wrong handler could work for one fault only.
        for _ in 0..3 {
            let (gone, stays) = (file(), file());
            ftruncate(&gone, 0x4000).unwrap();
            ftruncate(&stays, 0x4000).unwrap();
            let (gone_bar, other) =
                (Bar::map(&gone, 0x4000).unwrap(), Bar::map(&stays, 0x4000).unwrap());
            assert_eq!(gone_bar.read::<u32>(0x1000), Some(0));
            // An access beyond the end of the file raises the same signal as one to a device that
            // was unplugged.
            ftruncate(&gone, 0).unwrap();
            gone_bar.write(0x1000, 1u32);
            assert_eq!(gone_bar.read::<u32>(0), Some(u32::MAX));
            assert_eq!(gone_bar.read::<u64>(0x3ff8), Some(u64::MAX));
            assert_eq!(other.read::<u32>(0), Some(0));
        }
    }
}
