// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A test in a process that has mounts of its own.

use std::process::Command;

/// The test prints this, and why, if it may not mount.
pub const NO_MOUNT: &str = "no mount: ";

/// Runs the test `name` of this test program, which is an ignored one, in a process that has mounts
/// of its own, and is root in there. They go with the process. Prints why if the machine lets
/// nobody mount.
///
/// # Panics
/// If the test fails, or there is no test of this name.
pub fn run_with_own_mounts(name: &str) {
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--map-root-user"]).arg(program);
    let Ok(output) = command.args(["--ignored", "--exact", name, "--nocapture"]).output() else {
        eprintln!("skipped: there is no unshare");
        return;
    };
    let (told, text) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if text.contains("unshare:") || text.contains(NO_MOUNT) {
        eprintln!("skipped: this machine lets nobody mount: {text}");
        return;
    }
    assert!(output.status.success(), "{:?} {text}", output.status);
    // Without such a test the program succeeds too.
    assert!(told.contains(" 1 passed"), "{name}: {told}");
}
