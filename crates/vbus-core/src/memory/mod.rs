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
//!
//! The context maps each file of the peer once, as much of it as is needed. All maps of the file
//! are parts of that mapping. It stays until the last of these maps and the last window have gone.
//! A thread of its own then unmaps it.
//!
//! While a peer's machine is moved, the context has a *log* ([`MemoryContext::start_log`]): the
//! pages that the device has written. Each way of writing has its place in it. A view logs its
//! writes if it was taken after the start. A window asks after each call of an end. Both mark a
//! page after they have written it (`page_bits.rs` says why that is the right order). Without a
//! log, a write through a view costs one load that is not atomic and a branch, and a call of a
//! window's end a relaxed load and a branch.
//!
//! The peer may truncate its file, or punch holes into it. An access to what is gone reads zeros,
//! and [`MemoryContext::is_lost`] becomes true (see `vbus_mapping`). The bus then ends the peer's
//! connection. A budget for each [`Resource`] bounds what all this costs
//! the process.
#![allow(unsafe_code)] // Gives out addresses in the driver's memory.

mod budget;
mod file;
mod integer;
mod log;
mod peer_bitmap;
mod process;
mod regions;
mod saved;
mod slice;
mod table;
mod window;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};

use rustix::io::Errno;
use serde_json::Value;
use vbus_mapping::{Backing, Mapping, Piece};
use vbus_shm::ErrorCode;

pub(crate) use self::budget::Budget;
use self::budget::{Account, Share};
pub use self::budget::{Charge, Exceeded, METRICS, Resource, limit_pages};
pub use self::file::IOCTLS;
use self::file::{FileKey, Found, SharedFile};
pub use self::integer::SharedInteger;
pub use self::log::LogError;
use self::log::{Log, LogSlot};
pub use self::peer_bitmap::PeerBitmap;
pub use self::process::PeerProcess;
pub use self::regions::{Follower, NoRegions, Region, Regions};
pub use self::saved::{SavedMap, SavedMaps};
pub use self::slice::DriverSlice;
use self::table::{EMPTY, Map, Place, Run, Table};
pub use self::window::Window;
use self::window::{Keep, Origin};
use crate::lock::lock;

/// The most maps that a peer can have.
pub const MAPS_MAX: usize = 65_535;

/// The most pieces of a region: single pages of the largest one, which may begin within a page.
const PIECES_MAX: usize = 4096 + 1;

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
    /// The peer would take too much of what the process has.
    #[error("it exceeds {0}")]
    Budget(Exceeded),
    /// The file has grown too often since it was first mapped.
    #[error("the file has more parts than can be mapped")]
    Parts,
    /// The file ends before the map does.
    #[error("the file ends before the map does")]
    FileTooSmall,
    /// The descriptor is of something else than a file.
    #[error("the descriptor is no file")]
    NoFile,
    /// The peer may have made the file system, and could let an access wait for ever.
    #[error(
        "the memory's file is in a file system{} that a peer may have made; these can be used: {}",
        .0.map(|kind| format!(" of type {kind:#x}")).unwrap_or_default(),
        file::file_systems()
    )]
    FileSystem(Option<u64>),
    /// The peer wants the device to write a file that cannot be written.
    #[error("the file cannot be mapped for writing")]
    ReadOnly,
    /// The kernel refused.
    #[error("cannot map: {0}")]
    Os(#[from] Errno),
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

/// A table that views may have.
#[derive(Default)]
struct Snapshot {
    table: Table,
    /// Number of views that have it. Changed only under the lock of `current`.
    views: AtomicUsize,
    /// Another snapshot has taken its place.
    replaced: AtomicBool,
}

impl Snapshot {
    /// The number of views changes. The lock of `current` is held, so nothing is between the load
    /// and the store; an atomic addition would cost as much as taking a lock.
    #[inline]
    fn count_views(&self, change: isize) {
        let views = self.views.load(Ordering::Relaxed).wrapping_add_signed(change);
        self.views.store(views, Ordering::Relaxed);
    }
}

/// What views need. Locked for a few instructions at a time.
#[derive(Default)]
struct Current {
    snapshot: Arc<Snapshot>,
    /// Earlier snapshots that views still have.
    earlier: Vec<Weak<Snapshot>>,
    /// Number of threads that wait for views to end.
    waiting: usize,
}

/// What changes of the maps need. Locked during a change.
struct Changes {
    files: HashMap<FileKey, Weak<SharedFile>>,
    /// What stands behind the files of the present peer. `None`: it has none yet.
    backing: Option<Arc<Backing>>,
    /// As much as there are maps.
    maps: Share,
    /// The same as that of the context.
    account: Arc<Account>,
}

type OnLoss = Arc<dyn Fn() + Send + Sync>;

/// The memory of one connector's peer.
pub struct MemoryContext {
    /// The name of the peer's device, for the log.
    device: String,
    current: Mutex<Current>,
    /// Notified when a view ends while a thread waits for that.
    ended: Condvar,
    /// Locked before `current`.
    changes: Mutex<Changes>,
    /// The backing that `changes` has. Locked for a few instructions at a time, after `changes`: a
    /// change may wait for a file system, and nobody who only asks for a loss waits with it.
    backing: Mutex<Option<Arc<Backing>>>,
    /// The account that `changes` has. Locked as `backing` is.
    account: Mutex<Arc<Account>>,
    budget: Arc<Budget>,
    on_loss: Mutex<Option<OnLoss>>,
    /// The log that the present table has too. Changed only under the lock of `changes`.
    log: Arc<LogSlot>,
    followers: Mutex<Vec<Weak<dyn Follower>>>,
}

impl fmt::Debug for MemoryContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let maps = lock(&self.current).snapshot.table.len();
        f.debug_struct("MemoryContext").field("maps", &maps).finish_non_exhaustive()
    }
}

impl Default for MemoryContext {
    fn default() -> Self {
        MemoryContext::new()
    }
}

impl MemoryContext {
    /// No memory yet. What it will need is taken from the budget of the process.
    pub fn new() -> MemoryContext {
        MemoryContext::of("")
    }

    /// As [`new`](Self::new), for a peer of the device called `device`. The log has the name.
    pub fn of(device: &str) -> MemoryContext {
        MemoryContext::with_budget(device, Budget::of_process())
    }

    /// Other memory of the same peer, of which nothing is mapped yet.
    #[must_use]
    pub fn beside(&self) -> MemoryContext {
        let account = lock(&self.account).clone();
        MemoryContext::with_account(&self.device, self.budget.clone(), account)
    }

    fn with_budget(device: &str, budget: Arc<Budget>) -> MemoryContext {
        let account = budget.client(None).account(device);
        MemoryContext::with_account(device, budget, account)
    }

    fn with_account(device: &str, budget: Arc<Budget>, account: Arc<Account>) -> MemoryContext {
        MemoryContext {
            device: device.to_owned(),
            current: Mutex::default(),
            ended: Condvar::new(),
            changes: Mutex::new(Changes {
                files: HashMap::new(),
                backing: None,
                maps: account.nothing(Resource::Maps),
                account: account.clone(),
            }),
            backing: Mutex::default(),
            account: Mutex::new(account),
            budget,
            on_loss: Mutex::default(),
            log: Arc::new(LogSlot::new()),
            followers: Mutex::default(),
        }
    }

    /// Says which process the peer is. All devices of a process have one budget. `None`: the peer
    /// is a client of its own. Call it when there are no maps, before the first one; otherwise what
    /// is mapped already still counts for the peer before.
    pub fn set_client(&self, process: Option<PeerProcess>) {
        let account = self.budget.client(process).account(&self.device);
        let mut changes = lock(&self.changes);
        if lock(&self.current).snapshot.table.len() == 0 {
            changes.maps = account.nothing(Resource::Maps);
        }
        changes.account = account.clone();
        let before = std::mem::replace(&mut *lock(&self.account), account);
        drop(changes);
        drop(before);
    }

    /// Maps `len` bytes of `file` (descriptor, offset) at address `start` of the driver's memory,
    /// for `access`. It duplicates the descriptor only of a file that it uses. Without a file, or
    /// for no access at all, the context records the range as unreachable. The file may be one that
    /// can shrink. After an error nothing has changed.
    pub fn map<F: AsFd>(
        &self,
        start: u64,
        len: u64,
        file: Option<(F, u64)>,
        access: Access,
    ) -> Result<(), MapError> {
        // Cheap checks come first.
        let end = start.checked_add(len).filter(|_| len > 0);
        let end = end.ok_or(MapError::Range(start, len))?;
        let file = file.as_ref().map(|(file, offset)| (file.as_fd(), *offset));
        let file = file.filter(|_| access.read || access.write);
        if file.as_ref().is_some_and(|(_, offset)| (start | len | offset) % PAGE != 0) {
            return Err(MapError::Range(start, len));
        }
        let found = match &file {
            Some((file, _)) => Some(Found::new(*file)?),
            None => None,
        };
        let mut changes = lock(&self.changes);
        let before = lock(&self.current).snapshot.clone();
        if before.table.overlaps(start, end) {
            return Err(MapError::Overlap(start, len));
        }
        if before.table.len() >= MAPS_MAX {
            return Err(MapError::Limit);
        }
        let place = match file.zip(found) {
            None => None,
            Some(((file, offset), found)) => {
                let place = changes.place(file, &found, offset, len, access);
                lock(&self.backing).clone_from(&changes.backing);
                Some(place?)
            }
        };
        changes.maps.grow()?;
        self.publish(before.table.with(Map { start, len, place }));
        drop(changes);
        self.tell_followers();
        Ok(())
    }

    /// Gives `table` to views from now on.
    fn publish(&self, table: Table) {
        let next = Arc::new(Snapshot { table, ..Snapshot::default() });
        let mut current = lock(&self.current);
        current.earlier.retain(|earlier| earlier.strong_count() > 0);
        let before = std::mem::replace(&mut current.snapshot, next);
        // Pairs with the load in `View::is_current`.
        before.replaced.store(true, Ordering::Release);
        if before.views.load(Ordering::Relaxed) > 0 {
            current.earlier.push(Arc::downgrade(&before));
        }
        drop(current);
        // The last reference to a table may be this one. Dropping it takes time.
        drop(before);
    }

    /// Takes away the maps that lie within `start..start + len`, and waits until no view has them.
    /// Returns the number of bytes. If the range cuts a map in two or has no map, it returns 0 and
    /// changes nothing. The caller must have closed connections with regions in the range.
    pub(crate) fn unmap(&self, start: u64, len: u64) -> u64 {
        let Some(end) = start.checked_add(len) else { return 0 };
        let mut changes = lock(&self.changes);
        let before = lock(&self.current).snapshot.clone();
        let Some((table, bytes)) = before.table.without(start, end) else { return 0 };
        changes.maps.shrink(table.len() as u64);
        drop(before);
        self.publish(table);
        drop(changes);
        self.tell_followers();
        self.wait_for_views();
        bytes
    }

    /// Takes away all maps, and waits until no view has them. The log ends. A loss is forgotten:
    /// the next peer has other memory.
    pub(crate) fn unmap_all(&self) {
        let mut changes = lock(&self.changes);
        changes.maps.shrink(0);
        changes.backing = None;
        let backing = lock(&self.backing).take();
        drop(backing);
        self.log.take();
        self.publish(Table::default());
        changes.files.clear();
        drop(changes);
        self.tell_followers();
        self.wait_for_views();
    }

    /// Begins to log the pages of [`PAGE`] bytes that the device writes: those of `ranges`, or all
    /// if there are none. When this returns, a write that is not logged is visible to the peer. The
    /// log goes on until [`stop_log`](Self::stop_log), or until all maps are taken away. It waits
    /// for the views that others have.
    ///
    /// # Errors
    /// A log is on already, or the kernel lacks what it needs.
    pub fn start_log(&self, ranges: &[Range<u64>]) -> Result<(), LogError> {
        self.start_log_of(|account| Log::new(account, ranges))
    }

    /// As [`start_log`](Self::start_log), of all pages that `bitmap` covers. Each mark is in the
    /// bitmap at once, after the write; the peer takes them by itself, and there is no
    /// [`report_log`](Self::report_log).
    ///
    /// # Errors
    /// Those of [`start_log`](Self::start_log).
    pub fn start_log_in(&self, bitmap: &Arc<PeerBitmap>) -> Result<(), LogError> {
        self.start_log_of(|account| Log::of_peer(account, bitmap.clone()))
    }

    /// The bitmap of `bytes` bytes in `file`, a file of the peer, from byte `offset` on: a multiple
    /// of 8.
    ///
    /// # Errors
    /// As [`map`](Self::map): the file is no such, has not so many bytes, or is beyond the budget.
    pub fn bitmap(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        bytes: u64,
    ) -> Result<PeerBitmap, MapError> {
        let account = lock(&self.account).clone();
        PeerBitmap::new(&account, file, offset, bytes)
    }

    fn start_log_of(&self, log: impl FnOnce(Arc<Account>) -> Log) -> Result<(), LogError> {
        let changes = lock(&self.changes);
        let log = Arc::new(log(changes.account.clone()));
        self.log.set(log.clone())?;
        let before = lock(&self.current).snapshot.clone();
        self.publish(before.table.with_log(Some(log)));
        drop((changes, before));
        // Whoever writes by itself logs nothing, and must stop.
        self.tell_followers();
        // A view of before does not log. What it has written is visible when it has ended.
        self.wait_for_views();
        Ok(())
    }

    /// Ends the log. Returns whether it was on.
    pub fn stop_log(&self) -> bool {
        let changes = lock(&self.changes);
        let was_on = self.log.take().is_some();
        if was_on {
            let before = lock(&self.current).snapshot.clone();
            self.publish(before.table.with_log(None));
        }
        drop(changes);
        if was_on {
            self.tell_followers();
        }
        was_on
    }

    /// Sets the bit of each page that the device has written since the log began or since the
    /// page's last report, within `start..start + len`. Both are multiples of [`PAGE`]. Bit
    /// `n % 64` of word `n / 64` of `bitmap` stands for `page_size` bytes from
    /// `start + n * page_size` on.
    ///
    /// What the device wrote before this call, so that the caller knows of it, is in the report, or
    /// was in an earlier one. A write of which the peer reads the old bytes after this call is in a
    /// later report. A page whose bytes were written with the values that they had counts as
    /// written. The pages of a range that is not mapped any more stay in the log.
    ///
    /// # Errors
    /// The log is off, or the range or the bitmap is wrong: nothing is taken from the log. Or the
    /// log is not complete, and stays so: the caller must take all pages for written.
    pub fn report_log(
        &self,
        start: u64,
        len: u64,
        page_size: u64,
        bitmap: &mut [u64],
    ) -> Result<(), LogError> {
        let log = self.log.get().ok_or(LogError::Off)?;
        log.report(start, len, page_size, bitmap)
    }

    /// Waits until the views that began before the last change have ended.
    fn wait_for_views(&self) {
        let mut current = lock(&self.current);
        let earlier: Vec<_> = current.earlier.iter().filter_map(Weak::upgrade).collect();
        // Each view ends under the lock, so the last view sees that this thread waits.
        current.waiting += 1;
        while earlier.iter().any(|snapshot| snapshot.views.load(Ordering::Relaxed) > 0) {
            current = self.ended.wait(current).unwrap_or_else(|e| e.into_inner());
        }
        current.waiting -= 1;
        drop(current);
        drop(earlier);
    }

    /// A snapshot of the memory. It never waits. Hold it for one poll at most: unmapping waits for
    /// it.
    pub fn view(&self) -> View<'_> {
        let current = lock(&self.current);
        current.snapshot.count_views(1);
        View { snapshot: Some(current.snapshot.clone()), context: self }
    }

    /// Whether the present peer has taken away memory that the device then accessed. What was lost
    /// reads as zeros. It stays true until all maps are taken away.
    pub fn is_lost(&self) -> bool {
        lock(&self.backing).as_ref().is_some_and(|backing| backing.is_lost())
    }

    /// Calls `then` when the memory is lost, instead of ending the device's connection: for a
    /// connector that ends the peer's session. `then` must not block.
    pub fn on_loss(&self, then: impl Fn() + Send + Sync + 'static) {
        *lock(&self.on_loss) = Some(Arc::new(then));
    }

    /// Tells the connector of a loss. False: there is none to tell.
    pub(crate) fn tell_loss(&self) -> bool {
        let then = lock(&self.on_loss).clone();
        then.map(|then| then()).is_some()
    }

    /// What the peer has of each budget, for this device (`used`) and for all its devices
    /// (`client_used`), and may have now (`of`), and what all peers have (`all_used`) and may have
    /// (`all_of`), by the name of the [`Resource`]. If the peer's process is known, `client` has
    /// its id (`process`) and the names of its devices (`devices`).
    pub fn inspect(&self) -> Value {
        let account = lock(&self.account).clone();
        account.inspect()
    }

    /// Charges the peer with `bytes` of this process's memory, which a connector keeps for it.
    ///
    /// # Errors
    /// The peer would have too much.
    pub fn charge(&self, bytes: u64) -> Result<Charge, Exceeded> {
        lock(&self.account).charge(bytes)
    }

    /// A lasting window on `addr..addr + len`, for reading and writing. `addr` and `len` must be
    /// multiples of 8.
    pub fn window(&self, addr: u64, len: u64) -> Result<Window, ErrorCode> {
        check_words(addr, len)?;
        let view = self.view();
        let bytes = usize::try_from(len).map_err(|_| ErrorCode::BAD_LENGTH)?;
        let run = view.table().run(addr, bytes, Access::BOTH)?;
        if run.len == bytes {
            let keep = Keep::File(run.place.file.clone());
            let origin = (self.log.clone(), Origin::At(addr));
            return Ok(Window::new(keep, run.base, bytes / 8, origin));
        }
        // The range crosses maps. Map their pages again, side by side.
        let end = addr.checked_add(len).and_then(|end| end.checked_next_multiple_of(PAGE));
        let first = addr - addr % PAGE;
        let pages = end.ok_or(ErrorCode::BAD_ADDRESS)? - first;
        let pages = usize::try_from(pages).map_err(|_| ErrorCode::BAD_LENGTH)?;
        let skip = usize::try_from(addr - first).map_err(|_| ErrorCode::BAD_ADDRESS)?;
        self.assemble(&view, &[first], pages, skip, bytes / 8, Origin::At(addr))
    }

    /// A lasting window on `len` bytes that lie in pages of `1 << shift` bytes at the addresses
    /// `pages`, as if they were contiguous. Pages that are contiguous in the peer's file need no
    /// mapping of their own. In a file of huge pages they have to be contiguous, or whole huge
    /// pages: the kernel maps no part of one. More than 4097 pieces are refused: a page may lie in
    /// many maps.
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
        let follow = |pair: &[u64]| pair[0].checked_add(page as u64) == Some(pair[1]);
        let origin = match pages.first() {
            Some(first) if pages.windows(2).all(follow) => Origin::At(*first),
            _ => Origin::Pages(pages.into(), shift),
        };
        self.assemble(&self.view(), pages, page, 0, words, origin)
    }

    /// A window on the `each` bytes (whole pages) at each of the addresses `starts`, one after
    /// another: on `words` words from byte `skip` on, which the driver has at `origin`.
    fn assemble(
        &self,
        view: &View<'_>,
        starts: &[u64],
        each: usize,
        skip: usize,
        words: usize,
        origin: Origin,
    ) -> Result<Window, ErrorCode> {
        struct Part<'t> {
            file: &'t Arc<SharedFile>,
            base: NonNull<u8>,
            offset: u64,
            len: usize,
        }
        let mut parts: Vec<Part<'_>> = Vec::new();
        for &start in starts {
            view.table().runs(start, each, Access::BOTH, |run| {
                let file = &run.place.file;
                let follows = |last: &&mut Part<'_>| {
                    Arc::ptr_eq(last.file, file)
                        && last.offset + last.len as u64 == run.offset
                        && last.base.as_ptr() as usize + last.len == run.base.as_ptr() as usize
                };
                let is_full = parts.len() == PIECES_MAX;
                match parts.last_mut().filter(follows) {
                    Some(last) => last.len += run.len,
                    None if is_full => return Err(ErrorCode::LIMIT),
                    None => {
                        let Run { base, offset, len, .. } = run;
                        parts.push(Part { file, base, offset, len });
                    }
                }
                Ok(())
            })?;
        }
        if let [one] = &parts[..] {
            // SAFETY: `skip` lies within the first page of the part.
            let base = unsafe { one.base.add(skip) };
            let keep = Keep::File(one.file.clone());
            return Ok(Window::new(keep, base, words, (self.log.clone(), origin)));
        }
        let page = parts.iter().map(|part| part.file.page()).max().unwrap_or(PAGE);
        if parts.iter().any(|part| (part.offset | part.len as u64) % page != 0) {
            tracing::warn!(
                device = self.device,
                "a region's pages lie scattered in a file of huge pages, of which the kernel maps \
                 no part; the driver needs contiguous memory, or whole huge pages"
            );
            return Err(ErrorCode::BAD_ADDRESS);
        }
        let (account, backing) = {
            let changes = lock(&self.changes);
            (changes.account.clone(), changes.backing.clone().ok_or(ErrorCode::BAD_ADDRESS)?)
        };
        let bytes = parts.iter().map(|part| part.len as u64).sum();
        let share = |resource, amount| {
            account.take(resource, amount).map_err(|exceeded| {
                let device = &*self.device;
                tracing::warn!(device, "a region cannot be mapped: it exceeds {exceeded}");
                ErrorCode::LIMIT
            })
        };
        let shares =
            (share(Resource::Mappings, parts.len() as u64)?, share(Resource::AddressSpace, bytes)?);
        let pieces = parts.iter().map(|part| Piece {
            file: part.file.as_fd(),
            offset: part.offset,
            len: part.len,
        });
        let page = usize::try_from(page).map_err(|_| ErrorCode::LIMIT)?;
        let whole = Mapping::pieces(pieces, page, &backing).map_err(|error| {
            tracing::warn!(device = self.device, %error, "a region cannot be mapped");
            ErrorCode::LIMIT
        })?;
        // SAFETY: `skip` is less than a page, and `whole` has all pages of the range.
        let base = unsafe { whole.base().add(skip) };
        let keep = Keep::Own(Arc::new(whole.holding(shares)));
        Ok(Window::new(keep, base, words, (self.log.clone(), origin)))
    }
}

impl Changes {
    /// Where `len` bytes of `file` from `offset` on are in this process.
    fn place(
        &mut self,
        file: BorrowedFd<'_>,
        found: &Found,
        offset: u64,
        len: u64,
        access: Access,
    ) -> Result<Place, MapError> {
        if offset.checked_add(len).is_none_or(|end| end > found.size()) {
            return Err(MapError::FileTooSmall);
        }
        let known =
            found.keys(access.write).find_map(|key| self.files.get(&key).and_then(Weak::upgrade));
        let known = match known {
            Some(known) => known,
            None => self.open(file, found, access)?,
        };
        let base = known.place(offset, len, found.size())?;
        Ok(Place { file: known, offset, base, access })
    }

    /// Takes in a file that is not known yet.
    fn open(
        &mut self,
        file: BorrowedFd<'_>,
        found: &Found,
        access: Access,
    ) -> Result<Arc<SharedFile>, MapError> {
        let backing = match &self.backing {
            Some(backing) => backing.clone(),
            None => Backing::zeros(4096)?,
        };
        let file = file.try_clone_to_owned().map_err(|_| Errno::MFILE)?;
        let file = SharedFile::new(file, found, &backing, &self.account)?;
        if access.write && !file.writable() {
            return Err(MapError::ReadOnly);
        }
        self.backing = Some(backing);
        let file = Arc::new(file);
        self.files.retain(|_, file| file.strong_count() > 0);
        self.files.insert(file.key(found), Arc::downgrade(&file));
        Ok(file)
    }
}

fn check_words(addr: u64, len: u64) -> Result<(), ErrorCode> {
    if len == 0 {
        return Err(ErrorCode::BAD_LENGTH);
    }
    if (addr | len) % 8 != 0 { Err(ErrorCode::BAD_ALIGNMENT) } else { Ok(()) }
}

/// A snapshot of a peer's memory; see [`MemoryContext::view`].
pub struct View<'a> {
    /// `None` only while the view is dropped.
    snapshot: Option<Arc<Snapshot>>,
    context: &'a MemoryContext,
}

impl Drop for View<'_> {
    fn drop(&mut self) {
        let current = lock(&self.context.current);
        // Under the lock: a thread that waits looks at this number.
        if let Some(snapshot) = &self.snapshot {
            snapshot.count_views(-1);
        }
        if current.waiting > 0 {
            self.context.ended.notify_all();
        }
        drop(current);
        // The last reference to a table may be this one. Dropping it takes time.
        self.snapshot = None;
    }
}

impl View<'_> {
    #[inline]
    fn table(&self) -> &Table {
        self.snapshot.as_deref().map_or(&EMPTY, |snapshot| &snapshot.table)
    }

    /// Whether the memory is still as this view has it. A driver behind an IOMMU maps a buffer just
    /// before it makes it available. If a device finds the buffer and this is true *afterwards*,
    /// the view has all that the driver had mapped for it; if it is false, a newer view may have
    /// more.
    #[inline(always)]
    pub fn is_current(&self) -> bool {
        // Pairs with the store in `MemoryContext::publish`.
        self.snapshot.as_deref().is_some_and(|own| !own.replaced.load(Ordering::Acquire))
    }

    /// Whether what is written through this view is logged.
    #[inline(always)]
    pub fn is_logged(&self) -> bool {
        self.table().is_logged()
    }

    /// The `len` bytes at `addr`. All of them must be mapped, for writing if `write`, else for
    /// reading.
    #[inline]
    pub fn slice(&self, addr: u64, len: u64, write: bool) -> Result<DriverSlice<'_>, ErrorCode> {
        let len = usize::try_from(len).map_err(|_| ErrorCode::BAD_LENGTH)?;
        DriverSlice::new(self.table(), addr, len, write)
    }

    /// Copies `out.len()` bytes from `addr`, once.
    pub fn read(&self, addr: u64, out: &mut [u8]) -> Result<(), ErrorCode> {
        self.slice(addr, out.len() as u64, false)?.copy_to(out);
        Ok(())
    }

    /// As [`read`](Self::read), by a system call. Memory of the peer that has no pages yet gets
    /// none by it: for what an untrusted driver can ask for as often as it likes.
    pub fn peek(&self, addr: u64, out: &mut [u8]) -> Result<(), ErrorCode> {
        let (mut at, len) = (0, out.len());
        self.table().runs(addr, len, Access::READ, |run| {
            let to = &mut out[at..at + run.len];
            run.place.file.read(to, run.offset).map_err(|_| ErrorCode::BAD_ADDRESS)?;
            at += run.len;
            Ok(())
        })
    }

    /// Copies `bytes` to `addr`.
    pub fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), ErrorCode> {
        self.slice(addr, bytes.len() as u64, true)?.copy_from(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A peer that maps as much as it may of a huge sparse file, and lets the device touch all of
    /// it, cannot make the kernel charge the bus for more than its budget.
    #[test]
    fn the_bus_is_charged_for_no_more_than_the_budget() {
        const MIB: u64 = 1 << 20;
        let budget = Budget::in_control_group(64 * MIB);
        let context = MemoryContext::with_budget("hostile", budget.clone());
        let file = rustix::fs::memfd_create("sparse", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 1 << 40).unwrap();
        let map = |context: &MemoryContext, at, len| {
            context.map(at, len, Some((&file, at)), Access::BOTH)
        };
        let MapError::Budget(refused) = map(&context, 0, 1 << 40).unwrap_err() else {
            panic!("it is refused for another reason");
        };
        assert_eq!(refused.resource, Resource::Pages);
        assert!(refused.to_string().contains("memory.max of its control group"), "{refused}");
        let mut mapped = 0;
        while map(&context, mapped, MIB).is_ok() {
            mapped += MIB;
        }
        // Half of three quarters: other peers have their part.
        assert_eq!(mapped, 24 * MIB);
        let view = context.view();
        for page in 0..mapped / PAGE {
            if page % 2 == 0 {
                view.write(page * PAGE, b"touched").unwrap();
            } else {
                view.read(page * PAGE, &mut [0]).unwrap();
            }
        }
        drop(view);
        assert_eq!(context.view().write(mapped, b"x"), Err(ErrorCode::BAD_ADDRESS));
        let charged = u64::try_from(rustix::fs::fstat(&file).unwrap().st_blocks).unwrap() * 512;
        assert_eq!(charged, mapped, "each page, and no other");
        let other = MemoryContext::with_budget("good", budget);
        map(&other, 0, 12 * MIB).unwrap();
        assert!(map(&other, 12 * MIB, MIB).is_err());
        // What is mapped twice counts once.
        context.map(1 << 36, MIB, Some((&file, 0)), Access::READ).unwrap();
    }

    #[test]
    fn without_a_limit_of_the_control_group_nothing_is_kept() {
        let context = MemoryContext::with_budget("", Budget::in_control_group(u64::MAX));
        let told = context.inspect();
        assert_eq!(told["pages"]["all_of"], told["address_space"]["all_of"]);
    }

    #[test]
    fn nobody_who_asks_for_a_loss_or_the_budget_waits_for_a_change() {
        let context = MemoryContext::new();
        let file = rustix::fs::memfd_create("peer", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, PAGE).unwrap();
        context.map(0, PAGE, Some((file, 0)), Access::BOTH).unwrap();
        // A change that hangs. Whoever wanted its lock would hang here too, or panic.
        let changes = lock(&context.changes);
        assert!(!context.is_lost());
        assert!(context.inspect().is_object());
        let backing = changes.backing.as_ref().unwrap();
        assert!(Arc::ptr_eq(backing, lock(&context.backing).as_ref().unwrap()));
        drop(changes);
        context.unmap_all();
        assert!(lock(&context.backing).is_none() && !context.is_lost());
    }
}
