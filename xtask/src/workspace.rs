//! The workspace: where it is, and the programs built from it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The root of the workspace.
pub fn root() -> &'static Path {
    // This crate lies one folder below it.
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// The folder `target` of the workspace: the kit and what is built for the guests, wherever cargo builds otherwise.
pub fn target() -> PathBuf {
    root().join("target")
}

/// Cargo, run in the workspace.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// The programs under test, linked statically since a guest has none of the host's libraries.
pub struct Programs {
    /// Serves the bus on the host, and drives its devices in the guests.
    pub vbus: PathBuf,
    /// Runs commands in the guests.
    pub agent: PathBuf,
}

const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the programs, in a folder of their own so that the flags disturb no other build.
pub fn build_programs() -> Result<Programs> {
    let dir = target().join("guest");
    eprintln!("build: vbus and the guests' agent");
    let status = cargo()
        .args(["build", "--quiet", "--release", "--package", "vbus", "--package", "guest-agent"])
        .args(["--target", GUEST_TARGET, "--target-dir"])
        .arg(&dir)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "vbus and the guests' agent do not build");
    let programs = dir.join(GUEST_TARGET).join("release");
    Ok(Programs { vbus: programs.join("vbus"), agent: programs.join("guest-agent") })
}

/// The folder for logs that outlive a run.
pub fn logs() -> Result<PathBuf> {
    let dir = target().join("xtask/logs");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}
