//! More devices than there are pins for INTx: two of them share each of some pins.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::bus::device;
use crate::guest::Running;
use crate::inner::{Inner, InnerBus, Spec};
use crate::nic;
use crate::report::Figures;
use crate::rig::Rig;

/// Devices: as many as there are pins for them, and two more.
const DEVICES: usize = PINS + 2;
/// Pins that INTx has (`spec/vmm.md`).
const PINS: usize = 8;
/// How often each device interrupts.
const ROUNDS: u32 = 8;
/// How long an interrupt may take to come, and anything else.
const LIMIT: Duration = Duration::from_secs(120);

/// Ten devices: each one's interrupts arrive, of those that share a pin too, one at a time and all
/// at once, with the I/O APIC in the kernel and in the VMM.
pub fn shared(rig: &Rig, _: &mut Figures) -> Result<()> {
    let pages =
        "pages = [{ name = \"setpoint\", bytes = 64, owner = \"device\", initial = \"first\" }]";
    let names: Vec<String> = (1..=DEVICES).map(|number| format!("device{number}")).collect();
    let bus = InnerBus::start(
        rig,
        &names.iter().map(|name| device(name, "state", pages)).collect::<String>(),
    )?;
    for irqchip in ["full", "split"] {
        let spec = Spec::new("pins").args(&format!("--irqchip {irqchip} --slots {DEVICES}"));
        let spec = names.iter().fold(spec, |spec, name| spec.device(name, &bus.socket(name)));
        let inner = spec.boot(rig)?;
        let outcome = interrupts(rig, &bus, &inner, &names, irqchip);
        outcome.with_context(|| format!("{irqchip}: {}", lines(&inner).unwrap_or_default()))?;
        inner.power_off()?;
    }
    Ok(())
}

fn lines(inner: &Inner) -> Result<String> {
    inner.guest.ok("grep uio /proc/interrupts")
}

fn interrupts(
    rig: &Rig,
    bus: &InnerBus,
    inner: &Inner,
    names: &[String],
    irqchip: &str,
) -> Result<()> {
    nic::prepare(&inner.guest)?;
    let watch = |name: &String| {
        inner.guest.start(&format!("exec vbus-guest state watch setpoint --device {name}"))
    };
    let watches = names.iter().map(watch).collect::<Result<Vec<Running>>>()?;
    // What was last set; then each waits for its interrupt.
    watches.iter().try_for_each(|watch| watch.wait_for("\n", LIMIT))?;

    // A line for each pin, which names the driver of each of its devices.
    let lines = lines(inner)?;
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
            rig.guest
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
