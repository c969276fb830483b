// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Output that fails, blocks, or is closed, and the budgets of the log.
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{Served, TIMEOUT, TWO, run, vbus, wait_until};

/// Breaks the protocol of the device's socket `count` times. Each time is a line of the log.
fn violate(bus: &std::path::Path, device: &str, count: usize) {
    for _ in 0..count {
        let mut client = UnixStream::connect(bus.join(format!("{device}.sock"))).unwrap();
        client.set_read_timeout(Some(TIMEOUT)).unwrap();
        let _ = client.write_all(&[0xff; 64]);
        let _ = client.read_to_end(&mut Vec::new());
    }
}

/// Runs `vbus` with the shell's redirections `how`.
fn shell(how: &str, words: &[&str], bus: &Served) -> std::process::Output {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("exec \"$@\" {how}"), "sh", env!("CARGO_BIN_EXE_vbus")]);
    shell.args(words).arg("--dir").arg(&bus.dir).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (config, dir) = (folder.path().join("bus.toml"), folder.path().join("bus"));
    std::fs::write(&config, TWO).unwrap();
    // The pipe is full from the start, and nobody reads it.
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
    rustix::fs::fcntl_setfl(&writer, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
    rustix::fs::fcntl_setfl(&writer, flags).unwrap();
    let mut serve = vbus();
    serve.args(["serve", "--ready-fd", "1", "--config"]).arg(&config).arg("--dir").arg(&dir);
    let mut serve = serve.stdout(Stdio::piped()).stderr(writer).spawn().unwrap();
    let mut ready = String::new();
    BufReader::new(serve.stdout.take().unwrap()).read_line(&mut ready).unwrap();
    assert_eq!(ready, "READY=1\n");
    // More lines than the pipe takes, from a worker and from threads of control clients.
    violate(&dir, "net0", 300);
    for number in 0..10 {
        let name = format!("more{number}");
        let add = ["device", "add", &name, "--class", "venet", "--set", "backend=null"];
        assert_eq!(run(&add, &dir).code, Some(0));
        assert_eq!(run(&["device", "remove", &name], &dir).code, Some(0));
    }
    kill_process(Pid::from_child(&serve), Signal::TERM).unwrap();
    assert!(serve.wait().unwrap().success());
    drop(reader);
}

#[test]
fn a_log_whose_reader_goes_away_stops_nothing() {
    let mut serve = vbus();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("bus");
    serve.arg("serve").arg("--dir").arg(&dir).stderr(Stdio::piped());
    let mut serve = serve.spawn().unwrap();
    drop(serve.stderr.take());
    let add = ["device", "add", "a", "--class", "venet", "--set", "backend=null"];
    wait_until("the bus", || run(&["device", "list"], &dir).code == Some(0));
    assert_eq!(run(&add, &dir).code, Some(0));
    violate(&dir, "a", 20);
    assert_eq!(run(&["device", "list"], &dir).code, Some(0));
    kill_process(Pid::from_child(&serve), Signal::TERM).unwrap();
    assert!(serve.wait().unwrap().success());
}

#[test]
fn a_log_on_a_full_disk_stops_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("bus");
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut serve = vbus();
    serve.arg("serve").arg("--dir").arg(&dir).stderr(full());
    let mut serve = serve.spawn().unwrap();
    wait_until("the bus without a log", || run(&["device", "list"], &dir).code == Some(0));
    assert_eq!(run(&["device", "add", "a", "--class", "venet"], &dir).code, Some(0));
    violate(&dir, "a", 20);
    // The exit code of a command tells of an error that cannot be written.
    let failed = vbus().args(["stats", "nothing", "--dir"]).arg(&dir).stderr(full()).status();
    assert_eq!(failed.unwrap().code(), Some(1));
    kill_process(Pid::from_child(&serve), Signal::TERM).unwrap();
    assert!(serve.wait().unwrap().success());
}

#[test]
fn a_capture_on_a_fifo_stops_neither_the_bus_nor_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let config = format!("{TWO}pcap = {fifo:?}\n");
    for is_read in [false, true] {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
        let reader = is_read.then(|| rustix::fs::open(&fifo, flags, mode).unwrap());
        let mut bus = Served::start(&config);
        assert_eq!(bus.devices(), ["net0", "net1"]);
        let log = std::fs::read_to_string(&bus.log).unwrap();
        assert_eq!(log.contains("nobody reads the capture's FIFO yet"), !is_read, "{log}");
        bus.signal(Signal::TERM);
        assert!(bus.child.wait().unwrap().success());
        drop(reader);
    }
}

#[test]
fn one_client_cannot_hide_what_another_does() {
    let bus = Served::start(TWO);
    let mut violations = 1500;
    violate(&bus.dir, "net0", violations);
    violate(&bus.dir, "net1", 1);
    let log = || std::fs::read_to_string(&bus.log).unwrap();
    let lines = |text: &str, of: &str| {
        log().lines().filter(|line| line.contains(text) && line.contains(of)).count()
    };
    wait_until("the line about net1", || lines("ended", "device=\"net1\"") == 1);
    // A slow machine may take more than one period for the first ones.
    wait_until("the count", || {
        violate(&bus.dir, "net0", 20);
        violations += 20;
        lines("lines suppressed", "device=\"net0\"") > 0
    });
    assert!(lines("ended", "device=\"net0\"") < violations, "lines are suppressed");
    assert_eq!(lines("lines suppressed", "device=\"net1\""), 0);
}

#[test]
fn results_that_cannot_be_written_are_failures() {
    let bus = Served::start(&format!(
        "{TWO}\n[[device]]\nname = \"values\"\nclass = \"state\"\n\
         pages = [{{ name = \"p\", bytes = 8, owner = \"device\" }}]\n"
    ));
    bus.good(&["state", "set", "values", "p", "7"]);
    let config = bus.log.with_file_name("bus.toml");
    let without_dir: [&[&str]; 5] = [
        &["config", "check", config.to_str().unwrap()],
        &["--help"],
        &["--version"],
        &["serve", "--help"],
        &["help"],
    ];
    let commands: [&[&str]; 10] = [
        &["device", "list"],
        &["device", "list", "--json"],
        &["device", "show", "net0"],
        &["device", "classes"],
        &["device", "request", "values", r#"{"op":"list"}"#],
        &["stats"],
        &["stats", "--json"],
        &["state", "list", "values"],
        &["state", "get", "values", "p"],
        &["qemu-args"],
    ];
    for (redirect, reason) in [(">/dev/full", "No space left"), (">&-", "it is closed")] {
        let check = |output: std::process::Output, words: &[&str]| {
            let err = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(1), "{words:?} {redirect}: {err}");
            let expect = format!("error: cannot write to standard output: {reason}");
            assert!(err.starts_with(&expect), "{words:?} {redirect}: {err}");
        };
        for words in commands {
            check(shell(redirect, words, &bus), words);
        }
        for words in without_dir {
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("exec \"$@\" {redirect}"), "sh"]);
            shell.arg(env!("CARGO_BIN_EXE_vbus")).args(words);
            check(shell.output().unwrap(), words);
        }
    }
    // A reader that goes early is no error, and no message.
    for words in commands {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let mut command = vbus();
        command.args(words).arg("--dir").arg(&bus.dir).stdout(writer);
        let done = command.stderr(Stdio::piped()).output().unwrap();
        assert!(done.status.success() && done.stderr.is_empty(), "{words:?}: {done:?}");
    }
    // A closed standard error loses the message, not the exit code.
    assert_eq!(shell("2>&-", &["device", "show", "none"], &bus).status.code(), Some(1));
    assert!(shell("2>&-", &["device", "list"], &bus).status.success());
}
