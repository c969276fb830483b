// SPDX-License-Identifier: Apache-2.0 OR MIT
//! While the driver does nothing, what changes in its memory is what the device writes. The log of
//! written pages has each of these pages, and no other one but a used ring.

use std::collections::BTreeSet;

use serde_json::json;

use crate::driver::eventually;
use crate::nic::{CTRL_MAC, CTRL_RX, CTRL_VQ, Card, HEADER, INDIRECT_DESC, Lab, MACS, frame};

const PAGE: u64 = 4096;
/// Pages of the driver's memory that are looked at.
const PAGES: u64 = 256;

fn content(card: &Card) -> Vec<u8> {
    card.driver.memory.read(0, usize::try_from(PAGES * PAGE).unwrap())
}

/// The pages of which the log tells. It is empty afterwards.
fn logged(card: &Card) -> BTreeSet<u64> {
    let mut words = [0; (PAGES / 64) as usize];
    let memory = card.driver.endpoint.memory();
    memory.report_log(0, PAGES * PAGE, PAGE, &mut words).unwrap();
    (0..PAGES).filter(|page| words[(page / 64) as usize] & 1 << (page % 64) != 0).collect()
}

/// Lets the device of `card` work until `done`, and compares. Returns the pages beside those of the
/// used rings; that of `used` is among those.
fn compare(card: &mut Card, used: u64, mut done: impl FnMut(&mut Card) -> bool) -> BTreeSet<u64> {
    let before = content(card);
    assert_eq!(logged(card), BTreeSet::new(), "a device that stands still writes");
    card.driver.endpoint.resume();
    eventually("the device is done", || done(card).then_some(()));
    card.driver.endpoint.quiesce().unwrap();
    let after = content(card);
    let page = usize::try_from(PAGE).unwrap();
    let pairs = (0..).zip(before.chunks(page).zip(after.chunks(page)));
    let changed: BTreeSet<u64> = pairs.filter(|(_, (a, b))| a != b).map(|(n, _)| n).collect();
    // Each device that goes on says in its used rings whether it wants to be notified: that may be
    // what it said before.
    let rings = [&card.rx, &card.tx, card.control.as_ref().unwrap()];
    let rings: BTreeSet<u64> = rings.map(|queue| queue.device / PAGE).into();
    let logged = logged(card);
    assert!(logged.is_superset(&changed), "{changed:?} changed, {logged:?} are in the log");
    assert!(changed.contains(&(used / PAGE)), "the used ring is not among {changed:?}");
    let beside = &changed - &rings;
    assert_eq!(&logged - &rings, beside);
    beside
}

/// Frames into buffers of an indirect table, a reply of the control queue, and the used rings of
/// all three queues.
#[test]
fn the_log_has_the_pages_that_a_card_writes_and_no_other() {
    let lab = Lab::new();
    let features = CTRL_VQ | CTRL_RX | CTRL_MAC | INDIRECT_DESC;
    // A frame waits for a device that stands still.
    let settings = json!({ "backpressure-ms": 3_600_000 });
    let [mut first, mut card] = [0, 1].map(|number| lab.card(number, settings.clone(), features));
    // The reset of a driver's own start has been answered.
    assert_eq!(card.ask(&[0, 0, 1], 1), [0]);
    card.driver.endpoint.quiesce().unwrap();
    card.driver.endpoint.memory().start_log(&[]).unwrap();

    // A buffer over three pages, of which a frame of 200 bytes reaches two.
    let memory = &mut card.driver.memory;
    let header = memory.alloc(HEADER);
    let place = memory.alloc(3 * 4096);
    memory.write(header, &[0xee; HEADER]);
    memory.write(place, &[0xee; 3 * 4096]);
    let room = u32::try_from(HEADER).unwrap();
    let parts = [(header, room), (place + PAGE - 50, 100), (place + PAGE + 50, 4096)];
    card.rx.add_table(memory, &parts, true);
    card.driver.notify(&card.rx);
    first.offer(&[0; HEADER], &frame(MACS[1], MACS[0], 186));
    let used = card.rx.device;
    let changed = compare(&mut card, used, |card| card.rx.used(&card.driver.memory).is_some());
    let [header, place] = [header, place].map(|addr| addr / PAGE);
    assert_eq!(changed, BTreeSet::from([header, place, place + 1]));

    // A command and its reply are in pages of their own.
    let memory = &mut card.driver.memory;
    let command = memory.alloc(3);
    let reply = memory.alloc(1);
    memory.write(command, &[0, 0, 0]);
    memory.write(reply, &[0xff]);
    let queue = card.control.as_mut().unwrap();
    queue.add(memory, &[(command, 3, false), (reply, 1, true)]);
    card.driver.notify(queue);
    let used = queue.device;
    let done = |card: &mut Card| {
        let Card { control, driver, .. } = card;
        control.as_mut().unwrap().used(&driver.memory).is_some()
    };
    assert_eq!(compare(&mut card, used, done), BTreeSet::from([reply / PAGE]));

    // A frame that is sent, from an indirect table: of the driver's memory only the ring changes.
    first.post(2048, false);
    let memory = &mut card.driver.memory;
    let bytes = [&[0; HEADER][..], &frame(MACS[0], MACS[1], 1000)].concat();
    let place = memory.alloc(bytes.len());
    memory.write(place, &bytes);
    let rest = u32::try_from(bytes.len()).unwrap() - room;
    card.tx.add_table(memory, &[(place, room), (place + u64::from(room), rest)], false);
    card.driver.notify(&card.tx);
    let used = card.tx.device;
    let changed = compare(&mut card, used, |card| card.tx.used(&card.driver.memory).is_some());
    assert_eq!(changed, BTreeSet::new());
}
