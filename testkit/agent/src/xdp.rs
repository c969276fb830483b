// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lets a program of XDP run on an interface, in its driver, until this process ends.
//!
//! `back` and `around` answer frames of IPv4 in place of the system: they swap the addresses. With
//! `back` the driver sends the frame again, with `around` the kernel redirects it to the same
//! interface. So a ping to the interface's address comes back as the ping of the pinging system
//! itself, and its answer too.
#![allow(unsafe_code)] // The system call bpf.

use std::ffi::c_long;
use std::fs;
use std::io::{Error, ErrorKind, Result};
use std::thread;

const BPF: c_long = 321;
const PROG_LOAD: c_long = 5;
const LINK_CREATE: c_long = 28;
const TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
/// In the driver, not behind it.
const IN_DRIVER: u32 = 1 << 2;

const DROP: i32 = 1;
const PASS: i32 = 2;
const BACK: i32 = 3;
/// The helper `bpf_redirect`.
const REDIRECT: i32 = 23;

/// The attributes of a call, as 64-bit words.
#[repr(C, align(8))]
struct Attributes([u32; 32]);

unsafe extern "C" {
    fn syscall(
        number: c_long,
        command: c_long,
        attributes: *const Attributes,
        bytes: c_long,
    ) -> c_long;
}

/// Runs the program `what` on `interface`. It ends with this process.
pub fn xdp(interface: &str, what: &str) -> Result<()> {
    let index = fs::read_to_string(format!("/sys/class/net/{interface}/ifindex"))?;
    let index: i32 = index.trim().parse().map_err(|_| ErrorKind::InvalidData)?;
    let program = match what {
        "pass" => vec![set(0, PASS), EXIT],
        "drop" => vec![set(0, DROP), EXIT],
        "back" => answer(&[set(0, BACK), EXIT]),
        "around" => answer(&[set(1, index), set(2, 0), op(0x85, 0, 0, 0, REDIRECT), EXIT]),
        _ => return Err(Error::new(ErrorKind::InvalidInput, "pass, drop, back or around")),
    };
    let mut log = vec![0u8; 65536];
    let license = b"GPL\0";
    let mut load = Attributes([0; 32]);
    let count = u32::try_from(program.len()).map_err(|_| ErrorKind::InvalidInput)?;
    (load.0[0], load.0[1]) = (TYPE_XDP, count);
    address(&mut load, 2, program.as_ptr() as u64);
    address(&mut load, 4, license.as_ptr() as u64);
    (load.0[6], load.0[7]) = (1, 65536);
    address(&mut load, 8, log.as_mut_ptr() as u64);
    let program = call(PROG_LOAD, &load).map_err(|error| {
        Error::new(error.kind(), format!("{error}: {}", String::from_utf8_lossy(&log)))
    })?;
    let mut link = Attributes([0; 32]);
    link.0[..4].copy_from_slice(&[program, index as u32, ATTACH_XDP, IN_DRIVER]);
    call(LINK_CREATE, &link)?;
    println!("on");
    loop {
        thread::park();
    }
}

fn address(attributes: &mut Attributes, at: usize, value: u64) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    attributes.0[at] = u32::from_le_bytes([a, b, c, d]);
    attributes.0[at + 1] = u32::from_le_bytes([e, f, g, h]);
}

fn call(command: c_long, attributes: &Attributes) -> Result<u32> {
    // SAFETY: the attributes are larger than the kernel's, and zero where this program sets none.
    // What they name is valid during the call.
    let result = unsafe { syscall(BPF, command, attributes, size_of::<Attributes>() as c_long) };
    u32::try_from(result).map_err(|_| Error::last_os_error())
}

/// An instruction: operation, registers, offset, value.
fn op(code: u8, to: u8, from: u8, offset: i16, value: i32) -> u64 {
    let [a, b] = offset.to_le_bytes();
    let [c, d, e, f] = value.to_le_bytes();
    u64::from_le_bytes([code, to | from << 4, a, b, c, d, e, f])
}

fn set(register: u8, value: i32) -> u64 {
    op(0xb7, register, 0, 0, value)
}

const EXIT: u64 = 0x95;

/// Swaps the addresses of a frame of IPv4, and goes on with `then`. Other frames pass.
fn answer(then: &[u64]) -> Vec<u64> {
    const W: u8 = 0x61;
    const H: u8 = 0x69;
    const STORE: u8 = 0x02;
    let load = |size: u8, to, offset| op(size, to, 2, offset, 0);
    let store = |size: u8, from, offset| op(size + STORE, 2, from, offset, 0);
    let mut body = vec![
        // Destination and source of Ethernet.
        load(W, 5, 0),
        load(H, 6, 4),
        load(W, 7, 6),
        load(H, 8, 10),
        store(W, 7, 0),
        store(H, 8, 4),
        store(W, 5, 6),
        store(H, 6, 10),
        // Source and destination of IPv4: the checksum stays right.
        load(W, 5, 26),
        load(W, 6, 30),
        store(W, 6, 26),
        store(W, 5, 30),
    ];
    body.extend(then);
    let behind = i16::try_from(body.len()).unwrap_or(i16::MAX);
    let mut program = vec![
        // The frame's beginning and end.
        op(W, 2, 1, 0, 0),
        op(W, 3, 1, 4, 0),
        op(0xbf, 4, 2, 0, 0),
        op(0x07, 4, 0, 0, 34),
        op(0x2d, 4, 3, behind + 2, 0),
        load(H, 5, 12),
        op(0x55, 5, 0, behind, 0x0008),
    ];
    program.extend(body);
    program.extend([set(0, PASS), EXIT]);
    program
}
