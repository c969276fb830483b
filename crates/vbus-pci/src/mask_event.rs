// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Masks and unmasks INTx by eventfds. An unmask is the end of the interrupt. With an eventfd, KVM
//! reports it without the VMM.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vbus_core::{ErrorCode, Executor, Interest, Progress, Task, TaskHandle};
use vbus_eventfd::PeerEventfd;

use crate::interrupts::{Interrupts, IrqError, IrqIndex};

/// The number of unmasks that may fire INTx again at once while the driver acknowledges nothing. A
/// peer can make an endless loop of triggers and unmasks, at no cost to itself: it gives the same
/// eventfd for both.
const REFIRED_AT_ONCE: u32 = 64;
/// The delay of each unmask after that number.
const REFIRED_PAUSE: Duration = Duration::from_millis(1);

/// Masks or unmasks INTx each time somebody writes an eventfd. It ends when this value is dropped.
pub(crate) struct MaskEvent {
    task: TaskHandle,
    fd: Arc<PeerEventfd>,
}

struct MaskTask {
    interrupts: Arc<Interrupts>,
    fd: Arc<PeerEventfd>,
    /// True: an event masks. False: an event unmasks.
    masked: bool,
    /// False until the first poll, which may come without an event.
    watching: bool,
    /// Another process has watched the eventfd before this one.
    adopted: bool,
    /// The time at which an event that has come takes effect.
    due: Option<Instant>,
}

impl Task for MaskTask {
    fn work(&self) -> String {
        "eventfds that mask INTx".into()
    }

    fn poll(&mut self, _budget: u32) -> Result<Progress, ErrorCode> {
        if let Some(due) = self.due {
            if Instant::now() < due {
                return Ok(Progress::Idle);
            }
            self.due = None;
            let _ = self.interrupts.mask(IrqIndex::Intx, self.masked);
            return Ok(Progress::Idle);
        }
        // The task does not read the eventfd. The watch is edge-triggered, so each wake-up is an
        // event.
        // An eventfd of another process may be signalled since long. One more unmask does no harm,
        // but one more mask would silence the interrupt.
        let first = || self.fd.is_signalled() && !(self.adopted && self.masked);
        if std::mem::replace(&mut self.watching, true) || first() {
            if !self.masked && self.interrupts.refired() >= REFIRED_AT_ONCE {
                self.due = Some(Instant::now() + REFIRED_PAUSE);
                return Ok(Progress::Idle);
            }
            let _ = self.interrupts.mask(IrqIndex::Intx, self.masked);
        }
        Ok(Progress::Idle)
    }

    fn deadline(&self) -> Option<Instant> {
        self.due
    }

    fn adaptive(&self) -> bool {
        false
    }
}

impl MaskEvent {
    /// Starts to watch `fd`, on the worker with index `worker` of the event loop. `adopted`:
    /// another process has watched it before.
    pub(crate) fn start(
        (executor, worker): (&Arc<Executor>, usize),
        interrupts: Arc<Interrupts>,
        fd: PeerEventfd,
        masked: bool,
        adopted: bool,
    ) -> Result<MaskEvent, IrqError> {
        let fd = Arc::new(fd);
        let (watching, due) = (false, None);
        let task = MaskTask { interrupts, fd: fd.clone(), masked, watching, adopted, due };
        let task = Box::new(task);
        let task = executor.spawn(worker, task, Arc::default(), |_| {});
        if let Err(errno) = task.watch(&*fd, Interest::Read) {
            task.stop();
            return Err(IrqError::Os(errno));
        }
        Ok(MaskEvent { task, fd })
    }
}

impl AsFd for MaskEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for MaskEvent {
    fn drop(&mut self) {
        self.task.unwatch(&*self.fd);
        self.task.stop();
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};
    use vbus_core::InterruptSink;

    use super::*;

    /// The eventfd that triggers one function unmasks the other one, and the other way around. The
    /// drivers acknowledge nothing. This is an endless loop too, as with one eventfd for both uses.
    #[test]
    fn an_eventfd_that_triggers_and_unmasks_burns_no_processor() {
        let new = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let interrupts = Arc::new(Interrupts::with_intx());
        let both = new();
        let trigger = both.try_clone().unwrap();
        interrupts.connect(IrqIndex::Intx, 0, vec![Some(trigger)]).unwrap();
        let fd = Arc::new(PeerEventfd::new(both).unwrap());
        let mut task = MaskTask {
            interrupts: interrupts.clone(),
            fd: fd.clone(),
            masked: false,
            watching: true,
            adopted: false,
            due: None,
        };
        interrupts.trigger(0);
        let begin = Instant::now();
        let mut fired = 0;
        // An event loop would poll after each signal. This test polls many times.
        for _ in 0..10_000 {
            fired += u128::from(fd.take());
            task.poll(1).unwrap();
        }
        let pauses = begin.elapsed().as_nanos() / REFIRED_PAUSE.as_nanos();
        assert!(fired <= u128::from(REFIRED_AT_ONCE) + pauses + 2, "{fired} with {pauses} pauses");
        assert!(task.deadline().is_some());
        interrupts.acknowledge();
        assert_eq!(interrupts.refired(), 0);
    }

    /// The eventfds have been signalled before this process got them. That an unmask came may be
    /// new. A mask may be long over.
    #[test]
    fn an_eventfd_of_another_process_unmasks_at_first_and_does_not_mask() {
        for masked in [false, true] {
            let interrupts = Arc::new(Interrupts::with_intx());
            let fd = eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
            let fd = Arc::new(PeerEventfd::new(fd).unwrap());
            interrupts.mask(IrqIndex::Intx, !masked).unwrap();
            let (watching, adopted, due) = (false, true, None);
            let mut task =
                MaskTask { interrupts: interrupts.clone(), fd, masked, watching, adopted, due };
            task.poll(1).unwrap();
            assert!(!interrupts.is_masked());
            task.poll(1).unwrap();
            assert_eq!(interrupts.is_masked(), masked, "later every event counts");
        }
    }
}
