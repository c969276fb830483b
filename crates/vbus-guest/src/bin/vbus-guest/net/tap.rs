//! A TAP interface of this machine's kernel, as the other end of a NIC.
#![allow(unsafe_code)] // Calls of the TUN/TAP and socket ioctls, whose arguments are C structures.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mknodat};
use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Setter, Updater, ioctl};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use vbus_driver::venet::{F_CSUM, F_TSO, F_USO, HEADER_BYTES};

const TUNSETIFF: u32 = 0x4004_54ca;
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
const TUNSETCARRIER: u32 = 0x4004_54e2;
const SIOCSIFFLAGS: u32 = 0x8914;
const SIOCSIFMTU: u32 = 0x8922;
const SIOCSIFHWADDR: u32 = 0x8924;

const IFF_UP: u16 = 1 << 0;
const IFF_PROMISC: u32 = 1 << 8;
const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
/// Received frames go up in the context of the write, through GRO, and not by way of the kernel's
/// backlog: half as much again of TCP into a guest of one CPU.
const IFF_NAPI: u16 = 0x0010;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const ARPHRD_ETHER: u16 = 1;

const TUN_F_CSUM: usize = 1 << 0;
const TUN_F_TSO: usize = 1 << 1 | 1 << 2;
const TUN_F_USO: usize = 1 << 5 | 1 << 6;

const NAME_BYTES: usize = 16;
const NODE: &str = "/dev/net/tun";

/// The kernel's `struct ifreq`: a name and a union of 24 bytes.
#[repr(C)]
#[derive(Clone, Copy)]
struct Request {
    name: [u8; NAME_BYTES],
    value: [u8; 24],
}

/// A TAP interface, which goes when this is dropped and no queue is left.
#[derive(Debug)]
pub struct Tap {
    name: String,
    /// Any socket: interfaces are set up through one.
    socket: OwnedFd,
    queues: Vec<File>,
    usable: u64,
}

impl Tap {
    /// Makes an interface with `queues` queues. A `%d` in `name` becomes the first free number.
    pub fn create(name: &str, queues: u16) -> Result<Tap> {
        ensure!(
            !name.is_empty() && name.len() < NAME_BYTES,
            "an interface's name has 1 to 15 bytes, {name:?} has not"
        );
        let flags = IFF_TAP
            | IFF_NAPI
            | IFF_NO_PI
            | IFF_VNET_HDR
            | if queues > 1 { IFF_MULTI_QUEUE } else { 0 };
        let mut request = Request { name: padded(name), value: [0; 24] };
        let mut files = Vec::new();
        for _ in 0..queues {
            let file = open_node()?;
            request.value[..2].copy_from_slice(&flags.to_ne_bytes());
            // SAFETY: TUNSETIFF reads and writes a struct ifreq, which `Request` is. With the name
            // filled in, the next queue joins it.
            unsafe { ioctl(&file, Updater::<TUNSETIFF, Request>::new(&mut request)) }.map_err(
                |error| match error {
                    Errno::BUSY => anyhow::anyhow!("interface {name} is there already"),
                    Errno::PERM => anyhow::anyhow!("making a TAP interface needs CAP_NET_ADMIN"),
                    error => anyhow::anyhow!("cannot make TAP interface {name}: {error}"),
                },
            )?;
            let header = i32::try_from(HEADER_BYTES)?;
            // SAFETY: TUNSETVNETHDRSZ reads an int.
            unsafe { ioctl(&file, Setter::<TUNSETVNETHDRSZ, i32>::new(header)) }
                .context("TUNSETVNETHDRSZ")?;
            files.push(file);
        }
        let len = request.name.iter().position(|&b| b == 0).unwrap_or(NAME_BYTES);
        let name = String::from_utf8_lossy(&request.name[..len]).into_owned();
        let socket =
            socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
                .or_else(|_| {
                    socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
                })?;
        let mut tap = Tap { name, socket, queues: files, usable: 0 };
        tap.usable = [F_CSUM | F_TSO | F_USO, F_CSUM | F_TSO, F_CSUM]
            .into_iter()
            .find(|&features| tap.set_offload(features).is_ok())
            .unwrap_or(0);
        Ok(tap)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The offloads (of `venet`) that this kernel can use.
    pub fn usable(&self) -> u64 {
        self.usable
    }

    /// Takes the descriptors of the queues, non-blocking. The interface lives until they are
    /// closed.
    pub fn take_queues(&mut self) -> Vec<File> {
        // One stays here, so that the interface can be set up through it.
        let keep = self.queues.first().and_then(|file| file.try_clone().ok());
        std::mem::replace(&mut self.queues, keep.into_iter().collect())
    }

    /// Says what may be left to the reader of the queues, in features of `venet`.
    pub fn set_offload(&self, features: u64) -> Result<()> {
        let flag = |feature, flags| if features & feature != 0 { flags } else { 0 };
        let flags = flag(F_CSUM, TUN_F_CSUM) | flag(F_TSO, TUN_F_TSO) | flag(F_USO, TUN_F_USO);
        // SAFETY: TUNSETOFFLOAD takes a number.
        unsafe { ioctl(self.queue()?, IntegerSetter::<TUNSETOFFLOAD>::new_usize(flags)) }
            .context("TUNSETOFFLOAD")
    }

    /// Says whether there is a link. Kernels before 4.20 cannot be told; their link is always up.
    pub fn set_carrier(&self, up: bool) {
        let Ok(queue) = self.queue() else { return };
        // SAFETY: TUNSETCARRIER reads an int.
        let set = unsafe { ioctl(queue, Setter::<TUNSETCARRIER, i32>::new(i32::from(up))) };
        if let Err(error) = set {
            tracing::debug!(%error, "TUNSETCARRIER");
        }
    }

    /// Sets the interface's address.
    pub fn set_mac(&self, mac: [u8; 6]) -> Result<()> {
        let mut value = [0; 24];
        value[..2].copy_from_slice(&ARPHRD_ETHER.to_ne_bytes());
        value[2..8].copy_from_slice(&mac);
        self.set::<SIOCSIFHWADDR>(value).context("the kernel does not take the NIC's address")
    }

    /// Sets the largest frame without its header.
    pub fn set_mtu(&self, mtu: u16) -> Result<()> {
        let mut value = [0; 24];
        value[..4].copy_from_slice(&i32::from(mtu).to_ne_bytes());
        self.set::<SIOCSIFMTU>(value)
            .with_context(|| format!("the kernel does not take an MTU of {mtu}"))
    }

    /// Switches the interface on.
    pub fn set_up(&self) -> Result<()> {
        let mut value = [0; 24];
        value[..2].copy_from_slice(&IFF_UP.to_ne_bytes());
        self.set::<SIOCSIFFLAGS>(value).context("cannot switch the interface on")
    }

    /// Whether frames for others are wanted too: it listens to all, is part of a bridge, or was
    /// given another address than the NIC's.
    pub fn is_promiscuous(&self, mac: [u8; 6]) -> bool {
        let read = |file: &str| {
            fs::read_to_string(format!("/sys/class/net/{}/{file}", self.name)).unwrap_or_default()
        };
        let flags =
            u32::from_str_radix(read("flags").trim().trim_start_matches("0x"), 16).unwrap_or(0);
        let address = read("address");
        flags & IFF_PROMISC != 0 || (!address.is_empty() && address.trim() != mac_text(mac))
    }

    fn set<const CODE: u32>(&self, value: [u8; 24]) -> Result<()> {
        let request = Request { name: padded(&self.name), value };
        // SAFETY: the SIOCSIF calls read a struct ifreq, which `Request` is.
        Ok(unsafe { ioctl(&self.socket, Setter::<CODE, Request>::new(request)) }?)
    }

    fn queue(&self) -> Result<BorrowedFd<'_>> {
        Ok(self.queues.first().context("the interface has no queue")?.as_fd())
    }
}

/// An address as people write it.
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn padded(name: &str) -> [u8; NAME_BYTES] {
    let mut padded = [0; NAME_BYTES];
    for (to, from) in padded.iter_mut().take(NAME_BYTES - 1).zip(name.bytes()) {
        *to = from;
    }
    padded
}

/// Opens the TUN/TAP device, whose module may have to be loaded and whose node may have to be made
/// first.
fn open_node() -> Result<File> {
    let flags = i32::try_from((OFlags::NONBLOCK | OFlags::CLOEXEC).bits())?;
    let open = || OpenOptions::new().read(true).write(true).custom_flags(flags).open(NODE);
    let missing = |error: &std::io::Error| {
        error.raw_os_error() == Some(Errno::NOENT.raw_os_error())
            || error.raw_os_error() == Some(Errno::NODEV.raw_os_error())
    };
    match open() {
        Err(error) if missing(&error) => {
            let _ = Command::new("modprobe")
                .arg("tun")
                .stdin(Stdio::null())
                .stderr(Stdio::null())
                .status();
            let _ = fs::create_dir_all("/dev/net");
            let _ = mknodat(
                CWD,
                NODE,
                FileType::CharacterDevice,
                Mode::from_raw_mode(0o600),
                makedev(10, 200),
            );
            open().with_context(|| {
                format!("cannot open {NODE}: is the kernel's module `tun` loaded?")
            })
        }
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            bail!("cannot open {NODE}: this needs root")
        }
        other => other.with_context(|| format!("cannot open {NODE}")),
    }
}
