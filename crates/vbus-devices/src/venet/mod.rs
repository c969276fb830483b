// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `venet`: an Ethernet controller (spec/venet.md), in front of the back ends of [`vbus_net`].
//!
//! How a frame from the driver travels: the doorbell wakes the task of the queue pair
//! ([`vbus_net::front`]). The task takes the frame from the transmit ring (`ring`) and gives it to
//! the device's back end. The back end puts a frame to the driver into the buffers that the driver
//! has posted. `connection` serves the driver's connection, `calls` parses the calls, and `pages`
//! writes the status page and the counters page.

mod calls;
mod connection;
mod device;
mod news;
mod pages;
mod ring;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde_json::Value;
use vbus_core::{
    Connection, CreateError, Device, DeviceClass, ErrorCode, Identity, Metric, Open, Region, state,
};
use vbus_net::front::{Config, METRICS, Nic, NicState};
use vbus_net::{BACKEND_METRICS, Direct, Opener, Switches};

use connection::VenetConnection;
use device::VenetDevice;

/// The class of Ethernet controllers. The switches of a bus belong to it.
pub struct VenetClass {
    switches: Switches,
    opener: Arc<dyn Opener>,
}

impl VenetClass {
    /// The class, without switches. The first device on a switch creates it. This process opens
    /// what the back ends need.
    pub fn new() -> VenetClass {
        VenetClass::on(Switches::default(), Arc::new(Direct))
    }

    /// The same on these switches, which the class shares with others. `opener` opens the files,
    /// sockets and interfaces of the back ends.
    pub fn on(switches: Switches, opener: Arc<dyn Opener>) -> VenetClass {
        VenetClass { switches, opener }
    }
}

impl Default for VenetClass {
    fn default() -> Self {
        VenetClass::new()
    }
}

impl DeviceClass for VenetClass {
    fn name(&self) -> &'static str {
        "venet"
    }

    fn help(&self) -> &'static str {
        "Ethernet controller. mac, mtu (1500), queue-pairs (1), csum, tso, uso (true), \
         rate or tx-rate and rx-rate = BITS_PER_SECOND with burst = BYTES, \
         pcap = FILE with snap-length, backpressure-ms (50), mac-changes (true), \
         speed = MBIT_PER_SECOND with duplex; \
         backend = \"switch\" (switch = NAME, learn, isolated (false), vlan or \
         trunk with native-vlan, broadcast-rate (10000)), \"tap\" (tap = INTERFACE), \
         \"stream\" (connect = PATH or listen = PATH), \"null\" (source-bytes)."
    }

    fn check(&self, _name: &str, config: &Value) -> Result<(), CreateError> {
        Config::parse(config).map(drop)
    }

    fn create(&self, name: &str, config: &Value) -> Result<Arc<dyn Device>, CreateError> {
        let nic = Nic::create(name, Config::parse(config)?, &self.switches, &self.opener)?;
        Ok(Arc::new(Venet(Arc::new(VenetDevice { nic }))))
    }

    fn metrics(&self) -> Vec<Metric> {
        [METRICS, BACKEND_METRICS].concat()
    }
}

struct Venet(Arc<VenetDevice>);

impl Device for Venet {
    fn identity(&self) -> Identity {
        self.0.identity()
    }

    fn config(&self) -> Vec<u8> {
        self.0.config_area()
    }

    fn open(&self, open: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        self.0.accepts(open.features)?;
        Ok(Box::new(VenetConnection::new(self.0.clone(), open)))
    }

    fn inspect(&self) -> Value {
        self.0.nic.inspect()
    }

    fn reconfigure(&self, old: &Value, new: &Value) -> Result<(), String> {
        let config = Config::parse(new).map_err(|error| error.to_string())?;
        self.0.nic.reconfigure(old, new, &config)
    }

    fn quiesce(&self) {
        self.0.nic.quiesce();
    }

    fn resume(&self) {
        self.0.nic.resume();
    }

    fn settled(&self, config: &Value) -> Value {
        self.0.nic.settled(config)
    }

    fn descriptors(&self) -> std::io::Result<Vec<(String, OwnedFd)>> {
        self.0.nic.backend.descriptors()
    }

    fn save(&self) -> Result<Value, String> {
        state::part(&self.0.nic.save()?)
    }

    fn outlast(&self, device: &mut Value, connection: Option<&mut Value>) -> Result<(), String> {
        state::read_part::<NicState>(device)?.outlast()?;
        connection.map_or(Ok(()), connection::outlast)
    }

    fn restore(&self, saved: &Value) -> Result<(), String> {
        self.0.nic.restore(&state::read_part(saved)?)
    }

    fn reopen(
        &self,
        open: Open,
        regions: Vec<Region>,
        saved: &Value,
    ) -> Result<Box<dyn Connection>, String> {
        self.0.accepts(open.features).map_err(|error| error.to_string())?;
        Ok(Box::new(VenetConnection::again(self.0.clone(), open, regions, saved)?))
    }

    fn control(&self, request: &Value, reply: &mut dyn FnMut(Value) -> bool) -> Result<(), String> {
        reply(self.0.nic.control(request)?);
        Ok(())
    }
}
