// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Clients that turn the descriptors that they share with the bus against it.

use std::os::fd::AsFd;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::Signal;
use vfio_user_protocol::message::IrqVerb;
use vfio_user_protocol::{Client, pci};

use crate::support::{Served, TWO, wait_until};

/// Fills the counter and makes the eventfd blocking: an ordinary write waits for ever.
fn spoil(eventfd: impl AsFd) {
    rustix::io::write(&eventfd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    fcntl_setfl(&eventfd, OFlags::empty()).unwrap();
}

#[test]
fn eventfds_that_block_stop_neither_the_bus_nor_its_end() {
    let mut bus = Served::start(TWO);
    let mut hostile = Client::connect(bus.dir.join("net1.sock")).unwrap();
    let trigger = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    hostile.connect_irqs(pci::IRQ_INTX, 0, &[trigger.as_fd()]).unwrap();
    spoil(&trigger);
    hostile.irq(pci::IRQ_INTX, 0, IrqVerb::Trigger).unwrap();
    hostile.connect_irqs(pci::IRQ_MSI, 0, &[trigger.as_fd()]).unwrap();
    hostile.irq(pci::IRQ_MSI, 0, IrqVerb::Trigger).unwrap();

    // Its neighbour goes on.
    let mut neighbour = Client::connect(bus.dir.join("net0.sock")).unwrap();
    neighbour.region_read(pci::REGION_CONFIG, 0, &mut [0; 4]).unwrap();
    // To take the device off raises the function's event, which interrupts the driver.
    bus.good(&["device", "remove", "net1", "--force"]);
    assert_eq!(bus.json(&["device", "list"]).as_array().unwrap().len(), 1);
    neighbour.connect_irqs(pci::IRQ_MSI, 0, &[trigger.as_fd()]).unwrap();
    bus.signal(Signal::TERM);
    wait_until("the bus has ended", || bus.child.try_wait().unwrap().is_some());
}

#[test]
fn a_client_keeps_no_doorbell_of_the_next_one() {
    let bus = Served::start(TWO);
    let socket = bus.dir.join("net0.sock");
    let mut former = Client::connect(&socket).unwrap();
    let old = former.io_eventfds(pci::REGION_BAR0).unwrap();
    let again = former.io_eventfds(pci::REGION_BAR0).unwrap();
    rustix::io::write(&old[0].fd, &1u64.to_ne_bytes()).unwrap();
    let mut count = [0; 8];
    rustix::io::read(&again[0].fd, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1, "one client gets the same eventfds each time");
    drop(former);
    wait_until("the former client has gone", || {
        !bus.json(&["device", "show", "net0"])["connected"].as_bool().unwrap()
    });
    let mut next = Client::connect(&socket).unwrap();
    let new = next.io_eventfds(pci::REGION_BAR0).unwrap();
    assert_eq!(new.len(), old.len());
    for (old, new) in old.iter().zip(&new) {
        spoil(&old.fd);
        rustix::io::write(&new.fd, &2u64.to_ne_bytes()).unwrap();
        rustix::io::read(&new.fd, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 2);
    }
}
