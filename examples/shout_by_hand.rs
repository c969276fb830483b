// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device of [`shout`](crate::shout) and its driver with a ring of their own, for a class that
//! needs another form than request and response.

use std::sync::Arc;

use vbus_core::memory::MemoryContext;
use vbus_core::shm::ring::{DeviceEnd, DriverEnd, Entry, Layout, Returns, SIGNAL_OFFSET};
use vbus_core::shm::signal::Armed;
use vbus_core::{
    Connection, Device, ErrorCode, Identity, Interrupt, Open, Progress, Region, Window,
};
use vbus_driver::{Dma, Error, Function, Hal};

/// The longest text, in bytes.
pub const TEXT_MAX: usize = 4096;

/// The device.
pub struct Shout;

impl Device for Shout {
    fn identity(&self) -> Identity {
        Identity::user("shout")
    }

    fn open(&self, open: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(Shouting { memory: open.memory, ring: None }))
    }
}

struct Shouting {
    memory: Arc<MemoryContext>,
    ring: Option<(DeviceEnd<Window>, Interrupt)>,
}

impl Connection for Shouting {
    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
        self.ring = Some((DeviceEnd::attach(region.window)?, region.interrupt));
        Ok(())
    }

    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        let Some((ring, interrupt)) = &mut self.ring else { return Ok(Progress::Idle) };
        let memory = self.memory.view();
        let mut progress = Progress::Idle;
        for _ in 0..budget {
            let Some(entry) = ring.take()? else { break };
            let len = entry.len as usize;
            if len > TEXT_MAX {
                return Err(ErrorCode::BAD_LENGTH);
            }
            let mut text = [0; TEXT_MAX];
            memory.read(entry.addr, &mut text[..len])?;
            text.make_ascii_uppercase();
            memory.write(entry.addr, &text[..len])?;
            ring.give_back(entry.into());
            progress = Progress::Busy;
        }
        interrupt.kick(ring.post());
        Ok(progress)
    }

    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        Ok(self.ring.as_mut().map_or(Armed::Waiting, |(ring, _)| ring.arm(0)))
    }

    fn disarm(&mut self) {
        if let Some((ring, _)) = &mut self.ring {
            ring.disarm();
        }
    }
}

/// The driver, for any environment. `wait` sleeps until the next interrupt.
pub fn shout<H: Hal>(hal: H, text: &str, wait: impl FnOnce()) -> Result<String, Error> {
    let mut function = Function::probe(hal.clone())?;
    function.open(0)?;
    let layout = Layout::new(16, Returns::Entries).expect("16 is a power of two");
    let (memory, buffer) = (hal.alloc(layout.bytes())?, hal.alloc(TEXT_MAX)?);
    let mut ring =
        DriverEnd::create(memory.clone(), layout, 0).expect("the memory is large enough");
    let region = function.region_add(0, 0, &memory, (0, layout.bytes()), Some(SIGNAL_OFFSET))?;
    let mut bytes = text.as_bytes()[..text.len().min(TEXT_MAX)].to_vec();
    buffer.copy_in(0, &bytes);
    let len = u32::try_from(bytes.len()).expect("at most TEXT_MAX");
    ring.submit(Entry { addr: buffer.address(0), len, id: 0, flags: 0 })
        .expect("the ring is empty");
    let armed = ring.arm(0);
    if ring.post().is_wanted() {
        function.ring(region.handle());
    }
    if armed == Armed::Waiting {
        wait();
    }
    ring.reap().map_err(|_| Error::Corrupt("ring"))?.ok_or(Error::Corrupt("woken for nothing"))?;
    buffer.copy_out(0, &mut bytes);
    String::from_utf8(bytes).map_err(|_| Error::Corrupt("not the text that it was"))
}
