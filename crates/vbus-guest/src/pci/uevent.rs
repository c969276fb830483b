// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel's messages about changes of devices.

use std::os::fd::OwnedFd;

use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};

/// The multicast group of the kernel's own messages. udev uses another group.
const KERNEL: u32 = 1;

/// Makes a socket that becomes readable with every change of a device.
pub fn listen() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(KOBJECT_UEVENT))?;
    bind(&socket, &SocketAddrNetlink::new(0, KERNEL))?;
    Ok(socket)
}
