// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Each rule that a driver can break, in both formats. The queue says which, once, and is retired.

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vbus_core::memory::PAGE;
use vbus_core::shm::signal::Armed;
use vbus_core::{Access, MemoryContext, View};
use vbus_virtio::queue::{
    BadLayout, Chain, Format, Layout, PARTS_MAX, Part, Queue, RingFeatures, SIZE_MAX, Violation,
};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

pub const DESCRIPTORS: u64 = 0;
pub const DRIVER_AREA: u64 = 8 * PAGE;
pub const DEVICE_AREA: u64 = 9 * PAGE;
const TABLE: u64 = 16 * PAGE;
const END: u64 = 32 * PAGE;

/// The most bytes of an indirect table.
const TABLE_MAX: u32 = 16 * 1024;

const _: () = assert!(PARTS_MAX * 16 == TABLE_MAX as usize);

pub fn memory() -> MemoryContext {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, END).unwrap();
    let memory = MemoryContext::new();
    memory.map(0, END, Some((file, 0)), Access::BOTH).unwrap();
    memory
}

pub fn layout(format: Format, size: u16) -> Layout {
    let (descriptors, driver_area, device_area) = (DESCRIPTORS, DRIVER_AREA, DEVICE_AREA);
    Layout { format, size, descriptors, driver_area, device_area }
}

/// A descriptor: address, length, flags, and the next one (split) or the buffer id (packed).
pub type Descriptor = (u64, u32, u16, u16);

fn write_table(view: &View, at: u64, descriptors: &[Descriptor]) {
    for (i, (addr, len, flags, next)) in descriptors.iter().enumerate() {
        let at = at + 16 * i as u64;
        view.write(at, &addr.to_le_bytes()).unwrap();
        view.write(at + 8, &len.to_le_bytes()).unwrap();
        view.write(at + 12, &flags.to_le_bytes()).unwrap();
        view.write(at + 14, &next.to_le_bytes()).unwrap();
    }
}

/// Writes the descriptors from the queue's first place on, and makes them available: the first one
/// as the head of a chain (split), all of them in the first lap (packed).
pub fn offer(view: &View, format: Format, descriptors: &[Descriptor]) {
    match format {
        Format::Split => {
            write_table(view, DESCRIPTORS, descriptors);
            view.write(DRIVER_AREA, &[0, 0, 1, 0, 0, 0]).unwrap();
        }
        Format::Packed => {
            // A packed descriptor has the id before the flags.
            let swap = |&(addr, len, flags, id): &Descriptor| (addr, len, id, flags | 0x80);
            let descriptors: Vec<_> = descriptors.iter().map(swap).collect();
            write_table(view, DESCRIPTORS, &descriptors);
        }
    }
}

const FEATURES: RingFeatures = RingFeatures { event_idx: true, indirect: true, in_order: false };

/// What a queue of 8 finds in these descriptors, and in this indirect table.
fn found(
    format: Format,
    features: RingFeatures,
    descriptors: &[Descriptor],
    table: &[Descriptor],
) -> Result<Chain, Violation> {
    let memory = memory();
    let view = memory.view();
    offer(&view, format, descriptors);
    write_table(&view, TABLE, table);
    let mut queue = Queue::new(layout(format, 8), features).unwrap();
    let mut turn = queue.turn(&view).unwrap();
    let mut chain = Chain::new();
    match turn.next(&mut chain) {
        Ok(taken) => {
            assert!(taken && chain.is_taken());
            Ok(chain)
        }
        Err(violation) => {
            assert!(!chain.is_taken() && chain.readable().is_empty());
            let nothing = turn.next(&mut chain);
            assert_eq!(nothing, Ok(false), "an error comes once");
            assert_eq!(turn.arm(), Armed::Waiting);
            assert!(!turn.flush().is_wanted());
            assert_eq!(queue.retired(), Some(violation));
            let mut turn = queue.turn(&view).unwrap();
            assert_eq!(turn.next(&mut chain), Ok(false));
            Err(violation)
        }
    }
}

#[track_caller]
fn refused(format: Format, descriptors: &[Descriptor], table: &[Descriptor], why: Violation) {
    assert_eq!(found(format, FEATURES, descriptors, table).err(), Some(why), "{format:?}");
}

const BOTH: [Format; 2] = [Format::Split, Format::Packed];

#[test]
fn a_chain_with_a_table_at_its_end_comes_whole() {
    for format in BOTH {
        let count = 2_u32;
        let descriptors = [(0x10, 1, NEXT, 1), (TABLE, 16 * count, INDIRECT | WRITE, 5)];
        let next = if format == Format::Split { NEXT } else { 0 };
        let table = [(0x20, 2, next, 1), (0x30, 3, WRITE, 0)];
        let chain = found(format, FEATURES, &descriptors, &table).unwrap();
        let part = |addr, len| Part { addr, len };
        assert_eq!(chain.readable(), [part(0x10, 1), part(0x20, 2)]);
        assert_eq!(chain.writable(), [part(0x30, 3)]);
        assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (3, 3));
        assert_eq!(chain.id(), Some(if format == Format::Split { 0 } else { 5 }));
    }
}

#[test]
fn parts_that_are_empty_or_wrap_around_are_refused() {
    for format in BOTH {
        refused(format, &[(0x10, 0, 0, 0)], &[], Violation::Empty);
        let (addr, len) = (u64::MAX - 7, 8);
        refused(format, &[(addr, len, 0, 0)], &[], Violation::Range { addr, len });
        refused(format, &[(addr, 16, INDIRECT, 0)], &[], Violation::Range { addr, len: 16 });
        assert!(found(format, FEATURES, &[(addr, 7, 0, 0)], &[]).is_ok(), "it ends at the end");
    }
}

#[test]
fn readable_parts_come_first_and_all_have_less_than_4_gib() {
    for format in BOTH {
        let descriptors = [(0x10, 1, NEXT | WRITE, 1), (0x10, 1, 0, 0)];
        refused(format, &descriptors, &[], Violation::ReadableAfterWritable);
        let next = if format == Format::Split { NEXT } else { 0 };
        let table = [(0x10, 1, next | WRITE, 1), (0x10, 1, 0, 0)];
        let indirect = [(TABLE, 32, INDIRECT, 0)];
        refused(format, &indirect, &table, Violation::ReadableAfterWritable);
        let descriptors = [(0x10, 1 << 31, NEXT, 1), (0x10, 1 << 31, WRITE, 0)];
        refused(format, &descriptors, &[], Violation::Total);
    }
}

#[test]
fn tables_are_as_the_standard_says() {
    for format in BOTH {
        let without = RingFeatures { indirect: false, ..FEATURES };
        let one = [(TABLE, 16, INDIRECT, 0)];
        let table = [(0x10, 1, 0, 0)];
        let violation = found(format, without, &one, &table).unwrap_err();
        assert_eq!(violation, Violation::IndirectNotNegotiated);
        assert!(found(format, FEATURES, &one, &table).is_ok());

        let next = [(TABLE, 16, INDIRECT | NEXT, 1), (0x10, 1, 0, 0)];
        refused(format, &next, &table, Violation::IndirectNext);
        refused(format, &one, &[(TABLE, 16, INDIRECT, 0)], Violation::IndirectInIndirect);
        for len in [0, 1, 15, 24, TABLE_MAX + 16, u32::MAX] {
            let bad = [(TABLE, len, INDIRECT, 0)];
            refused(format, &bad, &table, Violation::IndirectLength(len));
        }
        refused(format, &[(END - 16, 32, INDIRECT, 0)], &[], Violation::IndirectUnmapped);
    }
    let two = [(TABLE, 32, INDIRECT, 0)];
    let beyond = [(0x10, 1, NEXT, 2), (0x10, 1, 0, 0)];
    refused(Format::Split, &two, &beyond, Violation::Descriptor { number: 2, size: 2 });
    let ring = [(0x10, 1, NEXT, 1), (0x10, 1, NEXT, 0)];
    refused(Format::Split, &two, &ring, Violation::Loop(2));
    // A packed queue's table has no links, and no flags but WRITE.
    let chain = found(Format::Packed, FEATURES, &two, &ring).unwrap();
    assert_eq!(chain.readable().len(), 2);
}

#[test]
fn a_chain_has_at_most_so_many_parts() {
    for format in BOTH {
        let link = if format == Format::Split { NEXT } else { 0 };
        let mut table: Vec<Descriptor> =
            (1..=u16::try_from(PARTS_MAX).unwrap()).map(|next| (0x10, 1, link, next)).collect();
        table.last_mut().unwrap().2 = 0;
        let bytes = TABLE_MAX;
        let chain = found(format, FEATURES, &[(TABLE, bytes, INDIRECT, 0)], &table).unwrap();
        assert_eq!(chain.readable().len(), PARTS_MAX);
        let more = [(0x10, 1, NEXT, 1), (TABLE, bytes, INDIRECT, 0)];
        refused(format, &more, &table, Violation::Parts);
    }
}

#[test]
fn a_split_queue_checks_numbers_loops_and_its_index() {
    let size = 8;
    let beyond = [(0x10, 1, NEXT, size)];
    let number = size;
    let why = Violation::Descriptor { number, size: 8 };
    refused(Format::Split, &beyond, &[], why);
    refused(Format::Split, &[(0x10, 1, NEXT, 0)], &[], Violation::Loop(8));

    let memory = memory();
    let view = memory.view();
    let start = |index: u16, heads: &[u16]| {
        let mut queue = Queue::new(layout(Format::Split, 8), FEATURES).unwrap();
        view.write(DESCRIPTORS, &[0x11; 8]).unwrap();
        write_table(&view, DESCRIPTORS, &[(0x10, 1, 0, 0); 8]);
        view.write(DRIVER_AREA + 2, &index.to_le_bytes()).unwrap();
        for (i, head) in heads.iter().enumerate() {
            view.write(DRIVER_AREA + 4 + 2 * i as u64, &head.to_le_bytes()).unwrap();
        }
        let mut turn = queue.turn(&view).unwrap();
        let mut taken = Vec::new();
        loop {
            let mut chain = Chain::new();
            match turn.next(&mut chain) {
                Ok(true) => taken.push(chain),
                Ok(false) => break (taken.len(), None, queue),
                Err(violation) => break (taken.len(), Some(violation), queue),
            }
        }
    };
    let heads = [7, 6, 5, 4, 3, 2, 1, 0];
    assert!(matches!(start(8, &heads), (8, None, _)));
    for index in [9, 0x8000, 0xffff] {
        let why = Violation::Index { index, used: 0, size };
        let (taken, violation, _) = start(index, &heads);
        assert_eq!((taken, violation), (0, Some(why)));
    }
    let (taken, violation, _) = start(2, &[8, 0]);
    assert_eq!((taken, violation), (0, Some(Violation::Descriptor { number: 8, size: 8 })));
    let (taken, violation, _) = start(3, &[1, 2, 1]);
    assert_eq!((taken, violation), (2, Some(Violation::InFlight(1))));

    // An index that goes on while all is in flight, and one that goes back.
    for index in [9_u16, 7] {
        let (_, _, mut queue) = start(8, &heads);
        view.write(DRIVER_AREA + 2, &index.to_le_bytes()).unwrap();
        let violation = queue.turn(&view).unwrap().next(&mut Chain::new());
        assert_eq!(violation, Err(Violation::Index { index, used: 0, size }));
    }
}

#[test]
fn a_packed_queue_gives_out_no_more_than_it_has() {
    let memory = memory();
    let view = memory.view();
    // A chain without an end.
    let mut queue = Queue::new(layout(Format::Packed, 3), FEATURES).unwrap();
    offer(&view, Format::Packed, &[(0x10, 1, NEXT, 0); 3]);
    let violation = queue.turn(&view).unwrap().next(&mut Chain::new());
    assert_eq!(violation, Err(Violation::Overfull));

    // Descriptors that become available again while they are in flight.
    let mut queue = Queue::new(layout(Format::Packed, 3), FEATURES).unwrap();
    offer(&view, Format::Packed, &[(0x10, 1, 0, 0); 3]);
    let mut chains = [const { Chain::new() }; 4];
    let mut turn = queue.turn(&view).unwrap();
    for chain in &mut chains[..3] {
        assert_eq!(turn.next(chain), Ok(true));
    }
    assert_eq!(turn.next(&mut chains[3]), Ok(false));
    // Available in the second lap.
    view.write(DESCRIPTORS + 14, &0x8000_u16.to_le_bytes()).unwrap();
    assert_eq!(turn.next(&mut chains[3]), Err(Violation::Overfull));
    // What the device still has comes back to nobody.
    for chain in &mut chains {
        turn.complete(chain, 1);
    }
    assert!(!turn.flush().is_wanted());
    let mut flags = [0; 2];
    view.read(DESCRIPTORS + 14, &mut flags).unwrap();
    assert_eq!(flags, [0, 0x80], "a retired queue writes nothing");
    assert_eq!(queue.held(), 0);
}

#[test]
fn the_copy_counts() {
    for format in BOTH {
        let memory = memory();
        let view = memory.view();
        let mut queue = Queue::new(layout(format, 8), FEATURES).unwrap();
        offer(&view, format, &[(0x10, 1, NEXT, 1), (0x20, 2, WRITE, 0)]);
        let mut chain = Chain::new();
        let mut turn = queue.turn(&view).unwrap();
        assert_eq!(turn.next(&mut chain), Ok(true));
        view.write(DESCRIPTORS, &[0xff; 32]).unwrap();
        assert_eq!(chain.readable(), [Part { addr: 0x10, len: 1 }]);
        assert_eq!(chain.writable(), [Part { addr: 0x20, len: 2 }]);
        turn.complete(&mut chain, 2);
        assert!(turn.flush().is_wanted(), "the driver's event index is 0");
        match format {
            Format::Split => {
                let mut used = [0; 12];
                view.read(DEVICE_AREA, &mut used).unwrap();
                assert_eq!(used, [0, 0, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
            }
            Format::Packed => {
                let mut used = [0; 8];
                view.read(DESCRIPTORS + 8, &mut used).unwrap();
                assert_eq!(used, [2, 0, 0, 0, 0, 0, 0x82, 0x80], "{used:x?}");
            }
        }
    }
}

#[test]
fn layouts_are_checked() {
    let bad = |layout: Layout| Queue::new(layout, RingFeatures::default()).unwrap_err();
    for size in [0, 3, 12, SIZE_MAX + 1, u16::MAX] {
        assert_eq!(bad(layout(Format::Split, size)), BadLayout::Size(size));
    }
    for size in [0, SIZE_MAX + 1] {
        assert_eq!(bad(layout(Format::Packed, size)), BadLayout::Size(size));
    }
    for format in BOTH {
        let good = layout(format, 8);
        let misaligned = |layout| matches!(bad(layout), BadLayout::Alignment { .. });
        assert!(misaligned(Layout { descriptors: 8, ..good }));
        assert!(misaligned(Layout { driver_area: 1, ..good }));
        assert!(misaligned(Layout { device_area: 2, ..good }));
        let high = Layout { descriptors: u64::MAX - 15, ..good };
        assert!(matches!(bad(high), BadLayout::Range { .. }));
        assert!(Queue::new(Layout { size: SIZE_MAX, ..good }, RingFeatures::default()).is_ok());
    }
}
