// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus-guest net --all` in a plain process, while NICs come to a bus and go. It makes TAP
//! interfaces, so this test needs root.

use std::fs::File;
use std::process::Child;

use crate::support::{Served, vbus_guest, wait_until};

/// A driver process, which ends with the test.
struct Driver(Child);

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn state(bus: &Served, name: &str) -> String {
    bus.json(&["device", "show", name])["state"].as_str().unwrap().to_owned()
}

#[test]
fn a_driver_follows_nics_that_come_and_go() {
    let tap = File::options().read(true).write(true).open("/dev/net/tun");
    if tap.is_err() || !rustix::process::geteuid().is_root() {
        eprintln!("skipped: making an interface needs root and /dev/net/tun");
        return;
    }
    let bus = Served::start("");
    let add = |name: &str| {
        bus.good(&["device", "add", name, "--class", "venet", "--set", "backend=null"])
    };
    let mut driver =
        Driver(vbus_guest().args(["net", "--all", "--dir"]).arg(&bus.dir).spawn().unwrap());
    add("net0");
    wait_until("the first NIC is driven", || state(&bus, "net0") == "open");
    add("net1");
    bus.good(&[
        "device",
        "add",
        "values",
        "--class",
        "state",
        "--set",
        r#"pages=[{name="a",bytes=8,owner="device"}]"#,
    ]);
    wait_until("the second NIC is driven", || state(&bus, "net1") == "open");

    bus.good(&["device", "remove", "net0", "--force"]);
    add("net0");
    wait_until("the first NIC is driven when it comes back", || state(&bus, "net0") == "open");
    let other = bus.json(&["device", "show", "net1"]);
    assert_eq!(
        (other["state"].as_str(), other["counters"]["opens"].as_u64()),
        (Some("open"), Some(1))
    );
    assert_eq!(state(&bus, "values"), "closed", "a device of another class is left alone");
    assert!(driver.0.try_wait().unwrap().is_none(), "the driver goes on");

    rustix::process::kill_process(
        rustix::process::Pid::from_child(&driver.0),
        rustix::process::Signal::TERM,
    )
    .unwrap();
    assert!(driver.0.wait().unwrap().success(), "the driver ends well");
    wait_until("the driver has closed its connections", || {
        state(&bus, "net0") == "closed" && state(&bus, "net1") == "closed"
    });
}
