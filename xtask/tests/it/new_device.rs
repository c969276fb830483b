// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask new-device`, as an author has it. The scenario `vm::new_device` builds the crate
//! and runs its tests, also in a real guest.

use std::path::Path;
use std::process::{Command, Output};

fn new_device(name: &str, path: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["new-device", name, "--path"])
        .arg(path)
        .output()
        .unwrap()
}

#[test]
fn a_new_crate_has_its_own_names_and_its_folder_is_not_taken_twice() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("first-block");
    let output = new_device("first-block", &path);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(path.join("src/device.rs")).unwrap();
    assert!(text.contains("FirstBlockClass") && !text.contains("MyDevice"), "{text}");
    let text = std::fs::read_to_string(path.join("Cargo.toml")).unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    assert!(text.contains(root.to_str().unwrap()) && text.contains("[workspace]"), "{text}");
    assert!(path.join("src/bin/first-block-guest.rs").exists());
    assert!(path.join(".cargo/config.toml").exists());

    let output = new_device("first-block", &path);
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && err.contains("give another --path"), "{err}");
}
