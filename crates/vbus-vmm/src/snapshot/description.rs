// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The description of a saved machine: what another machine must have in common with it.

use std::collections::BTreeSet;

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// The description. It names no file and no socket: whoever restores a machine says what it may
/// use, not whoever has saved it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Description {
    /// The version of the program that has saved it.
    pub(crate) version: String,
    /// The number of virtual CPUs.
    pub(crate) cpus: u32,
    /// The size of memory in MiB.
    pub(crate) memory_mib: u64,
    /// The I/O APIC is the program's own.
    pub(crate) split: bool,
    /// The number of slots.
    pub(crate) slots: u8,
    /// Doorbells in BARs end in the kernel.
    pub(crate) mmio: bool,
    /// The guest may ring doorbells by ports.
    pub(crate) pio: bool,
    /// The guest may ring doorbells by hypercalls.
    pub(crate) hypercalls: bool,
    /// The frequency of the time stamp counters.
    pub(crate) tsc_khz: u32,
    /// The CPUID leaves, without the topology: function, index, flags, EAX, EBX, ECX, EDX.
    pub(crate) cpuid: Vec<[u32; 7]>,
    /// The devices of the bus.
    pub(crate) devices: Vec<SavedDevice>,
}

/// A device of the bus in a description.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedDevice {
    /// Its name.
    pub(crate) name: String,
    /// The number of its slot.
    pub(crate) slot: u8,
}

impl Description {
    /// Checks that the devices which are there, by name, are those of the saved machine.
    ///
    /// # Errors
    /// They are not. The text names each that is missing or too much.
    pub(crate) fn check_devices(&self, there: &[&str]) -> Result<()> {
        let saved: BTreeSet<&str> = self.devices.iter().map(|device| &*device.name).collect();
        ensure!(saved.len() == self.devices.len(), "two saved devices have the same name");
        let there: BTreeSet<&str> = there.iter().copied().collect();
        let list = |names: Vec<&&str>| {
            // The names come from outside, and this text goes to a terminal.
            let names: Vec<_> =
                names.iter().map(|name| name.escape_default().to_string()).collect();
            names.join(", ")
        };
        let missing: Vec<_> = saved.difference(&there).collect();
        let surplus: Vec<_> = there.difference(&saved).collect();
        if !missing.is_empty() {
            bail!(
                "the saved machine has devices that are missing here: {} (give each as --device \
                 NAME=SOCKET)",
                list(missing)
            );
        }
        if !surplus.is_empty() {
            bail!("the saved machine has no devices {}: leave them out", list(surplus));
        }
        Ok(())
    }

    /// Checks the size of the machine against what the caller insists on.
    ///
    /// # Errors
    /// It is another one. The text says what differs.
    pub(crate) fn check_size(&self, cpus: Option<u32>, memory_mib: Option<u64>) -> Result<()> {
        let mut differs = Vec::new();
        if let Some(cpus) = cpus.filter(|cpus| *cpus != self.cpus) {
            differs.push(format!("{} virtual CPUs, not {cpus}", self.cpus));
        }
        if let Some(mib) = memory_mib.filter(|mib| *mib != self.memory_mib) {
            differs.push(format!("{} MiB of memory, not {mib}", self.memory_mib));
        }
        ensure!(differs.is_empty(), "the saved machine has {}", differs.join(", and "));
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn description() -> Description {
        let device = |name: &str, slot| SavedDevice { name: name.into(), slot };
        Description {
            version: "0".into(),
            cpus: 2,
            memory_mib: 64,
            split: false,
            slots: 8,
            mmio: true,
            pio: true,
            hypercalls: false,
            tsc_khz: 1_000_000,
            cpuid: vec![[0; 7]],
            devices: vec![device("net", 1), device("disk", 2)],
        }
    }

    #[test]
    fn what_differs_is_named() {
        let saved = description();
        saved.check_devices(&["disk", "net"]).unwrap();
        let fault = |there: &[&str]| saved.check_devices(there).unwrap_err().to_string();
        assert!(fault(&["net"]).contains("missing here: disk (give"));
        assert!(fault(&[]).contains("missing here: disk, net (give"));
        assert!(fault(&["net", "disk", "pic"]).contains("no devices pic:"));
        saved.check_size(Some(2), Some(64)).unwrap();
        saved.check_size(None, None).unwrap();
        let fault = saved.check_size(Some(1), Some(128)).unwrap_err().to_string();
        assert!(fault.ends_with("2 virtual CPUs, not 1, and 64 MiB of memory, not 128"));
        let mut twice = description();
        twice.devices[1].name = "net".into();
        assert!(twice.check_devices(&["net"]).is_err());
        twice.devices[1].name = "\x1b[2J".into();
        assert!(twice.check_devices(&["net"]).unwrap_err().to_string().contains("\\u{1b}[2J"));
    }

    #[test]
    fn unknown_fields_are_refused() {
        let text = serde_json::to_string(&description()).unwrap();
        assert_eq!(serde_json::from_str::<Description>(&text).unwrap(), description());
        let more = text.replacen('{', "{\"kernel\":\"/etc/passwd\",", 1);
        assert!(serde_json::from_str::<Description>(&more).is_err());
    }
}
