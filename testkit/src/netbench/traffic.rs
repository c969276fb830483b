// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kinds of traffic that are measured, and one measurement.

use anyhow::{Context, Result};

use super::contender::{Nic, Rig};
use crate::nic;
use crate::tap::Server;

/// The bytes of a full frame at an MTU of 1500, on Linux's counters.
const FRAME: u64 = 1514;

/// The pings of one measurement.
const PINGS: u32 = 20;

/// One kind of traffic between the guest and this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Traffic {
    /// A TCP stream out of the guest.
    TcpOut,
    /// A TCP stream into the guest.
    TcpIn,
    /// A TCP stream each way at once.
    TcpBoth,
    /// Datagrams of 64 bytes out of the guest.
    Udp64Out,
    /// Datagrams of 64 bytes into the guest.
    Udp64In,
    /// Datagrams of 1,472 bytes out of the guest: each fills a frame.
    Udp1472Out,
    /// Datagrams of 1,472 bytes into the guest.
    Udp1472In,
    /// Pings, one after the other.
    Ping,
}

impl Traffic {
    /// All of them, in the order in which they are measured.
    pub const ALL: [Self; 8] = [
        Self::TcpOut,
        Self::TcpIn,
        Self::TcpBoth,
        Self::Udp64Out,
        Self::Udp64In,
        Self::Udp1472Out,
        Self::Udp1472In,
        Self::Ping,
    ];

    /// Its name in JSON keys.
    pub fn name(self) -> &'static str {
        match self {
            Self::TcpOut => "tcp_out",
            Self::TcpIn => "tcp_in",
            Self::TcpBoth => "tcp_both",
            Self::Udp64Out => "udp64_out",
            Self::Udp64In => "udp64_in",
            Self::Udp1472Out => "udp1472_out",
            Self::Udp1472In => "udp1472_in",
            Self::Ping => "ping",
        }
    }

    /// What it is, for a chart.
    pub fn about(self) -> &'static str {
        match self {
            Self::TcpOut => "TCP out",
            Self::TcpIn => "TCP in",
            Self::TcpBoth => "TCP both ways",
            Self::Udp64Out => "UDP 64 out",
            Self::Udp64In => "UDP 64 in",
            Self::Udp1472Out => "UDP 1472 out",
            Self::Udp1472In => "UDP 1472 in",
            Self::Ping => "ping",
        }
    }

    /// The unit of its figures.
    pub fn unit(self) -> &'static str {
        match self {
            Self::TcpOut | Self::TcpIn | Self::TcpBoth => "Mb/s",
            Self::Ping => "ms",
            _ => "datagrams/s",
        }
    }

    /// How much better `ours` is than `theirs`: above 1, ours is ahead.
    pub fn ratio(self, ours: f64, theirs: f64) -> f64 {
        if self == Self::Ping { theirs / ours } else { ours / theirs }
    }

    /// The bytes of a datagram; none if it is no UDP.
    fn datagram(self) -> Option<u32> {
        match self {
            Self::Udp64Out | Self::Udp64In => Some(64),
            Self::Udp1472Out | Self::Udp1472In => Some(1472),
            _ => None,
        }
    }

    /// The words for iperf3, with `streams` streams at once.
    pub fn words(self, streams: u32) -> String {
        let way = match self {
            Self::TcpIn | Self::Udp64In | Self::Udp1472In => "--reverse",
            Self::TcpBoth => "--bidir",
            _ => "",
        };
        let kind = self
            .datagram()
            .map_or_else(String::new, |bytes| format!("--udp --bitrate 0 --length {bytes}"));
        let streams = if streams > 1 { format!("--parallel {streams}") } else { String::new() };
        [way, &kind, &streams]
            .into_iter()
            .filter(|words| !words.is_empty())
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// How many packets these bytes and frames of a TAP interface are. The interface counts a
    /// segment of 64 KiB as one frame, and each contender has segments of other sizes; so a packet
    /// of TCP is as many bytes as a full frame has.
    pub fn packets(self, frames: u64, bytes: u64) -> u64 {
        if self.datagram().is_some() || self == Self::Ping { frames } else { bytes / FRAME }
    }
}

/// What one measurement found.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// The rate or the time, in [`Traffic::unit`].
    pub figure: f64,
    /// The interrupts of the NIC for each packet, as [`Traffic::packets`] counts them.
    pub interrupts_per_packet: f64,
    /// The doorbells that the driver has rung for each packet; none if the bus has no such device.
    pub doorbells_per_packet: Option<f64>,
}

/// Measures one kind of traffic over one NIC, for some seconds.
///
/// # Errors
/// iperf3 or ping fails.
pub fn measure(
    server: &Server,
    rig: &Rig,
    nic: &Nic,
    traffic: Traffic,
    seconds: u32,
    streams: u32,
) -> Result<Measured> {
    let guest = &rig.vm.guest;
    let before = (nic.interrupts(guest)?, nic.tap.passed()?, rig.doorbells(nic)?);
    let figure = if traffic == Traffic::Ping {
        nic::ping(guest, &nic.tap.host(), PINGS)?.median
    } else {
        let received = server
            .measure(guest, &nic.tap, seconds, &traffic.words(streams))
            .with_context(|| format!("{} over {}", traffic.name(), nic.interface))?;
        let mbps = received.mbps + received.back_mbps;
        traffic.datagram().map_or(mbps, |bytes| mbps * 1e6 / 8.0 / f64::from(bytes))
    };
    let (interrupts, passed) = (nic.interrupts(guest)? - before.0, nic.tap.passed()?);
    let packets =
        traffic.packets(passed.frames - before.1.frames, passed.bytes - before.1.bytes).max(1);
    let doorbells = rig.doorbells(nic)?.zip(before.2).map(|(now, before)| now - before);
    let per_packet = |count: u64| count as f64 / packets as f64;
    Ok(Measured {
        figure,
        interrupts_per_packet: per_packet(interrupts),
        doorbells_per_packet: doorbells.map(per_packet),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_above_one_is_ahead_and_a_packet_of_tcp_is_a_full_frame() {
        assert!(Traffic::TcpOut.ratio(3.0, 2.0) > 1.0 && Traffic::Ping.ratio(3.0, 2.0) < 1.0);
        assert_eq!(Traffic::TcpIn.packets(1, 65_536), 43);
        assert_eq!(Traffic::Udp64In.packets(5, 65_536), 5);
        assert_eq!(
            Traffic::Udp64In.words(4),
            "--reverse --udp --bitrate 0 --length 64 --parallel 4"
        );
        assert_eq!(Traffic::TcpOut.words(1), "");
    }
}
