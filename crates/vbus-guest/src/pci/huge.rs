// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory of a process that a device can reach: huge pages. The kernel never moves them to other
//! physical addresses.
#![allow(unsafe_code)] // Maps shared memory.

use std::fs;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use vbus_driver::Dma;
use vbus_shm::Memory;
use vbus_shm::sync::Word;

/// A huge page has `1 << PAGE_SHIFT` bytes: 2 MiB.
const PAGE_SHIFT: u8 = 21;
const PAGE: usize = 1 << PAGE_SHIFT;
const SMALL_PAGE: usize = 4096;
const NR: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// The number of huge pages that the kernel reserved for this process. [`give_back`] undoes it.
static RESERVED: Mutex<usize> = Mutex::new(0);

/// Some huge pages, contiguous in this process.
#[derive(Debug)]
struct Pages {
    base: NonNull<u8>,
    addresses: Vec<u64>,
}

// SAFETY: the mapping belongs to this value. All accesses are atomics and system calls, which any
// thread may use.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    fn map(count: usize) -> Result<Pages> {
        let base = match try_map(count) {
            Err(Errno::NOMEM) => {
                reserve(count)?;
                try_map(count)
            }
            other => other,
        };
        let base = base.with_context(|| format!("cannot map {count} huge pages of 2 MiB"))?;
        // This value owns the mapping, so an error below unmaps it.
        let mut pages = Pages { base, addresses: vec![0; count] };
        pages.addresses = physical(base.as_ptr() as usize, count)?;
        Ok(pages)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: this value made the mapping, and every borrower holds an Arc of this value.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.addresses.len() * PAGE) };
    }
}

fn try_map(count: usize) -> Result<NonNull<u8>, Errno> {
    // The mapping is shared, because copy-on-write after a fork could move a private one.
    let flags = MapFlags::SHARED | MapFlags::HUGETLB | MapFlags::HUGE_2MB | MapFlags::POPULATE;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let base = unsafe {
        mmap_anonymous(
            std::ptr::null_mut(),
            count * PAGE,
            ProtFlags::READ | ProtFlags::WRITE,
            flags,
        )?
    };
    NonNull::new(base.cast()).ok_or(Errno::NOMEM)
}

/// Makes the kernel reserve `count` more huge pages.
fn reserve(count: usize) -> Result<()> {
    let read = || -> Result<usize> {
        let text = fs::read_to_string(NR)
            .with_context(|| format!("this kernel has no huge pages of 2 MiB ({NR})"))?;
        Ok(text.trim().parse()?)
    };
    let mut reserved = RESERVED.lock().unwrap_or_else(PoisonError::into_inner);
    let before = read()?;
    fs::write(NR, (before + count).to_string()).with_context(|| {
        format!(
            "not enough huge pages, and no permission to reserve them: as root, `echo {} > {NR}`",
            before + count
        )
    })?;
    let mut after = read()?;
    if after < before + count {
        // The free memory may be scattered. The kernel can compact it.
        let _ = fs::write("/proc/sys/vm/compact_memory", "1");
        let _ = fs::write(NR, (before + count).to_string());
        after = read()?;
    }
    *reserved += after.saturating_sub(before);
    ensure!(
        after >= before + count,
        "the kernel found only {} of {count} huge pages of 2 MiB: memory is too full or too \
         scattered; boot with `hugepages={}` on the \
         kernel's command line",
        after.saturating_sub(before),
        before + count,
    );
    tracing::info!("reserved {count} huge pages of 2 MiB, {after} in all, until this program ends");
    Ok(())
}

/// Gives the reserved huge pages back to the kernel. The caller must have dropped all functions.
pub fn give_back() {
    let mut reserved = RESERVED.lock().unwrap_or_else(PoisonError::into_inner);
    if *reserved > 0 {
        let now = fs::read_to_string(NR).ok().and_then(|text| text.trim().parse::<usize>().ok());
        let undone = now.map(|now| fs::write(NR, now.saturating_sub(*reserved).to_string()));
        if !matches!(undone, Some(Ok(()))) {
            tracing::warn!("{} huge pages of 2 MiB stay reserved ({NR})", *reserved);
        }
        *reserved = 0;
    }
}

/// The physical addresses of the `count` huge pages that are mapped and present at `base`.
fn physical(base: usize, count: usize) -> Result<Vec<u64>> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let pagemap = fs::File::open("/proc/self/pagemap")
        .context("cannot read physical addresses from /proc/self/pagemap")?;
    let address = |page: usize| {
        let mut entry = [0; 8];
        pagemap.read_exact_at(&mut entry, ((base + page * PAGE) / SMALL_PAGE * 8) as u64)?;
        let entry = u64::from_le_bytes(entry);
        let frame = entry & FRAME;
        ensure!(
            entry & PRESENT != 0 && frame != 0,
            "the kernel does not tell physical addresses: this needs CAP_SYS_ADMIN"
        );
        let address = frame * SMALL_PAGE as u64;
        ensure!(address % PAGE as u64 == 0, "a huge page is not where one can be");
        Ok(address)
    };
    (0..count).map(address).collect()
}

/// The memory of one function. It keeps every allocation until it is dropped itself, so that an
/// open device never has memory that belongs to somebody else.
#[derive(Debug, Default)]
pub struct Pool(Mutex<PoolPages>);

#[derive(Debug, Default)]
struct PoolPages {
    all: Vec<Arc<Pages>>,
    /// The bytes in use of the page `small`.
    used: usize,
    /// The page that small allocations share.
    small: Option<Arc<Pages>>,
}

impl Pool {
    /// Allocates `bytes` of zeroed memory, rounded up to a multiple of 4 KiB.
    pub fn alloc(&self, bytes: usize) -> Result<HugeMemory> {
        let len = bytes.max(1).next_multiple_of(SMALL_PAGE);
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pages) = pool.small.clone().filter(|_| PAGE - pool.used >= len) {
            let offset = pool.used;
            pool.used += len;
            return Ok(HugeMemory { pages, offset, len });
        }
        let pages = Arc::new(Pages::map(len.div_ceil(PAGE))?);
        pool.all.push(pages.clone());
        if len < PAGE {
            pool.small = Some(pages.clone());
            pool.used = len;
        }
        Ok(HugeMemory { pages, offset: 0, len })
    }
}

/// An allocation in huge pages.
#[derive(Clone, Debug)]
pub struct HugeMemory {
    pages: Arc<Pages>,
    offset: usize,
    len: usize,
}

impl Memory for HugeMemory {
    #[inline(always)]
    fn words(&self) -> &[Word] {
        // SAFETY: the range is within the mapping, which `pages` keeps, and is aligned to 4096. All
        // accesses are atomics and system calls.
        unsafe {
            let base = self.pages.base.add(self.offset).cast::<Word>();
            std::slice::from_raw_parts(base.as_ptr(), self.len / size_of::<Word>())
        }
    }
}

impl Dma for HugeMemory {
    fn page_shift(&self) -> u8 {
        let follow = |pair: &[u64]| pair[1] == pair[0] + PAGE as u64;
        if self.pages.addresses.windows(2).all(follow) { 0 } else { PAGE_SHIFT }
    }

    fn address(&self, offset: usize) -> u64 {
        let at = self.offset + offset;
        self.pages.addresses.get(at / PAGE).map_or(0, |page| page + (at % PAGE) as u64)
    }
}
