// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Deaths for the tests of regions of the buffers in flight: a thread's device end makes so many
//! stores, and no more. So the memory is that of a process which died there.

use std::cell::Cell;

thread_local! {
    /// How many stores are left. `None`: any number.
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// The device end makes a store. False: it is dead.
pub fn spend() -> bool {
    LEFT.with(|left| match left.get() {
        None => true,
        Some(0) => false,
        Some(more) => {
            left.set(Some(more - 1));
            true
        }
    })
}

/// Does `work`, of whose stores the first `stores` are made.
pub fn after<O>(stores: u32, work: impl FnOnce() -> O) -> O {
    LEFT.with(|left| left.set(Some(stores)));
    let result = work();
    LEFT.with(|left| left.set(None));
    result
}
