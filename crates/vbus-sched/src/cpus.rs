// SPDX-License-Identifier: Apache-2.0 OR MIT
//! All virtual CPUs of a device, with their threads.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde_json::{Value, json};
use vbus_core::lock;

use crate::config::{Config, Origin};
use crate::cpu::{Cpu, CpuState};
use crate::lookup::Lookup;
use crate::thread::{Thread, Threads};

/// The virtual CPUs of a device. The device and its connection share them.
pub struct Cpus {
    pub config: Config,
    pub state: Mutex<CpusState>,
    /// The threads that the settings name, while no connection is open.
    threads: Mutex<Vec<Option<Thread>>>,
    threads_of: Arc<dyn Threads>,
}

/// The virtual CPUs, and the search for their threads.
pub struct CpusState {
    pub cpus: Vec<Cpu>,
    pub lookup: Option<Lookup>,
}

impl Cpus {
    /// Makes the virtual CPUs that `config` describes, for the device `name`. `threads` are those
    /// that the settings name.
    pub fn new(
        name: &str,
        config: Config,
        threads: Vec<Option<Thread>>,
        of: &Arc<dyn Threads>,
    ) -> Cpus {
        let name: Arc<str> = name.into();
        let cpu = |_| Cpu::new(name.clone(), &config.policy);
        let cpus = (0..config.cpus).map(cpu).collect();
        let lookup = Lookup::new(name, &config.origin, of);
        Cpus {
            config,
            state: Mutex::new(CpusState { cpus, lookup }),
            threads: Mutex::new(threads),
            threads_of: of.clone(),
        }
    }

    /// A connection begins.
    pub fn begin(&self) {
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

    /// A connection has ended. When this returns, every thread has its own class again.
    pub fn end(&self) {
        let mut state = lock(&self.state);
        let threads: Vec<_> = state.cpus.iter_mut().map(Cpu::close).collect();
        if let Some(lookup) = &mut state.lookup {
            lookup.reset();
        }
        if let Origin::Threads(_) = self.config.origin {
            *lock(&self.threads) = threads;
        }
    }

    /// The device is quiesced: every thread has its own class.
    pub fn park(&self) {
        lock(&self.state).cpus.iter_mut().for_each(Cpu::park);
    }

    /// All virtual CPUs as plain data.
    pub fn save(&self) -> Vec<CpuState> {
        let now = Instant::now();
        lock(&self.state).cpus.iter().map(|cpu| cpu.save(now)).collect()
    }

    /// Goes on from what [`save`](Self::save) returned, with the pages registered.
    ///
    /// # Errors
    /// The state is wrong. The text says which virtual CPU's.
    pub fn restore(&self, saved: &[CpuState]) -> Result<(), String> {
        let (mut state, now) = (lock(&self.state), Instant::now());
        if saved.len() != state.cpus.len() {
            return Err(format!("it has {} virtual CPUs, not {}", state.cpus.len(), saved.len()));
        }
        for (number, (cpu, saved)) in state.cpus.iter_mut().zip(saved).enumerate() {
            cpu.restore(saved, now).map_err(|why| format!("virtual CPU {number}: {why}"))?;
        }
        Ok(())
    }

    /// Policy, virtual CPUs and errors, as JSON.
    pub fn inspect(&self) -> Value {
        // This may read a file, so it must not hold the lock that the task needs.
        let privileged = self.threads_of.is_privileged();
        let state = lock(&self.state);
        let cpus: Vec<_> =
            state.cpus.iter().enumerate().filter_map(|(number, cpu)| cpu.inspect(number)).collect();
        let mut value =
            json!({ "policy": self.config.inspect(), "privileged": privileged, "cpus": cpus });
        if let Some(error) = state.lookup.as_ref().and_then(Lookup::error) {
            value["lookup"] = error.into();
        }
        value
    }
}
