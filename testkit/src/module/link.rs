// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel's own build of the module: it compiles the C shim and links it with the Rust object.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use super::headers::Headers;
use super::object;
use crate::initramfs::modinfo;
use crate::kit::kernels::DebianKernel;
use crate::kit::part::files;
use crate::kit::toolchain::Toolchain;

/// The compiler, by the name under which Debian's kernels know theirs.
const COMPILER: &str = "x86_64-linux-gnu-gcc-14";

/// Warnings that are none: Debian 12 compiles its kernel with an older gcc than the kit's, and the
/// kit has no pahole, which would make the type information for BPF.
const OTHER_TOOLS: [&str; 2] = [
    "warning: the compiler differs from the one used to build the kernel",
    "warning: pahole version differs from the one used to build the kernel",
];

/// Builds the module for a kernel, or takes the last build if nothing has changed. Returns its
/// path.
pub(super) fn build(
    toolchain: &Toolchain,
    headers: &Headers,
    kernel: DebianKernel,
    object: &Path,
) -> Result<PathBuf> {
    let dir = super::out().join(kernel.to_string());
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let lock = fs::File::create(dir.join("lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;

    let sources = super::sources();
    let shim = files(&[sources.join("shim")], |name| !name.starts_with('.'))?;
    let inputs = [&shim[..], &[sources.join("Kbuild"), object.to_owned()]].concat();
    let fingerprint = super::fingerprint(&inputs, &headers.release)?;
    let module = dir.join("vbus.ko");
    if super::is_fresh(&module, &fingerprint) {
        return Ok(module);
    }

    eprintln!("module: building for Linux {}", headers.release);
    let place = dir.join("build");
    let _ = fs::remove_dir_all(&place);
    fs::create_dir_all(place.join("shim"))?;
    let copy = |from: &Path, to: PathBuf| {
        fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display())).map(drop)
    };
    for path in &shim {
        copy(path, place.join("shim").join(path.file_name().unwrap_or_default()))?;
    }
    copy(&sources.join("Kbuild"), place.join("Kbuild"))?;
    copy(object, place.join(object::NAME))?;

    let output = toolchain
        .command("make")
        // The kernel's own Makefile. That of the package names a place in /usr/src.
        .arg("-f")
        .arg(headers.common.join("Makefile"))
        .arg("-C")
        .arg(&headers.own)
        .arg(format!("KBUILD_OUTPUT={}", headers.own.display()))
        .arg(format!("M={}", place.display()))
        .args([&format!("CC={COMPILER}"), &format!("HOSTCC={COMPILER}")])
        // Type information for BPF needs pahole, and the module has none of its own.
        .arg("CONFIG_DEBUG_INFO_BTF_MODULES=")
        .arg("modules")
        .stdin(Stdio::null())
        .output()
        .context("cannot run the kit's make")?;
    let said = [&output.stdout[..], b"\n", &output.stderr[..]].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    fs::write(dir.join("log"), &said)?;
    ensure!(
        output.status.success(),
        "the module does not build for Linux {} (make: {}):\n{}",
        headers.release,
        output.status,
        said.trim()
    );
    let warnings: Vec<&str> = said.lines().filter(|line| is_warning(line)).collect();
    ensure!(
        warnings.is_empty(),
        "the build of the module for Linux {} warns:\n{}",
        headers.release,
        warnings.join("\n")
    );
    let built = place.join("vbus.ko");
    check_relocations(toolchain, &built)?;
    check_info(&fs::read(&built)?, &headers.release)?;
    // What a debugger reads stays in `build`.
    let args = ["--strip-debug".as_ref(), "-o".as_ref(), module.as_os_str(), built.as_os_str()];
    toolchain.run("x86_64-linux-gnu-strip", args)?;
    super::note(&module, &fingerprint)?;
    Ok(module)
}

/// Checks that the kernel's loader knows every relocation of a module: it would refuse the module.
fn check_relocations(toolchain: &Toolchain, module: &Path) -> Result<()> {
    // Those of apply_relocate_add in arch/x86/kernel/module.c.
    const KNOWN: [&str; 7] = ["NONE", "64", "32", "32S", "PC32", "PLT32", "PC64"];
    let args = ["--relocs".as_ref(), "--wide".as_ref(), module.as_os_str()];
    let relocations = toolchain.run("x86_64-linux-gnu-readelf", args)?;
    // Lines of the form "OFFSET INFO R_X86_64_PLT32 VALUE NAME - 4".
    for line in relocations.lines() {
        let kind = line.split_whitespace().nth(2).and_then(|word| word.strip_prefix("R_X86_64_"));
        ensure!(
            kind.is_none_or(|kind| KNOWN.contains(&kind)),
            "the kernel cannot load {}, for it has the relocation\n{line}",
            module.display()
        );
    }
    Ok(())
}

/// Checks what a module says of itself: a kernel would refuse it, or be tainted by it, or would not
/// load it for a device.
fn check_info(module: &[u8], release: &str) -> Result<()> {
    let expected = [
        ("vermagic", format!("{release} ")),
        ("license", "Dual MIT/GPL".into()),
        ("retpoline", "Y".into()),
        ("version", env!("CARGO_PKG_VERSION").into()),
        ("alias", "pci:v00001AF4d000010F5".into()),
    ];
    for (field, begin) in expected {
        let value = modinfo(module, field).unwrap_or_default();
        ensure!(value.starts_with(&begin), "the module's {field} is {value:?}, not {begin:?}");
    }
    Ok(())
}

/// Whether a line of the build says that something is wrong.
fn is_warning(line: &str) -> bool {
    let line = line.to_ascii_lowercase();
    line.contains("warning") && !OTHER_TOOLS.iter().any(|tool| line.contains(tool))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_warning_but_that_of_another_compiler_counts() {
        for line in [
            "vbus.o: warning: objtool: f() falls through to next function g()",
            "WARNING: modpost: missing MODULE_LICENSE() in vbus.o",
            "shim/main.c:3:1: warning: unused variable",
        ] {
            assert!(is_warning(line), "{line}");
        }
        for line in ["  CC [M]  shim/main.o", OTHER_TOOLS[0], OTHER_TOOLS[1]] {
            assert!(!is_warning(line), "{line}");
        }
    }
}
