// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files that a user puts into a guest (`--put`).

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};

use crate::initramfs::Archive;

/// A file to put into a guest, where it is executable. Its text form is `FILE`, which goes into
/// `/root` under its own name, or `FILE=PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Put {
    /// Where it is on the host.
    pub source: PathBuf,
    /// Where it will be, without the leading `/`.
    pub target: String,
}

impl Put {
    /// The contents of the file.
    ///
    /// # Errors
    /// The file cannot be read, or it is a program that cannot run in a guest: a program for
    /// another processor, or one that is linked dynamically.
    pub fn read(&self) -> Result<Vec<u8>> {
        let path = &self.source;
        ensure!(!self.target.is_empty(), "--put {}: this names no file", path.display());
        let bytes = fs::read(path)
            .with_context(|| format!("--put {}: it cannot be read", path.display()))?;
        check_program(&bytes).with_context(|| format!("--put {}", path.display()))?;
        Ok(bytes)
    }

    /// Adds the file to a guest's root file system.
    ///
    /// # Errors
    /// Those of [`read`](Self::read).
    pub fn add_to(&self, archive: &mut Archive) -> Result<()> {
        archive.file(&self.target, 0o755, &self.read()?)
    }
}

impl FromStr for Put {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (source, target) = match text.split_once('=') {
            Some((source, target)) => (source, target.trim_start_matches('/').to_owned()),
            None => {
                let name = Path::new(text).file_name().unwrap_or_default().to_string_lossy();
                (text, if name.is_empty() { String::new() } else { format!("root/{name}") })
            }
        };
        Ok(Self { source: source.into(), target })
    }
}

/// How to link a program so that a guest can run it.
const STATIC: &str = "a guest has no libraries of this system, so link the program statically:\n  \
    RUSTFLAGS='-C target-feature=+crt-static' cargo build --release \
    --target x86_64-unknown-linux-gnu\n  \
    gcc -static ...";

/// The type of a program header that names a dynamic loader.
const PT_INTERP: u32 = 3;
/// The machine of an ELF file for x86-64.
const EM_X86_64: u16 = 62;

/// Checks that a guest can run this file. An ELF file must be for x86-64 and must name no dynamic
/// loader. Any other file (a script, data) passes.
fn check_program(bytes: &[u8]) -> Result<()> {
    if !bytes.starts_with(b"\x7fELF") {
        return Ok(());
    }
    let half = |at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    // The ELF header holds the class (64 bits) and the byte order (little), the machine, and the
    // offset, size and number of the program headers.
    ensure!(
        bytes.get(4..6) == Some(&[2, 1]) && half(18) == Some(EM_X86_64),
        "it is a program for another processor; the guests are x86-64 machines"
    );
    let headers = || Some((usize::try_from(long(32)?).ok()?, half(54)?, half(56)?));
    let (begin, size, count) = headers().context("it is cut off in its ELF header")?;
    for n in 0..usize::from(count) {
        let at = begin.saturating_add(n * usize::from(size));
        if word(at) == Some(PT_INTERP) {
            let range = || Some((usize::try_from(long(at + 8)?).ok()?, long(at + 32)?));
            let loader = range().and_then(|(from, length)| {
                bytes.get(from..from.checked_add(usize::try_from(length).ok()?)?)
            });
            let loader = String::from_utf8_lossy(loader.unwrap_or_default()).into_owned();
            bail!("it is linked dynamically (by {}), and {STATIC}", loader.trim_end_matches('\0'));
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn a_path_goes_to_root_or_where_it_is_told() {
        let put = |text: &str| text.parse::<Put>().unwrap();
        assert_eq!(put("a/prog"), Put { source: "a/prog".into(), target: "root/prog".into() });
        assert_eq!(put("a=/etc/b"), Put { source: "a".into(), target: "etc/b".into() });
        assert!(put("/").read().unwrap_err().to_string().contains("names no file"));
        assert!(put("/nonexistent").read().unwrap_err().to_string().contains("--put /nonexistent"));
    }

    #[test]
    fn a_script_is_taken_and_a_dynamic_or_foreign_program_refused() {
        check_program(b"#!/bin/sh\n").unwrap();
        // This test is a program itself, and cargo links it dynamically.
        let own = fs::read(std::env::current_exe().unwrap()).unwrap();
        let said = check_program(&own).unwrap_err().to_string();
        assert!(
            said.contains("linked dynamically (by /lib") && said.contains("crt-static"),
            "{said}"
        );
        let mut foreign = own[..64].to_vec();
        foreign[18] = 183;
        assert!(check_program(&foreign).unwrap_err().to_string().contains("another processor"));
        // Without its program headers it has no loader: as good as static. No length panics.
        for length in 0..64 {
            let _ = check_program(&own[..length]);
        }
        check_program(&own[..64]).unwrap();
    }
}
