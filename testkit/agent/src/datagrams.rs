// SPDX-License-Identifier: Apache-2.0 OR MIT
//! UDP: messages that the network segments on the way, datagrams of many flows, and what comes.

use std::ffi::c_int;
use std::io::{self, Error, Write};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::Duration;

use crate::option;
use crate::stream::number;

const IPPROTO_UDP: c_int = 17;
const UDP_SEGMENT: c_int = 103;

/// The most bytes of a message.
const MESSAGE_MAX: usize = 60_000;

/// How long an end waits for the other one.
const LIMIT: Duration = Duration::from_secs(120);

/// The bytes of message `index`: no two places in it and in the next ones are the same for long.
fn message(index: u64, bytes: usize) -> Vec<u8> {
    let word = |at: u64| (index << 32 | at).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    (0..).flat_map(word).take(bytes).collect()
}

fn size(text: &str) -> io::Result<usize> {
    let bytes = usize::try_from(number(text)?).map_err(Error::other)?;
    if bytes == 0 || bytes > MESSAGE_MAX {
        return Err(Error::other(format!("a message has 1 to {MESSAGE_MAX} bytes")));
    }
    Ok(bytes)
}

/// Sends `count` messages of `bytes` bytes, each by one call of the system, which makes datagrams
/// of `segment` bytes of it. The receiver answers each message.
pub fn send(address: &str, count: &str, bytes: &str, segment: &str) -> io::Result<()> {
    let (count, bytes, segment) = (number(count)?, size(bytes)?, size(segment)?);
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(LIMIT))?;
    let segment = c_int::try_from(segment).map_err(Error::other)?;
    option::set(&socket, (IPPROTO_UDP, UDP_SEGMENT), &segment.to_ne_bytes())?;
    for index in 0..count {
        socket.send(&message(index, bytes))?;
        let mut answer = [0; 8];
        let length = socket.recv(&mut answer)?;
        if answer[..length] != index.to_le_bytes() {
            return Err(Error::other(format!("the answer to message {index} is {answer:?}")));
        }
    }
    println!("sent {count}");
    Ok(())
}

/// Receives what [`send`] sends, in datagrams of `segment` bytes. Compares each byte.
pub fn receive(address: &str, count: &str, bytes: &str, segment: &str) -> io::Result<()> {
    let (count, bytes, segment) = (number(count)?, size(bytes)?, size(segment)?);
    let socket = UdpSocket::bind(address)?;
    socket.set_read_timeout(Some(LIMIT))?;
    tell("ready")?;
    let mut datagram = vec![0; MESSAGE_MAX + 1];
    for index in 0..count {
        let message = message(index, bytes);
        for (at, expected) in message.chunks(segment).enumerate() {
            let (length, from) = socket.recv_from(&mut datagram)?;
            if &datagram[..length] != expected {
                return Err(Error::other(format!(
                    "datagram {at} of message {index} has {length} bytes of {}, or others",
                    expected.len()
                )));
            }
            if (at + 1) * segment >= bytes {
                socket.send_to(&index.to_le_bytes(), from)?;
            }
        }
    }
    println!("received {count}");
    Ok(())
}

/// Sends `count` datagrams, each from a port of its own. No answer is expected.
pub fn throw(address: &str, count: &str) -> io::Result<()> {
    let address: SocketAddrV4 = address.parse().map_err(Error::other)?;
    // All are open at once, so no two have the same port.
    let sockets = (0..number(count)?).map(|_| UdpSocket::bind("0.0.0.0:0"));
    for socket in sockets.collect::<io::Result<Vec<_>>>()? {
        socket.send_to(b"thrown", address)?;
    }
    Ok(())
}

/// Prints each datagram that comes, until somebody ends this. A member of the group, if the address
/// is one of a group; `interface` is then the address of the interface.
pub fn print(address: &str, interface: &str) -> io::Result<()> {
    let address: SocketAddrV4 = address.parse().map_err(Error::other)?;
    let socket = UdpSocket::bind(address)?;
    if address.ip().is_multicast() {
        let interface: Ipv4Addr = interface.parse().map_err(Error::other)?;
        socket.join_multicast_v4(address.ip(), &interface)?;
    }
    tell("ready")?;
    let mut datagram = vec![0; MESSAGE_MAX];
    loop {
        let length = socket.recv(&mut datagram)?;
        tell(String::from_utf8_lossy(&datagram[..length]).trim_end())?;
    }
}

/// Prints a line now: whoever waits for it reads a pipe.
fn tell(line: &str) -> io::Result<()> {
    println!("{line}");
    io::stdout().flush()
}
