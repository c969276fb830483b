// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A server that takes up the journal of another one (spec/journal.md), which somebody has forged,
//! with the state that goes with it.
//!
//! The first byte chooses a moment in the life of a server with a client. Then the input changes
//! the journal and the state of that moment. The server that goes on from both is refused, or
//! serves: it answers whatever its client says, ends with it, and leaves no descriptor open.
#![no_main]

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use serde_json::{Value, json};
use vbus_fuzz::OpenFiles;
use vfio_user_protocol::state::{Held, ServerData, ServerState};
use vfio_user_protocol::{Errno, IrqAction, IrqInfo, RegionInfo, Server, Target, journal};

/// Bytes of the head, of each buffer, and of all.
const HEAD: u64 = 4096;
const BUFFER: u64 = 1_052_672;
const ALL: u64 = HEAD + 2 * BUFFER;
/// So much of each buffer is in use at the moments below.
const USED: usize = 512;

const REGION: u64 = 4096;

/// A device that only checks what the server must have checked.
struct Device;

impl Device {
    fn check(region: u32, offset: u64, len: usize) {
        assert!(region == 0 && len > 0 && offset + len as u64 <= REGION);
    }
}

impl Target for Device {
    fn region_info(&self, region: u32) -> RegionInfo {
        if region == 0 { RegionInfo::read_write(REGION) } else { RegionInfo::default() }
    }

    fn irq_info(&self, _: u32) -> IrqInfo {
        IrqInfo::messages(4)
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        Device::check(region, offset, data.len());
        data.fill(0x11);
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        Device::check(region, offset, data.len());
        Ok(())
    }

    fn set_irqs(&mut self, _: u32, _: IrqAction) -> Result<(), Errno> {
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Errno> {
        Ok(())
    }

    fn disconnected(&mut self) {}
}

/// A message of the client.
fn message(command: u16, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(16 + body.len()).expect("short");
    let fields = [&[7, 0][..], &command.to_ne_bytes(), &size.to_ne_bytes(), &[0; 4], &[0; 4], body];
    fields.concat()
}

/// VERSION, a read of 64 bytes of region 0, SET_IRQS, and a part of a write.
fn script() -> [Vec<u8>; 4] {
    let words =
        |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
    let version = b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":8}}\0";
    let mut write = message(10, &words(&[16, 0, 0, 100]));
    write[4..8].copy_from_slice(&(32u32 + 100).to_ne_bytes());
    [
        message(1, version),
        message(9, &words(&[0, 0, 0, 64])),
        message(8, &words(&[20, 0b10_0100, 2, 0, 0])),
        write,
    ]
}

/// What somebody else keeps of a server.
struct Moment {
    data: Value,
    head: Vec<u8>,
    buffers: [Vec<u8>; 2],
}

fn path() -> PathBuf {
    std::env::temp_dir().join(format!("vbus-fuzz-journal-{}", std::process::id()))
}

/// The moments: without a client, and after each message of the script.
static MOMENTS: LazyLock<Vec<Moment>> = LazyLock::new(|| {
    let mut server = Server::bind(path(), "fuzz", Device).expect("a socket");
    let memory = journal::create().expect("a journal");
    let file = std::fs::File::from(memory.try_clone().expect("a descriptor"));
    server.set_journal(memory, Instant::now()).expect("no client");
    let mut moments = Vec::new();
    let mut note = |server: &mut Server<Device>| {
        while server.ready(Instant::now()).work > 0 {}
        let state = server.save(Instant::now()).expect("a state");
        let part = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, at).expect("the journal");
            bytes
        };
        moments.push(Moment {
            data: serde_json::to_value(&state.data).expect("data"),
            head: part(0, HEAD as usize),
            buffers: [part(HEAD, USED), part(HEAD + BUFFER, USED)],
        });
    };
    note(&mut server);
    let mut client = UnixStream::connect(path()).expect("the socket");
    for said in script() {
        client.write_all(&said).expect("it is read");
        note(&mut server);
    }
    moments
});

/// The socket at which the servers listen. Nobody connects.
static LISTENER: LazyLock<UnixListener> = LazyLock::new(|| {
    let path = path().with_extension("listener");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).expect("a socket");
    let _ = std::fs::remove_file(&path);
    listener
});

/// The fields of a head, by their place and size.
fn field(number: u8) -> (usize, usize) {
    const OF_HEAD: [(usize, usize); 5] = [(0, 8), (8, 4), (12, 4), (64, 8), (128, 8)];
    const OF_SLOT: [(usize, usize); 14] = [
        (0, 8),
        (8, 8),
        (16, 4),
        (20, 4),
        (24, 4),
        (28, 4),
        (32, 4),
        (48, 8),
        (64, 8),
        (88, 8),
        (96, 4),
        (104, 4),
        (112, 8),
        (120, 8),
    ];
    let number = usize::from(number) % (OF_HEAD.len() + 4 * OF_SLOT.len());
    match number.checked_sub(OF_HEAD.len()) {
        None => OF_HEAD[number],
        Some(number) => {
            let (at, len) = OF_SLOT[number % OF_SLOT.len()];
            (256 + number / OF_SLOT.len() * 128 + at, len)
        }
    }
}

/// What the input makes of a moment.
struct Forged {
    data: Value,
    head: Vec<u8>,
    buffers: [Vec<u8>; 2],
    held: (u64, usize),
    said: Vec<u8>,
}

impl Forged {
    fn new(moment: &Moment) -> Forged {
        Forged {
            data: moment.data.clone(),
            head: moment.head.clone(),
            buffers: moment.buffers.clone(),
            held: (0, 0),
            said: Vec::new(),
        }
    }

    /// A step: what to change, where, and eight bytes for it.
    fn change(&mut self, step: &[u8; 12]) {
        let [what, low, high, count, value @ ..] = step;
        let number = u64::from_le_bytes(*value);
        // Small numbers are the likely ones.
        let number = if count & 1 == 0 { number } else { number & 0xff };
        let place = usize::from(u16::from_le_bytes([*low, *high]));
        match what % 10 {
            0..=3 => {
                let (at, len) = field(*low);
                self.head[at..at + len].copy_from_slice(&number.to_ne_bytes()[..len]);
            }
            4 => {
                let (at, len) = field(*low);
                let mut old = [0; 8];
                old[..len].copy_from_slice(&self.head[at..at + len]);
                let new = u64::from_ne_bytes(old).wrapping_add_signed((value[0] as i8).into());
                self.head[at..at + len].copy_from_slice(&new.to_ne_bytes()[..len]);
            }
            5 => {
                let at = place % (self.head.len() - 8);
                self.head[at..at + 8].copy_from_slice(value);
            }
            6 => {
                let buffer = &mut self.buffers[usize::from(count >> 7)];
                let at = place % (buffer.len() - 8);
                buffer[at..at + 8].copy_from_slice(value);
            }
            7 => {
                let client = &mut self.data["client"];
                match count % 4 {
                    0 if client.is_object() => client["number"] = json!(number),
                    1 if client.is_object() => client["session"]["negotiated"] = Value::Null,
                    2 => *client = Value::Null,
                    _ => self.data["journal"] = json!(number),
                }
            }
            8 => self.held = (number, usize::from(*low % 20)),
            _ => self.said.extend(&value[..usize::from(count % 9)]),
        }
    }

    /// The descriptors, and the state with them. `client` is the socket of the client.
    fn state(&self, client: OwnedFd) -> Option<ServerState> {
        let data: ServerData = serde_json::from_value(self.data.clone()).ok()?;
        let file = memfd_create("journal", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
        let file = std::fs::File::from(file.expect("a file"));
        ftruncate(&file, ALL).expect("room");
        let parts = [(0, &self.head), (HEAD, &self.buffers[0]), (HEAD + BUFFER, &self.buffers[1])];
        for (at, bytes) in parts {
            file.write_all_at(bytes, at).expect("written");
        }
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .expect("sealed");
        let mut descriptors = vec![LISTENER.as_fd().try_clone_to_owned().expect("a descriptor")];
        if self.data["client"].is_object() {
            descriptors.push(client);
        }
        descriptors.push(file.into());
        let (number, fds) = self.held;
        let event = |_| eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
        Some(ServerState {
            data,
            descriptors,
            held: Held { number, fds: (0..fds).map(event).collect() },
        })
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((&which, steps)) = input.split_first() else { return };
    let mut forged = Forged::new(&MOMENTS[usize::from(which) % MOMENTS.len()]);
    let _ = &*LISTENER;
    let files = OpenFiles::count();
    for step in steps.chunks_exact(12).take(64) {
        forged.change(step.try_into().expect("12 bytes"));
    }
    let (client, socket) = UnixStream::pair().expect("a pair");
    if let Some(state) = forged.state(socket.into()) {
        let is_taken = serve(state, client, &forged.said);
        assert!(is_taken || steps.len() >= 12, "what nobody has changed is refused");
    }
    files.check();
});

/// A server goes on from the state, or refuses it: false. Its client says something, and goes.
fn serve(state: ServerState, mut client: UnixStream, said: &[u8]) -> bool {
    let restored = Server::restore(state, "fuzz", "fuzz", Device, Instant::now());
    let Ok(mut server) = restored else { return false };
    client.set_nonblocking(true).expect("a socket");
    let mut replies = [0; 4096];
    let mut work = |server: &mut Server<Device>, client: &mut UnixStream| {
        while server.ready(Instant::now()).work > 0 {
            while client.read(&mut replies).is_ok_and(|count| count > 0) {}
        }
    };
    work(&mut server, &mut client);
    let _ = client.write(said);
    work(&mut server, &mut client);
    let _ = server.save(Instant::now());
    drop(client);
    while server.ready(Instant::now()).work > 0 {}
    assert!(!server.is_connected() && !server.has_client(), "its client has gone");
    true
}
