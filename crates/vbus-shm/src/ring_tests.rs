//! Tests of rings with both ends in one thread.

use super::*;

fn memory(layout: Layout) -> Vec<Word> {
    (0..layout.words()).map(|_| Word::new(0)).collect()
}

fn entry(n: u64) -> Entry {
    Entry { addr: n, len: 5, id: 6, flags: NEXT }
}

#[test]
fn layouts_are_whole_lines() {
    let bytes = |entries, returns| Layout::new(entries, returns).unwrap().bytes();
    assert_eq!(bytes(2, Returns::Counted), 448);
    assert_eq!(bytes(256, Returns::Counted), 384 + 4096);
    assert_eq!(bytes(256, Returns::Entries), 384 + 4096);
    for entries in [0, 1, 3, 65536, u32::MAX] {
        assert_eq!(Layout::new(entries, Returns::Counted), Err(BadRing::Entries));
    }
}

#[test]
fn entries_come_out_in_order_over_many_laps() {
    for start in [0, 3, u32::MAX - 5, u32::MAX] {
        let layout = Layout::new(4, Returns::Entries).unwrap();
        let memory = memory(layout);
        let mut driver = DriverEnd::create(&memory[..], layout, start).unwrap();
        let mut device = DeviceEnd::attach(&memory[..]).unwrap();
        assert_eq!((device.take(), driver.reap()), (Ok(None), Ok(None)));
        for n in 0..20 {
            assert_eq!(driver.submit(entry(n)), Ok(()));
            let _ = driver.post();
            assert_eq!(device.take(), Ok(Some(entry(n))));
            device.give_back(Entry { len: 9, ..entry(n) });
            let _ = device.post();
            assert_eq!(driver.reap(), Ok(Some(Entry { len: 9, ..entry(n) })));
        }
    }
}

#[test]
fn batches_do_what_single_calls_do() {
    for returns in [Returns::Entries, Returns::Counted] {
        let layout = Layout::new(8, returns).unwrap();
        let memory = memory(layout);
        let mut driver = DriverEnd::create(&memory[..], layout, u32::MAX - 2).unwrap();
        let mut device = DeviceEnd::attach(&memory[..]).unwrap();
        let mut numbers = 0..;
        for _ in 0..5 {
            let expected = numbers.start..numbers.start + 8;
            assert_eq!(driver.submit_all(numbers.by_ref().take(8).map(entry)), 8);
            assert_eq!(driver.submit_all([entry(0)]), 0, "it is full");
            assert_eq!(device.take(), Ok(Some(entry(expected.start))));
            let mut seen = vec![entry(expected.start)];
            let mut serve = |max| {
                device.serve(max, |entry| {
                    seen.push(entry);
                    Entry { len: 7, ..entry }
                })
            };
            assert_eq!((serve(5), serve(9), serve(9)), (Ok(5), Ok(2), Ok(0)));
            assert_eq!(seen, expected.clone().map(entry).collect::<Vec<_>>());
            assert_eq!(device.held(), 1);
            device.give_back(Entry { len: 7, ..entry(expected.start) });
            let _ = device.post();
            if returns == Returns::Counted {
                assert_eq!(driver.reap_count(), Ok(8));
                continue;
            }
            let mut back = Vec::new();
            assert_eq!(driver.reap_all(3, |entry| back.push(entry)), Ok(3));
            assert_eq!(driver.reap_all(9, |entry| back.push(entry)), Ok(5));
            // The one that was held came last.
            let order = (expected.start + 1..expected.end).chain([expected.start]);
            assert_eq!(back, order.map(|n| Entry { len: 7, ..entry(n) }).collect::<Vec<_>>());
        }
    }
}

#[test]
fn full_is_full_until_reaped() {
    let layout = Layout::new(4, Returns::Counted).unwrap();
    let memory = memory(layout);
    let mut driver = DriverEnd::create(&memory[..], layout, u32::MAX - 1).unwrap();
    let mut device = DeviceEnd::attach(&memory[..]).unwrap();
    for n in 0..4 {
        assert_eq!(driver.submit(entry(n)), Ok(()));
    }
    assert_eq!(driver.submit(entry(4)), Err(Full));
    for n in 0..4 {
        assert_eq!(device.take(), Ok(Some(entry(n))));
    }
    assert_eq!(device.take(), Ok(None));
    device.give_back(entry(0));
    assert_eq!(driver.reap_count(), Ok(0), "not posted yet");
    let _ = device.post();
    assert_eq!((driver.reap_count(), driver.space()), (Ok(1), 1));
    for _ in 0..10 {
        device.give_back(entry(0));
    }
    let _ = device.post();
    assert_eq!((device.held(), driver.reap_count()), (0, Ok(3)));
}

#[test]
fn an_entry_taken_before_its_post_does_not_kick() {
    let layout = Layout::new(4, Returns::Counted).unwrap();
    let memory = memory(layout);
    let mut driver = DriverEnd::create(&memory[..], layout, 0).unwrap();
    let mut device = DeviceEnd::attach(&memory[..]).unwrap();
    driver.submit(entry(1)).unwrap();
    assert_eq!(device.pending(), 0);
    assert!(device.take().unwrap().is_some());
    assert_eq!(device.pending(), 0, "taken before its post");
    assert_eq!(device.arm(0), Armed::Waiting);
    assert!(!driver.post(), "the device has it already");
    driver.submit(entry(2)).unwrap();
    assert!(driver.post());
    assert_eq!(device.pending(), 1);
}

#[test]
fn attach_checks_the_header() {
    let layout = Layout::new(8, Returns::Entries).unwrap();
    let memory = memory(layout);
    let attach = || DeviceEnd::attach(&memory[..]).map(|d| d.layout());
    assert_eq!(attach(), Err(BadRing::Magic));
    DriverEnd::create(&memory[..], layout, 0).unwrap();
    assert_eq!(attach(), Ok(layout));
    for (word, value, error) in [
        (HEADER_ENTRIES, 9, BadRing::Entries),
        (HEADER_ENTRIES, 1 << 32 | 8, BadRing::Entries),
        (HEADER_ENTRIES, 16, BadRing::TooSmall),
        (HEADER_RETURNS, 2, BadRing::Returns),
    ] {
        let before = memory[word].swap(value, Ordering::Relaxed);
        assert_eq!(attach(), Err(error));
        memory[word].store(before, Ordering::Relaxed);
    }
    assert_eq!(DeviceEnd::attach(&memory[..10]).unwrap_err(), BadRing::TooSmall);
    assert_eq!(DriverEnd::create(&memory[..10], layout, 0).unwrap_err(), BadRing::TooSmall);
}

#[test]
fn a_peer_that_sends_too_much_is_corrupt() {
    let layout = Layout::new(2, Returns::Entries).unwrap();
    let memory = memory(layout);
    let mut driver = DriverEnd::create(&memory[..], layout, 0).unwrap();
    let mut device = DeviceEnd::attach(&memory[..]).unwrap();
    driver.submit(entry(0)).unwrap();
    driver.submit(entry(1)).unwrap();
    assert!(device.take().unwrap().is_some() && device.take().unwrap().is_some());
    store(layout.slot(&memory, 2), layout.lap(2), entry(2));
    assert_eq!(device.take(), Err(Corrupt::Overfull));
    assert_eq!(device.serve(1, |entry| entry), Err(Corrupt::Overfull));
    assert_eq!(driver.reap(), Ok(None));
    for pos in 0..2 {
        store(layout.slot(&memory, pos), layout.lap(pos) | RETURN, entry(0));
        assert!(driver.reap().unwrap().is_some());
    }
    store(layout.slot(&memory, 2), layout.lap(2) | RETURN, entry(0));
    assert_eq!(driver.reap(), Err(Corrupt::Unasked));
    assert_eq!(driver.reap_all(1, |_| {}), Err(Corrupt::Unasked));
}

#[test]
fn a_count_of_more_than_was_given_is_corrupt() {
    let layout = Layout::new(2, Returns::Counted).unwrap();
    let memory = memory(layout);
    let mut driver = DriverEnd::create(&memory[..], layout, 0).unwrap();
    driver.submit(entry(0)).unwrap();
    for hostile in [2, u64::MAX, 1 << 31] {
        memory[(SIGNAL_OFFSET + signal::DEVICE_SEQ) / WORD].store(hostile, Ordering::Relaxed);
        assert_eq!(driver.reap_count(), Err(Corrupt::Unasked));
    }
}
