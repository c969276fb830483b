// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Doorbells and interrupts in a real virtual machine. If this machine's KVM lacks a feature, its
//! tests are skipped and say so.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a test may panic"
)]

mod tiny;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vbus_kvm::{
    DoorbellKind, DoorbellRange, Doorbells, Error, IntxIrqfd, IrqChip, MsiIrqfd, Route, Routes,
};

use tiny::{CONNECTION, Cost, MMIO, NO_CONNECTION, PORT, Program, SINT, Tiny, VECTOR, machine};

const MSI: Route = Route::Msi { address: 0xfee0_0000, data: VECTOR as u32 };

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// Reads and clears the counter of the eventfd.
fn count(fd: impl AsFd) -> u64 {
    let mut value = [0; 8];
    rustix::io::read(fd, &mut value).map_or(0, |_| u64::from_ne_bytes(value))
}

fn write(fd: impl AsFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

/// Waits until the eventfd is readable.
fn readable(fd: impl AsFd) -> bool {
    let timeout = Timespec { tv_sec: 10, tv_nsec: 0 };
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() == 1
}

fn places() -> [(DoorbellKind, DoorbellRange); 3] {
    [
        (DoorbellKind::Mmio, DoorbellRange { base: MMIO, stride: 4 }),
        (DoorbellKind::Pio, DoorbellRange { base: PORT.into(), stride: 1 }),
        (DoorbellKind::Hypercall, DoorbellRange { base: CONNECTION.into(), stride: 1 }),
    ]
}

/// The kinds of doorbells that KVM has. The others are printed as skipped.
fn kinds(tiny: &Tiny) -> Vec<(DoorbellKind, DoorbellRange)> {
    let (have, lack): (Vec<_>, Vec<_>) =
        places().into_iter().partition(|(kind, _)| tiny.capabilities.has(*kind));
    for (kind, _) in lack {
        println!("left out: {kind:?}, which this KVM does not have");
    }
    have
}

/// Checks the number of exits for a number of rings. Each ring on a processor costs an exit. A KVM
/// that interprets its guests' code needs none, and has a few of its own.
fn has_exits(cost: &Cost, rings: u64) -> bool {
    if cost.exits < rings {
        println!(
            "left out: exits, which this KVM does not have: it interprets the code of its guests"
        );
    }
    cost.exits >= rings
}

#[test]
fn a_ring_is_one_exit_and_none_to_user_space() {
    const RINGS: u64 = 200;
    let Some(mut tiny) = machine() else { return };
    let (bell, other) = (event(), event());
    let bells = vec![(0, bell.try_clone().unwrap()), (1, other.try_clone().unwrap())];
    let mut doorbells = Doorbells::new(tiny.vm.clone(), bells).unwrap();
    assert_eq!(doorbells.numbers(), 2);
    for (kind, place) in kinds(&tiny) {
        doorbells.set_range(kind, Some(place)).unwrap();
        assert_eq!(doorbells.range(kind), Some(place));
        // The first rings also cost page faults and the like, which do not count here.
        tiny.run(Program::Ring(kind, 2));
        count(&bell);
        let cost = tiny.run(Program::Ring(kind, RINGS));
        println!("{kind:?}: {cost:?} for {RINGS} rings");
        let Cost { exits, user_exits, interrupts, statuses } = cost;
        assert_eq!((user_exits, interrupts, statuses), (0, 0, 0), "{kind:?}");
        assert_eq!((count(&bell), count(&other)), (RINGS, 0), "{kind:?}");
        if has_exits(&cost, RINGS) {
            // A second exit for each ring would double the count. A stray one is the host's.
            assert!((RINGS..RINGS + RINGS / 2).contains(&exits), "{kind:?}: {exits} exits");
        }

        // The other doorbell gets the same address; then the doorbells are disconnected.
        doorbells
            .set_range(
                kind,
                Some(DoorbellRange { base: place.base - u64::from(place.stride), ..place }),
            )
            .unwrap();
        tiny.run(Program::Ring(kind, 3));
        assert_eq!((count(&bell), count(&other)), (0, 3), "{kind:?}");
        doorbells.set_range(kind, None).unwrap();
        let nobodys = tiny.run(Program::Ring(kind, 5));
        if kind == DoorbellKind::Hypercall {
            // With a SynIC the VMM answers, without one KVM does.
            let answer = if tiny.capabilities.synic { (5, NO_CONNECTION) } else { (0, 3) };
            assert_eq!((nobodys.user_exits, nobodys.statuses), answer);
        } else {
            assert_eq!(nobodys.user_exits, 5, "{kind:?}");
        }
        assert_eq!((count(&bell), count(&other)), (0, 0), "{kind:?}");
        doorbells.set_range(kind, Some(place)).unwrap();
    }
    drop(doorbells);
    for (kind, place) in kinds(&tiny) {
        // Other doorbells can have the addresses again.
        let mut next = Doorbells::new(tiny.vm.clone(), vec![(0, event())]).unwrap();
        next.set_range(kind, Some(place)).unwrap();
    }
}

#[test]
fn places_that_cannot_be_are_refused_and_leave_nothing() {
    let Some(tiny) = machine() else { return };
    let new = |numbers: &[u32]| {
        Doorbells::new(tiny.vm.clone(), numbers.iter().map(|n| (*n, event())).collect())
    };
    assert!(matches!(new(&[3, 1, 3]), Err(Error::BadRange(_))));
    assert!(matches!(new(&[1024]), Err(Error::BadRange(_))));
    let mut doorbells = new(&[0, 1, 7]).unwrap();
    for (kind, base, stride) in [
        (DoorbellKind::Mmio, u64::MAX - 6, 1),
        (DoorbellKind::Mmio, MMIO, 0),
        (DoorbellKind::Pio, 0xfff9, 1),
        (DoorbellKind::Pio, 0x1_0000, 1),
        (DoorbellKind::Hypercall, 0xff_fff9, 1),
    ] {
        let refused = doorbells.set_range(kind, Some(DoorbellRange { base, stride }));
        assert!(
            matches!(refused, Err(Error::BadRange(_))),
            "{kind:?} {base:#x} {stride}: {refused:?}"
        );
        assert_eq!(doorbells.range(kind), None);
    }
    let mut other = new(&[0]).unwrap();
    for (kind, place) in kinds(&tiny) {
        // Another doorbell is at the address of doorbell 7, so the whole range is refused.
        let last = DoorbellRange { base: place.base + u64::from(place.stride) * 7, ..place };
        other.set_range(kind, Some(last)).unwrap();
        assert!(
            doorbells.set_range(kind, Some(place)).is_err_and(|error| error.errno() == Some(17)),
            "{kind:?}"
        );
        assert_eq!(doorbells.range(kind), None);
        other.set_range(kind, Some(place)).unwrap();
        other.set_range(kind, None).unwrap();
        doorbells.set_range(kind, Some(place)).unwrap();
    }
    // Descriptors that are no eventfds.
    let file: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    let mut wrong = Doorbells::new(tiny.vm.clone(), vec![(0, file)]).unwrap();
    for (kind, place) in kinds(&tiny) {
        let elsewhere = DoorbellRange { base: place.base - 64, ..place };
        assert!(
            wrong.set_range(kind, Some(elsewhere)).is_err_and(|error| error.errno() == Some(22)),
            "{kind:?}"
        );
    }
}

#[test]
fn messages_come_while_unmasked_and_wait_while_masked() {
    let Some(mut tiny) = machine() else { return };
    let routes = Routes::new(tiny.vm.clone(), IrqChip::Kernel).unwrap();
    let mut message = MsiIrqfd::new(routes.clone()).unwrap();
    assert!(message.is_masked() && !message.is_pending());
    assert!(matches!(message.unmask(), Err(Error::NoInterrupt(_))), "it has no route");
    message.set(MSI).unwrap();
    message.unmask().unwrap();
    message.unmask().unwrap();
    write(&message);
    tiny.run(Program::Wait(1));

    message.mask().unwrap();
    assert!(!message.is_pending());
    for _ in 0..3 {
        write(&message);
    }
    assert!(message.is_pending());
    assert_eq!(tiny.run(Program::Ring(DoorbellKind::Pio, 1)).interrupts, 0);
    // The route goes to a vector that would kill the guest, and back: only the last one counts.
    message.set(Route::Msi { address: 0xfee0_0000, data: 0x40 }).unwrap();
    message.set(MSI).unwrap();
    message.unmask().unwrap();
    assert!(!message.is_pending());
    tiny.run(Program::Wait(2));

    message.mask().unwrap();
    write(&message);
    message.forget();
    assert!(!message.is_pending());
    message.unmask().unwrap();
    assert_eq!(
        tiny.run(Program::Ring(DoorbellKind::Pio, 1)).interrupts,
        0,
        "three and a forgotten one were one"
    );

    let route = message.route();
    assert!(message.set(Route::Sint { vp: 0, sint: 16 }).is_err());
    assert_eq!(message.route(), route);
    drop(message);
    let next = MsiIrqfd::new(routes).unwrap();
    assert_eq!(next.route(), None, "a number comes without the route of the one who had it before");
}

/// Ends the guest's waiting when the test has failed.
struct Release(&'static AtomicU64);

impl Drop for Release {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(u64::MAX, Ordering::Relaxed);
        }
    }
}

#[test]
fn no_message_is_lost_or_doubled_while_it_is_masked_and_moved() {
    const EVENTS: u64 = 400;
    // Two routes with the same meaning: the level bit of the second one has no effect for an edge.
    const OTHER: Route = Route::Msi { address: 0xfee0_0000, data: 0x4000 | VECTOR as u32 };
    let Some(mut tiny) = machine() else { return };
    let routes = Routes::new(tiny.vm.clone(), IrqChip::Kernel).unwrap();
    // The routes of another interrupt change meanwhile, and with them the whole table.
    let mut neighbour = MsiIrqfd::new(routes.clone()).unwrap();
    let mut message = MsiIrqfd::new(routes).unwrap();
    message.set(MSI).unwrap();
    message.unmask().unwrap();
    let (counter, event) = (tiny.counter(), message.eventfd().try_clone_to_owned().unwrap());
    std::thread::scope(|scope| {
        let (sender, asked) = std::sync::mpsc::sync_channel::<()>(0);
        let (tell, told) = std::sync::mpsc::channel();
        scope.spawn(move || {
            for () in asked {
                write(&event);
                tell.send(()).unwrap();
            }
        });
        scope.spawn(move || {
            let _release = Release(counter);
            for number in 0..EVENTS {
                // The other thread writes while this one changes routes and masks.
                sender.send(()).unwrap();
                match number % 4 {
                    0 => message.mask().and_then(|()| message.unmask()).unwrap(),
                    1 => message.set(OTHER).and_then(|()| message.set(MSI)).unwrap(),
                    2 => neighbour.set(if number % 8 == 2 { OTHER } else { MSI }).unwrap(),
                    _ => {
                        message.mask().unwrap();
                        message.set(OTHER).unwrap();
                        message.unmask().unwrap();
                        message.set(MSI).unwrap();
                    }
                }
                told.recv().unwrap();
                wait_until(|| counter.load(Ordering::Relaxed) > number);
            }
        });
        tiny.run(Program::Wait(EVENTS));
    });
    assert_eq!(tiny.run(Program::Ring(DoorbellKind::Pio, 5)).interrupts, 0);
    assert_eq!(tiny.interrupts(), EVENTS);
}

#[test]
fn there_are_as_many_messages_as_kvm_has_room_for() {
    let Some(tiny) = machine() else { return };
    let routes = Routes::new(tiny.vm.clone(), IrqChip::Kernel).unwrap();
    let mut numbers = Vec::new();
    let error = loop {
        match routes.alloc() {
            Ok(number) => numbers.push(number),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Routes(_)), "{error}");
    assert_eq!(numbers.len() as u32, tiny.capabilities.routes - 24 - 16);
    // All numbers get a route. This is slow, since each call passes the whole table to KVM.
    for number in numbers.iter().step_by(97).chain(numbers.last()) {
        routes.set(*number, Some(MSI)).unwrap();
    }
    routes.free(numbers[5]);
    assert_eq!(routes.alloc().unwrap(), numbers[5]);
    // The pins belong to KVM here.
    assert!(routes.set(3, Some(MSI)).is_err());
    routes.free(3);
}

#[test]
fn rings_become_interrupts_within_the_kernel() {
    const RINGS: u64 = 200;
    let Some(mut tiny) = machine() else { return };
    let routes = Routes::new(tiny.vm.clone(), IrqChip::Kernel).unwrap();
    let sint = Route::Sint { vp: 0, sint: SINT };
    let mut ways = vec![("MSI", MSI, 2)];
    if tiny.capabilities.synic {
        // Nobody has ended the interrupt.
        ways.push(("SINT", sint, 1));
    } else {
        println!("left out: synthetic interrupts, which this KVM does not have");
    }
    for (name, route, exits_each) in ways {
        let mut message = MsiIrqfd::new(routes.clone()).unwrap();
        message.set(route).unwrap();
        message.unmask().unwrap();
        let bell = message.eventfd().try_clone_to_owned().unwrap();
        let mut doorbells = Doorbells::new(tiny.vm.clone(), vec![(0, bell)]).unwrap();
        for (kind, place) in kinds(&tiny) {
            doorbells.set_range(kind, Some(place)).unwrap();
            tiny.run(Program::Ring(kind, 2));
            let cost = tiny.run(Program::Ring(kind, RINGS));
            println!("{kind:?}, {name}: {cost:?} for {RINGS} rings");
            assert_eq!((cost.user_exits, cost.statuses), (0, 0), "{kind:?} {name}");
            if !has_exits(&cost, RINGS) {
                tiny.run(Program::Wait(1));
                continue;
            }
            assert_eq!(cost.interrupts, RINGS, "{kind:?} {name}");
            // A further exit for each ring would add as many. A stray one is the host's.
            let most = RINGS * exits_each + RINGS / 2;
            assert!((RINGS * exits_each..=most).contains(&cost.exits), "{kind:?} {name}: {cost:?}");
        }
    }
}

#[test]
fn a_level_is_taken_back_and_told_of_when_it_ends() {
    const PIN: u32 = 20;
    let Some(mut tiny) = machine() else { return };
    if !tiny.capabilities.resample {
        println!("skipped: this KVM has no levels by eventfds");
        return;
    }
    let routes = Routes::new(tiny.vm.clone(), IrqChip::Kernel).unwrap();
    assert!(matches!(IntxIrqfd::new(routes.clone(), 24), Err(Error::NoInterrupt(_))));
    let one = IntxIrqfd::new(routes.clone(), PIN).unwrap();
    let two = IntxIrqfd::new(routes.clone(), PIN).unwrap();
    let asserted = |tiny: &Tiny| tiny.is_asserted(PIN);
    assert!(!asserted(&tiny));
    write(one.assert());
    wait_until(|| asserted(&tiny));
    // The guest takes the interrupt and ends it, and both devices learn of the end.
    assert_eq!((count(one.ended()), count(two.ended())), (0, 0));
    tiny.enable_pin(PIN);
    assert_eq!(tiny.run(Program::Wait(1)).interrupts, 1);
    assert!(readable(one.ended()) && readable(two.ended()));
    assert!(!asserted(&tiny));
    assert_eq!((count(one.ended()), count(two.ended())), (1, 1));

    write(two.assert());
    tiny.run(Program::Wait(2));
    assert!(readable(one.ended()) && readable(two.ended()));
    write(one.assert());
    wait_until(|| asserted(&tiny));
    drop(two);
    assert!(asserted(&tiny), "the other's is still up");
    drop(one);
    assert!(!asserted(&tiny), "nobody's is");
    // The pin is free again.
    drop(IntxIrqfd::new(routes, PIN).unwrap());
}

/// Waits for the work of another thread of the kernel.
fn wait_until(condition: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed().as_secs() < 60, "it never happens");
        std::thread::yield_now();
    }
}

#[test]
fn pins_of_a_split_chip_are_routes_like_messages() {
    const PINS: u32 = 24;
    let Ok(kvm) = kvm_ioctls::Kvm::new() else {
        println!("skipped: no KVM here");
        return;
    };
    if !vbus_kvm::Capabilities::probe(&kvm).split_irqchip {
        println!("skipped: this KVM has no split interrupt controllers");
        return;
    }
    let vm = Arc::new(kvm.create_vm().unwrap());
    let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    split.args[0] = PINS.into();
    vm.enable_cap(&split).unwrap();
    let routes = Routes::new(vm, IrqChip::Split { pins: PINS }).unwrap();
    assert_eq!(routes.alloc().unwrap(), PINS, "numbers of messages begin behind the pins");
    routes.set(3, Some(MSI)).unwrap();
    assert_eq!(routes.get(3), Some(MSI));
    routes.set(3, None).unwrap();
    assert_eq!(routes.get(3), None);
    assert!(routes.set(PINS + 7, Some(MSI)).is_err(), "nobody has this number");
    // The kernel has no I/O APIC pins here.
    assert!(matches!(IntxIrqfd::new(routes, 3), Err(Error::Missing(_))));
}

#[test]
fn routes_need_an_interrupt_controller() {
    let Ok(kvm) = kvm_ioctls::Kvm::new() else {
        println!("skipped: no KVM here");
        return;
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    assert!(Routes::new(vm, IrqChip::Kernel).is_err());
}

#[test]
fn statistics_have_names() {
    let Some(mut tiny) = machine() else { return };
    let before = tiny.stats();
    tiny.run(Program::Ring(DoorbellKind::Pio, 10));
    let after = tiny.stats();
    assert!(after["exits"] >= before["exits"] + 11, "{after:?}");
    let vm = vbus_kvm::Stats::of_vm(&tiny.vm).unwrap();
    assert!(!vm.read().unwrap().is_empty());
    assert_eq!(vm.get("no such thing").unwrap(), None);
}
