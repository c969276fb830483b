// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The shim's functions, as `shim/vbus.h` declares and describes them.
#![allow(unsafe_code, reason = "declarations of C")]

use core::ffi::{c_char, c_int, c_uint, c_ulong, c_void};

/// An attribute of a function.
pub const SHOW_CLASS: c_uint = 0;
/// An attribute of a function.
pub const SHOW_NAME: c_uint = 1;
/// An attribute of a function.
pub const SHOW_DOORBELL: c_uint = 2;
/// An attribute of a function.
pub const SHOW_COSTS: c_uint = 3;
/// An attribute of a function.
pub const SHOW_INCARNATION: c_uint = 4;
/// An attribute of a function.
pub const SHOW_INTERRUPTS: c_uint = 5;

/// A log level of the shim.
pub const ERROR: c_int = 3;
/// A log level of the shim.
pub const WARNING: c_int = 4;
/// A log level of the shim.
pub const INFO: c_int = 6;

/// A kind of interrupt.
pub const INTX: u32 = 1;
/// A kind of interrupt.
pub const MSI: u32 = 2;
/// A kind of interrupt.
pub const MSIX: u32 = 4;

/// A trait of an interrupt.
pub const IRQ_SHARED: u32 = 1;
/// A trait of an interrupt.
pub const IRQ_PASSES_ON: u32 = 2;
/// A trait of an interrupt.
pub const IRQ_BOUND: u32 = 4;

/// An IOMMU that translates addresses.
pub const IOMMU_TRANSLATES: u32 = 2;

unsafe extern "C" {
    pub fn shim_goes_down() -> bool;

    pub fn shim_alloc(bytes: u64) -> *mut c_void;
    pub fn shim_free(memory: *mut c_void);

    pub fn shim_log(pci: *mut c_void, level: c_int, text: *const u8, bytes: u64);
    pub fn shim_may_log() -> bool;
    /// It does not return. objtool does not know that, so Rust ends the call itself.
    pub fn shim_panic(text: *const u8, bytes: u64);

    pub fn shim_pci_get(pci: *mut c_void);
    pub fn shim_pci_put(pci: *mut c_void);
    pub fn shim_pci_name(pci: *mut c_void) -> *const c_char;
    pub fn shim_pci_config_read32(pci: *mut c_void, offset: u16) -> u32;
    pub fn shim_pci_enable(pci: *mut c_void) -> c_int;
    pub fn shim_pci_disable(pci: *mut c_void);
    pub fn shim_pci_claim(pci: *mut c_void) -> c_int;
    pub fn shim_pci_unclaim(pci: *mut c_void);
    pub fn shim_pci_bar_bytes(pci: *mut c_void) -> u64;
    pub fn shim_pci_map(pci: *mut c_void) -> *mut c_void;
    pub fn shim_pci_unmap(bar: *mut c_void);
    pub fn shim_pci_set_master(pci: *mut c_void);
    pub fn shim_pci_clear_master(pci: *mut c_void);
    pub fn shim_pci_save(pci: *mut c_void);
    pub fn shim_pci_restore(pci: *mut c_void);

    pub fn shim_pci_msix_vectors(pci: *mut c_void) -> u32;
    pub fn shim_pci_vectors(pci: *mut c_void, most: u32, kinds: u32) -> c_int;
    pub fn shim_pci_free_vectors(pci: *mut c_void);
    pub fn shim_pci_vector(pci: *mut c_void, index: u32) -> c_int;
    pub fn shim_irq_request(
        pci: *mut c_void,
        number: u32,
        traits: u32,
        name: *const u8,
        name_bytes: u64,
        handler: extern "C" fn(*mut c_void) -> bool,
        data: *mut c_void,
        error: *mut c_int,
    ) -> *mut c_void;
    pub fn shim_irq_free(irq: *mut c_void);
    pub fn shim_irq_number(irq: *mut c_void) -> u32;
    pub fn shim_irq_prefer(irq: *mut c_void, nth: u32);
    pub fn shim_irq_bind(number: u32, cpu: u32);
    pub fn shim_cpus() -> u32;
    pub fn shim_cpu_online(cpu: u32) -> bool;

    pub fn shim_dma_mask(pci: *mut c_void, bits: u32) -> c_int;
    pub fn shim_dma_iommu(pci: *mut c_void) -> u32;
    pub fn shim_dma_alloc(pci: *mut c_void, bytes: u64, address: *mut u64) -> *mut c_void;
    pub fn shim_dma_free(pci: *mut c_void, bytes: u64, memory: *mut c_void, address: u64);
    pub fn shim_dma_join(parts: *const *mut c_void, count: u64, bytes: u64) -> *mut c_void;
    pub fn shim_dma_part(joined: *mut c_void);

    pub fn shim_read32(place: *const c_void) -> u32;
    pub fn shim_read64(place: *const c_void) -> u64;
    pub fn shim_write32(place: *mut c_void, value: u32);
    pub fn shim_write64(place: *mut c_void, value: u64);
    pub fn shim_port_write8(port: u16, value: u8);
    pub fn shim_ports_claim(first: u16, count: u32) -> bool;
    pub fn shim_ports_release(first: u16, count: u32);

    pub fn shim_hypercalls() -> bool;
    pub fn shim_has_hypervisor() -> bool;
    pub fn shim_has_vmmcall() -> bool;
    pub fn shim_cpuid(leaf: u32, registers: *mut u32);
    pub fn shim_msr_read(msr: u32, value: *mut u64) -> c_int;
    pub fn shim_msr_write(msr: u32, value: u64) -> c_int;

    pub fn shim_now() -> u64;
    pub fn shim_sleep(least: u32, most: u32);

    pub fn shim_mutex_new() -> *mut c_void;
    pub fn shim_mutex_free(mutex: *mut c_void);
    pub fn shim_mutex_lock(mutex: *mut c_void);
    pub fn shim_mutex_unlock(mutex: *mut c_void);
    pub fn shim_spin_new() -> *mut c_void;
    pub fn shim_spin_free(lock: *mut c_void);
    pub fn shim_spin_lock(lock: *mut c_void) -> c_ulong;
    pub fn shim_spin_unlock(lock: *mut c_void, flags: c_ulong);

    pub fn shim_work_new(run: extern "C" fn(*mut c_void) -> u32, data: *mut c_void) -> *mut c_void;
    pub fn shim_work_free(work: *mut c_void);
    pub fn shim_work_after(work: *mut c_void, milliseconds: u32);
    pub fn shim_work_cancel(work: *mut c_void);

    pub fn shim_timer_new(run: extern "C" fn(*mut c_void), data: *mut c_void) -> *mut c_void;
    pub fn shim_timer_free(timer: *mut c_void);
    pub fn shim_timer_after(timer: *mut c_void, nanoseconds: u64);
}
