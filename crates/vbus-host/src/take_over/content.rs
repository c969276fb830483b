// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the two buses tell each other (spec/take-over.md, "Offer" and "State").

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::io::ioctl_fionbio;
use rustix::net::{AddressFamily, sockopt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_core::DeviceState;
use vbus_pci::Options;
use vbus_vfio_user::{Held, SavedData, SavedServer};

use super::steps::Parcel;
use crate::access::SocketSpec;
use crate::config::DeviceSpec;

/// The format of the messages. Both buses must have the same, and the same format of the states of
/// devices (`vbus_core::state::FORMAT`). Another one with each change to these messages, to those
/// of a keeper (`keeper::kind`), or to the journals of vfio-user servers.
pub const FORMAT: u32 = 2;

/// What the new bus prepares with. Descriptors: the lock of the directory, the sockets in their
/// order, the port, the socket of the service manager.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// The version of the leaving program.
    pub version: String,
    /// Its process.
    pub pid: i32,
    /// The sockets that belong to no device, and those that the service manager has made.
    pub sockets: Vec<Socket>,
    /// The TCP port of the metrics.
    pub port: Option<SocketAddr>,
    /// The service manager is told of the new process.
    pub manager: Option<ManagerPart>,
    /// The devices. They may change no more.
    pub devices: Vec<Spec>,
    /// The bound of the guests' memory that can be charged to the bus (`guest-memory-mib`), in
    /// bytes. It holds for the next bus of a keeper whose configuration file is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_memory: Option<u64>,
}

impl Offer {
    /// The files of the sockets that the bus in `dir` has made: its own, those of its devices, and
    /// those at which their back ends listen. A bus that was taken over may name any.
    pub fn files(&self, dir: &Path) -> BTreeSet<PathBuf> {
        let inherited = |path: &PathBuf| {
            self.sockets.iter().any(|socket| socket.inherited && socket.path == *path)
        };
        let own = self.sockets.iter().map(|socket| socket.path.clone());
        let devices = self.devices.iter().flat_map(|spec| {
            let listens = spec.settings.get("listen").and_then(Value::as_str);
            let listens = listens.and_then(|path| std::path::absolute(path).ok());
            [Some(dir.join(spec.device().socket_path())), listens].into_iter().flatten()
        });
        own.chain(devices).filter(|path| !inherited(path)).collect()
    }
}

/// A socket that listens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Socket {
    pub path: PathBuf,
    /// The service manager has made it.
    pub inherited: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManagerPart {
    /// The longest time between two signs of life, in microseconds.
    pub watchdog: Option<u64>,
}

impl ManagerPart {
    /// The longest time between two signs of life.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog.filter(|micros| *micros > 0).map(Duration::from_micros)
    }
}

/// How a device was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    pub name: String,
    pub class: String,
    pub msix: bool,
    pub express: bool,
    pub pic: Option<String>,
    pub socket: SocketSpec,
    pub settings: Value,
    /// The device is in the configuration file, and was not added by hand.
    pub configured: bool,
}

impl Spec {
    pub fn new(spec: &DeviceSpec, configured: bool) -> Spec {
        let DeviceSpec { name, class, options, pic, socket, settings } = spec.clone();
        let Options { msix, express } = options;
        Spec { name, class, msix, express, pic, socket, settings, configured }
    }

    pub fn device(&self) -> DeviceSpec {
        let Spec { name, class, msix, express, pic, socket, settings, .. } = self.clone();
        DeviceSpec { name, class, options: Options { msix, express }, pic, socket, settings }
    }
}

/// The state of all devices.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// When the leaving bus stopped, in nanoseconds of CLOCK_MONOTONIC.
    pub stopped: u64,
    /// As many as the offer has, in the same order.
    pub devices: Vec<DevicePart>,
    /// Of a bus that has died: the descriptors of messages, behind those of all devices. A bus that
    /// leaves has none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held: Vec<HeldPart>,
}

/// The descriptors of a message of a device's client that a bus was about to receive.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldPart {
    pub name: String,
    pub number: u64,
    pub descriptors: u32,
}

/// A device. Descriptors: those of its back end, then those of its server.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DevicePart {
    pub name: String,
    /// The settings with which an equal device is made: those of the offer, with what the device
    /// has chosen itself, for example its address.
    pub settled: Value,
    /// The names of its back end's descriptors.
    pub opened: Vec<String>,
    /// The number of its server's descriptors.
    pub descriptors: u32,
    pub state: StatePart,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
pub enum StatePart {
    /// A device with a socket.
    Served(Box<SavedData>),
    /// A device that takes no drivers.
    Alone(Box<DeviceState>),
}

/// What a new bus has of the leaving one before it makes its devices.
#[derive(Debug)]
pub struct Handed {
    pub offer: Offer,
    pub lock: OwnedFd,
    /// In the order of [`Offer::sockets`].
    pub sockets: Vec<OwnedFd>,
    pub port: Option<OwnedFd>,
    pub manager: Option<OwnedFd>,
}

/// A device's state, with what belongs to it.
pub struct DeviceParcel {
    pub name: String,
    pub settled: Value,
    pub opened: Vec<(String, OwnedFd)>,
    pub state: DeviceContent,
}

pub enum DeviceContent {
    Served(Box<SavedServer>),
    Alone(Box<DeviceState>),
}

/// What of a device outlasts a state that nobody can go on from: enough to make it anew. All are
/// duplicates.
#[derive(Debug, Default)]
pub struct Remains {
    /// The descriptors of its back end.
    pub opened: Vec<(String, OwnedFd)>,
    /// Where its clients connect.
    pub listener: Option<OwnedFd>,
    /// The connections of its clients, which can only end.
    pub connections: Vec<OwnedFd>,
}

impl Remains {
    /// Those of a device. What this process has no descriptors for is not among them: a back end is
    /// then opened again, and a connection ends when the keeper lets go of it.
    pub fn of(parcel: &DeviceParcel) -> Remains {
        let opened = parcel.opened.iter();
        let opened = opened.filter_map(|(name, fd)| Some((name.clone(), fd.try_clone().ok()?)));
        let mut remains = Remains { opened: opened.collect(), ..Remains::default() };
        if let DeviceContent::Served(saved) = &parcel.state {
            let mut sockets = saved.sockets().map(|fd| fd.try_clone_to_owned());
            let listener = sockets.next().and_then(Result::ok);
            remains.listener =
                listener.filter(|fd| check_socket(fd, &[AddressFamily::UNIX], true).is_ok());
            remains.connections = sockets.flatten().collect();
        }
        remains
    }
}

/// A message as a parcel.
pub fn pack(content: &impl Serialize, descriptors: Vec<OwnedFd>) -> Result<Parcel> {
    Ok(Parcel { body: serde_json::to_vec(content)?, descriptors })
}

/// Reads a message, if it does not take much more memory than its length.
///
/// # Errors
/// It does, or it is another one.
pub fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    vbus_core::state::check_weight(body)?;
    Ok(serde_json::from_slice(body)?)
}

/// Reads an offer.
///
/// # Errors
/// It is none, or its descriptors are not those that it counts, or of another kind.
pub fn read_offer(parcel: Parcel) -> Result<Handed> {
    let offer: Offer = read(&parcel.body)?;
    let mut rest = parcel.descriptors.into_iter();
    let Some(lock) = rest.next() else { bail!("the offer has no lock") };
    let sockets: Vec<_> = rest.by_ref().take(offer.sockets.len()).collect();
    let port = offer.port.and_then(|_| rest.next());
    let manager = offer.manager.as_ref().and_then(|_| rest.next());
    if sockets.len() != offer.sockets.len()
        || port.is_some() != offer.port.is_some()
        || manager.is_some() != offer.manager.is_some()
        || rest.next().is_some()
    {
        bail!("the offer has too many or too few descriptors");
    }
    for (Socket { path, .. }, socket) in offer.sockets.iter().zip(&sockets) {
        check_socket(socket, &[AddressFamily::UNIX], true)
            .with_context(|| path.display().to_string())?;
    }
    if let Some(port) = &port {
        check_socket(port, &[AddressFamily::INET, AddressFamily::INET6], true)
            .context("the port")?;
    }
    if let Some(manager) = &manager {
        check_socket(manager, &[AddressFamily::UNIX], false)
            .context("the socket of the service manager")?;
    }
    Ok(Handed { offer, lock, sockets, port, manager })
}

/// Checks that a descriptor is a socket of one of these families, which listens or not, and makes
/// it non-blocking, as it should be.
fn check_socket(socket: &OwnedFd, families: &[AddressFamily], listens: bool) -> Result<()> {
    ensure!(
        sockopt::socket_domain(socket).is_ok_and(|family| families.contains(&family))
            && sockopt::socket_acceptconn(socket) == Ok(listens),
        "the other bus has handed over a descriptor of another kind"
    );
    Ok(ioctl_fionbio(socket, true)?)
}

/// Reads a state. Returns when the leaving bus stopped, and its devices.
///
/// # Errors
/// It is none, or its descriptors are not those that it counts.
pub fn read_state(parcel: Parcel) -> Result<(u64, Vec<DeviceParcel>)> {
    let State { stopped, devices, held } = read(&parcel.body)?;
    let mut rest = parcel.descriptors.into_iter();
    let mut take = |count: usize| -> Result<Vec<OwnedFd>> {
        let taken: Vec<_> = rest.by_ref().take(count).collect();
        if taken.len() == count { Ok(taken) } else { bail!("the state lacks descriptors") }
    };
    let mut parcels = Vec::new();
    for DevicePart { name, settled, opened, descriptors, state } in devices {
        let of_back_end = take(opened.len())?;
        // A back end must not wait at one, whatever it is.
        of_back_end.iter().try_for_each(|fd| ioctl_fionbio(fd, true))?;
        let of_server = take(descriptors as usize)?;
        let state = match state {
            StatePart::Served(data) => {
                let held = Held::default();
                let saved = SavedServer { data: *data, descriptors: of_server, held };
                DeviceContent::Served(Box::new(saved))
            }
            StatePart::Alone(state) if of_server.is_empty() => DeviceContent::Alone(state),
            StatePart::Alone(_) => bail!("the state of device {name:?} has descriptors"),
        };
        let opened = opened.into_iter().zip(of_back_end).collect();
        parcels.push(DeviceParcel { name, settled, opened, state });
    }
    for HeldPart { name, number, descriptors } in held {
        let fds = take(descriptors as usize)?;
        let mut parcels = parcels.iter_mut();
        let Some(parcel) = parcels.find(|parcel| parcel.name == name) else {
            bail!("the state has a message of {name:?}, which is no device");
        };
        if let DeviceContent::Served(saved) = &mut parcel.state {
            saved.held = Held { number, fds };
        }
    }
    if rest.next().is_some() {
        bail!("the state has too many descriptors");
    }
    Ok((stopped, parcels))
}

/// Nanoseconds of CLOCK_MONOTONIC, which all processes share.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs().wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixListener};

    use rustix::fs::{OFlags, fcntl_getfl};
    use serde_json::json;

    use super::*;

    fn is_non_blocking(fd: &OwnedFd) -> bool {
        fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK)
    }

    #[test]
    fn descriptors_of_an_offer_that_are_of_another_kind_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let unix = UnixListener::bind(dir.path().join("socket")).unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (datagram, _peer) = UnixDatagram::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let all =
            [OwnedFd::from(file), OwnedFd::from(unix), OwnedFd::from(tcp), OwnedFd::from(datagram)];
        let body = json!({
            "version": "1",
            "pid": 1,
            "sockets": [{ "path": "/d/control.sock", "inherited": false }],
            "port": "127.0.0.1:9",
            "manager": { "watchdog": 0 },
            "devices": [],
        });
        // The lock may be anything here: whoever takes it checks it.
        let read = |places: [usize; 4]| {
            let descriptors = places.map(|at| all[at].try_clone().unwrap()).into();
            read_offer(Parcel { body: body.to_string().into_bytes(), descriptors })
        };
        let handed = read([0, 1, 2, 3]).unwrap();
        assert_eq!(handed.offer.manager.unwrap().watchdog(), None);
        assert!(is_non_blocking(&handed.sockets[0]) && is_non_blocking(&handed.port.unwrap()));
        assert!(is_non_blocking(&handed.manager.unwrap()));
        let (right, names) = ([1, 2, 3], ["/d/control.sock", "the port", "the service manager"]);
        for (place, name) in names.into_iter().enumerate() {
            for wrong in (0..all.len()).filter(|at| *at != right[place]) {
                let mut places = [0, 1, 2, 3];
                places[1 + place] = wrong;
                let text = format!("{:#}", read(places).unwrap_err());
                assert!(text.contains(name) && text.contains("another kind"), "{wrong}: {text}");
            }
        }
    }

    #[test]
    fn a_body_that_would_take_much_memory_is_not_read() {
        let body = format!("[{}0]", "{\"\":0},".repeat(1 << 20)).into_bytes();
        let parcel = || Parcel { body: body.clone(), descriptors: Vec::new() };
        let errors = [read_offer(parcel()).map(drop), read_state(parcel()).map(drop)];
        for error in errors {
            let text = format!("{:#}", error.unwrap_err());
            assert!(text.contains("more objects"), "{text}");
        }
    }

    #[test]
    fn descriptors_of_a_back_end_do_not_block() {
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let device = json!({
            "class": "uplink",
            "regions": 0,
            "vectors": 1,
            "incarnation": 1,
            "config": { "generation": 0, "bytes": "" },
            "events": { "pending": 0, "vector": null },
            "counters": {},
            "connection": "closed",
            "device": {},
        });
        let body = json!({
            "stopped": 0,
            "devices": [{
                "name": "u0",
                "settled": {},
                "opened": ["tap.0"],
                "descriptors": 0,
                "state": { "alone": device },
            }],
        });
        let body = body.to_string().into_bytes();
        let (_, mut parcels) = read_state(Parcel { body, descriptors: vec![reader] }).unwrap();
        let (name, reader) = parcels.remove(0).opened.remove(0);
        assert!(name == "tap.0" && is_non_blocking(&reader));
    }
}
