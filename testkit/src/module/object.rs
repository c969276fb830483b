// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Rust part of the Linux driver: one object for all kernels.
//!
//! rustc compiles `core` from Rust's own source, then `vbus-shm`, `vbus-driver` and `linux/src`,
//! all with the flags of the kernel's own Rust, and makes one object of them. So the object has
//! return thunks, retpolines and landing pads throughout, and no instruction that a kernel may not
//! use.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::kit::part::files;
use crate::kit::toolchain::Toolchain;
use crate::progress::Progress;
use crate::workspace;

/// The name of the object. Kbuild finds it by this name.
pub const NAME: &str = "vbus_rs.prebuilt";

/// The flags of all of it.
const FLAGS: [&str; 18] = [
    "--target=x86_64-unknown-none",
    // Only what is built here.
    "--sysroot=/dev/null",
    "-Copt-level=2",
    "-Ccodegen-units=1",
    "-Cpanic=abort",
    "-Crelocation-model=static",
    "-Ccode-model=kernel",
    "-Cno-redzone=yes",
    "-Csymbol-mangling-version=v0",
    "-Ctarget-feature=+retpoline-external-thunk,+retpoline-indirect-branches,\
     +retpoline-indirect-calls",
    "-Zfunction-return=thunk-extern",
    "-Zcf-protection=branch",
    // Kernels that track the depth of calls want room before each function.
    "-Zpatchable-function-entry=16,16",
    // The kernel's loader knows no GOT, by which functions of C would be called otherwise.
    "-Zplt=yes",
    // objtool follows no jump tables.
    "-Zno-jump-tables",
    "-Zfunction-sections=no",
    "--cap-lints=allow",
    "-Cdebuginfo=0",
];

/// The most bytes of the stack that one function may take. The stack has 16 KiB, and the kernel's
/// own functions are on it too. (The kernel warns of 2 KiB in C.)
const FRAME_MAX: u64 = 3072;

/// A crate to compile.
struct Crate {
    name: &'static str,
    edition: &'static str,
    source: PathBuf,
    args: &'static [&'static str],
}

/// Builds the object, or takes the last build if its sources have not changed. Returns its path.
///
/// # Errors
/// It does not compile.
pub fn build(toolchain: &Toolchain) -> Result<PathBuf> {
    let dir = super::out().join("object");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let lock = fs::File::create(dir.join("lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;

    let crates = workspace::root().join("crates");
    let version = toolchain.rustc_version()?;
    let settings = format!("{version} {FLAGS:?}");
    let core = Crate {
        name: "core",
        edition: "2021",
        source: toolchain.rust_library().join("core/src/lib.rs"),
        args: &["--crate-type=rlib", "-Zforce-unstable-if-unmarked"],
    };
    let builtins = Crate {
        name: "compiler_builtins",
        edition: "2021",
        source: super::sources().join("builtins.rs"),
        args: &["--crate-type=rlib"],
    };
    let shm = Crate {
        name: "vbus_shm",
        edition: "2024",
        source: crates.join("vbus-shm/src/lib.rs"),
        args: &["--crate-type=rlib"],
    };
    let driver = Crate {
        name: "vbus_driver",
        edition: "2024",
        source: crates.join("vbus-driver/src/lib.rs"),
        args: &["--crate-type=rlib", "--extern=vbus_shm"],
    };
    let linux = Crate {
        name: "vbus_linux",
        edition: "2024",
        source: super::sources().join("src/lib.rs"),
        args: &["--crate-type=staticlib", "--extern=vbus_shm", "--extern=vbus_driver", "-Clto=fat"],
    };

    // `core` takes the longest and changes the least.
    let library = dir.join("libcore.rlib");
    let library_fingerprint =
        super::fingerprint(std::slice::from_ref(&builtins.source), &settings)?;
    if !super::is_fresh(&library, &library_fingerprint) {
        let progress = Progress::begin(
            "module",
            &format!("compiling Rust's core for the kernel ({version}); this takes half a minute"),
        );
        compile(toolchain, &dir, &core, None)?;
        compile(toolchain, &dir, &builtins, None)?;
        super::note(&library, &library_fingerprint)?;
        drop(progress);
    }
    let sources = ["vbus-shm/src", "vbus-driver/src"].map(|source| crates.join(source));
    let sources = [&sources[..], &[super::sources().join("src")]].concat();
    let sources = files(&sources, |name| name.ends_with(".rs"))?;
    let fingerprint = super::fingerprint(&sources, &library_fingerprint)?;
    let object = dir.join(NAME);
    if !super::is_fresh(&object, &fingerprint) {
        eprintln!("module: compiling the Rust part of the driver");
        compile(toolchain, &dir, &shm, None)?;
        compile(toolchain, &dir, &driver, None)?;
        compile(toolchain, &dir, &linux, Some(&object))?;
        check_stack(toolchain, &object)?;
        super::note(&object, &fingerprint)?;
    }
    Ok(object)
}

/// Checks that no function takes so much of the kernel's small stack that a chain of calls could
/// run out of it.
fn check_stack(toolchain: &Toolchain, object: &Path) -> Result<()> {
    let args = ["--disassemble".as_ref(), "--no-show-raw-insn".as_ref(), object.as_os_str()];
    let frames = frames(&toolchain.run("x86_64-linux-gnu-objdump", args)?);
    ensure!(!frames.is_empty(), "objdump shows no function of {}", object.display());
    for (function, bytes) in frames {
        ensure!(
            bytes <= FRAME_MAX,
            "{function} takes {bytes} bytes of the kernel's stack, and {FRAME_MAX} is the most: \
             build large values in place (KBox), or pass less by value"
        );
    }
    Ok(())
}

/// The functions of a disassembly, each with the bytes by which it moves the stack.
fn frames(disassembly: &str) -> Vec<(String, u64)> {
    let mut frames = Vec::new();
    for line in disassembly.lines() {
        if let Some(name) = line.strip_suffix(">:").and_then(|line| line.split_once(" <")) {
            frames.push((name.1.to_owned(), 0));
        } else if let Some((_, rest)) = line.split_once("sub ") {
            // A large frame is taken page by page, so the steps are added.
            let by = rest.trim().strip_prefix("$0x").and_then(|rest| rest.strip_suffix(",%rsp"));
            let by = by.and_then(|by| u64::from_str_radix(by, 16).ok());
            if let (Some(by), Some((_, sum))) = (by, frames.last_mut()) {
                *sum += by;
            }
        }
    }
    frames
}

/// Compiles a crate: to a library in `dir`, or to the object.
fn compile(toolchain: &Toolchain, dir: &Path, it: &Crate, object: Option<&Path>) -> Result<()> {
    let mut rustc = toolchain.command("rustc");
    rustc
        .args(FLAGS)
        .args([&format!("--crate-name={}", it.name), &format!("--edition={}", it.edition)])
        .args(it.args)
        .arg("-L")
        .arg(dir)
        .arg(&it.source)
        // These flags are unstable. The kernels compile their own Rust with the same.
        .env("RUSTC_BOOTSTRAP", "1")
        .env_remove("RUSTFLAGS");
    match object {
        Some(object) => rustc.arg(format!("--emit=obj={}", object.display())),
        None => rustc.arg("--out-dir").arg(dir),
    };
    let output = rustc.output().context("cannot run the kit's rustc")?;
    ensure!(
        output.status.success(),
        "{} does not compile for the kernel:\n{}",
        it.name,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frames_of_a_disassembly_are_found() {
        let text = "
Disassembly of section .text:

0000000000000010 <small>:
  10:	endbr64
  14:	sub    $0x18,%rsp
  18:	sub    $0x8,%rax

0000000000000030 <_R5large>:
  30:	sub    $0x1000,%rsp
  37:	movq   $0x0,(%rsp)
  3f:	sub    $0x118,%rsp
";
        let frame = |name: &str, bytes| (name.to_owned(), bytes);
        assert_eq!(frames(text), [frame("small", 0x18), frame("_R5large", 0x1118)]);
    }
}
