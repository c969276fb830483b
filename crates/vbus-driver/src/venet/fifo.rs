// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Room for frames that are copied into memory that the device always reaches.

/// Each place begins with a multiple of this, so that the driver writes no cache line from which
/// the device reads another frame.
const ALIGN: u32 = 64;

/// Which bytes of a memory hold frames under way. Frames come and go in one order, and each has its
/// bytes in one run. This keeps the numbers, and does not access the memory.
///
/// ```
/// # use vbus_driver::venet::Fifo;
/// let mut fifo = Fifo::new(1 << 20);
/// let place = fifo.find(1514).unwrap();
/// // Copy the frame to `place.offset`, and submit it. Then:
/// fifo.take(place);
/// // When the frame has come back:
/// fifo.give_back(place.held);
/// assert!(fifo.is_empty());
/// ```
#[derive(Clone, Debug)]
pub struct Fifo {
    bytes: u32,
    /// Where the free bytes begin, below `bytes`.
    head: u32,
    /// Bytes before `head`, and from the end on, that are not free.
    used: u32,
}

/// Where a frame may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Of its first byte: a multiple of 64.
    pub offset: u32,
    /// The bytes that are not free until the frame has come back: its own, rounded up, and those at
    /// the end of the memory that were too few for it.
    pub held: u32,
}

impl Fifo {
    /// All of `bytes` bytes, rounded down to a multiple of 64, are free.
    pub fn new(bytes: u32) -> Self {
        Fifo { bytes: bytes - bytes % ALIGN, head: 0, used: 0 }
    }

    /// The place of the next frame, of `bytes` bytes. None: there is no room for it now. An empty
    /// FIFO has a place for every frame that is not longer than the memory.
    pub fn find(&self, bytes: u32) -> Option<Place> {
        let need = bytes.checked_next_multiple_of(ALIGN)?;
        if self.used == 0 {
            // At the beginning again: what was written last is likely to be in the cache.
            return (need <= self.bytes).then_some(Place { offset: 0, held: need });
        }
        let end = self.bytes - self.head;
        let place = if need <= end {
            Place { offset: self.head, held: need }
        } else {
            Place { offset: 0, held: end.checked_add(need)? }
        };
        (place.held <= self.bytes - self.used).then_some(place)
    }

    /// Gives the next frame the place that [`find`](Self::find) has found since the last change.
    pub fn take(&mut self, place: Place) {
        if self.used == 0 {
            self.head = 0;
        }
        self.used = self.used.saturating_add(place.held).min(self.bytes);
        let head = u64::from(self.head) + u64::from(place.held);
        let bytes = u64::from(self.bytes);
        // Both are at most `bytes`, so their sum is less than twice that, or the memory is full.
        let head = if head >= bytes { head - bytes } else { head };
        self.head = u32::try_from(head).unwrap_or(0);
    }

    /// The oldest frame has come back: frees the bytes that its place held.
    pub fn give_back(&mut self, held: u32) {
        self.used = self.used.saturating_sub(held);
    }

    /// Whether no frame is under way.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Whether a quarter of the memory or more is not free.
    pub fn is_filling(&self) -> bool {
        self.used >= self.bytes / 4
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::collections::VecDeque;
    use std::vec;

    use super::*;

    /// Any order of frames and returns: frames under way share no bytes, and a FIFO from which all
    /// has come back takes the largest frame.
    #[test]
    fn frames_under_way_share_no_bytes() {
        let mut random = 1_u64;
        let mut next = |below: u32| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            u32::try_from(random >> 33).unwrap() % below
        };
        for bytes in [64, 100, 4096, 5000, 65536] {
            let size = bytes / 64 * 64;
            let mut fifo = Fifo::new(bytes);
            let mut owner = vec![None; size as usize];
            let mut under_way = VecDeque::new();
            let (mut refused, mut skipped) = (0, 0);
            for number in 0..4000_u32 {
                let most = size / (1 + next(8));
                let wanted = 1 + next(most.max(1));
                if let Some(place) = fifo.find(wanted) {
                    fifo.take(place);
                    assert_eq!(place.offset % 64, 0);
                    skipped += u32::from(place.held >= wanted + 64);
                    let run = place.offset as usize..(place.offset + wanted) as usize;
                    assert!(owner[run.clone()].iter().all(Option::is_none));
                    owner[run.clone()].fill(Some(number));
                    under_way.push_back((run, place.held));
                } else {
                    refused += 1;
                    assert!(!under_way.is_empty(), "an empty FIFO has room for {wanted}");
                }
                for _ in 0..next(3) {
                    let Some((run, held)) = under_way.pop_front() else { break };
                    owner[run].fill(None);
                    fifo.give_back(held);
                    assert_eq!(fifo.is_empty(), under_way.is_empty());
                }
            }
            assert!(refused > 0 && (skipped > 0 || bytes < 4096), "{refused} {skipped}");
            for (_, held) in under_way.drain(..) {
                fifo.give_back(held);
            }
            assert!(fifo.is_empty() && fifo.find(size).is_some());
        }
    }

    #[test]
    fn what_never_fits_has_no_place() {
        let mut fifo = Fifo::new(1 << 20);
        assert_eq!(fifo.find((1 << 20) + 1), None);
        assert_eq!(fifo.find(u32::MAX), None);
        let place = fifo.find(1 << 20).unwrap();
        fifo.take(place);
        assert!(fifo.is_filling() && fifo.find(1).is_none());
        fifo.give_back(place.held);
        assert_eq!(fifo.find(1), Some(Place { offset: 0, held: 64 }));
    }
}
