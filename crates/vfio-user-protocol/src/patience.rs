// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How long a client waits for a server that does not answer.
//!
//! A server may stand still for any time: it is stopped by a debugger, its control group is frozen,
//! or the machine is loaded. As long as the connection is open, the client cannot tell that from a
//! server that will never answer. So the program decides.
//!
//! A limit for each call is not enough for a VMM: a virtual CPU waits in each access to the device,
//! and a server that answers every call just in time could take nearly all of its time for ever. An
//! [`Allowance`] bounds what all calls together wait.

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

/// How long all calls of a client together may wait for the server. What they wait adds up. Each
/// call, and the time that passes, take something off the sum. A call during which the sum exceeds
/// `at_once` ends as if it had taken too long by itself, and the connection has failed.
///
/// In any time `t` with `n` calls the client waits for no longer than `at_once` + `n` * `call` +
/// `share` % of `t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// The most that the sum may be.
    pub at_once: Duration,
    /// What each call takes off the sum. Calls that are no slower than this can follow each other
    /// for ever.
    pub call: Duration,
    /// The time that passes takes off this many percent of itself.
    pub share: u32,
}

impl Default for Allowance {
    /// 20 s at once (four of the slowest calls, one after another), 100 ms for each call (a server
    /// on a busy machine, in turn with others), and 10 %.
    fn default() -> Allowance {
        Allowance { at_once: Duration::from_secs(20), call: Duration::from_millis(100), share: 10 }
    }
}

/// What the calls of a client have waited, by an [`Allowance`].
#[derive(Debug, Default)]
pub(crate) struct Waited {
    sum: Duration,
    /// When the last call ended.
    at: Option<Instant>,
}

impl Waited {
    /// A call begins at `now`. Returns for how long it may wait.
    fn begin(&mut self, allowance: &Allowance, now: Instant) -> Duration {
        let idle = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.take_off(allowance, idle);
        allowance.at_once.saturating_sub(self.sum).saturating_add(allowance.call)
    }

    /// The call that began at `began` ends at `now`.
    fn end(&mut self, allowance: &Allowance, began: Instant, now: Instant) {
        let waited = now.saturating_duration_since(began);
        self.sum = self.sum.saturating_add(waited).saturating_sub(allowance.call);
        self.take_off(allowance, waited);
        self.at = Some(now);
    }

    /// Takes off the share of the time `passed`.
    fn take_off(&mut self, allowance: &Allowance, passed: Duration) {
        self.sum = self.sum.saturating_sub(passed.saturating_mul(allowance.share) / 100);
    }
}

/// How long the calls of a [`Client`](crate::Client) wait for the server.
#[derive(Clone)]
pub struct Patience {
    /// `None`: without a limit.
    limit: Option<Duration>,
    /// `None`: any sum of calls.
    allowance: Option<Allowance>,
    stop: Option<Arc<OwnedFd>>,
    stall: Option<(Duration, Told)>,
}

impl Default for Patience {
    /// A limit of 5 s for each call, and the default [`Allowance`] for all together: what a VMM
    /// needs.
    fn default() -> Patience {
        Patience::limit(TIMEOUT).allow(Allowance::default())
    }
}

impl Patience {
    /// Each call waits this long at most. Then the connection has failed.
    #[must_use]
    pub fn limit(limit: Duration) -> Patience {
        Patience { limit: Some(limit), allowance: None, stop: None, stall: None }
    }

    /// Each call waits as long as the connection is open. For a program that a signal ends.
    #[must_use]
    pub fn endless() -> Patience {
        Patience { limit: None, allowance: None, stop: None, stall: None }
    }

    /// Each call waits as long as the connection is open. Once `stop` is readable, a call waits for
    /// one more second at most, so that the program can end.
    #[must_use]
    pub fn until(stop: OwnedFd) -> Patience {
        Patience { limit: None, allowance: None, stop: Some(Arc::new(stop)), stall: None }
    }

    /// Besides, all calls of the client together wait for no longer than `allowance`.
    #[must_use]
    pub fn allow(mut self, allowance: Allowance) -> Patience {
        self.allowance = Some(allowance);
        self
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
    /// A call begins. `waited` is what the calls before it have waited.
    pub(crate) fn begin(command: u16, patience: Patience, waited: &mut Waited) -> Wait {
        let began = Instant::now();
        let left = patience.allowance.map(|allowance| waited.begin(&allowance, began));
        let limit = patience.limit.into_iter().chain(left).min();
        let deadline = limit.and_then(|limit| began.checked_add(limit));
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
    pub(crate) fn end(self, waited: &mut Waited) {
        self.end_at(Instant::now(), waited);
    }

    fn end_at(self, now: Instant, waited: &mut Waited) {
        if let Some(allowance) = &self.patience.allowance {
            // A call that ends well after its deadline had its reply all the time: this process
            // stood still, and the server is not to blame for that.
            let end = self.deadline.map_or(now, |deadline| now.min(deadline));
            waited.end(allowance, self.began, end);
        }
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
        let begin = |patience| Wait::begin(command::DEVICE_RESET, patience, &mut Waited::default());
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
        let mut wait = Wait::begin(command::DEVICE_RESET, patience, &mut Waited::default());
        assert_eq!((wait.is_over(), wait.deadline), (Ok(false), None));
        assert_eq!(told.try_recv(), Ok(true));
        rustix::io::write(&open, b"x").expect("room in the pipe");
        assert!(wait.is_over().is_ok() && wait.deadline.is_some(), "it ends soon");
    }

    #[test]
    fn what_calls_wait_adds_up_and_time_and_calls_take_it_off() {
        let ms = Duration::from_millis;
        let allowance = Allowance { at_once: ms(1000), call: ms(10), share: 10 };
        let (start, mut waited) = (Instant::now(), Waited::default());
        // Calls of this length, after so long without one. Returns what the last one may wait.
        let mut at = start;
        let mut calls = |count: u32, length: u64, idle: u64| {
            let mut left = Duration::ZERO;
            for _ in 0..count {
                at += ms(idle);
                left = waited.begin(&allowance, at);
                waited.end(&allowance, at, at + ms(length));
                at += ms(length);
            }
            left
        };
        assert_eq!(calls(1, 0, 0), ms(1010), "the first one");
        // As slow as a call may be: for ever.
        assert_eq!(calls(100_000, 11, 0), ms(1010));
        // A stop in between is forgotten after ten times as long.
        assert_eq!(calls(1, 910, 0), ms(1010));
        assert_eq!(calls(1, 0, 0), ms(1010 - (910 - 10 - 91)));
        assert_eq!(calls(1, 0, 9000), ms(1010));
        // Just below the time of each call: 980 ms - 100 ms stay of the first one.
        assert_eq!(calls(2, 990, 0), ms(1010 - (990 - 10 - 99)));
        // Much more than all: nothing overflows.
        let most = Allowance { at_once: Duration::MAX, call: Duration::MAX, share: u32::MAX };
        assert_eq!(Waited::default().begin(&most, start), Duration::MAX);
    }

    /// As by a debugger, or a control group that is frozen.
    #[test]
    fn a_stop_of_the_process_itself_is_not_the_servers() {
        let mut waited = Waited::default();
        let wait = Wait::begin(command::DEVICE_RESET, Patience::default(), &mut waited);
        let hour = wait.began + Duration::from_secs(3600);
        wait.end_at(hour, &mut waited);
        let allowance = Allowance::default();
        assert_eq!(waited.begin(&allowance, hour), allowance.at_once + allowance.call);
        let wait = Wait::begin(command::DEVICE_RESET, Patience::default(), &mut waited);
        let (began, soon) = (wait.began, wait.began + Duration::from_secs(30));
        wait.end_at(soon, &mut waited);
        // 5 s of it count, less what the rest has taken off.
        let left = waited.begin(&allowance, soon);
        assert!(left >= allowance.at_once - TIMEOUT, "{left:?} of a stop of {:?}", soon - began);
    }

    #[test]
    fn a_stall_is_told_also_when_the_limit_has_passed_too() {
        let (tell, told) = std::sync::mpsc::channel();
        let patience = Patience::limit(Duration::ZERO).on_stall(Duration::ZERO, move |stalls| {
            tell.send(stalls).expect("the test waits");
        });
        let (socket, _open) = rustix::pipe::pipe().expect("a pipe");
        let mut wait = Wait::begin(command::DEVICE_RESET, patience, &mut Waited::default());
        assert_eq!(wait.until(socket.as_fd(), PollFlags::IN), Ok(false));
        wait.end(&mut Waited::default());
        assert_eq!(told.iter().collect::<Vec<_>>(), [true, false]);
    }
}
