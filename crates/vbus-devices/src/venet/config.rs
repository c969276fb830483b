// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The settings of a venet device.

use std::hash::{BuildHasher, Hasher};
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use vbus_core::CreateError;
use vbus_core::settings::Settings;
use vbus_core::shm::abi::venet::QUEUE_PAIRS_MAX;

use vbus_net::{Mac, Medium, Offloads, is_group, parse_mac};

/// The least MTU, in bytes. IPv4 needs it.
const MTU_MIN: u16 = 68;
/// The largest MTU, in bytes. With an Ethernet header and two tags, a frame of this MTU has 65535
/// bytes.
const MTU_MAX: u16 = 65_513;

/// The highest speed of a link that the settings may give, in Mb/s: a petabit a second.
const SPEED_MAX: u32 = 1_000_000_000;

/// The largest backpressure budget, in milliseconds: an hour. Tests use it.
const BACKPRESSURE_MS_MAX: u64 = 3_600_000;

/// The back end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendKind {
    /// A learning switch of this bus.
    #[default]
    Switch,
    /// A TAP interface of this machine.
    Tap,
    /// A UNIX stream socket with length-prefixed frames.
    Stream,
    /// No network: the device drops all frames.
    Null,
}

impl BackendKind {
    fn name(self) -> &'static str {
        match self {
            BackendKind::Switch => "switch",
            BackendKind::Tap => "tap",
            BackendKind::Stream => "stream",
            BackendKind::Null => "null",
        }
    }
}

const BACKENDS: [(&str, BackendKind); 4] = [
    ("switch", BackendKind::Switch),
    ("tap", BackendKind::Tap),
    ("stream", BackendKind::Stream),
    ("null", BackendKind::Null),
];

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
    /// What it is plugged into.
    pub medium: Medium,
    /// The capture file, and the bytes of each frame that it keeps.
    pub pcap: Option<(PathBuf, u32)>,
    /// The offloads that the device may offer, in both directions.
    pub offloads: Offloads,
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
        let mac = settings.text("mac")?;
        let mac = mac.map_or_else(|| Ok(random_mac()), |text| device_mac(&settings, &text))?;
        let mtu = settings.integer("mtu", MTU_MIN..=MTU_MAX)?.unwrap_or(1500);
        let backend = settings.choice("backend", &BACKENDS)?.unwrap_or_default();
        let stream = backend == BackendKind::Stream;
        let queue_pairs = settings.integer("queue-pairs", 1..=QUEUE_PAIRS_MAX)?.unwrap_or(1);
        if stream && queue_pairs != 1 {
            let text = format!("is {queue_pairs}, but a stream is one socket: leave it out");
            return Err(settings.error("queue-pairs", text));
        }
        let medium = medium(&mut settings, backend, mtu)?;
        let pcap = settings.text("pcap")?.map(PathBuf::from);
        let snap = settings.integer("snap-length", 0..=u32::MAX)?;
        if snap.is_some() && pcap.is_none() {
            return Err(settings.error("snap-length", "needs pcap = FILE"));
        }
        let backpressure =
            settings.integer("backpressure-ms", 0..=BACKPRESSURE_MS_MAX)?.unwrap_or(50);
        // A stream carries plain frames, so the device would have to undo the offloads of each
        // frame. They are on only if the settings ask for them.
        let or_default = |given: Option<bool>| given.unwrap_or(!stream);
        let csum = or_default(settings.flag("csum")?);
        let mut offloads = if csum { Offloads::CSUM } else { Offloads::NONE };
        for (key, offload) in [("tso", Offloads::TSO), ("uso", Offloads::USO)] {
            let given = settings.flag(key)?;
            if given == Some(true) && !csum {
                return Err(settings.error(key, "is true, which needs csum = true"));
            }
            offloads = offloads | if or_default(given) && csum { offload } else { Offloads::NONE };
        }
        let mac_changes = settings.flag("mac-changes")?.unwrap_or(true);
        let speed = settings.integer("speed", 1..=SPEED_MAX)?;
        let duplex = settings.choice("duplex", &DUPLEX)?;
        if duplex.is_some() && speed.is_none() {
            return Err(settings.error("duplex", "needs speed = MBIT_PER_SECOND"));
        }
        settings.finish()?;
        Ok(Config {
            mac,
            mtu,
            queue_pairs,
            medium,
            pcap: pcap.map(|path| (path, snap.unwrap_or(u32::from(u16::MAX)))),
            offloads,
            mac_changes,
            speed: speed.unwrap_or(0),
            duplex: duplex.or(speed.map(|_| Duplex::Full)),
            backpressure: Duration::from_millis(backpressure),
        })
    }
}

/// What the device is plugged into, by the settings of `backend`; those of the others are errors.
fn medium(settings: &mut Settings, backend: BackendKind, mtu: u16) -> Result<Medium, CreateError> {
    let switch = settings.text("switch")?;
    let tap = settings.text("tap")?;
    let connect = settings.text("connect")?.map(PathBuf::from);
    let listen = settings.text("listen")?.map(PathBuf::from);
    let source = settings.integer("source-bytes", 0..=u16::MAX)?;
    for (given, key, kind) in [
        (switch.is_some(), "switch", BackendKind::Switch),
        (tap.is_some(), "tap", BackendKind::Tap),
        (connect.is_some(), "connect", BackendKind::Stream),
        (listen.is_some(), "listen", BackendKind::Stream),
        (source.is_some(), "source-bytes", BackendKind::Null),
    ] {
        if given && kind != backend {
            let (its, this) = (kind.name(), backend.name());
            let text = format!("is a setting of backend {its:?}, not of {this:?}");
            return Err(settings.error(key, text));
        }
    }
    match backend {
        BackendKind::Switch => Ok(Medium::Switch(switch.unwrap_or_else(|| "default".into()))),
        BackendKind::Tap => tap_name(settings, tap).map(Medium::Tap),
        BackendKind::Stream => match (connect, listen) {
            (Some(path), None) => Ok(Medium::Connect(path)),
            (None, Some(path)) => Ok(Medium::Listen(path)),
            _ => Err(settings.error(
                "backend",
                "is \"stream\", which needs either connect = PATH or listen = PATH",
            )),
        },
        BackendKind::Null => source_bytes(settings, source.unwrap_or(0), mtu).map(Medium::Null),
    }
}

fn tap_name(settings: &Settings, name: Option<String>) -> Result<String, CreateError> {
    let name = name.unwrap_or_else(|| "vbus%d".into());
    // IFNAMSIZ is 16 bytes with the final zero.
    let plain = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b':';
    if name.is_empty() || name.len() > 15 || name == "." || name == ".." || !name.bytes().all(plain)
    {
        let text = format!(
            "is {name:?}, not the name of an interface; use 1 to 15 letters, digits and signs"
        );
        return Err(settings.error("tap", text));
    }
    Ok(name)
}

fn source_bytes(settings: &Settings, bytes: u16, mtu: u16) -> Result<u16, CreateError> {
    let most = u32::from(mtu) + 14;
    if bytes != 0 && (bytes < 14 || u32::from(bytes) > most) {
        let text = format!("is {bytes}; use 0 (no frames), or a number from 14 to {most}");
        return Err(settings.error("source-bytes", text));
    }
    Ok(bytes)
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
    use vbus_net::show_mac;

    #[test]
    fn defaults() {
        let config = Config::parse(&Value::Null).unwrap();
        assert_eq!(
            (config.mtu, config.queue_pairs, config.medium),
            (1500, 1, Medium::Switch("default".into()))
        );
        assert_eq!((config.mac[0], config.offloads), (2, Offloads::ALL));
        let stream = Config::parse(&json!({"backend": "stream", "connect": "/x"})).unwrap();
        assert_eq!(
            (stream.medium, stream.offloads),
            (Medium::Connect("/x".into()), Offloads::NONE)
        );
        let config = Config::parse(&json!({"mac": "02:00:00:00:00:0A", "uso": false})).unwrap();
        assert_eq!(
            (show_mac(config.mac), config.offloads),
            ("02:00:00:00:00:0a".into(), Offloads::CSUM | Offloads::TSO)
        );
        assert_eq!(Config::parse(&json!({"csum": false})).unwrap().offloads, Offloads::NONE);
        assert_eq!((config.mac_changes, config.speed, config.duplex), (true, 0, None));
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
            (json!({"backend": "bridge"}), "\"backend\" is \"bridge\"; use \"switch\" or \"tap\""),
            (json!({"mac": "02:00:00:00:00"}), "like 02:00:00:00:00:01"),
            (json!({"mac": "01:00:00:00:00:01"}), "multicast"),
            (json!({"mac": "0x:00:00:00:00:01"}), "not a MAC address"),
            (json!({"tap": "tap0"}), "\"tap\" is a setting of backend \"tap\", not of \"switch\""),
            (json!({"backend": "tap", "tap": "a/b"}), "not the name of an interface"),
            (json!({"backend": "stream"}), "either connect = PATH or listen = PATH"),
            (
                json!({"backend": "stream", "connect": "/x", "queue-pairs": 2}),
                "a stream is one socket",
            ),
            (json!({"backend": "null", "source-bytes": 13}), "\"source-bytes\" is 13"),
            (json!({"tso": true, "csum": false}), "\"tso\" is true, which needs csum = true"),
            (json!({"snap-length": 64}), "needs pcap"),
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
