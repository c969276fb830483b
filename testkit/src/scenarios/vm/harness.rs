// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tests of the test kit: what all other scenarios expect of their guests.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::lab::Scene;
use crate::vm::{BOOT, VmSpec};

/// A guest boots, has everything that the driver needs, runs commands side by side, and powers off.
pub fn boot(scene: &Scene) -> Result<()> {
    let vm = VmSpec::new("a").boot(scene)?;
    eprintln!("booted in {:.1} s", vm.age().as_secs_f32());
    let guest = &vm.guest;
    for module in ["uio_pci_generic", "tun"] {
        guest.ok(&format!("test -d /sys/module/{module}"))?;
    }
    let pages = guest.ok("echo 32 > /proc/sys/vm/nr_hugepages; cat /proc/sys/vm/nr_hugepages")?;
    ensure!(pages.trim() == "32", "of 32 huge pages the guest has {pages}");

    // Exit codes, both outputs, bytes that are not text, and a long command beside short ones.
    let slow = guest.start("read line; echo got $line")?;
    let output = guest.run("echo out; echo err >&2; exit 3")?;
    ensure!(
        (output.code, output.stdout.as_str(), output.stderr.as_str()) == (3, "out\n", "err\n"),
        "got {output:?}"
    );
    let killed = guest.start("sleep 1000")?;
    killed.kill()?;
    let code = killed.wait(BOOT)?.code;
    ensure!(code == 128 + 9, "a killed command ended with {code}");
    slow.input(b"a line\n")?;
    let said = slow.ok(Duration::from_secs(20))?;
    ensure!(said == "got a line\n", "got {said:?}");
    vm.power_off()
}

/// After a reset the guest boots again, and its new agent uses the same channel.
pub fn reboot(scene: &Scene) -> Result<()> {
    let mut vm = VmSpec::new("a").boot(scene)?;
    vm.guest.ok("touch /tmp/before")?;
    let waiting = vm.guest.start("sleep 1000")?;
    vm.reset()?;
    vm.wait_boot(2)?;
    ensure!(!waiting.runs(), "a command outlived the reset");
    ensure!(vm.guest.run("test -e /tmp/before")?.code == 1, "a file in memory outlived the reset");
    vm.guest.start("reboot -f")?;
    vm.wait_boot(3)?;
    ensure!(vm.guest.boots() == 3, "{} boots", vm.guest.boots());
    vm.power_off()
}

/// Two guests exchange a stream whose hash both ends agree on.
pub fn two_guests(scene: &Scene) -> Result<()> {
    const BYTES: u64 = 64 << 20;
    let socket = scene.dir().join("net").display().to_string();
    let machine = |name: &str, server: &str, last: &str| {
        let netdev = format!("stream,id=net,server={server},addr.type=unix,addr.path={socket}");
        let device = format!("virtio-net-pci,netdev=net,romfile=,mac=02:00:00:00:00:{last}");
        VmSpec::new(name).args(&["-netdev", &netdev, "-device", &device])
    };
    let a = machine("a", "on", "01").start(scene)?;
    let b = machine("b", "off", "02").start(scene)?;
    for (vm, address) in [(&a, "10.0.0.1"), (&b, "10.0.0.2")] {
        vm.wait_boot(1)?;
        vm.guest.ok(&format!("ip addr add {address}/24 dev eth0; ip link set eth0 up"))?;
    }
    a.guest.ok("ping -c 1 -W 60 10.0.0.2")?;
    let receiver = b.guest.start("guest-agent receive 0.0.0.0:5000")?;
    // The port is open when it is in the kernel's table.
    b.guest.ok("until grep -q :1388 /proc/net/tcp; do sleep 0.1; done")?;
    let sent = a.guest.start(&format!("guest-agent send 10.0.0.2:5000 {BYTES} 7"))?.ok(BOOT)?;
    let received = receiver.ok(BOOT)?;
    ensure!(
        sent == received && sent.starts_with(&BYTES.to_string()),
        "sent {sent:?}, received {received:?}"
    );
    a.power_off()?;
    b.power_off()
}
