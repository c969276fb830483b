// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A writer, a reader and a waiter of a state page. No reader takes a torn value for a whole one,
//! and no waiter sleeps while a newer version is there.

use loom::thread;
use vbus_shm_model::signal::{Armed, end};
use vbus_shm_model::state::{Layout, Reader, Writer};
use vbus_shm_model::sync::{Edge, Fence, Place, live};

use crate::harness::{Kick, Shared, check, needs};

const NEAR_WRAP: u64 = (1 << 63) - 2;
/// Two words, so that a value can be torn.
const VALUE: usize = 16;

fn value(count: u64) -> [u8; VALUE] {
    let mut value = [0; VALUE];
    value[..8].copy_from_slice(&count.to_le_bytes());
    value[8..].copy_from_slice(&count.to_le_bytes());
    value
}

fn page() -> Shared {
    let layout = Layout::new(u32::try_from(VALUE).unwrap(), 4).unwrap();
    let memory = Shared::new(layout.words());
    layout.format(&memory, NEAR_WRAP).unwrap();
    memory
}

/// Reads once, while the writer writes `writes` values.
fn reading(writes: u64) {
    let memory = page();
    let mut writer = Writer::attach(memory.clone(), end::Driver).unwrap();
    let reader = Reader::attach(memory, end::Device).unwrap();
    let owner = thread::spawn(move || {
        for count in 1..=writes {
            let _ = writer.write(&value(count));
        }
    });
    read_once(&reader);
    owner.join().unwrap();
}

fn read_once(reader: &Reader<Shared, end::Device>) {
    let mut out = [0; VALUE];
    if let Ok(version) = reader.read(&mut out) {
        assert_eq!(out, value(version.wrapping_sub(NEAR_WRAP)), "version {version} is torn");
    }
}

/// Waits until it has read the last of `writes` values; versions never go back.
fn waiting(writes: u64) {
    let memory = page();
    let mut writer = Writer::attach(memory.clone(), end::Device).unwrap();
    let mut reader = Reader::attach(memory, end::Driver).unwrap();
    let kick = Kick::new();
    let owner = thread::spawn({
        let kick = kick.clone();
        move || {
            for count in 1..=writes {
                if writer.write(&value(count)).is_wanted() {
                    kick.kick();
                }
            }
        }
    });
    wait_for(&mut reader, writes, &kick);
    owner.join().unwrap();
}

/// Reads each newer value until value number `writes` has come. Sleeps while there is none.
fn wait_for<E: end::End>(reader: &mut Reader<Shared, E>, writes: u64, kick: &Kick) {
    let mut out = [0; VALUE];
    let mut known = NEAR_WRAP;
    while known != NEAR_WRAP.wrapping_add(writes) {
        if let Some(version) = reader.read_if_newer(known, &mut out).unwrap() {
            assert!(
                version.wrapping_sub(known) <= writes,
                "version {version} is older than {known}"
            );
            assert_eq!(out, value(version.wrapping_sub(NEAR_WRAP)), "version {version} is torn");
            known = version;
        } else if reader.arm_newer(known) == Armed::Waiting {
            kick.wait();
        }
    }
}

#[test]
fn reads_whole_values() {
    check(4, || reading(5));
}

#[test]
fn waits_for_the_last_value() {
    check(4, || waiting(3));
}

#[test]
fn reader_and_waiter_together() {
    check(3, || {
        let memory = page();
        let mut writer = Writer::attach(memory.clone(), end::Driver).unwrap();
        let reader = Reader::attach(memory.clone(), end::Device).unwrap();
        let mut waiter = Reader::attach(memory, end::Device).unwrap();
        let kick = Kick::new();
        let owner = thread::spawn({
            let kick = kick.clone();
            move || {
                for count in 1..=2 {
                    if writer.write(&value(count)).is_wanted() {
                        kick.kick();
                    }
                }
            }
        });
        let other = thread::spawn(move || {
            let mut out = [0; VALUE];
            let version = reader.read(&mut out).unwrap();
            assert_eq!(out, value(version.wrapping_sub(NEAR_WRAP)), "version {version} is torn");
        });
        let mut known = NEAR_WRAP;
        while known != NEAR_WRAP.wrapping_add(2) {
            let mut out = [0; VALUE];
            match waiter.read_if_newer(known, &mut out).unwrap() {
                Some(version) => known = version,
                None if waiter.arm_newer(known) == Armed::Waiting => kick.wait(),
                None => {}
            }
        }
        owner.join().unwrap();
        other.join().unwrap();
    });
}

/// An owner of the page ends before its access or fence number `accesses`. Another owner resumes
/// the page and goes on until `writes` values are written.
fn mortal_owner(memory: Shared, writes: u64, accesses: u32, kick: &Kick) {
    let go_on = |mut writer: Writer<Shared, end::Driver>| {
        while writer.version() != NEAR_WRAP.wrapping_add(writes) {
            let next = writer.version().wrapping_sub(NEAR_WRAP) + 1;
            if writer.write(&value(next)).is_wanted() {
                kick.kick();
            }
        }
    };
    let first = Writer::attach(memory.clone(), end::Driver).unwrap();
    if live(accesses, || go_on(first)).is_none() {
        let (second, wanted) = Writer::resume(memory, end::Driver).unwrap();
        if wanted.is_wanted() {
            kick.kick();
        }
        go_on(second);
    }
}

/// Waits for the last of `writes` values, of an owner that ends and is resumed.
fn waiting_for_mortals(writes: u64, accesses: u32) {
    let memory = page();
    let mut reader = Reader::attach(memory.clone(), end::Device).unwrap();
    let kick = Kick::new();
    let owner = thread::spawn({
        let kick = kick.clone();
        move || mortal_owner(memory, writes, accesses, &kick)
    });
    wait_for(&mut reader, writes, &kick);
    owner.join().unwrap();
}

/// Reads once, while an owner ends and another one goes on.
fn reading_of_mortals(writes: u64, accesses: u32) {
    let memory = page();
    let reader = Reader::attach(memory.clone(), end::Device).unwrap();
    let owner = thread::spawn(move || mortal_owner(memory, writes, accesses, &Kick::new()));
    read_once(&reader);
    owner.join().unwrap();
}

/// The accesses and fences of one write: two words of the value, `seq`, the fence, `arm`.
const WRITE: u32 = 5;

#[test]
fn another_owner_resumes_one_that_ended_before_any_access() {
    for accesses in 0..=2 * WRITE {
        check(2, move || waiting_for_mortals(2, accesses));
    }
    for accesses in 0..=5 * WRITE {
        check(2, move || reading_of_mortals(5, accesses));
    }
}

/// The owner ends between the store of `seq` and the fence of its post.
#[test]
fn resuming_a_page_needs_its_fence() {
    let fence = [Place::Fence(Fence::Resume)];
    needs(&fence, 2, || waiting_for_mortals(1, 3));
    needs(&fence, 3, || reading_of_mortals(5, 2 * WRITE + 3));
}

#[test]
fn reading_needs_each_place() {
    let places = [
        Place::Fence(Fence::Post),
        Place::Fence(Fence::Read),
        Place::Publish(Edge::Seq),
        Place::Observe(Edge::Seq),
    ];
    needs(&places, 3, || reading(5));
}

#[test]
fn waiting_needs_each_place() {
    let places = [
        Place::Fence(Fence::Post),
        Place::Fence(Fence::Arm),
        Place::Publish(Edge::Seq),
        Place::Observe(Edge::Seq),
    ];
    needs(&places, 2, || waiting(2));
}
