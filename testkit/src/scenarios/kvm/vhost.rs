// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A virtio card whose frames the kernel carries: vhost-net in L1, under `vbus-vmm`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::bus::device;
use crate::guest::{Guest, Running};
use crate::l1::L1;
use crate::l1_wire::{EXCHANGE, MIB, TRANSFER};
use crate::l2::{L1Bus, L2, L2Spec};
use crate::nic;
use crate::report::{Figures, Skip};

/// The interface of L1 at the other end of the card.
const TAP: &str = "vbus-fast";
/// The addresses of L1 and of L2.
const OUTER: &str = "10.0.8.254";
const INNER: &str = "10.0.8.1";

/// What passes each way while the bus is watched. An emulated machine carries some 10 MiB a second.
const WATCHED: u64 = 32 * MIB;

/// How often a thread of the bus may wake in that time, whatever it does: for the log, and for what
/// the programs of the test do to the process.
const WAKES_MAX: u64 = 20;

/// The bus, its card and the guest that drives it.
struct Wire<'a> {
    l1: &'a L1<'a>,
    bus: &'a L1Bus<'a>,
    l2: &'a L2<'a>,
}

/// After the set-up the bus has no part in a frame. Then the queues move between the kernel and the
/// bus under load, and the card is unplugged under load.
pub fn carries(l1: &L1, figures: &mut Figures) -> Result<()> {
    if l1.guest.run("test -c /dev/vhost-net && test -c /dev/net/tun")?.code != 0 {
        return Err(Skip("L1 has no /dev/vhost-net or no /dev/net/tun".into()).into());
    }
    let settings =
        format!("backend = \"tap\"\ntap = \"{TAP}\"\nmsix = true\nvhost = true\nqueue-pairs = 2");
    let bus = L1Bus::start(l1, &device("card", "virtio-net", &settings))?;
    nic::set_up(&l1.guest, TAP, &format!("{OUTER}/24"))?;
    let spec = L2Spec { cpus: 2, ..L2Spec::new("linux") };
    let l2 = spec.device("card", &bus.socket("card")).boot(l1)?;
    let wire = Wire { l1, bus: &bus, l2: &l2 };
    wire.guest_up()?;
    wire.expect(true)?;
    wire.bus_is_idle(figures)?;
    wire.moves_under_load()?;
    wire.unplug_under_load()?;
    l2.power_off()
}

impl Wire<'_> {
    /// Sets the guest's interface up.
    fn guest_up(&self) -> Result<()> {
        let find = "until ls /sys/bus/virtio/devices/*/net 2>/dev/null; do sleep 0.05; done";
        let interface = self.l2.guest.start(find)?.ok(TRANSFER)?;
        nic::set_up(&self.l2.guest, interface.trim(), &format!("{INNER}/24"))?;
        nic::ping(&self.l2.guest, OUTER, 3).map(drop)
    }

    fn stats(&self) -> Result<Value> {
        let stats: Value = serde_json::from_str(&self.bus.run("stats --json")?)?;
        let card = stats.as_array().into_iter().flatten().find(|device| device["name"] == "card");
        card.cloned().context("vbus stats does not know the card")
    }

    /// The kernel carries the frames, or the bus does, and `vbus stats` says so.
    fn expect(&self, in_kernel: bool) -> Result<()> {
        let stats = self.stats()?;
        let backend = &stats["device"]["backend"];
        ensure!(
            backend["vhost"] == in_kernel,
            "the kernel carries the frames: {backend}; the bus says:\n{}",
            self.bus.said().1
        );
        Ok(())
    }

    /// Changes the setting `vhost`.
    fn set(&self, vhost: bool) -> Result<()> {
        let file = format!("{}/bus.toml", self.l1.run_dir());
        self.l1.guest.ok(&format!("sed -i 's/^vhost = .*/vhost = {vhost}/' {file}"))?;
        self.bus.run("reload").map(drop)
    }

    fn transfer(&self, bytes: u64) -> Result<()> {
        let (inner, outer) = (&self.l2.guest, &self.l1.guest);
        nic::transfer(inner, outer, OUTER, 5101, bytes, 1, TRANSFER)?;
        nic::transfer(outer, inner, INNER, 5102, bytes, 2, TRANSFER)
    }

    /// What each thread of the bus's process has done so far: processor time in ticks, and
    /// wake-ups. The kernel's own threads there, those of vhost-net, run no code of the bus and are
    /// left out.
    fn bus_threads(&self) -> Result<BTreeMap<u64, [u64; 2]>> {
        let each = "for p in $(pidof vbus); do grep -q serve /proc/$p/cmdline || continue; \
                    for t in /proc/$p/task/*; do case $(cat $t/comm) in vhost-*) continue;; esac; \
                    echo ${t##*/} $(sed 's/.*) //' $t/stat | cut -d' ' -f12,13) \
                    $(sed -n 's/^voluntary_ctxt_switches://p' $t/status); done; done";
        let text = self.l1.guest.ok(each)?;
        let threads = text.lines().filter_map(|line| {
            let numbers: Vec<u64> =
                line.split_whitespace().filter_map(|w| w.parse().ok()).collect();
            let [thread, user, system, wakes] = numbers[..] else { return None };
            Some((thread, [user + system, wakes]))
        });
        let threads: BTreeMap<_, _> = threads.collect();
        ensure!(!threads.is_empty(), "the bus has no threads: {text}");
        Ok(threads)
    }

    /// Data pass while the bus does nothing: it is neither woken nor asked.
    fn bus_is_idle(&self, figures: &mut Figures) -> Result<()> {
        self.transfer(EXCHANGE)?;
        let interrupts = |guest: &Guest| -> Result<u64> {
            let lines = guest.ok("grep virtio /proc/interrupts")?;
            let counts = lines.lines().flat_map(|line| {
                line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok())
            });
            Ok(counts.sum())
        };
        let stats = self.stats()?;
        let (before, taken) = (self.bus_threads()?, interrupts(&self.l2.guest)?);
        self.transfer(WATCHED)?;
        let (after, taken) = (self.bus_threads()?, interrupts(&self.l2.guest)? - taken);
        let now = self.stats()?;
        let grown_by = |what: usize| -> u64 {
            let grown = after.iter().map(|(thread, now)| {
                now[what] - before.get(thread).map_or(0, |before| before[what])
            });
            grown.sum()
        };
        let (ticks, wakes) = (grown_by(0), grown_by(1));
        let grown = |path: &str| -> Result<u64> {
            let of = |stats: &Value| stats.pointer(path).and_then(Value::as_u64);
            Ok(of(&now).context(path.to_owned())? - of(&stats).context(path.to_owned())?)
        };
        let doorbells = grown("/counters/doorbells")?;
        eprintln!(
            "{} MiB each way: {doorbells} doorbells, {taken} interrupts; the threads of the bus: \
             {wakes} wake-ups, {ticks} ticks",
            WATCHED / MIB
        );
        figures.insert("bus_wakes".into(), wakes.into());
        figures.insert("bus_ticks".into(), ticks.into());
        ensure!(taken > 0 && doorbells > 0, "{taken} interrupts, {doorbells} doorbells");
        for counter in ["interrupts", "interrupts_suppressed", "polls", "wakeups"] {
            let grown = grown(&format!("/counters/{counter}"))?;
            ensure!(grown == 0, "{counter} of the card grew by {grown}");
        }
        let messages = grown("/connector/messages")?;
        ensure!(messages == 0, "the card's server got {messages} messages");
        ensure!(wakes <= WAKES_MAX, "the bus was woken {wakes} times");
        Ok(())
    }

    /// Endless streams both ways.
    fn streams(&self) -> Result<[Running; 4]> {
        let one = |from: &Guest, to: &Guest, address: &str, port: u16| -> Result<[Running; 2]> {
            let receiver = to.start(&format!("exec guest-agent receive 0.0.0.0:{port}"))?;
            nic::wait_port(to, port)?;
            let send = format!("exec guest-agent send {address}:{port} 1000000000000 3");
            Ok([from.start(&send)?, receiver])
        };
        let [a, b] = one(&self.l2.guest, &self.l1.guest, OUTER, 5103)?;
        let [c, d] = one(&self.l1.guest, &self.l2.guest, INNER, 5104)?;
        Ok([a, b, c, d])
    }

    /// The bytes that L1's end has sent and got.
    fn passed(&self) -> Result<[u64; 2]> {
        let read = format!("cd /sys/class/net/{TAP}/statistics && cat tx_bytes rx_bytes");
        let text = self.l1.guest.ok(&read)?;
        let numbers: Vec<u64> = text.split_whitespace().filter_map(|w| w.parse().ok()).collect();
        let [sent, got] = numbers[..] else { anyhow::bail!("no counters: {text}") };
        Ok([sent, got])
    }

    /// Waits until `bytes` more have passed each way.
    fn pass(&self, bytes: u64, streams: &[Running]) -> Result<()> {
        let (before, limit) = (self.passed()?, std::time::Instant::now() + TRANSFER);
        while self.passed()?.iter().zip(before).any(|(now, before)| *now < before + bytes) {
            ensure!(streams.iter().all(Running::runs), "a stream has ended");
            ensure!(std::time::Instant::now() < limit, "{bytes} bytes do not pass each way");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        Ok(())
    }

    /// The queues move back and forth under streams both ways, which do not notice.
    fn moves_under_load(&self) -> Result<()> {
        const MOVES: u32 = 6;
        let streams = self.streams()?;
        self.pass(MIB, &streams)?;
        for step in 0..MOVES {
            let in_kernel = step % 2 == 1;
            self.set(in_kernel)?;
            self.expect(in_kernel)?;
            self.pass(2 * MIB, &streams).with_context(|| {
                format!("after move {step}; the bus says:\n{}", self.bus.said().1)
            })?;
        }
        stop(&streams)?;
        self.transfer(EXCHANGE)
    }

    /// The card goes under load, and the bus and the guest go on.
    fn unplug_under_load(&self) -> Result<()> {
        let streams = self.streams()?;
        self.pass(2 * MIB, &streams)?;
        let control = self.l2.control_socket();
        self.bus.spawn(&format!("device remove card --vmm {control}"))?.ok(TRANSFER)?;
        self.l2.guest.ok("[ -z \"$(ls /sys/bus/virtio/devices)\" ]")?;
        ensure!(self.l1.guest.run(&format!("ip link show {TAP}"))?.code != 0, "{TAP} is left");
        stop(&streams)?;
        self.bus.run("device list").map(drop)
    }
}

fn stop(streams: &[Running]) -> Result<()> {
    for running in streams {
        running.kill()?;
        running.wait(TRANSFER)?;
    }
    Ok(())
}
