// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus that leaves: it stops, gives everything away, and ends. Or it goes on.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::content::{self, DevicePart, ManagerPart, Offer, Socket, Spec, State};
use super::steps::{LIMITS, Leaves, Parcel, leave};
use crate::keeper::{Keeping, Link};
use crate::serve::host::Host;
use crate::serve::reload::Reloader;
use crate::serve::systemd::Notifier;
use vbus_cli::limits::make_room_for_descriptors;
use vbus_cli::log;

/// How long the bus waits for the end of a change of its devices before it refuses to leave.
const CHANGE_WAIT: Duration = Duration::from_secs(20);

/// What it takes to hand this bus over.
pub struct Departure {
    host: Arc<Host>,
    reloader: Arc<Reloader>,
    /// The TCP port of the metrics.
    port: Option<(SocketAddr, OwnedFd)>,
    manager: Option<Notifier>,
}

impl Departure {
    /// For this bus. `port` is that of the metrics, if there is one.
    ///
    /// # Errors
    /// This process has as many descriptors as it may have.
    pub fn new(
        host: Arc<Host>,
        reloader: Arc<Reloader>,
        port: Option<&TcpListener>,
        manager: Option<Notifier>,
    ) -> Result<Departure> {
        let port = match port {
            None => None,
            Some(port) => Some((port.local_addr()?, port.as_fd().try_clone_to_owned()?)),
        };
        Ok(Departure { host, reloader, port, manager })
    }

    /// What another bus needs to prepare: one that takes over, or one that a keeper starts.
    ///
    /// # Errors
    /// This process has as many descriptors as it may have.
    pub fn offer(&self) -> Result<Parcel> {
        let (offer, descriptors) = self.offer_of(self.specs())?;
        content::pack(&offer, descriptors)
    }

    fn specs(&self) -> Vec<Spec> {
        let configured = self.reloader.names();
        let spec = |spec| Spec::new(&spec, configured.contains(&spec.name));
        self.host.specs().into_iter().map(spec).collect()
    }

    fn offer_of(&self, devices: Vec<Spec>) -> Result<(Offer, Vec<OwnedFd>)> {
        let Departure { host, port, manager, .. } = self;
        let mut descriptors = vec![host.lock_of_directory().try_clone_to_owned()?];
        let mut sockets = Vec::new();
        for (path, descriptor, inherited) in host.sockets()? {
            sockets.push(Socket { path, inherited });
            descriptors.push(descriptor);
        }
        if let Some((_, port)) = port {
            descriptors.push(port.try_clone()?);
        }
        if let Some(manager) = manager {
            descriptors.push(manager.duplicate()?);
        }
        let offer = Offer {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: rustix::process::getpid().as_raw_nonzero().get(),
            sockets,
            port: port.as_ref().map(|(address, _)| *address),
            manager: manager.as_ref().map(|manager| ManagerPart {
                watchdog: manager
                    .watchdog()
                    .map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)),
            }),
            devices,
            guest_memory: self.reloader.guest_memory(),
        };
        Ok((offer, descriptors))
    }

    /// Gives the bus to a keeper, whose process is `pid`, for as long as it is there. `accepted`
    /// tells it that it gets the bus.
    ///
    /// # Errors
    /// The bus has a keeper, changes its devices, or has a device that cannot be kept.
    pub fn be_kept(
        self: &Arc<Self>,
        socket: BorrowedFd<'_>,
        pid: i32,
        accepted: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some(turn) = self.host.stand_still(Instant::now() + CHANGE_WAIT) else {
            bail!("a change of the devices is under way; try again when it has ended");
        };
        if self.host.keeping().is_some_and(|keeping| keeping.is_open()) {
            bail!("the bus has a keeper already");
        }
        self.host.check_kept()?;
        accepted()?;
        let link = Link::new(socket.try_clone_to_owned()?);
        self.keep(&Keeping::new(link, 0))?;
        drop(turn);
        tracing::info!("process {pid} keeps the bus");
        Ok(())
    }

    /// Gives the bus to its keeper, and each change from now on.
    ///
    /// # Errors
    /// A device cannot be kept, or the keeper has gone.
    pub fn keep(self: &Arc<Self>, keeping: &Arc<Keeping>) -> Result<()> {
        let this = Arc::downgrade(self);
        keeping.set_offer(move || this.upgrade().context("the bus has gone")?.offer());
        // Otherwise the keeper would go on with what a former bus had, or with a part.
        self.host.keep(keeping).inspect_err(|_| keeping.close())
    }

    /// Hands the bus over to process `pid` at the other end of `socket`. `accepted` tells it that
    /// it may begin. If all goes well, this process ends.
    ///
    /// # Errors
    /// The other process has not taken over, for this reason. This bus serves as before.
    pub fn leave(
        &self,
        socket: BorrowedFd<'_>,
        pid: i32,
        accepted: impl FnOnce() -> Result<()>,
    ) -> Result<Infallible> {
        let Some(_turn) = self.host.stand_still(Instant::now() + CHANGE_WAIT) else {
            bail!("a change of the devices is under way; try again when it has ended");
        };
        accepted()?;
        tracing::info!("process {pid} wants to take over");
        let mut leaving = Leaving { bus: self, specs: Vec::new() };
        if let Err(error) = leave(socket, &mut leaving, &LIMITS) {
            tracing::warn!("process {pid} has not taken over, and this bus goes on: {error:#}");
            if let Err(error) = self.host.be_seen() {
                tracing::warn!("clients see the process that has not taken over: {error}");
            }
            return Err(error);
        }
        match (self.host.keeping(), &self.manager) {
            // It asks the other bus to be kept. To the service manager it stays the main process.
            (Some(keeping), _) => keeping.moved(pid),
            (None, Some(manager)) => manager.moved_to(pid),
            (None, None) => {}
        }
        tracing::info!("process {pid} has taken over; this one ends");
        log::flush();
        // Nothing is dropped: all of it is the other's.
        std::process::exit(0)
    }
}

/// One attempt.
struct Leaving<'a> {
    bus: &'a Departure,
    specs: Vec<Spec>,
}

impl Leaves for Leaving<'_> {
    fn offer(&mut self) -> Result<Parcel> {
        let host = &self.bus.host;
        self.specs = self.bus.specs();
        // Each descriptor will be duplicated while the devices stand still.
        make_room_for_descriptors(host.lock_of_directory(), super::room(self.specs.len()));
        let (offer, descriptors) = self.bus.offer_of(self.specs.clone())?;
        // If this process is killed after it has stopped, the sockets stay for the other one.
        host.supervisor().set_leaving(true).context("the supervisor does not answer")?;
        content::pack(&offer, descriptors)
    }

    fn stop(&mut self, by: Instant) -> Result<Parcel> {
        let stopped = content::now();
        let host = &self.bus.host;
        host.hold(by)?;
        let (mut devices, mut descriptors) = (Vec::new(), Vec::new());
        for Spec { name, settings, .. } in &self.specs {
            let (opened, of_server, state) = host.save(name)?;
            let settled = host.get(name)?.device().settled(settings);
            let (names, of_back_end): (Vec<_>, Vec<_>) = opened.into_iter().unzip();
            devices.push(DevicePart {
                name: name.clone(),
                settled,
                opened: names,
                descriptors: u32::try_from(of_server.len()).unwrap_or(u32::MAX),
                state,
            });
            descriptors.extend(of_back_end);
            descriptors.extend(of_server);
        }
        content::pack(&State { stopped, devices, held: Vec::new() }, descriptors)
    }

    fn go_on(&mut self) {
        self.bus.host.go_on();
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        // With a keeper the sockets stay, however this process ends.
        let stays = self.bus.host.keeping().is_some();
        if let Err(error) = self.bus.host.supervisor().set_leaving(stays) {
            tracing::error!(%error, "the supervisor leaves the sockets behind at the end");
        }
    }
}
