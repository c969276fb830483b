// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus state` against a bus with a state device.
use std::io::{BufRead, BufReader, Lines};
use std::process::{Child, ChildStdout, Stdio};

use crate::support::{Served, vbus, wait_until};

const CONFIG: &str = r#"
[[device]]
name = "values"
class = "state"
pages = [{ name = "setpoint", bytes = 64, owner = "device" }, { name = "big", bytes = 1048576, owner = "device" },
         { name = "heartbeat", bytes = 8, owner = "driver" }]
"#;

#[test]
fn values_are_set_read_and_listed() {
    let bus = Served::start(CONFIG);
    let list = bus.json(&["state", "list", "values"]);
    assert_eq!(list.as_array().unwrap().len(), 3);
    assert!(bus.good(&["state", "list", "values"]).contains("heartbeat"));
    bus.good(&["state", "set", "values", "setpoint", "42"]);
    assert_eq!(bus.good(&["state", "get", "values", "setpoint"]), "42\n");
    bus.good(&["state", "set", "values", "setpoint", "00 ff", "--hex"]);
    assert!(bus.good(&["state", "get", "values", "setpoint"]).starts_with("00ff00"));
    assert_eq!(bus.json(&["state", "get", "values", "setpoint"])["version"], 2);
    assert!(bus.bad(&["state", "set", "values", "heartbeat", "1"]).contains("heartbeat"));
    assert!(
        bus.bad(&["state", "get", "values", "nope"]).contains("setpoint"),
        "names the pages that there are"
    );
    assert!(bus.bad(&["state", "get", "nope", "x"]).contains("nope"));
    assert!(bus.bad(&["state", "set", "values", "setpoint", &"x".repeat(65)]).contains("64"));
    // The largest page, the largest value.
    let mut child = vbus()
        .args(["state", "set", "values", "big", "-", "--dir"])
        .arg(&bus.dir)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), &vec![b'x'; 1 << 20]).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(bus.good(&["state", "get", "values", "big"]).len(), (1 << 20) + 1);
}

#[test]
fn requests_reach_the_device_unchanged() {
    let bus = Served::start(CONFIG);
    let request = |json: &str| bus.good(&["device", "request", "values", json]);
    assert!(request(r#"{"op":"set","page":"setpoint","text":"42"}"#).contains("version"));
    assert!(
        request(r#"{"op":"get","page":"setpoint"}"#)
            .lines()
            .any(|line| { line.split_whitespace().collect::<Vec<_>>() == ["text", "42"] })
    );
    let answer = bus.json(&["device", "request", "values", r#"{"op":"get","page":"setpoint"}"#]);
    assert_eq!(answer["text"], "42");
    let bad = |name: &str, json: &str| bus.bad(&["device", "request", name, json]);
    assert!(bad("values", "{op: get}").contains("the request is not JSON"));
    assert!(bad("values", r#"{"op":"fly"}"#).contains("values: "));
    assert!(bad("nothing", "{}").contains("nothing"));
    // The program prints each answer as soon as the device gives it.
    let mut watch = vbus()
        .args(["device", "request", "values", r#"{"op":"watch","page":"setpoint"}"#, "--json"])
        .arg("--dir")
        .arg(&bus.dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    for value in ["42", "43", "44"] {
        let answer: serde_json::Value =
            serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(answer["text"], value);
        let next = (value.parse::<u32>().unwrap() + 1).to_string();
        bus.good(&["state", "set", "values", "setpoint", &next]);
    }
    watch.kill().unwrap();
    watch.wait().unwrap();
    let help = vbus().args(["device", "request", "--help"]).output().unwrap();
    assert!(String::from_utf8(help.stdout).unwrap().contains("Device::control"));
}

/// Starts `vbus state watch`, and reads its first line.
fn watch(bus: &Served) -> (Child, Lines<BufReader<ChildStdout>>) {
    let mut watch = vbus()
        .args(["state", "watch", "values", "setpoint", "--dir"])
        .arg(&bus.dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    lines.next().unwrap().unwrap();
    (watch, lines)
}

#[test]
fn a_watch_sees_the_newest_value_and_ends_with_its_client() {
    let bus = Served::start(CONFIG);
    let quiet = bus.status("Threads");
    let (mut watch, mut lines) = watch(&bus);
    for value in ["a", "b", "c"] {
        bus.good(&["state", "set", "values", "setpoint", value]);
        assert_eq!(lines.next().unwrap().unwrap(), value);
    }
    watch.kill().unwrap();
    watch.wait().unwrap();
    wait_until("the watch's thread to end", || bus.status("Threads") <= quiet);
    let counted = bus.good(&["state", "watch", "values", "setpoint", "--count", "1"]);
    assert_eq!(counted, "c\n");
}

#[test]
fn a_watch_ends_when_its_device_goes() {
    let bus = Served::start(CONFIG);
    let (mut watch, mut lines) = watch(&bus);
    bus.good(&["device", "remove", "values"]);
    watch.wait().unwrap();
    assert!(lines.next().is_none());
}

#[test]
fn a_device_of_another_class_has_no_pages() {
    let bus = Served::start("[[device]]\nname = \"net0\"\nclass = \"venet\"\nbackend = \"null\"\n");
    let bad = bus.bad(&["state", "get", "net0", "setpoint"]);
    assert!(bad.contains("net0 is a device of class venet and has no pages"), "{bad}");
}
