// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The limits of the rate of each direction.

use vbus_core::CreateError;
use vbus_core::settings::Settings;

/// The rates that settings may give, in bits a second.
const RATES: std::ops::RangeInclusive<u64> = 8_000..=1_000_000_000_000;
/// The bursts that settings may give, in bytes.
const BURSTS: std::ops::RangeInclusive<u64> = 1..=1_000_000_000;
/// The burst if the settings give none: this part of a second at the rate, in ms, and at least so
/// many bytes.
const BURST_MS: u64 = 20;
const BURST_MIN: u64 = 128 << 10;

/// The limits of both directions, in bits a second. `None`: there is no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// From the driver.
    pub tx_rate: Option<u64>,
    /// To the driver.
    pub rx_rate: Option<u64>,
    /// Bytes that may come at once. `None`: what the rate gives in 20 ms, and at least 128 KiB.
    pub burst: Option<u64>,
}

impl Limits {
    /// Reads `rate`, `tx-rate`, `rx-rate` and `burst`.
    pub(crate) fn parse(settings: &mut Settings) -> Result<Limits, CreateError> {
        let both = settings.quantity("rate", RATES)?;
        let tx_rate = settings.quantity("tx-rate", RATES)?.or(both);
        let rx_rate = settings.quantity("rx-rate", RATES)?.or(both);
        let burst = settings.quantity("burst", BURSTS)?;
        if burst.is_some() && tx_rate.is_none() && rx_rate.is_none() {
            return Err(settings.error("burst", "needs rate = BITS_PER_SECOND, tx-rate or rx-rate"));
        }
        Ok(Limits { tx_rate, rx_rate, burst })
    }

    /// The settings of limits.
    pub const KEYS: [&str; 4] = ["rate", "tx-rate", "rx-rate", "burst"];

    /// The bytes a second and the bytes of a burst of a direction with this rate.
    pub(crate) fn bytes(&self, rate: u64) -> (u64, u64) {
        let bytes = rate / 8;
        (bytes, self.burst.unwrap_or((bytes / 1000 * BURST_MS).max(BURST_MIN)))
    }
}
