// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Both ends of a ring and of a state page. The input writes to their memory between any two calls.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vbus_shm::ring::{DeviceEnd, DriverEnd, Entry, Layout, Return, Returns};
use vbus_shm::signal::end;
use vbus_shm::state::{self, Reader, Writer};
use vbus_shm::sync::{Ordering, Word};

/// Words of memory. The layout in them may claim any size.
const WORDS: usize = 128;

fuzz_target!(|input: &[u8]| {
    let Some((&[shape, start], steps)) = input.split_first_chunk::<2>() else { return };
    if shape & 1 == 0 { ring(shape >> 1, start, steps) } else { page(shape >> 1, start, steps) }
});

fn memory() -> Vec<Word> {
    (0..WORDS).map(|_| Word::new(0)).collect()
}

/// Positions that start shortly before or after the wrap-around.
fn position(start: u8) -> u64 {
    u64::from(start).wrapping_sub(128)
}

/// The steps of an input: a word of memory, what to write there, and what to do afterwards.
fn steps(input: &[u8]) -> impl Iterator<Item = (usize, u64, u8)> + '_ {
    input.chunks_exact(11).map(|step| {
        let mut value = [0; 8];
        value.copy_from_slice(&step[2..10]);
        // Choose the headers and signal blocks (48 words) more often than the rest.
        let word = if step[0] & 1 == 0 { step[1] % 48 } else { step[1] };
        (usize::from(word) % WORDS, u64::from_le_bytes(value), step[10])
    })
}

fn ring(shape: u8, start: u8, input: &[u8]) {
    let forms = [Returns::Counted, Returns::Entries, Returns::Runs];
    let returns = forms[usize::from(shape) % forms.len()];
    let Ok(layout) = Layout::new(2 << (shape >> 2 & 3), returns) else { return };
    let memory = memory();
    let Ok(mut driver) = DriverEnd::create(&memory[..], layout, position(start)) else { return };
    let Ok(mut device) = DeviceEnd::attach(&memory[..]) else { return };
    for (word, value, action) in steps(input) {
        if action & 1 == 0 {
            memory[word].store(value, Ordering::Relaxed);
        }
        let after = u32::from(action >> 6);
        match action >> 1 & 15 {
            0 | 1 => _ = driver.submit(Entry { addr: value, len: 1, id: 2, flags: 3 }),
            2 => _ = driver.post(),
            3 => _ = driver.arm(after),
            4 => driver.disarm(),
            5 => _ = driver.reap(),
            // A run that is reaped in part cannot be counted.
            6 if returns != Returns::Runs => _ = driver.reap_count(u32::MAX),
            6 => _ = driver.reap_all(after, |_| ()),
            7 | 8 => _ = device.take(),
            9 | 10 => device.give_back(Return { len: value as u32, id: 2, flags: 3 }),
            11 => _ = device.post(),
            12 => _ = device.arm(after),
            13 => device.disarm(),
            14 => {
                let entry = Entry { addr: value, len: 1, id: 2, flags: 3 };
                (0..2 * after).for_each(|_| _ = driver.submit(entry));
                _ = driver.post();
                while let Ok(Some(entry)) = device.take() {
                    device.give_back(entry.into());
                }
                _ = device.post();
                let before = driver.in_flight();
                let reaped = std::iter::from_fn(|| driver.reap().ok().flatten()).take(WORDS);
                assert!(reaped.count() <= before as usize);
            }
            _ => {
                if let Ok(other) = DeviceEnd::attach(&memory[..]) {
                    assert!(other.layout().words() <= WORDS);
                    device = other;
                }
                if let Ok((other, _)) = DeviceEnd::resume(&memory[..]) {
                    assert!(other.layout().words() <= WORDS);
                    device = other;
                }
            }
        }
        assert!(driver.in_flight() <= layout.entries());
        assert!(device.held() <= device.layout().entries());
    }
}

fn page(shape: u8, start: u8, input: &[u8]) {
    let Ok(layout) = state::Layout::new(u32::from(shape) + 1, 4) else { return };
    let memory = memory();
    if layout.format(&&memory[..], position(start)).is_err() {
        return;
    }
    let Ok(mut writer) = Writer::attach(&memory[..], end::Driver) else { return };
    let Ok(mut reader) = Reader::attach(&memory[..], end::Device) else { return };
    let mut out = [0; 256];
    for (word, value, action) in steps(input) {
        if action & 1 == 0 {
            memory[word].store(value, Ordering::Relaxed);
        }
        let len = usize::from(action);
        match action >> 1 & 7 {
            0 | 1 => _ = writer.write(&out[..len]),
            2 | 3 => _ = reader.read(&mut out[..len]),
            4 => _ = reader.read_if_newer(u64::from(action), &mut out),
            5 => _ = reader.arm_newer(writer.version()),
            6 => reader.disarm(),
            _ => {
                if let Ok(other) = Reader::attach(&memory[..], end::Device) {
                    assert!(other.layout().words() <= WORDS);
                    reader = other;
                }
                if let Ok(other) = Writer::attach(&memory[..], end::Driver) {
                    writer = other;
                }
            }
        }
    }
}
