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
use rustix::io::{Errno, retry_on_intr};

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

    /// Whether the time has passed. It does not wait. For a call that may never have to wait.
    pub(crate) fn is_over(&mut self) -> Result<bool, Errno> {
        if let Some(stop) = self.stop() {
            let mut fds = [PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN)];
            if retry_on_intr(|| poll(&mut fds, Some(&Timespec::default())))? > 0 {
                self.end_soon();
            }
        }
        Ok(self.has_passed(Instant::now()))
    }

    /// Whether the time has passed at `now`. The program is told of a stall before.
    fn has_passed(&mut self, now: Instant) -> bool {
        if self.stall_at().is_some_and(|at| at <= now) {
            self.told = true;
            self.tell(true);
        }
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// What becomes readable when the program wants to end, unless it was readable.
    fn stop(&self) -> Option<Arc<OwnedFd>> {
        self.patience.stop.clone().filter(|_| !self.stopped)
    }

    /// The program wants to end.
    fn end_soon(&mut self) {
        self.stopped = true;
        self.deadline = Instant::now().checked_add(AT_THE_END);
    }

    /// Waits until `socket` is ready. False: the time has passed.
    pub(crate) fn until(
        &mut self,
        socket: BorrowedFd<'_>,
        flags: PollFlags,
    ) -> Result<bool, Errno> {
        loop {
            let now = Instant::now();
            if self.has_passed(now) {
                return Ok(false);
            }
            let next = [self.deadline, self.stall_at()].into_iter().flatten().min();
            let left = next.map(|at| at.saturating_duration_since(now));
            let left = left.map(Timespec::try_from).transpose().map_err(|_| Errno::INVAL)?;
            let stop = self.stop();
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
                self.end_soon();
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
        let mut wait = begin(Patience::default());
        assert_eq!(wait.deadline, Some(wait.began + TIMEOUT));
        assert_eq!(wait.is_over(), Ok(false));
        assert_eq!(begin(Patience::limit(Duration::ZERO)).is_over(), Ok(true));
    }

    /// A server that sends without end never lets the call wait.
    #[test]
    fn a_call_that_never_waits_learns_of_stop_and_tells_of_a_stall() {
        let (stop, open) = rustix::pipe::pipe().expect("a pipe");
        let (tell, told) = std::sync::mpsc::channel();
        let patience = Patience::until(stop).on_stall(Duration::ZERO, move |stalls| {
            tell.send(stalls).expect("the test waits");
        });
        let mut wait = Wait::begin(command::DEVICE_RESET, patience);
        assert_eq!((wait.is_over(), wait.deadline), (Ok(false), None));
        assert_eq!(told.try_recv(), Ok(true));
        rustix::io::write(&open, b"x").expect("room in the pipe");
        assert!(wait.is_over().is_ok() && wait.deadline.is_some(), "it ends soon");
    }

    #[test]
    fn a_stall_is_told_also_when_the_limit_has_passed_too() {
        let (tell, told) = std::sync::mpsc::channel();
        let patience = Patience::limit(Duration::ZERO).on_stall(Duration::ZERO, move |stalls| {
            tell.send(stalls).expect("the test waits");
        });
        let (socket, _open) = rustix::pipe::pipe().expect("a pipe");
        let mut wait = Wait::begin(command::DEVICE_RESET, patience);
        assert_eq!(wait.until(socket.as_fd(), PollFlags::IN), Ok(false));
        wait.end();
        assert_eq!(told.iter().collect::<Vec<_>>(), [true, false]);
    }
}
