// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A root port: a bridge with a slot behind it. One function can be plugged into the slot while the
//! guest runs.
//!
//! The slot has an attention button, a power controller and a power indicator. By them an operating
//! system brings a function in and releases it in an orderly way: the button tells the system, and
//! the system answers by switching the slot's power.

use vbus_pci_config::register::{
    COMMAND, COMMAND_INTX_DISABLE, COMMAND_MASTER, COMMAND_MEMORY, INTERRUPT_LINE,
};
use vbus_pci_config::{Space, touches};

use super::saved::SavedPort;
use crate::layout;

const PRIMARY: usize = 0x18;
const SECONDARY: usize = 0x19;
const SUBORDINATE: usize = 0x1a;
const MEMORY_BASE: usize = 0x20;
const MEMORY_LIMIT: usize = 0x22;
const BRIDGE_CONTROL: usize = 0x3e;

const BRIDGE_RESET: u16 = 1 << 6;

/// The offset of the PCI Express capability, 60 bytes.
const EXPRESS: usize = 0x40;
const LINK_CONTROL: usize = EXPRESS + 0x10;
const LINK_STATUS: usize = EXPRESS + 0x12;
const SLOT_CAPABILITIES: usize = EXPRESS + 0x14;
const SLOT_CONTROL: usize = EXPRESS + 0x18;
const SLOT_STATUS: usize = EXPRESS + 0x1a;
const ROOT_CONTROL: usize = EXPRESS + 0x1c;
/// The offset of the MSI capability, 14 bytes.
const MSI: usize = 0x80;

const LINK_DISABLE: u16 = 1 << 4;
const LINK_ACTIVE: u16 = 1 << 13;
/// 2.5 GT/s and one lane, for the capability and for the status.
const LINK_SPEED: u16 = 0x0011;

/// Attention button, power controller, power indicator, surprise removal, hotplug.
const SLOT_HAS: u32 = 1 << 0 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6;
const SLOT_NUMBER_SHIFT: u32 = 19;

const CONTROL_INTERRUPTS: u16 = 1 << 5;
const CONTROL_INDICATOR: u16 = 3 << 8;
const INDICATOR_ON: u16 = 1 << 8;
const INDICATOR_BLINKS: u16 = 2 << 8;
const INDICATOR_OFF: u16 = 3 << 8;
const CONTROL_POWER_OFF: u16 = 1 << 10;

const STATUS_BUTTON: u16 = 1 << 0;
const STATUS_PRESENCE_CHANGED: u16 = 1 << 3;
const STATUS_COMMAND_COMPLETED: u16 = 1 << 4;
const STATUS_PRESENT: u16 = 1 << 6;
const STATUS_LINK_CHANGED: u16 = 1 << 8;
/// Attention button, power fault, latch, presence, command completed. Slot Control has the enable
/// bit of each at the same position.
const STATUS_WITH_ENABLE: u16 = 0x1f;
/// The enable bit of [`STATUS_LINK_CHANGED`].
const CONTROL_LINK_CHANGED: u16 = 1 << 12;

/// A root port as the guest sees it.
pub(super) struct RootPort {
    device: u8,
    space: Space,
    present: bool,
    /// The guest has written Slot Control, so it manages the slot.
    managed: bool,
    /// A hotplug interrupt is due and was sent.
    interrupting: bool,
}

/// Address and data of a message-signalled interrupt.
pub(super) type Msi = (u64, u32);

impl RootPort {
    /// The port with device number `device` (1 to 31) on bus 0, and an empty slot of the same
    /// number.
    pub(super) fn new(device: u8) -> RootPort {
        let mut port = RootPort {
            device,
            space: Space::new(256),
            present: false,
            managed: false,
            interrupting: false,
        };
        port.reset();
        port
    }

    /// Puts the port into the state in which a guest finds it at its start. Bus numbers and window
    /// are set as firmware sets them. A plugged function is switched on.
    pub(super) fn reset(&mut self) {
        let mut s = Space::new(256);
        s.set32(0x00, 0x000c_1b36);
        s.allow(COMMAND, &(COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE).to_le_bytes());
        s.set16(COMMAND, COMMAND_MEMORY | COMMAND_MASTER);
        // Status: the port has capabilities. Class: PCI-to-PCI bridge. Header type 1.
        s.set16(0x06, 1 << 4);
        s.set32(0x08, 0x0604_0000);
        s.allow(0x0c, &[0xff]);
        s.set8(0x0e, 1);
        s.set(PRIMARY, &[0, self.device, self.device]);
        s.allow(PRIMARY, &[0xff; 3]);
        let window = window(self.device);
        s.set16(MEMORY_BASE, register(window));
        s.set16(MEMORY_LIMIT, register(window + WINDOW_BYTES - 1));
        s.allow(MEMORY_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
        // The registers of the windows for ports and prefetchable memory are hard-wired to zero:
        // the port has no such windows.
        s.set8(0x34, 0x40);
        s.allow(INTERRUPT_LINE, &[0xff]);
        s.allow(BRIDGE_CONTROL, &BRIDGE_RESET.to_le_bytes());
        self.express(&mut s);
        // MSI with one vector and a 64-bit address.
        s.set(MSI, &[0x05, 0]);
        s.set16(MSI + 2, 1 << 7);
        s.allow(MSI + 2, &[1, 0, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        (self.space, self.managed, self.interrupting) = (s, false, false);
        let on = self.link_wanted();
        self.space.assign16(LINK_STATUS, LINK_ACTIVE, on);
    }

    fn express(&self, s: &mut Space) {
        s.set(EXPRESS, &[0x10, u8::try_from(MSI).unwrap_or(0)]);
        // Version 2, root port, with a slot.
        s.set16(EXPRESS + 0x02, 2 | 4 << 4 | 1 << 8);
        // Role-based error reporting; payloads of 128 bytes.
        s.set32(EXPRESS + 0x04, 1 << 15);
        s.allow(EXPRESS + 0x08, &0x7fffu16.to_le_bytes());
        // The link reports whether it is active. The port number is the device number.
        s.set32(EXPRESS + 0x0c, u32::from(LINK_SPEED) | 1 << 20 | u32::from(self.device) << 24);
        s.allow(LINK_CONTROL, &0x00d3u16.to_le_bytes());
        s.set16(LINK_STATUS, LINK_SPEED);
        s.set32(SLOT_CAPABILITIES, SLOT_HAS | u32::from(self.device) << SLOT_NUMBER_SHIFT);
        let power = if self.present { INDICATOR_ON } else { INDICATOR_OFF | CONTROL_POWER_OFF };
        s.set16(SLOT_CONTROL, power);
        s.allow(SLOT_CONTROL, &0x17ffu16.to_le_bytes());
        s.set16(SLOT_STATUS, if self.present { STATUS_PRESENT } else { 0 });
        s.allow_clearing(SLOT_STATUS, STATUS_WITH_ENABLE | STATUS_LINK_CHANGED);
        s.allow(ROOT_CONTROL, &0x001fu16.to_le_bytes());
    }

    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        self.space.read(offset, data);
    }

    /// Writes for the guest. The other methods show the effects. Returns a hotplug interrupt if one
    /// becomes due.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) -> Option<Msi> {
        self.space.write(offset, data);
        if touches(offset, data.len(), SLOT_CONTROL, 2) {
            self.managed = true;
            self.event(STATUS_COMMAND_COMPLETED);
        }
        self.update()
    }

    /// The state of the port.
    pub(super) fn save(&self) -> SavedPort {
        SavedPort {
            config: self.space.bytes().to_vec(),
            managed: self.managed,
            interrupting: self.interrupting,
        }
    }

    /// Gives the port a saved state. Whether there is a function in the slot does not change.
    ///
    /// Returns false if the state is that of another port.
    pub(super) fn restore(&mut self, saved: &SavedPort) -> bool {
        self.reset();
        // The port sets these by itself.
        let own = |at: usize| -> Option<u16> {
            Some(u16::from_le_bytes([*saved.config.get(at)?, *saved.config.get(at + 1)?]))
        };
        let active = own(LINK_STATUS).is_some_and(|status| status & LINK_ACTIVE != 0);
        self.space.assign16(LINK_STATUS, LINK_ACTIVE, active && self.present);
        if !self.space.restore(&saved.config) {
            return false;
        }
        (self.managed, self.interrupting) = (saved.managed, saved.interrupting);
        true
    }

    fn event(&mut self, bits: u16) {
        self.space.assign16(SLOT_STATUS, bits, true);
    }

    /// Updates link and interrupt from the other registers.
    fn update(&mut self) -> Option<Msi> {
        let up = self.link_wanted();
        if up != self.link_up() {
            self.space.assign16(LINK_STATUS, LINK_ACTIVE, up);
            self.event(STATUS_LINK_CHANGED);
        }
        let (control, status) = (self.space.get16(SLOT_CONTROL), self.space.get16(SLOT_STATUS));
        let due = control & status & STATUS_WITH_ENABLE != 0
            || control & CONTROL_LINK_CHANGED != 0 && status & STATUS_LINK_CHANGED != 0;
        let due = due && control & CONTROL_INTERRUPTS != 0 && self.space.get16(MSI + 2) & 1 != 0;
        let began = due && !self.interrupting;
        self.interrupting = due;
        // One message each time that the interrupt becomes due. The next one needs that the guest
        // has cleared all events first.
        began.then(|| {
            let address =
                u64::from(self.space.get32(MSI + 8)) << 32 | u64::from(self.space.get32(MSI + 4));
            (address, u32::from(self.space.get16(MSI + 12)))
        })
    }

    fn link_wanted(&self) -> bool {
        self.present && !self.powered_off() && self.space.get16(LINK_CONTROL) & LINK_DISABLE == 0
    }

    fn powered_off(&self) -> bool {
        self.space.get16(SLOT_CONTROL) & CONTROL_POWER_OFF != 0
    }

    fn indicator(&self) -> u16 {
        self.space.get16(SLOT_CONTROL) & CONTROL_INDICATOR
    }

    /// Whether the function in the slot has power and a link.
    pub(super) fn link_up(&self) -> bool {
        self.space.get16(LINK_STATUS) & LINK_ACTIVE != 0
    }

    /// Whether the bridge holds the function in reset.
    pub(super) fn holds_reset(&self) -> bool {
        self.space.get16(BRIDGE_CONTROL) & BRIDGE_RESET != 0
    }

    /// Whether the guest manages the slot.
    pub(super) fn managed(&self) -> bool {
        self.managed
    }

    /// Whether the guest has switched the slot and its power indicator off.
    pub(super) fn released(&self) -> bool {
        self.powered_off() && self.indicator() == INDICATOR_OFF
    }

    /// Whether the guest is about to switch the slot on or off. Another press of the button would
    /// stop it.
    pub(super) fn busy(&self) -> bool {
        self.indicator() == INDICATOR_BLINKS
    }

    /// The number of the bus behind the port.
    pub(super) fn secondary(&self) -> u8 {
        self.space.get8(SECONDARY)
    }

    /// Whether an access to bus `bus` goes through this port.
    pub(super) fn leads_to(&self, bus: u8) -> bool {
        bus != 0 && (self.secondary()..=self.space.get8(SUBORDINATE)).contains(&bus)
    }

    /// First and last address that the port passes on, if it passes any on.
    pub(super) fn window(&self) -> Option<(u64, u64)> {
        if self.space.get16(COMMAND) & COMMAND_MEMORY == 0 {
            return None;
        }
        let part = |at| u64::from(self.space.get16(at) & 0xfff0) << 16;
        let (first, last) = (part(MEMORY_BASE), part(MEMORY_LIMIT) | 0xf_ffff);
        (first < last).then_some((first, last))
    }

    /// Puts a function into the slot. A guest that does not manage the slot yet finds the function
    /// switched on. Another guest is told.
    pub(super) fn insert(&mut self) -> Option<Msi> {
        self.present = true;
        self.space.assign16(SLOT_STATUS, STATUS_PRESENT, true);
        if self.managed {
            // The button is pressed too, since a guest that relies on the button, as Linux does,
            // enables no interrupt for presence alone.
            self.event(STATUS_PRESENCE_CHANGED | STATUS_BUTTON);
            return self.update();
        }
        self.space.assign16(SLOT_CONTROL, CONTROL_POWER_OFF | CONTROL_INDICATOR, false);
        self.space.assign16(SLOT_CONTROL, INDICATOR_ON, true);
        let up = self.link_wanted();
        self.space.assign16(LINK_STATUS, LINK_ACTIVE, up);
        None
    }

    /// Takes the function out of the slot.
    pub(super) fn remove(&mut self) -> Option<Msi> {
        self.present = false;
        self.space.assign16(SLOT_STATUS, STATUS_PRESENT, false);
        if self.managed {
            self.event(STATUS_PRESENCE_CHANGED);
            return self.update();
        }
        self.space.assign16(LINK_STATUS, LINK_ACTIVE, false);
        self.space.assign16(SLOT_CONTROL, INDICATOR_OFF | CONTROL_POWER_OFF, true);
        None
    }

    /// Presses the attention button, which asks the guest to release the function.
    pub(super) fn press(&mut self) -> Option<Msi> {
        self.event(STATUS_BUTTON);
        self.update()
    }
}

/// Bytes of a port's window when the guest starts.
const WINDOW_BYTES: u64 = layout::PCI_WINDOW_BYTES / 32;

/// The first address of a port's window when the guest starts.
pub(super) fn window(device: u8) -> u64 {
    layout::PCI_WINDOW + u64::from(device) * WINDOW_BYTES
}

/// Encodes an address as a window register holds it.
fn register(address: u64) -> u16 {
    u16::try_from(address >> 16 & 0xfff0).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    /// A guest's slot driver, with what it does in the order in which Linux's does it.
    struct Guest {
        port: RootPort,
        messages: u32,
    }

    const ENABLED: u16 = 1 | 1 << 4 | CONTROL_INTERRUPTS | CONTROL_LINK_CHANGED;

    impl Guest {
        fn new(port: RootPort) -> Guest {
            let mut guest = Guest { port, messages: 0 };
            guest.write(MSI + 4, &0xfee0_1000u32.to_le_bytes());
            guest.write(MSI + 12, &0x0031u16.to_le_bytes());
            guest.write(MSI + 2, &1u16.to_le_bytes());
            guest.write(SLOT_STATUS, &0x011fu16.to_le_bytes());
            guest.control(0x17ff, ENABLED | guest.get(SLOT_CONTROL) & 0x0fc0);
            assert_eq!(guest.events(), STATUS_COMMAND_COMPLETED);
            guest
        }

        fn get(&self, at: usize) -> u16 {
            let mut data = [0; 2];
            self.port.read(at, &mut data);
            u16::from_le_bytes(data)
        }

        fn told(&mut self, message: Option<Msi>) {
            if let Some(message) = message {
                assert_eq!(message, (0xfee0_1000, 0x31));
                self.messages += 1;
            }
        }

        fn write(&mut self, at: usize, data: &[u8]) {
            let message = self.port.write(at, data);
            self.told(message);
        }

        fn control(&mut self, mask: u16, value: u16) {
            let control = self.get(SLOT_CONTROL) & !mask | value;
            self.write(SLOT_CONTROL, &control.to_le_bytes());
        }

        /// The interrupt handler: there was exactly one message if there is any event; clears them.
        fn events(&mut self) -> u16 {
            let events = self.get(SLOT_STATUS) & 0x011f;
            assert_eq!(self.messages, u32::from(events != 0));
            self.write(SLOT_STATUS, &events.to_le_bytes());
            assert_eq!(self.get(SLOT_STATUS) & 0x011f, 0);
            self.messages = 0;
            events
        }
    }

    #[test]
    fn what_is_there_at_the_start_is_on() {
        let mut port = RootPort::new(3);
        assert!(port.insert().is_none());
        assert!(port.link_up() && !port.managed());
        assert_eq!((port.secondary(), port.leads_to(3), port.leads_to(4)), (3, true, false));
        let first = layout::PCI_WINDOW + 3 * WINDOW_BYTES;
        assert_eq!(port.window(), Some((first, first + WINDOW_BYTES - 1)));
        port.reset();
        assert!(port.link_up(), "as before");
        port.remove();
        port.reset();
        assert!(!port.link_up() && port.released());
    }

    #[test]
    fn hot_plug_and_unplug() {
        let mut guest = Guest::new(RootPort::new(1));
        for _ in 0..3 {
            assert!(guest.port.released() && !guest.port.link_up());
            let message = guest.port.insert();
            guest.told(message);
            assert_eq!(guest.events(), STATUS_BUTTON | STATUS_PRESENCE_CHANGED);
            assert!(!guest.port.link_up(), "no power yet");
            guest.control(CONTROL_INDICATOR, INDICATOR_BLINKS);
            assert!(guest.port.busy());
            assert_eq!(guest.events(), STATUS_COMMAND_COMPLETED);
            guest.control(CONTROL_POWER_OFF, 0);
            assert!(guest.port.link_up());
            assert_eq!(guest.events(), STATUS_COMMAND_COMPLETED | STATUS_LINK_CHANGED);
            guest.control(CONTROL_INDICATOR, INDICATOR_ON);
            guest.events();

            let message = guest.port.press();
            guest.told(message);
            assert_eq!(guest.events(), STATUS_BUTTON);
            guest.control(CONTROL_INDICATOR, INDICATOR_BLINKS);
            guest.events();
            guest.control(CONTROL_POWER_OFF, CONTROL_POWER_OFF);
            assert!(!guest.port.link_up() && !guest.port.released());
            assert_eq!(guest.events(), STATUS_COMMAND_COMPLETED | STATUS_LINK_CHANGED);
            guest.control(CONTROL_INDICATOR, INDICATOR_OFF);
            guest.events();
            assert!(guest.port.released());
            // Presence does not interrupt this guest; the next button press brings it along.
            let message = guest.port.remove();
            guest.told(message);
            assert_eq!((guest.messages, guest.get(SLOT_STATUS) & STATUS_PRESENT), (0, 0));
            guest.write(SLOT_STATUS, &STATUS_PRESENCE_CHANGED.to_le_bytes());
        }
    }

    #[test]
    fn a_function_that_vanishes_takes_the_link_down() {
        let mut port = RootPort::new(1);
        port.insert();
        let mut guest = Guest::new(port);
        let message = guest.port.remove();
        guest.told(message);
        assert_eq!(guest.events(), STATUS_LINK_CHANGED | STATUS_PRESENCE_CHANGED);
        assert!(!guest.port.released(), "the guest has not switched it off");
        let message = guest.port.insert();
        guest.told(message);
        assert_eq!(guest.events(), STATUS_BUTTON | STATUS_LINK_CHANGED | STATUS_PRESENCE_CHANGED);
    }

    #[test]
    fn one_message_until_all_events_are_cleared() {
        let mut guest = Guest::new(RootPort::new(1));
        guest.control(CONTROL_INDICATOR, INDICATOR_BLINKS);
        let message = guest.port.press();
        guest.told(message);
        assert_eq!(guest.messages, 1);
        guest.write(SLOT_STATUS, &STATUS_BUTTON.to_le_bytes());
        assert_eq!(guest.messages, 1, "command completed is still there");
        guest.messages = 1;
        assert_eq!(guest.events(), STATUS_COMMAND_COMPLETED);
        guest.control(CONTROL_INTERRUPTS, 0);
        assert_eq!(guest.messages, 0, "switched off");
        guest.control(CONTROL_INTERRUPTS, CONTROL_INTERRUPTS);
        assert_eq!(guest.events(), STATUS_COMMAND_COMPLETED);
    }

    #[test]
    fn a_wide_write_clears_the_old_events_and_completes_as_a_command() {
        let mut guest = Guest::new(RootPort::new(1));
        let control = u32::from(ENABLED | INDICATOR_OFF | CONTROL_POWER_OFF);
        guest.write(SLOT_CONTROL, &(control | 0x011f << 16).to_le_bytes());
        assert_eq!(guest.events(), STATUS_COMMAND_COMPLETED);
    }

    #[test]
    fn the_window_follows_its_registers() {
        let mut port = RootPort::new(1);
        port.write(MEMORY_BASE, &[0x12, 0xe1, 0x34, 0xe1]);
        assert_eq!(port.window(), Some((0xe110_0000, 0xe13f_ffff)));
        port.write(MEMORY_BASE, &[0xf0, 0xff, 0x00, 0x00]);
        assert_eq!(port.window(), None);
        port.write(MEMORY_BASE, &[0x10, 0xe1, 0x10, 0xe1]);
        assert_eq!(port.window(), Some((0xe110_0000, 0xe11f_ffff)));
        port.write(COMMAND, &[0, 0]);
        assert_eq!(port.window(), None);
    }

    #[test]
    fn a_saved_port_goes_on() {
        let mut guest = Guest::new(RootPort::new(1));
        let message = guest.port.insert();
        guest.told(message);
        guest.control(CONTROL_POWER_OFF, 0);
        let saved = guest.port.save();
        let mut port = RootPort::new(1);
        assert!(!port.restore(&saved), "the function is missing");
        port.insert();
        assert!(port.restore(&saved));
        assert_eq!(port.space.bytes(), guest.port.space.bytes());
        assert!(port.link_up() && port.managed());
        // The interrupt that is under way is not sent again.
        assert_eq!(guest.messages, 1);
        assert!(port.press().is_none());
        let mut other = RootPort::new(2);
        other.insert();
        assert!(!other.restore(&saved));
        let cut = SavedPort { config: vec![0; 3], ..saved };
        assert!(!port.restore(&cut));
    }

    #[test]
    fn any_write_is_harmless() {
        let mut port = RootPort::new(31);
        let before = port.space.bytes().to_vec();
        for at in 0..260 {
            for len in [1, 2, 4, 8] {
                port.write(at, &vec![0xff; len]);
                port.write(at, &vec![0x00; len]);
            }
        }
        for (at, (was, is)) in before.iter().zip(port.space.bytes()).enumerate() {
            let by_itself = matches!(at, SLOT_STATUS | 0x5b | LINK_STATUS | 0x53);
            assert!(
                by_itself || (was ^ is) & !port.space.writable_bits()[at] == 0,
                "offset {at:#x}"
            );
        }
        port.reset();
        assert_eq!(port.space.bytes(), before);
    }
}
