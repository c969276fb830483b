// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A queue of a TAP interface: a descriptor of /dev/net/tun.
#![allow(unsafe_code)] // ioctl.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::{self, Errno};
use rustix::ioctl::{IntegerSetter, Opcode, Setter, ioctl, opcode};

use crate::request::Request;
use crate::{HEADER_BYTES, Mac, Offloads, is_group};

const IFF_TAP: u16 = 0x0002;
const IFF_NAPI: u16 = 0x0010;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

const TUN_F: [(Offloads, usize); 5] = [
    (Offloads::CSUM, 0x01),
    (Offloads::TSO4, 0x02),
    (Offloads::TSO6, 0x04),
    (Offloads::ECN, 0x08),
    // The kernel takes UDP segmentation over IPv4 and IPv6 only together.
    (Offloads::USO, 0x20 | 0x40),
];

const TUN_FLT_ALLMULTI: u16 = 0x0001;

const TUNSETIFF: Opcode = opcode::write::<i32>(b'T', 202);
const TUNSETOFFLOAD: Opcode = opcode::write::<u32>(b'T', 208);
const TUNSETTXFILTER: Opcode = opcode::write::<u32>(b'T', 209);
const TUNSETVNETHDRSZ: Opcode = opcode::write::<i32>(b'T', 216);
const TUNSETQUEUE: Opcode = opcode::write::<i32>(b'T', 217);
const TUNSETVNETLE: Opcode = opcode::write::<i32>(b'T', 220);
const TUNSETCARRIER: Opcode = opcode::write::<i32>(b'T', 226);

/// The numbers of the ioctls that a [`Queue`] needs after it was attached. A filter of system calls
/// allows them.
pub const QUEUE_IOCTLS: [u32; 4] = [TUNSETOFFLOAD, TUNSETTXFILTER, TUNSETQUEUE, TUNSETCARRIER];

fn set<const OPCODE: Opcode>(fd: &OwnedFd, value: i32) -> io::Result<()> {
    // SAFETY: every opcode that this is used with takes a pointer to an int.
    unsafe { ioctl(fd, Setter::<OPCODE, i32>::new(value)) }
}

/// The most addresses of [`Queue::set_filter`].
pub const FILTERED_MAX: usize = 256;

/// The first addresses are compared whole (`FLT_EXACT_COUNT` of the kernel).
const EXACT: usize = 8;

/// `struct tun_filter`, with room for the addresses.
#[repr(C)]
struct TunFilter {
    flags: u16,
    count: u16,
    addresses: [Mac; FILTERED_MAX],
}

/// How an interface is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Setup {
    /// The interface may have several queues.
    pub multi_queue: bool,
    /// A written frame passes GRO within the write call, not through the kernel's backlog. A guest
    /// with one CPU then receives TCP 1.5 times as fast.
    pub napi: bool,
}

/// A queue of a TAP interface. The kernel removes the interface with its last queue, unless it is
/// persistent.
#[derive(Debug)]
pub struct Queue {
    fd: OwnedFd,
    multi_queue: bool,
}

impl Queue {
    /// Attaches a queue to interface `name` (1 to 15 bytes). The kernel creates the interface if it
    /// does not exist, and replaces a `%d` in its name by a number. Returns the queue and the
    /// interface's name.
    ///
    /// [`advice`] says what an error most likely means.
    pub fn attach(name: &str, setup: Setup) -> io::Result<(Queue, String)> {
        match Queue::attach_once(name, setup) {
            // An interface that was created with several queues needs the flag for several queues.
            Err(Errno::INVAL) if !setup.multi_queue => {
                Queue::attach_once(name, Setup { multi_queue: true, ..setup })
            }
            other => other,
        }
    }

    fn attach_once(name: &str, setup: Setup) -> io::Result<(Queue, String)> {
        let open = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::open("/dev/net/tun", open, Mode::empty())?;
        let mut flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        flags |= if setup.multi_queue { IFF_MULTI_QUEUE } else { 0 };
        flags |= if setup.napi { IFF_NAPI } else { 0 };
        let mut request = Request::new(name, &flags.to_ne_bytes());
        request.perform::<TUNSETIFF>(&fd)?;
        set::<TUNSETVNETHDRSZ>(&fd, i32::try_from(HEADER_BYTES).unwrap_or(0))?;
        set::<TUNSETVNETLE>(&fd, 1)?;
        Ok((Queue { fd, multi_queue: setup.multi_queue }, request.name()))
    }

    /// The queue whose descriptor another process has attached ([`attach`](Self::attach)) and
    /// handed over. `multi_queue`: the interface may have several queues.
    pub fn from_descriptor(fd: OwnedFd, multi_queue: bool) -> Queue {
        Queue { fd, multi_queue }
    }

    /// Tells the kernel which checksums and segments it may leave to the reader. [`Errno::INVAL`]:
    /// this kernel does not know one of the offloads.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let wanted = TUN_F.iter().filter(|(offload, _)| offloads.contains(*offload));
        let flags = wanted.fold(0, |flags, (_, bits)| flags | bits);
        // SAFETY: the request takes its argument as a number.
        unsafe { ioctl(&self.fd, IntegerSetter::<TUNSETOFFLOAD>::new_usize(flags)) }
    }

    /// Lets the kernel put only frames to these addresses into the interface's queues, and with
    /// `all_multicast` those to any group address. The kernel compares eight addresses. Further
    /// group addresses it finds by a hash, so that a few others pass too. `None`: all frames pass;
    /// so do they if the kernel cannot hold so many addresses ([`FILTERED_MAX`], eight of them
    /// unicast).
    pub fn set_filter(&self, filter: Option<(&[Mac], bool)>) -> io::Result<()> {
        let (addresses, all_multicast) = filter.unwrap_or_default();
        let mut filter =
            TunFilter { flags: 0, count: 0, addresses: [Mac::default(); FILTERED_MAX] };
        // Those that only an exact comparison finds come first.
        let of = |group| addresses.iter().filter(move |mac| is_group(**mac) == group);
        let unicast = of(false).count();
        if unicast <= EXACT && addresses.len() <= FILTERED_MAX {
            for (place, mac) in filter.addresses.iter_mut().zip(of(false).chain(of(true))) {
                *place = *mac;
                filter.count += 1;
            }
            filter.flags = if all_multicast { TUN_FLT_ALLMULTI } else { 0 };
        }
        // SAFETY: the request reads the structure, as many addresses as it counts.
        unsafe { ioctl(&self.fd, Setter::<TUNSETTXFILTER, TunFilter>::new(filter)) }
    }

    /// Returns the offloads that this kernel knows. After this call none is set.
    pub fn known_offloads(&self) -> Offloads {
        // USO came with Linux 6.2.
        let sets = [Offloads::ALL, Offloads::CSUM | Offloads::TSO, Offloads::CSUM];
        let known = sets.into_iter().find(|set| self.set_offloads(*set).is_ok());
        let _ = self.set_offloads(Offloads::NONE); // It fails only if every set fails.
        known.unwrap_or(Offloads::NONE)
    }

    /// Whether the interface may have several queues.
    pub fn is_multi_queue(&self) -> bool {
        self.multi_queue
    }

    /// Enables or disables this queue in the kernel. The interface must have several queues.
    pub fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        let flag = if enabled { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        match Request::new("", &flag.to_ne_bytes()).perform::<TUNSETQUEUE>(&self.fd) {
            Err(Errno::INVAL) => Ok(()), // The queue is in that state already.
            other => other,
        }
    }

    /// Sets the carrier of the interface. Kernels before 5.0 refuse; there the carrier is always
    /// on.
    pub fn set_carrier(&self, up: bool) -> io::Result<()> {
        set::<TUNSETCARRIER>(&self.fd, i32::from(up))
    }

    /// Another descriptor of the same queue.
    pub fn try_clone(&self) -> std::io::Result<Queue> {
        Ok(Queue { fd: self.fd.try_clone()?, multi_queue: self.multi_queue })
    }
}

impl From<Queue> for OwnedFd {
    fn from(queue: Queue) -> OwnedFd {
        queue.fd
    }
}

impl AsFd for Queue {
    /// The descriptor, which is non-blocking.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What an error of [`Queue::attach`] most likely means, and what to do.
pub fn advice(error: Errno) -> &'static str {
    match error {
        Errno::PERM | Errno::ACCESS => {
            "you need CAP_NET_ADMIN, or root must first run `ip tuntap add ... user NAME`"
        }
        Errno::NOENT | Errno::NODEV => {
            "the kernel has no /dev/net/tun: load it with `modprobe tun`"
        }
        Errno::BUSY => "another program uses it",
        Errno::INVAL => {
            "an interface of that name exists, but is not a TAP interface or has other queues"
        }
        _ => "the kernel refused",
    }
}
