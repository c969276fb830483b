// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Driver of any class with requests and responses (spec/service.md). The driver sends bytes, and
//! the device answers with bytes. The device's half is `vbus_core::service`.
//!
//! ```
//! use vbus_driver::requests::Requests;
//! use vbus_driver::{Error, Function, Hal};
//!
//! /// Asks the device "shout" for a text in capital letters. `wait` sleeps until an interrupt
//! /// comes, and says whether one came.
//! fn shout<H: Hal>(hal: H, text: &str, wait: impl FnMut() -> bool) -> Result<[u8; 64], Error> {
//!     let mut requests = Requests::open(Function::probe(hal)?, "shout", 1, 0)?;
//!     let mut response = [0; 64];
//!     requests.call(text.as_bytes(), &mut response, wait)?;
//!     Ok(response)
//! }
//! ```
//!
//! [`Requests::call`] sends one request and waits for its response. With
//! [`submit`](Requests::submit), [`post`](Requests::post) and [`complete`](Requests::complete)
//! many are under way at a time.

use vbus_shm::ErrorCode;
use vbus_shm::abi::{reg, service as abi};
use vbus_shm::ring::{DriverEnd, Entry, Layout, Return, Returns, SIGNAL_OFFSET};
use vbus_shm::signal::Armed;

use crate::{Bell, Dma, Error, Function, Hal};

/// The most requests under way.
pub const DEPTH_MAX: u32 = 64;

/// A device with requests and responses, with an open connection.
///
/// Its buffers and its ring are one region. The function keeps that memory until the device has let
/// go of it.
#[derive(Debug)]
pub struct Requests<H: Hal> {
    function: Function<H>,
    ring: DriverEnd<H::Dma>,
    bell: Bell<H>,
    memory: H::Dma,
    request_max: usize,
    response_max: usize,
    depth: u32,
    /// Offset of the first buffer, and bytes from one buffer to the next.
    buffers: (usize, usize),
    /// A bit for each id whose request is under way.
    under_way: u64,
}

/// A response, or the end of a request without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The id that [`Requests::submit`] returned.
    pub id: u16,
    /// Bytes of the response, or the error code with which the device refused the request.
    pub result: Result<usize, ErrorCode>,
}

impl<H: Hal> Requests<H> {
    /// Opens the device, whose class must be called `class_name`, for `depth` requests at a time, 1
    /// to [`DEPTH_MAX`]. Interrupts come on `vector`.
    ///
    /// # Errors
    /// The device is of another class, it cannot be opened, its config area is invalid, or there is
    /// no memory.
    pub fn open(
        mut function: Function<H>,
        class_name: &str,
        depth: u32,
        vector: u16,
    ) -> Result<Self, Error> {
        if function.info().class_name.as_str() != class_name {
            return Err(Error::WrongClass(function.info().class));
        }
        if !(1..=DEPTH_MAX).contains(&depth) {
            return Err(Error::Unsupported("so many requests at a time"));
        }
        let mut area = [0; abi::CONFIG_OWN];
        function.config(&mut area)?;
        let [request_max, response_max] = [abi::CONFIG_REQUEST_MAX, abi::CONFIG_RESPONSE_MAX]
            .map(|at| u32::from_le_bytes([area[at], area[at + 1], area[at + 2], area[at + 3]]));
        if ![request_max, response_max].iter().all(|bytes| (1..=abi::BYTES_MAX).contains(bytes)) {
            return Err(Error::Corrupt("an impossible size of requests or responses"));
        }
        function.open(0)?;

        let entries = depth.next_power_of_two().max(2);
        let layout = Layout::new(entries, Returns::Entries)
            .map_err(|_| Error::Unsupported("so many requests at a time"))?;
        let stride = (request_max.max(response_max) as usize).next_multiple_of(abi::BUFFER_ALIGN);
        let bytes = layout.bytes() + stride * depth as usize;
        if bytes as u64 > function.info().max_region_bytes {
            return Err(Error::Unsupported("so many requests of that size at a time"));
        }
        let memory = function.hal().alloc(bytes)?;
        let ring = DriverEnd::create(memory.clone(), layout, 0).map_err(|_| Error::NoMemory)?;
        let region =
            function.region_add(abi::REGION, vector, &memory, (0, bytes), Some(SIGNAL_OFFSET))?;
        Ok(Requests {
            bell: function.bell(region.handle()),
            function,
            ring,
            memory,
            request_max: request_max as usize,
            response_max: response_max as usize,
            depth,
            buffers: (layout.bytes(), stride),
            under_way: 0,
        })
    }

    /// The function.
    pub fn function(&self) -> &Function<H> {
        &self.function
    }

    /// The most bytes of a request.
    pub fn request_max(&self) -> usize {
        self.request_max
    }

    /// The most bytes of a response.
    pub fn response_max(&self) -> usize {
        self.response_max
    }

    /// Reads the class's own part of the config area from its beginning. Bytes of `out` that the
    /// device does not have become 0.
    ///
    /// # Errors
    /// As of [`Function::config`].
    pub fn config(&self, out: &mut [u8]) -> Result<(), Error> {
        let mut area = [0; reg::CONFIG_MAX];
        self.function.config(&mut area)?;
        out.fill(0);
        let own = &area[abi::CONFIG_OWN..];
        let len = out.len().min(own.len());
        out[..len].copy_from_slice(&own[..len]);
        Ok(())
    }

    /// Requests that can be submitted now.
    pub fn space(&self) -> u32 {
        self.depth - self.under_way.count_ones()
    }

    /// Gives a request to the device. A device that sleeps sees it after [`post`](Self::post).
    /// Returns the request's id, or `None` if `depth` requests are under way.
    ///
    /// # Errors
    /// The request is longer than [`request_max`](Self::request_max).
    pub fn submit(&mut self, request: &[u8]) -> Result<Option<u16>, Error> {
        if request.len() > self.request_max {
            return Err(Error::Unsupported("a request longer than the device takes"));
        }
        let Some(id) = (0..self.depth).find(|id| self.under_way & 1 << id == 0) else {
            return Ok(None);
        };
        let offset = self.buffer(id);
        self.memory.copy_in(offset, request);
        let entry = Entry {
            addr: offset as u64,
            len: u32::try_from(request.len()).unwrap_or(0),
            id: u16::try_from(id).unwrap_or(0),
            flags: 0,
        };
        // The ring has an entry for each id.
        self.ring
            .submit(entry)
            .map_err(|_| Error::Corrupt("the device returned too many requests"))?;
        self.under_way |= 1 << id;
        Ok(Some(entry.id))
    }

    /// Wakes the device for submitted requests, if it sleeps.
    pub fn post(&mut self) {
        self.bell.kick(self.ring.post());
    }

    /// Takes the next response, if one has come. Copies as much of it to `response` as fits.
    /// Responses may come in another order than the requests.
    ///
    /// # Errors
    /// The device broke the protocol. Do not go on with this connection.
    pub fn complete(&mut self, response: &mut [u8]) -> Result<Option<Completion>, Error> {
        let entry = self
            .ring
            .reap()
            .map_err(|_| Error::Corrupt("the device returned too many requests"))?;
        let Some(Return { len, id, flags }) = entry else { return Ok(None) };
        if u32::from(id) >= self.depth || self.under_way & 1 << id == 0 {
            return Err(Error::Corrupt("a response to no request"));
        }
        if flags & abi::REFUSED != 0 {
            self.under_way &= !(1 << id);
            return Ok(Some(Completion { id, result: Err(ErrorCode(len)) }));
        }
        let len = len as usize;
        if len > self.response_max {
            return Err(Error::Corrupt("a response longer than the announced maximum"));
        }
        self.under_way &= !(1 << id);
        let fits = len.min(response.len());
        self.memory.copy_out(self.buffer(u32::from(id)), &mut response[..fits]);
        Ok(Some(Completion { id, result: Ok(len) }))
    }

    /// Asks for an interrupt by the next response. Call it before the driver sleeps.
    /// [`Armed::Missed`]: a response has come already.
    pub fn arm(&mut self) -> Armed {
        self.ring.arm(0)
    }

    /// Asks for no interrupts.
    pub fn disarm(&mut self) {
        self.ring.disarm();
    }

    /// Sends a request and waits for its response. Copies as much of it to `response` as fits.
    /// Returns the number of bytes of the whole response.
    ///
    /// `wait` sleeps until the function's interrupt comes, and then returns true. If no interrupt
    /// came in a time of its choice, it returns false: this method then checks the connection and
    /// waits again. This method acknowledges the interrupt.
    ///
    /// # Errors
    /// [`Error::Refused`] with the class's own error code if the device refuses the request: the
    /// connection goes on. Other errors: other requests are under way, the request is too long, or
    /// the device has gone, ended the connection, or broke the protocol.
    pub fn call(
        &mut self,
        request: &[u8],
        response: &mut [u8],
        mut wait: impl FnMut() -> bool,
    ) -> Result<usize, Error> {
        if self.under_way != 0 {
            return Err(Error::Unsupported("a call while other requests are under way"));
        }
        self.submit(request)?;
        self.post();
        let mut missed = false;
        loop {
            if let Some(done) = self.complete(response)? {
                return done.result.map_err(|code| self.function.refused("request", code));
            }
            if missed {
                // An honest device's response is there once it says so. This one could say so for
                // ever.
                return Err(Error::Corrupt("a response that is announced and not there"));
            }
            match self.arm() {
                Armed::Missed => missed = true,
                Armed::Waiting if wait() => self.function.acknowledge(),
                Armed::Waiting => self.function.check()?,
            }
            self.disarm();
        }
    }

    /// Closes the connection and gives the function back.
    pub fn close(mut self) -> Function<H> {
        self.function.close();
        self.function
    }

    fn buffer(&self, id: u32) -> usize {
        let (first, stride) = self.buffers;
        first + stride * id as usize
    }
}
