// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds the place of a path. A path in an allowed folder cannot lead out of the folder, whoever
//! changes links and folders within it. Neither does it lead over a mount there: it may be of a
//! file system that another user made (FUSE), and nobody may wait for that.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, RwLock};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatxFlags, fstat, open, openat, openat2,
    statx,
};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::config_file;
use super::permits::{Permits, Purpose};
use vbus_net::Way;

/// An allowed folder.
#[derive(Clone)]
struct Folder {
    path: PathBuf,
    /// `None`: the folder did not exist when the supervisor started.
    descriptor: Option<Arc<OwnedFd>>,
}

/// The allowed folders and paths. They change when the bus reads its configuration again.
pub struct Places(RwLock<Arc<Allowed>>);

/// What some [`Permits`] allow, with the folders open.
pub struct Allowed {
    folders: Vec<Folder>,
    vmm_folders: Vec<Folder>,
    permits: Arc<Permits>,
}

/// A place where something can be made or found.
pub enum Place {
    /// A path that the configuration names. Links on it are followed.
    Named(PathBuf),
    /// A name in an allowed folder, or in a folder below it.
    Within { folder: OwnedFd, name: OsString },
}

impl Allowed {
    /// Opens the folders of `permits`.
    pub fn new(permits: Permits) -> Allowed {
        let folder = |path: &PathBuf| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let descriptor = open(path, flags, Mode::empty());
            if let Err(error) = &descriptor {
                let path = path.display();
                tracing::warn!(%path, %error, "the bus cannot use this folder of [allow]");
            }
            Folder { path: path.clone(), descriptor: descriptor.ok().map(Arc::new) }
        };
        let all = |paths: &[PathBuf]| paths.iter().map(folder).collect();
        let (folders, vmm_folders) = (all(&permits.folders), all(&permits.vmm_folders));
        Allowed { folders, vmm_folders, permits: Arc::new(permits) }
    }

    /// What this or `other` allows. Of a folder of both, this one's descriptor counts.
    fn or(&self, other: &Allowed) -> Allowed {
        let both = |of: fn(&Allowed) -> &Vec<Folder>| {
            let is_new = |folder: &&Folder| of(self).iter().all(|known| known.path != folder.path);
            of(self).iter().chain(of(other).iter().filter(is_new)).cloned().collect()
        };
        Allowed {
            folders: both(|allowed| &allowed.folders),
            vmm_folders: both(|allowed| &allowed.vmm_folders),
            permits: Arc::new(self.permits.or(&other.permits)),
        }
    }

    /// What it allows.
    pub fn permits(&self) -> &Permits {
        &self.permits
    }

    /// The folders in which files can be made and overwritten.
    fn writable(&self) -> impl Iterator<Item = &OwnedFd> {
        self.folders.iter().filter_map(|folder| folder.descriptor.as_deref())
    }

    fn find(&self, path: &str, purpose: Purpose) -> io::Result<Place> {
        let path = std::path::absolute(path)?;
        if self.permits.names(&path, purpose) {
            return Ok(Place::Named(path));
        }
        let folders = match purpose {
            Purpose::Vmm => &self.vmm_folders,
            Purpose::Capture | Purpose::Listen | Purpose::Connect => &self.folders,
        };
        for folder in folders {
            let Ok(rest) = path.strip_prefix(&folder.path) else { continue };
            let descriptor = folder.descriptor.as_ref().ok_or_else(|| {
                let path = folder.path.display();
                io::Error::other(format!("the folder {path} did not exist when the bus started"))
            })?;
            let names: Option<Vec<&OsStr>> = rest
                .components()
                .map(|part| match part {
                    Component::Normal(name) => Some(name),
                    _ => None,
                })
                .collect();
            if let Some((name, parents)) = names.as_deref().and_then(<[_]>::split_last) {
                let folder = walk(descriptor, parents)?;
                // Whoever makes a socket there looks at what is there before.
                match step(&folder, name, OFlags::empty()) {
                    Ok(_) | Err(Errno::NOENT) => {}
                    Err(error) => return Err(refused(error)),
                }
                return Ok(Place::Within { folder, name: (*name).into() });
            }
        }
        let folders: Vec<_> =
            folders.iter().map(|folder| folder.path.display().to_string()).collect();
        Err(io::Error::other(format!(
            "this bus may not use the path for this; add its folder to {:?} in [allow] (now: {})",
            purpose.key(),
            folders.join(", ")
        )))
    }
}

impl Places {
    /// The places that `permits` allows.
    pub fn new(permits: Permits) -> Places {
        Places(RwLock::new(Arc::new(Allowed::new(permits))))
    }

    fn now(&self) -> Arc<Allowed> {
        self.0.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// The permits.
    pub fn permits(&self) -> Arc<Permits> {
        self.now().permits.clone()
    }

    /// From now on, allows the places of `allowed`.
    pub fn replace(&self, allowed: Allowed) {
        *self.0.write().unwrap_or_else(|e| e.into_inner()) = Arc::new(allowed);
    }

    /// From now on, allows the places of `allowed` too.
    pub fn widen(&self, allowed: &Allowed) {
        self.replace(allowed.or(&self.now()));
    }

    /// Checks that the bus cannot write the configuration, which is open as `file`: neither now,
    /// nor with what `next` allows.
    ///
    /// # Errors
    /// It can, or nobody can tell.
    pub fn check_config(&self, file: impl AsFd, next: Option<&Allowed>) -> io::Result<()> {
        let now = self.now();
        let next = next.into_iter().flat_map(Allowed::writable);
        config_file::check_outside(file, now.writable().chain(next))
    }

    /// Creates or empties the capture file `path`.
    ///
    /// # Errors
    /// The path is not allowed, it is the configuration file, or as [`Place::create`].
    pub fn create(&self, path: &str) -> io::Result<File> {
        let now = self.now();
        let config = now.permits.config.as_ref().map(Path::new);
        now.find(path, Purpose::Capture)?.create(config)
    }

    /// Finds the place of `path`, which is for `purpose`.
    ///
    /// # Errors
    /// The path is not allowed for that, or the system refuses.
    pub fn find(&self, path: &str, purpose: Purpose) -> io::Result<Place> {
        self.now().find(path, purpose)
    }
}

/// Opens the folder below `folder` that `names` lead to. Follows no link, and enters no mount.
fn walk(folder: &OwnedFd, names: &[&OsStr]) -> io::Result<OwnedFd> {
    let mut at = folder.try_clone()?;
    for name in names {
        at = step(&at, name, OFlags::DIRECTORY).map_err(refused)?;
    }
    Ok(at)
}

/// Finds `name` in `folder`, and asks no other file system than that of the folder.
fn step(folder: &OwnedFd, name: &OsStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    retry_on_intr(|| openat2(folder, name, flags, Mode::empty(), ResolveFlags::NO_XDEV))
}

/// What an error in an allowed folder means.
fn refused(error: Errno) -> io::Error {
    match error {
        Errno::XDEV => io::Error::other(
            "another file system is mounted below the allowed folder; name its folder in [allow], \
             if nobody else may mount there",
        ),
        error => error.into(),
    }
}

impl Place {
    /// A path of the place for system calls that take no folder's descriptor.
    pub fn path(&self) -> PathBuf {
        match self {
            Place::Named(path) => path.clone(),
            Place::Within { folder, name } => {
                Path::new(&format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name)
            }
        }
    }

    /// Creates or empties the file there, as [`vbus_net::open_capture`] does. `config` is the
    /// configuration file.
    ///
    /// # Errors
    /// `ENXIO` if a FIFO is there that nobody reads now; something else than a file or a FIFO is
    /// there, or the configuration file, or the system refuses.
    fn create(&self, config: Option<&Path>) -> io::Result<File> {
        let check = |file: BorrowedFd<'_>| {
            config.map_or(Ok(()), |config| config_file::refuse(file, config))
        };
        let (folder, name) = match self {
            Place::Named(path) => {
                return vbus_net::open_capture(CWD, path, Way::NoLastLink, check);
            }
            Place::Within { folder, name } => (folder, name),
        };
        let opened = vbus_net::open_capture(folder, Path::new(name), Way::Plain, check);
        let file = opened.map_err(|error| match Errno::from_io_error(&error) {
            Some(errno) => refused(errno),
            None => error,
        })?;
        match FileType::from_raw_mode(fstat(&file)?.st_mode) {
            FileType::RegularFile | FileType::Fifo => Ok(file),
            _ => Err(io::Error::other("it is no file")),
        }
    }

    /// Connects a non-blocking socket to the one there.
    ///
    /// # Errors
    /// No socket is there, or the system refuses. A symbolic link is refused: whoever owns the
    /// folder could lead this process to any socket, also to that of the bus's own control.
    pub fn connect(&self) -> io::Result<OwnedFd> {
        // The name may become a link at any time. The descriptor stays the same file.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match self {
            Place::Named(path) => openat(CWD, path, flags, Mode::empty())?,
            Place::Within { folder, name } => {
                step(folder, name, OFlags::empty()).map_err(refused)?
            }
        };
        // Class changes wait for the answer, so no file system is asked: it may be somebody's own.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let found = statx(&file, c"", flags, StatxFlags::TYPE)?;
        match FileType::from_raw_mode(found.stx_mode.into()) {
            FileType::Socket => {}
            FileType::Symlink => return Err(io::Error::other("it is a symbolic link")),
            _ => return Err(Errno::CONNREFUSED.into()),
        }
        connect_to(&SocketAddrUnix::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?)
    }
}

fn connect_to(address: &SocketAddrUnix) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    retry_on_intr(|| connect(&socket, address))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::super::permits::AllowSpec;
    use super::*;

    /// Places of a bus in the folder `bus`, with an allowed folder `vm`, both in `root`. The
    /// configuration names `root/named`.
    fn places(root: &Path) -> Places {
        for name in ["bus", "vm", "vm/below", "other"] {
            std::fs::create_dir(root.join(name)).unwrap();
        }
        let allow = AllowSpec {
            paths: vec![root.join("vm")],
            vmms: vec![root.join("other")],
            ..AllowSpec::default()
        };
        let mut permits = Permits::new(&root.join("bus"), &allow, &[]);
        permits.name(Purpose::Capture, Some(root.join("named")));
        Places::new(permits)
    }

    #[test]
    fn no_path_leads_out_of_a_folder() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let places = places(root);
        let create = |path: &str| places.create(root.join(path).to_str().unwrap());
        for good in ["bus/a", "vm/a", "vm/below/a", "vm/./a", "named"] {
            create(good).unwrap_or_else(|error| panic!("{good}: {error}")).write_all(b"x").unwrap();
        }
        assert_eq!(std::fs::read(root.join("vm/below/a")).unwrap(), b"x");
        for bad in ["a", "other/a", "vm/../other/a", "bus/..", "vm", "bus", "vmother", "named2"] {
            let error = create(bad).unwrap_err().to_string();
            assert!(error.contains("\"paths\" in [allow]"), "{bad}: {error}");
        }
        for bad in ["/etc/passwd", ""] {
            assert!(places.find(bad, Purpose::Capture).is_err());
        }
        // What the configuration names for a capture is no socket.
        for purpose in [Purpose::Listen, Purpose::Connect, Purpose::Vmm] {
            let named = places.find(root.join("named").to_str().unwrap(), purpose);
            let text = named.err().unwrap().to_string();
            assert!(text.contains(&format!("{:?} in [allow]", purpose.key())), "{text}");
        }
        std::fs::write(root.join("other/secret"), "secret").unwrap();
        symlink(root.join("other"), root.join("vm/out")).unwrap();
        symlink(root.join("other/secret"), root.join("vm/link")).unwrap();
        symlink("/proc/self/fd", root.join("vm/fd")).unwrap();
        for bad in ["vm/out/secret", "vm/link", "vm/fd/0", "vm/below"] {
            assert!(create(bad).is_err(), "{bad}");
        }
        assert_eq!(std::fs::read(root.join("other/secret")).unwrap(), b"secret");
        assert_eq!(std::fs::read_dir(root.join("other")).unwrap().count(), 1);
    }

    /// A file system of somebody's own may never answer. So the lookup must stop before it, and not
    /// ask it.
    #[test]
    fn no_path_leads_into_a_mount_below_a_folder() {
        vbus_test_driver::run_with_own_mounts("supervisor::place::tests::looks_over_mounts");
    }

    #[test]
    #[ignore = "runs in a process of its own"]
    fn looks_over_mounts() {
        use rustix::mount::{MountFlags, mount, mount_bind};
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let places = places(root);
        for name in ["vm/mount", "vm/below/mount"] {
            std::fs::create_dir(root.join(name)).unwrap();
            let mounted = mount("none", root.join(name), "tmpfs", MountFlags::empty(), None);
            if let Err(error) = mounted {
                eprintln!("{}{error}", vbus_test_driver::NO_MOUNT);
                return;
            }
        }
        // The folder itself may be a mount, and a single file may be one.
        std::fs::write(root.join("vm/file"), "").unwrap();
        std::fs::write(root.join("other/file"), "kept").unwrap();
        mount_bind(root.join("other/file"), root.join("vm/file")).unwrap();
        for bad in ["vm/mount", "vm/mount/a", "vm/below/mount/a", "vm/file"] {
            let path = root.join(bad);
            for purpose in [Purpose::Capture, Purpose::Listen, Purpose::Connect] {
                let error = places.find(path.to_str().unwrap(), purpose).err().unwrap();
                assert!(error.to_string().contains("is mounted below"), "{bad}: {error}");
            }
        }
        // Somebody mounts between the lookup and its use.
        let folder = open(root.join("vm"), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let place = Place::Within { folder, name: "file".into() };
        assert!(place.create(None).unwrap_err().to_string().contains("is mounted below"));
        assert!(place.connect().unwrap_err().to_string().contains("is mounted below"));
        assert_eq!(std::fs::read(root.join("other/file")).unwrap(), b"kept");
        places.create(root.join("vm/below/a").to_str().unwrap()).unwrap();
    }

    #[test]
    fn a_fifo_is_no_trap() {
        let root = tempfile::tempdir().unwrap();
        let places = places(root.path());
        let path = root.path().join("vm/fifo");
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let create = || places.create(path.to_str().unwrap());
        let error = create().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::NXIO.raw_os_error()));
        let _reader = open(&path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
        let file = create().unwrap();
        assert!(rustix::fs::fcntl_getfl(&file).unwrap().contains(OFlags::NONBLOCK));
    }

    #[test]
    fn only_sockets_in_the_folders_are_reached() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let places = places(root);
        let listen = |path: &str| UnixListener::bind(root.join(path)).unwrap();
        let _listeners = [listen("vm/s"), listen("other/s")];
        symlink(root.join("other/s"), root.join("vm/link")).unwrap();
        std::fs::write(root.join("vm/file"), "").unwrap();
        let connect_for = |purpose, path: &str| {
            let path = root.join(path);
            places.find(path.to_str().unwrap(), purpose).and_then(|place| place.connect())
        };
        let connect = |path: &str| connect_for(Purpose::Connect, path);
        connect("vm/s").unwrap();
        for bad in ["other/s", "vm/link", "vm/file", "vm/none"] {
            assert!(connect(bad).is_err(), "{bad}");
        }
        // A folder with sockets of VMMs is for nothing else, and the other way round.
        connect_for(Purpose::Vmm, "other/s").unwrap();
        assert!(connect_for(Purpose::Vmm, "vm/s").is_err());
    }
}
