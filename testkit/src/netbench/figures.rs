// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Medians, spread and ratios of repeated measurements.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::chart::{self, Bar};
use super::contender::Contender;
use super::traffic::{Measured, Traffic};

/// The middle of some figures, and how far they spread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Half of the figures are below, half above.
    pub median: f64,
    /// A quarter of the figures are below.
    pub low: f64,
    /// A quarter of the figures are above.
    pub high: f64,
}

impl Spread {
    /// Of these figures; none if there are none.
    pub fn of(mut figures: Vec<f64>) -> Option<Self> {
        figures.sort_by(f64::total_cmp);
        let last = figures.len().checked_sub(1)?;
        // Between two figures the share of the way is that of their distance.
        let at = |quarters: usize| -> Option<f64> {
            let (place, rest) = (last * quarters / 4, last * quarters % 4);
            let (below, above) = (figures.get(place)?, figures.get((place + 1).min(last))?);
            Some(below + (above - below) * rest as f64 / 4.0)
        };
        Some(Self { median: at(2)?, low: at(1)?, high: at(3)? })
    }

    fn json(self) -> Value {
        json!({ "median": round(self.median), "low": round(self.low), "high": round(self.high) })
    }
}

/// Rounds to four significant digits.
pub fn round(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let digits = 3.0 - value.abs().log10().floor();
    let factor = 10f64.powf(digits);
    (value * factor).round() / factor
}

/// What one figure of a measurement is, if it has it.
pub type Pick = fn(&Measured) -> Option<f64>;

/// The measurements of one guest, round by round.
#[derive(Default)]
pub struct Rounds {
    rounds: Vec<BTreeMap<(Traffic, Contender), Measured>>,
}

impl Rounds {
    /// Begins a round.
    pub fn begin(&mut self) {
        self.rounds.push(BTreeMap::new());
    }

    /// Enters a measurement of this round.
    pub fn enter(&mut self, traffic: Traffic, contender: Contender, measured: Measured) {
        if let Some(round) = self.rounds.last_mut() {
            round.insert((traffic, contender), measured);
        }
    }

    /// The spread of what `value` says of one contender's measurements.
    pub fn spread(&self, traffic: Traffic, contender: Contender, value: Pick) -> Option<Spread> {
        let found = self.rounds.iter().filter_map(|round| round.get(&(traffic, contender)));
        Spread::of(found.filter_map(value).collect())
    }

    /// The spread of the ratios of two contenders, each of two measurements of one round: above 1,
    /// `ours` is ahead.
    pub fn ratio(&self, traffic: Traffic, ours: Contender, theirs: Contender) -> Option<Spread> {
        let ratio = |round: &BTreeMap<_, Measured>| {
            let ours = round.get(&(traffic, ours))?.figure;
            Some(traffic.ratio(ours, round.get(&(traffic, theirs))?.figure))
        };
        Spread::of(self.rounds.iter().filter_map(ratio).collect())
    }

    /// The same to virtio-net of QEMU.
    pub fn against_virtio(&self, traffic: Traffic, contender: Contender) -> Option<Spread> {
        self.ratio(traffic, contender, Contender::VirtioNet)
    }

    /// What `cost` says of a packet of these kinds of traffic together, as the ratio of two
    /// contenders: below 1, `ours` needs less. None if `theirs` needs nothing.
    pub fn cost_ratio(
        &self,
        kinds: &[Traffic],
        ours: Contender,
        theirs: Contender,
        cost: Pick,
    ) -> Option<f64> {
        let sum = |contender: Contender| -> Option<f64> {
            let medians =
                kinds.iter().map(|traffic| Some(self.spread(*traffic, contender, cost)?.median));
            medians.sum()
        };
        let theirs = sum(theirs).filter(|theirs| *theirs > 0.0)?;
        Some(sum(ours)? / theirs)
    }

    /// All of it, by traffic and contender.
    pub fn json(&self) -> Value {
        let mut all = Map::new();
        for traffic in Traffic::ALL {
            let mut row = Map::new();
            for contender in Contender::ALL {
                let Some(figure) = self.spread(traffic, contender, |m| Some(m.figure)) else {
                    continue;
                };
                let interrupts = self.spread(traffic, contender, |m| Some(m.interrupts_per_packet));
                let doorbells = self.spread(traffic, contender, |m| m.doorbells_per_packet);
                row.insert(
                    contender.name().into(),
                    json!({
                        "figure": figure.json(),
                        "interrupts_per_packet": interrupts.map(Spread::json),
                        "doorbells_per_packet": doorbells.map(Spread::json),
                        "against_virtio": self.against_virtio(traffic, contender).map(Spread::json),
                    }),
                );
            }
            if !row.is_empty() {
                row.insert("unit".into(), traffic.unit().into());
                all.insert(traffic.name().into(), row.into());
            }
        }
        all.into()
    }

    /// The chart of all ratios to virtio-net.
    pub fn chart(&self, title: &str) -> String {
        let mut bars = Vec::new();
        for traffic in Traffic::ALL {
            for contender in Contender::ALL.into_iter().filter(|one| *one != Contender::VirtioNet) {
                let Some(ratio) = self.against_virtio(traffic, contender) else { continue };
                let name = format!("{}, {}", traffic.about(), contender.about());
                bars.push(Bar { name, ratio, colour: contender.colour() });
            }
        }
        chart::svg(title, "against virtio-net in the same guest; above 1: vbus is ahead", &bars)
    }

    /// The lines of a table.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:12} {:20} {:>12} {:>24} {:>10} {:>14} {:>17}\n",
            "traffic",
            "NIC",
            "median",
            "half of them between",
            "ratio",
            "irqs/packet",
            "doorbells/packet"
        );
        for traffic in Traffic::ALL {
            for contender in Contender::ALL {
                let Some(figure) = self.spread(traffic, contender, |m| Some(m.figure)) else {
                    continue;
                };
                let ratio =
                    self.against_virtio(traffic, contender).map_or(1.0, |ratio| ratio.median);
                let interrupts = self.spread(traffic, contender, |m| Some(m.interrupts_per_packet));
                let doorbells = self.spread(traffic, contender, |m| m.doorbells_per_packet);
                let doorbells =
                    doorbells.map_or("-".into(), |spread| format!("{:.4}", spread.median));
                let between = format!("{} .. {}", round(figure.low), round(figure.high));
                text += &format!(
                    "{:12} {:20} {:>12} {between:>24} {ratio:>10.2} {:>14.4} {doorbells:>17}  {}\n",
                    traffic.name(),
                    contender.about(),
                    round(figure.median),
                    interrupts.map_or(0.0, |spread| spread.median),
                    traffic.unit(),
                );
            }
        }
        text
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_figures_are_between_the_quartiles() {
        let spread = Spread::of(vec![5.0, 1.0, 3.0, 2.0, 4.0]).unwrap();
        assert_eq!(spread, Spread { median: 3.0, low: 2.0, high: 4.0 });
        let spread = Spread::of(vec![1.0, 2.0]).unwrap();
        assert_eq!(spread, Spread { median: 1.5, low: 1.25, high: 1.75 });
        assert_eq!(Spread::of(Vec::new()), None);
        assert!(
            (round(123_456.0) - 123_500.0).abs() < 1e-9
                && (round(0.012_345) - 0.012_35).abs() < 1e-12
        );
    }

    #[test]
    fn a_ratio_is_of_one_round() {
        let mut rounds = Rounds::default();
        // The machine was ten times slower in the second round.
        for speed in [10.0, 1.0, 10.0] {
            rounds.begin();
            for (contender, figure) in [(Contender::Program, 2.0), (Contender::VirtioNet, 4.0)] {
                let measured = Measured {
                    figure: figure * speed,
                    interrupts_per_packet: figure,
                    doorbells_per_packet: None,
                };
                rounds.enter(Traffic::TcpOut, contender, measured);
            }
        }
        let ratio = rounds.against_virtio(Traffic::TcpOut, Contender::Program).unwrap();
        assert_eq!(ratio, Spread { median: 0.5, low: 0.5, high: 0.5 });
        let kinds = [Traffic::TcpOut];
        let ratio = |kinds: &[Traffic], cost| {
            rounds.cost_ratio(kinds, Contender::Program, Contender::VirtioNet, cost)
        };
        assert_eq!(ratio(&kinds, |measured| Some(measured.interrupts_per_packet)), Some(0.5));
        assert_eq!(ratio(&kinds, |measured| measured.doorbells_per_packet), None);
        assert_eq!(ratio(&[Traffic::TcpIn], |measured| Some(measured.figure)), None);
        assert!(rounds.table().contains("tcp_out"));
        assert_eq!(rounds.json()["tcp_out"]["program"]["against_virtio"]["median"], 0.5);
    }
}
