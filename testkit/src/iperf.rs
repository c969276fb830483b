// SPDX-License-Identifier: Apache-2.0 OR MIT
//! iperf3: its command line, and what it reports.

use anyhow::{Context, Result};
use serde_json::Value;

/// What the client of iperf3 is to do.
#[derive(Clone, Copy)]
pub struct Load<'a> {
    /// The address of the server.
    pub server: &'a str,
    /// The port of the server.
    pub port: u16,
    /// For how many seconds.
    pub seconds: u32,
    /// More words for its command line.
    pub words: &'a str,
}

impl Load<'_> {
    /// The client's command. Its report is JSON.
    pub fn command(&self) -> String {
        let Self { server, port, seconds, words } = self;
        format!(
            "iperf3 --client {server} --port {port} --time {seconds} --json --connect-timeout \
             10000 {words}"
        )
    }
}

/// What the receivers of a run have counted, in megabits per second.
pub struct Received {
    /// From the client to the server, or the other way with `--reverse`.
    pub mbps: f64,
    /// The way back of a run with `--bidir`; 0 for other runs.
    pub back_mbps: f64,
}

impl Received {
    /// Reads the client's report.
    ///
    /// # Errors
    /// It is no report, or iperf3 reports an error.
    pub fn of(report: &str) -> Result<Self> {
        let report: Value = serde_json::from_str(report).context("iperf3 printed no JSON")?;
        let bits = |key: &str| report["end"][key]["bits_per_second"].as_f64();
        let mbps = bits("sum_received")
            .with_context(|| format!("iperf3 counted nothing: {}", report["error"]))?;
        let back = bits("sum_received_bidir_reverse").unwrap_or_default();
        Ok(Self { mbps: mbps / 1e6, back_mbps: back / 1e6 })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn the_receivers_count() {
        let received = Received::of(
            r#"{"end": {"sum_sent": {"bits_per_second": 9e6},
                "sum_received": {"bits_per_second": 8e6},
                "sum_received_bidir_reverse": {"bits_per_second": 2e6}}}"#,
        );
        let received = received.unwrap();
        assert!((received.mbps - 8.0).abs() < 1e-9 && (received.back_mbps - 2.0).abs() < 1e-9);
        let why = Received::of(r#"{"error": "unable to connect"}"#).err().unwrap().to_string();
        assert!(why.contains("unable to connect"), "{why}");
    }
}
