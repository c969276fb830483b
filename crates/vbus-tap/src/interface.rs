// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Settings of a whole interface, made through a socket.

use std::os::fd::OwnedFd;

use rustix::io;
use rustix::ioctl::Opcode;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::Mac;
use crate::request::Request;

const IFF_UP: u16 = 0x0001;
const ARPHRD_ETHER: u16 = 1;

const SIOCGIFFLAGS: Opcode = 0x8913;
const SIOCSIFFLAGS: Opcode = 0x8914;
const SIOCSIFMTU: Opcode = 0x8922;
const SIOCSIFHWADDR: Opcode = 0x8924;

/// A socket of any kind can set an interface up. A kernel without IPv4 still has UNIX sockets.
fn socket() -> io::Result<OwnedFd> {
    let open = |family| socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    open(AddressFamily::INET).or_else(|_| open(AddressFamily::UNIX))
}

/// Sets the MTU of interface `name`, in bytes. Needs CAP_NET_ADMIN.
pub fn set_mtu(name: &str, mtu: u16) -> io::Result<()> {
    Request::new(name, &i32::from(mtu).to_ne_bytes()).perform::<SIOCSIFMTU>(socket()?)
}

/// Sets the address of interface `name`. Needs CAP_NET_ADMIN.
pub fn set_mac(name: &str, mac: Mac) -> io::Result<()> {
    let [low, high] = ARPHRD_ETHER.to_ne_bytes();
    let value = [low, high, mac[0], mac[1], mac[2], mac[3], mac[4], mac[5]];
    Request::new(name, &value).perform::<SIOCSIFHWADDR>(socket()?)
}

/// Brings interface `name` up if it is down. Only a change needs CAP_NET_ADMIN.
pub fn set_up(name: &str) -> io::Result<()> {
    let socket = socket()?;
    let mut request = Request::new(name, &[]);
    request.perform::<SIOCGIFFLAGS>(&socket)?;
    let flags = u16::from_ne_bytes([request.value[0], request.value[1]]);
    if flags & IFF_UP != 0 {
        return Ok(());
    }
    Request::new(name, &(flags | IFF_UP).to_ne_bytes()).perform::<SIOCSIFFLAGS>(&socket)
}
