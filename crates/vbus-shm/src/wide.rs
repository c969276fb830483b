//! Wide copies of whole words, where the machine has them.
//!
//! Atomic accesses of 64 bits are the widest that the language has, and a third of what a processor can copy. An `asm!` block is outside of
//! the compiler's sight: it reads shared memory that the other end may write at the same time as the processor does, torn at worst. So
//! here, and only here, shared memory is not accessed as [`Word`]s. Portable words remain for what is left over, for other machines, for
//! programs that may not touch vector registers (a kernel) and for Miri.
#![allow(unsafe_code)] // See above.

use super::memory::WORD;
use super::sync::{Ordering, Word};

/// Lengths that are a multiple of it are copied without a rest.
pub const STEP: usize = 64;

/// Copies the front of `bytes` into the front of `words` and returns how many bytes: a multiple of [`STEP`], all that both have but a rest.
#[inline(always)]
pub fn store(words: &[Word], bytes: &[u8]) -> usize {
    let len = bytes.len().min(words.len() * WORD) / STEP * STEP;
    // SAFETY: both are at least `len` bytes; `words` is memory that may change at any time.
    if !unsafe { vector::copy(words.as_ptr().cast_mut().cast(), bytes.as_ptr(), len) } {
        for (word, bytes) in words.iter().zip(bytes[..len].chunks_exact(WORD)) {
            let mut value = [0; WORD];
            value.copy_from_slice(bytes);
            word.store(u64::from_le_bytes(value), Ordering::Relaxed);
        }
    }
    len
}

/// Copies the front of `words` into the front of `out` and returns how many bytes: a multiple of [`STEP`], all that both have but a rest.
#[inline(always)]
pub fn load(words: &[Word], out: &mut [u8]) -> usize {
    let len = out.len().min(words.len() * WORD) / STEP * STEP;
    // SAFETY: as in `store`.
    if !unsafe { vector::copy(out.as_mut_ptr(), words.as_ptr().cast(), len) } {
        for (word, bytes) in words.iter().zip(out[..len].chunks_exact_mut(WORD)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
    }
    len
}

#[cfg(not(all(target_arch = "x86_64", target_feature = "sse2", not(miri))))]
mod vector {
    /// Copies nothing, and says so.
    pub(super) unsafe fn copy(_: *mut u8, _: *const u8, _: usize) -> bool {
        false
    }
}

#[cfg(all(target_arch = "x86_64", target_feature = "sse2", not(miri)))]
mod vector {
    use core::arch::asm;
    use core::arch::x86_64::__cpuid;
    use core::sync::atomic::{AtomicU8, Ordering};

    use super::STEP;

    /// From here on, what AVX saves is more than the way to it costs.
    const AVX_FROM: usize = 128;

    /// Copies `bytes` bytes, and says so.
    ///
    /// # Safety
    /// `bytes` is a multiple of [`STEP`]; `to` is as many bytes that may be written, `from` as many that may be read; they do not overlap.
    #[inline(always)]
    pub(super) unsafe fn copy(to: *mut u8, from: *const u8, bytes: usize) -> bool {
        if bytes >= AVX_FROM && avx() {
            // SAFETY: the processor has AVX, there are at least 128 bytes.
            unsafe { copy_avx(to, from, bytes) };
        } else if bytes != 0 {
            // SAFETY: every x86-64 has SSE2; the loop copies a multiple of 64 bytes that is not 0.
            unsafe {
                asm!(
                    "2:",
                    "movdqu {a}, [{from}]",
                    "movdqu {b}, [{from} + 16]",
                    "movdqu {c}, [{from} + 32]",
                    "movdqu {d}, [{from} + 48]",
                    "movdqu [{to}], {a}",
                    "movdqu [{to} + 16], {b}",
                    "movdqu [{to} + 32], {c}",
                    "movdqu [{to} + 48], {d}",
                    "add {from}, 64",
                    "add {to}, 64",
                    "sub {left}, 64",
                    "jnz 2b",
                    from = inout(reg) from => _,
                    to = inout(reg) to => _,
                    left = inout(reg) bytes => _,
                    a = out(xmm_reg) _,
                    b = out(xmm_reg) _,
                    c = out(xmm_reg) _,
                    d = out(xmm_reg) _,
                    options(nostack),
                );
            }
        }
        true
    }

    /// Copies all of `bytes` bytes: 32 as they come, then whole steps from where `to` is aligned, then the last 64 once more as they come.
    ///
    /// # Safety
    /// As of [`copy`]; the processor has AVX, and `bytes` is at least [`AVX_FROM`].
    #[inline(always)]
    unsafe fn copy_avx(to: *mut u8, from: *const u8, bytes: usize) {
        let skip = 32 - to as usize % 32;
        let steps = (bytes - skip) / STEP;
        // SAFETY: the head is 32 bytes and covers `skip`; the loop covers `steps` of 64 behind it, at least one; the tail lies wholly within,
        // as `bytes` is at least 64.
        unsafe {
            asm!(
                "vmovdqu ymm0, [{from}]",
                "vmovdqu [{to}], ymm0",
                "add {from}, {skip}",
                "add {to}, {skip}",
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
                "vzeroupper",
                from = inout(reg) from => _,
                to = inout(reg) to => _,
                skip = in(reg) skip,
                steps = inout(reg) steps => _,
                from_tail = in(reg) from.add(bytes - STEP),
                to_tail = in(reg) to.add(bytes - STEP),
                out("xmm0") _,
                out("xmm1") _,
                options(nostack),
            );
        }
    }

    /// Whether the processor has AVX and the system keeps its registers. Asked once: the answer takes an exit in a virtual machine.
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
        // SAFETY: OSXSAVE says that the instruction is there; it only reads register 0.
        unsafe { asm!("xgetbv", in("ecx") 0, out("eax") kept, out("edx") _, options(nomem, nostack, preserves_flags)) }
        kept & XMM_AND_YMM == XMM_AND_YMM
    }
}
