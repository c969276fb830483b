// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Back end `stream`: frames over a UNIX socket. The length of each frame precedes it as a
//! big-endian u32. QEMU's `-netdev stream` and `passt` use the same protocol.
//!
//! The connection lives while the driver has started. When it ends, the end that connects tries
//! again every second, and the end that listens accepts the next peer.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{SendFlags, SocketAddrUnix, SocketFlags, accept_with, send};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vbus_core::shm::signal::Armed;
use vbus_core::{Counter, CreateError, ErrorCode, Interest, TaskHandle, lock, state};
use vbus_tap::{Mac, Offloads};
use vfio_user_protocol::{Closer, plain};

use crate::backend::{Backend, Plug, Port, Queue, Sent, TxDrop};
use crate::frame::{ETH_OVERHEAD, Packet};
use crate::link::Link;
use crate::offload::Plain;
use crate::opener::{HandedOver, Opener};
use crate::sink::{Delivery, OnFull, RxDrop, RxSink, Waiter};

/// Bytes of the length before each frame.
const LENGTH: usize = 4;
/// The largest frame that a peer may send, as in QEMU. A greater length ends the connection.
const FRAME_MAX: usize = 4096 + 65536;
/// Bytes that the task reads from the peer at a time.
const INPUT: usize = 256 << 10;
/// When this many bytes wait for the peer, further frames wait in the driver's ring.
const OUTPUT_MAX: usize = 256 << 10;
/// The most bytes that a saved stream has for its peer: these, and the plain frames of a last one.
const SAVED_OUTPUT_MAX: usize = OUTPUT_MAX + (4 << 20);
/// The pause after a failure to connect or to accept.
const RETRY: Duration = Duration::from_secs(1);
/// The longest path of a UNIX socket, in bytes.
const PATH_MAX: usize = 107;

/// The back end; see the module.
pub struct Stream {
    opener: Arc<dyn Opener>,
    path: PathBuf,
    listener: Option<Arc<OwnedFd>>,
    link: Arc<Link>,
    counters: Arc<StreamCounters>,
    socket: Socket,
    /// The device is quiesced: what another process may have taken over stays.
    quiesced: AtomicBool,
    /// Closes what peers sent along. While much waits for it, the stream takes no new peer.
    closer: Closer,
}

/// The socket of the peer, for the device and for its queue. Before there is a queue, it is one
/// that another process has handed over.
type Socket = Arc<Mutex<Option<Arc<OwnedFd>>>>;

/// The names of the descriptors.
const LISTENER: &str = "stream.listener";
const PEER: &str = "stream.peer";

#[derive(Default)]
struct StreamCounters {
    connects: Counter,
    disconnects: Counter,
}

impl Stream {
    /// Makes the end that connects to the socket at `path`. The socket need not exist yet.
    pub fn connecting(
        opener: Arc<dyn Opener>,
        path: &Path,
        link: Arc<Link>,
        handed: &mut HandedOver,
    ) -> Result<Stream, CreateError> {
        check_length("connect", path)?;
        let socket = handed.take(PEER);
        if socket.is_none() && !path.exists() {
            tracing::warn!(path = %path.display(), "nothing is at the stream's path yet");
        }
        Ok(Stream::with(opener, path, None, link, socket))
    }

    fn with(
        opener: Arc<dyn Opener>,
        path: &Path,
        listener: Option<OwnedFd>,
        link: Arc<Link>,
        socket: Option<OwnedFd>,
    ) -> Stream {
        Stream {
            opener,
            path: path.into(),
            listener: listener.map(Arc::new),
            link,
            counters: Arc::default(),
            socket: Arc::new(Mutex::new(socket.map(Arc::new))),
            quiesced: AtomicBool::new(false),
            closer: Closer::new(),
        }
    }

    /// Makes the end that listens at `path`. It replaces a socket that exists already and has no
    /// listener.
    pub fn listening(
        opener: Arc<dyn Opener>,
        path: &Path,
        link: Arc<Link>,
        handed: &mut HandedOver,
    ) -> Result<Stream, CreateError> {
        check_length("listen", path)?;
        let failed =
            |error: std::io::Error| CreateError(format!("\"listen\" is {path:?}: {error}"));
        let listener = match handed.take(LISTENER) {
            Some(listener) => listener,
            None => opener.listen(path).map_err(failed)?,
        };
        let socket = handed.take(PEER);
        Ok(Stream::with(opener, path, Some(listener), link, socket))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // While the device is quiesced, another process may have the listener, and keeps it. If no
        // other has it, it is closed here, so that another device can listen at the path at once.
        if let Some(listener) = self.listener.take().filter(|_| !*self.quiesced.get_mut()) {
            self.opener.remove(&self.path);
            // What a client has sent, and nobody has accepted, is closed with the listener.
            self.closer.close_last(listener);
        }
        if let Some(socket) = lock(&self.socket).take().and_then(Arc::into_inner) {
            self.closer.close(socket);
        }
    }
}

/// Checks the length of the path in the setting `key`.
fn check_length(key: &str, path: &Path) -> Result<(), CreateError> {
    let bytes = path.as_os_str().len();
    SocketAddrUnix::new(path).map(drop).map_err(|error| {
        CreateError(if bytes > PATH_MAX {
            format!(
                "\"{key}\" is a path of {bytes} bytes; the path of a socket has at most {PATH_MAX}"
            )
        } else {
            format!("\"{key}\" is {path:?}: {error}")
        })
    })
}

impl Backend for Stream {
    fn tx_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn rx_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn steers(&self) -> bool {
        true // There is one queue.
    }

    fn plug(&self, port: Arc<Port>) -> Result<Arc<dyn Plug>, ErrorCode> {
        Ok(Arc::new(StreamPlug {
            opener: self.opener.clone(),
            path: self.path.clone(),
            listener: self.listener.clone(),
            link: self.link.clone(),
            counters: self.counters.clone(),
            socket: self.socket.clone(),
            port,
            closer: self.closer.clone(),
        }))
    }

    // Relaxed: the device calls all of these and the drop in order.
    fn quiesce(&self) {
        self.quiesced.store(true, Ordering::Relaxed);
    }

    fn resume(&self) {
        self.quiesced.store(false, Ordering::Relaxed);
    }

    fn save(&self) -> Result<Value, String> {
        let StreamCounters { connects, disconnects } = &*self.counters;
        state::part(&StreamState { connects: connects.get(), disconnects: disconnects.get() })
    }

    fn restore(&self, saved: &Value) -> Result<(), String> {
        let StreamState { connects, disconnects } = state::read_part(saved)?;
        state::check_count("connects", connects)?;
        state::check_count("disconnects", disconnects)?;
        self.counters.connects.add(connects);
        self.counters.disconnects.add(disconnects);
        Ok(())
    }

    fn descriptors(&self) -> std::io::Result<Vec<(String, OwnedFd)>> {
        let socket = lock(&self.socket).clone();
        let all = [(LISTENER, &self.listener), (PEER, &socket)];
        let copy = |(name, fd): (&str, &Option<Arc<OwnedFd>>)| {
            Some(fd.as_ref()?.try_clone().map(|fd| (name.to_owned(), fd)))
        };
        all.into_iter().filter_map(copy).collect()
    }

    fn inspect(&self) -> Value {
        json!({
            "stream": self.path,
            "end": if self.listener.is_some() { "listen" } else { "connect" },
            "connects": self.counters.connects,
            "disconnects": self.counters.disconnects,
        })
    }
}

/// A driver's use of the stream.
struct StreamPlug {
    opener: Arc<dyn Opener>,
    path: PathBuf,
    listener: Option<Arc<OwnedFd>>,
    link: Arc<Link>,
    counters: Arc<StreamCounters>,
    socket: Socket,
    port: Arc<Port>,
    closer: Closer,
}

/// The back end as plain data (spec/state-format.md, "Back ends").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamState {
    connects: u64,
    disconnects: u64,
}

impl Plug for StreamPlug {
    fn queue(&self, index: u16, task: &TaskHandle) -> Result<Box<dyn Queue>, ErrorCode> {
        if index != 0 {
            return Err(ErrorCode::BAD_ARGUMENT);
        }
        Ok(Box::new(StreamQueue {
            opener: self.opener.clone(),
            path: self.path.clone(),
            listener: self.listener.clone(),
            listening: false,
            link: self.link.clone(),
            counters: self.counters.clone(),
            waiter: Waiter { key: self.port.key(0), task: task.clone() },
            port: self.port.clone(),
            socket: self.socket.clone(),
            closer: self.closer.clone(),
            peer: None,
            retry: None,
            told: false,
            plain: Plain::default(),
        }))
    }

    fn set_mac(&self, mac: Mac) -> bool {
        self.port.filter.set_mac(mac);
        true
    }
}

/// A connected peer.
struct Peer {
    socket: Arc<OwnedFd>,
    /// Bytes for the peer. Those before `sent` have been sent.
    output: Vec<u8>,
    sent: usize,
    /// Received bytes. Those in `from..to` are not delivered yet.
    input: Box<[u8]>,
    from: usize,
    to: usize,
    /// Bytes still to come of a frame that is skipped.
    skip: usize,
    /// Whether room in the socket wakes the task. That is so only while bytes wait for room,
    /// because each read of the peer makes room.
    wakes_for_room: bool,
}

/// A queue as plain data (spec/state-format.md, "Back ends").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueState {
    /// The connected peer.
    peer: Option<PeerState>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PeerState {
    /// Bytes for the peer that were not sent.
    #[serde(with = "hex::serde")]
    output: Vec<u8>,
    /// Bytes of the peer that were not delivered.
    #[serde(with = "hex::serde")]
    input: Vec<u8>,
    /// Bytes still to come of a frame that is skipped.
    skip: usize,
}

/// Why the connection to a peer ended.
enum Gone {
    Ended,
    Nonsense(usize),
    /// The peer has sent descriptors along.
    Descriptors,
    Failed(Errno),
}

impl Peer {
    fn new(socket: Arc<OwnedFd>) -> Peer {
        let input = vec![0; INPUT].into_boxed_slice();
        Peer {
            socket,
            output: Vec::new(),
            sent: 0,
            input,
            from: 0,
            to: 0,
            skip: 0,
            wakes_for_room: false,
        }
    }

    /// The bytes that wait, as plain data.
    fn save(&self) -> PeerState {
        PeerState {
            output: self.output[self.sent..].to_vec(),
            input: self.input[self.from..self.to].to_vec(),
            skip: self.skip,
        }
    }

    /// Checks what [`save`](Self::save) returned.
    fn check(PeerState { output, input, skip }: &PeerState) -> Result<(), String> {
        let fits = output.len() <= SAVED_OUTPUT_MAX && input.len() <= INPUT && *skip <= FRAME_MAX;
        // While it skips, the buffer holds no other bytes.
        if fits && (*skip == 0 || input.is_empty()) {
            return Ok(());
        }
        Err("more bytes wait in the stream than can".into())
    }

    /// Goes on from what [`save`](Self::save) returned.
    fn go_on(&mut self, PeerState { output, input, skip }: &PeerState) {
        self.output.clone_from(output);
        self.input[..input.len()].copy_from_slice(input);
        (self.sent, self.from, self.to, self.skip) = (0, 0, input.len(), *skip);
    }

    /// Whether so many bytes wait for the peer that frames have to wait.
    fn waits(&self) -> bool {
        self.output.len() - self.sent > OUTPUT_MAX
    }

    fn push(&mut self, frame: &Packet<'_>) {
        // A frame is much shorter than 4 GiB.
        let len = u32::try_from(frame.bytes()).unwrap_or(0);
        self.output.extend_from_slice(&len.to_be_bytes());
        frame.append_to(&mut self.output, usize::MAX);
    }

    /// Sends as many bytes as the socket takes.
    fn flush(&mut self) -> Result<(), Gone> {
        while self.sent < self.output.len() {
            match send(
                &self.socket,
                &self.output[self.sent..],
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(n) => self.sent += n,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Gone::Ended),
                Err(error) => return Err(Gone::Failed(error)),
            }
        }
        if self.sent == self.output.len() {
            self.output.clear();
            self.sent = 0;
        } else if self.sent > OUTPUT_MAX / 2 {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
        Ok(())
    }

    /// Receives more bytes. Returns false if there are none now.
    fn fill(&mut self, closer: &Closer) -> Result<bool, Gone> {
        self.input.copy_within(self.from..self.to, 0);
        self.to -= self.from;
        self.from = 0;
        match plain::recv(self.socket.as_fd(), false, &mut self.input[self.to..], closer) {
            Ok(0) => Err(Gone::Ended),
            Ok(n) => {
                let skipped = n.min(self.skip);
                self.skip -= skipped;
                // While it skips, the buffer holds no other bytes.
                self.from += skipped;
                self.to += n;
                Ok(true)
            }
            Err(Errno::AGAIN) => Ok(false),
            Err(Errno::CONNRESET) => Err(Gone::Ended),
            Err(Errno::PROTO) => Err(Gone::Descriptors),
            Err(error) => Err(Gone::Failed(error)),
        }
    }

    /// The range of the next frame in the input, if the frame is complete. A frame longer than
    /// `longest` is skipped: the result is then `None` and true.
    fn next(&mut self, longest: usize) -> Result<(Option<std::ops::Range<usize>>, bool), Gone> {
        let Some(length) = self.input[self.from..self.to].first_chunk::<LENGTH>() else {
            return Ok((None, false));
        };
        let len = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if len == 0 || len > FRAME_MAX {
            return Err(Gone::Nonsense(len));
        }
        let at = self.from + LENGTH;
        if len > longest {
            let here = len.min(self.to - at);
            self.from = at + here;
            self.skip = len - here;
            return Ok((None, true));
        }
        Ok(((self.to - at >= len).then_some(at..at + len), false))
    }
}

struct StreamQueue {
    opener: Arc<dyn Opener>,
    path: PathBuf,
    listener: Option<Arc<OwnedFd>>,
    /// Whether the listener wakes the task.
    listening: bool,
    link: Arc<Link>,
    counters: Arc<StreamCounters>,
    port: Arc<Port>,
    waiter: Waiter,
    socket: Socket,
    closer: Closer,
    peer: Option<Peer>,
    retry: Option<Instant>,
    /// Whether the log has reported that there is no peer.
    told: bool,
    plain: Plain,
}

impl StreamQueue {
    /// Connects to a peer or accepts one, if that is possible now.
    fn seek(&mut self) -> Result<(), ErrorCode> {
        if self.closer.is_full() {
            self.retry = Some(Instant::now() + RETRY);
            return Ok(());
        }
        let task = &self.waiter.task;
        let failed = |error: Errno| {
            tracing::error!(device = self.port.name, %error, "cannot watch the stream");
            ErrorCode::FAILED
        };
        let socket = match &self.listener {
            Some(listener) => {
                if !self.listening {
                    task.watch(&**listener, Interest::Read).map_err(failed)?;
                    self.listening = true;
                }
                self.retry = None;
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                match retry_on_intr(|| accept_with(&**listener, flags)) {
                    Ok(socket) => Some(socket),
                    Err(Errno::AGAIN) => None,
                    Err(error) => {
                        // For instance, the process has no free descriptor. A peer in the backlog
                        // causes no second event.
                        let device = &self.port.name;
                        tracing::debug!(device, %error, "cannot accept the stream's peer now");
                        self.retry = Some(Instant::now() + RETRY);
                        None
                    }
                }
            }
            None if self.retry.is_some_and(|at| Instant::now() < at) => None,
            None => {
                let connected = self.opener.connect(&self.path);
                self.retry = connected.is_err().then(|| Instant::now() + RETRY);
                if let Err(error) = &connected {
                    let (device, path) = (&self.port.name, self.path.display());
                    if self.told {
                        tracing::debug!(device, %path, %error, "no peer yet");
                    } else {
                        // Log this once, not every second.
                        let text = "the stream has no peer yet; trying again every second";
                        tracing::warn!(device, %path, %error, "{text}");
                        self.told = true;
                    }
                }
                connected.ok()
            }
        };
        if let Some(socket) = socket {
            self.begin(Arc::new(socket))?;
            self.counters.connects.one();
            self.link.set_carrier(true);
            let (device, path) = (&self.port.name, self.path.display());
            tracing::info!(device, %path, "the stream has a peer");
        }
        Ok(())
    }

    /// Serves the peer behind this socket.
    fn begin(&mut self, socket: Arc<OwnedFd>) -> Result<(), ErrorCode> {
        self.waiter.task.watch(&*socket, Interest::Read).map_err(|error| {
            tracing::error!(device = self.port.name, %error, "cannot watch the stream");
            ErrorCode::FAILED
        })?;
        self.told = false;
        *lock(&self.socket) = Some(socket.clone());
        self.peer = Some(Peer::new(socket));
        Ok(())
    }

    /// Starts or stops the watch for room in the socket.
    fn watch_room(&mut self) -> Result<(), Errno> {
        let (Some(peer), task) = (&mut self.peer, &self.waiter.task) else { return Ok(()) };
        let wanted = !peer.output.is_empty();
        if wanted != peer.wakes_for_room {
            peer.wakes_for_room = wanted;
            task.unwatch(&*peer.socket);
            task.watch(&*peer.socket, if wanted { Interest::ReadWrite } else { Interest::Read })?;
        }
        Ok(())
    }

    /// Lets go of the peer. Returns its socket, unless the device makes a copy of it now.
    fn let_go(&mut self) -> Option<OwnedFd> {
        let peer = self.peer.take()?;
        self.waiter.task.unwatch(&*peer.socket);
        *lock(&self.socket) = None;
        Arc::into_inner(peer.socket)
    }

    fn part(&mut self, gone: Gone) {
        if self.peer.is_none() {
            return;
        }
        if let Some(socket) = self.let_go() {
            plain::close(socket, &self.closer);
        }
        let (device, path) = (&self.port.name, self.path.display());
        match gone {
            Gone::Ended => tracing::info!(device, %path, "the stream's peer has gone"),
            Gone::Nonsense(len) => {
                tracing::warn!(device, %path, len, "the stream's peer sent a bad frame length")
            }
            Gone::Descriptors => {
                tracing::warn!(device, %path, "the stream's peer sent descriptors along")
            }
            Gone::Failed(error) => tracing::warn!(device, %path, %error, "the stream failed"),
        }
        self.counters.disconnects.one();
        self.retry = Some(Instant::now() + RETRY);
        self.link.set_carrier(false);
    }

    /// Delivers frames of the peer until there is none, there are too few buffers, or the budget is
    /// used up.
    fn deliver(&mut self, sink: &mut dyn RxSink, budget: u32) -> Result<u32, Gone> {
        let Some(peer) = &mut self.peer else { return Ok(0) };
        peer.flush()?;
        let mut done = 0;
        while done < budget {
            let (range, skipped) = peer.next(self.port.mtu + ETH_OVERHEAD)?;
            if skipped {
                sink.count_drop(RxDrop::TooLong);
            }
            let Some(range) = range else {
                if skipped || peer.fill(&self.closer)? {
                    // Skipping counts as work: a peer that sends only such frames must not keep
                    // other tasks of the thread waiting.
                    done += 1;
                    continue;
                }
                break;
            };
            let end = range.end;
            match Packet::plain(&peer.input[range]) {
                None => sink.count_drop(RxDrop::BadFrame),
                // The wait delays only the peer. Its frames wait in the socket, without a limit of
                // time.
                Some(packet) => match sink.deliver(&packet, OnFull::Wait) {
                    Delivery::Full { .. } => {
                        sink.wait(&self.waiter);
                        break;
                    }
                    Delivery::Delivered { units } => done += units - 1,
                    _ => {}
                },
            }
            peer.from = end;
            done += 1;
        }
        Ok(done)
    }
}

impl Queue for StreamQueue {
    fn send(&mut self, packet: &Packet<'_>) -> Sent {
        let Some(peer) = &mut self.peer else { return Sent::Dropped(TxDrop::NoLink) };
        // Push first: a wait must follow an attempt that found the socket full. Otherwise nothing
        // would end the wait.
        if peer.waits() && peer.flush().is_ok() && peer.waits() {
            return Sent::Wait { until: None, moved: false };
        }
        if packet.header.fits(Offloads::NONE) {
            peer.push(packet);
            return Sent::Done { units: 1 };
        }
        let Some(count) = self.plain.load(packet) else {
            return Sent::Dropped(TxDrop::BadFrame);
        };
        for i in 0..count {
            if let Some(piece) = Packet::plain(self.plain.piece(i)) {
                peer.push(&piece);
            }
        }
        Sent::Done { units: u32::try_from(count).unwrap_or(u32::MAX) }
    }

    fn flush(&mut self) {
        if let Some(Err(gone)) = self.peer.as_mut().map(Peer::flush) {
            self.part(gone);
        }
    }

    fn receive(&mut self, sink: &mut dyn RxSink, budget: u32) -> Result<u32, ErrorCode> {
        if self.peer.is_none() {
            self.seek()?;
        }
        let delivered = self.deliver(sink, budget).and_then(|count| {
            self.watch_room().map_err(Gone::Failed)?;
            Ok(count)
        });
        match delivered {
            Ok(count) => Ok(count),
            Err(gone) => {
                self.part(gone);
                // The next peer may wait at the listener already.
                Ok(u32::from(self.listener.is_some()))
            }
        }
    }

    fn arm(&mut self) -> Armed {
        // If the peer left after the frame began to wait, nothing would end the wait. So the task
        // sends the frame again, and it is dropped.
        if self.peer.is_none() { Armed::Missed } else { Armed::Waiting }
    }

    fn deadline(&self) -> Option<Instant> {
        if self.peer.is_none() { self.retry } else { None }
    }

    fn save(&mut self) -> Result<Value, String> {
        state::part(&QueueState { peer: self.peer.as_ref().map(Peer::save) })
    }

    /// Without the socket of the peer, what waited for it or came from it is lost, and the queue
    /// looks for another peer.
    fn restore(&mut self, saved: &Value) -> Result<(), String> {
        let QueueState { peer } = state::read_part(saved)?;
        let socket = lock(&self.socket).take();
        let Some(saved) = peer else { return Ok(()) };
        Peer::check(&saved)?;
        if let Some(socket) = socket {
            self.begin(socket).map_err(|error| error.to_string())?;
            self.peer.iter_mut().for_each(|peer| peer.go_on(&saved));
            self.link.set_carrier(true);
        }
        Ok(())
    }
}

impl Drop for StreamQueue {
    fn drop(&mut self) {
        if let Some(listener) = &self.listener {
            self.waiter.task.unwatch(&**listener);
        }
        // Another process may go on with the connection, so this does not end it.
        if let Some(socket) = self.let_go() {
            self.closer.close(socket);
        }
        self.link.set_carrier(false);
    }
}
