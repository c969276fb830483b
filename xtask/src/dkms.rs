// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Debian package `vbus-dkms`: the Linux driver, which DKMS builds for each kernel of a user.
//! It has the Rust part compiled, with its source beside it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use testkit::process::RunDir;
use testkit::{module, workspace};

use crate::deb::{pack, put, put_copyright};

/// The folders of the Rust part's source.
const SOURCES: [&str; 3] = ["linux", "crates/vbus-driver", "crates/vbus-shm"];

/// The files of `packaging/dkms` beside the source.
const BESIDE: [&str; 2] = ["dkms.conf", "README"];

/// Those for dpkg. The ones that begin with p are scripts.
const CONTROL: [&str; 3] = ["control", "postinst", "prerm"];

/// Makes the package in the folder `out`. Returns its path. For `mirror` see
/// [`Kit::get`](testkit::kit::Kit::get).
pub fn make(out: &Path, mirror: Option<&str>) -> Result<PathBuf> {
    let object = module::object(mirror)?;
    let version = env!("CARGO_PKG_VERSION");
    let dir = RunDir::new()?;
    let root = dir.path().join("root");
    let here = root.join(format!("usr/src/vbus-{version}"));

    put(&object, &here.join("vbus_rs.prebuilt"), 0o644)?;
    put(&module::sources().join("Kbuild"), &here.join("Kbuild"), 0o644)?;
    put_folder(&module::sources().join("shim"), &here.join("shim"))?;
    for folder in SOURCES {
        let (from, to) = (workspace::root().join(folder), here.join("source").join(folder));
        put_folder(&from.join("src"), &to.join("src"))?;
        put(&from.join("Cargo.toml"), &to.join("Cargo.toml"), 0o644)?;
    }
    let builtins = "linux/builtins.rs";
    put(&workspace::root().join(builtins), &here.join("source").join(builtins), 0o644)?;

    let packaging = workspace::root().join("packaging/dkms");
    let filled = |name: &str, to: &Path| -> Result<()> {
        let path = packaging.join(name);
        let text = fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?
            .replace("@VERSION@", version);
        put(&path, to, if name.starts_with('p') { 0o755 } else { 0o644 })?;
        fs::write(to, text).with_context(|| format!("cannot write {}", to.display()))
    };
    for name in BESIDE {
        filled(name, &here.join(name))?;
    }
    for name in CONTROL {
        filled(name, &root.join("DEBIAN").join(name))?;
    }
    put_copyright(&root, "vbus-dkms")?;
    pack(&root, out, &format!("vbus-dkms_{version}_amd64.deb"))
}

/// Copies the files of a folder, with those of the folders in it.
fn put_folder(from: &Path, to: &Path) -> Result<()> {
    let entries = fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))?;
    for entry in entries {
        let (from, to) = entry.map(|entry| (entry.path(), to.join(entry.file_name())))?;
        if from.is_dir() { put_folder(&from, &to)? } else { put(&from, &to, 0o644)? }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_package_has_every_file_of_its_folder() {
        let folder = workspace::root().join("packaging/dkms");
        let mut files: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        let mut known = [&BESIDE[..], &CONTROL].concat();
        known.sort_unstable();
        assert_eq!(files, known);
    }
}
