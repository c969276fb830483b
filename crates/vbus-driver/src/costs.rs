// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Measures the cost of ringing each kind of doorbell.

use vbus_shm::abi::capability;

use crate::doorbell::Doorbell;
use crate::hal::Hal;

/// Number of rounds of a measurement. The kinds take turns, so that a disturbance does not hit one
/// kind alone.
const ROUNDS: u32 = 4;

/// The cost of ringing one kind of doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// The kind.
    pub doorbell: Doorbell,
    /// Nanoseconds for one ring, in the best of several rounds.
    pub nanoseconds: u64,
}

/// The cost of ringing each kind of doorbell that this environment can ring.
#[derive(Clone, Copy, Debug, Default)]
pub struct Costs {
    list: [Option<Cost>; capability::RECORDS_MAX],
}

impl Costs {
    /// Rings doorbell `handle` of each kind at least `rings` times.
    pub(crate) fn measure<H: Hal>(
        hal: &H,
        doorbells: impl Iterator<Item = Doorbell>,
        handle: u32,
        rings: u32,
    ) -> Costs {
        let mut costs = Costs::default();
        for (slot, doorbell) in costs.list.iter_mut().zip(doorbells) {
            *slot = Some(Cost { doorbell, nanoseconds: u64::MAX });
        }
        let each = rings.div_ceil(ROUNDS).max(1);
        for _ in 0..ROUNDS {
            for cost in costs.list.iter_mut().flatten() {
                let start = hal.now();
                for _ in 0..each {
                    hal.ring(cost.doorbell, handle);
                }
                let took = hal.now().saturating_sub(start) / u64::from(each);
                cost.nanoseconds = cost.nanoseconds.min(took);
            }
        }
        costs
    }

    /// The costs, in the function's order of the kinds.
    pub fn iter(&self) -> impl Iterator<Item = Cost> + '_ {
        self.list.iter().flatten().copied()
    }

    /// The cheapest kind. Of kinds that cost the same, the first.
    pub fn cheapest(&self) -> Option<Cost> {
        self.iter().min_by_key(|cost| cost.nanoseconds)
    }
}
