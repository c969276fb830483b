// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a service of systemd tells its manager, by datagrams (sd_notify(3)).

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::SendFlags;

/// The socket of the manager. It is connected at the start, before the process gives up rights.
pub struct Manager {
    socket: Option<UnixDatagram>,
    /// The time that systemd allows between two signs of life.
    watchdog: Option<Duration>,
    fed: Instant,
}

impl Manager {
    /// The manager that the environment names, if it names one: NOTIFY_SOCKET, WATCHDOG_USEC,
    /// WATCHDOG_PID. `is_kept`: it may name the keeper, whose child this process is.
    pub fn of_environment(is_kept: bool) -> Manager {
        let variable = |name| std::env::var_os(name);
        let number = |name| variable(name)?.to_str()?.parse::<u64>().ok();
        let of =
            [std::process::id(), if is_kept { std::os::unix::process::parent_id() } else { 0 }];
        let mine = number("WATCHDOG_PID").is_none_or(|pid| of.map(u64::from).contains(&pid));
        let watchdog = number("WATCHDOG_USEC").filter(|&micros| mine && micros > 0);
        Manager {
            socket: variable("NOTIFY_SOCKET").and_then(|path| connect(&path)),
            watchdog: watchdog.map(Duration::from_micros),
            fed: Instant::now(),
        }
    }

    /// The manager that a former process of this service had.
    pub fn taken(socket: OwnedFd, watchdog: Option<Duration>) -> Manager {
        Manager { socket: Some(socket.into()), watchdog, fed: Instant::now() }
    }

    /// What tells the manager of another process.
    ///
    /// # Errors
    /// This process has as many descriptors as it may have.
    pub fn notifier(&self) -> std::io::Result<Option<Notifier>> {
        let socket = self.socket.as_ref().map(UnixDatagram::try_clone).transpose()?;
        Ok(socket.map(|socket| Notifier { socket, watchdog: self.watchdog }))
    }

    /// The service is up.
    pub fn ready(&self) {
        self.tell("READY=1");
    }

    /// The service is about to end.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// How often [`alive`](Self::alive) must be called at least, if systemd watches this service.
    pub fn watchdog_interval(&self) -> Option<Duration> {
        self.watchdog.filter(|_| self.socket.is_some()).map(|allowed| allowed / 4)
    }

    /// The service works as it should.
    pub fn alive(&mut self) {
        let Some(interval) = self.watchdog_interval() else { return };
        if self.fed.elapsed() >= interval {
            self.fed = Instant::now();
            self.tell("WATCHDOG=1");
        }
    }

    fn tell(&self, state: &str) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = send(socket, state) {
            tracing::warn!(%error, "cannot tell systemd {state}");
        }
    }
}

/// Tells the manager which process the service is.
pub struct Notifier {
    socket: UnixDatagram,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// From now on process `pid` is the service's main process.
    pub fn moved_to(&self, pid: i32) {
        if let Err(error) = send(&self.socket, &format!("MAINPID={pid}")) {
            tracing::warn!(%error, "cannot tell systemd of the new main process");
        }
    }

    /// A descriptor for the other process.
    ///
    /// # Errors
    /// This process has as many descriptors as it may have.
    pub fn duplicate(&self) -> std::io::Result<OwnedFd> {
        Ok(self.socket.try_clone()?.into())
    }

    /// The time between two signs of life.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }
}

/// Sends a datagram, if the manager takes it now: one that reads nothing must not hold the bus up.
/// The socket may be one of a former bus, which can make it wait.
fn send(socket: &UnixDatagram, state: &str) -> Result<(), Errno> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    retry_on_intr(|| rustix::net::send(socket, state.as_bytes(), flags)).map(drop)
}

fn connect(path: &OsString) -> Option<UnixDatagram> {
    // An abstract address begins with '@'.
    let address = match path.to_str().and_then(|path| path.strip_prefix('@')) {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(Path::new(path)),
    };
    let connected = address.and_then(|address| {
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        Ok(socket)
    });
    connected
        .inspect_err(|error| tracing::warn!(%error, "NOTIFY_SOCKET: cannot reach systemd"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A former bus may have made the socket one that waits.
    #[test]
    fn a_manager_that_reads_nothing_holds_nobody_up() {
        let (own, theirs) = UnixDatagram::pair().unwrap();
        let mut manager = Manager::taken(own.into(), Some(Duration::from_nanos(4)));
        let notifier = manager.notifier().unwrap().unwrap();
        while send(&notifier.socket, "full=1").is_ok() {}
        manager.ready();
        manager.alive();
        notifier.moved_to(1);
        manager.stopping();
        let mut first = [0; 16];
        assert_eq!(theirs.recv(&mut first).unwrap(), 6);
    }
}
