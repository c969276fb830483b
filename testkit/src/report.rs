//! What became of each test: a line as it ends, a summary, and the same as JSON.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};

/// Figures that scenarios have measured, by name.
pub type Figures = serde_json::Map<String, Value>;

/// How a test ended.
pub enum Outcome {
    /// All that it checks holds.
    Passed,
    /// Something does not hold, and what.
    Failed(String),
    /// Not run, with the reason.
    Skipped(String),
}

/// Why a scenario cannot run on this machine: an error that is none.
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
    /// An empty report; the time counts from here.
    fn default() -> Self {
        Self { began: Instant::now(), tests: Vec::new(), passed: 0, failed: 0, skipped: 0 }
    }
}

impl Report {
    /// Runs one test and enters how it ended.
    pub fn run(&mut self, name: &str, test: impl FnOnce() -> Result<Outcome>) {
        eprintln!("---- {name}");
        let began = Instant::now();
        let outcome = test().unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")));
        self.enter(name, &outcome, began.elapsed());
    }

    /// Enters a test that ran elsewhere.
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

    /// Adds tests that are only counted.
    pub fn count(&mut self, passed: u64, skipped: u64) {
        self.passed += passed;
        self.skipped += skipped;
    }

    /// Prints what failed and was skipped; true if nothing failed.
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

    /// How many tests ended how.
    pub fn summary(&self) -> String {
        format!("{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }

    /// Prints what failed and was skipped and the final line; true if nothing failed.
    pub fn finish(&self, as_json: bool) -> bool {
        self.show_failures();
        let seconds = self.began.elapsed().as_secs_f64();
        let line = self.summary();
        if as_json {
            eprintln!("{line}");
            let (passed, failed, skipped, tests) =
                (self.passed, self.failed, self.skipped, &self.tests);
            let all = json!({"ok": failed == 0, "passed": passed, "failed": failed, "skipped": skipped,
                "seconds": round(seconds), "tests": tests});
            println!("{all}");
        } else {
            println!("{line} ({seconds:.0} s)");
        }
        self.failed == 0
    }
}

/// To thousandths: more digits mean nothing.
fn round(seconds: f64) -> f64 {
    (seconds * 1000.0).round() / 1000.0
}
