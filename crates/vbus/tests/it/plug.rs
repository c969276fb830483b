// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus device add|remove --qmp` against a simulated QEMU. The VM tests use a real one.
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;

use crate::support::{Served, wait_until};
use serde_json::{Value, json};

const CONFIG: &str = "[[device]]\nname = \"net0\"\nclass = \"venet\"\nbackend = \"switch\"\n";

/// A simulated QEMU with two root ports. The first is occupied.
pub struct Qemu {
    socket: PathBuf,
    seen: Receiver<Value>,
    _dir: tempfile::TempDir,
    _thread: JoinHandle<()>,
}

/// The answers of that QEMU to a command, as lines. `None` means that it hangs up.
pub type Answer = fn(&str, &Value) -> Option<Vec<Value>>;

pub fn fine() -> Option<Vec<Value>> {
    Some(vec![json!({ "return": {} })])
}

pub fn failed(text: &str) -> Option<Vec<Value>> {
    Some(vec![json!({ "error": { "class": "GenericError", "desc": text } })])
}

pub fn event(name: &str, device: &str) -> Value {
    let timestamp = json!({ "seconds": 1, "microseconds": 2 });
    json!({ "event": name, "data": { "device": device }, "timestamp": timestamp })
}

impl Qemu {
    pub fn start(answer: Answer) -> Qemu {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let (sender, seen) = channel();
        let thread = std::thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                let _ = serve(&client, answer, &mut |command| drop(sender.send(command)));
            }
        });
        Qemu { socket, seen, _dir: dir, _thread: thread }
    }

    pub fn path(&self) -> &str {
        self.socket.to_str().unwrap()
    }

    /// The commands so far, without queries.
    pub fn commands(&self) -> Vec<Value> {
        let question = |c: &Value| {
            ["qom-list", "qom-get", "qmp_capabilities"].contains(&c["execute"].as_str().unwrap())
        };
        self.seen.try_iter().filter(|c| !question(c)).collect()
    }
}

fn serve(
    mut client: &UnixStream,
    answer: Answer,
    seen: &mut dyn FnMut(Value),
) -> std::io::Result<()> {
    writeln!(client, "{}", json!({ "QMP": { "version": {}, "capabilities": ["oob"] } }))?;
    for line in BufReader::new(client).lines() {
        let command: Value = serde_json::from_str(&line?)?;
        seen(command.clone());
        let (name, arguments) = (command["execute"].as_str().unwrap(), &command["arguments"]);
        let node = |name: &str, kind: &str| json!({ "name": name, "type": kind });
        let port = "child<pcie-root-port>";
        let lines = match (name, arguments["path"].as_str()) {
            ("qmp_capabilities", _) => fine(),
            ("qom-list", Some("/machine/peripheral")) => Some(vec![json!({ "return": [
                node("type", "string"), node("p10", port), node("p2", port), node("p1", port),
                node("vbus-net0", "child<vfio-user-pci>"), node("n", "child<e1000>"),
                node("gone", "child<vfio-user-pci>"),
            ] })]),
            // It has left since it was listed.
            ("qom-list", Some("/machine/peripheral/gone")) => {
                let (class, desc) = ("DeviceNotFound", "Device 'gone' not found");
                Some(vec![json!({ "error": { "class": class, "desc": desc } })])
            }
            ("qom-list", Some("/machine/peripheral/p1/p1")) => {
                let child = node("child[0]", "link<vfio-user-pci>");
                Some(vec![json!({ "return": [node("type", "string"), child] })])
            }
            ("qom-list", Some("/machine/peripheral/vbus-net0")) => {
                let memory =
                    node(r"vfio-user:\x2frun\x2fnet0.sock BAR 0[0]", "child<memory-region>");
                Some(vec![json!({ "return": [node("type", "string"), memory] })])
            }
            ("qom-list", Some(_)) => Some(vec![json!({ "return": [node("type", "string")] })]),
            _ => answer(name, arguments),
        };
        let Some(lines) = lines else { return Ok(()) };
        for line in lines {
            writeln!(client, "{line}")?;
        }
    }
    Ok(())
}

fn add(bus: &Served, qmp: &str) -> crate::support::Done {
    bus.run(&["device", "add", "net1", "--class", "venet", "--set", "backend=null", "--qmp", qmp])
}

#[test]
fn a_device_is_plugged_into_the_first_free_port_once_it_is_on_the_bus() {
    let bus = Served::start(CONFIG);
    let qemu = Qemu::start(|name, arguments| {
        assert_eq!(name, "device_add");
        assert!(
            Path::new(arguments["socket"]["path"].as_str().unwrap()).exists(),
            "the bus comes first"
        );
        fine()
    });
    let done = add(&bus, qemu.path());
    assert_eq!((done.code, done.out.as_str()), (Some(0), "added net1 in p2\n"), "{}", done.err);
    let socket = bus.dir.join("net1.sock");
    assert_eq!(
        qemu.commands(),
        [json!({ "execute": "device_add", "arguments": {
            "driver": "vfio-user-pci", "id": "vbus-net1", "bus": "p2",
            "socket": { "type": "unix", "path": socket }, "x-msg-timeout": 60000,
        } })]
    );
    let taken = |port| {
        let venet = ["device", "add", "net2", "--class", "venet"];
        bus.run(&[&venet[..], &["--qmp", qemu.path(), "--port", port]].concat()).err
    };
    let (occupied, missing) = (taken("p1"), taken("p3"));
    assert!(occupied.contains("\"p1\" is occupied"), "{occupied}");
    assert!(missing.contains("it has: p1, p2, p10"), "{missing}");
    assert_eq!(bus.devices(), ["net0", "net1"]);
}

#[test]
fn a_device_that_cannot_be_plugged_is_removed_from_the_bus_again() {
    let bus = Served::start(CONFIG);
    let qemu = Qemu::start(|_, _| failed("Bus 'p2' does not support hotplugging"));
    let done = add(&bus, qemu.path());
    assert_eq!(done.code, Some(1));
    assert!(
        done.err.contains("does not support hotplugging")
            && done.err.contains("from the bus again"),
        "{}",
        done.err
    );
    assert_eq!(bus.devices(), ["net0"]);
    let done = add(&bus, "/nonexistent/qmp");
    assert!(done.code == Some(1) && done.err.contains("cannot reach QEMU"), "{}", done.err);
    assert_eq!(bus.devices(), ["net0"]);
    // This QEMU ends while it runs a command.
    let qemu = Qemu::start(|_, _| None);
    assert!(add(&bus, qemu.path()).err.contains("QEMU has gone"));
    assert_eq!(bus.devices(), ["net0"]);
}

#[test]
fn a_device_leaves_the_bus_once_the_guest_has_released_it() {
    let bus = Served::start(CONFIG);
    let qemu = Qemu::start(|name, arguments| {
        assert_eq!((name, &arguments["id"]), ("device_del", &json!("vbus-net0")));
        // Events may come before the answer, and other events in between.
        Some(vec![
            event("DEVICE_DELETED", "other"),
            json!({ "return": {} }),
            event("DEVICE_DELETED", "vbus-net0"),
        ])
    });
    let done = bus.run(&["device", "remove", "net0", "--qmp", qemu.path()]);
    assert_eq!(done.code, Some(0), "{}", done.err);
    assert!(bus.devices().is_empty());
    let done = bus.run(&["device", "remove", "net0", "--qmp", qemu.path()]);
    assert!(done.err.contains("net0"));
    assert_eq!(
        qemu.commands().len(),
        1,
        "nothing is unplugged for a device that is not on the bus"
    );
}

/// The simulated QEMU lists a device that has gone when it is asked for its socket.
#[test]
fn a_device_that_vanishes_meanwhile_is_not_the_one_that_is_looked_for() {
    let bus = Served::start(&CONFIG.replace("net0", "net1"));
    let qemu = Qemu::start(|_, _| None);
    let done = bus.run(&["device", "remove", "net1", "--qmp", qemu.path()]);
    assert!(
        done.code == Some(1) && done.err.contains("this QEMU has no device of"),
        "{}",
        done.err
    );
    assert_eq!(bus.devices(), ["net1"]);
}

#[test]
fn a_device_that_the_guest_keeps_stays_on_the_bus() {
    let bus = Served::start(CONFIG);
    let refuse = Qemu::start(|_, _| {
        Some(vec![json!({ "return": {} }), event("DEVICE_UNPLUG_GUEST_ERROR", "vbus-net0")])
    });
    let done = bus.run(&["device", "remove", "net0", "--qmp", refuse.path()]);
    assert!(done.code == Some(1) && done.err.contains("refuses"), "{}", done.err);
    let silent = Qemu::start(|_, _| fine());
    let done = bus.run(&["device", "remove", "net0", "--qmp", silent.path(), "--timeout", "1"]);
    assert!(
        done.code == Some(1) && done.err.contains("did not release it within 1 s"),
        "{}",
        done.err
    );
    assert_eq!(bus.devices(), ["net0"]);
    // QEMU refuses the second request, but the event still comes.
    let again = Qemu::start(|_, _| {
        let mut lines = failed("Device vbus-net0 is already in the process of unplug")?;
        lines.push(event("DEVICE_DELETED", "vbus-net0"));
        Some(lines)
    });
    let done = bus.run(&["device", "remove", "net0", "--qmp", again.path()]);
    assert_eq!(done.code, Some(0), "{}", done.err);
    wait_until("the device to leave", || bus.devices().is_empty());
}
