//! The driver's memory: what a connector maps for a device, and how a device reaches it.
//!
//! A [`MemoryContext`] holds the maps of one connector's peer. A device sees two forms of it:
//!
//! - a [`View`], for buffers whose addresses come with each request: looked up and used while the
//!   view is held, which is as long as one poll. Unmapping waits for all views to go.
//! - a [`Window`], for a region that stays: it keeps its mapping alive until dropped. A region
//!   whose memory is unmapped ends its connection first, and with that drops its windows.
#![allow(unsafe_code)] // Maps the driver's memory and copies to and from it while the driver may write it.

use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard};

use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals, fstat};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use vbus_shm::sync::Word;

use crate::ErrorCode;

/// The most maps of a peer.
pub const MAPS_MAX: usize = 1024;

/// Maps with a file begin and end at multiples of this.
pub const PAGE: u64 = 4096;

/// Why a map was refused.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Length 0, or address + length wraps around, or not whole pages.
    #[error("bad range {0:#x}+{1:#x}")]
    Range(u64, u64),
    /// Overlaps an existing map.
    #[error("{0:#x}+{1:#x} overlaps an existing map")]
    Overlap(u64, u64),
    /// More than [`MAPS_MAX`].
    #[error("more than {MAPS_MAX} maps")]
    Limit,
    /// The peers together have as many as a process can have.
    #[error("all peers together have more than {MAPS_ALL_MAX} maps")]
    LimitOfAll,
    /// The file is smaller than the map says.
    #[error("the file ends before the map does")]
    FileTooSmall,
    /// The file could shrink under us, which would kill the bus at the next access.
    #[error(
        "the memory's file cannot be sealed against shrinking; use memory-backend-memfd, or let the bus trust this peer's memory files"
    )]
    Unsealed,
    /// The kernel refused.
    #[error("cannot map: {0}")]
    Os(#[from] rustix::io::Errno),
}

/// The most pages, over all peers, that are mapped one by one for page lists. The kernel allows a
/// process 65530 mappings in all, and a process that has used them up cannot even allocate.
const LISTED_MAX: usize = 32768;
/// The most of them for one peer.
const LISTED_PEER_MAX: usize = 8192;

/// Pages that are mapped one by one.
static LISTED: AtomicUsize = AtomicUsize::new(0);

/// A share of the pages that may be mapped one by one, given back when dropped.
struct Listed {
    pages: usize,
    peer: Arc<AtomicUsize>,
}

impl Listed {
    fn take(pages: usize, peer: &Arc<AtomicUsize>) -> Result<Listed, ErrorCode> {
        let share = Listed { pages, peer: peer.clone() };
        let peers = peer.fetch_add(pages, Ordering::Relaxed);
        let all = LISTED.fetch_add(pages, Ordering::Relaxed);
        // On refusal the drop gives it back.
        let fits = peers.saturating_add(pages) <= LISTED_PEER_MAX
            && all.saturating_add(pages) <= LISTED_MAX;
        if fits { Ok(share) } else { Err(ErrorCode::LIMIT) }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.peer.fetch_sub(self.pages, Ordering::Relaxed);
        LISTED.fetch_sub(self.pages, Ordering::Relaxed);
    }
}

/// The most maps over all peers. Together with [`LISTED_MAX`] it leaves some thousands of mappings
/// for the process itself.
const MAPS_ALL_MAX: usize = 24576;

/// Maps of all peers.
static MAPS: AtomicUsize = AtomicUsize::new(0);

/// One of the maps that there may be, given back when dropped.
struct Place;

impl Place {
    fn take() -> Result<Place, MapError> {
        let before = MAPS.fetch_add(1, Ordering::Relaxed);
        // On refusal the drop gives it back.
        let place = Place;
        if before < MAPS_ALL_MAX { Ok(place) } else { Err(MapError::LimitOfAll) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        MAPS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a mapping counts as, for as long as it is there.
enum Share {
    /// A map of a peer.
    Map(Place),
    /// Pages mapped one by one.
    Listed(#[expect(dead_code, reason = "held for its drop")] Listed),
}

/// Part of a file, mapped.
struct Mapping {
    base: NonNull<u8>,
    len: usize,
    _share: Share,
}

// SAFETY: the mapping belongs to this value, is never moved, and is accessed only through atomics,
// raw copies and system calls, which any thread may do.
unsafe impl Send for Mapping {}
// SAFETY: as above; there is no unsynchronised state of our own in it.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn file(fd: &OwnedFd, offset: u64, len: usize, writable: bool) -> Result<Mapping, MapError> {
        let share = Share::Map(Place::take()?);
        let prot = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, fd, offset) }?;
        Ok(Mapping {
            base: NonNull::new(base.cast()).ok_or(rustix::io::Errno::INVAL)?,
            len,
            _share: share,
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by us, and nothing that borrows this value is left.
        if let Err(error) = unsafe { munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::error!(%error, "munmap failed");
        }
    }
}

/// What lies behind a mapped range.
enum Backing {
    Mapped {
        mapping: Arc<Mapping>,
        fd: OwnedFd,
        offset: u64,
        writable: bool,
    },
    /// Announced without a file: another device's BAR, a ROM.
    Unreachable,
}

struct Map {
    start: u64,
    len: u64,
    backing: Backing,
}

impl Map {
    fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// Ordered by address, without overlaps.
#[derive(Default)]
struct Table {
    maps: Vec<Map>,
}

impl Table {
    /// The map that holds `addr`.
    fn find(&self, addr: u64) -> Option<&Map> {
        let at = self.maps.partition_point(|map| map.end() <= addr);
        self.maps.get(at).filter(|map| map.start <= addr)
    }

    /// The mapped pointer for `addr..addr + len`, which must lie within one map.
    fn resolve(
        &self,
        addr: u64,
        len: u64,
        write: bool,
    ) -> Result<(&Arc<Mapping>, NonNull<u8>), ErrorCode> {
        let map = self.find(addr).ok_or(ErrorCode::BAD_ADDRESS)?;
        let Backing::Mapped { mapping, writable, .. } = &map.backing else {
            return Err(ErrorCode::BAD_ADDRESS);
        };
        let inside = addr - map.start;
        if len > map.len - inside || (write && !writable) {
            return Err(ErrorCode::BAD_ADDRESS);
        }
        let inside = usize::try_from(inside).map_err(|_| ErrorCode::BAD_ADDRESS)?;
        // SAFETY: inside + len <= the mapping's length.
        Ok((mapping, unsafe { mapping.base.add(inside) }))
    }
}

/// Whether the files that a peer hands over for its memory may be of a kind that could shrink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// Only files that are, or can be, sealed against shrinking.
    #[default]
    Sealed,
    /// Any file. A peer that truncates it kills the bus.
    Any,
}

/// The memory of one connector's peer.
pub struct MemoryContext {
    table: RwLock<Table>,
    trust: Trust,
    /// Pages of it that are mapped one by one.
    listed: Arc<AtomicUsize>,
}

impl fmt::Debug for MemoryContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryContext")
            .field("maps", &self.view().guard.maps.len())
            .finish_non_exhaustive()
    }
}

impl MemoryContext {
    /// No memory yet.
    pub fn new(trust: Trust) -> MemoryContext {
        MemoryContext { table: RwLock::default(), trust, listed: Arc::default() }
    }

    /// Maps `len` bytes of `file` (descriptor, offset) at address `start` of the driver's memory;
    /// without a file the range is remembered as unreachable. The file must be sealed against
    /// shrinking, or get sealed here (see [`Trust`]).
    pub fn map(
        &self,
        start: u64,
        len: u64,
        file: Option<(OwnedFd, u64)>,
        writable: bool,
    ) -> Result<(), MapError> {
        let bad_range = || MapError::Range(start, len);
        if len == 0 || start.checked_add(len).is_none() {
            return Err(bad_range());
        }
        let bytes = usize::try_from(len).map_err(|_| bad_range())?;
        let backing = match file {
            None => Backing::Unreachable,
            Some((fd, offset)) => {
                if (start | len | offset) % PAGE != 0 {
                    return Err(bad_range());
                }
                if self.trust == Trust::Sealed {
                    seal(&fd)?;
                }
                let size = u64::try_from(fstat(&fd)?.st_size).unwrap_or(0);
                if offset.checked_add(len).is_none_or(|end| end > size) {
                    return Err(MapError::FileTooSmall);
                }
                let mapping = Arc::new(Mapping::file(&fd, offset, bytes, writable)?);
                Backing::Mapped { mapping, fd, offset, writable }
            }
        };
        let mut table = self.table.write().unwrap_or_else(|e| e.into_inner());
        let at = table.maps.partition_point(|map| map.end() <= start);
        if table.maps.get(at).is_some_and(|next| next.start < start + len) {
            return Err(MapError::Overlap(start, len));
        }
        if table.maps.len() >= MAPS_MAX {
            return Err(MapError::Limit);
        }
        table.maps.insert(at, Map { start, len, backing });
        Ok(())
    }

    /// Takes away the maps that lie within `start..start + len`, after all views have gone. Returns
    /// how many bytes that were; 0 if the range cuts a map in two or holds none, and then nothing
    /// has changed. Connections with regions in the range must be closed before.
    pub(crate) fn unmap(&self, start: u64, len: u64) -> u64 {
        let Some(end) = start.checked_add(len) else { return 0 };
        let mut table = self.table.write().unwrap_or_else(|e| e.into_inner());
        let first = table.maps.partition_point(|map| map.end() <= start);
        let last = table.maps.partition_point(|map| map.start < end);
        if first >= last || table.maps[first].start < start || table.maps[last - 1].end() > end {
            return 0;
        }
        table.maps.drain(first..last).map(|map| map.len).sum()
    }

    /// Takes away all maps, after all views have gone.
    pub(crate) fn unmap_all(&self) {
        self.table.write().unwrap_or_else(|e| e.into_inner()).maps.clear();
    }

    /// A look at the memory as it is now. Hold it for one poll at most: unmapping waits for it.
    pub fn view(&self) -> View<'_> {
        View { guard: self.table.read().unwrap_or_else(|e| e.into_inner()) }
    }

    /// A look, if it can be had at once. For the memory of *another* device's peer, while holding a
    /// view of one's own: waiting there could close a circle of two devices that wait for each
    /// other and two connectors that unmap.
    pub fn try_view(&self) -> Option<View<'_>> {
        self.table.try_read().ok().map(|guard| View { guard })
    }

    /// A lasting window on `addr..addr + len`, for reading and writing. `addr` and `len` must be
    /// multiples of 8.
    pub fn window(&self, addr: u64, len: u64) -> Result<Window, ErrorCode> {
        check_words(addr, len)?;
        let view = self.view();
        let (mapping, base) = view.guard.resolve(addr, len, true)?;
        let len = usize::try_from(len).map_err(|_| ErrorCode::BAD_LENGTH)?;
        Ok(Window { _mapping: mapping.clone(), base: base.cast(), words: len / 8 })
    }

    /// A lasting window on `len` bytes that lie in pages of `1 << shift` bytes at the addresses
    /// `pages`, as if they were contiguous.
    pub fn window_of_pages(
        &self,
        pages: &[u64],
        shift: u32,
        len: u64,
    ) -> Result<Window, ErrorCode> {
        let page = 1usize
            .checked_shl(shift)
            .filter(|page| *page >= 4096)
            .ok_or(ErrorCode::BAD_ARGUMENT)?;
        check_words(0, len)?;
        let total = page.checked_mul(pages.len()).ok_or(ErrorCode::BAD_LENGTH)?;
        let words =
            usize::try_from(len).ok().filter(|len| *len <= total).ok_or(ErrorCode::BAD_LENGTH)? / 8;
        let listed = Listed::take(pages.len(), &self.listed)?;
        let view = self.view();
        // Reserve the whole range, then lay the pages over it one by one.
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap_anonymous(std::ptr::null_mut(), total, ProtFlags::empty(), MapFlags::PRIVATE)
        }
        .map_err(|_| ErrorCode::LIMIT)?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(ErrorCode::FAILED)?;
        let whole = Mapping { base, len: total, _share: Share::Listed(listed) };
        for (i, &addr) in pages.iter().enumerate() {
            if addr % page as u64 != 0 {
                return Err(ErrorCode::BAD_ALIGNMENT);
            }
            let map = view.guard.find(addr).ok_or(ErrorCode::BAD_ADDRESS)?;
            let Backing::Mapped { fd, offset, writable: true, .. } = &map.backing else {
                return Err(ErrorCode::BAD_ADDRESS);
            };
            let inside = addr - map.start;
            if map.len - inside < page as u64 {
                return Err(ErrorCode::BAD_ADDRESS);
            }
            // SAFETY: the target lies within `whole`, which is ours and which nobody uses yet.
            unsafe {
                mmap(
                    whole.base.add(i * page).as_ptr().cast(),
                    page,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::SHARED | MapFlags::FIXED,
                    fd,
                    offset + inside,
                )
            }
            .map_err(|_| ErrorCode::BAD_ADDRESS)?;
        }
        Ok(Window { base: whole.base.cast(), _mapping: Arc::new(whole), words })
    }
}

fn check_words(addr: u64, len: u64) -> Result<(), ErrorCode> {
    if len == 0 {
        return Err(ErrorCode::BAD_LENGTH);
    }
    if (addr | len) % 8 != 0 { Err(ErrorCode::BAD_ALIGNMENT) } else { Ok(()) }
}

/// Makes sure that the file cannot shrink.
fn seal(fd: &OwnedFd) -> Result<(), MapError> {
    let seals = fcntl_get_seals(fd).map_err(|_| MapError::Unsealed)?;
    if seals.contains(SealFlags::SHRINK) {
        return Ok(());
    }
    fcntl_add_seals(fd, SealFlags::SHRINK).map_err(|_| MapError::Unsealed)
}

/// A look at a peer's memory; see [`MemoryContext::view`].
pub struct View<'a> {
    guard: RwLockReadGuard<'a, Table>,
}

impl View<'_> {
    /// The `len` bytes at `addr`, which must lie within one map; `write` if they will be written.
    pub fn slice(&self, addr: u64, len: u64, write: bool) -> Result<DriverSlice<'_>, ErrorCode> {
        let (_, base) = self.guard.resolve(addr, len, write)?;
        let len = usize::try_from(len).map_err(|_| ErrorCode::BAD_LENGTH)?;
        Ok(DriverSlice { base, len, _view: std::marker::PhantomData })
    }

    /// Copies `out.len()` bytes from `addr`, once.
    pub fn read(&self, addr: u64, out: &mut [u8]) -> Result<(), ErrorCode> {
        self.slice(addr, out.len() as u64, false)?.copy_to(out);
        Ok(())
    }

    /// Copies `bytes` to `addr`.
    pub fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), ErrorCode> {
        self.slice(addr, bytes.len() as u64, true)?.copy_from(bytes);
        Ok(())
    }
}

/// Bytes of the driver's memory. The driver may write them at any time, so they are copied, or
/// passed to system calls; never borrowed.
#[derive(Clone, Copy)]
pub struct DriverSlice<'a> {
    base: NonNull<u8>,
    len: usize,
    _view: std::marker::PhantomData<&'a ()>,
}

// SAFETY: a pointer into a mapping that the view keeps; used by raw copies and system calls only.
unsafe impl Send for DriverSlice<'_> {}

impl<'a> DriverSlice<'a> {
    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Splits at byte `mid`, which is cut to the length.
    pub fn split_at(self, mid: usize) -> (DriverSlice<'a>, DriverSlice<'a>) {
        let mid = mid.min(self.len);
        // SAFETY: mid <= len.
        let rest = unsafe { self.base.add(mid) };
        (DriverSlice { len: mid, ..self }, DriverSlice { base: rest, len: self.len - mid, ..self })
    }

    /// Copies to `out`; as many bytes as the shorter one has.
    pub fn copy_to(&self, out: &mut [u8]) -> usize {
        let len = self.len.min(out.len());
        // SAFETY: both ranges are valid for len bytes; they may overlap no Rust object but `out`.
        unsafe { copy(self.base.as_ptr(), out.as_mut_ptr(), len) };
        len
    }

    /// Copies from `bytes`; as many bytes as the shorter one has.
    pub fn copy_from(&self, bytes: &[u8]) -> usize {
        let len = self.len.min(bytes.len());
        // SAFETY: as in copy_to.
        unsafe { copy(bytes.as_ptr(), self.base.as_ptr(), len) };
        len
    }

    /// Copies from another driver's memory; as many bytes as the shorter one has.
    pub fn copy_from_driver(&self, from: DriverSlice<'_>) -> usize {
        let len = self.len.min(from.len);
        // SAFETY: both ranges are valid for len bytes. They may even overlap: then the result is
        // garbage, which is the peer's own doing.
        unsafe { copy(from.base.as_ptr(), self.base.as_ptr(), len) };
        len
    }

    /// For the vector of a system call that reads the driver's memory. The bytes must not be looked
    /// at by Rust code.
    pub fn io_slice(&self) -> IoSlice<'a> {
        // SAFETY: valid for 'a. The contents are read by the kernel only.
        IoSlice::new(unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) })
    }

    /// For the vector of a system call that writes the driver's memory. The bytes must not be
    /// looked at by Rust code.
    pub fn io_slice_mut(&self) -> IoSliceMut<'a> {
        // SAFETY: valid for 'a. The contents are written by the kernel only.
        IoSliceMut::new(unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) })
    }
}

/// Copies bytes that another process may be writing. On x86-64 by an instruction that the compiler
/// cannot look into, so that a race gives torn bytes and nothing else; elsewhere through volatile
/// bytes.
///
/// # Safety
/// `from` must be readable and `to` writable for `len` bytes.
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise; the direction flag is clear by the ABI.
    unsafe {
        std::arch::asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    for i in 0..len {
        // SAFETY: the caller's promise.
        unsafe { to.add(i).write_volatile(from.add(i).read_volatile()) };
    }
}

/// A lasting window on a region of the driver's memory, as words; see [`MemoryContext::window`].
/// Clones share the mapping.
#[derive(Clone)]
pub struct Window {
    _mapping: Arc<Mapping>,
    base: NonNull<Word>,
    words: usize,
}

// SAFETY: the words are atomics in a mapping that the window keeps alive.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.words * 8
    }
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window").field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

impl vbus_shm::Memory for Window {
    #[inline(always)]
    fn words(&self) -> &[Word] {
        // SAFETY: `words` aligned words, mapped readable and writable as long as the window lives;
        // others access them at will, but Rust only as atomics.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.words) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_cannot_use_up_the_mappings_of_the_process() {
        /// What Linux allows a process (`vm.max_map_count`).
        const MAPPINGS: usize = 65530;
        let places: Vec<_> = std::iter::from_fn(|| Place::take().ok()).take(MAPPINGS).collect();
        assert!(
            places.len() >= 1024 && places.len() + LISTED_MAX + 4096 < MAPPINGS,
            "{}",
            places.len()
        );
        assert!(matches!(Place::take(), Err(MapError::LimitOfAll)));
        drop(places);
        // What one gives back, another may have; and a refusal took none.
        assert!(Place::take().is_ok());
        assert_eq!(MAPS.load(Ordering::Relaxed), 0);
    }
}
