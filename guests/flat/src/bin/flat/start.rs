// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The information that the loader passes by PVH: the command line, and the map of memory.
#![allow(unsafe_code, reason = "structures that the loader has put into memory")]

use core::ptr::NonNull;

/// The type of usable memory in the map.
const RAM: u32 = 1;
const MAGIC: u32 = 0x336e_c578;
/// The longest command line, as for Linux.
const COMMAND_LINE_MAX: usize = 2048;
/// The most entries of the memory map that the guest reads.
const MAP_MAX: u32 = 128;
/// The end of the mapped addresses.
const MAPPED: u64 = 1 << 32;

#[repr(C)]
#[derive(Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MapEntry {
    address: u64,
    bytes: u64,
    kind: u32,
    reserved: u32,
}

/// The information from the loader.
pub struct Start {
    line: [u8; COMMAND_LINE_MAX],
    line_bytes: usize,
    /// The largest free run of memory below 4 GiB: address and bytes.
    pub memory: (u64, u64),
}

impl Start {
    /// The command line, up to the first byte that is not UTF-8.
    pub fn command_line(&self) -> &str {
        let bytes = &self.line[..self.line_bytes];
        match core::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => core::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default(),
        }
    }
}

unsafe extern "C" {
    /// The end of this program, from the linker.
    static image_end: u8;
}

/// Copies the information, because the guest will use its memory for other things.
pub fn read(address: u64) -> Start {
    let info: StartInfo = at(address).expect("no start info");
    assert!(
        info.magic == MAGIC && info.version >= 1,
        "the start info has no memory map: {:#x}",
        info.magic
    );
    let mut start = Start { line: [0; COMMAND_LINE_MAX], line_bytes: 0, memory: (0, 0) };
    while let Some(byte) = at(info.command_line + start.line_bytes as u64).filter(|byte| *byte != 0)
    {
        let Some(place) = start.line.get_mut(start.line_bytes) else { break };
        *place = byte;
        start.line_bytes += 1;
    }
    let used = (&raw const image_end) as u64;
    for i in 0..info.memory_map_entries.min(MAP_MAX) {
        let Some(entry) =
            at::<MapEntry>(info.memory_map + u64::from(i) * size_of::<MapEntry>() as u64)
        else {
            break;
        };
        let end = entry.address.saturating_add(entry.bytes).min(MAPPED);
        let from = entry.address.max(used);
        if entry.kind == RAM && end.saturating_sub(from) > start.memory.1 {
            start.memory = (from, end - from);
        }
    }
    start
}

/// The value at an address that the loader gave; `None` at 0.
fn at<T: Copy>(address: u64) -> Option<T> {
    let place = NonNull::new(address as *mut T).filter(|_| address < MAPPED)?;
    // SAFETY: the address is mapped, and the loader has put plain data there. Any bytes are a valid
    // value.
    Some(unsafe { place.read_unaligned() })
}
