// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A hostile device under the drivers of `vbus-driver`. The input gives the values of registers and
//! writes to the driver's memory between any two calls. The driver gets a result or an error, and
//! never an index beyond its memory.
#![no_main]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use libfuzzer_sys::fuzz_target;
use vbus_driver::requests::Requests;
use vbus_driver::venet::{
    BUFFER_MIN, CHAIN_MAX, F_HASH, FRAME_MAX, HEADER_BYTES, Header, Nic, Piece, header_length,
};
use vbus_driver::{Dma, Doorbell, FixedTable, Function, Hal, Memory, NoMemory, pic, sched, state};
use vbus_shm::abi::{capability, command, error_code, reg};
use vbus_shm::pic::Nesting;
use vbus_shm::sync::{Ordering, Word};

/// More than any driver here allocates.
const ALLOCATED_MAX: usize = 64 << 20;

/// The device. Its registers are those of an honest one, until the input changes them.
#[derive(Clone)]
struct Device(Rc<RefCell<State>>);

struct State {
    input: Vec<u8>,
    at: usize,
    config: BTreeMap<u16, u32>,
    bar: BTreeMap<u64, u32>,
    memory: Vec<Shared>,
    allocated: usize,
    handles: u32,
    now: u64,
}

impl State {
    /// The next bytes of the input; zeros behind its end.
    fn next<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        for byte in &mut bytes {
            *byte = self.input.get(self.at).copied().unwrap_or(0);
            self.at += 1;
        }
        bytes
    }

    /// What the device does between two accesses of the driver: nothing, as a rule.
    fn act(&mut self) {
        let [what] = self.next();
        match what {
            // It writes to some memory, mostly to the first words of a ring or a page.
            1..=80 => {
                let [which, place, value @ ..] = self.next::<10>();
                let count = self.memory.len();
                let Some(memory) = self.memory.get(usize::from(which) % count.max(1)) else {
                    return;
                };
                let words = memory.words();
                let place = usize::from(place) * if what < 60 { 1 } else { 37 };
                let value = u64::from_le_bytes(value);
                words[place % words.len()].store(value, Ordering::Relaxed);
            }
            // It adds to a word, as an honest device does.
            81..=110 => {
                let [which, place, value] = self.next();
                let count = self.memory.len();
                let Some(memory) = self.memory.get(usize::from(which) % count.max(1)) else {
                    return;
                };
                let words = memory.words();
                let word = &words[usize::from(place) % words.len()];
                let value = word.load(Ordering::Relaxed).wrapping_add(value.into());
                word.store(value, Ordering::Relaxed);
            }
            111..=130 => {
                let [offset, value @ ..] = self.next::<5>();
                self.bar.insert(u64::from(offset) * 4, u32::from_le_bytes(value));
            }
            131..=140 => {
                let [offset, value @ ..] = self.next::<5>();
                self.config.insert(u16::from(offset % 64) * 4, u32::from_le_bytes(value));
            }
            _ => {}
        }
    }
}

impl Device {
    /// `area` is the class's config area.
    fn new(class: u16, area: &[u32], input: &[u8]) -> Device {
        let mut config: BTreeMap<u16, u32> = BTreeMap::new();
        config.extend([(0, 0x10f5_1af4), (4, 1 << 20), (0x34, 0x40)]);
        config.extend([
            (0x40, 0x0114_0009),
            (0x44, capability::SIGNATURE_VALUE),
            (0x48, 0),
            (0x4c, 0x0004_0001),
            (0x50, 0x1000),
        ]);
        let mut bar: BTreeMap<u64, u32> = BTreeMap::new();
        bar.extend([
            (reg::MAGIC, reg::MAGIC_VALUE),
            (reg::ABI, 0x0001_0001),
            (reg::CLASS, class.into()),
            (reg::INCARNATION, 7),
            (reg::FEATURES, u32::MAX),
            (reg::MAX_REGIONS, 64),
            (reg::MAX_REGION_BYTES, 1 << 24),
            (reg::CONFIG_BYTES, 64),
            (reg::CLASS_NAME, u32::from_le_bytes(*b"user")),
        ]);
        bar.extend((reg::CONFIG..).step_by(4).zip(area.iter().copied()));
        let (input, memory) = (input.to_vec(), Vec::new());
        let state = State { input, at: 0, config, bar, memory, allocated: 0, handles: 0, now: 0 };
        Device(Rc::new(RefCell::new(state)))
    }

    /// The next byte of the input, for the driver's side. Behind the input's end there is none.
    fn step(&self) -> Option<u8> {
        let mut state = self.0.borrow_mut();
        state.act();
        (state.at < state.input.len()).then(|| state.next::<1>()[0])
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Device")
    }
}

impl Hal for Device {
    type Dma = Shared;
    type Regions = FixedTable<Shared, 16>;

    fn config_read32(&self, offset: u16) -> u32 {
        assert!(offset % 4 == 0 && offset < 256, "{offset:#x}");
        self.0.borrow().config.get(&offset).copied().unwrap_or(0)
    }

    fn read32(&self, offset: u64) -> u32 {
        assert!(offset % 4 == 0, "{offset:#x}");
        let mut state = self.0.borrow_mut();
        state.act();
        state.bar.get(&offset).copied().unwrap_or(0)
    }

    fn read64(&self, offset: u64) -> u64 {
        u64::from(self.read32(offset)) | u64::from(self.read32(offset + 4)) << 32
    }

    fn write32(&self, offset: u64, value: u32) {
        assert!(offset % 4 == 0, "{offset:#x}");
        let mut state = self.0.borrow_mut();
        if offset == reg::COMMAND {
            state.bar.insert(reg::RESULT, error_code::OK);
            if value == command::REGION_ADD {
                let handle = state.handles;
                state.handles += 1;
                state.bar.insert(reg::VALUE, handle);
            }
            state.act();
        }
    }

    fn write64(&self, offset: u64, _: u64) {
        assert!(offset % 8 == 0, "{offset:#x}");
    }

    fn alloc(&self, bytes: usize) -> Result<Shared, NoMemory> {
        let mut state = self.0.borrow_mut();
        state.allocated += bytes;
        assert!(bytes > 0 && state.allocated < ALLOCATED_MAX, "{bytes} bytes are allocated");
        let words = (0..bytes.next_multiple_of(4096) / 8).map(|_| Word::new(0)).collect();
        let memory = Shared { words, address: 0x1000_0000 * (state.memory.len() as u64 + 1) };
        state.memory.push(memory.clone());
        Ok(memory)
    }

    fn ring(&self, doorbell: Doorbell, handle: u32) {
        // Where a real one would write. It must not overflow.
        let _ = doorbell.offset(handle);
    }

    fn now(&self) -> u64 {
        let mut state = self.0.borrow_mut();
        state.now += 1000;
        state.now
    }

    fn pause(&self, waited: u64) -> bool {
        waited < 10_000
    }
}

/// Memory of this process.
#[derive(Clone, Debug)]
struct Shared {
    words: Rc<[Word]>,
    address: u64,
}

impl Memory for Shared {
    fn words(&self) -> &[Word] {
        &self.words
    }
}

impl Dma for Shared {
    fn page_shift(&self) -> u8 {
        0
    }

    fn address(&self, offset: usize) -> u64 {
        assert!(offset < self.bytes(), "{offset:#x} of {:#x}", self.bytes());
        self.address + offset as u64
    }
}

fn nic(device: &Device, function: Function<Device>) -> Result<(), vbus_driver::Error> {
    const ENTRIES: u32 = 32;
    let mut nic = Nic::open(function, u64::MAX, 0)?;
    let config = *nic.config();
    assert!((1..=16).contains(&config.queue_pairs) && config.ring_entries.is_power_of_two());
    let (mut tx, mut rx) = nic.queue_pair(0, ENTRIES, BUFFER_MIN, 0)?;
    nic.add_counters(0)?;
    nic.start()?;
    let mut held: Vec<u16> = (0..ENTRIES as u16).collect();
    while let Some(step) = device.step() {
        match step % 16 {
            0..=2 => {
                let mut pieces = Vec::new();
                if let Some(frame) = rx.receive()? {
                    pieces.extend(frame.iter().map(|piece| (piece.id, piece.len)));
                }
                let bytes: usize = pieces.iter().map(|(_, len)| *len as usize).sum();
                assert!(bytes <= FRAME_MAX + HEADER_BYTES + 64, "{bytes} bytes in a frame");
                for (id, len) in pieces {
                    assert!(u32::from(id) < ENTRIES && len <= rx.buffer_bytes());
                    assert!(!held.contains(&id), "buffer {id} comes back twice");
                    held.push(id);
                }
            }
            3 | 4 => {
                if let Some(id) = held.pop() {
                    rx.give(id)?;
                }
                rx.post();
            }
            5 | 6 => {
                let piece = Piece { addr: 0x1000, len: 64 };
                let before = tx.in_flight();
                let taken = tx.submit(&vec![piece; usize::from(step >> 4) + 1])?;
                assert!(tx.in_flight() <= ENTRIES && taken == (tx.in_flight() > before));
                tx.post();
            }
            7 | 8 => {
                let before = tx.in_flight();
                assert!(tx.reclaim()? <= before);
            }
            9 => drop(nic.status()?),
            10 => drop(nic.counters(u16::from(step >> 4))?),
            11 => drop((rx.arm(0), tx.arm(3), nic.arm_status(), nic.status_is_newer())),
            12 => nic.set_queues(1)?,
            13 => tx = nic.reset_tx(tx, ENTRIES, 0)?,
            14 => {
                rx = nic.reset_rx(rx, ENTRIES, BUFFER_MIN, 0)?;
                held = (0..ENTRIES as u16).collect();
            }
            _ => nic.function().check()?,
        }
    }
    Ok(())
}

/// As the Linux driver: receive buffers of its own, and headers that it reads.
fn own_buffers(device: &Device, function: Function<Device>) -> Result<(), vbus_driver::Error> {
    const ENTRIES: u32 = 32;
    let mut nic = Nic::open(function, u64::MAX, 0)?;
    nic.set_budget(Some(1 << 20));
    let tx = nic.tx(0, ENTRIES, 0)?;
    let mut rx = nic.rx_ring(0, ENTRIES, BUFFER_MIN, 0)?;
    nic.start()?;
    let features = nic.function().features();
    let mut given = 0;
    while let Some(step) = device.step() {
        match step % 8 {
            0 | 1 => {
                // SAFETY: nothing is at the address, and this device writes to no buffer.
                given += u32::from(unsafe { rx.give(0x1000) }.is_ok());
                rx.post();
            }
            2..=4 => {
                if let Some(lengths) = rx.receive()? {
                    assert!(lengths.len() <= CHAIN_MAX && lengths.len() as u32 <= given);
                    assert!(lengths.iter().all(|len| (1..=BUFFER_MIN).contains(len)));
                    given -= lengths.len() as u32;
                    let bytes = lengths.iter().map(|len| *len as usize).sum::<usize>();
                    read_header(device, bytes - rx.header_bytes(), features);
                }
            }
            5 => {
                let frame = usize::from(u16::from_le_bytes(device.0.borrow_mut().next()));
                read_header(device, frame, features);
            }
            6 => drop(rx.arm(u32::from(step >> 4))),
            _ => nic.function().check()?,
        }
        assert_eq!((rx.in_flight(), rx.space()), (given, ENTRIES - given));
    }
    nic.remove_pair(tx, rx)
}

/// Reads the header of a frame of `frame` bytes, whose first bytes are those of the input.
fn read_header(device: &Device, frame: usize, features: u64) {
    let mut state = device.0.borrow_mut();
    let (header, first) = (state.next(), state.next::<128>());
    let Ok(header) = Header::parse(&header, features & F_HASH != 0, frame, features) else {
        return;
    };
    if let Some((start, offset)) = header.csum {
        assert!(start >= 14 && usize::from(start) + usize::from(offset) + 2 <= frame);
    }
    if let Some(segments) = header.segments {
        let (start, _) = header.csum.expect("what is to be cut has no checksum yet");
        assert!(segments.size != 0 && usize::from(start) + usize::from(segments.size) < frame);
    }
    let seen = &first[..first.len().min(frame)];
    let length = header_length(seen, &header);
    assert!(length.is_none_or(|length| length <= seen.len()), "{length:?} of {}", seen.len());
}

fn pages(device: &Device, function: Function<Device>) -> Result<(), vbus_driver::Error> {
    let mut devices = state::Pages::open(function)?;
    let Some(page) = devices.find("p")?.or(Some(devices.describe(0)?)) else { return Ok(()) };
    if let Ok(mut reader) = devices.reader(&page, 0) {
        let mut out = vec![0; reader.value_bytes()];
        while let Some(step) = device.step() {
            match step % 4 {
                0 | 1 => drop(reader.read(&mut out)?),
                2 => drop(reader.arm_newer(step.into())),
                _ => reader.disarm(),
            }
        }
        return devices.release(reader);
    }
    let mut writer = devices.writer(&page, 0)?;
    while device.step().is_some() {
        writer.write(&vec![1; writer.value_bytes()]);
    }
    devices.finish(writer)
}

fn service(device: &Device, function: Function<Device>) -> Result<(), vbus_driver::Error> {
    let mut requests = Requests::open(function, "user", 8, 0)?;
    let most = requests.response_max();
    let mut response = vec![0; most];
    let mut open = Vec::new();
    while let Some(step) = device.step() {
        match step % 4 {
            0 | 1 => open.extend(requests.submit(&vec![2; requests.request_max().min(64)])?),
            2 => requests.post(),
            _ => {
                if let Some(done) = requests.complete(&mut response)? {
                    let at = open.iter().position(|id| *id == done.id);
                    open.remove(at.expect("an answer to an open request"));
                    assert!(done.result.is_ok_and(|len| len <= most) || done.result.is_err());
                }
            }
        }
    }
    Ok(())
}

fn interrupts(device: &Device, function: Function<Device>) -> Result<(), vbus_driver::Error> {
    let mut pic = pic::Pic::open(function)?;
    let nesting = if device.step().is_some_and(|step| step & 1 != 0) {
        Nesting::Nested
    } else {
        Nesting::Flat
    };
    let mut cpu = pic.cpu(0, 64, nesting, 0)?;
    while let Some(step) = device.step() {
        match step % 5 {
            0 | 1 => {
                if let Some(line) = cpu.take() {
                    assert!(line < 64);
                    cpu.end(line);
                }
            }
            2 => drop(cpu.arm()),
            3 => cpu.mask(u16::from(step) % 64),
            _ => drop(cpu.unmask(u16::from(step) % 64)),
        }
    }
    pic.remove(cpu)
}

fn scheduling(device: &Device, function: Function<Device>) -> Result<(), vbus_driver::Error> {
    let mut cpus = sched::Cpus::open(function)?;
    let mut cpu = cpus.cpu(0)?;
    while let Some(step) = device.step() {
        match step % 3 {
            0 => drop(cpu.report()?),
            1 => drop(cpu.arm_report(step.into())),
            _ => cpu.disarm_report(),
        }
    }
    Ok(())
}

fuzz_target!(|input: &[u8]| {
    use vbus_shm::abi::class;
    let Some((&kind, input)) = input.split_first() else { return };
    const VENET: &[u32] = &[2, 1500 << 16, 256 << 16 | 2, 128, 0xff];
    type Drive = fn(&Device, Function<Device>) -> Result<(), vbus_driver::Error>;
    let (class, area, drive): (u16, &[u32], Drive) = match kind % 8 {
        0..=2 => (class::VENET, VENET, nic),
        3 => (class::VENET, VENET, own_buffers),
        4 => (class::STATE, &[3], pages),
        5 => (class::PIC, &[2, 256], interrupts),
        6 => (class::SCHED, &[2, 7, 10, 0, 100, 10, 50], scheduling),
        _ => (class::USER, &[64, 100], service),
    };
    let device = Device::new(class, area, input);
    if let Ok(mut function) = Function::probe(device.clone()) {
        if kind & 8 != 0 {
            function.choose_doorbell(3);
        }
        let _ = drive(&device, function);
    }
});
