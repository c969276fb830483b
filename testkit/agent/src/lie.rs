// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A hostile vfio-user server. It stands between a client and the honest server of a device, and
//! passes their messages on with the descriptors. It turns one answer of the server into a lie.
#![allow(unsafe_code)] // The standard library sends no descriptors.

use std::ffi::{c_int, c_void};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::ptr::{null_mut, read_unaligned, write_unaligned};

use vbus_shm::abi::{error_code, reg};

use crate::random::Random;
use crate::rings::{Rings, Write as RegisterWrite};

/// The numbers of commands.
const DMA_MAP: u16 = 2;
const DMA_UNMAP: u16 = 3;
const GET_INFO: u16 = 4;
const GET_REGION_INFO: u16 = 5;
const GET_IO_FDS: u16 = 6;
const GET_IRQ_INFO: u16 = 7;
const REGION_READ: u16 = 9;
const REGION_WRITE: u16 = 10;
const DMA_READ: u16 = 11;
const DMA_WRITE: u16 = 12;
const DEVICE_RESET: u16 = 13;
const REGION_WRITE_MULTI: u16 = 15;

const HEADER: usize = 16;
/// The flags in a header.
const REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;
/// The most descriptors that go with one piece of a message (`SCM_MAX_FD`).
const FDS: usize = 253;
/// What comes before the descriptors in ancillary data: length, level, type.
const CONTROL_HEADER: usize = 16;

#[repr(C)]
struct Piece {
    base: *mut c_void,
    length: usize,
}

/// `struct msghdr` of 64-bit Linux.
#[repr(C)]
struct MessageHeader {
    name: *mut c_void,
    name_length: u32,
    pieces: *mut Piece,
    piece_count: usize,
    control: *mut c_void,
    control_length: usize,
    flags: c_int,
}

unsafe extern "C" {
    fn sendmsg(fd: c_int, message: *const MessageHeader, flags: c_int) -> isize;
    fn recvmsg(fd: c_int, message: *mut MessageHeader, flags: c_int) -> isize;
}

/// Calls `act` with a message that has one piece and ancillary data.
fn with_message(
    piece: (*mut u8, usize),
    control: (*mut u64, usize),
    act: impl FnOnce(&mut MessageHeader) -> isize,
) -> io::Result<(usize, usize)> {
    let mut piece = Piece { base: piece.0.cast(), length: piece.1 };
    let mut message = MessageHeader {
        name: null_mut(),
        name_length: 0,
        pieces: &raw mut piece,
        piece_count: 1,
        control: if control.1 == 0 { null_mut() } else { control.0.cast() },
        control_length: control.1,
        flags: 0,
    };
    let done = act(&mut message);
    Ok((usize::try_from(done).map_err(|_| io::Error::last_os_error())?, message.control_length))
}

/// Sends bytes with descriptors, at most [`FDS`].
fn send(socket: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
    // An array of words is aligned.
    let mut control = [0u64; (CONTROL_HEADER + 4 * FDS).div_ceil(8)];
    let length = if fds.is_empty() { 0 } else { CONTROL_HEADER + 4 * fds.len() };
    control[0] = length as u64;
    // SOL_SOCKET, SCM_RIGHTS.
    control[1] = 1 | 1 << 32;
    for (at, fd) in fds.iter().enumerate() {
        // SAFETY: this is inside the array, which has room for [`FDS`] descriptors.
        unsafe {
            write_unaligned(
                control.as_mut_ptr().cast::<u8>().add(CONTROL_HEADER + 4 * at).cast(),
                *fd,
            )
        };
    }
    let room = length.next_multiple_of(8);
    let sent = with_message(
        (bytes.as_ptr().cast_mut(), bytes.len()),
        (control.as_mut_ptr(), room),
        // SAFETY: all memory in the message outlives the call.
        |message| unsafe { sendmsg(socket.as_raw_fd(), message, 0) },
    )?;
    let mut rest: &UnixStream = socket;
    rest.write_all(&bytes[sent.0..])
}

/// Receives exactly `bytes` and the descriptors that come with them. Returns false at the end of
/// the stream.
fn receive(socket: &UnixStream, mut bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<bool> {
    while !bytes.is_empty() {
        let mut control = [0u64; (CONTROL_HEADER + 4 * FDS).div_ceil(8)];
        let received = with_message(
            (bytes.as_mut_ptr(), bytes.len()),
            (control.as_mut_ptr(), size_of_val(&control)),
            // SAFETY: as above.
            |message| unsafe { recvmsg(socket.as_raw_fd(), message, 0) },
        )?;
        if received.0 == 0 {
            return Ok(false);
        }
        if received.1 > CONTROL_HEADER {
            let count = usize::try_from(control[0]).unwrap_or(0).saturating_sub(CONTROL_HEADER) / 4;
            for at in 0..count.min(FDS) {
                // SAFETY: the kernel has written this many new descriptors there. Nobody owns them
                // yet.
                fds.push(unsafe {
                    let fd =
                        control.as_ptr().cast::<u8>().add(CONTROL_HEADER + 4 * at).cast::<RawFd>();
                    OwnedFd::from_raw_fd(read_unaligned(fd))
                });
            }
        }
        bytes = &mut bytes[received.0..];
    }
    Ok(true)
}

/// A message with its header.
struct Message {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Message {
    fn receive(socket: &UnixStream) -> io::Result<Option<Self>> {
        let mut message = Self { bytes: vec![0; HEADER], fds: Vec::new() };
        if !receive(socket, &mut message.bytes, &mut message.fds)? {
            return Ok(None);
        }
        let size = message.word(4) as usize;
        message.bytes.resize(size.max(HEADER), 0);
        let whole = receive(socket, &mut message.bytes[HEADER..], &mut message.fds)?;
        Ok(whole.then_some(message))
    }

    fn send(&self, socket: &UnixStream) -> io::Result<()> {
        let fds: Vec<RawFd> = self.fds.iter().map(AsRawFd::as_raw_fd).collect();
        // Descriptors that do not fit go with the second half.
        let (first, rest) = fds.split_at(fds.len().min(FDS));
        let half = if rest.is_empty() { self.bytes.len() } else { HEADER };
        send(socket, &self.bytes[..half], first)?;
        if half < self.bytes.len() { send(socket, &self.bytes[half..], rest) } else { Ok(()) }
    }

    fn command(&self) -> u16 {
        u16::from_le_bytes([self.bytes[2], self.bytes[3]])
    }

    /// A number of 32 bits. The body begins at [`HEADER`].
    fn word(&self, at: usize) -> u32 {
        let bytes = self.bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    }

    /// A number of 64 bits.
    fn long(&self, at: usize) -> u64 {
        u64::from(self.word(at)) | u64::from(self.word(at + 4)) << 32
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.bytes.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    /// Sets the length of the body, also in the header.
    fn resize(&mut self, length: usize) {
        self.bytes.resize(HEADER + length, 0xee);
        let size = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.put(4, &size.to_le_bytes());
    }

    /// Turns the message into an error.
    fn refuse(&mut self, error: u32) {
        self.resize(0);
        self.put(8, &(REPLY | ERROR).to_le_bytes());
        self.put(12, &error.to_le_bytes());
    }

    fn give(&mut self, count: usize) -> io::Result<()> {
        for _ in 0..count {
            self.fds.push(File::options().read(true).write(true).open("/dev/null")?.into());
        }
        Ok(())
    }
}

/// What happens to an answer.
enum Act {
    /// The server sends it as it is now.
    Send,
    /// The server does not send it.
    Keep,
    /// The server sends this many bytes of it and closes the connection.
    Cut(usize),
    /// The server sends endless requests in its place.
    Ask,
    /// The server first asks the client to read and write memory that the client has not shared:
    /// address and length.
    Touch(&'static [(u64, u32)]),
}

/// Turns `reply`, the answer to `command`, into the lie `name`. `late` means that the server has
/// answered everything that a client asks when a device is plugged. None: this answer is no lie.
fn falsify(
    name: &str,
    command: &Message,
    reply: &mut Message,
    late: bool,
    random: &mut Random,
) -> io::Result<Option<Act>> {
    // Most requests have the index of their subject in the third word.
    let (asked, index) = (command.command(), command.word(HEADER + 8));
    let bar = asked == GET_REGION_INFO && index == 0;
    let read = asked == REGION_READ && late == name.starts_with("late-");
    const SIZE: usize = HEADER + 16;
    let mut act = Act::Send;
    match name {
        "none" => {}
        // Whatever the driver does, the device says that it has ended the connection.
        "breaks" if asked == REGION_READ && index == 0 => {
            if command.long(HEADER) != reg::CONNECTION {
                return Ok(None);
            }
            let broken = reg::CONNECTION_BROKEN | error_code::REVOKED << 16;
            reply.put(HEADER + 16, &broken.to_le_bytes());
        }
        // One of eight registers reads as anything.
        "words" if asked == REGION_READ && index == 0 => {
            if random.next() % 8 != 0 {
                return Ok(None);
            }
            let noise = random.next().to_le_bytes();
            let length = reply.bytes.len().saturating_sub(HEADER + 16).min(noise.len());
            reply.put(HEADER + 16, &noise[..length]);
        }
        "bar-none" if bar => reply.put(SIZE, &0u64.to_le_bytes()),
        "bar-odd" if bar => reply.put(SIZE, &0x4001u64.to_le_bytes()),
        "bar-huge" if bar => reply.put(SIZE, &(1u64 << 63).to_le_bytes()),
        "region-more" if asked == GET_REGION_INFO && index == 3 => {
            reply.put(HEADER + 4, &3u32.to_le_bytes());
            reply.put(SIZE, &u64::MAX.to_le_bytes());
        }
        // The flag says that BAR0 can be mapped: two parts of it, far after the end of the file
        // that comes with the answer.
        "bar-mapped" if bar => {
            reply.resize(32 + 48);
            reply.put(HEADER, &80u32.to_le_bytes());
            reply.put(HEADER + 4, &0xfu32.to_le_bytes());
            reply.put(HEADER + 12, &32u32.to_le_bytes());
            reply.put(HEADER + 24, &(u64::MAX - 0xfff).to_le_bytes());
            reply.put(HEADER + 32, &(1u64 | 1 << 16).to_le_bytes());
            reply.put(HEADER + 40, &2u64.to_le_bytes());
            let areas =
                [1u64 << 40, 1 << 20, u64::MAX - 0xfff, 0x2000].map(u64::to_le_bytes).concat();
            reply.put(HEADER + 48, &areas);
            reply.give(1)?;
        }
        "io-size" if asked == GET_IO_FDS => {
            reply.put(HEADER + 16 + 8, &(u64::MAX - 3).to_le_bytes())
        }
        "io-offset" if asked == GET_IO_FDS => reply.put(HEADER + 16, &(1u64 << 62).to_le_bytes()),
        "io-count" if asked == GET_IO_FDS => reply.put(HEADER + 12, &u32::MAX.to_le_bytes()),
        "io-index" if asked == GET_IO_FDS => reply.put(HEADER + 16 + 16, &9999u32.to_le_bytes()),
        "io-none" if asked == GET_IO_FDS => reply.fds.clear(),
        "io-file" if asked == GET_IO_FDS => {
            let count = reply.fds.len();
            reply.fds.clear();
            reply.give(count)?;
        }
        "irq-many" if asked == GET_IRQ_INFO => reply.put(HEADER + 12, &u32::MAX.to_le_bytes()),
        "kinds-none" if asked == GET_INFO => reply.put(HEADER + 8, &[0; 8]),
        "short" if asked == GET_INFO => reply.resize(5),
        "empty" if asked == GET_REGION_INFO => reply.resize(0),
        "read-short" if read => reply.resize(17),
        "read-long" | "late-long" if read => reply.resize(4096),
        "read-other" if read => reply.put(HEADER, &0x44u64.to_le_bytes()),
        "size-less" if asked == GET_INFO => reply.put(4, &7u32.to_le_bytes()),
        "size-huge" if asked == GET_INFO => reply.put(4, &(1u32 << 31).to_le_bytes()),
        "type" if asked == GET_INFO => reply.put(8, &0xfu32.to_le_bytes()),
        "id" if asked == GET_INFO => reply.put(0, &[0x77, 0x77]),
        "late-id" if read => reply.put(0, &[0x77, 0x77]),
        "command" if asked == GET_INFO => reply.put(2, &GET_IRQ_INFO.to_le_bytes()),
        "refused" if asked == DMA_MAP => reply.refuse(12),
        "refused-by-0" if asked == DMA_MAP => reply.refuse(0),
        "refused-by-all" if asked == DMA_MAP => reply.refuse(u32::MAX),
        "files" if asked == GET_INFO => reply.give(2 * FDS)?,
        "silence" if asked == GET_IO_FDS => act = Act::Keep,
        "late-silence" if read => act = Act::Keep,
        "questions" if asked == GET_IO_FDS => act = Act::Ask,
        "late-questions" if read => act = Act::Ask,
        "cut-header" if asked == GET_INFO => act = Act::Cut(9),
        "cut-body" if asked == GET_INFO => act = Act::Cut(HEADER + 3),
        "cut" if asked == GET_INFO => act = Act::Cut(0),
        "late-cut" if read => act = Act::Cut(HEADER + 3),
        // The client has shared its memory. These ranges are outside of it, across the end of a
        // part of it, and around the end of the address space.
        "memory" if asked == GET_IO_FDS && reply.bytes.len() > HEADER + 16 => {
            act = Act::Touch(&[
                (1 << 40, 64),
                (0xe000_0000, 4),
                (0x1800_0000 - 8, 64),
                (u64::MAX - 7, 64),
                (0, u32::MAX),
            ]);
        }
        _ => return Ok(None),
    }
    Ok(Some(act))
}

/// A request of the server: it reads or writes `length` bytes of the client's memory.
fn question(command: u16, flags: u32, address: u64, length: u32) -> Message {
    let mut message = Message { bytes: vec![0; HEADER], fds: Vec::new() };
    let data = if command == DMA_WRITE { usize::try_from(length).unwrap_or(0).min(64) } else { 0 };
    message.resize(16 + data);
    message.put(0, &0x5151u16.to_le_bytes());
    message.put(2, &command.to_le_bytes());
    message.put(8, &flags.to_le_bytes());
    message.put(HEADER, &address.to_le_bytes());
    message.put(HEADER + 8, &u64::from(length).to_le_bytes());
    message
}

/// Lets the lie `rings` see a command before the server does.
fn follow(rings: &mut Rings, message: &Message) -> io::Result<()> {
    /// Bytes of one of several writes.
    const WRITE: usize = 24;
    rings.settle();
    let body = HEADER;
    match message.command() {
        DMA_MAP => {
            if let Some(fd) = message.fds.first() {
                let (offset, address) = (message.long(body + 8), message.long(body + 16));
                rings.map(address, message.long(body + 24), fd, offset)?;
            }
        }
        DMA_UNMAP => rings.unmap(message.long(body + 8), message.long(body + 16)),
        DEVICE_RESET => rings.forget(),
        REGION_WRITE => {
            let count = message.word(body + 12) as usize;
            if let Some(data) = message.bytes.get(body + 16..).and_then(|data| data.get(..count)) {
                let (region, offset) = (message.word(body + 8), message.long(body));
                rings.write(&RegisterWrite { region, offset, data });
            }
        }
        REGION_WRITE_MULTI => {
            // Each write has its place and room for 8 bytes.
            let writes = message.bytes.len().saturating_sub(body + 8) / WRITE;
            for at in (body + 8..).step_by(WRITE).take(writes) {
                let (region, offset) = (message.word(at + 8), message.long(at));
                let count = (message.word(at + 12) as usize).min(8);
                let data = &message.bytes[at + 16..at + 16 + count];
                rings.write(&RegisterWrite { region, offset, data });
            }
        }
        _ => {}
    }
    Ok(())
}

/// Serves the first client of `socket` like the server at `server`, but with the lie `name`. Runs
/// until it is killed. Prints a line when it listens and a line when it has lied.
pub fn lie(socket: &str, server: &str, name: &str) -> io::Result<()> {
    let _ = fs::remove_file(socket);
    let listener = UnixListener::bind(socket)?;
    println!("listens");
    let (client, _) = listener.accept()?;
    let server = UnixStream::connect(server)?;
    let mut late = false;
    let mut rings = if name == "rings" { Some(Rings::start()?) } else { None };
    let mut random = Random::of_system()?;
    while let Some(command) = Message::receive(&client)? {
        if let Some(rings) = &mut rings {
            follow(rings, &command)?;
        }
        command.send(&server)?;
        if command.word(8) & NO_REPLY != 0 {
            continue;
        }
        let Some(mut reply) = Message::receive(&server)? else { break };
        let act = falsify(name, &command, &mut reply, late, &mut random)?;
        // The client asks twice: the first time for the length.
        late |= command.command() == GET_IO_FDS && reply.bytes.len() > HEADER + 16;
        if act.is_some() {
            println!("lies");
        }
        match act.unwrap_or(Act::Send) {
            Act::Send => reply.send(&client)?,
            Act::Keep => {}
            Act::Cut(length) => {
                send(&client, &reply.bytes[..length], &[])?;
                client.shutdown(Shutdown::Both)?;
                break;
            }
            Act::Ask => {
                // This ends when the client closes the connection.
                while question(DMA_READ, NO_REPLY, 0, 4096).send(&client).is_ok() {}
            }
            Act::Touch(places) => {
                for (address, length) in places {
                    for verb in [DMA_READ, DMA_WRITE] {
                        question(verb, 0, *address, *length).send(&client)?;
                        let Some(answer) = Message::receive(&client)? else { return Ok(()) };
                        if answer.word(8) & ERROR == 0 {
                            let what = format!("{length} bytes at {address:#x} are the server's");
                            return Err(io::Error::other(what));
                        }
                        println!("touches: error {}", answer.word(12));
                    }
                }
                println!("touched");
                reply.send(&client)?;
            }
        }
    }
    // This process keeps the connection open until the client closes it or the starter kills it.
    let mut rest = Vec::new();
    let _ = (&client).read_to_end(&mut rest);
    Ok(())
}
