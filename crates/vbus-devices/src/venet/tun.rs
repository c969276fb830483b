//! The kernel's TUN/TAP interface: what is asked of it by ioctl
//! (Documentation/networking/tuntap.rst of Linux).
#![allow(unsafe_code)] // ioctl.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::io::{self, Errno};
use rustix::ioctl::{IntegerSetter, Opcode, Setter, Updater, ioctl, opcode};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use vbus_core::shm::abi::venet::{F_CSUM, F_TSO, F_USO, HEADER_BYTES};

const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_UP: u16 = 0x0001;

const TUN_F_CSUM: usize = 0x01;
const TUN_F_TSO4: usize = 0x02;
const TUN_F_TSO6: usize = 0x04;
const TUN_F_TSO_ECN: usize = 0x08;
const TUN_F_USO4: usize = 0x20;
const TUN_F_USO6: usize = 0x40;

const TUNSETIFF: Opcode = opcode::write::<i32>(b'T', 202);
const TUNSETOFFLOAD: Opcode = opcode::write::<u32>(b'T', 208);
const TUNSETVNETHDRSZ: Opcode = opcode::write::<i32>(b'T', 216);
const TUNSETQUEUE: Opcode = opcode::write::<i32>(b'T', 217);
const TUNSETVNETLE: Opcode = opcode::write::<i32>(b'T', 220);
const TUNSETCARRIER: Opcode = opcode::write::<i32>(b'T', 226);
const SIOCGIFFLAGS: Opcode = 0x8913;
const SIOCSIFFLAGS: Opcode = 0x8914;
const SIOCSIFMTU: Opcode = 0x8922;

/// `struct ifreq`: a name, and what belongs to the request.
#[repr(C)]
#[derive(Clone, Copy)]
struct Request {
    name: [u8; 16],
    value: [u8; 24],
}

impl Request {
    fn new(name: &str, value: &[u8]) -> Request {
        let mut request = Request { name: [0; 16], value: [0; 24] };
        let len = name.len().min(15);
        request.name[..len].copy_from_slice(&name.as_bytes()[..len]);
        request.value[..value.len()].copy_from_slice(value);
        request
    }
}

fn update<const OPCODE: Opcode>(fd: &OwnedFd, request: &mut Request) -> io::Result<()> {
    // SAFETY: every opcode that this is used with takes a pointer to an ifreq, and writes nothing
    // beyond it.
    unsafe { ioctl(fd, Updater::<OPCODE, Request>::new(request)) }
}

fn set<const OPCODE: Opcode>(fd: &OwnedFd, value: i32) -> io::Result<()> {
    // SAFETY: every opcode that this is used with takes a pointer to an int.
    unsafe { ioctl(fd, Setter::<OPCODE, i32>::new(value)) }
}

/// A queue of a TAP interface.
pub struct Tun {
    /// To read and write frames with their headers.
    pub fd: OwnedFd,
    multi: bool,
}

impl Tun {
    /// Attaches a queue to interface `name`, which is made if it is not there (a `%d` in it becomes
    /// a number). Returns the interface's name.
    pub fn attach(name: &str, multi: bool) -> io::Result<(Tun, String)> {
        let open = || {
            let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
            rustix::fs::open("/dev/net/tun", flags, Mode::empty())
        };
        let attach = |multi: bool| {
            let fd = open()?;
            let flags =
                IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | if multi { IFF_MULTI_QUEUE } else { 0 };
            let mut request = Request::new(name, &flags.to_ne_bytes());
            update::<TUNSETIFF>(&fd, &mut request)?;
            let len = request.name.iter().position(|b| *b == 0).unwrap_or(request.name.len());
            let real = String::from_utf8_lossy(&request.name[..len]).into_owned();
            Ok((Tun { fd, multi }, real))
        };
        let (tun, name) = match attach(multi) {
            // An interface that was made for several queues takes no other.
            Err(Errno::INVAL) if !multi => attach(true),
            other => other,
        }?;
        set::<TUNSETVNETHDRSZ>(&tun.fd, i32::try_from(HEADER_BYTES).unwrap_or(0))?;
        set::<TUNSETVNETLE>(&tun.fd, 1)?;
        Ok((tun, name))
    }

    /// Says what the reader takes: which checksums and segments the kernel may leave to it.
    pub fn set_offload(&self, features: u64) -> io::Result<()> {
        let mut flags = 0;
        for (feature, bits) in [
            (F_CSUM, TUN_F_CSUM),
            (F_TSO, TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN),
            (F_USO, TUN_F_USO4 | TUN_F_USO6),
        ] {
            flags |= if features & feature != 0 { bits } else { 0 };
        }
        // SAFETY: the request takes its argument as a number.
        unsafe { ioctl(&self.fd, IntegerSetter::<TUNSETOFFLOAD>::new_usize(flags)) }
    }

    /// The features that this kernel can deal with.
    pub fn features(&self) -> u64 {
        let known = [F_CSUM | F_TSO | F_USO, F_CSUM | F_TSO, F_CSUM];
        let features =
            known.into_iter().find(|features| self.set_offload(*features).is_ok()).unwrap_or(0);
        let _ = self.set_offload(0); // Fails only where everything does.
        features
    }

    /// Whether frames come to this queue. Only for interfaces of several queues.
    pub fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        let flag = if enabled { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        match update::<TUNSETQUEUE>(&self.fd, &mut Request::new("", &flag.to_ne_bytes())) {
            Err(Errno::INVAL) => Ok(()), // It is as it should be.
            other => other,
        }
    }

    /// Whether the interface may have several queues.
    pub fn is_multi(&self) -> bool {
        self.multi
    }

    /// Plugs the interface's cable in or out.
    pub fn set_carrier(&self, up: bool) -> io::Result<()> {
        set::<TUNSETCARRIER>(&self.fd, i32::from(up))
    }
}

/// Sets the interface's MTU and brings it up.
pub fn configure(name: &str, mtu: u16) -> std::io::Result<()> {
    let socket = rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    update::<SIOCSIFMTU>(&socket, &mut Request::new(name, &i32::from(mtu).to_ne_bytes()))?;
    let mut request = Request::new(name, &[]);
    update::<SIOCGIFFLAGS>(&socket, &mut request)?;
    let flags = u16::from_ne_bytes([request.value[0], request.value[1]]);
    if flags & IFF_UP == 0 {
        update::<SIOCSIFFLAGS>(&socket, &mut Request::new(name, &(flags | IFF_UP).to_ne_bytes()))?;
    }
    Ok(())
}

/// What an error of [`Tun::attach`] most likely means.
pub fn advice(error: Errno) -> &'static str {
    match std::io::Error::from(error).kind() {
        ErrorKind::PermissionDenied => {
            "making or using it needs CAP_NET_ADMIN, or `ip tuntap add ... user NAME` by root first"
        }
        ErrorKind::NotFound => "the kernel has no /dev/net/tun: modprobe tun",
        ErrorKind::ResourceBusy => "another program uses it",
        ErrorKind::InvalidInput => {
            "there is an interface of that name which is no TAP, or has other queues"
        }
        _ => "the kernel refused",
    }
}
