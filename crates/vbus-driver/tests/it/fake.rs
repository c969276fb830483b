//! A function that does whatever a test wants: registers that can be set, commands that succeed
//! with any value.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use vbus_driver::{Dma, Doorbell, Hal, NoMemory};
use vbus_shm::Memory;
use vbus_shm::abi::{capability, reg};
use vbus_shm::sync::Word;

/// See the module. Clones are the same function.
#[derive(Clone)]
pub struct Fake(Rc<RefCell<Registers>>);

#[derive(Default)]
struct Registers {
    config: BTreeMap<u16, u32>,
    bar: BTreeMap<u64, u32>,
    /// What each read of a register gives in turn, before `bar` does.
    script: BTreeMap<u64, Vec<u32>>,
    memory: Vec<Plain>,
    rung: u32,
    /// Kinds of doorbell that can be rung, with what each costs, in nanoseconds, one ring after
    /// another; the last goes on.
    kinds: BTreeMap<u8, Vec<u64>>,
    /// What was rung by kind and place.
    rings: Vec<(u8, u64)>,
    now: u64,
    /// Writes to `bar` that are on their way: the bus posts them, and a read drives them home.
    posted: Vec<u64>,
    /// Where writes have arrived, in order.
    written: Vec<u64>,
}

impl Default for Fake {
    /// A NIC, as an honest device would be.
    fn default() -> Self {
        let mut registers = Registers::default();
        registers.config.extend([(0, 0x10f5_1af4), (4, 1 << 20), (0x34, 0x40)]);
        // Vendor-specific, the last, 16 bytes, version 1; registers at 0; MMIO doorbells 4 apart at
        // 0x1000.
        registers.config.extend([
            (0x40, 0x0110_0009),
            (0x44, 0),
            (0x48, 0x0004_0001),
            (0x4c, 0x1000),
        ]);
        registers.bar.extend([
            (reg::MAGIC, reg::MAGIC_VALUE),
            (reg::ABI, 0x0001_0001),
            (reg::CLASS, 1),
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
    /// Makes a kind of doorbell one that can be rung, at this cost.
    pub fn set_cost(&self, kind: u8, nanoseconds: &[u64]) {
        self.0.borrow_mut().kinds.insert(kind, nanoseconds.to_vec());
    }

    /// Puts these records into the capability.
    pub fn set_records(&self, records: &[Doorbell]) {
        let bytes = u32::from(capability::HEADER_BYTES) + 8 * records.len() as u32;
        self.set_config(0x40, 0x0100_0009 | bytes << 16);
        for (at, record) in (0x48..).step_by(8).zip(records) {
            self.set_config(at, u32::from(record.kind) | u32::from(record.stride) << 16);
            self.set_config(at + 4, record.base);
        }
    }

    /// What was rung since the last call.
    pub fn rings(&self) -> Vec<(u8, u64)> {
        std::mem::take(&mut self.0.borrow_mut().rings)
    }

    /// Sets four bytes of the configuration space.
    pub fn set_config(&self, offset: u16, value: u32) {
        self.0.borrow_mut().config.insert(offset, value);
    }

    /// Sets a register.
    pub fn set_register(&self, offset: u64, value: u32) {
        self.0.borrow_mut().bar.insert(offset, value);
    }

    /// Sets what the next reads of a register give.
    pub fn script(&self, offset: u64, values: &[u32]) {
        self.0.borrow_mut().script.insert(offset, values.to_vec());
    }

    /// The memory that was allocated, in order.
    pub fn memory(&self, n: usize) -> Plain {
        self.0.borrow().memory[n].clone()
    }

    /// Where writes have had their effect, in order.
    pub fn written(&self) -> Vec<u64> {
        self.0.borrow().written.clone()
    }

    /// Doorbells rung.
    pub fn rung(&self) -> u32 {
        self.0.borrow().rung
    }
}

impl std::fmt::Debug for Fake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Fake")
    }
}

impl Hal for Fake {
    type Dma = Plain;

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

    fn write32(&self, offset: u64, _value: u32) {
        self.0.borrow_mut().posted.push(offset);
    }

    fn write64(&self, _offset: u64, _value: u64) {}

    fn alloc(&self, bytes: usize) -> Result<Plain, NoMemory> {
        let words: Vec<Word> =
            (0..bytes.next_multiple_of(4096) / 8).map(|_| Word::new(0)).collect();
        let memory = Plain(words.into());
        self.0.borrow_mut().memory.push(memory.clone());
        Ok(memory)
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
}

/// Memory of this process.
#[derive(Clone, Debug)]
pub struct Plain(Rc<[Word]>);

impl Memory for Plain {
    fn words(&self) -> &[Word] {
        &self.0
    }
}

impl Dma for Plain {
    fn page_shift(&self) -> u8 {
        0
    }

    fn address(&self, offset: usize) -> u64 {
        0x1000 + offset as u64
    }
}
