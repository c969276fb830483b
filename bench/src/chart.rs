// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Charts as SVG: lines of medians over a logarithmic scale both ways, the spread as a band.

use std::fmt::Write as _;
use std::path::Path;

use crate::samples::{Samples, Spread};

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 440.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 170.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 60.0;
const COLOURS: [&str; 7] =
    ["#c02020", "#2060c0", "#208040", "#c08000", "#8040a0", "#008080", "#606060"];

/// One line: its name, and its points (position, figure).
type Series = (String, Vec<(f64, Spread)>);

/// Writes every chart for which there are samples into `directory`.
pub fn write(samples: &Samples, directory: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let chart = |file: &str, title: &str, x: &str, series: Vec<Series>| {
        // A group that was not measured leaves the chart of an earlier run as it is.
        if series.iter().all(|(_, points)| points.is_empty()) {
            return Ok(());
        }
        let title = format!("{title} (cores {})", samples.place().name());
        std::fs::write(directory.join(file), svg(&title, x, "ns", &series))
    };
    let batches = [
        "vbus",
        "vbus_counted",
        "packed_hand",
        "virtio_hand",
        "virtio_crates",
        "floor",
        "rtrb_one_way",
    ];
    let points = |prefix: &str, names: &[&str]| {
        names.iter().map(|name| series(samples, prefix, name)).collect()
    };
    chart(
        "batch.svg",
        "A 16-byte entry out and back, by batch",
        "entries posted together",
        points("ring/b", &batches),
    )?;
    chart(
        "value.svg",
        "A state page, idle, by size of the value",
        "bytes",
        points("state_size/", &["write", "read"]),
    )?;
    let pages = ["vbus", "seqlock", "iceoryx2"];
    let title = "A read of 1 KiB under a writer that never pauses, by readers on one core";
    chart("readers.svg", title, "readers", points("state_readers/", &pages))?;
    let title = "A 16-byte entry out and back in batches of 16, by devices";
    chart(
        "devices.svg",
        title,
        "devices served by one pair of threads",
        points("devices/", &["vbus"]),
    )
}

/// The figures "PREFIX<number>/NAME", by number.
fn series(samples: &Samples, prefix: &str, name: &str) -> Series {
    let point = |key: &String| {
        let (x, end) = key.strip_prefix(prefix)?.split_once('/')?;
        if end == name {
            Some((x.parse().ok()?, samples.of(key, Some(samples.place()))?))
        } else {
            None
        }
    };
    let mut points: Vec<(f64, Spread)> = samples.figures.keys().filter_map(point).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    (name.into(), points)
}

fn svg(title: &str, x_name: &str, y_name: &str, series: &[Series]) -> String {
    let all = || series.iter().flat_map(|(_, points)| points);
    let fold = |start: f64, pick: fn(f64, f64) -> f64, of: fn(&(f64, Spread)) -> f64| {
        all().map(of).fold(start, pick)
    };
    let (x0, x1) = (fold(f64::INFINITY, f64::min, |p| p.0), fold(0.0, f64::max, |p| p.0));
    // Whole powers of ten.
    let y0 = 10_f64.powf(fold(f64::INFINITY, f64::min, |p| p.1.low.max(0.1)).log10().floor());
    let y1 = 10_f64.powf(fold(0.2, f64::max, |p| p.1.high).log10().ceil());
    let x = |v: f64| LEFT + (v / x0).ln() / (x1 / x0).ln().max(1e-9) * (WIDTH - LEFT - RIGHT);
    let y =
        |v: f64| HEIGHT - BOTTOM - (v.max(y0) / y0).ln() / (y1 / y0).ln() * (HEIGHT - TOP - BOTTOM);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"26\" font-size=\"15\">{title}</text>\n"
    );
    let mut tick = y0;
    while tick <= y1 * 1.001 {
        let at = y(tick);
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{tick} {y_name}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0
        );
        tick *= 10.0;
    }
    let mut ticks: Vec<f64> = all().map(|p| p.0).collect();
    ticks.sort_by(f64::total_cmp);
    ticks.dedup();
    for tick in ticks {
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{tick}</text>",
            x(tick),
            HEIGHT - BOTTOM + 18.0
        );
    }
    let middle = (LEFT + WIDTH - RIGHT) / 2.0;
    let _ = writeln!(
        out,
        "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{x_name}</text>",
        HEIGHT - 16.0
    );
    for (n, (name, points)) in
        series.iter().enumerate().filter(|(_, (_, points))| !points.is_empty())
    {
        let colour = COLOURS[n % COLOURS.len()];
        let path = |of: &dyn Fn(&Spread) -> f64,
                    points: &mut dyn Iterator<Item = &(f64, Spread)>| {
            points
                .map(|(at, spread)| format!("{:.1},{:.1}", x(*at), y(of(spread))))
                .collect::<Vec<_>>()
                .join(" ")
        };
        let band = path(&|s| s.high, &mut points.iter())
            + " "
            + &path(&|s| s.low, &mut points.iter().rev());
        let line = path(&|s| s.median, &mut points.iter());
        let _ = writeln!(
            out,
            "<polygon points=\"{band}\" fill=\"{colour}\" opacity=\"0.15\"/>\
             <polyline points=\"{line}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\
             <text x=\"{}\" y=\"{}\" fill=\"{colour}\">{name}</text>",
            WIDTH - RIGHT + 12.0,
            TOP + 10.0 + 18.0 * n as f64
        );
    }
    out + "</svg>\n"
}
