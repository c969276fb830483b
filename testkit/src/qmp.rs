// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU's control channel for scenarios. Each call has its own time limit.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

/// How long QEMU may take to answer. A device that does not respond blocks QEMU for 5 s.
const ANSWER: Duration = Duration::from_secs(120);

/// A connection to one QEMU.
pub struct Qmp(vbus_qmp::Qmp);

impl Qmp {
    /// Takes over a fresh connection and leaves its negotiation mode.
    pub fn new(stream: UnixStream) -> Result<Self> {
        Ok(Self(vbus_qmp::Qmp::over(stream, ANSWER)?))
    }

    /// Runs a command and returns what it returns.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.0.set_timeout(ANSWER);
        self.0.run(command, arguments).with_context(|| command.to_owned())
    }

    /// Waits for an event `name` that `wanted` accepts, and returns its data. An event that came
    /// before this call also counts. Earlier events are dropped.
    pub fn wait_event(
        &mut self,
        name: &str,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        self.0.set_timeout(limit);
        loop {
            let mut event = self.0.event()?.with_context(|| format!("no event {name}"))?;
            if event["event"] == name && wanted(&event["data"]) {
                return Ok(event["data"].take());
            }
        }
    }

    /// Drops the events that came so far.
    pub fn forget_events(&mut self) -> Result<()> {
        self.0.set_timeout(ANSWER);
        self.0.forget_events()
    }
}
