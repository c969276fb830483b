// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask man`: every program has its pages and its completions.

use std::process::Command;

#[test]
fn every_program_has_man_pages_and_completions() {
    let folder = tempfile::tempdir().unwrap();
    let status = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["man", "--out"])
        .arg(folder.path())
        .status()
        .unwrap();
    assert!(status.success());
    let read = |name: &str| {
        std::fs::read_to_string(folder.path().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    };
    for program in ["vbus", "vbus-guest", "vbus-vmm"] {
        let page = read(&format!("man/{program}.1"));
        assert!(page.contains(".SH NAME") && page.contains(".SH OPTIONS"), "{page}");
        assert!(read(&format!("completions/bash/{program}.bash")).contains(program));
        assert!(read(&format!("completions/zsh/_{program}")).contains(program));
        assert!(read(&format!("completions/fish/{program}.fish")).contains(program));
    }
    assert!(read("man/vbus-device-add.1").contains("KEY=VALUE"));
    assert!(read("man/vbus-serve.1").contains("NOTIFY_SOCKET"));
    assert!(read("man/vbus-guest-net.1").contains("queue"));
    // What only the program itself runs has no page.
    assert!(!folder.path().join("man/vbus-guardian.1").exists());
}
