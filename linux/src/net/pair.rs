// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A queue pair of the interface, and the group of pairs that one NAPI context serves. Both exist
//! as long as the interface. Their rings come and go with the connection.
#![allow(unsafe_code, reason = "locks and NAPI of the kernel guard the halves of a pair")]

use core::cell::UnsafeCell;
use core::ffi::{c_int, c_void};
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicBool, Ordering};

use vbus_driver::{Pace, Rest};

use super::ffi::{self, Handle};
use super::interface::Net;
use super::rx::RxQueue;
use super::stats::{Counter, RxStats, TxStats};
use super::tx::TxQueue;
use crate::kernel::alloc::NoMemory;
use crate::kernel::{KBox, KVec, time};

/// Frames that were sent are freed after this time at the latest, if the device has sent them, in
/// milliseconds.
const CLEAN: u32 = 10;
/// With much traffic, a group that has found nothing looks again after this time, in nanoseconds,
/// rather than to ask for an interrupt.
const NAP: u64 = 50_000;
/// A group that leaves its CPU to others does so for this time at most, in nanoseconds.
const SHARE_MAX: u64 = 1_000_000;
/// A small frame counts as so many bytes of traffic.
const FRAME_COUNTS: u64 = 512;

/// A queue pair.
pub struct Pair {
    /// Counters of the transmit half.
    pub tx_stats: TxStats,
    /// Counters of the receive half.
    pub rx_stats: RxStats,
    net: NonNull<Net>,
    shim: Handle,
    group: Handle,
    tx: UnsafeCell<Option<KBox<TxQueue>>>,
    rx: UnsafeCell<Option<KBox<RxQueue>>>,
    /// Frames are under way, and a timer looks after them.
    tx_busy: AtomicBool,
}

// SAFETY: the transmit half is for the holder of the transmit lock, the receive half for NAPI.
unsafe impl Send for Pair {}
// SAFETY: as above.
unsafe impl Sync for Pair {}

impl Pair {
    /// Pair `index` of interface `dev`, without rings. The caller may sleep.
    pub fn new(
        net: NonNull<Net>,
        dev: Handle,
        index: u32,
        group: Handle,
    ) -> Result<KBox<Self>, NoMemory> {
        let mut pair = KBox::new(Pair {
            tx_stats: TxStats::default(),
            rx_stats: RxStats::default(),
            net,
            shim: ptr::null_mut(),
            group,
            tx: UnsafeCell::new(None),
            rx: UnsafeCell::new(None),
            tx_busy: AtomicBool::new(false),
        })?;
        let this: *mut Pair = &raw mut *pair;
        // SAFETY: the pair stays at its place as long as the interface.
        let shim = unsafe { ffi::shim_queue_new(dev, index, this.cast(), group) };
        pair.shim = NonNull::new(shim).ok_or(NoMemory)?.as_ptr();
        Ok(pair)
    }

    /// The handle.
    pub fn shim(&self) -> Handle {
        self.shim
    }

    /// The handle of the pair's group.
    pub fn group(&self) -> Handle {
        self.group
    }

    /// Puts the halves in. NAPI is disabled, and the stack sends nothing.
    pub fn install(&self, tx: KBox<TxQueue>, rx: KBox<RxQueue>) {
        // SAFETY: the lock is the transmit half's; NAPI, whose the receive half is, is disabled.
        unsafe {
            ffi::shim_tx_reset(self.shim);
            ffi::shim_tx_lock_bh(self.shim);
            *self.tx.get() = Some(tx);
            ffi::shim_tx_unlock_bh(self.shim);
            *self.rx.get() = Some(rx);
        }
    }

    /// Takes the halves out, with NAPI disabled.
    pub fn uninstall(&self) -> Option<(KBox<TxQueue>, KBox<RxQueue>)> {
        // SAFETY: as in `install`.
        let (tx, rx) = unsafe {
            ffi::shim_tx_lock_bh(self.shim);
            let tx = (*self.tx.get()).take();
            ffi::shim_tx_unlock_bh(self.shim);
            (tx, (*self.rx.get()).take())
        };
        self.tx_busy.store(false, Ordering::Relaxed);
        Some((tx?, rx?))
    }

    /// From now on frames of at most so many bytes are copied to be sent. In a thread.
    pub fn set_copybreak(&self, bytes: u32) {
        // SAFETY: the lock is the transmit half's.
        unsafe {
            ffi::shim_tx_lock_bh(self.shim);
            if let Some(tx) = &mut *self.tx.get() {
                tx.set_copybreak(bytes);
            }
            ffi::shim_tx_unlock_bh(self.shim);
        }
    }

    /// Lets `work` have the transmit half, if there is one. In NAPI.
    pub fn with_tx<R>(&self, work: impl FnOnce(&mut TxQueue) -> R) -> Option<R> {
        // SAFETY: the lock is the transmit half's.
        unsafe {
            ffi::shim_tx_lock(self.shim);
            let result = (*self.tx.get()).as_mut().map(|tx| work(tx));
            ffi::shim_tx_unlock(self.shim);
            result
        }
    }

    /// As [`with_tx`](Self::with_tx), but without a wait for the transmit lock: somebody whom this
    /// has interrupted may have it.
    fn try_tx<R>(&self, work: impl FnOnce(&mut TxQueue) -> R) -> Option<R> {
        // SAFETY: the lock is the transmit half's.
        unsafe {
            if !ffi::shim_tx_trylock(self.shim) {
                return None;
            }
            let result = (*self.tx.get()).as_mut().map(|tx| work(tx));
            ffi::shim_tx_unlock(self.shim);
            result
        }
    }

    /// Sends a frame of the stack. False: the stack keeps it.
    ///
    /// # Safety
    /// The caller has the transmit lock.
    unsafe fn xmit(&self, frame: &mut ffi::TxFrame) -> bool {
        // SAFETY: by the caller's promise.
        let Some(tx) = (unsafe { (*self.tx.get()).as_mut() }) else {
            self.tx_stats.dropped.add(1);
            // SAFETY: the stack has given the frame to this queue.
            unsafe { ffi::shim_tx_drop(frame.skb) };
            return true;
        };
        let taken = tx.xmit(frame, &self.tx_stats);
        let (busy, fault) = (tx.is_busy(), tx.fault());
        self.look_after(busy);
        if let Some(error) = fault {
            self.net().fault(error);
        }
        taken
    }

    /// Lets a timer look after frames under way.
    fn look_after(&self, busy: bool) {
        // Both are written by the holder of the transmit lock only. A poll that reads too early
        // leaves the frames to the timer.
        if busy && !self.tx_busy.load(Ordering::Relaxed) {
            self.tx_busy.store(true, Ordering::Relaxed);
            // SAFETY: the handle is valid as long as this.
            unsafe { ffi::shim_group_later(self.group, CLEAN) };
        }
    }

    /// Frees what the device has sent. In NAPI, or with a budget of 0 by netpoll: in any context,
    /// for a message of the kernel.
    fn clean(&self, budget: c_int) {
        if !self.tx_busy.load(Ordering::Relaxed) {
            return;
        }
        let work = |tx: &mut TxQueue| {
            tx.reclaim(&self.tx_stats, budget);
            if !tx.is_busy() {
                self.tx_busy.store(false, Ordering::Relaxed);
            }
            (tx.is_busy(), tx.fault())
        };
        let state = if budget == 0 { self.try_tx(work) } else { self.with_tx(work) };
        let Some((busy, fault)) = state else { return };
        if busy {
            // SAFETY: the handle is valid as long as this.
            unsafe { ffi::shim_group_later(self.group, CLEAN) };
        }
        if let Some(error) = fault {
            self.net().fault(error);
        }
    }

    /// Sends frames of XDP from elsewhere: how many were taken.
    pub fn xdp_xmit(&self, frames: &[Handle], flush: bool) -> usize {
        // The lock is for NAPI and for whoever else runs in its place: they do not interrupt.
        let sent = self.with_tx(|tx| {
            tx.reclaim(&self.tx_stats, 0);
            let mut sent = 0;
            for frame in frames {
                if !tx.send_xdp(*frame, &self.tx_stats) {
                    break;
                }
                sent += 1;
            }
            if flush {
                tx.post(&self.tx_stats);
            }
            self.look_after(tx.is_busy());
            sent
        });
        sent.unwrap_or(0)
    }

    fn net(&self) -> &Net {
        // SAFETY: the interface is there as long as its pairs.
        unsafe { self.net.as_ref() }
    }
}

/// The pairs that one NAPI context serves.
pub struct Group {
    net: NonNull<Net>,
    shim: Handle,
    pairs: KVec<NonNull<Pair>>,
    /// The vector of the pairs is that of the function's events too.
    shares_vector: bool,
    /// An interrupt has come that nobody has found the reason of.
    interrupted: AtomicBool,
    /// Interrupts of this group.
    pub interrupts: Counter,
    own: UnsafeCell<Own>,
}

/// What belongs to the poll.
struct Own {
    pace: Pace,
    carried: u64,
    /// The sum of the counters of bytes at the last poll.
    bytes: u64,
    /// When the poll began that has not rested since.
    since: Option<u64>,
}

// SAFETY: what is not shared belongs to NAPI, which runs in one thread at a time.
unsafe impl Send for Group {}
// SAFETY: as above.
unsafe impl Sync for Group {}

impl Group {
    /// Group `index` of interface `dev`, without pairs. The caller may sleep.
    pub fn new(
        net: NonNull<Net>,
        dev: Handle,
        index: u32,
        shares_vector: bool,
    ) -> Result<KBox<Self>, NoMemory> {
        let mut group = KBox::new(Group {
            net,
            shim: ptr::null_mut(),
            pairs: KVec::new(),
            shares_vector,
            interrupted: AtomicBool::new(false),
            interrupts: Counter::default(),
            own: UnsafeCell::new(Own {
                pace: Pace::new(NAP, NAP),
                carried: 0,
                bytes: 0,
                since: None,
            }),
        })?;
        let this: *mut Group = &raw mut *group;
        // SAFETY: the group stays at its place as long as the interface.
        let shim = unsafe { ffi::shim_group_new(dev, index, this.cast()) };
        group.shim = NonNull::new(shim).ok_or(NoMemory)?.as_ptr();
        Ok(group)
    }

    /// Adds a pair, before the interface is visible. The pair lives as long as the group.
    pub fn add(&mut self, pair: NonNull<Pair>) -> Result<(), NoMemory> {
        self.pairs.push(pair)
    }

    /// The handle.
    pub fn shim(&self) -> Handle {
        self.shim
    }

    /// An interrupt has come, in hard interrupt context.
    pub fn interrupt(&self) {
        self.interrupts.add(1);
        if self.shares_vector {
            self.interrupted.store(true, Ordering::Relaxed);
        }
        // SAFETY: the handle is valid as long as this.
        unsafe { ffi::shim_group_schedule(self.shim) };
    }

    /// Whether the vector of the pairs is that of the function's events too.
    pub fn shares(&self) -> bool {
        self.shares_vector
    }

    fn pairs(&self) -> impl Iterator<Item = &Pair> {
        // SAFETY: the pairs live as long as the group.
        self.pairs.iter().map(|pair| unsafe { pair.as_ref() })
    }

    /// The poll of NAPI.
    fn poll(&self, budget: c_int) -> c_int {
        self.pairs().for_each(|pair| pair.clean(budget));
        let Ok(budget @ 1..) = u32::try_from(budget) else { return 0 };
        self.begin();
        let (mut done, mut redirected, mut again) = (0, false, false);
        let mut bytes = 0u64;
        for pair in self.pairs() {
            // SAFETY: the receive half belongs to NAPI.
            let Some(rx) = (unsafe { (*pair.rx.get()).as_mut() }) else { continue };
            let polled = rx.poll(budget - done, pair);
            done += polled.frames;
            redirected |= polled.redirected;
            // What goes out counts too: its acknowledgements come soon.
            bytes = bytes.wrapping_add(pair.rx_stats.bytes.get());
            bytes = bytes.wrapping_add(pair.tx_stats.bytes.get());
            if polled.sent {
                pair.with_tx(|tx| {
                    tx.post(&pair.tx_stats);
                    pair.look_after(tx.is_busy());
                });
            }
        }
        if redirected {
            // SAFETY: it has no conditions, in NAPI.
            unsafe { ffi::shim_xdp_flush() };
        }
        if done >= budget {
            return self.share(budget);
        }
        if self.shares_vector && self.interrupted.swap(false, Ordering::Relaxed) && done == 0 {
            // The interrupt may have been for an event.
            self.net().look_soon();
        }
        let nap = self.nap(done, bytes);
        if nap.is_none() {
            for pair in self.pairs() {
                // SAFETY: as above.
                let Some(rx) = (unsafe { (*pair.rx.get()).as_mut() }) else { continue };
                again |= rx.arm(&pair.rx_stats);
                if let Some(error) = rx.fault() {
                    self.net().fault(error);
                }
            }
        }
        if again {
            // Frames have come meanwhile.
            return budget as c_int;
        }
        // SAFETY: the handle is valid as long as this.
        let completed = unsafe { ffi::shim_group_complete(self.shim, done as c_int) };
        if let (Some(nanoseconds), true) = (nap, completed) {
            // SAFETY: as above.
            unsafe { ffi::shim_group_nap(self.shim, nanoseconds) };
        }
        done as c_int
    }

    /// Notes when the poll began, if it has rested.
    fn begin(&self) {
        // SAFETY: it belongs to the poll.
        let own = unsafe { &mut *self.own.get() };
        own.since.get_or_insert_with(time::now);
    }

    /// What the poll returns that has more to do. Frames may come faster than tasks take them from
    /// their sockets. If the poll went on, the tasks would have no CPU, and the stack would throw
    /// away what the poll has received. So the poll rests as long as it has worked, if a task waits
    /// for the CPU. Then the device throws frames away, which costs the guest nothing.
    fn share(&self, budget: u32) -> c_int {
        // SAFETY: it belongs to the poll.
        let own = unsafe { &mut *self.own.get() };
        let worked = own.since.map_or(0, |since| time::now().saturating_sub(since));
        // SAFETY: it has no conditions, in NAPI.
        if worked < NAP || !unsafe { ffi::shim_others_wait() } {
            return budget as c_int;
        }
        own.since = None;
        // NAPI takes a poll with a whole budget for one that goes on.
        let done = budget as c_int - 1;
        // SAFETY: the handle is valid as long as this.
        unsafe {
            if ffi::shim_group_complete(self.shim, done) {
                ffi::shim_group_nap(self.shim, worked.min(SHARE_MAX));
            }
        }
        done
    }

    /// How long to look away, rather than to ask for an interrupt. `bytes` is the sum of the
    /// counters of bytes.
    fn nap(&self, frames: u32, bytes: u64) -> Option<u64> {
        // SAFETY: it belongs to the poll.
        let own = unsafe { &mut *self.own.get() };
        let carried = bytes.wrapping_sub(core::mem::replace(&mut own.bytes, bytes));
        own.carried = own.carried.wrapping_add(carried + u64::from(frames) * FRAME_COUNTS);
        own.since = None;
        if frames != 0 {
            own.pace.busy();
        }
        match own.pace.rest(time::now(), own.carried) {
            Rest::Nap(nanoseconds) => Some(nanoseconds),
            Rest::Poll | Rest::Sleep => None,
        }
    }

    fn net(&self) -> &Net {
        // SAFETY: the interface is there as long as its groups.
        unsafe { self.net.as_ref() }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.shim.is_null() {
            // SAFETY: the interface is not visible any more, and nobody uses the handle again.
            unsafe { ffi::shim_group_free(self.shim) };
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_xmit(pair: *mut c_void, frame: *mut ffi::TxFrame) -> bool {
    // SAFETY: the shim passes a pair of `shim_queue_new`, with its transmit lock, and a frame.
    unsafe { (*pair.cast::<Pair>()).xmit(&mut *frame) }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_poll(group: *mut c_void, budget: c_int) -> c_int {
    // SAFETY: the shim passes a group of `shim_group_new`, in its poll.
    unsafe { &*group.cast::<Group>() }.poll(budget)
}
