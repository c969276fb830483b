// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A stream over TCP. Both ends must compute the same hash: a lost, changed or misplaced byte
//! shows.

use std::ffi::c_int;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::option;

const BLOCK: usize = 64 * 1024;

/// The level of IPv6 of a socket's options, and its hop-by-hop options.
const IPV6: (c_int, c_int) = (41, 54);
/// Bytes of the hop-by-hop options that [`send`] adds.
const OPTIONS: u8 = 136;

/// Has the stream send each packet with hop-by-hop options of [`OPTIONS`] bytes.
fn add_options(stream: &TcpStream) -> io::Result<()> {
    let mut header = [0u8; OPTIONS as usize];
    // The units of 8 bytes behind the first, and an option that whoever does not know it skips,
    // with its length.
    header[1..4].copy_from_slice(&[OPTIONS / 8 - 1, 0x1e, OPTIONS - 4]);
    option::set(stream, IPV6, &header)
}

/// A 64-bit hash. It is cheap on an emulated CPU: one multiplication for eight bytes.
///
/// It does not resist an adversary. Every step is a bijection of the state, so a single changed
/// word always changes the result. The rotation makes the result depend on the order.
pub struct Hash {
    state: u64,
    /// The last bytes, fewer than a word.
    rest: Vec<u8>,
    length: u64,
}

const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

impl Hash {
    /// Of no bytes.
    pub fn new() -> Self {
        Self { state: 0, rest: Vec::with_capacity(8), length: 0 }
    }

    fn word(&mut self, bytes: [u8; 8]) {
        self.state = (self.state ^ u64::from_le_bytes(bytes)).wrapping_mul(ODD).rotate_left(31);
    }

    /// Adds bytes.
    pub fn add(&mut self, mut bytes: &[u8]) {
        self.length += bytes.len() as u64;
        while !self.rest.is_empty() && !bytes.is_empty() {
            self.rest.push(bytes[0]);
            bytes = &bytes[1..];
            if let Ok(word) = <[u8; 8]>::try_from(self.rest.as_slice()) {
                self.word(word);
                self.rest.clear();
            }
        }
        let mut words = bytes.chunks_exact(8);
        for word in &mut words {
            if let Ok(word) = word.try_into() {
                self.word(word);
            }
        }
        self.rest.extend_from_slice(words.remainder());
    }

    /// The number of bytes, and the hash.
    pub fn end(mut self) -> String {
        let mut last = [0; 8];
        last[..self.rest.len()].copy_from_slice(&self.rest);
        self.word(last);
        self.word(self.length.to_le_bytes());
        format!("{} {:016x}", self.length, self.state)
    }
}

/// Parses a decimal number from the command line.
pub fn number(text: &str) -> io::Result<u64> {
    text.parse().map_err(|_| io::Error::other(format!("{text} is not a number")))
}

/// Sends `bytes` bytes that follow from `seed` and waits until the other end has read them all.
/// Prints the length and the hash. With `options` each packet has long options of IPv6.
pub fn send(address: &str, bytes: &str, seed: &str, options: bool) -> io::Result<()> {
    let bytes = number(bytes)?;
    let stream = TcpStream::connect(address)?;
    if options {
        add_options(&stream)?;
    }
    send_while(stream, number(seed)?, |sent| {
        usize::try_from(bytes - sent).unwrap_or(BLOCK).min(BLOCK)
    })
}

/// The same with as many bytes as pass until there is a file `end`, and with a pause after each
/// block: an emulated machine has little time for all else that a test does beside the stream.
pub fn send_until(address: &str, end: &str, seed: &str) -> io::Result<()> {
    const PAUSE: Duration = Duration::from_millis(10);
    let stream = TcpStream::connect(address)?;
    send_while(stream, number(seed)?, |_| {
        thread::sleep(PAUSE);
        if Path::new(end).exists() { 0 } else { BLOCK }
    })
}

/// Sends blocks, each of as many bytes as `next` says by what was sent before, until that is none.
fn send_while(
    mut stream: TcpStream,
    seed: u64,
    mut next: impl FnMut(u64) -> usize,
) -> io::Result<()> {
    let (mut hash, mut sent, mut state) = (Hash::new(), 0u64, seed.wrapping_mul(ODD) | 1);
    let mut block = vec![0u8; BLOCK];
    loop {
        let length = next(sent);
        if length == 0 {
            break;
        }
        for word in block.chunks_exact_mut(8) {
            // xorshift64 has a period of 2^64 - 1, so no block repeats in a test.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        stream.write_all(&block[..length])?;
        hash.add(&block[..length]);
        sent += length as u64;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let ours = hash.end();
    println!("{ours}");
    if answer.trim() == ours {
        Ok(())
    } else {
        Err(io::Error::other(format!("the other end got {answer:?}")))
    }
}

/// Accepts one connection on `address` and reads it to its end. Sends back the length and the hash,
/// and prints them.
pub fn receive(address: &str) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    let (mut stream, _) = listener.accept()?;
    let mut hash = Hash::new();
    let mut block = vec![0u8; BLOCK];
    loop {
        match stream.read(&mut block)? {
            0 => break,
            length => hash.add(&block[..length]),
        }
    }
    let ours = hash.end();
    stream.write_all(ours.as_bytes())?;
    println!("{ours}");
    Ok(())
}
