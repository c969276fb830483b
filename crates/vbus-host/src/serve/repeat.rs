// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Work that signals ask for: on a thread of its own, once at a time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use vbus_core::lock;

/// Whether the work is under way. Clones are handles to the same work.
#[derive(Clone, Default)]
pub struct Repeat(Arc<Mutex<Asked>>);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Asked {
    #[default]
    Nothing,
    /// It is under way.
    Once,
    /// It is under way, and has to be done once more.
    Again,
}

impl Repeat {
    /// Does `work` on a thread called `name`. If it is under way, it is done once more afterwards,
    /// however often somebody asks meanwhile. Work that panics has ended: the next one can begin.
    pub fn ask(&self, name: &str, work: impl Fn() + Send + 'static) {
        let mut asked = lock(&self.0);
        if *asked != Asked::Nothing {
            *asked = Asked::Again;
            return;
        }
        let this = self.clone();
        let run = move || {
            loop {
                // The hook for panics tells the reason.
                if catch_unwind(AssertUnwindSafe(&work)).is_err() {
                    tracing::error!("{} ended early, by a fault of the bus", thread_name());
                }
                let mut asked = lock(&this.0);
                *asked = match *asked {
                    Asked::Again => Asked::Once,
                    Asked::Nothing | Asked::Once => Asked::Nothing,
                };
                if *asked == Asked::Nothing {
                    return;
                }
            }
        };
        match std::thread::Builder::new().name(name.into()).spawn(run) {
            Ok(_) => *asked = Asked::Once,
            Err(error) => tracing::error!(%error, "{name}: no thread can be started"),
        }
    }
}

fn thread_name() -> String {
    std::thread::current().name().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn work_that_panics_can_be_asked_for_again() {
        let (repeat, (begin, begun)) = (Repeat::default(), channel());
        let (go_on, may_go_on) = channel::<()>();
        let may_go_on = Mutex::new(may_go_on);
        repeat.ask("test", move || {
            begin.send(()).unwrap();
            lock(&may_go_on).recv().unwrap();
            panic!("as the test wants");
        });
        begun.recv().unwrap();
        // What comes while it is under way is one more time, also after a panic.
        for _ in 0..3 {
            repeat.ask("test", || unreachable!());
        }
        go_on.send(()).unwrap();
        begun.recv().unwrap();
        go_on.send(()).unwrap();
        assert!(begun.recv().is_err(), "the thread has ended");
        while *lock(&repeat.0) != Asked::Nothing {
            std::thread::yield_now();
        }
        let (done, is_done) = channel();
        repeat.ask("test", move || done.send(()).unwrap());
        is_done.recv().unwrap();
    }
}
