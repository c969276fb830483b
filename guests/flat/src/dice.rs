// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pseudo-random numbers of low quality. They are the same in each run.

/// A small generator of pseudo-random numbers.
pub struct Dice(u64);

impl Dice {
    /// Makes the generator for a seed.
    pub fn new(seed: u64) -> Dice {
        // The state must not be 0, or all numbers would be 0.
        Dice(0x9e37_79b9_7f4a_7c15 ^ (seed & 0xff_ffff) << 7)
    }

    /// Returns a number below `sides`, which must not be 0.
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_side_comes_up_and_seeds_differ() {
        let rolls = |seed| {
            let mut dice = Dice::new(seed);
            (0..64).map(|_| dice.roll(4)).collect::<Vec<_>>()
        };
        assert!(
            (0..4).all(|side| rolls(0).contains(&side)) && rolls(0).iter().all(|side| *side < 4)
        );
        assert_ne!(rolls(0), rolls(1));
        assert_eq!(rolls(7), rolls(7));
    }
}
