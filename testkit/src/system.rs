// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a guest boots: a kernel, and the root file system that fits it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::initramfs::{self, Archive};
use crate::kit::Kit;

/// A kernel and its root file system.
#[derive(Clone)]
pub struct System {
    kernel: PathBuf,
    initramfs: PathBuf,
    modules: Option<Modules>,
    patience: u32,
}

/// Where a kernel's modules are.
#[derive(Clone)]
struct Modules {
    dir: PathBuf,
    /// The program that decompresses them, and its first words.
    unxz: (PathBuf, &'static [&'static str]),
}

/// The programs of a root file system.
pub enum Userland<'a> {
    /// Those of the kit.
    Kit(&'a Kit),
    /// A user's archive. The kit, if there is one, only decompresses modules.
    Own(&'a Path, Option<&'a Kit>),
}

/// Our programs in a root file system.
pub struct Ours<'a> {
    /// `guest-agent`.
    pub agent: &'a Path,
    /// `vbus-guest`.
    pub guest: &'a Path,
}

impl System {
    /// Writes the root file system that fits the kernel into the file `initramfs`. Without
    /// `modules` the kernel must have them built in.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn build(
        kernel: PathBuf,
        modules: Option<PathBuf>,
        userland: &Userland,
        ours: &Ours,
        initramfs: PathBuf,
    ) -> Result<Self> {
        let mut archive = Archive::default();
        let mut base = Vec::new();
        let kit = match userland {
            Userland::Kit(kit) => {
                initramfs::add_userland(&mut archive, kit)?;
                Some(*kit)
            }
            Userland::Own(path, kit) => {
                base = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
                *kit
            }
        };
        let unxz: (_, &[_]) = match kit {
            Some(kit) => (kit.busybox(), &["xzcat"]),
            None => ("xzcat".into(), &[]),
        };
        let modules = modules.map(|dir| Modules { dir, unxz });
        let system = Self { kernel, initramfs, modules, patience: 1 };
        system.add_modules(&mut archive, &initramfs::MODULES)?;
        initramfs::add_ours(&mut archive, ours.agent, ours.guest)?;
        // The user's archive may be compressed.
        write(base, archive, &system.initramfs)?;
        Ok(system)
    }

    /// The same, but whatever a guest does may take this many times as long.
    #[must_use]
    pub fn with_patience(self, patience: u32) -> Self {
        Self { patience, ..self }
    }

    /// How many times as long as usual anything in a guest may take.
    pub fn patience(&self) -> u32 {
        self.patience
    }

    /// The kernel.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// The version of the kernel, or its path if the file does not say it.
    pub fn kernel_version(&self) -> String {
        kernel_version(&self.kernel).unwrap_or_else(|| self.kernel.display().to_string())
    }

    /// The root file system.
    pub fn initramfs(&self) -> &Path {
        &self.initramfs
    }

    /// Adds modules of the kernel to an archive. The guest loads them at boot. A module that is
    /// built into the kernel is no error.
    ///
    /// # Errors
    /// A module cannot be read.
    pub fn add_modules(&self, archive: &mut Archive, names: &[&str]) -> Result<()> {
        let Some(modules) = &self.modules else { return Ok(()) };
        initramfs::add_modules(archive, &modules.dir, names, |path| modules.unxz(path))
    }

    /// As [`extend`](Self::extend), with the kernel and the root file system themselves in `/boot`,
    /// for [`kexec`].
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn extend_with_itself(&self, mut archive: Archive, dir: &Path) -> Result<Self> {
        for (name, path) in [("kernel", self.kernel()), ("initramfs", self.initramfs())] {
            let bytes =
                fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            archive.file(&format!("boot/{name}"), 0o644, &bytes)?;
        }
        fs::create_dir_all(dir)?;
        self.extend(archive, dir)
    }

    /// The same kernel with the files of `archive` added to the root file system, which is written
    /// into the folder `dir`.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn extend(&self, archive: Archive, dir: &Path) -> Result<Self> {
        let base = fs::read(&self.initramfs)
            .with_context(|| format!("cannot read {}", self.initramfs.display()))?;
        let name = self.initramfs.file_name().context("the root file system has a name")?;
        let initramfs = dir.join(name);
        ensure!(initramfs != self.initramfs, "{} would replace itself", initramfs.display());
        write(base, archive, &initramfs)?;
        Ok(Self { initramfs, ..self.clone() })
    }
}

/// The command that starts the kernel of [`System::extend_with_itself`] at once, with `words` more
/// on its command line. kexec would set interfaces down, and drivers would have nothing to shut
/// down.
pub fn kexec(words: &str) -> String {
    format!(
        "kexec -s -l /boot/kernel --initrd=/boot/initramfs --reuse-cmdline --append='{words}' && \
         exec kexec --exec --no-ifdown"
    )
}

impl Modules {
    /// Decompresses a module with the kit's busybox, or with this machine's xzcat.
    fn unxz(&self, path: &Path) -> Result<Vec<u8>> {
        let (program, words) = &self.unxz;
        let output = Command::new(program).args(*words).arg(path).output();
        let output = output.with_context(|| format!("cannot run {}", program.display()))?;
        ensure!(output.status.success(), "{} is no xz file", path.display());
        Ok(output.stdout)
    }
}

/// Writes two archives in a row. The kernel unpacks one after the other, and expects each at a
/// multiple of four.
fn write(mut first: Vec<u8>, second: Archive, path: &Path) -> Result<()> {
    first.resize(first.len().next_multiple_of(4), 0);
    first.extend(second.finish()?);
    fs::write(path, first).with_context(|| format!("cannot write {}", path.display()))
}

/// The version string in a bzImage: its offset, less 0x200, stands at 0x20e.
fn kernel_version(path: &Path) -> Option<String> {
    let image = fs::read(path).ok()?;
    (image.get(0x202..0x206)? == b"HdrS").then_some(())?;
    let offset = u16::from_le_bytes(image.get(0x20e..0x210)?.try_into().ok()?);
    let text = image.get(usize::from(offset) + 0x200..)?.split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(text).split_whitespace().next()?.to_owned())
}
