// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A fake function. A test can set its registers and the results of its commands. It knows which
//! memory is registered with it, and panics when a driver frees such memory.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};

use vbus_driver::{Dma, Doorbell, FixedTable, Hal, NoMemory};
use vbus_shm::Memory;
use vbus_shm::abi::{capability, command, error_code, reg};
use vbus_shm::sync::{Ordering, Word};

/// The fake function. Clones are handles to the same function.
#[derive(Clone)]
pub struct Fake(Rc<RefCell<Registers>>);

#[derive(Default)]
struct Registers {
    config: BTreeMap<u16, u32>,
    bar: BTreeMap<u64, u32>,
    /// The values of the next reads of a register. Afterwards `bar` has the value.
    script: BTreeMap<u64, Vec<u32>>,
    memory: Vec<Weak<Block>>,
    /// The registered regions: the address by handle.
    regions: Rc<RefCell<BTreeMap<u32, u64>>>,
    arguments: BTreeMap<u64, u64>,
    /// The commands of the driver, in order.
    commands: Vec<u32>,
    /// The commands that fail, with their error codes.
    refused: BTreeMap<u32, u32>,
    /// A word that REGION_ADD writes into the memory that was allocated last.
    scribble: Option<(usize, u64)>,
    /// Whether a test has fixed the results of all commands.
    forced: bool,
    rung: u32,
    /// The kinds of doorbell that can be rung, with the cost of each ring in nanoseconds. The last
    /// cost holds for all further rings.
    kinds: BTreeMap<u8, Vec<u64>>,
    /// The rings, by kind and address.
    rings: Vec<(u8, u64)>,
    now: u64,
    /// Connections whose memory was lost.
    lost: u32,
    /// Posted writes to `bar`. The next read completes them.
    posted: Vec<u64>,
    /// The offsets of completed writes, in order.
    written: Vec<u64>,
}

impl Default for Fake {
    /// The function of an honest NIC.
    fn default() -> Self {
        let mut registers = Registers::default();
        registers.config.extend([(0, 0x10f5_1af4), (4, 1 << 20), (0x34, 0x40)]);
        // Vendor-specific, the last capability, 20 bytes, layout 1; signature; registers at 0; MMIO
        // doorbells at 0x1000 with stride 4.
        registers.config.extend([
            (0x40, 0x0114_0009),
            (0x44, capability::SIGNATURE_VALUE),
            (0x48, 0),
            (0x4c, 0x0004_0001),
            (0x50, 0x1000),
        ]);
        registers.bar.extend([
            (reg::MAGIC, reg::MAGIC_VALUE),
            (reg::ABI, 0x0001_0001),
            (reg::CLASS, 1),
            (reg::INCARNATION, 7),
        ]);
        registers.bar.extend([
            (reg::MAX_REGIONS, 64),
            (reg::MAX_REGION_BYTES, 1 << 24),
            (reg::CONFIG_BYTES, 16),
        ]);
        // MTU 1500 after the address; one pair of queues, 256 entries.
        registers.bar.extend([
            (reg::CONFIG, 2),
            (reg::CONFIG + 4, 1500 << 16),
            (reg::CONFIG + 8, 256 << 16 | 1),
        ]);
        registers.kinds.insert(capability::KIND_MMIO, vec![0]);
        Fake(Rc::new(RefCell::new(registers)))
    }
}

impl Fake {
    /// Lets the driver ring this kind of doorbell, at this cost.
    pub fn set_cost(&self, kind: u8, nanoseconds: &[u64]) {
        self.0.borrow_mut().kinds.insert(kind, nanoseconds.to_vec());
    }

    /// Puts these records into the capability.
    pub fn set_records(&self, records: &[Doorbell]) {
        let bytes = u32::from(capability::HEADER_BYTES) + 8 * records.len() as u32;
        self.set_config(0x40, 0x0100_0009 | bytes << 16);
        for (at, record) in (0x4c..).step_by(8).zip(records) {
            self.set_config(at, u32::from(record.kind) | u32::from(record.stride) << 16);
            self.set_config(at + 4, record.base);
        }
    }

    /// The rings since the last call.
    pub fn rings(&self) -> Vec<(u8, u64)> {
        std::mem::take(&mut self.0.borrow_mut().rings)
    }

    /// Sets four bytes of the configuration space.
    pub fn set_config(&self, offset: u16, value: u32) {
        self.0.borrow_mut().config.insert(offset, value);
    }

    /// Sets a register. RESULT and VALUE then keep these values, whatever the commands.
    pub fn set_register(&self, offset: u64, value: u32) {
        let mut registers = self.0.borrow_mut();
        registers.forced |= matches!(offset, reg::RESULT | reg::VALUE);
        registers.bar.insert(offset, value);
    }

    /// Lets a command fail with `code` from now on; with 0 it succeeds again.
    pub fn refuse(&self, number: u32, code: u32) {
        self.0.borrow_mut().refused.insert(number, code);
    }

    /// Lets the device write word `at` of each region when it is added.
    pub fn scribble(&self, at: usize, value: u64) {
        self.0.borrow_mut().scribble = Some((at, value));
    }

    /// The commands of the driver, in order.
    pub fn commands(&self) -> Vec<u32> {
        self.0.borrow().commands.clone()
    }

    /// Number of registered regions.
    pub fn regions(&self) -> usize {
        self.0.borrow().regions.borrow().len()
    }

    /// Sets the values of the next reads of a register.
    pub fn script(&self, offset: u64, values: &[u32]) {
        self.0.borrow_mut().script.insert(offset, values.to_vec());
    }

    /// The allocation number `n`. It must not have been freed.
    pub fn memory(&self, n: usize) -> Plain {
        Plain(self.0.borrow().memory[n].upgrade().expect("memory that is still in use"))
    }

    /// Number of allocations that are still in use.
    pub fn in_use(&self) -> usize {
        self.0.borrow().memory.iter().filter(|block| block.strong_count() > 0).count()
    }

    /// The offsets of completed writes, in order.
    pub fn written(&self) -> Vec<u64> {
        self.0.borrow().written.clone()
    }

    /// Connections whose memory was lost.
    pub fn lost(&self) -> u32 {
        self.0.borrow().lost
    }

    /// Number of rings.
    pub fn rung(&self) -> u32 {
        self.0.borrow().rung
    }
}

impl std::fmt::Debug for Fake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Fake")
    }
}

impl Registers {
    /// Runs a command.
    fn run(&mut self, number: u32) {
        self.commands.push(number);
        let result = self.refused.get(&number).copied().unwrap_or(error_code::OK);
        let mut value = 0;
        if result == error_code::OK {
            let argument = |n: u64| self.arguments.get(&(reg::ARGUMENT + 8 * n)).copied();
            let mut regions = self.regions.borrow_mut();
            match number {
                command::REGION_ADD => {
                    value = (0..).find(|handle| !regions.contains_key(handle)).unwrap();
                    regions.insert(value, argument(1).unwrap());
                    let added = self.memory.last().and_then(Weak::upgrade);
                    if let (Some((at, word)), Some(block)) = (self.scribble, added) {
                        Plain(block).words()[at].store(word, Ordering::Relaxed);
                    }
                }
                command::REGION_DROP => drop(regions.remove(&(argument(0).unwrap() as u32))),
                command::CLOSE => regions.clear(),
                _ => {}
            }
        }
        if !self.forced {
            self.bar.insert(reg::RESULT, result);
            self.bar.insert(reg::VALUE, value);
        }
    }
}

impl Hal for Fake {
    type Dma = Plain;
    type Regions = FixedTable<Plain, 8>;

    fn config_read32(&self, offset: u16) -> u32 {
        assert!(offset % 4 == 0 && offset < 256, "{offset:#x}");
        self.0.borrow().config.get(&offset).copied().unwrap_or(0)
    }

    fn read32(&self, offset: u64) -> u32 {
        let mut registers = self.0.borrow_mut();
        let posted = std::mem::take(&mut registers.posted);
        registers.written.extend(posted);
        if let Some(values) = registers.script.get_mut(&offset).filter(|values| !values.is_empty())
        {
            return values.remove(0);
        }
        registers.bar.get(&offset).copied().unwrap_or(0)
    }

    fn read64(&self, offset: u64) -> u64 {
        u64::from(self.read32(offset)) | u64::from(self.read32(offset + 4)) << 32
    }

    fn write32(&self, offset: u64, value: u32) {
        let mut registers = self.0.borrow_mut();
        registers.posted.push(offset);
        if offset == reg::COMMAND {
            registers.run(value);
        }
    }

    fn write64(&self, offset: u64, value: u64) {
        self.0.borrow_mut().arguments.insert(offset, value);
    }

    fn alloc(&self, bytes: usize) -> Result<Plain, NoMemory> {
        let words: Vec<Word> =
            (0..bytes.next_multiple_of(4096) / 8).map(|_| Word::new(0)).collect();
        let mut registers = self.0.borrow_mut();
        let address = 0x10_0000 * (registers.memory.len() as u64 + 1);
        let memory = Rc::new(Block { words, address, regions: registers.regions.clone() });
        registers.memory.push(Rc::downgrade(&memory));
        Ok(Plain(memory))
    }

    fn can_ring(&self, kind: u8) -> bool {
        self.0.borrow().kinds.contains_key(&kind)
    }

    fn ring(&self, doorbell: Doorbell, handle: u32) {
        let mut registers = self.0.borrow_mut();
        let costs = registers.kinds.get_mut(&doorbell.kind).expect("a kind that can be rung");
        let cost = if costs.len() > 1 { costs.remove(0) } else { costs[0] };
        registers.now += cost;
        registers.rung += 1;
        registers.rings.push((doorbell.kind, doorbell.offset(handle)));
    }

    fn now(&self) -> u64 {
        self.0.borrow().now
    }

    fn pause(&self, waited: u64) -> bool {
        self.0.borrow_mut().now += 1;
        waited < 3
    }

    fn memory_lost(&self) {
        self.0.borrow_mut().lost += 1;
    }
}

/// Memory of this process.
#[derive(Clone, Debug)]
pub struct Plain(Rc<Block>);

#[derive(Debug)]
struct Block {
    words: Vec<Word>,
    address: u64,
    /// The regions of the device.
    regions: Rc<RefCell<BTreeMap<u32, u64>>>,
}

impl Drop for Block {
    fn drop(&mut self) {
        let end = self.address + 8 * self.words.len() as u64;
        let early = self.regions.borrow().values().any(|at| (self.address..end).contains(at));
        assert!(!early || std::thread::panicking(), "memory is freed that the device still has");
    }
}

impl Memory for Plain {
    fn words(&self) -> &[Word] {
        &self.0.words
    }
}

impl Dma for Plain {
    fn page_shift(&self) -> u8 {
        0
    }

    fn address(&self, offset: usize) -> u64 {
        self.0.address + offset as u64
    }
}
