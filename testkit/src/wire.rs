// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One guest with two NICs on one switch. The second one is in a network namespace of its own, so
//! what the guest sends to itself goes over the wire, and both NICs send and receive. This needs no
//! root on the host.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::bus::{Bus, device};
use crate::guest::{Guest, Running};
use crate::lab::Scene;
use crate::linux::{self, IP};
use crate::nic;
use crate::pair::{ADDRESS, TRANSFER};
use crate::system::System;
use crate::vm::{Vm, VmSpec};

/// The names of the two NICs. They are behind root ports 0 and 1.
pub const NICS: [&str; 2] = ["net-a", "net-b"];

/// The beginning of a command in the namespace of the second NIC.
pub const FAR: &str = "/usr/local/bin/ip netns exec far ";

/// The port of the load, one way and the other.
const LOAD: [u16; 2] = [5000, 5001];

/// A guest with two NICs on one wire.
pub struct Wire {
    // Rust drops these in order: the guest, then the bus.
    /// The guest.
    pub vm: Vm,
    /// The bus that serves the NICs.
    pub bus: Bus,
}

/// Streams without an end, both ways.
pub struct Load {
    running: Vec<Running>,
}

impl Wire {
    /// Boots the guest. The module is not loaded yet. `settings` are more lines for each NIC in the
    /// bus's configuration; `change` changes the machine.
    ///
    /// # Errors
    /// The bus or the guest does not start.
    pub fn start(
        scene: &Scene,
        system: &System,
        settings: [&str; 2],
        change: impl FnOnce(VmSpec) -> VmSpec,
    ) -> Result<Self> {
        Self::start_with(scene, system, settings, &[], change)
    }

    /// As [`start`](Self::start), with NICs of another class.
    ///
    /// # Errors
    /// As of [`start`](Self::start).
    pub fn start_class(
        scene: &Scene,
        system: &System,
        class: &str,
        settings: [&str; 2],
        change: impl FnOnce(VmSpec) -> VmSpec,
    ) -> Result<Self> {
        Self::start_all(scene, system, class, settings, &[], change)
    }

    /// As [`start`](Self::start), with more devices of the bus: name, class and settings of each.
    /// They are behind the root ports from 2 on.
    ///
    /// # Errors
    /// As of [`start`](Self::start).
    pub fn start_with(
        scene: &Scene,
        system: &System,
        settings: [&str; 2],
        more: &[(&str, &str, &str)],
        change: impl FnOnce(VmSpec) -> VmSpec,
    ) -> Result<Self> {
        Self::start_all(scene, system, "venet", settings, more, change)
    }

    fn start_all(
        scene: &Scene,
        system: &System,
        class: &str,
        settings: [&str; 2],
        more: &[(&str, &str, &str)],
        change: impl FnOnce(VmSpec) -> VmSpec,
    ) -> Result<Self> {
        let one =
            |at: usize| device(NICS[at], class, &format!("backend = \"switch\"\n{}", settings[at]));
        let others = more.iter().map(|(name, class, settings)| device(name, class, settings));
        let bus = Bus::start(scene, &(one(0) + &one(1) + &others.collect::<String>()))?;
        let mut machine = VmSpec::new("a");
        for name in NICS.into_iter().chain(more.iter().map(|(name, ..)| *name)) {
            machine = machine.device(bus.socket(name));
        }
        machine.system = Some(system.clone());
        let vm = change(machine).boot(scene)?;
        Self::of(vm, bus)
    }

    /// The wire of a guest that has booted, whose NICs this bus serves.
    ///
    /// # Errors
    /// The guest has no namespaces.
    pub fn of(vm: Vm, bus: Bus) -> Result<Self> {
        let wire = Self { vm, bus };
        wire.add_namespace()?;
        Ok(wire)
    }

    fn add_namespace(&self) -> Result<()> {
        let add = format!("{IP} netns add far && {IP} -n far link set lo up");
        self.guest().ok(&add).map(drop)
    }

    /// Resets the guest, and waits until it has booted for the second time.
    ///
    /// # Errors
    /// It does not boot.
    pub fn reset(&mut self) -> Result<()> {
        self.vm.reset()?;
        self.vm.wait_boot(2)?;
        self.add_namespace()
    }

    /// The guest.
    pub fn guest(&self) -> &Guest {
        &self.vm.guest
    }

    /// Waits for the interfaces of both NICs, moves the second one into its namespace, and gives
    /// both their addresses.
    ///
    /// # Errors
    /// The driver makes no interface.
    pub fn up(&self) -> Result<()> {
        let guest = self.guest();
        let [near, far] = [linux::interface(guest, 0)?, linux::interface(guest, 1)?];
        self.up_near(&near)?;
        self.up_far(&far)
    }

    /// Moves the interface of the second NIC into its namespace, and gives it its address.
    ///
    /// # Errors
    /// There is no such interface.
    pub fn up_far(&self, interface: &str) -> Result<()> {
        self.guest().ok(&format!("{IP} link set {interface} netns far"))?;
        nic::set_up_in(self.guest(), FAR, interface, &format!("{}/24", ADDRESS[1]))
    }

    /// Gives the first NIC its address.
    ///
    /// # Errors
    /// There is no such interface.
    pub fn up_near(&self, interface: &str) -> Result<()> {
        nic::set_up(self.guest(), interface, &format!("{}/24", ADDRESS[0]))
    }

    /// Sends bytes from the first NIC to the second, and as many back. Both ends compare the hash.
    ///
    /// # Errors
    /// Bytes are lost or changed.
    pub fn exchange(&self, bytes: u64) -> Result<()> {
        self.exchange_between(ADDRESS, bytes)
    }

    /// The same between other addresses of the two ends.
    ///
    /// # Errors
    /// Bytes are lost or changed.
    pub fn exchange_between(&self, addresses: [&str; 2], bytes: u64) -> Result<()> {
        let [near, far] = addresses;
        for (port, receiver, sender, address) in [(6000, FAR, "", far), (6001, "", FAR, near)] {
            let guest = self.guest();
            let receives = guest.start(&format!("{receiver}guest-agent receive 0.0.0.0:{port}"))?;
            nic::wait_port_in(guest, receiver, port)?;
            let send = format!("{sender}guest-agent send {address}:{port} {bytes} {port}");
            let sent = guest.start(&send)?.ok(TRANSFER)?;
            let received = receives.ok(TRANSFER)?;
            ensure!(
                sent == received && sent.starts_with(&format!("{bytes} ")),
                "{bytes} bytes were to be sent: sent {}, received {}",
                sent.trim(),
                received.trim()
            );
        }
        Ok(())
    }

    /// The sum over the queues of a counter that `ethtool -S` has of the NIC behind root port
    /// `slot`: `tx_frames` stands for `tx0_frames`, `tx1_frames` and so on.
    ///
    /// # Errors
    /// There is no such counter.
    pub fn counter(&self, slot: usize, name: &str) -> Result<u64> {
        let place = if slot == 0 { "" } else { FAR };
        let (half, what) = name.split_once('_').context("the name has no _")?;
        let command = format!(
            "{place}sh -c 'ethtool -S $(ls {}/net)' | \
             awk '/ {half}[0-9]+_{what}:/{{n+=$2}} END{{print n}}'",
            linux::function(slot)
        );
        let count = self.guest().ok(&command)?;
        count.trim().parse().with_context(|| format!("no counter {name} of the NIC {slot}"))
    }

    /// Lets a program of XDP (`guest-agent xdp`) run on the first NIC while `act` does something.
    ///
    /// # Errors
    /// The program does not run, or those of `act`.
    pub fn with_program(&self, program: &str, act: impl FnOnce() -> Result<()>) -> Result<()> {
        let guest = self.guest();
        let near = linux::interface(guest, 0)?;
        let running = guest.start(&format!("exec guest-agent xdp {near} {program}"))?;
        running.wait_for("on", TRANSFER)?;
        act()?;
        running.kill()?;
        let gone = format!("while {IP} link show {near} | grep -q xdp; do sleep 0.05; done");
        guest.start(&gone)?.ok(TRANSFER).map(drop)
    }

    /// Pings the first NIC.
    ///
    /// # Errors
    /// No ping is answered.
    pub fn ping_near(&self) -> Result<()> {
        let ping = format!("{FAR}ping -c 3 -W 60 {}", ADDRESS[0]);
        self.guest().start(&ping)?.ok(TRANSFER).map(drop)
    }

    /// Pings the second NIC until an answer comes.
    ///
    /// # Errors
    /// None comes.
    pub fn ping(&self) -> Result<()> {
        let ping = format!(
            "for i in $(seq 60); do ping -c 1 -W 2 {} > /dev/null && exit 0; done; exit 1",
            ADDRESS[1]
        );
        self.guest().start(&ping)?.ok(TRANSFER).context("no ping is answered").map(drop)
    }

    /// Starts a stream each way, without an end.
    ///
    /// # Errors
    /// The guest does not take the commands.
    pub fn load(&self) -> Result<Load> {
        let guest = self.guest();
        let mut running = Vec::new();
        for (receiver, sender, address, port) in
            [(FAR, "", ADDRESS[1], LOAD[0]), ("", FAR, ADDRESS[0], LOAD[1])]
        {
            running.push(guest.start(&format!("{receiver}guest-agent receive 0.0.0.0:{port}"))?);
            nic::wait_port_in(guest, receiver, port)?;
            let send = format!("{sender}guest-agent send {address}:{port} 1000000000000 3");
            running.push(guest.start(&send)?);
        }
        Ok(Load { running })
    }

    /// Waits until this many more bytes have gone from each NIC to the other, as the bus counts
    /// them.
    ///
    /// # Errors
    /// They do not go.
    pub fn flow(&self, bytes: u64) -> Result<()> {
        let sent =
            || -> Result<Vec<u64>> { NICS.iter().map(|name| self.bus.sent_bytes(name)).collect() };
        let limit = self.guest().at_most(TRANSFER);
        let (before, began) = (sent()?, std::time::Instant::now());
        loop {
            let now = sent()?;
            if now.iter().zip(&before).all(|(now, before)| *now >= before + bytes) {
                return Ok(());
            }
            ensure!(
                began.elapsed() < limit,
                "{bytes} bytes do not go each way within {} s: {before:?} before, {now:?} now",
                limit.as_secs()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Load {
    /// Ends the streams.
    ///
    /// # Errors
    /// They do not end.
    pub fn end(self) -> Result<()> {
        for running in &self.running {
            running.kill()?;
        }
        for running in &self.running {
            running.wait(TRANSFER)?;
        }
        Ok(())
    }
}
