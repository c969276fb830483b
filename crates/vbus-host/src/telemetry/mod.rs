// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The numbers of a bus, with their meaning. `vbus stats`, `vbus top` and the metrics for
//! Prometheus read the JSON of a device through the same [`Table`].

mod sample;
mod table;

pub use sample::{DeviceSample, Flow, Rates, Sample, State};
pub use table::{Reading, Table};

/// A number for people, with three digits and a prefix: `12.3 k`. A number below 1000 has no
/// fraction.
pub fn short(number: f64) -> String {
    let mut rest = number;
    let mut prefix = "";
    for next in ["k", "M", "G", "T", "P"] {
        // Rounded to three digits, 999.6 k is 1.00 M.
        if rest < 999.5 {
            break;
        }
        rest /= 1000.0;
        prefix = next;
    }
    match prefix {
        "" => format!("{rest:.0}"),
        _ if rest < 9.995 => format!("{rest:.2} {prefix}"),
        _ if rest < 99.95 => format!("{rest:.1} {prefix}"),
        _ => format!("{rest:.0} {prefix}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        for (number, text) in [
            (0.0, "0"),
            (7.4, "7"),
            (999.0, "999"),
            (999.6, "1.00 k"),
            (1000.0, "1.00 k"),
            (12_345.0, "12.3 k"),
            (123_456.0, "123 k"),
            (999_600.0, "1.00 M"),
            (5e15, "5.00 P"),
            (5e19, "50000 P"),
        ] {
            assert_eq!(short(number), text, "{number}");
        }
    }
}
