// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ledger: the entries that a device has taken from a ring and not returned
//! (spec/shared-memory.md, "Ledger").
//!
//! A device that returns entries out of order overwrites slots of entries that are still in work.
//! The ledger keeps these entries in the driver's memory. A device end may end at any moment, and
//! another one then resumes the ring from memory alone. The record of an entry is the one with the
//! entry's id as its number. So the ids of entries in flight differ and are below the ring's size.

use super::memory::{Memory, WORD, low, stored};
use super::ring::{BadRing, Corrupt, DeviceEnd, Entry, Layout, Return, Returns};
use super::signal::Kick;
use super::signal::end::Device;
use super::sync::{Edge, Ordering, Word, publish};

/// First word of the header: "vbuslg" and the layout's version.
pub const MAGIC: u64 = 0x0001_676c_7375_6276;
/// Offset of the word *returning*, in bytes. It says which entry is being returned.
pub const RETURNING_OFFSET: usize = 64;
/// Where the records begin, in bytes.
pub const RECORDS_OFFSET: usize = 128;
/// Bytes of a record.
pub const RECORD_BYTES: usize = 32;

const HEADER_ENTRIES: usize = 1;
const RETURNING: usize = RETURNING_OFFSET / WORD;
/// Words of a record: the tag, the address, the position.
const TAG: usize = 0;
const ADDRESS: usize = 1;
const POSITION: usize = 2;
/// The bit of a record's tag that says that its entry is held, and of *returning* that there is
/// one.
const HELD: u64 = 1 << 63;

const _: () = {
    assert!(RECORDS_OFFSET % 64 == 0 && RECORD_BYTES >= (POSITION + 1) * WORD);
    assert!((HEADER_ENTRIES + 1) * WORD <= RETURNING_OFFSET);
};

/// Bytes of the ledger of a ring of `entries` entries.
pub fn bytes(entries: u32) -> usize {
    RECORDS_OFFSET + entries as usize * RECORD_BYTES
}

/// Makes a fresh ledger over zeroed memory. The driver does this before it registers the region.
pub fn format(mem: &impl Memory, entries: u32) -> Result<(), BadRing> {
    let words = mem.words();
    if words.len() * WORD < bytes(entries) {
        return Err(BadRing::TooSmall);
    }
    words[HEADER_ENTRIES].store(u64::from(entries), Ordering::Relaxed);
    words[0].store(MAGIC, Ordering::Release);
    Ok(())
}

/// An entry in work, and its position. The positions tell the order of submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The entry as it was taken.
    pub entry: Entry,
    /// Its position in the ring.
    pub position: u64,
}

/// The device's end of a ring with [`Returns::Entries`], and its ledger.
#[derive(Debug)]
pub struct Ledger<M> {
    ring: DeviceEnd<M>,
    mem: M,
}

impl<M: Memory> Ledger<M> {
    /// Attaches to a ring and to a ledger that the driver has formatted. Both are fresh.
    pub fn attach(ring: M, mem: M) -> Result<Self, BadRing> {
        let ring = DeviceEnd::attach(ring)?;
        check(&mem, ring.layout())?;
        Ok(Ledger { ring, mem })
    }

    /// Resumes ring and ledger in place of a device end that ended at any moment. The entries that
    /// it held are [`held`](Self::held) by this end. The caller works on them again from their
    /// beginning. The kick is for returns that were published without a kick.
    pub fn resume(ring: M, mem: M) -> Result<(Self, Kick<Device>), BadRing> {
        let (mut ring, kick) = DeviceEnd::resume(ring)?;
        let layout = ring.layout();
        check(&mem, layout)?;
        let words = mem.words();
        let returning = words[RETURNING].load(Ordering::Relaxed);
        // The position in *returning* has 47 bits. It is less than a ring's size away from `given`.
        let behind = (ring.given() << 17).wrapping_sub(returning >> 16 << 17);
        let is_published = behind != 0 && behind >> 63 == 0;
        if returning & HELD != 0 && is_published {
            if let Some(record) = record(words, layout, low(returning) & 0xffff) {
                record[TAG].store(0, Ordering::Relaxed);
            }
        }
        words[RETURNING].store(0, Ordering::Release);
        stored(&mem, 0, bytes(layout.entries()) / WORD);
        let held = (0..layout.entries()).filter(|id| is_held(words, layout, *id)).count();
        ring.skip(held);
        Ok((Ledger { ring, mem }, kick))
    }

    /// The ring, for its signals: [`arm`](DeviceEnd::arm), [`disarm`](DeviceEnd::disarm),
    /// [`post`](DeviceEnd::post). Entries are taken and given back here only.
    pub fn ring(&mut self) -> &mut DeviceEnd<M> {
        &mut self.ring
    }

    /// The entries that are in work, in the order of their ids.
    pub fn held(&self) -> impl Iterator<Item = Held> + '_ {
        let (words, layout) = (self.mem.words(), self.ring.layout());
        (0..layout.entries()).filter_map(move |id| {
            let record = record(words, layout, id)?;
            let tag = record[TAG].load(Ordering::Relaxed);
            if tag & HELD == 0 {
                return None;
            }
            let Return { len, flags, .. } = Return::from_tag(tag);
            let addr = record[ADDRESS].load(Ordering::Relaxed);
            let position = record[POSITION].load(Ordering::Relaxed);
            let id = u16::try_from(id).ok()?;
            Some(Held { entry: Entry { addr, len, id, flags }, position })
        })
    }

    /// Takes the next submitted entry. It is in work from now on. The driver may have written any
    /// content: check it before use.
    ///
    /// # Errors
    /// [`Corrupt::BadId`] if its id is not below the ring's size, or is the id of an entry in work.
    pub fn take(&mut self) -> Result<Option<Entry>, Corrupt> {
        let layout = self.ring.layout();
        let Some(entry) = self.ring.peek()? else { return Ok(None) };
        let words = self.mem.words();
        let record = record(words, layout, u32::from(entry.id)).ok_or(Corrupt::BadId)?;
        if record[TAG].load(Ordering::Relaxed) & HELD != 0 {
            return Err(Corrupt::BadId);
        }
        record[ADDRESS].store(entry.addr, Ordering::Relaxed);
        record[POSITION].store(self.ring.taken(), Ordering::Relaxed);
        // Pairs with nothing while this end lives. The next device end reads it in `resume`, and
        // sees the rest of the record then.
        publish(&record[TAG], Return::from(entry).tag(HELD), Edge::Tag);
        stored(&self.mem, record_at(u32::from(entry.id)), RECORD_BYTES / WORD);
        self.ring.skip(1);
        Ok(Some(entry))
    }

    /// Gives back the entry with the id of `back`. If it is not in work, nothing happens.
    pub fn give_back(&mut self, back: Return) {
        let (layout, given) = (self.ring.layout(), self.ring.given());
        let id = u32::from(back.id);
        let words = self.mem.words();
        let Some(record) = record(words, layout, id).filter(|_| is_held(words, layout, id)) else {
            return;
        };
        // Between any two of these stores, `resume` knows whether the return was published.
        publish(&words[RETURNING], HELD | given << 17 >> 1 | u64::from(id), Edge::Tag);
        self.ring.give_back(back);
        record[TAG].store(0, Ordering::Release);
        publish(&words[RETURNING], 0, Edge::Tag);
        stored(&self.mem, RETURNING, 1);
        stored(&self.mem, record_at(id), RECORD_BYTES / WORD);
    }
}

fn check(mem: &impl Memory, layout: Layout) -> Result<(), BadRing> {
    let words = mem.words();
    if layout.returns() != Returns::Entries {
        return Err(BadRing::Returns);
    }
    if words.len() * WORD < bytes(layout.entries()) {
        return Err(BadRing::TooSmall);
    }
    if words[0].load(Ordering::Acquire) != MAGIC {
        return Err(BadRing::Magic);
    }
    if words[HEADER_ENTRIES].load(Ordering::Relaxed) != u64::from(layout.entries()) {
        return Err(BadRing::Entries);
    }
    Ok(())
}

/// The first word of a record.
fn record_at(id: u32) -> usize {
    (RECORDS_OFFSET + id as usize * RECORD_BYTES) / WORD
}

fn record(words: &[Word], layout: Layout, id: u32) -> Option<&[Word]> {
    let at = record_at(id);
    (id < layout.entries()).then(|| &words[at..at + RECORD_BYTES / WORD])
}

fn is_held(words: &[Word], layout: Layout, id: u32) -> bool {
    record(words, layout, id).is_some_and(|record| record[TAG].load(Ordering::Relaxed) & HELD != 0)
}

#[cfg(test)]
mod tests {
    use super::super::ring::DriverEnd;
    use super::*;

    const N: u32 = 4;

    /// Each record of each ledger lies within it, behind the header, and no two share a word.
    #[test]
    fn records_of_all_ledgers_lie_within_them_and_apart() {
        for entries in (1..=15).map(|bits| 1_u32 << bits) {
            let Ok(layout) = Layout::new(entries, Returns::Entries) else {
                continue;
            };
            let (words, mut end) = (memory(bytes(entries)), RECORDS_OFFSET as u128);
            for id in 0..entries {
                assert_eq!(record_at(id) as u128 * 8, end, "{entries} {id}");
                assert_eq!(
                    record(&words, layout, id).map(<[Word]>::len),
                    Some(RECORD_BYTES / WORD)
                );
                end += RECORD_BYTES as u128;
            }
            assert_eq!(end, bytes(entries) as u128);
            for id in [entries, entries + 1, u32::from(u16::MAX), u32::MAX] {
                assert!(id < entries || record(&words, layout, id).is_none(), "{entries} {id}");
            }
        }
    }

    fn memory(bytes: usize) -> Vec<Word> {
        (0..bytes / WORD).map(|_| Word::new(0)).collect()
    }

    fn fresh() -> (Vec<Word>, Vec<Word>) {
        let layout = Layout::new(N, Returns::Entries).unwrap();
        let (ring, ledger) = (memory(layout.bytes()), memory(bytes(N)));
        format(&&ledger[..], N).unwrap();
        (ring, ledger)
    }

    fn entry(id: u16) -> Entry {
        Entry { addr: 1000 + u64::from(id), len: 10, id, flags: 2 }
    }

    #[test]
    fn a_resumed_ledger_holds_the_entries_in_work_and_returns_each_once() {
        let (ring, ledger) = fresh();
        let layout = Layout::new(N, Returns::Entries).unwrap();
        let mut driver = DriverEnd::create(&ring[..], layout, u64::MAX - 1).unwrap();
        let mut device = Ledger::attach(&ring[..], &ledger[..]).unwrap();
        for id in [2, 0, 3, 1] {
            driver.submit(entry(id)).unwrap();
        }
        let _ = driver.post();
        for id in [2, 0, 3] {
            assert_eq!(device.take(), Ok(Some(entry(id))));
        }
        device.give_back(Return { len: 1, id: 3, flags: 0 });
        device.give_back(Return { len: 9, id: 3, flags: 0 }); // It is not in work any more.
        device.give_back(Return { len: 9, id: 9, flags: 0 });
        let (mut device, kick) = Ledger::resume(&ring[..], &ledger[..]).unwrap();
        assert!(!kick.is_wanted(), "nobody has armed");
        let mut held: Vec<_> = device.held().collect();
        held.sort_by_key(|held| held.position.wrapping_sub(u64::MAX - 1));
        assert_eq!(held.iter().map(|held| held.entry).collect::<Vec<_>>(), [entry(2), entry(0)]);
        assert_eq!(device.take(), Ok(Some(entry(1))), "the returned entry is not taken again");
        for id in [1, 2, 0] {
            device.give_back(Return { len: 1, id, flags: 0 });
        }
        let _ = device.ring().post();
        for id in [3, 1, 2, 0] {
            assert_eq!(driver.reap(), Ok(Some(Return { len: 1, id, flags: 0 })));
        }
        assert_eq!((driver.reap(), device.held().count()), (Ok(None), 0));
    }

    #[test]
    fn ids_of_entries_in_flight_differ_and_are_below_the_size() {
        for id in [1, 4, u16::MAX] {
            let (ring, ledger) = fresh();
            let layout = Layout::new(N, Returns::Entries).unwrap();
            let mut driver = DriverEnd::create(&ring[..], layout, 0).unwrap();
            let mut device = Ledger::attach(&ring[..], &ledger[..]).unwrap();
            driver.submit(entry(1)).unwrap();
            driver.submit(entry(id)).unwrap();
            let _ = driver.post();
            assert_eq!(device.take(), Ok(Some(entry(1))));
            assert_eq!(device.take(), Err(Corrupt::BadId), "id {id}");
        }
    }

    #[test]
    fn attach_checks_the_header() {
        let (ring, ledger) = fresh();
        let layout = Layout::new(N, Returns::Entries).unwrap();
        DriverEnd::create(&ring[..], layout, 0).unwrap();
        let attach = |ledger: &[Word]| Ledger::attach(&ring[..], ledger).map(drop);
        assert_eq!(attach(&ledger[..]), Ok(()));
        assert_eq!(attach(&ledger[1..]), Err(BadRing::TooSmall));
        assert_eq!(format(&&ledger[1..], N), Err(BadRing::TooSmall));
        for (word, value, error) in [(0, 1, BadRing::Magic), (1, 8, BadRing::Entries)] {
            let before = ledger[word].swap(value, Ordering::Relaxed);
            assert_eq!(attach(&ledger[..]), Err(error));
            ledger[word].store(before, Ordering::Relaxed);
        }
        let layout = Layout::new(N, Returns::Counted).unwrap();
        DriverEnd::create(&ring[..], layout, 0).unwrap();
        assert_eq!(attach(&ledger[..]), Err(BadRing::Returns), "a ledger needs returned entries");
    }

    #[test]
    fn any_word_of_the_driver_is_harmless() {
        let (ring, ledger) = fresh();
        let layout = Layout::new(N, Returns::Entries).unwrap();
        DriverEnd::create(&ring[..], layout, 0).unwrap();
        for hostile in [0, 1, u64::MAX, HELD, HELD | 3, HELD | 1 << 16 | 0xffff] {
            ledger[RETURNING].store(hostile, Ordering::Relaxed);
            ledger[RECORDS_OFFSET / WORD..]
                .iter()
                .for_each(|w| w.store(hostile, Ordering::Relaxed));
            let (mut device, _) = Ledger::resume(&ring[..], &ledger[..]).unwrap();
            assert!(device.held().count() <= N as usize && device.ring().held() <= N);
            (0..9).for_each(|id| device.give_back(Return { len: 0, id, flags: 0 }));
            assert_eq!(device.ring().held(), 0);
            DriverEnd::create(&ring[..], layout, 0).unwrap();
        }
    }
}
