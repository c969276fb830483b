//! A client of a server that does not answer, whatever else it sends, gets its errors in time.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vbus_vfio_user::protocol::{Kind, Version, command, message};
use vbus_vfio_user::{Client, ClientError, version};

/// A call's own bound, and room for a machine that has much else to do.
const BOUND: Duration = Duration::from_secs(15);

/// A client that is agreed with, and the server's end of its socket.
fn agreed() -> (Client, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut request = [0; 4096];
        let len = theirs.read(&mut request).unwrap();
        let (_, reply) = version::answer(&Version::parse(&request[16..len]).unwrap()).unwrap();
        theirs
            .write_all(&message(0, command::VERSION, Kind::Reply { error: None }, &reply))
            .unwrap();
        theirs
    });
    let client = Client::negotiate(ours.into()).unwrap();
    (client, server.join().unwrap())
}

/// What a call, during which the server does `act` until it fails, ends with.
fn call(mut act: impl FnMut(&mut UnixStream) -> std::io::Result<()> + Send) -> ClientError {
    let (mut client, mut server) = agreed();
    std::thread::scope(|scope| {
        scope.spawn(move || while act(&mut server).is_ok() {});
        let begun = Instant::now();
        let error = client.device_info().unwrap_err();
        assert!(begun.elapsed() < BOUND, "{:?}", begun.elapsed());
        // From now on nothing is waited for.
        let begun = Instant::now();
        assert!(matches!(client.device_info(), Err(ClientError::Closed)));
        assert!(begun.elapsed() < Duration::from_secs(1));
        drop(client);
        error
    })
}

#[test]
fn requests_without_end_are_no_answer() {
    // Not to be answered, so that the client's own socket does not fill.
    let request = message(1, command::DMA_READ, Kind::Command { no_reply: true }, &[0; 16]);
    let error = call(|server| server.write_all(&request));
    assert!(matches!(error, ClientError::Late("DEVICE_GET_INFO")), "{error}");
}

#[test]
fn an_answer_in_single_bytes_is_late() {
    let reply = message(1, command::DEVICE_GET_INFO, Kind::Reply { error: None }, &[0; 4096]);
    let mut bytes = reply.into_iter();
    let error = call(|server| {
        std::thread::sleep(Duration::from_millis(100));
        server.write_all(&[bytes.next().unwrap_or(0)])
    });
    assert!(matches!(error, ClientError::Late("DEVICE_GET_INFO")), "{error}");
}

#[test]
fn a_request_that_begins_and_does_not_end_is_late() {
    let (mut client, mut server) = agreed();
    server
        .write_all(&message(1, command::DMA_READ, Kind::Command { no_reply: true }, &[0; 16])[..20])
        .unwrap();
    let begun = Instant::now();
    let error = client.serve_requests(Duration::from_millis(10)).unwrap_err();
    assert!(matches!(error, ClientError::Late(_)), "{error}");
    assert!(begun.elapsed() < BOUND);
}
