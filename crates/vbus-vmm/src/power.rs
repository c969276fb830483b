// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Power management: the ACPI registers of power-off and of the power button, and the registers
//! that reset the machine.

use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use crate::bus::{Bus, BusDevice};
use crate::events::{EventSender, VmEvent};
use crate::irqchip::IrqChip;
use crate::layout;
use crate::lock::lock;
use crate::vcpu_gate::VcpuGate;

/// PM1 status and enable: the power button was pressed.
const POWER_BUTTON: u16 = 1 << 8;
/// PM1 status and enable: the global lock. No firmware competes for it.
const GLOBAL: u16 = 1 << 5;
/// PM1 control: ACPI is on. It cannot be switched off.
const SCI_ENABLE: u16 = 1;
/// PM1 control: the guest enters the sleep state whose type is in bits 10 to 12.
const SLEEP: u16 = 1 << 13;
const SLEEP_TYPE: u16 = 0b111 << 10;

/// The power management registers. Writes of other values to their ports are ignored.
pub struct Power {
    registers: Mutex<Registers>,
    irqchip: Arc<IrqChip>,
    events: EventSender,
    gate: Arc<VcpuGate>,
}

/// The registers, which are also what a saved machine has of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Registers {
    status: u16,
    enable: u16,
}

impl Power {
    /// The registers raise the SCI of `irqchip`. When the guest asks for power-off or reset, they
    /// close `gate`, so that the asking CPU stops, and send an event to `events`.
    pub fn new(irqchip: Arc<IrqChip>, gate: Arc<VcpuGate>, events: EventSender) -> Arc<Power> {
        Arc::new(Power { registers: Mutex::default(), irqchip, events, gate })
    }

    /// Puts the registers onto `pio`.
    pub fn attach(self: &Arc<Self>, pio: &mut Bus) {
        pio.add(
            layout::ACPI_PORTS.into(),
            layout::ACPI_PORT_BYTES.into(),
            Arc::new(Acpi(self.clone())),
        );
        pio.add(layout::KEYBOARD_PORT.into(), 1, Arc::new(Keyboard(self.clone())));
    }

    /// Presses the power button. An orderly guest then powers off. Returns false if the guest has
    /// not enabled the button.
    pub fn press(&self) -> bool {
        let mut registers = self.lock();
        registers.status |= POWER_BUTTON;
        self.update(&registers);
        registers.enable & POWER_BUTTON != 0
    }

    /// Puts the registers into the state after a reset.
    pub fn reset(&self) {
        let mut registers = self.lock();
        *registers = Registers::default();
        self.update(&registers);
    }

    /// The registers.
    pub(crate) fn save(&self) -> Registers {
        self.lock().clone()
    }

    /// Gives it saved registers, and raises the SCI if they say so. The interrupt controllers must
    /// have their saved state already.
    pub(crate) fn restore(&self, saved: &Registers) {
        let mut registers = self.lock();
        registers.status = saved.status & (POWER_BUTTON | GLOBAL);
        registers.enable = saved.enable & (POWER_BUTTON | GLOBAL);
        self.update(&registers);
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        lock(&self.registers)
    }

    /// Updates the SCI. It is level-triggered, and high as long as an enabled status bit is set.
    fn update(&self, registers: &Registers) {
        self.irqchip.set(layout::SCI, registers.status & registers.enable != 0);
    }

    fn send(&self, event: VmEvent) {
        self.gate.close();
        // The receiver is gone only if the machine is about to end.
        let _ = self.events.send(event);
    }

    /// Reads one byte of the ACPI ports. The guest may access them in any size.
    fn read_byte(&self, port: u16) -> u8 {
        let registers = self.lock();
        match port.wrapping_sub(layout::ACPI_PORTS) {
            0 => registers.status.to_le_bytes()[0],
            1 => registers.status.to_le_bytes()[1],
            2 => registers.enable.to_le_bytes()[0],
            3 => registers.enable.to_le_bytes()[1],
            4 => SCI_ENABLE.to_le_bytes()[0],
            _ => 0,
        }
    }

    fn write_byte(&self, port: u16, value: u8) {
        let (low, high) = (u16::from(value), u16::from(value) << 8);
        let mut registers = self.lock();
        match port.wrapping_sub(layout::ACPI_PORTS) {
            // A written 1 clears the bit.
            0 => registers.status &= !low,
            1 => registers.status &= !high,
            2 => registers.enable = registers.enable & 0xff00 | low & GLOBAL,
            3 => registers.enable = registers.enable & 0x00ff | high & POWER_BUTTON,
            5 if high & SLEEP != 0 && high & SLEEP_TYPE == 0 => {
                return self.send(VmEvent::PowerOff);
            }
            8 if value == layout::RESET_VALUE => {
                return self.send(VmEvent::Reset("by the guest".into()));
            }
            _ => return,
        }
        self.update(&registers);
    }
}

/// The ports at [`layout::ACPI_PORTS`].
struct Acpi(Arc<Power>);

impl BusDevice for Acpi {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (port(offset)..).zip(data) {
            *byte = self.0.read_byte(port);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, byte) in (port(offset)..).zip(data) {
            self.0.write_byte(port, *byte);
        }
    }
}

fn port(offset: u64) -> u16 {
    layout::ACPI_PORTS + u16::try_from(offset).unwrap_or(u16::MAX - layout::ACPI_PORTS)
}

/// The port [`layout::KEYBOARD_PORT`].
struct Keyboard(Arc<Power>);

impl BusDevice for Keyboard {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, _: u64, data: &[u8]) {
        if data == [0xfe] {
            self.0.send(VmEvent::Reset("by the guest".into()));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    fn machine() -> (Bus, Arc<Power>, Arc<IrqChip>, Receiver<VmEvent>) {
        let (irqchip, (sender, events)) = (Arc::new(IrqChip::for_tests()), channel());
        let power = Power::new(irqchip.clone(), VcpuGate::new(), sender);
        let mut pio = Bus::default();
        power.attach(&mut pio);
        (pio, power, irqchip, events)
    }

    fn read_u16(pio: &Bus, port: u16) -> u16 {
        let mut data = [0; 2];
        pio.read(port.into(), &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn the_button_interrupts_until_it_is_acknowledged() {
        let (pio, power, irqchip, _events) = machine();
        assert!(!power.press());
        assert!(!irqchip.level(layout::SCI));
        pio.write(u64::from(layout::PM1_EVENT) + 2, &POWER_BUTTON.to_le_bytes());
        assert!(irqchip.level(layout::SCI));
        assert_eq!(read_u16(&pio, layout::PM1_EVENT), POWER_BUTTON);
        pio.write(layout::PM1_EVENT.into(), &POWER_BUTTON.to_le_bytes());
        assert!(!irqchip.level(layout::SCI));
        assert!(power.press());
        power.reset();
        assert!(!irqchip.level(layout::SCI));
        assert_eq!(read_u16(&pio, layout::PM1_CONTROL), SCI_ENABLE);
    }

    #[test]
    fn power_off_and_reset_are_asked_for() {
        let (pio, _power, _irqchip, events) = machine();
        pio.write(layout::PM1_CONTROL.into(), &(SLEEP | 5 << 10).to_le_bytes());
        pio.write(layout::RESET_PORT.into(), &[0]);
        pio.write(layout::KEYBOARD_PORT.into(), &[0xd1]);
        assert!(events.try_recv().is_err());
        pio.write(layout::PM1_CONTROL.into(), &(SLEEP | SCI_ENABLE).to_le_bytes());
        assert!(matches!(events.try_recv(), Ok(VmEvent::PowerOff)));
        pio.write(layout::RESET_PORT.into(), &[layout::RESET_VALUE]);
        assert!(matches!(events.try_recv(), Ok(VmEvent::Reset(_))));
        pio.write(layout::KEYBOARD_PORT.into(), &[0xfe]);
        assert!(matches!(events.try_recv(), Ok(VmEvent::Reset(_))));
    }
}
