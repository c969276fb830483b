// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A server that is killed again and again while its client talks to it. Each process goes on where
//! the last one was killed. The client sees one reply to each message, in order, and the device has
//! done each message once.
#![allow(unsafe_code, clippy::unwrap_used, reason = "a test may panic, and asks the kernel")]

mod client;
mod device;
mod held;
mod hostile;
mod keeper;

use std::time::Duration;

use client::Client;
use keeper::{Deaths, Keeper};

use super::fault::Fault;

/// The server's process: this test runs again in a process of its own.
#[test]
fn child() {
    if let Ok(orders) = std::env::var(keeper::ORDERS) {
        device::serve(&orders);
    }
}

/// Plays rounds of the client's script while servers die, until `deaths` have happened. Then one
/// more round. Returns the number of servers that were killed.
fn play(deaths: Deaths, fault: Option<Fault>) -> Result<u32, String> {
    let keeper = Keeper::start(deaths, fault);
    // What is broken may be a reply that never comes.
    let patience = Duration::from_secs(if fault.is_some() { 3 } else { 60 });
    let mut client = Client::connect(&keeper, patience)?;
    while !keeper.is_done() {
        client.round()?;
    }
    client.round()?;
    client.check_end()?;
    drop(client);
    keeper.end()
}

/// A kill at each step: before and after each store to the journal, each call, each commit.
#[test]
fn a_server_may_be_killed_at_every_step() {
    let killed = play(Deaths::Steps(1..=500), None).unwrap();
    assert_eq!(killed, 500);
}

/// The first steps of a server, with the first message of a client, from the start.
#[test]
fn a_first_server_may_be_killed_at_every_step() {
    for step in 1..=70 {
        let killed = play(Deaths::Steps(step..=step), None);
        assert_eq!(killed, Ok(1), "killed at step {step}");
    }
}

#[test]
fn a_server_may_be_killed_at_any_moment() {
    let moments = Deaths::Moments { count: 300, within: Duration::from_millis(12) };
    assert_eq!(play(moments, None), Ok(300));
}

/// Without a part of the journal, the same test fails.
#[test]
fn each_part_is_needed() {
    for fault in
        [Fault::Sentinel, Fault::EarlyAnswer, Fault::EarlyReply, Fault::LateHold, Fault::EarlyCount]
    {
        let seen = play(Deaths::Steps(1..=500), Some(fault));
        assert!(seen.is_err(), "{fault:?} is not seen");
    }
}
