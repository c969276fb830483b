// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that unmaps. The kernel takes some 45 ms for each GiB, and a worker must not wait for
//! it.

use std::any::Any;
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

use rustix::mm::munmap;

/// The most bytes of one call, unless a page is larger. Other threads that map memory wait for a
/// call to end.
const STEP: usize = 64 << 20;

struct Work {
    base: usize,
    len: usize,
    /// The size of a page in bytes. The kernel unmaps no part of a page.
    page: usize,
    held: Option<Box<dyn Any + Send>>,
}

impl Work {
    fn run(self) {
        let step = STEP.max(self.page);
        let mut len = self.len;
        // From the end on, so that the mapping never falls into two.
        while len > 0 {
            let from = (len - 1) / step * step;
            // SAFETY: the owner gave the mapping up, and nothing uses it any more.
            if let Err(error) = unsafe { munmap((self.base + from) as *mut _, len - from) } {
                tracing::error!(%error, "munmap failed");
                break;
            }
            len = from;
        }
        drop(self.held);
    }
}

/// Unmaps the range soon, and then drops `held`. `page` is the size of its pages in bytes.
pub(crate) fn unmap(base: usize, len: usize, page: usize, held: Option<Box<dyn Any + Send>>) {
    static REAPER: OnceLock<Option<Sender<Work>>> = OnceLock::new();
    let reaper = REAPER.get_or_init(|| {
        let (sender, receiver) = channel::<Work>();
        let thread = std::thread::Builder::new().name("unmap".into());
        thread.spawn(move || receiver.iter().for_each(Work::run)).ok().map(|_| sender)
    });
    let work = Work { base, len, page, held };
    match reaper {
        Some(sender) => {
            if let Err(unsent) = sender.send(work) {
                unsent.0.run();
            }
        }
        // There is no thread, so the caller waits.
        None => work.run(),
    }
}
