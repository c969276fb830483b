// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The part of the kit that compiles: gcc, binutils, make, rustc with the source of its `core`.
//!
//! gcc and make start other programs of the kit by themselves. A program of Debian starts with the
//! dynamic loader of the system that it runs on, whose C library may be older than the kit's. So a
//! small script takes the place of each program (`wrap`). It starts the program with the kit's
//! loader and libraries, which it finds by its own place. So the kit may be moved.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::apt::{self, Packages, Source};
use super::{LIBRARIES, LOADER, part};

/// The edition of this part.
const EDITION: u32 = 1;

/// Its packages. The programs of the kernels' headers need the last one.
const PACKAGES: [&str; 5] = ["gcc", "make", "rustc", "rust-src", "libelf1t64"];

/// The suite whose rustc the driver is built with.
const SUITE: &str = "trixie";

/// The folders of programs that start each other.
const PROGRAMS: [&str; 2] = ["usr/bin", "usr/libexec/gcc"];

/// The part's name, and its place as seen from the folder of another part's files.
const NAME: &str = "toolchain";
const FROM_OTHER_PARTS: &str = "../../../toolchain/root";

/// What a program that runs by a script is called.
const WRAPPED: &str = "elf";

/// The compilers.
pub struct Toolchain {
    root: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Stamp {
    packages: Vec<String>,
}

impl Toolchain {
    /// Opens the toolchain in `target/kit/toolchain`, fetching it first if it is not there. For
    /// `mirror` see [`Kit::get`](crate::kit::Kit::get).
    ///
    /// # Errors
    /// apt cannot fetch it.
    pub fn get(target: &Path, mirror: Option<&str>) -> Result<Self> {
        let dir = target.join("kit").join(NAME);
        let (root, ..) = part::open(&dir, EDITION, |fresh| {
            let source = Source::suite(mirror, SUITE)?;
            let what = "gcc, make and rustc for the Linux driver come";
            let packages = apt::fetch(fresh, &source, what, |_| {
                Ok(Packages { complete: PACKAGES.map(str::to_owned).into(), ..Packages::default() })
            })?;
            let root = fresh.join("root");
            prune(&root)?;
            wrap(&root, &PROGRAMS, ".")?;
            Ok(Stamp { packages })
        })?;
        Ok(Self { root })
    }

    /// A command that runs `/usr/bin/PROGRAM`, which finds all other programs of this part.
    pub fn command(&self, program: &str) -> Command {
        let bin = self.root.join("usr/bin");
        let mut path = bin.clone().into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let mut command = Command::new(bin.join(program));
        // A make around this one must not hand its own settings down.
        command.env("PATH", path).env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
        command
    }

    /// Runs `/usr/bin/PROGRAM`. Returns what it prints.
    ///
    /// # Errors
    /// It does not run, or it fails. The error has its words.
    pub fn run<S: AsRef<OsStr>>(
        &self,
        program: &str,
        args: impl IntoIterator<Item = S>,
    ) -> Result<String> {
        let output = self.command(program).args(args).output();
        let output = output.with_context(|| format!("cannot run the kit's {program}"))?;
        ensure!(
            output.status.success(),
            "the kit's {program} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The rustc's version, in one line.
    pub fn rustc_version(&self) -> Result<String> {
        Ok(self.run("rustc", ["--version"])?.trim().to_owned())
    }

    /// The folder of the sources of Rust's libraries.
    pub fn rust_library(&self) -> PathBuf {
        self.root.join("usr/lib/rustlib/src/rust/library")
    }
}

/// Lets the programs in the files of another part of the kit, below its folder `programs`, run
/// anywhere.
pub fn wrap_part(root: &Path, programs: &str) -> Result<()> {
    wrap(root, &[programs], FROM_OTHER_PARTS)
}

/// Puts a script in the place of each program below the folders `programs` of `root`. The
/// toolchain's files are in `toolchain`, as seen from `root`.
pub(super) fn wrap(root: &Path, programs: &[&str], toolchain: &str) -> Result<()> {
    let dirs: Vec<PathBuf> = programs.iter().map(|dir| root.join(dir)).collect();
    for path in part::files(&dirs, |_| true)? {
        if !is_program(&path)? {
            continue;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let elf = format!("{name}.{WRAPPED}");
        fs::rename(&path, path.with_file_name(&elf))
            .with_context(|| format!("cannot rename {}", path.display()))?;
        let depth = path.strip_prefix(root)?.components().count().saturating_sub(1);
        let to_root = "../".repeat(depth);
        // A program may look for others beside the name that it was started by.
        let script = format!(
            "#!/bin/sh\nhere=${{0%/*}}\nkit=$here/{to_root}{toolchain}\nexec \"$kit/{LOADER}\" \
             --argv0 \"$0\" --library-path \"$kit/{LIBRARIES}\" \"$here/{elf}\" \"$@\"\n"
        );
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Removes what no build of the module reads: it is half of this part.
fn prune(root: &Path) -> Result<()> {
    let unused = |path: &Path| -> Result<()> {
        let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        removed.with_context(|| format!("cannot remove {}", path.display()))
    };
    for entry in fs::read_dir(root.join("usr/src"))? {
        let rust = entry?.path();
        for entry in fs::read_dir(&rust)? {
            let entry = entry?;
            if entry.file_name() != "library" {
                unused(&entry.path())?;
            }
        }
    }
    // Rust's libraries for this machine itself.
    let own = root.join("usr/lib/rustlib/x86_64-unknown-linux-gnu/lib");
    for entry in fs::read_dir(&own).into_iter().flatten() {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rlib") {
            unused(&path)?;
        }
    }
    Ok(())
}

/// Whether a file is a program that a dynamic loader starts.
fn is_program(path: &Path) -> Result<bool> {
    // The loader's name follows the headers at the beginning.
    const HEADERS: u64 = 4096;
    const LOADER_NAME: &[u8] = b"/lib64/ld-linux-x86-64.so.2\0";
    let mut begin = Vec::new();
    File::open(path)?.take(HEADERS).read_to_end(&mut begin)?;
    let names_loader = || begin.windows(LOADER_NAME.len()).any(|bytes| bytes == LOADER_NAME);
    Ok(begin.starts_with(b"\x7fELF") && names_loader())
}
