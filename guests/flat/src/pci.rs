// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The walk over PCI: finds the vbus functions, also behind bridges, and assigns the buses and
//! addresses that firmware has not assigned.

use vbus_shm::abi::bar0;

/// The most functions that the walk records.
pub const FUNCTIONS_MAX: usize = 64;
/// The most levels of nested bridges.
const DEPTH_MAX: u32 = 8;
/// The alignment of a bridge's window.
const WINDOW: u64 = 1 << 20;

/// Offsets in configuration space.
mod at {
    pub const ID: u16 = 0x00;
    pub const COMMAND: u16 = 0x04;
    pub const HEADER: u16 = 0x0c;
    pub const BAR0: u16 = 0x10;
    /// Primary, secondary and subordinate bus of a bridge.
    pub const BUSES: u16 = 0x18;
    /// Base and limit of a bridge's memory window.
    pub const WINDOW: u16 = 0x20;
    pub const CAPABILITIES: u16 = 0x34;
}

/// Command register: Memory Space, Bus Master, Interrupt Disable.
const MEMORY: u32 = 1 << 1;
const MASTER: u32 = 1 << 2;
const NO_INTX: u32 = 1 << 10;

/// Bus, device and function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// Bus.
    pub bus: u8,
    /// Device, below 32.
    pub device: u8,
    /// Function, below 8.
    pub function: u8,
}

impl core::fmt::Display for Address {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}

/// Access to configuration space, in aligned units of 4 bytes.
pub trait Config {
    /// Reads 4 bytes; all ones if there is no such function.
    fn read(&self, address: Address, offset: u16) -> u32;
    /// Writes 4 bytes.
    fn write(&self, address: Address, offset: u16, value: u32);
}

/// A vbus function, ready to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its bus, device and function number.
    pub address: Address,
    /// The address of its BAR 0.
    pub bar: u64,
}

/// A range of addresses for BARs that have none.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// The next free address.
    pub next: u64,
    /// The first address after the range.
    pub end: u64,
}

/// The functions that a walk found.
#[derive(Debug)]
pub struct Functions {
    found: [Option<Found>; FUNCTIONS_MAX],
    count: usize,
    window: Window,
    last_bus: u8,
}

impl Functions {
    /// Walks over all buses from 0 on. Keeps bridges and BARs that firmware has set up. Sets up the
    /// others with addresses from `window` and with bus numbers after the highest one.
    pub fn find(config: &impl Config, window: Window) -> Functions {
        let mut functions =
            Functions { found: [None; FUNCTIONS_MAX], count: 0, window, last_bus: 0 };
        functions.bus(config, 0, DEPTH_MAX);
        functions
    }

    /// The functions, in order of the walk.
    pub fn iter(&self) -> impl Iterator<Item = Found> + '_ {
        self.found.iter().flatten().copied()
    }

    fn bus(&mut self, config: &impl Config, bus: u8, depth: u32) {
        self.last_bus = self.last_bus.max(bus);
        for device in 0..32 {
            let first = Address { bus, device, function: 0 };
            if config.read(first, at::ID) == u32::MAX {
                continue;
            }
            let many = config.read(first, at::HEADER) & (0x80 << 16) != 0;
            for function in 0..if many { 8 } else { 1 } {
                self.function(config, Address { bus, device, function }, depth);
            }
        }
    }

    fn function(&mut self, config: &impl Config, address: Address, depth: u32) {
        let id = config.read(address, at::ID);
        if id == u32::MAX {
            return;
        }
        let header = config.read(address, at::HEADER) >> 16 & 0x7f;
        if header == 1 && depth > 0 {
            self.bridge(config, address, depth);
        } else if header == 0 && vbus_driver::has_signature(|offset| config.read(address, offset)) {
            self.vbus(config, address);
        }
    }

    fn bridge(&mut self, config: &impl Config, address: Address, depth: u32) {
        let buses = config.read(address, at::BUSES);
        let mut secondary = (buses >> 8 & 0xff) as u8;
        let fresh = secondary == 0;
        if fresh {
            let Some(next) = self.last_bus.checked_add(1) else { return };
            secondary = next;
            // All bus numbers from here on, until the walk has found the buses behind this bridge.
            let numbers = u32::from(address.bus) | u32::from(secondary) << 8 | 0xff << 16;
            config.write(address, at::BUSES, buses & 0xff00_0000 | numbers);
        }
        let before = self.window.next;
        self.window.next = before.next_multiple_of(WINDOW);
        let start = self.window.next;
        self.bus(config, secondary, depth - 1);
        if fresh {
            let numbers =
                u32::from(address.bus) | u32::from(secondary) << 8 | u32::from(self.last_bus) << 16;
            config.write(address, at::BUSES, buses & 0xff00_0000 | numbers);
        }
        if self.window.next == start {
            self.window.next = before;
        } else {
            self.window.next = self.window.next.next_multiple_of(WINDOW);
            // Bits 20 to 31 of the first address. 16 bits higher: those of the last address.
            let base = (start >> 16 & 0xfff0) as u32;
            let limit = ((self.window.next - 1) >> 16 & 0xfff0) as u32;
            config.write(address, at::WINDOW, base | limit << 16);
        }
        let command = config.read(address, at::COMMAND) & 0xffff;
        config.write(address, at::COMMAND, command | MEMORY | MASTER);
    }

    fn vbus(&mut self, config: &impl Config, address: Address) {
        let mut bar = u64::from(config.read(address, at::BAR0) & !0xf);
        if bar == 0 {
            let start = self.window.next.next_multiple_of(bar0::SIZE);
            let Some(low) =
                u32::try_from(start).ok().filter(|_| start + bar0::SIZE <= self.window.end)
            else {
                return;
            };
            self.window.next = start + bar0::SIZE;
            config.write(address, at::BAR0, low);
            bar = start;
        }
        let command = config.read(address, at::COMMAND) & 0xffff;
        config.write(address, at::COMMAND, command | MEMORY | MASTER | NO_INTX);
        if let Some(place) = self.found.get_mut(self.count) {
            *place = Some(Found { address, bar });
            self.count += 1;
        }
    }
}

/// A message that a function sends as its interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The address, below 4 GiB.
    pub address: u32,
    /// The data.
    pub data: u32,
}

/// How a function interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Messages {
    /// One message for all vectors.
    Msi,
    /// MSI-X: a number of messages in a table in BAR 0. The caller fills the table before
    /// [`enable_msix`].
    Msix {
        /// The number of entries.
        entries: u16,
        /// The offset of the table in BAR 0.
        table: u64,
        /// The offset of the capability.
        capability: u16,
    },
}

/// If the function has MSI, sets `message` as its only message.
pub fn enable_msi(config: &impl Config, address: Address, message: Message) -> Option<Messages> {
    let at = capability(config, address, 0x05)?;
    let control = config.read(address, at);
    let wide = control & (1 << 23) != 0;
    config.write(address, at + 4, message.address);
    if wide {
        config.write(address, at + 8, 0);
    }
    config.write(address, at + if wide { 12 } else { 8 }, message.data);
    // Select one message, then enable MSI.
    config.write(address, at, control & !(0x70 << 16) | 1 << 16);
    Some(Messages::Msi)
}

/// The function's MSI-X, if it has MSI-X with its table in BAR 0.
pub fn find_msix(config: &impl Config, address: Address) -> Option<Messages> {
    let at = capability(config, address, 0x11)?;
    let table = config.read(address, at + 4);
    let entries = (config.read(address, at) >> 16 & 0x7ff) as u16 + 1;
    (table & 7 == 0).then_some(Messages::Msix {
        entries,
        table: u64::from(table & !7),
        capability: at,
    })
}

/// Enables MSI-X once its table is filled.
pub fn enable_msix(config: &impl Config, address: Address, capability: u16) {
    let control = config.read(address, capability) & !(1 << 30);
    config.write(address, capability, control | 1 << 31);
}

/// The offset of the capability with this id.
fn capability(config: &impl Config, address: Address, id: u8) -> Option<u16> {
    let mut at = (config.read(address, at::CAPABILITIES) & 0xfc) as u16;
    for _ in 0..48 {
        if at < 0x40 {
            return None;
        }
        let word = config.read(address, at);
        if (word & 0xff) as u8 == id {
            return Some(at);
        }
        at = (word >> 8 & 0xfc) as u16;
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use std::cell::RefCell;

    use super::*;

    const VBUS: u32 = 0x10f5_1af4;
    const WINDOW_AT: Window = Window { next: 0xe000_0000, end: 0xe010_0000 * 4 };

    /// A function, and the bridge in front of it.
    struct Node {
        bridge: Option<usize>,
        device: u8,
        function: u8,
        words: [u32; 64],
    }

    /// Functions that the bus numbers of their bridges make reachable.
    #[derive(Default)]
    struct FakeConfig(RefCell<Vec<Node>>);

    impl FakeConfig {
        /// Adds a function; returns its number.
        fn add(
            &self,
            bridge: Option<usize>,
            device: u8,
            function: u8,
            words: &[(u16, u32)],
        ) -> usize {
            let mut node = Node { bridge, device, function, words: [0; 64] };
            if words.contains(&(at::ID, VBUS)) {
                // The only capability is the one with the signature.
                node.words[1] = 1 << 20;
                node.words[0x34 / 4] = 0x40;
                node.words[0x40 / 4] = 0x0114_0009;
                node.words[0x44 / 4] = vbus_shm::abi::capability::SIGNATURE_VALUE;
            }
            for (offset, value) in words {
                node.words[usize::from(offset / 4)] = *value;
            }
            self.0.borrow_mut().push(node);
            self.0.borrow().len() - 1
        }

        fn port(&self, device: u8, buses: u32) -> usize {
            self.add(
                None,
                device,
                0,
                &[(at::ID, 0x000c_1b36), (at::HEADER, 1 << 16), (at::BUSES, buses)],
            )
        }

        fn word(&self, node: usize, offset: u16) -> u32 {
            self.0.borrow()[node].words[usize::from(offset / 4)]
        }

        fn find(&self, address: Address) -> Option<usize> {
            let nodes = self.0.borrow();
            nodes.iter().position(|node| {
                let bus = match node.bridge {
                    Some(bridge) => (nodes[bridge].words[6] >> 8 & 0xff) as u8,
                    None => 0,
                };
                let reached = node.bridge.is_none() || bus != 0;
                reached
                    && (bus, node.device, node.function)
                        == (address.bus, address.device, address.function)
            })
        }
    }

    impl Config for FakeConfig {
        fn read(&self, address: Address, offset: u16) -> u32 {
            self.find(address).map_or(u32::MAX, |node| self.word(node, offset))
        }

        fn write(&self, address: Address, offset: u16, value: u32) {
            let node = self.find(address).unwrap();
            let mut value = value;
            // BARs are as small as those of a device.
            if offset == at::BAR0 {
                value &= !0x3fff;
            }
            self.0.borrow_mut()[node].words[usize::from(offset / 4)] = value;
        }
    }

    fn address(bus: u8, device: u8) -> Address {
        Address { bus, device, function: 0 }
    }

    #[test]
    fn a_bare_machine_gets_buses_windows_and_bars() {
        let config = FakeConfig::default();
        config.add(None, 0, 0, &[(at::ID, 0x29c0_8086)]);
        let (first, empty, second) = (config.port(1, 0), config.port(2, 0), config.port(3, 0));
        let a = config.add(Some(first), 0, 0, &[(at::ID, VBUS)]);
        let b = config.add(Some(second), 0, 0, &[(at::ID, VBUS)]);
        let on_bus_0 = config.add(None, 4, 0, &[(at::ID, VBUS)]);
        let functions: Vec<Found> = Functions::find(&config, WINDOW_AT).iter().collect();
        assert_eq!(
            functions,
            [
                Found { address: address(1, 0), bar: 0xe000_0000 },
                Found { address: address(3, 0), bar: 0xe010_0000 },
                Found { address: address(0, 4), bar: 0xe020_0000 },
            ]
        );
        let buses = [first, empty, second].map(|port| config.word(port, at::BUSES));
        assert_eq!(buses, [0x01_0100, 0x02_0200, 0x03_0300]);
        let windows = [first, empty, second].map(|port| config.word(port, at::WINDOW));
        assert_eq!(windows, [0xe000_e000, 0, 0xe010_e010]);
        for (node, bar) in [(a, 0xe000_0000), (b, 0xe010_0000), (on_bus_0, 0xe020_0000)] {
            assert_eq!((config.word(node, at::BAR0), config.word(node, at::COMMAND)), (bar, 0x406));
        }
        assert_eq!(config.word(first, at::COMMAND), 6);
    }

    #[test]
    fn what_firmware_has_set_up_stays() {
        let config = FakeConfig::default();
        let port = config.port(1, 0x07_0700);
        config.0.borrow_mut()[port].words[8] = 0xfe00_fe00;
        config.add(Some(port), 0, 0, &[(at::ID, VBUS), (at::BAR0, 0xfe00_4000)]);
        let functions: Vec<Found> = Functions::find(&config, WINDOW_AT).iter().collect();
        assert_eq!(functions, [Found { address: address(7, 0), bar: 0xfe00_4000 }]);
        assert_eq!(
            (config.word(port, at::BUSES), config.word(port, at::WINDOW)),
            (0x07_0700, 0xfe00_fe00)
        );
    }

    #[test]
    fn bridges_behind_bridges_and_functions_of_many() {
        let config = FakeConfig::default();
        let outer = config.port(1, 0);
        let bridge = [(at::ID, 0x000e_1b36), (at::HEADER, 0x81 << 16)];
        let inner = config.add(Some(outer), 0, 0, &bridge);
        config.add(Some(outer), 0, 3, &[(at::ID, VBUS)]);
        config.add(Some(inner), 5, 0, &[(at::ID, VBUS)]);
        let functions: Vec<Found> = Functions::find(&config, WINDOW_AT).iter().collect();
        assert_eq!(functions.len(), 2);
        assert_eq!((functions[0].address, functions[0].bar), (address(2, 5), 0xe000_0000));
        assert_eq!(
            functions[1],
            Found { address: Address { bus: 1, device: 0, function: 3 }, bar: 0xe010_0000 }
        );
        assert_eq!([outer, inner].map(|port| config.word(port, at::BUSES)), [0x02_0100, 0x02_0201]);
        assert_eq!(
            [outer, inner].map(|port| config.word(port, at::WINDOW)),
            [0xe010_e000, 0xe000_e000]
        );
    }

    #[test]
    fn without_room_a_function_is_left_out() {
        let config = FakeConfig::default();
        config.add(None, 1, 0, &[(at::ID, VBUS)]);
        assert_eq!(
            Functions::find(&config, Window { next: 0xe000_0000, end: 0xe000_2000 }).iter().count(),
            0
        );
        assert_eq!(
            Functions::find(&config, Window { next: 0xffff_f000, end: u64::MAX }).iter().count(),
            0
        );
    }

    #[test]
    fn messages_are_set_where_the_capability_has_them() {
        let config = FakeConfig::default();
        let node = config.add(
            None,
            1,
            0,
            &[(at::CAPABILITIES, 0x40), (0x40, 0x7009), (0x70, 0x00f0_8005), (0x80, 0x0003_0011)],
        );
        config.0.borrow_mut()[node].words[0x84 / 4] = 0x2000;
        let message = Message { address: 0xfee0_1000, data: 0x31 };
        assert_eq!(enable_msi(&config, address(0, 1), message), Some(Messages::Msi));
        let words = [0x70, 0x74, 0x78, 0x7c].map(|offset| config.word(node, offset));
        assert_eq!(words, [0x0081_8005, 0xfee0_1000, 0, 0x31]);
        let msix = Messages::Msix { entries: 4, table: 0x2000, capability: 0x80 };
        assert_eq!(find_msix(&config, address(0, 1)), Some(msix));
        enable_msix(&config, address(0, 1), 0x80);
        assert_eq!(config.word(node, 0x80), 0x8003_0011);
        // One list with a loop, and one empty list.
        config.0.borrow_mut()[node].words[0x40 / 4] = 0x4009;
        assert_eq!(enable_msi(&config, address(0, 1), message), None);
        assert_eq!(find_msix(&config, address(0, 2)), None);
    }
}
