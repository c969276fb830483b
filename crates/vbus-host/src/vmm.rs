// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Plugs a device of the bus into a running `vbus-vmm`, and unplugs it, over the control socket of
//! `vbus-vmm` (spec/vmm.md).

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use vbus_control::Connection;

use crate::client::text;

/// A connection to a running `vbus-vmm`.
pub struct Vmm(Connection);

impl Vmm {
    /// Connects to the control socket `path`. Each request fails when its answer takes longer than
    /// `timeout`.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Vmm> {
        Connection::connect(path, "vbus-vmm", timeout)
            .map(Vmm)
            .with_context(|| format!("cannot reach vbus-vmm at {}", path.display()))
    }

    /// The devices that are plugged: the name and the socket of each.
    fn devices(&mut self) -> Result<Vec<Value>> {
        let mut devices = Vec::new();
        self.0.stream(&json!({ "op": "devices" }), &mut |device| devices.push(device))?;
        Ok(devices)
    }

    /// Checks that no device called `name` is plugged yet.
    pub fn check_free(&mut self, name: &str) -> Result<()> {
        if self.devices()?.iter().any(|device| text(device, "name") == name) {
            bail!("this vbus-vmm has a device {name:?} already");
        }
        Ok(())
    }

    /// Plugs the device.
    pub fn plug(&mut self, name: &str, socket: &Path) -> Result<()> {
        // `vbus-vmm` may run in another directory.
        let socket = std::path::absolute(socket)?;
        self.0
            .stream(&json!({ "op": "plug", "name": name, "socket": socket }), &mut |_| {})
            .map(drop)
    }

    /// Unplugs the device that `vbus-vmm` has from `socket`. `vbus-vmm` asks the guest to release
    /// it; this method waits until the guest has done so.
    pub fn unplug(&mut self, socket: &Path) -> Result<()> {
        let ours = socket.canonicalize().context("the device has no socket")?;
        let is_ours = |device: &Value| {
            Path::new(text(device, "socket")).canonicalize().is_ok_and(|path| path == ours)
        };
        let device = self.devices()?.into_iter().find(is_ours);
        let Some(device) = device else {
            bail!(
                "this vbus-vmm has no device of {}; give the --vmm of the machine that has it. If \
                 none \
                 has, omit --vmm: then vbus only removes the device from the bus",
                socket.display()
            )
        };
        let request = json!({ "op": "unplug", "name": text(&device, "name") });
        self.0.stream(&request, &mut |_| {}).map(drop).map_err(|error| {
            let late = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
            if late == Some(ErrorKind::TimedOut) {
                let timeout = self.0.socket().read_timeout().ok().flatten().unwrap_or_default();
                error
                    .context(format!("the guest did not release it within {} s", timeout.as_secs()))
            } else {
                error
            }
        })
    }
}
