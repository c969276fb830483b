// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pseudo-random numbers.

use std::fs::File;
use std::io::{self, Read};

/// A sequence of random numbers: xorshift64.
pub struct Random(u64);

impl Random {
    /// The sequence of a seed. Of two seeds that differ in their lowest bit alone it is the same.
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// A sequence that nobody can repeat.
    pub fn of_system() -> io::Result<Self> {
        let mut seed = [0; 8];
        File::open("/dev/urandom")?.read_exact(&mut seed)?;
        Ok(Self::new(u64::from_ne_bytes(seed)))
    }

    /// The next number, of 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        // The lowest bits are the least random.
        (self.next() >> 7) % end
    }

    /// A place in a list of `end` values.
    pub fn index(&mut self, end: usize) -> usize {
        usize::try_from(self.below(end as u64)).unwrap_or(0)
    }

    /// One of these values.
    pub fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.index(values.len())]
    }

    /// A number of 32 bits.
    pub fn word(&mut self) -> u32 {
        ((self.next() >> 7) & 0xffff_ffff) as u32
    }
}
