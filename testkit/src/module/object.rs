// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Rust part of the Linux driver: one object for all kernels.
//!
//! rustc compiles `core` from Rust's own source, then `vbus-shm`, `vbus-driver` and `linux/src`,
//! all with the flags of the kernel's own Rust, and makes one object of them. So the object has
//! return thunks, retpolines and landing pads throughout, and no instruction that a kernel may not
//! use.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::kit::kernels::Flavour;
use crate::kit::part::files;
use crate::kit::toolchain::Toolchain;
use crate::progress::Progress;
use crate::workspace;

/// The name of the object. Kbuild finds it by this name.
pub const NAME: &str = "vbus_rs.prebuilt";

/// The flags of all of it.
const FLAGS: [&str; 17] = [
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

/// What has the compiler check each access of memory, as in kernels with KASAN: the flags that they
/// compile their own Rust with. The offset is that of x86-64.
const KASAN_FLAGS: [&str; 6] = [
    "-Zsanitizer=kernel-address",
    "-Zsanitizer-recover=kernel-address",
    "-Cllvm-args=-asan-mapping-offset=0xdffffc0000000000",
    "-Cllvm-args=-asan-instrumentation-with-call-threshold=10000",
    "-Cllvm-args=-asan-stack=1",
    "-Cllvm-args=-asan-kernel-mem-intrinsic-prefix=1",
];

/// What has the compiler tell KCSAN of each access: those that kernels with KCSAN have for clang.
/// A volatile access is then one that may race, as READ_ONCE is in C.
const KCSAN_FLAGS: [&str; 4] = [
    "-Zsanitizer=thread",
    "-Cllvm-args=-tsan-instrument-func-entry-exit=0",
    "-Cllvm-args=-tsan-compound-read-before-write=1",
    "-Cllvm-args=-tsan-distinguish-volatile=1",
];

/// The target that is compiled for.
const TARGET: &str = "x86_64-unknown-none";

/// The most bytes of the stack that one function may take. The stack has 16 KiB, and the kernel's
/// own functions are on it too. (The kernel warns of 2 KiB in C.)
const FRAME_MAX: u64 = 3072;

/// What the compiler adds to the driver's own code.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Checks {
    /// Nothing.
    None,
    /// A check of each access of memory. The kernel must have KASAN.
    Kasan,
    /// A word to the kernel of each access of memory. It must have KCSAN.
    Kcsan,
}

impl Checks {
    /// The checks that a kernel of this kind can do.
    pub fn of(flavour: Flavour) -> Self {
        match flavour {
            Flavour::Kasan => Self::Kasan,
            Flavour::Kcsan => Self::Kcsan,
            Flavour::Cloud | Flavour::Generic => Self::None,
        }
    }

    /// The name of the folder of what is built with them.
    fn folder(self) -> &'static str {
        match self {
            Self::None => "object",
            Self::Kasan => "object-kasan",
            Self::Kcsan => "object-kcsan",
        }
    }

    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::None => &[],
            Self::Kasan => &KASAN_FLAGS,
            Self::Kcsan => &KCSAN_FLAGS,
        }
    }

    /// The most bytes of the stack that one function may take. With KASAN each variable has room
    /// around it, and the kernel's stack is twice as large.
    fn frame_max(self) -> u64 {
        match self {
            Self::None | Self::Kcsan => FRAME_MAX,
            Self::Kasan => 2 * FRAME_MAX,
        }
    }
}

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
pub fn build(toolchain: &Toolchain, checks: Checks) -> Result<PathBuf> {
    let dir = super::out().join(checks.folder());
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let lock = fs::File::create(dir.join("lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;

    let crates = workspace::root().join("crates");
    let version = toolchain.rustc_version()?;
    let target = match checks {
        Checks::None | Checks::Kasan => TARGET.into(),
        Checks::Kcsan => target_with_kcsan(toolchain, &dir)?.into_os_string(),
    };
    let compiler = Compiler { toolchain, dir: &dir, target, checks };
    let settings = format!("{version} {FLAGS:?} {:?}", checks.flags());
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
        compiler.compile(&core, None)?;
        compiler.compile(&builtins, None)?;
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
        compiler.compile(&shm, None)?;
        compiler.compile(&driver, None)?;
        compiler.compile(&linux, Some(&object))?;
        check_stack(toolchain, &object, checks.frame_max())?;
        super::note(&object, &fingerprint)?;
    }
    Ok(object)
}

/// Checks that no function takes so much of the kernel's small stack that a chain of calls could
/// run out of it.
fn check_stack(toolchain: &Toolchain, object: &Path, most: u64) -> Result<()> {
    let args = ["--disassemble".as_ref(), "--no-show-raw-insn".as_ref(), object.as_os_str()];
    let frames = frames(&toolchain.run("x86_64-linux-gnu-objdump", args)?);
    ensure!(!frames.is_empty(), "objdump shows no function of {}", object.display());
    for (function, bytes) in frames {
        ensure!(
            bytes <= most,
            "{function} takes {bytes} bytes of the kernel's stack, and {most} is the most: \
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

/// Writes the description of the same target for kernels with KCSAN, of which rustc knows nothing.
/// Returns its path.
fn target_with_kcsan(toolchain: &Toolchain, dir: &Path) -> Result<PathBuf> {
    let output = toolchain
        .command("rustc")
        .args(["-Zunstable-options", "--print=target-spec-json", "--target", TARGET])
        .env("RUSTC_BOOTSTRAP", "1")
        .output()
        .context("cannot run the kit's rustc")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "rustc does not describe {TARGET}: {}", said.trim());
    let mut target: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let sanitizers = target["supported-sanitizers"].as_array_mut();
    sanitizers.context("rustc knows no sanitizers for this target")?.push("thread".into());
    let path = dir.join(format!("{TARGET}-kcsan.json"));
    fs::write(&path, serde_json::to_vec_pretty(&target)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// How crates are compiled.
struct Compiler<'a> {
    toolchain: &'a Toolchain,
    /// The folder of the libraries.
    dir: &'a Path,
    target: OsString,
    checks: Checks,
}

impl Compiler<'_> {
    /// Compiles a crate: to a library, or to the object.
    fn compile(&self, it: &Crate, object: Option<&Path>) -> Result<()> {
        let mut rustc = self.toolchain.command("rustc");
        rustc
            .arg("--target")
            .arg(&self.target)
            .args(FLAGS)
            .args(self.checks.flags())
            .args([&format!("--crate-name={}", it.name), &format!("--edition={}", it.edition)])
            .args(it.args)
            .arg("-L")
            .arg(self.dir)
            .arg(&it.source)
            // These flags are unstable. The kernels compile their own Rust with the same.
            .env("RUSTC_BOOTSTRAP", "1")
            .env_remove("RUSTFLAGS");
        match object {
            Some(object) => rustc.arg(format!("--emit=obj={}", object.display())),
            None => rustc.arg("--out-dir").arg(self.dir),
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
