// SPDX-License-Identifier: Apache-2.0 OR MIT
//! More devices than pins for INTx, so some pins have two devices.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::bus::device;
use crate::guest::Running;
use crate::l1::L1;
use crate::l2::{L1Bus, L2, L2Spec};
use crate::nic;
use crate::report::Figures;

/// The number of devices: two more than there are pins.
const DEVICES: usize = PINS + 2;
/// The number of pins for INTx (`spec/vmm.md`).
const PINS: usize = 8;
/// How often each device interrupts.
const ROUNDS: u32 = 8;
/// How long an interrupt or anything else may take.
const LIMIT: Duration = Duration::from_secs(120);

/// The interrupts of ten devices arrive, also of those that share a pin: one at a time and all at
/// once, with the I/O APIC in the kernel and in the VMM.
pub fn shared(l1: &L1, _: &mut Figures) -> Result<()> {
    let pages =
        "pages = [{ name = \"setpoint\", bytes = 64, owner = \"device\", initial = \"first\" }]";
    let names: Vec<String> = (1..=DEVICES).map(|number| format!("device{number}")).collect();
    let bus = L1Bus::start(
        l1,
        &names.iter().map(|name| device(name, "state", pages)).collect::<String>(),
    )?;
    for irqchip in ["full", "split"] {
        let spec = L2Spec::new("pins").args(&format!("--irqchip {irqchip} --slots {DEVICES}"));
        let spec = names.iter().fold(spec, |spec, name| spec.device(name, &bus.socket(name)));
        let l2 = spec.boot(l1)?;
        let outcome = interrupts(l1, &bus, &l2, &names, irqchip);
        outcome.with_context(|| format!("{irqchip}: {}", lines(&l2).unwrap_or_default()))?;
        l2.power_off()?;
    }
    Ok(())
}

fn lines(l2: &L2) -> Result<String> {
    l2.guest.ok("grep uio /proc/interrupts")
}

fn interrupts(l1: &L1, bus: &L1Bus, l2: &L2, names: &[String], irqchip: &str) -> Result<()> {
    nic::prepare(&l2.guest)?;
    let watch = |name: &String| {
        l2.guest.start(&format!("exec vbus-guest state watch setpoint --device {name}"))
    };
    let watches = names.iter().map(watch).collect::<Result<Vec<Running>>>()?;
    // Each watcher first prints the last value. Then it waits for its interrupt.
    watches.iter().try_for_each(|watch| watch.wait_for("\n", LIMIT))?;

    // A line for each pin, which names the driver of each of its devices.
    let lines = lines(l2)?;
    let drivers: Vec<usize> =
        lines.lines().map(|line| line.matches("uio_pci_generic").count()).collect();
    ensure!(
        drivers.len() == PINS && drivers.iter().sum::<usize>() == DEVICES,
        "{drivers:?} drivers at the pins"
    );

    for round in 0..ROUNDS {
        let value = |name: &str| format!("{irqchip}-{round}-of-{name}.");
        let together = round % 2 == 0;
        if together {
            let sets = names.iter().map(|name| {
                format!("vbus state set {name} setpoint {} --dir $DIR & ", value(name))
            });
            l1.guest
                .start(&format!("DIR={}; {}wait", bus.dir(), sets.collect::<String>()))?
                .ok(LIMIT)?;
        }
        for (name, watch) in names.iter().zip(&watches) {
            if !together {
                bus.run(&format!("state set {name} setpoint {}", value(name)))?;
            }
            watch.wait_for(&value(name), LIMIT).with_context(|| format!("round {round}"))?;
        }
    }
    for watch in &watches {
        watch.kill()?;
        watch.wait(LIMIT)?;
    }
    Ok(())
}
