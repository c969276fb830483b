// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The module in each of Debian's kernels: it is loaded, finds its devices, and is unloaded. At the
//! end frames go.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::copybreak;
use crate::bus::{Bus, device};
use crate::guest::Guest;
use crate::kit::kernels::{DebianKernel, Series};
use crate::lab::Scene;
use crate::linux::{self, IP};
use crate::nic;
use crate::pair::ADDRESS;
use crate::report::Skip;
use crate::vm::VmSpec;
use crate::wire::FAR;
use crate::workspace;

/// The class that the driver does not know: that of `examples/block`.
const UNKNOWN: &str = "block";

/// The devices of the guest: name, class and settings, in the order of their root ports.
const DEVICES: [(&str, &str, &str); 5] = [
    ("net0", "venet", "backend = \"switch\""),
    ("values", "state", "pages = [{ name = \"setpoint\", bytes = 64, owner = \"device\" }]"),
    ("net1", "venet", "backend = \"switch\"\nqueue-pairs = 2\npic = \"pic0\""),
    ("pic0", "pic", "msix = true"),
    ("disk0", UNKNOWN, "path = \"disk\""),
];

/// How long the controller may take to carry an interrupt.
const LIMIT: Duration = Duration::from_secs(120);

/// How often the module is loaded anew if nobody says how often.
const TIMES: u32 = 5;

/// Linux 6.1 of Debian 12.
pub fn v6_1(scene: &Scene) -> Result<()> {
    load(scene, linux::kernel_of(scene, Series::V6_1))
}

/// Linux 6.12 of Debian 13.
pub fn v6_12(scene: &Scene) -> Result<()> {
    load(scene, linux::kernel_of(scene, Series::V6_12))
}

/// Linux 7 of Debian 13's backports.
pub fn v7(scene: &Scene) -> Result<()> {
    load(scene, linux::kernel_of(scene, Series::V7))
}

/// The kernels for machines of all kinds. They are large, so they are for long runs.
pub fn generic(scene: &Scene) -> Result<()> {
    if scene.lab.times().is_none() {
        return Err(Skip("only with --times: the kit fetches three large kernels".into()).into());
    }
    DebianKernel::GENERIC
        .into_iter()
        .try_for_each(|kernel| load(scene, kernel).with_context(|| format!("Linux {kernel}")))
}

/// Boots the kernel, and loads and unloads the module again and again.
fn load(scene: &Scene, kernel: DebianKernel) -> Result<()> {
    let system = linux::system(scene, kernel)?;
    let config: String =
        DEVICES.map(|(name, class, settings)| device(name, class, settings)).concat();
    let disk = scene.dir().join("disk");
    fs::write(&disk, [0; 512])?;
    let config = config.replace("\"disk\"", &format!("{:?}", disk.display().to_string()));
    let [block_host, _] = workspace::build_block(scene.lab.options().as_built)?;
    let bus = Bus::start_with(&block_host, scene, &config)?;
    let mut machine = VmSpec::new(&kernel.to_string());
    for (name, ..) in DEVICES {
        machine = machine.device(bus.socket(name));
    }
    machine.system = Some(system);
    let vm = machine.boot(scene)?;
    let guest = &vm.guest;
    let release = guest.ok("uname -r")?;
    ensure!(kernel.is(release.trim()), "Linux {kernel} was asked for, and {release} has booted");
    linux::check_kernel(guest).context("before the module is loaded")?;
    let times = scene.lab.times().unwrap_or(TIMES);
    for time in 1..=times {
        linux::insert(guest, "").with_context(|| format!("time {time}"))?;
        find_devices(guest).with_context(|| format!("time {time}"))?;
        linux::remove(guest).with_context(|| format!("time {time}"))?;
        ensure!(
            guest.ok("ls /sys/bus/pci/drivers")?.lines().all(|driver| driver != "vbus"),
            "the driver is still there"
        );
    }
    linux::insert(guest, "")?;
    find_devices(guest)?;
    frames_go(guest).context("frames between the NICs")?;
    linux::check_kernel(guest)?;
    vm.power_off()
}

/// Checks that each device has the driver, that sysfs tells its class and its name, and that a NIC
/// has an interface. A device of a class that the driver does not know stays free for others, and
/// the kernel's log says so.
fn find_devices(guest: &Guest) -> Result<()> {
    let log = guest.ok("dmesg")?;
    for (slot, (name, class, _)) in DEVICES.into_iter().enumerate() {
        let folder = linux::function(slot);
        let driver = guest.run(&format!("readlink {folder}/driver"))?.stdout;
        let driver = driver.trim().rsplit('/').next().unwrap_or_default();
        if class == UNKNOWN {
            let says = log.contains(&format!("does not know the class {class} "));
            ensure!(says && driver != "vbus", "{name} has the driver {driver:?}; the log:\n{log}");
            continue;
        }
        ensure!(driver == "vbus", "the driver of {name} is {driver:?}; the kernel's log:\n{log}");
        let told = guest.ok(&format!("cat {folder}/vbus/class {folder}/vbus/name"))?;
        ensure!(
            told == format!("{class}\n{name}\n"),
            "the device {name} of the class {class} is told as {told:?}"
        );
        if class == "venet" {
            linux::interface(guest, slot)?;
        }
    }
    carry(guest)
}

/// Frames go from one NIC to the other, which is in a namespace of its own.
fn frames_go(guest: &Guest) -> Result<()> {
    let [near, far] = [linux::interface(guest, 2)?, linux::interface(guest, 0)?];
    guest.ok(&format!("{IP} netns add far && {IP} link set {far} netns far"))?;
    nic::set_up_in(guest, FAR, &far, &format!("{}/24", ADDRESS[1]))?;
    nic::set_up(guest, &near, &format!("{}/24", ADDRESS[0]))?;
    copybreak::follows_setting(guest, &near)
}

/// Opens the NIC that names the interrupt controller, and waits until the controller has a line for
/// it.
fn carry(guest: &Guest) -> Result<()> {
    let interface = linux::interface(guest, 2)?;
    guest.ok(&format!("ip link set {interface} up"))?;
    let line = "for i in $(seq 600); do grep -q 'vbus-pic.*vbus-net1-0' /proc/interrupts && exit; \
                sleep 0.1; done; exit 1";
    guest.start(line)?.ok(LIMIT).context("the controller carries no interrupt").map(drop)
}
