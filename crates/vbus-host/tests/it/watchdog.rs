// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A class that blocks: the log says so, and systemd hears nothing until it goes on.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vbus_core::{
    Connection, CreateError, Device, DeviceClass, ErrorCode, Identity, Open, Progress, Region,
};
use vbus_driver::Function;
use vbus_host::Program;
use vbus_process::{MEMORY_BYTES, Process};

use crate::SUPERVISOR;

const TIMEOUT: Duration = Duration::from_secs(60);
/// The directory of the test, for the child process that serves the bus.
const DIRECTORY: &str = "VBUS_TEST_DIRECTORY";

/// A class whose connection blocks in its first poll until the file `go` exists.
struct Blocks;

struct Used;

impl DeviceClass for Blocks {
    fn name(&self) -> &'static str {
        "blocks"
    }

    fn help(&self) -> &'static str {
        "blocks"
    }

    fn create(&self, _: &str, _: &serde_json::Value) -> Result<Arc<dyn Device>, CreateError> {
        Ok(Arc::new(Blocks))
    }
}

impl Device for Blocks {
    fn identity(&self) -> Identity {
        Identity::user("blocks")
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(Used))
    }
}

impl Connection for Used {
    fn region_added(&mut self, _: Region) -> Result<(), ErrorCode> {
        Ok(())
    }

    fn poll(&mut self, _: u32) -> Result<Progress, ErrorCode> {
        let go = directory().join("go");
        while !go.exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Progress::Idle)
    }
}

fn directory() -> PathBuf {
    std::env::var_os(DIRECTORY).unwrap().into()
}

/// The program that the test below starts.
#[test]
#[ignore = "serves a bus until it is killed"]
fn serves() {
    let directory = directory();
    let config = directory.join("bus.toml");
    std::fs::write(&config, "[[device]]\nname = \"slow0\"\nclass = \"blocks\"\n").unwrap();
    let dir = directory.join("bus");
    let program = Program::new("test", "1").class(Blocks).supervisor_args(SUPERVISOR);
    let args: [&Path; 6] =
        ["test".as_ref(), "serve".as_ref(), "--config".as_ref(), &config, "--dir".as_ref(), &dir];
    program.run_from(args);
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_class_that_blocks_is_logged_and_systemd_is_not_told_that_all_is_well() {
    let folder = tempfile::tempdir().unwrap();
    let manager = UnixDatagram::bind(folder.path().join("manager")).unwrap();
    manager.set_read_timeout(Some(TIMEOUT)).unwrap();
    let log = folder.path().join("log");
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "watchdog::serves", "--nocapture"])
        .env(DIRECTORY, folder.path())
        .env("NOTIFY_SOCKET", folder.path().join("manager"))
        .env("WATCHDOG_USEC", "2000000")
        .env_remove("WATCHDOG_PID")
        .stderr(std::fs::File::create(&log).unwrap())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let _child = Killed(child);
    let told = || {
        let mut text = [0; 64];
        let length = manager.recv(&mut text).unwrap();
        String::from_utf8(text[..length].to_vec()).unwrap()
    };
    assert_eq!(told(), "READY=1");
    assert_eq!(told(), "WATCHDOG=1");

    let process = Process::connect(folder.path().join("bus/slow0.sock"), MEMORY_BYTES).unwrap();
    let mut function = Function::probe(process).unwrap();
    function.open(0).unwrap();
    let logged = || std::fs::read_to_string(&log).unwrap();
    let begin = Instant::now();
    while !logged().contains("has not come round") {
        assert!(begin.elapsed() < TIMEOUT, "{}", logged());
        std::thread::sleep(Duration::from_millis(20));
    }
    let text = logged();
    let line = text.lines().find(|line| line.contains("has not come round")).unwrap();
    assert!(line.contains("slow0") && line.contains("the connection"), "{line}");

    manager.set_nonblocking(true).unwrap();
    while manager.recv(&mut [0; 64]).is_ok() {} // What came before.
    std::thread::sleep(Duration::from_millis(1200));
    assert!(manager.recv(&mut [0; 64]).is_err(), "all is well, it says");
    manager.set_nonblocking(false).unwrap();
    std::fs::write(folder.path().join("go"), "").unwrap();
    assert_eq!(told(), "WATCHDOG=1");
    assert_eq!(logged().matches("has not come round").count(), 1, "{}", logged());
}
