// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `guest-agent` runs inside the test guests. It uses only `std`: it builds in seconds and links
//! statically.
//!
//! - `guest-agent serve PORT` runs commands for the host, over a serial port or a UNIX socket;
//! - `guest-agent join SOCKET` joins a socket to its standard input and output: a test reaches the
//!   agent of an L2 through it;
//! - `guest-agent send|send-until|receive` moves a stream over TCP, and each end prints the hash;
//! - `guest-agent latency PERIOD COUNT` measures how late it wakes;
//! - `guest-agent switches COUNT PRIORITY` measures what a switch between two tasks costs;
//! - `guest-agent spin` uses processor time for ever;
//! - `guest-agent accept SOCKET` takes one client and says nothing to it;
//! - `guest-agent clocks FILE` counts, and watches that no clock runs backwards;
//! - `guest-agent hold-kvm` keeps an idle virtual machine;
//! - `guest-agent fifo PRIORITY COMMAND` runs a command as a real-time task;
//! - `guest-agent scribble` writes random values over the memory that a driver shares with its
//!   device;
//! - `guest-agent virtio` drives a virtio network card against all rules;
//! - `guest-agent nonsense` makes random accesses to configuration spaces;
//! - `guest-agent map-read|map-write` reads and writes a state page by a mapping of its file;
//! - `guest-agent watch` fills memory and checks later that nobody has written it;
//! - `guest-agent xdp` lets a program of XDP run on an interface;
//! - `guest-agent qstats` prints what netlink tells of an interface's queues;
//! - `guest-agent numbers` sends and receives datagrams with numbers: none may be lost or doubled,
//!   or it counts those;
//! - `guest-agent datagrams` sends and receives datagrams of UDP;
//! - `guest-agent lie` serves the device of another vfio-user server, with a lie about it.

mod accept;
mod clocks;
mod datagrams;
mod hold;
mod join;
mod latency;
mod lie;
mod map;
mod nonsense;
mod numbers;
mod option;
mod page;
mod qstats;
mod random;
mod rings;
mod scribble;
mod serve;
mod stream;
mod switches;
mod virtio;
mod watch;
mod xdp;

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["serve", port] => serve::serve(port),
        ["join", socket] => join::join(socket),
        ["send", address, bytes, seed] => stream::send(address, bytes, seed, false),
        ["send", address, bytes, seed, "options"] => stream::send(address, bytes, seed, true),
        ["send-until", address, end, seed] => stream::send_until(address, end, seed),
        ["receive", address] => stream::receive(address),
        ["latency", period, count] => latency::latency(period, count),
        ["accept", socket] => accept::accept(socket),
        ["clocks", file] => clocks::clocks(file),
        ["hold-kvm"] => hold::hold(),
        ["switches", count, priority] => switches::switches(count, priority),
        ["spin"] => latency::spin(),
        ["fifo", priority, ref command @ ..] => latency::fifo(priority, command),
        ["map-read", path, count] => page::read(path, count),
        ["map-write", path, ref values @ ..] => page::write(path, values),
        ["datagrams", "send", address, count, bytes, segment] => {
            datagrams::send(address, count, bytes, segment)
        }
        ["datagrams", "receive", address, count, bytes, segment] => {
            datagrams::receive(address, count, bytes, segment)
        }
        ["datagrams", "throw", address, count] => datagrams::throw(address, count),
        ["datagrams", "print", address, interface] => datagrams::print(address, interface),
        ["numbers", "send", address] => numbers::send(address),
        ["numbers", "receive", address] => numbers::receive(address),
        ["numbers", "throw", address] => numbers::throw(address),
        ["numbers", "count", address] => numbers::count(address),
        ["qstats", interface] => qstats::qstats(interface),
        ["watch", mib, seconds] => watch::watch(mib, seconds),
        ["xdp", interface, what] => xdp::xdp(interface, what),
        ["lie", socket, server, name] => lie::lie(socket, server, name),
        ["nonsense", seed, count, how, ref functions @ ..] if !functions.is_empty() => {
            nonsense::nonsense(seed, count, how == "wild", functions)
        }
        ["virtio", seed, rounds, function] => virtio::virtio(seed, rounds, function),
        ["scribble", pid, count, seed, what] => scribble::scribble(pid, count, seed, what == "all"),
        _ => {
            eprintln!(
                "usage: guest-agent serve PORT | join SOCKET | \
                 send ADDRESS:PORT BYTES SEED [options] | \
                 send-until ADDRESS:PORT FILE SEED | receive ADDRESS:PORT | \
                 latency MICROSECONDS COUNT | accept SOCKET | clocks FILE | hold-kvm | spin | \
                 switches COUNT PRIORITY | fifo PRIORITY COMMAND | \
                 scribble PID COUNT SEED all|memory | map-read PATH COUNT | \
                 map-write PATH VALUE... | virtio SEED ROUNDS FUNCTION | \
                 nonsense SEED COUNT tame|wild FUNCTION... | lie SOCKET SERVER NAME | \
                 watch MIB SECONDS | xdp INTERFACE pass|drop|back|around | qstats INTERFACE | \
                 datagrams send|receive ADDRESS:PORT COUNT BYTES SEGMENT | \
                 numbers send|receive|throw|count ADDRESS:PORT | \
                 datagrams throw ADDRESS:PORT COUNT | datagrams print ADDRESS:PORT INTERFACE"
            );
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-agent: {error}");
            ExitCode::FAILURE
        }
    }
}
