// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that come and go while guests run.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::bus::Bus;
use crate::lab::Scene;
use crate::nic::{self, Nic};
use crate::pair::{ADDRESS, Pair, PairSpec};
use crate::vm::{Vm, VmSpec};

const CYCLES: u32 = 20;

/// Guest a can get more memory: a module in a slot, and as much of a virtio-mem device as it is
/// told to take.
const MORE_MEMORY: [&str; 6] = [
    "-m",
    "384M,slots=1,maxmem=1G",
    "-object",
    "memory-backend-memfd,id=vmem,size=256M,share=on",
    "-device",
    "virtio-mem-pci,id=vmem0,memdev=vmem,requested-size=0,bus=pcie.0,addr=0x18",
];

/// A second NIC is plugged, used and unplugged twenty times while a stream runs over the first NIC.
/// In between the guest gets memory, and gives some of it back. The bus maps all of it, as it is: a
/// module from a file in /dev/shm, and the memory of virtio-mem, whose unplugged parts are holes.
pub fn cycles(scene: &Scene) -> Result<()> {
    let mut pair = Pair::start(scene, PairSpec { args: &MORE_MEMORY, ..PairSpec::default() })?;
    let files = |pair: &Pair| -> Result<u64> {
        let shown: Value =
            serde_json::from_str(&pair.bus.run(&["device", "show", "net-a", "--json"])?)?;
        shown["memory"]["descriptors"]["used"].as_u64().context("no number of memory files")
    };
    let qmp = pair.vms[0].qmp_socket().display().to_string();
    let stream = pair.b().start("guest-agent receive 0.0.0.0:5000")?;
    pair.b().ok("until grep -q ':1388 [0:]* 0A' /proc/net/tcp; do sleep 0.05; done")?;
    // The test ends the stream, so it runs during every cycle.
    let sender =
        pair.a().start(&format!("guest-agent send {}:5000 1000000000000 3", ADDRESS[1]))?;
    let (mut plugs, mut unplugs) = (Vec::new(), Vec::new());
    for cycle in 0..CYCLES {
        match cycle {
            3 => {
                let control = &mut pair.vms[0].control;
                let file = json!({
                    "qom-type": "memory-backend-file", "id": "module", "size": 128 << 20,
                    "share": true, "mem-path": "/dev/shm",
                });
                control.execute("object-add", file)?;
                let module = json!({ "driver": "pc-dimm", "id": "dimm0", "memdev": "module" });
                control.execute("device_add", module)?;
                let files = files(&pair)?;
                ensure!(files == 2, "the module is not mapped: {files} files");
            }
            6 => resize(&mut pair.vms[0], 128 << 20)?,
            7 => {
                let files = files(&pair)?;
                ensure!(files == 3, "the memory of virtio-mem is not mapped: {files} files");
            }
            9 => resize(&mut pair.vms[0], 0)?,
            _ => {}
        }
        let began = Instant::now();
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
        let began = Instant::now();
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

/// Asks the guest to have `bytes` bytes of the virtio-mem device, and waits until it has them.
fn resize(vm: &mut Vm, bytes: u64) -> Result<()> {
    let device =
        |property: &str| json!({ "path": "/machine/peripheral/vmem0", "property": property });
    let mut wanted = device("requested-size");
    wanted["value"] = bytes.into();
    vm.control.execute("qom-set", wanted)?;
    let until = Instant::now() + Duration::from_secs(60);
    while vm.control.execute("qom-get", device("size"))? != bytes {
        ensure!(Instant::now() < until, "the guest does not come to {bytes} bytes of virtio-mem");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
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
