// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Wide copies of whole words, where the machine has them.
//!
//! The widest atomic access of the language has 64 bits. Copies by such accesses have a third of
//! the speed that a processor can reach. The compiler does not see into an `asm!` block. So the
//! block may read shared memory while the other end writes it: the copy is torn at worst. Only this
//! file accesses shared memory other than by [`Word`]s. Copies go by words if they are short, on
//! other machines, in programs that may not use vector registers (a kernel), and under Miri.
#![allow(unsafe_code)] // See above.

use super::memory::WORD;
use super::sync::Word;

/// Copies the front of `bytes` to all of `words` and returns true, or does nothing and returns
/// false. `bytes` is at least as long as `words`.
#[inline(always)]
pub fn store(words: &[Word], bytes: &[u8]) -> bool {
    let bytes = &bytes[..words.len() * WORD];
    // SAFETY: both have `bytes.len()` bytes. `words` is memory that may change at any time.
    unsafe { vector::copy(words.as_ptr().cast_mut().cast(), bytes.as_ptr(), bytes.len()) }
}

/// Copies all of `words` to the front of `out` and returns true, or does nothing and returns false.
/// `out` is at least as long as `words`.
#[inline(always)]
pub fn load(words: &[Word], out: &mut [u8]) -> bool {
    let out = &mut out[..words.len() * WORD];
    // SAFETY: as in `store`.
    unsafe {
        vector::copy_line(out.as_mut_ptr(), words.as_ptr().cast(), out.len())
            || vector::copy(out.as_mut_ptr(), words.as_ptr().cast(), out.len())
    }
}

#[cfg(not(all(target_arch = "x86_64", target_feature = "sse2", not(miri))))]
mod vector {
    /// Does nothing and returns false.
    pub(super) unsafe fn copy(_: *mut u8, _: *const u8, _: usize) -> bool {
        false
    }

    /// Does nothing and returns false.
    pub(super) unsafe fn copy_line(_: *mut u8, _: *const u8, _: usize) -> bool {
        false
    }
}

#[cfg(all(target_arch = "x86_64", target_feature = "sse2", not(miri)))]
mod vector {
    use core::arch::asm;
    use core::arch::x86_64::__cpuid;
    use core::sync::atomic::{AtomicU8, Ordering};

    /// Bytes of a step of the loop.
    const STEP: usize = 64;
    /// The smallest copy that is faster by vectors. A smaller value that was written by words a
    /// moment ago is read faster by words.
    const FROM: usize = 2 * STEP;

    /// Copies `bytes` bytes and returns true, or does nothing and returns false. First it copies
    /// whole steps from the point on where `to` is aligned. Then it copies the last 64 bytes, and
    /// then the first 32. A value often begins with a counter or a time that was written a moment
    /// ago. A vector cannot be read from a word that is still on its way to the cache, so the first
    /// bytes come last.
    ///
    /// # Safety
    /// `to` has at least `bytes` bytes that may be written. `from` has at least `bytes` bytes that
    /// may be read. They do not overlap.
    #[inline(always)]
    pub(super) unsafe fn copy(to: *mut u8, from: *const u8, bytes: usize) -> bool {
        if bytes < FROM || !avx() {
            return false;
        }
        let skip = 32 - to as usize % 32;
        let steps = (bytes - skip) / STEP;
        // SAFETY: the processor has AVX. The head has 32 bytes and covers `skip`. The loop covers
        // `steps` steps of 64 bytes behind `skip`, at least one. The tail lies wholly within the
        // copy, because `bytes` is at least 64.
        unsafe {
            asm!(
                "2:",
                "vmovdqu ymm0, [{from}]",
                "vmovdqu ymm1, [{from} + 32]",
                "vmovdqa [{to}], ymm0",
                "vmovdqa [{to} + 32], ymm1",
                "add {from}, 64",
                "add {to}, 64",
                "dec {steps}",
                "jnz 2b",
                "vmovdqu ymm0, [{from_tail}]",
                "vmovdqu ymm1, [{from_tail} + 32]",
                "vmovdqu [{to_tail}], ymm0",
                "vmovdqu [{to_tail} + 32], ymm1",
                "vmovdqu ymm0, [{from_head}]",
                "vmovdqu [{to_head}], ymm0",
                "vzeroupper",
                from = inout(reg) from.add(skip) => _,
                to = inout(reg) to.add(skip) => _,
                from_head = in(reg) from,
                to_head = in(reg) to,
                steps = inout(reg) steps => _,
                from_tail = in(reg) from.add(bytes - STEP),
                to_tail = in(reg) to.add(bytes - STEP),
                // vzeroupper clears the upper half of every register. The compiler names each
                // register by its lower half.
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                options(nostack),
            );
        }
        true
    }

    /// Copies `bytes` bytes and returns true if `bytes` is 64. Otherwise does nothing and returns
    /// false. It is slow for a value that was written by words a moment ago.
    ///
    /// # Safety
    /// The same as for [`copy`].
    #[inline(always)]
    pub(super) unsafe fn copy_line(to: *mut u8, from: *const u8, bytes: usize) -> bool {
        if bytes != 64 {
            return false;
        }
        // SAFETY: both have 64 bytes, and the target has SSE2.
        unsafe {
            asm!(
                "movdqu {a}, [{from}]",
                "movdqu {b}, [{from} + 16]",
                "movdqu {c}, [{from} + 32]",
                "movdqu {d}, [{from} + 48]",
                "movdqu [{to}], {a}",
                "movdqu [{to} + 16], {b}",
                "movdqu [{to} + 32], {c}",
                "movdqu [{to} + 48], {d}",
                from = in(reg) from,
                to = in(reg) to,
                a = out(xmm_reg) _,
                b = out(xmm_reg) _,
                c = out(xmm_reg) _,
                d = out(xmm_reg) _,
                options(nostack, preserves_flags),
            );
        }
        true
    }

    /// Whether the processor has AVX and the system keeps its registers. This asks the processor
    /// once, because the answer takes an exit in a virtual machine.
    #[inline(always)]
    fn avx() -> bool {
        const NO: u8 = 1;
        const YES: u8 = 2;
        static KNOWN: AtomicU8 = AtomicU8::new(0);
        match KNOWN.load(Ordering::Relaxed) {
            YES => true,
            NO => false,
            _ => {
                let yes = ask();
                KNOWN.store(if yes { YES } else { NO }, Ordering::Relaxed);
                yes
            }
        }
    }

    #[cold]
    #[allow(unused_unsafe)] // CPUID is safe to call in newer versions of Rust.
    fn ask() -> bool {
        const OSXSAVE_AND_AVX: u32 = 1 << 27 | 1 << 28;
        const XMM_AND_YMM: u32 = 1 << 1 | 1 << 2;
        // SAFETY: every x86-64 has leaf 1.
        let features = unsafe { __cpuid(1) }.ecx;
        if features & OSXSAVE_AND_AVX != OSXSAVE_AND_AVX {
            return false;
        }
        let kept: u32;
        // SAFETY: OSXSAVE says that the processor has the instruction. It only reads register 0.
        unsafe {
            asm!(
                "xgetbv",
                in("ecx") 0,
                out("eax") kept,
                out("edx") _,
                options(nomem, nostack, preserves_flags),
            );
        }
        kept & XMM_AND_YMM == XMM_AND_YMM
    }
}
