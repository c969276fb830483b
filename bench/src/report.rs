//! From samples to what is reported: ratios above 1 where vbus is the faster, and how far they
//! spread.

use serde_json::{Map, Value};

use crate::samples::{Samples, Spread};

/// Key of the report, the peer's figure, vbus's.
const RATIOS: [(&str, &str, &str); 17] = [
    ("ring_vs_virtio_crates_b16", "ring/b16/virtio_crates", "ring/b16/vbus"),
    ("ring_vs_virtio_hand_b1", "ring/b1/virtio_hand", "ring/b1/vbus"),
    ("ring_vs_virtio_hand_b16", "ring/b16/virtio_hand", "ring/b16/vbus"),
    ("ring_vs_virtio_hand_b64", "ring/b64/virtio_hand", "ring/b64/vbus"),
    ("ring_vs_virtio_hand_pingpong", "ring/pingpong/virtio_hand", "ring/pingpong/vbus"),
    ("ring_vs_floor_b1", "ring/b1/floor", "ring/b1/vbus"),
    ("ring_vs_floor_b16", "ring/b16/floor", "ring/b16/vbus"),
    ("ring_vs_floor_b64", "ring/b64/floor", "ring/b64/vbus"),
    ("ring_vs_floor_pingpong", "ring/pingpong/floor", "ring/pingpong/vbus"),
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

/// Prints every figure and every ratio, and returns the report: the medians by key.
pub fn report(samples: &Samples) -> Value {
    println!(
        "{:40} {:>10} {:>22}",
        "nanoseconds (kicks, reads per 1,000)", "median", "half of them within"
    );
    for name in samples.figures.keys() {
        if let Some(spread) = samples.of(name) {
            line(name, spread);
        }
    }
    println!(
        "\n{:40} {:>10} {:>22}",
        "ratios: above 1, vbus is the faster", "median", "half of them within"
    );
    let mut report = Map::new();
    let ratios = RATIOS.map(|(key, peer, ours)| (key, samples.ratio(peer, ours)));
    let figures = FIGURES.map(|(key, figure)| (key, samples.of(figure)));
    for (key, spread) in ratios.into_iter().chain(figures) {
        let Some(spread) = spread else { continue };
        line(key, spread);
        report.insert(key.into(), Value::from((spread.median * 1000.0).round() / 1000.0));
    }
    Value::Object(report)
}

fn line(name: &str, Spread { low, median, high }: Spread) {
    println!("{name:40} {median:10.2} {low:12.2}..{high:.2}");
}
