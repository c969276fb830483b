// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Driver of `state`: named state pages (spec/state.md).

use vbus_shm::abi::{class, state as abi};
use vbus_shm::signal::{Armed, end};
use vbus_shm::state::{self, DEFAULT_SLOTS, Layout, MAX_VALUE, Overrun, SIGNAL_OFFSET};

use crate::{Bell, Error, Function, Hal, Name, Region, state_page};

/// Which end writes a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The device's.
    Device,
    /// The driver's.
    Driver,
}

/// The device's description of a page.
#[derive(Clone, Copy, Debug)]
pub struct Description {
    /// Its number.
    pub number: u32,
    /// Its name.
    pub name: Name<{ abi::NAME_MAX }>,
    /// Bytes of its value, 1..=[`MAX_VALUE`].
    pub value_bytes: u32,
    /// Who writes it.
    pub owner: Owner,
}

impl Description {
    /// The shape of the page's memory.
    ///
    /// # Errors
    /// A description that [`Pages::describe`] returned has a shape.
    pub fn layout(&self) -> Result<Layout, Error> {
        Layout::new(self.value_bytes, DEFAULT_SLOTS)
            .map_err(|_| Error::Corrupt("a state page with an impossible size"))
    }
}

/// A state device with an open connection.
#[derive(Debug)]
pub struct Pages<H: Hal> {
    function: Function<H>,
    count: u32,
}

impl<H: Hal> Pages<H> {
    /// Opens it.
    pub fn open(mut function: Function<H>) -> Result<Self, Error> {
        if function.info().class != u32::from(class::STATE) {
            return Err(Error::WrongClass(function.info().class));
        }
        let mut area = [0; 4];
        function.config(&mut area)?;
        function.open(0)?;
        Ok(Pages { function, count: u32::from_le_bytes(area).min(abi::PAGES_MAX) })
    }

    /// Bounds how long commands wait from now on: see [`Function::set_budget`].
    pub fn set_budget(&mut self, nanoseconds: Option<u64>) {
        self.function.set_budget(nanoseconds);
    }

    /// Number of pages.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The function.
    pub fn function(&self) -> &Function<H> {
        &self.function
    }

    /// Describes page `number`.
    pub fn describe(&mut self, number: u32) -> Result<Description, Error> {
        let mut buffer = [0; abi::DESCRIPTION_BYTES];
        buffer[..4].copy_from_slice(&number.to_le_bytes());
        self.function.call(abi::CALL_DESCRIBE, 0, &mut buffer)?;
        let u32_at = |at: usize| {
            u32::from_le_bytes([buffer[at], buffer[at + 1], buffer[at + 2], buffer[at + 3]])
        };
        let mut name = [0; abi::NAME_MAX];
        name.copy_from_slice(&buffer[8..]);
        let owner = match u32_at(4) {
            abi::OWNER_DEVICE => Owner::Device,
            abi::OWNER_DRIVER => Owner::Driver,
            _ => return Err(Error::Corrupt("a state page with an unknown owner")),
        };
        let value_bytes = u32_at(0);
        if !(1..=MAX_VALUE).contains(&value_bytes) {
            return Err(Error::Corrupt("a state page with an impossible size"));
        }
        Ok(Description { number, name: Name(name), value_bytes, owner })
    }

    /// The page called `name`, if there is one.
    pub fn find(&mut self, name: &str) -> Result<Option<Description>, Error> {
        for number in 0..self.count {
            let page = self.describe(number)?;
            if page.name.as_str() == name {
                return Ok(Some(page));
            }
        }
        Ok(None)
    }

    /// Registers memory for a page that the device writes. Interrupts come on `vector`.
    pub fn reader(&mut self, page: &Description, vector: u16) -> Result<Reader<H>, Error> {
        Self::check_owner(page, Owner::Device)?;
        let (function, bytes) = (&mut self.function, page.value_bytes);
        let (inner, region) = state_page::reader(function, page.number, vector, bytes)?;
        Ok(Reader { inner, region })
    }

    /// Ends a reader. Another reader of its page can then be made. Dropping a reader leaves its
    /// page registered until the connection closes.
    pub fn release(&mut self, reader: Reader<H>) -> Result<(), Error> {
        self.function.region_drop(reader.region)
    }

    /// Registers memory for a page that the driver writes.
    pub fn writer(&mut self, page: &Description, vector: u16) -> Result<Writer<H>, Error> {
        Self::check_owner(page, Owner::Driver)?;
        let (function, bytes) = (&mut self.function, page.value_bytes);
        let (inner, region) = state_page::writer(function, page.number, vector, bytes)?;
        Ok(Writer { inner, bell: self.function.bell(region.handle()), region })
    }

    /// Ends a writer. The device has seen its last value when this returns.
    pub fn finish(&mut self, writer: Writer<H>) -> Result<(), Error> {
        self.function.region_drop(writer.region)
    }

    /// Registers `memory`, which holds the page already: the driver has formatted it with the
    /// page's [layout](Description::layout), or has registered it in an earlier connection. So a
    /// driver keeps a page's memory when it opens the device again: version and value go on, and
    /// whoever reads the memory notices nothing. Attach the driver's end before: it reads the
    /// header.
    ///
    /// Returns the region, and the bell that a writer rings.
    pub fn register(
        &mut self,
        page: &Description,
        vector: u16,
        memory: &H::Dma,
    ) -> Result<(Region, Bell<H>), Error> {
        let range = (0, page.layout()?.bytes());
        let number = page.number;
        let signal = Some(SIGNAL_OFFSET);
        let region = self.function.region_add(number, vector, memory, range, signal)?;
        let bell = self.function.bell(region.handle());
        Ok((region, bell))
    }

    fn check_owner(page: &Description, owner: Owner) -> Result<(), Error> {
        if page.owner == owner {
            return Ok(());
        }
        Err(Error::Unsupported(match owner {
            Owner::Device => "reading a page that the driver itself writes",
            Owner::Driver => "writing a page that the device writes",
        }))
    }
}

/// Reads a page that the device writes.
#[derive(Debug)]
pub struct Reader<H: Hal> {
    inner: state::Reader<H::Dma, end::Driver>,
    region: Region,
}

impl<H: Hal> Reader<H> {
    /// Bytes of a value.
    pub fn value_bytes(&self) -> usize {
        self.inner.layout().value_bytes()
    }

    /// The current version. The device adds one with each value.
    pub fn version(&self) -> u64 {
        self.inner.version()
    }

    /// Copies the current value into the front of `out` and returns its version.
    pub fn read(&self, out: &mut [u8]) -> Result<u64, Error> {
        self.inner
            .read(out)
            .map_err(|Overrun| Error::Corrupt("the state page changes during every read"))
    }

    /// Asks for an interrupt by the first value after version `than`.
    pub fn arm_newer(&mut self, than: u64) -> Armed {
        self.inner.arm_newer(than)
    }

    /// Asks for no interrupt.
    pub fn disarm(&mut self) {
        self.inner.disarm();
    }
}

/// Writes a page that belongs to the driver.
#[derive(Debug)]
pub struct Writer<H: Hal> {
    inner: state::Writer<H::Dma, end::Driver>,
    bell: Bell<H>,
    region: Region,
}

impl<H: Hal> Writer<H> {
    /// Bytes of a value.
    pub fn value_bytes(&self) -> usize {
        self.inner.layout().value_bytes()
    }

    /// Makes `value` the current value, and wakes the device if it waits for a value. A short value
    /// is filled up with zeros, a long value is cut.
    pub fn write(&mut self, value: &[u8]) {
        self.bell.kick(self.inner.write(value));
    }
}
