// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The workspace: where it is, and how its programs are built.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The root of the workspace.
pub fn root() -> &'static Path {
    // This crate is one folder below it.
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// The workspace's own folder `target`. It holds the kit and the guests' programs, even if cargo
/// builds everything else in another folder.
pub fn target() -> PathBuf {
    root().join("target")
}

/// Cargo, run in the workspace.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// The programs under test. They are linked statically, because a guest has no libraries of the
/// host.
pub struct Programs {
    /// Serves the bus on the host.
    pub vbus: PathBuf,
    /// Drives the devices in the guests.
    pub guest: PathBuf,
    /// Runs commands in the guests.
    pub agent: PathBuf,
}

const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the programs. With `as_built` it takes the last build, if there is one.
pub fn build_programs(as_built: bool) -> Result<Programs> {
    let programs = ["vbus", "vbus-guest", "guest-agent"];
    let [vbus, guest, agent] = build_static(&programs, programs, as_built)?;
    Ok(Programs { vbus, guest, agent })
}

/// Builds the programs of `examples/block`: the one that serves its class, and the one that drives
/// its device. With `as_built` it takes the last build, if there is one.
pub fn build_block(as_built: bool) -> Result<[PathBuf; 2]> {
    build_static(&["example-block"], ["block-host", "block-guest"], as_built)
}

/// Builds `vbus-vmm`. With `as_built` it takes the last build, if there is one.
pub fn build_vmm(as_built: bool) -> Result<PathBuf> {
    let [vmm] = build_static(&["vbus-vmm"], ["vbus-vmm"], as_built)?;
    Ok(vmm)
}

/// Builds programs of `packages`. The target folder is their own: their flags would force rebuilds
/// in another one.
fn build_static<const N: usize>(
    packages: &[&str],
    programs: [&str; N],
    as_built: bool,
) -> Result<[PathBuf; N]> {
    let dir = target().join("guest");
    let folder = dir.join(GUEST_TARGET).join("release");
    let programs = programs.map(|name| folder.join(name));
    if !(as_built && programs.iter().all(|path| path.exists())) {
        eprintln!("build: {} for the guests, linked statically", packages.join(", "));
        let status = cargo()
            .args(["build", "--release", "--target", GUEST_TARGET, "--target-dir"])
            .arg(&dir)
            .args(packages.iter().flat_map(|name| ["--package", *name]))
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            // Each boot copies these programs into the guest's memory.
            .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo")
            .status()
            .context("cannot run cargo")?;
        ensure!(status.success(), "{} do not build", packages.join(", "));
    }
    Ok(programs)
}

/// Builds a program of the package of the same name, with all checks of a debug build.
pub fn build_debug(name: &str) -> Result<PathBuf> {
    let output = cargo()
        .args(["build", "--quiet", "--package", name, "--bin", name, "--message-format", "json"])
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "{name} does not build");
    executable(&output.stdout).with_context(|| format!("cargo names no executable of {name}"))
}

/// The last executable that cargo's messages name.
fn executable(messages: &[u8]) -> Option<PathBuf> {
    String::from_utf8_lossy(messages)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .next_back()
}

/// Builds the tests of vbus-kvm and links them statically. With `as_built` it takes the last build,
/// if there is one.
pub fn build_kvm_tests(as_built: bool) -> Result<PathBuf> {
    let dir = target().join("guest");
    // Cargo's own name for them changes from build to build.
    let program = dir.join("vbus-kvm-tests");
    if !(as_built && program.exists()) {
        eprintln!("build: the tests of vbus-kvm");
        let output = cargo()
            .args(["test", "--release", "--no-run", "--package", "vbus-kvm", "--test", "it"])
            .args(["--message-format", "json", "--target", GUEST_TARGET, "--target-dir"])
            .arg(&dir)
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo")
            .stderr(std::process::Stdio::inherit())
            .output()
            .context("cannot run cargo")?;
        ensure!(output.status.success(), "the tests of vbus-kvm do not build");
        let built = executable(&output.stdout)
            .context("cargo names no executable of the tests of vbus-kvm")?;
        std::fs::copy(&built, &program)
            .with_context(|| format!("cannot copy {}", built.display()))?;
    }
    Ok(program)
}

/// Builds the guest without an operating system. With `as_built` it takes the last build, if there
/// is one.
pub fn build_flat(as_built: bool) -> Result<PathBuf> {
    let dir = target().join("flat");
    let image = dir.join(GUEST_TARGET).join("release/flat");
    if !(as_built && image.exists()) {
        eprintln!("build: guests/flat, the guest without an operating system");
        let status = cargo()
            // Its flags are in that folder's .cargo/config.toml. They replace all others.
            .current_dir(root().join("guests/flat"))
            .args(["build", "--release", "--target-dir"])
            .arg(&dir)
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo")
            .status()
            .context("cannot run cargo")?;
        ensure!(status.success(), "guests/flat does not build");
    }
    Ok(image)
}

/// Makes the folder for logs that outlive a run, and returns it.
pub fn logs() -> Result<PathBuf> {
    let dir = target().join("xtask/logs");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}
