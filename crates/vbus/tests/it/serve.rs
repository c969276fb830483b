// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus serve` as a process: its devices, its errors, hostile clients, and its end.
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;
use std::time::Duration;

use crate::support::{
    Running, Served, TIMEOUT, TWO, end_of, exchange, has_ended, run, vbus, wait_until,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

#[test]
fn devices_come_and_go() {
    let bus = Served::start(TWO);
    let names = |bus: &Served| -> Vec<String> {
        let list = bus.json(&["device", "list"]);
        list.as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&bus), ["net0", "net1"]);
    bus.good(&[
        "device",
        "add",
        "net2",
        "--class",
        "venet",
        "--set",
        "backend=switch",
        "--set",
        "mtu=9000",
    ]);
    assert_eq!(names(&bus), ["net0", "net1", "net2"]);
    let shown = bus.json(&["device", "show", "net2"]);
    assert_eq!(
        (shown["class"].as_str(), shown["device"]["mtu"].as_u64()),
        (Some("venet"), Some(9000))
    );
    assert!(
        bus.bad(&["device", "add", "net2", "--class", "venet", "--set", "backend=switch"])
            .contains("already")
    );
    assert!(bus.bad(&["device", "add", "a/b", "--class", "venet"]).contains("bad device name"));
    assert!(bus.bad(&["device", "add", "control", "--class", "venet"]).contains("the bus itself"));
    assert!(bus.bad(&["device", "add", "metrics", "--class", "venet"]).contains("the bus itself"));
    assert!(
        bus.bad(&["device", "add", "x", "--class", "vnet"]).contains("venet"),
        "names the classes that there are"
    );
    assert!(
        bus.bad(&["device", "add", "x", "--class", "venet", "--set", "msix=1"])
            .contains("true or false")
    );
    bus.good(&["device", "remove", "net1"]);
    assert_eq!(names(&bus), ["net0", "net2"]);
    assert!(!bus.dir.join("net1.sock").exists());
    assert!(bus.bad(&["device", "remove", "net1"]).contains("net1"));
    assert!(bus.bad(&["stats", "net1"]).contains("net1"));
    assert_eq!(bus.json(&["stats"])[1]["counters"]["opens"], 0);
    assert!(bus.good(&["stats", "net2"]).contains("doorbells"));
    let summary = bus.good(&["stats"]);
    assert!(summary.contains("2 devices, 0 open") && summary.contains("\nnet0 "), "{summary}");
    assert!(!summary.contains("doorbells"), "{summary}");
    assert!(bus.good(&["stats", "--all"]).contains("doorbells"));
    assert!(bus.good(&["device", "list"]).contains("net2.sock"));
    assert!(bus.good(&["device", "classes"]).contains("venet"));
    assert_eq!(bus.run(&["device", "frobnicate"]).code, Some(2));
}

#[test]
fn qemu_args_has_the_options_that_qemu_needs() {
    let bus = Served::start(TWO);
    let args = bus.json(&["qemu-args", "net1", "--memory", "512M", "--spare-ports", "1"]);
    let args: Vec<&str> = args.as_array().unwrap().iter().map(|a| a.as_str().unwrap()).collect();
    assert!(args.contains(&"memory-backend-memfd,id=vbus-memory,size=512M,share=on"));
    assert_eq!(args.iter().filter(|a| a.starts_with("pcie-root-port")).count(), 2);
    let device: Value = serde_json::from_str(args.last().unwrap()).unwrap();
    assert_eq!(device["driver"], "vfio-user-pci");
    assert_eq!(device["x-msg-timeout"], 60000);
    assert_eq!(device["socket"]["path"].as_str(), bus.dir.join("net1.sock").to_str());
    assert!(bus.good(&["qemu-args"]).lines().filter(|l| l.contains("vfio-user-pci")).count() == 2);
    assert!(bus.bad(&["qemu-args", "nope"]).contains("nope"));
    assert!(bus.bad(&["qemu-args", "--memory", "1G,share=off"]).contains("such as 512M"));
    assert!(bus.bad(&["qemu-args", "--memory", "12X"]).contains("--memory is \"12X\""));
    // A bus without devices is an error.
    bus.good(&["device", "remove", "net0"]);
    bus.good(&["device", "remove", "net1"]);
    assert!(bus.bad(&["qemu-args"]).contains("no device is on the bus"));
}

#[test]
fn a_device_behind_vhost_user_is_for_the_network_of_qemu() {
    let bus = Served::start(TWO);
    let settings = ["--set", "transport=vhost-user", "--set", "queue-pairs=2"];
    let add = ["device", "add", "vh0", "--class", "virtio-net", "--set", "backend=switch"];
    bus.good(&[&add[..], &settings].concat());
    let lines = bus.good(&["qemu-args", "vh0"]);
    let socket = bus.dir.join("vh0.sock");
    assert!(lines.contains(&format!("path={},reconnect-ms=", socket.display())), "{lines}");
    assert!(lines.contains("-netdev vhost-user,id=vbus-vh0-net,"), "{lines}");
    assert!(lines.contains("-device virtio-net-pci,id=vbus-vh0,bus=vbus-port0,"), "{lines}");
    // It answers as a back end does: GET_FEATURES, with VERSION_1.
    let mut front_end = UnixStream::connect(&socket).unwrap();
    front_end.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    let mut reply = [0; 20];
    front_end.read_exact(&mut reply).unwrap();
    assert!(reply[..12] == [1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0] && reply[16] & 1 == 1, "{reply:?}");
    wait_until("the front end", || bus.json(&["device", "show", "vh0"])["connected"] == true);
    let device = bus.json(&["device", "show", "vh0"]);
    assert_eq!(
        (&device["protocol"], &device["connector"]["clients"]),
        (&json!("vhost-user"), &json!(1))
    );
    assert!(bus.bad(&["device", "remove", "vh0"]).contains("in use"));
    drop(front_end);
    wait_until("its end", || bus.json(&["device", "show", "vh0"])["connected"] == false);
    bus.good(&["device", "remove", "vh0"]);
    assert!(!socket.exists());
    let error = bus.bad(&[&add[..], &settings, &["--set", "msix=true"]].concat());
    assert!(error.contains("the VMM has the function"), "{error}");
}

#[test]
fn errors_of_a_configuration_show_the_line() {
    let dir = tempfile::tempdir().unwrap();
    let (file, bus) = (dir.path().join("bus.toml"), dir.path().join("bus"));
    for (text, expect) in [
        (
            "[bus]\nworker = 1\n",
            ":2:1: unknown key \"worker\" for the bus; did you mean \"workers\"?\n 2 | worker = 1\n   | ^^^^^^",
        ),
        ("\n[[device]]\nname = \"n\"\nclass = \"vnet\"\n", ":4:9: no device class \"vnet\""),
        (
            "[[device]]\nname = \"n\"\nclass = \"venet\"\nbackend = \"null\"\nmut = 9000\n",
            ":5:1: device \"n\": \"mut\" is no setting here; did you mean \"mtu\"?\n 5 | mut",
        ),
        (
            "[[device]]\nname = \"n\"\nclass = \"venet\"\nmtu = 99999\n",
            ":4:1: device \"n\": \"mtu\" is 99999; use a number from 68 to 65513\n 4 | mtu = 99999\n   | ^^^",
        ),
        (
            "[[device]]\nname = \"n\"\nclass = \"state\"\npages = [{ name = \"a\", bytes = 8, owner = \"n\" }]\n",
            ":4:35: device \"n\": \"pages[0].owner\" is \"n\"; use \"device\" or \"driver\"\n \
             4 | pages = [{ name = \"a\", bytes = 8, owner = \"n\" }]\n   |                                   ^^^^^",
        ),
        (
            "[[device]]\nname = \"n\"\nclass = \"virtio-net\"\npic = \"p\"\n",
            ":4:1: device \"n\": \"pic\" is for drivers of vbus; a device of class virtio-net has \
             others\n 4 | pic",
        ),
        (
            "[[device]]\nname = \"control\"\nclass = \"venet\"\n",
            ":2:1: \"name\" is \"control\", but",
        ),
        ("[[device]]\nname = \"n\nclass = \"venet\"\n", ":2:"),
    ] {
        std::fs::write(&file, text).unwrap();
        for words in
            [&["config", "check"][..], &["serve", "--dir", bus.to_str().unwrap(), "--config"]]
        {
            let done = vbus().args(words).arg(&file).output().unwrap();
            let err = String::from_utf8(done.stderr).unwrap();
            assert_eq!(done.status.code(), Some(1), "{words:?} {text:?}");
            assert!(
                err.contains(&format!("{}{expect}", file.display())),
                "{words:?} {text:?}:\n{err}"
            );
        }
        assert!(
            !bus.exists() || std::fs::read_dir(&bus).unwrap().count() == 0,
            "{text:?} left something"
        );
    }
    std::fs::write(&file, TWO).unwrap();
    assert!(vbus().args(["config", "check"]).arg(&file).output().unwrap().status.success());
    assert!(
        vbus().args(["config", "check", "/nonexistent"]).output().unwrap().status.code() == Some(1)
    );
}

#[test]
fn sockets_are_private_and_are_removed_at_the_end() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut bus = Served::start(TWO);
        assert_eq!(std::fs::metadata(&bus.dir).unwrap().permissions().mode() & 0o777, 0o700);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&bus.dir).unwrap() {
            let entry = entry.unwrap();
            let meta = entry.metadata().unwrap();
            assert!(meta.file_type().is_socket());
            assert_eq!(meta.permissions().mode() & 0o777, 0o600);
            names.push(entry.file_name().into_string().unwrap());
        }
        names.sort();
        assert_eq!(names, ["control.sock", "metrics.sock", "net0.sock", "net1.sock"]);
        bus.signal(signal);
        assert!(end_of(&mut bus.child).success());
        assert_eq!(std::fs::read_dir(&bus.dir).unwrap().count(), 0);
    }
}

#[test]
fn a_directory_has_one_bus() {
    let mut bus = Served::start(TWO);
    let second = run(&["serve"], &bus.dir);
    assert_eq!(second.code, Some(1));
    assert!(second.err.contains("another vbus serves"), "{}", second.err);
    bus.good(&["device", "list"]);
    // The next bus removes the sockets that a killed bus has left together with its supervisor,
    // including those of devices that it does not have.
    let supervisor = bus.supervisor();
    kill_process(Pid::from_raw(supervisor).unwrap(), Signal::KILL).unwrap();
    wait_until("the supervisor to end", || has_ended(supervisor));
    bus.child.kill().unwrap();
    end_of(&mut bus.child);
    assert!(bus.dir.join("net0.sock").exists());
    assert!(bus.bad(&["device", "list"]).contains("no bus serves"));
    let mut next = vbus();
    next.args(["serve", "--dir"]).arg(&bus.dir).stdout(Stdio::null()).stderr(Stdio::null());
    let _next = Running(next.spawn().unwrap());
    wait_until("the next bus", || bus.run(&["device", "list"]).code == Some(0));
    assert!(!bus.dir.join("net0.sock").exists());
}

/// The supervisor has the directory's lock too, and a disk may keep it from its end.
#[test]
fn a_bus_that_has_ended_leaves_its_directory_to_the_next_one_although_its_supervisor_hangs() {
    let mut bus = Served::start(TWO);
    let supervisor = Pid::from_raw(bus.supervisor()).unwrap();
    kill_process(supervisor, Signal::STOP).unwrap();
    bus.signal(Signal::TERM);
    assert!(end_of(&mut bus.child).success());
    let next = Served::start_in(&bus.dir, TWO);
    assert!(!has_ended(supervisor.as_raw_nonzero().get()), "it would have let go by its end");
    kill_process(supervisor, Signal::KILL).unwrap();
    assert_eq!(next.devices(), ["net0", "net1"]);
}

#[test]
fn a_killed_bus_leaves_nothing_and_the_next_one_starts_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut bus = Served::start_in(&folder.path().join("bus"), TWO);
    for _ in 0..3 {
        bus.child.kill().unwrap();
        end_of(&mut bus.child);
        // The supervisor of the killed bus may not have ended yet.
        let next = Served::start_in(&bus.dir, TWO);
        assert_eq!(next.json(&["device", "list"]).as_array().unwrap().len(), 2);
        bus = next;
    }
    let supervisor = bus.supervisor();
    bus.child.kill().unwrap();
    end_of(&mut bus.child);
    wait_until("the supervisor to end", || has_ended(supervisor));
    assert_eq!(std::fs::read_dir(&bus.dir).unwrap().count(), 0);
}

#[test]
fn sockets_of_the_service_manager_are_used_and_stay() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("bus");
    std::fs::create_dir(&dir).unwrap();
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).unwrap();
    let config = folder.path().join("bus.toml");
    std::fs::write(&config, TWO).unwrap();
    let listen = |name: &str| UnixListener::bind(dir.join(name)).unwrap();
    let (control, device) = (listen("control.sock"), listen("net1.sock"));
    let client = std::thread::spawn({
        // It waits for a bus that is not there yet.
        let mut socket = UnixStream::connect(dir.join("control.sock")).unwrap();
        move || exchange(&mut socket, b"{\"op\":\"list\"}\n")
    });
    // The shell gives the descriptors their numbers, and the bus its process id.
    let bus = std::process::Command::new("sh")
        .args([
            "-c",
            "exec 3<&0 4<&1 0</dev/null 1>/dev/null; LISTEN_PID=$$ LISTEN_FDS=2 exec \"$@\"",
        ])
        .args(["sh", env!("CARGO_BIN_EXE_vbus"), "serve", "--config"])
        .arg(&config)
        .arg("--dir")
        .arg(&dir)
        .stdin(std::os::fd::OwnedFd::from(control))
        .stdout(std::os::fd::OwnedFd::from(device))
        .stderr(Stdio::null())
        .spawn();
    let mut bus = Running(bus.unwrap());
    let list: Value = serde_json::from_str(&client.join().unwrap()).unwrap();
    assert_eq!(list["ok"].as_array().unwrap().len(), 2);
    assert_eq!(run(&["device", "show", "net1"], &dir).code, Some(0));
    let client = UnixStream::connect(dir.join("net1.sock")).unwrap();
    drop(client);
    kill_process(Pid::from_child(&bus.0), Signal::TERM).unwrap();
    assert!(end_of(&mut bus.0).success());
    let mut left: Vec<_> =
        std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["control.sock", "net1.sock"]);
}

#[test]
fn paths_are_confined() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::create_dir(path("vm")).unwrap();
    std::fs::create_dir(path("other")).unwrap();
    let bus = Served::start(&format!(
        "[allow]\npaths = [{:?}]\n\n[[device]]\nname = \"a\"\nclass = \"venet\"\n\
         backend = \"null\"\npcap = {:?}\n",
        path("vm"),
        path("other/named.pcap")
    ));
    assert!(path("other/named.pcap").exists(), "the configuration may name any file");
    let add = |settings: &[String]| {
        let mut args = vec!["device", "add", "x", "--class", "venet"];
        settings.iter().for_each(|setting| args.extend(["--set", setting]));
        let done = bus.run(&args);
        if done.code == Some(0) {
            bus.good(&["device", "remove", "x"]);
        }
        done
    };
    let set = |key: &str, path: std::path::PathBuf| format!("{key}={}", path.display());
    let stream = || "backend=stream".to_owned();
    std::fs::write(path("other/victim"), "precious").unwrap();
    std::os::unix::fs::symlink(path("other"), path("vm/link")).unwrap();
    std::os::unix::fs::symlink(path("other/victim"), path("vm/victim")).unwrap();
    for settings in [
        vec![set("pcap", path("vm/a.pcap"))],
        vec![set("pcap", bus.dir.join("a.pcap"))],
        vec![stream(), set("listen", path("vm/s.sock"))],
        vec![stream(), set("connect", path("vm/s.sock"))],
        vec![set("socket", path("vm/x.sock"))],
    ] {
        let done = add(&settings);
        assert_eq!(done.code, Some(0), "{settings:?}: {}", done.err);
    }
    for settings in [
        vec![set("pcap", path("other/victim"))],
        vec![set("pcap", path("vm/../other/victim"))],
        vec![set("pcap", "/etc/vbus-test".into())],
        vec![stream(), set("listen", path("other/s.sock"))],
        vec![set("socket", path("other/x.sock"))],
    ] {
        let done = add(&settings);
        assert_eq!(done.code, Some(1), "{settings:?}");
        assert!(done.err.contains("add its folder to \"paths\" in [allow]"), "{}", done.err);
    }
    for bad in [path("vm/link/victim"), path("vm/victim"), path("vm")] {
        assert_eq!(add(&[set("pcap", bad)]).code, Some(1));
    }
    assert_eq!(std::fs::read(path("other/victim")).unwrap(), b"precious");
    assert!(!path("vm/s.sock").exists() && !path("vm/x.sock").exists());
    let done = add(&["backend=tap".into(), "tap=eth0".into()]);
    assert!(done.err.contains("add its name to \"taps\" in [allow] (now: vbus%d)"), "{}", done.err);
}

#[test]
fn a_directory_that_others_may_write_to_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let done = run(&["serve"], dir.path());
    assert!(done.code == Some(1) && done.err.contains("others may write"), "{}", done.err);
    let done = run(&["device", "list"], dir.path());
    assert!(done.code == Some(1) && done.err.contains("others may write"), "{}", done.err);
    let long = dir.path().join("x".repeat(90));
    assert!(run(&["device", "list"], &long).err.contains("no bus"));
}

#[test]
fn hostile_control_clients_harm_only_themselves() {
    let bus = Served::start(TWO);
    for (bytes, expect) in [
        (&b"\n"[..], "not a request"),
        (b"{}\n", "not a request"),
        (b"\xff\xfe\x00\n", "not a request"),
        (b"{\"op\":\"nothing\"}\n", "not a request"),
        (b"{\"op\":\"remove\"}\n", "not a request"),
        (b"{\"op\":\"add\",\"name\":\"x\",\"class\":\"venet\",\"settings\":7}\n", "not a request"),
        (b"{\"op\":\"device\",\"name\":\"net0\",\"request\":{}}\n", "net0"),
        (b"{\"op\":\"show\",\"name\":\"net7\"}\n", "net7"),
        (b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\n", "not a request"),
    ] {
        let answer: Value = serde_json::from_str(&exchange(&mut bus.control(), bytes)).unwrap();
        assert!(answer["error"].as_str().unwrap().contains(expect), "{answer}");
    }
    let deep = [vec![b'['; 1 << 20], b"\n".to_vec()].concat();
    assert!(exchange(&mut bus.control(), &deep).contains("not a request"));
    let endless = vec![b' '; (4 << 20) + 100];
    assert!(exchange(&mut bus.control(), &endless).contains("one line"));
    // This client sends requests, does not read the answers, and goes.
    let mut deaf = bus.control();
    deaf.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
    while deaf.write_all(&b"{\"op\":\"list\"}\n".repeat(100)).is_ok() {}
    // Silent clients keep their places until the time-out. Then the bus accepts an honest client.
    let silent: Vec<_> = (0..40).map(|_| bus.control()).collect();
    wait_until("a place for an honest client", || bus.run(&["device", "list"]).code == Some(0));
    drop((silent, deaf));
    assert!(bus.status("Threads") < 60);
    wait_until("the threads to end", || bus.status("Threads") <= 5);
}

#[test]
fn sixty_four_idle_devices_cost_no_processor_time() {
    let device =
        |i| format!("[[device]]\nname = \"n{i}\"\nclass = \"venet\"\nbackend = \"switch\"\n");
    let config: String = (0..64).map(device).collect();
    let bus = Served::start(&config);
    assert_eq!(bus.json(&["device", "list"]).as_array().unwrap().len(), 64);
    wait_until("the control client's thread to end", || bus.status("Threads") <= 6);
    let rss = bus.status("VmRSS");
    assert!(rss < 64 << 10, "{rss} KiB resident");
    // The user and system time of the process, in ticks of 10 ms.
    let time = || -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", bus.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let switches = || bus.status("voluntary_ctxt_switches");
    let before = (time(), switches());
    std::thread::sleep(Duration::from_secs(3));
    assert!(time() - before.0 <= 1, "the idle bus used {} ticks", time() - before.0);
    assert!(switches() - before.1 <= 3, "the idle bus woke up {} times", switches() - before.1);
}

#[test]
fn a_connection_to_a_device_counts_as_use() {
    let bus = Served::start(TWO);
    // A message VERSION of vfio-user 0.0 without data makes a client.
    let mut client = UnixStream::connect(bus.dir.join("net0.sock")).unwrap();
    client.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut version = vec![1, 0, 1, 0];
    version.extend(20u32.to_le_bytes());
    version.extend([0; 12]);
    version[16 + 2] = 1;
    client.write_all(&version).unwrap();
    wait_until("the client", || bus.json(&["device", "show", "net0"])["connected"] == true);
    assert!(bus.bad(&["device", "remove", "net0"]).contains("--force"));
    bus.good(&["device", "remove", "net1"]);
    let done = bus.run(&["qemu-args"]);
    assert_eq!((done.code, done.out.as_str()), (Some(3), ""));
    assert!(done.err.contains("every device of the bus is in use"), "{}", done.err);
    bus.good(&["device", "remove", "net0", "--force"]);
    assert!(bus.json(&["device", "list"]).as_array().unwrap().is_empty());
}

#[test]
fn a_directory_with_an_unusable_name_is_refused() {
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("x".repeat(100));
    let done = run(&["serve"], &long);
    assert_eq!(done.code, Some(1));
    assert!(done.err.contains("at most 107; use a shorter directory (--dir)"), "{}", done.err);
    assert!(!long.exists());
    let strange = dir.path().join(std::ffi::OsStr::from_bytes(b"bus\xff"));
    let done = run(&["serve"], &strange);
    assert!(done.code == Some(1) && done.err.contains("is not UTF-8"), "{}", done.err);
    assert!(run(&["device", "list"], &strange).err.contains("no bus"));
    // The name of the device makes the path too long, although the directory's does not.
    let near = dir.path().join("x".repeat(90 - dir.path().as_os_str().len()));
    let bus = Served::start_in(&near, "");
    let name = "n".repeat(32);
    let err = bus.bad(&["device", "add", &name, "--class", "venet"]);
    assert!(err.contains("use a shorter directory (--dir) or name"), "{err}");
}

#[test]
fn a_check_leaves_the_running_bus_alone() {
    let files = tempfile::tempdir().unwrap();
    let (pcap, socket) = (files.path().join("frames.pcap"), files.path().join("stream"));
    let config = format!(
        "[[device]]\nname = \"a\"\nclass = \"venet\"\nbackend = \"null\"\npcap = {pcap:?}\n\
         [[device]]\nname = \"b\"\nclass = \"venet\"\nbackend = \"stream\"\nlisten = {socket:?}\n"
    );
    let bus = Served::start(&config);
    std::fs::File::options().append(true).open(&pcap).unwrap().write_all(b"frames").unwrap();
    let before = (std::fs::read(&pcap).unwrap(), std::fs::metadata(&socket).unwrap().ino());
    let file = files.path().join("bus.toml");
    std::fs::write(&file, &config).unwrap();
    let done = run(&["config", "check", file.to_str().unwrap()], &bus.dir);
    assert_eq!(done.code, Some(2), "the command has no option --dir");
    let done = vbus().args(["config", "check"]).arg(&file).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let after = (std::fs::read(&pcap).unwrap(), std::fs::metadata(&socket).unwrap().ino());
    assert!(before == after && before.0.ends_with(b"frames"));
}

#[test]
fn a_stream_without_a_peer_says_so() {
    let bus = Served::start(
        "[[device]]\nname = \"s\"\nclass = \"venet\"\nbackend = \"stream\"\nconnect = \"/nonexistent/peer\"\n",
    );
    let log = std::fs::read_to_string(&bus.log).unwrap();
    assert!(
        log.contains("nothing is at the stream's path yet") && log.contains("/nonexistent/peer"),
        "{log}"
    );
    let long = format!("connect=/{}", "x".repeat(200));
    let add = ["device", "add", "t", "--class", "venet", "--set", "backend=stream", "--set", &long];
    assert!(
        bus.bad(&add)
            .contains("\"connect\" is a path of 201 bytes; the path of a socket has at most 107")
    );
}

#[test]
fn vbus_guest_says_which_program_drives_devices() {
    let done = vbus().args(["guest", "net", "--all", "--help"]).output().unwrap();
    let err = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.code() == Some(1) && err.contains("`vbus-guest`"), "{err}");
}

#[test]
fn the_classes_are_told_without_a_bus() {
    let empty = tempfile::tempdir().unwrap();
    let output =
        vbus().args(["device", "classes"]).env("XDG_RUNTIME_DIR", empty.path()).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && said.contains("venet: ") && said.contains("sched: "),
        "{said}"
    );
    // A directory that is named must have a bus.
    assert!(!run(&["device", "classes"], empty.path()).err.is_empty());
}
