// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The counters of a queue pair, over the life of its device.

use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Serialize, Serializer};
use vbus_core::Counter;
use vbus_net::{RxDrop, TxDrop};

/// A number that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU32);

impl Gauge {
    /// Sets the present value.
    pub fn set(&self, value: u32) {
        self.0.store(value, Ordering::Relaxed);
    }
}

impl Serialize for Gauge {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.0.load(Ordering::Relaxed))
    }
}

/// Frames from the driver.
#[derive(Debug, Default, Serialize)]
pub struct TxCounters {
    /// Frames sent on.
    pub frames: Counter,
    /// Their bytes, without headers.
    pub bytes: Counter,
    /// Polls that sent something.
    pub batches: Counter,
    /// Frames whose checksum was left to the device.
    pub csum: Counter,
    /// Frames whose segmentation was left to the device.
    pub segments: Counter,
    /// Entries in the ring after the last poll.
    pub ring_fill: Gauge,
    /// Times that sending stopped because the other side had no room.
    pub waits: Counter,
    /// Frames that were dropped, by reason.
    pub drops: TxDrops,
}

/// Why frames from the driver were dropped.
#[derive(Debug, Default, Serialize)]
pub struct TxDrops {
    /// The frame is shorter than an Ethernet header.
    pub short: Counter,
    /// The frame's header does not fit the frame or the accepted features.
    pub bad_header: Counter,
    /// The frame, or a segment of it, is longer than the MTU allows.
    pub too_long: Counter,
    /// The back end has no link.
    pub no_link: Counter,
    /// The back end refused the frame.
    pub refused: Counter,
    /// The source address does not belong to the device.
    pub spoofed: Counter,
    /// The settings of VLANs or of isolation forbid the frame.
    pub denied: Counter,
    /// The device sent too many broadcasts, or the frame is in a loop.
    pub storm: Counter,
}

impl TxDrops {
    /// Counts a frame that the back end dropped.
    pub fn count(&self, reason: TxDrop) {
        match reason {
            TxDrop::BadFrame => self.bad_header.one(),
            TxDrop::NoLink => self.no_link.one(),
            TxDrop::Refused => self.refused.one(),
            TxDrop::Spoofed => self.spoofed.one(),
            TxDrop::Denied => self.denied.one(),
            TxDrop::Storm => self.storm.one(),
        }
    }

    /// The sum over all reasons.
    pub fn sum(&self) -> u64 {
        let all = [
            &self.short,
            &self.bad_header,
            &self.too_long,
            &self.no_link,
            &self.refused,
            &self.spoofed,
            &self.denied,
            &self.storm,
        ];
        all.into_iter().map(Counter::get).sum()
    }
}

/// Frames to the driver.
#[derive(Debug, Default, Serialize)]
pub struct RxCounters {
    /// Frames delivered.
    pub frames: Counter,
    /// Their bytes, without headers.
    pub bytes: Counter,
    /// Posts that made frames visible.
    pub batches: Counter,
    /// Frames whose checksum was left to the driver.
    pub csum: Counter,
    /// Frames whose segmentation was left to the driver.
    pub segments: Counter,
    /// Buffers that the driver had posted after the last batch.
    pub ring_fill: Gauge,
    /// Times that a frame found too few buffers.
    pub starved: Counter,
    /// Frames that the driver's filter refused. They do not count as dropped.
    pub filtered: Counter,
    /// Frames that were dropped, by reason.
    pub drops: RxDrops,
}

/// Why frames to the driver were dropped.
#[derive(Debug, Default, Serialize)]
pub struct RxDrops {
    /// The driver had no buffers for too long.
    pub no_buffers: Counter,
    /// The frame is longer than the MTU, or would need more buffers than the device may chain.
    pub too_long: Counter,
    /// The device could not convert the frame to a form that the driver accepts.
    pub bad_frame: Counter,
    /// The driver had too few buffers, and the sender does not wait for it any more, because frames
    /// to others wait behind.
    pub too_slow: Counter,
    /// The frame is above the rate that the settings allow.
    pub rate: Counter,
    /// The queue has no ring, or its driver has broken the protocol.
    pub no_link: Counter,
}

impl RxDrops {
    /// Counts a frame.
    pub fn count(&self, reason: RxDrop) {
        match reason {
            RxDrop::NoBuffers => self.no_buffers.one(),
            RxDrop::TooLong => self.too_long.one(),
            RxDrop::BadFrame => self.bad_frame.one(),
            RxDrop::TooSlow => self.too_slow.one(),
            RxDrop::Rate => self.rate.one(),
            RxDrop::NoLink => self.no_link.one(),
        }
    }

    /// The sum over all reasons.
    pub fn sum(&self) -> u64 {
        let all = [
            &self.no_buffers,
            &self.too_long,
            &self.bad_frame,
            &self.too_slow,
            &self.rate,
            &self.no_link,
        ];
        all.into_iter().map(Counter::get).sum()
    }
}

/// Both directions of a queue pair.
#[derive(Debug, Default, Serialize)]
pub struct PairCounters {
    /// From the driver.
    pub tx: TxCounters,
    /// To the driver.
    pub rx: RxCounters,
}
