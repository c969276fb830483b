// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What traffic through the NIC of the bus costs, compared with QEMU's virtio-net.

use anyhow::{Result, ensure};
use serde_json::json;

use crate::l1::L1;
use crate::l1_wire::Cost;
use crate::netbench::exits::Setup;
use crate::report::Figures;

/// Measures the exits and interrupts of the same traffic through the NIC of the bus and through
/// QEMU's virtio-net on TAP. The goal is half of virtio-net's.
pub fn against_virtio(l1: &L1, figures: &mut Figures) -> Result<()> {
    // How often an end sleeps and is woken depends on how the host's other work divides the
    // processors, and that may differ for the two guests, which run one after the other. An exit
    // for each frame or an interrupt for each frame would be more than this.
    const MOST: f64 = 4.0;
    let (ours, theirs) = (Setup::Program.measure(l1)?, Setup::VirtioNet.measure(l1)?);
    let all = json!({
        "vbus": {"out": ours[0], "in": ours[1]}, "virtio_net": {"out": theirs[0], "in": theirs[1]},
    });
    eprintln!("TCP: {all}");
    let check = |what: &str, value: fn(&Cost) -> f64| {
        let sum = |costs: &[Cost; 2]| costs.iter().map(value).sum::<f64>();
        let (ours, theirs) = (sum(&ours), sum(&theirs));
        if 2.0 * ours > theirs {
            eprintln!("{what}, out and in: more than half of virtio-net's, in this run");
        }
        ensure!(
            ours <= MOST * theirs,
            "{what}, out and in: {ours:.3}, more than {MOST} times the {theirs:.3} of virtio-net"
        );
        Ok(())
    };
    check("exits per MiB", |cost| cost.exits_per_mib)?;
    check("exits per packet", |cost| cost.exits_per_packet)?;
    check("interrupts per MiB", |cost| cost.interrupts_per_mib)?;
    check("interrupts per packet", |cost| cost.interrupts_per_packet)?;
    figures.insert("against_virtio_net".into(), all);
    Ok(())
}
