// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A mapped BAR. When its device is unplugged, the kernel removes the mapping, and the next access
//! raises SIGBUS. The handler in this file then maps memory of all ones instead, because a device
//! that has gone reads as all ones on any PCI bus.
#![allow(unsafe_code)] // Maps device registers, and handles the signal of their disappearance.

use std::fs::File;
use std::ptr::NonNull;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering, fence};

use anyhow::{Context, Result, bail};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// The most BARs that this process can map at a time.
const BARS_MAX: usize = 256;

/// The address and the length of each mapped BAR, for the signal handler. An address of 0 means
/// that the entry is free, 1 that a BAR is being mapped.
static MAPPED: [(AtomicUsize, AtomicUsize); BARS_MAX] =
    [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; BARS_MAX];

/// A mapped BAR.
#[derive(Debug)]
pub struct Bar {
    base: NonNull<u8>,
    len: usize,
    slot: usize,
}

// SAFETY: the mapping has device registers. All accesses are aligned volatile reads and writes,
// which the device takes from any thread.
unsafe impl Send for Bar {}
// SAFETY: as above.
unsafe impl Sync for Bar {}

impl Bar {
    /// Maps the first `len` bytes of a sysfs resource file.
    pub fn map(resource: &File, len: usize) -> Result<Bar> {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(handle_sigbus);
        let free = |(_, (base, _)): &(usize, &(AtomicUsize, AtomicUsize))| {
            base.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        let Some((slot, (base_word, len_word))) = MAPPED.iter().enumerate().find(free) else {
            bail!("more than {BARS_MAX} functions at a time");
        };
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let mapped = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                resource,
                0,
            )
        };
        match mapped.ok().and_then(|base| NonNull::new(base.cast::<u8>())) {
            Some(base) => {
                len_word.store(len, Ordering::Relaxed);
                base_word.store(base.as_ptr() as usize, Ordering::Release);
                Ok(Bar { base, len, slot })
            }
            None => {
                base_word.store(0, Ordering::Release);
                mapped.map(drop).context("cannot map the device's registers")?;
                bail!("cannot map the device's registers")
            }
        }
    }

    fn at<T>(&self, offset: u64) -> Option<NonNull<T>> {
        let offset = usize::try_from(offset).ok()?;
        let end = offset.checked_add(size_of::<T>())?;
        if offset % align_of::<T>() != 0 || end > self.len {
            return None;
        }
        // SAFETY: the check above has shown that it is within the mapping.
        Some(unsafe { self.base.add(offset) }.cast())
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

impl Drop for Bar {
    fn drop(&mut self) {
        MAPPED[self.slot].0.store(0, Ordering::Release);
        // SAFETY: this value made the mapping, and nothing borrows from it.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Installs the handler. It replaces that of Rust's runtime for stack overflows, which raise
/// SIGSEGV rather than SIGBUS on Linux.
fn handle_sigbus() {
    // SAFETY: all zeros are a valid sigaction without flags and with an empty mask; `on_sigbus` has
    // the signature that SA_SIGINFO asks for.
    let failed = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction =
            on_sigbus as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) != 0
    };
    if failed {
        tracing::warn!("cannot handle SIGBUS: this program will end if its device is unplugged");
    }
}

/// The handler of SIGBUS. It may interrupt any code, so it only uses atomics and system calls.
extern "C" fn on_sigbus(signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo, and that of a SIGBUS has an address.
    let at = unsafe { (*info).si_addr() } as usize;
    for (base, len) in &MAPPED {
        let (base, len) = (base.load(Ordering::Acquire), len.load(Ordering::Relaxed));
        if base > 1 && (base..base + len).contains(&at) {
            let flags = MapFlags::PRIVATE | MapFlags::FIXED;
            let base = base as *mut u8;
            // SAFETY: this replaces our own mapping, which the kernel has emptied, with memory of
            // the same size, and then fills that memory.
            unsafe {
                if mmap_anonymous(base.cast(), len, ProtFlags::READ | ProtFlags::WRITE, flags)
                    .is_ok()
                {
                    base.write_bytes(0xff, len);
                    return;
                }
            }
        }
    }
    // The address is not in a BAR. The instruction faults again when this function returns, and
    // that ends the program as if there were no handler.
    // SAFETY: resetting a signal's disposition is allowed in a handler.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
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
