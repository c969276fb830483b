// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From samples to what is reported: ratios above 1 where vbus is the faster, and how far they
//! spread.

use serde_json::{Map, Value};

use crate::samples::{Place, Samples, Spread};

/// Key of the report, the peer's figure, vbus's.
const RATIOS: [(&str, &str, &str); 24] = [
    ("ring_vs_virtio_crates_b16", "ring/b16/virtio_crates", "ring/b16/vbus"),
    ("engine_vs_virtio_queue_b1", "ring/b1/virtio_crates", "ring/b1/virtio_engine"),
    ("engine_vs_virtio_queue_b16", "ring/b16/virtio_crates", "ring/b16/virtio_engine"),
    ("engine_vs_virtio_queue_b64", "ring/b64/virtio_crates", "ring/b64/virtio_engine"),
    (
        "engine_vs_virtio_queue_pingpong",
        "ring/pingpong/virtio_crates",
        "ring/pingpong/virtio_engine",
    ),
    ("ring_vs_virtio_hand_b1", "ring/b1/virtio_hand", "ring/b1/vbus"),
    ("ring_vs_virtio_hand_b16", "ring/b16/virtio_hand", "ring/b16/vbus"),
    ("ring_vs_virtio_hand_b64", "ring/b64/virtio_hand", "ring/b64/vbus"),
    ("ring_vs_virtio_hand_pingpong", "ring/pingpong/virtio_hand", "ring/pingpong/vbus"),
    ("ring_vs_floor_b1", "ring/b1/floor", "ring/b1/vbus_either"),
    ("ring_vs_floor_b16", "ring/b16/floor", "ring/b16/vbus_either"),
    ("ring_vs_floor_b64", "ring/b64/floor", "ring/b64/vbus_either"),
    ("ring_vs_floor_pingpong", "ring/pingpong/floor", "ring/pingpong/vbus_either"),
    ("ring_vs_floor_fenced_b1", "ring/b1/slots_fenced", "ring/b1/vbus_either"),
    ("ring_vs_floor_fenced_b16", "ring/b16/slots_fenced", "ring/b16/vbus_either"),
    ("ring_vs_floor_fenced_b64", "ring/b64/slots_fenced", "ring/b64/vbus_either"),
    ("state_write_vs_seqlock_64", "state/64/idle_write/seqlock", "state/64/idle_write/vbus"),
    ("state_read_vs_seqlock_64", "state/64/idle_read/seqlock", "state/64/idle_read/vbus"),
    ("state_write_vs_iceoryx2_64", "state/64/idle_write/iceoryx2", "state/64/idle_write/vbus"),
    ("state_read_vs_iceoryx2_64", "state/64/idle_read/iceoryx2", "state/64/idle_read/vbus"),
    (
        "state_write_vs_iceoryx2_1024",
        "state/1024/idle_write/iceoryx2",
        "state/1024/idle_write/vbus",
    ),
    ("state_read_vs_iceoryx2_1024", "state/1024/idle_read/iceoryx2", "state/1024/idle_read/vbus"),
    (
        "state_read_busy_vs_iceoryx2_1024",
        "state/1024/busy_read/iceoryx2",
        "state/1024/busy_read/vbus",
    ),
    ("pingpong_blocked_vs_eventfd", "signal/blocked/eventfd", "signal/blocked/vbus"),
];

/// Key of the report, its figure.
const FIGURES: [(&str, &str); 5] = [
    ("signal_kicks_per_1000_busy", "signal/kicks_per_1000/busy"),
    ("signal_kicks_per_1000_slow", "signal/kicks_per_1000/slow"),
    ("signal_kicks_per_1000_idle", "signal/kicks_per_1000/idle"),
    ("line_ns", "lines/one/nested"),
    ("line_ns_of_16", "lines/of_16/nested"),
];

/// Columns of the ring's figures for which there is a ratio to the packed queue.
const PACKED_COLUMNS: [&str; 4] = ["b1", "b16", "b64", "pingpong"];

/// What follows "ring_vs_packed_hand_COLUMN" in the key, the packed queue's figure, vbus's. The
/// packed queue's form by the batch returns no lengths. So `_entries` compares vbus with the form
/// that does, and the key without a suffix with the better form. The polling forms have no signals
/// and no event suppression.
const PACKED_FORMS: [(&str, &str, &str); 6] = [
    ("", "packed_hand", "vbus_either"),
    ("_entries", "packed_hand_lengths", "vbus_either"),
    ("_counted", "packed_hand_lazy", "vbus_counted"),
    ("_polling", "packed_hand_polling", "vbus_nofence_either"),
    ("_entries_polling", "packed_hand_lengths_polling", "vbus_nofence_either"),
    ("_counted_polling", "packed_hand_polling_lazy", "vbus_nofence_counted"),
];

/// What a line of the tables says.
enum Source {
    Figure(String),
    /// The peer's figure, and vbus's.
    Ratio(String, String),
}

impl Source {
    fn of(&self, samples: &Samples, place: Option<Place>) -> Option<Spread> {
        match self {
            Source::Figure(name) => samples.of(name, place),
            Source::Ratio(peer, ours) => samples.ratio(peer, ours, place),
        }
    }
}

/// Prints every figure and every ratio, and returns the report: the medians by key. A key is of all
/// rounds; a key with `_near` or `_far` behind it is of the rounds with the cores at that place.
pub fn report(samples: &Samples) -> Value {
    let mut report = Map::new();
    let mut add = |key: String, median: f64| {
        report.insert(key, Value::from((median * 1000.0).round() / 1000.0));
    };
    let all = samples.figures.keys().map(|name| (name.clone(), Source::Figure(name.clone())));
    print(samples, "nanoseconds (kicks, reads per 1,000)", &all.collect::<Vec<_>>());
    let ratio = |(key, peer, ours): (String, String, String)| (key, Source::Ratio(peer, ours));
    let packed = PACKED_COLUMNS.into_iter().flat_map(|column| {
        PACKED_FORMS.map(|(suffix, peer, ours)| {
            let figure = |name| format!("ring/{column}/{name}");
            (format!("ring_vs_packed_hand_{column}{suffix}"), figure(peer), figure(ours))
        })
    });
    let ratios = RATIOS.map(|(key, peer, ours)| (key.into(), peer.into(), ours.into()));
    let ratios: Vec<_> = ratios.into_iter().chain(packed).map(ratio).collect();
    print(samples, "ratios: above 1, vbus is the faster", &ratios);
    let figures = FIGURES.map(|(key, name)| (key.to_string(), Source::Figure(name.into())));
    for (key, source) in ratios.iter().chain(&figures) {
        if let Some(spread) = source.of(samples, None) {
            add(key.clone(), spread.median);
        }
    }
    for place in Place::BOTH {
        let Some(spread) = samples.hand_over(place) else { continue };
        add(format!("hand_over_ns_{}", place.name()), spread.median);
        for (key, source) in ratios.iter().filter(|(key, _)| key.starts_with("ring_")) {
            if let Some(spread) = source.of(samples, Some(place)) {
                add(format!("{key}_{}", place.name()), spread.median);
            }
        }
    }
    Value::Object(report)
}

/// Prints a table for each place that the cores were at.
fn print(samples: &Samples, title: &str, lines: &[(String, Source)]) {
    for place in Place::BOTH {
        let Some(Spread { low, median, high }) = samples.hand_over(place) else { continue };
        println!(
            "\ncores {}: a cache line's hand-over takes {median:.0} ns ({low:.0}..{high:.0})",
            place.name()
        );
        println!("{title:40} {:>10} {:>22}", "median", "half of them within");
        for (name, source) in lines {
            if let Some(Spread { low, median, high }) = source.of(samples, Some(place)) {
                println!("{name:40} {median:10.2} {low:12.2}..{high:.2}");
            }
        }
    }
}
