// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VLANs of a port: which VLAN a frame belongs to, and how its tag changes on the way.

use vbus_core::memory::DriverSlice;

use crate::frame::{Body, Header, Packet, TAG_BYTES};

/// How far a tag moves what comes after it: [`TAG_BYTES`].
const SHIFT: u16 = 4;
const _: () = assert!(TAG_BYTES == SHIFT as usize);

/// The EtherType of the tags that the switch reads and writes (IEEE 802.1Q).
const TAG: [u8; 2] = [0x81, 0x00];
/// The EtherType of the outer one of two tags (IEEE 802.1ad).
const OUTER_TAG: [u8; 2] = [0x88, 0xa8];
/// The bits of a tag beside the VLAN id: priority and drop eligibility.
const PRIORITY: u16 = 0xf000;

/// Which VLANs a port carries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Vlan {
    /// None. The port exchanges frames with the ports that carry none either. The switch does not
    /// look at tags.
    #[default]
    Unaware,
    /// An access port of the VLAN with this id. Frames have no tag.
    Access(u16),
    /// A trunk port. Frames have a tag with one of `ids` (in order), or no tag if they belong to
    /// the native VLAN.
    Trunk {
        /// The ids of tagged frames.
        ids: Vec<u16>,
        /// The VLAN of frames without a tag; `None`: such frames are dropped.
        native: Option<u16>,
    },
}

/// The VLAN of a frame within the switch, and the priority bits of its tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Class {
    /// The VLAN id; 0: that of the ports that carry no VLANs.
    pub id: u16,
    /// The priority bits, in their place.
    priority: u16,
    /// Whether the frame has a tag that the switch must take out.
    is_tagged: bool,
}

impl Vlan {
    /// Whether the port carries frames of VLAN `id`.
    pub fn carries(&self, id: u16) -> bool {
        match self {
            Vlan::Unaware => id == 0,
            Vlan::Access(own) => *own == id,
            Vlan::Trunk { ids, native } => *native == Some(id) || ids.binary_search(&id).is_ok(),
        }
    }

    /// The class of a frame that came from the port; `None`: the port may not send it.
    pub fn classify(&self, packet: &Packet<'_>) -> Option<Class> {
        if *self == Vlan::Unaware {
            return Some(Class::default());
        }
        let mut head = [0; 16];
        let is_tagged = packet.head(&mut head) == head.len() && head[12..14] == TAG;
        let tag = if is_tagged { u16::from_be_bytes([head[14], head[15]]) } else { 0 };
        // A tag with id 0 gives a priority, and leaves the VLAN to the port.
        let id = match (self, tag & !PRIORITY) {
            (Vlan::Access(own), 0) => *own,
            (Vlan::Trunk { native, .. }, 0) => (*native)?,
            (Vlan::Trunk { ids, .. }, id) if ids.binary_search(&id).is_ok() => id,
            _ => return None,
        };
        Some(Class { id, priority: tag & PRIORITY, is_tagged })
    }

    /// The tag that a frame of this class gets on its way out of the port.
    fn tag(&self, class: Class) -> Option<u16> {
        match self {
            Vlan::Trunk { native, .. } if *native != Some(class.id) => {
                Some(class.id | class.priority)
            }
            _ => None,
        }
    }

    /// The frame as it leaves the port. `packet` is without the tag that it came with. `None`: the
    /// frame's header does not allow the change, or the frame has one more tag, which its next
    /// reader would take for its VLAN.
    pub fn leave<'a>(&self, packet: &Packet<'a>, class: Class) -> Option<Packet<'a>> {
        let Some(tag) = self.tag(class) else {
            let is_tagged = [TAG, OUTER_TAG].iter().any(|tag| packet.eth[12..] == *tag);
            return (*self == Vlan::Unaware || !is_tagged).then_some(*packet);
        };
        let mut out = *packet;
        let [high, low] = tag.to_be_bytes();
        out.tag = Some([high, low, packet.eth[12], packet.eth[13]]);
        out.eth[12..].copy_from_slice(&TAG);
        out.header = moved(&packet.header, |at| at.checked_add(SHIFT))?;
        Some(out)
    }
}

impl Class {
    /// The frame without the tag that it came with. `parts` is memory for its body. `None`: the
    /// frame is too short, or its header points into the tag.
    pub fn enter<'b, 'a: 'b>(
        &self,
        packet: &Packet<'a>,
        parts: &'b mut Vec<DriverSlice<'a>>,
    ) -> Option<Packet<'b>> {
        if !self.is_tagged {
            return Some(*packet);
        }
        let mut head = [0; 18];
        if packet.head(&mut head) < head.len() {
            return None;
        }
        let mut out: Packet<'b> = *packet;
        out.eth[12..].copy_from_slice(&head[16..]);
        out.body = match packet.body {
            Body::Bytes(bytes) => Body::Bytes(bytes.get(TAG_BYTES..)?),
            Body::Driver(all) => {
                let mut skip = TAG_BYTES;
                for part in all {
                    let (front, rest) = part.split_at(skip);
                    skip -= front.len();
                    if !rest.is_empty() {
                        parts.push(rest);
                    }
                }
                Body::Driver(parts)
            }
        };
        out.header =
            moved(&packet.header, |at| (usize::from(at) >= head.len()).then(|| at - SHIFT))?;
        Some(out)
    }
}

/// The header of a frame whose bytes behind the addresses have moved by `shift`.
fn moved(header: &Header, shift: impl Fn(u16) -> Option<u16>) -> Option<Header> {
    if !header.leaves_checksum() {
        return Some(*header);
    }
    let hdr_len = if header.hdr_len == 0 { 0 } else { shift(header.hdr_len)? };
    Some(Header { csum_start: shift(header.csum_start)?, hdr_len, ..*header })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trunk(ids: &[u16], native: Option<u16>) -> Vlan {
        Vlan::Trunk { ids: ids.to_vec(), native }
    }

    fn frame(tag: Option<u16>) -> Vec<u8> {
        let mut frame = vec![2; 12];
        if let Some(tag) = tag {
            frame.extend(TAG);
            frame.extend(tag.to_be_bytes());
        }
        frame.extend([0x88, 0xb5]);
        frame.extend(0..50);
        frame
    }

    /// The frame that leaves `to` when this frame enters `from`.
    fn pass(from: &Vlan, to: &Vlan, tag: Option<u16>) -> Option<Vec<u8>> {
        let frame = frame(tag);
        let mut packet = Packet::plain(&frame).unwrap();
        packet.header = Header { flags: 1, csum_start: 30, csum_offset: 6, ..packet.header };
        let class = from.classify(&packet)?;
        if !to.carries(class.id) {
            return None;
        }
        let mut parts = Vec::new();
        let inner = class.enter(&packet, &mut parts).unwrap();
        let out = to.leave(&inner, class).unwrap();
        // The checksum covers the same bytes as before.
        assert_eq!(out.bytes() - usize::from(out.header.csum_start), frame.len() - 30);
        let mut bytes = Vec::new();
        out.append_to(&mut bytes, usize::MAX);
        Some(bytes)
    }

    #[test]
    fn tags_follow_the_ports() {
        let (access, wide) = (Vlan::Access(10), trunk(&[10, 20], None));
        let native = trunk(&[20], Some(10));
        assert_eq!(pass(&access, &access, None), Some(frame(None)));
        assert_eq!(pass(&access, &Vlan::Access(20), None), None, "another VLAN");
        assert_eq!(pass(&access, &access, Some(10)), None, "an access port sends no tags");
        assert_eq!(pass(&access, &access, Some(0x6000)), Some(frame(None)), "a priority only");
        assert_eq!(pass(&access, &wide, None), Some(frame(Some(10))));
        assert_eq!(pass(&access, &wide, Some(0x6000)), Some(frame(Some(0x600a))));
        assert_eq!(pass(&wide, &access, Some(0x200a)), Some(frame(None)));
        assert_eq!(pass(&wide, &access, None), None, "a trunk without a native VLAN");
        assert_eq!(pass(&wide, &wide, Some(0x6014)), Some(frame(Some(0x6014))));
        assert_eq!(pass(&wide, &wide, Some(30)), None, "the trunk does not carry it");
        assert_eq!(pass(&native, &access, None), Some(frame(None)));
        assert_eq!(pass(&native, &access, Some(10)), None, "the native VLAN has no tag");
        assert_eq!(pass(&wide, &native, Some(10)), Some(frame(None)));
        assert_eq!(pass(&native, &wide, None), Some(frame(Some(10))));
        // Ports without VLANs exchange any frames with each other, and none with the others.
        for tag in [None, Some(0), Some(10)] {
            assert_eq!(pass(&Vlan::Unaware, &Vlan::Unaware, tag), Some(frame(tag)));
            assert_eq!(pass(&Vlan::Unaware, &native, tag), None);
        }
        assert_eq!(pass(&access, &Vlan::Unaware, None), None);
    }

    #[test]
    fn an_inner_tag_never_becomes_the_outer_one() {
        let (access, wide) = (Vlan::Access(10), trunk(&[10, 20], None));
        let native = trunk(&[20], Some(10));
        for kind in [TAG, OUTER_TAG] {
            let mut frame = frame(Some(0));
            frame.splice(16..16, [kind[0], kind[1], 0, 20]);
            let packet = Packet::plain(&frame).unwrap();
            let class = access.classify(&packet).unwrap();
            let mut parts = Vec::new();
            let inner = class.enter(&packet, &mut parts).unwrap();
            assert!(access.leave(&inner, class).is_none());
            assert!(native.leave(&inner, class).is_none());
            let out = wide.leave(&inner, class).unwrap();
            let mut bytes = Vec::new();
            out.append_to(&mut bytes, usize::MAX);
            assert_eq!(bytes[12..20], [0x81, 0, 0, 10, kind[0], kind[1], 0, 20]);
        }
    }

    #[test]
    fn a_frame_that_ends_within_its_tag_is_no_frame() {
        let frame = frame(Some(10));
        for len in 14..18 {
            let packet = Packet::plain(&frame[..len]).unwrap();
            let class = trunk(&[10], Some(1)).classify(&packet).unwrap();
            let entered = class.enter(&packet, &mut Vec::new()).is_some();
            assert_eq!(entered, len < 16, "{len}: without a whole id there is no tag");
        }
        // A checksum that begins within the tag.
        let mut packet = Packet::plain(&frame).unwrap();
        packet.header = Header { flags: 1, csum_start: 14, csum_offset: 6, ..packet.header };
        let class = Vlan::classify(&trunk(&[10], None), &packet).unwrap();
        assert!(class.enter(&packet, &mut Vec::new()).is_none());
    }
}
