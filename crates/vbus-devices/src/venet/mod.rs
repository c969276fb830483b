//! `venet`: an Ethernet controller (spec/venet.md).
//!
//! The way of a frame, from the driver's doorbell: `pair` takes it from the transmit ring, checks
//! it against `frame`, and hands it to the device's back end (`switch`, `tap`, `stream`, `null`),
//! of which `port` tells what it must be able to do. A frame to the driver comes from the back end
//! through `rx` into the buffers that the driver posted. `connection` is what the driver opens,
//! `status` its status page.

mod config;
mod connection;
mod counters;
mod filter;
mod frame;
mod null;
mod offload;
mod pair;
mod patience;
mod pcap;
mod port;
mod rx;
mod status;
mod stream;
mod switch;
mod tap;
mod tun;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use serde_json::{Value, json};
use vbus_core::shm::abi::{class, venet as abi};
use vbus_core::{Connection, CreateError, Device, DeviceClass, ErrorCode, Identity, Open};

use config::{Config, Plug, show_mac};
use connection::VenetConnection;
use counters::PairCounters;
use null::Null;
use pcap::Capture;
use port::{Backend, Link};
use stream::Stream;
use switch::{Switch, SwitchBackend};
use tap::Tap;
use vbus_core::lock;

/// The most entries of a ring.
const RING_MAX: u16 = 4096;

/// The class of Ethernet controllers. The switches of a bus belong to it.
#[derive(Default)]
pub struct VenetClass {
    switches: Mutex<HashMap<String, Weak<Switch>>>,
}

impl VenetClass {
    /// A class whose switches are yet to come.
    pub fn new() -> VenetClass {
        VenetClass::default()
    }

    /// The switch called `name`; it lives as long as a device is on it.
    fn switch(&self, name: &str) -> Arc<Switch> {
        let mut switches = lock(&self.switches);
        switches.retain(|_, switch| switch.strong_count() != 0);
        if let Some(switch) = switches.get(name).and_then(Weak::upgrade) {
            return switch;
        }
        let switch = Arc::new(Switch::new(name));
        switches.insert(name.into(), Arc::downgrade(&switch));
        switch
    }
}

impl DeviceClass for VenetClass {
    fn name(&self) -> &'static str {
        "venet"
    }

    fn help(&self) -> &'static str {
        "Ethernet controller. mac, mtu (1500), queue-pairs (1), csum, tso, uso (true), pcap = FILE with snap-length, patience-ms (50); \
         backend = \"switch\" (switch = NAME), \"tap\" (tap = INTERFACE), \"stream\" (connect = PATH or listen = PATH), \"null\" (source-bytes)."
    }

    fn create(&self, name: &str, config: &Value) -> Result<Arc<dyn Device>, CreateError> {
        let config = Config::parse(config)?;
        let link = Arc::new(Link::default());
        let backend: Box<dyn Backend> = match &config.plug {
            Plug::Switch(switch) => {
                Box::new(SwitchBackend { switch: self.switch(switch), link: link.clone() })
            }
            Plug::Null(source_bytes) => {
                Box::new(Null { source_bytes: *source_bytes, link: link.clone() })
            }
            Plug::Tap(tap) => {
                Box::new(Tap::new(tap, config.queue_pairs, config.mtu, link.clone())?)
            }
            Plug::Connect(path) => Box::new(Stream::connecting(path, link.clone())?),
            Plug::Listen(path) => Box::new(Stream::listening(path, link.clone())?),
        };
        let capture = match &config.pcap {
            None => None,
            Some((path, snap)) => {
                let capture = Capture::create(path, *snap)
                    .map_err(|error| CreateError(format!("pcap = {path:?}: {error}")))?;
                Some(Arc::new(capture))
            }
        };
        let pairs = (0..config.queue_pairs).map(|_| Arc::default()).collect();
        Ok(Arc::new(Venet(Arc::new(Shared {
            name: name.into(),
            config,
            link,
            backend,
            capture,
            pairs,
        }))))
    }
}

/// What a device and its connection have in common.
struct Shared {
    name: String,
    config: Config,
    link: Arc<Link>,
    backend: Box<dyn Backend>,
    capture: Option<Arc<Capture>>,
    pairs: Arc<[Arc<PairCounters>]>,
}

impl Shared {
    fn features(&self) -> u64 {
        self.config.features & self.backend.features()
    }
}

struct Venet(Arc<Shared>);

impl Device for Venet {
    fn identity(&self) -> Identity {
        let pairs = self.0.config.queue_pairs;
        Identity {
            class: class::VENET,
            class_name: "venet",
            pci_class: 0x02_00_00,
            features: self.0.features(),
            regions: u32::from(pairs) * 2 + 1,
            vectors: pairs * 2 + 1,
        }
    }

    fn config(&self) -> Vec<u8> {
        let config = &self.0.config;
        let mut area = vec![0; abi::CONFIG_BYTES];
        area[abi::CONFIG_MAC..][..6].copy_from_slice(&config.mac);
        area[abi::CONFIG_MTU..][..2].copy_from_slice(&config.mtu.to_le_bytes());
        area[abi::CONFIG_QUEUE_PAIRS..][..2].copy_from_slice(&config.queue_pairs.to_le_bytes());
        area[abi::CONFIG_RING_MAX..][..2].copy_from_slice(&RING_MAX.to_le_bytes());
        area
    }

    fn open(&self, open: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        let needs_csum = open.features & (abi::F_TSO | abi::F_USO) != 0;
        if needs_csum && open.features & abi::F_CSUM == 0 {
            return Err(ErrorCode::BAD_FEATURES);
        }
        Ok(Box::new(VenetConnection::new(self.0.clone(), open)))
    }

    fn inspect(&self) -> Value {
        let Shared { config, link, backend, capture, pairs, .. } = &*self.0;
        let capture = capture.as_ref().map(|capture| {
            json!({ "file": config.pcap.as_ref().map(|(path, _)| path), "records": capture.records, "left-out": capture.left_out })
        });
        json!({
            "mac": show_mac(config.mac),
            "mtu": config.mtu,
            "queue-pairs": config.queue_pairs,
            "link": link.is_up(),
            "backend": backend.inspect(),
            "pcap": capture,
            "pairs": pairs.iter().map(|pair| json!(&**pair)).collect::<Vec<_>>(),
        })
    }
}
