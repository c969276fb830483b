// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Datagrams with numbers: none is lost, doubled or changed, and they come in order. Nothing is
//! sent again, so a lost one stops the stream for good. [`throw`] and [`count`] go on instead, and
//! count what was lost and what came twice.

use std::io::{self, Error, Read, Write};
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::stream::Hash;

/// The most datagrams without an answer: fewer than any queue on the way has room for.
const WINDOW: u64 = 32;
/// Set in the number of the last datagram.
const LAST: u64 = 1 << 63;
/// The shortest and the longest datagram.
const BYTES: std::ops::Range<u64> = 16..1400;
/// How long an end waits for the other one.
const LIMIT: Duration = Duration::from_secs(120);
/// How long [`throw`] waits for an answer, before it sends one more datagram.
const NAP: Duration = Duration::from_secs(1);

/// Datagram `number`. Its length and all its bytes follow from the number.
fn datagram(number: u64, last: bool) -> Vec<u8> {
    let length = BYTES.start + number * 37 % (BYTES.end - BYTES.start);
    let word = |at: u64| (number << 16 | at).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    let first = (number | if last { LAST } else { 0 }).to_le_bytes();
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    first.into_iter().chain((0..).flat_map(word)).take(length).collect()
}

/// Becomes true when the standard input ends.
fn stop_with_input() -> Arc<AtomicBool> {
    let stop = Arc::<AtomicBool>::default();
    let told = Arc::clone(&stop);
    std::thread::spawn(move || {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        told.store(true, Ordering::Relaxed);
    });
    stop
}

/// Sends datagrams until its standard input ends. Each is answered. Prints their number and the
/// hash of all.
pub fn send(address: &str) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(LIMIT))?;
    let stop = stop_with_input();
    let (mut hash, mut sent, mut answered, mut last) = (Hash::new(), 0, 0, false);
    while !last || answered < sent {
        if !last && sent < answered + WINDOW {
            last = stop.load(Ordering::Relaxed);
            let datagram = datagram(sent, last);
            socket.send(&datagram)?;
            hash.add(&datagram);
            sent += 1;
            continue;
        }
        let mut answer = [0; 16];
        let length = socket.recv(&mut answer).map_err(|error| {
            Error::other(format!("no answer to datagram {answered} of {sent}: {error}"))
        })?;
        if answer[..length] != answered.to_le_bytes() {
            let got = &answer[..length];
            return Err(Error::other(format!("the answer to datagram {answered} is {got:?}")));
        }
        answered += 1;
    }
    println!("{sent} {}", hash.end());
    Ok(())
}

/// Receives what [`send`] sends, and prints the same.
pub fn receive(address: &str) -> io::Result<()> {
    let socket = UdpSocket::bind(address)?;
    println!("ready");
    io::stdout().flush()?;
    let (mut hash, mut number, mut bytes) = (Hash::new(), 0u64, [0; 2048]);
    loop {
        let (length, from) = socket.recv_from(&mut bytes)?;
        // The first one may come at any time, and the others soon.
        socket.set_read_timeout(Some(LIMIT))?;
        let got = &bytes[..length];
        let last = got == datagram(number, true);
        if !last && got != datagram(number, false) {
            let found = got.first_chunk().map(|first| u64::from_le_bytes(*first) & !LAST);
            return Err(Error::other(format!(
                "datagram {number} was to come, and one of {length} bytes with number {found:?} \
                 came"
            )));
        }
        hash.add(got);
        socket.send_to(&number.to_le_bytes(), from)?;
        number += 1;
        if last {
            println!("{number} {}", hash.end());
            return Ok(());
        }
    }
}

/// Sends datagrams over a wire that may lose some, until its standard input ends and the last one
/// is answered. At most [`WINDOW`] are on their way, and one more for each second without an
/// answer. Prints how many it has sent up to the first that says that it is the last.
pub fn throw(address: &str) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(NAP))?;
    let stop = stop_with_input();
    let (mut sent, mut answered, mut last, mut ended) = (0, 0, None, None);
    while last.is_none_or(|last| answered <= last) {
        let stops = stop.load(Ordering::Relaxed);
        if stops {
            let since = *ended.get_or_insert_with(Instant::now);
            if since.elapsed() > LIMIT {
                return Err(Error::other(format!("no answer to the last of {sent} datagrams")));
            }
        }
        if sent < answered + WINDOW && last.is_none() {
            send_one(&socket, &mut sent, stops, &mut last)?;
            continue;
        }
        let mut answer = [0; 16];
        match socket.recv(&mut answer) {
            Ok(8) => {
                let number = u64::from_le_bytes(answer[..8].try_into().unwrap_or_default());
                answered = answered.max(number + 1);
            }
            Ok(length) => return Err(Error::other(format!("an answer of {length} bytes"))),
            // The other end of the wire may not be there for a moment.
            Err(error) if is_pause(&error) => send_one(&socket, &mut sent, stops, &mut last)?,
            // It has ended already, and its answer comes.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && last.is_some() => {}
            Err(error) => return Err(error),
        }
    }
    println!("{}", last.map_or(sent, |last| last + 1));
    Ok(())
}

fn send_one(
    socket: &UdpSocket,
    sent: &mut u64,
    stops: bool,
    last: &mut Option<u64>,
) -> io::Result<()> {
    match socket.send(&datagram(*sent, stops)) {
        Ok(_) => {}
        Err(error) if is_pause(&error) => {}
        Err(error) => return Err(error),
    }
    if stops {
        last.get_or_insert(*sent);
    }
    *sent += 1;
    Ok(())
}

/// Whether nobody is to be reached for a moment.
fn is_pause(error: &Error) -> bool {
    use io::ErrorKind::{HostUnreachable, NetworkUnreachable, TimedOut, WouldBlock};
    matches!(error.kind(), WouldBlock | TimedOut | HostUnreachable | NetworkUnreachable)
}

/// Receives what [`throw`] sends. Prints how many have come, how many are missing before a later
/// one, and how many came after a later one, or again.
pub fn count(address: &str) -> io::Result<()> {
    let socket = UdpSocket::bind(address)?;
    println!("ready");
    io::stdout().flush()?;
    let (mut next, mut came, mut missing, mut again, mut bytes) = (0, 0_u64, 0, 0_u64, [0; 2048]);
    loop {
        let (length, from) = socket.recv_from(&mut bytes)?;
        socket.set_read_timeout(Some(LIMIT))?;
        let got = &bytes[..length];
        let Some(first) = got.first_chunk().map(|first| u64::from_le_bytes(*first)) else {
            return Err(Error::other(format!("a datagram of {length} bytes")));
        };
        let (number, last) = (first & !LAST, first & LAST != 0);
        if got != datagram(number, last) {
            return Err(Error::other(format!("datagram {number} of {length} bytes is not whole")));
        }
        came += 1;
        if number < next {
            again += 1;
        } else {
            missing += number - next;
            next = number + 1;
        }
        // One that came twice is answered twice.
        match socket.send_to(&number.to_le_bytes(), from) {
            Err(error) if !is_pause(&error) => return Err(error),
            _ => {}
        }
        if last {
            println!("{came} {missing} {again}");
            return Ok(());
        }
    }
}
