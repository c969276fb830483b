// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus as another process takes it over: all that it has, and how it stops and goes on.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::net::{Shutdown, shutdown};
use vbus_core::{DeviceState, Endpoint, lock};
use vbus_vfio_user::{Closer, DeviceServer, Keep, SavedServer};

use super::{Held, Host, Member, Served, Server};
use crate::config::DeviceSpec;
use crate::keeper::Keeping;
use crate::take_over::{DeviceContent, DeviceParcel, Remains, StatePart};

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
                let SavedServer { data, descriptors, .. } = saved;
                (opened, descriptors, StatePart::Served(Box::new(data)))
            }
            None => (opened, Vec::new(), StatePart::Alone(Box::new(endpoint.save()?))),
        })
    }
}

/// How long a device may be busy before it cannot be kept.
const KEEP_WAIT: Duration = Duration::from_secs(5);

/// The bus that a keeper keeps (spec/keeper.md).
impl Host {
    /// What gives the keeper the states of devices, if the bus has a keeper or had one.
    pub fn keeping(&self) -> Option<Arc<Keeping>> {
        lock(&self.keeping).clone()
    }

    /// Whether the bus has a keeper now.
    pub fn is_kept(&self) -> bool {
        self.keeping().is_some_and(|keeping| keeping.is_open())
    }

    /// Checks that all devices can be kept.
    ///
    /// # Errors
    /// One cannot. The text has its name and its class.
    pub fn check_kept(&self) -> Result<()> {
        struct Nobody;
        impl Keep for Nobody {
            fn keep(&self, _: &Endpoint, _: SavedServer) -> Result<(), String> {
                Ok(())
            }
        }
        for (name, member) in self.lock().iter() {
            let endpoint = self.bus.get(name)?;
            let checked = self.keep_member(&endpoint, member, Arc::new(Nobody), &mut |_, _| Ok(()));
            if let Some(Served { server: Server::VfioUser(server), .. }) = &member.served {
                let _ = server.keep_no_more(Instant::now() + KEEP_WAIT);
            }
            checked?;
        }
        Ok(())
    }

    /// Gives all of the bus to its keeper, and each change of a device from now on. Devices that
    /// stand still do so afterwards.
    ///
    /// # Errors
    /// A device cannot be kept, or the keeper has gone.
    pub fn keep(&self, keeping: &Arc<Keeping>) -> Result<()> {
        // If this process is killed, the sockets stay.
        self.supervisor.set_leaving(true).context("the supervisor does not answer")?;
        keeping.supervisor(self.supervisor.process()?.as_fd())?;
        keeping.lease()?;
        if let Some(former) = lock(&self.keeping).replace(keeping.clone()) {
            former.replaced();
        }
        for (name, member) in self.lock().iter() {
            let endpoint = self.bus.get(name)?;
            self.give(keeping, &endpoint, member)?;
        }
        keeping.bus()?;
        Ok(keeping.whole()?)
    }

    /// The keeper has not got all of this bus. It may find this process dead before it notices, and
    /// must then not go on from what the former bus left.
    pub fn forsake_former(&self) {
        for member in self.lock().values() {
            if let Some(Served { server: Server::VfioUser(server), .. }) = &member.served {
                server.forsake_former();
            }
        }
    }

    /// Gives a device to the keeper, if there is one, and each change of it from now on.
    pub(super) fn keep_new(&self, endpoint: &Endpoint) -> Result<()> {
        let Some(keeping) = self.keeping().filter(|keeping| keeping.is_open()) else {
            return Ok(());
        };
        let members = self.lock();
        let member = members.get(endpoint.name()).context("the device has gone")?;
        self.give(&keeping, endpoint, member)
    }

    fn give(&self, keeping: &Arc<Keeping>, endpoint: &Endpoint, member: &Member) -> Result<()> {
        keeping.set_settings(endpoint.name(), &member.spec.settings);
        let mut alone = |endpoint: &Endpoint, state| keeping.alone(endpoint, state);
        self.keep_member(endpoint, member, keeping.clone(), &mut alone)
    }

    fn keep_member(
        &self,
        endpoint: &Endpoint,
        member: &Member,
        keep: Arc<dyn Keep>,
        alone: &mut dyn FnMut(&Endpoint, DeviceState) -> Result<(), String>,
    ) -> Result<()> {
        let by = Instant::now() + KEEP_WAIT;
        let kept = match &member.served {
            Some(Served { server: Server::VfioUser(server), .. }) => server.keep_with(keep, by),
            // Nobody can tell which requests of its front end are answered. That connects again to
            // the device that the next bus makes (spec/keeper.md, "Classes").
            Some(_) => Ok(()),
            None => outlasting(endpoint, by).and_then(|state| alone(endpoint, state)),
        };
        let class = &member.spec.class;
        kept.map_err(|why| {
            anyhow!("device {:?} of class {class:?} cannot be kept: {why}", endpoint.name())
        })
    }

    /// Something else than a message of its client has changed a device: gives its state to the
    /// keeper, if there is one.
    ///
    /// # Errors
    /// It has not got it. The change stands. The text is for whoever asked for it.
    pub fn commit(&self, name: &str) -> Result<()> {
        let Some(keeping) = self.keeping().filter(|keeping| keeping.is_open()) else {
            return Ok(());
        };
        let (Ok(endpoint), members) = (self.bus.get(name), self.lock()) else { return Ok(()) };
        let Some(member) = members.get(name) else { return Ok(()) };
        keeping.set_settings(name, &member.spec.settings);
        let by = Instant::now() + KEEP_WAIT;
        let kept = match &member.served {
            Some(Served { server: Server::VfioUser(server), .. }) => server.commit(by),
            Some(_) => Ok(()),
            None => outlasting(&endpoint, by).and_then(|state| keeping.alone(&endpoint, state)),
        };
        kept.map_err(|why| {
            tracing::warn!(device = name, "its last change does not outlast this process: {why}");
            anyhow!("{name} has changed, but the keeper has not got that: {why}")
        })
    }

    /// Devices have come or gone, or the bus has other settings of them: tells the keeper, if there
    /// is one.
    pub fn tell_keeper(&self) {
        let Some(keeping) = self.keeping().filter(|keeping| keeping.is_open()) else { return };
        if let Err(error) = keeping.bus() {
            tracing::warn!("the last change of the bus does not outlast this process: {error:#}");
        }
    }
}

/// The state of a device that takes no drivers, to outlast this process.
fn outlasting(endpoint: &Endpoint, by: Instant) -> Result<DeviceState, String> {
    let stood_still = endpoint.is_quiesced();
    endpoint.quiesce_to_outlast(by).map_err(|error| error.to_string())?;
    let state = endpoint.save().map_err(|error| error.to_string());
    if !stood_still {
        endpoint.resume();
    }
    state
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

    /// As [`restore`](Self::restore), of a bus that has died. If it fails, nothing of the device is
    /// left.
    ///
    /// # Errors
    /// The same.
    pub fn restore_or_leave(
        &self,
        spec: DeviceSpec,
        parcel: DeviceParcel,
    ) -> Result<Arc<Endpoint>> {
        self.check(&spec)?;
        let name = spec.name.clone();
        ensure!(self.bus.get(&name).is_err(), "the state has two devices {name:?}");
        self.restore(spec, parcel).inspect_err(|_| {
            // It has not been made, or nobody needs it.
            let _ = self.bus.remove(&name);
        })
    }

    /// Makes a device anew whose bus has died, and whose state nobody can go on from. The
    /// connections of its clients end.
    ///
    /// # Errors
    /// It cannot be made. The connections end all the same.
    pub fn make_anew(&self, spec: DeviceSpec, remains: Remains) -> Result<Arc<Endpoint>> {
        let Remains { opened, listener, connections } = remains;
        for connection in &connections {
            // The keeper has it, too, so closing it tells the client nothing.
            let _ = shutdown(connection, Shutdown::Both);
        }
        Closer::let_go(connections);
        let (name, path) = (spec.name.clone(), self.dir().join(spec.socket_path()));
        if let Some(listener) = listener.filter(|_| !self.inherited.has(&path)) {
            lock(&self.former).insert(path, listener);
        }
        self.supervisor.keep(&name, opened);
        self.add(spec).inspect_err(|_| self.supervisor.keep(&name, Vec::new()))
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
