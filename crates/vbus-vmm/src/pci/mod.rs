//! PCI Express: a host bridge, root ports with hotplug, and behind each of them at most one
//! function, which a vfio-user server (a device of the bus) is behind.
//!
//! ```text
//!  configuration:  access.rs (ECAM, CF8)  ─▸  host bridge | slot.rs ─▸ root_port.rs (the root port)
//!  memory:         access.rs (BARs)       ─▸  slot.rs     └▸ function.rs ─▸ config.rs: what the VMM keeps itself
//!  ports:          doorbells.rs           ─▸  slot.rs             └▸ the server, by message
//!  in the kernel:  doorbells.rs, msi.rs: eventfds between guest and server, which no thread of this process sees
//! ```
//!
//! What the guest writes may be anything. What a server says is checked when it is plugged
//! ([`description`]); afterwards it can only answer reads of its registers. A server that goes away, or
//! does not answer for 5 s, is dropped: the guest reads all ones, and sees its slot empty.

mod access;
mod config;
mod description;
mod doorbells;
mod function;
mod msi;
mod root_port;
mod slot;
#[cfg(test)]
mod tests;
mod watch;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde::Serialize;
use vbus_kvm::{Routes, Sints};
use vbus_pci_config::Space;
use vfio_user_protocol::ClientError;

use crate::bus::Bus;
use crate::ioapic::IoApic;
use crate::layout;
use crate::memory::RamRegion;
pub use description::BadFunction;
use function::Function;
use slot::Slot;

/// The most root ports: the other devices of bus 0, of which the host bridge is one, and the buses
/// behind it.
pub const PORTS_MAX: u8 = layout::BUS_MAX;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// What doorbells and interrupts may use beside MMIO and MSI; as KVM has it and the user wants it.
#[derive(Clone, Copy, Debug)]
pub struct Backing {
    /// Doorbells in BAR0 end in the kernel. Without it they are messages to the server.
    pub mmio: bool,
    /// Doorbells by port.
    pub pio: bool,
    /// Doorbells by hypercall: the guest's CPUID must show the interface.
    pub hypercall: bool,
    /// Synthetic interrupts: the virtual CPUs must have a SynIC.
    pub sints: Option<Sints>,
}

/// What all functions need.
struct Shared {
    routes: Arc<Routes>,
    /// The I/O APIC, if it is in this process: INTx then passes through it.
    io_apic: Option<Arc<IoApic>>,
    ram: Vec<RamRegion>,
    backing: Backing,
    ports: u8,
}

/// Why a device was not plugged.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The name is in use.
    #[error("there is a device {0} already")]
    Exists(String),
    /// Not a name.
    #[error("a device's name has 1 to 64 printable characters and no blanks")]
    Name,
    /// All slots are taken.
    #[error("all {0} slots are taken")]
    Full(u8),
    /// The server, or what it says.
    #[error("{socket}: {why}")]
    Server {
        /// Where it listens.
        socket: String,
        /// What is wrong.
        why: BadFunction,
    },
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] vbus_kvm::Error),
    /// No more descriptors.
    #[error("eventfd: {0}")]
    Eventfd(#[from] std::io::Error),
}

impl From<ClientError> for PlugError {
    fn from(e: ClientError) -> Self {
        BadFunction::from(e).into()
    }
}

impl From<BadFunction> for PlugError {
    fn from(why: BadFunction) -> Self {
        PlugError::Server { socket: String::new(), why }
    }
}

impl PlugError {
    fn of(self, path: &Path) -> PlugError {
        match self {
            PlugError::Server { why, .. } => {
                PlugError::Server { socket: path.display().to_string(), why }
            }
            other => other,
        }
    }
}

/// Why a device was not unplugged.
#[derive(Debug, thiserror::Error)]
pub enum UnplugError {
    /// No such device.
    #[error("there is no device {0}")]
    Unknown(String),
    /// The guest did not let it go. It still leaves if the guest does so later.
    #[error(
        "the guest did not let {name} go within {after:?}; it leaves when the guest switches its slot off"
    )]
    Kept {
        /// The device.
        name: String,
        /// How long it was waited for.
        after: Duration,
    },
}

/// A device that is plugged.
#[derive(Clone, Debug, Serialize)]
pub struct Plugged {
    /// Its name.
    pub name: String,
    /// Where its server listens.
    pub socket: PathBuf,
    /// Number of the slot: device number of its root port.
    pub slot: u8,
    /// Its PCI address in the guest, as the guest numbers its buses now.
    pub address: String,
    /// The guest has the slot switched on.
    pub on: bool,
    /// Doorbells in BAR0 end in the kernel now.
    pub doorbells_in_kernel: bool,
    /// Reads of BAR0, each of which its server has answered.
    pub reads: u64,
    /// Writes of BAR0 that came to user space.
    pub writes: u64,
    /// Doorbells that came to user space.
    pub user_doorbells: u64,
    /// Accesses to its configuration space.
    pub config_accesses: u64,
}

/// All of PCI.
pub struct PciRoot {
    shared: Shared,
    host_bridge: Mutex<Space>,
    /// By device number on bus 0, from 1 on.
    slots: Vec<Slot>,
    /// The address register of CF8.
    address: AtomicU32,
    /// Held while a slot is reserved.
    plugging: Mutex<()>,
    watcher: watch::Watcher,
}

impl PciRoot {
    /// A host bridge with `ports` root ports (1 to [`PORTS_MAX`]) for a virtual machine with these
    /// routes and this memory. More than 8 ports share pins for INTx. `filter`: system calls of its
    /// thread are filtered.
    ///
    /// # Errors
    /// No more threads or descriptors.
    ///
    /// # Panics
    /// With another number of ports.
    pub fn new(
        routes: Arc<Routes>,
        io_apic: Option<Arc<IoApic>>,
        ram: Vec<RamRegion>,
        ports: u8,
        backing: Backing,
        filter: bool,
    ) -> anyhow::Result<Arc<PciRoot>> {
        assert!((1..=PORTS_MAX).contains(&ports), "{ports} root ports");
        let slots = (1..=ports).map(|number| Slot::new(number, routes.clone())).collect();
        let watcher = watch::Watcher::new()?;
        let root = Arc::new(PciRoot {
            shared: Shared { routes, io_apic, ram, backing, ports },
            host_bridge: Mutex::new(host_bridge()),
            slots,
            address: AtomicU32::new(0),
            plugging: Mutex::new(()),
            watcher,
        });
        watch::start(&root, filter)?;
        Ok(root)
    }

    /// Gives PCI its addresses and ports.
    pub fn attach(self: &Arc<Self>, mmio: &mut Bus, pio: &mut Bus) {
        mmio.add(layout::ECAM, layout::ECAM_BYTES, Arc::new(access::Ecam(self.clone())));
        mmio.add(
            layout::PCI_WINDOW,
            layout::PCI_WINDOW_BYTES,
            Arc::new(access::Window(self.clone())),
        );
        pio.add(layout::PCI_CONFIG_PORT.into(), 8, Arc::new(access::ConfigPorts(self.clone())));
        let ports = Arc::new(doorbells::Ports(self.clone()));
        pio.add(layout::DOORBELL_PORTS.into(), layout::DOORBELL_PORT_BYTES.into(), ports);
    }

    /// Plugs the device whose server listens at `socket`, into the first slot that is free. Before
    /// the guest looks it finds the device there; afterwards it is told, and this does not wait for
    /// what it does.
    ///
    /// # Errors
    /// See [`PlugError`]. The guest has seen nothing then.
    pub fn plug(&self, name: &str, socket: &Path) -> Result<(), PlugError> {
        if !(1..=64).contains(&name.len()) || !name.chars().all(|c| c.is_ascii_graphic()) {
            return Err(PlugError::Name);
        }
        let slot = self.reserve(name)?;
        let pin = |pin| layout::intx_pin(slot.number, pin);
        match Function::connect(name, socket, slot.number, &self.shared, pin) {
            Ok(function) => slot.insert(Arc::new(function)),
            Err(e) => {
                slot.expect_no_more();
                return Err(e.of(socket));
            }
        }
        self.watcher.wake();
        tracing::info!("{name} plugged into slot {}", slot.number);
        Ok(())
    }

    fn reserve(&self, name: &str) -> Result<&Slot, PlugError> {
        let _one = lock(&self.plugging);
        self.slots.iter().for_each(Slot::wait_closed);
        if self.slots.iter().any(|slot| slot.name().as_deref() == Some(name)) {
            return Err(PlugError::Exists(name.to_owned()));
        }
        // Better a slot that the guest is done with than one that it is still about to clear.
        let mut free = [true, false]
            .into_iter()
            .flat_map(|off| self.slots.iter().map(move |slot| (slot, off)));
        let found = free.find(|(slot, off)| slot.expect(name, *off));
        found.map(|(slot, _)| slot).ok_or(PlugError::Full(self.shared.ports))
    }

    /// Asks the guest to let a device go, and waits until it has; the connection to its server is
    /// closed then.
    ///
    /// # Errors
    /// See [`UnplugError`].
    pub fn unplug(&self, name: &str) -> Result<(), UnplugError> {
        let slot = self.slots.iter().find(|slot| slot.name().as_deref() == Some(name));
        let slot = slot.ok_or_else(|| UnplugError::Unknown(name.to_owned()))?;
        slot.unplug(name)?;
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
        self.slots.iter().filter_map(plugged).collect()
    }

    /// Back to the state after power-on, for a guest that starts again; no virtual CPU may run
    /// meanwhile. Devices stay plugged, but for those that the guest had been asked to let go.
    pub fn reset(&self) {
        *lock(&self.host_bridge) = host_bridge();
        self.address.store(0, Ordering::Relaxed);
        self.slots.iter().for_each(Slot::reset);
    }
}

impl Drop for PciRoot {
    fn drop(&mut self) {
        self.watcher.wake();
    }
}

/// The configuration space of the host bridge: it says what it is, and nothing else.
fn host_bridge() -> Space {
    let mut space = Space::new(256);
    space.set32(0x00, 0x0008_1b36);
    space.allow(0x04, &0x0006u16.to_le_bytes());
    space.set32(0x08, 0x0600_0000);
    space
}
