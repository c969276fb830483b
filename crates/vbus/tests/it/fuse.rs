// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client whose memory file is of a file system of its own, which stops to answer. Neither the
//! bus, nor another device, nor the next client, nor the next bus in the directory waits for it.
#![allow(unsafe_code)] // mount(2).

use std::ffi::CString;
use std::fs::File;
use std::io::{BufRead, BufReader, Error, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::Signal;
use vfio_user_protocol::message::{
    DmaMap, HEADER_LEN, Header, IrqData, IrqVerb, Kind, SetIrqs, command, message,
};
use vfio_user_protocol::{Client, Patience, pci};

use crate::support::{Served, TIMEOUT, TWO, wait_until};

/// The folder for the file system, and the socket of a device, for the client's process.
const FOLDER: &str = "VBUS_TEST_FOLDER";
const SOCKET: &str = "VBUS_TEST_SOCKET";
/// What the server answers to what it does not know: "no such call".
const NO_SUCH_CALL: i32 = -libc::ENOSYS;

macro_rules! bytes {
    ($($value:expr),* $(,)?) => {
        [$(&$value.to_ne_bytes()[..]),*].concat()
    };
}

/// Mounts the file system and opens its one file. The process has a mount namespace of its own, so
/// that no other program meets it.
fn mount(folder: &Path) -> Result<File, String> {
    let device = File::options().read(true).write(true).open("/dev/fuse");
    let device = device.map_err(|error| format!("/dev/fuse: {error}"))?;
    let place = CString::new(folder.to_str().unwrap()).unwrap();
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let options = CString::new(options).unwrap();
    let (kind, flags) = (c"fuse".as_ptr(), libc::MS_NOSUID | libc::MS_NODEV);
    // SAFETY: all pointers are those of strings that live as long as the call.
    let mounted =
        unsafe { libc::mount(kind, place.as_ptr(), kind, flags, options.as_ptr().cast()) };
    if mounted != 0 {
        return Err(format!("mounting FUSE: {}", Error::last_os_error()));
    }
    // It ends with the process, and the file system with it.
    std::thread::spawn(move || answer(device));
    let file = File::options().read(true).write(true).open(folder.join("file"));
    file.map_err(|error| format!("opening the file: {error}"))
}

/// Answers what this process asks, and nobody else. So this process can close the file.
fn answer(mut device: File) {
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
        let short = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let (opcode, thread) = (short(4), short(32));
        // The kernel itself is thread 0.
        if thread != 0 && !Path::new(&format!("/proc/self/task/{thread}")).exists() {
            continue;
        }
        let body = match (opcode, long(16)) {
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
    }
}

/// Sends a message, and returns the number of the error with which it is answered. No descriptor is
/// copied here, because to close a copy waits too.
fn error_of(mut socket: &UnixStream, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> u32 {
    let bytes = message(77, command, Kind::Command { no_reply: false }, body);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    let sent = sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL);
    assert_eq!(sent, Ok(bytes.len()));
    let mut head = [0; HEADER_LEN];
    socket.read_exact(&mut head).unwrap();
    match Header::parse(&head).unwrap() {
        Header { id: 77, kind: Kind::Reply { error: Some(error) }, .. } => error,
        other => panic!("{other:?}"),
    }
}

/// The client: a process in namespaces of its own. It says on its standard output what comes of
/// what it does. At each line on its standard input it goes on, and ends with the input.
#[test]
#[ignore = "the client of the test below"]
fn hostile_client() {
    let path = |name| std::env::var_os(name).unwrap();
    let say = |text: &dyn std::fmt::Display| println!("\nsays {text}");
    let file = match mount(path(FOLDER).as_ref()) {
        Ok(mounted) => mounted,
        Err(reason) => return say(&format!("cannot: {reason}")),
    };
    say(&"mounted");
    let mut orders = std::io::stdin().lines();
    let socket = UnixStream::connect(path(SOCKET)).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    let client = Client::negotiate(socket.try_clone().unwrap().into()).unwrap();
    let map = DmaMap { readable: true, writable: true, offset: 0, address: 0, size: 4096 };
    say(&error_of(&socket, command::DMA_MAP, &map.body(), &[file.as_fd()]));
    // As many descriptors as a message may have, for the bus to close.
    let (index, verb, data) = (pci::IRQ_MSI, IrqVerb::Trigger, IrqData::Eventfd);
    let irqs = SetIrqs { index, start: 0, count: 16, verb, data };
    say(&error_of(&socket, command::DEVICE_SET_IRQS, &irqs.body(), &[file.as_fd(); 16]));
    // The end of the process would wait for the close of an open file.
    drop(file);
    orders.next();
    drop((client, socket));
    say(&"gone");
    orders.next();
}

/// The process of the client.
struct Hostile {
    child: Child,
    orders: Option<ChildStdin>,
    says: BufReader<ChildStdout>,
}

impl Hostile {
    fn start(folder: &Path, socket: &Path) -> Hostile {
        let mut command = Command::new("unshare");
        if !rustix::process::geteuid().is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        let mut child = command
            .args(["--mount", "--"])
            .arg(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "fuse::hostile_client", "--nocapture"])
            .env(FOLDER, folder)
            .env(SOCKET, socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let says = BufReader::new(child.stdout.take().unwrap());
        Hostile { orders: child.stdin.take(), child, says }
    }

    /// The next thing that it says; nothing if it has ended.
    fn next(&mut self) -> String {
        let lines = self.says.by_ref().lines().map(Result::unwrap);
        lines
            .filter_map(|line| line.strip_prefix("says ").map(str::to_owned))
            .next()
            .unwrap_or_default()
    }

    fn go_on(&mut self) {
        self.orders.as_mut().unwrap().write_all(b"\n").unwrap();
    }
}

impl Drop for Hostile {
    /// It is not killed, because the kernel would keep it if it has the file open.
    fn drop(&mut self) {
        self.orders = None;
        let _ = self.child.wait();
    }
}

/// A client of a device that is served: it has maps of its own memory, which is a long operation.
fn good_client(socket: &Path) -> Client {
    let mut client = Client::connect(socket).unwrap();
    client.set_patience(Patience::limit(TIMEOUT));
    let memory = memfd_create(c"memory", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, 1 << 20).unwrap();
    client.dma_map(memory.as_fd(), 0, 0, 1 << 20).unwrap();
    client.dma_unmap(0, 1 << 20).unwrap();
    client
}

#[test]
fn nobody_waits_for_a_file_system_that_does_not_answer() {
    let folder = tempfile::tempdir().unwrap();
    let mut bus = Served::start(TWO);
    let (socket, neighbour) = (bus.dir.join("net1.sock"), bus.dir.join("net0.sock"));
    let mut hostile = Hostile::start(folder.path(), &socket);
    let begun = hostile.next();
    if begun != "mounted" {
        eprintln!("skipped: no FUSE in namespaces of its own: {begun}");
        return;
    }
    // The file is no memory, which the bus finds out without a question to the file system.
    assert_eq!(hostile.next(), libc::EINVAL.to_string());
    assert_eq!(hostile.next(), libc::EINVAL.to_string());
    assert!(std::fs::read_to_string(&bus.log).unwrap().contains("file system"));
    // The bus closes the descriptors, which has no end. The other device is served, and when the
    // client has gone, the next one of its device is.
    let neighbour = good_client(&neighbour);
    hostile.go_on();
    assert_eq!(hostile.next(), "gone");
    wait_until("the client has gone", || {
        !bus.json(&["device", "show", "net1"])["connected"].as_bool().unwrap()
    });
    drop((good_client(&socket), neighbour));
    // The bus ends, although the kernel keeps its process. The next bus has the directory.
    bus.signal(Signal::TERM);
    wait_until("the bus ends", || {
        !bus.dir.join("control.sock").exists() || bus.child.try_wait().unwrap().is_some()
    });
    let next = Served::start_in(&bus.dir, TWO);
    assert!(bus.child.try_wait().unwrap().is_none(), "this test's closes do not wait");
    drop(good_client(&socket));
    drop(next);
    // All closes end with the file system.
    drop(hostile);
    wait_until("the process of the bus ends", || bus.child.try_wait().unwrap().is_some());
    assert!(bus.child.wait().unwrap().success());
}
