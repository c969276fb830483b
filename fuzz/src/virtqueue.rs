// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device end of a virtqueue under a driver that writes anything. The input also has steps of a
//! driver that keeps to the rules, so that it gets beyond the first violation.

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vbus_core::memory::PAGE;
use vbus_core::shm::signal::Armed;
use vbus_core::{Access, MemoryContext, View};
use vbus_virtio::queue::{
    Chain, Format, InFlight, Layout, PARTS_MAX, Part, Position, Queue, RingFeatures, State,
    Violation, feature,
};

/// The driver's memory. Each page may be a map of its own.
const PAGES: u64 = 8;
/// Where the areas are. They reach into the next page if the queue is long.
const DESCRIPTORS: u64 = PAGE - 256;
const DRIVER_AREA: u64 = 3 * PAGE - 16;
const DEVICE_AREA: u64 = 5 * PAGE - 16;

/// A driver that knows how far it is.
struct Driver {
    format: Format,
    size: u16,
    index: u16,
    slot: u16,
    wrap: bool,
}

impl Driver {
    fn write(&self, view: &View, at: u64, bytes: &[u8]) {
        view.write(at, bytes).expect("the areas are mapped");
    }

    /// Writes a descriptor at `number` modulo the size.
    fn describe(&self, view: &View, number: u16, flags: u16, next: u16, value: u64) {
        let at = DESCRIPTORS + 16 * u64::from(number % self.size);
        // Often within the memory, so that tables are found.
        let addr = if value & 1 == 0 { value >> 8 & 0x7fff } else { value };
        let len = if value & 2 == 0 { value >> 24 & 0x1ff } else { value >> 24 };
        self.write(view, at, &addr.to_le_bytes());
        self.write(view, at + 8, &(len as u32).to_le_bytes());
        let (third, fourth) = match self.format {
            Format::Split => (flags, next % self.size.saturating_add(1)),
            Format::Packed => (next, flags),
        };
        self.write(view, at + 12, &third.to_le_bytes());
        self.write(view, at + 14, &fourth.to_le_bytes());
    }

    /// Makes a chain available: that of descriptor `head` (split), or the next descriptor.
    fn offer(&mut self, view: &View, head: u16, flags: u16, value: u64) {
        match self.format {
            Format::Split => {
                let at = DRIVER_AREA + 4 + 2 * u64::from(self.index % self.size);
                self.write(view, at, &(head % self.size).to_le_bytes());
                self.index = self.index.wrapping_add(1);
                self.write(view, DRIVER_AREA + 2, &self.index.to_le_bytes());
            }
            Format::Packed => {
                let lap = if self.wrap { 0x80 } else { 0x8000 };
                self.describe(view, self.slot, flags & 0x7f7f | lap, head, value);
                self.slot += 1;
                if self.slot == self.size {
                    (self.slot, self.wrap) = (0, !self.wrap);
                }
            }
        }
    }
}

/// What holds of each chain that a queue gives out.
fn check(chain: &Chain) {
    let (readable, writable) = (chain.readable(), chain.writable());
    assert!(chain.is_taken() && readable.len() + writable.len() <= PARTS_MAX);
    assert!(!readable.is_empty() || !writable.is_empty());
    let mut total = 0_u64;
    for Part { addr, len } in readable.iter().chain(writable) {
        assert!(*len > 0 && addr.checked_add(u64::from(*len)).is_some());
        total += u64::from(*len);
    }
    assert!(total <= u64::from(u32::MAX));
    assert_eq!(total, u64::from(chain.readable_bytes()) + u64::from(chain.writable_bytes()));
}

/// A state that somebody made up.
fn made_up(value: u64, flags: u8) -> State {
    let [a, b, c, d, id, slots, count, readable] = value.to_le_bytes();
    let position = Position {
        available: u16::from_le_bytes([a, b & 0x81]),
        used: u16::from_le_bytes([c, d & 0x81]),
        available_wrap: flags & 1 != 0,
        used_wrap: flags & 2 != 0,
    };
    let in_flight = |i: u8| InFlight {
        id: u16::from(id.wrapping_add(i)),
        slots: u16::from(slots % 4),
        parts: vec![Part { addr: value, len: u32::from(d) }; usize::from(readable % 4)],
        readable: usize::from(readable % 5),
        written: (flags & 4 != 0).then_some(value as u32),
    };
    State { position, in_flight: (0..count % 9).map(in_flight).collect() }
}

/// Runs an input: the queue's shape, and steps of 12 bytes.
pub fn run(format: Format, input: &[u8]) {
    let Some((&[shape, size], steps)) = input.split_first_chunk::<2>() else { return };
    let size = match format {
        Format::Split => 1 << (size % 8),
        Format::Packed => u16::from(size % 130) + 1,
    };
    let bits = [feature::EVENT_IDX, feature::INDIRECT_DESC, feature::IN_ORDER];
    let bits = (0..3).filter(|i| shape >> i & 1 != 0).fold(0, |all, i| all | bits[i]);
    let features = RingFeatures::of(bits);
    let memory = MemoryContext::new();
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a file");
    ftruncate(&file, PAGES * PAGE).expect("room");
    for page in 0..PAGES {
        let place = if shape & 8 == 0 { page } else { PAGES - 1 - page };
        let map = (file.try_clone().expect("a descriptor"), place * PAGE);
        memory.map(page * PAGE, PAGE, Some(map), Access::BOTH).expect("mapped");
    }
    let (descriptors, driver_area, device_area) = (DESCRIPTORS, DRIVER_AREA, DEVICE_AREA);
    let layout = Layout { format, size, descriptors, driver_area, device_area };
    let mut driver = Driver { format, size, index: 0, slot: 0, wrap: true };
    let mut queue = Queue::new(layout, features).expect("a good layout");
    let mut held: Vec<Chain> = Vec::new();
    for step in steps.chunks_exact(12) {
        let [action, kind, low, high, value @ ..] = step else { return };
        let value = u64::from_le_bytes(value.try_into().expect("8 bytes"));
        let number = u16::from_le_bytes([*low, *high]);
        let view = memory.view();
        let was_retired = queue.retired().is_some();
        let mut turn = queue.turn(&view).expect("the areas are mapped");
        match action % 16 {
            0 => {
                let (addr, len) = layout.ranges()[usize::from(kind % 3)];
                let at = addr + u64::from(number) % len;
                driver.write(&view, at, &value.to_le_bytes()[..1 << (kind >> 6)]);
            }
            1 | 2 => driver.describe(&view, number, u16::from(kind & 7), value as u16, value),
            3 => driver.offer(&view, number, u16::from(kind & 7), value),
            4 => driver.offer(&view, number, 0, value),
            5 => {
                // A descriptor of a table, anywhere.
                let at = u64::from(number) & 0x6ff8;
                driver.write(&view, at, &value.to_le_bytes());
            }
            6..=8 => {
                let mut chain = Chain::new();
                match turn.next(&mut chain) {
                    Ok(true) => {
                        check(&chain);
                        held.push(chain);
                    }
                    Ok(false) => assert!(!chain.is_taken()),
                    Err(_) => assert!(!was_retired, "an error comes once"),
                }
            }
            9 | 10 if !held.is_empty() => {
                let mut chain = held.remove(usize::from(number) % held.len());
                turn.complete(&mut chain, value as u32);
                assert!(!chain.is_taken());
            }
            11 => {
                let wanted = turn.flush().is_wanted();
                assert!(!(was_retired && wanted));
            }
            12 if kind & 1 == 0 => turn.disarm(),
            12 => {
                let armed = turn.arm();
                assert!(!was_retired || armed == Armed::Waiting);
            }
            13 => {
                if let Some(mut chain) = held.pop() {
                    if !turn.put_back(&mut chain) {
                        held.push(chain);
                    }
                }
            }
            14 => {
                turn.publish();
                if let Ok(state) = queue.state(&held) {
                    let (next, chains) =
                        Queue::resume(layout, features, &state).expect("a state that was taken");
                    assert_eq!(next.state(&chains).as_ref(), Ok(&state));
                    (queue, held) = (next, chains);
                }
            }
            15 if kind & 3 == 0 => turn.retire(Violation::Buffer),
            15 if kind & 3 == 1 => {
                if let Ok((next, chains)) =
                    Queue::resume(layout, features, &made_up(value, kind >> 2))
                {
                    chains.iter().for_each(check);
                    (queue, held) = (next, chains);
                }
            }
            15 => {
                // The driver resets the queue.
                queue = Queue::new(layout, features).expect("a good layout");
                held.clear();
                for (addr, len) in layout.ranges() {
                    driver.write(&view, addr, &vec![0; len as usize]);
                }
                driver = Driver { format, size, index: 0, slot: 0, wrap: true };
            }
            _ => {}
        }
        assert_eq!(held.len(), usize::from(queue.held()));
        assert!(held.len() <= usize::from(size));
    }
}
