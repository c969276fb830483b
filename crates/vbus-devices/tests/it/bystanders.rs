// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A storm on a switch does not keep the ports beside it from exchanging frames.

use std::time::Duration;

use crate::stage::{Storm, measure};

/// `cargo xtask bench bystanders` measures on a machine without other work. Where the machine has
/// other work, any ratio of two short times is possible. So this bound only tells that the
/// bystanders are served at all; the model of the wait budget has the exact one.
const LEAST: f64 = 0.05;

#[test]
fn a_storm_leaves_bystanders_a_part_of_their_rate() {
    for storm in Storm::ALL {
        let measured = measure(storm, 8, Duration::from_millis(50));
        let (ratio, _) = measured.ratio();
        println!("{}: {ratio:.3} of the rate, {measured:?}", storm.what());
        assert!(measured.storm > 0, "{}: there was none", storm.what());
        assert!(ratio > LEAST, "{}: {measured:?}", storm.what());
    }
}
