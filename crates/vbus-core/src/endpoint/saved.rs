// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Stops a device, takes its state, and lets another one go on from it (spec/state-format.md).

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vbus_shm::ErrorCode;
use vbus_shm::abi::{command, event, reg};

use super::{Endpoint, Inner, OpenRegion, PAGE_SHIFT_MAX, PAGE_SHIFT_MIN};
use crate::call::PendingCall;
use crate::device::Region;
use crate::lock::lock;
use crate::state::{
    ConnectionPart, DeviceState, NotRestored, NotSaved, OpenPart, Place, RegionPart, error_code,
};

/// How long [`Endpoint::quiesce`] waits for a call that takes time.
const CALL_WAIT: Duration = Duration::from_secs(5);

/// How far the config area's generation may go on after a state that outlasts the process: the next
/// device begins behind it.
const GENERATIONS: u32 = 1 << 16;

/// The bits of the events that a device has.
const EVENTS: u32 = event::CONFIG
    | event::BROKEN
    | event::REMOVED
    | event::ANNOUNCE
    | event::COMMAND
    | event::INCARNATION;

impl Endpoint {
    /// Stops the device between two polls. When this returns, nothing of the device touches the
    /// driver's memory or the back end, until [`resume`](Self::resume). Doorbells, timers and what
    /// others deliver wait. A call that takes time is waited for, up to 5 seconds; so this may
    /// block. A device without a driver, or whose connection is broken, can be quiesced too.
    ///
    /// The connector passes no command of the driver on meanwhile: OPEN, REGION_ADD, REGION_DROP
    /// and CALL fail with [`ErrorCode::FAILED`]. It may end the connection, and the driver's memory
    /// may be unmapped. Calling this again changes nothing.
    ///
    /// # Errors
    /// The call did not end in time. The device goes on as if nobody had asked.
    pub fn quiesce(&self) -> Result<(), NotSaved> {
        self.quiesce_by(Instant::now() + CALL_WAIT)
    }

    /// As [`quiesce`](Self::quiesce), but it waits for a call until `by`.
    ///
    /// # Errors
    /// As for `quiesce`.
    pub fn quiesce_by(&self, by: Instant) -> Result<(), NotSaved> {
        let begun = Instant::now();
        loop {
            let inner = lock(&self.inner);
            if let Some(call) = running_call(&inner) {
                // Its end may need the tasks, and a command that cancels it needs the lock.
                drop(inner);
                if !call.wait(by.saturating_duration_since(Instant::now())) {
                    let seconds = begun.elapsed().as_secs_f64();
                    return Err(self.not_saved(format!(
                        "a call of its driver has not ended within {seconds:.1} s"
                    )));
                }
                continue;
            }
            self.stand_still();
            drop(inner);
            return Ok(());
        }
    }

    /// As [`quiesce_by`](Self::quiesce_by), for a state that outlasts this process, which may then
    /// be killed at any time ([`Device::outlast`](crate::Device::outlast)). Until
    /// [`resume`](Self::resume), [`save`](Self::save) returns such a state.
    ///
    /// # Errors
    /// As for `quiesce`.
    pub fn quiesce_to_outlast(&self, by: Instant) -> Result<(), NotSaved> {
        self.quiesce_by(by)?;
        self.outlasts.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Whether what is saved now outlasts this process
    /// ([`quiesce_to_outlast`](Self::quiesce_to_outlast)).
    pub fn is_saved_to_outlast(&self) -> bool {
        self.outlasts.load(Ordering::Relaxed)
    }

    /// [`quiesce`](Self::quiesce) of a device that no driver has opened.
    pub(crate) fn quiesce_now(&self) {
        let _inner = lock(&self.inner);
        self.stand_still();
    }

    /// The caller holds the lock of `inner`.
    fn stand_still(&self) {
        if !self.quiesced.swap(true, Ordering::Relaxed) {
            self.executor().halt(self.counters());
            self.contain(|| self.device.quiesce());
        }
    }

    /// Lets a quiesced device go on, also one that was restored: it looks at everything that may
    /// have happened meanwhile.
    pub fn resume(&self) {
        let _inner = lock(&self.inner);
        self.outlasts.store(false, Ordering::Relaxed);
        if self.quiesced.swap(false, Ordering::Relaxed) {
            self.contain(|| self.device.resume());
            self.executor().go_on(self.counters());
        }
    }

    /// Whether the device is quiesced. Relaxed: it changes under the lock of `inner`, and those
    /// who look hold that lock or ask for people.
    pub fn is_quiesced(&self) -> bool {
        self.quiesced.load(Ordering::Relaxed)
    }

    /// Refuses a command while the device is quiesced.
    pub(super) fn check_not_quiesced(&self) -> Result<(), ErrorCode> {
        if self.is_quiesced() {
            tracing::error!(device = self.name(), "a command came while the device is quiesced");
            return Err(ErrorCode::FAILED);
        }
        Ok(())
    }

    fn not_saved(&self, why: impl Into<String>) -> NotSaved {
        let (device, class) = (self.name().to_owned(), self.identity.class_name.to_owned());
        NotSaved { device, class, why: why.into() }
    }

    fn not_restored(&self, why: impl Into<String>) -> NotRestored {
        let (device, class) = (self.name().to_owned(), self.identity.class_name.to_owned());
        NotRestored { device, class, why: why.into() }
    }

    /// The state of the device and of its connection. The device must be quiesced. This changes
    /// nothing: after [`resume`](Self::resume) the device goes on as if nobody had asked. A device
    /// whose driver reaches it through a PCI function is saved through the function, which has
    /// registers of its own.
    ///
    /// # Errors
    /// The device is not quiesced, or its class has no saved state, or cannot be saved now.
    pub fn save(&self) -> Result<DeviceState, NotSaved> {
        let inner = lock(&self.inner);
        if !self.is_quiesced() {
            return Err(self.not_saved("it is not quiesced"));
        }
        self.host.doorbells().count_eventfds();
        let connection = match &*inner {
            Inner::Closed => ConnectionPart::Closed,
            Inner::Broken(code) => ConnectionPart::Broken { code: code.0 },
            Inner::Removed => return Err(self.not_saved("it has left its bus")),
            Inner::Open(open) => {
                let save = || lock(&open.connection).save();
                let state = self.contain(save).unwrap_or_else(|| Err(PANICKED.into()));
                let regions = open.regions.iter().flatten().map(|region| region.part.clone());
                ConnectionPart::Open(OpenPart {
                    version: open.version,
                    features: open.features,
                    regions: regions.collect(),
                    state: state.map_err(|why| self.not_saved(why))?,
                })
            }
        };
        let device = self.contain(|| self.device.save()).unwrap_or_else(|| Err(PANICKED.into()));
        let (incarnation, config, events) = self.events.save();
        let state = DeviceState {
            class: self.identity.class_name.to_owned(),
            regions: self.identity.regions,
            vectors: self.identity.vectors,
            incarnation,
            config,
            events,
            counters: self.counters().save(),
            connection,
            device: device.map_err(|why| self.not_saved(why))?,
        };
        match self.outlasts.load(Ordering::Relaxed) {
            true => self.outlast(state),
            false => Ok(state),
        }
    }

    /// Takes out of a state what only holds at this moment.
    fn outlast(&self, mut state: DeviceState) -> Result<DeviceState, NotSaved> {
        let connection = match &mut state.connection {
            ConnectionPart::Open(open) => Some(&mut open.state),
            ConnectionPart::Closed | ConnectionPart::Broken { .. } => None,
        };
        let outlast = || self.device.outlast(&mut state.device, connection);
        let done = self.contain(outlast).unwrap_or_else(panicked);
        done.map_err(|why| self.not_saved(why))?;
        // The config area may change without a word of the driver's. It looks at the area again.
        if state.events.vector.is_some() {
            state.events.pending |= event::CONFIG;
            state.config.generation = state.config.generation.wrapping_add(GENERATIONS);
        }
        Ok(state)
    }

    /// Goes on from the state of a device of the same class with the same settings. This device is
    /// a fresh one that nobody has used, and it is quiesced
    /// ([`Bus::create_quiesced`](crate::Bus::create_quiesced)). The peer's memory is mapped. The
    /// driver gets an interrupt on every vector that it uses, because the last one may have been
    /// lost. Devices whose interrupts another one carries ([`Router`](crate::Router)) are restored
    /// before that one goes on. The device goes on with [`resume`](Self::resume).
    ///
    /// The state may be forged. What it says is checked as what a driver says.
    ///
    /// # Errors
    /// The state is wrong or does not fit the device. No connection is open then. Other values may
    /// be those of the state: use a new device.
    pub fn restore(&self, state: &DeviceState) -> Result<(), NotRestored> {
        let vectors = self.take_over(state).map_err(|why| self.not_restored(why))?;
        for vector in vectors {
            self.host.interrupt(vector).trigger();
        }
        tracing::info!(device = self.name(), "restored");
        Ok(())
    }

    /// [`restore`](Self::restore) without the interrupts: returns the vectors that the driver uses.
    fn take_over(&self, state: &DeviceState) -> Result<Vec<u16>, String> {
        let mut inner = lock(&self.inner);
        if !self.is_quiesced() || !matches!(*inner, Inner::Closed) {
            return Err("it is not a fresh device that is quiesced".into());
        }
        let identity = &self.identity;
        if state.class != identity.class_name {
            return Err(format!("the state is of a device of class {:?}", state.class));
        }
        if (state.regions, state.vectors) != (identity.regions, identity.vectors) {
            return Err(format!(
                "the state is of a device with {} regions and {} vectors; this one has {} and {}",
                state.regions, state.vectors, identity.regions, identity.vectors
            ));
        }
        if state.incarnation == 0 {
            return Err("incarnation is 0".into());
        }
        if state.config.bytes.len() > reg::CONFIG_MAX {
            return Err(format!("config has {} bytes", state.config.bytes.len()));
        }
        let vector = state.events.vector;
        let is_open = matches!(state.connection, ConnectionPart::Open(_));
        if state.events.pending & !EVENTS != 0
            || vector.is_some_and(|vector| vector >= identity.vectors)
            || (vector.is_none() && (is_open || state.events.pending != 0))
        {
            return Err("events are none that the device can have".into());
        }
        self.contain(|| self.device.restore(&state.device)).unwrap_or_else(panicked)?;
        self.counters().restore(&state.counters)?;
        self.events.restore(state.incarnation, &state.config, &state.events);
        let mut vectors: Vec<u16> = vector.into_iter().collect();
        let result = match &state.connection {
            ConnectionPart::Closed => Ok(()),
            ConnectionPart::Broken { code } => error_code(*code).map(|code| {
                *inner = Inner::Broken(code);
                self.publish(&inner, 0);
            }),
            ConnectionPart::Open(open) => {
                vectors.extend(open.regions.iter().map(|region| region.vector));
                self.reopen(&mut inner, open)
            }
        };
        if let Err(why) = result {
            self.host.doorbells().detach_all();
            self.host.outlet().close(false);
            self.events.close();
            return Err(why);
        }
        vectors.sort_unstable();
        vectors.dedup();
        Ok(vectors)
    }

    /// Makes the connection of the state.
    fn reopen(&self, inner: &mut Inner, part: &OpenPart) -> Result<(), String> {
        let OpenPart { version, features, .. } = *part;
        if !self.versions.contains(version) {
            return Err(format!("version {version} of the ABI; the device has {}", self.versions));
        }
        if features & !self.identity.features != 0 {
            let offered = self.identity.features;
            return Err(format!("features {features:#x}; the device offers {offered:#x}"));
        }
        let mut handles: Vec<Option<OpenRegion>> =
            (0..self.identity.regions).map(|_| None).collect();
        let mut regions = Vec::new();
        for part in &part.regions {
            let handle = part.handle;
            let slot = handles.get_mut(handle as usize).filter(|slot| slot.is_none());
            let slot =
                slot.ok_or_else(|| format!("region {handle} is twice there, or not known"))?;
            let region = self.region(part).map_err(|error| format!("region {handle}: {error}"))?;
            regions.push(region);
            let ranges = part.place.ranges(part.len);
            *slot = Some(OpenRegion { part: part.clone(), ranges });
        }
        regions.sort_unstable_by_key(|region| region.handle);
        // The tasks that the device runs from here on stand still until the device goes on.
        let (open, generation) = self.begin(version, features);
        let fail = open.fail.clone();
        self.host.outlet().open();
        let bells: Vec<_> = regions.iter().map(|region| region.doorbell.clone()).collect();
        let reopen = || self.device.reopen(open, regions, &part.state);
        let connection = self.contain(reopen).unwrap_or_else(panicked)?;
        let open = self.run(connection, fail, (version, features), generation, handles);
        let unbound = |bell: &&crate::Doorbell| !self.host.doorbells().is_bound(bell.number());
        let bound = bells.iter().filter(unbound).try_for_each(|bell| bell.bind(&open.task));
        if let Err(error) = bound {
            open.task.stop();
            self.contain(|| drop(open.connection));
            return Err(format!("a doorbell cannot be watched: {error}"));
        }
        *inner = Inner::Open(open);
        self.publish(inner, features);
        Ok(())
    }

    /// Maps a region of the state.
    fn region(&self, part: &RegionPart) -> Result<Region, ErrorCode> {
        let addr = match &part.place {
            Place::At(addr) => *addr,
            // A list of pages was read when the driver added the region.
            Place::Pages { .. } => 0,
        };
        let signal_offset = self.check_shape(part.vector, addr, part.len, part.signal)?;
        match &part.place {
            Place::At(_) => {}
            Place::Pages { shift, pages } => {
                if !(PAGE_SHIFT_MIN..=PAGE_SHIFT_MAX).contains(shift) {
                    return Err(ErrorCode::BAD_ARGUMENT);
                }
                let count = part.len.div_ceil(1 << shift);
                if count > command::PAGES_MAX || pages.len() as u64 != count {
                    return Err(ErrorCode::LIMIT);
                }
            }
        }
        Ok(Region {
            id: part.id,
            handle: part.handle,
            window: self.window(&part.place, part.len)?,
            signal_offset,
            interrupt: self.host.interrupt(part.vector),
            doorbell: self.host.doorbells().doorbell(part.handle),
        })
    }
}

/// What a class that panicked gets for an error.
const PANICKED: &str = "the class panicked; see the log";

fn panicked<T>() -> Result<T, String> {
    Err(PANICKED.into())
}

/// The call that the class has not answered.
fn running_call(inner: &Inner) -> Option<PendingCall> {
    let Inner::Open(open) = inner else { return None };
    open.call.clone().filter(|call| call.result().is_none())
}
