// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The widest change that a set of devices may make.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_core::CreateError;
use vbus_core::shm::abi::sched as abi;

use crate::config::Config;
use crate::policy::{Policy, Setting};

/// The classes and priorities that threads may get. A process that changes threads for another one
/// checks each change against it.
///
/// ```
/// use serde_json::json;
/// use vbus_sched::Limits;
///
/// let mut limits = Limits::NONE;
/// let fifo = Limits::of_settings(&json!({ "qmp": "/q", "allow": ["fifo"], "priority-max": 5 }))?;
/// assert!(!limits.include(&fifo));
/// limits.widen(&fifo);
/// assert!(limits.include(&fifo));
/// # Ok::<(), vbus_core::CreateError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// The classes, as bits.
    classes: u32,
    /// The highest real-time priority; 0: none.
    priority_max: i32,
    /// The lowest nice value. `None`: that of the thread itself.
    nice_min: Option<i32>,
}

impl Limits {
    /// No change at all.
    pub const NONE: Limits = Limits { classes: 0, priority_max: 0, nice_min: None };

    /// All classes, real-time priorities up to `priority_max`, and no nice value below the thread's
    /// own.
    pub fn up_to(priority_max: i32) -> Limits {
        let bits = (abi::CLASS_NORMAL..=abi::CLASS_RR).fold(0, |bits, class| bits | 1 << class);
        Limits { classes: bits, priority_max, nice_min: None }
    }

    /// What a device with these settings may do.
    ///
    /// # Errors
    /// The settings are wrong.
    pub fn of_settings(settings: &Value) -> Result<Limits, CreateError> {
        Ok(Limits::of(&Config::parse(settings, true)?.policy))
    }

    /// What a device with this policy may do.
    pub(crate) fn of(policy: &Policy) -> Limits {
        let real_time = policy.classes & (1 << abi::CLASS_FIFO | 1 << abi::CLASS_RR) != 0;
        Limits {
            classes: policy.classes,
            priority_max: if real_time { policy.priority_max } else { 0 },
            nice_min: policy.nice_min,
        }
    }

    /// Whether everything that `other` allows is allowed.
    pub fn include(&self, other: &Limits) -> bool {
        let nice = match (self.nice_min, other.nice_min) {
            (_, None) => true,
            (None, Some(_)) => false,
            (Some(mine), Some(theirs)) => mine <= theirs,
        };
        other.classes & !self.classes == 0 && other.priority_max <= self.priority_max && nice
    }

    /// Allows everything that `other` allows, too.
    pub fn widen(&mut self, other: &Limits) {
        self.classes |= other.classes;
        self.priority_max = self.priority_max.max(other.priority_max);
        self.nice_min = match (self.nice_min, other.nice_min) {
            (Some(mine), Some(theirs)) => Some(mine.min(theirs)),
            (mine, theirs) => mine.or(theirs),
        };
    }

    /// Whether a thread whose own nice value is `own_nice` may get `setting`. A priority outside of
    /// its class's range is never allowed: the setting may come from a process that was taken over.
    pub fn allow(&self, setting: Setting, own_nice: i32) -> bool {
        let value = match setting.class {
            abi::CLASS_NORMAL | abi::CLASS_BATCH => {
                let lowest = self.nice_min.unwrap_or(own_nice).min(own_nice);
                (lowest.max(-20)..=19).contains(&setting.priority)
            }
            abi::CLASS_FIFO | abi::CLASS_RR => (1..=self.priority_max).contains(&setting.priority),
            abi::CLASS_IDLE => setting.priority == 0,
            _ => false,
        };
        value && self.classes & 1 << setting.class != 0
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn limits_include_what_they_were_widened_by() {
        let of = |settings: Value| Limits::of_settings(&settings).unwrap();
        let fifo = of(json!({ "qmp": "/q", "allow": ["fifo"], "priority-max": 5 }));
        let nice = of(json!({ "qmp": "/q", "allow": ["normal"], "nice-min": -3 }));
        assert!(Limits::up_to(5).include(&fifo) && !Limits::up_to(4).include(&fifo));
        assert!(!Limits::up_to(99).include(&nice), "a nice value below the thread's own");
        let mut both = Limits::NONE;
        both.widen(&fifo);
        both.widen(&nice);
        assert!(both.include(&fifo) && both.include(&nice));
        assert!(!both.include(&Limits::up_to(5)), "it has other classes");
        assert_eq!(of(json!({ "qmp": "/q", "allow": ["idle"] })).priority_max, 0);
    }

    #[test]
    fn a_setting_is_checked_by_its_class() {
        let mut limits = Limits::up_to(10);
        let set = |class, priority| Setting { class, priority };
        for (setting, allowed) in [
            (set(abi::CLASS_FIFO, 10), true),
            (set(abi::CLASS_RR, 11), false),
            (set(abi::CLASS_FIFO, 0), false),
            (set(abi::CLASS_FIFO, -10), false),
            (set(abi::CLASS_RR, i32::MIN), false),
            (set(abi::CLASS_NORMAL, 20), false),
            (set(abi::CLASS_BATCH, i32::MIN), false),
            (set(abi::CLASS_IDLE, 1), false),
            (set(abi::CLASS_NORMAL, 0), true),
            (set(abi::CLASS_NORMAL, -1), false),
            (set(abi::CLASS_BATCH, 5), true),
            (set(abi::CLASS_IDLE, 0), true),
            (set(abi::CLASS_NONE, 0), false),
            (set(31, 0), false),
        ] {
            assert_eq!(limits.allow(setting, 0), allowed, "{setting:?}");
            assert!(!Limits::NONE.allow(setting, 0));
        }
        limits.nice_min = Some(-5);
        assert!(limits.allow(set(abi::CLASS_NORMAL, -5), 0));
        assert!(!limits.allow(set(abi::CLASS_NORMAL, -6), 0));
        assert!(limits.allow(set(abi::CLASS_NORMAL, -6), -6), "the thread's own");
    }
}
