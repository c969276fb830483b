// SPDX-License-Identifier: Apache-2.0 OR MIT
//! vhost-net: the kernel carries frames between a TAP queue and a pair of virtqueues (split ones).
//! After the set-up no program has a part in a frame.
//!
//! The order of the calls is that of the kernel's interface (linux/vhost.h): an owner first; then
//! features and memory; then for each ring its size, position, addresses and eventfds; at last its
//! back end.
#![allow(unsafe_code)] // ioctl.

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::{self, Errno};
use rustix::ioctl::{self as sys, Ioctl, IoctlOutput, NoArg, Opcode, Setter, Updater, opcode};

/// The type of all requests.
const VIRTIO: u8 = 0xaf;

const GET_FEATURES: Opcode = opcode::read::<u64>(VIRTIO, 0x00);
const SET_FEATURES: Opcode = opcode::write::<u64>(VIRTIO, 0x00);
const SET_OWNER: Opcode = opcode::none(VIRTIO, 0x01);
const RESET_OWNER: Opcode = opcode::none(VIRTIO, 0x02);
/// The size is that of the table without its regions.
const SET_MEM_TABLE: Opcode = opcode::write::<u64>(VIRTIO, 0x03);
const SET_VRING_NUM: Opcode = opcode::write::<RingState>(VIRTIO, 0x10);
const SET_VRING_ADDR: Opcode = opcode::write::<RingAddresses>(VIRTIO, 0x11);
const SET_VRING_BASE: Opcode = opcode::write::<RingState>(VIRTIO, 0x12);
const GET_VRING_BASE: Opcode = opcode::read_write::<RingState>(VIRTIO, 0x12);
const SET_VRING_KICK: Opcode = opcode::write::<RingFile>(VIRTIO, 0x20);
const SET_VRING_CALL: Opcode = opcode::write::<RingFile>(VIRTIO, 0x21);
const SET_VRING_ERR: Opcode = opcode::write::<RingFile>(VIRTIO, 0x22);
const NET_SET_BACKEND: Opcode = opcode::write::<RingFile>(VIRTIO, 0x30);

/// The numbers of the ioctls of a [`Vhost`]. A filter of system calls allows them.
pub const VHOST_IOCTLS: [u32; 13] = [
    GET_FEATURES,
    SET_FEATURES,
    SET_OWNER,
    RESET_OWNER,
    SET_MEM_TABLE,
    SET_VRING_NUM,
    SET_VRING_ADDR,
    SET_VRING_BASE,
    GET_VRING_BASE,
    SET_VRING_KICK,
    SET_VRING_CALL,
    SET_VRING_ERR,
    NET_SET_BACKEND,
];

/// `struct vhost_vring_state`.
#[repr(C)]
struct RingState {
    index: u32,
    number: u32,
}

/// `struct vhost_vring_file`. The descriptor -1 ends what the request begins.
#[repr(C)]
struct RingFile {
    index: u32,
    fd: i32,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
struct RingAddresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// Which ring of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VhostRing {
    /// The one with buffers for frames to the driver.
    Rx = 0,
    /// The one with frames from the driver.
    Tx = 1,
}

/// A part of the driver's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VhostRegion {
    /// Its address for the driver.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Its address in this process.
    pub host: u64,
}

/// The addresses of a ring in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingPlace {
    /// Descriptors: a power of two.
    pub size: u16,
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
}

/// The table of memory, as the kernel reads it: the number of regions, and four words for each.
struct Table(Vec<u64>);

// SAFETY: the request reads the words, as many as the first one says, and writes nothing.
unsafe impl Ioctl for Table {
    type Output = ();
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        SET_MEM_TABLE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.0.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> io::Result<()> {
        Ok(())
    }
}

/// A descriptor of /dev/vhost-net: the kernel's end of one queue pair.
#[derive(Debug)]
pub struct Vhost(OwnedFd);

impl Vhost {
    /// Opens /dev/vhost-net. [`advice`](vhost_advice) says what an error most likely means.
    pub fn open() -> io::Result<Vhost> {
        rustix::fs::open("/dev/vhost-net", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map(Vhost)
    }

    /// The end whose descriptor another process has opened and handed over.
    pub fn from_descriptor(fd: OwnedFd) -> Vhost {
        Vhost(fd)
    }

    /// The feature bits that the kernel knows, of the rings and of the card.
    pub fn features(&self) -> io::Result<u64> {
        // SAFETY: the request writes 64 bits.
        unsafe { sys::ioctl(&self.0, sys::Getter::<GET_FEATURES, u64>::new()) }
    }

    /// This process has the memory that is meant from now on. The kernel makes a worker for it.
    pub fn set_owner(&self) -> io::Result<()> {
        // SAFETY: the request has no argument.
        unsafe { sys::ioctl(&self.0, NoArg::<SET_OWNER>::new()) }
    }

    /// Ends all: the back ends, the memory, the eventfds and the worker. When this returns, the
    /// kernel touches no memory any more.
    pub fn reset_owner(&self) -> io::Result<()> {
        // SAFETY: the request has no argument.
        unsafe { sys::ioctl(&self.0, NoArg::<RESET_OWNER>::new()) }
    }

    /// The features that the driver has accepted, of those that the kernel knows.
    pub fn set_features(&self, features: u64) -> io::Result<()> {
        // SAFETY: the request reads 64 bits.
        unsafe { sys::ioctl(&self.0, Setter::<SET_FEATURES, u64>::new(features)) }
    }

    /// Replaces the memory in which the rings' buffers lie. When this returns, the kernel touches
    /// nothing of the former table. [`Errno::TOOBIG`]: the kernel takes fewer regions (64, unless
    /// its module has the parameter `max_mem_regions`).
    ///
    /// # Safety
    /// The kernel writes to the regions whenever it likes, until this call or
    /// [`reset_owner`](Self::reset_owner) takes them away. So they must be mapped until then, and
    /// be memory that others write too: it is read by atomic accesses, raw copies and system calls
    /// alone.
    pub unsafe fn set_memory(&self, regions: &[VhostRegion]) -> io::Result<()> {
        let mut words = Vec::with_capacity(1 + 4 * regions.len());
        words.push(u64::from(u32::try_from(regions.len()).map_err(|_| Errno::TOOBIG)?));
        for region in regions {
            words.extend([region.start, region.len, region.host, 0]);
        }
        // SAFETY: `Table` fits the request. The caller vouches for the regions.
        unsafe { sys::ioctl(&self.0, Table(words)) }
    }

    /// Puts a ring at `place`. Its next available buffer is the one with this index (modulo 2^16).
    /// The ring must have no back end.
    ///
    /// # Safety
    /// The ring's memory is as that of [`set_memory`](Self::set_memory), until the ring has another
    /// place or [`reset_owner`](Self::reset_owner) is called.
    pub unsafe fn set_ring(&self, ring: VhostRing, place: &RingPlace, next: u16) -> io::Result<()> {
        let index = ring as u32;
        let number = |number: u16| RingState { index, number: number.into() };
        let addresses = RingAddresses {
            index,
            flags: 0,
            descriptors: place.descriptors,
            used: place.used,
            available: place.available,
            log: 0,
        };
        // SAFETY: each request reads its structure. The caller vouches for the addresses.
        unsafe {
            sys::ioctl(&self.0, Setter::<SET_VRING_NUM, _>::new(number(place.size)))?;
            sys::ioctl(&self.0, Setter::<SET_VRING_BASE, _>::new(number(next)))?;
            sys::ioctl(&self.0, Setter::<SET_VRING_ADDR, _>::new(addresses))
        }
    }

    /// The index of the next available buffer of a ring, modulo 2^16. Without a back end the ring
    /// has no buffer in flight.
    pub fn position(&self, ring: VhostRing) -> io::Result<u16> {
        let mut state = RingState { index: ring as u32, number: 0 };
        // SAFETY: the request reads and writes its structure.
        unsafe { sys::ioctl(&self.0, Updater::<GET_VRING_BASE, _>::new(&mut state))? };
        // Bits 16 to 31 are of packed rings.
        Ok(u16::try_from(state.number & 0xffff).unwrap_or(0))
    }

    /// The eventfd by which the driver says that there are buffers. The kernel never reads it.
    pub fn set_kick(&self, ring: VhostRing, eventfd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.set_file::<SET_VRING_KICK>(ring, eventfd)
    }

    /// The eventfd by which the kernel says that there are used buffers.
    pub fn set_call(&self, ring: VhostRing, eventfd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.set_file::<SET_VRING_CALL>(ring, eventfd)
    }

    /// The eventfd by which the kernel says that the ring is bad.
    pub fn set_error(&self, ring: VhostRing, eventfd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.set_file::<SET_VRING_ERR>(ring, eventfd)
    }

    /// Carries the ring's frames from or to `tap`, a queue of a TAP interface. `None`: no more.
    /// When that returns, no work on the ring is under way.
    pub fn set_backend(&self, ring: VhostRing, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.set_file::<NET_SET_BACKEND>(ring, tap)
    }

    fn set_file<const OPCODE: Opcode>(
        &self,
        ring: VhostRing,
        file: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let fd = file.map_or(-1, |file| file.as_raw_fd());
        // SAFETY: every opcode that this is used with reads the structure.
        unsafe {
            sys::ioctl(&self.0, Setter::<OPCODE, _>::new(RingFile { index: ring as u32, fd }))
        }
    }
}

impl From<Vhost> for OwnedFd {
    fn from(vhost: Vhost) -> OwnedFd {
        vhost.0
    }
}

impl AsFd for Vhost {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What an error of [`Vhost::open`] most likely means, and what to do.
pub fn vhost_advice(error: Errno) -> &'static str {
    match error {
        Errno::PERM | Errno::ACCESS => "this user may not open /dev/vhost-net",
        Errno::NOENT | Errno::NODEV | Errno::NXIO => {
            "the kernel has no /dev/vhost-net: load it with `modprobe vhost_net`"
        }
        _ => "the kernel refused",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers are those of linux/vhost.h.
    #[test]
    fn requests_have_their_numbers() {
        let numbers = [
            0x8008_af00_u32,
            0x4008_af00,
            0x0000_af01,
            0x0000_af02,
            0x4008_af03,
            0x4008_af10,
            0x4028_af11,
            0x4008_af12,
            0xc008_af12,
            0x4008_af20,
            0x4008_af21,
            0x4008_af22,
            0x4008_af30,
        ];
        assert_eq!(VHOST_IOCTLS, numbers);
    }

    /// Another kind of descriptor takes no request.
    #[test]
    fn a_pipe_is_no_vhost() {
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let vhost = Vhost::from_descriptor(reader);
        assert_eq!(vhost.features(), Err(Errno::NOTTY));
        assert_eq!(vhost.set_owner(), Err(Errno::NOTTY));
        // SAFETY: there are no regions.
        assert_eq!(unsafe { vhost.set_memory(&[]) }, Err(Errno::NOTTY));
        assert_eq!(vhost.set_backend(VhostRing::Rx, None), Err(Errno::NOTTY));
        assert_eq!(vhost.position(VhostRing::Tx), Err(Errno::NOTTY));
    }
}
