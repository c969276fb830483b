// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A function is saved, and another one goes on, with the driver's memory as it was.

use vbus_core::shm::abi::{bar0, command, reg};
use vbus_core::shm::ring::Entry;
use vbus_core::shm::signal::Armed;
use vbus_core::state::{BadDocument, Document};
use vbus_pci::{FunctionState, IrqIndex, Options, Peer, region};
use vbus_test_driver::saved::{Verdict, content, document, forge, try_out};

use crate::function::{Rig, exchange};

const OPTIONS: Options = Options { msix: true, express: true };

/// All that a driver can read of a function.
fn all(rig: &mut Rig) -> Vec<(u32, u64, u32)> {
    let mut words = Vec::new();
    for (number, bytes) in [(region::CONFIG, 4096), (region::BAR0, bar0::SIZE)] {
        for at in (0..bytes).step_by(4) {
            let mut word = [0; 4];
            rig.function.read(number, at, &mut word);
            words.push((number, at, u32::from_le_bytes(word)));
        }
    }
    words
}

fn text_of(rig: &mut Rig) -> String {
    rig.endpoint.quiesce().unwrap();
    rig.function.save().unwrap().to_text().unwrap()
}

/// A VMM that restores a machine in place, with the devices' states, resets each device first.
#[test]
fn a_function_that_gets_its_state_was_not_set_back() {
    let mut rig = Rig::new(OPTIONS);
    rig.function.write(region::CONFIG, 4, &6u16.to_le_bytes());
    rig.open().unwrap();
    let state = FunctionState::from_text(&text_of(&mut rig)).unwrap();
    let mut next = Rig::beside(&rig, OPTIONS);
    next.open().unwrap();
    next.function.reset();
    next.endpoint.quiesce().unwrap();
    next.function.restore(&state, Peer::Other).unwrap();
    next.function.write(region::CONFIG, 0x10, &0xfeb0_0000u32.to_le_bytes());
    assert_eq!(next.endpoint.counters().set_back.get(), 0);
    next.endpoint.resume();
}

#[test]
fn another_function_goes_on_with_the_driver() {
    let mut rig = Rig::new(OPTIONS);
    rig.function.write(region::CONFIG, 4, &6u16.to_le_bytes());
    rig.function.write(region::BAR0, bar0::MSIX_TABLE + 16, &0xfee0_1000u64.to_le_bytes());
    rig.open().unwrap();
    let (mut ring, handle) = rig.ring(2);
    let fd = rig.eventfd(IrqIndex::Msix, 2);
    let bell = rig.function.io_eventfds(region::BAR0).unwrap().remove(0);
    assert_eq!(exchange(&mut rig, &mut ring, handle, &fd, 1), !1);
    rig.endpoint.quiesce().unwrap();
    // It comes while nobody looks.
    ring.submit(Entry { addr: 2, len: 0, id: 5, flags: 0 }).unwrap();
    let _ = ring.post();
    let before = all(&mut rig);
    let state = FunctionState::from_text(&text_of(&mut rig)).unwrap();
    assert!(all(&mut rig) == before, "a save changes nothing");

    let mut next = Rig::beside(&rig, OPTIONS);
    let vectors = rig.function.irq_eventfds(IrqIndex::Msix).unwrap();
    next.function.connect_irqs(IrqIndex::Msix, 0, vectors).unwrap();
    let doorbells = next.endpoint.host().doorbells().clone();
    doorbells.adopt_eventfd(0, bell.fd.try_clone().unwrap()).unwrap();
    next.endpoint.quiesce().unwrap();
    next.function.restore(&state, Peer::Same).unwrap();
    let after = all(&mut next);
    let mut changed = before.iter().zip(&after).filter(|(before, after)| before != after);
    // Each vector of the driver has got an interrupt. Vector 0, of the events, has no eventfd.
    assert_eq!(changed.next().map(|(_, after)| *after), Some((0, bar0::MSIX_PBA, 1)));
    assert_eq!(changed.next(), None);
    next.endpoint.resume();
    crate::function::wait(&fd);
    let back = loop {
        if let Some(back) = ring.reap().unwrap() {
            break back;
        }
        if ring.arm(0) == Armed::Waiting {
            crate::function::wait(&fd);
        }
    };
    assert_eq!(back.len, !2);
    drop(rig);
    assert_eq!(exchange(&mut next, &mut ring, handle, &fd, 3), !3);
    assert_eq!(next.command(command::CALL, &[7 | 9 << 32, 0, 0]), Ok(7 << 32 | 9));
    assert_eq!(next.command(command::REGION_DROP, &[handle]), Ok(0));
    assert_eq!(next.read64(reg::ARGUMENT), handle);
}

#[test]
fn what_is_pending_stays_pending_and_another_peer_begins_unmasked() {
    let mut rig = Rig::new(Options::default());
    rig.open().unwrap();
    let (mut ring, handle) = rig.ring(0);
    let fd = rig.eventfd(IrqIndex::Intx, 0);
    ring.submit(Entry { addr: 1, len: 0, id: 5, flags: 0 }).unwrap();
    let _ = ring.arm(0);
    if ring.post().is_wanted() {
        rig.write32(bar0::DOORBELLS + handle * bar0::DOORBELL_STRIDE, 0);
    }
    crate::function::wait(&fd);
    // INTx has fired: it is masked for this peer until it unmasks it.
    let state = FunctionState::from_text(&text_of(&mut rig)).unwrap();
    for peer in [Peer::Same, Peer::Other] {
        let mut next = Rig::beside(&rig, Options::default());
        let fd = next.eventfd(IrqIndex::Intx, 0);
        next.endpoint.quiesce().unwrap();
        next.function.restore(&state, peer).unwrap();
        assert_eq!(next.read32(reg::INTERRUPT_PENDING), 1);
        let mut count = [0; 8];
        assert_eq!(rustix::io::read(&fd, &mut count).is_ok(), peer == Peer::Other);
    }
}

#[test]
fn a_state_of_something_else_is_refused() {
    let mut rig = Rig::new(OPTIONS);
    let text = text_of(&mut rig);
    let refused = |text: &str| FunctionState::from_text(text).unwrap_err().to_string();
    let other = text.replace("\"format\":1", "\"format\":2");
    assert_eq!(refused(&other), "the state has format 2; this version reads format 1");
    let other = text.replace("\"kind\":\"function\"", "\"kind\":\"device\"");
    assert!(matches!(FunctionState::from_text(&other), Err(BadDocument::Kind { .. })));
    assert!(refused(&text[..text.len() - 1]).contains("cannot be read"));
    for (from, to, why) in [
        ("\"class\":\"mirror\"", "\"class\":\"state\"", "of a device of class \"state\""),
        ("\"vectors\":3", "\"vectors\":4", "8 regions and 4 vectors; this one has 8 and 3"),
        ("\"cut\":false", "\"cut\":false,\"more\":1", "unknown field `more`"),
        ("\"opens\":0", "\"openings\":0", "no counter \"openings\""),
        ("\"pending\":0", "\"pending\":64", "events are none that the device can have"),
        ("\"config\":\"f41a", "\"config\":\"f41b", "config is not the configuration space"),
        ("\"msix_pending\":[]", "\"msix_pending\":[3]", "vector 3 is pending; the function has 3"),
    ] {
        let other = text.replacen(from, to, 1);
        assert_ne!(other, text, "{from}");
        let state = FunctionState::from_text(&other).unwrap();
        let mut next = Rig::beside(&rig, OPTIONS);
        next.endpoint.quiesce().unwrap();
        let refused = next.function.restore(&state, Peer::Same).unwrap_err().to_string();
        let begins = "device \"m0\" of class \"mirror\" cannot be restored: ";
        assert!(refused.starts_with(begins) && refused.contains(why), "{refused}");
    }
}

/// Whatever a forged state says, it is refused, or the function that goes on from it is safe: it
/// answers its driver, which can close the device and open it again.
#[test]
fn forged_states_of_a_function_do_no_harm() {
    let mut rig = Rig::new(OPTIONS);
    rig.function.write(region::CONFIG, 4, &6u16.to_le_bytes());
    rig.function.write(region::BAR0, bar0::MSIX_TABLE + 16, &0xfee0_1000u64.to_le_bytes());
    rig.open().unwrap();
    let (mut ring, _) = rig.ring(2);
    ring.submit(Entry { addr: 2, len: 0, id: 5, flags: 0 }).unwrap();
    rig.endpoint.quiesce().unwrap();
    let original = content(&rig.function.save().unwrap());
    forge(&original, 0..900, |seed, forged| {
        let Some(state) = document::<FunctionState>(&forged) else { return Verdict::Unread };
        let mut next = Rig::beside(&rig, OPTIONS);
        next.endpoint.quiesce().unwrap();
        let peer = if seed % 2 == 0 { Peer::Same } else { Peer::Other };
        let verdict = match next.function.restore(&state, peer) {
            Err(error) => Verdict::Refused(error.why),
            Ok(()) => Verdict::Taken,
        };
        let Rig { function, endpoint, .. } = &mut next;
        try_out(endpoint, 8, seed, || drop(function.save()));
        next.eventfd(IrqIndex::Msix, 2);
        all(&mut next);
        next.function.write(region::CONFIG, 4, &6u16.to_le_bytes());
        assert_eq!(next.command(command::CLOSE, &[]), Ok(0), "seed {seed}");
        assert!(next.open().is_ok(), "seed {seed}: it cannot be opened again");
        verdict
    });
}
