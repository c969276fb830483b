// SPDX-License-Identifier: Apache-2.0 OR MIT
//! DPDK's `virtio_user` as the front end of vhost-user devices. No guest has a part in it.

use anyhow::{Result, ensure};

use crate::bus::Bus;
use crate::lab::Scene;
use crate::testpmd::{self, DEVICES, Testpmd, UNDER_WAY};

/// The frames that each port must get.
const FRAMES: u64 = 50_000;

/// Frames go round between two ports of one testpmd, over the bus's switch: with split rings and
/// then with packed ones. Each end counts them.
pub fn passes(scene: &Scene) -> Result<()> {
    let dpdk = testpmd::dpdk(scene.lab)?;
    let bus = Bus::start(scene, &testpmd::config())?;
    let sockets = DEVICES.map(|name| bus.socket(name));
    let counters = || -> Result<[[u64; 2]; 2]> {
        let of = |name: &str| -> Result<[u64; 2]> {
            let sent = bus.sum_of_pairs(name, |pair| pair["tx"]["frames"].as_u64())?;
            let received = bus.sum_of_pairs(name, |pair| pair["rx"]["frames"].as_u64())?;
            Ok([received, sent])
        };
        Ok([of(DEVICES[0])?, of(DEVICES[1])?])
    };
    for packed in [false, true] {
        let before = counters()?;
        let mut front_end = Testpmd::front_end(&dpdk, scene, &sockets, packed, 0)?;
        let counts = front_end.pass(FRAMES)?;
        let after = counters()?;
        front_end.stop()?;
        eprintln!("packed {packed}: {counts:?}");
        for port in 0..2 {
            let (of_port, of_bus) =
                (counts.ports[port], [0, 1].map(|way| after[port][way] - before[port][way]));
            // The bus was asked later.
            for (theirs, ours) in of_port.into_iter().zip(of_bus) {
                ensure!(
                    ours + UNDER_WAY >= theirs,
                    "port {port} counts {of_port:?} received and sent, and the bus {of_bus:?}"
                );
            }
        }
    }
    Ok(())
}
