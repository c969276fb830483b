// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Judges the log of a bus: one line for each violation, and nothing unexpected.

use std::collections::{BTreeMap, BTreeSet};

/// A violation of the protocol of vfio-user.
const ENDED: &str = "connection of client";
/// A client that came before the one before it had gone. That is nobody's fault.
const REFUSED: &str = "refused: client";
/// What else a hostile or a dying client may cause: pieces of the warnings, and no others.
const WARNINGS: [&str; 8] = [
    // A function was reset under its driver, and its guest goes on, or is killed.
    "its guest goes on after a reset",
    "nobody has set it up since it was reset",
    // A violation in shared memory.
    "a fault ends the connection",
    "memory of a region was unmapped",
    "memory of its peer that is not there",
    "memory at ",
    // The handshake of OPEN found another value.
    "not shared",
    "a region cannot be mapped",
];

/// What the log says of one device, and what it must not say.
#[derive(Debug, Default)]
pub struct Judged {
    /// Connections that were cut off for a violation, by device.
    pub violations: BTreeMap<String, u64>,
    /// Warnings that are expected, with the violations.
    pub warnings: u64,
    /// Lines that nothing explains.
    pub unexpected: Vec<String>,
}

/// Judges a whole log. `rough` are the devices whose clients break the protocol or are killed.
/// Only they may be warned of. The log may not say that it left lines out: the clients are slower
/// than its budgets.
pub fn judge(log: &str, rough: &BTreeSet<String>) -> Judged {
    let mut judged = Judged::default();
    for line in log.lines() {
        let level = line.split_whitespace().nth(1).unwrap_or_default();
        if matches!(level, "INFO" | "DEBUG" | "TRACE") {
            continue;
        }
        let device = field(line, "device");
        let is_known = |known: &&str| line.contains(known);
        let may = device.as_ref().is_none_or(|device| rough.contains(device));
        let is_expected = level == "WARN"
            && (line.contains(REFUSED)
                || may && (line.contains(ENDED) || WARNINGS.iter().any(is_known)));
        if !is_expected {
            judged.unexpected.push(line.to_owned());
            continue;
        }
        judged.warnings += 1;
        if let Some(device) = device.filter(|_| line.contains(ENDED)) {
            *judged.violations.entry(device).or_default() += 1;
        }
    }
    judged
}

/// The value of a field `name="value"` of a line.
fn field(line: &str, name: &str) -> Option<String> {
    let (_, rest) = line.split_once(&format!("{name}=\""))?;
    Some(rest.split('"').next()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_is_expected_of_rough_devices_only_and_an_error_of_none() {
        let log = "\
2026-01-01T00:00:00.000000Z  INFO serving 2 devices in /run/vbus\n\
2026-01-01T00:00:00.000000Z  WARN connection of client 7 ended: message size 8 device=\"bad\"\n\
2026-01-01T00:00:00.000000Z  WARN connection of client 8 ended: message size 8 device=\"good\"\n\
2026-01-01T00:00:00.000000Z  WARN something else device=\"bad\"\n\
2026-01-01T00:00:00.000000Z ERROR a task panicked; it ends\n\
12 lines of the log were lost\n\
thread 'worker' panicked at a.rs:1:1:\n";
        let judged = judge(log, &BTreeSet::from(["bad".to_owned()]));
        assert_eq!(judged.violations, BTreeMap::from([("bad".to_owned(), 1)]));
        assert_eq!(judged.warnings, 1);
        let expected: Vec<_> = log.lines().skip(2).collect();
        assert_eq!(judged.unexpected, expected);
    }
}
