// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver's call of the class, which may take time (spec/pci.md, "Commands that take time").

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use vbus_shm::ErrorCode;
use vbus_shm::abi::event;

use crate::events::Events;
use crate::lock::lock;
use crate::memory::MemoryContext;

/// The most calls of a device that its class may hold at a time. A driver has one call in progress
/// at most. The others were cancelled, and the class has not dropped them yet. Each keeps its
/// buffer of up to 64 KiB.
pub(crate) const CALLS_MAX: usize = 16;

/// A call that the class has to answer. The class ends it with [`finish`](Self::finish), from any
/// thread. A call that is dropped fails with [`ErrorCode::FAILED`].
#[must_use = "a call that is dropped fails"]
pub struct Call {
    /// Counts the device's calls ([`CALLS_MAX`]).
    _count: Arc<()>,
    shared: Arc<OpenCall>,
    function: u32,
    flags: u32,
    buffer: Vec<u8>,
}

/// A call under way, as the connector sees it.
#[derive(Clone)]
pub struct PendingCall(Arc<OpenCall>);

/// The state of a call when its command returns.
pub enum Called {
    /// The call has ended with this value.
    Now(u64),
    /// The call goes on. [`event::COMMAND`] tells the driver when it has ended.
    Later(PendingCall),
}

struct OpenCall {
    state: Mutex<CallState>,
    /// Notified when the call has ended.
    ended: Condvar,
    memory: Arc<MemoryContext>,
    addr: u64,
    events: Arc<Events>,
}

enum CallState {
    /// `told`: the driver knows that the call takes time and waits for the event.
    Running {
        told: bool,
    },
    Ended(Result<u64, ErrorCode>),
}

impl Called {
    /// The value of a call that has ended.
    ///
    /// # Errors
    /// [`ErrorCode::IN_PROGRESS`] if the call goes on.
    pub fn now(self) -> Result<u64, ErrorCode> {
        match self {
            Called::Now(value) => Ok(value),
            Called::Later(_) => Err(ErrorCode::IN_PROGRESS),
        }
    }
}

impl Call {
    /// A call with a copy of the driver's buffer, which is at `addr`.
    pub(crate) fn new(
        count: Arc<()>,
        (function, flags): (u32, u32),
        (addr, buffer): (u64, Vec<u8>),
        memory: Arc<MemoryContext>,
        events: Arc<Events>,
    ) -> (Call, PendingCall) {
        let state = Mutex::new(CallState::Running { told: false });
        let shared = Arc::new(OpenCall { state, ended: Condvar::new(), memory, addr, events });
        (
            Call { _count: count, shared: shared.clone(), function, flags, buffer },
            PendingCall(shared),
        )
    }

    /// The number of the class's function.
    pub fn function(&self) -> u32 {
        self.function
    }

    /// The call's flags.
    pub fn flags(&self) -> u32 {
        self.flags
    }

    /// A copy of the driver's buffer. Its content at the end of the call is the answer.
    pub fn buffer(&mut self) -> &mut [u8] {
        &mut self.buffer
    }

    /// Whether the driver has closed the device or the connection has ended. Nobody waits for the
    /// answer then.
    pub fn is_cancelled(&self) -> bool {
        matches!(*lock(&self.shared.state), CallState::Ended(_))
    }

    /// Ends the call. After success the buffer is copied to the driver's buffer. A cancelled call
    /// does not touch the driver's memory.
    pub fn finish(self, result: Result<u64, ErrorCode>) {
        self.shared.end(|shared| {
            let value = result?;
            if !self.buffer.is_empty() {
                // The buffer was mapped when the call began. The peer has unmapped it since.
                let written = shared.memory.view().write(shared.addr, &self.buffer);
                written.map_err(|_| ErrorCode::REVOKED)?;
            }
            Ok(value)
        });
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.shared.end(|_| Err(ErrorCode::FAILED));
    }
}

impl std::fmt::Debug for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Call").field("function", &self.function).finish_non_exhaustive()
    }
}

impl OpenCall {
    /// Ends the call with the result that `result` returns, unless the call has ended.
    fn end(&self, result: impl FnOnce(&OpenCall) -> Result<u64, ErrorCode>) {
        let mut state = lock(&self.state);
        let CallState::Running { told } = *state else { return };
        // Under the lock: a thread that cancels waits for it. Afterwards nobody touches the
        // driver's memory.
        *state = CallState::Ended(result(self));
        drop(state);
        self.ended.notify_all();
        if told {
            self.events.raise(event::COMMAND);
        }
    }
}

impl PendingCall {
    /// The result, if the call has ended.
    pub fn result(&self) -> Option<Result<u64, ErrorCode>> {
        match *lock(&self.0.state) {
            CallState::Running { .. } => None,
            CallState::Ended(result) => Some(result),
        }
    }

    /// As [`result`](Self::result). If the call goes on, its end raises [`event::COMMAND`].
    pub(crate) fn result_or_tell(&self) -> Option<Result<u64, ErrorCode>> {
        match &mut *lock(&self.0.state) {
            CallState::Running { told } => {
                *told = true;
                None
            }
            CallState::Ended(result) => Some(*result),
        }
    }

    /// Waits until the call has ended, but no longer than `timeout`. Returns whether it has ended.
    pub(crate) fn wait(&self, timeout: Duration) -> bool {
        let runs = |state: &mut CallState| matches!(state, CallState::Running { .. });
        let waited = self.0.ended.wait_timeout_while(lock(&self.0.state), timeout, runs);
        let (state, _) = waited.unwrap_or_else(|error| error.into_inner());
        matches!(*state, CallState::Ended(_))
    }

    /// Ends the call with `error`. Afterwards the device does not touch the driver's buffer.
    pub(crate) fn cancel(&self, error: ErrorCode) {
        self.0.end(|_| Err(error));
    }
}
