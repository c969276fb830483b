// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who may use the sockets of a bus, and what control clients may do. Threads of this test take the
//! place of other users, so only root can run most of it.

use std::io::{BufRead, BufReader, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Stdio};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};
use serde_json::{Value, json};

use crate::support::{Served, TIMEOUT, exchange, run, vbus};

/// A user and groups that no account of a machine has.
const STRANGER: u32 = 54_321;
const STAFF: u32 = 54_322;
const READERS: u32 = 54_323;

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: only root can act as other users");
    }
    root
}

/// Runs `act` as the user STRANGER with these groups.
fn as_stranger<T: Send + 'static>(groups: &[u32], act: impl FnOnce() -> T + Send + 'static) -> T {
    let groups: Vec<Gid> = groups.iter().map(|group| Gid::from_raw(*group)).collect();
    let stranger = move || {
        // These calls change the thread alone. It ends with this function.
        set_thread_groups(&groups).unwrap();
        set_thread_gid(Gid::from_raw(STRANGER)).unwrap();
        set_thread_uid(Uid::from_raw(STRANGER)).unwrap();
        act()
    };
    std::thread::spawn(stranger).join().unwrap()
}

/// The bus's answer to a request of the user STRANGER, or the error of the connection.
fn ask(bus: &Served, groups: &[u32], request: &str) -> Result<Value, ErrorKind> {
    let (path, request) = (bus.dir.join("control.sock"), format!("{request}\n"));
    as_stranger(groups, move || {
        let mut socket = UnixStream::connect(path).map_err(|error| error.kind())?;
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        Ok(serde_json::from_str(&exchange(&mut socket, request.as_bytes())).unwrap())
    })
}

fn error(answer: Result<Value, ErrorKind>) -> String {
    answer.unwrap()["error"].as_str().unwrap().to_owned()
}

/// Lets other users search the folder around the bus's directory.
fn open_way(bus: &Served) {
    let folder = bus.dir.parent().unwrap();
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o711)).unwrap();
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

const ADD: &str = r#"{"op":"add","name":"x","class":"venet","settings":{"backend":"null"}}"#;

#[test]
fn a_control_client_has_the_rights_of_its_groups() {
    if !is_root() {
        return;
    }
    let bus = Served::start(&format!(
        "[control]\nfull-access = [\"{STAFF}\"]\nread-access = [\"{READERS}\"]\n\
         [[device]]\nname = \"net0\"\nclass = \"venet\"\nbackend = \"null\"\n"
    ));
    open_way(&bus);
    assert_eq!((mode(&bus.dir), mode(&bus.dir.join("control.sock"))), (0o711, 0o666));
    assert_eq!(mode(&bus.dir.join("net0.sock")), 0o600);
    // Nobody without a right gets an answer.
    let refused = error(ask(&bus, &[STRANGER], r#"{"op":"list"}"#));
    assert!(refused.contains("user 54321 has no right here"), "{refused}");
    // Readers read.
    let list = ask(&bus, &[READERS], r#"{"op":"list"}"#).unwrap();
    assert_eq!(list["ok"][0]["name"], "net0");
    assert!(ask(&bus, &[READERS], r#"{"op":"info"}"#).unwrap()["ok"]["pid"].is_u64());
    for (op, request) in [
        ("add", ADD),
        ("remove", r#"{"op":"remove","name":"net0"}"#),
        ("device", r#"{"op":"device","name":"net0","request":{"op":"announce"}}"#),
    ] {
        let refused = error(ask(&bus, &[READERS], request));
        assert!(
            refused.starts_with(&format!(
                "{op:?} needs the right \"full\", and user 54321 has \"read\""
            )),
            "{refused}"
        );
    }
    assert_eq!(bus.json(&["device", "list"]).as_array().unwrap().len(), 1);
    let long = format!(r#"{{"op":"list"{}}}"#, " ".repeat(64 << 10));
    let refused = error(ask(&bus, &[READERS], &long));
    assert!(refused.contains("one line of at most 65536 bytes"), "{refused}");
    assert!(ask(&bus, &[STAFF], &long).unwrap()["ok"].is_array());
    // The staff does everything.
    assert_eq!(ask(&bus, &[STAFF, READERS], ADD).unwrap()["ok"]["name"], "x");
    assert!(ask(&bus, &[STAFF], r#"{"op":"remove","name":"x"}"#).unwrap()["ok"].is_null());
}

#[test]
fn a_socket_is_for_its_group_alone() {
    if !is_root() {
        return;
    }
    let bus = Served::start(&format!(
        "[control]\ngroup = \"{STAFF}\"\n\
         [[device]]\nname = \"a\"\nclass = \"venet\"\nbackend = \"null\"\n\
         socket = {{ group = \"{READERS}\" }}\n\
         [[device]]\nname = \"b\"\nclass = \"venet\"\nbackend = \"null\"\n\
         socket = {{ path = \"other.sock\", owner = \"{STRANGER}\", mode = \"0400\" }}\n"
    ));
    open_way(&bus);
    let data = |name: &str| std::fs::metadata(bus.dir.join(name)).unwrap();
    assert_eq!((mode(&bus.dir.join("a.sock")), data("a.sock").gid()), (0o660, READERS));
    assert_eq!((mode(&bus.dir.join("other.sock")), data("other.sock").uid()), (0o400, STRANGER));
    assert!(!bus.dir.join("b.sock").exists());
    assert_eq!(
        bus.json(&["device", "show", "b"])["socket"],
        bus.dir.join("other.sock").to_str().unwrap()
    );
    let connect = |name: &str, groups: &[u32]| {
        let path = bus.dir.join(name);
        as_stranger(groups, move || UnixStream::connect(path).map(drop).map_err(|e| e.kind()))
    };
    assert_eq!(connect("a.sock", &[READERS]), Ok(()));
    assert_eq!(connect("a.sock", &[STAFF]), Err(ErrorKind::PermissionDenied));
    assert_eq!(connect("other.sock", &[STAFF]), Err(ErrorKind::PermissionDenied));
    // The group of the control socket may connect, but has no right.
    assert_eq!(connect("control.sock", &[STAFF]), Ok(()));
    assert_eq!(connect("control.sock", &[READERS]), Err(ErrorKind::PermissionDenied));
    assert!(error(ask(&bus, &[STAFF], r#"{"op":"list"}"#)).contains("has no right here"));
    // At run time as well.
    let socket = format!("socket={{ group = \"{READERS}\", mode = \"0620\" }}");
    bus.good(&[
        "device",
        "add",
        "c",
        "--class",
        "venet",
        "--set",
        "backend=null",
        "--set",
        &socket,
    ]);
    assert_eq!((mode(&bus.dir.join("c.sock")), data("c.sock").gid()), (0o620, READERS));
    bus.good(&["device", "remove", "c"]);
    bus.good(&["device", "remove", "b"]);
    assert!(!bus.dir.join("c.sock").exists() && !bus.dir.join("other.sock").exists());
}

#[test]
fn a_bus_for_its_own_user_has_private_sockets() {
    let bus = Served::start("[[device]]\nname = \"a\"\nclass = \"venet\"\nbackend = \"null\"\n");
    assert_eq!(mode(&bus.dir), 0o700);
    assert_eq!(
        (mode(&bus.dir.join("a.sock")), mode(&bus.dir.join("control.sock"))),
        (0o600, 0o600)
    );
    let bad = bus.bad(&["device", "add", "b", "--class", "venet", "--set", "socket.mode=7"]);
    assert!(bad.contains("\"socket.mode\" is no setting"), "{bad}");
    let bad = bus.bad(&["device", "add", "b", "--class", "venet", "--set", "socket={ mode = 7 }"]);
    assert!(bad.contains("\"socket.mode\" is 7; use text in quotes"), "{bad}");
    let done = run(&["device", "list"], Path::new("/nonexistent"));
    assert!(
        done.code == Some(1)
            && done.err.starts_with("error: no bus serves in /nonexistent; start one"),
        "{}",
        done.err
    );
}

/// The sockets of a supervisor of the bus, without the bus.
struct Hostile {
    quick: OwnedFd,
    slow: OwnedFd,
    child: Child,
}

impl Hostile {
    /// Starts a supervisor for a bus in `dir`.
    fn start(dir: &Path) -> Hostile {
        Hostile::start_with(dir, &[], None)
    }

    /// The same; the configuration, the file `config`, names these threads.
    fn start_with(dir: &Path, threads: &[i32], config: Option<&Path>) -> Hostile {
        let kind = SocketType::SEQPACKET;
        let flags = SocketFlags::CLOEXEC;
        let pair = || socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
        let ((slow, theirs), (quick, theirs_quick)) = (pair(), pair());
        let child = vbus().arg("supervisor").stdin(theirs).stderr(Stdio::null()).spawn().unwrap();
        let hostile = Hostile { quick, slow, child };
        let permits = json!({
            "folders": [dir],
            "vmm_folders": [dir],
            "paths": { "vmm": [dir.with_file_name("vmm")] },
            "taps": ["vbus%d"],
            "vhost": false,
            "threads": threads,
            "config": config.map(Path::as_os_str),
            "any_thread": false,
            "limits": { "classes": 0, "priority_max": 0, "nice_min": null },
        });
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let rights = [theirs_quick.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&rights));
        let bytes = permits.to_string().into_bytes();
        let message = [IoSlice::new(&bytes)];
        sendmsg(&hostile.slow, &message, &mut control, SendFlags::NOSIGNAL).unwrap();
        hostile
    }

    /// Sends bytes through one of the sockets, and returns the answer.
    fn exchange(socket: &OwnedFd, bytes: &[u8]) -> Value {
        rustix::net::send(socket, bytes, SendFlags::NOSIGNAL).unwrap();
        let mut bytes = vec![0; 64 << 10];
        let (read, _) = rustix::net::recv(socket, &mut bytes[..], RecvFlags::empty()).unwrap();
        serde_json::from_slice(&bytes[..read]).unwrap()
    }

    /// The answers to a verb on both sockets, of which one is the wrong one.
    fn ask(&self, verb: &Value) -> Value {
        let bytes = verb.to_string().into_bytes();
        let answers = [&self.slow, &self.quick].map(|socket| Self::exchange(socket, &bytes));
        let wrong = |answer: &Value| answer["refused"] == "it came to the wrong socket";
        assert!(answers.iter().any(|answer| answer["refused"].is_string()), "{verb}");
        answers.into_iter().reduce(|a, b| if wrong(&a) { b } else { a }).unwrap()
    }
}

/// A thread that runs until the sender is dropped.
fn thread() -> (i32, std::thread::JoinHandle<()>, std::sync::mpsc::Sender<()>) {
    let ((said, tid), (end, ended)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel());
    let thread = std::thread::spawn(move || {
        said.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
        let _ = ended.recv();
    });
    (tid.recv().unwrap(), thread, end)
}

#[test]
fn a_thread_that_the_configuration_names_is_not_one_that_has_its_id_later() {
    let folder = tempfile::tempdir().unwrap();
    let (tid, running, end) = thread();
    let bus = Hostile::start_with(folder.path(), &[tid], None);
    let take = || bus.ask(&json!({ "verb": "take", "process": null, "tid": tid }));
    let taken = take();
    assert!(taken["ok"].is_u64(), "{taken}");
    bus.ask(&json!({ "verb": "release", "thread": taken["ok"] }));
    drop(end);
    running.join().unwrap();
    // The kernel gives ids in order, so it can be made to give this one again.
    let last = Path::new("/proc/sys/kernel/ns_last_pid");
    for _ in 0..2000 {
        if let Err(error) = std::fs::write(last, (tid - 1).to_string()) {
            eprintln!("skipped: no id can be given again: {error}");
            return;
        }
        let (again, running, end) = thread();
        if again == tid {
            let refused = take();
            let text = refused["refused"].as_str().unwrap_or_default();
            assert!(text.contains("of the configuration has ended"), "{refused}");
            drop(end);
            running.join().unwrap();
            return;
        }
        drop(end);
        running.join().unwrap();
    }
    eprintln!("skipped: other processes took the id each time");
}

#[test]
fn a_bus_that_was_taken_over_commands_no_vmm() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("bus");
    std::fs::create_dir(&dir).unwrap();
    // This process is the VMM, for the supervisor.
    let listener = UnixListener::bind(folder.path().join("vmm")).unwrap();
    let bus = Hostile::start(&dir);
    let vmm = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let reply = [
            r#"{"QMP": {"version": {}, "capabilities": []}}"#,
            r#"{"return": {}}"#,
            r#"{"return": [{"cpu-index": 0, "thread-id": 7}]}"#,
            r#"{"return": [{"cpu-index": 0, "thread-id": 8}]}"#,
        ];
        let mut heard = BufReader::new(socket.try_clone().unwrap()).lines();
        let mut commands = Vec::new();
        for reply in reply {
            writeln!(socket, "{reply}").unwrap();
            commands.extend(heard.next().map(|line| line.unwrap()));
        }
        commands
    });
    let verb = json!({ "verb": "vmm", "path": folder.path().join("vmm"), "language": "qmp" });
    rustix::net::send(&bus.quick, verb.to_string().as_bytes(), SendFlags::NOSIGNAL).unwrap();
    let mut bytes = vec![0; 1024];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut pieces = [IoSliceMut::new(&mut bytes)];
    let got = recvmsg(&bus.quick, &mut pieces, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let answer: Value = serde_json::from_slice(&bytes[..got.bytes]).unwrap();
    assert_eq!(answer["ok"], std::process::id(), "{answer}");
    let mut ends = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            ends.extend(rights);
        }
    }
    let [end] = &ends[..] else { panic!("{} descriptors", ends.len()) };
    // Whatever it says there, the VMM is asked for its threads, and for nothing else.
    for thread in [7, 8] {
        rustix::net::send(end, b"{\"execute\": \"quit\"}\n", SendFlags::NOSIGNAL).unwrap();
        wait_readable(end);
        let (read, _) = rustix::net::recv(end, &mut bytes[..], RecvFlags::empty()).unwrap();
        let answer: Value = serde_json::from_slice(&bytes[..read]).unwrap();
        assert_eq!(answer, json!({ "cpus": [[0, thread]] }));
    }
    drop(ends);
    let commands: Vec<String> = vmm.join().unwrap();
    let names: Vec<_> = commands
        .iter()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["execute"].clone())
        .collect();
    assert_eq!(names, ["qmp_capabilities", "query-cpus-fast", "query-cpus-fast"]);
}

/// Waits until `socket` has something to read.
fn wait_readable(socket: &OwnedFd) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let bound = Timespec { tv_sec: 60, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&bound)), Ok(1));
}

#[test]
fn the_supervisor_does_nothing_that_the_configuration_does_not_allow() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("bus");
    std::fs::create_dir(&dir).unwrap();
    let outside = folder.path().join("outside");
    std::fs::write(&outside, "precious").unwrap();
    let socket = folder.path().join("socket");
    // The configuration names this socket, for a VMM.
    let vmm = folder.path().join("vmm");
    let _listeners = [&socket, &vmm].map(|path| UnixListener::bind(path).unwrap());
    let mut hostile = Hostile::start(&dir);
    let access = json!({ "owner": null, "group": null, "mode": 511 });
    for verb in [
        json!({ "verb": "create", "path": outside }),
        json!({ "verb": "create", "path": dir.join("../outside") }),
        json!({ "verb": "create", "path": "" }),
        json!({ "verb": "create", "path": "/proc/self/mem" }),
        json!({ "verb": "listen", "path": "/tmp/vbus-hostile", "backlog": 1, "access": access }),
        json!({ "verb": "connect", "path": socket }),
        json!({ "verb": "connect", "path": "/run/docker.sock" }),
        json!({ "verb": "connect", "path": vmm }),
        json!({ "verb": "create", "path": vmm }),
        json!({ "verb": "listen", "path": vmm, "backlog": 1, "access": access }),
        json!({ "verb": "vmm", "path": socket, "language": "qmp" }),
        json!({ "verb": "tap", "name": "eth0", "queues": 1, "mtu": 1500 }),
        json!({ "verb": "tap", "name": "vbus0", "queues": 1, "mtu": 1500 }),
        json!({ "verb": "tap", "name": "vbus%d", "queues": 0, "mtu": 1500 }),
        json!({ "verb": "tap", "name": "vbus%d", "queues": 17, "mtu": 1500 }),
        json!({ "verb": "take", "process": null, "tid": std::process::id() }),
        json!({ "verb": "take", "process": std::process::id(), "tid": std::process::id() }),
        json!({ "verb": "take", "process": 1, "tid": 1 }),
        json!({ "verb": "take", "process": -1, "tid": -1 }),
        json!({ "verb": "limits", "limits": { "classes": 4, "priority_max": 9, "nice_min": null } }),
        json!({ "verb": "exec", "path": "/bin/sh" }),
        json!({ "verb": "create", "path": outside, "more": 1 }),
        json!(null),
    ] {
        let answer = hostile.ask(&verb);
        assert!(answer["refused"].is_string(), "{verb}: {answer}");
    }
    for verb in [
        json!({ "verb": "set", "thread": 1, "setting": { "class": 4, "priority": 1 } }),
        json!({ "verb": "nice", "thread": 0 }),
        json!({ "verb": "restore", "thread": u64::MAX }),
    ] {
        assert_eq!(hostile.ask(&verb), json!({ "errno": 3 }), "{verb}");
    }
    for bytes in [&b"\xff\xfe"[..], b"{", &[b'['; 10_000], &[b' '; 100_000]] {
        for socket in [&hostile.slow, &hostile.quick] {
            assert!(Hostile::exchange(socket, bytes)["refused"].is_string());
        }
    }
    // These change nothing.
    for verb in ["release", "remove"] {
        let verb = json!({ "verb": verb, "thread": 7, "path": outside });
        assert!(hostile.ask(&verb)["refused"].is_string(), "an unknown key");
    }
    hostile.ask(&json!({ "verb": "remove", "path": outside }));
    assert_eq!(std::fs::read(&outside).unwrap(), b"precious");
    assert!(!Path::new("/tmp/vbus-hostile").exists());
    // It works as before, and ends with its bus.
    let path = dir.join("a.pcap");
    assert_eq!(hostile.ask(&json!({ "verb": "create", "path": path })), json!({ "ok": null }));
    assert!(path.exists());
    drop((hostile.slow, hostile.quick));
    assert!(hostile.child.wait().unwrap().success());
}

#[test]
fn a_bus_that_was_taken_over_writes_no_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("bus");
    std::fs::create_dir_all(dir.join("below")).unwrap();
    let wide = format!("[allow]\npaths = [{:?}]\n", folder.path());
    let outside = folder.path().join("outside");
    let create = |bus: &Hostile, path: &Path| bus.ask(&json!({ "verb": "create", "path": path }));
    let refused = |answer: Value, text: &str| {
        let said = answer["refused"].as_str().unwrap_or_default();
        assert!(said.contains(text), "{answer}");
    };
    // The configuration lies where the bus may overwrite files.
    let link = folder.path().join("link.toml");
    std::os::unix::fs::symlink(dir.join("below/bus.toml"), &link).unwrap();
    for (named, real) in [("bus/bus.toml", "bus.toml"), ("link.toml", "below/bus.toml")] {
        let (config, real) = (folder.path().join(named), dir.join(real));
        std::fs::write(&real, "[bus]\n").unwrap();
        let bus = Hostile::start_with(&dir, &[], Some(&config));
        refused(create(&bus, &real), "it is the configuration file of the bus");
        assert_eq!(std::fs::read(&real).unwrap(), b"[bus]\n");
        // Even if it could write the file, nothing would come of it.
        std::fs::write(&real, &wide).unwrap();
        refused(bus.ask(&json!({ "verb": "configuration" })), "move the file out of the folders");
        assert_eq!(bus.ask(&json!({ "verb": "adopt" })), json!({ "ok": null }));
        refused(create(&bus, &outside), "in [allow]");
    }
    // It lies elsewhere, but has a second name there.
    let config = folder.path().join("bus.toml");
    std::fs::write(&config, "[bus]\n").unwrap();
    std::fs::hard_link(&config, dir.join("hard")).unwrap();
    let bus = Hostile::start_with(&dir, &[], Some(&config));
    refused(create(&bus, &dir.join("hard")), "it is the configuration file of the bus");
    assert_eq!(std::fs::read(&config).unwrap(), b"[bus]\n");
    let configuration = || bus.ask(&json!({ "verb": "configuration" }));
    assert!(configuration()["ok"]["rights"].is_object());
    // What it would allow counts too, and an earlier reading is void.
    std::fs::write(&config, &wide).unwrap();
    refused(configuration(), "move the file out of the folders");
    assert_eq!(bus.ask(&json!({ "verb": "adopt" })), json!({ "ok": null }));
    refused(create(&bus, &outside), "in [allow]");
    // A FIFO does not hold the supervisor up.
    std::fs::remove_file(&config).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    let fifo = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &config, fifo, mode, 0).unwrap();
    refused(configuration(), "it is no file");
}

/// The answer of the metrics to the user STRANGER, or the error of the connection.
fn scrape(path: &Path, groups: &[u32]) -> Result<String, ErrorKind> {
    let path = path.to_owned();
    as_stranger(groups, move || {
        let mut socket = UnixStream::connect(path).map_err(|error| error.kind())?;
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        Ok(answer)
    })
}

#[test]
fn metrics_are_for_those_who_may_read() {
    if !is_root() {
        return;
    }
    let control =
        format!("[control]\nfull-access = [\"{STAFF}\"]\nread-access = [\"{READERS}\"]\n");
    let bus = Served::start(&control);
    open_way(&bus);
    let path = bus.dir.join("metrics.sock");
    for reader in [STAFF, READERS] {
        assert!(scrape(&path, &[reader]).unwrap().ends_with("# EOF\n"));
    }
    let refused = scrape(&path, &[STRANGER]).unwrap();
    assert!(refused.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{refused}");
    assert!(refused.contains("\"metrics\" needs the right \"read\", and user 54321 has \"none\""));
    drop(bus);
    // A socket with a group of its own is for that group alone.
    let bus = Served::start(&format!("{control}[metrics]\nsocket = {{ group = \"{READERS}\" }}\n"));
    open_way(&bus);
    let path = bus.dir.join("metrics.sock");
    assert_eq!(mode(&path), 0o660);
    assert!(scrape(&path, &[READERS]).unwrap().ends_with("# EOF\n"));
    assert_eq!(scrape(&path, &[STAFF]), Err(ErrorKind::PermissionDenied));
}
