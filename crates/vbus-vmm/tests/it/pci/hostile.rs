// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Servers that lie, keep silent, flood, or block. Plugging fails with a clear error, and nothing
//! worse happens later.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::mpsc::channel;
use std::time::Instant;

use vfio_user_protocol::IoEventFd;

use super::fake::{DOORBELLS, Device, Fake, doorbell, event};
use super::guest::Guest;
use super::{TIMEOUT, until};
use vbus_vmm::pci::PlugError;
use vfio_user_protocol::pci::IRQ_INTX;

fn error(guest: &Guest, change: impl FnOnce(&mut Device)) -> String {
    let fake = Fake::with_device(change);
    let error = guest.root.plug("liar", &fake.path).unwrap_err();
    assert!(guest.root.list().is_empty());
    assert_eq!(guest.config32(1, 0), u32::MAX, "{error}");
    error.to_string()
}

type Change = Box<dyn FnOnce(&mut Device)>;

#[test]
fn lies_are_told_apart() {
    let Some(guest) = Guest::new(1) else { return };
    let cases: Vec<(&str, Change)> = vec![
        ("9 regions and 2 kinds of interrupt", Box::new(|d| d.info.irqs = 2)),
        ("7 regions", Box::new(|d| d.info.regions = 7)),
        ("cannot be reset", Box::new(|d| d.info.resettable = false)),
        ("region 2 of 0x1000 bytes", Box::new(|d| d.regions[2] = 0x1000)),
        ("configuration space of 0x40 bytes", Box::new(|d| d.regions[7] = 0x40)),
        ("BAR0 of 0x5000 bytes", Box::new(|d| d.regions[0] = 0x5000)),
        ("BAR0 of 0x10000000000 bytes", Box::new(|d| d.regions[0] = 1 << 40)),
        ("header type 0xff", Box::new(|d| d.config.fill(0xff))),
        ("neither a vbus nor a virtio device: 1af4:10f5", Box::new(|d| d.config[0x44] = 0)),
        ("without an end", Box::new(|d| d.config[0x91] = 0x70)),
        ("8 MSI-X vectors, 1 interrupts", Box::new(|d| d.irq_counts[2] = 1)),
        ("registers that begin with 0x0", Box::new(|d| d.memory[..4].fill(0))),
        ("4294967295 doorbells", Box::new(|d| d.memory[0x50..0x54].fill(0xff))),
        (
            "1024 doorbells from 0x2c00",
            Box::new(|d| {
                d.memory[0x50..0x54].copy_from_slice(&1024u32.to_le_bytes());
                d.config[0x51] = 0x2c;
            }),
        ),
        (
            "0x1008 is no eventfd",
            Box::new(|d| d.io[2].fd = std::fs::File::open("/dev/null").unwrap().into()),
        ),
        ("eventfd for 0x800 of BAR0", Box::new(|d| d.io[1].offset = 0x800)),
        ("eventfd for 0x1002 of BAR0", Box::new(|d| d.io[1].offset = 0x1002)),
        (
            "eventfd for 0x1010 of BAR0",
            Box::new(|d| d.io.push(doorbell(event(), u64::from(DOORBELLS)))),
        ),
        ("eventfd for 0xffffffffffffffff", Box::new(|d| d.io[0].offset = u64::MAX)),
        ("eventfd for 0x1000", Box::new(|d| d.io[0].datamatch = Some(1))),
        ("eventfd for 8 bytes, where doorbell 2 is", Box::new(|d| d.io[2].size = 8)),
        ("doorbell 1 twice", Box::new(|d| d.io[2].offset = 0x1004)),
        (
            "eventfd for",
            Box::new(|d| {
                d.io = (0..200).map(|n| doorbell(event(), n)).collect();
            }),
        ),
    ];
    for (message, change) in cases {
        let error = error(&guest, change);
        assert!(error.contains(message), "{error:?} for {message:?}");
        assert!(error.starts_with('/') || message.contains("twice"), "{error:?} names the socket");
    }
}

fn sized(mut eventfd: IoEventFd, bytes: u64) -> IoEventFd {
    eventfd.size = bytes;
    eventfd
}

#[test]
fn fewer_doorbells_than_regions_are_fine() {
    let Some(guest) = Guest::new(1) else { return };
    let fake = Fake::with_device(|d| d.io = vec![sized(doorbell(event(), 3), 4)]);
    guest.root.plug("fake0", &fake.path).unwrap();
    guest.pio.write(0xc001, &[0]);
    guest.set_command(1, 6);
    guest.memory32(u64::from(guest.config32(1, 0x10)));
    assert_eq!(fake.with(|device| device.rung.clone()), [1]);
}

/// A server that does `act` with its first client.
fn raw(
    act: impl FnOnce(std::os::unix::net::UnixStream) + Send + 'static,
) -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("raw.sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || act(listener.accept().unwrap().0));
    (folder, path)
}

#[test]
fn silence_nonsense_and_floods_end_in_time() {
    let Some(guest) = Guest::new(8) else { return };
    let silent = raw(|mut stream| while stream.read(&mut [0; 64]).is_ok_and(|n| n > 0) {});
    let nonsense = raw(|mut stream| {
        let _ = stream.write_all(&[0xff; 64]);
        while stream.read(&mut [0; 64]).is_ok_and(|n| n > 0) {}
    });
    let closed = raw(drop);
    // One server sends a byte of an answer each second, another one sends requests without end.
    let dribbling = raw(|mut stream| {
        while stream.write_all(&[16]).is_ok() {
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
    });
    let flooding = raw(|mut stream| {
        let _ = stream.read(&mut [0; 4096]);
        // DMA_READ of no bytes, which needs no answer.
        let mut message = [0; 32];
        message[2] = 11;
        message[4] = 32;
        message[8] = 0x10;
        while stream.write_all(&message).is_ok() {}
    });
    let missing = (tempfile::tempdir().unwrap(), "/nowhere/there.sock".into());
    let servers = [
        (silent, "no reply to VERSION"),
        (nonsense, "type"),
        (closed, "closed"),
        (dribbling, "VERSION"),
        (flooding, "no reply to VERSION"),
        (missing, "connecting to /nowhere/there.sock"),
    ];
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for (index, ((_folder, path), message)) in servers.iter().enumerate() {
            let root = &guest.root;
            scope.spawn(move || {
                let error = root.plug(&format!("raw{index}"), path).unwrap_err();
                assert!(error.to_string().contains(message), "{error} for {message}");
                assert!(matches!(error, PlugError::Server { .. }));
            });
        }
    });
    assert!(begun.elapsed() < TIMEOUT, "{:?}", begun.elapsed());
    assert!(guest.root.list().is_empty());
}

#[test]
fn a_device_that_stops_answering_is_dropped() {
    let Some((guest, fake)) = Guest::with_device() else { return };
    guest.set_command(1, 6);
    let bar = u64::from(guest.config32(1, 0x10));
    let begun = Instant::now();
    // The server's thread hangs as long as this thread holds the lock.
    fake.with(|_| {
        assert_eq!(guest.memory32(bar), u32::MAX);
        assert_eq!(guest.memory32(bar), u32::MAX, "at once, the second time");
        assert!(begun.elapsed() < TIMEOUT);
        until("the slot is empty", || guest.root.list().is_empty());
    });
    assert_eq!(guest.config32(1, 0), u32::MAX);
}

#[test]
fn a_server_that_does_not_read_is_dropped() {
    let Some((guest, fake)) = Guest::with_device() else { return };
    guest.set_command(1, 6);
    let bar = u64::from(guest.config32(1, 0x10));
    let begun = Instant::now();
    fake.with(|_| {
        while !guest.root.list().is_empty() {
            // The write does not wait for the server until the socket is full.
            guest.mmio.write(bar + 0x80, &[0; 8]);
            assert!(begun.elapsed() < TIMEOUT);
        }
    });
    assert_eq!(guest.config32(1, 0), u32::MAX);
}

/// Makes an eventfd blocking. An ordinary `read` then blocks if the counter is 0. With `full`, the
/// counter is full, and an ordinary `write` blocks.
fn block(event: impl AsFd, full: bool) {
    if full {
        rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    }
    rustix::fs::fcntl_setfl(&event, rustix::fs::OFlags::empty()).unwrap();
}

#[test]
fn eventfds_that_a_server_makes_blocking_stop_nobody() {
    for split in [false, true] {
        let Some(guest) = Guest::with_chip(2, split) else { return };
        let (hostile, honest) = (Fake::start(), Fake::start());
        guest.root.plug("hostile", &hostile.path).unwrap();
        guest.root.plug("honest", &honest.path).unwrap();
        hostile.with(|device| {
            block(device.unmask.as_ref().unwrap(), true);
            block(&device.irqs[&(IRQ_INTX, 0)], false);
        });
        if let Some(io_apic) = guest.io_apic.clone() {
            let apic = guest.local_apic();
            // Pins 17 and 18 are level-triggered, with vectors 0x61 and 0x62.
            for (pin, vector) in [(17_u8, 0x61_u32), (18, 0x62)] {
                for (register, value) in [(1, 0), (0, vector | 1 << 15)] {
                    let select = 0x10 + 2 * pin + register;
                    guest.mmio.write(vbus_vmm::acpi::IO_APIC.into(), &[select]);
                    let window = u64::from(vbus_vmm::acpi::IO_APIC) + 0x10;
                    guest.mmio.write(window, &value.to_le_bytes());
                }
            }
            // The thread that passes INTx on wakes for the honest device, and does not hang at the
            // hostile one.
            assert!(honest.interrupt(IRQ_INTX, 0));
            until("INTx of the honest device", || apic.takes(0x62));
            assert!(hostile.interrupt(IRQ_INTX, 0));
            until("INTx of the hostile device", || apic.takes(0x61));
            let (tell, told) = channel();
            std::thread::spawn(move || {
                io_apic.end(0x61);
                tell.send(())
            });
            told.recv_timeout(TIMEOUT).expect("the end of an interrupt is told without waiting");
        }
        let (tell, told) = channel();
        let root = guest.root.clone();
        std::thread::spawn(move || {
            root.reset();
            tell.send(())
        });
        told.recv_timeout(TIMEOUT).expect("a reset does not wait for a server's eventfd");
        guest.root.unplug("hostile").unwrap();
    }
}
