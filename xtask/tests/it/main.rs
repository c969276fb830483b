// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What `cargo xtask` says about options that cannot work. It says so at once: before it fetches,
//! builds or starts anything. And `cargo xtask new-device`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod layers;
mod new_device;
mod rust_version;

use std::process::Command;

/// Runs `xtask` with arguments that it has to refuse; returns what it says.
fn refusal(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_xtask")).args(args).output().expect("xtask runs");
    assert!(!output.status.success(), "{args:?} must be refused");
    String::from_utf8(output.stderr).expect("text")
}

#[test]
fn a_number_out_of_range_is_refused_with_the_range() {
    for (args, range) in [
        (["demo", "--seconds", "0"], "1..=3600"),
        (["test", "--fuzz-seconds", "0"], "1..=86400"),
        (["kvm", "--limit", "0"], "1..=86400"),
    ] {
        let said = refusal(&args);
        assert!(said.contains(args[1]) && said.contains("'0'") && said.contains(range), "{said}");
    }
}

#[test]
fn a_file_that_is_not_there_is_named_before_anything_is_built() {
    for option in ["--qemu", "--kernel", "--initramfs"] {
        let said = refusal(&["demo", option, "/nonexistent"]);
        assert!(said.contains(&format!("{option} /nonexistent: ")), "{said}");
        assert!(!said.contains("build:") && !said.contains("kit:"), "{said}");
    }
}

#[test]
fn a_qemu_that_is_none_is_refused() {
    let said = refusal(&["demo", "--qemu", "/bin/true"]);
    assert!(said.contains("--qemu /bin/true: ") && said.contains("vfio-user-pci"), "{said}");
}

#[test]
fn kvm_is_asked_for_where_there_is_none() {
    let Some(why) = testkit::lab::kvm_is_missing() else {
        eprintln!("skipped: this machine has a /dev/kvm that opens");
        return;
    };
    let said = refusal(&["demo", "--accel", "kvm"]);
    assert!(said.contains(&why) && said.contains("--accel tcg"), "{said}");
    assert!(!said.contains("build:") && !said.contains("kit:"), "{said}");
}
