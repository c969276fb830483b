// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Kernels that check themselves and the driver: Debian's source of Linux, small, and with the
//! kernel's own checks on.
//!
//! The configurations are in `testkit/debug-kernel`: what the guests need, and the checks of each
//! kernel. Two parts of the kit come of it: the source with the tools that its build needs, and,
//! for each kernel, its image with all that a module of it is built against. Nothing is installed,
//! and no root is needed.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::apt::{self, Packages, Source};
use super::kernels::{DebianKernel, Flavour};
use super::toolchain::{self, Toolchain};
use super::{LIBRARIES, LOADER, part};
use crate::progress::Progress;

/// The edition of the sources' parts.
const SOURCE_EDITION: u32 = 1;

/// The edition of how kernels are built. A change of the configuration needs no new one.
const BUILD_EDITION: u32 = 1;

/// What the build of a kernel runs, and its headers and libraries, besides the toolchain.
const TOOLS: [&str; 5] = ["bc", "bison", "flex", "libelf-dev", "xz-utils"];

/// What no build reads, as patterns of tar: the other processors and large drivers. Their files of
/// options stay, because the configuration reads all of those.
const UNUSED: [&str; 12] = [
    "*/arch/[a-w]*/*.[chS]",
    "*/arch/[a-w]*/dts/*",
    "*/arch/xtensa/*.[chS]",
    "*/Documentation/*/*",
    "*/tools/testing/*",
    "*/tools/perf/*",
    "*/drivers/gpu/*.[ch]",
    "*/drivers/media/*.[ch]",
    "*/drivers/net/ethernet/*.[ch]",
    "*/drivers/net/wireless/*.[ch]",
    "*/drivers/scsi/*.[ch]",
    "*/sound/*.[ch]",
];

/// The prefix of the compiler's programs.
const PREFIX: &str = "x86_64-linux-gnu-";

/// The options that all kernels have.
const GUEST: &str = include_str!("../../debug-kernel/guest.config");

/// What a build leaves behind that no module is built with. The last one is the image with its
/// symbols.
const LEFT_BEHIND: [&str; 5] = [".o", ".a", ".cmd", ".o.d", "vmlinux"];

/// A kernel, and what a module for it is built against.
pub struct DebugKernel {
    /// Its release, as `uname -r` says it.
    pub release: String,
    /// Its image.
    pub image: PathBuf,
    /// The folder of its build: configuration, generated headers, symbols, programs.
    pub build: PathBuf,
    /// The folder of its source: headers, Makefiles.
    pub source: PathBuf,
}

/// What the source's part tells about itself.
#[derive(Serialize, Deserialize)]
struct SourceStamp {
    packages: Vec<String>,
}

/// What a kernel's part tells about itself.
#[derive(Serialize, Deserialize)]
struct Stamp {
    release: String,
    seconds: u64,
}

/// Opens the kernel's part of the kit, building it first if it is not there or its configuration
/// has changed. That takes a quarter of an hour on two free processors. For `mirror` see
/// [`Kit::get`](super::Kit::get).
///
/// # Errors
/// apt cannot fetch the source or the tools, or the kernel does not build. The error has the end of
/// the build's output.
pub fn get(target: &Path, kernel: DebianKernel, mirror: Option<&str>) -> Result<DebugKernel> {
    let checks = checks(kernel.flavour).context("Debian builds this kernel itself")?;
    let kit = target.join("kit");
    let configuration =
        format!("{GUEST}\n{checks}\nCONFIG_LOCALVERSION=\"-{}\"\n", kernel.flavour.suffix());
    // The source comes first: a part that is open cannot wait for another one.
    let tree = Tree::get(&kit, kernel, mirror)?;
    let toolchain = Toolchain::get(target, mirror)?;
    let edition = edition(&configuration);
    let (root, stamp, built) =
        part::open(&kit.join("kernels").join(kernel.to_string()), edition, |fresh| {
            build(&tree, &toolchain, kernel, &configuration, fresh)
        })?;
    if built {
        eprintln!(
            "kit: Linux {} built in {} minutes; it is in {}",
            stamp.release,
            stamp.seconds.div_ceil(60),
            root.display()
        );
    }
    Ok(DebugKernel {
        release: stamp.release,
        image: root.join("image"),
        build: root.join("build"),
        source: tree.source(),
    })
}

/// The options of a kernel that checks something; none for Debian's own.
fn checks(flavour: Flavour) -> Option<&'static str> {
    match flavour {
        Flavour::Cloud | Flavour::Generic => None,
        Flavour::Kasan => Some(include_str!("../../debug-kernel/kasan.config")),
        Flavour::Kcsan => Some(include_str!("../../debug-kernel/kcsan.config")),
    }
}

/// The edition of a kernel with this configuration: a hash of it (FNV-1a), which is the same on
/// every machine.
fn edition(configuration: &str) -> u32 {
    configuration.bytes().fold(0x811c_9dc5 ^ BUILD_EDITION, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

/// The source of a kernel, and the tools that its build needs.
struct Tree {
    root: PathBuf,
}

impl Tree {
    /// Opens the part with the source of the newest kernel of this series.
    fn get(kit: &Path, kernel: DebianKernel, mirror: Option<&str>) -> Result<Self> {
        let series = DebianKernel { flavour: Flavour::Cloud, ..kernel };
        let dir = kit.join("source").join(series.to_string());
        let (root, ..) = part::open(&dir, SOURCE_EDITION, |fresh| {
            let source = Source::suite(mirror, kernel.series.suite())?;
            let package = format!("linux-source-{series}");
            let what = format!("the source of Linux {series}, and tools to build it, come");
            let packages = apt::fetch(fresh, &source, &what, |_| {
                Ok(Packages {
                    complete: TOOLS.map(str::to_owned).into(),
                    alone: vec![package.clone()],
                    keep_headers: true,
                })
            })?;
            let root = fresh.join("root");
            // Debian's libc names its files by these places.
            symlink("usr/lib", root.join("lib"))?;
            symlink("usr/lib64", root.join("lib64"))?;
            toolchain::wrap(&root, &["usr/bin"], ".")?;
            unpack(&root, &package)?;
            Ok(SourceStamp { packages })
        })?;
        Ok(Self { root })
    }

    fn source(&self) -> PathBuf {
        self.root.join("linux")
    }

    /// `make` of the kernel's own Makefile, for a build in the folder `build`.
    fn make(&self, toolchain: &Toolchain, build: &Path) -> Result<Command> {
        let mut make = toolchain.command("make");
        let programs = self.root.join("usr/bin");
        let known = make.get_envs().find(|(name, _)| *name == "PATH").and_then(|(_, path)| path);
        let known = known.context("the toolchain has no PATH")?.to_owned();
        let mut path = programs.clone().into_os_string();
        path.push(":");
        path.push(known);
        make.env("PATH", path)
            .env("M4", programs.join("m4"))
            .env("BISON_PKGDATADIR", self.root.join("usr/share/bison"))
            .envs([("KBUILD_BUILD_USER", "vbus"), ("KBUILD_BUILD_HOST", "vbus")])
            .env("LC_ALL", "C.UTF-8");
        make.arg("-C").arg(self.source()).arg(format!("O={}", build.display())).arg("ARCH=x86_64");
        for (name, program) in [
            ("CC", "gcc-14"),
            ("LD", "ld"),
            ("AR", "ar"),
            ("NM", "nm"),
            ("OBJCOPY", "objcopy"),
            ("OBJDUMP", "objdump"),
            ("READELF", "readelf"),
            ("STRIP", "strip"),
        ] {
            make.arg(format!("{name}={PREFIX}{program}"));
        }
        // The programs that the build makes for itself run with the libraries that they are linked
        // with: this system's own may be older.
        let libraries = self.root.join(LIBRARIES);
        make.arg(format!("HOSTCC={PREFIX}gcc-14 --sysroot={}", self.root.display())).arg(format!(
            "HOSTLDFLAGS=-L{0} -Wl,-rpath={0} -Wl,--dynamic-linker={1}",
            libraries.display(),
            self.root.join(LOADER).display()
        ));
        Ok(make)
    }
}

/// Unpacks the source in the files of its package into the folder `linux`.
fn unpack(root: &Path, package: &str) -> Result<()> {
    let progress = Progress::begin("kit", "unpacking the source of Linux");
    let packed = root.join(format!("usr/src/{package}.tar.xz"));
    let linux = root.join("linux");
    fs::create_dir_all(&linux)?;
    let mut xz = Command::new(root.join("usr/bin/xz"))
        .args(["--decompress", "--stdout"])
        .arg(&packed)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run the kit's xz")?;
    let tar = xz.stdout.take().context("xz has no output")?;
    let status = Command::new("tar")
        .args(["--extract", "--file=-", "--strip-components=1", "--no-same-owner"])
        .args(UNUSED.map(|pattern| format!("--exclude={pattern}")))
        .arg("--directory")
        .arg(&linux)
        .stdin(tar)
        .status()
        .context("cannot run tar")?;
    let ended = xz.wait()?;
    ensure!(
        status.success() && ended.success(),
        "{} cannot be unpacked (tar: {status}, xz: {ended})",
        packed.display()
    );
    drop(progress);
    fs::remove_file(&packed).with_context(|| format!("cannot remove {}", packed.display()))
}

/// Builds a kernel in the folder `fresh` of its part.
fn build(
    tree: &Tree,
    toolchain: &Toolchain,
    kernel: DebianKernel,
    configuration: &str,
    fresh: &Path,
) -> Result<Stamp> {
    let began = Instant::now();
    let root = fresh.join("root");
    let build = root.join("build");
    fs::create_dir_all(&build)?;
    let wanted = fresh.join("wanted.config");
    fs::write(&wanted, configuration)?;
    let log = fresh.join("make.log");
    let mut configure = tree.make(toolchain, &build)?;
    configure.arg("allnoconfig").env("KCONFIG_ALLCONFIG", &wanted);
    run(configure, &log, |_| {})?;
    let config = build.join(".config");
    let got =
        fs::read_to_string(&config).with_context(|| format!("cannot read {}", config.display()))?;
    let lacks = missing(configuration, &got);
    ensure!(
        lacks.is_empty(),
        "Linux {kernel} does not take these options, or lacks what they need:\n{}",
        lacks.join("\n")
    );

    let work = format!("building Linux {kernel}; it takes a quarter of an hour, and once only");
    let mut progress = Progress::begin("kit", &work);
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut make = tree.make(toolchain, &build)?;
    make.arg(format!("-j{jobs}")).args(["bzImage", "modules"]);
    let mut done = 0;
    run(make, &log, |line| {
        if let Some(file) = line.strip_prefix("  CC ") {
            done += 1;
            progress.at(&format!("{done} files: {}", file.trim()));
        }
    })?;
    drop(progress);

    let release = build.join("include/config/kernel.release");
    let release = fs::read_to_string(&release)
        .with_context(|| format!("cannot read {}", release.display()))?
        .trim()
        .to_owned();
    ensure!(kernel.is(&release), "Linux {release} was built in place of Linux {kernel}");
    let image = build.join("arch/x86/boot/bzImage");
    fs::rename(&image, root.join("image"))
        .with_context(|| format!("the build has made no {}", image.display()))?;
    for path in part::files(std::slice::from_ref(&build), |name| {
        LEFT_BEHIND.iter().any(|end| name.ends_with(end)) || name.starts_with(".tmp_")
    })? {
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(Stamp { release, seconds: began.elapsed().as_secs() })
}

/// Runs make. Each line of its output goes to `hear`, and all of them to the file `log`.
fn run(mut make: Command, log: &Path, mut hear: impl FnMut(&str)) -> Result<()> {
    /// The lines of a failed build that an error shows.
    const LINES: usize = 30;
    let mut file = File::options().create(true).append(true).open(log)?;
    make.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file.try_clone()?);
    let mut child = make.spawn().context("cannot run the kit's make")?;
    let output = child.stdout.take().context("make has no output")?;
    for line in BufReader::new(output).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        hear(&line);
        writeln!(file, "{line}")?;
    }
    let status = child.wait()?;
    if !status.success() {
        let said = fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        bail!(
            "the kernel does not build (make: {status}); {} has all of its output, which ends \
             with:\n{}",
            log.display(),
            lines[lines.len().saturating_sub(LINES)..].join("\n")
        );
    }
    Ok(())
}

/// The options in the configuration `wanted` that the configuration `got` does not have.
fn missing<'a>(wanted: &'a str, got: &str) -> Vec<&'a str> {
    let got: std::collections::HashSet<&str> = got.lines().collect();
    wanted.lines().filter(|line| line.starts_with("CONFIG_") && !got.contains(line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_that_the_kernel_does_not_take_is_found() {
        let wanted = "# A comment.\nCONFIG_A=y\nCONFIG_B=12\nCONFIG_C=\"c\"\n";
        let got = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=\"c\"\nCONFIG_D=y\n";
        assert_eq!(missing(wanted, got), ["CONFIG_B=12"]);
        assert_ne!(edition(wanted), edition(got));
    }

    #[test]
    fn no_option_of_a_debug_kernel_is_there_twice() {
        for flavour in [Flavour::Kasan, Flavour::Kcsan] {
            let all = [GUEST, checks(flavour).unwrap_or_default()].concat();
            let mut names: Vec<&str> = all
                .lines()
                .filter_map(|line| line.strip_prefix("CONFIG_")?.split('=').next())
                .collect();
            let number = names.len();
            names.sort_unstable();
            names.dedup();
            assert!(number > 100 && names.len() == number, "{flavour:?}: an option is there twice");
        }
    }
}
