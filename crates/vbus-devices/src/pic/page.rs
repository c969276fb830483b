// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A processor of the driver, with its page and its interrupt.

use std::sync::Arc;

use vbus_core::shm::pic::DeviceEnd;
use vbus_core::{Counter, ErrorCode, Interrupt, InterruptSink, Metric, Region, Window};

/// What the numbers of a page mean.
pub const METRICS: &[Metric] = &[
    Metric::counter("pages.{cpu=cpu}.raised", "pic_raised", "Times that a line was raised"),
    Metric::counter(
        "pages.{cpu=cpu}.messages",
        "pic_messages",
        "Raised lines for which the processor was interrupted",
    )
    .unit("interrupts"),
];

/// A page that the driver has registered.
pub struct Cpu {
    pub handle: u32,
    page: DeviceEnd<Window>,
    message: Interrupt,
    pub raised: Counter,
    pub messages: Counter,
}

impl Cpu {
    pub fn new(region: Region) -> Result<Cpu, ErrorCode> {
        if region.signal_offset.is_some() {
            return Err(ErrorCode::BAD_SIGNAL);
        }
        let page = DeviceEnd::attach(region.window)?;
        let (raised, messages) = Default::default();
        Ok(Cpu { handle: region.handle, page, message: region.interrupt, raised, messages })
    }

    /// The number of lines of the page.
    pub fn lines(&self) -> u16 {
        self.page.lines()
    }

    /// Raises a line, and interrupts the processor if the page asks for that.
    pub fn raise(&self, line: u16) {
        self.raised.one();
        let wanted = self.page.raise(line);
        if wanted.is_wanted() {
            self.messages.one();
        }
        self.message.kick(wanted);
    }

    /// Clears a pending line. Returns false if the driver has taken the line already.
    pub fn take_back(&self, line: u16) -> bool {
        self.page.take_back(line)
    }
}

/// A line of a processor, as the end of a route.
pub struct Line {
    pub cpu: Arc<Cpu>,
    pub number: u16,
}

impl InterruptSink for Line {
    fn trigger(&self, _vector: u16) {
        self.cpu.raise(self.number);
    }
}
