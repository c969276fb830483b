// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Masking and unmasking of INTx by eventfd. Unmasking is the end of the interrupt: with an eventfd
//! KVM reports it without the VMM.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use vbus_core::{ErrorCode, Executor, Interest, Progress, Task, TaskHandle};

use crate::interrupts::{Interrupts, IrqError, IrqIndex};

/// Masks or unmasks INTx each time that an eventfd is written, as long as this value lives.
pub(crate) struct MaskEvent {
    task: TaskHandle,
    fd: Arc<OwnedFd>,
}

struct MaskTask {
    interrupts: Arc<Interrupts>,
    fd: Arc<OwnedFd>,
    /// Mask, or unmask.
    masked: bool,
    /// The first poll may come without an event.
    watching: bool,
}

impl Task for MaskTask {
    fn poll(&mut self, _budget: u32) -> Result<Progress, ErrorCode> {
        // The eventfd is not read: the watch is edge-triggered, and a read is one more call that
        // the peer could make wait.
        if std::mem::replace(&mut self.watching, true) || written(&self.fd) {
            let _ = self.interrupts.mask(IrqIndex::Intx, self.masked);
        }
        Ok(Progress::Idle)
    }

    fn adaptive(&self) -> bool {
        false
    }
}

/// Whether the eventfd has been written.
fn written(fd: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    // A look that a signal interrupts is repeated: it says nothing, and the event comes once only.
    retry_on_intr(|| poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&now))).is_ok_and(|n| n > 0)
}

impl MaskEvent {
    /// Watches `fd` on the event loop, by the worker with index `worker`.
    pub(crate) fn start(
        executor: &Arc<Executor>,
        worker: usize,
        interrupts: Arc<Interrupts>,
        fd: Arc<OwnedFd>,
        masked: bool,
    ) -> Result<MaskEvent, IrqError> {
        let task = Box::new(MaskTask { interrupts, fd: fd.clone(), masked, watching: false });
        let task = executor.spawn(worker, task, Arc::default(), |_| {});
        if let Err(errno) = task.watch(&fd, Interest::Read) {
            task.stop();
            return Err(IrqError::Os(errno));
        }
        Ok(MaskEvent { task, fd })
    }
}

impl Drop for MaskEvent {
    fn drop(&mut self) {
        self.task.unwatch(&self.fd);
        self.task.stop();
    }
}
