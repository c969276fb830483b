// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Linux as a guest.

use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::l1::L1;
use crate::l2::{L2, L2Spec, Vmm};
use crate::report::Figures;

/// A guest boots under QEMU, runs commands, and powers off.
pub fn harness(l1: &L1, _: &mut Figures) -> Result<()> {
    let spec = L2Spec { vmm: Vmm::Qemu, ..L2Spec::new("qemu") };
    let began = Instant::now();
    let l2 = spec.boot(l1)?;
    eprintln!("a guest of QEMU has booted in {:.1} s", began.elapsed().as_secs_f32());
    l2.guest.ok("dmesg | grep -i 'hypervisor detected: KVM'")?;
    l2.power_off()
}

/// The serial port carries commands that are much longer than what its UART holds (64 bytes) and
/// than what Linux takes in one interrupt (256 bytes).
fn check_long_input(l2: &L2) -> Result<()> {
    for length in [900, 1000, 1100] {
        let text = "x".repeat(length);
        let said = l2.guest.ok(&format!("echo {text}")).context("a long command")?;
        ensure!(said.trim_end() == text, "{} of {length} bytes came back", said.trim_end().len());
    }
    Ok(())
}

/// A dump tells the state of each virtual CPU and of the I/O APIC, and the guest goes on.
fn check_dump(l2: &L2, cpus: u32) -> Result<()> {
    let (items, _) = l2.control(r#"{"op":"dump"}"#)?;
    for cpu in 0..cpus {
        let item = items.iter().find(|item| item["cpu"] == cpu).context("a CPU is missing")?;
        let state = &item["state"];
        // Linux runs in the upper half of the addresses, or in user space, with paging.
        let is_paging = state["registers"]["rip"].is_string() && state["system"]["cr3"] != "0x0";
        ensure!(is_paging && state["apic"]["id"] == cpu, "CPU {cpu} is told as {item}");
        ensure!(state["code"] != "", "the code of CPU {cpu} is not told: {item}");
    }
    // The serial ports have pins 3 and 4.
    let pins = items.iter().find_map(|item| item["io_apic"].as_array());
    let pins = pins.context("the I/O APIC is missing")?;
    ensure!(pins.iter().any(|pin| pin["pin"] == 3), "no serial port has a pin: {pins:?}");
    l2.guest.ok("true").map(drop).context("the guest does not go on")
}

/// Linux boots in `vbus-vmm` and powers off: with one and two CPUs, and with the interrupt
/// controllers in the kernel and outside of it.
pub fn boot(l1: &L1, _: &mut Figures) -> Result<()> {
    for (cpus, irqchip) in [(1, "full"), (2, "split")] {
        let spec = L2Spec { cpus, ..L2Spec::new("linux") }.args(&format!("--irqchip {irqchip}"));
        let began = Instant::now();
        let l2 = spec.boot(l1)?;
        eprintln!("{cpus} CPUs, {irqchip}: booted in {:.1} s", began.elapsed().as_secs_f32());
        let online = l2.guest.ok("nproc; dmesg | grep -i 'hypervisor detected'")?;
        ensure!(
            online.starts_with(&format!("{cpus}\n")) && online.contains("KVM"),
            "{cpus} CPUs on KVM, got {online}"
        );
        check_long_input(&l2).with_context(|| format!("--irqchip {irqchip}"))?;
        check_dump(&l2, cpus).with_context(|| format!("a dump with --irqchip {irqchip}"))?;
        l2.power_off()?;
    }
    Ok(())
}
