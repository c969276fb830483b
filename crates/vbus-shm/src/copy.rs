// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copies between shared words and plain bytes. The other end may write during a copy. The copy is
//! torn then, but it is never undefined behaviour.

use super::memory::WORD;
use super::sync::{Ordering, Word};
use super::wide;

/// Copies `bytes` to the front of `words`, and fills the rest of `words` with zeros. Leaves out the
/// bytes for which there are no words.
#[inline(always)]
pub fn store(words: &[Word], bytes: &[u8]) {
    if bytes.len() == words.len() * WORD {
        store_words(words, bytes);
    } else {
        store_odd(words, bytes);
    }
}

/// Copies the front of `words` to `out`. The bytes of `out` for which there are no words keep their
/// values.
#[inline(always)]
pub fn load(words: &[Word], out: &mut [u8]) {
    if out.len() % WORD == 0 && out.len() <= words.len() * WORD {
        load_words(&words[..out.len() / WORD], out);
    } else {
        load_odd(words, out);
    }
}

/// Stores all of `bytes` in `words`. Both have the same size.
#[inline(always)]
fn store_words(words: &[Word], bytes: &[u8]) {
    if !wide::store(words, bytes) {
        for (word, bytes) in words.iter().zip(bytes.chunks_exact(WORD)) {
            let mut value = [0; WORD];
            value.copy_from_slice(bytes);
            word.store(u64::from_le_bytes(value), Ordering::Relaxed);
        }
    }
}

/// Loads all of `words` into `out`. Both have the same size.
#[inline(always)]
fn load_words(words: &[Word], out: &mut [u8]) {
    if !wide::load(words, out) {
        for (bytes, word) in out.chunks_exact_mut(WORD).zip(words) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
    }
}

#[inline(never)]
fn store_odd(words: &[Word], bytes: &[u8]) {
    let whole = words.len().min(bytes.len() / WORD);
    let ((front, back), (bytes, rest)) = (words.split_at(whole), bytes.split_at(whole * WORD));
    store_words(front, bytes);
    // At most 7 bytes are left, or the bytes for which there are no words.
    let mut rest = rest.chunks(WORD);
    for word in back {
        let mut value = [0; WORD];
        let bytes = rest.next().unwrap_or_default();
        value[..bytes.len()].copy_from_slice(bytes);
        word.store(u64::from_le_bytes(value), Ordering::Relaxed);
    }
}

#[inline(never)]
fn load_odd(words: &[Word], out: &mut [u8]) {
    let whole = words.len().min(out.len() / WORD);
    let ((front, back), (out, rest)) = (words.split_at(whole), out.split_at_mut(whole * WORD));
    load_words(front, out);
    if let Some(word) = back.first() {
        let value = word.load(Ordering::Relaxed).to_le_bytes();
        let count = rest.len().min(WORD);
        rest[..count].copy_from_slice(&value[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_goes_in_and_comes_out() {
        let bytes: Vec<u8> = (1..=240).collect();
        for words in 0..=24 {
            for len in 0..=bytes.len() {
                let memory: [Word; 25] = core::array::from_fn(|_| Word::new(u64::MAX));
                store(&memory[..words], &bytes[..len]);
                let mut out = [0x55; 200];
                load(&memory, &mut out);
                let stored = len.min(words * WORD);
                assert_eq!(out[..stored], bytes[..stored]);
                assert!(
                    out[stored..words * WORD].iter().all(|&b| b == 0),
                    "{words} words, {len} bytes"
                );
                assert!(out[words * WORD..].iter().all(|&b| b == 0xff));
                let mut short = vec![0x55; len];
                load(&memory[..words], &mut short);
                assert!(short[stored..].iter().all(|&b| b == 0x55));
            }
        }
    }
}
