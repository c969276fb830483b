// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The counters of a queue pair, over the life of its device.

use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Serialize, Serializer};
use vbus_core::{Counter, Metric, Role};

use crate::backend::TxDrop;
use crate::sink::RxDrop;

/// What a frame that the device did not send on has in common with others.
const TX_DROPS: &str = "Frames from the driver that were dropped";
/// The same for frames to the driver.
const RX_DROPS: &str = "Frames to the driver that were dropped";

/// A frame from the driver that was dropped for a reason.
const fn tx_drop(path: &'static str, reason: &'static str, help: &'static str) -> Metric {
    Metric::counter(path, "nic_tx_drops", help)
        .unit("frames")
        .role(Role::OutDrop)
        .reason(reason, TX_DROPS)
}

/// A frame to the driver that was dropped for a reason.
const fn rx_drop(path: &'static str, reason: &'static str, help: &'static str) -> Metric {
    Metric::counter(path, "nic_rx_drops", help)
        .unit("frames")
        .role(Role::InDrop)
        .reason(reason, RX_DROPS)
}

/// What the numbers of an Ethernet device mean, except those of its back end. The device shows its
/// [`PairCounters`] as `pairs`.
pub const METRICS: &[Metric] = &[
    Metric::flag("link", "nic_link", "Whether the driver has a link"),
    Metric::flag("link-off", "nic_link_off", "Whether a control client has switched the link off"),
    Metric::counter("pcap.records", "nic_pcap_records", "Frames that the capture file has")
        .unit("frames"),
    Metric::counter(
        "pcap.left-out",
        "nic_pcap_left_out",
        "Frames that the capture file lacks, because it could not be written fast enough",
    )
    .unit("frames"),
    Metric::counter(
        "pairs.{queue}.tx.frames",
        "nic_tx_frames",
        "Frames from the driver that went on",
    )
    .unit("frames")
    .role(Role::OutFrames),
    Metric::counter(
        "pairs.{queue}.tx.bytes",
        "nic_tx_bytes",
        "Bytes of the frames from the driver that went on",
    )
    .unit("bytes")
    .role(Role::OutBytes),
    Metric::counter("pairs.{queue}.tx.batches", "nic_tx_batches", "Polls that sent something")
        .unit("polls")
        .advice("`tx.frames` divided by it is the mean batch"),
    Metric::counter(
        "pairs.{queue}.tx.csum",
        "nic_tx_csum",
        "Frames from the driver whose checksum was left to the device",
    )
    .unit("frames"),
    Metric::counter(
        "pairs.{queue}.tx.segments",
        "nic_tx_segments",
        "Frames from the driver whose segmentation was left to the device",
    )
    .unit("frames"),
    Metric::gauge(
        "pairs.{queue}.tx.ring_fill",
        "nic_tx_ring_fill",
        "Entries in the transmit ring after the last poll",
    )
    .unit("entries")
    .role(Role::OutFill),
    Metric::counter(
        "pairs.{queue}.tx.waits",
        "nic_tx_waits",
        "Times that sending stopped because the other side had no room",
    ),
    tx_drop("pairs.{queue}.tx.drops.short", "short", "Frames below 14 bytes"),
    tx_drop(
        "pairs.{queue}.tx.drops.bad_header",
        "bad_header",
        "Frames whose header names an offload that was not accepted, or does not fit the frame",
    ),
    tx_drop(
        "pairs.{queue}.tx.drops.too_long",
        "too_long",
        "Frames, or segments, that are longer than the MTU",
    ),
    tx_drop("pairs.{queue}.tx.drops.no_link", "no_link", "Frames while the back end had no link"),
    tx_drop("pairs.{queue}.tx.drops.refused", "refused", "Frames that the back end refused"),
    tx_drop(
        "pairs.{queue}.tx.drops.spoofed",
        "spoofed",
        "Frames whose source address is not the device's",
    )
    .advice("set `learn = true` for a guest that has other addresses behind it"),
    tx_drop("pairs.{queue}.tx.drops.denied", "denied", "Frames that VLANs or `isolated` forbid"),
    tx_drop(
        "pairs.{queue}.tx.drops.storm",
        "storm",
        "Broadcasts above `broadcast-rate`, and frames in a loop",
    ),
    Metric::counter("pairs.{queue}.rx.frames", "nic_rx_frames", "Frames that the driver got")
        .unit("frames")
        .role(Role::InFrames),
    Metric::counter(
        "pairs.{queue}.rx.bytes",
        "nic_rx_bytes",
        "Bytes of the frames that the driver got",
    )
    .unit("bytes")
    .role(Role::InBytes),
    Metric::counter(
        "pairs.{queue}.rx.batches",
        "nic_rx_batches",
        "Posts that showed frames to the driver",
    )
    .unit("posts"),
    Metric::counter(
        "pairs.{queue}.rx.csum",
        "nic_rx_csum",
        "Frames to the driver whose checksum was left to it",
    )
    .unit("frames"),
    Metric::counter(
        "pairs.{queue}.rx.segments",
        "nic_rx_segments",
        "Frames to the driver whose segmentation was left to it",
    )
    .unit("frames"),
    Metric::gauge(
        "pairs.{queue}.rx.ring_fill",
        "nic_rx_ring_fill",
        "Buffers that the driver had posted after the last batch",
    )
    .unit("buffers")
    .role(Role::InFill),
    Metric::counter(
        "pairs.{queue}.rx.starved",
        "nic_rx_starved",
        "Times that a frame found too few buffers",
    )
    .advice("the driver posts its buffers late, or has few of them"),
    Metric::counter(
        "pairs.{queue}.rx.filtered",
        "nic_rx_filtered",
        "Frames that the driver's filter did not want; they are not drops",
    )
    .unit("frames"),
    rx_drop(
        "pairs.{queue}.rx.drops.no_buffers",
        "no_buffers",
        "Frames while the driver had no buffers for too long",
    ),
    rx_drop(
        "pairs.{queue}.rx.drops.too_long",
        "too_long",
        "Frames longer than the MTU, or that need more buffers than one frame may have",
    ),
    rx_drop(
        "pairs.{queue}.rx.drops.bad_frame",
        "bad_frame",
        "Frames that could not be converted to what the driver accepts",
    ),
    rx_drop(
        "pairs.{queue}.rx.drops.too_slow",
        "too_slow",
        "Frames while the driver had no buffers and their sender had frames for others",
    ),
    rx_drop("pairs.{queue}.rx.drops.rate", "rate", "Frames above `rx-rate` that could not wait"),
    rx_drop(
        "pairs.{queue}.rx.drops.no_link",
        "no_link",
        "Frames to a queue whose driver had no ring there",
    ),
];

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

impl TxCounters {
    /// All counters by their paths in JSON.
    pub(super) fn all(&self) -> Vec<(&'static str, &Counter)> {
        let own = [
            ("frames", &self.frames),
            ("bytes", &self.bytes),
            ("batches", &self.batches),
            ("csum", &self.csum),
            ("segments", &self.segments),
            ("waits", &self.waits),
        ];
        [&own[..], &self.drops.all()].concat()
    }
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

    /// All of them by their paths in the JSON of [`TxCounters`].
    fn all(&self) -> [(&'static str, &Counter); 8] {
        [
            ("drops.short", &self.short),
            ("drops.bad_header", &self.bad_header),
            ("drops.too_long", &self.too_long),
            ("drops.no_link", &self.no_link),
            ("drops.refused", &self.refused),
            ("drops.spoofed", &self.spoofed),
            ("drops.denied", &self.denied),
            ("drops.storm", &self.storm),
        ]
    }

    /// The sum over all reasons.
    pub fn sum(&self) -> u64 {
        self.all().into_iter().map(|(_, counter)| counter.get()).sum()
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

impl RxCounters {
    /// All counters by their paths in JSON.
    pub(super) fn all(&self) -> Vec<(&'static str, &Counter)> {
        let own = [
            ("frames", &self.frames),
            ("bytes", &self.bytes),
            ("batches", &self.batches),
            ("csum", &self.csum),
            ("segments", &self.segments),
            ("starved", &self.starved),
            ("filtered", &self.filtered),
        ];
        [&own[..], &self.drops.all()].concat()
    }
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

    /// All of them by their paths in the JSON of [`RxCounters`].
    fn all(&self) -> [(&'static str, &Counter); 6] {
        [
            ("drops.no_buffers", &self.no_buffers),
            ("drops.too_long", &self.too_long),
            ("drops.bad_frame", &self.bad_frame),
            ("drops.too_slow", &self.too_slow),
            ("drops.rate", &self.rate),
            ("drops.no_link", &self.no_link),
        ]
    }

    /// The sum over all reasons.
    pub fn sum(&self) -> u64 {
        self.all().into_iter().map(|(_, counter)| counter.get()).sum()
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

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// The paths of the counters in JSON, except gauges.
    fn paths(value: &Value, before: &str, found: &mut Vec<String>) {
        for (name, value) in value.as_object().unwrap() {
            match value {
                Value::Object(_) => paths(value, &format!("{name}."), found),
                _ if name == "ring_fill" => {}
                _ => found.push(format!("{before}{name}")),
            }
        }
    }

    #[test]
    fn all_counters_of_a_pair_are_saved() {
        let pair = serde_json::to_value(PairCounters::default()).unwrap();
        let (tx, rx) = (TxCounters::default(), RxCounters::default());
        let names = |all: &[(&'static str, &Counter)]| -> Vec<String> {
            all.iter().map(|(name, _)| (*name).to_owned()).collect()
        };
        for (direction, mut saved) in [("tx", names(&tx.all())), ("rx", names(&rx.all()))] {
            let mut found = Vec::new();
            paths(&pair[direction], "", &mut found);
            saved.sort();
            found.sort();
            assert_eq!(found, saved, "{direction}");
        }
    }
}
