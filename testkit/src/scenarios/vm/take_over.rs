// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus is upgraded under guests at work (spec/take-over.md).

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::virtio::interface;
use crate::bus::{Bus, device};
use crate::guest::{Guest, Running};
use crate::lab::Scene;
use crate::linux;
use crate::nic;
use crate::pair::TRANSFER;
use crate::process::Process;
use crate::report::Skip;
use crate::tap::{self, Tap};
use crate::vm::{Vm, VmSpec};

/// Upgrades, if nobody says how many.
const TIMES: u32 = 6;

/// Frames that each NIC receives before the next upgrade.
const FRAMES: u64 = 200;

/// More settings of each NIC: a guest without processor time for a while loses nothing.
pub(super) const PATIENT: &str = "switch = \"lan\"\nbackpressure-ms = 60000\n";

/// The addresses of guests a and b: between their vbus NICs, and between a's virtio card and b.
pub(super) const A: [&str; 2] = ["10.0.0.1", "10.0.1.1"];
pub(super) const B: [&str; 2] = ["10.0.0.2", "10.0.1.2"];

/// The NICs whose frames are counted.
pub(super) const NICS: [&str; 3] = ["net-a", "virt-a", "net-b"];

/// The number of descriptors that a new bus may have which is to fail for want of them: enough to
/// start, and too few for what the devices of this scenario have.
const FEW_DESCRIPTORS: u32 = 40;

/// Guest a has a NIC by the Linux driver, a virtio card by the kernel's driver, and state pages.
/// Guest b has a NIC by `vbus-guest`, and one on a TAP interface of this host. The switch has a
/// stream as its way out. Numbered datagrams flow in both directions over all of them while the bus
/// is upgraded again and again, and while upgrades fail: none is lost, doubled or changed.
pub fn upgrades(scene: &Scene) -> Result<()> {
    let stream = scene.dir().join("stream");
    let tap = Tap::new(6);
    let with_tap = format!("backend = \"tap\"\ntap = \"{}\"\nbackpressure-ms = 60000", tap.name);
    let page = |name: &str, owner: &str| {
        format!("{{ name = \"{name}\", bytes = 64, owner = \"{owner}\" }}")
    };
    let pages = format!("pages = [{}, {}]", page("in", "device"), page("out", "driver"));
    let common = [
        device("net-a", "venet", PATIENT),
        device("virt-a", "virtio-net", PATIENT),
        device("net-b", "venet", PATIENT),
        device("values", "state", &pages),
        device(
            "up",
            "uplink",
            &format!("switch = \"lan\"\nbackend = \"stream\"\nlisten = \"{}\"", stream.display()),
        ),
    ]
    .concat();
    let with = common.clone() + &device("tap-b", "venet", &with_tap);
    let (mut bus, has_tap) = match tap::bus(scene, &with) {
        Ok(bus) => (bus, true),
        Err(error) if error.is::<Skip>() => {
            eprintln!("not tested: the hand-over of TAP queues: {error:#}");
            (Bus::start(scene, &common)?, false)
        }
        Err(error) => return Err(error),
    };
    let outside = Outside::connect(&stream)?;
    let (a, b) = boot(scene, &bus, has_tap)?;
    let (guest_a, guest_b) = (&a.guest, &b.guest);
    let drivers = up(guest_a, guest_b, &bus)?;
    let tap_driver = has_tap.then(|| up_tap(scene, guest_b, &tap)).transpose()?;
    let mut streams = Vec::new();
    for (port, (from, to, address)) in (6000..).zip([
        (guest_a, guest_b, B[0]),
        (guest_b, guest_a, A[0]),
        (guest_a, guest_b, B[1]),
        (guest_b, guest_a, A[1]),
    ]) {
        streams.push(Numbers::start(from, to, address, port)?);
    }
    let to_host = has_tap.then(|| ToHost::start(scene, guest_b, &tap)).transpose()?;

    let times = scene.lab.times().unwrap_or(TIMES);
    let mut pauses = Vec::new();
    for time in 1..=times {
        one_more(&bus, &streams, guest_a, &outside, time)?;
        pauses.push(bus.take_over().with_context(|| format!("upgrade {time}"))?);
    }
    one_more(&bus, &streams, guest_a, &outside, times + 1)?;
    fails(&mut bus)?;
    one_more(&bus, &streams, guest_a, &outside, times + 2)?;
    pauses.push(bus.take_over().context("an upgrade after one that failed")?);
    one_more(&bus, &streams, guest_a, &outside, times + 3)?;

    let mut frames = 0;
    for stream in streams {
        frames += stream.end()?;
    }
    let to_tap = to_host.map_or(Ok(0), ToHost::end)?;
    pauses.sort();
    eprintln!(
        "{} upgrades, {frames} datagrams between the guests and {to_tap} over TAP, each answered; \
         devices paused for {pauses:.1?}",
        pauses.len()
    );
    let stats = bus.stats()?;
    for device in stats.as_array().into_iter().flatten() {
        let name = device["name"].as_str().unwrap_or_default();
        ensure!(device["counters"]["broken"] == 0, "{name}: a connection has ended: {device}");
        ensure!(name != "net-a" || device["counters"]["opens"] == 1, "opened again: {device}");
    }
    linux::check_kernel(guest_a)?;
    for driver in drivers.iter().chain(&tap_driver) {
        ensure!(driver.runs(), "vbus-guest has ended: {:?}", driver.said());
        let (_, said) = driver.said();
        ensure!(!said.contains("again"), "vbus-guest has noticed: {said}");
    }
    a.power_off()?;
    b.power_off()
}

pub(super) fn boot(scene: &Scene, bus: &Bus, has_tap: bool) -> Result<(Vm, Vm)> {
    let mut a = VmSpec::new("a");
    for name in ["net-a", "virt-a", "values"] {
        a = a.device(bus.socket(name));
    }
    a.system = Some(linux::chosen_system(scene)?);
    let mut b = VmSpec::new("b").device(bus.socket("net-b"));
    if has_tap {
        b = b.device(bus.socket("tap-b"));
    }
    let (a, b) = (a.start(scene)?, b.start(scene)?);
    a.wait_boot(1)?;
    b.wait_boot(1)?;
    Ok((a, b))
}

/// Sets up what is on the switch. Returns the driver of guest b.
pub(super) fn up(a: &Guest, b: &Guest, bus: &Bus) -> Result<Vec<Running>> {
    linux::insert(a, "")?;
    let (vbus, virtio) = (linux::interface(a, 0)?, interface(a, 0)?);
    for (name, address) in [(&vbus, A[0]), (&virtio, A[1])] {
        nic::set_up(a, name, &format!("{address}/24"))?;
    }
    nic::prepare(b)?;
    let driver = nic::driver(b, "net-b", "vbus0", "")?;
    for address in B {
        nic::set_up(b, "vbus0", &format!("{address}/24"))?;
    }
    for address in B {
        nic::ping(a, address, 3)?;
    }
    bus.run(&["state", "set", "values", "in", "0"])?;
    a.ok("until [ -e /dev/vbus/values/out ]; do sleep 0.05; done")?;
    Ok(vec![driver])
}

/// Sets up the NIC on the TAP interface. Returns its driver.
fn up_tap(scene: &Scene, b: &Guest, tap: &Tap) -> Result<Running> {
    let driver = nic::driver(b, "tap-b", "vbus1", "")?;
    tap.up(scene)?;
    tap.up_in(b, "vbus1")?;
    nic::ping(b, &tap.host(), 3)?;
    Ok(driver)
}

/// Waits until everything has carried something more.
fn one_more(
    bus: &Bus,
    streams: &[Numbers],
    guest: &Guest,
    outside: &Outside,
    time: u32,
) -> Result<()> {
    let frames =
        || -> Result<Vec<u64>> { NICS.iter().map(|name| bus.received_frames(name)).collect() };
    let (before, seen, began) = (frames()?, outside.bytes(), Instant::now());
    loop {
        let now = frames()?;
        if now.iter().zip(&before).all(|(now, before)| *now >= before + FRAMES) {
            break;
        }
        for stream in streams {
            stream.check()?;
        }
        ensure!(
            began.elapsed() < TRANSFER,
            "before upgrade {time} frames do not flow: {before:?}, {now:?}"
        );
        thread::sleep(Duration::from_millis(20));
    }
    // A frame to all goes outside too.
    guest.ok(&format!("arping -q -c 1 -w 1 -I {} 10.0.0.99; true", linux::interface(guest, 0)?))?;
    outside.more_than(seen).with_context(|| format!("before upgrade {time}"))?;
    bus.run(&["state", "set", "values", "in", &format!("in-{time}-")])?;
    let said = guest.ok("vbus-guest state get in")?;
    ensure!(said == format!("in-{time}-\n"), "the guest sees {said:?}, not value {time}");
    guest.ok(&format!("vbus-guest state set out out-{time}-"))?;
    let said = bus.run(&["state", "get", "values", "out"])?;
    ensure!(said.contains(&format!("out-{time}-")), "the host sees {said:?}, not value {time}");
    Ok(())
}

/// Upgrades that fail: a new bus that is killed when the old one has stopped, and one that has too
/// few descriptors. The bus goes on.
fn fails(bus: &mut Bus) -> Result<()> {
    let before = bus.process.id();
    for _ in 0..2 {
        let seen = bus.log()?.len();
        killed_in_the_pause(&bus.dir().join("control.sock"))?;
        goes_on(bus, seen)?;
    }
    let seen = bus.log()?.len();
    let taker = bus.taker();
    let mut poor = Command::new("sh");
    poor.args(["-c", &format!("ulimit -n {FEW_DESCRIPTORS}; exec \"$@\""), "sh"]);
    poor.arg(taker.get_program()).args(taker.get_args());
    let output = poor.output().context("cannot run sh")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "it took over with {FEW_DESCRIPTORS} descriptors: {said}");
    goes_on(bus, seen).with_context(|| said)?;
    ensure!(bus.process.id() == before && bus.process.ended()?.is_none(), "the old bus has ended");
    Ok(())
}

/// Waits until the log says, after its first `seen` bytes, that the bus goes on.
fn goes_on(bus: &Bus, seen: usize) -> Result<()> {
    let began = Instant::now();
    loop {
        let log = bus.log()?;
        let news = log.get(seen..).unwrap_or_default();
        if news.contains("this bus goes on") {
            return Ok(());
        }
        ensure!(began.elapsed() < TRANSFER, "the bus does not say that it goes on: {news}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A new bus that ends as soon as the old one has stopped and sends its state
/// (spec/take-over.md, "Messages").
fn killed_in_the_pause(control: &Path) -> Result<()> {
    const HEAD: usize = 16;
    const OFFER: u8 = 1;
    const STATE: u8 = 3;
    const READY: &[u8; HEAD] = b"vbto\x02\0\0\0\0\0\0\0\0\0\0\0";
    /// Descriptors of a batch. Each batch after the first has a byte of its own.
    const BATCH: usize = 253;
    let mut socket = UnixStream::connect(control).context("cannot connect to the bus")?;
    socket.set_read_timeout(Some(TRANSFER))?;
    let ask = "{\"op\":\"take-over\",\"format\":2,\"state-format\":1,\"version\":\"killed\"}\n";
    socket.write_all(ask.as_bytes())?;
    let mut byte = [0];
    while byte != *b"\n" {
        socket.read_exact(&mut byte)?;
    }
    // Descriptors that nobody asks for are closed.
    let mut head = |kind: u8| -> Result<usize> {
        let mut head = [0; HEAD];
        socket.read_exact(&mut head)?;
        ensure!(head[..4] == *b"vbto" && head[4] == kind, "not message {kind}: {head:?}");
        let word = |at: usize| -> Result<usize> {
            Ok(usize::try_from(u32::from_le_bytes(head[at..at + 4].try_into()?))?)
        };
        Ok(word(8)? + word(12)?.div_ceil(BATCH).saturating_sub(1))
    };
    let rest = head(OFFER)?;
    socket.read_exact(&mut vec![0; rest])?;
    socket.write_all(READY)?;
    let mut first = [0; HEAD];
    socket.read_exact(&mut first)?;
    ensure!(first[4] == STATE, "the bus has not stopped: {first:?}");
    Ok(())
}

/// A stream of numbered datagrams from one guest to another.
pub(super) struct Numbers {
    pub(super) sender: Running,
    pub(super) receiver: Running,
}

impl Numbers {
    fn start(from: &Guest, to: &Guest, address: &str, port: u16) -> Result<Self> {
        Self::start_by(["send", "receive"], from, to, address, port)
    }

    /// As the commands `send` and `receive` of the agent's `numbers` do it.
    pub(super) fn start_by(
        [send, receive]: [&str; 2],
        from: &Guest,
        to: &Guest,
        address: &str,
        port: u16,
    ) -> Result<Self> {
        let receiver = to.start(&format!("exec guest-agent numbers {receive} {address}:{port}"))?;
        receiver.wait_for("ready", TRANSFER)?;
        let sender = from.start(&format!("exec guest-agent numbers {send} {address}:{port}"))?;
        Ok(Self { sender, receiver })
    }

    /// Both ends are at work.
    pub(super) fn check(&self) -> Result<()> {
        for end in [&self.sender, &self.receiver] {
            ensure!(end.runs(), "an end of a stream has ended: {:?}", end.said());
        }
        Ok(())
    }

    /// Ends the stream. Returns the number of its datagrams, of which both ends have the same hash.
    fn end(self) -> Result<u64> {
        self.sender.input(&[])?;
        let (sent, received) = (self.sender.ok(TRANSFER)?, self.receiver.ok(TRANSFER)?);
        same(&sent, received.trim_start_matches("ready\n"))
    }
}

fn same(sent: &str, received: &str) -> Result<u64> {
    let (sent, received) = (sent.trim(), received.trim());
    ensure!(sent == received, "sent {sent}, received {received}");
    let count = sent.split(' ').next().and_then(|count| count.parse().ok());
    count.with_context(|| format!("no number of datagrams: {sent}"))
}

/// The same from a guest to this host, over TAP.
struct ToHost {
    sender: Running,
    receiver: Process,
    lines: Receiver<String>,
}

impl ToHost {
    fn start(scene: &Scene, from: &Guest, tap: &Tap) -> Result<Self> {
        let address = format!("{}:6100", tap.host());
        let mut command = Command::new(scene.lab.agent());
        command.args(["numbers", "receive", &address]);
        let log = scene.dir().join("numbers.log");
        let (receiver, lines) = Process::start_with_lines(command, "the receiver", &log)?;
        ensure!(lines.recv_timeout(TRANSFER)? == "ready", receiver.complaint("is not ready"));
        let sender = from.start(&format!("exec guest-agent numbers send {address}"))?;
        Ok(Self { sender, receiver, lines })
    }

    fn end(self) -> Result<u64> {
        self.sender.input(&[])?;
        let sent = self.sender.ok(TRANSFER)?;
        let received = self.lines.recv_timeout(TRANSFER);
        let received = received.map_err(|_| self.receiver.complaint("has not received all"))?;
        same(&sent, &received)
    }
}

/// The other end of the uplink's stream. It has one connection from the beginning to the end.
struct Outside {
    bytes: Arc<AtomicU64>,
}

impl Outside {
    fn connect(path: &Path) -> Result<Self> {
        let mut stream = UnixStream::connect(path)
            .with_context(|| format!("cannot connect to the stream {}", path.display()))?;
        let bytes = Arc::<AtomicU64>::default();
        let count = Arc::clone(&bytes);
        thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut piece) {
                count.fetch_add(length as u64, Ordering::Relaxed);
            }
        });
        Ok(Self { bytes })
    }

    /// The bytes that have come so far.
    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Waits until more bytes have come than this.
    fn more_than(&self, bytes: u64) -> Result<()> {
        let began = Instant::now();
        while self.bytes() <= bytes {
            ensure!(began.elapsed() < TRANSFER, "no frame goes out over the stream any more");
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}
