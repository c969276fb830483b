// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask guest`, as a user runs it.

use std::process::{Output, Stdio};

use anyhow::{Context, Result, ensure};

use crate::bus::{Bus, device};
use crate::lab::Scene;
use crate::workspace;

/// A guest on a running bus gets the device of `--device` and the program of `--put`. It runs a
/// command, whose output and exit code come back. `--put` refuses a program that a guest cannot
/// run.
pub fn guest(scene: &Scene) -> Result<()> {
    let pages =
        r#"pages = [{ name = "setpoint", bytes = 64, owner = "device", initial = "ready" }]"#;
    let config = [device("net0", "venet", "backend = \"null\""), device("values", "state", pages)];
    let bus = Bus::start(scene, &config.concat())?;
    let xtask_guest = |words: &[&str]| -> Result<Output> {
        let mut command = workspace::cargo();
        command.args(["run", "--quiet", "--package", "xtask", "--", "guest", "--as-built"]);
        command.arg("--dir").arg(bus.dir()).args(scene.lab.options().words()).args(words);
        command.stdin(Stdio::null()).output().context("cannot run cargo")
    };
    let put = format!("{}=root/tried", scene.lab.agent().display());

    // Without arguments the agent prints its usage and ends with 2.
    let command = "tried; echo ended with $?; vbus-guest list; vbus-guest state get setpoint";
    let output = xtask_guest(&["--device", "values", "--put", &put, "--run", command])?;
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "xtask guest ended with {}:\n{out}{err}", output.status);
    ensure!(
        out.contains("ended with 2") && out.contains("values") && out.contains("ready"),
        "the command said\n{out}{err}"
    );
    ensure!(!out.contains("net0"), "the guest has a device that was not named:\n{out}");
    let socket = bus.socket("values").display().to_string();
    let line = err.lines().find(|line| line.contains("-kernel") && line.contains(&socket));
    ensure!(line.is_some(), "QEMU's command line is not told:\n{err}");

    let output = xtask_guest(&["--run", "exit 3"])?;
    let err = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && err.contains("ended with 3"), "{}\n{err}", output.status);

    // The system's shell is linked dynamically.
    let output = xtask_guest(&["--put", "/bin/sh", "--run", "true"])?;
    let err = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && err.contains("crt-static"), "{}\n{err}", output.status);
    Ok(())
}
