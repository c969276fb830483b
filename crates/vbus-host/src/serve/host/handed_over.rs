// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus as another process takes it over: all that it has, and how it stops and goes on.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use vbus_core::{Endpoint, lock};
use vbus_vfio_user::{DeviceServer, SavedServer};

use super::{Held, Host, Member, Served, Server};
use crate::config::DeviceSpec;
use crate::take_over::{DeviceContent, DeviceParcel, StatePart};

/// The descriptors of a device's back end, those of its server, and the rest of its state.
pub type SavedMember = (Vec<(String, OwnedFd)>, Vec<OwnedFd>, StatePart);

/// The leaving bus.
impl Host {
    /// The devices, by name.
    pub fn specs(&self) -> Vec<DeviceSpec> {
        self.lock().values().map(|member| member.spec.clone()).collect()
    }

    /// The lock of the directory.
    pub fn lock_of_directory(&self) -> BorrowedFd<'_> {
        self.claimed.lock()
    }

    /// The sockets that belong to no device, and all that the service manager has made (true).
    ///
    /// # Errors
    /// This process has no more descriptors.
    pub fn sockets(&self) -> io::Result<Vec<(PathBuf, OwnedFd, bool)>> {
        let mut sockets = Vec::new();
        for (path, socket) in lock(&self.own).iter() {
            sockets.push((path.clone(), socket.try_clone()?, false));
        }
        let inherited = self.inherited.all()?;
        sockets.extend(inherited.into_iter().map(|(path, socket)| (path, socket, true)));
        Ok(sockets)
    }

    /// Stops all devices between two polls and two messages: all servers first, so that no driver
    /// meets a device that stands still. [`go_on`](Self::go_on) undoes it, also after an error.
    ///
    /// # Errors
    /// A device does not stop before `by`.
    pub fn hold(&self, by: Instant) -> Result<()> {
        for (name, member) in self.lock().iter() {
            if let Some(served) = &member.served {
                served.server.hold(by).with_context(|| format!("device {name:?}"))?;
            }
        }
        for endpoint in self.bus.devices() {
            endpoint.quiesce_by(by)?;
            ensure!(Instant::now() < by, "device {:?} was too slow to stop", endpoint.name());
        }
        Ok(())
    }

    /// Lets all devices go on.
    pub fn go_on(&self) {
        for endpoint in self.bus.devices() {
            endpoint.resume();
        }
        for member in self.lock().values() {
            if let Some(served) = &member.served {
                served.server.release();
            }
        }
    }

    /// The state of a device that stands still. This changes nothing.
    ///
    /// # Errors
    /// It cannot be saved. The text has its name and its class.
    pub fn save(&self, name: &str) -> Result<SavedMember> {
        let endpoint = self.bus.get(name)?;
        let opened = endpoint.device().descriptors().with_context(|| format!("device {name:?}"))?;
        let members = self.lock();
        let member = members.get(name).ok_or_else(|| anyhow!("device {name:?} has gone"))?;
        Ok(match &member.served {
            Some(served) => {
                let saved = served.server.save()?;
                let SavedServer { data, descriptors } = saved;
                (opened, descriptors, StatePart::Served(Box::new(data)))
            }
            None => (opened, Vec::new(), StatePart::Alone(Box::new(endpoint.save()?))),
        })
    }
}

/// The new bus.
impl Host {
    /// Keeps the sockets of the bus whose place this one takes, for those who need them.
    pub fn keep_sockets(&self, sockets: impl IntoIterator<Item = (PathBuf, OwnedFd, bool)>) {
        for (path, socket, inherited) in sockets {
            match inherited {
                true => self.inherited.add(path, socket),
                false => drop(lock(&self.former).insert(path, socket)),
            }
        }
    }

    /// Makes a device anew that the other bus has, with its state. It stands still, until
    /// [`go_on`](Self::go_on).
    ///
    /// # Errors
    /// It cannot be made, or cannot go on from the state.
    pub fn restore(&self, spec: DeviceSpec, parcel: DeviceParcel) -> Result<Arc<Endpoint>> {
        let DeviceParcel { name, settled, opened, state } = parcel;
        ensure!(name == spec.name, "the state is that of {name:?}, and not of {:?}", spec.name);
        self.supervisor.keep(&name, opened);
        let endpoint = self.bus.create_quiesced(&name, &spec.class, &settled)?;
        if let Some(pic) = &spec.pic {
            endpoint.set_router(pic);
        }
        let served = match state {
            DeviceContent::Alone(state) => {
                ensure!(!endpoint.device().takes_drivers(), "device {name:?} has no server");
                endpoint.restore(&state)?;
                None
            }
            DeviceContent::Served(saved) => {
                let path = self.dir().join(spec.socket_path());
                let server = DeviceServer::restore(&endpoint, *saved, &path, spec.options)
                    .map_err(anyhow::Error::msg)?;
                let _held = match self.inherited.take(&path)? {
                    Some((_, lease)) => Held::Inherited(lease),
                    None => self.former_file(&path),
                };
                Some(Served { server: Server::VfioUser(server), _held })
            }
        };
        self.lock().insert(name, Member { spec, served });
        Ok(endpoint)
    }

    /// From now on the supervisor removes the files of the former bus's sockets at the end of this
    /// one. Those that nobody uses any more, it removes now.
    pub fn own_sockets(&self) {
        let unused = std::mem::take(&mut *lock(&self.former));
        let unused: Vec<_> = unused.into_keys().map(|path| self.former_file(&path)).collect();
        for socket in lock(&self.unowned).drain(..) {
            let path = socket.path.display();
            match self.supervisor.inherit(&socket.path) {
                Ok(file) => drop(socket.file.set(file)),
                Err(error) => tracing::warn!("{path} stays when the bus ends: {error}"),
            }
        }
        drop(unused);
    }
}
