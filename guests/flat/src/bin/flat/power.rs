//! The end: the machine is powered off.

use crate::cpu;

/// The control register of ACPI's power management, on q35 and in vbus-vmm.
const PM1_CONTROL: u16 = 0x604;
/// Enter the sleeping state whose type is 0, which on both is S5.
const SLEEP: u16 = 1 << 13;

/// Powers the machine off. One that cannot be is reset.
pub fn off() -> ! {
    cpu::out16(PM1_CONTROL, SLEEP);
    cpu::triple_fault()
}
