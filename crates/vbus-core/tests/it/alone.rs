// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tests that need a process of their own.

/// Runs the test `name` of this program again in a process of its own, and checks that it passed.
/// `test` runs there.
///
/// The model checker takes over the signal SIGBUS of its process, for the stacks of its threads.
/// Tests of memory that peers take away cause that signal, and need the handler of `vbus_mapping`.
pub fn alone(name: &str, test: impl FnOnce()) {
    const ALONE: &str = "VBUS_CORE_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return test();
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{errors}");
}
