// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A queue's state, out of one object and into another.

use vbus_virtio::queue::{
    BadState, Chain, Format, InFlight, Part, Position, Queue, RingFeatures, State, Unsettled,
    Violation,
};

use crate::hostile::{DRIVER_AREA, layout, memory, offer};

const PLAIN: RingFeatures = RingFeatures { event_idx: false, indirect: false, in_order: false };
const IN_ORDER: RingFeatures = RingFeatures { in_order: true, ..PLAIN };

fn split(available: u16, used: u16) -> Position {
    Position { available, used, ..Position::default() }
}

fn packed(available: (u16, bool), used: (u16, bool)) -> Position {
    Position {
        available: available.0,
        used: used.0,
        available_wrap: available.1,
        used_wrap: used.1,
    }
}

fn in_flight(id: u16, slots: u16) -> InFlight {
    let parts = vec![Part { addr: 0x10, len: 4 }];
    InFlight { id, slots, parts, readable: 1, written: None }
}

#[test]
fn the_base_of_vhost_user_goes_both_ways() {
    for position in [split(0, 0), split(65_535, 65_535)] {
        let base = position.vring_base(Format::Split);
        assert_eq!(base, u32::from(position.available));
        assert_eq!(Position::of_vring_base(Format::Split, base), position);
    }
    let start = Position::start(Format::Packed);
    assert_eq!(start.vring_base(Format::Packed), 0x8000_8000);
    for position in [start, packed((3, false), (7, true)), packed((0x7fff, true), (0, false))] {
        let base = position.vring_base(Format::Packed);
        assert_eq!(Position::of_vring_base(Format::Packed, base), position);
    }
}

#[test]
fn a_state_that_makes_no_sense_is_refused() {
    let resume = |format, features, position, in_flight: Vec<InFlight>| {
        let state = State { position, in_flight };
        Queue::resume(layout(format, 8), features, &state).map(|(queue, chains)| {
            assert_eq!(queue.state(&chains).as_ref(), Ok(&state));
        })
    };
    let bad_split = |position, in_flight| resume(Format::Split, PLAIN, position, in_flight);
    assert_eq!(bad_split(split(1, 65_535), vec![in_flight(3, 1), in_flight(5, 1)]), Ok(()));
    assert_eq!(bad_split(split(9, 0), vec![]), Err(BadState::Position));
    assert_eq!(bad_split(split(0, 1), vec![]), Err(BadState::Position));
    assert_eq!(bad_split(packed((0, true), (0, true)), vec![]), Err(BadState::Position));
    assert_eq!(bad_split(split(2, 0), vec![in_flight(3, 1)]), Err(BadState::InFlight));
    assert_eq!(bad_split(split(2, 0), vec![in_flight(3, 2)]), Err(BadState::InFlight));
    assert_eq!(bad_split(split(1, 0), vec![in_flight(8, 1)]), Err(BadState::InFlight));
    let twice = vec![in_flight(3, 1), in_flight(3, 1)];
    let why = BadState::Buffer(Violation::InFlight(3));
    assert_eq!(bad_split(split(2, 0), twice), Err(why));
    let complete = InFlight { written: Some(1), ..in_flight(3, 1) };
    assert_eq!(bad_split(split(1, 0), vec![complete]), Err(BadState::InFlight));
    let mut empty = in_flight(3, 1);
    empty.parts[0].len = 0;
    let why = BadState::Buffer(Violation::Empty);
    assert_eq!(bad_split(split(1, 0), vec![empty]), Err(why));

    let bad_packed = |position, in_flight| resume(Format::Packed, PLAIN, position, in_flight);
    let (one, two) = (in_flight(900, 5), in_flight(900, 3));
    assert_eq!(bad_packed(packed((0, false), (0, true)), vec![one, two]), Ok(()));
    assert_eq!(bad_packed(packed((1, true), (7, false)), vec![in_flight(0, 2)]), Ok(()));
    assert_eq!(bad_packed(packed((8, true), (8, true)), vec![]), Err(BadState::Position));
    assert_eq!(bad_packed(packed((0, true), (7, true)), vec![]), Err(BadState::Position));
    assert_eq!(bad_packed(packed((7, true), (0, false)), vec![]), Err(BadState::Position));
    let far = packed((u16::MAX, true), (u16::MAX, false));
    assert_eq!(bad_packed(far, vec![]), Err(BadState::Position));
    let none = vec![in_flight(0, 0), in_flight(0, 2)];
    assert_eq!(bad_packed(packed((2, true), (0, true)), none), Err(BadState::InFlight));
}

#[test]
fn a_state_is_taken_out_only_when_all_is_settled() {
    let memory = memory();
    let view = memory.view();
    let mut queue = Queue::new(layout(Format::Split, 8), PLAIN).unwrap();
    offer(&view, Format::Split, &[(0x10, 4, 0, 0)]);
    let mut chain = [Chain::new()];
    assert_eq!(queue.turn(&view).unwrap().next(&mut chain[0]), Ok(true));
    assert_eq!(queue.state(&[]), Err(Unsettled::Held { held: 0, in_flight: 1 }));
    let other = [Chain::new()];
    assert_eq!(queue.state(&other), Err(Unsettled::Held { held: 0, in_flight: 1 }));
    assert_eq!(queue.state(&chain).unwrap().in_flight, [in_flight(0, 1)]);
    queue.turn(&view).unwrap().complete(&mut chain[0], 0);
    assert_eq!(queue.state(&[]), Err(Unsettled::Unpublished));
    queue.turn(&view).unwrap().publish();
    assert_eq!(queue.state(&[]), Ok(State::at(split(1, 1))));
    queue.retire(Violation::Buffer);
    assert_eq!(queue.state(&[]), Err(Unsettled::Retired(Violation::Buffer)));
}

/// The chain that is left may be older than one that is complete. Then it is not the newest.
#[test]
fn a_chain_of_a_former_object_is_not_put_back() {
    let memory = memory();
    let view = memory.view();
    let mut queue = Queue::new(layout(Format::Packed, 8), PLAIN).unwrap();
    offer(&view, Format::Packed, &[(0x10, 4, 0, 4), (0x10, 4, 0, 3)]);
    let mut chains = [Chain::new(), Chain::new()];
    let mut turn = queue.turn(&view).unwrap();
    assert!(chains.iter_mut().all(|chain| turn.next(chain) == Ok(true)));
    let [first, second] = &mut chains;
    turn.complete(second, 0);
    assert!(!turn.put_back(first));
    turn.publish();
    let state = queue.state(&chains[..1]).unwrap();
    let (mut queue, mut chains) = Queue::resume(*queue.layout(), PLAIN, &state).unwrap();
    let mut turn = queue.turn(&view).unwrap();
    assert!(!turn.put_back(&mut chains[0]));
    turn.complete(&mut chains[0], 0);
    assert!(turn.flush().is_wanted());
    assert_eq!(queue.position(), packed((2, true), (2, true)));
}

#[test]
fn what_waits_for_an_earlier_buffer_is_handed_over_too() {
    let memory = memory();
    let view = memory.view();
    let mut queue = Queue::new(layout(Format::Split, 8), IN_ORDER).unwrap();
    offer(&view, Format::Split, &[(0x10, 4, 0, 0); 3]);
    view.write(DRIVER_AREA + 2, &[3, 0, 0, 0, 1, 0, 2, 0]).unwrap();
    let mut chains = [const { Chain::new() }; 3];
    let mut turn = queue.turn(&view).unwrap();
    assert!(chains.iter_mut().all(|chain| turn.next(chain) == Ok(true)));
    turn.complete(&mut chains[1], 0);
    assert!(!turn.flush().is_wanted(), "nothing is used yet");
    let [first, _, third] = chains;
    let state = queue.state(&[third, first]).unwrap();
    let ids: Vec<_> = state.in_flight.iter().map(|one| (one.id, one.written)).collect();
    assert_eq!(ids, [(0, None), (1, Some(0)), (2, None)]);

    let (mut queue, mut chains) = Queue::resume(*queue.layout(), IN_ORDER, &state).unwrap();
    assert_eq!(chains.len(), 2);
    let mut turn = queue.turn(&view).unwrap();
    turn.complete(&mut chains[0], 0);
    assert!(turn.flush().is_wanted());
    assert_eq!(queue.position(), split(3, 2), "the first, and the one that waited");
}
