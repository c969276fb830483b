//! The I/O APIC of a split irqchip: its registers and pins, which become messages to the local
//! APICs in the kernel.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use vbus_kvm::{Route, Routes};

use crate::bus::BusDevice;
use crate::layout;

/// Bytes of its registers.
pub const IO_APIC_BYTES: u64 = 0x1000;

/// Where its two registers lie: one selects, the other is a window to what was selected.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

/// What can be selected.
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const ENTRIES: u8 = 0x10;
/// Version 0x11 of the chip, and its last pin.
const VERSION_VALUE: u32 = 0x11 | (layout::PINS - 1) << 16;
/// The identity's bits.
const ID_BITS: u32 = 0x0f00_0000;

/// Bits of an entry: vector, delivery mode, logical destination, pending (read only), active low,
/// being serviced (read only), level-triggered, masked, destination.
const VECTOR: u64 = 0xff;
const MODE: u64 = 0x700;
const LOGICAL: u64 = 1 << 11;
const SERVICED: u64 = 1 << 14;
const READ_ONLY: u64 = 1 << 12 | SERVICED;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const DESTINATION: u32 = 56;
/// Delivery mode "external": the PIC's, and there is none.
const EXTERNAL: u64 = 0x700;

/// The chip.
pub struct IoApic {
    routes: Arc<Routes>,
    state: Mutex<State>,
}

/// A device that asserts a pin by an eventfd: it hears by another one of the end of the interrupt,
/// which takes the pin down, and asserts it again if it has still something to say. Dropped: it
/// does so no more.
pub struct Source {
    chip: Arc<IoApic>,
    pin: u32,
    assert: OwnedFd,
    ended: Arc<OwnedFd>,
}

struct State {
    select: u8,
    id: u32,
    pins: [Pin; layout::PINS as usize],
    /// Pins with those who hear of their ends.
    sources: Vec<(u32, Arc<OwnedFd>)>,
}

#[derive(Clone, Copy)]
struct Pin {
    entry: u64,
    high: bool,
}

impl Default for State {
    fn default() -> State {
        let pins = [Pin { entry: MASKED, high: false }; layout::PINS as usize];
        State { select: 0, id: 0, pins, sources: Vec::new() }
    }
}

impl State {
    fn read(&self) -> u32 {
        match self.select {
            ID | ARBITRATION => self.id,
            VERSION => VERSION_VALUE,
            select => match self.pins.get(usize::from(select.wrapping_sub(ENTRIES) / 2)) {
                Some(pin) if select % 2 == 0 => (pin.entry & 0xffff_ffff) as u32,
                Some(pin) => (pin.entry >> 32) as u32,
                None => 0,
            },
        }
    }

    /// Writes; the pin whose entry has changed.
    fn write(&mut self, value: u32) -> Option<usize> {
        if self.select == ID {
            self.id = value & ID_BITS;
        }
        let number = usize::from(self.select.checked_sub(ENTRIES)? / 2);
        let entry = &mut self.pins.get_mut(number)?.entry;
        *entry = if self.select % 2 == 0 {
            *entry & !0xffff_ffff | *entry & READ_ONLY | u64::from(value) & !READ_ONLY
        } else {
            *entry & 0xffff_ffff | u64::from(value) << 32
        };
        // An edge is serviced at once.
        if *entry & LEVEL == 0 {
            *entry &= !SERVICED;
        }
        Some(number)
    }
}

impl Pin {
    /// What it sends, if it may.
    fn message(&self) -> Option<(u64, u32)> {
        (self.entry & MASKED == 0).then(|| self.route())?
    }

    /// What it sends while it is not masked.
    fn route(&self) -> Option<(u64, u32)> {
        let entry = self.entry;
        if entry & MODE == EXTERNAL {
            return None;
        }
        let address = 0xfee0_0000 | (entry >> DESTINATION) << 12 | (entry & LOGICAL) >> 9;
        // Asserted; vector, delivery mode and trigger have the same places in a message.
        let data = entry & (VECTOR | MODE | LEVEL) | 1 << 14;
        Some((address, (data & 0xffff_ffff) as u32))
    }

    /// The message to send now for a level that nobody services yet.
    fn due(&mut self) -> Option<(u64, u32)> {
        let due = self.high && self.entry & (LEVEL | SERVICED) == LEVEL;
        let message = self.message().filter(|_| due)?;
        self.entry |= SERVICED;
        Some(message)
    }
}

impl IoApic {
    /// One whose messages take the routes of the first numbers of `routes`.
    pub fn new(routes: Arc<Routes>) -> IoApic {
        IoApic { routes, state: Mutex::default() }
    }

    /// Sets the level of a pin.
    pub fn set(&self, pin: u32, high: bool) {
        let mut state = self.lock();
        let Some(pin) = state.pins.get_mut(pin as usize) else { return };
        let rising = high && !pin.high;
        pin.high = high;
        let message =
            if pin.entry & LEVEL != 0 { pin.due() } else { pin.message().filter(|_| rising) };
        self.send(message);
    }

    /// A source on a pin that no [`set`](Self::set) touches.
    pub fn source(self: &Arc<Self>, pin: u32) -> io::Result<Source> {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let (assert, ended) = (event()?, Arc::new(event()?));
        self.lock().sources.push((pin, ended.clone()));
        Ok(Source { chip: self.clone(), pin, assert, ended })
    }

    /// A local APIC has ended the interrupt of a vector.
    pub fn end(&self, vector: u8) {
        let State { pins, sources, .. } = &mut *self.lock();
        for (number, pin) in (0..).zip(pins) {
            if pin.entry & VECTOR == u64::from(vector) && pin.entry & SERVICED != 0 {
                pin.entry &= !SERVICED;
                for (_, ended) in sources.iter().filter(|(pin, _)| *pin == number) {
                    pin.high = false;
                    signal(ended);
                }
                self.send(pin.due());
            }
        }
    }

    /// As after a reset, but for the levels, which are the devices'.
    pub fn reset(&self) {
        let mut state = self.lock();
        let high = state.pins.map(|pin| pin.high);
        *state = State { sources: std::mem::take(&mut state.sources), ..State::default() };
        for (pin, high) in state.pins.iter_mut().zip(high) {
            pin.high = high;
        }
        for number in 0..layout::PINS {
            let _ = self.routes.set(number, None);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, message: Option<(u64, u32)>) {
        let Some((address, data)) = message else { return };
        // A message to a CPU that is not there is lost, as on a PC.
        let _ = self.routes.send(address, data);
    }
}

fn signal(event: &OwnedFd) {
    // A full count is a signal already.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

impl Source {
    /// What the device writes to assert the pin; somebody has to wait for it, and
    /// [`take`](Self::take) it.
    pub fn assert(&self) -> BorrowedFd<'_> {
        self.assert.as_fd()
    }

    /// What becomes readable when the guest has ended the interrupt.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Asserts the pin, if the device has asked for it.
    pub fn take(&self) {
        if rustix::io::read(&self.assert, &mut [0; 8]).is_ok() {
            self.chip.set(self.pin, true);
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.chip.lock().sources.retain(|(_, ended)| !Arc::ptr_eq(ended, &self.ended));
        // The others on the pin say so if they still assert it.
        self.chip.set(self.pin, false);
        self.chip
            .lock()
            .sources
            .iter()
            .filter(|(pin, _)| *pin == self.pin)
            .for_each(|(_, ended)| signal(ended));
    }
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let value = match offset {
            SELECT => state.select.into(),
            WINDOW => state.read(),
            _ => 0,
        };
        for (to, from) in
            data.iter_mut().zip(value.to_le_bytes().into_iter().chain(std::iter::repeat(0)))
        {
            *to = from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        match (offset, data) {
            (SELECT, [select, ..]) => state.select = *select,
            (WINDOW, &[a, b, c, d]) => {
                let Some(number) = state.write(u32::from_le_bytes([a, b, c, d])) else { return };
                let pin = &mut state.pins[number];
                // The kernel tells of the end of an interrupt only if a pin has its route: also one
                // that was masked while it was serviced.
                let route = pin.route().map(|(address, data)| Route::Msi { address, data });
                let _ = self.routes.set(u32::try_from(number).unwrap_or(u32::MAX), route);
                self.send(pin.due());
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_becomes_a_message() {
        let mut state = State { select: ENTRIES + 2 * 9 + 1, ..Default::default() };
        assert_eq!(state.write(3 << 24), Some(9));
        state.select -= 1;
        assert_eq!(state.pins[9].message(), None);
        assert_eq!(state.write(0x41 | 1 << 8 | 0xd900), Some(9));
        assert_eq!(state.pins[9].message(), Some((0xfee0_3004, 0xc141)));
        assert_eq!(state.read(), 0x8941);
        state.select = ENTRIES + 2 * 24;
        assert_eq!((state.write(1), state.read()), (None, 0));
        state.select = VERSION;
        assert_eq!((state.write(1), state.read()), (None, 0x0017_0011));
    }

    #[test]
    fn a_level_is_sent_once_until_it_is_ended() {
        let mut pin = Pin { entry: 0x41 | LEVEL, high: true };
        assert!(pin.due().is_some());
        assert!(pin.due().is_none());
        pin.entry &= !SERVICED;
        pin.high = false;
        assert!(pin.due().is_none());
        pin.high = true;
        pin.entry |= MASKED;
        assert!(pin.due().is_none());
        assert_eq!(pin.entry & SERVICED, 0);
    }
}
