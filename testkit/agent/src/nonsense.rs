// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A hostile guest: random reads and writes of configuration spaces, as root.
//!
//! It uses all ways that a stock kernel offers: the files in `/sys`; the memory of configuration
//! space (ECAM) through `/dev/mem`, which needs `iomem=relaxed` on the kernel's command line; and
//! the ports `0xcf8` to `0xcff`.
#![allow(unsafe_code)] // Maps configuration space, and accesses it with any width and at any address.

use std::arch::asm;
use std::ffi::{c_int, c_ulong};
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::map::map;
use crate::random::Random;
use crate::stream::number;

/// `O_SYNC`. The mapping of `/dev/mem` is then not cached.
const SYNC: i32 = 0o4010000;
/// The ports of conventional configuration space: the address register, and the first of the 4 data
/// ports.
const PORTS: (u16, u16) = (0xcf8, 0xcfc);
/// The number of messages after the accesses of a wild run.
const DEADLY: u32 = 64;
/// Bytes of this process's memory that no access may change.
const CHECKED: usize = 32 << 20;

unsafe extern "C" {
    fn ioperm(from: c_ulong, count: c_ulong, on: c_int) -> c_int;
}

/// The address of a function.
#[derive(Clone, Copy)]
struct PciAddress {
    bus: u64,
    device: u64,
    function: u64,
}

impl PciAddress {
    /// Parses a name like `02:00.0`.
    fn parse(name: &str) -> io::Result<Self> {
        let parse = |text: &str| u64::from_str_radix(text, 16).ok();
        let parts = name.split_once(':').and_then(|(bus, rest)| Some((bus, rest.split_once('.')?)));
        let address = parts.and_then(|(bus, (device, function))| {
            Some(Self { bus: parse(bus)?, device: parse(device)?, function: parse(function)? })
        });
        address.ok_or_else(|| {
            io::Error::other(format!("{name} is no function; one is called 02:00.0"))
        })
    }

    /// The offset of one of its registers in the ECAM.
    fn register(self, offset: usize) -> u64 {
        self.bus << 20 | self.device << 15 | self.function << 12 | offset as u64
    }
}

/// Configuration space in memory.
struct Ecam {
    base: *mut u8,
    bytes: usize,
}

impl Ecam {
    /// Maps it. The kernel tells its address.
    fn map() -> io::Result<Self> {
        let table = fs::read_to_string("/proc/iomem")?;
        let line =
            table.lines().find(|line| line.contains("PCI ECAM") || line.contains("PCI MMCONFIG"));
        let range = line.and_then(|line| line.trim().split(' ').next()?.split_once('-'));
        let bounds = range.and_then(|(first, last)| {
            Some((usize::from_str_radix(first, 16).ok()?, usize::from_str_radix(last, 16).ok()?))
        });
        let (first, last) =
            bounds.ok_or_else(|| io::Error::other("the kernel knows of no ECAM"))?;
        let memory = File::options().read(true).write(true).custom_flags(SYNC).open("/dev/mem")?;
        let bytes = last + 1 - first;
        Ok(Self { base: map(&memory, first as u64, bytes, true)?.cast(), bytes })
    }

    fn at(&self, address: PciAddress, offset: usize, len: usize) -> Option<*mut u8> {
        let at = usize::try_from(address.register(offset)).ok()?;
        // SAFETY: the address is within the mapping.
        (at + len <= self.bytes).then(|| unsafe { self.base.add(at) })
    }

    /// Reads `data.len()` bytes (1, 2, 4 or 8) by one instruction, from any address. Returns false
    /// if the register is outside of the mapping.
    fn read(&self, address: PciAddress, offset: usize, data: &mut [u8]) -> bool {
        let Some(at) = self.at(address, offset, data.len()) else { return false };
        let value: u64;
        // SAFETY: the addresses are mapped, and are not memory of this process.
        unsafe {
            match data.len() {
                1 => {
                    asm!("movzx {0:e}, byte ptr [{1}]", out(reg) value, in(reg) at, options(nostack))
                }
                2 => {
                    asm!("movzx {0:e}, word ptr [{1}]", out(reg) value, in(reg) at, options(nostack))
                }
                4 => {
                    asm!("mov {0:e}, dword ptr [{1}]", out(reg) value, in(reg) at, options(nostack))
                }
                _ => asm!("mov {0}, qword ptr [{1}]", out(reg) value, in(reg) at, options(nostack)),
            }
        }
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, byte)| *to = byte);
        true
    }

    /// Writes, as [`read`](Self::read) reads.
    fn write(&self, address: PciAddress, offset: usize, data: &[u8]) -> bool {
        let Some(at) = self.at(address, offset, data.len()) else { return false };
        let value = data.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        // SAFETY: as above.
        unsafe {
            match data.len() {
                1 => {
                    asm!("mov byte ptr [{1}], {0}", in(reg_byte) data[0], in(reg) at, options(nostack))
                }
                2 => asm!("mov word ptr [{1}], {0:x}", in(reg) value, in(reg) at, options(nostack)),
                4 => {
                    asm!("mov dword ptr [{1}], {0:e}", in(reg) value, in(reg) at, options(nostack))
                }
                _ => asm!("mov qword ptr [{1}], {0}", in(reg) value, in(reg) at, options(nostack)),
            }
        }
        true
    }
}

/// The ports. The kernel also uses them at any time. So an access may reach the function that the
/// kernel has just selected.
mod ports {
    use super::*;

    /// Selects a register of a function. Returns the data port, which has the lowest two bits of
    /// the register's offset.
    fn choose(address: PciAddress, offset: usize) -> u16 {
        let at = address.register(offset);
        let address = ((1 << 31 | at >> 4 & 0xff_ff00 | at & 0xfc) & 0xffff_ffff) as u32;
        // SAFETY: the kernel has given this process the ports. They do not change memory of this
        // process.
        unsafe {
            asm!("out dx, eax", in("dx") PORTS.0, in("eax") address, options(nostack, nomem))
        };
        PORTS.1 + (at & 3) as u16
    }

    pub fn get() -> io::Result<()> {
        // SAFETY: this only changes which ports the process may use.
        let got = unsafe { ioperm(PORTS.0.into(), 16, 1) };
        if got == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Reads 1, 2 or 4 bytes. 4 bytes need not be aligned, and may reach beyond the data ports.
    pub fn read(address: PciAddress, offset: usize, data: &mut [u8]) {
        let port = choose(address, offset);
        let value: u32;
        // SAFETY: as above.
        unsafe {
            match data.len() {
                1 => {
                    asm!("in al, dx", "movzx eax, al", in("dx") port, out("eax") value, options(nostack, nomem))
                }
                2 => {
                    asm!("in ax, dx", "movzx eax, ax", in("dx") port, out("eax") value, options(nostack, nomem))
                }
                _ => asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, nomem)),
            }
        }
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, byte)| *to = byte);
    }

    pub fn write(address: PciAddress, offset: usize, data: &[u8]) {
        let port = choose(address, offset);
        let value = data.iter().rev().fold(0u32, |value, byte| value << 8 | u32::from(*byte));
        // SAFETY: as above.
        unsafe {
            match data.len() {
                1 => asm!("out dx, al", in("dx") port, in("eax") value, options(nostack, nomem)),
                2 => asm!("out dx, ax", in("dx") port, in("eax") value, options(nostack, nomem)),
                _ => asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, nomem)),
            }
        }
    }
}

/// A function that exists, with the registers whose writes have an effect.
struct Target {
    address: PciAddress,
    file: String,
    registers: Vec<usize>,
    /// The offsets of address and data in the MSI capability.
    message: Range<usize>,
    /// The offset of Slot Control, if the function has a slot.
    slot: Option<usize>,
}

impl Target {
    /// Parses its configuration space, before the random writes change it.
    fn new(name: &str, ecam: &Ecam) -> io::Result<Self> {
        let address = PciAddress::parse(name)?;
        let byte = |at: usize| {
            let mut data = [0];
            ecam.read(address, at, &mut data);
            usize::from(data[0])
        };
        if byte(0) == 0xff {
            return Err(io::Error::other(format!("there is no function {name}")));
        }
        // Command and status; cache line to header type; BARs, or bus numbers and windows;
        // interrupt and bridge control.
        let mut registers: Vec<usize> =
            [4, 5, 6].into_iter().chain(0x0c..0x28).chain(0x3c..0x40).collect();
        let (mut at, mut message, mut slot) = (byte(0x34), 0..0, None);
        for _ in 0..48 {
            let length = match byte(at) {
                _ if at < 0x40 => break,
                0x05 => {
                    message = at + 4..at + 14;
                    24
                }
                0x10 => {
                    slot = (byte(at + 3) & 1 != 0).then_some(at + 0x18);
                    60
                }
                0x11 => 12,
                _ => 4,
            };
            registers.extend(at..at + length);
            at = byte(at + 1);
        }
        Ok(Self {
            address,
            file: format!("/sys/bus/pci/devices/0000:{name}/config"),
            registers,
            message,
            slot,
        })
    }
}

/// The counts of the accesses.
#[derive(Default)]
struct Sum {
    reads: u64,
    writes: u64,
    /// Accesses to files that did not exist, or not any more.
    refused: u64,
}

struct Nonsense {
    random: Random,
    ecam: Ecam,
    wild: bool,
    targets: Vec<Target>,
    sum: Sum,
}

/// Makes `count` random accesses by `seed`, to the functions with these names (`02:00.0`) and to
/// functions that do not exist. Then it checks that its own memory has not changed. It also checks
/// that functions that do not exist read as all ones.
///
/// With `wild`, it also uses the ports, although such an access may reach another function; and it
/// ends with messages that kill a kernel. Without `wild`, a kernel survives all interrupt messages,
/// whatever function sends them: they go to no local APIC, or have a vector that the kernel does
/// not use itself. Then the accesses go on until there is a line, or the end, on standard input: a
/// test decides what takes place meanwhile.
pub fn nonsense(seed: &str, count: &str, wild: bool, functions: &[&str]) -> io::Result<()> {
    let (seed, count) = (number(seed)?, number(count)?);
    let ecam = Ecam::map()?;
    if wild {
        ports::get()?;
    }
    let targets =
        functions.iter().map(|name| Target::new(name, &ecam)).collect::<io::Result<Vec<_>>>()?;
    let random = Random::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut nonsense = Nonsense { random, ecam, wild, targets, sum: Sum::default() };
    let mut pattern = Random::new(seed);
    let checked: Vec<u64> = (0..CHECKED / 8).map(|_| pattern.next()).collect();
    println!("begun");
    for _ in 0..count {
        nonsense.access()?;
    }
    if !wild {
        let asked = Arc::new(AtomicBool::new(false));
        let to_end = Arc::clone(&asked);
        thread::spawn(move || {
            let _ = io::stdin().read_line(&mut String::new());
            // The other load needs no more than this value.
            to_end.store(true, Ordering::Relaxed);
        });
        while !asked.load(Ordering::Relaxed) {
            nonsense.access()?;
        }
    }
    if wild {
        (0..DEADLY).for_each(|_| nonsense.deadly());
    }
    let mut pattern = Random::new(seed);
    if let Some(at) = checked.iter().position(|value| *value != pattern.next()) {
        return Err(io::Error::other(format!(
            "memory has changed, {} bytes from its beginning",
            at * 8
        )));
    }
    let Sum { reads, writes, refused } = nonsense.sum;
    println!("{reads} reads, {writes} writes, {refused} refused");
    Ok(())
}

impl Nonsense {
    /// Makes one access.
    fn access(&mut self) -> io::Result<()> {
        let mut length = self.random.one_of(&[1, 1, 2, 2, 4, 4, 4, 8]);
        if self.random.below(8) == 0 {
            return self.absent(length);
        }
        let target = self.random.index(self.targets.len());
        let target = &self.targets[target];
        let mut offset = match self.random.below(8) {
            0 => self.random.index(0x1000),
            1..3 => self.random.index(0x100),
            _ => target.registers[self.random.index(target.registers.len())],
        };
        if self.random.below(4) > 0 {
            offset -= offset % length;
        }
        offset = offset.min(0x1000 - length);
        let read = self.random.below(4) == 0;
        let mut data = value(&mut self.random).to_le_bytes();
        let touches = offset < target.message.end && target.message.start < offset + length;
        if !read && !self.wild && touches {
            (offset, length, data) = survivable(&mut self.random, target.message.start);
        }
        let data = &mut data[..length];
        let way = self.random.below(if self.wild { 3 } else { 2 });
        let done = match way {
            0 => by_file(&target.file, offset, data, read),
            1 if read => self.ecam.read(target.address, offset, data),
            1 => self.ecam.write(target.address, offset, data),
            _ => {
                let data = &mut data[..length.min(4)];
                if read {
                    ports::read(target.address, offset, data);
                } else {
                    ports::write(target.address, offset, data);
                }
                true
            }
        };
        match (done, read) {
            (false, _) => self.sum.refused += 1,
            (true, true) => self.sum.reads += 1,
            (true, false) => self.sum.writes += 1,
        }
        Ok(())
    }

    /// Makes a root port send a message of any kind, also one that kills a kernel. A command to the
    /// slot causes it, because the port reports the completion.
    fn deadly(&mut self) {
        let random = &mut self.random;
        for Target { address, message, slot, .. } in &self.targets {
            let Some(slot) = *slot else { continue };
            // Fixed, lowest priority, SMI, NMI, INIT, start-up, external. The vector may be that of
            // an exception, or one that the kernel uses itself.
            let how = random.one_of(&[0u64, 1, 2, 4, 5, 6, 7]) << 8
                | random.below(256)
                | random.below(4) << 14;
            let write = |at, value: u64, length| {
                self.ecam.write(*address, at, &value.to_le_bytes()[..length])
            };
            write(message.start, 0xfee0_0000, 8);
            write(message.start + 8, how, 2);
            write(message.start - 2, 1, 2);
            // Clear all events, then cause one that interrupts.
            write(slot + 2, 0x011f, 2);
            write(slot, 0x0030 | random.below(0x2000), 2);
            self.sum.writes += 5;
        }
    }

    /// Makes an access to a function number that no device has, on any bus. No device has several
    /// functions.
    fn absent(&mut self, length: usize) -> io::Result<()> {
        let random = &mut self.random;
        let address = PciAddress {
            bus: random.below(32),
            device: random.below(32),
            function: 1 + random.below(7),
        };
        let offset = random.index(0x1000 - length);
        if random.below(2) == 0 {
            let mut data = [0; 8];
            self.ecam.read(address, offset, &mut data[..length]);
            self.sum.reads += 1;
            if data[..length].iter().any(|byte| *byte != 0xff) {
                let PciAddress { bus, device, function } = address;
                let what = format!(
                    "{bus:02x}:{device:02x}.{function} is not there, and has {data:x?} at \
                     {offset:#x}"
                );
                return Err(io::Error::other(what));
            }
        } else {
            self.ecam.write(address, offset, &value(random).to_le_bytes()[..length]);
            self.sum.writes += 1;
        }
        Ok(())
    }
}

fn by_file(file: &str, offset: usize, data: &mut [u8], read: bool) -> bool {
    // Open the file for each access, because the kernel removes the function and adds it again
    // meanwhile.
    let Ok(file) = File::options().read(true).write(true).open(file) else { return false };
    let done =
        if read { file.read_at(data, offset as u64) } else { file.write_at(data, offset as u64) };
    done.is_ok()
}

/// A value for a register: one that sizes a BAR, an address that something else has already, a few
/// bits, or any value.
fn value(random: &mut Random) -> u64 {
    let low = match random.below(8) {
        0 => u32::MAX,
        1 => 0,
        2 => 1 << random.below(32),
        // RAM, ECAM, the memory of functions, I/O APIC, synthetic interrupts, local APIC, the last
        // page.
        3 | 4 => {
            let address = [
                0,
                0x10_0000,
                0x100_0000,
                0xc000_0000,
                0xe000_0000,
                0xe080_0000,
                0xe100_0000,
                0xfec0_0000,
            ];
            let address =
                random.one_of(&[&address[..], &[0xfed8_0000, 0xfee0_0000, 0xffff_f000]].concat());
            address + (random.word() & 0x00ff_f000 & (u32::MAX >> random.below(32)))
        }
        // The same for the registers of a bridge's window.
        5 => random.word() & 0x1ff0 | 0xe000 | (random.word() & 0x1ff0 | 0xe000) << 16,
        _ => random.word(),
    };
    let high = if random.below(4) == 0 { random.word() } else { 0 };
    u64::from(high) << 32 | u64::from(low)
}

/// A part of a message that a kernel survives, for a capability that has its message at `at`: the
/// offset, the length and the bytes. The part is an address, of a local APIC or not; or data with a
/// vector that no processor accepts (below 16) or that a device uses. Any combination of parts is
/// also harmless.
fn survivable(random: &mut Random, at: usize) -> (usize, usize, [u8; 8]) {
    let (offset, length, value) = match random.below(3) {
        0 => {
            let apic = 0xfee0_0000 | random.word() & 0xf_f00c;
            let address =
                random.one_of(&[0, 0x100_0000, 0xc000_8000, 0xe080_1000, 0xfec0_0000, 0xfed8_0000]);
            (0, 4, if random.below(2) == 0 { apic } else { address | random.word() & 0xffc })
        }
        1 => (4, 4, random.word()),
        _ => {
            let vector =
                if random.below(2) == 0 { random.below(16) } else { 0x81 + random.below(0x60) };
            // Fixed or to the lowest priority; edge or level.
            let how = random.one_of(&[0u32, 0x100, 0x4000, 0x8000, 0xc000]);
            (8, 2, how | (vector & 0xff) as u32)
        }
    };
    (at + offset, length, u64::from(value).to_le_bytes())
}
