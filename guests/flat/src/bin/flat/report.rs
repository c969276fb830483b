// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The report: lines of JSON on the first serial port.

use core::fmt::{self, Display, Write};
use core::panic::PanicInfo;

use flat::json::Line;

use crate::{cpu, power};

const SERIAL: u16 = 0x3f8;
const LINE_STATUS: u16 = SERIAL + 5;
const EMPTY: u8 = 1 << 5;

/// The serial port. The guest does not set its speed, because a virtual port has none.
pub struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while cpu::in8(LINE_STATUS) & EMPTY == 0 {}
            cpu::out8(SERIAL, byte);
        }
        Ok(())
    }
}

/// Begins a line about `test`.
pub fn line(test: &str) -> Line<Serial> {
    Line::new(Serial).text("test", test)
}

/// Why a test failed.
pub enum Failure<'a> {
    /// The driver's error.
    Driver(vbus_driver::Error),
    /// No test has this name.
    Unknown(&'a str),
    /// Another reason, in words.
    Said(&'static str),
}

impl From<vbus_driver::Error> for Failure<'_> {
    fn from(error: vbus_driver::Error) -> Self {
        Failure::Driver(error)
    }
}

impl Display for Failure<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Driver(error) => write!(f, "{error}"),
            Failure::Unknown(name) => write!(f, "there is no test {name}"),
            Failure::Said(text) => f.write_str(text),
        }
    }
}

/// The result of a test.
pub type Outcome<'a> = Result<(), Failure<'a>>;

/// Fails with `text` unless `condition` holds.
pub fn ensure<'a>(condition: bool, text: &'static str) -> Outcome<'a> {
    if condition { Ok(()) } else { Err(Failure::Said(text)) }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let place = info.location().map_or(("", 0), |at| (at.file(), at.line()));
    line("panic")
        .value("ok", false)
        .text("error", info.message())
        .text("at", format_args!("{}:{}", place.0, place.1))
        .end();
    power::off()
}
