// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The lies `rings` and `words` of a hostile device. `rings` writes into the memory that a driver
//! shares with its device: random words, counts that jump, returns of entries that nobody
//! submitted, lines of an interrupt page that come without end.
//! `words` answers some reads of registers with random bytes.
//!
//! The honest device behind it must never write to the driver's buffers (`backend = "null"`): it
//! would believe the lies, and write where they lead.
#![allow(unsafe_code)] // The memory is shared.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vbus_shm::abi::command::{CALL, REGION_ADD};
use vbus_shm::abi::reg::{ARGUMENT, COMMAND};
use vbus_shm::pic;
use vbus_shm::ring::{ENTRIES_OFFSET, ENTRY_BYTES, MAGIC, RETURNED, SIGNAL_OFFSET};
use vbus_shm::signal::DEVICE_SEQ;

use crate::map::map;
use crate::random::Random;

/// The device's words of a ring: `seq`, and beside it `returning` (spec/shared-memory.md).
const SEQ: usize = SIGNAL_OFFSET + DEVICE_SEQ;
const RETURNING: usize = SEQ + 8;

/// The pause between two lies.
const PAUSE: Duration = Duration::from_micros(200);

/// How long lines come without end.
const FLOOD: Duration = Duration::from_millis(20);

unsafe extern "C" {
    fn munmap(at: *mut c_void, bytes: usize) -> c_int;
}

/// Mapped memory of the client.
struct Memory {
    at: *mut c_void,
    bytes: usize,
}

// SAFETY: its words are only accessed as atomics.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn map(fd: &impl AsRawFd, offset: u64, bytes: u64) -> io::Result<Self> {
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        Ok(Self { at: map(fd, offset, bytes, true)?, bytes })
    }

    /// The word at an offset that is a multiple of 8.
    fn word(&self, offset: usize) -> Option<&AtomicU64> {
        let inside = offset % 8 == 0 && offset.checked_add(8)? <= self.bytes;
        // SAFETY: the word is in the map, aligned, and lives as long as it.
        inside.then(|| unsafe { &*self.at.cast::<u8>().add(offset).cast::<AtomicU64>() })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nobody has a word of it any more.
        unsafe { munmap(self.at, self.bytes) };
    }
}

/// A part of the client's memory, by the device's addresses.
struct Map {
    address: u64,
    bytes: u64,
    memory: Arc<Memory>,
}

/// Memory that the driver has registered, as pieces of the client's memory.
struct Region {
    pieces: Vec<Piece>,
    /// The number of entries, if it is a ring.
    entries: Option<u64>,
    /// It is the interrupt page of a processor.
    is_page: bool,
}

struct Piece {
    memory: Arc<Memory>,
    offset: usize,
    bytes: usize,
}

impl Region {
    fn bytes(&self) -> usize {
        self.pieces.iter().map(|piece| piece.bytes).sum()
    }

    fn word(&self, mut offset: usize) -> Option<&AtomicU64> {
        for piece in &self.pieces {
            if offset < piece.bytes {
                return piece.memory.word(piece.offset + offset);
            }
            offset -= piece.bytes;
        }
        None
    }
}

/// Follows a driver's commands, and lies in the memory that it registers.
pub struct Rings {
    maps: Vec<Map>,
    arguments: [u64; 4],
    /// The server looks at a new region first.
    fresh: Vec<Region>,
    regions: Arc<Mutex<Vec<Region>>>,
}

/// A write of the driver.
pub struct Write<'a> {
    /// The region of the function: 0 is BAR 0, 7 the configuration space.
    pub region: u32,
    /// The place in it.
    pub offset: u64,
    /// What is written.
    pub data: &'a [u8],
}

impl Rings {
    /// Begins to lie as soon as there is a region.
    pub fn start() -> io::Result<Self> {
        let regions: Arc<Mutex<Vec<Region>>> = Arc::default();
        let (shared, mut random) = (Arc::clone(&regions), Random::of_system()?);
        std::thread::spawn(move || {
            let mut told = false;
            loop {
                std::thread::sleep(PAUSE);
                let regions = lock(&shared);
                if !regions.is_empty() {
                    lie(&regions[random.index(regions.len())], &mut random);
                    if !told {
                        println!("lies");
                        told = true;
                    }
                }
            }
        });
        Ok(Self { maps: Vec::new(), arguments: [0; 4], fresh: Vec::new(), regions })
    }

    /// The client has mapped memory.
    pub fn map(
        &mut self,
        address: u64,
        bytes: u64,
        fd: &impl AsRawFd,
        offset: u64,
    ) -> io::Result<()> {
        let memory = Arc::new(Memory::map(fd, offset, bytes)?);
        self.maps.push(Map { address, bytes, memory });
        Ok(())
    }

    /// The client has unmapped memory.
    pub fn unmap(&mut self, address: u64, bytes: u64) {
        self.forget();
        self.maps
            .retain(|map| map.address + map.bytes <= address || address + bytes <= map.address);
    }

    /// The connection ends: the memory is the driver's own. No lie comes after this.
    pub fn forget(&mut self) {
        self.fresh.clear();
        lock(&self.regions).clear();
    }

    /// The server has done everything before.
    pub fn settle(&mut self) {
        lock(&self.regions).append(&mut self.fresh);
    }

    /// The driver writes. The server has not seen it yet.
    pub fn write(&mut self, write: &Write) {
        let byte = |place: u64| {
            let at = usize::try_from(place.checked_sub(write.offset)?).ok()?;
            write.data.get(at).copied()
        };
        match write.region {
            // Bus Master, in the command register.
            7 if byte(4).is_some_and(|low| low & 4 == 0) => self.forget(),
            0 => {
                for (word, place) in self.arguments.iter_mut().zip((ARGUMENT..).step_by(8)) {
                    for at in 0..8 {
                        if let Some(value) = byte(place + at) {
                            *word = *word & !(0xff << (8 * at)) | u64::from(value) << (8 * at);
                        }
                    }
                }
                if let Some(command) = byte(COMMAND) {
                    self.command(command.into());
                }
            }
            _ => {}
        }
    }

    fn command(&mut self, command: u32) {
        let [first, address, bytes, _] = self.arguments;
        match command {
            REGION_ADD => {
                let shift = first >> 48 & 0xff;
                let region = self.region(address, bytes, shift);
                self.fresh.extend(region);
            }
            CALL => {}
            // A new connection, or the end of one, or of a region.
            _ => self.forget(),
        }
    }

    fn region(&self, address: u64, bytes: u64, shift: u64) -> Option<Region> {
        let mut pieces = Vec::new();
        if shift == 0 {
            pieces.push(self.piece(address, bytes)?);
        } else {
            let page = 1u64.checked_shl(u32::try_from(shift).ok()?)?;
            for at in 0..bytes.div_ceil(page).min(4096) {
                let entry = self.piece(address + 8 * at, 8)?;
                let place = entry.memory.word(entry.offset)?.load(Ordering::Relaxed);
                pieces.push(self.piece(place, page.min(bytes - at * page))?);
            }
        }
        let mut region = Region { pieces, entries: None, is_page: false };
        let magic = region.word(0)?.load(Ordering::Relaxed);
        region.is_page = magic == pic::MAGIC;
        let is_ring = magic == MAGIC;
        region.entries = is_ring.then(|| Some(region.word(8)?.load(Ordering::Relaxed))).flatten();
        Some(region)
    }

    fn piece(&self, address: u64, bytes: u64) -> Option<Piece> {
        let map = self.maps.iter().find(|map| {
            address >= map.address
                && address.checked_add(bytes).is_some_and(|end| end <= map.address + map.bytes)
        })?;
        Some(Piece {
            memory: Arc::clone(&map.memory),
            offset: usize::try_from(address - map.address).ok()?,
            bytes: usize::try_from(bytes).ok()?,
        })
    }
}

/// One lie in a region.
fn lie(region: &Region, random: &mut Random) {
    let put = |offset: usize, value: u64| {
        if let Some(word) = region.word(offset) {
            word.store(value, Ordering::Relaxed);
        }
    };
    let add = |offset: usize, value: u64| {
        if let Some(word) = region.word(offset) {
            word.fetch_add(value, Ordering::Relaxed);
        }
    };
    if region.is_page && random.below(4) != 0 {
        // All lines are pending, however often the driver takes them.
        let began = Instant::now();
        while began.elapsed() < FLOOD {
            (pic::PENDING..pic::PAGE_BYTES).step_by(8).for_each(|offset| put(offset, u64::MAX));
        }
        return;
    }
    match (region.entries, random.below(4)) {
        // A count jumps: by a little, or by anything.
        (Some(entries), 0) => {
            let far = if random.below(2) == 0 { u64::MAX } else { 2 * entries };
            add(if random.below(2) == 0 { SEQ } else { RETURNING }, random.next() % far.max(1));
        }
        // An entry returns: in any lap, with any length, id and flags.
        (Some(entries), 1 | 2) => {
            let slot = random.below(entries.max(1));
            let tag = ENTRIES_OFFSET + ENTRY_BYTES * usize::try_from(slot).unwrap_or(0) + 8;
            put(tag, random.next() | u64::from(RETURNED) << 48);
        }
        // Any word.
        _ => put(8 * random.index((region.bytes() / 8).max(1)), random.next()),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::fs::File;
    use std::time::Instant;

    use super::*;

    #[test]
    fn only_registered_memory_is_lied_in_and_only_until_the_connection_ends() {
        const BYTES: usize = 1 << 16;
        const AT: usize = 0x3000;
        const LENGTH: usize = 0x1000;
        let path = std::env::temp_dir().join(format!("vbus-rings-{}", std::process::id()));
        let mut memory = vec![0u8; BYTES];
        memory[AT..AT + 8].copy_from_slice(&MAGIC.to_le_bytes());
        memory[AT + 8..AT + 16].copy_from_slice(&64u64.to_le_bytes());
        std::fs::write(&path, &memory).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();

        let mut rings = Rings::start().unwrap();
        rings.map(0x10_0000, BYTES as u64, &file, 0).unwrap();
        let put = |rings: &mut Rings, offset, data: &[u8]| {
            rings.write(&Write { region: 0, offset, data });
        };
        // A register of 64 bits comes as one write or as two.
        put(&mut rings, ARGUMENT, &1u64.to_le_bytes());
        put(&mut rings, ARGUMENT + 8, &0x10_3000u32.to_le_bytes());
        put(&mut rings, ARGUMENT + 12, &[0; 4]);
        put(&mut rings, ARGUMENT + 16, &(LENGTH as u64).to_le_bytes());
        put(&mut rings, COMMAND, &REGION_ADD.to_le_bytes());
        assert_eq!(std::fs::read(&path).unwrap(), memory, "a lie before the server has looked");

        rings.settle();
        let began = Instant::now();
        let now = || std::fs::read(&path).unwrap();
        while now()[AT..AT + LENGTH] == memory[AT..AT + LENGTH] {
            assert!(began.elapsed() < Duration::from_secs(60), "nothing is lied");
        }
        // CLOSE.
        put(&mut rings, COMMAND, &2u32.to_le_bytes());
        let after = now();
        std::thread::sleep(20 * PAUSE);
        assert!(now() == after, "a lie after the end");
        assert!(after[..AT] == memory[..AT] && after[AT + LENGTH..] == memory[AT + LENGTH..]);
        std::fs::remove_file(&path).unwrap();
    }
}
