// SPDX-License-Identifier: Apache-2.0 OR MIT
//! This program as the driver of a state device.

use std::time::Duration;

use anyhow::{Context, Result};
use vbus_driver::state::{Description, Pages};
use vbus_driver::{Acknowledger, Function, Hal};
use vbus_guest::{Claimed, Interrupt, wait};
use vbus_shm::signal::Armed;

use super::{Form, Listed, Printer, check_length, no_page, print};

/// An open state device.
pub struct Session<H: Hal> {
    pages: Pages<H>,
    acknowledger: Acknowledger<H>,
    interrupt: Box<dyn Interrupt>,
}

impl<H: Hal> Session<H> {
    pub fn open((hal, interrupt): Claimed<H>) -> Result<Self> {
        let function = Function::probe(hal)?;
        let acknowledger = function.acknowledger();
        Ok(Session { pages: Pages::open(function)?, acknowledger, interrupt })
    }

    fn find(&mut self, name: &str) -> Result<Description> {
        self.pages.find(name)?.with_context(|| no_page(name))
    }

    /// All pages.
    pub fn list(&mut self) -> Result<Vec<Listed>> {
        let count = self.pages.count();
        let list = |number| {
            let page = self.pages.describe(number)?;
            Ok(Listed { name: page.name.to_string(), owner: page.owner, bytes: page.value_bytes })
        };
        (0..count).map(list).collect()
    }

    pub fn get(&mut self, name: &str, form: Form) -> Result<()> {
        let page = self.find(name)?;
        let reader = self.pages.reader(&page, 0)?;
        let mut value = vec![0; reader.value_bytes()];
        // The device has written the current value before it answered that the page is registered.
        reader.read(&mut value)?;
        print(&value, form);
        Ok(())
    }

    pub fn set(&mut self, name: &str, value: &[u8]) -> Result<()> {
        let page = self.find(name)?;
        check_length(name, value, page.value_bytes as usize)?;
        let mut writer = self.pages.writer(&page, 0)?;
        writer.write(value);
        Ok(self.pages.finish(writer)?)
    }

    pub fn watch(&mut self, name: &str, printer: &mut Printer) -> Result<()> {
        let page = self.find(name)?;
        let mut reader = self.pages.reader(&page, 0)?;
        let mut value = vec![0; reader.value_bytes()];
        let mut version = reader.read(&mut value)?;
        // A watch that lost its connection has printed the value already if nobody has changed it.
        if !printer.is_done() && printer.last.as_ref() != Some(&value) {
            printer.print(&value);
        }
        while !printer.is_done() {
            while reader.arm_newer(version) == Armed::Waiting {
                let interrupted = self.sleep()?;
                if reader.version() != version {
                    break;
                }
                // The page did not change: the interrupt may have told of an event of the function.
                // A device that is silent may have lost the connection.
                if !interrupted || !self.pages.function().events()?.is_empty() {
                    self.pages.function().check()?;
                }
            }
            reader.disarm();
            version = reader.read(&mut value)?;
            printer.print(&value);
        }
        Ok(())
    }

    /// Waits for an interrupt, at most for a second. Returns whether one came.
    fn sleep(&mut self) -> Result<bool> {
        let interrupted = wait(&mut *self.interrupt, Duration::from_secs(1))?;
        if interrupted {
            self.acknowledger.acknowledge();
        }
        Ok(interrupted)
    }
}
