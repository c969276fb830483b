// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `uplink`: a port of a switch that leads to a network outside of the bus (spec/venet.md,
//! "Uplinks"). It is no device for a driver.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde_json::Value;
use vbus_core::settings::Settings;
use vbus_core::{
    Connection, CreateError, Device, DeviceClass, ErrorCode, Identity, Joined, Metric, Open,
};
use vbus_net::front::MTU_RANGE;
use vbus_net::{Opener, Switches, UPLINK_METRICS, Uplink, UplinkConfig};

/// The class of uplinks.
pub struct UplinkClass {
    switches: Switches,
    opener: Arc<dyn Opener>,
}

impl UplinkClass {
    /// Uplinks of `switches`, which the Ethernet controllers of the bus share. `opener` opens the
    /// sockets and interfaces.
    pub fn new(switches: Switches, opener: Arc<dyn Opener>) -> UplinkClass {
        UplinkClass { switches, opener }
    }

    fn parse(config: &Value) -> Result<UplinkConfig, CreateError> {
        let mut settings = Settings::new(config)?;
        let config = UplinkConfig::parse(&mut settings, MTU_RANGE)?;
        settings.finish()?;
        Ok(config)
    }
}

impl DeviceClass for UplinkClass {
    fn name(&self) -> &'static str {
        "uplink"
    }

    fn help(&self) -> &'static str {
        "A way out of a switch, for its devices; it has no driver. switch = NAME, mtu (1500), \
         vlan or trunk with native-vlan, broadcast-rate (10000), csum, tso, uso (true), \
         rate or tx-rate and rx-rate = BITS_PER_SECOND with burst = BYTES, \
         pcap = FILE with snap-length; \
         backend = \"tap\" (tap = INTERFACE), \"stream\" (connect = PATH or listen = PATH)."
    }

    fn check(&self, _name: &str, config: &Value) -> Result<(), CreateError> {
        UplinkClass::parse(config).map(drop)
    }

    fn create(&self, name: &str, config: &Value) -> Result<Arc<dyn Device>, CreateError> {
        let config = UplinkClass::parse(config)?;
        Ok(Arc::new(UplinkDevice(Uplink::open(name, config, &self.switches, &self.opener)?)))
    }

    fn metrics(&self) -> Vec<Metric> {
        UPLINK_METRICS.into()
    }
}

struct UplinkDevice(Uplink);

impl Device for UplinkDevice {
    fn identity(&self) -> Identity {
        Identity::user("uplink")
    }

    fn takes_drivers(&self) -> bool {
        false
    }

    fn joined(&self, joined: Joined<'_>) -> Result<(), CreateError> {
        let failed = |error| CreateError(format!("the uplink cannot start ({error}): see the log"));
        let Joined { executor, worker, counters, .. } = joined;
        self.0.start(executor, worker, counters.clone()).map_err(failed)
    }

    fn open(&self, _open: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Err(ErrorCode::DENIED)
    }

    fn inspect(&self) -> Value {
        self.0.inspect()
    }

    fn removed(&self) {
        self.0.stop();
    }

    fn quiesce(&self) {
        self.0.quiesce();
    }

    fn resume(&self) {
        self.0.resume();
    }

    fn settled(&self, config: &Value) -> Value {
        let mut settled = config.clone();
        let inspect = self.0.inspect();
        if let (Some(settings), Some(tap)) =
            (settled.as_object_mut(), inspect["backend"].get("tap"))
        {
            settings.insert("tap".into(), tap.clone());
        }
        settled
    }

    fn descriptors(&self) -> std::io::Result<Vec<(String, OwnedFd)>> {
        self.0.descriptors()
    }

    fn save(&self) -> Result<Value, String> {
        self.0.save()
    }

    fn outlast(&self, device: &mut Value, _: Option<&mut Value>) -> Result<(), String> {
        Uplink::outlast(device)
    }

    fn restore(&self, saved: &Value) -> Result<(), String> {
        self.0.restore(saved)
    }
}
