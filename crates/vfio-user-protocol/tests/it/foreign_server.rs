// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client against other servers. Some send messages but never the answer. One has a later version
//! of the protocol.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use vfio_user_protocol::message::{Kind, Version, command, message};
use vfio_user_protocol::{Allowance, Client, ClientError, Patience, version};

/// How long a test waits for what must happen.
const BOUND: Duration = Duration::from_secs(60);
/// A call that waits for this long has failed the test.
const NEVER: Duration = Duration::from_secs(24 * 3600);

/// A client that has negotiated, and the server's end of its socket.
fn negotiated() -> (Client, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut request = [0; 4096];
        let len = theirs.read(&mut request).unwrap();
        let (_, reply) = version::answer(&Version::parse(&request[16..len]).unwrap(), 512).unwrap();
        theirs
            .write_all(&message(0, command::VERSION, Kind::Reply { error: None }, &reply))
            .unwrap();
        theirs
    });
    let client = Client::negotiate(ours.into()).unwrap();
    (client, server.join().unwrap())
}

/// The error of a call during which the server repeats `act` until it fails.
fn call(mut act: impl FnMut(&mut UnixStream) -> std::io::Result<()> + Send) -> ClientError {
    let (mut client, mut server) = negotiated();
    std::thread::scope(|scope| {
        scope.spawn(move || while act(&mut server).is_ok() {});
        client.set_patience(Patience::limit(Duration::from_millis(500)));
        let error = client.device_info().unwrap_err();
        // From now on no call waits.
        client.set_patience(Patience::limit(NEVER));
        assert!(matches!(client.device_info(), Err(ClientError::Closed)));
        drop(client);
        error
    })
}

#[test]
fn requests_without_end_are_no_answer() {
    // The client must not answer it, so that its own socket does not fill.
    let request = message(1, command::DMA_READ, Kind::Command { no_reply: true }, &[0; 16]);
    let error = call(|server| server.write_all(&request));
    assert!(matches!(error, ClientError::Timeout("DEVICE_GET_INFO")), "{error}");
}

/// Neither do they keep a patient program from its end, nor hide from it that a call stalls.
#[test]
fn requests_without_end_leave_the_program_its_will() {
    let request = message(1, command::DMA_READ, Kind::Command { no_reply: true }, &[0; 16]);
    let (mut client, mut server) = negotiated();
    let (stop, writer) = rustix::pipe::pipe().unwrap();
    let (tell, told) = channel();
    client.set_patience(Patience::until(stop).on_stall(Duration::from_millis(20), move |stalls| {
        tell.send(stalls).unwrap();
    }));
    std::thread::scope(|scope| {
        // Many requests in one write: the client always has something to read.
        let many = request.repeat(1000);
        scope.spawn(move || while server.write_all(&many).is_ok() {});
        let call = scope.spawn(move || client.device_info());
        assert_eq!(told.recv_timeout(BOUND), Ok(true));
        rustix::io::write(&writer, b"x").unwrap();
        let error = call.join().unwrap().unwrap_err();
        assert!(matches!(error, ClientError::Timeout("DEVICE_GET_INFO")), "{error}");
        assert_eq!(told.recv_timeout(BOUND), Ok(false));
    });
}

/// The first descriptor's close waits. Those that follow must not take all that the process may
/// have.
#[test]
fn descriptors_without_end_end_the_connection() {
    let request = message(1, command::DMA_READ, Kind::Command { no_reply: true }, &[0; 16]);
    let (mut client, mut server) = negotiated();
    client.set_patience(Patience::limit(NEVER));
    let (socket, peer) = vbus_test_driver::lingering();
    crate::support::send_with(&server, &request, &[socket.as_fd()]);
    drop(socket);
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let call = std::thread::spawn(move || client.device_info());
    // As many as the client lets wait, and then some: only the last message is too much.
    for _ in 0..6 {
        crate::support::send_with(&server, &request, &[event.as_fd(); 200]);
    }
    let error = call.join().unwrap().unwrap_err();
    assert!(matches!(error, ClientError::Descriptors), "{error}");
    let mut rest = Vec::new();
    let _ = server.read_to_end(&mut rest);
    drop(peer);
}

#[test]
fn an_answer_in_single_bytes_is_late() {
    let reply = message(1, command::DEVICE_GET_INFO, Kind::Reply { error: None }, &[0; 4096]);
    let mut bytes = reply.into_iter();
    let error = call(|server| {
        std::thread::sleep(Duration::from_millis(100));
        server.write_all(&[bytes.next().unwrap_or(0)])
    });
    assert!(matches!(error, ClientError::Timeout("DEVICE_GET_INFO")), "{error}");
}

/// A virtual CPU waits in each call. A server that answers each one just in time must not slow the
/// guest down for ever.
#[test]
fn a_server_that_always_answers_just_in_time_is_dead_after_a_while() {
    const SLOW: Duration = Duration::from_millis(20);
    let (mut client, mut server) = negotiated();
    let allowance = Allowance { at_once: SLOW * 2, call: Duration::ZERO, share: 0 };
    client.set_patience(Patience::limit(NEVER).allow(allowance));
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let body = bytes![16u32, 3u32, 9u32, 5u32];
            let mut request = [0; 32];
            while server.read_exact(&mut request).is_ok() {
                let id = u16::from_le_bytes([request[0], request[1]]);
                std::thread::sleep(SLOW);
                let kind = Kind::Reply { error: None };
                let _ = server.write_all(&message(id, command::DEVICE_GET_INFO, kind, &body));
            }
        });
        // Each call takes at least as long as the server sleeps, so the third is too much.
        let error = (0..3).find_map(|_| client.device_info().err()).expect("an end");
        assert!(matches!(error, ClientError::Timeout("DEVICE_GET_INFO")), "{error}");
        assert!(matches!(client.device_info(), Err(ClientError::Closed)));
        drop(client);
    });
}

/// What became of a call whose server stands still until it is told to go on.
fn stand_still(
    patience: Patience,
    then: impl FnOnce(&mut UnixStream),
) -> (Result<u32, ClientError>, Vec<bool>) {
    let (mut client, mut server) = negotiated();
    let (tell, told) = channel();
    client.set_patience(patience.on_stall(Duration::from_millis(20), move |stalls| {
        tell.send(stalls).unwrap();
    }));
    std::thread::scope(|scope| {
        let call = scope.spawn(move || client.device_info().map(|info| info.regions));
        let mut heard = vec![told.recv_timeout(BOUND).unwrap()];
        then(&mut server);
        heard.push(told.recv_timeout(BOUND).unwrap());
        (call.join().unwrap(), heard)
    })
}

#[test]
fn a_patient_client_waits_for_a_server_that_stands_still() {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let body = bytes![16u32, 3u32, 9u32, 5u32];
    let reply = message(1, command::DEVICE_GET_INFO, Kind::Reply { error: None }, &body);
    let (result, heard) = stand_still(Patience::until(reader.try_clone().unwrap()), |server| {
        server.write_all(&reply).unwrap();
    });
    assert_eq!((result.unwrap(), heard), (9, vec![true, false]));
    // The program wants to end.
    let (result, heard) = stand_still(Patience::until(reader.try_clone().unwrap()), |_| {
        rustix::io::write(&writer, b"x").unwrap();
    });
    assert!(matches!(result, Err(ClientError::Timeout("DEVICE_GET_INFO"))), "{result:?}");
    assert_eq!(heard, [true, false]);
    // With a limit the client gives up by itself, and the server learns it.
    let (result, _) = stand_still(Patience::limit(Duration::from_millis(40)), |server| {
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).unwrap();
        assert_eq!(rest.len(), 32, "one request");
    });
    assert!(matches!(result, Err(ClientError::Timeout(_))), "{result:?}");
    // A connection that ends is no matter of patience.
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    let (result, _) = stand_still(Patience::until(reader), |server| {
        server.shutdown(std::net::Shutdown::Both).unwrap();
    });
    assert!(matches!(result, Err(ClientError::Closed)), "{result:?}");
}

/// `argsz` and the count give the length of the entries of `DEVICE_GET_REGION_IO_FDS`.
#[test]
fn entries_of_a_later_version_are_longer() {
    let (mut client, mut server) = negotiated();
    let entry = |offset: u64| {
        let (size, fd_index, kind, flags, padding, datamatch, more) =
            (4u64, 0u32, 0u32, 1u32, 0u32, 7u64, [u64::MAX; 3]);
        bytes![offset, size, fd_index, kind, flags, padding, datamatch, more[0], more[1], more[2]]
    };
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let argsz = 16 + 2 * 64u32;
            let mut request = [0; 32];
            server.read_exact(&mut request).unwrap();
            let kind = Kind::Reply { error: None };
            let room = bytes![argsz, 0u32, 0u32, 2u32];
            let number = command::DEVICE_GET_REGION_IO_FDS;
            server.write_all(&message(1, number, kind, &room)).unwrap();
            server.read_exact(&mut request).unwrap();
            let reply = message(2, number, kind, &[room, entry(0x100), entry(0x200)].concat());
            let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            crate::support::send_with(&server, &reply, &[fd.as_fd()]);
        });
        let found = client.io_eventfds(0).unwrap();
        let found: Vec<_> = found.iter().map(|e| (e.offset, e.size, e.datamatch)).collect();
        assert_eq!(found, [(0x100, 4, Some(7)), (0x200, 4, Some(7))]);
    });
}

/// libvfio-user's replies to a read have as many bytes as were asked for, and say in `size` how
/// many of them are data. The stream ends with the first reply that has fewer data.
#[test]
fn a_server_may_fill_up_its_last_reply_to_a_read() {
    let (mut client, mut server) = negotiated();
    let asked = client.negotiated().peer_transfer.min(1 << 20);
    let serve = std::thread::spawn(move || {
        for (id, size) in [(1, asked), (2, 3)] {
            let mut request = [0; 24];
            server.read_exact(&mut request).unwrap();
            let wanted = u32::try_from(asked).unwrap();
            assert_eq!(request[2..4], command::MIG_DATA_READ.to_le_bytes());
            assert_eq!(request[16..], bytes![wanted + 8, wanted]);
            let size = u32::try_from(size).unwrap();
            let data = vec![id; asked];
            let body = [bytes![8 + size, size], data].concat();
            let number = u16::from_le_bytes([request[0], request[1]]);
            let kind = Kind::Reply { error: None };
            server.write_all(&message(number, command::MIG_DATA_READ, kind, &body)).unwrap();
        }
        server
    });
    assert_eq!(client.migration_read().unwrap(), (vec![1; asked], true));
    assert_eq!(client.migration_read().unwrap(), (vec![2; 3], false));
    serve.join().unwrap();
}
