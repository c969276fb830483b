// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The processor: CPUID, model-specific registers, hypercalls. On processors other than x86 there
//! is no hypervisor here.
#![allow(unsafe_code, reason = "calls the shim, and the hypervisor")]

use super::errno::Errno;
use super::ffi;

/// Whether the administrator allows hypercalls, by the module's parameter.
pub fn may_call() -> bool {
    // SAFETY: it has no conditions.
    unsafe { ffi::shim_hypercalls() }
}

/// Whether this is a virtual machine.
pub fn has_hypervisor() -> bool {
    // SAFETY: it has no conditions.
    unsafe { ffi::shim_has_hypervisor() }
}

/// Whether the instruction of hypercalls is `vmmcall`, and not `vmcall`.
pub fn has_vmmcall() -> bool {
    // SAFETY: it has no conditions.
    unsafe { ffi::shim_has_vmmcall() }
}

/// `eax`, `ebx`, `ecx` and `edx` of a leaf of CPUID.
pub fn cpuid(leaf: u32) -> [u32; 4] {
    let mut registers = [0; 4];
    // SAFETY: there is room for the four registers.
    unsafe { ffi::shim_cpuid(leaf, registers.as_mut_ptr()) };
    registers
}

/// The value of a model-specific register. An error: the processor has none of that number.
pub fn read_msr(msr: u32) -> Result<u64, Errno> {
    let mut value = 0;
    // SAFETY: a register that is not there is an error and nothing else.
    Errno::check(unsafe { ffi::shim_msr_read(msr, &raw mut value) })?;
    Ok(value)
}

/// Sets a model-specific register of this processor.
///
/// # Safety
/// The register is one of the hypervisor's, and the value does nothing to memory.
pub unsafe fn write_msr(msr: u32, value: u64) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    Errno::check(unsafe { ffi::shim_msr_write(msr, value) }).map(drop)
}

/// A hypercall of Hyper-V's interface in its fast form, with one parameter. It returns the status.
///
/// # Safety
/// The hypervisor has this interface, and `call` touches no memory of the guest.
#[cfg(target_arch = "x86_64")]
#[inline]
pub unsafe fn hypercall(vmmcall: bool, call: u64, parameter: u64) -> u64 {
    let status;
    // SAFETY: by the caller's promise. The interface leaves all registers but these alone.
    unsafe {
        if vmmcall {
            core::arch::asm!("vmmcall", inlateout("rcx") call => _, inlateout("rdx") parameter => _,
                inlateout("r8") 0u64 => _, lateout("rax") status, lateout("r9") _,
                lateout("r10") _, lateout("r11") _, options(nostack));
        } else {
            core::arch::asm!("vmcall", inlateout("rcx") call => _, inlateout("rdx") parameter => _,
                inlateout("r8") 0u64 => _, lateout("rax") status, lateout("r9") _,
                lateout("r10") _, lateout("r11") _, options(nostack));
        }
    }
    status
}

/// There are no hypercalls on this processor.
///
/// # Safety
/// It has no conditions.
#[cfg(not(target_arch = "x86_64"))]
pub unsafe fn hypercall(_vmmcall: bool, _call: u64, _parameter: u64) -> u64 {
    u64::MAX
}
