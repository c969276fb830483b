// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A hostile guest: it writes random values over all memory that a running driver shares with its
//! device.
//!
//! It writes through `/proc/PID/mem` of the driver. The targets are the driver's mappings of the
//! function's BAR (registers, doorbells, interrupt table) and of the memory that the device reads
//! and writes (rings, state pages, buffers).

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::stream::number;

/// The size of the beginning of each mapping. Half of the writes go there, because indices and
/// descriptors are there.
const DENSE: u64 = 16 * 1024;

/// Writes `count` values that follow from `seed`, or stops when the driver ends. Prints how many it
/// wrote. It writes to the BAR only with `registers`: such a write soon closes the device, and a
/// closed device reads no ring.
pub fn scribble(pid: &str, count: &str, seed: &str, registers: bool) -> io::Result<()> {
    let (count, mut state) =
        (number(count)?, number(seed)?.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % below
    };
    let shared = mappings(&fs::read_to_string(format!("/proc/{pid}/maps"))?, registers);
    if shared.is_empty() {
        return Err(io::Error::other(format!("process {pid} shares nothing with a device")));
    }
    let memory = File::options().write(true).open(format!("/proc/{pid}/mem"))?;
    let mut written = 0;
    while written < count {
        let Some(range) =
            usize::try_from(random(shared.len() as u64)).ok().and_then(|at| shared.get(at))
        else {
            continue;
        };
        let length = range.end - range.start;
        let reach = if random(2) == 0 { length.min(DENSE) } else { length };
        let offset = random(reach / 4) * 4;
        let value: u32 = match random(4) {
            0 => u32::try_from(random(64)).unwrap_or(0),
            1 => u32::MAX,
            2 => 1 << random(32),
            _ => u32::try_from(random(1 << 32)).unwrap_or(0),
        };
        // If the driver has noticed the damage and ended, its memory is gone.
        if memory.write_all_at(&value.to_le_bytes(), range.start + offset).is_err() {
            break;
        }
        written += 1;
    }
    println!("{written}");
    Ok(())
}

/// The address ranges that a driver maps from huge pages, or from the memory file of a driver in a
/// plain process; with `registers` also from a BAR.
fn mappings(maps: &str, registers: bool) -> Vec<Range<u64>> {
    let mut ranges = Vec::new();
    for line in maps.lines() {
        // start-end permissions offset device inode path
        let mut words = line.split_whitespace();
        let (Some(range), Some(permissions), Some(path)) =
            (words.next(), words.next(), words.nth(3))
        else {
            continue;
        };
        let is_shared = permissions.starts_with("rw-s")
            && (path.contains("huge")
                || path == "/memfd:vbus"
                || registers && path.contains("/resource"));
        let Some((start, end)) = range.split_once('-').filter(|_| is_shared) else { continue };
        if let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            ranges.push(start..end);
        }
    }
    ranges
}
