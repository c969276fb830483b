// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The settings that every front shares: the back end, its offloads, and a capture file.

use std::path::PathBuf;
use std::sync::Arc;

use vbus_core::CreateError;
use vbus_core::settings::Settings;
use vbus_tap::{Mac, Offloads};

use crate::backend::Backend;
use crate::capture::{Captured, PCAP};
use crate::limited::Limited;
use crate::limits::Limits;
use crate::link::Link;
use crate::medium::Medium;
use crate::opener::{HandedOver, Opener};
use crate::switch::Switches;

/// The checked settings of a back end. A front reads its own settings beside them.
///
/// ```
/// use serde_json::json;
/// use vbus_core::settings::Settings;
/// use vbus_net::{BackendConfig, Medium};
///
/// let value = json!({ "mtu": 9000, "backend": "switch", "switch": "lab" });
/// let mut settings = Settings::new(&value)?;
/// let mtu = settings.integer("mtu", 68..=9000)?.unwrap_or(1500); // the front's
/// let backend = BackendConfig::parse(&mut settings, 1, mtu)?;
/// settings.finish()?;
/// assert_eq!(backend.medium, Medium::Switch("lab".into()));
/// # Ok::<(), vbus_core::CreateError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackendConfig {
    /// What the device is plugged into.
    pub medium: Medium,
    /// The offloads that the device may offer, in both directions, if the back end has them.
    pub offloads: Offloads,
    /// The limits of both directions.
    pub limits: Limits,
    /// The capture file, and the bytes of each frame that it keeps.
    pub capture: Option<(PathBuf, u32)>,
}

impl BackendConfig {
    /// Reads `backend` and the settings of that back end; `csum`, `tso` and `uso`; `rate`,
    /// `tx-rate`, `rx-rate` and `burst`; `pcap` and `snap-length`. `queues` is the front's setting
    /// `queue-pairs`, and `mtu` its MTU.
    ///
    /// # Errors
    /// A value is wrong, or does not go with another one.
    pub fn parse(
        settings: &mut Settings,
        queues: u16,
        mtu: u16,
    ) -> Result<BackendConfig, CreateError> {
        let medium = Medium::parse(settings, mtu)?;
        if medium.is_stream() && queues != 1 {
            let text = format!("is {queues}, but a stream is one socket: leave it out");
            return Err(settings.error("queue-pairs", text));
        }
        // A stream carries plain frames, so the device would have to undo the offloads of each
        // frame. They are on only if the settings ask for them.
        let offloads = offloads(settings, !medium.is_stream())?;
        let limits = Limits::parse(settings)?;
        let path = settings.text("pcap")?.map(PathBuf::from);
        let snap = settings.integer("snap-length", 0..=u32::MAX)?;
        if snap.is_some() && path.is_none() {
            return Err(settings.error("snap-length", "needs pcap = FILE"));
        }
        let capture = path.map(|path| (path, snap.unwrap_or(u32::from(u16::MAX))));
        Ok(BackendConfig { medium, offloads, limits, capture })
    }

    /// Makes the back end for a device with this address. `shape` is the number of queue pairs and
    /// the MTU. `opener` opens what the back end needs, and was not `handed` over. The back end
    /// sets the carrier of `link`. The error's text begins with the setting at fault.
    pub fn open(
        &self,
        switches: &Switches,
        opener: &Arc<dyn Opener>,
        mac: Mac,
        shape: (u16, u16),
        link: Arc<Link>,
        mut handed: HandedOver,
    ) -> Result<Box<dyn Backend>, CreateError> {
        let backend = self.medium.open_with(switches, opener, shape, link, &mut handed)?;
        backend.reserve(mac);
        self.decorate(opener, backend, handed)
    }

    /// Makes the back end for an uplink: with one queue, and without an address.
    pub(crate) fn open_outside(
        &self,
        switches: &Switches,
        opener: &Arc<dyn Opener>,
        mtu: u16,
        link: Arc<Link>,
        mut handed: HandedOver,
    ) -> Result<Box<dyn Backend>, CreateError> {
        let backend = self.medium.open_with(switches, opener, (1, mtu), link, &mut handed)?;
        self.decorate(opener, backend, handed)
    }

    fn decorate(
        &self,
        opener: &Arc<dyn Opener>,
        mut backend: Box<dyn Backend>,
        mut handed: HandedOver,
    ) -> Result<Box<dyn Backend>, CreateError> {
        if self.limits != Limits::default() {
            backend = Box::new(Limited::new(backend, self.limits.clone()));
        }
        Ok(match &self.capture {
            Some((path, snap)) => {
                let file = handed.take(PCAP);
                Box::new(Captured::with(opener, backend, path, *snap, file)?)
            }
            None => backend,
        })
    }
}

/// Reads `csum`, `tso` and `uso`. `default` is the value of a key that is left out.
fn offloads(settings: &mut Settings, default: bool) -> Result<Offloads, CreateError> {
    let csum = settings.flag("csum")?.unwrap_or(default);
    let mut offloads = if csum { Offloads::CSUM } else { Offloads::NONE };
    for (key, offload) in [("tso", Offloads::TSO), ("uso", Offloads::USO)] {
        let given = settings.flag(key)?;
        if given == Some(true) && !csum {
            return Err(settings.error(key, "is true, which needs csum = true"));
        }
        if csum && given.unwrap_or(default) {
            offloads = offloads | offload;
        }
    }
    Ok(offloads)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parse(value: &Value) -> Result<BackendConfig, CreateError> {
        let mut settings = Settings::new(value)?;
        let queues = settings.integer("queue-pairs", 1..=16)?.unwrap_or(1);
        let config = BackendConfig::parse(&mut settings, queues, 1500)?;
        settings.finish()?;
        Ok(config)
    }

    #[test]
    fn defaults() {
        let config = parse(&Value::Null).unwrap();
        assert_eq!((config.medium, config.capture), (Medium::Switch("default".into()), None));
        assert_eq!(config.offloads, Offloads::ALL);
        let stream = parse(&json!({"backend": "stream", "connect": "/x"})).unwrap();
        assert_eq!(
            (stream.medium, stream.offloads),
            (Medium::Connect("/x".into()), Offloads::NONE)
        );
        let asked = parse(&json!({"backend": "stream", "listen": "/x", "csum": true, "uso": true}));
        assert_eq!(asked.unwrap().offloads, Offloads::CSUM | Offloads::USO);
        let no_uso = parse(&json!({"uso": false})).unwrap();
        assert_eq!(no_uso.offloads, Offloads::CSUM | Offloads::TSO);
        assert_eq!(parse(&json!({"csum": false})).unwrap().offloads, Offloads::NONE);
        let limits = parse(&json!({"rate": "1G", "rx-rate": 8000, "burst": "64k"})).unwrap().limits;
        let (tx, rx, burst) = (Some(1_000_000_000), Some(8000), Some(64_000));
        assert_eq!(limits, Limits { tx_rate: tx, rx_rate: rx, burst });
        assert_eq!(parse(&Value::Null).unwrap().limits, Limits::default());
        let capture = parse(&json!({"pcap": "f"})).unwrap().capture;
        assert_eq!(capture, Some(("f".into(), 65535)));
        assert_eq!(parse(&json!({"backend": "tap"})).unwrap().medium, Medium::Tap("vbus%d".into()));
    }

    #[test]
    fn errors_say_what_to_write() {
        for (config, text) in [
            (json!({"backend": "bridge"}), "\"backend\" is \"bridge\"; use \"switch\" or \"tap\""),
            (json!({"tap": "tap0"}), "\"tap\" is a setting of backend \"tap\", not of \"switch\""),
            (
                json!({"backend": "tap", "listen": 7}),
                "\"listen\" is a setting of backend \"stream\"",
            ),
            (json!({"backend": "tap", "tap": "a/b"}), "not the name of an interface"),
            (json!({"backend": "stream"}), "either connect = PATH or listen = PATH"),
            (
                json!({"backend": "stream", "connect": "/x", "queue-pairs": 2}),
                "a stream is one socket",
            ),
            (json!({"backend": "null", "source-bytes": 13}), "\"source-bytes\" is 13"),
            (json!({"swich": "lab"}), "did you mean \"switch\"?"),
            (json!({"tso": true, "csum": false}), "\"tso\" is true, which needs csum = true"),
            (json!({"snap-length": 64}), "needs pcap"),
            (json!({"rate": 100}), "\"rate\" is 100; use a number from 8000 to 1000000000000"),
            (json!({"burst": 1500}), "\"burst\" needs rate = BITS_PER_SECOND"),
        ] {
            let error = parse(&config).unwrap_err().to_string();
            assert!(error.contains(text), "{config}: {error}");
        }
    }
}
