// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What all guests of one run share: QEMU, kernel, initramfs, accelerator, and a folder for sockets
//! and logs.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};

use crate::initramfs::Archive;
use crate::kit::kernels::{DebianKernel, KernelFiles};
use crate::kit::{Kit, qemu_version};
use crate::process::RunDir;
use crate::report::Skip;
use crate::system::{Ours, System, Userland};
use crate::workspace;

/// What to run guests with, in place of the kit's own.
#[derive(clap::Args, Clone, Default)]
pub struct Options {
    /// A qemu-system-x86_64 of version 10.1 or newer, in place of the kit's
    #[arg(long, value_name = "PATH")]
    pub qemu: Option<PathBuf>,
    /// The guests' Linux: 6.1, 6.12 or 7.x of Debian, which the kit fetches (the cloud flavour;
    /// 6.1-generic and so on: the flavour for machines of all kinds); 6.12-kasan or 6.12-kcsan,
    /// which check themselves and are built at first; or the path of a kernel (bzImage)
    /// [default: 6.12]
    #[arg(long, value_name = "KERNEL")]
    pub kernel: Option<KernelChoice>,
    /// The modules that go with a kernel of your own (lib/modules/VERSION); without it they must be
    /// built in
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

/// The kernel that `--kernel` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelChoice {
    /// One of Debian's.
    Debian(DebianKernel),
    /// A file.
    File(PathBuf),
}

impl FromStr for KernelChoice {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(text.parse().map_or_else(|_| Self::File(text.into()), Self::Debian))
    }
}

impl fmt::Display for KernelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Debian(kernel) => kernel.fmt(f),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

impl Options {
    /// The user's own kernel.
    fn kernel_file(&self) -> Option<&PathBuf> {
        match &self.kernel {
            Some(KernelChoice::File(path)) => Some(path),
            _ => None,
        }
    }

    /// How many times as long as usual anything in a guest may take.
    fn patience(&self) -> u32 {
        match &self.kernel {
            Some(KernelChoice::Debian(kernel)) => kernel.patience(),
            _ => 1,
        }
    }

    /// The same options as words of a command line, without `--as-built` and `--mirror`.
    pub fn words(&self) -> Vec<OsString> {
        let mut words = Vec::new();
        for (option, path) in
            [("--qemu", &self.qemu), ("--modules", &self.modules), ("--initramfs", &self.initramfs)]
        {
            words.extend(path.iter().flat_map(|path| [option.into(), path.clone().into()]));
        }
        if let Some(kernel) = &self.kernel {
            words.push("--kernel".into());
            words.push(match kernel {
                KernelChoice::Debian(kernel) => kernel.to_string().into(),
                KernelChoice::File(path) => path.clone().into(),
            });
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
        for (option, path) in [
            ("kernel", self.kernel_file()),
            ("modules", self.modules.as_ref()),
            ("initramfs", self.initramfs.as_ref()),
        ] {
            let Some(path) = path else { continue };
            let is_it = if option == "modules" { path.is_dir() } else { path.is_file() };
            let what = match option {
                "modules" => "folder",
                "kernel" => "file, and Debian's kernels are 6.1, 6.12 and 7.x",
                _ => "file",
            };
            ensure!(
                is_it,
                "--{option} {}: there is no such {what}; without --{option} the kit's is used",
                path.display()
            );
        }
        ensure!(
            self.modules.is_none() || self.kernel_file().is_some(),
            "--modules goes with a kernel of your own (--kernel PATH): Debian's have theirs"
        );
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
    system: System,
    accel: Accel,
    vbus: PathBuf,
    agent: PathBuf,
    guest: PathBuf,
    times: Option<u32>,
    dir: RunDir,
}

impl Lab {
    /// Fetches the kit and builds the guests' programs. The lab's accelerator is TCG, whatever
    /// `options` say. [`trial::open`](crate::trial::open) also chooses the accelerator.
    pub fn prepare(options: &Options) -> Result<Self> {
        options.check()?;
        let own_kernel = options.kernel_file();
        let complete =
            options.qemu.is_some() && own_kernel.is_some() && options.initramfs.is_some();
        let target = workspace::target();
        let kit = if complete { None } else { Some(Kit::get(&target, options.mirror.as_deref())?) };
        // A kernel that is fetched comes before the build: a mirror that lacks it is told at once.
        let (kernel, modules) = match (&options.kernel, &kit) {
            (Some(KernelChoice::File(path)), _) => (path.clone(), options.modules.clone()),
            (None, Some(kit)) => files(kit.default_kernel()?),
            (Some(KernelChoice::Debian(kernel)), Some(kit)) => files(kit.kernel(*kernel)?),
            (_, None) => bail!("no kernel and no kit"),
        };
        let programs = workspace::build_programs(options.as_built)?;
        let dir = RunDir::new()?;
        let userland = userland(options, kit.as_ref())?;
        let ours = Ours { agent: &programs.agent, guest: &programs.guest };
        let initramfs = dir.path().join("initramfs");
        let system = System::build(kernel, modules, &userland, &ours, initramfs)?
            .with_patience(options.patience());

        let mut lab = Self {
            kit,
            options: options.clone(),
            qemu_version: String::new(),
            system,
            accel: Accel::Tcg,
            vbus: programs.vbus,
            agent: programs.agent,
            guest: programs.guest,
            times: None,
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

    /// What guests boot if nobody asks for another: a kernel and its root file system.
    pub fn system(&self) -> &System {
        &self.system
    }

    /// One of Debian's kernels with the lab's root file system. The kit fetches the kernel if it is
    /// not here yet.
    ///
    /// # Errors
    /// apt cannot fetch the kernel. It is a [`Skip`] if the mirror lacks it, or if the options
    /// replace the whole kit.
    pub fn debian(&self, kernel: DebianKernel) -> Result<System> {
        let kit = self.kit.as_ref().ok_or_else(|| {
            Skip("the options replace the whole kit, which has Debian's kernels".into())
        })?;
        let (image, modules) = files(kit.kernel(kernel)?);
        let userland = userland(&self.options, Some(kit))?;
        let ours = Ours { agent: &self.agent, guest: &self.guest };
        let initramfs = self.dir.path().join(format!("initramfs-{kernel}"));
        let system = System::build(image, modules, &userland, &ours, initramfs)?;
        Ok(system.with_patience(kernel.patience()))
    }

    /// QEMU's version.
    pub fn qemu_version(&self) -> &str {
        &self.qemu_version
    }

    /// The program `vbus`.
    pub fn vbus(&self) -> &Path {
        &self.vbus
    }

    /// Sets the accelerator of all guests that start from now on.
    pub fn set_accel(&mut self, accel: Accel) {
        self.accel = accel;
    }

    /// What executes the guests' instructions.
    pub fn accel(&self) -> Accel {
        self.accel
    }

    /// Lets scenarios that repeat something do so this often.
    pub fn set_times(&mut self, times: Option<u32>) {
        self.times = times;
    }

    /// How often a scenario is to repeat what it repeats; none if the user has not said so.
    pub fn times(&self) -> Option<u32> {
        self.times
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

    /// The lab's system with the files of `archive` added to its root file system.
    pub fn extend(&self, archive: Archive) -> Result<System> {
        self.lab.system.extend(archive, &self.dir)
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

/// The image and the modules of a kernel.
fn files(kernel: KernelFiles) -> (PathBuf, Option<PathBuf>) {
    (kernel.image, kernel.modules)
}

/// The programs of the guests' root file system.
fn userland<'a>(options: &'a Options, kit: Option<&'a Kit>) -> Result<Userland<'a>> {
    match (&options.initramfs, kit) {
        (Some(path), kit) => Ok(Userland::Own(path, kit)),
        (None, Some(kit)) => Ok(Userland::Kit(kit)),
        (None, None) => bail!("no initramfs and no kit"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_one_of_debians_or_a_file() {
        let choice =
            |text: &str| text.parse::<KernelChoice>().unwrap_or_else(|never| match never {});
        assert!(matches!(choice("7.x-generic"), KernelChoice::Debian(_)));
        assert_eq!(choice("./6.1"), KernelChoice::File("./6.1".into()));
        for text in ["6.1", "7.x-generic", "/boot/vmlinuz"] {
            assert_eq!(choice(text).to_string(), text);
            let options = Options { kernel: Some(choice(text)), ..Options::default() };
            assert_eq!(options.words(), ["--kernel", text].map(OsString::from));
        }
        let modules = Options {
            kernel: Some(choice("6.1")),
            modules: Some("/".into()),
            ..Options::default()
        };
        let why = modules.check().err().map(|error| error.to_string());
        assert!(why.is_some_and(|why| why.contains("--modules goes with")));
    }
}
