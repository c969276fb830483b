// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The module in each of Debian's kernels: it is loaded, finds its devices, and is unloaded. At the
//! end each class does its work: frames go, values come and go, an interrupt comes by a line of the
//! controller, and a virtual CPU's thread follows a task.

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
use crate::scenarios::vm::sched;
use crate::vm::{Vm, VmSpec};
use crate::wire::FAR;
use crate::workspace;

/// The class that the driver does not know: that of `examples/block`.
const UNKNOWN: &str = "block";

/// The devices of the guest: name, class and settings, in the order of their root ports. Behind
/// them is one of the class `sched`, whose settings depend on the machine.
const DEVICES: [(&str, &str, &str); 5] = [
    ("net0", "venet", "backend = \"switch\""),
    (
        "values",
        "state",
        "pages = [{ name = \"setpoint\", bytes = 64, owner = \"device\" }, \
         { name = \"heartbeat\", bytes = 64, owner = \"driver\" }]",
    ),
    ("net1", "venet", "backend = \"switch\"\nqueue-pairs = 2\npic = \"pic0\""),
    ("pic0", "pic", "msix = true"),
    ("disk0", UNKNOWN, "path = \"disk\""),
];

/// The interrupt of the first NIC's only vector as a line of the controller: the sum over all CPUs.
const BY_LINE: &str = "awk '/vbus-pic.*vbus-net1-0/{for(i=2;i<4;i++)n+=$i} END{print n+0}' \
     /proc/interrupts";

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
    let name = kernel.to_string();
    let config = config + &device("cpus", "sched", &sched::settings(scene, &name, sched::BOOST));
    let [block_host, _] = workspace::build_block(scene.lab.options().as_built)?;
    let bus = Bus::start_with(&block_host, scene, &config)?;
    let mut machine = VmSpec::new(&name);
    for name in DEVICES.iter().map(|(name, ..)| *name).chain(["cpus"]) {
        machine = machine.device(bus.socket(name));
    }
    machine.cpus = 2;
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
    values_go(guest, &bus).context("values of state pages")?;
    let vm = threads_follow(bus, vm).context("a virtual CPU's thread")?;
    linux::check_kernel(&vm.guest)?;
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
    let lines = || -> Result<u64> { Ok(guest.ok(BY_LINE)?.trim().parse()?) };
    let before = lines()?;
    copybreak::follows_setting(guest, &near)?;
    let now = lines()?;
    ensure!(now > before, "the controller's line has interrupted {before} times, and {now} now");
    Ok(())
}

/// Values come from the host and go to it, and a program that waits for one is woken.
fn values_go(guest: &Guest, bus: &Bus) -> Result<()> {
    guest.ok("until [ -e /dev/vbus/values/setpoint ]; do sleep 0.05; done")?;
    let watch = guest.start("exec vbus-guest state watch setpoint")?;
    for value in ["one", "two"] {
        bus.run(&["state", "set", "values", "setpoint", value])?;
        watch.wait_for(value, LIMIT)?;
    }
    let said = guest.ok("cat /dev/vbus/values/setpoint")?;
    ensure!(said == format!("{:\0<64}", "two"), "the page has {said:?}");
    let host = bus.watch("values", "heartbeat")?;
    guest.ok("vbus-guest state set heartbeat alive")?;
    host.wait_for("alive", LIMIT)?;
    watch.kill()?;
    watch.wait(LIMIT).map(drop)
}

/// The thread of a virtual CPU gets the class of a task there, and its own class back when the
/// module goes. Returns the machine.
fn threads_follow(bus: Bus, vm: Vm) -> Result<Vm> {
    let may = sched::is_privileged(&bus)?;
    let stage = sched::Stage::of(bus, vm)?;
    if !may {
        eprintln!("sched is left out: setting the class of QEMU's threads needs CAP_SYS_NICE");
        return Ok(stage.vm);
    }
    let busy = stage.vm.guest.start("exec guest-agent fifo 9 taskset 2 guest-agent spin")?;
    stage.wait("a busy task on CPU 1", [sched::OWN, sched::fifo(9)])?;
    linux::remove(&stage.vm.guest)?;
    stage.wait("the module was unloaded", [sched::OWN, sched::OWN])?;
    busy.kill()?;
    busy.wait(LIMIT)?;
    Ok(stage.vm)
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
