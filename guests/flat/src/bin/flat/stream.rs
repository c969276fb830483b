// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames from one NIC to others, and the sleep between them.

use vbus_shm::signal::Armed;

use crate::net::{FRAME, Station};
use crate::report::{Failure, Outcome, ensure};
use crate::{apic, traps};

/// The most receivers.
pub const RECEIVERS_MAX: usize = 16;
const BROADCAST: [u8; 6] = [0xff; 6];

/// How fast frames follow one another.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Rate {
    /// Each frame goes to one receiver, by turns, when the last frame has arrived.
    Trickle,
    /// Each frame goes to all receivers, when the last frame has arrived everywhere.
    Burst,
    /// Each frame goes to all receivers, with [`AHEAD`] frames in flight.
    Full,
}

/// Frames in flight at full rate: a quarter of the rings' entries.
const AHEAD: u64 = 16;

impl Rate {
    /// Parses the name of a rate.
    pub fn new<'a>(name: &str) -> Result<Rate, Failure<'a>> {
        let rate =
            [Rate::Trickle, Rate::Burst, Rate::Full].into_iter().find(|rate| rate.name() == name);
        rate.ok_or(Failure::Said("rate= must be trickle, burst or full"))
    }

    fn name(self) -> &'static str {
        match self {
            Rate::Trickle => "trickle",
            Rate::Burst => "burst",
            Rate::Full => "full",
        }
    }

    fn window(self) -> u64 {
        if self == Rate::Full { AHEAD } else { 1 }
    }

    /// How many of the first `frames` frames go to receiver `number` of `receivers`.
    fn due(self, frames: u64, number: u64, receivers: u64) -> u64 {
        if self == Rate::Trickle { (frames + receivers - 1 - number) / receivers } else { frames }
    }
}

/// Frames from one NIC to others.
pub struct Stream {
    rate: Rate,
    receivers: u64,
    /// Frames sent.
    sent: u64,
    /// Frames that each receiver has got.
    got: [u64; RECEIVERS_MAX],
    /// The sum of the results of `drain`.
    pub drained: u64,
}

impl Stream {
    /// Makes a stream before its first frame.
    pub fn new(rate: Rate, receivers: u64) -> Stream {
        Stream { rate, receivers, sent: 0, got: [0; RECEIVERS_MAX], drained: 0 }
    }

    /// Sends `count` frames and waits until all receivers have got theirs. After each interrupt,
    /// calls `drain` before it checks for frames.
    pub fn carry<'a>(
        &mut self,
        count: u64,
        sender: &mut Station,
        stations: &mut [Option<Station>],
        drain: &mut impl FnMut() -> u64,
    ) -> Outcome<'a> {
        let end = self.sent + count;
        loop {
            while self.sent < end && self.under_way() < self.rate.window() {
                let to = match self.rate {
                    Rate::Trickle => stations.get((self.sent % self.receivers) as usize),
                    _ => None,
                };
                let to = to
                    .and_then(Option::as_ref)
                    .map_or(BROADCAST, |station| station.nic.config().mac);
                sender.send(to, self.sent, 60)?;
                self.sent += 1;
            }
            let before = traps::taken();
            self.drained += drain();
            let mut missed = false;
            for (number, station) in stations.iter_mut().flatten().enumerate() {
                missed |= self.receive(number, station)?;
            }
            match self.under_way() {
                0 if self.sent == end => return Ok(()),
                // There is a frame to send, or perhaps a frame has arrived meanwhile.
                n if n < self.rate.window() && self.sent < end => {}
                _ if missed => {}
                _ => apic::wait(before),
            }
        }
    }

    /// The number of frames that have not arrived everywhere.
    fn under_way(&self) -> u64 {
        let missing =
            |(number, got): (u64, &u64)| self.rate.due(self.sent, number, self.receivers) - got;
        (0..self.receivers).zip(&self.got).map(missing).max().unwrap_or(0)
    }

    /// Takes the frames of receiver `number`. If the receiver waits for more, asks for an
    /// interrupt. Returns whether that was too late.
    fn receive<'a>(&mut self, number: usize, station: &mut Station) -> Result<bool, Failure<'a>> {
        let due = self.rate.due(self.sent, number as u64, self.receivers);
        let mut frame = [0; FRAME];
        while self.got[number] < due {
            if station.try_receive(&mut frame)?.is_none() {
                return Ok(station.rx.arm(0) != Armed::Waiting);
            }
            // No frame is lost, and none comes twice.
            let expected = match self.rate {
                Rate::Trickle => self.got[number] * self.receivers + number as u64,
                _ => self.got[number],
            };
            ensure(Station::number(&frame) == expected as u8, "a frame is missing")?;
            self.got[number] += 1;
        }
        Ok(false)
    }
}
