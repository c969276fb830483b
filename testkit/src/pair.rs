// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two guests on one switch, each with a NIC. Most scenarios start with them.

use std::time::Duration;

use anyhow::Result;

use crate::bus::{Bus, device};
use crate::guest::Guest;
use crate::lab::Scene;
use crate::nic::{self, Nic};
use crate::vm::{Vm, VmSpec};

/// The addresses of the two guests.
pub const ADDRESS: [&str; 2] = ["10.0.0.1", "10.0.0.2"];

/// The names of their NICs.
const NAME: [&str; 2] = ["net-a", "net-b"];

/// How long a transfer may take on a busy machine.
pub const TRANSFER: Duration = Duration::from_secs(240);

/// The description of a pair.
#[derive(Clone, Copy, Default)]
pub struct PairSpec {
    /// More lines for both devices in the bus's configuration.
    pub device: &'static str,
    /// More words for `vbus-guest net`.
    pub driver: &'static str,
    /// Virtual CPUs in each guest; 0 counts as 1.
    pub cpus: u32,
    /// More words for QEMU of guest a.
    pub args: &'static [&'static str],
}

/// A bus, two guests, and a driver in each.
pub struct Pair {
    // Rust drops these in order: the drivers' handles, the guests, then the bus.
    /// The driver of each guest.
    pub nics: Vec<Nic>,
    /// The guests.
    pub vms: Vec<Vm>,
    /// The bus that serves both.
    pub bus: Bus,
}

impl Pair {
    /// Boots the guests and starts their drivers.
    pub fn start(scene: &Scene, spec: PairSpec) -> Result<Self> {
        let config: String = ["net-a", "net-b"]
            .map(|name| device(name, "venet", &format!("backend = \"switch\"\n{}", spec.device)))
            .concat();
        let bus = Bus::start(scene, &config)?;
        let mut vms = Vec::new();
        for name in ["a", "b"] {
            let mut machine = VmSpec::new(name).device(bus.socket(&format!("net-{name}")));
            machine.cpus = spec.cpus.max(1);
            if name == "a" {
                machine = machine.args(spec.args);
            }
            vms.push(machine.start(scene)?);
        }
        let mut pair = Self { nics: Vec::new(), vms, bus };
        for at in 0..pair.vms.len() {
            pair.vms[at].wait_boot(1)?;
            nic::prepare(&pair.vms[at].guest)?;
            let nic = pair.driver(at, spec.driver)?;
            pair.nics.push(nic);
        }
        Ok(pair)
    }

    /// Starts the driver of the first NIC of guest `at`.
    pub fn driver(&self, at: usize, options: &str) -> Result<Nic> {
        Nic::up(&self.vms[at].guest, NAME[at], "vbus0", &format!("{}/24", ADDRESS[at]), options)
    }

    /// Guest a.
    pub fn a(&self) -> &Guest {
        &self.vms[0].guest
    }

    /// Guest b.
    pub fn b(&self) -> &Guest {
        &self.vms[1].guest
    }

    /// Sends bytes from a to b and compares the hashes.
    pub fn transfer(&self, port: u16, bytes: u64) -> Result<()> {
        nic::transfer(self.a(), self.b(), ADDRESS[1], port, bytes, u64::from(port), TRANSFER)
    }

    /// Sends bytes from b to a and compares the hashes.
    pub fn transfer_back(&self, port: u16, bytes: u64) -> Result<()> {
        nic::transfer(self.b(), self.a(), ADDRESS[0], port, bytes, u64::from(port), TRANSFER)
    }
}
