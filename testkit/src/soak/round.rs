// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A round of the soak: devices come, guests use them, something happens to one of them in the
//! middle of its traffic, and all go again.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fastrand::Rng;
use rustix::process::Signal;
use serde::Serialize;

use crate::bus::Bus;
use crate::guest::{Guest, Running};
use crate::lab::Scene;
use crate::nic::{self, Nic};
use crate::pair::TRANSFER;
use crate::process_guest::ProcessGuest;
use crate::vm::{Vm, VmSpec};

const MIB: u64 = 1 << 20;

/// What has come, gone and happened in all rounds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Happened {
    /// Guests of processes that were started.
    pub process_guests: u64,
    /// Virtual machines that were started.
    pub machines: u64,
    /// Guests that were killed in the middle of their traffic.
    pub guests_killed: u64,
    /// Drivers that were killed in the middle of their traffic.
    pub drivers_killed: u64,
    /// Guests that stood still for a time in the middle of their traffic.
    pub frozen: u64,
    /// Devices that were taken off the bus by force, under traffic.
    pub forced: u64,
    /// Drivers whose shared memory was overwritten at random.
    pub scribbled: u64,
    /// Devices that got another incarnation under traffic.
    pub reincarnated: u64,
    /// Virtual machines that were reset in the middle of their traffic.
    pub reset: u64,
    /// Devices that were unplugged from a virtual machine under traffic, and plugged again.
    pub unplugged: u64,
    /// Devices that were added.
    pub devices: u64,
    /// Streams whose two hashes were compared.
    pub streams: u64,
    /// Bytes of these streams.
    pub bytes: u64,
    /// Values that passed a state page.
    pub values: u64,
}

/// The run was told to stop.
#[derive(Debug)]
pub struct Stopped;

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("stopped")
    }
}

impl std::error::Error for Stopped {}

/// What a round needs.
pub struct Round<'a> {
    /// Where sockets and logs are.
    pub scene: &'a Scene<'a>,
    /// The bus.
    pub bus: &'a Bus,
    /// All choices come from here.
    pub rng: &'a mut Rng,
    /// What has happened so far.
    pub happened: &'a mut Happened,
    /// The devices that the log may warn of, because their clients are killed or do wrong.
    pub rough: &'a mut BTreeSet<String>,
    /// The number of the round.
    pub number: u64,
    /// Whether one of the guests is a virtual machine.
    pub machine: bool,
    /// Whether the run is to stop.
    pub stop: &'a dyn Fn() -> bool,
    /// Called in the middle of the traffic.
    pub busy: &'a mut dyn FnMut() -> Result<()>,
}

/// What happens to a guest in the middle of its traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Nothing,
    Killed,
    DriverKilled,
    Frozen,
    Removed,
    Scribbled,
    Reincarnated,
    Reset,
    Unplugged,
}

const FATES: [Fate; 7] = [
    Fate::Nothing,
    Fate::Killed,
    Fate::DriverKilled,
    Fate::Frozen,
    Fate::Removed,
    Fate::Scribbled,
    Fate::Reincarnated,
];

/// QEMU does not let go of a device whose server went by force, so it is unplugged in order here.
/// `vm::hostile_guest` overwrites the memory of a driver in a virtual machine.
const MACHINE_FATES: [Fate; 6] =
    [Fate::Nothing, Fate::Killed, Fate::DriverKilled, Fate::Frozen, Fate::Reset, Fate::Unplugged];

/// A guest, with or without a virtual machine.
enum Machine {
    Process(ProcessGuest),
    Virtual(Box<Vm>),
}

/// One end of a pair: a device, and the guest that drives it.
struct End {
    device: String,
    /// The device has it whenever it is added: others still know the address by it.
    mac: String,
    address: String,
    options: String,
    // The driver's handle is dropped before the guest.
    nic: Option<Nic>,
    machine: Option<Machine>,
}

impl End {
    fn guest(&self) -> Result<&Guest> {
        match &self.machine {
            Some(Machine::Process(process)) => Ok(&process.guest),
            Some(Machine::Virtual(vm)) => Ok(&vm.guest),
            None => bail!("the guest of {} is dead", self.device),
        }
    }

    /// Starts the driver.
    fn drive(&mut self) -> Result<()> {
        let address = format!("{}/24", self.address);
        let nic = Nic::up(self.guest()?, &self.device, "vbus0", &address, &self.options)?;
        self.nic = Some(nic);
        Ok(())
    }

    /// Kills the driver, if it still runs, and waits until its interface has gone.
    fn kill_driver(&mut self) -> Result<()> {
        if let Some(nic) = self.nic.take() {
            nic.driver.kill()?;
            nic.driver.wait(TRANSFER)?;
        }
        self.guest()?.ok("until [ ! -e /sys/class/net/vbus0 ]; do sleep 0.01; done").map(drop)
    }
}

/// A stream that runs.
struct Stream {
    sender: Running,
    receiver: Running,
    bytes: u64,
}

impl Stream {
    fn begin(from: &End, to: &End, port: u16, bytes: u64, seed: u64) -> Result<Self> {
        let receiver = to.guest()?.start(&format!("guest-agent receive 0.0.0.0:{port}"))?;
        nic::wait_port(to.guest()?, port)?;
        let send = format!("guest-agent send {}:{port} {bytes} {seed}", to.address);
        Ok(Self { sender: from.guest()?.start(&send)?, receiver, bytes })
    }

    /// Waits for the end. Both hashes must be the same.
    fn verify(self, happened: &mut Happened) -> Result<()> {
        let sent = self.sender.ok(TRANSFER)?;
        let received = self.receiver.ok(TRANSFER)?;
        ensure!(
            sent == received && sent.starts_with(&format!("{} ", self.bytes)),
            "of {} bytes the sender says {}, the receiver {}",
            self.bytes,
            sent.trim(),
            received.trim()
        );
        happened.streams += 1;
        happened.bytes += self.bytes;
        Ok(())
    }

    /// Ends both ends, as far as their guests are there.
    fn abandon(self) {
        let _ = self.sender.kill();
        let _ = self.receiver.kill();
    }
}

impl Round<'_> {
    /// Runs the round. When it returns, its devices and guests are gone.
    ///
    /// # Errors
    /// Something is not as it must be; or [`Stopped`].
    pub fn run(mut self) -> Result<()> {
        let others = 1 + usize::from(!self.machine && self.rng.bool());
        let state = self.value()?;
        let mut pairs = Vec::new();
        for number in 0..others {
            pairs.push(self.pair(number)?);
        }
        let mut streams = Vec::new();
        for pair in &pairs {
            streams.push(self.streams(pair)?);
        }
        for (number, (pair, streams)) in pairs.iter_mut().zip(streams).enumerate() {
            self.go_on()?;
            self.meet(pair, streams).with_context(|| format!("pair {number}"))?;
        }
        for mut pair in pairs {
            self.go_on()?;
            self.part(&mut pair)?;
        }
        self.bus.run(&["device", "remove", &state])?;
        Ok(())
    }

    fn go_on(&self) -> Result<()> {
        if (self.stop)() { Err(Stopped.into()) } else { Ok(()) }
    }

    fn add(&mut self, name: &str, class: &str, settings: &[&str], more: &[&str]) -> Result<()> {
        let mut words = vec!["device", "add", name, "--class", class];
        settings.iter().for_each(|setting| words.extend(["--set", *setting]));
        words.extend(more);
        self.bus.run(&words)?;
        self.happened.devices += 1;
        Ok(())
    }

    fn add_nic(&mut self, end: &End, more: &[&str]) -> Result<()> {
        let pairs = format!("queue-pairs={}", self.rng.u32(1..=2));
        let mac = format!("mac={}", end.mac);
        self.add(&end.device, "venet", &["backend=switch", &mac, &pairs], more)
    }

    /// Adds a device of class `state` and passes a value through it each way. Returns its name.
    fn value(&mut self) -> Result<String> {
        let name = format!("r{}-state", self.number);
        let pages = "pages=[{ name = \"down\", bytes = 64, owner = \"device\" }, { name = \"up\", \
                     bytes = 64, owner = \"driver\" }]";
        self.add(&name, "state", &[pages], &[])?;
        let guest = ProcessGuest::start(self.scene, "state")?;
        self.happened.process_guests += 1;
        let (down, up) = (self.rng.u64(..).to_string(), self.rng.u64(..).to_string());
        self.bus.run(&["state", "set", &name, "down", &down])?;
        let state = format!("vbus-guest --socket {} state", self.bus.socket(&name).display());
        let got = guest.guest.ok(&format!("{state} get down"))?;
        ensure!(got.trim() == down, "the page down has {got:?} for {down:?}");
        guest.guest.ok(&format!("{state} set up {up}"))?;
        let got = self.bus.run(&["state", "get", &name, "up"])?;
        ensure!(got.trim() == up, "the page up has {got:?} for {up:?}");
        self.happened.values += 2;
        Ok(name)
    }

    /// Makes two devices and two guests, with a driver in each.
    fn pair(&mut self, number: usize) -> Result<[End; 2]> {
        let net = self.number * 2 + number as u64;
        let mut ends = Vec::new();
        for (at, side) in ["a", "b"].into_iter().enumerate() {
            self.go_on()?;
            let device = format!("r{}-{number}{side}", self.number);
            let mut end = End {
                mac: format!("02:50:00:{:02x}:{:02x}:{:02x}", net >> 8 & 0xff, net & 0xff, at + 1),
                address: format!("10.{}.{}.{}", net >> 8 & 0xff, net & 0xff, at + 1),
                options: String::new(),
                device,
                nic: None,
                machine: None,
            };
            self.add_nic(&end, &[])?;
            if self.machine && number == 0 && at == 0 {
                self.boot(&mut end)?;
            } else {
                self.start(&mut end)?;
            }
            end.drive()?;
            ends.push(end);
        }
        ends.try_into().ok().context("a pair has two ends")
    }

    /// Starts a guest of processes at an end.
    fn start(&mut self, end: &mut End) -> Result<()> {
        let process = ProcessGuest::start(self.scene, &end.device)?;
        self.happened.process_guests += 1;
        end.options = format!("--socket {}", self.bus.socket(&end.device).display());
        end.machine = Some(Machine::Process(process));
        Ok(())
    }

    /// Boots a virtual machine at an end.
    fn boot(&mut self, end: &mut End) -> Result<()> {
        let mut spec = VmSpec::new("machine").device(self.bus.socket(&end.device));
        spec.memory_mib = 256;
        let vm = spec.boot(self.scene)?;
        self.happened.machines += 1;
        nic::prepare(&vm.guest)?;
        end.machine = Some(Machine::Virtual(Box::new(vm)));
        Ok(())
    }

    /// Begins a stream each way.
    fn streams(&mut self, [a, b]: &[End; 2]) -> Result<[Stream; 2]> {
        let most = if self.machine { 16 } else { 96 };
        let mut bytes = || self.rng.u64(4 * MIB..most * MIB);
        let (there, back) = (bytes(), bytes());
        Ok([
            Stream::begin(a, b, 5000, there, self.rng.u64(..))?,
            Stream::begin(b, a, 5001, back, self.rng.u64(..))?,
        ])
    }

    /// Lets an end of a pair meet its fate, and afterwards use its device again.
    fn meet(&mut self, pair: &mut [End; 2], streams: [Stream; 2]) -> Result<()> {
        let at = if self.machine { 0 } else { usize::from(self.rng.bool()) };
        let fates: &[Fate] = if self.machine { &MACHINE_FATES } else { &FATES };
        let fate = fates[self.rng.usize(0..fates.len())];
        std::thread::sleep(Duration::from_millis(self.rng.u64(50..600)));
        (self.busy)()?;
        self.befall(fate, pair, at, streams)
            .with_context(|| format!("{fate:?}: {}", pair[at].device))
    }

    fn befall(
        &mut self,
        fate: Fate,
        pair: &mut [End; 2],
        at: usize,
        streams: [Stream; 2],
    ) -> Result<()> {
        if matches!(fate, Fate::Nothing | Fate::Frozen | Fate::Reincarnated) {
            match fate {
                Fate::Frozen => self.freeze(&pair[at])?,
                Fate::Reincarnated => {
                    self.bus.run(&["device", "reincarnate", &pair[at].device])?;
                    self.happened.reincarnated += 1;
                }
                _ => {}
            }
            return streams.into_iter().try_for_each(|stream| stream.verify(self.happened));
        }
        self.rough.insert(pair[at].device.clone());
        let end = &mut pair[at];
        match fate {
            Fate::Killed => {
                self.kill(end)?;
                // The bus has noticed when the next guest can take the device.
                if self.machine { self.boot(end)? } else { self.start(end)? }
            }
            Fate::DriverKilled => {
                end.kill_driver()?;
                self.happened.drivers_killed += 1;
            }
            Fate::Removed => {
                self.bus.run(&["device", "remove", &end.device, "--force"])?;
                self.happened.forced += 1;
                end.kill_driver()?;
                self.add_nic(end, &[])?;
            }
            Fate::Scribbled => {
                let seed = self.rng.u32(..);
                // The driver may notice and end.
                end.guest()?.run(&format!(
                    "guest-agent scribble $(pidof vbus-guest) 20000 {seed} memory"
                ))?;
                self.happened.scribbled += 1;
                end.kill_driver()?;
            }
            Fate::Reset => {
                let Some(Machine::Virtual(vm)) = &mut end.machine else { return Ok(()) };
                vm.reset()?;
                end.nic = None;
                vm.wait_boot(2)?;
                nic::prepare(&vm.guest)?;
                self.happened.reset += 1;
            }
            Fate::Unplugged => self.replug(end)?,
            Fate::Nothing | Fate::Frozen | Fate::Reincarnated => {}
        }
        streams.into_iter().for_each(Stream::abandon);
        self.go_on()?;
        end.drive()?;
        let [a, b] = &*pair;
        // The ports of the abandoned streams may still be in use.
        Stream::begin(a, b, 5002, 2 * MIB, 1)?.verify(self.happened)?;
        Stream::begin(b, a, 5003, 2 * MIB, 2)?.verify(self.happened)
    }

    /// The guest stands still for a time, and goes on.
    fn freeze(&mut self, end: &End) -> Result<()> {
        let time = Duration::from_millis(self.rng.u64(500..4000));
        match &end.machine {
            Some(Machine::Virtual(vm)) => {
                vm.process.signal(Signal::STOP)?;
                std::thread::sleep(time);
                vm.process.signal(Signal::CONT)?;
            }
            _ => {
                end.guest()?.ok("kill -STOP $(pidof vbus-guest)")?;
                std::thread::sleep(time);
                end.guest()?.ok("kill -CONT $(pidof vbus-guest)")?;
            }
        }
        self.happened.frozen += 1;
        Ok(())
    }

    /// Kills the guest.
    fn kill(&mut self, end: &mut End) -> Result<()> {
        end.nic = None;
        match end.machine.take() {
            Some(Machine::Process(mut process)) => process.kill()?,
            Some(Machine::Virtual(mut vm)) => vm.process.kill()?,
            None => {}
        }
        self.happened.guests_killed += 1;
        Ok(())
    }

    /// Unplugs the device from its virtual machine, takes it off the bus, and plugs another one of
    /// the same name.
    fn replug(&mut self, end: &mut End) -> Result<()> {
        let Some(Machine::Virtual(vm)) = &mut end.machine else { return Ok(()) };
        let qmp = vm.qmp_socket().display().to_string();
        vm.unplug("dev0")?;
        if let Some(nic) = end.nic.take() {
            nic.driver.wait(TRANSFER)?;
        }
        self.bus.run(&["device", "remove", &end.device])?;
        self.add_nic(end, &["--qmp", &qmp])?;
        let listed = format!("vbus-guest list | grep -q {}", end.device);
        end.guest()?.ok(&format!("until {listed}; do sleep 0.02; done"))?;
        self.happened.unplugged += 1;
        Ok(())
    }

    /// The guests of a pair go, in order or by force, and their devices after them.
    fn part(&mut self, pair: &mut [End; 2]) -> Result<()> {
        for end in pair {
            let in_order = self.rng.bool();
            if in_order {
                if let Some(nic) = end.nic.take() {
                    end.guest()?.ok("kill $(pidof vbus-guest)")?;
                    nic.driver.ok(TRANSFER)?;
                }
            } else {
                self.rough.insert(end.device.clone());
            }
            match end.machine.take() {
                Some(Machine::Virtual(vm)) if in_order => vm.power_off()?,
                machine => drop(machine),
            }
            end.nic = None;
            // Without --force the device goes only after its client. The bus hears of the death
            // of a client at its next look at the socket.
            let mut tries = 0;
            while let Err(error) = self.bus.run(&["device", "remove", &end.device]) {
                tries += 1;
                ensure!(tries < 500, "{error:#}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }
}
