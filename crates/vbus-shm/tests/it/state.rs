// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compares a state page with a plain cell, and tests it with a peer that writes anything anywhere.

use proptest::prelude::*;
use vbus_shm::signal::Armed;
use vbus_shm::signal::end::{Device, Driver, End};
use vbus_shm::state::{BadStatePage, Layout, Reader, Writer};
use vbus_shm::sync::{Ordering, Word};

use crate::ring::start;

#[derive(Clone, Debug)]
enum Op {
    Write(Vec<u8>),
    Read(usize),
    ReadIfNewer,
    Arm,
    Disarm,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => prop::collection::vec(any::<u8>(), 0..150).prop_map(Op::Write),
        2 => (0..150_usize).prop_map(Op::Read),
        1 => Just(Op::ReadIfNewer),
        1 => Just(Op::Arm),
        1 => Just(Op::Disarm),
    ]
}

fn layout() -> impl Strategy<Value = Layout> {
    (1..=130_u32, 2..=4_u32).prop_map(|(bytes, log)| Layout::new(bytes, 1 << log).unwrap())
}

fn is_a_cell<E: End>(
    owner: E,
    layout: Layout,
    start: u64,
    ops: Vec<Op>,
) -> Result<(), TestCaseError> {
    let memory: Vec<Word> = (0..layout.words()).map(|_| Word::new(0)).collect();
    layout.format(&&memory[..], start).unwrap();
    let mut writer = Writer::attach(&memory[..], owner).unwrap();
    let mut reader = Reader::attach(&memory[..], owner.peer()).unwrap();
    let (mut cell, mut version, mut known) = (vec![0; layout.value_bytes()], start, start);
    let mut armed = None;
    for op in ops {
        match op {
            Op::Write(value) => {
                let kick = writer.write(&value).is_wanted();
                prop_assert_eq!(kick, armed == Some(version));
                cell = value;
                cell.resize(layout.value_bytes(), 0);
                version = version.wrapping_add(1);
            }
            Op::Read(len) => {
                let mut out = vec![0xa5; len];
                prop_assert_eq!(reader.read(&mut out), Ok(version));
                let whole = len.min(cell.len());
                prop_assert_eq!(&out[..whole], &cell[..whole]);
                prop_assert!(out[whole..].iter().all(|&b| b == 0xa5));
                known = version;
            }
            Op::ReadIfNewer => {
                let mut out = vec![0; cell.len()];
                let read = reader.read_if_newer(known, &mut out);
                prop_assert_eq!(read, Ok((known != version).then_some(version)));
                if known != version {
                    prop_assert_eq!(&out, &cell);
                }
                known = version;
            }
            Op::Arm => {
                let expected = if known == version { Armed::Waiting } else { Armed::Missed };
                prop_assert_eq!(reader.arm_newer(known), expected);
                armed = Some(known);
            }
            Op::Disarm => {
                reader.disarm();
                armed = None;
            }
        }
        prop_assert_eq!((writer.version(), reader.version()), (version, version));
    }
    Ok(())
}

fn survives<E: End>(
    owner: E,
    layout: Layout,
    steps: Vec<(prop::sample::Index, u64, Op)>,
) -> Result<(), TestCaseError> {
    const GUARD: u64 = 0x5afe_5afe_5afe_5afe;
    let memory: Vec<Word> = (0..layout.words() + 16).map(|_| Word::new(GUARD)).collect();
    let region = &memory[8..8 + layout.words()];
    layout.format(&region, 0).unwrap();
    let mut writer = Writer::attach(region, owner).unwrap();
    let mut reader = Reader::attach(region, owner.peer()).unwrap();
    for (word, value, op) in steps {
        word.get(region).store(value, Ordering::Relaxed);
        let version = writer.version();
        match op {
            Op::Write(value) => drop(writer.write(&value)),
            Op::Read(len) => drop(reader.read(&mut vec![0; len])),
            Op::ReadIfNewer => drop(reader.read_if_newer(version, &mut [0; 200])),
            Op::Arm => drop(reader.arm_newer(version)),
            Op::Disarm => reader.disarm(),
        }
        prop_assert!(writer.version().wrapping_sub(version) <= 1);
        if let Ok((other, _)) = Writer::resume(region, owner) {
            prop_assert!(other.layout().words() <= region.len());
        }
        if let Ok(other) = Reader::attach(region, owner) {
            prop_assert!(other.layout().words() <= region.len());
        }
    }
    for guard in memory[..8].iter().chain(&memory[8 + layout.words()..]) {
        prop_assert_eq!(guard.load(Ordering::Relaxed), GUARD);
    }
    Ok(())
}

proptest! {
    #[test]
    fn a_page_of_either_owner_behaves_like_a_cell(
        layout in layout(),
        start in start(),
        ops in prop::collection::vec(op(), 0..100),
    ) {
        is_a_cell(Driver, layout, start, ops.clone())?;
        is_a_cell(Device, layout, start, ops)?;
    }

    #[test]
    fn a_page_survives_a_hostile_peer(
        layout in layout(),
        steps in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>(), op()), 1..100),
    ) {
        survives(Driver, layout, steps.clone())?;
        survives(Device, layout, steps)?;
    }

    #[test]
    fn any_header_is_refused_or_fits(
        header in prop::array::uniform2(prop_oneof![any::<u64>(), 0..64_u64]),
        words in 0..200_usize,
    ) {
        let memory: Vec<Word> = (0..words).map(|_| Word::new(0)).collect();
        for (word, value) in memory.iter().zip([vbus_shm::state::MAGIC].into_iter().chain(header)) {
            word.store(value, Ordering::Relaxed);
        }
        match Reader::attach(&memory[..], Driver) {
            Ok(reader) => prop_assert!(reader.layout().words() <= words),
            Err(error) => prop_assert!(error != BadStatePage::Magic),
        }
    }
}

/// The writer writes all slots during each try. The reader gives up after a bounded number of
/// tries.
#[test]
fn a_reader_gives_up_a_writer_that_never_stops() {
    use std::sync::atomic::AtomicBool;
    let layout = Layout::new(1 << 16, 4).unwrap();
    let memory: Vec<Word> = (0..layout.words()).map(|_| Word::new(0)).collect();
    layout.format(&&memory[..], 0).unwrap();
    let reader = Reader::attach(&memory[..], Driver).unwrap();
    let seq = &memory[(vbus_shm::state::SIGNAL_OFFSET + vbus_shm::signal::DEVICE_SEQ) / 8];
    let stop = AtomicBool::new(false);
    let overrun = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                seq.fetch_add(3, Ordering::Relaxed);
            }
        });
        let mut out = vec![0; 1 << 16];
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        let mut overrun = false;
        while !overrun && std::time::Instant::now() < deadline {
            overrun = reader.read(&mut out).is_err();
        }
        stop.store(true, Ordering::Relaxed);
        overrun
    });
    assert!(overrun);
}
