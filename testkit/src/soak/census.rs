// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a bus and its supervisor hold of the system, and whether that stays flat.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

/// The fewest censuses that say whether a quantity is flat: two in each quarter.
pub const FEWEST: usize = 8;

/// What the bus and its supervisor hold together at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Census {
    /// How many processes they are.
    pub processes: u64,
    /// Resident memory, with the pages of guests that they share.
    pub rss_kib: u64,
    /// The same, but a page that several processes share counts by its share.
    pub pss_kib: u64,
    /// Mappings.
    pub mappings: u64,
    /// Address space in their mappings.
    pub mapped_kib: u64,
    /// Threads.
    pub threads: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Files, maps and mappings that the bus keeps for the memory of its peers, as it says itself.
    pub peers: u64,
    /// Open descriptors by what they lead to: `socket`, `eventfd`, `memfd`, `file` and so on.
    pub kinds: BTreeMap<String, u64>,
}

impl Census {
    /// Counts what the process `bus` and its descendants hold. `stats` are what `vbus stats` says
    /// at the same time.
    ///
    /// # Errors
    /// The bus has ended, or its folder in /proc cannot be read; or `stats` lack the memory of
    /// peers.
    pub fn take(bus: u32, stats: &Value) -> Result<Self> {
        let mut census = Self::default();
        // Each device has the sum over all devices.
        for resource in ["descriptors", "maps", "mappings"] {
            let sum = stats[0]["memory"][resource]["all_used"].as_u64();
            census.peers +=
                sum.with_context(|| format!("vbus stats does not say memory.{resource}.all_used"))?;
        }
        census.add(bus).with_context(|| format!("cannot look at the bus, process {bus}"))?;
        for child in descendants(bus)? {
            // A child may have ended meanwhile.
            let _ = census.add(child);
        }
        Ok(census)
    }

    fn add(&mut self, process: u32) -> Result<()> {
        let folder = format!("/proc/{process}");
        let status = fs::read_to_string(format!("{folder}/status"))?;
        let rollup = fs::read_to_string(format!("{folder}/smaps_rollup"))?;
        let maps = fs::read_to_string(format!("{folder}/maps"))?;
        self.processes += 1;
        self.rss_kib += field(&status, "VmRSS:")?;
        self.mapped_kib += field(&status, "VmSize:")?;
        self.threads += field(&status, "Threads:")?;
        self.pss_kib += field(&rollup, "Pss:")?;
        self.mappings += maps.lines().count() as u64;
        for entry in fs::read_dir(format!("{folder}/fd"))? {
            // The descriptor may have been closed meanwhile.
            let Ok(target) = fs::read_link(entry?.path()) else { continue };
            *self.kinds.entry(kind(&target)).or_default() += 1;
            self.descriptors += 1;
        }
        Ok(())
    }

    /// Whether the quantities that a client's connection needs are those of `other`. Memory is left
    /// out, because a page can come and go at any time.
    pub fn holds_as_much(&self, other: &Self) -> bool {
        (self.mappings, self.threads, self.peers, &self.kinds)
            == (other.mappings, other.threads, other.peers, &other.kinds)
    }
}

/// The number behind `key` in a file of /proc.
fn field(text: &str, key: &str) -> Result<u64> {
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok());
    value.with_context(|| format!("no {key} in /proc"))
}

/// The kind of a descriptor, by what its link in /proc says.
fn kind(target: &Path) -> String {
    let text = target.to_string_lossy();
    let kind = match text.split_once(':') {
        Some(("anon_inode", rest)) => rest.trim_matches(['[', ']']),
        Some(("/memfd", _)) => "memfd",
        Some((kind, _)) if !kind.contains('/') => kind,
        _ if text.starts_with("/dev/") => &text,
        _ => "file",
    };
    kind.to_owned()
}

/// The processes that `root` has started, and those that they have started.
fn descendants(root: u32) -> Result<Vec<u32>> {
    let mut parents = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(process) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(format!("/proc/{process}/stat")) else { continue };
        // The name may contain spaces. The state and the parent stand after it.
        let parent = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1));
        parents.extend(parent.and_then(|parent| Some((process, parent.parse::<u32>().ok()?))));
    }
    let is_below = |process: &u32| {
        let mut above = parents.get(process);
        while let Some(parent) = above.filter(|parent| **parent != root) {
            above = parents.get(parent);
        }
        above.is_some()
    };
    Ok(parents.keys().copied().filter(is_below).collect())
}

/// A quantity that must stay flat, and how much it may grow.
pub struct Quantity {
    /// What it is.
    pub name: &'static str,
    /// Its value in a census.
    pub of: fn(&Census) -> u64,
    /// By how much its least value of the last quarter may exceed its greatest value of the second
    /// quarter.
    pub allowance: u64,
}

/// What must stay flat. The allocator takes an arena for a new thread if the others are in use, up
/// to 8 for each processor, and keeps it: 64 MiB of address space in two mappings. So mappings may
/// grow by some arenas; a guest's memory that stays mapped shows in `peers`, without an allowance.
pub const QUANTITIES: [Quantity; 7] = [
    Quantity { name: "RSS in KiB", of: |census| census.rss_kib, allowance: 4096 },
    Quantity { name: "Pss in KiB", of: |census| census.pss_kib, allowance: 4096 },
    Quantity { name: "descriptors", of: |census| census.descriptors, allowance: 2 },
    Quantity { name: "mappings", of: |census| census.mappings, allowance: 32 },
    Quantity { name: "mapped KiB", of: |census| census.mapped_kib, allowance: 16 << 16 },
    Quantity { name: "peers' memory", of: |census| census.peers, allowance: 0 },
    Quantity { name: "threads", of: |census| census.threads, allowance: 1 },
];

/// What has grown from the second quarter of the censuses to the last, a line for each. The first
/// quarter is for warming up. `None`: there are too few censuses to say.
pub fn growth(censuses: &[Census]) -> Option<Vec<String>> {
    let quarter = censuses.len() / 4;
    if censuses.len() < FEWEST {
        return None;
    }
    let second = &censuses[quarter..2 * quarter];
    let last = &censuses[censuses.len() - quarter..];
    let grown = |quantity: &Quantity| {
        let before = second.iter().map(quantity.of).max().unwrap_or_default();
        let after = last.iter().map(quantity.of).min().unwrap_or_default();
        (after > before + quantity.allowance).then(|| {
            format!(
                "{}: at most {before} in the second quarter of the run, at least {after} in the \
                 last; {} more are allowed",
                quantity.name, quantity.allowance
            )
        })
    };
    Some(QUANTITIES.iter().filter_map(grown).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use serde_json::json;

    use super::*;

    fn run(descriptors: &[u64]) -> Vec<Census> {
        let census = |&descriptors: &u64| Census { descriptors, ..Census::default() };
        descriptors.iter().map(census).collect()
    }

    #[test]
    fn a_leak_is_growth_and_a_warm_up_or_a_peak_is_none() {
        assert_eq!(growth(&run(&[1; FEWEST - 1])), None);
        let flat = [1, 9, 20, 20, 90, 20, 20, 21];
        assert_eq!(growth(&run(&flat)), Some(Vec::new()), "a warm-up, and a peak");
        let leak: Vec<u64> = (0..12).collect();
        let found = growth(&run(&leak)).unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("descriptors: at most 5 in"), "{found:?}");
    }

    #[test]
    fn a_process_is_counted_with_its_children() {
        let amount = json!({ "all_used": 2 });
        let memory = json!({ "descriptors": amount, "maps": amount, "mappings": amount });
        let mut stats = json!([{ "memory": memory }]);
        let alone = Census::take(std::process::id(), &stats).unwrap();
        assert_eq!(alone.peers, 6);
        assert!(alone.rss_kib > 0 && alone.mappings > 0 && alone.threads > 0);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let both = Census::take(std::process::id(), &stats).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        // Other tests of this process may run processes of their own.
        assert!(both.processes > 1, "{both:?}");
        stats[0]["memory"]["maps"] = Value::Null;
        let error = Census::take(std::process::id(), &stats).unwrap_err().to_string();
        assert!(error.contains("memory.maps.all_used"), "{error}");
    }

    #[test]
    fn a_descriptor_has_a_kind() {
        for (target, expected) in [
            ("socket:[123]", "socket"),
            ("anon_inode:[eventfd]", "eventfd"),
            ("anon_inode:inotify", "inotify"),
            ("/memfd:vbus (deleted)", "memfd"),
            ("/dev/null", "/dev/null"),
            ("/run/a: b", "file"),
        ] {
            assert_eq!(kind(Path::new(target)), expected);
        }
    }
}
