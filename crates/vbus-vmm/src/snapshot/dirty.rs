// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A set of pages of the guest's memory.

use super::frame::{PAGE, PAGES_MAX};

/// A set of pages, one bit for each page of each part of the memory.
pub(crate) struct Pages {
    parts: Vec<Part>,
}

struct Part {
    base: u64,
    pages: u64,
    bits: Vec<u64>,
}

impl Pages {
    /// Makes an empty set for a memory with these parts: address and size of each, in whole pages.
    pub(crate) fn new(parts: &[(u64, u64)]) -> Pages {
        let part = |(base, bytes): &(u64, u64)| {
            let pages = bytes / PAGE;
            let words = usize::try_from(pages.div_ceil(64)).unwrap_or(0);
            Part { base: *base, pages, bits: vec![0; words] }
        };
        Pages { parts: parts.iter().map(part).collect() }
    }

    /// Adds all pages that have some of the `bytes` bytes from `address` on. What is no memory is
    /// left out.
    pub(crate) fn add(&mut self, address: u64, bytes: u64) {
        let last = address.saturating_add(bytes.saturating_sub(1));
        for part in self.parts.iter_mut().filter(|_| bytes > 0) {
            let end = part.base + part.pages * PAGE;
            if address >= end || last < part.base {
                continue;
            }
            let (first, last) = (address.max(part.base), last.min(end - 1));
            for page in (first - part.base) / PAGE..=(last - part.base) / PAGE {
                part.bits[usize::try_from(page / 64).unwrap_or(0)] |= 1 << (page % 64);
            }
        }
    }

    /// Adds the pages of a log: for each part one bit for each page. Bits beyond the end of a part
    /// are left out.
    pub(crate) fn add_log(&mut self, log: &[Vec<u64>]) {
        for (part, log) in self.parts.iter_mut().zip(log) {
            for (have, more) in part.bits.iter_mut().zip(log) {
                *have |= more;
            }
            let beyond = part.pages % 64;
            if let Some(last) = part.bits.last_mut().filter(|_| beyond != 0) {
                *last &= (1 << beyond) - 1;
            }
        }
    }

    /// Adds the pages of another set for the same memory.
    pub(crate) fn add_all(&mut self, other: &Pages) {
        for (part, other) in self.parts.iter_mut().zip(&other.parts) {
            part.bits.iter_mut().zip(&other.bits).for_each(|(have, more)| *have |= more);
        }
    }

    /// The number of pages.
    pub(crate) fn count(&self) -> u64 {
        let words = self.parts.iter().flat_map(|part| &part.bits);
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// Runs of neighbouring pages, each of at most as many as a section may have: the address of
    /// the first page and their number.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (u64, usize)> + '_ {
        self.parts.iter().flat_map(Part::runs)
    }
}

impl Part {
    fn has(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok().and_then(|at| self.bits.get(at));
        word.is_some_and(|word| word & 1 << (page % 64) != 0)
    }

    fn runs(&self) -> impl Iterator<Item = (u64, usize)> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < self.pages && !self.has(at) {
                // Whole words without a page are many.
                let empty = at % 64 == 0
                    && usize::try_from(at / 64).is_ok_and(|word| self.bits.get(word) == Some(&0));
                at += if empty { 64 } else { 1 };
            }
            let first = at;
            while at < self.pages && at - first < PAGES_MAX as u64 && self.has(at) {
                at += 1;
            }
            let count = usize::try_from(at.saturating_sub(first)).unwrap_or(0);
            (count > 0).then_some((self.base + first * PAGE, count))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(pages: &Pages) -> Vec<(u64, usize)> {
        pages.runs().collect()
    }

    #[test]
    fn ranges_become_runs() {
        let mut pages = Pages::new(&[(0, 1000 * PAGE), (1 << 32, 70 * PAGE)]);
        assert_eq!((pages.count(), runs(&pages)), (0, vec![]));
        pages.add(5 * PAGE + 1, 1);
        pages.add(6 * PAGE + 4095, 2);
        pages.add(999 * PAGE, 10 * PAGE);
        pages.add((1 << 32) - PAGE, PAGE + 1);
        pages.add(u64::MAX, u64::MAX);
        pages.add(3 * PAGE, 0);
        let expected = vec![(5 * PAGE, 3), (999 * PAGE, 1), (1 << 32, 1)];
        assert_eq!((pages.count(), runs(&pages)), (5, expected));
        let mut more = Pages::new(&[(0, 1000 * PAGE), (1 << 32, 70 * PAGE)]);
        more.add(6 * PAGE, 2 * PAGE);
        more.add(9 * PAGE, 1);
        more.add_all(&pages);
        let both = vec![(5 * PAGE, 3), (9 * PAGE, 1), (999 * PAGE, 1), (1 << 32, 1)];
        assert_eq!(runs(&more), both);
        pages.add(0, u64::MAX);
        assert_eq!(pages.count(), 1070);
        let lens: Vec<_> = runs(&pages).into_iter().map(|(_, count)| count).collect();
        assert_eq!(lens, [256, 256, 256, 232, 70]);
    }

    #[test]
    fn a_log_is_added_as_far_as_there_are_pages() {
        let mut pages = Pages::new(&[(0, 66 * PAGE), (1 << 32, PAGE)]);
        pages.add_log(&[vec![1 << 63, u64::MAX, u64::MAX], vec![u64::MAX], vec![1]]);
        assert_eq!(runs(&pages), [(63 * PAGE, 3), (1 << 32, 1)]);
        pages.add_log(&[vec![1]]);
        assert_eq!(pages.count(), 5);
    }
}
