// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A file system that is full: the bus has its log, its captures and its sockets there. Nothing
//! stops, errors say what they are, and what had no room comes when there is some.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Stdio;

use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vfio_user_protocol::Client;

use crate::support::{Done, Running, TIMEOUT, end_of, run, vbus, wait_until};

/// As the errors of the system say it.
const FULL: &str = "No space left on device";

#[test]
fn a_full_file_system_stops_nothing() {
    vbus_test_driver::run_with_own_mounts("full::serves_in_a_full_file_system");
}

/// Takes all the room in the file system of `folder`, for bytes and for files.
struct Filler<'a>(&'a Path);

impl Filler<'_> {
    /// All bytes.
    fn bytes(&self) {
        let mut file = File::create(self.0.join("filler")).unwrap();
        while file.write(&[1; 4096]).is_ok_and(|written| written > 0) {}
    }

    /// All files.
    fn files(&self) {
        let mut names = (0..).map(|number| self.0.join(format!("filler{number}")));
        while File::create_new(names.next().unwrap()).is_ok() {}
    }

    /// Gives all the room back.
    fn empty(&self) {
        for file in std::fs::read_dir(self.0).unwrap().flatten() {
            if file.file_name().to_string_lossy().starts_with("filler") {
                std::fs::remove_file(file.path()).unwrap();
            }
        }
    }
}

#[test]
#[ignore = "runs in a process of its own"]
fn serves_in_a_full_file_system() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let options = Some(c"size=512k,nr_inodes=64");
    if let Err(error) = mount("none", folder, "tmpfs", MountFlags::empty(), options) {
        eprintln!("{}{error}", vbus_test_driver::NO_MOUNT);
        return;
    }
    // A file for each step, so that those of the bus are few.
    let (dir, pcap, stream) = (folder.join("bus"), folder.join("pcap"), folder.join("stream"));
    let config = format!(
        "[allow]\npaths = [{folder:?}]\n\
         [[device]]\nname = \"net0\"\nclass = \"venet\"\nbackend = \"switch\"\nswitch = \"lab\"\n\
         [[device]]\nname = \"up\"\nclass = \"uplink\"\nbackend = \"stream\"\nswitch = \"lab\"\n\
         connect = {stream:?}\npcap = {pcap:?}\n"
    );
    std::fs::write(folder.join("bus.toml"), config).unwrap();
    let listener = UnixListener::bind(&stream).unwrap();
    listener.set_nonblocking(true).unwrap();
    let serve = vbus()
        .arg("serve")
        .arg("--config")
        .arg(folder.join("bus.toml"))
        .arg("--dir")
        .arg(&dir)
        .stdout(Stdio::null())
        .stderr(File::create(folder.join("log")).unwrap())
        .spawn()
        .unwrap();
    let mut serve = Running(serve);
    let ask = |args: &[&str]| -> Done { run(args, &dir) };
    let show = |name: &str| -> Value {
        serde_json::from_str(&ask(&["device", "show", name, "--json"]).out).unwrap()
    };
    wait_until("the bus", || ask(&["device", "list"]).code == Some(0));
    let mut peer = None;
    wait_until("the stream's peer", || {
        peer = listener.accept().ok();
        peer.is_some()
    });
    let (mut peer, _) = peer.unwrap();
    peer.set_nonblocking(false).unwrap();
    peer.set_write_timeout(Some(TIMEOUT)).unwrap();
    let filler = Filler(folder);

    // No byte is free: the capture ends, and frames go on.
    filler.bytes();
    let mut frame = [0xff; 64];
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    let send = |peer: &mut std::os::unix::net::UnixStream| {
        peer.write_all(&64u32.to_be_bytes()).unwrap();
        peer.write_all(&frame).unwrap();
    };
    let captures = || show("up")["device"]["backend"]["pcap"].clone();
    // More than the last page of the file has room for.
    wait_until("the capture's end", || {
        (0..16).for_each(|_| send(&mut peer));
        captures()["left-out"].as_u64().unwrap() > 0
    });
    let before = captures()["left-out"].as_u64().unwrap();
    send(&mut peer);
    wait_until("frames after the capture", || captures()["left-out"].as_u64().unwrap() > before);

    // A new capture has no room for its head. A client that breaks the protocol is one more line
    // for a log that cannot have it.
    let add = |name: &str, more: &[&str]| {
        ask(&[&["device", "add", name, "--class", "venet"], more].concat())
    };
    let capture = format!("pcap={:?}", folder.join("second"));
    let refused = add("net1", &["--set", "backend=null", "--set", &capture]);
    assert_eq!((refused.code, refused.err.contains(FULL)), (Some(1), true), "{}", refused.err);
    assert!(Client::connect(dir.join("net0.sock")).unwrap().call(999, &[], &[]).is_err());

    // No file is free: a device has no socket.
    filler.files();
    let refused = add("net2", &["--set", "backend=null"]);
    assert_eq!((refused.code, refused.err.contains(FULL)), (Some(1), true), "{}", refused.err);
    let list = ask(&["device", "list"]).out;
    assert!(list.contains("net0") && !list.contains("net2") && !list.contains("net1"), "{list}");
    drop(Client::connect(dir.join("net0.sock")).unwrap());

    // What had no room comes now.
    filler.empty();
    for (name, more) in [("net1", &["--set", &capture][..]), ("net2", &[])] {
        let done = add(name, &[&["--set", "backend=null"], more].concat());
        assert_eq!(done.code, Some(0), "{}", done.err);
    }
    drop(Client::connect(dir.join("net2.sock")).unwrap());

    // Neither does the end need room.
    filler.bytes();
    filler.files();
    kill_process(Pid::from_child(&serve.0), Signal::TERM).unwrap();
    assert!(end_of(&mut serve.0).success());
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
    // The mount goes with this process's name space.
}
