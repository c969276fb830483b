//! The settings of a `sched` device (spec/sched.md, "Settings").

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use vbus_core::CreateError;
use vbus_core::shm::abi::sched as abi;

use crate::policy::Policy;

/// The names of the classes, by number.
pub const CLASS_NAMES: [&str; 6] = ["none", "normal", "batch", "idle", "fifo", "rr"];

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Raw {
    threads: Option<Vec<i32>>,
    qmp: Option<PathBuf>,
    vmm: Option<PathBuf>,
    cpus: Option<u32>,
    #[serde(default = "all")]
    allow: Vec<Class>,
    #[serde(default = "ten")]
    priority_max: i32,
    nice_min: Option<i32>,
    #[serde(default = "thousand")]
    changes: u32,
    #[serde(default = "half_a_second")]
    boost_ms: u32,
    boost_share: Option<u32>,
}

/// In the order of their numbers, from 1.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Class {
    Normal = abi::CLASS_NORMAL as isize,
    Batch = abi::CLASS_BATCH as isize,
    Idle = abi::CLASS_IDLE as isize,
    Fifo = abi::CLASS_FIFO as isize,
    Rr = abi::CLASS_RR as isize,
}

fn all() -> Vec<Class> {
    vec![Class::Normal, Class::Batch, Class::Idle, Class::Fifo, Class::Rr]
}

fn ten() -> i32 {
    10
}

fn thousand() -> u32 {
    1000
}

fn half_a_second() -> u32 {
    500
}

/// *Share*, if the settings do not say ...
const SHARE: u32 = 90;
/// ... and the share that is none.
const SHARE_ALL: u32 = 100;
/// Virtual CPUs with pages, if the settings do not say.
const CPUS: u32 = 64;
const CHANGES_MAX: u32 = 100_000;
const BOOST_MS: std::ops::RangeInclusive<u32> = 10..=60_000;

/// Where the threads of the virtual CPUs are known from.
#[derive(Clone, Debug)]
pub enum Origin {
    /// From the settings, in the order of the virtual CPUs.
    Threads(Vec<i32>),
    /// From QEMU, by QMP on this socket.
    Qmp(PathBuf),
    /// From vbus-vmm, by its control socket.
    Vmm(PathBuf),
}

/// The settings of a device.
#[derive(Clone, Debug)]
pub struct Config {
    pub origin: Origin,
    /// Virtual CPUs with pages.
    pub cpus: u32,
    pub policy: Policy,
}

impl Config {
    /// Checks the settings. `tells_time`: the kernel tells how much processor time a thread has
    /// used; if it does not, there is no bound for it, and it is an error to have asked for one.
    pub fn parse(config: &Value, tells_time: bool) -> Result<Config, CreateError> {
        let bad = |text: String| Err(CreateError(text));
        let raw: Raw = serde_json::from_value(config.clone())
            .map_err(|error| CreateError(error.to_string()))?;
        let (origin, implied) = match (raw.threads, raw.qmp, raw.vmm) {
            (Some(threads), None, None) => {
                let count = u32::try_from(threads.len()).unwrap_or(u32::MAX);
                (Origin::Threads(threads), count)
            }
            (None, Some(qmp), None) => (Origin::Qmp(qmp), CPUS),
            (None, None, Some(vmm)) => (Origin::Vmm(vmm), CPUS),
            _ => {
                return bad("where are the virtual CPUs' threads? give one of: qmp = SOCKET (of QEMU), vmm = SOCKET (control socket \
                     of vbus-vmm), threads = [ID, ...]"
                    .into());
            }
        };
        let cpus = raw.cpus.unwrap_or(implied);
        if cpus == 0 || cpus > abi::CPUS_MAX {
            return bad(format!("\"cpus\" is {cpus}; use 1 to {}", abi::CPUS_MAX));
        }
        if let Origin::Threads(threads) = &origin {
            if cpus != implied {
                return bad(format!(
                    "\"cpus\" is {cpus}, but \"threads\" has {implied}; leave \"cpus\" out"
                ));
            }
            if let Some(tid) = threads.iter().find(|tid| **tid <= 0) {
                return bad(format!("\"threads\": {tid} is no thread id"));
            }
        }
        if !(1..=99).contains(&raw.priority_max) {
            return bad(format!("\"priority-max\" is {}; use 1 to 99", raw.priority_max));
        }
        if let Some(nice) = raw.nice_min.filter(|nice| !(-20..=19).contains(nice)) {
            return bad(format!("\"nice-min\" is {nice}; use -20 to 19"));
        }
        if raw.changes == 0 || raw.changes > CHANGES_MAX {
            return bad(format!("\"changes\" is {}; use 1 to {CHANGES_MAX} a second", raw.changes));
        }
        if !BOOST_MS.contains(&raw.boost_ms) {
            return bad(format!(
                "\"boost-ms\" is {}; use {} to {}",
                raw.boost_ms,
                BOOST_MS.start(),
                BOOST_MS.end()
            ));
        }
        let share = raw.boost_share.unwrap_or(if tells_time { SHARE } else { SHARE_ALL });
        if !(1..=SHARE_ALL).contains(&share) {
            return bad(format!("\"boost-share\" is {share}; use 1 to 100 percent"));
        }
        if share < SHARE_ALL && !tells_time {
            return bad(format!(
                "\"boost-share\" is {share}, but this kernel does not tell how much time a thread has used (/proc/PID/schedstat, \
                 CONFIG_SCHED_INFO): leave it out, or set it to 100, which is no bound"
            ));
        }
        // Two requests must fit, so that an honest driver can renew what it has.
        if u64::from(raw.boost_ms) * u64::from(raw.changes) < 2000 {
            return bad(format!(
                "with \"changes\" = {} a driver cannot renew its class within \"boost-ms\" = {}: make their product at least 2000",
                raw.changes, raw.boost_ms
            ));
        }
        let classes = raw.allow.iter().fold(0, |bits, class| bits | 1 << *class as u32);
        let policy = Policy {
            classes,
            priority_max: raw.priority_max,
            nice_min: raw.nice_min,
            changes: raw.changes,
            boost: Duration::from_millis(raw.boost_ms.into()),
            share,
        };
        Ok(Config { origin, cpus, policy })
    }

    /// The config area.
    pub fn area(&self) -> Vec<u8> {
        let mut area = vec![0; abi::CONFIG_BYTES];
        let mut put = |at: usize, word: u32| area[at..at + 4].copy_from_slice(&word.to_le_bytes());
        let policy = &self.policy;
        put(abi::CONFIG_CPUS, self.cpus);
        put(abi::CONFIG_CLASSES, policy.classes);
        put(abi::CONFIG_PRIORITY_MAX, policy.priority_max.unsigned_abs());
        put(abi::CONFIG_NICE_MIN, policy.nice_min.unwrap_or(abi::NICE_OWN) as u32);
        put(abi::CONFIG_CHANGES, policy.changes);
        put(abi::CONFIG_BOOST_MS, u32::try_from(policy.boost.as_millis()).unwrap_or(u32::MAX));
        put(abi::CONFIG_SHARE, policy.share);
        area
    }

    /// The policy, for people.
    pub fn inspect(&self) -> Value {
        let policy = &self.policy;
        let allow: Vec<_> = (1..)
            .zip(&CLASS_NAMES[1..])
            .filter(|(class, _)| policy.classes & 1 << class != 0)
            .map(|(_, name)| name)
            .collect();
        json!({
            "allow": allow,
            "priority-max": policy.priority_max,
            "nice-min": policy.nice_min,
            "changes": policy.changes,
            "boost-ms": policy.boost.as_millis().try_into().unwrap_or(u64::MAX),
            "boost-share": policy.share,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_to_write() {
        for (config, text) in [
            (json!({}), "give one of: qmp"),
            (json!({ "qmp": "a", "vmm": "b" }), "give one of: qmp"),
            (json!({ "threads": [] }), "\"cpus\" is 0"),
            (json!({ "threads": [1, 0] }), "0 is no thread id"),
            (json!({ "threads": [1], "cpus": 2 }), "leave \"cpus\" out"),
            (json!({ "qmp": "a", "cpus": 257 }), "use 1 to 256"),
            (
                json!({ "qmp": "a", "allow": ["deadline"] }),
                "unknown variant `deadline`, expected one of `normal`",
            ),
            (json!({ "qmp": "a", "priority-max": 0 }), "use 1 to 99"),
            (json!({ "qmp": "a", "priority-max": 100 }), "use 1 to 99"),
            (json!({ "qmp": "a", "nice-min": -21 }), "use -20 to 19"),
            (json!({ "qmp": "a", "changes": 0 }), "use 1 to 100000"),
            (json!({ "qmp": "a", "boost-ms": 9 }), "use 10 to 60000"),
            (json!({ "qmp": "a", "boost-share": 0 }), "use 1 to 100 percent"),
            (json!({ "qmp": "a", "changes": 3 }), "at least 2000"),
            (json!({ "qmp": "a", "nice": 1 }), "unknown field `nice`"),
        ] {
            let error = Config::parse(&config, true).err().unwrap().to_string();
            assert!(error.contains(text), "{config}: {error}");
        }
    }

    #[test]
    fn a_share_that_cannot_be_kept_is_refused_or_not_promised() {
        let share = |config: Value| Config::parse(&config, false).map(|config| config.policy.share);
        assert_eq!(share(json!({ "qmp": "a" })).unwrap(), 100);
        assert_eq!(share(json!({ "qmp": "a", "boost-share": 100 })).unwrap(), 100);
        let error = share(json!({ "qmp": "a", "boost-share": 50 })).unwrap_err().to_string();
        assert!(error.contains("CONFIG_SCHED_INFO"), "{error}");
    }

    #[test]
    fn the_driver_reads_the_policy() {
        let config = json!({ "qmp": "a", "cpus": 4, "allow": ["rr", "idle"], "priority-max": 30, "changes": 200, "boost-ms": 50 });
        let config = Config::parse(&config, true).unwrap();
        let words: Vec<u32> = config
            .area()
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        assert_eq!(words, [4, 1 << 5 | 1 << 3, 30, 0x8000_0000, 200, 50, 90]);
        assert_eq!(config.inspect()["allow"], json!(["idle", "rr"]));
    }
}
