// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver. It works in a guest and in a plain process.

use vbus_driver::requests::Requests;
use vbus_driver::{Error, Function, Hal};

use crate::{CLASS, ERRORS, Header, READ, SECTOR, WRITE};

/// An open disk.
pub struct Disk<H: Hal, W> {
    requests: Requests<H>,
    wait: W,
}

impl<H: Hal, W: FnMut() -> bool> Disk<H, W> {
    /// Opens the device behind `hal`. `wait` waits for an interrupt and returns whether one came.
    pub fn open(hal: H, wait: W) -> Result<Self, Error> {
        let mut function = Function::probe(hal)?;
        function.set_class_errors(ERRORS);
        Ok(Disk { requests: Requests::open(function, CLASS, 1, 0)?, wait })
    }

    /// The number of sectors.
    pub fn sectors(&self) -> Result<u64, Error> {
        let mut bytes = [0; 8];
        self.requests.config(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Reads whole sectors from `sector` on, at most [`DATA_MAX`](crate::DATA_MAX) bytes.
    pub fn read(&mut self, sector: u64, data: &mut [u8]) -> Result<(), Error> {
        let request = Header(READ, count(data), sector).with(&[]);
        let length = self.requests.call(&request, data, &mut self.wait)?;
        if length == data.len() { Ok(()) } else { Err(Error::Corrupt("the length of a response")) }
    }

    /// Writes whole sectors from `sector` on, at most [`DATA_MAX`](crate::DATA_MAX) bytes.
    pub fn write(&mut self, sector: u64, data: &[u8]) -> Result<(), Error> {
        let request = Header(WRITE, count(data), sector).with(data);
        self.requests.call(&request, &mut [], &mut self.wait).map(drop)
    }
}

/// The number of sectors in `data`.
fn count(data: &[u8]) -> u32 {
    u32::try_from(data.len() / SECTOR).unwrap_or(u32::MAX)
}
