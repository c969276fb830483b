// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus serve`: runs the bus, with a vfio-user socket for each device and a control socket.

mod background;
pub mod control;
mod health;
pub mod host;
pub mod inherited;
mod ready;
pub mod reload;
mod repeat;
pub mod systemd;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vbus_cli::signals;
use vbus_core::{DeviceClass, Endpoint, MemoryContext, Watchdog};

use crate::access::Access;
use crate::client::BusDir;
use crate::config::{self, Config, DeviceSpec};
use crate::keeper::{self, Keeping, Link};
use crate::metrics::{self, Door, Exporter, Kept, MetricsServer, MetricsSpec};
use crate::rights::Rights;
use crate::sandbox::{Protections, Sandbox};
use crate::supervisor::{Permits, Purpose, Supervisor};
use crate::take_over::{self, Departure, DeviceParcel, Handed, Joining, Remains, Spec};
use health::Health;
use host::{Held, Host};
use inherited::Inherited;
use ready::Ready;
use reload::Reloader;
use systemd::Manager;
use vbus_cli::log;
use vbus_cli::rundir::{self, Claimed};

/// The most scrapers that wait to be accepted.
const BACKLOG: i32 = 16;
/// How long to wait for descriptors, threads or memory that the system does not have now.
const STARVED: Duration = Duration::from_millis(200);

const HELP: &str = "\
SIGHUP, or `vbus reload`, reads the configuration file again. SIGINT and SIGTERM end the bus, and so
does SIGHUP without --config.

To upgrade without a restart, start the new program with --take-over and the same --dir. The old
process ends when the new one has taken over, and goes on if that fails.

Environment:
  VBUS_LOG       the level of the log, on standard error: error, warn, info (the default), debug
                 or trace; also for each crate, such as `info,vbus_vfio_user=debug`
  NOTIFY_SOCKET  systemd sets it for a service of Type=notify; vbus reports there that the bus is
                 up, that it ends, and with WATCHDOG_USEC that all its workers respond
  LISTEN_FDS     systemd sets it if it has made sockets for the bus: the control socket, or
                 sockets of devices

An example of bus.toml, with a network card and a device of two state pages:
  [[device]]
  name = \"net0\"
  class = \"venet\"
  backend = \"switch\"

  [[device]]
  name = \"values\"
  class = \"state\"
  pages = [{ name = \"setpoint\", bytes = 64, owner = \"device\" },
           { name = \"load\", bytes = 64, owner = \"driver\" }]
`vbus config check bus.toml` checks the file. `vbus device classes` lists the classes and their
settings.";

/// Arguments of `vbus serve`.
#[derive(clap::Args, Debug)]
#[command(after_help = HELP)]
pub struct Args {
    /// The configuration file with the first devices [default: a bus without devices]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    bus: BusDir,
    /// Take the place of the bus that serves in the directory. Its machines and drivers keep their
    /// connections and notice nothing. If that fails, the other bus goes on. Devices that differ
    /// from the configuration file are then changed as `vbus reload` does it
    #[arg(long)]
    take_over: bool,
    /// Return once the bus is up, and leave it running: for `systemctl reload`
    #[arg(long, requires = "take_over", conflicts_with = "ready_fd")]
    background: bool,
    /// Keep the bus: this process starts the bus as another one, and has all its descriptors and
    /// the last state of each device. If the bus is killed or crashes, it starts the next one,
    /// which goes on where the former one stopped: machines and drivers keep their connections
    #[arg(long, conflicts_with_all = ["take_over", "background"])]
    keep: bool,
    /// Keep the bus that serves in the directory already, because its keeper has gone
    #[arg(long, requires = "keep", conflicts_with = "ready_fd")]
    adopt: bool,
    /// This process has a keeper at its standard input, which has restarted the bus so many times
    #[arg(long, hide = true, value_name = "RESTARTS", conflicts_with_all = ["keep", "take_over"])]
    kept: Option<u32>,
    /// Write the line READY=1 to this file descriptor once the bus is up
    #[arg(long, value_name = "FD")]
    ready_fd: Option<u32>,
    /// Serve with all rights of the user. Without this option, the process that serves the bus
    /// drops its capabilities, cannot get new privileges, and may make no system call that opens
    /// anything
    #[arg(long)]
    no_sandbox: bool,
}

/// Serves a bus; see [`serve`]. If it was to take another bus's place and cannot, that bus learns
/// why.
pub fn run(
    args: &Args,
    classes: Vec<Box<dyn DeviceClass>>,
    supervisor: &[OsString],
    sandbox: &Sandbox,
) -> Result<()> {
    if args.background {
        return background::run();
    }
    if args.keep {
        let (dir, config) = (args.bus.dir.as_deref(), args.config.as_deref());
        return keeper::run(&keeper::Order { dir, adopt: args.adopt, config });
    }
    // The thread of the log must have the restrictions of the sandbox.
    log::prepare("info");
    if let Some(restarts) = args.kept {
        return serve_kept(args, classes, supervisor, sandbox, restarts);
    }
    if !args.take_over {
        return serve(args, classes, supervisor, sandbox, (None, None));
    }
    vbus_cli::limits::raise_descriptor_limit();
    let (joining, handed) = Joining::connect(&rundir::choose(args.bus.dir.as_deref()))?;
    let taking = Some((&joining, handed));
    let result = serve(args, classes, supervisor, sandbox, (taking, None));
    result.inspect_err(|error| joining.fail(error))
}

/// Serves a bus that has a keeper at its standard input. If the keeper has started it before, it
/// goes on with what the last one had.
fn serve_kept(
    args: &Args,
    classes: Vec<Box<dyn DeviceClass>>,
    supervisor: &[OsString],
    sandbox: &Sandbox,
    restarts: u32,
) -> Result<()> {
    vbus_cli::limits::raise_descriptor_limit();
    let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let keeping = Keeping::new(Link::new(socket.try_clone()?.into()), restarts);
    let heritage = if restarts > 0 { Some(Joining::over(socket)?) } else { None };
    let (joining, handed) = heritage.unzip();
    let taking = joining.as_ref().zip(handed);
    let result = serve(args, classes, supervisor, sandbox, (taking, Some(&keeping)));
    // An error that the keeper hears of from here on is one of a bus that nobody can go on with.
    result.inspect_err(|error| match &joining {
        Some(joining) => joining.fail(error),
        None => keeping.ends(),
    })
}

/// Serves a bus until SIGINT or SIGTERM. SIGHUP reloads its configuration file; without such a
/// file it ends the bus too. `classes` are the classes that the program has beside those of vbus.
/// With the arguments `supervisor`, the program becomes the supervisor. `sandbox` is what the
/// classes need. `taking`: the bus takes another's place.
fn serve(
    args: &Args,
    classes: Vec<Box<dyn DeviceClass>>,
    supervisor: &[OsString],
    sandbox: &Sandbox,
    (taking, keeping): (Option<(&Joining, Handed)>, Option<&Arc<Keeping>>),
) -> Result<()> {
    let inherited = Inherited::of_environment(keeping.is_some());
    let (config, source) = match &args.config {
        Some(path) => match config::read(path) {
            Ok((config, source)) => (config, Some(source)),
            // Whoever edits the file while a bus dies must not end its clients' connections. The
            // devices and the bound of the guests' memory are those of the former bus, and without
            // a file the bus allows less.
            Err(error) if taking.is_some() && keeping.is_some() => {
                tracing::error!(
                    "{error:#}\nthe bus goes on with its devices and its guest-memory-mib, and without \
                     what else the file says; mend it, and start a bus with --take-over"
                );
                let former = taking.as_ref().map(|(_, handed)| &handed.offer);
                let guest_memory = former.and_then(|offer| offer.guest_memory);
                (Config { guest_memory, ..Config::default() }, None)
            }
            Err(error) => return Err(error.into()),
        },
        None => (Config::default(), None),
    };
    if let Some(level) = &config.log {
        log::set_level(level)?;
    }
    vbus_cli::limits::raise_descriptor_limit();
    let dir = rundir::choose(args.bus.dir.as_deref());
    let (joining, mut manager, claimed, mut former) = match taking {
        None => {
            let claimed = Claimed::claim(&dir, config.is_shared())?;
            (None, Manager::of_environment(keeping.is_some()), claimed, Former::default())
        }
        Some((joining, Handed { offer, lock, sockets, port, manager })) => {
            let manager = match (manager, &offer.manager) {
                (Some(socket), Some(part)) => Manager::taken(socket, part.watchdog()),
                _ => Manager::of_environment(keeping.is_some()),
            };
            let sockets = offer.sockets.into_iter().zip(sockets);
            let former = Former {
                pid: offer.pid,
                port: offer.port.zip(port),
                sockets: sockets.map(|(one, fd)| (one.path, fd, one.inherited)).collect(),
                devices: offer.devices,
            };
            (Some(joining), manager, Claimed::adopt(&dir, lock)?, former)
        }
    };
    if config.is_shared() && !claimed.is_shared() {
        tracing::warn!(
            "other users cannot reach the sockets that are for them: chmod 711 {}",
            claimed.path().display()
        );
    }
    let ready = args.ready_fd.map(Ready::open).transpose()?;
    // Signals are caught before the first socket is made, so that no signal ends the process and
    // leaves sockets behind.
    let (stop, hangup) = if args.config.is_some() {
        (signals::descriptor(&[SIGINT, SIGTERM])?, Some(signals::descriptor(&[SIGHUP])?))
    } else {
        // There is nothing to read again. A bus in a terminal ends with the terminal.
        (signals::termination()?, None)
    };
    // This process opens no port later.
    let port = config.metrics.bind(former.port.take())?;
    let mut permits = Permits::new(claimed.path(), &config.allow, &config.devices)
        .with_config(args.config.as_deref());
    permits.name(Purpose::Listen, config.metrics.named_path(claimed.path()));
    permits.former = former.paths(claimed.path());
    let supervisor = Supervisor::start(supervisor, &permits, claimed.lock())
        .context("starting the supervisor")?;
    // The budgets of all peers' memory come from files, which are read once.
    drop(MemoryContext::new());
    rustix::param::page_size();
    // From here on this process looks at no account and opens no path.
    let (access, rights) = (config.control.access(), config.control.rights()?);
    let protections = match args.no_sandbox {
        true => {
            tracing::warn!(
                "--no-sandbox: a client that takes this process over has all its rights"
            );
            Protections::default()
        }
        false => sandbox.enter(&own_paths(&permits, &classes, &config.devices))?,
    };
    log::write();
    tracing::info!("sandbox: {protections}");
    if !args.no_sandbox && !protections.missing().is_empty() {
        tracing::warn!("the sandbox is weaker: {}", protections.missing().join("; "));
    }
    let host =
        Arc::new(Host::start(claimed, inherited, supervisor, &config, classes, protections)?);
    host.keep_sockets(former.sockets);
    let departure_port = port.as_ref().map(TcpListener::try_clone).transpose()?;
    // A client that connects before all devices are made waits in the backlog.
    let (devices, metrics) = (config.devices.clone(), config.metrics.clone());
    let rights = Arc::new(Mutex::new(rights));
    let is_fixed = protections.confine_files() && sandbox.has_configured_files();
    let reloader = Arc::new(Reloader::new(host.clone(), config, rights.clone(), is_fixed));
    let departure = Arc::new(Departure::new(
        host.clone(),
        reloader.clone(),
        departure_port.as_ref(),
        manager.notifier()?,
    )?);
    let accept = control::Acceptor::bind(
        host.clone(),
        &access,
        rights.clone(),
        reloader.clone(),
        Some(departure.clone()),
    )?;
    let doors = MetricsDoors::open(&host, &metrics, port, &access, rights)?;
    match joining {
        None => {
            for (number, spec) in devices.iter().enumerate() {
                let endpoint = host.add(spec.clone()).map_err(|error| match &source {
                    Some(source) => source.device_error(number, &format!("{error:#}")).into(),
                    None => error,
                })?;
                reloader.made(spec, &endpoint);
            }
            keeping.map_or(Ok(()), |keeping| departure.keep(keeping))?;
        }
        Some(joining) => {
            let keep = || keeping.map_or(Ok(()), |keeping| departure.keep(keeping));
            take_over(joining, &host, &reloader, (former.devices, former.pid), keep)?;
        }
    }
    // From here on a bus that has taken over is the only one, and goes on without what fails.
    let or_goes_on = |result: Result<()>| match result {
        Err(error) if joining.is_some() => {
            tracing::error!("{error:#}");
            Ok(())
        }
        other => other,
    };
    let mut served = None;
    or_goes_on(doors.serve(&host).map(|serves| served = Some(serves)))?;
    tracing::info!("serving {} devices in {}", devices.len(), host.dir().display());
    if let Some(ready) = ready {
        // Whoever waits for it finds the log of the start.
        log::flush();
        or_goes_on(ready.tell())?;
    }
    match joining {
        None => manager.ready(),
        // The file may say something else than the bus that was taken over.
        Some(_) if args.config.is_some() => reloader.reload_aside(),
        Some(_) => {}
    }
    let mut health = Health::new(Watchdog::new(host.executor().clone()), &manager);
    let mut starved = false;
    loop {
        let (stopped, hung_up, client, woken) = {
            let mut fds = [
                PollFd::new(&stop, PollFlags::IN),
                PollFd::new(hangup.as_ref().unwrap_or(&stop), PollFlags::IN),
                PollFd::from_borrowed_fd(accept.as_fd(), PollFlags::IN),
                PollFd::new(&health, PollFlags::IN),
            ];
            match poll(&mut fds, health.timeout().as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    // The system has no memory at the moment. The devices go on.
                    tracing::error!(%error, "waiting for control clients");
                    std::thread::sleep(STARVED);
                    continue;
                }
            }
            let [stop, hangup, accept, health] = fds.map(|fd| !fd.revents().is_empty());
            (stop, hangup, accept, health)
        };
        if stopped {
            break;
        }
        if let (true, Some(hangup)) = (hung_up, &hangup) {
            // Several signals that have come are one request.
            let _ = rustix::io::read(hangup, &mut [0; 64]);
            reloader.reload_aside();
        }
        health.look(woken, &mut manager);
        if !client {
            continue;
        }
        match accept.next() {
            Ok(()) => starved = false,
            Err(error) => {
                // This process has no more descriptors or threads. The client waits in the backlog.
                // An attempt without a pause would only take processor time.
                if !std::mem::replace(&mut starved, true) {
                    tracing::error!(
                        %error,
                        "control clients have to wait; raise this process's limit of descriptors \
                         (ulimit -n, LimitNOFILE=) or of threads (ulimit -u, TasksMax=)"
                    );
                }
                std::thread::sleep(STARVED);
            }
        }
    }
    // A bus that is being handed over ends by itself, or it goes on and ends now.
    drop(host.change());
    tracing::info!("stopping");
    manager.stopping();
    // Sockets, devices and the keeper's end below ask the supervisor.
    host.supervisor().end_soon();
    if let Some(keeping) = host.keeping() {
        keeping.ends();
        let _ = host.supervisor().set_leaving(false);
    }
    accept.end();
    drop(served);
    reloader.end();
    host.stop();
    Ok(())
}

/// What a bus has of the one whose place it takes, before it makes its devices.
#[derive(Default)]
struct Former {
    pid: i32,
    /// The TCP port of the metrics.
    port: Option<(SocketAddr, OwnedFd)>,
    /// Path, socket, and whether the service manager has made it.
    sockets: Vec<(PathBuf, OwnedFd, bool)>,
    devices: Vec<Spec>,
}

impl Former {
    /// The sockets that the other bus has made in `dir` or elsewhere.
    fn paths(&self, dir: &Path) -> BTreeSet<PathBuf> {
        let own = self.sockets.iter().filter(|(_, _, inherited)| !inherited);
        let own = own.map(|(path, ..)| path.clone());
        own.chain(self.devices.iter().map(|spec| dir.join(spec.device().socket_path()))).collect()
    }
}

/// Takes the devices of the bus `pid`, which then ends or has died. `keep` gives them to the
/// keeper.
///
/// # Errors
/// They cannot be taken, as far as can be told before the other bus stops.
fn take_over(
    joining: &Joining,
    host: &Host,
    reloader: &Reloader,
    (specs, pid): (Vec<Spec>, i32),
    keep: impl FnOnce() -> Result<()>,
) -> Result<()> {
    if !joining.is_after_death() {
        specs.iter().try_for_each(|spec| host.check(&spec.device()))?;
    }
    joining.make_room(specs.len());
    let (stopped, parcels) = joining.ready()?;
    let past = || Duration::from_nanos(take_over::now().saturating_sub(stopped));
    let arrived = past();
    let taken = restore(joining, host, &specs, (stopped, parcels)).and_then(|made| {
        joining.taken()?;
        Ok(made)
    });
    let Restored { mut made, lost } = taken.unwrap_or_else(|error| {
        joining.fail(&error);
        let _ = vbus_cli::exit(Err(error));
        log::flush();
        // Nothing is dropped: the memory, the sockets and the interfaces are the other bus's.
        std::process::exit(1)
    });
    let all_made = past();
    for (spec, remains, why) in lost {
        let name = &spec.name;
        tracing::error!(
            "device {name:?} cannot go on from what the former bus left: {why:#}; it is made anew, \
             and the connection of its client ends"
        );
        match host.make_anew(spec.device(), remains) {
            Ok(endpoint) => made.push((spec, endpoint)),
            Err(error) => tracing::error!("device {name:?} is gone: {error:#}"),
        }
    }
    // Before anything changes: until the keeper has all of this bus, it has the former one's.
    if let Err(error) = keep() {
        tracing::error!("the bus goes on without a keeper: {error:#}");
        host.forsake_former();
    }
    host.go_on();
    let pause = past();
    tracing::info!(
        "took {} devices over from process {pid}; they paused for {pause:?}",
        made.len()
    );
    tracing::debug!("the state was here after {arrived:?}, and the devices after {all_made:?}");
    host.own_sockets();
    for (spec, endpoint) in &made {
        if spec.configured {
            reloader.made(&spec.device(), endpoint);
        }
    }
    Ok(())
}

/// The devices of a bus that has stopped.
#[derive(Default)]
struct Restored {
    made: Vec<(Spec, Arc<Endpoint>)>,
    /// Those of a bus that has died whose state nobody can go on from, and why. They are no reason
    /// to end the others: their clients may have done it on purpose.
    lost: Vec<(Spec, Remains, anyhow::Error)>,
}

/// Makes all devices of the other bus, which has stopped at `stopped`. Those that carry the
/// interrupts of others come last.
fn restore(
    joining: &Joining,
    host: &Host,
    specs: &[Spec],
    (stopped, parcels): (u64, Vec<DeviceParcel>),
) -> Result<Restored> {
    ensure!(specs.len() == parcels.len(), "the state is that of other devices than the offer");
    let carries = |name: &str| specs.iter().any(|spec| spec.pic.as_deref() == Some(name));
    let both = specs.iter().zip(parcels);
    let (last, first): (Vec<_>, Vec<_>) = both.partition(|(spec, _)| carries(&spec.name));
    let mut restored = Restored::default();
    for (spec, parcel) in first.into_iter().chain(last) {
        joining.check_time(stopped)?;
        let spec = spec.clone();
        if !joining.is_after_death() {
            let endpoint = host.restore(spec.device(), parcel)?;
            restored.made.push((spec, endpoint));
            continue;
        }
        let remains = Remains::of(&parcel);
        match host.restore_or_leave(spec.device(), parcel) {
            Ok(endpoint) => restored.made.push((spec, endpoint)),
            Err(why) => restored.lost.push((spec, remains, why)),
        }
    }
    Ok(restored)
}

/// The sockets of the metrics.
struct MetricsDoors {
    doors: Vec<Door>,
    held: Held,
}

impl MetricsDoors {
    /// Makes the UNIX socket of the metrics of `host`. `port` is the TCP port, if there is one.
    /// Unless the table says who may connect to the UNIX socket, those may who have the right to
    /// read: `access` is that of the control socket. Whoever connects waits until the metrics are
    /// [served](Self::serve).
    fn open(
        host: &Host,
        spec: &MetricsSpec,
        port: Option<TcpListener>,
        access: &Access,
        rights: Arc<Mutex<Rights>>,
    ) -> Result<MetricsDoors> {
        let path = spec.path(host.dir());
        rundir::check_socket_path(&path)?;
        let own = spec.access();
        let (socket, held) = host
            .listen_for_itself(&path, BACKLOG, own.unwrap_or(access))
            .with_context(|| format!("cannot make {}", path.display()))?;
        let rights = if own.is_some() { None } else { Some(rights) };
        let mut doors = vec![Door { socket, rights }];
        tracing::info!("metrics at {}", path.display());
        if let Some(port) = port {
            tracing::info!("metrics at http://{}/metrics", port.local_addr()?);
            doors.push(Door { socket: port.into(), rights: None });
        }
        Ok(MetricsDoors { doors, held })
    }

    /// Serves the metrics. Dropping the result ends it, and removes the socket.
    fn serve(self, host: &Arc<Host>) -> Result<(MetricsServer, Held)> {
        let devices = host.clone();
        let read = move || devices.inspect(None).unwrap_or_default();
        let of_bus = host.clone();
        let kept = move || {
            let keeping = of_bus.keeping();
            keeping.map_or_else(Kept::default, |keeping| Kept {
                present: keeping.is_open(),
                restarts: keeping.restarts(),
            })
        };
        let exporter = Exporter::new(host.table(), Box::new(read), Box::new(kept));
        Ok((MetricsServer::start(self.doors, exporter, metrics::TIMEOUT)?, self.held))
    }
}

/// What the program's own classes may open, if the program says that they open files: the folders
/// of `[allow]`, and each file that is there and that a device of the configuration opens.
fn own_paths(
    permits: &Permits,
    classes: &[Box<dyn DeviceClass>],
    devices: &[DeviceSpec],
) -> Vec<PathBuf> {
    let class = |device: &DeviceSpec| classes.iter().find(|class| class.name() == device.class);
    let files = devices.iter().flat_map(|device| {
        class(device).map(|class| class.files(&device.settings)).unwrap_or_default()
    });
    let files = files.filter(|path| path.exists());
    permits.folders.iter().cloned().chain(files).collect()
}
