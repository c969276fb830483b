// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask fuzz` runs the fuzz targets in `fuzz/`, with the ordinary stable compiler. The
//! tests run each of them for some seconds.
//!
//! `cargo fuzz` needs a nightly compiler only for its sanitizers. The flags below are those of
//! `cargo fuzz` without the sanitizer. The crate `libfuzzer-sys` contains libFuzzer as C++ source.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use testkit::process::{Process, RunDir, tail};
use testkit::progress::Progress;
use testkit::report::{Outcome, Report};
use testkit::workspace;

/// The flags for a counter on every edge and for the tables of comparisons that libFuzzer reads.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions \
    -Coverflow-checks";

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// If a target takes longer than this for an input, that counts as a hang.
const HANG_SECONDS: u32 = 10;

/// How long a target may run beyond its time: for its first inputs, and one that hangs.
const GRACE: Duration = Duration::from_secs(300);

#[derive(clap::Args)]
pub struct Args {
    /// The targets; all if none is named
    targets: Vec<String>,
    /// Minutes that each target runs
    #[arg(long, value_name = "N", default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..=100_000))]
    minutes: u32,
    /// How many targets run at once [default: the number of processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    jobs: Option<u32>,
    /// Only run this input, with the target's whole output: reproduces a crash
    #[arg(long, value_name = "FILE", conflicts_with_all = ["minutes", "jobs", "keep"])]
    input: Option<PathBuf>,
    /// Add to the corpus in fuzz/corpus what reaches more code, instead of running
    #[arg(long, conflicts_with_all = ["minutes", "jobs"])]
    keep: bool,
    /// Only print the names of the targets
    #[arg(long)]
    list: bool,
}

/// Runs the command. Returns false if a target failed.
pub fn run(args: &Args) -> Result<bool> {
    let known = targets()?;
    if args.list {
        known.iter().for_each(|name| println!("{name}"));
        return Ok(true);
    }
    if let Some(name) = args.targets.iter().find(|name| !known.contains(name)) {
        bail!("there is no fuzz target {name:?}; there are {}", known.join(", "));
    }
    let names = if args.targets.is_empty() { known } else { args.targets.clone() };
    if args.input.is_some() {
        ensure!(names.len() == 1, "--input needs the one target that gets the input");
    }
    eprintln!("fuzz: building {}", names.join(", "));
    if let Some(reason) = build(&names)? {
        bail!("{reason}");
    }
    if let Some(input) = &args.input {
        let mut target = Target::of(&names[0])?.command();
        let status = target.arg(input).status().context("cannot run the target")?;
        return Ok(status.success());
    }
    if args.keep {
        names.iter().try_for_each(|name| Target::of(name)?.keep())?;
        return Ok(true);
    }
    let report = Report::default();
    let seconds = u64::from(args.minutes) * 60;
    let work = format!(
        "{} for {} min each; the log of each is in {}",
        names.join(", "),
        args.minutes,
        workspace::logs()?.display()
    );
    let progress = Some(Progress::begin("fuzz", &work));
    run_all(&report, &names, seconds, args.jobs.map(|jobs| jobs as usize), progress);
    Ok(report.finish(false))
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

/// Builds the targets and runs each for some seconds, as a test.
pub fn test(report: &Report, names: &[String], seconds: u32) {
    eprintln!("---- fuzz::{}", names.join(", fuzz::"));
    let began = Instant::now();
    let refused = match build(names) {
        Ok(None) => return run_all(report, names, seconds.into(), None, None),
        Ok(Some(reason)) => Outcome::Skipped(reason),
        Err(error) => Outcome::Failed(format!("{error:#}")),
    };
    for name in names {
        report.enter(&format!("fuzz::{name}"), &refused, began.elapsed());
    }
}

/// Runs targets that are built, each for some seconds. A run begins with the target's corpus. A
/// target has one thread, so as many targets run at once as this machine has processors, if `jobs`
/// does not say another number.
fn run_all(
    report: &Report,
    names: &[String],
    seconds: u64,
    jobs: Option<usize>,
    progress: Option<Progress>,
) {
    let processors = thread::available_parallelism().map_or(1, |count| count.get());
    let next = AtomicUsize::new(0);
    let shown = Mutex::new(Shown { progress, targets: BTreeMap::new() });
    let one = || {
        while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
            let began = Instant::now();
            let lock = || shown.lock().unwrap_or_else(PoisonError::into_inner);
            let ended = run_one(name, seconds, |state| lock().show(name, state));
            let outcome = ended.unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")));
            lock().targets.remove(name.as_str());
            report.enter(&format!("fuzz::{name}"), &outcome, began.elapsed());
        }
    };
    thread::scope(|scope| {
        for _ in 0..jobs.unwrap_or(processors).min(names.len()) {
            scope.spawn(one);
        }
    });
}

/// How far the targets that run have come.
struct Shown<'a> {
    progress: Option<Progress>,
    targets: BTreeMap<&'a str, String>,
}

impl<'a> Shown<'a> {
    fn show(&mut self, name: &'a str, state: &str) {
        let Some(progress) = &mut self.progress else { return };
        self.targets.insert(name, state.to_owned());
        let all: Vec<_> = self.targets.iter().map(|(name, at)| format!("{name} {at}")).collect();
        progress.at(&all.join("; "));
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

fn folder() -> PathBuf {
    workspace::root().join("fuzz")
}

fn binaries() -> PathBuf {
    workspace::target().join("fuzz")
}

/// A target, and where its inputs are.
struct Target<'a> {
    name: &'a str,
    /// The inputs that its runs have found. They are outside of the repository.
    found: PathBuf,
    /// The inputs that failed.
    artifacts: PathBuf,
    /// The inputs in the repository. There may be none.
    kept: PathBuf,
}

impl Target<'_> {
    fn of(name: &str) -> Result<Target<'_>> {
        let found = binaries().join("corpus").join(name);
        let artifacts = binaries().join("artifacts").join(name);
        fs::create_dir_all(&found)?;
        fs::create_dir_all(&artifacts)?;
        Ok(Target { name, found, artifacts, kept: folder().join("corpus").join(name) })
    }

    /// The program, with the options that each use of it needs.
    fn command(&self) -> Command {
        let mut command = Command::new(binaries().join(TARGET).join("release").join(self.name));
        command
            .arg(format!("-timeout={HANG_SECONDS}"))
            .args(["-rss_limit_mb=1024", "-print_final_stats=1"])
            .arg(format!("-artifact_prefix={}/", self.artifacts.display()));
        let words = folder().join("dictionaries").join(format!("{}.dict", self.name));
        if words.exists() {
            command.arg(format!("-dict={}", words.display()));
        }
        command.stdin(Stdio::null());
        command
    }

    /// Adds the fewest inputs that reach more code to the corpus in the repository.
    fn keep(&self) -> Result<()> {
        let count = || fs::read_dir(&self.kept).map_or(0, Iterator::count);
        fs::create_dir_all(&self.kept)?;
        let before = count();
        let status =
            self.command().arg("-set_cover_merge=1").arg(&self.kept).arg(&self.found).status()?;
        ensure!(status.success(), "the corpus of {} cannot be merged", self.name);
        println!("{}: {} inputs, {} of them new", self.name, count(), count() - before);
        Ok(())
    }
}

/// Runs a target. `show` gets what it has reached, now and then.
fn run_one(name: &str, seconds: u64, mut show: impl FnMut(&str)) -> Result<Outcome> {
    let target = Target::of(name)?;
    let log = workspace::logs()?.join(format!("fuzz-{name}.log"));
    // A process appends to its log, and this is another run.
    File::create(&log)?;
    // Some targets make folders and do not remove them.
    let temporary = RunDir::new()?;
    let mut command = target.command();
    command.env("TMPDIR", temporary.path());
    command.arg(format!("-max_total_time={seconds}")).arg(&target.found);
    if target.kept.exists() {
        command.arg(&target.kept);
    }
    let before = inputs(&target.artifacts);
    let mut process = Process::start(command, name, &log)?;
    let until = Instant::now() + Duration::from_secs(seconds) + GRACE;
    let status = loop {
        if let Some(status) = process.ended()? {
            break status;
        }
        ensure!(Instant::now() < until, process.complaint("did not end"));
        let text = fs::read(&log).unwrap_or_default();
        if let Some(state) = String::from_utf8_lossy(&text).lines().rev().find_map(state) {
            show(&state);
        }
        thread::sleep(Duration::from_millis(200));
    };
    if status.success() {
        let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        let runs =
            text.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
        eprintln!("fuzz::{name}: {} inputs", runs.unwrap_or("no").trim());
        return Ok(Outcome::Passed);
    }
    let new = inputs(&target.artifacts).into_iter().find(|input| !before.contains(input));
    let again = match new {
        Some(input) => format!("run it again: cargo xtask fuzz {name} --input {}", input.display()),
        None => format!("it ended with {status}"),
    };
    Ok(Outcome::Failed(format!("{again}{}", tail(&log))))
}

fn inputs(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// What a line of libFuzzer's log says about the run: inputs, edges of the program, inputs each
/// second. `#4096 pulse  cov: 838 ft: 1466 corp: 142/3404b lim: 4096 exec/s: 4820 rss: 30Mb` is
/// such a line.
fn state(line: &str) -> Option<String> {
    let inputs = line.strip_prefix('#')?.split_whitespace().next()?;
    let after = |key: &str| line.split(key).nth(1)?.split_whitespace().next();
    let (edges, rate) = (after(" cov: ")?, after(" exec/s: ")?);
    Some(format!("{inputs} inputs, {edges} edges, {rate}/s"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_of_a_run_is_read_from_its_log() {
        let line = "#4096\tpulse  cov: 838 ft: 1466 corp: 142/3404b lim: 4096 exec/s: 48 rss: 30Mb";
        assert_eq!(state(line).unwrap(), "4096 inputs, 838 edges, 48/s");
        assert_eq!(state("#2 INITED exec/s: 0"), None);
        assert_eq!(state("INFO: seed corpus: cov: 1 exec/s: 2"), None);
    }
}
