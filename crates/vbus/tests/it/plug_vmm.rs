// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus device add|remove --vmm` against a simulated vbus-vmm. The tests with KVM use a real one.
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};

use crate::support::{Done, Served, wait_until};
use serde_json::{Value, json};

const CONFIG: &str = "[[device]]\nname = \"net0\"\nclass = \"venet\"\nbackend = \"switch\"\n";

/// A simulated vbus-vmm with some devices.
struct Vmm {
    socket: PathBuf,
    seen: Receiver<Value>,
    _dir: tempfile::TempDir,
}

/// The answers to a request, as lines. `None` means that the connection ends.
type Answer = fn(&Value) -> Option<Vec<Value>>;

impl Vmm {
    /// Starts one with the devices `have`.
    fn start(have: Vec<Value>, answer: Answer) -> Vmm {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vmm");
        let listener = UnixListener::bind(&socket).unwrap();
        let (sender, seen) = channel();
        std::thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                let _ = serve(&client, &have, answer, &mut |request| drop(sender.send(request)));
            }
        });
        Vmm { socket, seen, _dir: dir }
    }

    /// Starts one that has this bus's net0 under another name.
    fn with_net0(bus: &Served, answer: Answer) -> Vmm {
        let device = |name: &str, file: &str| json!({ "name": name, "socket": bus.dir.join(file) });
        Vmm::start(vec![device("other", "net9.sock"), device("nic", "net0.sock")], answer)
    }

    /// The requests so far, without queries.
    fn requests(&self) -> Vec<Value> {
        self.seen.try_iter().filter(|request| request["op"] != "devices").collect()
    }

    fn run(&self, bus: &Served, args: &[&str]) -> Done {
        bus.run(&[args, &["--vmm", self.socket.to_str().unwrap()]].concat())
    }

    fn add(&self, bus: &Served) -> Done {
        self.run(bus, &["device", "add", "net1", "--class", "venet", "--set", "backend=null"])
    }
}

fn serve(
    mut client: &UnixStream,
    have: &[Value],
    answer: Answer,
    seen: &mut dyn FnMut(Value),
) -> std::io::Result<()> {
    for line in BufReader::new(client).lines() {
        let request: Value = serde_json::from_str(&line?)?;
        seen(request.clone());
        let lines = if request["op"] == "devices" {
            let items = have.iter().map(|device| json!({ "item": device }));
            Some(items.chain([json!({ "ok": null })]).collect())
        } else {
            answer(&request)
        };
        let Some(lines) = lines else { return Ok(()) };
        for line in lines {
            writeln!(client, "{line}")?;
        }
    }
    Ok(())
}

fn fine(_: &Value) -> Option<Vec<Value>> {
    Some(vec![json!({ "ok": null })])
}

#[test]
fn a_device_is_plugged_once_it_is_on_the_bus() {
    let bus = Served::start(CONFIG);
    let vmm = Vmm::start(vec![], |request| {
        let path = PathBuf::from(request["socket"].as_str().unwrap());
        assert!(path.is_absolute() && path.exists(), "the bus comes first");
        fine(request)
    });
    let done = vmm.add(&bus);
    assert_eq!(
        (done.code, done.out.as_str()),
        (Some(0), "added net1 in vbus-vmm\n"),
        "{}",
        done.err
    );
    assert_eq!(
        vmm.requests(),
        [json!({ "op": "plug", "name": "net1", "socket": bus.dir.join("net1.sock") })]
    );
    assert_eq!(bus.devices(), ["net0", "net1"]);
}

#[test]
fn a_device_that_cannot_be_plugged_is_removed_from_the_bus_again() {
    let bus = Served::start(CONFIG);
    let fails = |done: Done, text: &str| {
        assert!(done.code == Some(1) && done.err.contains(text), "{text}: {}", done.err);
        assert_eq!(bus.devices(), ["net0"], "{text}");
    };
    let full = Vmm::start(vec![], |_| Some(vec![json!({ "error": "all 4 slots are taken" })]));
    let done = full.add(&bus);
    assert!(done.err.contains("from the bus again"), "{}", done.err);
    fails(done, "all 4 slots are taken");
    // One ends during the request, one sends a wrong answer, and one never answers.
    fails(Vmm::start(vec![], |_| None).add(&bus), "vbus-vmm has gone");
    fails(
        Vmm::start(vec![], |_| Some(vec![json!("hello")])).add(&bus),
        "something that is no answer",
    );
    let silent = Vmm::start(vec![], |_| Some(vec![]));
    fails(
        silent.run(
            &bus,
            &[
                "device",
                "add",
                "net1",
                "--class",
                "venet",
                "--set",
                "backend=null",
                "--timeout",
                "1",
            ],
        ),
        "does not answer",
    );
    // The bus gets no request.
    let taken = Vmm::start(vec![json!({ "name": "net1", "socket": "/elsewhere" })], fine);
    fails(taken.add(&bus), "has a device \"net1\" already");
    fails(
        bus.run(&["device", "add", "net1", "--class", "venet", "--vmm", "/nonexistent"]),
        "cannot reach vbus-vmm",
    );
    let both =
        bus.run(&["device", "add", "net1", "--class", "venet", "--vmm", "/a", "--qmp", "/b"]);
    assert!(both.code == Some(2) && both.err.contains("cannot be used with"), "{}", both.err);
}

#[test]
fn a_device_leaves_the_bus_once_the_guest_has_released_it() {
    let bus = Served::start(CONFIG);
    let keeps = Vmm::with_net0(&bus, |_| {
        Some(vec![json!({ "error": "the guest did not let nic go within 30s" })])
    });
    let done = keeps.run(&bus, &["device", "remove", "net0"]);
    assert!(done.code == Some(1) && done.err.contains("stays on the bus"), "{}", done.err);
    assert!(done.err.contains("did not let nic go"), "{}", done.err);
    let silent = Vmm::with_net0(&bus, |_| Some(vec![]));
    let done = silent.run(&bus, &["device", "remove", "net0", "--timeout", "1"]);
    assert!(
        done.code == Some(1) && done.err.contains("did not release it within 1 s"),
        "{}",
        done.err
    );
    let without = Vmm::start(vec![], fine);
    let done = without.run(&bus, &["device", "remove", "net0"]);
    assert!(done.code == Some(1) && done.err.contains("has no device of"), "{}", done.err);
    assert_eq!(bus.devices(), ["net0"]);

    let vmm = Vmm::with_net0(&bus, fine);
    let done = vmm.run(&bus, &["device", "remove", "net0"]);
    assert_eq!((done.code, done.out.as_str()), (Some(0), "removed net0\n"), "{}", done.err);
    assert_eq!(vmm.requests(), [json!({ "op": "unplug", "name": "nic" })]);
    wait_until("the device to leave", || bus.devices().is_empty());
    let done = vmm.run(&bus, &["device", "remove", "net0"]);
    assert!(
        done.code == Some(1) && vmm.requests().is_empty(),
        "nothing is unplugged that is not on the bus"
    );
}
