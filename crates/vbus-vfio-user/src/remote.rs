//! Memory of the client that is reached by message: `DMA_READ` and `DMA_WRITE`, from the server to
//! the client.
//!
//! For memory that came without a descriptor. Requests are queued here from any thread and sent by
//! the server's own, which also runs their completions - after the handler of whatever command it
//! was busy with has returned and its reply was sent: a VMM waits for that reply with its global
//! lock held, and answers nothing meanwhile.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::protocol::{self, DmaAccess, Header, Kind, Malformed, command};

/// Requests of one client that wait to be sent, at most.
const MAX_QUEUED: usize = 256;
/// Requests of one client that wait for its reply, at most.
const MAX_IN_FLIGHT: usize = 32;

type ReadDone = Box<dyn FnOnce(Result<Vec<u8>, Errno>) + Send>;
type WriteDone = Box<dyn FnOnce(Result<(), Errno>) + Send>;

enum Request {
    Read { count: usize, done: ReadDone },
    Write { data: Vec<u8>, done: WriteDone },
}

impl Request {
    fn fail(self, errno: Errno) {
        match self {
            Self::Read { done, .. } => done(Err(errno)),
            Self::Write { done, .. } => done(Err(errno)),
        }
    }
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<(u64, Request)>,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: OwnedFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing that holds the lock can leave the queue half changed.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reaches the memory of one client by message, until that client goes.
#[derive(Clone)]
pub struct RemoteMemory(Arc<Shared>);

impl fmt::Debug for RemoteMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queue = self.0.lock();
        write!(f, "RemoteMemory {{ waiting: {}, closed: {} }}", queue.waiting.len(), queue.closed)
    }
}

impl RemoteMemory {
    /// Reads `count` bytes at `address`, which must lie in mappings that the client has made, and
    /// calls `done` with them from the server's thread.
    ///
    /// `done` gets an errno when the client refuses, does not accept that many bytes in one
    /// message, or goes.
    ///
    /// # Errors
    /// [`Errno::NOTCONN`] when the client is gone, [`Errno::AGAIN`] when too many requests wait;
    /// `done` is not called then.
    pub fn read(
        &self,
        address: u64,
        count: usize,
        done: impl FnOnce(Result<Vec<u8>, Errno>) + Send + 'static,
    ) -> Result<(), Errno> {
        self.push(address, Request::Read { count, done: Box::new(done) })
    }

    /// Writes `data` to `address`. Otherwise like [`RemoteMemory::read`].
    ///
    /// # Errors
    /// Like [`RemoteMemory::read`].
    pub fn write(
        &self,
        address: u64,
        data: Vec<u8>,
        done: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) -> Result<(), Errno> {
        self.push(address, Request::Write { data, done: Box::new(done) })
    }

    fn push(&self, address: u64, request: Request) -> Result<(), Errno> {
        {
            let mut queue = self.0.lock();
            if queue.closed {
                return Err(Errno::NOTCONN);
            }
            if queue.waiting.len() >= MAX_QUEUED {
                return Err(Errno::AGAIN);
            }
            queue.waiting.push_back((address, request));
        }
        // A full counter has woken the server already.
        let _ = rustix::io::write(&self.0.wake, &1u64.to_ne_bytes());
        Ok(())
    }
}

struct Pending {
    access: DmaAccess,
    request: Request,
    sent: Instant,
}

/// A reply that fits none of the requests, or does not fit its own.
#[derive(Debug, thiserror::Error)]
pub enum BadReply {
    /// No request with this id and command is waiting.
    #[error("reply {0} to no request of ours")]
    Unasked(Header),
    /// The body is not that of such a reply.
    #[error("reply {0}: {1}")]
    Body(Header, Malformed),
    /// The reply speaks of other memory.
    #[error("reply {0} names other memory than the request")]
    Other(Header),
}

/// The server's end: requests become messages, replies find their requests.
pub(crate) struct Outbound {
    shared: Arc<Shared>,
    pending: BTreeMap<u16, Pending>,
    next_id: u16,
}

impl Outbound {
    pub(crate) fn new() -> Result<Self, Errno> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { queue: Mutex::default(), wake });
        Ok(Self { shared, pending: BTreeMap::new(), next_id: 0 })
    }

    /// The handle for the target.
    pub(crate) fn handle(&self) -> RemoteMemory {
        RemoteMemory(self.shared.clone())
    }

    /// The eventfd that says that requests wait.
    pub(crate) fn wake(&self) -> &OwnedFd {
        &self.shared.wake
    }

    /// Takes the wake-up back, before a look at the queue.
    pub(crate) fn clear_wake(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.shared.wake, &mut count);
    }

    /// The next message to send, if one waits and not too many are in flight. `max_transfer` is the
    /// most that the client accepts, `mapped` says whether it has made the memory known.
    pub(crate) fn next_message(
        &mut self,
        now: Instant,
        max_transfer: usize,
        mapped: impl Fn(u64, u64) -> bool,
    ) -> Option<Vec<u8>> {
        while self.pending.len() < MAX_IN_FLIGHT {
            let (address, request) = self.shared.lock().waiting.pop_front()?;
            let (number, count, data) = match &request {
                Request::Read { count, .. } => (command::DMA_READ, *count, &[][..]),
                Request::Write { data, .. } => (command::DMA_WRITE, data.len(), &data[..]),
            };
            let access = DmaAccess { address, count: count as u64 };
            if count > max_transfer {
                request.fail(Errno::MSGSIZE);
                continue;
            }
            if count == 0 || !mapped(address, access.count) {
                request.fail(Errno::FAULT);
                continue;
            }
            let id = self.free_id();
            let bytes = protocol::message(
                id,
                number,
                Kind::Command { no_reply: false },
                &access.body(data),
            );
            self.pending.insert(id, Pending { access, request, sent: now });
            return Some(bytes);
        }
        None
    }

    /// An id that no request in flight has. There are fewer of those than ids.
    fn free_id(&mut self) -> u16 {
        loop {
            let id = self.next_id;
            self.next_id = self.next_id.wrapping_add(1);
            if !self.pending.contains_key(&id) {
                return id;
            }
        }
    }

    /// A reply has come: its request is complete.
    pub(crate) fn complete(
        &mut self,
        header: Header,
        error: Option<u32>,
        body: &[u8],
    ) -> Result<(), BadReply> {
        let number = match self.pending.get(&header.id).map(|p| &p.request) {
            Some(Request::Read { .. }) => command::DMA_READ,
            Some(Request::Write { .. }) => command::DMA_WRITE,
            None => return Err(BadReply::Unasked(header)),
        };
        if number != header.command {
            return Err(BadReply::Unasked(header));
        }
        let Some(Pending { access, request, .. }) = self.pending.remove(&header.id) else {
            return Err(BadReply::Unasked(header));
        };
        if let Some(errno) = error {
            let errno = i32::try_from(errno)
                .ok()
                .filter(|e| (1..4096).contains(e))
                .unwrap_or(Errno::IO.raw_os_error());
            request.fail(Errno::from_raw_os_error(errno));
            return Ok(());
        }
        match request {
            Request::Read { done, .. } => match DmaAccess::parse_with_data(body) {
                Ok((reply, data)) if reply == access => done(Ok(data.to_vec())),
                Ok(_) => {
                    done(Err(Errno::PROTO));
                    return Err(BadReply::Other(header));
                }
                Err(e) => {
                    done(Err(Errno::PROTO));
                    return Err(BadReply::Body(header, e));
                }
            },
            // The specification has a body of 12 bytes here, libvfio-user one of 16, and QEMU none.
            Request::Write { done, .. } => done(Ok(())),
        }
        Ok(())
    }

    /// When the oldest request in flight has waited for `patience`.
    pub(crate) fn deadline(&self, patience: Duration) -> Option<Instant> {
        self.pending.values().map(|p| p.sent).min().map(|sent| sent + patience)
    }

    /// The client is gone: everything that waits fails, and nothing more is accepted.
    pub(crate) fn close(&mut self) {
        let waiting = {
            let mut queue = self.shared.lock();
            queue.closed = true;
            std::mem::take(&mut queue.waiting)
        };
        let in_flight = std::mem::take(&mut self.pending).into_values().map(|p| p.request);
        for request in in_flight.chain(waiting.into_iter().map(|(_, request)| request)) {
            request.fail(Errno::CONNRESET);
        }
    }
}

impl Drop for Outbound {
    fn drop(&mut self) {
        self.close();
    }
}
