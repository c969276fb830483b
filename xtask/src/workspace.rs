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

/// The programs that run in a guest: linked statically, since a guest has no libraries of the host's.
pub struct GuestPrograms {
    pub vbus: PathBuf,
    pub agent: PathBuf,
}

const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the guests' programs, in a folder of their own so that the flags disturb no other build.
pub fn build_guest_programs() -> Result<GuestPrograms> {
    let dir = target().join("guest");
    eprintln!("build: vbus and the agent for the guests");
    let status = cargo()
        .args(["build", "--quiet", "--release", "--package", "vbus", "--package", "guest-agent"])
        .args(["--target", GUEST_TARGET, "--target-dir"])
        .arg(&dir)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "the guests' programs do not build");
    let programs = dir.join(GUEST_TARGET).join("release");
    Ok(GuestPrograms { vbus: programs.join("vbus"), agent: programs.join("guest-agent") })
}

/// Builds the program `vbus` for the host and returns its path.
pub fn build_vbus() -> Result<PathBuf> {
    let dir = target().join("host");
    eprintln!("build: vbus");
    let status = cargo()
        .args(["build", "--quiet", "--release", "--package", "vbus", "--target-dir"])
        .arg(&dir)
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "vbus does not build");
    Ok(dir.join("release/vbus"))
}

/// The folder for logs that outlive a run.
pub fn logs() -> Result<PathBuf> {
    let dir = target().join("xtask/logs");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}
