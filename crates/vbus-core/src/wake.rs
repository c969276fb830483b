// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether a task is queued. This is the only lock-free protocol of the event loop.
//! `tests/it/wake_model.rs` compiles this file with the atomics of a model checker.

use super::sync::{AtomicBool, Order};

/// A waker raises the flag. The worker lowers it before it polls the task. A waker that finds the
/// flag raised need not queue the task: the worker will lower the flag and poll, and that poll sees
/// everything that the waker wrote before.
pub struct WakeFlag(AtomicBool);

impl WakeFlag {
    /// Not raised.
    pub fn new() -> WakeFlag {
        WakeFlag(AtomicBool::new(false))
    }

    /// Raises the flag. Returns true if the caller must queue the task.
    pub fn raise(&self) -> bool {
        // Release: pairs with the exchange in `lower`, which reads this store or a later one. The
        // poll after `lower` so sees what the waker wrote before.
        !self.0.swap(true, Order::Raise.get())
    }

    /// Lowers the flag, before a poll.
    pub fn lower(&self) {
        // An exchange, not a store: it reads the value of `raise` and so pairs with it. A plain
        // store would pair with nothing, and the poll's reads could run ahead of it.
        self.0.swap(false, Order::Lower.get());
    }
}
