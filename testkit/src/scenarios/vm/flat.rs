// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest without an operating system under QEMU: `vbus-driver` needs no operating system.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::bus::{Bus, device};
use crate::flat::{Report, device_names, devices};
use crate::lab::{Accel, Scene};
use crate::process::Process;
use crate::vm::vfio_user;

/// How long the guest may take. It boots in a second, and its tests take two.
const LIMIT: Duration = Duration::from_secs(240);
const FRAMES: u64 = 2000;
const UPDATES: u64 = 5;

/// The virtio cards, which have a switch of their own.
const CARDS: [&str; 2] = ["virt-a", "virt-b"];

fn card(settings: &str) -> String {
    format!("backend = \"switch\"\nswitch = \"virtio\"\n{settings}")
}

/// The guest finds its devices, exchanges frames and values, and powers off: once with MSI and
/// x2APIC, once with MSI-X and xAPIC. It drives two virtio cards with the crate `virtio-drivers`.
pub fn drives_devices(scene: &Scene) -> Result<()> {
    let image = scene.lab.flat()?;
    for (settings, processor) in [("", "max"), ("msix = true", "max,-x2apic")] {
        let config = devices(settings);
        let cards = CARDS.map(|name| device(name, "virtio-net", &card(settings))).concat();
        let bus = Bus::start(scene, &format!("{config}{cards}"))?;
        let names = device_names(&config);
        let mut command = scene.lab.qemu();
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-M", "q35,memory-backend=ram,vmport=off,hpet=off", "-m", "128M"]);
        // If a machine can only have one CPU, QEMU's translator executes a locked instruction in
        // several steps. The device is like another CPU: it sets bits in `pic`'s page at the same
        // time, from another process.
        command.args(["-smp", "1,maxcpus=2"]);
        command.args([
            "-object",
            "memory-backend-memfd,id=ram,size=128M,share=on",
            "-serial",
            "stdio",
        ]);
        match scene.lab.accel() {
            Accel::Kvm => {
                command.args(["-accel", "kvm", "-cpu", &processor.replace("max", "host")])
            }
            Accel::Tcg => command.args(["-accel", "tcg", "-cpu", processor]),
        };
        command.arg("-kernel").arg(&image).arg("-append");
        command.arg(format!(
            "test=list,state,venet,virtio,pic,interrupts count={FRAMES} updates={UPDATES}"
        ));
        for (slot, name) in names.iter().chain(&CARDS).enumerate() {
            command.args([
                "-device",
                &format!("pcie-root-port,id=slot{slot},slot={slot},chassis={slot},io-reserve=0"),
            ]);
            command
                .arg("-device")
                .arg(vfio_user(name, &format!("slot{slot}"), &bus.socket(name)).to_string());
        }
        let (mut qemu, lines) = Process::start_with_lines(
            command,
            "QEMU of guests/flat",
            &scene.dir().join("qemu.log"),
        )?;
        let mut set = 0;
        let report = Report::read(&lines, LIMIT, |_| {
            set += 1;
            bus.run(&["state", "set", "values", "setpoint", &format!("value-{set}")]).map(drop)
        });
        let report = report.map_err(|error| qemu.complaint(&format!("{error:#}")))?;
        let status = qemu.wait(LIMIT)?;
        ensure!(status.success(), qemu.complaint(&format!("ended badly ({status})")));

        ensure!(report.of("list").count() == names.len(), "not all devices were found:\n{report}");
        for n in 0..=UPDATES {
            report.find("state", "value", &format!("value-{n}"))?;
        }
        let heartbeat = bus.run(&["state", "get", "values", "heartbeat"])?;
        ensure!(heartbeat.contains("flat was here"), "the host reads {heartbeat:?}");
        for back_end in ["switch", "null"] {
            let frames = &report.find("venet", "back-end", back_end)?["frames"];
            ensure!(*frames == FRAMES, "{frames} frames");
        }
        // The guest asks for an interrupt, or one line of the bus's controller, when it has found
        // no frame. That can be twice for a frame: if the frame arrives at this moment, the guest
        // does not sleep, and asks again after it. There are fewer if interrupts merged or if the
        // guest saw a frame before its interrupt. At the beginning one may be left over.
        for round in report.of("interrupts") {
            let lines = if round["pic"] == true { &round["lines"] } else { &round["interrupts"] };
            let lines = lines.as_u64().unwrap_or(0);
            ensure!(
                lines > 0 && lines <= FRAMES * 2 + 1,
                "{FRAMES} frames came with {lines} interrupts: {round}"
            );
        }
        ensure!(
            report.of("interrupts").any(|round| round["pic"] == true),
            "no round with the interrupt controller"
        );
        let frames = report.of("virtio").next().map(|report| report["frames"].clone());
        ensure!(frames == Some(FRAMES.into()), "the driver of virtio tells of {frames:?} frames");
        let sent = bus.traffic(&CARDS)?;
        ensure!(sent.packets == FRAMES && sent.drops == 0, "{} frames between cards", sent.packets);
        let traffic = bus.traffic(&["net-a", "net-b"])?;
        eprintln!(
            "{settings:11} {} frames, {} doorbells, {} interrupts",
            traffic.packets, traffic.doorbells, traffic.interrupts
        );
        ensure!(traffic.drops == 0, "{} frames were dropped", traffic.drops);
    }
    Ok(())
}
