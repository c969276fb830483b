//! Whether a task is queued: the one lock-free protocol of the event loop. `tests/it/wake_model.rs`
//! compiles this file over a model checker.

use super::sync::{AtomicBool, Order};

/// Raised by whoever wakes the task, lowered by the worker before it polls. A wake-up that finds
/// the flag raised need not queue the task, because the poll that will follow the flag's lowering
/// sees everything written before that wake-up.
pub struct WakeFlag(AtomicBool);

impl WakeFlag {
    /// Not raised.
    pub fn new() -> WakeFlag {
        WakeFlag(AtomicBool::new(false))
    }

    /// Raises it; true if the caller must queue the task.
    pub fn raise(&self) -> bool {
        // Release: what was written before is seen by the poll after `lower`, which reads this
        // store or one that follows it.
        !self.0.swap(true, Order::Raise.get())
    }

    /// Lowers it, before a poll.
    pub fn lower(&self) {
        // An exchange, not a store: pairs with `raise`, whose value it reads, so that the poll sees
        // what the waker wrote; a plain store would also let the poll's reads run ahead of it.
        self.0.swap(false, Order::Lower.get());
    }
}
