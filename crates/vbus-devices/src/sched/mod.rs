//! `sched`: the scheduling class of virtual CPUs' threads (spec/sched.md).
//!
//! The driver says in a state page for each virtual CPU what class and priority that which runs
//! there now is of; the device gives the virtual CPU's thread on the host the same, as far as the
//! host's policy allows, and says in a report page what it did. `cpu` is the heart of it; `thread`
//! is the one to change a thread, `lookup` finds out which those are, and by `ledger` another
//! process gives them back if this one is killed.

mod attributes;
mod config;
mod connection;
mod cpu;
mod ledger;
mod lookup;
mod policy;
mod thread;

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use vbus_core::shm::abi::class;
use vbus_core::{Connection, CreateError, Device, DeviceClass, ErrorCode, Identity, Open};

use crate::lock;
use config::{Config, Origin};
use connection::SchedConnection;
use cpu::Cpu;
pub use ledger::{Guardian, Ledger, Outcome, put_back};
use lookup::Lookup;
use thread::{Claims, Thread};

/// The class of devices that set the scheduling class of virtual CPUs' threads.
#[derive(Default)]
pub struct SchedClass {
    claims: Claims,
}

impl SchedClass {
    /// The class. If this process is killed, threads keep the class that they have then: see
    /// [`guarded`](SchedClass::guarded).
    pub fn new() -> SchedClass {
        SchedClass::default()
    }

    /// The class, whose devices note in `ledger` what they are about to change.
    pub fn guarded(ledger: Arc<Ledger>) -> SchedClass {
        SchedClass { claims: Claims::noted_in(ledger) }
    }
}

impl DeviceClass for SchedClass {
    fn name(&self) -> &'static str {
        "sched"
    }

    fn help(&self) -> &'static str {
        "Priority of virtual CPUs. qmp = SOCKET (of QEMU), vmm = SOCKET (control socket of vbus-vmm) or threads = [ID, ...]; cpus (64), \
         allow = [\"normal\", \"batch\", \"idle\", \"fifo\", \"rr\"], priority-max (10), nice-min (the thread's own), changes (1000 a second), boost-ms (500), boost-share (90 %)."
    }

    fn create(&self, name: &str, config: &Value) -> Result<Arc<dyn Device>, CreateError> {
        let tells_time = thread::tells_time();
        let config = Config::parse(config, tells_time)?;
        if !tells_time {
            tracing::warn!(
                device = name,
                "this kernel does not tell how much time a thread has used (CONFIG_SCHED_INFO): \"boost-share\" is 100, no bound"
            );
        }
        // Threads that are named by their ids are taken now, while they are the ones that are
        // meant.
        let mut threads = Vec::new();
        if let Origin::Threads(tids) = &config.origin {
            for tid in tids {
                let thread = Thread::take_any(*tid, &self.claims);
                threads.push(Some(
                    thread.map_err(|error| CreateError(format!("\"threads\": {error}")))?,
                ));
            }
        }
        if !thread::is_privileged() {
            tracing::warn!(
                device = name,
                "without CAP_SYS_NICE the kernel refuses most changes, and may refuse to take back the others"
            );
        }
        let cpus = (0..config.cpus).map(|_| Cpu::new(&config.policy)).collect();
        let lookup = Lookup::new(&config.origin, &self.claims);
        let state = Mutex::new(State { cpus, lookup });
        let ledger = self.claims.ledger().cloned();
        Ok(Arc::new(SchedDevice(Arc::new(Shared {
            config,
            state,
            threads: Mutex::new(threads),
            ledger,
        }))))
    }
}

/// What a device and its connection have in common.
struct Shared {
    config: Config,
    state: Mutex<State>,
    /// Those of the settings, while no connection is open.
    threads: Mutex<Vec<Option<Thread>>>,
    ledger: Option<Arc<Ledger>>,
}

struct State {
    cpus: Vec<Cpu>,
    lookup: Option<Lookup>,
}

impl Shared {
    /// A connection begins.
    fn begin(&self) {
        let mut state = lock(&self.state);
        for (cpu, thread) in state.cpus.iter_mut().zip(&mut *lock(&self.threads)) {
            if let Some(thread) = thread.take() {
                cpu.give_thread(thread);
            }
        }
        if let Some(lookup) = &mut state.lookup {
            lookup.reset();
        }
    }

    /// It has ended: every thread has its own class again when this returns.
    fn end(&self) {
        let mut state = lock(&self.state);
        let threads: Vec<_> = state.cpus.iter_mut().map(Cpu::close).collect();
        if let Some(lookup) = &mut state.lookup {
            lookup.reset();
        }
        if let Origin::Threads(_) = self.config.origin {
            *lock(&self.threads) = threads;
        }
    }
}

struct SchedDevice(Arc<Shared>);

impl Device for SchedDevice {
    fn identity(&self) -> Identity {
        Identity {
            class: class::SCHED,
            class_name: "sched",
            pci_class: 0x08_80_00,
            features: 0,
            regions: self.0.config.cpus * 2,
            vectors: 1,
        }
    }

    fn config(&self) -> Vec<u8> {
        self.0.config.area()
    }

    fn open(&self, open: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(SchedConnection::new(self.0.clone(), &open)))
    }

    fn inspect(&self) -> Value {
        // Reads a file: not under the lock that the pages' task needs.
        let privileged = thread::is_privileged();
        let state = lock(&self.0.state);
        let cpus: Vec<_> =
            state.cpus.iter().enumerate().filter_map(|(number, cpu)| cpu.inspect(number)).collect();
        let mut value =
            json!({ "policy": self.0.config.inspect(), "privileged": privileged, "cpus": cpus });
        if let Some(error) = state.lookup.as_ref().and_then(Lookup::error) {
            value["lookup"] = error.into();
        }
        if let Some(error) = self.0.ledger.as_ref().and_then(|ledger| ledger.error()) {
            value["guardian"] = error.into();
        }
        value
    }
}
