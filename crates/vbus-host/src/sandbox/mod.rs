// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the bus gives up before it makes its first device (spec/control.md, "What the bus gives
//! up"). It has one thread then, and its later threads begin with the same restrictions.
//!
//! Four protections, each for itself: no capabilities; no new privileges; a filter of system calls
//! (`filter`); and no way to files by their paths (Landlock). If the kernel lacks one, the others
//! are still there.

mod filter;

use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope, path_beneath_rules,
};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};
use serde_json::{Value, json};

/// What the device classes of a program need beside the classes of vbus. The bus gives up
/// everything else when it starts.
///
/// The classes of vbus open nothing in the process that serves the bus, so that process may open
/// nothing. A class that opens files says so:
///
/// ```
/// use vbus_host::Sandbox;
///
/// // The class reads a table that it brings along, and opens the files that its settings name.
/// let sandbox = Sandbox::default().configured_files().read("/usr/share/block/table");
/// # let _ = sandbox;
/// ```
///
/// The restrictions hold from before the first device is made, and for every thread of the process.
/// A call that is not allowed fails with EPERM, or with EACCES for a path.
#[derive(Clone, Debug, Default)]
pub struct Sandbox {
    configured: bool,
    read: Vec<PathBuf>,
    write: Vec<PathBuf>,
    sockets: bool,
    calls: Vec<i64>,
}

impl Sandbox {
    /// The classes open and change the files of the configuration file's devices
    /// ([`DeviceClass::files`](vbus_core::DeviceClass::files)), if they exist when the bus starts.
    /// And they open, create, change and remove files in the directory of the bus, and in the
    /// folders of `paths` in the table `[allow]`.
    #[must_use]
    pub fn configured_files(mut self) -> Sandbox {
        self.configured = true;
        self
    }

    /// The classes read the file at `path`, or the files below the folder `path`.
    #[must_use]
    pub fn read(mut self, path: impl Into<PathBuf>) -> Sandbox {
        self.read.push(path.into());
        self
    }

    /// The classes open, create, change and remove the file at `path`, or files below the folder
    /// `path`.
    #[must_use]
    pub fn write(mut self, path: impl Into<PathBuf>) -> Sandbox {
        self.write.push(path.into());
        self
    }

    /// The classes make sockets of any kind, connect them and listen. Nothing confines to whom they
    /// connect.
    #[must_use]
    pub fn sockets(mut self) -> Sandbox {
        self.sockets = true;
        self
    }

    /// The classes make the system call with this number (`libc::SYS_io_uring_setup`, ...), with
    /// any arguments.
    #[must_use]
    pub fn system_call(mut self, number: i64) -> Sandbox {
        self.calls.push(number);
        self
    }

    /// Whether classes of the program open files that the configuration names.
    pub(crate) fn has_configured_files(&self) -> bool {
        self.configured
    }

    /// Whether the classes open files.
    fn has_files(&self) -> bool {
        self.configured || !self.read.is_empty() || !self.write.is_empty()
    }

    /// Gives up everything that is not in this sandbox, for good: in the calling thread and in the
    /// threads that it starts. `paths` are the files and folders that the configuration allows.
    ///
    /// # Errors
    /// The kernel has a protection, but refuses to apply it.
    pub(crate) fn enter(&self, paths: &[PathBuf]) -> Result<Protections> {
        let capabilities = drop_capabilities(CapabilitySet::empty());
        let no_new_privs = set_no_new_privs(true).is_ok();
        let landlock = self.confine(paths).context("cannot confine the bus with Landlock")?;
        let seccomp = filter::apply(self).context("cannot filter the system calls of the bus")?;
        Ok(Protections { capabilities, no_new_privs, landlock, seccomp })
    }

    /// Applies Landlock. Returns the version of its interface, if the kernel has it.
    fn confine(&self, paths: &[PathBuf]) -> Result<Option<i32>> {
        let abi = ABI::V6;
        let ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(abi))?
            .scope(Scope::Signal)?;
        let mut ruleset = if self.sockets {
            ruleset.create()?
        } else {
            let ruleset = ruleset.handle_access(AccessNet::from_all(abi))?;
            ruleset.scope(Scope::AbstractUnixSocket)?.create()?
        };
        let read = AccessFs::from_read(abi) & !AccessFs::Execute;
        let write = AccessFs::from_all(abi) & !(AccessFs::Execute | AccessFs::IoctlDev);
        let add = |ruleset: RulesetCreated, paths: &[PathBuf], access| {
            ruleset.add_rules(path_beneath_rules(paths, access))
        };
        ruleset = add(ruleset, &self.read, read)?;
        ruleset = add(ruleset, &self.write, write)?;
        if self.configured {
            ruleset = add(ruleset, paths, write)?;
        }
        let status = ruleset.restrict_self()?;
        Ok(match status.landlock {
            _ if status.ruleset == RulesetStatus::NotEnforced => None,
            LandlockStatus::Available { effective_abi, kernel_abi } => {
                Some(kernel_abi.unwrap_or(effective_abi as i32))
            }
            _ => None,
        })
    }
}

/// Drops all capabilities except `kept`, also from the bounding set, so that no program can get
/// them back. Returns whether none but those are left.
pub fn drop_capabilities(kept: CapabilitySet) -> bool {
    // The kernel has at most 64. It says EINVAL behind its last one, and EPERM without CAP_SETPCAP:
    // then the sets below are all that there is to drop.
    for bit in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if !kept.contains(capability)
            && remove_capability_from_bounding_set(capability) == Err(Errno::INVAL)
        {
            break;
        }
    }
    let _ = clear_ambient_capability_set();
    let Ok(now) = capabilities(None) else { return false };
    let sets = CapabilitySets {
        effective: now.effective & kept,
        permitted: now.permitted & kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).is_ok()
}

/// The protections that are active.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Protections {
    /// The process has no capabilities.
    capabilities: bool,
    no_new_privs: bool,
    /// The version of Landlock's interface.
    landlock: Option<i32>,
    seccomp: bool,
}

impl Protections {
    /// What is missing, with its reason.
    pub fn missing(&self) -> Vec<&'static str> {
        let all = [
            (self.capabilities, "the capabilities cannot be dropped"),
            (self.no_new_privs, "the kernel has no no_new_privs"),
            (self.seccomp, "the kernel has no filters of system calls (seccomp)"),
            (self.landlock.is_some(), "the kernel has no Landlock"),
        ];
        all.iter().filter(|(active, _)| !active).map(|(_, reason)| *reason).collect()
    }

    /// Whether the process can open only files of which it was known at the start.
    pub fn confine_files(&self) -> bool {
        self.landlock.is_some()
    }

    /// For control clients.
    pub fn inspect(&self) -> Value {
        json!({
            "no-capabilities": self.capabilities,
            "no-new-privs": self.no_new_privs,
            "seccomp": self.seccomp,
            "landlock": self.landlock,
        })
    }
}

impl fmt::Display for Protections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let landlock = self.landlock.map(|abi| format!("Landlock {abi}"));
        let all = [
            self.capabilities.then(|| "no capabilities".to_owned()),
            self.no_new_privs.then(|| "no new privileges".to_owned()),
            self.seccomp.then(|| "filter of system calls".to_owned()),
            landlock,
        ];
        let active: Vec<_> = all.into_iter().flatten().collect();
        f.write_str(if active.is_empty() { "none" } else { "" })?;
        f.write_str(&active.join(", "))
    }
}

/// The capabilities that a supervisor needs: for TAP interfaces, for threads, and for sockets and
/// files of other users.
pub fn supervisor_capabilities() -> CapabilitySet {
    CapabilitySet::NET_ADMIN
        | CapabilitySet::SYS_NICE
        | CapabilitySet::CHOWN
        | CapabilitySet::FOWNER
        | CapabilitySet::DAC_OVERRIDE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protections_are_named() {
        let none = Protections::default();
        assert_eq!((none.to_string().as_str(), none.missing().len()), ("none", 4));
        let all = Protections {
            capabilities: true,
            no_new_privs: true,
            landlock: Some(7),
            seccomp: true,
        };
        assert_eq!(
            all.to_string(),
            "no capabilities, no new privileges, filter of system calls, Landlock 7"
        );
        assert!(all.missing().is_empty());
        assert_eq!(all.inspect()["landlock"], 7);
    }
}
