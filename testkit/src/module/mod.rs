// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Linux driver, built for Debian's kernels: the kernel module `vbus.ko`.
//!
//! The Rust part is one object for all kernels ([`object`]). The kernel's own build compiles the C
//! shim for each kernel and links the two, against nothing but the kernel's headers (`link.rs`).
//! All that this needs is in parts of the kit: the [toolchain](crate::kit::toolchain) and
//! [`headers`]. Nothing is installed, and no root is needed.

pub mod headers;
mod link;
mod object;

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::kit::kernels::DebianKernel;
use crate::kit::toolchain::Toolchain;
use crate::workspace;
use object::Checks;

/// A built module.
pub struct Module {
    /// The release of the kernel that it is for, as `uname -r` says it.
    pub release: String,
    /// The file `vbus.ko`.
    pub path: PathBuf,
}

/// Builds the module for a kernel, or takes the last build if its sources have not changed. For
/// `mirror` see [`Kit::get`](crate::kit::Kit::get).
///
/// # Errors
/// A part of the kit cannot be fetched, or the sources do not build. A warning of the kernel's
/// build is an error.
pub fn build(kernel: DebianKernel, mirror: Option<&str>) -> Result<Module> {
    let toolchain = Toolchain::get(&workspace::target(), mirror)?;
    let headers = headers::get(&workspace::target(), kernel, mirror)?;
    let object = object::build(&toolchain, Checks::of(kernel.flavour))?;
    let path = link::build(&toolchain, &headers, kernel, &object)?;
    Ok(Module { release: headers.release, path })
}

/// Builds the Rust part of the module, which is the same for each of Debian's kernels. For
/// `mirror` see [`Kit::get`](crate::kit::Kit::get). Returns its path.
///
/// # Errors
/// Those of [`build`].
pub fn object(mirror: Option<&str>) -> Result<PathBuf> {
    object::build(&Toolchain::get(&workspace::target(), mirror)?, Checks::None)
}

/// The sources of the module: the folder `linux` of the workspace.
pub fn sources() -> PathBuf {
    workspace::root().join("linux")
}

/// The folder of what is built.
fn out() -> PathBuf {
    workspace::target().join("module")
}

/// A number that differs if one of the files, or the text `more`, does.
fn fingerprint(files: &[PathBuf], more: &str) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    more.hash(&mut hasher);
    for path in files {
        path.hash(&mut hasher);
        fs::read(path)
            .with_context(|| format!("cannot read {}", path.display()))?
            .hash(&mut hasher);
    }
    Ok(format!("{:016x}", hasher.finish()))
}

/// Whether the file beside `built` says that it was built from sources with this fingerprint.
fn is_fresh(built: &Path, fingerprint: &str) -> bool {
    let said = fs::read_to_string(built.with_extension("fingerprint"));
    built.exists() && said.is_ok_and(|said| said == fingerprint)
}

/// Lets [`is_fresh`] know what `built` was built from.
fn note(built: &Path, fingerprint: &str) -> Result<()> {
    fs::write(built.with_extension("fingerprint"), fingerprint)
        .with_context(|| format!("cannot write beside {}", built.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::kit::part::files;

    #[test]
    fn the_module_has_the_version_of_the_workspace() {
        let read = |name: &str| fs::read_to_string(sources().join(name)).unwrap();
        let version = env!("CARGO_PKG_VERSION");
        assert!(read("shim/vbus.h").contains(&format!("#define VBUS_VERSION \"{version}\"\n")));
        assert!(read("Cargo.toml").contains(&format!("\nversion = \"{version}\"\n")));
    }

    /// The text of a shim's header without its comments, and that of the ffi.rs that declares it.
    fn both_sides() -> [(String, String); 4] {
        [("vbus", "kernel"), ("net", "net"), ("sched", "sched"), ("state", "state")].map(
            |(header, folder)| {
                let mut text =
                    fs::read_to_string(sources().join(format!("shim/{header}.h"))).unwrap();
                while let Some(begin) = text.find("/*") {
                    let end = begin + text[begin..].find("*/").unwrap() + 2;
                    text.replace_range(begin..end, "");
                }
                let path = sources().join(format!("src/{folder}/ffi.rs"));
                (text, fs::read_to_string(path).unwrap())
            },
        )
    }

    #[test]
    fn the_constants_of_rust_are_those_of_the_shim() {
        let mut count = 0;
        for (header, rust) in both_sides() {
            let defined: Vec<(&str, &str)> = header
                .lines()
                .filter_map(|line| line.strip_prefix("#define ")?.split_once(' '))
                .map(|(name, value)| (name, value.trim().trim_matches(['(', ')'])))
                .collect();
            for line in rust.lines() {
                let Some((name, rest)) =
                    line.strip_prefix("pub const ").and_then(|line| line.split_once(": "))
                else {
                    continue;
                };
                let value = rest.split_once(" = ").unwrap().1.trim_end_matches(';');
                let here = |prefix: &str| defined.contains(&(&format!("{prefix}{name}"), value));
                let prefixes = ["SHIM_", "VBUS_", "VBUS_NET_"];
                assert!(prefixes.into_iter().any(here), "no header says {name} = {value}");
                count += 1;
            }
        }
        assert!(count > 30, "{count} constants were found");
    }

    /// A field of a struct in C or Rust: its name, and its type in Rust's words.
    type Field = (String, String);

    fn fields_of_c(body: &str) -> Vec<Field> {
        let mut fields = Vec::new();
        for field in body.split(';').map(str::trim).filter(|field| !field.is_empty()) {
            let field = field.trim_start_matches("const ");
            let (kind, names) = field.split_once(' ').unwrap();
            let kind = if kind == "s32" { "i32" } else { kind };
            for name in names.split(',').map(str::trim) {
                let pointed = name.strip_prefix('*');
                let (name, kind) = match (pointed, name.split_once('[')) {
                    (Some(name), _) => (name, "pointer".to_owned()),
                    (_, Some((name, count))) => (name, format!("[{kind}; {count}")),
                    _ => (name, kind.to_owned()),
                };
                fields.push((name.to_owned(), kind));
            }
        }
        fields
    }

    fn fields_of_rust(body: &str) -> Vec<Field> {
        let fields = body.lines().filter_map(|line| line.trim().strip_prefix("pub "));
        fields
            .map(|field| {
                let (name, kind) = field.trim_end_matches(',').split_once(": ").unwrap();
                let is_pointer = kind.starts_with('*') || kind == "Handle";
                (name.to_owned(), if is_pointer { "pointer" } else { kind }.to_owned())
            })
            .collect()
    }

    #[test]
    fn the_structs_of_rust_are_those_of_the_shim() {
        let mut count = 0;
        for (header, rust) in both_sides() {
            let in_c: Vec<_> = header
                .split("\nstruct ")
                .filter_map(|text| text.split_once(" {\n"))
                .filter_map(|(name, rest)| {
                    Some((name.to_owned(), fields_of_c(rest.split_once("\n};")?.0)))
                })
                .collect();
            for text in rust.split("\npub struct ").skip(1) {
                let (name, rest) = text.split_once(" {\n").unwrap();
                let fields = fields_of_rust(rest.split_once("\n}").unwrap().0);
                let mut snake = String::new();
                for c in name.chars() {
                    if c.is_uppercase() {
                        snake.push('_');
                    }
                    snake.push(c.to_ascii_lowercase());
                }
                let twin = in_c.iter().find(|(name, _)| {
                    ["shim", "vbus", "vbus_net"]
                        .map(|prefix| format!("{prefix}{snake}"))
                        .contains(name)
                });
                assert_eq!(Some(&fields), twin.map(|(_, fields)| fields), "{name}");
                count += 1;
            }
        }
        assert!(count > 10, "{count} structs were found");
    }

    #[test]
    fn what_is_built_is_fresh_until_a_source_changes() {
        let dir = std::env::temp_dir().join(format!("vbus-module-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (source, built) = (dir.join("a.rs"), dir.join("built.o"));
        fs::write(&source, "one").unwrap();
        let now =
            || fingerprint(&files(std::slice::from_ref(&dir), |name| name == "a.rs")?, "flags");
        let first = now().unwrap();
        note(&built, &first).unwrap();
        assert!(!is_fresh(&built, &first), "there is no file yet");
        fs::write(&built, "").unwrap();
        assert!(is_fresh(&built, &first));
        fs::write(&source, "two").unwrap();
        assert!(!is_fresh(&built, &now().unwrap()));
        fs::remove_dir_all(&dir).unwrap();
    }
}
