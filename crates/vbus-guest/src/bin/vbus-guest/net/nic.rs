// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Serves one NIC: opens it, makes its interface, and runs its queues.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use vbus_driver::venet::{F_MAC, FILTER_ALL_MULTICAST, FILTER_PROMISCUOUS, Nic, NicStatus};
use vbus_driver::{Acknowledger, Error, Function, Hal, Pace};
use vbus_tap::{Mac, show_mac};

use super::frames::FrameMemory;
use super::options::Options;
use super::priority;
use super::queue::{Counters, NicShared, Queue, Wake};
use super::tap::Tap;
use vbus_guest::{Claimed, Interrupt, Source, keep_open};

/// The entries of each ring.
const RING_ENTRIES: u32 = 256;
/// The bytes of a receive buffer. A segment of 64 KiB takes five buffers, an ordinary frame one.
const BUFFER_BYTES: u32 = 16 << 10;
/// The bytes of the memory for frames to send: one huge page.
const FRAME_BYTES: usize = 2 << 20;
/// The shortest nap under load, in nanoseconds. Each nap ends with two switches of threads. They
/// cost more here than at the device's end: under a translator, the rate of received TCP with 300
/// us was 1.2 to 2.2 times that with 100 us. At 10 Gb/s, 300 us are 6 segments of 64 KiB.
const NAP_NS: u64 = 300_000;
/// The longest time between two looks at the NIC.
const TICK: Duration = Duration::from_secs(1);

/// The interface, which stays when the NIC's connection is lost, and how it was set up.
struct Interface {
    tap: Tap,
    /// The NIC's address, which the interface was given.
    mac: Mac,
    /// The MTU that the interface was given.
    mtu: u16,
    /// Whether the NIC has been opened for it before.
    was_open: bool,
}

/// Serves the NIC until `stop` becomes readable, the function goes, or something fails. It returns
/// without an error only for `stop`. When the connection is lost, the interface stays, without a
/// carrier, and the NIC is opened again.
pub fn serve<S: Source>(
    source: &S,
    id: &str,
    claimed: Claimed<S::Hal>,
    options: &Options,
    stop: &OwnedFd,
) -> Result<()> {
    let mut interface = None;
    keep_open(source, id, claimed, Some(stop.as_fd()), |claimed| {
        let result = serve_once(id, claimed, options, &mut interface, stop);
        if let (Err(_), Some(Interface { tap, .. })) = (&result, &interface) {
            tap.set_carrier(false);
        }
        result
    })
    .map(drop)
}

/// Serves the NIC with one connection. Makes `interface` unless it is there.
fn serve_once<H>(
    id: &str,
    (hal, interrupt): Claimed<H>,
    options: &Options,
    interface: &mut Option<Interface>,
    stop: &OwnedFd,
) -> Result<()>
where
    H: Hal<Dma: Send + Sync> + Send + Sync + 'static,
{
    let mut function = Function::probe(hal.clone())?;
    let device = function.info().name;
    let acknowledger = function.acknowledger();
    let config = vbus_driver::venet::config(&function)?;
    options.doorbell.apply(&mut function)?;
    let pairs = match &*interface {
        Some(Interface { tap, .. }) => u16::try_from(tap.queue_count())?,
        None => options.queue_pairs.clamp(1, config.queue_pairs),
    };
    if pairs > config.queue_pairs {
        bail!(
            "{device} has {} queue pairs now, the interface {pairs}: start `vbus-guest net` again",
            config.queue_pairs
        );
    }
    let mtu = options.mtu.unwrap_or(config.mtu);
    if mtu > config.mtu {
        bail!(
            "{device} takes frames of {} bytes at most, an MTU of {mtu} is too large",
            config.mtu
        );
    }
    let Interface { tap, mac, mtu: mtu_before, was_open } = match interface {
        Some(interface) => interface,
        None => {
            let tap = Tap::create(options.name.as_deref().unwrap_or("vbus%d"), pairs)?;
            tap.set_mac(config.mac)?;
            tap.set_mtu(mtu)?;
            interface.insert(Interface { tap, mac: config.mac, mtu, was_open: false })
        }
    };
    let usable = if options.no_offload { 0 } else { tap.usable() };
    let mut nic = Nic::open(function, usable | F_MAC, 0)?;
    let features = nic.function().features();
    tap.set_carrier(false);
    tap.set_offload(features)?;
    // The frames that wait may need offloads that the device does not have any more.
    tap.discard();
    // A person may have set another MTU since: only a device that has changed overwrites it.
    if *mtu_before != mtu {
        tap.set_mtu(mtu)?;
        *mtu_before = mtu;
    }
    let tap = &*tap;

    let shared = NicShared {
        stop: AtomicBool::new(false),
        stopped: event()?,
        look: event()?,
        counters: Counters::default(),
    };
    // With one queue pair, its thread takes the interrupts itself. With several, this thread takes
    // them and wakes the others.
    let mut own = Some((interrupt, acknowledger));
    let mut relays = Vec::new();
    let mut queues = Vec::new();
    for (q, file) in (0..pairs).zip(tap.queues()?) {
        let wake = match own.take_if(|_| pairs == 1) {
            Some((interrupt, acknowledger)) => Wake::Interrupt(interrupt, acknowledger),
            None => {
                let relay = event()?;
                relays.push(relay.try_clone()?);
                Wake::Relay(relay)
            }
        };
        let entries = RING_ENTRIES.min(config.ring_entries);
        let (tx, rx) = nic.queue_pair(q, entries, BUFFER_BYTES, 0)?;
        let buffers = hal.alloc(entries as usize * BUFFER_BYTES as usize).map_err(Error::from)?;
        let frames = FrameMemory::new(hal.alloc(FRAME_BYTES).map_err(Error::from)?)?;
        let pace = Pace::new(u64::from(options.poll_us) * 1000, NAP_NS);
        let mut queue =
            Queue { tx, frames, rx, buffers, tap: file, wake, pace, carried: 0, hal: hal.clone() };
        queue.fill()?;
        queues.push(queue);
    }
    nic.start()?;
    // A bus that starts again gives another random address to a NIC that has none in the bus's
    // configuration. Peers know the interface by the address that it has.
    if *mac != config.mac && !(features & F_MAC != 0 && nic.set_mac(*mac).is_ok()) {
        tap.set_mac(config.mac)?;
        *mac = config.mac;
    }
    let mut supervisor = Supervisor { nic, tap, mac: *mac, filter: None, link: None };
    supervisor.look()?;
    if !std::mem::replace(was_open, true) {
        if options.up {
            tap.set_up()?;
        }
        vbus_cli::output::emit(&format!(
            "{}: {device} ({id}), address {}, MTU {mtu}, {pairs} queue pair{}, offloads {:#x}\n",
            tap.name(),
            show_mac(*mac),
            if pairs == 1 { "" } else { "s" },
            features & !F_MAC,
        ));
    } else {
        tracing::info!("{}: {device} ({id}) was opened again", tap.name());
    }

    let (result, queues) = thread::scope(|scope| {
        let threads: Vec<_> = queues
            .into_iter()
            .map(|mut queue| {
                let (shared, nice) = (&shared, options.nice);
                scope.spawn(move || {
                    priority::take(nice);
                    let result = queue.run(shared);
                    let _ = rustix::io::write(&shared.look, &1u64.to_ne_bytes());
                    (result, queue)
                })
            })
            .collect();
        let ended = || threads.iter().any(|thread| thread.is_finished());
        let mut result = supervisor.watch(&shared, own, &relays, stop, ended);
        shared.stop.store(true, Ordering::Relaxed);
        let _ = rustix::io::write(&shared.stopped, &1u64.to_ne_bytes());
        let mut queues = Vec::new();
        for thread in threads {
            match thread.join() {
                // The device's own error explains the errors of its queues, so it comes first.
                Ok((ended, queue)) => {
                    result = result.and(ended);
                    queues.push(queue);
                }
                Err(_) => result = result.and(Err(anyhow!("a queue's thread panicked"))),
            }
        }
        (result, queues)
    });
    report(tap.name(), &shared.counters);
    // The device must release the memory of the queues before they are dropped.
    supervisor.nic.close();
    drop(queues);
    result
}

fn report(name: &str, counters: &Counters) {
    let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    tracing::info!(
        sent = get(&counters.sent),
        received = get(&counters.received),
        refused = get(&counters.refused),
        doorbells = get(&counters.doorbells),
        interrupts = get(&counters.interrupts),
        naps = get(&counters.naps),
        sleeps = get(&counters.sleeps),
        "{name} ends"
    );
}

fn event() -> Result<OwnedFd> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("cannot make an eventfd")
}

/// Watches the NIC as a whole: its link, its filter, and whether its connection is still open.
struct Supervisor<'a, H: Hal> {
    nic: Nic<H>,
    tap: &'a Tap,
    /// The NIC's address.
    mac: Mac,
    filter: Option<u32>,
    link: Option<bool>,
}

impl<H: Hal> Supervisor<'_, H> {
    /// Runs until `stop` becomes readable, a queue ends, or the connection ends.
    fn watch(
        &mut self,
        shared: &NicShared,
        mut own: Option<(Box<dyn Interrupt>, Acknowledger<H>)>,
        relays: &[OwnedFd],
        stop: &OwnedFd,
        ended: impl Fn() -> bool,
    ) -> Result<()> {
        let mut next = Instant::now();
        loop {
            if Instant::now() >= next {
                self.look()?;
                next = Instant::now() + TICK;
            }
            if let Some((interrupt, _)) = &mut own {
                interrupt.enable()?;
            }
            let mut fds =
                vec![PollFd::new(stop, PollFlags::IN), PollFd::new(&shared.look, PollFlags::IN)];
            if let Some((interrupt, _)) = &own {
                fds.push(PollFd::from_borrowed_fd(interrupt.fd(), PollFlags::IN));
                fds.push(PollFd::from_borrowed_fd(interrupt.lifeline(), PollFlags::RDHUP));
            }
            let timeout = Timespec::try_from(next.saturating_duration_since(Instant::now()))?;
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("poll"),
            }
            let ready: Vec<_> = fds.iter().map(PollFd::revents).collect();
            if !ready[0].is_empty() {
                return Ok(());
            }
            if !ready[1].is_empty() {
                let _ = rustix::io::read(&shared.look, &mut [0; 8]);
                self.look()?;
                if ended() {
                    return Ok(());
                }
            }
            if let (Some((interrupt, acknowledger)), Some(flags)) = (&mut own, ready.get(2)) {
                if ready.get(3).is_some_and(|flags| !flags.is_empty()) {
                    return Err(Error::Gone.into());
                }
                if flags.contains(PollFlags::IN) {
                    interrupt.take()?;
                    acknowledger.acknowledge();
                    // The interrupt does not say for which queue it is, so each queue looks.
                    // Then the interrupt is enabled again.
                    for relay in relays {
                        let _ = rustix::io::write(relay.as_fd(), &1u64.to_ne_bytes());
                    }
                    if self.nic.status_is_newer() {
                        self.look()?;
                    }
                }
            }
        }
    }

    /// Applies the NIC's link to the interface, and the interface's filter to the NIC.
    fn look(&mut self) -> Result<()> {
        self.nic.function().check()?;
        let mut status = self.nic.status()?;
        if self.nic.arm_status() == vbus_shm::signal::Armed::Missed {
            status = self.nic.status()?;
        }
        let NicStatus { link, .. } = status;
        if self.link != Some(link) {
            self.tap.set_carrier(link);
            tracing::info!("{}: link {}", self.tap.name(), if link { "up" } else { "down" });
            self.link = Some(link);
        }
        let promiscuous = self.tap.is_promiscuous(self.mac);
        // The kernel filters multicasts itself. It wants frames for other addresses only when it
        // listens to all.
        let filter = FILTER_ALL_MULTICAST | if promiscuous { FILTER_PROMISCUOUS } else { 0 };
        if self.filter != Some(filter) {
            self.nic.filter(filter, &[])?;
            self.filter = Some(filter);
        }
        Ok(())
    }
}
