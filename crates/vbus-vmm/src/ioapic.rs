// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The I/O APIC of a split irqchip. It turns its pins into messages to the local APICs, which are
//! in the kernel.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_kvm::{Route, Routes, take_signal};

use crate::bus::BusDevice;
use crate::dump;
use crate::layout;
use crate::lock::lock;

/// Bytes of its registers.
pub const IO_APIC_BYTES: u64 = 0x1000;

/// The offsets of its two registers: the first selects a register, the second accesses it.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

/// The registers that can be selected.
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const ENTRIES: u8 = 0x10;
/// Version 0x11 of the I/O APIC, and the number of its last pin.
const VERSION_VALUE: u32 = 0x11 | (layout::PINS - 1) << 16;
/// The bits of the register ID.
const ID_BITS: u32 = 0x0f00_0000;

/// Bits of a redirection entry: vector, delivery mode, logical destination, serviced (read only),
/// level-triggered, masked, destination. Bit 12, "pending", is read only too.
const VECTOR: u64 = 0xff;
const MODE: u64 = 0x700;
const LOGICAL: u64 = 1 << 11;
const SERVICED: u64 = 1 << 14;
const READ_ONLY: u64 = 1 << 12 | SERVICED;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const DESTINATION: u32 = 56;
/// Delivery mode "external", by which a PIC delivers. There is no PIC.
const EXTERNAL: u64 = 0x700;

/// The I/O APIC.
pub struct IoApic {
    routes: Arc<Routes>,
    state: Mutex<State>,
}

/// A device that asserts a pin (INTx) by an eventfd. When the guest ends the interrupt, the I/O
/// APIC lowers the pin and signals a second eventfd. A device that still has a reason to interrupt
/// then asserts the pin again. Dropping this value disconnects the device.
pub struct IntxSource {
    io_apic: Arc<IoApic>,
    pin: u32,
    assert: OwnedFd,
    ended: Arc<OwnedFd>,
}

/// The state of an I/O APIC, as a saved machine has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedIoApic {
    select: u8,
    id: u32,
    /// The redirection entry of each pin.
    entries: [u64; layout::PINS as usize],
    /// The pins that are high: bit n is pin n.
    high: u32,
}

struct State {
    select: u8,
    id: u32,
    pins: [Pin; layout::PINS as usize],
    /// Pins, and the eventfds that report the ends of their interrupts.
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

    /// Writes the selected register. Returns the pin whose entry has changed.
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
        // An edge-triggered interrupt is never "being serviced".
        if *entry & LEVEL == 0 {
            *entry &= !SERVICED;
        }
        Some(number)
    }
}

impl Pin {
    /// The message of the pin, unless it is masked.
    fn message(&self) -> Option<(u64, u32)> {
        (self.entry & MASKED == 0).then(|| self.route())?
    }

    /// The message of the pin, masked or not.
    fn route(&self) -> Option<(u64, u32)> {
        let entry = self.entry;
        if entry & MODE == EXTERNAL {
            return None;
        }
        let address = 0xfee0_0000 | (entry >> DESTINATION) << 12 | (entry & LOGICAL) >> 9;
        // The message is "assert". Vector, delivery mode and trigger mode have the same bits in it.
        let data = entry & (VECTOR | MODE | LEVEL) | 1 << 14;
        Some((address, (data & 0xffff_ffff) as u32))
    }

    /// The message to send now for a high level that no CPU services yet.
    fn due(&mut self) -> Option<(u64, u32)> {
        let due = self.high && self.entry & (LEVEL | SERVICED) == LEVEL;
        let message = self.message().filter(|_| due)?;
        self.entry |= SERVICED;
        Some(message)
    }
}

impl IoApic {
    /// Makes an I/O APIC whose pins have the first numbers of `routes`.
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

    /// Connects a device to a pin. [`set`](Self::set) must not be used for this pin.
    ///
    /// # Errors
    /// The process has no more descriptors.
    pub fn source(self: &Arc<Self>, pin: u32) -> io::Result<IntxSource> {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let (assert, ended) = (event()?, Arc::new(event()?));
        self.lock().sources.push((pin, ended.clone()));
        Ok(IntxSource { io_apic: self.clone(), pin, assert, ended })
    }

    /// Handles the end of the interrupts of a vector, which a local APIC reports.
    pub fn end(&self, vector: u8) {
        let State { pins, sources, .. } = &mut *self.lock();
        for (number, pin) in (0..).zip(pins) {
            if pin.entry & VECTOR == u64::from(vector) && pin.entry & SERVICED != 0 {
                pin.entry &= !SERVICED;
                for (_, ended) in sources.iter().filter(|(pin, _)| *pin == number) {
                    pin.high = false;
                    self.signal(ended);
                }
                self.send(pin.due());
            }
        }
    }

    /// The pins in use, as the control request `dump` tells them.
    pub(crate) fn dump(&self) -> Value {
        let state = self.lock();
        let high = state.pins.iter().rev().fold(0, |high, pin| high << 1 | u32::from(pin.high));
        dump::io_apic(state.pins.iter().map(|pin| pin.entry), high)
    }

    /// Puts the registers into the state after a reset. The levels of the pins stay, since devices
    /// drive them.
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

    /// The state.
    pub(crate) fn save(&self) -> SavedIoApic {
        let state = self.lock();
        let high = state.pins.iter().rev().fold(0, |high, pin| high << 1 | u32::from(pin.high));
        let entries = state.pins.map(|pin| pin.entry);
        SavedIoApic { select: state.select, id: state.id, entries, high }
    }

    /// Gives it a saved state. It sends no message: what it had sent, the local APICs have.
    pub(crate) fn restore(&self, saved: &SavedIoApic) {
        let mut state = self.lock();
        (state.select, state.id) = (saved.select, saved.id & ID_BITS);
        for (number, entry) in (0..).zip(saved.entries) {
            let pin = Pin { entry, high: saved.high & 1 << number != 0 };
            state.pins[number as usize] = pin;
            // The guest may have written a route that is none.
            let route = pin.route().map(|(address, data)| Route::Msi { address, data });
            let _ = self.routes.set(number, route);
        }
    }

    /// Tells a device that its interrupt has ended. The device holds the eventfd too, so an
    /// ordinary write could block.
    fn signal(&self, ended: &OwnedFd) {
        // This fails only for something that is no eventfd.
        let _ = self.routes.signaller().signal(ended.as_fd());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn send(&self, message: Option<(u64, u32)>) {
        let Some((address, data)) = message else { return };
        // A message to a CPU that does not exist is lost, as on a PC.
        let _ = self.routes.send(address, data);
    }
}

impl IntxSource {
    /// The eventfd that the device writes to assert the pin. A thread must wait for it and then
    /// call [`take`](Self::take).
    pub fn assert(&self) -> BorrowedFd<'_> {
        self.assert.as_fd()
    }

    /// The eventfd that becomes readable when the guest has ended the interrupt.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Tells the device that its interrupt has ended although no guest has ended it. If the device
    /// still has a reason, it asserts the pin again.
    pub(crate) fn end(&self) {
        self.io_apic.signal(&self.ended);
    }

    /// Asserts the pin if the device has written its eventfd.
    pub fn take(&self) {
        if take_signal(self.assert.as_fd()) {
            self.io_apic.set(self.pin, true);
        }
    }
}

impl Drop for IntxSource {
    fn drop(&mut self) {
        self.io_apic.lock().sources.retain(|(_, ended)| !Arc::ptr_eq(ended, &self.ended));
        // The other devices on the pin assert it again if they still have a reason.
        self.io_apic.set(self.pin, false);
        self.io_apic
            .lock()
            .sources
            .iter()
            .filter(|(pin, _)| *pin == self.pin)
            .for_each(|(_, ended)| self.io_apic.signal(ended));
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
                // The kernel reports the end of an interrupt only if the pin has a route. A pin
                // that was masked while its interrupt is serviced needs its route, too.
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
