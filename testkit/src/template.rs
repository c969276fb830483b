// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Makes a crate for a new device class from the folder `templates/device`. That folder is a crate
//! of the workspace: it compiles, and its tests pass.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::workspace;

/// The name of the template's crate, in the three forms that its files have.
const FORMS: [&str; 3] = ["my-device", "my_device", "MyDevice"];
/// How the template's files name the root of the workspace.
const ROOT: &str = "../..";
/// The most bytes of a class's name.
const NAME_MAX: usize = 16;
/// The classes of vbus itself.
const TAKEN: [&str; 6] = ["venet", "virtio-net", "uplink", "state", "sched", "pic"];
/// Words that cannot be the name of a crate.
const WORDS: [&str; 12] = [
    "test", "core", "std", "alloc", "self", "super", "crate", "static", "loop", "match", "move",
    "type",
];

/// Checks the name of a new device class.
///
/// # Errors
/// The name does not fit a crate or a class. The text says which names fit.
pub fn check_name(name: &str) -> Result<()> {
    let fits = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.ends_with('-')
        && !name.contains("--")
        && name.len() <= NAME_MAX;
    ensure!(
        fits,
        "{name:?} is no name for a device: use at most {NAME_MAX} lower-case letters, digits and \
         single hyphens, beginning with a letter, such as \"block\" or \"my-block\""
    );
    ensure!(!TAKEN.contains(&name), "{name:?} is a class of vbus itself; use another name");
    ensure!(!WORDS.contains(&name), "{name:?} is a word of Rust; use another name");
    Ok(())
}

/// Makes the crate `name` in the folder `path`, which must be missing or empty. Returns the files
/// that it made.
///
/// # Errors
/// The name does not fit, the folder is not empty, or a file cannot be written.
pub fn new_device(name: &str, path: &Path) -> Result<Vec<PathBuf>> {
    check_name(name)?;
    let is_free = match fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    };
    ensure!(is_free, "{} is there already and not empty; give another --path", path.display());
    let root = workspace::root().to_str().context("the path of the workspace is not UTF-8")?;
    ensure!(
        !root.contains(['"', '\\']),
        "the path of the workspace, {root}, cannot be written in TOML; move it elsewhere"
    );
    let camel: String =
        name.split('-').map(|part| part[..1].to_ascii_uppercase() + &part[1..]).collect();
    let names = [name.to_owned(), name.replace('-', "_"), camel];
    let filled = |text: &str| {
        let named = FORMS
            .iter()
            .zip(&names)
            .fold(text.to_owned(), |text, (from, to)| text.replace(from, to));
        named.replace(ROOT, root)
    };

    let template = workspace::root().join("templates/device");
    let mut made = Vec::new();
    for file in files(&template)? {
        let text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let relative = file.strip_prefix(&template)?;
        let relative = filled(relative.to_str().context("a name that is not UTF-8")?);
        let mut text = filled(&text);
        if relative == "Cargo.toml" {
            // A program without most of its debug information fits into a guest better. With the
            // table `workspace` cargo looks for no workspace in the folders above.
            text.push_str("\n[profile.dev]\ndebug = \"line-tables-only\"\n\n[workspace]\n");
        }
        write(&path.join(&relative), &text)?;
        made.push(path.join(relative));
    }
    // The new crate uses the versions that were tested here, and cargo need not fetch others.
    let lock = fs::read_to_string(workspace::root().join("Cargo.lock"))?;
    write(&path.join("Cargo.lock"), &lock)?;
    write(&path.join(".gitignore"), "target/\n")?;
    Ok(made)
}

fn write(file: &Path, text: &str) -> Result<()> {
    let Some(folder) = file.parent() else { bail!("{} has no folder", file.display()) };
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// The files below a folder, in order.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = fs::read_dir(folder).with_context(|| format!("no {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_crates_and_classes() {
        for good in ["block", "my-block", "a", "x9", "sixteen-letters1"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        let long = "x".repeat(17);
        for bad in ["", "Block", "9x", "-x", "x-", "a--b", "a_b", "venet", "static", "a/b", &long] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
