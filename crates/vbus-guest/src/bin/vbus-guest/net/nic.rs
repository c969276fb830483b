// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Serves one NIC: opens it, makes its interface, and runs its queues.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use serde_json::{Value, json};
use vbus_driver::venet::{
    Coalesce, F_COALESCE, F_MAC, F_RX, F_RX_SHIFT, F_TX, F_VLAN, FILTER_ALL_MULTICAST,
    FILTER_PROMISCUOUS, Nic, NicStatus, VLAN_MAP_BYTES,
};
use vbus_driver::{Acknowledger, Error, Function, Hal, Pace};
use vbus_tap::{Mac, Offloads, show_mac};

use super::control::{Changes, Control, Request, vlans_of};
use super::frames::FrameMemory;
use super::options::Options;
use super::priority;
use super::queue::{Counters, NicShared, Queue, Wake};
use super::tap::{Tap, set_carrier};
use vbus_guest::{Claimed, Interrupt, Patience, Source, keep_open};

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

/// A device that does not answer for this long is told to the log, and the interface has no carrier
/// until it answers.
const STALL: Duration = Duration::from_secs(2);

/// The interface, which stays when the NIC's connection is lost, and how it was set up.
struct Interface {
    tap: Tap,
    /// The NIC's address, which the interface was given.
    mac: Mac,
    /// The MTU that the interface was given.
    mtu: u16,
    /// Whether the NIC has been opened for it before.
    was_open: bool,
    /// Where `vbus-guest net set` asks for changes.
    control: Option<Control>,
    /// The settings, with the changes so far.
    settings: Changes,
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
    let Interface { tap, mac, mtu: mtu_before, was_open, control, settings } = match interface {
        Some(interface) => interface,
        None => {
            let tap = Tap::create(options.name.as_deref().unwrap_or("vbus%d"), pairs)?;
            tap.set_mac(config.mac)?;
            tap.set_mtu(mtu)?;
            let control = Control::listen(tap.name());
            let settings = options.settings.clone();
            let (mac, was_open) = (config.mac, false);
            interface.insert(Interface { tap, mac, mtu, was_open, control, settings })
        }
    };
    let usable = if options.no_offload { 0 } else { tap.usable() };
    let mut nic = Nic::open(function, usable | F_MAC | F_VLAN | F_COALESCE, 0)?;
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
    let carrier = Carrier::new(tap)?;
    interrupt.set_patience(carrier.patience(stop)?);

    let shared = NicShared {
        stop: AtomicBool::new(false),
        used: AtomicUsize::new(usize::from(pairs)),
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
        let frames = FrameMemory::new(hal.alloc(FRAME_BYTES).map_err(Error::from)?)?;
        let pace = Pace::new(u64::from(options.poll_us) * 1000, NAP_NS);
        let (number, tap, hal) = (usize::from(q), file, hal.clone());
        let mut queue = Queue {
            number,
            tx,
            frames,
            buffers: rx.buffers().clone(),
            rx,
            tap,
            wake,
            pace,
            carried: 0,
            hal,
        };
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
    let mut supervisor = Supervisor {
        nic,
        id,
        tap,
        mac: *mac,
        pairs,
        shared: &shared,
        relays: &relays,
        control: control.as_ref(),
        settings,
        filter: None,
        vlans: None,
        carrier,
        told_link: None,
        told_mtu: None,
    };
    supervisor.apply()?;
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
            features & (F_TX | F_RX),
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
        let mut result = supervisor.watch(own, stop, ended);
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

/// The carrier of the interface: on while the NIC has a link and the device answers.
#[derive(Clone)]
struct Carrier {
    name: Arc<str>,
    queue: Arc<vbus_tap::Queue>,
    state: Arc<Mutex<CarrierState>>,
}

#[derive(Default)]
struct CarrierState {
    link: bool,
    /// When the call began that the device does not answer.
    stalled: Option<Instant>,
    /// What the kernel was told.
    on: Option<bool>,
}

impl Carrier {
    /// The carrier of `tap`, without a link.
    fn new(tap: &Tap) -> Result<Carrier> {
        let queue = tap.queues()?.into_iter().next().context("an interface without a queue")?;
        Ok(Carrier { name: tap.name().into(), queue: Arc::new(queue), state: Arc::default() })
    }

    fn set_link(&self, link: bool) {
        self.change(|state| state.link = link);
    }

    fn change(&self, change: impl FnOnce(&mut CarrierState)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        let on = state.link && state.stalled.is_none();
        if state.on.replace(on) != Some(on) {
            set_carrier(&self.queue, on);
        }
    }

    /// How long the driver waits for a device that does not answer: until `stop` is readable.
    /// Meanwhile there is no carrier.
    fn patience(&self, stop: &OwnedFd) -> Result<Patience> {
        let carrier = self.clone();
        Ok(Patience::until(stop.try_clone()?).on_stall(STALL, move |stalls| {
            let began = Instant::now().checked_sub(STALL);
            let name = &carrier.name;
            carrier.change(|state| match (stalls, state.stalled) {
                (true, _) => {
                    tracing::warn!("{name}: the bus does not answer; waiting for it");
                    state.stalled = began;
                }
                (false, Some(began)) => {
                    let seconds = began.elapsed().as_secs();
                    tracing::info!("{name}: the bus did not answer for {seconds} s");
                    state.stalled = None;
                }
                (false, None) => {}
            });
        }))
    }
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

/// A fresh eventfd.
pub fn event() -> Result<OwnedFd> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("cannot make an eventfd")
}

/// Watches the NIC as a whole: its link, its filter, and whether its connection is still open.
struct Supervisor<'a, H: Hal> {
    nic: Nic<H>,
    id: &'a str,
    tap: &'a Tap,
    /// The NIC's address.
    mac: Mac,
    /// The queue pairs that were made.
    pairs: u16,
    shared: &'a NicShared,
    /// Wakes each queue, if there are several.
    relays: &'a [OwnedFd],
    control: Option<&'a Control>,
    settings: &'a mut Changes,
    filter: Option<u32>,
    /// The VLAN ids that pass; `None`: all.
    vlans: Option<Vec<u16>>,
    carrier: Carrier,
    /// The link that the log has.
    told_link: Option<bool>,
    /// The MTU of the interface that the log has called too large.
    told_mtu: Option<u32>,
}

impl<H: Hal> Supervisor<'_, H> {
    /// Runs until `stop` becomes readable, a queue ends, or the connection ends.
    fn watch(
        &mut self,
        mut own: Option<(Box<dyn Interrupt>, Acknowledger<H>)>,
        stop: &OwnedFd,
        ended: impl Fn() -> bool,
    ) -> Result<()> {
        let (shared, relays, control) = (self.shared, self.relays, self.control);
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
            let own_fds = fds.len();
            let asked = control.iter().flat_map(|control| control.fds());
            fds.extend(asked.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            let timeout = Timespec::try_from(next.saturating_duration_since(Instant::now()))?;
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("poll"),
            }
            let mut ready: Vec<_> = fds.iter().map(PollFd::revents).collect();
            let asked = ready.split_off(own_fds).iter().any(|flags| !flags.is_empty());
            for (request, answer) in control.iter().filter(|_| asked).flat_map(|c| c.requests()) {
                let _ = answer.send(self.answer(request)); // The client may have gone.
            }
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
        self.carrier.set_link(link);
        if self.told_link.replace(link) != Some(link) {
            tracing::info!("{}: link {}", self.tap.name(), if link { "up" } else { "down" });
        }
        self.compare_mtu();
        let promiscuous = self.tap.is_promiscuous(self.mac);
        // The kernel filters multicasts itself. It wants frames for other addresses only when it
        // listens to all.
        let filter = FILTER_ALL_MULTICAST | if promiscuous { FILTER_PROMISCUOUS } else { 0 };
        if self.filter != Some(filter) {
            self.nic.filter(filter, &[])?;
            self.filter = Some(filter);
        }
        let filters = self.settings.vlan_filter == Some(true) && !promiscuous;
        let config = || std::fs::read_to_string("/proc/net/vlan/config").unwrap_or_default();
        let vlans = filters.then(|| vlans_of(self.tap.name(), &config()));
        if self.vlans != vlans {
            self.set_vlans(vlans.as_deref())?;
            self.vlans = vlans;
        }
        Ok(())
    }

    fn set_vlans(&mut self, ids: Option<&[u16]>) -> Result<()> {
        let map = ids.map(|ids| {
            let mut map = [0; VLAN_MAP_BYTES];
            ids.iter().for_each(|id| map[usize::from(id / 8)] |= 1 << (id % 8));
            map
        });
        Ok(self.nic.set_vlans(map.as_ref())?)
    }

    /// Tells if a person has given the interface a larger MTU than the NIC has.
    fn compare_mtu(&mut self) {
        let (mtu, most) = (self.tap.mtu(), u32::from(self.nic.config().mtu));
        if mtu.is_some_and(|mtu| mtu > most) && self.told_mtu != mtu {
            tracing::warn!("{}: the NIC drops frames of more than {most} bytes", self.tap.name());
        }
        self.told_mtu = mtu;
    }

    fn answer(&mut self, request: Request) -> Result<Value> {
        if let Request::Set(changes) = request {
            let before = std::mem::replace(self.settings, changes.over(self.settings));
            if let Err(error) = self.apply() {
                *self.settings = before;
                return Err(error);
            }
            self.look()?;
        }
        Ok(self.describe())
    }

    /// Lets the NIC work by the settings.
    fn apply(&mut self) -> Result<()> {
        let features = self.nic.function().features();
        let used = self.settings.use_queue_pairs.unwrap_or(self.pairs);
        if !(1..=self.pairs).contains(&used) {
            bail!(
                "{used} queue pairs; 1 to {} were made: start `vbus-guest net` with another \
                 --queue-pairs",
                self.pairs
            );
        }
        let coalesce = Coalesce {
            usecs: self.settings.rx_usecs.unwrap_or(0),
            frames: self.settings.rx_frames.unwrap_or(0),
        };
        if features & F_COALESCE != 0 {
            self.nic.set_coalesce(None, coalesce, Coalesce::default())?;
        } else if coalesce.usecs != 0 {
            bail!("the NIC cannot hold interrupts back");
        }
        if self.settings.vlan_filter == Some(true) && features & F_VLAN == 0 {
            bail!("the NIC cannot filter by VLAN");
        }
        let offloads = self.settings.rx_offload.unwrap_or(true);
        self.nic.set_offloads(if offloads { features & F_RX } else { 0 })?;
        let before = self.shared.used.load(Ordering::Relaxed);
        if before != usize::from(used) {
            // The interface stops to use queues before the NIC does, and begins after it.
            if usize::from(used) > before {
                self.nic.set_queues(used)?;
            }
            self.shared.used.store(usize::from(used), Ordering::Relaxed);
            self.tap.use_queues(usize::from(used))?;
            if usize::from(used) < before {
                self.nic.set_queues(used)?;
            }
            for relay in self.relays {
                let _ = rustix::io::write(relay, &1u64.to_ne_bytes());
            }
        }
        Ok(())
    }

    fn describe(&self) -> Value {
        let features = self.nic.function().features();
        let offloads = |bits: u64| format!("{:?}", Offloads::from_bits(bits));
        let rx = self.settings.rx_offload.unwrap_or(true);
        json!({
            "interface": self.tap.name(),
            "device": self.nic.function().info().name.to_string(),
            "id": self.id,
            "mac": show_mac(self.mac),
            "link": self.told_link,
            "mtu": self.tap.mtu(),
            "mtu-max": self.nic.config().mtu,
            "queue-pairs": self.pairs,
            "use-queue-pairs": self.shared.used.load(Ordering::Relaxed),
            "tx-offloads": offloads(features & F_TX),
            "rx-offloads": offloads(if rx { features >> F_RX_SHIFT } else { 0 }),
            "rx-usecs": self.settings.rx_usecs.unwrap_or(0),
            "rx-frames": self.settings.rx_frames.unwrap_or(0),
            "vlan-filter": self.settings.vlan_filter.unwrap_or(false),
            "vlans": self.vlans,
        })
    }
}
