// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that serves all scrapers. It reads counters and nothing else of the bus, and no
//! scraper can make it wait: connections are few, short, and never block.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use vbus_control::Peer;
use vbus_core::lock;
use vbus_vfio_user::Closer;

use super::http::Conversation;
use super::openmetrics::Exporter;
use crate::rights::{Level, Rights};

/// The most connections of a [`Queue`] at a time. One more takes the place of the oldest.
const CLIENTS: usize = 16;
/// How long a connection lasts at most, from its first byte to its last.
pub const TIMEOUT: Duration = Duration::from_secs(5);
/// How long nobody is accepted after the process had no descriptor for a connection.
const PAUSE: Duration = Duration::from_millis(200);

/// A listening socket, non-blocking.
pub struct Door {
    /// The socket.
    pub socket: OwnedFd,
    /// The rights that a client needs, if it is a UNIX socket that everybody may connect to.
    pub rights: Option<Arc<Mutex<Rights>>>,
}

/// The thread. Dropping this ends it, and all connections.
pub struct MetricsServer {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl MetricsServer {
    /// Serves the clients of `doors`, each for at most the time `limit`: [`TIMEOUT`], except in a
    /// test.
    ///
    /// # Errors
    /// The system gives no descriptor or no thread.
    pub fn start(doors: Vec<Door>, exporter: Exporter, limit: Duration) -> Result<MetricsServer> {
        // One thread reads from all of them. A port takes none anyway.
        for door in &doors {
            vbus_control::refuse_descriptors(&door.socket);
        }
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let stop = Arc::new(stop.context("making an eventfd")?);
        let (clients, closer) = (Vec::new(), Closer::new());
        let mut room = Room { doors, exporter, limit, clients, pause: None, closer };
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("metrics".into())
            .spawn(move || {
                while room.turn(&stopped) {}
                room.end();
            })
            .context("starting the thread of the metrics")?;
        Ok(MetricsServer { stop, thread: Some(thread) })
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the thread has.
struct Room {
    doors: Vec<Door>,
    exporter: Exporter,
    /// How long a connection lasts at most.
    limit: Duration,
    /// The oldest comes first.
    clients: Vec<(Queue, Conversation)>,
    /// Until when nobody is accepted.
    pause: Option<Instant>,
    /// Closes what scrapers sent along. While much waits for it, nobody is accepted.
    closer: Closer,
}

/// Connections that share [`CLIENTS`] places. Nobody takes a place in another queue.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Queue {
    /// The door by which they came.
    door: usize,
    /// Whether they were turned away, and only wait for that answer.
    refused: bool,
}

impl Room {
    /// Waits for something to do, and does it. Returns false at the end.
    fn turn(&mut self, stop: &OwnedFd) -> bool {
        let now = Instant::now();
        self.pause = self.pause.filter(|until| *until > now);
        let doors = if self.pause.is_some() { &[][..] } else { &self.doors[..] };
        let wake = self.clients.iter().map(|(_, client)| client.until()).chain(self.pause).min();
        let timeout = wake.map(|at| at.saturating_duration_since(now));
        let timeout = timeout.and_then(|time| Timespec::try_from(time).ok());
        let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
        fds.extend(doors.iter().map(|door| PollFd::new(&door.socket, PollFlags::IN)));
        fds.extend(self.clients.iter().map(|(_, client)| PollFd::new(client, client.interest())));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return true,
            Err(error) => {
                // There is no memory for the call.
                tracing::error!(%error, "the metrics cannot wait for scrapers");
                std::thread::sleep(PAUSE);
                return true;
            }
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let (count, now) = (doors.len(), Instant::now());
        if ready[0] {
            return false;
        }
        let (exporter, closer) = (&mut self.exporter, &self.closer);
        let clients = std::mem::take(&mut self.clients);
        for ((queue, mut client), ready) in clients.into_iter().zip(&ready[1 + count..]) {
            let goes_on = !ready || client.ready(&mut || exporter.text(), closer);
            if goes_on && client.until() > now {
                self.clients.push((queue, client));
            } else {
                client.end(closer);
            }
        }
        for door in (0..count).filter(|door| ready[1 + door]) {
            self.accept(door);
        }
        true
    }

    /// Accepts one client of a door.
    fn accept(&mut self, door: usize) {
        if self.closer.is_full() {
            self.pause = Some(Instant::now() + PAUSE);
            return;
        }
        let Door { socket, rights } = &self.doors[door];
        let accepted = accept_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        let socket = match accepted {
            Ok(socket) => socket,
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return,
            Err(error) => {
                tracing::warn!(%error, "scrapers of the metrics have to wait");
                self.pause = Some(Instant::now() + PAUSE);
                return;
            }
        };
        let checked = rights.as_ref().map_or(Ok(()), |rights| check(&socket, rights));
        self.enter(door, socket, checked);
    }

    /// Gives a client of a door a place, if need be that of the oldest one of its queue.
    fn enter(&mut self, door: usize, socket: OwnedFd, checked: Result<()>) {
        let queue = Queue { door, refused: checked.is_err() };
        let until = Instant::now() + self.limit;
        let client = match checked {
            Ok(()) => Conversation::new(socket, until),
            Err(error) => Conversation::refused(socket, until, format!("{error:#}\n")),
        };
        let is_of_queue = |(of, _): &(Queue, Conversation)| *of == queue;
        if self.clients.iter().filter(|client| is_of_queue(client)).count() >= CLIENTS {
            if let Some(oldest) = self.clients.iter().position(is_of_queue) {
                self.clients.remove(oldest).1.end(&self.closer);
            }
        }
        self.clients.push((queue, client));
    }

    /// Ends all connections. It does not wait for what scrapers have sent.
    fn end(self) {
        self.clients.into_iter().for_each(|(_, client)| client.end(&self.closer));
        self.doors.into_iter().for_each(|door| self.closer.close(door.socket));
    }
}

/// Checks that the client may read.
fn check(socket: &OwnedFd, rights: &Mutex<Rights>) -> Result<()> {
    let peer = Peer::of(socket)?;
    lock(rights).check(&peer, "metrics", Level::Read)
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::{UnixListener, UnixStream};

    use anyhow::anyhow;
    use serde_json::json;
    use vbus_test_driver::{send_lingering, take_descriptors};

    use super::*;
    use crate::classes;
    use crate::telemetry::Table;

    /// More time than a scrape takes on any machine.
    const LONG: Duration = Duration::from_secs(60);
    const GET: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";

    /// A server with a UNIX socket and a port.
    struct Setting {
        dir: tempfile::TempDir,
        port: std::net::SocketAddr,
        /// The listener behind the UNIX socket.
        listener: UnixListener,
        _server: MetricsServer,
    }

    impl Setting {
        fn new() -> Setting {
            Setting::with(LONG)
        }

        /// A server whose connections last so long at most.
        fn with(limit: Duration) -> Setting {
            let classes = classes::unserved(Vec::new()).unwrap();
            let table = Table::new(classes.iter().map(|class| &**class));
            // A long text, which fills the buffers of a socket whose client does not read.
            let device = |n: usize| {
                let pages: Vec<_> = (0..200)
                    .map(|page| json!({ "name": format!("page{page}"), "version": page }))
                    .collect();
                json!({ "name": format!("d{n}"), "class": "state", "device": { "pages": pages } })
            };
            let devices: Vec<_> = (0..100).map(device).collect();
            let exporter =
                Exporter::new(table, Box::new(move || devices.clone()), Box::new(Default::default));
            let dir = tempfile::tempdir().unwrap();
            let unix = UnixListener::bind(dir.path().join("socket")).unwrap();
            let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
            unix.set_nonblocking(true).unwrap();
            tcp.set_nonblocking(true).unwrap();
            let port = tcp.local_addr().unwrap();
            let listener = unix.try_clone().unwrap();
            let doors = vec![
                Door { socket: unix.into(), rights: None },
                Door { socket: tcp.into(), rights: None },
            ];
            let _server = MetricsServer::start(doors, exporter, limit).unwrap();
            Setting { dir, port, listener, _server }
        }

        fn unix(&self) -> UnixStream {
            let socket = UnixStream::connect(self.dir.path().join("socket")).unwrap();
            socket.set_read_timeout(Some(LONG)).unwrap();
            socket
        }

        fn tcp(&self) -> TcpStream {
            let socket = TcpStream::connect(self.port).unwrap();
            socket.set_read_timeout(Some(LONG)).unwrap();
            socket
        }

        /// A scrape as Prometheus does it.
        fn scrape(&self) {
            for answer in [exchange(self.unix(), GET), exchange(self.tcp(), GET)] {
                assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer:.200}");
                assert!(answer.contains("page=\"page7\"") && answer.ends_with("# EOF\n"));
            }
        }
    }

    /// Sends `request`, and reads until the server closes.
    fn exchange(mut socket: impl Read + Write, request: &[u8]) -> String {
        let _ = socket.write_all(request);
        let mut answer = Vec::new();
        // The server may close before it has read everything, which gives an error after its last
        // byte.
        let _ = socket.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }

    #[test]
    fn scrapers_are_answered_on_both_doors() {
        let setting = Setting::new();
        setting.scrape();
        let head = exchange(setting.tcp(), b"HEAD /metrics HTTP/1.1\r\n\r\n");
        assert!(head.contains("Content-Type: application/openmetrics-text; version=1.0.0"));
        assert!(head.ends_with("\r\n\r\n"), "{head}");
        let lost = exchange(setting.unix(), b"GET / HTTP/1.1\r\n\r\n");
        assert!(lost.starts_with("HTTP/1.1 404 ") && lost.contains("/metrics"), "{lost}");
        let posted = exchange(setting.unix(), b"POST /metrics HTTP/1.1\r\n\r\n");
        assert!(posted.contains("\r\nAllow: GET, HEAD\r\n"), "{posted}");
    }

    #[test]
    fn hostile_scrapers_keep_nobody_out() {
        let setting = Setting::new();
        // Silent ones, and one that sends its head byte by byte: more than there may be.
        let mut silent: Vec<_> = (0..3 * CLIENTS).map(|_| setting.unix()).collect();
        setting.scrape();
        // Those that read nothing of a long answer.
        let deaf: Vec<_> = (0..CLIENTS)
            .map(|_| {
                let mut socket = setting.unix();
                socket.write_all(GET).unwrap();
                socket
            })
            .collect();
        setting.scrape();
        // Those that close early, at every place.
        for length in [0, 1, 20, GET.len()] {
            for _ in 0..20 {
                let _ = setting.unix().write_all(&GET[..length]);
                let _ = setting.tcp().write_all(&GET[..length]);
            }
        }
        setting.scrape();
        // A head without end, and what is no head.
        let huge = exchange(setting.tcp(), &b"GET /metrics HTTP/1.1\r\na: b".repeat(50_000));
        assert!(huge.is_empty() || huge.starts_with("HTTP/1.1 4"), "{huge}");
        let long = format!("GET /metrics HTTP/1.1\r\na: {}\r\n\r\n", "b".repeat(9000));
        assert!(exchange(setting.unix(), long.as_bytes()).starts_with("HTTP/1.1 431 "));
        let other = exchange(setting.unix(), b"{\"op\":\"list\"}\n\n");
        assert!(other.starts_with("HTTP/1.1 400 "), "{other}");
        setting.scrape();
        // The first silent ones had to go for the others.
        let gone = exchange(silent.remove(0), b"");
        assert_eq!(gone, "");
        drop((silent, deaf));
        setting.scrape();
    }

    #[test]
    fn the_clients_of_a_door_take_no_place_at_the_other() {
        let setting = Setting::new();
        let (by_port, by_path) = (setting.tcp(), setting.unix());
        let many_by_path: Vec<_> = (0..3 * CLIENTS).map(|_| setting.unix()).collect();
        assert_eq!(exchange(by_path, b""), "", "it had to go for the others");
        assert!(exchange(by_port, GET).ends_with("# EOF\n"));
        let by_path = setting.unix();
        let many_by_port: Vec<_> = (0..3 * CLIENTS).map(|_| setting.tcp()).collect();
        // When the last one has its answer, all before it have come.
        assert!(exchange(setting.tcp(), GET).ends_with("# EOF\n"));
        assert!(exchange(by_path, GET).ends_with("# EOF\n"));
        drop((many_by_path, many_by_port));
    }

    #[test]
    fn clients_without_a_right_take_no_place_of_others() {
        let exporter = Exporter::new(
            Table::new(std::iter::empty()),
            Box::new(Vec::new),
            Box::new(Default::default),
        );
        let (doors, clients) = (Vec::new(), Vec::new());
        let closer = Closer::new();
        let mut room = Room { doors, exporter, limit: LONG, clients, pause: None, closer };
        let mut enter = |count: usize, may: bool| -> Vec<UnixStream> {
            let enter = |_| {
                let (own, socket) = UnixStream::pair().unwrap();
                own.set_nonblocking(true).unwrap();
                let checked = if may { Ok(()) } else { Err(anyhow!("no right")) };
                room.enter(0, socket.into(), checked);
                own
            };
            (0..count).map(enter).collect()
        };
        let is_there = |mut client: &UnixStream| {
            client.read(&mut [0]).is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
        };
        let (readers, others) = (enter(CLIENTS, true), enter(3 * CLIENTS, false));
        assert!(readers.iter().all(is_there));
        assert_eq!(others.iter().filter(|client| is_there(client)).count(), CLIENTS);
        let _more = enter(1, true);
        assert!(!is_there(&readers[0]) && is_there(&readers[1]));
    }

    /// Before Linux 6.16 a scraper's descriptors cannot be refused, and a close can wait.
    #[test]
    fn descriptors_of_scrapers_keep_nobody_waiting() {
        let setting = Setting::new();
        take_descriptors(&setting.listener);
        let mut lingering = Vec::new();
        for bytes in [&b"GET "[..], GET] {
            let client = setting.unix();
            lingering.push(send_lingering(&client, bytes));
            assert_eq!(exchange(client, b""), "", "its connection ends");
            setting.scrape();
        }
        // One that is not read before it has to go.
        let silent: Vec<_> = (0..CLIENTS).map(|_| setting.unix()).collect();
        setting.scrape();
        drop(silent);
        lingering.push(send_lingering(setting.unix(), b"x"));
        drop(setting);
        drop(lingering);
    }

    #[test]
    fn a_slow_head_ends_its_own_connection() {
        let setting = Setting::with(Duration::from_millis(500));
        let mut slow = setting.tcp();
        let begin = Instant::now();
        // A byte now and then does not make the connection last longer.
        slow.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        loop {
            let _ = slow.write_all(b"G");
            match slow.read(&mut [0; 64]) {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                    ) =>
                {
                    assert!(begin.elapsed() < LONG, "it is still there");
                }
                _ => break,
            }
        }
    }

    #[test]
    fn the_end_does_not_wait_for_scrapers() {
        let setting = Setting::new();
        let socket = setting.unix();
        setting.scrape();
        drop(setting);
        assert_eq!(exchange(socket, GET), "");
    }
}
