// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Converts the processor's cycles to nanoseconds.

/// The rate of the cycle counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Nanoseconds of one cycle, as a fixed-point number with [`FRACTION`] fractional bits.
    multiplier: u64,
}

const FRACTION: u32 = 32;

impl Rate {
    /// A cycle takes a nanosecond.
    pub const NANOSECONDS: Rate = Rate { multiplier: 1 << FRACTION };

    /// Makes the rate at which `cycles` cycles take `ns` nanoseconds.
    pub fn measured(cycles: u64, ns: u64) -> Rate {
        let multiplier = (u128::from(ns) << FRACTION) / u128::from(cycles.max(1));
        Rate { multiplier: u64::try_from(multiplier).unwrap_or(u64::MAX) }
    }

    /// Makes the rate of KVM's clock: nanoseconds are the cycles shifted left by `shift` (right if
    /// negative), times `multiplier`, divided by 2^32.
    pub fn kvm(multiplier: u32, shift: i8) -> Rate {
        let multiplier = u64::from(multiplier);
        let by = u32::from(shift.unsigned_abs()).min(31);
        Rate { multiplier: if shift < 0 { multiplier >> by } else { multiplier << by } }
    }

    /// The nanoseconds that `cycles` cycles take.
    pub fn nanoseconds(self, cycles: u64) -> u64 {
        let ns = (u128::from(cycles) * u128::from(self.multiplier)) >> FRACTION;
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// Cycles per microsecond, rounded.
    pub fn mhz(self) -> u64 {
        let scale = 1000u128 << FRACTION;
        let multiplier = u128::from(self.multiplier.max(1));
        u64::try_from((scale + multiplier / 2) / multiplier).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cycles_become_nanoseconds() {
        let rate = Rate::measured(25_000_000, 10_000_000);
        assert_eq!((rate.nanoseconds(2_500_000_000), rate.mhz()), (999_999_999, 2500));
        assert_eq!(Rate::measured(1, 1).nanoseconds(7), 7);
        assert_eq!(Rate::NANOSECONDS.nanoseconds(7), 7);
        // The cycles of a year.
        let year = 365 * 86_400 * 2_500_000_000;
        assert!(rate.nanoseconds(year).abs_diff(year / 5 * 2) < 10_000_000);
    }

    #[test]
    fn kvm_gives_the_rate_with_a_shift() {
        // A multiplier of 1/2, shifted by one.
        assert_eq!(Rate::kvm(1 << 31, 1).nanoseconds(1000), 1000);
        assert_eq!(Rate::kvm(1 << 31, -1).nanoseconds(1000), 250);
        assert_eq!(Rate::kvm(1 << 31, -1).mhz(), 4000);
    }
}
