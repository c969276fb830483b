// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A hostile guest: a driver of a virtio network card that follows no rule, as root.
//!
//! Each round begins as a driver does, with something wrong now and then. Then it takes random
//! steps: descriptors, tables, indices, registers in any order, commands, resets. The device
//! writes only to memory that this driver names. So all addresses are in memory that the kernel
//! does not use (`memmap=` on its command line), or are no memory at all. The kernel lives on.
#![allow(clippy::cast_possible_truncation)] // Numbers are random. The guest has 64 bits.
#![allow(unsafe_code)] // Maps the card's registers and memory, which the device changes at any time.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use crate::map::map;
use crate::random::Random;
use crate::stream::number;

/// Descriptor flags.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Those of a packed queue alone.
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Feature bits.
const VERSION_1: u64 = 1 << 32;
const RING_PACKED: u64 = 1 << 34;

/// Bits of the device status.
const FOUND: u8 = 3;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 0x40;

/// Fields of the common configuration.
mod field {
    pub const DEVICE_SELECT: usize = 0x00;
    pub const DEVICE_FEATURE: usize = 0x04;
    pub const DRIVER_SELECT: usize = 0x08;
    pub const DRIVER_FEATURE: usize = 0x0c;
    pub const NUM_QUEUES: usize = 0x12;
    pub const STATUS: usize = 0x14;
    pub const SELECT: usize = 0x16;
    pub const SIZE: usize = 0x18;
    pub const ENABLE: usize = 0x1c;
    pub const DESCRIPTORS: usize = 0x20;
    pub const RESET: usize = 0x3a;
    pub const END: u64 = 0x40;
}

/// Bytes of BAR0.
const BAR: usize = 0x8000;
/// Bytes of the driver's memory for each queue. The buffers are behind those of the queues.
const QUEUE: u64 = 0x4000;
/// The most queues that the driver uses.
const QUEUES_MAX: u64 = 5;
/// Descriptors of most queues.
const SIZE: u16 = 64;
/// The last bytes of the reserved memory, which the firmware uses.
const FIRMWARE: u64 = 1 << 20;
/// The steps of a round.
const STEPS: u64 = 200;

/// Memory that the kernel does not use.
struct Memory {
    at: *mut u8,
    base: u64,
    bytes: u64,
    /// Where the guest's memory ends.
    end: u64,
}

impl Memory {
    /// Maps the memory that `memmap=MIB_OF_IT$MIB_BEFORE_IT` on the kernel's command line reserves
    /// at the end of the guest's memory.
    fn map() -> io::Result<Self> {
        let words = fs::read_to_string("/proc/cmdline")?;
        let bounds = words.split_whitespace().find_map(|word| {
            let (bytes, base) = word.strip_prefix("memmap=")?.split_once('$')?;
            let mib = |text: &str| Some(text.strip_suffix('M')?.parse::<u64>().ok()? << 20);
            Some((mib(base)?, mib(bytes)?))
        });
        let (base, reserved) =
            bounds.ok_or_else(|| io::Error::other("it needs memmap=…M$…M on the command line"))?;
        let bytes = reserved - FIRMWARE;
        let memory = File::options().read(true).write(true).open("/dev/mem")?;
        let len = usize::try_from(bytes).map_err(io::Error::other)?;
        let at = map(&memory, base, len, true)?.cast();
        Ok(Self { at, base, bytes, end: base + reserved })
    }

    /// Writes bytes, if the address is in this memory.
    fn write(&self, addr: u64, bytes: &[u8]) {
        for (addr, byte) in (addr..).zip(bytes) {
            let Some(at) = addr.checked_sub(self.base).filter(|at| *at < self.bytes) else {
                return;
            };
            // SAFETY: the address is within the mapping, which nothing else in this process uses.
            unsafe { self.at.add(at as usize).write_volatile(*byte) };
        }
    }
}

/// A queue as the driver has set it up.
#[derive(Clone, Copy, Default)]
struct Queue {
    /// Its areas: descriptors, driver area, device area.
    areas: [u64; 3],
    size: u16,
    /// The available index, or the next descriptor of a packed queue.
    next: u16,
    /// The wrap counter of a packed queue.
    wrap: bool,
}

/// What the device has done.
#[derive(Default)]
struct Sum {
    /// Writes to registers and to memory that the device reads.
    writes: u64,
    /// Sessions that the device began.
    started: u64,
    /// Choices of features that it refused.
    refused: u64,
    /// Rounds at whose end it needed a reset.
    broken: u64,
}

struct Rogue {
    bar: *mut u8,
    config: File,
    /// Where the parts of the card are: common configuration, notify area, and the window in the
    /// configuration space.
    common: usize,
    notify: usize,
    window: u64,
    memory: Memory,
    random: Random,
    offered: u64,
    packed: bool,
    queues: [Queue; QUEUES_MAX as usize],
    sum: Sum,
}

/// Drives the card `function`, such as `0000:01:00.0`, for some rounds. No driver may have it.
pub fn virtio(seed: &str, rounds: &str, function: &str) -> io::Result<()> {
    let mut rogue = Rogue::new(function, Random::new(number(seed)? << 1))?;
    for _ in 0..number(rounds)? {
        rogue.round();
    }
    rogue.set(field::STATUS, 0, 1);
    let status = rogue.status();
    let Sum { writes, started, refused, broken } = rogue.sum;
    if status != 0 {
        return Err(io::Error::other(format!("after a reset the status is {status:#x}")));
    }
    println!("writes {writes} started {started} refused {refused} broken {broken}");
    Ok(())
}

impl Rogue {
    fn new(function: &str, random: Random) -> io::Result<Self> {
        let folder = format!("/sys/bus/pci/devices/{function}");
        fs::write(format!("{folder}/enable"), "1")?;
        let open =
            |name: &str| File::options().read(true).write(true).open(format!("{folder}/{name}"));
        let (config, resource) = (open("config")?, open("resource0")?);
        let bar = map(&resource, 0, BAR, true)?.cast();
        let mut space = [0; 256];
        config.read_exact_at(&mut space, 0)?;
        let (mut common, mut notify, mut window) = (0, 0, 0);
        let mut at = usize::from(space[0x34]);
        while at != 0 {
            let word = |at: usize| {
                space.get(at..at + 4).map_or(0, |bytes| {
                    bytes.iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte))
                })
            };
            match (space[at], space[at + 3]) {
                (9, 1) => common = word(at + 8),
                (9, 2) => notify = word(at + 8),
                (9, 5) => window = at as u64,
                _ => {}
            }
            at = usize::from(space[at + 1]);
        }
        let memory = Memory::map()?;
        let queues = Default::default();
        let mut rogue = Self {
            bar,
            config,
            common,
            notify,
            window,
            memory,
            random,
            offered: 0,
            packed: false,
            queues,
            sum: Sum::default(),
        };
        rogue.set_master(true);
        rogue.set(field::DEVICE_SELECT, 0, 4);
        rogue.offered = rogue.get(field::DEVICE_FEATURE, 4);
        rogue.set(field::DEVICE_SELECT, 1, 4);
        rogue.offered |= rogue.get(field::DEVICE_FEATURE, 4) << 32;
        if rogue.offered & VERSION_1 == 0 || rogue.get(field::NUM_QUEUES, 2) < 3 {
            return Err(io::Error::other(format!("{function} is no virtio network card")));
        }
        Ok(rogue)
    }

    /// Sets or clears Bus Master.
    fn set_master(&self, on: bool) {
        let command: u16 = if on { 6 } else { 2 };
        let _ = self.config.write_all_at(&command.to_le_bytes(), 4);
    }

    /// Writes to BAR0 with one instruction. The offset is within the BAR.
    fn poke(&mut self, offset: usize, value: u64, len: usize) {
        let offset = offset.min(BAR - len);
        self.sum.writes += 1;
        // SAFETY: the address is within the mapping of registers, which are no memory of this
        // process. x86 writes them at any alignment.
        unsafe {
            let at = self.bar.add(offset);
            match len {
                1 => {
                    std::arch::asm!("mov byte ptr [{0}], {1}", in(reg) at, in(reg_byte) (value & 0xff) as u8)
                }
                2 => std::arch::asm!("mov word ptr [{0}], {1:x}", in(reg) at, in(reg) value),
                4 => std::arch::asm!("mov dword ptr [{0}], {1:e}", in(reg) at, in(reg) value),
                _ => std::arch::asm!("mov qword ptr [{0}], {1}", in(reg) at, in(reg) value),
            }
        }
    }

    /// Reads BAR0 likewise.
    fn peek(&self, offset: usize, len: usize) -> u64 {
        let offset = offset.min(BAR - len);
        let value: u64;
        // SAFETY: as above.
        unsafe {
            let at = self.bar.add(offset);
            match len {
                1 => std::arch::asm!("movzx {1:e}, byte ptr [{0}]", in(reg) at, out(reg) value),
                2 => std::arch::asm!("movzx {1:e}, word ptr [{0}]", in(reg) at, out(reg) value),
                4 => std::arch::asm!("mov {1:e}, dword ptr [{0}]", in(reg) at, out(reg) value),
                _ => std::arch::asm!("mov {1}, qword ptr [{0}]", in(reg) at, out(reg) value),
            }
        }
        value
    }

    fn set(&mut self, field: usize, value: u64, len: usize) {
        self.poke(self.common + field, value, len);
    }

    fn get(&self, field: usize, len: usize) -> u64 {
        self.peek(self.common + field, len)
    }

    fn status(&self) -> u8 {
        (self.get(field::STATUS, 1) & 0xff) as u8
    }

    /// True in one of `n` cases.
    fn one_in(&mut self, n: u64) -> bool {
        self.random.below(n) == 0
    }

    fn fill(&mut self, addr: u64, bytes: &[u8]) {
        self.sum.writes += 1;
        self.memory.write(addr, bytes);
    }

    /// An address of the driver's memory behind that of the queues.
    fn inside(&mut self) -> u64 {
        let first = QUEUE * QUEUES_MAX;
        self.memory.base + first + self.random.below(self.memory.bytes - first - 0x2_0000)
    }

    /// An address that is bad for anything that is longer than 7 bytes.
    fn outside(&mut self) -> u64 {
        let (end, some) = (self.memory.end, self.random.below(7));
        self.random.one_of(&[
            end,
            end - 1 - some,
            end + some,
            u64::MAX - some,
            1 << 40,
            0xfee0_0000,
        ])
    }

    /// A driver begins, takes steps, and leaves.
    fn round(&mut self) {
        self.begin();
        for _ in 0..self.random.below(STEPS) {
            self.step();
        }
        let broken = self.status() & NEEDS_RESET != 0;
        self.sum.broken += u64::from(broken);
    }

    /// Resets the card, chooses features, sets queues up and sets DRIVER_OK.
    fn begin(&mut self) {
        self.set_master(true);
        self.set(field::STATUS, 0, 1);
        let mut features = self.offered & (self.random.next() | VERSION_1);
        if self.one_in(8) {
            features ^= 1 << self.random.below(64);
        }
        self.packed = features & RING_PACKED != 0;
        self.set(field::STATUS, FOUND.into(), 1);
        for half in 0..2 {
            self.set(field::DRIVER_SELECT, half, 4);
            self.set(field::DRIVER_FEATURE, features >> (32 * half) & 0xffff_ffff, 4);
        }
        self.set(field::STATUS, (FOUND | FEATURES_OK).into(), 1);
        self.sum.refused += u64::from(self.status() & FEATURES_OK == 0);
        if self.one_in(8) {
            self.step(); // Before DRIVER_OK.
        }
        for number in 0..QUEUES_MAX {
            if !self.one_in(16) {
                self.enable(number);
            }
        }
        self.set(field::STATUS, (FOUND | FEATURES_OK | DRIVER_OK).into(), 1);
        self.sum.started += u64::from(self.status() & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK);
    }

    /// Sets a queue up and enables it.
    fn enable(&mut self, number: u64) {
        let at = self.memory.base + QUEUE * number;
        let mut areas = [at, at + 0x1000, at + 0x2000];
        let mut size = if self.one_in(8) { self.random.one_of(&[1, 2, 1024]) } else { SIZE };
        if self.one_in(32) {
            size = self.random.one_of(&[0, 3, 1025, 0x8000, 0xffff]);
        }
        if self.one_in(32) {
            // Outside of memory, not aligned, the area of another one, or the buffers.
            let bad = [self.outside(), at + 1, areas[1], self.inside() & !15];
            areas[self.random.index(3)] = self.random.one_of(&bad);
        }
        for area in areas {
            self.fill(area, &[0; 0x1000][..usize::from(size.min(SIZE)) * 16]);
        }
        self.queues[number as usize % self.queues.len()] =
            Queue { areas, size: size.max(1), next: 0, wrap: true };
        self.set(field::SELECT, number, 2);
        self.set(field::SIZE, size.into(), 2);
        for (n, area) in areas.into_iter().enumerate() {
            self.set(field::DESCRIPTORS + 8 * n, area, 8);
        }
        self.set(field::ENABLE, 1, 2);
    }

    /// One thing that a driver may do, or must not.
    fn step(&mut self) {
        let number = self.random.below(QUEUES_MAX);
        match self.random.below(32) {
            0..=13 => self.chain(number),
            14..=17 => self.command(),
            18 => self.jump(number),
            19 => {
                let (at, value) = (self.random.below(QUEUE * QUEUES_MAX), self.random.next());
                self.fill(self.memory.base + at, &value.to_le_bytes());
            }
            20 | 21 => {
                let (field, value) = (self.random.below(field::END), self.random.next());
                let len = self.random.one_of(&[1, 2, 4, 8]);
                self.set(field as usize, value, len);
            }
            22 => {
                let (offset, value) = (self.random.index(BAR), self.random.next());
                let len = self.random.one_of(&[1, 2, 4, 8]);
                self.poke(offset, value, len);
            }
            23 => {
                let (offset, len) = (self.random.index(BAR), self.random.one_of(&[1, 2, 4, 8]));
                self.peek(offset, len);
            }
            24 => self.through_window(),
            25 => (0..QUEUES_MAX * 2).for_each(|number| self.ring(number)),
            26 => {
                self.set(field::SELECT, number, 2);
                self.set(field::RESET, 1, 2);
                if !self.one_in(4) {
                    self.enable(number);
                }
            }
            27 => {
                let status = self.random.next();
                self.set(field::STATUS, status, 1);
            }
            28 if self.one_in(4) => {
                self.set_master(false);
                self.ring(number);
                self.set_master(true);
            }
            // In mid-traffic.
            29 if self.one_in(4) => self.set(field::STATUS, 0, 1),
            30 if self.one_in(4) => self.begin(),
            _ => self.ring(number),
        }
    }

    fn ring(&mut self, number: u64) {
        self.poke(self.notify + 4 * number as usize, number, 2);
    }

    /// A read or a write by the capability in the configuration space.
    fn through_window(&mut self) {
        let (offset, len) = (self.random.word() & 0xffff, self.random.one_of(&[0, 1, 2, 3, 4, 8]));
        let place =
            [&[(offset >> 8 & 1) as u8, 0, 0, 0][..], &offset.to_le_bytes(), &[len, 0, 0, 0]];
        let _ = self.config.write_all_at(&place.concat(), self.window + 4);
        let value = self.random.word().to_le_bytes();
        let data = self.window + 16;
        let _ = match self.one_in(2) {
            true => self.config.write_all_at(&value, data),
            false => self.config.read_exact_at(&mut [0; 4], data),
        };
    }

    /// The available index, or the wrap counter, is not what it should be.
    fn jump(&mut self, number: u64) {
        let jump = self.random.one_of(&[1, SIZE, SIZE + 1, 0x7fff, 0xffff]);
        let queue = &mut self.queues[number as usize];
        match self.packed {
            true => {
                queue.next = queue.next.wrapping_add(jump) % queue.size;
                queue.wrap = !queue.wrap;
            }
            false => queue.next = queue.next.wrapping_add(jump),
        }
        let (at, next) = (queue.areas[1] + 2, queue.next);
        self.fill(at, &next.to_le_bytes());
        self.ring(number);
    }

    /// A buffer: mostly a good one.
    fn buffer(&mut self) -> (u64, u32) {
        let good = (self.inside(), 1 + self.random.word() % 4096);
        match self.random.below(64) {
            0 => (self.outside(), 8 + good.1),
            1 => (good.0, 0),
            2 => (good.0, self.random.one_of(&[u32::MAX, 1 << 31, 0x1_0000])),
            // The queues themselves.
            3 => (self.memory.base + self.random.below(QUEUE * QUEUES_MAX), 64),
            _ => good,
        }
    }

    /// Makes a chain available: some buffers, by a table or without, mostly as the queue needs it.
    fn chain(&mut self, number: u64) {
        let receives = number % 2 == 0 && number != 2;
        let write = if receives != self.one_in(16) { WRITE } else { 0 };
        let most = if self.one_in(8) { 40 } else { 4 };
        let count = 1 + self.random.below(most);
        let mut parts: Vec<(u64, u32, u16)> = Vec::new();
        for _ in 0..count {
            let (addr, len) = self.buffer();
            let odd =
                if self.one_in(32) { self.random.one_of(&[WRITE, INDIRECT, 0x40]) } else { 0 };
            parts.push((addr, len, write ^ odd));
        }
        if self.one_in(4) {
            parts = vec![self.table(&parts)];
        }
        self.offer(number, &parts);
    }

    /// Writes a table with these parts. Returns the part that refers to it.
    fn table(&mut self, parts: &[(u64, u32, u16)]) -> (u64, u32, u16) {
        let at = self.inside() & !15;
        let (count, loops) = (parts.len(), self.one_in(16));
        for (i, &(addr, len, flags)) in parts.iter().enumerate() {
            let last = i + 1 == count;
            let (mut next, mut flags) = (i + 1, flags);
            if loops && last {
                next = self.random.index(count + 2);
            }
            if !self.packed && (!last || loops) {
                flags |= NEXT;
            }
            self.descriptor(at + 16 * i as u64, (addr, len, flags), next as u16);
        }
        let len = u32::try_from(16 * count).unwrap_or(16);
        let odd = self.random.one_of(&[0, 8, 16, 0x8000_0000, 0xffff_fff0]);
        let len = if self.one_in(16) { len.wrapping_add(odd) } else { len };
        let flags = if self.one_in(16) { INDIRECT | NEXT } else { INDIRECT };
        match self.one_in(32) {
            true => (self.outside(), len, flags),
            // A table in a table.
            false if self.one_in(16) => self.table(&[(at, len, flags)]),
            false => (at, len, flags),
        }
    }

    /// Writes a descriptor of a split queue, or of a table.
    fn descriptor(&mut self, at: u64, (addr, len, flags): (u64, u32, u16), next: u16) {
        let second = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.fill(at, &addr.to_le_bytes());
        self.fill(at + 8, &second.to_le_bytes());
    }

    /// Makes these parts available as a chain of the queue, and notifies the device.
    fn offer(&mut self, number: u64, parts: &[(u64, u32, u16)]) {
        let mut queue = self.queues[number as usize];
        let (size, last) = (queue.size, parts.len() - 1);
        let head = match self.packed {
            true => queue.next,
            false => (self.random.word() % u32::from(size)) as u16,
        };
        for (i, &(addr, len, flags)) in parts.iter().enumerate() {
            let slot = (head.wrapping_add(i as u16)) % size;
            let mut flags = if i < last || self.one_in(64) { flags | NEXT } else { flags };
            let mut next = (slot + 1) % size;
            if self.packed {
                // The id, and the bits that say that it is available.
                let wrap = queue.wrap != self.one_in(64);
                flags |= if wrap { AVAIL } else { USED };
                next = self.random.word() as u16;
                let second = u64::from(len) | u64::from(next) << 32 | u64::from(flags) << 48;
                let at = queue.areas[0] + 16 * u64::from(slot);
                self.fill(at, &addr.to_le_bytes());
                self.fill(at + 8, &second.to_le_bytes());
                queue.next = (slot + 1) % size;
                queue.wrap ^= queue.next == 0;
            } else {
                if self.one_in(64) {
                    next = self.random.one_of(&[slot, head, size, 0xffff]);
                }
                self.descriptor(queue.areas[0] + 16 * u64::from(slot), (addr, len, flags), next);
            }
        }
        if !self.packed {
            let place = queue.areas[1] + 4 + 2 * u64::from(queue.next % size);
            let head = if self.one_in(64) { size } else { head };
            self.fill(place, &head.to_le_bytes());
            queue.next = queue.next.wrapping_add(1);
            self.fill(queue.areas[1] + 2, &queue.next.to_le_bytes());
        }
        self.queues[number as usize] = queue;
        self.ring(number);
    }

    /// A command of any length, known or not.
    fn command(&mut self) {
        let (at, answer) = (self.inside(), self.inside());
        let bytes =
            if self.one_in(4) { self.random.below(0x1_1000) } else { self.random.below(300) };
        let (class, command) = (self.random.below(8) as u8, self.random.below(7) as u8);
        let content: Vec<u8> = (0..bytes.min(400)).map(|_| self.random.below(4) as u8).collect();
        self.fill(at + 2, &content);
        self.fill(at, &[class, command]);
        let (len, room) = (bytes as u32, self.random.one_of(&[0, 1, 1, 1, 9, 10]));
        // The control queue is 2 for a driver without several pairs, and else 4.
        let number = self.random.one_of(&[2, 4]);
        self.offer(number, &[(at, len, 0), (answer, room, WRITE)]);
    }
}
