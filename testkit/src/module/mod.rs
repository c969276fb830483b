// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Linux driver, built for Debian's kernels: the kernel module `vbus.ko`.
//!
//! The Rust part is one object for all kernels ([`object`]). The kernel's own build compiles the C
//! shim for each kernel and links the two, against nothing but the kernel's headers (`link.rs`).
//! All that this needs is in parts of the kit: [`toolchain`] and [`headers`]. Nothing is installed,
//! and no root is needed.

pub mod headers;
mod link;
mod object;
pub mod toolchain;

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::kit::kernels::DebianKernel;
use crate::workspace;
use toolchain::Toolchain;

/// A built module.
pub struct Module {
    /// The release of the kernel that it is for, as `uname -r` says it.
    pub release: String,
    /// The file `vbus.ko`.
    pub path: PathBuf,
}

/// Builds the module for a kernel, or takes the last build if its sources have not changed. For
/// `mirror` see [`Kit::get`](crate::kit::Kit::get).
///
/// # Errors
/// A part of the kit cannot be fetched, or the sources do not build. A warning of the kernel's
/// build is an error.
pub fn build(kernel: DebianKernel, mirror: Option<&str>) -> Result<Module> {
    let toolchain = Toolchain::get(&workspace::target(), mirror)?;
    let headers = headers::get(&workspace::target(), kernel, mirror)?;
    let object = object::build(&toolchain)?;
    let path = link::build(&toolchain, &headers, kernel, &object)?;
    Ok(Module { release: headers.release, path })
}

/// Builds the Rust part of the module, which is the same for every kernel. For `mirror` see
/// [`Kit::get`](crate::kit::Kit::get). Returns its path.
///
/// # Errors
/// Those of [`build`].
pub fn object(mirror: Option<&str>) -> Result<PathBuf> {
    object::build(&Toolchain::get(&workspace::target(), mirror)?)
}

/// The sources of the module: the folder `linux` of the workspace.
pub fn sources() -> PathBuf {
    workspace::root().join("linux")
}

/// The folder of what is built.
fn out() -> PathBuf {
    workspace::target().join("module")
}

/// All files below `dirs`, sorted, whose name passes `wanted`.
fn files(dirs: &[PathBuf], wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let mut left = dirs.to_vec();
    let mut files = Vec::new();
    while let Some(dir) = left.pop() {
        let entries = fs::read_dir(&dir).with_context(|| format!("no folder {}", dir.display()))?;
        for entry in entries {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                left.push(entry.path());
            } else if kind.is_file() && wanted(&entry.file_name().to_string_lossy()) {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    Ok(files)
}

/// A number that differs if one of the files, or the text `more`, does.
fn fingerprint(files: &[PathBuf], more: &str) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    more.hash(&mut hasher);
    for path in files {
        path.hash(&mut hasher);
        fs::read(path)
            .with_context(|| format!("cannot read {}", path.display()))?
            .hash(&mut hasher);
    }
    Ok(format!("{:016x}", hasher.finish()))
}

/// Whether the file beside `built` says that it was built from sources with this fingerprint.
fn is_fresh(built: &Path, fingerprint: &str) -> bool {
    let said = fs::read_to_string(built.with_extension("fingerprint"));
    built.exists() && said.is_ok_and(|said| said == fingerprint)
}

/// Lets [`is_fresh`] know what `built` was built from.
fn note(built: &Path, fingerprint: &str) -> Result<()> {
    fs::write(built.with_extension("fingerprint"), fingerprint)
        .with_context(|| format!("cannot write beside {}", built.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn the_module_has_the_version_of_the_workspace() {
        let read = |name: &str| fs::read_to_string(sources().join(name)).unwrap();
        let version = env!("CARGO_PKG_VERSION");
        assert!(read("shim/vbus.h").contains(&format!("#define VBUS_VERSION \"{version}\"\n")));
        assert!(read("Cargo.toml").contains(&format!("\nversion = \"{version}\"\n")));
    }

    #[test]
    fn what_is_built_is_fresh_until_a_source_changes() {
        let dir = std::env::temp_dir().join(format!("vbus-module-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (source, built) = (dir.join("a.rs"), dir.join("built.o"));
        fs::write(&source, "one").unwrap();
        let now =
            || fingerprint(&files(std::slice::from_ref(&dir), |name| name == "a.rs")?, "flags");
        let first = now().unwrap();
        note(&built, &first).unwrap();
        assert!(!is_fresh(&built, &first), "there is no file yet");
        fs::write(&built, "").unwrap();
        assert!(is_fresh(&built, &first));
        fs::write(&source, "two").unwrap();
        assert!(!is_fresh(&built, &now().unwrap()));
        fs::remove_dir_all(&dir).unwrap();
    }
}
