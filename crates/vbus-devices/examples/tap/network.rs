// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A network of this process's own, so that the measured interfaces carry no other frames.
#![allow(unsafe_code)] // unshare.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::process::Command;

use rustix::io::Errno;
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Enters a fresh network namespace. Call it before any thread is started.
///
/// # Errors
/// The process may make neither a network namespace nor a user namespace for it.
pub fn enter() -> Result<(), String> {
    let unshare = |flags| {
        // SAFETY: the descriptor table stays shared.
        unsafe { unshare_unsafe(flags) }
    };
    let (net, user) = (UnshareFlags::NEWNET, UnshareFlags::NEWUSER);
    match unshare(net) {
        Err(Errno::PERM) => unshare(net | user),
        result => result,
    }
    .map_err(|error| format!("no network of its own without root or user namespaces: {error}"))?;
    // The kernel would send frames of IPv6 on its own.
    let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"); // There may be none.
    Ok(())
}

/// The subnet `net` of interface `name`: the interface has a neighbour with the address of the
/// frames to it, and room for `frames` frames to the neighbour. Returns a socket that sends frames
/// to it.
///
/// # Errors
/// iproute2 is not there, or refuses.
pub fn set_up(name: &str, net: u8, neighbour: [u8; 6], frames: usize) -> Result<UdpSocket, String> {
    let mac = vbus_tap::show_mac(neighbour);
    for command in [
        format!("link set {name} txqueuelen {frames}"),
        format!("addr add 10.79.{net}.1/24 dev {name}"),
        format!("neigh replace 10.79.{net}.2 lladdr {mac} dev {name}"),
    ] {
        let output = Command::new("ip")
            .args(command.split(' '))
            .output()
            .map_err(|error| format!("it needs the program `ip` of iproute2: {error}"))?;
        if !output.status.success() {
            return Err(format!("ip {command}: {}", String::from_utf8_lossy(&output.stderr)));
        }
    }
    let socket = UdpSocket::bind((Ipv4Addr::new(10, 79, net, 1), 0));
    let connect =
        |socket: UdpSocket| socket.connect((Ipv4Addr::new(10, 79, net, 2), 5555)).map(|()| socket);
    socket.and_then(connect).map_err(|error| format!("no socket on {name}: {error}"))
}
