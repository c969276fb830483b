// SPDX-License-Identifier: Apache-2.0 OR MIT
//! With IN_ORDER, a run of buffers goes back by one used element, that of the last.

use vbus_core::View;
use vbus_virtio::queue::{Chain, Format, Queue, RingFeatures};

use crate::hostile::{DESCRIPTORS, DEVICE_AREA, DRIVER_AREA, layout, memory, offer};

const WRITE: u16 = 2;
const FEATURES: RingFeatures = RingFeatures { event_idx: false, indirect: false, in_order: true };

/// Takes three buffers of 4 bytes, with ids 0, 1 and 2, and completes them in the reverse order.
fn return_three(view: &View, format: Format, flags: u16, written: [u32; 3]) -> Queue {
    let mut queue = Queue::new(layout(format, 8), FEATURES).unwrap();
    let buffers = [0, 1, 2].map(|id| (0x10, 4, flags, id));
    offer(view, format, &buffers);
    if format == Format::Split {
        view.write(DRIVER_AREA + 2, &[3, 0, 0, 0, 1, 0, 2, 0]).unwrap();
    }
    let mut chains = [const { Chain::new() }; 3];
    let mut turn = queue.turn(view).unwrap();
    assert!(chains.iter_mut().all(|chain| turn.next(chain) == Ok(true)));
    for (chain, written) in chains.iter_mut().zip(written).rev() {
        turn.complete(chain, written);
    }
    assert!(turn.flush().is_wanted());
    queue
}

fn bytes<const N: usize>(view: &View, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    view.read(at, &mut bytes).unwrap();
    bytes
}

#[test]
fn buffers_that_are_wholly_used_go_back_by_one_element() {
    for (flags, written) in [(0, [0, 0, 0]), (WRITE, [4, 4, 2])] {
        let last = u8::try_from(written[2]).unwrap();
        let memory = memory();
        let view = memory.view();
        let queue = return_three(&view, Format::Split, flags, written);
        assert_eq!(queue.position().used, 3);
        let used = bytes(&view, DEVICE_AREA);
        assert_eq!(used, [0, 0, 3, 0, 2, 0, 0, 0, last, 0, 0, 0, 0, 0, 0, 0]);

        let memory = self::memory();
        let view = memory.view();
        let queue = return_three(&view, Format::Packed, flags, written);
        assert_eq!(queue.position().used, 3);
        let used = 0x80 | u8::from(last > 0) * 2;
        let first = bytes(&view, DESCRIPTORS + 8);
        assert_eq!(first, [last, 0, 0, 0, 2, 0, used, 0x80]);
        let second = bytes(&view, DESCRIPTORS + 16 + 8);
        assert_eq!(second, [4, 0, 0, 0, 1, 0, 0x80 | u8::try_from(flags).unwrap(), 0]);
    }
}

#[test]
fn a_buffer_that_is_used_in_part_has_an_element_of_its_own() {
    let memory = memory();
    let view = memory.view();
    return_three(&view, Format::Split, WRITE, [3, 4, 4]);
    let used = bytes(&view, DEVICE_AREA);
    assert_eq!(used, [0, 0, 3, 0, 0, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0]);
}
