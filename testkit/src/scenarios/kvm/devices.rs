// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices of the bus in a Linux guest of `vbus-vmm`: traffic, moving interrupts, plugging, and a
//! bus or a VMM that is killed.

use anyhow::{Context, Result, ensure};

use crate::bus::device;
use crate::guest::Running;
use crate::l1::L1;
use crate::l1_wire::{self as net, EXCHANGE, OUTER, TRANSFER};
use crate::l2::{L1Bus, L2, L2Spec};
use crate::nic::{self, Nic};
use crate::report::Figures;

/// Settings of the NIC `net` as `vbus device add` takes them; the same as [`net::bus`] has in its
/// configuration.
const ADD_NET: &str = "device add net --class venet --set backend=tap --set tap=vbus-tap";

/// The interface of L1 at the other end of the guest's virtio card.
const CARD_TAP: &str = "vbus-card";
/// The addresses of L1 and of L2 there.
const CARD: [&str; 2] = ["10.0.9.254", "10.0.9.1"];

/// Starts an endless stream from the guest to L1. Returns its sender and its receiver.
pub(super) fn endless(l1: &L1, l2: &L2) -> Result<(Running, Running)> {
    let receiver = l1.guest.start("guest-agent receive 0.0.0.0:5000")?;
    nic::wait_port(&l1.guest, 5000)?;
    let sender = l2.guest.start(&format!("guest-agent send {OUTER}:5000 1000000000000 3"))?;
    Ok((sender, receiver))
}

/// Waits until `command` succeeds in the guest.
fn until(l2: &L2, command: &str) -> Result<()> {
    let waiting = l2.guest.start(&format!("until {command}; do sleep 0.05; done"))?;
    waiting.ok(TRANSFER).map(drop)
}

/// A guest with two CPUs finds its devices and exchanges data while its interrupts move between the
/// CPUs, and again after a reboot. Both ends compare the hash.
pub fn traffic(l1: &L1, _: &mut Figures) -> Result<()> {
    let pages =
        "pages = [{ name = \"setpoint\", bytes = 64, owner = \"device\", initial = \"hello\" }]";
    let card = format!("backend = \"tap\"\ntap = \"{CARD_TAP}\"\nmsix = true");
    let more = device("values", "state", pages) + &device("card", "virtio-net", &card);
    let bus = net::bus(l1, &more)?;
    nic::set_up(&l1.guest, CARD_TAP, &format!("{}/24", CARD[0]))?;
    let mut spec = L2Spec { cpus: 2, ..L2Spec::new("linux") };
    for name in ["net", "values", "card"] {
        spec = spec.device(name, &bus.socket(name));
    }
    let l2 = spec.boot(l1)?;
    let found = l2.guest.ok("vbus-guest list")?;
    ensure!(found.contains("net") && found.contains("values"), "the guest finds\n{found}");
    eprintln!("{}", found.trim());
    let nic = net::nic(&l2.guest)?;
    net::exchange(l1, &l2.guest, EXCHANGE)?;
    virtio_card(l1, &l2, &bus)?;

    move_interrupts(&l2)?;
    move_under_stream(l1, &l2)?;
    net::exchange(l1, &l2.guest, EXCHANGE)?;
    ensure!(nic.driver.runs(), "the driver has ended: {:?}", nic.driver.said());

    l2.guest.start("reboot -f")?;
    l2.wait_boot(2)?;
    let _nic = net::nic(&l2.guest)?;
    net::exchange(l1, &l2.guest, EXCHANGE)?;
    virtio_card(l1, &l2, &bus)?;
    l2.power_off()
}

/// Data pass the virtio card, which the kernel's own driver drives. Its doorbells end in KVM: they
/// ring, and no message comes of them.
fn virtio_card(l1: &L1, l2: &L2, bus: &L1Bus) -> Result<()> {
    let interface = l2.guest.ok("ls /sys/bus/virtio/devices/virtio0/net")?;
    nic::set_up(&l2.guest, interface.trim(), &format!("{}/24", CARD[1]))?;
    nic::ping(&l2.guest, CARD[0], 3)?;
    let before = counts(bus)?;
    nic::transfer(&l2.guest, &l1.guest, CARD[0], 5005, EXCHANGE, 5, TRANSFER)?;
    nic::transfer(&l1.guest, &l2.guest, CARD[1], 5006, EXCHANGE, 6, TRANSFER)?;
    let after = counts(bus)?;
    let (messages, doorbells) = (after.0 - before.0, after.1 - before.1);
    eprintln!("the virtio card: {doorbells} doorbells, {messages} messages to its server");
    ensure!(doorbells > 0, "no doorbell of the virtio card has rung");
    ensure!(messages < 10, "{messages} messages for {doorbells} doorbells");
    Ok(())
}

/// The messages that the card's server has got, and the doorbells that its driver has rung.
fn counts(bus: &L1Bus) -> Result<(u64, u64)> {
    let stats: serde_json::Value = serde_json::from_str(&bus.run("stats --json")?)?;
    let card = stats.as_array().into_iter().flatten().find(|device| device["name"] == "card");
    let card = card.context("vbus stats does not know the card")?;
    let (messages, doorbells) = (&card["connector"]["messages"], &card["counters"]["doorbells"]);
    Ok((
        messages.as_u64().context("no number of messages")?,
        doorbells.as_u64().context("no number of doorbells")?,
    ))
}

/// The number that the guest has given the NIC's interrupt.
fn interrupt_number(l2: &L2) -> Result<String> {
    // "21:   10   20  IO-APIC ...": the counts of the CPUs in their order.
    let line = l2.guest.ok("grep uio /proc/interrupts")?;
    line.trim().split(':').next().map(str::to_owned).context("no interrupt of the NIC")
}

/// Moves the NIC's interrupt between the CPUs while a stream leaves the guest. The stream must not
/// stop. It has few interrupts, because both ends poll, but one lost interrupt would stop it.
fn move_under_stream(l1: &L1, l2: &L2) -> Result<()> {
    const MOVES: u32 = 20;
    const BETWEEN: u64 = 8 * net::MIB;
    let number = interrupt_number(l2)?;
    let (sender, receiver) = endless(l1, l2)?;
    for step in 0..MOVES {
        l2.guest.ok(&format!("echo {} > /proc/irq/{number}/smp_affinity", 1 << (step % 2)))?;
        net::pass(l1, BETWEEN)
            .with_context(|| format!("after move {step} of interrupt {number}"))?;
    }
    ensure!(sender.runs() && receiver.runs(), "the stream has ended: {:?}", sender.said());
    stop(&sender, &receiver)
}

/// Moves the NIC's interrupt to the other CPU several times, and waits each time until that CPU
/// takes it. The traffic is one packet at a time, and the NIC interrupts for each.
fn move_interrupts(l2: &L2) -> Result<()> {
    const MOVES: u32 = 6;
    let number = interrupt_number(l2)?;
    let pings = l2.guest.start(&format!("ping -q -i 0.05 {OUTER}"))?;
    for step in 0..MOVES {
        let cpu = step % 2;
        let count = format!("$(awk '$1 == \"{number}:\" {{print ${}}}' /proc/interrupts)", cpu + 2);
        let moves = format!(
            "echo {} > /proc/irq/{number}/smp_affinity && n={count} && until [ {count} -gt $((n + \
             3)) ]; do sleep 0.02; done",
            1 << cpu
        );
        let moved = l2.guest.start(&moves)?.ok(TRANSFER);
        moved.with_context(|| format!("interrupt {number} is not taken on CPU {cpu}"))?;
    }
    ensure!(pings.runs(), "the pings have ended: {:?}", pings.said());
    // After SIGINT ping prints how many packets it lost.
    l2.guest.ok("kill -INT $(pidof ping)")?;
    let told = pings.wait(TRANSFER)?.stdout;
    // On a slow machine several of them may be under way at the end. A lost interrupt shows
    // otherwise: the NIC sends none before the driver has handled the last one, so it would have
    // sent no more.
    let line = told.lines().find(|line| line.contains("transmitted"));
    eprintln!("beside {MOVES} moves: {}", line.context("ping counts nothing")?);
    nic::ping(&l2.guest, OUTER, 3).map(drop).context("after the moves")
}

/// Ends an endless stream.
pub(super) fn stop(sender: &Running, receiver: &Running) -> Result<()> {
    for running in [sender, receiver] {
        running.kill()?;
        running.wait(TRANSFER)?;
    }
    Ok(())
}

/// NICs are plugged, used and unplugged twenty times, four at once, while a stream runs over
/// another NIC.
pub fn plug_cycles(l1: &L1, _: &mut Figures) -> Result<()> {
    // Linux answers an unplug request after 5 s, so the test unplugs them together.
    const ROUNDS: u32 = 5;
    const TOGETHER: u32 = 4;
    let bus = net::bus(l1, "")?;
    let l2 = L2Spec::new("linux").device("net", &bus.socket("net")).boot(l1)?;
    let nic = net::nic(&l2.guest)?;
    let (sender, receiver) = endless(l1, &l2)?;
    let control = l2.control_socket();
    for round in 0..ROUNDS {
        let names: Vec<String> = (0..TOGETHER).map(|n| format!("extra{n}")).collect();
        for name in &names {
            bus.run(&format!(
                "device add {name} --class venet --set backend=null --vmm {control}"
            ))?;
        }
        until(&l2, &format!("[ $(vbus-guest list | grep -c extra) = {TOGETHER} ]"))?;
        let mut extras = Vec::new();
        for (n, name) in (1..).zip(&names) {
            let extra =
                Nic::up(&l2.guest, name, &format!("vbus{n}"), &format!("10.0.{n}.1/24"), "")?;
            extras.push((name, extra));
        }
        let removals = extras
            .iter()
            .map(|(name, _)| bus.spawn(&format!("device remove {name} --vmm {control}")));
        for removal in removals.collect::<Result<Vec<_>>>()? {
            removal.ok(TRANSFER).with_context(|| format!("in round {round}"))?;
        }
        for (name, extra) in extras {
            let ended = extra.driver.wait(TRANSFER)?;
            ensure!(
                ended.code != 101,
                "round {round}: the driver of {name} panicked: {}",
                ended.stderr
            );
        }
        ensure!(
            sender.runs() && receiver.runs(),
            "round {round} ended the stream: {:?}",
            sender.said()
        );
    }
    stop(&sender, &receiver)?;
    net::exchange(l1, &l2.guest, EXCHANGE)?;
    ensure!(nic.driver.runs(), "the driver has ended: {:?}", nic.driver.said());
    l2.power_off()
}

/// The bus is killed under traffic: the guest runs on, and its NIC comes back with the next bus.
/// Then the VMM is killed, and the bus serves the next guest, which has a split interrupt
/// controller.
pub fn deaths(l1: &L1, _: &mut Figures) -> Result<()> {
    let first = net::bus(l1, "")?;
    let l2 = L2Spec::new("linux").device("net", &first.socket("net")).boot(l1)?;
    let nic = net::nic(&l2.guest)?;
    let streams = endless(l1, &l2)?;
    first.kill()?;
    drop(first);
    until(&l2, "[ -z \"$(vbus-guest list 2>/dev/null | grep net)\" ]")
        .context("the NIC does not leave")?;
    let ended = nic.driver.wait(TRANSFER)?;
    ensure!(ended.code != 101, "the driver panicked: {}", ended.stderr);
    stop(&streams.0, &streams.1)?;

    let bus = L1Bus::start(l1, &format!("[allow]\ntaps = [\"{}\"]\n", net::TAP))?;
    bus.run(&format!("{ADD_NET} --vmm {}", l2.control_socket()))?;
    net::address_tap(l1)?;
    until(&l2, "vbus-guest list | grep -q net").context("the NIC does not come back")?;
    let nic = net::nic(&l2.guest)?;
    net::exchange(l1, &l2.guest, EXCHANGE)?;

    let (_sender, receiver) = endless(l1, &l2)?;
    l2.kill()?;
    receiver.kill()?;
    drop(nic);
    // Its INTx passes through the VMM's own I/O APIC.
    let next =
        L2Spec::new("next").args("--irqchip split").device("net", &bus.socket("net")).boot(l1)?;
    let _nic = net::nic(&next.guest)?;
    net::exchange(l1, &next.guest, EXCHANGE)?;
    next.power_off()
}
