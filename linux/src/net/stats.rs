// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Counters of a queue pair. Each has one writer at a time, and any number of readers.

use core::sync::atomic::{AtomicU64, Ordering};

/// A counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts `n` more. There is one writer at a time, so this needs no atomic addition.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.get().wrapping_add(n), Ordering::Relaxed);
    }

    /// The count.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of the transmit half, whose writer holds the transmit lock.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct TxStats {
    /// Frames sent.
    pub frames: Counter,
    /// Their bytes.
    pub bytes: Counter,
    /// Frames that were not sent.
    pub dropped: Counter,
    /// Frames that were copied as a whole into memory that the device always reaches.
    pub copied: Counter,
    /// Frames of which a part was mapped for the device.
    pub mapped: Counter,
    /// Times that frames were made visible to the device.
    pub posts: Counter,
    /// Times that the doorbell rang.
    pub kicks: Counter,
    /// Times that the driver asked for an interrupt.
    pub arms: Counter,
    /// Times that the stack was stopped.
    pub stops: Counter,
    /// Times that the stack was let go on.
    pub wakes: Counter,
    /// Frames of XDP that were sent: those that were redirected here, and those that a program sent
    /// back.
    pub xdp: Counter,
    /// Their bytes.
    pub xdp_bytes: Counter,
}

/// Counters of the receive half, whose writer is the NAPI poll.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct RxStats {
    /// Frames that came.
    pub frames: Counter,
    /// Their bytes.
    pub bytes: Counter,
    /// Frames that were dropped because there was no memory for them.
    pub alloc_failed: Counter,
    /// Frames with an invalid header.
    pub invalid: Counter,
    /// Polls.
    pub polls: Counter,
    /// Times that the doorbell rang.
    pub kicks: Counter,
    /// Times that the driver asked for an interrupt.
    pub arms: Counter,
    /// Frames that a program dropped, or for which it failed.
    pub xdp_dropped: Counter,
    /// Frames that a program sent back.
    pub xdp_tx: Counter,
    /// Frames that a program sent elsewhere.
    pub xdp_redirected: Counter,
}
