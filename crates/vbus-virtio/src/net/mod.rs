// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `virtio-net`: a network card for drivers that exist (VIRTIO 1.3, section 5.1), in front of the
//! back ends of [`vbus_net`]. `spec/virtio-net.md` says what a driver finds.
//!
//! How a frame travels: the driver's notification wakes the task of the queue pair
//! ([`vbus_net::front`]). The task takes the frame from the transmit queue (`ring`) and gives it to
//! the back end. The back end puts a frame to the driver into the buffers of the receive queue.
//! `card` says what the driver sees. `session` is the card at work for one driver, with its state
//! in `work`, and its queues in `queues`. With `vhost = true` the kernel carries the frames in
//! place of the tasks (`vhost`). `control` carries out the commands of the control queue, which
//! `command` reads.

mod abi;
mod card;
mod command;
mod control;
#[cfg(test)]
mod kernel_double;
mod offloads;
mod queues;
mod ring;
mod session;
mod vhost;
mod work;

use std::any::Any;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use vbus_core::settings::{self, Settings};
use vbus_core::shm::abi::class;
use vbus_core::{
    Connection, CreateError, Device, DeviceClass, ErrorCode, Identity, Joined, Metric, Open,
    TaskHandle, lock, state,
};
use vbus_net::front::{Config, METRICS, Nic};
use vbus_net::{BACKEND_METRICS, Limits, Medium, Opener, Switches};
use vbus_pci::OwnFunction;

use crate::device::VirtioDevice;
use crate::pci;
use crate::vhost_user::{self, Front};
use card::{CardState, News, Offer, VirtioNic};
use vhost::Vhost;

/// The class of virtio network cards.
pub struct VirtioNetClass {
    switches: Switches,
    opener: Arc<dyn Opener>,
}

impl VirtioNetClass {
    /// The class on these switches, which it shares with other Ethernet devices. `opener` opens the
    /// files, sockets and interfaces of the back ends.
    pub fn on(switches: Switches, opener: Arc<dyn Opener>) -> VirtioNetClass {
        VirtioNetClass { switches, opener }
    }
}

/// How drivers reach the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reached {
    /// As a PCI function.
    Pci,
    /// Through a front end of vhost-user.
    VhostUser,
}

/// The settings of a card.
struct Parsed {
    /// Those of every Ethernet device.
    config: Config,
    offer: Offer,
    reached: Reached,
    /// The kernel shall carry the frames.
    vhost: bool,
}

/// Checks the settings.
fn parse(value: &Value) -> Result<Parsed, CreateError> {
    let mut settings = Settings::new(value)?;
    let choices = [("pci", Reached::Pci), ("vhost-user", Reached::VhostUser)];
    let reached = settings.choice("transport", &choices)?.unwrap_or(Reached::Pci);
    let packed = settings.flag("packed")?;
    let rss = settings.flag("rss")?.unwrap_or(false);
    let vhost = settings.flag("vhost")?.unwrap_or(false);
    let config = Config::take(&mut settings)?;
    let error = |key, text: &str| Err(settings.error(key, text));
    if reached == Reached::VhostUser {
        if vhost {
            let why = "is true, but the front end of vhost-user has the signals that the kernel \
                       needs: leave it out";
            return error("vhost", why);
        }
        if rss {
            let why = "is true, but a front end of vhost-user has no queue for its commands: \
                       leave it out";
            return error("rss", why);
        }
    }
    if vhost {
        let backend = &config.backend;
        if !matches!(backend.medium, Medium::Tap(_)) {
            return error("vhost", "is true, which needs backend = \"tap\"");
        }
        if packed == Some(true) {
            return error("packed", "is true, but vhost = true needs split queues: leave it out");
        }
        if rss {
            return error("rss", "is true, but the kernel has no hashes: set vhost = false");
        }
        let limits = Limits::KEYS.into_iter().find(|key| value.get(key).is_some());
        if let Some(key) = limits.filter(|_| backend.limits != Limits::default()) {
            return error(key, "limits frames that the kernel carries: set vhost = false");
        }
        if backend.capture.is_some() {
            return error("pcap", "captures frames that the kernel carries: set vhost = false");
        }
    }
    settings.finish()?;
    let whole = reached == Reached::Pci;
    let offer = Offer { packed: packed.unwrap_or(true), rss, whole };
    Ok(Parsed { config, offer, reached, vhost })
}

impl DeviceClass for VirtioNetClass {
    fn name(&self) -> &'static str {
        "virtio-net"
    }

    fn help(&self) -> &'static str {
        "Network card for the virtio driver that every system has. The settings of venet; packed \
         (true), rss (false), transport (\"pci\"; \"vhost-user\" for a VMM that has the function \
         itself), vhost (false: with a TAP back end the kernel carries the frames). Set msix = true \
         for speed; without it the guest has INTx, and QEMU 11.1 can unplug the device."
    }

    fn check(&self, _name: &str, config: &Value) -> Result<(), CreateError> {
        parse(config).map(drop)
    }

    fn create(&self, name: &str, config: &Value) -> Result<Arc<dyn Device>, CreateError> {
        let Parsed { config, offer, reached, vhost } = parse(config)?;
        let pairs = config.queue_pairs;
        let nic = Nic::create(name, config, &self.switches, &self.opener)?;
        let vhost = Vhost::new(name, pairs, self.opener.clone(), vhost);
        let nic = Arc::new(VirtioNic::new(nic, offer, vhost));
        let front: Box<dyn Any + Send + Sync> = match reached {
            Reached::Pci => {
                let device: Arc<dyn VirtioDevice> = nic.clone();
                Box::new(OwnFunction::new(move |endpoint, options| {
                    pci::function(device.clone(), endpoint, options)
                }))
            }
            Reached::VhostUser => Box::new(Front::new(nic.clone())),
        };
        let (news, is_kept) = Default::default();
        Ok(Arc::new(OnBus { nic, front, reached, news, is_kept }))
    }

    fn has_vbus_drivers(&self) -> bool {
        false
    }

    fn metrics(&self) -> Vec<Metric> {
        [METRICS, BACKEND_METRICS].concat()
    }
}

/// Why no keeper can have a card whose queues the kernel serves.
const NOT_KEPT: &str = "with vhost = true the kernel serves its queues, and a kill ends that";

/// The card as a device of the bus.
struct OnBus {
    nic: Arc<VirtioNic>,
    /// How a connector serves the card.
    front: Box<dyn Any + Send + Sync>,
    reached: Reached,
    news: std::sync::Mutex<Option<TaskHandle>>,
    /// A keeper has the card's state. It stands alone: nothing is read after it.
    is_kept: AtomicBool,
}

impl Device for OnBus {
    fn identity(&self) -> Identity {
        let kind = self.nic.kind();
        Identity::new(class::USER, "virtio-net", kind.pci_class)
            .with_regions(kind.queues.into())
            .with_vectors(kind.queues + 1)
    }

    fn front(&self) -> Option<&(dyn Any + Send + Sync)> {
        Some(&*self.front)
    }

    fn joined(&self, joined: Joined<'_>) -> Result<(), CreateError> {
        let counters = Arc::new(joined.counters.beside());
        let task = Box::new(News(self.nic.clone()));
        let task = joined.executor.spawn(joined.worker, task, counters, |_| {});
        self.nic.nic().link.observe(Some(task.clone()));
        *lock(&self.news) = Some(task);
        Ok(())
    }

    /// Its drivers reach it by its own function.
    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Err(ErrorCode::DENIED)
    }

    fn inspect(&self) -> Value {
        self.nic.inspect()
    }

    fn reconfigure(&self, old: &Value, new: &Value) -> Result<(), String> {
        let Parsed { config, vhost, .. } = parse(new).map_err(|error| error.to_string())?;
        let changed = settings::changed(old, new);
        if !changed.iter().any(|key| key == "vhost") {
            return self.nic.nic().reconfigure(old, new, &config);
        }
        if changed.len() > 1 {
            return Err("vhost changes alone".into());
        }
        if vhost && self.is_kept.load(Ordering::Relaxed) {
            return Err(format!("the bus has a keeper, and {NOT_KEPT}"));
        }
        self.nic.set_vhost(vhost)
    }

    fn quiesce(&self) {
        self.nic.quiesce();
    }

    fn resume(&self) {
        self.nic.resume();
    }

    fn settled(&self, config: &Value) -> Value {
        self.nic.nic().settled(config)
    }

    fn descriptors(&self) -> std::io::Result<Vec<(String, OwnedFd)>> {
        self.nic.nic().backend.descriptors()
    }

    fn save(&self) -> Result<Value, String> {
        // The card without its session would be half of it.
        if self.reached == Reached::VhostUser {
            return Err(vhost_user::NOT_SAVED.into());
        }
        state::part(&self.nic.save()?)
    }

    fn outlast(&self, device: &mut Value, _: Option<&mut Value>) -> Result<(), String> {
        if self.nic.vhost().is_wanted() {
            return Err(NOT_KEPT.into());
        }
        state::read_part::<CardState>(device)?.outlast()?;
        self.is_kept.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn outlast_no_more(&self) {
        self.is_kept.store(false, Ordering::Relaxed);
    }

    fn restore(&self, saved: &Value) -> Result<(), String> {
        self.nic.restore(&state::read_part(saved)?)
    }

    fn control(&self, request: &Value, reply: &mut dyn FnMut(Value) -> bool) -> Result<(), String> {
        reply(self.nic.nic().control(request)?);
        Ok(())
    }

    fn removed(&self) {
        self.nic.nic().link.observe(None);
        if let Some(task) = lock(&self.news).take() {
            task.stop();
        }
    }
}
