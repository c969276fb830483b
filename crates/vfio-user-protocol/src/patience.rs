// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How long a client waits for a server that does not answer.
//!
//! A server may stand still for any time: it is stopped by a debugger, its control group is frozen,
//! or the machine is loaded. As long as the connection is open, the client cannot tell that from a
//! server that will never answer. So the program decides.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::message::command_name;

/// The time limit of a call, from its beginning to the last byte of the reply, unless the program
/// sets another [`Patience`]. Messages that come in between do not extend it. QEMU has the same
/// limit.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(5);
/// How long a call may take once the program wants to end.
const AT_THE_END: Duration = Duration::from_secs(1);

type Told = Arc<dyn Fn(bool) + Send + Sync>;

/// How long the calls of a [`Client`](crate::Client) wait for the server.
#[derive(Clone)]
pub struct Patience {
    /// `None`: without a limit.
    limit: Option<Duration>,
    stop: Option<Arc<OwnedFd>>,
    stall: Option<(Duration, Told)>,
}

impl Default for Patience {
    /// A limit of 5 s for each call.
    fn default() -> Patience {
        Patience::limit(TIMEOUT)
    }
}

impl Patience {
    /// Each call waits this long at most. Then the connection has failed.
    #[must_use]
    pub fn limit(limit: Duration) -> Patience {
        Patience { limit: Some(limit), stop: None, stall: None }
    }

    /// Each call waits as long as the connection is open. For a program that a signal ends.
    #[must_use]
    pub fn endless() -> Patience {
        Patience { limit: None, stop: None, stall: None }
    }

    /// Each call waits as long as the connection is open. Once `stop` is readable, a call waits for
    /// one more second at most, so that the program can end.
    #[must_use]
    pub fn until(stop: OwnedFd) -> Patience {
        Patience { limit: None, stop: Some(Arc::new(stop)), stall: None }
    }

    /// Calls `told` with `true` when a call has waited for `after`, and with `false` when that call
    /// ends. The thread that makes the call calls it, and holds the client meanwhile.
    #[must_use]
    pub fn on_stall(
        mut self,
        after: Duration,
        told: impl Fn(bool) + Send + Sync + 'static,
    ) -> Patience {
        self.stall = Some((after, Arc::new(told)));
        self
    }
}

impl fmt::Debug for Patience {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Patience").field("limit", &self.limit).finish_non_exhaustive()
    }
}

/// The waiting of one call.
pub(crate) struct Wait {
    command: u16,
    patience: Patience,
    began: Instant,
    deadline: Option<Instant>,
    /// `stop` was readable.
    stopped: bool,
    /// The program was told of a stall.
    told: bool,
}

impl Wait {
    pub(crate) fn begin(command: u16, patience: Patience) -> Wait {
        let began = Instant::now();
        let deadline = patience.limit.and_then(|limit| began.checked_add(limit));
        Wait { command, patience, began, deadline, stopped: false, told: false }
    }

    /// The name of the call's command.
    pub(crate) fn name(&self) -> &'static str {
        command_name(self.command)
    }

    /// Whether the time has passed.
    pub(crate) fn is_over(&self) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= Instant::now())
    }

    /// Waits until `socket` is ready. False: the time has passed.
    pub(crate) fn until(
        &mut self,
        socket: BorrowedFd<'_>,
        flags: PollFlags,
    ) -> Result<bool, Errno> {
        loop {
            let now = Instant::now();
            if self.deadline.is_some_and(|deadline| deadline <= now) {
                return Ok(false);
            }
            let tell = self.stall_at();
            if tell.is_some_and(|at| at <= now) {
                self.told = true;
                self.tell(true);
            }
            let next = [self.deadline, self.stall_at()].into_iter().flatten().min();
            let left = next.map(|at| at.saturating_duration_since(now));
            let left = left.map(Timespec::try_from).transpose().map_err(|_| Errno::INVAL)?;
            let stop = self.patience.stop.clone().filter(|_| !self.stopped);
            let mut fds = vec![PollFd::from_borrowed_fd(socket, flags)];
            fds.extend(
                stop.iter().map(|stop| PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN)),
            );
            match poll(&mut fds, left.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
            if fds.first().is_some_and(|socket| !socket.revents().is_empty()) {
                return Ok(true);
            }
            if fds.get(1).is_some_and(|stop| !stop.revents().is_empty()) {
                self.stopped = true;
                self.deadline = Instant::now().checked_add(AT_THE_END);
            }
        }
    }

    /// When the program is told of a stall, if it has not been told.
    fn stall_at(&self) -> Option<Instant> {
        let (after, _) = self.patience.stall.as_ref().filter(|_| !self.told)?;
        self.began.checked_add(*after)
    }

    fn tell(&self, stalled: bool) {
        if let Some((_, told)) = &self.patience.stall {
            told(stalled);
        }
    }

    /// The call has ended.
    pub(crate) fn end(self) {
        if self.told {
            self.tell(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::command;

    #[test]
    fn only_a_limit_ends_a_call() {
        let (stop, _open) = rustix::pipe::pipe().expect("a pipe");
        let begin = |patience| Wait::begin(command::DEVICE_RESET, patience);
        assert_eq!(begin(Patience::until(stop)).deadline, None);
        let wait = begin(Patience::default());
        assert_eq!(wait.deadline, Some(wait.began + TIMEOUT));
        assert!(!wait.is_over() && begin(Patience::limit(Duration::ZERO)).is_over());
    }
}
