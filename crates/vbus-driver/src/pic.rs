// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Driver of `pic`: an interrupt controller whose state is shared (spec/pic.md).
//!
//! [`Pic`] registers a page for each processor and routes interrupts of other devices to lines. A
//! [`Controller`] is one processor's page. The handler of the processor's message takes lines from
//! it and ends them, with loads and stores alone.
//!
//! ```
//! use vbus_driver::pic::Controller;
//! use vbus_driver::Hal;
//!
//! /// The handler of a processor's message, with interrupts off.
//! fn interrupt<H: Hal>(cpu: &mut Controller<H>, mut attend: impl FnMut(u16)) {
//!     while let Some(line) = cpu.take() {
//!         attend(line); // a nested controller: with interrupts on
//!         cpu.end(line);
//!     }
//! }
//! ```

use vbus_shm::ErrorCode;
use vbus_shm::abi::{class, pic as abi};
use vbus_shm::pic::{DriverEnd, LINES_MAX, PAGE_BYTES};

pub use vbus_shm::pic::{Nesting, Wanted};

use crate::{Error, Function, Hal, Region};

/// An interrupt controller with an open connection.
#[derive(Debug)]
pub struct Pic<H: Hal> {
    function: Function<H>,
    cpus: u32,
}

/// An interrupt of another device: the source of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source<'a> {
    /// The device's name on the bus ([`Info::name`](crate::Info::name)).
    pub device: &'a str,
    /// The vector that its regions were registered with.
    pub vector: u16,
}

/// A line of a processor's page: the target of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// The processor's number, as of [`Pic::cpu`].
    pub cpu: u32,
    /// The line. Its number is its priority: a higher line is more urgent.
    pub number: u16,
}

impl<H: Hal> Pic<H> {
    /// Opens it.
    pub fn open(mut function: Function<H>) -> Result<Self, Error> {
        if function.info().class != u32::from(class::PIC) {
            return Err(Error::WrongClass(function.info().class));
        }
        let mut area = [0; abi::CONFIG_BYTES];
        function.config(&mut area)?;
        let u32_at =
            |at: usize| u32::from_le_bytes([area[at], area[at + 1], area[at + 2], area[at + 3]]);
        let (cpus, lines) = (u32_at(abi::CONFIG_CPUS), u32_at(abi::CONFIG_LINES));
        if lines < u32::from(LINES_MAX) {
            return Err(Error::Corrupt("an interrupt controller with too few lines"));
        }
        function.set_class_errors(ERRORS);
        function.open(0)?;
        Ok(Pic { function, cpus: cpus.min(u32::from(abi::CPUS_MAX)) })
    }

    /// The most processors that the device takes.
    pub fn cpus(&self) -> u32 {
        self.cpus
    }

    /// The function.
    pub fn function(&self) -> &Function<H> {
        &self.function
    }

    /// Registers a page of `lines` lines (1..=256) for processor `number`, whose messages come on
    /// `vector`. It asks for no messages yet: see [`Controller::arm`].
    pub fn cpu(
        &mut self,
        number: u32,
        lines: u16,
        nesting: Nesting,
        vector: u16,
    ) -> Result<Controller<H>, Error> {
        let memory = self.function.hal().alloc(PAGE_BYTES)?;
        let page = DriverEnd::create(memory.clone(), lines, nesting)
            .map_err(|_| Error::Unsupported("an interrupt page with so many lines"))?;
        let region = self.function.region_add(number, vector, &memory, (0, PAGE_BYTES), None)?;
        Ok(Controller { page, number, region })
    }

    /// Drops a processor's page. Interrupts that were routed to it come from their own devices
    /// again.
    pub fn remove(&mut self, cpu: Controller<H>) -> Result<(), Error> {
        self.function.region_drop(cpu.region)
    }

    /// Lets an interrupt of another device raise a line, until that device's connection or this
    /// connection ends. The device must be open, and the bus's configuration must allow the route.
    /// The line is raised once at once.
    pub fn route(&mut self, from: Source<'_>, to: Line) -> Result<(), Error> {
        self.call(abi::CALL_ROUTE, from, to).map(drop)
    }

    /// Ends a route: the interrupt comes from its own device again. One comes at once.
    pub fn unroute(&mut self, from: Source<'_>) -> Result<(), Error> {
        self.call(abi::CALL_UNROUTE, from, Line { cpu: 0, number: 0 }).map(drop)
    }

    /// Lets the interrupt raise another line from now on, of the same or another processor. If the
    /// old line is pending, the new line is raised instead, and this returns true. The old
    /// processor may have the line in service at this moment, and goes on with it.
    pub fn relocate(&mut self, from: Source<'_>, to: Line) -> Result<bool, Error> {
        Ok(self.call(abi::CALL_MOVE, from, to)? != 0)
    }

    fn call(&mut self, function: u32, from: Source<'_>, to: Line) -> Result<u64, Error> {
        let mut buffer = [0; abi::ROUTE_BYTES];
        buffer[0..2].copy_from_slice(&from.vector.to_le_bytes());
        buffer[2..4].copy_from_slice(&to.number.to_le_bytes());
        buffer[4..8].copy_from_slice(&to.cpu.to_le_bytes());
        let name = from.device.as_bytes();
        buffer
            .get_mut(abi::NAME_OFFSET..abi::NAME_OFFSET + name.len())
            .ok_or(Error::Refused { command: "CALL", code: ErrorCode::DENIED })?
            .copy_from_slice(name);
        self.function.call(function, 0, &mut buffer)
    }

    /// Bounds how long commands wait from now on: see [`Function::set_budget`].
    pub fn set_budget(&mut self, nanoseconds: Option<u64>) {
        self.function.set_budget(nanoseconds);
    }

    /// Closes the connection. Routed interrupts come from their own devices again. The device has
    /// let go of all pages when this returns.
    pub fn close(&mut self) {
        self.function.close();
    }
}

const ERRORS: &[(ErrorCode, &str)] =
    &[(ErrorCode(abi::NO_ROUTE), "the vector is not routed, or its device's connection has ended")];

/// One processor's end of its page. Use it with interrupts off, one call at a time: on that
/// processor alone, or behind a lock. No call waits, allocates, or leaves the virtual machine.
#[derive(Debug)]
pub struct Controller<H: Hal> {
    page: DriverEnd<H::Dma>,
    number: u32,
    region: Region,
}

impl<H: Hal> Controller<H> {
    /// The processor's number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Takes the most urgent line that is pending, not masked, and more urgent than the lines in
    /// service. The message's handler calls it until it returns `None`. After that the next line
    /// sends a message. A device could raise lines without end. A handler that must not be held by
    /// that stops earlier and raises an interrupt for itself.
    #[inline]
    pub fn take(&mut self) -> Option<u16> {
        self.page.take()
    }

    /// Ends a line. In a handler, call [`take`](Self::take) again before the interrupt returns.
    /// Elsewhere, call [`arm`](Self::arm).
    #[inline]
    pub fn end(&mut self, line: u16) {
        self.page.end(line);
    }

    /// Asks for messages. Call it at the beginning, and after lines were ended outside a handler.
    /// *Pending*: call the handler now.
    pub fn arm(&mut self) -> Wanted {
        self.page.arm()
    }

    /// Asks for no messages, until [`arm`](Self::arm) or until [`take`](Self::take) returns `None`.
    pub fn disarm(&mut self) {
        self.page.disarm();
    }

    /// Masks a line. It can become pending, but [`take`](Self::take) does not return it.
    pub fn mask(&mut self, line: u16) {
        self.page.mask(line);
    }

    /// Unmasks a line. *Pending*: the line became pending without a message. Call the handler now.
    pub fn unmask(&mut self, line: u16) -> Wanted {
        self.page.unmask(line)
    }

    /// Number of levels that the page has published. At most that many messages have come.
    pub fn generation(&self) -> u64 {
        self.page.generation()
    }
}

const _: () = assert!(abi::NAME_OFFSET + 32 == abi::ROUTE_BYTES);
