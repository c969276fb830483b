// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The common configuration (VIRTIO 1.3, section 4.1.4.3) as plain values. It says what a write
//! asks for; the [function](super) does it.

use serde::{Deserialize, Serialize};

use crate::device::{Kind, feature, status};
use crate::queue::{Format, Layout};

/// Bytes of the common configuration.
pub const BYTES: usize = 0x40;

/// The vector that stands for no interrupt.
pub const NO_VECTOR: u16 = 0xffff;

/// Offsets of the fields.
pub mod at {
    /// 32 bits: which half of the device's features [`DEVICE_FEATURE`] shows.
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    /// 32 bits, read-only: features that the device offers.
    pub const DEVICE_FEATURE: u64 = 0x04;
    /// 32 bits: which half of the driver's features [`DRIVER_FEATURE`] shows.
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    /// 32 bits: features that the driver accepts.
    pub const DRIVER_FEATURE: u64 = 0x0c;
    /// 16 bits: the vector of configuration interrupts.
    pub const CONFIG_VECTOR: u64 = 0x10;
    /// 16 bits, read-only: how many queues there are.
    pub const NUM_QUEUES: u64 = 0x12;
    /// 8 bits: the device status.
    pub const STATUS: u64 = 0x14;
    /// 8 bits, read-only: it changes when the device configuration changes.
    pub const CONFIG_GENERATION: u64 = 0x15;
    /// 16 bits: the queue that the fields below are of.
    pub const QUEUE_SELECT: u64 = 0x16;
    /// 16 bits: descriptors of the queue. At first the most that it can have.
    pub const QUEUE_SIZE: u64 = 0x18;
    /// 16 bits: the queue's vector.
    pub const QUEUE_VECTOR: u64 = 0x1a;
    /// 16 bits: 1 if the queue is enabled.
    pub const QUEUE_ENABLE: u64 = 0x1c;
    /// 16 bits, read-only: the queue's place in the notify area.
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    /// 64 bits: the address of the descriptor area.
    pub const QUEUE_DESC: u64 = 0x20;
    /// 64 bits: the address of the driver area.
    pub const QUEUE_DRIVER: u64 = 0x28;
    /// 64 bits: the address of the device area.
    pub const QUEUE_DEVICE: u64 = 0x30;
    /// 16 bits: a write of 1 resets the queue. Reads 0, because the reset is over when the write
    /// returns.
    pub const QUEUE_RESET: u64 = 0x3a;
}

/// What the driver has written for one queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueRegisters {
    /// Descriptors.
    pub size: u16,
    /// The vector of its interrupts.
    pub vector: u16,
    /// Whether it is enabled.
    pub enabled: bool,
    /// Address of the descriptor area.
    pub descriptors: u64,
    /// Address of the driver area.
    pub driver_area: u64,
    /// Address of the device area.
    pub device_area: u64,
}

/// The common configuration of one device. It holds all that the driver has written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registers {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    status: u8,
    config_vector: u16,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

/// What a write asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Nothing more.
    Nothing,
    /// A reset of the device. The registers have their first values.
    Reset,
    /// The driver has set DRIVER_OK.
    Start,
    /// The driver has enabled this queue.
    Enable(u16),
    /// The driver resets this queue. Its registers have their first values.
    Disable(u16),
    /// The vector of configuration interrupts has changed.
    ConfigVector(u16),
    /// The vector of a queue has changed.
    QueueVector(u16, u16),
}

impl QueueRegisters {
    fn new(kind: &Kind) -> QueueRegisters {
        QueueRegisters {
            size: kind.queue_size,
            vector: NO_VECTOR,
            enabled: false,
            descriptors: 0,
            driver_area: 0,
            device_area: 0,
        }
    }
}

impl Registers {
    /// The values after power-on.
    pub fn new(kind: &Kind) -> Registers {
        Registers {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            queues: (0..kind.queues).map(|_| QueueRegisters::new(kind)).collect(),
        }
    }

    /// Checks that a driver of a device of this kind, with `vectors` vectors of MSI-X, can have
    /// written these values.
    ///
    /// # Errors
    /// It cannot. The text says which one.
    pub fn check(&self, kind: &Kind, vectors: u16) -> Result<(), String> {
        let has_vector = |vector: u16| vector < vectors || vector == NO_VECTOR;
        if self.queues.len() != usize::from(kind.queues) {
            return Err(format!("it has {} queues, not {}", kind.queues, self.queues.len()));
        }
        let fits = |queue: &QueueRegisters| {
            (1..=kind.queue_size).contains(&queue.size) && has_vector(queue.vector)
        };
        if !self.queues.iter().all(fits) || !has_vector(self.config_vector) {
            return Err("a size or a vector of a queue is none that it can have".into());
        }
        let agreed = self.status & status::FEATURES_OK != 0;
        let features = self.driver_features;
        if agreed && (features & !kind.features != 0 || features & feature::VERSION_1 == 0) {
            let offered = kind.features;
            return Err(format!("features {features:#x}; the device offers {offered:#x}"));
        }
        if self.status & status::NEEDS_RESET != 0 || (self.is_started() && !agreed) {
            return Err(format!("the status is {:#x}", self.status));
        }
        if !agreed && self.queues.iter().any(|queue| queue.enabled) {
            return Err("a queue is enabled before the features are agreed on".into());
        }
        Ok(())
    }

    /// The vectors of the configuration and of each queue.
    pub fn vectors(&self) -> (u16, impl Iterator<Item = u16> + '_) {
        (self.config_vector, self.queues.iter().map(|queue| queue.vector))
    }

    /// The device status without [`status::NEEDS_RESET`].
    pub fn status(&self) -> u8 {
        self.status
    }

    /// The features that the driver accepted.
    pub fn features(&self) -> u64 {
        self.driver_features
    }

    /// Whether the driver has set DRIVER_OK.
    pub fn is_started(&self) -> bool {
        self.status & status::DRIVER_OK != 0
    }

    /// Where each enabled queue is, by its number.
    pub fn enabled(&self) -> impl Iterator<Item = (u16, Layout)> + '_ {
        (0..).zip(&self.queues).filter(|(_, q)| q.enabled).map(|(i, q)| (i, self.layout_of(q)))
    }

    /// Where queue `index` is.
    pub fn layout(&self, index: u16) -> Option<Layout> {
        self.queues.get(usize::from(index)).map(|queue| self.layout_of(queue))
    }

    fn layout_of(&self, queue: &QueueRegisters) -> Layout {
        Layout {
            format: Format::of(self.driver_features),
            size: queue.size,
            descriptors: queue.descriptors,
            driver_area: queue.driver_area,
            device_area: queue.device_area,
        }
    }

    /// Reads from `offset` on. `data` may have any length; bytes beyond the end stay as they are.
    pub fn read(&self, kind: &Kind, offset: u64, data: &mut [u8], generation: u8, extra: u8) {
        let mut bytes = [0; BYTES];
        let mut set = |at: u64, value: &[u8]| {
            // All offsets are below BYTES.
            let at = usize::try_from(at).unwrap_or(0);
            bytes[at..at + value.len()].copy_from_slice(value);
        };
        set(at::DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        set(at::DEVICE_FEATURE, &half(kind.features, self.device_feature_select).to_le_bytes());
        set(at::DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        let accepted = half(self.driver_features, self.driver_feature_select);
        set(at::DRIVER_FEATURE, &accepted.to_le_bytes());
        set(at::CONFIG_VECTOR, &self.config_vector.to_le_bytes());
        set(at::NUM_QUEUES, &kind.queues.to_le_bytes());
        set(at::STATUS, &[self.status | extra]);
        set(at::CONFIG_GENERATION, &[generation]);
        set(at::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            set(at::QUEUE_SIZE, &queue.size.to_le_bytes());
            set(at::QUEUE_VECTOR, &queue.vector.to_le_bytes());
            set(at::QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            set(at::QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            set(at::QUEUE_DESC, &queue.descriptors.to_le_bytes());
            set(at::QUEUE_DRIVER, &queue.driver_area.to_le_bytes());
            set(at::QUEUE_DEVICE, &queue.device_area.to_le_bytes());
        } else {
            set(at::QUEUE_VECTOR, &NO_VECTOR.to_le_bytes());
        }
        let from = usize::try_from(offset).unwrap_or(BYTES).min(BYTES);
        for (byte, have) in data.iter_mut().zip(&bytes[from..]) {
            *byte = *have;
        }
    }

    /// Writes a field, or a half of a field of 64 bits. Any other access does nothing. `vectors` is
    /// how many vectors of MSI-X the function has.
    pub fn write(&mut self, kind: &Kind, vectors: u16, offset: u64, data: &[u8]) -> Request {
        match (offset, data.len()) {
            (at::DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = value(data),
            (at::DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = value(data),
            (at::DRIVER_FEATURE, 4) => self.accept(value(data)),
            (at::CONFIG_VECTOR, 2) => {
                self.config_vector = vector(data, vectors);
                return Request::ConfigVector(self.config_vector);
            }
            (at::STATUS, 1) => return self.set_status(kind, data[0]),
            (at::QUEUE_SELECT, 2) => self.queue_select = word(data),
            _ => return self.write_queue(kind, vectors, offset, data),
        }
        Request::Nothing
    }

    fn write_queue(&mut self, kind: &Kind, vectors: u16, offset: u64, data: &[u8]) -> Request {
        let index = self.queue_select;
        let agreed = self.status & status::FEATURES_OK != 0;
        let resets = agreed && self.driver_features & feature::RING_RESET != 0;
        let Some(queue) = self.queues.get_mut(usize::from(index)) else { return Request::Nothing };
        let is_set = queue.enabled;
        match (offset, data.len()) {
            (at::QUEUE_SIZE, 2) if !is_set => {
                let size = word(data);
                if (1..=kind.queue_size).contains(&size) {
                    queue.size = size;
                }
            }
            (at::QUEUE_VECTOR, 2) => {
                queue.vector = vector(data, vectors);
                return Request::QueueVector(index, queue.vector);
            }
            (at::QUEUE_ENABLE, 2) if agreed && !is_set && word(data) == 1 => {
                queue.enabled = true;
                return Request::Enable(index);
            }
            (at::QUEUE_RESET, 2) if resets && word(data) == 1 => {
                *queue = QueueRegisters::new(kind);
                return Request::Disable(index);
            }
            (at::QUEUE_DESC..BYTES_OF_ADDRESSES, 4 | 8) if !is_set && offset % 4 == 0 => {
                let field = match offset & !7 {
                    at::QUEUE_DESC => &mut queue.descriptors,
                    at::QUEUE_DRIVER => &mut queue.driver_area,
                    _ => &mut queue.device_area,
                };
                match (data.len(), offset % 8) {
                    (4, 0) => *field = *field & !0xffff_ffff | u64::from(value(data)),
                    (4, _) => *field = *field & 0xffff_ffff | u64::from(value(data)) << 32,
                    (_, 0) => *field = u64::from(value(data)) | u64::from(value(&data[4..])) << 32,
                    _ => {}
                }
            }
            _ => {}
        }
        Request::Nothing
    }

    /// The driver accepts features of the selected half. Once both ends agree, they stay.
    fn accept(&mut self, features: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        let shift = match self.driver_feature_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        self.driver_features &= !(0xffff_ffff << shift);
        self.driver_features |= u64::from(features) << shift;
    }

    fn set_status(&mut self, kind: &Kind, value: u8) -> Request {
        if value == 0 {
            *self = Registers::new(kind);
            return Request::Reset;
        }
        let before = self.status;
        // A driver never clears a bit but by a reset, and NEEDS_RESET is the device's.
        let mut next = before | value & !status::NEEDS_RESET;
        let agreed = self.driver_features & !kind.features == 0
            && self.driver_features & feature::VERSION_1 != 0;
        if before & status::FEATURES_OK == 0 && !agreed {
            next &= !status::FEATURES_OK;
        }
        if next & status::FEATURES_OK == 0 {
            next &= !status::DRIVER_OK;
        }
        self.status = next;
        if next & !before & status::DRIVER_OK != 0 { Request::Start } else { Request::Nothing }
    }
}

/// The end of the fields with addresses.
const BYTES_OF_ADDRESSES: u64 = at::QUEUE_DEVICE + 8;

fn half(features: u64, select: u32) -> u32 {
    let bytes = features.to_le_bytes();
    match select {
        0 => value(&bytes[..4]),
        1 => value(&bytes[4..]),
        _ => 0,
    }
}

fn word(data: &[u8]) -> u16 {
    u16::from_le_bytes([data[0], data[1]])
}

fn value(data: &[u8]) -> u32 {
    u32::from_le_bytes([data[0], data[1], data[2], data[3]])
}

/// A vector that the function has; [`NO_VECTOR`] tells the driver that it has not.
fn vector(data: &[u8], vectors: u16) -> u16 {
    let vector = word(data);
    if vector < vectors { vector } else { NO_VECTOR }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind {
        id: 1,
        pci_class: 0x02_00_00,
        queues: 3,
        queue_size: 256,
        features: feature::VERSION_1 | feature::RING_RESET | 0x21,
    };

    struct Rig(Registers);

    impl Rig {
        fn new() -> Rig {
            Rig(Registers::new(&KIND))
        }

        fn put(&mut self, offset: u64, data: &[u8]) -> Request {
            self.0.write(&KIND, 4, offset, data)
        }

        fn get(&self, offset: u64) -> u64 {
            let mut data = [0; 8];
            let len = match offset {
                at::STATUS | at::CONFIG_GENERATION => 1,
                at::QUEUE_DESC | at::QUEUE_DRIVER | at::QUEUE_DEVICE => 8,
                0..0x10 => 4,
                _ => 2,
            };
            self.0.read(&KIND, offset, &mut data[..len], 7, 0);
            u64::from_le_bytes(data)
        }

        fn accept(&mut self, features: u64) {
            let bytes = features.to_le_bytes();
            for select in 0..2u8 {
                self.put(at::DRIVER_FEATURE_SELECT, &[select, 0, 0, 0]);
                self.put(at::DRIVER_FEATURE, &bytes[usize::from(select) * 4..][..4]);
            }
        }

        fn agreed() -> Rig {
            let mut rig = Rig::new();
            rig.accept(KIND.features);
            assert_eq!(rig.put(at::STATUS, &[0xb]), Request::Nothing);
            assert_eq!(rig.get(at::STATUS), 0xb);
            rig
        }
    }

    #[test]
    fn features_are_seen_in_halves() {
        let mut rig = Rig::new();
        assert_eq!(rig.get(at::DEVICE_FEATURE), 0x21);
        rig.put(at::DEVICE_FEATURE_SELECT, &[1, 0, 0, 0]);
        assert_eq!(rig.get(at::DEVICE_FEATURE), KIND.features >> 32);
        rig.put(at::DEVICE_FEATURE_SELECT, &[2, 0, 0, 0]);
        assert_eq!(rig.get(at::DEVICE_FEATURE), 0);
        assert_eq!((rig.get(at::NUM_QUEUES), rig.get(at::CONFIG_GENERATION)), (3, 7));
    }

    #[test]
    fn the_ends_agree_on_offered_features_only() {
        for (features, agreed) in [
            (KIND.features, true),
            (feature::VERSION_1, true),
            (0x21, false),
            (feature::VERSION_1 | 2, false),
            (0, false),
        ] {
            let mut rig = Rig::new();
            rig.accept(features);
            rig.put(at::STATUS, &[0xb]);
            assert_eq!(rig.get(at::STATUS) & 8 != 0, agreed, "{features:#x}");
            rig.put(at::STATUS, &[0xf]);
            assert_eq!(rig.0.is_started(), agreed, "{features:#x}");
        }
        let mut rig = Rig::agreed();
        rig.accept(0);
        assert_eq!(rig.0.features(), KIND.features, "they stay");
        assert_eq!(rig.put(at::STATUS, &[4]), Request::Start, "no bit is cleared");
        assert_eq!(rig.get(at::STATUS), 0xf);
        assert_eq!(rig.put(at::STATUS, &[0xf]), Request::Nothing, "it starts once");
        rig.put(at::STATUS, &[status::NEEDS_RESET | 0xf]);
        assert_eq!(rig.get(at::STATUS), 0xf);
        assert_eq!(rig.put(at::STATUS, &[0]), Request::Reset);
        assert_eq!(rig.0, Registers::new(&KIND));
    }

    #[test]
    fn a_queue_is_set_up_enabled_and_reset() {
        let mut rig = Rig::agreed();
        rig.put(at::QUEUE_SELECT, &[2, 0]);
        assert_eq!((rig.get(at::QUEUE_SIZE), rig.get(at::QUEUE_NOTIFY_OFF)), (256, 2));
        assert_eq!(rig.get(at::QUEUE_VECTOR), 0xffff);
        rig.put(at::QUEUE_SIZE, &[64, 0]);
        for bad in [[0, 0], [1, 1]] {
            rig.put(at::QUEUE_SIZE, &bad);
        }
        rig.put(at::QUEUE_DESC, &[0, 0x10, 0, 0]);
        rig.put(at::QUEUE_DESC + 4, &[1, 0, 0, 0]);
        rig.put(at::QUEUE_DRIVER, &[0, 0x20, 0, 0, 2, 0, 0, 0]);
        rig.put(at::QUEUE_DRIVER + 4, &[9; 8]);
        rig.put(at::QUEUE_DEVICE, &[0, 0x30, 0, 0]);
        assert_eq!(rig.put(at::QUEUE_VECTOR, &[3, 0]), Request::QueueVector(2, 3));
        assert_eq!(rig.put(at::QUEUE_VECTOR, &[4, 0]), Request::QueueVector(2, 0xffff));
        assert_eq!(rig.put(at::CONFIG_VECTOR, &[1, 0]), Request::ConfigVector(1));
        assert_eq!(rig.put(at::QUEUE_ENABLE, &[0, 0]), Request::Nothing);
        assert_eq!(rig.put(at::QUEUE_ENABLE, &[1, 0]), Request::Enable(2));
        assert_eq!(rig.put(at::QUEUE_ENABLE, &[1, 0]), Request::Nothing);
        rig.put(at::QUEUE_SIZE, &[32, 0]);
        rig.put(at::QUEUE_DESC, &[0, 0, 0, 0]);
        let layout = Layout {
            format: Format::Split,
            size: 64,
            descriptors: 0x1_0000_1000,
            driver_area: 0x2_0000_2000,
            device_area: 0x3000,
        };
        assert_eq!(rig.0.enabled().collect::<Vec<_>>(), [(2, layout)]);
        assert_eq!(rig.put(at::QUEUE_RESET, &[0, 0]), Request::Nothing);
        assert_eq!(rig.put(at::QUEUE_RESET, &[1, 0]), Request::Disable(2));
        assert_eq!((rig.get(at::QUEUE_ENABLE), rig.get(at::QUEUE_SIZE)), (0, 256));
        assert_eq!(rig.get(at::QUEUE_RESET), 0);
        assert_eq!(rig.0.enabled().count(), 0);
    }

    #[test]
    fn a_queue_needs_the_features_first() {
        let mut rig = Rig::new();
        assert_eq!(rig.put(at::QUEUE_ENABLE, &[1, 0]), Request::Nothing);
        rig.accept(feature::VERSION_1);
        rig.put(at::STATUS, &[0xb]);
        assert_eq!(rig.put(at::QUEUE_ENABLE, &[1, 0]), Request::Enable(0));
        assert_eq!(rig.put(at::QUEUE_RESET, &[1, 0]), Request::Nothing, "not negotiated");
        rig.put(at::QUEUE_SELECT, &[3, 0]);
        assert_eq!((rig.get(at::QUEUE_SIZE), rig.get(at::QUEUE_ENABLE)), (0, 0));
        assert_eq!(rig.put(at::QUEUE_ENABLE, &[1, 0]), Request::Nothing, "no such queue");
    }

    /// Any access of up to 9 bytes anywhere: nothing panics, and no field changes in part.
    #[test]
    fn odd_accesses_do_nothing() {
        let fields = [(0x00, 4), (0x08, 4), (0x0c, 4), (0x10, 2), (0x14, 1), (0x16, 2), (0x18, 2)];
        for (offset, len) in (0..BYTES as u64 + 9).flat_map(|at| (0..10).map(move |n| (at, n))) {
            let mut rig = Rig::agreed();
            let before = rig.0.clone();
            let data = vec![1; len];
            rig.put(offset, &data);
            let is_field = fields.contains(&(offset, len))
                || matches!((offset, len), (0x1a | 0x1c | 0x3a, 2))
                || (0x20..0x38).contains(&offset)
                    && offset % 4 == 0
                    && (len == 4 || len == 8 && offset % 8 == 0);
            assert!(is_field || rig.0 == before, "{offset:#x} {len}");
            let mut data = vec![0xee; len];
            rig.0.read(&KIND, offset, &mut data, 0, 0);
        }
    }
}
