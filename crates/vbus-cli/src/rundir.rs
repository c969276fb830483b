// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The directory of a bus, which has its sockets.

use std::fs::DirBuilder;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::process::geteuid;

/// The name of the control socket in the directory.
pub const CONTROL: &str = "control.sock";
/// The name of the socket of the metrics in the directory.
pub const METRICS: &str = "metrics.sock";
/// The sockets of the bus itself. All others in the directory are those of devices.
pub const OWN: [&str; 2] = [CONTROL, METRICS];
/// The longest path of a UNIX socket, in bytes.
const SOCKET_PATH_MAX: usize = 107;
/// How long a new bus waits for the supervisor of a dead one, which still has the lock.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The time between two looks at the lock.
const PAUSE: Duration = Duration::from_millis(20);

/// Chooses the directory: `given`, or else `$XDG_RUNTIME_DIR/vbus`, or else `/tmp/vbus-UID`.
pub fn choose(given: Option<&Path>) -> PathBuf {
    if let Some(dir) = given {
        return std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(runtime) if Path::new(&runtime).is_absolute() => Path::new(&runtime).join("vbus"),
        _ => PathBuf::from(format!("/tmp/vbus-{}", geteuid().as_raw())),
    }
}

/// Checks that `path` is short enough for a UNIX socket.
///
/// # Errors
/// The path is too long. The text has its length, the limit, and what to do.
pub fn check_socket_path(path: &Path) -> Result<()> {
    let len = path.as_os_str().len();
    ensure!(
        len <= SOCKET_PATH_MAX,
        "the path of the socket {} has {len} bytes, and the system allows at most \
         {SOCKET_PATH_MAX}; \
         use a shorter directory (--dir) or name",
        path.display()
    );
    Ok(())
}

/// Checks that no other user can have put sockets into `dir`: it belongs to this user or to root,
/// and only its owner may write to it.
///
/// # Errors
/// `dir` is no such directory. The text says what to do.
pub fn check(dir: &Path) -> Result<()> {
    let uid = check_writers(dir)?;
    ensure!(
        uid == geteuid().as_raw() || uid == 0,
        "{} belongs to another user (uid {uid})",
        dir.display()
    );
    Ok(())
}

/// Checks that only the owner of `dir` may write to it, whoever that is. Returns the owner. This is
/// enough for a client whose user named the directory of a bus that another user runs.
///
/// # Errors
/// `dir` is no such directory. The text says what to do.
pub fn check_writers(dir: &Path) -> Result<u32> {
    let meta =
        std::fs::symlink_metadata(dir).with_context(|| format!("no bus in {}", dir.display()))?;
    ensure!(meta.is_dir(), "{} is not a directory", dir.display());
    ensure!(
        meta.mode() & 0o022 == 0,
        "others may write to {} (mode {:o}); choose another one, or chmod 700 it",
        dir.display(),
        meta.mode() & 0o7777
    );
    Ok(meta.uid())
}

/// A directory in which this process serves a bus. No other process can serve there while this
/// value exists.
pub struct Claimed {
    dir: PathBuf,
    /// The open directory, which holds the lock.
    lock: OwnedFd,
}

impl Claimed {
    /// Makes the directory if it does not exist, checks its owner, locks it, and removes the
    /// sockets that a dead bus left. A new directory has mode 0711 if it is `shared`, so that other
    /// users can reach the sockets that are for them, and 0700 otherwise.
    ///
    /// # Errors
    /// The directory cannot be made, belongs to another user, or has a bus already. Or its name is
    /// not UTF-8, which JSON for a VMM requires, or too long for sockets.
    pub fn claim(dir: &Path, shared: bool) -> Result<Claimed> {
        ensure!(
            dir.to_str().is_some(),
            "the name of the directory {} is not UTF-8, so it cannot be written in JSON for a VMM; \
             choose another --dir",
            dir.display()
        );
        check_socket_path(&dir.join(CONTROL))?;
        let made = DirBuilder::new().mode(if shared { 0o711 } else { 0o700 }).create(dir);
        if let Err(error) = made {
            if error.kind() != std::io::ErrorKind::AlreadyExists {
                return Err(error).with_context(|| format!("cannot make {}", dir.display()));
            }
        }
        check(dir)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = open(dir, flags, Mode::empty())
            .with_context(|| format!("cannot open {}", dir.display()))?;
        let begin = Instant::now();
        loop {
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::AGAIN) => {
                    // The other bus may have ended, and its supervisor is about to end.
                    let is_alive = UnixStream::connect(dir.join(CONTROL)).is_ok();
                    ensure!(
                        !is_alive && begin.elapsed() < TIMEOUT,
                        "another vbus serves in {} already; stop it, or choose another --dir",
                        dir.display()
                    );
                    std::thread::sleep(PAUSE);
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot lock {}", dir.display()));
                }
            }
        }
        let claimed = Claimed { dir: dir.to_owned(), lock };
        claimed.remove_stale()?;
        Ok(claimed)
    }

    /// The directory of a bus whose place this process takes. `lock` is that bus's lock, of which
    /// it has another descriptor.
    ///
    /// # Errors
    /// It is not the lock of this directory, or somebody else holds it.
    pub fn adopt(dir: &Path, lock: OwnedFd) -> Result<Claimed> {
        check(dir)?;
        let (here, given) = (std::fs::symlink_metadata(dir)?, rustix::fs::fstat(&lock)?);
        ensure!(
            (here.dev(), here.ino()) == (given.st_dev, given.st_ino),
            "the lock that the other bus handed over is not that of {}",
            dir.display()
        );
        // The holder may lock again.
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .with_context(|| format!("another bus has the lock of {}", dir.display()))?;
        Ok(Claimed { dir: dir.to_owned(), lock })
    }

    /// The lock. While any duplicate of this descriptor is open, no other bus can use the
    /// directory.
    pub fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    /// Whether users other than its owner can reach sockets in the directory.
    pub fn is_shared(&self) -> bool {
        rustix::fs::fstat(&self.lock).is_ok_and(|data| data.st_mode & 0o011 != 0)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Lets another bus use the directory, also while other descriptors of the lock are open. For
    /// the end: the kernel may keep a process that ends, because it closes a descriptor whose file
    /// system does not answer.
    pub fn release(&self) {
        let _ = flock(&self.lock, FlockOperation::NonBlockingUnlock);
    }

    fn remove_stale(&self) -> Result<()> {
        for entry in std::fs::read_dir(&self.dir)? {
            let entry = entry?;
            let path = entry.path();
            let ours =
                path.extension().is_some_and(|e| e == "sock") && entry.file_type()?.is_socket();
            if ours
                && UnixStream::connect(&path)
                    .is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
            {
                std::fs::remove_file(&path)
                    .with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    #[test]
    fn a_directory_that_was_released_is_free_while_a_copy_of_its_lock_is_open() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("bus");
        let claimed = Claimed::claim(&dir, false).unwrap();
        // A supervisor that does not end has such a copy.
        let copy = claimed.lock().try_clone_to_owned().unwrap();
        claimed.release();
        let next = Claimed::claim(&dir, false).unwrap();
        // What is left of the former one does not unlock the next one.
        drop((claimed, copy));
        let other = open(&dir, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let locked = flock(&other, FlockOperation::NonBlockingLockExclusive);
        assert_eq!(locked, Err(rustix::io::Errno::AGAIN));
        drop(next);
        flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap();
    }
}
