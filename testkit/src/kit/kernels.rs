// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Debian's kernels, by the names under which a user asks for them.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::apt::{self, Apt, Packages, Source};
use super::part;
use crate::report::Skip;

/// The edition of a kernel's part of the kit.
const EDITION: u32 = 1;

/// The kernels of a release of Debian, which Debian keeps to one series of Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Series {
    /// Linux 6.1 of Debian 12 (bookworm).
    V6_1,
    /// Linux 6.12 of Debian 13 (trixie).
    V6_12,
    /// The newest Linux 7 of Debian 13's backports.
    V7,
}

impl Series {
    /// All of them, the oldest first.
    pub const ALL: [Self; 3] = [Self::V6_1, Self::V6_12, Self::V7];

    /// Its name on command lines.
    fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::V7 => "7.x",
        }
    }

    /// What the releases of its kernels begin with.
    fn prefix(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1.",
            Self::V6_12 => "6.12.",
            Self::V7 => "7.",
        }
    }

    /// The suite of Debian that has it.
    pub fn suite(self) -> &'static str {
        match self {
            Self::V6_1 => "bookworm",
            Self::V6_12 => "trixie",
            Self::V7 => "trixie-backports",
        }
    }
}

/// What a kernel is configured for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Flavour {
    /// Virtual machines: `cloud-amd64`.
    Cloud,
    /// Machines of all kinds: `amd64`.
    Generic,
    /// The scenarios' guests, with checks of memory (KASAN, kmemleak), locks (lockdep), objects and
    /// DMA. It is [built here](super::debug_kernel).
    Kasan,
    /// The scenarios' guests, with a watch for data races (KCSAN). It is built here.
    Kcsan,
}

impl Flavour {
    /// The end of the names of its packages and releases, without the first `-`.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Cloud => "cloud-amd64",
            Self::Generic => "amd64",
            Self::Kasan => "kasan",
            Self::Kcsan => "kcsan",
        }
    }

    /// What follows the name of the series on command lines.
    fn name(self) -> &'static str {
        match self {
            Self::Cloud => "",
            Self::Generic => "-generic",
            Self::Kasan => "-kasan",
            Self::Kcsan => "-kcsan",
        }
    }
}

/// One of Debian's kernels, or one of its source. Its text form is that of the series for the cloud
/// flavour (`6.12`), and has the name of the other flavours at its end (`6.12-generic`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DebianKernel {
    /// The series.
    pub series: Series,
    /// The flavour.
    pub flavour: Flavour,
}

impl DebianKernel {
    /// The cloud flavour of each series, the oldest first.
    pub const CLOUD: [Self; 3] = [
        Self { series: Series::V6_1, flavour: Flavour::Cloud },
        Self { series: Series::V6_12, flavour: Flavour::Cloud },
        Self { series: Series::V7, flavour: Flavour::Cloud },
    ];

    /// The generic flavour of each series, the oldest first.
    pub const GENERIC: [Self; 3] = [
        Self { series: Series::V6_1, flavour: Flavour::Generic },
        Self { series: Series::V6_12, flavour: Flavour::Generic },
        Self { series: Series::V7, flavour: Flavour::Generic },
    ];

    /// The kernels that check themselves and the driver.
    pub const DEBUG: [Self; 2] = [
        Self { series: Series::V6_12, flavour: Flavour::Kasan },
        Self { series: Series::V6_12, flavour: Flavour::Kcsan },
    ];

    /// Whether it is one of [`DEBUG`](Self::DEBUG).
    pub fn is_debug(self) -> bool {
        Self::DEBUG.contains(&self)
    }

    /// How many times as long as with the others things may take in a guest with this kernel.
    pub fn patience(self) -> u32 {
        if self.is_debug() { 10 } else { 1 }
    }

    /// Whether the kernel of this release (`uname -r`) is one of these.
    pub fn is(self, release: &str) -> bool {
        let is_cloud = release.ends_with("-cloud-amd64");
        release.starts_with(self.series.prefix())
            && release.ends_with(&format!("-{}", self.flavour.suffix()))
            && is_cloud == (self.flavour == Flavour::Cloud)
    }
}

impl fmt::Display for DebianKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.series.name())?;
        f.write_str(self.flavour.name())
    }
}

impl FromStr for DebianKernel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = Self::CLOUD.into_iter().chain(Self::GENERIC).chain(Self::DEBUG);
        let found = all.into_iter().find(|kernel| kernel.to_string() == text);
        found.ok_or_else(|| {
            format!(
                "Debian's kernels are 6.1, 6.12 and 7.x, and with -generic after it the flavour for \
                 machines of all kinds; 6.12-kasan and 6.12-kcsan are built of Debian's source; \
                 {text:?} is none of them"
            )
        })
    }
}

/// The files of a kernel.
pub struct KernelFiles {
    /// Its release, as `uname -r` says it.
    pub release: String,
    /// Its image.
    pub image: PathBuf,
    /// The folder of its modules; none if all that guests need is built in.
    pub modules: Option<PathBuf>,
}

impl KernelFiles {
    /// Finds the kernel of this release under the folder of unpacked packages.
    pub(super) fn find(root: &Path, release: &str) -> Result<Self> {
        let modules = modules(root)?.join(release);
        // Debian has it beside the modules from Linux 7 on.
        let images = [root.join(format!("boot/vmlinuz-{release}")), modules.join("vmlinuz")];
        let image = images.into_iter().find(|path| path.exists());
        let image = image
            .with_context(|| format!("the packages of Linux {release} have no image of it"))?;
        Ok(Self { release: release.to_owned(), image, modules: Some(modules) })
    }
}

/// What a kernel's part of the kit tells about itself.
#[derive(Serialize, Deserialize)]
struct Stamp {
    kernel: String,
    packages: Vec<String>,
}

/// Opens the kernel's part below `dir`, fetching it first if it is not there. For `mirror` see
/// [`Source::suite`].
pub(super) fn get(dir: &Path, kernel: DebianKernel, mirror: Option<&str>) -> Result<KernelFiles> {
    let (root, stamp, _) = part::open(&dir.join(kernel.to_string()), EDITION, |fresh| {
        let source = Source::suite(mirror, kernel.series.suite())?;
        let what = format!("Linux {kernel} for guests comes");
        let image = format!("linux-image-{}", kernel.flavour.suffix());
        let packages = apt::fetch(fresh, &source, &what, |apt| {
            Ok(Packages { alone: packages(apt, &image)?, ..Packages::default() })
        })?;
        let release = release(&fresh.join("root"))?;
        if !kernel.is(&release) {
            let lacks = format!("{source} has Linux {release}, and no Linux {kernel}");
            return Err(Skip(lacks).into());
        }
        Ok(Stamp { kernel: release, packages })
    })?;
    KernelFiles::find(&root, &stamp.kernel)
}

/// The packages with the image and the modules of the newest kernel, on which the package `meta`
/// depends. Its other dependencies make the initramfs of an installed system.
pub(super) fn packages(apt: &Apt, meta: &str) -> Result<Vec<String>> {
    let image = apt.depends(meta)?.into_iter().find(|name| name.starts_with("linux-image-"));
    let image = image.ok_or_else(|| Skip(format!("the mirror has no {meta}")))?;
    // Linux 7 has the two in packages of their own.
    let parts = ["linux-binary-", "linux-modules-"];
    let mut packages = apt.depends(&image)?;
    packages.retain(|name| parts.iter().any(|part| name.starts_with(part)));
    packages.push(image);
    Ok(packages)
}

/// The folder of modules under the folder of unpacked packages. Debian 12 has it in `/lib`.
fn modules(root: &Path) -> Result<PathBuf> {
    let places = ["usr/lib/modules", "lib/modules"].map(|place| root.join(place));
    let found = places.into_iter().find(|place| place.is_dir());
    found.context("the kernel's packages have no modules")
}

/// The release of the one kernel under the folder of unpacked packages.
pub(super) fn release(root: &Path) -> Result<String> {
    let kernels = fs::read_dir(modules(root)?)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>>>()?;
    ensure!(kernels.len() == 1, "one kernel was expected in the packages, found {kernels:?}");
    Ok(kernels[0].clone())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_has_one_name_and_knows_its_releases() {
        let all = [&DebianKernel::CLOUD[..], &DebianKernel::GENERIC, &DebianKernel::DEBUG];
        for kernel in all.concat() {
            assert_eq!(kernel.to_string().parse(), Ok(kernel));
        }
        let kernel = |text: &str| text.parse::<DebianKernel>();
        assert!(kernel("6.2").unwrap_err().contains("6.1, 6.12 and 7.x"));
        let cases = [
            ("6.1", "6.1.0-57-cloud-amd64", true),
            ("6.1", "6.12.117+deb13-cloud-amd64", false),
            ("6.1", "6.1.0-57-amd64", false),
            ("6.1-generic", "6.1.0-57-amd64", true),
            ("6.12", "6.12.117+deb13-cloud-amd64", true),
            ("7.x", "7.3.4+deb13-cloud-amd64", true),
            ("7.x-generic", "7.3.4+deb13-cloud-amd64", false),
            ("7.x", "6.7.12-cloud-amd64", false),
            ("6.12-kasan", "6.12.117-kasan", true),
            ("6.12-kcsan", "6.12.117-kasan", false),
            ("6.12-generic", "6.12.117-kasan", false),
        ];
        for (name, release, is) in cases {
            assert_eq!(kernel(name).unwrap().is(release), is, "{name}, {release}");
        }
    }
}
