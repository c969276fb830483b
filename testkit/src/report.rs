// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reports how each test ended: one line a test, a summary, and the same as JSON.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};

/// Figures that scenarios have measured, by name.
pub type Figures = serde_json::Map<String, Value>;

/// How a test ended.
pub enum Outcome {
    /// All checks hold.
    Passed,
    /// A check does not hold. The text says which.
    Failed(String),
    /// The test did not run. The text is the reason.
    Skipped(String),
}

/// The reason why a scenario cannot run on this machine. It travels as an error, but the test does
/// not fail.
#[derive(Debug)]
pub struct Skip(pub String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// The tests of one run. Threads that run tests at the same time share it.
#[derive(Debug)]
pub struct Report {
    began: Instant,
    ended: Mutex<Ended>,
}

/// The tests that have ended.
#[derive(Debug, Default)]
struct Ended {
    tests: Vec<Value>,
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Default for Report {
    /// An empty report. Its time starts now.
    fn default() -> Self {
        Self { began: Instant::now(), ended: Mutex::default() }
    }
}

impl Report {
    fn ended(&self) -> MutexGuard<'_, Ended> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one test and records how it ended.
    pub fn run(&self, name: &str, test: impl FnOnce() -> Result<Outcome>) {
        eprintln!("---- {name}");
        let began = Instant::now();
        let outcome = test().unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")));
        self.enter(name, &outcome, began.elapsed());
    }

    /// Records a test that ran elsewhere.
    pub fn enter(&self, name: &str, outcome: &Outcome, took: Duration) {
        let seconds = took.as_secs_f64();
        let (word, detail) = match outcome {
            Outcome::Passed => ("ok", ""),
            Outcome::Failed(why) => ("FAILED", why.as_str()),
            Outcome::Skipped(why) => ("skipped", why.as_str()),
        };
        let mut ended = self.ended();
        match outcome {
            Outcome::Passed => ended.passed += 1,
            Outcome::Failed(_) => ended.failed += 1,
            Outcome::Skipped(_) => ended.skipped += 1,
        }
        let colon = if detail.is_empty() { "" } else { ": " };
        eprintln!("{word:7} {name} ({seconds:.1} s){colon}{detail}");
        ended.tests.push(
            json!({"name": name, "outcome": word, "detail": detail, "seconds": round(seconds)}),
        );
    }

    /// Adds to the numbers of passed and skipped tests, without names.
    pub fn count(&self, passed: u64, skipped: u64) {
        let mut ended = self.ended();
        ended.passed += passed;
        ended.skipped += skipped;
    }

    /// Prints the tests that failed or were skipped. Returns true if none failed.
    pub fn show_failures(&self) -> bool {
        let ended = self.ended();
        for word in ["skipped", "FAILED"] {
            for test in ended.tests.iter().filter(|test| test["outcome"] == word) {
                let first =
                    test["detail"].as_str().and_then(|detail| detail.lines().next()).unwrap_or("");
                eprintln!("{word:7} {}: {first}", test["name"].as_str().unwrap_or(""));
            }
        }
        ended.failed == 0
    }

    /// The numbers of passed, failed and skipped tests.
    pub fn summary(&self) -> String {
        let ended = self.ended();
        format!("{} passed, {} failed, {} skipped", ended.passed, ended.failed, ended.skipped)
    }

    /// Prints the tests that failed or were skipped, and the final line. Returns true if none
    /// failed.
    pub fn finish(&self, as_json: bool) -> bool {
        self.show_failures();
        let seconds = self.began.elapsed().as_secs_f64();
        let line = self.summary();
        let ended = self.ended();
        if as_json {
            eprintln!("{line}");
            let Ended { tests, passed, failed, skipped } = &*ended;
            let all = json!({"ok": *failed == 0, "passed": passed, "failed": failed,
                "skipped": skipped,
                "seconds": round(seconds), "tests": tests});
            println!("{all}");
        } else {
            println!("{line} ({seconds:.0} s)");
        }
        ended.failed == 0
    }
}

/// Rounds to thousandths.
fn round(seconds: f64) -> f64 {
    (seconds * 1000.0).round() / 1000.0
}
