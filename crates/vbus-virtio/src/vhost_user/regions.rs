// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The front end's regions of memory, and where its own addresses are in the driver's memory.
//!
//! A front end names rings by the addresses that it has itself. Descriptors have the driver's
//! addresses. The device knows the driver's addresses alone, so the first become the second when a
//! ring begins.

use super::message::Region;

/// The most regions of a front end.
pub const SLOTS: usize = 509;

/// Why a region cannot be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRegion {
    /// It is empty, or wraps around.
    #[error("the region {0:#x}+{1:#x} is empty or wraps around")]
    Range(u64, u64),
    /// Another region has some of its addresses.
    #[error("the region {0:#x}+{1:#x} overlaps another one")]
    Overlap(u64, u64),
    /// There are [`SLOTS`] regions.
    #[error("more than {SLOTS} regions")]
    Slots,
}

/// The regions. None of them overlap, for the driver nor in the front end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Regions(Vec<Region>);

impl Regions {
    /// Checks a region that comes to the others.
    ///
    /// # Errors
    /// It cannot be one.
    pub fn check(&self, region: &Region) -> Result<(), BadRegion> {
        let Region { guest, size, user, .. } = *region;
        for start in [guest, user] {
            if size == 0 || start.checked_add(size).is_none() {
                return Err(BadRegion::Range(start, size));
            }
        }
        let apart = |a: u64, a_size: u64, b: u64, b_size: u64| a + a_size <= b || b + b_size <= a;
        for other in &self.0 {
            for (start, theirs) in [(guest, other.guest), (user, other.user)] {
                if !apart(start, size, theirs, other.size) {
                    return Err(BadRegion::Overlap(start, size));
                }
            }
        }
        if self.0.len() >= SLOTS { Err(BadRegion::Slots) } else { Ok(()) }
    }

    /// Adds a region that was checked.
    pub fn add(&mut self, region: Region) {
        self.0.push(region);
    }

    /// Takes away the region that has the addresses and the size of `region`. False: there is none.
    pub fn remove(&mut self, region: &Region) -> bool {
        let key = |r: &Region| (r.guest, r.size, r.user);
        let at = self.0.iter().position(|other| key(other) == key(region));
        at.map(|at| self.0.swap_remove(at)).is_some()
    }

    /// The end of the highest region, in the driver's addresses.
    pub fn end(&self) -> u64 {
        self.0.iter().map(|region| region.guest + region.size).max().unwrap_or(0)
    }

    /// The driver's address of the `len` bytes that the front end has at `user`. `None`: no region
    /// has all of them.
    pub fn guest(&self, user: u64, len: u64) -> Option<u64> {
        self.0.iter().find_map(|region| {
            let inside = user.checked_sub(region.user)?;
            let end = inside.checked_add(len)?;
            (end <= region.size).then_some(region.guest + inside)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(guest: u64, size: u64, user: u64) -> Region {
        Region { guest, size, user, offset: 0 }
    }

    #[test]
    fn regions_neither_overlap_nor_wrap() {
        let mut regions = Regions::default();
        let first = region(0x1000, 0x2000, 0x7000_0000);
        assert_eq!(regions.check(&first), Ok(()));
        regions.add(first);
        for (bad, why) in [
            (region(0, 0, 0), BadRegion::Range(0, 0)),
            (region(u64::MAX, 2, 0), BadRegion::Range(u64::MAX, 2)),
            (region(0, 0x1000, u64::MAX - 4), BadRegion::Range(u64::MAX - 4, 0x1000)),
            (region(0x2fff, 1, 0), BadRegion::Overlap(0x2fff, 1)),
            (region(0, u64::MAX, 0), BadRegion::Overlap(0, u64::MAX)),
            (region(0x5000, 0x1000, 0x7000_1fff), BadRegion::Overlap(0x7000_1fff, 0x1000)),
        ] {
            assert_eq!(regions.check(&bad), Err(why), "{bad:?}");
        }
        assert_eq!(regions.check(&region(0x3000, 0x1000, 0x7000_2000)), Ok(()));
        assert!(!regions.remove(&region(0x1000, 0x1000, 0x7000_0000)));
        assert!(regions.remove(&first) && !regions.remove(&first));
    }

    #[test]
    fn an_address_is_in_one_region() {
        let mut regions = Regions::default();
        regions.add(region(0x1000, 0x2000, 0x7000_0000));
        regions.add(region(0x10_0000, 0x1000, 0x7000_2000));
        assert_eq!(regions.guest(0x7000_0010, 0x1ff0), Some(0x1010));
        assert_eq!(regions.guest(0x7000_2000, 0x1000), Some(0x10_0000));
        for (user, len) in
            [(0x7000_1fff, 2), (0x6fff_ffff, 1), (0x7000_3000, 1), (u64::MAX, 1), (1, u64::MAX)]
        {
            assert_eq!(regions.guest(user, len), None, "{user:#x}");
        }
    }

    #[test]
    fn there_is_an_end_of_slots() {
        let mut regions = Regions::default();
        for number in 0..SLOTS as u64 {
            let next = region(number << 12, 0x1000, number << 12);
            assert_eq!(regions.check(&next), Ok(()));
            regions.add(next);
        }
        let next = region((SLOTS as u64) << 12, 0x1000, (SLOTS as u64) << 12);
        assert_eq!(regions.check(&next), Err(BadRegion::Slots));
    }
}
