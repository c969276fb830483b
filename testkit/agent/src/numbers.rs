// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Datagrams with numbers: none is lost, doubled or changed, and they come in order. Nothing is
//! sent again, so a lost one stops the stream for good.

use std::io::{self, Error, Read, Write};
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::stream::Hash;

/// The most datagrams without an answer: fewer than any queue on the way has room for.
const WINDOW: u64 = 32;
/// Set in the number of the last datagram.
const LAST: u64 = 1 << 63;
/// The shortest and the longest datagram.
const BYTES: std::ops::Range<u64> = 16..1400;
/// How long an end waits for the other one.
const LIMIT: Duration = Duration::from_secs(120);

/// Datagram `number`. Its length and all its bytes follow from the number.
fn datagram(number: u64, last: bool) -> Vec<u8> {
    let length = BYTES.start + number * 37 % (BYTES.end - BYTES.start);
    let word = |at: u64| (number << 16 | at).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    let first = (number | if last { LAST } else { 0 }).to_le_bytes();
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    first.into_iter().chain((0..).flat_map(word)).take(length).collect()
}

/// Sends datagrams until its standard input ends. Each is answered. Prints their number and the
/// hash of all.
pub fn send(address: &str) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(LIMIT))?;
    let stop = Arc::<AtomicBool>::default();
    let told = Arc::clone(&stop);
    std::thread::spawn(move || {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        told.store(true, Ordering::Relaxed);
    });
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
