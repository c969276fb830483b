// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the fuzz targets need of this crate's inside. It exists with the feature `fuzzing` alone.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Map, Value};
use vbus_core::{Bus, Executor, Tuning};

use crate::access::{Access, Accounts};
use crate::config::{self, Config, DeviceSpec};
use crate::rights::ControlSpec;
use crate::sandbox::Protections;
use crate::serve::control::Acceptor;
use crate::serve::host::Host;
use crate::serve::inherited::Inherited;
use crate::serve::reload::Reloader;
use crate::supervisor::{self, AllowSpec, Permits, Supervisor};
use crate::{classes, command};
use vbus_cli::rundir::{CONTROL, Claimed};

/// Longer than any answer takes, even on a loaded machine. A target that waits so long hangs.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Checks configurations, as `vbus config check` does.
pub struct Checker(Bus);

impl Default for Checker {
    fn default() -> Self {
        let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() });
        let classes = classes::unserved(Vec::new()).expect("different names");
        Checker(Bus::new(executor.expect("a thread"), classes))
    }
}

impl Checker {
    /// Checks the text of a configuration file. Returns the number of its devices, or the error as
    /// the program prints it.
    pub fn check(&self, text: String) -> Result<usize, String> {
        let (config, source) = config::parse(Path::new("bus.toml"), text, Accounts::Check)
            .map_err(|error| error.to_string())?;
        command::config::check(&config, &source, &self.0).map_err(|error| error.to_string())?;
        // `serve` makes these before it makes a device.
        Permits::new(Path::new("/bus"), &config.allow, &config.devices);
        config.is_shared();
        Ok(config.devices.len())
    }
}

/// If this process was started as the supervisor of a fuzzed bus, runs the supervisor and ends.
pub fn supervise_if_asked() {
    if std::env::args().nth(1).as_deref() == Some(supervisor::COMMAND) {
        let _ = supervisor::run();
        std::process::exit(0);
    }
}

/// A bus without sandbox, and its control socket.
pub struct ServedBus {
    host: Arc<Host>,
    acceptor: Acceptor,
}

impl ServedBus {
    /// Serves a bus in `dir`. Its devices may use nothing outside of `dir`, and no interfaces.
    pub fn start(dir: &Path) -> ServedBus {
        let claimed = Claimed::claim(dir, false).expect("a directory");
        let permits = Permits::new(dir, &confined(), &[]);
        let supervisor = Supervisor::start(&[supervisor::COMMAND.into()], &permits, claimed.lock())
            .expect("a supervisor");
        let config =
            Config { tuning: Tuning { workers: 1, ..Tuning::default() }, ..Config::default() };
        let (inherited, protections) = (Inherited::default(), Protections::default());
        let host = Host::start(claimed, inherited, supervisor, &config, Vec::new(), protections);
        let host = Arc::new(host.expect("a bus"));
        let rights = ControlSpec::default().rights().expect("no groups");
        let rights = Arc::new(Mutex::new(rights));
        // Without a file there is nothing to read again.
        let reloader = Arc::new(Reloader::new(host.clone(), config, rights.clone(), false));
        let acceptor = Acceptor::bind(host.clone(), &Access::default(), rights, reloader, None);
        let acceptor = acceptor.expect("a socket");
        ServedBus { host, acceptor }
    }

    /// Connects a control client, sends `bytes`, and returns all that comes back.
    ///
    /// # Panics
    /// The bus does not end the connection in time.
    pub fn exchange(&self, bytes: &[u8]) -> Vec<u8> {
        let mut client = UnixStream::connect(self.host.dir().join(CONTROL)).expect("the socket");
        client.set_read_timeout(Some(TIMEOUT)).expect("a time-out");
        client.set_write_timeout(Some(TIMEOUT)).expect("a time-out");
        self.acceptor.next().expect("a thread");
        // The bus ends a connection that sends no JSON, perhaps before it has read everything.
        let _ = client.write_all(bytes);
        let _ = client.shutdown(Shutdown::Write);
        let mut answers = Vec::new();
        match client.read_to_end(&mut answers) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                panic!("the bus does not answer: {:?}", String::from_utf8_lossy(&answers))
            }
            _ => answers,
        }
    }

    /// Removes all devices.
    ///
    /// # Panics
    /// One cannot be removed.
    pub fn clear(&self) {
        for device in self.host.inspect(None).expect("a list") {
            let name = device["name"].as_str().expect("a name").to_owned();
            self.host.remove(&name, true).expect("it was listed");
        }
        assert!(self.host.inspect(None).expect("a list").is_empty());
    }
}

/// No folders beside that of the bus, and no interfaces.
fn confined() -> AllowSpec {
    AllowSpec { taps: Vec::new(), ..AllowSpec::default() }
}

/// Runs a supervisor on two threads of this process. `thread` is a thread that the bus may change.
/// Returns the sockets of the quick verbs and of the others, and a handle that ends when both are
/// closed.
pub fn supervisor(dir: &Path, thread: i32) -> (OwnedFd, OwnedFd, std::thread::JoinHandle<()>) {
    let settings = serde_json::json!({ "threads": [thread] });
    let settings: Map<String, Value> = settings.as_object().expect("a table").clone();
    let device = DeviceSpec::new("sched".into(), "sched".into(), settings).expect("good settings");
    let permits = Permits::new(dir, &confined(), &[device]);
    supervisor::in_this_process(&permits).expect("sockets and a thread")
}
