// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `sched`: the scheduling class of virtual CPUs' threads (spec/sched.md).
//!
//! The guest has one state page for each virtual CPU. The driver writes there the scheduling class
//! and priority of the task that runs on the virtual CPU now. The device gives the host thread of
//! the virtual CPU the same class, as far as the host's policy allows. It reports the outcome in a
//! second page.
//!
//! `cpus` holds all virtual CPUs of a device, `cpu` serves the pages of one. Only `thread` changes
//! a thread. `lookup` asks the VMM for the threads of its virtual CPUs. A process without the right
//! to change threads lets another process do it ([`Threads`]).
//!
//! ```
//! use serde_json::json;
//! use vbus_core::{Bus, Executor, Tuning};
//! use vbus_sched::SchedClass;
//!
//! let classes = vec![Box::new(SchedClass::new()) as Box<dyn vbus_core::DeviceClass>];
//! let bus = Bus::new(Executor::start(Tuning::default())?, classes);
//! // The device asks QEMU by QMP for the threads of the virtual CPUs.
//! let settings = json!({ "qmp": "/run/vm/qmp.sock", "cpus": 4, "allow": ["normal", "fifo"] });
//! let sched = bus.create("sched", "sched", &settings).unwrap();
//! assert_eq!(sched.inspect()["device"]["cpus"], json!([]));
//! # Ok::<(), std::io::Error>(())
//! ```

mod attributes;
mod config;
mod connection;
mod cpu;
mod cpus;
pub mod interview;
mod limits;
mod lookup;
mod policy;
mod thread;

use std::sync::Arc;

use serde_json::Value;
use vbus_core::shm::abi::class;
use vbus_core::{
    Connection, CreateError, Device, DeviceClass, ErrorCode, Identity, Metric, Open, Region, state,
};

use config::{Config, Origin};
use connection::SchedConnection;
use cpus::Cpus;
pub use limits::Limits;
pub use policy::Setting;
use thread::Thread;
pub use thread::{Direct, Held, OwnThread, TakeError, ThreadPin, Threads, process_of, time_in};

/// The class of devices that set the scheduling class of virtual CPUs' threads.
pub struct SchedClass {
    threads: Arc<dyn Threads>,
}

impl SchedClass {
    /// Makes the class for a process that changes threads itself. If this process is killed, the
    /// threads keep the scheduling class that they have at that moment.
    pub fn new() -> SchedClass {
        SchedClass::through(Arc::new(Direct::default()))
    }

    /// Makes the class. Its devices find and change threads through `threads`.
    pub fn through(threads: Arc<dyn Threads>) -> SchedClass {
        SchedClass { threads }
    }
}

impl Default for SchedClass {
    fn default() -> Self {
        SchedClass::new()
    }
}

impl DeviceClass for SchedClass {
    fn name(&self) -> &'static str {
        "sched"
    }

    fn help(&self) -> &'static str {
        "Scheduling class of virtual CPUs. qmp = SOCKET (of QEMU), \
         vmm = SOCKET (control socket of vbus-vmm) or threads = [ID, ...]; cpus (64), \
         allow = [\"normal\", \"batch\", \"idle\", \"fifo\", \"rr\"], priority-max (10), \
         nice-min (the thread's own), changes (1000 a second), boost-ms (500), boost-share (90 %)."
    }

    fn check(&self, _name: &str, config: &Value) -> Result<(), CreateError> {
        Config::parse(config, self.threads.tells_time()).map(drop)
    }

    fn create(&self, name: &str, config: &Value) -> Result<Arc<dyn Device>, CreateError> {
        let tells_time = self.threads.tells_time();
        let config = Config::parse(config, tells_time)?;
        self.threads.check(&Limits::of(&config.policy)).map_err(CreateError)?;
        if !tells_time {
            tracing::warn!(
                device = name,
                "the kernel does not report how much time a thread has used (CONFIG_SCHED_INFO): \
                 \"boost-share\" is 100 (no limit)"
            );
        }
        // Take threads with ids in the settings now: later another thread could have the id.
        let mut threads = Vec::new();
        if let Origin::Threads(tids) = &config.origin {
            for tid in tids {
                let thread = Thread::take(&*self.threads, None, *tid);
                threads.push(Some(
                    thread.map_err(|error| CreateError(format!("\"threads\": {error}")))?,
                ));
            }
        }
        if !self.threads.is_privileged() {
            tracing::warn!(
                device = name,
                "without CAP_SYS_NICE the kernel refuses most changes, \
                 and may refuse to undo the others"
            );
        }
        Ok(Arc::new(SchedDevice(Arc::new(Cpus::new(name, config, threads, &self.threads)))))
    }

    fn metrics(&self) -> Vec<Metric> {
        cpu::METRICS.into()
    }
}

struct SchedDevice(Arc<Cpus>);

impl Device for SchedDevice {
    fn identity(&self) -> Identity {
        Identity::new(class::SCHED, "sched", 0x08_80_00).with_regions(self.0.config.cpus * 2)
    }

    fn config(&self) -> Vec<u8> {
        self.0.config.area()
    }

    fn open(&self, open: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(SchedConnection::new(self.0.clone(), &open)))
    }

    fn inspect(&self) -> Value {
        self.0.inspect()
    }

    /// Every thread has its own class while the device is quiesced: the device that goes on takes
    /// it with that.
    fn quiesce(&self) {
        self.0.park();
    }

    fn save(&self) -> Result<Value, String> {
        Ok(state::nothing())
    }

    /// The driver's memory has its newest requests. The time that it has for the next one begins
    /// anew.
    fn outlast(&self, _: &mut Value, _: Option<&mut Value>) -> Result<(), String> {
        Ok(())
    }

    fn restore(&self, saved: &Value) -> Result<(), String> {
        state::is_nothing(saved)
    }

    fn reopen(
        &self,
        open: Open,
        regions: Vec<Region>,
        saved: &Value,
    ) -> Result<Box<dyn Connection>, String> {
        Ok(Box::new(SchedConnection::again(self.0.clone(), &open, regions, saved)?))
    }
}

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
