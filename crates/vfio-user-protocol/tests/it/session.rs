// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sessions of correct clients.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use crate::support::{
    Bench, Device, NO_REPLY, Raw, Seen, TIMEOUT, alone, framed, open_fds, version,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vfio_user_protocol::message::{IrqVerb, MultiWrite};
use vfio_user_protocol::{Client, ClientError, Errno, Patience, Server, Timeouts};

fn memory(bytes: u64) -> std::os::fd::OwnedFd {
    let memory = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, bytes).unwrap();
    memory
}

fn refused(result: Result<impl std::fmt::Debug, ClientError>) -> Errno {
    match result {
        Err(ClientError::Refused { errno, .. }) => errno,
        other => panic!("not refused: {other:?}"),
    }
}

fn count(fd: impl AsFd) -> Option<u64> {
    let mut count = [0; 8];
    rustix::io::read(fd, &mut count).ok().map(|_| u64::from_ne_bytes(count))
}

#[test]
fn the_device_is_described_and_accessed() {
    let mut bench = Bench::new();
    bench.with(|path| {
        let mut client = Client::connect(path).unwrap();
        assert!(client.negotiated().write_multiple);
        let info = client.device_info().unwrap();
        assert_eq!((info.regions, info.irqs, info.resettable), (9, 5, true));
        assert_eq!(client.region_info(7).unwrap().size, 256);
        let rom = client.region_info(6).unwrap();
        assert_eq!((rom.size, rom.readable, rom.writable), (512, true, false));
        assert_eq!(client.region_info(4).unwrap().size, 0);
        assert_eq!(refused(client.region_info(9)), Errno::INVAL);
        let intx = client.irq_info(0).unwrap();
        assert_eq!(
            (intx.count, intx.maskable, intx.automasked, intx.fixed_size),
            (1, true, true, false)
        );
        assert_eq!(client.irq_info(2).unwrap().count, 32);

        let mut config = [0; 256];
        client.region_read(7, 0, &mut config).unwrap();
        assert_eq!(config, [0x5a; 256]);
        client.region_write(0, 100, b"written").unwrap();
        // The server does posted writes in order, before later commands. A failed one has no
        // answer.
        for i in 0..10_000u32 {
            client.region_post(0, 200, &i.to_ne_bytes()).unwrap();
        }
        client.region_post(6, 0, &[1]).unwrap();
        let mut word = [0; 4];
        client.region_read(0, 200, &mut word).unwrap();
        assert_eq!(u32::from_ne_bytes(word), 9999);
        let writes = [
            MultiWrite { offset: 300, region: 0, data: &[1, 2, 3, 4, 5, 6, 7, 8] },
            MultiWrite { offset: 0, region: 6, data: &[9] },
            MultiWrite { offset: 302, region: 0, data: &[0xff] },
        ];
        assert_eq!(refused(client.region_write_multi(&writes)), Errno::PERM);
        client.region_write_multi(&writes[..1]).unwrap();
        let mut bytes = [0; 8];
        client.region_read(0, 300, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8]);
        client.reset().unwrap();
        client.region_read(0, 100, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 8]);
        assert_eq!(
            client.call(16, &bytes![8u32, 0x4_0001u32], &[]).map(drop).map_err(|e| e.is_final()),
            Err(false)
        );
    });
    // The ninth region, the posted write to the ROM, the multiple write and the feature.
    assert_eq!(bench.server.stats().failures, 4);
    assert_eq!(bench.server.target().resets, 1);
}

#[test]
fn one_write_of_several_may_fail_and_the_others_are_done() {
    let mut bench = Bench::new();
    bench.with(|path| {
        let mut client = Client::connect(path).unwrap();
        let bad = MultiWrite { offset: 5000, region: 0, data: &[1] };
        let good = MultiWrite { offset: 8, region: 0, data: &[7, 8] };
        assert_eq!(refused(client.region_write_multi(&[bad, good])), Errno::INVAL);
        let mut bytes = [0; 2];
        client.region_read(0, 8, &mut bytes).unwrap();
        assert_eq!(bytes, [7, 8]);
    });
}

#[test]
fn interrupts_are_connected_triggered_and_masked() {
    let mut bench = Bench::new();
    let eventfds: Vec<_> = (0..32)
        .map(|_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
        .collect();
    let borrowed: Vec<_> = eventfds.iter().map(AsFd::as_fd).collect();
    bench.with(|path| {
        let mut client = Client::connect(path).unwrap();
        // These are more than fit into one message.
        client.connect_irqs(2, 0, &borrowed).unwrap();
        client.irq(2, 31, IrqVerb::Trigger).unwrap();
        assert_eq!(count(&eventfds[31]), Some(1));
        // By flags: the second and the fourth of four interrupts.
        let flags = bytes![24u32, 0x22u32, 2u32, 4u32, 4u32];
        client.call(8, &[flags, vec![0, 1, 0, 255]].concat(), &[]).unwrap();
        let signalled: Vec<bool> = eventfds.iter().map(|fd| count(fd).is_some()).collect();
        assert_eq!(
            signalled.iter().enumerate().filter(|(_, s)| **s).map(|(i, _)| i).collect::<Vec<_>>(),
            [5, 7]
        );
        client.irq(0, 0, IrqVerb::Mask).unwrap();
        client.irq(0, 0, IrqVerb::Unmask).unwrap();
        // Without descriptors, this disconnects one vector.
        client.call(8, &bytes![20u32, 0x24u32, 2u32, 31u32, 1u32], &[]).unwrap();
        client.irq(2, 31, IrqVerb::Trigger).unwrap();
        assert_eq!(count(&eventfds[31]), None);
        client.connect_irqs(1, 2, &borrowed[..1]).unwrap();
        client.disable_irqs(2).unwrap();
        client.irq(2, 0, IrqVerb::Trigger).unwrap();
        client.irq(1, 2, IrqVerb::Trigger).unwrap();
        assert_eq!(count(&eventfds[0]), Some(1));
    });
    let actions = &bench.server.target().actions;
    assert_eq!(actions[1], ('t', 2, vec![5, 7]));
    assert_eq!(actions[2..4], [('m', 0, vec![0]), ('u', 0, vec![0])]);
}

#[test]
fn doorbells_are_eventfds_of_the_device() {
    let mut bench = Bench::new();
    bench.with(|path| {
        let mut client = Client::connect(path).unwrap();
        let doorbells = client.io_eventfds(0).unwrap();
        let described: Vec<_> = doorbells.iter().map(|d| (d.offset, d.size, d.datamatch)).collect();
        assert_eq!(described, [(2048, 4, None), (2052, 4, Some(1)), (2056, 4, Some(2))]);
        for (doorbell, times) in doorbells.iter().zip(1..) {
            for _ in 0..times {
                rustix::io::write(&doorbell.fd, &1u64.to_ne_bytes()).unwrap();
            }
        }
        assert!(client.io_eventfds(1).unwrap().is_empty());
    });
    let rung: Vec<_> = bench.server.target().doorbells.iter().map(count).collect();
    assert_eq!(rung, [Some(1), Some(2), Some(3)]);
}

#[test]
fn a_client_gets_no_more_descriptors_than_it_can_receive() {
    let mut bench = Bench::new();
    let mut raw = Raw::connect(&bench);
    let mut two = bytes![0u16, 0u16];
    two.extend_from_slice(b"{\"capabilities\":{\"max_msg_fds\":2}}\0");
    raw.send(&framed(1, 1, 0, &two));
    raw.see(&mut bench);
    raw.send(&framed(2, 6, 0, &bytes![4096u32, 0u32, 0u32, 0u32]));
    match raw.see(&mut bench) {
        Seen::Reply(2, 6, None, body) => {
            assert_eq!(body.len(), 16 + 2 * 40);
            assert_eq!(body[..16], bytes![96u32, 0u32, 0u32, 2u32]);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(bench.server.target().duplicated, 2);
    // A client with too small a buffer learns the size, and nothing is duplicated for it.
    raw.send(&framed(3, 6, 0, &bytes![16u32, 0u32, 0u32, 0u32]));
    let head = bytes![96u32, 0u32, 0u32, 2u32];
    assert_eq!(raw.see(&mut bench), Seen::Reply(3, 6, None, head));
    assert_eq!(bench.server.target().duplicated, 2);
}

#[test]
fn memory_is_mapped_and_taken_back() {
    let mut bench = Bench::new();
    let file = memory(1 << 20);
    let mut raw = Raw::negotiated(&mut bench);
    let map = |address: u64, offset: u64| bytes![32u32, 3u32, offset, address, 0x4000u64];
    raw.send_with(&framed(1, 2, 0, &map(0x1000_0000, 0x8000)), &[file.as_fd()]);
    assert_eq!(raw.see(&mut bench), Seen::Reply(1, 2, None, vec![]));
    raw.send(&framed(2, 2, NO_REPLY, &map(0, 0)));
    raw.send(&framed(3, 2, 0, &map(0x4000, 0)));
    assert_eq!(raw.see(&mut bench), Seen::Reply(3, 2, None, vec![]));
    let maps = &bench.server.target().maps;
    assert_eq!(maps.keys().copied().collect::<Vec<_>>(), [0, 0x4000, 0x1000_0000]);
    assert_eq!(maps[&0x1000_0000], (0x4000, Some(0x8000)));
    assert_eq!(maps[&0].1, None);
    // The reply to an unmap is the request's body.
    let unmap = bytes![24u32, 0u32, 0x1000_0000u64, 0x4000u64];
    raw.send(&framed(4, 3, 0, &unmap));
    assert_eq!(raw.see(&mut bench), Seen::Reply(4, 3, None, unmap));
    let all = bytes![24u32, 2u32, 0u64, 0u64];
    raw.send(&framed(5, 3, 0, &all));
    assert_eq!(raw.see(&mut bench), Seen::Reply(5, 3, None, all));
    assert!(bench.server.target().maps.is_empty());
}

/// A client that names no number of mappings has 65535, whatever the device's number is.
#[test]
fn an_unstated_number_of_mappings_is_65535() {
    let mut bench = Bench::new();
    let mut raw = Raw::connect(&bench);
    raw.send(&framed(1, 1, 0, &[0; 4]));
    assert_eq!(raw.see(&mut bench), Seen::Reply(1, 1, None, vec![0; 4]));
    let map = |i: u64| framed(2, 2, NO_REPLY, &bytes![32u32, 3u32, 0u64, i * 4096, 4096u64]);
    for i in 0..65535 / 257 {
        let some: Vec<u8> = (i * 257..(i + 1) * 257).flat_map(map).collect();
        raw.send(&[some, framed(3, 4, 0, &bytes![16u32, 0u32, 0u32, 0u32])].concat());
        assert!(matches!(raw.see(&mut bench), Seen::Reply(3, 4, None, _)));
    }
    assert_eq!(bench.server.target().maps.len(), 65535);
    let one_more = bytes![32u32, 3u32, 0u64, 65535u64 * 4096, 4096u64];
    raw.send(&framed(4, 2, 0, &one_more));
    let full = Some(Errno::NOSPC.raw_os_error().unsigned_abs());
    assert_eq!(raw.see(&mut bench), Seen::Reply(4, 2, full, vec![]));
}

#[test]
fn a_second_client_is_refused_and_comes_later() {
    let mut bench = Bench::new();
    let first = Raw::negotiated(&mut bench);
    for id in [7, 8] {
        let mut second = Raw::connect(&bench);
        second.send(&framed(id, 1, 0, &version()));
        let busy = Errno::BUSY.raw_os_error().unsigned_abs();
        assert_eq!(second.see(&mut bench), Seen::Reply(id, 1, Some(busy), vec![]));
        assert_eq!(second.see(&mut bench), Seen::Closed);
    }
    assert_eq!(bench.server.stats().refused, 2);
    // One that is silent gets no answer, and does not count.
    let mut silent = Raw::connect(&bench);
    bench.until(None, |server| server.deadline().is_some());
    let deadline = bench.server.deadline().unwrap();
    bench.server.ready(deadline);
    assert_eq!(silent.see(&mut bench), Seen::Closed);
    drop(Raw::connect(&bench));
    bench.until(None, |server| server.deadline().is_none());
    let stats = bench.server.stats();
    assert_eq!((stats.refused, stats.violations), (2, 0));
    assert!(bench.server.is_connected());
    let refused = bench.with(|path| Client::connect(path).map(drop).unwrap_err());
    assert!(matches!(refused, ClientError::Refused { errno: Errno::BUSY, .. }), "{refused}");
    drop(first);
    bench.until_gone();
    bench.with(|path| drop(Client::connect(path).unwrap()));
}

/// A server whose time limit for silent connections does not pass in a test.
fn patient() -> Bench {
    let mut bench = Bench::new();
    let mut timeouts = Timeouts::default();
    timeouts.handshake = TIMEOUT;
    bench.server.set_timeouts(timeouts);
    bench
}

#[test]
fn connections_that_are_silent_or_stop_keep_nobody_out() {
    let mut bench = patient();
    let now = Instant::now();
    let hello = framed(1, 1, 0, &version());
    // Nothing, a part of the header, the header, and all but the last byte.
    let mut silent: Vec<_> = [0, 1, 16, hello.len() - 1]
        .map(|bytes| {
            let mut raw = Raw::connect(&bench);
            raw.send(&hello[..bytes]);
            raw
        })
        .into();
    for _ in 0..3 {
        bench.server.ready(now);
        assert!(bench.server.has_client() && !bench.server.is_connected());
    }
    let mut first = Raw::connect(&bench);
    first.send(&hello);
    bench.server.ready(now);
    assert!(bench.server.is_connected());
    assert!(matches!(first.see(&mut bench), Seen::Reply(1, 1, None, _)));
    // The next one that speaks comes when this one goes, without a refusal.
    silent[3].send(&hello[hello.len() - 1..]);
    bench.server.ready(now);
    drop(first);
    bench.server.ready(now);
    bench.server.ready(now);
    assert!(bench.server.is_connected());
    assert!(matches!(silent[3].see(&mut bench), Seen::Reply(1, 1, None, _)));
    let stats = bench.server.stats();
    assert_eq!((stats.clients, stats.refused, stats.violations), (2, 0, 0));
    drop(silent);
    bench.until_gone();
}

#[test]
fn a_flood_of_silent_connections_is_bounded_and_drives_out_its_own() {
    alone(
        "session::a_flood_of_silent_connections_is_bounded_and_drives_out_its_own",
        a_flood_of_silent_connections,
    );
}

fn a_flood_of_silent_connections() {
    let mut bench = patient();
    let now = Instant::now();
    // Another process, which connects before the flood, and speaks after it.
    let script = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); \
                  print(flush=True); input(); s.sendall(bytes.fromhex(sys.argv[2])); \
                  print(s.recv(16).hex(), flush=True); input()";
    let hello: String = framed(1, 1, 0, &version()).iter().map(|b| format!("{b:02x}")).collect();
    let other = std::process::Command::new("python3")
        .args(["-c", script])
        .arg(bench.path())
        .arg(hello)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn();
    let mut other = match other {
        Ok(other) => other,
        Err(error) => {
            eprintln!("skipped: there is no python3: {error}");
            return;
        }
    };
    let mut said = BufReader::new(other.stdout.take().unwrap());
    said.read_line(&mut String::new()).unwrap();
    let before = open_fds();
    let mut flood = Vec::new();
    for _ in 0..100 {
        flood.push(Raw::connect(&bench));
        while bench.server.ready(now).more {}
    }
    assert!(open_fds() <= before + 100 + 16 + 1, "the server keeps 16 and no more");
    let mut tell = other.stdin.take().unwrap();
    tell.write_all(b"\n").unwrap();
    bench.until(None, |server| server.is_connected());
    let mut reply = String::new();
    said.read_line(&mut reply).unwrap();
    assert!(reply.starts_with("01000100"), "{reply}");
    tell.write_all(b"\n").unwrap();
    other.wait().unwrap();
    drop(flood);
    bench.until_gone();
}

#[test]
fn clients_come_and_go() {
    let mut bench = Bench::new();
    let file = memory(0x10000);
    for round in 1..=100 {
        bench.with(|path| {
            let mut client = Client::connect(path).unwrap();
            client.dma_map(file.as_fd(), 0, 0, 0x10000).unwrap();
            let interrupt = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            client.connect_irqs(0, 0, &[interrupt.as_fd()]).unwrap();
        });
        bench.until_gone();
        let device = bench.server.target();
        assert_eq!(device.clients, round);
        assert!(device.maps.is_empty() && device.irqs.is_empty() && !device.connected);
    }
    assert_eq!(bench.server.stats().clients, 100);
    assert_eq!(bench.server.stats().violations, 0);
}

#[test]
fn the_client_notices_the_end_of_the_server() {
    let mut bench = Bench::new();
    let path = bench.path();
    let (connected, is_connected) = channel();
    let (gone, is_gone) = channel();
    let client = std::thread::spawn(move || {
        let mut client = Client::connect(path).unwrap();
        connected.send(()).unwrap();
        is_gone.recv_timeout(TIMEOUT).unwrap();
        client.set_patience(Patience::limit(Duration::from_secs(60)));
        let error = client.region_write(0, 0, &[1]).unwrap_err();
        assert!(error.is_final() && !matches!(error, ClientError::Timeout(_)), "{error}");
        assert!(matches!(client.region_write(0, 0, &[1]), Err(ClientError::Closed)));
    });
    bench.until(None, |server| server.is_connected());
    is_connected.recv_timeout(TIMEOUT).unwrap();
    drop(bench);
    gone.send(()).unwrap();
    client.join().unwrap();
}

#[test]
fn the_socket_file_is_private_and_replaced_only_when_dead() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device.sock");
    let bind =
        |path: &Path| Server::bind(path, "test", Device::new()).map(drop).map_err(|e| e.kind());
    // The file of a server that has ended.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(std::fs::symlink_metadata(&path).unwrap().file_type().is_socket());
    let server = Server::bind(&path, "test", Device::new()).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    // The file of a running server.
    assert_eq!(bind(&path), Err(std::io::ErrorKind::AddrInUse));
    drop(server);
    assert!(!path.exists(), "the file goes with its server");
    // A file that is no socket.
    std::fs::write(&path, "not a socket").unwrap();
    assert_eq!(bind(&path), Err(std::io::ErrorKind::AddrInUse));
    assert_eq!(std::fs::read(&path).unwrap(), b"not a socket");
    // Another server has replaced the file before this one ends.
    let path = folder.path().join("other.sock");
    let server = Server::bind(&path, "test", Device::new()).unwrap();
    std::fs::remove_file(&path).unwrap();
    let other = Server::bind(&path, "test", Device::new()).unwrap();
    drop(server);
    assert!(path.exists());
    drop(other);
    assert!(bind(&folder.path().join("no/such/folder")).is_err());
    assert!(bind(Path::new(&"x".repeat(200))).is_err());
}
