// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus snapshot` against a simulated QEMU. The scenario `vm::snapshot_qmp` uses a real one.
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::plug::{Answer, Qemu, event, failed, fine};
use crate::support::{vbus, wait_until};

/// What a machine that runs answers to questions. It has a disk with one snapshot of the command,
/// and one that somebody has saved with the devices left in.
fn question(name: &str, arguments: &Value) -> Option<Vec<Value>> {
    let value = match (name, arguments["property"].as_str()) {
        ("query-status", _) => json!({ "status": "running", "running": true }),
        ("query-named-block-nodes", _) => json!([
            { "node-name": "iso", "drv": "raw", "ro": true, "image": {} },
            { "node-name": "disk", "drv": "qcow2", "ro": false,
              "image": { "snapshots": [{ "name": "vbus-first" }, { "name": "left-in" }] } },
        ]),
        ("qom-get", Some("parent_bus")) => json!("/machine/peripheral/p1/p1"),
        ("qom-get", Some("addr")) => json!("8"),
        ("qom-get", Some("x-msg-timeout")) => json!(60_000),
        ("qom-get", Some("bootindex")) => json!(-1),
        ("qom-get", Some("acpi-index")) => json!(0),
        ("qom-get", _) => return failed("Property not found"),
        _ => return None,
    };
    Some(vec![json!({ "return": value })])
}

/// The device in the simulated QEMU, as it is plugged in again.
fn device() -> Value {
    json!({
        "driver": "vfio-user-pci", "id": "vbus-net0", "bus": "p1", "addr": "1.0",
        "socket": { "type": "unix", "path": "/run/net0.sock" }, "x-msg-timeout": 60_000,
    })
}

/// The commands that change something, in order: their names, and the line of the monitor.
fn changes(qemu: &Qemu) -> Vec<String> {
    let commands = qemu.commands().into_iter();
    let line = |command: Value| {
        let name = command["execute"].as_str().unwrap().to_owned();
        match name.as_str() {
            "human-monitor-command" => {
                command["arguments"]["command-line"].as_str().unwrap().into()
            }
            "device_add" => {
                assert_eq!(command["arguments"], device());
                name
            }
            _ => name,
        }
    };
    commands.map(line).filter(|line| !line.starts_with("query-")).collect()
}

fn snapshot(qemu: &Qemu, more: &[&str]) -> (Option<i32>, String, String) {
    let output = vbus().args(["snapshot", "--qmp", qemu.path()]).args(more).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// A guest that releases its device, and a QEMU that saves and restores.
const GOOD: Answer = |name, arguments| match name {
    "device_del" => Some([fine().unwrap(), vec![event("DEVICE_DELETED", "vbus-net0")]].concat()),
    "human-monitor-command" => Some(vec![json!({ "return": "" })]),
    "device_add" => fine(),
    _ => question(name, arguments),
};

#[test]
fn devices_are_unplugged_before_and_plugged_in_after() {
    let qemu = Qemu::start(GOOD);
    let (code, out, err) = snapshot(&qemu, &["second", "--json"]);
    assert_eq!(code, Some(0), "{err}");
    let said: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&said["name"], &said["action"]), (&json!("second"), &json!("saved")));
    assert_eq!(said["devices"], json!(["vbus-net0"]));
    assert!(said["absent_ms"].is_u64(), "{said}");
    assert_eq!(changes(&qemu), ["device_del", "savevm vbus-second", "device_add"]);
    let (code, out, err) = snapshot(&qemu, &["first", "--load"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.starts_with("restored first, without vbus-net0 for "), "{out}");
    assert_eq!(changes(&qemu), ["device_del", "loadvm vbus-first", "device_add"]);
    assert_eq!(snapshot(&qemu, &["first", "--replace"]).0, Some(0));
    assert_eq!(changes(&qemu), ["device_del", "savevm vbus-first", "device_add"]);
}

#[test]
fn what_cannot_work_is_refused_before_a_device_is_unplugged() {
    let qemu = Qemu::start(GOOD);
    for (words, why) in [
        (&["first"][..], "--replace saves in its place"),
        (&["second", "--load"], "no snapshot \"second\"; there are first"),
        (&["left-in", "--load"], "restore it by QEMU's loadvm, with the devices that it had"),
    ] {
        let (code, _, err) = snapshot(&qemu, words);
        assert!(code == Some(1) && err.contains(why), "{words:?}: {err}");
    }
    assert_eq!(snapshot(&qemu, &["1"]).0, Some(2));
    assert_eq!(changes(&qemu), [""; 0]);
    let paused = Qemu::start(|name, arguments| match name {
        "query-status" => Some(vec![json!({ "return": { "status": "paused", "running": false } })]),
        _ => GOOD(name, arguments),
    });
    let (code, _, err) = snapshot(&paused, &["second"]);
    assert!(code == Some(1) && err.contains("does not run (paused)"), "{err}");
    let without = Qemu::start(|name, arguments| match name {
        "query-named-block-nodes" => Some(vec![json!({ "return": [] })]),
        _ => GOOD(name, arguments),
    });
    let (code, _, err) = snapshot(&without, &["second"]);
    assert!(code == Some(1) && err.contains("qcow2"), "{err}");
    assert_eq!((changes(&paused), changes(&without)), (vec![], vec![]));
}

#[test]
fn devices_come_back_if_qemu_does_not_save() {
    let qemu = Qemu::start(|name, arguments| match name {
        "human-monitor-command" => Some(vec![json!({ "return": "Error: disk full\r\n" })]),
        _ => GOOD(name, arguments),
    });
    let (code, _, err) = snapshot(&qemu, &["second"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("plugged in as before") && err.contains("disk full"), "{err}");
    assert_eq!(changes(&qemu), ["device_del", "savevm vbus-second", "device_add"]);
}

#[test]
fn a_guest_that_does_not_release_is_named_with_what_to_do() {
    let refuses = Qemu::start(|name, arguments| match name {
        "device_del" => {
            let no = event("DEVICE_UNPLUG_GUEST_ERROR", "vbus-net0");
            Some([fine().unwrap(), vec![no]].concat())
        }
        _ => GOOD(name, arguments),
    });
    let (code, _, err) = snapshot(&refuses, &["second"]);
    assert!(code == Some(1) && err.contains("refuses to release"), "{err}");
    assert_eq!(changes(&refuses), ["device_del"], "it is still there");
    let silent = Qemu::start(|name, arguments| match name {
        "device_del" => fine(),
        _ => GOOD(name, arguments),
    });
    let (code, _, err) = snapshot(&silent, &["second", "--timeout", "1"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("not released \"vbus-net0\" in time") && err.contains("--timeout"));
    let command = json!({ "execute": "device_add", "arguments": device() }).to_string();
    assert!(err.contains(&command), "{err}");
    assert_eq!(changes(&silent), ["device_del"]);
    // QEMU is busy, and may unplug the device later.
    let busy = Qemu::start(|name, arguments| match name {
        "device_del" => Some(Vec::new()),
        _ => GOOD(name, arguments),
    });
    let (code, _, err) = snapshot(&busy, &["second", "--timeout", "1"]);
    assert!(code == Some(1) && err.contains(&command) && !err.contains("as before"), "{err}");
}

#[test]
fn a_device_that_cannot_come_back_is_named_with_the_command_for_it() {
    let qemu = Qemu::start(|name, arguments| match name {
        "device_add" => failed("Failed to connect to socket"),
        _ => GOOD(name, arguments),
    });
    let (code, _, err) = snapshot(&qemu, &["second"]);
    let command = json!({ "execute": "device_add", "arguments": device() }).to_string();
    assert!(
        code == Some(1) && err.contains("saved second, but") && err.contains(&command),
        "{err}"
    );
}

#[test]
fn a_command_that_is_interrupted_waits_for_the_guest_and_puts_the_device_back() {
    // QEMU answers, and the guest releases the device, when the test has removed the marker.
    let qemu = Qemu::start(|name, arguments| match name {
        "device_del" => {
            let marker = std::env::temp_dir().join(format!("vbus-{}", std::process::id()));
            std::fs::write(&marker, "").unwrap();
            while marker.exists() {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            GOOD(name, arguments)
        }
        _ => GOOD(name, arguments),
    });
    let marker = std::env::temp_dir().join(format!("vbus-{}", std::process::id()));
    let child = vbus()
        .args(["snapshot", "--qmp", qemu.path(), "second"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("QEMU is asked to unplug", || marker.exists());
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    std::fs::remove_file(&marker).unwrap();
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("interrupted") && err.contains("plugged in as before"), "{err}");
    assert_eq!(changes(&qemu), ["device_del", "device_add"]);
}
