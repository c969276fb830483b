// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs the server of a device's socket.
//!
//! A task on the device's worker finds out that there is something to do. The server does it on one
//! of the threads for long work, because a message may map memory or end a session. Messages are
//! few: none comes while frames pass.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Instant;

use vbus_core::{
    ConnectionCounters, Endpoint, ErrorCode, Executor, Progress, Task, TaskHandle, lock,
};
use vbus_eventfd::Signaller;
use vfio_user_protocol::{Peer, Stats};

use super::front::front;
use super::server::Server;

/// The server of a device's socket, for front ends of vhost-user. Dropping it disconnects the front
/// end. The file of the socket stays.
pub struct VhostUserServer {
    path: PathBuf,
    task: TaskHandle,
    place: Arc<Place>,
}

/// Where the server is: with its task, or at a thread that does what is due.
#[derive(Default)]
struct Place {
    state: Mutex<State>,
    /// Notified when the server comes back.
    back: Condvar,
    /// The front end. Nobody waits for another lock with this one.
    peer: Mutex<Peer>,
}

#[derive(Default)]
struct State {
    /// `None`: it is at another thread, or the last user has it.
    server: Option<Box<Server>>,
    connected: bool,
    stats: Stats,
}

impl VhostUserServer {
    /// Serves the device behind `endpoint` to front ends that connect to `listener`: a non-blocking
    /// UNIX stream socket that listens at `path`. The server runs on the device's own event loop.
    ///
    /// # Errors
    /// The device has no [`Front`](super::Front), or the system refuses, for instance because this
    /// process has too many descriptors.
    pub fn with_listener(
        endpoint: &Arc<Endpoint>,
        listener: OwnedFd,
        path: &Path,
    ) -> io::Result<VhostUserServer> {
        let Some(front) = front(endpoint) else {
            return Err(io::Error::other("the device has no front for vhost-user"));
        };
        // If the kernel lacks what interrupts need, the operator learns it now.
        Signaller::of_process()?;
        let backend = front.backend(endpoint.clone());
        let executor = endpoint.executor();
        let counters = Arc::new(endpoint.counters().beside());
        let place = Arc::<Place>::default();
        let turn = ServerTask {
            place: place.clone(),
            executor: Arc::downgrade(executor),
            counters: counters.clone(),
            task: None,
        };
        let make = |task: &TaskHandle| {
            let task: Box<dyn Task> = Box::new(ServerTask { task: Some(task.clone()), ..turn });
            Ok::<_, Infallible>(task)
        };
        let Ok(task) = executor.spawn_with(endpoint.worker(), counters, |_| {}, make);
        match Server::new(listener, backend, task.clone()) {
            Ok(server) => lock(&place.state).server = Some(Box::new(server)),
            Err(error) => {
                task.stop();
                return Err(error.into());
            }
        }
        let served = Arc::downgrade(&place);
        endpoint.set_has_left(move || {
            served.upgrade().is_some_and(|place| lock(&place.peer).has_gone())
        });
        let waker = task.clone();
        endpoint.memory().on_loss(move || waker.wake());
        // A front end may have come before the server was there.
        task.wake();
        Ok(VhostUserServer { path: path.to_owned(), task, place })
    }

    /// The path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is a front end.
    pub fn is_connected(&self) -> bool {
        lock(&self.place.state).connected
    }

    /// The server's statistics so far.
    pub fn stats(&self) -> Stats {
        lock(&self.place.state).stats
    }
}

impl std::fmt::Debug for VhostUserServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VhostUserServer").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Drop for VhostUserServer {
    fn drop(&mut self) {
        let mut state = lock(&self.place.state);
        while state.server.is_none() {
            state = self.place.back.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        let server = state.server.take();
        drop(state);
        drop(server);
        self.task.stop();
    }
}

struct ServerTask {
    place: Arc<Place>,
    executor: Weak<Executor>,
    counters: Arc<ConnectionCounters>,
    /// This task.
    task: Option<TaskHandle>,
}

impl ServerTask {
    /// Lets another thread do what is due, and wakes the task afterwards.
    fn aside(&self, mut server: Box<Server>) {
        let Some(executor) = self.executor.upgrade() else {
            lock(&self.place.state).server = Some(server);
            return;
        };
        let (place, task) = (self.place.clone(), self.task.clone());
        executor.aside(self.counters.clone(), "messages of its socket", move || {
            server.ready(Instant::now());
            *lock(&place.peer) = server.peer();
            let mut state = lock(&place.state);
            (state.connected, state.stats) = (server.is_connected(), server.stats());
            state.server = Some(server);
            drop(state);
            place.back.notify_all();
            if let Some(task) = task {
                task.wake();
            }
        });
    }
}

impl Task for ServerTask {
    fn work(&self) -> String {
        "messages of its socket".into()
    }

    fn poll(&mut self, _budget: u32) -> Result<Progress, ErrorCode> {
        let now = Instant::now();
        let mut state = lock(&self.place.state);
        if let Some(server) = &mut state.server {
            server.poll_rings(now);
        }
        let due = state.server.take_if(|server| server.is_due(now));
        drop(state);
        if let Some(server) = due {
            self.aside(server);
        }
        Ok(Progress::Idle)
    }

    fn deadline(&self) -> Option<Instant> {
        lock(&self.place.state).server.as_ref().and_then(|server| server.deadline())
    }

    fn adaptive(&self) -> bool {
        false
    }
}
