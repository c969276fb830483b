// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Short runs of the fuzz targets in `fuzz/`, with the ordinary stable compiler.
//!
//! `cargo fuzz` needs a nightly compiler only for its sanitizers. The flags below are those of
//! `cargo fuzz` without the sanitizer. The crate `libfuzzer-sys` contains libFuzzer as C++ source.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use testkit::process::tail;
use testkit::report::{Outcome, Report};
use testkit::workspace;

/// The flags for a counter on every edge and for the tables of comparisons that libFuzzer reads.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions \
    -Coverflow-checks";

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// If a target takes longer than this for an input, that counts as a hang.
const HANG_SECONDS: u32 = 5;

fn folder() -> PathBuf {
    workspace::root().join("fuzz")
}

/// The names of the targets: one file each in `fuzz/fuzz_targets`.
pub fn targets() -> Result<Vec<String>> {
    let mut names = Vec::new();
    let Ok(entries) = fs::read_dir(folder().join("fuzz_targets")) else { return Ok(names) };
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}

/// Builds the targets and runs each for some seconds. A run begins with the target's corpus. A
/// target has one thread, so as many targets run at once as this machine has processors.
pub fn run(report: &mut Report, names: &[String], seconds: u32) {
    eprintln!("---- fuzz::{}", names.join(", fuzz::"));
    let built = build(names);
    let processors = thread::available_parallelism().map_or(1, |count| count.get());
    for names in names.chunks(processors) {
        let one = |name: &String| {
            let began = Instant::now();
            let outcome = match &built {
                Ok(Some(reason)) => Outcome::Skipped(reason.clone()),
                Ok(None) => run_one(name, seconds)
                    .unwrap_or_else(|error| Outcome::Failed(format!("{error:#}"))),
                Err(error) => Outcome::Failed(format!("{error:#}")),
            };
            (outcome, began.elapsed())
        };
        let ended: Vec<(Outcome, Duration)> = thread::scope(|scope| {
            let running: Vec<_> = names.iter().map(|name| scope.spawn(move || one(name))).collect();
            let panicked =
                |_| (Outcome::Failed("the test's own thread panicked".into()), Duration::ZERO);
            running.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
        });
        for (name, (outcome, took)) in names.iter().zip(&ended) {
            report.enter(&format!("fuzz::{name}"), outcome, *took);
        }
    }
}

/// Builds the targets. Returns a reason if this machine cannot build them.
fn build(names: &[String]) -> Result<Option<String>> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let version = Command::new(&compiler)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !version.is_ok_and(|status| status.success()) {
        return Ok(Some(format!("libFuzzer needs a C++ compiler, and {compiler} does not run")));
    }
    let mut cargo = workspace::cargo();
    cargo
        .args(["build", "--quiet", "--release", "--manifest-path"])
        .arg(folder().join("Cargo.toml"));
    cargo.args(["--target", TARGET, "--target-dir"]).arg(binaries());
    for name in names {
        cargo.args(["--bin", name]);
    }
    let status = cargo.env("RUSTFLAGS", FLAGS).env_remove("CARGO_ENCODED_RUSTFLAGS").status()?;
    ensure!(status.success(), "the fuzz targets do not build");
    Ok(None)
}

fn binaries() -> PathBuf {
    workspace::target().join("fuzz")
}

fn run_one(name: &str, seconds: u32) -> Result<Outcome> {
    // New inputs go into a folder outside of the repository. The run only reads the corpus in the
    // repository.
    let found = binaries().join("corpus").join(name);
    let artifacts = binaries().join("artifacts").join(name);
    fs::create_dir_all(&found)?;
    fs::create_dir_all(&artifacts)?;
    let log = workspace::logs()?.join(format!("fuzz-{name}.log"));
    let file = fs::File::create(&log)?;
    let mut command = Command::new(binaries().join(TARGET).join("release").join(name));
    command.arg(format!("-max_total_time={seconds}")).arg(format!("-timeout={HANG_SECONDS}"));
    command
        .args(["-rss_limit_mb=1024", "-print_final_stats=1"])
        .arg(format!("-artifact_prefix={}/", artifacts.display()));
    command.arg(&found);
    let kept = folder().join("corpus").join(name);
    if kept.exists() {
        command.arg(kept);
    }
    let status = command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).status();
    if status.context("cannot run the target")?.success() {
        let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        let runs =
            text.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
        eprintln!("fuzz::{name}: {} inputs", runs.unwrap_or("no").trim());
        return Ok(Outcome::Passed);
    }
    Ok(Outcome::Failed(format!("the input is in {}{}", artifacts.display(), tail(&log))))
}
