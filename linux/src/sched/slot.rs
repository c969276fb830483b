// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What one CPU posts: the class of the task that it runs, at each switch.

use vbus_driver::sched::{Class, Cpu, Limits};

use super::ffi::Task;
use crate::hal::KernelHal;

/// Real-time tasks that sleep on one CPU and keep its class up, at most. Of more, the first count.
const SLEEPERS: usize = 8;

/// Linux's scheduling policies.
const BATCH: u32 = 3;
const IDLE: u32 = 5;
const FIFO: u32 = 1;
const RR: u32 = 2;
const DEADLINE: u32 = 6;

/// A CPU. Only the CPU itself uses it, with interrupts off.
pub struct Slot {
    pages: Cpu<KernelHal>,
    /// The class that was posted last.
    posted: Class,
    /// When, by the CPU's clock.
    posted_at: u64,
    /// What the CPU runs now wants, without those who sleep.
    running: Class,
    /// Whether it runs nothing.
    is_idle: bool,
    sleepers: [Option<Sleeper>; SLEEPERS],
}

#[derive(Clone, Copy)]
struct Sleeper {
    pid: u32,
    class: Class,
}

/// The real-time class of a task, if it has one.
fn real_time(task: &Task) -> Option<Class> {
    match task.policy {
        FIFO => Some(Class::Fifo(task.priority)),
        RR => Some(Class::RoundRobin(task.priority)),
        // There is no such class on the bus.
        DEADLINE => Some(Class::Fifo(99)),
        _ => None,
    }
}

/// The priority of a real-time class; 0 of the others.
fn urgency(class: Class) -> i32 {
    match class {
        Class::Fifo(priority) | Class::RoundRobin(priority) => priority,
        _ => 0,
    }
}

impl Slot {
    /// A CPU that has posted nothing.
    pub fn new(pages: Cpu<KernelHal>) -> Self {
        let (posted, running) = (Class::Own, Class::Own);
        Self { pages, posted, posted_at: 0, running, is_idle: false, sleepers: [None; SLEEPERS] }
    }

    /// The CPU goes from one task to the next. Returns whether its class is to be renewed from now
    /// on. `keeps`: those who sleep keep their class up.
    pub fn switch(
        &mut self,
        limits: &Limits,
        keeps: bool,
        clock: &dyn Fn() -> u64,
        from: &Task,
        to: &Task,
    ) -> bool {
        if keeps && !from.kernel && from.sleeps {
            if let Some(class) = real_time(from) {
                self.add(Sleeper { pid: from.pid, class });
            }
        }
        self.is_idle = to.pid == 0;
        match real_time(to) {
            Some(class) => {
                self.remove(to.pid);
                self.running = class;
            }
            // Nothing runs: the next one to come is served best by the class of the last one. If it
            // is a real-time class, it ends by itself, since it is not renewed.
            None if self.is_idle => {}
            // The kernel's threads come and go all the time. They take the class of ordinary tasks
            // as they find it.
            None if to.kernel && !self.running.is_real_time() => {}
            None if to.kernel => self.running = Class::Own,
            None => {
                self.running = match to.policy {
                    BATCH => Class::Batch(to.priority),
                    IDLE => Class::Idle,
                    _ => Class::Normal(to.priority),
                };
            }
        }
        let wanted = self.wanted(limits);
        // A real-time class ends by itself while the CPU stands still.
        let may_have_ended = || {
            let since = clock().wrapping_sub(self.posted_at);
            from.pid == 0
                && wanted.is_real_time()
                && since / 1_000_000 > (limits.boost_ms / 3).into()
        };
        if wanted != self.posted || may_have_ended() {
            self.post(wanted, clock());
        }
        self.is_renewed()
    }

    /// Posts the class again, so that it does not end, if the CPU still has it. Forgets those who
    /// do not sleep here any more. Returns whether it is to be renewed again.
    pub fn renew(
        &mut self,
        limits: &Limits,
        keeps: bool,
        cpu: u32,
        clock: &dyn Fn() -> u64,
        find: impl Fn(u32) -> Option<Task>,
    ) -> bool {
        for place in &mut self.sleepers {
            let Some(sleeper) = *place else { continue };
            let task = find(sleeper.pid).filter(|task| keeps && task.sleeps && task.cpu == cpu);
            let class = task.as_ref().and_then(real_time);
            *place = class.map(|class| Sleeper { class, ..sleeper });
        }
        let wanted = self.wanted(limits);
        if wanted != self.posted || self.is_renewed() {
            self.post(wanted, clock());
        }
        self.is_renewed()
    }

    /// The class that the CPU is to have: that of the most urgent of the one that runs and those
    /// who sleep.
    fn wanted(&self, limits: &Limits) -> Class {
        let sleeping = self.sleepers.iter().flatten().map(|sleeper| sleeper.class);
        let most = sleeping.max_by_key(|class| urgency(*class));
        let class = match most {
            Some(class) if urgency(class) > urgency(self.running) => class,
            _ => self.running,
        };
        if limits.allows(class) { class } else { Class::Own }
    }

    fn is_renewed(&self) -> bool {
        self.posted.is_real_time() && (!self.is_idle || self.sleepers.iter().any(Option::is_some))
    }

    fn post(&mut self, class: Class, now: u64) {
        self.pages.post(class);
        (self.posted, self.posted_at) = (class, now);
    }

    fn add(&mut self, sleeper: Sleeper) {
        self.remove(sleeper.pid);
        if let Some(free) = self.sleepers.iter_mut().find(|place| place.is_none()) {
            *free = Some(sleeper);
        }
    }

    fn remove(&mut self, pid: u32) {
        for place in &mut self.sleepers {
            if place.is_some_and(|sleeper| sleeper.pid == pid) {
                *place = None;
            }
        }
    }
}
