// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pseudo-random numbers. A test that fails can be repeated with the same seed.

/// A sequence of pseudo-random numbers. The value is the seed.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    #[allow(clippy::should_implement_trait, reason = "a sequence without an end")]
    pub fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let x = self.0;
        (x >> 32) ^ x.rotate_left(23)
    }

    /// A number from 0 to `end - 1`.
    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 8) % end
    }

    /// An index into something of length `len`.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or(0)
    }

    /// A number that a check of bounds may get wrong: 0, all ones, powers of two and their
    /// neighbours, small numbers, and others.
    pub fn edge(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << self.below(64),
            3 => self.next() & 0xff,
            4 => self.next() & 0xffff,
            5 => (1u64 << self.below(64)).wrapping_sub(1),
            _ => self.next(),
        }
    }
}
