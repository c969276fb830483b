// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The maps of a peer at one moment. A table never changes: a change makes a new table, which
//! shares most of its parts with the old one.
//!
//! The maps are in chunks of at most [`CHUNK`]. A lookup is two binary searches. A change copies
//! one chunk and the list of the chunks: for 65,535 maps, 64 maps and 1024 pointers. A tree would
//! copy less, but its lookup would follow more pointers, and lookups are on the fast path.

use std::ptr::NonNull;
use std::sync::Arc;

use vbus_shm::ErrorCode;

use super::Access;
use super::file::SharedFile;
use super::log::Log;

/// The most maps of a chunk.
const CHUNK: usize = 64;

/// A range of the driver's memory.
#[derive(Clone)]
pub(super) struct Map {
    pub(super) start: u64,
    pub(super) len: u64,
    /// `None`: the peer announced the range without a file (another device's BAR, a ROM), or for no
    /// access.
    pub(super) place: Option<Place>,
}

/// Where a map is in a file, and in this process.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) file: Arc<SharedFile>,
    /// In the file.
    pub(super) offset: u64,
    /// In this process. Valid as long as `file` is held.
    pub(super) base: NonNull<u8>,
    pub(super) access: Access,
}

// SAFETY: the address leads into a mapping that `file` keeps, and that is accessed only through
// atomics, raw copies and system calls, which any thread may do.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

impl Map {
    pub(super) fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// Ordered by address, without overlaps. A chunk is never empty; the number beside it is the start
/// of its first map.
#[derive(Clone, Default)]
pub(super) struct Table {
    chunks: Vec<(u64, Arc<Vec<Map>>)>,
    len: usize,
    /// Where the views of this table log what they write.
    log: Option<Arc<Log>>,
}

/// A table without maps.
pub(super) static EMPTY: Table = Table { chunks: Vec::new(), len: 0, log: None };

/// A part of a range that lies in one piece in this process.
pub(super) struct Run<'t> {
    pub(super) place: &'t Place,
    /// The first byte in this process.
    pub(super) base: NonNull<u8>,
    /// The first byte in the file.
    pub(super) offset: u64,
    /// In bytes.
    pub(super) len: usize,
}

/// A number of bytes of this process's memory.
#[inline]
fn bytes(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

impl Table {
    /// Number of maps.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The same maps with another log, or without one.
    pub(super) fn with_log(&self, log: Option<Arc<Log>>) -> Table {
        Table { log, ..self.clone() }
    }

    /// Whether its views log what they write.
    #[inline(always)]
    pub(super) fn is_logged(&self) -> bool {
        self.log.is_some()
    }

    /// The device has written some of the `len` bytes at `addr`.
    #[inline(always)]
    pub(super) fn wrote(&self, addr: u64, len: usize) {
        if let Some(log) = &self.log {
            log.mark(addr, len as u64);
        }
    }

    /// The index of the chunk in which a map that contains `addr` would be.
    #[inline]
    fn chunk(&self, addr: u64) -> usize {
        self.chunks.partition_point(|(start, _)| *start <= addr).saturating_sub(1)
    }

    /// The maps from the first one on that ends after `addr`.
    pub(super) fn from(&self, addr: u64) -> impl Iterator<Item = &Map> {
        let chunk = self.chunk(addr);
        let (_, maps) = self.chunks.get(chunk).map_or((0, &[][..]), |(s, maps)| (*s, maps));
        let skip = maps.partition_point(|map| map.end() <= addr);
        let rest = self.chunks.get(chunk + 1..).unwrap_or(&[]);
        maps[skip..].iter().chain(rest.iter().flat_map(|(_, maps)| maps.iter()))
    }

    /// All maps.
    pub(super) fn maps(&self) -> impl Iterator<Item = &Map> {
        self.from(0)
    }

    /// The map that contains `addr`.
    #[inline]
    fn find(&self, addr: u64) -> Option<&Map> {
        let (_, maps) = self.chunks.get(self.chunk(addr))?;
        let map = maps.get(maps.partition_point(|map| map.end() <= addr))?;
        (map.start <= addr).then_some(map)
    }

    /// The first run of `addr..addr + len`. It goes on into the next maps as long as they follow in
    /// this process too.
    #[inline]
    pub(super) fn run(&self, addr: u64, len: usize, access: Access) -> Result<Run<'_>, ErrorCode> {
        let map = self.find(addr).ok_or(ErrorCode::BAD_ADDRESS)?;
        let place = map.place.as_ref().filter(|place| place.access.allows(access));
        let place = place.ok_or(ErrorCode::BAD_ADDRESS)?;
        let inside = addr - map.start;
        // SAFETY: `inside` is within the map, and so within its part of the file.
        let base = unsafe { place.base.add(bytes(inside)) };
        let run = Run { place, base, offset: place.offset + inside, len: bytes(map.len - inside) };
        if run.len < len {
            return Ok(self.run_on(map, run, len, access));
        }
        Ok(Run { len, ..run })
    }

    /// The run, which begins in `map`, with what follows of the next maps, up to `len` bytes.
    #[cold]
    fn run_on<'t>(&'t self, map: &Map, run: Run<'t>, len: usize, access: Access) -> Run<'t> {
        let Run { place, base, .. } = run;
        let (mut end, mut found) = (map.end(), run.len);
        for next in self.from(end) {
            let follows = |at: &Place| {
                at.access.allows(access)
                    && Arc::ptr_eq(&at.file, &place.file)
                    && at.offset == run.offset + found as u64
                    && at.base.as_ptr() as usize == base.as_ptr() as usize + found
            };
            if found >= len || next.start != end || !next.place.as_ref().is_some_and(follows) {
                break;
            }
            (end, found) = (next.end(), found.saturating_add(bytes(next.len)));
        }
        Run { len: found.min(len), ..run }
    }

    /// Calls `each` with the runs of `addr..addr + len`, in order, until one call fails. The whole
    /// range must be mapped for `access`.
    pub(super) fn runs<'t>(
        &'t self,
        mut addr: u64,
        mut len: usize,
        access: Access,
        mut each: impl FnMut(Run<'t>) -> Result<(), ErrorCode>,
    ) -> Result<(), ErrorCode> {
        loop {
            let run = self.run(addr, len, access)?;
            let covered = run.len;
            each(run)?;
            len -= covered;
            if len == 0 {
                return Ok(());
            }
            addr = addr.checked_add(covered as u64).ok_or(ErrorCode::BAD_ADDRESS)?;
        }
    }

    /// Whether a map has a byte of `start..end`.
    pub(super) fn overlaps(&self, start: u64, end: u64) -> bool {
        self.from(start).next().is_some_and(|map| map.start < end)
    }

    /// The table with one more map, which overlaps none.
    pub(super) fn with(&self, map: Map) -> Table {
        let mut table = Table { len: self.len + 1, ..self.clone() };
        let at = self.chunk(map.start);
        let behind_full = self.chunks.get(at).is_some_and(|(_, old)| {
            old.len() == CHUNK && old.last().is_some_and(|last| last.start < map.start)
        });
        // Maps often come in order. Then the chunks are full, and a new one begins behind the last.
        // Between a full chunk and one with room, the map belongs to the second. With a chunk of
        // its own each, maps in falling order would make as many chunks as there are maps.
        let at = at + usize::from(behind_full);
        let old = match self.chunks.get(at) {
            Some((_, old)) if !behind_full || old.len() < CHUNK => old,
            _ => {
                table.chunks.insert(at, (map.start, Arc::new(vec![map])));
                return table;
            }
        };
        let inside = old.partition_point(|other| other.start < map.start);
        let mut maps = Vec::with_capacity(CHUNK + 1);
        maps.extend_from_slice(old);
        maps.insert(inside, map);
        let second = if maps.len() > CHUNK { maps.split_off(CHUNK / 2) } else { Vec::new() };
        table.chunks[at] = (maps[0].start, Arc::new(maps));
        if let Some(first) = second.first() {
            table.chunks.insert(at + 1, (first.start, Arc::new(second)));
        }
        table
    }

    /// The table without the maps of `start..end`, and the number of bytes that they had. `None`:
    /// there is no such map, or one goes beyond the range.
    pub(super) fn without(&self, start: u64, end: u64) -> Option<(Table, u64)> {
        let inside = || self.from(start).take_while(|map| map.start < end);
        if inside().any(|map| map.start < start || map.end() > end) {
            return None;
        }
        let (mut bytes, mut count) = (0, 0);
        for map in inside() {
            bytes += map.len;
            count += 1;
        }
        if count == 0 {
            return None;
        }
        let first = self.chunk(start);
        let last = self.chunk(end - 1);
        let stays = |maps: &[Map], keep: fn(&Map, u64, u64) -> bool| {
            let maps: Vec<_> = maps.iter().filter(|map| keep(map, start, end)).cloned().collect();
            maps.first().map(|map| map.start).map(|at| (at, Arc::new(maps)))
        };
        let outside = |map: &Map, start: u64, end: u64| map.end() <= start || map.start >= end;
        let mut chunks = self.chunks[..first].to_vec();
        chunks.extend(stays(&self.chunks[first].1, outside));
        if last > first {
            chunks.extend(stays(&self.chunks[last].1, outside));
        }
        chunks.extend_from_slice(&self.chunks[last + 1..]);
        join(&mut chunks, first.saturating_sub(1));
        Some((Table { chunks, len: self.len - count, log: self.log.clone() }, bytes))
    }
}

/// Joins the chunks from `at` on, where maps were taken away, as far as they have become small. Two
/// chunks side by side always have more than half of [`CHUNK`] maps, so that lookups and changes
/// cost what the number of maps costs, and not what it once was.
fn join(chunks: &mut Vec<(u64, Arc<Vec<Map>>)>, at: usize) {
    let mut at = at;
    // At most two chunks have lost maps and are still there: they and their neighbours.
    let mut pairs = 3;
    while pairs > 0 && at + 1 < chunks.len() {
        pairs -= 1;
        if chunks[at].1.len() + chunks[at + 1].1.len() > CHUNK / 2 {
            at += 1;
            continue;
        }
        let (_, second) = chunks.remove(at + 1);
        let joined = chunks[at].1.iter().chain(&*second).cloned().collect();
        chunks[at].1 = Arc::new(joined);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn map(start: u64, len: u64) -> Map {
        Map { start, len, place: None }
    }

    fn all(table: &Table) -> Vec<(u64, u64)> {
        table.chunks.iter().flat_map(|(_, maps)| maps.iter()).map(|m| (m.start, m.len)).collect()
    }

    fn check(table: &Table) {
        assert_eq!(all(table).len(), table.len());
        assert!(all(table).windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
        for (start, maps) in &table.chunks {
            assert!((1..=CHUNK).contains(&maps.len()) && maps[0].start == *start);
        }
        let pairs = table.chunks.windows(2);
        assert!(pairs.map(|pair| pair[0].1.len() + pair[1].1.len()).all(|len| len > CHUNK / 2));
    }

    #[test]
    fn maps_in_order_fill_their_chunks() {
        let mut table = Table::default();
        for page in 0..65_535 {
            table = table.with(map(page * 4096, 4096));
        }
        check(&table);
        assert_eq!((table.len(), table.chunks.len()), (65_535, 1024));
        assert!(table.overlaps(65_534 * 4096, 65_534 * 4096 + 1));
        assert!(!table.overlaps(65_535 * 4096, u64::MAX));
        let (rest, bytes) = table.without(4096, 65_000 * 4096).unwrap();
        assert_eq!((rest.len(), bytes), (536, 64_999 * 4096));
        check(&rest);
        assert_eq!(table.len(), 65_535, "the old table is as it was");
    }

    #[test]
    fn chunks_that_have_become_small_are_joined() {
        let mut table = Table::default();
        for page in 0..65_535 {
            table = table.with(map(page * 4096, 4096));
        }
        // One map of 64 stays.
        for page in (0..65_535).filter(|page| page % 64 != 0) {
            table = table.without(page * 4096, (page + 1) * 4096).unwrap().0;
        }
        check(&table);
        assert_eq!(table.len(), 1024);
        assert!(table.chunks.len() <= 1024 / (CHUNK / 4) + 1, "{} chunks", table.chunks.len());
    }

    #[test]
    fn maps_in_falling_order_behind_a_full_chunk_fill_theirs() {
        let mut table = Table::default();
        for page in (0..64).chain((1000..11_000).rev()) {
            table = table.with(map(page * 4096, 4096));
        }
        check(&table);
        assert!(table.chunks.len() <= 2 * 10_064 / CHUNK, "{} chunks", table.chunks.len());
    }

    /// A change of a table.
    #[derive(Clone, Debug)]
    enum Step {
        /// Adds a map of this length at this place, if it overlaps none.
        Add(u64, u64),
        /// As many, each before the last one.
        AddFalling(u64, u64),
        /// Takes as many maps away, from this part of all on.
        Take(prop::sample::Index, usize),
        /// Takes away what lies in a range, which may cut maps.
        TakeRange(u64, u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let place = || 0_u64..6000;
        let step = prop_oneof![
            4 => (place(), 1_u64..6).prop_map(|(start, len)| Step::Add(start, len)),
            1 => (place(), 1_u64..80).prop_map(|(start, n)| Step::AddFalling(start, n)),
            3 => (any::<prop::sample::Index>(), 1_usize..150).prop_map(|(at, n)| Step::Take(at, n)),
            1 => (place(), 1_u64..300).prop_map(|(start, len)| Step::TakeRange(start, len)),
        ];
        proptest::collection::vec(step, 1..60)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// The table does as a plain list would. It begins with many chunks, full and less full.
        #[test]
        fn it_is_a_list_without_overlaps(
            first in proptest::collection::vec((0_u64..4, 1_u64..6), 0..1000),
            steps in steps(),
        ) {
            let (mut table, mut list) = (Table::default(), Vec::<(u64, u64)>::new());
            let mut end = 0;
            for (gap, len) in first {
                list.push((end + gap, len));
                table = table.with(map(end + gap, len));
                end += gap + len;
            }
            check(&table);
            let add = |table: &mut Table, list: &mut Vec<(u64, u64)>, start: u64, len: u64| {
                let hit = list.iter().any(|(s, l)| *s < start + len && s + l > start);
                assert_eq!(table.overlaps(start, start + len), hit);
                if !hit {
                    *table = table.with(map(start, len));
                    let at = list.partition_point(|(s, _)| *s < start);
                    list.insert(at, (start, len));
                }
            };
            for step in steps {
                let (start, end) = match step {
                    Step::Add(start, len) => {
                        add(&mut table, &mut list, start, len);
                        (0, 0)
                    }
                    Step::AddFalling(start, count) => {
                        for at in (start..start + count).rev() {
                            add(&mut table, &mut list, at, 1);
                        }
                        (0, 0)
                    }
                    Step::Take(at, count) => {
                        let chosen = match list.len() {
                            0 => &[],
                            len => &list[at.index(len)..],
                        };
                        let last = chosen.iter().take(count).next_back();
                        chosen.first().zip(last).map_or((0, 0), |(a, b)| (a.0, b.0 + b.1))
                    }
                    Step::TakeRange(start, len) => (start, start + len),
                };
                if start < end {
                    let hit = |(s, l): &(u64, u64)| *s < end && s + l > start;
                    let cut = list.iter().filter(|m| hit(m)).any(|(s, l)| *s < start || s + l > end);
                    let bytes: u64 = list.iter().filter(|m| hit(m)).map(|(_, l)| l).sum();
                    let without = table.without(start, end);
                    prop_assert_eq!(without.is_none(), cut || bytes == 0);
                    if let Some((rest, taken)) = without {
                        prop_assert_eq!(taken, bytes);
                        list.retain(|m| !hit(m));
                        table = rest;
                    }
                }
                check(&table);
                prop_assert_eq!(&all(&table), &list);
            }
        }
    }
}
