// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask test` runs every test. Its last line says how many passed.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;

use testkit::l1::Clock;
use testkit::lab::Options;
use testkit::report::{Outcome, Report};
use testkit::scenarios::SCENARIOS;
use testkit::{runner, workspace};

use crate::{commands, faults, fuzz, man};

/// The tests that cargo runs: unit, property, model (loom) and process tests, and the examples in
/// documentation.
const CARGO: &str = "cargo";

/// How many bytes of a failed test's output are shown. The log has all of it.
const SAID_MAX: usize = 2048;

/// The test that sends ten million interrupts through an interrupt controller. It exists only in a
/// release build.
const LOST: &str = "lost_interrupts";

/// The test that lets system calls of a bus fail.
const FAULTS: &str = "faults";

/// The test of the man pages, the completions, and the commands that the documents show.
const DOCUMENTS: &str = "documents";

#[derive(clap::Args)]
pub struct Args {
    /// Names, or beginnings of them: `cargo`, `fuzz`, `vm`, `vm::boot`, `kvm` ...
    names: Vec<String>,
    /// Only print the names
    #[arg(long)]
    list: bool,
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
    /// Seconds that each fuzz target runs
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    fuzz_seconds: u32,
    /// How often the scenarios of linux:: repeat what they repeat, such as loading the module; by
    /// default a few times, so that all tests take minutes
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    times: Option<u32>,
    /// How many guests' scenarios run at the same time, 1 or 2. Those in kvm:: run one after the
    /// other, and so do the others; 2 runs both groups at once [default: 2 with two processors or
    /// more]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u8).range(1..=2))]
    jobs: Option<u8>,
    #[command(flatten)]
    guests: Options,
}

impl Args {
    fn jobs(&self) -> usize {
        let processors = || thread::available_parallelism().map_or(1, |count| count.get().min(2));
        self.jobs.map_or_else(processors, usize::from)
    }
}

/// Runs the chosen tests. Returns false if one failed.
pub fn run(args: &Args) -> Result<bool> {
    let wanted = |name: &str| {
        args.names.is_empty() || args.names.iter().any(|prefix| name.starts_with(prefix))
    };
    let fuzz_targets: Vec<_> =
        fuzz::targets()?.into_iter().filter(|name| wanted(&format!("fuzz::{name}"))).collect();
    let scenarios: Vec<_> = SCENARIOS.iter().filter(|scenario| wanted(scenario.name)).collect();
    if args.list {
        if wanted(CARGO) {
            println!("{CARGO:28} unit, property, model and process tests");
        }
        if wanted(DOCUMENTS) {
            println!("{DOCUMENTS:28} man pages, completions, and the commands in the documents");
        }
        if wanted(FAULTS) {
            println!("{FAULTS:28} what a bus makes of system calls that fail, 60 of them");
        }
        if wanted(LOST) {
            println!(
                "{LOST:28} pic loses none of ten million interrupts that are masked and moved \
                 (release build)"
            );
        }
        for name in &fuzz_targets {
            println!("{:28} a short run of this fuzz target", format!("fuzz::{name}"));
        }
        for scenario in &scenarios {
            println!("{:28} {}", scenario.name, scenario.about);
        }
        return Ok(true);
    }
    let ours = [CARGO, DOCUMENTS, FAULTS, LOST];
    anyhow::ensure!(
        ours.iter().any(|name| wanted(name)) || !fuzz_targets.is_empty() || !scenarios.is_empty(),
        "no test is called {}; `cargo xtask test --list` names them",
        args.names.join(" or ")
    );

    let report = Report::default();
    if wanted(CARGO) {
        cargo_tests(&report)?;
    }
    if wanted(DOCUMENTS) {
        report.run(DOCUMENTS, || documents(args.guests.as_built));
    }
    if wanted(FAULTS) {
        report.run(FAULTS, faults::test);
    }
    if wanted(LOST) {
        report.run(LOST, lost_interrupts);
    }
    if !fuzz_targets.is_empty() {
        fuzz::test(&report, &fuzz_targets, args.fuzz_seconds);
    }
    if !scenarios.is_empty() {
        let (guests, jobs) = (&args.guests, args.jobs());
        let figures = runner::run(&report, &scenarios, guests, Clock::Time, args.times, jobs);
        if !figures.is_empty() {
            eprintln!("kvm: {}", Value::Object(figures));
        }
    }
    Ok(report.finish(args.json))
}

/// Runs `cargo test` and reads the numbers from its output.
fn cargo_tests(report: &Report) -> Result<()> {
    let began = Instant::now();
    eprintln!("---- {CARGO} test --workspace");
    let logs = workspace::logs()?;
    let log = logs.join("cargo-test.log");
    let mut cargo = workspace::cargo()
        // The output of passed tests is shown too: a test says there what this machine lacks.
        .args(["test", "--workspace", "--no-fail-fast", "--", "--show-output"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let mut copy = File::create(&log)?;
    let (mut passed, mut skipped) = (0, 0);
    // The names of the failed tests, and the output of each test. Cargo prints that output after
    // all tests of a program have ended.
    let (mut failures, mut said, mut speaks) = (Vec::new(), HashMap::<String, String>::new(), None);
    for line in BufReader::new(cargo.stdout.take().context("no output")?).lines() {
        let line = line?;
        std::io::Write::write_all(&mut copy, format!("{line}\n").as_bytes())?;
        if let Some(name) =
            line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            failures.push(name.to_owned());
        } else if let Some(numbers) = line.strip_prefix("test result: ") {
            passed += before(numbers, " passed");
            skipped += before(numbers, " ignored");
            speaks = None;
        } else if let Some(name) =
            line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            speaks = Some(name.to_owned());
        } else if line == "failures:" || line == "successes:" {
            speaks = None;
        } else if let Some(name) = &speaks {
            let said = said.entry(name.clone()).or_default();
            if said.len() < SAID_MAX {
                *said += &format!("{line}\n");
            }
        }
    }
    let status = cargo.wait()?;
    let lacks = skipped_tests(&said, &failures);
    report.count(passed.saturating_sub(lacks.len() as u64), skipped);
    skipped += lacks.len() as u64;
    passed = passed.saturating_sub(lacks.len() as u64);
    for (name, why) in lacks {
        let outcome = Outcome::Skipped(why.to_owned());
        report.enter(&format!("{CARGO}::{name}"), &outcome, began.elapsed());
    }
    for name in &failures {
        let said = said.get(name).map_or("", String::as_str);
        let end = last_words(name, said);
        let why = Outcome::Failed(format!("{end}\nall of it: {}", log.display()));
        report.enter(&format!("{CARGO}::{name}"), &why, began.elapsed());
    }
    if !status.success() && failures.is_empty() {
        let why =
            Outcome::Failed("cargo test did not run to its end; it has said why above".into());
        report.enter(CARGO, &why, began.elapsed());
    }
    eprintln!(
        "{CARGO}: {passed} passed, {} failed, {skipped} skipped ({:.0} s)",
        failures.len(),
        began.elapsed().as_secs_f32()
    );
    Ok(())
}

/// Where the failed test `name` panicked, and why, in one line. Of several threads that panicked,
/// its own counts: the others may have done so as a part of the test.
fn last_words(name: &str, said: &str) -> String {
    let own = format!("thread '{name}'");
    let thread = said.find(&own).unwrap_or(0);
    let end = said[thread..]
        .find(" panicked at ")
        .map_or(said, |at| &said[thread + at + 1..])
        .replacen(":\n", ": ", 1);
    end.split("\nstack backtrace:").next().unwrap_or_default().trim().to_owned()
}

/// The tests that did nothing, each with its reason. The first line of their output is
/// `skipped: REASON`.
fn skipped_tests<'a>(
    said: &'a HashMap<String, String>,
    failures: &[String],
) -> Vec<(&'a str, &'a str)> {
    let mut skipped: Vec<_> = said
        .iter()
        .filter(|(name, _)| !failures.contains(name))
        .filter_map(|(name, text)| Some((name.as_str(), text.trim().strip_prefix("skipped: ")?)))
        .map(|(name, why)| (name, why.lines().next().unwrap_or(why)))
        .collect();
    skipped.sort_unstable();
    skipped
}

/// Runs the test of [`DOCUMENTS`]. Its programs are those that run in the guests.
fn documents(as_built: bool) -> Result<Outcome> {
    let programs = man::programs(as_built)?;
    man::check(&programs)?;
    commands::check(&programs)?;
    Ok(Outcome::Passed)
}

/// Runs the test of [`LOST`].
fn lost_interrupts() -> Result<Outcome> {
    let output = workspace::cargo()
        .args(["test", "--quiet", "--release", "--package", "vbus-vfio-user", "--test", "it"])
        .args(["--", "--nocapture", "ten_million"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().filter(|line| line.contains(" interrupts, ")).for_each(|line| eprintln!("{line}"));
    anyhow::ensure!(output.status.success() && text.contains("1 passed"), "{text}");
    Ok(Outcome::Passed)
}

/// The number before `word`.
fn before(text: &str, word: &str) -> u64 {
    let number = text.split(word).next().and_then(|head| head.rsplit(' ').next());
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_that_says_it_is_skipped_is_not_counted_as_passed() {
        let said = [("a", "skipped: no tun\nmore"), ("b", "all well"), ("c", "skipped: x")];
        let said = said.map(|(name, text)| (name.to_owned(), text.to_owned())).into();
        assert_eq!(skipped_tests(&said, &["c".to_owned()]), [("a", "no tun")]);
        assert_eq!(before("ok. 12 passed; 3 failed", " passed"), 12);
    }

    #[test]
    fn of_several_threads_that_panicked_the_test_s_own_counts() {
        let worker = "thread '<unnamed>' (7) panicked at a.rs:1:2:\nit went\n";
        let own = "thread 'x::y' (6) panicked at b.rs:3:4:\nit waited\nstack backtrace:\n 0: f";
        let said = format!("{worker}{own}");
        assert_eq!(last_words("x::y", &said), "panicked at b.rs:3:4: it waited");
        assert_eq!(last_words("x::y", worker), "panicked at a.rs:1:2: it went");
    }
}
