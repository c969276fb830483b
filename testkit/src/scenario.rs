// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a scenario is: a test in real guests, with a name and a line about it.

use anyhow::Result;

use crate::l1::L1;
use crate::lab::Scene;
use crate::report::Figures;

/// One test in real guests.
pub struct Scenario {
    /// `vm::NAME` or `kvm::NAME`.
    pub name: &'static str,
    /// One line that says what must hold.
    pub about: &'static str,
    /// What it does.
    pub test: Test,
}

/// A scenario's code, by what it needs. It returns a [`Skip`](crate::report::Skip) as its error if
/// this machine lacks something.
pub enum Test {
    /// It starts guests under QEMU.
    InGuests(fn(&Scene) -> Result<()>),
    /// It starts guests on the KVM of an L1. It may measure figures.
    BesideKvm(fn(&L1, &mut Figures) -> Result<()>),
}
