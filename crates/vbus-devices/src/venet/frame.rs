//! A frame on its way through the device: the header before it, its Ethernet header, the rest.

use vbus_core::memory::DriverSlice;
use vbus_core::shm::abi::venet::{CHAIN_MAX, F_CSUM, F_TSO, F_USO, FRAME_MAX, HEADER_BYTES};

/// Bytes of an Ethernet header without tags.
pub const ETH_BYTES: usize = 14;
/// Bytes that a frame may have beyond its MTU: the Ethernet header and one VLAN tag.
pub const ETH_OVERHEAD: usize = ETH_BYTES + 4;

/// The most pieces of a frame in this process's memory: its buffers, and one more wherever the
/// driver's maps meet within one.
pub const PIECES_MAX: usize = FRAME_MAX.div_ceil(4096) + 2 * CHAIN_MAX;

/// A MAC address.
pub type Mac = [u8; 6];

/// Bits and values of the virtio-net header (virtio 1.3, 5.1.6).
pub mod flag {
    /// The checksum from `csum_start` on is left to the receiver.
    pub const NEEDS_CSUM: u8 = 1;
    /// No segmentation.
    pub const GSO_NONE: u8 = 0;
    /// TCP over IPv4.
    pub const GSO_TCPV4: u8 = 1;
    /// TCP over IPv6.
    pub const GSO_TCPV6: u8 = 4;
    /// UDP, into datagrams.
    pub const GSO_UDP: u8 = 5;
    /// With the above: the congestion bit of TCP is set.
    pub const GSO_ECN: u8 = 0x80;
}

/// The most segments that one TCP frame may stand for: 64 KiB in segments of 48 bytes, the least
/// that Linux sends.
const TCP_SEGMENTS_MAX: usize = 65536 / 48;
/// The most datagrams that one UDP frame may stand for: the limit of Linux.
const UDP_SEGMENTS_MAX: usize = 128;

/// The header before a frame, without its count of buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// [`flag::NEEDS_CSUM`], and what the back end may know beside it.
    pub flags: u8,
    /// One of the `GSO_` values.
    pub gso_type: u8,
    /// Bytes of all headers; a hint.
    pub hdr_len: u16,
    /// Payload bytes of one segment.
    pub gso_size: u16,
    /// Where the checksum begins.
    pub csum_start: u16,
    /// Where it is put, from there.
    pub csum_offset: u16,
}

impl Header {
    /// From its bytes.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Header {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Header {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }

    /// To its bytes, for a frame in `buffers` buffers.
    pub fn bytes(&self, buffers: u16) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        for (at, word) in [
            (2, self.hdr_len),
            (4, self.gso_size),
            (6, self.csum_start),
            (8, self.csum_offset),
            (10, buffers),
        ] {
            bytes[at..at + 2].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The kind of segmentation, without the congestion bit.
    pub fn gso(&self) -> u8 {
        self.gso_type & !flag::GSO_ECN
    }

    /// Whether a receiver with `features` can take a frame with this header as it is.
    pub fn fits(&self, features: u64) -> bool {
        let needs = match self.gso() {
            flag::GSO_NONE if self.flags & flag::NEEDS_CSUM == 0 => 0,
            flag::GSO_NONE => F_CSUM,
            flag::GSO_UDP => F_CSUM | F_USO,
            _ => F_CSUM | F_TSO,
        };
        needs & !features == 0
    }

    /// Checks the header that a driver with `features` wrote before a frame of `len` bytes, and
    /// clears what does not count. False if the frame must not go on: every number in the header
    /// that is left after this lies within the frame.
    pub fn check(&mut self, len: usize, features: u64, mtu: usize) -> bool {
        self.flags &= flag::NEEDS_CSUM; // What a driver says of its own frame's checksum is worth nothing.
        if !self.fits(features) {
            return false;
        }
        if self.flags == 0 {
            let plain = self.gso() == flag::GSO_NONE && len <= mtu + ETH_OVERHEAD;
            *self = Header::default();
            return plain;
        }
        let (start, offset) = (usize::from(self.csum_start), usize::from(self.csum_offset));
        if start < ETH_BYTES || start + offset + 2 > len {
            return false;
        }
        let size = usize::from(self.gso_size);
        let segments_max = match self.gso() {
            flag::GSO_NONE => {
                (self.gso_type, self.gso_size, self.hdr_len) = (0, 0, 0);
                return len <= mtu + ETH_OVERHEAD;
            }
            flag::GSO_TCPV4 | flag::GSO_TCPV6 if offset == 16 => TCP_SEGMENTS_MAX,
            flag::GSO_UDP if offset == 6 => UDP_SEGMENTS_MAX,
            _ => return false,
        };
        size != 0
            && usize::from(self.hdr_len) <= len
            && (len - start).div_ceil(size) <= segments_max
            && start + size <= mtu + ETH_OVERHEAD
    }
}

/// What follows the Ethernet header.
#[derive(Clone, Copy)]
pub enum Body<'a> {
    /// In the sending driver's memory, which may change at any time: copied once, never looked at.
    Driver(&'a [DriverSlice<'a>]),
    /// Ours.
    Bytes(&'a [u8]),
}

impl Body<'_> {
    /// Bytes.
    pub fn len(&self) -> usize {
        match self {
            Body::Driver(parts) => parts.iter().map(DriverSlice::len).sum(),
            Body::Bytes(bytes) => bytes.len(),
        }
    }
}

/// A frame on its way.
#[derive(Clone, Copy)]
pub struct Packet<'a> {
    /// The header before it, checked.
    pub header: Header,
    /// Its Ethernet header, a copy.
    pub eth: [u8; ETH_BYTES],
    /// The rest.
    pub body: Body<'a>,
}

impl<'a> Packet<'a> {
    /// A plain frame of our own; `None` if it is shorter than an Ethernet header.
    pub fn plain(frame: &'a [u8]) -> Option<Packet<'a>> {
        let (eth, body) = frame.split_first_chunk::<ETH_BYTES>()?;
        Some(Packet { header: Header::default(), eth: *eth, body: Body::Bytes(body) })
    }

    /// Bytes of the frame.
    pub fn len(&self) -> usize {
        ETH_BYTES + self.body.len()
    }

    /// Where it goes.
    pub fn destination(&self) -> Mac {
        mac_at(&self.eth, 0)
    }

    /// Where it comes from.
    pub fn source(&self) -> Mac {
        mac_at(&self.eth, 6)
    }

    /// Appends the frame's first `max` bytes to `out`.
    pub fn append_to(&self, out: &mut Vec<u8>, max: usize) {
        let mut left = max.min(self.len());
        let eth = left.min(ETH_BYTES);
        out.extend_from_slice(&self.eth[..eth]);
        left -= eth;
        match self.body {
            Body::Bytes(bytes) => out.extend_from_slice(&bytes[..left]),
            Body::Driver(parts) => {
                for part in parts {
                    let n = part.len().min(left);
                    let at = out.len();
                    out.resize(at + n, 0);
                    part.copy_to(&mut out[at..]);
                    left -= n;
                }
            }
        }
    }
}

fn mac_at(eth: &[u8; ETH_BYTES], at: usize) -> Mac {
    let mut mac = Mac::default();
    mac.copy_from_slice(&eth[at..at + 6]);
    mac
}

/// Whether the address is a group's: a multicast or the broadcast.
pub fn is_group(mac: Mac) -> bool {
    mac[0] & 1 != 0
}

/// The broadcast address.
pub const BROADCAST: Mac = [0xff; 6];

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = F_CSUM | F_TSO | F_USO;

    #[test]
    fn a_header_survives_its_bytes() {
        let header = Header {
            flags: 1,
            gso_type: 4,
            hdr_len: 0x1234,
            gso_size: 1448,
            csum_start: 54,
            csum_offset: 16,
        };
        let bytes = header.bytes(3);
        assert_eq!(Header::parse(&bytes), header);
        assert_eq!(bytes[10..], [3, 0]);
    }

    #[test]
    fn headers_that_point_outside_their_frame_are_refused() {
        let good = Header {
            flags: 1,
            gso_type: 1,
            hdr_len: 54,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
        };
        let check = |header: Header, len, features| {
            let mut header = header;
            header.check(len, features, 1500)
        };
        assert!(check(good, 60000, ALL));
        assert!(!check(good, 60000, F_CSUM), "not negotiated");
        assert!(!check(good, 51, ALL), "the checksum lies behind the frame");
        assert!(!check(Header { hdr_len: 60001, ..good }, 60000, ALL));
        assert!(!check(Header { gso_size: 0, ..good }, 60000, ALL));
        assert!(
            !check(Header { gso_size: 1, ..good }, 60000, ALL),
            "a million segments for one frame"
        );
        assert!(!check(Header { gso_size: 1485, ..good }, 60000, ALL), "segments above the MTU");
        assert!(!check(Header { csum_offset: 6, ..good }, 60000, ALL));
        assert!(!check(Header { csum_start: 13, ..good }, 60000, ALL));
        assert!(!check(Header { csum_start: u16::MAX, csum_offset: u16::MAX, ..good }, 60000, ALL));
        assert!(!check(Header { gso_type: 3, ..good }, 60000, ALL), "an unknown kind");
        assert!(!check(Header { flags: 0, ..good }, 60000, ALL), "segmentation without a checksum");
        assert!(check(Header::default(), 1518, 0));
        assert!(!check(Header::default(), 1519, 0));
        assert!(!check(
            Header { flags: 1, csum_start: 34, csum_offset: 6, ..Header::default() },
            100,
            0
        ));
        assert!(check(
            Header { flags: 1, csum_start: 34, csum_offset: 6, ..Header::default() },
            100,
            F_CSUM
        ));
    }
}
