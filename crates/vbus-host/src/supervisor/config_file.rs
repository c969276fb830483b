// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The configuration file. It decides what the bus may do, so the bus must not be able to write it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, fstat, open, readlink, stat};

use crate::config;

/// The device and the inode of a file: two names of one file have the same.
type Identity = (u64, u64);

fn identity(file: impl AsFd) -> io::Result<Identity> {
    let found = fstat(file)?;
    Ok((found.st_dev, found.st_ino))
}

/// Opens the file, to read it again. Does not wait for a FIFO.
///
/// # Errors
/// It is no regular file, or the system refuses.
pub fn open_again(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let failed = |text: &str| io::Error::other(format!("{}: {text}", path.display()));
    let file = open(path, flags, Mode::empty()).map_err(|e| failed(&e.to_string()))?;
    match FileType::from_raw_mode(fstat(&file)?.st_mode) {
        FileType::RegularFile => Ok(file.into()),
        _ => Err(failed("it is no file, so it cannot be read again")),
    }
}

/// Reads the file that [`open_again`] has opened.
///
/// # Errors
/// It is too large, is no text, or cannot be read.
pub fn read(path: &Path, file: &File) -> io::Result<String> {
    config::text_of(path, file).map_err(io::Error::other)
}

/// Refuses `file` if it is the configuration file `path`, under whatever name it was opened.
///
/// # Errors
/// It is.
pub fn refuse(file: impl AsFd, path: &Path) -> io::Result<()> {
    // A configuration that is not there cannot be read either.
    let Ok(found) = stat(path) else { return Ok(()) };
    if identity(file)? == (found.st_dev, found.st_ino) {
        return Err(io::Error::other(
            "it is the configuration file of the bus; use the path of another file",
        ));
    }
    Ok(())
}

/// Checks that the configuration, which is open as `file`, lies in none of `folders`, in which the
/// bus may make and overwrite files. Links on the way to the file do not count.
///
/// # Errors
/// It lies in one of them or below it, or nobody can tell.
pub fn check_outside<'a>(
    file: impl AsFd,
    folders: impl Iterator<Item = &'a OwnedFd>,
) -> io::Result<()> {
    let link = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let real = readlink(link, Vec::new())?.into_string().map(PathBuf::from);
    let real = real.map_err(|_| io::Error::other("the path of the configuration is not UTF-8"))?;
    let folders = folders.map(identity).collect::<io::Result<Vec<_>>>()?;
    for above in real.ancestors().skip(1) {
        let found = stat(above)?;
        if folders.contains(&(found.st_dev, found.st_ino)) {
            return Err(io::Error::other(format!(
                "the configuration {} lies in {}, where the bus may overwrite files, so whoever \
                 takes the bus over could give it more rights; move the file out of the folders of \
                 \"paths\" in [allow] and out of the bus's directory, and start the bus anew",
                real.display(),
                above.display()
            )));
        }
    }
    Ok(())
}
