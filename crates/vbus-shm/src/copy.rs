//! Copies between shared words and plain bytes, which may be torn by the other end at any time but are never undefined behaviour.

use super::memory::WORD;
use super::sync::{Ordering, Word};
use super::wide;

/// Copies `bytes` into the front of `words`, and zeros into the rest of them. Bytes that do not fit are left out.
#[inline(always)]
pub fn store(words: &[Word], bytes: &[u8]) {
    let done = wide::store(words, bytes);
    if done != bytes.len() || done != words.len() * WORD {
        store_rest(words.get(done / WORD..).unwrap_or_default(), &bytes[done..]);
    }
}

/// Copies the front of `words` into `out`. Bytes of `out` for which there are no words stay as they are.
#[inline(always)]
pub fn load(words: &[Word], out: &mut [u8]) {
    let done = wide::load(words, out);
    if done != out.len() {
        load_rest(words.get(done / WORD..).unwrap_or_default(), &mut out[done..]);
    }
}

#[inline(never)]
fn store_rest(words: &[Word], bytes: &[u8]) {
    let mut bytes = bytes.chunks(WORD);
    for word in words {
        let mut value = [0; WORD];
        let bytes = bytes.next().unwrap_or_default();
        value[..bytes.len()].copy_from_slice(bytes);
        word.store(u64::from_le_bytes(value), Ordering::Relaxed);
    }
}

#[inline(never)]
fn load_rest(words: &[Word], out: &mut [u8]) {
    for (word, bytes) in words.iter().zip(out.chunks_mut(WORD)) {
        bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes()[..bytes.len()]);
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
                assert!(out[stored..words * WORD].iter().all(|&b| b == 0), "{words} words, {len} bytes");
                assert!(out[words * WORD..].iter().all(|&b| b == 0xff));
                let mut short = vec![0x55; len];
                load(&memory[..words], &mut short);
                assert!(short[stored..].iter().all(|&b| b == 0x55));
            }
        }
    }
}
