// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that come and go while guests run.

use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};

use crate::bus::Bus;
use crate::lab::Scene;
use crate::nic::{self, Nic};
use crate::pair::{ADDRESS, Pair, PairSpec};
use crate::vm::VmSpec;

const CYCLES: u32 = 20;

/// A second NIC is plugged, used and unplugged twenty times while a stream runs over the first NIC.
pub fn cycles(scene: &Scene) -> Result<()> {
    let pair = Pair::start(scene, PairSpec::default())?;
    let qmp = pair.vms[0].qmp_socket().display().to_string();
    let stream = pair.b().start("guest-agent receive 0.0.0.0:5000")?;
    pair.b().ok("until grep -q ':1388 [0:]* 0A' /proc/net/tcp; do sleep 0.05; done")?;
    // The test ends the stream, so it runs during every cycle.
    let sender =
        pair.a().start(&format!("guest-agent send {}:5000 1000000000000 3", ADDRESS[1]))?;
    let (mut plugs, mut unplugs) = (Vec::new(), Vec::new());
    for cycle in 0..CYCLES {
        let began = std::time::Instant::now();
        pair.bus.run(&[
            "device",
            "add",
            "extra",
            "--class",
            "venet",
            "--set",
            "backend=null",
            "--qmp",
            &qmp,
        ])?;
        pair.a().ok("until vbus-guest list | grep -q extra; do sleep 0.02; done")?;
        plugs.push(began.elapsed().as_millis());
        let nic = Nic::up(&pair.vms[0].guest, "extra", "vbus1", "10.0.1.1/24", "")?;
        let began = std::time::Instant::now();
        pair.bus.run(&["device", "remove", "extra", "--qmp", &qmp])?;
        unplugs.push(began.elapsed().as_millis());
        let ended = nic.driver.wait(crate::pair::TRANSFER)?;
        ensure!(
            !nic.interface.is_empty() && ended.code != 101,
            "cycle {cycle}: the driver panicked: {}",
            ended.stderr
        );
        ensure!(
            sender.runs() && stream.runs(),
            "cycle {cycle} ended the stream on the other NIC: {:?}",
            sender.said()
        );
    }
    eprintln!("plugged in {plugs:?} ms, unplugged in {unplugs:?} ms");
    sender.kill()?;
    stream.kill()?;
    pair.transfer(5001, 16 << 20)
}

/// One `vbus-guest net --all` drives every NIC that is plugged, follows its link, and releases it
/// when it is unplugged.
pub fn follow(scene: &Scene) -> Result<()> {
    const INTERFACE: &str = "/sys/class/net/vbus0";
    let bus = Bus::start(scene, &format!("[allow]\npaths = [{:?}]\n", scene.dir()))?;
    let vm = VmSpec::new("a").boot(scene)?;
    nic::prepare(&vm.guest)?;
    let qmp = vm.qmp_socket().display().to_string();
    let driver = vm.guest.start("exec vbus-guest net --all --up")?;
    let until = |what: &str| vm.guest.ok(&format!("until {what}; do sleep 0.02; done"));
    for cycle in 0..3 {
        let stream = scene.dir().join(format!("stream-{cycle}"));
        let listen = format!("listen={}", stream.display());
        let settings = ["--set", "backend=stream", "--set", &listen];
        bus.run(
            &[&["device", "add", "extra", "--class", "venet"][..], &settings, &["--qmp", &qmp]]
                .concat(),
        )?;
        until(&format!("[ -e {INTERFACE} ]"))?;
        // Each change happens twice: at the second one the driver has handled one before.
        for _ in 0..2 {
            let peer = UnixStream::connect(&stream).context("the NIC's stream")?;
            until(&format!("[ \"$(cat {INTERFACE}/carrier)\" = 1 ]"))?;
            drop(peer);
            until(&format!("[ \"$(cat {INTERFACE}/carrier)\" = 0 ]"))?;
        }
        bus.run(&["device", "remove", "extra", "--qmp", &qmp])?;
        until(&format!("[ ! -e {INTERFACE} ]"))?;
        ensure!(driver.runs(), "cycle {cycle} ended the driver: {:?}", driver.said());
    }
    vm.power_off()
}
