// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reports how each test ended: one line a test, a summary, and the same as JSON.

use std::fmt;
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

/// The tests of one run.
#[derive(Debug)]
pub struct Report {
    began: Instant,
    tests: Vec<Value>,
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Default for Report {
    /// An empty report. Its time starts now.
    fn default() -> Self {
        Self { began: Instant::now(), tests: Vec::new(), passed: 0, failed: 0, skipped: 0 }
    }
}

impl Report {
    /// Runs one test and records how it ended.
    pub fn run(&mut self, name: &str, test: impl FnOnce() -> Result<Outcome>) {
        eprintln!("---- {name}");
        let began = Instant::now();
        let outcome = test().unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")));
        self.enter(name, &outcome, began.elapsed());
    }

    /// Records a test that ran elsewhere.
    pub fn enter(&mut self, name: &str, outcome: &Outcome, took: Duration) {
        let seconds = took.as_secs_f64();
        let (word, detail) = match outcome {
            Outcome::Passed => ("ok", ""),
            Outcome::Failed(why) => ("FAILED", why.as_str()),
            Outcome::Skipped(why) => ("skipped", why.as_str()),
        };
        match outcome {
            Outcome::Passed => self.passed += 1,
            Outcome::Failed(_) => self.failed += 1,
            Outcome::Skipped(_) => self.skipped += 1,
        }
        let colon = if detail.is_empty() { "" } else { ": " };
        eprintln!("{word:7} {name} ({seconds:.1} s){colon}{detail}");
        self.tests.push(
            json!({"name": name, "outcome": word, "detail": detail, "seconds": round(seconds)}),
        );
    }

    /// Adds to the numbers of passed and skipped tests, without names.
    pub fn count(&mut self, passed: u64, skipped: u64) {
        self.passed += passed;
        self.skipped += skipped;
    }

    /// Prints the tests that failed or were skipped. Returns true if none failed.
    pub fn show_failures(&self) -> bool {
        for word in ["skipped", "FAILED"] {
            for test in self.tests.iter().filter(|test| test["outcome"] == word) {
                let first =
                    test["detail"].as_str().and_then(|detail| detail.lines().next()).unwrap_or("");
                eprintln!("{word:7} {}: {first}", test["name"].as_str().unwrap_or(""));
            }
        }
        self.failed == 0
    }

    /// The numbers of passed, failed and skipped tests.
    pub fn summary(&self) -> String {
        format!("{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }

    /// Prints the tests that failed or were skipped, and the final line. Returns true if none
    /// failed.
    pub fn finish(&self, as_json: bool) -> bool {
        self.show_failures();
        let seconds = self.began.elapsed().as_secs_f64();
        let line = self.summary();
        if as_json {
            eprintln!("{line}");
            let (passed, failed, skipped, tests) =
                (self.passed, self.failed, self.skipped, &self.tests);
            let all = json!({"ok": failed == 0, "passed": passed, "failed": failed,
                "skipped": skipped,
                "seconds": round(seconds), "tests": tests});
            println!("{all}");
        } else {
            println!("{line} ({seconds:.0} s)");
        }
        self.failed == 0
    }
}

/// Rounds to thousandths.
fn round(seconds: f64) -> f64 {
    (seconds * 1000.0).round() / 1000.0
}
