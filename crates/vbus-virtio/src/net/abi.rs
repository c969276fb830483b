// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The numbers of a network card (VIRTIO 1.3, section 5.1).

/// The device's number.
pub const DEVICE: u16 = 1;

/// Feature bits.
pub mod feature {
    /// The driver may leave checksums to the device.
    pub const CSUM: u64 = 1 << 0;
    /// The device may leave checksums to the driver.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The driver can change the offloads that it accepts.
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// The configuration has the MTU.
    pub const MTU: u64 = 1 << 3;
    /// The configuration has the MAC address.
    pub const MAC: u64 = 1 << 5;
    /// The driver accepts TCP segments over IPv4.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The driver accepts TCP segments over IPv6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The driver accepts TCP segments with the CWR flag.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// The driver may send TCP segments over IPv4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The driver may send TCP segments over IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// The driver may send TCP segments with the CWR flag.
    pub const HOST_ECN: u64 = 1 << 13;
    /// A frame to the driver may use several buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// The configuration has the status of the link.
    pub const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// The driver chooses which frames it gets.
    pub const CTRL_RX: u64 = 1 << 18;
    /// The driver chooses which VLANs it gets.
    pub const CTRL_VLAN: u64 = 1 << 19;
    /// The driver chooses frames by more modes.
    pub const CTRL_RX_EXTRA: u64 = 1 << 20;
    /// The device can ask the driver to announce its addresses.
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    /// There may be several queue pairs.
    pub const MQ: u64 = 1 << 22;
    /// The driver can change its MAC address.
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    /// Interrupts can be held back, by queue.
    pub const VQ_NOTF_COAL: u64 = 1 << 52;
    /// Interrupts can be held back.
    pub const NOTF_COAL: u64 = 1 << 53;
    /// The driver accepts UDP segments over IPv4.
    pub const GUEST_USO4: u64 = 1 << 54;
    /// The driver accepts UDP segments over IPv6.
    pub const GUEST_USO6: u64 = 1 << 55;
    /// The driver may send UDP segments.
    pub const HOST_USO: u64 = 1 << 56;
    /// The header before each frame has room for a hash. Before a frame to the driver it is the
    /// frame's.
    pub const HASH_REPORT: u64 = 1 << 57;
    /// The driver chooses receive queues by a hash.
    pub const RSS: u64 = 1 << 60;
    /// The configuration has speed and duplex mode.
    pub const SPEED_DUPLEX: u64 = 1 << 63;
}

/// The device configuration.
pub mod config {
    /// The MAC address.
    pub const MAC: usize = 0;
    /// 16 bits: the status.
    pub const STATUS: usize = 6;
    /// The link is up.
    pub const STATUS_LINK_UP: u16 = 1;
    /// The driver shall announce its addresses.
    pub const STATUS_ANNOUNCE: u16 = 2;
    /// 16 bits: the most queue pairs.
    pub const QUEUE_PAIRS: usize = 8;
    /// 16 bits: the MTU.
    pub const MTU: usize = 10;
    /// 32 bits: the speed in Mb/s.
    pub const SPEED: usize = 12;
    /// The speed if nobody knows it.
    pub const SPEED_UNKNOWN: u32 = 0xffff_ffff;
    /// 8 bits: 1 if the link is full duplex.
    pub const DUPLEX: usize = 16;
    /// The duplex mode if nobody knows it.
    pub const DUPLEX_UNKNOWN: u8 = 0xff;
    /// 8 bits: the longest key of the hash.
    pub const RSS_KEY_MAX: usize = 17;
    /// 16 bits: the most entries of the table of queues.
    pub const RSS_TABLE_MAX: usize = 18;
    /// 32 bits: the kinds of frames that can be hashed.
    pub const HASH_KINDS: usize = 20;
    /// Bytes of the configuration.
    pub const BYTES: usize = 24;
}

/// Commands of the control queue: class and number.
pub mod command {
    /// All unicast and multicast addresses.
    pub const RX_PROMISCUOUS: (u8, u8) = (0, 0);
    /// All multicast addresses.
    pub const RX_ALL_MULTICAST: (u8, u8) = (0, 1);
    /// All unicast addresses.
    pub const RX_ALL_UNICAST: (u8, u8) = (0, 2);
    /// No multicast address.
    pub const RX_NO_MULTICAST: (u8, u8) = (0, 3);
    /// No unicast address.
    pub const RX_NO_UNICAST: (u8, u8) = (0, 4);
    /// Not the broadcast address.
    pub const RX_NO_BROADCAST: (u8, u8) = (0, 5);
    /// The tables of addresses.
    pub const MAC_TABLE_SET: (u8, u8) = (1, 0);
    /// The driver's own address.
    pub const MAC_ADDRESS_SET: (u8, u8) = (1, 1);
    /// One more VLAN.
    pub const VLAN_ADD: (u8, u8) = (2, 0);
    /// One VLAN less.
    pub const VLAN_DELETE: (u8, u8) = (2, 1);
    /// The driver has announced its addresses.
    pub const ANNOUNCE_ACK: (u8, u8) = (3, 0);
    /// How many queue pairs are in use.
    pub const MQ_PAIRS_SET: (u8, u8) = (4, 0);
    /// Key, kinds and table of receive-side scaling.
    pub const MQ_RSS_CONFIG: (u8, u8) = (4, 1);
    /// Key and kinds of the hash that is reported.
    pub const MQ_HASH_CONFIG: (u8, u8) = (4, 2);
    /// The offloads that the driver accepts.
    pub const GUEST_OFFLOADS_SET: (u8, u8) = (5, 0);
    /// How interrupts of transmit queues are held back.
    pub const COALESCE_TX_SET: (u8, u8) = (6, 0);
    /// How interrupts of receive queues are held back.
    pub const COALESCE_RX_SET: (u8, u8) = (6, 1);
    /// How interrupts of one queue are held back.
    pub const COALESCE_QUEUE_SET: (u8, u8) = (6, 2);
    /// Asks for that setting.
    pub const COALESCE_QUEUE_GET: (u8, u8) = (6, 3);

    /// The answer to a command that was carried out.
    pub const OK: u8 = 0;
    /// The answer to any other command.
    pub const ERROR: u8 = 1;
}
