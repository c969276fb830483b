// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The scheduling class of virtual CPUs by the Linux driver, at each switch of the guest.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::guest::Guest;
use crate::lab::Scene;
use crate::linux;
use crate::scenarios::vm::sched::{BOOST, HIGHEST, OWN, Stage, fifo};

const LIMIT: Duration = Duration::from_secs(120);
/// How often two tasks pass a byte to measure the cost of a switch.
const PASSES: u32 = 20_000;

/// The threads follow the tasks that run, and also those that sleep if the module is told so. They
/// get their own class back, however the driver or the device ends.
pub fn follows(scene: &Scene) -> Result<()> {
    let mut stage = Stage::set_with_module(scene)?;
    let guest = stage.vm.guest.clone();
    let (without, without_posts) = (switch(&guest, 0)?, switch(&guest, 5)?);
    linux::insert(&guest, "")?;
    let (with, with_posts) = (switch(&guest, 0)?, switch(&guest, 5)?);
    eprintln!(
        "a switch costs {without} ns without the driver and {with} ns with it; between an \
         ordinary and a real-time task {without_posts} ns, and {with_posts} ns with a post"
    );

    let refused = guest.run("vbus-guest sched --sleeping")?;
    ensure!(refused.code == 1 && refused.stderr.contains("sched_sleeping"), "{refused:?}");

    // A task that runs is followed at once, and as long as it runs.
    let busy = guest.start("exec guest-agent fifo 9 taskset 2 guest-agent spin")?;
    stage.wait("a busy task on CPU 1", [OWN, fifo(9)])?;
    std::thread::sleep(BOOST * 2);
    stage.wait("the class is renewed", [OWN, fifo(9)])?;
    let urgent = guest.start("exec guest-agent fifo 80 taskset 2 guest-agent spin")?;
    stage.wait("a more urgent task", [OWN, fifo(HIGHEST)])?;
    urgent.kill()?;
    stage.wait("the more urgent task has ended", [OWN, fifo(9)])?;
    stage.bus.run(&["device", "reincarnate", "cpus"])?;
    stage.wait("the connection was lost", [OWN, fifo(9)])?;
    busy.kill()?;
    stage.wait("it has ended", [OWN, OWN])?;

    // Of tasks that sleep only if somebody wants that.
    guest.ok("echo 1 > /sys/module/vbus/parameters/sched_sleeping")?;
    let tasks = [stage.task(0, 5)?, stage.task(1, 7)?, stage.task(1, 80)?];
    stage.wait("three tasks that sleep", [fifo(5), fifo(HIGHEST)])?;
    std::thread::sleep(BOOST * 2);
    stage.wait("they sleep for long", [fifo(5), fifo(HIGHEST)])?;
    tasks[2].0.kill()?;
    stage.wait("the most urgent has ended", [fifo(5), fifo(7)])?;

    // The device is unplugged, comes back, and is taken from its driver.
    stage.vm.control.forget_events()?;
    stage.vm.unplug("dev0")?;
    stage.wait("the device is unplugged", [OWN, OWN])?;
    let socket = stage.bus.socket("cpus");
    stage.vm.plug("again", 1, &socket)?;
    let busy = guest.start("exec guest-agent fifo 9 taskset 2 guest-agent spin")?;
    stage.wait("the device is back", [OWN, fifo(9)])?;
    linux::remove(&guest)?;
    stage.wait("the module was unloaded", [OWN, OWN])?;
    busy.kill()?;
    let after = switch(&guest, 0)?;
    eprintln!("after the driver was unloaded a switch costs {after} ns");
    linux::check_kernel(&guest)?;
    let _ = busy.wait(LIMIT)?;
    stage.vm.power_off()
}

/// The nanoseconds of a switch between two tasks on CPU 0, of which one has this real-time
/// priority, if it is not 0.
fn switch(guest: &Guest, priority: u32) -> Result<u64> {
    let command = format!("exec taskset 1 guest-agent switches {PASSES} {priority}");
    let said = guest.ok(&command)?;
    Ok(said.trim().parse()?)
}
