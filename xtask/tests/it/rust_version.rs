// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The sources use nothing of the language that is newer than the workspace's `rust-version`. A
//! newer compiler takes it silently, and Clippy's `incompatible_msrv` knows the library alone. This
//! knows what has been met, and finds it only where it stands on one line.

use std::process::Command;

/// A line that begins with the first text, if it is not empty, and has the second one; and since
/// which Rust it is allowed.
const NEWER: [(&str, &str, &str); 3] =
    [("let ", " = format_args!(", "1.89"), ("", "&& let ", "1.88"), ("", "|| let ", "1.88")];

/// What of this line is too new.
fn newer(line: &str) -> Option<&'static str> {
    let line = line.trim_start();
    let code = line.split("//").next().unwrap_or_default();
    let is =
        |(begins, has, _): &&(&str, &str, &str)| code.starts_with(begins) && code.contains(has);
    NEWER.iter().find(is).map(|(.., since)| *since)
}

#[test]
fn what_is_newer_is_found() {
    assert_eq!(newer("    let text = format_args!(\"{n}\");"), Some("1.89"));
    assert_eq!(newer("if let Some(n) = a && let Some(m) = b {"), Some("1.88"));
    assert_eq!(newer("info!(text = format_args!(\"{n}\")); // a && let b"), None);
}

#[test]
fn the_sources_need_no_newer_rust() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let manifest = std::fs::read_to_string(root.join("Cargo.toml")).unwrap();
    assert!(manifest.contains("rust-version = \"1.85\""), "the list of this test is for Rust 1.85");
    let listed = Command::new("git").args(["ls-files", "*.rs"]).current_dir(root).output().unwrap();
    let mut found = Vec::new();
    let mut lines = 0;
    for path in String::from_utf8(listed.stdout).unwrap().lines() {
        // A file may be gone that is still in the index.
        let Ok(text) = std::fs::read_to_string(root.join(path)) else { continue };
        for (number, line) in (1..).zip(text.lines()) {
            lines += 1;
            // This file has the texts themselves.
            if let Some(since) = newer(line).filter(|_| !path.ends_with("rust_version.rs")) {
                found.push(format!("{path}:{number}: Rust {since}: {}", line.trim()));
            }
        }
    }
    // Sources that came as an archive have no index.
    assert!(listed.status.code() != Some(0) || lines > 1000, "{lines} lines");
    assert!(found.is_empty(), "{}", found.join("\n"));
}
