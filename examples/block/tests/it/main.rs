// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device and its driver on a bus, through the socket and without a VM.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::time::Duration;

use example_block::device::BlockClass;
use example_block::driver::Disk;
use example_block::{CLASS, DATA_MAX, Header, NO_SUCH_SECTOR, READ, SECTOR, WRITE};
use serde_json::json;
use vbus_core::{Bus, DeviceClass, ErrorCode, Executor, Tuning};
use vbus_driver::requests::Requests;
use vbus_driver::{Error, Function};
use vbus_process::{MEMORY_BYTES, Process};
use vbus_vfio_user::DeviceServer;

const SECTORS: usize = 300;

/// Serves a file as a disk for `test`, which gets a connected process and a way to wait for its
/// interrupts. Returns the file's contents afterwards.
fn with_disk(test: impl FnOnce(Process, &mut dyn FnMut() -> bool)) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, vec![7; SECTORS * SECTOR]).unwrap();
    let config = json!({ "path": path });
    let device = BlockClass.create("disk", &config).unwrap();
    let bus = Bus::new(Executor::start(Tuning::default()).unwrap(), Vec::new());
    let endpoint = bus.add("disk", device).unwrap();
    let socket = dir.path().join("disk.sock");
    let server = DeviceServer::start(endpoint, &socket, Default::default()).unwrap();
    let process = Process::connect(server.path(), MEMORY_BYTES).unwrap();
    let woken = process.clone();
    test(process, &mut || woken.wait(Duration::from_secs(60)));
    fs::read(&path).unwrap()
}

/// The code with which the device refused.
fn code<T: std::fmt::Debug>(result: Result<T, Error>) -> ErrorCode {
    match result {
        Err(Error::Refused { code, .. } | Error::Class { code, .. }) => code,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn sectors_are_written_and_read() {
    let data: Vec<u8> = (0..=250).cycle().take(DATA_MAX as usize).collect();
    let file = with_disk(|process, wait| {
        let mut disk = Disk::open(process, wait).unwrap();
        assert_eq!(disk.sectors(), Ok(SECTORS as u64));
        disk.write(2, &data).unwrap();
        let mut back = vec![0; DATA_MAX as usize];
        disk.read(1, &mut back).unwrap();
        assert!(back[..SECTOR] == [7; SECTOR] && data.starts_with(&back[SECTOR..]));
        let end = SECTORS as u64;
        for (sector, bytes) in [(end, SECTOR), (end - 1, 2 * SECTOR), (u64::MAX, SECTOR)] {
            let error = disk.write(sector, &vec![0; bytes]).unwrap_err();
            assert!(error.to_string().contains("no such sector"), "{error}");
            assert_eq!(code(disk.read(sector, &mut vec![0; bytes])), NO_SUCH_SECTOR);
        }
    });
    assert!(file.len() == SECTORS * SECTOR && file[2 * SECTOR..].starts_with(&data));
}

#[test]
fn nonsense_is_refused_and_the_connection_goes_on() {
    with_disk(|process, mut wait| {
        let function = Function::probe(process).unwrap();
        let mut requests = Requests::open(function, CLASS, 1, 0).unwrap();
        let mut response = vec![0; DATA_MAX as usize];
        let mut call = |request: &[u8]| requests.call(request, &mut response, &mut wait);
        let whole = Header(READ, 1, 0).with(&[]);
        for length in 0..whole.len() {
            assert_eq!(code(call(&whole[..length])), ErrorCode::BAD_LENGTH, "{length} bytes");
        }
        for request in [
            Header(READ, u32::MAX, 0).with(&[]),
            Header(READ, 1, 0).with(&[1]),
            Header(WRITE, 1, 0).with(&[1; SECTOR - 1]),
            Header(WRITE, 0, 0).with(&[1; SECTOR]),
        ] {
            assert_eq!(code(call(&request)), ErrorCode::BAD_LENGTH);
        }
        assert_eq!(code(call(&Header(9, 0, 0).with(&[]))), ErrorCode::BAD_ARGUMENT);
        assert_eq!(call(&whole), Ok(SECTOR));
    });
}

#[test]
fn settings_are_checked_without_the_file() {
    let error = |config| BlockClass.check("a", &config).unwrap_err().to_string();
    assert!(error(json!({})).contains("\"path\" is missing; write the path of a file"));
    let error = error(json!({ "path": "a", "pat": "b" }));
    assert!(error.contains("did you mean \"path\"?"), "{error}");
    let absent = json!({ "path": "/nonexistent/disk" });
    assert!(BlockClass.check("a", &absent).is_ok());
    let error = BlockClass.create("a", &absent).err().unwrap().to_string();
    assert!(error.starts_with("\"path\" is \"/nonexistent/disk\": No such file"), "{error}");
}

/// docs/writing-a-device.md says how long this device is.
#[test]
fn it_is_short() {
    let files = [
        include_str!("../../src/lib.rs"),
        include_str!("../../src/device.rs"),
        include_str!("../../src/driver.rs"),
        include_str!("../../src/bin/block-host.rs"),
        include_str!("../../src/bin/block-guest.rs"),
    ];
    let lines: usize = files.iter().map(|file| file.lines().count()).sum();
    assert!(lines < 255, "{lines} lines");
}
