// SPDX-License-Identifier: Apache-2.0 OR MIT
//! TAP interfaces of this host with NICs of a guest at their other ends, and the server that the
//! guest measures against.

use std::fs::{self, File};

use anyhow::{Context, Result, ensure};

use crate::bus::Bus;
use crate::guest::Guest;
use crate::iperf::{Load, Received};
use crate::lab::Scene;
use crate::nic;
use crate::pair::TRANSFER;
use crate::process::Process;
use crate::report::Skip;

/// The port of the server.
const PORT: u16 = 15_201;

/// A TAP interface, in a network of its own.
pub struct Tap {
    /// Its name on this host.
    pub name: String,
    /// The number of its network: it is `10.0.NUMBER.0/24`.
    network: u8,
}

/// What has passed a TAP interface since it was made, in both directions.
#[derive(Clone, Copy, Default)]
pub struct Passed {
    /// Frames. One that is still to be segmented counts as one.
    pub frames: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Tap {
    /// The interface of network `network`. It does not exist yet: whoever opens it makes it.
    pub fn new(network: u8) -> Self {
        // No other run of the test kit has it.
        Self { name: format!("vbus-{network}-{}", std::process::id() % 10_000), network }
    }

    /// The address of this host in its network.
    pub fn host(&self) -> String {
        format!("10.0.{}.254", self.network)
    }

    /// The address of the guest in its network.
    pub fn guest(&self) -> String {
        format!("10.0.{}.1", self.network)
    }

    /// Gives this host's end its address, and sets it up.
    ///
    /// # Errors
    /// The interface does not exist, or this user may not change it.
    pub fn up(&self, scene: &Scene) -> Result<()> {
        host_ip(scene, &["addr", "add", &format!("{}/24", self.host()), "dev", &self.name])?;
        host_ip(scene, &["link", "set", &self.name, "up"])
    }

    /// Gives the guest's end its address, and sets it up.
    ///
    /// # Errors
    /// The guest has no such interface.
    pub fn up_in(&self, guest: &Guest, interface: &str) -> Result<()> {
        nic::set_up(guest, interface, &format!("{}/24", self.guest()))
    }

    /// The words for QEMU's virtio-net at this interface, with `queues` queue pairs. `device` has
    /// more properties for the device.
    pub fn virtio_net(&self, queues: u32, device: &str) -> [String; 4] {
        let id = &self.name;
        let (netdev, many) = if queues > 1 {
            // A vector for each queue, one for the configuration, and one to spare.
            (format!(",queues={queues}"), format!(",mq=on,vectors={}", 2 * queues + 2))
        } else {
            (String::new(), String::new())
        };
        [
            "-netdev".into(),
            format!("tap,id={id},ifname={id},script=no,downscript=no,vhost=off{netdev}"),
            "-device".into(),
            format!("virtio-net-pci,netdev={id},romfile={many}{device}"),
        ]
    }

    /// What has passed so far.
    ///
    /// # Errors
    /// The interface does not exist.
    pub fn passed(&self) -> Result<Passed> {
        let counter = |name: &str| -> Result<u64> {
            let file = format!("/sys/class/net/{}/statistics/{name}", self.name);
            let text = fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?;
            text.trim().parse().with_context(|| format!("{file} is {text:?}"))
        };
        Ok(Passed {
            frames: counter("rx_packets")? + counter("tx_packets")?,
            bytes: counter("rx_bytes")? + counter("tx_bytes")?,
        })
    }
}

/// Starts a bus whose devices have TAP interfaces.
///
/// # Errors
/// The bus does not start. It is a [`Skip`] if this machine has no TAP, or if this user may not
/// make one.
pub fn bus(scene: &Scene, config: &str) -> Result<Bus> {
    if let Err(error) = File::options().read(true).write(true).open("/dev/net/tun") {
        return Err(Skip(format!("/dev/net/tun cannot be opened: {error}")).into());
    }
    Bus::start(scene, config).map_err(|error| {
        if rustix::process::geteuid().is_root() {
            return error;
        }
        Skip(format!("TAP needs CAP_NET_ADMIN: {error:#}")).into()
    })
}

/// A server of iperf3 on this host, which guests measure against. Dropping it ends it.
pub struct Server(#[expect(dead_code, reason = "it lives as long as the server")] Process);

impl Server {
    /// Starts it.
    ///
    /// # Errors
    /// There is no iperf3.
    pub fn start(scene: &Scene) -> Result<Self> {
        let mut server = scene.lab.program("iperf3");
        server.args(["--server", "--port", &PORT.to_string()]);
        Process::start(server, "iperf3", &scene.dir().join("iperf3.log")).map(Self)
    }

    /// Measures from the guest, over the interface `tap`, for some seconds. `words` are more words
    /// for iperf3's command line.
    ///
    /// # Errors
    /// iperf3 fails.
    pub fn measure(&self, guest: &Guest, tap: &Tap, seconds: u32, words: &str) -> Result<Received> {
        Received::of(&guest.start(&command(tap, seconds, words))?.ok(TRANSFER)?)
    }
}

/// The client's command for [`Server::measure`].
pub fn command(tap: &Tap, seconds: u32, words: &str) -> String {
    Load { server: &tap.host(), port: PORT, seconds, words }.command()
}

/// Runs `ip` of the kit's busybox on the host, which may have no iproute2.
fn host_ip(scene: &Scene, args: &[&str]) -> Result<()> {
    let output = scene.lab.busybox().arg("ip").args(args).output().context("cannot run busybox")?;
    ensure!(
        output.status.success(),
        "ip {} failed: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
