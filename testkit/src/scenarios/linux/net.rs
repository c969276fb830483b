// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver's network interfaces, with the tools that a user has. They are called `near` and
//! `far` in the guest of a [`Wire`].

mod features;

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::copybreak;
use crate::guest::Guest;
use crate::initramfs::Archive;
use crate::iperf::{Load, Received};
use crate::kit::kernels::Series;
use crate::lab::Scene;
use crate::linux::{self, IP};
use crate::nic;
use crate::pair::ADDRESS;
use crate::report::Skip;
use crate::vm::VmSpec;
use crate::wire::{FAR, NICS, Wire};

/// A group.
const GROUP: &str = "33:33:00:00:00:42";
/// How long a transfer or a load may take on a loaded machine.
const LIMIT: Duration = Duration::from_secs(300);
/// The bytes of the longest frame of an MTU of 1500 that is not to be cut.
const FRAME: u64 = 1514;
/// Bytes of a transfer whose hash is compared.
const BYTES: u64 = 16 << 20;

/// Traffic, the settings of ethtool and ip, and all else that an interface does for its user, with
/// Linux 6.12.
pub fn tools(scene: &Scene) -> Result<()> {
    let station = Station::boot(scene, Series::V6_12)?;
    station.traffic()?;
    station.tools()?;
    station.features()?;
    station.end()
}

/// What takes longer: link, groups, XDP, and the driver leaves under load, with Linux 6.12; and
/// traffic with the other kernels.
pub fn long(scene: &Scene) -> Result<()> {
    if scene.lab.times().is_none() {
        return Err(Skip("only with --times: it boots three kernels".into()).into());
    }
    let station = Station::boot(scene, Series::V6_12)?;
    station.groups()?;
    station.link()?;
    station.xdp()?;
    station.leaves_under_load()?;
    station.end()?;
    for series in [Series::V6_1, Series::V7] {
        let station = Station::boot(scene, series)?;
        station.traffic()?;
        station.leaves_under_load()?;
        station.end()?;
    }
    Ok(())
}

/// A wire whose interfaces have names.
struct Station(Wire);

impl Station {
    fn boot(scene: &Scene, series: Series) -> Result<Self> {
        let kernel = linux::kernel_of(scene, series);
        let settings = [
            "mac = \"02:00:00:00:00:01\"\nqueue-pairs = 4\nspeed = 10000\nmsix = true",
            "mac = \"02:00:00:00:00:02\"",
        ];
        let mut system = linux::system(scene, kernel)?;
        let mut archive = Archive::default();
        system.add_modules(&mut archive, &["8021q", "netconsole"])?;
        let folder = scene.dir().join("system");
        std::fs::create_dir_all(&folder)?;
        system = system.extend(archive, &folder)?;
        let name = kernel.to_string();
        let station = Self(Wire::start(scene, &system, settings, |machine| VmSpec {
            name,
            cpus: 2,
            ..machine
        })?);
        station.load()?;
        Ok(station)
    }

    fn guest(&self) -> &Guest {
        self.0.guest()
    }

    /// Loads the module, and sets both interfaces up.
    fn load(&self) -> Result<()> {
        linux::insert(self.guest(), "")?;
        self.set_up()
    }

    fn ping(&self) -> Result<()> {
        nic::ping(self.guest(), ADDRESS[1], 3).map(drop)
    }

    /// Moves bytes both ways, and compares their hashes.
    fn transfers(&self) -> Result<()> {
        self.0.exchange(BYTES)
    }

    /// A run of iperf3 to the far interface.
    fn iperf(&self, words: &str) -> Result<()> {
        let guest = self.guest();
        let server = guest.start(&format!("{FAR} iperf3 --server --one-off"))?;
        nic::wait_port_in(guest, FAR, 5201)?;
        let load = Load { server: ADDRESS[1], port: 5201, seconds: 1, words };
        let report = guest.start(&load.command())?.ok(LIMIT)?;
        server.ok(LIMIT)?;
        // The report of UDP has other members.
        let got = words.contains("--udp") || Received::of(&report)?.mbps > 0.0;
        ensure!(got, "iperf3 {words} received nothing");
        Ok(())
    }

    /// Frames of all sizes and kinds, both ways.
    fn traffic(&self) -> Result<()> {
        self.ping().context("ping")?;
        self.transfers()?;
        for words in ["", "--reverse", "--parallel 4", "--udp --bitrate 0 --length 64"] {
            self.iperf(words).with_context(|| format!("iperf3 {words}"))?;
        }
        // A segment of TCP comes in pages of 4 KiB, and UDP in frames of its own.
        self.iperf("--udp --bitrate 20M --length 1400 --reverse")?;
        self.long_headers().context("a packet with long headers")?;
        self.check(&[
            ("ethtool -S near | awk '/ tx[0-9]+_frames/{n+=$2} END{print (n>1000)}'", "1"),
            ("ethtool -S near | awk '/ rx[0-9]+_invalid/{n+=$2} END{print n}'", "0"),
            ("ethtool -S near | awk '/dev_tx[0-9]+_segments/{n+=$2} END{print (n>0)}'", "1"),
            ("ethtool -S near | awk '/faults/{print $2}'", "0"),
        ])
    }

    /// Packets whose headers are so long that the place of their checksum is far behind: one that
    /// is a segment of its own, and larger ones that nobody cuts on the way.
    fn long_headers(&self) -> Result<()> {
        let guest = self.guest();
        guest.ok(&format!("{IP} addr add fd00::1/64 dev near nodad"))?;
        guest.ok(&format!("{FAR} {IP} addr add fd00::2/64 dev far nodad"))?;
        let counts = || -> Result<[u64; 2]> {
            Ok([self.0.counter(1, "rx_frames")?, self.0.counter(1, "rx_bytes")?])
        };
        let before = counts()?;
        for (bytes, port) in [(1000, 4000), (1_000_000, 4001)] {
            let receive = format!("{FAR} guest-agent receive [fd00::2]:{port}");
            let receiver = guest.start(&receive)?;
            nic::wait_port_in(guest, FAR, port)?;
            let send = format!("guest-agent send [fd00::2]:{port} {bytes} 7 options");
            let sent = guest.start(&send)?.ok(LIMIT)?;
            ensure!(sent == receiver.ok(LIMIT)?, "the bytes have changed");
        }
        let now = counts()?;
        let [frames, bytes] = [now[0] - before[0], now[1] - before[1]];
        ensure!(bytes > frames * FRAME, "{bytes} bytes have come in {frames} frames: all were cut");
        self.check(&[(
            &format!("{FAR} ethtool -S far | awk '/ rx[0-9]+_invalid/{{n+=$2}} END{{print n}}'"),
            "0",
        )])
    }

    /// Runs each command and compares what it prints.
    fn check(&self, commands: &[(&str, &str)]) -> Result<()> {
        for (command, expected) in commands {
            let said = self.guest().ok(command).with_context(|| format!("{command:?}"))?;
            ensure!(said.trim() == *expected, "{command:?} prints {:?}", said.trim());
        }
        Ok(())
    }

    /// Each of these commands must be refused.
    fn refused(&self, commands: &[&str]) -> Result<()> {
        for command in commands {
            let refused = self.guest().run(command)?.code != 0;
            ensure!(refused, "{command:?} should be refused");
        }
        Ok(())
    }

    /// ethtool and ip.
    fn tools(&self) -> Result<()> {
        self.check(&[
            ("ethtool -i near | grep -c -E '^driver: vbus$|^bus-info: 0000:01:00.0$'", "2"),
            ("cut -d' ' -f1 /sys/bus/pci/devices/0000:01:00.0/vbus/interrupts", "msix"),
            ("ethtool near | grep -c -E 'Speed: 10000Mb/s|Duplex: Full|Link detected: yes'", "3"),
            (
                "ethtool -k near | grep -c -E '^(tx-checksumming|rx-checksumming|scatter-gather|\
                 tcp-segmentation-offload|generic-receive-offload|rx-gro-hw|\
                 rx-vlan-filter|tx-udp-segmentation|\ttx-tcp-ecn-segmentation): on'",
                "9",
            ),
            ("ethtool -g near | grep -c '^RX:[^0-9]*1024'", "1"),
            ("ethtool -l near | awk '/^Combined/{printf $2 \" \"}'", "4 4"),
        ])?;
        self.check(&[(
            "ethtool -G near rx 100 tx 256 && ethtool -g near | tail -n +7 | \
              awk '/^(RX|TX):/{printf $2 \" \"}'",
            "128 256",
        )])?;
        self.transfers().context("with small rings")?;
        self.check(&[(
            "ethtool -L near combined 2 && ethtool -l near | \
             awk '/^Combined/{printf $2 \" \"}'",
            "4 2",
        )])?;
        self.transfers().context("with two queue pairs")?;
        // Everything to one queue, which then has all frames.
        self.check(&[(
            "ethtool -X near weight 0 1 && ethtool -x near | grep -c ' 1 *1 *1 *1'",
            "16",
        )])?;
        let of_first = "ethtool -S near | awk '/ rx0_frames/{print $2}'";
        let before = self.guest().ok(of_first)?;
        self.transfers().context("with an indirection table")?;
        self.check(&[(of_first, before.trim())])?;
        self.refused(&[
            "ethtool -L near combined 1",
            "ethtool -L near combined 5",
            "ethtool -C near rx-usecs 1000001",
            "ethtool -C near tx-usecs 1000001",
            "ethtool -G near rx 4096",
        ])?;
        self.check(&[(
            "ethtool -X near equal 2; ethtool -C near rx-usecs 50 rx-frames 8 && \
             ethtool -c near | grep -c -E '^rx-(usecs|frames):[^0-9]*(50|8)$'",
            "2",
        )])?;
        self.ping().context("with coalescing")?;
        copybreak::follows_setting(self.guest(), "near").context("small frames are copied")?;
        self.guest().ok("ethtool -C near rx-usecs 0 rx-frames 0")?;

        for off in ["rx-gro-hw off", "rx off", "tso off", "tx off"] {
            self.guest().ok(&format!("ethtool -K near {off}"))?;
            self.transfers().with_context(|| format!("with {off}"))?;
        }
        self.guest().ok("ethtool -K near tx on tso on rx on rx-gro-hw on")?;

        self.check(&[
            (
                "ip link set near address 02:00:00:00:00:0a && cat /sys/class/net/near/address",
                "02:00:00:00:00:0a",
            ),
            ("ip link set near mtu 1000 && cat /sys/class/net/near/mtu", "1000"),
        ])?;
        self.refused(&[
            "ip link set near address 01:00:00:00:00:0a",
            "ip link set near address 02:00:00:00:00:02",
            "ip link set near mtu 1501",
        ])?;
        self.guest().ok("ping -c 1 -W 60 -s 1400 10.0.0.2")?;
        self.guest().ok("ip link set near mtu 1500")?;
        self.transfers().context("with another address")
    }

    /// Groups, every frame, down and up.
    fn groups(&self) -> Result<()> {
        let guest = self.guest();
        guest.ok(&format!("{IP} maddr add {GROUP} dev near && ip link set near promisc on"))?;
        guest.ok(&format!("ip link set near promisc off && {IP} maddr del {GROUP} dev near"))?;
        guest.ok("ip link set near address 02:00:00:00:00:0a")?;
        self.check(&[(
            "ip link set near down && ip link set near up && cat /sys/class/net/near/address",
            "02:00:00:00:00:0a",
        )])?;
        self.ping().context("down and up")
    }

    /// The link that the device tells of.
    fn link(&self) -> Result<()> {
        for (state, up) in [("0", "false"), ("1", "true")] {
            let request = format!("{{\"op\": \"link\", \"up\": {up}}}");
            self.0.bus.run(&["device", "request", NICS[0], &request])?;
            self.guest().ok(&format!(
                "until [ $(cat /sys/class/net/near/carrier) = {state} ]; do sleep 0.05; done"
            ))?;
        }
        self.ping()
    }

    /// Programs in the driver.
    fn xdp(&self) -> Result<()> {
        let guest = self.guest();
        let of = |counter: &str| -> Result<u64> {
            let command = format!(
                "ethtool -S near | awk '/ (rx|tx)[0-9]+_{counter}:/{{n+=$2}} END{{print n}}'"
            );
            guest.ok(&command)?.trim().parse().with_context(|| format!("no counter {counter}"))
        };
        for what in ["pass", "back", "around"] {
            self.0.with_program(what, || {
                self.0.ping_near().context(what)?;
                if what == "pass" {
                    self.transfers().context("with a program")?;
                }
                Ok(())
            })?;
        }
        ensure!(of("xdp_tx")? >= 6, "no frames were sent back");
        ensure!(of("xdp_redirects")? >= 6 && of("xdp")? >= 6, "no frames were redirected");
        self.0.with_program("drop", || {
            self.refused(&["ping -c 1 -W 1 10.0.0.2"])?;
            ensure!(of("xdp_drops")? >= 1, "no frames were dropped");
            Ok(())
        })?;
        self.transfers().context("after the programs")
    }

    /// The driver leaves in the middle of traffic, and comes back.
    fn leaves_under_load(&self) -> Result<()> {
        let guest = self.guest();
        let pci = linux::address(0);
        for command in [
            format!("cd /sys/bus/pci/drivers/vbus && echo {pci} > unbind && echo {pci} > bind"),
            format!("rmmod vbus && insmod {}", linux::MODULE),
        ] {
            let server = guest.start(&format!("{FAR} iperf3 --server --one-off"))?;
            nic::wait_port_in(guest, FAR, 5201)?;
            let load = Load { server: ADDRESS[1], port: 5201, seconds: 600, words: "--bidir" };
            let client = guest.start(&load.command())?;
            let many = "[ $(cat /sys/class/net/near/statistics/tx_packets) -gt 2000 ]";
            guest.ok(&format!("until {many}; do sleep 0.05; done"))?;
            guest.start(&command)?.ok(LIMIT).with_context(|| command.clone())?;
            drop((client, server));
            guest.ok("while killall -9 iperf3 2> /dev/null; do sleep 0.05; done")?;
            self.set_up()?;
            self.transfers().with_context(|| format!("after {command:?}"))?;
        }
        Ok(())
    }

    /// Sets up the interfaces that the driver has made anew, as `near` and `far`.
    fn set_up(&self) -> Result<()> {
        let guest = self.guest();
        for (slot, name, place) in [(0, "near", ""), (1, "far", FAR)] {
            if guest.run(&format!("{place} ip link show {name}"))?.code == 0 {
                continue;
            }
            let interface = linux::interface(guest, slot)?;
            guest.ok(&format!("ip link set {interface} name {name}"))?;
            if !place.is_empty() {
                guest.ok(&format!("{IP} link set {name} netns far"))?;
            }
            nic::set_up_in(guest, place, name, &format!("{}/24", ADDRESS[slot]))?;
        }
        Ok(())
    }

    /// Nothing was wrong with the kernel, and nothing is left.
    fn end(self) -> Result<()> {
        linux::check_kernel(self.guest())?;
        linux::remove(self.guest())?;
        linux::check_kernel(self.guest())?;
        self.0.vm.power_off()
    }
}
