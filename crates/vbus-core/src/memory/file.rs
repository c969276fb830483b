// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory files of a peer. Each file is mapped once. Every map of the peer is a part of that.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use rustix::fs::{FileType, OFlags, SealFlags, Stat, fcntl_get_seals, fcntl_getfl, fstatfs};
use rustix::io::Errno;
use rustix::mm::ProtFlags;
use vbus_mapping::{Backing, Mapping};

use super::budget::{Account, Exceeded, Resource, Share};
use super::{MapError, PAGE};
use crate::lock::lock;

/// A file that is too large for the peer's budget is mapped in parts of this many bytes.
const PART: u64 = 1 << 30;
/// The most parts of a file. A file that grows gets a new part.
const PARTS_MAX: usize = 64;

/// The file systems whose files may be mapped. A peer can make a file system of its own with FUSE,
/// and its pages would never come. These are in the kernel, and only root mounts them.
const FILE_SYSTEMS: [(u64, &str); 6] = [
    (0x0102_1994, "tmpfs and memfd"),
    (HUGETLBFS, "hugetlbfs"),
    (0x8584_58f6, "ramfs"),
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683e, "btrfs"),
];
const HUGETLBFS: u64 = 0x9584_58f6;

/// What tells a file from other files: device and inode, and whether it can be written.
pub(super) type FileKey = (u64, u64, bool);

/// A file of a peer's memory.
pub(super) struct SharedFile {
    file: OwnedFd,
    /// The size of its pages, in bytes.
    page: u64,
    writable: bool,
    backing: Arc<Backing>,
    account: Arc<Account>,
    /// They stay as long as the file is in use, so addresses within them stay valid.
    parts: Mutex<Vec<Part>>,
    _descriptor: Share,
}

/// A mapped part of the file.
struct Part {
    /// In the file.
    offset: u64,
    mapping: Mapping,
}

/// What a descriptor stands for.
pub(super) struct Found {
    device: u64,
    inode: u64,
    /// In bytes.
    size: u64,
    /// The size of a page, in bytes.
    page: u64,
    /// The descriptor may be mapped for writing.
    writable: bool,
}

impl Found {
    /// Looks at a descriptor, without any effect on it. `stat` is its `fstat`.
    pub(super) fn new(file: BorrowedFd<'_>, stat: &Stat) -> Result<Found, MapError> {
        if !FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(MapError::NoFile);
        }
        let system = fstatfs(file)?;
        #[expect(clippy::cast_sign_loss, reason = "the kernel's numbers have 32 bits")]
        let kind = system.f_type as u64 & 0xffff_ffff;
        if !FILE_SYSTEMS.iter().any(|(known, _)| *known == kind) {
            return Err(MapError::FileSystem(kind));
        }
        let page = match kind {
            HUGETLBFS => u64::try_from(system.f_bsize).unwrap_or(0),
            _ => PAGE,
        };
        if !page.is_power_of_two() || page < PAGE {
            return Err(MapError::Os(Errno::INVAL));
        }
        let flags = fcntl_getfl(file)? & OFlags::RWMODE;
        // Only some file systems have seals.
        let sealed = fcntl_get_seals(file)
            .is_ok_and(|seals| seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE));
        Ok(Found {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            page,
            writable: flags == OFlags::RDWR && !sealed,
        })
    }

    /// The size of the file, in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// The keys under which a file for this descriptor may be known. `write`: the file must be
    /// writable.
    pub(super) fn keys(&self, write: bool) -> impl Iterator<Item = FileKey> + use<> {
        let (device, inode) = (self.device, self.inode);
        [true, false].into_iter().filter(move |w| *w || !write).map(move |w| (device, inode, w))
    }
}

/// The file systems that are known, as text.
pub(super) fn file_systems() -> String {
    FILE_SYSTEMS.map(|(_, name)| name).join(", ")
}

impl SharedFile {
    /// A file with nothing mapped yet.
    pub(super) fn new(
        file: OwnedFd,
        found: &Found,
        backing: &Arc<Backing>,
        account: &Arc<Account>,
    ) -> Result<SharedFile, MapError> {
        Ok(SharedFile {
            _descriptor: account.take(Resource::Descriptors, 1)?,
            page: found.page,
            writable: found.writable,
            file,
            backing: backing.clone(),
            account: account.clone(),
            parts: Mutex::default(),
        })
    }

    /// Whether the device may write it.
    pub(super) fn writable(&self) -> bool {
        self.writable
    }

    pub(super) fn key(&self, found: &Found) -> FileKey {
        (found.device, found.inode, self.writable)
    }

    /// The size of its pages, in bytes.
    pub(super) fn page(&self) -> u64 {
        self.page
    }

    /// The address of the bytes `offset..offset + len` of the file. They are mapped, if they are
    /// not yet. The address is valid as long as this value lives. `size` is that of the file now,
    /// and the range lies within it.
    pub(super) fn place(&self, offset: u64, len: u64, size: u64) -> Result<NonNull<u8>, MapError> {
        let mut parts = lock(&self.parts);
        if let Some(base) = parts.iter().find_map(|part| part.find(offset, len)) {
            return Ok(base);
        }
        if parts.len() >= PARTS_MAX {
            return Err(MapError::Parts);
        }
        // The whole file, if it is small enough; else a part; else only what is needed.
        let end = offset + len;
        let whole = (self.account.left(Resource::AddressSpace) / 4 >= size).then_some((0, size));
        let around = (offset / PART * PART, end.next_multiple_of(PART).min(size.max(end)));
        let mut last = MapError::Parts;
        for (from, to) in whole.into_iter().chain([around, (offset, end)]) {
            let from = from - from % self.page;
            match self.map(from, to.next_multiple_of(self.page) - from) {
                Ok(part) => {
                    let base = part.find(offset, len);
                    parts.push(part);
                    return base.ok_or(MapError::FileTooSmall);
                }
                Err(error @ (MapError::Budget(_) | MapError::Os(Errno::NOMEM))) => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    fn map(&self, offset: u64, len: u64) -> Result<Part, MapError> {
        let too_large = || MapError::Os(Errno::NOMEM);
        let bytes = usize::try_from(len).map_err(|_| too_large())?;
        let page = usize::try_from(self.page).map_err(|_| too_large())?;
        let shares = (
            self.account.take(Resource::AddressSpace, len)?,
            self.account.take(Resource::Mappings, 1)?,
        );
        let write = if self.writable { ProtFlags::WRITE } else { ProtFlags::empty() };
        let prot = ProtFlags::READ | write;
        let mapping = Mapping::file_of_pages(&self.file, offset, bytes, page, prot, &self.backing)?;
        Ok(Part { offset, mapping: mapping.holding(shares) })
    }

    /// Reads from the file without touching the mapping: what has no page yet gets none.
    pub(super) fn read(&self, out: &mut [u8], offset: u64) -> Result<(), Errno> {
        let mut done = 0;
        while done < out.len() {
            match rustix::io::pread(&self.file, &mut out[done..], offset + done as u64) {
                Ok(0) => return Err(Errno::IO),
                Ok(bytes) => done += bytes,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Part {
    /// The address of the bytes `offset..offset + len` of the file, if they are in this part.
    fn find(&self, offset: u64, len: u64) -> Option<NonNull<u8>> {
        let inside = offset.checked_sub(self.offset)?;
        let inside = usize::try_from(inside).ok()?;
        let end = inside.checked_add(usize::try_from(len).ok()?)?;
        if end > self.mapping.len() {
            return None;
        }
        // SAFETY: `inside` is within the mapping.
        Some(unsafe { self.mapping.base().add(inside) })
    }
}

impl AsFd for SharedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl fmt::Debug for SharedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedFile").field("page", &self.page).finish_non_exhaustive()
    }
}

impl From<Exceeded> for MapError {
    fn from(exceeded: Exceeded) -> MapError {
        MapError::Budget(exceeded)
    }
}
