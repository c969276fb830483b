// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The settings of a `sched` device (spec/sched.md, "Settings").

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use vbus_core::CreateError;
use vbus_core::settings::Settings;
use vbus_core::shm::abi::sched as abi;

use crate::policy::Policy;

/// The names of the scheduling classes, by number.
pub const CLASS_NAMES: [&str; 6] = ["none", "normal", "batch", "idle", "fifo", "rr"];

/// The classes that a policy can allow, with their numbers.
const CLASSES: [(&str, u32); 5] = [
    (CLASS_NAMES[abi::CLASS_NORMAL as usize], abi::CLASS_NORMAL),
    (CLASS_NAMES[abi::CLASS_BATCH as usize], abi::CLASS_BATCH),
    (CLASS_NAMES[abi::CLASS_IDLE as usize], abi::CLASS_IDLE),
    (CLASS_NAMES[abi::CLASS_FIFO as usize], abi::CLASS_FIFO),
    (CLASS_NAMES[abi::CLASS_RR as usize], abi::CLASS_RR),
];

/// The defaults of `priority-max`, `changes` and `boost-ms`.
const PRIORITY_MAX: i32 = 10;
const CHANGES: u32 = 1000;
const BOOST_MS: u32 = 500;
/// The default of `boost-share`, in percent ...
const SHARE: u32 = 90;
/// ... and the value that means no limit.
const SHARE_ALL: u32 = 100;
/// The default of `cpus`.
const CPUS: u32 = 64;
const CHANGES_MAX: u32 = 100_000;

/// How the device learns the threads of the virtual CPUs.
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
    /// Checks the settings. `tells_time`: the kernel reports how much processor time a thread has
    /// used. If it does not, there is no limit on the share, and settings that ask for a limit are
    /// an error.
    pub fn parse(config: &Value, tells_time: bool) -> Result<Config, CreateError> {
        let bad = |text: String| Err(CreateError(text));
        let mut settings = Settings::new(config)?;
        let threads = settings.integers("threads", 1..=i32::MAX)?;
        let qmp = settings.text("qmp")?.map(PathBuf::from);
        let vmm = settings.text("vmm")?.map(PathBuf::from);
        let (origin, implied) = match (threads, qmp, vmm) {
            (Some(threads), None, None) => {
                let count = u32::try_from(threads.len()).unwrap_or(u32::MAX);
                if !(1..=abi::CPUS_MAX).contains(&count) {
                    let text = format!("has {count} ids; give 1 to {}", abi::CPUS_MAX);
                    return Err(settings.error("threads", text));
                }
                (Origin::Threads(threads), count)
            }
            (None, Some(qmp), None) => (Origin::Qmp(qmp), CPUS),
            (None, None, Some(vmm)) => (Origin::Vmm(vmm), CPUS),
            _ => {
                return bad(
                    "where are the virtual CPUs' threads? give one of: qmp = SOCKET (of QEMU), \
                     vmm = SOCKET (control socket of vbus-vmm), threads = [ID, ...]"
                        .into(),
                );
            }
        };
        let cpus = settings.integer("cpus", 1..=abi::CPUS_MAX)?.unwrap_or(implied);
        if matches!(origin, Origin::Threads(_)) && cpus != implied {
            let text = format!("is {cpus}, but \"threads\" has {implied}; leave \"cpus\" out");
            return Err(settings.error("cpus", text));
        }
        let allow = settings.choices("allow", &CLASSES)?;
        let allow = allow.unwrap_or_else(|| CLASSES.map(|(_, class)| class).to_vec());
        let priority_max = settings.integer("priority-max", 1..=99)?.unwrap_or(PRIORITY_MAX);
        let nice_min = settings.integer("nice-min", -20..=19)?;
        let changes = settings.integer("changes", 1..=CHANGES_MAX)?.unwrap_or(CHANGES);
        let boost_ms = settings.integer("boost-ms", 10..=60_000)?.unwrap_or(BOOST_MS);
        let share = settings.integer("boost-share", 1..=SHARE_ALL)?;
        let share = share.unwrap_or(if tells_time { SHARE } else { SHARE_ALL });
        if share < SHARE_ALL && !tells_time {
            let text = format!(
                "is {share}, but this kernel does not report how much time a thread has used \
                 (/proc/PID/schedstat, CONFIG_SCHED_INFO): leave it out, or set it to 100"
            );
            return Err(settings.error("boost-share", text));
        }
        // Two requests must fit in a boost, so that an honest driver can renew its class.
        if u64::from(boost_ms) * u64::from(changes) < 2000 {
            let text = format!(
                "is {changes}, too few to renew a class within \"boost-ms\" = {boost_ms} ms; \
                 make their product at least 2000"
            );
            return Err(settings.error("changes", text));
        }
        settings.finish()?;
        let policy = Policy {
            classes: allow.iter().fold(0, |bits, class| bits | 1 << class),
            priority_max,
            nice_min,
            changes,
            boost: Duration::from_millis(boost_ms.into()),
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
            (json!({ "threads": [] }), "\"threads\" has 0 ids; give 1 to 256"),
            (json!({ "threads": [1, 0] }), "\"threads[1]\" is 0; use a number from 1"),
            (json!({ "threads": [1], "cpus": 2 }), "leave \"cpus\" out"),
            (json!({ "qmp": "a", "cpus": 257 }), "\"cpus\" is 257; use a number from 1 to 256"),
            (
                json!({ "qmp": "a", "allow": ["deadline"] }),
                "\"allow[0]\" is \"deadline\"; use \"normal\" or",
            ),
            (json!({ "qmp": "a", "priority-max": 0 }), "use a number from 1 to 99"),
            (json!({ "qmp": "a", "priority-max": 100 }), "use a number from 1 to 99"),
            (json!({ "qmp": "a", "nice-min": -21 }), "use a number from -20 to 19"),
            (json!({ "qmp": "a", "changes": 0 }), "use a number from 1 to 100000"),
            (json!({ "qmp": "a", "boost-ms": 9 }), "use a number from 10 to 60000"),
            (json!({ "qmp": "a", "boost-share": 0 }), "use a number from 1 to 100"),
            (json!({ "qmp": "a", "changes": 3 }), "at least 2000"),
            (json!({ "qmp": "a", "nice": 1 }), "\"nice\" is no setting here"),
        ] {
            let error = Config::parse(&config, true).err().unwrap().to_string();
            assert!(error.contains(text), "{config}: {error}");
        }
    }

    #[test]
    fn a_share_that_the_kernel_cannot_measure_is_refused() {
        let share = |config: Value| Config::parse(&config, false).map(|config| config.policy.share);
        assert_eq!(share(json!({ "qmp": "a" })).unwrap(), 100);
        assert_eq!(share(json!({ "qmp": "a", "boost-share": 100 })).unwrap(), 100);
        let error = share(json!({ "qmp": "a", "boost-share": 50 })).unwrap_err().to_string();
        assert!(error.contains("CONFIG_SCHED_INFO"), "{error}");
    }

    #[test]
    fn the_driver_reads_the_policy() {
        let config = json!({
            "qmp": "a",
            "cpus": 4,
            "allow": ["rr", "idle"],
            "priority-max": 30,
            "changes": 200,
            "boost-ms": 50,
        });
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
