// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The headers of Debian's kernels, with the programs of the kernel's build: parts of the kit.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::kit::apt::{self, Apt, Packages, Source};
use crate::kit::kernels::DebianKernel;
use crate::kit::{debug_kernel, part, toolchain};
use crate::report::Skip;

/// The edition of these parts.
const EDITION: u32 = 1;

/// What the packages with a kernel's headers begin with.
const PACKAGE: &str = "linux-headers-";

/// The headers of a kernel.
pub struct Headers {
    /// The kernel's release, as `uname -r` says it.
    pub release: String,
    /// What depends on the flavour: configuration, symbols.
    pub own: PathBuf,
    /// What all flavours share: the headers, and the kernel's Makefile.
    pub common: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Stamp {
    release: String,
    packages: Vec<String>,
}

/// Opens the headers of the newest kernel of this kind, fetching them first if they are not here.
/// For `mirror` see [`Kit::get`](crate::kit::Kit::get).
///
/// # Errors
/// apt cannot fetch them. The error is a [`Skip`] if the mirror lacks them.
pub fn get(target: &Path, kernel: DebianKernel, mirror: Option<&str>) -> Result<Headers> {
    if kernel.is_debug() {
        let built = debug_kernel::get(target, kernel, mirror)?;
        return Ok(Headers { release: built.release, own: built.build, common: built.source });
    }
    let dir = target.join("kit/headers").join(kernel.to_string());
    let (root, stamp, _) = part::open(&dir, EDITION, |fresh| {
        let source = Source::suite(mirror, kernel.series.suite())?;
        let what = format!("the headers of Linux {kernel} come");
        let mut release = String::new();
        let packages = apt::fetch(fresh, &source, &what, |apt| {
            let (found, alone) = packages(apt, kernel)?;
            release = found;
            Ok(Packages { alone, ..Packages::default() })
        })?;
        toolchain::wrap_part(&fresh.join("root"), "usr/lib")?;
        Ok(Stamp { release, packages })
    })?;
    let release = stamp.release;
    let own = root.join("usr/src").join(format!("{PACKAGE}{release}"));
    let common = common(&root)?;
    Ok(Headers { release, own, common })
}

/// The release of the newest kernel of this kind, and the packages with its headers.
fn packages(apt: &Apt, kernel: DebianKernel) -> Result<(String, Vec<String>)> {
    let meta = format!("{PACKAGE}{}", kernel.flavour.suffix());
    let is_it = |name: &String| name.strip_prefix(PACKAGE).is_some_and(|it| kernel.is(it));
    let own = apt.depends(&meta)?.into_iter().find(is_it);
    let own = own.ok_or_else(|| Skip(format!("the mirror has no {meta} of Linux {kernel}")))?;
    let release = own.strip_prefix(PACKAGE).unwrap_or(&own).to_owned();
    let parts = [PACKAGE, "linux-kbuild-"];
    let mut packages = apt.depends(&own)?;
    packages.retain(|name| parts.iter().any(|part| name.starts_with(part)));
    packages.push(own);
    Ok((release, packages))
}

/// The folder of the headers that all flavours share.
fn common(root: &Path) -> Result<PathBuf> {
    let mut found = fs::read_dir(root.join("usr/src"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.to_string_lossy().ends_with("-common"));
    found.next().context("the packages have no headers that all flavours share")
}
