// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Moves of a guest with devices that fail in the middle, while frames pass: the guest goes on
//! where it is, and whoever is left says why and leaves nothing behind.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::moved::{Buses, Driver, Streams, exchange, guest_up};
use super::snapshot::{MOVE, relocate, save};
use crate::guest::{Output, Running};
use crate::l1::L1;
use crate::l1_wire::MIB;
use crate::l2::L2;
use crate::report::Figures;

/// How long the sender may take to give up a receiver that takes nothing. It waits for 30 s.
const GIVES_UP: Duration = Duration::from_secs(180);
/// How often a device is unplugged while the machine is saved.
const RACES: u32 = 4;

/// A move that does not come to its end by itself: the streams write memory all the time, and the
/// sender waits until there is nothing left to send.
struct Endless<'a> {
    l1: &'a L1<'a>,
    receiver: Running,
    asking: Running,
}

impl<'a> Endless<'a> {
    fn start(l1: &'a L1<'a>, l2: &L2, buses: &Buses) -> Result<Self> {
        let (run, control) = (l1.run_dir(), l2.control_socket());
        let socket = format!("{run}/endless.moved");
        let devices = buses.words(1);
        let receiver = l1.guest.start(&format!(
            "echo $$ > {run}/receiver; exec {place}vbus-vmm restore --listen {socket} --serial \
             none {devices}",
            place = l1.guest_processor()
        ))?;
        l1.guest.ok(&format!("until [ -S {socket} ]; do sleep 0.05; done"))?;
        let before = rounds(l2);
        let asking = l1.guest.start(&format!(
            "exec vbus-vmm migrate --control {control} --to {socket} --rounds 1000000 \
             --down-time 0"
        ))?;
        let moves = Self { l1, receiver, asking };
        // The second round begins when the receiver has all of the memory.
        let until = std::time::Instant::now() + MOVE;
        while rounds(l2) < before + 2 {
            ensure!(moves.asking.runs(), "the move has ended: {:?}", moves.asking.said());
            ensure!(std::time::Instant::now() < until, "no second round");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(moves)
    }

    /// Sends a signal to the receiver.
    fn signal(&self, signal: &str) -> Result<()> {
        let pid = format!("{}/receiver", self.l1.run_dir());
        self.l1.guest.ok(&format!("kill -{signal} $(cat {pid})")).map(drop)
    }

    /// Waits until the command ends with an error that has `reason`.
    fn fails(&self, reason: &str) -> Result<()> {
        let end = self.asking.wait(GIVES_UP)?;
        ensure!(end.code == 1 && end.stderr.contains(reason), "not for {reason:?}: {end:?}");
        Ok(())
    }

    fn receiver_ends(&self) -> Result<Output> {
        self.receiver.wait(MOVE).context("the receiver does not end")
    }
}

/// How many rounds the guest's VMM has told of.
fn rounds(l2: &L2) -> usize {
    l2.vmm.said().1.matches("round ").count()
}

/// The receiver is killed, or takes nothing more; a device leaves while the machine is saved; the
/// sender is killed.
pub fn moves(l1: &L1, _: &mut Figures) -> Result<()> {
    let buses = Buses::start(l1, true)?;
    let l2 = buses.boot(Driver::Program)?;
    guest_up(&l2.guest, Driver::Program)?;
    let streams = Streams::start(l1, &l2.guest, 5210)?;
    streams.pass(l1, 0, MIB)?;

    let endless = Endless::start(l1, &l2, &buses)?;
    endless.signal("KILL")?;
    endless.fails("the receiver")?;
    endless.receiver_ends()?;
    streams.pass(l1, 0, MIB).context("after the receiver was killed")?;
    eprintln!("a receiver was killed");

    let endless = Endless::start(l1, &l2, &buses)?;
    endless.signal("STOP")?;
    endless.fails("the receiver takes nothing")?;
    streams.pass(l1, 0, MIB).context("after the receiver has stopped")?;
    endless.signal("CONT")?;
    let end = endless.receiver_ends()?;
    ensure!(end.code == 1, "a receiver whose sender has gone: {end:?}");
    eprintln!("a receiver stood still");

    // After all that the guest can still be moved, and neither stream has lost anything.
    let (l2, told) = relocate(l1, l2, &buses.spec(1))?;
    eprintln!("after moves that failed: {told}");
    streams.pass(l1, 1, MIB)?;
    let (l2, _) = relocate(l1, l2, &buses.spec(0))?;
    streams.pass(l1, 0, MIB)?;
    streams.end(l1, &l2.guest)?;
    race(l1, &l2, &buses)?;

    // The sender is killed. What it was is in a file.
    let file = format!("{}/saved", l1.run_dir());
    save(l1, &l2, &file, "")?;
    let _streams = Streams::start(l1, &l2.guest, 5220)?;
    let endless = Endless::start(l1, &l2, &buses)?;
    l2.kill()?;
    let end = endless.receiver_ends()?;
    let why = "cut off";
    ensure!(end.code == 1 && end.stderr.contains(why), "a killed sender: {end:?}");
    endless.asking.wait(MOVE)?;
    // The devices that the receiver had are free again.
    let l2 = buses.spec(1).restore(l1, &file)?.join()?;
    exchange(l1, &l2.guest)?;
    l2.power_off()
}

/// A device is unplugged while the machine is saved: one of both is refused, or the device leaves
/// before or after. The machine is whole in each case.
fn race(l1: &L1, l2: &L2, buses: &Buses) -> Result<()> {
    let control = l2.control_socket();
    let bus = buses.bus(0);
    let (mut refused, mut left) = (0, 0);
    for turn in 0..RACES {
        let name = format!("extra{turn}");
        bus.run(&format!("device add {name} --class venet --set backend=null --vmm {control}"))?;
        let is_there = format!("until vbus-guest list | grep -q {name}; do sleep 0.05; done");
        l2.guest.start(&is_there)?.ok(MOVE)?;
        let file = format!("{}/raced", l1.run_dir());
        let save = format!("exec vbus-vmm snapshot --control {control} {file}");
        let remove = format!("device remove {name} --vmm {control}");
        // Either may begin first.
        let (saving, removing) = if turn % 2 == 0 {
            let saving = l1.guest.start(&save)?;
            (saving, bus.spawn(&remove)?)
        } else {
            let removing = bus.spawn(&remove)?;
            (l1.guest.start(&save)?, removing)
        };
        let (saved, removed) = (saving.wait(MOVE)?, removing.wait(MOVE)?);
        match (saved.code, removed.code) {
            (0, 0) => {}
            (_, 0) if saved.stderr.contains("being plugged or unplugged") => left += 1,
            (0, _) if removed.stderr.contains("being saved or moved") => {
                refused += 1;
                bus.spawn(&remove)?.ok(MOVE).context("once the machine is saved")?;
            }
            _ => bail!("neither is done: {saved:?} {removed:?}"),
        }
        let there = l2.guest.ok("vbus-guest list")?;
        ensure!(!there.contains(&name), "{name} is still there:\n{there}");
    }
    eprintln!("{RACES} devices left during a save: {refused} had to wait, {left} kept it waiting");
    exchange(l1, &l2.guest).context("after devices have left")
}
