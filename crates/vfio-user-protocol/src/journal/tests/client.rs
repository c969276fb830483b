// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client that knows what each reply must be.

use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::device::{LONG, Sum, pattern, register};
use super::keeper::Keeper;
use crate::message::{HEADER_LEN, Header, Kind, command, message};

/// The bytes of integers of different sizes.
macro_rules! bytes {
    ($($value:expr),* $(,)?) => {{
        let mut bytes: Vec<u8> = Vec::new();
        $(bytes.extend_from_slice(&$value.to_ne_bytes());)*
        bytes
    }};
}

pub(super) struct Client {
    stream: UnixStream,
    patience: Duration,
    id: u16,
    /// What the device must have done.
    sum: Sum,
    tickets: u64,
    /// Address and token of each map.
    maps: Vec<(u64, u64)>,
    next: u64,
}

type Seen<T> = Result<T, String>;

impl Client {
    /// Connects and negotiates.
    ///
    /// The client waits for `patience` for what must come.
    pub(super) fn connect(keeper: &Keeper, patience: Duration) -> Seen<Client> {
        let mut version = bytes![0u16, 0u16];
        version.extend_from_slice(
            b"{\"capabilities\":{\"max_msg_fds\":16,\"write_multiple\":true}}\0",
        );
        loop {
            let stream = UnixStream::connect(&keeper.path).map_err(|error| error.to_string())?;
            stream.set_read_timeout(Some(patience)).unwrap();
            stream.set_write_timeout(Some(patience)).unwrap();
            let mut client = Client {
                stream,
                patience,
                id: 0,
                sum: Sum::default(),
                tickets: 0,
                maps: Vec::new(),
                next: 0,
            };
            match client.call(command::VERSION, &version, &[]) {
                Ok(_) => return Ok(client),
                // A connection is safe only from the first commit that has it on.
                Err(_) if !keeper.has_connection() && !keeper.has_failed() => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn message(&mut self, number: u16, no_reply: bool, body: &[u8]) -> Vec<u8> {
        self.id = self.id.wrapping_add(1);
        message(self.id, number, Kind::Command { no_reply }, body)
    }

    fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Seen<()> {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(fds.len()))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        let flags = SendFlags::NOSIGNAL;
        let sent = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut ancillary, flags);
        let sent = sent.map_err(|error| format!("sending: {error}"))?;
        self.stream.write_all(&bytes[sent..]).map_err(|error| format!("sending: {error}"))
    }

    /// Waits until the server has taken what was sent.
    fn until_taken(&self) -> Seen<()> {
        let start = Instant::now();
        loop {
            let mut left: libc::c_int = 0;
            // SAFETY: the kernel stores one integer there.
            let done =
                unsafe { libc::ioctl(self.stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut left) };
            assert_eq!(done, 0);
            if left == 0 {
                return Ok(());
            }
            if start.elapsed() > self.patience {
                return Err("the server does not read".into());
            }
            std::thread::yield_now();
        }
    }

    /// The next reply must be that to the last message. Its descriptors are appended to `fds`.
    fn reply(&mut self, number: u16, fds: &mut Vec<OwnedFd>) -> Seen<Vec<u8>> {
        let text = |error: std::io::Error| format!("reply to {} ({number}): {error}", self.id);
        let mut head = [0; HEADER_LEN];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut head)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = recvmsg(&self.stream, &mut parts, &mut ancillary, flags);
        let got = got.map_err(|error| text(error.into()))?.bytes;
        if got == 0 {
            return Err("the connection has ended".into());
        }
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        self.stream.read_exact(&mut head[got..]).map_err(text)?;
        let header = Header::parse(&head).map_err(|error| error.to_string())?;
        let mut body = vec![0; header.body_len()];
        self.stream.read_exact(&mut body).map_err(text)?;
        if (header.id, header.command, header.kind)
            != (self.id, number, Kind::Reply { error: None })
        {
            return Err(format!("{header} came for {} ({number})", self.id));
        }
        Ok(body)
    }

    fn call(&mut self, number: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> Seen<Vec<u8>> {
        let bytes = self.message(number, false, body);
        self.send(&bytes, fds)?;
        self.reply(number, &mut Vec::new())
    }

    fn value(&mut self) -> u64 {
        self.next += 1;
        self.sum.add(self.next);
        self.next
    }

    fn read(&mut self, region: u32, at: u64, count: u32) -> Seen<Vec<u8>> {
        let body = self.call(command::REGION_READ, &bytes![at, region, count], &[])?;
        Ok(body[16..].to_vec())
    }

    fn expect(&mut self, what: &str, at: u64, words: &[u64]) -> Seen<()> {
        let len = u32::try_from(words.len() * 8).unwrap();
        let seen = self.read(0, at, len)?;
        let seen: Vec<u64> =
            seen.chunks(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect();
        if seen == words { Ok(()) } else { Err(format!("{what}: {seen:?}, not {words:?}")) }
    }

    /// Maps a file of its own. `cut`: the message comes in two parts.
    fn map(&mut self, cut: usize) -> Seen<()> {
        self.next += 1;
        let (token, address) = (self.next, self.next * 0x1000);
        let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 0x1000).unwrap();
        rustix::io::pwrite(&file, &token.to_ne_bytes(), 0).unwrap();
        let body = bytes![32u32, 3u32, 0u64, address, 0x1000u64];
        let bytes = self.message(command::DMA_MAP, false, &body);
        self.send(&bytes[..cut], &[file.as_fd()])?;
        // From now on the server, or its keeper, has the only descriptors.
        drop(file);
        if cut < bytes.len() {
            self.until_taken()?;
            self.send(&bytes[cut..], &[])?;
        }
        self.reply(command::DMA_MAP, &mut Vec::new())?;
        self.maps.push((address, token));
        Ok(())
    }

    fn unmap(&mut self) -> Seen<()> {
        let (address, _) = self.maps.remove(0);
        let body = bytes![24u32, 0u32, address, 0x1000u64];
        self.call(command::DMA_UNMAP, &body, &[]).map(drop)
    }

    /// Messages of all kinds. Each reply must be right.
    pub(super) fn round(&mut self) -> Seen<()> {
        let write = |value: u64| bytes![register::VALUE, 0u32, 8u32, value];
        let value = self.value();
        self.call(command::REGION_WRITE, &write(value), &[])?;
        // Several posted ones, and the next message, before the server looks.
        for _ in 0..3 {
            let body = write(self.value());
            let posted = self.message(command::REGION_WRITE, true, &body);
            self.send(&posted, &[])?;
        }
        self.tickets += 1;
        self.expect("ticket", register::TICKET, &[self.tickets - 1])?;
        self.map(48)?;
        self.map(20)?;
        self.map(3)?;
        let irq = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let body = bytes![20u32, 0b10_0100u32, 1u32, 0u32, 1u32];
        self.call(command::DEVICE_SET_IRQS, &body, &[irq.as_fd()])?;
        let body = bytes![20u32, 0b10_0001u32, 1u32, 0u32, 1u32];
        self.call(command::DEVICE_SET_IRQS, &body, &[])?;
        // An interrupt may come twice, but it must come.
        rustix::io::read(&irq, &mut [0; 8]).map_err(|error| format!("no interrupt: {error}"))?;
        let body = bytes![20u32, 0b10_0001u32, 1u32, 0u32, 0u32];
        self.call(command::DEVICE_SET_IRQS, &body, &[])?;
        let request = bytes![256u32, 0u32, 0u32, 0u32];
        let request = self.message(command::DEVICE_GET_REGION_IO_FDS, false, &request);
        self.send(&request, &[])?;
        let mut doorbells = Vec::new();
        self.reply(command::DEVICE_GET_REGION_IO_FDS, &mut doorbells)?;
        if doorbells.len() != 1 || crate::is_eventfd(&doorbells[0]) != Ok(true) {
            return Err(format!("doorbells: {doorbells:?}"));
        }
        let one = |value: u64| bytes![register::VALUE, 0u32, 8u32, value];
        let multi = [bytes![2u64], one(self.value()), one(self.value())].concat();
        self.call(command::REGION_WRITE_MULTI, &multi, &[])?;
        // More than a socket takes at a time, in both directions.
        let long: Vec<u8> =
            (0..400_000u64).map(|at| (at * self.next / 64).to_le_bytes()[0]).collect();
        self.sum.add_bytes(&long);
        let body = [bytes![0u64, 1u32, 400_000u32], long].concat();
        self.call(command::REGION_WRITE, &body, &[])?;
        let read = self.read(1, 0, u32::try_from(LONG).unwrap())?;
        if let Some(at) = (0..LONG).zip(&read).position(|(at, &byte)| byte != pattern(at)) {
            return Err(format!("another byte at {at} of a long reply"));
        }
        let mut memory = Sum::default();
        self.maps.iter().for_each(|map| memory.add(map.1));
        self.expect("memory", register::MEMORY, &[memory.count, memory.hash])?;
        for _ in 0..3 {
            self.unmap()?;
        }
        self.expect("values", register::SUM, &[self.sum.count, self.sum.hash])?;
        if self.id % 4 == 0 {
            self.call(command::DEVICE_RESET, &[], &[])?;
            self.sum = Sum::default();
        }
        Ok(())
    }

    /// No reply is left over.
    pub(super) fn check_end(&mut self) -> Seen<()> {
        self.stream.set_nonblocking(true).unwrap();
        match self.stream.read(&mut [0; 16]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            other => Err(format!("after the last reply: {other:?}")),
        }
    }
}
