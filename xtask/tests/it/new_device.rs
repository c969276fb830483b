// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask new-device`, as an author has it. In a real guest it is tried by `vm::new_device`.

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
fn a_new_crate_builds_outside_of_the_workspace_and_passes_its_tests() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("first-block");
    let output = new_device("first-block", &path);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(path.join("src/device.rs")).unwrap();
    assert!(text.contains("FirstBlockClass") && !text.contains("MyDevice"), "{text}");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let output = Command::new(env!("CARGO"))
        .args(["test", "--offline"])
        .current_dir(&path)
        .env("CARGO_TARGET_DIR", root.join("target/new-device"))
        .env_remove("RUSTFLAGS")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("a_process_drives_the_device ... ok"), "{said}");

    let output = new_device("first-block", &path);
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && err.contains("give another --path"), "{err}");
}
