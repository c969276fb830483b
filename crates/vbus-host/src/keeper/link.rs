// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus's side: it gives its keeper all that it has, and each change of it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{Errno, retry_on_intr};
use serde_json::Value;
use vbus_core::{DeviceState, Endpoint, lock};
use vbus_vfio_user::{Keep, SavedServer};

use super::journal::{self, kind};
use crate::take_over::{DevicePart, Parcel, StatePart, Wire};

/// How long the keeper may take to take a message. A client waits meanwhile, QEMU for 5 s.
const PATIENCE: Duration = Duration::from_secs(1);

/// The connection of the bus to its keeper.
pub struct Link {
    /// `None`: the keeper has gone.
    socket: Mutex<Option<OwnedFd>>,
}

impl Link {
    /// Over this socket.
    pub fn new(socket: OwnedFd) -> Link {
        Link { socket: Mutex::new(Some(socket)) }
    }

    fn send(&self, kind: u8, body: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut socket = lock(&self.socket);
        let Some(open) = &*socket else { return Err(io::Error::other("the keeper has gone")) };
        let wire = Wire::new(open.as_fd());
        let sent = wire.send(kind, body, descriptors, Instant::now() + PATIENCE);
        let is_too_large = |error: &&io::Error| {
            error.kind() == io::ErrorKind::InvalidInput && error.raw_os_error().is_none()
        };
        // One device that is too large must not take the keeper from the others.
        if let Some(error) = sent.as_ref().err().filter(|error| !is_too_large(error)) {
            // A part of the message may be on its way, so nothing can follow it.
            wire.close();
            *socket = None;
            tell_lost(error);
        }
        sent
    }

    fn send_parcel(&self, kind: u8, parcel: &Parcel) -> io::Result<()> {
        let descriptors: Vec<_> = parcel.descriptors.iter().map(|fd| fd.as_fd()).collect();
        self.send(kind, &parcel.body, &descriptors)
    }

    /// Whether the keeper is there. A bus that has nothing to send learns of its end here.
    pub fn is_open(&self) -> bool {
        let mut socket = lock(&self.socket);
        let has_gone = socket.as_ref().is_some_and(has_gone);
        if has_gone {
            *socket = None;
            tell_lost(&io::Error::other("the keeper has gone"));
        }
        socket.is_some()
    }

    /// Ends the connection: the keeper has not got all, and must not go on with what it has.
    fn close(&self) {
        if let Some(socket) = lock(&self.socket).take() {
            Wire::new(socket.as_fd()).close();
        }
    }
}

/// Whether the other end of a connection is closed.
fn has_gone(socket: &OwnedFd) -> bool {
    let ends = PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR;
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    let polled = retry_on_intr(|| poll(&mut fds, Some(&at_once)));
    polled.is_ok() && fds[0].revents().intersects(ends)
}

fn tell_lost(error: &io::Error) {
    tracing::error!(
        %error,
        "the bus has no keeper any more: if it is killed, its clients lose their connections"
    );
}

/// What gives the keeper the states of devices.
pub struct Keeping {
    link: Link,
    /// How often the keeper had started the bus before.
    restarts: u32,
    /// The settings of each device.
    settings: Mutex<HashMap<String, Value>>,
    /// What the bus has beside its devices, as for a bus that takes over.
    offer: OnceLock<Box<MakeOffer>>,
    /// What the keeper was given to learn that it is not the keeper any more.
    lease: OnceLock<OwnedFd>,
}

type MakeOffer = dyn Fn() -> anyhow::Result<Parcel> + Send + Sync;

impl Keeping {
    /// For the keeper at the other end of `link`, which has started the bus `restarts` times
    /// because it had died.
    pub fn new(link: Link, restarts: u32) -> Arc<Keeping> {
        let (settings, offer, lease) = Default::default();
        Arc::new(Keeping { link, restarts, settings, offer, lease })
    }

    /// How often the keeper had started the bus because it had died.
    pub fn restarts(&self) -> u32 {
        self.restarts
    }

    /// Whether the keeper is there.
    pub fn is_open(&self) -> bool {
        self.link.is_open()
    }

    /// Gives the keeper nothing more, because it has not got all.
    pub fn close(&self) {
        self.link.close();
    }

    /// The settings of a device are these from now on. Before the first state of a device.
    pub fn set_settings(&self, device: &str, settings: &Value) {
        lock(&self.settings).insert(device.to_owned(), settings.clone());
    }

    /// Sets what says what the bus has beside its devices.
    pub fn set_offer(&self, make: impl Fn() -> anyhow::Result<Parcel> + Send + Sync + 'static) {
        let _ = self.offer.set(Box::new(make));
    }

    /// What the bus has beside its devices has changed.
    ///
    /// # Errors
    /// The keeper has gone, or this process has as many descriptors as it may have.
    pub fn bus(&self) -> anyhow::Result<()> {
        let make = self.offer.get().context("the bus is not complete")?;
        Ok(self.link.send_parcel(kind::BUS, &make()?)?)
    }

    /// The process that cleans up behind this one.
    ///
    /// # Errors
    /// The keeper has gone.
    pub fn supervisor(&self, process: BorrowedFd<'_>) -> io::Result<()> {
        self.link.send(kind::SUPERVISOR, &[], &[process])
    }

    /// Gives the keeper what says later that it is not the keeper any more.
    ///
    /// # Errors
    /// The keeper has gone, or this process has as many descriptors as it may have.
    pub fn lease(&self) -> io::Result<()> {
        let lease = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        self.link.send(kind::LEASE, &[], &[lease.as_fd()])?;
        let _ = self.lease.set(lease);
        Ok(())
    }

    /// The keeper is not the keeper any more, and learns it also if it stands still now: somebody
    /// else keeps the bus, or another bus has taken over.
    pub fn replaced(&self) {
        if let Some(lease) = self.lease.get() {
            let _ = rustix::io::write(lease, &1_u64.to_ne_bytes());
        }
    }

    /// The keeper has everything.
    ///
    /// # Errors
    /// The keeper has gone.
    pub fn whole(&self) -> io::Result<()> {
        self.link.send(kind::WHOLE, &[], &[])
    }

    /// A device has left the bus.
    ///
    /// # Errors
    /// The keeper has gone.
    pub fn gone(&self, device: &str) -> io::Result<()> {
        lock(&self.settings).remove(device);
        self.link.send(kind::GONE, device.as_bytes(), &[])
    }

    /// This process ends because somebody asked for that.
    pub fn ends(&self) {
        // If the keeper has gone too, nobody misses it.
        let _ = self.link.send(kind::ENDS, &[], &[]);
    }

    /// Process `pid` has taken over.
    pub fn moved(&self, pid: i32) {
        self.replaced();
        let _ = self.link.send(kind::MOVED, pid.to_string().as_bytes(), &[]);
    }

    /// The state of a device that takes no drivers. It is quiesced to outlast this process.
    ///
    /// # Errors
    /// The keeper has gone, or this process has as many descriptors as it may have.
    pub fn alone(&self, endpoint: &Endpoint, state: DeviceState) -> Result<(), String> {
        self.device(endpoint, StatePart::Alone(Box::new(state)), Vec::new())
    }

    fn device(
        &self,
        endpoint: &Endpoint,
        state: StatePart,
        of_server: Vec<OwnedFd>,
    ) -> Result<(), String> {
        let text = |error: io::Error| error.to_string();
        let name = endpoint.name();
        let settings = lock(&self.settings).get(name).cloned().unwrap_or_default();
        let opened = endpoint.device().descriptors().map_err(text)?;
        let (opened, mut descriptors): (Vec<_>, Vec<_>) = opened.into_iter().unzip();
        let part = DevicePart {
            name: name.to_owned(),
            settled: endpoint.device().settled(&settings),
            opened,
            descriptors: u32::try_from(of_server.len()).unwrap_or(u32::MAX),
            state,
        };
        descriptors.extend(of_server);
        let state = serde_json::to_vec(&part).map_err(|error| error.to_string())?;
        let body = journal::device(name, &state).map_err(text)?;
        self.link.send_parcel(kind::DEVICE, &Parcel { body, descriptors }).map_err(text)
    }
}

impl Keep for Keeping {
    fn keep(&self, endpoint: &Endpoint, saved: SavedServer) -> Result<(), String> {
        let SavedServer { data, descriptors, .. } = saved;
        self.device(endpoint, StatePart::Served(Box::new(data)), descriptors)
    }

    fn has_gone(&self) -> bool {
        !self.is_open()
    }

    fn hold(&self, endpoint: &Endpoint, number: u64, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let body = journal::device(endpoint.name(), &number.to_le_bytes());
        let held = body.and_then(|body| match self.is_open() {
            true => self.link.send(kind::HELD, &body, fds),
            false => Ok(()),
        });
        held.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::take_over::DESCRIPTORS_MAX;

    #[test]
    fn a_bus_that_says_nothing_learns_of_its_keepers_end() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let link = Link::new(ours.into());
        assert!(link.is_open());
        drop(theirs);
        assert!(!link.is_open());
    }

    #[test]
    fn a_device_that_is_too_large_leaves_the_others_their_keeper() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let link = Link::new(ours.into());
        let many = vec![theirs.as_fd(); DESCRIPTORS_MAX + 1];
        assert!(link.send(kind::DEVICE, b"", &many).is_err());
        link.send(kind::WHOLE, &[], &[]).unwrap();
        let frame = Wire::new(theirs.as_fd()).receive(Instant::now() + PATIENCE).unwrap();
        assert_eq!(frame.unwrap().kind, kind::WHOLE);
    }

    #[test]
    fn a_keeper_that_has_not_got_all_sees_the_end() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        // As the bus has it at its standard input.
        let _other = ours.try_clone().unwrap();
        let link = Link::new(ours.into());
        link.send(kind::WHOLE, &[], &[]).unwrap();
        link.close();
        assert!(!link.is_open() && link.send(kind::WHOLE, &[], &[]).is_err());
        let wire = Wire::new(theirs.as_fd());
        let soon = || Instant::now() + PATIENCE;
        assert_eq!(wire.receive(soon()).unwrap().unwrap().kind, kind::WHOLE);
        assert!(wire.receive(soon()).unwrap().is_none());
    }
}
