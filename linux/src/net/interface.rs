// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The interface: from registration to removal, and the connection while it is up.
//!
//! Locks, in this order: the kernel's rtnl, then [`Net::control`]. Whoever changes the connection
//! has both. The transmit locks and NAPI guard the data path, see `pair`.
#![allow(unsafe_code, reason = "callbacks of the shim, and handles")]

use core::ffi::{c_int, c_void};
use core::fmt;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use vbus_driver::shm::abi::venet::complete;
use vbus_driver::shm::signal::Armed;
use vbus_driver::venet::{
    self, Config, F_COALESCE, F_HASH, F_MAC, F_RSS, F_RX, F_RX_CSUM, F_TX_CSUM, F_TX_ECN,
    F_TX_TSO4, F_TX_TSO6, F_TX_USO, F_VLAN, FILTER_ALL_MULTICAST, FILTER_PROMISCUOUS,
    HASH_HEADER_BYTES, HEADER_BYTES, Nic, NicStatus, VLAN_MAP_BYTES, hash_kind,
};
use vbus_driver::{Error, Events};

use super::ffi::{self, Handle};
use super::pair::{Group, Pair};
use super::rx::{Mode, RxQueue, XDP_BUFFER};
use super::settings::{Rss, Settings};
use super::tx::{COPYBREAK, COPYBREAK_MAX, TxQueue};
use crate::connection;
use crate::device::{Class, Device, report};
use crate::hal::KernelHal;
use crate::interrupt::Interrupt;
use crate::kernel::lock::{Mutex, MutexGuard, SpinLock};
use crate::kernel::{Errno, KBox, KVec, power, time};
use crate::watch::{Watch, Watched};
use crate::{dev_err_limited, dev_warn_limited};

/// How long the device may keep whoever has the control waiting, in nanoseconds: who has it often
/// has rtnl too, and then the whole system cannot change its network.
const BUDGET: u64 = 10_000_000_000;
/// The interface announces itself to others once in this time at most, in nanoseconds.
const ANNOUNCE: u64 = 1_000_000_000;
/// The vector of events and of the device's pages.
const EVENTS: u16 = 0;
/// How often a page that changes is read again for its interrupt.
const STATUS_TRIES: u32 = 8;

/// What the connection and the settings are.
pub struct Control {
    /// The connection.
    pub nic: Option<Nic<KernelHal>>,
    /// The administrator has set the interface up.
    pub is_up: bool,
    /// The system sleeps, or the function is being reset.
    pub is_asleep: bool,
    /// What the device says of itself.
    pub config: Config,
    /// The features that the device offers.
    pub offered: u64,
    /// The status that was read last.
    pub status: NicStatus,
    /// What the administrator has set.
    pub settings: Settings,
}

/// The interface, as the kernel's callbacks find it.
pub struct Net {
    hal: KernelHal,
    /// The kind of doorbell in use.
    doorbell: u8,
    dev: Handle,
    control: Mutex<KBox<Control>>,
    groups: KVec<KBox<Group>>,
    pairs: KVec<KBox<Pair>>,
    /// The most queue pairs: each has a vector, if there are several.
    pairs_max: u16,
    /// Queue pairs that the connection has.
    pairs_used: AtomicUsize,
    watch: AtomicPtr<Watch<Net>>,
    /// The addresses to filter for have changed.
    filter_changed: AtomicBool,
    /// A queue has waited for so long that the kernel told so.
    timed_out: AtomicBool,
    /// The device broke the protocol.
    fault: AtomicBool,
    /// How it did. The watch tells of it: whoever finds it may hold a transmit lock, and a message
    /// may go out by this interface.
    broke: SpinLock<Option<Error>>,
    /// The device has asked for an announcement that has not been made, or was opened anew.
    announce_wanted: AtomicBool,
    /// When the last announcement was made.
    announced: AtomicU64,
    /// Errors that have ended a connection.
    pub faults: AtomicU64,
}

// SAFETY: the handles may be used in any thread.
unsafe impl Send for Net {}
// SAFETY: as above.
unsafe impl Sync for Net {}

/// Holds rtnl, the kernel's lock for the configuration of interfaces.
struct Rtnl;

impl Rtnl {
    fn lock() -> Rtnl {
        // SAFETY: no caller holds it.
        unsafe { ffi::shim_rtnl_lock() };
        Rtnl
    }
}

impl Drop for Rtnl {
    fn drop(&mut self) {
        // SAFETY: it was locked.
        unsafe { ffi::shim_rtnl_unlock() };
    }
}

/// The driver of one interface. Dropping it removes the interface.
pub struct Interface {
    /// With the watch over it.
    net: KBox<Watch<Net>>,
    interrupts: KVec<Interrupt<Group>>,
    events: Option<Interrupt<Net>>,
    /// The kernel knows the interface.
    is_registered: bool,
}

/// Makes the interface of a device of class `venet`.
pub fn probe(device: &Device) -> Result<KBox<Interface>, Errno> {
    let report = |error| report(device.pci(), error);
    let function = device.function().map_err(report)?;
    let config = venet::config(&function).map_err(report)?;
    let offered = function.info().features;
    let vectors = device.interrupts().count();
    // With several vectors the first is for events.
    let shares = vectors < 2;
    let pairs_max = if shares { config.queue_pairs } else { config.queue_pairs.min(vectors - 1) };
    let net = Net::new(device, &config, offered, pairs_max, shares)?;
    let net = KBox::new(Watch::new(net)?)?;
    let (interrupts, events) = (KVec::new(), None);
    let this = Interface { net, interrupts, events, is_registered: false };
    let mut this = KBox::new(this)?;
    this.net.watch.store((&raw const *this.net).cast_mut(), Ordering::Release);
    let name = device.info().name;
    let Interface { net, interrupts, events, .. } = &mut *this;
    let net: &Net = net;
    for (at, group) in net.groups.iter().enumerate() {
        let (vector, target) =
            (if shares { EVENTS } else { number(at) + 1 }, NonNull::from(&**group));
        // SAFETY: the group is at its place until the interrupt is dropped.
        let interrupt = unsafe {
            let run = |group: &Group, _| group.interrupt();
            device.interrupts().request(vector, format_args!("vbus-{name}-{at}"), target, run)
        };
        interrupts.push(interrupt?)?;
    }
    if !shares {
        // SAFETY: as above, for the net.
        let interrupt = unsafe {
            let run = |net: &Net, _| net.look_soon();
            device.interrupts().request(EVENTS, format_args!("vbus-{name}-events"), net.into(), run)
        };
        *events = Some(interrupt?);
    }
    this.net.register(&config, offered)?;
    this.is_registered = true;
    Ok(this)
}

impl Net {
    fn new(
        device: &Device,
        config: &Config,
        offered: u64,
        pairs_max: u16,
        shares: bool,
    ) -> Result<KBox<Net>, Errno> {
        // SAFETY: zeros are a value of each field: no connection, and nothing set.
        let mut control = unsafe { KBox::<Control>::new_uninit()?.assume_init() };
        let fresh = &mut *control;
        // SAFETY: the fields that have other values than zeros are written without a read.
        unsafe {
            ptr::write(&raw mut fresh.nic, None);
            ptr::write(&raw mut fresh.settings.rss, None);
            ptr::write(&raw mut fresh.status, NicStatus::default());
            ptr::write(&raw mut fresh.config, *config);
        }
        fresh.offered = offered;
        let copybreak = if device.pci().is_translated() { COPYBREAK_MAX } else { COPYBREAK };
        fresh.settings.init(config, pairs_max, copybreak);
        let mut net = KBox::new(Net {
            hal: device.hal().clone(),
            doorbell: device.doorbell().kind,
            dev: ptr::null_mut(),
            control: Mutex::new(control)?,
            groups: KVec::new(),
            pairs: KVec::new(),
            pairs_max,
            pairs_used: AtomicUsize::new(1),
            watch: AtomicPtr::new(ptr::null_mut()),
            filter_changed: AtomicBool::new(true),
            timed_out: AtomicBool::new(false),
            fault: AtomicBool::new(false),
            broke: SpinLock::new(None)?,
            announce_wanted: AtomicBool::new(false),
            announced: AtomicU64::new(0),
            faults: AtomicU64::new(0),
        })?;
        let this = NonNull::from(&mut *net);
        // SAFETY: the net stays at its place as long as the interface.
        let dev = unsafe {
            let pci = device.pci().handle();
            ffi::shim_net_new(pci, this.as_ptr().cast(), u32::from(pairs_max))
        };
        net.dev = NonNull::new(dev).ok_or(Errno::NO_MEMORY)?.as_ptr();
        let groups = if shares { 1 } else { pairs_max };
        for index in 0..groups {
            net.groups.push(Group::new(this, dev, u32::from(index), shares)?)?;
        }
        for index in 0..pairs_max {
            let group = if shares { 0 } else { usize::from(index) };
            let Some(group) = net.groups.get_mut(group) else { continue };
            let pair = Pair::new(this, dev, u32::from(index), group.shim())?;
            group.add(NonNull::from(&*pair))?;
            net.pairs.push(pair)?;
        }
        Ok(net)
    }

    fn register(&self, config: &Config, offered: u64) -> Result<(), Errno> {
        let able = [
            (F_TX_CSUM, ffi::CSUM),
            (F_TX_TSO4, ffi::TSO4),
            (F_TX_TSO6, ffi::TSO6),
            (F_TX_ECN, ffi::ECN),
            (F_TX_USO, ffi::USO),
            (F_VLAN, ffi::VLAN),
            (F_RSS, ffi::RSS),
            (F_RX_CSUM, ffi::RX_CSUM),
            (F_RX & !F_RX_CSUM, ffi::RX_GSO),
        ];
        let offered = complete(offered);
        let able = able.iter().filter(|(feature, _)| offered & feature != 0);
        let traits = ffi::Traits {
            mac: config.mac,
            mtu_max: config.mtu,
            able: able.fold(0, |able, (_, bit)| able | bit),
            queues: u32::from(self.pairs_max),
        };
        // SAFETY: the interface is not visible, and the traits are valid during the call.
        Errno::check(unsafe { ffi::shim_net_register(self.dev, &raw const traits) }).map(drop)
    }

    /// What the connection and the settings are. It sleeps. All commands of whoever has it wait for
    /// [`BUDGET`] together.
    pub fn control(&self) -> MutexGuard<'_, KBox<Control>> {
        let mut control = self.control.lock();
        if let Some(nic) = &mut control.nic {
            nic.set_budget(Some(BUDGET));
        }
        control
    }

    /// The handle of the interface.
    pub fn dev(&self) -> Handle {
        self.dev
    }

    /// The queue pairs, in use or not.
    pub fn pairs(&self) -> &[KBox<Pair>] {
        &self.pairs
    }

    /// The groups, in the order of their vectors.
    pub fn groups(&self) -> &[KBox<Group>] {
        &self.groups
    }

    /// The most queue pairs.
    pub fn pairs_max(&self) -> u16 {
        self.pairs_max
    }

    /// Lets the watch look at events, status and addresses. From any context.
    pub fn look_soon(&self) {
        // SAFETY: the watch is there until it is taken out, by the drop of the interface.
        if let Some(watch) = unsafe { self.watch.load(Ordering::Acquire).as_ref() } {
            watch.soon();
        }
    }

    /// The device broke the protocol. From any context.
    #[cold]
    pub fn fault(&self, error: Error) {
        if !self.fault.swap(true, Ordering::Relaxed) {
            self.faults.fetch_add(1, Ordering::Relaxed);
            *self.broke.lock() = Some(error);
            self.look_soon();
        }
    }

    /// Opens the connection with all settings, and starts the data path. With rtnl.
    pub fn connect(&self, control: &mut Control) -> Result<(), Error> {
        if self.hal.keeps_memory() {
            return Err(Error::Corrupt("the device never lets go of memory; remove it"));
        }
        self.fault.store(false, Ordering::Relaxed);
        // Room for all: a half that found none would be lost with its pages.
        let mut halves = KVec::with_capacity(self.pairs.len())?;
        let mut function = self.hal.function(self.doorbell)?;
        function.set_budget(Some(BUDGET));
        control.offered = function.info().features;
        let mut nic = Nic::open(function, control.settings.features(), EVENTS)?;
        control.config = *nic.config();
        let mut opened = 0;
        let result = self.build(&mut nic, control, &mut opened, &mut halves).and_then(|()| {
            // SAFETY: the caller holds rtnl.
            Errno::check(unsafe {
                ffi::shim_net_use_queues(self.dev, u32::from(number(halves.len())))
            })
            .map(drop)
            .map_err(|_| Error::NoMemory)
        });
        if let Err(error) = result {
            let let_go = self.close(nic);
            while let Some(halves) = halves.pop() {
                free(halves, let_go);
            }
            for pair in self.pairs.iter().take(opened) {
                // SAFETY: it was opened, and has no rings any more.
                unsafe { ffi::shim_queue_close(pair.shim()) };
            }
            return Err(error);
        }
        self.pairs_used.store(halves.len().max(1), Ordering::Relaxed);
        // The last comes first.
        for pair in self.pairs.iter().take(halves.len()).rev() {
            if let Some((tx, rx)) = halves.pop() {
                pair.install(tx, rx);
            }
        }
        for group in &*self.groups {
            // SAFETY: NAPI is disabled.
            unsafe { ffi::shim_group_enable(group.shim()) };
        }
        control.nic = Some(nic);
        self.filter_changed.store(true, Ordering::Relaxed);
        if let Err(error) = self.refresh(control) {
            self.disconnect(control);
            return Err(error);
        }
        // SAFETY: the handles are this interface's.
        unsafe {
            ffi::shim_net_tx_wake_all(self.dev);
            for group in &*self.groups {
                // It arms the rings.
                ffi::shim_group_schedule(group.shim());
            }
        }
        Ok(())
    }

    /// Makes the rings, fills them, starts the device, and tells it the settings.
    fn build(
        &self,
        nic: &mut Nic<KernelHal>,
        control: &mut Control,
        opened: &mut usize,
        halves: &mut KVec<(KBox<TxQueue>, KBox<RxQueue>)>,
    ) -> Result<(), Error> {
        let features = nic.function().features();
        let settings = &control.settings;
        let mode = Mode {
            offloads: features & F_RX,
            with_hash: features & F_HASH != 0,
            xdp: settings.xdp,
        };
        let rx_entries = settings.rx_entries.min(control.config.ring_entries);
        let tx_entries = settings.tx_entries.min(control.config.ring_entries);
        let used = usize::from(control.pairs());
        for (at, pair) in self.pairs.iter().enumerate().take(used) {
            let index = number(at);
            let vector = if self.shares_vector() { EVENTS } else { index + 1 };
            // SAFETY: the pair has no rings.
            let error = unsafe { ffi::shim_queue_open(pair.shim(), rx_entries, mode.xdp) };
            if error != 0 {
                return Err(Error::NoMemory);
            }
            *opened += 1;
            let tx = nic.tx(index, tx_entries, vector)?;
            let rx = nic.rx_ring(index, rx_entries, mode.buffer_bytes(), vector)?;
            let tx = TxQueue::new(tx, &self.hal, settings.tx_copybreak, pair.shim())?;
            let tx = KBox::new(tx)?;
            let handles = (pair.shim(), pair.group());
            let mut rx = KBox::new(RxQueue::new(rx, &mode, index, handles)?)?;
            let filled = rx.fill(&pair.rx_stats);
            halves.push((tx, rx))?;
            if !filled {
                return Err(Error::NoMemory);
            }
        }
        nic.start()?;
        // The interface keeps its address, whatever the device has for it now.
        let mac = self.mac();
        if mac != control.config.mac {
            if features & F_MAC != 0 {
                nic.set_mac(mac)?;
            } else {
                dev_warn_limited!(
                    self.hal.pci(),
                    "the device has another address than the interface, and keeps it: it gets no \
                     frames for the interface"
                );
            }
        }
        if features & F_RX != 0 {
            nic.set_offloads(settings.offloads(features))?;
        }
        if let (Some(rss), true) = (&settings.rss, features & F_RSS != 0) {
            set_rss(nic, rss, &control.config)?;
        }
        if features & F_COALESCE != 0 && settings.coalesce != ffi::Coalesce::default() {
            let (rx, tx) = settings.coalescing();
            nic.set_coalesce(None, rx, tx)?;
        }
        nic.add_counters(EVENTS)
    }

    /// Stops the data path and closes the connection. With rtnl.
    fn disconnect(&self, control: &mut Control) {
        let Some(nic) = control.nic.take() else { return };
        // SAFETY: the handles are this interface's. NAPI is enabled while there is a connection.
        unsafe {
            ffi::shim_net_tx_disable(self.dev);
            for group in &*self.groups {
                ffi::shim_group_disable(group.shim());
            }
        }
        // First of all: what the device has is freed when it has let go of it. Until then other
        // interfaces may put frames of XDP into the rings.
        let let_go = self.close(nic);
        for pair in &*self.pairs {
            let Some(halves) = pair.uninstall() else { break };
            if power::goes_down() {
                // Pages that the stack has yet to free go back to their pool, which stays.
                core::mem::forget(halves);
                continue;
            }
            free(halves, let_go);
            // SAFETY: it was opened, and has no rings any more.
            unsafe { ffi::shim_queue_close(pair.shim()) };
        }
    }

    /// Closes the connection. Returns whether the device has let go of the driver's memory.
    fn close(&self, mut nic: Nic<KernelHal>) -> bool {
        nic.set_budget(Some(BUDGET));
        nic.close().has_let_go()
    }

    /// Connects again, if there was a connection: for settings that a connection begins with. With
    /// rtnl.
    pub fn reconnect(&self, control: &mut Control) -> Result<(), Error> {
        if control.nic.is_none() {
            return Ok(());
        }
        self.disconnect(control);
        let result = self.connect(control);
        if result.is_err() {
            self.set_carrier(false);
            // The watch tries again.
            self.look_soon();
        }
        result
    }

    /// Tells the device the indirection table and the key.
    pub fn tell_rss(&self, control: &mut Control) -> Result<(), Error> {
        let Control { nic: Some(nic), settings, config, .. } = control else { return Ok(()) };
        let Some(rss) = &settings.rss else { return Ok(()) };
        set_rss(nic, rss, config)
    }

    /// All interrupts of the function come on one vector.
    fn shares_vector(&self) -> bool {
        self.groups.first().is_some_and(|group| group.shares())
    }

    /// The interface's address.
    fn mac(&self) -> [u8; 6] {
        let mut mac = [0; 6];
        // SAFETY: the handle is valid as long as this, and there is room for an address.
        unsafe { ffi::shim_net_mac(self.dev, mac.as_mut_ptr()) };
        mac
    }

    fn set_carrier(&self, on: bool) {
        // SAFETY: the handle is valid as long as this.
        unsafe { ffi::shim_net_carrier(self.dev, on) };
    }

    /// Reads the status, asks for an interrupt by the next one, and tells the device the addresses,
    /// if they have changed.
    fn refresh(&self, control: &mut Control) -> Result<bool, Error> {
        let Some(nic) = &mut control.nic else { return Ok(false) };
        let before = control.status.announces;
        let was_there = control.status != NicStatus::default();
        for _ in 0..STATUS_TRIES {
            control.status = nic.status()?;
            if nic.arm_status() == Armed::Waiting {
                break;
            }
        }
        self.set_carrier(control.status.link);
        if self.filter_changed.swap(false, Ordering::Relaxed) {
            self.set_filter(nic, &control.settings.vlans).inspect_err(|_| {
                self.filter_changed.store(true, Ordering::Relaxed);
            })?;
        }
        Ok(was_there && control.status.announces != before)
    }

    fn set_filter(
        &self,
        nic: &mut Nic<KernelHal>,
        vlans: &[u8; VLAN_MAP_BYTES],
    ) -> Result<(), Error> {
        let mut addresses = [[0u8; 6]; ffi::ADDRESSES_MAX];
        let (mut promiscuous, mut all) = (false, false);
        // SAFETY: there is room for as many addresses as the shim copies.
        let count = unsafe {
            ffi::shim_net_addresses(
                self.dev,
                addresses.as_mut_ptr().cast(),
                &raw mut promiscuous,
                &raw mut all,
            )
        } as usize;
        let mut flags = if promiscuous { FILTER_PROMISCUOUS } else { 0 };
        if all {
            flags |= FILTER_ALL_MULTICAST;
        }
        // Some of them may be no multicasts: without room for all, all frames pass.
        let listed = addresses.get(..count).unwrap_or_else(|| {
            flags |= FILTER_PROMISCUOUS;
            &[]
        });
        nic.filter(flags, listed)?;
        if nic.function().features() & F_VLAN != 0 {
            // Whoever wants every frame wants those of every VLAN.
            nic.set_vlans((!promiscuous).then_some(vlans))?;
        }
        Ok(())
    }

    /// Announces the interface to others, if the device wants it. A later look does it if the last
    /// time was just before: a device could ask for it again and again, and it takes rtnl.
    fn announce_if_due(&self) {
        // The watch is one thread.
        let now = time::now();
        let last = self.announced.load(Ordering::Relaxed);
        if (last != 0 && now.saturating_sub(last) < ANNOUNCE)
            || !self.announce_wanted.swap(false, Ordering::Relaxed)
        {
            return;
        }
        self.announced.store(now, Ordering::Relaxed);
        // SAFETY: no caller holds rtnl, and the handle is valid as long as this.
        unsafe { ffi::shim_net_announce(self.dev) };
    }
}

impl Control {
    /// The queue pairs of a connection: those that were set, if the device still has so many.
    pub fn pairs(&self) -> u16 {
        self.settings.pairs.min(self.config.queue_pairs)
    }
}

/// Frees a pair's halves, if the device has let go of their memory.
fn free(halves: (KBox<TxQueue>, KBox<RxQueue>), let_go: bool) {
    if !let_go {
        // The device may still read the slots of the transmit half, and write the pages.
        core::mem::forget(halves);
        return;
    }
    let (tx, rx) = halves;
    tx.into_inner().release();
    rx.into_inner().release();
}

/// Tells the device the indirection table and the key. If the device has fewer queue pairs than
/// the table names, those that it has take turns.
fn set_rss(nic: &mut Nic<KernelHal>, rss: &Rss, config: &Config) -> Result<(), Error> {
    let all = hash_kind::IPV4
        | hash_kind::TCPV4
        | hash_kind::UDPV4
        | hash_kind::IPV6
        | hash_kind::TCPV6
        | hash_kind::UDPV6;
    let kinds = config.hash_kinds & all;
    let table = rss.within(config.queue_pairs);
    let table = table.get(..rss.entries().len()).unwrap_or_default();
    nic.set_rss(Some(&venet::Rss { kinds, key: rss.key, table }))
}

impl Watched for Net {
    fn hal(&self) -> &KernelHal {
        &self.hal
    }

    fn look(&self) -> Result<Events, Error> {
        let mut control = self.control();
        let Some(nic) = &control.nic else {
            // A connection that could not be opened again is tried again.
            let wanted = control.is_up && !control.is_asleep;
            return if wanted { Err(Error::Reincarnated) } else { Ok(Events::default()) };
        };
        let events = connection::look(nic.function())?;
        if self.fault.load(Ordering::Relaxed) {
            return Err(self.broke.lock().unwrap_or(Error::Corrupt("a queue")));
        }
        if self.timed_out.swap(false, Ordering::Relaxed) {
            dev_warn_limited!(
                self.hal.pci(),
                "the device does not take frames: its back end may be slow, or its rate is limited"
            );
        }
        if self.refresh(&mut control)? {
            self.announce_wanted.store(true, Ordering::Relaxed);
        }
        drop(control);
        self.announce_if_due();
        Ok(events)
    }

    fn lost(&self) {
        let _rtnl = Rtnl::lock();
        self.disconnect(&mut self.control());
        self.set_carrier(false);
    }

    fn reopen(&self) -> Result<(), Error> {
        let _rtnl = Rtnl::lock();
        let mut control = self.control();
        self.disconnect(&mut control);
        self.set_carrier(false);
        if !control.is_up || control.is_asleep {
            return Ok(());
        }
        self.connect(&mut control)?;
        // The device may be elsewhere in the network now. The next look announces the interface:
        // the kernel then knows that it has its carrier again, and sends.
        self.announce_wanted.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// The stack does not use the interface meanwhile.
    fn sleep(&self) {
        let _rtnl = Rtnl::lock();
        let mut control = self.control();
        control.is_asleep = true;
        // SAFETY: the handle is valid as long as this.
        unsafe { ffi::shim_net_detach(self.dev) };
        self.disconnect(&mut control);
        self.set_carrier(false);
    }

    fn wake(&self) -> Result<(), Error> {
        let _rtnl = Rtnl::lock();
        let mut control = self.control();
        control.is_asleep = false;
        let result = if control.is_up { self.connect(&mut control) } else { Ok(()) };
        // SAFETY: as above.
        unsafe { ffi::shim_net_attach(self.dev) };
        result
    }

    fn gone(&self) {
        self.set_carrier(false);
    }

    fn config_changed(&self) {}

    fn announce(&self) {
        self.announce_wanted.store(true, Ordering::Relaxed);
        self.announce_if_due();
    }
}

impl Class for Interface {
    fn suspend(&self) {
        self.net.suspend();
    }

    fn resume(&self) -> Result<(), Error> {
        self.net.resume()
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        self.net.pause();
        if self.is_registered {
            // SAFETY: this is the interface's end: it leaves the kernel, which sets it down before.
            unsafe { ffi::shim_net_unregister(self.net.dev) };
        }
        self.interrupts = KVec::new();
        self.events = None;
        self.net.watch.store(ptr::null_mut(), Ordering::Release);
        self.net.pause();
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        // The groups leave the interface before it is freed.
        self.groups = KVec::new();
        if !self.dev.is_null() {
            // SAFETY: the interface is not visible any more.
            unsafe { ffi::shim_net_free(self.dev) };
        }
    }
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Net")
    }
}

/// The number of a queue pair, of which there are 16 at most.
pub fn number(at: usize) -> u16 {
    u16::try_from(at).unwrap_or(u16::MAX)
}

/// The interface of a callback.
///
/// # Safety
/// `net` is what `shim_net_new` was given, and the interface is there.
pub unsafe fn of<'a>(net: *mut c_void) -> &'a Net {
    // SAFETY: by the caller's promise. A net is only shared.
    unsafe { &*net.cast::<Net>() }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_open(net: *mut c_void) -> c_int {
    // SAFETY: the shim passes the net, with rtnl.
    let net = unsafe { of(net) };
    let mut control = net.control();
    // Whatever was read before is from an earlier connection.
    control.status = NicStatus::default();
    if let Err(error) = net.connect(&mut control) {
        dev_err_limited!(net.hal.pci(), "the interface cannot be set up: {error}");
        return Errno::from(error).negative();
    }
    control.is_up = true;
    drop(control);
    net.look_soon();
    0
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_stop(net: *mut c_void) {
    // SAFETY: as above.
    let net = unsafe { of(net) };
    let mut control = net.control();
    control.is_up = false;
    net.disconnect(&mut control);
    net.set_carrier(false);
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_set_mac(net: *mut c_void, mac: *const u8) -> c_int {
    // SAFETY: as above, with an address of 6 bytes.
    let (net, mac) = unsafe { (of(net), *mac.cast::<[u8; 6]>()) };
    let mut control = net.control();
    if control.offered & F_MAC == 0 && mac != control.config.mac {
        return Errno::NOT_SUPPORTED.negative();
    }
    match &mut control.nic {
        Some(nic) if nic.function().features() & F_MAC != 0 => {
            Errno::result(nic.set_mac(mac).map_err(Errno::from))
        }
        // The device learns it when the interface is set up.
        _ => 0,
    }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_set_mtu(net: *mut c_void, mtu: u32) -> c_int {
    // SAFETY: as above.
    let control = unsafe { of(net) }.control();
    if control.settings.xdp && mtu > xdp_mtu_max() {
        return Errno::INVALID.negative();
    }
    0
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_set_features(net: *mut c_void, wanted: u32) -> c_int {
    // SAFETY: as above.
    let net = unsafe { of(net) };
    let mut control = net.control();
    let Control { nic, settings, .. } = &mut **control;
    let before = (settings.rx_csum, settings.rx_gso);
    (settings.rx_csum, settings.rx_gso) = (wanted & ffi::RX_CSUM != 0, wanted & ffi::RX_GSO != 0);
    let Some(nic) = nic else { return 0 };
    let accepted = nic.function().features() & F_RX;
    if accepted == 0 {
        return 0;
    }
    let result = nic.set_offloads(settings.offloads(accepted));
    if result.is_err() {
        (settings.rx_csum, settings.rx_gso) = before;
    }
    Errno::result(result.map_err(Errno::from))
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_vlan(net: *mut c_void, id: u16, on: bool) -> c_int {
    // SAFETY: as above.
    let net = unsafe { of(net) };
    let mut control = net.control();
    control.settings.set_vlan(id, on);
    let Control { nic: Some(nic), settings, .. } = &mut **control else { return 0 };
    let result = net.set_filter(nic, &settings.vlans);
    if on && result.is_err() {
        // The kernel has no such VLAN then.
        settings.set_vlan(id, false);
    }
    Errno::result(result.map_err(Errno::from))
}

/// The largest MTU with XDP: frames are in one piece.
fn xdp_mtu_max() -> u32 {
    const TAGS: u32 = 8;
    const ETHERNET: u32 = 14;
    const HEADER: u32 = 20;
    const { assert!(HEADER as usize == HASH_HEADER_BYTES && HASH_HEADER_BYTES > HEADER_BYTES) };
    XDP_BUFFER - HEADER - ETHERNET - TAGS
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_xdp(net: *mut c_void, on: bool) -> c_int {
    // SAFETY: as above.
    let net = unsafe { of(net) };
    let mut control = net.control();
    // SAFETY: the handle is valid.
    if on && unsafe { ffi::shim_net_mtu(net.dev) } > xdp_mtu_max() {
        return Errno::RANGE.negative();
    }
    control.settings.xdp = on;
    let result = net.reconnect(&mut control);
    if on && result.is_err() {
        control.settings.xdp = false;
    }
    Errno::result(result.map_err(Errno::from))
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_rx_mode(net: *mut c_void) {
    // SAFETY: the shim passes the net, in any context.
    let net = unsafe { of(net) };
    net.filter_changed.store(true, Ordering::Relaxed);
    net.look_soon();
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_tx_timeout(net: *mut c_void, index: u32) {
    // SAFETY: as above.
    let net = unsafe { of(net) };
    net.timed_out.store(true, Ordering::Relaxed);
    if let Some(pair) = net.pairs.get(index as usize) {
        // A poll looks for what has come back. If the device only is slow, nothing else is wrong.
        // SAFETY: the handles are this interface's.
        unsafe {
            ffi::shim_tx_touch(pair.shim());
            ffi::shim_group_schedule(pair.group());
        }
    }
    net.look_soon();
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_stats(net: *mut c_void, out: *mut ffi::Stats) {
    // SAFETY: as above, with a place for the statistics.
    let (net, out) = unsafe { (of(net), &mut *out) };
    for pair in &*net.pairs {
        let (rx, tx) = (&pair.rx_stats, &pair.tx_stats);
        out.rx_frames += rx.frames.get();
        out.rx_bytes += rx.bytes.get();
        out.rx_errors += rx.invalid.get();
        out.rx_dropped += rx.alloc_failed.get() + rx.xdp_dropped.get();
        out.tx_frames += tx.frames.get() + tx.xdp.get();
        out.tx_bytes += tx.bytes.get() + tx.xdp_bytes.get();
        out.tx_dropped += tx.dropped.get();
    }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_queue_stats(net: *mut c_void, index: u32, out: *mut ffi::QueueStats) {
    // SAFETY: as above.
    let (net, out) = unsafe { (of(net), &mut *out) };
    let Some(pair) = net.pairs.get(index as usize) else { return };
    let (rx, tx) = (&pair.rx_stats, &pair.tx_stats);
    *out = ffi::QueueStats {
        rx_frames: rx.frames.get(),
        rx_bytes: rx.bytes.get(),
        rx_alloc_failed: rx.alloc_failed.get(),
        tx_frames: tx.frames.get() + tx.xdp.get(),
        tx_bytes: tx.bytes.get() + tx.xdp_bytes.get(),
        tx_stops: tx.stops.get(),
        tx_wakes: tx.wakes.get(),
    };
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_xdp_xmit(
    net: *mut c_void,
    cpu: u32,
    frames: *mut Handle,
    count: c_int,
    flush: bool,
) -> c_int {
    // SAFETY: the shim passes that many frames.
    let (net, frames) = unsafe {
        let count = usize::try_from(count).unwrap_or(0);
        (of(net), core::slice::from_raw_parts(frames, count))
    };
    let used = net.pairs_used.load(Ordering::Relaxed);
    let Some(pair) = net.pairs.get(cpu as usize % used) else { return 0 };
    c_int::try_from(pair.xdp_xmit(frames, flush)).unwrap_or_default()
}
