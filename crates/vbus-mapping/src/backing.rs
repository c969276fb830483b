// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What stands behind the mappings of one peer: whether its memory was lost, and the memory that
//! the signal handler lays over the lost parts.

use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// The handler replaces this many bytes at a time, and at least one page of the file. It is much,
/// so that a peer cannot cause a signal for each page. It is not the whole mapping, because the
/// kernel takes long to unmap much memory.
const GRAIN: usize = 2 << 20;

/// The most parts of one peer's mappings that the handler replaces one by one. Each is a mapping of
/// its own, and the kernel allows a process some 65,000.
const PARTS_MAX: usize = 64;

/// What stands behind the mappings of one peer.
///
/// It keeps some memory ready for the signal handler, the *spare*. The handler maps the spare over
/// each lost part, as often as it is needed. So the lost parts of a peer's mappings all show the
/// same few bytes. They cost no memory, and cannot fail for lack of it. When a peer has lost many
/// parts, the handler replaces whole mappings by private zeros instead. Those cost memory where
/// somebody writes.
pub struct Backing {
    /// Stored by the handler with `Release`; [`is_lost`](Self::is_lost) loads it with `Acquire`.
    lost: AtomicBool,
    /// Parts that the handler has replaced. Only a count: `Relaxed` suffices.
    parts: AtomicUsize,
    /// The largest of `spares`. Stored with `Release` when it has been made; the handler loads it
    /// with `Acquire`.
    current: AtomicPtr<Spare>,
    /// All spares so far. The handler may still use an older one.
    spares: Mutex<Vec<NonNull<Spare>>>,
}

// SAFETY: the pointers lead to values that live as long as this one and are never changed.
unsafe impl Send for Backing {}
// SAFETY: as above.
unsafe impl Sync for Backing {}

/// Shared anonymous memory. The kernel has promised its pages when it was mapped.
struct Spare {
    base: NonNull<u8>,
    len: usize,
}

impl Spare {
    fn new(len: usize) -> Result<Spare, Errno> {
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
            )?
        };
        Ok(Spare { base: NonNull::new(base.cast()).ok_or(Errno::NOMEM)?, len })
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        // SAFETY: this value made the mapping, and only the handler uses it.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

impl Backing {
    /// Lost parts read as zeros, until somebody writes there. `page` is the size of the largest
    /// page of the files in bytes (see [`reserve`](Self::reserve)).
    ///
    /// # Errors
    /// The kernel has no memory to promise.
    pub fn zeros(page: usize) -> Result<Arc<Backing>, Errno> {
        let backing = Backing {
            lost: AtomicBool::new(false),
            parts: AtomicUsize::new(0),
            current: AtomicPtr::new(std::ptr::null_mut()),
            spares: Mutex::default(),
        };
        backing.reserve(page)?;
        Ok(Arc::new(backing))
    }

    /// Lost parts of mappings of at most `len` bytes read as all ones, as a PCI device that has
    /// gone. `len` is that of whole pages.
    ///
    /// # Errors
    /// The kernel has no memory to promise.
    pub fn ones(len: usize) -> Result<Arc<Backing>, Errno> {
        let backing = Backing::zeros(len)?;
        let spare = backing.spare().ok_or(Errno::NOMEM)?;
        // SAFETY: the spare has at least `len` bytes, and nothing else uses it yet.
        unsafe { spare.0.as_ptr().write_bytes(0xff, len.min(spare.1)) };
        Ok(backing)
    }

    /// Prepares for mappings of files with pages of `page` bytes. It must be called before such a
    /// file is mapped.
    ///
    /// # Errors
    /// The kernel has no memory to promise.
    pub fn reserve(&self, page: usize) -> Result<(), Errno> {
        let len = page.max(GRAIN);
        let mut spares = self.spares.lock().unwrap_or_else(PoisonError::into_inner);
        if self.spare().is_some_and(|(_, have)| have >= len) {
            return Ok(());
        }
        let spare = NonNull::from(Box::leak(Box::new(Spare::new(len)?)));
        spares.push(spare);
        self.current.store(spare.as_ptr(), Ordering::Release);
        Ok(())
    }

    /// Whether an access has found no memory. It stays true.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Marks the memory as lost. A signal handler may call it.
    pub(crate) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// Counts a part of a mapping that is to be replaced. False: there are enough of them. A signal
    /// handler may call it.
    pub(crate) fn may_split(&self) -> bool {
        self.parts.fetch_add(1, Ordering::Relaxed) < PARTS_MAX
    }

    /// Address and length of the spare. A signal handler may call it.
    pub(crate) fn spare(&self) -> Option<(NonNull<u8>, usize)> {
        // SAFETY: null, or a spare that lives as long as this value.
        let spare = unsafe { self.current.load(Ordering::Acquire).as_ref() }?;
        Some((spare.base, spare.len))
    }

    /// How many bytes the handler replaces at a time in a mapping with pages of `page` bytes.
    pub(crate) fn grain(page: usize) -> usize {
        GRAIN.max(page)
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        let spares = self.spares.get_mut().unwrap_or_else(PoisonError::into_inner);
        for spare in spares.drain(..) {
            // SAFETY: `reserve` leaked it, and no mapping uses this backing any more.
            drop(unsafe { Box::from_raw(spare.as_ptr()) });
        }
    }
}

impl fmt::Debug for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backing").field("lost", &self.is_lost()).finish_non_exhaustive()
    }
}
