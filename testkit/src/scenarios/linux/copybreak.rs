// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which frames an interface copies to send them, and which ones it maps: by their size, as the
//! administrator has set it with ethtool. The counters of the interface tell.

use anyhow::{Context, Result, ensure};

use crate::guest::Guest;
use crate::pair::{ADDRESS, TRANSFER};

/// Bytes of a ping's message, and of its frame.
const MESSAGE: u32 = 1400;
const FRAME: u32 = MESSAGE + 8 + 20 + 14;

/// Pings with each setting.
const PINGS: u64 = 3;

/// The settings, and whether the frame of a ping is then copied.
const SETTINGS: [(u32, bool); 5] =
    [(2048, true), (0, false), (FRAME, true), (FRAME - 1, false), (65558, true)];

/// Pings the far end by `interface` with each setting. The interface then has the setting that it
/// had at first. No other frames but short ones may go meanwhile.
pub(super) fn follows_setting(guest: &Guest, interface: &str) -> Result<()> {
    let is = |bytes: u32| -> Result<()> {
        let told = guest.ok(&format!("ethtool --get-tunable {interface} tx-copybreak"))?;
        ensure!(told.trim().ends_with(&format!(": {bytes}")), "not {bytes} bytes: {told}");
        Ok(())
    };
    let set = |bytes: u32| format!("ethtool --set-tunable {interface} tx-copybreak {bytes}");
    let counts = || -> Result<[u64; 2]> {
        let count = |name: &str| -> Result<u64> {
            let said = guest.ok(&format!(
                "ethtool -S {interface} | awk '/ tx[0-9]+_{name}:/{{n+=$2}} END{{print n}}'"
            ))?;
            said.trim().parse().with_context(|| format!("no counter {name}"))
        };
        Ok([count("copied")?, count("mapped")?])
    };
    is(2048).context("at first")?;
    for (bytes, is_copied) in SETTINGS {
        guest.ok(&set(bytes))?;
        is(bytes)?;
        let before = counts()?;
        let pings = format!("ping -c 1 -W 60 -s {MESSAGE} {}", ADDRESS[1]);
        for _ in 0..PINGS {
            guest.start(&pings)?.ok(TRANSFER).with_context(|| format!("with {bytes} bytes"))?;
        }
        let now = counts()?;
        let [copied, mapped] = [now[0] - before[0], now[1] - before[1]];
        let as_set = match (bytes, is_copied) {
            // Nothing is copied.
            (0, _) => copied == 0 && mapped >= PINGS,
            // Short frames of the system may be copied beside.
            (_, false) => mapped >= PINGS,
            (_, true) => copied >= PINGS && mapped == 0,
        };
        ensure!(
            as_set,
            "up to {bytes} bytes are to be copied: of {PINGS} frames of {FRAME} bytes, and others, \
             {copied} were copied and {mapped} mapped"
        );
    }
    ensure!(guest.run(&set(65559))?.code != 0, "the setting may be larger than any frame");
    is(65558).context("after a setting that was refused")?;
    guest.ok(&set(2048)).map(drop)
}
