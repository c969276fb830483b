// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Clients that mean harm: of vfio-user, and of the control socket. They run beside the guests, and
//! rest while the bus is counted.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use fastrand::Rng;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{FallocateFlags, MemfdFlags, OFlags, fallocate, fcntl_setfl};
use rustix::fs::{ftruncate, memfd_create};
use rustix::io::retry_on_intr;
use rustix::net::{SendFlags, send};
use vbus_shm::abi::{bar0, command as device_command, reg};
use vfio_user_protocol::message::{Kind, MultiWrite, command, message};
use vfio_user_protocol::{Client, ClientError, Errno, pci};

use crate::bus::device;

/// The device whose clients break the protocol in ways that certainly end a connection.
pub const EXACT: &str = "hostile-exact";
/// The devices whose clients do anything.
pub const WILD: [&str; 2] = ["hostile-net", "hostile-state"];

/// How long the bus may take to serve a client, and to end a connection.
const BOUND: Duration = Duration::from_secs(30);
/// The longest pause between two deeds, in milliseconds.
const PAUSE_MS: u64 = 500;

/// The lines of the configuration for the devices.
pub fn config() -> String {
    let page = "pages = [{ name = \"p\", bytes = 65536, owner = \"driver\" }]";
    [
        device(EXACT, "venet", "backend = \"switch\""),
        device(WILD[0], "venet", "backend = \"switch\"\nqueue-pairs = 2"),
        device(WILD[1], "state", page),
    ]
    .concat()
}

/// What the clients and their owner see.
#[derive(Default)]
struct Shared {
    over: AtomicBool,
    rest: AtomicBool,
    resting: AtomicUsize,
    /// What was done, of all kinds.
    deeds: AtomicU64,
    /// Violations that certainly ended a connection of [`EXACT`].
    violations: AtomicU64,
    /// Replies that did not come in the time after which QEMU gives a device up.
    slow: AtomicU64,
    fault: Mutex<Option<String>>,
}

/// The hostile clients. Dropping this ends them.
pub struct Hostile {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Hostile {
    /// Begins. The sockets are in the folder `bus`; all choices follow from `seed`.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn start(bus: &Path, seed: u64) -> Result<Self> {
        let shared = Arc::<Shared>::default();
        let mut hostile = Self { shared: shared.clone(), threads: Vec::new() };
        let kinds: [fn(&Clients) -> Result<()>; 3] = [exact, wild, control];
        for (number, kind) in (0..).zip(kinds) {
            let rng = Mutex::new(Rng::with_seed(seed.wrapping_mul(31).wrapping_add(number)));
            let clients = Clients { bus: bus.to_owned(), shared: shared.clone(), rng };
            let run = move || {
                if let Err(error) = clients.repeat(kind) {
                    let mut fault =
                        clients.shared.fault.lock().unwrap_or_else(PoisonError::into_inner);
                    fault.get_or_insert(format!("{error:#}"));
                }
                // The owner does not wait for one that has ended.
                clients.shared.resting.fetch_add(1, Ordering::SeqCst);
            };
            hostile.threads.push(std::thread::Builder::new().name("hostile".into()).spawn(run)?);
        }
        Ok(hostile)
    }

    /// Lets the clients go when they have done what they are doing, and no others come until
    /// [`go_on`](Self::go_on).
    ///
    /// # Errors
    /// They do not end.
    pub fn rest(&self) -> Result<()> {
        self.shared.rest.store(true, Ordering::SeqCst);
        let began = Instant::now();
        while self.shared.resting.load(Ordering::SeqCst) < self.threads.len() {
            ensure!(began.elapsed() < 2 * BOUND, "the hostile clients do not come to rest");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Ends the rest.
    pub fn go_on(&self) {
        self.shared.rest.store(false, Ordering::SeqCst);
    }

    /// Whether the bus did to each client what it must.
    ///
    /// # Errors
    /// It did not serve a client, or did not end a connection.
    pub fn check(&self) -> Result<()> {
        match &*self.shared.fault.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(fault) => Err(anyhow!("hostile clients: {fault}")),
            None => Ok(()),
        }
    }

    /// How many things were done.
    pub fn deeds(&self) -> u64 {
        self.shared.deeds.load(Ordering::Relaxed)
    }

    /// How many violations certainly ended a connection of [`EXACT`].
    pub fn violations(&self) -> u64 {
        self.shared.violations.load(Ordering::Relaxed)
    }

    /// How many replies took longer than QEMU waits for one.
    pub fn slow(&self) -> u64 {
        self.shared.slow.load(Ordering::Relaxed)
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The clients of one thread.
struct Clients {
    bus: PathBuf,
    shared: Arc<Shared>,
    rng: Mutex<Rng>,
}

impl Clients {
    fn repeat(&self, deed: fn(&Self) -> Result<()>) -> Result<()> {
        while !self.shared.over.load(Ordering::SeqCst) {
            if self.shared.rest.load(Ordering::SeqCst) {
                self.shared.resting.fetch_add(1, Ordering::SeqCst);
                while self.shared.rest.load(Ordering::SeqCst)
                    && !self.shared.over.load(Ordering::SeqCst)
                {
                    std::thread::sleep(Duration::from_millis(10));
                }
                self.shared.resting.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            deed(self)?;
            self.shared.deeds.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(self.random(PAUSE_MS)));
        }
        Ok(())
    }

    /// A number below `below`.
    fn random(&self, below: u64) -> u64 {
        self.rng().u64(0..below)
    }

    fn bytes(&self, count: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(count).unwrap_or_default()];
        self.rng().fill(&mut bytes);
        bytes
    }

    fn rng(&self) -> std::sync::MutexGuard<'_, Rng> {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn socket(&self, device: &str) -> PathBuf {
        self.bus.join(format!("{device}.sock"))
    }

    /// Connects to a device, whose client before may not have gone yet.
    fn connect(&self, device: &str) -> Result<Client> {
        let began = Instant::now();
        loop {
            match Client::connect(self.socket(device)) {
                Ok(client) => return Ok(client),
                Err(error) if began.elapsed() > BOUND => {
                    return Err(error).with_context(|| format!("{device} serves no client"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

/// A message that certainly ends the connection for a violation, or a message that the end of the
/// client cuts off.
fn exact(clients: &Clients) -> Result<()> {
    let ask = Kind::Command { no_reply: false };
    let mut header = message(1, command::DEVICE_GET_INFO, ask, &[0; 16]);
    let fields = 4..8; // Of the header: the size of the message.
    let (what, bytes) = match clients.random(8) {
        0 => {
            header[fields].copy_from_slice(&8u32.to_ne_bytes());
            ("a size below the header's", header)
        }
        1 => {
            header[fields].copy_from_slice(&u32::MAX.to_ne_bytes());
            ("a message of 4 GiB", header)
        }
        2 => {
            header[8] = 7;
            ("a message that is neither command nor reply", header)
        }
        3 => ("a reply", message(1, command::REGION_READ, Kind::Reply { error: None }, &[0; 16])),
        4 => ("a second VERSION", message(1, command::VERSION, ask, &[0; 4])),
        5 => ("half a message", header[..20].to_vec()),
        6 => return too_early(clients, &message(1, command::DEVICE_GET_INFO, ask, &[0; 16])),
        _ => return too_early(clients, &message(1, command::VERSION, ask, b"\0\0\0\0{}")),
    };
    let client = clients.connect(EXACT)?;
    send(client.as_fd(), &bytes, SendFlags::NOSIGNAL).context("cannot send")?;
    if what == "half a message" {
        // A client that goes in the middle of a message has gone, which is no violation.
        return Ok(());
    }
    wait_end(client.as_fd(), what)?;
    clients.shared.violations.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

/// A first message that is no good VERSION: it is refused, and the connection ends.
fn too_early(clients: &Clients, bytes: &[u8]) -> Result<()> {
    const REPLY: usize = 16;
    let began = Instant::now();
    loop {
        let mut socket = UnixStream::connect(clients.socket(EXACT))?;
        socket.set_read_timeout(Some(BOUND))?;
        socket.write_all(bytes)?;
        let mut reply = [0; REPLY];
        socket.read_exact(&mut reply).context("no reply to a bad first message")?;
        let error = u32::from_ne_bytes([reply[12], reply[13], reply[14], reply[15]]);
        wait_end(socket.as_fd(), "a bad first message")?;
        if error == Errno::INVAL.raw_os_error().unsigned_abs() {
            clients.shared.violations.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        // The client before has not gone yet, so this one was refused for that.
        ensure!(
            error == Errno::BUSY.raw_os_error().unsigned_abs() && began.elapsed() < BOUND,
            "a bad first message is refused with the errno {error}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until the bus has ended the connection.
fn wait_end(socket: impl AsFd, what: &str) -> Result<()> {
    let mut polled = [PollFd::new(&socket, PollFlags::RDHUP | PollFlags::HUP)];
    let bound = Timespec::try_from(BOUND)?;
    match retry_on_intr(|| poll(&mut polled, Some(&bound))) {
        Ok(0) => bail!("the connection goes on behind {what}"),
        Ok(_) => Ok(()),
        Err(error) => Err(error).context("poll"),
    }
}

/// The memory that a wild client shares, and its address as the device sees it.
const BASE: u64 = 0x1_0000_0000;
const BYTES: u64 = 1 << 20;
const HANDSHAKE: u64 = 0x1234_5678_9abc_def0;

/// A client that does anything. The bus may end the connection, and must serve the next client.
fn wild(clients: &Clients) -> Result<()> {
    let device = WILD[usize::from(clients.random(2) == 1)];
    let client = clients.connect(device)?;
    let memory = memfd_create("hostile", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&memory, BYTES)?;
    let mut wild = Wild { client, memory };
    let deed = DEEDS[usize::try_from(clients.random(DEEDS.len() as u64))?];
    if let Err(ClientError::Timeout(_)) = deed(&mut wild, clients) {
        clients.shared.slow.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// What a wild client can do. The error is that of the last message.
type Deed = fn(&mut Wild, &Clients) -> Result<(), ClientError>;

const DEEDS: [Deed; 8] = [
    Wild::registers,
    Wild::messages,
    Wild::regions,
    Wild::shrinks,
    Wild::punches,
    Wild::interrupts,
    Wild::commands,
    Wild::silence,
];

struct Wild {
    client: Client,
    memory: OwnedFd,
}

impl Wild {
    /// Maps the memory and opens the device.
    fn open(&mut self) -> Result<(), ClientError> {
        self.client.dma_map(self.memory.as_fd(), 0, BASE, BYTES)?;
        rustix::io::pwrite(&self.memory, &HANDSHAKE.to_le_bytes(), 0)?;
        self.command(device_command::OPEN, [1, 0, BASE, HANDSHAKE]).map(drop)
    }

    /// A command of the device, with its arguments. Returns its result.
    fn command(&mut self, number: u32, arguments: [u64; 4]) -> Result<u32, ClientError> {
        for (at, argument) in (0..).zip(arguments) {
            let offset = reg::ARGUMENT + 8 * at;
            self.client.region_post(pci::REGION_BAR0, offset, &argument.to_le_bytes())?;
        }
        self.client.region_post(pci::REGION_BAR0, reg::COMMAND, &number.to_le_bytes())?;
        let mut result = [0; 4];
        self.client.region_read(pci::REGION_BAR0, reg::RESULT, &mut result)?;
        Ok(u32::from_le_bytes(result))
    }

    /// Random values into registers and doorbells of the open device.
    fn registers(&mut self, clients: &Clients) -> Result<(), ClientError> {
        self.open()?;
        for _ in 0..200 {
            let offset = clients.random(bar0::SIZE / 4) * 4;
            let value = match clients.random(3) {
                0 => clients.random(16),
                1 => BASE + clients.random(BYTES / 8) * 8,
                _ => clients.random(u64::MAX),
            };
            let bytes = value.to_le_bytes();
            let length = if clients.random(2) == 0 { 4 } else { 8 };
            self.client.region_post(pci::REGION_BAR0, offset, &bytes[..length])?;
        }
        self.client.device_info().map(drop)
    }

    /// Known commands with random bodies, and unknown commands.
    fn messages(&mut self, clients: &Clients) -> Result<(), ClientError> {
        for _ in 0..40 {
            let number = u16::try_from(2 + clients.random(20)).unwrap_or_default();
            let body = clients.bytes(clients.random(72));
            let fds = [self.memory.as_fd(); 2];
            let count = usize::try_from(clients.random(3)).unwrap_or_default();
            match self.client.call(number, &body, &fds[..count]) {
                Err(error) if error.is_final() => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Regions of random memory, with random ids, lengths and signals, and their doorbells.
    fn regions(&mut self, clients: &Clients) -> Result<(), ClientError> {
        self.open()?;
        let noise = clients.bytes(64 << 10);
        rustix::io::pwrite(&self.memory, &noise, 4096)?;
        for id in 0..24 {
            let (at, length) = (clients.random(16) * 4096, 64 << clients.random(12));
            let signal =
                if id % 2 == 0 { device_command::NO_SIGNAL } else { clients.random(64) * 8 };
            self.command(device_command::REGION_ADD, [id % 6, BASE + at, length, signal])?;
            self.client.region_post(
                pci::REGION_BAR0,
                bar0::DOORBELLS + id * bar0::DOORBELL_STRIDE,
                &1u32.to_le_bytes(),
            )?;
        }
        Ok(())
    }

    /// Takes memory away that the device has mapped.
    fn shrinks(&mut self, _: &Clients) -> Result<(), ClientError> {
        self.open()?;
        ftruncate(&self.memory, 0)?;
        self.touch()
    }

    /// Punches holes into it.
    fn punches(&mut self, _: &Clients) -> Result<(), ClientError> {
        self.open()?;
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.memory, how, 0, BYTES)?;
        self.touch()
    }

    /// Lets the device look at the memory.
    fn touch(&mut self) -> Result<(), ClientError> {
        self.command(device_command::CLOSE, [0; 4])?;
        self.command(device_command::OPEN, [1, 0, BASE, HANDSHAKE])?;
        self.command(device_command::REGION_ADD, [0, BASE + 4096, 8192, 0]).map(drop)
    }

    /// Eventfds that are full and block, for each interrupt and from several sides.
    fn interrupts(&mut self, clients: &Clients) -> Result<(), ClientError> {
        let full = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes())?;
        fcntl_setfl(&full, OFlags::empty())?;
        for index in 0..3 {
            // INTx has one interrupt, and another index than the device has may be refused.
            match self.client.connect_irqs(index, 0, &[full.as_fd()]) {
                Err(error) if error.is_final() => return Err(error),
                _ => {}
            }
        }
        self.registers(clients)
    }

    /// Many commands of the device in one message, with no reply to wait for.
    fn commands(&mut self, clients: &Clients) -> Result<(), ClientError> {
        self.open()?;
        let data: Vec<[u8; 4]> = (0..64)
            .map(|_| u32::try_from(clients.random(12)).unwrap_or_default().to_le_bytes())
            .collect();
        let writes: Vec<_> = data
            .iter()
            .map(|data| MultiWrite { region: pci::REGION_BAR0, offset: reg::COMMAND, data })
            .collect();
        self.client.post(command::REGION_WRITE_MULTI, &MultiWrite::body(&writes))?;
        self.client.device_info().map(drop)
    }

    /// Says nothing, and goes in the middle of a message, or without a word.
    fn silence(&mut self, clients: &Clients) -> Result<(), ClientError> {
        std::thread::sleep(Duration::from_millis(clients.random(1000)));
        if clients.random(2) == 0 {
            let ask = Kind::Command { no_reply: false };
            let bytes = message(9, command::REGION_READ, ask, &[0; 16]);
            let cut = usize::try_from(clients.random(bytes.len() as u64)).unwrap_or_default();
            send(self.client.as_fd(), &bytes[..cut], SendFlags::NOSIGNAL)?;
        }
        Ok(())
    }
}

/// Clients of the control socket that are silent, talk nonsense, or do not listen.
fn control(clients: &Clients) -> Result<()> {
    let connect = || {
        let socket = UnixStream::connect(clients.bus.join("control.sock"))
            .context("cannot connect to the control socket")?;
        socket.set_write_timeout(Some(BOUND))?;
        Ok::<_, anyhow::Error>(socket)
    };
    // Of the bus's places for control clients, so many are taken at once.
    let mut held = Vec::new();
    for _ in 0..=clients.random(8) {
        held.push(connect()?);
    }
    for socket in &mut held {
        let bytes = match clients.random(6) {
            0 => Vec::new(),
            1 => clients.bytes(clients.random(3000)),
            2 => b"{\"op\":\"list\"".to_vec(),
            3 => b"{\"op\":\"list\"}\n".repeat(20),
            4 => [&b"["[..]; 3000].concat(),
            _ => b"{\"op\":\"remove\",\"name\":\"there is none\"}\n".to_vec(),
        };
        // The bus may have hung up.
        let _ = socket.write_all(&bytes);
    }
    std::thread::sleep(Duration::from_millis(clients.random(1500)));
    Ok(())
}
