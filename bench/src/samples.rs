// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Figures by name, taken in rounds.
//!
//! A virtual machine's cores move about the real ones, and the cost of a cache line's hand-over
//! changes by a factor of five when they do. So only figures of the same round, a fraction of a
//! second apart, are compared with each other, and each carries the hand-over of its round.

use std::collections::BTreeMap;

use crate::duel::hand_over;

/// Where the two cores were during a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// They share a cache: a line's hand-over takes some 25 ns.
    Near,
    /// They do not: it takes some 160 ns.
    Far,
}

impl Place {
    pub const BOTH: [Place; 2] = [Place::Near, Place::Far];

    /// Up to so many nanoseconds a hand-over the cores are near each other.
    const NEAR_NS: f64 = 75.0;

    fn of(hand_over: f64) -> Place {
        if hand_over <= Self::NEAR_NS { Place::Near } else { Place::Far }
    }

    pub fn name(self) -> &'static str {
        match self {
            Place::Near => "near",
            Place::Far => "far",
        }
    }
}

/// By name, for each round: the hand-over of a cache line, and the figure.
pub type Figures = BTreeMap<String, Vec<(f64, f64)>>;

/// The figures of one name, a figure a round.
#[derive(Default)]
pub struct Samples {
    pub rounds: usize,
    pub figures: Figures,
}

/// The figures of one round.
pub struct Round<'a> {
    number: usize,
    hand_over: f64,
    figures: &'a mut Figures,
}

impl Round<'_> {
    /// A number that differs from round to round, also of other processes.
    pub fn number(&self) -> usize {
        self.number
    }

    pub fn add(&mut self, name: String, figure: f64) {
        self.figures.entry(name).or_default().push((self.hand_over, figure));
    }
}

impl Samples {
    pub fn new(rounds: usize) -> Samples {
        Samples { rounds, figures: Figures::new() }
    }

    /// Takes the rounds of one group of figures.
    pub fn rounds(&mut self, mut take: impl FnMut(&mut Round<'_>)) {
        for number in 0..self.rounds {
            let number = number + std::process::id() as usize;
            let hand_over = hand_over(1 << 10);
            take(&mut Round { number, hand_over, figures: &mut self.figures });
        }
    }

    /// Adds the rounds that another process took.
    pub fn extend(&mut self, figures: Figures) {
        for (name, rounds) in figures {
            self.figures.entry(name).or_default().extend(rounds);
        }
    }

    /// The place of most rounds.
    pub fn place(&self) -> Place {
        let rounds = || self.figures.values().flatten();
        let near = rounds().filter(|(hand_over, _)| Place::of(*hand_over) == Place::Near).count();
        if 2 * near >= rounds().count() { Place::Near } else { Place::Far }
    }

    /// What a hand-over took in the rounds with the cores at `place`.
    pub fn hand_over(&self, place: Place) -> Option<Spread> {
        let all = self.figures.values().flatten().map(|(hand_over, _)| *hand_over);
        Spread::of(all.filter(|hand_over| Place::of(*hand_over) == place).collect())
    }

    /// The figures of a name, of the rounds with the cores at `place`, or of all.
    pub fn of(&self, name: &str, place: Option<Place>) -> Option<Spread> {
        let rounds = self.figures.get(name)?.iter();
        Spread::of(rounds.filter(|round| at(round, place)).map(|(_, figure)| *figure).collect())
    }

    /// `peer` over `ours`, round by round: above 1 where ours is the faster.
    pub fn ratio(&self, peer: &str, ours: &str, place: Option<Place>) -> Option<Spread> {
        let (peer, ours) = (self.figures.get(peer)?, self.figures.get(ours)?);
        let rounds = peer.iter().zip(ours).filter(|(round, _)| at(round, place));
        Spread::of(rounds.map(|((_, peer), (_, ours))| peer / ours).collect())
    }
}

fn at((hand_over, _): &(f64, f64), place: Option<Place>) -> bool {
    place.is_none_or(|place| Place::of(*hand_over) == place)
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
