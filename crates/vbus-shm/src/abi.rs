// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Every number that both ends of vbus must agree on (spec/pci.md, spec/service.md, and a
//! document for each class). All fields are little-endian.

/// PCI vendor id of the devices of this bus. vbus uses this vendor's range for experiments. A
/// driver recognizes a function of vbus by the signature in its [`capability`], not by its ids.
pub const PCI_VENDOR: u16 = 0x1af4;
/// PCI device id, of the range for experiments.
pub const PCI_DEVICE: u16 = 0x10f5;
/// PCI revision. It has no meaning: [`reg::ABI`] has the versions of the ABI.
pub const PCI_REVISION: u8 = 0;
/// The lowest version of the ABI that this code supports.
pub const ABI_LOWEST: u16 = 1;
/// The highest version of the ABI that this code supports.
pub const ABI_HIGHEST: u16 = 1;

/// Device classes: the PCI subsystem id and the register [`reg::CLASS`].
pub mod class {
    /// An Ethernet controller (spec/venet.md).
    pub const VENET: u16 = 1;
    /// Named state pages (spec/state.md).
    pub const STATE: u16 = 2;
    /// Scheduling class of virtual CPUs (spec/sched.md).
    pub const SCHED: u16 = 3;
    /// An interrupt controller for the other devices (spec/pic.md).
    pub const PIC: u16 = 4;
    /// The first number for classes outside of this specification.
    pub const USER: u16 = 0x8000;
}

/// BAR 0.
pub mod bar0 {
    /// Bytes of the BAR.
    pub const SIZE: u64 = 0x4000;
    /// Offset of the register page.
    pub const REGISTERS: u64 = 0x0000;
    /// Offset of the doorbell page.
    pub const DOORBELLS: u64 = 0x1000;
    /// Bytes from one doorbell to the next. Any write of 1 to 8 bytes rings it. The device ignores
    /// the value.
    pub const DOORBELL_STRIDE: u64 = 4;
    /// Number of doorbells in the page. Handles are below it.
    pub const DOORBELL_COUNT: u32 = 1024;
    /// Offset of the MSI-X table, if there is one.
    pub const MSIX_TABLE: u64 = 0x2000;
    /// Offset of the MSI-X pending bits.
    pub const MSIX_PBA: u64 = 0x3000;
    /// The most MSI-X vectors.
    pub const MSIX_MAX: u16 = 256;
}

/// The vendor-specific PCI capability. It begins with {id 0x09, next, length}. Its fields have
/// these offsets:
pub mod capability {
    /// Length without the doorbell records.
    pub const HEADER_BYTES: u8 = 12;
    /// u8: version of the layout of this capability, [`LAYOUT`]. A driver that does not know the
    /// version must ignore the rest of the capability.
    pub const VERSION: u8 = 3;
    /// The version of the layout that this module describes.
    pub const LAYOUT: u8 = 1;
    /// u32: [`SIGNATURE_VALUE`]. A driver recognizes a function of vbus by it.
    pub const SIGNATURE: u8 = 4;
    /// The value of [`SIGNATURE`]: "vbus".
    pub const SIGNATURE_VALUE: u32 = super::reg::MAGIC_VALUE;
    /// u32: offset of the registers in BAR 0.
    pub const REGISTERS: u8 = 8;
    /// Bytes of one doorbell record: {kind u8, reserved u8, stride u16, base u32}. The length of
    /// the capability gives the number of records.
    pub const RECORD_BYTES: u8 = 8;
    /// Kind of doorbell: a write to `base + handle * stride` in BAR 0.
    pub const KIND_MMIO: u8 = 1;
    /// Kind of doorbell: a write to I/O port `base + handle * stride`.
    pub const KIND_PIO: u8 = 2;
    /// Kind of doorbell: a hypercall that signals event connection `base + handle * stride`.
    pub const KIND_HYPERCALL: u8 = 3;
    /// Kinds from this number on are no doorbells.
    pub const KIND_NOT_DOORBELL: u8 = 0x80;
    /// Not a doorbell. An interrupt message to `base + vp * stride` with data n raises synthetic
    /// interrupt n of virtual processor vp.
    pub const KIND_SINT: u8 = 0x81;
    /// The most records of a capability.
    pub const RECORDS_MAX: usize = 4;
    /// The highest event connection that a hypercall can name.
    pub const CONNECTION_MAX: u32 = 0xff_ffff;
    /// Input value of the hypercall: HvCallSignalEvent. A register has its parameter, the event
    /// connection.
    pub const SIGNAL_EVENT: u64 = 0x1_005d;
}

/// Registers, as offsets in the register page. An access has 4 or 8 aligned bytes. Other reads
/// return zeros, and other writes are ignored.
pub mod reg {
    /// u32, ro: [`MAGIC_VALUE`].
    pub const MAGIC: u64 = 0x000;
    /// The value of [`MAGIC`]: "vbus".
    pub const MAGIC_VALUE: u32 = 0x7375_6276;
    /// u32, ro: lowest (bits 0..16) and highest (16..32) ABI version that OPEN accepts.
    pub const ABI: u64 = 0x004;
    /// u32, ro: device class.
    pub const CLASS: u64 = 0x008;
    /// u32, ro: state of the connection. Bits 0..8: one of [`CONNECTION_CLOSED`] etc. Bits 16..32:
    /// the [`error_code`](super::error_code) that ended it.
    pub const CONNECTION: u64 = 0x00c;
    /// No connection.
    pub const CONNECTION_CLOSED: u32 = 0;
    /// A connection is open.
    pub const CONNECTION_OPEN: u32 = 1;
    /// The device has ended the connection. The driver may CLOSE it and OPEN another one.
    pub const CONNECTION_BROKEN: u32 = 2;
    /// 16 bytes, ro: class name, ASCII, padded with zeros.
    pub const CLASS_NAME: u64 = 0x010;
    /// 32 bytes, ro: the device's own name, ASCII, padded with zeros.
    pub const NAME: u64 = 0x020;
    /// u64, ro: features that the device offers. The class defines bits 0..48, the bus bits 48..64.
    pub const FEATURES: u64 = 0x040;
    /// u64, ro: features of the open connection.
    pub const FEATURES_ACCEPTED: u64 = 0x048;
    /// u32, ro: the most regions of a connection. Handles are below it.
    pub const MAX_REGIONS: u64 = 0x050;
    /// u32, ro: number of interrupt vectors that the driver can distinguish now. 1 with INTx and
    /// MSI.
    pub const VECTORS: u64 = 0x054;
    /// u64, ro: the most bytes of a region.
    pub const MAX_REGION_BYTES: u64 = 0x058;
    /// u32, ro: number of changes of the config area, modulo 2^32.
    pub const CONFIG_GENERATION: u64 = 0x060;
    /// u32, ro: bytes of the config area that the class uses.
    pub const CONFIG_BYTES: u64 = 0x064;
    /// u64, ro: a random number, not 0. It changes when the device has lost its driver's settings:
    /// the device started anew, or the virtual machine was restored.
    pub const INCARNATION: u64 = 0x068;
    /// u32, ro: pending events of the function, bits of [`event`](super::event).
    pub const EVENTS: u64 = 0x070;
    /// u32, wo: acknowledges the events whose bits are set. The write may be posted. So read a
    /// register after it, and only then look at the causes of the events.
    pub const EVENTS_ACK: u64 = 0x074;
    /// u64 x 4, rw: arguments of the next command.
    pub const ARGUMENT: u64 = 0x080;
    /// u32, wo: a write runs this [`command`](super::command) with the arguments.
    pub const COMMAND: u64 = 0x0a0;
    /// u32, ro: [`error_code`](super::error_code) of the last command. A read returns when the
    /// command has ended, or returns [`IN_PROGRESS`](super::error_code::IN_PROGRESS).
    pub const RESULT: u64 = 0x0a4;
    /// u64, ro: value of the last command.
    pub const VALUE: u64 = 0x0a8;
    /// u32, ro: 1 while INTx is pending: the device has triggered it, and the driver has not
    /// acknowledged it. Always 0 with MSI and MSI-X.
    pub const INTERRUPT_PENDING: u64 = 0x0b0;
    /// u32, wo: any write acknowledges INTx. The write may be posted. So read a register after it,
    /// and only then look at the signals.
    pub const INTERRUPT_ACK: u64 = 0x0b4;
    /// The class's config area.
    pub const CONFIG: u64 = 0x400;
    /// The most bytes of the config area.
    pub const CONFIG_MAX: usize = 0x400;
}

/// Events of the function itself, not of its queues. An event says what has changed. The new value
/// is in a register or a page.
pub mod event {
    /// The device has ended the connection by a fault: see [`reg::CONNECTION`](super::reg).
    pub const BROKEN: u32 = 1 << 0;
    /// The device is being removed. It has ended the connection.
    pub const REMOVED: u32 = 1 << 1;
    /// The config area has changed.
    pub const CONFIG: u32 = 1 << 2;
    /// The class asks its driver to announce itself to others. An Ethernet driver announces its
    /// addresses.
    pub const ANNOUNCE: u32 = 1 << 3;
    /// The device has lost its driver's settings: see [`reg::INCARNATION`](super::reg).
    pub const INCARNATION: u32 = 1 << 4;
    /// The command that was in progress has ended: see [`reg::RESULT`](super::reg).
    pub const COMMAND: u32 = 1 << 5;
}

/// Commands of the mailbox, with their arguments a0..a3.
pub mod command {
    /// Opens the connection. a0: bits 0..16 the version of the ABI, the highest that both ends
    /// support; 32..48 the vector of the function's [events](super::event); a1: the features that
    /// the driver wants, a subset of those offered; a2: address of the handshake word (8 bytes,
    /// aligned); a3: the value that the driver has written there. If the device does not find that
    /// value, the memory is not shared, and the command fails.
    pub const OPEN: u32 = 1;
    /// Closes the connection and drops all regions. Afterwards the device touches no memory. It
    /// always succeeds.
    pub const CLOSE: u32 = 2;
    /// Registers a region. a0: bits 0..32 the class's id for it, 32..48 vector, 48..56 page shift
    /// (0: contiguous); a1: address of the region, or, with a page shift, of an array of u64 page
    /// addresses; a2: length in bytes; a3: offset of the signal block, or [`NO_SIGNAL`]. Value: the
    /// handle, which is also the number of the doorbell.
    pub const REGION_ADD: u32 = 3;
    /// Drops a region. a0: handle.
    pub const REGION_DROP: u32 = 4;
    /// Calls the class. a0: bits 0..32 function, 32..64 flags; a1: address of a buffer; a2: its
    /// length in bytes (at most [`CALL_MAX`]). The device reads the buffer before the call and
    /// writes it after the call. The class defines the value.
    pub const CALL: u32 = 5;
    /// The region has no signal.
    pub const NO_SIGNAL: u64 = u64::MAX;
    /// The largest buffer of a call, in bytes.
    pub const CALL_MAX: u64 = 65536;
    /// The most entries of a page list.
    pub const PAGES_MAX: u64 = 4096;
}

/// Results of commands.
pub mod error_code {
    /// Done.
    pub const OK: u32 = 0;
    /// No such command.
    pub const BAD_COMMAND: u32 = 1;
    /// An argument is out of range (reserved bits set, page shift, unknown id, ...).
    pub const BAD_ARGUMENT: u32 = 2;
    /// The command needs an open connection.
    pub const NOT_OPEN: u32 = 3;
    /// OPEN on an open connection.
    pub const ALREADY_OPEN: u32 = 4;
    /// OPEN with an ABI version that is not offered.
    pub const BAD_VERSION: u32 = 5;
    /// OPEN with features that are not offered, or that need one another.
    pub const BAD_FEATURES: u32 = 6;
    /// The range is not completely in memory that the device can reach.
    pub const BAD_ADDRESS: u32 = 7;
    /// The device did not find the handshake word. So the memory at the address is not the driver's
    /// own (QEMU: share=on is missing).
    pub const NOT_SHARED: u32 = 8;
    /// A length is 0, too large, or does not fit the layout.
    pub const BAD_LENGTH: u32 = 9;
    /// An address or offset is not aligned.
    pub const BAD_ALIGNMENT: u32 = 10;
    /// The signal block does not fit the region.
    pub const BAD_SIGNAL: u32 = 11;
    /// No such vector.
    pub const BAD_VECTOR: u32 = 12;
    /// There are already as many as allowed.
    pub const LIMIT: u32 = 13;
    /// No such region.
    pub const NO_REGION: u32 = 14;
    /// The header in the region is wrong (magic, size, form).
    pub const BAD_LAYOUT: u32 = 15;
    /// The class has no such function.
    pub const BAD_FUNCTION: u32 = 16;
    /// The id is in use.
    pub const EXISTS: u32 = 17;
    /// The device cannot do it now, for instance because its back end failed. The log has the
    /// reason.
    pub const FAILED: u32 = 18;
    /// The driver broke a protocol in shared memory, such as that of a ring.
    pub const CORRUPT: u32 = 19;
    /// The VMM unmapped memory of a region while the connection was open.
    pub const REVOKED: u32 = 20;
    /// Not allowed, because it belongs to the other end.
    pub const DENIED: u32 = 21;
    /// The device is being removed.
    pub const REMOVED: u32 = 22;
    /// The command is still running. [`event::COMMAND`](super::event::COMMAND) comes when it has
    /// ended, and RESULT then has its error code.
    pub const IN_PROGRESS: u32 = 23;
    /// The first error code that is free for classes.
    pub const CLASS: u32 = 0x100;
}

/// Feature bits of the bus itself.
pub mod feature {
    /// The class's bits.
    pub const CLASS_MASK: u64 = (1 << 48) - 1;
}

/// `venet`: Ethernet (spec/venet.md).
pub mod venet {
    /// Feature: the driver may leave TCP and UDP checksums to the device.
    pub const F_TX_CSUM: u64 = 1 << 0;
    /// Feature: the driver may leave TCP segmentation over IPv4 to the device. Needs
    /// [`F_TX_CSUM`].
    pub const F_TX_TSO4: u64 = 1 << 1;
    /// Feature: the driver may leave TCP segmentation over IPv6 to the device. Needs
    /// [`F_TX_CSUM`].
    pub const F_TX_TSO6: u64 = 1 << 2;
    /// Feature: segments that the driver leaves to the device may have the CWR flag. Needs
    /// [`F_TX_TSO4`] or [`F_TX_TSO6`].
    pub const F_TX_ECN: u64 = 1 << 3;
    /// Feature: the driver may leave UDP segmentation to the device. Needs [`F_TX_CSUM`].
    pub const F_TX_USO: u64 = 1 << 4;
    /// The features of frames from the driver.
    pub const F_TX: u64 = 0x1f;
    /// Feature: the driver accepts frames whose checksum the device leaves to it. The features of
    /// frames to the driver are those of frames from the driver, [`F_RX_SHIFT`] bits higher.
    pub const F_RX_CSUM: u64 = F_TX_CSUM << F_RX_SHIFT;
    /// Feature: the driver accepts segments of TCP over IPv4. Needs [`F_RX_CSUM`].
    pub const F_RX_TSO4: u64 = F_TX_TSO4 << F_RX_SHIFT;
    /// Feature: the driver accepts segments of TCP over IPv6. Needs [`F_RX_CSUM`].
    pub const F_RX_TSO6: u64 = F_TX_TSO6 << F_RX_SHIFT;
    /// Feature: the driver accepts segments with the CWR flag. Needs [`F_RX_TSO4`] or
    /// [`F_RX_TSO6`].
    pub const F_RX_ECN: u64 = F_TX_ECN << F_RX_SHIFT;
    /// Feature: the driver accepts segments of UDP. Needs [`F_RX_CSUM`].
    pub const F_RX_USO: u64 = F_TX_USO << F_RX_SHIFT;
    /// The features of frames to the driver.
    pub const F_RX: u64 = F_TX << F_RX_SHIFT;
    /// See [`F_RX_CSUM`].
    pub const F_RX_SHIFT: u32 = 8;
    /// Feature: the header before a frame to the driver has the frame's hash
    /// ([`HASH_HEADER_BYTES`]).
    pub const F_HASH: u64 = 1 << 16;
    /// Feature: the driver may choose the receive queue of a frame by its hash.
    pub const F_RSS: u64 = 1 << 17;
    /// Feature: the driver may filter by VLAN id ([`CALL_SET_VLANS`]).
    pub const F_VLAN: u64 = 1 << 18;
    /// Feature: the driver may change its address ([`CALL_SET_MAC`]).
    pub const F_MAC: u64 = 1 << 19;
    /// The driver may let the device hold interrupts back ([`CALL_SET_COALESCE`]).
    pub const F_COALESCE: u64 = 1 << 20;

    /// Removes from `features` the offloads that need another offload which is missing.
    pub const fn complete(features: u64) -> u64 {
        const fn direction(bits: u64) -> u64 {
            if bits & F_TX_CSUM == 0 {
                return 0;
            }
            if bits & (F_TX_TSO4 | F_TX_TSO6) == 0 { bits & !F_TX_ECN } else { bits }
        }
        let rx = direction(features >> F_RX_SHIFT & F_TX) << F_RX_SHIFT;
        features & !(F_TX | F_RX) | direction(features & F_TX) | rx
    }

    /// Config area: MAC address, 6 bytes.
    pub const CONFIG_MAC: usize = 0;
    /// Config area: u16, the largest frame without its 14 bytes of Ethernet header (MTU).
    pub const CONFIG_MTU: usize = 6;
    /// Config area: u16, the most queue pairs.
    pub const CONFIG_QUEUE_PAIRS: usize = 8;
    /// Config area: u16, the most entries of a ring.
    pub const CONFIG_RING_MAX: usize = 10;
    /// Config area: u16, the most entries of an indirection table.
    pub const CONFIG_RSS_TABLE_MAX: usize = 12;
    /// Config area: u32, the kinds of frames that the device can hash, see [`hash_kind`].
    pub const CONFIG_HASH_KINDS: usize = 16;
    /// Bytes of the config area.
    pub const CONFIG_BYTES: usize = 24;

    /// Region id of the transmit ring of queue pair `q`: counted returns. The entries (chained by
    /// NEXT) hold header and frame.
    pub const fn tx(q: u16) -> u32 {
        q as u32 * 2
    }
    /// Region id of the receive ring of queue pair `q`: returns with entries; the driver submits
    /// empty buffers. The returns of a frame that needs several buffers are chained by NEXT.
    pub const fn rx(q: u16) -> u32 {
        q as u32 * 2 + 1
    }
    /// The most queue pairs of any device.
    pub const QUEUE_PAIRS_MAX: u16 = 16;
    /// Region id of the status page: a state page written by the device, see [`status_page`].
    pub const REGION_STATUS: u32 = 0x100;
    /// Region id of the counters page: a state page written by the device, see [`counters_page`].
    pub const REGION_COUNTERS: u32 = 0x101;

    /// Bytes of the header before each frame: the virtio-net header {flags u8, gso_type u8, hdr_len
    /// u16, gso_size u16, csum_start u16, csum_offset u16, num_buffers u16}.
    pub const HEADER_BYTES: usize = 12;
    /// Bytes of the header before each frame to the driver with [`F_HASH`]: the one above, then
    /// {hash u32, kind u16 ([`hash_kind`]: the number of its bit, plus 1; 0: not hashed), zero
    /// u16}.
    pub const HASH_HEADER_BYTES: usize = HEADER_BYTES + 8;
    /// Bits and values of the header (virtio 1.3, 5.1.6).
    pub mod flag {
        /// `flags`: the sender leaves the checksum from `csum_start` on to the receiver.
        pub const NEEDS_CSUM: u8 = 1;
        /// `flags`, to the driver: the checksum has been verified.
        pub const VERIFIED: u8 = 2;
        /// `gso_type`: no segmentation.
        pub const GSO_NONE: u8 = 0;
        /// `gso_type`: TCP over IPv4.
        pub const GSO_TCPV4: u8 = 1;
        /// `gso_type`: TCP over IPv6.
        pub const GSO_TCPV6: u8 = 4;
        /// `gso_type`: UDP, cut into datagrams.
        pub const GSO_UDP: u8 = 5;
        /// `gso_type`, combined with a TCP value: the CWR flag is set.
        pub const GSO_ECN: u8 = 0x80;
    }

    /// The most bytes of a frame with its header (without a hash): a 64 KiB segment, its Ethernet
    /// header, two tags.
    pub const FRAME_MAX: usize = HEADER_BYTES + 65536 + 14 + 8;
    /// The most entries of one frame.
    pub const CHAIN_MAX: usize = 20;

    /// Call: start the device. From now on it serves the rings. Buffer: empty. At least one queue
    /// pair must exist, and each pair must have both rings.
    pub const CALL_START: u32 = 1;
    /// Call: receive filter. Buffer: flags u32 ([`FILTER_PROMISCUOUS`], [`FILTER_ALL_MULTICAST`]),
    /// count u32, then `count` addresses of 6 bytes. Without this call, the driver gets frames to
    /// the device's own address and broadcasts.
    pub const CALL_FILTER: u32 = 2;
    /// All frames pass.
    pub const FILTER_PROMISCUOUS: u32 = 1 << 0;
    /// All multicast frames pass.
    pub const FILTER_ALL_MULTICAST: u32 = 1 << 1;
    /// The most addresses of a filter.
    pub const FILTER_MAX: u32 = 64;
    /// Call: set the offloads of frames to the driver. Buffer: u64, a subset of the accepted
    /// `F_RX_` features.
    pub const CALL_SET_OFFLOADS: u32 = 3;
    /// Call: set the number of queue pairs in use. Buffer: u32, at least 1.
    pub const CALL_SET_QUEUES: u32 = 4;
    /// Call: set the device's address until the connection closes. Buffer: 6 bytes.
    pub const CALL_SET_MAC: u32 = 5;
    /// Call: set the hashes of frames to the driver. Buffer: kinds u32 ([`hash_kind`]), entries
    /// u16, zero u16, key of [`RSS_KEY_BYTES`] bytes, then the indirection table: `entries` (0, or
    /// a power of two) queue pairs, each u16.
    pub const CALL_SET_RSS: u32 = 6;
    /// Call: set the VLAN ids that pass. Buffer: u32, 0: all pass, 1: those of the map pass; zero
    /// u32; with 1 a map of [`VLAN_MAP_BYTES`] bytes, in which VLAN id `n` is bit `n % 8` of byte
    /// `n / 8`.
    pub const CALL_SET_VLANS: u32 = 7;
    /// Call: how long interrupts are held back. Buffer: queue pair u32 ([`ALL_PAIRS`]: every one),
    /// zero u32, then for the receive ring and for the transmit ring: microseconds u32 (0: not at
    /// all), frames u32 (an interrupt comes at this many at the latest; 0: any number).
    pub const CALL_SET_COALESCE: u32 = 8;
    /// Every queue pair of the device, in [`CALL_SET_COALESCE`].
    pub const ALL_PAIRS: u32 = u32::MAX;
    /// Bytes of a key of [`CALL_SET_RSS`].
    pub const RSS_KEY_BYTES: usize = 40;
    /// The most entries of any indirection table.
    pub const RSS_TABLE_MAX: u16 = 128;
    /// Bytes of the map of [`CALL_SET_VLANS`].
    pub const VLAN_MAP_BYTES: usize = 512;

    /// Kinds of frames that the device hashes, as bits.
    pub mod hash_kind {
        /// IPv4: by the addresses.
        pub const IPV4: u32 = 1 << 0;
        /// TCP over IPv4: by addresses and ports.
        pub const TCPV4: u32 = 1 << 1;
        /// UDP over IPv4: by addresses and ports.
        pub const UDPV4: u32 = 1 << 2;
        /// IPv6: by the addresses.
        pub const IPV6: u32 = 1 << 3;
        /// TCP over IPv6: by addresses and ports.
        pub const TCPV6: u32 = 1 << 4;
        /// UDP over IPv6: by addresses and ports.
        pub const UDPV6: u32 = 1 << 5;
    }

    /// The status page's value: u64 words, in this order. Words that are not listed are 0.
    pub mod status_page {
        /// Bit 0: link up.
        pub const LINK: usize = 0;
        /// MAC in the low 48 bits, first byte lowest.
        pub const MAC: usize = 1;
        /// Speed of the link in Mb/s; 0: unknown.
        pub const SPEED: usize = 2;
        /// 0: half duplex, 1: full duplex, 2: unknown.
        pub const DUPLEX: usize = 3;
        /// The number of times that the device asked the driver to announce its addresses to the
        /// network.
        pub const ANNOUNCE: usize = 4;
        /// The incarnation of the device.
        pub const INCARNATION: usize = 5;
        /// Frames from the driver.
        pub const TX_FRAMES: usize = 8;
        /// Bytes from the driver, without headers.
        pub const TX_BYTES: usize = 9;
        /// Frames from the driver that were dropped.
        pub const TX_DROPS: usize = 10;
        /// Frames to the driver.
        pub const RX_FRAMES: usize = 11;
        /// Bytes to the driver, without headers.
        pub const RX_BYTES: usize = 12;
        /// Frames to the driver that were dropped.
        pub const RX_DROPS: usize = 13;
        /// Words of the value. Only changes of words before [`TX_FRAMES`] interrupt the driver.
        pub const WORDS: usize = 16;
        /// Bytes of the value.
        pub const BYTES: u32 = 128;
    }

    /// The counters page's value: for each queue pair of the device,
    /// [`WORDS`](counters_page::WORDS) u64 words, in this order. Words that are not listed are 0.
    pub mod counters_page {
        /// Frames from the driver that were sent on.
        pub const TX_FRAMES: usize = 0;
        /// Their bytes, without headers.
        pub const TX_BYTES: usize = 1;
        /// Rounds of the device's poll that sent frames.
        pub const TX_BATCHES: usize = 2;
        /// Times that sending stopped because the other side had no room.
        pub const TX_WAITS: usize = 3;
        /// Frames whose checksum was left to the device.
        pub const TX_CSUM: usize = 4;
        /// Frames whose segmentation was left to the device.
        pub const TX_SEGMENTS: usize = 5;
        /// Dropped: shorter than an Ethernet header.
        pub const TX_DROPS_SHORT: usize = 8;
        /// Dropped: the header does not fit the frame or the features accepted.
        pub const TX_DROPS_HEADER: usize = 9;
        /// Dropped: no link.
        pub const TX_DROPS_NO_LINK: usize = 10;
        /// Dropped: the back end refused the frame.
        pub const TX_DROPS_REFUSED: usize = 11;
        /// Dropped: longer than the MTU.
        pub const TX_DROPS_LONG: usize = 12;
        /// Dropped: the source address does not belong to the device.
        pub const TX_DROPS_SPOOFED: usize = 13;
        /// Dropped: the settings of VLANs or of isolation forbid the frame.
        pub const TX_DROPS_DENIED: usize = 14;
        /// Dropped: too many broadcasts, or the frame is in a loop.
        pub const TX_DROPS_STORM: usize = 15;
        /// Frames to the driver.
        pub const RX_FRAMES: usize = 16;
        /// Their bytes, without headers.
        pub const RX_BYTES: usize = 17;
        /// Posts that made frames visible.
        pub const RX_BATCHES: usize = 18;
        /// Times that a frame found too few buffers.
        pub const RX_STARVED: usize = 19;
        /// Frames whose checksum was left to the driver.
        pub const RX_CSUM: usize = 20;
        /// Frames whose segmentation was left to the driver.
        pub const RX_SEGMENTS: usize = 21;
        /// Frames that the driver's filter refused. They do not count as dropped.
        pub const RX_FILTERED: usize = 22;
        /// Dropped: too few buffers.
        pub const RX_DROPS_BUFFERS: usize = 24;
        /// Dropped: longer than the MTU, or than 20 buffers.
        pub const RX_DROPS_LONG: usize = 25;
        /// Dropped: the device cannot bring the frame into a form that the driver accepts.
        pub const RX_DROPS_BAD: usize = 26;
        /// Dropped: too few buffers, and the sender does not wait for this driver any more.
        pub const RX_DROPS_SLOW: usize = 27;
        /// Dropped: above the rate that the settings allow.
        pub const RX_DROPS_RATE: usize = 28;
        /// Dropped: the queue has no ring, or its driver has broken the protocol.
        pub const RX_DROPS_NO_LINK: usize = 29;
        /// Words for each queue pair.
        pub const WORDS: usize = 32;
        /// Bytes for each queue pair.
        pub const BYTES: u32 = 256;
    }
}

/// `state`: named state pages (spec/state.md). The region with id `i` is page number `i` of the
/// device.
pub mod state {
    /// Config area: u32, number of pages.
    pub const CONFIG_PAGES: usize = 0;
    /// Bytes of the config area.
    pub const CONFIG_BYTES: usize = 8;
    /// The most pages of a device.
    pub const PAGES_MAX: u32 = 256;
    /// Call: describe a page. Buffer in: number u32; out: [`DESCRIPTION_BYTES`] bytes: value bytes
    /// u32, owner u32 ([`OWNER_DEVICE`] or [`OWNER_DRIVER`]), name of 56 bytes, UTF-8, padded with
    /// zeros.
    pub const CALL_DESCRIBE: u32 = 1;
    /// Bytes of a description.
    pub const DESCRIPTION_BYTES: usize = 64;
    /// The most bytes of a name.
    pub const NAME_MAX: usize = 56;
    /// The device's end writes the page.
    pub const OWNER_DEVICE: u32 = 0;
    /// The driver's end writes the page.
    pub const OWNER_DRIVER: u32 = 1;
}

/// `sched`: the scheduling class of virtual CPUs' threads (spec/sched.md).
pub mod sched {
    /// Config area: u32, number of virtual CPUs that have pages. Their numbers begin at 0, as those
    /// of the VMM do.
    pub const CONFIG_CPUS: usize = 0;
    /// Config area: u32. Bit n: class n is allowed.
    pub const CONFIG_CLASSES: usize = 4;
    /// Config area: u32, the highest real-time priority that the device grants.
    pub const CONFIG_PRIORITY_MAX: usize = 8;
    /// Config area: i32, the lowest nice value that the device grants. [`NICE_OWN`]: the thread's
    /// own nice value.
    pub const CONFIG_NICE_MIN: usize = 12;
    /// See [`CONFIG_NICE_MIN`].
    pub const NICE_OWN: i32 = i32::MIN;
    /// Config area: u32, the most requests that the device reads in a second, for each virtual CPU.
    pub const CONFIG_CHANGES: usize = 16;
    /// Config area: u32, milliseconds. A real-time class ends this time after the last request that
    /// the device has read.
    pub const CONFIG_BOOST_MS: usize = 20;
    /// Config area: u32, percent of each second that a thread may run in a real-time class.
    pub const CONFIG_SHARE: usize = 24;
    /// Bytes of the config area.
    pub const CONFIG_BYTES: usize = 28;
    /// The most virtual CPUs of a device.
    pub const CPUS_MAX: u32 = 256;

    /// Region id of the request page of virtual CPU `cpu`: a state page written by the driver, see
    /// [`request`].
    pub const fn request_page(cpu: u32) -> u32 {
        cpu * 2
    }
    /// Region id of the report page of virtual CPU `cpu`: a state page written by the device, see
    /// [`report`].
    pub const fn report_page(cpu: u32) -> u32 {
        cpu * 2 + 1
    }

    /// Class: the thread's own class, which it has without this device.
    pub const CLASS_NONE: u32 = 0;
    /// Class: time-sharing. The priority is a nice value, -20..=19.
    pub const CLASS_NORMAL: u32 = 1;
    /// Class: time-sharing for batch work. The priority is a nice value.
    pub const CLASS_BATCH: u32 = 2;
    /// Class: the thread runs only when no other thread can. The priority is 0.
    pub const CLASS_IDLE: u32 = 3;
    /// Class: real time, first in, first out. The priority is 1..=99. A higher number is more
    /// urgent.
    pub const CLASS_FIFO: u32 = 4;
    /// Class: real time, round robin. The priority is as for [`CLASS_FIFO`].
    pub const CLASS_RR: u32 = 5;

    /// The value of a request page.
    pub mod request {
        /// u32: the class.
        pub const CLASS: usize = 0;
        /// i32: the priority.
        pub const PRIORITY: usize = 4;
        /// Bytes of the value. The bytes after the priority are zero.
        pub const BYTES: u32 = 16;
    }

    /// The value of a report page.
    pub mod report {
        /// u32: the outcome of the request: [`OK`] etc.
        pub const OUTCOME: usize = 0;
        /// u32: the class that this device has given the thread.
        pub const CLASS: usize = 4;
        /// i32: the priority in that class.
        pub const PRIORITY: usize = 8;
        /// u64: the version of the request page that the device read last. (The 4 bytes before it
        /// are 0.)
        pub const VERSION: usize = 16;
        /// u64: number of requests that the device has read.
        pub const UPDATES: usize = 24;
        /// u64: number of times that the device set the thread's class.
        pub const CHANGES: usize = 32;
        /// u64: number of requests that the device granted in part.
        pub const CLAMPED: usize = 40;
        /// u64: number of requests that the policy or the host's kernel refused.
        pub const REFUSED: usize = 48;
        /// u64: number of times that the rate limit delayed a read.
        pub const LIMITED: usize = 56;
        /// u64: number of times that a real-time class ended because no new request came, or
        /// because the thread had used its share of the time.
        pub const EXPIRED: usize = 64;
        /// Bytes of the value.
        pub const BYTES: u32 = 72;

        /// Outcome: granted as requested.
        pub const OK: u32 = 0;
        /// Outcome: the class was granted, with the nearest priority that the policy allows.
        pub const IS_CLAMPED: u32 = 1;
        /// Outcome: refused, because this class (such as the deadline class) or this priority does
        /// not exist.
        pub const BAD_REQUEST: u32 = 2;
        /// Outcome: refused, because the policy does not allow the class.
        pub const NOT_ALLOWED: u32 = 3;
        /// Outcome: granted, but no other request came in time.
        pub const HAS_EXPIRED: u32 = 4;
        /// Outcome: the device does not know the thread of the virtual CPU, or not yet.
        pub const NO_THREAD: u32 = 5;
        /// Outcome: the host's kernel refused it. The log of the bus has the reason.
        pub const FAILED: u32 = 6;
        /// Outcome: granted, but the thread has used its share of this second. It gets the class
        /// again in the next second.
        pub const IS_SPENT: u32 = 7;
    }
}

/// `pic`: interrupt controller (spec/pic.md). The region with id `i` is the [page](super::pic) of
/// the driver's processor number `i`.
pub mod pic {
    /// Config area: u32, the most processors.
    pub const CONFIG_CPUS: usize = 0;
    /// Config area: u32, the most lines of a page.
    pub const CONFIG_LINES: usize = 4;
    /// Bytes of the config area.
    pub const CONFIG_BYTES: usize = 8;
    /// The most processors of any device.
    pub const CPUS_MAX: u16 = 256;
    /// The most routes of a connection.
    pub const ROUTES_MAX: usize = 4096;

    /// Call: route interrupts of another device, so that they raise a line. Buffer, [`ROUTE_BYTES`]
    /// bytes: vector u16, line u16, processor u32, name of the device.
    pub const CALL_ROUTE: u32 = 1;
    /// Call: end a route, so that the device raises its own interrupt again. Buffer as of
    /// [`CALL_ROUTE`]. The device ignores line and processor.
    pub const CALL_UNROUTE: u32 = 2;
    /// Call: change a route to another line, of the same or of another processor. Buffer as of
    /// [`CALL_ROUTE`]. Value: 1 if the new line was raised.
    pub const CALL_MOVE: u32 = 3;
    /// Bytes of the buffer.
    pub const ROUTE_BYTES: usize = 40;
    /// Offset of the name: 32 bytes, padded with zeros.
    pub const NAME_OFFSET: usize = 8;
    /// Error code: the vector has no route, or the connection of its device has ended.
    pub const NO_ROUTE: u32 = super::error_code::CLASS;
}

/// Request and response, a form that any class may use (spec/service.md).
pub mod service {
    /// Config area: u32, the most bytes of a request.
    pub const CONFIG_REQUEST_MAX: usize = 0;
    /// Config area: u32, the most bytes of a response.
    pub const CONFIG_RESPONSE_MAX: usize = 4;
    /// Config area: offset of the class's own bytes.
    pub const CONFIG_OWN: usize = 8;
    /// Id of the one region. It holds the ring, and then the buffers.
    pub const REGION: u32 = 0;
    /// The most bytes of a request or a response.
    pub const BYTES_MAX: u32 = 1 << 20;
    /// A buffer begins at a multiple of this many bytes of the region.
    pub const BUFFER_ALIGN: usize = 8;
    /// Flag of a return: the device refused the request, and the length is the error code.
    pub const REFUSED: u16 = 1 << 1;
}

const _: () = {
    use reg::{ARGUMENT, CLASS_NAME, COMMAND, CONFIG, CONFIG_MAX, FEATURES, NAME, VALUE};
    assert!(
        bar0::DOORBELLS + bar0::DOORBELL_STRIDE * bar0::DOORBELL_COUNT as u64 <= bar0::MSIX_TABLE
    );
    assert!(
        bar0::MSIX_TABLE + 16 * bar0::MSIX_MAX as u64 <= bar0::MSIX_PBA
            && bar0::MSIX_PBA < bar0::SIZE
    );
    assert!(CLASS_NAME + 16 == NAME && NAME + 32 == FEATURES && FEATURES % 8 == 0);
    assert!(
        ARGUMENT + 4 * 8 == COMMAND
            && VALUE % 8 == 0
            && CONFIG + CONFIG_MAX as u64 <= bar0::DOORBELLS
    );
    assert!(venet::status_page::BYTES as usize == venet::status_page::WORDS * 8);
    assert!(venet::counters_page::BYTES as usize == venet::counters_page::WORDS * 8);
    assert!(venet::F_TX & venet::F_RX == 0 && (venet::F_TX | venet::F_RX) & venet::F_HASH == 0);
};
