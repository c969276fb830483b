// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The functions that compiled code calls to copy, fill and compare memory. On other systems the C
//! library has them.
#![allow(unsafe_code, reason = "the functions that everything else is compiled to")]

use core::arch::asm;

/// Copies `n` bytes. The ranges must not overlap.
///
/// # Safety
/// `to` can be written and `from` read, for `n` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    // SAFETY: the caller's promise. The direction flag is always clear.
    unsafe {
        asm!("rep movsq", "mov rcx, {rest}", "rep movsb", rest = in(reg) n % 8,
            inout("rcx") n / 8 => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags));
    }
    to
}

/// Copies `n` bytes. The ranges may overlap.
///
/// # Safety
/// As for [`memcpy`].
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= n {
        // SAFETY: the caller's promise. The copy reads each byte before it overwrites it.
        return unsafe { memcpy(to, from, n) };
    }
    // SAFETY: the caller's promise. The copy runs from the end, so it reads each byte before it
    // overwrites it. `n` is not 0 here.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") n => _, inout("rdi") to.add(n - 1) => _,
            inout("rsi") from.add(n - 1) => _, options(nostack));
    }
    to
}

/// Fills `n` bytes.
///
/// # Safety
/// `to` can be written for `n` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, n: usize) -> *mut u8 {
    let bytes = u64::from(byte as u8) * 0x0101_0101_0101_0101;
    // SAFETY: the caller's promise. The direction flag is always clear.
    unsafe {
        asm!("rep stosq", "mov rcx, {rest}", "rep stosb", rest = in(reg) n % 8,
            inout("rcx") n / 8 => _, inout("rdi") to => _, in("rax") bytes, options(nostack, preserves_flags));
    }
    to
}

/// Compares `n` bytes.
///
/// # Safety
/// `a` and `b` can be read for `n` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    for i in 0..n {
        // SAFETY: the caller's promise.
        let (a, b) = unsafe { (*a.add(i), *b.add(i)) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// Compares `n` bytes for equality.
///
/// # Safety
/// As for [`memcmp`].
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(a, b, n) }
}
