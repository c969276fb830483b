// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The watch over a connection: what every class does about the events of its function
//! (spec/pci.md, "Events" and "Incarnations").
//!
//! A class calls [`Watch::soon`] when an interrupt may have been for an event. The watch then takes
//! the events, in a thread that may sleep. It also looks by itself every few seconds, because a
//! function that was reset or restored from a snapshot tells nothing. A connection that is lost is
//! opened again, with pauses that grow. So a device that breaks each connection costs little, and
//! its messages are few, three for each try at most: they need no limit that other devices share.
#![allow(unsafe_code, reason = "the watch's work refers to its state")]

use core::fmt;
use core::ops::Deref;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use vbus_driver::{Error, ErrorCode, Events, Function};

use crate::hal::KernelHal;
use crate::kernel::KBox;
use crate::kernel::alloc::NoMemory;
use crate::kernel::time;
use crate::kernel::work::Work;
use crate::{dev_info, dev_warn};

/// How often the watch looks by itself, in milliseconds.
const PERIOD: u32 = 2000;
/// The shortest pause after a try to open a lost connection, until the next one, in milliseconds.
const PAUSE: u32 = 500;
/// The longest such pause, in milliseconds.
const PAUSE_MAX: u32 = 30_000;
/// A connection that has been good for so long is no failure, in nanoseconds.
const GOOD: u64 = PAUSE_MAX as u64 * MILLISECOND;
const MILLISECOND: u64 = 1_000_000;

/// What a class does about events. The watch calls these from one thread at a time, which may
/// sleep.
pub trait Watched: Send + Sync {
    /// The environment of the class's function.
    fn hal(&self) -> &KernelHal;

    /// Takes the pending events, and checks the connection, by [`look`](crate::connection::look).
    /// There are no events if the class has no connection now, for instance because the system
    /// sleeps.
    fn look(&self) -> Result<Events, Error>;

    /// The connection is lost. [`reopen`](Self::reopen) may follow late: the device is to be left
    /// alone until then, as far as that costs little.
    fn lost(&self) {}

    /// Closes what is left of the connection, opens it again, and repeats all settings. After
    /// [`sleep`](Self::sleep) it opens nothing: a look may be in progress meanwhile.
    fn reopen(&self) -> Result<(), Error>;

    /// Ends the connection until [`wake`](Self::wake). The watch was paused, but an interrupt may
    /// have asked for a look since.
    fn sleep(&self);

    /// Opens the connection again after [`sleep`](Self::sleep), with all settings.
    fn wake(&self) -> Result<(), Error>;

    /// The device has gone, or leaves the bus. The function may come back, by
    /// [`reopen`](Self::reopen).
    fn gone(&self);

    /// The config area has changed.
    fn config_changed(&self);

    /// The class is asked to announce itself to others.
    fn announce(&self);
}

/// The watch over the connection of a class. It owns what it watches. Dropping it ends the watch,
/// and then drops what it has watched. No method of [`Watched`] may drop it: it would wait for
/// itself.
pub struct Watch<T: Watched> {
    // Dropped before what it refers to.
    work: Work<State<T>>,
    state: KBox<State<T>>,
}

struct State<T> {
    target: KBox<T>,
    /// Tries to open since a connection was good for a while.
    failures: AtomicU32,
    /// When the last of them ended.
    tried: AtomicU64,
    /// The connection is not known to be lost.
    well: AtomicBool,
    gone: AtomicBool,
}

impl<T: Watched> Watch<T> {
    /// A watch that does not look yet. The target stays at its place. The caller may sleep.
    pub fn new(target: KBox<T>) -> Result<Self, NoMemory> {
        let state = KBox::new(State {
            target,
            failures: AtomicU32::new(0),
            tried: AtomicU64::new(0),
            well: AtomicBool::new(true),
            gone: AtomicBool::new(false),
        })?;
        // SAFETY: the state is at its place until the work is dropped, which is before it.
        let work = unsafe { Work::new(NonNull::from(&*state), run::<T>) }?;
        Ok(Self { work, state })
    }

    /// Looks soon, and every few seconds from then on. From any context.
    pub fn soon(&self) {
        self.work.run_after(0);
    }

    /// Does not look any more, until [`soon`](Self::soon). It waits for a look that is in progress.
    pub fn pause(&self) {
        self.work.cancel();
    }

    /// Ends the connection, and does not look any more, until [`resume`](Self::resume).
    pub fn suspend(&self) {
        self.pause();
        self.sleep();
    }

    /// Opens the connection again after [`suspend`](Self::suspend). If that fails, the watch tries
    /// it again.
    pub fn resume(&self) -> Result<(), Error> {
        let result = self.wake();
        self.soon();
        result
    }
}

impl<T: Watched> Deref for Watch<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.state.target
    }
}

impl<T: Watched> fmt::Debug for Watch<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

/// Looks once. Returns the milliseconds until the next look.
fn run<T: Watched>(state: &State<T>) -> Option<u32> {
    let target = &*state.target;
    let pci = target.hal().pci();
    let error = match target.look() {
        Ok(events) if events.removed() => Error::Broken(ErrorCode::REMOVED),
        Ok(events) => {
            if events.config_changed() {
                target.config_changed();
            }
            if events.announce() {
                target.announce();
            }
            // Within the pause a device may look good and bad in turn, as fast as it interrupts.
            if left(state) == 0 {
                state.well.store(true, Ordering::Relaxed);
            }
            if since(&state.tried) >= GOOD {
                state.failures.store(0, Ordering::Relaxed);
            }
            return Some(PERIOD);
        }
        Err(error) => error,
    };
    if !is_back(target.hal()) || error == Error::Broken(ErrorCode::REMOVED) {
        if !state.gone.swap(true, Ordering::Relaxed) {
            dev_warn!(pci, "the device has left the bus");
            target.gone();
        }
        return Some(PERIOD);
    }
    if state.well.swap(false, Ordering::Relaxed) {
        dev_warn!(pci, "{error}; the driver opens it again");
        target.lost();
    }
    // The first try is at once. A look that was asked for does not make the others earlier: the
    // device may ask for it by its interrupts.
    let left = left(state);
    if left != 0 {
        return u32::try_from(left.div_ceil(MILLISECOND)).ok();
    }
    state.gone.store(false, Ordering::Relaxed);
    let result = target.reopen();
    let failures = state.failures.load(Ordering::Relaxed).saturating_add(1);
    state.failures.store(failures, Ordering::Relaxed);
    state.tried.store(time::now(), Ordering::Relaxed);
    match result {
        Ok(()) => {
            dev_info!(pci, "the device is open again");
            state.well.store(true, Ordering::Relaxed);
            Some(PERIOD)
        }
        Err(error) => {
            let pause = pause(failures);
            dev_warn!(
                pci,
                "the device cannot be opened again: {error}; the next try is in {pause} ms"
            );
            Some(pause)
        }
    }
}

/// The pause after so many tries, in milliseconds.
fn pause(tries: u32) -> u32 {
    match tries.checked_sub(1) {
        None => 0,
        Some(doubled) => PAUSE_MAX.min(PAUSE << doubled.min(10)),
    }
}

/// The nanoseconds that are left of the pause.
fn left<T>(state: &State<T>) -> u64 {
    let pause = u64::from(pause(state.failures.load(Ordering::Relaxed))) * MILLISECOND;
    pause.saturating_sub(since(&state.tried))
}

/// Nanoseconds since a time.
fn since(then: &AtomicU64) -> u64 {
    time::now().saturating_sub(then.load(Ordering::Relaxed))
}

/// Whether the function has its registers. A reset from outside may have taken BAR and Memory Space
/// away, and then they are set again.
fn is_back(hal: &KernelHal) -> bool {
    let has_registers = || Function::probe(hal.clone()).is_ok();
    if has_registers() {
        // A reset clears Bus Master too, without which the device does not open.
        hal.pci().set_master(true);
        return true;
    }
    if !hal.pci().is_there() {
        return false;
    }
    hal.pci().restore();
    has_registers()
}
