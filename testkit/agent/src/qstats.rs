// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The statistics of an interface's queues, as the kernel's family `netdev` of generic netlink has
//! them since Linux 6.9. No tool of Debian 13 shows them.
#![allow(unsafe_code)] // The standard library has no netlink.

use std::ffi::{c_int, c_void};
use std::fs;
use std::io::{self, Error};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const AF_NETLINK: c_int = 16;
const SOCK_RAW: c_int = 3;
const NETLINK_GENERIC: c_int = 16;

/// Types of messages: the last one of a list, an error, and the family that knows the others.
const DONE: u16 = 3;
const ERROR: u16 = 2;
const CONTROLLER: u16 = 16;
/// Flags of a request: one answer, or a list.
const ONE: u16 = 1;
const LIST: u16 = 1 | 0x300;

/// Of the controller: the question for a family, and its attributes.
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

/// Of `netdev`: the question for statistics, and its attributes.
const QSTATS_GET: u8 = 12;
const IFINDEX: u16 = 1;
const QUEUE_TYPE: u16 = 2;
const QUEUE_ID: u16 = 3;
const SCOPE: u16 = 4;
const COUNTERS: [(u16, &str); 4] =
    [(8, "rx-packets"), (9, "rx-bytes"), (10, "tx-packets"), (11, "tx-bytes")];
/// The scope of each queue by itself. Without it the kernel tells of the whole interface.
const OF_QUEUES: u32 = 1;

/// Bytes of the headers of netlink and of generic netlink.
const HEADER: usize = 16;
const BOTH: usize = HEADER + 4;

unsafe extern "C" {
    // Functions of the C library, which the standard library links.
    fn socket(family: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn send(fd: c_int, from: *const c_void, bytes: usize, flags: c_int) -> isize;
    fn recv(fd: c_int, to: *mut c_void, bytes: usize, flags: c_int) -> isize;
}

/// Prints the statistics of `interface`, a line for the whole and one for each half of each queue.
pub fn qstats(interface: &str) -> io::Result<()> {
    let index = fs::read_to_string(format!("/sys/class/net/{interface}/ifindex"))?;
    let index: u32 = index.trim().parse().map_err(Error::other)?;
    // SAFETY: a call without memory. The descriptor is new.
    let socket = unsafe {
        let fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_GENERIC);
        if fd < 0 {
            return Err(Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let name = attribute(FAMILY_NAME, b"netdev\0");
    let family = ask(&socket, CONTROLLER, ONE, GET_FAMILY, &name)?;
    let family = family.first().and_then(|message| get(message, FAMILY_ID));
    let family = family.and_then(|id| u16::try_from(id).ok());
    let family = family.ok_or_else(|| Error::other("the kernel has no family netdev"))?;
    let of = attribute(IFINDEX, &index.to_ne_bytes());
    let mut lines = Vec::new();
    for scope in [Vec::new(), attribute(SCOPE, &OF_QUEUES.to_ne_bytes())] {
        let words = [of.clone(), scope].concat();
        for message in ask(&socket, family, LIST, QSTATS_GET, &words)? {
            if get(&message, IFINDEX) != Some(index.into()) {
                continue;
            }
            let mut line = match (get(&message, QUEUE_TYPE), get(&message, QUEUE_ID)) {
                (Some(0), Some(id)) => format!("rx{id}"),
                (Some(_), Some(id)) => format!("tx{id}"),
                _ => "all".to_owned(),
            };
            for (counter, name) in COUNTERS {
                if let Some(count) = get(&message, counter) {
                    line += &format!(" {name} {count}");
                }
            }
            lines.push(line);
        }
    }
    lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}

/// An attribute, with the bytes that fill it up to a multiple of 4.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The value of an attribute of a message of generic netlink. It is a number.
fn get(message: &[u8], kind: u16) -> Option<u64> {
    let mut left = message.get(BOTH..)?;
    loop {
        let [a, b, c, d, ..] = *left else { return None };
        let (length, found) = (u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]));
        let value = left.get(4..usize::from(length))?;
        if found == kind {
            return value
                .iter()
                .rev()
                .try_fold(0u64, |n, byte| n.checked_mul(256).map(|n| n + u64::from(*byte)));
        }
        left = left.get(usize::from(length).next_multiple_of(4)..)?;
    }
}

/// Asks, and returns the messages of the answer.
fn ask(
    socket: &OwnedFd,
    family: u16,
    flags: u16,
    command: u8,
    attributes: &[u8],
) -> io::Result<Vec<Vec<u8>>> {
    let length = u32::try_from(BOTH + attributes.len()).map_err(Error::other)?;
    let mut request = length.to_ne_bytes().to_vec();
    request.extend([family, flags].map(u16::to_ne_bytes).concat());
    // No number of the request, and none of this socket: there is one request at a time.
    request.extend([0; 8]);
    request.extend([command, 1, 0, 0]);
    request.extend(attributes);
    // SAFETY: so many bytes are there.
    let sent = unsafe { send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
    if sent < 0 {
        return Err(Error::last_os_error());
    }
    let mut answers = Vec::new();
    loop {
        let mut bytes = vec![0u8; 1 << 16];
        // SAFETY: there is room for so many bytes.
        let length = unsafe { recv(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        bytes.truncate(usize::try_from(length).map_err(|_| Error::last_os_error())?);
        let mut left = bytes.as_slice();
        while let [a, b, c, d, e, f, ..] = *left {
            let length = u32::from_ne_bytes([a, b, c, d]) as usize;
            let kind = u16::from_ne_bytes([e, f]);
            let message = left.get(..length).ok_or_else(|| Error::other("a message is cut off"))?;
            match kind {
                DONE => return Ok(answers),
                ERROR => {
                    let code = message.get(HEADER..BOTH).and_then(|code| code.try_into().ok());
                    return match code.map(i32::from_ne_bytes) {
                        Some(0) => Ok(answers),
                        code => Err(Error::from_raw_os_error(-code.unwrap_or(0))),
                    };
                }
                _ => answers.push(message.to_vec()),
            }
            left = left.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        if flags == ONE {
            return Ok(answers);
        }
    }
}
