// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What back ends open outside of their process: capture files, sockets and TAP interfaces.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, fcntl_getfl, fcntl_setfl, fstat, ftruncate,
    openat, openat2, statat,
};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use vbus_tap::{Setup, Vhost, set_mtu, set_up};

/// Opens what back ends need outside of their process. A process without the right to open
/// anything passes an implementation that asks another process.
///
/// The calls run on threads that serve devices, so they must not wait for a peer.
pub trait Opener: Send + Sync {
    /// Creates or overwrites the file at `path`, for a capture, as [`open_capture`] does.
    ///
    /// # Errors
    /// `ENXIO` if a FIFO is there that nobody reads now; the system refuses, or this opener does
    /// not allow the path. The text says which.
    fn create(&self, path: &Path) -> io::Result<File>;

    /// Makes a non-blocking UNIX stream socket that listens at `path`. Only the user of the opener
    /// may connect to it. A socket there that has no listener is replaced.
    ///
    /// # Errors
    /// The same as those of [`create`](Self::create).
    fn listen(&self, path: &Path) -> io::Result<OwnedFd>;

    /// Removes the socket that [`listen`](Self::listen) made at `path`. It may be gone already.
    fn remove(&self, path: &Path);

    /// Connects a non-blocking UNIX stream socket to the one at `path`.
    ///
    /// # Errors
    /// The same as those of [`create`](Self::create), and what `connect(2)` returns.
    fn connect(&self, path: &Path) -> io::Result<OwnedFd>;

    /// Attaches `queues` queues to the TAP interface `name`, and creates it if it does not exist.
    /// The kernel replaces a `%d` in the name by a number. Sets the MTU and brings the interface
    /// up; if that fails, the log says so. Returns the interface's name and its queues.
    ///
    /// # Errors
    /// The same as those of [`create`](Self::create). For errors of the system,
    /// [`vbus_tap::advice`] says what to do.
    fn tap(&self, name: &str, queues: u16, mtu: u16) -> io::Result<(String, Vec<vbus_tap::Queue>)>;

    /// Opens the kernel's end of `pairs` queue pairs, /dev/vhost-net.
    ///
    /// # Errors
    /// The same as those of [`create`](Self::create). For errors of the system,
    /// [`vbus_tap::vhost_advice`] says what to do.
    fn vhost(&self, pairs: u16) -> io::Result<Vec<Vhost>>;

    /// What a former process has handed over for the back end of the device called `device`. The
    /// back end uses these descriptors in place of opening its own. The provided method has none.
    /// It is asked once for each device, when the device is made.
    fn handed_over(&self, device: &str) -> HandedOver {
        let _ = device;
        HandedOver::default()
    }
}

/// The descriptors that a back end had in another process, by name
/// ([`Backend::descriptors`](crate::Backend::descriptors)).
#[derive(Debug, Default)]
pub struct HandedOver(Vec<(String, OwnedFd)>);

impl HandedOver {
    /// These descriptors.
    pub fn new(descriptors: Vec<(String, OwnedFd)>) -> HandedOver {
        HandedOver(descriptors)
    }

    /// Takes the descriptor called `name`, if there is one.
    pub(crate) fn take(&mut self, name: &str) -> Option<OwnedFd> {
        self.take_if(|other| other == name).map(|(_, fd)| fd)
    }

    /// Takes the first descriptor whose name `is_it`.
    pub(crate) fn take_if(&mut self, is_it: impl Fn(&str) -> bool) -> Option<(String, OwnedFd)> {
        let at = self.0.iter().position(|(name, _)| is_it(name))?;
        Some(self.0.remove(at))
    }
}

/// What the path of a file may lead over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Links and mounts.
    Any,
    /// Mounts, and links; but the file itself is no link.
    NoLastLink,
    /// Neither. A mount may be of a file system that somebody made himself (FUSE), which lets
    /// whoever looks there wait for ever.
    Plain,
}

/// Creates or empties the file at `path`, for a capture. A relative path begins at `folder`, and
/// leads over what `way` says. A FIFO there is opened without waiting, and its descriptor is
/// non-blocking. `check` sees what was opened, before anything is emptied.
///
/// # Errors
/// `ENXIO` if a FIFO is there that nobody reads now; `check` or the system refuses.
pub fn open_capture(
    folder: impl AsFd,
    path: &Path,
    way: Way,
    check: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
) -> io::Result<File> {
    // Without NONBLOCK, opening a FIFO would wait for its reader.
    let mut flags =
        OFlags::WRONLY | OFlags::CREATE | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    if way != Way::Any {
        flags |= OFlags::NOFOLLOW;
    }
    let mode = Mode::from_raw_mode(0o600);
    let plain = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
    let opened = retry_on_intr(|| match way {
        Way::Plain => openat2(&folder, path, flags, mode, plain),
        Way::Any | Way::NoLastLink => openat(&folder, path, flags, mode),
    });
    let file = match opened {
        Err(Errno::LOOP) if way != Way::Any => {
            return Err(io::Error::other("it is a symbolic link"));
        }
        Err(Errno::NXIO) => {
            let found = statat(&folder, path, AtFlags::empty())?;
            return Err(match FileType::from_raw_mode(found.st_mode) {
                FileType::Fifo => Errno::NXIO.into(),
                _ => io::Error::other("it is no file"),
            });
        }
        other => other?,
    };
    check(file.as_fd())?;
    match FileType::from_raw_mode(fstat(&file)?.st_mode) {
        FileType::Fifo => return Ok(file.into()),
        // Only now is it known what the file is.
        FileType::RegularFile => ftruncate(&file, 0)?,
        _ => {}
    }
    fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
    Ok(file.into())
}

/// Opens everything itself, with the rights of this process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Direct;

impl Opener for Direct {
    fn create(&self, path: &Path) -> io::Result<File> {
        open_capture(CWD, path, Way::Any, |_| Ok(()))
    }

    fn listen(&self, path: &Path) -> io::Result<OwnedFd> {
        let address = SocketAddrUnix::new(path)?;
        let ask = stream_socket()?;
        let stale = std::fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket())
            && retry_on_intr(|| connect(&ask, &address)) == Err(Errno::CONNREFUSED);
        drop(ask);
        if stale {
            std::fs::remove_file(path)?;
        }
        let socket = stream_socket()?;
        bind(&socket, &address)?;
        // Set the mode before a peer can connect.
        std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
        listen(&socket, 1)?;
        Ok(socket)
    }

    fn remove(&self, path: &Path) {
        let _ = std::fs::remove_file(path); // Another process may have removed it.
    }

    fn connect(&self, path: &Path) -> io::Result<OwnedFd> {
        let socket = stream_socket()?;
        let address = SocketAddrUnix::new(path)?;
        retry_on_intr(|| connect(&socket, &address))?;
        Ok(socket)
    }

    fn tap(&self, name: &str, queues: u16, mtu: u16) -> io::Result<(String, Vec<vbus_tap::Queue>)> {
        let setup = Setup { multi_queue: queues > 1, ..Setup::default() };
        let (first, name) = vbus_tap::Queue::attach(name, setup)?;
        let mut all = vec![first];
        for _ in 1..queues {
            all.push(vbus_tap::Queue::attach(&name, setup)?.0);
        }
        if let Err(error) = set_mtu(&name, mtu).and_then(|()| set_up(&name)) {
            let text = "cannot set the MTU and bring the interface up: do it with `ip link`";
            tracing::warn!(tap = name, mtu, %error, "{text}");
        }
        Ok((name, all))
    }

    fn vhost(&self, pairs: u16) -> io::Result<Vec<Vhost>> {
        (0..pairs).map(|_| Ok(Vhost::open()?)).collect()
    }
}

fn stream_socket() -> rustix::io::Result<OwnedFd> {
    socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
}
