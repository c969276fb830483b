// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver's memory. A connector maps it for a device, and the device reaches it through views
//! and windows.
//!
//! A [`MemoryContext`] holds the maps of one connector's peer. A device sees two forms of it:
//!
//! - a [`View`], for buffers whose addresses come with each request. A view is a snapshot of the
//!   maps. Taking one never waits, also under another view. Unmapping waits until no view has the
//!   maps that it takes away. So a device must not hold a view for longer than one poll.
//! - a [`Window`], for a region that stays. A window keeps its mapping alive until it is dropped.
//!   Unmapping memory of a region first ends the connection, which drops its windows.
//!
//! A range may cross from one map into the next if they adjoin: an IOMMU maps page by page.
#![allow(unsafe_code)] // Maps the driver's memory and copies to and from it while the driver may write it.

use std::fmt;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals, fstat};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use vbus_shm::ErrorCode;
use vbus_shm::sync::Word;

use crate::io_vec::{IoVec, IoVecMut};
use crate::lock::lock;

/// The most maps that a peer can have.
pub const MAPS_MAX: usize = 1024;

/// A map with a file begins and ends at a multiple of this many bytes.
pub const PAGE: u64 = 4096;

/// Why the bus refused a map.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The length is 0, address + length wraps around, or the range is not whole pages.
    #[error("bad range {0:#x}+{1:#x}")]
    Range(u64, u64),
    /// The range overlaps an existing map.
    #[error("{0:#x}+{1:#x} overlaps an existing map")]
    Overlap(u64, u64),
    /// The peer has [`MAPS_MAX`] maps.
    #[error("more than {MAPS_MAX} maps")]
    Limit,
    /// All peers together have as many maps as the bus allows.
    #[error("all peers together have more than {MAPS_ALL_MAX} maps")]
    LimitOfAll,
    /// The file ends before the map does.
    #[error("the file ends before the map does")]
    FileTooSmall,
    /// The peer could shrink the file. The bus would die at the next access.
    #[error(
        "the memory's file cannot be sealed against shrinking; use memory-backend-memfd, or let the bus trust this peer's memory files"
    )]
    Unsealed,
    /// The kernel refused.
    #[error("cannot map: {0}")]
    Os(#[from] rustix::io::Errno),
}

/// The most pages of all peers that are mapped one by one for page lists. The kernel allows a
/// process 65530 mappings. A process that has used them up cannot even allocate memory.
const LISTED_MAX: usize = 32768;
/// The most pages of one peer that are mapped one by one.
const LISTED_PEER_MAX: usize = 8192;

/// Number of pages that are mapped one by one, of all peers.
static LISTED: AtomicUsize = AtomicUsize::new(0);

/// A share of the pages that may be mapped one by one. Dropping it gives the share back.
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

/// The most maps of all peers. Together with [`LISTED_MAX`] it leaves some thousands of mappings to
/// the process itself.
const MAPS_ALL_MAX: usize = 24576;

/// Number of maps of all peers.
static MAPS: AtomicUsize = AtomicUsize::new(0);

/// The right to one map. Dropping it gives the right back.
struct MapShare;

impl MapShare {
    fn take() -> Result<MapShare, MapError> {
        let before = MAPS.fetch_add(1, Ordering::Relaxed);
        // On refusal the drop gives it back.
        let share = MapShare;
        if before < MAPS_ALL_MAX { Ok(share) } else { Err(MapError::LimitOfAll) }
    }
}

impl Drop for MapShare {
    fn drop(&mut self) {
        MAPS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The limit that a mapping counts against while it exists.
enum Share {
    /// A map of a peer.
    Map(MapShare),
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
        let share = Share::Map(MapShare::take()?);
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

/// How the peer lets the device access a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Access {
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
}

impl Access {
    /// Only reading.
    pub const READ: Access = Access { read: true, write: false };
    /// Only writing.
    pub const WRITE: Access = Access { read: false, write: true };
    /// Reading and writing.
    pub const BOTH: Access = Access { read: true, write: true };

    /// Reading if `read`, writing if `write`.
    pub const fn new(read: bool, write: bool) -> Access {
        Access { read, write }
    }

    fn allows(self, wanted: Access) -> bool {
        (self.read || !wanted.read) && (self.write || !wanted.write)
    }
}

/// A mapped part of a file.
struct MappedFile {
    mapping: Arc<Mapping>,
    fd: OwnedFd,
    offset: u64,
    access: Access,
}

#[derive(Clone)]
struct Map {
    start: u64,
    len: u64,
    /// `None`: the peer announced the range without a file (another device's BAR, a ROM), or for no
    /// access.
    file: Option<Arc<MappedFile>>,
}

impl Map {
    fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// Ordered by address, without overlaps.
#[derive(Clone, Default)]
struct Table {
    maps: Vec<Map>,
}

/// A part of a range that lies within one map.
struct Run<'t> {
    file: &'t Arc<MappedFile>,
    /// Offset in the map, in bytes.
    inside: usize,
    len: usize,
}

impl Run<'_> {
    fn base(&self) -> NonNull<u8> {
        // SAFETY: a run lies within its map, and so within the mapping.
        unsafe { self.file.mapping.base.add(self.inside) }
    }
}

impl Table {
    /// The first run of `addr..addr + len`: the part within the map that has `addr`.
    fn run(&self, addr: u64, len: usize, access: Access) -> Result<Run<'_>, ErrorCode> {
        let at = self.maps.partition_point(|map| map.end() <= addr);
        let map =
            self.maps.get(at).filter(|map| map.start <= addr).ok_or(ErrorCode::BAD_ADDRESS)?;
        let file = map.file.as_ref().filter(|file| file.access.allows(access));
        let file = file.ok_or(ErrorCode::BAD_ADDRESS)?;
        let inside = addr - map.start;
        let room = usize::try_from(map.len - inside).unwrap_or(usize::MAX);
        let inside = usize::try_from(inside).map_err(|_| ErrorCode::BAD_ADDRESS)?;
        Ok(Run { file, inside, len: len.min(room) })
    }

    /// Calls `each` with the runs of `addr..addr + len`, in order, until one call fails. Returns
    /// the number of runs. The whole range must be mapped for `access`.
    fn runs(
        &self,
        mut addr: u64,
        mut len: usize,
        access: Access,
        mut each: impl FnMut(Run<'_>) -> Result<(), ErrorCode>,
    ) -> Result<usize, ErrorCode> {
        let mut count = 0;
        loop {
            let run = self.run(addr, len, access)?;
            let covered = run.len;
            each(run)?;
            count += 1;
            len -= covered;
            if len == 0 {
                return Ok(count);
            }
            addr = addr.checked_add(covered as u64).ok_or(ErrorCode::BAD_ADDRESS)?;
        }
    }
}

/// Which files a peer may hand over for its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// Only files that are, or can be, sealed against shrinking.
    #[default]
    Sealed,
    /// Any file. A peer that truncates its file kills the bus.
    Any,
}

/// The memory of one connector's peer.
pub struct MemoryContext {
    /// Locked for a few instructions at a time. A view locks it when it begins and when it ends.
    state: Mutex<State>,
    /// Notified when a view ends while a thread waits for that.
    ended: Condvar,
    trust: Trust,
    /// Number of this peer's pages that are mapped one by one.
    listed: Arc<AtomicUsize>,
}

#[derive(Default)]
struct State {
    /// Each view has a clone. With no view the table is changed in place, otherwise it is copied
    /// first.
    table: Arc<Table>,
    /// Number of threads that wait for views to end.
    waiting: usize,
}

impl fmt::Debug for MemoryContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryContext")
            .field("maps", &lock(&self.state).table.maps.len())
            .finish_non_exhaustive()
    }
}

impl MemoryContext {
    /// No memory yet.
    pub fn new(trust: Trust) -> MemoryContext {
        MemoryContext {
            state: Mutex::default(),
            ended: Condvar::new(),
            trust,
            listed: Arc::default(),
        }
    }

    /// Maps `len` bytes of `file` (descriptor, offset) at address `start` of the driver's memory,
    /// for `access`. Without a file, or for no access at all, the context records the range as
    /// unreachable. The file must be sealed against shrinking, or this call seals it (see
    /// [`Trust`]).
    pub fn map(
        &self,
        start: u64,
        len: u64,
        file: Option<(OwnedFd, u64)>,
        access: Access,
    ) -> Result<(), MapError> {
        let bad_range = || MapError::Range(start, len);
        if len == 0 || start.checked_add(len).is_none() {
            return Err(bad_range());
        }
        let bytes = usize::try_from(len).map_err(|_| bad_range())?;
        let file = match file.filter(|_| access.read || access.write) {
            None => None,
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
                let mapping = Arc::new(Mapping::file(&fd, offset, bytes, access.write)?);
                Some(Arc::new(MappedFile { mapping, fd, offset, access }))
            }
        };
        let mut state = lock(&self.state);
        let at = state.table.maps.partition_point(|map| map.end() <= start);
        if state.table.maps.get(at).is_some_and(|next| next.start < start + len) {
            return Err(MapError::Overlap(start, len));
        }
        if state.table.maps.len() >= MAPS_MAX {
            return Err(MapError::Limit);
        }
        Arc::make_mut(&mut state.table).maps.insert(at, Map { start, len, file });
        Ok(())
    }

    /// Takes away the maps that lie within `start..start + len`, and waits until no view has them.
    /// Returns the number of bytes. If the range cuts a map in two or has no map, it returns 0 and
    /// changes nothing. The caller must have closed connections with regions in the range.
    pub(crate) fn unmap(&self, start: u64, len: u64) -> u64 {
        let Some(end) = start.checked_add(len) else { return 0 };
        self.take(|maps| {
            let first = maps.partition_point(|map| map.end() <= start);
            let last = maps.partition_point(|map| map.start < end);
            let whole = first < last && maps[first].start >= start && maps[last - 1].end() <= end;
            if whole { first..last } else { 0..0 }
        })
    }

    /// Takes away all maps, and waits until no view has them.
    pub(crate) fn unmap_all(&self) {
        self.take(|maps| 0..maps.len());
    }

    fn take(&self, which: impl FnOnce(&[Map]) -> Range<usize>) -> u64 {
        let mut state = lock(&self.state);
        let range = which(&state.table.maps);
        if range.is_empty() {
            return 0;
        }
        let taken: Vec<Map> = Arc::make_mut(&mut state.table).maps.drain(range).collect();
        // Views that began before have clones of the table, and so of these maps. Each view ends
        // under the lock, so the last view sees that this thread waits.
        state.waiting += 1;
        while taken.iter().flat_map(|map| &map.file).any(|file| Arc::strong_count(file) > 1) {
            state = self.ended.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        state.waiting -= 1;
        drop(state);
        // The kernel unmaps only here, outside of the lock.
        taken.iter().map(|map| map.len).sum()
    }

    /// A snapshot of the memory. It never waits. Hold it for one poll at most: unmapping waits for
    /// it.
    pub fn view(&self) -> View<'_> {
        View { table: Some(lock(&self.state).table.clone()), context: self }
    }

    /// A lasting window on `addr..addr + len`, for reading and writing. `addr` and `len` must be
    /// multiples of 8.
    pub fn window(&self, addr: u64, len: u64) -> Result<Window, ErrorCode> {
        check_words(addr, len)?;
        let view = self.view();
        let bytes = usize::try_from(len).map_err(|_| ErrorCode::BAD_LENGTH)?;
        let run = view.table().run(addr, bytes, Access::BOTH)?;
        if run.len == bytes {
            let base = run.base().cast();
            return Ok(Window { _mapping: run.file.mapping.clone(), base, words: bytes / 8 });
        }
        // The range crosses maps. Map their pages again, side by side.
        let end = addr.checked_add(len).and_then(|end| end.checked_next_multiple_of(PAGE));
        let first = addr - addr % PAGE;
        let pages = end.ok_or(ErrorCode::BAD_ADDRESS)? - first;
        let pages = usize::try_from(pages).map_err(|_| ErrorCode::BAD_LENGTH)?;
        let whole = self.assemble(&view, &[first], pages)?;
        let skip = usize::try_from(addr - first).map_err(|_| ErrorCode::BAD_ADDRESS)?;
        // SAFETY: `skip` is less than a page, and `whole` has all pages of the range.
        let base = unsafe { whole.base.add(skip) }.cast();
        Ok(Window { base, _mapping: Arc::new(whole), words: bytes / 8 })
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
            .filter(|page| *page as u64 >= PAGE)
            .ok_or(ErrorCode::BAD_ARGUMENT)?;
        check_words(0, len)?;
        let total = page.checked_mul(pages.len()).ok_or(ErrorCode::BAD_LENGTH)?;
        let words =
            usize::try_from(len).ok().filter(|len| *len <= total).ok_or(ErrorCode::BAD_LENGTH)? / 8;
        if pages.iter().any(|addr| addr % page as u64 != 0) {
            return Err(ErrorCode::BAD_ALIGNMENT);
        }
        let whole = self.assemble(&self.view(), pages, page)?;
        Ok(Window { base: whole.base.cast(), _mapping: Arc::new(whole), words })
    }

    /// Maps the `each` bytes (whole pages) at each of the addresses `starts`, one after another.
    fn assemble(&self, view: &View<'_>, starts: &[u64], each: usize) -> Result<Mapping, ErrorCode> {
        let table = view.table();
        let mut count = 0;
        for &start in starts {
            count += table.runs(start, each, Access::BOTH, |_| Ok(()))?;
        }
        let listed = Listed::take(count, &self.listed)?;
        let len = each.checked_mul(starts.len()).ok_or(ErrorCode::BAD_LENGTH)?;
        // Reserve the whole range, then lay the runs over it one by one.
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::empty(), MapFlags::PRIVATE)
        }
        .map_err(|_| ErrorCode::LIMIT)?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(ErrorCode::FAILED)?;
        let whole = Mapping { base, len, _share: Share::Listed(listed) };
        let mut at = 0;
        for &start in starts {
            table.runs(start, each, Access::BOTH, |run| {
                // SAFETY: the target lies within `whole`, which is ours and which nobody uses yet.
                unsafe {
                    mmap(
                        whole.base.add(at).as_ptr().cast(),
                        run.len,
                        ProtFlags::READ | ProtFlags::WRITE,
                        MapFlags::SHARED | MapFlags::FIXED,
                        &run.file.fd,
                        run.file.offset + run.inside as u64,
                    )
                }
                .map_err(|_| ErrorCode::BAD_ADDRESS)?;
                at += run.len;
                Ok(())
            })?;
        }
        Ok(whole)
    }
}

fn check_words(addr: u64, len: u64) -> Result<(), ErrorCode> {
    if len == 0 {
        return Err(ErrorCode::BAD_LENGTH);
    }
    if (addr | len) % 8 != 0 { Err(ErrorCode::BAD_ALIGNMENT) } else { Ok(()) }
}

/// Seals the file against shrinking, unless it is sealed.
fn seal(fd: &OwnedFd) -> Result<(), MapError> {
    let seals = fcntl_get_seals(fd).map_err(|_| MapError::Unsealed)?;
    if seals.contains(SealFlags::SHRINK) {
        return Ok(());
    }
    fcntl_add_seals(fd, SealFlags::SHRINK).map_err(|_| MapError::Unsealed)
}

/// A snapshot of a peer's memory; see [`MemoryContext::view`].
pub struct View<'a> {
    /// `None` only while the view is dropped.
    table: Option<Arc<Table>>,
    context: &'a MemoryContext,
}

impl Drop for View<'_> {
    fn drop(&mut self) {
        let state = lock(&self.context.state);
        // Under the lock: a thread that waits counts the tables that have its maps.
        self.table = None;
        if state.waiting > 0 {
            self.context.ended.notify_all();
        }
    }
}

/// A table without maps.
static EMPTY: Table = Table { maps: Vec::new() };

impl View<'_> {
    fn table(&self) -> &Table {
        self.table.as_deref().unwrap_or(&EMPTY)
    }

    /// The `len` bytes at `addr`. All of them must be mapped, for writing if `write`, else for
    /// reading.
    pub fn slice(&self, addr: u64, len: u64, write: bool) -> Result<DriverSlice<'_>, ErrorCode> {
        let access = if write { Access::WRITE } else { Access::READ };
        let len = usize::try_from(len).map_err(|_| ErrorCode::BAD_LENGTH)?;
        let table = self.table();
        let run = table.run(addr, len, access)?;
        if run.len < len {
            table.runs(addr, len, access, |_| Ok(()))?;
        }
        Ok(DriverSlice { base: run.base(), run: run.len, len, addr, table })
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

/// Bytes of the driver's memory. The driver may write them at any time. So they can be copied, or
/// passed to system calls, but never borrowed. They lie in one piece or in several
/// ([`pieces`](Self::pieces)).
#[derive(Clone, Copy)]
pub struct DriverSlice<'a> {
    base: NonNull<u8>,
    /// Number of bytes at `base`. The table has the rest.
    run: usize,
    len: usize,
    addr: u64,
    table: &'a Table,
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

    /// Splits at byte `mid`. A `mid` beyond the length is cut to the length.
    pub fn split_at(self, mid: usize) -> (DriverSlice<'a>, DriverSlice<'a>) {
        let mid = mid.min(self.len);
        let front = DriverSlice { run: self.run.min(mid), len: mid, ..self };
        (front, self.skip(mid))
    }

    /// The slice without its first `count` bytes. It must have that many.
    fn skip(self, count: usize) -> DriverSlice<'a> {
        let (addr, len) = (self.addr.wrapping_add(count as u64), self.len - count);
        if count < self.run || len == 0 {
            // SAFETY: count <= run.
            let base = unsafe { self.base.add(count.min(self.run)) };
            return DriverSlice { base, run: self.run - count.min(self.run), len, addr, ..self };
        }
        // The whole range was looked up when the slice was made, and the view's table does not
        // change.
        match self.table.run(addr, len, Access { read: false, write: false }) {
            Ok(run) => DriverSlice { base: run.base(), run: run.len, len, addr, ..self },
            Err(_) => DriverSlice { run: 0, len: 0, ..self },
        }
    }

    /// The pieces of the slice, in order. Each is contiguous in this process's memory. A slice has
    /// more than one piece only if it crosses from one map into the next.
    pub fn pieces(&self) -> impl Iterator<Item = DriverSlice<'a>> + use<'a> {
        let mut rest = *self;
        std::iter::from_fn(move || {
            let (piece, after) = rest.split_at(rest.run);
            rest = after;
            (!piece.is_empty()).then_some(piece)
        })
    }

    /// Copies to `out`, as many bytes as the shorter one has. Returns that number.
    pub fn copy_to(&self, out: &mut [u8]) -> usize {
        let mut at = 0;
        for piece in self.pieces() {
            let to = &mut out[at..];
            let len = piece.len.min(to.len());
            // SAFETY: both ranges are valid for len bytes; they may overlap no Rust object but
            // `out`.
            unsafe { copy(piece.base.as_ptr(), to.as_mut_ptr(), len) };
            at += len;
        }
        at
    }

    /// Copies from `bytes`, as many bytes as the shorter one has. Returns that number.
    pub fn copy_from(&self, bytes: &[u8]) -> usize {
        let mut at = 0;
        for piece in self.pieces() {
            let from = &bytes[at..];
            let len = piece.len.min(from.len());
            // SAFETY: as in copy_to.
            unsafe { copy(from.as_ptr(), piece.base.as_ptr(), len) };
            at += len;
        }
        at
    }

    /// Copies from another driver's memory, as many bytes as the shorter one has. Returns that
    /// number.
    pub fn copy_from_driver(&self, from: DriverSlice<'_>) -> usize {
        let total = self.len.min(from.len);
        let (mut to, mut from) = (*self, from);
        let mut left = total;
        while left > 0 {
            let len = left.min(to.run).min(from.run);
            if len == 0 {
                break;
            }
            // SAFETY: both ranges are valid for len bytes. They may overlap, if the peer maps its
            // memory so. The result is then garbage in the peer's own memory.
            unsafe { copy(from.base.as_ptr(), to.base.as_ptr(), len) };
            (to, from, left) = (to.skip(len), from.skip(len), left - len);
        }
        total - left
    }

    /// The bytes for [`writev`](crate::io_vec::writev), which reads them: one vector for each of
    /// the [`pieces`](Self::pieces).
    pub fn io_vecs(&self) -> impl Iterator<Item = IoVec<'a>> + use<'a> {
        // SAFETY: the view keeps the mapping for 'a.
        self.pieces().map(|piece| unsafe { IoVec::shared(piece.base, piece.len) })
    }

    /// The bytes for [`readv`](crate::io_vec::readv), which writes them: one vector for each of the
    /// [`pieces`](Self::pieces).
    pub fn io_vecs_mut(&self) -> impl Iterator<Item = IoVecMut<'a>> + use<'a> {
        // SAFETY: the view keeps the mapping for 'a. References to its bytes are to atomics only.
        self.pieces().map(|piece| unsafe { IoVecMut::shared(piece.base, piece.len) })
    }
}

/// Copies bytes that another process may be writing. On x86-64 it uses an instruction that the
/// compiler cannot look into, so a race gives torn bytes and nothing else. On other machines it
/// copies volatile bytes.
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

/// A lasting mapping of a region of the driver's memory, as words; see [`MemoryContext::window`].
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
        let places: Vec<_> = std::iter::from_fn(|| MapShare::take().ok()).take(MAPPINGS).collect();
        assert!(
            places.len() >= 1024 && places.len() + LISTED_MAX + 4096 < MAPPINGS,
            "{}",
            places.len()
        );
        assert!(matches!(MapShare::take(), Err(MapError::LimitOfAll)));
        drop(places);
        // A share that is given back can be taken again, and a refusal took none.
        assert!(MapShare::take().is_ok());
        assert_eq!(MAPS.load(Ordering::Relaxed), 0);
    }
}
