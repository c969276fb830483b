// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest without a virtual machine: processes of this host in namespaces of their own.
//!
//! The agent is the first process of a new process namespace, and has a network of its own. The
//! guest's drivers reach the devices over their sockets. Such a guest starts in milliseconds, and
//! dies as a whole by one signal.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::guest::Guest;
use crate::lab::Scene;
use crate::process::Process;
use crate::report::Skip;
use crate::vm::{BOOT, Listener};

/// The commands that scenarios use in a guest, all of busybox.
const COMMANDS: [&str; 7] = ["cat", "grep", "ip", "kill", "pidof", "ping", "sleep"];

/// A running guest. Dropping it kills all its processes.
pub struct ProcessGuest {
    /// Runs commands in the guest.
    pub guest: Guest,
    process: Process,
}

impl ProcessGuest {
    /// Starts a guest, to see whether this machine can have one, and ends it.
    ///
    /// # Errors
    /// A [`Skip`]: this machine lets this user make no namespaces or no interfaces.
    pub fn probe(scene: &Scene) -> Result<()> {
        Self::start(scene, "probe").map(drop).map_err(|error| {
            Skip(format!(
                "guests of processes need root, or a /dev/net/tun and user namespaces that this \
                 user may use: {error:#}"
            ))
            .into()
        })
    }

    /// Starts the guest `name` and waits until its agent answers. Start it on a thread that lives
    /// as long as the guest.
    ///
    /// # Errors
    /// It does not start, or gets no interfaces. [`probe`](Self::probe) tells whether this machine
    /// can have such guests.
    pub fn start(scene: &Scene, name: &str) -> Result<Self> {
        let listener = Listener::new(scene.dir().join(format!("{name}.agent")))?;
        let path = programs(scene)?.into_os_string();
        let path = match std::env::var_os("PATH") {
            Some(rest) => [path, rest].join(std::ffi::OsStr::new(":")),
            None => path,
        };
        let mut command = Command::new("unshare");
        if !rustix::process::geteuid().is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "--net"]);
        command.arg(scene.lab.agent()).arg("serve").arg(listener.path()).env("PATH", path);
        let log = scene.dir().join(format!("{name}.log"));
        let mut process = Process::start(command, &format!("guest {name}"), &log)?;
        let port = listener.accept(&mut process).context("no namespaces of its own")?;
        let guest = Guest::new(name, port)?;
        guest.wait_boot(1, BOOT)?;
        guest.ok("ip link set lo up && : <> /dev/net/tun").context("no interfaces of its own")?;
        Ok(Self { guest, process })
    }

    /// Kills all processes of the guest at once (SIGKILL).
    ///
    /// # Errors
    /// They have ended already.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }
}

/// Makes the folder of the programs that a guest of processes has before those of the host.
fn programs(scene: &Scene) -> Result<PathBuf> {
    let folder = scene.dir().join("bin");
    if folder.exists() {
        return Ok(folder);
    }
    fs::create_dir(&folder)?;
    let lab = scene.lab;
    symlink(lab.agent(), folder.join("guest-agent"))?;
    symlink(lab.guest(), folder.join("vbus-guest"))?;
    if let Some(kit) = lab.kit() {
        for command in COMMANDS {
            symlink(kit.busybox(), folder.join(command)).context("cannot link busybox")?;
        }
    }
    Ok(folder)
}
