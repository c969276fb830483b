//! Data between two guests, checked end to end by hash, in every shape that the NIC has.

use anyhow::Result;

use super::pair::{ADDRESS, Pair, Spec};
use crate::lab::Scene;
use crate::nic;

/// Bytes in each direction of one scenario. With four scenarios this makes more than 1 GiB.
const BYTES: u64 = 144 << 20;

fn run(scene: &Scene, spec: Spec, large_ping: u32) -> Result<()> {
    let pair = Pair::start(scene, spec)?;
    let ping = nic::ping(pair.a(), ADDRESS[1], 5)?;
    eprintln!("ping: min {:.2}, avg {:.2}, max {:.2} ms", ping.min, ping.avg, ping.max);
    // Larger than a frame of the usual size, and not to be cut into pieces, if the MTU allows it.
    pair.a().ok(&format!("ping -c 3 -w 30 -s {large_ping} {}", ADDRESS[1]))?;
    pair.transfer(5001, BYTES)?;
    pair.transfer_back(5002, BYTES)?;
    for vm in pair.vms {
        vm.power_off()?;
    }
    Ok(())
}

/// One queue pair, MTU 1500, offloads.
pub fn plain(scene: &Scene) -> Result<()> {
    run(scene, Spec::default(), 1000)
}

/// MTU 9000.
pub fn jumbo(scene: &Scene) -> Result<()> {
    run(scene, Spec { device: "mtu = 9000", ..Spec::default() }, 8900)
}

/// Two queue pairs in guests of two CPUs.
pub fn two_pairs(scene: &Scene) -> Result<()> {
    run(scene, Spec { device: "pairs = 2", cpus: 2, ..Spec::default() }, 1000)
}

/// No offloads: every packet at its own size with its own checksum.
pub fn no_offloads(scene: &Scene) -> Result<()> {
    run(scene, Spec { driver: "--no-offloads", ..Spec::default() }, 1000)
}
