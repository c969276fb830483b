//! The settings of a venet device.

use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use vbus_core::CreateError;
use vbus_core::shm::abi::venet::{F_CSUM, F_TSO, F_USO, QUEUE_PAIRS_MAX};

use vbus_net::{Mac, Medium, is_group, parse_mac};

/// The least MTU: what IPv4 needs.
const MTU_MIN: u16 = 68;
/// The largest MTU. With an Ethernet header and two tags such a frame still has 65535 bytes.
const MTU_MAX: u16 = 65_513;

/// The longest that senders may be made to wait: an hour, which is for tests.
const BACKPRESSURE_MS_MAX: u64 = 3_600_000;

/// What the device is plugged into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendKind {
    /// The learning switch of this bus.
    #[default]
    Switch,
    /// A TAP interface of this machine.
    Tap,
    /// A UNIX socket with length-prefixed frames.
    Stream,
    /// Nothing: frames vanish.
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

/// As written, before it is checked.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Raw {
    mac: Option<String>,
    mtu: Option<u16>,
    queue_pairs: Option<u16>,
    #[serde(default)]
    backend: BackendKind,
    switch: Option<String>,
    tap: Option<String>,
    connect: Option<PathBuf>,
    listen: Option<PathBuf>,
    source_bytes: Option<u16>,
    pcap: Option<PathBuf>,
    snap_length: Option<u32>,
    csum: Option<bool>,
    tso: Option<bool>,
    uso: Option<bool>,
    backpressure_ms: Option<u64>,
}

/// The settings, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// The device's address.
    pub mac: Mac,
    /// The largest frame without its Ethernet header.
    pub mtu: u16,
    /// The most queue pairs.
    pub queue_pairs: u16,
    /// What it is plugged into.
    pub medium: Medium,
    /// The file in which frames are recorded, and how many bytes of each.
    pub pcap: Option<(PathBuf, u32)>,
    /// Features that may be offered.
    pub features: u64,
    /// How long senders may be made to wait for the driver's buffers.
    pub backpressure: Duration,
}

fn bad(text: impl fmt::Display) -> CreateError {
    CreateError(text.to_string())
}

impl Config {
    /// Checks the settings of a device.
    pub fn parse(value: &Value) -> Result<Config, CreateError> {
        let value =
            if value.is_null() { Value::Object(serde_json::Map::new()) } else { value.clone() };
        let raw: Raw = serde_json::from_value(value).map_err(bad)?;
        let mtu = raw.mtu.unwrap_or(1500);
        if !(MTU_MIN..=MTU_MAX).contains(&mtu) {
            return Err(bad(format!("mtu is {mtu}; use {MTU_MIN} to {MTU_MAX}")));
        }
        let queue_pairs = raw.queue_pairs.unwrap_or(1);
        if !(1..=QUEUE_PAIRS_MAX).contains(&queue_pairs) {
            return Err(bad(format!("queue-pairs is {queue_pairs}; use 1 to {QUEUE_PAIRS_MAX}")));
        }
        let stream = matches!(raw.backend, BackendKind::Stream);
        if stream && queue_pairs != 1 {
            return Err(bad(
                "a stream is one socket, and has one queue pair: leave queue-pairs out",
            ));
        }
        let belongs = |given: bool, key: &str, kind: BackendKind| {
            if given && kind != raw.backend {
                return Err(bad(format!(
                    "{key} is a setting of backend {:?}, not of {:?}",
                    kind.name(),
                    raw.backend.name()
                )));
            }
            Ok(())
        };
        belongs(raw.switch.is_some(), "switch", BackendKind::Switch)?;
        belongs(raw.tap.is_some(), "tap", BackendKind::Tap)?;
        belongs(raw.connect.is_some(), "connect", BackendKind::Stream)?;
        belongs(raw.listen.is_some(), "listen", BackendKind::Stream)?;
        belongs(raw.source_bytes.is_some(), "source-bytes", BackendKind::Null)?;
        let medium = match raw.backend {
            BackendKind::Switch => Medium::Switch(raw.switch.unwrap_or_else(|| "default".into())),
            BackendKind::Tap => Medium::Tap(tap_name(raw.tap)?),
            BackendKind::Stream => match (raw.connect, raw.listen) {
                (Some(path), None) => Medium::Connect(path),
                (None, Some(path)) => Medium::Listen(path),
                _ => {
                    return Err(bad(
                        "backend \"stream\" needs either connect = PATH or listen = PATH",
                    ));
                }
            },
            BackendKind::Null => Medium::Null(source(raw.source_bytes.unwrap_or(0), mtu)?),
        };
        if raw.snap_length.is_some() && raw.pcap.is_none() {
            return Err(bad("snap-length needs pcap = FILE"));
        }
        let backpressure = raw.backpressure_ms.unwrap_or(50);
        if backpressure > BACKPRESSURE_MS_MAX {
            return Err(bad(format!(
                "backpressure-ms is {backpressure}; use 0 to {BACKPRESSURE_MS_MAX}"
            )));
        }
        let snap = raw.snap_length.unwrap_or(u32::from(u16::MAX));
        // A stream carries plain frames: the device would have to undo the offloads of each. They
        // are on only if the settings ask for them.
        let or_default = |given: Option<bool>| given.unwrap_or(!stream);
        let csum = or_default(raw.csum);
        let mut features = 0;
        for (feature, on, given) in [
            (F_CSUM, csum, None),
            (F_TSO, or_default(raw.tso), raw.tso),
            (F_USO, or_default(raw.uso), raw.uso),
        ] {
            if given == Some(true) && !csum {
                return Err(bad("segmentation needs checksums: tso and uso need csum = true"));
            }
            features |= if on && csum { feature } else { 0 };
        }
        Ok(Config {
            mac: raw.mac.as_deref().map_or_else(|| Ok(random_mac()), device_mac)?,
            mtu,
            queue_pairs,
            medium,
            pcap: raw.pcap.map(|path| (path, snap)),
            features,
            backpressure: Duration::from_millis(backpressure),
        })
    }
}

fn tap_name(name: Option<String>) -> Result<String, CreateError> {
    let name = name.unwrap_or_else(|| "vbus%d".into());
    // IFNAMSIZ, with its final zero.
    let plain = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b':';
    if name.is_empty() || name.len() > 15 || name == "." || name == ".." || !name.bytes().all(plain)
    {
        return Err(bad(format!(
            "tap = {name:?} is no name of an interface: 1 to 15 letters, digits and signs"
        )));
    }
    Ok(name)
}

fn source(bytes: u16, mtu: u16) -> Result<u16, CreateError> {
    let most = u32::from(mtu) + 14;
    if bytes != 0 && (bytes < 14 || u32::from(bytes) > most) {
        return Err(bad(format!("source-bytes is {bytes}; use 0 (no frames), or 14 to {most}")));
    }
    Ok(bytes)
}

fn device_mac(text: &str) -> Result<Mac, CreateError> {
    let mac = parse_mac(text).filter(|mac| *mac != Mac::default()).ok_or_else(|| {
        bad(format!("mac = {text:?} is no address; write it like 02:00:00:00:00:01"))
    })?;
    if is_group(mac) {
        return Err(bad(format!(
            "mac = {text:?} is a multicast address: its first byte must be even"
        )));
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
        assert_eq!((config.mac[0], config.features), (2, F_CSUM | F_TSO | F_USO));
        let stream = Config::parse(&json!({"backend": "stream", "connect": "/x"})).unwrap();
        assert_eq!((stream.medium, stream.features), (Medium::Connect("/x".into()), 0));
        let config = Config::parse(&json!({"mac": "02:00:00:00:00:0A", "uso": false})).unwrap();
        assert_eq!(
            (show_mac(config.mac), config.features),
            ("02:00:00:00:00:0a".into(), F_CSUM | F_TSO)
        );
        assert_eq!(Config::parse(&json!({"csum": false})).unwrap().features, 0);
    }

    #[test]
    fn errors_say_what_to_write() {
        for (config, text) in [
            (json!({"mtuu": 1500}), "unknown field `mtuu`"),
            (json!({"mtu": 67}), "mtu is 67; use 68 to 65513"),
            (json!({"mtu": 70000}), "70000"),
            (json!({"queue-pairs": 17}), "use 1 to 16"),
            (json!({"backend": "bridge"}), "unknown variant `bridge`, expected one of `switch`"),
            (json!({"mac": "02:00:00:00:00"}), "like 02:00:00:00:00:01"),
            (json!({"mac": "01:00:00:00:00:01"}), "multicast"),
            (json!({"mac": "0x:00:00:00:00:01"}), "no address"),
            (json!({"tap": "tap0"}), "tap is a setting of backend \"tap\", not of \"switch\""),
            (json!({"backend": "tap", "tap": "a/b"}), "no name of an interface"),
            (json!({"backend": "stream"}), "either connect = PATH or listen = PATH"),
            (json!({"backend": "stream", "connect": "/x", "queue-pairs": 2}), "one queue pair"),
            (json!({"backend": "null", "source-bytes": 13}), "source-bytes is 13"),
            (json!({"tso": true, "csum": false}), "need csum"),
            (json!({"snap-length": 64}), "needs pcap"),
            (json!({"backpressure-ms": u64::MAX}), "use 0 to 3600000"),
            (json!([]), "invalid"),
        ] {
            let error = Config::parse(&config).unwrap_err().to_string();
            assert!(error.contains(text), "{config}: {error}");
        }
    }
}
