// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus with its sockets. Each device of the bus has a socket, unless it takes no drivers.

mod handed_over;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError,
};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value, json};
use vbus_core::memory::limit_pages;
use vbus_core::{Bus, DeviceClass, Endpoint, Executor, lock};
use vbus_pci::Options;
use vbus_sched::SchedClass;
use vbus_vfio_user::{DeviceServer, SavedServer};
use vbus_virtio::vhost_user::{self, Stats, VhostUserServer};

use super::control;
use super::inherited::{Inherited, Lease};
use crate::access::Access;
use crate::classes;
use crate::config::{Config, DeviceSpec};
use crate::keeper::Keeping;
use crate::sandbox::Protections;
use crate::supervisor::{RemoteThreads, SocketFile, Supervisor};
use crate::telemetry::Table;
use vbus_cli::rundir::{self, Claimed};

/// The most clients of a device that wait to be accepted.
const BACKLOG: i32 = 8;

/// The time between two looks whether devices are still being changed.
const PAUSE: Duration = Duration::from_millis(2);

/// The bus and the servers of its devices.
pub struct Host {
    claimed: Claimed,
    inherited: Inherited,
    bus: Bus,
    supervisor: Arc<Supervisor>,
    protections: Protections,
    /// Each device, by name. It is not locked while a device is made or removed, because a back end
    /// may take long for that.
    served: Mutex<BTreeMap<String, Member>>,
    /// Locked while a device takes other settings, before `served`: each change begins with those
    /// that the one before has left.
    settings: Mutex<()>,
    /// The sockets that belong to no device: duplicates, for a bus that takes over.
    own: Mutex<Vec<(PathBuf, OwnedFd)>>,
    /// The sockets of the bus whose place this one has taken, until somebody uses them.
    former: Mutex<HashMap<PathBuf, OwnedFd>>,
    /// The files of those sockets, until the supervisor has charge of them.
    unowned: Mutex<Vec<Arc<FormerSocket>>>,
    /// What gives the keeper the states of devices, if the bus has one.
    keeping: Mutex<Option<Arc<Keeping>>>,
    /// Whoever changes devices reads it. While the bus is being handed over, nobody does.
    turn: RwLock<()>,
}

/// A device of the bus.
struct Member {
    spec: DeviceSpec,
    /// `None`: it takes no drivers.
    served: Option<Served>,
}

/// The socket of the bus whose place this one has taken.
pub struct FormerSocket {
    path: PathBuf,
    /// Its file, once the supervisor has charge of it.
    file: OnceLock<SocketFile>,
}

/// A device's server and its socket.
struct Served {
    server: Server,
    _held: Held,
}

/// The server of a device's socket, by the protocol that it speaks there.
enum Server {
    VfioUser(DeviceServer),
    VhostUser(VhostUserServer),
}

impl Server {
    fn start(
        endpoint: &Arc<Endpoint>,
        listener: OwnedFd,
        path: &Path,
        options: Options,
    ) -> io::Result<Server> {
        if vhost_user::has_front(endpoint) {
            return VhostUserServer::with_listener(endpoint, listener, path).map(Server::VhostUser);
        }
        let server = DeviceServer::with_listener(endpoint.clone(), listener, path, options);
        server.map(Server::VfioUser)
    }

    /// The name of the protocol.
    fn protocol(&self) -> &'static str {
        match self {
            Server::VfioUser(_) => "vfio-user",
            Server::VhostUser(_) => "vhost-user",
        }
    }

    fn path(&self) -> &Path {
        match self {
            Server::VfioUser(server) => server.path(),
            Server::VhostUser(server) => server.path(),
        }
    }

    fn is_connected(&self) -> bool {
        match self {
            Server::VfioUser(server) => server.is_connected(),
            Server::VhostUser(server) => server.is_connected(),
        }
    }

    fn stats(&self) -> Stats {
        match self {
            Server::VfioUser(server) => server.stats(),
            Server::VhostUser(server) => server.stats(),
        }
    }

    /// As [`DeviceServer::hold`].
    ///
    /// # Errors
    /// The same; or no other process can take the server over.
    fn hold(&self, by: Instant) -> Result<()> {
        match self {
            Server::VfioUser(server) => Ok(server.hold(by)?),
            Server::VhostUser(_) => bail!(vhost_user::NOT_SAVED),
        }
    }

    /// As [`DeviceServer::release`].
    fn release(&self) {
        if let Server::VfioUser(server) = self {
            server.release();
        }
    }

    /// As [`DeviceServer::save`].
    ///
    /// # Errors
    /// As [`hold`](Self::hold).
    fn save(&self) -> Result<SavedServer> {
        match self {
            Server::VfioUser(server) => server.save().map_err(anyhow::Error::msg),
            Server::VhostUser(_) => bail!(vhost_user::NOT_SAVED),
        }
    }
}

/// What keeps a socket of the bus its own. Dropping it gives the socket up.
pub enum Held {
    /// The bus made it. Its file goes with this.
    Made(#[expect(dead_code, reason = "it acts when it is dropped")] SocketFile),
    /// It was inherited. It stays, for the next one who needs it.
    Inherited(#[expect(dead_code, reason = "it acts when it is dropped")] Lease),
    /// A former bus made it. Its file goes with this.
    Former(#[expect(dead_code, reason = "it acts when it is dropped")] Arc<FormerSocket>),
}

impl Host {
    /// Starts an empty bus that has the classes of vbus and `more`. `supervisor` opens what the
    /// devices need. `inherited` are sockets that exist already. `protections` are those of this
    /// process.
    pub fn start(
        claimed: Claimed,
        inherited: Inherited,
        supervisor: Arc<Supervisor>,
        config: &Config,
        more: Vec<Box<dyn DeviceClass>>,
        protections: Protections,
    ) -> Result<Host> {
        let executor = Executor::start(config.tuning).context("starting the event loop")?;
        let threads = Arc::new(RemoteThreads(supervisor.clone()));
        let classes = classes::all(supervisor.clone(), SchedClass::through(threads), more)?;
        let bus = Bus::new(executor, classes);
        limit_pages(config.guest_memory);
        Ok(Host {
            claimed,
            inherited,
            bus,
            supervisor,
            protections,
            served: Mutex::default(),
            settings: Mutex::default(),
            own: Mutex::default(),
            former: Mutex::default(),
            unowned: Mutex::default(),
            keeping: Mutex::default(),
            turn: RwLock::default(),
        })
    }

    /// What opens things for this bus.
    pub fn supervisor(&self) -> &Arc<Supervisor> {
        &self.supervisor
    }

    /// The protections of this process.
    pub fn protections(&self) -> Protections {
        self.protections
    }

    /// The event loop of all devices.
    pub fn executor(&self) -> &Arc<Executor> {
        self.bus.executor()
    }

    /// The directory of the sockets.
    pub fn dir(&self) -> &Path {
        self.claimed.path()
    }

    /// Whether users other than the bus's own can reach sockets in the directory.
    pub fn is_shared(&self) -> bool {
        self.claimed.is_shared()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Member>> {
        lock(&self.served)
    }

    /// Whoever changes devices holds this meanwhile. While the bus is being handed over, it waits.
    pub fn change(&self) -> RwLockReadGuard<'_, ()> {
        self.turn.read().unwrap_or_else(|e| e.into_inner())
    }

    /// Waits until nobody changes devices, but no longer than `by`. While the result is held,
    /// nobody does.
    pub fn stand_still(&self, by: Instant) -> Option<RwLockWriteGuard<'_, ()>> {
        loop {
            match self.turn.try_write() {
                Ok(turn) => return Some(turn),
                Err(TryLockError::Poisoned(turn)) => return Some(turn.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() >= by => return None,
                Err(TryLockError::WouldBlock) => std::thread::sleep(PAUSE),
            }
        }
    }

    /// Takes the inherited socket at `path`, or makes one; see [`Supervisor::listen`]. An inherited
    /// one has its own backlog and access, and its file stays.
    pub fn listen(
        &self,
        path: &Path,
        backlog: i32,
        access: &Access,
    ) -> io::Result<(OwnedFd, Held)> {
        if let Some((listener, lease)) = self.inherited.take(path)? {
            return Ok((listener, Held::Inherited(lease)));
        }
        if let Some(listener) = lock(&self.former).remove(path) {
            return Ok((listener, self.former_file(path)));
        }
        let (listener, file) = self.supervisor.listen(path, backlog, access)?;
        Ok((listener, Held::Made(file)))
    }

    /// As [`listen`](Self::listen), for a socket that belongs to no device.
    pub fn listen_for_itself(
        &self,
        path: &Path,
        backlog: i32,
        access: &Access,
    ) -> io::Result<(OwnedFd, Held)> {
        let (listener, held) = self.listen(path, backlog, access)?;
        if !matches!(held, Held::Inherited(_)) {
            lock(&self.own).push((path.to_owned(), listener.try_clone()?));
        }
        Ok((listener, held))
    }

    /// Lets clients of the control socket see this process as the one that serves (SO_PEERCRED): it
    /// is the one that has called listen(2) last, and not the supervisor, the service manager or
    /// another bus.
    ///
    /// # Errors
    /// The system refuses.
    pub fn be_seen(&self) -> io::Result<()> {
        let path = self.dir().join(rundir::CONTROL);
        for (of, socket, _) in self.sockets()? {
            if of == path {
                rustix::net::listen(&socket, control::BACKLOG)?;
            }
        }
        Ok(())
    }

    /// The file of a socket at `path` that the former bus made.
    fn former_file(&self, path: &Path) -> Held {
        let socket = Arc::new(FormerSocket { path: path.to_owned(), file: OnceLock::new() });
        lock(&self.unowned).push(socket.clone());
        Held::Former(socket)
    }

    /// Makes a device and starts its server, if it takes drivers.
    pub fn add(&self, spec: DeviceSpec) -> Result<Arc<Endpoint>> {
        let path = self.dir().join(spec.socket_path());
        rundir::check_socket_path(&path)?;
        spec.check_class(self.bus.classes())?;
        let endpoint = self.bus.create(&spec.name, &spec.class, &spec.settings)?;
        if let Some(pic) = &spec.pic {
            endpoint.set_router(pic);
        }
        if !endpoint.device().takes_drivers() {
            self.lock().insert(spec.name.clone(), Member { spec, served: None });
            return self.keep_or_remove(endpoint);
        }
        let listening = self.listen(&path, BACKLOG, &spec.socket.access);
        let server = listening.and_then(|(listener, held)| {
            let server = Server::start(&endpoint, listener, &path, spec.options)?;
            Ok(Served { server, _held: held })
        });
        match server {
            Ok(server) => {
                self.lock().insert(spec.name.clone(), Member { spec, served: Some(server) });
                self.keep_or_remove(endpoint)
            }
            Err(error) => {
                let _ = self.bus.remove(&spec.name);
                Err(error).with_context(|| format!("cannot serve {}", path.display()))
            }
        }
    }

    /// Lets the keeper keep a new device. A device that cannot be kept does not stay.
    fn keep_or_remove(&self, endpoint: Arc<Endpoint>) -> Result<Arc<Endpoint>> {
        if let Err(error) = self.keep_new(&endpoint) {
            let _ = self.remove(endpoint.name(), true);
            return Err(error);
        }
        Ok(endpoint)
    }

    /// Checks whether a device could be made, as far as that is possible without making it. It may
    /// be on the bus already.
    pub fn check(&self, spec: &DeviceSpec) -> Result<()> {
        rundir::check_socket_path(&self.dir().join(spec.socket_path()))?;
        spec.check_class(self.bus.classes())?;
        match self.bus.get(&spec.name) {
            Ok(_) => self.bus.check_settings(&spec.name, &spec.class, &spec.settings)?,
            Err(_) => self.bus.check(&spec.name, &spec.class, &spec.settings)?,
        }
        Ok(())
    }

    /// Changes a device to `new` from what it is now, without removing it. Returns the keys that
    /// changed.
    ///
    /// # Errors
    /// The device would have to be made anew. The keys that differ, and the reason.
    pub fn reconfigure(&self, new: &DeviceSpec) -> Result<Vec<String>, (Vec<String>, String)> {
        let _turn = lock(&self.settings);
        let old = self.spec(&new.name).map_err(|error| (Vec::new(), error.to_string()))?;
        let changed = self.change_settings(&old, new)?;
        // The change stands, and the log says why it does not outlast this process.
        let _ = self.commit(&new.name);
        Ok(changed)
    }

    /// What the device `name` was made from, with the changes since then.
    fn spec(&self, name: &str) -> Result<DeviceSpec> {
        let spec = self.lock().get(name).map(|member| member.spec.clone());
        spec.with_context(|| format!("there is no device {name:?}"))
    }

    /// The caller holds the lock of `settings`.
    fn change_settings(
        &self,
        old: &DeviceSpec,
        new: &DeviceSpec,
    ) -> Result<Vec<String>, (Vec<String>, String)> {
        let (keys, is_own) = new.changed_keys(old);
        if keys.is_empty() {
            return Ok(keys);
        }
        let endpoint = self.bus.get(&new.name);
        if let (Ok(endpoint), false) = (&endpoint, self.is_kept()) {
            endpoint.device().outlast_no_more();
        }
        let changed = match endpoint {
            Err(error) => Err(error.to_string()),
            Ok(_) if !is_own => Err("the bus takes these only when it makes the device".into()),
            Ok(endpoint) => endpoint.device().reconfigure(&old.settings, &new.settings),
        };
        match changed {
            Ok(()) => {
                if let Some(member) = self.lock().get_mut(&new.name) {
                    member.spec = new.clone();
                }
                Ok(keys)
            }
            Err(reason) => Err((keys, reason)),
        }
    }

    /// Changes settings of a device while it is on the bus. Returns the keys that changed.
    ///
    /// # Errors
    /// There is no such device, or it cannot take them now.
    pub fn set(&self, name: &str, settings: Map<String, Value>) -> Result<Vec<String>> {
        let _turn = lock(&self.settings);
        let old = self.spec(name)?;
        if let Some(key) = settings.keys().find(|key| DeviceSpec::KEYS.contains(&&***key)) {
            bail!(
                "{key:?} is one of the settings that the bus takes only when it makes the device"
            );
        }
        let mut new = old.clone();
        if let Some(all) = new.settings.as_object_mut() {
            all.extend(settings);
        }
        self.bus.check_settings(name, &new.class, &new.settings)?;
        let changed = self
            .change_settings(&old, &new)
            .map_err(|(keys, reason)| anyhow!("{name}: {}: {reason}", keys.join(", ")))?;
        self.commit(name)?;
        Ok(changed)
    }

    /// Whether a client is connected to the device.
    pub fn is_connected(&self, name: &str) -> bool {
        let served = self.lock();
        let server = served.get(name).and_then(|member| member.served.as_ref());
        server.is_some_and(|served| served.server.is_connected())
    }

    /// Removes a device. Without `force` this fails while a client is connected to the device.
    pub fn remove(&self, name: &str, force: bool) -> Result<()> {
        self.bus.get(name)?;
        let server = match self.lock().entry(name.to_owned()) {
            Entry::Vacant(_) => bail!("{name:?} is being added or removed at the moment"),
            Entry::Occupied(entry)
                if !force
                    && entry.get().served.as_ref().is_some_and(|s| s.server.is_connected()) =>
            {
                bail!(
                    "{name:?} is in use by a virtual machine or a driver process; unplug it first \
                     (--qmp SOCKET does both), or use --force"
                )
            }
            Entry::Occupied(entry) => entry.remove(),
        };
        // The server ends first, and disconnects the client, so that nobody uses the device when
        // the bus removes it.
        drop(server);
        self.bus.remove(name)?;
        if let Some(keeping) = self.keeping().filter(|keeping| keeping.is_open()) {
            // Without the keeper nobody starts another bus.
            let _ = keeping.gone(name);
        }
        Ok(())
    }

    /// The device called `name`.
    pub fn get(&self, name: &str) -> Result<Arc<Endpoint>> {
        Ok(self.bus.get(name)?)
    }

    /// The state and the counters of the device `name`, or of all devices.
    pub fn inspect(&self, name: Option<&str>) -> Result<Vec<Value>> {
        let endpoints = match name {
            Some(name) => vec![self.bus.get(name)?],
            None => self.bus.devices(),
        };
        Ok(endpoints.iter().map(|endpoint| self.inspect_one(endpoint)).collect())
    }

    fn inspect_one(&self, endpoint: &Endpoint) -> Value {
        let mut value = endpoint.inspect();
        let served = self.lock();
        let member = served.get(endpoint.name());
        if let (Value::Object(map), Some(Member { served: Some(Served { server, .. }), .. })) =
            (&mut value, member)
        {
            let stats = server.stats();
            map.insert("socket".into(), json!(server.path()));
            map.insert("protocol".into(), json!(server.protocol()));
            map.insert("connected".into(), json!(server.is_connected()));
            map.insert(
                "connector".into(),
                json!({
                    "clients": stats.clients,
                    "refused": stats.refused,
                    "messages": stats.messages,
                    "failures": stats.failures,
                    "violations": stats.violations,
                }),
            );
        }
        value
    }

    /// What the numbers of the devices mean.
    pub fn table(&self) -> Table {
        Table::new(self.bus.classes())
    }

    /// The name and the help text of each class.
    pub fn classes(&self) -> Value {
        classes::describe(self.bus.classes())
    }

    /// Ends all servers, and removes all devices.
    pub fn stop(&self) {
        let served = std::mem::take(&mut *self.lock());
        lock(&self.own).clear();
        for (name, member) in served {
            drop(member);
            let _ = self.bus.remove(&name);
        }
        self.supervisor.stop();
        self.claimed.release();
    }
}
