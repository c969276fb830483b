//! `vbus serve`: the bus, a vfio-user socket for each device, the control socket.

mod control;
pub mod guardian;
mod host;

use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use vbus_cli::signals;
use vbus_core::DeviceClass;

use crate::client::BusDir;
use crate::config::{self, Config};
use host::Host;
use vbus_cli::log;
use vbus_cli::rundir::{self, Claimed};

const HELP: &str = "\
Environment:
  VBUS_LOG       what is in the log, on standard error: error, warn, info (without it), debug or
                 trace; also by crate, such as `info,vbus_vfio_user=debug`
  NOTIFY_SOCKET  systemd sets it for a service of Type=notify, and is told when the bus is up

A configuration, bus.toml, of a bus with a network card and two values:
  [[device]]
  name = \"net0\"
  class = \"venet\"
  backend = \"switch\"

  [[device]]
  name = \"values\"
  class = \"state\"
  pages = [{ name = \"setpoint\", bytes = 64, owner = \"device\" },
           { name = \"load\", bytes = 64, owner = \"driver\" }]
`vbus config check bus.toml` checks it, `vbus device classes` lists the classes and their settings.";

/// Arguments of `vbus serve`.
#[derive(clap::Args, Debug)]
#[command(after_help = HELP)]
pub struct Args {
    /// The bus as it shall be at the start; without it, an empty one.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    bus: BusDir,
    /// Write a line to this file descriptor once everything is up.
    #[arg(long, value_name = "FD")]
    ready_fd: Option<u32>,
}

/// Serves until SIGINT, SIGTERM or SIGHUP, with `classes` beside those of vbus.
pub fn run(args: &Args, classes: Vec<Box<dyn DeviceClass>>) -> Result<()> {
    log::start();
    let (config, source) = match &args.config {
        Some(path) => {
            let (config, source) = config::read(path)?;
            (config, Some(source))
        }
        None => (Config::default(), None),
    };
    vbus_cli::limits::raise_descriptor_limit();
    let claimed = Claimed::claim(&rundir::choose(args.bus.dir.as_deref()))?;
    // Before anything is served, so that no signal finds the sockets in place and nobody to remove
    // them.
    let stop = signals::termination()?;
    let host = Arc::new(Host::start(claimed, &config, classes)?);
    // Who asks before all devices are there waits.
    let accept = control::Acceptor::bind(host.clone())?;
    for (number, spec) in config.devices.iter().enumerate() {
        host.add(spec.clone()).map_err(|error| match &source {
            Some(source) => source.device_error(number, &format!("{error:#}")).into(),
            None => error,
        })?;
    }
    tracing::info!("serving {} devices in {}", config.devices.len(), host.dir().display());
    tell_ready(args.ready_fd)?;
    loop {
        let (stopped, client) = {
            let mut fds = [
                PollFd::new(&stop, PollFlags::IN),
                PollFd::from_borrowed_fd(accept.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("waiting for clients"),
            }
            (!fds[0].revents().is_empty(), !fds[1].revents().is_empty())
        };
        if stopped {
            break;
        }
        if client && accept.next().is_err() {
            // Out of descriptors or threads: the client waits in the backlog, and trying again at
            // once would only burn time.
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    tracing::info!("stopping");
    drop(accept);
    host.stop();
    Ok(())
}

/// Tells whoever started us that everything is up: by descriptor, and to systemd.
fn tell_ready(fd: Option<u32>) -> Result<()> {
    if let Some(fd) = fd {
        std::fs::write(format!("/proc/self/fd/{fd}"), "READY=1\n")
            .with_context(|| format!("--ready-fd {fd}"))?;
    }
    if let Some(path) = std::env::var_os("NOTIFY_SOCKET") {
        let path = Path::new(&path);
        // An abstract address begins with '@'.
        let sent = match path.to_str().and_then(|p| p.strip_prefix('@')) {
            Some(name) => {
                use std::os::linux::net::SocketAddrExt as _;
                let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
                UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address)
            }
            None => UnixDatagram::unbound()?.send_to(b"READY=1", path),
        };
        if let Err(error) = sent {
            tracing::warn!(%error, "cannot tell systemd that the bus is up");
        }
    }
    Ok(())
}
