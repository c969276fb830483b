// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Messages of a hostile bus to its supervisor. Each gets one answer. The supervisor makes nothing
//! outside of the directory of the bus, and leaves no socket behind.
//!
//! The input is a list of messages: the socket, the number of descriptors, the length, the bytes.
//! `@` stands for the directory of the bus, and `%` for a thread that the bus may change.
#![no_main]

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde_json::Value;
use vbus_fuzz::OpenFiles;

static DIR: LazyLock<PathBuf> = LazyLock::new(|| {
    let dir = std::env::temp_dir().join(format!("vbus-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a folder");
    dir
});

/// A thread that does nothing, for verbs on threads.
static THREAD: LazyLock<i32> = LazyLock::new(|| {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        sender.send(rustix::thread::gettid().as_raw_nonzero().get()).expect("a receiver");
        loop {
            std::thread::park();
        }
    });
    receiver.recv().expect("a thread")
});

/// Replaces the placeholders.
fn filled(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for byte in bytes {
        match byte {
            b'@' => out.extend(DIR.to_str().expect("UTF-8").bytes()),
            b'%' => out.extend(THREAD.to_string().bytes()),
            other => out.push(*other),
        }
    }
    out
}

/// Sends a message and returns the answer with its descriptors.
fn ask(socket: &OwnedFd, bytes: &[u8], descriptors: usize) -> (Value, Vec<OwnedFd>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let sent = vec![socket.as_fd(); descriptors];
    assert!(sent.is_empty() || control.push(SendAncillaryMessage::ScmRights(&sent)));
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).expect("sent");

    let timeout = Timespec { tv_sec: 60, tv_nsec: 0 };
    let ready = loop {
        // libFuzzer's own timer interrupts it.
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timeout)) {
            Err(Errno::INTR) => {}
            other => break other,
        }
    };
    assert_eq!(ready, Ok(1), "no answer to {:?}", String::from_utf8_lossy(bytes));
    let mut answer = vec![0; 64 << 10];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut answer)];
    let received = recvmsg(socket, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC);
    let len = received.expect("an answer").bytes;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let answer = serde_json::from_slice(&answer[..len]).expect("an answer is JSON");
    (answer, descriptors)
}

/// Files that the supervisor gives are in the directory of the bus, or the time of the thread.
fn check_file(descriptor: &OwnedFd) {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
    let link = link.expect("an open descriptor");
    let is_file = link.is_absolute();
    let is_time = link.starts_with("/proc")
        && link.components().any(|part| part.as_os_str() == THREAD.to_string().as_str());
    assert!(!is_file || is_time || link.starts_with(&*DIR), "{}", link.display());
}

fn clear(dir: &Path) {
    for entry in std::fs::read_dir(dir).expect("the folder") {
        let path = entry.expect("an entry").path();
        let kind = std::fs::symlink_metadata(&path).expect("it is there").file_type();
        assert!(kind.is_file(), "{} is left", path.display());
        std::fs::remove_file(path).expect("a file");
    }
}

fuzz_target!(|input: &[u8]| {
    let (dir, idle) = (&*DIR, *THREAD);
    let open = OpenFiles::count();
    let (quick, slow, thread) = vbus_host::fuzzing::supervisor(dir, idle);
    let mut rest = input;
    while let Some((&[form, len, high], more)) = rest.split_first_chunk::<3>() {
        let len = usize::from(u16::from_le_bytes([len, high])).min(more.len());
        let (bytes, more) = more.split_at(len);
        rest = more;
        let socket = if form & 1 == 0 { &slow } else { &quick };
        let descriptors = if form & 2 == 0 { 0 } else { usize::from(form >> 2) % 20 };
        let bytes = filled(bytes);
        // An empty message is the end.
        if bytes.is_empty() || bytes.len() > 64 << 10 {
            continue;
        }
        let (answer, descriptors) = ask(socket, &bytes, descriptors);
        let keys = answer.as_object().expect("an object").keys().collect::<Vec<_>>();
        assert!(keys.len() == 1 && ["ok", "errno", "refused"].contains(&&**keys[0]), "{answer}");
        assert!(descriptors.is_empty() || answer.get("ok").is_some(), "{answer}");
        descriptors.iter().for_each(check_file);
    }
    drop((quick, slow));
    thread.join().expect("the supervisor ends well");
    clear(&DIR);
    open.check();
});
