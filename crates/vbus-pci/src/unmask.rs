//! The end of an INTx interrupt by eventfd: how KVM tells of it without the VMM.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vbus_core::{Endpoint, Interest, Progress, Status, Task, TaskHandle};

use crate::interrupts::{Interrupts, IrqError, IrqIndex};

/// Unmasks INTx each time that an eventfd is written, as long as this value lives.
pub(crate) struct Unmask {
    task: TaskHandle,
    fd: Arc<OwnedFd>,
}

struct UnmaskTask {
    interrupts: Arc<Interrupts>,
    /// The first poll comes without an event.
    watching: bool,
}

impl Task for UnmaskTask {
    fn poll(&mut self, _budget: u32) -> Result<Progress, Status> {
        // The eventfd is not read: the watch is edge-triggered, and a read is one more call that the peer could make wait.
        if std::mem::replace(&mut self.watching, true) {
            let _ = self.interrupts.mask(IrqIndex::Intx, false);
        }
        Ok(Progress::Idle)
    }

    fn adaptive(&self) -> bool {
        false
    }
}

impl Unmask {
    /// Watches `fd` on the device's own event loop.
    pub(crate) fn start(
        endpoint: &Endpoint,
        interrupts: Arc<Interrupts>,
        fd: Arc<OwnedFd>,
    ) -> Result<Unmask, IrqError> {
        let task = Box::new(UnmaskTask { interrupts, watching: false });
        let task = endpoint.executor().spawn(endpoint.place(), task, Arc::default(), |_| {});
        if let Err(errno) = task.watch(&fd, Interest::Read) {
            task.stop();
            return Err(IrqError::Os(errno));
        }
        Ok(Unmask { task, fd })
    }
}

impl Drop for Unmask {
    fn drop(&mut self) {
        self.task.unwatch(&self.fd);
        self.task.stop();
    }
}
