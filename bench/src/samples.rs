//! Figures by name, taken in rounds.
//!
//! A virtual machine's cores move about the real ones, and what a cache line's hand-over costs
//! changes by a factor of five when they do. So only figures of the same round, a fraction of a
//! second apart, are compared with each other.

use std::collections::BTreeMap;

/// The figures of one name, a figure a round.
#[derive(Default)]
pub struct Samples {
    pub rounds: usize,
    pub figures: BTreeMap<String, Vec<f64>>,
}

/// The figures of one round.
pub struct Round<'a>(&'a mut BTreeMap<String, Vec<f64>>);

impl Round<'_> {
    pub fn add(&mut self, name: String, figure: f64) {
        self.0.entry(name).or_default().push(figure);
    }
}

impl Samples {
    pub fn new(rounds: usize) -> Samples {
        Samples { rounds, figures: BTreeMap::new() }
    }

    /// Takes the rounds of one group of figures.
    pub fn rounds(&mut self, mut take: impl FnMut(&mut Round<'_>)) {
        for _ in 0..self.rounds {
            take(&mut Round(&mut self.figures));
        }
    }

    /// Adds the rounds that another process took.
    pub fn extend(&mut self, figures: BTreeMap<String, Vec<f64>>) {
        for (name, rounds) in figures {
            self.figures.entry(name).or_default().extend(rounds);
        }
    }

    pub fn of(&self, name: &str) -> Option<Spread> {
        Spread::of(self.figures.get(name)?.clone())
    }

    /// `peer` over `ours`, round by round: above 1 where ours is the faster.
    pub fn ratio(&self, peer: &str, ours: &str) -> Option<Spread> {
        let (peer, ours) = (self.figures.get(peer)?, self.figures.get(ours)?);
        Spread::of(peer.iter().zip(ours).map(|(peer, ours)| peer / ours).collect())
    }
}

/// The middle, and between what half of the figures lie.
#[derive(Clone, Copy)]
pub struct Spread {
    pub low: f64,
    pub median: f64,
    pub high: f64,
}

impl Spread {
    pub fn of(mut figures: Vec<f64>) -> Option<Spread> {
        figures.sort_by(f64::total_cmp);
        let at = |part: f64| {
            figures.get(((figures.len().max(1) - 1) as f64 * part).round() as usize).copied()
        };
        Some(Spread { low: at(0.25)?, median: at(0.5)?, high: at(0.75)? })
    }
}
