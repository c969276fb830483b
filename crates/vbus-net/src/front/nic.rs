// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An Ethernet device as its settings make it, whatever its front is.

use std::sync::Arc;

use serde_json::{Value, json};
use vbus_core::{CreateError, settings};
use vbus_tap::show_mac;

use super::config::Config;
use super::counters::PairCounters;
use crate::backend::Backend;
use crate::limits::Limits;
use crate::link::Link;
use crate::opener::Opener;
use crate::switch::Switches;

/// A device: its settings, its link, its back end and its counters.
pub struct Nic {
    /// The name on the bus.
    pub name: String,
    /// The settings.
    pub config: Config,
    /// The link.
    pub link: Arc<Link>,
    /// The back end.
    pub backend: Box<dyn Backend>,
    /// The counters of each queue pair that the device can have.
    pub pairs: Arc<[Arc<PairCounters>]>,
}

impl Nic {
    /// Makes the device `name` with its back end: on one of `switches`, or with what `opener`
    /// opens.
    ///
    /// # Errors
    /// The back end cannot be made. The text begins with the setting at fault.
    pub fn create(
        name: &str,
        config: Config,
        switches: &Switches,
        opener: &Arc<dyn Opener>,
    ) -> Result<Nic, CreateError> {
        let link = Arc::new(Link::default());
        let (queues, mtu) = (config.queue_pairs, config.mtu);
        let backend =
            config.backend.open(switches, opener, config.mac, (queues, mtu), link.clone())?;
        let pairs = (0..queues).map(|_| Arc::default()).collect();
        Ok(Nic { name: name.into(), config, link, backend, pairs })
    }

    /// Serves requests of control clients: `{"op": "link", "up": BOOL}` switches the link off or on
    /// again, and `{"op": "announce"}` asks the driver to announce its addresses.
    ///
    /// # Errors
    /// What the device takes, for the person who asked.
    pub fn control(&self, request: &Value) -> Result<Value, String> {
        match (request["op"].as_str(), request["up"].as_bool()) {
            (Some("link"), Some(up)) => self.link.set_off(!up),
            (Some("link"), None) => return Err("link needs \"up\": true or false".into()),
            (Some("announce"), _) => self.link.announce(),
            _ => {
                return Err(
                    "requests of an Ethernet device: {\"op\": \"link\", \"up\": true or false}, \
                     {\"op\": \"announce\"}"
                        .into(),
                );
            }
        }
        Ok(json!({ "link": self.link.is_up(), "announces": self.link.announces() }))
    }

    /// Settings and counters, as a JSON object. [`METRICS`](super::METRICS) says what the numbers
    /// mean.
    pub fn inspect(&self) -> Value {
        let mut backend = self.backend.inspect();
        let pcap = backend.as_object_mut().and_then(|backend| backend.remove("pcap"));
        json!({
            "mac": show_mac(self.config.mac),
            "mtu": self.config.mtu,
            "queue-pairs": self.config.queue_pairs,
            "link": self.link.is_up(),
            "link-off": self.link.is_off(),
            "backend": backend,
            "pcap": pcap,
            "pairs": self.pairs.iter().map(|pair| json!(&**pair)).collect::<Vec<_>>(),
        })
    }

    /// Takes over the limits of the rate in `config`, of the settings `new` that replace `old`.
    ///
    /// # Errors
    /// Something else has changed too, which the device takes only when it is made.
    pub fn reconfigure(&self, old: &Value, new: &Value, config: &Config) -> Result<(), String> {
        let is_limit = |key: &String| Limits::KEYS.contains(&&**key);
        if !settings::changed(old, new).iter().all(is_limit) {
            return Err("only rates and bursts change while the device is there".into());
        }
        if self.backend.set_limits(&config.backend.limits) {
            Ok(())
        } else {
            Err("a direction gets its first limit when the device is made".into())
        }
    }
}
