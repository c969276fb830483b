// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask guest`, as a user runs it.

use std::fs;
use std::process::{Output, Stdio};

use anyhow::{Context, Result, ensure};

use crate::bus::{Bus, device};
use crate::lab::Scene;
use crate::workspace;

/// A guest on a running bus gets the devices of `--device` and the programs of `--put`. It runs a
/// command, whose output and exit code come back. The program that serves the bus and the driver in
/// the guest are those of `examples/block`, as an author of a device has them. `--put` refuses a
/// program that a guest cannot run.
pub fn guest(scene: &Scene) -> Result<()> {
    const SECTOR: usize = 512;
    let [block_host, block_guest] = workspace::build_block(scene.lab.options().as_built)?;
    let disk = scene.dir().join("disk");
    fs::write(&disk, [b"from the host\n".as_slice(), &[b'-'; 20 * SECTOR - 14]].concat())?;
    let pages =
        r#"pages = [{ name = "setpoint", bytes = 64, owner = "device", initial = "ready" }]"#;
    let config = [
        device("net0", "venet", "backend = \"null\""),
        device("values", "state", pages),
        device("disk0", "block", &format!("path = {:?}", disk.display().to_string())),
    ];
    let bus = Bus::start_with(&block_host, scene, &config.concat())?;
    let xtask_guest = |words: &[&str]| -> Result<Output> {
        let mut command = workspace::cargo();
        command.args(["run", "--quiet", "--package", "xtask", "--", "guest", "--as-built"]);
        command.arg("--dir").arg(bus.dir()).args(scene.lab.options().words()).args(words);
        command.stdin(Stdio::null()).output().context("cannot run cargo")
    };
    let agent = format!("{}=root/tried", scene.lab.agent().display());
    let block_guest = block_guest.display().to_string();

    // Without arguments the agent prints its usage and ends with 2.
    let command = "tried; echo ended with $?; vbus-guest list; vbus-guest state get setpoint; \
        block-guest read 0 1 | head -n 1; echo from the guest | block-guest write 19; \
        block-guest sectors; block-guest write 20 < /proc/version 2>&1";
    let puts = ["--put", &agent, "--put", &block_guest];
    let devices = ["--device", "values", "--device", "disk0"];
    let output = xtask_guest(&[&devices[..], &puts, &["--run", command]].concat())?;
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(err.contains("the command ended with 1"), "the last command must fail:\n{out}{err}");
    for expected in [
        "ended with 2",
        "values",
        "ready",
        "from the host",
        "\n20\n",
        "the disk has no such sector",
    ] {
        ensure!(out.contains(expected), "the command did not say {expected:?}:\n{out}{err}");
    }
    ensure!(!out.contains("net0"), "the guest has a device that was not named:\n{out}");
    let written = fs::read(&disk)?;
    let last = written.get(19 * SECTOR..).unwrap_or_default();
    ensure!(
        written.len() == 20 * SECTOR && last.starts_with(b"from the guest\n\0"),
        "the file of the disk has {:?}",
        String::from_utf8_lossy(last)
    );
    let socket = bus.socket("values").display().to_string();
    let line = err.lines().find(|line| line.contains("-kernel") && line.contains(&socket));
    ensure!(line.is_some(), "QEMU's command line is not told:\n{err}");

    // A process in the background keeps nobody waiting.
    let output = xtask_guest(&["--run", "sleep 1000 & exit 3"])?;
    let err = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && err.contains("ended with 3"), "{}\n{err}", output.status);

    // The system's shell is linked dynamically.
    let output = xtask_guest(&["--put", "/bin/sh", "--run", "true"])?;
    let err = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && err.contains("crt-static"), "{}\n{err}", output.status);
    Ok(())
}
