//! Tests of the device and its driver, with the driver in a process and in a real guest.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// The folder of vbus. Its kit makes guests.
const VBUS: &str = "../..";

/// A running `my-device-host serve`, which ends with the test.
struct Served {
    child: Child,
    folder: tempfile::TempDir,
}

impl Served {
    fn start() -> Served {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut child = Command::new(env!("CARGO_BIN_EXE_my-device-host"))
            .args(["serve", "--config", "bus.toml", "--ready-fd", "1", "--dir"])
            .arg(folder.path().join("bus"))
            .stdout(Stdio::piped())
            .spawn()
            .expect("the host's program runs");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("is piped"))
            .read_line(&mut line)
            .expect("the host's program says that it is ready");
        assert_eq!(line, "READY=1\n");
        Served { child, folder }
    }

    fn dir(&self) -> PathBuf {
        self.folder.path().join("bus")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end and returns what it printed.
fn output(command: &mut Command) -> String {
    let output = command.stderr(Stdio::inherit()).output().expect("the program runs");
    assert!(output.status.success(), "{command:?} ended with {}", output.status);
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn a_process_drives_the_device() {
    let bus = Served::start();
    let answer = output(
        Command::new(env!("CARGO_BIN_EXE_my-device-guest"))
            .arg("--socket")
            .arg(bus.dir().join("my-device0.sock"))
            .arg("hello"),
    );
    assert_eq!(answer, "HELLO!\n");
    let count = output(
        Command::new(env!("CARGO_BIN_EXE_my-device-host"))
            .args(["device", "request", "my-device0", r#"{"op": "count"}"#, "--json", "--dir"])
            .arg(bus.dir()),
    );
    assert_eq!(count, "{\"count\":1}\n");
}

#[test]
#[ignore = "takes a virtual machine, which the kit of vbus makes: cargo test -- --ignored"]
fn a_guest_drives_the_device() {
    let bus = Served::start();
    let answer = output(
        Command::new(env!("CARGO"))
            .args(["xtask", "guest", "--run", "my-device-guest hello"])
            .args(["--put", env!("CARGO_BIN_EXE_my-device-guest"), "--dir"])
            .arg(bus.dir())
            .current_dir(VBUS)
            .env_remove("CARGO_TARGET_DIR")
            .stdin(Stdio::null()),
    );
    assert_eq!(answer.trim_end(), "HELLO!");
}
