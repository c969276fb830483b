// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds out what a machine does that does not answer any more, for the logs of its scenario.

use std::fmt::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use crate::guest::Guest;
use crate::qmp::Qmp;

/// How often a machine is looked at. What stays the same stands still.
pub const LOOKS: u32 = 3;

/// How long a look from inside L1 may take.
const LIMIT: Duration = Duration::from_secs(30);

/// The commands of QEMU's monitor that show a machine, and whether they show each CPU.
const SHOWN: [(&str, bool); 4] =
    [("info registers", true), ("info lapic", true), ("info pic", false), ("info status", false)];

/// What QEMU knows of a machine: the registers and the interrupt controllers. `socket` is its
/// control socket.
pub fn under_qemu(socket: &Path, cpus: u32) -> String {
    let mut text = String::new();
    if let Err(error) = look_under_qemu(socket, cpus, &mut text) {
        let _ = writeln!(text, "QEMU does not tell: {error:#}");
    }
    text
}

fn look_under_qemu(socket: &Path, cpus: u32, text: &mut String) -> Result<()> {
    let mut qmp = Qmp::new(UnixStream::connect(socket)?)?;
    for look in 1..=LOOKS {
        for (command, each) in SHOWN {
            for cpu in 0..if each { cpus } else { 1 } {
                let arguments = json!({ "command-line": command, "cpu-index": cpu });
                let told = qmp.execute("human-monitor-command", arguments)?;
                let told = told.as_str().unwrap_or_default().replace('\r', "");
                writeln!(text, "== look {look}, CPU {cpu}: {command}\n{}", told.trim_end())?;
            }
        }
    }
    Ok(())
}

/// What the Linux of L1 knows of the VMM whose name is `program`: its threads, the exits of its
/// virtual CPUs, and the bus with the folder `bus`.
pub fn in_l1(l1: &Guest, program: &str, bus: &str) -> String {
    let script = format!(
        "for pid in $(pidof {program}); do for task in /proc/$pid/task/*; do \
         echo \"-- $(cat $task/comm): $(cut -d ')' -f 2 $task/stat)\"; cat $task/wchan; echo; \
         cat $task/stack; done; done; \
         D=/sys/kernel/debug; [ -d $D/kvm ] || mount -t debugfs debugfs $D; \
         for file in $D/kvm/*-*/vcpu*/* $D/kvm/*-*/*; do \
         [ -f $file ] && echo \"$file $(head -n 1 $file)\"; done; \
         cat /proc/interrupts; vbus stats --json --dir {bus}"
    );
    let mut text = String::new();
    for look in 1..=LOOKS {
        let told = match l1.run_for(&script, LIMIT) {
            Ok(output) => output.stdout + &output.stderr,
            Err(error) => format!("L1 does not tell: {error:#}"),
        };
        let _ = writeln!(text, "== look {look} from L1\n{told}");
    }
    text
}
