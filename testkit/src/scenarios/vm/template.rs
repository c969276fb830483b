// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A new crate from the device template, tested in a real guest.

use anyhow::{Context, Result, ensure};

use crate::lab::Scene;
use crate::{template, workspace};

/// A new crate passes its own tests, also the one in a real guest.
pub fn new_device(scene: &Scene) -> Result<()> {
    let folder = scene.dir().join("first-block");
    template::new_device("first-block", &folder)?;
    let output = workspace::cargo()
        .args(["test", "--quiet", "--offline", "--", "--include-ignored"])
        .current_dir(&folder)
        // They would replace the flags of the crate's own configuration.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        // Kept from run to run, since most of it are the crates of vbus.
        .env("CARGO_TARGET_DIR", workspace::target().join("new-device"))
        .output()
        .context("cannot run cargo")?;
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    ensure!(output.status.success(), "the tests of a new device fail:\n{said}");
    ensure!(said.contains("2 passed"), "not both tests of tests/it ran:\n{said}");
    Ok(())
}
