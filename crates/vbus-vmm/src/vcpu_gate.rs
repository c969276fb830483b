// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The gate at which the threads of all virtual CPUs wait while the machine stands still.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::lock::lock;

/// How long a virtual CPU may take to come back from an access, to a device too.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long to wait before telling the virtual CPUs again.
const RETRY: Duration = Duration::from_millis(100);

/// The gate. A closed gate stops every thread that comes to it.
pub struct VcpuGate {
    state: Mutex<State>,
    changed: Condvar,
    /// Any thread may close the gate. Only a thread that holds the lock opens it.
    closed: AtomicBool,
}

struct State {
    /// The number of threads that wait at the gate, or have ended.
    waiting: usize,
    /// Threads at the gate must end.
    end: bool,
}

impl VcpuGate {
    /// Makes a closed gate.
    pub fn new() -> Arc<VcpuGate> {
        let state = Mutex::new(State { waiting: 0, end: false });
        Arc::new(VcpuGate { state, changed: Condvar::new(), closed: AtomicBool::new(true) })
    }

    /// Closes the gate until [`open`](Self::open). A virtual CPU whose thread calls this, because
    /// its guest asked for a reset or for power-off, stops once it has finished its exit.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// Whether the gate is closed.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Opens the gate: all threads run.
    pub fn open(&self) {
        let _state = self.lock();
        self.closed.store(false, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// Closes the gate and waits until `threads` threads are at it. `fetch` brings threads back
    /// from KVM; it is called again and again while some are missing. The lock is held meanwhile,
    /// so that no thread can pass [`wait`](Self::wait) between the closing and the call.
    ///
    /// # Errors
    /// A thread does not come back within 10 s, or `fetch` fails.
    pub fn hold(&self, threads: usize, mut fetch: impl FnMut() -> Result<()>) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        let mut state = self.lock();
        self.close();
        fetch()?;
        while state.waiting < threads {
            let busy = threads - state.waiting;
            ensure!(
                Instant::now() < deadline,
                "{busy} virtual CPUs did not stop within {TIMEOUT:?}: a device does not answer"
            );
            state =
                self.changed.wait_timeout(state, RETRY).unwrap_or_else(PoisonError::into_inner).0;
            fetch()?;
        }
        Ok(())
    }

    /// Makes all threads end, which must be at the gate.
    pub fn end(&self) {
        self.lock().end = true;
        self.changed.notify_all();
    }

    /// Waits in the calling thread until the gate is open, and then calls `pass` with the lock
    /// held. Returns false if the thread must end.
    pub fn wait(&self, pass: impl FnOnce()) -> bool {
        let mut state = self.lock();
        state.waiting += 1;
        self.changed.notify_all();
        while self.is_closed() && !state.end {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.end {
            return false;
        }
        state.waiting -= 1;
        pass();
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}
