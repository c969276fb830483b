// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The ways to end messages.

use crate::hal::FlatHal;
use crate::traps::End;
use crate::{apic, kvm};

/// A way to end messages.
#[derive(Clone, Copy)]
pub enum Way {
    /// By the APIC's register.
    Msi,
    /// By KVM's bit in memory.
    PvEoi,
    /// Automatically: they go to a synthetic interrupt source of Hyper-V's interface.
    Sint,
}

impl Way {
    const ALL: [Way; 3] = [Way::Msi, Way::PvEoi, Way::Sint];
    /// The number of ways.
    pub const COUNT: usize = Way::ALL.len();

    /// The ways that are available here for messages of this function.
    pub fn there(hal: &FlatHal) -> impl Iterator<Item = Way> + '_ {
        Way::ALL.into_iter().filter(|way| way.is_there(hal))
    }

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Way::Msi => "msi",
            Way::PvEoi => "pv_eoi",
            Way::Sint => "sint",
        }
    }

    /// The end of interrupt that the handler performs.
    pub fn end(self) -> End {
        match self {
            Way::Msi => apic::by_register(),
            Way::PvEoi => End::Paravirtual,
            Way::Sint => End::Automatic,
        }
    }

    fn is_there(self, hal: &FlatHal) -> bool {
        match self {
            Way::Msi => true,
            Way::PvEoi => {
                apic::is_x2apic() && kvm::features().is_some_and(|features| features.pv_eoi)
            }
            Way::Sint => {
                matches!(hal.function(), Ok(function) if function.synthetic_interrupts().is_some())
            }
        }
    }
}
