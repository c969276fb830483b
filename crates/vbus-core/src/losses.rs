// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Watches for memory that peers have taken away.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vbus_shm::ErrorCode;

use crate::executor::{Executor, Interest, Progress, Task, TaskHandle};

/// A task that looks at the memory of every peer when some of it was lost. It runs until this is
/// dropped.
pub(crate) struct LossWatch(Option<(TaskHandle, OwnedFd)>);

struct Look<F>(F);

impl<F: Fn() + Send> Task for Look<F> {
    fn poll(&mut self, _: u32) -> Result<Progress, ErrorCode> {
        (self.0)();
        Ok(Progress::Idle)
    }

    fn adaptive(&self) -> bool {
        false
    }
}

impl LossWatch {
    /// Calls `look` on a worker of `executor` after each loss. It must not block.
    pub(crate) fn start(executor: &Arc<Executor>, look: impl Fn() + Send + 'static) -> LossWatch {
        // A descriptor of its own, because two buses may use one executor.
        let event =
            vbus_mapping::losses().and_then(|event| rustix::io::fcntl_dupfd_cloexec(event, 0));
        let started = event.and_then(|event| {
            let look = Box::new(Look(look));
            let task = executor.spawn(0, look, Arc::default(), |_| {});
            match task.watch(&event, Interest::Read) {
                Ok(()) => Ok((task, event)),
                Err(error) => {
                    task.stop();
                    Err(error)
                }
            }
        });
        if let Err(error) = &started {
            tracing::error!(%error, "nobody will notice when a peer takes its memory away");
        }
        LossWatch(started.ok())
    }
}

impl Drop for LossWatch {
    fn drop(&mut self) {
        if let Some((task, event)) = &self.0 {
            task.unwatch(event);
            task.stop();
        }
    }
}
