// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the numbers of back ends and of uplinks mean.

use vbus_core::{Metric, Role};

/// What the numbers of a back end mean, which a front shows as `backend`.
pub const BACKEND_METRICS: &[Metric] = &[
    Metric::flag("backend.vhost", "tap_vhost", VHOST),
    Metric::counter("backend.flooded", "switch_flooded", FLOODED).unit("frames"),
    Metric::counter("backend.unwanted", "switch_unwanted", UNWANTED).unit("frames"),
    Metric::counter("backend.connects", "stream_connects", CONNECTS),
    Metric::counter("backend.disconnects", "stream_disconnects", DISCONNECTS),
];

const VHOST: &str =
    "Whether the kernel (vhost-net) carries the frames, which the device then does not count";
const FLOODED: &str = "Frames that went to every port of the switch that wanted them";
const UNWANTED: &str = "Frames that no port of the switch wanted";

const TO_OUTSIDE_DROPS: &str = "Frames to the outside that were dropped";
const FROM_OUTSIDE_DROPS: &str = "Frames from the outside that were dropped";

const fn to_outside(path: &'static str, reason: &'static str, help: &'static str) -> Metric {
    Metric::counter(path, "uplink_to_outside_drops", help)
        .unit("frames")
        .role(Role::OutDrop)
        .reason(reason, TO_OUTSIDE_DROPS)
}

const fn from_outside(path: &'static str, reason: &'static str, help: &'static str) -> Metric {
    Metric::counter(path, "uplink_from_outside_drops", help)
        .unit("frames")
        .role(Role::InDrop)
        .reason(reason, FROM_OUTSIDE_DROPS)
}

const NO_BUFFERS: &str = "Frames while a receiver had no room for too long";
const TOO_SLOW: &str = "Frames whose receiver had no room while others waited";
const TOO_LONG: &str = "Frames longer than the MTU";
const BAD_FRAME: &str = "Frames that could not be converted to what the other side accepts";
const NO_LINK: &str = "Frames while the other side had no link";
const REFUSED: &str = "Frames that the other side refused";
const RATE: &str = "Frames above `tx-rate` or `rx-rate` that could not wait";
const SPOOFED: &str = "Frames whose source address belongs to a device of the switch";
const DENIED: &str = "Frames that VLANs or `isolated` forbid";
const STORM: &str = "Broadcasts above `broadcast-rate`, and frames in a loop";

const CONNECTS: &str = "Times that the other end of the stream connected";
const DISCONNECTS: &str = "Times that the other end of the stream went";

/// What the numbers of an uplink mean.
pub const UPLINK_METRICS: &[Metric] = &[
    Metric::flag("link", "uplink_link", "Whether the outside has a link"),
    Metric::counter("flooded", "switch_flooded", FLOODED).unit("frames"),
    Metric::counter("unwanted", "switch_unwanted", UNWANTED).unit("frames"),
    Metric::counter("backend.connects", "stream_connects", CONNECTS),
    Metric::counter("backend.disconnects", "stream_disconnects", DISCONNECTS),
    Metric::counter(
        "backend.pcap.records",
        "uplink_pcap_records",
        "Frames that the capture file has",
    )
    .unit("frames"),
    Metric::counter(
        "backend.pcap.left-out",
        "uplink_pcap_left_out",
        "Frames that the capture file lacks, because it could not be written fast enough",
    )
    .unit("frames"),
    Metric::counter(
        "to-outside.frames",
        "uplink_to_outside_frames",
        "Frames of the switch that went outside",
    )
    .unit("frames")
    .role(Role::OutFrames),
    Metric::counter(
        "to-outside.bytes",
        "uplink_to_outside_bytes",
        "Bytes of the frames that went outside",
    )
    .unit("bytes")
    .role(Role::OutBytes),
    to_outside("to-outside.drops.no_buffers", "no_buffers", NO_BUFFERS),
    to_outside("to-outside.drops.too_slow", "too_slow", TOO_SLOW),
    to_outside("to-outside.drops.too_long", "too_long", TOO_LONG),
    to_outside("to-outside.drops.bad_frame", "bad_frame", BAD_FRAME),
    to_outside("to-outside.drops.no_link", "no_link", NO_LINK),
    to_outside("to-outside.drops.refused", "refused", REFUSED),
    to_outside("to-outside.drops.rate", "rate", RATE),
    to_outside("to-outside.drops.spoofed", "spoofed", SPOOFED),
    to_outside("to-outside.drops.denied", "denied", DENIED),
    to_outside("to-outside.drops.storm", "storm", STORM),
    Metric::counter(
        "from-outside.frames",
        "uplink_from_outside_frames",
        "Frames from outside that entered the switch",
    )
    .unit("frames")
    .role(Role::InFrames),
    Metric::counter(
        "from-outside.bytes",
        "uplink_from_outside_bytes",
        "Bytes of the frames that entered the switch",
    )
    .unit("bytes")
    .role(Role::InBytes),
    from_outside("from-outside.drops.no_buffers", "no_buffers", NO_BUFFERS),
    from_outside("from-outside.drops.too_slow", "too_slow", TOO_SLOW),
    from_outside("from-outside.drops.too_long", "too_long", TOO_LONG),
    from_outside("from-outside.drops.bad_frame", "bad_frame", BAD_FRAME),
    from_outside("from-outside.drops.no_link", "no_link", NO_LINK),
    from_outside("from-outside.drops.refused", "refused", REFUSED),
    from_outside("from-outside.drops.rate", "rate", RATE),
    from_outside("from-outside.drops.spoofed", "spoofed", SPOOFED),
    from_outside("from-outside.drops.denied", "denied", DENIED),
    from_outside("from-outside.drops.storm", "storm", STORM),
];
