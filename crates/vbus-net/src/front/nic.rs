// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An Ethernet device as its settings make it, whatever its front is.

use std::sync::{Arc, Mutex, Weak};

use serde_json::{Value, json};
use vbus_core::{CreateError, lock, settings, state};
use vbus_tap::show_mac;

use super::config::Config;
use super::counters::PairCounters;
use super::saved::{NicState, PairState};
use crate::backend::Backend;
use crate::limits::Limits;
use crate::link::Link;
use crate::opener::Opener;
use crate::sink::{RxSink, SharedSink};
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
    /// What the device lends to others while a driver has started.
    lent: Mutex<Lent>,
}

/// The receive queues that other devices deliver to.
#[derive(Default)]
struct Lent {
    lanes: Vec<Weak<Mutex<dyn RxSink>>>,
    /// The device is quiesced.
    paused: bool,
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
        let shape = (config.queue_pairs, config.mtu);
        let handed = opener.handed_over(name);
        let backend =
            config.backend.open(switches, opener, config.mac, shape, link.clone(), handed)?;
        Ok(Nic::new(name, config, link, backend))
    }

    /// The device `name` in front of this back end, which sets the carrier of `link`.
    pub fn new(name: &str, config: Config, link: Arc<Link>, backend: Box<dyn Backend>) -> Nic {
        let pairs = (0..config.queue_pairs).map(|_| Arc::default()).collect();
        Nic { name: name.into(), config, link, backend, pairs, lent: Mutex::default() }
    }

    /// Whether the device is quiesced. The receive queues `lanes` that others deliver to are paused
    /// from now on whenever it is, in place of the former ones. The caller has made them paused if
    /// this returns true before.
    pub(super) fn lend(&self, make: impl FnOnce(bool) -> Vec<SharedSink>) {
        let mut lent = lock(&self.lent);
        lent.lanes = make(lent.paused).iter().map(Arc::downgrade).collect();
    }

    /// Stops everything that is no task of the device: what others deliver to its driver, and the
    /// back end.
    pub fn quiesce(&self) {
        self.pause(true);
        self.backend.quiesce();
    }

    /// Undoes [`quiesce`](Self::quiesce).
    pub fn resume(&self) {
        self.backend.resume();
        self.pause(false);
    }

    fn pause(&self, paused: bool) {
        let mut lent = lock(&self.lent);
        lent.paused = paused;
        for lane in lent.lanes.iter().filter_map(Weak::upgrade) {
            lock(&lane).pause(paused);
        }
    }

    /// What the device has beside its settings and its driver, as plain data.
    ///
    /// # Errors
    /// Its back end cannot be saved.
    pub fn save(&self) -> Result<NicState, String> {
        let counts = |pair: &Arc<PairCounters>| PairState {
            tx: state::counts(&pair.tx.all()),
            rx: state::counts(&pair.rx.all()),
        };
        Ok(NicState {
            mac: self.config.mac,
            link_off: self.link.is_off(),
            announces: self.link.announces(),
            pairs: self.pairs.iter().map(counts).collect(),
            backend: self.backend.save()?,
        })
    }

    /// Goes on from what [`save`](Self::save) returned.
    ///
    /// # Errors
    /// The state is wrong, or of a device with other settings.
    pub fn restore(&self, state: &NicState) -> Result<(), String> {
        if state.mac != self.config.mac {
            let (mac, other) = (show_mac(self.config.mac), show_mac(state.mac));
            return Err(format!("its address is {mac}, not {other}: write mac = \"{other}\""));
        }
        if state.pairs.len() != self.pairs.len() {
            let (pairs, others) = (self.pairs.len(), state.pairs.len());
            return Err(format!("it has {pairs} queue pairs, not {others}"));
        }
        state::check_count("announces", state.announces)?;
        for (pair, saved) in self.pairs.iter().zip(&state.pairs) {
            state::add_counts(&pair.tx.all(), &saved.tx)?;
            state::add_counts(&pair.rx.all(), &saved.rx)?;
        }
        self.link.restore(state.link_off, state.announces);
        self.backend.restore(&state.backend)
    }

    /// `config` with the address, if the device chose that, and with what its back end chose.
    pub fn settled(&self, config: &Value) -> Value {
        let mut settled = config.clone();
        if settled.is_null() {
            settled = json!({});
        }
        if let Some(settings) = settled.as_object_mut() {
            settings.insert("mac".into(), show_mac(self.config.mac).into());
            if let Some(tap) = self.backend.inspect().get("tap") {
                settings.insert("tap".into(), tap.clone());
            }
        }
        settled
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
