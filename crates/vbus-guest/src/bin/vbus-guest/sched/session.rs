// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An open sched device.

use anyhow::Result;
use vbus_driver::sched::{Cpu, Cpus};
use vbus_driver::{Function, Hal};
use vbus_guest::{Claimed, Interrupt};

/// An open device, with the pages of this machine's CPUs.
pub struct Session<H: Hal> {
    /// The device.
    pub cpus: Cpus<H>,
    /// The page of each CPU.
    pub pages: Vec<Cpu<H>>,
    /// The interrupt. Its lifeline hangs up when the device has gone.
    pub interrupt: Box<dyn Interrupt>,
}

impl<H: Hal> Session<H> {
    /// Opens the claimed device.
    pub fn open((hal, interrupt): Claimed<H>) -> Result<Self> {
        let mut cpus = Cpus::open(Function::probe(hal)?)?;
        let here = possible_cpus();
        let count = here.min(cpus.limits().cpus);
        if count < here {
            tracing::warn!(
                "this machine has {here} CPUs, but the device has pages for {count}: the other \
                 CPUs keep their class"
            );
        }
        let pages = (0..count).map(|cpu| cpus.cpu(cpu)).collect::<Result<Vec<_>, _>>()?;
        Ok(Session { cpus, pages, interrupt })
    }
}

/// The number of CPUs that this machine can have, from the kernel's list of ranges.
fn possible_cpus() -> u32 {
    let list = std::fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    let last = list.trim().rsplit([',', '-']).next().and_then(|last| last.parse::<u32>().ok());
    last.map_or(1, |last| last.saturating_add(1))
}
