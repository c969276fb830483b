// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kind of doorbell that a command uses.

use anyhow::{Result, anyhow};
use vbus_driver::{Function, Hal};
use vbus_shm::abi::capability;

/// The number of rings with which the cost of each kind is measured. The costs of the kinds differ
/// clearly with it, and it takes at most a few milliseconds.
pub const RINGS: u32 = 64;

/// The choice on the command line.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The cheapest kind on this machine
    Auto,
    /// A write to the function's memory
    Mmio,
    /// A write to an I/O port
    Pio,
}

impl Choice {
    /// Makes `function` use this kind. The function must not have regions yet.
    pub fn apply<H: Hal>(self, function: &mut Function<H>) -> Result<()> {
        match self {
            Choice::Auto if function.doorbells().count() > 1 => {
                let costs = function.choose_doorbell(RINGS);
                for cost in costs.iter() {
                    tracing::debug!(
                        "a doorbell by {} takes {} ns",
                        cost.doorbell,
                        cost.nanoseconds
                    );
                }
            }
            Choice::Auto => {}
            Choice::Mmio => take(function, capability::KIND_MMIO)?,
            Choice::Pio => take(function, capability::KIND_PIO)?,
        }
        tracing::info!("{}: doorbells by {}", function.info().name, function.doorbell());
        Ok(())
    }
}

fn take<H: Hal>(function: &mut Function<H>, kind: u8) -> Result<()> {
    function.use_doorbell(kind).map_err(|_| {
        let offered = function.doorbells_offered().any(|offered| offered.kind == kind);
        anyhow!(if offered {
            "this process may not write to I/O ports (it needs CAP_SYS_RAWIO, and a kernel that \
             is not locked down)"
        } else {
            "the device has no such doorbells; `vbus-guest list` shows what it has"
        })
    })
}
