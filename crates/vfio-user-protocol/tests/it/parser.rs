// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tests the parsers with arbitrary bytes, and with messages that this crate has made.

use std::os::fd::{AsFd, OwnedFd};

use crate::support::{Device, framed, version};
use proptest::collection::vec;
use proptest::prelude::*;
use vfio_user_protocol::message::*;
use vfio_user_protocol::session::{Answer, Session};
use vfio_user_protocol::socket::{Message, Received, Receiver, Source};
use vfio_user_protocol::{Errno, Target, version as negotiation};

/// Gives bytes in pieces of these sizes, with no bytes after each, as a busy socket does.
struct Pieces<'a> {
    bytes: &'a [u8],
    sizes: std::iter::Cycle<std::slice::Iter<'a, usize>>,
    pause: bool,
}

impl Source for Pieces<'_> {
    fn recv(&mut self, buf: &mut [u8], _fds: &mut Vec<OwnedFd>) -> Result<usize, Errno> {
        self.pause = !self.pause;
        if self.pause {
            return Err(Errno::AGAIN);
        }
        let n = self.bytes.len().min(buf.len()).min(*self.sizes.next().unwrap());
        let (now, later) = self.bytes.split_at(n);
        buf[..n].copy_from_slice(now);
        self.bytes = later;
        Ok(n)
    }
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        any::<bool>().prop_map(|no_reply| Kind::Command { no_reply }),
        any::<Option<u32>>().prop_map(|error| Kind::Reply { error }),
    ]
}

/// Numbers at the limits of checks: near 0, pages, the sign bit and the maximum.
fn number() -> impl Strategy<Value = u64> {
    let edges: Vec<u64> = vec![
        0,
        1,
        2,
        4,
        8,
        16,
        255,
        256,
        3839,
        3840,
        4095,
        4096,
        8192,
        1 << 20,
        1 << 31,
        1 << 32,
        1 << 63,
    ];
    (proptest::sample::select(edges), -2i64..=2, any::<bool>()).prop_map(|(edge, delta, negate)| {
        edge.wrapping_add_signed(delta).wrapping_mul(if negate { u64::MAX } else { 1 })
    })
}

/// A body of such numbers, which may be cut off anywhere.
fn body() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![
        number().prop_map(|n| n.to_ne_bytes().to_vec()),
        number().prop_map(|n| n.to_ne_bytes()[..4].to_vec()),
        (0u32..64).prop_map(|n| n.to_ne_bytes().to_vec()),
    ];
    (vec(word, 0..12), any::<proptest::sample::Index>()).prop_map(|(words, cut)| {
        let mut bytes = words.concat();
        // Most are complete.
        if cut.index(4) == 0 {
            bytes.truncate(cut.index(bytes.len() + 1));
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn headers_come_back(id: u16, command: u16, size in 16u32.., kind in kind()) {
        let header = Header { id, command, size, kind };
        prop_assert_eq!(Header::parse(&header.bytes()), Ok(header));
    }

    #[test]
    fn bodies_come_back(a: u64, b: u64, c: u32, d: u32, flags: [bool; 3], data in vec(any::<u8>(), 0..64)) {
        let map = DmaMap { readable: flags[0], writable: flags[1], offset: a, address: b, size: a ^ b };
        prop_assert_eq!(DmaMap::parse(&map.body()), Ok(map));
        let unmap = DmaUnmap { all: flags[0], dirty_bitmap: flags[1], address: a, size: b };
        prop_assert_eq!(DmaUnmap::parse(&unmap.body()), Ok(unmap));
        let info = Info { argsz: c | 16, flags: d, index: c, count: d };
        prop_assert_eq!(Info::parse(&info.body()), Ok(info));
        let region = RegionInfo { argsz: c | 32, flags: d, index: c, size: a };
        prop_assert_eq!(RegionInfo::parse(&region.body()), Ok(region));
        let count = u32::try_from(data.len()).unwrap();
        let access = RegionAccess { offset: a, region: c, count };
        let body = access.body(&data);
        prop_assert_eq!(RegionAccess::parse_with_data(&body), Ok((access, &data[..])));
        prop_assert_eq!(RegionAccess::parse(&access.body(&[])), Ok(access));
        for data in [IrqData::None, IrqData::Eventfd, IrqData::Bool(&data)] {
            let verb = if flags[2] { IrqVerb::Trigger } else if flags[0] { IrqVerb::Mask } else { IrqVerb::Unmask };
            let set = SetIrqs { index: c, start: d, count, verb, data };
            let body = set.body();
            prop_assert_eq!(SetIrqs::parse(&body), Ok(set));
        }
        let writes: Vec<_> = data.chunks(7).map(|data| MultiWrite { offset: a, region: c, data }).collect();
        let body = MultiWrite::body(&writes);
        prop_assert_eq!(MultiWrite::parse_all(&body), Ok(writes));
        let sub = SubRegion { offset: a, size: b, fd_index: c, kind: d, flags: c ^ d, datamatch: a ^ b };
        let mut body = Info { argsz: 96, flags: 0, index: 0, count: 2 }.body();
        sub.append_to(&mut body);
        sub.append_to(&mut body);
        prop_assert_eq!(SubRegion::parse_all(&body), Ok(vec![sub; 2]));
    }

    /// The receiver finds the same messages, into whatever pieces the stream is cut.
    #[test]
    fn messages_survive_any_cut(
        bodies in vec(vec(any::<u8>(), 0..200), 1..8),
        sizes in vec(1usize..40, 1..8),
    ) {
        let stream: Vec<u8> = (0..).zip(&bodies).flat_map(|(id, body)| framed(id, 10, 0, body)).collect();
        let mut source = Pieces { bytes: &stream, sizes: sizes.iter().cycle(), pause: true };
        let mut receiver = Receiver::default();
        let mut got = Vec::new();
        loop {
            match receiver.next(&mut source, 216, 0).unwrap() {
                Received::Message(message) => {
                    prop_assert_eq!(usize::from(message.header.id), got.len());
                    got.push(message.body);
                }
                Received::Nothing => {}
                Received::End => break,
            }
        }
        prop_assert_eq!(got, bodies);
    }

    /// With arbitrary bytes, the receiver either goes on or returns an error.
    #[test]
    fn any_stream_ends(stream in vec(any::<u8>(), 0..400), sizes in vec(1usize..40, 1..4)) {
        let mut source = Pieces { bytes: &stream, sizes: sizes.iter().cycle(), pause: true };
        let mut receiver = Receiver::default();
        for _ in 0..=stream.len() * 2 + 2 {
            match receiver.next(&mut source, 256, 0) {
                Ok(Received::End) | Err(_) => return Ok(()),
                Ok(_) => {}
            }
        }
        prop_assert!(false, "the end does not come");
    }

    /// With arbitrary commands, each gets a reply of a valid form unless it was posted. The server
    /// asks the device only for what the device has; otherwise the device panics.
    #[test]
    fn any_commands_are_answered(commands in vec((0u16..20, any::<bool>(), body()), 0..40)) {
        let mut device = Device::new();
        let mut session = Session::default();
        let message = |id: u16, command: u16, flags: u32, body: &[u8]| {
            let bytes = framed(id, command, flags, body);
            let header = Header::parse(bytes.first_chunk().unwrap()).unwrap();
            Message { header, body: body.to_vec(), fds: Default::default(), lost_fds: false }
        };
        let first = session.handle(&mut device, "test", message(0, 1, 0, &version()));
        prop_assert!(matches!(first, Answer::Negotiated(_)));
        // Whoever it is: the device does not ask.
        device.connected(std::io::stdin().as_fd());
        for (number, posted, body) in commands {
            let flags = if posted { 0x10 } else { 0 };
            let answer = session.handle(&mut device, "test", message(7, number, flags, &body));
            match answer {
                Answer::Silence => prop_assert!(posted),
                Answer::Reply(bytes, fds) => {
                    prop_assert!(!posted);
                    let header = Header::parse(bytes.first_chunk().unwrap()).unwrap();
                    prop_assert_eq!((header.id, header.command, header.size as usize), (7, number, bytes.len()));
                    let Kind::Reply { error } = header.kind else { panic!("not a reply") };
                    prop_assert!(error.is_none() || (bytes.len() == 16 && fds.is_empty()));
                }
                Answer::End(reply, _) => {
                    prop_assert_eq!(number, command::VERSION);
                    prop_assert_eq!(reply.is_some(), !posted);
                    break;
                }
                other => prop_assert!(false, "{other:?}"),
            }
        }
        let mapped: Vec<_> = device.maps.iter().map(|(at, (size, _))| (*at, *size)).collect();
        prop_assert!(mapped.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "overlap: \
            {mapped:x?}");
    }

    /// With arbitrary version data, the ends agree on no more than the client asked for, or the
    /// server gives a reason.
    #[test]
    fn any_version_is_answered(
        major in 0u16..2,
        minor: u16,
        json in prop_oneof![
            "\\PC{0,40}",
            "\\{\"capabilities\":\\{(\"(max_msg_fds|pgsizes|max_dma_maps|max_data_xfer_size|write_multiple|x)\":(-?[0-9]{1,20}|true|null|\\[\\]),?){0,3}\\}\\}",
        ],
        nul: bool,
    ) {
        let mut data = json.into_bytes();
        if nul {
            data.push(0);
        }
        let request = Version { major, minor, data: &data };
        if let Ok((negotiated, body)) = negotiation::answer(&request, 512) {
            prop_assert!(negotiated.minor <= minor && negotiated.peer_fds <= 253 && negotiated.peer_transfer <= 1 << 20);
            let reply = Version::parse(&body).unwrap();
            prop_assert!(reply.minor <= minor && reply.major == 0);
            // QEMU's buffer for the reply has the size of its request. (The reply may have up to 7
            // digits for each of three values, where the request had fewer.)
            prop_assert!(body.len() <= 4 + data.len() + 3 * 7);
            prop_assert!(negotiation::accept(&reply).is_ok());
        }
    }
}
