// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What all guests of one run share: QEMU, kernel, initramfs, accelerator, and a folder for sockets
//! and logs.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::initramfs::{self, Archive};
use crate::kit::{Kit, qemu_version};
use crate::process::RunDir;
use crate::workspace;

/// What to run guests with, in place of the kit's own.
#[derive(clap::Args, Clone, Default)]
pub struct Options {
    /// A qemu-system-x86_64 of version 10.1 or newer, in place of the kit's
    #[arg(long, value_name = "PATH")]
    pub qemu: Option<PathBuf>,
    /// A Linux kernel (bzImage), in place of the kit's
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// The modules that go with --kernel (lib/modules/VERSION); without it they must be built in
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub modules: Option<PathBuf>,
    /// A cpio archive with /bin/busybox and iperf3, in place of the kit's programs; /init and ours
    /// are added to it
    #[arg(long, value_name = "PATH")]
    pub initramfs: Option<PathBuf>,
    /// The Debian mirror to fetch the kit from, in place of the one in apt's configuration
    #[arg(long, value_name = "URL")]
    pub mirror: Option<String>,
    /// kvm or tcg; by default KVM if a guest boots with it
    #[arg(long)]
    pub accel: Option<Accel>,
    /// Build nothing: use the guests' programs as they were built last
    #[arg(long)]
    pub as_built: bool,
}

impl Options {
    /// The same options as words of a command line, without `--as-built` and `--mirror`.
    pub fn words(&self) -> Vec<OsString> {
        let mut words = Vec::new();
        for (option, path) in [
            ("--qemu", &self.qemu),
            ("--kernel", &self.kernel),
            ("--modules", &self.modules),
            ("--initramfs", &self.initramfs),
        ] {
            words.extend(path.iter().flat_map(|path| [option.into(), path.clone().into()]));
        }
        words.extend(
            self.accel.iter().flat_map(|accel| ["--accel".into(), accel.to_string().into()]),
        );
        words
    }

    /// Checks that the files exist and that QEMU and KVM work. This takes no time, so it runs
    /// before anything is fetched or built.
    ///
    /// # Errors
    /// One that names the option, its value, and what to do.
    fn check(&self) -> Result<()> {
        if let Some(qemu) = &self.qemu {
            let works = qemu_version(Command::new(qemu));
            works.with_context(|| {
                format!(
                    "--qemu {}: it must be a qemu-system-x86_64 of version 10.1 or newer; without \
                     --qemu the kit's is used",
                    qemu.display()
                )
            })?;
        }
        for (option, path) in
            [("kernel", &self.kernel), ("modules", &self.modules), ("initramfs", &self.initramfs)]
        {
            let Some(path) = path else { continue };
            let is_it = if option == "modules" { path.is_dir() } else { path.is_file() };
            let what = if option == "modules" { "folder" } else { "file" };
            ensure!(
                is_it,
                "--{option} {}: there is no such {what}; without --{option} the kit's is used",
                path.display()
            );
        }
        if self.accel == Some(Accel::Kvm) {
            if let Some(why) = kvm_is_missing() {
                bail!(
                    "--accel kvm: {why}; leave --accel out to use KVM only where a guest boots \
                     with it, or take --accel tcg, which is slower and works anywhere"
                );
            }
        }
        Ok(())
    }
}

/// Why /dev/kvm cannot be opened; `None` if it can.
pub fn kvm_is_missing() -> Option<String> {
    let error = fs::File::options().read(true).write(true).open("/dev/kvm").err()?;
    Some(match error.kind() {
        std::io::ErrorKind::NotFound => {
            "there is no /dev/kvm (no processor with virtualization, or kvm_intel or kvm_amd is \
             not loaded)"
                .into()
        }
        std::io::ErrorKind::PermissionDenied => {
            "/dev/kvm may not be opened by this user (on Debian the group kvm may)".into()
        }
        _ => format!("/dev/kvm cannot be opened: {error}"),
    })
}

/// What executes the guests' instructions.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Accel {
    /// The processor, through /dev/kvm.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// What all guests of one run share. A [`VmSpec`](crate::vm::VmSpec) needs it to start.
pub struct Lab {
    kit: Option<Kit>,
    options: Options,
    qemu_version: String,
    kernel: PathBuf,
    initramfs: PathBuf,
    accel: Accel,
    vbus: PathBuf,
    agent: PathBuf,
    guest: PathBuf,
    modules: Option<PathBuf>,
    dir: RunDir,
}

impl Lab {
    /// Fetches the kit and builds the guests' programs. The lab's accelerator is TCG, whatever
    /// `options` say. [`trial::open`](crate::trial::open) also chooses the accelerator.
    pub fn prepare(options: &Options) -> Result<Self> {
        options.check()?;
        let complete =
            options.qemu.is_some() && options.kernel.is_some() && options.initramfs.is_some();
        let target = workspace::target();
        let kit = if complete { None } else { Some(Kit::get(&target, options.mirror.as_deref())?) };
        let programs = workspace::build_programs(options.as_built)?;
        let dir = RunDir::new()?;
        let from_kit = |own: &Option<PathBuf>, get: fn(&Kit) -> PathBuf| {
            own.clone().or_else(|| kit.as_ref().map(get)).context("neither given nor in a kit")
        };
        let kernel = from_kit(&options.kernel, Kit::kernel)?;

        let mut archive = Archive::default();
        let mut base = Vec::new();
        match (&options.initramfs, &kit) {
            (Some(path), _) => {
                base = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?
            }
            (None, Some(kit)) => initramfs::add_userland(&mut archive, kit)?,
            (None, None) => bail!("no initramfs and no kit"),
        }
        let modules = match (&options.kernel, &options.modules, &kit) {
            (_, Some(own), _) => Some(own.clone()),
            (None, None, Some(kit)) => Some(kit.modules()),
            // The kit's modules do not fit another kernel.
            _ => None,
        };
        if let Some(modules) = &modules {
            initramfs::add_modules(&mut archive, modules, &initramfs::MODULES, |path| {
                unxz(kit.as_ref(), path)
            })?;
        }
        initramfs::add_ours(&mut archive, &programs.agent, &programs.guest)?;
        // The user's archive may be compressed. The kernel expects the next archive at a multiple
        // of four.
        base.resize(base.len().next_multiple_of(4), 0);
        base.extend(archive.finish()?);
        let initramfs = dir.path().join("initramfs");
        fs::write(&initramfs, base)?;

        let mut lab = Self {
            kit,
            options: options.clone(),
            qemu_version: String::new(),
            kernel,
            initramfs,
            accel: Accel::Tcg,
            vbus: programs.vbus,
            agent: programs.agent,
            guest: programs.guest,
            modules,
            dir,
        };
        lab.qemu_version = match (&options.qemu, &lab.kit) {
            (None, Some(kit)) => kit.qemu_version().to_owned(),
            _ => qemu_version(lab.qemu())?,
        };
        Ok(lab)
    }

    /// The options with which it was opened.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// QEMU, with the words that must come first on its command line.
    pub fn qemu(&self) -> Command {
        match (&self.options.qemu, &self.kit) {
            (None, Some(kit)) => kit.qemu(),
            (own, _) => Command::new(own.as_deref().unwrap_or(Path::new("qemu-system-x86_64"))),
        }
    }

    /// A program of the kit, or this machine's own if there is no kit.
    pub fn program(&self, name: &str) -> Command {
        self.kit.as_ref().map_or_else(|| Command::new(name), |kit| kit.command(name))
    }

    /// The kit's busybox, or this machine's own if there is no kit.
    pub fn busybox(&self) -> Command {
        Command::new(self.kit.as_ref().map_or_else(|| PathBuf::from("busybox"), Kit::busybox))
    }

    /// The program `guest-agent`. It runs in the guests, and also on the host.
    pub fn agent(&self) -> &Path {
        &self.agent
    }

    /// The program `vbus-guest`. It runs in the guests, and also on the host.
    pub fn guest(&self) -> &Path {
        &self.guest
    }

    /// Builds the guest without an operating system and returns its path.
    pub fn flat(&self) -> Result<PathBuf> {
        workspace::build_flat(self.options.as_built)
    }

    /// Builds the tests of vbus-kvm and returns their path.
    pub fn kvm_tests(&self) -> Result<PathBuf> {
        workspace::build_kvm_tests(self.options.as_built)
    }

    /// Builds the program `vbus-vmm` and returns its path.
    pub fn vmm(&self) -> Result<PathBuf> {
        workspace::build_vmm(self.options.as_built)
    }

    /// The kit, unless the options replace all of it.
    pub fn kit(&self) -> Option<&Kit> {
        self.kit.as_ref()
    }

    /// Adds modules of the guests' kernel to an archive. The guest loads them at boot. A module
    /// that is built into the kernel is no error.
    pub fn add_modules(&self, archive: &mut Archive, names: &[&str]) -> Result<()> {
        let Some(modules) = &self.modules else { return Ok(()) };
        initramfs::add_modules(archive, modules, names, |path| unxz(self.kit.as_ref(), path))
    }

    /// QEMU's version.
    pub fn qemu_version(&self) -> &str {
        &self.qemu_version
    }

    /// The program `vbus`.
    pub fn vbus(&self) -> &Path {
        &self.vbus
    }

    /// The guests' kernel.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// The version of the guests' kernel, or its path if the file does not say it.
    pub fn kernel_version(&self) -> String {
        kernel_version(&self.kernel).unwrap_or_else(|| self.kernel.display().to_string())
    }

    /// The guests' root file system.
    pub fn initramfs(&self) -> &Path {
        &self.initramfs
    }

    /// Sets the accelerator of all guests that start from now on.
    pub fn set_accel(&mut self, accel: Accel) {
        self.accel = accel;
    }

    /// What executes the guests' instructions.
    pub fn accel(&self) -> Accel {
        self.accel
    }

    /// Uses copies of the programs from now on. A build meanwhile does not touch them.
    pub fn copy_programs(&mut self) -> Result<()> {
        let folder = self.dir.path().join("programs");
        fs::create_dir_all(&folder)?;
        for program in [&mut self.vbus, &mut self.agent, &mut self.guest] {
            let copy = folder.join(program.file_name().context("a program has a name")?);
            fs::copy(&*program, &copy)
                .with_context(|| format!("cannot copy {}", program.display()))?;
            *program = copy;
        }
        Ok(())
    }

    /// Makes a scene: a folder of its own for sockets and logs.
    pub fn scene(&self, name: &str) -> Result<Scene<'_>> {
        let dir = self.dir.path().join(name);
        fs::create_dir_all(&dir)?;
        Ok(Scene { lab: self, dir })
    }
}

/// The folder for the sockets and logs of guests that run together, and the lab that they use.
pub struct Scene<'a> {
    /// What the guests share.
    pub lab: &'a Lab,
    dir: PathBuf,
}

impl Scene<'_> {
    /// The folder for sockets and logs.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a root file system, the lab's with the files of `archive` added. Returns its path.
    pub fn extend_initramfs(&self, archive: Archive) -> Result<PathBuf> {
        let base = self.lab.initramfs();
        let mut bytes =
            fs::read(base).with_context(|| format!("cannot read {}", base.display()))?;
        // The kernel unpacks one archive after the other. Each must begin at a multiple of four.
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(archive.finish()?);
        let path = self.dir.join("initramfs");
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// Copies the logs to a folder that outlives the run, and returns that folder.
    pub fn save_logs(&self) -> Result<PathBuf> {
        let name = self.dir.file_name().context("a scene has a name")?;
        let saved = workspace::logs()?.join(name);
        fs::create_dir_all(&saved)?;
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                fs::copy(&path, saved.join(path.file_name().unwrap_or_default()))?;
            }
        }
        Ok(saved)
    }
}

/// Decompresses a module with the kit's busybox, or with this machine's xzcat.
fn unxz(kit: Option<&Kit>, path: &Path) -> Result<Vec<u8>> {
    let mut command = match kit {
        Some(kit) => {
            let mut command = Command::new(kit.busybox());
            command.arg("xzcat");
            command
        }
        None => Command::new("xzcat"),
    };
    let output = command.arg(path).output().context("cannot run xzcat")?;
    ensure!(output.status.success(), "{} is no xz file", path.display());
    Ok(output.stdout)
}

/// The version string in a bzImage: its offset, less 0x200, stands at 0x20e.
fn kernel_version(path: &Path) -> Option<String> {
    let image = fs::read(path).ok()?;
    (image.get(0x202..0x206)? == b"HdrS").then_some(())?;
    let offset = u16::from_le_bytes(image.get(0x20e..0x210)?.try_into().ok()?);
    let text = image.get(usize::from(offset) + 0x200..)?.split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(text).split_whitespace().next()?.to_owned())
}
