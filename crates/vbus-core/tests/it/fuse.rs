// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A file system of a peer's own that stops to answer. What the bus asks about its files must not
//! wait for it.
#![allow(unsafe_code)] // mount(2) and unshare(2).

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Error, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use vbus_core::{Access, MapError, MemoryContext};

const BOUND: Duration = Duration::from_secs(60);
/// What the server answers when it gives up: "no such call".
const NO_SUCH_CALL: i32 = -libc::ENOSYS;

macro_rules! bytes {
    ($($value:expr),* $(,)?) => {
        [$(&$value.to_ne_bytes()[..]),*].concat()
    };
}

fn done(result: i32, what: &str) -> Result<(), String> {
    if result == 0 { Ok(()) } else { Err(format!("{what}: {}", Error::last_os_error())) }
}

/// Mounts the file system in a mount namespace of this thread alone, so that no other program
/// meets it. Opens its one file. The device has a lower number than the file, so that the end of
/// this process closes it first.
fn mount(folder: &Path) -> Result<(File, File), String> {
    let device = File::options().read(true).write(true).open("/dev/fuse");
    let device = device.map_err(|error| format!("/dev/fuse: {error}"))?;
    let path = |path: &Path| CString::new(path.to_str().unwrap()).unwrap();
    let options =
        CString::new(format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd()));
    let (options, place) = (options.unwrap(), path(folder));
    // SAFETY: it concerns this thread alone.
    done(unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) }, "a mount namespace")?;
    let mount = |kind: &CStr, place: &CStr, flags, options: *const libc::c_char| {
        // SAFETY: all pointers are those of strings that live as long as the call, or null.
        unsafe { libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), flags, options.cast()) }
    };
    done(mount(c"none", c"/", libc::MS_REC | libc::MS_PRIVATE, std::ptr::null()), "private")?;
    let flags = libc::MS_NOSUID | libc::MS_NODEV;
    done(mount(c"fuse", &place, flags, options.as_ptr()), "mounting FUSE")?;
    // The server answers until the file is open.
    let server = device.try_clone().unwrap();
    let answering = std::thread::spawn(move || answer(server, true));
    let file = File::options().read(true).write(true).open(folder.join("file"));
    answering.join().unwrap();
    Ok((device, file.map_err(|error| format!("opening the file: {error}"))?))
}

/// Answers requests: until the file is open, or for ever with an error.
fn answer(mut device: File, serve: bool) {
    let attributes = |node: u64| {
        let (mode, links) = if node == 1 { (0o40755u32, 2u32) } else { (0o100_666u32, 1u32) };
        let times = bytes![0u64, 0u64, 0u64, 0u32, 0u32, 0u32];
        let rest = bytes![mode, links, 0u32, 0u32, 0u32, 4096u32, 0u32];
        [bytes![node, 1u64 << 20, 1u64 << 11], times, rest].concat()
    };
    let mut request = vec![0; 1 << 17];
    loop {
        let Ok(len) = device.read(&mut request) else { return };
        assert!(len >= 40);
        let long = |at: usize| u64::from_ne_bytes(request[at..at + 8].try_into().unwrap());
        let opcode = u32::from_ne_bytes(request[4..8].try_into().unwrap());
        let body = match (opcode, long(16)) {
            _ if !serve => None,
            // INIT: version, readahead, flags, background, the longest write.
            (26, _) => {
                let head = bytes![7u32, 31u32, 4096u32, 0u32, 1u16, 1u16, 4096u32, 1u32];
                Some([head, vec![0; 64 - 28]].concat())
            }
            // LOOKUP, GETATTR of the folder, and OPEN.
            (1, 1) => Some([bytes![2u64, 0u64, 0u64, 0u64, 0u32, 0u32], attributes(2)].concat()),
            (3, 1) => Some([bytes![0u64, 0u32, 0u32], attributes(1)].concat()),
            (14, 2) => Some(bytes![1u64, 0u32, 0u32]),
            _ => None,
        };
        let error = if body.is_some() { 0 } else { NO_SUCH_CALL };
        let body = body.unwrap_or_default();
        let head = bytes![u32::try_from(16 + body.len()).unwrap(), error, long(8)];
        let _ = device.write(&[head, body].concat());
        if serve && opcode == 14 {
            return;
        }
    }
}

/// Looks at the file, and says what comes of it.
fn look(file: OwnedFd, told: &Sender<Result<(), MapError>>) {
    let context = MemoryContext::new();
    told.send(context.map(0, 4096, Some((&file, 0)), Access::BOTH)).unwrap();
    std::mem::forget(file);
}

#[test]
fn a_file_system_that_does_not_answer_is_not_asked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    let mounted = std::thread::spawn(move || mount(&path)).join().unwrap();
    let (device, file) = match mounted {
        Ok(mounted) => mounted,
        Err(reason) => {
            eprintln!("skipped: {reason}");
            return;
        }
    };
    let (told, hears): (_, Receiver<Result<(), MapError>>) = channel();
    let copy = file.try_clone().unwrap();
    let looking = std::thread::spawn(move || look(copy.into(), &told));
    let result = hears.recv_timeout(BOUND);
    // From now on the server answers everything. So nothing waits, neither a close.
    std::thread::spawn(move || answer(device, false));
    looking.join().unwrap();
    drop(file);
    let refused = result.expect("the file system was asked").unwrap_err();
    assert!(matches!(refused, MapError::FileSystem(None)), "{refused}");
}
