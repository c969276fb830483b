//! The example's device on a bus, and its driver in a plain process: through the socket, without a
//! VM.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::Arc;
use std::time::Duration;

use vbus_core::{Bus, Executor, Trust, Tuning};
use vbus_examples::shout::{Shout, shout};
use vbus_vfio_user::{DeviceServer, MEMORY_BYTES, Process};

#[test]
fn the_text_comes_back_in_capitals() {
    let dir = tempfile::tempdir().unwrap();
    let bus = Bus::new(Executor::start(Tuning::default()).unwrap(), Vec::new(), Trust::Sealed);
    let endpoint = bus.add("shout0", Arc::new(Shout)).unwrap();
    let server =
        DeviceServer::start(endpoint.clone(), &dir.path().join("shout0.sock"), Default::default())
            .unwrap();
    for text in ["hello", "once more, with feeling", ""] {
        let process = Process::connect(server.path(), MEMORY_BYTES).unwrap();
        let woken = process.clone();
        let wait = move || assert!(woken.wait(Duration::from_secs(60)), "no interrupt");
        assert_eq!(shout(process, text, wait), Ok(text.to_uppercase()));
    }
    assert_eq!(endpoint.counters().opens.get(), 3);
}
