// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device and its server as data: what another process needs to go on with the same client.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use vbus_core::Endpoint;
use vbus_core::memory::{PeerProcess, SavedMap, SavedMaps};
use vbus_pci::{FunctionState, IrqIndex, Options, PciFunction, device_function};
use vfio_user_protocol::is_eventfd;
use vfio_user_protocol::state::{Held, ServerData, ServerState};

use crate::device_server::Served;

/// The kinds of interrupts, in the order of [`SavedServer::descriptors`].
const INDEXES: [IrqIndex; 3] = [IrqIndex::Intx, IrqIndex::Msi, IrqIndex::Msix];

/// A device and its server.
#[derive(Debug)]
pub struct SavedServer {
    /// What is no descriptor.
    pub data: SavedData,
    /// In this order: those of the vfio-user server ([`ServerState`]); the files of the maps; the
    /// eventfds of the doorbells, of the interrupts, and those that unmask and mask INTx; the
    /// memory of the function.
    pub descriptors: Vec<OwnedFd>,
    /// What a process that was killed has given away for keeping (`Target::hold`).
    pub held: Held,
}

impl SavedServer {
    /// The listening socket, and then those of the connections, as far as the state has them. They
    /// are not checked.
    pub fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.descriptors.iter().take(self.data.server.sockets()).map(AsFd::as_fd)
    }
}

/// What of a device and its server is no descriptor (spec/take-over.md, "Device"). For serde alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedData {
    server: ServerData,
    /// The number of descriptors of the server.
    server_descriptors: u32,
    function: FunctionState,
    maps: Vec<SavedMap>,
    /// The number of files of the maps.
    files: u32,
    /// The doorbells that have an eventfd.
    doorbells: Vec<u32>,
    /// The interrupts that have one: index and number.
    irqs: Vec<(u32, u32)>,
    /// Whether there is one that unmasks INTx, and one that masks it.
    masks: [bool; 2],
    /// Whether there is memory of the function's own, which outlives the process.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    memory: bool,
}

/// Saves everything. The server has settled, and the device is quiesced.
pub(crate) fn save(
    state: ServerState,
    function: &mut PciFunction,
    endpoint: &Endpoint,
) -> Result<SavedServer, String> {
    let text = |error: io::Error| format!("device {:?}: {error}", endpoint.name());
    let ServerState { data: server, mut descriptors, held } = state;
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let server_descriptors = count(descriptors.len());
    let SavedMaps { maps, files } = endpoint.memory().save().map_err(text)?;
    let file_count = count(files.len());
    descriptors.extend(files);
    let mut doorbells = Vec::new();
    for (number, eventfd) in endpoint.host().doorbells().eventfds() {
        doorbells.push(number);
        descriptors.push(eventfd.as_fd().try_clone_to_owned().map_err(text)?);
    }
    let mut irqs = Vec::new();
    for index in INDEXES {
        for (number, eventfd) in (0..).zip(function.irq_eventfds(index).map_err(text)?) {
            if let Some(eventfd) = eventfd {
                irqs.push((index.number(), number));
                descriptors.push(eventfd);
            }
        }
    }
    let masks = function.mask_eventfds().map_err(text)?;
    let has_masks = [masks[0].is_some(), masks[1].is_some()];
    descriptors.extend(masks.into_iter().flatten());
    let function = function.save().map_err(|error| error.to_string())?;
    let data = SavedData {
        server,
        server_descriptors,
        function,
        maps,
        files: file_count,
        doorbells,
        irqs,
        masks: has_masks,
        memory: false,
    };
    Ok(SavedServer { data, descriptors, held })
}

/// As [`save`], for a state that outlasts this process. The device is quiesced for that.
pub(crate) fn save_to_outlast(
    state: ServerState,
    function: &mut PciFunction,
    endpoint: &Endpoint,
) -> Result<SavedServer, String> {
    let mut saved = save(state, function, endpoint)?;
    saved.data.function.unmask();
    let memory = function.kept_memory();
    let memory = memory.map_err(|error| format!("device {:?}: {error}", endpoint.name()))?;
    saved.data.memory = memory.is_some();
    saved.descriptors.extend(memory);
    Ok(saved)
}

/// Makes the target again, for a fresh device that is quiesced. Returns it with the state of its
/// vfio-user server.
pub(crate) fn restore(
    saved: SavedServer,
    endpoint: &Arc<Endpoint>,
    options: Options,
) -> Result<(ServerState, Served), String> {
    let SavedServer { data, descriptors, held } = saved;
    let name = endpoint.name();
    let wrong = |what: &str| format!("the state of device {name:?} is wrong: {what}");
    let mut rest = descriptors.into_iter();
    let mut take = |count: usize| -> Result<Vec<OwnedFd>, String> {
        let taken: Vec<_> = rest.by_ref().take(count).collect();
        if taken.len() == count { Ok(taken) } else { Err(wrong("descriptors are missing")) }
    };
    let of_server = take(data.server_descriptors as usize)?;
    let files = take(data.files as usize)?;
    let mut eventfds = |count: usize| -> Result<Vec<OwnedFd>, String> {
        let taken = take(count)?;
        match taken.iter().all(|fd| is_eventfd(fd) == Ok(true)) {
            true => Ok(taken),
            false => Err(wrong("a descriptor is no eventfd")),
        }
    };
    let doorbells = eventfds(data.doorbells.len())?;
    let irqs = eventfds(data.irqs.len())?;
    let mut masks = eventfds(data.masks.iter().filter(|mask| **mask).count())?.into_iter();
    let memory = rest.by_ref().take(usize::from(data.memory)).next();
    if memory.is_some() != data.memory || rest.next().is_some() {
        return Err(wrong("it has too many descriptors, or too few"));
    }
    let state = ServerState { data: data.server, descriptors: of_server, held };
    // Before the maps, which its budget bounds.
    endpoint.memory().set_client(state.client().and_then(PeerProcess::of));
    let maps = SavedMaps { maps: data.maps, files };
    let unmapped = |error| format!("the memory of device {name:?} cannot be mapped: {error}");
    endpoint.memory().restore(&maps).map_err(unmapped)?;
    let bells = endpoint.host().doorbells();
    for (number, eventfd) in data.doorbells.into_iter().zip(doorbells) {
        bells.adopt_eventfd(number, eventfd).map_err(|error| {
            format!("doorbell {number} of device {name:?} cannot be watched: {error}")
        })?;
    }
    let mut function = device_function(endpoint.clone(), options);
    let mut of_irqs = data.irqs.into_iter().zip(irqs).peekable();
    for index in INDEXES {
        let mut all: Vec<_> = (0..function.irq_count(index)).map(|_| None).collect();
        let is_here = |((number, _), _): &((u32, u32), OwnedFd)| *number == index.number();
        let mut some = false;
        while let Some(((_, number), eventfd)) = of_irqs.next_if(is_here) {
            let place = all.get_mut(number as usize).filter(|place| place.is_none());
            *place.ok_or_else(|| wrong("an interrupt"))? = Some(eventfd);
            some = true;
        }
        if some {
            let connected = function.connect_irqs(index, 0, all);
            connected.map_err(|error| wrong(&format!("an interrupt: {error}")))?;
        }
    }
    if of_irqs.next().is_some() {
        return Err(wrong("an interrupt"));
    }
    for (masked, there) in [false, true].into_iter().zip(data.masks) {
        if let Some(eventfd) = there.then(|| masks.next()).flatten() {
            function.adopt_mask(masked, eventfd).map_err(|error| wrong(&error.to_string()))?;
        }
    }
    if let Some(memory) = memory {
        function.adopt_memory(memory).map_err(|why| wrong(&why))?;
    }
    function.restore(&data.function, vbus_pci::Peer::Same).map_err(|error| error.to_string())?;
    Ok((state, Served::held(function, endpoint.clone())))
}

/// Makes the server of what [`restore`] returned.
pub(crate) fn server(
    (state, served): (ServerState, Served),
    path: &Path,
    name: &str,
) -> Result<vfio_user_protocol::Server<Served>, String> {
    vfio_user_protocol::Server::restore(state, path, name, served, Instant::now())
        .map_err(|error| format!("device {name:?}: {error}"))
}
