// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A part of the kit: a folder of its own, which is either complete or not there.
//!
//! A part is fetched into a folder beside its final one, which gets its name only when it is
//! complete. So a later run never takes the rest of an interrupted download for a part of the kit.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What a part holds: the contents of its file `stamp.json`.
#[derive(Serialize, Deserialize)]
struct Stamp<T> {
    /// The edition of the code that has fetched it.
    edition: u32,
    /// What this kind of part tells about itself.
    #[serde(flatten)]
    contents: T,
}

/// Opens the part in `dir`, and fetches it first if it is not there or is of another edition.
///
/// `fetch` gets an empty folder, leaves the part's files in `root` there, and returns what the part
/// tells about itself. Returns the folder of the files, what the part tells, and whether it was
/// fetched just now.
///
/// # Errors
/// Those of `fetch`, and of the file system.
pub fn open<T: Serialize + DeserializeOwned>(
    dir: &Path,
    edition: u32,
    fetch: impl FnOnce(&Path) -> Result<T>,
) -> Result<(PathBuf, T, bool)> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    // If two runs start at once, the second waits and then finds what the first has fetched.
    let lock = File::create(dir.join("lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
    let root = dir.join("root");
    if let Some(contents) = read(&root, edition) {
        return Ok((root, contents, false));
    }
    let fresh = dir.join("unfinished");
    remove(&fresh)?;
    fs::create_dir_all(&fresh)?;
    let contents = fetch(&fresh)?;
    let stamp = Stamp { edition, contents };
    fs::write(fresh.join("root/stamp.json"), serde_json::to_vec_pretty(&stamp)?)?;
    remove(&root)?;
    fs::rename(fresh.join("root"), &root)?;
    remove(&fresh)?;
    Ok((root, stamp.contents, true))
}

/// What the complete part in `root` tells about itself.
fn read<T: DeserializeOwned>(root: &Path, edition: u32) -> Option<T> {
    let stamp: Stamp<T> = serde_json::from_slice(&fs::read(root.join("stamp.json")).ok()?).ok()?;
    (stamp.edition == edition).then_some(stamp.contents)
}

/// Removes a folder that may not be there.
pub fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// All files below `dirs`, sorted, whose name passes `wanted`.
///
/// # Errors
/// A folder cannot be read.
pub fn files(dirs: &[PathBuf], wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let mut left = dirs.to_vec();
    let mut files = Vec::new();
    while let Some(dir) = left.pop() {
        let entries = fs::read_dir(&dir).with_context(|| format!("no folder {}", dir.display()))?;
        for entry in entries {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                left.push(entry.path());
            } else if kind.is_file() && wanted(&entry.file_name().to_string_lossy()) {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use anyhow::bail;

    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Contents {
        word: String,
    }

    fn write(dir: &Path, word: &str) -> Result<Contents> {
        fs::create_dir_all(dir.join("root"))?;
        fs::write(dir.join("root").join(word), word)?;
        Ok(Contents { word: word.into() })
    }

    #[test]
    fn a_part_is_fetched_once_and_again_only_for_another_edition() {
        let dir = std::env::temp_dir().join(format!("vbus-part-{}", std::process::id()));
        // An interrupted download is no part.
        let failed = open::<Contents>(&dir, 1, |fresh| {
            write(fresh, "half")?;
            bail!("interrupted")
        });
        assert!(failed.is_err());
        let (root, first, fetched) = open(&dir, 1, |fresh| write(fresh, "first")).unwrap();
        assert!(fetched && first.word == "first" && !root.join("half").exists());
        let (root, same, fetched) = open(&dir, 1, |fresh| write(fresh, "second")).unwrap();
        assert!(!fetched && same.word == "first" && root.join("first").exists());
        let (root, next, fetched) = open(&dir, 2, |fresh| write(fresh, "third")).unwrap();
        assert!(fetched && next.word == "third" && !root.join("first").exists());
        remove(&dir).unwrap();
    }
}
