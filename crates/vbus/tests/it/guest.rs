// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus-guest` in a plain process, which drives devices over their sockets.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use crate::support::{Served, vbus_guest, wait_until};
use rustix::process::Signal;
use serde_json::json;

const CONFIG: &str = r#"
[[device]]
name = "net-a"
class = "venet"
backend = "switch"

[[device]]
name = "values"
class = "state"
pages = [
    { name = "setpoint", bytes = 16, owner = "device", initial = "20" },
    { name = "load", bytes = 64, owner = "driver" },
    { name = "big", bytes = 1048576, owner = "driver" },
]
"#;

/// A running command that prints lines.
struct Lines {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Lines {
    fn start(bus: &Served, args: &[&str]) -> Lines {
        Lines::of(vbus_guest().args(args).arg("--dir").arg(&bus.dir))
    }

    fn of(command: &mut Command) -> Lines {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Lines { child, lines }
    }

    fn next(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_devices_of_a_bus_are_listed() {
    let bus = Served::start(CONFIG);
    let list = bus.guest().json(&["list"]);
    let names: Vec<_> =
        list.as_array().unwrap().iter().map(|f| [&f["name"], &f["class"], &f["state"]]).collect();
    assert_eq!(names, [["net-a", "venet", "closed"], ["values", "state", "closed"]]);
    assert_eq!((&list[0]["doorbells"], &list[0]["doorbell"]), (&json!(["mmio"]), &json!("mmio")));
    assert!(list[0]["doorbell_ns"]["mmio"].as_u64().unwrap() > 0, "{list}");
    let table = bus.guest().good(&["list"]);
    assert_eq!(table.lines().count(), 3, "{table}");
    assert!(table.starts_with("FUNCTION"), "{table}");
}

/// A virtio card is none of vbus for its driver, and no fault of its bus.
#[test]
fn a_virtio_card_is_listed_and_left_alone() {
    let card = "[[device]]\nname = \"a-card\"\nclass = \"virtio-net\"\nbackend = \"switch\"\n";
    let bus = Served::start(&format!("{card}{CONFIG}"));
    let list = bus.guest().json(&["list"]);
    let ids: Vec<_> = list.as_array().unwrap().iter().map(|f| f["id"].as_str().unwrap()).collect();
    assert!(ids.len() == 3 && ids[0].ends_with("/a-card.sock"), "{list}");
    assert_eq!(
        (&list[0]["error"], &list[1]["error"]),
        (&json!("not a vbus function"), &json!(null))
    );
    assert_eq!(bus.guest().good(&["state", "get", "setpoint"]), "20\n");
}

#[test]
fn to_list_devices_costs_one_in_use_nothing() {
    let bus = Served::start(CONFIG);
    let mut watch = Lines::start(&bus, &["state", "watch", "setpoint"]);
    assert_eq!(watch.next(), "20");
    let seen = || {
        let device = bus.json(&["device", "show", "values"]);
        let log = std::fs::read_to_string(&bus.log).unwrap();
        let lines = log.lines().filter(|line| line.contains("values")).count();
        (device["connector"].clone(), device["counters"].clone(), lines)
    };
    let before = seen();
    for _ in 0..3 {
        let list = bus.guest().json(&["list"]);
        let row = ["name", "class", "state", "error"].map(|key| list[1][key].clone());
        assert_eq!(row, ["values", "state", "open", "in use by another driver"]);
        assert_eq!(list[0]["state"], "closed", "{list}");
    }
    // And silent connections to it.
    let silent = [(); 3].map(|()| UnixStream::connect(bus.dir.join("values.sock")).unwrap());
    assert_eq!(seen(), before);
    drop(silent);
}

#[test]
fn a_socket_elsewhere_of_the_same_name_is_another_device() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("values.sock");
    let other = format!(
        "[[device]]\nname = \"other\"\nclass = \"state\"\nsocket = {{ path = {path:?} }}\n\
         pages = [{{ name = \"p\", bytes = 8, owner = \"device\", initial = \"1\" }}]\n"
    );
    let bus = Served::start(&format!("{CONFIG}{other}"));
    let args = ["state", "watch", "p"];
    let mut watch = Lines::of(vbus_guest().args(args).arg("--socket").arg(&path));
    assert_eq!(watch.next(), "1");
    let list = bus.guest().json(&["list"]);
    let row = ["name", "state", "error"].map(|key| list[1][key].clone());
    assert_eq!(row, [json!("values"), json!("closed"), json!(null)], "{list}");
}

/// Nobody waits for the others' time limits here: there are always some.
#[test]
fn silent_connections_keep_no_driver_out() {
    let bus = Served::start(CONFIG);
    let silent = || UnixStream::connect(bus.dir.join("values.sock")).unwrap();
    let mut crowd: Vec<_> = (0..40).map(|_| silent()).collect();
    for value in 0..20 {
        crowd.push(silent());
        crowd.remove(0);
        bus.guest().good(&["state", "set", "load", &value.to_string()]);
    }
    let connector = bus.json(&["device", "show", "values"])["connector"].clone();
    assert_eq!(connector["violations"], 0, "{connector}");
    assert_eq!(connector["refused"], 0, "{connector}");
}

#[test]
fn on_a_host_the_list_names_the_directory_of_a_bus() {
    if !Path::new("/sys/bus/pci").exists() {
        eprintln!("skipped: this machine has no PCI bus");
        return;
    }
    let bus = Served::start("");
    let place = bus.dir.parent().unwrap().join("vbus");
    let done = vbus_guest().arg("list").env("XDG_RUNTIME_DIR", &bus.dir).output().unwrap();
    let out = String::from_utf8(done.stdout).unwrap();
    assert!(out.contains("on the host of a bus use --dir DIR"), "{out}");
    std::os::unix::fs::symlink(&bus.dir, &place).unwrap();
    let done = vbus_guest().arg("list").env("XDG_RUNTIME_DIR", place.parent().unwrap()).output();
    let out = String::from_utf8(done.unwrap().stdout).unwrap();
    let hint = format!("a bus serves in {0}: `vbus-guest --dir {0} list`", place.display());
    assert!(out.contains(&hint), "{out}");
}

#[test]
fn ring_rings_a_doorbell_as_often_as_asked() {
    let bus = Served::start(CONFIG);
    let rung = bus.guest().json(&["ring", "values", "--count", "5000", "--handle", "0"]);
    assert_eq!(
        [&rung["doorbell"], &rung["count"], &rung["handle"]],
        [&json!("mmio"), &json!(5000), &json!(0)]
    );
    assert!(bus.guest().good(&["ring", "net-a"]).contains("1000 times by mmio"));
    let done = bus.guest().run(&["ring", "values", "--handle", "1024"]);
    assert!(done.code == Some(1) && done.err.contains("doorbells 0 to"), "{}", done.err);
    let done = bus.guest().run(&["ring", "values", "--doorbell", "pio"]);
    assert!(done.code == Some(1) && done.err.contains("no such doorbells"), "{}", done.err);
}

#[test]
fn values_pass_in_both_directions() {
    let bus = Served::start(CONFIG);
    let list = bus.guest().json(&["state", "list"]);
    assert_eq!(list[1], json!({ "name": "load", "owner": "driver", "bytes": 64 }));
    assert_eq!(bus.guest().good(&["state", "get", "setpoint"]), "20\n");
    bus.good(&["state", "set", "values", "setpoint", "42"]);
    assert_eq!(bus.guest().good(&["state", "get", "setpoint"]), "42\n");
    assert_eq!(
        bus.guest().good(&["state", "get", "setpoint", "--hex"]),
        format!("3432{}\n", "00".repeat(14))
    );
    bus.guest().good(&["state", "set", "load", "busy"]);
    assert_eq!(bus.good(&["state", "get", "values", "load"]), "busy\n");
    bus.guest().good(&["state", "set", "load", "--hex", "ff 00"]);
    assert_eq!(bus.good(&["state", "get", "values", "load"]), format!("ff{}\n", "00".repeat(63)));
    let big = "x".repeat(100_000);
    bus.guest().good(&["state", "set", "big", &big]);
    assert_eq!(bus.good(&["state", "get", "values", "big"]).trim_end(), big);
}

#[test]
fn a_watch_follows_the_host() {
    let bus = Served::start(CONFIG);
    let mut watch = Lines::start(&bus, &["state", "watch", "setpoint", "--count", "4"]);
    assert_eq!(watch.next(), "20");
    for value in ["one", "two", "three"] {
        bus.good(&["state", "set", "values", "setpoint", value]);
        assert_eq!(watch.next(), value);
    }
    assert!(watch.child.wait().unwrap().success());
}

/// A process that is stopped and goes on gets EINTR from calls such as `epoll_wait`.
#[test]
fn calls_that_are_interrupted_again_and_again_lose_nothing() {
    let bus = Served::start(CONFIG);
    let mut watch = Lines::start(&bus, &["state", "watch", "setpoint"]);
    assert_eq!(watch.next(), "20");
    let processes = [&bus.child, &watch.child].map(rustix::process::Pid::from_child);
    std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            for value in 0..20 {
                bus.good(&["state", "set", "values", "setpoint", &value.to_string()]);
                assert_eq!(watch.next(), value.to_string());
            }
        });
        while !work.is_finished() {
            for process in processes {
                for signal in [Signal::STOP, Signal::CONT] {
                    rustix::process::kill_process(process, signal).unwrap();
                }
            }
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
    });
    let shown = bus.json(&["device", "show", "values"]);
    assert_eq!(shown["counters"]["opens"], 1, "{shown}");
    assert!(!accuses(&bus, "values"));
}

#[test]
fn one_driver_at_a_time_and_errors_say_what_to_do() {
    let bus = Served::start(CONFIG);
    let mut watch = Lines::start(&bus, &["state", "watch", "setpoint"]);
    assert_eq!(watch.next(), "20");
    let fails = |args: &[&str], text: &str| {
        let done = bus.guest().run(args);
        assert_eq!(done.code, Some(1), "{args:?}");
        assert!(done.err.contains(text), "{args:?}: {}", done.err);
    };
    fails(&["state", "get", "setpoint"], "in use");
    drop(watch);
    fails(&["state", "get", "nothing"], "no page \"nothing\"");
    let log = std::fs::read_to_string(&bus.log).unwrap();
    assert_eq!(log.matches("refused: client").count(), 1, "{log}");
    let socket_fails = |path: &Path, text: &str| {
        let done = vbus_guest().arg("--socket").arg(path).arg("list").output().unwrap();
        let said = String::from_utf8(done.stderr).unwrap();
        assert!(!done.status.success() && said.contains(text), "{said}");
    };
    socket_fails(&bus.dir.join("nonexistent.sock"), "nonexistent.sock: there is no socket");
    socket_fails(&bus.log, "this is no socket");
    fails(&["state", "get", "load"], "the driver itself writes");
    fails(&["state", "set", "setpoint", "1"], "the device writes");
    fails(&["state", "set", "load", &"x".repeat(65)], "has 64 bytes, this one has 65");
    fails(&["state", "set", "load", "--hex", "0"], "odd number");
    fails(&["state", "--device", "other", "list"], "no state device \"other\"");
    assert_eq!(bus.guest().good(&["state", "--device", "values", "get", "setpoint"]), "20\n");
}

#[test]
fn a_watch_goes_on_when_a_bus_that_was_killed_starts_again() {
    let mut bus = Served::start(CONFIG);
    let mut watch = Lines::start(&bus, &["state", "watch", "setpoint", "--count", "4"]);
    assert_eq!(watch.next(), "20");
    bus.good(&["state", "set", "values", "setpoint", "21"]);
    assert_eq!(watch.next(), "21");
    bus.child.kill().unwrap();
    bus.child.wait().unwrap();
    let again = Served::start_in(&bus.dir, CONFIG);
    assert_eq!(watch.next(), "20", "the bus that started again has the initial value");
    again.good(&["state", "set", "values", "setpoint", "22"]);
    assert_eq!(watch.next(), "22");
    assert!(watch.child.wait().unwrap().success());
}

#[test]
fn a_driver_opens_a_device_again_that_has_another_incarnation() {
    let bus = Served::start(CONFIG);
    let mut watch = Lines::start(&bus, &["state", "watch", "setpoint", "--count", "2"]);
    assert_eq!(watch.next(), "20");
    let show = || bus.json(&["device", "show", "values"]);
    let (before, opens) = (show()["incarnation"].clone(), show()["counters"]["opens"].clone());
    let done = bus.json(&["device", "reincarnate", "values"]);
    assert_eq!((&done["name"], &done["incarnation"]), (&json!("values"), &show()["incarnation"]));
    assert_ne!(done["incarnation"], before);
    let opens = opens.as_u64().unwrap() + 1;
    wait_until("the driver has opened it again", || show()["counters"]["opens"] == opens);
    bus.good(&["state", "set", "values", "setpoint", "21"]);
    assert_eq!(watch.next(), "21");
    assert!(watch.child.wait().unwrap().success());
    let both = bus.good(&["device", "reincarnate", "values", "net-a"]);
    assert_eq!(both.lines().count(), 2, "{both}");
    assert!(bus.bad(&["device", "reincarnate", "nothing"]).contains("nothing"));
    assert_eq!(bus.run(&["device", "reincarnate"]).code, Some(2));
}

#[test]
fn ctrl_c_ends_a_driver_that_waits_for_its_bus() {
    let mut bus = Served::start(CONFIG);
    let mut watch = vbus_guest()
        .args(["state", "watch", "setpoint", "--dir"])
        .arg(&bus.dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut value = String::new();
    BufReader::new(watch.stdout.take().unwrap()).read_line(&mut value).unwrap();
    assert_eq!(value, "20\n");
    bus.child.kill().unwrap();
    bus.child.wait().unwrap();
    let mut log = String::new();
    BufReader::new(watch.stderr.take().unwrap()).read_line(&mut log).unwrap();
    assert!(log.contains("the device has gone; opening the device again"), "{log}");
    rustix::process::kill_process(rustix::process::Pid::from_child(&watch), Signal::INT).unwrap();
    assert_eq!(watch.wait().unwrap().signal(), Some(Signal::INT.as_raw()));
}

/// Reads a file of the interface's folder in sysfs; empty if there is none.
fn interface(name: &str, file: &str) -> String {
    std::fs::read_to_string(format!("/sys/class/net/{name}/{file}")).unwrap_or_default()
}

#[test]
fn an_interface_stays_when_a_bus_that_was_killed_starts_again() {
    if !can_make_interfaces() {
        return;
    }
    let name = format!("vb{}", std::process::id());
    stays(&["net", "net-a", "--up", "--name", &name], Some(&name));
    stays(&["net", "--all", "--up"], None);
}

/// Whether this process can make interfaces; says so if it cannot.
fn can_make_interfaces() -> bool {
    let tap = std::fs::File::options().read(true).write(true).open("/dev/net/tun");
    let can = tap.is_ok() && rustix::process::geteuid().is_root();
    if !can {
        eprintln!("skipped: making an interface needs root and /dev/net/tun");
    }
    can
}

#[test]
fn a_driver_that_runs_takes_other_settings() {
    if !can_make_interfaces() {
        return;
    }
    let config = CONFIG.replace("switch\"", "switch\"\nqueue-pairs = 2");
    let mut bus = Served::start(&config);
    let name = format!("vs{}", std::process::id());
    let command = ["net", "net-a", "--name", &name, "--queue-pairs", "2", "--rx-usecs", "30"];
    let mut net = Lines::start(&bus, &command);
    assert!(net.next().starts_with(&name));
    let ask = |args: &[&str]| vbus_guest().args(["net"]).args(args).output().unwrap();
    let show = || {
        let done = ask(&["show", &name, "--json"]);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        serde_json::from_slice::<serde_json::Value>(&done.stdout).unwrap()
    };
    let values = |keys: [&str; 4]| keys.map(|key| show()[key].clone());
    const KEYS: [&str; 4] = ["use-queue-pairs", "rx-offloads", "rx-usecs", "vlan-filter"];
    let all = "{\"CSUM\", \"TSO4\", \"TSO6\", \"ECN\", \"USO\"}";
    let [pairs, offloads, usecs, filter] = values(KEYS);
    assert_eq!([&pairs, &usecs, &filter], [&json!(2), &json!(30), &json!(false)]);
    assert!(offloads == all || offloads.as_str().unwrap().contains("CSUM"), "{offloads}");
    let set = [
        ["--use-queue-pairs", "1"],
        ["--rx-offload", "false"],
        ["--rx-usecs", "0"],
        ["--vlan-filter", "true"],
    ];
    let done = ask(&[&["set", &name][..], set.as_flattened()].concat());
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success() && text.contains("use-queue-pairs"), "{done:?}");
    let expected = [json!(1), json!("{}"), json!(0), json!(true)];
    assert_eq!(values(KEYS), expected);
    // The kernel uses one queue of the interface, and the threads of the driver live.
    let queues = std::fs::read_dir(format!("/sys/class/net/{name}/queues")).unwrap();
    let is_rx = |queue: std::io::Result<std::fs::DirEntry>| {
        queue.unwrap().file_name().to_string_lossy().starts_with("rx-")
    };
    assert_eq!(queues.filter_map(|queue| is_rx(queue).then_some(())).count(), 1);
    let bad = |args: &[&str], text: &str| {
        let done = ask(args);
        let err = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.code() == Some(1) && err.contains(text), "{args:?}: {err}");
    };
    bad(&["set", &name, "--use-queue-pairs", "3"], "1 to 2 were made");
    bad(&["set", &name], "nothing to set");
    bad(&["show", "nothing"], "no `vbus-guest net`");
    // The settings outlive the connection.
    bus.child.kill().unwrap();
    bus.child.wait().unwrap();
    let again = Served::start_in(&bus.dir, &config);
    wait_until("the NIC is open again", || {
        again.json(&["device", "show", "net-a"])["state"] == "open"
    });
    wait_until("the driver answers", || ask(&["show", &name]).status.success());
    assert_eq!(values(KEYS), expected);
    ask(&["set", &name, "--use-queue-pairs", "2", "--rx-offload", "true"]);
    assert_eq!(values(KEYS)[0], 2);
    assert!(interface(&name, "ifindex").trim().parse::<u32>().is_ok());
    rustix::process::kill_process(rustix::process::Pid::from_child(&net.child), Signal::INT)
        .unwrap();
    assert!(net.child.wait().unwrap().success());
}

/// A driver on a bus that stands still: the interface has no carrier any more.
fn stand_still(command: &[&str]) -> (Served, Lines, String) {
    let bus = Served::start(CONFIG);
    let mut net = Lines::start(&bus, command);
    let name = net.next().split(':').next().unwrap_or_default().to_owned();
    wait_until("the interface has a carrier", || interface(&name, "carrier").trim() == "1");
    bus.signal(Signal::STOP);
    wait_until("the driver notices", || interface(&name, "carrier").trim() == "0");
    (bus, net, name)
}

/// Whether the bus has called a driver at fault. What a driver does that leaves is no fault.
fn accuses(bus: &Served, device: &str) -> bool {
    let log = std::fs::read_to_string(&bus.log).unwrap();
    let stats = bus.json(&["device", "show", device]);
    let faults = [&stats["counters"]["broken"], &stats["connector"]["violations"]];
    println!("{log}{stats}");
    faults.iter().any(|n| n.as_u64() != Some(0)) || log.contains("WARN")
}

/// There is no time after which the driver gives up: `Patience::until` has no limit.
#[test]
fn an_interface_and_its_connection_outlast_a_bus_that_stands_still() {
    if !can_make_interfaces() {
        return;
    }
    let name = format!("vp{}", std::process::id());
    let (bus, mut net, name) = stand_still(&["net", "net-a", "--up", "--name", &name]);
    let identity = || (interface(&name, "ifindex"), interface(&name, "address"));
    let before = identity();
    bus.signal(Signal::CONT);
    wait_until("the carrier is back", || interface(&name, "carrier").trim() == "1");
    assert_eq!(identity(), before);
    let shown = bus.json(&["device", "show", "net-a"]);
    assert_eq!((&shown["state"], &shown["counters"]["opens"]), (&json!("open"), &json!(1)));
    assert!(!accuses(&bus, "net-a"));
    rustix::process::kill_process(rustix::process::Pid::from_child(&net.child), Signal::INT)
        .unwrap();
    assert!(net.child.wait().unwrap().success());
}

#[test]
fn a_driver_that_leaves_a_bus_that_stands_still_is_not_accused() {
    if !can_make_interfaces() {
        return;
    }
    for signal in [Signal::INT, Signal::KILL] {
        let name = format!("vq{}", std::process::id());
        let (bus, mut net, _) = stand_still(&["net", "net-a", "--up", "--name", &name]);
        rustix::process::kill_process(rustix::process::Pid::from_child(&net.child), signal)
            .unwrap();
        // It does not wait for the bus.
        net.child.wait().unwrap();
        bus.signal(Signal::CONT);
        wait_until("the driver has gone", || {
            bus.json(&["device", "show", "net-a"])["state"] == "closed"
        });
        assert!(!accuses(&bus, "net-a"));
        let mut net = Lines::start(&bus, &["net", "net-a", "--up", "--name", &name]);
        assert!(net.next().starts_with(&name), "the next driver gets the device");
    }
}

fn stays(command: &[&str], expected: Option<&str>) {
    let mut bus = Served::start(CONFIG);
    let mut net = Lines::start(&bus, command);
    let line = net.next();
    let name = line.split(':').next().unwrap_or_default();
    assert!(expected.is_none_or(|expected| name == expected), "{line}");
    let carrier = |value: &str| interface(name, "carrier").trim() == value;
    wait_until("the interface has a carrier", || carrier("1"));
    let identity = || (interface(name, "ifindex"), interface(name, "address"));
    let before = identity();
    bus.child.kill().unwrap();
    bus.child.wait().unwrap();
    wait_until("the interface loses its carrier", || carrier("0"));
    let socket = bus.dir.join("net-a.sock");
    wait_until("the supervisor to remove the socket", || !socket.exists());
    std::thread::sleep(std::time::Duration::from_millis(1500)); // For more than one scan.
    let again = Served::start_in(&bus.dir, CONFIG);
    wait_until("the interface has a carrier again", || carrier("1"));
    assert_eq!(identity(), before);
    assert_eq!(again.json(&["device", "show", "net-a"])["state"], "open");
    rustix::process::kill_process(rustix::process::Pid::from_child(&net.child), Signal::INT)
        .unwrap();
    assert!(net.child.wait().unwrap().success());
    // An interface of another test may have its name by now.
    assert_ne!(interface(name, "ifindex"), before.0, "the interface goes with its driver");
}
