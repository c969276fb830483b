//! Doorbells: which kinds a function offers, which of them can be rung here, and which is the
//! cheapest.

use core::fmt;

use vbus_shm::abi::{bar0, capability};

use crate::hal::Hal;

/// In how many rounds a measurement is done. The kinds take turns, so that a disturbance does not
/// hit one alone.
const ROUNDS: u32 = 4;
const PORT_MAX: u64 = 0xffff;

/// A kind of doorbell that a function offers: a record of its PCI capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// [`capability::KIND_MMIO`] etc.
    pub kind: u8,
    /// From the place of one doorbell to that of the next.
    pub stride: u16,
    /// Place of doorbell 0: an offset in BAR 0, an I/O port, a connection number.
    pub base: u32,
}

impl Doorbell {
    /// The place of doorbell `handle`.
    pub fn offset(&self, handle: u32) -> u64 {
        u64::from(self.base) + u64::from(self.stride) * u64::from(handle)
    }

    /// What its kind is called.
    pub fn name(&self) -> &'static str {
        match self.kind {
            capability::KIND_MMIO => "mmio",
            capability::KIND_PIO => "pio",
            capability::KIND_HYPERCALL => "hypercall",
            _ => "unknown",
        }
    }

    /// Whether it is one of a doorbell, of a kind that this crate knows, with a place for each of
    /// `regions` handles.
    pub(crate) fn is_sound(&self, regions: u32) -> bool {
        let last = self.offset(regions.saturating_sub(1));
        self.stride > 0
            && match self.kind {
                capability::KIND_MMIO => {
                    let end = self.offset(bar0::DOORBELL_COUNT);
                    self.base % 4 == 0 && self.stride % 4 == 0 && end <= bar0::SIZE
                }
                capability::KIND_PIO => last <= PORT_MAX,
                capability::KIND_HYPERCALL => last <= u64::from(capability::CONNECTION_MAX),
                _ => false,
            }
    }
}

impl fmt::Display for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What ringing costs, by one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// The kind.
    pub doorbell: Doorbell,
    /// Nanoseconds for one ring: those of the best of several rounds.
    pub nanoseconds: u64,
}

/// What ringing costs, by each kind that can be rung here.
#[derive(Clone, Copy, Debug, Default)]
pub struct Costs {
    list: [Option<Cost>; capability::RECORDS_MAX],
}

impl Costs {
    /// Rings doorbell `handle` of each of `doorbells`, each `rings` times at least.
    pub(crate) fn measure<H: Hal>(
        hal: &H,
        doorbells: impl Iterator<Item = Doorbell>,
        handle: u32,
        rings: u32,
    ) -> Costs {
        let mut costs = Costs::default();
        for (place, doorbell) in costs.list.iter_mut().zip(doorbells) {
            *place = Some(Cost { doorbell, nanoseconds: u64::MAX });
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

    /// In the function's order.
    pub fn iter(&self) -> impl Iterator<Item = Cost> + '_ {
        self.list.iter().flatten().copied()
    }

    /// The cheapest; the first of those that cost the same.
    pub fn cheapest(&self) -> Option<Cost> {
        self.iter().min_by_key(|cost| cost.nanoseconds)
    }
}
