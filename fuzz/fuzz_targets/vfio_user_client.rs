// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A hostile vfio-user server. The client's calls end, each with a result or an error, and leave no
//! descriptor open.
//!
//! The input is a list of the server's messages and the client's calls. A message answers the next
//! call, unless its flags say otherwise.
#![no_main]

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown,
    SocketFlags, SocketType, recv, sendmsg, shutdown, socketpair,
};
use vbus_fuzz::OpenFiles;
use vfio_user_protocol::message::{
    DmaRange, Feature, HEADER_LEN, IrqVerb, Kind, MigrationState, MultiWrite, REGION_ACCESS_LEN,
    RegionAccess, command, feature, message,
};
use vfio_user_protocol::{Client, ClientError};

const VERSION: &[u8] = b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":9,\"write_multiple\":true}}\0";

/// The bytes that a call reads from a region.
const READ: RegionAccess = RegionAccess { offset: 8, region: 0, count: 16 };

fn eventfds(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd")).collect()
}

/// A call of the client, by a number: the commands that it sends, and what it does.
fn call(number: u8) -> (&'static [u16], fn(&mut Client) -> Result<(), ClientError>) {
    const IO_FDS: u16 = command::DEVICE_GET_REGION_IO_FDS;
    const FEATURE: u16 = command::DEVICE_FEATURE;
    match number % 20 {
        0 => (&[command::DEVICE_GET_INFO], |client| client.device_info().map(drop)),
        1 => (&[command::DEVICE_GET_REGION_INFO], |client| client.region_info(7).map(drop)),
        2 => (&[command::DEVICE_GET_IRQ_INFO], |client| client.irq_info(2).map(drop)),
        3 | 4 => (&[IO_FDS, IO_FDS], |client| {
            let found = client.io_eventfds(0)?;
            assert!(found.len() <= 1024);
            Ok(())
        }),
        5 | 6 => (&[command::REGION_READ], |client| {
            client.region_read(READ.region, READ.offset, &mut [0; READ.count as usize])
        }),
        7 => (&[command::REGION_WRITE], |client| client.region_write(0, 0, &[1; 9])),
        8 => (&[command::REGION_WRITE_MULTI], |client| {
            client.region_write_multi(&[MultiWrite { region: 0, offset: 4, data: &[1; 4] }])
        }),
        9 => (&[command::DEVICE_SET_IRQS], |client| client.irq(0, 0, IrqVerb::Trigger)),
        10 => (&[command::DMA_MAP], |client| {
            let file = eventfds(1);
            client.dma_map(file[0].as_fd(), 0, 4096, 4096)
        }),
        11 => (&[command::DEVICE_RESET], Client::reset),
        12 => (&[FEATURE], |client| client.migration_flags().map(drop)),
        13 => (&[FEATURE], |client| client.migration_state().map(drop)),
        14 => (&[FEATURE], |client| client.set_migration_state(MigrationState::StopCopy)),
        15 => (&[command::MIG_DATA_READ], |client| {
            let (read, more) = client.migration_read()?;
            assert!(read.len() <= 1 << 20 && (!more || read.len() == 1 << 20));
            Ok(())
        }),
        16 => (&[command::MIG_DATA_WRITE], |client| client.migration_write(&[7; 9])),
        17 => (&[FEATURE], |client| {
            client.dma_logging_start(4096, &[DmaRange { iova: 0, length: 8192 }]).map(drop)
        }),
        _ => (&[FEATURE], |client| {
            let bitmap = client.dma_logging_report(4096, 65 * 4096, 4096)?;
            assert_eq!(bitmap.len(), 2);
            Ok(())
        }),
    }
}

/// The body of an answer: any bytes, or bytes behind what the command's answer begins with.
fn body(form: u8, number: u16, bytes: &[u8]) -> Vec<u8> {
    match number {
        command::VERSION if form & 8 == 0 => [VERSION, bytes].concat(),
        command::REGION_READ if form & 8 == 0 => {
            let mut data = bytes.to_vec();
            data.resize(READ.count as usize, 0x11);
            let body = READ.body(&data);
            assert_eq!(body.len(), REGION_ACCESS_LEN + data.len());
            body
        }
        // The flags of the call that they answer, by the form.
        command::DEVICE_FEATURE if form & 8 == 0 => {
            let number = match bytes.first().map_or(0, |byte| byte % 4) {
                0 => feature::MIGRATION,
                1 => feature::MIG_DEVICE_STATE,
                2 => feature::DMA_LOGGING_START,
                _ => feature::DMA_LOGGING_REPORT,
            };
            let get = form & 0x40 == 0;
            let asked = Feature { argsz: 64, feature: number, get, set: !get, probe: false };
            asked.body(bytes.get(1..).unwrap_or(&[]))
        }
        _ => bytes.to_vec(),
    }
}

fuzz_target!(|input: &[u8]| {
    let open = OpenFiles::count();
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .expect("sockets");
    // The client's calls, and the commands that they send.
    let Some((&count, mut rest)) = input.split_first() else { return };
    let count = usize::from(count % 8).min(rest.len());
    let (calls, messages) = rest.split_at(count);
    rest = messages;
    let mut commands = vec![command::VERSION];
    commands.extend(calls.iter().flat_map(|number| call(*number).0));
    // All that the server sends is there before the client begins, and nothing comes after it.
    let mut next = 0;
    while let Some((&[form, extra, len], more)) = rest.split_first_chunk::<3>() {
        let (bytes, more) = more.split_at(more.len().min(usize::from(len)));
        rest = more;
        let number = commands.get(next).copied().unwrap_or(u16::from(extra));
        let id = next as u16;
        let (id, number, kind) = match form & 7 {
            0..=3 => (id, number, Kind::Reply { error: None }),
            4 => (id, number, Kind::Reply { error: Some(extra.into()) }),
            5 => (id, number, Kind::Command { no_reply: extra & 1 != 0 }),
            6 => (id, u16::from(extra), Kind::Reply { error: None }),
            _ => (u16::from(extra), number, Kind::Reply { error: None }),
        };
        next += usize::from(matches!(kind, Kind::Reply { .. }));
        let mut bytes = message(id, number, kind, &body(form, number, bytes));
        if form & 0x10 != 0 {
            // Any byte of the header.
            bytes[usize::from(extra) % HEADER_LEN] ^= len | 1;
        }
        let fds = eventfds(if form & 0x20 != 0 { usize::from(extra % 20) } else { 0 });
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(20))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&borrowed)));
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let mut at = 0;
        while at < bytes.len() {
            // A full buffer ends the server's part.
            match sendmsg(&theirs, &[IoSlice::new(&bytes[at..])], &mut control, flags) {
                Ok(sent) => at += sent,
                Err(_) => break,
            }
            control.clear();
        }
    }
    shutdown(&theirs, Shutdown::Write).expect("connected");
    let began = Instant::now();
    if let Ok(mut client) = Client::negotiate(ours) {
        let negotiated = client.negotiated();
        assert!(negotiated.peer_fds <= 1024 && negotiated.peer_transfer > 0);
        for number in calls {
            let (_, act) = call(*number);
            match act(&mut client) {
                Err(error) if error.is_final() => {
                    let after = client.reset();
                    assert!(matches!(after, Err(ClientError::Closed)), "{error}, then {after:?}");
                    break;
                }
                Err(ClientError::Refused { errno, .. }) => {
                    assert!(errno.raw_os_error() > 0)
                }
                _ => {}
            }
            while recv(&theirs, &mut [0; 4096], RecvFlags::DONTWAIT).is_ok_and(|(n, _)| n > 0) {}
        }
    }
    assert!(began.elapsed().as_secs() < 60, "the client waits although nothing can come");
    drop(theirs);
    open.check();
});
