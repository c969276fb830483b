// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A vfio-user device without the bus: the example of the protocol's crate.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::lab::Scene;
use crate::process::Process;
use crate::vm::VmSpec;
use crate::workspace;

/// How long the example may take to make its socket.
const START: Duration = Duration::from_secs(30);
/// The device's address, behind the first root port.
const FUNCTION: &str = "/sys/bus/pci/devices/0000:01:00.0";

/// The example `square` of vfio-user-protocol under stock QEMU: a guest finds the device, reads and
/// writes its BAR, and gets its interrupt. A second guest finds it as the first did.
pub fn example(scene: &Scene) -> Result<()> {
    let status = workspace::cargo()
        .args(["build", "--quiet", "--package", "vfio-user-protocol", "--example", "square"])
        .arg("--target-dir")
        .arg(workspace::target())
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "the example square does not build");
    let socket = scene.dir().join("square.sock");
    let mut command = Command::new(workspace::target().join("debug/examples/square"));
    command.arg(&socket);
    let mut device = Process::start(command, "the example square", &scene.dir().join("square"))?;
    let end = Instant::now() + START;
    while !socket.exists() {
        ensure!(device.ended()?.is_none() && Instant::now() < end, device.complaint("serves not"));
        std::thread::sleep(Duration::from_millis(10));
    }
    for name in ["a", "b"] {
        let vm = VmSpec::new(name).device(&socket).boot(scene)?;
        let guest = &vm.guest;
        let read = |file: &str| guest.ok(&format!("cat {FUNCTION}/{file}"));
        let identity = [read("vendor")?, read("device")?, read("class")?].concat();
        ensure!(identity == "0x1af4\n0x10f0\n0xff0000\n", "the device is {identity:?}");
        let resource = read("resource")?;
        let bar: Vec<u64> = resource
            .split_whitespace()
            .take(2)
            .filter_map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok())
            .collect();
        let [first, last] = bar[..] else { anyhow::bail!("no BAR in {resource:?}") };
        ensure!(last - first == 0xfff, "BAR 0 is from {first:#x} to {last:#x}");

        guest.ok("echo 1af4 10f0 > /sys/bus/pci/drivers/uio_pci_generic/new_id")?;
        guest.ok("until [ -c /dev/uio0 ]; do sleep 0.02; done")?;
        for count in 1..=3u32 {
            // A reader of /dev/uio0 waits for an interrupt that comes after it has opened the file.
            // It reads the number of interrupts.
            let seen = guest.ok(&format!(
                "exec 3< /dev/uio0; devmem {first:#x} 32 {}; \
                 dd bs=4 count=1 <&3 2> /dev/null | od -An -tu4",
                1000 + count
            ))?;
            ensure!(seen.trim() == count.to_string(), "interrupt {count} is counted as {seen:?}");
            let square = (1000 + count) * (1000 + count);
            let read = guest.ok(&format!("devmem {:#x} 32", first + 4))?;
            ensure!(read.trim() == format!("0x{square:08X}"), "{square:#x} reads as {read:?}");
            guest.ok(&format!("devmem {:#x} 32 0", first + 8))?;
            // The driver sets Interrupt Disable at each interrupt. This clears it.
            guest.ok(&format!(
                "printf '\\006\\000' | dd of={FUNCTION}/config bs=2 seek=2 conv=notrunc 2> \
                 /dev/null"
            ))?;
        }
        vm.power_off()?;
    }
    ensure!(device.ended()?.is_none(), device.complaint("ended"));
    Ok(())
}
