// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The TAP interface of a NIC.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::io::Errno;
use vbus_driver::venet::{F_RX_SHIFT, F_TX};
use vbus_tap::{Mac, Offloads, Queue, Setup, show_mac};

const IFF_PROMISC: u32 = 1 << 8;
const NODE: &str = "/dev/net/tun";
/// The most frames that wait in a queue: more than a queue of the kernel holds by default.
const DISCARD_MAX: usize = 4096;

/// A TAP interface. The kernel removes it when this value and all its queues are dropped.
#[derive(Debug)]
pub struct Tap {
    name: String,
    /// At least one. The interface is set up through the first.
    queues: Vec<Queue>,
    usable: Offloads,
}

impl Tap {
    /// Makes an interface with `queues` queues, at least 1. `%d` in `name` becomes the first free
    /// number.
    pub fn create(name: &str, queues: u16) -> Result<Tap> {
        ensure!(
            (1..16).contains(&name.len()),
            "the name of an interface must have 1 to 15 bytes, but {name:?} has {}",
            name.len()
        );
        let setup = Setup { multi_queue: queues > 1, napi: true };
        let failed = |error| match error {
            Errno::BUSY => anyhow!("an interface {name} exists already"),
            Errno::PERM | Errno::ACCESS => anyhow!("making a TAP interface needs CAP_NET_ADMIN"),
            error => anyhow!(
                "cannot make TAP interface {name}: {error}: is the kernel's module `tun` loaded?"
            ),
        };
        let (first, made) = match Queue::attach(name, setup) {
            Err(Errno::NOENT | Errno::NODEV) => {
                load_module();
                Queue::attach(name, setup)
            }
            other => other,
        }
        .map_err(failed)?;
        let usable = first.known_offloads();
        let others = (1..queues).map(|_| Queue::attach(&made, setup).map(|(queue, _)| queue));
        let queues = std::iter::once(Ok(first)).chain(others).collect::<Result<_, _>>();
        Ok(Tap { name: made, queues: queues.map_err(failed)?, usable })
    }

    /// The name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The offloads that this kernel can use, in both directions, as features of `venet`.
    pub fn usable(&self) -> u64 {
        self.usable.bits() | self.usable.bits() << F_RX_SHIFT
    }

    /// The number of queues.
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// Handles to the queues. Their descriptors are non-blocking.
    pub fn queues(&self) -> Result<Vec<Queue>> {
        let clones = self.queues.iter().map(Queue::try_clone);
        clones.collect::<Result<_, _>>().context("a second descriptor of the TAP interface")
    }

    /// Lets the kernel use the first `queues` queues only.
    pub fn use_queues(&self, queues: usize) -> Result<()> {
        for (number, queue) in self.queues.iter().enumerate().filter(|(_, q)| q.is_multi_queue()) {
            queue.set_enabled(number < queues).context("TUNSETQUEUE")?;
        }
        Ok(())
    }

    /// The MTU of the interface now. A person may change it.
    pub fn mtu(&self) -> Option<u32> {
        fs::read_to_string(format!("/sys/class/net/{}/mtu", self.name)).ok()?.trim().parse().ok()
    }

    /// Discards the frames that wait in the queues, each of at most [`DISCARD_MAX`].
    pub fn discard(&self) {
        for queue in &self.queues {
            for _ in 0..DISCARD_MAX {
                // The kernel drops the part of a frame that the buffer has no room for.
                if rustix::io::read(queue, &mut [0; 64]).is_err() {
                    break;
                }
            }
        }
    }

    /// Tells the kernel which offloads the frames that it sends may need: those that a NIC with
    /// these features of `venet` accepts from its driver.
    pub fn set_offload(&self, features: u64) -> Result<()> {
        self.queues[0].set_offloads(Offloads::from_bits(features & F_TX)).context("TUNSETOFFLOAD")
    }

    /// Sets the carrier. Kernels before 5.0 cannot; their carrier is always on.
    pub fn set_carrier(&self, up: bool) {
        set_carrier(&self.queues[0], up);
    }

    /// Sets the address of the interface.
    pub fn set_mac(&self, mac: Mac) -> Result<()> {
        vbus_tap::set_mac(&self.name, mac).context("the kernel does not accept the NIC's address")
    }

    /// Sets the MTU: the bytes of the largest frame without its header.
    pub fn set_mtu(&self, mtu: u16) -> Result<()> {
        vbus_tap::set_mtu(&self.name, mtu)
            .with_context(|| format!("the kernel does not accept an MTU of {mtu}"))
    }

    /// Sets the interface up.
    pub fn set_up(&self) -> Result<()> {
        vbus_tap::set_up(&self.name).context("cannot set the interface up")
    }

    /// Whether the interface needs frames for other addresses than `mac`, the NIC's. It does when
    /// it is promiscuous, is part of a bridge, or has another address.
    pub fn is_promiscuous(&self, mac: Mac) -> bool {
        let read = |file: &str| {
            fs::read_to_string(format!("/sys/class/net/{}/{file}", self.name)).unwrap_or_default()
        };
        let flags =
            u32::from_str_radix(read("flags").trim().trim_start_matches("0x"), 16).unwrap_or(0);
        let address = read("address");
        flags & IFF_PROMISC != 0 || (!address.is_empty() && address.trim() != show_mac(mac))
    }
}

/// Sets the carrier of the interface that `queue` belongs to, as [`Tap::set_carrier`].
pub fn set_carrier(queue: &Queue, up: bool) {
    if let Err(error) = queue.set_carrier(up) {
        tracing::debug!(%error, "TUNSETCARRIER");
    }
}

/// Loads the kernel's module `tun`, and makes its node if it does not exist.
fn load_module() {
    let _ = Command::new("modprobe").arg("tun").stdin(Stdio::null()).stderr(Stdio::null()).status();
    let _ = fs::create_dir_all("/dev/net");
    let mode = Mode::from_raw_mode(0o600);
    let _ = mknodat(CWD, NODE, FileType::CharacterDevice, mode, makedev(10, 200));
}
