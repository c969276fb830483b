// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory for frames. System calls read and write it directly.

use std::collections::VecDeque;

use anyhow::{Result, ensure};
use vbus_driver::Dma;
use vbus_driver::venet::{FRAME_MAX, Piece};
use vbus_iovec::IoVecMut;

/// The alignment of frames: a cache line.
const ALIGN: usize = 64;

/// Memory for frames of any size. Frames are given back in the order in which they were taken.
#[derive(Debug)]
pub struct FrameMemory<D> {
    memory: D,
    head: usize,
    tail: usize,
    /// The end of each frame that has not been given back, oldest first.
    ends: VecDeque<usize>,
}

impl<D: Dma> FrameMemory<D> {
    /// Uses `memory`, which must be one run of addresses with room for at least two frames.
    pub fn new(memory: D) -> Result<Self> {
        let bytes = memory.bytes();
        ensure!(
            bytes >= 2 * FRAME_MAX && memory.is_run(0, bytes),
            "no contiguous memory for frames"
        );
        Ok(FrameMemory { memory, head: 0, tail: 0, ends: VecDeque::new() })
    }

    /// The offset for the next frame, with room for [`FRAME_MAX`] bytes. `None` if there is no
    /// room.
    pub fn room(&mut self) -> Option<usize> {
        if self.ends.is_empty() {
            // Begin at the front again, because that part is in the cache.
            (self.head, self.tail) = (0, 0);
            return Some(0);
        }
        if self.tail < self.head {
            if self.memory.bytes() - self.head >= FRAME_MAX {
                return Some(self.head);
            }
            self.head = 0;
        }
        // Here `ends` is not empty. The head must not reach the tail, which would look like empty.
        (self.tail.saturating_sub(self.head) >= FRAME_MAX).then_some(self.head)
    }

    /// The room at `offset`, for a system call that writes a frame there.
    pub fn vector(&self, offset: usize) -> IoVecMut<'_> {
        IoVecMut::words(self.memory.words(), offset, FRAME_MAX)
    }

    /// Takes the `len` bytes at `offset`, which [`room`](Self::room) returned.
    pub fn take(&mut self, offset: usize, len: usize) -> Piece {
        self.head = (offset + len).next_multiple_of(ALIGN);
        self.ends.push_back(self.head);
        Piece { addr: self.memory.address(offset), len: u32::try_from(len).unwrap_or(0) }
    }

    /// Gives the oldest `count` frames back.
    pub fn give_back(&mut self, count: u32) {
        for _ in 0..count {
            if let Some(end) = self.ends.pop_front() {
                self.tail = end;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vbus_shm::Memory;
    use vbus_shm::sync::Word;

    use super::*;

    #[derive(Clone, Debug)]
    struct Plain(&'static [Word]);

    impl Memory for Plain {
        fn words(&self) -> &[Word] {
            self.0
        }
    }

    impl Dma for Plain {
        fn page_shift(&self) -> u8 {
            0
        }

        fn address(&self, offset: usize) -> u64 {
            offset as u64
        }
    }

    fn frames(bytes: usize) -> FrameMemory<Plain> {
        let words: Vec<Word> = (0..bytes / 8).map(|_| Word::new(0)).collect();
        FrameMemory::new(Plain(words.leak())).unwrap()
    }

    #[test]
    fn frames_in_flight_never_overlap() {
        let mut memory = frames(512 << 10);
        let mut in_flight: VecDeque<(u64, u64)> = VecDeque::new();
        let mut seed = 1u32;
        let (mut taken, mut refused) = (0, 0);
        for _ in 0..100_000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if seed >> 31 == 0 {
                let len = (seed >> 8) as usize % FRAME_MAX + 1;
                let Some(offset) = memory.room() else {
                    refused += 1;
                    assert!(!in_flight.is_empty(), "room when nothing is in flight");
                    continue;
                };
                assert_eq!(memory.vector(offset).len(), FRAME_MAX);
                let piece = memory.take(offset, len);
                let (from, to) = (piece.addr, piece.addr + u64::from(piece.len));
                assert!(in_flight.iter().all(|&(f, t)| to <= f || t <= from));
                in_flight.push_back((from, to));
                taken += 1;
            } else if !in_flight.is_empty() {
                let count = 1 + (seed >> 8) as usize % in_flight.len();
                in_flight.drain(..count);
                memory.give_back(u32::try_from(count).unwrap());
            }
        }
        assert!(taken > 10_000 && refused > 0, "{taken} {refused}");
    }

    #[test]
    fn too_little_memory_is_refused() {
        let words: Vec<Word> = (0..FRAME_MAX / 8).map(|_| Word::new(0)).collect();
        assert!(FrameMemory::new(Plain(words.leak())).is_err());
    }
}
