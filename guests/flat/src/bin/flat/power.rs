// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Powers the machine off.

use crate::cpu;

/// The control register of ACPI's power management, on q35 and in vbus-vmm.
const PM1_CONTROL: u16 = 0x604;
/// Enter the sleeping state of type 0, which is S5 on both machines.
const SLEEP: u16 = 1 << 13;

/// Powers the machine off, or resets it if that fails.
pub fn off() -> ! {
    cpu::out16(PM1_CONTROL, SLEEP);
    cpu::triple_fault()
}
