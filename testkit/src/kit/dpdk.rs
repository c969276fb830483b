// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The part of the kit with DPDK: testpmd, and the drivers `virtio_user` and `vhost`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::apt::{self, Packages, Source};
use super::{LIBRARIES, LOADER, part};

/// The edition of this part.
const EDITION: u32 = 1;

/// The suite whose DPDK it is.
const SUITE: &str = "trixie";

/// The package with testpmd, one whose dependencies name all network drivers, and how the names of
/// those begin that are wanted. A number follows: that of DPDK's ABI.
const PROGRAMS: &str = "dpdk-dev";
const ALL_DRIVERS: &str = "librte-meta-net";
const DRIVERS: [&str; 2] = ["librte-net-virtio", "librte-net-vhost"];

/// The drivers that testpmd loads.
const LOADED: [&str; 4] =
    ["librte_bus_vdev", "librte_mempool_ring", "librte_net_vhost", "librte_net_virtio"];

/// DPDK.
pub struct Dpdk {
    root: PathBuf,
    stamp: Stamp,
}

#[derive(Serialize, Deserialize)]
struct Stamp {
    packages: Vec<String>,
}

impl Dpdk {
    /// Opens DPDK in `target/kit/dpdk`, fetching it first if it is not there. For `mirror` see
    /// [`Kit::get`](crate::kit::Kit::get).
    ///
    /// # Errors
    /// apt cannot fetch it. The error is a [`Skip`](crate::report::Skip) if the mirror lacks it.
    pub fn get(target: &Path, mirror: Option<&str>) -> Result<Self> {
        let dir = target.join("kit/dpdk");
        let (root, stamp, _) = part::open(&dir, EDITION, |fresh| {
            let source = Source::suite(mirror, SUITE)?;
            let packages = apt::fetch(fresh, &source, "DPDK's testpmd comes", |apt| {
                let mut complete = apt.depends(ALL_DRIVERS)?;
                complete.retain(|name| DRIVERS.iter().any(|driver| is_of(name, driver)));
                complete.push(PROGRAMS.to_owned());
                Ok(Packages { complete, ..Packages::default() })
            })?;
            Ok(Stamp { packages })
        })?;
        Ok(Self { root, stamp })
    }

    /// The version of DPDK.
    pub fn version(&self) -> &str {
        let name = format!("{PROGRAMS}_");
        let mut packages = self.stamp.packages.iter();
        packages.find_map(|package| package.strip_prefix(&name)).unwrap_or("?")
    }

    /// A command that runs testpmd with the libraries of this part and with the drivers that the
    /// scenarios need. The arguments of its environment layer come next.
    ///
    /// # Errors
    /// The part lacks the drivers.
    pub fn testpmd(&self) -> Result<Command> {
        let libraries = self.root.join(LIBRARIES);
        let folder = folder_of_drivers(&libraries).context("DPDK has no drivers")?;
        let mut command = Command::new(self.root.join(LOADER));
        command.arg("--library-path");
        command.arg(format!("{}:{}", libraries.display(), folder.display()));
        command.arg(self.root.join("usr/bin/dpdk-testpmd"));
        // By their names alone: of a path DPDK demands that nobody else can write any folder of it.
        for name in LOADED {
            let file = std::fs::read_link(folder.join(format!("{name}.so")));
            let file = file.with_context(|| format!("DPDK lacks {name}"))?;
            command.arg("-d").arg(file);
        }
        Ok(command)
    }
}

/// The folder `dpdk/pmds-VERSION`.
fn folder_of_drivers(libraries: &Path) -> Option<PathBuf> {
    let folders = std::fs::read_dir(libraries.join("dpdk")).ok()?;
    folders.filter_map(|entry| Some(entry.ok()?.path())).find(|path| path.is_dir())
}

/// Whether `name` is that of a package of `driver`, with a number behind it.
fn is_of(name: &str, driver: &str) -> bool {
    let number = name.strip_prefix(driver);
    number.is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_is_known_by_its_name_and_a_number() {
        assert!(is_of("librte-net-virtio25", "librte-net-virtio"));
        for other in ["librte-net-virtio", "librte-net-virtio-user25", "librte-net-vhost25"] {
            assert!(!is_of(other, "librte-net-virtio"), "{other}");
        }
    }
}
