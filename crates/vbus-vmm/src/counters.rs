// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The counters of one virtual CPU: this program's own and KVM's.

use std::sync::Arc;

use kvm_ioctls::VcpuFd;
use serde_json::{Value, json};
use vbus_kvm::Stats;

use crate::exits::Exits;

/// The counters of one virtual CPU. Any thread may read them while the CPU runs.
pub struct VcpuCounters {
    number: u32,
    exits: Arc<Exits>,
    /// `None` with a KVM that has no statistics (Linux before 5.14).
    kvm: Option<Stats>,
}

impl VcpuCounters {
    /// The counters of CPU `number`, whose thread counts `exits`.
    pub fn new(number: u32, exits: Arc<Exits>, vcpu: &VcpuFd) -> VcpuCounters {
        VcpuCounters { number, exits, kvm: Stats::of_vcpu(vcpu).ok() }
    }

    /// The exits to user space.
    pub fn exits(&self) -> &Exits {
        &self.exits
    }

    /// All counters, as the control request `stats` shows them.
    pub fn to_json(&self) -> Value {
        let kvm = self.kvm.as_ref().and_then(|stats| stats.read().ok());
        json!({ "cpu": self.number, "user_exits": self.exits.to_json(), "kvm": kvm })
    }
}
