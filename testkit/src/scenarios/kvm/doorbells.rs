// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A Linux in `vbus-vmm` rings doorbells, from user space and by the Linux driver. The scenarios
//! check which kinds it is offered, measure their cost, and show that a guest that rings without
//! end harms only itself.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::guest::{Guest, Running};
use crate::l1::L1;
use crate::l1_wire::{self as net, bus, exchange};
use crate::l2::{L1Bus, L2, L2Spec};
use crate::linux;
use crate::nic::{self, Nic};
use crate::report::Figures;

/// The device beside the NIC whose doorbells the storm also rings.
const VALUES: &str = r#"
[[device]]
name = "values"
class = "state"
pages = [{ name = "setpoint", bytes = 64, owner = "device", initial = "calm" }]
"#;

const MIB: u64 = 1 << 20;
/// Rings of a measurement.
const RINGS: u64 = 2000;
/// The least rings of a storm.
const STORM: u64 = 50_000;
/// How long all tests of vbus-kvm may take. They need some seconds.
const TESTS: Duration = Duration::from_secs(600);
/// The time limit of each action of the guest.
const LIMIT: Duration = Duration::from_secs(240);

/// Runs the tests of vbus-kvm, and checks that none is skipped.
pub fn connector(l1: &L1, _: &mut Figures) -> Result<()> {
    let said = l1
        .guest
        .start(&format!(
            "exec {}vbus-kvm-tests --nocapture --test-threads=1",
            l1.guest_processor()
        ))?
        .ok(TESTS)?;
    ensure!(
        said.contains("test result: ok")
            && !said.contains("skipped:")
            && !said.contains("left out"),
        "{said}"
    );
    said.lines().filter(|line| line.contains(" rings")).for_each(|line| eprintln!("{line}"));
    Ok(())
}

/// The VMM offers the guest the kinds of its settings. Each ring is one exit, which does not reach
/// the VMM. The guest takes the cheapest kind, by its program as by its driver. The driver takes
/// hypercalls only if its parameter allows them.
pub fn kinds(l1: &L1, figures: &mut Figures) -> Result<()> {
    let bus = bus(l1, VALUES)?;
    let spec = L2Spec::new("kinds")
        .device("net", &bus.socket("net"))
        .device("values", &bus.socket("values"));
    let l2 = spec.boot(l1)?;
    for device in list(&l2.guest)? {
        ensure!(device["doorbells"] == json!(["mmio", "pio", "hypercall"]), "offered: {device}");
        let cost = |kind: &str| {
            device["doorbell_ns"][kind].as_u64().with_context(|| format!("no cost: {device}"))
        };
        let cheapest = if cost("pio")? < cost("mmio")? { "pio" } else { "mmio" };
        ensure!(device["doorbell"] == cheapest, "not the cheapest: {device}");
        for kind in ["mmio", "pio"] {
            figures.insert(format!("ns_per_doorbell_{kind}_linux"), cost(kind)?.into());
        }
    }
    for kind in ["mmio", "pio"] {
        let before = (l1.kvm_stat("exits")?, rung(&bus, "values")?);
        let rings = l2
            .guest
            .ok(&format!("vbus-guest ring values --count {RINGS} --doorbell {kind} --json"))?;
        let rings: Value = serde_json::from_str(&rings)?;
        ensure!(rings["doorbell"] == kind, "rang by {rings}");
        let exits = l1.kvm_stat("exits")? - before.0;
        ensure!(exits >= RINGS, "{exits} exits for {RINGS} rings");
        // The bus counts rings when its worker comes to them. So a few that the guest has rung
        // before, to learn the costs of the kinds, may count too.
        let until = Instant::now() + LIMIT;
        let rung = loop {
            let rung = rung(&bus, "values")? - before.1;
            if rung >= RINGS {
                break rung;
            }
            ensure!(Instant::now() < until, "{rung} of {RINGS} rings by {kind} came to the device");
        };
        ensure!(
            rung < 2 * RINGS,
            "{rung} rings by {kind} came to the device, and {RINGS} were rung"
        );
    }
    nic::prepare(&l2.guest)?;
    for kind in ["pio", "mmio"] {
        let nic = Nic::up(
            &l2.guest,
            "net",
            "vbus0",
            &format!("{}/24", net::INNER),
            &format!("--doorbell {kind}"),
        )?;
        ensure!(
            nic.driver.said().1.contains(&format!("doorbells by {kind}")),
            "{:?}",
            nic.driver.said()
        );
        exchange(l1, &l2.guest, MIB).with_context(|| format!("with doorbells by {kind}"))?;
        nic.driver.kill()?;
        nic.driver.wait(LIMIT)?;
    }
    let has_module = drive(l1, &bus, &l2, "", "pio")?;
    check_silence(&l2)?;
    l2.power_off()?;

    // Another setting of the VMM.
    let l2 = L2Spec::new("kinds")
        .device("net", &bus.socket("net"))
        .device("values", &bus.socket("values"))
        .args("--doorbells mmio,hypercall")
        .boot(l1)?;
    for device in list(&l2.guest)? {
        ensure!(device["doorbells"] == json!(["mmio", "hypercall"]), "offered: {device}");
    }
    let refused = l2.guest.run("vbus-guest ring values --doorbell pio")?;
    ensure!(
        refused.code == 1 && refused.stderr.contains("no such doorbells"),
        "{}",
        refused.stderr
    );
    drive(l1, &bus, &l2, "", "mmio")?;
    drive(l1, &bus, &l2, "hypercalls=1", "hypercall")?;
    check_silence(&l2)?;
    l2.power_off()?;
    if !has_module {
        eprintln!("not tested: the Linux driver, which was not built for the guests' kernel");
    }
    Ok(())
}

/// Loads the Linux driver with these parameters. It chooses the kind of doorbell that it has found
/// to be the cheapest, and rings such doorbells. `kind` is the cheapest on a quiet machine. Returns
/// whether the guest has the driver.
fn drive(l1: &L1, bus: &L1Bus, l2: &L2, parameters: &str, kind: &str) -> Result<bool> {
    /// How often the driver measures at the most, until it finds `kind`. On a machine with other
    /// work another kind may be the cheapest each time, and then the driver rings that.
    const TRIES: u32 = 5;
    let guest = &l2.guest;
    if guest.run(&format!("test -e {}", linux::MODULE))?.code != 0 {
        return Ok(false);
    }
    // The guest program has taken the functions.
    guest.ok(
        "cd /sys/bus/pci/drivers/uio_pci_generic && for f in 0000:*; do [ -e $f ] || continue; \
         echo > $f/driver_override; echo $f > unbind; done",
    )?;
    let file = |name: &str| guest.ok(&format!("cat /sys/bus/pci/drivers/vbus/*/vbus/{name}"));
    for tries in 1..=TRIES {
        linux::insert(guest, parameters)?;
        let (chosen, costs) = (file("doorbell")?, file("costs")?);
        let allowed = parameters.contains("hypercalls");
        ensure!(costs.contains("hypercall") == allowed, "with {parameters:?}: {costs}");
        check_choice(guest)?;
        if tries == TRIES || chosen.lines().all(|chosen| chosen == kind) {
            let interface = linux::only_interface(guest)?;
            nic::set_up(guest, &interface, &format!("{}/24", net::INNER))?;
            let before = rung(bus, "net")?;
            exchange(l1, guest, MIB).with_context(|| format!("with doorbells by {chosen}"))?;
            ensure!(rung(bus, "net")? > before, "no doorbell rang by {chosen}");
            linux::check_kernel(guest)?;
            return linux::remove(guest).map(|()| true);
        }
        eprintln!("the driver has chosen {chosen:?}: {costs:?}");
        linux::remove(guest)?;
    }
    bail!("the driver was never loaded")
}

/// Checks that each function has the doorbell that cost the least when the driver measured.
fn check_choice(guest: &Guest) -> Result<()> {
    let functions = guest.ok("ls -d /sys/bus/pci/drivers/vbus/*/vbus")?;
    for function in functions.lines() {
        let chosen = guest.ok(&format!("cat {function}/doorbell"))?;
        let costs = guest.ok(&format!("cat {function}/costs"))?;
        let cost = |line: &str| line.split_once(' ')?.1.parse::<u64>().ok();
        let least = costs.lines().filter_map(cost).min().context("no costs")?;
        let of_chosen = costs.lines().find(|line| line.split(' ').next() == Some(chosen.trim()));
        ensure!(
            of_chosen.and_then(cost) == Some(least),
            "{function}: the driver has chosen {chosen:?} of {costs:?}"
        );
    }
    ensure!(functions.lines().count() == 2, "the driver has {functions:?}");
    Ok(())
}

/// The guest rings doorbells of all functions without end, by each kind that user space can ring.
/// Some of these doorbells are in use, others not. Meanwhile the NIC carries its traffic, and the
/// state device its values. No ring reaches the VMM. How many polls of the bus the rings cause
/// depends on the speed of both, so that is a figure.
pub fn storm(l1: &L1, figures: &mut Figures) -> Result<()> {
    let bus = bus(l1, VALUES)?;
    let spec = L2Spec { cpus: 2, ..L2Spec::new("storm") };
    let l2 =
        spec.device("net", &bus.socket("net")).device("values", &bus.socket("values")).boot(l1)?;
    let outcome = blow(l1, &bus, &l2, figures);
    // If the guest died, its VMM has printed the reason.
    outcome.with_context(|| format!("vbus-vmm says {:?}", l2.vmm.said()))?;
    l2.power_off()
}

fn blow(l1: &L1, bus: &L1Bus, l2: &L2, figures: &mut Figures) -> Result<()> {
    let guest = &l2.guest;
    let _nic = net::nic(guest)?;
    exchange(l1, guest, MIB)?;
    let watch = guest.start("exec vbus-guest state watch setpoint")?;
    watch.wait_for("calm", LIMIT)?;

    let before = (works(bus)?, rung(bus, "net")? + rung(bus, "values")?, Instant::now());
    // The NIC's status page and rings, and the watched page, have the lowest handles.
    let ring = |device: &str, options: &str| {
        guest.start(&format!("exec vbus-guest ring {device} --count 1000000000000 {options}"))
    };
    let storms = [
        ring("net", "--doorbell pio --handle 1")?,
        ring("net", "--doorbell mmio --handle 2")?,
        ring("values", "--doorbell pio --handle 0")?,
        ring("values", "--doorbell mmio")?,
    ];
    exchange(l1, guest, MIB).context("during the storm")?;
    for value in ["gusty", "wild", "roaring"] {
        bus.run(&format!("state set values setpoint {value}"))?;
        watch.wait_for(value, LIMIT).context("during the storm")?;
    }
    let blows = |storm: &Running| {
        if storm.runs() { Ok(()) } else { bail!("a storm died down: {:?}", storm.said()) }
    };
    // Wait for the least number of rings.
    let until = Instant::now() + LIMIT;
    while rung(bus, "net")? + rung(bus, "values")? < before.1 + STORM {
        ensure!(Instant::now() < until, "no storm comes up");
        storms.iter().try_for_each(blows)?;
    }
    for storm in &storms {
        storm.kill()?;
        storm.wait(LIMIT)?;
    }
    let (works, rings) =
        (works(bus)? - before.0, rung(bus, "net")? + rung(bus, "values")? - before.1);
    let took = before.2.elapsed().as_secs_f64();
    eprintln!("{rings} rings in {took:.1} s, {works} polls of the bus");
    figures.insert(
        "storm_polls_per_ring".into(),
        json!((works as f64 / rings as f64 * 1000.0).round() / 1000.0),
    );
    check_silence(l2)?;
    // The traffic goes on after the storm.
    exchange(l1, guest, MIB).context("after the storm")
}

/// `vbus-guest list` in the guest.
fn list(guest: &Guest) -> Result<Vec<Value>> {
    let text = guest.ok("vbus-guest list --json")?;
    let devices: Vec<Value> =
        serde_json::from_str(&text).with_context(|| format!("no list: {text}"))?;
    ensure!(
        !devices.is_empty() && devices.iter().all(|device| device["error"].is_null()),
        "{text}"
    );
    Ok(devices)
}

/// The number of rings of a device's doorbells.
fn rung(bus: &L1Bus, device: &str) -> Result<u64> {
    let shown: Value = serde_json::from_str(&bus.run(&format!("device show {device} --json"))?)?;
    shown["counters"]["doorbells"]
        .as_u64()
        .with_context(|| format!("no count of doorbells: {shown}"))
}

/// The number of polls of the devices' connections.
fn works(bus: &L1Bus) -> Result<u64> {
    let mut polls = 0;
    for device in ["net", "values"] {
        let shown: Value =
            serde_json::from_str(&bus.run(&format!("device show {device} --json"))?)?;
        for counter in ["polls", "polls_empty"] {
            let count = shown["counters"][counter].as_u64();
            polls += count.with_context(|| format!("no count of {counter}: {shown}"))?;
        }
    }
    Ok(polls)
}

/// Checks that no doorbell has reached the VMM.
fn check_silence(l2: &L2) -> Result<()> {
    let (devices, _) = l2.control(r#"{"op":"devices"}"#)?;
    for device in &devices {
        ensure!(device["user_doorbells"] == 0, "doorbells came to vbus-vmm: {device}");
        ensure!(device["doorbells_in_kernel"] == true, "not in the kernel: {device}");
    }
    ensure!(devices.len() == 2, "vbus-vmm tells of {} devices: {devices:?}", devices.len());
    Ok(())
}
