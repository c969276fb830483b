//! A sched device that was opened.

use anyhow::Result;
use vbus_driver::sched::{Cpu, Cpus};
use vbus_driver::{Function, Hal};
use vbus_guest::{Claimed, Interrupt};

/// A device that was opened, with the pages of this machine's CPUs.
pub struct Session<H: Hal> {
    /// The device.
    pub cpus: Cpus<H>,
    /// The page of each CPU.
    pub pages: Vec<Cpu<H>>,
    /// The interrupt, whose lifeline tells when the device has gone.
    pub interrupt: Box<dyn Interrupt>,
}

impl<H: Hal> Session<H> {
    /// Opens the device that was claimed.
    pub fn open((hal, interrupt): Claimed<H>) -> Result<Self> {
        let mut cpus = Cpus::open(Function::probe(hal)?)?;
        let here = possible_cpus();
        let count = here.min(cpus.limits().cpus);
        if count < here {
            tracing::warn!(
                "this machine has {here} CPUs, the device pages for {count}: the others are left alone"
            );
        }
        let pages = (0..count).map(|cpu| cpus.cpu(cpu)).collect::<Result<Vec<_>, _>>()?;
        Ok(Session { cpus, pages, interrupt })
    }
}

/// CPUs that this machine may come to have, from the kernel's list of ranges.
fn possible_cpus() -> u32 {
    let list = std::fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    let last = list.trim().rsplit([',', '-']).next().and_then(|last| last.parse::<u32>().ok());
    last.map_or(1, |last| last.saturating_add(1))
}
