// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guests of `vbus-vmm` whose devices go with them: saved, restored with the devices of another
//! bus, and moved from bus to bus while TCP streams pass. A bridge joins the buses' ends.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::sched::wait_class;
use super::snapshot::{relocate, save};
use crate::bus::device;
use crate::guest::{Guest, Running};
use crate::l1::L1;
use crate::l1_wire::{INNER, MIB, OUTER, TRANSFER};
use crate::l2::{L1Bus, L2, L2Spec};
use crate::linux;
use crate::nic;
use crate::report::{Figures, Skip};

/// The bridge in L1.
const BRIDGE: &str = "vbus-bridge";
/// The names of the buses, which are those of their folders and TAP interfaces.
const BUSES: [&str; 2] = ["vbus-here", "vbus-there"];
/// The addresses of the bridge and of the guest's virtio card.
const CARD: [&str; 2] = ["10.0.9.254", "10.0.9.1"];
/// The guest's devices.
const DEVICES: [&str; 5] = ["net", "values", "card", "pic", "cpus"];
/// The names of the machines at the two buses.
const MACHINES: [&str; 2] = ["linux", "there"];

/// How often the guest moves if nothing else is said.
const MOVES: u32 = 2;
/// From so many moves on, more than half of them must keep to the bar of the down-time.
const MANY: usize = 10;
/// How long a guest may stand still in a move, if its last pages take less than a third of that.
const DOWN_TIME_MS: u64 = 300;
/// Bytes each way of an exchange that shows that frames pass.
const BYTES: u64 = MIB;

/// Who drives the devices in the guest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Driver {
    /// The Linux driver.
    Kernel,
    /// `vbus-guest`.
    Program,
}

/// With the Linux driver.
pub fn driver(l1: &L1, figures: &mut Figures) -> Result<()> {
    if l1.lab().times().is_none() {
        return Err(Skip("only with --times: it takes minutes".into()).into());
    }
    run(l1, figures, Driver::Kernel)
}

/// With `vbus-guest`.
pub fn program(l1: &L1, figures: &mut Figures) -> Result<()> {
    run(l1, figures, Driver::Program)
}

/// Two buses with the same devices, and the bridge that joins their ends.
pub(super) struct Buses<'a> {
    l1: &'a L1<'a>,
    buses: [L1Bus<'a>; 2],
}

impl<'a> Buses<'a> {
    /// `packed`: the virtio cards offer packed queues, and split ones in any case.
    pub(super) fn start(l1: &'a L1<'a>, packed: bool) -> Result<Self> {
        let bridge = format!("ip link show {BRIDGE} 2>/dev/null || brctl addbr {BRIDGE}");
        if l1.guest.run(&bridge)?.code != 0 {
            return Err(Skip("L1's kernel has no bridge".into()).into());
        }
        let start = |name: &str, machine: &str| -> Result<L1Bus<'a>> {
            let nic = format!(
                "backend = \"tap\"\ntap = \"{name}\"\nmac = \"02:00:00:00:00:01\"\npic = \"pic\""
            );
            let pages = "pages = [{ name = \"setpoint\", bytes = 64, owner = \"device\" }, \
                         { name = \"heartbeat\", bytes = 64, owner = \"driver\" }]";
            let card = format!(
                "backend = \"tap\"\ntap = \"{name}-c\"\nmac = \"02:00:00:00:00:02\"\nmsix = \
                 true\npacked = {packed}"
            );
            let cpus = format!("vmm = \"{}/{machine}.control\"\npriority-max = 30", l1.run_dir());
            let config = device("net", "venet", &nic)
                + &device("values", "state", pages)
                + &device("card", "virtio-net", &card)
                + &device("pic", "pic", "")
                + &device("cpus", "sched", &cpus);
            let bus = L1Bus::start_named(l1, name, &config)?;
            for tap in [name, &format!("{name}-c")] {
                l1.guest.ok(&format!("brctl addif {BRIDGE} {tap} && ip link set {tap} up"))?;
            }
            Ok(bus)
        };
        let buses = [start(BUSES[0], MACHINES[0])?, start(BUSES[1], MACHINES[1])?];
        nic::set_up(&l1.guest, BRIDGE, &format!("{OUTER}/24"))?;
        nic::set_up(&l1.guest, BRIDGE, &format!("{}/24", CARD[0]))?;
        Ok(Self { l1, buses })
    }

    /// Bus `at`.
    pub(super) fn bus(&self, at: usize) -> &L1Bus<'a> {
        &self.buses[at]
    }

    /// The words that give a machine the devices of bus `at`.
    pub(super) fn words(&self, at: usize) -> String {
        self.spec(at).args
    }

    /// A guest whose devices are those of bus `at`.
    pub(super) fn spec(&self, at: usize) -> L2Spec {
        let spec = L2Spec { cpus: 2, memory_mib: 256, ..L2Spec::new(MACHINES[at]) };
        let bus = &self.buses[at];
        DEVICES.iter().fold(spec, |spec, name| spec.device(name, &bus.socket(name)))
    }

    /// Boots a guest with the devices of bus 0.
    pub(super) fn boot(&self, driver: Driver) -> Result<L2<'a>> {
        let words = match driver {
            Driver::Kernel => "",
            // The program's interrupt is a level, which passes through the VMM's own I/O APIC.
            //
            // TCG lets no program use a port once KVM has written the task register: its type is
            // then that of a busy task (11), as in any processor, but TCG wants 9
            // (`helper_check_io`). So `vbus-guest` would die of its first doorbell by port.
            Driver::Program if self.l1.is_emulated() => {
                "--irqchip split --doorbells mmio,hypercall"
            }
            Driver::Program => "--irqchip split",
        };
        // One more, for a device that is plugged in the middle of a move.
        let slots = format!("--slots {}", DEVICES.len() + 1);
        self.spec(0).args(words).args(&slots).boot(self.l1)
    }

    /// The state pages of the device of bus `at` have the values that the former device had, and
    /// take a new one.
    fn check_pages(&self, at: usize, guest: &Guest) -> Result<()> {
        let bus = &self.buses[at];
        let heartbeat = bus.run("state get values heartbeat")?;
        ensure!(heartbeat.contains("of-the-guest"), "the guest's page has {heartbeat:?}");
        let setpoint = guest.ok("vbus-guest state get setpoint")?;
        ensure!(setpoint.contains("of-the-host"), "the host's page has {setpoint:?}");
        bus.run(&format!("state set values setpoint of-the-host-{at}"))?;
        let setpoint = guest.ok("vbus-guest state get setpoint")?;
        ensure!(setpoint.contains(&format!("of-the-host-{at}")), "{setpoint:?} is old");
        Ok(())
    }
}

/// Starts a real-time task on CPU 1 of the guest, and whoever tells the host of it.
fn start_urgent(guest: &Guest, driver: Driver) -> Result<()> {
    let quiet = "</dev/null >/dev/null 2>&1 &";
    match driver {
        Driver::Kernel => guest.ok("echo 1 > /sys/module/vbus/parameters/sched_sleeping")?,
        Driver::Program => guest.ok(&format!("vbus-guest sched --sleeping {quiet}"))?,
    };
    guest.ok(&format!("guest-agent fifo 20 taskset 2 sleep 100000 {quiet}")).map(drop)
}

/// The interrupts of the NIC that the controller has carried, as the guest counts them.
fn carried(guest: &Guest) -> Result<u64> {
    let lines = guest.ok("grep 'vbus-pic.*vbus-net' /proc/interrupts || true")?;
    let counts = lines.lines().flat_map(|line| line.split_whitespace().skip(1).take(2));
    Ok(counts.filter_map(|count| count.parse::<u64>().ok()).sum())
}

/// Waits until the controller has carried more interrupts than `before`.
fn carries(guest: &Guest, before: u64) -> Result<()> {
    let limit = Instant::now() + TRANSFER;
    while carried(guest)? <= before {
        ensure!(Instant::now() < limit, "the controller carries no interrupts of the NIC");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

impl Drop for Buses<'_> {
    fn drop(&mut self) {
        // Fails only if L1 has ended.
        let _ = self.l1.guest.run(&format!("ip link set {BRIDGE} down; brctl delbr {BRIDGE}"));
    }
}

/// Sets the guest's interface up, by either driver.
pub(super) fn guest_up(guest: &Guest, driver: Driver) -> Result<()> {
    let interface = match driver {
        Driver::Kernel => {
            linux::insert(guest, "")?;
            linux::only_interface(guest)?
        }
        Driver::Program => {
            nic::prepare(guest)?;
            // Its output would go to a value of the test's that does not live as long as it does.
            guest.ok("vbus-guest net net --name vbus0 </dev/null >/run/driver.log 2>&1 & \
                 until grep -q ', address ' /run/driver.log; do sleep 0.1; done")?;
            "vbus0".into()
        }
    };
    nic::set_up(guest, &interface, &format!("{INNER}/24"))?;
    // Both cards are on one bridge. Without this either would answer for the other's address.
    guest.ok("echo 1 > /proc/sys/net/ipv4/conf/all/arp_ignore")?;
    let card = guest.ok("ls /sys/bus/virtio/devices/virtio0/net")?;
    nic::set_up(guest, card.trim(), &format!("{}/24", CARD[1]))
}

/// Sends bytes from the guest to L1 and back, over each of its cards. Both ends compare the hash.
pub(super) fn exchange(l1: &L1, guest: &Guest) -> Result<()> {
    for (outer, inner) in [(OUTER, INNER), (CARD[0], CARD[1])] {
        nic::transfer(guest, &l1.guest, outer, 5203, BYTES, 1, TRANSFER).context(outer)?;
        nic::transfer(&l1.guest, guest, inner, 5204, BYTES, 2, TRANSFER).context(inner)?;
    }
    Ok(())
}

/// What guest, L1 and the bus know of their connections, for an error: twice, since what stays the
/// same stands still.
fn says(l1: &L1, guest: &Guest, bus: &L1Bus) -> String {
    let in_guest = "cat /run/driver.log; ps | grep guest; dmesg | tail -n 20; netstat -tn; \
                    cat /proc/interrupts; cat /proc/net/dev; for i in /sys/class/net/*; do \
                    grep -H . $i/statistics/* | grep -v ':0$'; done";
    let told = |guest: &Guest, look: &str| {
        let said = guest.run(look);
        said.map_or_else(|error| format!("{error:#}"), |said| said.stdout + &said.stderr)
    };
    let look = || {
        let stats = bus.run("stats --json").unwrap_or_else(|error| format!("{error:#}"));
        let l1 = told(&l1.guest, "netstat -tn; cat /proc/net/dev");
        format!("the guest:\n{}L1:\n{l1}its bus:\n{stats}\n", told(guest, in_guest))
    };
    look() + &look()
}

/// Streams both ways that go on until the test ends them, whatever happens to the guest.
///
/// What the guest's ends say is in files of the guest: an agent that moves may say it to nobody.
pub(super) struct Streams {
    /// L1's ends: the receiver and the sender.
    outer: [Running; 2],
    port: u16,
}

/// The file in the guest whose being there ends a stream.
const END: &str = "/run/stream.end";

impl Streams {
    /// `port` and the next one are those of the streams. A guest that is restored has the ends of
    /// the former streams still.
    pub(super) fn start(l1: &L1, guest: &Guest, port: u16) -> Result<Self> {
        guest.ok(&format!("rm -f {END}"))?;
        let end = format!("{}/stream.end", l1.run_dir());
        l1.guest.ok(&format!("rm -f {end}"))?;
        let (up, down) = (port, port + 1);
        let receiver = l1.guest.start(&format!("exec guest-agent receive 0.0.0.0:{up}"))?;
        nic::wait_port(&l1.guest, up)?;
        let start = |port: u16, words: String| {
            guest.ok(&format!(
                "(guest-agent {words} >/run/{port}.out 2>/run/{port}.err; echo $? \
                 >/run/{port}.code) </dev/null >/dev/null 2>&1 &"
            ))
        };
        start(up, format!("send-until {OUTER}:{up} {END} 3"))?;
        start(down, format!("receive 0.0.0.0:{down}"))?;
        nic::wait_port(guest, down)?;
        let sender =
            l1.guest.start(&format!("exec guest-agent send-until {INNER}:{down} {end} 4"))?;
        Ok(Self { outer: [receiver, sender], port })
    }

    /// Waits until `bytes` more have passed each way over the wire of bus `at`.
    pub(super) fn pass(&self, l1: &L1, at: usize, bytes: u64) -> Result<()> {
        let passed = || -> Result<Vec<u64>> {
            let folder = format!("/sys/class/net/{}/statistics", BUSES[at]);
            let text = l1.guest.ok(&format!("cd {folder} && cat rx_bytes tx_bytes"))?;
            Ok(text.split_whitespace().filter_map(|word| word.parse().ok()).collect())
        };
        let (before, limit) = (passed()?, Instant::now() + TRANSFER);
        while passed()?.iter().zip(&before).any(|(now, before)| *now < before + bytes) {
            let ended = self.outer.iter().find(|end| !end.runs()).map(Running::said);
            ensure!(ended.is_none(), "a stream has ended: {ended:?}");
            ensure!(Instant::now() < limit, "{bytes} bytes do not pass each way");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Ends both streams. Both ends of each must have the same hash.
    pub(super) fn end(self, l1: &L1, guest: &Guest) -> Result<u64> {
        guest.ok(&format!("touch {END}"))?;
        l1.guest.ok(&format!("touch {}/stream.end", l1.run_dir()))?;
        let mut bytes = 0;
        for (port, outer) in (self.port..).zip(self.outer) {
            let outer = outer.ok(TRANSFER)?;
            let wait = format!("until [ -s /run/{port}.code ]; do sleep 0.1; done");
            guest.start(&wait)?.ok(TRANSFER)?;
            let inner = guest.ok(&format!("cat /run/{port}.out"))?;
            let said = guest.ok(&format!("cat /run/{port}.code /run/{port}.err"))?;
            ensure!(said.trim() == "0" && outer == inner, "port {port}: {inner} {outer} {said}");
            let length = outer.split(' ').next().and_then(|word| word.parse::<u64>().ok());
            bytes += length.context("no length")?;
        }
        Ok(bytes)
    }
}

/// The down-times of moves, and how long the last pages of each took, in milliseconds.
#[derive(Default)]
struct DownTimes(Vec<(u64, u64)>);

impl DownTimes {
    /// Adds what `vbus-vmm migrate` tells of a move.
    fn add(&mut self, told: &Value) -> Result<()> {
        let of = |name: &str| told[name].as_u64().with_context(|| format!("no {name}: {told}"));
        self.0.push((of("down_time_ms")?, of("last_ms")?));
        Ok(())
    }

    /// The moves that keep to the bar: below 300 ms, or three times what the last pages took.
    fn good(&self) -> usize {
        let good = |(down, last): &&(u64, u64)| *down <= DOWN_TIME_MS.max(3 * last);
        self.0.iter().filter(good).count()
    }

    fn report(&self, figures: &mut Figures, driver: Driver) {
        let what = if driver == Driver::Kernel { "driver" } else { "program" };
        let (down, last): (Vec<_>, Vec<_>) = self.0.iter().copied().unzip();
        figures.insert(format!("moves_down_time_ms_{what}"), down.into());
        figures.insert(format!("moves_last_pages_ms_{what}"), last.into());
        figures.insert(format!("moves_below_bar_{what}"), self.good().into());
    }
}

fn run(l1: &L1, figures: &mut Figures, driver: Driver) -> Result<()> {
    let buses = Buses::start(l1, driver == Driver::Kernel)?;
    let l2 = buses.boot(driver)?;
    if driver == Driver::Kernel && l2.guest.run(&format!("test -e {}", linux::MODULE))?.code != 0 {
        return Err(Skip("the guests have no Linux driver".into()).into());
    }
    guest_up(&l2.guest, driver)?;
    exchange(l1, &l2.guest).context("before all")?;
    buses.buses[0].run("state set values setpoint of-the-host")?;
    l2.guest.ok("vbus-guest state set heartbeat of-the-guest")?;

    // The guest is saved while it runs under load, and goes on: the streams lose nothing.
    let file = format!("{}/saved", l1.run_dir());
    let streams = Streams::start(l1, &l2.guest, 5210)?;
    streams.pass(l1, 0, MIB)?;
    let told = save(l1, &l2, &file, "--live")?;
    eprintln!("a live snapshot: {told}");
    ensure!(told["rounds"].as_u64() > Some(0), "it stood still: {told}");
    streams.pass(l1, 0, MIB)?;
    streams.end(l1, &l2.guest)?;
    exchange(l1, &l2.guest).context("after the snapshot")?;
    l2.kill()?;

    let mut l2 = buses.spec(1).restore(l1, &file)?.join()?;
    exchange(l1, &l2.guest)
        .with_context(|| format!("after it was restored: {}", says(l1, &l2.guest, buses.bus(1))))?;
    buses.check_pages(1, &l2.guest)?;

    let streams = Streams::start(l1, &l2.guest, 5220)?;
    let (mut at, mut times) = (1, DownTimes::default());
    // In the first move a virtual CPU has a real-time thread.
    start_urgent(&l2.guest, driver)?;
    let urgent = |at: usize| wait_class(l1, buses.bus(at), Some("fifo 20"), "20 1");
    urgent(at).context("restored")?;
    let passed = streams.pass(l1, at, MIB);
    passed.with_context(|| format!("restored: {}", says(l1, &l2.guest, buses.bus(at))))?;
    for turn in 0..l1.lab().times().unwrap_or(MOVES) {
        at = 1 - at;
        let began = Instant::now();
        let (moved, told) = relocate(l1, l2, &buses.spec(at))?;
        l2 = moved;
        eprintln!("move {turn}, in {:.1} s: {told}", began.elapsed().as_secs_f32());
        times.add(&told)?;
        if turn == 0 {
            urgent(at).context("moved")?;
            l2.guest.ok("killall sleep")?;
            // The Linux driver may tell the class of ordinary tasks, or none.
            wait_class(l1, buses.bus(at), None, "0 0").context("the urgent task has ended")?;
        }
        if driver == Driver::Kernel {
            carries(&l2.guest, carried(&l2.guest)?).with_context(|| format!("move {turn}"))?;
        }
        let passed = streams.pass(l1, at, MIB);
        passed.with_context(|| {
            format!("after move {turn}, the guest says:\n{}", says(l1, &l2.guest, buses.bus(at)))
        })?;
        buses.check_pages(at, &l2.guest)?;
    }
    let bytes = streams.end(l1, &l2.guest)?;
    eprintln!("{} MiB have passed, each byte once", bytes / MIB);
    exchange(l1, &l2.guest).context("after the moves")?;
    times.report(figures, driver);
    // Whoever shares the machine may delay one move or another, and with few moves all of them.
    let (good, all) = (times.good(), times.0.len());
    ensure!(all < MANY || good > all / 2, "{good} of {all} moves keep to the bar: {:?}", times.0);
    l2.power_off()
}
