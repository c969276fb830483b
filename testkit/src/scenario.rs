//! What a scenario is: a test in real guests, with a name and a line about it.

use anyhow::Result;

use crate::lab::Scene;
use crate::report::Figures;
use crate::rig::Rig;

/// One test in real guests.
pub struct Scenario {
    /// `vm::NAME` or `kvm::NAME`.
    pub name: &'static str,
    /// One line that says what must hold.
    pub about: &'static str,
    /// What it does.
    pub test: Test,
}

/// What a scenario does, by what it needs. A [`Skip`](crate::report::Skip) as its error says that
/// this machine lacks something.
pub enum Test {
    /// It starts guests under QEMU.
    InGuests(fn(&Scene) -> Result<()>),
    /// It starts guests on the KVM of an L1, and may measure figures.
    BesideKvm(fn(&Rig, &mut Figures) -> Result<()>),
}
