// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory files of a peer. Each file is mapped once. Every map of the peer is a part of that.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use rustix::fs::{
    AtFlags, FileType, OFlags, SealFlags, Stat, StatxAttributes, StatxFlags, fcntl_get_seals,
    fcntl_getfl, fstat, fstatfs, makedev, statx,
};
use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, ioctl, opcode};
use rustix::mm::ProtFlags;
use vbus_mapping::{Backing, Mapping};

use super::budget::{Account, Exceeded, Resource, Share};
use super::{MapError, PAGE};
use crate::lock::lock;

/// A file that is too large for the peer's budget is mapped in parts of this many bytes.
const PART: u64 = 1 << 30;
/// The most parts of a file. A file that grows gets a new part.
const PARTS_MAX: usize = 64;

/// The file systems whose files may be mapped, by the numbers of statfs(2). A peer can make a file
/// system of its own with FUSE, and its pages would never come. These are in the kernel, and only
/// root mounts those that have a disk.
const FILE_SYSTEMS: [(u64, &str); 5] = [
    (TMPFS, "tmpfs and memfd"),
    (HUGETLBFS, "hugetlbfs"),
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (BTRFS, "btrfs"),
];
const TMPFS: u64 = 0x0102_1994;
const HUGETLBFS: u64 = 0x9584_58f6;
const BTRFS: u64 = 0x9123_683e;

/// What a file system of a disk says of its files with statx(2), and FUSE and those of networks do
/// not: it knows these attributes.
const ATTRIBUTES: StatxAttributes =
    StatxAttributes::APPEND.union(StatxAttributes::IMMUTABLE).union(StatxAttributes::NODUMP);

/// `BTRFS_IOC_FS_INFO`, with the size of what it writes.
const BTRFS_INFO: Opcode = opcode::read::<[u8; 1024]>(0x94, 31);

/// The requests of ioctl(2) that this module makes, for a filter of system calls.
pub const IOCTLS: [Opcode; 1] = [BTRFS_INFO];

/// What tells a file from other files: device and inode, and whether it can be written.
pub(super) type FileKey = (u64, u64, bool);

/// A file of a peer's memory.
pub(super) struct SharedFile {
    file: OwnedFd,
    /// The size of its pages, in bytes.
    page: u64,
    writable: bool,
    /// Whoever touches a page first is charged for it.
    is_charged: bool,
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
    /// Whoever touches a page first is charged for it.
    is_charged: bool,
}

impl Found {
    /// Looks at a descriptor, without any effect on it. No call here waits for the peer, whatever
    /// the descriptor is of: a file system that the peer serves itself could leave a call without
    /// an answer for ever.
    pub(super) fn new(file: BorrowedFd<'_>) -> Result<Found, MapError> {
        // Only files of tmpfs and hugetlbfs have seals, and these file systems are in the kernel.
        let seals = fcntl_get_seals(file);
        let (stat, kind, page) = match seals {
            Ok(_) => {
                let (kind, page) = kind(file)?;
                (Identity::of(&fstat(file)?), kind, page)
            }
            Err(_) => on_disk(file)?,
        };
        if !stat.is_file {
            return Err(MapError::NoFile);
        }
        if !FILE_SYSTEMS.iter().any(|(known, _)| *known == kind) {
            return Err(MapError::FileSystem(Some(kind)));
        }
        let page = if kind == HUGETLBFS { page } else { PAGE };
        if !page.is_power_of_two() || page < PAGE {
            return Err(MapError::Os(Errno::INVAL));
        }
        let flags = fcntl_getfl(file)? & OFlags::RWMODE;
        let sealed =
            seals.is_ok_and(|seals| seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE));
        Ok(Found {
            device: stat.device,
            inode: stat.inode,
            size: stat.size,
            page,
            writable: flags == OFlags::RDWR && !sealed,
            is_charged: kind == TMPFS,
        })
    }

    /// The size of the file, in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// The size of a page of the file, in bytes.
    pub(super) fn page(&self) -> u64 {
        self.page
    }

    /// Whether the file may be mapped for writing.
    pub(super) fn is_writable(&self) -> bool {
        self.writable
    }

    /// The keys under which a file for this descriptor may be known. `write`: the file must be
    /// writable.
    pub(super) fn keys(&self, write: bool) -> impl Iterator<Item = FileKey> + use<> {
        let (device, inode) = (self.device, self.inode);
        [true, false].into_iter().filter(move |w| *w || !write).map(move |w| (device, inode, w))
    }
}

/// What a file is, by stat(2).
struct Identity {
    device: u64,
    inode: u64,
    /// In bytes.
    size: u64,
    is_file: bool,
}

impl Identity {
    fn of(stat: &Stat) -> Identity {
        Identity {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            is_file: FileType::from_raw_mode(stat.st_mode).is_file(),
        }
    }
}

/// The number of a file's file system, and the size of its blocks in bytes. It may ask the file
/// system.
fn kind(file: BorrowedFd<'_>) -> Result<(u64, u64), Errno> {
    let system = fstatfs(file)?;
    #[expect(clippy::cast_sign_loss, reason = "the kernel's numbers have 32 bits")]
    let kind = system.f_type as u64 & 0xffff_ffff;
    Ok((kind, u64::try_from(system.f_bsize).unwrap_or(0)))
}

/// A file without seals, with the number of its file system and the size of its blocks.
fn on_disk(file: BorrowedFd<'_>) -> Result<(Identity, u64, u64), MapError> {
    // What the kernel knows already.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::SIZE;
    let stat = statx(file, c"", flags, wanted)?;
    let identity = Identity {
        device: makedev(stat.stx_dev_major, stat.stx_dev_minor),
        inode: stat.stx_ino,
        size: stat.stx_size,
        is_file: FileType::from_raw_mode(stat.stx_mode.into()).is_file(),
    };
    if !identity.is_file {
        return Err(MapError::NoFile);
    }
    if !stat.stx_attributes_mask.contains(ATTRIBUTES) {
        return Err(MapError::FileSystem(None));
    }
    if stat.stx_dev_major != 0 {
        // It is on a device of blocks, so root has mounted it.
        let (kind, block) = kind(file)?;
        return Ok((identity, kind, block));
    }
    // btrfs has a number of its own for each subvolume. So has overlayfs, which passes on what it
    // lies over: attributes from one file system, statfs(2) from another. It has no such request.
    // SAFETY: the kernel writes at most 1024 bytes, and any bytes are good.
    let info = unsafe { ioctl(file, Getter::<BTRFS_INFO, [u8; 1024]>::new()) };
    info.map(|_| (identity, BTRFS, PAGE)).map_err(|_| MapError::FileSystem(None))
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
            is_charged: found.is_charged,
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
        let charged = if self.is_charged { len } else { 0 };
        let shares = (
            self.account.take(Resource::AddressSpace, len)?,
            self.account.take(Resource::Mappings, 1)?,
            self.account.take(Resource::Pages, charged)?,
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
