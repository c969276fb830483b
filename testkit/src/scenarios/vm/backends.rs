// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Back ends of the NIC that lead out of the bus: QEMU's stream protocol, passt, TAP.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::bus::Bus;
use crate::bus::device;
use crate::lab::Scene;
use crate::nic::{self, Nic};
use crate::pair::{ADDRESS, TRANSFER};
use crate::process::Process;
use crate::report::Skip;
use crate::tap::{self, Server, Tap};
use crate::vm::{Vm, VmSpec};

const MIB: u64 = 1 << 20;

/// A guest with one NIC of the bus, its driver running.
fn guest_with_nic(scene: &Scene, bus: &Bus, more: &[&str]) -> Result<(Vm, Nic)> {
    let vm = VmSpec::new("a").device(bus.socket("net")).args(more).boot(scene)?;
    nic::prepare(&vm.guest)?;
    let nic = Nic::up(&vm.guest, "net", "vbus0", &format!("{}/24", ADDRESS[0]), "")?;
    Ok((vm, nic))
}

/// One guest has the stream back end. The other has QEMU's virtio-net at the other end of the
/// stream.
pub fn stream(scene: &Scene) -> Result<()> {
    let socket = scene.dir().join("stream").display().to_string();
    let bus = Bus::start(
        scene,
        &device("net", "venet", &format!("backend = \"stream\"\nlisten = \"{socket}\"")),
    )?;
    let (a, _nic) = guest_with_nic(scene, &bus, &[])?;
    let netdev =
        format!("stream,id=net,server=off,reconnect-ms=100,addr.type=unix,addr.path={socket}");
    let b = VmSpec::new("b")
        .args(&["-netdev", &netdev, "-device", "virtio-net-pci,netdev=net,romfile="])
        .boot(scene)?;
    nic::set_up(&b.guest, "eth0", &format!("{}/24", ADDRESS[1]))?;
    nic::ping(&a.guest, ADDRESS[1], 3)?;
    nic::transfer(&a.guest, &b.guest, ADDRESS[1], 5001, 32 * MIB, 1, TRANSFER)?;
    nic::transfer(&b.guest, &a.guest, ADDRESS[0], 5002, 32 * MIB, 2, TRANSFER)
}

/// Through passt, which needs no root, the guest reaches a port of the host, and the host reaches a
/// port of the guest.
pub fn passt(scene: &Scene) -> Result<()> {
    // A port of this host that nobody has.
    let port = TcpListener::bind(("0.0.0.0", 0))?.local_addr()?.port();
    let socket = scene.dir().join("passt");
    let mut command = scene.lab.program("passt");
    command.args(["--foreground", "--one-off", "--socket"]).arg(&socket);
    command.args([
        "--address",
        ADDRESS[0],
        "--netmask",
        "24",
        "--gateway",
        "10.0.0.254",
        "--mtu",
        "1500",
        "--no-dhcp-dns",
    ]);
    command.args(["--tcp-ports", &port.to_string()]);
    let log = scene.dir().join("passt.log");
    let mut passt = Process::start(command, "passt", &log)?;
    let until = Instant::now() + Duration::from_secs(60);
    while !socket.exists() && passt.ended()?.is_none() {
        ensure!(Instant::now() < until, passt.complaint("makes no socket"));
        std::thread::sleep(Duration::from_millis(10));
    }
    match through_passt(scene, &socket, port) {
        // passt makes its namespaces after its socket. If it cannot, it ends and says why.
        Err(_) if passt.ended()?.is_some_and(|status| !status.success()) => {
            let said = fs::read_to_string(&log).unwrap_or_default();
            let reason = said.lines().rfind(|line| line.contains("namespace"));
            match reason {
                Some(reason) => Err(Skip(format!("passt does not run here: {reason}")).into()),
                None => Err(passt.complaint("ended")),
            }
        }
        result => result,
    }
}

/// Transfers data from the host to a guest through the passt with this socket and this port.
fn through_passt(scene: &Scene, socket: &Path, port: u16) -> Result<()> {
    let bus = Bus::start(
        scene,
        &device(
            "net",
            "venet",
            &format!("backend = \"stream\"\nconnect = \"{}\"", socket.display()),
        ),
    )?;
    let (a, _nic) = guest_with_nic(scene, &bus, &[])?;
    a.guest.ok("ip route add default via 10.0.0.254")?;
    from_host(scene, &a, "127.0.0.1", port)
}

/// Transfers data from this host to port `port` of a guest, which the host reaches at `address`.
fn from_host(scene: &Scene, vm: &Vm, address: &str, port: u16) -> Result<()> {
    let receiver = vm.guest.start(&format!("guest-agent receive 0.0.0.0:{port}"))?;
    nic::wait_port(&vm.guest, port)?;
    let bytes = 16 * MIB;
    let sender = Command::new(scene.lab.agent())
        .args(["send", &format!("{address}:{port}"), &bytes.to_string(), "5"])
        .stdin(Stdio::null())
        .output()
        .context("cannot run the agent on the host")?;
    let sent = String::from_utf8_lossy(&sender.stdout).into_owned();
    ensure!(
        sender.status.success(),
        "sending to {address}:{port} failed: {}",
        String::from_utf8_lossy(&sender.stderr)
    );
    let received = receiver.ok(TRANSFER)?;
    ensure!(sent == received, "sent {sent}, received {received}");
    Ok(())
}

/// TCP between host and guest through `vbus-guest net` on TAP, beside QEMU's own virtio-net on TAP.
/// Both are measured in one guest and one run. The guest reaches this host through a switch and its
/// uplink too.
pub fn tap(scene: &Scene) -> Result<()> {
    const ROUNDS: usize = 3;
    // The two share the machine, and take turns, so other work slows both. A fault such as a lost
    // wake-up, which a timer makes up for, costs far more than a factor of ten. On a quiet machine
    // the way in had 0.56 to 0.73.
    const LEAST: f64 = 0.1;
    let (ours, theirs, uplink) = (Tap::new(0), Tap::new(9), Tap::new(8));
    let on = |tap: &Tap| format!("backend = \"tap\"\ntap = \"{}\"", tap.name);
    let config = [
        device("net", "venet", &on(&ours)),
        device("lan", "venet", "switch = \"lan\""),
        device("up", "uplink", &format!("{}\nswitch = \"lan\"", on(&uplink))),
    ];
    let bus = tap::bus(scene, &config.concat())?;
    let virtio = theirs.virtio_net(1, "");
    let vm = VmSpec { cpus: 2, ..VmSpec::new("a") }
        .device(bus.socket("net"))
        .device(bus.socket("lan"))
        .args(&virtio.each_ref().map(String::as_str))
        .boot(scene)?;
    nic::prepare(&vm.guest)?;
    let _nic = Nic::up(&vm.guest, "net", "vbus0", &format!("{}/24", ADDRESS[0]), "")?;
    theirs.up_in(&vm.guest, "eth0")?;
    for tap in [&ours, &theirs, &uplink] {
        tap.up(scene)?;
    }
    through_uplink(scene, &bus, &vm, &uplink)?;
    let server = Server::start(scene)?;
    both_ways(&server, &vm, &ours, &theirs)?;
    // The figures of one way are those of one CPU.
    vm.guest.ok("echo 0 > /sys/devices/system/cpu/cpu1/online")?;
    let figure =
        |tap: &Tap, way: &str| -> Result<f64> { Ok(server.measure(&vm.guest, tap, 2, way)?.mbps) };
    for (direction, way) in [("out", ""), ("in", "--reverse")] {
        // The two take turns, so that other work on this machine slows both.
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            rounds.push((figure(&ours, way)?, figure(&theirs, way)?));
        }
        let mut ratios: Vec<f64> = rounds.iter().map(|(ours, theirs)| ours / theirs).collect();
        ratios.sort_by(f64::total_cmp);
        let ratio = ratios[ROUNDS / 2];
        eprintln!(
            "TCP {direction}, vbus against virtio-net in Mb/s: {rounds:.0?}; ratio {ratio:.2}"
        );
        ensure!(
            ratio >= LEAST,
            "TCP {direction} has {ratio:.2} of the speed of virtio-net, less than {LEAST}: \
             {rounds:.0?}"
        );
    }
    Ok(())
}

/// A guest on a switch reaches this host through the uplink, and the host reaches the guest.
fn through_uplink(scene: &Scene, bus: &Bus, vm: &Vm, uplink: &Tap) -> Result<()> {
    let address = format!("{}/24", uplink.guest());
    let nic = Nic::up(&vm.guest, "lan", "vbus1", &address, "")?;
    nic::ping(&vm.guest, &uplink.host(), 3)?;
    from_host(scene, vm, &uplink.guest(), 15_202)?;
    let stats = bus.stats()?;
    let up = stats.as_array().into_iter().flatten().find(|device| device["name"] == "up");
    let up = up.context("vbus stats --json does not know the uplink")?;
    let frames = |way: &str| up["device"][way]["frames"].as_u64().unwrap_or(0);
    let carried = ["to-outside", "from-outside"].map(frames);
    ensure!(carried.iter().all(|frames| *frames > 0), "the uplink has carried {carried:?}: {up}");
    drop(nic);
    Ok(())
}

/// 20 streams each way at once, with two CPUs.
fn both_ways(server: &Server, vm: &Vm, ours: &Tap, theirs: &Tap) -> Result<()> {
    // Other work of the machine moves the rate from one way to the other. A way that stands still
    // is a fault.
    const LEAST: f64 = 0.005;
    let measure = |tap: &Tap| -> Result<[f64; 2]> {
        let words = "--omit 1 --bidir --parallel 20";
        let received = server.measure(&vm.guest, tap, 3, words)?;
        Ok([received.mbps, received.back_mbps])
    };
    let (ours, theirs) = (measure(ours)?, measure(theirs)?);
    for (way, (ours, theirs)) in ["out", "in"].iter().zip(ours.into_iter().zip(theirs)) {
        let ratio = ours / theirs;
        let what = format!("TCP {way} while 20 streams go each way");
        eprintln!("{what}, vbus and virtio-net in Mb/s: {ours:.0}, {theirs:.0}; ratio {ratio:.2}");
        ensure!(ratio >= LEAST, "{what}: {ours:.0} Mb/s, virtio-net has {theirs:.0}");
    }
    Ok(())
}
