// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A chart of ratios as SVG: a bar for each, from 1 to the ratio, over a logarithmic scale, with
//! its spread as a line.

use std::fmt::Write as _;

use super::figures::Spread;

const WIDTH: f64 = 720.0;
const LEFT: f64 = 250.0;
const RIGHT: f64 = 60.0;
const TOP: f64 = 70.0;
const ROW: f64 = 22.0;
const BAR: f64 = 14.0;

/// One bar.
pub struct Bar {
    /// What it is about.
    pub name: String,
    /// The ratio.
    pub ratio: Spread,
    /// Bars of one colour belong together.
    pub colour: &'static str,
}

/// Draws the chart. `meaning` says what a ratio above 1 means.
pub fn svg(title: &str, meaning: &str, bars: &[Bar]) -> String {
    let (mut least, mut most) = (0.5f64, 2.0f64);
    for bar in bars {
        least = least.min(bar.ratio.low);
        most = most.max(bar.ratio.high);
    }
    // Whole powers of two.
    let (first, last) = (least.max(1e-4).log2().floor(), most.log2().ceil());
    let x = |ratio: f64| {
        let share = (ratio.max(1e-4).log2() - first) / (last - first);
        LEFT + share * (WIDTH - LEFT - RIGHT)
    };
    let height = TOP + ROW * bars.len() as f64 + 30.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"15\">{title}</text>\n\
         <text x=\"16\" y=\"46\" fill=\"#555\">{meaning}</text>\n"
    );
    let mut power = first;
    while power <= last {
        let ratio = power.exp2();
        let (at, bottom) = (x(ratio), height - 26.0);
        let colour = if power == 0.0 { "#000" } else { "#ddd" };
        let _ = writeln!(
            out,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{bottom}\" stroke=\"{colour}\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{ratio}</text>",
            bottom + 16.0
        );
        // At most a dozen numbers fit.
        power += ((last - first) / 12.0).ceil().max(1.0);
    }
    for (row, bar) in bars.iter().enumerate() {
        let middle = TOP + ROW * (row as f64 + 0.5);
        let (from, to) = (x(1.0).min(x(bar.ratio.median)), x(1.0).max(x(bar.ratio.median)));
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{}\"/>\
             <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\" \
             stroke=\"#000\"/>\
             <text x=\"{}\" y=\"{:.1}\">{:.2}</text>",
            LEFT - 10.0,
            middle + 4.0,
            bar.name,
            middle - BAR / 2.0,
            (to - from).max(1.0),
            bar.colour,
            x(bar.ratio.low),
            x(bar.ratio.high),
            WIDTH - RIGHT + 8.0,
            middle + 4.0,
            bar.ratio.median
        );
    }
    out + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_ends_at_its_ratio() {
        let ratio = |median| Spread { median, low: median / 2.0, high: median };
        let bar =
            |name: &str, median| Bar { name: name.into(), ratio: ratio(median), colour: "#c00" };
        let svg = svg("title", "above 1: ahead", &[bar("one", 2.0), bar("other", 0.001)]);
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
        assert!(svg.contains(">one</text>") && svg.contains(">2.00</text>"), "{svg}");
        assert!(!svg.contains("NaN") && !svg.contains("width=\"-"), "{svg}");
    }
}
