// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory as a list of regions, for somebody who reaches it without views: the kernel, which
//! carries frames for a device (vhost).

use std::fmt;
use std::sync::{Arc, Weak};

use super::table::Map;
use super::{Access, MemoryContext, Snapshot};
use crate::lock::lock;

/// The most maps that [`MemoryContext::regions`] looks at. This bounds what a change costs.
const MAPS_MAX: usize = 4096;

/// A part of the driver's memory that is in one piece in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its address for the driver.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Its address in this process.
    pub host: u64,
}

/// The memory that the device may read and write, at one moment. It stays mapped in this process
/// until the value is dropped, even if the peer takes it away meanwhile.
pub struct Regions {
    list: Vec<Region>,
    _keep: Arc<Snapshot>,
}

impl fmt::Debug for Regions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.list).finish()
    }
}

/// Why nobody can have the memory as regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoRegions {
    /// There are more than whoever asks can take.
    #[error("the driver's memory has more than {0} regions or maps")]
    TooMany(usize),
    /// What the device writes is logged, which only this process does.
    #[error("the driver's machine is being moved, and its written pages are logged")]
    Logged,
}

impl Regions {
    /// The regions, by their addresses.
    pub fn list(&self) -> &[Region] {
        &self.list
    }

    /// Where the `len` bytes at `addr` are in this process. `None`: they are not all in one region.
    pub fn host(&self, addr: u64, len: u64) -> Option<u64> {
        let at = self.list.partition_point(|region| region.start <= addr).checked_sub(1)?;
        let region = self.list.get(at)?;
        let inside = addr - region.start;
        let fits = inside.checked_add(len).is_some_and(|end| end <= region.len);
        fits.then(|| region.host + inside)
    }
}

/// Is told of each change of the maps, until it is dropped.
pub trait Follower: Send + Sync {
    /// The maps have changed, or a log of what is written has begun or ended. The peer hears of the
    /// change when this returns. It runs on the thread of the change, which waits for it. No lock
    /// of the memory is held.
    fn memory_changed(&self);
}

impl MemoryContext {
    /// The memory that the device may read and write. It leaves out what the device may only read,
    /// or only write.
    ///
    /// # Errors
    /// There are more than `max` regions, or very many maps; or there is a log of what is written.
    pub fn regions(&self, max: usize) -> Result<Regions, NoRegions> {
        let snapshot = lock(&self.current).snapshot.clone();
        if snapshot.table.is_logged() {
            return Err(NoRegions::Logged);
        }
        let mut list: Vec<Region> = Vec::new();
        let mut last: Option<&Map> = None;
        for (count, map) in snapshot.table.maps().enumerate() {
            if count == MAPS_MAX {
                return Err(NoRegions::TooMany(max));
            }
            let Some(place) = map.place.as_ref().filter(|p| p.access.allows(Access::BOTH)) else {
                continue;
            };
            let host = place.base.as_ptr() as u64;
            let follows = |region: &&mut Region| {
                let same = last.and_then(|map| map.place.as_ref());
                region.start + region.len == map.start
                    && region.host + region.len == host
                    && same.is_some_and(|last| Arc::ptr_eq(&last.file, &place.file))
            };
            let is_full = list.len() == max;
            match list.last_mut().filter(follows) {
                Some(region) => region.len += map.len,
                None if is_full => return Err(NoRegions::TooMany(max)),
                None => list.push(Region { start: map.start, len: map.len, host }),
            }
            last = Some(map);
        }
        Ok(Regions { list, _keep: snapshot })
    }

    /// Tells `follower` of each change from now on.
    pub fn follow(&self, follower: &Arc<impl Follower + 'static>) {
        let follower: Weak<dyn Follower> = Arc::downgrade(&(follower.clone() as Arc<dyn Follower>));
        let mut followers = lock(&self.followers);
        followers.retain(|follower| follower.strong_count() > 0);
        followers.push(follower);
    }

    pub(super) fn tell_followers(&self) {
        // Outside of the lock: a follower may drop another one.
        let followers: Vec<_> = lock(&self.followers).iter().filter_map(Weak::upgrade).collect();
        followers.iter().for_each(|follower| follower.memory_changed());
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::Mutex;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::super::PAGE;
    use super::*;

    fn file(pages: u64) -> OwnedFd {
        let file = memfd_create("peer", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, pages * PAGE).unwrap();
        file
    }

    #[test]
    fn maps_that_adjoin_in_both_places_are_one_region() {
        let context = MemoryContext::new();
        let file = file(8);
        let map = |page: u64, at: u64, access| {
            context.map(page * PAGE, PAGE, Some((&file, at * PAGE)), access).unwrap();
        };
        assert!(context.regions(0).unwrap().list().is_empty());
        for page in 0..3 {
            map(page, page, Access::BOTH);
        }
        map(3, 5, Access::BOTH);
        map(4, 6, Access::READ);
        let regions = context.regions(2).unwrap();
        let [first, second] = regions.list() else { panic!("{regions:?}") };
        assert_eq!((first.start, first.len), (0, 3 * PAGE));
        assert_eq!((second.start, second.len), (3 * PAGE, PAGE));
        assert_eq!(second.host, first.host + 5 * PAGE);
        assert_eq!(context.regions(1).unwrap_err(), NoRegions::TooMany(1));
        assert_eq!(regions.host(PAGE + 8, 2 * PAGE - 8), Some(first.host + PAGE + 8));
        for (addr, len) in [(2 * PAGE, PAGE + 1), (4 * PAGE, 1), (8, u64::MAX), (u64::MAX, 1)] {
            assert_eq!(regions.host(addr, len), None, "{addr:#x}+{len:#x}");
        }
        // What is taken away stays mapped here as long as somebody has the list.
        context.unmap_all();
        context.map(0, PAGE, Some((&file, 0)), Access::BOTH).unwrap();
        context.view().write(0, b"there").unwrap();
        assert_eq!(context.regions(1).unwrap().list().len(), 1);
    }

    #[test]
    fn followers_hear_of_changes_before_the_peer_does() {
        struct Seen(Arc<MemoryContext>, Mutex<Vec<usize>>);
        impl Follower for Seen {
            fn memory_changed(&self) {
                let regions = self.0.regions(8).map(|regions| regions.list().len());
                lock(&self.1).push(regions.unwrap_or(usize::MAX));
            }
        }
        let (context, file) = (Arc::new(MemoryContext::new()), file(2));
        let seen = Arc::new(Seen(context.clone(), Mutex::default()));
        context.follow(&seen);
        let map = |page: u64| {
            let place = Some((&file, 0));
            context.map(page * 2 * PAGE, PAGE, place, Access::BOTH).unwrap();
        };
        map(0);
        assert_eq!(*lock(&seen.1), [1]);
        map(1);
        context.unmap(0, PAGE);
        assert_eq!(*lock(&seen.1), [1, 2, 1]);
        context.unmap_all();
        assert_eq!(*lock(&seen.1), [1, 2, 1, 0]);
        lock(&seen.1).clear();
        context.start_log(&[]).unwrap();
        assert_eq!(context.regions(8).unwrap_err(), NoRegions::Logged);
        assert_eq!(*lock(&seen.1), [usize::MAX], "whoever writes without the log must stop");
        context.stop_log();
        assert_eq!(*lock(&seen.1), [usize::MAX, 0], "and may begin again");
        drop(seen);
        map(0);
    }
}
