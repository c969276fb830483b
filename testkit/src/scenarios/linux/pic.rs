// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Interrupt controllers of the bus in Linux: they carry the interrupts of two NICs, and whatever
//! happens to them or to the NICs, no interrupt is lost.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::restart::suspend;
use crate::bus::{Bus, device};
use crate::guest::Guest;
use crate::lab::Scene;
use crate::linux::{self, IP};
use crate::vm::VmSpec;
use crate::wire::{NICS, Wire};

/// A controller with a vector for each CPU, which carries the three interrupts of the first NIC. It
/// is behind root port 2.
const PIC: &str = "pic";
const SLOT: usize = 2;

/// A controller with one vector, which carries the one interrupt of the second NIC. It is behind
/// root port 3. QEMU aborts when a device with MSI-X is unplugged. So this one and its NIC have
/// none.
const SINGLE: &str = "pic-single";
const SINGLE_SLOT: usize = 3;

/// The routes of each.
const ROUTES: [(&str, usize); 2] = [(PIC, 3), (SINGLE, 1)];

/// Bytes each way of an exchange whose hashes are compared.
const EXCHANGE: u64 = 2 << 20;

/// Bytes each way that pass before something happens.
const FLOW: u64 = 1 << 20;

/// How long a change may take to show.
const LIMIT: Duration = Duration::from_secs(120);

/// The interrupts of the queues of NIC a: a vector each.
const QUEUES: [&str; 2] = ["vbus-net-a-0", "vbus-net-a-1"];

/// The controllers carry interrupts, and each of these happens under load: routes move, CPUs go and
/// come, connections are lost, devices are unplugged, the module is unloaded.
pub fn carries(scene: &Scene) -> Result<()> {
    let mut wire = start(scene)?;
    linux::insert(wire.guest(), "")?;
    wire.up()?;
    carried(&wire).context("after insmod")?;
    wire.exchange(EXCHANGE)?;
    moves(&wire)?;

    under_load(&mut wire, "a CPU off and on", |wire| {
        let cpu = "/sys/devices/system/cpu/cpu1/online";
        wire.guest().ok(&format!("echo 0 > {cpu}"))?;
        wire.flow(FLOW)?;
        wire.guest().ok(&format!("echo 1 > {cpu}")).map(drop)
    })?;
    under_load(&mut wire, "the controllers' connections are lost", |wire| {
        ROUTES
            .iter()
            .try_for_each(|(name, _)| wire.bus.run(&["device", "reincarnate", name]).map(drop))
    })?;
    under_load(&mut wire, "a NIC's connection is lost", |wire| {
        wire.bus.run(&["device", "reincarnate", NICS[0]]).map(drop)
    })?;
    let name = linux::address(SLOT);
    under_load(&mut wire, "the controller is unbound and bound", |wire| {
        let driver = "/sys/bus/pci/drivers/vbus";
        wire.guest().ok(&format!("echo {name} > {driver}/unbind"))?;
        let left = lines(wire.guest())?;
        let left = left.iter().filter(|line| line.name.contains(NICS[0])).count();
        ensure!(left == 0, "{left} lines are left without their controller");
        wire.flow(FLOW)?;
        wire.guest().ok(&format!("echo {name} > {driver}/bind")).map(drop)
    })?;
    under_load(&mut wire, "a controller is unplugged and plugged", |wire| {
        wire.vm.control.forget_events()?;
        wire.vm.unplug("dev3")?;
        wire.flow(FLOW)?;
        let socket = wire.bus.socket(SINGLE);
        wire.vm.plug("dev3", SINGLE_SLOT, &socket)
    })?;
    under_load(&mut wire, "a NIC is unplugged and plugged", |wire| {
        wire.vm.control.forget_events()?;
        wire.vm.unplug("dev1")?;
        let socket = wire.bus.socket(NICS[1]);
        wire.vm.plug("dev1", 1, &socket)?;
        wire.up_far(&linux::interface(wire.guest(), 1)?)
    })?;
    under_load(&mut wire, "rmmod and insmod", |wire| {
        linux::remove(wire.guest())?;
        let left = lines(wire.guest())?;
        ensure!(left.is_empty(), "lines are left without the module: {left:?}");
        linux::insert(wire.guest(), "")?;
        wire.up()
    })?;
    linux::check_kernel(wire.guest())?;
    wire.vm.power_off()
}

/// Starts a guest with two CPUs, both NICs and their controllers, without the module.
fn start(scene: &Scene) -> Result<Wire> {
    let system = linux::chosen_system(scene)?;
    let settings = [
        "backend = \"switch\"\nmsix = true\nqueue-pairs = 2\npic = \"pic\"",
        "backend = \"switch\"\npic = \"pic-single\"",
    ];
    let config = NICS.iter().zip(settings).map(|(name, more)| device(name, "venet", more));
    let config = config.collect::<String>()
        + &device(PIC, "pic", "msix = true\ncpus = 8")
        + &device(SINGLE, "pic", "");
    let bus = Bus::start(scene, &config)?;
    let mut machine = VmSpec::new("a");
    for name in [NICS[0], NICS[1], PIC, SINGLE] {
        machine = machine.device(bus.socket(name));
    }
    machine.cpus = 2;
    machine.system = Some(system);
    let vm = machine.boot(scene)?;
    vm.guest.ok(&format!("{IP} netns add far && {IP} -n far link set lo up"))?;
    Ok(Wire { vm, bus })
}

/// The system is suspended to RAM and wakes, under load, and the controllers carry interrupts
/// again: also those of a NIC that has INTx, and by a controller that has INTx itself.
pub fn sleeps(scene: &Scene) -> Result<()> {
    let mut wire = start(scene)?;
    for (what, slot) in [("a NIC has INTx", 1), ("its controller has INTx too", SINGLE_SLOT)] {
        let mut all = || -> Result<()> {
            let folder = linux::function(slot);
            wire.guest().ok(&format!("echo 0 > {folder}/msi_bus"))?;
            linux::insert(wire.guest(), "")?;
            let kind = wire.guest().ok(&format!("cat {folder}/vbus/interrupts"))?;
            ensure!(kind.trim() == "intx 1", "the device interrupts by {kind}");
            wire.up()?;
            carried(&wire).context("after insmod")?;
            for time in 1..=scene.lab.times().unwrap_or(1) {
                under_load(&mut wire, &format!("sleep {time}"), |wire| suspend(&mut wire.vm))?;
            }
            moves(&wire)?;
            linux::remove(wire.guest())
        };
        all().context(what)?;
    }
    linux::check_kernel(wire.guest())?;
    wire.vm.power_off()
}

/// Lets something happen under load. After that the controller carries interrupts again.
fn under_load(
    wire: &mut Wire,
    what: &str,
    mut event: impl FnMut(&mut Wire) -> Result<()>,
) -> Result<()> {
    let mut all = || -> Result<()> {
        let load = wire.load()?;
        wire.flow(FLOW)?;
        event(wire)?;
        load.end()?;
        wire.ping()?;
        carried(wire)?;
        wire.exchange(EXCHANGE)?;
        linux::check_kernel(wire.guest())
    };
    all().context(what.to_owned())
}

/// An interrupt of the guest: its number, its count for each CPU, whether it is a line of a
/// controller, and its name.
#[derive(Debug)]
struct Interrupt {
    number: u32,
    counts: Vec<u64>,
    is_line: bool,
    name: String,
}

impl Interrupt {
    /// A line of /proc/interrupts.
    fn parse(line: &str) -> Option<Self> {
        let (number, rest) = line.split_once(':')?;
        let words: Vec<&str> = rest.split_whitespace().collect();
        let counts: Vec<u64> = words.iter().map_while(|word| word.parse().ok()).collect();
        let is_line = words.get(counts.len()) == Some(&"vbus-pic");
        let name = (*words.last()?).to_owned();
        Some(Self { number: number.trim().parse().ok()?, counts, is_line, name })
    }

    fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

fn interrupts(guest: &Guest) -> Result<Vec<Interrupt>> {
    Ok(guest.ok("cat /proc/interrupts")?.lines().filter_map(Interrupt::parse).collect())
}

/// The lines of controllers.
fn lines(guest: &Guest) -> Result<Vec<Interrupt>> {
    Ok(interrupts(guest)?.into_iter().filter(|interrupt| interrupt.is_line).collect())
}

/// The interrupt of this name, as a line or as a vector.
fn find(guest: &Guest, name: &str, is_line: bool) -> Result<Interrupt> {
    let found = interrupts(guest)?
        .into_iter()
        .find(|interrupt| interrupt.name == name && interrupt.is_line == is_line);
    found.with_context(|| format!("no interrupt {name}, line: {is_line}"))
}

/// The routes of a controller now, as the bus tells them: how many.
fn routes(wire: &Wire, name: &str) -> Result<usize> {
    let shown = wire.bus.run(&["device", "show", name, "--json"])?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    let found = find_array(&shown, "routes");
    Ok(found.with_context(|| format!("no routes in {shown}"))?.len())
}

/// The first array of this name anywhere in a value.
fn find_array<'a>(value: &'a serde_json::Value, key: &str) -> Option<&'a Vec<serde_json::Value>> {
    match value {
        serde_json::Value::Object(map) => map
            .get(key)
            .and_then(|found| found.as_array())
            .or_else(|| map.values().find_map(|value| find_array(value, key))),
        serde_json::Value::Array(values) => values.iter().find_map(|value| find_array(value, key)),
        _ => None,
    }
}

/// Waits until the controllers carry all interrupts of the NICs. Then frames bring interrupts of
/// the lines, and none of the NICs' own vectors.
fn carried(wire: &Wire) -> Result<()> {
    let guest = wire.guest();
    let began = Instant::now();
    for (name, wanted) in ROUTES {
        while routes(wire, name)? < wanted {
            let now = routes(wire, name)?;
            ensure!(began.elapsed() < LIMIT, "{name} has {now} routes of {wanted}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    // What a device sent when its route began has come.
    wire.ping()?;
    let count = |is_line| -> Result<u64> {
        let all = interrupts(guest)?;
        let ours = all.iter().filter(|one| one.is_line == is_line);
        Ok(ours.filter(|one| one.name.starts_with("vbus-net")).map(Interrupt::count).sum())
    };
    let (lines, own) = (count(true)?, count(false)?);
    wire.exchange(EXCHANGE)?;
    let (lines, own) = (count(true)? - lines, count(false)? - own);
    ensure!(lines > 0, "no line interrupts");
    ensure!(own == 0, "the NICs sent {own} interrupts of their own, and {lines} by lines");
    Ok(())
}

/// The administrator moves a line to each CPU: its interrupts come there.
fn moves(wire: &Wire) -> Result<()> {
    let guest = wire.guest();
    for cpu in [1, 0, 1] {
        for queue in QUEUES {
            let number = find(guest, queue, true)?.number;
            let folder = format!("/proc/irq/{number}");
            guest.ok(&format!("echo {} > {folder}/smp_affinity", 1 << cpu))?;
            let effective = guest.ok(&format!("cat {folder}/effective_affinity"))?;
            ensure!(
                u32::from_str_radix(effective.trim(), 16) == Ok(1 << cpu),
                "{queue} was moved to CPU {cpu}, and is at {effective}"
            );
        }
        let began = Instant::now();
        // The route moves a little later: until then interrupts come at the CPU before.
        loop {
            let before = QUEUES.map(|queue| find(guest, queue, true));
            wire.exchange(EXCHANGE)?;
            let mut grown = [0, 0];
            for (queue, before) in QUEUES.iter().zip(before) {
                let (before, now) = (before?, find(guest, queue, true)?);
                for (at, grown) in grown.iter_mut().enumerate() {
                    *grown += now.counts[at] - before.counts[at];
                }
            }
            if grown[cpu] > 0 && grown[1 - cpu] == 0 {
                break;
            }
            ensure!(began.elapsed() < LIMIT, "lines for CPU {cpu} come by CPU: {grown:?}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_a_controller_is_found_among_the_interrupts() {
        let text = " 30:        12          3  vbus-pic   4-edge      vbus-net-a-1\n";
        let line = Interrupt::parse(text).unwrap();
        assert_eq!((line.number, line.count(), line.is_line), (30, 15, true));
        assert_eq!(line.name, "vbus-net-a-1");
        let own =
            Interrupt::parse(" 24:  7  0  PCI-MSIX-0000:01:00.0  0-edge  vbus-net-a-1").unwrap();
        assert!(!own.is_line && own.count() == 7);
        assert!(Interrupt::parse("            CPU0       CPU1").is_none());
        assert!(Interrupt::parse("NMI:   0   0   Non-maskable interrupts").is_none());
    }
}
