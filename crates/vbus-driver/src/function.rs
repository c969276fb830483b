// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One function of the bus: probe, open, regions, calls (spec/pci.md, "Registers" and "Commands").

use core::fmt;

use vbus_shm::Memory;
use vbus_shm::abi::{bar0, capability, command, error_code, event, reg};
use vbus_shm::signal::Kick;
use vbus_shm::signal::end::Driver;
use vbus_shm::sync::Ordering;
use vbus_shm::{ErrorCode, Versions};

use crate::costs::Costs;
use crate::doorbell::Doorbell;
use crate::error::Error;
use crate::hal::{Dma, Hal};
use crate::regions::RegionTable;

/// How often the driver tries to read a config area that changes during the read.
const CONFIG_TRIES: u32 = 8;
/// The most capabilities that fit a configuration space of 256 bytes.
const CAPABILITIES_MAX: u32 = 48;

/// The value of every register when the function has gone.
const GONE: u32 = u32::MAX;
/// How much of one turn of the wait for a command counts, in nanoseconds.
const TURN_MAX: u64 = 1_000_000_000;

/// A function of the bus that was probed. While it is open it has a connection. Dropping the
/// function closes the connection.
///
/// The function keeps a clone of all memory that is registered with the device, until REGION_DROP
/// or CLOSE has run. So a driver may drop its values in any order: it never frees memory that the
/// device may still write.
#[derive(Debug)]
pub struct Function<H: Hal> {
    hal: H,
    /// Offset of the vbus capability in configuration space.
    capability: u16,
    registers: u64,
    doorbell: Doorbell,
    info: Info,
    /// The version of the ABI that both ends speak.
    version: u16,
    connection: Option<Connection<H>>,
    /// Number of connections opened so far. It tells a [`Region`] of an earlier connection.
    opens: u32,
    /// Whether the device has let go of the memory of the last connection that was closed.
    let_go: bool,
    /// How long commands may still wait, all of them together, in nanoseconds.
    budget: Option<u64>,
    class_errors: &'static [(ErrorCode, &'static str)],
}

/// What an open connection holds.
#[derive(Debug)]
struct Connection<H: Hal> {
    /// Buffer of calls, page lists, and the handshake word.
    scratch: H::Dma,
    /// The memory of all regions.
    regions: H::Regions,
    /// The device's incarnation when the connection was opened.
    incarnation: u64,
}

/// A region of the open connection, for [`Function::region_drop`]. Dropping the value changes
/// nothing: the region stays registered, and its memory allocated, until the connection closes.
#[derive(Debug)]
pub struct Region {
    handle: u32,
    /// The slot of the function's table that keeps its memory.
    slot: usize,
    /// The slot of the memory that [`Function::keep`] keeps with the region.
    kept: Option<usize>,
    /// Number of the connection that the region belongs to.
    connection: u32,
}

impl Region {
    /// The handle of the region. It is also the number of its doorbell.
    pub fn handle(&self) -> u32 {
        self.handle
    }
}

/// What a function's registers say of it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Info {
    /// [`vbus_shm::abi::class`].
    pub class: u32,
    /// Name of the class.
    pub class_name: Name<16>,
    /// Name of the device on its bus.
    pub name: Name<32>,
    /// Features offered.
    pub features: u64,
    /// The most regions of a connection.
    pub max_regions: u32,
    /// The most bytes of a region.
    pub max_region_bytes: u64,
    /// Interrupt vectors in use.
    pub vectors: u32,
    /// Bytes of the config area.
    pub config_bytes: usize,
}

/// A short text from a device: the bytes up to the first zero.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Name<const N: usize>(pub [u8; N]);

impl<const N: usize> Name<N> {
    /// The text, up to the first byte that is not UTF-8. It may hold control characters.
    /// [`Display`](fmt::Display) replaces them.
    pub fn as_str(&self) -> &str {
        let bytes = self.0.split(|&b| b == 0).next().unwrap_or_default();
        match core::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => core::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default(),
        }
    }
}

impl<const N: usize> fmt::Display for Name<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write;
        self.as_str().chars().try_for_each(|c| {
            f.write_char(if c.is_control() { char::REPLACEMENT_CHARACTER } else { c })
        })
    }
}

impl<const N: usize> fmt::Debug for Name<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

/// The state of the connection, as the device sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectionState {
    /// There is none.
    Closed,
    /// It is open.
    Open,
    /// The device has ended it.
    Broken(ErrorCode),
}

impl<H: Hal> Function<H> {
    /// Reads the registers behind `hal`, and chooses the kind of doorbell. It changes nothing:
    /// several drivers may probe one function. It recognizes a vbus function by the signature in
    /// its capability, whatever the function's ids.
    pub fn probe(hal: H) -> Result<Self, Error> {
        Self::probe_for(hal, Versions::SUPPORTED)
    }

    /// As [`probe`](Self::probe), for a driver that speaks other versions of the ABI than this
    /// crate. The connection uses the highest version that both ends speak.
    pub fn probe_for(hal: H, versions: Versions) -> Result<Self, Error> {
        let (capability, registers) = find_layout(&hal)?;
        let magic = hal.read32(registers + reg::MAGIC);
        if magic != reg::MAGIC_VALUE {
            return Err(if magic == GONE { Error::Gone } else { Error::NotVbus });
        }
        let device = Versions::from_register(hal.read32(registers + reg::ABI));
        let version = versions.common(device).ok_or(Error::Version { device, driver: versions })?;
        let read = |register| hal.read32(registers + register);
        let info = Info {
            class: read(reg::CLASS),
            class_name: read_name(&hal, registers + reg::CLASS_NAME),
            name: read_name(&hal, registers + reg::NAME),
            features: hal.read64(registers + reg::FEATURES),
            max_regions: read(reg::MAX_REGIONS).min(bar0::DOORBELL_COUNT),
            max_region_bytes: hal.read64(registers + reg::MAX_REGION_BYTES),
            vectors: read(reg::VECTORS),
            config_bytes: reg::CONFIG_MAX.min(read(reg::CONFIG_BYTES) as usize),
        };
        let doorbell =
            usable(&hal, capability, info.max_regions).next().ok_or(Error::NoDoorbell)?;
        Ok(Function {
            hal,
            capability,
            registers,
            doorbell,
            info,
            version,
            connection: None,
            opens: 0,
            let_go: true,
            budget: None,
            class_errors: &[],
        })
    }

    /// What the function says of itself.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// The version of the ABI that both ends speak.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// The environment.
    pub fn hal(&self) -> &H {
        &self.hal
    }

    /// The kind of doorbell that this function uses.
    pub fn doorbell(&self) -> Doorbell {
        self.doorbell
    }

    /// The kinds of doorbell that the function offers, in its order. This crate may not know all of
    /// them.
    pub fn doorbells_offered(&self) -> impl Iterator<Item = Doorbell> + '_ {
        records(&self.hal, self.capability)
            .filter(|record| record.kind < capability::KIND_NOT_DOORBELL)
    }

    /// The offered kinds of doorbell that this environment can ring.
    pub fn doorbells(&self) -> impl Iterator<Item = Doorbell> + '_ {
        usable(&self.hal, self.capability, self.info.max_regions)
    }

    /// Uses this kind ([`capability::KIND_MMIO`] etc.) from now on. A [`Bell`] made before keeps
    /// its kind.
    pub fn use_doorbell(&mut self, kind: u8) -> Result<(), Error> {
        let found = self.doorbells().find(|doorbell| doorbell.kind == kind);
        self.doorbell = found.ok_or(Error::NoDoorbell)?;
        Ok(())
    }

    /// Measures the cost of ringing, with `rings` rings of each kind that this environment can
    /// ring. It rings the doorbell of the last possible region. Before the driver has added
    /// regions, these rings wake nobody. It does not change the kind in use: see
    /// [`choose_doorbell`](Self::choose_doorbell).
    pub fn doorbell_costs(&self, rings: u32) -> Costs {
        Costs::measure(&self.hal, self.doorbells(), self.info.max_regions.saturating_sub(1), rings)
    }

    /// Measures as [`doorbell_costs`](Self::doorbell_costs) does, and uses the cheapest kind from
    /// now on.
    pub fn choose_doorbell(&mut self, rings: u32) -> Costs {
        let costs = self.doorbell_costs(rings);
        if let Some(cheapest) = costs.cheapest() {
            self.doorbell = cheapest.doorbell;
        }
        costs
    }

    /// The addresses of synthetic interrupts, if the VMM has them. The [`offset`](Doorbell::offset)
    /// of virtual processor n is the address of an MSI or MSI-X message. The message's data is the
    /// number of the interrupt.
    pub fn synthetic_interrupts(&self) -> Option<Doorbell> {
        records(&self.hal, self.capability).find(|record| record.kind == capability::KIND_SINT)
    }

    /// The state of the connection. It costs one read of a register. Look at it when a device has
    /// been silent, not on a fast path.
    pub fn state(&self) -> Result<ConnectionState, Error> {
        let value = self.hal.read32(self.registers + reg::CONNECTION);
        match value & 0xff {
            _ if value == GONE => Err(Error::Gone),
            reg::CONNECTION_CLOSED => Ok(ConnectionState::Closed),
            reg::CONNECTION_OPEN => Ok(ConnectionState::Open),
            reg::CONNECTION_BROKEN => Ok(ConnectionState::Broken(ErrorCode(value >> 16))),
            _ => Err(Error::Corrupt("an unknown state in the register CONNECTION")),
        }
    }

    /// The device's incarnation, not 0. It changes when the device has lost what this driver told
    /// it: the device restarted, or the virtual machine was restored from a snapshot. The
    /// connection is then lost, whatever [`state`](Self::state) says.
    pub fn incarnation(&self) -> Result<u64, Error> {
        match self.hal.read64(self.registers + reg::INCARNATION) {
            u64::MAX => Err(Error::Gone),
            value => Ok(value),
        }
    }

    /// Checks that the open connection still exists. The error is [`Error::Reincarnated`] if the
    /// device has lost it, and [`Error::Broken`] if the device has ended it. In both cases the
    /// driver closes the function and opens it again.
    pub fn check(&self) -> Result<(), Error> {
        let state = self.state()?;
        if let Some(connection) = &self.connection {
            if self.incarnation()? != connection.incarnation {
                return Err(Error::Reincarnated);
            }
        }
        match state {
            ConnectionState::Open => Ok(()),
            ConnectionState::Closed => Err(Error::Broken(ErrorCode::NOT_OPEN)),
            ConnectionState::Broken(code) => Err(Error::Broken(code)),
        }
    }

    /// Takes the pending events of the function. Look at the state that they tell of afterwards,
    /// not before. Events interrupt on the vector of [`open_with_vector`](Self::open_with_vector).
    /// If queues share that vector, call this only when an interrupt has brought nothing for the
    /// queues.
    pub fn events(&self) -> Result<Events, Error> {
        let pending = self.hal.read32(self.registers + reg::EVENTS);
        if pending == GONE {
            return Err(Error::Gone);
        }
        if pending != 0 {
            self.hal.write32(self.registers + reg::EVENTS_ACK, pending);
            // The write may be posted. If it arrived after the driver's look, it could take back an
            // event that came in between. A read returns only after the write has arrived.
            self.hal.read32(self.registers + reg::EVENTS);
        }
        Ok(Events(pending))
    }

    /// Bounds how long commands wait from now on, all of them together, in nanoseconds. `None`, as
    /// at first: only [`Hal::pause`] bounds each of them. Time counts as for `pause`. A command
    /// that would wait longer fails with [`Error::TimedOut`], and so does each later one, at once.
    /// CLOSE still runs: a device does it within the write.
    pub fn set_budget(&mut self, nanoseconds: Option<u64>) {
        self.budget = nanoseconds;
    }

    /// Opens the connection with a subset of the offered features. The function's
    /// [events](Self::events) interrupt on vector 0. It first closes a connection that a dead
    /// driver left open. It cannot see whether that driver is alive: the environment must make sure
    /// that there is only one driver.
    pub fn open(&mut self, features: u64) -> Result<(), Error> {
        self.open_with_vector(features, 0)
    }

    /// As [`open`](Self::open), with events on `vector`.
    pub fn open_with_vector(&mut self, features: u64, vector: u16) -> Result<(), Error> {
        if self.state()? != ConnectionState::Closed {
            self.close();
        }
        let scratch = self.hal.alloc(H::Dma::CONTIGUOUS_MIN)?;
        if !scratch.is_run(0, H::Dma::CONTIGUOUS_MIN) || H::Dma::CONTIGUOUS_MIN < SCRATCH_BYTES {
            return Err(Error::NoMemory);
        }
        let regions = H::Regions::new(self.info.max_regions as usize)?;
        // The value differs each time, so that an old word elsewhere does not match it.
        let value =
            scratch.address(0) ^ self.hal.now().rotate_left(20) ^ u64::from_le_bytes(*b"vbus-drv");
        scratch.copy_in(0, &value.to_le_bytes());
        let selector = u64::from(self.version) | u64::from(vector) << 32;
        let arguments = [selector, features, scratch.address(0), value];
        let incarnation = self.incarnation()?;
        self.connection = Some(Connection { scratch, regions, incarnation });
        self.opens = self.opens.wrapping_add(1);
        if let Err(error) = self.command("OPEN", command::OPEN, arguments) {
            // The device may have opened the connection: close it.
            self.close();
            return Err(error);
        }
        self.hal.opened();
        Ok(())
    }

    /// Whether [`open`](Self::open) succeeded and [`close`](Self::close) has not followed. The
    /// device may have ended the connection meanwhile.
    pub fn is_open(&self) -> bool {
        self.connection.is_some()
    }

    /// Closes the connection. The device has let go of all memory when this returns. If the device
    /// does not confirm that, it breaks the protocol. The memory of the connection is then never
    /// freed, and [`Hal::memory_lost`] is called.
    pub fn close(&mut self) {
        let result = self.command("CLOSE", command::CLOSE, [0; 4]);
        let connection = self.connection.take();
        self.let_go = matches!(result, Ok(_) | Err(Error::Gone));
        if let (false, Some(connection)) = (self.let_go, connection) {
            core::mem::forget(connection);
            self.hal.memory_lost();
        }
    }

    /// Whether the device has let go of the memory of the connection that was closed last. If not,
    /// a driver never frees the memory that it gave to the device by itself.
    pub fn has_let_go(&self) -> bool {
        self.let_go
    }

    /// Features of the open connection.
    pub fn features(&self) -> u64 {
        self.hal.read64(self.registers + reg::FEATURES_ACCEPTED) & self.info.features
    }

    /// Registers the `len` bytes at `offset` of `dma` as the class's region `id`. `signal` is the
    /// offset of the signal block in the region, if there is one. The region's interrupts come on
    /// `vector`. The function keeps a clone of `dma` until the region is dropped or the connection
    /// is closed.
    ///
    /// `offset` must be a multiple of 64, and `len` a multiple of 8. A region that is not
    /// contiguous must begin at the beginning of a page.
    pub fn region_add(
        &mut self,
        id: u32,
        vector: u16,
        dma: &H::Dma,
        (offset, len): (usize, usize),
        signal: Option<usize>,
    ) -> Result<Region, Error> {
        let Some(Connection { scratch, regions, .. }) = &mut self.connection else {
            return Err(NOT_OPEN);
        };
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > dma.bytes()) {
            return Err(Error::Unsupported("a region outside of its memory"));
        }
        let (shift, address) = if dma.is_run(offset, len) {
            (0, dma.address(offset))
        } else {
            let page = 1usize << dma.page_shift();
            let count = len.div_ceil(page);
            if offset % page != 0 || count > PAGES_MAX {
                return Err(Error::Unsupported(
                    "a region that has too many pages or does not begin with a page",
                ));
            }
            for (i, word) in scratch.words().iter().take(count).enumerate() {
                word.store(dma.address(offset + i * page), Ordering::Relaxed);
            }
            (dma.page_shift(), scratch.address(0))
        };
        let slot = regions.insert(dma.clone()).ok_or(TABLE_FULL)?;
        let selector = u64::from(id) | u64::from(vector) << 32 | u64::from(shift) << 48;
        let signal = signal.map_or(command::NO_SIGNAL, |offset| offset as u64);
        let arguments = [selector, address, len as u64, signal];
        let added = self.command("REGION_ADD", command::REGION_ADD, arguments);
        if matches!(added, Err(Error::Refused { .. } | Error::Class { .. })) {
            self.forget_region(slot);
        }
        // After any other error the device may have the region, so its memory stays.
        let handle = u32::try_from(added?)
            .ok()
            .filter(|handle| *handle < self.info.max_regions)
            .ok_or(Error::Corrupt("the handle of a region is out of range"))?;
        Ok(Region { handle, slot, kept: None, connection: self.opens })
    }

    /// Keeps a clone of `memory`, whose addresses the driver gives to the device through `region`,
    /// as long as the memory of the region: until the region is dropped or the connection is
    /// closed. A region keeps one such memory.
    pub fn keep(&mut self, region: &mut Region, memory: &H::Dma) -> Result<(), Error> {
        let is_own = region.connection == self.opens;
        let Some(connection) = self.connection.as_mut().filter(|_| is_own) else {
            return Err(NOT_OPEN);
        };
        if region.kept.is_some() {
            return Err(Error::Unsupported("more than one memory beside that of a region"));
        }
        region.kept = Some(connection.regions.insert(memory.clone()).ok_or(TABLE_FULL)?);
        Ok(())
    }

    /// Drops a region. The device has let go of its memory when this returns without an error.
    /// After an error the region, with its memory, stays until the connection closes.
    pub fn region_drop(&mut self, region: Region) -> Result<(), Error> {
        if self.connection.is_none() || region.connection != self.opens {
            return Err(NOT_OPEN);
        }
        let arguments = [u64::from(region.handle), 0, 0, 0];
        self.command("REGION_DROP", command::REGION_DROP, arguments)?;
        self.forget_region(region.slot);
        if let Some(kept) = region.kept {
            self.forget_region(kept);
        }
        Ok(())
    }

    /// Drops the memory of a region that the device does not have.
    fn forget_region(&mut self, slot: usize) {
        if let Some(connection) = &mut self.connection {
            connection.regions.remove(slot);
        }
    }

    /// Calls the class's `function`. The device gets a copy of `buffer`, at most
    /// [`command::CALL_MAX`] bytes. The device's answer replaces the buffer. If the call takes
    /// time, it waits with [`Hal::pause`].
    pub fn call(&mut self, function: u32, flags: u32, buffer: &mut [u8]) -> Result<u64, Error> {
        let Some(Connection { scratch, .. }) = &self.connection else { return Err(NOT_OPEN) };
        if buffer.len() > SCRATCH_BYTES {
            return Err(Error::Unsupported("a call with so large a buffer"));
        }
        scratch.copy_in(0, buffer);
        let selector = u64::from(function) | u64::from(flags) << 32;
        let arguments = [selector, scratch.address(0), buffer.len() as u64, 0];
        let value = self.command("CALL", command::CALL, arguments)?;
        if let Some(Connection { scratch, .. }) = &self.connection {
            scratch.copy_out(0, buffer);
        }
        Ok(value)
    }

    /// Reads the class's config area from its beginning. Bytes of `out` that the device does not
    /// have become 0.
    pub fn config(&self, out: &mut [u8]) -> Result<(), Error> {
        let generation = || self.hal.read32(self.registers + reg::CONFIG_GENERATION);
        let mut before = generation();
        for _ in 0..CONFIG_TRIES {
            out.fill(0);
            let have = out.len().min(self.info.config_bytes);
            for (offset, bytes) in (0..).step_by(4).zip(out[..have].chunks_mut(4)) {
                let word = self.hal.read32(self.registers + reg::CONFIG + offset).to_le_bytes();
                bytes.copy_from_slice(&word[..bytes.len()]);
            }
            let after = generation();
            if after == before {
                return if after == GONE { Err(Error::Gone) } else { Ok(()) };
            }
            before = after;
        }
        Err(Error::Corrupt("the config area changes during every read"))
    }

    /// Acknowledges the pending interrupt (INTx). Call it before you look at the signals, not
    /// after.
    pub fn acknowledge(&self) {
        self.acknowledger().acknowledge();
    }

    /// A handle that acknowledges interrupts, for a thread that waits for them without the
    /// function.
    pub fn acknowledger(&self) -> Acknowledger<H> {
        Acknowledger { hal: self.hal.clone(), registers: self.registers }
    }

    /// Rings the doorbell of the region with this handle.
    pub fn ring(&self, handle: u32) {
        self.hal.ring(self.doorbell, handle);
    }

    /// A handle that rings the doorbell of one region, for a queue that runs without the function.
    pub fn bell(&self, handle: u32) -> Bell<H> {
        Bell { hal: self.hal.clone(), doorbell: self.doorbell, handle }
    }

    fn command(
        &mut self,
        name: &'static str,
        code: u32,
        arguments: [u64; 4],
    ) -> Result<u64, Error> {
        if self.budget == Some(0) && code != command::CLOSE {
            return Err(self.give_up(name));
        }
        let (mut last, mut waited) = (self.hal.now(), 0u64);
        for (offset, argument) in (0..).step_by(8).zip(arguments) {
            self.hal.write64(self.registers + reg::ARGUMENT + offset, argument);
        }
        self.hal.write32(self.registers + reg::COMMAND, code);
        loop {
            let result = self.hal.read32(self.registers + reg::RESULT);
            // A function that stood still, so that the read took long, is not a slow command.
            let now = self.hal.now();
            let turn = now.saturating_sub(last).min(TURN_MAX);
            waited = waited.saturating_add(turn);
            self.budget = self.budget.map(|left| left.saturating_sub(turn));
            last = now;
            match result {
                error_code::OK => return Ok(self.hal.read64(self.registers + reg::VALUE)),
                GONE => return Err(Error::Gone),
                error_code::IN_PROGRESS => {}
                code => return Err(self.refused(name, ErrorCode(code))),
            }
            if self.budget == Some(0) || !self.hal.pause(waited) {
                return Err(self.give_up(name));
            }
        }
    }

    /// Ends the connection, and the command in progress.
    fn give_up(&self, name: &'static str) -> Error {
        // The read returns after CLOSE has run. The device then does not touch the buffer of the
        // call any more.
        self.hal.write32(self.registers + reg::COMMAND, command::CLOSE);
        self.hal.read32(self.registers + reg::RESULT);
        Error::TimedOut(name)
    }

    /// The error for an error code that the device returned for `command`. It has the class's text
    /// if the error code is one of the class ([`set_class_errors`](Self::set_class_errors)).
    pub fn refused(&self, command: &'static str, code: ErrorCode) -> Error {
        let class = self.class_errors.iter().find(|(class, _)| *class == code);
        match class {
            Some(&(code, text)) => Error::Class { command, code, text },
            None => Error::Refused { command, code },
        }
    }

    /// Sets the class's own error codes ([`error_code::CLASS`] and above), with a text for each. A
    /// command that the device refuses with such a code fails with [`Error::Class`].
    pub fn set_class_errors(&mut self, errors: &'static [(ErrorCode, &'static str)]) {
        self.class_errors = errors;
    }
}

impl<H: Hal> Drop for Function<H> {
    fn drop(&mut self) {
        if self.is_open() {
            self.close();
        }
    }
}

/// Events of the function, outside its queues. Each tells the driver what to look at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events(u32);

impl Events {
    fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// A fault has ended the connection. [`Function::check`] returns its error code.
    pub fn broken(self) -> bool {
        self.has(event::BROKEN)
    }

    /// The device leaves the bus and has ended the connection.
    pub fn removed(self) -> bool {
        self.has(event::REMOVED)
    }

    /// The config area has changed. Read it with [`Function::config`].
    pub fn config_changed(self) -> bool {
        self.has(event::CONFIG)
    }

    /// The class asks the driver to announce itself to others.
    pub fn announce(self) -> bool {
        self.has(event::ANNOUNCE)
    }

    /// The device has lost what its driver told it. [`Function::check`] fails with
    /// [`Error::Reincarnated`].
    pub fn reincarnated(self) -> bool {
        self.has(event::INCARNATION)
    }
}

/// Rings one doorbell.
#[derive(Clone, Debug)]
pub struct Bell<H> {
    hal: H,
    doorbell: Doorbell,
    handle: u32,
}

impl<H: Hal> Bell<H> {
    /// Rings it.
    pub fn ring(&self) {
        self.hal.ring(self.doorbell, self.handle);
    }

    /// Rings the doorbell if the kick of a post asks for that. Returns whether it rang. The
    /// compiler checks that the kick comes from a driver's end, but not from which ring: a check
    /// would cost a comparison for each post. Keep a ring and its bell in one value.
    pub fn kick(&self, kick: Kick<Driver>) -> bool {
        if kick.is_wanted() {
            self.ring();
        }
        kick.is_wanted()
    }
}

/// Acknowledges interrupts.
#[derive(Clone, Debug)]
pub struct Acknowledger<H> {
    hal: H,
    registers: u64,
}

impl<H: Hal> Acknowledger<H> {
    /// As [`Function::acknowledge`].
    pub fn acknowledge(&self) {
        let register = self.registers + reg::INTERRUPT_ACK;
        self.hal.write32(register, 1);
        // The write may be posted, and if it arrived only after the driver has armed, it could take
        // back the next interrupt, unheard. A read returns after it has.
        self.hal.read32(register);
    }

    /// For a line that several functions share: whether this function's interrupt (INTx) is
    /// pending. If it is, this acknowledges it as [`acknowledge`](Self::acknowledge) does. A
    /// function that has gone has no interrupt.
    pub fn take(&self) -> bool {
        let pending = self.hal.read32(self.registers + reg::INTERRUPT_PENDING);
        let is_pending = pending != 0 && pending != GONE;
        if is_pending {
            self.acknowledge();
        }
        is_pending
    }
}

const TABLE_FULL: Error = Error::Unsupported("more regions than this driver has room for");
const NOT_OPEN: Error = Error::Refused { command: "command", code: ErrorCode::NOT_OPEN };
/// The scratch memory holds the largest buffer of a call, the largest page list, and the handshake
/// word.
const SCRATCH_BYTES: usize = 64 << 10;
const PAGES_MAX: usize = 4096;
const _: () = {
    assert!(SCRATCH_BYTES as u64 == command::CALL_MAX && PAGES_MAX as u64 == command::PAGES_MAX);
    assert!(PAGES_MAX * 8 <= SCRATCH_BYTES);
};

/// Where vbus's capability is in configuration space, and the registers in BAR 0.
fn find_layout<H: Hal>(hal: &H) -> Result<(u16, u64), Error> {
    let (at, layout) = find_capability(hal)?;
    if layout != capability::LAYOUT {
        return Err(Error::Layout(layout));
    }
    let registers = u64::from(config_u32(hal, at + u16::from(capability::REGISTERS)));
    if registers % 4096 != 0 || registers >= bar0::SIZE {
        return Err(Error::NotVbus);
    }
    Ok((at, registers))
}

/// Where vbus's capability is, and the version of its layout.
fn find_capability<H: Hal>(hal: &H) -> Result<(u16, u8), Error> {
    let read = |offset| hal.config_read32(offset);
    if read(0) == GONE {
        return Err(Error::Gone);
    }
    signature_at(read)
        .map(|at| (at, config_u8(hal, at + u16::from(capability::VERSION))))
        .ok_or(Error::NotVbus)
}

/// Whether a PCI function is one of vbus, by the signature in its configuration space: for whoever
/// looks for functions. `config_read32` reads 4 bytes at a multiple of 4 below 256.
pub fn has_signature(config_read32: impl Fn(u16) -> u32) -> bool {
    signature_at(config_read32).is_some()
}

/// Where the capability with the signature is.
fn signature_at(read: impl Fn(u16) -> u32) -> Option<u16> {
    const STATUS_CAPABILITIES: u32 = 1 << 20;
    const VENDOR_SPECIFIC: u8 = 0x09;
    if read(0) == GONE || read(0x04) & STATUS_CAPABILITIES == 0 {
        return None;
    }
    let mut at = (read(0x34) & 0xfc) as u16;
    for _ in 0..CAPABILITIES_MAX {
        if at < 0x40 {
            break;
        }
        let [id, next, length, _] = read(at).to_le_bytes();
        let signature = at + u16::from(capability::SIGNATURE);
        if id == VENDOR_SPECIFIC
            && length > capability::SIGNATURE + 3
            && signature < 256
            && read(signature) == capability::SIGNATURE_VALUE
        {
            return Some(at);
        }
        at = u16::from(next & !3);
    }
    None
}

/// Those doorbells of the capability at `at` that can be rung here, each for `regions` handles.
fn usable<H: Hal>(hal: &H, at: u16, regions: u32) -> impl Iterator<Item = Doorbell> + '_ {
    records(hal, at)
        .filter(move |doorbell| doorbell.is_sound(regions) && hal.can_ring(doorbell.kind))
}

/// The records of the capability at `at`.
fn records<H: Hal>(hal: &H, at: u16) -> impl Iterator<Item = Doorbell> + '_ {
    let (header, each) = (u16::from(capability::HEADER_BYTES), u16::from(capability::RECORD_BYTES));
    let end = (at + u16::from(config_u8(hal, at + 2))).min(256);
    (at + header..end).step_by(usize::from(each)).filter(move |record| record + each <= end).map(
        move |record| {
            let first = config_u32(hal, record);
            let base = config_u32(hal, record + 4);
            Doorbell { kind: (first & 0xff) as u8, stride: (first >> 16) as u16, base }
        },
    )
}

fn config_u8<H: Hal>(hal: &H, offset: u16) -> u8 {
    let bytes = hal.config_read32(offset & 0xfc).to_le_bytes();
    bytes[usize::from(offset % 4)]
}

/// Four bytes at any offset: capabilities are aligned to 4, and so is all that is read here.
fn config_u32<H: Hal>(hal: &H, offset: u16) -> u32 {
    hal.config_read32(offset & 0xfc)
}

fn read_name<H: Hal, const N: usize>(hal: &H, at: u64) -> Name<N> {
    let mut name = [0; N];
    for (offset, bytes) in (0..).step_by(8).zip(name.chunks_mut(8)) {
        bytes.copy_from_slice(&hal.read64(at + offset).to_le_bytes()[..bytes.len()]);
    }
    Name(name)
}
