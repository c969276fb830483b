// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Test `venet`: frames between two NICs of one switch, and frames from the back end `null`.

use vbus_driver::venet::{FRAME_MAX, HEADER_BYTES, Nic, Piece, Rx, Tx};
use vbus_driver::{Dma, Hal};
use vbus_shm::abi::class;
use vbus_shm::signal::Armed;

use flat::pci::Messages;

use crate::dma::Block;
use crate::hal::FlatHal;
use crate::report::{Failure, Outcome, ensure, line};
use crate::{Setting, apic, clock, traps};

const ENTRIES: u32 = 64;
const BUFFER: usize = 4096;
/// Bytes of a receive buffer.
pub const FRAME: usize = BUFFER;
/// Bytes of the largest frame of these tests, with its header.
const SLOT: usize = 2048;
const _: () = assert!(SLOT <= BUFFER && BUFFER <= FRAME_MAX);

/// After this time without an interrupt, in nanoseconds, the driver checks whether the device still
/// exists.
const TIMEOUT: u64 = 1_000_000_000;

/// EtherType for experiments.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
/// Bytes of an Ethernet header.
const FRONT: usize = 14;
const SIZES: [usize; 6] = [60, 64, 128, 777, 1500, 1514];

/// A NIC with one queue pair and its buffers.
pub struct Station {
    pub nic: Nic<FlatHal>,
    pub tx: Tx<FlatHal>,
    pub rx: Rx<FlatHal>,
    /// The device's vector for the queues.
    pub queues: u16,
    sending: Block,
    sent: usize,
    /// The number of doorbells that it has rung.
    pub rung: u64,
}

impl Station {
    /// Opens a NIC with its interrupts on `vector`. With MSI-X the queues and the status page have
    /// different messages.
    pub fn open<'a>(hal: &FlatHal, vector: u8) -> Result<Station, Failure<'a>> {
        let messages =
            hal.enable_messages(&[vector; 2]).ok_or(Failure::Said("the NIC has no messages"))?;
        let queues = u16::from(messages != Messages::Msi);
        let mut nic = Nic::open(hal.function()?, 0, 0)?;
        let (tx, mut rx) = nic.queue_pair(0, ENTRIES, BUFFER as u32, queues)?;
        let sending = hal.alloc(SLOT * ENTRIES as usize).map_err(vbus_driver::Error::from)?;
        for id in 0..ENTRIES as u16 {
            rx.give(id)?;
        }
        rx.post();
        nic.start()?;
        Ok(Station { nic, tx, rx, queues, sending, sent: 0, rung: 0 })
    }

    /// Waits for room, then sends a frame of `len` bytes.
    pub fn send<'a>(&mut self, to: [u8; 6], number: u64, len: usize) -> Outcome<'a> {
        let mut asked = clock::now();
        while self.tx.space() == 0 {
            if self.tx.reclaim()? == 0 && clock::now() - asked > TIMEOUT {
                // Check no more often, because a check costs an exit to user space, and the tests
                // count exits.
                self.nic.function().check()?;
                asked = clock::now();
            }
        }
        // There is a slot for each entry of the ring, so the last frame of this slot has been sent.
        let slot = self.sent % ENTRIES as usize * SLOT;
        self.sent += 1;
        let mut bytes = [0; SLOT];
        frame(&mut bytes[HEADER_BYTES..][..len], to, self.nic.config().mac, number);
        self.sending.copy_in(slot, &bytes[..HEADER_BYTES + len]);
        let piece = Piece { addr: self.sending.address(slot), len: (HEADER_BYTES + len) as u32 };
        ensure(self.tx.submit(&[piece])?, "no room in a ring that has some")?;
        self.rung += u64::from(self.tx.post());
        Ok(())
    }

    /// Copies the next frame to `out`. Returns its length; `None` if there is no frame.
    pub fn try_receive<'a>(
        &mut self,
        out: &mut [u8; BUFFER],
    ) -> Result<Option<usize>, Failure<'a>> {
        let Some(pieces) = self.rx.receive()? else { return Ok(None) };
        let [piece] = *pieces else { return Err(Failure::Said("a small frame in several pieces")) };
        let at = usize::from(piece.id) * BUFFER;
        let len = piece.len as usize;
        self.rx.buffers().copy_out(at, &mut out[..len]);
        out.copy_within(HEADER_BYTES..len, 0);
        self.rx.give(piece.id)?;
        self.rung += u64::from(self.rx.post());
        Ok(Some(len - HEADER_BYTES))
    }

    /// Sleeps until an interrupt brings a frame, and copies it to `out`. Returns its length.
    pub fn receive<'a>(&mut self, out: &mut [u8; BUFFER]) -> Result<usize, Failure<'a>> {
        loop {
            let before = traps::taken();
            if let Some(len) = self.try_receive(out)? {
                self.rx.disarm();
                return Ok(len);
            }
            if self.rx.arm(0) == Armed::Waiting {
                apic::wait(before);
                self.nic.function().check()?;
            }
        }
    }
}

impl Station {
    /// The low byte of the frame's number.
    pub fn number(frame: &[u8; FRAME]) -> u8 {
        frame[FRONT]
    }
}

/// Fills a frame. Its content depends on `number`.
pub fn frame(out: &mut [u8], to: [u8; 6], from: [u8; 6], number: u64) {
    let (front, rest) = out.split_at_mut(FRONT);
    front[..6].copy_from_slice(&to);
    front[6..12].copy_from_slice(&from);
    front[12..].copy_from_slice(&ETHERTYPE);
    for (i, byte) in rest.iter_mut().enumerate() {
        *byte = (i as u64).wrapping_mul(31).wrapping_add(number) as u8;
    }
}

/// Runs the two parts whose devices exist.
pub fn run<'a>(setting: &Setting<'a>) -> Outcome<'a> {
    let count = setting.number("count", 2000);
    let mut nics = setting.on_switch();
    let (a, b) = (nics.next(), nics.next());
    let mut ran = false;
    if let (Some(a), Some(b)) = (a, b) {
        between(&a, &b, count)?;
        ran = true;
    }
    for hal in setting.of_class(class::VENET).filter(|hal| !is_on_switch(hal)) {
        from_source(&hal, count)?;
        ran = true;
    }
    ensure(ran, "neither two NICs on a switch nor one whose back end is a source")
}

/// A NIC whose name begins with `source` has the back end `null` with `source-bytes`.
pub fn is_on_switch(hal: &FlatHal) -> bool {
    hal.function().is_ok_and(|function| !function.info().name.as_str().starts_with("source"))
}

/// Sends frames of all sizes to and fro, and checks each one.
fn between<'a>(a: &FlatHal, b: &FlatHal, count: u64) -> Outcome<'a> {
    let first = apic::next_vector();
    let (mut a, mut b) = (Station::open(a, apic::vector())?, Station::open(b, apic::vector())?);
    let (mut got, mut expected) = ([0; BUFFER], [0; SLOT]);
    let (began, before) = (clock::now(), traps::taken());
    for number in 0..count {
        let len = SIZES[(number % SIZES.len() as u64) as usize];
        let (from, to) = if number % 2 == 0 { (&mut a, &mut b) } else { (&mut b, &mut a) };
        let (from_mac, to_mac) = (from.nic.config().mac, to.nic.config().mac);
        from.send(to_mac, number, len)?;
        let received = to.receive(&mut got)?;
        frame(&mut expected[..len], to_mac, from_mac, number);
        ensure(got[..received] == expected[..len], "a frame has arrived with other content")?;
    }
    line("venet")
        .value("ok", true)
        .text("back-end", "switch")
        .value("frames", count)
        .value("doorbells", a.rung + b.rung)
        .value("interrupts", traps::taken() - before)
        .value("us", (clock::now() - began) / 1000)
        .end();
    for station in [a, b] {
        station.nic.close();
    }
    apic::reuse(first);
    Ok(())
}

/// Receives frames from a source that sends one whenever there is a buffer.
fn from_source<'a>(hal: &FlatHal, count: u64) -> Outcome<'a> {
    let first = apic::next_vector();
    let mut station = Station::open(hal, apic::vector())?;
    let mac = station.nic.config().mac;
    let mut got = [0; BUFFER];
    let before = traps::taken();
    for _ in 0..count {
        let len = station.receive(&mut got)?;
        let right = len >= FRONT && got[..6] == mac && got[12..FRONT] == ETHERTYPE;
        ensure(right, "a frame of the source has wrong content")?;
    }
    line("venet")
        .value("ok", true)
        .text("back-end", "null")
        .value("frames", count)
        .value("doorbells", station.rung)
        .value("interrupts", traps::taken() - before)
        .end();
    station.nic.close();
    apic::reuse(first);
    Ok(())
}
