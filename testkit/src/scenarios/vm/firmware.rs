// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Firmware that drives the class `virtio-net` and boots over it.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::bus::{Bus, device};
use crate::lab::Scene;
use crate::netboot::{SERVER, Server};
use crate::report::Skip;
use crate::vm::{KERNEL_WORDS, Vm, VmSpec};

/// The devices, one for each firmware.
const CARDS: [&str; 2] = ["ipxe", "uefi"];

/// A word on the command line of the kernel that iPXE boots.
const MARK: &str = "by-ipxe";

/// How long a firmware may take. UEFI alone looks for its devices for half a minute.
const LIMIT: Duration = Duration::from_secs(400);

/// iPXE gets an address by DHCP and boots Linux, kernel and root file system, by TFTP. UEFI gets an
/// address too, and the file that it shall boot. What the server saw counts.
pub fn netboot(scene: &Scene) -> Result<()> {
    let Some(kit) = scene.lab.kit() else {
        return Err(Skip("the firmware is part of the kit, which is not in use".into()).into());
    };
    let firmware = kit.firmware()?;
    let stream = |name: &str| scene.dir().join(format!("{name}.stream"));
    let card = |name: &str| {
        let settings = format!("backend = \"stream\"\nlisten = \"{}\"", stream(name).display());
        device(name, "virtio-net", &settings)
    };
    let bus = Bus::start(scene, &CARDS.map(card).concat())?;

    let system = scene.lab.system();
    let read = |path| fs::read(path).with_context(|| format!("cannot read {path:?}"));
    let files = BTreeMap::from([
        ("kernel".to_owned(), read(system.kernel())?),
        ("initramfs".to_owned(), read(system.initramfs())?),
    ]);
    // No program. UEFI gets it whole before it looks at it.
    let program = BTreeMap::from([("program.efi".to_owned(), vec![0x5a; 100_000])]);
    let by_ipxe = Server::start(&stream(CARDS[0]), files, "kernel")?;
    let by_uefi = Server::start(&stream(CARDS[1]), program, "program.efi")?;

    let vars = scene.dir().join("vars.fd");
    fs::copy(&firmware.ovmf[1], &vars).context("cannot copy the variables of UEFI")?;
    let flash = |unit: u32, path: &std::path::Path, more: &str| {
        format!("if=pflash,unit={unit},format=raw,file={}{more}", path.display())
    };
    let mut uefi = VmSpec::new("uefi").device(bus.socket(CARDS[1]));
    uefi.boot = Some(
        [
            "-drive",
            &flash(0, &firmware.ovmf[0], ",readonly=on"),
            "-drive",
            &flash(1, &vars, ""),
            // Its network needs random numbers.
            "-device",
            "virtio-rng-pci,bus=pcie.0",
        ]
        .map(str::to_owned)
        .into(),
    );
    let uefi = uefi.start(scene)?;

    let mut ipxe = VmSpec::new("ipxe").device(bus.socket(CARDS[0]));
    let script = format!(
        "dhcp net0 && kernel tftp://{SERVER}/kernel initrd=initramfs {KERNEL_WORDS} {MARK} && \
         initrd tftp://{SERVER}/initramfs && boot"
    );
    let image = firmware.ipxe.display().to_string();
    ipxe.boot = Some(["-kernel", &image, "-append", &script].map(str::to_owned).into());
    ipxe.memory_mib = 512;
    let ipxe = ipxe.start(scene)?;

    check(&ipxe, &by_ipxe, &["initramfs", "kernel"])?;
    ipxe.wait_boot(1)?;
    let words = ipxe.guest.ok("cat /proc/cmdline")?;
    ensure!(words.contains(MARK), "the kernel has the words {words:?}");
    ipxe.guest.ok("ls /sys/bus/virtio/devices/virtio0/net")?;
    ipxe.power_off()?;
    check(&uefi, &by_uefi, &["program.efi"])?;
    for (name, server) in CARDS.into_iter().zip([by_ipxe, by_uefi]) {
        eprintln!("{name}: {:?}", server.seen());
    }
    Ok(())
}

/// Waits until the firmware has accepted an address and got these files whole.
fn check(vm: &Vm, server: &Server, names: &[&str]) -> Result<()> {
    let (limit, began) = (vm.guest.at_most(LIMIT), Instant::now());
    loop {
        let seen = server.seen();
        if seen.leases > 0 && names.iter().all(|name| seen.files.contains_key(*name)) {
            return Ok(());
        }
        ensure!(
            began.elapsed() < limit,
            "{:?} within {} s, and {names:?} are to come",
            seen,
            limit.as_secs()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}
