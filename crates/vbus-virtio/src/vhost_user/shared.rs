// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the device's tasks and the back end share.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{SendFlags, send};
use vbus_core::{ConnectionState, Endpoint, ErrorCode, Host, lock};
use vbus_eventfd::PeerEventfd;
use vfio_user_protocol::PeerFds;

use super::failure::Failure;
use super::message;
use crate::device::{Session, Transport, VirtioDevice};
use crate::queue::Position;

/// The device at work.
#[derive(Default)]
pub struct Running {
    /// Number of sessions so far. A task of an earlier one may still report an error.
    pub number: u64,
    pub session: Option<Box<dyn Session>>,
    /// The error that has ended the session. It stays until the front end stops all rings.
    pub broken: Option<ErrorCode>,
    /// Where each ring was left by the session that an error has ended.
    left: Vec<Option<Position>>,
}

impl Running {
    /// Takes ring `at` away from the device. Returns where it goes on.
    pub fn stop(&mut self, at: usize) -> Option<Position> {
        let index = u16::try_from(at).ok()?;
        match &mut self.session {
            Some(session) => session.disable(index),
            None => self.left.get_mut(at)?.take(),
        }
    }
}

/// An eventfd of the front end that the device signals.
type Signal = RwLock<Option<PeerEventfd>>;

/// The back end as the device sees it.
pub struct Shared {
    endpoint: Arc<Endpoint>,
    /// By ring: the driver's interrupt.
    calls: Box<[Signal]>,
    /// By ring: the front end learns of an error.
    errors: Box<[Signal]>,
    /// The device configuration.
    pub config: Mutex<Vec<u8>>,
    /// The front end's socket for what the device has to say. Its close may wait: the front end can
    /// have sent descriptors there, which nobody has received.
    channel: Mutex<Option<PeerFds>>,
    pub running: Mutex<Running>,
}

impl Shared {
    /// Of `device`, which tells this its configuration from now on.
    pub fn new(device: &Arc<dyn VirtioDevice>, endpoint: &Arc<Endpoint>) -> Arc<Shared> {
        let signals = || (0..device.kind().queues).map(|_| Signal::default()).collect();
        let shared = Arc::new(Shared {
            endpoint: endpoint.clone(),
            calls: signals(),
            errors: signals(),
            config: Mutex::new(vec![0; device.config_bytes()]),
            channel: Mutex::default(),
            running: Mutex::default(),
        });
        let transport: Arc<dyn Transport> = shared.clone();
        device.attach(Arc::downgrade(&transport));
        shared
    }

    /// The front that every device has.
    pub fn host(&self) -> &Host {
        self.endpoint.host()
    }

    /// Sets how the driver is interrupted for ring `at`. What the former eventfd was to tell, this
    /// one tells too: it is signalled once.
    pub fn set_call(&self, at: usize, fd: Option<OwnedFd>) -> Result<(), Errno> {
        set(&self.calls[at], fd)?;
        signal(&self.calls[at]);
        Ok(())
    }

    /// Sets how the front end learns of an error of ring `at`.
    pub fn set_err(&self, at: usize, fd: Option<OwnedFd>) -> Result<(), Errno> {
        set(&self.errors[at], fd)
    }

    /// Sets the socket for what the device has to say.
    pub fn set_channel(&self, socket: Option<PeerFds>) {
        *lock(&self.channel) = socket;
    }

    /// The front end has gone.
    pub fn forget_signals(&self) {
        for signal in self.calls.iter().chain(&self.errors) {
            let _ = set(signal, None);
        }
    }

    /// Session `number` has met an error.
    pub fn fail(&self, number: u64, code: ErrorCode) {
        let running = lock(&self.running);
        if running.number == number && running.session.is_some() {
            self.broken(running, code);
        }
    }

    /// An error ends the session. The front end learns of it.
    pub fn broken(&self, mut running: MutexGuard<'_, Running>, code: ErrorCode) -> Failure {
        let host = self.host();
        host.doorbells().detach_all();
        let rings = u16::try_from(self.calls.len()).unwrap_or(u16::MAX);
        if let Some(mut session) = running.session.take() {
            running.left = (0..rings).map(|index| session.disable(index)).collect();
        }
        running.broken = Some(code);
        drop(running);
        host.set_state(ConnectionState::Broken(code));
        // A front end that leaves may take its memory away before this end notices.
        if host.has_left() || host.memory().is_lost() {
            tracing::debug!(device = host.name(), error = %code, "the front end has left");
            return Failure::Device(code);
        }
        host.counters().broken.one();
        tracing::warn!(
            device = host.name(),
            error = %code,
            "a fault ends the session; the driver must reset the device"
        );
        self.errors.iter().for_each(signal);
        Failure::Device(code)
    }
}

impl Transport for Shared {
    fn queue_used(&self, index: u16) {
        if let Some(call) = self.calls.get(usize::from(index)) {
            signal(call);
        }
    }

    /// A front end that has a socket for this learns that there is something to read. One that does
    /// not read its messages loses them, and reads the newest configuration nevertheless.
    fn config_changed(&self, config: Vec<u8>, tell: bool) {
        let mut now = lock(&self.config);
        let differs = *now != config;
        *now = config;
        drop(now);
        let channel = lock(&self.channel);
        let sockets = channel.iter().filter(|_| tell && differs).flat_map(PeerFds::as_slice);
        for socket in sockets {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let _ = retry_on_intr(|| send(socket, &message::config_changed(), flags));
        }
    }
}

fn set(slot: &Signal, fd: Option<OwnedFd>) -> Result<(), Errno> {
    let new = fd.map(PeerEventfd::new).transpose();
    let new = new.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))?;
    *slot.write().unwrap_or_else(|e| e.into_inner()) = new;
    Ok(())
}

/// Signals the eventfd, if there is one. The lock is held meanwhile, so that nobody signals one
/// that was replaced. The signal never blocks.
fn signal(slot: &Signal) {
    if let Some(eventfd) = &*slot.read().unwrap_or_else(|e| e.into_inner()) {
        eventfd.signal();
    }
}
