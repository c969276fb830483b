// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A bus that reads its configuration again: by `vbus reload` and by SIGHUP.
use std::os::fd::AsFd;

use rustix::process::Signal;
use serde_json::{Value, json};
use vfio_user_protocol::Client;

use crate::support::{Served, vbus, wait_until};

/// Writes another configuration for a bus.
fn configure(bus: &Served, text: &str) {
    std::fs::write(bus.log.with_file_name("bus.toml"), text).unwrap();
}

fn nic(name: &str, more: &str) -> String {
    format!("[[device]]\nname = \"{name}\"\nclass = \"venet\"\nbackend = \"null\"\n{more}\n")
}

/// The subjects in one list of a report.
fn subjects<'a>(report: &'a Value, list: &str) -> Vec<&'a str> {
    let lines = report[list].as_array().unwrap();
    lines.iter().map(|line| line["subject"].as_str().unwrap()).collect()
}

#[test]
fn devices_come_go_and_change() {
    let bus = Served::start(
        &[
            nic("same", ""),
            nic("gone", ""),
            nic("other", "mtu = 1500"),
            nic("rate", "rate = \"1G\""),
        ]
        .concat(),
    );
    let rate = |bus: &Served| {
        let shown = bus.json(&["device", "show", "rate"]);
        [&shown["device"]["backend"], &shown["device"]].map(|at| at["tx-rate"].as_u64())
    };
    let before = bus.json(&["device", "show", "same"])["incarnation"].clone();
    let client = Client::connect(bus.dir.join("rate.sock")).unwrap();
    configure(
        &bus,
        &[
            nic("same", ""),
            nic("other", "mtu = 9000"),
            nic("rate", "rate = \"2G\"\nburst = \"64k\""),
            nic("new", ""),
        ]
        .concat(),
    );
    let report = bus.json(&["reload"]);
    assert_eq!(
        subjects(&report, "changed"),
        ["device gone", "device rate", "device other", "device new"],
        "{report}"
    );
    assert!(subjects(&report, "kept").is_empty() && subjects(&report, "failed").is_empty());
    assert_eq!(report["changed"][1]["text"], "changed burst, rate");
    assert_eq!(report["changed"][2]["text"], "made anew, because mtu changed");
    assert_eq!(bus.devices(), ["new", "other", "rate", "same"]);
    assert_eq!(bus.json(&["device", "show", "other"])["device"]["mtu"], 9000);
    assert!(rate(&bus).contains(&Some(2_000_000_000)), "the rate of a device in use");
    assert_eq!(bus.json(&["device", "show", "same"])["incarnation"], before);
    assert_eq!(bus.good(&["reload"]), "nothing has changed\n");

    // By hand, without the file.
    fn set<'a>(words: &[&'a str]) -> Vec<&'a str> {
        [&["device", "set"], words].concat()
    }
    assert_eq!(bus.good(&set(&["rate", "rate=3G"])), "rate: changed rate\n");
    assert!(rate(&bus).contains(&Some(3_000_000_000)));
    assert_eq!(bus.good(&set(&["rate", "rate=3G"])), "rate: nothing to change\n");
    let done = bus.json(&set(&["rate", "rate=4G", "burst=128k"]));
    assert_eq!(done["changed"], serde_json::json!(["burst", "rate"]));
    for (words, text) in [
        (&["rate", "mtu=9000"][..], "only rates and bursts change"),
        (&["rate", "rate=1"], "\"rate\" is 1; use a number from 8000"),
        (&["rate", "rat=1"], "did you mean \"rate\"?"),
        (&["rate", "msix=true"], "\"msix\" is one of the settings"),
        (&["rate", "rate=1G", "rate=2G"], "\"rate\" is set twice"),
        (&["gone", "rate=1G"], "there is no device \"gone\""),
    ] {
        let error = bus.bad(&set(words));
        assert!(error.contains(text), "{words:?}: {error}");
    }
    assert!(rate(&bus).contains(&Some(4_000_000_000)), "what was refused has changed nothing");

    // The file is compared with what the device has, once it says something else of the device.
    let others = [nic("same", ""), nic("other", "mtu = 9000"), nic("new", "")].concat();
    assert_eq!(bus.good(&["reload"]), "nothing has changed\n");
    configure(&bus, &(others.clone() + &nic("rate", "rate = \"4G\"\nburst = \"64k\"")));
    assert_eq!(bus.good(&["reload"]), "device rate: changed burst\n");
    bus.good(&set(&["rate", "burst=32k"]));
    configure(&bus, &(others + &nic("rate", "rate = \"4G\"\nburst = \"32k\"")));
    assert_eq!(bus.good(&["reload"]), "nothing has changed\n");
    drop(client);
}

/// A VMM with a sparse file cannot make the kernel charge the bus for more than the file allows,
/// also where no control group has a limit.
#[test]
fn the_memory_of_guests_has_the_bound_of_the_file() {
    let text = |mib: u64| format!("[bus]\nguest-memory-mib = {mib}\n{}", nic("net0", ""));
    let bus = Served::start(&text(8));
    let mut client = Client::connect(bus.dir.join("net0.sock")).unwrap();
    let file = rustix::fs::memfd_create("sparse", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 1 << 40).unwrap();
    let mut map = |at: u64| client.dma_map(file.as_fd(), at, at, 1 << 20).is_ok();
    // Half of it: another client has its part too.
    let mapped = (0..8).take_while(|mib| map(mib << 20)).count();
    assert_eq!(mapped, 4);
    let refused = "the budget of bytes of files whose pages can be charged to the bus: the client, \
                   process ";
    wait_until("the line of the log", || {
        let log = std::fs::read_to_string(&bus.log).unwrap();
        log.contains(refused) && log.contains("guest-memory-mib")
    });
    let pages = &bus.json(&["device", "show", "net0"])["memory"]["pages"];
    let amounts = ["client_used", "of", "all_of"].map(|key| pages[key].as_u64().unwrap() >> 20);
    assert_eq!(amounts, [4, 4, 8], "{pages}");
    configure(&bus, &text(12));
    let said = bus.good(&["reload"]);
    assert!(said.contains("\"guest-memory-mib\" holds for what is mapped from now on"), "{said}");
    assert_eq!((4..12).take_while(|mib| map(mib << 20)).count(), 2);
}

#[test]
fn what_is_in_use_stays_until_it_is_free() {
    let bus = Served::start(&[nic("gone", ""), nic("other", "mtu = 1500")].concat());
    let clients = ["gone", "other"]
        .map(|name| Client::connect(bus.dir.join(format!("{name}.sock"))).unwrap());
    configure(&bus, &nic("other", "mtu = 9000"));
    let report = bus.json(&["reload"]);
    assert_eq!(subjects(&report, "kept"), ["device gone", "device other"], "{report}");
    assert_eq!(report["kept"][0]["needs"], "release");
    let said = bus.good(&["reload"]);
    assert!(said.starts_with("not yet: device gone: it is in use and stays on the bus"), "{said}");
    assert!(said.contains("not yet: device other: mtu cannot change while it is in use"), "{said}");
    assert_eq!(bus.json(&["device", "show", "other"])["device"]["mtu"], 1500);
    drop(clients);
    wait_until("the clients to go", || {
        ["gone", "other"].iter().all(|n| bus.json(&["device", "show", n])["connected"] == false)
    });
    bus.good(&["reload"]);
    assert_eq!(bus.devices(), ["other"]);
    assert_eq!(bus.json(&["device", "show", "other"])["device"]["mtu"], 9000);
}

#[test]
fn sighup_never_ends_a_bus_with_a_file_and_a_wrong_file_changes_nothing() {
    let mut bus = Served::start(&nic("a", ""));
    let log = |bus: &Served| std::fs::read_to_string(&bus.log).unwrap();
    configure(&bus, &[nic("a", ""), nic("b", "")].concat());
    bus.signal(Signal::HUP);
    wait_until("the new device", || bus.devices() == ["a", "b"]);
    wait_until("the log", || log(&bus).contains("reload: device b: added"));
    for (text, error) in [
        (nic("c", "mut = 9000"), ":5:1: device \"c\": \"mut\" is no setting here"),
        ("[bus]\nlog = \"loud\"\n".to_owned(), ":2:7: \"loud\" is no level of the log"),
        ("[control]\nread-access = [\"no one\"]\n".to_owned(), "there is no group \"no one\""),
        ("=".repeat(100_000), "bus.toml:1:2: "),
    ] {
        configure(&bus, &text);
        let done = bus.run(&["reload"]);
        assert!(done.code == Some(1) && done.err.contains(error), "{}", done.err);
        assert_eq!(bus.devices(), ["a", "b"]);
    }
    for _ in 0..100 {
        bus.signal(Signal::HUP);
    }
    wait_until("the log", || log(&bus).contains("ERROR reload: nothing has changed: "));
    assert!(bus.child.try_wait().unwrap().is_none());
    // What was added by hand belongs to nobody's file.
    bus.good(&["device", "add", "c", "--class", "venet", "--set", "backend=null"]);
    configure(&bus, &[nic("a", ""), nic("c", "mtu = 9000")].concat());
    let report = bus.json(&["reload"]);
    assert_eq!(subjects(&report, "changed"), ["device b"], "{report}");
    assert_eq!(subjects(&report, "kept"), ["device c"], "{report}");
    bus.signal(Signal::TERM);
    assert!(bus.child.wait().unwrap().success());
}

#[test]
fn settings_of_the_bus_change_or_say_that_they_cannot() {
    let folder = tempfile::tempdir().unwrap();
    let (config, dir) = (folder.path().join("bus.toml"), folder.path().join("bus"));
    std::fs::write(&config, "[bus]\nlog = \"warn\"\n").unwrap();
    let log = folder.path().join("log");
    let mut serve = vbus();
    serve.env_remove("VBUS_LOG").args(["serve", "--config"]).arg(&config).arg("--dir").arg(&dir);
    let mut serve = serve.stderr(std::fs::File::create(&log).unwrap()).spawn().unwrap();
    let run = |words: &[&str]| crate::support::run(words, &dir);
    let read = || std::fs::read_to_string(&log).unwrap();
    wait_until("the bus", || run(&["device", "list"]).code == Some(0));
    let add = |path: &str| {
        let set = format!("pcap={}", folder.path().join(path).display());
        run(&["device", "add", "x", "--class", "venet", "--set", "backend=null", "--set", &set])
    };
    std::fs::create_dir(folder.path().join("vm")).unwrap();
    let allow = |below: &str| {
        let path = folder.path().join(below);
        let text = format!("[bus]\nlog = \"info\"\nworkers = 7\n[allow]\npaths = [{path:?}]\n");
        std::fs::write(&config, &text).unwrap();
        text
    };
    assert!(add("vm/x.pcap").err.contains("\"paths\" in [allow]"));
    assert!(!read().contains("INFO"), "the level is warn: {}", read());
    // No bus may write its own configuration.
    allow("");
    let refused = run(&["reload"]).err;
    assert!(refused.contains("move the file out of the folders of \"paths\""), "{refused}");
    let text = allow("vm");
    let report: Value = serde_json::from_str(&run(&["reload", "--json"]).out).unwrap();
    assert_eq!(subjects(&report, "changed"), ["log", "allow"], "{report}");
    assert_eq!(
        report["kept"],
        json!([{
            "subject": "bus",
            "text": "\"workers\" stays until the bus restarts",
            "needs": "restart",
        }])
    );
    // Nor may a control client empty it, by another name.
    std::fs::hard_link(&config, folder.path().join("vm/hard")).unwrap();
    let refused = add("vm/hard").err;
    assert!(refused.contains("it is the configuration file of the bus"), "{refused}");
    assert_eq!(std::fs::read_to_string(&config).unwrap(), text);
    let done = add("vm/x.pcap");
    assert_eq!(done.code, Some(0), "{}", done.err);
    wait_until("the line", || read().contains("INFO added device=\"x\""));
    // The next one says it again, because it is still so.
    assert!(run(&["reload"]).out.contains("not yet: bus: \"workers\" stays"));
    serve.kill().unwrap();
    serve.wait().unwrap();
}

/// The bus of these tests has the level of its log from the environment, and its directory is for
/// its user alone.
#[test]
fn what_cannot_change_is_told_each_time() {
    let bus = Served::start("");
    let reload = || serde_json::from_str(&bus.run(&["reload", "--json"]).out).unwrap();
    configure(&bus, "[bus]\nlog = \"error\"\n[control]\nmode = \"0666\"\n");
    for _ in 0..2 {
        let report: Value = reload();
        let lines = ["kept", "failed"].map(|list| report[list].to_string());
        assert!(lines[0].contains("VBUS_LOG has set the level of the log"), "{report}");
        assert!(lines[0].contains("owner, group and mode of the control socket stay"), "{report}");
        let dir = bus.dir.display();
        assert!(lines[1].contains(&format!("chmod 711 {dir}")), "{report}");
    }
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o711);
    std::fs::set_permissions(&bus.dir, open).unwrap();
    assert_eq!(reload()["failed"], json!([]));
}

#[test]
fn what_the_bus_and_its_supervisor_tell_each_other_may_be_long() {
    let paths: Vec<_> = (0..700).map(|n| format!("/nonexistent/{n:0>100}")).collect();
    let allow = format!("[allow]\npaths = {paths:?}\n");
    let mut bus = Served::start(&allow);
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o711);
    std::fs::set_permissions(&bus.dir, open).unwrap();
    let groups: Vec<_> = (100_000..120_000).map(|group| group.to_string()).collect();
    configure(&bus, &format!("{allow}[control]\nread-access = {groups:?}\n"));
    let report = bus.json(&["reload"]);
    assert_eq!(subjects(&report, "changed"), ["control"], "{report}");
    bus.signal(Signal::TERM);
    assert!(bus.child.wait().unwrap().success());
}

#[test]
fn a_bus_without_a_file_has_nothing_to_reload() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("bus");
    let mut serve = vbus();
    let mut serve = serve.args(["serve", "--dir"]).arg(&dir).spawn().unwrap();
    wait_until("the bus", || crate::support::run(&["device", "list"], &dir).code == Some(0));
    let done = crate::support::run(&["reload"], &dir);
    assert!(done.err.contains("started without a configuration file"), "{}", done.err);
    serve.kill().unwrap();
    serve.wait().unwrap();
}

#[test]
fn a_device_that_cannot_be_made_anew_comes_back_as_it_was() {
    let bus = Served::start("");
    let path = |name: &str| bus.dir.with_file_name(name);
    let with_pcap = |name: &str| nic("a", &format!("pcap = {:?}", path(name)));
    let report = |text: &str| {
        configure(&bus, text);
        bus.json(&["reload"])
    };
    assert_eq!(subjects(&report(&with_pcap("a.pcap")), "changed"), ["device a"]);
    // The folder of the next capture is missing.
    configure(&bus, &with_pcap("missing/a.pcap"));
    let done = bus.run(&["reload", "--json"]);
    assert_eq!(done.code, Some(1));
    let failed: Value = serde_json::from_str(&done.out).unwrap();
    assert_eq!(subjects(&failed, "failed"), ["device a"], "{failed}");
    let text = failed["failed"][0]["text"].as_str().unwrap();
    assert!(text.starts_with("it is again as it was: it cannot be made: "), "{text}");
    assert_eq!(bus.devices(), ["a"]);
    // The next reload tries again.
    std::fs::create_dir(path("missing")).unwrap();
    let tried = report(&with_pcap("missing/a.pcap"));
    assert_eq!(tried["changed"][0]["text"], "made anew, because pcap changed", "{tried}");
    // Nothing is allowed any more but what the file names.
    let set = format!("pcap={}", path("a.pcap").display());
    let words = ["device", "add", "b", "--class", "venet", "--set", "backend=null", "--set", &set];
    assert!(bus.bad(&words).contains("\"paths\" in [allow]"));
    // A device in use keeps what it has, and the report says what it may not do.
    let client = Client::connect(bus.dir.join("a.sock")).unwrap();
    let kept = report(&nic("a", ""));
    let text = kept["kept"][0]["text"].as_str().unwrap();
    assert!(text.contains("may open anew only what the file names now"), "{kept}");
    drop(client);
}

#[test]
fn a_device_of_the_file_that_was_replaced_by_hand_is_not_the_files() {
    let bus = Served::start(&[nic("a", ""), nic("b", "")].concat());
    for words in [
        &["device", "remove", "a"][..],
        &["device", "add", "a", "--class", "venet", "--set", "backend=null"],
    ] {
        bus.good(words);
    }
    configure(&bus, &[nic("a", "mtu = 9000"), nic("b", "")].concat());
    let report = bus.json(&["reload"]);
    assert_eq!(subjects(&report, "kept"), ["device a"], "{report}");
    let text = report["kept"][0]["text"].as_str().unwrap();
    assert!(text.starts_with("it was added by hand"), "{text}");
    configure(&bus, "");
    let report = bus.json(&["reload"]);
    assert_eq!(subjects(&report, "changed"), ["device b"], "{report}");
    assert_eq!(bus.devices(), ["a"]);
}

#[test]
fn sighup_ends_a_bus_without_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("bus");
    let mut serve = vbus();
    let mut serve = serve.args(["serve", "--dir"]).arg(&dir).spawn().unwrap();
    wait_until("the bus", || crate::support::run(&["device", "list"], &dir).code == Some(0));
    rustix::process::kill_process(rustix::process::Pid::from_child(&serve), Signal::HUP).unwrap();
    assert!(serve.wait().unwrap().success());
    assert!(!dir.join("control.sock").exists());
}
