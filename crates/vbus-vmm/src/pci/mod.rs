// SPDX-License-Identifier: Apache-2.0 OR MIT
//! PCI Express: a host bridge, root ports with hotplug, and behind each root port at most one
//! function. A vfio-user server (a device of the bus) implements the function.
//!
//! ```text
//!  configuration:  access.rs (ECAM, CF8)  ─▸  hierarchy.rs (host bridge, slots)
//!                                               └▸ slot.rs ─▸ root_port.rs
//!                                                    └▸ function.rs ─▸ config.rs, MSI-X table
//!                                                                   ─▸ the server, by message
//!  memory:         access.rs (BARs)       ─▸  hierarchy.rs ─▸ slot.rs ─▸ function.rs
//!  ports:          access.rs (doorbells)  ─▸  hierarchy.rs ─▸ slot.rs ─▸ function.rs
//!  in the kernel:  doorbells.rs, msi.rs: eventfds between guest and server, without this process
//! ```
//!
//! The guest may write anything. The VMM checks what a server says when it plugs the device
//! (`description.rs`). After that a server can only answer reads of its registers. If a server goes
//! away, or does not answer within 5 s, the VMM drops it: the guest reads all ones, and sees an
//! empty slot.

mod access;
mod config;
mod description;
mod doorbells;
mod error;
mod function;
mod hierarchy;
mod migration;
mod msi;
mod resources;
mod root_port;
mod saved;
mod slot;
mod watch;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use serde::Serialize;
use serde_json::Value;
use vbus_kvm::Routes;

pub use description::BadFunction;
pub use error::{PlugError, UnplugError};
use function::Function;
use hierarchy::Hierarchy;
pub use resources::Backing;
use resources::Resources;
pub(crate) use saved::SavedPci;
use slot::Slot;

use crate::bus::Bus;
use crate::ioapic::IoApic;
use crate::layout;
use crate::lock::lock;
use crate::memory::RamRegion;

/// The most root ports. Bus 0 has 31 devices beside the host bridge, and there are as many buses.
pub const PORTS_MAX: u8 = layout::BUS_MAX;

/// A device that is plugged, as the control request `devices` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct Plugged {
    /// The name of the device.
    pub name: String,
    /// The path of its server's socket.
    pub socket: PathBuf,
    /// The number of the slot, which is the device number of its root port.
    pub slot: u8,
    /// The PCI address in the guest, by the bus numbers that the guest uses now.
    pub address: String,
    /// Whether the guest has switched the slot on.
    pub on: bool,
    /// Whether doorbells in BAR0 end in the kernel now.
    pub doorbells_in_kernel: bool,
    /// Reads of BAR0. The server has answered each of them.
    pub reads: u64,
    /// Writes of BAR0 that came to user space.
    pub writes: u64,
    /// Doorbells that came to user space.
    pub user_doorbells: u64,
    /// Accesses to the configuration space.
    pub config_accesses: u64,
}

/// Keeps devices from being plugged and unplugged, see [`PciRoot::freeze`].
pub(crate) struct Frozen<'a>(&'a PciRoot);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        *lock(&self.0.plugging) = false;
    }
}

/// Takes the number of a slot and a piece of the state of the device in it.
pub(crate) type PieceOfDevice<'a> = dyn FnMut(u8, &[u8]) -> Result<(), String> + 'a;

/// All of PCI.
pub struct PciRoot {
    resources: Resources,
    hierarchy: Arc<Hierarchy>,
    config_ports: Arc<access::ConfigPorts>,
    /// Held while a slot is reserved, and until a device is known to leave. True while the machine
    /// is being saved.
    plugging: Mutex<bool>,
    watcher: watch::Watcher,
}

impl PciRoot {
    /// Makes a host bridge with `ports` root ports (1 to [`PORTS_MAX`]) for a virtual machine with
    /// these routes and this memory. If there are more than 8 ports, they share pins for INTx. With
    /// `filter`, the system calls of its thread are restricted.
    ///
    /// # Errors
    /// The process has no more threads or descriptors.
    ///
    /// # Panics
    /// If the number of ports is out of range.
    pub fn new(
        routes: Arc<Routes>,
        io_apic: Option<Arc<IoApic>>,
        ram: Vec<RamRegion>,
        ports: u8,
        backing: Backing,
        filter: bool,
    ) -> anyhow::Result<Arc<PciRoot>> {
        assert!((1..=PORTS_MAX).contains(&ports), "{ports} root ports");
        let hierarchy = Arc::new(Hierarchy::new(ports, &routes));
        let config_ports = access::ConfigPorts::new(&hierarchy);
        let watcher = watch::Watcher::start(&hierarchy, filter)?;
        let resources = Resources { routes, io_apic, ram, backing, ports };
        Ok(Arc::new(PciRoot {
            resources,
            hierarchy,
            config_ports,
            plugging: Mutex::new(false),
            watcher,
        }))
    }

    /// Gives PCI its addresses and ports.
    pub fn attach(&self, mmio: &mut Bus, pio: &mut Bus) {
        access::attach(&self.hierarchy, mmio);
        pio.add(layout::PCI_CONFIG_PORT.into(), 8, self.config_ports.clone());
        let doorbells = access::DoorbellPorts::new(&self.hierarchy, &self.resources);
        let (first, count) = (layout::DOORBELL_PORTS, layout::DOORBELL_PORT_BYTES);
        pio.add(first.into(), count.into(), doorbells);
    }

    /// Plugs the device whose server listens at `socket` into the first free slot. A guest that has
    /// not looked at the slot yet finds the device there. Another guest is told of it. This
    /// function does not wait for the guest's reaction.
    ///
    /// # Errors
    /// See [`PlugError`]. The guest has then seen nothing.
    pub fn plug(&self, name: &str, socket: &Path) -> Result<(), PlugError> {
        if !(1..=64).contains(&name.len()) || !name.chars().all(|c| c.is_ascii_graphic()) {
            return Err(PlugError::Name);
        }
        let slot = self.reserve(name)?;
        let pin = |pin| layout::intx_pin(slot.number, pin);
        match Function::connect(name, socket, slot.number, &self.resources, pin) {
            Ok(function) => slot.insert(Arc::new(function)),
            Err(e) => {
                slot.cancel_reservation();
                return Err(e.of(socket));
            }
        }
        self.watcher.wake();
        tracing::info!("{name} plugged into slot {}", slot.number);
        Ok(())
    }

    /// Plugs a device that was saved into its slot. The guest does not learn of it.
    ///
    /// # Errors
    /// See [`PlugError`].
    pub(crate) fn plug_saved(
        &self,
        name: &str,
        socket: &Path,
        number: u8,
    ) -> Result<(), PlugError> {
        let found = self.hierarchy.slots.iter().find(|slot| slot.number == number);
        let slot = found.filter(|slot| slot.reserve(name, false));
        let slot = slot.ok_or(PlugError::Full(self.resources.ports))?;
        let pin = |pin| layout::intx_pin(number, pin);
        match Function::connect(name, socket, number, &self.resources, pin) {
            Ok(function) => slot.insert_saved(Arc::new(function)),
            Err(e) => {
                slot.cancel_reservation();
                return Err(e.of(socket));
            }
        }
        self.watcher.wake();
        Ok(())
    }

    /// Refuses requests to plug and unplug until the result is dropped, so that the devices stay
    /// the same while the machine is saved.
    ///
    /// # Errors
    /// This is so already, or a device is about to be plugged or unplugged: the text says which.
    pub(crate) fn freeze(&self) -> Result<Frozen<'_>, String> {
        let mut frozen = lock(&self.plugging);
        if *frozen {
            return Err("the machine is being saved or moved already".into());
        }
        if let Some(name) = self.hierarchy.slots.iter().find_map(Slot::changing) {
            return Err(format!("{name} is being plugged or unplugged: try again"));
        }
        *frozen = true;
        Ok(Frozen(self))
    }

    /// Name and slot of each device.
    pub(crate) fn names(&self) -> Vec<(String, u8)> {
        let name = |slot: &Slot| Some((slot.occupant()?.0.name.clone(), slot.number));
        self.hierarchy.slots.iter().filter_map(name).collect()
    }

    /// Checks that the servers of all devices can save them.
    ///
    /// # Errors
    /// One cannot. The text names it.
    pub(crate) fn check_savable(&self) -> Result<(), String> {
        self.functions().try_for_each(|f| f.migrate(|migration, ask| migration.check(ask)))
    }

    /// Lets the devices' servers log the pages that the devices write.
    ///
    /// # Errors
    /// A server refuses. [`end_log`](Self::end_log) is still due.
    pub(crate) fn begin_log(&self) -> Result<(), String> {
        self.functions().try_for_each(|f| f.migrate(|migration, ask| migration.begin_log(ask)))
    }

    /// Ends the logs.
    pub(crate) fn end_log(&self) {
        for function in self.functions() {
            let _ = function.migrate(|migration, ask| {
                migration.end_log(ask);
                Ok(())
            });
        }
    }

    /// Passes address and size of what the devices have written to `written`, since the last call
    /// or since the logs began. `parts` is the memory.
    ///
    /// # Errors
    /// A server refuses. The text names the device.
    pub(crate) fn take_log(
        &self,
        parts: &[(u64, u64)],
        written: &mut dyn FnMut(u64, u64),
    ) -> Result<(), String> {
        self.functions().try_for_each(|function| {
            function.migrate(|migration, ask| migration.take_log(parts, ask, written))
        })
    }

    /// Passes the states that the devices' servers keep to `piece`, with the number of the slot.
    /// PCI must be [paused](Self::pause).
    ///
    /// # Errors
    /// A server refuses, or `piece` fails.
    pub(crate) fn read_devices(&self, piece: &mut PieceOfDevice<'_>) -> Result<(), String> {
        for slot in &self.hierarchy.slots {
            let Some((function, ..)) = slot.occupant() else { continue };
            let mut piece = |bytes: &[u8]| piece(slot.number, bytes);
            function.migrate(|migration, ask| migration.read(ask, &mut piece))?;
        }
        Ok(())
    }

    /// Lets the devices take new states, which [`write_device`](Self::write_device) gives to their
    /// servers. [`wake`](Self::wake) lets them run.
    ///
    /// # Errors
    /// A server refuses. The text names the device.
    pub(crate) fn begin_restore(&self) -> Result<(), String> {
        self.functions().try_for_each(|f| f.migrate(|migration, ask| migration.begin_restore(ask)))
    }

    /// Writes the next piece of the state of the device in slot `number`.
    ///
    /// # Errors
    /// There is no such device, or its server refuses.
    pub(crate) fn write_device(&self, number: u32, piece: &[u8]) -> Result<(), String> {
        let mut slots = self.hierarchy.slots.iter();
        let slot = slots.find(|slot| u32::from(slot.number) == number);
        let function = slot.and_then(Slot::occupant).map(|(function, ..)| function);
        let function = function.ok_or_else(|| format!("there is no device in slot {number}"))?;
        function.migrate(|migration, ask| migration.write(piece, ask))
    }

    fn functions(&self) -> impl Iterator<Item = Arc<Function>> + '_ {
        self.hierarchy.slots.iter().filter_map(|slot| Some(slot.occupant()?.0))
    }

    /// Stops all devices. When this returns, they write no memory, and each interrupt that they
    /// have signalled has arrived at the interrupt controllers, or is part of [`save`](Self::save).
    /// No virtual CPU may run until [`go_on`](Self::go_on).
    ///
    /// # Errors
    /// KVM or a server refuses. [`go_on`](Self::go_on) is still due.
    pub(crate) fn pause(&self) -> Result<(), String> {
        self.functions().try_for_each(|f| f.migrate(|migration, ask| migration.stop(ask)))?;
        self.functions().try_for_each(|f| f.pause().map_err(|e| format!("{}: {e}", f.name)))
    }

    /// Ends a [`pause`](Self::pause).
    pub(crate) fn go_on(&self) {
        for function in self.functions() {
            function.go_on();
            // Without this the device would stand still for ever.
            if let Err(text) = function.migrate(|migration, ask| migration.run(ask)) {
                tracing::error!("{text}: the device stands still");
            }
        }
    }

    /// The state of PCI. It must be [paused](Self::pause).
    pub(crate) fn save(&self) -> SavedPci {
        SavedPci {
            config_address: self.config_ports.address(),
            host_bridge: self.hierarchy.save_host_bridge(),
            slots: self.hierarchy.slots.iter().map(Slot::save).collect(),
        }
    }

    /// Gives PCI a saved state. The devices must be in their slots.
    ///
    /// # Errors
    /// The state is that of another machine. The text says what differs.
    pub(crate) fn restore(&self, saved: &SavedPci) -> Result<(), String> {
        let (slots, have) = (&self.hierarchy.slots, saved.slots.len());
        if have != slots.len() {
            return Err(format!("there are the states of {have} slots, not {}", slots.len()));
        }
        self.config_ports.set_address(saved.config_address);
        if !self.hierarchy.restore_host_bridge(&saved.host_bridge) {
            return Err("the saved host bridge is another one".into());
        }
        slots.iter().zip(&saved.slots).try_for_each(|(slot, saved)| slot.restore(saved))
    }

    /// Lets the devices run, and sends the interrupts that were pending when PCI was saved. The
    /// interrupt controllers and the virtual CPUs must have their states.
    ///
    /// # Errors
    /// The state is that of another machine. The text says what differs.
    pub(crate) fn wake(&self, saved: &SavedPci) -> Result<(), String> {
        let slots = self.hierarchy.slots.iter().zip(&saved.slots);
        let pairs =
            slots.filter_map(|(slot, saved)| Some((slot.occupant()?.0, saved.function.as_ref()?)));
        for (function, saved) in pairs {
            function.migrate(|migration, ask| migration.run(ask))?;
            function.wake(&saved.pending)?;
        }
        Ok(())
    }

    fn reserve(&self, name: &str) -> Result<&Slot, PlugError> {
        let frozen = lock(&self.plugging);
        if *frozen {
            return Err(PlugError::Frozen);
        }
        let slots = &self.hierarchy.slots;
        slots.iter().for_each(Slot::wait_closed);
        if slots.iter().any(|slot| slot.name().as_deref() == Some(name)) {
            return Err(PlugError::Exists(name.to_owned()));
        }
        // A slot that the guest has switched off is better than one that it is about to clear.
        let mut free =
            [true, false].into_iter().flat_map(|off| slots.iter().map(move |slot| (slot, off)));
        let found = free.find(|(slot, off)| slot.reserve(name, *off));
        found.map(|(slot, _)| slot).ok_or(PlugError::Full(self.resources.ports))
    }

    /// Asks the guest to release a device, and waits until it has. The connection to the server is
    /// then closed.
    ///
    /// # Errors
    /// See [`UnplugError`].
    pub fn unplug(&self, name: &str) -> Result<(), UnplugError> {
        // Held until the slot tells that the device is leaving. Otherwise a save could begin
        // between the two, and the device would leave it.
        let frozen = lock(&self.plugging);
        if *frozen {
            return Err(UnplugError::Frozen);
        }
        let mut slots = self.hierarchy.slots.iter();
        let slot = slots.find(|slot| slot.name().as_deref() == Some(name));
        let slot = slot.ok_or_else(|| UnplugError::Unknown(name.to_owned()))?;
        slot.unplug(name, || drop(frozen))?;
        self.watcher.wake();
        tracing::info!("{name} unplugged from slot {}", slot.number);
        Ok(())
    }

    /// The devices, by slot.
    pub fn list(&self) -> Vec<Plugged> {
        let plugged = |slot: &Slot| {
            let (function, bus, on) = slot.occupant()?;
            let count = &function.counters;
            Some(Plugged {
                name: function.name.clone(),
                socket: function.socket.clone(),
                slot: slot.number,
                address: format!("0000:{bus:02x}:00.0"),
                on,
                doorbells_in_kernel: function.doorbells_in_kernel(),
                reads: count.reads.load(Ordering::Relaxed),
                writes: count.writes.load(Ordering::Relaxed),
                user_doorbells: count.doorbells.load(Ordering::Relaxed),
                config_accesses: count.config.load(Ordering::Relaxed),
            })
        };
        self.hierarchy.slots.iter().filter_map(plugged).collect()
    }

    /// The interrupts of each device, as the control request `dump` tells them.
    pub fn dump(&self) -> Vec<Value> {
        let dump = |slot: &Slot| Some(slot.occupant()?.0.dump());
        self.hierarchy.slots.iter().filter_map(dump).collect()
    }

    /// Puts PCI into the state after power-on, for a guest that starts again. No virtual CPU may
    /// run meanwhile. Devices stay plugged, except those that the guest had been asked to release.
    pub fn reset(&self) {
        self.config_ports.reset();
        self.hierarchy.reset();
    }
}
