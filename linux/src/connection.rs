// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The connection of a class that has one as long as the device is there, and the look at any
//! connection.

use vbus_driver::{Error, Events, Function};

use crate::hal::KernelHal;

/// How long all commands may take by which a device is opened, or which the driver gives at a time,
/// in nanoseconds. Whoever puts the device to sleep or lets it go waits for them.
pub const BUDGET: u64 = 10_000_000_000;

/// The connection now.
pub enum Connection<T> {
    /// The device is open.
    Open(T),
    /// It was lost, and could not be opened again yet.
    Lost(Error),
    /// The system sleeps or goes down, or the function is being reset.
    Asleep,
    /// The driver has left the device.
    Left,
}

impl<T> Connection<T> {
    /// As [`look`], at the function that `function` names.
    pub fn look(&self, function: impl FnOnce(&T) -> &Function<KernelHal>) -> Result<Events, Error> {
        match self {
            Self::Open(open) => look(function(open)),
            Self::Lost(error) => Err(*error),
            Self::Asleep | Self::Left => Ok(Events::default()),
        }
    }

    /// Ends the connection, and takes that of `open` in its place. If the class sleeps or has left
    /// the device, nothing happens: a look that found the connection lost may have begun before.
    pub fn reopen(&mut self, open: impl FnOnce() -> Result<T, Error>) -> Result<(), Error> {
        if let Self::Asleep | Self::Left = self {
            return Ok(());
        }
        // The former one ends before.
        *self = Self::Lost(Error::Gone);
        *self = match open() {
            Ok(open) => Self::Open(open),
            Err(error) => {
                *self = Self::Lost(error);
                return Err(error);
            }
        };
        Ok(())
    }

    /// The device has gone. There is no connection until it is opened again.
    pub fn lose(&mut self) {
        if let Self::Open(_) | Self::Lost(_) = self {
            *self = Self::Lost(Error::Gone);
        }
    }

    /// From now on it may be opened again after a sleep.
    pub fn wake(&mut self) {
        if let Self::Asleep = self {
            *self = Self::Lost(Error::Gone);
        }
    }
}

/// Takes the pending events of an open function, and checks that its connection still exists.
pub fn look(function: &Function<KernelHal>) -> Result<Events, Error> {
    if !function.is_open() {
        return Ok(Events::default());
    }
    // Events first: they tell what to look at.
    let events = function.events()?;
    function.check()?;
    Ok(events)
}
