//! Copies between shared words and plain bytes, which may be torn by the other end at any time but are never undefined behaviour.

use super::memory::WORD;
use super::sync::{Ordering, Word};

/// Copies `bytes` into the front of `words`, and zeros into the rest of them. Bytes that do not fit are left out.
#[inline]
pub fn store(words: &[Word], bytes: &[u8]) {
    let bytes = &bytes[..bytes.len().min(words.len() * WORD)];
    let (whole, rest) = bytes.split_at(bytes.len() / WORD * WORD);
    let (front, back) = words.split_at(whole.len() / WORD);
    for (word, bytes) in front.iter().zip(whole.chunks_exact(WORD)) {
        word.store(from_bytes(bytes), Ordering::Relaxed);
    }
    let mut back = back.iter();
    if !rest.is_empty() {
        if let Some(word) = back.next() {
            word.store(from_bytes(rest), Ordering::Relaxed);
        }
    }
    for word in back {
        word.store(0, Ordering::Relaxed);
    }
}

/// Copies the front of `words` into `out`. Bytes of `out` for which there are no words stay as they are.
#[inline]
pub fn load(words: &[Word], out: &mut [u8]) {
    for (bytes, word) in out.chunks_mut(WORD).zip(words) {
        bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes()[..bytes.len()]);
    }
}

/// A word of at most its 8 bytes, with zeros behind.
fn from_bytes(bytes: &[u8]) -> u64 {
    let mut word = [0; WORD];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_goes_in_and_comes_out() {
        let bytes: Vec<u8> = (1..=40).collect();
        for words in 0..=4 {
            for len in 0..=bytes.len() {
                let memory: [Word; 5] = core::array::from_fn(|_| Word::new(u64::MAX));
                store(&memory[..words], &bytes[..len]);
                let mut out = [0x55; 40];
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
