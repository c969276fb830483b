// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kit in `target/kit`: all files that a guest needs and that this machine may lack.
//!
//! It has QEMU 11 with all of its libraries, a stock Debian cloud kernel with its modules, a static
//! busybox, iperf3, passt and ethtool. libc and its loader are among the libraries, so QEMU also
//! runs on an older system. apt downloads the packages with a configuration and an empty dpkg
//! status of the kit's own, and they are unpacked into one folder. Nothing is installed, and no
//! root is needed.
//!
//! What only some scenarios need is in parts of their own, which are fetched when they are first
//! needed: [other kernels](kernels), [more tools](Kit::tools), [firmware](Kit::firmware),
//! [compilers](toolchain), [DPDK](dpdk), and [kernels that check themselves](debug_kernel).

pub mod apt;
pub mod debug_kernel;
pub mod dpdk;
pub mod kernels;
pub mod part;
pub mod toolchain;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use apt::{Packages, Source};
use kernels::{DebianKernel, KernelFiles};

/// The edition of the kit's contents. A kit of another edition is fetched again.
const EDITION: u32 = 1;

/// The edition of the tools' part.
const TOOLS_EDITION: u32 = 2;

/// The Debian packages of the kit, apart from the kernel.
const PACKAGES: [&str; 5] = ["qemu-system-x86", "busybox-static", "iperf3", "passt", "ethtool"];

/// The package that depends on the newest cloud kernel.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";

/// The packages of the tools that users of a Linux driver have, and only some guests need.
const TOOLS: [&str; 3] = ["iproute2", "bpftool", "kexec-tools"];

/// The edition of the firmware's part, and its packages.
const FIRMWARE_EDITION: u32 = 1;
const FIRMWARE: [&str; 2] = ["ipxe", "ovmf"];

/// Firmware with network drivers of its own.
pub struct Firmware {
    /// iPXE as a Linux kernel image.
    pub ipxe: PathBuf,
    /// UEFI: its code, and its variables as they are at first.
    pub ovmf: [PathBuf; 2],
}

/// The dynamic loader of unpacked packages, below the folder that they are unpacked in.
pub const LOADER: &str = "usr/lib64/ld-linux-x86-64.so.2";

/// The folder of their libraries.
pub const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// A complete kit.
pub struct Kit {
    dir: PathBuf,
    root: PathBuf,
    stamp: Stamp,
    mirror: Option<String>,
}

/// The versions in a kit.
#[derive(Serialize, Deserialize)]
struct Stamp {
    qemu: String,
    kernel: String,
    packages: Vec<String>,
}

/// The packages of a part of the kit.
#[derive(Serialize, Deserialize)]
struct Unpacked {
    packages: Vec<String>,
}

impl Kit {
    /// Opens the kit in `target/kit`, fetching it first if it is not there.
    ///
    /// `mirror` is the address of a Debian mirror; `None` takes it from the machine's apt
    /// configuration.
    ///
    /// # Errors
    /// apt cannot fetch it. The error says what to do.
    pub fn get(target: &Path, mirror: Option<&str>) -> Result<Self> {
        let dir = target.join("kit");
        let began = Instant::now();
        let (root, stamp, fetched) = part::open(&dir, EDITION, |fresh| fetch(fresh, mirror))?;
        if fetched {
            eprintln!(
                "kit: QEMU {}, Linux {}, {} packages in {} ({:.0} s)",
                stamp.qemu,
                stamp.kernel,
                stamp.packages.len(),
                root.display(),
                began.elapsed().as_secs_f32()
            );
        }
        Ok(Self { dir, root, stamp, mirror: mirror.map(str::to_owned) })
    }

    /// The folder that the packages are unpacked in.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The kernel that guests have if nobody asks for another.
    pub fn default_kernel(&self) -> Result<KernelFiles> {
        KernelFiles::find(&self.root, &self.stamp.kernel)
    }

    /// One of Debian's kernels. It is fetched if it is not here yet. One that checks itself is
    /// [built](debug_kernel) if it is not here yet, which takes long.
    ///
    /// # Errors
    /// apt cannot fetch it. The error is a [`Skip`](crate::report::Skip) if the mirror lacks it. Or
    /// it does not build.
    pub fn kernel(&self, kernel: DebianKernel) -> Result<KernelFiles> {
        if kernel.is_debug() {
            let target = self.dir.parent().unwrap_or(&self.dir);
            let built = debug_kernel::get(target, kernel, self.mirror.as_deref())?;
            return Ok(KernelFiles { release: built.release, image: built.image, modules: None });
        }
        let own = self.default_kernel()?;
        if kernel.is(&own.release) {
            return Ok(own);
        }
        kernels::get(&self.dir.join("kernels"), kernel, self.mirror.as_deref())
    }

    /// The folder that the packages of iproute2, bpftool and kexec are unpacked in, with the
    /// libraries that they need. They are fetched if they are not here yet.
    ///
    /// # Errors
    /// apt cannot fetch them.
    pub fn tools(&self) -> Result<PathBuf> {
        let (root, ..) = part::open(&self.dir.join("tools"), TOOLS_EDITION, |fresh| {
            let source = Source::with_qemu(self.mirror.as_deref())?;
            let packages = apt::fetch(
                fresh,
                &source,
                "ip, tc, bpftool and kexec for the guests come",
                |_| {
                    Ok(Packages {
                        complete: TOOLS.map(str::to_owned).into(),
                        ..Packages::default()
                    })
                },
            )?;
            Ok(Unpacked { packages })
        })?;
        Ok(root)
    }

    /// Firmware with network drivers. It is fetched if it is not here yet.
    ///
    /// # Errors
    /// apt cannot fetch it. The error is a [`Skip`](crate::report::Skip) if the mirror lacks it.
    pub fn firmware(&self) -> Result<Firmware> {
        let (root, ..) = part::open(&self.dir.join("firmware"), FIRMWARE_EDITION, |fresh| {
            let source = Source::with_qemu(self.mirror.as_deref())?;
            let packages = apt::fetch(fresh, &source, "iPXE and OVMF for guests come", |_| {
                Ok(Packages { alone: FIRMWARE.map(str::to_owned).into(), ..Packages::default() })
            })?;
            Ok(Unpacked { packages })
        })?;
        let ovmf =
            ["CODE", "VARS"].map(|name| root.join(format!("usr/share/OVMF/OVMF_{name}_4M.fd")));
        Ok(Firmware { ipxe: root.join("usr/lib/ipxe/ipxe.lkrn"), ovmf })
    }

    /// DPDK. It is fetched if it is not here yet.
    ///
    /// # Errors
    /// apt cannot fetch it. The error is a [`Skip`](crate::report::Skip) if the mirror lacks it.
    pub fn dpdk(&self) -> Result<dpdk::Dpdk> {
        let target = self.dir.parent().unwrap_or(&self.dir);
        dpdk::Dpdk::get(target, self.mirror.as_deref())
    }

    /// The version of QEMU.
    pub fn qemu_version(&self) -> &str {
        &self.stamp.qemu
    }

    /// The statically linked busybox.
    pub fn busybox(&self) -> PathBuf {
        self.root.join("usr/bin/busybox")
    }

    /// The dynamic loader that goes with the kit's libraries.
    pub fn loader(&self) -> PathBuf {
        self.root.join(LOADER)
    }

    /// The folder of the kit's libraries.
    pub fn libraries(&self) -> PathBuf {
        self.root.join(LIBRARIES)
    }

    /// A command that runs `/usr/bin/PROGRAM` of the kit with the kit's libraries.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.loader());
        command
            .arg("--library-path")
            .arg(self.libraries())
            .arg(self.root.join("usr/bin").join(program));
        command
    }

    /// QEMU with its modules and firmware folders.
    pub fn qemu(&self) -> Command {
        let mut command = self.command("qemu-system-x86_64");
        // Without this, QEMU would load the modules of a QEMU that is installed on this machine.
        command.env("QEMU_MODULE_DIR", self.libraries().join("qemu"));
        for dir in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            command.arg("-L").arg(self.root.join(dir));
        }
        command
    }
}

/// Fetches the kit into `dir/root`.
fn fetch(dir: &Path, mirror: Option<&str>) -> Result<Stamp> {
    let source = Source::with_qemu(mirror)?;
    let what = "QEMU, a Linux kernel and tools for the guests come";
    let packages = apt::fetch(dir, &source, what, |apt| {
        Ok(Packages {
            complete: PACKAGES.map(str::to_owned).into(),
            alone: kernels::packages(apt, KERNEL_PACKAGE)?,
            keep_headers: false,
        })
    })?;
    let root = dir.join("root");
    let kernel = kernels::release(&root)?;
    let (dir, mirror) = (dir.to_owned(), mirror.map(str::to_owned));
    let stamp = Stamp { qemu: String::new(), kernel, packages };
    let mut kit = Kit { dir, root, stamp, mirror };
    kit.stamp.qemu = qemu_version(kit.qemu())?;
    Ok(kit.stamp)
}

/// Asks QEMU for its version, and checks that QEMU has the device that vbus needs.
pub fn qemu_version(mut qemu: Command) -> Result<String> {
    let name = format!("{:?}", qemu.get_program());
    let output = qemu
        .args(["-nodefaults", "-device", "help"])
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    let devices = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "QEMU does not start: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    ensure!(
        devices.contains("vfio-user-pci"),
        "this QEMU has no device vfio-user-pci; version 10.1 brought it"
    );
    let output = qemu.args(["--version"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split_whitespace().skip_while(|word| *word != "version").nth(1);
    Ok(version.with_context(|| format!("QEMU says no version: {text}"))?.to_owned())
}
