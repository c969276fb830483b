//! The page by itself, one end after the other.

use super::*;

fn memory() -> [Word; PAGE_BYTES / WORD] {
    core::array::from_fn(|_| Word::new(0))
}

type Page<'a> = (DriverEnd<&'a [Word]>, DeviceEnd<&'a [Word]>);

fn page(memory: &[Word], lines: u16, nesting: Nesting) -> Page<'_> {
    let driver = DriverEnd::create(memory, lines, nesting).unwrap();
    (driver, DeviceEnd::attach(memory).unwrap())
}

#[test]
fn a_page_has_to_be_one() {
    let memory = memory();
    assert_eq!(DeviceEnd::attach(&memory[..]).unwrap_err(), BadPage::Magic);
    assert_eq!(DriverEnd::create(&memory[1..], 8, Nesting::Flat).unwrap_err(), BadPage::TooSmall);
    for lines in [0, 257, u16::MAX] {
        assert_eq!(
            DriverEnd::create(&memory[..], lines, Nesting::Flat).unwrap_err(),
            BadPage::Lines
        );
    }
    let (_, device) = page(&memory, 256, Nesting::Flat);
    assert_eq!(device.lines(), 256);
    assert_eq!(DeviceEnd::attach(&memory[..31]).unwrap_err(), BadPage::TooSmall);
    memory[LINES / WORD].store(1 << 40 | 8, Ordering::Relaxed);
    assert_eq!(DeviceEnd::attach(&memory[..]).unwrap_err(), BadPage::Lines);
}

#[test]
fn one_message_brings_all_in_by_priority() {
    for nesting in [Nesting::Flat, Nesting::Nested] {
        let memory = memory();
        let (mut driver, device) = page(&memory, 200, nesting);
        assert!(!device.raise(3), "nothing is wanted yet");
        assert_eq!(driver.arm(), Wanted::Pending);
        assert_eq!(driver.take(), Some(3));
        driver.end(3);
        assert_eq!(driver.take(), None);
        assert!(device.raise(70), "idle");
        let more = [5, 199, 70, 64, 5].map(|line| device.raise(line));
        assert_eq!(more, [false; 5], "the message is on its way");
        for line in [199, 70, 64, 5] {
            assert_eq!(driver.take(), Some(line));
            driver.end(line);
        }
        assert_eq!(driver.take(), None);
        assert!(device.raise(0));
        assert!(!device.raise(200), "no such line");
    }
}

#[test]
fn urgent_lines_interrupt_others_only_if_nested() {
    for nesting in [Nesting::Flat, Nesting::Nested] {
        let memory = memory();
        let (mut driver, device) = page(&memory, 16, nesting);
        assert_eq!(driver.arm(), Wanted::Waiting);
        assert!(device.raise(5));
        assert_eq!(driver.take(), Some(5));
        assert!(!device.raise(5), "in service: pending again, and not more urgent than itself");
        assert!(!device.raise(2));
        assert_eq!(device.raise(9), nesting == Nesting::Nested);
        assert!(!device.raise(12), "one message");
        // The nested handler, or for flat ones a handler that looks again by itself.
        assert_eq!(driver.take(), Some(12));
        assert_eq!(memory[IN_SERVICE / WORD].load(Ordering::Relaxed), 1 << 5 | 1 << 12);
        driver.end(12);
        assert_eq!(driver.take(), Some(9));
        driver.end(9);
        assert_eq!(driver.take(), None, "the others wait for the end of 5");
        assert!(!device.raise(4));
        driver.end(5);
        for line in [5, 4, 2] {
            assert_eq!(driver.take(), Some(line));
            driver.end(line);
        }
        assert_eq!(driver.take(), None);
    }
}

#[test]
fn a_masked_line_waits_and_sends_nothing() {
    let memory = memory();
    let (mut driver, device) = page(&memory, 8, Nesting::Nested);
    driver.mask(3);
    assert_eq!(driver.arm(), Wanted::Waiting);
    assert!(!device.raise(3));
    assert_eq!(driver.take(), None);
    assert_eq!(driver.unmask(3), Wanted::Pending);
    assert_eq!(driver.take(), Some(3));
    driver.end(3);
    assert_eq!((driver.take(), driver.unmask(3)), (None, Wanted::Waiting));
    assert!(device.raise(3));
    // Bad numbers are nothing.
    driver.mask(8);
    assert_eq!(driver.unmask(u16::MAX), Wanted::Waiting);
    driver.end(300);
    assert_eq!(driver.take(), Some(3));
}

#[test]
fn a_line_taken_back_is_taken_once() {
    let memory = memory();
    let (mut driver, device) = page(&memory, 8, Nesting::Nested);
    let _ = driver.arm();
    assert!(device.raise(6));
    assert!(device.take_back(6));
    assert!(!device.take_back(6) && !device.take_back(8));
    assert_eq!(driver.take(), None);
    assert!(device.raise(6), "the message before is used up");
}

#[test]
fn polling_costs_no_message() {
    let memory = memory();
    let (mut driver, device) = page(&memory, 8, Nesting::Flat);
    let _ = driver.arm();
    driver.disarm();
    assert!(!device.raise(7));
    assert_eq!(driver.arm(), Wanted::Pending);
}

#[test]
fn generations_wrap() {
    let memory = memory();
    let (mut driver, device) = page(&memory, 8, Nesting::Flat);
    driver.generation = (1 << 48) - 2;
    for _ in 0..6 {
        assert_eq!(driver.arm(), Wanted::Waiting);
        assert!(device.raise(1) && !device.raise(2));
        assert_eq!((driver.take(), driver.take()), (Some(2), None));
        driver.end(2);
        assert_eq!(driver.take(), Some(1));
        driver.end(1);
        assert_eq!(driver.take(), None);
    }
}

#[test]
fn any_word_of_the_peer_is_harmless() {
    let memory = memory();
    let (mut driver, device) = page(&memory, 70, Nesting::Nested);
    for hostile in [0, 7, u64::MAX, 1 << 63, 0xffff, 69 << 32 | 3] {
        memory.iter().for_each(|word| word.store(hostile, Ordering::Relaxed));
        let messages = (0..70).filter(|line| device.raise(*line)).count();
        assert!(messages <= 1, "{hostile:#x} brought {messages} messages");
        let mut taken = 0;
        while let Some(line) = driver.take() {
            assert!(line < 70);
            driver.end(line);
            taken += 1;
        }
        assert!(taken <= 70);
    }
}
