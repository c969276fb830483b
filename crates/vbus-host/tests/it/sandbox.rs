// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a bus that was taken over can do: a device class of this test makes, in the process of the
//! bus, the calls that an intruder would make, and reports how each ends.
#![allow(unsafe_code, reason = "the calls of an intruder are raw system calls")]

use std::ffi::CString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::{Value, json};
use vbus_core::{Connection, CreateError, Device, DeviceClass, ErrorCode, Identity, Open};
use vbus_host::{Program, Sandbox};

use crate::SUPERVISOR;

/// The arguments of the program for the process that serves the bus, in JSON.
const ARGS: &str = "VBUS_TEST_ARGS";
/// The name of its sandbox.
const KIND: &str = "VBUS_TEST_SANDBOX";

/// The class of the intruder.
struct Intruder;

impl DeviceClass for Intruder {
    fn name(&self) -> &'static str {
        "intruder"
    }

    fn help(&self) -> &'static str {
        "Makes the calls of an intruder."
    }

    fn create(&self, _: &str, _: &Value) -> Result<Arc<dyn Device>, CreateError> {
        Ok(Arc::new(Intruder))
    }

    fn files(&self, config: &Value) -> Vec<PathBuf> {
        config["list"][0]["disk"].as_str().map(PathBuf::from).into_iter().collect()
    }
}

impl Device for Intruder {
    fn identity(&self) -> Identity {
        Identity::user("intruder")
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Err(ErrorCode::DENIED)
    }

    /// `{"open": PATH}` opens a file to read, and replies with the error number, or 0. Any other
    /// request makes all calls of [`attempts`], and replies with an object of the error numbers.
    fn control(&self, request: &Value, reply: &mut dyn FnMut(Value) -> bool) -> Result<(), String> {
        let value = match request["open"].as_str() {
            Some(path) => json!(errno(File::open(path))),
            None => {
                let other = i32::try_from(request["other"].as_i64().unwrap_or(0)).unwrap_or(0);
                let errors = attempts(other).into_iter();
                errors.map(|(name, error)| (name.to_owned(), json!(error))).collect()
            }
        };
        reply(value);
        Ok(())
    }
}

fn errno<T>(result: std::io::Result<T>) -> i32 {
    result.err().and_then(|error| error.raw_os_error()).unwrap_or(0)
}

/// Makes calls that must fail. `other` is another process of the same user. Returns the name of
/// each call with its error number, 0 if it succeeded.
fn attempts(other: i32) -> Vec<(&'static str, i32)> {
    let other = i64::from(other);
    let path = |text: &str| CString::new(text).unwrap();
    let (passwd, shell, folder) = (path("/etc/passwd"), path("/bin/sh"), path("/tmp"));
    let argv = [shell.as_ptr(), std::ptr::null()];
    let (at, read) = (i64::from(libc::AT_FDCWD), i64::from(libc::O_RDONLY));
    let write = i64::from(libc::O_WRONLY | libc::O_CREAT);
    let text = |text: &CString| text.as_ptr() as i64;
    let unix = i64::from(libc::AF_UNIX);
    let stream = i64::from(libc::SOCK_STREAM);
    let mut pair = [0i32; 2];
    let mut byte = 0u8;
    let piece = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let executable = i64::from(libc::PROT_READ | libc::PROT_EXEC);
    let private = i64::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let zeros = [0u8; 256];
    let zeros = zeros.as_ptr() as i64;
    let created = path("/tmp/vbus-intruder");
    let calls: &[(&'static str, i64, [i64; 6])] = &[
        ("open", libc::SYS_openat, [at, text(&passwd), read, 0, 0, 0]),
        ("create", libc::SYS_openat, [at, text(&created), write, 0o600, 0, 0]),
        #[cfg(target_arch = "x86_64")]
        ("open by the old call", libc::SYS_open, [text(&passwd), read, 0, 0, 0, 0]),
        ("openat2", libc::SYS_openat2, [at, text(&passwd), zeros, 24, 0, 0]),
        ("unlink", libc::SYS_unlinkat, [at, text(&created), 0, 0, 0, 0]),
        ("chmod", libc::SYS_fchmodat, [at, text(&created), 0o777, 0, 0, 0]),
        ("chdir", libc::SYS_chdir, [text(&folder), 0, 0, 0, 0, 0]),
        ("socket of UNIX", libc::SYS_socket, [unix, stream, 0, 0, 0, 0]),
        ("socket of INET", libc::SYS_socket, [i64::from(libc::AF_INET), stream, 0, 0, 0, 0]),
        ("netlink", libc::SYS_socket, [i64::from(libc::AF_NETLINK), 3, 0, 0, 0, 0]),
        ("socketpair", libc::SYS_socketpair, [unix, stream, 0, (&raw mut pair) as i64, 0, 0]),
        ("connect", libc::SYS_connect, [0, zeros, 16, 0, 0, 0]),
        ("bind", libc::SYS_bind, [0, zeros, 16, 0, 0, 0]),
        ("exec", libc::SYS_execve, [text(&shell), argv.as_ptr() as i64, 0, 0, 0, 0]),
        ("execveat", libc::SYS_execveat, [at, text(&shell), argv.as_ptr() as i64, 0, 0, 0]),
        ("trace me", libc::SYS_ptrace, [0, 0, 0, 0, 0, 0]),
        ("trace", libc::SYS_ptrace, [i64::from(libc::PTRACE_ATTACH), other, 0, 0, 0, 0]),
        (
            "read memory",
            libc::SYS_process_vm_readv,
            [other, (&raw const piece) as i64, 1, (&raw const piece) as i64, 1, 0],
        ),
        ("kill", libc::SYS_kill, [other, 0, 0, 0, 0, 0]),
        ("tgkill", libc::SYS_tgkill, [other, other, 0, 0, 0, 0]),
        ("pidfd", libc::SYS_pidfd_open, [other, 0, 0, 0, 0, 0]),
        ("sched_setattr", libc::SYS_sched_setattr, [other, zeros, 0, 0, 0, 0]),
        ("setpriority", libc::SYS_setpriority, [0, other, 5, 0, 0, 0]),
        ("limits of another", libc::SYS_prlimit64, [other, 7, 0, zeros, 0, 0]),
        ("own signals to another", libc::SYS_fcntl, [0, i64::from(libc::F_SETOWN), other, 0, 0, 0]),
        ("process", libc::SYS_clone, [i64::from(libc::SIGCHLD), 0, 0, 0, 0, 0]),
        ("namespace", libc::SYS_unshare, [i64::from(libc::CLONE_NEWUSER), 0, 0, 0, 0, 0]),
        ("executable memory", libc::SYS_mmap, [0, 4096, executable, private, -1, 0]),
        ("mount", libc::SYS_mount, [zeros, text(&folder), zeros, 0, 0, 0]),
        ("user", libc::SYS_setuid, [0, 0, 0, 0, 0, 0]),
        ("terminal input", libc::SYS_ioctl, [0, 0x5412, zeros, 0, 0, 0]),
        ("io_uring", libc::SYS_io_uring_setup, [1, zeros, 0, 0, 0, 0]),
        ("bpf", libc::SYS_bpf, [0, zeros, 16, 0, 0, 0]),
        ("perf", libc::SYS_perf_event_open, [zeros, 0, -1, -1, 0, 0]),
        ("keys", libc::SYS_keyctl, [0, 0, 0, 0, 0, 0]),
        ("filter of packets", libc::SYS_setsockopt, [0, 1, 26, zeros, 16, 0]),
        ("dumpable", libc::SYS_prctl, [4, 1, 0, 0, 0, 0]),
    ];
    let attempt = |(name, number, [a, b, c, d, e, f]): (&'static str, i64, [i64; 6])| {
        // SAFETY: each call gets pointers to memory that lives until the end of this function and
        // is large enough, or numbers. The calls that would replace or double this process are
        // what the test is about: it has failed if one of them succeeds.
        let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
        let error = if result < 0 { errno::<()>(Err(std::io::Error::last_os_error())) } else { 0 };
        if name == "process" && result == 0 {
            // The new process has the state of one thread only. It must not go on.
            // SAFETY: the call ends the process.
            unsafe { libc::_exit(0) };
        }
        (name, error)
    };
    calls.iter().copied().map(attempt).collect()
}

/// The program that the tests below start.
#[test]
#[ignore = "serves a bus until it is killed"]
fn serves() {
    let args: Vec<String> = serde_json::from_str(&std::env::var(ARGS).unwrap()).unwrap();
    let sandbox = match std::env::var(KIND).unwrap().as_str() {
        "configured" => Sandbox::default().configured_files(),
        "hostname" => Sandbox::default().read("/etc/hostname").system_call(libc::SYS_ptrace),
        _ => Sandbox::default(),
    };
    let program = Program::new("test", "1").class(Intruder).supervisor_args(SUPERVISOR);
    program.sandbox(sandbox).run_from([&["test".to_owned()][..], &args].concat());
}

/// A bus with the intruder, which ends with the test.
struct Bus {
    child: Child,
    folder: tempfile::TempDir,
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Bus {
    /// Starts a bus with this kind of sandbox, more arguments of `serve`, and as the user `uid` if
    /// it is given.
    fn start(kind: &str, more: &[&str], uid: Option<u32>) -> Bus {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("bus.toml");
        let text = format!(
            "[allow]\npaths = [{:?}]\n[[device]]\nname = \"i\"\nclass = \"intruder\"\n\
             list = [{{ disk = {:?} }}]\nlabel = {:?}\n",
            folder.path().join("allowed"),
            folder.path().join("other/named"),
            folder.path().join("other/label")
        );
        std::fs::write(&config, text).unwrap();
        for name in ["allowed", "other"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            std::fs::write(folder.path().join(name).join("file"), "x").unwrap();
            std::fs::write(folder.path().join(name).join("named"), "x").unwrap();
            std::fs::write(folder.path().join(name).join("label"), "x").unwrap();
        }
        let dir = folder.path().join("bus");
        let (config, dir) = (config.to_str().unwrap(), dir.to_str().unwrap());
        let mut args = vec!["serve", "--config", config, "--dir", dir, "--ready-fd", "0"];
        args.extend(more);
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let mut program = std::env::current_exe().unwrap();
        if uid.is_some() {
            // Another user may be unable to enter the folder of this program.
            let copy = folder.path().join("program");
            // By a process of its own: a child of another test could hold this one's descriptor of
            // the copy, and the kernel runs no file that somebody can write.
            assert!(Command::new("cp").arg(program).arg(&copy).status().unwrap().success());
            program = copy;
        }
        let mut command = Command::new(program);
        command
            .args(["--ignored", "--exact", "sandbox::serves", "--nocapture"])
            .env(ARGS, serde_json::to_string(&args).unwrap())
            .env(KIND, kind)
            .env_remove("NOTIFY_SOCKET")
            .stdout(Stdio::null())
            .stderr(File::create(folder.path().join("log")).unwrap());
        command.stdin(writer);
        if let Some(uid) = uid {
            std::os::unix::fs::chown(folder.path(), Some(uid), Some(uid)).unwrap();
            command.uid(uid).gid(uid);
        }
        let child = command.spawn().unwrap();
        drop(command);
        let bus = Bus { child, folder };
        let mut line = String::new();
        BufReader::new(File::from(reader)).read_line(&mut line).unwrap();
        assert_eq!(line, "READY=1\n", "{}", bus.log());
        bus
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Sends a request to the control socket, and returns the answers.
    fn ask(&self, request: &Value) -> Vec<Value> {
        let mut socket = UnixStream::connect(self.path("bus/control.sock")).unwrap();
        socket.write_all(format!("{request}\n").as_bytes()).unwrap();
        let mut answers = Vec::new();
        for line in BufReader::new(socket).lines() {
            answers.push(serde_json::from_str::<Value>(&line.unwrap()).unwrap());
            if answers.last().is_some_and(|answer| answer.get("item").is_none()) {
                break;
            }
        }
        answers
    }

    /// The intruder's reply to `request`.
    fn intruder(&self, request: &Value) -> Value {
        let answers = self.ask(&json!({ "op": "device", "name": "i", "request": request }));
        answers[0]["item"].clone()
    }

    /// The error number of opening a file to read.
    fn opens(&self, path: &Path) -> i64 {
        self.intruder(&json!({ "open": path })).as_i64().unwrap()
    }

    /// The values of `key` in the status of each thread of the bus.
    fn statuses(&self, key: &str) -> Vec<String> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let value = |task: std::fs::DirEntry| {
            let text = std::fs::read_to_string(task.path().join("status")).ok()?;
            let value = text.lines().find_map(|line| line.strip_prefix(key))?.trim().to_owned();
            Some((text, value))
        };
        // The main thread is that of the test's harness, which has started the bus on another.
        let main = format!("Pid:\t{}\n", self.child.id());
        let all = tasks.flatten().filter_map(value);
        all.filter(|(text, _)| !text.contains(&main)).map(|(_, value)| value).collect()
    }
}

const EPERM: i64 = libc::EPERM as i64;
const EACCES: i64 = libc::EACCES as i64;

/// Whether the kernel has Landlock, by the bus's own report.
fn has_landlock(info: &Value) -> bool {
    let landlock = !info["sandbox"]["landlock"].is_null();
    if !landlock {
        eprintln!("skipped: the kernel has no Landlock");
    }
    landlock
}

/// Starts a bus as each user that this test can act as.
fn as_each_user(kind: &str, test: impl Fn(&Bus, bool)) {
    test(&Bus::start(kind, &[], None), rustix::process::geteuid().is_root());
    if rustix::process::geteuid().is_root() {
        test(&Bus::start(kind, &[], Some(54_321)), false);
    } else {
        eprintln!("skipped: only root can start a bus as another user");
    }
}

#[test]
fn an_intruder_gets_nothing_new() {
    as_each_user("strict", |bus, is_root| {
        // This process has the same user as the bus, or the test's own child has.
        let other = std::process::id();
        let errors = bus.intruder(&json!({ "other": other }));
        let errors = errors.as_object().unwrap();
        assert!(errors.len() > 30, "{errors:?}");
        let wrong: Vec<_> = errors.iter().filter(|(_, error)| **error != EPERM).collect();
        assert!(wrong.is_empty(), "{wrong:?}");
        // The bus is still there, and its files are not.
        let info = bus.ask(&json!({ "op": "info" })).remove(0)["ok"].take();
        let sandbox = &info["sandbox"];
        for protection in ["no-capabilities", "no-new-privs", "seccomp"] {
            assert_eq!(sandbox[protection], true, "{sandbox}");
        }
        assert!(!Path::new("/tmp/vbus-intruder").exists());
        let all = |key: &str, value: &str| {
            let values = bus.statuses(key);
            assert!(values.len() > 1, "the bus has threads");
            assert!(values.iter().all(|found| found == value), "{key} {values:?}");
        };
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            all(set, "0000000000000000");
        }
        if is_root {
            all("CapBnd:", "0000000000000000");
        }
        all("NoNewPrivs:", "1");
        all("Seccomp:", "2");
        assert!(bus.log().contains("sandbox: no capabilities, no new privileges, filter"));
    });
}

#[test]
fn classes_can_do_what_their_program_asks_for() {
    let file = |bus: &Bus, name: &str| bus.opens(&bus.path(name).join("file"));
    let info = |bus: &Bus| bus.ask(&json!({ "op": "info" })).remove(0)["ok"].take();
    as_each_user("configured", |bus, _| {
        assert_eq!(file(bus, "allowed"), 0);
        assert_eq!(bus.opens(&bus.path("other/named")), 0, "the configuration names it");
        if has_landlock(&info(bus)) {
            assert_eq!(file(bus, "other"), EACCES);
            // A text that happens to be a path is no file that the class opens.
            assert_eq!(bus.opens(&bus.path("other/label")), EACCES);
            assert_eq!(bus.opens(Path::new("/etc/passwd")), EACCES);
        }
    });
    as_each_user("hostname", |bus, _| {
        assert_eq!(bus.opens(Path::new("/etc/hostname")), 0);
        if has_landlock(&info(bus)) {
            assert_eq!(file(bus, "allowed"), EACCES);
        }
    });
    as_each_user("strict", |bus, _| assert_eq!(file(bus, "allowed"), EPERM));
}

/// What a reload with another folder in `[allow]` says of `[allow]`: what it did, what it needs.
fn reload_with_another_folder(bus: &Bus) -> Vec<(String, Value)> {
    let path = bus.path("bus.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let (allowed, other) = (bus.path("allowed"), bus.path("other"));
    let paths = format!("paths = [{allowed:?}]");
    assert!(text.contains(&paths), "{text}");
    std::fs::write(&path, text.replace(&paths, &format!("paths = [{other:?}]"))).unwrap();
    let mut answers = bus.ask(&json!({ "op": "reload" }));
    let report = answers.pop().unwrap()["ok"].take();
    let lines = |key: &str| report[key].as_array().unwrap_or_else(|| panic!("{report}")).clone();
    let mut all = Vec::new();
    for did in ["changed", "kept", "failed"] {
        let of = lines(did).into_iter().filter(|line| line["subject"] == "allow");
        all.extend(of.map(|line| (did.to_owned(), line["needs"].clone())));
    }
    all
}

#[test]
fn a_reload_says_that_the_folders_of_the_programs_own_classes_stay() {
    let file = |bus: &Bus, name: &str| bus.opens(&bus.path(name).join("file"));
    let bus = Bus::start("configured", &[], None);
    let info = bus.ask(&json!({ "op": "info" })).remove(0)["ok"].take();
    let changed = ("changed".to_owned(), Value::Null);
    if has_landlock(&info) {
        let kept = ("kept".to_owned(), json!("restart"));
        assert_eq!(reload_with_another_folder(&bus), [changed.clone(), kept]);
        assert_eq!((file(&bus, "allowed"), file(&bus, "other")), (0, EACCES));
    }
    // A program whose classes open nothing has nothing that stays.
    let bus = Bus::start("strict", &[], None);
    assert_eq!(reload_with_another_folder(&bus), [changed]);
}

#[test]
fn no_sandbox_says_what_is_lost() {
    let bus = Bus::start("strict", &["--no-sandbox"], None);
    assert_eq!(bus.opens(Path::new("/etc/passwd")), 0, "the intruder of this test works");
    let info = bus.ask(&json!({ "op": "info" })).remove(0)["ok"].take();
    assert_eq!(info["sandbox"]["seccomp"], false);
    assert!(bus.log().contains("--no-sandbox: a client that takes this process over"));
}
