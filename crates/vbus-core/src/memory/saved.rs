// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The maps of a peer as data, for a process that takes this one's place.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Access, MAPS_MAX, MapError, MemoryContext};
use crate::lock::lock;

/// The maps of a peer, and the files that they are in.
#[derive(Debug)]
pub struct SavedMaps {
    /// By address.
    pub maps: Vec<SavedMap>,
    /// Duplicates of the files. [`SavedMap::file`] counts them from 0.
    pub files: Vec<OwnedFd>,
}

/// A map (spec/take-over.md, "Memory").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct SavedMap {
    /// The first address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
    /// The number of the file, and the offset in it. `None`: the range cannot be reached.
    pub file: Option<(u32, u64)>,
}

impl MemoryContext {
    /// All maps, and duplicates of their files. It changes nothing.
    ///
    /// # Errors
    /// This process has as many descriptors as it may have.
    pub fn save(&self) -> std::io::Result<SavedMaps> {
        let snapshot = lock(&self.current).snapshot.clone();
        let (mut maps, mut files) = (Vec::new(), Vec::<OwnedFd>::new());
        let mut known = HashMap::new();
        for map in snapshot.table.from(0) {
            let (access, file) = match &map.place {
                None => (Access::new(false, false), None),
                Some(place) => {
                    let key = Arc::as_ptr(&place.file);
                    let number = match known.get(&key) {
                        Some(number) => *number,
                        None => {
                            let number = u32::try_from(files.len()).unwrap_or(u32::MAX);
                            files.push(place.file.as_fd().try_clone_to_owned()?);
                            known.insert(key, number);
                            number
                        }
                    };
                    (place.access, Some((number, place.offset)))
                }
            };
            let Access { read, write } = access;
            maps.push(SavedMap { start: map.start, len: map.len, read, write, file });
        }
        Ok(SavedMaps { maps, files })
    }

    /// Maps what [`save`](Self::save) returned. This context has no maps. The maps may be forged:
    /// each is checked as [`map`](Self::map) checks it.
    ///
    /// # Errors
    /// A map is wrong, or the system refuses. Some of the maps may be there then.
    pub fn restore(&self, saved: &SavedMaps) -> Result<(), MapError> {
        if saved.maps.len() > MAPS_MAX {
            return Err(MapError::Limit);
        }
        for map in &saved.maps {
            let file = match map.file {
                None => None,
                Some((number, offset)) => {
                    let file = saved.files.get(number as usize).ok_or(MapError::NoFile)?;
                    Some((file.as_fd(), offset))
                }
            };
            self.map(map.start, map.len, file, Access::new(map.read, map.write))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    fn file(len: u64) -> OwnedFd {
        let file = memfd_create("peer", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, len).unwrap();
        file
    }

    #[test]
    fn another_context_reaches_the_same_memory() {
        let (one, other) = (MemoryContext::new(), MemoryContext::new());
        let (ram, rom) = (file(0x4000), file(0x1000));
        one.map(0x10_0000, 0x1000, Some((&ram, 0x3000)), Access::BOTH).unwrap();
        one.map(0, 0x3000, Some((&ram, 0)), Access::BOTH).unwrap();
        one.map(0x8000, 0x1000, Some((&rom, 0)), Access::READ).unwrap();
        one.map(0x9000, 0x1000, None::<(&OwnedFd, u64)>, Access::BOTH).unwrap();
        let saved = one.save().unwrap();
        assert_eq!((saved.maps.len(), saved.files.len()), (4, 2));
        other.restore(&saved).unwrap();
        assert_eq!(other.save().unwrap().maps, saved.maps);
        one.view().slice(0x10_0000, 8, true).unwrap();
        one.view().write(0x2ff8, b"the same").unwrap();
        let mut bytes = [0; 8];
        other.view().read(0x2ff8, &mut bytes).unwrap();
        assert_eq!(&bytes, b"the same");
        assert!(other.view().slice(0x8000, 8, true).is_err(), "it may only be read");
        assert!(other.view().slice(0x9000, 8, false).is_err(), "nobody reaches it");
    }

    #[test]
    fn maps_that_lie_are_refused() {
        let context = MemoryContext::new();
        let good = SavedMap { start: 0, len: 0x1000, read: true, write: true, file: Some((0, 0)) };
        for (map, what) in [
            (SavedMap { len: 0, ..good }, "no bytes"),
            (SavedMap { start: u64::MAX - 0xfff, len: 0x2000, ..good }, "beyond the end"),
            (SavedMap { file: Some((1, 0)), ..good }, "no such file"),
            (SavedMap { file: Some((0, 0x1000)), ..good }, "behind the end of the file"),
            (SavedMap { file: Some((0, 8)), ..good }, "no page of the file"),
        ] {
            let saved = SavedMaps { maps: vec![map], files: vec![file(0x1000)] };
            assert!(context.restore(&saved).is_err(), "{what}");
        }
        let twice = SavedMaps { maps: vec![good, good], files: vec![file(0x1000)] };
        assert!(context.restore(&twice).is_err());
    }
}
