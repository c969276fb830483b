// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The settings of an Ethernet device.

use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use serde_json::Value;
use vbus_core::CreateError;
use vbus_core::settings::Settings;
use vbus_core::shm::abi::venet::QUEUE_PAIRS_MAX;

use vbus_tap::{Mac, is_group, parse_mac};

use crate::config::BackendConfig;

/// The MTU that a device may have, in bytes. IPv4 needs the least. With an Ethernet header and two
/// tags, a frame of the largest has 65535 bytes.
pub const MTU_RANGE: std::ops::RangeInclusive<u16> = 68..=65_513;

/// The highest speed of a link that the settings may give, in Mb/s: a petabit a second.
const SPEED_MAX: u32 = 1_000_000_000;

/// The largest backpressure budget, in milliseconds: an hour. Tests use it.
const BACKPRESSURE_MS_MAX: u64 = 3_600_000;

/// The duplex mode that the device reports to its driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duplex {
    /// Full duplex: both ends can send at the same time.
    Full,
    /// Half duplex: one end sends at a time.
    Half,
}

const DUPLEX: [(&str, Duplex); 2] = [("full", Duplex::Full), ("half", Duplex::Half)];

/// The settings, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// The device's MAC address.
    pub mac: Mac,
    /// The MTU: bytes of the largest frame without its Ethernet header and tags.
    pub mtu: u16,
    /// The most queue pairs.
    pub queue_pairs: u16,
    /// The settings of the back end.
    pub backend: BackendConfig,
    /// Whether the driver may change the device's address.
    pub mac_changes: bool,
    /// The link speed that the device reports to the driver, in Mb/s; 0: unknown.
    pub speed: u32,
    /// The duplex mode that the device reports to the driver; `None`: unknown.
    pub duplex: Option<Duplex>,
    /// The backpressure budget: how long senders may wait for the driver's buffers.
    pub backpressure: Duration,
}

impl Config {
    /// Checks the settings of a device.
    pub fn parse(value: &Value) -> Result<Config, CreateError> {
        let mut settings = Settings::new(value)?;
        let config = Config::take(&mut settings)?;
        settings.finish()?;
        Ok(config)
    }

    /// Takes the settings of an Ethernet device out of `settings`. A front that has further
    /// settings takes those itself, and then ends with [`Settings::finish`].
    ///
    /// # Errors
    /// The setting at fault, and what to write.
    pub fn take(settings: &mut Settings) -> Result<Config, CreateError> {
        let mac = settings.text("mac")?;
        let mac = mac.map_or_else(|| Ok(random_mac()), |text| device_mac(settings, &text))?;
        let mtu = settings.integer("mtu", MTU_RANGE)?.unwrap_or(1500);
        let queue_pairs = settings.integer("queue-pairs", 1..=QUEUE_PAIRS_MAX)?.unwrap_or(1);
        let backend = BackendConfig::parse(settings, queue_pairs, mtu)?;
        let backpressure =
            settings.integer("backpressure-ms", 0..=BACKPRESSURE_MS_MAX)?.unwrap_or(50);
        let mac_changes = settings.flag("mac-changes")?.unwrap_or(true);
        let speed = settings.integer("speed", 1..=SPEED_MAX)?;
        let duplex = settings.choice("duplex", &DUPLEX)?;
        if duplex.is_some() && speed.is_none() {
            return Err(settings.error("duplex", "needs speed = MBIT_PER_SECOND"));
        }
        Ok(Config {
            mac,
            mtu,
            queue_pairs,
            backend,
            mac_changes,
            speed: speed.unwrap_or(0),
            duplex: duplex.or(speed.map(|_| Duplex::Full)),
            backpressure: Duration::from_millis(backpressure),
        })
    }
}

fn device_mac(settings: &Settings, text: &str) -> Result<Mac, CreateError> {
    let mac = parse_mac(text).filter(|mac| *mac != Mac::default()).ok_or_else(|| {
        settings.error(
            "mac",
            format!("is {text:?}, not a MAC address; write it like 02:00:00:00:00:01"),
        )
    })?;
    if is_group(mac) {
        let text = format!("is {text:?}, a multicast address: make its first byte even");
        return Err(settings.error("mac", text));
    }
    Ok(mac)
}

/// A random, locally administered address.
fn random_mac() -> Mac {
    let random = std::hash::RandomState::new().build_hasher().finish().to_le_bytes();
    [0x02, random[0], random[1], random[2], random[3], random[4]]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use vbus_tap::show_mac;

    #[test]
    fn defaults() {
        let config = Config::parse(&Value::Null).unwrap();
        assert_eq!((config.mtu, config.queue_pairs, config.mac[0]), (1500, 1, 2));
        assert_eq!((config.mac_changes, config.speed, config.duplex), (true, 0, None));
        let config = Config::parse(&json!({"mac": "02:00:00:00:00:0A"})).unwrap();
        assert_eq!(show_mac(config.mac), "02:00:00:00:00:0a");
        let config = Config::parse(&json!({"speed": 10000, "mac-changes": false})).unwrap();
        assert_eq!(
            (config.mac_changes, config.speed, config.duplex),
            (false, 10_000, Some(Duplex::Full))
        );
        let config = Config::parse(&json!({"speed": 10, "duplex": "half"})).unwrap();
        assert_eq!(config.duplex, Some(Duplex::Half));
    }

    #[test]
    fn errors_say_what_to_write() {
        for (config, text) in [
            (json!({"mtuu": 1500}), "\"mtuu\" is no setting here; did you mean \"mtu\"?"),
            (json!({"mtu": 67}), "\"mtu\" is 67; use a number from 68 to 65513"),
            (json!({"mtu": 99999}), "\"mtu\" is 99999; use a number from 68 to 65513"),
            (json!({"queue-pairs": 17}), "use a number from 1 to 16"),
            (json!({"mac": "02:00:00:00:00"}), "like 02:00:00:00:00:01"),
            (json!({"mac": "01:00:00:00:00:01"}), "multicast"),
            (json!({"mac": "0x:00:00:00:00:01"}), "not a MAC address"),
            (json!({"tap": "tap0"}), "\"tap\" is a setting of backend \"tap\", not of \"switch\""),
            (
                json!({"backend": "stream", "connect": "/x", "queue-pairs": 2}),
                "a stream is one socket",
            ),
            (json!({"backpressure-ms": u64::MAX}), "use a number from 0 to 3600000"),
            (json!({"speed": 0}), "use a number from 1 to 1000000000"),
            (json!({"duplex": "full"}), "needs speed"),
            (json!({"speed": 10, "duplex": "both"}), "use \"full\" or \"half\""),
            (json!([]), "use a table"),
        ] {
            let error = Config::parse(&config).unwrap_err().to_string();
            assert!(error.contains(text), "{config}: {error}");
        }
    }
}
