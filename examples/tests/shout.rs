// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs the examples' devices on a bus, and their drivers in an ordinary process, through the
//! socket and without a VM.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::Arc;
use std::time::Duration;

use vbus_core::{Bus, Device, Executor, Tuning, service};
use vbus_driver::Error;
use vbus_examples::{shout, shout_by_hand};
use vbus_process::{MEMORY_BYTES, Process};
use vbus_vfio_user::DeviceServer;

/// Sends texts through a driver, which gets an environment and a way to wait.
fn check(
    device: Arc<dyn Device>,
    driver: impl Fn(Process, &str, &mut dyn FnMut() -> bool) -> Result<String, Error>,
) {
    let dir = tempfile::tempdir().unwrap();
    let bus = Bus::new(Executor::start(Tuning::default()).unwrap(), Vec::new());
    let endpoint = bus.add("shout0", device).unwrap();
    let path = dir.path().join("shout0.sock");
    let server = DeviceServer::start(endpoint.clone(), &path, Default::default()).unwrap();
    for text in ["hello", "once more, with feeling", ""] {
        let process = Process::connect(server.path(), MEMORY_BYTES).unwrap();
        let woken = process.clone();
        let mut wait = move || woken.wait(Duration::from_secs(60));
        assert_eq!(driver(process, text, &mut wait), Ok(text.to_uppercase()));
    }
    assert_eq!(endpoint.counters().opens.get(), 3);
}

#[test]
fn the_text_comes_back_in_capitals() {
    check(service::device(shout::Shout).unwrap(), |process, text, wait| {
        shout::shout(process, text, wait)
    });
}

#[test]
fn by_hand_it_does_too() {
    check(Arc::new(shout_by_hand::Shout), |process, text, wait| {
        shout_by_hand::shout(process, text, || assert!(wait(), "no interrupt"))
    });
}
